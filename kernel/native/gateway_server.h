/* gateway, part 2: the server thread (connections, urgent refills, notifications), transactions, the invariants, start and stop. */

/* SCHED_FIFO priorities: a program that runs at a real-time priority itself must not keep its own faults waiting. They work for
 * microseconds at a time. */
#define SERVICE_PRIORITY 98
#define SERVER_PRIORITY 99

/* ---------------------------------------------------------------- connections (server thread only) */
static struct conn *dead_list;
static void enter_lobby(struct sy_gateway *g, struct conn *c) {
  c->next = NULL, c->lobby = g->lobby_end;
  *g->lobby_end = c, g->lobby_end = &c->next, g->nlobby++;
}
static void leave_lobby(struct sy_gateway *g, struct conn *c) {
  if (!c->lobby) return;
  *c->lobby = c->next;
  if (c->next) c->next->lobby = c->lobby;
  else g->lobby_end = c->lobby;
  c->lobby = NULL, g->nlobby--;
}
static struct conn *add_conn(struct sy_gateway *g, int fd, enum conn_kind kind) {
  struct conn *c = calloc(1, sizeof *c);
  if (!c) {
    close(fd);
    return NULL;
  }
  c->kind = kind, c->fd = fd, c->g = g;
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
  if (epoll_ctl(g->ep, EPOLL_CTL_ADD, fd, &e)) {
    close(fd), free(c);
    return NULL;
  }
  if (kind == CONN_NEW) enter_lobby(g, c);
  return c;
}
/* Closed now, freed after the batch of events in which others may still point to it. */
static void drop_conn(struct conn *c) {
  if (c->dead) return;
  c->dead = 1;
  /* By itself close() does not do that: what the other side sent us it may still hold, and epoll knows files, not descriptors. */
  epoll_ctl(c->g->ep, EPOLL_CTL_DEL, c->fd, NULL);
  close(c->fd);
  leave_lobby(c->g, c);
  if (c->page) munmap(c->page, 4096);
  c->page = NULL;
  c->next_dead = dead_list, dead_list = c;
  if (c->peer) {
    c->peer->peer = NULL;
    drop_conn(c->peer);
  }
}
static int send_fds(int sock, const void *b, size_t n, const int *fd, int nfd) {
  union { char c[CMSG_SPACE(sizeof(int) * 16)]; struct cmsghdr h; } u;
  struct iovec v = {(void *)(uintptr_t)b, n};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
  if (nfd) {
    memset(&u, 0, sizeof u);
    m.msg_control = u.c, m.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfd);
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfd);
    memcpy(CMSG_DATA(h), fd, sizeof(int) * (size_t)nfd);
  }
  return sendmsg(sock, &m, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)n ? 0 : -1;
}
/* Bytes that were sent (n at most are stored), 0 = hung up, -1 = nothing there. All descriptors that came are in fd[0..*nfd), to be closed by the caller. */
static ssize_t recv_fds(int sock, void *b, size_t n, int *fd, int *nfd, int max) {
  union { char c[CMSG_SPACE(sizeof(int) * 16)]; struct cmsghdr h; } u;
  struct iovec v = {b, n};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.c, .msg_controllen = sizeof u.c};
  *nfd = 0;
  ssize_t r = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC);
  if (r < 0) return errno == EAGAIN || errno == EINTR ? -1 : 0;
  for (struct cmsghdr *h = CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    int k = (int)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int)), x;
    for (int i = 0; i < k; i++) {
      memcpy(&x, CMSG_DATA(h) + (size_t)i * sizeof(int), sizeof x);
      if (*nfd < max) fd[(*nfd)++] = x;
      else close(x);
    }
  }
  return r;
}
static void welcome(struct sy_gateway *g, int sock, uint32_t status, uint32_t asid, const int *fd, int n) {
  struct sy_welcome w = {.magic = SY_MAGIC, .abi = SY_ABI_VERSION, .status = status, .asid = asid, .nodes = g->nodes};
  memcpy(w.node, g->node, sizeof w.node);
  send_fds(sock, &w, sizeof w, fd, n);
}

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
/* ---------------------------------------------------------------- what /proc says of a process */
/* One descriptor is kept for when there is no other left: it is closed for a moment, and taken again. 0: it is gone, and nothing could be
 * given up for it. */
static void take_spare(struct sy_gateway *g) { g->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC); }
static int lend_spare(struct sy_gateway *g) {
  shrink_pool(g);
  if (g->spare_fd < 0) take_spare(g); /* another thread had been quicker than we were in taking it again */
  if (g->spare_fd < 0) return 0;
  close(g->spare_fd), g->spare_fd = -1;
  return 1;
}
/* The beginning of a file of /proc, as text; "" if it is not there. */
static char *read_proc(struct sy_gateway *g, const char *path, char *b, size_t n) {
  int fd = open(path, O_RDONLY | O_CLOEXEC), lent = fd < 0 && (errno == EMFILE || errno == ENFILE) && lend_spare(g);
  if (lent) fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t r = fd < 0 ? -1 : read(fd, b, n - 1);
  if (fd >= 0) close(fd);
  if (lent) take_spare(g);
  b[r > 0 ? r : 0] = 0;
  return b;
}
/* One field of /proc/PID/status, or -1. */
static long status_field(struct sy_gateway *g, pid_t pid, const char *name) {
  char p[64], b[1024];
  snprintf(p, sizeof p, "/proc/%d/status", pid);
  char *q = strstr(read_proc(g, p, b, sizeof b), name);
  return q ? atol(q + strlen(name)) : -1;
}
static uint64_t born(struct sy_gateway *g, pid_t pid) { /* start time: tells a process from an earlier one of that number */
  char p[64], b[1024];
  snprintf(p, sizeof p, "/proc/%d/stat", pid);
  char *q = strrchr(read_proc(g, p, b, sizeof b), ')');
  for (int field = 2; q && field < 22; field++) q = strchr(q + 1, ' ');
  return q ? strtoull(q, NULL, 10) : 0;
}
static void mark(struct sy_gateway *g, pid_t pid) { g->marked[g->nmarked++ % 64] = (struct marked){pid, born(g, pid)}; }
/* May the kernel hold memory of this process by reference? Its descriptors tell, also those that it inherited. */
#define MANY_DESCRIPTORS 1024 /* more are not looked through: this thread serves faults */
static int holds_references(struct sy_gateway *g, pid_t pid) {
  char p[320], b[256];
  for (unsigned i = 0; i < 64 && i < g->nmarked; i++)
    if (g->marked[i].pid == pid && g->marked[i].born == born(g, pid)) return 1;
  snprintf(p, sizeof p, "/proc/%d/fdinfo", pid);
  DIR *d = opendir(p);
  int found = 0, n = 0;
  if (!d) return 1; /* in doubt, natively */
  for (struct dirent *e; !found && (e = readdir(d));) {
    if (e->d_name[0] == '.') continue;
    snprintf(p, sizeof p, "/proc/%d/fd/%s", pid, e->d_name);
    ssize_t r = readlink(p, b, sizeof b - 1);
    b[r > 0 ? r : 0] = 0;
    found = ++n > MANY_DESCRIPTORS || !strcmp(b, "anon_inode:[io_uring]");
    /* Of files and pipes only: of an epoll it takes a lock under which the kernel may be waiting for a page of that very program. */
    if (found || (b[0] != '/' && strncmp(b, "pipe:", 5))) continue;
    snprintf(p, sizeof p, "/proc/%d/fdinfo/%s", pid, e->d_name);
    char *f = strstr(read_proc(g, p, b, sizeof b), "flags:");
    found = f && strtoul(f + 6, NULL, 8) & SY_O_DIRECT;
  }
  closedir(d);
  return found;
}

/* Is that descriptor what the client says it is? What is not must never come near epoll or an ioctl. */
static int is_fd(int fd, const char *what) {
  char p[64], link[64] = "";
  snprintf(p, sizeof p, "/proc/self/fd/%d", fd);
  return readlink(p, link, sizeof link - 1) >= 0 && !strcmp(link, what);
}

