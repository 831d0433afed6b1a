"""What meets pages that are in the store, or were taken away for a look: the kernel's own hands, debuggers, locks of threads that end."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Enclave, module_enclave_of, wait_for

from bus.client import Control
from bus.runtime import fetch_tables
from kernel.abi import OP_DTYPE, lib

Compiled = Callable[[str], Path]


class Kswapd:
    """The test itself: which page leaves is its decision."""

    def __init__(self, e: Enclave) -> None:
        self.e = e
        self.tables = fetch_tables(e.run_dir, lib.SY_C_KSWAPD)
        self.control = Control(e.run_dir, 5, "kswapd")
        hello = {"t": "hello", "name": "kswapd", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()}
        self.control.request(hello)

    def commit(self, op: int, pid: int, address: int) -> bool:
        frames: Any = self.tables.frames
        asid = next(a["asid"] for a in self.e.status()["address_spaces"] if a["pid"] == pid)
        vpage = (address - lib.SY_ARENA_START) // 4096
        at = (frames["state"] == lib.SY_FRAME_MAPPED) & (frames["asid"] == asid) & (frames["vpage"] == vpage)
        if at.sum() != 1:
            return False
        pfn = at.argmax()
        ops = np.zeros(1, OP_DTYPE)
        ops["op"], ops["pfn"], ops["barrier"] = op, pfn, frames["barrier"][pfn]
        raw = self.control.exchange({"t": "txn", "name": "kswapd"}, ops.tobytes())[1]
        return bool(np.frombuffer(raw, OP_DTYPE)["result"][0] == lib.SY_R_COMPLETE)

    def swapped_out(self) -> int:
        """Pages that have left, or that somebody touched before they had."""
        c = self.e.status()["counters"]
        return int(c["swapped_out"] + c["swap_cancelled"])

    def take(self, pid: int, address: int) -> None:
        """The page there to the store, and the one a MiB further from its program's sight."""
        before = self.swapped_out()
        # Stale until the gateway has read what became of the page the last time. Commands are carried out in order.
        for op, at in ((lib.SY_OP_AGE, address + (1 << 20)), (lib.SY_OP_RECLAIM, address)):
            wait_for(lambda op=op, at=at: self.commit(op, pid, at), 10, "the page may not leave")
        wait_for(lambda: self.swapped_out() > before, 10, "the page does not leave")


# What leaves and what comes back is ours to say.
module_enclave, enclave = module_enclave_of(
    "ov", "--ram", "64M", "--swap", "64M", prepare=lambda e: e.supervisorctl("stop", "kswapd", "thp"), sound=lambda s: s["swap"]["used"] == 0
)


@pytest.fixture(scope="module")
def kswapd(module_enclave: Enclave) -> Kswapd:
    return Kswapd(module_enclave)


def native(cmd: list[Any], times: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in cmd], input="\n" * times, capture_output=True, text=True, timeout=30)


def lines(out: str) -> list[str]:
    """Without addresses."""
    return [line for line in out.splitlines() if not line.startswith("0x")]


def over(enclave: Enclave, kswapd: Kswapd, cmd: list[Any], times: int) -> tuple[list[str], int]:
    """Output and status of the program, whose page has been taken so many times."""
    p = enclave.popen(cmd, stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout
        for _ in range(times):
            kswapd.take(p.pid, int(p.stdout.readline(), 16))
            p.stdin.write("\n")
            p.stdin.flush()
        return lines(p.communicate(timeout=30)[0]), p.returncode
    finally:
        p.kill()
        p.wait(10)


@pytest.mark.parametrize(
    ("what", "times"), [("calls", 3), ("stack", 1), ("owner_ends", 1), ("process_ends", 1), ("futexes", 2)]
)
def test_as_natively(enclave: Enclave, kswapd: Kswapd, compiled: Compiled, what: str, times: int) -> None:
    cmd = [compiled("over_swapped"), what]
    expected = native(cmd, times)
    assert over(enclave, kswapd, cmd, times) == (lines(expected.stdout), expected.returncode)


def test_core_dump(enclave: Enclave, kswapd: Kswapd, compiled: Compiled, tmp_path: Path) -> None:
    """The kernel serves no userfault for who dumps core, so a core has zeros for such pages; and all the rest."""
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        pytest.skip("this machine pipes core dumps to a program (kernel.core_pattern)")

    def core(run: Callable[[list[Any]], int]) -> list[bool]:
        at = tmp_path / run.__name__
        at.mkdir()
        cmd = ["bash", "-c", f"ulimit -c unlimited; cd {at}; exec {compiled('over_swapped')} core"]
        assert run(cmd) == -6
        data = next(at.glob("core*")).read_bytes()
        return [f"secret number {i} of the crashed".encode() in data for i in (0, 111, 222)]

    def natively(cmd: list[Any]) -> int:
        return native(cmd, 1).returncode

    def managed(cmd: list[Any]) -> int:
        return over(enclave, kswapd, cmd, 1)[1]

    assert core(natively) == [True, True, True]
    assert core(managed) == [False, False, True]


def through_mem(pid: int, address: int) -> bytes:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
            mem.seek(address)
            return mem.read(6)
    except OSError as e:
        return os.strerror(e.errno or 0).encode()


def by_readv(pid: int, address: int) -> bytes:
    to = ctypes.create_string_buffer(6)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(to), 6)
    there = (ctypes.c_size_t * 2)(address, 6)
    assert ctypes.CDLL(None).process_vm_readv(pid, here, 1, there, 1, 0) == 6
    return to.raw


