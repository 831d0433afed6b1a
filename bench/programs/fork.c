/* fork of a program with so much memory in use: argv: MiB, forks, threads (that wait), "blocks" or "pages": MADV_HUGEPAGE or MADV_NOHUGEPAGE. Prints medians: milliseconds
 * that fork takes; microseconds a page that its child then reads, and that it writes. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "timing.h"

#define PS 4096ul
#define MOST 64
static void *wait_for_ever(void *x) {
  for (;;) pause();
  return x;
}
int main(int argc, char **argv) {
  if (argc < 5) return 2;
  size_t n = (size_t)atol(argv[1]) << 20;
  size_t forks = (size_t)atol(argv[2]);
  int wrong = 0;
  double took[MOST], reads[MOST], writes[MOST];
  char *m = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED || forks > MOST) return perror("mmap"), 1;
  madvise(m, n, *argv[4] == 'b' ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(m, 1, n);
  pthread_t t;
  for (int i = atoi(argv[3]); i--;) pthread_create(&t, NULL, wait_for_ever, NULL);
  usleep(300000);
  for (size_t i = 0; i < forks; i++) {
    int said[2], st;
    double d[2], begun;
    if (pipe(said)) return 1;
    begun = now();
    pid_t p = fork();
    if (!p) {
      int sum = 0;
      double a = now();
      for (size_t k = 0; k < n; k += PS) sum += m[k];
      double b = now();
      for (size_t k = 0; k < n; k += 8 * PS) m[k] = 2; /* one in eight, as of a hash table that changes */
      double c[2] = {(b - a) / (double)(n / PS), (now() - b) / (double)(n / PS / 8)};
      _exit(write(said[1], c, sizeof c) != sizeof c || sum != (int)(n / PS));
    }
    took[i] = (now() - begun) / 1e3;
    if (read(said[0], d, sizeof d) != sizeof d || waitpid(p, &st, 0) != p || st) wrong++;
    reads[i] = d[0], writes[i] = d[1];
    close(said[0]), close(said[1]);
    usleep(200000);
    for (size_t k = 0; k < n; k += PS) wrong += m[k] != 1;
  }
  printf("fork %.3f\nreads %.3f\nwrites %.3f\n", median(took, forks), median(reads, forks), median(writes, forks));
  if (wrong) fprintf(stderr, "%d wrong\n", wrong);
  return wrong != 0;
}
