"""Blocks where memory is used densely, as Ingens has it (Kwon et al., OSDI '16: utilisation-based promotion): how full a range must be
depends on how much memory is free, and where an address space's neighbours of new ranges are full, first touches take whole blocks."""

from __future__ import annotations

from components.thp.khugepaged import DENSE, PAGES, CollapsePolicy
from kernel.abi import lib

PLENTY, SOME = 0.5, 0.1  # share of RAM that is free
MANY = 8  # ranges from which an address space shows what it is like


class Policy(CollapsePolicy):
    """adaptive"""

    def max_ptes_none(self, free: float) -> int:
        if free < SOME:
            return -1
        return PAGES // 2 if free > PLENTY else int(PAGES * (1 - DENSE))  # Ingens' threshold

    def order_for(self, ranges: int, dense: float, sparse: float, free: float) -> tuple[int, int]:
        order, most = self.default_order()
        if free < SOME or (ranges >= MANY and sparse > 0.5):
            return min(order, 2), min(most, 4)
        if free > PLENTY and ranges >= MANY and dense > DENSE:
            return lib.SY_HUGE_ORDER, lib.SY_HUGE_ORDER
        return order, most
