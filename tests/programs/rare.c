/* What hardly any program does. usage: rare WHAT */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char *some(size_t n) {
  return mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int all(const char *p, size_t n, char c) {
  for (size_t i = 0; i < n; i++)
    if (p[i] != c) return 0;
  return 1;
}
static void forks(void) { /* by the entries of other architectures */
  size_t n = 3 << 20;
  char *heap = malloc(n), *map = some(n);
  for (int x32 = 0; x32 < 2; x32++) {
    memset(heap, 1, n), memset(map, 2, n);
    fflush(stdout);
    long r = 0x40000000 | SYS_fork;
    if (x32) __asm__ volatile("syscall" : "+a"(r) : : "rcx", "r11", "memory");
    else __asm__ volatile("int $0x80" : "=a"(r) : "a"(2) : "r8", "r9", "r10", "r11", "memory");
    if (r < 0) {
      printf("%s: %s\n", x32 ? "x32" : "int 0x80", strerror((int)-r));
      continue;
    }
    if (!r) {
      int ok = all(heap, n, 1) && all(map, n, 2);
      memset(heap, 3, n), memset(map, 4, n);
      char *more = some(n);
      memset(more, 5, n);
      usleep(100000);
      _exit(ok && all(heap, n, 3) && all(map, n, 4) && all(more, n, 5) ? 7 : 8);
    }
    int st;
    usleep(50000);
    int mine = all(heap, n, 1) && all(map, n, 2);
    waitpid((pid_t)r, &st, 0);
    printf("%s: child %x, parent's own memory %d %d\n", x32 ? "x32" : "int 0x80", (unsigned)st, mine, all(heap, n, 1) && all(map, n, 2));
  }
}

static volatile int stop;
static double gap;
static void *touches(void *p) { /* the longest that a first touch took */
  for (char *at = p; !stop; at += 4096) {
    double t = now();
    *at = 1;
    if ((t = now() - t) > gap) gap = t;
    usleep(1000);
  }
  return NULL;
}
static void vfork_of_a_copy(void) {
  pthread_t t;
  char *p = some(256 << 20);
  pthread_create(&t, NULL, touches, p);
  usleep(50000);
  double begun = now();
  long r = syscall(SYS_clone, CLONE_VFORK | SIGCHLD, 0, 0, 0, 0);
  if (!r) {
    p[255 << 20] = 1; /* its own copy */
    usleep(1000000);
    execl("/bin/sh", "sh", "-c", "exit 9", (char *)NULL);
    _exit(1);
  }
  int waited = now() - begun > 0.9, st;
  waitpid((pid_t)r, &st, 0);
  usleep(50000);
  stop = 1;
  pthread_join(t, NULL);
  printf("%s for the child, which did %d; parent's page %d; a first touch meanwhile %s\n", waited ? "waited" : "did not wait", WEXITSTATUS(st), p[255 << 20], gap > 0.7 ? "waited too" : "went on");
}

static void *waits(void *word) {
  struct timespec t = {2, 0};
  while (!__atomic_load_n((int *)word, __ATOMIC_ACQUIRE))
    if (syscall(SYS_futex, word, FUTEX_WAIT, 0, &t, NULL, 0) && errno == ETIMEDOUT) return "lost";
  return "woken";
}
static void dropped_futex(void) {
  char *p = some(1 << 20);
  pthread_t t;
  void *r;
  memset(p, 0, 1 << 20);
  pthread_create(&t, NULL, waits, p + 4096);
  usleep(100000);
  madvise(p, 1 << 20, MADV_DONTNEED);
  __atomic_store_n((int *)(void *)(p + 4096), 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, p + 4096, FUTEX_WAKE, 1, NULL, NULL, 0);
  pthread_join(t, &r);
  puts(r);
}
static void *locks_pi(void *word) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_sec += 2;
  return syscall(SYS_futex, word, FUTEX_LOCK_PI, 0, &t, NULL, 0) ? strerror(errno) : "locked";
}
static void released_pi(void) {
  char *p = some(1 << 20);
  int end[2];
  struct iovec v = {p, 4096};
  pthread_t t;
  void *r;
  memset(p, 0, 1 << 20);
  syscall(SYS_futex, p + 8192, FUTEX_LOCK_PI, 0, NULL, NULL, 0);
  pthread_create(&t, NULL, locks_pi, p + 8192);
  usleep(100000);
  if (pipe(end) || vmsplice(end[1], &v, 1, 0) != 4096) exit(2);
  syscall(SYS_futex, p + 8192, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0);
  pthread_join(t, &r);
  puts(r);
}

static void orphan(void) { /* a vfork child whose parent is killed meanwhile: touches what is there, and what nobody has touched */
  char *p = some(64 << 20);
  memset(p, 3, 32 << 20);
  pid_t parent = getpid();
  if (!vfork()) {
    dprintf(1, "%d\n", (int)syscall(SYS_getpid));
    while (syscall(SYS_getppid) == parent) usleep(1000);
    int sum = 0;
    for (int i = 0; i < 16; i++) sum += p[i << 20], p[(32 + i) << 20] = 5, sum += p[((32 + i) << 20) + 4096];
    dprintf(1, "touched %d\n", sum);
    execl("/bin/echo", "echo", "executed", (char *)NULL);
    _exit(1);
  }
}

