"""Linux's transparent_hugepage/enabled=always, with khugepaged's default max_ptes_none: one page in use is enough for a block, as long
as there is memory (mm/huge_memory.c, mm/khugepaged.c)."""

from __future__ import annotations

from components.thp.khugepaged import PAGES, CollapsePolicy
from kernel.abi import lib


class Policy(CollapsePolicy):
    """always"""

    def max_ptes_none(self, free: float) -> int:
        return PAGES - 1

    def order_for(self, ranges: int, dense: float, sparse: float, free: float) -> tuple[int, int]:
        return lib.SY_HUGE_ORDER, lib.SY_HUGE_ORDER
