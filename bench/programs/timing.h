/* The clock, and the median, of programs that measure. */
#include <stdlib.h>
#include <time.h>

/* Microseconds. */
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}
static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
/* Sorts x. */
static double median(double *x, size_t n) { return qsort(x, n, sizeof *x, by_size), x[n / 2]; }
