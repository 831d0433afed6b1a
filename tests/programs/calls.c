/* Memory calls in their corners. Prints one line per case; the same run natively must print the same. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#define PS 4096ul

static sigjmp_buf back;
static void *volatile fault_at;
static void on_segv(int s, siginfo_t *i, void *c) {
  (void)s, (void)c;
  fault_at = i->si_addr;
  siglongjmp(back, 1);
}
/* "ok", or "SEGV" with the offset of the address that the signal named. */
static const char *touch(volatile char *p, int write) {
  static char b[64];
  if (sigsetjmp(back, 1)) {
    snprintf(b, sizeof b, "SEGV at %+ld", (long)((char *)fault_at - (char *)p));
    return b;
  }
  if (write) *p = 1;
  else (void)*p;
  return "ok";
}
static char *map(size_t pages, int prot) { return mmap(NULL, pages * PS, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
#define SHOW(name, ...) (printf("%s: ", name), printf(__VA_ARGS__), printf("\n"))
static const char *err(long r) { return r == -1 ? strerror(errno) : "ok"; }

int main(void) {
  struct sigaction sa = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &sa, NULL);
  char *p = map(16, PROT_READ | PROT_WRITE), *q;

  SHOW("zero-length mmap", "%s", err((long)mmap(NULL, 0, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  SHOW("unaligned munmap", "%s", err(munmap(p + 1, PS)));
  memset(p, 7, 16 * PS);
  munmap(p + 4 * PS, 2 * PS);
  SHOW("hole: read", "%s", touch(p + 4 * PS, 0));
  SHOW("hole: write", "%s", touch(p + 5 * PS + 123, 1));
  SHOW("beside the hole", "%d %d", p[4 * PS - 1], p[6 * PS]);
  SHOW("munmap twice", "%s", err(munmap(p + 4 * PS, 2 * PS)));
  q = mmap(p + 4 * PS, 2 * PS, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  SHOW("FIXED_NOREPLACE into the hole", "%d", q == p + 4 * PS);
  SHOW("reads zero", "%d %d", p[4 * PS], p[6 * PS - 1]);
  SHOW("FIXED_NOREPLACE over it", "%s", err((long)mmap(p + 4 * PS, PS, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)));
  q = mmap(p + 2 * PS, 4 * PS, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  SHOW("FIXED over part", "%d: %d %d %d", q == p + 2 * PS, p[2 * PS - 1], p[2 * PS], p[6 * PS]);
  int fd = memfd_create("f", 0);
  if (ftruncate(fd, 4 * PS) || pwrite(fd, "file", 4, PS) != 4) return 1;
  q = mmap(p + 8 * PS, 2 * PS, 3, MAP_SHARED | MAP_FIXED, fd, PS);
  SHOW("file FIXED over part", "%d: %.4s %d", q == p + 8 * PS, p + 8 * PS, p[10 * PS]);
  p[8 * PS] = 'F';
  char c = 0;
  SHOW("shared write seen in the file", "%zd %c", pread(fd, &c, 1, PS), c);
  SHOW("unmap it", "%s, then %s", err(munmap(p + 8 * PS, 2 * PS)), touch(p + 8 * PS, 0));
  SHOW("unmap all", "%s", err(munmap(p, 16 * PS)));

  p = map(8, PROT_NONE);
  SHOW("PROT_NONE: read", "%s", touch(p + PS, 0));
  SHOW("PROT_NONE: write(2)", "%s", err(write(fd, p, 10)));
  SHOW("made writable", "%s", err(mprotect(p, 4 * PS, PROT_READ | PROT_WRITE)));
  SHOW("touch", "%s %d, beyond %s", touch(p + PS, 1), p[0], touch(p + 4 * PS, 0));
  SHOW("read-only", "%s", err(mprotect(p, 2 * PS, PROT_READ)));
  SHOW("read, write", "%d, %s", p[PS], touch(p + PS, 1));
  SHOW("read-only untouched: write", "%s", touch(p, 1));
  SHOW("read(2) into it", "%s", err(pread(fd, p, 10, 0)));
  SHOW("writable again", "%s %s %d", err(mprotect(p, 2 * PS, 3)), touch(p, 1), p[PS]);
  SHOW("mprotect of a hole", "%s", (munmap(p + 2 * PS, PS), err(mprotect(p, 4 * PS, 3))));
  munmap(p, 8 * PS);
  p = map(4, PROT_READ);
  SHOW("read-only from the start", "%d, write %s", p[PS], touch(p + PS, 1));
  SHOW("then unmapped and remapped", "%d %s", mmap(p, 4 * PS, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p, touch(p + PS, 1));
  munmap(p, 4 * PS);

  p = map(64, 3);
  for (int i = 0; i < 64; i++) p[i * (long)PS] = (char)i;
  q = mremap(p, 64 * PS, 32 * PS, 0);
  SHOW("shrink", "%d, tail %s", q == p, touch(p + 40 * PS, 0));
  q = mremap(p, 32 * PS, 128 * PS, MREMAP_MAYMOVE);
  int good = 1;
  for (int i = 0; i < 32; i++) good &= q[i * (long)PS] == i;
  SHOW("grow", "%d, content %d, new part %d", q != MAP_FAILED, good, q[100 * PS]);
  char *to = map(128, 3);
  memset(to, 9, 128 * PS);
  char *r = mremap(q, 128 * PS, 128 * PS, MREMAP_MAYMOVE | MREMAP_FIXED, to);
  SHOW("move to a fixed place", "%d: %d %d, source %s", r == to, to[5 * PS], to[100 * PS], touch(q, 0));
  q = mremap(to, 128 * PS, 128 * PS, MREMAP_MAYMOVE | 4 /* DONTUNMAP */);
  SHOW("DONTUNMAP", "%d: %d, source reads %d", q != MAP_FAILED && q != to, q[5 * PS], to[5 * PS]);
  SHOW("unmapped source", "%s", (munmap(to, 128 * PS), err((long)mremap(to, PS, 2 * PS, MREMAP_MAYMOVE))));
  SHOW("bad flags", "%s", err((long)mremap(q, PS, 2 * PS, 64)));

  memset(q, 5, 16 * PS);
  SHOW("DONTNEED", "%s %d %d", err(madvise(q + PS, 2 * PS, MADV_DONTNEED)), q[PS], q[3 * PS]);
  SHOW("REMOVE", "%s", err(madvise(q, PS, MADV_REMOVE)));
  SHOW("unknown advice", "%s", err(madvise(q, PS, 77)));
  SHOW("hints", "%s %s %s", err(madvise(q, 16 * PS, MADV_HUGEPAGE)), err(madvise(q, 16 * PS, MADV_WILLNEED)), err(madvise(q, 16 * PS, MADV_NORMAL)));
  SHOW("POPULATE_WRITE", "%s", err(madvise(q + 64 * PS, 8 * PS, 23)));
  unsigned char vec[4] = {9, 9, 9, 9};
  char *u = map(4, 3);
  u[PS] = 1;
  SHOW("mincore", "%s %d", err(mincore(u + PS, PS, vec)), vec[0] & 1);
  SHOW("mlock", "%s %s", err(mlock(u, 4 * PS)), err(munlock(u, 4 * PS)));
  SHOW("mlock unmapped", "%s", (munmap(u, 4 * PS), err(mlock(u, PS))));

  /* hints: taken where there is room, ignored where there is none */
  char *room = map(64, 3), *hinted;
  munmap(room, 64 * PS);
  hinted = mmap(room + 16 * PS, 4 * PS, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SHOW("hint at a free place", "%d %s", hinted == room + 16 * PS, touch(hinted, 1));
  char *other = mmap(hinted, 4 * PS, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SHOW("hint at a taken place", "%d %s", other != MAP_FAILED && other != hinted, touch(other, 1));
  SHOW("hint that is not aligned", "%d", (hinted = mmap((char *)0x123456789, PS, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) != MAP_FAILED && (uintptr_t)hinted % PS == 0);
  char *low = mmap((char *)0x200000000, PS, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SHOW("hint far away", "%d %s", low == (char *)0x200000000, touch(low, 1));
  memset(other, 8, PS);
  SHOW("FREE", "%s %d", err(madvise(other, PS, MADV_FREE)), *other == 0 || *other == 8);
  const char *done = err(pkey_mprotect(other, PS, PROT_READ, -1));
  SHOW("pkey_mprotect without a key", "%s, write %s", done, touch(other, 1));
  done = err(pkey_mprotect(other, PS, 3, -1));
  SHOW("back", "%s %s", done, touch(other, 1));
  int key = pkey_alloc(0, 1 /* PKEY_DISABLE_ACCESS */);
  if (key >= 0) {
    done = err(pkey_mprotect(other, PS, 3, key));
    SHOW("pkey_mprotect with a key", "%s, read %s", done, touch(other, 0));
    pkey_set(key, 0);
    SHOW("the key given", "%s", touch(other, 0));
  } else
    SHOW("no protection keys", "%s", err(pkey_mprotect(other, PS, 3, 1)));

  /* mappings of other kinds, moved into, within and out of what is managed */
  char *area = map(32, 3), *file = mmap(NULL, 4 * PS, 3, MAP_SHARED, fd, 0), *far = mmap(NULL, 16 * PS, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memset(area, 4, 32 * PS), memcpy(file + PS, "file", 4);
  r = mremap(file, 4 * PS, 4 * PS, MREMAP_MAYMOVE | MREMAP_FIXED, area + 8 * PS);
  SHOW("file moved into it", "%d: %.4s, beside %d %d, source %s", r == area + 8 * PS, area + 9 * PS, area[8 * PS - 1], area[12 * PS], touch(file, 0));
  r = mremap(area + 8 * PS, 4 * PS, 4 * PS, MREMAP_MAYMOVE | MREMAP_FIXED, area + 20 * PS);
  SHOW("and within it", "%d: %.4s, source %s", r == area + 20 * PS, area + 21 * PS, touch(area + 9 * PS, 0));
  int same = mremap(r, 4 * PS, 2 * PS, 0) == r;
  SHOW("shrunk there", "%d: %.4s, tail %s", same, r + PS, touch(r + 3 * PS, 0));
  memcpy(area, "mine", 4);
  r = mremap(area, 4 * PS, 6 * PS, MREMAP_MAYMOVE | MREMAP_FIXED, far);
  done = touch(far + 6 * PS, 1);
  SHOW("moved out", "%d: %.4s %d, new part %d, rest %s, source %s", r == far, far, far[3 * PS], far[5 * PS], done, touch(area, 0));
  SHOW("all of it unmapped", "%s %s", err(munmap(area, 32 * PS)), err(munmap(far, 16 * PS)));
  SHOW("nothing moved", "%s", err((long)mremap(far, PS, PS, MREMAP_MAYMOVE | MREMAP_FIXED, q)));

  struct rlimit lock = {20 * PS, 20 * PS};
  char *l1 = map(16, 3), *l2 = map(16, 3);
  setrlimit(RLIMIT_MEMLOCK, &lock);
  SHOW("mlock up to the limit", "%s", err(mlock(l1, 16 * PS)));
  SHOW("beyond it", "%s", err(mlock(l2, 16 * PS)));
  SHOW("the same again", "%s", err(mlock(l1, 8 * PS)));
  SHOW("DONTNEED of locked pages", "%s", err(madvise(l1, PS, MADV_DONTNEED)));
  munlock(l1, 16 * PS), done = err(mlock(l2, 16 * PS));
  SHOW("after munlock", "%s %s", done, err(madvise(l1, PS, MADV_DONTNEED)));
  munmap(l2, 16 * PS);
  SHOW("after munmap", "%s", err(mlock(l1, 16 * PS)));
  munmap(l1, 16 * PS);

  strcpy(q, "wipe"), strcpy(q + PS, "keep"), strcpy(q + 2 * PS, "gone");
  madvise(q, PS, MADV_WIPEONFORK);
  madvise(q + 2 * PS, PS, MADV_DONTFORK);
  fflush(stdout);
  if (!fork()) {
    SHOW("child: WIPEONFORK", "\"%s\"", q);
    SHOW("child: kept", "\"%s\"", q + PS);
    SHOW("child: DONTFORK", "%s", touch(q + 2 * PS, 0));
    strcpy(q + PS, "mine");
    SHOW("child: reserved part", "%s", touch(q + 50 * PS, 1));
    char *big = malloc(4 << 20);
    memset(big, 6, 4 << 20);
    big = realloc(big, 8 << 20);
    SHOW("child: heap", "%d", big[(4 << 20) - 1]);
    SHOW("child: unmap inherited", "%s %s", err(munmap(q + PS, PS)), touch(q + PS, 0));
    fflush(stdout);
    _exit(3);
  }
  int st;
  wait(&st);
  SHOW("parent", "\"%s\" \"%s\" \"%s\" child %d", q, q + PS, q + 2 * PS, WEXITSTATUS(st));

  char *h = sbrk(0);
  SHOW("sbrk", "%d", sbrk(1 << 20) == h);
  memset(h, 3, 1 << 20);
  SHOW("shrink", "%d, then %s", sbrk(-(1 << 19)) != (void *)-1, touch(h + (1 << 20) - 1, 0));
  int pp[2];
  if (pipe(pp)) return 1;
  char *io = map(8, 3);
  if (write(pp[1], "hello", 5) != 5) return 1;
  SHOW("read(2) into untouched memory", "%zd %.5s", read(pp[0], io + PS, 5), io + PS);
  SHOW("write(2) from untouched memory", "%zd", write(pp[1], io + 2 * PS, 4));
  struct iovec v[2] = {{io + 4 * PS, 2}, {io + 6 * PS, 2}};
  SHOW("readv", "%zd %d", readv(pp[0], v, 2), io[4 * PS]);
  SHOW("read(2) into unmapped memory", "%s", (munmap(io, 8 * PS), write(pp[1], "x", 1), err(read(pp[0], io, 1))));
  return 0;
}
