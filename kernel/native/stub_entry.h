/* stub, part 6: how programs come in — the patched system call sites of libc, exec, and the start. */

/* ---------------------------------------------------------------- joining */
static int start_thread(void (*fn)(long), long arg, char *stack_top, uint64_t flags) {
  long *sp = (long *)(((uintptr_t)stack_top & ~15ul) - 16);
  sp[0] = (long)fn, sp[1] = arg;
  long r;
  register long r10 __asm__("r10") = 0;
  register long r8 __asm__("r8") = 0;
  register long r9 __asm__("r9") = SY_MARK;
  __asm__ volatile("syscall\n"
                   "test %%rax,%%rax\n"
                   "jnz 1f\n"
                   "xor %%ebp,%%ebp\n"
                   "pop %%rax\n"
                   "pop %%rdi\n"
                   "call *%%rax\n"
                   "hlt\n"
                   "1:\n"
                   : "=a"(r) : "a"((long)__NR_clone), "D"(flags), "S"(sp), "d"(0L), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return (int)r;
}

/* After mlockall(MCL_FUTURE) the kernel would fill the arena as soon as it is mapped. */
static int fills_at_once(void) {
  uint8_t there = 0;
  long p = sys_mmap(0, PS, RW, ANON, -1, 0);
  if (p < 0 && p > -4096) return 1;
  SYS(__NR_mincore, p, PS, &there, 0, 0);
  SYS(__NR_munmap, p, PS, 0, 0, 0);
  return there & 1;
}
/* Reserves the arena and starts the service threads. mm_lock is held, all signals are blocked (the threads inherit that). */
static int attach(void) {
  uint64_t a[2][2] = {{brk_floor, SY_BRK_PAGES}, {mmap_floor, SY_ARENA_PAGES}};
  if ((int)SYS(__NR_getpid, 0, 0, 0, 0, 0) != owner_pid) return 0; /* a vfork child: its threads would be another process's */
  if (mmap_floor > SY_ARENA_PAGES - SY_ARENA_PAGES / 4) return mode = NATIVE, 0; /* after very many generations of forks */
  if (fills_at_once()) return mode = NATIVE, 0;
  if (!attr) {
    long at = sys_mmap(0, TABLE_BYTES, RW, ANON, -1, 0);
    if (at < 0 && at > -4096) return mode = NATIVE, 0;
    SYS(__NR_madvise, at, TABLE_BYTES, MADV_DONTDUMP, 0, 0);
    attr = (uint8_t *)at;
    charged = (uint64_t *)(at + SY_ARENA_PAGES), noreserve = charged + SY_ARENA_PAGES / 64, mergeable = noreserve + SY_ARENA_PAGES / 64;
  }
  for (int i = 0; i < 2; i++)
    if (sys_mmap(VA(a[i][0]), (a[i][1] - a[i][0]) * PS, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0) != (long)VA(a[i][0])) {
      if (i) SYS(__NR_munmap, VA(a[0][0]), (a[0][1] - a[0][0]) * PS, 0, 0, 0);
      return mode = NATIVE, 0;
    }
  STORE(join_state, 0);
  int t = start_thread(command_thread, 0, cmd_stack + sizeof cmd_stack, THREAD);
  if (t < 0) STORE(join_state, 2);
  while (!LOAD(join_state)) futex_wait(&join_state, 0, 1000, 0);
  if (LOAD(join_state) == 1) return 1;
  if (no_limits_left) {
    say("sylvie: this enclave has no more limits to give: the program ends\n");
    SYS(__NR_exit_group, 125, 0, 0, 0, 0);
  }
  mode = NATIVE;
  for (int i = 0; i < 2; i++) SYS(__NR_munmap, VA(a[i][0]), (a[i][1] - a[i][0]) * PS, 0, 0, 0);
  return 0;
}
/* Is the enclave to serve this call that maps n bytes anew? */
static int ready(uint64_t bytes) {
  if (mode == MANAGED) return 1;
  if (mode == LAZY) return attach();
  if (mode == FORKED && (forked_bytes += bytes) >= ATTACH_AFTER_FORK) return attach();
  return 0;
}

/* ---------------------------------------------------------------- dispatch */
/* brk before or without the enclave. Once libc's heap has begun natively it stays so, but for what a forked child inherited, or a release
 * left: that heap lies in the arena, and grows there natively. */
static long brk_unmanaged(uintptr_t want) {
  if (!brk_cur) {
    if (mode != OFF && want) brk_native = 1;
    return SYS(__NR_brk, want, 0, 0, 0, 0);
  }
  if (want < brk_start || want > VA(SY_BRK_PAGES)) return (long)brk_cur;
  uint64_t cur = PAGE(UP(brk_cur)), new = PAGE(UP(want));
  if (new > cur) {
    long r = sys_mmap(VA(cur), (new - cur) * PS, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0);
    if (r != (long)VA(cur)) return (long)brk_cur;
    if (attr) memset(attr + cur, A_OF(RW), new - cur);
  } else if (new < cur) {
    SYS(__NR_munmap, VA(new), (cur - new) * PS, 0, 0, 0);
    if (attr) memset(attr + new, 0, cur - new), uncharge(new, cur - new);
  }
  brk_floor = brk_hi = new;
  brk_cur = want;
  return (long)brk_cur;
}

/* An address outside the arena that the program would like, but need not get, as mimalloc asks for each of its segments. Below a
 * TiB, and for reservations without access, it may mean more: compressed pointers, a heap that is to stay in one piece. */
static int mere_hint(const long *a) { return !(a[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE)) && a[2] == RW && (uint64_t)a[0] >= 1ull << 40; }
/* Does this mmap have nothing to do with the arena? */
static int not_ours(const long *a) {
  if (IN_ARENA(a[0]) && (a[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE))) return 0;
  return !eligible(a[2], a[3]) || (a[0] && !IN_ARENA(a[0]) && !mere_hint(a)) || (uint64_t)a[1] > SY_ARENA_SIZE;
}
/* A call on a range that is of one kind; see in_parts. */
static long one_part(long nr, long *a) {
  switch (nr) {
  case __NR_mprotect: return do_mprotect((uintptr_t)a[0], (uint64_t)a[1], (int)a[2], nr, 0);
  case __NR_pkey_mprotect: return do_mprotect((uintptr_t)a[0], (uint64_t)a[1], (int)a[2], nr, (int)a[3]);
  case __NR_madvise: return do_madvise((uintptr_t)a[0], (uint64_t)a[1], (int)a[2]);
  case __NR_mincore: return do_mincore((uintptr_t)a[0], (uint64_t)a[1], (uint8_t *)a[2]);
  default: return do_mlock((uintptr_t)a[0], (uint64_t)a[1], nr, a[2]);
  }
}
/* A range may begin in what a forked child inherited, or in a mapping of the program's own, and end in managed memory: piece by piece, in
 * order, up to the first that fails; ENOMEM of madvise (something in it is not mapped) is said at the end. */
static long in_parts(long nr, long *a) {
  uint64_t p = PAGE(a[0]), n = (UP(a[0] + a[1]) - ((uint64_t)a[0] & ~(PS - 1))) / PS;
  long r = 0;
  if (!n || p + n > SY_ARENA_PAGES) return one_part(nr, a);
  for (uint64_t done = 0, k; done < n; done += k) {
    for (k = 1; done + k < n && !((attr[p + done + k] ^ attr[p + done]) & A_FOREIGN) && is_native(p + done + k) == is_native(p + done);) k++;
    uint64_t from = done ? VA(p + done) : (uint64_t)a[0], to = done + k == n ? (uint64_t)(a[0] + a[1]) : VA(p + done + k);
    long r1 = one_part(nr, (long[]){(long)from, (long)(to - from), a[2] + (nr == __NR_mincore ? (long)done : 0), a[3], a[4], a[5]});
    if (r1 && !(nr == __NR_madvise && r1 == -ENOMEM)) return r1;
    if (r1) r = r1;
  }
  return r;
}

static long memory_call(long nr, long *a) {
  switch (nr) {
  case __NR_mmap:
    if (not_ours(a)) break;
    if (IN_ARENA(a[0]) && (a[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE)) ? mode != MANAGED : !ready(UP(a[1]))) break;
    return do_mmap(a);
  case __NR_brk:
    if (brk_native) break;
    if (mode == FORKED && a[0] && (uint64_t)a[0] <= brk_cur) return brk_unmanaged((uintptr_t)a[0]);
    return ready(mode == FORKED && (uint64_t)a[0] > brk_cur ? (uint64_t)a[0] - brk_cur : 0) ? do_brk((uintptr_t)a[0]) : brk_unmanaged((uintptr_t)a[0]);
  }
  if (mode != MANAGED) { /* FORKED or NATIVE: what is in the arena is the kernel's */
    long r = straight_on(nr, a);
    if (mode == FORKED && nr == __NR_munmap && !r && IN_ARENA(a[0]) && (uint64_t)a[1] <= SY_ARENA_START + SY_ARENA_SIZE - (uint64_t)a[0]) uncharge(PAGE(a[0]), UP(a[1]) / PS);
    return r;
  }
  /* more than the arena: no such range is mapped (and no sum below may wrap) */
  if (nr != __NR_mmap && nr != __NR_brk && ((uint64_t)a[1] > SY_ARENA_SIZE || (nr == __NR_mremap && (uint64_t)a[2] > SY_ARENA_SIZE)))
    return nr == __NR_munmap || (nr == __NR_mremap && (uint64_t)a[1] > SY_ARENA_SIZE) || (nr == __NR_madvise && (uint64_t)a[0] + (uint64_t)a[1] < (uint64_t)a[0]) ? -EINVAL : -ENOMEM;
  switch (nr) {
  case __NR_munmap: return do_munmap((uintptr_t)a[0], (uint64_t)a[1]);
  case __NR_mremap: return do_mremap((uintptr_t)a[0], (uint64_t)a[1], (uint64_t)a[2], a[3], (uintptr_t)a[4]);
  case __NR_mprotect: case __NR_pkey_mprotect: case __NR_madvise: case __NR_mincore: case __NR_mlock: case __NR_mlock2: case __NR_munlock: return in_parts(nr, a);
  case __NR_mseal: return -EPERM;
  }
  return straight_on(nr, a);
}
/* One memory call; mm_lock held. It may come from libc's sites, or past them by way of the gateway. */
static long emulate(long nr, long *a) {
  long r = memory_call(nr, a);
  if (mode == MANAGED) ctl->pages_committed = committed;
  return r;
}

/* Registers of the thread at the system call site, as sy_entry pushed them. */
struct regs { long a[6]; long new_sp; long ret; };

/* exit of one thread. Our service threads would keep a process alive whose last thread leaves this way (a child made by clone() whose
 * function returns, say), so that one ends the process. */
static long exit_thread(long status) {
  int pid = (int)SYS(__NR_getpid, 0, 0, 0, 0, 0), me = (int)SYS(__NR_gettid, 0, 0, 0, 0, 0);
  uint64_t all = ~0ull;
  struct stat st;
  if (service_threads && pid == owner_pid) {
    SYS(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &all, 0, 8, 0);
    lock();
    /* One at a time, or the last two would take each other for a thread that stays. */
    for (int tries = 0; left_last && left_last != pid && tries < 10000 && SYS(__NR_tgkill, pid, left_last, 0, 0, 0) == 0; tries++) nap(100);
    if (me == pid) leader_gone = 1;
    /* left are: this one, the service threads, and the first thread, which stays visible when it has ended */
    if (SYS(__NR_newfstatat, -100 /* AT_FDCWD */, "/proc/self/task", &st, 0, 0) == 0 && st.st_nlink == 2 + 1 + service_threads + (leader_gone && me != pid))
      SYS(__NR_exit_group, status, 0, 0, 0, 0);
    left_last = me;
    unlock();
  }
  return SYS(__NR_exit, status, 0, 0, 0, 0);
}

static long exec_managed(long nr, struct regs *r);

long sy_dispatch(struct regs *r, long nr);
long __attribute__((used)) sy_dispatch(struct regs *r, long nr) {
  long *a = r->a, ret;
  uint64_t all = ~0ull, old;
  r->new_sp = 0;
  /* For good; and the program may have forbidden itself what would be done here (seccomp). */
  if (LOAD(mode) == NATIVE && nr != __NR_execve && nr != __NR_execveat && nr != __NR_clone && nr != __NR_fork && nr != __NR_brk && nr != __NR_exit)
    return straight_on(nr, a);
  switch (nr) { /* what is none of our business goes straight on */
  case __NR_execve: case __NR_execveat: return exec_managed(nr, r);
  case __NR_exit: return exit_thread(a[0]);
  case __NR_mmap:
    if (not_ours(a)) return straight_on(nr, a);
    break;
  case __NR_brk: case __NR_clone: case __NR_fork: break;
  default:
    if (nr == __NR_munmap && (uint64_t)a[0] < SY_ARENA_START && (uint64_t)a[0] + (uint64_t)a[1] > SY_ARENA_START && mode == MANAGED) return -EINVAL;
    /* a key is a property of the kernel's mapping: unmarked, so that the gateway has the memory made the kernel's first */
    if (nr == __NR_pkey_mprotect && IN_ARENA(a[0]) && (int)a[3] != -1 && mode == MANAGED) return sys6(nr, a[0], a[1], a[2], a[3], 0, 0);
    if (!IN_ARENA(a[0]) && !(nr == __NR_mremap && (a[3] & MREMAP_FIXED) && IN_ARENA(a[4]) && mode == MANAGED)) return straight_on(nr, a);
  }
  SYS(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &all, &old, 8, 0);
  lock();
  if (nr == __NR_clone || nr == __NR_fork) {
    long stack = nr == __NR_clone ? a[1] : 0;
    ret = do_fork(nr == __NR_clone ? a[0] : SIGCHLD, a[2], a[3], a[4]);
    if (ret == 0) r->new_sp = stack;
  } else
    ret = emulate(nr, a);
  struct fill f = to_fill();
  unlock();
  if (f.p < f.end && (ret == 0 || nr == __NR_mmap)) {
    long e = fill_now(f);
    if (e < 0 && nr != __NR_mmap) ret = nr == __NR_madvise ? e : e == -EFAULT ? -ENOMEM : -EAGAIN; /* as mm/mlock.c */
  }
  SYS(__NR_rt_sigprocmask, 2, &old, 0, 8, 0);
  return ret;
}

/* Comes from a site by a jump: rax = number, r11 = where to go on; arguments as in a system call. As a system call it changes rax, rcx
 * and r11 only. The caller's red zone is left alone. */
void sy_entry(void);
void sy_entry_any(void);
__asm__(".text\n.hidden sy_entry\n.globl sy_entry\n.type sy_entry,@function\n"
        "sy_entry:\n"
        ".cfi_startproc\n .cfi_def_cfa rsp,0\n .cfi_register rip,r11\n" /* debuggers and profilers unwind to the site in libc */
        "lea -128(%rsp),%rsp\n .cfi_adjust_cfa_offset 128\n"
        "push %r11\n .cfi_adjust_cfa_offset 8\n .cfi_rel_offset rip,0\n"
        "push $0\n push %r9\n push %r8\n push %r10\n push %rdx\n push %rsi\n push %rdi\n .cfi_adjust_cfa_offset 56\n"
        "mov %rsp,%rdi\n mov %rax,%rsi\n"
        "push %rbp\n .cfi_adjust_cfa_offset 8\n .cfi_rel_offset rbp,0\n"
        "mov %rsp,%rbp\n .cfi_def_cfa_register rbp\n and $-16,%rsp\n cld\n"
        "call sy_dispatch\n .cfi_endproc\n"
        "mov %rbp,%rsp\n pop %rbp\n"
        "pop %rdi\n pop %rsi\n pop %rdx\n pop %r10\n pop %r8\n pop %r9\n pop %rcx\n pop %r11\n"
        "lea 128(%rsp),%rsp\n"
        "test %rcx,%rcx\n cmovnz %rcx,%rsp\n" /* the child of a clone with a stack of its own */
        "jmp *%r11\n");

/* From libc's syscall(): any number may come. Ours, and clone without CLONE_VM, go the same way; the rest is called here, on whatever
 * stack, and goes back by an address that is not in a register (a new thread has none of ours). */
void *sy_syscall_back __attribute__((visibility("hidden")));
#define OURS(nr) "cmp $" #nr ",%eax\n je 2f\n"
__asm__(".text\n.hidden sy_entry_any\n.globl sy_entry_any\n.type sy_entry_any,@function\n"
        "sy_entry_any:\n" OURS(9) OURS(10) OURS(11) OURS(12) OURS(25) OURS(27) OURS(28) OURS(57) OURS(59) OURS(60) OURS(149) OURS(150) OURS(322)
        OURS(325) OURS(329) OURS(462)
        "cmp $56,%eax\n jne 1f\n test $0x100,%edi\n jz 2f\n"
        "1: syscall\n jmp *sy_syscall_back(%rip)\n"
        "2: mov sy_syscall_back(%rip),%r11\n jmp sy_entry\n");

/* ---------------------------------------------------------------- exec */
/* How many variables there are; -EFAULT if the array, or what one of its pointers points to, is not there. */
static long count_env(char **env) {
  struct iovec each[32], there, here;
  char *some[32], byte[32];
  int pid = (int)SYS(__NR_getpid, 0, 0, 0, 0, 0);
  for (long n = 0;; n += 32) {
    here = (struct iovec){some, sizeof some}, there = (struct iovec){env + n, sizeof some};
    long got = sys6(__NR_process_vm_readv, pid, (long)&here, 1, (long)&there, 1, 0) / (long)sizeof *some, k = 0;
    while (k < got && some[k]) each[k] = (struct iovec){some[k], 1}, k++;
    here = (struct iovec){byte, (size_t)k};
    if (k && sys6(__NR_process_vm_readv, pid, (long)&here, 1, (long)each, k, 0) != k) return -EFAULT;
    if (k < got) return n + k;
    if (got < 32) return -EFAULT;
  }
}
/* The new image must find the stub again: what the launcher had added to the environment, and the start took out, goes back in. */
static long exec_managed(long nr, struct regs *r) {
  long *a = r->a;
  char **env = (char **)(nr == __NR_execve ? a[2] : a[3]);
  size_t n = 0;
  if (mode == OFF) return straight_on(nr, a);
  if (LOAD(mode) == NATIVE) /* it may have forbidden itself to ask */
    while (env && env[n]) n++;
  else if (env) {
    long there = count_env(env);
    if (there < 0) return there;
    n = (size_t)there;
  }
  if (n > 30000) return straight_on(nr, a); /* beyond any sane stack: natively */
  /* A small stack may be all there is (posix_spawn's child has 32 KiB): much goes elsewhere, and below vfork stays with the parent. */
  char *mark = mark_env, *few[n > 2000 ? 1 : n + 3], **out = few, pre[sizeof preload_env + 1024];
  uint64_t much = n > 2000 ? UP((n + 3) * sizeof *out) : 0;
  if (much) {
    long at = sys_mmap(0, much, RW, ANON, -1, 0);
    if (at < 0 && at > -4096) return at;
    out = (char **)at;
  }
  pre[0] = 0;
  append(pre, sizeof pre, "LD_PRELOAD=");
  append(pre, sizeof pre, stub_path);
  size_t k = 0;
  for (size_t i = 0; i < n; i++) {
    if (starts(env[i], "_SYLVIE=")) { /* `sylvie run` inside a managed program: it says which enclave. Nobody leaves a limit so */
      const char *at = env[i] + 8;
      if (starts(at, "ksm:")) at += len("ksm:");
      if (starts(at, "overcommit:")) at += len("overcommit:");
      while (*at && *at != '/') at++;
      if (!limit_frames || !starts(at, sock_path)) mark = env[i];
      continue;
    }
    if (starts(env[i], "LD_PRELOAD=")) {
      if (len(env[i]) > 1000) {
        if (much) SYS(__NR_munmap, out, much, 0, 0, 0);
        return straight_on(nr, a);
      }
      if (!starts(env[i] + 11, stub_path)) append(pre, sizeof pre, ":"), append(pre, sizeof pre, env[i] + 11);
      continue;
    }
    out[k++] = env[i];
  }
  out[k++] = pre, out[k++] = mark, out[k] = 0;
  long failed = nr == __NR_execve ? SYS(nr, a[0], a[1], out, 0, 0) : SYS(nr, a[0], a[1], a[2], out, a[4]);
  if (much) SYS(__NR_munmap, out, much, 0, 0, 0);
  return failed;
}

/* ---------------------------------------------------------------- the sites */
/* libc's functions that make the calls; found by the instructions `mov $NR,%eax; syscall` near their entry, which are seven bytes: room
 * for a jump. libc keeps everything around the call: errno, __curbrk, the thread's state after fork. */
#define WEAK(f) extern char libc_##f[] __asm__(#f) __attribute__((weak, visibility("default")))
WEAK(mmap); WEAK(munmap); WEAK(mremap); WEAK(madvise); WEAK(mprotect); WEAK(pkey_mprotect); WEAK(brk); WEAK(mlock); WEAK(mlock2); WEAK(munlock);
WEAK(mincore); WEAK(mseal); WEAK(_Fork); WEAK(fork); WEAK(clone); WEAK(execve); WEAK(execveat); WEAK(fexecve); WEAK(syscall);
extern void *__curbrk __attribute__((weak, visibility("default")));
void *dlsym(void *, const char *) __attribute__((weak, visibility("default")));

#define THUNK 64
#define MAX_SITES 32
static uint8_t thunks[4096] __attribute__((aligned(4096), section(".text.thunks,\"ax\",@progbits#"))) = {0xcc};
static int n_thunks;

static void put64(uint8_t **t, const void *v) {
  uint64_t x = (uint64_t)(uintptr_t)v;
  memcpy(*t, &x, 8);
  *t += 8;
}
static void bytes(uint8_t **t, const char *b, size_t n) {
  memcpy(*t, b, n);
  *t += n;
}
static int patch(const char *name, uint8_t *f, long nr, int reach, int is_syscall) {
  for (int tries = 0; tries < 2; tries++) {
    for (int i = 0; f && i < reach; i++) {
      uint32_t imm = (uint32_t)nr;
      int hit = is_syscall ? f[i] == 0x4c && f[i + 1] == 0x8b && f[i + 2] == 0x4c && f[i + 3] == 0x24 && f[i + 4] == 8
                           : f[i] == 0xb8 && f[i + 1] == (uint8_t)imm && f[i + 2] == (uint8_t)(imm >> 8) && !f[i + 3] && !f[i + 4];
      if (!hit || f[i + 5] != 0x0f || f[i + 6] != 0x05) continue;
      uint8_t *site = f + i, *back = site + 7, *t = thunks + n_thunks * THUNK, *start = t;
      int64_t rel = start - (site + 5);
      if (n_thunks == MAX_SITES || rel != (int32_t)rel) return -1;
      if (is_syscall) { /* any number may come: ours to sy_entry, the rest goes on here */
        sy_syscall_back = back;
        bytes(&t, "\x4c\x8b\x4c\x24\x08", 5);            /* mov 8(%rsp),%r9 */
        bytes(&t, "\xff\x25\0\0\0\0", 6), put64(&t, (void *)sy_entry_any);
      } else {
        if (nr == __NR_clone) { /* threads and vfork: straight on, on whatever stack */
          bytes(&t, "\xf7\xc7\0\x01\0\0\x74\x15", 8); /* test $CLONE_VM,%edi; jz managed */
          bytes(&t, "\xb8\x38\0\0\0\x0f\x05\xff\x25\0\0\0\0", 13), put64(&t, back);
        }
        bytes(&t, "\xb8", 1), bytes(&t, (const char *)&imm, 4); /* mov $nr,%eax */
        bytes(&t, "\x49\xbb", 2), put64(&t, back);              /* mov $back,%r11 */
        bytes(&t, "\xff\x25\0\0\0\0", 6), put64(&t, (void *)sy_entry);
      }
      uint8_t *page = (uint8_t *)((uintptr_t)site & ~(PS - 1));
      if (SYS(__NR_mprotect, page, 2 * PS, PROT_READ | PROT_WRITE | PROT_EXEC, 0, 0) < 0) return -1;
      int32_t r32 = (int32_t)rel;
      site[0] = 0xe9, memcpy(site + 1, &r32, 4), site[5] = 0x0f, site[6] = 0x0b; /* jmp thunk; ud2 */
      SYS(__NR_mprotect, page, 2 * PS, PROT_READ | PROT_EXEC, 0, 0);
      return n_thunks++;
    }
    /* Not libc's own: an interposed function, or the executable's PLT. Ask for the next one. */
    f = dlsym ? dlsym((void *)-1 /* RTLD_NEXT */, name) : 0;
  }
  return -1;
}

/* ---------------------------------------------------------------- start */
static void patch_all(void) {
  SYS(__NR_mprotect, thunks, sizeof thunks, PROT_READ | PROT_WRITE | PROT_EXEC, 0, 0);
  int ok = patch("mmap", (void *)libc_mmap, __NR_mmap, 64, 0) >= 0;
  ok &= patch("munmap", (void *)libc_munmap, __NR_munmap, 32, 0) >= 0;
  ok &= patch("mremap", (void *)libc_mremap, __NR_mremap, 128, 0) >= 0;
  ok &= patch("madvise", (void *)libc_madvise, __NR_madvise, 32, 0) >= 0;
  ok &= patch("mprotect", (void *)libc_mprotect, __NR_mprotect, 32, 0) >= 0;
  if (patch("_Fork", (void *)libc__Fork, __NR_clone, 128, 0) < 0) ok &= patch("fork", (void *)libc_fork, __NR_clone, 1024, 0) >= 0;
  ok &= patch("clone", (void *)libc_clone, __NR_clone, 128, 0) >= 0;
  patch("clone", (void *)libc_clone, __NR_exit, 128, 0); /* where its function has returned */
  ok &= patch("execve", (void *)libc_execve, __NR_execve, 32, 0) >= 0;
  if (&__curbrk && !__curbrk)
    ok &= patch("brk", (void *)libc_brk, __NR_brk, 32, 0) >= 0;
  else
    brk_native = 1;
  patch("syscall", (void *)libc_syscall, 0, 64, 1);
  patch("pkey_mprotect", (void *)libc_pkey_mprotect, __NR_pkey_mprotect, 64, 0);
  patch("mlock", (void *)libc_mlock, __NR_mlock, 32, 0);
  patch("mlock2", (void *)libc_mlock2, __NR_mlock2, 96, 0);
  patch("munlock", (void *)libc_munlock, __NR_munlock, 32, 0);
  patch("mincore", (void *)libc_mincore, __NR_mincore, 96, 0);
  if (libc_mseal) patch("mseal", (void *)libc_mseal, __NR_mseal, 64, 0);
  if (libc_execveat) patch("execveat", (void *)libc_execveat, __NR_execveat, 96, 0);
  if (libc_fexecve) patch("fexecve", (void *)libc_fexecve, __NR_execveat, 160, 0);
  SYS(__NR_mprotect, thunks, sizeof thunks, PROT_READ | PROT_EXEC, 0, 0);
  mode = ok ? LAZY : NATIVE; /* a libc we do not know: what is patched passes everything through */
}

/* The first code of the image after the loader (-z initfirst): libc has no heap yet. */
__attribute__((constructor)) static void start(int argc, char **argv, char **env) {
  char *sock = 0, *pre = 0;
  int at = -1;
  (void)argc, (void)argv;
  if (!env) return;
  for (int i = 0; env[i]; i++) {
    if (starts(env[i], "_SYLVIE=")) sock = env[i] + 8;
    if (starts(env[i], "LD_PRELOAD=")) pre = env[i] + 11, at = i;
  }
  const char *whole = sock;
  if (sock && (merge_all = starts(sock, "ksm:"))) sock += len("ksm:");
  if (sock && (overcommit = starts(sock, "overcommit:"))) sock += len("overcommit:");
  if (sock && *sock != '/') { /* FRAMES.GROUP@socket: see launch.c */
    for (; *sock >= '0' && *sock <= '9'; sock++) limit_frames = limit_frames * 10 + (uint32_t)(*sock - '0');
    for (sock += *sock == '.'; *sock && *sock != '@'; sock++) limit_group = limit_group << 4 | (uint64_t)(*sock <= '9' ? *sock - '0' : *sock - 'a' + 10);
    sock += *sock == '@';
  }
  if (!sock || !pre || len(sock) >= sizeof sock_path) return;
  append(mark_env, sizeof mark_env, "_SYLVIE=");
  append(mark_env, sizeof mark_env, whole);
  append(sock_path, sizeof sock_path, sock);
  size_t n = 0; /* the first of LD_PRELOAD is us */
  while (pre[n] && pre[n] != ':' && pre[n] != ' ') n++;
  if (n >= sizeof stub_path) return;
  memcpy(stub_path, pre, n);
  /* The program sees the environment that it would see without us. */
  if (pre[n]) {
    char *d = env[at] + 11;
    const char *s = pre + n + 1;
    while ((*d++ = *s++)) {
    }
    at = -1;
  }
  int k = 0;
  for (int i = 0; env[i]; i++)
    if (i != at && !starts(env[i], "_SYLVIE=")) env[k++] = env[i];
  env[k] = 0;
  find_main_cpu(0);
  owner_pid = (int)SYS(__NR_getpid, 0, 0, 0, 0, 0);
  patch_all();
}
