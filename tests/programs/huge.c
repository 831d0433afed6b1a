/* argv: MiB, what [, "reads"]. Memory of which every page is touched, in no order; two threads count in it until a line comes in, and no count may be lost. what: "plain";
 * "small": MADV_NOHUGEPAGE; "advised": MADV_HUGEPAGE; "never": prctl(PR_SET_THP_DISABLE); "sparse": one page of eight only; "forks": when a line has come
 * some children look at it and write there, one after the other, before the threads begin. With "reads" one
 * thread reads at random, instead, and says how long that took, for each line that comes in. Prints where the memory is, once it is there. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PS 4096ul
#define HUGE (512 * PS)
static volatile uint64_t *at;
static size_t pages, step = 1;
static volatile int over;
static uint64_t counted[2];

static uint64_t next(uint64_t *x) { return *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17; }
static volatile uint64_t *page(size_t i) { return at + i * step * (PS / 8); }
static void *count(void *arg) {
  uint64_t me = (uint64_t)arg, x = 88172645463325252ull + me;
  while (!over) {
    __atomic_fetch_add(page(next(&x) % pages) + 1 + me, 1, __ATOMIC_RELAXED);
    counted[me]++;
  }
  return 0;
}
static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}
int main(int argc, char **argv) {
  if (argc != 3 && argc != 4) return 2;
  const char *what = argv[2];
  size_t n = (size_t)atoi(argv[1]) << 20;
  if (!strcmp(what, "never") && prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)) return 3;
  char *m = mmap(0, n + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  at = (void *)(((uintptr_t)m + HUGE - 1) & ~(HUGE - 1));
  if (!strcmp(what, "small")) madvise((void *)at, n, MADV_NOHUGEPAGE);
  if (!strcmp(what, "advised")) madvise((void *)at, n, MADV_HUGEPAGE);
  if (!strcmp(what, "sparse")) step = 8;
  pages = n / PS / step;
  /* backwards, so that nobody takes it for a sequential walk */
  for (size_t i = pages; i-- > 0;) *page(i) = i + 1;
  printf("%lx\n", (unsigned long)at);
  fflush(stdout);
  if (argc == 4) {
    for (char line[8]; fgets(line, sizeof line, stdin);) {
      uint64_t x = 1234567, sum = 0;
      double began = seconds();
      for (int i = 0; i < 20000000; i++) sum += at[(next(&x) + sum % 2) % (n / 8)];
      printf("%.4f\n", seconds() - began);
      fflush(stdout);
      if (sum == 42) return 4;
    }
    return 0;
  }
  uint64_t sum[2] = {0}, wrong = 0;
  for (int i = 0, st; i < 4 && !strcmp(what, "forks"); i++) {
    if (!i) getchar();
    pid_t p = fork();
    if (!p) {
      for (size_t k = 0; k < pages; k++) wrong += *page(k) != k + 1, page(k)[3] = 7, wrong += *page(k) != k + 1;
      _exit(wrong != 0);
    }
    wrong += p < 0 || waitpid(p, &st, 0) != p || st;
    if (i == 3) puts("forked"), fflush(stdout);
  }
  pthread_t t[2];
  for (uint64_t i = 0; i < 2; i++) pthread_create(&t[i], 0, count, (void *)i);
  getchar();
  over = 1;
  for (int i = 0; i < 2; i++) pthread_join(t[i], 0);
  for (size_t i = 0; i < pages; i++) {
    wrong += *page(i) != i + 1 || page(i)[3], sum[0] += page(i)[1], sum[1] += page(i)[2];
    for (size_t k = 1; k < step; k++)
      for (size_t j = 0; j < PS / 8; j += 64) wrong += page(i)[k * PS / 8 + j] != 0;
  }
  printf("wrong %lu, lost %ld %ld\n", wrong, (long)(counted[0] - sum[0]), (long)(counted[1] - sum[1]));
  return 0;
}
