"""Linux's transparent_hugepage/enabled=madvise: blocks only where a program asked for them by MADV_HUGEPAGE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.thp.khugepaged import PAGES, CollapsePolicy
from kernel.abi import lib

MADV_HUGEPAGE = 14


class Policy(CollapsePolicy):
    """madvise. A first touch there takes a block at once, as Linux's does (FAULT_ORDER of the range); where it was asked for before this process began, COLLAPSE makes it."""

    only_advised = True

    def max_ptes_none(self, free: float) -> int:
        return PAGES - 1

    def mm_madvise(self, events: NDArray[np.void]) -> None:
        super().mm_madvise(events)
        for e in events[np.isin(events["arg"], (MADV_HUGEPAGE, MADV_HUGEPAGE + 1))]:
            first = -(-int(e["vpage"]) // PAGES)
            end = (int(e["vpage"]) + int(e["npages"])) // PAGES
            wanted = e["arg"] == MADV_HUGEPAGE
            if end > first:
                self.txn.fault_order(int(e["asid"]), lib.SY_HUGE_ORDER if wanted else lib.SY_ORDER_DEFAULT, 0, first, end - first)
