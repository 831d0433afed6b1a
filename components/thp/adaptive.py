"""Blocks where memory is used densely, as Ingens has it (Kwon et al., OSDI '16: a range is promoted when 90 % of its pages are in use, and with fewer while memory is
plentiful); range by range at first touch too, as HawkEye measures access coverage by regions of 2 MiB (Panwar et al., ASPLOS '19); and by way of a middle order, as Linux's
mTHP (Documentation/admin-guide/mm/transhuge.rst). See docs/decisions/0016.

Nothing is kept but what was told last: density is read from the tables at each look. Where ranges in a row are dense, first touches beyond both ends, the frontier, and in
what is partly filled between, take larger blocks: the longer the row the larger, and as far ahead as it is long. A range of which pages are given back, swapped out or cold is
not dense: the row ends there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.thp.khugepaged import DENSE, PAGES, CollapsePolicy, Ranges
from kernel.abi import lib

PLENTY, SOME = 0.5, 0.1  # share of RAM that is free
MANY = 8  # ranges from which an address space shows what it is like
STEPS = ((1, 4), (4, lib.SY_HUGE_ORDER))  # so many dense ranges in a row: that order
AHEAD = 16  # ranges beyond a row, at most
THIN = PAGES // 4
LOOKED = 8  # pages of a range, looked at one by one, that say something about the others
NOTHING = np.zeros(0, np.int64)


def rows(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First, last and length of each row of consecutive numbers. ``keys``: ascending."""
    at = np.flatnonzero(np.diff(keys, prepend=-2) != 1)
    length = np.diff(at, append=len(keys))
    return keys[at], keys[at] + length - 1, length


def beyond(first: NDArray[np.int64], last: NDArray[np.int64], ahead: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ``ahead`` ranges before and after each row, in its address space: keys, distances, and indices of rows."""
    row = np.repeat(np.arange(len(first)), ahead)
    far = np.arange(1, len(row) + 1) - np.repeat(np.cumsum(ahead) - ahead, ahead)
    key, end = np.concatenate([last[row] + far, first[row] - far]), np.concatenate([last[row], first[row]])
    same = key // lib.SY_CHUNKS == end // lib.SY_CHUNKS
    return key[same], np.tile(far, 2)[same], np.tile(row, 2)[same]


class Policy(CollapsePolicy):
    """adaptive"""

    def rebuild(self) -> None:
        super().rebuild()
        self.told = (NOTHING, NOTHING)  # ranges that have an order of their own, ascending, and which
        self.spent = 0

    def max_ptes_none(self, free: float) -> int:
        if free < SOME:
            return -1
        return PAGES // 2 if free > PLENTY else int(PAGES * (1 - DENSE))  # Ingens' threshold

    @staticmethod
    def idle(ranges: Ranges) -> NDArray[np.float64]:
        """Pages of each range that are not in use, as far as anybody has looked."""
        share = np.where(ranges.looked >= LOOKED, ranges.unseen / np.maximum(ranges.looked, 1), 0.0)
        return np.maximum(ranges.cold, ranges.pages * share)

    def left(self, ranges: Ranges) -> int:
        """A block that first touches took counts in full until somebody has looked; one that was collapsed, by what that has added."""
        known = np.where(ranges.looked >= LOOKED, np.minimum(self.idle(ranges), ranges.huge), ranges.huge)
        collapsed = np.isin(ranges.key, np.fromiter(self.filled, np.int64, len(self.filled)))
        self.spent = sum(self.filled.values()) + int(known[~collapsed].sum())
        return max(0, int(self.waste * len(self.frames)) - self.spent)

    def order_for(self, ranges: int, dense: float, sparse: float, free: float) -> tuple[int, int]:
        order, most = self.default_order()
        if free < SOME or (ranges >= MANY and sparse > 0.5):
            return min(order, 2), min(most, 4)
        # (the order to begin with is the enclave's setting; growing is ours)
        return (order, most) if self.spent + PAGES <= int(self.waste * len(self.frames)) else (order, max(order, min(most, 5)))

    def _set_orders(self, ranges: Ranges, free: float, blocks: int) -> None:
        super()._set_orders(ranges, free, blocks)
        keys, orders = self.wanted(ranges, free, blocks)
        every = np.union1d(keys, self.told[0])
        before, after = (np.full(len(every), lib.SY_ORDER_DEFAULT) for _ in range(2))
        before[np.searchsorted(every, self.told[0])] = self.told[1]
        after[np.searchsorted(every, keys)] = orders
        for order in np.unique(after[after != before]).tolist():
            first, _, length = rows(every[(after != before) & (after == order)])
            for key, n in zip(first.tolist(), length.tolist(), strict=True):
                self.txn.fault_order(key // lib.SY_CHUNKS, order, 0, key % lib.SY_CHUNKS, n)
        self.told = keys, orders

    def wanted(self, ranges: Ranges, free: float, blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ranges that are to have an order of their own, ascending, and which."""
        if free < SOME:
            return NOTHING, NOTHING
        usual, idle = self.default_order()[0], self.idle(ranges)
        used = ranges.pages - idle
        first, last, length = rows(ranges.key[used >= DENSE * PAGES])
        grown = np.array([usual, *(order for _, order in STEPS)])[np.searchsorted([least for least, _ in STEPS], length, side="right")]
        key, far, row = beyond(first, last, np.minimum(length, AHEAD))
        order = grown[row]
        first_of = np.lexsort((far, -order, key))  # a range may be near several rows: the best counts
        key, at = np.unique(key[first_of], return_index=True)
        nearest = np.argsort(far[first_of][at], kind="stable")
        key, order = key[nearest], order[first_of][at][nearest]
        huge = order == lib.SY_HUGE_ORDER
        order[huge & (np.cumsum(huge) > blocks)] = STEPS[0][1]  # no more than may be wasted
        # What was filled for nothing, and around rows of it; while there is not plenty, also around rows that are thin.
        waste = ranges.key[(used < THIN) & (ranges.pages >= 2 * THIN)]
        thin = waste if free > PLENTY else ranges.key[used < THIN]
        first, last, length = rows(thin)
        ahead = np.where(length >= MANY, np.minimum(length, AHEAD), 0)
        thin = np.concatenate([thin[np.repeat(ahead > 0, length)], beyond(first, last, ahead)[0]])
        order = np.concatenate([np.zeros(len(waste), np.int64), order, np.zeros(len(thin), np.int64)])
        # of several the first: waste before density before thinness
        key, at = np.unique(np.concatenate([waste, key, thin]), return_index=True)
        order = order[at]
        here = (order > usual) | ((order == 0) & (usual > 0))
        here &= ~np.isin(key, ranges.key[ranges.pages == PAGES])
        return key[here], order[here]

    def mm_exit(self, events: NDArray[np.void]) -> None:
        super().mm_exit(events)
        stays = ~np.isin(self.told[0] // lib.SY_CHUNKS, events["asid"])
        self.told = self.told[0][stays], self.told[1][stays]

    def dump(self) -> dict[str, Any]:
        number = np.bincount(self.told[1], minlength=1)
        return super().dump() | {"spent": self.spent, "ranges": {str(o): int(number[o]) for o in np.flatnonzero(number).tolist()}}
