/* Coverage-guided fuzzing of the gateway's C half (libFuzzer; see ./run). The source is included whole: the harness plays its three threads
 * from one, step by step, so that a finding comes back every time. The kernel's side is played where an input needs it: the clock, the
 * end of an mm (a "userfaultfd" is a memfd, whose mm has gone when its size is 0) and seccomp notifications (a "listener" is a timerfd).
 *
 * An input is a list of operations of hostile clients and a wild component. An honest client stands beside them. What must hold after
 * each input: the gateway's own invariants; nothing leaks once the hostile ones are dead (frames, reserve, descriptors, memory); the
 * honest one's frames, words and bytes are what they were; no block is granted that is not zero; every event says something possible. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sanitizer/lsan_interface.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct timespec;
static int fz_clock(int which, struct timespec *t);
static int fz_ioctl(int fd, unsigned long request, void *arg);
static ssize_t fz_readlink(const char *path, char *to, size_t n);
static int fz_unlock(pthread_mutex_t *m);
static int fz_sched(int pid, int policy, const void *p) { return (void)pid, (void)policy, (void)p, 0; }
#define clock_gettime fz_clock
#define ioctl(fd, request, arg) fz_ioctl(fd, request, (void *)(uintptr_t)(arg))
#define readlink fz_readlink
#define pthread_mutex_unlock fz_unlock
#define sched_setscheduler fz_sched
#define usleep(us) (fz_now += (us) * 1000ull)
static uint64_t fz_now = 1000000000ull;
/* check looks at everything after every input, and takes no decision of interest: not followed, or it would cost nine tenths of the time */
#define DULL __attribute__((no_sanitize("coverage", "address", "undefined")))
struct sy_gateway;
struct report;
static void check_once(struct sy_gateway *g, struct report *r) DULL;
#define MAX_LOBBY 3
#include "../../kernel/native/gateway.c"
#undef clock_gettime
#undef ioctl
#undef readlink
#undef pthread_mutex_unlock
#undef sched_setscheduler
#undef usleep

#define FRAMES 4096u
#define HONEST_VPAGE 1000u
#define MUST(what, ...) do { if (!(what)) { fprintf(stderr, "VIOLATED %s: ", #what); fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); abort(); } } while (0)

static struct sy_gateway *G;
static struct as *honest;
static uint32_t honest_pfn;
/* the input */
static const uint8_t *in;
static size_t left;
static uint64_t take(int bytes) {
  uint64_t v = 0;
  for (; bytes && left; bytes--, left--) v = v << 8 | *in++;
  return v;
}
/* a number that is often small, sometimes at an edge, seldom wild */
static uint64_t number(void) {
  uint64_t b = take(1);
  static const uint64_t edge[] = {~0ull, 0xffffffff, 0x80000000, FRAMES, FRAMES - 1, SY_ARENA_PAGES, SY_ARENA_PAGES - 1, 1ull << 63};
  return b < 0xe0 ? b : b < 0xe8 ? edge[b & 7] : b < 0xf4 ? take(2) : b < 0xfa ? take(4) : take(8);
}

/* ---- hostile clients: a connection each, and what stands behind it */
enum fd_kind { FD_UFFD, FD_LISTENER, FD_PIPE, FD_NULL, FD_SHORT, FD_PAGE, FD_SEALED, FD_SOCKET, FD_KINDS };
static struct peer { int sock, uffd, listener; uint32_t asid; } peer[4];
static struct { uint64_t id; uint32_t pid, nr; uint64_t arg; } notif[8];
static int nnotif;
static uint64_t notif_id;
enum { SERVER = 1, DRAIN = 2, PYTHON = 4, STORER = 8 };
static int busy;                        /* whose code is running: the others may run where it lets the lock go */
static int hook_in, hook_what;          /* in that many unlocks, that happens */
static uint32_t tail_seen[MAX_AS][10], tail_asid[MAX_AS];
static int chunks_set;
static uint32_t last_pfn, last_barrier;

static int fz_clock(int which, struct timespec *t) {
  (void)which;
  fz_now += 1000;
  t->tv_sec = (time_t)(fz_now / 1000000000ull), t->tv_nsec = (long)(fz_now % 1000000000ull);
  return 0;
}
static int is_timer(int fd) { struct itimerspec t; return timerfd_gettime(fd, &t) == 0; }
static int fz_ioctl(int fd, unsigned long request, void *arg) {
  struct stat st;
  switch (request) {
  case UFFDIO_API: return 0;
  case UFFDIO_WRITEPROTECT:
    MUST(!fstat(fd, &st), "a userfaultfd %d that is not open is asked about", fd);
    errno = st.st_size ? EINVAL : ESRCH;
    return -1;
  case SECCOMP_IOCTL_NOTIF_RECV: {
    MUST(is_timer(fd), "a notification is expected from what is not a listener");
    struct seccomp_notif *n = arg;
    if (!nnotif) return errno = ENOENT, -1;
    nnotif--;
    n->id = notif[nnotif].id, n->pid = notif[nnotif].pid, n->data.nr = (int)notif[nnotif].nr;
    n->data.arch = n->data.nr % 61 ? AUDIT_ARCH_X86_64 : AUDIT_ARCH_I386;
    for (int i = 0; i < 6; i++) n->data.args[i] = notif[nnotif].arg + (uint64_t)i;
    if (!nnotif) timerfd_settime(fd, 0, &(struct itimerspec){0}, NULL);
    return 0;
  }
  case SECCOMP_IOCTL_NOTIF_ID_VALID: return 0;
  case SECCOMP_IOCTL_NOTIF_SEND: case SECCOMP_IOCTL_NOTIF_SET_FLAGS: MUST(is_timer(fd), "a notification is answered to what is not a listener"); return 0;
  }
  return errno = ENOTTY, -1;
}
static ssize_t fz_readlink(const char *path, char *to, size_t n) {
  ssize_t r = readlink(path, to, n - 1);
  if (r < 0) return r;
  to[r] = 0;
  const char *as = strstr(to, "/memfd:uffd") ? "anon_inode:[userfaultfd]" : strstr(to, "[timerfd]") ? "anon_inode:seccomp notify" : NULL;
  if (as) r = snprintf(to, n, "%s", as);
  return r;
}
static void step(int what);
static int fz_unlock(pthread_mutex_t *m) {
  int r = pthread_mutex_unlock(m);
  if (G && m == &G->lock && hook_in && --hook_in == 0) step(hook_what);
  return r;
}

