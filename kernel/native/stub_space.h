/* stub, part 2: the address space — what Linux keeps in VMAs — and the memory calls on it. Everything here runs under mm_lock. */

static uint32_t node_of(uint32_t pfn) {
  uint32_t nd = 0;
  while (nd + 1 < nodes && pfn >= node[nd + 1].base) nd++;
  return nd;
}
/* The kernel shall do it. */
static long straight_on(long nr, const long *a) {
  return nr == __NR_mmap ? sys_mmap((uintptr_t)a[0], (size_t)a[1], (int)a[2], (int)a[3], (int)a[4], (uint64_t)a[5]) : SYS(nr, a[0], a[1], a[2], a[3], a[4]);
}
/* Frames [pfn, pfn + n) at p, in one step for whoever touches it. */
static long map_frames(uint64_t p, uint32_t pfn, uint64_t n, int prot) {
  uint32_t nd = node_of(pfn);
  long r = sys_mmap(VA(p), n * PS, prot, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd_ram[nd], (uint64_t)(pfn - node[nd].base) * PS);
  if (r < 0 && r > -4096) return r;
  uffd_register(p, n, UFFD_FRAME);
  return 0;
}
/* Pages that a forked child inherited are the kernel's own (see stub_fork.h). */
static int is_native(uint64_t p) { return p < SY_BRK_PAGES ? p < brk_floor : p < mmap_floor; }
static int kprot(uint8_t a) { return a & A_MAPPED ? A_PROT(a) : PROT_NONE; }

static word_t locked(word_t w) {
  return (w & ~(word_t)SY_PTE_STATE_MASK) | SY_PTE_LOCKED | ((w & SY_PTE_STATE_MASK) == SY_PTE_PRESENT || (w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO ? SY_PTE_HASFRAME : 0);
}
/* Once more around a wait for who has locked a word. Not only by yielding: a real-time thread may have taken that very CPU from him. */
static void spin(int *times) {
  if (++*times > 20) nap(50);
  else yield();
}
/* Locks a page's word; returns it as it was. */
static word_t word_lock(uint64_t p) {
  for (int times = 0;;) {
    word_t w = LOAD(pte[p]);
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_LOCKED) spin(&times);
    else if (CAS(pte[p], &w, locked(w))) return w;
  }
}
static int empty(word_t w) { return !(w & (SY_PTE_STATE_MASK | W_KPROT)); }
static int untouched(word_t w) { return empty(w) && !(w & SY_PTE_MLOCKED); }
/* Stores a word and wakes who came meanwhile. */
static long wake_request(void *arg) {
  uint64_t *a = arg;
  wake(a[0], a[1]);
  return 0;
}
static void word_unlock(uint64_t p, word_t w) {
  word_t old = __atomic_exchange_n(&pte[p], w & ~(word_t)(SY_PTE_CONTENDED | ((w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED ? 0 : SY_PTE_HASFRAME)), __ATOMIC_SEQ_CST);
  if (old & SY_PTE_CONTENDED) by_command_thread(wake_request, (uint64_t[]){p, 1});
}

/* Calls f for every maximal run of pages in [p, p + n) whose words are alike by key(); chunks never used count as word 0. */
static uint64_t next_used(uint64_t p, uint64_t end) {
  while (p < end && !LOAD(chunks[p / SY_CHUNK_PAGES])) p = (p / SY_CHUNK_PAGES + 1) * SY_CHUNK_PAGES;
  return p < end ? p : end;
}

/* Brings a piece of the arena back to its first state: nothing mapped, registered, plain read-write. PROT_NONE until registered, so
 * that no touch finds the kernel's zero page; or, where the program's threads may go on touching it, read-write at once: see
 * touched_meanwhile. */
static long restore_request(void *arg) {
  uint64_t *a = arg;
  long r = sys_mmap(VA(a[0]), a[1] * PS, a[2] ? RW : PROT_NONE, ANON | MAP_FIXED, -1, 0);
  if (r < 0 && r > -4096) return r;
  uffd_register(a[0], a[1], UFFDIO_REGISTER_MODE_MISSING);
  return a[2] ? 0 : SYS(__NR_mprotect, VA(a[0]), a[1] * PS, RW, 0, 0);
}
static long arena_restore(uint64_t p, uint64_t n) { return by_command_thread(restore_request, (uint64_t[]){p, n, 0}); }
/* After restore_request under threads that go on touching: found[i] & 1 where one did before the range was registered. That page is the
 * kernel's own. At most SY_CHUNK_PAGES. */
static uint8_t found[SY_CHUNK_PAGES]; /* under mm_lock */
static void touched_meanwhile(uint64_t p, uint64_t n) {
  memset(found, 0, n);
  SYS(__NR_mincore, VA(p), n * PS, found, 0, 0);
}

/* A range whose mapping is about to be replaced is parked: a first touch waits (it looks again and again) until it has been; what is
 * there can be touched until then. */
/* After a change of attr: until the faults that decided on the old one are through. */
static void wait_locked(uint64_t p, uint64_t n) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  int times = 0;
  for (uint64_t end = p + n, i = next_used(p, end); i < end; i = next_used(i + 1, end))
    while ((LOAD(pte[i]) & SY_PTE_STATE_MASK) == SY_PTE_LOCKED) spin(&times);
}
static void park(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n; i++)
    if (attr[i]) attr[i] |= A_KEPT;
  wait_locked(p, n);
}
static void unpark(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n; i++)
    if (IS_PARKED(attr[i])) attr[i] &= (uint8_t)~A_KEPT;
}

static long read_frame(uint32_t pfn, void *to) {
  uint32_t nd = node_of(pfn);
  return SYS(__NR_pread64, fd_ram[nd], to, PS, (uint64_t)(pfn - node[nd].base) * PS, 0) == (long)PS ? 0 : -EIO;
}
/* Page p of a private mapping that is registered, whose word is locked, becomes the program's own, in the kernel's memory, with that content. It need not be
 * writable: where there are too many mappings already, the kernel allows no other access to a part of one. 0 or -errno. */
static long own_copy(uint64_t p, const void *content) {
  struct uffdio_copy c;
  for (int tries = 0; tries < 1000; tries++) {
    SYS(__NR_madvise, VA(p), PS, MADV_DONTNEED, 0, 0);
    c = (struct uffdio_copy){.dst = VA(p), .src = (uintptr_t)content, .len = PS, .mode = UFFDIO_COPY_MODE_DONTWAKE};
    if (SYS(__NR_ioctl, fd_uffd, UFFDIO_COPY, &c, 0, 0) != -EEXIST) break; /* (a read was quicker) */
  }
  return c.copy == (int64_t)PS ? 0 : (long)c.copy;
}
/* Pages whose words are locked, and which cannot have another mapping, are zeros. */
static const uint8_t zeros[PS] __attribute__((aligned(4096)));
static long zero_request(void *arg) {
  uint64_t *a = arg;
  for (uint64_t p = a[0]; p < a[0] + a[1]; p++) own_copy(p, zeros); /* (of memory that is not a frame's the content has gone by then) */
  return 0;
}

