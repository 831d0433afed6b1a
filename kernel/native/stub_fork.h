/* stub, part 5: fork. Done at the system call itself, in the forking thread, whatever called it.
 *
 * Parent and child share frames: before it returns into the program, the child joins the enclave with its parent's page table (SY_HELLO_FORK), and maps the
 * frames anew, private and write-protected; the parent waits, with all that it has in frames write-protected where it is, and its other threads' faults left waiting, so
 * the child's view is of one instant. Whoever writes then gets a copy (stub_share.h). docs/decisions/0014.
 *
 * Where there is little to share, or no gateway, or it cannot (a page is shared by too many), the child gets a copy of every page, in memory of the kernel's own, made
 * by itself; it lives on with that, and joins the enclave anew once it has mapped ATTACH_AFTER_FORK bytes (a child that is about to exec never does).
 * docs/decisions/0002 says why. */

/* Before Linux 6.4 of one mapping only: then piece by piece. */
static long write_protect(uint64_t p, uint64_t n, int on) {
  struct uffdio_writeprotect u = {.range = {VA(p), n * PS}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
  long r = SYS(__NR_ioctl, fd_uffd, UFFDIO_WRITEPROTECT, &u, 0, 0);
  if (r != -ENOENT || n == 1) return r;
  r = write_protect(p, n / 2, on);
  long r2 = write_protect(p + n / 2, n - n / 2, on);
  return r ? r : r2;
}
/* Kernel entries of frame mappings protected (on) or free again (off), run by run. 0, or -errno: not all of them. */
static long protect_request(void *arg) {
  int on = *(int *)arg;
  long r = 0;
  for (uint64_t i = 0, end = SY_ARENA_PAGES; i < end;) {
    if (i >= brk_hi && i < SY_BRK_PAGES) i = SY_BRK_PAGES;
    if (i >= mmap_hi) break;
    if (!LOAD(chunks[i / SY_CHUNK_PAGES])) {
      i = (i / SY_CHUNK_PAGES + 1) * SY_CHUNK_PAGES;
      continue;
    }
    uint64_t k = 0;
    while ((i + k) < end && present(i + k)) k++;
    if (k) {
      long e = on ? uffd_register(i, k, UFFD_FRAME | UFFDIO_REGISTER_MODE_WP) : 0;
      if (!e) e = write_protect(i, k, on);
      if (e) r = e;
    }
    i += k ? k : 1;
  }
  if (!on) wake(0, SY_ARENA_PAGES);
  return r;
}

/* Is so much in frames that sharing is cheaper than a copy? */
static int worth_sharing(void) {
  uint64_t n = 0;
  for (uint64_t i = next_used(0, SY_ARENA_PAGES); i < SY_ARENA_PAGES && n < SY_FORK_SHARES; i = next_used(i + 1, SY_ARENA_PAGES)) n += (uint64_t)(present(i) || is_shared(i));
  return n == SY_FORK_SHARES;
}

static int is_single_threaded(void) {
  struct stat st;
  if (SYS(__NR_newfstatat, -100 /* AT_FDCWD */, "/proc/self/task", &st, 0, 0) < 0) return 0;
  return st.st_nlink <= 2 + 1 + 1 + SY_SERVICE_THREADS;
}

/* Release: [p, p + n) has just become native; its frames go back. */
static int releasing;
static void now_native(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n;) {
    uint64_t k = 1;
    int st = LOAD(chunks[i / SY_CHUNK_PAGES]) ? (int)(LOAD(pte[i]) & SY_PTE_STATE_MASK) : SY_PTE_NONE;
    if (st == SY_PTE_PRESENT || st == SY_PTE_SHARED_RO) {
      word_t w = LOAD(pte[i]);
      while (i + k < p + n && LOAD(chunks[(i + k) / SY_CHUNK_PAGES]) && (int)(LOAD(pte[i + k]) & SY_PTE_STATE_MASK) == st && LOAD(pte[i + k]) >> SY_PTE_PFN_SHIFT == (w >> SY_PTE_PFN_SHIFT) + k) k++;
      for (uint64_t j = 0; j < k; j++) STORE(pte[i + j], (LOAD(pte[i + j]) & ~(word_t)(PS - 1)) | SY_PTE_HASFRAME | SY_PTE_NATIVE); /* see wake_waiter */
      if (st == SY_PTE_PRESENT) __atomic_fetch_sub(&ctl->pages_mapped, k, __ATOMIC_RELAXED);
      post(SY_MSG_PAGE_FREED, i, (uint32_t)(w >> SY_PTE_PFN_SHIFT), k, 0, 0, 1);
    } else {
      STORE(chunks[i / SY_CHUNK_PAGES], 1);
      STORE(pte[i], SY_PTE_NATIVE);
    }
    i += k;
  }
}

