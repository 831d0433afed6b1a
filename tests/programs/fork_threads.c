/* Forks from a program whose threads write all the time: the child's view must be of one instant, and its writes its own.
 * usage: fork_threads FORKS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#define THREADS 3
#define PAGES 64
static volatile long *page[THREADS][PAGES];
static volatile int stop;

/* Writes i to its pages in order, so at any instant no later page is newer than an earlier one, and all are i or i - 1. */
static void *write_on(void *arg) {
  long t = (long)arg;
  for (long i = 1; !stop; i++) {
    for (int k = 0; k < PAGES; k++) *page[t][k] = i;
    void *p = malloc(100 + (size_t)(i % 5000));
    memset(p, 1, 100);
    free(p);
  }
  return NULL;
}

int main(int argc, char **argv) {
  int forks = argc > 1 ? atoi(argv[1]) : 20, torn = 0, crashed = 0, leaked = 0;
  size_t size = 64 << 20;
  char *b = malloc(size);
  memset(b, 0, size);
  for (int t = 0; t < THREADS; t++)
    for (int k = 0; k < PAGES; k++) page[t][k] = (long *)(b + (size_t)(t * PAGES + k) * 65536 + 4096);
  pthread_t th[THREADS];
  for (long t = 0; t < THREADS; t++) pthread_create(&th[t], NULL, write_on, (void *)t);
  usleep(20000);
  for (int i = 0; i < forks; i++) {
    long *mine = malloc(4096);
    mine[0] = i;
    pid_t p = i % 2 ? fork() : (pid_t)syscall(SYS_fork); /* past pthread_atfork as well */
    if (!p) {
      alarm(20);
      int bad = 0;
      for (int t = 0; t < THREADS; t++)
        for (int k = 1; k < PAGES; k++) bad |= *page[t][k] > *page[t][k - 1] || *page[t][k] < *page[t][0] - 1;
      mine[0] = -1;
      if (i % 2) {
        for (int q = 0; q < 200; q++) {
          void *z = malloc(3000);
          memset(z, 2, 3000);
          free(z);
        }
        char *more = malloc(1 << 20); /* enough to join the enclave anew */
        memset(more, 3, 1 << 20);
        pid_t g = fork(); /* and fork again from there */
        if (!g) _exit(more[77777] == 3 ? 0 : 9);
        int gs;
        waitpid(g, &gs, 0);
        bad |= !WIFEXITED(gs) || WEXITSTATUS(gs);
      }
      _exit(bad ? 7 : 0);
    }
    int st;
    waitpid(p, &st, 0);
    if (!WIFEXITED(st)) crashed++;
    else if (WEXITSTATUS(st)) torn++;
    if (mine[0] != i) leaked++;
    free(mine);
  }
  stop = 1;
  for (int t = 0; t < THREADS; t++) pthread_join(th[t], NULL);
  printf("torn %d crashed %d leaked %d\n", torn, crashed, leaked);
  return torn || crashed || leaked;
}