static int admitted(const struct sy_gateway *g, uid_t uid) {
  int yes = uid == 0;
  for (int i = 0; i < g->nusers; i++) yes |= g->user[i] == uid;
  return yes;
}
static struct as *fork_of(struct sy_gateway *g, pid_t pid, int uffd, uint32_t parent, int *status);
static void hello(struct sy_gateway *g, struct conn *c) {
  struct sy_hello h;
  int fd[4], n;
  struct ucred cred = {0, 0, 0};
  socklen_t l = sizeof cred;
  ssize_t r = recv_fds(c->fd, &h, sizeof h, fd, &n, 4);
  if (r < 0) return;
  getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &cred, &l);
  if (r != sizeof h || h.magic != SY_MAGIC) {
    if (r) count(g, SY_CNT_BAD_HELLOS, 1);
    goto refuse;
  }
  if (h.abi != SY_ABI_VERSION) {
    count(g, SY_CNT_BAD_HELLOS, 1);
    welcome(g, c->fd, SY_W_ABI, 0, NULL, 0);
    goto refuse;
  }
  if ((h.kind == SY_HELLO_NEED_UFFD || h.kind == SY_HELLO_STUB || h.kind == SY_HELLO_FORK || h.kind == SY_HELLO_SCHED) && !admitted(g, cred.uid)) { /* they would get RAM */
    count(g, SY_CNT_BAD_HELLOS, 1);
    welcome(g, c->fd, SY_W_REFUSED, 0, NULL, 0);
    goto refuse;
  }
  if (h.kind == SY_HELLO_NEED_UFFD && n == 0) {
    int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    welcome(g, c->fd, dev < 0 ? SY_W_REFUSED : SY_W_OK, 0, &dev, dev >= 0);
    if (dev >= 0) close(dev);
    leave_lobby(g, c), enter_lobby(g, c);
    return;
  }
  if (h.kind == SY_HELLO_SCHED && n == 0) {
    welcome(g, c->fd, sy_gw_sched_add(g, (uint32_t)cred.pid) ? SY_W_REFUSED : SY_W_OK, 0, NULL, 0);
    goto refuse; /* it has what it needs */
  }
  if (h.kind == SY_HELLO_COMPONENT && n == 0) {
    int ok = h.arg >= SY_C_BUDDY && h.arg <= SY_C_SCHED && (cred.uid == 0 || cred.uid == SY_COMPONENT_UID_BASE + h.arg);
    if (!ok) count(g, SY_CNT_BAD_HELLOS, 1);
    int out[5 + SY_MAX_NODES] = {g->header_ro, g->frames_ro, g->heat_ro, g->slots_ro, g->sched->ro}, ram = 0;
    for (; ok && h.arg == SY_C_KSM && ram < (int)g->nodes && (out[5 + ram] = reopen_ro(g->ram_fd[ram])) >= 0;) ram++; /* who looks for equal pages has to read them */
    welcome(g, c->fd, ok ? SY_W_OK : SY_W_REFUSED, 0, out, ok ? 5 + ram : 0);
    while (ram) close(out[5 + --ram]);
    goto refuse; /* it has what it needs */
  }
  if (h.kind == SY_HELLO_KEEPER && n == 2 && is_fd(fd[0], "anon_inode:seccomp notify")) {
    struct stat st;
    struct statfs fs;
    int seals = fcntl(fd[1], F_GET_SEALS); /* a page that could shrink, or whose filesystem is the client's, is SIGBUS or a wait at its pleasure */
    int ok = seals >= 0 && seals & F_SEAL_SHRINK && !fstatfs(fd[1], &fs) && fs.f_type == TMPFS_MAGIC && !fstat(fd[1], &st) && st.st_size >= 4096;
    void *page = ok ? mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd[1], 0) : MAP_FAILED;
    close(fd[1]);
    struct conn *lc = page == MAP_FAILED ? NULL : add_conn(g, fd[0], CONN_NOTIFY);
    if (!lc) {
      count(g, SY_CNT_BAD_HELLOS, 1);
      if (page == MAP_FAILED) close(fd[0]);
      else munmap(page, 4096);
      drop_conn(c);
      return;
    }
    ioctl(fd[0], SECCOMP_IOCTL_NOTIF_SET_FLAGS, (unsigned long)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP); /* 6.6 and later */
    leave_lobby(g, c);
    c->kind = CONN_KEEPER, c->page = page, c->pid = cred.pid, c->peer = lc, lc->peer = c;
    return;
  }
  if ((h.kind == SY_HELLO_STUB || h.kind == SY_HELLO_FORK) && n == 1) {
    if (!is_fd(fd[0], "anon_inode:[userfaultfd]")) {
      count(g, SY_CNT_BAD_HELLOS, 1);
      welcome(g, c->fd, SY_W_REFUSED, 0, NULL, 0);
      goto refuse;
    }
    if (h.kind == SY_HELLO_STUB && holds_references(g, cred.pid)) { /* docs/decisions/0005; a child holds what its parent does, who would not be here */
      count(g, SY_CNT_BAD_HELLOS, 1);
      welcome(g, c->fd, SY_W_REFUSED, 0, NULL, 0);
      goto refuse;
    }
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM |
                                                          UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_THREAD_ID};
    int status = SY_W_FULL;
    struct as *a = NULL;
    if (!ioctl(fd[0], UFFDIO_API, &api)) a = h.kind == SY_HELLO_FORK ? fork_of(g, cred.pid, fd[0], h.arg, &status) : new_as(g, cred.pid, fd[0], h.arg, h.group, NULL, &status);
    if (!a) {
      count(g, SY_CNT_BAD_HELLOS, 1);
      welcome(g, c->fd, status, 0, NULL, 0);
      goto refuse;
    }
    int out[5 + SY_MAX_NODES] = {a->as_fd, a->mag_ro, g->header_ro, g->bell_fd, g->slots_ro};
    for (uint32_t i = 0; i < g->nodes; i++) out[5 + i] = g->ram_fd[i];
    /* The number may be another process's since it connected: what we signal, and trust, must be the one at the other end. */
    int peer = -1;
    socklen_t pl = sizeof peer;
    if (getsockopt(c->fd, SOL_SOCKET, SO_PEERPIDFD, &peer, &pl) == 0) close(a->pidfd), a->pidfd = peer; /* Linux 6.5 */
    leave_lobby(g, c);
    c->kind = CONN_STUB, c->as = a, c->pid = cred.pid;
    welcome(g, c->fd, SY_W_OK, a->asid, out, 5 + (int)g->nodes);
    return;
  }
  count(g, SY_CNT_BAD_HELLOS, 1);
refuse:
  for (int i = 0; i < n; i++) close(fd[i]);
  drop_conn(c);
}

