"""Most recently used first: the right choice for loops over more than fits, where LRU evicts what is needed next
(Chou and DeWitt, "An evaluation of buffer management strategies for relational database systems", VLDB '85)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import ReclaimPolicy, oldest

SPARED = 64  # the newest frames: whoever has just touched them is still at work there


class Policy(ReclaimPolicy):
    """mru: what came last leaves first, but for the very newest."""

    def rebuild(self) -> None:
        """What is in use stays, whenever it came."""
        super().rebuild()
        self.stamp = -len(self.frames) - 1 - self.stamp

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        old = candidates[self.stamp[candidates] < self.clock - SPARED]
        return oldest(-self.stamp, old, count) if len(old) else candidates[:0]
