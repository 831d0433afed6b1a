/* argv: what, MiB. Memory that is asked for in one piece, more than there is: by mmap, madvise and mlock, in libc and past it; and forks or memory calls on
 * the same pages while others wait for frames, or only that, until a line comes in. Every page keeps what was written to it. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PS 4096ul
#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

static int past_libc;
static long call(long nr, long a, long b, long c, long d, long e, long f) {
  if (!past_libc) {
    long r = syscall(nr, a, b, c, d, e, f);
    return r < 0 ? -errno : r;
  }
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  long r;
  __asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
static volatile char *map(size_t n, int flags) {
  long r = call(SYS_mmap, 0, (long)n, RW, ANON | flags, -1, 0);
  if (r < 0 && r > -4096) printf("mmap: %ld\n", r), exit(1);
  return (void *)r;
}
static void number(volatile char *m, size_t n) {
  for (size_t i = 0; i < n; i += PS) *(volatile unsigned long *)(m + i) = i + 1;
}
static unsigned long wrong(volatile char *m, size_t n, unsigned long zero) {
  unsigned long k = 0;
  for (size_t i = 0; i < n; i += PS) k += *(volatile unsigned long *)(m + i) != (zero ? 0 : i + 1);
  return k;
}
static unsigned resident(volatile char *m, size_t n) {
  unsigned k = 0;
  unsigned char *vec = malloc(n / PS);
  if (mincore((void *)m, n, vec)) return 0;
  for (size_t i = 0; i < n / PS; i++) k += vec[i] & 1;
  free(vec);
  return k;
}
static volatile int over;
static void *numbers(void *arg) { /* what is given back again and again */
  volatile char *m = *(volatile char **)arg;
  size_t n = ((size_t *)arg)[1];
  for (int i = 0; i < 3; i++) {
    number(m, n);
    if (wrong(m, n, 0)) printf("wrong\n");
    if (i < 2) madvise((void *)m, n, MADV_DONTNEED);
  }
  __atomic_fetch_add(&over, 1, __ATOMIC_SEQ_CST);
  return 0;
}
static void *touches(void *arg) {
  size_t n = (size_t)arg;
  while (!over) {
    volatile char *m = mmap(0, n, RW, ANON, -1, 0);
    number(m, n);
    if (wrong(m, n, 0)) printf("wrong\n");
    munmap((void *)m, n);
  }
  return 0;
}

int main(int argc, char **argv) {
  size_t n = argc > 2 ? (size_t)atoi(argv[2]) << 20 : 0;
  if (!n) return 2;
  past_libc = !strcmp(argv[1], "past_libc");
  setvbuf(stdout, 0, _IOLBF, 0);
  if (!strcmp(argv[1], "forks") || !strcmp(argv[1], "touches")) {
    pthread_t t[3];
    for (int i = 0; i < 3; i++) pthread_create(&t[i], 0, touches, (void *)(n / 3));
    if (argv[1][0] == 't') printf("touches\n"), getchar();
    for (int i = 0; i < 12 && argv[1][0] == 'f'; i++) {
      int status;
      pid_t pid = fork();
      if (!pid) _exit(7);
      waitpid(pid, &status, 0);
      if (status != 7 << 8) printf("status %x\n", status);
      usleep(20000);
    }
    over = 1;
    for (int i = 0; i < 3; i++) pthread_join(t[i], 0);
    printf("forked\n");
    return 0;
  }
  if (!strcmp(argv[1], "protects")) { /* nothing changes by it */
    pthread_t t[3];
    size_t part[3][2];
    volatile char *m = map(n / 3 * 3 & ~(3 * PS - 1), 0);
    for (int i = 0; i < 3; i++) part[i][1] = n / 3 & ~(PS - 1), part[i][0] = (size_t)m + (size_t)i * part[i][1], pthread_create(&t[i], 0, numbers, part[i]);
    while (over < 3) mprotect((void *)m, n / 2, RW), usleep(1000);
    for (int i = 0; i < 3; i++) pthread_join(t[i], 0);
    printf("protected\n");
    return 0;
  }
  if (!strncmp(argv[1], "moves_out", 9)) {
    int unreadable = argv[1][9];
    volatile char *m = map(n, 0), *to = mmap(0, n, PROT_NONE, ANON | MAP_NORESERVE | MAP_STACK, -1, 0); /* (not of the enclave) */
    number(m, n);
    if (unreadable) mprotect((void *)m, n, PROT_NONE);
    printf("moved: %d", mremap((void *)m, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == (void *)to);
    if (unreadable) mprotect((void *)to, n, RW);
    printf(" wrong: %lu\n", wrong(to, n, 0));
    return 0;
  }
  volatile char *p = map(n, MAP_POPULATE);
  printf("populated: %lu\n", wrong(p, n, 1));
  number(p, n);
  volatile char *q = map(n, 0);
  printf("madvise: %ld\n", call(SYS_madvise, (long)q, (long)n, 23 /* POPULATE_WRITE */, 0, 0, 0));
  printf("both: %lu %lu\n", wrong(q, n, 1), wrong(p, n, 0));
  printf("unmapped: %ld\n", (munmap((void *)(q + n / 2), PS), call(SYS_madvise, (long)q, (long)n, 22, 0, 0, 0)));
  mprotect((void *)q, n / 4, PROT_READ);
  printf("read-only: %ld %ld\n", call(SYS_madvise, (long)q, (long)n / 4, 23, 0, 0, 0), call(SYS_madvise, (long)q, (long)n / 4, 22, 0, 0, 0));
  size_t some = 2 << 20;
  printf("mlock: %ld", call(SYS_mlock, (long)p, (long)some, 0, 0, 0, 0));
  wrong(p, past_libc ? some : PS, 0);
  printf(" resident %u\n", resident(p, some));
  printf("on fault: %ld %ld\n", call(SYS_mlock2, (long)p + (long)some, (long)some, 1, 0, 0, 0), call(SYS_mlock2, (long)p, (long)some, 2, 0, 0, 0));
  printf("walked: %lu %lu", wrong(p + some, some, 1) == some / PS ? 0 : 1ul, wrong(p, n, 0));
  printf(" resident %u\n", resident(p, 2 * some));
  return 0;
}
