/* stub, part 4: pages that leave for the swap store, and come back.
 *
 * The gateway names what shall leave (EVICT). The page is taken away from the program, and its word becomes SWAPPED with HASFRAME: the frame
 * still holds the content, as in Linux's swap cache. Then the gateway stores it and, by compare-and-swap on that very word, puts the slot's
 * number there: only then is the frame free. Whoever touches the page before wins: the frame is mapped again, the gateway's
 * compare-and-swap fails, and the slot is dropped. So whatever dies at whatever moment, a word says where the content is. */

/* One range of a vector; by one call of the kernel's for all of them where it has that (6.16 flushes TLBs once for all). */
#define TAKE 128
static struct iovec take_vec[TAKE];
static long take_away(const struct iovec *v, uint64_t n) {
  static int no_vectors; /* command thread only */
  long r = 0, whole = 0;
  for (uint64_t i = 0; i < n; i++) whole += (long)v[i].iov_len;
  if (n > 1 && !no_vectors && !(no_vectors = SYS(__NR_process_madvise, -10001 /* PIDFD_SELF_THREAD_GROUP */, v, n, MADV_DONTNEED, 0) != whole)) return 0;
  for (uint64_t i = 0; i < n; i++) {
    long e = SYS(__NR_madvise, v[i].iov_base, v[i].iov_len, MADV_DONTNEED, 0, 0);
    if (e) r = e;
  }
  return r;
}
/* What has been locked is gone (SWAPPED, the frame has it still); or, where the kernel refused, may be there or not: a touch shows. */
static uint64_t taken_away(const struct iovec *v, uint64_t n, long failed) {
  uint64_t taken = 0;
  for (uint64_t i = 0; i < n; i++) {
    uint64_t p = PAGE(v[i].iov_base), k = v[i].iov_len / PS;
    word_t contended = 0;
    for (uint64_t j = p; j < p + k; j++) {
      word_t keep = LOAD(pte[j]) & ~(word_t)(SY_PTE_STATE_MASK | SY_PTE_CONTENDED | SY_PTE_HASFRAME);
      contended |= __atomic_exchange_n(&pte[j], keep | (failed ? SY_PTE_PRESENT : SY_PTE_SWAPPED | SY_PTE_HASFRAME | SY_PTE_STALE), __ATOMIC_SEQ_CST) & SY_PTE_CONTENDED;
    }
    if (contended) wake(p, k);
    taken += failed ? 0 : k;
  }
  __atomic_fetch_sub(&ctl->pages_mapped, taken, __ATOMIC_RELAXED);
  __atomic_fetch_add(&ctl->pages_swapped, taken, __ATOMIC_RELAXED);
  return taken;
}
/* Locks a page that is to leave. Not under mm_lock (held: 0) none that is just being locked into RAM, unmapped, kept or replaced by another mapping: who
 * does that looks at its attr first, and then at its word. */
static int lock_to_leave(uint64_t p, uint64_t pfn, int held) {
  if ((LOAD(pte[p]) & SY_PTE_MLOCKED) || !lock_present(p, pfn)) return 0;
  if (held || (!(LOAD(pte[p]) & SY_PTE_MLOCKED) && (attr[p] & (A_MAPPED | A_FOREIGN | A_KEPT)) == A_MAPPED)) return 1;
  return (int)taken_away(&(struct iovec){(void *)VA(p), PS}, 1, -1);
}
/* Command thread: runs [from, to) of mag->evict. Number of pages taken away. */
static long evict_for_store(uint32_t from, uint32_t to, int held) {
  uint64_t taken = 0, some = 0;
  for (; from != to; from++) {
    uint64_t p = mag->evict[from % SY_EVICT_RUNS].vpage, pfn = mag->evict[from % SY_EVICT_RUNS].pfn, n = mag->evict[from % SY_EVICT_RUNS].n;
    if (p >= SY_ARENA_PAGES || n > SY_ARENA_PAGES - p) continue;
    for (uint64_t i = 0, k; i < n; i += k ? k : 1) {
      for (k = 0; i + k < n && LOAD(chunks[(p + i + k) / SY_CHUNK_PAGES]) && lock_to_leave(p + i + k, pfn + i + k, held);) k++;
      if (!k) continue;
      take_vec[some++] = (struct iovec){(void *)VA(p + i), k * PS};
      if (some == TAKE) taken += taken_away(take_vec, some, take_away(take_vec, some)), some = 0;
    }
  }
  return (long)(taken + taken_away(take_vec, some, some ? take_away(take_vec, some) : 0));
}