/* One place more for a newcomer, at the cost of who has been silent longest. */
static void make_room(struct sy_gateway *g) {
  struct conn *c = g->lobby;
  hello(g, c); /* it may have said it by now */
  if (c->kind != CONN_NEW || c->dead) return;
  count(g, SY_CNT_BAD_HELLOS, 1);
  drop_conn(c);
}
static void accept_all(struct sy_gateway *g) {
  for (int n = 0; n < MAX_LOBBY; n++) { /* others have their turn too */
    int fd = accept4(g->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno != EMFILE && errno != ENFILE) return;
      /* No descriptor left. Who waits must not wait for ever, nor keep us awake: it hears that we hang up, and runs natively. */
      if (!lend_spare(g)) {
        usleep(10000); /* other threads took what we gave up: once more, but not in a circle at this priority */
        return;
      }
      if ((fd = accept4(g->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) close(fd), count(g, SY_CNT_BAD_HELLOS, 1);
      take_spare(g);
      continue;
    }
    while (g->nlobby >= MAX_LOBBY) make_room(g);
    add_conn(g, fd, CONN_NEW);
  }
}

static void listen_to(struct conn *lc, int on) {
  struct epoll_event e = {.events = on ? EPOLLIN : 0, .data.ptr = lc};
  if (!epoll_ctl(lc->g->ep, EPOLL_CTL_MOD, lc->fd, &e)) lc->full = !on;
}
static void answer_notif(struct conn *lc, uint64_t id, int64_t val, int error, int cont) {
  struct seccomp_notif_resp r = {.id = id, .val = val, .error = error, .flags = cont ? SECCOMP_USER_NOTIF_FLAG_CONTINUE : 0};
  if (lc->dead) return;
  ioctl(lc->fd, SECCOMP_IOCTL_NOTIF_SEND, &r); /* ENOENT: the caller was killed meanwhile */
  if (lc->peer && lc->peer->page)
    for (int i = 0; i < SY_KEEPER_INFLIGHT; i++)
      if (lc->peer->page->inflight[i] == id) lc->peer->page->inflight[i] = 0;
  if (lc->full) listen_to(lc, 1);
}
static int thread_there(pid_t pid, uint32_t tid) {
  char p[64];
  snprintf(p, sizeof p, "/proc/%d/task/%u", pid, tid);
  return tid && access(p, F_OK) == 0;
}
/* The answer to a caller whose address space has been released: once the service threads are no more, as what it calls may be for a
 * process of one thread only. 0: not yet. */
static int answer_released(struct pending *p) {
  for (int i = 0; i < 4 && p->listener; i++) /* (the tree may have ended meanwhile: then nobody waits) */
    if (thread_there(p->pid, p->tids[i])) return 0;
  if (p->listener) answer_notif(p->listener, p->notif_id, 0, 0, 1);
  return 1;
}
static void moved(struct sy_gateway *g, struct as *a, const uint64_t *args, int64_t r, int asked);
static void not_owned(struct sy_gateway *g, struct as *a, const uint64_t *args);
/* Commands are done in any order (an EVICT may be before its turn, and the last place is kept for one): the place of the next one must be free. */
static int may_send(const struct as *a, uint32_t op) {
  uint64_t id = a->cmd_id + 1;
  return a->outstanding < SY_CMD_SLOTS - (op != SY_CMD_EVICT) && (id <= SY_CMD_SLOTS || __atomic_load_n(&a->ctl->done[id % SY_CMD_SLOTS].id, __ATOMIC_ACQUIRE) == id - SY_CMD_SLOTS);
}
static void send_command(struct as *a, struct pending *p) {
  struct sy_cmd *c = &a->mag->cmd[a->mag->cmd_tail % SY_CMD_SLOTS];
  p->cmd_id = ++a->cmd_id;
  c->id = p->cmd_id, c->op = p->op, c->nr = p->nr;
  memcpy(c->args, p->args, sizeof c->args);
  a->outstanding++;
  __atomic_store_n(&a->mag->cmd_tail, a->mag->cmd_tail + 1, __ATOMIC_SEQ_CST);
  futex_wake_all(&a->mag->cmd_tail);
}
/* Answers the callers whose commands the stub of `a` has carried out; all: it will carry out no more. */
static void finish_commands(struct sy_gateway *g, struct as *a, int all) {
  for (int i = 0; i < g->npend; i++) {
    struct pending *p = &g->pend[i];
    if (p->as && p->as != a) continue;
    if (p->as) {
      struct sy_cmd_done *d = &a->ctl->done[p->cmd_id % SY_CMD_SLOTS];
      int done = p->cmd_id && __atomic_load_n(&d->id, __ATOMIC_ACQUIRE) == p->cmd_id;
      int64_t r = done ? d->result : -EAGAIN;
      if (!done && !all) continue;
      if (p->op == SY_CMD_RELEASE && (all ? a->released : r == 0)) {
        if (!all) continue; /* its socket hangs up next */
        p->as = NULL, p->pid = a->pid;
        memcpy(p->tids, a->tids, sizeof p->tids);
      } else {
        if (p->cmd_id) a->outstanding--;
        if (p->op == SY_CMD_PREFETCH) prefetched(g, a, p->args[1]);
        if (p->op == SY_CMD_OWN && r < 0) not_owned(g, a, p->args);
        if (p->op == SY_CMD_MOVE || p->op == SY_CMD_SHARE || p->op == SY_CMD_REMAP) moved(g, a, p->args, r, done);
        if (p->op == SY_CMD_EVICT) evicted(g, a, (uint32_t)p->args[0], (uint32_t)p->args[1]);
        if (p->listener) {
          int too_late = !done && a->released; /* the kernel can do it now */
          int populate = p->nr == SYS_madvise && (p->args[2] == MADV_POPULATE_READ || p->args[2] == MADV_POPULATE_WRITE); /* the stub has looked whether it may */
          int failed = r < 0 && r > -4096 && !too_late, go_on = too_late || (!failed && (p->op == SY_CMD_RELEASE || populate));
          answer_notif(p->listener, p->notif_id, failed || go_on ? 0 : r, failed ? (int)r : 0, go_on);
        }
      }
    }
    if (!p->as && !answer_released(p)) continue;
    *p = g->pend[--g->npend];
    i--;
  }
  for (int i = 0; a && !all && i < g->npend; i++)
    if (g->pend[i].as == a && !g->pend[i].cmd_id && may_send(a, g->pend[i].op)) send_command(a, &g->pend[i]);
}
static struct as *as_of_process(struct sy_gateway *g, pid_t pid) {
  for (uint32_t i = g->nas; i-- > 0;) /* the newest of that pid */
    if (g->as[i]->pid == pid && !g->as[i]->dying) return g->as[i];
  return NULL;
}
/* What becomes native must fit into the machine beside the enclave's RAM, which stays as large as it is. */
static int fits_machine(struct sy_gateway *g, const struct as *a) {
  char b[512], *q = strstr(read_proc(g, "/proc/meminfo", b, sizeof b), "MemAvailable:");
  return !q || strtoull(q + 13, NULL, 10) * 1024 > (a->mapped + a->swapped + a->shared) * PS + SY_MACHINE_KEEPS;
}
/* Queues a command. listener NULL: nobody waits for it. -1: no memory. */
static int command(struct sy_gateway *g, struct as *a, uint32_t op, int nr, const uint64_t *args, struct conn *listener, uint64_t notif_id) {
  if (g->npend == g->pend_cap) {
    int cap = g->pend_cap ? g->pend_cap * 2 : 64;
    struct pending *more = realloc(g->pend, (size_t)cap * sizeof *more);
    if (!more) return -1;
    g->pend = more, g->pend_cap = cap;
  }
  struct pending *p = &g->pend[g->npend++];
  *p = (struct pending){.as = a, .listener = listener, .notif_id = notif_id, .op = op, .nr = (uint32_t)nr};
  if (args) memcpy(p->args, args, sizeof p->args);
  if (op == SY_CMD_RELEASE) a->release_nr = (uint32_t)nr;
  if (may_send(a, op)) send_command(a, p); /* else when one of those is done */
  return 0;
}
/* The tree has ended, or is not to be served any more: what it waits for its keeper answers. */
static void drop_keeper(struct sy_gateway *g, struct conn *keeper) {
  for (int j = 0; j < g->npend; j++)
    if (g->pend[j].listener == keeper->peer) g->pend[j].listener = NULL;
  drop_conn(keeper);
}
/* Taking a notification waits, whatever epoll said, when somebody else who holds the listener was quicker; a signal ends that. */
#define WATCH_SIGNAL (SIGRTMIN + 7)
static void watch_off(int s) { (void)s; }
static void watch(struct sy_gateway *g, long ns) {
  struct itimerspec t = {{0, ns}, {0, ns}};
  if (g->have_watch) timer_settime(g->watch, 0, &t, NULL);
}
static void start_watch(struct sy_gateway *g) {
  struct sigaction sa = {.sa_handler = watch_off}; /* no SA_RESTART: the call must end */
  struct sigevent e = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = WATCH_SIGNAL};
  sigset_t s;
  sigemptyset(&s), sigaddset(&s, WATCH_SIGNAL);
  e._sigev_un._tid = (pid_t)syscall(SYS_gettid);
  if (sigaction(WATCH_SIGNAL, &sa, NULL) || pthread_sigmask(SIG_UNBLOCK, &s, NULL)) return;
  g->have_watch = !timer_create(CLOCK_MONOTONIC, &e, &g->watch);
}
/* The calls that see, or set, how a thread is scheduled; the first argument says which. */
static int is_look(int nr) {
  return nr == SYS_sched_setparam || nr == SYS_sched_getparam || nr == SYS_sched_setscheduler || nr == SYS_sched_getscheduler || nr == SYS_sched_setaffinity || nr == SYS_sched_getaffinity ||
         nr == SYS_sched_setattr || nr == SYS_sched_getattr;
}
/* The process that `caller` means by a number, of any of its threads; 0: itself. In a pid namespace of its own it sees other numbers than we do: nobody that we could name, then. */
static uint64_t whom(struct sy_gateway *g, pid_t caller, pid_t tid) {
  char p[64], b[1024];
  snprintf(p, sizeof p, "/proc/%d/status", caller);
  char *q = strstr(read_proc(g, p, b, sizeof b), "\nNSpid:"), *end;
  long own = caller;
  int numbers = 0;
  for (q = q ? q + 7 : NULL; q; numbers++, q = end) {
    long x = strtol(q, &end, 10);
    if (end == q) break;
    own = x;
  }
  if (!tid || tid == own) return 0;
  if (numbers > 1) return UINT32_MAX;
  long of = status_field(g, tid, "\nTgid:");
  return of == caller ? 0 : of > 0 ? (uint64_t)of : (uint32_t)tid;
}
static void notification(struct sy_gateway *g, struct conn *lc) {
  union { struct seccomp_notif n; char room[256]; } u;
  struct sy_keeper_page *page = lc->peer ? lc->peer->page : NULL;
  int place = 0;
  while (page && place < SY_KEEPER_INFLIGHT && page->inflight[place]) place++;
  if (place == SY_KEEPER_INFLIGHT) return listen_to(lc, 0);
  memset(&u, 0, sizeof u);
  watch(g, 2000000);
  int r = ioctl(lc->fd, SECCOMP_IOCTL_NOTIF_RECV, &u.n), interrupted = r && errno == EINTR;
  watch(g, 0);
  lc->late = interrupted ? lc->late + 1 : 0;
  if (lc->late > 4 && lc->peer) { /* once may be a caller that was killed just then; our keepers never take one */
    count(g, SY_CNT_BAD_HELLOS, 1);
    drop_keeper(g, lc->peer);
  }
  if (r) return;
  if (page) page->inflight[place] = u.n.id;
  int nr = u.n.data.arch == AUDIT_ARCH_X86_64 ? u.n.data.nr : SYS_fork; /* see filter.h: of another architecture only this */
  if (is_look(nr)) {
    sched_look(g, u.n.pid, (uint32_t)u.n.data.args[0]);
    count(g, SY_CNT_LOOKS, 1);
    return answer_notif(lc, u.n.id, 0, 0, 1);
  }
  count(g, SY_CNT_NOTIFICATIONS, 1);
  pid_t pid = (pid_t)status_field(g, (pid_t)u.n.pid, "\nTgid:");
  int release = 1; /* what could not be done on memory that is not the kernel's own */
  switch (nr) {
  case SYS_mmap: /* of a file: its descriptor is the program's, not the stub's */
    release = !(u.n.data.args[3] & MAP_ANONYMOUS) && u.n.data.args[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE);
    if (!release && !(u.n.data.args[3] & MAP_ANONYMOUS)) pid = -1; /* a wish only: the kernel's to fulfil, elsewhere */
    break;
  case SYS_pkey_mprotect: release = (int)u.n.data.args[3] != -1; break;
  case SYS_munmap: case SYS_mremap: case SYS_madvise: case SYS_mprotect: case SYS_mlock: case SYS_mlock2: case SYS_munlock:
  case SYS_mincore: case __NR_mseal: release = 0; break;
  case SYS_io_setup: case SYS_setsockopt: case SYS_userfaultfd: /* leave no trace among the descriptors, or not of whose memory they mean */
    if (!as_of_process(g, pid)) mark(g, pid);
    break;
  case SYS_prlimit64: /* may be meant for somebody else: of the same user, or the kernel will say no */
    u.n.data.args[0] = whom(g, pid, (pid_t)u.n.data.args[0]);
    if (u.n.data.args[0]) {
      long caller = status_field(g, pid, "\nUid:");
      pid = (pid_t)u.n.data.args[0];
      if (caller && caller != status_field(g, pid, "\nUid:")) pid = -1;
    }
    break;
  }
  struct as *a = as_of_process(g, pid);
  if (ioctl(lc->fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &u.n.id)) return answer_notif(lc, u.n.id, 0, 0, 1); /* killed meanwhile: the number is anybody's */
  if (a && release && !fits_machine(g, a))
    answer_notif(lc, u.n.id, 0, -ENOMEM, 0);
  else if (!a || command(g, a, release ? SY_CMD_RELEASE : SY_CMD_SYSCALL, nr, (const uint64_t *)u.n.data.args, lc, u.n.id)) {
    count(g, SY_CNT_CONTINUED, 1);
    answer_notif(lc, u.n.id, 0, 0, 1);
  }
}

/* ---------------------------------------------------------------- out of frames */
/* Frames up to that order into the magazine of a stub that waits for them (under lock). Number. */
static uint32_t refill(struct sy_gateway *g, struct as *a, int order) {
  uint32_t want = (order >= 8 ? 4u : order >= 4 ? 16u : 32u) << order, got = 0;
  for (uint32_t i = 0, k = 1; i < 64 && k && got < want; i++) got += k = give(g, a, order); /* smaller ones, too: the next fault would come at once */
  return got;
}
/* Ends the program with the most frames, of all or of those who share a limit, as Linux's OOM killer does, unless some are on their way: RAM is still being populated, or a program
 * is ending (under lock). */
