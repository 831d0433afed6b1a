/* gateway, part: pages that leave for the store and come back; see stub_swap.h for the protocol of a page's word.
 *
 * Three threads: the server sends EVICT and serves swap-ins; the store thread writes what was taken away; both, and commits from Python, hold
 * the lock for tables, and not for I/O (but for fetch(), which a fork waits for). */
#define STORE_PATIENCE_NS 2000000000ull /* who waits for frames waits so long for the next page to leave, before the OOM rule applies */

/* ---------------------------------------------------------------- out */
/* A program that is stopped takes nothing away: what it was told to does not leave, and it is told no more. */
#define STOPPED_NS 100000000ull
static int is_stopped(const struct as *a) { return a->evict_sent != a->evict_done && now_ns() > a->told_ns + STOPPED_NS; }
/* Frames [pfn, pfn + n), MAPPED one after the other, are to leave (flag SWAPPING), or to be taken away so that a touch shows (AGED). Under lock. */
static uint32_t take_run(struct sy_gateway *g, uint32_t pfn, uint32_t n, uint8_t flag) {
  struct sy_frame *f = &g->frames[pfn];
  struct as *a = f->state == SY_FRAME_MAPPED ? find_as(g, f->asid) : NULL;
  if (!a || a->dying || a->released || is_stopped(a)) return SY_R_STALE;
  for (uint32_t i = 0; i < n; i++)
    if (f[i].state != SY_FRAME_MAPPED || f[i].asid != f->asid || f[i].vpage != f->vpage + i || f[i].flags & (SY_FF_SWAPPING | flag) ||
        a->pte[f[i].vpage] & SY_PTE_MLOCKED)
      return SY_R_STALE;
  if (flag == SY_FF_SWAPPING && slots_free(g) < g->swapping + n) return SY_R_FULL;
  if (a->evict_tail - a->evict_done == SY_EVICT_RUNS || g->store_head - g->store_tail > STORE_RING / 2) return SY_R_BUSY;
  if (flag == SY_FF_SWAPPING) g->asked_ns = now_ns();
  for (uint32_t i = 0; i < n; i++) {
    if (flag == SY_FF_SWAPPING) leave(g, a, &f[i]);
    else f[i].flags |= flag;
    f[i].order = 0; /* the kernel drops a huge entry of which a part is taken: whatever comes back is mapped by small ones */
  }
  struct sy_run *last = a->evict_tail != a->evict_sent ? &a->mag->evict[(a->evict_tail - 1) % SY_EVICT_RUNS] : NULL;
  if (last && last->flag == flag && last->pfn + last->n == pfn && last->vpage + last->n == f->vpage && last->n + n <= SY_CHUNK_PAGES)
    last->n += n; /* one piece of work for both */
  else
    a->mag->evict[a->evict_tail++ % SY_EVICT_RUNS] = (struct sy_run){(uint32_t)f->vpage, pfn, n, flag};
  for (uint32_t i = 0; i < n; i++) f[i].run = a->evict_tail - 1;
  return SY_R_COMPLETE;
}
/* When did anything last leave, or was asked to? What has not within this time is not waited for: its program may be stopped. */
#define STUCK_NS 500000000ull
static uint64_t on_the_way(struct sy_gateway *g, uint64_t swapping) {
  uint64_t last = g->swap_progress_ns > g->asked_ns ? g->swap_progress_ns : g->asked_ns, not = 0;
  if (now_ns() > last + STUCK_NS) return 0;
  for (uint32_t i = 0; i < g->nas; i++) not += is_stopped(g->as[i]) ? g->as[i]->leaving : 0;
  return swapping > not ? swapping - not : 0;
}
/* By ourselves, when nobody else has: round and round over the frames, of a limit or of all, oldest look first. Frames on their way (under lock). */
static uint64_t reclaim_some(struct sy_gateway *g, uint64_t want, uint32_t limit) {
  uint64_t got = 0, going = on_the_way(g, limit ? g->swapping_on[limit] : g->swapping);
  if (!g->hdr->slots || going >= want) return going;
  for (uint32_t k = 0; k < g->nframes && got < want;) {
    uint32_t f = g->clock_hand, n = 1;
    const struct sy_frame *p = &g->frames[f];
    if (p->state == SY_FRAME_MAPPED && !(p->flags & SY_FF_SWAPPING) && (!limit || p->limit == limit)) {
      while (n < 64 && f + n < g->nframes && p[n].state == SY_FRAME_MAPPED && p[n].asid == p->asid && p[n].vpage == p->vpage + n && !(p[n].flags & SY_FF_SWAPPING)) n++;
      while (n && take_run(g, f, n, SY_FF_SWAPPING) != SY_R_COMPLETE) n /= 2;
      got += n;
      n += !n;
    }
    k += n, g->clock_hand = f + n < g->nframes ? f + n : 0;
  }
  count(g, SY_CNT_EVICTED_BY_GATEWAY, got);
  return got;
}
/* Frames that should leave for an address space that uses again those which its own pages leave: see recycle. */
#define RECYCLED (SY_MAG_SLOTS / 4 * 3)
static uint32_t want_recycled(struct as *a) {
  int order = a->recycles - 1;
  uint32_t level = order >= 0 && !a->dying ? mag_level(a, order) << order : RECYCLED;
  return level < RECYCLED / 2 ? RECYCLED - level : 0;
}
static void relieve_early(struct sy_gateway *g, struct as *a) {
  for (uint32_t z = a->zone, end = z ? z + 1 : g->nodes; z < end; z++) {
    if (g->reclaiming[z] || g->hdr->watermark[z].free >= g->hdr->watermark[z].high) continue;
    g->reclaiming[z] = 1;
    poke(g);
  }
}
/* Chosen by kswapd for when memory is short in a zone (under lock). */
static uint32_t stand_by(struct sy_gateway *g, uint32_t pfn, uint32_t n, uint64_t zone) {
  struct sy_frame *f = &g->frames[pfn];
  if (zone != f->node && (zone != f->limit || !zone)) return zone < g->nodes || (zone >= SY_MAX_NODES && zone < SY_MAX_ZONES) ? SY_R_STALE : SY_R_INVALID;
  for (uint32_t i = 0; i < n; i++)
    if (f[i].state != SY_FRAME_MAPPED || f[i].flags & (SY_FF_SWAPPING | SY_FF_STANDBY) || (zone == f->limit && f[i].limit != zone)) return SY_R_STALE;
  uint32_t nd = (uint32_t)zone, *level = &g->hdr->watermark[nd].standby;
  if (*level + n > STANDBY_RING) return SY_R_FULL;
  for (uint32_t i = 0; i < n; i++) {
    f[i].flags |= SY_FF_STANDBY;
    g->standby[nd][g->standby_tail[nd]++ % STANDBY_RING] = (struct standby){pfn + i, f[i].barrier, f[i].flags & SY_FF_AGED};
  }
  *level += n;
  return SY_R_COMPLETE;
}
/* What stands by leaves until a zone has `high` frames. Returns whether to look again soon. */
static int relieve(struct sy_gateway *g, uint32_t nd) {
  struct sy_watermarks *m = &g->hdr->watermark[nd];
  uint64_t going = on_the_way(g, g->swapping_on[nd]), want = m->high;
  for (uint32_t i = 0; i < g->nas; i++) want += g->as[i]->zone == nd || (!g->as[i]->zone && nd < SY_MAX_NODES) ? want_recycled(g->as[i]) : 0;
  g->reclaiming[nd] |= m->free < m->low;
  while (g->reclaiming[nd] && m->standby && m->free + going < want) {
    struct standby s = g->standby[nd][g->standby_head[nd] % STANDBY_RING];
    struct sy_frame *f = &g->frames[s.pfn];
    int same = f->barrier == s.barrier && f->flags & SY_FF_STANDBY, touched = s.aged && !(f->flags & SY_FF_AGED);
    uint32_t r = same && !touched ? take_run(g, s.pfn, 1, SY_FF_SWAPPING) : SY_R_STALE;
    if (r == SY_R_BUSY || r == SY_R_FULL) break;
    if (same) f->flags &= (uint8_t)~SY_FF_STANDBY;
    g->standby_head[nd]++, m->standby--;
    going += r == SY_R_COMPLETE;
  }
  if (m->free < m->min && !m->standby && g->hdr->component[SY_C_KSWAPD].state != 1) reclaim_some(g, m->high, nd < SY_MAX_NODES ? 0 : nd);
  if (m->free + going >= want) g->reclaiming[nd] = 0;
  return g->reclaiming[nd] && (m->standby || going);
}
static void stays(struct sy_gateway *g, struct taken t) {
  for (uint32_t i = 0; t.run.flag == SY_FF_SWAPPING && i < t.run.n; i++)
    if (g->frames[t.run.pfn + i].asid == t.asid) stay(g, &g->frames[t.run.pfn + i]);
}
/* Server thread: what has been taken away goes to the store thread. */
static void evicted(struct sy_gateway *g, struct as *a, uint32_t from, uint32_t to) {
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = from; i != to; i++) {
    struct taken t = {a->asid, i, a->mag->evict[i % SY_EVICT_RUNS]};
    if (t.run.flag == SY_FF_AGED) continue;
    if (g->store_head - g->store_tail == STORE_RING) stays(g, t); /* a touch finds the page where it was */
    else g->store[g->store_head++ % STORE_RING] = t;
  }
  a->evict_done = to;
  pthread_cond_signal(&g->store_work);
  pthread_mutex_unlock(&g->lock);
}
/* Frames whose pages have left, ISOLATED and nobody's, go to where the program will look for the next ones, as a page freed on one of Linux's CPUs goes
 * to that CPU's own list and not to the buddy allocator: single ones, and whole blocks of a read-ahead. What lies between is FREE, for buddy
 * to merge, and so is what the program does not want. */
