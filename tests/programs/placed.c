/* argv: what, MiB, MiB. Two pieces of memory; fills the first, then the second. "own": a thread on CPU 0 goes on touching the first, one on CPU 1 the second;
 * "hot": one thread goes on touching the second. Prints where they are, and after a line has come in how many pages are not as they were. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PS 4096ul
static volatile int over;
static struct piece { uint64_t *at; size_t pages; int cpu; } piece[2];
static void *touches(void *arg) {
  struct piece *p = arg;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((unsigned)p->cpu, &set);
  if (p->cpu >= 0) pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  while (!over) {
    for (size_t i = 0; i < p->pages; i++) __atomic_fetch_add(&p->at[i * (PS / 8) + 1], 1, __ATOMIC_RELAXED);
    usleep(1000);
  }
  return 0;
}
int main(int argc, char **argv) {
  if (argc != 4) return 2;
  int own = !strcmp(argv[1], "own");
  size_t wrong = 0;
  for (int k = 0; k < 2; k++) {
    piece[k].pages = ((size_t)atoi(argv[2 + k]) << 20) / PS, piece[k].cpu = own ? k : -1;
    piece[k].at = mmap(0, piece[k].pages * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < piece[k].pages; i++) piece[k].at[i * (PS / 8)] = i + 1;
  }
  pthread_t t[2];
  for (int k = !own; k < 2; k++) pthread_create(&t[k], 0, touches, &piece[k]);
  printf("%lx %lx\n", (unsigned long)piece[0].at, (unsigned long)piece[1].at);
  fflush(stdout);
  getchar();
  over = 1;
  for (int k = !own; k < 2; k++) pthread_join(t[k], 0);
  for (int k = 0; k < 2; k++)
    for (size_t i = 0; i < piece[k].pages; i++) wrong += piece[k].at[i * (PS / 8)] != i + 1;
  printf("wrong %zu\n", wrong);
  return 0;
}
