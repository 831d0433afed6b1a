/* The stub: preloaded into every managed program, it keeps the arena.
 *
 * Freestanding: no libc, no allocation, only plain system calls and general registers, so that it can run in any place where
 * libc makes a system call. Three parts run it:
 *   program threads  come in at the patched system call sites of libc (sy_entry), with all signals blocked, under mm_lock;
 *   fault threads    (F0, F1: one a CPU) read the userfaultfd and map frames from the magazine;
 *   the command thread (C) joins the enclave, and executes what the gateway asks for.
 *
 * Who writes what:
 *   attr[]    (one byte a page: mapped, protection) only under mm_lock; fault threads read it.
 *   PTE words by compare-and-swap. A word in state LOCKED belongs to whoever locked it; a fault that meets it sets CONTENDED
 *             and leaves; the owner wakes the page after unlocking.
 *   chunks[]  set (never cleared) before the first non-zero word of a chunk of 512 pages is written.
 * Fault threads take no lock that a program thread can hold; program threads wait for a fault thread under mm_lock only at a LOCKED
 * word, and a fault thread always finishes a word it has locked.
 * A program thread may touch the arena under mm_lock (its own stack may lie there): the fault is served without the lock. */
#pragma GCC target("general-regs-only") /* libc expects a system call to leave the vector registers alone */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include "sys.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef __NR_mseal
#define __NR_mseal 462
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef SIGCHLD
#define SIGCHLD 17
#endif

#define PS ((uint64_t)SY_PAGE_SIZE)
#define VA(p) ((uintptr_t)SY_ARENA_START + ((uint64_t)(p) << SY_PAGE_SHIFT))
#define PAGE(a) (((uintptr_t)(a) - SY_ARENA_START) >> SY_PAGE_SHIFT)
#define UP(x) (((uint64_t)(x) + PS - 1) & ~(PS - 1))
#define IN_ARENA(a) ((uintptr_t)(a) - SY_ARENA_START < (uintptr_t)SY_ARENA_SIZE)
#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
#define ATTACH_AFTER_FORK (128 * 1024) /* a forked child that maps less than this before exec or exit never joins */

/* attr byte of a page */
#define A_MAPPED 0x01
#define A_PROT(a) (((a) >> 1) & 7)
#define A_OF(prot) ((uint8_t)(A_MAPPED | (((prot) & 7) << 1)))
#define A_FOREIGN 0x10    /* a file or shared mapping of the program's own, put here by MAP_FIXED */
#define A_WIPEONFORK 0x20
#define A_DONTFORK 0x40
#define A_KEPT 0x80       /* unmapped by the program, but kept with its frames for the next mmap of that size (alone in the byte) */
#define IS_PARKED(a) (((a) & A_KEPT) && (a) != A_KEPT) /* A_KEPT beside others: another mapping is being put here, see park() */
/* word flag of ours, beside those of the ABI: the kernel's mapping of this page is not plain read-write */
#define W_KPROT 0x80

enum mode { OFF, LAZY, MANAGED, FORKED, NATIVE };

typedef uint64_t word_t;

static int mode;
static int owner_pid;                 /* tells a vfork child, which shares all this with its parent */
static uint32_t mm_lock;              /* 0 free, 1 held, 2 held with waiters */
static uint8_t *attr;                 /* [SY_ARENA_PAGES], from attach to release */
static uint64_t brk_start, brk_cur;   /* addresses; brk_cur == 0: not begun */
static int brk_native;                /* libc had begun its heap before us: it stays the kernel's */
static uint64_t brk_floor, mmap_floor = SY_BRK_PAGES; /* pages below (in their region) are native: what a forked child inherited */
static uint64_t mmap_next = SY_BRK_PAGES, mmap_hi = SY_BRK_PAGES, brk_hi;
static struct { uint64_t p, n; } hole[32]; /* recently unmapped ranges, reused first */
static uint64_t forked_bytes;
#define KEEP_PAGES 256                /* largest piece kept, and ... */
#define KEEP_TOTAL 1024               /* ... pages kept in all */
static struct { uint64_t p, n; } kept[16]; /* newest last */
static unsigned kept_count;
static uint64_t kept_pages;