def test_seen_from_outside(enclave: Enclave, kswapd: Kswapd, compiled: Compiled) -> None:
    """/proc/PID/mem and gdb cannot read what is away; process_vm_readv, and the program afterwards, have it."""
    p = enclave.popen([compiled("over_swapped"), "looked_at"], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout
        at = int(p.stdout.readline(), 16)
        pages = [at + (i << 20) for i in range(3)]
        kswapd.take(p.pid, at)
        error = os.strerror(5).encode()
        assert [through_mem(p.pid, a) for a in pages] == [error, error, b"page 2"]
        assert [by_readv(p.pid, a) for a in pages] == [b"page 0", b"page 1", b"page 2"]
        assert [through_mem(p.pid, a) for a in pages] == [b"page 0", b"page 1", b"page 2"]
        p.stdin.write("\n")
        p.stdin.flush()
        assert int(p.stdout.readline(), 16) == at
        kswapd.take(p.pid, at)
        looks = [arg for a in pages for arg in ("-ex", f"x/s {a:#x}")]
        gdb = ["gdb", "-q", "-nx", "-batch", "-p", str(p.pid), *looks]
        seen = subprocess.run(gdb, capture_output=True, text=True, timeout=60)
        for a in pages[:2]:
            assert f"Cannot access memory at address {a:#x}" in seen.stdout + seen.stderr, seen
        assert f'{pages[2]:#x}:\t"page 2"' in seen.stdout, seen
        assert lines(p.communicate("\n", timeout=20)[0]) == ["page 0, page 1, page 2"]
    finally:
        p.kill()
        p.wait(10)


def test_written_from_outside_while_it_leaves(enclave: Enclave, kswapd: Kswapd, compiled: Compiled) -> None:
    """process_vm_writev has found the page and waits for what it is to write there: that comes too late (docs/limits.md)."""
    libc = ctypes.CDLL(None, use_errno=True)
    source = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    local = ctypes.addressof(ctypes.c_char.from_buffer(source))
    uffd = libc.syscall(323, os.O_CLOEXEC)
    fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))  # UFFDIO_API
    fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", local, 4096, 1, 0)))  # UFFDIO_REGISTER, missing pages
    p = enclave.popen([compiled("over_swapped"), "looked_at"], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout
        at, wrote = int(p.stdout.readline(), 16), []
        here, there = (ctypes.c_size_t * 2)(local, 6), (ctypes.c_size_t * 2)(at, 6)
        writer = threading.Thread(target=lambda: wrote.append(libc.process_vm_writev(p.pid, here, 1, there, 1, 0)))
        writer.start()
        assert os.read(uffd, 32)  # it waits
        kswapd.take(p.pid, at)
        late = mmap.mmap(-1, 4096)
        late[:6] = b"update"
        fcntl.ioctl(uffd, 0xC028AA03, bytearray(struct.pack("QQQQq", local, ctypes.addressof(ctypes.c_char.from_buffer(late)), 4096, 0, 0)))  # UFFDIO_COPY
        writer.join(10)
        assert wrote == [6] and by_readv(p.pid, at) == b"page 0"
        p.stdin.write("\n")
        p.stdin.flush()
        assert int(p.stdout.readline(), 16) == at
        assert lines(p.communicate("\n", timeout=20)[0]) == ["page 0, page 1, page 2"]
    finally:
        p.kill()
        p.wait(10)
        os.close(uffd)
