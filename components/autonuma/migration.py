"""What every policy of autonuma shares: moving pages to a node at a bounded rate, in blocks as they lie, and leaving alone for a while what could
not move. A policy says *which* pages, and where to."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy
from bus.tables import FRAME_STATES, alike_blocks
from kernel.abi import lib

MAPPED = FRAME_STATES["mapped"]
GOING = lib.SY_FF_SWAPPING | lib.SY_FF_TARGET
BATCH = 2048  # pages that move in one step, at most
LONGEST = 64.0  # seconds that what could not move is left alone, at most


class MigrationPolicy(BasePolicy):
    """``frames["node"]`` says where a page is; ``move`` brings it elsewhere."""

    tick = 0.1
    gather = 0.05

    def asleep(self) -> bool:
        """On one node everything is where it can be."""
        return len(self.nodes) < 2

    def rebuild(self) -> None:
        self.not_before: NDArray[np.float64] = np.zeros(len(self.frames))  # by frame
        self.pause: NDArray[np.float32] = np.zeros(len(self.frames), np.float32)
        self.going = 0  # pages on the way
        self.answer_by = 0.0
        self.moved = [0] * len(self.nodes)  # pages, by where they went
        self.put_off = 0

    def node_of_cpu(self, cpu: NDArray[Any]) -> NDArray[np.int64]:
        """The nodes that CPUs are near."""
        table = np.frombuffer(bytes(self.header.cpu_node), np.uint8).astype(np.int64)
        return table[np.minimum(cpu.astype(np.int64), len(table) - 1)]

    # ---- what happens ----
    def page_migrated(self, events: NDArray[np.void]) -> None:
        self.going -= int(events["npages"].sum())
        for node, pages in zip(events["node"].tolist(), events["npages"].tolist(), strict=True):
            self.moved[node] += pages
        self.pause[events["pfn"]] = 0

    def move_refused(self, events: NDArray[np.void]) -> None:
        mine = events[events["pfn"] != lib.SY_NO_FRAME]
        self.going -= int(mine["npages"].sum())
        for e in mine:
            # EPERM: it is more than one mapping, say, or locked: as single pages some may go, but not soon
            self._leave(np.arange(e["pfn"], e["pfn"] + e["npages"]), 4.0 if e["arg"] == errno.EPERM else 0.5)

    def _leave(self, pfns: NDArray[np.int64], least: float) -> None:
        self.pause[pfns] = np.clip(2 * self.pause[pfns], least, LONGEST)
        self.not_before[pfns] = self.now() + self.pause[pfns]
        self.put_off += len(pfns)

    def result(self, ops: NDArray[np.void]) -> None:
        failed = ops[(ops["op"] == lib.SY_OP_MIGRATE) & (ops["result"] != lib.SY_R_COMPLETE)]
        for order in np.unique(failed["order"]).tolist():
            at = failed["pfn"][failed["order"] == order].astype(np.int64)
            self.going -= len(at) << order
            self._leave((at[:, None] + np.arange(1 << order)).reshape(-1), 0.25)

    # ---- what to do ----
    def movable(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of ``pfns`` that may be asked to move now."""
        f = self.frames[pfns]
        return pfns[(f["state"] == MAPPED) & (f["flags"] & GOING == 0) & (self.not_before[pfns] <= self.now())]

    def room(self, node: int) -> int:
        """Frames that a node can take without coming near its watermarks."""
        mark = self.header.watermark[node]
        return max(0, int(mark.free) - 2 * int(mark.high))

    def may_move(self) -> int:
        """Pages that may be asked to move now."""
        if self.going > 0 and self.now() > self.answer_by:  # answers that were lost, or of programs that have ended
            self.going = 0
        return max(0, BATCH - max(0, self.going))

    def move(self, pfns: NDArray[np.int64], node: int, most: int = BATCH, order: int = lib.SY_HUGE_ORDER) -> int:
        """Has pages brought to a node, at most ``most``, the first of ``pfns``, in blocks of ``order`` at most; number that was asked for."""
        pfns = np.sort(self.movable(pfns)[: max(0, min(most, self.may_move(), self.room(node)))])
        pfns = pfns[self.frames["node"][pfns] != node]
        if len(pfns):
            for n, blocks in alike_blocks(self.frames, pfns, order):
                self.txn.add(lib.SY_OP_MIGRATE, blocks, n, arg=node)
            self.going += len(pfns)
            self.answer_by = self.now() + 2.0
        return len(pfns)

    def dump(self) -> dict[str, Any]:
        return {"moved": self.moved, "put_off": self.put_off, "going": self.going}
