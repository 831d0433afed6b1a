"""The way out: an address space turns native, in place, while its program runs (docs/decisions/0005)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Enclave, wait_for

Compiled = Callable[[str], Path]
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


def both(enclave: Enclave, cmd: list[Any]) -> str:
    """Output of cmd managed, which must be that of the native run."""
    native = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=60)
    managed = enclave.run(cmd, timeout=60)
    assert (managed.returncode, managed.stdout, managed.stderr) == (native.returncode, native.stdout, native.stderr)
    return managed.stdout


def released(enclave: Enclave) -> int:
    return int(enclave.status()["counters"]["released"])


@pytest.mark.parametrize("way", ["vmsplice", "zerocopy", "uring", "direct", "aio"])
def test_memory_that_the_kernel_holds(enclave: Enclave, compiled: Compiled, way: str) -> None:
    """It is unmapped, and everything free is written over, while the kernel still has it."""
    before = released(enclave)
    out = both(enclave, [compiled("kernel_refs"), way, "/var/tmp"])
    assert out.count(": 0 of ") == 2, out
    assert released(enclave) == before + 1, "the memory was not managed when the kernel took hold of it"


def test_memory_that_the_kernel_holds_for_an_ordinary_user(enclave: Enclave, compiled: Compiled) -> None:
    for way in ("vmsplice", "direct", "aio"):
        assert both(enclave, [*NOBODY, compiled("kernel_refs"), way, "/var/tmp"]).count(": 0 of ") == 2


def test_descriptors_that_a_program_inherits(enclave: Enclave) -> None:
    """O_DIRECT set by a parent: the program's memory must not be frames, as nobody sees it take hold of them."""
    code = "import os; b=bytearray(8<<20); print(sum('sylvie-ram' in l for l in open('/proc/self/maps')) > 0)"
    path = Path("/var/tmp") / f"sylvie-direct-{os.getpid()}"
    try:
        for flags, managed in ((0, "True\n"), (os.O_DIRECT, "False\n")):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | flags)
            assert enclave.run([sys.executable, "-c", code], pass_fds=[fd]).stdout == managed
            os.close(fd)
    finally:
        path.unlink(missing_ok=True)


