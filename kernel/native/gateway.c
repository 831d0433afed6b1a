/* The gateway's C half: RAM, tables, registrations, channels, magazines, transactions, notifications.
 *
 * Threads: server (epoll: registrations, deaths, urgent refills, notifications), drain (channels), populate; and whatever Python
 * thread calls in. None of them ever takes the GIL, so nothing that a program waits for waits for Python.
 *
 * Locking: `lock` guards the frame table, the free bitmap, the reserve, the ownership lists and the table of address spaces; it is
 * held for bookkeeping only, never while memory is zeroed. `ev_lock` guards the event ring and is taken inside `lock`, never the
 * other way round. The server thread alone owns connections and notifications in flight. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <lz4.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include "sys.h" /* the ABI */
#include "gateway.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif
#ifndef __NR_mseal
#define __NR_mseal 462
#endif
#define PS ((uint64_t)SY_PAGE_SIZE)
#define CHUNK_FRAMES 1024u /* 4 MiB: unit of populating, and alignment of a node's RAM (the largest order) */
#define MAX_AS 4096
#define EV_RING (1u << 17)
#define POOL 8
#ifndef MAX_LOBBY
#define MAX_LOBBY 256 /* of those that connect and say nothing, the oldest goes when another comes */
#endif
#define NONE 0xffffffffu

enum conn_kind { CONN_LISTEN = 1, CONN_NEW, CONN_STUB, CONN_KEEPER, CONN_NOTIFY, CONN_POKE };

struct as;
struct conn {
  enum conn_kind kind;
  int fd;
  struct sy_gateway *g;
  pid_t pid;
  struct as *as;
  struct conn *peer; /* keeper <-> its listener */
  struct sy_keeper_page *page;
  int dead, late; /* late: notifications in a row that somebody else had taken */
  int full;       /* CONN_NOTIFY: the keeper's page is, and we do not listen */
  struct conn *next_dead;
  struct conn **lobby, *next; /* CONN_NEW: where the list names it, who came after it */
};

struct as {
  uint32_t asid;
  pid_t pid;
  int uffd, as_fd, mag_fd, mag_ro;
  uint8_t *mem; /* the memfd "as", SY_AS_BYTES */
  struct sy_as_ctl *ctl;
  uint8_t *chunks;
  struct sy_channel *chan;
  uint64_t *pte;
  struct sy_mag *mag;
  uint64_t tail;          /* of the channel: ours, whatever the client writes */
  uint64_t overflow_seen;
  uint32_t list;          /* first owned frame, NONE = none */
  uint64_t frames, mapped, swapped /* slots */, bad_claims, urgent;
  uint32_t mag_head_seen[10];
  int ready;              /* its service threads have their priority */
  uint32_t zone;          /* of its limit; 0 = none */
  int dying;              /* socket hung up: freed once the mm is gone */
  int orphaned;           /* see serve_orphan */
  int child;              /* see still_copied */
  uint64_t dying_since_ns, next_test_ns, test_step_ns;
  uint64_t cmd_id;        /* last one sent */
  uint32_t outstanding, release_nr;
  uint64_t resync_at_ns;  /* 0: none due. First pass done when resync_count > 0 */
  int pidfd;
  uint32_t evict_tail, evict_sent, evict_done; /* of mag->evict: decided (under lock); told, and carried out (server thread) */
  uint64_t leaving, told_ns; /* frames with SY_FF_SWAPPING (under lock); when it was told last */
  int recycles;           /* order + 1 of the last block whose pages left and which stayed with it: see recycle; 0 = none */
  uint64_t prefetching, prefetch_told_ns; /* pages that it is to bring back, or was told to; when it was told last (under lock) */
  uint32_t shared;        /* pages in SHARED frames (under lock) */
  uint32_t own_from;      /* frames before this one have no news for it: see send_owns; NONE: none has (under lock) */
  uint64_t own_since_ns;  /* since when some have */
  int merge_due;          /* see flag_mergeable */
  int forked;             /* it began with its parent's page table */
  uint64_t parting_ns;    /* when it was told to turn native, so that others may have the frames that it shares; 0 = not (under lock) */
  uint32_t moving, moves; /* pages queued to move, or told and not answered; in how many moves (under lock) */
  int starving;           /* order + 1 of the refill that it waits for; 0 = none. Server thread only */
  uint64_t starved_ns;    /* since when there has been nothing for it; 0 = not */
  uint64_t fed_ns, fed_freed; /* when it was last looked for something, and g->freed then */
  uint64_t killed_ns;     /* ended for want of frames */
  int want_release;       /* sylvie release; under lock */
  int released;           /* turned native: freed when its socket hangs up */
  uint32_t tids[4];       /* of the service threads */
  uint32_t *suspect;      /* frames (pfn, barrier pairs) found unnamed in the first pass */
  uint64_t suspects;
  int resync_pass, resync_again;
  uint64_t resync_head;   /* what was in its channel at the first pass is handled before the second */
};

/* A command to a stub, and the system call (listener != NULL) that waits for it. There is no time-out: only a stopped program leaves a
 * command undone, and its caller is as stopped. Once the address space is gone (as == NULL) only the end of its threads is awaited. */
struct pending {
  struct as *as;
  struct conn *listener;
  uint64_t notif_id, cmd_id; /* 0: not sent, the ring is full */
  uint32_t op, nr;
  uint64_t args[6];
  pid_t pid;
  uint32_t tids[4];
};
/* A process that let the kernel hold its memory before it joined: it must not join. */
struct marked { pid_t pid; uint64_t born; };

/* What an address space was told to take away, and has. */
struct taken { uint32_t asid, at; struct sy_run run; }; /* at: which of its runs */
#define STORE_RING 65536
/* A frame that kswapd has chosen to leave when memory is short, as it was then. */
struct standby { uint32_t pfn, barrier, aged; };
#define STANDBY_RING 32768

/* Pages that kswapd wants back, of one address space and one after the other. */
struct wish { uint32_t asid, vpage, n; };
#define PREFETCH_RING 1024

/* Pages that are to go to other frames; from: NONE for a COLLAPSE, of which `most` pages may be untouched. */
enum move_kind { TO_MOVE = 0, TO_SHARE = 1 /* MERGE */, TO_REMAP = 2 /* in pieces of 2^most, where they are */ };
struct move { uint32_t asid, vpage, n, to, from, most, kind; }; /* most: of a MERGE its serial number */

