/* gateway, part: where pages lie that are not in frames of a program's: the slots, and the tiers behind them.
 *
 * A slot is one page of the store; its entry (struct sy_stored, which stubs read) says where the content is. Three tiers, the best first,
 * each takes a page or leaves it to the next: a page of zeros is nothing; the pool keeps compressed pages, and pages that repeat a word as that
 * word, in frames that it takes from RAM; the swap file has room for every slot. Another tier is another entry in `tiers`. */
#define BUSY 0xffffffffu /* asid of a slot that is being written or read: nobody frees or gives it */

/* ---------------------------------------------------------------- slabs (under lock)
 * As in mm/slub.c: objects of one size side by side in a slab of some frames; those that have room are in the cache's list of partial slabs. What is
 * used is noted beside, not in the objects: RAM is shared with programs. */
#define SLAB_ORDER 2
#define SLAB_WORDS 4 /* 256 objects */
struct slab { uint32_t next, prev; uint16_t used; uint8_t cache, order; uint64_t map[SLAB_WORDS]; }; /* one for each frame; that of a slab's first */
static const uint16_t cache_size[SY_SLAB_CACHES] = {64, 128, 192, 256, 320, 384, 448, 544, 624, 704, 816, 896, 1024, 1168, 1248, 1360, 1488, 1632, 1808, 2048, 2336, 2720, 3264};
struct slab_cache { uint32_t partial, slabs, active, objects, frames; };
struct zpool {
  struct slab *slab;
  struct slab_cache cache[SY_SLAB_CACHES];
};

static uint32_t slab_objects(const struct slab *s) {
  uint32_t n = (uint32_t)(PS << s->order) / cache_size[s->cache];
  return n < SLAB_WORDS * 64 ? n : SLAB_WORDS * 64;
}
static void partial_add(struct zpool *p, uint32_t pfn) {
  struct slab *s = &p->slab[pfn];
  uint32_t *head = &p->cache[s->cache].partial;
  s->prev = NONE, s->next = *head;
  if (*head != NONE) p->slab[*head].prev = pfn;
  *head = pfn;
}
static void partial_cut(struct zpool *p, uint32_t pfn) {
  struct slab *s = &p->slab[pfn];
  if (s->prev != NONE) p->slab[s->prev].next = s->next;
  else p->cache[s->cache].partial = s->next;
  if (s->next != NONE) p->slab[s->next].prev = s->prev;
}
/* Another slab for a cache; smaller than it should be, if nothing better is free and little is wasted. 0, or -1. */
static int slab_grow(struct sy_gateway *g, struct zpool *p, int cache) {
  for (int o = SLAB_ORDER; o >= 0; o--) {
    uint32_t n = 1u << o, size = (uint32_t)(PS << o), pfn;
    if (size / cache_size[cache] * cache_size[cache] * 4 < size * 3) continue;
    if (g->hdr->pool_frames + n > g->hdr->pool_max) continue;
    if ((pfn = first_fit(g, o)) == NONE && (pfn = reserve_pop(g, o)) == NONE) continue;
    set_state(g, pfn, n, SY_FRAME_RESERVED, o);
    for (uint32_t i = pfn; i < pfn + n; i++) g->frames[i].flags = SY_FF_SLAB;
    p->slab[pfn] = (struct slab){.cache = (uint8_t)cache, .order = (uint8_t)o};
    struct slab_cache *c = &p->cache[cache];
    c->slabs++, c->objects += slab_objects(&p->slab[pfn]), c->frames += n, g->hdr->pool_frames += n;
    partial_add(p, pfn);
    return 0;
  }
  return -1;
}
/* Room for size bytes: first frame of the slab, and where in it. 0, or -1: none. */
static int slab_alloc(struct sy_gateway *g, uint32_t size, uint32_t *pfn, uint32_t *offset) {
  struct zpool *p = g->zpool;
  int cache = 0;
  while (cache < SY_SLAB_CACHES && cache_size[cache] < size) cache++;
  if (cache == SY_SLAB_CACHES || (p->cache[cache].partial == NONE && slab_grow(g, p, cache))) return -1;
  struct slab *s = &p->slab[*pfn = p->cache[cache].partial];
  int w = 0;
  while (!~s->map[w]) w++;
  uint32_t i = (uint32_t)(w * 64 + __builtin_ctzll(~s->map[w]));
  s->map[w] |= 1ull << i % 64;
  p->cache[cache].active++;
  if (++s->used == slab_objects(s)) partial_cut(p, *pfn);
  *offset = i * cache_size[cache];
  return 0;
}
static void slab_free(struct sy_gateway *g, uint32_t pfn, uint32_t offset) {
  struct zpool *p = g->zpool;
  struct slab *s = &p->slab[pfn];
  struct slab_cache *c = &p->cache[s->cache];
  uint32_t i = offset / cache_size[s->cache], n = 1u << s->order, objects = slab_objects(s);
  s->map[i / 64] &= ~(1ull << i % 64);
  c->active--;
  if (s->used-- == objects) partial_add(p, pfn);
  if (s->used) return;
  partial_cut(p, pfn);
  c->slabs--, c->objects -= objects, c->frames -= n, g->hdr->pool_frames -= n;
  make_free(g, pfn, n, 0);
  event_frames(g, SY_MSG_PAGE_FREED, 0, pfn, n, s->order);
}
int sy_gw_slabinfo(struct sy_gateway *g, struct sy_slab_info *out) {
  pthread_mutex_lock(&g->lock);
  for (int i = 0; i < SY_SLAB_CACHES; i++) {
    const struct slab_cache *c = &g->zpool->cache[i];
    out[i] = (struct sy_slab_info){c->active, c->objects, cache_size[i], c->slabs, c->frames};
  }
  pthread_mutex_unlock(&g->lock);
  return SY_SLAB_CACHES;
}

