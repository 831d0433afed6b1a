"""buddy, and compaction: where free memory is there but no block of order 9, pages move together until there is one (mm/compaction.c).

Linux's two scanners meet in the middle of a zone: one takes movable pages from its start, the other free ones from its end. Here a whole
aligned window of 512 frames is chosen, the one with the least to move, and its pages go (MIGRATE, in blocks as large as they lie) to
where buddy would put new ones: into the region with the least free memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import alike_blocks
from components.buddy.buddy import BuddyAllocator
from components.buddy.buddy import Policy as Buddy
from kernel.abi import lib

ORDER: int = lib.SY_HUGE_ORDER
PAGES = 1 << ORDER  # of a window
WANTED = 4  # free blocks of that order that a node should have, if it has the memory
PATIENCE = 2.0  # seconds for the pages of one window to move
FIXED = lib.SY_FF_SWAPPING | lib.SY_FF_TARGET


class Window:
    """One that is being emptied."""

    def __init__(self, first: int, moves: int, until: float) -> None:
        self.first, self.moves, self.until = first, moves, until


class Policy(Buddy):
    """compaction"""

    allocator: BuddyAllocator

    def rebuild(self) -> None:
        super().rebuild()
        self.windows: dict[int, Window] = {}  # by node
        self.not_before: dict[int, float] = {}  # by window: something in it could not move
        self.moved = self.refused_moves = self.emptied = 0

    # ---- what became of it ----
    def page_migrated(self, events: NDArray[np.void]) -> None:
        self.moved += int(events["npages"].sum())
        self._answered(events["arg"])

    def move_refused(self, events: NDArray[np.void]) -> None:
        mine = events[events["pfn"] != lib.SY_NO_FRAME]
        self.refused_moves += len(mine)
        for first in (mine["pfn"] // PAGES * PAGES).tolist():
            self.not_before[first] = self.clock() + 5.0
        self._answered(mine["pfn"])

    def _answered(self, pfns: NDArray[np.void]) -> None:
        for first in (pfns.astype(np.int64) // PAGES * PAGES).tolist():
            for w in self.windows.values():
                w.moves -= w.first == first

    def result(self, ops: NDArray[np.void]) -> None:
        mine = ops["op"] == lib.SY_OP_MIGRATE
        super().result(ops[~mine])
        failed = ops[mine & (ops["result"] != lib.SY_R_COMPLETE)]
        self._answered(failed["pfn"])
        self._look(failed["arg"] & 0xFFFFFFFF, 1 << failed["order"].astype(np.int64))

    # ---- what to do ----
    def step(self) -> None:
        super().step()
        now = self.clock()
        for node in range(len(self.nodes)):
            w = self.windows.get(node)
            if w is not None and w.moves > 0 and now < w.until:
                continue
            if w is not None:
                del self.windows[node]
                self._look(np.array([w.first]), np.array([PAGES]))
                if (self.frames["state"][w.first : w.first + PAGES] == lib.SY_FRAME_FREE).all():
                    self.emptied += 1
                else:
                    self.not_before[w.first] = now + 1.0
            self._compact(node, now)

    def _compact(self, node: int, now: float) -> None:
        base, size = self.nodes[node]
        mark = self.header.watermark[node]
        have = sum(count << order - ORDER for order, count in enumerate(self.allocator.blocks()[node]) if order >= ORDER)
        if have >= WANTED or mark.free < mark.high + (have + 1) * PAGES:
            return
        self.not_before = {w: t for w, t in self.not_before.items() if t > now}
        part = self.frames[base : base + size]
        mapped = (part["state"] == lib.SY_FRAME_MAPPED) & (part["flags"] & FIXED == 0)
        can = (mapped | (part["state"] == lib.SY_FRAME_FREE)).reshape(-1, PAGES).all(axis=1)
        can[[(w - base) // PAGES for w in self.not_before if base <= w < base + size]] = False
        to_move = mapped.reshape(-1, PAGES).sum(axis=1)
        can &= to_move > 0
        if not can.any():
            return
        best = int(np.flatnonzero(can)[np.argmin(to_move[can])])
        if to_move[best] > PAGES // 2:  # as much work as it brings
            return
        first = base + best * PAGES
        self.allocator.hide(first, PAGES)
        moves = 0
        for order, blocks in alike_blocks(self.frames, first + np.flatnonzero(mapped[best * PAGES : (best + 1) * PAGES]), ORDER - 1):
            moves += self._move(blocks, order, node)
        self.windows[node] = Window(first, moves, now + PATIENCE)

    def _move(self, at: NDArray[np.int64], order: int, node: int) -> int:
        """Sends these blocks elsewhere, in halves where nothing free is as large. Number of moves."""
        targets = self.allocator.take(order, len(at), node)
        for pfn, to in zip(at.tolist(), targets.tolist(), strict=False):
            self.txn.add(lib.SY_OP_MIGRATE, pfn, order, arg=lib.SY_MIGRATE_TO | to)
        left = at[len(targets) :]
        if not len(left) or not order:
            return len(targets)
        return len(targets) + self._move(np.concatenate([left, left + (1 << order - 1)]), order - 1, node)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"moved": self.moved, "refused_moves": self.refused_moves, "emptied": self.emptied}