/* A page that is in a SHARED frame. pending: its stub has not answered yet, to the MERGE of that serial number; missed: see resync_shared. */
struct holder { uint32_t asid, vpage, next; uint16_t pending, missed; };
#define MOVE_RING 1024u
#define MOVING_MOST (8u * SY_CHUNK_PAGES) /* pages of one address space that may be on the way, … */
#define MOVES_AT_ONCE 128u                /* … and in how many moves: the program's own memory calls wait their turn meanwhile */
#define SHARES_AT_ONCE 768u               /* … which are shorter when nothing is copied */

/* The shared memory of one address space. */
struct pair { int as_fd, mag_fd, mag_ro; uint8_t *mem; struct sy_mag *mag; };

struct sy_gateway {
  char run_dir[92], sock_path[108];
  uint32_t nodes, nframes;
  struct sy_node node[SY_MAX_NODES];
  int ram_fd[SY_MAX_NODES];
  uint8_t *ram[SY_MAX_NODES];
  int frames_fd, frames_ro, header_fd, header_ro, heat_fd, heat_ro, bell_fd;
  struct sy_frame *frames;
  struct sy_heat *heat;   /* of each frame; under lock */
  struct sy_header *hdr;
  struct sy_bell *bell;

  pthread_mutex_t lock;
  uint64_t *free_map;     /* 1 bit a frame: FREE */
  uint64_t nfree, hint;
  uint64_t freed;               /* changes whenever a frame gets free: what was not there before may be now */
  uint64_t no_fit[SY_MAX_ORDER + 1]; /* what that was when there was no free block of such an order */
  uint32_t *fnext, *fprev;
  struct as *as[MAX_AS];
  uint32_t nas, next_asid;
  uint32_t *reserve[SY_MAX_ORDER + 1];
  uint32_t nreserve[SY_MAX_ORDER + 1], reserve_cap[SY_MAX_ORDER + 1], reserve_target[SY_MAX_ORDER + 1];
  int reserve_told[SY_MAX_ORDER + 1];
  uint32_t low[10];

  pthread_mutex_t ev_lock;
  struct sy_msg *ev;
  uint64_t ev_head, ev_tail;
  uint32_t ev_seq;
  int ev_urgent;          /* urgent_fd is readable */
  int ev_fd, urgent_fd;

  struct pair pool[POOL];
  int npool;
  uint32_t watermark_told[SY_MAX_ZONES]; /* arg of the last WATERMARK */
  uint64_t group[SY_MAX_LIMITS]; /* who shares a limit */
  uint64_t short_ns;      /* when descriptors last ran out; 0 = never. Under lock */

  pthread_t server, drain, populate;
  int have_server, have_drain, have_populate, have_watch;
  timer_t watch;          /* interrupts the server thread */
  int stopping, ep, listen_fd, poke_fd, spare_fd;
  struct conn *lobby, **lobby_end; /* connections that have not said HELLO yet, the oldest first */
  int nlobby;
  struct pending *pend;
  int npend, pend_cap;
  int swap_fd;            /* -1: no store */
  int slots_fd, slots_ro; /* of the entries, which stubs read. What follows: under lock */
  struct sy_stored *slot; /* [hdr->slots]; asid 0: free */
  struct zpool *zpool;
  uint32_t slot_hint, clock_hand, swapped_out;
  uint64_t swapping, swapping_on[SY_MAX_ZONES], swap_progress_ns, asked_ns; /* frames with SY_FF_SWAPPING; when the last one left, or was asked to */
  struct taken *store;    /* [STORE_RING]: to be written */
  uint32_t store_head, store_tail;
  int writing;            /* the store thread is, without the lock */
  struct standby *standby[SY_MAX_ZONES]; /* [STANDBY_RING] */
  uint32_t standby_head[SY_MAX_ZONES], standby_tail[SY_MAX_ZONES];
  struct wish *prefetch;  /* [PREFETCH_RING]: pages to bring back */
  uint32_t prefetch_head, prefetch_tail;
  uint32_t *share_head;   /* of each frame: its first holder, NONE: it is not SHARED (under lock, as what follows) */
  struct holder *holder;
  uint32_t nholders, holder_free;
  struct move move[MOVE_RING];
  uint32_t move_head, move_tail;
  int reclaiming[SY_MAX_ZONES]; /* below low, and not above high since */
  pthread_cond_t store_work;
  pthread_t storer;
  int have_storer;
  uint32_t user[SY_MAX_USERS];
  int nusers;
  struct marked marked[64];
  unsigned nmarked;
  struct sched *sched;
};

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
static void count(struct sy_gateway *g, int c, uint64_t n) { __atomic_fetch_add(&g->hdr->counters[c], n, __ATOMIC_RELAXED); }
static void futex_wake_all(void *w) { syscall(SYS_futex, w, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0); }

/* ---------------------------------------------------------------- events */
/* A program will soon want what a component has to prepare. */
static int is_urgent(int type) {
  return (type >= SY_MSG_TASK_DEAD && type < SY_MSG_MM_NEW) || type == SY_MSG_MAGAZINE_LOW || type == SY_MSG_RESERVE_LOW || type == SY_MSG_WATERMARK || type == SY_MSG_TEST;
}
static void event(struct sy_gateway *g, struct sy_msg m) {
  m.length = sizeof m;
  pthread_mutex_lock(&g->ev_lock);
  m.seqnum = ++g->ev_seq;
  g->hdr->event_seq = g->ev_seq;
  if (g->ev_head - g->ev_tail == EV_RING)
    g->hdr->events_lost++; /* the number is spent all the same: readers see the gap */
  else {
    int was_empty = g->ev_head == g->ev_tail, urgent = is_urgent(m.type) && !g->ev_urgent;
    uint64_t one = 1;
    g->ev[g->ev_head++ % EV_RING] = m, g->ev_urgent |= urgent;
    if ((was_empty && write(g->ev_fd, &one, 8) < 0) || (urgent && write(g->urgent_fd, &one, 8) < 0)) { /* full counter: readable anyway */
    }
  }
  pthread_mutex_unlock(&g->ev_lock);
}
static void event_frames(struct sy_gateway *g, int type, uint32_t asid, uint32_t pfn, uint64_t n, int order) {
  event(g, (struct sy_msg){.type = (uint16_t)type, .asid = asid, .pfn = pfn, .npages = (uint32_t)n, .order = (uint16_t)order, .node = g->frames[pfn].node});
}
int sy_gw_events(struct sy_gateway *g, struct sy_msg *out, int max) {
  int n = 0;
  pthread_mutex_lock(&g->ev_lock);
  while (n < max && g->ev_tail != g->ev_head) out[n++] = g->ev[g->ev_tail++ % EV_RING];
  if (g->ev_tail == g->ev_head) {
    uint64_t x;
    if (read(g->ev_fd, &x, 8) < 0 || (g->ev_urgent && read(g->urgent_fd, &x, 8) < 0)) { /* was not signalled */
    }
    g->ev_urgent = 0;
  }
  pthread_mutex_unlock(&g->ev_lock);
  return n;
}
void sy_gw_post(struct sy_gateway *g, const struct sy_msg *m) { event(g, *m); }
void sy_gw_post_test(struct sy_gateway *g, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) event(g, (struct sy_msg){.type = SY_MSG_TEST, .vpage = i, .arg = now_ns()});
}
uint32_t sy_gw_frames(struct sy_gateway *g) { return g->nframes; }
int sy_gw_event_fd(struct sy_gateway *g) { return g->ev_fd; }
int sy_gw_urgent_fd(struct sy_gateway *g) { return g->urgent_fd; }
int sy_gw_header_fd(struct sy_gateway *g) { return g->header_ro; }
int sy_gw_frames_fd(struct sy_gateway *g) { return g->frames_ro; }