#define OOM_PATIENCE_NS 5000000000ull
static void out_of_frames(struct sy_gateway *g, uint32_t limit) {
  struct as *victim = NULL;
  uint64_t now = now_ns();
  if (g->hdr->populated < g->nframes) return;
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    if (limit && a->zone != limit) continue;
    if ((a->killed_ns && now < a->killed_ns + OOM_PATIENCE_NS) || (a->dying && now < a->dying_since_ns + OOM_PATIENCE_NS)) return;
    if (!a->killed_ns && !a->dying && (!victim || a->mapped + a->shared > victim->mapped + victim->shared)) victim = a;
  }
  if (!victim) return;
  victim->killed_ns = now;
  syscall(SYS_pidfd_send_signal, victim->pidfd, SIGKILL, NULL, 0);
  count(g, SY_CNT_OOM_KILLS, 1);
  event(g, (struct sy_msg){.type = SY_MSG_OOM, .asid = victim->asid, .npages = (uint32_t)victim->mapped, .arg = (uint64_t)victim->pid});
}
/* Answers a stub that waits for frames, if there are any, or if none is an answer. */
static int part_a_fork(struct sy_gateway *g, uint32_t limit);
static void feed(struct sy_gateway *g, struct as *a) {
  pthread_mutex_lock(&g->lock);
  int order = a->starving - 1;
  a->fed_ns = now_ns(), a->fed_freed = g->freed;
  uint32_t got = mag_level(a, order) >= SY_MAG_SLOTS ? 1 : refill(g, a, order); /* (buddy may have filled it since it asked) */
  for (int o = order; o >= 0 && !got; o--) got = mag_level(a, o); /* buddy was quicker */
  uint32_t limit = a->zone && !has_room(g, a, 0) ? a->zone : 0; /* what it is that is short */
  if (!got && drain_magazines(g, limit)) got = refill(g, a, order);
  if (!got) {
    uint64_t now = now_ns();
    if (!a->starved_ns) count(g, SY_CNT_NO_FRAMES, 1), a->starved_ns = now;
    uint32_t some = limit ? g->hdr->limit[limit - SY_MAX_NODES].frames / 16 : 1024;
    if (!reclaim_some(g, some < 1024 ? some : 1024, limit) && part_a_fork(g, limit)) {
      a->starved_ns = now;
      pthread_mutex_unlock(&g->lock);
      return;
    }
    /* What is stopped, or in the middle of a fork, takes nothing away now, and has given up waiting: its patience begins anew. */
    if (is_stopped(a) || a->ctl->fork_active) a->starved_ns = now;
    /* Some are on their way; or could be, but a stub has too much to do to be told now, or is slow to do it; or a disk is slow. */
    uint64_t leaving = limit ? g->swapping_on[limit] : g->swapping;
    int soon = now < a->starved_ns + STORE_PATIENCE_NS && (leaving || (g->hdr->slots && slots_free(g)));
    if (soon || g->writing || (leaving && now < g->swap_progress_ns + STORE_PATIENCE_NS)) {
      pthread_mutex_unlock(&g->lock);
      return;
    }
    if (g->hdr->oom == SY_OOM_KILL || limit) out_of_frames(g, limit); /* (native memory would break a limit) */
    else event(g, (struct sy_msg){.type = SY_MSG_OOM, .asid = a->asid, .npages = 1u << (a->starving - 1)});
  }
  pthread_mutex_unlock(&g->lock);
  if (!got && (g->hdr->oom == SY_OOM_KILL || limit)) return; /* again in a moment */
  a->mag->no_frames = got == 0;
  a->starving = 0, a->starved_ns = 0;
  __atomic_store_n(&a->mag->refill_seq, a->mag->refill_seq + 1, __ATOMIC_SEQ_CST);
  futex_wake_all(&a->mag->refill_seq);
}

static void stub_request(struct sy_gateway *g, struct conn *c) {
  struct sy_request q;
  int fd[4], n;
  ssize_t r = recv_fds(c->fd, &q, sizeof q, fd, &n, 4);
  if (r < 0) return;
  for (int i = 0; i < n; i++) close(fd[i]);
  struct as *a = c->as;
  if (r == 0) {
    a->dying = 1, a->dying_since_ns = now_ns(), a->next_test_ns = 0, a->test_step_ns = 200000;
    if (a->released) count(g, SY_CNT_RELEASED, 1);
    finish_commands(g, a, 1);
    c->as = NULL;
    drop_conn(c);
    return;
  }
  if (r != sizeof q || n) {
    pthread_mutex_lock(&g->lock);
    bad(g, a);
    pthread_mutex_unlock(&g->lock);
    return;
  }
  switch (q.kind) {
  case SY_REQ_READY:
    if (a->ready) { /* once: the priority is for the stub's threads, not for a program that asks for it */
      pthread_mutex_lock(&g->lock);
      bad(g, a);
      pthread_mutex_unlock(&g->lock);
      break;
    }
    a->ready = 1;
    if (syscall(SYS_pidfd_send_signal, a->pidfd, 0, NULL, 0)) break; /* it has ended: its number may be anybody's */
    for (int i = 0; i <= SY_SERVICE_THREADS; i++) {
      if (!thread_there(c->pid, q.tids[i])) continue; /* not a thread of that process: a lie, or another pid namespace */
      a->tids[i] = q.tids[i];
      sched_not_ours(g, q.tids[i]);
      struct sched_param sp = {.sched_priority = SERVICE_PRIORITY};
      sched_setscheduler((pid_t)q.tids[i], SCHED_FIFO | SCHED_RESET_ON_FORK, &sp);
    }
    break;
  case SY_REQ_REFILL:
    a->starving = (q.order > SY_HUGE_ORDER ? SY_HUGE_ORDER : (int)q.order) + 1, a->urgent++;
    count(g, SY_CNT_URGENT, 1);
    feed(g, a);
    break;
  case SY_REQ_CMD_DONE: finish_commands(g, a, 0); break;
  case SY_REQ_SWAPIN: swap_in(g, a, &q); break;
  case SY_REQ_FETCH: fetch(g, a, &q); break;
  case SY_REQ_RELEASED:
    a->released = 1;
    event(g, (struct sy_msg){.type = SY_MSG_MM_RELEASE, .asid = a->asid, .arg = a->release_nr});
    break;
  default:
    pthread_mutex_lock(&g->lock);
    bad(g, a);
    pthread_mutex_unlock(&g->lock);
  }
}

#include "gateway_move.h"
#include "gateway_fork.h"
/* Frames in the magazine for all that it is to bring back, in blocks of their size, and as many for its faults, if there are (under lock). */
static void frames_for(struct sy_gateway *g, struct as *a, uint32_t n) {
  int order = 31 - __builtin_clz(n);
  uint64_t have = 0;
  for (int o = 0; o <= order; o++) have += (uint64_t)mag_level(a, o) << o;
  for (uint32_t k = 1; k && have < a->prefetching + n; have += k) k = give(g, a, order);
}
/* What is to come back, each stub is told at once: it does so between the program's own memory calls. */
static void send_prefetches(struct sy_gateway *g) {
  for (;;) {
    pthread_mutex_lock(&g->lock);
    int some = g->prefetch_tail != g->prefetch_head;
    struct wish w = some ? g->prefetch[g->prefetch_tail++ % PREFETCH_RING] : (struct wish){0};
    struct as *a = some ? find_as(g, w.asid) : NULL;
    if (a && !a->prefetch_told_ns) a->prefetch_told_ns = now_ns();
    if (a && !a->dying) frames_for(g, a, w.n);
    pthread_mutex_unlock(&g->lock);
    if (!some) return;
    if (a && (a->dying || command(g, a, SY_CMD_PREFETCH, 0, (uint64_t[6]){w.vpage, w.n}, NULL, 0))) prefetched(g, a, w.n);
  }
}
/* What is to leave: each stub is told, and as soon as it has done that, of the next. Returns whether to look again soon. */
#define EVICT_AT_ONCE 128 /* runs: the program's own memory calls wait meanwhile */
static int send_evictions(struct sy_gateway *g) {
  int again = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t z = 0; g->hdr->slots && z < SY_MAX_ZONES; z++)
    if (z < SY_MAX_NODES ? z < g->nodes : g->hdr->limit[z - SY_MAX_NODES].members) again |= relieve(g, z);
  pthread_mutex_unlock(&g->lock);
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    uint32_t from = a->evict_sent, tail = __atomic_load_n(&a->evict_tail, __ATOMIC_ACQUIRE);
    if (from == tail || from != a->evict_done || a->dying) continue;
    uint32_t to = tail - from > EVICT_AT_ONCE ? from + EVICT_AT_ONCE : tail;
    pthread_mutex_lock(&g->lock);
    a->evict_sent = to, a->told_ns = now_ns(); /* nobody may lengthen the last one from now on */
    pthread_mutex_unlock(&g->lock);
    if (command(g, a, SY_CMD_EVICT, 0, (uint64_t[6]){from, to}, NULL, 0)) evicted(g, a, from, to); /* (no memory: as if it had found nothing there) */
  }
  send_prefetches(g);
  send_moves(g);
  return again | send_owns(g);
}
/* A vfork child outlives its killed parent in the same memory, where nobody serves its faults any more. What takes neither frames nor the store
 * we give it, until it executes something, or ends. */
static void serve_orphan(struct sy_gateway *g, struct as *a) {
  struct uffdio_range all = {SY_ARENA_START, SY_ARENA_SIZE};
  struct uffd_msg m;
  if (!a->orphaned) {
    a->orphaned = 1;
    fcntl(a->uffd, F_SETFL, O_NONBLOCK);
    ioctl(a->uffd, UFFDIO_WAKE, &all); /* what a service thread had taken comes again */
  }
  for (int i = 0; i < 64; i++) {
    watch(g, 2000000); /* whoever else has the descriptor may have changed its flags */
    ssize_t r = read(a->uffd, &m, sizeof m);
    watch(g, 0);
    if (r != sizeof m || m.event != UFFD_EVENT_PAGEFAULT) return;
    uint64_t at = m.arg.pagefault.address & ~(PS - 1), p = (at - SY_ARENA_START) / PS;
    if (p >= SY_ARENA_PAGES) continue;
    uint64_t w = a->chunks[p / SY_CHUNK_PAGES] ? __atomic_load_n(&a->pte[p], __ATOMIC_ACQUIRE) : SY_PTE_NONE;
    struct uffdio_zeropage z = {.range = {at, PS}};
    struct uffdio_writeprotect u = {.range = {at, PS}};
    struct uffdio_continue c = {.range = {at, PS}};
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO && w & SY_PTE_FORKED) continue; /* a write would be everybody's */
    if ((w & SY_PTE_STATE_MASK) == SY_PTE_SHARED_RO) ioctl(a->uffd, UFFDIO_WRITEPROTECT, &u); /* the kernel makes its copy */
    else if ((w & SY_PTE_STATE_MASK) == SY_PTE_NONE && !(w & SY_PTE_STALE)) ioctl(a->uffd, UFFDIO_ZEROPAGE, &z);
    else if ((w & SY_PTE_STATE_MASK) == SY_PTE_PRESENT && m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) ioctl(a->uffd, UFFDIO_WRITEPROTECT, &u);
    else if ((w & SY_PTE_STATE_MASK) == SY_PTE_PRESENT) ioctl(a->uffd, UFFDIO_CONTINUE, &c);
  }
}
/* Killed in the middle of a fork: the child is still copying from these frames. Where its number tells us nothing it cannot take for ever: it
 * may be dead too. */
