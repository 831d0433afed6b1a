"""thp: scattered pages become one 2 MiB block under a running program, where it may, and nothing is lost whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Enclave, bring_up, take_down, wait_for
from numpy.typing import ArrayLike
from test_swap import lost_nothing, swapped, tables, waiting

from bus.client import Control, subscriber
from bus.codec import decode_batch
from kernel.abi import OP_DTYPE, lib, names

HUGE = lib.SY_HUGE_ORDER
PAGES = lib.SY_CHUNK_PAGES
MIB = 32
RAM = 192


@pytest.fixture(scope="module")
def roomy(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "th", "--ram", f"{RAM}M", "--swap", "256M")
    yield e
    take_down(e)


@pytest.fixture
def enclave(roomy: Enclave) -> Iterator[Enclave]:
    yield roomy
    while started:  # of a test that failed
        p = started.pop()
        p.kill()
        p.wait(10)
    roomy.idle()
    roomy.check()


@contextlib.contextmanager
def policy(e: Enclave, component: str, name: str, default: str) -> Iterator[None]:
    """Another implementation, for a while."""
    e.cli("swap", component, name)
    yield
    e.cli("swap", component, default)


@contextlib.contextmanager
def in_place_of(e: Enclave, component: str) -> Iterator[Callable[..., list[str]]]:
    """Commits in a component's place, which is stopped: commit(op, pfns, order, arg=0, behind=0, asid=0); the results' names."""
    frames = tables(e).frames
    e.supervisorctl("stop", component)
    try:
        with Control(e.run_dir, 5, component) as c:
            c.request({"t": "hello", "name": component, "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()})

            def commit(op: int, pfns: ArrayLike, order: int, arg: int = 0, behind: int = 0, asid: int = 0) -> list[str]:
                at = np.atleast_1d(np.asarray(pfns))
                ops = np.zeros(len(at), OP_DTYPE)
                ops["op"], ops["pfn"], ops["order"], ops["arg"], ops["asid"] = op, at, order, arg, asid
                ops["barrier"] = frames["barrier"][at % len(frames)] - behind
                _, raw = c.exchange({"t": "txn", "name": component}, ops.tobytes())
                return [names("SY_R_")[int(r)] for r in np.frombuffer(raw, OP_DTYPE)["result"]]

            yield commit
            c.request({"t": "goodbye", "name": component})
    finally:
        e.supervisorctl("start", component)
        wait_for(lambda: e.component(component)["state"] == "online", 20, component)


started: list[subprocess.Popen[str]] = []  # of the test at hand


class Huge:
    """tests/programs/huge.c: ``at`` = its memory."""

    def __init__(self, e: Enclave, compiled: Callable[[str], Path], what: str, mib: int = MIB, *options: str) -> None:
        self.p = e.popen([compiled("huge"), mib, what], *options, stdin=subprocess.PIPE)
        assert self.p.stdout
        self.mib = mib
        self.at = int(self.p.stdout.readline(), 16)
        started.append(self.p)

    def mapped_huge(self) -> int:
        """MiB of it that the kernel maps by 2 MiB entries, as smaps has it."""
        kib, inside = 0, False
        for line in Path(f"/proc/{self.p.pid}/smaps").read_text().splitlines():
            if m := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = self.at <= int(m[1], 16) < self.at + (self.mib << 20)
            elif inside and (m := re.match(r"ShmemPmdMapped: +(\d+) kB", line)):
                kib += int(m[1])
        return kib >> 10

    def frames(self, e: Enclave) -> np.ndarray[Any, Any]:
        """Rows of the frame table that are its memory's, by address."""
        f = tables(e).frames
        first = (self.at - lib.SY_ARENA_START) // 4096
        here = np.flatnonzero((f["state"] == lib.SY_FRAME_MAPPED) & (f["asid"] == asid_of(e, self.p.pid)) & (f["vpage"] >= first) & (f["vpage"] < first + self.mib * 256))
        return here[np.argsort(f["vpage"][here])]

    def ends_well(self) -> None:
        assert self.p.communicate("\n", timeout=60)[0] == "wrong 0, lost 0 0\n"
        assert self.p.returncode == 0


