/* The seccomp filter under which `sylvie run` starts a program: the net below the stub's own system call sites.
 *
 * Notified are only calls that (a) name addresses of the arena without coming from the stub, (b) map a large piece of
 * anonymous memory past libc, (c) make a process past libc. Everything else is allowed by its number alone, so the kernel
 * keeps those numbers in its bitmap and runs no filter for them. */
#ifndef SYLVIE_FILTER_H
#define SYLVIE_FILTER_H
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include "sys.h"
#ifndef __NR_mseal
#define __NR_mseal 462
#endif
#define SY_NET_MIN_MMAP (128 * 1024) /* smaller anonymous maps made past libc stay native: not worth a round trip */
#define ARENA_HI_LO ((uint32_t)(SY_ARENA_START >> 32))
#define ARENA_HI_END ((uint32_t)((SY_ARENA_START + SY_ARENA_SIZE) >> 32))

#define F_LD(off) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (off))
#define F_ARG_LO(i) F_LD(offsetof(struct seccomp_data, args) + 8 * (i))
#define F_ARG_HI(i) F_LD(offsetof(struct seccomp_data, args) + 8 * (i) + 4)
#define F_EQ(k, t, f) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (k), (t), (f))
#define F_GE(k, t, f) BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, (k), (t), (f))
#define F_SET(k, t, f) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (k), (t), (f))
#define F_RET(v) BPF_STMT(BPF_RET | BPF_K, (v))
#define F_ALLOW F_RET(SECCOMP_RET_ALLOW)
#define F_NOTIFY F_RET(SECCOMP_RET_USER_NOTIF)

static struct sock_filter sy_filter[] = {
    F_LD(offsetof(struct seccomp_data, arch)),
    F_EQ(AUDIT_ARCH_X86_64, 1, 0),
    F_ALLOW,
    F_LD(offsetof(struct seccomp_data, nr)),
    /* mmap: jump over the address group and the process group */
    F_EQ(__NR_mmap, 16 + 8 + 8 - 0, 0), /* -> mmap: (patched in sy_filter_link) */
    F_EQ(__NR_munmap, 0, 0),            /* -> address group */
    F_EQ(__NR_mremap, 0, 0),
    F_EQ(__NR_madvise, 0, 0),
    F_EQ(__NR_mprotect, 0, 0),
    F_EQ(__NR_pkey_mprotect, 0, 0),
    F_EQ(__NR_mlock, 0, 0),
    F_EQ(__NR_mlock2, 0, 0),
    F_EQ(__NR_munlock, 0, 0),
    F_EQ(__NR_mincore, 0, 0),
    F_EQ(__NR_mseal, 0, 0),
    F_EQ(__NR_clone, 0, 0),  /* 15 -> clone */
    F_EQ(__NR_fork, 0, 0),   /* 16 -> notify */
    F_EQ(__NR_clone3, 0, 0), /* 17 -> enosys */
    F_ALLOW,                 /* 18 */
    /* 19: address group */
    F_ARG_LO(5),
    F_EQ(SY_MARK, 3, 0), /* -> 24 allow */
    F_ARG_HI(0),
    F_GE(ARENA_HI_LO, 0, 1),
    F_GE(ARENA_HI_END, 0, 1), /* >= end: allow (24); else notify (25) */
    F_ALLOW,                  /* 24 */
    F_NOTIFY,                 /* 25 */
    /* 26: clone: with CLONE_VM it is a thread or vfork */
    F_ARG_LO(0),
    F_SET(CLONE_VM, 2, 0),
    F_ARG_LO(5),
    F_EQ(SY_MARK, 0, 1),
    F_ALLOW,  /* 30 */
    F_NOTIFY, /* 31 */
    /* 32: clone3 hides its flags behind a pointer; glibc falls back to clone */
    F_RET(SECCOMP_RET_ERRNO | ENOSYS),
    /* 33: mmap */
    F_ARG_HI(3),
    F_EQ(SY_MARK, 16, 0), /* 34 -> 51 allow */
    F_ARG_HI(0),
    F_GE(ARENA_HI_LO, 0, 1),
    F_GE(ARENA_HI_END, 0, 14), /* 37: below the end of the arena: notify (52) */
    F_EQ(0, 0, 12),            /* 38: a hint elsewhere: allow */
    F_ARG_LO(0),
    F_EQ(0, 0, 10), /* 40 */
    F_ARG_LO(3),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, MAP_SHARED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB | 0x40 /* MAP_32BIT */),
    F_EQ(MAP_PRIVATE | MAP_ANONYMOUS, 0, 7), /* 43 */
    F_ARG_LO(2),
    F_SET(PROT_EXEC, 5, 0), /* 45 */
    F_ARG_HI(1),
    F_EQ(0, 0, 4), /* 47: 4 GiB and more: notify */
    F_ARG_LO(1),
    F_GE(SY_NET_MIN_MMAP, 2, 1), /* 49 */
    F_ALLOW,                     /* 50 */
    F_ALLOW,                     /* 51 */
    F_NOTIFY,                    /* 52 */
};
/* Jump distances are counted here once, rather than by hand in the table. */
static inline struct sock_fprog sy_filter_link(void) {
  sy_filter[4].jt = 33 - 5;
  for (int i = 5; i <= 14; i++) sy_filter[i].jt = (uint8_t)(19 - (i + 1));
  sy_filter[15].jt = 26 - 16;
  sy_filter[16].jt = 25 - 17;
  sy_filter[17].jt = 32 - 18;
  sy_filter[20].jt = 24 - 21, sy_filter[20].jf = 0;
  sy_filter[22].jt = 0, sy_filter[22].jf = 24 - 23;
  sy_filter[23].jt = 24 - 24, sy_filter[23].jf = 25 - 24;
  sy_filter[27].jt = 30 - 28, sy_filter[27].jf = 0;
  sy_filter[29].jt = 30 - 30, sy_filter[29].jf = 31 - 30;
  sy_filter[34].jt = 51 - 35, sy_filter[34].jf = 0;
  sy_filter[36].jt = 0, sy_filter[36].jf = 38 - 37;
  sy_filter[37].jt = 38 - 38, sy_filter[37].jf = 52 - 38;
  sy_filter[38].jt = 0, sy_filter[38].jf = 51 - 39;
  sy_filter[40].jt = 0, sy_filter[40].jf = 51 - 41;
  sy_filter[43].jt = 0, sy_filter[43].jf = 51 - 44;
  sy_filter[45].jt = 51 - 46, sy_filter[45].jf = 0;
  sy_filter[47].jt = 0, sy_filter[47].jf = 52 - 48;
  sy_filter[49].jt = 52 - 50, sy_filter[49].jf = 51 - 50;
  return (struct sock_fprog){sizeof sy_filter / sizeof *sy_filter, sy_filter};
}
#endif