/* The server thread is to look what there is to do. */
static void poke(struct sy_gateway *g) {
  uint64_t one = 1;
  if (g->poke_fd >= 0 && write(g->poke_fd, &one, 8) < 0) { /* already poked */
  }
}

/* ---------------------------------------------------------------- frames (all under lock) */
static uint8_t *frame_mem(struct sy_gateway *g, uint32_t pfn) {
  uint32_t n = g->frames[pfn].node;
  return g->ram[n] + (uint64_t)(pfn - g->node[n].base) * PS;
}
/* A zone has so many more frames free. */
static void zone_free(struct sy_gateway *g, uint32_t zone, int64_t more) {
  struct sy_watermarks *m = &g->hdr->watermark[zone];
  m->free += (uint32_t)more;
  if (more > 0) __atomic_store_n(&g->freed, g->freed + 1, __ATOMIC_RELAXED);
  uint32_t *told = &g->watermark_told[zone], mark = m->free < m->min ? 0 : m->free < m->low ? 1 : 2;
  if (mark == 2 ? *told != 2 && m->free >= m->high : mark < *told) {
    *told = mark;
    event(g, (struct sy_msg){.type = SY_MSG_WATERMARK, .npages = m->free, .node = (uint16_t)zone, .arg = mark});
    if (mark < 2 && g->hdr->slots) poke(g);
  }
}
static void set_free_bits(struct sy_gateway *g, uint32_t pfn, uint32_t n, int on) {
  for (uint32_t i = pfn; i < pfn + n;) {
    uint32_t bit = i % 64, k = 64 - bit < pfn + n - i ? 64 - bit : pfn + n - i;
    uint64_t mask = (k == 64 ? ~0ull : ((1ull << k) - 1)) << bit;
    if (on) g->free_map[i / 64] |= mask;
    else g->free_map[i / 64] &= ~mask;
    i += k;
  }
  g->nfree += on ? n : -(uint64_t)n;
  zone_free(g, g->frames[pfn].node, on ? (int64_t)n : -(int64_t)n);
}
static int all_free(struct sy_gateway *g, uint32_t pfn, uint32_t n) {
  for (uint32_t i = pfn; i < pfn + n;) {
    uint32_t bit = i % 64, k = 64 - bit < pfn + n - i ? 64 - bit : pfn + n - i;
    uint64_t mask = (k == 64 ? ~0ull : ((1ull << k) - 1)) << bit;
    if ((g->free_map[i / 64] & mask) != mask) return 0;
    i += k;
  }
  return 1;
}
static void set_state(struct sy_gateway *g, uint32_t pfn, uint32_t n, int state, int order) {
  for (uint32_t i = pfn; i < pfn + n; i++) {
    struct sy_frame *f = &g->frames[i];
    __atomic_store_n(&f->state, (uint8_t)state, __ATOMIC_RELEASE);
    f->order = (uint8_t)order;
    __atomic_store_n(&f->barrier, f->barrier + 1, __ATOMIC_RELEASE);
  }
}
/* FREE -> ISOLATED. */
static void isolate(struct sy_gateway *g, uint32_t pfn, int order) {
  set_free_bits(g, pfn, 1u << order, 0);
  set_state(g, pfn, 1u << order, SY_FRAME_ISOLATED, order);
}
/* A frame is to leave for the store, or does not after all. */
static struct as *find_as(struct sy_gateway *g, uint32_t asid);
static void leave(struct sy_gateway *g, struct as *a, struct sy_frame *f) {
  f->flags |= SY_FF_SWAPPING, g->swapping++, g->swapping_on[f->node]++, a->leaving++;
  if (f->limit) g->swapping_on[f->limit]++;
}
static void stay(struct sy_gateway *g, struct sy_frame *f) {
  if (!(f->flags & SY_FF_SWAPPING)) return;
  struct as *a = find_as(g, f->asid);
  f->flags &= (uint8_t)~SY_FF_SWAPPING, g->swapping--, g->swapping_on[f->node]--;
  if (f->limit) g->swapping_on[f->limit]--;
  if (a) a->leaving--;
}
/* any state of ours -> FREE. The caller has unlinked it from its owner. */
static void make_free(struct sy_gateway *g, uint32_t pfn, uint32_t n, int zero) {
  for (uint32_t i = pfn; i < pfn + n; i++) {
    struct sy_frame *f = &g->frames[i];
    stay(g, f);
    f->asid = 0, f->vpage = 0, f->refcount = 0, f->parted = 0;
    f->flags = zero ? SY_FF_ZERO : 0;
  }
  memset(g->heat + pfn, 0, n * sizeof *g->heat);
  set_state(g, pfn, n, SY_FRAME_FREE, 0);
  set_free_bits(g, pfn, n, 1);
}
/* Not under lock: frames are ISOLATED, so nobody else looks at them. */
static void zero_block(struct sy_gateway *g, uint32_t pfn, uint32_t n) {
  for (uint32_t i = 0; i < n;) {
    if (g->frames[pfn + i].flags & SY_FF_ZERO) {
      i++;
      continue;
    }
    uint32_t k = 1;
    while (i + k < n && !(g->frames[pfn + i + k].flags & SY_FF_ZERO)) k++;
    memset(frame_mem(g, pfn + i), 0, k * PS);
    count(g, SY_CNT_ZEROED, k);
    i += k;
  }
}
static void own(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n) {
  for (uint32_t i = pfn + n; i-- > pfn;) { /* ascending in the list */
    g->fnext[i] = a->list, g->fprev[i] = NONE;
    g->frames[i].limit = a->zone;
    if (a->list != NONE) g->fprev[a->list] = i;
    a->list = i;
  }
  a->frames += n;
  if (a->zone) zone_free(g, a->zone, -(int64_t)n);
}
static void disown(struct sy_gateway *g, struct as *a, uint32_t pfn) {
  stay(g, &g->frames[pfn]);
  uint32_t nx = g->fnext[pfn], pv = g->fprev[pfn];
  if (pv != NONE) g->fnext[pv] = nx;
  else a->list = nx;
  if (nx != NONE) g->fprev[nx] = pv;
  a->frames--;
  g->frames[pfn].limit = 0;
  if (a->zone) zone_free(g, a->zone, 1);
}

