/* stub, part 3: fault threads, the command thread, and joining the enclave. */

/* ---------------------------------------------------------------- magazine */
/* Takes a block of the given order. The block is noted in in_hand before it leaves the ring, so that the gateway never takes it for
 * lost. SY_NO_FRAME = ring empty. */
static uint32_t mag_pop(int me, int order) {
  const volatile struct sy_mag_ring *r = &mag->ring[order];
  for (;;) {
    uint32_t h = LOAD(ctl->mag_head[order]), t = __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE);
    uint32_t level = t - h;
    if (level <= r->low || level == 0) {
      uint32_t bit = 1u << order;
      if (!(__atomic_fetch_or(&ctl->mag_low_sent, bit, __ATOMIC_SEQ_CST) & bit)) post(SY_MSG_MAGAZINE_LOW, 0, 0, level, order, h, 1);
    }
    if (level == 0 || level > SY_MAG_SLOTS) return SY_NO_FRAME;
    uint32_t pfn = r->slot[h % SY_MAG_SLOTS];
    STORE(ctl->in_hand_order[me], (uint32_t)order);
    STORE(ctl->in_hand[me], pfn);
    if (CAS(ctl->mag_head[order], &h, h + 1)) return pfn;
    STORE(ctl->in_hand[me], SY_NO_FRAME);
  }
}
/* Who reads faults. Every blocked reader wakes at every fault, on another CPU by an interrupt, which on a virtual machine costs more than all
 * the rest of a wake-up; and a mapping that two CPUs have used is changed on both. So only one reads, on the CPU where the program faults.
 * It hands that over when it will be busy for long, or has more than one fault to serve. */
#define SOON 1 /* ms: the gateway answers within that, as a rule */
static struct uffd_msg read_fault[SY_SERVICE_THREADS][4]; /* what a fault thread has read and ... */
static int unserved[SY_SERVICE_THREADS][2];                /* ... from which to which it has not served yet */
static void hand_over(int me) {
  if (LOAD(reader) != (uint32_t)me || !LOAD(reads[!me])) return;
  __atomic_store_n(&reader, !me, __ATOMIC_SEQ_CST);
  if (!__atomic_load_n(&reads[!me], __ATOMIC_SEQ_CST)) STORE(reader, me); /* it is just ending: one of us two sees that of the other */
  futex_wake(&reader, 0);
}
/* … for long: also the faults that it has read, and not begun to serve. They come again, to the other one. */
static void leave_reading(int me) {
  for (int *u = unserved[me]; u[0] < u[1]; u[0]++) wake(PAGE(read_fault[me][u[0]].arg.pagefault.address), 1);
  hand_over(me);
}
/* The CPU that a thread of ours last ran on; -1: not known. */
static int cpu_of(uint32_t tid) {
  char path[40] = "/proc/self/task/", digits[12], stat[512];
  int n = 0, spaces = 0, cpu = 0;
  do digits[n++] = (char)('0' + tid % 10);
  while (tid /= 10);
  for (char d[2] = {0}; n; append(path, sizeof path, d)) d[0] = digits[--n];
  append(path, sizeof path, "/stat");
  long fd = SYS(__NR_open, path, O_RDONLY | O_CLOEXEC, 0, 0, 0), got = fd < 0 ? -1 : SYS(__NR_read, fd, stat, sizeof stat - 1, 0, 0);
  if (fd >= 0) SYS(__NR_close, fd, 0, 0, 0, 0);
  if (got <= 0) return -1;
  stat[got] = 0;
  char *at = stat + got;
  while (at > stat && *at != ')') at--; /* (the name before it may hold anything) */
  for (; *at && spaces < 37; at++) spaces += *at == ' ';
  if (!*at) return -1;
  for (; *at >= '0' && *at <= '9'; at++) cpu = cpu * 10 + *at - '0';
  return cpu < 1024 ? cpu : -1;
}
static void run_on(int me, int cpu) {
  uint64_t set[16] = {0};
  set[cpu / 64] = 1ull << cpu % 64;
  if (SYS(__NR_sched_setaffinity, 0, sizeof set, set, 0, 0) == 0) STORE(reader_cpu[me], cpu);
}
/* By the first thread itself (the one that a fork returns in is its child's first). */
extern const ptrdiff_t __rseq_offset __attribute__((weak, visibility("default")));
extern const unsigned int __rseq_size __attribute__((weak, visibility("default")));
static void find_main_cpu(int other_tls) {
  uintptr_t thread;
  __asm__("mov %%fs:0,%0" : "=r"(thread));
  main_cpu = !other_tls && &__rseq_size && __rseq_size ? (void *)(thread + (uintptr_t)__rseq_offset + 4) : 0;
}
/* 1 + the CPU of the thread whose fault it is, as far as the kernel knows it by now; 0: not known. */
static uint32_t toucher[SY_SERVICE_THREADS];
static uint64_t cpu_of_toucher(int me) {
  int cpu = main_cpu && toucher[me] == (uint32_t)owner_pid ? *main_cpu : cpu_of(toucher[me]);
  return cpu < 0 ? 0 : (uint64_t)cpu + 1;
}
/* Where the program faults is the reader to be: the fault thread of that CPU, or else this one goes there. A CPU that is not known without
 * asking the kernel is asked for now and then only; and nobody moves for one fault. */
