/* For gdb: box lies in the arena. usage: debuggee [wait] — "wait" runs until a line comes, counting meanwhile. */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "report.h"

struct box { int number; char text[32]; struct box *next; char *untouched; };
static struct box *volatile box;
static volatile int stop;

__attribute__((noinline)) static int inner(struct box *b, int depth) {
  if (depth) return inner(b->next, depth - 1) + 1;
  b->untouched[100 << 12] = 7; /* a first touch under the debugger */
  return b->number;
}
static void *work(void *count) {
  while (!stop) {
    char *p = mmap(NULL, 300000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(p, 1, 300000);
    munmap(p, 300000);
    ++*(volatile long *)count;
  }
  return NULL;
}

int main(int argc, char **argv) {
  (void)argv;
  for (int i = 0; i < 5; i++) {
    struct box *b = malloc(sizeof *b + 200000);
    *b = (struct box){i, "", box, malloc(1 << 20)};
    snprintf(b->text, sizeof b->text, "box number %d", i);
    box = b;
  }
  if (argc > 1) {
    long count[2] = {0, 0};
    pthread_t t[2];
    for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, work, &count[i]);
    puts("runs"), fflush(stdout);
    while (getchar() == 'c') { /* have the threads gone on since? */
      long c[2] = {*(volatile long *)&count[0], *(volatile long *)&count[1]};
      for (int ms = 0; ms < 20000 && (*(volatile long *)&count[0] == c[0] || *(volatile long *)&count[1] == c[1]); ms++) poll(NULL, 0, 1);
      puts(*(volatile long *)&count[0] != c[0] && *(volatile long *)&count[1] != c[1] ? "goes on" : "stuck"), fflush(stdout);
    }
    stop = 1;
    for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
  }
  int r = inner(box, 3);
  report();
  printf("%d\n", r);
  return r;
}
