/* The two shared rings of an address space, with real threads: the channel (many producers, one consumer, full = counted) and the
 * magazine (one writer, takers by compare-and-swap). post() and pop() are the stub's, drain() and push() the gateway's.
 * usage: ring channel PRODUCERS MESSAGES DELAY_US    DELAY_US: the consumer sleeps so long after each batch
 *        ring magazine TAKERS BLOCKS DELAY_US        DELAY_US: the writer sleeps so long after each 64 blocks
 * Prints what happened and exits by it: 0 right, 1 wrong. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "../../kernel/abi/sylvie.h"

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
#define CAS(x, old, new) __atomic_compare_exchange_n(&(x), (old), (new), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define MAX 16
#define FAIL(...) do { printf(__VA_ARGS__); printf("\n"); exit(1); } while (0)

static int threads;
static long amount, delay_us;
static uint32_t go, finished;
static void start_line(void) {
  while (!LOAD(go)) sched_yield();
}

/* ---------------------------------------------------------------- channel */
static struct sy_channel *chan;
static uint64_t lost[MAX]; /* by producer, as post() said */

static int post(uint32_t who, uint64_t number) {
  for (uint64_t h = __atomic_load_n(&chan->head, __ATOMIC_RELAXED);;) {
    struct sy_slot *s = &chan->slots[h % SY_CHANNEL_SLOTS];
    uint64_t turn = LOAD(s->turn);
    if (turn == h) {
      if (!CAS(chan->head, &h, h + 1)) continue;
      s->msg = (struct sy_msg){.type = SY_MSG_TEST, .length = sizeof(struct sy_msg), .seqnum = __atomic_fetch_add(&chan->seqnum, 1, __ATOMIC_RELAXED), .asid = who,
                               .pfn = (uint32_t)number * 3, .vpage = number, .npages = who ^ (uint32_t)number, .arg = ~number};
      STORE(s->turn, h + 1);
      return 0;
    }
    if ((int64_t)(turn - h) < 0) {
      __atomic_fetch_add(&chan->overflow, 1, __ATOMIC_RELEASE);
      return -1;
    }
    h = __atomic_load_n(&chan->head, __ATOMIC_RELAXED);
  }
}
static void *producer(void *arg) {
  uint32_t who = (uint32_t)(uintptr_t)arg;
  start_line();
  for (long i = 0; i < amount; i++)
    if (post(who, (uint64_t)i)) {
      lost[who]++;
      sched_yield();
    }
  __atomic_fetch_add(&finished, 1, __ATOMIC_RELEASE);
  return NULL;
}
static uint64_t tail, got[MAX];
static int64_t last[MAX];
static uint8_t *seen_seq; /* sequence numbers: each message its own */

static int drain(int max) {
  int n = 0;
  for (; n < max; n++) {
    struct sy_slot *s = &chan->slots[tail % SY_CHANNEL_SLOTS];
    if (LOAD(s->turn) != tail + 1) break;
    struct sy_msg m = s->msg;
    STORE(s->turn, tail + SY_CHANNEL_SLOTS);
    tail++;
    if (m.type != SY_MSG_TEST || m.length != sizeof m || m.asid >= (uint32_t)threads || m.arg != ~m.vpage || m.pfn != (uint32_t)m.vpage * 3 || m.npages != (m.asid ^ (uint32_t)m.vpage))
      FAIL("torn message: type %u producer %u number %lu", m.type, m.asid, m.vpage);
    if ((int64_t)m.vpage <= last[m.asid]) FAIL("producer %u: %lu after %ld", m.asid, m.vpage, last[m.asid]);
    if (m.seqnum >= (uint64_t)amount * (uint64_t)threads || seen_seq[m.seqnum]++) FAIL("sequence number %u twice, or beyond all", m.seqnum);
    last[m.asid] = (int64_t)m.vpage;
    got[m.asid]++;
  }
  return n;
}
static int run_channel(void) {
  pthread_t t[MAX];
  chan = calloc(1, sizeof *chan);
  seen_seq = calloc((size_t)amount * (size_t)threads + 1, 1);
  for (uint64_t i = 0; i < SY_CHANNEL_SLOTS; i++) chan->slots[i].turn = i;
  for (int i = 0; i < threads; i++) last[i] = -1;
  for (long i = 0; i < threads; i++) pthread_create(&t[i], NULL, producer, (void *)i);
  STORE(go, 1);
  while (LOAD(finished) < (uint32_t)threads)
    if (!drain(1024)) sched_yield();
    else if (delay_us) usleep((useconds_t)delay_us);
  for (int i = 0; i < threads; i++) pthread_join(t[i], NULL);
  while (drain(1024)) {
  }
  uint64_t all = 0, not = 0;
  for (int i = 0; i < threads; i++) {
    if (got[i] + lost[i] != (uint64_t)amount) FAIL("producer %d: %lu arrived, %lu lost, of %ld", i, got[i], lost[i], amount);
    all += got[i], not += lost[i];
  }
  if (not != chan->overflow) FAIL("%lu lost, overflow says %lu", not, chan->overflow);
  if (chan->head != all || chan->seqnum != all || tail != all) FAIL("head %lu, seqnum %u, tail %lu, arrived %lu", chan->head, chan->seqnum, tail, all);
  printf("arrived %lu lost %lu\n", all, not);
  return 0;
}

