"""CLOCK, the second chance (Corbató, "A paging experiment with the Multics system", 1968).

The hand goes round over the frames. A frame without an accessed bit leaves; from the others the bit is taken, by AGE: the page is taken
away from the program but stays where it is, so that a touch (PAGE_HINT) shows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import ReclaimPolicy
from kernel.abi import lib

AHEAD = 4  # bits taken per frame that is to leave: how far the hand that takes bits is ahead of the one that reclaims


class Policy(ReclaimPolicy):
    """clock"""

    def rebuild(self) -> None:
        super().rebuild()
        self.hand = 0

    def page_hint(self, events: NDArray[np.void]) -> None:
        """The frame table has the bit; the event only says that it has changed."""

    def victims(self, candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        turned = np.roll(candidates, -int(np.searchsorted(candidates, self.hand)))
        aged = self.frames["flags"][turned] & lib.SY_FF_AGED != 0
        leaving = turned[aged][:count]
        passed = turned[~aged][: AHEAD * count]
        self.txn.add(lib.SY_OP_AGE, np.sort(passed), 0)
        if len(passed):
            self.hand = int(passed[-1]) + 1
        # Nobody had an unset bit: better a frame that may be in use than none at all.
        return leaving if len(leaving) or not self.short(int(candidates[0])) else passed[:count]
