/* sylvie-launch RUN_DIR STUB KEEPER [--sched] [--ksm] [--overcommit] [--limit FRAMES] -- CMD…: starts CMD in this very process, under Sylvie's filter and with the stub preloaded.
 *
 * The keeper (one a launched tree) is started first, outside of the filter and not as our child, so that CMD's own wait()
 * never sees it. It gets the filter's listener and passes a duplicate to the gateway. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include "filter.h"

#define WAIT_KILLABLE (1UL << 5) /* SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, Linux 5.19 */

static void die(const char *what) {
  fprintf(stderr, "sylvie run: %s: %s\n", what, strerror(errno));
  _exit(125);
}

static int send_fd(int sock, int fd) {
  char c[CMSG_SPACE(sizeof(int))] = {0};
  struct iovec v = {"L", 1};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c};
  struct cmsghdr *h = CMSG_FIRSTHDR(&m);
  h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(h), &fd, sizeof fd);
  return sendmsg(sock, &m, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

static void start_keeper(const char *keeper, const char *sock_path, int fd, int other) {
  pid_t p = fork();
  if (p < 0) die("cannot start the keeper");
  if (p == 0) {
    if (fork()) _exit(0);
    setsid();
    close(other);
    dup2(fd, 3);
    execl(keeper, "sylvie-keeper", sock_path, (char *)NULL);
    _exit(1); /* the launcher's send then fails, and says so */
  }
  while (waitpid(p, NULL, 0) < 0 && errno == EINTR) {
  }
}

/* sched has this process from now on, and so all that it becomes and starts. */
static void give_to_sched(const char *path) {
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  struct sy_hello h = {.magic = SY_MAGIC, .abi = SY_ABI_VERSION, .kind = SY_HELLO_SCHED};
  struct sy_welcome w;
  int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  memcpy(a.sun_path, path, strlen(path) + 1); /* (main has seen that it fits) */
  if (s < 0 || connect(s, (struct sockaddr *)&a, sizeof a) || send(s, &h, sizeof h, MSG_NOSIGNAL) != sizeof h || recv(s, &w, sizeof w, 0) != sizeof w) die("the gateway does not answer");
  if (w.status != SY_W_OK) {
    fprintf(stderr, "sylvie run: this enclave schedules no threads: `sylvie sched status` says why\n");
    _exit(125);
  }
  close(s);
}

int main(int argc, char **argv) {
  int ksm = 0, overcommit = 0, sched = 0;
  unsigned long limit = 0, group;
  char **cmd = argv + (argc > 4 ? 4 : argc);
  for (; *cmd && strcmp(*cmd, "--"); cmd++) {
    if (!strcmp(*cmd, "--sched")) sched = 1;
    else if (!strcmp(*cmd, "--ksm")) ksm = 1;
    else if (!strcmp(*cmd, "--overcommit")) overcommit = 1;
    else if (!strcmp(*cmd, "--limit") && cmd[1]) limit = strtoul(*++cmd, NULL, 10);
    else break;
  }
  if (*cmd && !strcmp(*cmd, "--")) cmd++;
  else cmd = argv + argc;
  if (!*cmd || limit > UINT32_MAX) {
    fprintf(stderr, "usage: sylvie-launch RUN_DIR STUB KEEPER [--sched] [--ksm] [--overcommit] [--limit FRAMES] -- CMD…   (use `sylvie run -- CMD…`)\n");
    return 125;
  }
  char sock_path[256], mark[300], *preload = NULL;
  if ((size_t)snprintf(sock_path, sizeof sock_path, "%s/gateway.sock", argv[1]) >= 100) {
    fprintf(stderr, "sylvie run: the run directory's name is too long for a socket: %s\n", argv[1]);
    return 125;
  }
  int sp[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sp)) die("socketpair");
  start_keeper(argv[3], sock_path, sp[1], sp[0]);
  close(sp[1]);

  struct sock_fprog prog = sy_filter_link();
  int fd = -1;
  for (int nnp = 0; fd < 0 && nnp < 2; nnp++) { /* without privilege the kernel wants no_new_privs first */
    if (nnp) prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    fd = (int)syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE, &prog);
    if (fd < 0 && errno == EINVAL)
      fd = (int)syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &prog);
    /* EBUSY: we run below another managed program. Its filter and keeper cover us. */
    if (fd < 0 && errno == EBUSY) break;
  }
  if (fd < 0 && errno != EBUSY) die("cannot install the seccomp filter");
  if (fd >= 0 && send_fd(sp[0], fd)) die("cannot reach the keeper");
  if (fd >= 0) close(fd);
  close(sp[0]);

  if (sched) give_to_sched(sock_path);
  const char *old = getenv("LD_PRELOAD");
  if (asprintf(&preload, "%s%s%s", argv[2], old ? ":" : "", old ? old : "") < 0) die("memory");
  const char *may = ksm && overcommit ? "ksm:overcommit:" : ksm ? "ksm:" : overcommit ? "overcommit:" : "";
  if (limit && getrandom(&group, sizeof group, 0) != sizeof group) die("getrandom");
  if (limit) snprintf(mark, sizeof mark, "%s%lu.%lx@%s", may, limit, group, sock_path); /* all that it starts inherits that, and so shares it */
  else snprintf(mark, sizeof mark, "%s%s", may, sock_path);
  setenv("LD_PRELOAD", preload, 1);
  setenv("_SYLVIE", mark, 1);
  execvp(cmd[0], cmd);
  fprintf(stderr, "sylvie run: %s: %s\n", cmd[0], strerror(errno));
  return errno == ENOENT ? 127 : 126;
}
