/* The Sylvie ABI: the one definition of messages, transactions, table layouts and states.
 *
 * C includes this file; Python reads it through cffi (kernel/abi/__init__.py), so it holds only declarations that cffi's
 * parser understands: numeric #define lines, enums, structs. Nobody retypes a number from here.
 *
 * Vocabulary: a pfn is the global number of a 4 KiB frame of an enclave (node after node); a vpage is a page's index in the
 * arena of one address space (vpage 0 lies at SY_ARENA_START); an asid names one registered address space.
 */
#define SY_ABI_VERSION 1
#define SY_MAGIC 0x5953564c

#define SY_PAGE_SHIFT 12
#define SY_PAGE_SIZE 4096
#define SY_MAX_ORDER 10
#define SY_HUGE_ORDER 9
#define SY_MAX_NODES 8
#define SY_MAX_CPUS 1024
/* A zone is what has watermarks: a node (its number), or a limit on the frames of a program and all that it starts (SY_MAX_NODES and up). */
#define SY_MAX_LIMITS 24
#define SY_MAX_ZONES 32
#define SY_LEAST_LIMIT 1024          /* frames */
#define SY_NO_FRAME 0xffffffff

/* The arena: the range of every managed address space that the stub keeps. */
#define SY_ARENA_START 0x500000000000
#define SY_ARENA_SIZE 0x1000000000
#define SY_ARENA_PAGES 16777216
/* Its first quarter holds the brk heap, the rest what mmap returns. */
#define SY_BRK_PAGES 4194304
#define SY_CHUNK_PAGES 512
#define SY_CHUNKS 32768

/* The sixth argument of a system call that the stub itself makes: such calls pass the seccomp filter. For calls that use
 * all six arguments (mmap of a file) the mark is in the unused upper half of the flags argument. */
#define SY_MARK 0x53594c56

