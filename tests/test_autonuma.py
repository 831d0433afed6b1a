"""autonuma on two nodes that divide RAM: pages come to who uses them, go where a policy wants them, and nobody notices; and the topology."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Enclave, module_enclave_of, wait_for
from numpy.typing import NDArray
from test_swap import tables

from bus.policy import Transaction
from bus.tables import alike_blocks
from components.autonuma import tiering
from kernel.abi import FRAME_DTYPE, MSG_DTYPE, lib
from kernel.topology import find, levels, machine_nodes, measure, numbers

HALF = 64  # MiB a node


module_enclave, enclave = module_enclave_of("nu", "--ram", f"{2 * HALF}M", "--nodes", "2")


@dataclass
class Piece:
    """Memory of a program: so many pages at an address. Called: which share of it is on a node, by the frame table."""

    pid: int
    asid: int
    at: int
    pages: int
    frames: NDArray[np.void]

    def mine(self) -> NDArray[np.int64]:
        """Its frames."""
        f, first = self.frames, (self.at - lib.SY_ARENA_START) // 4096
        return np.flatnonzero((f["state"] == lib.SY_FRAME_MAPPED) & (f["asid"] == self.asid) & (f["vpage"] >= first) & (f["vpage"] < first + self.pages))

    def __call__(self, node: int) -> float:
        return float(np.count_nonzero(self.frames["node"][self.mine()] == node)) / self.pages


@contextlib.contextmanager
def placed(e: Enclave, compiled: Callable[[str], Path], *what: object) -> Iterator[list[Piece]]:
    """tests/programs/placed.c; its pieces."""
    p = e.popen([compiled("placed"), *what], stdin=subprocess.PIPE)
    try:
        assert p.stdout
        at = [int(a, 16) for a in p.stdout.readline().split()]
        asid = next(a["asid"] for a in e.status()["address_spaces"] if a["pid"] == p.pid)
        f = tables(e).frames
        yield [Piece(p.pid, asid, a, int(str(mib)) * 256, f) for a, mib in zip(at, what[1:], strict=True)]
        assert p.communicate("\n", timeout=60)[0] == "wrong 0\n"
    finally:
        p.kill()
        p.wait(10)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU only: every touch is near the same node")
def test_pages_come_to_who_touches_them(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """hinting, the default; killed now and then."""
    before = enclave.status()
    cpu_node = before["topology"]["cpu_node"]
    with placed(enclave, compiled, "own", 12, 12) as (first, second):
        for _ in range(2):
            time.sleep(0.7)
            with contextlib.suppress(ProcessLookupError):
                os.kill(enclave.component("autonuma")["pid"], signal.SIGKILL)
        wait_for(lambda: first(cpu_node[0]) > 0.9 and second(cpu_node[1]) > 0.9, 40, f"{first(0)}, {second(1)} are where they belong")
        # by the gateway's count: autonuma's own begins anew with each that takes over
        assert enclave.status()["counters"]["migrated"] > before["counters"]["migrated"]
        wait_for(lambda: enclave.component("autonuma")["dump"], 5, "no dump")


def test_interleaved(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    enclave.cli("swap", "autonuma", "interleave")
    try:
        with placed(enclave, compiled, "hot", 16, 16) as (first, second):
            wait_for(lambda: 0.4 < first(0) < 0.6 and 0.4 < second(0) < 0.6, 30, f"{first(0)}, {second(0)} on node 0")
    finally:
        enclave.cli("swap", "autonuma", "hinting")


class Tiers:
    """tiering over tables of two nodes of 2048 frames each, all but the last ``free`` of each mapped; its clock is ``time``."""

    def __init__(self, free: int) -> None:
        self.frames = np.zeros(4096, FRAME_DTYPE)
        self.frames["node"][2048:] = 1
        used = np.concatenate([np.arange(2048 - free), 2048 + np.arange(2048 - free)])
        f = np.zeros(len(used), FRAME_DTYPE)
        f["state"], f["asid"], f["vpage"], f["node"] = lib.SY_FRAME_MAPPED, 1, np.arange(len(used)), self.frames["node"][used]
        self.frames[used] = f
        self.time = 0.0
        header = SimpleNamespace(watermark=[SimpleNamespace(free=free, high=64) for _ in range(2)])
        self.policy = tiering.Policy(self.frames, header, [(0, 2048), (2048, 2048)], Transaction(self.frames), lambda: self.time)
        self.policy.rebuild()

    def step(self, op: int) -> NDArray[np.int64]:
        """Frames that the next step asks for by this operation; what is taken from sight is so at once, and nothing moves."""
        self.time += 0.1
        self.policy.step()
        ops = self.policy.txn.take()
        self.policy.result(ops)
        aged = ops["pfn"][ops["op"] == lib.SY_OP_AGE]
        self.frames["flags"][aged] |= lib.SY_FF_AGED
        some = ops[ops["op"] == op]
        assert op != lib.SY_OP_MIGRATE or (some["order"] == 0).all() or self.policy.header.watermark[0].free > 64
        return some["pfn"].astype(np.int64)

    def touch(self, pfns: NDArray[np.int64]) -> None:
        events = np.zeros(len(pfns), MSG_DTYPE)
        events["pfn"] = pfns
        self.frames["flags"][pfns] = 0
        self.policy.page_hint(events)


def test_no_more_is_taken_from_sight_than_must_go() -> None:
    """The fast node is short, and the other one full: once enough is known to be cold, what is in use stays mapped, or a slow program has no time for anything but faults."""
    t = Tiers(40)
    used = np.arange(256)  # is touched all the time
    for _ in range(30):
        t.step(lib.SY_OP_AGE)
        t.touch(used[t.frames["flags"][used] & lib.SY_FF_AGED != 0])
    again = np.concatenate([t.step(lib.SY_OP_AGE) for _ in range(20)])
    assert not (again < 2048).any()


def test_hot_and_cold_change_places_where_all_is_full() -> None:
    t = Tiers(20)
    for _ in range(30):
        t.step(lib.SY_OP_AGE)
    t.touch(np.arange(2048, 2304))  # too late: not hot
    for _ in range(5):
        t.step(lib.SY_OP_AGE)
    hot = 2048 + np.flatnonzero(t.frames["flags"][2048:2304] & lib.SY_FF_AGED)
    assert len(t.step(lib.SY_OP_MIGRATE)) == 0 < len(hot)
    t.touch(hot)
    asked = t.step(lib.SY_OP_MIGRATE)
    assert np.count_nonzero(asked < 2048) == np.count_nonzero(asked >= 2048) == 10  # half of what is free


def test_hot_pages_come_up_and_cold_ones_go_down(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    enclave.cli("swap", "autonuma", "tiering")
    try:
        with placed(enclave, compiled, "hot", HALF, 16) as (cold, hot):
            wait_for(lambda: hot(0) > 0.9, 60, f"of the hot pages {hot(0)} are on the fast node, of the cold ones {cold(0)}")
            assert cold(1) > 0.2
    finally:
        enclave.cli("swap", "autonuma", "hinting")


def test_all_components_killed_at_once(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    with placed(enclave, compiled, "own", 16, 16) as (first, second):
        for _ in range(3):
            for c in enclave.status()["components"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(c["pid"], signal.SIGKILL)
            time.sleep(0.6)
        wait_for(lambda: all(c["state"] == "online" for c in enclave.status()["components"]), 20, "not all are back")
        assert first(0) + first(1) == second(0) + second(1) == 1.0


# ---- topology ----
def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        at = root / "sys/devices/system/node" / name.replace("__", "/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text + "\n")


def test_the_machines_own_nodes(tmp_path: Path) -> None:
    """Node 2 has CPUs and no memory; it is nearer to 1."""
    put(tmp_path, has_memory="0-1", online="0-2", node0__cpulist="0-1", node1__cpulist="2,3", node2__cpulist="4",
        node0__distance="10 21 31", node1__distance="21 10 17", node2__distance="31 17 10")  # fmt: skip
    t = find(2, tmp_path, 5)
    assert (t.cpu_node, t.distance, t.kernel_node, t.source) == ([0, 0, 1, 1, 1], [[10, 21], [21, 10]], [0, 1], "kernel")
    divided = find(4, tmp_path, 5)
    assert (divided.cpu_node, divided.kernel_node, divided.source) == ([0, 0, 1, 2, 3], [-1] * 4, "divided")
    assert find(1, tmp_path, 3).cpu_node == [0, 0, 0]
    assert numbers("0-2,5") == [0, 1, 2, 5] and numbers("\n") == []


def test_levels_of_a_machine() -> None:
    """Two sockets of two cores of two threads, by their times."""
    ns = np.array([[0 if a == b else 20 if a // 2 == b // 2 else 60 if a // 4 == b // 4 else 150 for b in range(8)] for a in range(8)], float)
    ns += np.triu(np.arange(64).reshape(8, 8) % 5, 1) + np.triu(np.arange(64).reshape(8, 8) % 5, 1).T
    found = [groups for _, groups in levels(ns)]
    assert found == [[[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]], [list(range(8))]]
    assert levels(np.zeros((1, 1))) == []


def test_shown(enclave: Enclave) -> None:
    said = json.loads(enclave.cli("topology", "--json").stdout)
    assert said["source"] == ("kernel" if len(machine_nodes()) == 2 else "divided") and set(said["cpu_node"]) == {0, 1}
    assert said["source"] == "kernel" or said["distance"] == [[10, 20], [20, 10]]
    assert "node 1: CPUs" in enclave.cli("topology").stdout
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        assert 1 < measure(cpus[:2])[0, 1] < 1e6
        measured = json.loads(enclave.cli("topology", "--measure", "--json").stdout)
        assert measured["levels"][-1]["groups"] == [cpus]
    with pytest.raises(OSError, match="cannot measure"):
        measure([cpus[0], 1023])


def test_blocks_that_move_in_one_piece() -> None:
    f = np.zeros(64, FRAME_DTYPE)
    f["asid"], f["vpage"] = 1, 100 + np.arange(64)
    f["vpage"][20:24] += 50
    f["asid"][40] = 2
    pfns = np.array([*range(1, 34), *range(36, 64)])
    found = {order: at.tolist() for order, at in alike_blocks(f, pfns, 4)}
    assert found == {4: [48], 3: [8, 24], 2: [4, 16, 20, 36, 44], 1: [2, 32, 42], 0: [1, 40, 41]}
    assert not list(alike_blocks(f, pfns[:0], 9))