/* Content of [p, p + n), PRESENT, to `to`: from the frames themselves, as protecting a huge mapping has dropped its entries, and the faults
 * of whoever reads there wait for us. */
static long copy_frames(char *to, uint64_t p, uint64_t n) {
  for (uint64_t i = 0, k; i < n; i += k) {
    uint64_t pfn = LOAD(pte[p + i]) >> SY_PTE_PFN_SHIFT;
    uint32_t nd = node_of((uint32_t)pfn);
    for (k = 1; i + k < n && LOAD(pte[p + i + k]) >> SY_PTE_PFN_SHIFT == pfn + k;) k++; /* (a block lies in one node) */
    if (pfn + k > node[nd].base + node[nd].frames) k = node[nd].base + node[nd].frames - pfn;
    long w = sys_mmap(0, k * PS, PROT_READ, MAP_SHARED | MAP_POPULATE, fd_ram[nd], (pfn - node[nd].base) * PS);
    if (w < 0) return w;
    memcpy(to + i * PS, (void *)w, k * PS);
    SYS(__NR_munmap, w, k * PS, 0, 0, 0);
  }
  return 0;
}

static void advise_forks(uint64_t p, uint64_t n, uint8_t a) {
  if (a & A_WIPEONFORK) SYS(__NR_madvise, VA(p), n * PS, MADV_WIPEONFORK, 0, 0);
  if (a & A_DONTFORK) SYS(__NR_madvise, VA(p), n * PS, MADV_DONTFORK, 0, 0);
}
/* Makes [p, p + n), mapped alike, native memory with the same content, in one step for whoever touches it. */
static long settle_run(uint64_t p, uint64_t n, uint8_t a) {
  if (a & A_FOREIGN) return 0;
  if ((a & A_DONTFORK) && !releasing) {
    memset(attr + p, 0, n);
    uncharge(p, n);
    return SYS(__NR_munmap, VA(p), n * PS, 0, 0, 0);
  }
  long t = sys_mmap(0, n * PS, RW, ANON, -1, 0);
  if (t < 0) return t;
  for (uint64_t end = p + n, i = next_used(p, end); i < end && (releasing || !(a & A_WIPEONFORK)); i = next_used(i, end)) {
    uint64_t k = 0;
    int odd = 0, kind = SY_PTE_NONE;
    for (; i + k < end && LOAD(chunks[(i + k) / SY_CHUNK_PAGES]); k++) {
      word_t w = LOAD(pte[i + k]), st = w & SY_PTE_STATE_MASK;
      if (st == SY_PTE_SHARED_RO) st = SY_PTE_PRESENT;
      if ((st != SY_PTE_PRESENT && st != SY_PTE_NATIVE && st != SY_PTE_SWAPPED) || (k && (int)st != kind && (releasing || st == SY_PTE_SWAPPED || kind == SY_PTE_SWAPPED))) break;
      odd |= (w & W_KPROT) != 0, kind = (int)st;
    }
    if (k && releasing && kind == SY_PTE_PRESENT) {
      long r = copy_frames((char *)t + (i - p) * PS, i, k);
      if (r < 0) return SYS(__NR_munmap, t, n * PS, 0, 0, 0), r;
    } else if (k && kind == SY_PTE_SWAPPED)
      memcpy((char *)t + (i - p) * PS, back + i * PS, k * PS);
    else if (k && !releasing) {
      if (odd && !(A_PROT(a) & PROT_READ)) SYS(__NR_mprotect, VA(i), k * PS, PROT_READ, 0, 0);
      memcpy((char *)t + (i - p) * PS, (void *)VA(i), k * PS);
    }
    i += k ? k : 1;
  }
  if (A_PROT(a) != RW) SYS(__NR_mprotect, t, n * PS, A_PROT(a), 0, 0);
  long r = SYS(__NR_mremap, t, n * PS, n * PS, MREMAP_MAYMOVE | MREMAP_FIXED, VA(p));
  if (r < 0) return SYS(__NR_munmap, t, n * PS, 0, 0, 0), r;
  advise_forks(p, n, a);
  if (releasing) now_native(p, n);
  return 0;
}
/* Makes [lo, hi) of the arena the caller's own, page for page; then what is unmapped becomes really unmapped, up to top. In two steps:
 * should the first fail, for want of memory, what is free is still ours to map. */
