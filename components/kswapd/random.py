"""The baseline: any frame is as good as any other."""

from __future__ import annotations

import numpy as np
from numpy.random import default_rng  # now: when privileges are dropped, modules may not be readable any more
from numpy.typing import NDArray

from components.kswapd.reclaim import ReclaimPolicy


class Policy(ReclaimPolicy):
    """random"""

    def rebuild(self) -> None:
        super().rebuild()
        self.random = default_rng(0)

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        return self.random.choice(candidates, min(count, len(candidates)), replace=False)
