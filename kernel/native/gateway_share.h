/* gateway, part: SHARED frames, who has them, and merging. All under lock.
 *
 * A merged frame is SHARED from when the first stub says that it has protected it; it belongs to nobody then, counts towards no limit, and is never written
 * again; it is FREE when nobody has it any more. One that a fork shares stays its owner's, and counts as before; when the owner lets it go it is the next one's (a
 * child is within its parent's limit), and when only one has it, it is MAPPED again. The owner is not in the list of holders. */
/* A frame's first holder lies at the frame's number: forks take and give back very many, one after the other. The others are in a list when they are free. */
static void free_holder(struct sy_gateway *g, uint32_t h) {
  g->holder[h].asid = 0;
  if (h >= g->nframes) g->holder[h].next = g->holder_free, g->holder_free = h;
}
/* [asid's page] has frame pfn, too. 0, or -1: no memory. */
static int add_holder(struct sy_gateway *g, struct as *a, uint32_t pfn, uint64_t vpage, uint32_t pending) {
  uint32_t h = pfn;
  if (g->holder[pfn].asid && g->holder_free == NONE) {
    uint32_t more = g->nholders / 2;
    struct holder *all = realloc(g->holder, (g->nholders + more) * sizeof *all);
    if (!all) return -1;
    g->holder = all;
    for (uint32_t i = 0; i < more; i++) free_holder(g, g->nholders + i);
    g->nholders += more;
  }
  if (g->holder[pfn].asid) h = g->holder_free, g->holder_free = g->holder[h].next;
  g->holder[h] = (struct holder){a->asid, (uint32_t)vpage, g->share_head[pfn], (uint16_t)pending, 0};
  g->share_head[pfn] = h, g->frames[pfn].refcount++, a->shared++;
  return 0;
}
/* Where the list of a frame's holders names this one; NULL: it has it not. */
static uint32_t *holder_of(struct sy_gateway *g, const struct as *a, uint32_t pfn, uint64_t vpage) {
  uint32_t *at = &g->share_head[pfn];
  while (*at != NONE && (g->holder[*at].asid != a->asid || g->holder[*at].vpage != vpage)) at = &g->holder[*at].next;
  return *at == NONE ? NULL : at;
}
static int owns(const struct as *a, const struct sy_frame *f, uint64_t vpage) { return f->asid == a->asid && f->vpage == vpage; }
static int shares(struct sy_gateway *g, const struct as *a, uint32_t pfn, uint64_t vpage) {
  return g->frames[pfn].state == SY_FRAME_SHARED && (owns(a, &g->frames[pfn], vpage) || holder_of(g, a, pfn, vpage));
}
/* One event for frames, and pages, in a row: gathered in t, and sent when another does not go on from there. */
static void tell_now(struct sy_gateway *g, struct sy_msg *t) {
  if (t->npages) event(g, *t);
  t->npages = 0;
}
static void tell(struct sy_gateway *g, struct sy_msg *t, int type, uint32_t asid, uint32_t pfn, uint64_t vpage) {
  const struct sy_frame *f = &g->frames[pfn];
  if (t->npages && t->type == type && t->asid == asid && t->pfn + t->npages == pfn && t->node == f->node && (!asid || t->vpage + t->npages == vpage)) t->npages++;
  else tell_now(g, t), *t = (struct sy_msg){.type = (uint16_t)type, .asid = asid, .pfn = pfn, .vpage = vpage, .npages = 1, .node = f->node};
}
/* Only its owner has it still: MAPPED as any other, but that the owner's word and mapping say otherwise until it has been told (send_owns). */
static void part(struct sy_gateway *g, uint32_t pfn, struct sy_msg *t) {
  struct sy_frame *f = &g->frames[pfn];
  struct as *a = find_as(g, f->asid);
  map_frames(g, a, pfn, 1, f->vpage);
  a->shared--, f->parted = 1;
  if (a->own_from == NONE) a->own_since_ns = now_ns();
  if (pfn < a->own_from) a->own_from = pfn;
  tell(g, t, SY_MSG_PAGE_MAPPED, a->asid, pfn, f->vpage);
}
/* This page is no longer in that SHARED frame, in which it is. */
static void drop_share(struct sy_gateway *g, struct as *a, uint32_t pfn, uint64_t vpage, struct sy_msg *t) {
  struct sy_frame *f = &g->frames[pfn];
  int owner = owns(a, f, vpage);
  uint32_t *at = owner ? &g->share_head[pfn] : holder_of(g, a, pfn, vpage), h = *at;
  struct holder was = g->holder[h];
  *at = was.next, free_holder(g, h);
  a->shared--, f->refcount--;
  if (owner) {
    disown(g, a, pfn);
    f->asid = was.asid, f->vpage = was.vpage;
    own(g, find_as(g, was.asid), pfn, 1);
  }
  if (f->asid && f->refcount == 1) part(g, pfn, t);
  if (f->refcount) return;
  make_free(g, pfn, 1, 0);
  tell(g, t, SY_MSG_PAGE_FREED, 0, pfn, 0);
}
static void drop_one(struct sy_gateway *g, struct as *a, uint32_t pfn, uint64_t vpage) {
  struct sy_msg t = {0};
  drop_share(g, a, pfn, vpage, &t);
  tell_now(g, &t);
}
/* May these pages, from vpage on, let these frames go: its own, in one of those states, or SHARED? */
static int may_let_go(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, uint64_t vpage, int states) {
  if (!n || pfn >= g->nframes || n > g->nframes - pfn) return 0;
  for (uint32_t i = 0; i < n; i++) {
    const struct sy_frame *f = &g->frames[pfn + i];
    /* (where it is as it says: what messages were lost before may be about an earlier use of the frame) */
    int own = f->asid == a->asid && states >> f->state & 1 && (f->state == SY_FRAME_MAPPED ? f->vpage == vpage + i : vpage == SY_ARENA_PAGES);
    if (!own && !shares(g, a, pfn + i, vpage + i)) return 0;
  }
  return 1;
}
static void let_go(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, uint64_t vpage) {
  struct sy_msg t = {0};
  for (uint32_t i = 0, k; i < n; i += k) {
    k = 1;
    if (g->frames[pfn + i].state == SY_FRAME_SHARED) {
      drop_share(g, a, pfn + i, vpage + i, &t);
      continue;
    }
    while (i + k < n && g->frames[pfn + i + k].state != SY_FRAME_SHARED) k++;
    release_frames(g, a, pfn + i, k);
    event(g, (struct sy_msg){.type = SY_MSG_PAGE_FREED, .asid = a->asid, .pfn = pfn + i, .npages = k, .vpage = vpage + i, .node = g->frames[pfn + i].node});
  }
  tell_now(g, &t);
}
/* MAPPED frames of its own, which it was told to share, are SHARED. 0: it was not told so. */
static int make_shared(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, uint64_t vpage) {
  for (uint32_t i = 0; i < n; i++) {
    const struct sy_frame *f = &g->frames[pfn + i];
    if (f->state != SY_FRAME_MAPPED || !(f->flags & SY_FF_SHARING) || f->vpage != vpage + i) return 0;
  }
  for (uint32_t i = 0; i < n; i++) {
    struct sy_frame *f = &g->frames[pfn + i];
    a->mapped--, disown(g, a, pfn + i);
    f->asid = 0, f->vpage = 0, f->refcount = 0, f->flags = 0;
    set_state(g, pfn + i, 1, SY_FRAME_SHARED, 0);
    if (add_holder(g, a, pfn + i, vpage + i, 0)) abort(); /* some KiB: the machine is beyond help */
  }
  return 1;
}
/* After MADV_MERGEABLE: frames that are there already. */
static void flag_mergeable(struct sy_gateway *g, struct as *a) {
  for (uint32_t f = a->list; f != NONE; f = g->fnext[f])
    if (g->frames[f].state == SY_FRAME_MAPPED && a->mem[SY_AS_ADVICE_OFF + g->frames[f].vpage / SY_CHUNK_PAGES] & SY_ADVICE_MERGE) g->frames[f].flags |= SY_FF_MERGEABLE;
  a->merge_due = 0;
}
/* MERGE; see enum sy_op_code. queue() takes it on from here. */
static uint32_t merge(struct sy_gateway *g, struct as *a, const struct sy_op *op, uint32_t n) {
  if (op->arg >= g->nframes || n > g->nframes - op->arg || (op->arg != op->pfn && op->arg < op->pfn + (uint64_t)n && op->pfn < op->arg + n)) return SY_R_INVALID;
  uint32_t to = (uint32_t)op->arg, serial = g->move_head % UINT16_MAX + 1;
  if (!a) return SY_R_STALE;
  for (uint32_t i = 0; i < n; i++) {
    const struct sy_frame *f = &g->frames[op->pfn + i], *t = &g->frames[to + i];
    if (!(f->flags & SY_FF_MERGEABLE)) return SY_R_NOT_PERMITTED;
    if (f->flags & SY_FF_SHARING) return SY_R_BUSY;
    if (to != op->pfn && (t->state != SY_FRAME_SHARED || t->asid)) return SY_R_STALE; /* (what a fork shares is not there to stay) */
    if (to != op->pfn && t->refcount >= SY_MAX_SHARING) return SY_R_FULL;
    if (to != op->pfn && holder_of(g, a, to + i, f->vpage)) return SY_R_STALE; /* it left that frame, and what said so was lost: see resync_shared */
  }
  if (a->moving + n > 4 * MOVING_MOST || a->moves >= SHARES_AT_ONCE || g->move_head - g->move_tail == MOVE_RING) return SY_R_BUSY;
  for (uint32_t i = 0; i < n; i++) {
    if (to != op->pfn && add_holder(g, a, to + i, g->frames[op->pfn + i].vpage, serial)) { /* (it stays SHARED meanwhile, whoever else lets go) */
      while (i--) drop_one(g, a, to + i, g->frames[op->pfn + i].vpage);
      return SY_R_BUSY;
    }
  }
  for (uint32_t i = 0; i < n; i++) g->frames[op->pfn + i].flags |= SY_FF_SHARING;
  g->move[g->move_head++ % MOVE_RING] = (struct move){a->asid, (uint32_t)g->frames[op->pfn].vpage, n, to, op->pfn, serial, 1};
  a->moving += n, a->moves++;
  return SY_R_COMPLETE;
}
/* The stub's answer to that. */
static void merged(struct sy_gateway *g, struct as *a, uint32_t vpage, uint32_t n, uint32_t to, uint32_t from, uint32_t serial, int64_t r) {
  for (uint32_t i = 0; i < n; i++) {
    struct sy_frame *f = &g->frames[from + i];
    uint64_t w = __atomic_load_n(&a->pte[vpage + i], __ATOMIC_ACQUIRE);
    /* its PAGE_SHARED was lost */
    if (r >= 0 && to == from && f->asid == a->asid && (w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO && w >> SY_PTE_PFN_SHIFT == from + i) make_shared(g, a, from + i, 1, vpage + i);
    if (f->asid == a->asid && f->state == SY_FRAME_MAPPED) f->flags &= (uint8_t)~SY_FF_SHARING;
    uint32_t *at = g->frames[to + i].state == SY_FRAME_SHARED ? holder_of(g, a, to + i, vpage + i) : NULL;
    if (!at || g->holder[*at].pending != serial) continue; /* (it may have left, and been told to come again) */
    if (r < 0) drop_one(g, a, to + i, vpage + i);
    else g->holder[*at].pending = 0;
  }
}
/* What the page table of an address space that has lost messages says of its shared pages: those that are not where they were at two looks, between which it was
 * heard, have gone. (At one look what it says of that may be still to come, and would mean another use of the frame.) */
static void resync_shared(struct sy_gateway *g, struct as *a, int look) {
  struct sy_msg t = {0};
  for (uint32_t f = 0; a->shared && f < g->nframes; f++) {
    if (g->frames[f].state != SY_FRAME_SHARED) continue;
    for (uint32_t *at = &g->share_head[f]; *at != NONE;) {
      struct holder *h = &g->holder[*at];
      uint64_t w = __atomic_load_n(&a->pte[h->vpage % SY_ARENA_PAGES], __ATOMIC_ACQUIRE);
      int st = w & SY_PTE_STATE_MASK, has = (st == SY_PTE_SHARED_RO || st == SY_PTE_LOCKED) && w >> SY_PTE_PFN_SHIFT == f;
      if (h->asid != a->asid || h->pending || has || !look || !h->missed) {
        if (h->asid == a->asid) h->missed = !h->pending && !has;
        at = &g->holder[*at].next;
        continue;
      }
      drop_share(g, a, f, h->vpage, &t);
      if (g->frames[f].state != SY_FRAME_SHARED) break;
      at = &g->share_head[f];
    }
  }
  tell_now(g, &t);
}
static void bury_shared(struct sy_gateway *g, struct as *a) {
  struct sy_msg t = {0};
  /* Its page table says where they are, as a rule; one of a liar, or after lost messages, does not: then every frame is looked at. */
  for (uint32_t p = 0; a->shared && p < SY_ARENA_PAGES; p++) {
    if (!a->chunks[p / SY_CHUNK_PAGES]) {
      p |= SY_CHUNK_PAGES - 1;
      continue;
    }
    uint64_t w = __atomic_load_n(&a->pte[p], __ATOMIC_ACQUIRE), pfn = w >> SY_PTE_PFN_SHIFT;
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO && pfn < g->nframes && shares(g, a, (uint32_t)pfn, p)) drop_share(g, a, (uint32_t)pfn, p, &t);
  }
  for (uint32_t f = 0; a->shared && f < g->nframes; f++)
    while (g->frames[f].state == SY_FRAME_SHARED) {
      uint32_t h = g->share_head[f];
      int owner = g->frames[f].asid == a->asid;
      while (!owner && h != NONE && g->holder[h].asid != a->asid) h = g->holder[h].next;
      if (!owner && h == NONE) break;
      drop_share(g, a, f, owner ? g->frames[f].vpage : g->holder[h].vpage, &t);
    }
  tell_now(g, &t);
}
