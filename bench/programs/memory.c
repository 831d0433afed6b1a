/* What a program pays for memory. One line "name value" per measurement, microseconds.
 * usage: memory touch|random|mmap|malloc|minimal */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "timing.h"
#define PS 4096ul

static char *map(size_t n) {
  char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) exit(1);
  return p;
}
/* Median time of touching the pages of one area once, in a random order. */
static double random_touch(volatile char *p, size_t pages) {
  double *v = malloc(pages * sizeof *v);
  for (size_t i = 0; i < pages; i++) {
    size_t k = i * 7919 % pages;
    double t = now();
    p[k * PS] = 1;
    v[i] = now() - t;
  }
  double r = median(v, pages);
  free(v);
  return r;
}

/* The least that a userfaultfd handler can do: two threads, one a CPU, mapping one frame a fault. */
static int uffd, ram;
static size_t next_frame;
static void *handler(void *cpu) {
  cpu_set_t s;
  CPU_ZERO(&s);
  CPU_SET((size_t)cpu, &s);
  sched_setaffinity(0, sizeof s, &s);
  struct sched_param sp = {.sched_priority = 1};
  sched_setscheduler(0, SCHED_FIFO, &sp); /* as Sylvie's service threads */
  for (;;) {
    struct uffd_msg m;
    if (read(uffd, &m, sizeof m) != sizeof m) continue;
    uint64_t a = m.arg.pagefault.address & ~(PS - 1);
    size_t f = __atomic_fetch_add(&next_frame, 1, __ATOMIC_RELAXED);
    if (mmap((void *)a, PS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, ram, (off_t)(f * PS)) == MAP_FAILED) exit(1);
    struct uffdio_range w = {a, PS};
    ioctl(uffd, UFFDIO_WAKE, &w);
  }
  return NULL;
}
static double minimal(size_t pages) {
  ram = memfd_create("ram", 0);
  if (ftruncate(ram, (off_t)(pages * PS))) exit(1);
  char *r = mmap(NULL, pages * PS, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
  memset(r, 0, pages * PS);
  uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  struct uffdio_api api = {.api = UFFD_API};
  if (ioctl(uffd, UFFDIO_API, &api)) exit(1);
  char *p = map(pages * PS);
  struct uffdio_register reg = {.range = {(uintptr_t)p, pages * PS}, .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (ioctl(uffd, UFFDIO_REGISTER, &reg)) exit(1);
  pthread_t t;
  for (size_t i = 0; i < 2; i++) pthread_create(&t, NULL, handler, (void *)i);
  usleep(20000);
  return random_touch(p, pages);
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  size_t size = 512ul << 20, n = 8192;
  double t = 0;
  if (!strcmp(what, "touch")) {
    for (int r = 0; r < 3; r++) { /* the first on memory as it comes, the others on recycled memory */
      char *p = map(size);
      madvise(p, size, MADV_NOHUGEPAGE); /* native: 4 KiB pages; Sylvie decides by its own policy */
      t = now();
      for (size_t i = 0; i < size; i += PS) p[i] = 1;
      printf("%s %.4f\n", r ? "touch_recycled" : "touch_first", (now() - t) / (double)(size / PS));
      munmap(p, size);
    }
  } else if (!strcmp(what, "random")) {
    char *p = map(n * PS * 16); /* far enough apart that the pages stay single in either case */
    madvise(p, n * PS * 16, MADV_NOHUGEPAGE);
    printf("random_p50 %.3f\n", random_touch(p, n));
  } else if (!strcmp(what, "minimal")) {
    printf("random_p50 %.3f\n", minimal(n));
  } else if (!strcmp(what, "mmap")) {
    for (int touch = 0; touch < 2; touch++) {
      int k = touch ? 5000 : 20000;
      t = now();
      for (int i = 0; i < k; i++) {
        char *p = map(65536);
        if (touch) *(volatile char *)p = 1;
        munmap(p, 65536);
      }
      printf("%s %.3f\n", touch ? "mmap_touch_munmap" : "mmap_munmap", (now() - t) / k);
    }
  } else if (!strcmp(what, "malloc")) {
    /* Around glibc's first mmap threshold of 128 KiB; both ends of each block are used. First as glibc does by itself (the first free
     * moves its threshold), then with the threshold kept so low that every block is an mmap and a munmap. */
    for (int always = 0; always < 2; always++) {
      int k = always ? 4000 : 20000;
      if (always) mallopt(M_MMAP_THRESHOLD, 65536), mallopt(M_TOP_PAD, 0), mallopt(M_TRIM_THRESHOLD, 0), free(malloc(40000));
      for (int i = -64; i < k; i++) { /* not measured: the heap's beginning */
        if (i == 0) t = now();
        size_t m = 100000 + (size_t)(i & 15) * 4000;
        volatile char *p = malloc(m);
        p[0] = p[m - 1] = 1;
        free((void *)p);
      }
      printf("%s %.4f\n", always ? "malloc_mmap" : "malloc_free", (now() - t) / k);
    }
  } else
    return fprintf(stderr, "usage: memory touch|random|mmap|malloc|minimal\n"), 2;
  return 0;
}
