/* Ends at a given moment, while its threads are in the middle of page faults and memory calls. usage: exits HOW MICROSECONDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include "report.h"

static void *fault(void *arg) {
  for (unsigned n = (unsigned)(long)arg;; n = n * 1103515245 + 12345) {
    size_t size = (64 << 10) + (n >> 8) % (2 << 20);
    char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    for (size_t i = 0; i < size; i += 4096) p[i] = 1;
    if (n & 65536) madvise(p, size / 2, MADV_DONTNEED);
    char *q = malloc(n >> 8 & 0xffff);
    if (q) q[0] = 1;
    free(q);
    munmap(p, size);
  }
  return NULL;
}
static useconds_t when;
static volatile int *volatile nowhere = (volatile int *)8;
static const char *how;
static void *act(void *arg) { /* how the process ends, from whatever thread */
  (void)arg;
  usleep(when);
  if (!strcmp(how, "exit")) exit(21);
  if (!strcmp(how, "abort")) abort();
  if (!strcmp(how, "kill")) raise(SIGKILL);
  if (!strcmp(how, "crash")) *nowhere = 1;
  if (!strcmp(how, "exec") || !strcmp(how, "exec-thread")) execl("/bin/sh", "sh", "-c", "exit 22", (char *)NULL);
  if (!strcmp(how, "spawn")) {
    int st;
    pid_t p = vfork();
    if (!p) {
      execl("/bin/sh", "sh", "-c", "exit 2", (char *)NULL);
      _exit(1);
    }
    waitpid(p, &st, 0);
    _exit(21 + WEXITSTATUS(st));
  }
  if (!strcmp(how, "fork")) { /* the child goes on by itself; it and its parent end at about the same moment */
    pid_t p = fork();
    if (!p) {
      fault_some:;
      char *q = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      memset(q, 1, 1 << 20);
      if (q[5] == 2) goto fault_some;
      _exit(0);
    }
    _exit(p > 0 ? 24 : 1);
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  how = argv[1], when = (useconds_t)atoi(argv[2]);
  pthread_t t;
  for (long i = 1; i < 5; i++) pthread_create(&t, NULL, fault, (void *)(i * 77777));
  if (strcmp(how, "exec-thread") && strcmp(how, "crash")) act(NULL);
  pthread_create(&t, NULL, act, NULL); /* not the first thread */
  for (;;) pause();
}
