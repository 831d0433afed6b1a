/* Batch work: a process that computes without a pause and counts how far it gets. argv: FD INDEX: its counter, one of 64 bits in a page of shared memory. Until it is ended. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  uint64_t *counters = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0), x = 88172645463325252ull;
  if (counters == MAP_FAILED) return perror("batch"), 1;
  for (uint64_t *mine = &counters[atoi(argv[2]) * 8 % 512];; __atomic_store_n(mine, *mine + 1, __ATOMIC_RELAXED)) { /* a cache line for each */
    for (int i = 0; i < 4000; i++) x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    __asm__ volatile("" : : "r"(x)); /* so that it is computed */
  }
}
