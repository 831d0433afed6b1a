/* gateway: threads that sched schedules. The kernel's sched tracepoints, read from perf's per-CPU rings, become status words and ghOSt's messages; RUN becomes affinity and
 * SCHED_FIFO. Policy is the component's.
 *
 * Who waits has the attributes that it set itself, so there is nothing to undo when sched dies but the few that are chosen.
 *
 * `lock` (with priority inheritance: who holds it may be less important than who wants it) guards everything here and is taken before g->lock and ev_lock, never inside.
 * The rings are read under it, by their thread or by whoever must know the latest: commits, and callers that look at attributes. */
#include <linux/perf_event.h>

#define REMOVED 64
#define RING_PAGES 256u             /* of one CPU: some 10,000 records */
/* Between two readings: while ours block and wake; while others do; and for how long after it is waited for a bell instead. */
#define BUSY_NS 200000ull
#define CALM_NS 1000000ull
#define BUSY_FOR_NS 5000000ull
#define LISTEN_AFTER_NS 20000000ull
#define HOUSEKEEPING_NS 50000000ull
#define LOOK_NS 2000000000ull       /* a look at attributes that did not end was never begun */
#define ROOM 64u                    /* status words, of which it gets more at once */
#define TIDS (1u << 22)             /* PID_MAX_LIMIT */
#define LOOKS_HZ 500
#define DOUBTS 16u                  /* each costs some 10 us */
#define MAX_PERF 24
#define MASK_BYTES 128

/* bell: two events that are in force only while nobody reads, to be woken by; what they write is of no interest. */
struct ring { int cpu, n, fd[MAX_PERF], nbells, bell[2]; struct perf_event_mmap_page *page, *bells; uint64_t tail, head; uint8_t copy[512]; };
struct sched {
  pthread_mutex_t lock;
  int fd, ro, ncpu, nrings, stopping, have_thread, enabled;
  struct sy_tasks *hdr;
  struct sy_cpu *cpu;
  struct sy_task *task;
  uint16_t *by_tid;        /* [TIDS]: 1 + index of its status word; 0: not ours */
  uint16_t free[SY_MAX_TASKS];
  uint32_t nfree, room;    /* status words that may be used: the file has blocks for so many */
  uint32_t linger[SY_MAX_CPUS]; /* 1 + index of who was chosen there, has blocked, and has its attributes still: nothing else has been chosen there */
  struct sy_tracepoints tp;
  struct ring *ring;
  struct pollfd *poll;     /* [nrings + 1] */
  pthread_t thread;
  int poke;
  uint64_t wanted;         /* messages that sched handles: bit type - 64 of a task's, 32 + type - 128 of a CPU's */
  uint64_t tick_ns, next_tick, next_look, lost_seen;
  uint64_t ours;           /* records that were about ours */
  uint64_t timer_ns[SY_MAX_CPUS], timer_cookie[SY_MAX_CPUS];
  uint64_t default_slice;
  uint32_t doubt;          /* next to be looked at */
  int looking;             /* tasks with looking_ns */
  uint64_t removed[REMOVED]; /* processes that were removed last, by their first threads: not to be taken in again with their parents' others */
  uint32_t nremoved;
};

/* ---------------------------------------------------------------- attributes */
struct attr { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; };
static int set_attr(uint32_t tid, uint32_t policy, int nice, uint32_t priority, int reset, uint64_t slice) {
  struct attr a = {sizeof a, policy, (uint64_t)(reset != 0), nice, priority, slice, 0, 0};
  return syscall(SYS_sched_setattr, tid, &a, 0) ? -errno : 0;
}
static int get_attr(uint32_t tid, struct attr *a) {
  memset(a, 0, sizeof *a);
  return syscall(SYS_sched_getattr, tid, a, sizeof *a, 0) ? -errno : 0;
}
static int set_mask(uint32_t tid, const uint64_t *mask) { return syscall(SYS_sched_setaffinity, tid, (size_t)MASK_BYTES, mask) < 0 ? -errno : 0; }
static int get_mask(uint32_t tid, uint64_t *mask) {
  memset(mask, 0, MASK_BYTES);
  return syscall(SYS_sched_getaffinity, tid, (size_t)MASK_BYTES, mask) < 0 ? -errno : 0;
}
/* The CPU, if it is one; else -1. */
static int one_cpu(const uint64_t *mask) {
  int cpu = -1;
  for (int w = 0; w < 16; w++) {
    if (!mask[w]) continue;
    if (cpu >= 0 || mask[w] & (mask[w] - 1)) return -1;
    cpu = w * 64 + __builtin_ctzll(mask[w]);
  }
  return cpu;
}
static int real_time(int policy) { return policy == SCHED_FIFO || policy == SCHED_RR; }
/* A nice value is a thread's own whatever its policy, and may have changed under ours. */
static int nice_of(uint32_t tid, int otherwise) {
  long r = syscall(SYS_getpriority, PRIO_PROCESS, tid);
  return r < 1 ? otherwise : 20 - (int)r;
}
/* Exactly what it set itself. */
static int own_again(struct sy_task *t) {
  int rt = real_time(t->own_policy), r = set_attr(t->tid, (uint32_t)t->own_policy, rt ? 0 : nice_of(t->tid, t->own_nice), rt ? t->own_priority : 0, (int)t->own_reset, t->own_slice);
  int m = set_mask(t->tid, t->own_mask);
  t->flags &= ~(uint32_t)SY_TF_TOUCHED;
  return r ? r : m;
}
/* While it is ours and waits: its own, but no real-time priority; that would be above what is chosen. */
static int wait_again(struct sy_task *t) {
  if (!real_time(t->own_policy)) return own_again(t);
  t->flags |= SY_TF_TOUCHED;
  int r = set_attr(t->tid, SCHED_OTHER, nice_of(t->tid, t->own_nice), 0, (int)t->own_reset, 0), m = set_mask(t->tid, t->own_mask);
  return r ? r : m;
}
static int apply_choice(struct sy_task *t) {
  uint64_t mask[16] = {0};
  if (t->looking_ns) return 0; /* once it has looked */
  if (!(t->flags & SY_TF_CHOSEN)) return wait_again(t);
  t->flags |= SY_TF_TOUCHED; /* (before it is true: whoever finds this after us puts it right) */
  if (t->run_cpu >= 0) mask[t->run_cpu / 64] = 1ull << t->run_cpu % 64;
  int m = set_mask(t->tid, t->run_cpu >= 0 ? mask : t->own_mask), r = m ? m : set_attr(t->tid, SCHED_FIFO, 0, SY_PRIORITY_RUN + t->rank, 1, 0);
  return r;
}

/* ---------------------------------------------------------------- messages */
static int wants(struct sched *s, int type) { return (int)(s->wanted >> (type < SY_MSG_CPU_TICK ? type - SY_MSG_TASK_DEAD : 32 + type - SY_MSG_CPU_TICK) & 1); }
static void tell_sched(struct sy_gateway *g, int type, struct sy_task *t, int cpu, struct sy_task_msg m) {
  struct sched *s = g->sched;
  union { struct sy_task_msg t; struct sy_msg m; } u = {.t = m};
  _Static_assert(sizeof u.t == sizeof u.m, "one in the place of the other");
  struct sy_cpu *c = cpu >= 0 && cpu < s->ncpu ? &s->cpu[cpu] : NULL;
  if (c) __atomic_store_n(&c->seqnum, c->seqnum + 1, __ATOMIC_RELEASE);
  if (t) {
    __atomic_store_n(&t->barrier, t->barrier + 1, __ATOMIC_RELEASE);
    u.t.gtid = t->gtid, u.t.barrier = t->barrier;
    if (type != SY_MSG_TASK_WAKEUP) u.t.runtime = t->runtime, u.t.last_cpu = (int16_t)cpu, u.t.waker_cpu = -1;
  }
  u.t.type = (uint16_t)type, u.t.cpu = (int16_t)cpu, u.t.cpu_seqnum = c ? c->seqnum : 0;
  s->hdr->messages++;
  if (wants(s, type)) event(g, u.m);
}
static void say_task(struct sy_gateway *g, int type, struct sy_task *t, int runnable) { tell_sched(g, type, t, t->cpu, (struct sy_task_msg){.runnable = (uint8_t)runnable, .nice = (int8_t)t->own_nice}); }
static void say_cpu(struct sy_gateway *g, int type, int cpu, uint64_t cookie) { tell_sched(g, type, NULL, cpu, (struct sy_task_msg){.runtime = cookie, .last_cpu = (int16_t)cpu, .waker_cpu = -1}); }