static int stays_native(uint64_t p) { /* released: it is the kernel's own already, and its writers do not wait */
  return releasing && LOAD(chunks[p / SY_CHUNK_PAGES]) && (LOAD(pte[p]) & SY_PTE_STATE_MASK) == SY_PTE_NATIVE;
}
static long settle_region(uint64_t lo, uint64_t hi) {
  for (uint64_t i = lo; i < hi;) {
    uint64_t k = 1;
    int stays = attr[i] && stays_native(i);
    while (i + k < hi && attr[i + k] == attr[i] && (attr[i] && stays_native(i + k)) == stays) k++;
    if (attr[i] == A_KEPT) memset(attr + i, 0, k); /* unmapped, for the program */
    if (stays) advise_forks(i, k, attr[i]);
    long r = stays || is_native(i) || !attr[i] ? 0 : settle_run(i, k, attr[i]);
    if (r < 0) return r;
    i += k;
  }
  return 0;
}
static void unmap_rest(uint64_t lo, uint64_t hi, uint64_t top) {
  for (uint64_t i = lo, k; i < top; i += k) {
    for (k = 1; i + k < hi && !attr[i + k] == !attr[i];) k++;
    if (i >= hi) k = top - i;
    if (i >= hi || (!attr[i] && !is_native(i))) SYS(__NR_munmap, VA(i), k * PS, 0, 0, 0);
  }
}
static long settle(void) {
  long r = settle_region(brk_floor, brk_hi);
  if (!r) r = settle_region(mmap_floor, mmap_hi);
  if (r) return r;
  unmap_rest(brk_floor, brk_hi, SY_BRK_PAGES);
  unmap_rest(mmap_floor, mmap_hi, SY_ARENA_PAGES);
  return 0;
}

static void now_forked(int other_tls) {
  owner_pid = (int)SYS(__NR_getpid, 0, 0, 0, 0, 0);
  forked_bytes = 0;
  service_threads = 0, leader_gone = left_last = 0;
  STORE(req_word, 0);
  STORE(gateway_dead, 0);
  busy[0] = busy[1] = 0;
  reader = reads[0] = reads[1] = 0;
  reader_cpu[0] = reader_cpu[1] = -1;
  find_main_cpu(other_tls);
}

/* Static, as is the stack: the forking thread's own stack may lie in the arena, and every page of that is protected meanwhile. */
static struct fork_args { long flags, ptid, ctid, tls; int managed, tid, shares; } fork_args;

/* The child's command thread, which has joined as a fork. What it inherited names its parent's frames, unprotected: nobody but us
 * runs here yet. Where there is nothing, or what it is not to have, an empty arena; then the shared frames, and what the parent has fetched from the store. 0 or
 * -errno. */
