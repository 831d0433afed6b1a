/* gateway, part: pages that go to other frames (MIGRATE, COLLAPSE), or stay there and are mapped otherwise (SPLIT, COLLAPSE); stub_move.h says how. A commit takes the frames that they go to, and queues; the
 * server thread tells the stub; its answer ends it, and an event says how. */
/* A FREE block in a node, ISOLATED; NONE: there is none (under lock). */
static uint32_t block_in(struct sy_gateway *g, uint32_t node, int order) {
  uint32_t n = 1u << order, end = g->node[node].base + g->node[node].frames;
  for (uint32_t p = g->node[node].base; p < end; p += n) {
    if (n < 64 && p % 64 == 0 && !g->free_map[p / 64]) {
      p += 64 - n;
      continue;
    }
    if (!all_free(g, p, n)) continue;
    isolate(g, p, order);
    return p;
  }
  return NONE;
}
/* Queues the move of n pages, and takes the frames for it: the FREE block `to`, or any in a node (NONE) (under lock). */
static uint32_t queue_move(struct sy_gateway *g, struct as *a, struct move m, uint32_t node, int order) {
  if (a->moving + m.n > MOVING_MOST || a->moves >= MOVES_AT_ONCE || g->move_head - g->move_tail == MOVE_RING) return SY_R_BUSY;
  if (a->zone && g->hdr->watermark[a->zone].free < m.n) return SY_R_FULL;
  if (m.to == NONE) m.to = block_in(g, node, order);
  else if (all_free(g, m.to, 1u << order)) isolate(g, m.to, order);
  else return SY_R_STALE;
  if (m.to == NONE) return SY_R_FULL;
  event_frames(g, SY_MSG_FRAMES_TAKEN, a->asid, m.to, 1u << order, order);
  for (uint32_t i = 0; i < 1u << order; i++) {
    struct sy_frame *f = &g->frames[m.to + i];
    f->asid = a->asid, f->flags = SY_FF_TARGET, f->refcount = 0, f->vpage = 0;
  }
  set_state(g, m.to, 1u << order, SY_FRAME_GRANTED, order);
  own(g, a, m.to, 1u << order);
  g->move[g->move_head++ % MOVE_RING] = m, a->moving += m.n, a->moves++;
  return SY_R_COMPLETE;
}
/* [pfn, pfn + n): pages of one address space, one after the other, that may move; NULL: no (under lock). */
static struct as *movable(struct sy_gateway *g, uint32_t pfn, uint32_t n) {
  const struct sy_frame *f = &g->frames[pfn];
  struct as *a = f->state == SY_FRAME_MAPPED ? find_as(g, f->asid) : NULL;
  if (!a || a->dying || a->released) return NULL;
  for (uint32_t i = 0; i < n; i++)
    if (f[i].state != SY_FRAME_MAPPED || f[i].asid != f->asid || f[i].vpage != f->vpage + i || f[i].flags & SY_FF_SWAPPING || a->pte[f[i].vpage] & SY_PTE_MLOCKED) return NULL;
  return a;
}
static uint32_t migrate(struct sy_gateway *g, const struct sy_op *op) {
  uint32_t n = 1u << op->order, to = NONE;
  if (op->order > SY_HUGE_ORDER) return SY_R_INVALID;
  if (op->arg & SY_MIGRATE_TO) {
    uint64_t at = op->arg - SY_MIGRATE_TO;
    if (at >= g->nframes || at % n || n > g->nframes - at) return SY_R_INVALID;
    to = (uint32_t)at;
  } else if (op->arg >= g->nodes)
    return SY_R_INVALID;
  struct as *a = movable(g, op->pfn, n);
  if (!a || (to == NONE && g->frames[op->pfn].node == op->arg)) return SY_R_STALE;
  return queue_move(g, a, (struct move){a->asid, (uint32_t)g->frames[op->pfn].vpage, n, to, op->pfn, 0, 0}, (uint32_t)op->arg, op->order);
}
/* The aligned block in which frame pfn is, if all of it is pages of one address space that are such a block, too, and may move; NONE: it is not. */
static uint32_t block_of(struct sy_gateway *g, uint32_t pfn) {
  uint32_t n = SY_CHUNK_PAGES, first = pfn - (uint32_t)(g->frames[pfn].vpage % n);
  return first <= pfn && first % n == 0 && movable(g, first, n) ? first : NONE;
}
/* Smallest and largest piece that a block is in. */
static void pieces(struct sy_gateway *g, uint32_t first, uint32_t *least, uint32_t *most) {
  *least = SY_MAX_ORDER, *most = 0;
  for (uint32_t i = 0; i < SY_CHUNK_PAGES; i++) {
    uint32_t o = g->frames[first + i].order;
    if (o < *least) *least = o;
    if (o > *most) *most = o;
  }
}
static uint32_t queue_remap(struct sy_gateway *g, struct as *a, uint32_t first, uint32_t order) {
  if (a->moving + SY_CHUNK_PAGES > MOVING_MOST || a->moves >= MOVES_AT_ONCE || g->move_head - g->move_tail == MOVE_RING) return SY_R_BUSY;
  g->move[g->move_head++ % MOVE_RING] = (struct move){a->asid, (uint32_t)g->frames[first].vpage, SY_CHUNK_PAGES, first, first, order, TO_REMAP};
  a->moving += SY_CHUNK_PAGES, a->moves++;
  return SY_R_COMPLETE;
}
static uint32_t split(struct sy_gateway *g, const struct sy_op *op) {
  uint32_t least, most;
  if (op->order >= SY_HUGE_ORDER || op->pfn >= g->nframes || op->arg) return SY_R_INVALID;
  if (g->frames[op->pfn].barrier != op->barrier) return SY_R_STALE;
  uint32_t first = block_of(g, op->pfn);
  if (first == NONE) return SY_R_STALE;
  pieces(g, first, &least, &most);
  return most <= op->order ? SY_R_STALE : queue_remap(g, find_as(g, g->frames[first].asid), first, op->order);
}
static uint32_t collapse(struct sy_gateway *g, const struct sy_op *op) {
  uint32_t most = (uint32_t)op->arg & 0xffff, n = SY_CHUNK_PAGES;
  if (op->order != SY_HUGE_ORDER || op->pfn >= g->nframes || op->arg & ~(uint64_t)(SY_COLLAPSE_ADVISED | 0xffff) || most >= n) return SY_R_INVALID;
  const struct sy_frame *f = &g->frames[op->pfn];
  if (f->barrier != op->barrier) return SY_R_STALE;
  struct as *a = movable(g, op->pfn, 1);
  if (!a) return SY_R_STALE;
  uint32_t vpage = (uint32_t)f->vpage & ~(n - 1), first = block_of(g, op->pfn), least, largest;
  uint8_t is = a->mem[SY_AS_ADVICE_OFF + vpage / n];
  if (is & SY_ADVICE_SMALL || (op->arg & SY_COLLAPSE_ADVISED && !(is & SY_ADVICE_HUGE))) return SY_R_NOT_PERMITTED;
  if (first != NONE) {
    pieces(g, first, &least, &largest);
    return least >= SY_HUGE_ORDER ? SY_R_STALE : queue_remap(g, a, first, SY_HUGE_ORDER); /* (it is mapped so already; or only that is missing) */
  }
  return queue_move(g, a, (struct move){a->asid, vpage, n, NONE, NONE, most, 0}, f->node, SY_HUGE_ORDER);
}
/* The same of a block that stays where it is. Its barriers stay, too: nothing that others have decided on has changed, and what stands by still leaves. */
static void remapped(struct sy_gateway *g, struct as *a, const uint64_t *args, int64_t r, int asked) {
  uint32_t n = (uint32_t)args[1], first = (uint32_t)args[2], order = (uint32_t)args[4];
  int whole = order == SY_HUGE_ORDER;
  struct sy_msg m = {.type = SY_MSG_MOVE_REFUSED, .asid = a->asid, .vpage = args[0], .npages = n, .order = (uint16_t)order, .pfn = SY_NO_FRAME, .arg = (uint64_t)-r};
  pthread_mutex_lock(&g->lock);
  a->moving -= n, a->moves--;
  if (asked) drain_as(g, a, 2 * SY_CHANNEL_SLOTS);
  for (uint32_t i = 0; r >= 0 && i < n; i++) {
    struct sy_frame *f = &g->frames[first + i];
    if (f->state != SY_FRAME_MAPPED || f->asid != a->asid || f->vpage != args[0] + i) continue;
    f->order = (uint8_t)order;
    if (whole) f->flags &= (uint8_t)~SY_FF_AGED; /* it is mapped again */
  }
  if (r >= 0) m.type = whole ? SY_MSG_PAGE_COLLAPSED : SY_MSG_PAGE_SPLIT, m.pfn = first, m.arg = whole ? n : 0, m.node = g->frames[first].node;
  count(g, r < 0 ? SY_CNT_MOVES_REFUSED : whole ? SY_CNT_COLLAPSED : SY_CNT_SPLIT, n);
  event(g, m);
  pthread_mutex_unlock(&g->lock);
}
/* Server thread: the stub's answer, pages that were moved or -errno; or it will give none (asked 0), and is about to end. */
static void moved(struct sy_gateway *g, struct as *a, const uint64_t *args, int64_t r, int asked) {
  uint32_t n = (uint32_t)args[1], to = (uint32_t)args[2], from = (uint32_t)args[3];
  int share = args[5] == TO_SHARE;
  if (args[5] == TO_REMAP) return remapped(g, a, args, r, asked);
  struct sy_msg m = {.type = share ? SY_MSG_MERGE_REFUSED : SY_MSG_MOVE_REFUSED, .asid = a->asid, .vpage = args[0], .npages = n, .order = (uint16_t)(31 - __builtin_clz(n)), .pfn = from, .arg = (uint64_t)-r};
  pthread_mutex_lock(&g->lock);
  a->moving -= n, a->moves--;
  if (asked) drain_as(g, a, 2 * SY_CHANNEL_SLOTS); /* what it did, it said before */
  if (share && asked) merged(g, a, (uint32_t)args[0], n, to, from, (uint32_t)args[4], r);
  for (uint32_t i = to, k; asked && !share && i < to + n; i += k) {
    k = 1;
    if (g->frames[i].asid != a->asid || !(g->frames[i].flags & SY_FF_TARGET)) continue;
    g->frames[i].flags &= (uint8_t)~SY_FF_TARGET;
    if (r >= 0 || g->frames[i].state != SY_FRAME_GRANTED) continue;
    while (i + k < to + n && g->frames[i + k].asid == a->asid && g->frames[i + k].flags & SY_FF_TARGET && g->frames[i + k].state == SY_FRAME_GRANTED) k++;
    release_frames(g, a, i, k);
    event_frames(g, SY_MSG_PAGE_FREED, 0, i, k, 0);
  }
  if (r >= 0) {
    m.type = share ? SY_MSG_PAGE_MERGED : from == NONE ? SY_MSG_PAGE_COLLAPSED : SY_MSG_PAGE_MIGRATED, m.pfn = to, m.arg = from == NONE ? (uint64_t)r : from;
    m.node = g->frames[to].node;
  }
  count(g, r < 0 ? SY_CNT_MOVES_REFUSED : share ? SY_CNT_MERGED : from == NONE ? SY_CNT_COLLAPSED : SY_CNT_MIGRATED, n);
  event(g, m);
  pthread_mutex_unlock(&g->lock);
}
/* Server thread: tells the stubs. */
static void send_moves(struct sy_gateway *g) {
  for (;;) {
    pthread_mutex_lock(&g->lock);
    int some = g->move_tail != g->move_head;
    struct move m = some ? g->move[g->move_tail++ % MOVE_RING] : (struct move){0};
    struct as *a = some ? find_as(g, m.asid) : NULL;
    pthread_mutex_unlock(&g->lock);
    if (!some) return;
    if (!a || a->dying) continue; /* its frames are buried with it */
    static const uint32_t told[] = {SY_CMD_MOVE, SY_CMD_SHARE, SY_CMD_REMAP};
    uint64_t args[6] = {m.vpage, m.n, m.to, m.from, m.most, m.kind};
    int huge = m.kind == TO_REMAP ? m.most == SY_HUGE_ORDER : m.kind == TO_MOVE && m.from == NONE; /* a COLLAPSE */
    /* prctl(PR_SET_THP_DISABLE) */
    if (huge && status_field(g, a->pid, "\nTHP_enabled:") == 0) moved(g, a, args, -EPERM, 1);
    else if (command(g, a, told[m.kind], 0, args, NULL, 0)) moved(g, a, args, -ENOMEM, 1);
  }
}