/* Page `at`, which is nobody's, is put at p. 0 or -errno: nothing has changed, and it is gone. */
static long put_native(uint64_t p, long at, int prot) {
  long r = prot == RW ? 0 : SYS(__NR_mprotect, at, PS, prot, 0, 0);
  if (!r) r = SYS(__NR_mremap, at, PS, PS, MREMAP_MAYMOVE | MREMAP_FIXED, VA(p));
  if (r < 0 && r > -4096) return SYS(__NR_munmap, at, PS, 0, 0, 0), r;
  return 0;
}
/* A shared page, whose word is locked, becomes the program's own copy, in the kernel's memory. 0 or -errno: nothing has changed. */
static long make_native(uint64_t p, uint32_t pfn, int prot) {
  long at = sys_mmap(0, PS, RW, ANON, -1, 0);
  if (at < 0 && at > -4096) return at;
  if (read_frame(pfn, (void *)at)) return SYS(__NR_munmap, at, PS, 0, 0, 0), -EIO;
  return put_native(p, at, prot);
}
/* … and shares no longer. */
static long unshare(uint64_t p, uint32_t pfn, int prot) {
  long r = make_native(p, pfn, prot);
  if (r < 0) return r;
  post(SY_MSG_PAGE_FREED, p, pfn, 1, 0, 0, 0);
  __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
  return 0;
}

/* Takes the content of [p, p + n) away: frames go back to the gateway, the next touch finds zero. The kernel's mapping is emptied
 * but goes on naming the old offset; it is registered, so any touch comes to us, and the word alone says what happens.
 * new_prot: -1, or the kernel has another mapping there already, of that protection, and only the words are left. */
static void drop_content(uint64_t p, uint64_t n, int new_prot) {
  int mapped_over = new_prot >= 0;
  __atomic_thread_fence(__ATOMIC_SEQ_CST); /* attr before words: a fault thread locks the word first, then reads attr again */
  for (uint64_t end = p + n, i = next_used(p, end); i < end; i = next_used(i, end)) {
    if (untouched(LOAD(pte[i]))) {
      i++;
      continue;
    }
    word_t w = word_lock(i);
    int st = w & SY_PTE_STATE_MASK;
    if (st == SY_PTE_NONE) {
      /* (a stray touch of a free page took its access away, and may have done so just now) */
      if (w & W_KPROT) SYS(__NR_mprotect, VA(i), PS, mapped_over ? new_prot : RW, 0, 0);
      word_unlock(i, w & ~(word_t)(W_KPROT | SY_PTE_MLOCKED));
      i++;
      continue;
    }
    /* the run of pages in the same state, with frames that follow one another */
    uint64_t k = 1;
    while (i + k < end && (i + k) % SY_CHUNK_PAGES != 0) {
      word_t x = LOAD(pte[i + k]);
      if ((int)(x & SY_PTE_STATE_MASK) != st) break;
      if (st != SY_PTE_NATIVE && (x >> SY_PTE_PFN_SHIFT) != (w >> SY_PTE_PFN_SHIFT) + k) break;
      if ((x ^ w) & (W_KPROT | SY_PTE_FORKED | (st == SY_PTE_SWAPPED ? SY_PTE_HASFRAME : 0))) break;
      if (!CAS(pte[i + k], &x, locked(x))) break;
      k++;
    }
    if (st == SY_PTE_NATIVE || (st == SY_PTE_SHARED_RO && !(w & SY_PTE_FORKED))) {
      uint64_t still = 0;
      memset(found, 0, k);
      if (!mapped_over) {
        if (by_command_thread(restore_request, (uint64_t[]){i, k, attr[i] != 0}) < 0) { /* no memory for another mapping: it stays the kernel's */
          by_command_thread(zero_request, (uint64_t[]){i, k});
          memset(found, 1, k);
        } else
          touched_meanwhile(i, k);
      }
      for (uint64_t j = 0; j < k; j++) {
        int prot = kprot(attr[i + j]), odd = (found[j] & 1) && prot != RW;
        if (odd) SYS(__NR_mprotect, VA(i + j), PS, prot, 0, 0);
        word_unlock(i + j, found[j] & 1 ? SY_PTE_NATIVE | (odd ? W_KPROT : 0) : SY_PTE_NONE);
        still += found[j] & 1;
      }
      if (st == SY_PTE_NATIVE) __atomic_fetch_sub(&ctl->pages_native, k - still, __ATOMIC_RELAXED);
      else __atomic_fetch_add(&ctl->pages_native, still, __ATOMIC_RELAXED), post(SY_MSG_PAGE_FREED, i, (uint32_t)(w >> SY_PTE_PFN_SHIFT), k, 0, 0, 0);
    } else if (st == SY_PTE_SWAPPED) { /* nothing is mapped */
      if ((w & W_KPROT) && !mapped_over) SYS(__NR_mprotect, VA(i), k * PS, RW, 0, 0);
      for (uint64_t j = 0; j < k; j++) word_unlock(i + j, SY_PTE_NONE | (mapped_over ? 0 : SY_PTE_STALE));
      __atomic_fetch_sub(&ctl->pages_swapped, k, __ATOMIC_RELAXED);
      if (w & SY_PTE_HASFRAME) post(SY_MSG_PAGE_FREED, i, (uint32_t)(w >> SY_PTE_PFN_SHIFT), k, 0, 0, 0);
      else post(SY_MSG_SLOT_FREED, i, SY_NO_FRAME, k, 0, w >> SY_PTE_PFN_SHIFT, 0);
    } else {
      if ((w & W_KPROT) && !mapped_over) SYS(__NR_mprotect, VA(i), k * PS, RW, 0, 0);
      /* EINVAL: the program locked it (mlockall of its own) */
      if (!mapped_over && SYS(__NR_madvise, VA(i), k * PS, MADV_DONTNEED, 0, 0) == -EINVAL) SYS(__NR_madvise, VA(i), k * PS, 24 /* MADV_DONTNEED_LOCKED */, 0, 0);
      for (uint64_t j = 0; j < k; j++) word_unlock(i + j, SY_PTE_NONE | (mapped_over ? 0 : SY_PTE_STALE));
      if (st == SY_PTE_PRESENT) __atomic_fetch_sub(&ctl->pages_mapped, k, __ATOMIC_RELAXED);
      post(SY_MSG_PAGE_FREED, i, (uint32_t)(w >> SY_PTE_PFN_SHIFT), k, 0, 0, 0);
    }
    i += k;
  }
}
static void evict(uint64_t p, uint64_t n) { drop_content(p, n, -1); }

/* After attr of [p, p + n) has changed: waits out faults that decided on the old attr, and makes the kernel's protection fit. */
static long set_kernel_prot(uint64_t p, uint64_t n, int prot) {
  long bad = 0;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  for (uint64_t end = p + n, i = next_used(p, end); i < end; i = next_used(i, end)) {
    if (untouched(LOAD(pte[i]))) {
      i++;
      continue;
    }
    word_t w = word_lock(i);
    int st = w & SY_PTE_STATE_MASK;
    int want = st == SY_PTE_NONE || st == SY_PTE_SWAPPED ? RW : prot; /* (what comes back is mapped with the protection that it has then) */
    uint64_t k = 1;
    int odd = (w & W_KPROT) != 0; /* anything that has to be done at all? */
    while (i + k < end && (i + k) % SY_CHUNK_PAGES != 0) {
      word_t x = LOAD(pte[i + k]);
      if ((int)(x & SY_PTE_STATE_MASK) != st) break;
      if (!CAS(pte[i + k], &x, locked(x))) break;
      odd |= (x & W_KPROT) != 0;
      k++;
    }
    if (want != RW || odd) {
      long r = SYS(__NR_mprotect, VA(i), k * PS, want, 0, 0);
      if (r < 0) bad = r;
    }
    for (uint64_t j = 0; j < k; j++) {
      word_t x = LOAD(pte[i + j]);
      word_t back = (x & ~(word_t)(SY_PTE_STATE_MASK | W_KPROT)) | (word_t)st | (want != RW ? W_KPROT : 0);
      word_unlock(i + j, back);
    }
    i += k;
  }
  return bad;
}

