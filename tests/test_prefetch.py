"""PREFETCH: pages come back before they are asked for, or stay; nobody who touches one meanwhile notices."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from conftest import Enclave, module_enclave_of, wait_for
from numpy.typing import NDArray
from test_swap import lost_nothing, tables, waiting

from bus.client import Control, subscriber
from bus.codec import decode_batch
from bus.policy import Transaction
from kernel.abi import OP_DTYPE, STORED_DTYPE, lib, names

# Fills memory so that every page is its own, says so, and after each line of input whether it is still as it was.
PROGRAM = """
import sys, mmap
n = int(sys.argv[1])
m = mmap.mmap(-1, n << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page = lambda i: (b"%08d" % i + bytes(i * k & 255 for k in range(24))) * 128
for i in range(n): m[i << 12:i + 1 << 12] = page(i)
print("filled", flush=True)
for line in sys.stdin: print(sum(m[i << 12:i + 1 << 12] != page(i) for i in range(n)), flush=True)
"""
PAGES = 2048


# The tests commit in kswapd's place.
module_enclave, enclave = module_enclave_of("pf", "--ram", "48M", "--swap", "256M", "--heat-cpu", "0%", prepare=lambda e: e.supervisorctl("stop", "kswapd"), sound=lambda s: s["swap"]["used"] == 0)


class Filled:
    """A program with PAGES pages of its own, all of which are in the store."""

    def __init__(self, e: Enclave, commit: Callable[[NDArray[np.void]], object]) -> None:
        self.e, self.tables = e, tables(e)
        self.process = subprocess.Popen(
            e.command([sys.executable, "-c", PROGRAM, PAGES]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout and self.process.stdout.readline() == "filled\n"
        self.asid = wait_for(lambda: self._asid(), 10, "it has not joined")
        self.swap_out(commit)

    def _asid(self) -> int:
        return next((a["asid"] for a in self.e.status()["address_spaces"] if a["pid"] == self.process.pid), 0)

    def space(self) -> dict[str, int]:
        return next(a for a in self.e.status()["address_spaces"] if a["asid"] == self.asid)

    def stored(self) -> NDArray[np.int64]:
        """Its slots, by address."""
        slots = self.tables.slots
        ours = np.flatnonzero(slots["asid"] == self.asid)
        return ours[np.argsort(slots["vpage"][ours])]

    def swap_out(self, commit: Callable[[NDArray[np.void]], object]) -> None:
        f = self.tables.frames

        def out() -> bool:
            mapped = (f["state"] == lib.SY_FRAME_MAPPED) & (f["asid"] == self.asid)
            txn = Transaction(f)
            txn.add(lib.SY_OP_RECLAIM, np.flatnonzero(mapped & (f["flags"] & lib.SY_FF_SWAPPING == 0))[:4096], 0)
            if len(txn):
                commit(txn.take())
            return len(self.stored()) >= PAGES

        wait_for(out, 20, "its pages do not leave")

    def wrong(self) -> int:
        """Looks at all of its pages."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        out, _ = self.process.communicate(timeout=20)
        assert (out, self.process.returncode) == ("", 0)


@contextlib.contextmanager
def kswapd(e: Enclave) -> Iterator[Callable[[NDArray[np.void]], NDArray[np.uint32]]]:
    """Commits in kswapd's place: operations to results."""
    with Control(e.run_dir, 5, "kswapd") as c:
        c.request({"t": "hello", "name": "kswapd", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()})

        def commit(ops: NDArray[np.void]) -> NDArray[np.uint32]:
            return np.frombuffer(c.exchange({"t": "txn", "name": "kswapd"}, ops.tobytes())[1], OP_DTYPE)["result"]

        yield commit


@contextlib.contextmanager
def filled(e: Enclave) -> Iterator[tuple[Filled, Callable[..., list[str]]]]:
    """(the program, PREFETCH of slots with some fields changed: the results' names)"""
    with kswapd(e) as commit:
        f = Filled(e, commit)

        def prefetch(at: NDArray[np.int64], **change: int) -> list[str]:
            txn = Transaction(f.tables.frames)
            txn.prefetch(f.tables.slots, at)
            ops = txn.take()
            for name, value in change.items():
                ops[name] = value
            return [names("SY_R_")[int(r)] for r in commit(ops)]

        try:
            yield f, prefetch
        finally:
            if f.process.poll() is None:
                f.process.communicate(timeout=20)


def prefetched(e: Enclave) -> int:
    return int(e.status()["counters"]["prefetched"])


def test_pages_come_back_unasked(enclave: Enclave) -> None:
    with filled(enclave) as (f, prefetch), subscriber(enclave.run_dir, [b"page"], "kswapd") as events:
        before, at = prefetched(enclave), f.stored()[:1500]
        vpages = f.tables.slots["vpage"][at].tolist()
        time.sleep(0.2)  # a subscription takes effect some time after it is made
        assert prefetch(at[:1000]) == ["COMPLETE"] * 1000
        wait_for(lambda: prefetched(enclave) == before + 1000, 10, "they do not come back")
        # Frames MAPPED, each at its page's place.
        frames = f.tables.frames
        back = np.flatnonzero((frames["state"] == lib.SY_FRAME_MAPPED) & (frames["asid"] == f.asid))
        assert set(vpages[:1000]) <= set(frames["vpage"][back].tolist())
        told: list[int] = []
        while len(told) < 1000 and events.poll(5000):
            batch = decode_batch(events.recv_multipart())[2]
            told += batch["vpage"][batch["type"] == lib.SY_MSG_PAGE_PREFETCHED].tolist()
        assert sorted(told) == sorted(vpages[:1000])
        # Their slots are free, so it cannot be done twice; and the program finds everything as it was, without a fault for these.
        assert prefetch(at[:1000], asid=f.asid) == ["STALE"] * 1000
        faults = f.space()["faults"]
        assert f.wrong() == 0
        assert f.space()["faults"] - faults < PAGES - 1000 + 200
        f.end()


def test_refused_and_nothing_changes(enclave: Enclave) -> None:
    with filled(enclave) as (f, prefetch):
        at = f.stored()
        before = prefetched(enclave), f.tables.slots[at].tolist()
        one = at[:1]
        out = int(f.tables.slots["out"][one[0]])
        slots = len(f.tables.slots)
        free = int(np.flatnonzero(f.tables.slots["asid"] == 0)[0])
        assert prefetch(one, barrier=out + 1) == ["STALE"]
        assert prefetch(one, arg=int(f.tables.slots["vpage"][one[0]]) + 1) == ["STALE"]
        assert prefetch(one, pfn=free) == ["STALE"]
        assert prefetch(one, asid=f.asid + 1000) == ["NOT_FOUND"]
        for wrong in ({"pfn": slots}, {"pfn": 0xFFFFFFFF}, {"order": 1}, {"arg": lib.SY_ARENA_PAGES}, {"arg": (1 << 64) - 1}):
            assert prefetch(one, **wrong) == ["INVALID"], wrong
        # Never below the low watermark.
        mark = enclave.status()["nodes"][0]
        try:
            half = mark["frames"] // 2
            enclave.request(t="watermarks", node=0, min=half, low=half, high=half)
            have = enclave.status()["nodes"][0]["free"]
            results = prefetch(at[:2000])
            room = max(0, have - half)
            assert abs(results.count("COMPLETE") - room) < 200 and results.count("FULL") == 2000 - results.count("COMPLETE")
            assert results[-1] == "FULL"
        finally:
            enclave.request(t="watermarks", node=0, **{k: mark[k] for k in ("min", "low", "high")})
        if not room:
            assert (prefetched(enclave), f.tables.slots[at].tolist()) == before
        assert f.wrong() == 0
        f.end()


def test_a_stopped_program_gets_them_later(enclave: Enclave) -> None:
    with filled(enclave) as (f, prefetch):
        before, at = prefetched(enclave), f.stored()[:400]
        os.kill(f.process.pid, signal.SIGSTOP)
        try:
            assert prefetch(at[:200]) == ["COMPLETE"] * 200
            time.sleep(0.3)
            assert prefetched(enclave) == before
            assert "BUSY" in prefetch(at[300:])  # it takes no more
            enclave.check()
        finally:
            os.kill(f.process.pid, signal.SIGCONT)
        wait_for(lambda: prefetched(enclave) >= before + 200, 10, "they do not come back")
        assert f.wrong() == 0
        f.end()


def test_killed_while_pages_come_back(enclave: Enclave) -> None:
    with filled(enclave) as (f, prefetch):
        prefetch(f.stored()[:1000])
        f.process.kill()
        f.process.wait(20)
        wait_for(lambda: not f.stored().size, 10, "slots are left")


def test_touched_taken_away_and_brought_back_at_once(enclave: Enclave) -> None:
    """The program looks at all of its memory all the time: whoever is first, it reads what it wrote."""
    before = prefetched(enclave)
    p = waiting(enclave, 20)
    t = tables(enclave)
    with kswapd(enclave) as commit:
        rng, until, results = np.random.default_rng(1), time.monotonic() + 3, np.zeros(16, np.int64)
        while time.monotonic() < until:
            txn = Transaction(t.frames)
            mapped = np.flatnonzero(t.frames["state"] == lib.SY_FRAME_MAPPED)
            txn.add(lib.SY_OP_RECLAIM, rng.choice(mapped, min(len(mapped), 1000), replace=False), 0)
            stored = np.flatnonzero((t.slots["asid"] > 0) & (t.slots["asid"] < 1 << 31))  # (not what is on its way)
            txn.prefetch(t.slots, stored[:2000])
            ops = txn.take()
            results += np.bincount(commit(ops)[ops["op"] == lib.SY_OP_PREFETCH], minlength=16)
    lost_nothing(p)
    assert results[lib.SY_R_COMPLETE] > 100 and prefetched(enclave) > before + 100
    assert results[lib.SY_R_COMPLETE] >= prefetched(enclave) - before


def test_superfetch_brings_back_what_there_is_room_for(enclave: Enclave) -> None:
    """What left for want of memory is there again when memory is, without having been touched."""
    with filled(enclave) as (f, _):
        before, faults = prefetched(enclave), f.space()["faults"]
        enclave.supervisorctl("start", "kswapd")
        enclave.cli("swap", "kswapd", "superfetch")
        wait_for(lambda: f.space()["swapped"] < 100, 20, "they do not come back")
        assert prefetched(enclave) - before > PAGES - 200 and f.space()["faults"] < faults + 200
        assert enclave.component("kswapd")["implementation"] == "superfetch"
        assert f.wrong() == 0
        f.end()
    enclave.supervisorctl("stop", "kswapd")


def test_on_the_simulated_machine() -> None:
    """The same results and events."""
    from kernel.providers.sim.machine import Machine

    m = Machine(np.arange(100, dtype=np.uint64) + 7, 64)
    m.access(np.arange(50))
    ops = np.zeros(10, OP_DTYPE)
    ops["op"], ops["pfn"], ops["barrier"] = lib.SY_OP_RECLAIM, np.arange(10), m.frames["barrier"][:10]
    assert (m.commit(ops)["result"] == lib.SY_R_COMPLETE).all()
    m.events()
    assert m.slots.dtype == STORED_DTYPE and m.slots["vpage"][m.slots["asid"] > 0].tolist() == list(range(7, 17))
    txn = Transaction(m.frames)
    txn.prefetch(m.slots, np.flatnonzero(m.slots["asid"]))
    ops = txn.take()
    bad = np.repeat(ops[:1], 6)
    bad["barrier"][0] += 1
    bad["arg"][1] += 1
    bad["asid"][2] = 5
    bad["pfn"][3] = 1000
    bad["arg"][4] = lib.SY_ARENA_PAGES
    bad["order"][5] = 1
    found = [names("SY_R_")[int(r)] for r in m.commit(bad)["result"]]
    assert found == ["STALE", "STALE", "NOT_FOUND", "INVALID", "INVALID", "INVALID"]
    assert not len(m.events()) and m.check() == []
    assert (m.commit(ops)["result"] == lib.SY_R_COMPLETE).all()
    types = m.events()["type"]
    assert np.count_nonzero(types == lib.SY_MSG_PAGE_PREFETCHED) == np.count_nonzero(types == lib.SY_MSG_PAGE_MAPPED) == 10
    faults = m.faults
    m.access(np.arange(50))
    assert (m.faults, m.prefetched, m.refaults, m.check()) == (faults, 10, 0, [])
    # At the low watermark there is no room.
    m.header.watermark[0].low = len(m.frames) // 2
    taken = np.flatnonzero(m.frames["state"] == lib.SY_FRAME_MAPPED)[:5]
    ops = np.zeros(5, OP_DTYPE)
    ops["op"], ops["pfn"], ops["barrier"] = lib.SY_OP_RECLAIM, taken, m.frames["barrier"][taken]
    m.commit(ops)
    txn.prefetch(m.slots, np.flatnonzero(m.slots["asid"]))
    assert (m.commit(txn.take())["result"] == lib.SY_R_FULL).all() and m.check() == []