/* ---- messages (stub or gateway -> components), ghOSt's header first ---- */
enum sy_msg_type {
  SY_MSG_NOP = 0,
  /* Tasks and CPUs, by ghOSt's numbers (include/uapi/linux/ghost.h); they come as struct sy_task_msg. Every one of a task moves its barrier. */
  SY_MSG_TASK_DEAD = 64,
  SY_MSG_TASK_BLOCKED = 65,
  SY_MSG_TASK_WAKEUP = 66,    /* cpu = where it will run, last_cpu = where it ran, waker_cpu */
  SY_MSG_TASK_NEW = 67,       /* runnable; parent: in its status word */
  SY_MSG_TASK_PREEMPT = 68,   /* one that was to run, by something that is not ours; or by RUN of another */
  SY_MSG_TASK_YIELD = 69,     /* one that was to run called sched_yield */
  SY_MSG_TASK_DEPARTED = 70,  /* it is not ours any more; its attributes are as it set them */
  SY_MSG_TASK_SWITCHTO = 71,  /* never sent: there is no such call in stock Linux */
  SY_MSG_TASK_AFFINITY_CHANGED = 72, /* by itself, or somebody for it; its status word has it */
  SY_MSG_TASK_ON_CPU = 73,    /* asked for by SY_RUN_SEND_ON_CPU */
  SY_MSG_TASK_PRIORITY_CHANGED = 74, /* nice, or the policy */
  SY_MSG_CPU_TICK = 128,      /* every so often (see the words of sched), for each CPU on which one of ours is */
  SY_MSG_CPU_TIMER_EXPIRED = 129, /* runtime = the cookie of TIMER */
  SY_MSG_CPU_NOT_IDLE = 130,  /* it was idle, and something that is not ours runs there */
  SY_MSG_CPU_AVAILABLE = 131, /* what was chosen for it has blocked, or gone; or what kept it BUSY has */
  SY_MSG_CPU_BUSY = 132,      /* something more important than whatever may be chosen runs there */
  /* the memory group */
  SY_MSG_MM_NEW = 192,        /* asid; arg = pid */
  SY_MSG_MM_EXIT = 193,       /* asid; arg = pid. All its frames have been freed (PAGE_FREED came before) */
  SY_MSG_MM_FORK = 194,       /* asid = parent; arg = the child's pid */
  SY_MSG_MM_EXEC = 195,       /* asid = the new address space; arg = pid; vpage = old asid */
  SY_MSG_MM_MMAP = 196,       /* vpage, npages; arg = prot */
  SY_MSG_MM_MUNMAP = 197,     /* vpage, npages */
  SY_MSG_MM_MREMAP = 198,     /* vpage, npages = new; arg = old vpage */
  SY_MSG_MM_MADVISE = 199,    /* vpage, npages; arg = advice */
  SY_MSG_PAGE_FAULT = 200,    /* vpage; arg = userfaultfd flags: a fault the stub could not settle */
  SY_MSG_PAGE_MAPPED = 201,   /* vpage, pfn, order, npages = 1 << order */
  SY_MSG_PAGE_FREED = 202,    /* pfn, npages: frames that are FREE again. From the stub also vpage */
  SY_MSG_PAGE_HINT = 203,     /* asid, vpage, pfn: touched after AGE took it away, and mapped again where it was; arg = 1 + the CPU that did, 0: not known */
  SY_MSG_PAGE_SWAPPED = 204,  /* asid, vpage, npages; pfn = the frames they leave; those that are FREE now PAGE_FREED names, the others are GRANTED to asid again; arg = first slot */
  SY_MSG_PAGE_REFAULT = 205,  /* asid, vpage, pfn = where it is now; arg = pages swapped out since it left: its refault distance */
  SY_MSG_PAGE_COW = 206,      /* asid, vpage, pfn, npages: a write to SHARED frames, which were those from arg on, has made copies */
  SY_MSG_MAGAZINE_LOW = 207,  /* asid, order; npages = level (blocks left); arg = blocks consumed so far */
  SY_MSG_WATERMARK = 208,     /* node = zone; npages = frames FREE there, or left of that limit; arg: 0 below min, 1 below low, 2 above high again */
  SY_MSG_OOM = 209,           /* nothing is left. asid, arg = pid, npages = frames mapped: who was ended for it; or arg 0: asid goes native */
  SY_MSG_PRESSURE = 210,
  SY_MSG_HEAT_READY = 211,    /* npages = frames that the window looked at; arg = its number: the heat array has them */
  SY_MSG_COMPONENT_UP = 212,  /* arg = component id */
  SY_MSG_COMPONENT_LOST = 213,/* arg = component id */
  SY_MSG_OVERFLOW = 214,      /* asid; arg = messages lost in its channel so far */
  SY_MSG_FRAMES_ONLINE = 215, /* pfn, npages: populated, now FREE */
  SY_MSG_RESERVE_LOW = 216,   /* order; npages = blocks of that order left in the gateway's reserve */
  SY_MSG_FRAMES_TAKEN = 217,  /* pfn, order, npages: the gateway's own first-fit allocator took FREE frames; asid or 0 */
  SY_MSG_PAGE_MOVED = 218,    /* stub -> gateway: mremap; pfn, npages; vpage = new */
  SY_MSG_MM_RELEASE = 220,    /* asid; arg = the system call that needs it, or 0: asked for. The address space turns native */
  SY_MSG_SLOT_FREED = 221,    /* stub -> gateway: vpage, npages, arg = first slot: unmapped while swapped out (pfn none), or fetched into frame pfn */
  SY_MSG_SLOT_MOVED = 222,    /* stub -> gateway: vpage = new, arg = slot: mremap */
  SY_MSG_PAGE_PREFETCHED = 223, /* asid, vpage, pfn = where it is now; arg as of PAGE_REFAULT: PREFETCH has brought it back */
  SY_MSG_PAGE_MIGRATED = 224, /* asid, vpage, npages, order; pfn = where it is now; arg = where it was. PAGE_MAPPED and PAGE_FREED have come before */
  SY_MSG_PAGE_COLLAPSED = 225,/* asid, vpage, npages, order; pfn = the block that it is now; arg = pages that there were before: the others are zero */
  SY_MSG_MOVE_REFUSED = 226,  /* asid, vpage, npages, order; pfn = where it still is, or none: a COLLAPSE, or a SPLIT (order below 9); arg = errno */
  SY_MSG_PAGE_SHARED = 227,   /* stub -> gateway: vpage, npages; pfn: as MERGE wanted, these frames of its own may be shared now */
  SY_MSG_PAGE_MERGED = 228,   /* asid, vpage, npages, order; pfn = the SHARED frames that they are in; arg = where they were: FREE now, or the same */
  SY_MSG_MERGE_REFUSED = 229, /* asid, vpage, npages, order; pfn = where they still are; arg = errno. EILSEQ: they differ */
  SY_MSG_PAGE_SPLIT = 230,    /* asid, vpage, npages, pfn: a block, as before; the kernel maps it in pieces of 2^order now */
  SY_MSG_TEST = 219           /* arg is free: for measurement of the bus */
};

/* One message, 40 bytes. seqnum counts per source in a channel, and over all events once the gateway has published it. */
struct sy_msg {
  uint16_t type;
  uint16_t length;   /* of the whole message, bytes */
  uint32_t seqnum;
  uint32_t asid;
  uint32_t pfn;
  uint64_t vpage;
  uint32_t npages;
  uint16_t order;
  uint16_t node;
  uint64_t arg;
};

/* A message of a task or CPU, in the place of a struct sy_msg. barrier: the task's after it, ghOSt's sequence number of its source; cpu_seqnum: its CPU's. */
struct sy_task_msg {
  uint16_t type;
  uint16_t length;
  uint32_t seqnum;
  uint64_t gtid;
  uint64_t runtime;   /* ns on a CPU so far; WAKEUP: CLOCK_MONOTONIC when it happened */
  uint32_t barrier;
  uint32_t cpu_seqnum;
  int16_t cpu;
  int16_t last_cpu;   /* WAKEUP; else the same as cpu */
  int16_t waker_cpu;  /* WAKEUP; else -1 */
  int8_t nice;        /* NEW, PRIORITY_CHANGED */
  uint8_t runnable;   /* NEW, PREEMPT, YIELD: 1; BLOCKED, DEAD: 0 */
};

/* ---- tasks: threads that sched schedules. File <run dir>/tasks, mode 0600: the gateway writes it, under its task lock, components have it
 * read-only. It is a file so that whoever comes after a gateway that was killed finds what each thread's attributes were. ---- */
