/* A server whose requests are short, but for a few, under an open-loop load: 99.5 % need 1 ms of CPU, 0.5 % need 100 ms; they arrive by a Poisson process.
 *
 *   dispersive [options] -- [PREFIX…]    starts the server as `PREFIX… dispersive --serve FD`, sends it requests, prints one line of JSON
 *
 * The server is an ordinary program: a pool of threads, each waiting on its semaphore. It makes no scheduling call; the kernel, or whatever PREFIX gives it to, schedules it.
 * Requests come from another process, through shared memory, so that whoever schedules the server does not schedule its clients: they are the same, and as important, in all runs.
 * A request's latency counts from when it was to arrive, not from when it was sent: a client that is late does not hide a server that is. One that found no thread free, or was
 * never answered, counts as endless. Equal seeds give equal arrivals. */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORKERS 4096
#define SHORT_MS 1.0
#define LONG_MS 100.0
#define LONG_SHARE 0.005
#define PATIENCE_S 60      /* for the server to start */
#define SETTLE_MS 300.0    /* so that its threads wait, and whoever schedules them knows them all */
#define GRACE_MS 10000.0   /* for the last answers */
struct request { double arrival, service, sent, done; }; /* ms; done 0: not yet; sent 0: not at all */
struct worker { sem_t work; uint32_t busy, request; char pad[64 - sizeof(sem_t) - 8]; };
struct shared {
  sem_t ready, stop, stopped;
  double cpu_ms;           /* that the server has used, from when it was ready */
  uint32_t workers;
  struct worker w[MAX_WORKERS];
  struct request r[];
};
static struct shared *m;
static double ms(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}
static void wait_on(sem_t *s) {
  while (sem_wait(s) && errno == EINTR) {
  }
}

/* ---- the server */
static void compute(double cpu_ms) {
  double until = ms(CLOCK_THREAD_CPUTIME_ID) + cpu_ms;
  uint64_t x = 88172645463325252ull;
  do
    for (int i = 0; i < 4000; i++) x ^= x << 13, x ^= x >> 7, x ^= x << 17; /* some 10 us between two looks at the clock */
  while (ms(CLOCK_THREAD_CPUTIME_ID) < until);
  __asm__ volatile("" : : "r"(x)); /* so that it is computed */
}
static void *work(void *arg) {
  struct worker *w = arg;
  for (;;) {
    wait_on(&w->work);
    struct request *r = &m->r[w->request];
    compute(r->service);
    double done = ms(CLOCK_MONOTONIC);
    __atomic_store(&r->done, &done, __ATOMIC_RELEASE);
    __atomic_store_n(&w->busy, 0, __ATOMIC_RELEASE);
  }
  return NULL;
}
static struct shared *map(int fd) {
  struct stat st;
  void *p = fstat(fd, &st) ? MAP_FAILED : mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (p == MAP_FAILED) perror("dispersive: shared memory"), exit(1);
  return p;
}
static int serve(int fd) {
  pthread_attr_t a;
  pthread_t t;
  m = map(fd);
  pthread_attr_init(&a), pthread_attr_setstacksize(&a, 64 << 10);
  for (uint32_t i = 0; i < m->workers; i++)
    if (pthread_create(&t, &a, work, &m->w[i])) return perror("dispersive: thread"), 1;
  double began = ms(CLOCK_PROCESS_CPUTIME_ID);
  sem_post(&m->ready);
  wait_on(&m->stop);
  m->cpu_ms = ms(CLOCK_PROCESS_CPUTIME_ID) - began;
  sem_post(&m->stopped);
  return 0;
}

