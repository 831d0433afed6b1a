"""On a machine with two real nodes (tests/vm): pages are where Sylvie says, by the kernel's own account, and what an old kernel lacks is done without."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Enclave, module_enclave_of, wait_for
from numpy.typing import NDArray
from test_autonuma import Piece, placed
from test_swap import tables

from kernel.abi import lib
from kernel.topology import numbers
from sylvie.doctor import NR_USERFAULTFD, UFFD_API, UFFDIO_API

pytestmark = pytest.mark.vm

HALF = 64  # MiB a node, as in test_autonuma.py: with half of that, 24 frames were free in the end
NODES = Path("/sys/devices/system/node")
NR_MOVE_PAGES = 279
PAGE = 4096
FLOOR = platform.release().startswith("6.1.")


# As many nodes as the machine has, unasked.
module_enclave, enclave = module_enclave_of("nm", "--ram", f"{2 * HALF}M", "--heat-cpu", "20%")


# ---- three of the kernel's accounts ----
def by_move_pages(piece: Piece) -> NDArray[np.int32]:
    """Each page's node; what is not mapped just now (taken from sight, on its way) is negative."""
    pages = piece.at + PAGE * np.arange(piece.pages, dtype=np.uint64)
    status = np.full(piece.pages, -errno.ENOENT, np.int32)
    libc = ctypes.CDLL(None, use_errno=True)
    r = libc.syscall(NR_MOVE_PAGES, piece.pid, ctypes.c_ulong(piece.pages), ctypes.c_void_p(pages.ctypes.data), None, ctypes.c_void_p(status.ctypes.data), 0)
    assert r == 0, os.strerror(ctypes.get_errno())
    return status


