/* gateway, part: how far two CPUs are from each other, by a cache line that both write in turn. */
struct probe { uint32_t turn __attribute__((aligned(128))); uint32_t rounds; int cpu[2], failed; double ns; };
struct probe_side { struct probe *p; uint32_t me; };
static void *probe_side(void *arg) {
  struct probe_side *s = arg;
  struct probe *p = s->p;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((unsigned)p->cpu[s->me], &set);
  if (pthread_setaffinity_np(pthread_self(), sizeof set, &set)) __atomic_store_n(&p->failed, 1, __ATOMIC_SEQ_CST);
  for (uint64_t i = 0, began = now_ns(), end = began + 2000000000ull; i < p->rounds && !__atomic_load_n(&p->failed, __ATOMIC_RELAXED);) {
    if (__atomic_load_n(&p->turn, __ATOMIC_ACQUIRE) != s->me) {
      if (now_ns() > end) __atomic_store_n(&p->failed, 1, __ATOMIC_SEQ_CST); /* the other one does not run */
      for (int k = 0; k < 1000 && __atomic_load_n(&p->turn, __ATOMIC_ACQUIRE) != s->me; k++) __builtin_ia32_pause();
      continue;
    }
    if (i == 0) began = now_ns();
    __atomic_store_n(&p->turn, !s->me, __ATOMIC_RELEASE);
    if (++i == p->rounds && !s->me) p->ns = (double)(now_ns() - began) / (2.0 * (double)i);
  }
  return NULL;
}
double sy_probe_latency(int a, int b, uint32_t rounds) {
  double best = -1;
  for (int tries = 0; tries < 5; tries++) { /* the least: others only make it longer */
    struct probe p = {.rounds = rounds, .cpu = {a, b}};
    struct probe_side s[2] = {{&p, 0}, {&p, 1}};
    pthread_t t[2];
    if (a < 0 || b < 0 || a >= CPU_SETSIZE || b >= CPU_SETSIZE || a == b) return errno = EINVAL, -1;
    if (pthread_create(&t[0], NULL, probe_side, &s[0])) return -1;
    if (pthread_create(&t[1], NULL, probe_side, &s[1])) p.failed = 1, t[1] = t[0];
    pthread_join(t[0], NULL);
    if (t[1] != t[0]) pthread_join(t[1], NULL);
    if (p.failed) return errno = EINVAL, -1;
    if (best < 0 || p.ns < best) best = p.ns;
  }
  return best;
}