#define SY_MAX_TASKS 8192
enum sy_task_flags {
  SY_TF_ON_CPU = 1,      /* … or interrupted by a thread of our own, which takes microseconds */
  SY_TF_RUNNABLE = 2,    /* … or running */
  SY_TF_CHOSEN = 4,      /* by RUN, and it holds: runs by SCHED_FIFO; else it waits, with the attributes that it set itself */
  SY_TF_STANDING = 8,    /* … also after it blocks */
  SY_TF_TOUCHED = 16,    /* its attributes may not be its own */
  SY_TF_SEND_ON_CPU = 32
};
/* ghOSt's status word, and what a thread has set itself. gtid: tid << 41 | start time in clock ticks; 0: not in use, written last when it begins. Times: CLOCK_MONOTONIC ns. */
#define SY_GTID_SHIFT 41
struct sy_task {
  uint64_t gtid;
  uint32_t tid;
  uint32_t pid;
  uint32_t asid;         /* its address space; 0: not managed */
  uint32_t barrier;      /* messages about it so far */
  uint32_t flags;        /* enum sy_task_flags */
  int32_t cpu;           /* that it is on, or was last; -1: not known */
  int32_t run_cpu;       /* CHOSEN: for which CPU, SY_ANY_CPU as -1 */
  uint32_t rank;         /* CHOSEN: among those chosen, 0 the least */
  uint64_t runtime;      /* ns on a CPU, without what has passed since switch_ns if it is on one */
  uint64_t switch_ns;    /* when it last came onto, or left, a CPU */
  uint64_t wake_ns;      /* when it last became runnable */
  uint64_t wake_runtime; /* its runtime then */
  uint64_t parent;       /* gtid of who started it, 0: was found */
  int32_t own_policy;    /* what it has set itself: policy, nice, real-time priority, SCHED_RESET_ON_FORK, CPUs */
  int32_t own_nice;
  uint32_t own_priority;
  uint32_t own_reset;
  uint64_t own_slice;    /* … and sched_runtime of a policy that is not real-time, 0: the kernel's default */
  uint64_t looking_ns;   /* it, or somebody for it, is in a system call about its attributes since then: they are its own meanwhile; 0: no */
  uint64_t looker;       /* … which thread */
  uint64_t since_ns;     /* when it was taken in (CLOCK_BOOTTIME) */
  uint64_t own_mask[16];
};
struct sy_cpu {
  uint64_t chosen;       /* gtid; 0: nothing */
  uint32_t seqnum;       /* messages about it so far, and of tasks there: ghOSt's cpu_seqnum, and the agent's barrier */
  uint32_t state;        /* enum sy_cpu_state */
  uint64_t on;           /* gtid of a task that is ON_CPU there, 0: none */
  uint64_t pad[5];
};
enum sy_cpu_state { SY_CPU_ONLINE = 1, SY_CPU_IDLE = 2, SY_CPU_BUSY = 4 };
struct sy_tasks {
  uint32_t magic;
  uint32_t abi;
  uint32_t top;          /* entries from here on were never in use */
  uint32_t count;        /* in use */
  uint64_t records;      /* of the kernel's rings that were read */
  uint64_t messages;     /* made of them */
  uint64_t lost;         /* records that the rings had no room for */
  uint64_t resyncs;
  uint64_t runs;         /* RUN that were carried out */
  uint64_t refused;
  uint64_t fallbacks;    /* times that the watchdog let all wait again */
  uint64_t full;         /* threads that had no room here */
  uint64_t alive_ns;     /* when sched last committed or said that it lives */
  uint64_t watchdog_ns;
};
#define SY_TASKS_CPU_OFF 4096
#define SY_TASKS_TASK_OFF 69632
#define SY_TASKS_BYTES 2166784
/* RUN: arg = gtid, pfn = CPU or SY_ANY_CPU (any that it may use), barrier = the task's, asid = the CPU's seqnum, 0: whatever it is; order = flags. It runs by SCHED_FIFO before all
 * that waits there; what had been chosen for that CPU waits. gtid 0: nothing is chosen there any more. WAIT: it waits again, wherever it was to run. It holds until it blocks, unless
 * STANDING. SYNC: all of such operations that follow one another, or none (POISONED). */
#define SY_ANY_CPU 0xffffffff
#define SY_RUN_STANDING 1
#define SY_RUN_SYNC 2
#define SY_RUN_ALLOW_ONCPU 4         /* ghOSt's ALLOW_TASK_ONCPU: also one that was chosen for another CPU */
#define SY_RUN_SEND_ON_CPU 8
#define SY_RUN_ELIDE_PREEMPT 16      /* no TASK_PREEMPT for what had been chosen there */
#define SY_RUN_WAIT 32
#define SY_RUN_RANK_SHIFT 8
#define SY_RUN_RANKS 8
#define SY_RUN_FLAGS 0x73f
/* TIMER: CPU_TIMER_EXPIRED for CPU pfn after barrier microseconds, 0: not any more; arg = cookie. */
/* SCHED_FIFO priorities: rank 0 of what is chosen; then our own, which nothing chosen may keep waiting. */
#define SY_PRIORITY_RUN 2
#define SY_PRIORITY_OWN 20           /* sched itself, and above it: */
#define SY_PRIORITY_RELAY 21         /* the gateway's Python thread, while there is a sched */
#define SY_PRIORITY_DRAIN 22
#define SY_PRIORITY_RINGS 30         /* who reads the kernel's rings */