static int make_fd(struct peer *p, enum fd_kind kind) {
  int fd = -1, two[2];
  switch (kind) {
  case FD_UFFD:
    fd = memfd_create("uffd", MFD_CLOEXEC);
    MUST(fd >= 0 && !ftruncate(fd, 1), "memfd");
    if (p->uffd >= 0 && (ftruncate(p->uffd, 0) || close(p->uffd))) abort(); /* exec: the old mm ends */
    p->uffd = dup(fd);
    break;
  case FD_LISTENER:
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (p->listener >= 0) close(p->listener);
    p->listener = dup(fd);
    break;
  case FD_PIPE: /* with something to read in it */
    if (pipe(two) || write(two[1], "x", 1) != 1) abort();
    close(two[1]), fd = two[0];
    break;
  case FD_NULL: fd = open("/dev/null", O_RDWR); break;
  case FD_SHORT: case FD_PAGE: case FD_SEALED:
    fd = memfd_create("page", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    MUST(fd >= 0 && !ftruncate(fd, kind == FD_SHORT ? 1 : 4096), "memfd");
    if (kind == FD_SEALED) fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK);
    break;
  default: fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  }
  MUST(fd >= 0, "no descriptor");
  return fd;
}
static void take_answers(struct peer *p) {
  struct sy_welcome w;
  int fd[16], n;
  for (ssize_t r; p->sock >= 0 && (r = recv_fds(p->sock, &w, sizeof w, fd, &n, 16)) > 0;) {
    while (n) close(fd[--n]);
    if (r == sizeof w && w.status == SY_W_OK && w.asid) p->asid = w.asid;
  }
}
static void say(struct peer *p, const void *b, size_t n, const uint8_t *kinds, int nfd) {
  int fd[4];
  if (p->sock < 0) return;
  for (int i = 0; i < nfd; i++) fd[i] = make_fd(p, kinds[i] % FD_KINDS);
  send_fds(p->sock, b, n, fd, nfd);
  for (int i = 0; i < nfd; i++) close(fd[i]);
}
static void call_in(struct peer *p) {
  if (p->sock >= 0) close(p->sock);
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  memcpy(a.sun_path, G->sock_path, sizeof a.sun_path);
  p->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (connect(p->sock, (struct sockaddr *)&a, sizeof a)) close(p->sock), p->sock = -1;
}
static void die(struct peer *p) {
  if (p->sock >= 0) close(p->sock);
  if (p->uffd >= 0 && ftruncate(p->uffd, 0)) abort();
  p->sock = -1;
}
static struct as *as_of(struct peer *p) { return p->asid ? find_as(G, p->asid) : NULL; }

