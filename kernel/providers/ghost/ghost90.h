/* ABI 90's and 91's payloads where 84 differs; sources and rest: ghost.h. The headers of 90 and 91 differ in their number only. */
struct ghost_msg_payload_task_new {
  uint64_t gtid; uint64_t parent_gtid; uint64_t runtime; uint16_t runnable; int nice; struct ghost_sw_info sw_info;
  uint64_t agent_data; /* of BPF programs */
};
struct ghost_msg_payload_task_dead { uint64_t gtid; int cpu; };
struct ghost_msg_payload_cpu_tick { int cpu; int is_agent; /* the tick hit an agent */ };
