/* Processes that fork, write, drop, move, protect and read what they have, at random, each against what it knows must be there; parents that end before
 * their children. usage: forked SEED PAGES STEPS DEPTH; prints how many processes there were, and how many found something else. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define MOST 65536
#define PIECE 64
#define PS 4096
static uint32_t expect[MOST]; /* .bss: native memory, copied by the kernel */
static char *piece[MOST / PIECE];
static uint8_t readonly[MOST / PIECE];
static uint32_t pages, pieces, wrong;
static uint64_t seed;
static int report[2];
static uint32_t rnd(uint32_t n) { return (uint32_t)((seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33) % n; }
static volatile uint32_t *word(uint32_t i) { return (volatile uint32_t *)(void *)(piece[i / PIECE] + i % PIECE * PS + i * 52 % 4000 / 4 * 4); }
static void look(uint32_t i) {
  uint32_t is = *word(i);
  if (is == expect[i]) return;
  if (!wrong++) fprintf(stderr, "%d: page %u at %p is %u, not %u, and then %u\n", getpid(), i, (void *)(uintptr_t)word(i), is, expect[i], *word(i));
}
static void put(uint32_t i) {
  if (!readonly[i / PIECE]) *word(i) = expect[i] = rnd(1u << 30) + 1;
}
static void step(void) {
  uint32_t i = rnd(pages), k = i / PIECE;
  switch (rnd(16)) {
  case 0: /* drop a part */
    if (readonly[k]) break;
    madvise(piece[k] + i % PIECE * PS, PS * (PIECE - i % PIECE), MADV_DONTNEED);
    for (uint32_t j = i; j < (k + 1) * PIECE; j++) expect[j] = 0;
    break;
  case 1: { /* elsewhere */
    char *to = mmap(NULL, PIECE * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (readonly[k] || mremap(piece[k], PIECE * PS, PIECE * PS, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) {
      munmap(to, PIECE * PS);
      break;
    }
    piece[k] = to;
    break;
  }
  case 2:
    readonly[k] ^= 1;
    if (mprotect(piece[k], PIECE * PS, readonly[k] ? PROT_READ : PROT_READ | PROT_WRITE)) exit(9);
    break;
  case 3: /* mapped anew */
    if (readonly[k] || mmap(piece[k], PIECE * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != piece[k]) break;
    for (uint32_t j = k * PIECE; j < (k + 1) * PIECE; j++) expect[j] = 0;
    break;
  case 4: case 5: /* in sequence */
    for (uint32_t j = i; j < pages && j < i + 200; j++) put(j);
    break;
  case 6: case 7: case 8: case 9: put(i); break;
  case 10: { /* by the kernel's hand */
    int p[2];
    uint32_t v = rnd(1u << 30) + 1;
    if (readonly[k] || pipe(p)) break;
    if (write(p[1], &v, 4) != 4 || read(p[0], (void *)(uintptr_t)word(i), 4) != 4) exit(8);
    expect[i] = v;
    close(p[0]), close(p[1]);
    break;
  }
  default: look(i);
  }
}
static void life(uint32_t steps, int depth) {
  int children = 0;
  for (uint32_t s = 0; s < steps; s++) {
    step();
    if (depth && children < 3 && (s == steps / 4 || rnd(steps / 3 + 1) == 0)) {
      uint64_t theirs = seed * 31 + 7;
      pid_t p = fork();
      if (!p) seed = theirs, depth--, children = 0, s = 0; /* a life of its own */
      children += p > 0;
    }
  }
  for (uint32_t i = 0; i < pages; i++) look(i);
  if (rnd(2)) /* else it ends before its children */
    while (children-- && wait(NULL) > 0) {
    }
  if (write(report[1], wrong ? "w" : ".", 1) != 1) _exit(7);
  _exit(0);
}
int main(int argc, char **argv) {
  if (argc < 5) return 2;
  seed = (uint64_t)atol(argv[1]) * 7919 + 1, pages = (uint32_t)atol(argv[2]) / PIECE * PIECE, pieces = pages / PIECE;
  if (pages > MOST || pipe(report)) return 2;
  char *all = mmap(NULL, (size_t)pages * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (uint32_t k = 0; k < pieces; k++) piece[k] = all + (size_t)k * PIECE * PS;
  madvise(all + 5 * PIECE * PS, 3 * PS, MADV_DONTFORK), madvise(all + 7 * PIECE * PS, 3 * PS, MADV_WIPEONFORK);
  for (uint32_t i = 0; i < pages; i++) put(i);
  for (uint32_t i = 0; i < 3; i++) expect[7 * PIECE + i] = 0; /* (as every child has it) */
  pid_t first = fork();
  if (!first) {
    if (mmap(all + 5 * PIECE * PS, 3 * PS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != all + 5 * PIECE * PS) wrong++; /* it is not there */
    for (uint32_t i = 0; i < 3; i++) expect[5 * PIECE + i] = 0;
    madvise(all + 7 * PIECE * PS, 3 * PS, MADV_KEEPONFORK);
    life((uint32_t)atol(argv[3]), atoi(argv[4]));
  }
  for (uint32_t i = 0; i < pages; i++)
    if (i / PIECE != 7 || i % PIECE > 2) look(i);
  close(report[1]);
  int n = 0, bad = 0;
  for (char c; read(report[0], &c, 1) == 1; n++) bad += c == 'w';
  printf("%d processes, %d wrong, first %u\n", n, bad, wrong);
  return bad || wrong || n < 2;
}
