"""More memory wanted than the enclave has: as Linux does it, the program with the most is ended; or what does not fit is native."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Enclave, bring_up, take_down, wait_for

from bus.client import subscriber
from bus.codec import decode_batch
from kernel.abi import lib

# Holds argv[1] MiB of a pattern; then, for each line on its input, argv[2] MiB more. At the end of input all must be as it was written.
HOLDER = """
import mmap, sys
held = []
def take(mib):
    for _ in range(mib):
        m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        c = bytes([len(held) % 251 + 1])
        m[:] = c * (1 << 20)
        held.append((m, c))
take(int(sys.argv[1]))
print("there", flush=True)
for line in sys.stdin:
    take(int(sys.argv[2]))
    print("more", flush=True)
print(sum(m[:] != c * (1 << 20) for m, c in held), "lost")
"""


def hold(enclave: Enclave, first: int, more: int = 1) -> subprocess.Popen[str]:
    """A program that holds ``first`` MiB and takes ``more`` for each line."""
    p = enclave.popen([sys.executable, "-c", HOLDER, first, more], stdin=subprocess.PIPE)
    assert p.stdout and p.stdout.readline() == "there\n"
    return p


def ask(p: subprocess.Popen[str]) -> None:
    assert p.stdin
    p.stdin.write("\n")
    p.stdin.flush()


def end(p: subprocess.Popen[str]) -> str:
    return p.communicate(timeout=60)[0]


def log(enclave: Enclave) -> str:
    return "".join(f.read_text(errors="replace") for f in enclave.run_dir.glob("*.log"))


def test_the_one_with_the_most_is_ended(own_enclave: Enclave) -> None:
    """256 MiB of frames: a small program asks, the largest goes, nobody else notices."""
    e = own_enclave
    small, large, middle = hold(e, 20), hold(e, 120), hold(e, 60)
    events = subscriber(e.run_dir, [b"pressure"])
    while not events.poll(50):  # until it is subscribed
        e.request(t="sync")
    spaces = {a["pid"]: a["asid"] for a in e.status()["address_spaces"]}
    try:
        for _ in range(70):
            ask(small)
            assert small.stdout and small.stdout.readline() == "more\n"
            if large.poll() is not None:
                break
        assert large.wait(10) == -signal.SIGKILL
        oom = None
        while oom is None:
            assert events.poll(10000), "no OOM on the bus"
            batch = decode_batch(events.recv_multipart())[2]
            oom = next(iter(batch[batch["type"] == lib.SY_MSG_OOM]), None)
        assert (oom["asid"], oom["arg"]) == (spaces[large.pid], large.pid)
        assert oom["npages"] >= 120 << 8
    finally:
        events.close()
    assert end(small) == "0 lost\n"
    assert end(middle) == "0 lost\n"
    s = e.idle()
    assert s["counters"]["oom_kills"] == 1 and s["frames"]["mapped"] == 0
    assert f"ended pid {large.pid}" in log(e)
    e.check()


def test_one_that_is_alone_ends_itself(own_enclave: Enclave) -> None:
    """… where it could map that much; else it is told so in time."""
    p = own_enclave.popen([sys.executable, "-c", HOLDER, 600, 1], stdin=subprocess.DEVNULL)
    assert "Cannot allocate memory" in p.communicate(timeout=60)[0] and p.returncode == 1
    p = own_enclave.popen([sys.executable, "-c", HOLDER, 600, 1], "--overcommit", stdin=subprocess.DEVNULL)
    assert p.wait(60) == -signal.SIGKILL
    assert own_enclave.idle()["counters"]["oom_kills"] == 1
    own_enclave.check()
    assert own_enclave.run([sys.executable, "-c", "print(len(bytearray(50 << 20)))"]).stdout == f"{50 << 20}\n"


def test_many_at_once(own_enclave: Enclave) -> None:
    """Twenty programs that together want twice what there is: those that are ended are, the others lose nothing."""
    programs = [own_enclave.popen([sys.executable, "-c", HOLDER, 25, 1], stdin=subprocess.PIPE) for _ in range(20)]
    outs = [end(p) for p in programs]
    codes = [p.returncode for p in programs]
    assert set(codes) <= {0, -signal.SIGKILL}, [(c, o) for c, o in zip(codes, outs, strict=True) if c not in (0, -9)]
    assert codes.count(0) >= 1
    assert all("0 lost" in out for out, code in zip(outs, codes, strict=True) if code == 0)
    assert own_enclave.idle()["counters"]["oom_kills"] == codes.count(-signal.SIGKILL)
    own_enclave.check()


def test_magazines_are_emptied_first(own_enclave: Enclave) -> None:
    """What idle programs have in their magazines is taken back before anybody is ended."""
    e = own_enclave
    idle = [hold(e, 12) for _ in range(4)]
    s = wait_for(lambda: (s := e.status())["frames"]["granted"] > 4000 and s, 10, "magazines are not filled")
    there = s["frames"]["free"] + s["frames"]["reserved"] >> 8
    p = hold(e, there + (s["frames"]["granted"] >> 8) - 8)
    counters = e.status()["counters"]
    assert counters["oom_kills"] == 0 and counters["drained"] > 0
    assert end(p) == "0 lost\n"
    assert [end(i) for i in idle] == ["0 lost\n"] * 4
    e.idle()
    e.check()


def test_a_mapping_that_could_never_be_backed(own_enclave: Enclave) -> None:
    code = """
import mmap
def attempt(mib, flags=0, prot=3):
    try:
        return len(mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, prot=prot)) >> 20
    except OSError as e:
        return e.strerror
print(attempt(200), attempt(300), attempt(300, 0x4000), attempt(300, prot=mmap.PROT_READ))
try: bytearray(300 << 20)
except MemoryError: print("MemoryError")
"""
    out = own_enclave.run([sys.executable, "-c", code]).stdout
    assert out == "200 Cannot allocate memory 300 300\nMemoryError\n"


@pytest.fixture
def native_enclave(root_dir: Path) -> Iterator[Enclave]:
    """256 MiB, and what does not fit is native."""
    e = bring_up(root_dir / "n", "--ram", "256M", "--oom", "native")
    yield e
    take_down(e)


def test_what_does_not_fit_is_native(native_enclave: Enclave) -> None:
    """256 MiB of RAM, 600 MiB wanted: what does not fit is native memory, and says so."""
    e = native_enclave
    code = "b=bytearray(600<<20); b[::4096]=b'x'*len(b[::4096]); print(b.count(b'x'), flush=True); input()"
    p = e.popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert p.stdout and p.stdin and p.stdout.readline() == f"{600 * 256}\n"
    space = e.status()["address_spaces"][0]
    assert space["native_pages"] > 80000 and space["mapped"] > 50000
    e.check()
    p.stdin.close()
    p.wait(20)
    assert e.idle()["counters"]["oom_kills"] == 0