/* ---------------------------------------------------------------- status words */
static struct sy_task *task_of(struct sched *s, uint32_t tid) {
  uint32_t i = tid < TIDS ? s->by_tid[tid] : 0;
  return i ? &s->task[i - 1] : NULL;
}
static struct sy_task *task_by_gtid(struct sched *s, uint64_t gtid) {
  struct sy_task *t = gtid ? task_of(s, (uint32_t)(gtid >> SY_GTID_SHIFT & (TIDS - 1))) : NULL;
  return t && t->gtid == gtid ? t : NULL;
}
struct stat_line { char state; uint64_t start; int cpu; };
/* /proc/PID/task/TID/stat, or with pid 0 of a thread of whatever process. 0 or -1: it is not there. */
static int read_stat(uint32_t pid, uint32_t tid, struct stat_line *l) {
  char p[64], b[1024], *q;
  if (pid) snprintf(p, sizeof p, "/proc/%u/task/%u/stat", pid, tid);
  else snprintf(p, sizeof p, "/proc/%u/stat", tid);
  int fd = open(p, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, b, sizeof b - 1);
  if (fd >= 0) close(fd);
  if (n <= 0) return -1;
  b[n] = 0;
  if (!(q = strrchr(b, ')')) || q[1] != ' ') return -1; /* a name may hold anything, but nothing after it does */
  l->state = q[2], q += 3, l->cpu = -1;
  for (int field = 4; (q = strchr(q, ' ')) != NULL && field <= 39; field++) {
    q++;
    if (field == 22) l->start = strtoull(q, NULL, 10);
    if (field == 39) l->cpu = atoi(q);
  }
  return l->state == 'Z' || l->state == 'X' ? -1 : 0;
}
static uint64_t gtid_of(uint32_t tid, uint64_t start) { return (uint64_t)tid << SY_GTID_SHIFT | (start & ((1ull << SY_GTID_SHIFT) - 1)); }
static uint64_t run_so_far(uint32_t pid, uint32_t tid) {
  char p[64], b[64] = {0};
  snprintf(p, sizeof p, "/proc/%u/task/%u/schedstat", pid, tid);
  int fd = open(p, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  if (read(fd, b, sizeof b - 1) < 0) b[0] = 0;
  close(fd);
  return strtoull(b, NULL, 10);
}
/* What a thread has set itself, as the kernel has it now. 0 or -errno. */
static int learn_own(struct sched *s, struct sy_task *t) {
  struct attr a;
  int r = get_attr(t->tid, &a);
  if (r || (r = get_mask(t->tid, t->own_mask))) return r;
  if (a.policy == SCHED_DEADLINE) return -EINVAL;
  t->own_policy = (int32_t)a.policy, t->own_priority = a.priority, t->own_reset = (uint32_t)(a.flags & 1);
  t->own_nice = real_time((int)a.policy) ? nice_of(t->tid, 0) : a.nice, t->own_slice = a.runtime == s->default_slice ? 0 : a.runtime;
  return 0;
}
/* … of one that was found after its start had been missed: the one CPU, and the ordinary priority, of who started it while that was chosen are not its own. */
static void unlearn(struct sched *s, struct sy_task *t, const struct sy_task *parent) {
  int cpu = one_cpu(t->own_mask);
  for (uint32_t i = 0; cpu >= 0 && i < s->hdr->top; i++)
    if (s->task[i].gtid && s->task[i].pid == parent->pid && s->task[i].flags & SY_TF_TOUCHED && s->task[i].run_cpu == cpu) memcpy(t->own_mask, s->task[i].own_mask, sizeof t->own_mask), cpu = -1;
  if (t->own_policy == SCHED_OTHER && !t->own_nice && parent->flags & SY_TF_TOUCHED && !real_time(parent->own_policy)) t->own_policy = parent->own_policy, t->own_nice = parent->own_nice;
}
static uint64_t boot_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_BOOTTIME, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
/* The reader is to look what there is to do. */
static void wake_reader(struct sched *s) {
  uint64_t one = 1;
  if (s->poke >= 0 && write(s->poke, &one, 8) < 0) { /* awake already */
  }
}
static void rings_on(struct sched *s, int on) {
  if (s->enabled == on) return;
  for (int i = 0; i < s->nrings; i++)
    for (int k = 0; k < s->ring[i].n; k++) ioctl(s->ring[i].fd[k], on ? PERF_EVENT_IOC_ENABLE : PERF_EVENT_IOC_DISABLE, 0);
  s->enabled = on;
  wake_reader(s);
}
/* A stub's: nobody's to schedule. */
static int is_service(struct sy_gateway *g, uint32_t tid) {
  int found = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < g->nas && !found; i++)
    for (int k = 0; k <= SY_SERVICE_THREADS; k++) found |= g->as[i]->tids[k] == tid;
  pthread_mutex_unlock(&g->lock);
  return found;
}
/* Takes a thread in: of process pid, or, if its parent began a process, of its own; begins: just now, else it was found. 0 or -errno. */
static int take_in(struct sy_gateway *g, uint32_t pid, uint32_t tid, struct sy_task *parent, int begins) {
  struct sched *s = g->sched;
  struct stat_line l = {0};
  if (tid >= TIDS) return -EINVAL;
  if (s->by_tid[tid] || is_service(g, tid)) return 0;
  if (read_stat(pid, tid, &l)) {
    if (!parent || read_stat(0, tid, &l)) return -ESRCH;
    pid = tid; /* a process of its own */
  }
  if (!s->nfree && s->hdr->top == s->room) {
    if (s->room == SY_MAX_TASKS || posix_fallocate(s->fd, SY_TASKS_TASK_OFF + (off_t)s->room * (off_t)sizeof *s->task, ROOM * sizeof *s->task)) return s->hdr->full++, -ENOSPC;
    s->room += ROOM;
  }
  uint32_t i = s->nfree ? s->free[--s->nfree] : s->hdr->top++;
  struct sy_task *t = &s->task[i];
  *t = (struct sy_task){.tid = tid, .pid = pid, .cpu = l.cpu, .run_cpu = -1, .parent = parent ? parent->gtid : 0, .switch_ns = now_ns(), .since_ns = boot_ns()};
  t->wake_ns = t->switch_ns, t->asid = parent && parent->pid == pid ? parent->asid : 0;
  int r = 0;
  if (begins) { /* as the kernel would have it from what its parent set, whatever we made of that */
    t->own_policy = parent->own_policy, t->own_nice = nice_of(parent->tid, parent->own_nice), t->own_priority = parent->own_priority, t->own_slice = parent->own_slice;
    memcpy(t->own_mask, parent->own_mask, sizeof t->own_mask);
    if (parent->own_reset && (real_time(t->own_policy) || t->own_nice < 0)) t->own_policy = real_time(t->own_policy) ? SCHED_OTHER : t->own_policy, t->own_nice = t->own_priority = 0;
  } else {
    r = learn_own(s, t), t->runtime = t->wake_runtime = run_so_far(pid, tid);
    if (!r && parent) unlearn(s, t, parent);
  }
  t->gtid = 0;
  if (!r) s->by_tid[tid] = (uint16_t)(i + 1);
  if (!r && parent) setpriority(PRIO_PROCESS, tid, t->own_nice); /* one that a chosen thread began has none of its parent's (SCHED_RESET_ON_FORK) */
  if (!r && (parent || real_time(t->own_policy))) r = wait_again(t);
  if (r) {
    s->by_tid[tid] = 0, s->free[s->nfree++] = (uint16_t)i;
    return r;
  }
  t->flags |= begins || l.state == 'R' ? SY_TF_RUNNABLE : 0;
  __atomic_store_n(&t->gtid, gtid_of(tid, l.start), __ATOMIC_RELEASE);
  s->hdr->count++;
  rings_on(s, 1);
  say_task(g, SY_MSG_TASK_NEW, t, (t->flags & SY_TF_RUNNABLE) != 0);
  return 0;
}
static void not_chosen(struct sy_gateway *g, struct sy_task *t) {
  struct sched *s = g->sched;
  if (t->run_cpu >= 0 && s->cpu[t->run_cpu].chosen == t->gtid) __atomic_store_n(&s->cpu[t->run_cpu].chosen, 0, __ATOMIC_RELEASE);
  t->flags &= ~(uint32_t)(SY_TF_CHOSEN | SY_TF_STANDING | SY_TF_SEND_ON_CPU);
}
static int lingers(struct sched *s, const struct sy_task *t) { return t->run_cpu >= 0 && s->linger[t->run_cpu] == (uint32_t)(t - s->task) + 1; }
static void no_linger(struct sched *s, struct sy_task *t) {
  if (lingers(s, t)) s->linger[t->run_cpu] = 0;
}
/* Not ours any more. */
static void let_out(struct sy_gateway *g, struct sy_task *t, int type) {
  struct sched *s = g->sched;
  int cpu = t->run_cpu, was = (t->flags & SY_TF_CHOSEN) && cpu >= 0 && s->cpu[cpu].chosen == t->gtid;
  not_chosen(g, t), no_linger(s, t);
  if (type != SY_MSG_TASK_DEAD && (t->flags & SY_TF_TOUCHED || t->looking_ns)) own_again(t);
  if (t->looking_ns) s->looking--;
  t->flags &= ~(uint32_t)(SY_TF_ON_CPU | SY_TF_RUNNABLE);
  say_task(g, type, t, 0);
  if (was) say_cpu(g, SY_MSG_CPU_AVAILABLE, cpu, 0);
  for (int i = 0; i < s->ncpu; i++)
    if (s->cpu[i].on == t->gtid) s->cpu[i].on = 0;
  s->by_tid[t->tid] = 0;
  __atomic_store_n(&t->gtid, 0, __ATOMIC_RELEASE);
  s->free[s->nfree++] = (uint16_t)(t - s->task);
  if (!--s->hdr->count) rings_on(s, 0);
}

