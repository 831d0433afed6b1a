/* For test programs whose memory must really have been managed: copies /proc/self/smaps to $SMAPS_TO, where the test looks for frames.
 * Output and status stay what they are natively. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static inline void report(void) {
  const char *to = getenv("SMAPS_TO");
  char b[4096];
  if (!to) return;
  int in = open("/proc/self/smaps", O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  for (ssize_t n; (n = read(in, b, sizeof b)) > 0;)
    if (write(out, b, (size_t)n) != n) abort();
  close(in), close(out);
}
