/* argv: what, MiB, distinct. Memory whose pages have so many different contents, in turn, MADV_MERGEABLE but for "plain". Says "there", and then
 * "same", "plain": waits for a line, looks at every page, waits for a line, writes to every page, looks again, and waits for another.
 * "writes": two threads change pages and change them back all the time, and look whether each is as they left it; until a line comes in.
 * "calls": waits for a line, and meets the pages with every call; what it prints natively is what it must print. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PS 4096ul
#define WORDS (PS / 8)
static volatile uint64_t *at;
static size_t pages, distinct;
static volatile int over;
static uint64_t *left, lost[2], changes[2];

static uint64_t next(uint64_t *x) { return *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17; }
static void fill(volatile uint64_t *m, size_t n) {
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; k < WORDS; k++) m[i * WORDS + k] = k == 100 ? 0 : (i % distinct) * k;
}
static size_t wrong(volatile uint64_t *m, size_t n, uint64_t first) {
  size_t bad = 0;
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; k < WORDS; k++) bad += m[i * WORDS + k] != (k == 100 ? first : (i % distinct) * k);
  return bad;
}
static void *writes(void *arg) {
  uint64_t me = (uint64_t)arg, x = 88172645463325252ull + me;
  while (!over) {
    size_t i = next(&x) % (pages / 2) * 2 + me;
    volatile uint64_t *w = &at[i * WORDS + 100];
    lost[me] += *w != left[i];
    *w = left[i] = next(&x) % 4 ? 0 : x;
    changes[me]++;
    if (changes[me] % 2 == 0) usleep(1000);
  }
  return 0;
}
static void line(void) {
  char l[8];
  fflush(stdout);
  if (!fgets(l, sizeof l, stdin)) exit(3);
}
int main(int argc, char **argv) {
  if (argc != 4) return 2;
  pages = ((size_t)atoi(argv[2]) << 20) / PS, distinct = (size_t)atoi(argv[3]);
  at = mmap(0, pages * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (strcmp(argv[1], "plain")) madvise((void *)at, pages * PS, MADV_MERGEABLE);
  fill(at, pages);
  puts("there");
  if (!strcmp(argv[1], "writes")) {
    left = calloc(pages, 8);
    pthread_t t[2];
    for (uint64_t i = 0; i < 2; i++) pthread_create(&t[i], 0, writes, (void *)i);
    line();
    over = 1;
    for (int i = 0; i < 2; i++) pthread_join(t[i], 0);
    for (size_t i = 0; i < pages; i++) lost[0] += at[i * WORDS + 100] != left[i], at[i * WORDS + 100] = 0;
    printf("lost %lu, wrong %zu\n", lost[0] + lost[1], wrong(at, pages, 0));
    return changes[0] + changes[1] < 100;
  }
  line();
  if (!strcmp(argv[1], "calls")) {
    size_t q = pages / 8 / distinct * distinct; /* a piece; all begin with the same content */
    volatile uint64_t *p[8];
    for (int i = 0; i < 8; i++) p[i] = at + i * q * WORDS;
    pid_t pid = fork();
    if (!pid) {
      for (size_t i = 0; i < pages; i++) at[i * WORDS + 100] = 9;
      _exit((int)(wrong(at, pages, 9) != 0));
    }
    int status;
    waitpid(pid, &status, 0);
    printf("child %d, parent %zu\n", status, wrong(at, pages, 0));
    madvise((void *)p[0], q * PS, MADV_DONTNEED);
    size_t some = 0;
    for (size_t i = 0; i < q * WORDS; i++) some += p[0][i] != 0;
    printf("dropped %zu\n", some);
    munmap((void *)p[1], q * PS);
    volatile uint64_t *n = mmap((void *)p[1], q * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (size_t i = 0; i < q * WORDS; i++) some += n[i] != 0;
    printf("mapped anew %zu\n", some);
    mprotect((void *)p[2], q * PS, PROT_READ);
    printf("read-only %zu\n", wrong(p[2], q, 0));
    mprotect((void *)p[2], q * PS, PROT_READ | PROT_WRITE);
    for (size_t i = 0; i < q; i++) p[2][i * WORDS + 100] = 7;
    printf("written %zu, its neighbours %zu\n", wrong(p[2], q, 7), wrong(p[3], q, 0));
    volatile uint64_t *moved = mremap((void *)p[3], q * PS, 2 * q * PS, MREMAP_MAYMOVE);
    printf("moved %zu\n", wrong(moved, q, 0));
    for (size_t i = 0; i < q; i++) moved[i * WORDS + 100] = 5;
    printf("and written %zu, others %zu\n", wrong(moved, q, 5), wrong(p[4], q, 0));
    printf("unmergeable %d %zu\n", madvise((void *)p[4], q * PS, MADV_UNMERGEABLE), wrong(p[4], q, 0));
    char *sparse = mmap(0, 256 * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char there[256];
    size_t touched = 0;
    madvise(sparse, 256 * PS, MADV_MERGEABLE), madvise(sparse, 256 * PS, MADV_UNMERGEABLE), mincore(sparse, 256 * PS, there);
    for (size_t i = 0; i < 256; i++) touched += there[i] & 1;
    printf("never touched, now there: %zu\n", touched);
    int fd[2];
    if (pipe(fd) || write(fd[1], "kernel writes", 13) != 13 || read(fd[0], (void *)p[5], 13) != 13) return 4;
    printf("%.13s, next %zu\n", (char *)p[5], wrong(p[6], q, 0));
    printf("locked %d %zu\n", mlock((void *)p[6], 8 * PS), wrong(p[6], q, 0));
    return 0;
  }
  printf("wrong %zu\n", wrong(at, pages, 0));
  line();
  for (size_t i = 0; i < pages; i++) at[i * WORDS + 100] = 3;
  printf("written, wrong %zu\n", wrong(at, pages, 3));
  line();
  return 0;
}