def asid_of(e: Enclave, pid: int) -> int:
    return int(next(a["asid"] for a in e.status()["address_spaces"] if a["pid"] == pid))


def test_mapped_by_huge_entries_while_threads_write(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """The default: all that is used densely ends up in blocks, and smaps says that the kernel maps them so."""
    before = enclave.status()["counters"]["collapsed"]
    enclave.supervisorctl("stop", "thp")  # on a slow machine it would be quicker than the program
    h = Huge(enclave, compiled, "plain")
    assert h.mapped_huge() < MIB // 2
    enclave.supervisorctl("start", "thp")
    wait_for(lambda: h.mapped_huge() >= MIB, 40, "not all is in huge blocks")

    def in_blocks() -> bool:
        f = h.frames(enclave)
        return len(f) == MIB * 256 and all((f[i] % PAGES == 0) and (np.diff(f[i : i + PAGES]) == 1).all() for i in range(0, len(f), PAGES))

    wait_for(in_blocks, 5, "the gateway has not heard of all")  # the kernel's mappings are there before the stub has answered
    h.ends_well()
    assert enclave.status()["counters"]["collapsed"] >= before + MIB * 128
    wait_for(lambda: enclave.component("thp")["dump"]["collapsed"] >= MIB // 4, 5, "it does not say so")


@pytest.mark.parametrize("what", ["small", "never"])
def test_who_does_not_want_them_has_none(enclave: Enclave, compiled: Callable[[str], Path], what: str) -> None:
    with policy(enclave, "thp", "always", "adaptive"):
        h, other = Huge(enclave, compiled, what, 16), Huge(enclave, compiled, "plain", 16)
        wait_for(lambda: other.mapped_huge() == 16, 40, "nothing is collapsed")
        time.sleep(0.5)
        assert h.mapped_huge() == 0
        h.ends_well()
        other.ends_well()


def test_only_where_it_is_wanted(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """madvise: MADV_HUGEPAGE and nothing else."""
    with policy(enclave, "thp", "madvise", "adaptive"):
        h, other = Huge(enclave, compiled, "advised", 16), Huge(enclave, compiled, "plain", 16)
        wait_for(lambda: h.mapped_huge() == 16, 40, "nothing is collapsed")
        time.sleep(0.5)
        assert other.mapped_huge() < 16
        h.ends_well()
        other.ends_well()


def test_sparse_ranges(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """One page of eight (order 0, so that first touches do not fill the rest): always takes what its share of waste allows, adaptive leaves it."""
    enclave.request(t="fault_order", asid=0, order=0, max_order=0)
    try:
        h = Huge(enclave, compiled, "sparse", 2 * MIB)
        time.sleep(1.5)
        assert h.mapped_huge() == 0
        with policy(enclave, "thp", "always", "adaptive"):
            most = RAM * 256 // 8
            wait_for(lambda: enclave.component("thp")["dump"].get("filled", 0) > most - PAGES, 40, "it does not use its share")
            assert 0 < len(h.frames(enclave)) - MIB * 64 <= most
        h.ends_well()
    finally:
        enclave.request(t="fault_order", asid=0, order=4, max_order=9)


def test_refused_and_nothing_changes(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """Stale, malformed and forbidden transactions; and what the stub refuses, an event tells."""
    with in_place_of(enclave, "thp") as commit:
        enclave.request(t="fault_order", asid=0, order=0, max_order=0)
        h = Huge(enclave, compiled, "sparse", 4)
        enclave.request(t="fault_order", asid=0, order=4, max_order=9)
        wait_for(lambda: len(h.frames(enclave)) == 128, 5, "the gateway has not heard of all")
        f = h.frames(enclave)
        free = int(np.flatnonzero(tables(enclave).frames["state"] == lib.SY_FRAME_FREE)[0])
        assert commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 511, behind=1) == ["STALE"]
        assert commit(lib.SY_OP_COLLAPSE, f[0], 3, 511) == commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 512) == ["INVALID"]
        assert commit(lib.SY_OP_COLLAPSE, RAM * 256, HUGE, 511) == commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 1 << 40) == ["INVALID"]
        assert commit(lib.SY_OP_COLLAPSE, free, HUGE, 511) == ["STALE"]
        assert commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 511 | lib.SY_COLLAPSE_ADVISED) == ["NOT_PERMITTED"]
        assert commit(lib.SY_OP_MIGRATE, f[0], 0, 0) == commit(lib.SY_OP_RECLAIM, f[0], 0) == ["NOT_PERMITTED"]
        assert (h.frames(enclave) == f).all()
        with subscriber(enclave.run_dir, [b"move"], "thp") as events:
            time.sleep(0.3)
            assert commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 447) == ["COMPLETE"]  # too many of them were never touched
            assert events.poll(5000)
            (m,) = decode_batch(events.recv_multipart())[2]
            assert (m["type"], m["arg"], m["npages"], m["pfn"]) == (lib.SY_MSG_MOVE_REFUSED, 61, PAGES, lib.SY_NO_FRAME)  # ENODATA
            assert (h.frames(enclave) == f).all()
            assert commit(lib.SY_OP_COLLAPSE, f[0], HUGE, 448) == ["COMPLETE"]
            assert events.poll(5000)
            (m,) = decode_batch(events.recv_multipart())[2]
            assert (m["type"], m["arg"], m["npages"]) == (lib.SY_MSG_PAGE_COLLAPSED, 64, PAGES)
            block = h.frames(enclave)[:PAGES]
            assert block[0] == m["pfn"] and (np.diff(block) == 1).all()
            assert commit(lib.SY_OP_COLLAPSE, int(block[7]), HUGE, 448) == ["STALE"]  # it is one already
        h.ends_well()


