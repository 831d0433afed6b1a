/* What a ghOSt kernel shares with user space, ABI versions 84, 90 and 91: what is the same in all three. The payloads that differ are in ghost84.h and ghost90.h.
 *
 * Names, order and types of the fields are ghOSt's; the sources, all read, of github.com/google/ghost-userspace (BSD-style licence):
 *   84  kernel/ghost_uapi.h        at commit 8c5d1146ddb52d73a451f6d3e37c033f05deb78e
 *   90  abi/90/kernel/ghost.h      at commit 8a44ebdc3ea94445dcbcdc518db0baa55fd9960e
 *   91  abi/latest/kernel/ghost.h  at commit 9ca0a1fb6ed88f0c4b0b40a5a35502938efa567f
 * Not declared: what only BPF programs see (bpf_ghost_msg, bpf_ghost_sched, …), the gtid look-up by system call.
 *
 * abi.py reads this file through cffi, which knows no attributes: it takes GHOST_ALIGNED off and applies it to the size. tests/test_ghost_provider.py
 * has a C compiler read it, too, and compares. `char` flags are int8_t here and the enum in ghost_msg_src is uint32_t: the same bytes, as numbers. */
#define GHOST_ALIGNED(n) __attribute__((__aligned__(n)))

/* ---- ioctls on an enclave's ctl; abi.py has their numbers ---- */
enum ghost_type { GHOST_AGENT = 0, GHOST_TASK = 1 };
struct ghost_msg_src { uint32_t type; uint64_t arg; }; /* a task: arg is its gtid; an agent: its CPU */
struct ghost_sw_info { uint32_t id; uint32_t index; }; /* region of status words, place in it */
struct ghost_ioc_sw_get_info { struct ghost_msg_src request; struct ghost_sw_info response; };
struct ghost_ioc_create_queue { int elems; int node; int flags; uint64_t mapsize; }; /* mapsize comes back, in bytes */
struct ghost_ioc_assoc_queue { int fd; struct ghost_msg_src src; uint32_t barrier; int flags; };
struct ghost_ioc_set_default_queue { int fd; };
struct ghost_agent_wakeup { int cpu; int prio; }; /* prio is 0 */
struct ghost_ioc_config_queue_wakeup { int qfd; struct ghost_agent_wakeup *w; int ninfo; int flags; };
struct ghost_ioc_get_cpu_time { int64_t gtid; uint64_t runtime; };
struct ghost_ioc_commit_txn { void *mask_ptr; uint32_t mask_len; int flags; }; /* a cpu_set_t and its size in bytes */
struct timerfd_ghost { int cpu; int flags; uint64_t type; uint64_t cookie; };
struct ghost_ioc_timerfd_settime { int timerfd; int flags; void *in_tmr; void *out_tmr; struct timerfd_ghost timerfd_ghost; };
struct ghost_ioc_run { int64_t gtid; uint32_t agent_barrier; uint32_t task_barrier; int run_cpu; int run_flags; };
enum { GHOST_MAX_WINFO = 2, GHOST_MAX_QUEUE_ELEMS = 65536 };
/* What ASSOC_QUEUE returns: it was this queue already; TASK_NEW has not been sent yet. */
enum { GHOST_ASSOC_SF_ALREADY = 1 << 0, GHOST_ASSOC_SF_BRAND_NEW = 1 << 1 };

/* ---- status words: sw_regions/sw_N, mapped read-only ---- */
struct ghost_sw_region_header {
  uint32_t version; uint32_t id; uint32_t numa_node;
  uint32_t start;     /* bytes from here to the first word */
  uint32_t capacity; uint32_t available; /* words */
} GHOST_ALIGNED(64);
struct ghost_status_word {
  uint32_t barrier; uint32_t flags; uint64_t gtid;
  int64_t switch_time; /* when the task came onto its CPU, ns */
  uint64_t runtime;    /* on CPUs so far, ns */
} GHOST_ALIGNED(32);
enum {
  GHOST_SW_F_INUSE = 1 << 0, GHOST_SW_F_CANFREE = 1 << 1, GHOST_SW_F_ALLOCATED = 1 << 2,
  GHOST_SW_CPU_AVAIL = 1 << 8, GHOST_SW_BOOST_PRIO = 1 << 9, /* an agent's */
  GHOST_SW_TASK_ONCPU = 1 << 16, GHOST_SW_TASK_RUNNABLE = 1 << 17, GHOST_SW_TASK_IS_AGENT = 1 << 18, GHOST_SW_TASK_MSG_GATED = 1 << 19
};

