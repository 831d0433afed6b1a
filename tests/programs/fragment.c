/* argv: MiB, keep. Touches that much memory page by page, and gives back all but every keep-th page, in no order; then waits for a line, and looks whether
 * each has what was written to it. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PS 4096ul
int main(int argc, char **argv) {
  if (argc != 3) return 2;
  size_t n = ((size_t)atoi(argv[1]) << 20) / PS, keep = (size_t)atoi(argv[2]), wrong = 0, kept = 0;
  uint64_t *m = mmap(0, n * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  size_t *order = malloc(n * sizeof *order);
  for (size_t i = 0; i < n; i++) order[i] = i;
  srand(1);
  for (size_t i = n; i-- > 1;) {
    size_t k = (size_t)rand() % (i + 1), t = order[i];
    order[i] = order[k], order[k] = t;
  }
  for (size_t i = 0; i < n; i++) m[order[i] * (PS / 8) + i % 512] = order[i] + 1;
  for (size_t i = 0; i < n; i++)
    if (i % keep) madvise(m + order[i] * (PS / 8), PS, MADV_DONTNEED);
  printf("fragmented\n");
  fflush(stdout);
  getchar();
  for (size_t i = 0; i < n; i++) {
    uint64_t *page = m + order[i] * (PS / 8);
    for (size_t k = 0; k < 512; k++) wrong += page[k] != (i % keep == 0 && k == i % 512 ? order[i] + 1 : 0);
    kept += i % keep == 0;
  }
  printf("kept %zu, wrong %zu\n", kept, wrong);
  return 0;
}
