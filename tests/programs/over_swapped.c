/* Things that meet pages in the store. usage: over_swapped WHAT. Prints the address of three pages, and goes on when a line comes: by then
 * the test has moved the first to the store and had the second taken away for a look; the third stays. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GAP (64 << 10)
static char *page[3];
static struct timespec soon(int s) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_sec += s;
  return t;
}
static void swapped(void) {
  char b;
  ++*(volatile char *)(page[1] + 4095); /* or it would be away still */
  dprintf(1, "%p\n", (void *)page[0]);
  if (read(0, &b, 1) != 1) exit(3);
}

static void core(void) {
  for (int i = 0; i < 3; i++) sprintf(page[i], "secret number %d of the crashed", i * 111); /* (no such text in the program) */
  swapped();
  abort();
}
static void looked_at(void) {
  for (int i = 0; i < 3; i++) sprintf(page[i], "page %d", i);
  swapped(), swapped();
  printf("%s, %s, %s\n", page[0], page[1], page[2]);
}

static volatile int handled;
static void handler(int s, siginfo_t *i, void *c) {
  char here;
  (void)i, (void)c;
  handled = s * (&here > page[0] - GAP && &here < page[0] + 4096);
}
static void calls(void) {
  int p[2];
  char b[16] = "";
  struct sigaction sa = {.sa_sigaction = handler, .sa_flags = SA_ONSTACK | SA_SIGINFO};
  stack_t alt = {.ss_sp = page[0] - GAP + 4096, .ss_size = GAP};
  memcpy(page[0], "0123456789abcde", 16);
  if (pipe(p) || sigaction(SIGUSR1, &sa, NULL) || sigaltstack(&alt, NULL)) exit(2);
  swapped();
  printf("write(2): %zd", write(p[1], page[0] + 2, 8));
  printf(", %zd \"%s\"\n", read(p[0], b, 8), b);
  swapped();
  printf("read(2): %zd, \"%s\"\n", (write(p[1], "XYZ", 3), read(p[0], page[0] + 4, 3)), page[0]);
  swapped();
  raise(SIGUSR1);
  printf("alternate stack: %d\n", handled);
}
static void *exits_above(void *m) {
  strcpy(page[0] + 100, "of the thread"), memcpy(page[0] + 2048, &m, sizeof m);
  swapped();
  return page[0] + 100;
}
static void stack(void) { /* that of a thread, in the arena, is in the store while the thread waits, and when it ends */
  pthread_attr_t a;
  pthread_t t;
  void *r;
  pthread_attr_init(&a);
  pthread_attr_setstack(&a, page[0] - GAP, GAP + 4096);
  pthread_create(&t, &a, exits_above, NULL);
  pthread_join(t, &r);
  printf("joined: %s\n", (char *)r);
}

static pthread_mutex_t *robust(void *at, int shared) {
  pthread_mutexattr_t a;
  pthread_mutexattr_init(&a), pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
  if (shared) pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(at, &a);
  return at;
}
static const char *inherits(pthread_mutex_t *m) {
  struct timespec t = soon(3);
  int r = pthread_mutex_timedlock(m, &t);
  return r ? strerror(r) : "locked";
}
static int up[2], down[2];
static void *owns(void *m) {
  char b;
  pthread_mutex_lock(m);
  if (write(up[1], "x", 1) != 1 || read(down[0], &b, 1) != 1) exit(2);
  return NULL;
}
static void owner_ends(void) { /* a thread with a robust mutex in each page */
  pthread_t t[3];
  char b;
  if (pipe(up) || pipe(down)) exit(2);
  for (int i = 0; i < 3; i++)
    if (pthread_create(&t[i], NULL, owns, robust(page[i], 0)) || read(up[0], &b, 1) != 1) exit(2);
  swapped();
  if (write(down[1], "xxx", 3) != 3) exit(2);
  for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
  for (int i = 0; i < 3; i++) printf("%s%s", inherits((void *)page[i]), i < 2 ? ", " : "\n");
}
static void process_ends(void) { /* one in each page, and below them, in the kernel's list, one shared with another process */
  pthread_mutex_t *m = robust(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 1);
  char b;
  if (pipe(up)) exit(2);
  if (!fork()) {
    close(up[1]);
    b = (char)read(up[0], &b, 1); /* until the other has ended */
    printf("%d %s\n", b, inherits(m)), fflush(stdout);
    _exit(0);
  }
  pthread_mutex_lock(m);
  for (int i = 0; i < 3; i++) pthread_mutex_lock(robust(page[i], 0));
  swapped();
  raise(SIGKILL);
}

static int flag;
static void *waits(void *word) {
  struct timespec t = {5, 0};
  while (!__atomic_load_n((int *)word, __ATOMIC_ACQUIRE))
    if (syscall(SYS_futex, word, FUTEX_WAIT | flag, 0, &t, NULL, 0) && errno == ETIMEDOUT) return "lost";
  return "woken";
}
static void futexes(void) {
  for (flag = 0; flag <= FUTEX_PRIVATE_FLAG; flag += FUTEX_PRIVATE_FLAG) {
    pthread_t t[3];
    void *r;
    for (int i = 0; i < 3; i++) memset(page[i], 0, 4096), pthread_create(&t[i], NULL, waits, page[i] + 8 + flag);
    usleep(100000);
    swapped();
    for (int i = 0; i < 3; i++) __atomic_store_n((int *)(void *)(page[i] + 8 + flag), 1, __ATOMIC_RELEASE), syscall(SYS_futex, page[i] + 8 + flag, FUTEX_WAKE | flag, 1, NULL, NULL, 0);
    for (int i = 0; i < 3; i++) pthread_join(t[i], &r), printf("%s%s", (char *)r, i < 2 ? ", " : "\n");
  }
}

int main(int argc, char **argv) {
  static const struct { const char *name; void (*fn)(void); } what[] = {{"core", core}, {"looked_at", looked_at}, {"calls", calls}, {"stack", stack}, {"owner_ends", owner_ends}, {"process_ends", process_ends}, {"futexes", futexes}};
  char *m = mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(m, 1, 4 << 20);
  for (int i = 0; i < 3; i++) page[i] = m + (i + 1) * (1 << 20);
  for (unsigned i = 0; argc > 1 && i < sizeof what / sizeof *what; i++)
    if (!strcmp(what[i].name, argv[1])) what[i].fn();
  return 0;
}