#define NOW_AND_THEN 16
static void follow(int me, uint32_t tid, uint32_t served) {
  static int elsewhere[SY_SERVICE_THREADS];
  int known = main_cpu && tid == (uint32_t)owner_pid && *main_cpu >= 0;
  if (!known && served % NOW_AND_THEN) return;
  int cpu = known ? *main_cpu : cpu_of(tid);
  if (cpu < 0 || cpu == LOAD(reader_cpu[me])) {
    elsewhere[me] = 0;
    return;
  }
  if (known && ++elsewhere[me] < 2) return;
  elsewhere[me] = 0;
  if (cpu == LOAD(reader_cpu[!me])) hand_over(me);
  else run_on(me, cpu);
}

/* Asks the gateway for blocks and waits for its answer. 0: there are some now; -1: no frames, or no gateway: go native; INTERRUPTED: leave the fault,
 * which comes again: who waits for its words, or for the end of it (a fork, a release), does so under the lock that eviction needs, and what waits
 * for us both may need no frame. */
#define INTERRUPTED 1
static int interrupted[SY_SERVICE_THREADS];
static int refill(int me, int order, uint64_t p) {
  uint32_t seq = LOAD(mag->refill_seq);
  struct sy_request q = {.kind = SY_REQ_REFILL, .order = (uint32_t)order, .vpage = p};
  __atomic_fetch_add(&ctl->mag_empty, 1, __ATOMIC_RELAXED);
  post(SY_MSG_PAGE_FAULT, p, 0, 1, order, 0, 0);
  if (LOAD(gateway_dead)) return -1;
  for (;;) {
    long r = SYS(__NR_sendto, fd_sock, &q, sizeof q, MSG_NOSIGNAL | MSG_DONTWAIT, 0);
    if (r == sizeof q) break;
    if (r != -EAGAIN && r != -EINTR) {
      STORE(gateway_dead, 1);
      return -1;
    }
    nap(200);
  }
  futex_wait((void *)&mag->refill_seq, seq, SOON, 1);
  for (int waits = 0; LOAD(mag->refill_seq) == seq; waits++) {
    if (waits || __atomic_load_n(&ctl->fork_active, __ATOMIC_SEQ_CST)) return interrupted[me] = INTERRUPTED;
    leave_reading(me);
    futex_wait((void *)&mag->refill_seq, seq, 10, 1);
    char b;
    if (LOAD(mag->refill_seq) == seq && SYS(__NR_recvfrom, fd_sock, &b, 1, MSG_DONTWAIT | MSG_PEEK, 0) == 0) { /* hung up */
      STORE(gateway_dead, 1);
      return -1;
    }
  }
  return mag->no_frames ? -1 : 0;
}

/* ---------------------------------------------------------------- one fault */
/* The aligned block of 2^order pages around p that is mapped alike and has nothing in it. */
static int block_empty(uint64_t p, int order) {
  uint64_t n = 1ull << order, b = p & ~(n - 1);
  uint8_t a = attr[p];
  if (is_native(b) || is_native(b + n - 1) || b + n > SY_ARENA_PAGES) return 0;
  for (uint64_t i = b; i < b + n; i++)
    if (attr[i] != a) return 0;
  if (!LOAD(chunks[b / SY_CHUNK_PAGES])) return 1;
  for (uint64_t i = b; i < b + n; i++)
    if (!empty(LOAD(pte[i]))) return 0;
  return 1;
}
static int present(uint64_t p) { return LOAD(chunks[p / SY_CHUNK_PAGES]) && (LOAD(pte[p]) & SY_PTE_STATE_MASK) == SY_PTE_PRESENT; }
/* Order for a first touch at p: the policy's order where it fits; and further, up to its maximum, for one who walks upwards (the
 * pages before the block are there), as read-ahead grows. */
static int choose_order(uint64_t p) {
  int here = mag->chunk_order[p / SY_CHUNK_PAGES], want = here ? here - 1 : (int)mag->fault_order, max = here ? want : (int)mag->fault_order_max;
  int most = advice[p / SY_CHUNK_PAGES] & SY_ADVICE_SMALL ? SY_HUGE_ORDER - 1 : SY_HUGE_ORDER;
  if (want > most) want = most;
  if (max > most) max = most;
  int order = want;
  while (order > 0 && !block_empty(p, order)) order--;
  if (order != want) return order;
  while (order < max) {
    uint64_t n = 2ull << order, b = p & ~(n - 1);
    if (b < n || !present(b - 1) || !present(b - n) || !block_empty(p, order + 1)) break;
    order++;
  }
  return order;
}
static void lock_back(uint64_t p, uint64_t n) {
  for (uint64_t i = p; i < p + n; i++) __atomic_fetch_and(&pte[i], ~(word_t)(SY_PTE_STATE_MASK | SY_PTE_CONTENDED), __ATOMIC_SEQ_CST);
}
/* PRESENT with that frame -> LOCKED. */
static int lock_present(uint64_t p, uint64_t pfn) {
  word_t x = LOAD(pte[p]);
  return (x & SY_PTE_STATE_MASK) == SY_PTE_PRESENT && x >> SY_PTE_PFN_SHIFT == pfn &&
         CAS(pte[p], &x, locked(x));
}
static int may(uint8_t a, int write) { return (a & (A_MAPPED | A_FOREIGN | A_KEPT)) == A_MAPPED && (A_PROT(a) & (write ? PROT_WRITE : PROT_READ | PROT_WRITE | PROT_EXEC)); }

