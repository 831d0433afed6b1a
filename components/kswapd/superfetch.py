"""two_list; and while memory is free, because a program has ended, say, what left last comes back before it is asked for, as Windows'
SuperFetch does (Russinovich, "Inside the Windows Vista kernel", TechNet Magazine, March 2007)."""

from __future__ import annotations

from typing import Any

import numpy as np

from components.kswapd import two_list

AT_ONCE = 1024  # pages in one step
BUSY = 0xFFFFFFFF  # owner of a slot that is just being written
SPARE = 4  # times the high watermark that stays free


class Policy(two_list.Policy):
    """superfetch"""

    def rebuild(self) -> None:
        super().rebuild()
        self.asked = np.full(len(self.slots), -1, np.int64)  # when what is in a slot and was asked for had left; once is enough
        self.recalled = 0

    def step(self) -> None:
        super().step()
        marks = [self.header.watermark[node] for node in range(len(self.nodes))]
        room = min(AT_ONCE, sum(int(mark.free) - SPARE * int(mark.high) for mark in marks))
        if room <= 0 or not self.header.slots_used:
            return
        owner, out = self.slots["asid"], self.slots["out"]
        stored = np.flatnonzero((owner != 0) & (owner != BUSY) & (out != self.asked))
        if len(stored) > room:
            stored = stored[np.argpartition(out[stored], -room)[-room:]]
        self.txn.prefetch(self.slots, stored[np.lexsort((self.slots["vpage"][stored], owner[stored]))])
        self.asked[stored] = out[stored]
        self.recalled += len(stored)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"recalled": self.recalled}
