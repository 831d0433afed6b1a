"""What every reclaim policy shares: when to reclaim, how much, and what became of it. A policy says *which* frames."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy
from bus.tables import FRAME_STATES
from kernel.abi import lib

MAPPED = FRAME_STATES["mapped"]
BATCH = 2048  # frames asked for in one step, at most
STUCK = 0.5  # seconds after which what was on its way out and has not left is counted on no more: its program may be stopped


class ReclaimPolicy(BasePolicy):
    """Below a node's low watermark frames are reclaimed until its high one, as Linux's kswapd does (mm/vmscan.c,
    balance_pgdat). What is on its way out counts as free already.

    ``stamp``: per frame, when it came to be where it is (a count of mapped frames, int64); the order of a FIFO.
    """

    def rebuild(self) -> None:
        """Nobody knows any more in which order frames were mapped: by address, then."""
        self.stamp: NDArray[np.int64] = np.arange(len(self.frames), dtype=np.int64) - len(self.frames)
        self.clock = 0
        self.returned: NDArray[np.int64] = np.full(len(self.frames), -1, np.int64)
        self.awake = [False] * len(self.nodes)
        self.reclaimed = self.refaults = self.refused = 0
        self.left_at = self.asked_at = 0.0

    # ---- what happens ----
    def arrived(self, pfns: NDArray[np.int64]) -> None:
        """Frames that have just been mapped, in order."""
        self.stamp[pfns] = np.arange(self.clock, self.clock + len(pfns))
        self.clock += len(pfns)

    def page_mapped(self, events: NDArray[np.void]) -> None:
        first, count = events["pfn"].astype(np.int64), events["npages"].astype(np.int64)
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self.arrived(np.repeat(first, count) + offset)

    def page_refault(self, events: NDArray[np.void]) -> None:
        self.refaults += len(events)
        self.returned[events["pfn"]] = events["vpage"]

    def returned_to(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Are these frames known to hold what came back to them from the store? PAGE_REFAULT is sent before PAGE_MAPPED, but of one
        batch it is handled after it."""
        return self.returned[pfns] == self.frames["vpage"][pfns].astype(np.int64)

    def page_swapped(self, _events: NDArray[np.void]) -> None:
        self.left_at = self.now()

    def watermark(self, events: NDArray[np.void]) -> None:
        """Wakes ``step()``; the numbers are in the header."""

    # ---- what to do ----
    def victims(self, candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """At most ``count`` of ``candidates`` to reclaim now: pfns of frames of one node that may be reclaimed, ascending,
        at least one."""
        raise NotImplementedError

    def wanted(self, node: int) -> int:
        """Frames to reclaim on a node now."""
        mark = self.header.watermark[node]
        if mark.free < mark.low:
            self.awake[node] = True
        if not self.awake[node]:
            return 0
        base, size = self.nodes[node]
        leaving = int(np.count_nonzero(self.frames["flags"][base : base + size] & lib.SY_FF_SWAPPING))
        if self.now() > max(self.left_at, self.asked_at) + STUCK:
            leaving = 0
        missing = int(mark.high) - int(mark.free) - leaving
        if missing <= 0:
            self.awake[node] = False
        return max(0, min(missing, BATCH))

    def short(self, pfn: int) -> bool:
        """Is memory really short on the node of this frame?"""
        mark = self.header.watermark[int(self.frames["node"][pfn])]
        return bool(mark.free <= mark.min)

    def asleep(self) -> bool:
        """Without a store nothing can leave."""
        return not self.header.slots

    def step(self) -> None:
        if self.asleep():
            return
        for node, (base, size) in enumerate(self.nodes):
            count = self.wanted(node)
            if count <= 0:
                continue
            part = self.frames[base : base + size]
            ours = (part["state"] == MAPPED) & (part["flags"] & lib.SY_FF_SWAPPING == 0)
            candidates = base + np.flatnonzero(ours)
            if not len(candidates):
                continue
            chosen = self.victims(candidates, count)
            self.reclaimed += len(chosen)
            self.asked_at = self.now()
            self.txn.add(lib.SY_OP_RECLAIM, np.sort(chosen), 0)

    def result(self, ops: NDArray[np.void]) -> None:
        self.refused += int(np.count_nonzero(ops["result"] != lib.SY_R_COMPLETE))

    def dump(self) -> dict[str, Any]:
        return {"reclaimed": self.reclaimed, "refaults": self.refaults, "refused": self.refused}


def oldest(stamp: NDArray[np.int64], pfns: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The ``count`` of ``pfns`` with the smallest stamps, in no order."""
    if len(pfns) <= count:
        return pfns
    return pfns[np.argpartition(stamp[pfns], count)[:count]]
