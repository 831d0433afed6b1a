/* One access pattern over more memory than there is: argv: pattern, MiB, accesses in thousands. Prints microseconds an access.
 * Half of each page is random, the rest text-like, as compressors find memory; every page is different. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PS 4096ul
static uint64_t seed = 88172645463325252ull;
static uint64_t next(void) { return seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17; }
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}
static void fill(uint64_t *page, uint64_t i) {
  page[0] = i;
  for (int k = 1; k < 256; k++) page[k] = next();
  for (int k = 256; k < 512; k++) page[k] = 0x6c6f77206f6c6c65ull + (uint64_t)(k % 16);
}
/* Zipf with exponent 0.99 over n, as YCSB draws it (Gray et al., "Quickly generating billion-record synthetic databases", SIGMOD '94);
 * ranks scattered over the pages. */
static double zeta, zeta2, alpha, eta;
static void zipf_init(uint64_t n) {
  const double theta = 0.99;
  for (uint64_t i = 1; i <= n; i++) zeta += 1 / pow((double)i, theta);
  zeta2 = 1 + pow(0.5, theta), alpha = 1 / (1 - theta), eta = (1 - pow(2.0 / (double)n, 1 - theta)) / (1 - zeta2 / zeta);
}
static uint64_t zipf(uint64_t n) {
  double u = (double)(next() >> 11) / (double)(1ull << 53), uz = u * zeta;
  uint64_t rank = uz < 1 ? 0 : uz < zeta2 ? 1 : (uint64_t)((double)n * pow(eta * u - eta + 1, alpha));
  return (rank < n ? rank : n - 1) * 2654435761ull % n;
}

int main(int argc, char **argv) {
  if (argc < 4) return 2;
  const char *what = argv[1];
  uint64_t n = (uint64_t)atol(argv[2]) << 8, accesses = (uint64_t)atol(argv[3]) * 1000, wrong = 0;
  uint64_t *m = mmap(NULL, n * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) return perror("mmap"), 1;
  int sequential = !strcmp(what, "sequential");
  if (!strcmp(what, "zipf")) zipf_init(n);
  for (uint64_t i = 0; i < n && !sequential; i++) fill(m + i * 512, i);
  double t = now();
  for (uint64_t k = 0; k < accesses; k++) {
    uint64_t i = *what == 'c' || sequential ? k % n : *what == 'z' ? zipf(n) : next() % n;
    if (sequential && k / n % 2 == 0) fill(m + i * 512, i); /* write all, read all, write all, … */
    else wrong += m[i * 512] != i;
    if (*what == 'z' && k % 10 == 0) m[i * 512 + 511] = k;
  }
  printf("%s %.3f\n", what, (now() - t) / (double)accesses);
  if (wrong) fprintf(stderr, "%lu accesses found something else\n", wrong);
  return wrong != 0;
}
