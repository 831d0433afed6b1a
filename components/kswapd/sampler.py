"""Looks on: takes all pages away every now and then, by AGE, so that each touch of a page shows once an interval (PAGE_HINT).

For `sylvie record`. Should frames run out, those that came first leave. A program pays for what is seen with a minor fault a page and
interval; so intervals grow until that, and this process's own work, is no more than ``SHARE`` of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import MAX_ORDER
from components.kswapd.reclaim import MAPPED, ReclaimPolicy, oldest
from kernel.abi import lib

INTERVAL = 0.03  # seconds, at least
SHARE = 0.2
HINT = 1e-5  # seconds that a program loses by one minor fault


class Policy(ReclaimPolicy):
    """sampler"""

    tick = INTERVAL

    def rebuild(self) -> None:
        super().rebuild()
        self.samples = self.hints = 0
        self.spent = 0.0  # seconds, since the last sample
        self.sampled_at = self.asked_at = self.now()

    def page_hint(self, events: NDArray[np.void]) -> None:
        self.hints += len(events)
        self.spent += HINT * len(events)

    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        return oldest(self.stamp, candidates, count)

    def step(self) -> None:
        super().step()
        self.asked_at = self.now()
        if self.asleep() or self.asked_at < self.sampled_at + max(INTERVAL, self.spent / SHARE):
            return
        self.samples += 1
        self.sampled_at, self.spent = self.asked_at, 0.0
        idle = (self.frames["state"] == MAPPED) & (self.frames["flags"] & (lib.SY_FF_AGED | lib.SY_FF_SWAPPING) == 0)
        for order, pfns in enumerate(blocks(self.frames, idle)):
            self.txn.add(lib.SY_OP_AGE, pfns, order)

    def result(self, ops: NDArray[np.void]) -> None:
        super().result(ops)
        now = self.now()
        self.spent += now - self.asked_at
        self.asked_at = now

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"samples": self.samples, "hints": self.hints}


def blocks(frames: NDArray[np.void], chosen: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The chosen frames as aligned blocks of pages that follow one another in one address space, as large as possible.

    :param chosen: shape (frames,)
    :return: for each order 0..MAX_ORDER the first pfns of its blocks, ascending
    """
    asid, vpage = frames["asid"], frames["vpage"]
    follows = np.zeros(len(frames), np.bool_)  # on the frame before
    follows[1:] = (asid[1:] == asid[:-1]) & (vpage[1:] == vpage[:-1] + np.uint64(1))
    out, level = [], chosen
    for order in range(MAX_ORDER + 1):
        pairs = len(level) // 2 if order < MAX_ORDER else 0
        joined = level[0 : 2 * pairs : 2] & level[1 : 2 * pairs : 2] & follows[1 << order :: 2 << order][:pairs]
        alone = level.copy()
        alone[: 2 * pairs] &= ~np.repeat(joined, 2)
        out.append(np.flatnonzero(alone) << order)
        level = joined
    return out