#define RECYCLE_AT_ONCE 32u
static void recycle(struct sy_gateway *g, uint32_t asid, uint32_t pfn, uint32_t n) {
  struct as *a = find_as(g, asid);
  for (uint32_t size; n; pfn += size, n -= size) {
    int order = 31 - __builtin_clz(n), aligned = pfn ? __builtin_ctz(pfn) : SY_HUGE_ORDER;
    if (order > aligned) order = aligned;
    if (order > SY_HUGE_ORDER) order = SY_HUGE_ORDER;
    size = 1u << order;
    if (a && !a->dying && !a->released && (n == 1 || size == RECYCLE_AT_ONCE) && has_room(g, a, order) && mag_level(a, order) << order < RECYCLED) {
      a->recycles = order + 1;
      memset(g->heat + pfn, 0, size * sizeof *g->heat); /* of another page */
      zero_block(g, pfn, size);
      mag_push(g, a, pfn, order); /* (there is room) */
    } else {
      make_free(g, pfn, size, 0);
      event_frames(g, SY_MSG_PAGE_FREED, asid, pfn, size, 0);
    }
  }
  for (uint32_t i = 0; i < g->nas; i++)
    if (__atomic_load_n(&g->as[i]->starving, __ATOMIC_RELAXED)) return poke(g);
}
/* One page on its way out: its word is SWAPPED with HASFRAME, or was until somebody touched it. */
struct going { uint32_t asid, pfn, vpage, at, barrier; uint64_t word; int gone, packed; struct packing k; };
#define AT_ONCE 32 /* pages: between them others get the lock */