static int dropped(uint64_t p) { return (attr[p] & (A_DONTFORK | A_WIPEONFORK)) != 0; }
static long empty_arena(uint64_t p, uint64_t end) {
  for (uint64_t k; p < end; p += k) {
    int keep = LOAD(chunks[p / SY_CHUNK_PAGES]) && (LOAD(pte[p]) & SY_PTE_STATE_MASK) == SY_PTE_NATIVE && !dropped(p);
    if (keep || (attr[p] & A_FOREIGN)) {
      k = 1;
      continue;
    }
    for (k = 1; p + k < end;) { /* (the end of the arena was never used: chunk by chunk) */
      if ((p + k) % SY_CHUNK_PAGES == 0 && !LOAD(chunks[(p + k) / SY_CHUNK_PAGES]) && (p + k >= mmap_hi || (p + k < SY_BRK_PAGES && p + k >= brk_hi))) k += SY_CHUNK_PAGES;
      else if (attr[p + k] & A_FOREIGN || (LOAD(chunks[(p + k) / SY_CHUNK_PAGES]) && (LOAD(pte[p + k]) & SY_PTE_STATE_MASK) == SY_PTE_NATIVE && !dropped(p + k))) break;
      else k++;
    }
    if (k > end - p) k = end - p;
    long r = sys_mmap(VA(p), k * PS, RW, ANON | MAP_FIXED, -1, 0);
    if (r < 0) return r;
    SYS(__NR_madvise, VA(p), k * PS, MADV_DONTDUMP, 0, 0);
    if ((r = uffd_register(p, k, UFFDIO_REGISTER_MODE_MISSING)) < 0) return r;
  }
  return 0;
}
static long inherit(void) {
  long r = empty_arena(brk_floor, SY_BRK_PAGES);
  if (!r) r = empty_arena(mmap_floor, SY_ARENA_PAGES);
  for (uint64_t i = next_used(0, SY_ARENA_PAGES), k; i < SY_ARENA_PAGES && !r; i = next_used(i + k, SY_ARENA_PAGES)) {
    word_t w = LOAD(pte[i]), st = w & SY_PTE_STATE_MASK;
    int prot = kprot(attr[i]);
    k = 1;
    if (st == SY_PTE_NATIVE && prot != RW) pte[i] |= W_KPROT;
    if (dropped(i) || (st != SY_PTE_SHARED_RO && !(w & SY_PTE_FORKED))) continue;
    uint32_t pfn = (uint32_t)(w >> SY_PTE_PFN_SHIFT), nd = node_of(pfn);
    while (i + k < SY_ARENA_PAGES && LOAD(chunks[(i + k) / SY_CHUNK_PAGES]) && attr[i + k] == attr[i] && (LOAD(pte[i + k]) & SY_PTE_STATE_MASK) == st &&
           (st == SY_PTE_SHARED_RO ? LOAD(pte[i + k]) >> SY_PTE_PFN_SHIFT == pfn + k && node_of(pfn + (uint32_t)k) == nd : (LOAD(pte[i + k]) & SY_PTE_FORKED) != 0))
      k++;
    if (st == SY_PTE_SHARED_RO) {
      r = sys_mmap(VA(i), k * PS, prot, MAP_PRIVATE | MAP_FIXED, fd_ram[nd], (uint64_t)(pfn - node[nd].base) * PS);
      if (r > 0) r = uffd_register(i, k, UFFDIO_REGISTER_MODE_WP);
      if (!r) r = write_protect(i, k, 1);
    } else {
      if (prot != RW) SYS(__NR_mprotect, back + i * PS, k * PS, prot, 0, 0);
      r = SYS(__NR_mremap, back + i * PS, k * PS, k * PS, MREMAP_MAYMOVE | MREMAP_FIXED, VA(i));
      if (r > 0) r = 0;
      for (uint64_t j = 0; j < k; j++) pte[i + j] &= ~(word_t)SY_PTE_FORKED;
    }
    if (prot != RW)
      for (uint64_t j = 0; j < k; j++) pte[i + j] |= W_KPROT;
  }
  return r;
}
/* … and lets go what it is not to have. It is MANAGED. */
static void drop_unwanted(void) {
  for (uint64_t i = next_used(0, SY_ARENA_PAGES); i < SY_ARENA_PAGES; i = next_used(i + 1, SY_ARENA_PAGES)) {
    word_t w = LOAD(pte[i]);
    if (!dropped(i)) continue;
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_NATIVE) __atomic_fetch_sub(&ctl->pages_native, 1, __ATOMIC_RELAXED);
    STORE(pte[i], SY_PTE_NONE);
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO) post(SY_MSG_PAGE_FREED, i, (uint32_t)(w >> SY_PTE_PFN_SHIFT), 1, 0, 0, 0);
  }
  for (uint64_t i = 0; i < mmap_hi; i++) {
    if (i == brk_hi && i < SY_BRK_PAGES) i = SY_BRK_PAGES;
    if ((attr[i] & A_DONTFORK) && !is_native(i)) attr[i] = 0, uncharge(i, 1);
  }
}