static struct sy_as_ctl *ctl;
static uint8_t *chunks;
static uint8_t *advice;                /* of a chunk: enum sy_advice; written under mm_lock */
static struct sy_channel *chan;
static word_t *pte;
static const volatile struct sy_mag *mag;
static const volatile struct sy_header *hdr;
static const struct sy_stored *slots; /* [hdr->slots] */
static struct sy_node node[SY_MAX_NODES];
static uint32_t nodes, asid;
static struct sy_bell *bell;
static int fd_sock, fd_uffd, fd_ram[SY_MAX_NODES]; /* valid in the service threads' own descriptor table only */
static uint32_t join_state;           /* futex: 0 under way, 1 joined, 2 failed */
static struct sy_as_ctl *parent_ctl;    /* of a forked child that is about to share its parent's frames; else 0 */
static uint32_t req_word;             /* futex: a program thread (holding mm_lock) wants the command thread to call req_fn */
static long (*req_fn)(void *);
static void *req_arg;
static long req_result;
static uint32_t service_threads;       /* of this process, running; 0 after a release */
static int leader_gone, left_last;     /* program threads that left by exit(2): was the first one among them, and the id of the newest */
static uint32_t busy[SY_SERVICE_THREADS], gateway_dead;
static uint32_t reader, reads[SY_SERVICE_THREADS];        /* futex: the fault thread that reads faults; which of them run. See hand_over */
static const volatile int32_t *main_cpu;                  /* the CPU that the first thread runs on (its rseq's cpu_id, which glibc registers); or null */
static int reader_cpu[SY_SERVICE_THREADS] = {-1, -1};     /* where it is pinned; -1: not, or it does not run. Written by itself */
static char sock_path[108], stub_path[256], preload_env[320], mark_env[192];
static uint32_t limit_frames;          /* what this program and all it starts may have; 0: no limit */
static uint64_t limit_group;
static int no_limits_left;
static char cmd_stack[16384] __attribute__((aligned(64))), fault_stack[SY_SERVICE_THREADS][16384] __attribute__((aligned(64)));
static char fork_stack[32768] __attribute__((aligned(64)));

/* ---------------------------------------------------------------- small things */
void *memset(void *d, int c, size_t n) {
  void *r = d;
  __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
  return r;
}
void *memcpy(void *d, const void *s, size_t n) {
  void *r = d;
  __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
  return r;
}
static size_t len(const char *s) {
  size_t n = 0;
  while (s[n]) n++;
  return n;
}
static int starts(const char *s, const char *prefix) {
  while (*prefix)
    if (*s++ != *prefix++) return 0;
  return 1;
}
static void append(char *d, size_t cap, const char *s) {
  size_t n = len(d);
  while (*s && n + 1 < cap) d[n++] = *s++;
  d[n] = 0;
}
static void say(const char *s) { SYS(__NR_write, 2, s, len(s), 0, 0); }
static void futex_wait(volatile void *w, uint32_t v, long ms, int shared) {
  struct timespec t = {ms / 1000, (ms % 1000) * 1000000};
  SYS(__NR_futex, w, FUTEX_WAIT | (shared ? 0 : FUTEX_PRIVATE_FLAG), v, ms < 0 ? 0 : &t, 0);
}
static void futex_wake(volatile void *w, int shared) { SYS(__NR_futex, w, FUTEX_WAKE | (shared ? 0 : FUTEX_PRIVATE_FLAG), 0x7fffffff, 0, 0); }
static void yield(void) { SYS(__NR_sched_yield, 0, 0, 0, 0, 0); }
static void nap(long us) {
  struct timespec t = {0, us * 1000};
  SYS(__NR_nanosleep, &t, 0, 0, 0, 0);
}
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
#define CAS(x, old, new) __atomic_compare_exchange_n(&(x), (old), (new), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)

static void lock(void) {
  uint32_t z = 0;
  if (CAS(mm_lock, &z, 1)) return;
  while (__atomic_exchange_n(&mm_lock, 2, __ATOMIC_ACQUIRE)) futex_wait(&mm_lock, 2, -1, 0);
}
static int trylock(void) {
  uint32_t z = 0;
  return CAS(mm_lock, &z, 1);
}
static void unlock(void) {
  if (__atomic_exchange_n(&mm_lock, 0, __ATOMIC_RELEASE) == 2) SYS(__NR_futex, &mm_lock, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, 0, 0);
}