/* ---- queues: header, then at `start` a ring of slots as large as struct ghost_msg ---- */
struct ghost_queue_header { uint32_t version; uint32_t start; uint32_t nelems; } GHOST_ALIGNED(64);
struct ghost_msg { uint16_t type; uint16_t length; uint32_t seqnum; }; /* length: bytes with payload, which follows; seqnum: barrier of its source */
struct ghost_ring { uint32_t head; uint32_t tail; uint32_t overflow; }; /* the slots follow; the kernel writes head and overflow, the agent tail */
enum { GHOST_SW_REGION_VERSION = 0, GHOST_QUEUE_VERSION = 0, GHOST_TXN_VERSION = 0 };
enum {
  MSG_NOP = 0,
  MSG_TASK_DEAD = 64, MSG_TASK_BLOCKED, MSG_TASK_WAKEUP, MSG_TASK_NEW, MSG_TASK_PREEMPT, MSG_TASK_YIELD, MSG_TASK_DEPARTED, MSG_TASK_SWITCHTO,
  MSG_TASK_AFFINITY_CHANGED, MSG_TASK_ON_CPU, MSG_TASK_PRIORITY_CHANGED, MSG_TASK_LATCH_FAILURE,
  MSG_CPU_TICK = 128, MSG_CPU_TIMER_EXPIRED, MSG_CPU_NOT_IDLE, MSG_CPU_AVAILABLE, MSG_CPU_BUSY, MSG_CPU_AGENT_BLOCKED, MSG_CPU_AGENT_WAKEUP
};
/* Payloads. runtime: ns on CPUs so far. cpu_seqnum: counts what happened on that CPU. */
struct ghost_msg_payload_task_preempt {
  uint64_t gtid; uint64_t runtime; uint64_t cpu_seqnum; uint64_t agent_data; int cpu; int8_t from_switchto; int8_t was_latched;
};
struct ghost_msg_payload_task_yield { uint64_t gtid; uint64_t runtime; uint64_t cpu_seqnum; uint64_t agent_data; int cpu; int8_t from_switchto; };
struct ghost_msg_payload_task_blocked { uint64_t gtid; uint64_t runtime; uint64_t cpu_seqnum; int cpu; int8_t from_switchto; };
struct ghost_msg_payload_task_departed { uint64_t gtid; uint64_t cpu_seqnum; int cpu; int8_t from_switchto; int8_t was_current; };
struct ghost_msg_payload_task_affinity_changed { uint64_t gtid; };
struct ghost_msg_payload_task_priority_changed { uint64_t gtid; int nice; };
struct ghost_msg_payload_task_wakeup { uint64_t gtid; uint64_t agent_data; int8_t deferrable; int last_ran_cpu; int wake_up_cpu; int waker_cpu; };
struct ghost_msg_payload_task_switchto { uint64_t gtid; uint64_t runtime; uint64_t cpu_seqnum; int cpu; };
struct ghost_msg_payload_task_on_cpu { uint64_t gtid; uint64_t commit_time; uint64_t cpu_seqnum; int cpu; };
struct ghost_msg_payload_task_latch_failure { uint64_t gtid; int errno; };
struct ghost_msg_payload_cpu_not_idle { int cpu; uint64_t next_gtid; };
struct ghost_msg_payload_timer { int cpu; uint64_t type; uint64_t cookie; };
struct ghost_msg_payload_cpu_available { int cpu; };
struct ghost_msg_payload_cpu_busy { int cpu; };
struct ghost_msg_payload_agent_blocked { int cpu; };
struct ghost_msg_payload_agent_wakeup { int cpu; };

/* ---- transactions: cpu_data, one page a CPU ---- */
struct ghost_txn {
  int32_t version; int32_t cpu; int32_t state; /* < 0: committed; a CPU: claimed by it; READY */
  uint32_t agent_barrier; uint32_t task_barrier;
  uint16_t run_flags; uint8_t commit_flags; uint8_t unused;
  int64_t gtid; int64_t commit_time; /* ns */
  uint64_t cpu_seqnum;
  int32_t sync_group_owner; /* -1: nobody; in ghOSt's header the one member of a union u */
} GHOST_ALIGNED(64);
struct ghost_cpu_data { struct ghost_txn txn; } GHOST_ALIGNED(4096);
enum ghost_txn_state {
  GHOST_TXN_COMPLETE = -2147483647 - 1, GHOST_TXN_ABORTED, GHOST_TXN_TARGET_ONCPU, GHOST_TXN_TARGET_STALE, GHOST_TXN_TARGET_NOT_FOUND,
  GHOST_TXN_TARGET_NOT_RUNNABLE, GHOST_TXN_AGENT_STALE, GHOST_TXN_CPU_OFFLINE, GHOST_TXN_CPU_UNAVAIL, GHOST_TXN_INVALID_FLAGS,
  GHOST_TXN_INVALID_TARGET, GHOST_TXN_NOT_PERMITTED, GHOST_TXN_INVALID_CPU, GHOST_TXN_NO_AGENT, GHOST_TXN_UNSUPPORTED_VERSION, GHOST_TXN_POISONED,
  GHOST_TXN_READY = 2147483647
};
enum { GHOST_NULL_GTID = 0, GHOST_AGENT_GTID = -1, GHOST_IDLE_GTID = -2 }; /* instead of a task's: nobody, the CPU's agent, idle */
/* run_flags */
enum {
  RTLA_ON_PREEMPT = 1 << 0, RTLA_ON_BLOCKED = 1 << 1, RTLA_ON_YIELD = 1 << 2, RTLA_ON_IDLE = 1 << 5, NEED_L1D_FLUSH = 1 << 6,
  NEED_CPU_NOT_IDLE = 1 << 7, ELIDE_PREEMPT = 1 << 9, SEND_TASK_ON_CPU = 1 << 10, DEFER_LATCHED_PREEMPTION_BY_AGENT = 1 << 11, DO_NOT_PREEMPT = 1 << 12
};
/* commit_flags */
enum {
  COMMIT_AT_SCHEDULE = 1 << 0, COMMIT_AT_TXN_COMMIT = 1 << 1, ALLOW_TASK_ONCPU = 1 << 2, ELIDE_AGENT_BARRIER_INC = 1 << 3,
  INC_AGENT_BARRIER_ON_FAILURE = 1 << 4
};
