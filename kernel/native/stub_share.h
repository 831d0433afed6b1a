/* stub, part: pages that share a frame with others (MERGE, fork), and the copies that writes make.
 *
 * Such a page is a private mapping of the frame, write-protected through userfaultfd: its word is SHARED_RO. It is private so that nothing can be lost between
 * putting the mapping there and protecting it: a write that comes just then makes the kernel copy the page, into memory of its own; the pagemap shows that,
 * and the page is native from then on. A write that comes later is a fault of ours: frame from the magazine, copy, mapped in place.
 *
 * A parent's pages are protected where they are when it forks: a shared mapping (FORKED) until something takes its entries away, when it becomes a private one. */

/* A page that share_some() could not share. Where it may be written a write may have been quicker, and the copy is there already. */
static void own_page(uint64_t p, uint32_t pfn, int prot) {
  uint8_t content[PS];
  if (prot != RW && !read_frame(pfn, content) && !own_copy(p, content)) return;
  struct uffdio_writeprotect u = {.range = {VA(p), PS}, .mode = 0};
  SYS(__NR_ioctl, fd_uffd, UFFDIO_WRITEPROTECT, &u, 0, 0);
  if (prot != RW) SYS(__NR_mprotect, VA(p), PS, RW, 0, 0);
  __atomic_fetch_or((uint8_t *)VA(p), 0, __ATOMIC_RELAXED); /* (no memory at all: it ends here) */
  if (prot != RW) SYS(__NR_mprotect, VA(p), PS, prot, 0, 0);
}

