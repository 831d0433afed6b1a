/* stub, part 1b: how much a program may ask for. As Linux counts with vm.overcommit_memory=2 (VM_ACCOUNT in mm/mmap.c, mm/mprotect.c, mm/mremap.c): a
 * private page counts from when it may first be written until it is unmapped; one of MAP_NORESERVE never; one that is made
 * unwritable before it was touched no longer (Linux: if its whole mapping was not). Beyond RAM and swap: ENOMEM. Under mm_lock. */
static uint64_t *charged, *noreserve, *mergeable; /* one bit a page, behind attr; 0 where nothing is mapped. A forked child has its parent's */
static int some_mergeable, merge_all; /* merge_all: `sylvie run --ksm` */
static uint64_t committed;            /* bits set in charged */
static int overcommit, some_noreserve;
#define TABLE_BYTES (SY_ARENA_PAGES + SY_ARENA_PAGES / 8 * 3)

static uint64_t ones(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555;
  x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
  return ((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56;
}
enum { LOOK = -1, CLEAR, SET };
/* Sets or clears the bits of [p, p + n), or only looks: how many were set. Does not write what is right already. */
static uint64_t bits(uint64_t *map, uint64_t p, uint64_t n, int how) {
  uint64_t were = 0;
  for (uint64_t k; n; p += k, n -= k) {
    k = 64 - p % 64 < n ? 64 - p % 64 : n;
    uint64_t mask = (~0ull >> (64 - k)) << p % 64, *w = &map[p / 64], is = *w & mask;
    were += ones(is);
    if (how != LOOK && is != (how == SET ? mask : 0)) *w ^= how == SET ? is ^ mask : is;
  }
  return were;
}
static void charge(uint64_t p, uint64_t n) { committed += n - bits(charged, p, n, SET); }
static void uncharge(uint64_t p, uint64_t n) {
  committed -= bits(charged, p, n, CLEAR);
  if (some_noreserve) bits(noreserve, p, n, CLEAR);
  if (some_mergeable) bits(mergeable, p, n, CLEAR);
}
/* [p, p + n) is mapped anew. */
static void charge_new(uint64_t p, uint64_t n, long prot, long flags) {
  uncharge(p, n);
  if (flags & MAP_NORESERVE) bits(noreserve, p, n, SET), some_noreserve = 1;
  else if (prot & PROT_WRITE) charge(p, n);
  if (merge_all) bits(mergeable, p, n, SET);
}
/* … by mremap: as its pages at from were, and beyond those as the last of them. */
static void charge_moved(uint64_t from, uint64_t n, uint64_t p, uint64_t m) {
  uint64_t is = bits(charged, from, n, LOOK), last = from + n - 1;
  int exempt = some_noreserve && bits(noreserve, from, n, LOOK), merges = some_mergeable && bits(mergeable, from, n, LOOK) == n;
  uncharge(p, m);
  if (merges) bits(mergeable, p, m, SET);
  if (is == n) charge(p, m);
  else if (is || exempt)
    for (uint64_t i = 0; i < m; i++) {
      uint64_t as = i < n ? from + i : last;
      if (bits(charged, as, 1, LOOK)) charge(p + i, 1);
      if (exempt && bits(noreserve, as, 1, LOOK)) bits(noreserve, p + i, 1, SET);
    }
}
/* Would that be beyond what there is? Not asked where what does not fit goes native. */
static int too_much(uint64_t more, uint64_t less) {
  return more > less && committed + more - less > (uint64_t)hdr->frames + hdr->slots && hdr->oom == SY_OOM_KILL && !hdr->overcommit && !overcommit;
}
