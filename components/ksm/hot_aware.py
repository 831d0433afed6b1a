"""scan, but pages that were in use a moment ago are left alone: what is written soon again would only be copied (cf. UKSM's and KSM++'s sampling of volatile
areas). What is in use the access monitor says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.ksm.scan import Policy as Scan

RECENTLY = 0xE0  # touched in one of the last three windows


class Policy(Scan):
    """hot_aware"""

    def heat_ready(self, events: NDArray[np.void]) -> None:
        """Keeps the monitor looking; the heat array has what it saw."""

    def candidates(self) -> NDArray[np.int64]:
        ours = super().candidates()
        return ours[(self.heat["looks"][ours] > 0) & (self.heat["seen"][ours] & RECENTLY == 0)]
