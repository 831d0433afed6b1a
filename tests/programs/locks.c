/* Futexes on memory that malloc and mmap gave: between threads (private or not), robust mutexes whose owner ends, and between processes. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include "report.h"

static void *map(size_t n, int how) { return mmap(NULL, n, PROT_READ | PROT_WRITE, how | MAP_ANONYMOUS, -1, 0); }
static struct timespec soon(int s) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_sec += s;
  return t;
}
#define ROUNDS 3000
struct ball { int word, flag; char *noise; };
static void hit(struct ball *b, int mine) { /* waits for its turn, passes the turn on; maps and unmaps meanwhile */
  for (int i = 0; i < ROUNDS; i++) {
    int w;
    while ((w = __atomic_load_n(&b->word, __ATOMIC_ACQUIRE)) % 2 != mine) {
      struct timespec t = {20, 0};
      if (syscall(SYS_futex, &b->word, FUTEX_WAIT | b->flag, w, &t, NULL, 0) && errno == ETIMEDOUT) puts("lost wake-up"), exit(1);
    }
    if (i % 16 == 0) {
      char *p = map(40960, MAP_PRIVATE);
      p[i] = 1;
      munmap(p, 40960);
    }
    __atomic_fetch_add(&b->word, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &b->word, FUTEX_WAKE | b->flag, 1, NULL, NULL, 0);
  }
}
static void *other(void *b) { return hit(b, 1), NULL; }

static void *die_with(void *m) { return pthread_mutex_lock(m), NULL; }
static pthread_mutex_t *robust_in(void *at, int shared) {
  pthread_mutexattr_t a;
  pthread_mutexattr_init(&a), pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
  if (shared) pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(at, &a);
  return at;
}
static void inherit(pthread_mutex_t *m) {
  struct timespec t = soon(20);
  int r[4] = {pthread_mutex_timedlock(m, &t)};
  r[1] = pthread_mutex_consistent(m), r[2] = pthread_mutex_unlock(m), r[3] = pthread_mutex_lock(m);
  printf("after its owner's end: %s, made consistent %d, unlocked %d, locked again %d\n", strerror(r[0]), r[1], r[2], r[3]);
  pthread_mutex_unlock(m), pthread_mutex_destroy(m);
}
static void *sleeper(void *m) { /* waits for a robust mutex whose owner is about to end */
  return (void *)(long)pthread_mutex_lock(m);
}

struct board { pthread_mutex_t m; pthread_cond_t c; sem_t s; long n; pthread_barrier_t b; };

int main(void) {
  for (int flag = 0; flag <= FUTEX_PRIVATE_FLAG; flag += FUTEX_PRIVATE_FLAG) {
    struct ball *b = map(1 << 20, MAP_PRIVATE);
    pthread_t t;
    b->flag = flag;
    pthread_create(&t, NULL, other, b);
    hit(b, 0);
    pthread_join(t, NULL);
    printf("%s futex: %d\n", flag ? "private" : "non-private", b->word);
    munmap(b, 1 << 20);
  }
  /* requeue: a condition variable on the heap with many waiters is where glibc and others use it */
  int *w = map(8192, MAP_PRIVATE);
  printf("requeue of nobody: %ld\n", syscall(SYS_futex, w, FUTEX_CMP_REQUEUE, 1, (void *)1, w + 1024, 0));
  printf("wait for another value: %s\n", syscall(SYS_futex, w, FUTEX_WAIT, 1, NULL, NULL, 0) ? strerror(errno) : "woken");

  for (int i = 0; i < 20; i++) { /* every mutex on a page of its own, some fresh */
    pthread_mutex_t *m = robust_in((char *)map(4 * 4096, MAP_PRIVATE) + 4096 * (i % 4), 0);
    pthread_t t, s;
    pthread_create(&t, NULL, die_with, m), pthread_join(t, NULL);
    if (i < 2) inherit(m);
    else if (i < 4) {
      pthread_mutex_consistent(m); /* not ours: refused */
      void *r;
      pthread_create(&s, NULL, sleeper, m), pthread_join(s, &r);
      printf("waiter: %s\n", strerror((int)(long)r));
      inherit(m);
    } else {
      struct timespec t20 = soon(20);
      if (pthread_mutex_timedlock(m, &t20) != EOWNERDEAD) puts("owner's end not seen");
    }
  }

  struct board *b = map(sizeof *b, MAP_SHARED);
  pthread_mutexattr_t ma;
  pthread_condattr_t ca;
  pthread_barrierattr_t ba;
  pthread_mutexattr_init(&ma), pthread_mutexattr_setpshared(&ma, PTHREAD_PROCESS_SHARED), pthread_mutex_init(&b->m, &ma);
  pthread_condattr_init(&ca), pthread_condattr_setpshared(&ca, PTHREAD_PROCESS_SHARED), pthread_cond_init(&b->c, &ca);
  pthread_barrierattr_init(&ba), pthread_barrierattr_setpshared(&ba, PTHREAD_PROCESS_SHARED), pthread_barrier_init(&b->b, &ba, 4);
  sem_init(&b->s, 1, 0);
  fflush(stdout);
  for (int k = 0; k < 4; k++)
    if (!fork()) {
      char *mine = map(1 << 20, MAP_PRIVATE); /* enough to join the enclave anew */
      memset(mine, k, 1 << 20);
      pthread_barrier_wait(&b->b);
      for (int i = 0; i < 2000; i++) {
        pthread_mutex_lock(&b->m);
        b->n++;
        if (b->n == 8000) pthread_cond_broadcast(&b->c);
        pthread_mutex_unlock(&b->m);
      }
      pthread_mutex_lock(&b->m);
      while (b->n < 8000) pthread_cond_wait(&b->c, &b->m);
      pthread_mutex_unlock(&b->m);
      sem_post(&b->s);
      if (k == 3) report();
      _exit(mine[77777] == k ? 0 : 1);
    }
  int bad = 0, st;
  for (int k = 0; k < 4; k++) sem_wait(&b->s);
  while (wait(&st) > 0) bad |= st;
  printf("four processes counted %ld, status %x\n", b->n, (unsigned)bad);
  pthread_mutex_t *m = robust_in(map(4096, MAP_SHARED), 1);
  if (!fork()) {
    pthread_mutex_lock(m);
    raise(9);
  }
  wait(&st);
  printf("killed by %d; ", WTERMSIG(st));
  inherit(m);
  return 0;
}
