/* Leaves a string in its heap and one in an anonymous mapping, and crashes: both must be in the core. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

char *volatile h, *volatile m; /* not for the compiler to optimise away */

int main(void) {
  h = malloc(4 << 20), m = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(h, 0, 4 << 20);
  strcpy(h + 100000, "heap of the crashed");
  strcpy(m + 70000, "mapping of the crashed");
  abort();
}
