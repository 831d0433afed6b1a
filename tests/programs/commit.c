/* Memory calls on a grid of slots of 256 pages, one a line of stdin: letter and numbers; answers with errno, or 0. Allocates nothing itself.
 * m slot n prot flags | u slot n | p slot n prot | t slot (touch) | r slot n to m flags (mremap; to < 0: where it is) | b pages (brk) | f (fork; answers
 * with what the child may map in one piece, in slots) */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOT (256ul * 4096)
#define SLOTS 512

int main(void) {
  static char line[4096];
  char *base = mmap(NULL, SLOTS * SLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *heap = NULL;
  if (base == MAP_FAILED) return 1;
  munmap(base, SLOTS * SLOT);
  for (;;) {
    size_t k = 0;
    while (k + 1 < sizeof line && read(0, line + k, 1) == 1 && line[k] != '\n') k++;
    if (!k) return 0;
    line[k] = 0;
    long a[5] = {0}, r = 0;
    char *s = line + 1;
    for (int i = 0; i < 5; i++) a[i] = strtol(s, &s, 0);
    char *at = base + a[0] * (long)SLOT;
    switch (line[0]) {
    case 'm': r = mmap(at, (size_t)a[1] * SLOT, (int)a[2], MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (int)a[3], -1, 0) == MAP_FAILED; break;
    case 'u': r = munmap(at, (size_t)a[1] * SLOT); break;
    case 'p': r = mprotect(at, (size_t)a[1] * SLOT, (int)a[2]); break;
    case 't': *at = 1; break;
    case 'r': r = mremap(at, (size_t)a[1] * SLOT, (size_t)a[3] * SLOT, (int)a[4], a[2] < 0 ? NULL : base + a[2] * (long)SLOT) == MAP_FAILED; break;
    case 'b':
      if (!heap) heap = sbrk(0); /* (libc has its own below) */
      r = brk(heap + a[0] * 4096);
      break;
    case 'f': {
      int out[2], most = 0;
      if (pipe(out)) return 1;
      pid_t child = fork();
      if (child == 0) {
        for (int lo = 0, hi = SLOTS; lo < hi;) { /* (more than 128 KiB: it joins the enclave) */
          int mid = (lo + hi + 1) / 2;
          void *p = mmap(NULL, (size_t)mid * SLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
          if (p == MAP_FAILED) hi = mid - 1;
          else munmap(p, (size_t)mid * SLOT), lo = most = mid;
        }
        _exit(write(out[1], &most, sizeof most) != sizeof most);
      }
      r = read(out[0], &most, sizeof most) != sizeof most;
      close(out[0]), close(out[1]);
      waitpid(child, NULL, 0);
      if (!r) {
        dprintf(1, "%d\n", most);
        continue;
      }
    }
    }
    dprintf(1, "%d\n", r ? errno : 0);
  }
}
