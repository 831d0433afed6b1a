"""A fast node and slower ones, as with CXL memory: cold pages go down when the fast node is nearly full, hot ones come up (TPP, Maruf et al., ASPLOS '23;
Linux's demotion_enabled and numa_balancing=2). Node 0 is the fast one.

Pages of the slower nodes are taken from sight, a part at a time: one that is touched again within a second is hot (Linux's hot threshold). Of the fast node they
are only when it is short, and until enough are known to be cold: those that are not touched for a while. So nothing is paid for what stays where it is. (The touches that this
costs are the program's time: if all were taken from sight again and again, it could be so slow that what it always uses looks cold.)"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.autonuma.migration import GOING, MAPPED, MigrationPolicy
from kernel.abi import lib

FAST = 0
SCAN = 512  # pages taken from sight in one step, of each kind of node
HOT_WITHIN, COLD_AFTER = 1.0, 1.5  # seconds
SPARE = 3  # high watermarks that the fast node keeps free, so that what becomes hot finds room
NOTHING = np.zeros(0, np.int64)


class Policy(MigrationPolicy):
    """tiering"""

    gather = 0.1

    def rebuild(self) -> None:
        super().rebuild()
        self.aged: NDArray[np.float64] = np.full(len(self.frames), self.now())  # when a frame's page was taken from sight
        self.cursor = {True: 0, False: 0}  # of the fast node, of the slower ones
        self.hot = NOTHING

    def result(self, ops: NDArray[np.void]) -> None:
        super().result(ops)
        self.aged[ops["pfn"][ops["op"] == lib.SY_OP_AGE]] = self.now()

    def page_hint(self, events: NDArray[np.void]) -> None:
        pfn = events["pfn"].astype(np.int64)
        hot = pfn[(self.frames["node"][pfn] != FAST) & (self.now() - self.aged[pfn] < HOT_WITHIN)]
        self.hot = np.unique(np.concatenate([self.hot, hot]))

    def room(self, node: int) -> int:
        mark = self.header.watermark[node]
        return max(self.squeeze(node), int(mark.free) - int(mark.high) * (1 if node == FAST else 2))

    def squeeze(self, node: int) -> int:
        """Where all nodes are full, hot and cold pages still change places, by way of half of what is free: no node has less afterwards."""
        return min(int(self.header.watermark[node].free) // 2, len(self.hot))

    def _age(self, pfns: NDArray[np.int64], fast: bool) -> None:
        """The next of ``pfns``, round and round."""
        at = int(np.searchsorted(pfns, self.cursor[fast]))
        some = pfns[at : at + SCAN]
        self.cursor[fast] = int(some[-1]) + 1 if len(some) == SCAN else 0
        self.txn.add(lib.SY_OP_AGE, some, 0)

    def _bring(self, pfns: NDArray[np.int64], node: int, most: int) -> int:
        """Page by page where little is free: there may be no block."""
        return self.move(pfns, node, most, 0 if self.room(node) == self.squeeze(node) else lib.SY_HUGE_ORDER)

    def step(self) -> None:
        if self.asleep():
            return
        flags = self.frames["flags"]
        ours = np.flatnonzero((self.frames["state"] == MAPPED) & (flags & GOING == 0))
        fast, seen = self.frames["node"][ours] == FAST, flags[ours] & lib.SY_FF_AGED == 0
        mark = self.header.watermark[FAST]
        self.hot = self.hot[self.frames["node"][self.hot] != FAST]
        need = SPARE * int(mark.high) + min(len(self.hot), lib.SY_CHUNK_PAGES) - int(mark.free)
        if need > 0:
            cold = ours[fast & ~seen]
            cold = cold[self.now() - self.aged[cold] > COLD_AFTER]
            cold = self.movable(cold[np.argsort(self.aged[cold], kind="stable")])
            if len(cold) < need:
                self._age(ours[fast & seen], True)
            for node in range(1, len(self.nodes)):
                need -= self._bring(cold, node, need)
        self.hot = self.hot[self._bring(self.hot, FAST, len(self.hot)) :]
        self._age(ours[~fast & seen], False)

    def dump(self) -> dict[str, Any]:
        return super().dump() | ({} if self.asleep() else {"hot": len(self.hot)})
