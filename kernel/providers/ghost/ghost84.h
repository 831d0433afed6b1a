/* ABI 84's payloads where 90 differs; source and rest: ghost.h. */
struct ghost_msg_payload_task_new {
  uint64_t gtid; uint64_t parent_gtid; uint64_t runtime; uint16_t runnable; int nice; struct ghost_sw_info sw_info;
};
struct ghost_msg_payload_task_dead { uint64_t gtid; };
struct ghost_msg_payload_cpu_tick { int cpu; };
