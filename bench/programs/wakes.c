/* Threads that sleep and wake. argv: SECONDS "sleep" N: one thread, N microseconds at a time. SECONDS "pipe" N: N pairs that hand one another a byte. Prints "wakes N": wake-ups. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_PAIRS 256
static struct end { int in, out; uint64_t wakes; pthread_t thread; } end[2 * MAX_PAIRS];
static volatile int over;
static void *hand(void *arg) {
  struct end *e = arg;
  char c;
  while (!over && read(e->in, &c, 1) == 1 && write(e->out, &c, 1) == 1) e->wakes++;
  close(e->out); /* so that the other one ends, too */
  return NULL;
}
int main(int argc, char **argv) {
  if (argc < 4) return 2;
  double seconds = atof(argv[1]);
  int n = atoi(argv[3]);
  uint64_t wakes = 0;
  if (*argv[2] == 's') {
    struct timespec nap = {n / 1000000, n % 1000000 * 1000L};
    for (uint64_t k = (uint64_t)(seconds * 1e6 / n); wakes < k; wakes++) nanosleep(&nap, NULL);
  } else {
    if (n < 1 || n > MAX_PAIRS) return 2;
    for (int i = 0; i < n; i++) {
      int there[2], back[2];
      if (pipe(there) || pipe(back)) return perror("pipe"), 1;
      end[2 * i] = (struct end){.in = back[0], .out = there[1]}, end[2 * i + 1] = (struct end){.in = there[0], .out = back[1]};
      if (write(back[1], "", 1) != 1) return 1;
    }
    for (int i = 0; i < 2 * n; i++)
      if (pthread_create(&end[i].thread, NULL, hand, &end[i])) return perror("thread"), 1;
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
    over = 1;
    for (int i = 0; i < 2 * n; i++) pthread_join(end[i].thread, NULL), wakes += end[i].wakes;
  }
  printf("wakes %lu\n", (unsigned long)wakes);
  return 0;
}