CALLS = {
    "unshare": "assert libc.unshare(0x10000000) == 0, ctypes.get_errno()",
    "setns": "fd = os.open('/proc/self/ns/mnt', os.O_RDONLY); assert libc.setns(fd, 0) == 0, ctypes.get_errno()",
    "limit of address space": "resource.setrlimit(resource.RLIMIT_AS, (300 << 20, -1))\n"
    "try: bytearray(400 << 20); print('too much')\nexcept MemoryError: print('MemoryError')\n"
    "print(resource.getrlimit(resource.RLIMIT_AS))",
    "limit of data": "resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, -1))\n"
    "try: bytearray(400 << 20); print('too much')\nexcept MemoryError: print('MemoryError')",
    "limit as seen by a child": "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    "print(subprocess.run('ulimit -v', shell=True, capture_output=True).stdout)",
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_would_see_a_difference(enclave: Enclave, name: str) -> None:
    code = f"""
import ctypes, os, resource, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
b = bytearray(b"x") * (32 << 20)
{CALLS[name]}
c = bytearray(b"y") * (8 << 20)
print(b.count(b"x"), c.count(b"y"), len(os.listdir("/proc/self/task")))
"""
    assert "33554432 8388608 1" in both(enclave, [sys.executable, "-c", code])


def test_waiters_on_futexes_that_are_not_private(enclave: Enclave, compiled: Compiled) -> None:
    """They wait at the frame; after the release, who wakes them looks at the address."""
    before = released(enclave)
    assert both(enclave, [compiled("shared_futex")]) == "joined\nsemaphore\nfutex\n"
    assert released(enclave) == before + 1


def test_mlockall(enclave: Enclave, compiled: Compiled) -> None:
    """Before anything is managed the kernel must not be made to fill the arena; later, memory is locked as it is natively."""
    assert both(enclave, [compiled("mlockall")]) == "mlockall 0\nallocated 1, locked 1 x 32 MiB\n"
    assert both(enclave, [compiled("mlockall"), "late"]) == "mlockall 0\nallocated 1, locked 3 x 32 MiB\n"


def test_limits_that_limit_nothing_release_nothing(enclave: Enclave) -> None:
    before = released(enclave)
    code = "import resource; b = bytearray(8 << 20); resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print(len(b))"
    assert enclave.run([sys.executable, "-c", code]).stdout == "8388608\n"
    assert released(enclave) == before


@pytest.mark.parametrize("when", ["at once", "later"])
def test_limit_for_another_process(enclave: Enclave, when: str) -> None:
    """That process's memory becomes native, whatever it has itself at the address where its limit lies in the memory of who limits it. One that has not even joined
    (its parent was quicker) copies what it shares into native memory, as there is no room for other mappings."""
    before = released(enclave)
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
b, limit, (r, w), (rr, ww) = bytearray(8 << 20), (ctypes.c_uint64 * 2)(2**64 - 1, 2**64 - 1), os.pipe(), os.pipe()
if not (pid := os.fork()):
    b[0] = 1  # its own now
    os.write(ww, b"x")
    os.read(r, 1)
    c = bytearray(b"y") * (10 << 20)
    try: bytearray(900 << 20); print("too much", flush=True)
    except MemoryError: print("MemoryError", c.count(b"y"), flush=True)
    os._exit(0)
limit[0] = limit[1] = 700 << 20
if {when == "later"}: os.read(rr, 1)
assert libc.prlimit(pid, 9, limit, None) == 0, ctypes.get_errno()
os.write(w, b"x")
print(os.waitpid(pid, 0)[1])
"""
    assert both(enclave, [sys.executable, "-c", code]) == "MemoryError 10485760\n0\n"
    if when == "later":
        assert released(enclave) == before + 1


BUSY = """
import hashlib, random, sys, threading
stop, bad = False, []
def work(seed):
    r = random.Random(seed)
    pieces = {}
    while not stop:
        k = r.randrange(40)
        if k in pieces and hashlib.blake2b(pieces[k][0]).digest() != pieces[k][1]: bad.append(k)
        b = bytearray(r.randbytes(64)) * r.randrange(1, 40000)
        pieces[k] = b, hashlib.blake2b(b).digest()
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for t in threads: t.start()
print("working", flush=True)
input()
stop = True
for t in threads: t.join()
print("bad", bad)
"""


def test_sylvie_release_under_load(enclave: Enclave) -> None:
    for _ in range(3):
        p = enclave.popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE)
        assert p.stdout and p.stdin and p.stdout.readline() == "working\n"
        wait_for(lambda p=p: any(a["pid"] == p.pid and a["mapped"] > 2000 for a in enclave.status()["address_spaces"]), 20, "nothing is mapped")  # fmt: skip
        assert "runs natively" in enclave.cli("release", str(p.pid)).stdout
        assert "sylvie-ram" not in Path(f"/proc/{p.pid}/maps").read_text()
        assert len(os.listdir(f"/proc/{p.pid}/task")) == 4
        out, _ = p.communicate("\n", timeout=30)
        assert (p.returncode, out) == (0, "bad []\n")
        s = enclave.idle()
        assert s["frames"]["mapped"] == s["frames"]["granted"] == 0
    assert "has no managed memory" in enclave.cli("release", str(os.getpid()), ok=False).stderr


def test_a_stopped_program_waits_with_its_call(enclave: Enclave) -> None:
    """The call that needs the release is under way when the program is stopped for long: it succeeds afterwards."""
    code = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
b = bytearray(b"x") * (64 << 20)
threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
p = os.pipe()
t = time.monotonic()
bad = 0
while time.monotonic() < t + 0.5:
    v = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(b)), 4096)
    bad += libc.vmsplice(p[1], v, 1, 0) != 4096
    os.read(p[0], 4096)
print(bad, b.count(b"x"))
"""
    p = enclave.popen([sys.executable, "-c", code])
    # Its first thread may be waiting in the call, uninterruptibly: the others say it.
    wait_for(
        lambda: "T" in [t.read_text().split()[2] for t in Path(f"/proc/{p.pid}/task").glob("*/stat")],
        10,
        "it was not stopped",
    )
    with pytest.raises(subprocess.TimeoutExpired):
        p.wait(3)
    os.kill(p.pid, signal.SIGCONT)
    assert p.communicate(timeout=30)[0] == "0 67108864\n"


@pytest.mark.parametrize("pieces", [0, 5])
def test_a_release_that_fails_half_way(enclave: Enclave, compiled: Compiled, pieces: int) -> None:
    """Memory for some of its copies, then none: the call says so, the program goes on, and the next time it succeeds."""
    before = released(enclave)

    def mapped() -> int:
        return sum(int(a["mapped"]) for a in enclave.status()["address_spaces"] if a["pid"] == p.pid)

    def native() -> int:
        """Pages of the kernel's own memory; frames are a file's."""
        return int(dict(x.split(":", 1) for x in Path(f"/proc/{p.pid}/status").read_text().splitlines())["RssAnon"].split()[0]) >> 2

    p = enclave.popen([compiled("rare"), "half_a_release"], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout
        for said, room in (("Cannot allocate memory", pieces * (2 << 20) + (1 << 20)), ("done", None)):
            assert p.stdout.readline() == "there\n"
            status = dict(x.split(":", 1) for x in Path(f"/proc/{p.pid}/status").read_text().splitlines())
            used, had = int(status["VmData"].split()[0]) << 10, native()
            resource.prlimit(p.pid, resource.RLIMIT_DATA, (-1 if room is None else used + room, -1))
            p.stdin.write("\n")
            p.stdin.flush()
            assert p.stdout.readline() == f"vmsplice: {said}, wrong: 0, touches go on: 1\n"
            if room is None:
                assert mapped() == 0 and "sylvie-ram" not in Path(f"/proc/{p.pid}/maps").read_text()
            else:
                # (What its thread touches meanwhile is mapped over memory that the limit counted: room for another piece or two, each with one that the
                # limit does not count: four more, and what is no piece.)
                assert (pieces * 2 - 4) * 512 < native() - had < (pieces * 2 + 5) * 512
        assert p.wait(20) == 0
    finally:
        p.kill()
        p.wait(10)
    assert released(enclave) == before + 1
