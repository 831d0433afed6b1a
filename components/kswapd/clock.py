"""CLOCK, the second chance (Corbató, "A paging experiment with the Multics system", 1968).

The hand goes round over the frames. A frame without an accessed bit leaves; from the others the bit is taken, by AGE: the page is taken
away from the program but stays where it is, so that a touch (PAGE_HINT) shows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import BATCH, ReclaimPolicy
from kernel.abi import lib

# The hand that takes bits is ahead of the one that reclaims by 1/SPREAD of the frames, however many leave at once: the time in which a touch can
# show (4.3BSD's two hands). Were it some times what leaves, as that grows all would lose their bits at once, and in between be in use unseen.
SPREAD = 2


class Policy(ReclaimPolicy):
    """clock"""

    def rebuild(self) -> None:
        super().rebuild()
        self.hand = 0

    def page_hint(self, events: NDArray[np.void]) -> None:
        """The frame table has the bit; the event only says that it has changed."""

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        turned = np.roll(candidates, -int(np.searchsorted(candidates, self.hand)))
        aged = self.frames["flags"][turned] & lib.SY_FF_AGED != 0
        leaving = turned[aged][:count]
        missing = max(count, len(turned) // SPREAD) + len(leaving) - np.count_nonzero(aged)
        passed = turned[~aged][: min(max(missing, 0), BATCH)]
        self.txn.add(lib.SY_OP_AGE, np.sort(passed), 0)
        if len(passed):
            self.hand = int(passed[-1]) + 1
        return passed[:count] if short and not len(leaving) else leaving  # nobody had an unset bit
