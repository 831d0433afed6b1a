/* si_code of two faults. */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
static sigjmp_buf back;
static volatile int code;
static void on_segv(int s, siginfo_t *i, void *c) {
  (void)s, (void)c;
  code = i->si_code;
  siglongjmp(back, 1);
}
int main(void) {
  struct sigaction sa = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &sa, NULL);
  char *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(p, 1, 1 << 20);
  munmap(p + 8192, 4096);
  if (!sigsetjmp(back, 1)) *(volatile char *)(p + 8192) = 1;
  printf("unmapped %d\n", code);
  mprotect(p + 16384, 4096, PROT_NONE);
  if (!sigsetjmp(back, 1)) *(volatile char *)(p + 16384) = 1;
  printf("protected %d\n", code);
  return 0;
}