/* ---- frames ---- */
enum sy_frame_state {
  SY_FRAME_OFFLINE = 0,  /* not populated yet */
  SY_FRAME_FREE = 1,
  SY_FRAME_GRANTED = 2,  /* in asid's magazine (or in its hand) */
  SY_FRAME_MAPPED = 3,   /* in asid's page table at vpage */
  SY_FRAME_ISOLATED = 4, /* between two states: the gateway is at work on it */
  SY_FRAME_SHARED = 5,   /* in one or more page tables, refcount, and written by nobody. Merged: owned by none. Since a fork: owned by one of them */
  SY_FRAME_RESERVED = 6, /* held for the gateway's own use */
  SY_FRAME_PINNED = 7,
  SY_FRAME_STATES = 8
};
#define SY_FF_ZERO 1     /* content is known to be zero */
#define SY_FF_SLAB 8     /* RESERVED: holds compressed pages */
#define SY_FF_STANDBY 16 /* MAPPED: chosen to leave when memory is short */
#define SY_FF_MERGEABLE 64 /* MAPPED: the program asked for it by MADV_MERGEABLE, there or nearby */
#define SY_FF_SHARING 128 /* MAPPED: told to share, and its stub has not answered yet */
#define SY_FF_TARGET 32  /* GRANTED: what MIGRATE or COLLAPSE is to fill; its stub has not answered yet */
#define SY_FF_AGED 4     /* taken away by AGE and not touched since: Linux's page without an accessed bit */
#define SY_FF_SWAPPING 2 /* on its way out: taken away from the program, or about to be, and not stored yet */

/* Frame table entry: Linux's struct page, ghOSt's status word. Writer: the gateway only, under its lock. Readers see each
 * field whole (aligned); a decision is validated by the barrier, which changes with every change of the entry. */
struct sy_frame {
  uint8_t state;
  uint8_t order;      /* of the block that it was granted or reserved in; or, MAPPED, in which it is mapped: see SPLIT; taking it away makes that 0 */
  uint8_t node;
  uint8_t flags;
  uint32_t refcount;  /* page-table words that name it */
  uint32_t asid;      /* owner; 0 = none */
  uint32_t barrier;
  uint64_t vpage;     /* reverse map: where the owner has it */
  uint64_t phys;      /* physical page frame number of the machine, 0 = not known */
  uint32_t limit;     /* the zone of its owner's limit; 0 = none */
  uint32_t run;       /* SWAPPING: which of its owner's runs told it to leave */
  uint32_t parted;    /* 1: MAPPED again after a fork, by who is left; its stub has not been told (SY_CMD_OWN) */
  uint32_t pad;
  uint64_t reserved[2];
};

/* ---- heat: is a frame's page in use? ---- */
enum sy_heat_source { SY_HEAT_NONE = 0, SY_HEAT_HINT = 1, SY_HEAT_PAGE_IDLE = 2, SY_HEAT_DAMON = 3, SY_HEAT_TRACE = 4 };
/* What the access monitor has seen of the page in a frame, one for each frame. A look says whether the page was touched within one window of
 * time; all zero when it has not been looked at since it came here. HINT looks at single pages, the others at the folios of the RAM file (2 MiB as a
 * rule): then one touch warms all frames of the folio. */
struct sy_heat {
  uint8_t seen;   /* a bit a look, the latest in bit 7: touched */
  uint8_t looks;  /* how many of these bits count, at most 8 */
  uint8_t source; /* of the latest look */
  uint8_t window; /* … and the number of its window, mod 256 */
};
/* The monitor; in the enclave header. */
struct sy_monitor {
  uint32_t source;    /* that it uses; NONE: it does not run */
  uint32_t windows;   /* ended so far */
  uint32_t active;    /* 1: looking; 0: nobody needs it now */
  uint32_t looked;    /* frames that the last window looked at */
  uint32_t touched;   /* … of which were in use */
  uint32_t cost_ppm;  /* CPU time of the last windows, its own and what it made programs spend, as millionths of one core */
  uint32_t limit_ppm; /* … that it keeps within */
  uint32_t window_ms; /* length of the last */
};

/* ---- page table words ---- */
enum sy_pte_state {
  SY_PTE_NONE = 0,
  SY_PTE_PRESENT = 1,
  SY_PTE_LOCKED = 2,     /* somebody is at work on this page; whoever unlocks with CONTENDED set must wake it */
  SY_PTE_SWAPPED = 3,    /* taken away. HASFRAME: the frame still holds the content (Linux's swap cache); else the pfn field is a slot */
  SY_PTE_SHARED_RO = 4,  /* write-protected, in a SHARED frame; or in a MAPPED one that was (parted) */
  SY_PTE_NATIVE = 5      /* backed by the kernel's own anonymous memory (no frame could be had) */
};
#define SY_PTE_STATE_MASK 0xf
#define SY_PTE_STALE 0x10      /* the kernel's mapping here still names an old frame offset (registered, no entry) */
#define SY_PTE_CONTENDED 0x20  /* a fault met LOCKED and was left waiting */
#define SY_PTE_HASFRAME 0x40   /* LOCKED: the pfn field is valid */
#define SY_PTE_MLOCKED 0x100   /* mlock: must not leave RAM. Written by the stub, under its mm_lock */
#define SY_PTE_FORKED 0x200    /* SHARED_RO: mapped as before the fork, shared and write-protected; without it the mapping is private. NATIVE, of a child
                                * that is just joining: what was in its parent's store */
#define SY_PTE_PFN_SHIFT 12