#define CALLERS 600
static pthread_barrier_t at_once;
static char *pages;
static void *calls(void *i) { /* past libc, so the gateway is notified */
  long r = SYS_mprotect;
  pthread_barrier_wait(&at_once);
  register long to __asm__("rdi") = (long)(uintptr_t)(pages + (long)i * 4096), n __asm__("rsi") = 4096, prot __asm__("rdx") = PROT_READ;
  __asm__ volatile("syscall" : "+a"(r) : "r"(to), "r"(n), "r"(prot) : "rcx", "r11", "memory");
  return (void *)r;
}
static void many_calls(void) {
  pthread_t t[CALLERS];
  pthread_attr_t a;
  void *r;
  char b;
  long failed = 0;
  pages = some(CALLERS * 4096), memset(pages, 1, CALLERS * 4096);
  pthread_attr_init(&a), pthread_attr_setstacksize(&a, 64 << 10);
  pthread_barrier_init(&at_once, NULL, CALLERS + 1);
  for (long i = 0; i < CALLERS; i++)
    if (pthread_create(&t[i], &a, calls, (void *)i)) exit(2);
  if (write(1, "there\n", 6) != 6 || read(0, &b, 1) != 1) exit(2);
  pthread_barrier_wait(&at_once);
  for (long i = 0; i < CALLERS; i++) pthread_join(t[i], &r), failed += r != NULL;
  if (read(0, &b, 1) != 1) exit(2);
  printf("failed: %ld\n", failed);
}

static void go_on(const char *said) {
  char b;
  if (write(1, said, strlen(said)) < 0 || read(0, &b, 1) != 1) exit(2);
}
#define TOUCHED 40000
static void many_mappings(void) { /* every second page, so that no two frames share one */
  char *p = some(TOUCHED * 8192);
  int bad = 0, there = 0;
  for (int i = 0; i < TOUCHED; i++) mprotect(p + i * 8192 + 4096, 4096, PROT_NONE);
  go_on("there\n");
  for (int i = 0; i < TOUCHED; i++) *(int *)(void *)(p + i * 8192) = i + 1;
  for (int i = 0; i < TOUCHED; i++) bad += *(int *)(void *)(p + i * 8192) != i + 1;
  for (int i = TOUCHED - 500; i < TOUCHED; i++) /* native ones */
    madvise(p + i * 8192, 4096, MADV_DONTNEED), there += *(int *)(void *)(p + i * 8192), *(int *)(void *)(p + i * 8192) = i + 1;
  printf("wrong: %d, dropped and still there: %d\n", bad, there), fflush(stdout);
  go_on("");
  madvise(p, 4096, MADV_DONTNEED); /* a frame: what comes instead needs another mapping */
  printf("then %d\n", *(int *)(void *)p), fflush(stdout);
  go_on("");
  char *more = some(1 << 20);
  memset(more, 1, 1 << 20);
  for (int i = 1; i < TOUCHED; i++) bad += *(int *)(void *)(p + i * 8192) != i + 1;
  printf("wrong: %d, unmapped %d\n", bad, munmap(p, TOUCHED * 8192));
}

static void half_a_release(void) { /* the test sets a limit meanwhile, of which twenty pieces do not fit beside what is there */
  pthread_t t;
  char *piece[20], *p;
  int end[2];
  for (int i = 0; i < 20; i++) {
    piece[i] = (char *)memset(some(2 << 20), i + 1, 2 << 20);
    if (i % 2) mprotect(piece[i], 2 << 20, PROT_READ); /* one by one, not all in one piece; and the limit does not count these */
  }
  p = some(64 << 20);
  if (pipe(end)) exit(2);
  pthread_create(&t, NULL, touches, p);
  for (int limited = 1; limited >= 0; limited--) {
    go_on("there\n");
    int wrong = 0, later = 0;
    struct iovec v = {piece[0], 4096};
    long r = vmsplice(end[1], &v, 1, 0);
    const char *said = r < 0 ? strerror(errno) : "done";
    for (int i = 0; i < 20; i++) wrong += !all(piece[i], 2 << 20, (char)(i + 1)), memset(piece[i & ~1], (i & ~1) + 1, 2 << 20);
    gap = 0, usleep(100000);
    later = gap > 0 && gap < 2;
    printf("vmsplice: %s, wrong: %d, touches go on: %d\n", said, wrong, later), fflush(stdout);
  }
  stop = 1, pthread_join(t, NULL);
}