/* Our own allocator, for when no component has prepared anything: first fit over the bitmap, next-fit hint. ISOLATED, or NONE. */
static uint32_t first_fit(struct sy_gateway *g, int order) {
  uint32_t n = 1u << order, total = g->nframes;
  if (g->nfree < n || g->no_fit[order] == g->freed) return NONE;
  uint32_t start = (uint32_t)g->hint & ~(n - 1);
  if (start >= total) start = 0;
  for (int lap = 0; lap < 2; lap++) {
    uint32_t from = lap ? 0 : start, to = lap ? start : total;
    for (uint32_t p = from; p + n <= to;) {
      if (n < 64 && !g->free_map[p / 64]) {
        p = (p / 64 + 1) * 64;
        continue;
      }
      if (all_free(g, p, n)) {
        isolate(g, p, order);
        g->hint = p + n;
        count(g, SY_CNT_FIRST_FIT, 1);
        event_frames(g, SY_MSG_FRAMES_TAKEN, 0, p, n, order);
        return p;
      }
      p += n;
    }
  }
  g->no_fit[order] = g->freed;
  return NONE;
}

/* ---------------------------------------------------------------- reserve (under lock): blocks RESERVED and zeroed */
static void reserve_push(struct sy_gateway *g, uint32_t pfn, int order) {
  if (g->nreserve[order] == g->reserve_cap[order]) {
    g->reserve_cap[order] = g->reserve_cap[order] ? g->reserve_cap[order] * 2 : 256;
    g->reserve[order] = realloc(g->reserve[order], g->reserve_cap[order] * sizeof(uint32_t));
    if (!g->reserve[order]) abort(); /* a few KiB: the machine is beyond help */
  }
  set_state(g, pfn, 1u << order, SY_FRAME_RESERVED, order);
  for (uint32_t i = 0; i < 1u << order; i++) g->frames[pfn + i].flags = SY_FF_ZERO;
  g->reserve[order][g->nreserve[order]++] = pfn;
  if (g->nreserve[order] * 2 >= g->reserve_target[order]) g->reserve_told[order] = 0;
}
static void reserve_check(struct sy_gateway *g, int order) {
  if (g->reserve_told[order] || g->nreserve[order] * 2 >= g->reserve_target[order]) return;
  g->reserve_told[order] = 1;
  event(g, (struct sy_msg){.type = SY_MSG_RESERVE_LOW, .order = (uint16_t)order, .npages = g->nreserve[order]});
}
/* A zeroed block, ISOLATED, of that order; splits a bigger one. NONE = none. */
static uint32_t reserve_pop(struct sy_gateway *g, int order) {
  int o = order;
  while (o <= SY_MAX_ORDER && !g->nreserve[o]) o++;
  if (o > SY_MAX_ORDER) {
    reserve_check(g, order);
    return NONE;
  }
  uint32_t pfn = g->reserve[o][--g->nreserve[o]];
  reserve_check(g, o);
  while (o > order) {
    o--;
    reserve_push(g, pfn + (1u << o), o);
  }
  set_state(g, pfn, 1u << order, SY_FRAME_ISOLATED, order);
  return pfn;
}

/* ---------------------------------------------------------------- magazines (under lock) */
static uint32_t mag_level(struct as *a, int order) {
  uint32_t head = __atomic_load_n(&a->ctl->mag_head[order], __ATOMIC_ACQUIRE), tail = a->mag->ring[order].tail;
  if (tail - head > SY_MAG_SLOTS || (int32_t)(head - a->mag_head_seen[order]) < 0) { /* a lie: it cannot have taken what was not there */
    a->bad_claims++;
    head = a->mag_head_seen[order];
  }
  a->mag_head_seen[order] = head;
  return tail - head;
}
/* May it have a block of that order? Of a limit, no more than a part lies ready. */
#define READY_PART 16
static int has_room(struct sy_gateway *g, struct as *a, int order) {
  if (mag_level(a, order) >= SY_MAG_SLOTS) return 0;
  if (!a->zone) return 1;
  uint32_t ready = 1u << order, most = g->hdr->limit[a->zone - SY_MAX_NODES].frames / READY_PART;
  for (int o = 0; o < 10; o++) ready += mag_level(a, o) << o;
  return g->hdr->watermark[a->zone].free >= 1u << order && ready <= (most < 256 ? 256 : most);
}
/* ISOLATED and zero -> GRANTED, in the magazine. 0, or -1: there is no room. */
static int mag_push(struct sy_gateway *g, struct as *a, uint32_t pfn, int order) {
  struct sy_mag_ring *r = &a->mag->ring[order];
  if (!has_room(g, a, order)) return -1;
  for (uint32_t i = pfn; i < pfn + (1u << order); i++) {
    struct sy_frame *f = &g->frames[i];
    f->asid = a->asid, f->flags = 0, f->refcount = 0, f->vpage = 0;
  }
  set_state(g, pfn, 1u << order, SY_FRAME_GRANTED, order);
  own(g, a, pfn, 1u << order);
  r->slot[r->tail % SY_MAG_SLOTS] = pfn;
  __atomic_store_n(&r->tail, r->tail + 1, __ATOMIC_RELEASE);
  __atomic_fetch_and(&a->ctl->mag_low_sent, ~(1u << order), __ATOMIC_SEQ_CST);
  return 0;
}
/* One block of at most that order from reserve or first fit, zeroed, into the magazine. Returns pages given, 0 = nothing left. Drops the lock
 * while it zeroes. */