/* ---- shared memory of one address space, written by its stub (memfd "as", mode 0600) ---- */
#define SY_CHANNEL_SLOTS 8192
/* Bounded queue, many producers (program and service threads), one consumer (gateway). A producer reserves by
 * compare-and-swap on head when slot.turn == head, writes msg, then stores turn = position + 1 (release). The consumer reads
 * when turn == position + 1 (acquire) and stores turn = position + SLOTS (release). Full: the producer adds 1 to overflow and goes
 * on; the gateway then resynchronises from the page table. */
struct sy_slot { uint64_t turn; struct sy_msg msg; };
struct sy_channel {
  uint64_t head;
  uint64_t pad0[7];
  uint64_t overflow;
  uint32_t seqnum;
  uint32_t pad1;
  uint64_t pad2[6];
  struct sy_slot slots[SY_CHANNEL_SLOTS];
};
#define SY_SERVICE_THREADS 2
#define SY_HANDS 3                   /* who takes blocks from a magazine: the fault threads, and the command thread for PREFETCH */
/* Completion of a command: id = the command's id once done. */
struct sy_cmd_done { uint64_t id; int64_t result; };
#define SY_CMD_SLOTS 64
#define SY_UNKNOWN_CHILD 0xffffffff
struct sy_as_ctl {
  uint32_t magic;
  uint32_t abi;
  uint32_t mag_head[16];            /* per order: blocks taken from the magazine so far (free-running) */
  uint32_t in_hand[SY_HANDS]; /* block being mapped: pfn; SY_NO_FRAME = none. Written before mag_head moves */
  uint32_t in_hand_order[SY_HANDS];
  uint32_t fork_active;
  uint32_t fork_done;               /* futex: the child has copied */
  uint32_t mag_low_sent;            /* bit per order: MAGAZINE_LOW sent, not refilled since */
  uint32_t fork_child;              /* its number, from before it runs; 0: there is none yet; SY_UNKNOWN_CHILD */
  uint64_t faults;
  uint64_t pages_mapped;            /* pages with a frame now */
  uint64_t pages_native;            /* arena pages that went native for want of frames */
  uint64_t mag_empty;               /* faults that had to ask the gateway */
  uint64_t brk_pages;
  uint64_t mmap_hi;                 /* vpages above this were never used */
  uint64_t pages_swapped;           /* pages taken away: in the store, or on the way */
  uint64_t forks;                   /* begun so far; moves after fork_active, see SY_CMD_OWN */
  uint64_t pages_committed;         /* what the program may write: Linux's Committed_AS, of one program */
  struct sy_cmd_done done[SY_CMD_SLOTS];
};
/* Layout of the memfd: ctl at 0; chunk map; channel; page table. */
#define SY_AS_CTL_OFF 0
#define SY_AS_CHUNKS_OFF 8192        /* uint8_t[SY_CHUNKS]: chunk has ever had a non-zero page-table word */
#define SY_AS_CHANNEL_OFF 40960
#define SY_AS_ADVICE_OFF 524288      /* uint8_t[SY_CHUNKS]: what the program advised for it, enum sy_advice. Written by the stub under its mm_lock */
#define SY_AS_PTE_OFF 1048576        /* uint64_t[SY_ARENA_PAGES] */
#define SY_AS_BYTES 135266304

/* Bits. HUGE: MADV_HUGEPAGE of all of it; SMALL: MADV_NOHUGEPAGE of some of it. */
enum sy_advice { SY_ADVICE_HUGE = 1, SY_ADVICE_SMALL = 2, SY_ADVICE_MERGE = 4 /* MADV_MERGEABLE of some of it */ };

/* ---- shared memory of one address space, written by the gateway (memfd "mag", the stub has it read-only) ---- */
#define SY_STORE_WAITERS 3           /* the fault threads, and the command thread */
#define SY_MAG_SLOTS 512             /* blocks a ring of one order holds; power of two */
/* RELEASE: everything in the arena becomes native memory, and what comes later too; the service threads end. */
enum sy_cmd_op { SY_CMD_NOP = 0, SY_CMD_SYSCALL = 1, SY_CMD_PING = 2, SY_CMD_RELEASE = 3, SY_CMD_EVICT = 4, SY_CMD_PREFETCH = 5, SY_CMD_MOVE = 6, SY_CMD_SHARE = 7, SY_CMD_OWN = 8, SY_CMD_REMAP = 9 };
/* EVICT: args = from, to: of the runs evict[from % RUNS] to evict[(to - 1) % RUNS], what is still there as said, and not locked, is taken away;
 * result = pages. PREFETCH: args = vpage, n: of these pages those that are in the store come back, while blocks are ready; result = pages.
 * MOVE: args = vpage, n <= SY_CHUNK_PAGES within a chunk, pfn, from, most: these pages are mapped in the frames from pfn on, with the content that they have.
 * from: where they must be now, one after the other; or SY_NO_FRAME: anywhere, and at most `most` may be untouched. result = pages that there were, or -errno:
 * nothing has changed. SHARE: args = vpage, n, to, from: these pages, which must be in the frames from `from` on, share those from `to` on, if they hold the same
 * (SHARED, or to = from). result as of MOVE. OWN: args = vpage, n, pfn: of these pages those that are SHARED_RO in the frames from pfn on are the program's alone
 * again; result = pages. args[3] = ctl.forks when that was decided: if another has begun since, -EAGAIN, as they may be shared again.
 * REMAP: args = vpage, n = SY_CHUNK_PAGES, pfn, -, order: these pages, which must be in the frames from pfn on, stay there
 * and are mapped in pieces of 2^order; result = n, or as of MOVE. */