/* ---------------------------------------------------------------- magazine */
#define ORDER 3
static struct sy_mag *mag;
static struct sy_as_ctl *ctl;
static uint8_t *taken; /* by block number */
static uint64_t took[MAX];

static uint32_t pop(int me) {
  const volatile struct sy_mag_ring *r = &mag->ring[ORDER];
  for (;;) {
    uint32_t h = LOAD(ctl->mag_head[ORDER]), t = __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE);
    uint32_t level = t - h;
    if (level == 0 || level > SY_MAG_SLOTS) return SY_NO_FRAME;
    uint32_t pfn = r->slot[h % SY_MAG_SLOTS];
    STORE(ctl->in_hand_order[me], (uint32_t)ORDER);
    STORE(ctl->in_hand[me], pfn);
    if (CAS(ctl->mag_head[ORDER], &h, h + 1)) return pfn;
    STORE(ctl->in_hand[me], SY_NO_FRAME);
  }
}
static void *taker(void *arg) {
  int me = (int)(uintptr_t)arg;
  start_line();
  for (;;) {
    int over = LOAD(finished) != 0; /* looked at first: what is pushed before it is seen below */
    uint32_t pfn = pop(me);
    if (pfn == SY_NO_FRAME) {
      if (over && LOAD(ctl->mag_head[ORDER]) == LOAD(mag->ring[ORDER].tail)) return NULL;
      sched_yield();
      continue;
    }
    if (LOAD(ctl->in_hand[me]) != pfn) FAIL("block %u is not in the hand that took it", pfn);
    if (pfn % (1 << ORDER) || (pfn >> ORDER) >= (uint32_t)amount) FAIL("block %u was never pushed", pfn);
    if (__atomic_fetch_add(&taken[pfn >> ORDER], 1, __ATOMIC_SEQ_CST)) FAIL("block %u was taken twice", pfn);
    took[me]++;
    STORE(ctl->in_hand[me], SY_NO_FRAME);
  }
}
static uint32_t head_seen, lies;
static uint32_t level(void) {
  uint32_t head = LOAD(ctl->mag_head[ORDER]), t = mag->ring[ORDER].tail;
  if (t - head > SY_MAG_SLOTS || (int32_t)(head - head_seen) < 0) {
    lies++;
    head = head_seen;
  }
  head_seen = head;
  return t - head;
}
static int push(uint32_t pfn) {
  struct sy_mag_ring *r = &mag->ring[ORDER];
  if (level() >= SY_MAG_SLOTS) return -1;
  r->slot[r->tail % SY_MAG_SLOTS] = pfn;
  STORE(r->tail, r->tail + 1);
  return 0;
}
static int run_magazine(void) {
  pthread_t t[MAX];
  if (threads > SY_SERVICE_THREADS) FAIL("%d hands are all there are", SY_SERVICE_THREADS);
  mag = calloc(1, sizeof *mag), ctl = calloc(1, sizeof *ctl), taken = calloc((size_t)amount + 1, 1);
  for (int i = 0; i < SY_SERVICE_THREADS; i++) ctl->in_hand[i] = SY_NO_FRAME;
  /* free-running counters: they pass through 2^32 on the way */
  mag->ring[ORDER].tail = ctl->mag_head[ORDER] = head_seen = (uint32_t)-300;
  for (long i = 0; i < threads; i++) pthread_create(&t[i], NULL, taker, (void *)i);
  STORE(go, 1);
  uint64_t full = 0;
  for (long i = 0; i < amount; i++) {
    while (push((uint32_t)i << ORDER)) full++, sched_yield();
    if (delay_us && i % 64 == 63) usleep((useconds_t)delay_us);
  }
  STORE(finished, 1);
  for (int i = 0; i < threads; i++) pthread_join(t[i], NULL);
  uint64_t all = 0;
  for (int i = 0; i < threads; i++) all += took[i];
  for (long i = 0; i < amount; i++)
    if (taken[i] != 1) FAIL("block %ld was taken %u times", i << ORDER, taken[i]);
  if (all != (uint64_t)amount || level() || lies) FAIL("%lu taken, %u left, %u false heads", all, level(), lies);
  printf("taken %lu full %lu\n", all, full);
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  threads = atoi(argv[2]), amount = atol(argv[3]), delay_us = atol(argv[4]);
  if (threads < 1 || threads > MAX || amount < 0) return 2;
  alarm(60);
  return strcmp(argv[1], "magazine") ? run_channel() : run_magazine();
}
