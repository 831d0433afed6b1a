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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Enclave, module_enclave_of, wait_for
from numpy.typing import ArrayLike
from test_swap import lost_nothing, swapped, tables, waiting

from bus.client import Control, subscriber
from bus.codec import decode_batch
from bus.policy import Transaction
from components.thp import adaptive
from kernel.abi import FRAME_DTYPE, OP_DTYPE, lib, names

HUGE = lib.SY_HUGE_ORDER
PAGES = lib.SY_CHUNK_PAGES
MIB = 32
RAM = 192


started: list[subprocess.Popen[str]] = []  # of the test at hand
# (on two nodes autonuma would move pages of blocks that CPUs of both use)
module_enclave, enclave = module_enclave_of("th", "--ram", f"{RAM}M", "--swap", "256M", "--nodes", "1", started=started)


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


def blocks(h: Huge, e: Enclave) -> list[int]:
    """First frames of those of its ranges that are one block each, by address."""
    f = h.frames(e)
    return [int(f[i]) for i in range(0, len(f), PAGES) if f[i] % PAGES == 0 and (np.diff(f[i : i + PAGES]) == 1).all()]


def in_one_piece(h: Huge, e: Enclave) -> int:
    """Blocks of its memory that the table says are mapped whole."""
    return int(np.count_nonzero(tables(e).frames["order"][h.frames(e)] == HUGE)) // PAGES