/* ---- the load */
static int cmp(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
static double quantile(const double *sorted, size_t n, double q) { return n ? sorted[(size_t)((double)(n - 1) * q)] : NAN; }
static void number(const char *name, double v, const char *end) {
  if (isfinite(v)) printf("\"%s\": %.4f%s", name, v, end);
  else printf("\"%s\": null%s", name, end); /* endless */
}
static void latencies(const char *name, size_t n, int longs) {
  double *v = malloc((n + 1) * sizeof *v);
  size_t k = 0;
  if (!v) exit(1);
  for (size_t i = 0; i < n; i++)
    if ((m->r[i].service > SHORT_MS) == longs) v[k++] = m->r[i].done > 0 ? m->r[i].done - m->r[i].arrival : INFINITY;
  qsort(v, k, sizeof *v, cmp);
  printf("\"%s\": {\"n\": %zu, ", name, k);
  number("p50", quantile(v, k, .5), ", "), number("p99", quantile(v, k, .99), ", "), number("p999", quantile(v, k, .999), ", "), number("max", quantile(v, k, 1), "}, ");
  free(v);
}
static pid_t start(char **prefix, int fd, const char *self) {
  char *argv[64], number_of[16], program[4096];
  int n = 0;
  ssize_t len = readlink(self, program, sizeof program - 1);
  if (len < 0) return -1;
  program[len] = 0, snprintf(number_of, sizeof number_of, "%d", fd);
  for (; *prefix && n < 60; prefix++) argv[n++] = *prefix;
  argv[n++] = program, argv[n++] = (char *)(uintptr_t) "--serve", argv[n++] = number_of, argv[n] = NULL;
  pid_t parent = getpid(), pid = fork();
  if (pid) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  dup2(STDERR_FILENO, STDOUT_FILENO); /* ours is for the result */
  execvp(argv[0], argv);
  fprintf(stderr, "dispersive: %s: %s\n", argv[0], strerror(errno)), _exit(127);
}
static void wait_for(sem_t *s, pid_t server) {
  struct timespec t;
  for (int k = 0; k < 10 * PATIENCE_S; k++) {
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_nsec += 100000000, t.tv_sec += t.tv_nsec / 1000000000, t.tv_nsec %= 1000000000;
    if (!sem_timedwait(s, &t)) return;
    if (waitpid(server, NULL, WNOHANG) == server) break;
  }
  fprintf(stderr, "dispersive: the server does not answer\n");
  kill(server, SIGKILL), exit(1);
}
static void until(double when) {
  struct timespec t = {(time_t)(when / 1e3), (long)(fmod(when, 1e3) * 1e6)};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
  }
}
static uint64_t sum(const uint64_t *counters) {
  uint64_t s = 0;
  for (int i = 0; counters && i < 512; i++) s += __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
  return s;
}

