"""Linux's NUMA balancing (kernel/sched/fair.c: task_numa_work, task_numa_fault; mm/mempolicy.c: mpol_misplaced): pages are taken away from sight, a
part at a time, round and round, so that the next touch shows who uses them; and a page goes to a node from which it was touched twice in a row.

Two in a row leave a page alone that both nodes use, as Linux's two-stage filter does: private pages come to whom they belong, shared ones
stay. Where nothing was out of place, the next round comes later (numa_scan_period)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.autonuma.migration import GOING, MAPPED, MigrationPolicy
from kernel.abi import lib

SCAN = 1024  # pages looked at in one step
SHORTEST, LONGEST_PERIOD = 0.1, 3.2  # seconds between two steps that look; Linux: 1 to 60 s for 256 MiB


class Policy(MigrationPolicy):
    """hinting"""

    def rebuild(self) -> None:
        super().rebuild()
        self.last: NDArray[np.int8] = np.full(len(self.frames), -1, np.int8)  # the node that touched a frame's page last
        self.page: NDArray[np.int64] = np.full(len(self.frames), -1, np.int64)  # … and which page that was
        self.cursor = 0
        self.period = SHORTEST
        self.look_at = 0.0
        self.here = self.elsewhere = 0  # touches of this round
        self.wanted: dict[int, NDArray[np.int64]] = {}  # by node, pages that are to come

    def page_hint(self, events: NDArray[np.void]) -> None:
        known = events[events["arg"] > 0]
        pfn, node = known["pfn"].astype(np.int64), self.node_of_cpu(known["arg"] - 1)
        page = known["vpage"].astype(np.int64) | known["asid"].astype(np.int64) << 32
        again = (self.last[pfn] == node) & (self.page[pfn] == page)
        self.last[pfn], self.page[pfn] = node, page
        misplaced = self.frames["node"][pfn] != node
        self.here += int(np.count_nonzero(~misplaced))
        self.elsewhere += int(np.count_nonzero(misplaced))
        for n in np.unique(node[again & misplaced]).tolist():
            some = pfn[again & misplaced & (node == n)]
            self.wanted[n] = np.concatenate([self.wanted.get(n, some[:0]), some])

    def step(self) -> None:
        if self.asleep():
            return
        for node, pfns in list(self.wanted.items()):
            pfns = pfns[self.last[pfns] == node]
            asked = self.move(pfns, node)
            self.wanted[node] = pfns[asked:] if asked and len(pfns) > asked else pfns[:0]
        now = self.now()
        if now < self.look_at:
            return
        n = len(self.frames)
        ours = np.flatnonzero((self.frames["state"] == MAPPED) & (self.frames["flags"] & (GOING | lib.SY_FF_AGED) == 0))
        at = int(np.searchsorted(ours, self.cursor))
        some = ours[at : at + SCAN]
        self.cursor = int(some[-1]) + 1 if len(some) else n
        self.txn.add(lib.SY_OP_AGE, some, 0)
        if self.cursor >= n or at + SCAN >= len(ours):  # a round is over
            self.cursor = 0
            grow = self.elsewhere * 10 <= self.here  # at most a tenth was out of place
            self.period = min(2 * self.period, LONGEST_PERIOD) if grow else SHORTEST
            self.here = self.elsewhere = 0
        self.look_at = now + self.period

    def dump(self) -> dict[str, Any]:
        return super().dump() | ({} if self.asleep() else {"period": self.period})