static void first_touch(int me, uint64_t p, int write) {
  STORE(chunks[p / SY_CHUNK_PAGES], 1);
  int order = may(attr[p], write) ? choose_order(p) : 0;
  uint64_t n = 1ull << order, b = p & ~(n - 1), got = 0;
  for (; got < n; got++) {
    word_t w = LOAD(pte[b + got]);
    if ((w & SY_PTE_STATE_MASK) != SY_PTE_NONE || (order && (w & W_KPROT)) || !CAS(pte[b + got], &w, (w & (SY_PTE_STALE | W_KPROT | SY_PTE_MLOCKED)) | SY_PTE_LOCKED)) break;
  }
  if (got < n) { /* somebody else is at work in this block: look at the fault again */
    lock_back(b, got);
    wake(b, n); /* all of it: who met LOCKED anywhere in it waits */
    return;
  }
  uint8_t a = attr[p]; /* read again under the word's lock */
  int prot = kprot(a), native = 0;
  if (IS_PARKED(a) || (a & A_FOREIGN)) { /* it will have another mapping, or has: then the kernel knows */
    lock_back(b, n);
    if (IS_PARKED(a)) nap(20);
    wake(b, n);
    return;
  }
  if (!may(a, write)) { /* not the program's to touch: let the kernel say so (SIGSEGV, or EFAULT inside a call) */
    SYS(__NR_mprotect, VA(p), PS, prot, 0, 0);
    __atomic_fetch_or(&pte[p], W_KPROT, __ATOMIC_SEQ_CST); /* while it is locked: a mapping made after that must see it */
    lock_back(b, n);
    wake(b, n);
    return;
  }
  if (order)
    for (uint64_t i = b; i < b + n; i++)
      if (attr[i] != a) {
        lock_back(b, n);
        wake(b, n);
        return;
      }
  uint32_t pfn = SY_NO_FRAME;
  int o;
  for (int tries = 0;; tries++) {
    for (o = order; o >= 0; o--)
      if ((pfn = mag_pop(me, o)) != SY_NO_FRAME) break;
    if (o >= 0) break;
    int r = refill(me, order, p);
    if (r == INTERRUPTED) return lock_back(b, n);
    if (r) {
      /* Nothing from the gateway: a bigger block than wanted serves too, the rest goes back. */
      for (o = order + 1; o <= SY_HUGE_ORDER; o++)
        if ((pfn = mag_pop(me, o)) != SY_NO_FRAME) break;
      if (o > SY_HUGE_ORDER) native = 1;
      break;
    }
  }
  uint64_t use = n, first = b;
  if (!native && o < order) { /* a smaller block: the part of ours around p */
    use = 1ull << o, first = p & ~(use - 1);
    lock_back(b, first - b);
    lock_back(first + use, b + n - first - use);
    if (n > use) wake(b, n); /* CONTENDED in the parts given back */
  }
  if (!native && o > order) post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn + (uint32_t)use, (1ull << o) - use, 0, 0, 1);
  if (!native) {
    for (uint64_t i = 0; i < use; i++) {
      word_t keep = LOAD(pte[first + i]) & (SY_PTE_STALE | SY_PTE_CONTENDED | W_KPROT | SY_PTE_MLOCKED);
      STORE(pte[first + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_LOCKED | SY_PTE_HASFRAME | keep);
    }
    STORE(ctl->in_hand[me], SY_NO_FRAME);
    if (map_frames(first, pfn, use, prot) < 0) { /* too many mappings, or no memory for page tables: the frames go back, the page goes native */
      for (uint64_t i = 0; i < use; i++) STORE(pte[first + i], SY_PTE_LOCKED | (LOAD(pte[first + i]) & (SY_PTE_STALE | SY_PTE_MLOCKED)));
      post(SY_MSG_PAGE_FREED, SY_ARENA_PAGES, pfn, use, 0, 0, 1);
      native = 1;
    } else {
      post(SY_MSG_PAGE_MAPPED, first, pfn, use, o < order ? o : order, 0, 0);
      for (uint64_t i = 0; i < use; i++) STORE(pte[first + i], ((word_t)(pfn + i) << SY_PTE_PFN_SHIFT) | SY_PTE_PRESENT | (prot != RW ? W_KPROT : 0) | (LOAD(pte[first + i]) & SY_PTE_MLOCKED));
      __atomic_fetch_add(&ctl->pages_mapped, use, __ATOMIC_RELAXED);
    }
  }
  if (native) {
    long r = sys_mmap(VA(first), use * PS, prot, ANON | MAP_FIXED, -1, 0);
    if (r < 0 && r > -4096) { /* not even a mapping: as long as the old one is anonymous, a zero page in it will do */
      struct uffdio_zeropage z = {.range = {VA(p), PS}};
      long e = SYS(__NR_ioctl, fd_uffd, UFFDIO_ZEROPAGE, &z, 0, 0);
      lock_back(first, p - first);
      lock_back(p + 1, first + use - p - 1);
      if (e == 0) {
        STORE(pte[p], SY_PTE_NATIVE | (LOAD(pte[p]) & SY_PTE_MLOCKED)); /* at once: for a word that is free another thread might map a frame over it */
        __atomic_fetch_add(&ctl->pages_native, 1, __ATOMIC_RELAXED);
      } else {
        lock_back(p, 1);
        leave_reading(me), nap(1000); /* try again: something may have been unmapped meanwhile */
      }
    } else {
      for (uint64_t i = 0; i < use; i++) STORE(pte[first + i], SY_PTE_NATIVE | (prot != RW ? W_KPROT : 0) | (LOAD(pte[first + i]) & SY_PTE_MLOCKED));
      __atomic_fetch_add(&ctl->pages_native, use, __ATOMIC_RELAXED);
    }
  }
  wake(first, use);
}

