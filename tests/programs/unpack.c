/* The stub's LZ4 decoder beside the library: what the library packs comes out the same, and input that is damaged, or made up, writes nothing
 * beyond its page. */
#include <lz4.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define PS 4096u
#include "../../kernel/native/stub_lz4.h"

static uint8_t page[PS], packed[2 * PS], out[3 * PS], expected[PS];
static void make(int kind) {
  int alphabet = 1 << (rand() % 8), period = 1 + rand() % 300, noise = rand() % 200;
  for (unsigned i = 0; i < PS; i++) {
    page[i] = (uint8_t)(kind % 3 == 0 ? rand() % alphabet : kind % 3 == 1 && i >= (unsigned)period ? page[i - (unsigned)period] : rand());
    if (rand() % (noise + 1) == 0) page[i] = (uint8_t)rand();
  }
}
int main(void) {
  long same = 0, damaged = 0, alike = 0;
  for (int i = 0; i < 20000; i++) {
    make(i);
    int n = LZ4_compress_default((char *)page, (char *)packed, PS, sizeof packed);
    memset(out, 0xa5, sizeof out);
    same += unpack(out, PS, packed, (uint32_t)n) == PS && !memcmp(out, page, PS);
    for (int k = 0; k < 5; k++) {
      int size = rand() % 4 ? n : rand() % n + 1;
      for (int j = rand() % 8; j >= 0; j--) packed[rand() % n] = (uint8_t)(rand() % 3 ? rand() : 255);
      memset(out, 0xa5, sizeof out);
      long r = unpack(out, PS, packed, (uint32_t)size);
      int whole = 1;
      for (unsigned j = PS + UNPACK_SLACK; j < sizeof out; j++) whole &= out[j] == 0xa5;
      int theirs = LZ4_decompress_safe((char *)packed, (char *)expected, size, PS);
      damaged += whole && r <= (long)PS;
      alike += (r == PS) == (theirs == (int)PS) && (r != PS || !memcmp(out, expected, PS));
    }
  }
  printf("%ld %ld %ld\n", same, damaged, alike);
}