/* MADV_HUGEPAGE or MADV_NOHUGEPAGE for [p, p + n), or neither (0), as where it is mapped anew. A part of a chunk stays as the rest of it was, but
 * for NOHUGEPAGE, which a single page may ask for. */
static void advise(uint64_t p, uint64_t n, uint8_t is) {
  uint64_t first = (p + SY_CHUNK_PAGES - 1) / SY_CHUNK_PAGES, end = (p + n) / SY_CHUNK_PAGES;
  if (is == SY_ADVICE_SMALL) first = p / SY_CHUNK_PAGES, end = (p + n - 1) / SY_CHUNK_PAGES + 1;
  for (uint64_t c = first; c < end; c++)
    if ((advice[c] & ~SY_ADVICE_MERGE) != is) advice[c] = is | (advice[c] & SY_ADVICE_MERGE);
}
/* MADV_MERGEABLE. What is no longer so is known by page: the chunk only says where to look. */
static void merge_here(uint64_t p, uint64_t n) {
  some_mergeable = 1;
  bits(mergeable, p, n, SET);
  for (uint64_t c = p / SY_CHUNK_PAGES; c <= (p + n - 1) / SY_CHUNK_PAGES; c++)
    if (!(advice[c] & SY_ADVICE_MERGE)) advice[c] |= SY_ADVICE_MERGE;
}
static int all_free(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n; i++)
    if (attr[i]) return 0;
  return 1;
}
static int all_mapped(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n; i++)
    if (!(attr[i] & A_MAPPED)) return 0;
  return 1;
}

/* ---------------------------------------------------------------- choosing addresses */
static void hole_add(uint64_t p, uint64_t n) {
  if (p < mmap_floor || p < SY_BRK_PAGES) return;
  if (p + n == mmap_next) { /* the top: give it back, with every hole that now touches it */
    mmap_next = p;
    for (int again = 1; again;) {
      again = 0;
      for (unsigned i = 0; i < sizeof hole / sizeof *hole; i++)
        if (hole[i].n && hole[i].p + hole[i].n == mmap_next) mmap_next = hole[i].p, hole[i].n = 0, again = 1;
    }
    return;
  }
  unsigned least = 0;
  for (unsigned i = 0; i < sizeof hole / sizeof *hole; i++) {
    if (hole[i].n && hole[i].p + hole[i].n == p) {
      uint64_t q = hole[i].p, m = hole[i].n + n;
      hole[i].n = 0;
      hole_add(q, m);
      return;
    }
    if (hole[i].n && p + n == hole[i].p) {
      uint64_t m = hole[i].n + n;
      hole[i].n = 0;
      hole_add(p, m);
      return;
    }
    if (hole[i].n < hole[least].n) least = i;
  }
  if (n > hole[least].n) hole[least].p = p, hole[least].n = n; /* what is forgotten is found again by the last resort below */
}
/* [p, p + n) is no longer free. */
static void hole_cut(uint64_t p, uint64_t n) {
  for (unsigned i = 0; i < sizeof hole / sizeof *hole; i++) {
    if (!hole[i].n || hole[i].p >= p + n || p >= hole[i].p + hole[i].n) continue;
    uint64_t h = hole[i].p, e = hole[i].p + hole[i].n;
    hole[i].n = 0;
    if (e > p + n) hole_add(p + n, e - (p + n));
    if (h < p) hole_add(h, p - h);
  }
}
static uint64_t round_to(uint64_t x, uint64_t a) { return (x + a - 1) & ~(a - 1); }
/* Finds n free pages; 0 = none (page 0 of the arena is never handed out by mmap). Large pieces are aligned, so that blocks fit. */
static uint64_t find(uint64_t n) {
  uint64_t align = n >= 512 ? 512 : n >= 16 ? 16 : 1;
  for (unsigned i = 0; i < sizeof hole / sizeof *hole; i++) {
    uint64_t p = round_to(hole[i].p, align), end = hole[i].p + hole[i].n;
    if (!hole[i].n || p + n > end) continue;
    uint64_t q = hole[i].p;
    hole[i].n = 0;
    if (!all_free(p, n)) continue; /* the program mapped there by MAP_FIXED */
    if (p > q) hole_add(q, p - q);
    if (p + n < end) hole_add(p + n, end - p - n);
    return p;
  }
  for (uint64_t p = round_to(mmap_next, align); p + n <= SY_ARENA_PAGES;) {
    uint64_t i = p;
    while (i < p + n && !attr[i]) i++;
    if (i < p + n) { p = round_to(i + 1, align); continue; }
    if (p > mmap_next) { uint64_t q = mmap_next; mmap_next = p + n; hole_add(q, p - q); }
    mmap_next = p + n;
    return p;
  }
  uint64_t from = mmap_floor > SY_BRK_PAGES ? mmap_floor : SY_BRK_PAGES; /* last resort: look at every page */
  for (uint64_t p = round_to(from, align), i = p; p + n <= SY_ARENA_PAGES; p = round_to(i + 1, align)) {
    for (i = p; i < p + n && !attr[i]; i++) {
    }
    if (i == p + n) return p;
  }
  return 0;
}

/* Marks [p, p + n) mapped; the range was free. From here on a fault nearby may fill it too, as part of its block. */
static void claim(uint64_t p, uint64_t n, uint8_t a) {
  memset(attr + p, a, n);
  if (p >= SY_BRK_PAGES) {
    if (p + n > mmap_hi) mmap_hi = p + n, ctl->mmap_hi = mmap_hi;
    if (p + n > mmap_next && p <= mmap_next) mmap_next = p + n;
  } else if (p + n > brk_hi)
    brk_hi = p + n;
  if (merge_all) merge_here(p, n);
  post(SY_MSG_MM_MMAP, p, 0, n, 0, A_PROT(a), 0);
}
static void map_pages(uint64_t p, uint64_t n, uint8_t a) {
  claim(p, n, a);
  set_kernel_prot(p, n, A_PROT(a)); /* a stray touch may have left a page without access */
}

/* ---------------------------------------------------------------- kept pieces
 * Programs map and unmap pieces of one size again and again (malloc around its mmap threshold). A small piece that is unmapped keeps its
 * frames and its page-table entries for a while, without access (a stray touch is SIGSEGV, as it must be); the next mmap of about
 * that size makes it accessible and zeroes what was there: no fault, no message, no frame that travels. */