int main(int argc, char **argv) {
  double load = .5, seconds = 10;
  int cpus = 2, workers = 200, priority = 0, c, serving = -1, counters_fd = -1;
  long seed = 1;
  const struct option options[] = {{"load", 1, 0, 'l'}, {"seconds", 1, 0, 's'}, {"cpus", 1, 0, 'c'}, {"workers", 1, 0, 'w'}, {"priority", 1, 0, 'p'}, {"seed", 1, 0, 'r'}, {"counters", 1, 0, 'k'}, {"serve", 1, 0, 'S'}, {0, 0, 0, 0}};
  while ((c = getopt_long(argc, argv, "+", options, NULL)) != -1) switch (c) {
      case 'l': load = atof(optarg); break;
      case 's': seconds = atof(optarg); break;
      case 'c': cpus = atoi(optarg); break;
      case 'w': workers = atoi(optarg); break;
      case 'p': priority = atoi(optarg); break;      /* SCHED_FIFO, for who sends the requests; 0: none */
      case 'r': seed = atol(optarg); break;
      case 'k': counters_fd = atoi(optarg); break;   /* a page of counters of batch.c: how far they get meanwhile */
      case 'S': serving = atoi(optarg); break;
      default: return 2;
    }
  if (serving >= 0) return serve(serving);
  if (load <= 0 || seconds <= 0 || cpus < 1 || workers < 1 || workers > MAX_WORKERS) return fprintf(stderr, "dispersive: out of range\n"), 2;

  /* all arrivals beforehand */
  double rate = load * cpus / (SHORT_MS * (1 - LONG_SHARE) + LONG_MS * LONG_SHARE); /* a ms */
  size_t most = (size_t)(rate * seconds * 1e3 * 1.2) + 1000, n = 0;
  int fd = memfd_create("dispersive", 0);
  if (fd < 0 || ftruncate(fd, (off_t)(sizeof *m + most * sizeof *m->r))) return perror("dispersive: shared memory"), 1;
  m = map(fd);
  m->workers = (uint32_t)workers;
  sem_init(&m->ready, 1, 0), sem_init(&m->stop, 1, 0), sem_init(&m->stopped, 1, 0);
  for (int i = 0; i < workers; i++) sem_init(&m->w[i].work, 1, 0);
  srand48(seed);
  for (double t = 0; n < most; n++) {
    if ((t += -log(1 - drand48()) / rate) > seconds * 1e3) break;
    m->r[n].arrival = t, m->r[n].service = drand48() < LONG_SHARE ? LONG_MS : SHORT_MS;
  }
  const uint64_t *counters = counters_fd < 0 ? NULL : mmap(NULL, 4096, PROT_READ, MAP_SHARED, counters_fd, 0);
  if (counters == MAP_FAILED) return perror("dispersive: counters"), 1;

  pid_t server = start(argv + optind, fd, "/proc/self/exe");
  if (server < 0) return perror("dispersive: start"), 1;
  wait_for(&m->ready, server);
  if (priority && sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = priority})) return perror("dispersive: priority"), kill(server, SIGKILL), 1;
  prctl(PR_SET_TIMERSLACK, 1ul);
  double began = ms(CLOCK_MONOTONIC) + SETTLE_MS, work_ms = 0;
  until(began);
  uint64_t counted = sum(counters);
  size_t drops = 0, unfinished = 0, sent = 0;
  for (size_t i = 0, next = 0; i < n; i++) {
    struct request *r = &m->r[i];
    r->arrival += began;
    until(r->arrival);
    int k = 0;
    while (k < workers && __atomic_load_n(&m->w[(next + (size_t)k) % (size_t)workers].busy, __ATOMIC_ACQUIRE)) k++;
    if (k == workers) {
      drops++;
      continue;
    }
    next = (next + (size_t)k) % (size_t)workers; /* in turn, so about the one that has waited longest, as it is with a queue of waiters */
    struct worker *w = &m->w[next];
    next++;
    w->request = (uint32_t)i, r->sent = ms(CLOCK_MONOTONIC);
    __atomic_store_n(&w->busy, 1, __ATOMIC_RELEASE);
    sem_post(&w->work);
    work_ms += r->service, sent++;
  }
  until(began + seconds * 1e3);
  counted = sum(counters) - counted;
  double *late = malloc((sent + 1) * sizeof *late), give_up = ms(CLOCK_MONOTONIC) + GRACE_MS;
  if (!late) return 1;
  sent = 0;
  for (size_t i = 0; i < n; i++) {
    struct request *r = &m->r[i];
    double done = 0;
    if (!(r->sent > 0)) continue;
    late[sent++] = r->sent - r->arrival;
    for (;;) {
      __atomic_load(&r->done, &done, __ATOMIC_ACQUIRE);
      if (done > 0 || ms(CLOCK_MONOTONIC) > give_up) break;
      until(ms(CLOCK_MONOTONIC) + 1);
    }
    unfinished += !(done > 0);
  }
  sem_post(&m->stop);
  wait_for(&m->stopped, server);
  waitpid(server, NULL, 0);
  qsort(late, sent, sizeof *late, cmp);
  printf("{\"load\": %g, \"seconds\": %g, \"cpus\": %d, \"workers\": %d, \"n\": %zu, ", load, seconds, cpus, workers, n);
  latencies("short", n, 0), latencies("long", n, 1);
  printf("\"drops\": %zu, \"unfinished\": %zu, \"work_ms\": %.3f, \"cpu_ms\": %.3f, \"iterations\": %lu, ", drops, unfinished, work_ms, m->cpu_ms, (unsigned long)counted);
  number("late_p99", quantile(late, sent, .99), "}\n");
  return 0;
}