/* The child of a fork that shares: joins. 0, or -1: nothing has changed. */
static int join_as_child(int other_tls) {
  struct tables parents = tables();
  now_forked(other_tls);
  parent_ctl = ctl;
  STORE(join_state, 0);
  if (start_thread(command_thread, 0, cmd_stack + sizeof cmd_stack, THREAD) < 0) STORE(join_state, 2);
  while (!LOAD(join_state)) futex_wait(&join_state, 0, 1000, 0);
  parent_ctl = 0;
  if (LOAD(join_state) != 1) return -1;
  back_done();
  unmap_tables(parents);
  return 0;
}

/* Clone, and what the child does before it goes back. */
static long do_clone(struct fork_args *f) {
  long flags = f->flags;
  /* The kernel writes the child's id where the mapping may still be the parent's: do it ourselves after settling. */
  int tid_later = f->managed && IN_ARENA(f->ctid) && (flags & (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID));
  if (tid_later) flags &= ~(long)(CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID);
  /* Likewise for what it writes for the parent: in the arena it would wait for faults that wait for the end of this fork. */
  int ptid_later = f->managed && IN_ARENA(f->ptid) && (flags & (CLONE_PARENT_SETTID | CLONE_PIDFD));
  long ptid = ptid_later ? (long)&f->tid : f->ptid;
  if (f->managed) {
    int ours = !(flags & (CLONE_PARENT_SETTID | CLONE_PIDFD));
    __atomic_store_n(&ctl->fork_child, ours ? 0 : SY_UNKNOWN_CHILD, __ATOMIC_SEQ_CST);
    if (ours) flags |= CLONE_PARENT_SETTID, ptid = (long)&ctl->fork_child;
  }
  long pid = sys6(__NR_clone, flags, 0, ptid, f->ctid, f->tls, SY_MARK);
  if (pid) return pid;
  int shares = f->managed && f->shares && !join_as_child((f->flags & CLONE_SETTLS) != 0);
  if (f->managed && !shares) {
    long r = settle();
    back_done();
    STORE(ctl->fork_done, r ? 2 : 1);
    futex_wake(&ctl->fork_done, 1);
    if (r) {
      say("sylvie: a forked child found no memory for its copy\n");
      SYS(__NR_exit_group, 127, 0, 0, 0, 0);
    }
    unmap_tables(tables());
    mode = FORKED;
    brk_floor = PAGE(UP(brk_cur ? brk_cur : SY_ARENA_START)), mmap_floor = mmap_next = mmap_hi;
    brk_hi = brk_floor;
    memset(hole, 0, sizeof hole);
    kept_count = 0, kept_pages = 0;
  }
  if (!shares) now_forked((f->flags & CLONE_SETTLS) != 0);
  if (tid_later) {
    if (f->flags & CLONE_CHILD_SETTID) *(int *)f->ctid = (int)SYS(__NR_gettid, 0, 0, 0, 0, 0);
    if (f->flags & CLONE_CHILD_CLEARTID) SYS(__NR_set_tid_address, f->ctid, 0, 0, 0, 0);
  }
  return 0;
}

long sy_on_stack(void *stack_top, long (*fn)(struct fork_args *), struct fork_args *arg);
__asm__(".text\n.hidden sy_on_stack\n.globl sy_on_stack\n.type sy_on_stack,@function\nsy_on_stack:\n"
        "push %rbp\nmov %rsp,%rbp\nmov %rdi,%rsp\nmov %rdx,%rdi\ncall *%rsi\nmov %rbp,%rsp\npop %rbp\nret\n");

static int gone(long pid) {
  struct { int si[32]; } info = {{0}};
  long r = SYS(__NR_waitid, 1 /* P_PID */, pid, &info, 0x41000005 /* __WALL | WNOWAIT | WEXITED | WNOHANG */, 0);
  /* ECHILD: reaped, by SIG_IGN or another thread; or never ours to wait for (CLONE_PARENT) */
  return (r == 0 && info.si[0] == SIGCHLD) || (r == -ECHILD && SYS(__NR_tgkill, pid, pid, 0, 0, 0) == -ESRCH);
}