#define SY_EVICT_RUNS 2048
#define SY_FETCH_PAGES 32            /* of one FETCH, at most */
#define SY_FETCH_BYTES 131072
struct sy_run { uint32_t vpage; uint32_t pfn; uint32_t n; uint32_t flag; }; /* pages in a row, in frames in a row; flag: the gateway's */
struct sy_cmd { uint64_t id; uint32_t op; uint32_t nr; uint64_t args[6]; };
/* Ring of one order: the gateway writes slot[tail % SLOTS], then tail (release); the stub takes slot[head % SLOTS] by moving
 * mag_head in its own memory by compare-and-swap. */
struct sy_mag_ring { uint32_t tail; uint32_t low; uint32_t slot[SY_MAG_SLOTS]; };
struct sy_mag {
  uint32_t magic;
  uint32_t abi;
  uint32_t asid;
  uint32_t fault_order;              /* order the stub takes at a first touch */
  uint32_t fault_order_max;          /* up to which it may grow for a sequential toucher */
  uint32_t refill_seq;               /* futex: moves after each answer to an urgent request */
  uint32_t no_frames;                /* the last urgent request found nothing: go native */
  uint32_t cmd_tail;
  struct sy_cmd cmd[SY_CMD_SLOTS];
  struct sy_mag_ring ring[10];       /* orders 0..9 */
  uint32_t store_seq[SY_STORE_WAITERS];   /* futex: moves after each answer to SWAPIN or FETCH of that waiter */
  uint32_t store_error[SY_STORE_WAITERS]; /* errno of that answer, 0 = done */
  uint8_t chunk_order[SY_CHUNKS];    /* FAULT_ORDER of a range: 1 + the order for first touches in this chunk; 0: as fault_order says */
  struct sy_run evict[SY_EVICT_RUNS];
  uint8_t fetched[SY_FETCH_BYTES];   /* what the last FETCH asked for: page i of its range at i * SY_PAGE_SIZE, where it was in the store */
};
#define SY_MAG_BYTES 225280

/* ---- enclave header (memfd "header": gateway writes, everybody else has it read-only) ---- */
struct sy_node { uint32_t base; uint32_t frames; };   /* first pfn, number */
struct sy_component { uint32_t id; uint32_t pid; uint64_t heartbeat_ns; uint32_t state; uint32_t restarts; };
#define SY_MAX_COMPONENTS 8
/* Frames FREE on a node: below low WATERMARK is sent, and what stands by leaves until there are high. standby: frames that kswapd has chosen
 * for that (some may have been touched since, and stay). When none is left the gateway reclaims by itself: below min if there is no kswapd, and
 * when a program waits. */
/* A limit: frames that its members may own, GRANTED and MAPPED; 0: not in use. `free` of its zone is what is left. */
struct sy_limit { uint32_t frames; uint32_t members; };
struct sy_watermarks { uint32_t min; uint32_t low; uint32_t high; uint32_t free; uint32_t standby; };
struct sy_header {
  uint32_t magic;
  uint32_t abi;
  uint32_t nodes;
  uint32_t frames;
  struct sy_node node[SY_MAX_NODES];
  uint32_t gateway_pid;
  uint32_t gateway_asleep;           /* 1: ring the doorbell after appending to a channel */
  uint32_t populated;                /* frames that are no longer OFFLINE */
  uint32_t default_fault_order;
  uint32_t default_fault_order_max;
  uint32_t event_seq;                /* last sequence number given to an event (wraps) */
  uint32_t oom;                      /* enum sy_oom */
  uint32_t overcommit;               /* 1: no program's mappings are added up */
  uint64_t events_lost;              /* the gateway's own event ring was full */
  uint64_t counters[40];             /* enum sy_counter */
  struct sy_component component[SY_MAX_COMPONENTS];
  struct sy_watermarks watermark[SY_MAX_ZONES];
  struct sy_limit limit[SY_MAX_LIMITS];
  uint32_t slots;                    /* of the swap store, pages; 0 = none */
  uint32_t slots_used;
  uint32_t pool_max;                 /* frames that compressed pages may take */
  uint32_t pool_frames;              /* … and take now */
  struct sy_monitor monitor;
  uint8_t cpu_node[SY_MAX_CPUS];     /* the node that a CPU is near; see kernel/topology.py */
  uint8_t distance[64];              /* from node a to node b, at a * SY_MAX_NODES + b: 10 = here, as ACPI has it */
};
#define SY_HEADER_BYTES 4096
/* When a page is touched and nothing is left: its program gets native memory; or, as Linux does it, the program with the most frames
 * is ended (and a mapping larger than the enclave is refused). */
enum sy_oom { SY_OOM_NATIVE = 0, SY_OOM_KILL = 1 };
/* One page in the swap store; an array of these is a memfd that the gateway writes, and stubs and components read. out: pages swapped out before it,
 * and the barrier of a slot: no other page has it. While a page-table word names a slot it
 * stays as it is, so a stub may fetch the page by itself from the RAM file: size bytes (an LZ4 block; 8: a word that is repeated) at offset from
 * frame pfn on. size 0: zeros. size SY_PAGE_SIZE: in the swap file, which only the gateway has; pfn and offset are a sum of it. */