static int still_copied(struct as *a) {
  uint32_t pid = __atomic_load_n(&a->ctl->fork_child, __ATOMIC_ACQUIRE);
  if (!a->ctl->fork_active || a->ctl->fork_done || !pid) return 0;
  if (pid != SY_UNKNOWN_CHILD && a->tids[0] && !a->child) { /* (its parent's threads were found: it sees the numbers that we see) */
    a->child = (int)syscall(SYS_pidfd_open, pid, 0);
    if (a->child < 0 && errno == ESRCH) return a->child = 0;
  }
  if (a->child <= 0) return now_ns() < a->dying_since_ns + 10000000000ull;
  struct pollfd ended = {a->child, POLLIN, 0};
  return poll(&ended, 1, 0) != 1;
}
/* Address spaces whose service threads have ended: test, and test again, until the mm is gone; those that wait for frames: see whether there
 * are some now. Returns milliseconds to the next look. */
static int test_dying(struct sy_gateway *g) {
  uint64_t now = now_ns(), next = 0;
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    /* at once where something has become free, or it could be a while for who waits; but not with every message of anybody: they may be many */
    if (a->starving && !a->dying && (a->fed_freed != __atomic_load_n(&g->freed, __ATOMIC_RELAXED) || now >= a->fed_ns + 1000000)) feed(g, a);
    if (a->starving && !a->dying) next = now + 1000000;
    if (!a->dying) continue;
    if (a->next_test_ns <= now) {
      if (!still_copied(a) && (a->released || mm_gone(a))) {
        bury(g, a);
        i--;
        continue;
      }
      serve_orphan(g, a);
      a->next_test_ns = now + a->test_step_ns;
      if (a->test_step_ns < 50000000) a->test_step_ns *= 2;
    }
    if (!next || a->next_test_ns < next) next = a->next_test_ns;
  }
  if (send_evictions(g) && (!next || next > now + 1000000)) next = now + 1000000;
  for (int i = 0; i < g->npend; i++)
    if (!g->pend[i].as) next = now + 1000000; /* threads that end */
  return next ? (int)((next - now) / 1000000) + 1 : -1;
}

/* Another thread of ours wants something: to stop, or what it noted at an address space. */
static void poked(struct sy_gateway *g, struct conn *c) {
  uint64_t x;
  if (read(c->fd, &x, 8) < 0) return;
  for (uint32_t i = 0; i < g->nas; i++) {
    pthread_mutex_lock(&g->lock);
    int want = g->as[i]->want_release;
    g->as[i]->want_release = 0;
    pthread_mutex_unlock(&g->lock);
    if (want && !g->as[i]->dying && fits_machine(g, g->as[i])) command(g, g->as[i], SY_CMD_RELEASE, 0, NULL, NULL, 0);
  }
}

/* One batch of what connections have for us. */
static void serve(struct sy_gateway *g, int timeout_ms) {
  struct epoll_event ev[64];
  int n = epoll_wait(g->ep, ev, 64, timeout_ms);
  finish_commands(g, NULL, 0);
  for (int i = 0; i < n; i++) {
    struct conn *c = ev[i].data.ptr;
    if (c->dead) continue;
    switch (c->kind) {
    case CONN_LISTEN:
      accept_all(g);
      break;
    case CONN_NEW: hello(g, c); break;
    case CONN_STUB: stub_request(g, c); break;
    case CONN_KEEPER: {
      char b[64];
      int fd[4], k;
      ssize_t r = recv_fds(c->fd, b, sizeof b, fd, &k, 4);
      for (int j = 0; j < k; j++) close(fd[j]);
      if (r >= 0) drop_keeper(g, c); /* it has nothing to say; 0: the tree has ended */
      break;
    }
    case CONN_NOTIFY:
      if (ev[i].events & EPOLLIN) notification(g, c);
      else epoll_ctl(g->ep, EPOLL_CTL_DEL, c->fd, NULL); /* the last process has gone; the keeper's end follows */
      break;
    case CONN_POKE: poked(g, c); break;
    }
  }
  while (dead_list) {
    struct conn *c = dead_list;
    dead_list = c->next_dead;
    free(c);
  }
}

static void *server_thread(void *arg) {
  struct sy_gateway *g = arg;
  struct sched_param sp = {.sched_priority = SERVER_PRIORITY};
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &sp); /* a program may be waiting; without privilege: no harm */
  start_watch(g);
  while (!__atomic_load_n(&g->stopping, __ATOMIC_ACQUIRE)) serve(g, test_dying(g));
  return NULL;
}

