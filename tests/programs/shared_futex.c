/* Waiters on futexes that are not private, while the memory below them turns native: nobody is lost. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define STACK (256 << 10)
static volatile int go;
static void release(void) { /* vmsplice: the address space is released before it goes on */
  int p[2];
  char *b = malloc(1 << 20);
  memset(b, 1, 1 << 20);
  struct iovec v = {b, 4096};
  if (pipe(p) || vmsplice(p[1], &v, 1, 0) != 4096) exit(2);
}
static void *sleeper(void *arg) { /* on a stack of the program's own: its end is a wake of the kernel's, at its id in there */
  (void)arg;
  while (!go) usleep(1000);
  return NULL;
}
static sem_t *sem;
static uint32_t *word;
static void *waits(void *arg) {
  (void)arg;
  while (sem_wait(sem)) {
  }
  return NULL;
}
static void *waits_raw(void *arg) {
  (void)arg;
  while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == 0) syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL, NULL, 0);
  return NULL;
}
static void *joins(void *t) {
  pthread_join(*(pthread_t *)t, NULL);
  return NULL;
}

int main(void) {
  char *m = mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(m, 0, 4 << 20);
  sem = (void *)(m + (2 << 20) + 4096), word = (void *)(m + (3 << 20) + 64);
  sem_init(sem, 1 /* between processes, so not private */, 0);
  pthread_attr_t a;
  pthread_attr_init(&a);
  pthread_attr_setstack(&a, m, STACK);
  pthread_t s, j, w, r;
  if (pthread_create(&s, &a, sleeper, NULL) || pthread_create(&j, NULL, joins, &s) || pthread_create(&w, NULL, waits, NULL) || pthread_create(&r, NULL, waits_raw, NULL)) return 1;
  usleep(200000);
  release();
  usleep(50000);
  go = 1;
  pthread_join(j, NULL);
  printf("joined\n");
  sem_post(sem);
  pthread_join(w, NULL);
  printf("semaphore\n");
  __atomic_store_n(word, 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
  pthread_join(r, NULL);
  printf("futex\n");
  return 0;
}