/* Shares [p, p + n), whose words are locked, with the frames from pfn on. own[i]: 1 where a write was quicker. 0 or -errno: nothing has been done. */
#define PIECE (SY_CHUNK_PAGES / 2)
static long share_some(uint64_t p, uint32_t pfn, uint64_t n, int prot, uint8_t *own) {
  uint64_t entry[PIECE]; /* (of any of our threads) */
  uint32_t nd = node_of(pfn);
  long r = sys_mmap(VA(p), n * PS, prot, MAP_PRIVATE | MAP_FIXED, fd_ram[nd], (uint64_t)(pfn - node[nd].base) * PS);
  if (r < 0 && r > -4096) return r;
  SYS(__NR_madvise, VA(p), n * PS, MADV_POPULATE_READ, 0, 0); /* as populating a writable private mapping would copy it */
  struct uffdio_writeprotect w = {.range = {VA(p), n * PS}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
  if (!uffd_register(p, n, UFFDIO_REGISTER_MODE_WP)) SYS(__NR_ioctl, fd_uffd, UFFDIO_WRITEPROTECT, &w, 0, 0);
  memset(entry, 0, sizeof entry);
  long fd = SYS(__NR_open, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0, 0, 0);
  if (fd >= 0) SYS(__NR_pread64, fd, entry, n * sizeof *entry, VA(p) / PS * sizeof *entry, 0), SYS(__NR_close, fd, 0, 0, 0, 0);
  for (uint64_t i = 0; i < n; i++) { /* present, the file's page, protected (Documentation/admin-guide/mm/pagemap.rst) */
    own[i] = (entry[i] >> 57 & (1 << 6 | 1 << 4 | 1)) != (1 << 6 | 1 << 4 | 1);
    if (own[i]) own_page(p + i, pfn + (uint32_t)i, prot);
  }
  return 0;
}
/* In pieces that the kernel cannot map by a huge entry, which it would drop to protect it: half a block, and then, when that one is another mapping by its
 * registration, the other half. Pages that are done. */
static long share_map(uint64_t p, uint32_t pfn, uint64_t n, int prot) {
  for (uint64_t i = 0, k; i < n; i += k) {
    k = PIECE - (p + i) % PIECE < n - i ? PIECE - (p + i) % PIECE : n - i;
    long r = share_some(p + i, pfn + (uint32_t)i, k, prot, found + i);
    if (r < 0) return i ? (long)i : r;
  }
  return (long)n;
}
static int alike(uint32_t a, uint32_t b, uint64_t n) {
  static uint8_t both[2][8 * PS];
  uint32_t na = node_of(a), nb = node_of(b);
  for (uint64_t i = 0, k; i < n; i += k) {
    k = n - i < 8 ? n - i : 8;
    if (SYS(__NR_pread64, fd_ram[na], both[0], k * PS, (a + i - node[na].base) * PS, 0) != (long)(k * PS)) return 0;
    if (SYS(__NR_pread64, fd_ram[nb], both[1], k * PS, (b + i - node[nb].base) * PS, 0) != (long)(k * PS)) return 0;
    const uint64_t *x = (void *)both[0], *y = (void *)both[1];
    for (uint64_t j = 0; j < k * PS / 8; j++)
      if (x[j] != y[j]) return 0;
  }
  return 1;
}
/* SY_CMD_SHARE; command thread, under mm_lock. */
static long share_pages(uint64_t p, uint64_t n, uint32_t to, uint32_t from) {
  static word_t was[SY_CHUNK_PAGES];
  uint64_t k = 0, away = 0, native = 0;
  if (p >= SY_ARENA_PAGES || !n || n > SY_CHUNK_PAGES || n > SY_ARENA_PAGES - p) return -EINVAL;
  uint8_t a = attr[p];
  if (is_native(p) || is_native(p + n - 1) || bits(mergeable, p, n, LOOK) != n) return -EPERM;
  for (uint64_t i = 0; i < n; i++)
    if (attr[p + i] != a || !may(a, 0) || !(A_PROT(a) & PROT_READ)) return -EPERM;
  for (; k < n; k++) {
    word_t w = LOAD(chunks[(p + k) / SY_CHUNK_PAGES]) ? LOAD(pte[p + k]) : 0;
    if ((w & SY_PTE_MLOCKED) || !has_frame(w) || w >> SY_PTE_PFN_SHIFT != from + k || !CAS(pte[p + k], &w, locked(w))) break;
    was[k] = w, away += (w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED;
  }
  if (k < n) return not_moved(p, k, was), -EAGAIN;
  long r = SYS(__NR_madvise, VA(p), n * PS, MADV_DONTNEED, 0, 0);
  if (!r) look_at_threads(0); /* (see move_pages) */
  if (!r && to != from && !alike(from, to, n)) r = -EILSEQ;
  if (!r) r = share_map(p, to, n, kprot(a));
  if (r < 0) return not_moved(p, n, was), r;
  if ((uint64_t)r < n) { /* there are too many mappings: the rest stays where it was */
    not_moved(p + (uint64_t)r, n - (uint64_t)r, was + r);
    if (to != from) post(SY_MSG_PAGE_FREED, p + (uint64_t)r, to + (uint32_t)r, n - (uint64_t)r, 0, 0, 0);
    n = (uint64_t)r, away = 0;
    for (uint64_t i = 0; i < n; i++) away += (was[i] & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED;
  }
  __atomic_fetch_sub(&ctl->pages_mapped, n - away, __ATOMIC_RELAXED);
  __atomic_fetch_sub(&ctl->pages_swapped, away, __ATOMIC_RELAXED);
  if (to == from) post(SY_MSG_PAGE_SHARED, p, to, n, 0, 0, 0);
  else post(SY_MSG_PAGE_FREED, p, from, n, 0, 0, 0);
  for (uint64_t i = 0; i < n; i++) {
    if (found[i]) post(SY_MSG_PAGE_FREED, p + i, to + (uint32_t)i, 1, 0, 0, 0), native++;
    was[i] = (found[i] ? SY_PTE_NATIVE : ((word_t)(to + i) << SY_PTE_PFN_SHIFT) | SY_PTE_SHARED_RO) | (kprot(a) != RW ? W_KPROT : 0);
  }
  __atomic_fetch_add(&ctl->pages_native, native, __ATOMIC_RELAXED);
  not_moved(p, n, was);
  return (long)(n - native);
}

/* PRESENT or SHARED_RO with that frame, page p, as the word w says (but for who waits) -> LOCKED. */
static int lock_as(uint64_t p, word_t w) {
  word_t x = LOAD(pte[p]);
  return ((x ^ w) & ~(word_t)SY_PTE_CONTENDED) == 0 && CAS(pte[p], &x, locked(x));
}
static void shared_again(uint64_t p, uint64_t n, word_t w) {
  for (uint64_t i = 0; i < n; i++) STORE(pte[p + i], w + (i << SY_PTE_PFN_SHIFT));
}
/* How many pages one write copies: more for who writes upwards, who has as many of his own before p (as read_ahead). */
static int copy_order(uint64_t p, word_t w) {
  int order = 0;
  uint32_t old = (uint32_t)(w >> SY_PTE_PFN_SHIFT);
  for (; order < READ_AHEAD_ORDER; order++) {
    uint64_t n = 2ull << order;
    if (p % n || p < n || !present(p - 1) || !present(p - n) || node_of(old + (uint32_t)n - 1) != node_of(old)) break;
    for (uint64_t i = n / 2; i < n; i++)
      if (attr[p + i] != attr[p] || LOAD(pte[p + i]) != w + (i << SY_PTE_PFN_SHIFT)) return order;
  }
  return order;
}
/* A write to a shared page. Fault thread. Without a frame for it (no gateway) the copy is memory of the kernel's own. */
static void copy_on_write(int me, uint64_t p) {
  word_t w = LOAD(pte[p]) & ~(word_t)SY_PTE_CONTENDED;
  if ((w & SY_PTE_STATE_MASK) != SY_PTE_SHARED_RO || !lock_as(p, w)) return wake(p, 1);
  uint8_t a = attr[p];
  uint32_t old = (uint32_t)(w >> SY_PTE_PFN_SHIFT), od = node_of(old);
  int got = 0, prot = kprot(a), order = copy_order(p, w);
  if (!may(a, 1)) return STORE(pte[p], w), wake(p, 1); /* the kernel says so */
  uint32_t pfn = some_frames(me, p, order, &got);
  if (pfn == SY_NO_FRAME && !LOAD(gateway_dead)) { /* a fork has begun, whose end wakes all */
    STORE(pte[p], w);
    return;
  }
  if (pfn == SY_NO_FRAME) {
    long r = make_native(p, old, prot);
    if (r >= 0) __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
    else leave_reading(me), nap(1000);
    STORE(pte[p], r < 0 ? w : SY_PTE_NATIVE | (w & (W_KPROT | SY_PTE_MLOCKED)));
    return wake(p, 1);
  }
  uint64_t n = 1;
  while (n < 1ull << got && attr[p + n] == a && lock_as(p + n, w + (n << SY_PTE_PFN_SHIFT))) n++;
  uint32_t nd = node_of(pfn);
  if (n < 1ull << got) post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn + (uint32_t)n, (1ull << got) - n, 0, 0, 1);
  long r = SYS(__NR_pread64, fd_ram[od], unpacked[me], n * PS, (uint64_t)(old - node[od].base) * PS, 0) == (long)(n * PS) &&
           SYS(__NR_pwrite64, fd_ram[nd], unpacked[me], n * PS, (uint64_t)(pfn - node[nd].base) * PS, 0) == (long)(n * PS) ? map_frames(p, pfn, n, prot) : -EIO;
  if (r < 0) { /* too many mappings, or a limit of its address space that was there before us: in the kernel's memory, which needs no other mapping; but for a FORKED one, again */
    post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn, n, 0, 0, 1);
    STORE(ctl->in_hand[me], SY_NO_FRAME);
    int own = r != -EIO && !(w & SY_PTE_FORKED) && !own_copy(p, unpacked[me]);
    if (own) {
      post(SY_MSG_PAGE_FREED, p, old, 1, 0, 0, 0);
      __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
      STORE(pte[p], SY_PTE_NATIVE | (w & (W_KPROT | SY_PTE_MLOCKED)));
    }
    shared_again(p + (uint64_t)own, n - (uint64_t)own, w + ((uint64_t)own << SY_PTE_PFN_SHIFT));
    if (!own) leave_reading(me), nap(1000);
    return wake(p, n);
  }
  post(SY_MSG_PAGE_COW, p, pfn, n, 0, old, 0);
  for (uint64_t i = 0; i < n; i++) STORE(pte[p + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | (prot != RW ? W_KPROT : 0) | (w & SY_PTE_MLOCKED));
  STORE(ctl->in_hand[me], SY_NO_FRAME);
  __atomic_fetch_add(&ctl->pages_mapped, n, __ATOMIC_RELAXED);
  wake(p, n);
}

/* A read of a FORKED page whose entry is gone: protecting a huge mapping has dropped it. The pages around it become private mappings: an entry
 * that we give back cannot be protected from its first instant on before Linux 6.4. Fault thread. */
static void map_shared_again(int me, uint64_t p) {
  word_t w = LOAD(pte[p]) & ~(word_t)SY_PTE_CONTENDED;
  if ((w & SY_PTE_STATE_MASK) != SY_PTE_SHARED_RO || !lock_as(p, w)) return wake(p, 1);
  uint8_t a = attr[p], raced[PIECE];
  uint64_t first = p & ~(uint64_t)(PIECE - 1), lo = p, hi = p + 1, here = w >> SY_PTE_PFN_SHIFT;
  uint32_t nd = node_of((uint32_t)here);
  while (lo > first && here - (p - lo) > node[nd].base && attr[lo - 1] == a && lock_as(lo - 1, w - ((p - lo + 1) << SY_PTE_PFN_SHIFT))) lo--;
  while (hi < first + PIECE && here + (hi - p) < node[nd].base + node[nd].frames && attr[hi] == a && lock_as(hi, w + ((hi - p) << SY_PTE_PFN_SHIFT))) hi++;
  word_t base = (w - ((p - lo) << SY_PTE_PFN_SHIFT)), private = base & ~(word_t)SY_PTE_FORKED;
  uint32_t pfn = (uint32_t)(base >> SY_PTE_PFN_SHIFT);
  if (share_some(lo, pfn, hi - lo, kprot(a), raced) < 0) {
    shared_again(lo, hi - lo, base);
    leave_reading(me), nap(1000);
    return wake(lo, hi - lo);
  }
  for (uint64_t i = 0; i < hi - lo; i++) {
    if (raced[i]) post(SY_MSG_PAGE_FREED, lo + i, pfn + (uint32_t)i, 1, 0, 0, 0), __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
    STORE(pte[lo + i], raced[i] ? SY_PTE_NATIVE | (w & (W_KPROT | SY_PTE_MLOCKED)) : private + (i << SY_PTE_PFN_SHIFT));
  }
  wake(lo, hi - lo);
}
/* SY_CMD_OWN; command thread, under mm_lock. */
static long own_pages(uint64_t p, uint64_t n, uint32_t pfn, uint64_t forks) {
  static word_t was[SY_CHUNK_PAGES];
  long pages = 0;
  if (p >= SY_ARENA_PAGES || n > SY_CHUNK_PAGES || n > SY_ARENA_PAGES - p) return 0;
  if (forks != ctl->forks) return -EAGAIN;
  for (uint64_t i = 0, k; i < n; i += k ? k : 1) {
    uint8_t a = attr[p + i];
    for (k = 0; i + k < n && attr[p + i + k] == a && (LOAD(pte[p + i + k]) & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO && LOAD(pte[p + i + k]) >> SY_PTE_PFN_SHIFT == pfn + i + k; k++) {
      was[k] = LOAD(pte[p + i + k]) & ~(word_t)SY_PTE_CONTENDED;
      if (!lock_as(p + i + k, was[k])) break;
    }
    if (!k) continue;
    long r = map_frames(p + i, pfn + (uint32_t)i, k, kprot(a));
    if (r >= 0) {
      for (uint64_t j = 0; j < k; j++) was[j] = (was[j] & ~(word_t)(SY_PTE_STATE_MASK | SY_PTE_FORKED | W_KPROT)) | SY_PTE_PRESENT | (kprot(a) != RW ? W_KPROT : 0);
      __atomic_fetch_add(&ctl->pages_mapped, k, __ATOMIC_RELAXED);
      pages += (long)k;
    }
    not_moved(p + i, k, was);
    if (r < 0) return r;
  }
  return pages;
}