/* Asks the gateway's store and waits. 0, or an errno; -1: there is no gateway any more. */
static int ask_store(uint32_t kind, int waiter, uint64_t vpage, uint32_t a, uint32_t b) {
  struct sy_request q = {.kind = kind, .order = (uint32_t)waiter, .vpage = vpage, .tids = {a, b}};
  uint32_t seq = LOAD(mag->store_seq[waiter]);
  if (LOAD(gateway_dead)) return -1;
  for (long r; (r = SYS(__NR_sendto, fd_sock, &q, sizeof q, MSG_NOSIGNAL | MSG_DONTWAIT, 0)) != sizeof q; nap(200))
    if (r != -EAGAIN && r != -EINTR) return STORE(gateway_dead, 1), -1;
  futex_wait((void *)&mag->store_seq[waiter], seq, SOON, 1);
  while (LOAD(mag->store_seq[waiter]) == seq) {
    if (waiter < SY_SERVICE_THREADS) leave_reading(waiter);
    futex_wait((void *)&mag->store_seq[waiter], seq, 50, 1);
    char b1;
    if (LOAD(mag->store_seq[waiter]) == seq && SYS(__NR_recvfrom, fd_sock, &b1, 1, MSG_DONTWAIT | MSG_PEEK, 0) == 0) return STORE(gateway_dead, 1), -1;
  }
  return (int)mag->store_error[waiter];
}