static void slow_child(void) { /* the test kills the parent, and stops the child, while it copies */
  size_t n = 128 << 20;
  char *p = memset(some(n), 7, n);
  go_on("there\n");
  if (!fork()) dprintf(1, all(p, n, 7) ? "intact\n" : "lost\n"), _exit(0);
  for (;;) pause();
}

static void released_child(void) { /* what its parent had in the store counts in the child, which touches nothing else, while it is released */
  size_t n = 32 << 20, more = 128 << 20;
  volatile unsigned *b = memset(some(n), 0, n);
  memset(some(more), 1, more);
  if (fork()) {
    int st;
    wait(&st);
    exit(st != 0);
  }
  dprintf(1, "%d\n", (int)getpid());
  unsigned i = 0, lost = 0;
  for (double end = now() + 3; now() < end; i++)
    for (size_t k = 0; k < n / 4; k += 1024) b[k]++;
  for (size_t k = 0; k < n / 4; k += 1024) lost += b[k] != i;
  dprintf(1, "%u pages have lost counts\n", lost);
  _exit(0);
}

static void shared_at_the_limit(void) { /* a child drops shared pages that it may only read, where the kernel allows no further mapping */
  size_t n = 4 << 20, step = 8192, many = 80000;
  char *p = memset(some(n), 7, n);
  if (fork()) {
    int st;
    wait(&st);
    printf("child %x\n", (unsigned)st);
    return;
  }
  mprotect(p, n, PROT_READ);
  go_on("there\n");
  char *q = mmap(NULL, many * step, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  size_t k = 0;
  while (k < many && !mprotect(q + k * step, 4096, PROT_READ)) k++;
  size_t at = n / 2 + 65536, d = 3 * 4096; /* in the middle of one mapping, whichever pieces it is in */
  int r = madvise(p + at, d, MADV_DONTNEED), zeros = all(p + at, d, 0);
  munmap(q, many * step);
  int others = all(p, at, 7) && all(p + at + d, n - at - d, 7);
  mprotect(p, n, PROT_READ | PROT_WRITE), memset(p, 9, n);
  dprintf(1, "full: %d, dropped: %d, zeros: %d, others: %d, then %d\n", k < many, r, zeros, others, all(p, n, 9));
  _exit(0);
}

static long raw(long nr, long a, long b, long c, long d, long e) { /* past libc */
  long r;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  __asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
  return r;
}
static void *fills(void *more) { /* wants frames all the time: all that there are, and more */
  for (volatile char *b = more; !stop;)
    for (size_t i = 0; i < 96 << 20 && !stop; i += 4096) b[i]++;
  return NULL;
}
static void arguments_away(void) { /* of calls past libc, in memory that is in the store, or was never touched, while there is hardly a frame */
  enum { PAGES = 1024 };
  char *more = some(96 << 20), *to = mmap(NULL, 65536, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), *untouched = some(PAGES * 4096);
  uint64_t *args = (void *)some(PAGES * 4096);
  char *moved = some(PAGES * 4096);
  pthread_t t[2];
  int wrong[4] = {0};
  for (int i = 0; i < PAGES; i++) args[i * 512] = args[i * 512 + 1] = ~0ull, args[i * 512 + 2] = (uint64_t)i, moved[i * 4096] = (char)i;
  for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, fills, more);
  usleep(500000);
  for (int i = 0; i < PAGES; i += 4) {
    uint64_t *here = args + i * 512;
    wrong[0] += raw(SYS_prlimit64, 0, 9 /* RLIMIT_AS */, (long)here, 0, 0) != 0 || here[2] != (uint64_t)i;
    unsigned char *vec = (unsigned char *)(here + 512);
    wrong[1] += raw(SYS_mincore, (long)here, 4096, (long)vec, 0, 0) != 0 || vec[0] > 1 || here[512 + 2] != (uint64_t)i + 1;
    vec = (unsigned char *)untouched + i * 4096;
    wrong[2] += raw(SYS_mincore, (long)here, 4096, (long)vec, 0, 0) != 0 || vec[0] > 1 || vec[1];
    wrong[3] += raw(SYS_mremap, (long)(moved + i * 4096), 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, (long)to) != (long)to || *to != (char)i;
  }
  stop = 1;
  for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
  printf("wrong: %d %d %d %d\n", wrong[0], wrong[1], wrong[2], wrong[3]);
}

int main(int argc, char **argv) {
  static const struct { const char *name; void (*fn)(void); } what[] = {{"forks", forks}, {"vfork_of_a_copy", vfork_of_a_copy}, {"dropped_futex", dropped_futex}, {"released_pi", released_pi}, {"orphan", orphan}, {"many_calls", many_calls}, {"many_mappings", many_mappings}, {"half_a_release", half_a_release}, {"slow_child", slow_child}, {"released_child", released_child}, {"shared_at_the_limit", shared_at_the_limit}, {"arguments_away", arguments_away}};
  for (unsigned i = 0; argc > 1 && i < sizeof what / sizeof *what; i++)
    if (!strcmp(what[i].name, argv[1])) what[i].fn();
  return 0;
}
