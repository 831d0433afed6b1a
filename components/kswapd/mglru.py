"""Linux's multi-generational LRU (mm/vmscan.c, lru_gen; Documentation/admin-guide/mm/multigen_lru.rst).

Pages belong to generations. What arrives is of the youngest, and what is touched (PAGE_HINT) joins it. Aging begins a new generation and
takes the accessed bit, by AGE, from all older ones: pages that are touched from then on move up, the others stay behind. Pages leave from the
oldest generations; the ``MIN_GENS`` youngest are spared.

Within what may leave, a tier is the logarithm of how often a page was seen touched and came back. Pages of a tier that comes back more
often than those of the first tier do are protected: they move to the next generation once, instead of leaving (get_tier_idx,
positive_ctrl_err). Linux counts touches by file descriptors for its tiers, of which there are none here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.kswapd.reclaim import BATCH, ReclaimPolicy, oldest
from kernel.abi import lib

MIN_GENS, TIERS = 2, 4  # MIN_NR_GENS, MAX_NR_TIERS
MARGIN = 64  # MIN_LRU_BATCH: so few refaults say nothing
PAGE_BITS = 24  # of a page in its arena


class Policy(ReclaimPolicy):
    """mglru. Per frame: ``gen``, its generation; ``touched``, how often it was seen touched; ``stamp``, since when it is of it."""

    def rebuild(self) -> None:
        super().rebuild()
        self.gen = np.zeros(len(self.frames), np.int64)
        self.youngest = np.zeros(len(self.nodes), np.int64)
        self.touched = np.zeros(len(self.frames), np.int64)
        self.protected = 0
        # What left, and how often it had been touched: by a hash of the page, the later of two that share one stays.
        self.shadow = np.zeros((1 << int(self.header.slots).bit_length(), 2), np.int64)
        # Of this oldest generation's time, and of earlier ones', by tier: pages that came back, that could have.
        self.era = -1
        self.back, self.back_before = np.zeros((2, TIERS))
        self.all, self.all_before = np.zeros((2, TIERS))

    # ---- what happens ----
    def arrived(self, pfns: NDArray[np.int64]) -> None:
        super().arrived(pfns)
        self.gen[pfns] = self.youngest[self.frames["node"][pfns]]
        self.touched[pfns] *= self.returned_to(pfns)

    def _renew(self, pfns: NDArray[np.int64], gen: NDArray[np.int64], touched: NDArray[np.int64] | int) -> None:
        super().arrived(pfns)
        self.gen[pfns], self.touched[pfns] = gen, touched

    def page_hint(self, events: NDArray[np.void]) -> None:
        pfns = events["pfn"].astype(np.int64)
        self._renew(pfns, self.youngest[self.frames["node"][pfns]], self.touched[pfns] + 1)

    def page_refault(self, events: NDArray[np.void]) -> None:
        super().page_refault(events)
        key, at = self._shadow_of(events["asid"], events["vpage"])
        # Longer ago, it could not have stayed.
        known = (self.shadow[at, 0] == key) & (events["arg"] <= len(self.frames))
        touched = self.shadow[at, 1]
        np.add.at(self.back, tier_of(touched[known]), 1)
        self.touched[events["pfn"].astype(np.int64)] = np.where(known, touched + 1, 0)

    def _shadow_of(self, asid: NDArray[Any], vpage: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        key = (asid.astype(np.int64) << PAGE_BITS | vpage.astype(np.int64)) + 1
        return key, (key * 0x9E3779B97F4A7C1 >> 16) & (len(self.shadow) - 1)

    # ---- what to do ----
    def victims(self, candidates: NDArray[np.int64], count: int, short: bool) -> NDArray[np.int64]:
        node = int(self.frames["node"][candidates[0]])
        gen = self.gen[candidates]
        self._turn_era(int(gen.min()))
        self._age_if_needed(node, gen)
        aged = self.frames["flags"][candidates] & lib.SY_FF_AGED != 0
        # Of a large RAM not all bits at once: what is about to leave waits behind them.
        bits = oldest(self.stamp, candidates[~aged & (gen < self.youngest[node])], BATCH)
        self.txn.add(lib.SY_OP_AGE, np.sort(bits), 0)
        may = candidates[aged & (gen <= self.youngest[node] - MIN_GENS)]
        tier = tier_of(self.touched[may])
        safe = tier > self._leaving_tier()
        leaving = oldest(self.stamp, may[~safe], count)
        if len(leaving):
            passed = self.stamp[may] <= self.stamp[leaving].max()
            np.add.at(self.all, tier[passed], 1)
            self._protect(may[safe & passed])
        elif short:  # else: wait for touches
            leaving = oldest(self.stamp, candidates, count)
        key, at = self._shadow_of(self.frames["asid"][leaving], self.frames["vpage"][leaving])
        self.shadow[at] = np.stack([key, self.touched[leaving]], axis=1)
        return leaving

    def _age_if_needed(self, node: int, gen: NDArray[np.int64]) -> None:
        """A new generation if there are too few, or just enough and unevenly filled (should_run_aging, inc_max_seq)."""
        spread, total = self.youngest[node] - gen.min(), len(gen)
        young, old = np.count_nonzero(gen == self.youngest[node]), np.count_nonzero(gen == gen.min())
        uneven = young * MIN_GENS > total or old * (MIN_GENS + 2) < total
        if spread < MIN_GENS or (spread == MIN_GENS and uneven):
            self.youngest[node] += 1

    def _protect(self, pfns: NDArray[np.int64]) -> None:
        """One generation up; how often they were touched no longer counts (folio_inc_gen)."""
        self._renew(pfns, self.gen[pfns] + 1, 0)
        self.protected += len(pfns)

    def _leaving_tier(self) -> int:
        """The highest tier whose pages leave: those above one that comes back more often, 3 : 2, than the first are safe."""
        back, total = self.back + self.back_before, self.all + self.all_before
        worse = (back[1:] >= MARGIN) & (back[1:] * (total[0] + MARGIN) * 2 > (back[0] + 1) * total[1:] * 3)
        return int(worse.argmax()) if worse.any() else TIERS - 1

    def _turn_era(self, oldest_gen: int) -> None:
        """When the oldest generation has gone, what was learnt counts half (reset_ctrl_pos)."""
        if oldest_gen > self.era:
            self.era = oldest_gen
            self.back_before, self.all_before = (self.back_before + self.back) / 2, (self.all_before + self.all) / 2
            self.back, self.all = np.zeros((2, TIERS))

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"generations": int(self.youngest.max()), "protected": self.protected}


def tier_of(touched: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 for 0, 1 for 1, 2 for 2 and 3, 3 for more (order_base_2(n + 1), lru_tier_from_refs)."""
    return np.searchsorted(np.array([1, 2, 4]), touched, side="right")
