"""What docs/limits.md says differs from a native run does so, and in no other way: where no other test shows it."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Enclave

Compiled = Callable[[str], Path]
START = """
import array, ctypes, mmap, os, resource, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def managed(): return any("sylvie-ram" in line for line in open("/proc/self/maps"))
b = bytearray(b"x") * (8 << 20)
"""


def run(enclave: Enclave, code: str, *arguments: str) -> list[str]:
    """Output lines of a managed Python program."""
    done = enclave.run([sys.executable, "-c", START + code, *arguments])
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def test_si_code(enclave: Enclave, compiled: Compiled) -> None:
    """SEGV_ACCERR (2) where Linux says SEGV_MAPERR (1), of an unmapped address; the same of a protected one."""
    program = compiled("si_code")
    assert subprocess.run([program], capture_output=True, text=True, timeout=20).stdout == "unmapped 1\nprotected 2\n"
    assert enclave.run([program]).stdout == "unmapped 2\nprotected 2\n"


def test_a_limit_smaller_than_the_arena_at_the_start(enclave: Enclave) -> None:
    cmd = ["bash", "-c", 'ulimit -v 4000000; "$@"', "x", sys.executable, "-c", START + "print(managed())"]
    assert enclave.run(cmd).stdout == "False\n"


def test_a_limit_set_from_outside(enclave: Enclave) -> None:
    """It counts the arena: the kernel's own mappings fail, managed memory goes on."""
    code = """
print("there", flush=True); input()
try: mmap.mmap(-1, 1 << 20); print("mapped")
except OSError as e: print(e.strerror)
print(len(bytearray(4 << 20)), managed())
"""
    p = enclave.popen([sys.executable, "-c", START + code], stdin=subprocess.PIPE)
    assert p.stdout and p.stdout.readline() == "there\n"
    resource.prlimit(p.pid, resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
    assert p.communicate("\n", timeout=20)[0] == "Cannot allocate memory\n4194304 True\n"


def test_locked_memory_is_not_shown(enclave: Enclave) -> None:
    code = """
m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
print(libc.mlock2(ctypes.c_void_p(at), 1 << 20, 1))  # MLOCK_ONFAULT
vec = (ctypes.c_ubyte * 256)()
print(libc.mincore(ctypes.c_void_p(at), 1 << 20, vec), sum(vec))
print(next(line for line in open("/proc/self/status") if line.startswith("VmLck")).split()[1])
"""
    assert run(enclave, code) == ["0", "0 0", "0"]


def test_what_proc_shows(enclave: Enclave) -> None:
    code = """
environ = open("/proc/self/environ").read().split("\\0")
print([name for name in ("LD_PRELOAD", "_SYLVIE") if any(e.startswith(name + "=") for e in environ)],
      [name for name in ("LD_PRELOAD", "_SYLVIE") if name in os.environ])
print(len(os.listdir("/proc/self/task")), threading.active_count())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["RssShmem"].split()[0]) >= 8 << 10)
"""
    assert run(enclave, code) == ["['LD_PRELOAD', '_SYLVIE'] []", "4 1", "True"]


def test_service_threads_have_no_capability(enclave: Enclave) -> None:
    """They keep the uid that the program had when it joined, but nothing that goes with it beyond files."""
    code = """
caps = {}
for tid in os.listdir("/proc/self/task"):
    caps[tid] = dict(line.split(":\\t", 1) for line in open(f"/proc/self/task/{tid}/status"))["CapEff"].strip()
print(int(caps.pop(str(os.getpid())), 16) > 0, sorted(int(c, 16) for c in caps.values()))
"""
    assert run(enclave, code) == ["True [0, 0, 0]"]


SANDBOX = """
libc.prctl(38, 1, 0, 0, 0)
import struct
allowed = [0, 1, 3, 8, 9, 11, 12, 13, 25, 28, 60, 202, 231]  # read write close lseek mmap munmap brk … futex exit_group
rules = [struct.pack("<HBBI", 0x20, 0, 0, 0)]
for nr in allowed: rules += [struct.pack("<HBBI", 0x15, 0, 1, nr), struct.pack("<HBBI", 6, 0, 0, 0x7fff0000)]
rules.append(struct.pack("<HBBI", 6, 0, 0, 0x80000000))  # kill
code = ctypes.create_string_buffer(b"".join(rules))
class Prog(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_void_p)]
prog = Prog(len(rules), ctypes.addressof(code))
if HOW: assert libc.prctl(22, 2, ctypes.byref(prog), 0, 0) == 0
else: assert libc.syscall(317, 1, FLAGS, ctypes.byref(prog)) == 0
c = bytearray(b"y") * (8 << 20)
os.write(1, b"%d %d" % (b.count(b"x"), c.count(b"y")))
del c
libc._exit(0)
"""


@pytest.mark.parametrize(("how", "flags"), [(0, 0), (0, 1), (1, 0)], ids=["seccomp", "seccomp with TSYNC", "prctl"])
def test_a_sandbox_of_the_programs_own(enclave: Enclave, how: int, flags: int) -> None:
    """A filter that allows what the program does by itself: none of our calls meets it, as the memory is the kernel's first."""
    assert run(enclave, SANDBOX.replace("HOW", str(how)).replace("FLAGS", str(flags))) == ["8388608 8388608"]


def test_no_new_privileges_below_an_ordinary_users_run(enclave: Enclave) -> None:
    native = ROOT / "kernel" / "native"
    show = ["/bin/grep", "NoNewPrivs", "/proc/self/status"]
    cmd = [native / "sylvie-launch", enclave.run_dir, native / "libsylvie.so", native / "sylvie-keeper", "--", *show]
    done = subprocess.run(cmd, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=20)
    assert done.stdout == "NoNewPrivs:\t1\n"
    assert enclave.run(show).stdout == "NoNewPrivs:\t0\n"


@pytest.mark.parametrize(
    "env",
    ["{f'V{i}': '1' for i in range(30100)}", "{'LD_PRELOAD': '/nowhere/' + 'x' * 1100}"],
    ids=["30,100 variables", "a long LD_PRELOAD"],
)
def test_exec_with_an_environment_beyond_measure(enclave: Enclave, env: str) -> None:
    code = f"""
inner = "print(any('sylvie' in line for line in open('/proc/self/maps')), len(bytearray(8 << 20)))"
print(subprocess.run([sys.executable, "-c", inner], env={env}, capture_output=True, text=True).stdout.strip())
"""
    assert run(enclave, code) == ["False 8388608"]


def test_calls_that_are_refused(enclave: Enclave) -> None:
    """clone3 (ENOSYS, 38: the C library falls back to clone) and mseal of managed memory (EPERM, 1)."""
    code = """
print(libc.syscall(435, None, 0), ctypes.get_errno())
m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(libc.syscall(462, ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(m))), ctypes.c_size_t(4096), 0), ctypes.get_errno())
"""
    assert run(enclave, code) == ["-1 38", "-1 1"]


def test_descriptors_that_come_over_a_socket_are_not_seen(enclave: Enclave) -> None:
    """O_DIRECT by SCM_RIGHTS: the program stays managed."""
    path = Path("/var/tmp") / f"sylvie-scm-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    ours, theirs = socket.socketpair()
    try:
        code = "_, fds, _, _ = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 10, 1)\nprint(len(fds), managed(), flush=True)"
        p = enclave.popen([sys.executable, "-c", START + code, theirs.fileno()], pass_fds=[theirs.fileno()])
        socket.send_fds(ours, [b"x"], [fd])
        assert p.communicate(timeout=20)[0] == "1 True\n"
    finally:
        os.close(fd)
        ours.close()
        theirs.close()
        path.unlink()


def test_untracked_heaps_stay_native(enclave: Enclave) -> None:
    """What limits.md calls not managed: shared and executable anonymous memory, and what MAP_FIXED puts somewhere."""
    code = """
def frames(flags, prot=3):
    m = mmap.mmap(-1, 4 << 20, flags=flags, prot=prot)
    at = ctypes.addressof(ctypes.c_char.from_buffer(m))
    m[::4096] = b"x" * 1024
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in open("/proc/self/maps") if "sylvie-ram" in line]
    return any(lo <= at < hi for lo, hi in spans)
print(frames(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), frames(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
      frames(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7), frames(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_STACK))
"""
    assert run(enclave, code) == ["True False False False"]


def test_guards_and_forced_writes(enclave: Enclave) -> None:
    code = """
p = libc.mmap
p.restype = ctypes.c_void_p
p.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
at = p(None, 1 << 20, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
ctypes.memset(at, 1, 1 << 20)
print(libc.madvise(ctypes.c_void_p(at), 4096, 102), ctypes.get_errno())
libc.mprotect(ctypes.c_void_p(at), 4096, 1)
with open("/proc/self/mem", "r+b", buffering=0) as mem:
    mem.seek(at)
    try: mem.write(b"x"); print("written")
    except OSError as e: print("not written")
print(ctypes.string_at(at, 1))
"""
    assert run(enclave, code) == ["-1 22", "not written", "b'\\x01'"]


def both(enclave: Enclave, program: Path, what: str) -> tuple[str, str]:
    """Outputs natively and managed."""
    native = subprocess.run([program, what], capture_output=True, text=True, timeout=30)
    managed = enclave.run([program, what], timeout=30)
    assert native.returncode == managed.returncode == 0 and managed.stderr == "", managed
    return native.stdout, managed.stdout


def test_forks_by_other_architectures_entries(enclave: Enclave, compiled: Compiled) -> None:
    """int 0x80, where the kernel has it, after a release; x32 is ENOSYS, as on a kernel without it."""
    before = enclave.status()["counters"]["released"]
    native, managed = both(enclave, compiled("rare"), "forks")
    ia32 = native.splitlines()[0]
    assert managed == f"{ia32}\nx32: Function not implemented\n"
    assert enclave.status()["counters"]["released"] == before + ("child 700" in ia32)


def test_vfork_of_a_copy(enclave: Enclave, compiled: Compiled) -> None:
    """clone(CLONE_VFORK) without CLONE_VM: other threads' first touches wait until the child executes something, no longer."""
    native, managed = both(enclave, compiled("rare"), "vfork_of_a_copy")
    said = "waited for the child, which did 9; parent's page 0; a first touch meanwhile "
    assert (native, managed) == (said + "went on\n", said + "waited too\n")


def test_waiters_at_a_dropped_futex(enclave: Enclave, compiled: Compiled) -> None:
    assert both(enclave, compiled("rare"), "dropped_futex") == ("woken\n", "lost\n")


def test_priority_inheriting_futexes_over_a_release(enclave: Enclave, compiled: Compiled) -> None:
    """Not private: who waits with a time-out has it pass."""
    assert both(enclave, compiled("rare"), "released_pi") == ("locked\n", "Connection timed out\n")


def test_vfork_child_whose_parent_is_killed(enclave: Enclave, compiled: Compiled) -> None:
    """The gateway serves its first touches until it executes something."""
    p = enclave.popen([compiled("rare"), "orphan"])
    assert p.stdout
    child = int(p.stdout.readline())
    os.kill(p.pid, signal.SIGKILL)
    assert p.wait(10) == -signal.SIGKILL
    try:
        assert p.communicate(timeout=20)[0] == "touched 48\nexecuted\n"
    finally:
        if Path(f"/proc/{child}/cmdline").exists() and b"orphan" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)


