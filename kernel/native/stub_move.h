/* stub, part: pages that go to other frames (MIGRATE, COLLAPSE), or are mapped otherwise (SPLIT), while the program runs.
 *
 * Their words are locked, so that every fault there waits; then they are taken away, so that nobody writes any more; copied from frame to frame; and one
 * mapping is put over them. Up to there the old frames hold all, and whatever fails, the words go back to what they were: a page without its entry in the
 * kernel's table is a minor fault. The gateway has flagged the new frames (SY_FF_TARGET), and takes them back if the answer is an error. */

/* Words of [p, p + k) back to what they were. */
static void not_moved(uint64_t p, uint64_t k, const word_t *was) {
  word_t contended = 0;
  for (uint64_t i = 0; i < k; i++) contended |= __atomic_exchange_n(&pte[p + i], was[i] & ~(word_t)SY_PTE_CONTENDED, __ATOMIC_SEQ_CST);
  if (contended & SY_PTE_CONTENDED) wake(p, k);
}
static int has_frame(word_t w) {
  int st = w & SY_PTE_STATE_MASK;
  return st == SY_PTE_PRESENT || (st == SY_PTE_SWAPPED && (w & SY_PTE_HASFRAME)); /* (AGE takes a page away, and its frame keeps it) */
}
/* The content of n pages, whose words were so, into the frames from `to` on. 0 or -errno. */
static long copy_to_frames(const word_t *was, uint64_t n, uint32_t to) {
  uint32_t nd = node_of(to);
  long at = sys_mmap(0, n * PS, RW, MAP_SHARED | MAP_POPULATE, fd_ram[nd], (uint64_t)(to - node[nd].base) * PS), r = 0;
  if (at < 0 && at > -4096) return at;
  for (uint64_t i = 0, k; i < n && !r; i += k) {
    uint64_t pfn = was[i] >> SY_PTE_PFN_SHIFT;
    int some = has_frame(was[i]);
    nd = some ? node_of((uint32_t)pfn) : 0;
    for (k = 1; i + k < n && has_frame(was[i + k]) == some && (!some || (was[i + k] >> SY_PTE_PFN_SHIFT == pfn + k && pfn + k < node[nd].base + node[nd].frames));) k++;
    if (!some) memset((char *)at + i * PS, 0, k * PS);
    else if (SYS(__NR_pread64, fd_ram[nd], at + (long)(i * PS), k * PS, (pfn - node[nd].base) * PS, 0) != (long)(k * PS)) r = -EIO;
  }
  SYS(__NR_munmap, at, n * PS, 0, 0, 0);
  return r;
}
/* Is [p, p + n) one mapping, of the program's and in frames? */
static int one_mapping(uint64_t p, uint64_t n) {
  uint8_t a = attr[p];
  if (!(a & A_MAPPED) || (a & (A_FOREIGN | A_KEPT)) || is_native(p) || is_native(p + n - 1)) return 0;
  for (uint64_t i = 1; i < n; i++)
    if (attr[p + i] != a) return 0;
  return 1;
}
/* SY_CMD_MOVE; command thread, under mm_lock. */
static long move_pages(uint64_t p, uint64_t n, uint32_t to, uint32_t from, uint64_t most) {
  static word_t was[SY_CHUNK_PAGES];
  uint64_t k = 0, there = 0, away = 0;
  if (p >= SY_ARENA_PAGES || !n || n > SY_CHUNK_PAGES || n > SY_ARENA_PAGES - p) return -EINVAL;
  if (from == SY_NO_FRAME && p / SY_CHUNK_PAGES != (p + n - 1) / SY_CHUNK_PAGES) return -EINVAL;
  uint8_t a = attr[p];
  if (a == A_KEPT) return drop_kept_in(p, n), -EAGAIN; /* nobody's: its frames are free now */
  if (!one_mapping(p, n)) return -EPERM;
  long r = -EAGAIN;
  for (; k < n; k++) {
    word_t w = LOAD(chunks[(p + k) / SY_CHUNK_PAGES]) ? LOAD(pte[p + k]) : 0;
    if (w & SY_PTE_MLOCKED) {
      r = -EPERM;
      break;
    }
    if (from == SY_NO_FRAME ? !has_frame(w) && !untouched(w) : !has_frame(w) || w >> SY_PTE_PFN_SHIFT != from + k) break;
    if (!CAS(pte[p + k], &w, locked(w))) break;
    was[k] = w, there += (uint64_t)has_frame(w), away += (w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED;
  }
  if (k < n || n - there > most) return not_moved(p, k, was), k < n ? r : -ENODATA;
  r = SYS(__NR_madvise, VA(p), n * PS, MADV_DONTNEED, 0, 0);
  if (!r) {
    look_at_threads(0); /* who waits on a futex in the old frames: the words still name them */
    r = copy_to_frames(was, n, to);
  }
  if (!r) r = map_frames(p, to, n, kprot(a)); /* (refused before anything is unmapped: there are too many mappings) */
  if (r < 0) return not_moved(p, n, was), r;
  int order = n > 1 ? 64 - __builtin_clzll(n - 1) : 0;
  __atomic_fetch_add(&ctl->pages_mapped, n - there + away, __ATOMIC_RELAXED);
  __atomic_fetch_sub(&ctl->pages_swapped, away, __ATOMIC_RELAXED);
  post(SY_MSG_PAGE_MAPPED, p, to, n, order, 0, 0);
  for (uint64_t i = 0, m; i < n; i += m) {
    uint64_t pfn = was[i] >> SY_PTE_PFN_SHIFT;
    for (m = 1; i + m < n && has_frame(was[i]) && has_frame(was[i + m]) && was[i + m] >> SY_PTE_PFN_SHIFT == pfn + m;) m++;
    if (has_frame(was[i])) post(SY_MSG_PAGE_FREED, p + i, (uint32_t)pfn, m, 0, 0, 0);
  }
  for (uint64_t i = 0; i < n; i++) was[i] = ((word_t)(to + i) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | (kprot(a) != RW ? W_KPROT : 0);
  not_moved(p, n, was);
  return (long)there;
}

/* Pages [p, p + n), whose words are locked and were so, are mapped again where they have been, in pieces of 2^order: by entries of single pages (UFFDIO_CONTINUE knows
 * no others) except for what AGE has taken from sight. What the kernel has no memory for is a minor fault. */
static void map_pieces(uint64_t p, uint64_t n, int order, const word_t *was) {
  for (uint64_t i = 0, k; i < n; i += k) {
    int there = (was[i] & SY_PTE_STATE_MASK) == SY_PTE_PRESENT;
    for (k = 1; (i + k) >> order == i >> order && i + k < n && ((was[i + k] & SY_PTE_STATE_MASK) == SY_PTE_PRESENT) == there;) k++;
    struct uffdio_continue c = {.range = {VA(p + i), k * PS}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
    if (there) SYS(__NR_ioctl, fd_uffd, UFFDIO_CONTINUE, &c, 0, 0);
  }
}
/* SY_CMD_REMAP; command thread, under mm_lock. */
static long remap_block(uint64_t p, uint64_t n, uint32_t pfn, int order) {
  static word_t was[SY_CHUNK_PAGES];
  uint64_t k = 0, away = 0;
  if (n != SY_CHUNK_PAGES || p % n || p >= SY_ARENA_PAGES) return -EINVAL;
  if (!one_mapping(p, n)) return -EPERM;
  for (; k < n && LOAD(chunks[p / n]); k++) {
    word_t w = LOAD(pte[p + k]);
    if ((w & SY_PTE_MLOCKED) || !has_frame(w) || w >> SY_PTE_PFN_SHIFT != pfn + k || !CAS(pte[p + k], &w, locked(w))) break;
    was[k] = w, away += (w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED;
  }
  if (k < n) return not_moved(p, k, was), -EAGAIN;
  long r = SYS(__NR_madvise, VA(p), n * PS, MADV_DONTNEED, 0, 0);
  if (!r && order == SY_HUGE_ORDER) r = map_frames(p, pfn, n, kprot(attr[p]));
  if (r < 0) return not_moved(p, n, was), r;
  if (order == SY_HUGE_ORDER) {
    __atomic_fetch_add(&ctl->pages_mapped, away, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&ctl->pages_swapped, away, __ATOMIC_RELAXED);
    for (uint64_t i = 0; i < n; i++) was[i] = ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | (kprot(attr[p]) != RW ? W_KPROT : 0);
  } else
    map_pieces(p, n, order, was);
  not_moved(p, n, was);
  return (long)n;
}
