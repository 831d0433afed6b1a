/* Stacks in memory that malloc and mmap gave: coroutines, alternate signal stacks, threads; and signals that meet page faults. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include "report.h"
#define COROUTINES 1000
#define STACK (32ul << 10)
static ucontext_t home, routine[COROUTINES];
static long sum[COROUTINES];
static void *map(size_t n) { return mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

static void coroutine(int me) {
  char mine[2000];
  memset(mine, me % 100, sizeof mine);
  for (int i = 0; i < 5; i++) {
    unsigned char *p = malloc(5000 + (size_t)me % 3000), *q = map(16384); /* memory calls from a stack in the arena */
    memset(p, me % 251, 5000), q[9000] = (unsigned char)i;
    swapcontext(&routine[me], &home);
    sum[me] += p[4999] + q[9000] + mine[i * 100];
    free(p), munmap(q, 16384);
  }
}

static volatile sig_atomic_t hits, on_alternate;
static char *alternate;
static sigjmp_buf back;
static void overflowed(int s) {
  char here;
  (void)s;
  on_alternate = &here >= alternate && &here < alternate + 65536;
  siglongjmp(back, 1);
}
static int deep(int n) {
  volatile char frame[4096];
  frame[0] = (char)n;
  return n > 1 << 30 ? 0 : deep(n + 1) + frame[0];
}
static void __attribute__((noinline)) go_deep(void) {
  if (!sigsetjmp(back, 1)) deep(0);
}
static void *overflow(void *arg) { /* on a small stack in the arena, with a page without access below */
  stack_t ss = {.ss_sp = alternate = map(65536), .ss_size = 65536}; /* untouched: the kernel itself faults in it */
  (void)arg;
  sigaltstack(&ss, NULL);
  go_deep();
  ss.ss_flags = SS_DISABLE;
  sigaltstack(&ss, NULL);
  return NULL;
}

static void count(int s) {
  (void)s;
  int saved = errno;
  char *p = map(20480); /* a handler that allocates, in the middle of a fault */
  p[0] = p[20479] = 1;
  munmap(p, 20480);
  hits++;
  errno = saved;
}
static volatile int stop;
static int finished;
static pthread_t target[3];
static __thread sigjmp_buf restart;
static __thread volatile sig_atomic_t armed;
static void jump(int s) {
  (void)s;
  hits++;
  if (armed) siglongjmp(restart, 1);
}
static void *(*work)(void *);
static void *working(void *arg) {
  long r = 0;
  do r += (long)work(arg);
  while (hits < 20); /* or all work is done before the storm has begun */
  __atomic_fetch_add(&finished, 1, __ATOMIC_RELEASE);
  return (void *)r;
}
static void *storm(void *arg) {
  (void)arg;
  while (!stop)
    for (int i = 0; i < 3; i++) {
      pthread_kill(target[i], SIGUSR1), pthread_kill(target[i], SIGUSR2);
      struct timespec t = {0, 20000};
      nanosleep(&t, NULL);
    }
  return NULL;
}
static void *faulting(void *arg) {
  long wrong = 0;
  sigset_t none;
  (void)arg;
  sigemptyset(&none), sigaddset(&none, SIGUSR2);
  pthread_sigmask(SIG_BLOCK, &none, NULL);
  for (int round = 0; round < 40; round++) {
    unsigned char *p = map(1 << 20);
    for (int i = 0; i < 256; i++) p[i * 4096] = (unsigned char)i;
    for (int i = 0; i < 256; i++) wrong += p[i * 4096] != i;
    munmap(p, 1 << 20);
  }
  return (void *)wrong;
}
static void *jumping(void *arg) {
  long wrong = 0;
  unsigned char *p = map(16 << 20);
  volatile int at = 0;
  (void)arg;
  sigsetjmp(restart, 1);
  armed = 1;
  for (; at < 4096; at++) p[at * 4096] = (unsigned char)(at | 1); /* interrupted by a jump: goes on at the same page */
  armed = 0;
  for (int i = 0; i < 4096; i++) wrong += p[i * 4096] != (unsigned char)(i | 1);
  munmap(p, 16 << 20);
  return (void *)wrong;
}
static void *waiting(void *arg) { /* everything blocked, signals taken only in sigsuspend */
  sigset_t all, open;
  (void)arg;
  sigfillset(&all), pthread_sigmask(SIG_BLOCK, &all, NULL);
  sigfillset(&open), sigdelset(&open, SIGUSR1);
  for (int i = 0; i < 50; i++) {
    sigsuspend(&open);
    char *p = map(65536);
    p[i] = 1;
    munmap(p, 65536);
  }
  return NULL;
}
static void *with_stack(void *arg) {
  char b[8192];
  memset(b, (int)(long)arg, sizeof b);
  return (void *)(long)b[8191];
}

static void __attribute__((noinline)) begin(int i) {
  getcontext(&routine[i]);
  routine[i].uc_stack.ss_sp = i % 2 ? malloc(STACK) : map(STACK);
  routine[i].uc_stack.ss_size = STACK, routine[i].uc_link = &home;
  makecontext(&routine[i], (void (*)(void))coroutine, 1, i);
}
static void coroutines(void) {
  for (int i = 0; i < COROUTINES; i++) begin(i);
  for (int turn = 0; turn < 6; turn++)
    for (int i = 0; i < COROUTINES; i++) swapcontext(&home, &routine[(i * 7) % COROUTINES]);
  long wrong = 0;
  for (int i = 0; i < COROUTINES; i++) wrong += sum[i] != 5l * (i % 251) + 10 + 5l * (i % 100);
  printf("coroutines that computed something else: %ld\n", wrong);
  report();
}

int main(void) {
  coroutines();
  struct sigaction sa = {.sa_handler = overflowed, .sa_flags = SA_ONSTACK};
  sigaction(SIGSEGV, &sa, NULL);
  for (int i = 0; i < 3; i++) {
    pthread_attr_t at;
    pthread_t t;
    char *stack = map(256 << 10);
    mprotect(stack, 4096, PROT_NONE);
    pthread_attr_init(&at), pthread_attr_setstack(&at, stack, 256 << 10);
    on_alternate = 0;
    pthread_create(&t, &at, overflow, NULL), pthread_join(t, NULL);
    printf("stack overflow handled on the alternate stack: %d\n", on_alternate);
    void *r;
    mprotect(stack, 4096, PROT_READ | PROT_WRITE);
    pthread_create(&t, &at, with_stack, (void *)(long)(i + 40)), pthread_join(t, &r);
    printf("thread on a stack of ours: %ld\n", (long)r);
    munmap(stack, 256 << 10);
  }

  for (int how = 0; how < 3; how++) {
    struct sigaction c = {.sa_handler = how == 1 ? jump : count, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &c, NULL), sigaction(SIGUSR2, &c, NULL);
    hits = 0, stop = 0;
    work = how == 0 ? faulting : how == 1 ? jumping : waiting;
    finished = 0;
    for (int i = 0; i < 3; i++) pthread_create(&target[i], NULL, working, NULL);
    pthread_t s;
    pthread_create(&s, NULL, storm, NULL);
    /* Not joined while the storm still names them. */
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < 3) usleep(1000);
    stop = 1;
    pthread_join(s, NULL);
    long wrong = 0;
    for (int i = 0; i < 3; i++) {
      void *r;
      pthread_join(target[i], &r);
      wrong += (long)r;
    }
    printf("%s: wrong %ld, signals came: %d\n", how == 0 ? "handlers that allocate" : how == 1 ? "jumps out of handlers" : "sigsuspend", wrong, hits > 0);
  }
  return 0;
}
