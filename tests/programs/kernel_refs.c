/* Memory that the kernel goes on holding by reference after the program has unmapped it: what arrives must be what was there, and what
 * comes later to that memory must not be disturbed. Prints what it sees, the same natively and managed. usage: kernel_refs WHICH DIR */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef MSG_ZEROCOPY
#define MSG_ZEROCOPY 0x4000000
#endif
#define PIECE (64 << 10)
#define SPACE (32 << 20)

static void need(int ok, const char *what) {
  if (ok) return;
  printf("%s: %s\n", what, strerror(errno));
  exit(1);
}
static char *fresh(size_t n) {
  char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  need(p != MAP_FAILED, "mmap");
  return p;
}
/* What else the enclave has to give is used, by us and by a process of its own, so that a frame given back early is written over. */
static void use_memory(void) {
  pid_t pid = fork();
  need(pid >= 0, "fork");
  if (pid == 0) {
    char *p = fresh(SPACE);
    memset(p, 0xEE, SPACE);
    _exit(p[SPACE / 2] == (char)0xEE ? 0 : 1);
  }
  char *p = fresh(SPACE);
  memset(p, 0xDD, SPACE);
  int st;
  while (waitpid(pid, &st, 0) < 0 && errno == EINTR) {
  }
  need(st == 0, "the other process");
  munmap(p, SPACE);
}
static void all(const char *p, size_t n, char c, const char *what) {
  size_t wrong = 0;
  for (size_t i = 0; i < n; i++) wrong += p[i] != c;
  printf("%s: %zu of %zu bytes are wrong\n", what, wrong, n);
}
static char got[PIECE];
static void read_all(int fd, size_t n) {
  for (size_t at = 0; at < n;) {
    ssize_t r = read(fd, got + at, n - at);
    need(r > 0, "read");
    at += (size_t)r;
  }
}

static void do_vmsplice(void) {
  int p[2];
  need(pipe(p) == 0, "pipe");
  char *b = fresh(PIECE);
  memset(b, 'v', PIECE);
  struct iovec v = {b, PIECE / 2};
  need(vmsplice(p[1], &v, 1, 0) == PIECE / 2, "vmsplice");
  munmap(b, PIECE);
  use_memory();
  read_all(p[0], PIECE / 2);
  all(got, PIECE / 2, 'v', "vmsplice");
}

static void do_zerocopy(void) {
  int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t len = sizeof a;
  need(bind(l, (struct sockaddr *)&a, sizeof a) == 0 && listen(l, 1) == 0 && getsockname(l, (struct sockaddr *)&a, &len) == 0, "listen");
  need(connect(c, (struct sockaddr *)&a, sizeof a) == 0, "connect");
  int s = accept(l, NULL, NULL);
  need(s >= 0 && setsockopt(c, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) == 0, "SO_ZEROCOPY");
  char *b = fresh(PIECE);
  memset(b, 'z', PIECE);
  ssize_t n = send(c, b, PIECE / 2, MSG_ZEROCOPY);
  need(n > 0, "send");
  munmap(b, PIECE);
  use_memory();
  read_all(s, (size_t)n);
  all(got, (size_t)n, 'z', "zerocopy");
}

/* A read that ends only after its buffer is gone: the bytes must go nowhere else. */
struct ring { int fd; unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail; struct io_uring_sqe *sqe; };
static void ring_open(struct ring *r) {
  struct io_uring_params p = {0};
  r->fd = (int)syscall(__NR_io_uring_setup, 8, &p);
  need(r->fd >= 0, "io_uring_setup");
  char *m = mmap(NULL, p.sq_off.array + p.sq_entries * 4 + 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
  char *c = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_CQ_RING);
  r->sqe = mmap(NULL, p.sq_entries * sizeof *r->sqe, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
  need(m != MAP_FAILED && c != MAP_FAILED && r->sqe != MAP_FAILED, "ring");
  r->sq_tail = (void *)(m + p.sq_off.tail), r->sq_mask = (void *)(m + p.sq_off.ring_mask), r->sq_array = (void *)(m + p.sq_off.array);
  r->cq_head = (void *)(c + p.cq_off.head), r->cq_tail = (void *)(c + p.cq_off.tail);
}
static void do_uring(void) {
  struct ring r;
  int p[2];
  char *b = fresh(PIECE);
  memset(b, 'u', PIECE);
  ring_open(&r);
  need(pipe(p) == 0, "pipe");
  struct iovec v = {b, PIECE / 2};
  need(syscall(__NR_io_uring_register, r.fd, IORING_REGISTER_BUFFERS, &v, 1) == 0, "register");
  munmap(b, PIECE);
  use_memory();
  /* the fixed buffer still holds what was there */
  r.sqe[0] = (struct io_uring_sqe){.opcode = IORING_OP_WRITE_FIXED, .fd = p[1], .addr = (uintptr_t)b, .len = PIECE / 2, .off = (uint64_t)-1};
  r.sq_array[0] = 0;
  __atomic_store_n(r.sq_tail, *r.sq_tail + 1, __ATOMIC_RELEASE);
  need(syscall(__NR_io_uring_enter, r.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1, "enter");
  read_all(p[0], PIECE / 2);
  all(got, PIECE / 2, 'u', "io_uring");
}

static void do_direct(const char *dir, int aio) {
  char path[300];
  snprintf(path, sizeof path, "%s/direct-%d", dir, getpid());
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
  need(fd >= 0, "open O_DIRECT");
  unlink(path);
  char *b = fresh(PIECE);
  for (int round = 0; round < 20; round++) {
    memset(b, 'a' + round, PIECE);
    if (!aio) {
      need(pwrite(fd, b, PIECE, 0) == PIECE, "write");
      memset(b, 0, PIECE);
      need(pread(fd, b, PIECE, 0) == PIECE, "read");
    } else {
      aio_context_t ctx = 0;
      need(syscall(__NR_io_setup, 4, &ctx) == 0, "io_setup");
      struct iocb w = {.aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = (unsigned)fd, .aio_buf = (uintptr_t)b, .aio_nbytes = PIECE}, *list = &w;
      need(syscall(__NR_io_submit, ctx, 1, &list) == 1, "io_submit");
      munmap(b, PIECE);
      b = fresh(PIECE);
      memset(b, 'X', PIECE);
      struct io_event e;
      need(syscall(__NR_io_getevents, ctx, 1, 1, &e, NULL) == 1 && e.res == PIECE, "io_getevents");
      need(syscall(__NR_io_destroy, ctx) == 0, "io_destroy");
      need(pread(fd, b, PIECE, 0) == PIECE, "read");
    }
    for (int i = 0; i < PIECE; i++)
      if (b[i] != 'a' + round) need(0, "content");
  }
  all(b, PIECE, 'a' + 19, aio ? "aio" : "direct");
}

int main(int argc, char **argv) {
  need(argc == 3, "usage");
  char *early = fresh(SPACE); /* managed from the start, and kept over it all */
  memset(early, 'e', SPACE);
  switch (argv[1][0]) {
  case 'v': do_vmsplice(); break;
  case 'z': do_zerocopy(); break;
  case 'u': do_uring(); break;
  case 'd': do_direct(argv[2], 0); break;
  case 'a': do_direct(argv[2], 1); break;
  }
  use_memory();
  all(early, SPACE, 'e', "early");
  return 0;
}