/* ---------------------------------------------------------------- transactions */
void sy_gw_set_oom(struct sy_gateway *g, uint32_t oom) { g->hdr->oom = oom; }
void sy_gw_set_overcommit(struct sy_gateway *g, uint32_t on) { g->hdr->overcommit = on; }
/* The entries of that many slots, in place of those that there are. 0 or -errno. */
static int make_slots(struct sy_gateway *g, uint64_t slots) {
  int fd = make_memfd("sylvie-slots", slots * sizeof *g->slot), ro = fd < 0 ? -1 : reopen_ro(fd);
  void *at = ro < 0 ? MAP_FAILED : mmap(NULL, slots * sizeof *g->slot, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return -errno;
  if (g->slots_fd >= 0) close(g->slots_fd), close(g->slots_ro);
  g->slots_fd = fd, g->slots_ro = ro, g->slot = at;
  return 0;
}
int sy_gw_set_swap(struct sy_gateway *g, const char *path, uint64_t bytes, uint32_t pool_frames) {
  uint64_t slots = bytes / PS;
  if (!slots || slots > 0x10000000 || pool_frames > g->nframes) return -EINVAL;
  g->swap_fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (g->swap_fd < 0) return -errno;
  if (ftruncate(g->swap_fd, (off_t)(slots * PS))) return -errno;
  g->hdr->slots = (uint32_t)slots, g->hdr->pool_max = pool_frames;
  return make_slots(g, slots);
}
int sy_gw_set_watermarks(struct sy_gateway *g, uint32_t node, uint32_t min, uint32_t low, uint32_t high) {
  if (node >= SY_MAX_ZONES || (node < SY_MAX_NODES ? node >= g->nodes : !g->hdr->limit[node - SY_MAX_NODES].frames)) return -ENOENT;
  uint32_t frames = node < SY_MAX_NODES ? g->node[node].frames : g->hdr->limit[node - SY_MAX_NODES].frames;
  if (min > low || low > high || high > frames / 2) return -EINVAL;
  pthread_mutex_lock(&g->lock);
  struct sy_watermarks *m = &g->hdr->watermark[node];
  m->min = min, m->low = low, m->high = high;
  g->watermark_told[node] = 2;
  zone_free(g, node, 0); /* says where it is now */
  pthread_mutex_unlock(&g->lock);
  poke(g);
  return 0;
}
int sy_gw_set_topology(struct sy_gateway *g, const uint8_t *cpu_node, uint32_t n, const uint8_t *distance, const int *kernel_node) {
  if (n > SY_MAX_CPUS) return -EINVAL;
  memcpy(g->hdr->cpu_node, cpu_node, n), memcpy(g->hdr->distance, distance, sizeof g->hdr->distance);
  for (uint32_t i = 0; i < g->nodes; i++) {
    unsigned long mask[16] = {0};
    if (kernel_node[i] < 0) continue;
    if (kernel_node[i] >= 1024) return -EINVAL;
    mask[kernel_node[i] / 64] = 1ul << kernel_node[i] % 64;
    /* of the file, for all who map it */
    if (syscall(SYS_mbind, g->ram[i], (unsigned long)g->node[i].frames * PS, 2 /* MPOL_BIND */, mask, 1024ul, 0ul)) return -errno;
  }
  return 0;
}
int sy_gw_admit(struct sy_gateway *g, uint32_t uid) {
  if (g->nusers == SY_MAX_USERS) return -1;
  g->user[g->nusers++] = uid;
  return 0;
}
int sy_gw_release(struct sy_gateway *g, uint32_t asid) {
  pthread_mutex_lock(&g->lock);
  struct as *a = find_as(g, asid);
  if (a) a->want_release = 1;
  pthread_mutex_unlock(&g->lock);
  if (a) poke(g);
  return a ? 0 : -ESRCH;
}
static uint32_t permitted(uint32_t component, uint32_t op) { /* ARCHITECTURE: who may */
  switch (op) {
  case SY_OP_GRANT: case SY_OP_RESERVE: case SY_OP_RELEASE: return component == SY_C_BUDDY ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_AGE: return component == SY_C_KSWAPD || component == SY_C_AUTONUMA ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_RECLAIM: case SY_OP_PREFETCH: return component == SY_C_KSWAPD ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_FAULT_ORDER: return component == SY_C_THP ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_COLLAPSE: case SY_OP_SPLIT: return component == SY_C_THP ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_MERGE: return component == SY_C_KSM ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_MIGRATE: return component == SY_C_AUTONUMA || component == SY_C_BUDDY ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  case SY_OP_RUN: case SY_OP_TIMER: return component == SY_C_SCHED ? SY_R_COMPLETE : SY_R_NOT_PERMITTED;
  }
  return SY_R_INVALID;
}
/* Before any memory is touched: validate and take. PENDING = goes on to phase 2. */
static uint32_t phase1(struct sy_gateway *g, uint32_t component, struct sy_op *op) {
  uint32_t r = permitted(component, op->op);
  if (r != SY_R_COMPLETE) return r;
  if (op->op == SY_OP_FAULT_ORDER && op->barrier) {
    int clear = op->order == SY_ORDER_DEFAULT;
    if ((op->order > SY_HUGE_ORDER && !clear) || op->arg || op->pfn >= SY_CHUNKS || op->barrier > SY_CHUNKS - op->pfn) return SY_R_INVALID;
    struct as *a = find_as(g, op->asid);
    if (!a) return SY_R_NOT_FOUND;
    memset(a->mag->chunk_order + op->pfn, clear ? 0 : op->order + 1, op->barrier);
    return SY_R_COMPLETE;
  }
  if (op->op == SY_OP_FAULT_ORDER) {
    if (op->order > SY_HUGE_ORDER || op->arg > SY_HUGE_ORDER || op->arg < op->order) return SY_R_INVALID;
    struct as *a = find_as(g, op->asid);
    if (!a) return SY_R_NOT_FOUND;
    a->mag->fault_order = op->order, a->mag->fault_order_max = (uint32_t)op->arg;
    return SY_R_COMPLETE;
  }
  if (op->op == SY_OP_COLLAPSE) return collapse(g, op);
  if (op->op == SY_OP_SPLIT) return split(g, op);
  if (op->op == SY_OP_PREFETCH) return op->order || op->pfn >= g->hdr->slots || op->arg >= SY_ARENA_PAGES ? SY_R_INVALID : prefetch(g, op);
  uint32_t n = op->order <= SY_MAX_ORDER ? 1u << op->order : 0;
  if (!n || (op->op == SY_OP_GRANT && op->order > SY_HUGE_ORDER) || op->pfn >= g->nframes || op->pfn % n || n > g->nframes - op->pfn) return SY_R_INVALID;
  if (op->op == SY_OP_GRANT) {
    struct as *a = find_as(g, op->asid);
    if (!a || a->dying) return SY_R_NOT_FOUND;
    if (!has_room(g, a, op->order)) return SY_R_FULL;
  }
  if (g->frames[op->pfn].barrier != op->barrier) return SY_R_STALE;
  if (op->op == SY_OP_RECLAIM && !g->hdr->slots) return SY_R_FULL;
  if (op->op == SY_OP_RECLAIM) return (uint32_t)op->arg == SY_RECLAIM_STANDBY ? stand_by(g, op->pfn, n, op->arg >> SY_RECLAIM_ZONE_SHIFT) : take_run(g, op->pfn, n, SY_FF_SWAPPING);
  if (op->op == SY_OP_MIGRATE) return migrate(g, op);
  if (op->op == SY_OP_MERGE) return op->order > SY_HUGE_ORDER ? SY_R_INVALID : merge(g, movable(g, op->pfn, n), op, n);
  if (op->op == SY_OP_AGE) return take_run(g, op->pfn, n, SY_FF_AGED);
  if (op->op == SY_OP_RELEASE) {
    for (uint32_t i = 0; i < g->nreserve[op->order]; i++)
      if (g->reserve[op->order][i] == op->pfn) {
        g->reserve[op->order][i] = g->reserve[op->order][--g->nreserve[op->order]];
        make_free(g, op->pfn, n, 1);
        event_frames(g, SY_MSG_PAGE_FREED, 0, op->pfn, n, op->order);
        return SY_R_COMPLETE;
      }
    return SY_R_NOT_FOUND;
  }
  if (!all_free(g, op->pfn, n)) return SY_R_STALE;
  isolate(g, op->pfn, op->order);
  return SY_R_PENDING;
}
static uint32_t phase2(struct sy_gateway *g, struct sy_op *op) {
  if (op->op == SY_OP_RESERVE) {
    reserve_push(g, op->pfn, op->order);
    return SY_R_COMPLETE;
  }
  struct as *a = find_as(g, op->asid);
  uint32_t r = !a || a->dying ? SY_R_NOT_FOUND : mag_push(g, a, op->pfn, op->order) ? SY_R_FULL : SY_R_COMPLETE;
  if (r != SY_R_COMPLETE) make_free(g, op->pfn, 1u << op->order, 1); /* as it was; the component still counts it as free */
  else count(g, SY_CNT_GRANTS, 1);
  return r;
}
int sy_gw_commit(struct sy_gateway *g, uint32_t component, struct sy_op *ops, int n) {
  int done = 0;
  for (int i = 0, end; component == SY_C_SCHED && i < n; i = end) { /* what follows one another belongs together */
    for (end = i; end < n && of_sched(&ops[end]); end++) {
    }
    if (end > i) commit_run(g, ops + i, end - i);
    else end++;
  }
  pthread_mutex_lock(&g->lock);
  for (int i = 0; i < n; i++)
    if (component != SY_C_SCHED || !of_sched(&ops[i])) ops[i].result = phase1(g, component, &ops[i]);
  pthread_mutex_unlock(&g->lock);
  for (int i = 0; i < n; i++) {
    if (ops[i].result == SY_R_PENDING) { /* block by block, so that the first can be used while the next is zeroed */
      zero_block(g, ops[i].pfn, 1u << ops[i].order);
      pthread_mutex_lock(&g->lock);
      ops[i].result = phase2(g, &ops[i]);
      pthread_mutex_unlock(&g->lock);
    }
    if (ops[i].result == SY_R_COMPLETE) done++;
    else count(g, SY_CNT_REFUSED, 1);
  }
  if ((component == SY_C_KSWAPD || component == SY_C_AUTONUMA || g->move_tail != g->move_head) && done) poke(g);
  return done;
}

/* ---------------------------------------------------------------- reports */
int sy_gw_as_list(struct sy_gateway *g, struct sy_as_info *out, int max) {
  int n = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < g->nas && n < max; i++, n++) {
    struct as *a = g->as[i];
    struct sy_as_info *o = &out[n];
    *o = (struct sy_as_info){.asid = a->asid, .pid = (uint32_t)a->pid, .state = (uint32_t)a->dying, .fault_order = a->mag->fault_order, .frames = a->frames,
                             .mapped = a->mapped, .native_pages = a->ctl->pages_native, .faults = a->ctl->faults, .urgent = a->urgent,
                             .overflow = a->overflow_seen, .bad_claims = a->bad_claims, .brk_pages = a->ctl->brk_pages, .swapped = a->swapped, .limit = a->zone,
                             .committed = a->ctl->pages_committed, .shared = a->shared};
    for (int k = 0; k < 10; k++) o->mag_level[k] = mag_level(a, k);
  }
  pthread_mutex_unlock(&g->lock);
  return n;
}
void sy_gw_reserve_levels(struct sy_gateway *g, uint32_t *levels) {
  pthread_mutex_lock(&g->lock);
  memcpy(levels, g->nreserve, sizeof g->nreserve);
  pthread_mutex_unlock(&g->lock);
}
void sy_gw_reserve_targets(struct sy_gateway *g, const uint32_t *targets) {
  pthread_mutex_lock(&g->lock);
  memcpy(g->reserve_target, targets, sizeof g->reserve_target);
  for (int o = 0; o <= SY_MAX_ORDER; o++) g->reserve_told[o] = 0, reserve_check(g, o);
  pthread_mutex_unlock(&g->lock);
}
int sy_gw_set_low(struct sy_gateway *g, uint32_t asid, uint32_t order, uint32_t low) {
  int r = -ENOENT;
  if (order > 9 || low >= SY_MAG_SLOTS) return -EINVAL;
  pthread_mutex_lock(&g->lock);
  if (!asid) g->low[order] = low, r = 0;
  for (uint32_t i = 0; i < g->nas; i++)
    if (g->as[i]->asid == asid) g->as[i]->mag->ring[order].low = low, r = 0;
  pthread_mutex_unlock(&g->lock);
  return r;
}
int sy_gw_set_fault_order(struct sy_gateway *g, uint32_t asid, uint32_t order, uint32_t max_order) {
  int r = -ENOENT;
  if (order > max_order || max_order > SY_HUGE_ORDER) return -EINVAL;
  pthread_mutex_lock(&g->lock);
  if (!asid) g->hdr->default_fault_order = order, g->hdr->default_fault_order_max = max_order, r = 0;
  for (uint32_t i = 0; i < g->nas; i++)
    if (g->as[i]->asid == asid) g->as[i]->mag->fault_order = order, g->as[i]->mag->fault_order_max = max_order, r = 0;
  pthread_mutex_unlock(&g->lock);
  return r;
}
void sy_gw_heartbeat(struct sy_gateway *g, uint32_t component, uint32_t pid, uint32_t state, uint32_t restarts) {
  if (component >= SY_MAX_COMPONENTS) return;
  if (component == SY_C_SCHED && state == 1) g->sched->hdr->alive_ns = now_ns();
  g->hdr->component[component] = (struct sy_component){component, pid, now_ns(), state, restarts};
}

