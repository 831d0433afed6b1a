/* Memory calls and forks that libc does not make: inline system calls. Prints one line per case; natively the same. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static long raw(long n, long a, long b, long c, long d, long e, long f) {
  long r;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
static volatile long counter[2];
static volatile int stop;
static char *shared_page;
static void *keep_writing(void *x) {
  (void)x;
  for (long i = 1; !stop; i++) counter[0] = i, *(volatile long *)shared_page = i;
  return NULL;
}

int main(void) {
  size_t big = 1 << 20;
  char *p = (char *)raw(SYS_mmap, 0, (long)big, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(p, 3, big);
  printf("mmap past libc: %d %d\n", p[0], p[big - 1]);
  char *q = mmap(NULL, big, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(q, 4, big);
  long r = raw(SYS_madvise, (long)q, 8192, MADV_DONTNEED, 0, 0, 0);
  printf("madvise past libc: %ld, then %d %d\n", r, q[0], q[8192]);
  printf("mprotect past libc: %ld\n", raw(SYS_mprotect, (long)q, 4096, PROT_READ, 0, 0, 0));
  printf("mprotect of nothing: %ld\n", (munmap(q + 65536, 65536), raw(SYS_mprotect, (long)q + 65536, 4096, PROT_READ, 0, 0, 0)));
  char *m = (char *)raw(SYS_mremap, (long)q + 131072, 65536, 262144, MREMAP_MAYMOVE, 0, 0);
  printf("mremap past libc: %d %d\n", m[65535], m[65536]);
  printf("munmap past libc: %ld\n", raw(SYS_munmap, (long)q, (long)big, 0, 0, 0, 0));
  shared_page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char *heap = malloc(3 << 20), *none = mmap(NULL, 65536, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(heap, 7, 3 << 20);
  pthread_t t;
  pthread_create(&t, NULL, keep_writing, NULL);
  usleep(10000);
  fflush(stdout);
  for (int i = 0; i < 3; i++) {
    long c = i == 1 ? raw(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0) : raw(SYS_fork, 0, 0, 0, 0, 0, 0);
    if (c == 0) { /* the child: its own copy of everything, and memory calls still work */
      long a = *(volatile long *)shared_page;
      usleep(20000);
      int ok = heap[0] == 7 && heap[(3 << 20) - 1] == 7 && a == *(volatile long *)shared_page && p[5] == 3;
      memset(heap, 9, 3 << 20);
      ok &= mprotect(none, 4096, PROT_READ | PROT_WRITE) == 0 && none[0] == 0;
      char *n = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      n[77] = 1;
      ok &= munmap(n, 1 << 20) == 0 && munmap(shared_page, 4096) == 0;
      raw(SYS_exit_group, ok ? 0 : 1, 0, 0, 0, 0, 0);
    }
    int st = -1;
    waitpid((pid_t)c, &st, 0);
    printf("fork past libc: child %s %d, parent's heap %d\n", WIFEXITED(st) ? "exited" : "died", WIFEXITED(st) ? WEXITSTATUS(st) : WTERMSIG(st), heap[1]);
    fflush(stdout);
  }
  stop = 1;
  pthread_join(t, NULL);
  printf("thread went on: %d\n", counter[0] > 0 && *(volatile long *)shared_page == counter[0]);
  char *after = malloc(8 << 20);
  memset(after, 1, 8 << 20);
  pid_t c = fork();
  if (!c) _exit(after[100] == 1 && heap[100] == 7 ? 5 : 6);
  int st;
  waitpid(c, &st, 0);
  printf("fork by libc afterwards: %d\n", WEXITSTATUS(st));
  return 0;
}
