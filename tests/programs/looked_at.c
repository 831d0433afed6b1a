/* A process looks at another's memory: /proc/PID/mem, process_vm_readv and _writev, ptrace; while it runs and while it is stopped. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include "report.h"

static pid_t child;
static int mem;
static void look(const char *what, char *at, int writing) {
  char b[32] = "", c[32] = "";
  ssize_t n = pread(mem, b, 16, (off_t)(uintptr_t)at);
  printf("%s: /proc/PID/mem %zd \"%s\"", what, n, b);
  struct iovec here = {c, 16}, there = {at, 16};
  n = process_vm_readv(child, &here, 1, &there, 1, 0);
  printf(", process_vm_readv %zd \"%s\"", n, c);
  if (writing) {
    here = (struct iovec){"written from out", 16};
    n = process_vm_writev(child, &here, 1, &there, 1, 0);
    printf(", process_vm_writev %zd", n);
    printf(", pwrite %zd", pwrite(mem, "poked", 6, (off_t)(uintptr_t)at + 4096));
  }
  puts(""), fflush(stdout);
}

int main(int argc, char **argv) {
  int up[2], down[2];
  char *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  int untouched = argc > 1 && !strcmp(argv[1], "untouched");
  if (pipe(up) || pipe(down)) return 1;
  if (!(child = fork())) {
    char b = 0, *q = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    strcpy(q, "precious data"), strcpy(q + (256 << 10), "more of it");
    q[4096] = 1;
    mprotect(q + (256 << 10), 4096, PROT_READ);
    report();
    if (write(up[1], &q, sizeof q) != sizeof q || read(down[0], &b, 1) != 1) _exit(1);
    printf("the process itself: \"%.16s\" \"%s\" \"%s\"\n", q, q + 4096, q + (512 << 10)), fflush(stdout);
    _exit(0);
  }
  if (read(up[0], &p, sizeof p) != sizeof p) return 1;
  char file[64];
  snprintf(file, sizeof file, "/proc/%d/mem", child);
  mem = open(file, O_RDWR);
  if (untouched) {
    look("untouched page", p + (768 << 10), 0);
  } else {
    look("running", p, 1);
    look("running, read-only page", p + (256 << 10), 0);
    kill(child, SIGSTOP);
    int st;
    waitpid(child, &st, WUNTRACED);
    look("stopped", p, 1);
    kill(child, SIGCONT);
    ptrace(PTRACE_SEIZE, child, 0, 0), ptrace(PTRACE_INTERRUPT, child, 0, 0);
    waitpid(child, &st, 0);
    look("traced", p, 1);
    errno = 0;
    long w = ptrace(PTRACE_PEEKDATA, child, p, 0);
    printf("peek %.8s, poke %ld\n", (char *)&w, ptrace(PTRACE_POKEDATA, child, p + 4096, 0x6867696820656d6f));
    ptrace(PTRACE_DETACH, child, 0, 0);
  }
  fflush(stdout);
  if (write(down[1], "x", 1) != 1) return 1;
  int st;
  waitpid(child, &st, 0);
  printf("status %x\n", (unsigned)st);
  return 0;
}
