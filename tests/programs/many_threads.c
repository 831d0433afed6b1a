/* Threads by the hundred, and by the thousand one after another. With TLS_BLOCK this file is the library with large thread-local memory.
 * many_threads LIBRARY */
#define _GNU_SOURCE
#include <string.h>
#ifdef TLS_BLOCK
#define SIZE (64 << 10)
static __thread char block[SIZE];
static __thread long filled;
long use_block(long value);
long use_block(long value) { /* true when the block was zero, and holds what this thread wrote */
  long bad = filled;
  for (int i = 0; i < SIZE; i += 512) bad |= block[i];
  memset(block, (int)(value % 100 + 1), SIZE);
  filled = value + 1;
  return !bad && block[SIZE - 1] == value % 100 + 1;
}
#else
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include "report.h"
#define THREADS 64
#define PAGES 4096ul
static long (*use_block)(long);
static pthread_barrier_t start;
static unsigned char *shared, *own;

static void *short_life(void *arg) {
  char *p = malloc(3000);
  memset(p, 1, 3000);
  long ok = use_block((long)arg);
  free(p);
  return (void *)ok;
}

/* All threads touch the same pages in the same order, so that each page has many waiters; and every 64th page of another area. */
static void *toucher(void *arg) {
  long t = (long)arg;
  pthread_barrier_wait(&start);
  for (unsigned long i = 0; i < PAGES; i++) __atomic_fetch_add((unsigned *)(shared + i * 4096 + 4 * (i % 1000)), 1, __ATOMIC_RELAXED);
  for (unsigned long i = (unsigned long)t; i < PAGES; i += THREADS) memset(own + i * 4096, (int)(i % 251), 4096);
  return NULL;
}

int main(int argc, char **argv) {
  void *l = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (!l) return puts("no library"), 2;
  *(void **)&use_block = dlsym(l, "use_block");
  long good = 0, wrong = 0;
  for (long done = 0; done < 1000; done += 20) {
    pthread_t t[20];
    for (long i = 0; i < 20; i++)
      if (pthread_create(&t[i], NULL, short_life, (void *)(done + i))) return 3;
    for (int i = 0; i < 20; i++) {
      void *r;
      pthread_join(t[i], &r);
      good += (long)r;
    }
  }
  printf("%ld of 1000 threads had thread-local memory of their own; main: %ld\n", good, use_block(7));
  printf("unloaded: %d\n", dlclose(l));

  for (int round = 0; round < 3; round++) {
    pthread_t t[THREADS];
    shared = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    own = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_barrier_init(&start, NULL, THREADS);
    for (long i = 0; i < THREADS; i++)
      if (pthread_create(&t[i], NULL, toucher, (void *)i)) return 4;
    for (int i = 0; i < THREADS; i++) pthread_join(t[i], NULL);
    for (unsigned long i = 0; i < PAGES; i++) {
      wrong += *(unsigned *)(shared + i * 4096 + 4 * (i % 1000)) != THREADS;
      wrong += own[i * 4096] != i % 251 || own[i * 4096 + 4095] != i % 251;
    }
    if (round == 2) report();
    munmap(shared, PAGES * 4096), munmap(own, PAGES * 4096);
  }
  printf("pages with a lost or torn write: %ld\n", wrong);
  return 0;
}
#endif
