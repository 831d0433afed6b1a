/* flood FD SECONDS: fills the channel of a client (its memfd "as") again as fast as the gateway empties it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include "../../kernel/abi/sylvie.h"

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  uint8_t *m = mmap(NULL, SY_AS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, atoi(argv[1]), 0);
  if (m == MAP_FAILED) return perror("mmap"), 1;
  struct sy_channel *c = (void *)(m + SY_AS_CHANNEL_OFF);
  for (int i = 0; i < SY_CHANNEL_SLOTS; i++) c->slots[i].msg.type = 7;
  time_t end = time(NULL) + atoi(argv[2]);
  while (time(NULL) < end)
    for (uint64_t i = 0; i < SY_CHANNEL_SLOTS; i++) {
      uint64_t t = __atomic_load_n(&c->slots[i].turn, __ATOMIC_ACQUIRE);
      if (t % SY_CHANNEL_SLOTS == i) __atomic_store_n(&c->slots[i].turn, t + 1, __ATOMIC_RELEASE);
    }
  return 0;
}
