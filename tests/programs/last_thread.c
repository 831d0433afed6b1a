/* The program's last thread leaves by exit(2), not exit_group(2): last_thread THREADS [released | together]. The status is the last one's.
 * last_thread hold: keeps a MiB until its input ends. */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "report.h"

static pthread_barrier_t together;
static void *leave(void *number) {
  if (!number) { /* all at once: no status says which was last */
    pthread_barrier_wait(&together);
    syscall(SYS_exit, 5);
  }
  usleep(50000 * (useconds_t)(long)number);
  syscall(SYS_exit, 8 + (long)number);
  return NULL;
}
int main(int argc, char **argv) {
  char *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  p[4096] = 1;
  report();
  if (argc > 1 && !strcmp(argv[1], "hold")) {
    memset(p, 7, 1 << 20);
    if (write(1, "there\n", 6) != 6 || read(0, p, 1)) return 1;
    for (int i = 0; i < 1 << 20; i++)
      if (p[i] != 7) return 2;
    return write(1, "intact\n", 7) != 7;
  }
  int at_once = argc > 2 && !strcmp(argv[2], "together");
  if (at_once) pthread_barrier_init(&together, NULL, (unsigned)atoi(argv[1]) + 1);
  if (argc > 2 && !at_once) { /* a fork past libc: from here on the memory is native, the service threads remain */
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(SYS_fork) : "rcx", "r11", "memory");
    if (!r) _exit(0);
    waitpid((pid_t)r, NULL, 0);
  }
  for (long i = 0; argc > 1 && i < atoi(argv[1]); i++) {
    pthread_t t;
    pthread_create(&t, NULL, leave, (void *)(at_once ? 0 : i + 1));
  }
  if (at_once) pthread_barrier_wait(&together);
  syscall(SYS_exit, 5);
}
