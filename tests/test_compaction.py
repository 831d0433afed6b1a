"""buddy's compaction: free memory in single frames becomes blocks, under a program that does not notice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from conftest import Enclave, module_enclave_of, wait_for
from test_swap import tables
from test_thp import HUGE, PAGES, in_place_of

from bus.client import subscriber
from bus.codec import decode_batch
from bus.tables import free_blocks
from kernel.abi import lib

RAM = 64  # MiB


def by_single_pages(e: Enclave) -> None:
    e.supervisorctl("stop", "thp")  # it would make blocks, too
    e.request(t="fault_order", asid=0, order=0, max_order=0)


module_enclave, enclave = module_enclave_of("co", "--ram", f"{RAM}M", "--nodes", "2", prepare=by_single_pages)


def free_huge(e: Enclave) -> int:
    """Blocks of order 9 that could be taken."""
    t = tables(e)
    return sum(count << order - HUGE for node in free_blocks(t.frames, t.nodes) for order, count in enumerate(node) if order >= HUGE)


@contextlib.contextmanager
def program(e: Enclave, compiled: Callable[[str], Path]) -> Iterator[subprocess.Popen[str]]:
    p = e.popen([compiled("fragment"), RAM - 8, 3], stdin=subprocess.PIPE)
    try:
        assert p.stdout and p.stdout.readline() == "fragmented\n"
        yield p
        out = p.communicate("\n", timeout=60)[0]
    finally:
        p.kill()
        p.wait(10)
    assert out.startswith("kept ") and out.endswith(", wrong 0\n"), out


def test_blocks_out_of_fragments(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    with program(enclave, compiled):
        time.sleep(0.5)
        before = free_huge(enclave)
        assert before <= 1 and np.count_nonzero(tables(enclave).frames["state"] == lib.SY_FRAME_FREE) > 12 * PAGES
        enclave.cli("swap", "buddy", "compaction")
        try:
            wait_for(lambda: free_huge(enclave) >= 6, 40, "no blocks")
            dump = wait_for(lambda: (d := enclave.component("buddy")["dump"])["emptied"] >= 4 and d, 10, "it does not say so")
            assert dump["moved"] > 4 * PAGES // 4
            for _ in range(3):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(enclave.component("buddy")["pid"], signal.SIGKILL)
                time.sleep(0.3)
                wait_for(lambda: enclave.component("buddy")["state"] == "online", 20, "buddy is not back")
            enclave.check()
        finally:
            enclave.cli("swap", "buddy", "buddy")
    assert enclave.status()["counters"]["migrated"] >= dump["moved"]


def test_to_a_node_or_a_block(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """What MIGRATE refuses, and where it brings what."""
    with program(enclave, compiled), in_place_of(enclave, "buddy") as commit:
        t = tables(enclave)
        f = t.frames
        base = t.nodes[1][0]
        mapped = np.flatnonzero((f["state"] == lib.SY_FRAME_MAPPED) & (f["node"] == 0))
        free = np.flatnonzero((f["state"] == lib.SY_FRAME_FREE) & (f["node"] == 1))
        a, b = int(mapped[0]), int(free[-1])
        page = int(f["vpage"][a])
        refused = [
            commit(lib.SY_OP_MIGRATE, a, 0, 2), commit(lib.SY_OP_MIGRATE, a, 10, 1), commit(lib.SY_OP_MIGRATE, a, 0, lib.SY_MIGRATE_TO | len(f)),
            commit(lib.SY_OP_MIGRATE, a, 0, 1, behind=1), commit(lib.SY_OP_MIGRATE, b, 0, 0), commit(lib.SY_OP_MIGRATE, a, 0, lib.SY_MIGRATE_TO | int(mapped[1])),
            commit(lib.SY_OP_MIGRATE, a, 0, 0), commit(lib.SY_OP_COLLAPSE, a, HUGE, 511),
        ]  # fmt: skip
        assert refused == [["INVALID"], ["INVALID"], ["INVALID"], ["STALE"], ["STALE"], ["STALE"], ["STALE"], ["NOT_PERMITTED"]]
        with subscriber(enclave.run_dir, [b"move"], "buddy") as events:
            time.sleep(0.3)

            def moved_to() -> int:
                assert events.poll(5000)
                (m,) = decode_batch(events.recv_multipart())[2]
                assert (m["type"], m["vpage"], m["npages"]) == (lib.SY_MSG_PAGE_MIGRATED, page, 1)
                assert f["vpage"][m["pfn"]] == page and f["state"][m["pfn"]] == lib.SY_FRAME_MAPPED
                return int(m["pfn"])

            assert commit(lib.SY_OP_MIGRATE, a, 0, lib.SY_MIGRATE_TO | b) == ["COMPLETE"]
            assert moved_to() == b
            assert commit(lib.SY_OP_MIGRATE, b, 0, 0) == ["COMPLETE"]
            c = moved_to()
            assert c < base
            assert commit(lib.SY_OP_MIGRATE, c, 0, 1) == ["COMPLETE"]
            assert moved_to() >= base
