/* unshare and setns from a program with memory: what works natively, one line each. Needs root. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include "report.h"

static void attempt(const char *name, int flag) {
  fflush(stdout);
  pid_t p = fork();
  if (!p) {
    char *volatile q = malloc(1 << 20);
    q[5] = 1; /* joins the enclave */
    int r = unshare(flag);
    printf("unshare %s: %s\n", name, r ? strerror(errno) : "ok");
    if (!r && flag == CLONE_NEWPID) {
      fflush(stdout);
      pid_t g = fork();
      if (!g) {
        q = malloc(1 << 20);
        for (int i = 0; i < 1 << 20; i += 4096) q[i] = 1;
        printf("process %d of its namespace\n", (int)getpid());
        report();
        fflush(stdout);
        _exit(0);
      }
      waitpid(g, NULL, 0);
    }
    fflush(stdout);
    _exit(0);
  }
  waitpid(p, NULL, 0);
}
static void enter(const char *name, int flag) {
  char file[64];
  fflush(stdout);
  pid_t p = fork();
  if (!p) {
    char *volatile q = malloc(1 << 20);
    q[5] = 1;
    snprintf(file, sizeof file, "/proc/%d/ns/%s", getppid(), name);
    int fd = open(file, O_RDONLY);
    printf("setns %s: %s\n", name, setns(fd, flag) ? strerror(errno) : "ok"), fflush(stdout);
    _exit(0);
  }
  waitpid(p, NULL, 0);
}
int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "user")) {
    attempt("user", CLONE_NEWUSER);
    return 0;
  }
  attempt("mount", CLONE_NEWNS), attempt("uts", CLONE_NEWUTS), attempt("ipc", CLONE_NEWIPC), attempt("net", CLONE_NEWNET), attempt("pid", CLONE_NEWPID);
  attempt("files", CLONE_FILES), attempt("fs", CLONE_FS);
  enter("mnt", CLONE_NEWNS), enter("uts", CLONE_NEWUTS), enter("ipc", CLONE_NEWIPC), enter("net", CLONE_NEWNET), enter("pid", CLONE_NEWPID);
  return 0;
}