/* ---------------------------------------------------------------- tiers
 * A page that is put away passes two steps. pack, not under lock: 0 = this tier will have it, -1 = the next one, else an errno. keep, under lock: it
 * has it now, and the slot says so; -1 = there is no room, the next one. get: 0 or an errno; for a BUSY slot, not under lock. drop: under lock. */
struct packing {
  uint32_t slot;
  int tier, error;
  const void *page;
  uint32_t size;
  uint8_t data[SY_PACKED_MAX];
};
struct tier {
  int (*pack)(struct sy_gateway *g, struct packing *k);
  int (*keep)(struct sy_gateway *g, struct sy_stored *s, const struct packing *k);
  int (*get)(struct sy_gateway *g, const struct sy_stored *s, void *page);
  void (*drop)(struct sy_gateway *g, struct sy_stored *s);
};
static int zero_pack(struct sy_gateway *g, struct packing *k) {
  const uint64_t *w = k->page;
  (void)g;
  return w[0] || memcmp(w, w + 1, PS - 8) ? -1 : 0;
}
static int zero_keep(struct sy_gateway *g, struct sy_stored *s, const struct packing *k) { return (void)g, (void)k, s->size = 0, 0; }
static int zero_get(struct sy_gateway *g, const struct sy_stored *s, void *page) { return (void)g, (void)s, memset(page, 0, PS), 0; }
static void zero_drop(struct sy_gateway *g, struct sy_stored *s) { (void)g, (void)s; }

static int pool_pack(struct sy_gateway *g, struct packing *k) {
  const uint64_t *w = k->page;
  if (!g->hdr->pool_max) return -1;
  int same = !memcmp(w, w + 1, PS - 8);
  if (same) memcpy(k->data, w, 8);
  k->size = same ? 8 : (uint32_t)LZ4_compress_default(k->page, (char *)k->data, PS, SY_PACKED_MAX);
  return k->size ? 0 : -1; /* it would hardly get smaller */
}
static int pool_keep(struct sy_gateway *g, struct sy_stored *s, const struct packing *k) {
  uint32_t pfn = 0, offset = 0;
  if (slab_alloc(g, k->size, &pfn, &offset)) return -1;
  memcpy(frame_mem(g, pfn) + offset, k->data, k->size);
  return s->size = k->size, s->pfn = pfn, s->offset = offset, 0;
}
static int pool_get(struct sy_gateway *g, const struct sy_stored *s, void *page) {
  const uint8_t *at = frame_mem(g, s->pfn) + s->offset;
  if (s->size == 8) {
    for (uint64_t i = 0; i < PS; i += 8) memcpy((char *)page + i, at, 8);
    return 0;
  }
  return LZ4_decompress_safe((const char *)at, page, (int)s->size, PS) == PS ? 0 : EIO;
}
static void pool_drop(struct sy_gateway *g, struct sy_stored *s) { slab_free(g, s->pfn, s->offset); }

