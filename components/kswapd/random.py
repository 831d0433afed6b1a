"""The baseline: any frame is as good as any other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import ReclaimPolicy


class Policy(ReclaimPolicy):
    """random"""

    _random = np.random.default_rng(0)

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        return self._random.choice(candidates, min(count, len(candidates)), replace=False)