/* ---------------------------------------------------------------- channel (many producers; see struct sy_channel) */
static void ring_bell(void) {
  __atomic_fetch_add(&bell->rung, 1, __ATOMIC_SEQ_CST);
  futex_wake(&bell->rung, 1);
}
/* urgent: the gateway should look now; otherwise only when a good part of the ring is full (it looks by itself every 50 ms). */
static void post(int type, uint64_t vpage, uint32_t pfn, uint64_t npages, int order, uint64_t arg, int urgent) {
  if (mode != MANAGED) return;
  uint64_t at;
  for (uint64_t h = __atomic_load_n(&chan->head, __ATOMIC_RELAXED);;) {
    struct sy_slot *s = &chan->slots[h % SY_CHANNEL_SLOTS];
    uint64_t turn = LOAD(s->turn);
    if (turn == h) {
      if (!CAS(chan->head, &h, h + 1)) continue;
      s->msg = (struct sy_msg){.type = (uint16_t)type, .length = sizeof(struct sy_msg), .seqnum = __atomic_fetch_add(&chan->seqnum, 1, __ATOMIC_RELAXED), .asid = asid,
                               .pfn = pfn, .vpage = vpage, .npages = (uint32_t)npages, .order = (uint16_t)order, .arg = arg};
      STORE(s->turn, h + 1);
      at = h;
      break;
    }
    if ((int64_t)(turn - h) < 0) { /* full: the gateway will resynchronise from the page table */
      __atomic_fetch_add(&chan->overflow, 1, __ATOMIC_RELEASE);
      return;
    }
    h = __atomic_load_n(&chan->head, __ATOMIC_RELAXED);
  }
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if ((urgent || (at & 511) == 0) && hdr->gateway_asleep) ring_bell();
}

/* ---------------------------------------------------------------- userfaultfd */
static long uffd_register(uint64_t p, uint64_t n, uint64_t modes) {
  struct uffdio_register r = {.range = {VA(p), n * PS}, .mode = modes};
  return SYS(__NR_ioctl, fd_uffd, UFFDIO_REGISTER, &r, 0, 0);
}
static void wake(uint64_t p, uint64_t n) {
  struct uffdio_range w = {VA(p), n * PS};
  SYS(__NR_ioctl, fd_uffd, UFFDIO_WAKE, &w, 0, 0);
}
/* Without WP: on a mapping registered for it, the kernel makes pages read-only at every mprotect, and each then faults once at the
 * next write. Fork, which needs it, registers anew. */
#define UFFD_FRAME (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR)

/* The stub's descriptors exist only in the service threads' own table, so that the program can neither see nor close them. What
 * needs one (userfaultfd, RAM file) is therefore done by the command thread. Caller holds mm_lock, so one request at a time. */
static int in_command_thread(void) {
  char here;
  return &here >= cmd_stack && &here < cmd_stack + sizeof cmd_stack;
}
static long by_command_thread(long (*fn)(void *), void *arg) {
  if (in_command_thread()) return fn(arg);
  req_fn = fn, req_arg = arg;
  STORE(req_word, 1);
  futex_wake(&req_word, 0);
  while (LOAD(req_word) == 1) futex_wait(&req_word, 1, 1000, 0);
  return req_result;
}
static int serve_request(void) {
  if (LOAD(req_word) != 1) return 0;
  req_result = req_fn(req_arg);
  STORE(req_word, 0);
  futex_wake(&req_word, 0);
  return 1;
}

/* Command thread: a holder of mm_lock may be waiting for us; or, where it touches the arena, for a frame that is free only when pages of ours leave. */
#define HELD_LONG 400 /* looks: some 10 ms */
static void evict_unlocked(void);
static void lock_and_serve(void) {
  for (uint32_t looks = 1; !trylock(); looks++) {
    if (serve_request()) continue;
    nap(20);
    if (looks % HELD_LONG == 0) evict_unlocked();
  }
}

#include "stub_commit.h"
#include "stub_space.h"
#include "stub_futex.h"
#include "stub_fault.h"
#include "stub_fork.h"
#include "stub_entry.h"