/* Is it this run still that tells the frame to leave? If not it was freed, may have come back, even to that page, and been told anew: what is written now
 * might be old by then. (It is when the page was moved, by mremap.) */
static int told(const struct sy_gateway *g, const struct going *p) {
  const struct sy_frame *f = &g->frames[p->pfn];
  return f->asid == p->asid && f->state == SY_FRAME_MAPPED && f->flags & SY_FF_SWAPPING && f->run == p->at;
}
/* Is it to be written still? It has a slot then. 0: it is not, or has gone by itself (under lock). */
static int to_store(struct sy_gateway *g, struct going *p) {
  struct as *a = find_as(g, p->asid);
  struct sy_frame *f = &g->frames[p->pfn];
  if (!a || !told(g, p)) return 0;
  uint64_t in_frame = SY_PTE_SWAPPED | SY_PTE_HASFRAME;
  p->barrier = f->barrier, p->word = __atomic_load_n(&a->pte[p->vpage], __ATOMIC_ACQUIRE);
  int there = f->vpage == p->vpage && (p->word & (SY_PTE_STATE_MASK | SY_PTE_HASFRAME)) == in_frame && p->word >> SY_PTE_PFN_SHIFT == p->pfn;
  uint32_t slot = there && !a->dying ? slot_take(g) : NONE;
  p->k.slot = slot, p->k.tier = 0, p->k.page = frame_mem(g, p->pfn);
  if (slot != NONE) return 1;
  count(g, SY_CNT_SWAP_CANCELLED, 1);
  return stay(g, f), 0;
}
/* What has been written belongs to the word now, and the frame, ISOLATED, to nobody; unless the page was touched meanwhile, or could not be
 * written (under lock). */
