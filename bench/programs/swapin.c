/* A touch of one page that is elsewhere, median in microseconds. argv: "swapped" MIB: of pages in the swap store, with enough free frames.
 * "minimal": the least that a userfaultfd handler with one hop to another process can do: two threads, one a CPU, as Sylvie's; each fault's
 * content comes from the other process, which has it, by a futex there and one back. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "timing.h"

#define PS 4096ul
#define TOUCHES 4096
/* Half of each page is random, as reclaim.c has it. */
static void fill(uint64_t *page, uint64_t i) {
  static uint64_t seed = 88172645463325252ull;
  page[0] = i;
  for (int k = 1; k < 256; k++) page[k] = seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  for (int k = 256; k < 512; k++) page[k] = 0x6c6f77206f6c6c65ull + (uint64_t)(k % 16);
}
static int is_there(void *page) {
  unsigned char there = 1;
  mincore(page, PS, &there);
  return there & 1;
}
/* Touches pages that are not there, in an order that no read-ahead follows; wrong content ends it. */
static void touch(const uint64_t *m, size_t pages, const char *leave_out) {
  static double v[TOUCHES];
  size_t n = 0;
  for (size_t k = 0; k < pages && n < TOUCHES; k++) {
    size_t i = k * 7919 % pages;
    if ((leave_out && leave_out[i]) || is_there((void *)(m + i * 512))) continue;
    double t = now();
    uint64_t found = *(const volatile uint64_t *)(m + i * 512);
    v[n++] = now() - t;
    if (found != i) exit(1);
  }
  if (n < TOUCHES / 2) exit(1);
  printf("swapin_p50 %.3f\n", median(v, n));
}

static struct hop { uint32_t asked, answered; uint64_t index; char page[PS]; } *hop;
static int uffd;
static char *area;
static void futex(uint32_t *w, int op, uint32_t v) { syscall(SYS_futex, w, op, v, NULL, NULL, 0); }
static void urgent(void) {
  struct sched_param sp = {.sched_priority = 1};
  sched_setscheduler(0, SCHED_FIFO, &sp); /* as Sylvie's service threads, and the gateway's server */
}
static void *serve(void *arg) {
  struct hop *h = arg;
  urgent();
  for (uint32_t seen = 0;; seen++) {
    while (__atomic_load_n(&h->asked, __ATOMIC_ACQUIRE) == seen) futex(&h->asked, FUTEX_WAIT, seen);
    memcpy(h->page, area + h->index * PS, PS);
    __atomic_store_n(&h->answered, seen + 1, __ATOMIC_RELEASE);
    futex(&h->answered, FUTEX_WAKE, 1);
  }
  return NULL;
}
static void *handle(void *cpu) {
  struct hop *h = &hop[(size_t)cpu];
  cpu_set_t s;
  CPU_ZERO(&s);
  CPU_SET((size_t)cpu, &s);
  sched_setaffinity(0, sizeof s, &s);
  urgent();
  for (uint32_t n = 0;;) {
    struct uffd_msg m;
    if (read(uffd, &m, sizeof m) != sizeof m) continue;
    uint64_t a = m.arg.pagefault.address & ~(PS - 1);
    h->index = (a - (uintptr_t)area) / PS;
    __atomic_store_n(&h->asked, ++n, __ATOMIC_RELEASE);
    futex(&h->asked, FUTEX_WAKE, 1);
    while (__atomic_load_n(&h->answered, __ATOMIC_ACQUIRE) != n) futex(&h->answered, FUTEX_WAIT, n - 1);
    struct uffdio_copy c = {.dst = a, .src = (uintptr_t)h->page, .len = PS};
    ioctl(uffd, UFFDIO_COPY, &c);
  }
  return NULL;
}
static char *map(size_t n, int flags) {
  char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
  if (p == MAP_FAILED) perror("mmap"), exit(1);
  return p;
}

int main(int argc, char **argv) {
  pthread_t t;
  size_t pages = 2 * TOUCHES;
  if (argc == 3 && !strcmp(argv[1], "swapped") && atol(argv[2]) <= 4096) {
    pages = (size_t)atol(argv[2]) << 8;
    uint64_t *m = (uint64_t *)map(pages * PS, MAP_PRIVATE);
    for (size_t i = 0; i < pages; i++) fill(m + i * 512, i);
    /* What is in frames goes, so that there is room for the others; it is not measured. */
    static char gone[1 << 20];
    for (size_t i = 0; i < pages; i++)
      if ((gone[i] = (char)is_there(m + i * 512))) madvise(m + i * 512, PS, MADV_DONTNEED);
    usleep(500000);
    return touch(m, pages, gone), 0;
  }
  hop = (struct hop *)map(2 * sizeof *hop, MAP_SHARED);
  area = map(pages * PS, MAP_PRIVATE);
  for (size_t i = 0; i < pages; i++) fill((uint64_t *)(area + i * PS), i);
  pid_t parent = getpid(), server = fork();
  if (server == 0) {
    prctl(PR_SET_PDEATHSIG, 9);
    if (getppid() != parent) return 0;
    pthread_create(&t, NULL, serve, &hop[1]);
    serve(&hop[0]);
  }
  madvise(area, pages * PS, MADV_DONTNEED);
  madvise(area, pages * PS, MADV_NOHUGEPAGE);
  uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  struct uffdio_api api = {.api = UFFD_API};
  struct uffdio_register reg = {.range = {(uintptr_t)area, pages * PS}, .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (server < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg)) return perror("userfaultfd"), 1;
  for (size_t i = 0; i < 2; i++) pthread_create(&t, NULL, handle, (void *)i);
  usleep(20000);
  touch((uint64_t *)area, pages, NULL);
  return 0;
}
