"""Two enclaves side by side: no byte, frame or message of one is ever seen in the other, also after crashes and reuse. And within one:
whoever gets a frame finds zeros."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SYLVIE, Enclave, bring_up, open_files, take_down, wait_for

# Takes memory in all ways, looks that each new byte is zero, and fills it with a mark of 16 bytes; frees and takes again until argv[2] MiB
# have passed through. Prints "dirty" and what it found, or "ok".
FILL = """
import ctypes, mmap, os, random, sys
mark, total, r = sys.argv[1].encode(), int(sys.argv[2]), random.Random(int(sys.argv[3]))
assert len(mark) == 16
held, passed = [], 0
while passed < total << 20:
    n = r.choice((1, 3, 16, 64, 300, 1024)) << 12
    m = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if r.random() < 0.3:
        m[:] = mark * (n // 16)
        m.madvise(mmap.MADV_DONTNEED)
    if m[:] != bytes(n):
        print("dirty", next(m[i:i + 16] for i in range(0, n, 16) if m[i:i + 16] != bytes(16)))
        sys.exit(1)
    m[:] = mark * (n // 16)
    held.append(m)
    passed += n
    if len(held) > 60:
        held.pop(r.randrange(len(held))).close()
    if r.random() < 0.01 and os.fork() == 0:
        os._exit(0)
print("ok", flush=True)
if len(sys.argv) > 4: sys.stdin.read()
"""
MARKS = ("OfTheFirst.Encl.", "OfTheOther+Encl+")


@pytest.fixture
def two(root_dir: Path) -> Iterator[tuple[Enclave, Enclave]]:
    with contextlib.ExitStack() as down:
        pair = []
        for name in ("ia", "ib"):
            pair.append(bring_up(root_dir / name, "--ram", "128M"))
            down.callback(take_down, pair[-1])
        yield pair[0], pair[1]


def holes_of(pid: int, name: str) -> Iterator[tuple[str, mmap.mmap]]:
    """The memory files of a process whose name contains ``name``, mapped."""
    seen = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
            info = os.stat(f"/proc/{pid}/fd/{fd}")
            if name not in link or info.st_ino in seen or not info.st_size:
                continue
            seen.add(info.st_ino)
            with open(f"/proc/{pid}/fd/{fd}", "rb") as f:
                yield link, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)


def contains(pid: int, mark: str) -> dict[str, int]:
    """How often a mark is in each of a gateway's memory files: RAM and all tables."""
    found = {}
    for link, memory in holes_of(pid, "sylvie-"):
        size, n, at = len(memory), 0, 0
        if size > 1 << 27:  # a page table of 128 MiB: sparse, only what is there
            size = 1 << 22
        while (at := memory.find(mark.encode(), at, size)) >= 0:
            n, at = n + 1, at + 16
        memory.close()
        if n:
            found[link.split(":")[-1].split(" ")[0]] = n
    return found


def test_no_byte_frame_or_message_crosses(two: tuple[Enclave, Enclave], root_dir: Path, request: pytest.FixtureRequest) -> None:
    """Programs of both fill all memory there is with the mark of their enclave, are killed in the middle, and others follow them."""
    r = random.Random(5)
    logs = [root_dir / f"events-{e.run_dir.name}" for e in two]
    streams = [
        subprocess.Popen([SYLVIE, "--run-dir", e.run_dir, "events", "mm", "--json"], stdout=log.open("w"))
        for e, log in zip(two, logs, strict=True)
    ]
    for s in streams:
        request.addfinalizer(s.kill)
    time.sleep(1)  # until they are subscribed
    pids: list[set[int]] = [set(), set()]
    killed: set[int] = set()  # perhaps before they had asked for anything
    for round_ in range(2):
        programs = []
        for i, e in enumerate(two):
            for k in range(3):
                p = e.popen([sys.executable, "-c", FILL, MARKS[i], "150", round_ * 10 + k])
                pids[i].add(p.pid)
                programs.append(p)
        time.sleep(r.uniform(0.3, 1.0))
        for p in (programs[0], programs[3]):
            os.kill(p.pid, signal.SIGKILL)
            killed.add(p.pid)
        for p in programs:
            out, _ = p.communicate(timeout=60)
            assert p.returncode == -signal.SIGKILL or (p.returncode, out) == (0, "ok\n"), out
    for e in two:
        e.idle()
        e.check()
    for i, e in enumerate(two):
        gateway = e.gateway_pid()
        assert contains(gateway, MARKS[i]).get("sylvie-ram", 0) > 10000, "the marks are not where they should be"
        assert contains(gateway, MARKS[1 - i]) == {}
        # each bus tells of its own programs only
        time.sleep(0.5)
        streams[i].terminate()
        streams[i].wait(20)
        rows = [json.loads(line) for line in logs[i].read_text().splitlines()]
        told = {row["arg"] for row in rows if row["type"] in ("MM_NEW", "MM_EXIT")}
        assert pids[i] - killed <= told and not told & pids[1 - i]


def test_a_program_holds_descriptors_of_its_own_enclave_only(two: tuple[Enclave, Enclave]) -> None:
    """By device and inode: what is mapped into a program is a file of its own gateway, and none of the other's."""
    programs = [
        e.popen([sys.executable, "-c", FILL, MARKS[i], "20", "1", "wait"], stdin=subprocess.PIPE)
        for i, e in enumerate(two)
    ]
    for p in programs:
        assert p.stdout and p.stdout.readline() == "ok\n"
    files = [{*open_files(f"/proc/{e.gateway_pid()}/fd", "memfd:sylvie").values()} for e in two]
    for i, p in enumerate(programs):
        mapped = {
            int(line.split()[4])
            for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()
            if "memfd:sylvie" in line
        }
        assert len(mapped) >= 3 and mapped <= files[i] and not mapped & files[1 - i]
        for task in os.listdir(f"/proc/{p.pid}/task"):
            assert files[1 - i].isdisjoint(open_files(f"/proc/{p.pid}/task/{task}/fd").values())
    for p in programs:
        p.communicate(timeout=30)


def test_frames_are_reused_clean(enclave: Enclave) -> None:
    """One enclave: killed programs leave their marks in frames; the next ones see zeros only."""
    for round_ in range(2):
        p = enclave.popen([sys.executable, "-c", FILL, MARKS[0], "1000", str(round_)])
        wait_for(lambda: enclave.status()["frames"]["mapped"] > 2000, 20, "nothing is mapped")
        p.kill()
        p.wait(20)
        assert enclave.run([sys.executable, "-c", FILL, MARKS[1], "600", str(round_)]).stdout == "ok\n"
