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
  }
  struct sy_run *last = a->evict_tail != a->evict_sent ? &a->mag->evict[(a->evict_tail - 1) % SY_EVICT_RUNS] : NULL;
  if (last && last->flag == flag && last->pfn + last->n == pfn && last->vpage + last->n == f->vpage && last->n + n <= SY_CHUNK_PAGES)
    last->n += n; /* one piece of work for both */
  else
    a->mag->evict[a->evict_tail++ % SY_EVICT_RUNS] = (struct sy_run){(uint32_t)f->vpage, pfn, n, flag};
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
/* By ourselves, when nobody else has: round and round over the frames, oldest look first. Frames on their way (under lock). */
static uint64_t reclaim_some(struct sy_gateway *g, uint64_t want) {
  uint64_t got = 0, going = on_the_way(g, g->swapping);
  if (!g->hdr->slots || going >= want) return going;
  for (uint32_t k = 0; k < g->nframes && got < want;) {
    uint32_t f = g->clock_hand, n = 1;
    const struct sy_frame *p = &g->frames[f];
    if (p->state == SY_FRAME_MAPPED && !(p->flags & SY_FF_SWAPPING)) {
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
/* Chosen by kswapd for when memory is short (under lock). */
static uint32_t stand_by(struct sy_gateway *g, uint32_t pfn, uint32_t n) {
  struct sy_frame *f = &g->frames[pfn];
  for (uint32_t i = 0; i < n; i++)
    if (f[i].state != SY_FRAME_MAPPED || f[i].flags & (SY_FF_SWAPPING | SY_FF_STANDBY)) return SY_R_STALE;
  uint32_t nd = f->node, *level = &g->hdr->watermark[nd].standby;
  if (*level + n > STANDBY_RING) return SY_R_FULL;
  for (uint32_t i = 0; i < n; i++) {
    f[i].flags |= SY_FF_STANDBY;
    g->standby[nd][g->standby_tail[nd]++ % STANDBY_RING] = (struct standby){pfn + i, f[i].barrier, f[i].flags & SY_FF_AGED};
  }
  *level += n;
  return SY_R_COMPLETE;
}
/* What stands by leaves until a node has `high` frames. Returns whether to look again soon. */
static int relieve(struct sy_gateway *g, uint32_t nd) {
  struct sy_watermarks *m = &g->hdr->watermark[nd];
  uint64_t going = on_the_way(g, g->swapping_on[nd]);
  g->reclaiming[nd] |= m->free < m->low;
  while (g->reclaiming[nd] && m->standby && m->free + going < m->high) {
    struct standby s = g->standby[nd][g->standby_head[nd] % STANDBY_RING];
    struct sy_frame *f = &g->frames[s.pfn];
    int same = f->barrier == s.barrier && f->flags & SY_FF_STANDBY, touched = s.aged && !(f->flags & SY_FF_AGED);
    uint32_t r = same && !touched ? take_run(g, s.pfn, 1, SY_FF_SWAPPING) : SY_R_STALE;
    if (r == SY_R_BUSY || r == SY_R_FULL) break;
    if (same) f->flags &= (uint8_t)~SY_FF_STANDBY;
    g->standby_head[nd]++, m->standby--;
    going += r == SY_R_COMPLETE;
  }
  if (m->free < m->min && !m->standby && g->hdr->component[SY_C_KSWAPD].state != 1) reclaim_some(g, m->high);
  if (m->free + going >= m->high) g->reclaiming[nd] = 0;
  return m->free < m->high && (m->standby || going);
}
static void stays(struct sy_gateway *g, struct taken t) {
  for (uint32_t i = 0; t.run.flag == SY_FF_SWAPPING && i < t.run.n; i++)
    if (g->frames[t.run.pfn + i].asid == t.asid) stay(g, &g->frames[t.run.pfn + i]);
}
/* Server thread: what has been taken away goes to the store thread. */
static void evicted(struct sy_gateway *g, struct as *a, uint32_t from, uint32_t to) {
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = from; i != to; i++) {
    struct taken t = {a->asid, a->mag->evict[i % SY_EVICT_RUNS]};
    if (t.run.flag == SY_FF_AGED) continue;
    if (g->store_head - g->store_tail == STORE_RING) stays(g, t); /* a touch finds the page where it was */
    else g->store[g->store_head++ % STORE_RING] = t;
  }
  a->evict_done = to;
  pthread_cond_signal(&g->store_work);
  pthread_mutex_unlock(&g->lock);
}
/* One page, whose word is SWAPPED with HASFRAME, or was until somebody touched it. Under lock, which is dropped for the write. */
static void store_page(struct sy_gateway *g, uint32_t asid, uint32_t pfn, uint64_t vpage) {
  struct as *a = find_as(g, asid);
  struct sy_frame *f = &g->frames[pfn];
  uint32_t barrier = f->barrier, slot;
  if (!a || f->asid != asid || f->state != SY_FRAME_MAPPED || f->vpage != vpage || !(f->flags & SY_FF_SWAPPING)) return; /* it has gone by itself */
  uint64_t w = __atomic_load_n(&a->pte[vpage], __ATOMIC_ACQUIRE), in_frame = SY_PTE_SWAPPED | SY_PTE_HASFRAME;
  int there = (w & (SY_PTE_STATE_MASK | SY_PTE_HASFRAME)) == in_frame && w >> SY_PTE_PFN_SHIFT == pfn;
  int error = 0;
  if (there && !a->dying && (slot = slot_take(g)) != NONE) {
    pthread_mutex_unlock(&g->lock);
    error = store_put(g, slot, frame_mem(g, pfn));
    pthread_mutex_lock(&g->lock);
    a = find_as(g, asid);
    uint64_t to = (w & ((1 << SY_PTE_PFN_SHIFT) - 1) & ~(uint64_t)SY_PTE_HASFRAME) | (uint64_t)slot << SY_PTE_PFN_SHIFT;
    /* Not since our look: a frame that went and came back has another barrier, one that was only touched another word. */
    if (!error && a && !a->dying && f->barrier == barrier && __atomic_compare_exchange_n(&a->pte[vpage], &w, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
      g->slot[slot].asid = asid, g->slot[slot].vpage = (uint32_t)vpage, g->slot[slot].out = g->swapped_out++;
      a->swapped++;
      count(g, SY_CNT_SWAPPED_OUT, 1);
      g->swap_progress_ns = now_ns();
      event(g, (struct sy_msg){.type = SY_MSG_PAGE_SWAPPED, .asid = asid, .pfn = pfn, .vpage = vpage, .npages = 1, .node = f->node, .arg = slot});
      release_frames(g, a, pfn, 1);
      event_frames(g, SY_MSG_PAGE_FREED, asid, pfn, 1, 0);
      return;
    }
    slot_free(g, slot);
  }
  count(g, error ? SY_CNT_STORE_ERRORS : SY_CNT_SWAP_CANCELLED, 1);
  if (f->barrier == barrier) stay(g, f);
}
/* The next run of those taken away, under lock. 0: there is none. */
static int store_next(struct sy_gateway *g) {
  if (g->store_head == g->store_tail) return 0;
  struct taken t = g->store[g->store_tail++ % STORE_RING];
  for (uint32_t i = 0; i < t.run.n; i++) store_page(g, t.asid, t.run.pfn + i, t.run.vpage + i);
  return 1;
}
static void *store_thread(void *arg) {
  struct sy_gateway *g = arg;
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
/* The contents of all stored pages of a chunk, for a fork or a release. The slots stay. */
static void fetch(struct sy_gateway *g, struct as *a, pid_t pid, const struct sy_request *q) {
  uint64_t to = q->tids[2] | (uint64_t)q->tids[3] << 32;
  uint8_t page[PS];
  int error = 0;
  if (q->order >= SY_STORE_WAITERS || q->tids[0] > SY_CHUNK_PAGES || q->vpage > SY_ARENA_PAGES - q->tids[0]) return bad(g, a);
  for (uint32_t i = 0; i < q->tids[0] && !error; i++) {
    uint64_t w = __atomic_load_n(&a->pte[q->vpage + i], __ATOMIC_ACQUIRE), s = w >> SY_PTE_PFN_SHIFT;
    if ((w & SY_PTE_STATE_MASK) != SY_PTE_SWAPPED || w & SY_PTE_HASFRAME) continue;
    pthread_mutex_lock(&g->lock); /* (page cache, not the disk, as a rule; and it is nobody else's meanwhile) */
    error = slot_is(g, a, s) ? store_get(g, (uint32_t)s, page) : EINVAL;
    pthread_mutex_unlock(&g->lock);
    struct iovec here = {page, PS}, there = {(void *)(to + i * PS), PS};
    if (!error && syscall(SYS_pidfd_send_signal, a->pidfd, 0, NULL, 0)) error = ESRCH; /* (or the number would be somebody else's) */
    if (!error && process_vm_writev(pid, &here, 1, &there, 1, 0) != PS) error = EFAULT;
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
