/* The gateway's C half, as Python sees it (cffi reads this file too: declarations only). Every function may be called from
 * any thread and takes the gateway's lock itself; none calls back into Python. Calls run without the GIL. */
struct sy_gateway;

/* Creates RAM, tables and the socket <run_dir>/gateway.sock. ram_bytes is divided evenly over nodes, in 4 MiB pieces.
 * NULL on failure, with a sentence in err. */
struct sy_gateway *sy_gw_new(const char *run_dir, uint64_t ram_bytes, uint32_t nodes, char *err, size_t errlen);
/* Starts the threads: server (registrations, exits, urgent refills, notifications), drain (channels), populate. 0 or -errno. */
int sy_gw_start(struct sy_gateway *gw);
/* Stops the threads and releases everything; programs that still run keep their memory and go on natively. */
void sy_gw_stop(struct sy_gateway *gw);

uint32_t sy_gw_frames(struct sy_gateway *gw);       /* of RAM */
int sy_gw_event_fd(struct sy_gateway *gw);          /* readable when events wait */
int sy_gw_urgent_fd(struct sy_gateway *gw);         /* … and there is one among them that a component should see now */
int sy_gw_header_fd(struct sy_gateway *gw);         /* read-only descriptors of the tables, for this process's own use */
int sy_gw_frames_fd(struct sy_gateway *gw);
int sy_gw_heat_fd(struct sy_gateway *gw);
int sy_gw_slots_fd(struct sy_gateway *gw);
/* Takes up to max events, in order, seqnum ascending by one (a jump = events were lost). Number taken. */
int sy_gw_events(struct sy_gateway *gw, struct sy_msg *out, int max);
/* Appends one event from Python (COMPONENT_UP, TEST, …). */
void sy_gw_post(struct sy_gateway *gw, const struct sy_msg *m);
/* Appends n TEST events as fast as it can: vpage counts, arg is the monotonic nanosecond of each. For measuring the bus. */
void sy_gw_post_test(struct sy_gateway *gw, uint32_t n);

/* Carries out n operations for one component; fills ops[i].result. Number COMPLETE. */
int sy_gw_commit(struct sy_gateway *gw, uint32_t component, struct sy_op *ops, int n);

/* Where the fields of the kernel's sched tracepoints are in their records, in bytes; id -1: the kernel does not have it. calls: the ends of system calls about attributes. */
struct sy_tracepoints {
  int switch_id, wakeup_id, wakeup_new_id, fork_id, exec_id, exit_id, migrate_id, yield_id, ncalls, call_id[12];
  uint16_t prev_pid, prev_state, next_pid, next_prio, wake_pid, wake_cpu, parent_pid, child_pid, exec_pid, exec_old_pid, exit_pid, migrate_pid, migrate_cpu;
};
/* From here on sched may have threads. After sy_gw_start. 0 or -errno. */
int sy_gw_sched_start(struct sy_gateway *gw, const struct sy_tracepoints *tp);
/* A process, with all its threads, and whatever they start. 0, -ENOSYS (sy_gw_sched_start was not called), -ESRCH, -EPERM (not that one), -EINVAL (SCHED_DEADLINE), -ENOSPC; or why the kernel's
 * events cannot be read, which begins with the first. */
int sy_gw_sched_add(struct sy_gateway *gw, uint32_t pid);
int sy_gw_sched_remove(struct sy_gateway *gw, uint32_t pid);
/* What sched handles: bit type - 64 of a task's messages, 32 + type - 128 of a CPU's; and microseconds between two CPU_TICK, 0: none. */
void sy_gw_sched_words(struct sy_gateway *gw, uint64_t wanted, uint32_t tick_us);
void sy_gw_sched_watchdog(struct sy_gateway *gw, uint64_t ns);
int sy_gw_tasks_fd(struct sy_gateway *gw);
/* Gives the threads that a file "tasks" names their own attributes again, if whoever wrote it was killed. Number, or -errno. */
int sy_sched_restore(const char *path);

