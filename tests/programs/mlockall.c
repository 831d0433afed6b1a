/* mlockall before the first allocation, and with memory already there; prints how much is locked, in steps too coarse to differ natively. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static long locked_mib(void) {
  char line[256];
  long kib = -1;
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f))
    if (!strncmp(line, "VmLck:", 6)) kib = atol(line + 6);
  if (f) fclose(f);
  return kib >> 10;
}
int main(int argc, char **argv) {
  char *p = NULL;
  (void)argv;
  if (argc > 1) memset(p = malloc(64 << 20), 1, 64 << 20);
  printf("mlockall %d\n", mlockall(MCL_CURRENT | MCL_FUTURE));
  char *q = malloc(32 << 20);
  printf("allocated %d, locked %ld x 32 MiB\n", q != NULL, (locked_mib() + 16) / 32);
  q[5] = 1;
  return p ? p[1 << 20] - 1 : 0;
}