/* ---------------------------------------------------------------- what the kernel says */
static int32_t i32(const uint8_t *raw, uint16_t off) { int32_t v; memcpy(&v, raw + off, 4); return v; }
static void woke(struct sy_gateway *g, int waker, uint64_t when, uint32_t tid, int cpu) {
  struct sched *s = g->sched;
  struct sy_task *t = task_of(s, tid);
  if (!t || t->flags & SY_TF_RUNNABLE) return;
  s->ours++;
  int16_t last = (int16_t)t->cpu;
  t->flags |= SY_TF_RUNNABLE, t->wake_ns = when, t->wake_runtime = t->runtime;
  if (cpu >= 0 && cpu < s->ncpu) t->cpu = cpu;
  tell_sched(g, SY_MSG_TASK_WAKEUP, t, t->cpu, (struct sy_task_msg){.runtime = when, .last_cpu = last, .waker_cpu = (int16_t)waker, .runnable = 1, .nice = (int8_t)t->own_nice});
  if (t->flags & SY_TF_CHOSEN || !(t->flags & SY_TF_TOUCHED)) return;
  if (!lingers(s, t)) apply_choice(t); /* it waits; but for the last one there, while nobody else was chosen */
}
static void went_off(struct sy_gateway *g, int cpu, uint64_t when, uint32_t tid, int64_t state, int next_ours) {
  struct sched *s = g->sched;
  struct sy_task *t = task_of(s, tid);
  if (!t) return;
  s->ours++;
  woke(g, -1, when, tid, cpu); /* (if that was not said) */
  if (t->flags & SY_TF_ON_CPU && when > t->switch_ns) t->runtime += when - t->switch_ns;
  t->switch_ns = when, t->cpu = cpu;
  if (next_ours && !(state & 0xff) && s->cpu[cpu].on == t->gtid) return; /* it goes on as soon as we are done: an interruption */
  t->flags &= ~(uint32_t)SY_TF_ON_CPU;
  if (s->cpu[cpu].on == t->gtid) s->cpu[cpu].on = 0;
  if (!(state & 0xff)) { /* … or 0x100: in the kernel, which is no difference to us */
    t->flags |= SY_TF_RUNNABLE;
    if (t->flags & SY_TF_CHOSEN && !next_ours) say_task(g, SY_MSG_TASK_PREEMPT, t, 1);
    return;
  }
  if (state & 0x30) return; /* EXIT_DEAD, EXIT_ZOMBIE: its end has been said */
  t->flags &= ~(uint32_t)SY_TF_RUNNABLE;
  int free = t->flags & SY_TF_CHOSEN && !(t->flags & SY_TF_STANDING);
  if (free) {
    not_chosen(g, t);
    if (t->run_cpu >= 0) {
      struct sy_task *before = s->linger[t->run_cpu] ? &s->task[s->linger[t->run_cpu] - 1] : NULL;
      s->linger[t->run_cpu] = (uint32_t)(t - s->task) + 1;
      if (before && before != t && before->gtid) apply_choice(before);
    }
  }
  say_task(g, SY_MSG_TASK_BLOCKED, t, 0);
  if (free && t->run_cpu >= 0) say_cpu(g, SY_MSG_CPU_AVAILABLE, t->run_cpu, 0);
}
static void came_on(struct sy_gateway *g, int cpu, uint64_t when, uint32_t tid, int prio, uint32_t before) {
  struct sched *s = g->sched;
  struct sy_cpu *c = &s->cpu[cpu];
  struct sy_task *t = task_of(s, tid);
  uint32_t was = c->state;
  /* beside threads of a real-time priority between what may be chosen and our own, it is the deadline scheduler's that nothing gets past */
  int busy = !t && tid && (prio < 0 || (prio < 99 - SY_PRIORITY_RUN - SY_RUN_RANKS + 1 && prio > 99 - SY_PRIORITY_OWN));
  c->state = SY_CPU_ONLINE | (tid ? 0 : SY_CPU_IDLE) | (busy ? SY_CPU_BUSY : 0);
  if (busy && !(was & SY_CPU_BUSY)) say_cpu(g, SY_MSG_CPU_BUSY, cpu, 0);
  if (!busy && was & SY_CPU_BUSY) say_cpu(g, SY_MSG_CPU_AVAILABLE, cpu, 0);
  if (!before && tid && !t && prio > 99 - SY_PRIORITY_OWN) say_cpu(g, SY_MSG_CPU_NOT_IDLE, cpu, 0);
  if (!t && tid && prio <= 99 - SY_PRIORITY_OWN) return;
  if (c->on && (!t || c->on != t->gtid)) { /* what had been interrupted does not go on, or not here */
    struct sy_task *was = task_by_gtid(s, c->on);
    if (was && was->cpu == cpu) was->flags &= ~(uint32_t)SY_TF_ON_CPU;
    if (was && was->cpu == cpu && was->flags & SY_TF_CHOSEN) say_task(g, SY_MSG_TASK_PREEMPT, was, 1);
  }
  c->on = t ? t->gtid : 0;
  if (!t) return;
  woke(g, -1, when, tid, cpu); /* if that was not said: some kernels have no record of wake-ups by interrupts of an idle CPU, `perf record` misses them, too */
  if (!(t = task_of(s, tid))) return;
  t->switch_ns = when, t->cpu = cpu;
  t->flags |= SY_TF_ON_CPU | SY_TF_RUNNABLE;
  if (t->flags & SY_TF_SEND_ON_CPU) t->flags &= ~(uint32_t)SY_TF_SEND_ON_CPU, say_task(g, SY_MSG_TASK_ON_CPU, t, 1);
}
/* The end of a system call about attributes: those of whoever it was about are their own, and may be others now. */
static void looked(struct sy_gateway *g, struct sy_task *t) {
  struct sched *s = g->sched;
  struct sy_task old = *t;
  t->looking_ns = 0, s->looking--;
  if (learn_own(s, t)) { /* it has ended, or made itself SCHED_DEADLINE */
    memcpy(t, &old, sizeof old), t->looking_ns = 0, t->flags &= ~(uint32_t)SY_TF_TOUCHED;
    let_out(g, t, SY_MSG_TASK_DEPARTED);
    return;
  }
  if (memcmp(old.own_mask, t->own_mask, sizeof old.own_mask)) {
    say_task(g, SY_MSG_TASK_AFFINITY_CHANGED, t, (t->flags & SY_TF_RUNNABLE) != 0);
    if (t->flags & SY_TF_CHOSEN && t->run_cpu >= 0 && !(t->own_mask[t->run_cpu / 64] >> t->run_cpu % 64 & 1)) {
      int cpu = t->run_cpu;
      not_chosen(g, t);
      say_cpu(g, SY_MSG_CPU_AVAILABLE, cpu, 0);
    }
  }
  if (old.own_policy != t->own_policy || old.own_nice != t->own_nice || old.own_priority != t->own_priority) say_task(g, SY_MSG_TASK_PRIORITY_CHANGED, t, (t->flags & SY_TF_RUNNABLE) != 0);
  if (t->flags & SY_TF_CHOSEN || real_time(t->own_policy)) apply_choice(t);
}
/* Of that caller, 0: of whomever, those that began by then. */
static void all_looked(struct sy_gateway *g, uint32_t caller, uint64_t until) {
  struct sched *s = g->sched;
  for (uint32_t i = 0; s->looking && i < s->hdr->top; i++)
    if (s->task[i].gtid && s->task[i].looking_ns && s->task[i].looking_ns <= until && (!caller || s->task[i].looker == caller)) looked(g, &s->task[i]);
}
/* Somebody has set a nice value, or has set something for a thread whose call we did not see begin (its process has no filter of ours). */
static void set_by_call(struct sy_gateway *g, uint32_t caller) {
  struct sched *s = g->sched;
  struct sy_task *t = task_of(s, caller);
  if (!t) return;
  int nice = nice_of(t->tid, t->own_nice);
  uint64_t mask[16], ours[16] = {0};
  if (nice != t->own_nice) t->own_nice = nice, say_task(g, SY_MSG_TASK_PRIORITY_CHANGED, t, 1);
  if (get_mask(t->tid, mask)) return;
  if (t->flags & SY_TF_TOUCHED && t->run_cpu >= 0) ours[t->run_cpu / 64] = 1ull << t->run_cpu % 64;
  if (!memcmp(mask, t->own_mask, sizeof mask) || !memcmp(mask, ours, sizeof mask)) return;
  memcpy(t->own_mask, mask, sizeof mask);
  say_task(g, SY_MSG_TASK_AFFINITY_CHANGED, t, 1);
  if (t->flags & SY_TF_CHOSEN) apply_choice(t);
}
/* So one that was woken, and has not run since, may count as blocked. A few of those at a time are looked at. */
static void look_again(struct sy_gateway *g) {
  struct sched *s = g->sched;
  struct stat_line l;
  for (uint32_t looked_at = 0, n = s->hdr->top; n && looked_at < DOUBTS; n--) {
    struct sy_task *t = &s->task[s->doubt++ % s->hdr->top];
    if (!t->gtid || t->flags & SY_TF_RUNNABLE) continue;
    looked_at++;
    if (!read_stat(t->pid, t->tid, &l) && l.state == 'R') woke(g, -1, now_ns(), t->tid, l.cpu);
  }
}
static void record(struct sy_gateway *g, int cpu, uint64_t when, uint32_t current, const uint8_t *raw) {
  struct sched *s = g->sched;
  const struct sy_tracepoints *p = &s->tp;
  uint16_t kind;
  struct sy_task *t;
  memcpy(&kind, raw, 2);
  int id = kind;
  s->hdr->records++;
  if (!id) { /* as it should be; but some kernels lose what they trace while a CPU is idle, and so that it no longer is */
    if ((t = task_of(s, current)) && s->cpu[cpu].on != t->gtid) came_on(g, cpu, when, current, 0, current);
  } else if (id == p->switch_id) {
    int64_t state;
    memcpy(&state, raw + p->prev_state, 8);
    uint32_t prev = (uint32_t)i32(raw, p->prev_pid), next = (uint32_t)i32(raw, p->next_pid);
    int prio = i32(raw, p->next_prio);
    went_off(g, cpu, when, prev, state, prio <= 99 - SY_PRIORITY_OWN);
    came_on(g, cpu, when, next, prio, prev);
  } else if (id == p->wakeup_id || id == p->wakeup_new_id)
    woke(g, cpu, when, (uint32_t)i32(raw, p->wake_pid), i32(raw, p->wake_cpu));
  else if (id == p->fork_id) {
    if ((t = task_of(s, (uint32_t)i32(raw, p->parent_pid)))) take_in(g, t->pid, (uint32_t)i32(raw, p->child_pid), t, 1);
  } else if (id == p->exit_id) {
    if ((t = task_of(s, (uint32_t)i32(raw, p->exit_pid)))) let_out(g, t, SY_MSG_TASK_DEAD);
  } else if (id == p->exec_id) { /* a thread that executes becomes its process's first */
    uint32_t tid = (uint32_t)i32(raw, p->exec_pid), old = (uint32_t)i32(raw, p->exec_old_pid);
    if (tid != old && (t = task_of(s, old))) {
      if (!task_of(s, tid)) take_in(g, tid, tid, t, 0);
      let_out(g, t, SY_MSG_TASK_DEAD);
    }
  } else if (id == p->migrate_id) {
    if ((t = task_of(s, (uint32_t)i32(raw, p->migrate_pid))) && !(t->flags & SY_TF_ON_CPU)) t->cpu = i32(raw, p->migrate_cpu);
  } else if (id == p->yield_id) {
    if ((t = task_of(s, current)) && t->flags & SY_TF_CHOSEN) say_task(g, SY_MSG_TASK_YIELD, t, 1);
  } else
    for (int i = 0; i < p->ncalls; i++)
      if (id == p->call_id[i]) {
        if (s->looking) all_looked(g, current, when);
        set_by_call(g, current);
      }
}
/* The next record of a ring that is not later than `until`: its time; 0: none. Where it wraps it is copied. */
static uint64_t peek(struct sy_gateway *g, struct ring *r, uint64_t until, const uint8_t **at) {
  struct sched *s = g->sched;
  uint64_t size = (uint64_t)RING_PAGES * PS;
  const uint8_t *data = (const uint8_t *)r->page + PS;
  while (r->tail != r->head) {
    struct perf_event_header h;
    uint64_t off = r->tail % size, when;
    memcpy(&h, data + off, sizeof h); /* (records are aligned to 8 bytes, so a header never wraps) */
    uint64_t n = h.size < sizeof r->copy ? h.size : sizeof r->copy, first = size - off < n ? size - off : n;
    *at = data + off;
    if (first < n) memcpy(r->copy, data + off, first), memcpy(r->copy + first, data, n - first), *at = r->copy;
    if (h.type == PERF_RECORD_LOST) {
      uint64_t lost;
      memcpy(&lost, *at + 16, 8);
      s->hdr->lost += lost;
    }
    if (h.type == PERF_RECORD_SAMPLE) {
      memcpy(&when, *at + 16, 8);
      return when > until ? 0 : when;
    }
    r->tail += h.size;
  }
  return 0;
}
/* Reads the rings, in the order of time. A record that is not later than now is in its ring, if what came of it is in any: the kernel's runqueue locks see to that.
 * So what is later waits. Is there such? (under lock) */
