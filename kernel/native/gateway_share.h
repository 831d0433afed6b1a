/* gateway, part: SHARED frames, who has them, and merging. A frame is SHARED from when the first stub says that it has protected it; it belongs to nobody
 * then, counts towards no limit, and is never written again; it is FREE when nobody has it any more. All under lock. */
static void free_holder(struct sy_gateway *g, uint32_t h) { g->holder[h].next = g->holder_free, g->holder_free = h; }
/* [asid's page] has frame pfn, too. 0, or -1: no memory. */
static int add_holder(struct sy_gateway *g, struct as *a, uint32_t pfn, uint64_t vpage, uint32_t pending) {
  if (g->holder_free == NONE) {
    uint32_t more = g->nholders ? g->nholders : 1024;
    struct holder *h = realloc(g->holder, (g->nholders + more) * sizeof *h);
    if (!h) return -1;
    g->holder = h;
    for (uint32_t i = 0; i < more; i++) free_holder(g, g->nholders + i);
    g->nholders += more;
  }
  uint32_t h = g->holder_free;
  g->holder_free = g->holder[h].next;
  g->holder[h] = (struct holder){a->asid, (uint32_t)vpage, g->share_head[pfn], pending};
  g->share_head[pfn] = h, g->frames[pfn].refcount++, a->shared++;
  return 0;
}
/* Where the list of a frame's holders names this one; NULL: it has it not. */
static uint32_t *holder_of(struct sy_gateway *g, const struct as *a, uint32_t pfn, uint64_t vpage) {
  uint32_t *at = &g->share_head[pfn];
  while (*at != NONE && (g->holder[*at].asid != a->asid || g->holder[*at].vpage != vpage)) at = &g->holder[*at].next;
  return *at == NONE ? NULL : at;
}
static void drop_holder(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t *at) {
  uint32_t h = *at;
  *at = g->holder[h].next, free_holder(g, h);
  a->shared--;
  if (--g->frames[pfn].refcount) return;
  make_free(g, pfn, 1, 0);
  event_frames(g, SY_MSG_PAGE_FREED, 0, pfn, 1, 0);
}
/* Pages from vpage on are no longer in these SHARED frames. 0: they were not, not all of them. */
static int let_go(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, uint64_t vpage) {
  if (!n || pfn >= g->nframes || n > g->nframes - pfn) return 0;
  for (uint32_t i = 0; i < n; i++)
    if (g->frames[pfn + i].state != SY_FRAME_SHARED || !holder_of(g, a, pfn + i, vpage + i)) return 0;
  for (uint32_t i = 0; i < n; i++) drop_holder(g, a, pfn + i, holder_of(g, a, pfn + i, vpage + i));
  return 1;
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
/* MADV_MERGEABLE or MADV_UNMERGEABLE: frames that are there already. */
static void advised(struct sy_gateway *g, struct as *a, struct sy_msg m) {
  if (m.arg != MADV_MERGEABLE) return;
  for (uint32_t f = a->list; f != NONE; f = g->fnext[f])
    if (g->frames[f].state == SY_FRAME_MAPPED && g->frames[f].vpage >= m.vpage && g->frames[f].vpage < m.vpage + m.npages) g->frames[f].flags |= SY_FF_MERGEABLE;
}
/* MERGE; see enum sy_op_code. queue() takes it on from here. */
static uint32_t merge(struct sy_gateway *g, struct as *a, const struct sy_op *op, uint32_t n) {
  if (op->arg >= g->nframes || n > g->nframes - op->arg || (op->arg != op->pfn && op->arg < op->pfn + (uint64_t)n && op->pfn < op->arg + n)) return SY_R_INVALID;
  uint32_t to = (uint32_t)op->arg;
  if (!a) return SY_R_STALE;
  for (uint32_t i = 0; i < n; i++) {
    const struct sy_frame *f = &g->frames[op->pfn + i], *t = &g->frames[to + i];
    if (!(f->flags & SY_FF_MERGEABLE)) return SY_R_NOT_PERMITTED;
    if (f->flags & SY_FF_SHARING) return SY_R_BUSY;
    if (to != op->pfn && t->state != SY_FRAME_SHARED) return SY_R_STALE;
    if (to != op->pfn && t->refcount >= SY_MAX_SHARING) return SY_R_FULL;
  }
  if (a->moving + n > 4 * MOVING_MOST || a->moves >= SHARES_AT_ONCE || g->move_head - g->move_tail == MOVE_RING) return SY_R_BUSY;
  for (uint32_t i = 0; i < n; i++) {
    if (to != op->pfn && add_holder(g, a, to + i, g->frames[op->pfn + i].vpage, 1)) { /* (it stays SHARED meanwhile, whoever else lets go) */
      while (i--) drop_holder(g, a, to + i, holder_of(g, a, to + i, g->frames[op->pfn + i].vpage));
      return SY_R_BUSY;
    }
  }
  for (uint32_t i = 0; i < n; i++) g->frames[op->pfn + i].flags |= SY_FF_SHARING;
  g->move[g->move_head++ % MOVE_RING] = (struct move){a->asid, (uint32_t)g->frames[op->pfn].vpage, n, to, op->pfn, 0, 1};
  a->moving += n, a->moves++;
  return SY_R_COMPLETE;
}
/* The stub's answer to that. */
static void merged(struct sy_gateway *g, struct as *a, uint32_t vpage, uint32_t n, uint32_t to, uint32_t from, int64_t r) {
  for (uint32_t i = 0; i < n; i++) {
    struct sy_frame *f = &g->frames[from + i];
    uint64_t w = __atomic_load_n(&a->pte[vpage + i], __ATOMIC_ACQUIRE);
    /* its PAGE_SHARED was lost */
    if (r >= 0 && to == from && f->asid == a->asid && (w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO && w >> SY_PTE_PFN_SHIFT == from + i) make_shared(g, a, from + i, 1, vpage + i);
    if (f->asid == a->asid && f->state == SY_FRAME_MAPPED) f->flags &= (uint8_t)~SY_FF_SHARING;
    uint32_t *at = g->frames[to + i].state == SY_FRAME_SHARED ? holder_of(g, a, to + i, vpage + i) : NULL;
    if (!at || !g->holder[*at].pending) continue;
    if (r < 0) drop_holder(g, a, to + i, at);
    else g->holder[*at].pending = 0;
  }
}
/* What the page table of an address space that has lost messages says of its shared pages. */
static void resync_shared(struct sy_gateway *g, struct as *a) {
  for (uint32_t f = 0; a->shared && f < g->nframes; f++) {
    if (g->frames[f].state != SY_FRAME_SHARED) continue;
    for (uint32_t *at = &g->share_head[f]; *at != NONE;) {
      const struct holder *h = &g->holder[*at];
      uint64_t w = __atomic_load_n(&a->pte[h->vpage % SY_ARENA_PAGES], __ATOMIC_ACQUIRE);
      int st = w & SY_PTE_STATE_MASK, has = (st == SY_PTE_SHARED_RO || st == SY_PTE_LOCKED) && w >> SY_PTE_PFN_SHIFT == f;
      if (h->asid != a->asid || h->pending || has) {
        at = &g->holder[*at].next;
        continue;
      }
      int last = g->frames[f].refcount == 1;
      drop_holder(g, a, f, at);
      if (last) break;
    }
  }
}
static void bury_shared(struct sy_gateway *g, struct as *a) {
  for (uint32_t f = 0; a->shared && f < g->nframes; f++) {
    if (g->frames[f].state != SY_FRAME_SHARED) continue;
    for (uint32_t *at = &g->share_head[f]; *at != NONE;) {
      int last = g->frames[f].refcount == 1;
      if (g->holder[*at].asid != a->asid) at = &g->holder[*at].next;
      else drop_holder(g, a, f, at);
      if (last) break;
    }
  }
}
