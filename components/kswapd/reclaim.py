"""What every reclaim policy shares: when to choose, how many, and what became of it. A policy says *which* frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy
from bus.tables import FRAME_STATES
from kernel.abi import lib

MAPPED = FRAME_STATES["mapped"]
TAKEN = lib.SY_FF_SWAPPING | lib.SY_FF_STANDBY
NOTHING = np.zeros(0, np.int64)
BATCH = 4096  # frames chosen in one step, at most
LARGEST = 1 << 15  # frames that stand by, at most: the gateway's ring


class ReclaimPolicy(BasePolicy):
    """Keeps frames standing by, in the order in which they shall leave. The gateway takes them below a node's low watermark, up
    to its high one, as Linux's kswapd does (mm/vmscan.c, balance_pgdat), without waiting for this process; so there are the more
    of them, the quicker they went.

    ``stamp``: per frame, when it came to be where it is (a count of mapped frames, int64); the order of a FIFO.
    """

    def rebuild(self) -> None:
        """Nobody knows any more in which order frames were mapped: the coldest first, then, and by address."""
        self.stamp: NDArray[np.int64] = np.empty(len(self.frames), np.int64)
        self.stamp[np.argsort(self.heat["seen"], kind="stable")] = np.arange(-len(self.frames), 0)
        self.clock = 0
        self.returned: NDArray[np.int64] = np.full(len(self.frames), -1, np.int64)
        self.ahead: dict[int, int] = {}  # by zone
        self.chosen = self.refaults = self.refused = 0

    gather = 0.01  # what stands by lasts longer

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

    def watermark(self, events: NDArray[np.void]) -> None:
        """Wakes ``step()``; the numbers are in the header."""

    # ---- what to do ----
    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        """At most ``count`` of ``candidates`` (pfns of a node's frames that may be reclaimed, ascending, at least one) to reclaim now.
        ``short``: the node is at its min watermark; better a frame that may be in use than none."""
        raise NotImplementedError

    def zones(self) -> Iterator[tuple[int, int]]:
        """Zones in use, and how many frames each has: nodes, then limits (``sylvie run --limit``)."""
        yield from ((node, size) for node, (_, size) in enumerate(self.nodes))
        for k in range(lib.SY_MAX_LIMITS):
            limit = self.header.limit[k]
            if limit.members:
                yield lib.SY_MAX_NODES + k, int(limit.frames)

    def wanted(self, zone: int, size: int) -> int:
        """Frames to choose in a zone now."""
        mark = self.header.watermark[zone]
        ahead = self.ahead.setdefault(zone, 2 * int(mark.high))
        if mark.free >= 2 * mark.high or mark.standby > ahead // 2:
            return 0
        if not mark.standby and mark.free < mark.low:  # we were too late
            ahead = self.ahead[zone] = min(2 * ahead, size // 4, LARGEST)
        return min(ahead - int(mark.standby), BATCH)

    def reclaimable(self, zone: int) -> NDArray[np.int64]:
        """pfns of a zone's frames that may leave, ascending."""
        base, size = self.nodes[zone] if zone < lib.SY_MAX_NODES else (0, len(self.frames))
        part = self.frames[base : base + size]
        ours = (part["state"] == MAPPED) & (part["flags"] & TAKEN == 0)
        if zone >= lib.SY_MAX_NODES:
            ours &= part["limit"] == zone
        return base + np.flatnonzero(ours)

    def asleep(self) -> bool:
        """Without a store nothing can leave."""
        return not self.header.slots

    def step(self) -> None:
        if self.asleep():
            return
        for zone, size in self.zones():
            count = self.wanted(zone, size)
            candidates = self.reclaimable(zone) if count > 0 else NOTHING
            if not len(candidates):
                continue
            mark = self.header.watermark[zone]
            chosen = self.victims(candidates, count, bool(mark.free <= mark.min))
            self.chosen += len(chosen)
            arg = lib.SY_RECLAIM_STANDBY | zone << lib.SY_RECLAIM_ZONE_SHIFT
            self.txn.add(lib.SY_OP_RECLAIM, np.sort(chosen), 0, arg=arg)

    def result(self, ops: NDArray[np.void]) -> None:
        self.refused += int(np.count_nonzero(ops["result"] != lib.SY_R_COMPLETE))

    def dump(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "refaults": self.refaults, "refused": self.refused}


def oldest(stamp: NDArray[np.int64], pfns: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The ``count`` of ``pfns`` with the smallest stamps, in no order."""
    if len(pfns) <= count:
        return pfns
    return pfns[np.argpartition(stamp[pfns], count)[:count]]
