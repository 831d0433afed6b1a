"""A bitmap searched from where the last search ended (Knuth's next fit): the plainest allocator that can stand in for
buddy.

It splits and coalesces nothing, since a bitmap knows no blocks, and spreads allocations over all of memory, which is
what buddy's choice avoids: swap one for the other and compare ``sylvie buddyinfo``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bus.tables import REGION
from components.buddy.free_map import FreeMap
from components.buddy.refill import RefillPolicy

WINDOW = 16 * REGION  # frames looked at in one go


class NextFitAllocator(FreeMap):
    """``_cursor``: per node, the offset in the node at which the next search begins."""

    def __init__(self, frames: NDArray[np.void], nodes: list[tuple[int, int]]) -> None:
        super().__init__(frames, nodes)
        self._cursor = [0] * len(nodes)

    def take(self, order: int, count: int, node: int) -> NDArray[np.int64]:
        base, size = self.nodes[node]
        free = self._free[base : base + size]
        start = (self._cursor[node] + (1 << order) - 1 >> order << order) % size
        taken: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for low, high in ((start, size), (0, start)):
            for window in range(low, high, WINDOW):
                if count <= 0:
                    break
                part = free[window : min(window + WINDOW, high)].reshape(-1, 1 << order)
                found = np.flatnonzero(part.all(axis=1))[:count].astype(np.int64)
                if not found.size:
                    continue
                part[found] = False
                taken.append(base + window + (found << order))
                self._cursor[node] = window + (int(found[-1]) + 1 << order)
                count -= len(found)
        return np.concatenate(taken)


class Policy(RefillPolicy):
    """next_fit"""

    allocator_class = NextFitAllocator