/* fork_active is set: until what was begun before is done. */
static void wait_for_faults(void) {
  for (int i = 0, times = 0; i < SY_SERVICE_THREADS; i++)
    while (__atomic_load_n(&busy[i], __ATOMIC_SEQ_CST)) spin(&times);
}
static long fork_on_stack(struct fork_args *f) {
  if (!f->managed) return do_clone(f);
  /* Should this process be killed now, the gateway keeps its frames until the child has copied, or ended: it looks at these words. */
  __atomic_store_n(&ctl->fork_child, 0, __ATOMIC_SEQ_CST);
  __atomic_store_n(&ctl->fork_done, 0, __ATOMIC_SEQ_CST);
  __atomic_store_n(&ctl->fork_active, 1, __ATOMIC_SEQ_CST);
  __atomic_fetch_add(&ctl->forks, 1, __ATOMIC_SEQ_CST);
  wait_for_faults();
  int off = 0, on = 1;
  f->shares = !LOAD(gateway_dead) && worth_sharing();
  while (f->shares && kept_count) drop_kept(0);
  long pid = ctl->pages_swapped ? by_command_thread(bring_back, 0) : 0;
  if (pid < 0) {
    back_done();
    __atomic_store_n(&ctl->fork_active, 0, __ATOMIC_SEQ_CST);
    by_command_thread(protect_request, &off);
    return -ENOMEM;
  }
  if ((f->shares || !is_single_threaded()) && by_command_thread(protect_request, &on)) f->shares = 0; /* (too many mappings) */
  pid = do_clone(f);
  if (pid == 0) return 0; /* the child */
  if (pid > 0) {
    while (!LOAD(ctl->fork_done)) {
      futex_wait(&ctl->fork_done, 0, 20, 1);
      if (!LOAD(ctl->fork_done) && gone(pid)) break; /* killed while it copied */
    }
    post(SY_MSG_MM_FORK, 0, 0, 0, 0, (uint64_t)pid, 0);
  }
  back_done();
  __atomic_store_n(&ctl->fork_active, 0, __ATOMIC_SEQ_CST);
  by_command_thread(protect_request, &off);
  if (pid > 0 && IN_ARENA(f->ptid) && (f->flags & (CLONE_PARENT_SETTID | CLONE_PIDFD))) *(int *)f->ptid = f->tid;
  return pid;
}
/* Caller holds mm_lock. */
static long do_fork(long flags, long ptid, long ctid, long tls) {
  fork_args = (struct fork_args){flags, ptid, ctid, tls, mode == MANAGED, 0, 0};
  return sy_on_stack(fork_stack + sizeof fork_stack, fork_on_stack, &fork_args);
}

/* ---------------------------------------------------------------- release: the way out
 * For what we cannot follow (a process made past libc): every page becomes native memory, in place, while the program's other threads
 * run; their writes are parked until it is done. From then on this address space is the kernel's alone, until exec. Runs in the command
 * thread, under mm_lock. */
static long release_all(void) {
  int on = 1;
  __atomic_store_n(&ctl->fork_active, 1, __ATOMIC_SEQ_CST);
  wait_for_faults();
  while (kept_count) drop_kept(0);
  long r = ctl->pages_swapped ? bring_back(0) : 0; /* (what it maps again has to be protected, too) */
  if (!r) r = protect_request(&on);
  releasing = 1;
  if (!r) r = settle();
  back_done();
  releasing = 0;
  look_at_threads(0);
  if (!r) {
    brk_floor = brk_hi = PAGE(UP(brk_cur ? brk_cur : SY_ARENA_START)), mmap_floor = SY_ARENA_PAGES;
    STORE(mode, NATIVE);
    SYS(__NR_munmap, attr, TABLE_BYTES, 0, 0, 0);
    attr = 0;
  }
  __atomic_store_n(&ctl->fork_active, 0, __ATOMIC_SEQ_CST);
  if (r) { /* no memory for the copies: some pieces are native now, the rest is as before */
    int off = 0;
    protect_request(&off);
  } else
    wake(0, SY_ARENA_PAGES);
  return r;
}