def test_killed_and_swapped_under_a_program(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    several = [Huge(enclave, compiled, what, 24) for what in ("plain", "advised", "sparse")]
    for turn in range(6):
        if turn % 3 == 2:
            enclave.cli("swap", "thp", ("always", "madvise")[turn // 3])
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(enclave.component("thp")["pid"], signal.SIGKILL)
            wait_for(lambda: enclave.component("thp")["state"] == "online", 20, "thp is not back")
        time.sleep(0.2)
    enclave.cli("swap", "thp", "adaptive")
    wait_for(lambda: several[0].mapped_huge() == 24, 40, "the last one does not go on")
    for h in several:
        h.ends_well()


def test_a_stopped_program_keeps_its_block_until_it_answers(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """Blocks that it is to move to are its own meanwhile, and nobody else waits; killed then, it gives all back."""
    with in_place_of(enclave, "thp") as commit:
        h, killed = Huge(enclave, compiled, "plain", 32), Huge(enclave, compiled, "plain", 32)
        for one in (h, killed):
            one.p.send_signal(signal.SIGSTOP)
            f = one.frames(enclave)
            scattered = [int(f[i]) for i in range(0, len(f), PAGES) if (np.diff(f[i : i + PAGES]) != 1).any()]
            assert set(commit(lib.SY_OP_COLLAPSE, scattered[:8], HUGE, 511)) == {"COMPLETE"}
        time.sleep(0.3)
        enclave.check()
        killed.p.kill()
        killed.p.wait(20)
        h.p.send_signal(signal.SIGCONT)
        h.ends_well()


def test_huge_blocks_leave_and_come_back(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """Programs larger than RAM, while blocks are made: kswapd takes them apart page by page."""
    h = Huge(enclave, compiled, "plain", MIB)
    wait_for(lambda: h.mapped_huge() >= MIB // 2, 40, "nothing is collapsed")
    before = enclave.status()["counters"]
    with policy(enclave, "thp", "always", "adaptive"):
        p = waiting(enclave, RAM)
        lost_nothing(p)
        h.ends_well()
    after = enclave.status()["counters"]
    assert after["swapped_out"] > before["swapped_out"] + 5000


def test_within_a_limit(enclave: Enclave) -> None:
    """What a move needs meanwhile counts, too."""
    p = enclave.popen(swapped("forks", "calls", mib=32), "--limit", "24M")
    out = p.communicate(timeout=90)[0]
    assert p.returncode == 0 and "child: 0" in out and out.splitlines()[0] == "filled: 0"