static void run_server(void) {
  if (busy & SERVER) return;
  busy |= SERVER;
  test_dying(G);
  serve(G, 0);
  busy &= ~SERVER;
}
static void run_drain(void) {
  if (busy & DRAIN) return;
  busy |= DRAIN;
  drain_all(G);
  busy &= ~DRAIN;
}
static uint32_t a_pfn(struct as *a) {
  switch (take(1) % 6) {
  case 0: case 1:
    if (a && a->list != NONE) {
      uint32_t f = a->list;
      for (uint64_t k = take(1); k && G->fnext[f] != NONE; k--) f = G->fnext[f];
      return last_pfn = f;
    }
    return last_pfn;
  case 2: {
    struct sy_mag_ring *r = a ? &a->mag->ring[take(1) % 10] : NULL;
    return last_pfn = r && r->tail ? r->slot[(r->tail - 1 - take(1) % r->tail) % SY_MAG_SLOTS] : (uint32_t)number();
  }
  case 3: return last_pfn;
  case 4: return last_pfn = (uint32_t)number();
  default: return last_pfn = (uint32_t)(take(2) % FRAMES);
  }
}
static void commit(void) {
  if (busy & PYTHON) return;
  struct sy_op op[8];
  int n = 1 + (int)(take(1) % 8), aimed = (int)take(1);
  memset(op, 0, sizeof op);
  for (int i = 0; i < n; i++) {
    if (!(aimed & 15)) { /* raw record */
      for (size_t k = 0; k < sizeof op[i]; k++) ((uint8_t *)&op[i])[k] = (uint8_t)take(1);
      continue;
    }
    uint64_t b = take(1);
    struct peer *p = &peer[b >> 6];
    op[i].op = (uint16_t)(b % 16), op[i].order = (uint16_t)take(1);
    if (op[i].order < 0xf0) op[i].order %= 12;
    op[i].asid = b & 32 ? honest->asid : p->asid ? p->asid : (uint32_t)number();
    op[i].pfn = b & 16 ? (uint32_t)(take(1) << op[i].order % 16) % FRAMES : a_pfn(as_of(p));
    if (op[i].op == SY_OP_RELEASE && op[i].order <= SY_MAX_ORDER && G->nreserve[op[i].order] && aimed & 16) op[i].pfn = G->reserve[op[i].order][0];
    op[i].arg = op[i].op == SY_OP_FAULT_ORDER ? number() : op[i].op == SY_OP_RECLAIM ? take(1) % 2 : op[i].op == SY_OP_COLLAPSE ? take(2) % 600 : 0;
    if (op[i].op == SY_OP_COLLAPSE && b & 32) op[i].order = SY_HUGE_ORDER;
    if (op[i].op == SY_OP_SPLIT && b & 32) op[i].order %= SY_HUGE_ORDER;
    if (op[i].op == SY_OP_MERGE) op[i].arg = b & 16 ? op[i].pfn : a_pfn(as_of(p));
    if (op[i].op == SY_OP_MIGRATE) op[i].arg = b & 16 ? take(1) % 4 : SY_MIGRATE_TO | a_pfn(NULL);
    op[i].barrier = take(1) % 8 ? (op[i].pfn < FRAMES ? G->frames[op[i].pfn].barrier : 0) : last_barrier; /* or a replay's */
    if (op[i].op == SY_OP_PREFETCH && aimed & 16) { /* of a page that is in the store, as a rule */
      uint32_t s = (uint32_t)take(1) % G->hdr->slots;
      for (uint32_t k = 0; k < G->hdr->slots && !G->slot[s].asid; k++) s = (s + 1) % G->hdr->slots;
      op[i].order = 0, op[i].pfn = s, op[i].asid = G->slot[s].asid, op[i].arg = G->slot[s].vpage, op[i].barrier = G->slot[s].out + !(take(1) % 8);
    }
    if (op[i].pfn < FRAMES) last_barrier = G->frames[op[i].pfn].barrier;
  }
  uint32_t who = aimed & 0x80 ? SY_C_BUDDY : aimed & 0x40 ? SY_C_KSWAPD : (uint32_t)(aimed >> 2);
  busy |= PYTHON;
  int done = sy_gw_commit(G, who, op, n);
  busy &= ~PYTHON;
  for (int i = 0; i < n; i++) {
    MUST(op[i].result >= SY_R_COMPLETE && op[i].result <= SY_R_POISONED, "operation %u has result %u", op[i].op, op[i].result);
    done -= op[i].result == SY_R_COMPLETE;
  }
  MUST(done == 0, "the number of completed operations is wrong by %d", done);
}
/* ctl, chunk map, channel or page table of one client, at its pleasure */
static void scribble(struct as *a, int what) {
  struct sy_slot *s;
  if (!a) return;
  switch (what) {
  case 0: case 1: case 2: case 3: case 4: { /* the channel's protocol, fields as they come */
    uint64_t h = a->chan->head;
    s = &a->chan->slots[h % SY_CHANNEL_SLOTS];
    static const uint8_t type[] = {SY_MSG_PAGE_MAPPED, SY_MSG_PAGE_FREED, SY_MSG_PAGE_MOVED, SY_MSG_MAGAZINE_LOW, SY_MSG_MM_FORK, SY_MSG_MM_MMAP, SY_MSG_PAGE_FAULT,
                                   SY_MSG_PAGE_HINT, SY_MSG_SLOT_FREED, SY_MSG_SLOT_MOVED, SY_MSG_PAGE_SHARED, SY_MSG_PAGE_COW};
    uint64_t b = take(1);
    s->msg.type = b < 0xe0 ? type[b % sizeof type] : (uint16_t)take(2);
    s->msg.length = (uint16_t)number(), s->msg.seqnum = (uint32_t)number(), s->msg.asid = (uint32_t)number();
    s->msg.pfn = a_pfn(a), s->msg.vpage = number(), s->msg.npages = (uint32_t)number(), s->msg.order = (uint16_t)number(), s->msg.node = (uint16_t)number();
    if (s->msg.type == SY_MSG_PAGE_COW) s->msg.arg = a_pfn(NULL);
    if (s->msg.type == SY_MSG_SLOT_FREED || s->msg.type == SY_MSG_SLOT_MOVED) s->msg.arg = number();
    s->turn = h + 1, a->chan->head = h + 1;
    break;
  }
  case 5: /* anywhere in the channel's indices */
    ((uint64_t *)a->chan)[take(1) % 16] = number();
    break;
  case 6: /* any slot's turn */
    a->chan->slots[(a->tail + take(1)) % SY_CHANNEL_SLOTS].turn = a->tail + number();
    break;
  case 7: { /* noise */
    uint64_t x = take(2) | 1, n = take(1) * 4, at = a->tail;
    for (uint64_t i = 0; i < n; i++) {
      uint8_t *m = (uint8_t *)&a->chan->slots[(at + i) % SY_CHANNEL_SLOTS].msg;
      for (size_t k = 0; k < sizeof(struct sy_msg); k++) m[k] = (uint8_t)((x = x * 6364136223846793005ull + 1442695040888963407ull) >> 56);
      a->chan->slots[(at + i) % SY_CHANNEL_SLOTS].turn = at + i + 1;
    }
    break;
  }
  case 8: ((uint32_t *)a->ctl)[take(2) % (sizeof *a->ctl / 4)] = (uint32_t)number(); break;
  case 9: case 10: { /* page-table words */
    uint64_t p = number() % SY_ARENA_PAGES, n = take(1) % 32, w = number() & 0xfff, pfn = what == 9 ? a_pfn(a) : number();
    for (; n && p < SY_ARENA_PAGES; n--, p++) {
      if (!a->chunks[p / SY_CHUNK_PAGES] && chunks_set++ > 16) break; /* each costs a look at 512 words */
      a->chunks[p / SY_CHUNK_PAGES] = 1;
      a->pte[p] = pfn << SY_PTE_PFN_SHIFT | w;
      if (w & 8) pfn++; /* states are below 8; otherwise one frame many times */
    }
    break;
  }
  case 11: a->ctl->mag_head[take(1) % 16] += (uint32_t)number(); break;
  case 12: a->ctl->in_hand[take(1) % SY_HANDS] = a_pfn(a), a->ctl->in_hand_order[take(1) % SY_HANDS] = (uint32_t)number(); break;
  case 13: a->chan->overflow += take(1); break;
  case 14: /* dirties frames that it owns */
    for (uint32_t f = a->list, k = (uint32_t)take(1); f != NONE && k; f = G->fnext[f], k--) memset(frame_mem(G, f), 0xee, 8);
    break;
  case 15: a->ctl->done[take(1) % SY_CMD_SLOTS] = (struct sy_cmd_done){take(1) % 4 ? a->cmd_id - take(1) % 4 : number(), (int64_t)number()}; break;
  }
}
/* A stub that does what it is told, or says so; and the thread that stores. */
static void run_storer(void) {
  if (busy & STORER) return;
  busy |= STORER;
  for (uint32_t i = 0; i < G->nas; i++) {
    struct as *a = G->as[i];
    for (uint64_t id = a->cmd_id > SY_CMD_SLOTS ? a->cmd_id - SY_CMD_SLOTS + 1 : 1; id <= a->cmd_id; id++) {
      const struct sy_cmd *c = NULL;
      for (int k = 0; k < SY_CMD_SLOTS && !c; k++)
        if (a->mag->cmd[k].id == id) c = &a->mag->cmd[k];
      if (c && c->op == SY_CMD_PREFETCH && a->ctl->done[id % SY_CMD_SLOTS].id != id) {
        MUST(c->args[1] && c->args[1] <= SY_PREFETCH_PAGES && c->args[0] + c->args[1] <= SY_ARENA_PAGES, "a stub is told to bring back page %lu, %lu of them", c->args[0], c->args[1]);
        a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, 0};
      }
      if (c && c->op == SY_CMD_SHARE && a->ctl->done[id % SY_CMD_SLOTS].id != id) {
        uint64_t n = c->args[1], p = c->args[0], to = c->args[2], from = c->args[3];
        MUST(n && n <= SY_CHUNK_PAGES && p + n <= SY_ARENA_PAGES && to + n <= FRAMES && from + n <= FRAMES, "a stub is told to share %lu pages from page %lu on with frame %lu", n, p, to);
        int does = a != honest && !(id & 1);
        for (int k = 0; does && k < 2; k++) { /* as a stub does: its frame may be shared now, or is not needed any more; and, now and then, a copy, or a lie */
          uint64_t h = a->chan->head;
          struct sy_slot *s = &a->chan->slots[h % SY_CHANNEL_SLOTS];
          if (s->turn != h) break;
          s->msg = (struct sy_msg){.type = k ? (id & 2 ? SY_MSG_PAGE_FREED : SY_MSG_PAGE_COW) : to == from ? SY_MSG_PAGE_SHARED : SY_MSG_PAGE_FREED, .vpage = p, .npages = (uint32_t)n, .arg = to};
          s->msg.pfn = (uint32_t)(k ? (id & 2 ? to : (uint64_t)a->ctl->in_hand[0]) : to == from ? to : from);
          s->turn = h + 1, a->chan->head = h + 1;
        }
        a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, does ? (int64_t)n : -EAGAIN};
      }
      if (c && c->op == SY_CMD_MOVE && a->ctl->done[id % SY_CMD_SLOTS].id != id) {
        uint64_t n = c->args[1];
        MUST(n && n <= SY_CHUNK_PAGES && c->args[0] + n <= SY_ARENA_PAGES && c->args[2] + n <= FRAMES && c->args[2] % n == 0, "a stub is told to move %lu pages from page %lu on to frame %lu", n, c->args[0], c->args[2]);
        a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, a == honest || id & 1 ? -EAGAIN : 1}; /* (who says so, and has not, has only more frames in hand) */
      }
      if (c && c->op == SY_CMD_OWN && a->ctl->done[id % SY_CMD_SLOTS].id != id) {
        uint64_t n = c->args[1];
        MUST(n && n <= SY_CHUNK_PAGES && c->args[0] + n <= SY_ARENA_PAGES && c->args[2] + n <= FRAMES, "a stub is told to own %lu pages from page %lu on in frame %lu", n, c->args[0], c->args[2]);
        for (uint64_t k = 0; a != honest && id & 1 && k < n; k++)
          if (a->pte[c->args[0] + k] >> SY_PTE_PFN_SHIFT == c->args[2] + k) a->pte[c->args[0] + k] = (c->args[2] + k) << SY_PTE_PFN_SHIFT | SY_PTE_PRESENT;
        a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, id & 1 ? (int64_t)n : -EAGAIN};
      }
      if (c && c->op == SY_CMD_REMAP && a->ctl->done[id % SY_CMD_SLOTS].id != id) {
        MUST(c->args[1] == SY_CHUNK_PAGES && c->args[0] % SY_CHUNK_PAGES == 0 && c->args[0] < SY_ARENA_PAGES && c->args[2] % SY_CHUNK_PAGES == 0 && c->args[2] < FRAMES && c->args[4] <= SY_HUGE_ORDER, "a stub is told to map %lu pages from page %lu on in pieces of order %lu", c->args[1], c->args[0], c->args[4]);
        a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, a == honest || id & 1 ? -EAGAIN : SY_CHUNK_PAGES};
      }
      if (a == honest) continue;
      if (!c || c->op != SY_CMD_EVICT || a->ctl->done[id % SY_CMD_SLOTS].id == id) continue;
      for (uint32_t r = (uint32_t)c->args[0]; r != (uint32_t)c->args[1]; r++) {
        struct sy_run run = a->mag->evict[r % SY_EVICT_RUNS];
        MUST(run.n && run.vpage + run.n <= SY_ARENA_PAGES && run.pfn + run.n <= FRAMES, "a stub is told to take away page %u, %u of them", run.vpage, run.n);
        for (uint64_t k = 0; k < run.n; k++) {
          a->chunks[(run.vpage + k) / SY_CHUNK_PAGES] = 1;
          a->pte[run.vpage + k] = (run.pfn + k) << SY_PTE_PFN_SHIFT | SY_PTE_SWAPPED | SY_PTE_HASFRAME;
        }
      }
      a->ctl->done[id % SY_CMD_SLOTS] = (struct sy_cmd_done){id, 0};
    }
  }
  pthread_mutex_lock(&G->lock);
  store_next(G);
  fz_unlock(&G->lock);
  busy &= ~STORER;
}
static void step(int what) {
  uint64_t b = take(1);
  struct peer *p = &peer[b % 4];
  uint8_t kinds[4], bytes[300];
  switch (what % 32) {
  case 0: call_in(p); break;
  case 1: case 2: { /* a HELLO, mostly well-formed */
    struct sy_hello h = {SY_MAGIC, SY_ABI_VERSION, (uint32_t)(b >> 2) % 6, (uint32_t)take(1) << (b & 4 ? 8 : 0), take(1) % 3};
    int n = h.kind == SY_HELLO_STUB || h.kind == SY_HELLO_FORK ? 1 : h.kind == SY_HELLO_KEEPER ? 2 : 0;
    if (h.kind == SY_HELLO_FORK && G->nas > 1) { /* of a client that is forking, as a rule */
      struct as *parent = G->as[take(1) % G->nas];
      h.arg = parent->asid;
      if (parent != honest && b & 0x40) parent->ctl->fork_active = 1, parent->ctl->fork_done = 0, parent->ctl->fork_child = SY_UNKNOWN_CHILD;
    }
    kinds[0] = n == 1 ? FD_UFFD : FD_LISTENER, kinds[1] = FD_SEALED, kinds[2] = kinds[3] = FD_NULL;
    uint64_t t = take(1); /* one thing wrong */
    if (t < 16) kinds[t % 2] = (uint8_t)(t >> 1);
    else if (t < 32) n = (int)t % 5;
    else if (t < 40) h.abi = (uint32_t)take(1);
    else if (t < 48) h.magic ^= (uint32_t)take(4);
    if (p->sock < 0) call_in(p);
    say(p, &h, t == 48 ? sizeof h - 1 : sizeof h, kinds, n);
    if (t < 192) run_server(), take_answers(p);
    break;
  }
  case 3: { /* bytes */
    size_t n = take(1) + (b & 0x80 ? 40 : 0);
    int nfd = (int)(b >> 2) % 5;
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)take(1);
    for (int i = 0; i < 4; i++) kinds[i] = (uint8_t)take(1);
    say(p, bytes, n, kinds, nfd);
    break;
  }
  case 4: case 5: { /* a request */
    struct sy_request q = {(uint32_t)(b >> 2) % 8, (uint32_t)number(), number(), {(uint32_t)getpid(), (uint32_t)number(), (uint32_t)number(), 0}};
    say(p, &q, b >> 5 == 7 ? take(1) % sizeof q : sizeof q, NULL, 0);
    break;
  }
  case 6: /* closes half, or all */
    if (p->sock >= 0 && b & 128) shutdown(p->sock, (int)(b >> 2) % 3);
    else if (p->sock >= 0) close(p->sock), p->sock = -1;
    break;
  case 7: if (b & 64) die(p); break;
  case 8: /* a system call of a client's */
    if (p->listener >= 0 && nnotif < 8) {
      static const uint16_t nr[] = {SYS_mmap, SYS_munmap, SYS_clone, SYS_fork};
      notif[nnotif].id = ++notif_id, notif[nnotif].pid = b & 64 ? (uint32_t)getpid() : (uint32_t)number();
      notif[nnotif].nr = b & 128 ? nr[(b >> 2) % 4] : (uint32_t)number(), notif[nnotif++].arg = number();
      timerfd_settime(p->listener, 0, &(struct itimerspec){.it_value.tv_nsec = 1}, NULL);
    }
    break;
  case 9: case 10: run_server(); break;
  case 11: case 12: run_drain(); break;
  case 13: fz_now += b * b * 1000000ull; break;
  case 14: case 15: commit(); break;
  case 24: run_storer(); break;
  case 16: hook_in = (int)(b % 16), hook_what = (int)take(1) % 16; break; /* in between, where the lock is let go */
  case 17: {
    uint32_t t[SY_MAX_ORDER + 1];
    for (int i = 0; i <= SY_MAX_ORDER; i++) t[i] = (uint32_t)number();
    sy_gw_reserve_targets(G, t), sy_gw_reserve_levels(G, t);
    break;
  }
  case 18: sy_gw_set_low(G, b & 64 ? p->asid : (uint32_t)number(), (uint32_t)number(), (uint32_t)number()); break;
  case 19: sy_gw_set_fault_order(G, b & 64 ? p->asid : (uint32_t)number(), (uint32_t)number(), (uint32_t)number()); break;
  case 20: sy_gw_heartbeat(G, (uint32_t)number(), 1, (uint32_t)number(), 1); break;
  case 21: {
    struct sy_as_info info[5];
    int n = sy_gw_as_list(G, info, 5);
    for (int i = 0; i < n; i++)
      for (int o = 0; o < 10; o++) MUST(info[i].mag_level[o] <= SY_MAG_SLOTS, "a magazine holds %u blocks", info[i].mag_level[o]);
    break;
  }
  case 22: if (!busy) { char text[256]; sy_gw_check(G, text, b % sizeof text); } break;
  case 23: take_answers(p); break;
  case 31: { /* the access monitor: a window, with a step of its own in between */
    uint32_t pfn[4], barrier[4], n = 1 + (uint32_t)(b >> 2) % 4, looked;
    uint8_t touched[4] = {1, 0, 1, 0};
    if (busy) break;
    for (uint32_t i = 0; i < n; i++) pfn[i] = a_pfn(as_of(p));
    uint32_t k = sy_gw_sample(G, pfn, barrier, n);
    MUST(k <= n, "%u of %u frames are sampled", k, n);
    if (b & 64) scribble(as_of(p), (int)take(1) % 16);
    uint32_t warm = sy_gw_look(G, pfn, barrier, b & 128 ? touched : NULL, k, SY_HEAT_HINT, &looked);
    MUST(warm <= looked && looked <= k, "%u warm of %u looked at of %u", warm, looked, k);
    break;
  }
  default: for (uint64_t n = 1 + b / 64; n; n--) scribble(as_of(p), (int)take(1) % 16); break;
  }
}