/* The file is written through the page cache, so what the disk refuses may show only when it is read: pfn and offset of its slots, which have
 * neither, hold a sum of the page. */
static uint64_t sum_of(const void *page) {
  uint64_t h[4] = {1, 2, 3, 4}, w[4];
  for (const char *p = page, *end = p + PS; p < end; p += sizeof w) {
    memcpy(w, p, sizeof w);
    for (int i = 0; i < 4; i++) h[i] = (h[i] ^ w[i]) * 0x9e3779b97f4a7c15, h[i] ^= h[i] >> 29;
  }
  return h[0] ^ h[1] * 3 ^ h[2] * 5 ^ h[3] * 7;
}
static off_t place(uint64_t slot) { return (off_t)(slot * PS); }
static int file_pack(struct sy_gateway *g, struct packing *k) {
  ssize_t r = pwrite(g->swap_fd, k->page, PS, place(k->slot));
  if (r != PS) return r < 0 ? errno : ENOSPC;
  uint64_t sum = sum_of(k->page);
  return memcpy(k->data, &sum, sizeof sum), 0;
}
static int file_keep(struct sy_gateway *g, struct sy_stored *s, const struct packing *k) {
  (void)g;
  memcpy(&s->pfn, k->data, 4), memcpy(&s->offset, k->data + 4, 4);
  return s->size = PS, 0;
}
static int file_get(struct sy_gateway *g, const struct sy_stored *s, void *page) {
  ssize_t r = pread(g->swap_fd, page, PS, place((uint64_t)(s - g->slot)));
  if (r != PS) return r < 0 ? errno : EIO;
  return sum_of(page) == (s->pfn | (uint64_t)s->offset << 32) ? 0 : EIO;
}
static const struct tier tiers[] = {{zero_pack, zero_keep, zero_get, zero_drop}, {pool_pack, pool_keep, pool_get, pool_drop}, {file_pack, file_keep, file_get, zero_drop}};
#define TIERS ((int)(sizeof tiers / sizeof *tiers))
static const struct tier *tier_of(const struct sy_stored *s) { return &tiers[s->size == 0 ? 0 : s->size < PS ? 1 : 2]; }

/* From tier k->tier on, the first that will have the page; or k->error. */
static void pack(struct sy_gateway *g, struct packing *k) {
  for (k->error = -1; k->error < 0 && k->tier < TIERS; k->tier += k->error < 0) k->error = tiers[k->tier].pack(g, k);
  if (k->error < 0) k->error = ENOSPC;
}
static int keep(struct sy_gateway *g, struct packing *k) { return tiers[k->tier].keep(g, &g->slot[k->slot], k); }
static int store_get(struct sy_gateway *g, uint32_t s, void *page) { return tier_of(&g->slot[s])->get(g, &g->slot[s], page); }

/* ---------------------------------------------------------------- slots (under lock) */
static uint64_t slots_free(struct sy_gateway *g) { return g->hdr->slots - g->hdr->slots_used; }
/* A free slot, BUSY; NONE = the store is full. */
static uint32_t slot_take(struct sy_gateway *g) {
  for (uint32_t k = 0; slots_free(g) && k < g->hdr->slots; k++) {
    uint32_t s = g->slot_hint++ % g->hdr->slots;
    if (g->slot[s].asid) continue;
    g->slot[s] = (struct sy_stored){.asid = BUSY};
    g->hdr->slots_used++;
    return s;
  }
  return NONE;
}
static void slot_free(struct sy_gateway *g, uint32_t s) {
  tier_of(&g->slot[s])->drop(g, &g->slot[s]);
  g->slot[s].asid = 0, g->slot[s].size = 0;
  g->hdr->slots_used--;
}
static int slot_is(struct sy_gateway *g, struct as *a, uint64_t s) { return s < g->hdr->slots && g->slot[s].asid == a->asid; }