struct sy_stored { uint32_t asid; uint32_t vpage; uint32_t out; uint32_t pfn; uint32_t offset; uint32_t size; };
#define SY_PACKED_MAX 3264           /* what does not get smaller than this is not worth it */
#define SY_SLAB_CACHES 23
struct sy_slab_info { uint32_t active; uint32_t objects; uint32_t size; uint32_t slabs; uint32_t frames; };
/* The bell: one page that all stubs and the gateway share. A producer that finds header.gateway_asleep set adds 1 and does
 * FUTEX_WAKE (shared): no descriptor is needed. Garbage in it costs the gateway a wake-up at most: it looks every 50 ms anyway. */
struct sy_bell { uint32_t rung; };
#define SY_BELL_BYTES 4096
#define SY_MAX_USERS 64 /* beside root, whose programs may join */
/* Bytes that must stay available to the machine when memory turns native. */
#define SY_MACHINE_KEEPS 67108864
enum sy_counter {
  SY_CNT_REGISTERED = 0, SY_CNT_EXITED = 1, SY_CNT_URGENT = 2, SY_CNT_FIRST_FIT = 3, SY_CNT_GRANTS = 4,
  SY_CNT_REFUSED = 5, SY_CNT_BAD_CLAIMS = 6, SY_CNT_NOTIFICATIONS = 7, SY_CNT_CONTINUED = 8, SY_CNT_OVERFLOWS = 9,
  SY_CNT_ZEROED = 10, SY_CNT_RESYNCS = 11, SY_CNT_NO_FRAMES = 12, SY_CNT_FORKS = 13, SY_CNT_RELEASED = 14,
  SY_CNT_OOM_KILLS = 15, SY_CNT_DRAINED = 16, SY_CNT_BAD_HELLOS = 17,
  SY_CNT_SWAPPED_OUT = 18, SY_CNT_SWAPPED_IN = 19, SY_CNT_EVICTED_BY_GATEWAY = 20, SY_CNT_SWAP_CANCELLED = 21, SY_CNT_STORE_ERRORS = 22,
  SY_CNT_PREFETCHED = 23, SY_CNT_SAMPLED = 24, SY_CNT_MIGRATED = 25, SY_CNT_COLLAPSED = 26, SY_CNT_MOVES_REFUSED = 27,
  SY_CNT_MERGED = 28, SY_CNT_UNMERGED = 29 /* pages copied by a write to what was shared */, SY_CNT_FORK_SHARED = 30, SY_CNT_FORKS_PARTED = 31, SY_CNT_SPLIT = 32, SY_CNT_LOOKS = 33 /* calls about how a thread is scheduled */
};

/* ---- transactions (component -> gateway) ---- */
enum sy_op_code {
  SY_OP_GRANT = 1, SY_OP_RESERVE = 2, SY_OP_RELEASE = 3, SY_OP_RECLAIM = 4, SY_OP_AGE = 5, SY_OP_PREFETCH = 6,
  SY_OP_FAULT_ORDER = 7, SY_OP_COLLAPSE = 8, SY_OP_SPLIT = 9, SY_OP_MERGE = 10, SY_OP_MIGRATE = 11, SY_OP_RUN = 12,
  SY_OP_SET_POLICY_WORD = 13, SY_OP_TIMER = 14
};
/* RECLAIM with this as its arg: not now, but as soon as memory is short and unless it is touched before, in the order in which they were chosen. */
#define SY_RECLAIM_STANDBY 1
#define SY_RECLAIM_ZONE_SHIFT 32     /* of that arg: for which zone, the frame's node or its limit */
/* MIGRATE of a block of 2^order frames, MAPPED one after the other in one address space: arg = the node that it shall go to, or this and the first frame of
 * the FREE block that it shall be in. */
#define SY_MIGRATE_TO 0x100000000
/* COLLAPSE, order 9: frame pfn is MAPPED somewhere in the 512 aligned pages that are meant. arg = pages of them that may be untouched (Linux's
 * max_ptes_none), and this if only where the program asked for it (MADV_HUGEPAGE). Frames that are a block already, in pieces, stay where they are.
 * SPLIT into pieces of 2^order, below 9: frame pfn is MAPPED somewhere in a whole aligned block of 512, of pages that are one block, too; arg 0. */
#define SY_COLLAPSE_ADVISED 0x10000
/* MERGE of a block of 2^order frames, MAPPED one after the other in one address space: arg = the first of the frames that they shall share: SHARED, by at most
 * SY_MAX_SHARING pages each; or the same block: then it is there to be shared. */
#define SY_MAX_SHARING 256
/* FAULT_ORDER: order and, as arg, up to which it may grow for a sequential toucher; for an address space. Or with barrier = chunks, pfn = the first: for
 * first touches there, and arg is 0; SY_ORDER_DEFAULT: again as for the address space. */