static uint32_t give(struct sy_gateway *g, struct as *a, int order) {
  while (order && !has_room(g, a, order)) order--;
  if (!has_room(g, a, order)) return 0;
  uint32_t pfn = reserve_pop(g, order);
  while (pfn == NONE) {
    pfn = first_fit(g, order);
    if (pfn != NONE) {
      uint32_t n = 1u << order;
      pthread_mutex_unlock(&g->lock);
      zero_block(g, pfn, n);
      pthread_mutex_lock(&g->lock);
    } else if (order == 0)
      return 0;
    else
      pfn = reserve_pop(g, --order);
  }
  if (mag_push(g, a, pfn, order)) {
    make_free(g, pfn, 1u << order, 1);
    event_frames(g, SY_MSG_PAGE_FREED, 0, pfn, 1u << order, order);
    return 0;
  }
  return 1u << order;
}

/* ---------------------------------------------------------------- address spaces */
static struct as *find_as(struct sy_gateway *g, uint32_t asid) {
  for (uint32_t i = 0; i < g->nas; i++)
    if (g->as[i]->asid == asid) return g->as[i];
  return NULL;
}
static int reopen_ro(int fd) {
  char p[64];
  snprintf(p, sizeof p, "/proc/self/fd/%d", fd);
  return open(p, O_RDONLY | O_CLOEXEC);
}
static int make_memfd(const char *name, uint64_t size) {
  int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -1;
  if (fchmod(fd, 0600) || ftruncate(fd, (off_t)size)) { /* 0600: or a read-only descriptor could be reopened for writing */
    close(fd);
    return -1;
  }
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL); /* SEAL: or a client could seal the RAM of all against writing */
  return fd;
}
static void free_pair(const struct pair *p) {
  if (p->mem != MAP_FAILED) munmap(p->mem, SY_AS_BYTES);
  if (p->mag != MAP_FAILED) munmap(p->mag, SY_MAG_BYTES);
  if (p->as_fd >= 0) close(p->as_fd);
  if (p->mag_fd >= 0) close(p->mag_fd);
  if (p->mag_ro >= 0) close(p->mag_ro);
}
static int make_pair(struct pair *p) {
  *p = (struct pair){make_memfd("sylvie-as", SY_AS_BYTES), make_memfd("sylvie-mag", SY_MAG_BYTES), -1, MAP_FAILED, MAP_FAILED};
  if (p->mag_fd >= 0) p->mag_ro = reopen_ro(p->mag_fd);
  if (p->as_fd >= 0) p->mem = mmap(NULL, SY_AS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, p->as_fd, 0);
  if (p->mag_fd >= 0) p->mag = mmap(NULL, SY_MAG_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, p->mag_fd, 0);
  if (p->mag_ro < 0 || p->mem == MAP_FAILED || p->mag == MAP_FAILED) return free_pair(p), -1;
  struct sy_as_ctl *ctl = (void *)(p->mem + SY_AS_CTL_OFF);
  struct sy_channel *ch = (void *)(p->mem + SY_AS_CHANNEL_OFF);
  ctl->magic = SY_MAGIC, ctl->abi = SY_ABI_VERSION;
  for (int i = 0; i < SY_HANDS; i++) ctl->in_hand[i] = SY_NO_FRAME;
  for (uint64_t i = 0; i < SY_CHANNEL_SLOTS; i++) ch->slots[i].turn = i;
  p->mag->magic = SY_MAGIC, p->mag->abi = SY_ABI_VERSION;
  return 0;
}
#define SHORT_NS 1000000000ull /* after descriptors have run out, none is taken ahead of need for so long */
static void fill_pool(struct sy_gateway *g) { /* drain thread, when idle */
  for (struct pair p;;) {
    pthread_mutex_lock(&g->lock);
    int enough = g->npool == POOL || (g->short_ns && now_ns() < g->short_ns + SHORT_NS);
    pthread_mutex_unlock(&g->lock);
    if (enough || make_pair(&p)) return;
    pthread_mutex_lock(&g->lock);
    g->pool[g->npool++] = p;
    pthread_mutex_unlock(&g->lock);
  }
}
/* Descriptors have run out: gives up what lies ready for newcomers. */
static void shrink_pool(struct sy_gateway *g) {
  pthread_mutex_lock(&g->lock);
  g->short_ns = now_ns();
  if (g->npool) free_pair(&g->pool[--g->npool]);
  pthread_mutex_unlock(&g->lock);
}
static void free_as_memory(struct as *a) {
  free_pair(&(struct pair){a->as_fd, a->mag_fd, a->mag_ro, a->mem, a->mag});
  if (a->uffd >= 0) close(a->uffd);
  if (a->pidfd >= 0) close(a->pidfd);
  if (a->child > 0) close(a->child);
  free(a->suspect);
  free(a);
}

/* The zone of a limit that such a group shares; a new one in place of one that nobody is in. 0: there are no more (under lock). */
static uint32_t limit_zone(struct sy_gateway *g, uint32_t frames, uint64_t group) {
  int free = -1;
  for (int i = 0; i < SY_MAX_LIMITS; i++) {
    struct sy_limit *l = &g->hdr->limit[i];
    if (l->frames == frames && g->group[i] == group) return (uint32_t)(SY_MAX_NODES + i);
    if (!l->members && (free < 0 || (g->hdr->limit[free].frames && !l->frames))) free = i; /* one never used rather than one whose members may come again */
  }
  if (free < 0) return 0;
  uint32_t z = (uint32_t)(SY_MAX_NODES + free);
  if (!g->standby[z] && !(g->standby[z] = malloc(STANDBY_RING * sizeof **g->standby))) return 0;
  g->group[free] = group, g->hdr->limit[free].frames = frames;
  g->hdr->watermark[z] = (struct sy_watermarks){frames / 128, frames / 64, frames / 32, frames, 0};
  g->watermark_told[z] = 2, g->reclaiming[z] = 0, g->standby_head[z] = g->standby_tail[z] = 0;
  return z;
}
/* limit: frames, 0 for none; or of whom it is a fork, and within whose limit. *status says why there is none. */
static struct as *new_as(struct sy_gateway *g, pid_t pid, int uffd, uint32_t limit, uint64_t group, const struct as *parent, int *status) {
  *status = SY_W_FULL;
  struct as *a = calloc(1, sizeof *a);
  if (!a) return NULL;
  pthread_mutex_lock(&g->lock);
  if (parent) a->zone = parent->zone;
  else if (limit && (limit < SY_LEAST_LIMIT || !(a->zone = limit_zone(g, limit, group)))) *status = SY_W_LIMITS;
  if (g->nas == MAX_AS || *status == SY_W_LIMITS) {
    pthread_mutex_unlock(&g->lock);
    free(a);
    return NULL;
  }
  struct pair p;
  if (g->npool)
    p = g->pool[--g->npool];
  else if (make_pair(&p)) {
    pthread_mutex_unlock(&g->lock);
    free(a);
    return NULL;
  }
  a->as_fd = p.as_fd, a->mag_fd = p.mag_fd, a->mag_ro = p.mag_ro, a->mem = p.mem, a->mag = p.mag;
  a->asid = ++g->next_asid, a->pid = pid, a->uffd = uffd, a->list = a->own_from = NONE, a->forked = parent != NULL;
  a->pidfd = (int)syscall(SYS_pidfd_open, pid, 0); /* (it waits for our answer, so it is that one) */
  a->ctl = (void *)(a->mem + SY_AS_CTL_OFF), a->chunks = a->mem + SY_AS_CHUNKS_OFF;
  a->chan = (void *)(a->mem + SY_AS_CHANNEL_OFF), a->pte = (void *)(a->mem + SY_AS_PTE_OFF);
  a->mag->asid = a->asid;
  a->mag->fault_order = g->hdr->default_fault_order, a->mag->fault_order_max = g->hdr->default_fault_order_max;
  for (int i = 0; i < 10; i++) a->mag->ring[i].low = g->low[i];
  g->as[g->nas++] = a;
  if (a->zone) g->hdr->limit[a->zone - SY_MAX_NODES].members++;
  static const struct { int order, blocks; } first[] = {{0, 16}, {4, 12}};
  for (unsigned i = 0; i < sizeof first / sizeof *first; i++)
    for (int k = 0; k < first[i].blocks; k++) give(g, a, first[i].order);
  uint32_t old = 0;
  for (uint32_t i = 0; i + 1 < g->nas; i++)
    if (g->as[i]->pid == pid) old = g->as[i]->asid;
  count(g, SY_CNT_REGISTERED, 1);
  event(g, (struct sy_msg){.type = old ? SY_MSG_MM_EXEC : SY_MSG_MM_NEW, .asid = a->asid, .vpage = old, .arg = (uint64_t)pid});
  pthread_mutex_unlock(&g->lock);
  return a;
}

