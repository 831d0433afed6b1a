"""Linux's active and inactive lists with refault distance (mm/vmscan.c, mm/workingset.c).

A page begins on the inactive list. Touched there (PAGE_HINT: the list's tail has no accessed bit, by AGE) it moves to the active one;
so does a page that comes back from the store within a refault distance of what the active list holds: had the inactive list been
longer by that much, it would not have left. Pages leave from the inactive list's tail; when that list is the shorter one, the
active list's oldest move over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import BATCH, MAPPED, ReclaimPolicy, oldest
from kernel.abi import lib

AHEAD = 2  # frames that move from the active list, per frame that is to leave
TAIL = 4  # the older 1/TAIL of the inactive list is without accessed bits: long enough for a touch to show before a page leaves


class Policy(ReclaimPolicy):
    """two_list. ``active``: per frame, on which list it is; ``stamp``: its place there."""

    def rebuild(self) -> None:
        super().rebuild()
        self.active = np.zeros(len(self.frames), np.bool_)

    def arrived(self, pfns: NDArray[np.int64]) -> None:
        super().arrived(pfns)
        self.active[pfns] &= self.returned_to(pfns)

    def page_hint(self, events: NDArray[np.void]) -> None:
        self._activate(events["pfn"].astype(np.int64))

    def page_refault(self, events: NDArray[np.void]) -> None:
        super().page_refault(events)
        near = events["arg"] <= np.count_nonzero(self.active & (self.frames["state"] == MAPPED))
        self._activate(events["pfn"][near].astype(np.int64))

    def _activate(self, pfns: NDArray[np.int64]) -> None:
        super().arrived(pfns)
        self.active[pfns] = True

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        active = self.active[candidates]
        inactive, hot = candidates[~active], candidates[active]
        if len(inactive) < len(hot):
            moved = oldest(self.stamp, hot, AHEAD * count)
            self.active[moved] = False
            super().arrived(moved)
            inactive = np.concatenate([inactive, moved])
        tail = oldest(self.stamp, inactive, max(AHEAD * count + count, len(inactive) // TAIL))
        aged = self.frames["flags"][tail] & lib.SY_FF_AGED != 0
        self.txn.add(lib.SY_OP_AGE, np.sort(oldest(self.stamp, tail[~aged], BATCH)), 0)
        leaving = oldest(self.stamp, tail[aged], count)
        return oldest(self.stamp, tail, count) if short and not len(leaving) else leaving  # none has lost its bit yet

    def dump(self) -> dict[str, Any]:
        if self.asleep():
            return super().dump()
        mapped = self.frames["state"] == MAPPED
        active = int(np.count_nonzero(mapped & self.active))
        return super().dump() | {"active": active, "inactive": int(np.count_nonzero(mapped)) - active}