static void back_again(uint64_t p, uint32_t pfn, uint64_t n, int prot) {
  __atomic_fetch_add(&ctl->pages_mapped, n, __ATOMIC_RELAXED);
  __atomic_fetch_sub(&ctl->pages_swapped, n, __ATOMIC_RELAXED);
  for (uint64_t i = 0; i < n; i++) STORE(pte[p + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | (prot != RW ? W_KPROT : 0) | (LOAD(pte[p + i]) & SY_PTE_MLOCKED));
}

#define READ_AHEAD_ORDER 5
/* A block of at most that order from the magazine; of a bigger one the rest goes back. *got is its order. SY_NO_FRAME: it is empty. */
static uint32_t ready_frames(int me, int order, int *got) {
  for (int o = order; o >= 0; o--) {
    uint32_t pfn = mag_pop(me, o);
    if (pfn != SY_NO_FRAME) return *got = o, pfn;
  }
  for (int o = order + 1; o <= SY_HUGE_ORDER; o++) {
    uint32_t pfn = mag_pop(me, o);
    if (pfn == SY_NO_FRAME) continue;
    post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn + (1u << order), (1ull << o) - (1u << order), 0, 0, 1);
    STORE(ctl->in_hand_order[me], (uint32_t)order);
    return *got = order, pfn;
  }
  return SY_NO_FRAME;
}
/* The same, and when it is empty waits for more. SY_NO_FRAME: there is no gateway any more, or the wait was INTERRUPTED, also for want of any. */
static uint32_t some_frames(int me, uint64_t p, int order, int *got) {
  for (;;) {
    uint32_t pfn = ready_frames(me, order, got);
    if (pfn != SY_NO_FRAME || LOAD(gateway_dead) || __atomic_load_n(&ctl->fork_active, __ATOMIC_SEQ_CST)) return pfn;
    int r = refill(me, order, p);
    if (r == INTERRUPTED) return SY_NO_FRAME;
    if (!r) continue;
    if (order) order = 0;
    else return leave_reading(me), nap(1000), interrupted[me] = INTERRUPTED, SY_NO_FRAME;
  }
}
/* Pages of the pool, by ourselves: from the RAM file to the RAM file, as nothing may be mapped before it is there. 0, or an errno. */
static uint8_t packed[SY_HANDS][SY_PACKED_MAX + UNPACK_SLACK], unpacked[SY_HANDS][(PS << READ_AHEAD_ORDER) + UNPACK_SLACK];
static int in_pool(uint64_t slot) { return slot < hdr->slots && slots[slot].size < PS; }
static int fetch_packed(int me, const uint32_t *slot, uint64_t n, uint32_t pfn) {
  for (uint64_t i = 0; i < n; i++) {
    struct sy_stored s = slots[slot[i]];
    uint8_t *to = unpacked[me] + i * PS;
    if (!s.size) {
      memset(to, 0, PS);
      continue;
    }
    uint32_t nd = node_of(s.pfn), size = s.size < SY_PACKED_MAX ? s.size : SY_PACKED_MAX;
    if (SYS(__NR_pread64, fd_ram[nd], packed[me], size, (uint64_t)(s.pfn - node[nd].base) * PS + s.offset, 0) != size) return EIO;
    if (size == 8)
      for (uint64_t k = 0; k < PS; k += 8) __builtin_memcpy(to + k, packed[me], 8);
    else if (unpack(to, PS, packed[me], size) != (long)PS)
      return EIO;
  }
  uint32_t nd = node_of(pfn);
  return SYS(__NR_pwrite64, fd_ram[nd], unpacked[me], n * PS, (uint64_t)(pfn - node[nd].base) * PS, 0) == (long)(n * PS) ? 0 : EIO;
}
/* Slots that we have fetched from are the gateway's again; the pages are in frames from pfn on. */
static void slots_done(int me, uint64_t p, const uint32_t *slot, uint64_t n, uint32_t pfn) {
  for (uint64_t i = 0, k; i < n; i += k) {
    for (k = 1; i + k < n && slot[i + k] == slot[i] + k;) k++;
    post(SY_MSG_SLOT_FREED, p + i, pfn + (uint32_t)i, k, me == SY_SERVICE_THREADS, slot[i], 0);
  }
}
static int stored(uint64_t p, uint8_t a) {
  word_t w = LOAD(pte[p]);
  return attr[p] == a && (w & (SY_PTE_STATE_MASK | SY_PTE_HASFRAME)) == SY_PTE_SWAPPED;
}
/* How much to bring back at once: more for who walks upwards, who has as much before p as comes now (read-ahead doubles). */
static int read_ahead(uint64_t p, uint8_t a) {
  int order = 0;
  for (; order < READ_AHEAD_ORDER; order++) {
    uint64_t n = 2ull << order;
    if (p % n || p < n || !present(p - 1) || !present(p - n)) break;
    for (uint64_t i = p + n / 2; i < p + n; i++)
      if (!stored(i, a)) return order;
  }
  return order;
}

/* A touch of a page that was taken away and still is in its frame. Fault thread; its word is locked. */
static void map_again(int me, uint64_t p, word_t w, int prot) {
  uint32_t pfn = (uint32_t)(w >> SY_PTE_PFN_SHIFT);
  if (map_frames(p, pfn, 1, prot) < 0) {
    STORE(pte[p], w);
    leave_reading(me), nap(1000);
    return;
  }
  post(SY_MSG_PAGE_HINT, p, pfn, 1, 0, nodes > 1 ? cpu_of_toucher(me) : 0, 0);
  back_again(p, pfn, 1, prot);
}
/* Words of [p, p + n) that are locked go back to the store's slots that they name. */
static void store_again(uint64_t p, uint64_t n, word_t flags) {
  for (uint64_t i = p; i < p + n; i++) STORE(pte[i], (LOAD(pte[i]) & ~(word_t)(PS - 1)) | SY_PTE_SWAPPED | flags);
}
/* The pages of [p, p + 2^order), whose words are locked, into frames from pfn on, and mapped. 0; or an errno, or -1 without a gateway: the words are as
 * before. */
