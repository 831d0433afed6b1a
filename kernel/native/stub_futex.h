/* stub, part: what the kernel's futexes hold on to. It finds a waiter on a futex that is not private by its frame, and an exiting thread's
 * robust mutexes only in pages that are mapped at that moment: nobody serves the faults of a thread that exits. */

static uint32_t service_tid[1 + SY_SERVICE_THREADS];

/* A waiter on a futex that is not private waits at the frame, not at the address; who wakes it from now on looks at the address. So it is
 * woken once, and waits anew. (The kernel itself wakes so when a thread ends, and its stack may lie in the arena.) The frame may be another's
 * already: nothing is read or written there, and a futex wait may end without cause. */
static void wake_waiter(const char *tid) {
  char text[160], path[64] = "/proc/self/task/";
  append(path, sizeof path, tid);
  append(path, sizeof path, "/syscall"); /* number and arguments of the call that it waits in */
  long fd = SYS(__NR_open, path, O_RDONLY | O_CLOEXEC, 0, 0, 0), r = fd < 0 ? 0 : SYS(__NR_read, fd, text, sizeof text - 1, 0, 0);
  if (fd >= 0) SYS(__NR_close, fd, 0, 0, 0, 0);
  uint64_t word[3] = {0};
  int base = 10, k = 0;
  for (long i = 0; i < r && k < 3; i++) {
    char c = text[i];
    if (c == ' ' || c == '\n') k++, base = 10;
    else if (c == 'x') base = 16;
    else word[k] = word[k] * (uint64_t)base + (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
  }
  long op = (long)word[2] & 0x7f;
  if (k < 3 || word[0] != __NR_futex || !IN_ARENA(word[1]) || (word[2] & FUTEX_PRIVATE_FLAG) || (op != FUTEX_WAIT && op != FUTEX_WAIT_BITSET)) return;
  if (!LOAD(chunks[PAGE(word[1]) / SY_CHUNK_PAGES])) return;
  word_t w = LOAD(pte[PAGE(word[1])]);
  if (!(w & SY_PTE_HASFRAME)) return;
  uint32_t pfn = (uint32_t)(w >> SY_PTE_PFN_SHIFT), nd = node_of(pfn);
  long m = sys_mmap(0, PS, PROT_READ, MAP_SHARED, fd_ram[nd], (uint64_t)(pfn - node[nd].base) * PS);
  if (m < 0 && m > -4096) return;
  futex_wake((void *)((uintptr_t)m + word[1] % PS), 1);
  SYS(__NR_munmap, m, PS, 0, 0, 0);
}

/* We are who makes room: what would wait for a frame we must not touch. */
static int back_now(uint64_t p);
static int copy_in(void *to, uint64_t from, size_t n) { /* the address may be wrong */
  if (IN_ARENA(from) && (!back_now(PAGE(from)) || !back_now(PAGE(from + n - 1)))) return -EFAULT;
  struct iovec here = {to, n}, there = {(void *)from, n};
  return sys6(__NR_process_vm_readv, SYS(__NR_getpid, 0, 0, 0, 0, 0), (long)&here, 1, (long)&there, 1, 0) == (long)n ? 0 : -EFAULT;
}
/* Where a thread's robust mutexes lie is touched. The list may change meanwhile: whoever changes it touches it too. */
static void touch_robust(uint32_t tid) {
  struct { uint64_t next; int64_t futex; uint64_t pending; } head;
  uint64_t at = 0, size;
  uint32_t word;
  if (SYS(__NR_get_robust_list, tid, &at, &size, 0, 0) < 0 || !at || copy_in(&head, at, sizeof head)) return;
  if (head.pending) copy_in(&word, (head.pending & ~1ull) + (uint64_t)head.futex, sizeof word);
  for (int i = 0; i < 2048 /* as many as the kernel looks at */ && (head.next &= ~1ull) != at; i++)
    if (copy_in(&word, head.next + (uint64_t)head.futex, sizeof word) || copy_in(&head.next, head.next, sizeof head.next)) return;
}

/* After pages were taken away, or (under mm_lock) given to the kernel: the program's threads that wait there, or hold what lies there. */
static void look_at_threads(int taken_away) {
  long dir = SYS(__NR_open, "/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0), n;
  char list[1024];
  if (dir < 0) return;
  while ((n = SYS(__NR_getdents64, dir, list, sizeof list, 0, 0)) > 0)
    for (long at = 0; at < n; at += *(uint16_t *)(void *)(list + at + 16)) {
      const char *name = list + at + 19;
      uint32_t tid = 0, ours = 0;
      for (const char *c = name; *c >= '0' && *c <= '9'; c++) tid = tid * 10 + (uint32_t)(*c - '0');
      for (int i = 0; i <= SY_SERVICE_THREADS; i++) ours |= tid == service_tid[i];
      if (!tid || ours) continue;
      wake_waiter(name);
      if (!taken_away) continue;
      lock_and_serve(); /* no fork may begin meanwhile: its end would wait for us, and our touch for its end */
      if (mode == MANAGED) touch_robust(tid);
      unlock();
    }
  SYS(__NR_close, dir, 0, 0, 0, 0);
}
