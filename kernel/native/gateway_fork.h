/* gateway, part: forks that share frames. The child's stub says FORK before the child runs, while its parent waits in fork (mm_lock held, faults
 * left waiting, everything write-protected): so the parent's page table stays as it is, but for what we do here. Server thread. */

/* A frame's holders are a list that is walked when one lets go. Of merged frames, which are few, and full as a rule, many may fork. */
#define MOST_OF_MERGED (16 * SY_MAX_SHARING)

/* One page of the parent's is the child's, too. The child's word, or -1: that cannot be (under lock). */
static int64_t share_page(struct sy_gateway *g, struct as *a, struct as *child, uint64_t p) {
  uint64_t w = __atomic_load_n(&a->pte[p], __ATOMIC_ACQUIRE), pfn = w >> SY_PTE_PFN_SHIFT;
  int st = w & SY_PTE_STATE_MASK;
  if (st == SY_PTE_NONE) return SY_PTE_NONE;
  if (st == SY_PTE_NATIVE) return SY_PTE_NATIVE;
  if (st == SY_PTE_SWAPPED && !(w & SY_PTE_HASFRAME)) return SY_PTE_NATIVE | SY_PTE_FORKED; /* (its parent has fetched it from the store for it) */
  if ((st != SY_PTE_PRESENT && st != SY_PTE_SHARED_RO) || pfn >= g->nframes) return -1;
  struct sy_frame *f = &g->frames[pfn];
  if (f->state == SY_FRAME_GRANTED && f->asid == a->asid) map_frames(g, a, (uint32_t)pfn, 1, p); /* its PAGE_MAPPED was lost */
  if (!(f->state == SY_FRAME_MAPPED && owns(a, f, p)) && !(st == SY_PTE_SHARED_RO && shares(g, a, (uint32_t)pfn, p))) return -1;
  if (f->refcount >= (f->asid ? SY_MAX_SHARING : MOST_OF_MERGED) || add_holder(g, child, (uint32_t)pfn, p, 0)) return -1;
  if (f->state == SY_FRAME_MAPPED) {
    stay(g, f);
    f->flags = 0, f->parted = 0, a->mapped--, a->shared++;
    set_state(g, (uint32_t)pfn, 1, SY_FRAME_SHARED, 0);
  }
  if (st == SY_PTE_PRESENT) __atomic_store_n(&a->pte[p], (w & ~(uint64_t)SY_PTE_STATE_MASK) | SY_PTE_SHARED_RO | SY_PTE_FORKED, __ATOMIC_RELEASE);
  return (int64_t)((pfn << SY_PTE_PFN_SHIFT) | SY_PTE_SHARED_RO);
}
/* All of them. 0, or -1: some are shared, and are parted again when the child is buried. Others have the lock in between. */
static int share_table(struct sy_gateway *g, struct as *a, struct as *child) {
  uint64_t shared = 0, native = 0;
  int64_t w = 0;
  memcpy(child->mem + SY_AS_ADVICE_OFF, a->mem + SY_AS_ADVICE_OFF, SY_CHUNKS);
  for (uint32_t c = 0; c < SY_CHUNKS && w >= 0; c++) {
    if (!a->chunks[c]) continue;
    child->chunks[c] = 1;
    pthread_mutex_lock(&g->lock);
    for (uint64_t p = (uint64_t)c * SY_CHUNK_PAGES; p < (c + 1ull) * SY_CHUNK_PAGES && (w = share_page(g, a, child, p)) >= 0; p++) {
      if (w) child->pte[p] = (uint64_t)w;
      shared += (w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO, native += (w & SY_PTE_STATE_MASK) == SY_PTE_NATIVE;
    }
    pthread_mutex_unlock(&g->lock);
  }
  child->ctl->pages_native = native, child->ctl->mmap_hi = a->ctl->mmap_hi, child->ctl->brk_pages = a->ctl->brk_pages;
  count(g, SY_CNT_FORK_SHARED, shared);
  return w < 0 ? -1 : 0;
}
/* The address space of a process that says it is the child of a fork; NULL: it is none of ours. */
static struct as *fork_of(struct sy_gateway *g, pid_t pid, int uffd, uint32_t parent, int *status) {
  pthread_mutex_lock(&g->lock);
  struct as *a = find_as(g, parent);
  uint32_t child = a ? __atomic_load_n(&a->ctl->fork_child, __ATOMIC_ACQUIRE) : 0;
  int is = a && !a->released && a->ctl->fork_active && !a->ctl->fork_done && (child == (uint32_t)pid || child == SY_UNKNOWN_CHILD);
  pthread_mutex_unlock(&g->lock);
  *status = SY_W_REFUSED;
  struct as *c = is ? new_as(g, pid, uffd, 0, 0, a, status) : NULL;
  if (!c) return NULL;
  pthread_mutex_lock(&g->lock);
  drain_as(g, a, 2 * SY_CHANNEL_SLOTS);
  pthread_mutex_unlock(&g->lock);
  if (!share_table(g, a, c)) return c;
  *status = SY_W_REFUSED;
  c->uffd = -1; /* the caller's still */
  bury(g, c);
  return NULL;
}

/* Stubs hear of frames that are theirs alone again: they map them as before the fork, and the first write makes no copy. Not at once: while a child writes
 * there will be more. Returns whether to look again soon. */
#define OWNS_AT_ONCE 16          /* commands */
#define OWNS_GATHER_NS 20000000ull
static int send_owns(struct sy_gateway *g) {
  int again = 0;
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    struct sy_run run[OWNS_AT_ONCE];
    uint32_t k = 0;
    if (a->own_from == NONE || a->dying || a->released) continue;
    again = 1;
    uint64_t forks = __atomic_load_n(&a->ctl->forks, __ATOMIC_SEQ_CST); /* before we look whether there is one just now: what it shares it says to this thread */
    if (now_ns() < a->own_since_ns + OWNS_GATHER_NS || a->outstanding > SY_CMD_SLOTS / 2 || __atomic_load_n(&a->ctl->fork_active, __ATOMIC_SEQ_CST)) continue;
    pthread_mutex_lock(&g->lock);
    uint32_t f = a->own_from;
    while (f < g->nframes && k < OWNS_AT_ONCE) {
      struct sy_frame *x = &g->frames[f];
      uint32_t n = 0;
      for (; f + n < g->nframes && (!n || (x->vpage + n) % SY_CHUNK_PAGES) && x[n].parted && x[n].asid == a->asid && x[n].vpage == x->vpage + n && x[n].node == x->node; n++) x[n].parted = 0;
      if (n) run[k++] = (struct sy_run){(uint32_t)x->vpage, f, n, 0};
      f += n ? n : 1;
    }
    a->own_from = f < g->nframes ? f : NONE;
    pthread_mutex_unlock(&g->lock);
    while (k--) command(g, a, SY_CMD_OWN, 0, (uint64_t[6]){run[k].vpage, run[k].n, run[k].pfn, forks}, NULL, 0); /* (no memory: shared, as far as its stub knows; a write makes a copy) */
  }
  return again;
}
/* It forked meanwhile, or was short of mappings: once more, what is not shared again. */
static void not_owned(struct sy_gateway *g, struct as *a, const uint64_t *args) {
  pthread_mutex_lock(&g->lock);
  for (uint64_t i = 0; i < args[1]; i++) {
    struct sy_frame *f = &g->frames[args[2] + i];
    if (f->state != SY_FRAME_MAPPED || !owns(a, f, args[0] + i) || (a->pte[args[0] + i] & SY_PTE_STATE_MASK) != SY_PTE_SHARED_RO) continue;
    f->parted = 1;
    if (args[2] + i < a->own_from) a->own_from = (uint32_t)(args[2] + i);
  }
  pthread_mutex_unlock(&g->lock);
}

/* Frames are wanted, of all or within a limit, and nothing can leave: it may be shared. Then the youngest child that shares makes its copies now, in the machine's
 * memory, as a fork did before frames could be shared: it turns native. Returns whether one is about to (under lock). */
#define PARTING_PATIENCE_NS 10000000000ull
static int part_a_fork(struct sy_gateway *g, uint32_t limit) {
  struct as *c = NULL;
  uint64_t now = now_ns();
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    if (!a->forked || a->released || (limit && a->zone != limit)) continue;
    if (a->own_from != NONE) return 1;
    if (a->dying && a->shared) return 1;
    if (a->parting_ns && now < a->parting_ns + PARTING_PATIENCE_NS) return 1;
    if (!a->parting_ns && !a->dying && a->shared && (!c || a->asid > c->asid)) c = a;
  }
  if (!c) return 0;
  c->parting_ns = now, c->want_release = 1;
  count(g, SY_CNT_FORKS_PARTED, 1);
  poke(g);
  return 1;
}