static int piece(int me, uint64_t p, const uint32_t *slot, int order, uint32_t pfn, int prot, word_t flags, int ours) {
  uint64_t n = 1ull << order;
  int e = ours ? fetch_packed(me, slot, n, pfn) : ask_store(SY_REQ_SWAPIN, me, p, (uint32_t)n, pfn);
  if (e) {
    post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn, n, 0, 0, 1);
    STORE(ctl->in_hand[me], SY_NO_FRAME);
    return e;
  }
  for (uint64_t i = 0; i < n; i++) STORE(pte[p + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_LOCKED | SY_PTE_HASFRAME | (flags & SY_PTE_MLOCKED));
  STORE(ctl->in_hand[me], SY_NO_FRAME);
  long r = map_frames(p, pfn, n, prot);
  post(SY_MSG_PAGE_MAPPED, p, pfn, n, order, 0, 0);
  if (ours) slots_done(me, p, slot, n, pfn);
  if (r < 0) { /* too many mappings: the content stays in the frames */
    for (uint64_t i = 0; i < n; i++) STORE(pte[p + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_SWAPPED | SY_PTE_HASFRAME | flags);
    leave_reading(me), nap(1000);
  } else
    back_again(p, pfn, n, prot);
  return 0;
}
#define ALIKE (SY_PTE_STALE | W_KPROT | SY_PTE_MLOCKED)
/* Page p, which is locked and was in slot[0], and those up to max pages from it on that are stored alike: locked, too. Number. */
static uint64_t lock_alike(uint64_t p, uint64_t max, uint32_t *slot, word_t flags, int ours) {
  uint64_t n = 1;
  for (uint8_t a = attr[p]; n < max && stored(p + n, a); n++) { /* (another thread may be at work there) */
    word_t x = LOAD(pte[p + n]);
    if ((x & ALIKE) != flags || (x & (SY_PTE_STATE_MASK | SY_PTE_HASFRAME)) != SY_PTE_SWAPPED || in_pool(x >> SY_PTE_PFN_SHIFT) != ours || !CAS(pte[p + n], &x, locked(x))) break;
    if (attr[p + n] != a) { /* its protection has just been changed: by who waits for the word now */
      store_again(p + n, 1, flags);
      wake(p + n, 1);
      break;
    }
    slot[n] = (uint32_t)(x >> SY_PTE_PFN_SHIFT);
  }
  return n;
}
/* A touch of a page that was taken away. Fault thread. */
static void swap_in(int me, uint64_t p, int write) {
  word_t w = LOAD(pte[p]);
  if ((w & SY_PTE_STATE_MASK) != SY_PTE_SWAPPED || !CAS(pte[p], &w, locked(w))) return wake(p, 1);
  uint8_t a = attr[p];
  int prot = kprot(a), got = 0;
  if (!may(a, write)) {
    if (IS_PARKED(a)) nap(20);
    else if (!(a & A_FOREIGN)) SYS(__NR_mprotect, VA(p), PS, prot, 0, 0), w |= W_KPROT;
    STORE(pte[p], w);
    return wake(p, 1);
  }
  if (w & SY_PTE_HASFRAME) {
    map_again(me, p, w, prot);
    return wake(p, 1);
  }
  word_t flags = w & ALIKE;
  static uint8_t alone[SY_SERVICE_THREADS]; /* after an error: for so many faults a page comes by itself, as only a neighbour may be unreadable */
  uint64_t most = alone[me] ? alone[me]--, 1 : 1ull << read_ahead(p, a);
  uint32_t slot[1 << READ_AHEAD_ORDER] = {(uint32_t)(w >> SY_PTE_PFN_SHIFT)};
  int ours = in_pool(slot[0]);
  uint64_t n = lock_alike(p, most, slot, flags, ours), done = 0;
  int e = 0;
  for (uint32_t pfn; done < n; done += 1ull << got) { /* in as many pieces as frames come in: one fault is dearer than some mappings */
    int order = 63 - __builtin_clzll(n - done);
    pfn = done ? ready_frames(me, order, &got) : some_frames(me, p, order, &got);
    if (pfn == SY_NO_FRAME || (e = piece(me, p + done, slot + done, got, pfn, prot, flags, ours))) break;
  }
  store_again(p + done, n - done, flags);
  /* the store cannot read it now: once more; without a gateway it waits, as content that is not here cannot be made up */
  if (e > 0) alone[me] = 64, leave_reading(me), nap(10000);
  if (done || e > 0) wake(p, n);
}

/* PREFETCH: stored pages of [p, p + n) come back before they are asked for, in what frames are ready; who touches one meanwhile waits for it. What
 * cannot be brought back stays for its own fault. Command thread, under mm_lock. Number. */
static long prefetch(uint64_t p, uint64_t n) {
  const int me = SY_SERVICE_THREADS;
  long back_now = 0;
  if (p >= SY_ARENA_PAGES || n > SY_ARENA_PAGES - p) return 0;
  for (uint64_t end = p + n, k; p < end; p += k) {
    k = 1;
    word_t w = LOAD(chunks[p / SY_CHUNK_PAGES]) ? LOAD(pte[p]) : 0;
    if (!may(attr[p], 0) || !stored(p, attr[p]) || (w & (SY_PTE_STATE_MASK | SY_PTE_HASFRAME)) != SY_PTE_SWAPPED || !CAS(pte[p], &w, locked(w))) continue;
    word_t flags = w & ALIKE;
    uint32_t slot[1 << READ_AHEAD_ORDER] = {(uint32_t)(w >> SY_PTE_PFN_SHIFT)}, pfn = 0;
    int ours = in_pool(slot[0]), got = 0, e = 0;
    uint64_t done = 0, max = end - p < 1 << READ_AHEAD_ORDER ? end - p : 1 << READ_AHEAD_ORDER;
    for (k = lock_alike(p, max, slot, flags, ours); done < k; done += 1ull << got) {
      pfn = ready_frames(me, 63 - __builtin_clzll(k - done), &got);
      if (pfn == SY_NO_FRAME || (e = piece(me, p + done, slot + done, got, pfn, kprot(attr[p]), flags, ours))) break;
    }
    store_again(p + done, k - done, flags);
    wake(p, k);
    back_now += (long)done;
    if (pfn == SY_NO_FRAME || e) break;
  }
  return back_now;
}

/* A page that still is in its frame, mapped again. 0, or -errno: it is not, or there are too many mappings. */
static long again(uint64_t p) {
  word_t w = LOAD(pte[p]);
  if ((w & SY_PTE_STATE_MASK) != SY_PTE_SWAPPED || !(w & SY_PTE_HASFRAME) || !CAS(pte[p], &w, locked(w))) return -EAGAIN; /* (the gateway was quicker: it is stored) */
  uint32_t pfn = (uint32_t)(w >> SY_PTE_PFN_SHIFT);
  long r = map_frames(p, pfn, 1, kprot(attr[p]));
  if (r < 0) return STORE(pte[p], w), wake(p, 1), r;
  back_again(p, pfn, 1, kprot(attr[p]));
  wake(p, 1);
  return 0;
}
/* Command thread, under mm_lock: is there something at p, or is it there now, without a wait for frames? */
static int back_now(uint64_t p) {
  if (p >= SY_ARENA_PAGES || is_native(p) || (attr[p] & A_FOREIGN)) return 1;
  if (!LOAD(chunks[p / SY_CHUNK_PAGES]) || !may(attr[p], 0)) return 0;
  if (again(p)) prefetch(p, 1);
  else post(SY_MSG_PAGE_HINT, p, (uint32_t)(LOAD(pte[p]) >> SY_PTE_PFN_SHIFT), 1, 0, 0, 0);
  int st = LOAD(pte[p]) & SY_PTE_STATE_MASK;
  return st == SY_PTE_PRESENT || st == SY_PTE_SHARED_RO || st == SY_PTE_NATIVE;
}

/* Command thread, under mm_lock, before it touches page p itself: it must not wait for a frame, as it is who makes room. A page for which none is ready
 * becomes the kernel's own; what may not be accessed is the kernel's to refuse. 0 or -errno. */
static long be_there(uint64_t p, int write) {
  if (mode != MANAGED || p >= SY_ARENA_PAGES || is_native(p) || !may(attr[p], write)) return 0;
  STORE(chunks[p / SY_CHUNK_PAGES], 1);
  for (int times = 0;; spin(&times)) {
    if (back_now(p) && !(write && is_shared(p))) return 0;
    word_t w = LOAD(pte[p]), as = w;
    int st = w & SY_PTE_STATE_MASK, prot = kprot(attr[p]), is_stored = st == SY_PTE_SWAPPED && !(w & SY_PTE_HASFRAME);
    long r = 0;
    if (is_stored) {
      if (ask_store(SY_REQ_FETCH, SY_SERVICE_THREADS, p, 1, 0)) return -EIO;
      r = sys_mmap(0, PS, RW, ANON, -1, 0);
      if (r < 0 && r > -4096) return r;
      memcpy((void *)r, (const void *)mag->fetched, PS);
    }
    if (st == SY_PTE_LOCKED || !CAS(pte[p], &as, locked(w))) { /* a fault thread is at work there */
      if (is_stored) SYS(__NR_munmap, r, PS, 0, 0, 0);
      continue;
    }
    if (is_stored) r = put_native(p, r, prot);
    else if (st == SY_PTE_NONE) r = sys_mmap(VA(p), PS, prot, ANON | MAP_FIXED, -1, 0);
    else if (st == SY_PTE_SHARED_RO) r = unshare(p, (uint32_t)(w >> SY_PTE_PFN_SHIFT), prot);
    else r = st == SY_PTE_SWAPPED ? -ENOMEM : -EAGAIN; /* in its frame, and the kernel has no room for its mapping; or it has just come */
    if (r < 0 && r > -4096) {
      word_unlock(p, w);
      if (r != -EAGAIN) return r;
      continue;
    }
    if (is_stored) __atomic_fetch_sub(&ctl->pages_swapped, 1, __ATOMIC_RELAXED), post(SY_MSG_SLOT_FREED, p, SY_NO_FRAME, 1, 0, w >> SY_PTE_PFN_SHIFT, 0);
    if (st != SY_PTE_SHARED_RO) __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
    word_unlock(p, SY_PTE_NATIVE | (w & SY_PTE_MLOCKED) | (prot != RW ? W_KPROT : 0));
    return 0;
  }
}
static long all_there(uintptr_t at, uint64_t n, int write) {
  long r = 0;
  for (uintptr_t a = at & ~(PS - 1); a < at + n && a >= (at & ~(PS - 1)) && !r; a += PS)
    if (IN_ARENA(a)) r = be_there(PAGE(a), write);
  return r;
}

/* Before a fork or a release copies: what is in the store, into memory of the kernel's own; page p at back + p * PS. What still is in
 * its frame is mapped again. Command thread; faults are left waiting, mm_lock is held. */
static char *back;
static int fetch_stored(uint64_t p) {
  uint64_t stored = 0;
  for (uint64_t i = 0; i < SY_FETCH_PAGES; i++) stored |= (uint64_t)((LOAD(pte[p + i]) & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED) << i;
  if (stored && ask_store(SY_REQ_FETCH, SY_SERVICE_THREADS, p, SY_FETCH_PAGES, 0)) return -1;
  for (uint64_t i = 0; i < SY_FETCH_PAGES; i++)
    if (stored >> i & 1) memcpy(back + (p + i) * PS, (const char *)mag->fetched + i * PS, PS);
  return 0;
}
static long bring_back(void *unused) {
  (void)unused;
  for (uint64_t c = 0; c < SY_CHUNKS; c++) {
    int some = 0;
    if (!LOAD(chunks[c])) continue;
    for (uint64_t p = c * SY_CHUNK_PAGES; p < (c + 1) * SY_CHUNK_PAGES; p++) {
      if ((LOAD(pte[p]) & SY_PTE_STATE_MASK) != SY_PTE_SWAPPED) continue;
      long r = again(p);
      if (r < 0 && r != -EAGAIN) return r;
      some |= r < 0;
    }
    if (!some) continue;
    if (!back) {
      long at = sys_mmap(0, SY_ARENA_SIZE, RW, ANON, -1, 0);
      if (at < 0 && at > -4096) return at;
      back = (char *)at;
    }
    for (uint64_t p = c * SY_CHUNK_PAGES; p < (c + 1) * SY_CHUNK_PAGES; p += SY_FETCH_PAGES)
      if (fetch_stored(p)) return -ENOMEM;
  }
  return 0;
}
static void back_done(void) {
  if (back) SYS(__NR_munmap, back, SY_ARENA_SIZE, 0, 0, 0);
  back = 0;
}
