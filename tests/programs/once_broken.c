/* What broke once, and is as it is natively now. usage: once_broken WHICH */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define PS 4096ul
#define HUGE (2ul << 20)

static char *map(size_t n) { return mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

/* A forked child that has joined trims the heap that it inherited, and lets it grow again. */
static void trimmed_heap(void) {
  static char *b[128];
  for (int i = 0; i < 128; i++) memset(b[i] = malloc(64 << 10), 1, 64 << 10);
  pid_t p = fork();
  if (!p) {
    memset(malloc(1 << 20), 2, 1 << 20);
    for (int i = 127; i >= 0; i--) free(b[i]);
    for (int i = 0; i < 128; i++) memset(b[i] = malloc(64 << 10), 3, 64 << 10);
    _exit(0);
  }
  int st;
  waitpid(p, &st, 0);
  printf("child %d\n", st);
}

/* A part of a 2 MiB block is purged while somebody reads the rest: what was purged is zero, and nobody else's. */
static char *volatile block;
static volatile int stop;
static void *reads(void *x) {
  unsigned s = 1;
  for (volatile char c = 0; !stop;) {
    char *b = block;
    if (b) s = s * 1103515245 + 12345, c += ((volatile char *)b)[(256 + (s >> 16) % 256) * PS];
  }
  return x;
}
static void purged_blocks(void) {
  pthread_t t;
  char *base = map(16 * HUGE);
  base = (char *)(((unsigned long)base + HUGE - 1) & ~(HUGE - 1));
  if (pthread_create(&t, NULL, reads, NULL)) exit(1);
  long bad = 0;
  time_t end = time(NULL) + 4;
  for (unsigned long i = 0; i < 4 * HUGE; i += PS) base[i] = 1;
  for (long round = 0; time(NULL) < end; round++) {
    char *b = base + (round % 8 + 4) * HUGE;
    for (unsigned long i = 0; i < HUGE; i += PS) b[i] = 7;
    block = b;
    for (unsigned long i = 0; i < 20; i++) madvise(b + i * PS, PS, MADV_DONTNEED);
    for (unsigned long i = 0; i < 20; i++) bad += ((volatile char *)b)[i * PS] != 0;
    block = NULL;
    madvise(b, HUGE, MADV_DONTNEED);
  }
  stop = 1;
  pthread_join(t, NULL);
  printf("%ld pages are not zero\n", bad);
}

static void large_environment(void) {
  char k[32];
  for (int i = 0; i < 4500; i++) snprintf(k, sizeof k, "V%d", i), setenv(k, "x", 1);
  printf("system() %d\n", system("exit 5"));
}

static void ignored_children(void) {
  char *p = map(64 << 20);
  memset(p, 1, 64 << 20);
  signal(SIGCHLD, SIG_IGN);
  for (int i = 0; i < 20; i++)
    if (!fork()) _exit(0);
  printf("forked\n");
}

static void *idles(void *x) {
  for (;;) pause();
  return x;
}
static void ids_in_memory(void) {
  pthread_t t;
  if (pthread_create(&t, NULL, idles, NULL)) exit(1);
  char *p = map(1 << 20);
  p[0] = 1;
  int *id = (int *)(p + (512 << 10)), st;
  long r = syscall(SYS_clone, CLONE_PARENT_SETTID | SIGCHLD, 0, id, 0, 0);
  if (!r) _exit(0);
  printf("%d\n", *id == r);
  waitpid((pid_t)r, &st, 0);
  memset(p, 1, 1 << 20);
  r = syscall(SYS_clone, CLONE_PIDFD | SIGCHLD, 0, id, 0, 0);
  if (!r) _exit(0);
  printf("%d\n", *id > 2 && close(*id) == 0);
}

int main(int argc, char **argv) {
  static const struct { const char *name; void (*f)(void); } all[] = {{"trimmed heap", trimmed_heap}, {"purged blocks", purged_blocks},
      {"large environment", large_environment}, {"ignored children", ignored_children}, {"ids in memory", ids_in_memory}};
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
    if (argc == 2 && !strcmp(argv[1], all[i].name)) return all[i].f(), 0;
  return 3;
}