/* ---- what must hold */
static DULL void fresh_blocks_are_zero(void) {
  for (uint32_t i = 0; i < G->nas; i++) {
    struct as *a = G->as[i];
    uint32_t *seen = tail_seen[a->asid % MAX_AS];
    if (tail_asid[a->asid % MAX_AS] != a->asid) memset(seen, 0, sizeof tail_seen[0]), tail_asid[a->asid % MAX_AS] = a->asid;
    for (int o = 0; o < 10; o++)
      for (struct sy_mag_ring *r = &a->mag->ring[o]; seen[o] != r->tail; seen[o]++)
        for (uint32_t f = r->slot[seen[o] % SY_MAG_SLOTS], k = 0; k < 1u << o; k++)
          MUST(G->frames[f + k].asid != a->asid || G->frames[f + k].state != SY_FRAME_GRANTED || *(uint64_t *)(void *)frame_mem(G, f + k) == 0, "frame %u is granted with somebody's content", f + k);
  }
}
static DULL void tables_are_sound(void) {
  static uint64_t doubts[MAX_DOUBTS];
  struct report r = {.text = NULL, .len = 0, .seen = doubts};
  check_once(G, &r);
  /* What a liar's page table says is its own affair; the other rules are about the gateway's tables. */
  for (size_t i = 0; i < r.nseen; i++) {
    int rule = (int)(doubts[i] >> 60);
    MUST(rule == 3 || rule == 4 || rule == 5 || rule == 10 || rule == 14 || rule == 15, "rule %d of check, object %lu", rule, (unsigned long)(doubts[i] >> 32 & 0xfffffff));
  }
  uint64_t used = 0, marked = 0;
  for (uint32_t s = 0; s < G->hdr->slots; s++) {
    MUST(G->slot[s].asid != BUSY, "slot %u is left busy", s);
    used += G->slot[s].asid != 0;
  }
  MUST(used == G->hdr->slots_used, "%u slots are counted, %lu are used", G->hdr->slots_used, used);
  for (uint32_t f = 0; f < FRAMES; f++) MUST(G->frames[f].state == SY_FRAME_MAPPED || !G->heat[f].looks || G->frames[f].asid, "frame %u, which nobody has, is hot", f);
  for (uint32_t f = 0; f < FRAMES; f++) marked += (G->frames[f].flags & SY_FF_SWAPPING) != 0;
  MUST(marked == G->swapping, "%lu frames on their way are counted, %lu are marked", G->swapping, marked);
  for (uint32_t i = 0; i < G->nas; i++) {
    uint64_t mapped = 0, slots = 0, leaving = 0;
    for (uint32_t f = 0; f < FRAMES; f++) leaving += G->frames[f].flags & SY_FF_SWAPPING && G->frames[f].asid == G->as[i]->asid;
    MUST(leaving == G->as[i]->leaving, "address space %u counts %lu frames on their way, %lu are", G->as[i]->asid, G->as[i]->leaving, leaving);
    for (uint32_t s = 0; s < G->hdr->slots; s++) slots += G->slot[s].asid == G->as[i]->asid;
    uint64_t coming = 0;
    for (uint32_t k = G->prefetch_tail; k != G->prefetch_head; k++) coming += G->prefetch[k % PREFETCH_RING].asid == G->as[i]->asid ? G->prefetch[k % PREFETCH_RING].n : 0;
    for (int k = 0; k < G->npend; k++) coming += G->pend[k].as == G->as[i] && G->pend[k].op == SY_CMD_PREFETCH ? G->pend[k].args[1] : 0;
    MUST(coming == G->as[i]->prefetching, "address space %u counts %lu pages to bring back, %lu are", G->as[i]->asid, G->as[i]->prefetching, coming);
    MUST(slots == G->as[i]->swapped, "address space %u counts %lu slots, %lu are", G->as[i]->asid, G->as[i]->swapped, slots);
    for (uint32_t f = G->as[i]->list; f != NONE; f = G->fnext[f]) mapped += G->frames[f].state == SY_FRAME_MAPPED;
    MUST(mapped == G->as[i]->mapped, "address space %u counts %lu mapped, %lu are", G->as[i]->asid, G->as[i]->mapped, mapped);
  }
  for (uint32_t k = 0; k < 16; k++) {
    struct sy_frame *f = &G->frames[honest_pfn + k];
    MUST(f->state == SY_FRAME_MAPPED && f->asid == honest->asid && f->vpage == HONEST_VPAGE + k && frame_mem(G, honest_pfn + k)[99] == 0x5a, "the honest client's frame %u was taken", honest_pfn + k);
  }
}
static DULL void events_are_possible(void) {
  static struct sy_msg e[1024];
  static uint32_t seq;
  for (int n; (n = sy_gw_events(G, e, 1024)) > 0;)
    for (int i = 0; i < n; i++) {
      MUST(e[i].seqnum == seq + 1 || G->hdr->events_lost, "event %u follows %u", e[i].seqnum, seq);
      seq = e[i].seqnum;
      MUST(e[i].length == sizeof e[i] && e[i].node < G->nodes, "event of type %u, length %u, node %u", e[i].type, e[i].length, e[i].node);
      int frames = e[i].type == SY_MSG_PAGE_MAPPED || e[i].type == SY_MSG_PAGE_FREED || e[i].type == SY_MSG_PAGE_MOVED || e[i].type == SY_MSG_FRAMES_TAKEN;
      MUST(!frames || (e[i].npages && e[i].npages <= FRAMES && e[i].pfn <= FRAMES - e[i].npages && e[i].order <= SY_MAX_ORDER),
           "event of type %u about frames %u..+%u, order %u", e[i].type, e[i].pfn, e[i].npages, e[i].order);
    }
}
static void honest_post(int type, uint64_t vpage, uint32_t pfn, uint32_t n, int order) {
  uint64_t h = honest->chan->head++;
  struct sy_slot *s = &honest->chan->slots[h % SY_CHANNEL_SLOTS];
  MUST(s->turn == h, "the honest client's channel is full");
  s->msg = (struct sy_msg){.type = (uint16_t)type, .vpage = vpage, .pfn = pfn, .npages = n, .order = (uint16_t)order};
  s->turn = h + 1;
  drain_as(G, honest, 1);
}
/* What the wild component has granted to the honest client goes back. */
static void honest_gives_back(void) {
  for (int o = 0; o < 10; o++)
    for (struct sy_mag_ring *r = &honest->mag->ring[o]; honest->ctl->mag_head[o] != r->tail;)
      honest_post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, r->slot[honest->ctl->mag_head[o]++ % SY_MAG_SLOTS], 1u << o, o);
}
static DULL uint64_t open_fds(void) { /* of the first 64, a bit each */
  uint64_t set = 0;
  for (int fd = 0; fd < 64; fd++) set |= (uint64_t)(fcntl(fd, F_GETFD) >= 0) << fd;
  return set;
}
static void bury_all(void) {
  for (int i = 0; i < 4; i++) {
    die(&peer[i]);
    if (peer[i].uffd >= 0) close(peer[i].uffd);
    if (peer[i].listener >= 0) close(peer[i].listener);
    peer[i] = (struct peer){-1, -1, -1, 0};
  }
  nnotif = 0;
  for (int i = 0, quiet = 0; i < 600 && quiet < 4; i++, quiet = G->nas > 1 || G->nlobby ? 0 : quiet + 1) fz_now += 11000000000ull, run_server();
  MUST(G->nas == 1, "%u address spaces stay when their processes have ended", G->nas - 1);
  /* The honest one's stub is not played as far as commands go: what was sent to it stays, and nobody waits for it. */
  for (int i = 0; i < G->npend; i++) MUST(G->pend[i].as == honest && !G->pend[i].listener, "commands wait for the dead");
  for (int i = 0; i < G->npend; i++)
    if (G->pend[i].op == SY_CMD_MOVE || G->pend[i].op == SY_CMD_SHARE) moved(G, honest, G->pend[i].args, -EAGAIN, 1);
  MUST(!honest->moving, "%u moves are still counted", honest->moving);
  G->npend = 0, honest->outstanding = 0;
  for (uint32_t k = 0; k < 16; k++) G->frames[honest_pfn + k].flags = 0;
  G->swapping = 0, memset(G->swapping_on, 0, sizeof G->swapping_on), G->store_tail = G->store_head;
  honest->evict_tail = honest->evict_sent = honest->evict_done, honest->leaving = 0;
  MUST(!G->hdr->pool_frames, "%u frames of the pool leaked", G->hdr->pool_frames);
  MUST(!G->hdr->slots_used, "%u slots leaked", G->hdr->slots_used);
  for (int o = 0; o <= SY_MAX_ORDER; o++)
    while (G->nreserve[o]) {
      struct sy_op op = {.op = SY_OP_RELEASE, .order = (uint16_t)o, .pfn = G->reserve[o][0], .barrier = G->frames[G->reserve[o][0]].barrier};
      MUST(sy_gw_commit(G, SY_C_BUDDY, &op, 1) == 1, "a block of the reserve cannot be released: %u", op.result);
    }
  honest_gives_back();
  MUST(G->nfree == FRAMES - 16, "%u frames leaked", FRAMES - 16 - (uint32_t)G->nfree);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  char dir[] = "/tmp/sylvie-fuzz-XXXXXX", err[200] = "";
  MUST(mkdtemp(dir), "no directory");
  __lsan_disable(); /* what lives as long as the gateway, some of it known to epoll only */
  G = sy_gw_new(dir, FRAMES * PS, 2, err, sizeof err);
  MUST(G, "%s", err);
  snprintf(err, sizeof err, "%s/swap", dir);
  MUST(!sy_gw_set_swap(G, err, 256 * PS, FRAMES / 4), "no swap file");
  char tasks[64];
  snprintf(tasks, sizeof tasks, "%s/tasks", dir);
  MUST(!unlink(err) && !unlink(tasks) && !unlink(G->sock_path) && !rmdir(dir), "something is left in %s", dir); /* the names are needed no more, however this ends */
  for (uint32_t f = 0; f < FRAMES; f += CHUNK_FRAMES) populate_chunk(G, G->frames[f].node, f, -1);
  for (int i = 0; i < 4; i++) peer[i] = (struct peer){-1, -1, -1, 0};
  int fd = memfd_create("uffd", MFD_CLOEXEC);
  MUST(fd >= 0 && !ftruncate(fd, 1), "memfd");
  honest = new_as(G, 1, fd, 0, 0, NULL, &(int){0});
  MUST(honest, "the honest client is refused");
  honest_pfn = honest->mag->ring[4].slot[honest->ctl->mag_head[4]++];
  honest->chunks[HONEST_VPAGE / SY_CHUNK_PAGES] = 1, honest->chunks[HONEST_VPAGE / SY_CHUNK_PAGES + 1] = 1;
  for (uint32_t k = 0; k < 16; k++) honest->pte[HONEST_VPAGE + k] = (uint64_t)(honest_pfn + k) << SY_PTE_PFN_SHIFT | SY_PTE_PRESENT, memset(frame_mem(G, honest_pfn + k), 0x5a, PS);
  honest_post(SY_MSG_PAGE_MAPPED, HONEST_VPAGE, honest_pfn, 16, 4);
  honest_gives_back();
  __lsan_enable();
  return 0;
}
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint64_t fds = open_fds();
  in = data, left = size;
  chunks_set = 0, hook_in = 0, last_pfn = last_barrier = 0;
  G->slot_hint = G->clock_hand = G->swapped_out = 0;
  for (uint32_t z = 0; z < SY_MAX_ZONES; z++) G->standby_head[z] = G->standby_tail[z] = 0, G->hdr->watermark[z].standby = 0, G->reclaiming[z] = 0;
  memset(G->group, 0, sizeof G->group);
  G->hint = 0, G->next_asid = honest->asid; /* the same input, the same frames and names */
  memset(tail_asid, 0, sizeof tail_asid);
  for (int steps = 0; left && steps < 400; steps++) {
    step((int)take(1));
    if (!(steps & 7)) events_are_possible();
    fresh_blocks_are_zero();
  }
  hook_in = 0;
  run_server(), run_drain();
  tables_are_sound();
  bury_all();
  MUST(open_fds() == fds, "descriptors leaked: %lx", open_fds() ^ fds);
  events_are_possible();
  return 0;
}