static int stored(struct sy_gateway *g, struct going *p) {
  struct as *a = find_as(g, p->asid);
  struct sy_frame *f = &g->frames[p->pfn];
  uint64_t to = (p->word & ((1 << SY_PTE_PFN_SHIFT) - 1) & ~(uint64_t)SY_PTE_HASFRAME) | (uint64_t)p->k.slot << SY_PTE_PFN_SHIFT;
  struct sy_stored *s = &g->slot[p->k.slot];
  /* Not since our look: a frame that went and came back has another barrier, one that was only touched another word. */
  if (!p->k.error && a && !a->dying && f->barrier == p->barrier && __atomic_compare_exchange_n(&a->pte[p->vpage], &p->word, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    s->asid = p->asid, s->vpage = p->vpage, s->out = g->swapped_out++;
    a->swapped++, a->mapped--, disown(g, a, p->pfn);
    f->asid = 0, f->vpage = 0, f->refcount = 0, f->flags = 0;
    set_state(g, p->pfn, 1, SY_FRAME_ISOLATED, 0);
    return 1;
  }
  slot_free(g, p->k.slot);
  count(g, p->k.error ? SY_CNT_STORE_ERRORS : SY_CNT_SWAP_CANCELLED, 1);
  if (told(g, p)) stay(g, f);
  return 0;
}
/* The next pages of those taken away, under lock, which is dropped for the writing. 0: there are none. */
static int store_next(struct sy_gateway *g) {
  static struct going p[AT_ONCE]; /* (the store thread's) */
  uint32_t n = 0, left = 0;
  for (; n < AT_ONCE && g->store_head != g->store_tail;) {
    struct taken *t = &g->store[g->store_tail % STORE_RING];
    if (n && t->run.n >= RECYCLE_AT_ONCE && t->run.pfn % RECYCLE_AT_ONCE == 0) break; /* a whole block in one go */
    p[n].asid = t->asid, p[n].pfn = t->run.pfn, p[n].vpage = t->run.vpage, p[n].at = t->at;
    n += (uint32_t)to_store(g, &p[n]);
    if (--t->run.n) t->run.pfn++, t->run.vpage++;
    else g->store_tail++;
  }
  if (!n) return g->store_head != g->store_tail;
  for (uint32_t i = 0; i < n; i++) p[i].packed = p[i].gone = 0;
  for (uint32_t some = n; some;) { /* once more for those that a tier has no room for after all */
    g->writing = 1;
    pthread_mutex_unlock(&g->lock);
    for (uint32_t i = 0; i < n; i++)
      if (!p[i].packed) pack(g, &p[i].k);
    pthread_mutex_lock(&g->lock);
    g->writing = 0;
    some = 0;
    for (uint32_t i = 0; i < n; i++)
      if (!p[i].packed && !(p[i].packed = p[i].k.error || !keep(g, &p[i].k))) some++, p[i].k.tier++;
  }
  for (uint32_t i = 0; i < n; i++) left += (uint32_t)(p[i].gone = stored(g, &p[i]));
  count(g, SY_CNT_SWAPPED_OUT, left);
  if (left) g->swap_progress_ns = now_ns();
  for (uint32_t i = 0, k; i < n; i += k) {
    k = 1;
    if (!p[i].gone) continue;
    while (i + k < n && p[i + k].gone && p[i + k].asid == p[i].asid && p[i + k].pfn == p[i].pfn + k && p[i + k].vpage == p[i].vpage + k && p[i + k].k.slot == p[i].k.slot + k) k++;
    event(g, (struct sy_msg){.type = SY_MSG_PAGE_SWAPPED, .asid = p[i].asid, .pfn = p[i].pfn, .vpage = p[i].vpage, .npages = k, .node = g->frames[p[i].pfn].node, .arg = p[i].k.slot});
    recycle(g, p[i].asid, p[i].pfn, k);
  }
  return 1;
}
static void *store_thread(void *arg) {
  struct sy_gateway *g = arg;
  setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), -10); /* who is out of frames waits for us, whoever else wants the CPU */
  pthread_mutex_lock(&g->lock);
  while (!__atomic_load_n(&g->stopping, __ATOMIC_ACQUIRE))
    if (!store_next(g)) pthread_cond_wait(&g->store_work, &g->lock);
  pthread_mutex_unlock(&g->lock);
  return NULL;
}

