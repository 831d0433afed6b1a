"""The binary buddy system with best fit between regions (the default).

Free memory is kept as the maximal aligned free blocks of orders 0 to 10, as in Linux's mm/page_alloc.c: a block that is
taken from a larger one leaves its other parts as blocks, and free neighbours are one block at once. Linux keeps a list
per order and takes its head; here the block comes from the region (4 MiB) with the least free memory among those that
have a block of the smallest sufficient order, so that regions with little in use are left to become whole again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import MAX_ORDER, REGION, maximal_blocks
from components.buddy.free_map import FreeMap
from components.buddy.refill import RefillPolicy


class BuddyAllocator(FreeMap):
    """Per frame the order of the free block that begins there, and per region how many there are of each order: no
    lists, so that a region is recomputed from the map of free frames in one go, and 16 GiB are rebuilt like one
    region."""

    def __init__(self, frames: NDArray[np.void], nodes: list[tuple[int, int]]) -> None:
        super().__init__(frames, nodes)
        regions = len(frames) // REGION
        self._heads = np.full((regions, REGION), -1, np.int8)
        self._count = np.zeros((MAX_ORDER + 1, regions), np.int32)  # blocks
        self._spare = np.zeros(regions, np.int32)  # free frames

    @property
    def free_frames(self) -> int:
        return int(self._spare.sum())

    def _changed(self, regions: NDArray[np.intp] | None) -> None:
        which: Any = slice(None) if regions is None else regions
        free = self._free.reshape(-1, REGION)[which]
        heads = maximal_blocks(free.reshape(-1)).reshape(-1, REGION)
        self._heads[which] = heads
        self._spare[which] = free.sum(axis=1)
        for order in range(MAX_ORDER + 1):
            self._count[order, which] = (heads[:, :: 1 << order] == order).sum(axis=1)

    def take(self, order: int, count: int, node: int) -> NDArray[np.int64]:
        base, size = self.nodes[node]
        low, high = base // REGION, (base + size) // REGION
        taken: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        while count > 0:
            found = self._fullest_region(order, low, high)
            if found is None:
                break
            region, have = found
            blocks = self._take_in(region, have, order, count)
            taken.append(region * REGION + blocks)
            count -= len(blocks)
        return np.concatenate(taken)

    def _fullest_region(self, order: int, low: int, high: int) -> tuple[int, int] | None:
        for have in range(order, MAX_ORDER + 1):
            candidates = low + np.flatnonzero(self._count[have, low:high])
            if candidates.size:
                return int(candidates[np.argmin(self._spare[candidates])]), have
        return None

    def _take_in(self, region: int, have: int, order: int, count: int) -> NDArray[np.int64]:
        """Takes blocks of ``order`` from what ``region`` has of order ``have``; offsets in the region."""
        heads, counts = self._heads[region], self._count[:, region]
        at = np.flatnonzero(heads[:: 1 << have] == have).astype(np.int64) << have
        if have == order:
            blocks = at[:count]
            heads[blocks] = -1
            counts[order] -= len(blocks)
        else:  # split one: its first pieces are taken, the rest falls into ever larger blocks
            first = int(at[0])
            pieces = min(count, 1 << (have - order))
            blocks = first + (np.arange(pieces, dtype=np.int64) << order)
            heads[first] = -1
            counts[have] -= 1
            offset = pieces << order
            while offset < 1 << have:
                lowest = offset & -offset
                heads[first + offset] = lowest.bit_length() - 1
                counts[lowest.bit_length() - 1] += 1
                offset += lowest
        self._free.reshape(-1, REGION)[region].reshape(-1, 1 << order)[blocks >> order] = False
        self._spare[region] -= len(blocks) << order
        return blocks

    def blocks(self) -> list[list[int]]:
        """Free blocks per node and order 0..10."""
        return [
            self._count[:, base // REGION : (base + size) // REGION].sum(axis=1).tolist() for base, size in self.nodes
        ]


class Policy(RefillPolicy):
    """buddy"""

    allocator: BuddyAllocator
    allocator_class = BuddyAllocator

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"free_blocks": self.allocator.blocks()}