#define SY_ORDER_DEFAULT 255
/* ghOSt's transaction states, as results. */
enum sy_result {
  SY_R_PENDING = 0, SY_R_COMPLETE = 1, SY_R_ABORTED = 2, SY_R_STALE = 3, SY_R_NOT_FOUND = 4, SY_R_NOT_PERMITTED = 5,
  SY_R_INVALID = 6, SY_R_FULL = 7, SY_R_BUSY = 8,
  /* of RUN; ghOSt's TARGET_STALE and TARGET_NOT_FOUND are STALE and NOT_FOUND */
  SY_R_TARGET_ONCPU = 9, SY_R_TARGET_NOT_RUNNABLE = 10, SY_R_AGENT_STALE = 11, SY_R_CPU_OFFLINE = 12, SY_R_CPU_UNAVAIL = 13, SY_R_INVALID_FLAGS = 14,
  SY_R_INVALID_TARGET = 15, SY_R_INVALID_CPU = 16, SY_R_POISONED = 17
};
enum sy_component_id { SY_C_NONE = 0, SY_C_BUDDY = 1, SY_C_KSWAPD = 2, SY_C_KSM = 3, SY_C_THP = 4, SY_C_AUTONUMA = 5, SY_C_SCHED = 6 };
/* uid that component id N runs as: BASE + N */
#define SY_COMPONENT_UID_BASE 64200
#define SY_PREFETCH_PAGES 32 /* neighbours that one command of a stub brings back */
/* One operation, 32 bytes. barrier = the barrier of frame[pfn] that the decision was made on. PREFETCH: of asid's page arg, which is in slot pfn, whose
 * `out` is the barrier; order 0. */
struct sy_op {
  uint16_t op;
  uint16_t order;
  uint32_t asid;
  uint32_t pfn;
  uint32_t barrier;
  uint64_t arg;
  uint32_t result;   /* out: enum sy_result */
  uint32_t pad;
};

/* ---- the Unix socket <run dir>/gateway.sock (SOCK_SEQPACKET) ---- */
enum sy_hello_kind { SY_HELLO_STUB = 1, SY_HELLO_KEEPER = 2, SY_HELLO_COMPONENT = 3, SY_HELLO_NEED_UFFD = 4, SY_HELLO_FORK = 5, SY_HELLO_SCHED = 6 /* the launcher: sched has this process, and all that it starts */ };
/* STUB: with the client's userfaultfd (no UFFDIO_API done on it: the gateway does it, EVENT_FORK needs privilege).
 * NEED_UFFD: the answer carries a descriptor of /dev/userfaultfd; the client goes on with STUB on the same socket.
 * KEEPER: with the seccomp listener and a one-page memfd (struct sy_keeper_page). COMPONENT: arg = component id. */
/* STUB: arg = frames of its limit, 0 for none; group names who shares it. FORK: as STUB, by a forked child before it runs; arg = its parent's asid, whose page table
 * it gets, all that is in frames SHARED_RO in both. */
#define SY_FORK_SHARES 256 /* pages in frames: a fork with fewer copies them, which is cheaper */
struct sy_hello { uint32_t magic; uint32_t abi; uint32_t kind; uint32_t arg; uint64_t group; };
enum sy_welcome_status { SY_W_OK = 0, SY_W_ABI = 1, SY_W_REFUSED = 2, SY_W_FULL = 3, SY_W_LIMITS = 4 /* no more of them, or a wrong one */ };
/* Descriptors that come with it. STUB: as, mag, header, bell (one page, struct sy_bell), slots, ram of node 0, 1, … COMPONENT: header, frames, heat, slots, tasks; ksm: also each node's ram, to read. */
struct sy_welcome { uint32_t magic; uint32_t abi; uint32_t status; uint32_t asid; uint32_t nodes; uint32_t pad; struct sy_node node[SY_MAX_NODES]; };
/* Afterwards, stub -> gateway. READY carries the service threads' ids (as the client sees them). */
/* RELEASED: nothing of the arena is mapped any more, the service threads are about to end; hanging up follows. */
/* SWAPIN: order = waiter, vpage, tids = n, pfn: the contents of the slots that n LOCKED words name into n GRANTED frames; the slots are free then.
 * FETCH: order = waiter, vpage, tids = pages: contents of the swapped pages of a range into mag.fetched. (Not to where the client says: who writes to its
 * memory may wait for it for ever.) */
enum sy_request_kind { SY_REQ_READY = 1, SY_REQ_REFILL = 2, SY_REQ_CMD_DONE = 3, SY_REQ_RELEASED = 4, SY_REQ_SWAPIN = 5, SY_REQ_FETCH = 6 };
struct sy_request { uint32_t kind; uint32_t order; uint64_t vpage; uint32_t tids[4]; };
/* A command is announced by FUTEX_WAKE (shared) on mag.cmd_tail. */
/* Keeper page: written by the gateway, so that the keeper can answer what a dead gateway left open. 0 = none. While it is full the gateway
 * takes no more: what the kernel still has the keeper can take. */
#define SY_KEEPER_INFLIGHT 512
struct sy_keeper_page { uint64_t inflight[SY_KEEPER_INFLIGHT]; };

/* ---- what the gateway reports about one address space (sylvie status) ---- */
struct sy_as_info {
  uint32_t asid; uint32_t pid; uint32_t state; uint32_t fault_order;
  uint64_t frames;        /* owned: granted + mapped */
  uint64_t mapped;        /* frames MAPPED */
  uint64_t native_pages;  /* arena pages that are native */
  uint64_t faults; uint64_t urgent; uint64_t overflow; uint64_t bad_claims;
  uint64_t brk_pages;
  uint64_t swapped;       /* pages in the store */
  uint32_t limit; uint32_t shared; /* zone of its limit, 0 = none; pages in SHARED frames */
  uint64_t committed;     /* pages that it may write, as its stub says */
  uint32_t mag_level[10]; /* blocks ready, per order */
  uint32_t pad[2];
};