/* ---------------------------------------------------------------- channels (under lock) */
static void bad(struct sy_gateway *g, struct as *a) {
  a->bad_claims++;
  count(g, SY_CNT_BAD_CLAIMS, 1);
}
static int owned(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, int states) {
  if (n == 0 || n > g->nframes || pfn > g->nframes - n) return 0;
  for (uint32_t i = pfn; i < pfn + n; i++)
    if (g->frames[i].asid != a->asid || !(states >> g->frames[i].state & 1)) return 0;
  return 1;
}
#define IS(s) (1 << (s))
static void map_frames(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n, uint64_t vpage) {
  for (uint32_t i = 0; i < n; i++) {
    struct sy_frame *f = &g->frames[pfn + i];
    if (f->state != SY_FRAME_MAPPED) a->mapped++;
    __atomic_store_n(&f->state, SY_FRAME_MAPPED, __ATOMIC_RELEASE);
    f->vpage = vpage + i, f->refcount = 1;
    f->flags &= (uint8_t)~SY_FF_STANDBY; /* what was chosen was the page where it was: by its barrier, nobody would take this one */
    if (vpage + i < SY_ARENA_PAGES && a->mem[SY_AS_ADVICE_OFF + (vpage + i) / SY_CHUNK_PAGES] & SY_ADVICE_MERGE) f->flags |= SY_FF_MERGEABLE;
    else f->flags &= (uint8_t)~SY_FF_MERGEABLE;
    __atomic_store_n(&f->barrier, f->barrier + 1, __ATOMIC_RELEASE);
  }
}
static void release_frames(struct sy_gateway *g, struct as *a, uint32_t pfn, uint32_t n) {
  for (uint32_t i = pfn; i < pfn + n; i++) {
    if (g->frames[i].state == SY_FRAME_MAPPED) a->mapped--;
    disown(g, a, i);
  }
  make_free(g, pfn, n, 0);
}
/* What lies unused in the magazines of all, or of those who share a limit, back to FREE. We take as a stub does, by moving its head. Number
 * of frames. */
