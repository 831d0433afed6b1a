/* sylvie-keeper SOCKET (descriptor 3: socket to the launcher): keeps a launched tree's seccomp listener alive.
 *
 * A listener whose last holder has gone makes every notified call fail with ENOSYS, for ever, in the whole tree. So this
 * process outlives the gateway: while the gateway is there it only waits; while it is not, it answers "continue natively",
 * beginning with what the gateway left unanswered (the gateway notes ids in a shared page), and offers the listener to the next
 * gateway. It ends when the last process under the filter has ended (POLLHUP). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/seccomp.h>
#include "sys.h"

static int recv_fd(int sock) {
  char b, c[CMSG_SPACE(sizeof(int))];
  struct iovec v = {&b, 1};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c};
  if (recvmsg(sock, &m, MSG_CMSG_CLOEXEC) <= 0) return -1;
  struct cmsghdr *h = CMSG_FIRSTHDR(&m);
  int fd = -1;
  if (h && h->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(h), sizeof fd);
  return fd;
}

static int offer(const char *path, int listener, int page) {
  int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  strncpy(a.sun_path, path, sizeof a.sun_path - 1);
  if (s < 0) return -1;
  if (connect(s, (struct sockaddr *)&a, sizeof a)) return close(s), -1;
  int fds[2] = {listener, page};
  char c[CMSG_SPACE(sizeof fds)] = {0};
  struct sy_hello hello = {SY_MAGIC, SY_ABI_VERSION, SY_HELLO_KEEPER, 0, 0};
  struct iovec v = {&hello, sizeof hello};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c};
  struct cmsghdr *h = CMSG_FIRSTHDR(&m);
  h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof fds);
  memcpy(CMSG_DATA(h), fds, sizeof fds);
  if (sendmsg(s, &m, MSG_NOSIGNAL) != sizeof hello) return close(s), -1;
  return s;
}

static void answer(int listener, uint64_t id) {
  struct seccomp_notif_resp r = {.id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
  ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &r); /* ENOENT: the caller has gone, nothing to do */
}

int main(int argc, char **argv) {
  if (argc != 2) return fprintf(stderr, "sylvie-keeper is started by sylvie-launch\n"), 2;
  signal(SIGHUP, SIG_IGN), signal(SIGINT, SIG_IGN), signal(SIGQUIT, SIG_IGN), signal(SIGTERM, SIG_IGN), signal(SIGTSTP, SIG_IGN);
  /* The program's pipes and terminal must not stay open because of us. */
  syscall(__NR_close_range, 0, 2, 0), syscall(__NR_close_range, 4, ~0U, 0);
  if (chdir("/")) return 1;
  int listener = recv_fd(3);
  close(3);
  if (listener < 0) return 1; /* the launcher runs below another managed program, or has died */
  int page = memfd_create("sylvie-keeper", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (page < 0 || ftruncate(page, 4096) || fcntl(page, F_ADD_SEALS, F_SEAL_SHRINK)) return 1; /* the gateway insists: it writes there */
  volatile struct sy_keeper_page *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
  if (p == MAP_FAILED) return 1;

  int gw = offer(argv[1], listener, page);
  for (;;) {
    struct pollfd f[2] = {{listener, gw < 0 ? POLLIN : 0, 0}, {gw, POLLIN, 0}};
    if (poll(f, 2, gw < 0 ? 500 : -1) < 0 && errno != EINTR) return 1;
    if (f[0].revents & (POLLHUP | POLLERR)) return 0;
    if (gw >= 0 && f[1].revents) {
      char b[256];
      ssize_t r = recv(gw, b, sizeof b, MSG_DONTWAIT);
      if (r > 0 || (r < 0 && errno == EAGAIN)) continue; /* the gateway's welcome */
      close(gw), gw = -1;
      for (int i = 0; i < SY_KEEPER_INFLIGHT; i++)
        if (p->inflight[i]) answer(listener, p->inflight[i]), p->inflight[i] = 0;
      continue;
    }
    if (gw < 0) {
      if (f[0].revents & POLLIN) {
        struct seccomp_notif n;
        memset(&n, 0, sizeof n);
        if (!ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &n)) answer(listener, n.id);
      } else
        gw = offer(argv[1], listener, page);
    }
  }
}