/* What happens when nothing is left: enum sy_oom. NATIVE until this is called. */
void sy_gw_set_oom(struct sy_gateway *gw, uint32_t oom);
/* 1: programs may map more than RAM and swap hold. */
void sy_gw_set_overcommit(struct sy_gateway *gw, uint32_t on);
/* Where pages go that leave RAM: a file made anew, readable by root only, behind so many frames of compressed pages at most. Before
 * sy_gw_start. 0 or -errno. */
int sy_gw_set_swap(struct sy_gateway *gw, const char *path, uint64_t bytes, uint32_t pool_frames);
/* A node's watermarks, in frames: min <= low <= high <= half of the node. 0, -ENOENT or -EINVAL. */
int sy_gw_set_watermarks(struct sy_gateway *gw, uint32_t node, uint32_t min, uint32_t low, uint32_t high);
/* A user beside root whose programs may join; before sy_gw_start. 0, or -1: SY_MAX_USERS are admitted already. */
int sy_gw_admit(struct sy_gateway *gw, uint32_t uid);
/* Asks an address space to turn native; its end (MM_EXIT) follows. 0 or -ESRCH. */
int sy_gw_release(struct sy_gateway *gw, uint32_t asid);

/* The access monitor's hands. sample: of the n MAPPED frames pfn[i] those that may be are taken away for a touch to show, as by AGE, unless they have been
 * already; those that are stay in pfn, barrier says as of when. Number. look: were they touched? touched NULL: not if they are as sample left them. What has
 * changed since (barrier NULL: what is not MAPPED) has no look. Number that was touched; *looked is out. window: ends one, HEAT_READY follows. */
uint32_t sy_gw_sample(struct sy_gateway *gw, uint32_t *pfn, uint32_t *barrier, uint32_t n);
uint32_t sy_gw_look(struct sy_gateway *gw, const uint32_t *pfn, const uint32_t *barrier, const uint8_t *touched, uint32_t n, uint32_t source, uint32_t *looked);
void sy_gw_monitor(struct sy_gateway *gw, const struct sy_monitor *m);
/* Before sy_gw_start: which node each of n CPUs is near, the nodes' distances (SY_MAX_NODES a row), and the machine's node whose memory each shall have, -1 for any.
 * 0 or -errno. */
int sy_gw_set_topology(struct sy_gateway *gw, const uint8_t *cpu_node, uint32_t n, const uint8_t *distance, const int *kernel_node);
/* Nanoseconds that a cache line takes from one CPU to another; -1: errno says why. Takes 2 s at most. */
double sy_probe_latency(int cpu_a, int cpu_b, uint32_t rounds);
/* The pool's caches, in ascending order of size: SY_SLAB_CACHES of them. */
int sy_gw_slabinfo(struct sy_gateway *gw, struct sy_slab_info *out);
int sy_gw_as_list(struct sy_gateway *gw, struct sy_as_info *out, int max);
/* Blocks held in the reserve, per order 0..10. */
void sy_gw_reserve_levels(struct sy_gateway *gw, uint32_t *levels);
/* Wanted size of the reserve, in blocks per order; RESERVE_LOW is sent below half of it. */
void sy_gw_reserve_targets(struct sy_gateway *gw, const uint32_t *targets);
/* Marks below which an address space's stub sends MAGAZINE_LOW, per order 0..9. asid 0 = default for new ones. */
int sy_gw_set_low(struct sy_gateway *gw, uint32_t asid, uint32_t order, uint32_t low);
int sy_gw_set_fault_order(struct sy_gateway *gw, uint32_t asid, uint32_t order, uint32_t max_order);

/* Drains every channel, then verifies invariants 1 and 2. Writes one line per violation to text; number of violations. */
int sy_gw_check(struct sy_gateway *gw, char *text, size_t len);
void sy_gw_heartbeat(struct sy_gateway *gw, uint32_t component, uint32_t pid, uint32_t state, uint32_t restarts);
