/* Plain system calls for code that must not use libc (the stub) or wants no wrapper (launcher, keeper). */
#ifndef SYLVIE_SYS_H
#define SYLVIE_SYS_H
#include <stddef.h>
#include <stdint.h>
#include <asm/unistd.h>
#include "../abi/sylvie.h"

#define SY_O_DIRECT 040000 /* as the kernel has it on x86-64, whatever the C library's feature macros say */

static inline long sys6(long n, long a, long b, long c, long d, long e, long f) {
  long r;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
/* Calls of at most five arguments carry the mark in the sixth, so they pass the seccomp filter wherever it looks. */
#define SYS(n, a, b, c, d, e) sys6((n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), SY_MARK)

/* mmap uses all six arguments; the kernel ignores the upper half of flags, so the mark is there. */
static inline long sys_mmap(uintptr_t addr, size_t len, int prot, int flags, int fd, uint64_t off) {
  return sys6(__NR_mmap, (long)addr, (long)len, prot, (long)((uint64_t)(unsigned)flags | ((uint64_t)SY_MARK << 32)), fd, (long)off);
}
#endif