def test_split_and_whole_again_while_threads_write(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """SPLIT: the frames stay, and what is in them; the kernel's huge entry goes. COLLAPSE brings it back, also where nothing has to move."""
    h = Huge(enclave, compiled, "advised")
    wait_for(lambda: h.mapped_huge() == MIB, 40, "not all is in huge blocks")
    with in_place_of(enclave, "thp") as commit, subscriber(enclave.run_dir, [b"move"], "thp") as events:
        f, all_of_it = h.frames(enclave), blocks(h, enclave)
        counted = enclave.status()["counters"]
        assert len(all_of_it) == MIB // 2
        # barriers stay as they are
        barriers = tables(enclave).frames["barrier"][f].copy()
        for turn, order in enumerate((0, 4, 8, 0) * 6):
            some = all_of_it[turn % 7 :: 5]
            n = len(some)
            assert set(commit(lib.SY_OP_SPLIT, np.array(some) + 77, order)) == {"COMPLETE"}
            wait_for(lambda n=n: h.mapped_huge() == MIB - 2 * n, 10, "they are still mapped by huge entries")
            wait_for(lambda n=n: in_one_piece(h, enclave) == len(all_of_it) - n, 5, "the table does not say so")
            assert set(commit(lib.SY_OP_SPLIT, some, order)) == {"STALE"}  # they are in such pieces
            assert (h.frames(enclave) == f).all()
            assert set(commit(lib.SY_OP_COLLAPSE, np.array(some) + 5, HUGE, 0)) == {"COMPLETE"}
            wait_for(lambda: h.mapped_huge() == MIB and in_one_piece(h, enclave) == len(all_of_it), 10, "they are not whole again")
            assert (h.frames(enclave) == f).all()
        assert (tables(enclave).frames["barrier"][f] == barriers).all()
        assert events.poll(5000)
        first = decode_batch(events.recv_multipart())[2][0]
        assert (first["type"], first["npages"], first["order"], first["pfn"]) == (lib.SY_MSG_PAGE_SPLIT, PAGES, 0, all_of_it[0])
        after = enclave.status()["counters"]
        assert after["split"] - counted["split"] == after["collapsed"] - counted["collapsed"] >= 24 * 3 * PAGES
        h.ends_well()


def stopped(pid: int) -> bool:
    """Have all its threads heard of SIGSTOP?"""
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat"))


def test_split_refused_and_nothing_changes(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """Stale, malformed and forbidden; of a program that is stopped, killed or has other plans."""
    h, other = Huge(enclave, compiled, "plain", 8), Huge(enclave, compiled, "plain", 8)
    wait_for(lambda: h.mapped_huge() == other.mapped_huge() == 8, 40, "not all is in huge blocks")
    with in_place_of(enclave, "kswapd") as commit:
        assert commit(lib.SY_OP_SPLIT, blocks(h, enclave)[0], 0) == ["NOT_PERMITTED"]
    wait_for(lambda: h.mapped_huge() == other.mapped_huge() == 8, 40, "not all is in huge blocks")
    with in_place_of(enclave, "thp") as commit:
        f, at = h.frames(enclave), blocks(h, enclave)
        free = int(np.flatnonzero(tables(enclave).frames["state"] == lib.SY_FRAME_FREE)[0])
        assert commit(lib.SY_OP_SPLIT, at[0], 0, behind=1) == ["STALE"]
        assert commit(lib.SY_OP_SPLIT, at[0], HUGE) == commit(lib.SY_OP_SPLIT, at[0], 65535) == ["INVALID"]
        assert commit(lib.SY_OP_SPLIT, RAM * 256, 0) == commit(lib.SY_OP_SPLIT, at[0], 0, arg=1) == ["INVALID"]
        assert commit(lib.SY_OP_SPLIT, free, 0) == ["STALE"]
        enclave.request(t="fault_order", asid=0, order=0, max_order=0)
        sparse = Huge(enclave, compiled, "sparse", 4)
        enclave.request(t="fault_order", asid=0, order=4, max_order=9)
        assert commit(lib.SY_OP_SPLIT, sparse.frames(enclave)[0], 0) == ["STALE"]  # no block
        sparse.ends_well()
        assert (h.frames(enclave) == f).all() and h.mapped_huge() == 8
        # who is stopped is told, and does it when it goes on; who is killed meanwhile does not
        for one in (h, other):
            one.p.send_signal(signal.SIGSTOP)
            wait_for(lambda pid=one.p.pid: stopped(pid), 10, "a thread goes on")
            assert set(commit(lib.SY_OP_SPLIT, blocks(one, enclave), 0)) == {"COMPLETE"}
        time.sleep(0.3)
        assert h.mapped_huge() == 8
        enclave.check()
        other.p.kill()
        other.p.wait(20)
        h.p.send_signal(signal.SIGCONT)
        wait_for(lambda: h.mapped_huge() == 0, 10, "it does not do what it was told")
        assert (h.frames(enclave) == f).all()
        h.ends_well()


class Frontier(Huge):
    """tests/programs/frontier.c: a region that is filled, and one that is not."""

    def __init__(self, e: Enclave, compiled: Callable[[str], Path], mib: int) -> None:
        self.p = e.popen([compiled("frontier"), mib], stdin=subprocess.PIPE)
        assert self.p.stdout
        self.mib = mib
        self.regions = [int(x, 16) for x in self.p.stdout.readline().split()]
        started.append(self.p)

    def touch(self, region: int, first: int, n: int, step: int = 1) -> None:
        assert self.p.stdin and self.p.stdout
        self.p.stdin.write(f"{region} {first} {n} {step}\n")
        self.p.stdin.flush()
        assert self.p.stdout.readline() == "done\n"

    def there(self, e: Enclave, region: int, chunk: int) -> np.ndarray[Any, Any]:
        """Frames of one of its ranges of 2 MiB."""
        f = tables(e).frames
        first = (self.regions[region] - lib.SY_ARENA_START) // 4096 + chunk * PAGES
        return np.flatnonzero((f["state"] == lib.SY_FRAME_MAPPED) & (f["asid"] == asid_of(e, self.p.pid)) & (f["vpage"] >= first) & (f["vpage"] < first + PAGES))

    def after_one_touch(self, e: Enclave, region: int, chunk: int) -> int:
        """Pages that there are then."""
        assert not len(self.there(e, region, chunk))
        self.touch(region, chunk * PAGES + 77, 1)
        return int(wait_for(lambda: len(self.there(e, region, chunk)), 5, "the gateway has not heard of it"))

    def demands_blocks(self, e: Enclave, chunk: int) -> None:
        """The first touch there finds none ready, as nobody has wanted any before: buddy hears of it."""
        self.after_one_touch(e, 0, chunk)
        asid = asid_of(e, self.p.pid)

        def ready() -> bool:
            f = tables(e).frames
            return bool(((f["state"] == lib.SY_FRAME_GRANTED) & (f["asid"] == asid) & (f["order"] == HUGE)).any())

        wait_for(ready, 10, "no block comes")

    def huge_here(self, region: int) -> int:
        self.at = self.regions[region]
        return self.mapped_huge()

    def ends_well(self) -> None:
        assert self.p.communicate(timeout=60)[0] == "wrong 0\n"
        assert self.p.returncode == 0


@pytest.fixture
def page_by_page(enclave: Enclave) -> Iterator[None]:
    """First touches begin with single pages: density shows."""
    enclave.request(t="fault_order", asid=0, order=0, max_order=0)
    yield
    enclave.request(t="fault_order", asid=0, order=4, max_order=9)


class Looks:
    """A policy over tables of 64 MiB: fill(chunk, pages, order) maps pages of one of address space 1's ranges, look(chunk, touched) has all of them looked at."""

    def __init__(self, free: int = 12000, usual: int = 0) -> None:
        self.frames = np.zeros(32 * PAGES, FRAME_DTYPE)
        mark = SimpleNamespace(free=free, high=64)
        header = SimpleNamespace(watermark=[mark], default_fault_order=usual, default_fault_order_max=usual, limit=[SimpleNamespace(members=0)] * lib.SY_MAX_LIMITS)
        self.policy = adaptive.Policy(self.frames, header, [(0, len(self.frames))], Transaction(self.frames), lambda: 0.0)
        self.policy.rebuild()
        self.used = 0

    def fill(self, chunk: int, pages: int, order: int = 0) -> None:
        at = self.frames[self.used * PAGES :][:pages]
        at["state"], at["asid"], at["order"], at["vpage"] = lib.SY_FRAME_MAPPED, 1, order, chunk * PAGES + np.arange(pages)
        self.used += 1

    def look(self, chunk: int, touched: bool) -> None:
        at = self.policy.heat[self.frames["vpage"] // PAGES == chunk]
        at["looks"], at["seen"], at["source"] = 3, 128 * touched, lib.SY_HEAT_HINT
        self.policy.heat[self.frames["vpage"] // PAGES == chunk] = at

    def step(self) -> dict[int, int]:
        """Ranges that were told an order (SY_ORDER_DEFAULT: as usual again), and which."""
        self.policy.look_at = 0.0
        self.policy.step()
        ops = self.policy.txn.take()
        ops = ops[(ops["op"] == lib.SY_OP_FAULT_ORDER) & (ops["barrier"] > 0) & (ops["barrier"] < lib.SY_CHUNKS)]
        assert (ops["asid"] == 1).all()
        return {int(o["pfn"]) + k: int(o["order"]) for o in ops for k in range(o["barrier"])}


def test_rows_of_dense_ranges_say_what_comes_beyond() -> None:
    t = Looks()
    t.fill(100, PAGES)
    t.fill(200, PAGES - 100)
    assert t.step() == {99: 4, 101: 4}  # as far as the row is long; the other is not dense
    for chunk in (101, 102, 103):
        t.fill(chunk, PAGES - 20)
    t.policy.header.default_fault_order = 4
    # two directions, two blocks each are allowed (an eighth is four); what is usual anyway need not be said
    assert t.step() == {99: HUGE, 98: HUGE, 101: lib.SY_ORDER_DEFAULT, 104: HUGE, 105: HUGE}
    assert t.step() == {}
    t.look(102, touched=False)  # nobody uses what is there: the row has ended, and so does the way of filling it
    assert t.step() == dict.fromkeys((98, 99, 104, 105), lib.SY_ORDER_DEFAULT) | {102: 0}
    t.look(102, touched=True)
    assert t.step() == {102: lib.SY_ORDER_DEFAULT} | dict.fromkeys((98, 99, 104, 105), HUGE)
    t.policy.header.watermark[0].free = 1000
    assert t.step() == dict.fromkeys((98, 99, 104, 105), lib.SY_ORDER_DEFAULT)  # memory is short


def test_blocks_count_until_somebody_has_looked() -> None:
    t = Looks()
    for chunk in range(100, 106):
        t.fill(chunk, PAGES, HUGE if chunk > 102 else 0)
    t.step()
    assert t.policy.dump()["spent"] == 3 * PAGES and t.policy.told[1].tolist().count(HUGE) == 1  # one of four is left
    t.look(103, touched=True)
    t.look(104, touched=True)
    t.step()
    assert t.policy.dump()["spent"] == PAGES and t.policy.told[1].tolist().count(HUGE) == 3
    t.look(105, touched=False)
    t.step()
    assert t.policy.dump()["spent"] == PAGES
    t.fill(300, PAGES, HUGE)
    t.fill(301, PAGES, HUGE)
    t.fill(302, PAGES, HUGE)
    t.step()
    assert t.policy.dump()["spent"] == 4 * PAGES and HUGE not in t.policy.told[1]


def test_thin_ranges_go_page_by_page_unless_there_is_plenty() -> None:
    t = Looks(usual=4)
    for chunk in range(100, 110):
        t.fill(chunk, 40)
    assert t.step() == {}
    t.policy.header.watermark[0].free = 6000
    assert t.step() == dict.fromkeys(range(90, 120), 0)


def told(e: Enclave, order: int) -> int:
    """Ranges that have that order of their own."""
    return int(e.component("thp")["dump"].get("ranges", {}).get(str(order), 0))


def test_orders_grow_where_memory_is_used_densely(enclave: Enclave, compiled: Callable[[str], Path], page_by_page: None) -> None:
    """One program, a region that is filled and one of which every eighth page is touched: step by step, and by range; shrinking as memory runs out."""
    h = Frontier(enclave, compiled, 96)
    h.touch(1, 0, 8 * PAGES // 8, 8)
    h.touch(0, 0, PAGES)
    wait_for(lambda: told(enclave, 4), 20, "no middle order")
    assert h.after_one_touch(enclave, 0, 1) == 16  # behind one dense range
    h.touch(0, PAGES, 5 * PAGES)
    wait_for(lambda: told(enclave, HUGE), 20, "no whole blocks")
    h.demands_blocks(enclave, 6)
    huge = h.huge_here(0)
    assert h.after_one_touch(enclave, 0, 7) == PAGES
    f = h.there(enclave, 0, 7)
    assert f[0] % PAGES == 0 and (np.diff(f) == 1).all() and (tables(enclave).frames["order"][f] == HUGE).all()
    assert h.huge_here(0) >= huge + 2
    assert h.after_one_touch(enclave, 1, 8) == 1 and h.huge_here(1) == 0  # nothing dense is near
    # a new thp reads the same from the tables
    os.kill(enclave.component("thp")["pid"], signal.SIGKILL)
    wait_for(lambda: enclave.component("thp")["state"] == "online" and told(enclave, HUGE), 20, "the next one does not know")
    assert h.after_one_touch(enclave, 0, 8) == PAGES and h.after_one_touch(enclave, 1, 9) == 1
    # … one that has other plans does not keep to that
    with policy(enclave, "thp", "madvise", "adaptive"):
        wait_for(lambda: "spent" not in enclave.component("thp")["dump"] and str(asid_of(enclave, h.p.pid)) in enclave.component("thp")["dump"].get("orders", {}), 20, "it has not begun")
        assert h.after_one_touch(enclave, 0, 9) == 1
    wait_for(lambda: told(enclave, HUGE), 20, "the next one does not know")
    # … and all of it is no longer so under pressure
    p = waiting(enclave, RAM)
    wait_for(lambda: not told(enclave, HUGE) and not told(enclave, 4), 20, "still large blocks, and no memory")
    assert h.after_one_touch(enclave, 0, 10) < 16
    lost_nothing(p)
    h.ends_well()


def test_no_more_is_wasted_than_its_share(enclave: Enclave, compiled: Callable[[str], Path], page_by_page: None) -> None:
    """A program that fills some ranges and then touches one page of each: whole blocks until an eighth of memory is at stake, then smaller ones."""
    share = RAM * 256 // 8
    h = Frontier(enclave, compiled, 96)
    h.touch(0, 0, 6 * PAGES)
    wait_for(lambda: told(enclave, HUGE), 20, "no whole blocks")
    h.demands_blocks(enclave, 6)
    h.touch(0, 6 * PAGES, PAGES)
    taken: list[int] = []
    for chunk in range(7, 40):
        before = enclave.component("thp")["dump"]["spent"]
        taken.append(h.after_one_touch(enclave, 0, chunk))
        if taken[-1] == PAGES:
            wait_for(lambda before=before: enclave.component("thp")["dump"]["spent"] > before, 10, "it does not look")
    blocks_taken = taken.count(PAGES)
    assert 4 <= blocks_taken <= share // PAGES and set(taken[-12:]) <= {1, 16}, taken
    h.ends_well()


def present(pid: int, vpage: int) -> np.ndarray[Any, Any]:
    """Which of a range's 512 pages the kernel has an entry for."""
    with open(f"/proc/{pid}/pagemap", "rb") as f:
        f.seek((lib.SY_ARENA_START // 4096 + vpage) * 8)
        return np.frombuffer(f.read(8 * PAGES), np.uint64) >> np.uint64(63) == 1


def test_kswapd_takes_a_part(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """What is to leave a block is seen in time: the rest stays mapped, in pieces, without a fault; and the block comes back whole."""
    h = Frontier(enclave, compiled, 16)
    h.touch(0, 0, 4 * PAGES)
    wait_for(lambda: h.huge_here(0) == 8, 20, "no huge blocks")
    f = tables(enclave).frames
    at = [int(h.there(enclave, 0, chunk)[0]) for chunk in (1, 2)]
    some = np.concatenate([np.arange(first + 3, first + PAGES, 4) for first in at])
    asid, vpages = asid_of(enclave, h.p.pid), f["vpage"][at].tolist()
    before = enclave.status()["counters"]
    with in_place_of(enclave, "kswapd") as commit:
        try:
            enclave.cli("watermarks", "4000", "8000", "24000")  # kswapd would be at work, but nothing has to leave at once
            faults = next(a["faults"] for a in enclave.status()["address_spaces"] if a["asid"] == asid)
            assert set(commit(lib.SY_OP_RECLAIM, some, 0, lib.SY_RECLAIM_STANDBY)) == {"COMPLETE"}
            both = np.concatenate([np.arange(first, first + PAGES) for first in at])
            wait_for(lambda: not f["order"][both].any(), 20, "they are not split")
            # (the access monitor may look at pages of the others meanwhile, which are split then, too)
            assert enclave.status()["counters"]["split"] >= before["split"] + 2 * PAGES and h.huge_here(0) <= 4
            # what stands by still does, and all is there but what was taken from sight
            assert (f["flags"][some] & lib.SY_FF_STANDBY != 0).all()
            for first, vpage in zip(at, vpages, strict=True):
                wait_for(lambda a=first, v=vpage: (present(h.p.pid, v) == (f["flags"][a : a + PAGES] & lib.SY_FF_AGED == 0)).all(), 10, "not mapped")
            assert set(commit(lib.SY_OP_RECLAIM, some, 0)) == {"COMPLETE"}
            wait_for(lambda: enclave.status()["counters"]["swapped_out"] >= before["swapped_out"] + len(some), 20, "they do not leave")
            for first, vpage in zip(at, vpages, strict=True):
                stays = np.arange(PAGES) % 4 != 3
                here = present(h.p.pid, vpage)
                assert not here[~stays].any() and here[stays].sum() >= stays.sum() - np.count_nonzero(f["flags"][first : first + PAGES] & lib.SY_FF_AGED)
            assert faults == next(a["faults"] for a in enclave.status()["address_spaces"] if a["asid"] == asid)
        finally:
            enclave.cli("watermarks", str(RAM * 2), str(RAM * 4), str(RAM * 8))
    h.touch(0, 0, 4 * PAGES)
    wait_for(lambda: h.huge_here(0) == 8, 30, "they are not whole again")
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
