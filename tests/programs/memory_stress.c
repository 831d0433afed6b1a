/* Threads map, fill, check, grow, move, empty, protect and unmap memory at random. Prints "ok", or what was wrong, and exits by it.
 * usage: memory_stress THREADS ROUNDS */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int rounds;
#define FAIL(code, what) do { printf("%s\n", what); exit(code); } while (0)

static void *work(void *arg) {
  uint32_t s = (uint32_t)(uintptr_t)arg * 77 + 1;
  for (int i = 1; i <= rounds; i++) {
    s = s * 1664525 + 1013904223;
    size_t n = ((s >> 8) % 200 + 1) * 4096, m = n + ((s >> 20) % 100) * 4096, half = (m / 2) & ~4095ul;
    unsigned char c = (unsigned char)(i | 1), *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) FAIL(1, "mmap failed");
    for (size_t k = 0; k < n; k += 512)
      if (p[k]) FAIL(2, "new memory is not zero");
    memset(p, c, n);
    unsigned char *q = mremap(p, n, m, MREMAP_MAYMOVE);
    if (q == MAP_FAILED) FAIL(3, strerror(errno));
    for (size_t k = 0; k < n; k += 97)
      if (q[k] != c) FAIL(4, "content changed in mremap");
    for (size_t k = n; k < m; k += 512)
      if (q[k]) FAIL(5, "grown memory is not zero");
    madvise(q, half, MADV_DONTNEED);
    for (size_t k = 0; k < half; k += 512)
      if (q[k]) FAIL(6, "memory is not zero after MADV_DONTNEED");
    for (size_t k = half; k < n; k += 97)
      if (q[k] != c) FAIL(7, "MADV_DONTNEED took more than it was told");
    if (n > 8192) munmap(q + 4096, 4096);
    mprotect(q, 4096, PROT_READ);
    if (q[0] != (half ? 0 : c)) FAIL(8, "content changed in mprotect");
    mprotect(q, 4096, PROT_READ | PROT_WRITE);
    q[0] = 9;
    /* Not the hole again: another thread may have mapped there meanwhile. */
    munmap(q, n > 8192 ? 4096 : m);
    if (n > 8192) munmap(q + 8192, m - 8192);
    size_t z = s % 300000;
    unsigned char *h = malloc(z + 1);
    memset(h, 1, z + 1);
    free(h);
  }
  return NULL;
}

int main(int argc, char **argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 4;
  rounds = argc > 2 ? atoi(argv[2]) : 200;
  pthread_t t[64];
  if (threads > 64) threads = 64;
  for (long i = 0; i < threads; i++) pthread_create(&t[i], NULL, work, (void *)i);
  for (int i = 0; i < threads; i++) pthread_join(t[i], NULL);
  puts("ok");
}