static int read_rings(struct sy_gateway *g) {
  struct sched *s = g->sched;
  uint64_t until = now_ns();
  int later = 0;
  for (int i = 0; i < s->nrings; i++) s->ring[i].head = __atomic_load_n(&s->ring[i].page->data_head, __ATOMIC_ACQUIRE);
  for (;;) {
    struct ring *first = NULL;
    const uint8_t *at, *first_at = NULL;
    uint64_t when = UINT64_MAX, w;
    for (int i = 0; i < s->nrings; i++)
      if (s->ring[i].tail != s->ring[i].head && (w = peek(g, &s->ring[i], until, &at)) && w < when) when = w, first = &s->ring[i], first_at = at;
    if (!first) break;
    struct perf_event_header h;
    uint32_t tid;
    memcpy(&h, first_at, sizeof h), memcpy(&tid, first_at + 12, 4);
    record(g, first->cpu, when, tid, first_at + 36); /* header, pid and tid, time, cpu, size of what follows */
    first->tail += h.size;
  }
  for (int i = 0; i < s->nrings; i++) {
    later |= s->ring[i].tail != s->ring[i].head;
    __atomic_store_n(&s->ring[i].page->data_tail, s->ring[i].tail, __ATOMIC_RELEASE);
  }
  return later;
}
/* Records were lost: /proc is the truth. Threads that have ended, states, and threads and processes that began (but for those of processes that have ended meanwhile: whose they were
 * nobody can tell). */