def by_numa_maps(piece: Piece) -> NDArray[np.int64]:
    """Pages on each node, by mappings of the RAM file within the piece."""
    found, where = np.zeros(2, np.int64), []
    for line in Path(f"/proc/{piece.pid}/maps").read_text().splitlines():
        first, end = (int(x, 16) for x in line.split()[0].split("-"))
        if "sylvie-ram" in line and first >= piece.at and end <= piece.at + piece.pages * PAGE:
            where.append(first)
    for line in Path(f"/proc/{piece.pid}/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) in where:
            assert "sylvie-ram" in line
            for node, pages in re.findall(r" N(\d+)=(\d+)", line):
                found[int(node)] += int(pages)
    return found


def node_of(place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Nodes of physical addresses, by which memory blocks are whose."""
    size = int(Path("/sys/devices/system/memory/block_size_bytes").read_text(), 16)
    whose = {int(at.name[6:]): int(at.parent.name[4:]) for at in NODES.glob("node[0-9]*/memory[0-9]*")}
    return np.array([whose[block] for block in (place // size).tolist()], np.int64)


def by_pagemap(piece: Piece) -> NDArray[np.int64]:
    """Physical addresses of its pages; 0: not mapped just now."""
    with open(f"/proc/{piece.pid}/pagemap", "rb") as f:
        f.seek(piece.at // PAGE * 8)
        words = np.frombuffer(f.read(piece.pages * 8), np.uint64)
    present = words >> np.uint64(63) == 1
    return np.where(present, words & np.uint64((1 << 55) - 1), 0).astype(np.int64) * PAGE


def is_on(piece: Piece, node: int) -> bool:
    """Nearly all of its pages are, as all of the kernel's accounts have it; those of it that are mapped just now."""
    pages, maps, places = by_move_pages(piece), by_numa_maps(piece), by_pagemap(piece)
    there = places[places > 0]
    enough = min((pages >= 0).sum(), maps.sum(), len(there)) > piece.pages // 8  # (tiering takes them from sight all the time)
    return bool(enough and (pages[pages >= 0] == node).mean() > 0.85 and maps[node] > 0.85 * maps.sum() and (node_of(there) == node).mean() > 0.85)


def moved(before: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pages' frame was on one node and is on the other; of those that are mapped at both looks."""
    both = (before > 0) & (now > 0)
    found = np.zeros(len(now), np.bool_)
    found[both] = node_of(before[both]) != node_of(now[both])
    return found


# ---- topology ----
def test_the_kernels_topology_is_shown(enclave: Enclave) -> None:
    said = json.loads(enclave.cli("topology", "--json").stdout)
    assert said["source"] == "kernel" and said["kernel_node"] == [0, 1]
    assert said["distance"] == [[int(d) for d in (NODES / f"node{n}/distance").read_text().split()] for n in (0, 1)]
    for node in (0, 1):
        cpus = [cpu for cpu, n in enumerate(said["cpu_node"]) if n == node]
        assert cpus == numbers((NODES / f"node{node}/cpulist").read_text()) != []
    shown = enclave.cli("topology").stdout
    assert "the machine's" in shown and f"{said['distance'][0][1]:3d}" in shown


def test_each_nodes_ram_is_its_own(enclave: Enclave) -> None:
    """Every frame's physical address belongs to the node that the table says."""
    f = tables(enclave).frames
    wait_for(lambda: (f["phys"] > 0).all(), 30, "not all RAM is there")
    assert (node_of(f["phys"].astype(np.int64) * PAGE) == f["node"]).all()


# ---- pages move between nodes ----
def test_pages_come_to_the_cpu_that_touches_them(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """hinting. One thread filled both pieces; the two that use them are each on its own node."""
    enclave.supervisorctl("stop", "autonuma")  # until it has been seen where they began
    try:
        with placed(enclave, compiled, "own", 6, 6) as pieces:
            before = [by_pagemap(p) for p in pieces]
            enclave.supervisorctl("start", "autonuma")
            wait_for(lambda: pieces[0](0) > 0.9 and pieces[1](1) > 0.9, 60, "they do not come")
            wait_for(lambda: is_on(pieces[0], 0) and is_on(pieces[1], 1), 30, "the kernel does not say what the frame table says")
            # Of 3,072 pages half begin on the wrong node. At each look most may be out of sight, on so slow a machine.
            seen = [np.zeros(p.pages, np.bool_) for p in pieces]

            def so_far() -> int:
                for s, b, p in zip(seen, before, pieces, strict=True):
                    s |= moved(b, by_pagemap(p))
                return sum(int(s.sum()) for s in seen)

            wait_for(lambda: so_far() > 500, 60, "they were not seen to move")
    finally:
        if enclave.component("autonuma")["state"] != "online":
            enclave.supervisorctl("start", "autonuma")


def test_hot_pages_come_to_the_fast_node(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """tiering: the cold piece, which was first, fills node 0 until it has to give way."""
    enclave.cli("swap", "autonuma", "tiering")
    try:
        with placed(enclave, compiled, "hot", HALF, 8) as (cold, hot):
            wait_for(lambda: hot(0) > 0.9, 60, "they do not come")
            wait_for(lambda: is_on(hot, 0), 30, "the kernel does not say what the frame table says")
            assert cold(1) > 0.2  # by the frame table: what is cold is not mapped
    finally:
        enclave.cli("swap", "autonuma", "hinting")


# ---- what the floor lacks ----
@pytest.mark.skipif(not FLOOR, reason="this kernel is newer than 6.1, the oldest that Sylvie runs on")
def test_what_this_kernel_lacks(enclave: Enclave) -> None:
    """No DAMON, no page_idle, no UFFDIO_MOVE, no PAGEMAP_SCAN; doctor says what is done without, and nothing that is needed is missing."""
    said = json.loads(enclave.cli("doctor", "--json").stdout)
    found = {f["what"]: f for f in said["findings"]}
    assert said["ok"] and found["access information"]["found"] == "from hint faults"
    assert "CONFIG_DAMON" in found["DAMON"]["found"] and "CONFIG_IDLE_PAGE_TRACKING" in found["page_idle"]["found"]
    fd = ctypes.CDLL(None).syscall(NR_USERFAULTFD, os.O_CLOEXEC)
    features = struct.unpack("<QQQ", fcntl.ioctl(fd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, 0, 0)))[1]
    os.close(fd)
    assert not features & (1 << 16)  # UFFD_FEATURE_MOVE
    with open("/proc/self/pagemap", "rb") as f, pytest.raises(OSError, match="Inappropriate ioctl"):
        fcntl.ioctl(f, 0xC0606610, bytes(0x60))  # PAGEMAP_SCAN


@pytest.mark.skipif(not FLOOR, reason="a newer kernel may have DAMON")
def test_heat_comes_from_hint_faults(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """With a policy that wants to know: what is in use is seen to be, and what is not, not. A window is short for so slow a machine: a page in use
    is not seen in each."""
    enclave.cli("swap", "ksm", "hot_aware")
    try:
        with placed(enclave, compiled, "hot", 8, 4) as (cold, hot):
            t = tables(enclave)

            def looks(piece: Piece, least: int) -> NDArray[np.void]:
                at = piece.mine()
                return t.heat[at[t.heat["looks"][at] >= least]]

            wait_for(lambda: np.count_nonzero(looks(hot, 1)["seen"]) > hot.pages // 2 and len(looks(cold, 3)) > cold.pages // 4, 60, "too little is seen")
            unused = looks(cold, 3)
            assert set(unused["source"].tolist()) == {lib.SY_HEAT_HINT} and enclave.status()["heat"]["source"] == "hint"
            assert (unused["seen"] & 0xC0 > 0).mean() < 0.1
    finally:
        enclave.cli("swap", "ksm", "scan")