/* ---------------------------------------------------------------- in (server thread) */
static void answer_store(struct as *a, uint32_t waiter, int error) {
  a->mag->store_error[waiter] = (uint32_t)error;
  __atomic_store_n(&a->mag->store_seq[waiter], a->mag->store_seq[waiter] + 1, __ATOMIC_SEQ_CST);
  futex_wake_all(&a->mag->store_seq[waiter]);
}
static void came_back(struct sy_gateway *g, struct as *a, uint64_t vpage, uint32_t pfn, uint32_t slot, int prefetched) {
  event(g, (struct sy_msg){.type = prefetched ? SY_MSG_PAGE_PREFETCHED : SY_MSG_PAGE_REFAULT, .asid = a->asid, .pfn = pfn, .vpage = vpage, .npages = 1, .node = g->frames[pfn].node, .arg = g->swapped_out - g->slot[slot].out});
  count(g, SY_CNT_SWAPPED_IN, 1), count(g, SY_CNT_PREFETCHED, prefetched != 0);
}
static void swap_in(struct sy_gateway *g, struct as *a, const struct sy_request *q) {
  uint32_t n = q->tids[0], pfn = q->tids[1], slot[SY_CHUNK_PAGES], k = 0;
  if (q->order >= SY_STORE_WAITERS || !n || n > SY_CHUNK_PAGES || q->vpage > SY_ARENA_PAGES - n) return bad(g, a);
  int error = 0;
  pthread_mutex_lock(&g->lock);
  int ok = owned(g, a, pfn, n, 1 << SY_FRAME_GRANTED);
  for (; ok && k < n; k++) {
    slot[k] = (uint32_t)(__atomic_load_n(&a->pte[q->vpage + k], __ATOMIC_ACQUIRE) >> SY_PTE_PFN_SHIFT);
    if (!slot_is(g, a, slot[k]) || g->slot[slot[k]].vpage != q->vpage + k) break;
    g->slot[slot[k]].asid = BUSY;
  }
  if (k < n) bad(g, a), error = EINVAL;
  pthread_mutex_unlock(&g->lock);
  for (uint32_t i = 0; i < n && !error; i++) error = store_get(g, slot[i], frame_mem(g, pfn) + i * PS);
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < k; i++) {
    if (error) {
      g->slot[slot[i]].asid = a->asid;
      continue;
    }
    came_back(g, a, q->vpage + i, pfn + i, slot[i], q->order == SY_SERVICE_THREADS);
    slot_free(g, slot[i]), a->swapped--;
  }
  if (error) count(g, SY_CNT_STORE_ERRORS, 1);
  pthread_mutex_unlock(&g->lock);
  answer_store(a, q->order, error);
}
/* The contents of stored pages, for a fork or a release. The slots stay. */
static void fetch(struct sy_gateway *g, struct as *a, const struct sy_request *q) {
  int error = 0;
  if (q->order >= SY_STORE_WAITERS || q->tids[0] > SY_FETCH_PAGES || q->vpage > SY_ARENA_PAGES - q->tids[0]) return bad(g, a);
  for (uint32_t i = 0; i < q->tids[0] && !error; i++) {
    uint64_t w = __atomic_load_n(&a->pte[q->vpage + i], __ATOMIC_ACQUIRE), s = w >> SY_PTE_PFN_SHIFT;
    if ((w & SY_PTE_STATE_MASK) != SY_PTE_SWAPPED || w & SY_PTE_HASFRAME) continue;
    pthread_mutex_lock(&g->lock); /* (page cache, not the disk, as a rule; and it is nobody else's meanwhile) */
    error = slot_is(g, a, s) ? store_get(g, (uint32_t)s, a->mag->fetched + i * PS) : EINVAL;
    pthread_mutex_unlock(&g->lock);
  }
  answer_store(a, q->order, error);
}

/* What the page table of an address space, whose channel has lost messages, says of its slots (under lock). */
static void resync_slots(struct sy_gateway *g, struct as *a) {
  for (uint32_t p = 0; a->swapped && p < SY_ARENA_PAGES; p++) {
    if (p % SY_CHUNK_PAGES == 0 && !a->chunks[p / SY_CHUNK_PAGES]) {
      p += SY_CHUNK_PAGES - 1;
      continue;
    }
    uint64_t w = __atomic_load_n(&a->pte[p], __ATOMIC_ACQUIRE), s = w >> SY_PTE_PFN_SHIFT;
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED && !(w & SY_PTE_HASFRAME) && slot_is(g, a, s)) g->slot[s].vpage = p;
  }
  for (uint32_t s = 0; s < g->hdr->slots && a->swapped; s++) {
    if (g->slot[s].asid != a->asid) continue;
    uint64_t w = __atomic_load_n(&a->pte[g->slot[s].vpage], __ATOMIC_ACQUIRE);
    int st = w & SY_PTE_STATE_MASK;
    if ((st == SY_PTE_SWAPPED || st == SY_PTE_LOCKED) && w >> SY_PTE_PFN_SHIFT == s) continue;
    slot_free(g, s), a->swapped--;
  }
}
static void bury_slots(struct sy_gateway *g, struct as *a) {
  for (uint32_t s = 0; s < g->hdr->slots && a->swapped; s++)
    if (g->slot[s].asid == a->asid) slot_free(g, s), a->swapped--;
}