static uint64_t drain_magazines(struct sy_gateway *g, uint32_t zone) {
  uint64_t n = 0;
  for (uint32_t i = 0; i < g->nas; i++) {
    struct as *a = g->as[i];
    if (zone && a->zone != zone) continue;
    for (int order = 0; order < 10; order++)
      for (int tries = 0; tries < 2 * SY_MAG_SLOTS && mag_level(a, order); tries++) {
        uint32_t h = a->mag_head_seen[order], pfn = a->mag->ring[order].slot[h % SY_MAG_SLOTS];
        if (!__atomic_compare_exchange_n(&a->ctl->mag_head[order], &h, h + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        a->mag_head_seen[order] = h + 1;
        if (!owned(g, a, pfn, 1u << order, IS(SY_FRAME_GRANTED))) { /* used without having been taken */
          bad(g, a);
          continue;
        }
        release_frames(g, a, pfn, 1u << order);
        event_frames(g, SY_MSG_PAGE_FREED, 0, pfn, 1u << order, order);
        n += 1u << order;
      }
  }
  count(g, SY_CNT_DRAINED, n);
  return n;
}
#include "gateway_share.h"
#include "gateway_store.h"
#include "gateway_swap.h"
#include "gateway_heat.h"

static void handle(struct sy_gateway *g, struct as *a, struct sy_msg m) {
  m.asid = a->asid;
  switch (m.type) {
  case SY_MSG_PAGE_MAPPED:
    if (m.order > SY_HUGE_ORDER || m.npages == 0 || m.npages > 1u << m.order || m.vpage >= SY_ARENA_PAGES || m.vpage + m.npages > SY_ARENA_PAGES ||
        !owned(g, a, m.pfn, m.npages, IS(SY_FRAME_GRANTED))) {
      bad(g, a);
      return;
    }
    map_frames(g, a, m.pfn, m.npages, m.vpage);
    break;
  case SY_MSG_PAGE_FREED:
    if (!may_let_go(g, a, m.pfn, m.npages, m.vpage, IS(SY_FRAME_GRANTED) | IS(SY_FRAME_MAPPED))) return a->resync_at_ns ? (void)0 : bad(g, a);
    let_go(g, a, m.pfn, m.npages, m.vpage);
    return;
  case SY_MSG_PAGE_SHARED:
    if (!owned(g, a, m.pfn, m.npages, IS(SY_FRAME_MAPPED)) || !make_shared(g, a, m.pfn, m.npages, m.vpage)) bad(g, a);
    return; /* PAGE_MERGED says it */
  case SY_MSG_PAGE_COW:
    if (m.vpage >= SY_ARENA_PAGES || m.npages > SY_ARENA_PAGES - m.vpage || !owned(g, a, m.pfn, m.npages, IS(SY_FRAME_GRANTED)) ||
        !may_let_go(g, a, m.arg < g->nframes ? (uint32_t)m.arg : NONE, m.npages, m.vpage, IS(SY_FRAME_MAPPED)))
      return bad(g, a);
    let_go(g, a, (uint32_t)m.arg, m.npages, m.vpage);
    map_frames(g, a, m.pfn, m.npages, m.vpage);
    m.order = 0;
    count(g, SY_CNT_UNMERGED, m.npages);
    break;
  case SY_MSG_PAGE_MOVED:
    if (m.vpage >= SY_ARENA_PAGES || m.vpage + m.npages > SY_ARENA_PAGES || !owned(g, a, m.pfn, m.npages, IS(SY_FRAME_MAPPED))) {
      bad(g, a);
      return;
    }
    map_frames(g, a, m.pfn, m.npages, m.vpage);
    m.order = 0;
    break;
  case SY_MSG_MAGAZINE_LOW:
    if (m.order > 9) {
      bad(g, a);
      return;
    }
    m.npages = mag_level(a, m.order);
    break;
  case SY_MSG_PAGE_HINT:
    if (m.npages != 1 || !owned(g, a, m.pfn, 1, IS(SY_FRAME_MAPPED))) return bad(g, a);
    g->frames[m.pfn].flags &= (uint8_t)~SY_FF_AGED;
    break;
  case SY_MSG_SLOT_FREED:
    if (m.pfn != SY_NO_FRAME && !owned(g, a, m.pfn, m.npages, IS(SY_FRAME_MAPPED))) return bad(g, a);
    for (uint32_t i = 0; i < m.npages; i++) {
      if (!slot_is(g, a, m.arg + i)) return bad(g, a);
      if (g->slot[m.arg + i].vpage != m.vpage + i) { /* another page's by now, if messages were lost: resync_slots knows */
        if (!a->resync_at_ns) bad(g, a);
        continue;
      }
      if (m.pfn != SY_NO_FRAME) came_back(g, a, m.vpage + i, m.pfn + i, (uint32_t)m.arg + i, m.order);
      slot_free(g, (uint32_t)m.arg + i), a->swapped--;
    }
    if (m.pfn != SY_NO_FRAME) return; /* PAGE_REFAULT says it */
    break;
  case SY_MSG_SLOT_MOVED:
    if (!slot_is(g, a, m.arg) || m.vpage >= SY_ARENA_PAGES) return bad(g, a);
    g->slot[m.arg].vpage = (uint32_t)m.vpage;
    break;
  case SY_MSG_MM_FORK: count(g, SY_CNT_FORKS, 1); break;
  case SY_MSG_MM_MADVISE: a->merge_due |= m.arg == MADV_MERGEABLE; break;
  case SY_MSG_MM_MMAP: case SY_MSG_MM_MUNMAP: case SY_MSG_MM_MREMAP: case SY_MSG_PAGE_FAULT: case SY_MSG_TEST: break;
  default: bad(g, a); return;
  }
  m.node = m.pfn < g->nframes ? g->frames[m.pfn].node : 0; /* nothing unchecked goes on to the bus */
  event(g, m);
}

/* The page table is the truth; a channel that overflowed lost some of what led to it. A frame that the address space owns, but neither its page
 * table, nor its magazine, nor its hand names, twice and unchanged, was freed by a message that was lost. */
static void name_block(struct sy_gateway *g, uint64_t *named, uint64_t pfn, uint32_t n) {
  for (uint64_t f = pfn; f < pfn + n && f < g->nframes; f++) named[f / 64] |= 1ull << f % 64;
}
/* May this frame, unnamed in the first pass, go? */
static int is_lost(struct sy_gateway *g, struct as *a, const uint64_t *named, const uint32_t *suspect) {
  uint32_t f = suspect[0];
  return g->frames[f].asid == a->asid && g->frames[f].barrier == suspect[1] && !(named[f / 64] >> f % 64 & 1);
}
static void resync(struct sy_gateway *g, struct as *a) {
  uint64_t *named = calloc((g->nframes + 63) / 64, 8); /* a bit a frame: others wait meanwhile, so nothing here may be worse than linear */
  uint32_t *lost = a->resync_pass ? NULL : malloc((a->frames + 1) * 2 * sizeof *lost);
  if (!named || (!a->resync_pass && !lost)) {
    free(named), free(lost);
    return;
  }
  for (uint32_t c = 0; c < SY_CHUNKS; c++) {
    if (!a->chunks[c]) continue;
    for (uint32_t i = c * SY_CHUNK_PAGES; i < (c + 1) * SY_CHUNK_PAGES; i++) {
      uint64_t w = __atomic_load_n(&a->pte[i], __ATOMIC_ACQUIRE);
      int st = w & SY_PTE_STATE_MASK;
      uint64_t pfn = w >> SY_PTE_PFN_SHIFT;
      if (st == SY_PTE_SHARED_RO && pfn < g->nframes && g->frames[pfn].asid == a->asid) { /* its PAGE_SHARED was lost */
        if (!make_shared(g, a, (uint32_t)pfn, 1, i)) name_block(g, named, pfn, 1);
        continue;
      }
      if (!(st == SY_PTE_PRESENT || ((st == SY_PTE_LOCKED || st == SY_PTE_SWAPPED) && (w & SY_PTE_HASFRAME))) || pfn >= g->nframes || g->frames[pfn].asid != a->asid) continue;
      name_block(g, named, pfn, 1);
      int wrong = g->frames[pfn].state == SY_FRAME_GRANTED || (g->frames[pfn].state == SY_FRAME_MAPPED && g->frames[pfn].vpage != i);
      if (wrong && st == SY_PTE_PRESENT) map_frames(g, a, (uint32_t)pfn, 1, i); /* its PAGE_MAPPED or PAGE_MOVED was lost */
    }
  }
  /* what is in the magazine or in hand is named by its block */
  for (int o = 0; o < 10; o++) {
    struct sy_mag_ring *r = &a->mag->ring[o];
    for (uint32_t h = r->tail - mag_level(a, o); h != r->tail; h++) name_block(g, named, r->slot[h % SY_MAG_SLOTS], 1u << o);
  }
  for (int i = 0; i < SY_HANDS; i++) name_block(g, named, a->ctl->in_hand[i], 1u << (a->ctl->in_hand_order[i] % 10));
  if (a->resync_pass == 0) {
    uint64_t n = 0;
    for (uint32_t f = a->list; f != NONE; f = g->fnext[f])
      if (!(named[f / 64] >> f % 64 & 1) && !(g->frames[f].flags & SY_FF_TARGET)) lost[n++] = f, lost[n++] = g->frames[f].barrier;
    free(a->suspect);
    a->suspect = lost, a->suspects = n;
    a->resync_pass = 1, a->resync_at_ns = now_ns() + 100000000ull;
    uint64_t head = __atomic_load_n(&a->chan->head, __ATOMIC_ACQUIRE); /* (or what it says that it is) */
    a->resync_head = head - a->tail > SY_CHANNEL_SLOTS ? a->tail : head;
    resync_shared(g, a, 0);
  } else {
    for (uint64_t i = 0; i < a->suspects; i += 2) {
      uint32_t f = a->suspect[i], n = 1;
      if (!is_lost(g, a, named, &a->suspect[i])) continue;
      if (g->frames[f].state == SY_FRAME_SHARED) {
        drop_one(g, a, f, g->frames[f].vpage);
        continue;
      }
      while (i + 2 < a->suspects && a->suspect[i + 2] == f + n && g->frames[f + n].state != SY_FRAME_SHARED && is_lost(g, a, named, &a->suspect[i + 2])) n++, i += 2;
      release_frames(g, a, f, n);
      event_frames(g, SY_MSG_PAGE_FREED, a->asid, f, n, 0);
    }
    resync_slots(g, a);
    resync_shared(g, a, 1);
    count(g, SY_CNT_RESYNCS, 1);
    free(a->suspect);
    a->suspect = NULL, a->suspects = 0, a->resync_pass = 0;
    a->resync_at_ns = a->resync_again ? now_ns() + 50000000ull : 0, a->resync_again = 0;
  }
  free(named);
}

/* At most `max` messages of one channel; number taken. */
static int drain_as(struct sy_gateway *g, struct as *a, int max) {
  int n = 0;
  for (; n < max; n++) {
    struct sy_slot *s = &a->chan->slots[a->tail % SY_CHANNEL_SLOTS];
    if (__atomic_load_n(&s->turn, __ATOMIC_ACQUIRE) != a->tail + 1) break;
    struct sy_msg m = s->msg; /* a copy: the client may change it under us */
    __atomic_store_n(&s->turn, a->tail + SY_CHANNEL_SLOTS, __ATOMIC_RELEASE);
    a->tail++;
    handle(g, a, m);
  }
  if (a->merge_due) flag_mergeable(g, a); /* (once, however often it was said) */
  if (n && want_recycled(a)) relieve_early(g, a);
  uint64_t o = __atomic_load_n(&a->chan->overflow, __ATOMIC_ACQUIRE);
  if (o != a->overflow_seen) {
    a->overflow_seen = o;
    count(g, SY_CNT_OVERFLOWS, 1);
    event(g, (struct sy_msg){.type = SY_MSG_OVERFLOW, .asid = a->asid, .arg = o});
    if (!a->resync_at_ns) a->resync_pass = 0, a->resync_at_ns = now_ns() + 50000000ull;
    else a->resync_again = 1; /* never put off: a busy program may go on overflowing */
  }
  return n;
}
static int drain_all(struct sy_gateway *g) {
  int n = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < g->nas; i++) {
    n += drain_as(g, g->as[i], 1024);
    struct as *a = g->as[i];
    if (a->resync_at_ns && now_ns() > a->resync_at_ns && (!a->resync_pass || (int64_t)(a->tail - a->resync_head) >= 0)) resync(g, a);
  }
  pthread_mutex_unlock(&g->lock);
  return n;
}
static void *drain_thread(void *arg) {
  struct sy_gateway *g = arg;
  /* A channel holds some 10 ms of a busy program's messages: do not queue behind programs for a CPU. */
  struct sched_param sp = {.sched_priority = SY_PRIORITY_DRAIN};
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &sp);
  while (!__atomic_load_n(&g->stopping, __ATOMIC_ACQUIRE)) {
    for (int idle = 0; idle < 3;) {
      idle = drain_all(g) ? 0 : idle + 1;
      if (g->npool < POOL / 2) fill_pool(g);
      struct timespec t = {0, 300000}; /* let work gather */
      nanosleep(&t, NULL);
    }
    fill_pool(g);
    /* Sleep: producers that see the flag ring the bell. Set, fence, look once more. */
    uint32_t v = __atomic_load_n(&g->bell->rung, __ATOMIC_ACQUIRE);
    __atomic_store_n(&g->hdr->gateway_asleep, 1, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (drain_all(g) == 0) {
      struct timespec t = {0, 50000000};
      syscall(SYS_futex, &g->bell->rung, FUTEX_WAIT, v, &t, NULL, 0);
    }
    __atomic_store_n(&g->hdr->gateway_asleep, 0, __ATOMIC_SEQ_CST);
  }
  return NULL;
}

/* ---------------------------------------------------------------- deaths */
/* Is the address space's memory really gone? Threads of a process end one by one; only the mm's own end proves that nothing touches its
 * frames any more. */
static int mm_gone(struct as *a) {
  struct uffdio_writeprotect w = {.range = {SY_ARENA_START, PS}, .mode = 0};
  return ioctl(a->uffd, UFFDIO_WRITEPROTECT, &w) < 0 && errno == ESRCH;
}
static void bury(struct sy_gateway *g, struct as *a) {
  pthread_mutex_lock(&g->lock);
  drain_as(g, a, 2 * SY_CHANNEL_SLOTS); /* not until it is empty: somebody may still hold its memory */
  bury_shared(g, a);
  while (a->list != NONE) {
    uint32_t pfn = a->list, n = 1;
    while (n < 16384 && g->fnext[pfn + n - 1] == pfn + n) n++;
    release_frames(g, a, pfn, n);
    event_frames(g, SY_MSG_PAGE_FREED, a->asid, pfn, n, 0);
    pthread_mutex_unlock(&g->lock); /* let others in between runs */
    pthread_mutex_lock(&g->lock);
  }
  bury_slots(g, a);
  if (a->zone) g->hdr->limit[a->zone - SY_MAX_NODES].members--;
  for (uint32_t i = 0; i < g->nas; i++)
    if (g->as[i] == a) g->as[i] = g->as[--g->nas];
  count(g, SY_CNT_EXITED, 1);
  event(g, (struct sy_msg){.type = SY_MSG_MM_EXIT, .asid = a->asid, .arg = (uint64_t)a->pid});
  pthread_mutex_unlock(&g->lock);
  free_as_memory(a);
}

#include "gateway_sched.h"
#include "gateway_server.h"
