/* Every way of making a process, and what the new one sees. 
 * usage: processes STATIC DYNAMIC: this very program, linked statically and not. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "report.h"
#define SIZE (3 << 20)

static void *map(size_t n) { return mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

extern char **environ;
static char *heap;
static int seed;
static char expected(int i) { return (char)(i * 31 + seed); }
static void fill(void) {
  for (int i = 0; i < SIZE; i += 512) heap[i] = expected(i);
}
static int intact(void) {
  for (int i = 0; i < SIZE; i += 512)
    if (heap[i] != expected(i)) return 0;
  return 1;
}
static int status_of(pid_t p) {
  int st;
  if (p < 0 || waitpid(p, &st, 0) != p) return -1;
  return WIFEXITED(st) ? WEXITSTATUS(st) : 1000 + WTERMSIG(st);
}
/* What every child does: looks at what it inherited, makes it its own, and new memory besides. */
static int child(void) {
  if (!intact()) return 1;
  memset(heap, 99, SIZE);
  char *p = map(1 << 20);
  memset(p, 5, 1 << 20);
  return p[1 << 19] == 5 && heap[SIZE - 1] == 99 ? 42 : 2;
}
static void show(const char *how, pid_t p) { printf("%s: child %d, parent intact %d\n", how, status_of(p), intact()), fflush(stdout); }
static char clone_stack[65536] __attribute__((aligned(16)));
static int on_clone_stack(void *arg) { return arg == heap ? child() : 3; }

static int done_by_child;
static int on_shared_memory(void *arg) {
  if (arg != heap) return 3;
  for (int i = 0; i < 200; i++) {
    char *p = map(1 << 20);
    p[i * 4096] = 1;
    munmap(p, 1 << 20);
    done_by_child++;
  }
  return 42;
}

static int nest(int depth) { /* each generation writes, then has a child; each must find its own values when that has ended */
  seed = depth;
  fill();
  if (depth == 5) return 50;
  pid_t p = depth % 2 ? fork() : _Fork();
  if (!p) _exit(intact() ? nest(depth + 1) : 60 + depth);
  int st = status_of(p);
  return intact() ? st : 70 + depth;
}

static int exec_me(const char *program, char **env, char *what) {
  pid_t p = fork();
  if (!p) {
    execve(program, (char *[]){"again", what, NULL}, env);
    _exit(126);
  }
  return status_of(p);
}
/* The new image: says what environment it has. */
static int again(const char *what) {
  printf("new image, %s:", what);
  for (char **e = environ; *e; e++)
    if (strncmp(*e, "SMAPS_TO", 8) && strncmp(*e, "DYNAMIC", 7)) printf(" %s", *e);
  puts(""), fflush(stdout);
  char *p = map(1 << 20);
  memset(p, 1, 1 << 20);
  report();
  if (!strcmp(what, "static")) execve(getenv("DYNAMIC"), (char *[]){"again", "dynamic again", NULL}, environ);
  return p[9] * 11;
}

int main(int argc, char **argv) {
  if (!strcmp(argv[0], "again")) return again(argv[1]);
  heap = malloc(SIZE);
  seed = 1;
  fill();
  pid_t p;
  if (!(p = fork())) _exit(child());
  show("fork", p);
  if (!(p = _Fork())) _exit(child());
  show("_Fork", p);
  if (!(p = (pid_t)syscall(SYS_fork))) _exit(child());
  show("raw fork", p);
  if (!(p = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0))) _exit(child());
  show("raw clone", p);
  int *tid = malloc(64 << 10); /* written by the kernel, in both */
  tid[0] = tid[1] = 0;
  if (!(p = (pid_t)syscall(SYS_clone, CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | SIGCHLD, 0, tid, tid + 1, 0))) _exit(tid[1] == getpid() ? child() : 4);
  printf("ids in the arena: %d %d\n", tid[0] == p, tid[1] == 0);
  show("clone with ids", p);
  struct clone_args ca = {.exit_signal = SIGCHLD};
  p = (pid_t)syscall(SYS_clone3, &ca, sizeof ca);
  if (p < 0 && errno == ENOSYS) p = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); /* as everybody does who calls clone3 */
  if (!p) _exit(child());
  show("clone3, or what stands in for it", p);
  show("clone onto a stack", clone(on_clone_stack, clone_stack + sizeof clone_stack, SIGCHLD, heap));
  char *stack = malloc(65536);
  show("clone onto a stack in the arena", clone(on_clone_stack, (void *)(((unsigned long)stack + 65536) & ~15ul), SIGCHLD, heap));
  /* Processes that share the memory: with the parent waiting, and beside it. */
  show("clone that shares memory, parent waits", clone(on_shared_memory, (void *)(((unsigned long)stack + 65536) & ~15ul), SIGCHLD | CLONE_VM | CLONE_VFORK, heap));
  printf("its work is seen: %d\n", done_by_child), fflush(stdout);
  done_by_child = 0;
  p = clone(on_shared_memory, (void *)(((unsigned long)stack + 65536) & ~15ul), SIGCHLD | CLONE_VM, heap);
  for (int i = 0; i < 200; i++) {
    char *m = map(1 << 20);
    m[i * 4096] = 1;
    munmap(m, 1 << 20);
  }
  show("clone that shares memory, both run", p);
  printf("its work is seen: %d\n", done_by_child), fflush(stdout);

  if (!(p = vfork())) {
    execl("/bin/sh", "sh", "-c", "exit 9", (char *)NULL);
    _exit(126);
  }
  show("vfork and exec", p);
  if (!(p = vfork())) _exit(8);
  show("vfork and exit", p);
  int r = posix_spawnp(&p, "sh", NULL, NULL, (char *[]){"sh", "-c", "exit 7", NULL}, environ);
  show(r ? "posix_spawn failed" : "posix_spawn", p);
  printf("posix_spawn of nothing: %s\n", strerror(posix_spawn(&p, "/nonexistent", NULL, NULL, (char *[]){"x", NULL}, environ)));
  if (!(p = fork())) {
    char *nothing[] = {NULL};
    execve("/nonexistent", nothing, nothing); /* fails, and the program goes on */
    _exit(errno == ENOENT && intact() ? child() : 5);
  }
  show("exec that fails", p);

  if (!(p = fork())) _exit(nest(0));
  show("nested forks", p);

  /* An orphan: its parent has ended before it looks at anything. This process adopts it, so that nothing is left over. */
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  int told[2];
  if (pipe(told)) return 1;
  if (!(p = fork())) {
    pid_t parent = getpid();
    if (!(p = fork())) {
      while (getppid() == parent) usleep(1000);
      _exit(child());
    }
    _exit(write(told[1], &p, sizeof p) == sizeof p ? 6 : 5);
  }
  show("parent of an orphan", p);
  if (read(told[0], &p, sizeof p) == sizeof p) show("orphan", p);

  if (argc > 2) {
    char dynamic[600], smaps[600];
    snprintf(dynamic, sizeof dynamic, "DYNAMIC=%s", argv[2]), snprintf(smaps, sizeof smaps, "SMAPS_TO=%s", getenv("SMAPS_TO") ? getenv("SMAPS_TO") : "/dev/null");
    printf("-> %d\n", exec_me(argv[2], (char *[]){NULL}, "empty environment")), fflush(stdout);
    printf("-> %d\n", exec_me(argv[1], (char *[]){"LD_BIND_NOW=1", dynamic, smaps, NULL}, "static")), fflush(stdout);
  }
  return 0;
}
