"""Programs that are not on a CPU give first. What the scheduler knows of threads tells kswapd which programs those are: of two that do not fit into RAM together, one that sleeps keeps
only what the other does not need, however recently it was used. (Linux's lists know pages, not programs; its memory cgroups know programs, but not whether they run.)

Of programs that sched does not have (`sylvie run --sched` gives them to it) nothing is known: they are treated as ``two_list`` treats all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bus.policy import Tunable
from components.kswapd import two_list
from components.kswapd.reclaim import oldest
from kernel.abi import lib


class Policy(two_list.Policy):
    """two_list, but for what belongs to programs that sleep."""

    idle_s: float
    spared = 0
    tunables: ClassVar[dict[str, Tunable]] = {"idle_s": Tunable(0.5, 0.01, 3600.0, "seconds since a program was last on a CPU, from which it sleeps")}

    def sleeping(self) -> NDArray[np.uint32]:
        """Address spaces none of whose threads have been on a CPU lately."""
        t = self.tasks[: self.sched.top]
        t = t[(t["gtid"] != 0) & (t["asid"] != 0)]
        asleep = (t["flags"] & lib.SY_TF_RUNNABLE == 0) & (t["switch_ns"].astype(np.int64) < (self.now() - self.idle_s) * 1e9)
        return np.setdiff1d(t["asid"][asleep], t["asid"][~asleep])

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        asleep = np.isin(self.frames["asid"][candidates], self.sleeping())
        first = oldest(self.stamp, candidates[asleep], count)
        self.spared += len(first)
        awake = candidates[~asleep]
        if len(first) == count or not len(awake):
            return first
        return np.concatenate([first, super().victims(awake, count - len(first), short)])

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"of_sleepers": self.spared}