#include "stub_lz4.h"
#include "stub_swap.h"
#include "stub_move.h"
#include "stub_share.h"

static void fault(int me, uint64_t addr, uint64_t flags) {
  uint64_t p = PAGE(addr);
  if (p >= SY_ARENA_PAGES) return;
  __atomic_fetch_add(&ctl->faults, 1, __ATOMIC_RELAXED);
  for (;;) {
    word_t w = LOAD(chunks[p / SY_CHUNK_PAGES]) ? LOAD(pte[p]) : 0;
    switch (w & SY_PTE_STATE_MASK) {
    case SY_PTE_NONE: first_touch(me, p, (flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0); return;
    case SY_PTE_SWAPPED: swap_in(me, p, (flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0); return;
    case SY_PTE_LOCKED:
      if (CAS(pte[p], &w, w | SY_PTE_CONTENDED)) return;
      continue;
    case SY_PTE_PRESENT:
      if (flags & UFFD_PAGEFAULT_FLAG_WP) {
        struct uffdio_writeprotect u = {.range = {VA(p), PS}, .mode = 0};
        SYS(__NR_ioctl, fd_uffd, UFFDIO_WRITEPROTECT, &u, 0, 0);
      } else if (flags & UFFD_PAGEFAULT_FLAG_MINOR) {
        /* The mapping lost its entries (a huge one that was protected in part, say): give back the whole run around p. Under the words'
         * locks: a page that is evicted meanwhile would get the entry of a frame that is no longer ours. */
        uint64_t b = p & ~(uint64_t)(SY_CHUNK_PAGES - 1), lo = p, hi = p + 1;
        word_t base = w >> SY_PTE_PFN_SHIFT;
        if (!lock_present(p, base)) continue;
        while (lo > b && lock_present(lo - 1, base - (p - lo + 1))) lo--;
        while (hi < b + SY_CHUNK_PAGES && lock_present(hi, base + (hi - p))) hi++;
        struct uffdio_continue c = {.range = {VA(lo), (hi - lo) * PS}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
        if (SYS(__NR_ioctl, fd_uffd, UFFDIO_CONTINUE, &c, 0, 0) < 0) { /* part of it was there already: just this page */
          c = (struct uffdio_continue){.range = {VA(p), PS}};
          SYS(__NR_ioctl, fd_uffd, UFFDIO_CONTINUE, &c, 0, 0);
        }
        for (uint64_t i = lo; i < hi; i++) { /* (the wake below is for CONTENDED too) */
          word_t x = LOAD(pte[i]);
          while (!CAS(pte[i], &x, (x & ~(word_t)(SY_PTE_STATE_MASK | SY_PTE_CONTENDED | SY_PTE_HASFRAME)) | SY_PTE_PRESENT)) {
          }
        }
      }
      wake(p & ~(uint64_t)(SY_CHUNK_PAGES - 1), SY_CHUNK_PAGES);
      return;
    case SY_PTE_SHARED_RO:
      if ((w & SY_PTE_FORKED) && !(flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP))) map_shared_again(me, p);
      else copy_on_write(me, p);
      return;
    case SY_PTE_NATIVE: { /* one without a mapping of its own (see first_touch), and dropped since */
      struct uffdio_zeropage z = {.range = {VA(p), PS}};
      if (SYS(__NR_ioctl, fd_uffd, UFFDIO_ZEROPAGE, &z, 0, 0) < 0) wake(p, 1);
      return;
    }
    default: wake(p, 1); return;
    }
  }
}

static uintptr_t bait; /* see end_threads */

/* After a release: faults of before look again, and the one of the command thread's bait ends us. */
static void released_fault(int me, uint64_t at) {
  struct uffdio_zeropage z = {.range = {at, PS}};
  if (at - bait < SY_SERVICE_THREADS * PS && SYS(__NR_ioctl, fd_uffd, UFFDIO_ZEROPAGE, &z, 0, 0) == 0) __atomic_store_n(&reads[me], 0, __ATOMIC_SEQ_CST), hand_over(me), SYS(__NR_exit, 0, 0, 0, 0, 0);
  wake(PAGE(at), 1);
}

static void fault_thread(long me) {
  uint64_t may_run[16] = {0};
  STORE(reader_cpu[me], -1);
  int may = SYS(__NR_sched_getaffinity, 0, sizeof may_run, may_run, 0, 0) > 0, cpus = 0;
  for (int i = 0; may && i < 16; i++)
    for (uint64_t w = may_run[i]; w; w &= w - 1) cpus++;
  /* one only may be where sched has the thread that began us; without our mark the answer is as the program has it */
  if (cpus == 1) may = sys6(__NR_sched_getaffinity, 0, sizeof may_run, (long)may_run, 0, 0, 0) > 0;
  if (may)
    for (int i = 0, seen = 0; i < 1024; i++)
      if ((may_run[i / 64] >> i % 64 & 1) && seen++ == me) run_on((int)me, i);
  uint32_t served = 0;
  STORE(reads[me], 1);
  struct uffd_msg *m = read_fault[me];
  int *u = unserved[me];
  for (;;) {
    while (LOAD(reader) != me) futex_wait(&reader, !me, -1, 0);
    long r = SYS(__NR_read, fd_uffd, m, sizeof read_fault[me], 0, 0);
    if (r == -EINTR || r == -EAGAIN) continue;
    if (r <= 0) __atomic_store_n(&reads[me], 0, __ATOMIC_SEQ_CST), hand_over((int)me), SYS(__NR_exit, 0, 0, 0, 0, 0);
    if (r > (long)sizeof *m) hand_over((int)me);
    else if (m->event == UFFD_EVENT_PAGEFAULT) follow((int)me, m->arg.pagefault.feat.ptid, ++served);
    for (u[0] = 0, u[1] = (int)(r / (long)sizeof *m); u[0] < u[1];) {
      struct uffd_msg f = m[u[0]++];
      if (f.event != UFFD_EVENT_PAGEFAULT) continue;
      toucher[me] = f.arg.pagefault.feat.ptid;
      __atomic_fetch_or(&busy[me], 1, __ATOMIC_SEQ_CST);
      /* During a fork every fault is left waiting; the forking thread wakes the whole arena afterwards. */
      if (!__atomic_load_n(&ctl->fork_active, __ATOMIC_SEQ_CST)) {
        if (LOAD(mode) == NATIVE) released_fault((int)me, f.arg.pagefault.address & ~(PS - 1)); /* (a release sets it before it ends fork_active) */
        else fault((int)me, f.arg.pagefault.address, f.arg.pagefault.flags);
      }
      __atomic_fetch_and(&busy[me], ~1u, __ATOMIC_SEQ_CST);
      if (!interrupted[me]) continue;
      interrupted[me] = 0;
      nap(500); /* longer than those who wait for a word sleep */
      wake(PAGE(f.arg.pagefault.address) & ~(uint64_t)(SY_CHUNK_PAGES - 1), SY_CHUNK_PAGES); /* (no block is larger) */
    }
  }
}

/* ---------------------------------------------------------------- command thread */
static long emulate(long nr, long *a);
static long release_all(void);

struct tables { const struct sy_stored *slots; uint64_t nslots; struct sy_as_ctl *ctl; const volatile struct sy_mag *mag; const volatile struct sy_header *hdr; struct sy_bell *bell; };
static struct tables tables(void) { return (struct tables){slots, hdr->slots, ctl, mag, hdr, bell}; }
static void unmap_tables(struct tables t) {
  SYS(__NR_munmap, t.slots, t.nslots * sizeof *t.slots + 1, 0, 0, 0);
  SYS(__NR_munmap, t.ctl, SY_AS_BYTES, 0, 0, 0);
  SYS(__NR_munmap, t.mag, SY_MAG_BYTES, 0, 0, 0);
  SYS(__NR_munmap, t.hdr, SY_HEADER_BYTES, 0, 0, 0);
  SYS(__NR_munmap, t.bell, SY_BELL_BYTES, 0, 0, 0);
}
/* The arena is the kernel's again, and nobody reads its faults any more: one fault each ends the threads that do, then this one. */
static void end_threads(void) {
  struct sy_request q = {.kind = SY_REQ_RELEASED};
  uint32_t threads = service_threads;
  for (;; nap(1000)) { /* until there is memory for two pages */
    long at = sys_mmap(0, SY_SERVICE_THREADS * PS, RW, ANON, -1, 0);
    struct uffdio_register r = {.range = {bait = (uintptr_t)at, SY_SERVICE_THREADS * PS}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (at < 0 && at > -4096) continue;
    if (SYS(__NR_ioctl, fd_uffd, UFFDIO_REGISTER, &r, 0, 0) == 0) break;
    SYS(__NR_munmap, at, SY_SERVICE_THREADS * PS, 0, 0, 0);
  }
  service_threads = 0; /* see exit_thread */
  for (uint32_t i = 1; i < threads; i++) *(volatile char *)(bait + (i - 1) * PS);
  SYS(__NR_munmap, bait, SY_SERVICE_THREADS * PS, 0, 0, 0);
  unmap_tables(tables());
  SYS(__NR_sendto, fd_sock, &q, sizeof q, MSG_NOSIGNAL, 0);
  SYS(__NR_exit, 0, 0, 0, 0, 0);
}

/* Must memory be the kernel's own for this call? 0 where its arguments, behind a pointer, say otherwise. */
static int needs_release(long nr, const long *a) {
  uint64_t arg[2] = {0};
  const long *at = nr == __NR_openat2 || nr == __NR_prlimit64 ? a + 2 : nr == __NR_setrlimit ? a + 1 : 0;
  struct iovec here = {arg, sizeof arg}, there = {at ? (void *)*at : 0, sizeof arg};
  if (!at || (nr == __NR_prlimit64 && a[0])) return 1; /* 0 is who calls, says the gateway; of another the limit is not in our memory */
  lock_and_serve();
  long r = all_there((uintptr_t)*at, sizeof arg, 0);
  /* Not a plain read: the address may be wrong. */
  int read = !r && sys6(__NR_process_vm_readv, SYS(__NR_getpid, 0, 0, 0, 0, 0), (long)&here, 1, (long)&there, 1, 0) == sizeof arg;
  unlock();
  if (!read) return r != 0; /* (in doubt) */
  if (nr == __NR_openat2) return (arg[0] & SY_O_DIRECT) != 0;
  return arg[0] < 4 * SY_ARENA_SIZE; /* a limit that the arena may break */
}

static uint32_t cmd_seen; /* the command that is being run, or comes next */
static int is_done(uint64_t id) { return LOAD(ctl->done[id % SY_CMD_SLOTS].id) == id; }
static void command_done(uint64_t id, long r) {
  struct sy_cmd_done *d = &ctl->done[id % SY_CMD_SLOTS];
  d->result = r;
  STORE(d->id, id);
  struct sy_request q = {.kind = SY_REQ_CMD_DONE};
  SYS(__NR_sendto, fd_sock, &q, sizeof q, MSG_NOSIGNAL, 0);
}
/* The next EVICT before its turn, and without mm_lock. A fork, which needs the pages to stay where they are, waits for us as for a fault. */
#define EVICTING 2u
static void evict_unlocked(void) {
  for (uint32_t i = cmd_seen; i != LOAD(mag->cmd_tail); i++) {
    const volatile struct sy_cmd *c = &mag->cmd[i % SY_CMD_SLOTS];
    if (c->op != SY_CMD_EVICT || is_done(c->id)) continue;
    long r = -1;
    __atomic_fetch_or(&busy[0], EVICTING, __ATOMIC_SEQ_CST);
    if (LOAD(mode) == MANAGED && !__atomic_load_n(&ctl->fork_active, __ATOMIC_SEQ_CST)) r = evict_for_store((uint32_t)c->args[0], (uint32_t)c->args[1], 0);
    __atomic_fetch_and(&busy[0], ~EVICTING, __ATOMIC_SEQ_CST);
    if (r < 0) return;
    look_at_threads(0);
    return command_done(c->id, r);
  }
}
static void run_command(const struct sy_cmd *c) {
  long a[6], r = -ENOSYS;
  for (int i = 0; i < 6; i++) a[i] = (long)c->args[i];
  if (c->op == SY_CMD_SYSCALL) {
    lock_and_serve();
    r = emulate(c->nr, a);
    to_fill(); /* not by us: we are who makes room. MADV_POPULATE the kernel itself does now, in the caller; the others are filled when touched */
    unlock();
  } else if (c->op == SY_CMD_EVICT) {
    lock_and_serve();
    r = mode == MANAGED && !is_done(c->id) ? evict_for_store((uint32_t)a[0], (uint32_t)a[1], 1) : 0;
    unlock();
    if (r || is_done(c->id)) look_at_threads(1); /* and only then it is done: until then the words name the frames */
  } else if (c->op == SY_CMD_PREFETCH) {
    lock_and_serve();
    r = mode == MANAGED ? prefetch((uint64_t)a[0], (uint64_t)a[1]) : 0;
    unlock();
  } else if (c->op == SY_CMD_MOVE) {
    lock_and_serve();
    r = mode == MANAGED ? move_pages((uint64_t)a[0], (uint64_t)a[1], (uint32_t)a[2], (uint32_t)a[3], (uint64_t)a[4]) : -EAGAIN;
    unlock();
  } else if (c->op == SY_CMD_REMAP) {
    lock_and_serve();
    r = mode == MANAGED ? remap_block((uint64_t)a[0], (uint64_t)a[1], (uint32_t)a[2], (int)a[4]) : -EAGAIN;
    unlock();
  } else if (c->op == SY_CMD_SHARE) {
    lock_and_serve();
    r = mode == MANAGED ? share_pages((uint64_t)a[0], (uint64_t)a[1], (uint32_t)a[2], (uint32_t)a[3]) : -EAGAIN;
    unlock();
  } else if (c->op == SY_CMD_OWN) {
    lock_and_serve();
    r = mode == MANAGED ? own_pages((uint64_t)a[0], (uint64_t)a[1], (uint32_t)a[2], (uint64_t)a[3]) : 0;
    unlock();
  } else if (c->op == SY_CMD_RELEASE) {
    r = 1;
    if (needs_release(c->nr, a)) {
      lock_and_serve();
      r = release_all();
      unlock();
      if (!r) end_threads();
    }
  } else if (c->op == SY_CMD_PING)
    r = 0;
  if (!is_done(c->id)) command_done(c->id, r);
}

static int start_thread(void (*fn)(long), long arg, char *stack_top, uint64_t flags);

static int recv_welcome(struct sy_welcome *w, int *fds, int max) {
  union { char b[CMSG_SPACE(sizeof(int) * 16)]; struct cmsghdr h; } c;
  struct iovec v = {w, sizeof *w};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c.b, .msg_controllen = sizeof c.b};
  long r;
  while ((r = SYS(__NR_recvmsg, fd_sock, &m, MSG_CMSG_CLOEXEC, 0, 0)) == -EINTR) {
  }
  no_limits_left = r == sizeof *w && w->magic == SY_MAGIC && w->status == SY_W_LIMITS;
  if (r != sizeof *w || w->magic != SY_MAGIC || w->abi != SY_ABI_VERSION || w->status != SY_W_OK) return -1;
  int n = 0;
  if (m.msg_controllen >= sizeof(struct cmsghdr) && c.h.cmsg_type == SCM_RIGHTS) {
    n = (int)((c.h.cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < n && i < max; i++) fds[i] = ((int *)(void *)CMSG_DATA(&c.h))[i];
  }
  return n;
}
static long send_hello(int kind, int fd) {
  union { char b[CMSG_SPACE(sizeof(int))]; struct cmsghdr h; } c;
  struct sy_hello hello = {SY_MAGIC, SY_ABI_VERSION, (uint32_t)kind, kind == SY_HELLO_STUB ? limit_frames : kind == SY_HELLO_FORK ? asid : 0, limit_group};
  struct iovec v = {&hello, sizeof hello};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
  if (fd >= 0) {
    m.msg_control = c.b, m.msg_controllen = sizeof c.b;
    c.h = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    *(int *)(void *)CMSG_DATA(&c.h) = fd;
  }
  return SYS(__NR_sendmsg, fd_sock, &m, MSG_NOSIGNAL, 0, 0) == sizeof hello ? 0 : -1;
}

static long inherit(void);
static void drop_unwanted(void);
static int join_enclave(void) {
  struct sy_welcome w;
  int f[5 + SY_MAX_NODES];
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  memcpy(a.sun_path, sock_path, len(sock_path) + 1);
  fd_sock = (int)SYS(__NR_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, 0, 0);
  if (fd_sock < 0 || SYS(__NR_connect, fd_sock, &a, sizeof a, 0, 0) < 0) return -1;
  fd_uffd = (int)SYS(__NR_userfaultfd, O_CLOEXEC, 0, 0, 0, 0);
  if (fd_uffd < 0) { /* an ordinary user: faults inside system calls need the device, which the gateway may open */
    int dev = -1;
    if (send_hello(SY_HELLO_NEED_UFFD, -1) || recv_welcome(&w, &dev, 1) != 1) return -1;
    fd_uffd = (int)SYS(__NR_ioctl, dev, USERFAULTFD_IOC_NEW, O_CLOEXEC, 0, 0);
    if (fd_uffd < 0) return -1;
  }
  int n;
  if (send_hello(parent_ctl ? SY_HELLO_FORK : SY_HELLO_STUB, fd_uffd) || (n = recv_welcome(&w, f, 5 + SY_MAX_NODES)) < 6 || w.nodes > SY_MAX_NODES || n != 5 + (int)w.nodes) return -1;
  asid = w.asid, nodes = w.nodes;
  for (uint32_t i = 0; i < nodes; i++) node[i] = w.node[i], fd_ram[i] = f[5 + i];
  long as = sys_mmap(0, SY_AS_BYTES, RW, MAP_SHARED | MAP_NORESERVE, f[0], 0), mg = sys_mmap(0, SY_MAG_BYTES, PROT_READ, MAP_SHARED, f[1], 0);
  long hd = sys_mmap(0, SY_HEADER_BYTES, PROT_READ, MAP_SHARED, f[2], 0), bl = sys_mmap(0, SY_BELL_BYTES, RW, MAP_SHARED, f[3], 0);
  if ((as | mg | hd | bl) < 0) return -1;
  long sl = sys_mmap(0, ((const struct sy_header *)hd)->slots * sizeof *slots + 1, PROT_READ, MAP_SHARED, f[4], 0);
  if (sl < 0) return -1;
  /* Core dumps hold the program's memory: frames that are mapped, not the empty arena, nor our tables. */
  SYS(__NR_madvise, as, SY_AS_BYTES, MADV_DONTDUMP, 0, 0);
  for (int i = 0; i < 5; i++) SYS(__NR_close, f[i], 0, 0, 0, 0);
  ctl = (void *)(as + SY_AS_CTL_OFF), chunks = (void *)(as + SY_AS_CHUNKS_OFF), chan = (void *)(as + SY_AS_CHANNEL_OFF), advice = (void *)(as + SY_AS_ADVICE_OFF), pte = (void *)(as + SY_AS_PTE_OFF);
  mag = (void *)mg, hdr = (void *)hd, bell = (void *)bl, slots = (void *)sl;
  ctl->pages_committed = committed; /* of a forked child: what it inherited */
  if (parent_ctl) {
    STORE(parent_ctl->fork_done, 1); /* what is in the frames stays so: the parent goes on while we map them */
    futex_wake(&parent_ctl->fork_done, 1);
    if (inherit() >= 0) return 0;
    say("sylvie: a forked child found no memory for its mappings\n");
    SYS(__NR_exit_group, 127, 0, 0, 0, 0);
  }
  SYS(__NR_madvise, VA(brk_floor), (SY_BRK_PAGES - brk_floor) * PS, MADV_DONTDUMP, 0, 0);
  SYS(__NR_madvise, VA(mmap_floor), (SY_ARENA_PAGES - mmap_floor) * PS, MADV_DONTDUMP, 0, 0);
  if (uffd_register(brk_floor, SY_BRK_PAGES - brk_floor, UFFDIO_REGISTER_MODE_MISSING) < 0) return -1;
  if (uffd_register(mmap_floor, SY_ARENA_PAGES - mmap_floor, UFFDIO_REGISTER_MODE_MISSING) < 0) return -1;
  return 0;
}

/* Without CLONE_FS: the program may enter another mount namespace only if nobody shares its root and directory. */
#define THREAD (CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_UNTRACED)

static void command_thread(long unused) {
  (void)unused;
  cmd_seen = 0;
  /* Our own descriptor table: nothing of the program's may stay open because of us. */
  if (SYS(__NR_close_range, 0, ~0U, 0, 0, 0) < 0)
    for (int i = 0; i < 4096; i++) SYS(__NR_close, i, 0, 0, 0, 0);
  int ok = join_enclave() == 0;
  SYS(__NR_chdir, "/", 0, 0, 0, 0); /* the program's directory must not stay busy because of us */
  if (ok) {
    /* The program may give up root later; its C library does so for the threads that it knows. We need no capability from now on. */
    struct { uint32_t version; int pid; } head = {0x20080522, 0};
    uint32_t none[6] = {0};
    SYS(__NR_capset, &head, none, 0, 0, 0);
    mode = MANAGED;
    if (parent_ctl) drop_unwanted();
    service_threads = 1;
    struct sy_request q = {.kind = SY_REQ_READY};
    q.tids[0] = (uint32_t)SYS(__NR_gettid, 0, 0, 0, 0, 0);
    for (long i = 0; ok && i < SY_SERVICE_THREADS; i++) {
      int t = start_thread(fault_thread, i, fault_stack[i] + sizeof fault_stack[i], THREAD | CLONE_FILES | CLONE_FS);
      if (t < 0) ok = i > 0; /* one is enough */
      else q.tids[1 + i] = (uint32_t)t, service_threads++;
    }
    memcpy(service_tid, q.tids, sizeof service_tid);
    if (ok) SYS(__NR_sendto, fd_sock, &q, sizeof q, MSG_NOSIGNAL, 0);
  }
  if (!ok) {
    mode = NATIVE;
    service_threads = 0;
    STORE(join_state, 2);
    futex_wake(&join_state, 0);
    SYS(__NR_exit, 0, 0, 0, 0, 0);
  }
  STORE(join_state, 1);
  futex_wake(&join_state, 0);
  for (;;) {
    while (serve_request() || LOAD(mag->cmd_tail) != cmd_seen) {
      if (LOAD(mag->cmd_tail) == cmd_seen) continue;
      struct sy_cmd c = mag->cmd[cmd_seen % SY_CMD_SLOTS]; /* (its place may have the next one as soon as it is done) */
      run_command(&c);
      cmd_seen++;
    }
    /* two words at once: a command of the gateway's, a request of a program thread */
    struct { uint64_t val, uaddr; uint32_t flags, pad; } v[2] = {{cmd_seen, (uintptr_t)&mag->cmd_tail, 2 /* 32 bit, shared */, 0},
                                                                  {0, (uintptr_t)&req_word, 2 | FUTEX_PRIVATE_FLAG, 0}};
    long r = SYS(__NR_futex_waitv, v, 2, 0, 0, 0);
    if (r == -ENOSYS) nap(1000); /* before Linux 5.16 */
  }
}