/* Not of those: what its parent had started before that was given, and what has been removed. */
static int is_heir(struct sched *s, uint32_t pid, uint64_t since_ns) {
  struct stat_line l;
  if (read_stat(pid, pid, &l)) return 0;
  uint64_t tick = 1000000000ull / (uint64_t)sysconf(_SC_CLK_TCK);
  if ((l.start + 1) * tick < since_ns) return 0;
  for (int i = 0; i < REMOVED; i++)
    if (s->removed[i] == gtid_of(pid, l.start)) return 0;
  return 1;
}
static void take_in_all(struct sy_gateway *g, uint32_t pid, struct sy_task *parent, uint64_t since_ns) {
  char p[64], c[300];
  snprintf(p, sizeof p, "/proc/%u/task", pid);
  DIR *d = opendir(p);
  for (struct dirent *e; d && (e = readdir(d));) {
    uint32_t tid = (uint32_t)atoi(e->d_name), child;
    if (!tid) continue;
    take_in(g, pid, tid, parent, 0);
    snprintf(c, sizeof c, "/proc/%u/task/%u/children", pid, tid);
    FILE *f = fopen(c, "re");
    while (f && fscanf(f, "%u", &child) == 1)
      if (!task_of(g->sched, child) && is_heir(g->sched, child, since_ns)) take_in_all(g, child, parent, 0); /* (those that are known have their own turn) */
    if (f) fclose(f);
  }
  if (d) closedir(d);
}
static void resync_tasks(struct sy_gateway *g) {
  struct sched *s = g->sched;
  s->hdr->resyncs++;
  uint32_t top = s->hdr->top;
  for (uint32_t i = 0; i < top; i++) {
    struct sy_task *t = &s->task[i];
    struct stat_line l;
    if (!t->gtid) continue;
    if (read_stat(t->pid, t->tid, &l) || gtid_of(t->tid, l.start) != t->gtid) {
      let_out(g, t, SY_MSG_TASK_DEAD);
      continue;
    }
    int runs = l.state == 'R';
    t->runtime = run_so_far(t->pid, t->tid), t->switch_ns = now_ns();
    if (runs && !(t->flags & SY_TF_RUNNABLE)) woke(g, -1, now_ns(), t->tid, l.cpu);
    else if (!runs && t->flags & SY_TF_RUNNABLE) went_off(g, t->cpu < 0 ? 0 : t->cpu, now_ns(), t->tid, 1, 0);
    t->flags &= ~(uint32_t)(runs ? 0 : SY_TF_ON_CPU);
  }
  for (uint32_t i = 0; i < top; i++) {
    uint32_t first = 0; /* each process once */
    uint64_t since = s->task[i].since_ns;
    if (!s->task[i].gtid) continue;
    while (!s->task[first].gtid || s->task[first].pid != s->task[i].pid) first++;
    for (uint32_t k = first; first == i && k < top; k++)
      if (s->task[k].gtid && s->task[k].pid == s->task[i].pid && s->task[k].since_ns < since) since = s->task[k].since_ns;
    if (first == i) take_in_all(g, s->task[i].pid, &s->task[i], since);
  }
}

/* ---------------------------------------------------------------- the watchdog, and time */
/* All wait: as the kernel would have them, were there no sched. */
static int all_wait(struct sy_gateway *g, int for_good) {
  struct sched *s = g->sched;
  int n = 0;
  for (uint32_t i = 0; i < s->hdr->top; i++) {
    struct sy_task *t = &s->task[i];
    if (!t->gtid || !(t->flags & (SY_TF_TOUCHED | SY_TF_CHOSEN))) continue;
    int was = (t->flags & SY_TF_CHOSEN) != 0;
    n += was;
    not_chosen(g, t), no_linger(s, t);
    own_again(t);
    if (was && !for_good && t->flags & SY_TF_RUNNABLE) say_task(g, SY_MSG_TASK_PREEMPT, t, 1); /* (for one that was only late) */
    if (!for_good && real_time(t->own_policy)) t->flags |= SY_TF_TOUCHED; /* its own priority, until sched is back */
  }
  return n;
}
/* Which address space each thread is in; those that joined since (under lock). */
static void see_spaces(struct sy_gateway *g) {
  struct sched *s = g->sched;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < s->hdr->top; i++) {
    struct sy_task *t = &s->task[i];
    if (!t->gtid) continue;
    uint32_t asid = 0;
    for (uint32_t k = 0; k < g->nas; k++)
      if ((uint32_t)g->as[k]->pid == t->pid) asid = g->as[k]->asid;
    t->asid = asid;
  }
  pthread_mutex_unlock(&g->lock);
}
static uint64_t housekeeping(struct sy_gateway *g) { /* → when there is something to do again (under lock) */
  struct sched *s = g->sched;
  uint64_t now = now_ns(), next = s->next_look;
  if (s->hdr->lost != s->lost_seen) s->lost_seen = s->hdr->lost, resync_tasks(g);
  if (s->tick_ns && now >= s->next_tick) {
    s->next_tick = now + s->tick_ns;
    for (int i = 0; i < s->ncpu; i++)
      if (s->cpu[i].on) say_cpu(g, SY_MSG_CPU_TICK, i, 0);
  }
  for (int i = 0; i < s->ncpu; i++)
    if (s->timer_ns[i] && now >= s->timer_ns[i]) s->timer_ns[i] = 0, say_cpu(g, SY_MSG_CPU_TIMER_EXPIRED, i, s->timer_cookie[i]);
  if (now >= s->next_look) {
    s->next_look = next = now + HOUSEKEEPING_NS;
    all_looked(g, 0, now - (s->tp.ncalls ? LOOK_NS : 10000000ull));
    if (s->hdr->count) see_spaces(g), look_again(g);
    if (now - s->hdr->alive_ns > s->hdr->watchdog_ns && all_wait(g, 0)) s->hdr->fallbacks++;
  }
  if (s->tick_ns && s->hdr->count && s->next_tick < next) next = s->next_tick;
  for (int i = 0; i < s->ncpu; i++)
    if (s->timer_ns[i] && s->timer_ns[i] < next) next = s->timer_ns[i];
  return next;
}
/* Each record of an event that wakes somebody costs whoever made it some 12 us in a virtual machine (an interrupt to itself). So none of those that are kept does: the rings are read
 * every so often while something goes on, and bells are rung only after a while in which nothing has. */