/* ---------------------------------------------------------------- invariants 1 and 2 */
/* A running program is between two steps at any moment, so only what two looks find alike counts: same rule, same object, same barrier. */
#define MAX_DOUBTS 65536
struct report { char *text; size_t len, used; int n; uint64_t *seen, *before; size_t nseen, nbefore; };
static void __attribute__((format(printf, 3, 4))) violation(struct report *r, uint64_t key, const char *f, ...) {
  int again = 0;
  for (size_t i = 0; i < r->nbefore && !again; i++) again = r->before[i] == key;
  if (r->nseen < MAX_DOUBTS) r->seen[r->nseen++] = key;
  if (!again) return;
  va_list v;
  va_start(v, f);
  if (r->used + 200 < r->len && r->n < 50) r->used += (size_t)vsnprintf(r->text + r->used, r->len - r->used, f, v);
  va_end(v);
  r->n++;
}
static uint64_t doubt(int rule, uint64_t object, uint64_t barrier) { return ((uint64_t)rule << 60) ^ (object << 32) ^ object >> 28 ^ barrier; }
static void check_once(struct sy_gateway *g, struct report *r) {
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < g->nas; i++)
    drain_as(g, g->as[i], 2 * SY_CHANNEL_SLOTS); /* what was there; it may be filling as fast as it is read */
  uint64_t states[SY_FRAME_STATES] = {0}, owned_total = 0, nfree = 0, slots = 0, halfway = 0; /* of slots: pages that are coming back, of a program that may be stopped there */
  uint8_t *seen = calloc(g->nframes, 1);
  if (!seen) {
    violation(r, doubt(0, 0, 0), "no memory to check\n");
    pthread_mutex_unlock(&g->lock);
    return;
  }
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    uint64_t k = 0;
    for (uint32_t f = a->list; f != NONE && k <= g->nframes; f = g->fnext[f], k++)
      if (g->frames[f].asid != a->asid) violation(r, doubt(1, f, g->frames[f].barrier), "frame %u is in the list of address space %u but belongs to %u\n", f, a->asid, g->frames[f].asid);
    if (k != a->frames) violation(r, doubt(2, a->asid, k), "address space %u counts %lu frames, its list has %lu\n", a->asid, a->frames, k);
    owned_total += k;
    if (a->dying) { /* its page table is no longer kept */
      slots += a->swapped;
      continue;
    }
    for (uint32_t c = 0; c < SY_CHUNKS; c++) {
      if (!a->chunks[c]) continue;
      for (uint32_t p = c * SY_CHUNK_PAGES; p < (c + 1) * SY_CHUNK_PAGES; p++) {
        uint64_t w = __atomic_load_n(&a->pte[p], __ATOMIC_ACQUIRE), pfn = w >> SY_PTE_PFN_SHIFT;
        int st = w & SY_PTE_STATE_MASK;
        halfway += st == SY_PTE_LOCKED;
        if (st == SY_PTE_SWAPPED && !(w & SY_PTE_HASFRAME)) { /* here pfn is a slot */
          if (!slot_is(g, a, pfn) || g->slot[pfn].vpage != p) violation(r, doubt(14, p, pfn), "page %u of address space %u names slot %lu, which is another page's\n", p, a->asid, pfn);
          else slots++;
        }
        int parted = st == SY_PTE_SHARED_RO && pfn < g->nframes && g->frames[pfn].state == SY_FRAME_MAPPED && owns(a, &g->frames[pfn], p);
        if (parted) seen[pfn]++;
        if (st == SY_PTE_SHARED_RO && !parted && (pfn >= g->nframes || !shares(g, a, (uint32_t)pfn, p)))
          violation(r, doubt(3, p, pfn), "page %u of address space %u shares frame %lu, which does not know\n", p, a->asid, pfn);
        if (st != SY_PTE_PRESENT && !(st == SY_PTE_SWAPPED && w & SY_PTE_HASFRAME)) continue;
        if (pfn >= g->nframes) violation(r, doubt(3, p, pfn), "page %u of address space %u names frame %lu, there are %u\n", p, a->asid, pfn, g->nframes);
        else {
          struct sy_frame *f = &g->frames[pfn];
          if (f->state != SY_FRAME_MAPPED || f->asid != a->asid || f->vpage != p)
            violation(r, doubt(4, pfn, f->barrier), "page %u of address space %u names frame %lu, which is in state %u, owner %u, page %lu\n", p, a->asid, pfn, f->state, f->asid, f->vpage);
          if (seen[pfn]++) violation(r, doubt(5, pfn, f->barrier), "frame %lu is in more than one page-table word (address space %u, page %u)\n", pfn, a->asid, p);
        }
      }
    }
  }
  uint64_t owned_states = 0;
  for (uint32_t i = 0; i < g->nframes; i++) {
    struct sy_frame *f = &g->frames[i];
    int bit = (int)(g->free_map[i / 64] >> (i % 64) & 1);
    if (f->state >= SY_FRAME_STATES) {
      violation(r, doubt(6, i, f->barrier), "frame %u has state %u\n", i, f->state);
      continue;
    }
    states[f->state]++;
    nfree += (uint64_t)bit;
    uint32_t holders = f->state == SY_FRAME_SHARED && f->asid, others = 0;
    for (uint32_t h = g->share_head[i]; h != NONE; h = g->holder[h].next) holders++, others++;
    if (f->state == SY_FRAME_SHARED ? holders != f->refcount || !others : others) violation(r, doubt(9, i, f->barrier), "frame %u is in state %u, owner %u, refcount %u, and %u pages share it\n", i, f->state, f->asid, f->refcount, holders);
    if (bit != (f->state == SY_FRAME_FREE)) violation(r, doubt(7, i, f->barrier), "frame %u is in state %u but the free map says %d\n", i, f->state, bit);
    if ((f->state == SY_FRAME_FREE || f->state == SY_FRAME_RESERVED) && (f->asid || f->refcount)) violation(r, doubt(8, i, f->barrier), "frame %u is in state %u but has owner %u, refcount %u\n", i, f->state, f->asid, f->refcount);
    owned_states += f->state == SY_FRAME_GRANTED || f->state == SY_FRAME_MAPPED || (f->state == SY_FRAME_SHARED && f->asid);
    for (uint32_t h = g->share_head[i], mine = f->asid && f->state == SY_FRAME_SHARED; mine || h != NONE; h = mine ? h : g->holder[h].next, mine = 0) {
      struct as *a = find_as(g, mine ? f->asid : g->holder[h].asid);
      uint64_t w = a ? __atomic_load_n(&a->pte[(mine ? f->vpage : g->holder[h].vpage) % SY_ARENA_PAGES], __ATOMIC_ACQUIRE) : 0;
      int st = w & SY_PTE_STATE_MASK;
      if (!a || (!a->dying && st != SY_PTE_LOCKED && (mine || !g->holder[h].pending) && (st != SY_PTE_SHARED_RO || w >> SY_PTE_PFN_SHIFT != i)))
        violation(r, doubt(9, i, f->barrier), "frame %u is shared by address space %u, whose word does not name it\n", i, mine ? f->asid : g->holder[h].asid);
    }
    if (f->state == SY_FRAME_MAPPED && !seen[i]) {
      struct as *a = find_as(g, f->asid);
      if (!a) violation(r, doubt(9, i, f->barrier), "frame %u is MAPPED for address space %u, which is not there\n", i, f->asid);
      else if (!a->dying && (__atomic_load_n(&a->pte[f->vpage % SY_ARENA_PAGES], __ATOMIC_ACQUIRE) & SY_PTE_STATE_MASK) != SY_PTE_LOCKED)
        violation(r, doubt(10, i, f->barrier), "frame %u is MAPPED for address space %u at page %lu, whose word does not name it\n", i, f->asid, f->vpage);
    }
  }
  if (nfree != g->nfree || nfree != states[SY_FRAME_FREE]) violation(r, doubt(11, 0, 0), "%lu frames free in the map, %lu counted, %lu in the table\n", nfree, g->nfree, states[SY_FRAME_FREE]);
  if (slots > g->hdr->slots_used || slots + halfway < g->hdr->slots_used)
    violation(r, doubt(15, slots, g->hdr->slots_used), "%lu slots are named by page-table words, and %lu pages may be coming back, but %u slots are in use\n", slots, halfway, g->hdr->slots_used);
  for (uint32_t z = SY_MAX_NODES; z < SY_MAX_ZONES; z++) {
    uint64_t used = 0, of = g->hdr->limit[z - SY_MAX_NODES].frames;
    for (uint32_t i = 0; i < g->nas; i++) used += g->as[i]->zone == z ? g->as[i]->frames : 0;
    if (used + g->hdr->watermark[z].free != of) violation(r, doubt(2, z, used), "%lu frames are owned within limit %u of %lu, which has %u left\n", used, z, of, g->hdr->watermark[z].free);
  }
  if (owned_total != owned_states) violation(r, doubt(12, 0, 0), "%lu frames are in lists of address spaces, %lu are GRANTED, MAPPED, or SHARED and owned\n", owned_total, owned_states);
  uint64_t reserved = 0, slabs = 0, objects = 0, packed = 0;
  for (int o = 0; o <= SY_MAX_ORDER; o++) reserved += (uint64_t)g->nreserve[o] << o;
  for (int i = 0; i < SY_SLAB_CACHES; i++) slabs += g->zpool->cache[i].frames, objects += g->zpool->cache[i].active;
  if (reserved + slabs != states[SY_FRAME_RESERVED]) violation(r, doubt(13, 0, 0), "%lu frames in the reserve, %lu in slabs, %lu RESERVED in the table\n", reserved, slabs, states[SY_FRAME_RESERVED]);
  for (uint32_t s = 0; s < g->hdr->slots; s++) packed += g->slot[s].asid && g->slot[s].size && g->slot[s].size < PS;
  if (slabs != g->hdr->pool_frames || objects != packed) violation(r, doubt(11, objects, packed), "%lu frames in slabs, %u counted; %lu objects in them, %lu slots name one\n", slabs, g->hdr->pool_frames, objects, packed);
  free(seen);
  pthread_mutex_unlock(&g->lock);
}
int sy_gw_check(struct sy_gateway *g, char *text, size_t len) {
  struct report r = {.text = text, .len = len, .seen = malloc(MAX_DOUBTS * 8), .before = malloc(MAX_DOUBTS * 8)};
  for (int look = 0, pending = 1; r.seen && r.before && (look < 6 || (pending && look < 60)); look++) {
    if (look) usleep(30000);
    pthread_mutex_lock(&g->lock);
    pending = 0; /* an overflowed channel is mended a little later */
    for (uint32_t k = 0; k < g->nas; k++) pending |= g->as[k]->resync_at_ns != 0;
    pthread_mutex_unlock(&g->lock);
    uint64_t *t = r.before;
    r.before = r.seen, r.nbefore = r.nseen, r.seen = t, r.nseen = 0;
    r.used = 0, r.n = 0;
    if (len) text[0] = 0;
    check_once(g, &r);
    if (!r.nseen || (look && !r.n)) break;
  }
  if (!r.seen || !r.before) r.n = 1, snprintf(text, len, "no memory to check\n");
  free(r.seen), free(r.before);
  return r.n;
}