def test_what_children_have_used(enclave: Enclave) -> None:
    """Of a program started by `sylvie run` it is more, by what `sylvie run` needed; of what that program starts in turn (by vfork) it is not."""

    def used(cmd: list[str]) -> resource.struct_rusage:
        pid = os.posix_spawn(cmd[0], cmd, os.environ)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        return usage

    native, managed = used(["/bin/true"]), used(enclave.command(["/bin/true"]))
    assert managed.ru_minflt > native.ru_minflt + 1000
    assert managed.ru_utime + managed.ru_stime > native.ru_utime + native.ru_stime + 0.02
    code = "import resource, subprocess; subprocess.run(['/bin/true']); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt)"
    assert int(enclave.run([sys.executable, "-c", code]).stdout) < native.ru_minflt + 500


@pytest.mark.alone
def test_more_mappings_than_the_kernel_allows(enclave: Enclave, compiled: Compiled) -> None:
    """Pages that find no mapping are native, and counted; nothing is lost. A page that was given back, and needs another mapping, waits for it. With
    the kernel's own limit, for a moment, as two million take 4 GiB."""
    limit = Path("/proc/sys/vm/max_map_count")
    p = enclave.popen([compiled("rare"), "many_mappings"], stdin=subprocess.PIPE)
    assert p.stdin and p.stdout
    out = p.stdout

    def go_on() -> None:
        assert p.stdin
        p.stdin.write("\n")
        p.stdin.flush()

    def line(timeout: float = 30) -> str:
        return out.readline() if select.select([out], [], [], timeout)[0] else "nothing"

    def shares() -> tuple[int, int]:
        a = next(a for a in enclave.status()["address_spaces"] if a["pid"] == p.pid)
        return a["mapped"], a["native_pages"]

    try:
        assert line() == "there\n" and shares()[1] == 0
        before = limit.read_text()
        try:
            limit.write_text("65530")
            go_on()
            assert line() == "wrong: 0, dropped and still there: 0\n"
            mapped, native = shares()
            assert mapped < 33_000 and 40_000 <= mapped + native <= 40_200, (mapped, native)
            go_on()
            assert line(0.5) == "nothing"
        finally:
            limit.write_text(before)
        assert line() == "then 0\n"
        go_on()
        assert line() == "wrong: 0, unmapped 0\n" and p.wait(20) == 0
    finally:
        p.kill()
        p.wait(10)


@pytest.mark.alone
def test_shared_pages_at_that_limit(enclave: Enclave, compiled: Compiled) -> None:
    """A child drops some that it may only read, and which can have no mapping of their own: they are zeros, the others are as they were."""
    limit = Path("/proc/sys/vm/max_map_count")
    p = enclave.popen([compiled("rare"), "shared_at_the_limit"], stdin=subprocess.PIPE)
    assert p.stdin and p.stdout
    before = limit.read_text()
    try:
        assert p.stdout.readline() == "there\n"
        limit.write_text("65530")
        out = p.communicate("\n", timeout=30)[0]
        assert out == "full: 1, dropped: 0, zeros: 1, others: 1, then 1\nchild 0\n"
    finally:
        limit.write_text(before)
        p.kill()
        p.wait(10)