static void listen_for_bells(struct sched *s, int on) {
  for (int i = 0; i < s->nrings; i++) {
    struct ring *r = &s->ring[i];
    if (!r->nbells) continue;
    if (on) __atomic_store_n(&r->bells->data_tail, __atomic_load_n(&r->bells->data_head, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    ioctl(r->bell[0], on ? PERF_EVENT_IOC_ENABLE : PERF_EVENT_IOC_DISABLE, PERF_IOC_FLAG_GROUP);
  }
}
static void *rings_thread(void *arg) {
  struct sy_gateway *g = arg;
  struct sched *s = g->sched;
  struct sched_param sp = {.sched_priority = SY_PRIORITY_RINGS};
  uint64_t ours_ns = 0, bell_ns = 0, next = 0, ours = 0;
  int listening = 0;
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &sp);
  while (!__atomic_load_n(&s->stopping, __ATOMIC_ACQUIRE)) {
    uint64_t now = now_ns(), until = next, x;
    if (!listening && s->enabled && now + (now - ours_ns < BUSY_FOR_NS ? BUSY_NS : CALM_NS) < until) until = now + (now - ours_ns < BUSY_FOR_NS ? BUSY_NS : CALM_NS);
    struct timespec t = {0, until > now ? (long)(until - now < 999999999 ? until - now : 999999999) : 0};
    int rang = until > now && ppoll(s->poll + (listening ? 0 : s->nrings), listening ? (nfds_t)s->nrings + 1 : 1, &t, NULL) > 0;
    if (rang && s->poll[s->nrings].revents && read(s->poke, &x, 8) < 0) { /* somebody else took it */
    }
    pthread_mutex_lock(&s->lock);
    while (read_rings(g)) {
    }
    next = housekeeping(g);
    int on = s->enabled;
    pthread_mutex_unlock(&s->lock);
    now = now_ns();
    if (s->ours != ours) ours = s->ours, ours_ns = now;
    if (listening && rang) listen_for_bells(s, listening = 0), bell_ns = now;
    else if (!listening && on && now - ours_ns > LISTEN_AFTER_NS && now - bell_ns > LISTEN_AFTER_NS) {
      listen_for_bells(s, listening = 1);
      next = 0; /* what came before they were in force is read at once */
    } else if (listening && !on) listen_for_bells(s, listening = 0);
  }
  return NULL;
}

/* ---------------------------------------------------------------- RUN */
static uint32_t check_run(struct sched *s, const struct sy_op *op, struct sy_task **t) {
  uint32_t flags = op->order, cpu = op->pfn;
  *t = NULL;
  if (flags & ~(uint32_t)SY_RUN_FLAGS) return SY_R_INVALID_FLAGS;
  if (flags & SY_RUN_WAIT && flags & ~(uint32_t)(SY_RUN_WAIT | SY_RUN_SYNC)) return SY_R_INVALID_FLAGS;
  int any = cpu == SY_ANY_CPU || flags & SY_RUN_WAIT;
  if (!any && cpu >= (uint32_t)s->ncpu) return SY_R_INVALID_CPU;
  if (!any && !(s->cpu[cpu].state & SY_CPU_ONLINE)) return SY_R_CPU_OFFLINE;
  if (!any && op->asid && op->asid != s->cpu[cpu].seqnum) return SY_R_AGENT_STALE;
  if (!op->arg) return any ? SY_R_INVALID_CPU : SY_R_COMPLETE;
  if (op->arg >> SY_GTID_SHIFT >= TIDS || !(op->arg >> SY_GTID_SHIFT)) return SY_R_INVALID_TARGET;
  if (!(*t = task_by_gtid(s, op->arg))) return SY_R_NOT_FOUND;
  if ((*t)->barrier != op->barrier) return SY_R_STALE;
  if (flags & SY_RUN_WAIT) return SY_R_COMPLETE;
  if (!((*t)->flags & SY_TF_RUNNABLE) && !(flags & SY_RUN_STANDING)) return SY_R_TARGET_NOT_RUNNABLE;
  if (!any && !((*t)->own_mask[cpu / 64] >> cpu % 64 & 1)) return SY_R_INVALID_CPU;
  if (!any && s->cpu[cpu].state & SY_CPU_BUSY) return SY_R_CPU_UNAVAIL;
  if ((*t)->flags & SY_TF_CHOSEN && (*t)->run_cpu >= 0 && (*t)->run_cpu != (int32_t)cpu && (*t)->flags & SY_TF_RUNNABLE && !(flags & SY_RUN_ALLOW_ONCPU)) return SY_R_TARGET_ONCPU;
  return SY_R_COMPLETE;
}
/* What was chosen for that CPU waits, but for `but`. */
static void make_way(struct sy_gateway *g, int cpu, struct sy_task *but, int elide) {
  struct sched *s = g->sched;
  struct sy_task *was = task_by_gtid(s, s->cpu[cpu].chosen), *lingers = s->linger[cpu] ? &s->task[s->linger[cpu] - 1] : NULL;
  if (lingers && lingers != but) {
    s->linger[cpu] = 0;
    if (lingers->gtid) apply_choice(lingers);
  }
  if (!was || was == but) return;
  not_chosen(g, was);
  apply_choice(was);
  if (was->flags & SY_TF_RUNNABLE && !elide) say_task(g, SY_MSG_TASK_PREEMPT, was, 1);
}
static uint32_t carry_out(struct sy_gateway *g, const struct sy_op *op, struct sy_task *t) {
  struct sched *s = g->sched;
  uint32_t flags = op->order, rank = flags >> SY_RUN_RANK_SHIFT & (SY_RUN_RANKS - 1), had = t ? t->flags : 0;
  int cpu = op->pfn == SY_ANY_CPU ? -1 : (int)op->pfn, same;
  if (!t) return make_way(g, cpu, NULL, flags & SY_RUN_ELIDE_PREEMPT), SY_R_COMPLETE;
  if (flags & SY_RUN_WAIT) {
    not_chosen(g, t), no_linger(s, t);
    if (had & SY_TF_TOUCHED) apply_choice(t);
    return SY_R_COMPLETE;
  }
  same = had & SY_TF_TOUCHED && (had & SY_TF_CHOSEN || lingers(s, t)) && t->run_cpu == cpu && t->rank == rank;
  not_chosen(g, t), no_linger(s, t);
  t->run_cpu = cpu, t->rank = rank;
  t->flags |= SY_TF_CHOSEN | (flags & SY_RUN_STANDING ? SY_TF_STANDING : 0) | (flags & SY_RUN_SEND_ON_CPU && !(had & SY_TF_ON_CPU && t->cpu == cpu) ? SY_TF_SEND_ON_CPU : 0);
  /* the new one first, then away with the old: nothing that waits gets in between */
  int r = same ? 0 : apply_choice(t);
  if (r) {
    not_chosen(g, t);
    if (r != -ESRCH) apply_choice(t);
    return r == -ESRCH ? SY_R_NOT_FOUND : r == -EINVAL ? SY_R_CPU_OFFLINE : SY_R_NOT_PERMITTED;
  }
  if (cpu >= 0) {
    make_way(g, cpu, t, flags & SY_RUN_ELIDE_PREEMPT);
    __atomic_store_n(&s->cpu[cpu].chosen, t->gtid, __ATOMIC_RELEASE);
  }
  if (flags & SY_RUN_SEND_ON_CPU && had & SY_TF_ON_CPU && t->cpu == cpu) say_task(g, SY_MSG_TASK_ON_CPU, t, 1);
  return SY_R_COMPLETE;
}
static int open_rings(struct sy_gateway *g);
static int of_sched(const struct sy_op *op) { return op->op == SY_OP_RUN || op->op == SY_OP_TIMER; }
static void commit_run(struct sy_gateway *g, struct sy_op *ops, int n) {
  struct sched *s = g->sched;
  pthread_mutex_lock(&s->lock);
  while (read_rings(g)) { /* decided on what it knew; carried out on what is */
  }
  s->hdr->alive_ns = now_ns();
  for (int i = 0, end; i < n; i = end) {
    struct sy_task *t;
    int bad = 0;
    for (end = i; end < n && ops[end].op == SY_OP_RUN && ops[end].order & SY_RUN_SYNC; end++) {
      ops[end].result = check_run(s, &ops[end], &t);
      for (int k = i; k < end; k++) /* one CPU cannot have two, nor a thread two CPUs */
        if (ops[k].arg == ops[end].arg || (ops[k].pfn == ops[end].pfn && ops[end].pfn != SY_ANY_CPU && !((ops[k].order | ops[end].order) & SY_RUN_WAIT))) ops[end].result = SY_R_INVALID_CPU;
      bad |= ops[end].result != SY_R_COMPLETE;
    }
    if (end == i) {
      struct sy_op *op = &ops[i];
      end = i + 1;
      if (op->op == SY_OP_TIMER) {
        op->result = op->pfn >= (uint32_t)s->ncpu ? SY_R_INVALID_CPU : SY_R_COMPLETE;
        if (op->result == SY_R_COMPLETE) open_rings(g); /* (whose thread keeps time) */
      if (op->result == SY_R_COMPLETE) s->timer_ns[op->pfn] = op->barrier ? now_ns() + op->barrier * 1000ull : 0, s->timer_cookie[op->pfn] = op->arg;
        wake_reader(s);
      } else if (op->op == SY_OP_RUN && (op->result = check_run(s, op, &t)) == SY_R_COMPLETE) op->result = carry_out(g, op, t);
    } else
      for (int k = i; k < end; k++) {
        if (!bad && (ops[k].result = carry_out(g, &ops[k], task_by_gtid(s, ops[k].arg))) != SY_R_COMPLETE) {
          bad = 1; /* it died in between: those before it wait again */
          for (int j = i; j < k; j++)
            if ((t = task_by_gtid(s, ops[j].arg))) not_chosen(g, t), apply_choice(t), ops[j].result = SY_R_POISONED;
        } else if (bad && ops[k].result == SY_R_COMPLETE) ops[k].result = SY_R_POISONED;
      }
  }
  for (int i = 0; i < n; i++)
    if (ops[i].op == SY_OP_RUN) *(ops[i].result == SY_R_COMPLETE ? &s->hdr->runs : &s->hdr->refused) += 1;
  pthread_mutex_unlock(&s->lock);
}

/* ---------------------------------------------------------------- who is in */
/* A process, with all its threads. 0 or -errno. */
int sy_gw_sched_add(struct sy_gateway *g, uint32_t pid) {
  struct sched *s = g->sched;
  struct stat_line l;
  char p[64];
  struct dirent *e;
  int r = 0, n = 0;
  if (s->poke < 0) return -ENOSYS;
  if (pid == (uint32_t)getpid() || pid < 2) return -EPERM;
  if (read_stat(pid, pid, &l)) return -ESRCH;
  snprintf(p, sizeof p, "/proc/%u/task", pid);
  pthread_mutex_lock(&s->lock);
  if ((r = open_rings(g))) return pthread_mutex_unlock(&s->lock), r;
  rings_on(s, 1);
  for (int again = 2; again--;) { /* twice: those that began meanwhile, by one that was not ours yet */
    DIR *d = opendir(p);
    while (d && (e = readdir(d)))
      if (atoi(e->d_name) && (r = take_in(g, pid, (uint32_t)atoi(e->d_name), NULL, 0)) == 0) n++;
    if (d) closedir(d);
  }
  if (!s->hdr->count) rings_on(s, 0);
  pthread_mutex_unlock(&s->lock);
  return n ? 0 : r ? r : -ESRCH;
}
int sy_gw_sched_remove(struct sy_gateway *g, uint32_t pid) {
  struct sched *s = g->sched;
  int n = 0;
  pthread_mutex_lock(&s->lock);
  while (read_rings(g)) {
  }
  struct stat_line l;
  if (!read_stat(pid, pid, &l)) s->removed[s->nremoved++ % REMOVED] = gtid_of(pid, l.start);
  for (uint32_t i = 0; i < s->hdr->top; i++)
    if (s->task[i].gtid && s->task[i].pid == pid) let_out(g, &s->task[i], SY_MSG_TASK_DEPARTED), n++;
  pthread_mutex_unlock(&s->lock);
  return n ? 0 : -ESRCH;
}
/* It is known now that this is a stub's service thread. */
static void sched_not_ours(struct sy_gateway *g, uint32_t tid) {
  struct sched *s = g->sched;
  if (!s->nrings || tid >= TIDS) return;
  pthread_mutex_lock(&s->lock);
  if (s->hdr->count) {
    while (read_rings(g)) {
    }
    struct sy_task *t = task_of(s, tid);
    if (t) t->flags &= ~(uint32_t)SY_TF_TOUCHED, let_out(g, t, SY_MSG_TASK_DEPARTED);
  }
  pthread_mutex_unlock(&s->lock);
}
/* A system call that asks for, or sets, a thread's attributes goes on natively, and finds those that it set itself; the end of the call is in the rings. */
static void sched_look(struct sy_gateway *g, uint32_t caller, uint32_t target) {
  struct sched *s = g->sched;
  if (!s->nrings || !s->hdr->count) return;
  pthread_mutex_lock(&s->lock);
  while (read_rings(g)) { /* it may be a thread that has just begun */
  }
  struct sy_task *t = task_of(s, target ? target : caller);
  if (t) {
    if (t->flags & SY_TF_TOUCHED) own_again(t);
    if (!t->looking_ns) s->looking++;
    t->looking_ns = now_ns(), t->looker = caller;
  }
  pthread_mutex_unlock(&s->lock);
}
/* What sched handles: bit type - 64 of a task's messages, 32 + type - 128 of a CPU's; and how often it wants CPU_TICK. */
void sy_gw_sched_words(struct sy_gateway *g, uint64_t wanted, uint32_t tick_us) {
  struct sched *s = g->sched;
  pthread_mutex_lock(&s->lock);
  s->wanted = wanted, s->tick_ns = tick_us * 1000ull, s->next_tick = now_ns() + s->tick_ns, s->hdr->alive_ns = now_ns();
  pthread_mutex_unlock(&s->lock);
  wake_reader(s);
}
void sy_gw_sched_watchdog(struct sy_gateway *g, uint64_t ns) { g->sched->hdr->watchdog_ns = ns; }
int sy_gw_tasks_fd(struct sy_gateway *g) { return g->sched->ro; }

/* ---------------------------------------------------------------- start and stop */
/* What the pinned threads of process `of` have started since that gateway was killed, in process pid: it is in no table, and was left on the CPU of who started it, with
 * an ordinary priority (SCHED_RESET_ON_FORK). Threads that have ended since are in the table without their number. */
static void put_heirs_right(const struct sy_task *t, uint32_t top, uint32_t of, uint32_t pid) {
  char p[64], c[300];
  snprintf(p, sizeof p, "/proc/%u/task", pid);
  DIR *d = opendir(p);
  for (struct dirent *e; d && (e = readdir(d));) {
    uint32_t tid = (uint32_t)atoi(e->d_name), child, i = 0;
    uint64_t mask[16];
    struct attr a;
    if (!tid) continue;
    while (i < top && !(t[i].gtid && t[i].tid == tid)) i++;
    int cpu = i < top || get_mask(tid, mask) || get_attr(tid, &a) || real_time((int)a.policy) ? -1 : one_cpu(mask); /* (a real-time one is a stub's, or has gone its own way) */
    for (i = 0; cpu >= 0 && i < top; i++) {
      if (!t[i].gtid || t[i].pid != of || t[i].run_cpu != cpu) continue;
      if (a.policy == SCHED_OTHER && !a.nice && !real_time(t[i].own_policy)) set_attr(tid, (uint32_t)t[i].own_policy, t[i].own_nice, 0, 0, t[i].own_slice);
      set_mask(tid, t[i].own_mask), cpu = -1;
    }
    snprintf(c, sizeof c, "/proc/%u/task/%u/children", pid, tid);
    FILE *f = fopen(c, "re");
    while (f && fscanf(f, "%u", &child) == 1) {
      for (i = 0; i < top && !(t[i].gtid && t[i].pid == child);) i++;
      if (i == top) put_heirs_right(t, top, of, child);
    }
    if (f) fclose(f);
  }
  if (d) closedir(d);
}
/* Threads that a gateway which was killed left with attributes that are not their own. Number put right. */
static int put_right(struct sy_task *t, uint32_t top) {
  int n = 0;
  if (top > SY_MAX_TASKS) top = SY_MAX_TASKS;
  for (uint32_t i = 0; i < top; i++) {
    struct stat_line l;
    if (!(t[i].flags & SY_TF_TOUCHED)) t[i].run_cpu = -1;
    if (!t[i].gtid) continue;
    if (read_stat(0, t[i].tid, &l) || gtid_of(t[i].tid, l.start) != t[i].gtid) t[i].tid = 0;
    else if (t[i].flags & SY_TF_TOUCHED) n += !own_again(&t[i]);
  }
  for (uint32_t i = 0; i < top; i++) {
    uint32_t first = 0, pinned = 0; /* each process that is there still, once */
    if (!t[i].gtid || !t[i].tid) continue;
    while (!t[first].gtid || !t[first].tid || t[first].pid != t[i].pid) first++;
    while (pinned < top && !(t[pinned].gtid && t[pinned].pid == t[i].pid && t[pinned].run_cpu >= 0)) pinned++;
    if (first == i && pinned < top) put_heirs_right(t, top, t[i].pid, t[i].pid);
  }
  return n;
}
int sy_sched_restore(const char *path) {
  int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  struct stat st;
  if (fd < 0) return errno == ENOENT ? 0 : -errno;
  uint8_t *m = fstat(fd, &st) || st.st_uid != geteuid() || st.st_size < SY_TASKS_BYTES ? MAP_FAILED : mmap(NULL, SY_TASKS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (m == MAP_FAILED) return -EINVAL;
  struct sy_tasks *h = (void *)m;
  int n = h->magic == SY_MAGIC && h->abi == SY_ABI_VERSION ? put_right((void *)(m + SY_TASKS_TASK_OFF), h->top) : 0;
  munmap(m, SY_TASKS_BYTES);
  return n;
}
static int sched_new(struct sy_gateway *g) {
  struct sched *s = g->sched = calloc(1, sizeof *s);
  pthread_mutexattr_t pi;
  char path[128];
  struct attr a;
  if (!s) return -1;
  pthread_mutexattr_init(&pi), pthread_mutexattr_setprotocol(&pi, PTHREAD_PRIO_INHERIT), pthread_mutex_init(&s->lock, &pi);
  snprintf(path, sizeof path, "%s/tasks", g->run_dir);
  sy_sched_restore(path);
  unlink(path);
  s->poke = -1, s->ro = -1;
  s->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (s->fd >= 0 && (ftruncate(s->fd, SY_TASKS_BYTES) || (errno = posix_fallocate(s->fd, 0, SY_TASKS_TASK_OFF)))) return -1; /* (a page that the disk has no room for would be a signal) */
  if (s->fd < 0 || (s->ro = open(path, O_RDONLY | O_CLOEXEC)) < 0) return -1;
  uint8_t *m = mmap(NULL, SY_TASKS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
  if (m == MAP_FAILED || !(s->by_tid = calloc(TIDS, sizeof *s->by_tid))) return -1;
  s->hdr = (void *)m, s->cpu = (void *)(m + SY_TASKS_CPU_OFF), s->task = (void *)(m + SY_TASKS_TASK_OFF);
  *s->hdr = (struct sy_tasks){.magic = SY_MAGIC, .abi = SY_ABI_VERSION, .watchdog_ns = 1000000000ull, .alive_ns = now_ns()};
  s->default_slice = get_attr(0, &a) ? 0 : a.runtime;
  return 0;
}
/* id 0: no tracepoint, but a look at who is on the CPU, so many times a second. */
static int open_event(int id, int cpu, int group, int loud, const char *filter) {
  struct perf_event_attr a = {.type = id ? PERF_TYPE_TRACEPOINT : PERF_TYPE_SOFTWARE, .size = sizeof a, .config = id ? (uint64_t)id : PERF_COUNT_SW_CPU_CLOCK, .sample_period = id ? 1 : LOOKS_HZ, .freq = !id, .exclude_idle = !id, .disabled = 1, .use_clockid = 1, .clockid = CLOCK_MONOTONIC,
                              .sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_CPU | PERF_SAMPLE_RAW, .wakeup_events = loud ? 1 : 0};
  int fd = (int)syscall(SYS_perf_event_open, &a, -1, cpu, group, PERF_FLAG_FD_CLOEXEC);
  if (fd >= 0 && filter && ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter)) return close(fd), -1;
  return fd;
}
/* All records are kept; bells ring for those only that can mean something: not for those about threads of our own priorities, or every reading would be the cause of the next. */
static int open_ring(struct sched *s, struct ring *r) {
  const struct sy_tracepoints *p = &s->tp;
  char on_switch[200], on_wake[60];
  int ours = 99 - SY_PRIORITY_OWN, all[MAX_PERF] = {p->switch_id, 0, p->wakeup_id, p->wakeup_new_id, p->fork_id, p->exec_id, p->exit_id, p->migrate_id, p->yield_id}, n = 9;
  for (int i = 0; i < p->ncalls && n < MAX_PERF; i++) all[n++] = p->call_id[i];
  for (int i = 0; i < n; i++) {
    if (all[i] < 0) continue; /* this kernel does not have it */
    int fd = open_event(all[i], r->cpu, -1, 0, NULL);
    if (fd < 0) return -1;
    r->fd[r->n++] = fd;
    if (r->n == 1) {
      void *m = mmap(NULL, (RING_PAGES + 1) * PS, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (m == MAP_FAILED) return -1;
      r->page = m;
    } else if (ioctl(fd, PERF_EVENT_IOC_SET_OUTPUT, r->fd[0])) return -1;
  }
  snprintf(on_switch, sizeof on_switch, "prev_prio > %d && prev_pid != 0 && (next_prio > %d || (prev_state != 0 && prev_state != 256))", ours, ours);
  snprintf(on_wake, sizeof on_wake, "prio > %d", ours);
  if ((r->bell[0] = open_event(p->switch_id, r->cpu, -1, 1, on_switch)) < 0) return -1;
  r->nbells = 1;
  if ((r->bell[1] = open_event(p->wakeup_id, r->cpu, r->bell[0], 1, on_wake)) < 0) return -1;
  r->nbells = 2;
  void *m = mmap(NULL, 2 * PS, PROT_READ | PROT_WRITE, MAP_SHARED, r->bell[0], 0);
  if (m == MAP_FAILED) return -1;
  r->bells = m;
  return ioctl(r->bell[1], PERF_EVENT_IOC_SET_OUTPUT, r->bell[0]);
}
static void close_ring(struct ring *r) {
  for (int k = 0; k < r->n; k++) close(r->fd[k]);
  for (int k = 0; k < r->nbells; k++) close(r->bell[k]);
  if (r->page) munmap(r->page, (RING_PAGES + 1) * PS);
  if (r->bells) munmap(r->bells, 2 * PS);
  *r = (struct ring){0};
}
/* When the first thread is given (under lock): that takes some milliseconds, but to close so many events takes the kernel the better part of a second, which nobody should wait
 * for at the end who schedules nothing. 0 or -errno. */
static int open_rings(struct sy_gateway *g) {
  struct sched *s = g->sched;
  for (int i = 0; i < s->ncpu && !s->have_thread; i++) {
    struct ring *r = &s->ring[s->nrings];
    r->cpu = i;
    if (open_ring(s, r)) {
      int e = errno;
      close_ring(r);
      if (e == ENODEV || e == ENXIO) { /* offline */
        s->cpu[i].state = 0;
        continue;
      }
      while (s->nrings) close_ring(&s->ring[--s->nrings]);
      return -e;
    }
    s->poll[s->nrings++] = (struct pollfd){.fd = r->bell[0], .events = POLLIN};
  }
  if (s->have_thread) return 0;
  s->poll[s->nrings] = (struct pollfd){.fd = s->poke, .events = POLLIN};
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's main thread */
  int e = pthread_create(&s->thread, NULL, rings_thread, g);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  s->have_thread = !e;
  while (e && s->nrings) close_ring(&s->ring[--s->nrings]);
  return -e;
}
int sy_gw_sched_start(struct sy_gateway *g, const struct sy_tracepoints *tp) {
  struct sched *s = g->sched;
  s->tp = *tp;
  s->ncpu = (int)sysconf(_SC_NPROCESSORS_CONF);
  if (s->ncpu > SY_MAX_CPUS) s->ncpu = SY_MAX_CPUS;
  s->ring = calloc((size_t)s->ncpu, sizeof *s->ring), s->poll = calloc((size_t)s->ncpu + 1, sizeof *s->poll);
  s->poke = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (!s->ring || !s->poll || s->poke < 0) return -errno;
  for (int i = 0; i < s->ncpu; i++) {
    char p[64], online = '1'; /* (the first has no such file: it always is) */
    snprintf(p, sizeof p, "/sys/devices/system/cpu/cpu%d/online", i);
    int fd = open(p, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, &online, 1) != 1) online = '1';
    if (fd >= 0) close(fd);
    s->cpu[i].state = online == '0' ? 0 : SY_CPU_ONLINE, s->cpu[i].seqnum = 1;
  }
  int fd = open_event(0, 0, -1, 0, NULL); /* may we at all? */
  return fd < 0 ? -errno : close(fd);
}
static void sched_stop(struct sy_gateway *g) {
  struct sched *s = g->sched;
  if (!s) return;
  __atomic_store_n(&s->stopping, 1, __ATOMIC_RELEASE);
  wake_reader(s);
  if (s->have_thread) pthread_join(s->thread, NULL), s->have_thread = 0;
  if (!s->hdr) return;
  pthread_mutex_lock(&s->lock);
  if (s->nrings) {
    while (read_rings(g)) { /* whoever began last, too */
    }
    all_wait(g, 1);
  }
  pthread_mutex_unlock(&s->lock);
  for (int i = 0; s->ring && i < s->ncpu; i++) close_ring(&s->ring[i]);
  s->nrings = 0;
  char path[128];
  snprintf(path, sizeof path, "%s/tasks", g->run_dir);
  unlink(path); /* nobody has to be put right any more */
}