static void forget_kept(unsigned i) {
  kept_pages -= kept[i].n;
  for (kept_count--; i < kept_count; i++) kept[i] = kept[i + 1];
}
/* Gives up piece i: its frames go back. */
static void drop_kept(unsigned i) {
  uint64_t p = kept[i].p, n = kept[i].n;
  forget_kept(i);
  memset(attr + p, 0, n);
  SYS(__NR_mprotect, VA(p), n * PS, RW, 0, 0);
  evict(p, n);
  hole_add(p, n);
}
static void drop_kept_in(uint64_t p, uint64_t n) {
  for (unsigned i = 0; i < kept_count;)
    if (kept[i].p < p + n && p < kept[i].p + kept[i].n) drop_kept(i);
    else i++;
}
static int keep(uint64_t p, uint64_t n) {
  int some = 0;
  if (n > KEEP_PAGES || p < SY_BRK_PAGES) return 0;
  for (uint64_t i = p; i < p + n; i++)
    if (attr[i] != A_OF(RW)) return 0;
  for (uint64_t end = p + n, i = next_used(p, end); i < end; i = next_used(i + 1, end)) {
    word_t w = LOAD(pte[i]);
    if ((w & SY_PTE_MLOCKED) || (w & SY_PTE_STATE_MASK) == SY_PTE_SWAPPED || (w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO) return 0;
    some |= (w & SY_PTE_STATE_MASK) == SY_PTE_PRESENT;
  }
  if (!some) return 0; /* nothing in it: unmapping costs nothing */
  while (kept_count == sizeof kept / sizeof *kept || kept_pages + n > KEEP_TOTAL) drop_kept(0);
  memset(attr + p, A_KEPT, n);
  wait_locked(p, n);
  if (SYS(__NR_mprotect, VA(p), n * PS, PROT_NONE, 0, 0) < 0) {
    memset(attr + p, A_OF(RW), n);
    return 0;
  }
  uncharge(p, n);
  post(SY_MSG_MM_MUNMAP, p, 0, n, 0, 0, 0);
  for (unsigned i = 0; i < kept_count;) { /* one piece with its neighbours */
    uint64_t q = kept[i].p, m = kept[i].n;
    if (q + m != p && p + n != q) {
      i++;
      continue;
    }
    forget_kept(i);
    p = q < p ? q : p, n += m;
  }
  kept[kept_count].p = p, kept[kept_count++].n = n;
  kept_pages += n;
  return 1;
}
/* The first n pages of the smallest kept piece that has them, accessible and zero; 0 = none. What is left of the piece stays kept. */
static uint64_t reuse(uint64_t n) {
  unsigned best = kept_count;
  for (unsigned i = 0; i < kept_count; i++)
    if (kept[i].n >= n && (best == kept_count || kept[i].n <= kept[best].n)) best = i;
  if (best < kept_count) {
    uint64_t p = kept[best].p;
    if (SYS(__NR_mprotect, VA(p), n * PS, RW, 0, 0) < 0) return 0;
    if (kept[best].n == n)
      forget_kept(best);
    else
      kept[best].p += n, kept[best].n -= n, kept_pages -= n;
    for (uint64_t end = p + n, q = next_used(p, end); q < end; q = next_used(q, end)) {
      uint64_t k = 0;
      for (int st, times = 0; q + k < end; k++) {
        while ((st = (int)(LOAD(pte[q + k]) & SY_PTE_STATE_MASK)) == SY_PTE_LOCKED) spin(&times); /* a fault thread gives back its neighbours */
        if (st == SY_PTE_SWAPPED) evict(q + k, 1);
        if (st != SY_PTE_PRESENT && st != SY_PTE_NATIVE) break;
      }
      if (k) memset((void *)VA(q), 0, k * PS);
      q += k ? k : 1;
    }
    return p;
  }
  return 0;
}
static void unmap_pages(uint64_t p, uint64_t n) {
  drop_kept_in(p, n);
  uncharge(p, n);
  for (uint64_t i = p; i < p + n;) {
    uint64_t k = 1;
    uint8_t a = attr[i];
    while (i + k < p + n && (attr[i + k] & A_FOREIGN) == (a & A_FOREIGN) && !attr[i + k] == !a) k++;
    if (a) {
      memset(attr + i, 0, k);
      __atomic_thread_fence(__ATOMIC_SEQ_CST);
      if (a & A_FOREIGN)
        arena_restore(i, k);
      else
        evict(i, k);
      advise(i, k, 0);
      hole_add(i, k);
      post(SY_MSG_MM_MUNMAP, i, 0, k, 0, 0, 0);
    }
    i += k;
  }
}

/* Whatever is mapped in [p, p + n) becomes anonymous memory mapped as a says, without content. Another thread that touches it finds what
 * was there or zeros, at no moment nothing. a may be parked. */
static long replace_pages(uint64_t p, uint64_t n, uint8_t a) {
  for (uint64_t i = p; i < p + n;) {
    uint64_t k = 1;
    uint8_t was = attr[i];
    while (i + k < p + n && (attr[i + k] & A_FOREIGN) == (was & A_FOREIGN) && !attr[i + k] == !was) k++;
    if (was & A_FOREIGN) {
      park(i, k);
      long r = by_command_thread(restore_request, (uint64_t[]){i, k, 1});
      if (r < 0 && r > -4096) return unpark(i, k), r;
      for (uint64_t j = i, m; j < i + k; j += m) {
        m = SY_CHUNK_PAGES - j % SY_CHUNK_PAGES;
        if (m > i + k - j) m = i + k - j;
        touched_meanwhile(j, m);
        for (uint64_t x = 0; x < m; x++) {
          if (!(found[x] & 1)) continue;
          STORE(chunks[j / SY_CHUNK_PAGES], 1);
          word_unlock(j + x, (word_lock(j + x), SY_PTE_NATIVE));
          __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
        }
      }
    }
    memset(attr + i, a, k);
    if (!(was & A_FOREIGN)) evict(i, k);
    if (was) post(SY_MSG_MM_MUNMAP, i, 0, k, 0, 0, 0);
    i += k;
  }
  return 0;
}

/* ---------------------------------------------------------------- the calls */
/* What the call at hand is to fill with pages once mm_lock is free again: who waits for frames under it waits for ever, since what is to leave
 * for them leaves under it. Under mm_lock. */
struct fill { uint64_t p, end; int advice; }; /* advice 0: as each page may be accessed; UNMERGEABLE: so, those that are shared; p == end: nothing */
static struct fill fill;
static void fill_later(uint64_t p, uint64_t n, int advice) {
  if (fill.p == fill.end) fill.p = p;
  fill.end = p + n, fill.advice = advice;
}
static struct fill to_fill(void) {
  struct fill f = fill;
  fill = (struct fill){0, 0, 0};
  return f;
}
static int is_shared(uint64_t p) { return LOAD(chunks[p / SY_CHUNK_PAGES]) && (LOAD(pte[p]) & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO; }
/* Not under mm_lock. By the kernel's hand, not by a touch of ours: what is unmapped meanwhile is an error and no signal. */
static long fill_now(struct fill f) {
  long r = 0;
  while (f.p < f.end && !r) {
    uint64_t k = 1;
    lock();
    if (mode != MANAGED) return unlock(), r;
    uint8_t a = attr[f.p];
    int unmerge = f.advice == MADV_UNMERGEABLE, some = !unmerge || is_shared(f.p);
    while (f.p + k < f.end && attr[f.p + k] == a && is_native(f.p + k) == is_native(f.p) && (!unmerge || is_shared(f.p + k) == some)) k++;
    int how = !some ? 0 : f.advice && !unmerge ? f.advice : A_PROT(a) & PROT_WRITE ? MADV_POPULATE_WRITE : A_PROT(a) & PROT_READ ? MADV_POPULATE_READ : 0;
    if (is_native(f.p) || !(a & A_MAPPED) || (a & A_FOREIGN)) how = 0;
    unlock();
    if (how) r = SYS(__NR_madvise, VA(f.p), k * PS, how, 0, 0);
    f.p += k;
  }
  return r;
}

/* A mapping that the kernel refused to put over the parked [p, p + n): it may have unmapped the range first. */
static void not_replaced(uint64_t p, uint64_t n) {
  if (SYS(__NR_madvise, VA(p), n * PS, MADV_NORMAL, 0, 0) == 0) return unpark(p, n);
  drop_content(p, n, RW);
  memset(attr + p, 0, n);
  uncharge(p, n);
  arena_restore(p, n);
  hole_cut(p, n); /* part of it may have been one */
  hole_add(p, n);
}
/* A mapping of the program's own (a file, shared memory, code) put into the arena by MAP_FIXED. */
static long map_foreign(uint64_t p, uint64_t n, long *a) {
  park(p, n);
  long r = straight_on(__NR_mmap, a);
  if (r < 0 && r > -4096) return not_replaced(p, n), r;
  drop_content(p, n, (int)a[2]);
  uncharge(p, n);
  hole_cut(p, n);
  post(SY_MSG_MM_MUNMAP, p, 0, n, 0, 0, 0);
  memset(attr + p, A_OF(a[2]) | A_FOREIGN, n);
  if (p >= SY_BRK_PAGES && p + n > mmap_hi) mmap_hi = p + n, ctl->mmap_hi = mmap_hi;
  return r;
}

static int eligible(long prot, long flags) {
  return (flags & 0xf) == MAP_PRIVATE && (flags & MAP_ANONYMOUS) && !(flags & (MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB | 0x40 /* MAP_32BIT */)) &&
         !(prot & ~(long)RW);
}

static long do_mmap(long *a) {
  uintptr_t addr = (uintptr_t)a[0];
  uint64_t n = UP(a[1]) / PS;
  long prot = a[2], flags = a[3] & 0xffffffff;
  int fixed = (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) != 0;
  uint64_t p;
  uint64_t counts = (flags & 0xf) == MAP_PRIVATE && (flags & MAP_ANONYMOUS) && (prot & PROT_WRITE) && !(flags & MAP_NORESERVE) ? n : 0;
  if (fixed) {
    p = PAGE(addr);
    if (addr % PS) return -EINVAL;
    if (!a[1] || (uint64_t)a[1] > SY_ARENA_SIZE || p + n > SY_ARENA_PAGES) return a[1] ? -ENOMEM : -EINVAL;
    for (uint64_t k = 0; k < n && counts; k++) counts -= is_native(p + k) != 0;
    if (!(flags & MAP_FIXED_NOREPLACE) && too_much(counts, bits(charged, p, n, LOOK))) return -ENOMEM;
    for (uint64_t k = 1; k < n; k++) /* begins in what a forked child inherited and ends in managed memory, or the other way round */
      if (is_native(p + k) != is_native(p)) {
        if ((flags & MAP_FIXED_NOREPLACE) && !all_free(p, n)) return -EEXIST;
        long r = do_mmap((long[]){a[0], (long)(k * PS), prot, flags, a[4], a[5]});
        if (r < 0 && r > -4096) return r;
        long r2 = do_mmap((long[]){(long)VA(p + k), a[1] - (long)(k * PS), prot, flags, a[4], flags & MAP_ANONYMOUS ? 0 : a[5] + (long)(k * PS)});
        return r2 < 0 && r2 > -4096 ? r2 : r;
      }
    if (is_native(p)) {
      long r = sys_mmap(addr, (size_t)a[1], (int)prot, (int)flags, (int)a[4], (uint64_t)a[5]);
      if (r == (long)addr) memset(attr + p, A_OF(prot), n);
      return r;
    }
    drop_kept_in(p, n);
    if ((flags & MAP_FIXED_NOREPLACE) && !all_free(p, n)) return -EEXIST;
    if ((flags & MAP_FIXED_NOREPLACE) && too_much(counts, 0)) return -ENOMEM;
    if ((flags & 0xf) != MAP_PRIVATE || !(flags & MAP_ANONYMOUS) || (flags & MAP_HUGETLB)) return map_foreign(p, n, (long[]){a[0], a[1], prot, (flags & ~(long)MAP_FIXED_NOREPLACE) | MAP_FIXED, a[4], a[5]});
    long r = replace_pages(p, n, A_OF(prot));
    if (r < 0) return r;
    hole_cut(p, n);
  } else {
    if (!a[1]) return -EINVAL;
    if (too_much(counts, 0)) return -ENOMEM;
    if (!addr && prot == RW && n <= KEEP_PAGES && (p = reuse(n))) {
      claim(p, n, A_OF(RW));
      charge_new(p, n, prot, flags);
      if (flags & (MAP_POPULATE | MAP_LOCKED)) fill_later(p, n, 0);
      return (long)VA(p);
    }
    int hint = addr && IN_ARENA(addr) && addr % PS == 0 && PAGE(addr) >= SY_BRK_PAGES && !is_native(PAGE(addr)) && PAGE(addr) + n <= SY_ARENA_PAGES;
    if (hint) drop_kept_in(PAGE(addr), n); /* free, to the program */
    p = hint && all_free(PAGE(addr), n) ? PAGE(addr) : find(n);
    if (!p) return sys_mmap(addr, (size_t)a[1], (int)prot, (int)flags, -1, 0); /* the arena is full: natively */
  }
  map_pages(p, n, A_OF(prot));
  charge_new(p, n, prot, flags);
  if (flags & (MAP_POPULATE | MAP_LOCKED)) fill_later(p, n, 0);
  return (long)VA(p);
}

static long do_munmap(uintptr_t addr, uint64_t size) {
  if (addr % PS || !size) return -EINVAL;
  uint64_t p = PAGE(addr), n = UP(size) / PS;
  if (p + n > SY_ARENA_PAGES) return -EINVAL;
  while (n && is_native(p)) { /* what a forked child inherited */
    uint64_t k = 1;
    while (k < n && is_native(p + k)) k++;
    long r = SYS(__NR_munmap, VA(p), k * PS, 0, 0, 0);
    if (r) return r;
    memset(attr + p, 0, k);
    uncharge(p, k);
    p += k, n -= k;
  }
  for (unsigned i = 0; i < kept_count; i++)
    if (p >= kept[i].p && p + n <= kept[i].p + kept[i].n) return 0; /* unmapped already */
  if (n && !keep(p, n)) unmap_pages(p, n);
  return 0;
}

/* Made unwritable: what was never touched need not be kept. */
static void uncharge_untouched(uint64_t p, uint64_t n) {
  uint64_t from = p;
  for (uint64_t end = p + n, i = next_used(p, end); i < end; i = next_used(i + 1, end)) {
    if (untouched(LOAD(pte[i]))) continue;
    committed -= bits(charged, from, i - from, CLEAR);
    from = i + 1;
  }
  committed -= bits(charged, from, p + n - from, CLEAR);
}
static void set_prot(uint64_t p, uint64_t n, int prot) {
  for (uint64_t i = p; i < p + n; i++) attr[i] = (uint8_t)((attr[i] & ~(7 << 1)) | ((prot & 7) << 1));
}
static long do_mprotect(uintptr_t addr, uint64_t size, int prot, long nr, int pkey) {
  if (addr % PS) return -EINVAL;
  uint64_t p = PAGE(addr), n = UP(size) / PS;
  if (!n) return 0;
  if (p + n > SY_ARENA_PAGES) return -ENOMEM;
  if (is_native(p)) return SYS(nr, addr, size, prot, pkey, 0);
  prot &= ~8; /* PROT_SEM means nothing on this machine */
  if (prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC)) return -EINVAL; /* GROWSDOWN: not on anonymous mappings like these */
  if (!all_mapped(p, n)) return -ENOMEM;
  for (uint64_t i = p; i < p + n;) {
    uint64_t k = 1;
    while (i + k < p + n && (attr[i + k] & A_FOREIGN) == (attr[i] & A_FOREIGN)) k++;
    int foreign = attr[i] & A_FOREIGN;
    if (!foreign && (prot & PROT_WRITE)) {
      uint64_t exempt = some_noreserve ? bits(noreserve, i, k, LOOK) : 0;
      if (too_much(k - exempt, bits(charged, i, k, LOOK))) return -ENOMEM;
      if (!exempt) charge(i, k);
      else
        for (uint64_t j = i; j < i + k; j++)
          if (!bits(noreserve, j, 1, LOOK)) charge(j, 1);
    }
    set_prot(i, k, prot);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    long r = foreign ? SYS(__NR_mprotect, VA(i), k * PS, prot, 0, 0) : set_kernel_prot(i, k, prot);
    if (r) return r;
    if (!foreign && !(prot & PROT_WRITE)) uncharge_untouched(i, k);
    i += k;
  }
  return 0;
}

static long do_madvise(uintptr_t addr, uint64_t size, int how) {
  if (addr % PS) return -EINVAL;
  uint64_t p = PAGE(addr), n = UP(size) / PS;
  if (!n) return SYS(__NR_madvise, addr, 0, how, 0, 0); /* is there such advice? */
  if (p + n > SY_ARENA_PAGES) return -ENOMEM;
  if (is_native(p) || (attr[p] & A_FOREIGN)) return SYS(__NR_madvise, addr, size, how, 0, 0);
  long r = all_mapped(p, n) ? 0 : -ENOMEM; /* as Linux: done for what is mapped, and said */
  uint8_t set = 0, clear = 0;
  switch (how) {
  case MADV_DONTNEED:
  case MADV_FREE:
    for (uint64_t i = next_used(p, p + n); i < p + n; i = next_used(i + 1, p + n))
      if (LOAD(pte[i]) & SY_PTE_MLOCKED) return -EINVAL;
    __attribute__((fallthrough));
  case 24: /* DONTNEED_LOCKED */
    for (uint64_t i = p; i < p + n;) {
      uint64_t k = 0;
      while (i + k < p + n && (attr[i + k] & A_MAPPED) && !(attr[i + k] & A_FOREIGN)) k++;
      if (k) evict(i, k);
      i += k ? k : 1;
    }
    break;
  case MADV_REMOVE: return -EINVAL; /* as on private anonymous memory */
  case MADV_WIPEONFORK: set = A_WIPEONFORK; break;
  case 19 /* KEEPONFORK */: clear = A_WIPEONFORK; break;
  case MADV_DONTFORK: set = A_DONTFORK; break;
  case MADV_DOFORK: clear = A_DONTFORK; break;
  case MADV_POPULATE_READ:
  case MADV_POPULATE_WRITE:
    for (uint64_t i = p; i < p + n; i++)
      if (!(A_PROT(attr[i]) & (how == MADV_POPULATE_WRITE ? PROT_WRITE : PROT_READ | PROT_WRITE))) return r ? r : -EINVAL;
    fill_later(p, n, how);
    break;
  case MADV_HUGEPAGE: advise(p, n, SY_ADVICE_HUGE); break;
  case MADV_NOHUGEPAGE: advise(p, n, SY_ADVICE_SMALL); break;
  case MADV_MERGEABLE: merge_here(p, n); break; /* (what is unmapped in it is no longer, as soon as it is mapped) */
  case MADV_UNMERGEABLE:
    bits(mergeable, p, n, CLEAR);
    fill_later(p, n, how); /* whoever may write has copies of his own then */
    break;
  case MADV_NORMAL: case MADV_RANDOM: case MADV_SEQUENTIAL: case MADV_WILLNEED: case MADV_DONTDUMP: case MADV_DODUMP:
  case 20 /* COLD */: case 21 /* PAGEOUT */: case 25 /* COLLAPSE */: break;
  default: return -EINVAL;
  }
  if (set | clear)
    for (uint64_t i = p; i < p + n; i++)
      if (attr[i] & A_MAPPED) attr[i] = (uint8_t)((attr[i] | set) & ~clear);
  post(SY_MSG_MM_MADVISE, p, 0, n, 0, (uint64_t)how, 0);
  return r;
}

/* Moves n pages' content from p to q (free and unmapped there): the same frames are mapped at q, then taken away at p. */
struct move { uint64_t p, q, n; int prot; uint64_t done; /* pages */ };
static long move_request(void *arg) {
  struct move *m = arg;
  for (uint64_t end = m->p + m->n, i = next_used(m->p, end); i < end; i = next_used(i, end)) {
    word_t w = word_lock(i);
    int st = w & SY_PTE_STATE_MASK;
    uint64_t j = m->q + (i - m->p), k = 1;
    if (st == SY_PTE_NONE) {
      word_unlock(i, w);
      i++;
      continue;
    }
    if (st == SY_PTE_SWAPPED && !(w & SY_PTE_HASFRAME)) { /* its slot goes along */
      STORE(chunks[j / SY_CHUNK_PAGES], 1);
      if ((word_lock(j) & SY_PTE_STATE_MASK) == SY_PTE_NATIVE) { /* touched while its place was being cleared: what comes counts */
        arena_restore(j, 1);
        __atomic_fetch_sub(&ctl->pages_native, 1, __ATOMIC_RELAXED);
      }
      word_unlock(j, w & ~(word_t)(SY_PTE_CONTENDED | SY_PTE_STALE | W_KPROT));
      post(SY_MSG_SLOT_MOVED, j, SY_NO_FRAME, 1, 0, w >> SY_PTE_PFN_SHIFT, 0);
      if (w & W_KPROT) SYS(__NR_mprotect, VA(i), PS, RW, 0, 0);
      word_unlock(i, SY_PTE_NONE | SY_PTE_STALE);
      i++;
      continue;
    }
    if (st == SY_PTE_SWAPPED) { /* its frame still has the content: as if it had stayed */
      __atomic_fetch_sub(&ctl->pages_swapped, 1, __ATOMIC_RELAXED);
      __atomic_fetch_add(&ctl->pages_mapped, 1, __ATOMIC_RELAXED);
      st = SY_PTE_PRESENT, w &= ~(word_t)SY_PTE_HASFRAME;
    }
    uint32_t pfn = (uint32_t)(w >> SY_PTE_PFN_SHIFT);
    if (st == SY_PTE_SHARED_RO) { /* shared no longer */
      long r = unshare(i, pfn, m->prot);
      if (r < 0) return word_unlock(i, w), m->done = i - m->p, r;
      st = SY_PTE_NATIVE, w = (w & ~(word_t)(SY_PTE_STATE_MASK | SY_PTE_HASFRAME | SY_PTE_FORKED)) | SY_PTE_NATIVE;
    }
    while (st == SY_PTE_PRESENT && i + k < end && (i + k) % SY_CHUNK_PAGES != 0) {
      word_t x = LOAD(pte[i + k]);
      if ((x & SY_PTE_STATE_MASK) != SY_PTE_PRESENT || (x >> SY_PTE_PFN_SHIFT) != pfn + k || ((x ^ w) & SY_PTE_MLOCKED)) break;
      if (!CAS(pte[i + k], &x, locked(x))) break;
      k++;
    }
    STORE(chunks[j / SY_CHUNK_PAGES], 1);
    STORE(chunks[(j + k - 1) / SY_CHUNK_PAGES], 1);
    word_t flag = (m->prot != RW ? W_KPROT : 0) | (w & SY_PTE_MLOCKED);
    uint64_t lost = 0; /* touched while its place was being cleared */
    for (uint64_t x = 0; x < k; x++) {
      found[x] = (uint8_t)(word_lock(j + x) & (SY_PTE_STATE_MASK | W_KPROT));
      lost += (found[x] & SY_PTE_STATE_MASK) == SY_PTE_NATIVE;
    }
    if (st == SY_PTE_PRESENT) {
      long r = map_frames(j, pfn, k, m->prot);
      if (r < 0) {
        for (uint64_t x = 0; x < k; x++) word_unlock(j + x, found[x]), word_unlock(i + x, (LOAD(pte[i + x]) & ~(word_t)SY_PTE_STATE_MASK) | SY_PTE_PRESENT);
        return m->done = i - m->p, r;
      }
      post(SY_MSG_PAGE_MOVED, j, pfn, k, 0, 0, 0);
      for (uint64_t x = 0; x < k; x++) word_unlock(j + x, ((word_t)(pfn + x) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | flag);
      SYS(__NR_madvise, VA(i), k * PS, MADV_DONTNEED, 0, 0);
      if (w & W_KPROT) SYS(__NR_mprotect, VA(i), k * PS, RW, 0, 0);
      for (uint64_t x = 0; x < k; x++) word_unlock(i + x, SY_PTE_NONE | SY_PTE_STALE);
    } else { /* native page: let the kernel move it, and repair the hole */
      long r = SYS(__NR_mremap, VA(i), PS, PS, MREMAP_MAYMOVE | MREMAP_FIXED, VA(j));
      if (r < 0 && r > -4096) return word_unlock(j, found[0]), word_unlock(i, w), m->done = i - m->p, r;
      word_unlock(j, SY_PTE_NATIVE | flag);
      restore_request((uint64_t[]){i, 1, 0});
      word_unlock(i, SY_PTE_NONE);
    }
    __atomic_fetch_sub(&ctl->pages_native, lost, __ATOMIC_RELAXED);
    i += k;
  }
  return 0;
}

/* A mapping of the program's own is moved by the kernel: from, to or within the arena, where it leaves a hole to be mended. */
static long mremap_foreign(uintptr_t old, uint64_t old_size, uint64_t new_size, long flags, uintptr_t to) {
  uint64_t p = PAGE(old), n = UP(old_size) / PS, m = UP(new_size) / PS, q = PAGE(to);
  int from = IN_ARENA(old) && !is_native(p), into = (flags & MREMAP_FIXED) && IN_ARENA(to) && !is_native(q);
  uint8_t a = from ? attr[p] : A_OF(RW) | A_FOREIGN;
  if ((flags & MREMAP_FIXED) && IN_ARENA(to) && m && is_native(q) != is_native(q + m - 1)) return -ENOMEM; /* onto both kinds: docs/limits.md */
  if (into) {
    if (to % PS) return -EINVAL;
    if (q + m > SY_ARENA_PAGES) return -ENOMEM;
    if (from && q < p + n && p < q + m) return -EINVAL;
    if (SYS(__NR_madvise, old, n * PS, MADV_NORMAL, 0, 0) < 0) return -EFAULT; /* nothing there to move: the target stays */
    drop_kept_in(q, m);
    park(q, m);
  }
  long r = SYS(__NR_mremap, old, old_size, new_size, flags, to);
  if (r < 0 && r > -4096) {
    if (into) not_replaced(q, m);
    return r;
  }
  if (into) {
    drop_content(q, m, A_PROT(a));
    uncharge(q, m);
    hole_cut(q, m);
    post(SY_MSG_MM_MUNMAP, q, 0, m, 0, 0, 0);
    memset(attr + q, a, m);
    if (q >= SY_BRK_PAGES && q + m > mmap_hi) mmap_hi = q + m, ctl->mmap_hi = mmap_hi;
  }
  if (!from || (flags & MREMAP_DONTUNMAP)) return r;
  uint64_t gone = (uintptr_t)r == old ? (m < n ? m : n) : 0; /* pages that stayed */
  if (gone < n) {
    memset(attr + p + gone, 0, n - gone);
    arena_restore(p + gone, n - gone);
    hole_add(p + gone, n - gone);
  }
  return r;
}
static long be_there(uint64_t p, int write);
/* Managed pages to a fixed place outside of the arena: they become native there. */
static long move_out(uint64_t p, uint64_t n, uint64_t m, long flags, uintptr_t to) {
  int prot = A_PROT(attr[p]);
  if (to % PS) return -EINVAL;
  long r = sys_mmap(to, m * PS, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (r < 0 && r > -4096) return r;
  if (!(prot & PROT_READ)) set_prot(p, n, PROT_READ), set_kernel_prot(p, n, PROT_READ); /* also for what comes back from the store */
  for (uint64_t end = p + (n < m ? n : m), i = next_used(p, end); i < end; i = next_used(i + 1, end))
    if (!untouched(LOAD(pte[i]))) {
      if (in_command_thread()) be_there(i, 0); /* (past libc) */
      memcpy((void *)(to + (i - p) * PS), (void *)VA(i), PS);
    }
  if (prot != RW) SYS(__NR_mprotect, to, m * PS, prot, 0, 0);
  set_prot(p, n, prot);
  if (flags & MREMAP_DONTUNMAP) evict(p, n);
  else unmap_pages(p, n);
  return (long)to;
}

static long do_mremap(uintptr_t old, uint64_t old_size, uint64_t new_size, long flags, uintptr_t to) {
  uint64_t p = PAGE(old), n = UP(old_size) / PS, m = UP(new_size) / PS, q;
  if (!IN_ARENA(old) || is_native(p)) return mremap_foreign(old, old_size, new_size, flags, to);
  if (old % PS || !m || (flags & ~7L) || ((flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) && !(flags & MREMAP_MAYMOVE))) return -EINVAL;
  if ((flags & MREMAP_DONTUNMAP) && n != m) return -EINVAL;
  if (!n || p + n > SY_ARENA_PAGES || m > SY_ARENA_PAGES) return n ? -ENOMEM : -EINVAL;
  if (!all_mapped(p, n)) return -EFAULT;
  for (uint64_t i = p; i < p + n; i++)
    if ((attr[i] ^ attr[p]) & (A_FOREIGN | A_OF(7))) return -EFAULT; /* more than one mapping */
  uint8_t a = attr[p];
  if (a & A_FOREIGN) return mremap_foreign(old, old_size, new_size, flags, to);
  if ((flags & MREMAP_FIXED) && !IN_ARENA(to)) return move_out(p, n, m, flags, to);
  uint64_t more = flags & MREMAP_DONTUNMAP ? bits(charged, p, n, LOOK) : m > n && bits(charged, p + n - 1, 1, LOOK) ? m - n : 0;
  if (!(flags & MREMAP_FIXED) && too_much(more, 0)) return -ENOMEM;
  if (flags & MREMAP_FIXED) {
    q = PAGE(to);
    if (to % PS) return -EINVAL;
    if (q + m > SY_ARENA_PAGES || is_native(q)) return -ENOMEM; /* beyond the arena, or onto what a forked child inherited: docs/limits.md */
    if (q < p + n && p < q + m) return -EINVAL;
    if (too_much(more, bits(charged, q, m, LOOK))) return -ENOMEM;
    drop_kept_in(q, m);
    for (uint64_t i = q, k; i < q + m; i += k) { /* what is mapped there waits, without content; what is not stays so until it is */
      for (k = 1; i + k < q + m && !attr[i + k] == !attr[i];) k++;
      long r = replace_pages(i, k, attr[i] ? A_OF(RW) | A_KEPT : 0);
      if (r < 0) return unpark(q, m), r;
    }
    hole_cut(q, m);
  } else if (!(flags & MREMAP_DONTUNMAP) && m <= n) {
    if (m < n) unmap_pages(p + m, n - m);
    return (long)old;
  } else if (!(flags & MREMAP_DONTUNMAP) && p + m <= (p < SY_BRK_PAGES ? SY_BRK_PAGES : SY_ARENA_PAGES) && p >= SY_BRK_PAGES && all_free(p + n, m - n)) {
    hole_cut(p + n, m - n);
    map_pages(p + n, m - n, a);
    charge_moved(p + n - 1, 1, p + n, m - n);
    return (long)old;
  } else {
    if (!(flags & MREMAP_MAYMOVE)) return -ENOMEM;
    /* room to grow again in place: address space is plentiful, moving is not */
    uint64_t room = m >= 32 ? m + m / 2 : m;
    if (!(q = find(room)) && !(q = find(m = room = UP(new_size) / PS))) return -ENOMEM;
    if (room > m) hole_add(q + m, room - m);
  }
  /* The content first, the claim afterwards: until then no fault may put a block there. */
  set_kernel_prot(q, m, RW);
  struct move mv = {p, q, n < m ? n : m, A_PROT(a), 0};
  long r = by_command_thread(move_request, &mv);
  if (r < 0) { /* no memory for the mappings: back with what has moved, for which there is room */
    by_command_thread(move_request, &(struct move){q, p, mv.done, A_PROT(a), 0});
    memset(attr + q, 0, m);
    uncharge(q, m);
    return r;
  }
  if (A_PROT(a) != RW || (flags & MREMAP_FIXED)) map_pages(q, m, a); /* touched meanwhile, where nothing came: plain read-write */
  else claim(q, m, a);
  charge_moved(p, n, q, m);
  if (flags & MREMAP_DONTUNMAP)
    evict(p, n);
  else
    unmap_pages(p, n);
  post(SY_MSG_MM_MREMAP, q, 0, m, 0, p, 0);
  return (long)VA(q);
}

static long do_brk(uintptr_t want) {
  if (!brk_cur) {
    brk_start = brk_cur = SY_ARENA_START;
    brk_floor = brk_hi = 0;
  }
  if (want < brk_start || want > VA(SY_BRK_PAGES)) return (long)brk_cur;
  uint64_t cur = PAGE(UP(brk_cur)), new = PAGE(UP(want));
  if (new > cur) {
    uint64_t inherited = cur < brk_floor ? (new < brk_floor ? new : brk_floor) - cur : 0; /* trimmed by a forked child: native, as it was */
    if (!all_free(cur, new - cur) || too_much(new - cur - inherited, 0)) return (long)brk_cur;
    if (inherited && sys_mmap(VA(cur), inherited * PS, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0) != (long)VA(cur)) return (long)brk_cur;
    memset(attr + cur, A_OF(RW), inherited);
    if (new > cur + inherited) map_pages(cur + inherited, new - cur - inherited, A_OF(RW)), charge(cur + inherited, new - cur - inherited);
  } else if (new < cur)
    do_munmap(VA(new), (cur - new) * PS);
  brk_cur = want;
  ctl->brk_pages = new;
  return (long)brk_cur;
}

/* To where the program says: its address may be wrong. */
static int copy_out(void *to, const void *from, size_t n) {
  struct iovec here = {(void *)from, n}, there = {to, n};
  return sys6(__NR_process_vm_writev, SYS(__NR_getpid, 0, 0, 0, 0, 0), (long)&here, 1, (long)&there, 1, 0) == (long)n ? 0 : -EFAULT;
}
static long all_there(uintptr_t at, uint64_t n, int write);
static long do_mincore(uintptr_t addr, uint64_t size, uint8_t *vec) {
  if (addr % PS) return -EINVAL;
  uint64_t p = PAGE(addr), n = UP(size) / PS;
  if (p + n > SY_ARENA_PAGES) return -ENOMEM;
  long e = in_command_thread() ? all_there((uintptr_t)vec, n, 1) : 0; /* (past libc) */
  if (e) return -EAGAIN;
  if (is_native(p) || (attr[p] & A_FOREIGN)) return SYS(__NR_mincore, addr, size, vec, 0, 0);
  if (!all_mapped(p, n)) return -ENOMEM;
  for (uint64_t i = 0, k; i < n; i += k) {
    k = n - i < sizeof found ? n - i : sizeof found;
    for (uint64_t j = 0; j < k; j++) {
      int st = LOAD(chunks[(p + i + j) / SY_CHUNK_PAGES]) ? (int)(LOAD(pte[p + i + j]) & SY_PTE_STATE_MASK) : SY_PTE_NONE;
      found[j] = st != SY_PTE_NONE && st != SY_PTE_SWAPPED;
    }
    if (copy_out(vec + i, found, k)) return -EFAULT;
  }
  return 0;
}

/* Locked pages of [p, p + n); p = SY_ARENA_PAGES: of the whole arena. mlock is rare enough to count anew. */
static uint64_t locked_pages(uint64_t p, uint64_t n) {
  if (p == SY_ARENA_PAGES) return locked_pages(0, brk_hi) + locked_pages(SY_BRK_PAGES, mmap_hi - SY_BRK_PAGES);
  uint64_t sum = 0;
  for (uint64_t i = next_used(p, p + n); i < p + n; i = next_used(i + 1, p + n)) sum += (LOAD(pte[i]) & SY_PTE_MLOCKED) != 0;
  return sum;
}
static int may_lock_all(void) {
  struct { uint32_t version; int pid; } head = {0x20080522, 0};
  uint32_t data[6] = {0};
  return SYS(__NR_capget, &head, data, 0, 0, 0) == 0 && (data[0] >> 14 /* CAP_IPC_LOCK */ & 1);
}
static long do_mlock(uintptr_t addr, uint64_t size, long nr, long flags) {
  uint64_t p = PAGE(addr), n = (UP(addr + size) - (addr & ~(PS - 1))) / PS;
  int once_touched = nr == __NR_mlock2 && (flags & 1 /* MLOCK_ONFAULT */);
  if (nr == __NR_mlock2 && (flags & ~1l)) return -EINVAL;
  if (p + n > SY_ARENA_PAGES) return -ENOMEM;
  if (is_native(p) || (attr[p] & A_FOREIGN)) return SYS(nr, addr, size, flags, 0, 0);
  if (!all_mapped(p, n)) return -ENOMEM;
  if (nr != __NR_munlock) {
    uint64_t lim[2] = {~0ull, 0}, had = locked_pages(SY_ARENA_PAGES, 0), again = locked_pages(p, n);
    SYS(__NR_prlimit64, 0, 8 /* RLIMIT_MEMLOCK */, 0, lim, 0);
    if (!may_lock_all()) {
      if (!lim[0]) return -EPERM;
      if ((had - again + n) * PS > lim[0]) return -ENOMEM;
    }
    /* The flag keeps a page from kswapd, and goes with it to the frame that it gets. */
    for (uint64_t i = p; i < p + n; i++) {
      STORE(chunks[i / SY_CHUNK_PAGES], 1);
      word_unlock(i, word_lock(i) | SY_PTE_MLOCKED);
    }
    if (!once_touched) fill_later(p, n, 0);
    return 0;
  }
  for (uint64_t i = next_used(p, p + n); i < p + n; i = next_used(i + 1, p + n)) word_unlock(i, word_lock(i) & ~(word_t)SY_PTE_MLOCKED);
  return 0;
}
