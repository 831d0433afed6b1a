/* What broke once, and is as it is natively now. usage: once_broken WHICH */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define PS 4096ul
#define HUGE (2ul << 20)

static char *map(size_t n) { return mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

/* A forked child that has joined trims the heap that it inherited, and lets it grow again. */
static void trimmed_heap(void) {
  static char *b[128];
  for (int i = 0; i < 128; i++) memset(b[i] = malloc(64 << 10), 1, 64 << 10);
  pid_t p = fork();
  if (!p) {
    memset(malloc(1 << 20), 2, 1 << 20);
    for (int i = 127; i >= 0; i--) free(b[i]);
    for (int i = 0; i < 128; i++) memset(b[i] = malloc(64 << 10), 3, 64 << 10);
    _exit(0);
  }
  int st;
  waitpid(p, &st, 0);
  printf("child %d\n", st);
}

/* A part of a 2 MiB block is purged while somebody reads the rest: what was purged is zero, and nobody else's. */
static char *volatile block;
static volatile int stop;
static void *reads(void *x) {
  unsigned s = 1;
  for (volatile char c = 0; !stop;) {
    char *b = block;
    if (b) s = s * 1103515245 + 12345, c += ((volatile char *)b)[(256 + (s >> 16) % 256) * PS];
  }
  return x;
}
static void purged_blocks(void) {
  pthread_t t;
  char *base = map(16 * HUGE);
  base = (char *)(((unsigned long)base + HUGE - 1) & ~(HUGE - 1));
  if (pthread_create(&t, NULL, reads, NULL)) exit(1);
  long bad = 0;
  time_t end = time(NULL) + 2;
  for (unsigned long i = 0; i < 4 * HUGE; i += PS) base[i] = 1;
  for (long round = 0; time(NULL) < end; round++) {
    char *b = base + (round % 8 + 4) * HUGE;
    for (unsigned long i = 0; i < HUGE; i += PS) b[i] = 7;
    block = b;
    for (unsigned long i = 0; i < 20; i++) madvise(b + i * PS, PS, MADV_DONTNEED);
    for (unsigned long i = 0; i < 20; i++) bad += ((volatile char *)b)[i * PS] != 0;
    block = NULL;
    madvise(b, HUGE, MADV_DONTNEED);
  }
  stop = 1;
  pthread_join(t, NULL);
  printf("%ld pages are not zero\n", bad);
}

static void large_environment(void) {
  char k[32];
  for (int i = 0; i < 4500; i++) snprintf(k, sizeof k, "V%d", i), setenv(k, "x", 1);
  printf("system() %d\n", system("exit 5"));
}

static void ignored_children(void) {
  char *p = map(64 << 20);
  memset(p, 1, 64 << 20);
  signal(SIGCHLD, SIG_IGN);
  for (int i = 0; i < 20; i++)
    if (!fork()) _exit(0);
  printf("forked\n");
}

static void *idles(void *x) {
  for (;;) pause();
  return x;
}
static void ids_in_memory(void) {
  pthread_t t;
  if (pthread_create(&t, NULL, idles, NULL)) exit(1);
  char *p = map(1 << 20);
  p[0] = 1;
  int *id = (int *)(p + (512 << 10)), st;
  long r = syscall(SYS_clone, CLONE_PARENT_SETTID | SIGCHLD, 0, id, 0, 0);
  if (!r) _exit(0);
  printf("%d\n", *id == r);
  waitpid((pid_t)r, &st, 0);
  memset(p, 1, 1 << 20);
  r = syscall(SYS_clone, CLONE_PIDFD | SIGCHLD, 0, id, 0, 0);
  if (!r) _exit(0);
  printf("%d\n", *id > 2 && close(*id) == 0);
}

/* Mappings that are replaced under a thread that goes on touching: it finds the old or the new, never nothing. */
static volatile char *place;
static void *touches(void *x) {
  unsigned s = 1;
  while (!stop) s = s * 1103515245 + 12345, place[(s >> 16) % 64 * PS] |= 1;
  return x;
}
static void replaced_mappings(void) {
  enum { N = 64 };
  pthread_t t[2];
  char name[] = "/tmp/once_brokenXXXXXX";
  int fd = mkstemp(name);
  unlink(name);
  if (fd < 0 || ftruncate(fd, N * PS)) exit(1);
  place = map(N * PS);
  for (int i = 0; i < 2; i++)
    if (pthread_create(&t[i], NULL, touches, NULL)) exit(1);
  for (int round = 0; round < 400; round++) {
    char *other = map(N * PS);
    memset(other, 1, N * PS);
    if (mmap((char *)place, N * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != place) exit(1);
    if (mremap(other, N * PS, N * PS, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)place) != place) exit(1);
    if (mmap((char *)place, N * PS, PROT_READ | PROT_WRITE, round % 2 ? MAP_SHARED | MAP_FIXED : MAP_PRIVATE | MAP_FIXED, fd, 0) != place) exit(1);
    if (round % 3 == 0 && mmap((char *)place, N * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != place) exit(1);
    if (round % 3 == 1) {
      other = map(N * PS);
      memset(other, 1, N * PS);
      if (mremap(other, N * PS, N * PS, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)place) != place) exit(1);
    }
    madvise((char *)place, N * PS, MADV_DONTNEED);
  }
  stop = 1;
  for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
  munmap((char *)place, N * PS);
  long bad = 0;
  for (int i = 0; i < 30; i++) {
    char *p = map(N * PS);
    for (int k = 0; k < N; k++) bad += p[k * PS] != 0;
  }
  printf("nobody was hurt, %ld pages are not zero\n", bad);
}

/* Ranges that begin in what a forked child inherited and end in what it has mapped itself. */
static void ranges_over_both(void) {
  char *old = map(HUGE);
  memset(old, 1, HUGE);
  fflush(stdout);
  pid_t c = fork();
  if (!c) {
    char *new = map(2 * HUGE), *at = new;
    memset(new, 2, 2 * HUGE);
    if (old + HUGE != new) { /* as it may be natively: then over nothing but new memory */
      memset(at = new, 1, 8 * PS);
      at = new + 8 * PS;
    }
    unsigned char there[16];
    long sum = 0;
    printf("mincore %d", mincore(at - 8 * PS, 16 * PS, there));
    for (int i = 0; i < 16; i++) sum += there[i] & 1;
    printf(" %ld\nmlock %d", sum, mlock(at - 8 * PS, 16 * PS));
    printf(" munlock %d\n", munlock(at - 8 * PS, 16 * PS));
    printf("madvise %d\n", madvise(at - 8 * PS, 16 * PS, MADV_DONTNEED));
    for (int i = -8; i < 8; i++) sum += at[i * (long)PS];
    printf("%ld\n", sum);
    printf("mprotect %d", mprotect(at - 8 * PS, 16 * PS, PROT_READ));
    printf(" %d\n", mprotect(at, 8 * PS, PROT_READ | PROT_WRITE));
    at[0] = 1;
    char *f = mmap(at - 8 * PS, 520 * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    printf("replaced %d\n", f == at - 8 * PS && !f[0] && !at[0] && !at[511 * PS]);
    memset(f, 7, 520 * PS);
    munmap(at - 8 * PS, 520 * PS);
    sum = 0;
    for (int k = 0; k < 30; k++) {
      char *n = map(HUGE);
      for (unsigned i = 0; i < 512; i++) sum += n[i * PS] != 0;
    }
    printf("%ld pages are not zero\n", sum);
    fflush(stdout);
    _exit(0);
  }
  int st;
  waitpid(c, &st, 0);
  printf("child %x\n", st);
}

static long raw(long n, long a, long b, long c, long d, long e, long f) {
  long r;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
/* Mappings made past libc: of the caller's files, as wished, and never larger than there is room for. */
static void mappings_past_libc(void) {
  char *p = map(1 << 20);
  memset(p, 7, 1 << 20);
  int first = open("/etc/passwd", O_RDONLY);
  printf("huge %ld\n", raw(SYS_mmap, 0, -1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  printf("huge, fixed %ld\n", raw(SYS_mmap, (long)p, -1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
  printf("huge munmap %ld\n", raw(SYS_munmap, (long)p, -1, 0, 0, 0, 0));
  char *hint = map(1 << 20);
  munmap(hint, 1 << 20);
  char *r = (char *)raw(SYS_mmap, (long)hint, PS, PROT_READ, MAP_PRIVATE, first, 0);
  printf("hint %.4s\n", r);
  for (int fd = 3; fd < 12; fd++) {
    if (fd != first) dup2(first, fd);
    char *q = p + fd * 65536;
    r = (char *)raw(SYS_mmap, (long)q, PS, PROT_READ, fd % 2 ? MAP_SHARED | MAP_FIXED : MAP_PRIVATE | MAP_FIXED, fd, 0);
    printf("%d %.4s\n", r == q, r == q ? q : "-");
  }
  long kept = 0;
  for (int i = 0; i < 1 << 20; i += PS) kept += p[i] == 7;
  printf("%ld\n", kept);
}

/* Another process in the same memory, which goes on after we have ended. */
static int goes_on(void *out) {
  usleep(300000);
  char *p = map(1 << 20);
  for (int i = 0; i < 1 << 20; i += PS) p[i] = 1;
  munmap(p, 1 << 20);
  dprintf((int)(long)out, "touched\n");
  _exit(0);
}
static void survivor(void) {
  static char stack[65536];
  int out[2];
  char text[64] = "";
  if (pipe(out)) exit(1);
  pid_t middle = fork();
  if (!middle) {
    memset(map(1 << 20), 1, 1 << 20);
    clone(goes_on, stack + sizeof stack, CLONE_VM | SIGCHLD, (void *)(long)out[1]);
    _exit(0);
  }
  close(out[1]);
  alarm(20);
  waitpid(middle, NULL, 0);
  if (read(out[0], text, sizeof text - 1) < 0) exit(1);
  printf("%s", text);
}

static void bad_pointers(void) {
  char *p = map(4 * PS), *args[] = {"true", NULL}, *env[] = {"A=1", (char *)8, NULL}, **volatile nowhere = (char **)8;
  printf("mincore %d", mincore(p, 4 * PS, (unsigned char *)8));
  printf(" %d\n", errno);
  for (int i = 0; i < 2; i++) printf("execve %d", execve("/bin/true", args, i ? env : nowhere)), printf(" %d\n", errno);
  char **edge = (char **)(p + PS) - 2; /* an array that ends at the last byte there is */
  munmap(p + PS, PS);
  edge[0] = "A=1", edge[1] = NULL;
  fflush(stdout);
  pid_t c = fork();
  int st;
  if (!c) execve("/bin/true", args, edge), _exit(9);
  waitpid(c, &st, 0);
  printf("at the edge %d\n", st);
}

static void refused_calls(void) {
  char *p = map(16 * PS), *q;
  memset(p, 5, 16 * PS);
  q = mmap(p, 2 * PS, PROT_READ, MAP_PRIVATE | MAP_FIXED, 99, 0);
  printf("bad descriptor %d %d, still %d\n", q == MAP_FAILED, errno, p[0] + p[PS]);
  q = mremap(p, 16 * PS, 8 * PS, MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP */, 0);
  printf("other size %d %d\n", q == MAP_FAILED, errno);
  printf("PROT_SEM %d\n", mprotect(p, PS, PROT_READ | PROT_WRITE | 8));
}

/* The kernel refuses a mapping only after it has unmapped what was there: a hole, where the next mapping is as good as any. */
static void refused_file(void) {
  char *p = map(1 << 20), *at = p + (64 << 10);
  memset(p, 7, 1 << 20);
  int s = socket(AF_INET, SOCK_DGRAM, 0);
  unsigned char there[16];
  printf("socket %d", mmap(at, 64 << 10, PROT_READ, MAP_SHARED | MAP_FIXED, s, 0) == MAP_FAILED);
  printf(" %d\n", errno);
  printf("mincore %d\n", mincore(at, 64 << 10, there));
  printf("again %d\n", mmap(at, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
  for (int i = 0; i < 64 << 10; i += PS)
    if (at[i]) printf("not zero\n");
  memset(at, 1, 64 << 10);
  printf("%d %d %d\n", p[0], at[0], at[64 << 10]);
  char *huge = mmap(at, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_HUGETLB, -1, 0);
  printf("huge page %d %d\n", huge == MAP_FAILED, at[0]);
  printf("advice %d", madvise(p, 0, 77));
  printf(" %d\n", errno);
  printf("too large %d", mremap(p, PS, 100ul << 30, MREMAP_MAYMOVE) == MAP_FAILED);
  printf(" %d\n", errno);
}

/* A read-only range is moved over one that another thread goes on reading: nothing there can be written. */
static sigjmp_buf denied;
static void on_segv(int sig) { (void)sig, siglongjmp(denied, 1); }
static void *looks(void *x) {
  unsigned s = 0;
  while (!stop)
    for (int i = 0; i < 8; i++) s += (unsigned)place[i * PS];
  return (void *)((unsigned long)x + s % 1);
}
static void read_only_target(void) {
  pthread_t t;
  volatile long through = 0;
  signal(SIGSEGV, on_segv);
  place = map(8 * PS);
  if (pthread_create(&t, NULL, looks, NULL)) exit(1);
  for (volatile int round = 0; round < 1000; round++) {
    if (mmap((char *)place, 8 * PS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != place) exit(1);
    char *p = map(8 * PS);
    mprotect(p, 8 * PS, PROT_READ);
    if (mremap(p, 8 * PS, 8 * PS, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)place) != place) exit(1);
    for (volatile int i = 0; i < 8; i++)
      if (!sigsetjmp(denied, 1)) place[i * PS] = 1, through++;
  }
  stop = 1;
  pthread_join(t, NULL);
  printf("%ld writes went through\n", through);
}

/* A protection key is left behind by nobody. Where the machine has none, that is said. */
static void protection_keys(void) {
  char *p = map(64 * PS);
  int r = (int)syscall(SYS_pkey_mprotect, p, 64 * PS, PROT_READ, -1);
  r |= mprotect(p, 64 * PS, PROT_READ | PROT_WRITE);
  p[0] = 2;
  printf("without a key %d %d\n", r, p[0]);
  int key = pkey_alloc(0, PKEY_DISABLE_ACCESS);
  if (key < 0) {
    printf("no keys here\n");
    return;
  }
  printf("%d\n", pkey_mprotect(p, 64 * PS, PROT_READ | PROT_WRITE, key));
  munmap(p, 64 * PS);
  for (int i = 0; i < 20; i++) memset(map(64 * PS), 1, 64 * PS);
  printf("written\n");
}

/* Advice that a process gives itself as if it were another. */
static void advice_to_oneself(void) {
  char *p = map(4 * PS);
  memset(p, 1, 4 * PS);
  int self = (int)syscall(434 /* pidfd_open */, getpid(), 0);
  struct iovec v = {p, 4 * PS};
  long r = syscall(440 /* process_madvise */, self, &v, 1, MADV_DONTNEED, 0);
  printf("%ld, then %d\n", r, p[0]);
}

int main(int argc, char **argv) {
  static const struct { const char *name; void (*f)(void); } all[] = {{"trimmed heap", trimmed_heap}, {"purged blocks", purged_blocks},
      {"large environment", large_environment}, {"ignored children", ignored_children}, {"ids in memory", ids_in_memory},
      {"replaced mappings", replaced_mappings}, {"ranges over both", ranges_over_both}, {"mappings past libc", mappings_past_libc},
      {"survivor", survivor}, {"bad pointers", bad_pointers}, {"refused calls", refused_calls}, {"protection keys", protection_keys},
      {"refused file", refused_file}, {"read-only target", read_only_target},
      {"advice to oneself", advice_to_oneself}};
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
    if (argc == 2 && !strcmp(argv[1], all[i].name)) return all[i].f(), 0;
  return 3;
}
