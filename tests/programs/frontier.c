/* argv: MiB. Two regions of that size, aligned to 2 MiB and as far from each other; prints where each is. Then for each line "REGION FIRST N STEP" touches from page FIRST
 * on N pages of region 0 or 1, STEP apart, backwards, so that nobody takes it for a sequential walk, and prints a line. At the end it says whether each page that it wrote is what it
 * was, and each other one zero. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PS 4096ul
#define HUGE (512 * PS)

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  size_t n = (size_t)atoi(argv[1]) << 20, pages = n / PS, region, first, many, step, wrong = 0;
  char *m = mmap(0, 3 * n + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return 3;
  m = (void *)(((uintptr_t)m + HUGE - 1) & ~(HUGE - 1));
  volatile uint64_t *at[2] = {(void *)m, (void *)(m + 2 * n)};
  uint8_t *written = calloc(2, pages);
  printf("%lx %lx\n", (unsigned long)at[0], (unsigned long)at[1]);
  fflush(stdout);
  while (scanf("%zu %zu %zu %zu", &region, &first, &many, &step) == 4) {
    if (region > 1 || !many || first + (many - 1) * step >= pages) return 4;
    for (size_t i = many; i-- > 0;) {
      size_t p = first + i * step;
      at[region][p * (PS / 8) + 3] = p + 1, written[region * pages + p] = 1;
    }
    printf("done\n");
    fflush(stdout);
  }
  for (size_t r = 0; r < 2; r++)
    for (size_t p = 0; p < pages; p++)
      if (written[r * pages + p]) wrong += at[r][p * (PS / 8) + 3] != p + 1 || at[r][p * (PS / 8)] != 0;
  printf("wrong %zu\n", wrong);
  return wrong != 0;
}
