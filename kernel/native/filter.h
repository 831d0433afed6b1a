/* The seccomp filter under which `sylvie run` starts a program: the net below the stub's own system call sites.
 *
 * Notified are only calls that (a) name addresses of the arena without coming from the stub, (b) map a large piece of
 * anonymous memory past libc, (c) make a process past libc, (d) would see that the memory is not the kernel's own: the address
 * space is released first (docs/decisions/0005). Everything else is allowed by its number alone, so the kernel keeps those numbers
 * in its bitmap and runs no filter for them. */
#ifndef SYLVIE_FILTER_H
#define SYLVIE_FILTER_H
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include "sys.h"
#ifndef __NR_mseal
#define __NR_mseal 462
#endif
#ifndef MAP_32BIT
#define MAP_32BIT 0x40
#endif
#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#define SY_RLIMIT_DATA 2
#define SY_RLIMIT_AS 9
#define SY_NET_MIN_MMAP (128 * 1024) /* smaller anonymous maps made past libc stay native: not worth a round trip */
#define ARENA_HI_LO ((uint32_t)(SY_ARENA_START >> 32))
#define ARENA_HI_END ((uint32_t)((SY_ARENA_START + SY_ARENA_SIZE) >> 32))

/* A jump names labels; sy_filter_link counts the distances. NEXT: the following instruction. */
enum { NEXT, ALLOW, NOTIFY, NOSYS, ADDR, CLONE, SHARED_VM, MMAP, MMAP_HINT, PMADVISE, OPEN, OPENAT, FCNTL, SOCKOPT, UNSHARE, UFFD, LOOK, SETRLIMIT, PRLIMIT, SECCOMP, PRCTL, OTHER_ARCH, LABELS };
struct sy_insn { uint16_t code; uint32_t k; uint8_t jt, jf, label; };
#define ARG_LO(i) {BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (i), 0, 0, 0}
#define ARG_HI(i) {BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (i) + 4, 0, 0, 0}
#define EQ(v, t, f) {BPF_JMP | BPF_JEQ | BPF_K, (v), (t), (f), 0}
#define GE(v, t, f) {BPF_JMP | BPF_JGE | BPF_K, (v), (t), (f), 0}
#define ANY(v, t, f) {BPF_JMP | BPF_JSET | BPF_K, (v), (t), (f), 0}
#define RET(v) {BPF_RET | BPF_K, (v), 0, 0, 0}
#define AT(l) {0, 0, 0, 0, (l)} /* no instruction: names the next one */