#include "gateway_probe.h"
/* ---------------------------------------------------------------- start and stop */
static void populate_chunk(struct sy_gateway *g, uint32_t nd, uint32_t first, int pagemap) {
  uint8_t *m = g->ram[nd] + (uint64_t)(first - g->node[nd].base) * PS;
  uint64_t size = CHUNK_FRAMES * PS, map[CHUNK_FRAMES];
  if (madvise(m, size, MADV_POPULATE_WRITE))
    for (uint64_t i = 0; i < size; i += PS) ((volatile uint8_t *)m)[i] = 0;
  mlock(m, size); /* the host's own swap must not have it; without privilege: as it is */
  ssize_t r = pagemap >= 0 ? pread(pagemap, map, sizeof map, (off_t)((uintptr_t)m / PS * 8)) : -1;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < CHUNK_FRAMES; i++) {
    g->frames[first + i].phys = r == (ssize_t)sizeof map && map[i] >> 63 ? map[i] & ((1ull << 55) - 1) : 0;
  }
  make_free(g, first, CHUNK_FRAMES, 1);
  g->hdr->populated += CHUNK_FRAMES;
  event_frames(g, SY_MSG_FRAMES_ONLINE, 0, first, CHUNK_FRAMES, SY_MAX_ORDER);
  pthread_mutex_unlock(&g->lock);
}
static void *populate_thread(void *arg) {
  struct sy_gateway *g = arg;
  int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  for (uint32_t f = g->hdr->populated; f < g->nframes && !__atomic_load_n(&g->stopping, __ATOMIC_ACQUIRE); f += CHUNK_FRAMES)
    populate_chunk(g, g->frames[f].node, f, pagemap);
  if (pagemap >= 0) close(pagemap);
  return NULL;
}

struct sy_gateway *sy_gw_new(const char *run_dir, uint64_t ram, uint32_t nodes, char *err, size_t errlen) {
  struct sy_gateway *g = calloc(1, sizeof *g);
  if (!g) return NULL;
#define FAIL(...) do { snprintf(err, errlen, __VA_ARGS__); sy_gw_stop(g); return NULL; } while (0)
  g->frames_fd = g->frames_ro = g->header_fd = g->header_ro = g->heat_fd = g->heat_ro = g->bell_fd = g->ev_fd = g->urgent_fd = g->ep = g->listen_fd = g->poke_fd = g->spare_fd = -1;
  g->lobby_end = &g->lobby, g->swap_fd = g->slots_fd = g->slots_ro = -1;
  pthread_cond_init(&g->store_work, NULL);
  for (int i = 0; i < SY_MAX_NODES; i++) g->ram_fd[i] = -1;
  pthread_mutex_init(&g->lock, NULL), pthread_mutex_init(&g->ev_lock, NULL);
  if (nodes < 1 || nodes > SY_MAX_NODES) FAIL("%u nodes wanted: 1 to %d are possible", nodes, SY_MAX_NODES);
  uint64_t per = ram / nodes / (CHUNK_FRAMES * PS) * CHUNK_FRAMES;
  if (!per || per * nodes > 0x40000000ull) FAIL("%lu bytes of RAM on %u nodes: a node needs at least 4 MiB", (unsigned long)ram, nodes);
  g->nodes = nodes, g->nframes = (uint32_t)(per * nodes);
  if ((size_t)snprintf(g->run_dir, sizeof g->run_dir, "%s", run_dir) >= sizeof g->run_dir) FAIL("the run directory's name is too long for a socket: %s", run_dir);
  snprintf(g->sock_path, sizeof g->sock_path, "%s/gateway.sock", g->run_dir);

  g->frames_fd = make_memfd("sylvie-frames", g->nframes * sizeof(struct sy_frame)), g->header_fd = make_memfd("sylvie-header", SY_HEADER_BYTES);
  g->bell_fd = make_memfd("sylvie-bell", SY_BELL_BYTES), g->heat_fd = make_memfd("sylvie-heat", g->nframes * sizeof *g->heat);
  if (g->heat_fd < 0 || g->frames_fd < 0 || g->header_fd < 0 || g->bell_fd < 0) FAIL("cannot make the tables: %s", strerror(errno));
  g->frames_ro = reopen_ro(g->frames_fd), g->header_ro = reopen_ro(g->header_fd), g->heat_ro = reopen_ro(g->heat_fd);
  g->frames = mmap(NULL, g->nframes * sizeof(struct sy_frame), PROT_READ | PROT_WRITE, MAP_SHARED, g->frames_fd, 0);
  g->heat = mmap(NULL, g->nframes * sizeof *g->heat, PROT_READ | PROT_WRITE, MAP_SHARED, g->heat_fd, 0);
  g->hdr = mmap(NULL, SY_HEADER_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, g->header_fd, 0);
  g->bell = mmap(NULL, SY_BELL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, g->bell_fd, 0);
  g->share_head = malloc(g->nframes * 4ull), g->holder_free = NONE;
  g->holder = calloc(g->nframes, sizeof *g->holder), g->nholders = g->nframes;
  if (g->share_head) memset(g->share_head, 0xff, g->nframes * 4ull); /* NONE */
  g->free_map = calloc(g->nframes / 64, 8), g->fnext = malloc(g->nframes * 4ull), g->fprev = malloc(g->nframes * 4ull), g->ev = malloc(EV_RING * sizeof *g->ev);
  g->store = malloc(STORE_RING * sizeof *g->store), g->prefetch = malloc(PREFETCH_RING * sizeof *g->prefetch), g->zpool = calloc(1, sizeof *g->zpool);
  if (g->zpool) g->zpool->slab = calloc(g->nframes, sizeof *g->zpool->slab);
  for (int i = 0; g->zpool && i < SY_SLAB_CACHES; i++) g->zpool->cache[i].partial = NONE;
  if (g->frames_ro < 0 || g->header_ro < 0 || g->heat_ro < 0 || g->heat == MAP_FAILED || !g->prefetch || g->frames == MAP_FAILED || g->hdr == MAP_FAILED || g->bell == MAP_FAILED || !g->share_head || !g->holder || !g->free_map || !g->fnext || !g->fprev || !g->ev || !g->store || !g->zpool || !g->zpool->slab || make_slots(g, 1))
    FAIL("no memory for the tables: %s", strerror(errno));
  *g->hdr = (struct sy_header){.magic = SY_MAGIC, .abi = SY_ABI_VERSION, .nodes = nodes, .frames = g->nframes, .gateway_pid = (uint32_t)getpid(), .default_fault_order = 4,
                               .default_fault_order_max = SY_HUGE_ORDER};
  static const uint32_t low[10] = {8, 2, 2, 2, 6, 2, 2, 2, 2, 4};
  memcpy(g->low, low, sizeof low);
  for (uint32_t i = 0; i < nodes; i++) {
    uint64_t size = per * PS, huge = 2 << 20;
    g->hdr->watermark[i] = (struct sy_watermarks){.min = (uint32_t)(per / 128), .low = (uint32_t)(per / 64), .high = (uint32_t)(per / 32)};
    g->node[i] = (struct sy_node){(uint32_t)(per * i), (uint32_t)per};
    g->hdr->node[i] = g->node[i];
    g->ram_fd[i] = make_memfd("sylvie-ram", size);
    uint8_t *m = g->ram_fd[i] < 0 ? MAP_FAILED : mmap(NULL, size + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) FAIL("cannot make RAM of %lu MiB: %s", (unsigned long)(size >> 20), strerror(errno));
    uint8_t *at = (uint8_t *)(((uintptr_t)m + huge - 1) & ~(huge - 1));
    if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, g->ram_fd[i], 0) == MAP_FAILED) FAIL("cannot map RAM: %s", strerror(errno));
    madvise(at, size, MADV_HUGEPAGE); /* with shmem_enabled=advise: 2 MiB folios */
    g->ram[i] = at;
    for (uint64_t f = 0; f < per; f++) g->frames[g->node[i].base + f].node = (uint8_t)i;
    if (!(g->standby[i] = malloc(STANDBY_RING * sizeof **g->standby))) FAIL("no memory for the tables");
  }

  if (sched_new(g)) FAIL("cannot make %s/tasks: %s", g->run_dir, strerror(errno));
  g->ev_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), g->urgent_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), g->ep = epoll_create1(EPOLL_CLOEXEC), g->poke_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  take_spare(g);
  g->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  memcpy(a.sun_path, g->sock_path, strlen(g->sock_path) + 1);
  unlink(g->sock_path);
  if (g->ev_fd < 0 || g->urgent_fd < 0 || g->ep < 0 || g->poke_fd < 0 || g->listen_fd < 0 || g->spare_fd < 0) FAIL("no descriptors left: %s", strerror(errno));
  if (bind(g->listen_fd, (struct sockaddr *)&a, sizeof a) || chmod(g->sock_path, 0666) || listen(g->listen_fd, 1024)) FAIL("cannot listen on %s: %s", g->sock_path, strerror(errno));
  if (!add_conn(g, g->listen_fd, CONN_LISTEN) || !add_conn(g, g->poke_fd, CONN_POKE)) FAIL("epoll: %s", strerror(errno));
  return g;
}
int sy_gw_start(struct sy_gateway *g) {
  int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), r;
  for (uint32_t f = 0; f < g->nframes && f < 16384; f += CHUNK_FRAMES) populate_chunk(g, g->frames[f].node, f, pagemap);
  if (pagemap >= 0) close(pagemap);
  fill_pool(g);
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's main thread */
  if (!(r = pthread_create(&g->server, NULL, server_thread, g))) g->have_server = 1;
  if (!r && !(r = pthread_create(&g->drain, NULL, drain_thread, g))) g->have_drain = 1;
  if (!r && g->hdr->slots && !(r = pthread_create(&g->storer, NULL, store_thread, g))) g->have_storer = 1;
  if (!r && !(r = pthread_create(&g->populate, NULL, populate_thread, g))) g->have_populate = 1;
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return -r;
}
void sy_gw_stop(struct sy_gateway *g) {
  if (!g) return;
  __atomic_store_n(&g->stopping, 1, __ATOMIC_RELEASE);
  poke(g);
  if (g->have_populate) pthread_join(g->populate, NULL);
  if (g->have_server) pthread_join(g->server, NULL);
  if (g->have_drain) pthread_join(g->drain, NULL);
  pthread_mutex_lock(&g->lock);
  pthread_cond_signal(&g->store_work);
  pthread_mutex_unlock(&g->lock);
  if (g->have_storer) pthread_join(g->storer, NULL);
  sched_stop(g);
  if (g->sock_path[0]) unlink(g->sock_path);
  /* What is left (mappings, descriptors of clients) goes with the process, which ends now: programs see the socket hang up. */
  if (g->listen_fd >= 0) close(g->listen_fd);
  if (g->ep >= 0) close(g->ep);
}