static const struct sy_insn sy_rules[] = {
    {BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch), 0, 0, 0},
    EQ(AUDIT_ARCH_X86_64, NEXT, OTHER_ARCH),
    {BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0, 0},
    GE(0x40000000 /* __X32_SYSCALL_BIT */, NOSYS, NEXT), /* the same calls by other numbers */
    EQ(__NR_mmap, MMAP, NEXT),
    EQ(__NR_munmap, ADDR, NEXT), EQ(__NR_mremap, ADDR, NEXT), EQ(__NR_madvise, ADDR, NEXT), EQ(__NR_mprotect, ADDR, NEXT), EQ(__NR_pkey_mprotect, ADDR, NEXT),
    EQ(__NR_mlock, ADDR, NEXT), EQ(__NR_mlock2, ADDR, NEXT), EQ(__NR_munlock, ADDR, NEXT), EQ(__NR_mincore, ADDR, NEXT), EQ(__NR_mseal, ADDR, NEXT),
    EQ(__NR_openat, OPENAT, NEXT), EQ(__NR_open, OPEN, NEXT), EQ(__NR_fcntl, FCNTL, NEXT), EQ(__NR_setsockopt, SOCKOPT, NEXT),
    EQ(__NR_prlimit64, PRLIMIT, NEXT), EQ(__NR_setrlimit, SETRLIMIT, NEXT), EQ(__NR_unshare, UNSHARE, NEXT), EQ(__NR_userfaultfd, UFFD, NEXT),
    EQ(__NR_mlockall, NOTIFY, NEXT), EQ(__NR_seccomp, SECCOMP, NEXT), EQ(__NR_prctl, PRCTL, NEXT), EQ(__NR_setns, NOTIFY, NEXT), EQ(__NR_openat2, NOTIFY, NEXT), EQ(__NR_vmsplice, NOTIFY, NEXT), EQ(__NR_io_setup, NOTIFY, NEXT), EQ(__NR_io_uring_setup, NOTIFY, NEXT),
    /* how a thread is scheduled is what it set itself, whatever we made of it */
    EQ(__NR_sched_setparam, LOOK, NEXT), EQ(__NR_sched_getparam, LOOK, NEXT), EQ(__NR_sched_setscheduler, LOOK, NEXT), EQ(__NR_sched_getscheduler, LOOK, NEXT),
    EQ(__NR_sched_setaffinity, LOOK, NEXT), EQ(__NR_sched_getaffinity, LOOK, NEXT), EQ(__NR_sched_setattr, LOOK, NEXT), EQ(__NR_sched_getattr, LOOK, NEXT),
    EQ(__NR_clone, CLONE, NEXT), EQ(__NR_fork, NOTIFY, NEXT), EQ(__NR_process_madvise, PMADVISE, NEXT), EQ(__NR_clone3, NOSYS, ALLOW),
    /* arena addresses, not from the stub */
    AT(ADDR), ARG_LO(5), EQ(SY_MARK, ALLOW, NEXT), ARG_HI(0), GE(ARENA_HI_LO, NEXT, ALLOW), GE(ARENA_HI_END, ALLOW, NOTIFY),
    AT(CLONE), ARG_LO(0), ANY(CLONE_VM, SHARED_VM, NEXT), ARG_LO(5), EQ(SY_MARK, ALLOW, NOTIFY),
    /* a thread, or vfork; another process in the same memory may outlive the one whose threads serve it */
    AT(SHARED_VM), ANY(CLONE_THREAD | CLONE_VFORK, ALLOW, NOTIFY),
    /* of advice for other processes' memory, what would also take one's own away */
    AT(PMADVISE), ARG_LO(5), EQ(SY_MARK, ALLOW, NEXT), ARG_LO(3), EQ(MADV_WILLNEED, ALLOW, NEXT), EQ(20 /* MADV_COLD */, ALLOW, NEXT), EQ(21 /* MADV_PAGEOUT */, ALLOW, NEXT), EQ(25 /* MADV_COLLAPSE */, ALLOW, NOTIFY),
    AT(MMAP), ARG_HI(3), EQ(SY_MARK, ALLOW, NEXT), ARG_HI(0), GE(ARENA_HI_LO, NEXT, MMAP_HINT), GE(ARENA_HI_END, MMAP_HINT, NOTIFY),
    AT(MMAP_HINT), ARG_HI(0), EQ(0, NEXT, ALLOW), ARG_LO(0), EQ(0, NEXT, ALLOW), ARG_LO(3),
    {BPF_ALU | BPF_AND | BPF_K, MAP_SHARED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB | MAP_32BIT, 0, 0, 0},
    EQ(MAP_PRIVATE | MAP_ANONYMOUS, NEXT, ALLOW), ARG_LO(2), ANY(PROT_EXEC, ALLOW, NEXT), ARG_HI(1), EQ(0, NEXT, NOTIFY), ARG_LO(1), GE(SY_NET_MIN_MMAP, NOTIFY, ALLOW),
    /* the kernel will hold the memory itself by reference */
    AT(OPEN), ARG_LO(1), ANY(SY_O_DIRECT, NOTIFY, ALLOW),
    AT(OPENAT), ARG_LO(2), ANY(SY_O_DIRECT, NOTIFY, ALLOW),
    AT(FCNTL), ARG_LO(1), EQ(F_SETFL, NEXT, ALLOW), ARG_LO(2), ANY(SY_O_DIRECT, NOTIFY, ALLOW),
    AT(SOCKOPT), ARG_LO(1), EQ(SOL_SOCKET, NEXT, ALLOW), ARG_LO(2), EQ(SO_ZEROCOPY, NOTIFY, ALLOW),
    AT(UFFD), AT(LOOK), ARG_LO(5), EQ(SY_MARK, ALLOW, NOTIFY),
    /* what the kernel grants to a process of one thread only */
    AT(UNSHARE), ARG_LO(0), ANY(CLONE_NEWUSER | CLONE_VM | CLONE_SIGHAND | CLONE_THREAD, NOTIFY, ALLOW),
    /* a filter of the program's own would meet our calls */
    AT(SECCOMP), ARG_LO(0), GE(2, ALLOW, NOTIFY), /* SECCOMP_SET_MODE_STRICT 0, SECCOMP_SET_MODE_FILTER 1 */
    AT(PRCTL), ARG_LO(0), EQ(22 /* PR_SET_SECCOMP */, NOTIFY, ALLOW),
    /* limits that would count the arena */
    AT(SETRLIMIT), ARG_LO(0), EQ(SY_RLIMIT_AS, NOTIFY, NEXT), EQ(SY_RLIMIT_DATA, NOTIFY, ALLOW),
    AT(PRLIMIT), ARG_LO(2), EQ(0, ALLOW, NEXT), ARG_LO(1), EQ(SY_RLIMIT_AS, NOTIFY, NEXT), EQ(SY_RLIMIT_DATA, NOTIFY, ALLOW),
    /* int 0x80: fork and clone would copy (or share) our mappings */
    AT(OTHER_ARCH), {BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0, 0}, EQ(2, NOTIFY, NEXT), EQ(435 /* clone3 */, NOSYS, NEXT), EQ(120, NEXT, ALLOW),
    ARG_LO(0), ANY(CLONE_VM, NEXT, NOTIFY), ANY(CLONE_THREAD | CLONE_VFORK, ALLOW, NOTIFY),
    AT(ALLOW), RET(SECCOMP_RET_ALLOW),
    AT(NOTIFY), RET(SECCOMP_RET_USER_NOTIF),
    /* clone3 hides its flags behind a pointer; glibc falls back to clone */
    AT(NOSYS), RET(SECCOMP_RET_ERRNO | ENOSYS),
};
#define SY_RULES (sizeof sy_rules / sizeof *sy_rules)

static inline struct sock_fprog sy_filter_link(void) {
  static struct sock_filter out[SY_RULES];
  uint8_t at[LABELS] = {0};
  uint8_t n = 0;
  for (size_t i = 0; i < SY_RULES; i++)
    if (sy_rules[i].label) at[sy_rules[i].label] = n;
    else n++;
  n = 0;
  for (size_t i = 0; i < SY_RULES; i++) {
    const struct sy_insn *r = &sy_rules[i];
    if (r->label) continue;
    out[n] = (struct sock_filter){r->code, r->jt ? (uint8_t)(at[r->jt] - n - 1) : 0, r->jf ? (uint8_t)(at[r->jf] - n - 1) : 0, r->k};
    n++;
  }
  return (struct sock_fprog){n, out};
}
#endif
