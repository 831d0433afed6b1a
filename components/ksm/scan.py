"""Linux's ksmd (mm/ksm.c): pages that asked for it are looked at round and round; one that has the same checksum twice in a row and the same as
another is merged with it. What is merged is stable: it is protected, so its checksum stays true, and it is looked up first; what is not is
unstable, and forgotten at the end of each round. Here both are sorted arrays of checksums (xxHash) and no trees of contents, since the stub compares the
bytes before it merges: a checksum that two different pages share costs a refused MERGE."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from bus.policy import BasePolicy, Tunable
from bus.tables import FRAME_STATES, alike_blocks
from kernel.abi import lib

MAPPED, SHARED = FRAME_STATES["mapped"], FRAME_STATES["shared"]
BUSY = lib.SY_FF_SHARING | lib.SY_FF_SWAPPING | lib.SY_FF_TARGET
LONGEST = 1.0  # seconds between two steps, at most
HOLDER = 16  # bytes that the gateway keeps for a shared page
PER_STABLE: int = lib.SY_MAX_SHARING
NOTHING = np.zeros(0, np.int64)


def _rank(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many before it are of the same group, for each."""
    order = np.argsort(group, kind="stable")
    begin = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(begin, np.diff(begin, append=len(group)))
    return rank


def merged(frames: NDArray[np.void]) -> NDArray[np.bool_]:
    """SHARED and nobody's: what a fork shares has an owner."""
    return np.asarray((frames["state"] == SHARED) & (frames["asid"] == 0))


class Policy(BasePolicy):
    """scan"""

    tick = 0.1
    gather = 0.02
    # As ksmd's advisor: as quickly as it pays.
    tunables: ClassVar[dict[str, Tunable]] = {
        "cpu": Tunable(0.25, 0.001, 1.0, "share of one core that looking may take while something is found"),
        "idle_cpu": Tunable(0.1, 0.001, 1.0, "… and otherwise"),
        "pages_to_scan": Tunable(8192, 16, 1 << 20, "pages looked at in one step, at most"),
    }
    cpu: float
    idle_cpu: float
    pages_to_scan: float

    def rebuild(self) -> None:
        n = len(self.frames)
        self.checksum: NDArray[np.uint64] = np.zeros(n, np.uint64)
        self.page: NDArray[np.int64] = np.full(n, -1, np.int64)  # which page a frame's checksum is of
        self.not_before: NDArray[np.float64] = np.zeros(n)
        self.stable = np.flatnonzero(merged(self.frames))  # pfns
        self.checksum[self.stable] = self._checksums(self.stable)
        self.cursor = 0
        self._new_round()
        self.again = NOTHING  # pages that are to be looked at first: one like them has just become stable, or will
        self.look_at = 0.0
        self.full_scans = self.volatile = self.merged = self.refused = 0
        self.found = True

    def _new_round(self) -> None:
        self.unstable = NOTHING
        self.volatile_now = 0

    def _checksums(self, pfns: NDArray[np.int64]) -> NDArray[np.uint64]:
        out, size, digest = np.zeros(len(pfns), np.uint64), lib.SY_PAGE_SIZE, xxhash.xxh3_64_intdigest
        for (base, frames), ram in zip(self.nodes, self.ram, strict=True):
            at = (pfns >= base) & (pfns < base + frames)
            view = memoryview(ram.reshape(-1).data)  # its slices copy nothing
            begins = ((pfns[at] - base) * size).tolist()
            out[at] = np.fromiter((digest(view[b : b + size]) for b in begins), np.uint64, len(begins))
        return out

    # ---- what became of it ----
    def page_merged(self, events: NDArray[np.void]) -> None:
        new = events[events["pfn"] == events["arg"]]
        self.merged += int(events["npages"].sum()) - int(new["npages"].sum())
        parts = [np.arange(pfn, pfn + n) for pfn, n in zip(new["pfn"].tolist(), new["npages"].tolist(), strict=True)]
        self.stable = np.unique(np.concatenate([self.stable, *parts]))

    def merge_refused(self, events: NDArray[np.void]) -> None:
        for e in events:
            self.refused += int(e["npages"])
            self.not_before[int(e["pfn"]) : int(e["pfn"]) + int(e["npages"])] = self.now() + 2.0

    def result(self, ops: NDArray[np.void]) -> None:
        failed = ops[ops["result"] != lib.SY_R_COMPLETE]
        kinds = np.unique(failed[["order", "result"]]).tolist()
        for order, result in kinds:
            at = failed["pfn"][(failed["order"] == order) & (failed["result"] == result)].astype(np.int64)
            pfns = (at[:, None] + np.arange(1 << order)).reshape(-1)
            if result == lib.SY_R_BUSY:  # its stub has enough to do: as soon as it can
                self.again = np.union1d(self.again, pfns)
            else:
                self.not_before[pfns] = self.now() + 0.2

    # ---- what to do ----
    def candidates(self) -> NDArray[np.int64]:
        """Pages that may be merged, ascending."""
        f = self.frames
        return np.flatnonzero((f["state"] == MAPPED) & (f["flags"] & lib.SY_FF_MERGEABLE != 0) & (f["flags"] & BUSY == 0) & (self.not_before <= self.now()))

    def step(self) -> None:
        began = self.now()
        if began < self.look_at or not self.ram:
            return
        ours = self.candidates()
        at, scan = int(np.searchsorted(ours, self.cursor)), int(self.pages_to_scan)
        some, again = ours[at : at + scan], np.intersect1d(self.again, ours)
        self.unstable = np.intersect1d(self.unstable, ours)
        self.again = NOTHING
        if len(some):
            self._look(some, again)
        if at + scan >= len(ours):  # a round is over
            self.full_scans += 1
            self.volatile = self.volatile_now
            self.cursor = 0
            self._new_round()
        else:
            self.cursor = int(ours[at + scan - 1]) + 1
        took = self.now() - began
        pause = took * (1 / (self.cpu if self.found or len(self.again) else self.idle_cpu) - 1)
        self.look_at = self.now() + (min(pause, LONGEST) if len(ours) else 0.5)

    def _page(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Whose page is in each frame now."""
        f = self.frames[pfns]
        return f["asid"].astype(np.int64) << 32 | f["vpage"].astype(np.int64)

    def _look(self, pfns: NDArray[np.int64], again: NDArray[np.int64]) -> None:
        """``again``: have been looked at a moment ago, and settled."""
        self.found = False
        page = self._page(pfns)
        now = self._checksums(pfns)
        settled = (self.checksum[pfns] == now) & (self.page[pfns] == page)
        self.found |= bool((self.page[pfns] != page).any())
        self.volatile_now += int(np.count_nonzero(~settled & (self.page[pfns] == page)))
        self.checksum[pfns], self.page[pfns] = now, page
        pfns = np.union1d(pfns[settled], again[self.page[again] == self._page(again)])
        self.stable = self.stable[merged(self.frames[self.stable])]
        room = self.stable[self.frames["refcount"][self.stable] < lib.SY_MAX_SHARING]
        room = room[np.argsort(self.checksum[room], kind="stable")]
        target = self._equal(pfns, room)
        self._merge(pfns[target >= 0], target[target >= 0])
        pfns = pfns[target < 0]
        # Of each group of equals one becomes stable, or as many as it takes; the others are looked at again as soon as they are.
        both = np.unique(np.concatenate([self.unstable, pfns]))
        group, count = np.unique(self.checksum[both], return_inverse=True, return_counts=True)[1:]
        leaders = both[(count[group] > 1) & (_rank(group) % PER_STABLE == 0)]
        self._merge(leaders, leaders)
        self.again = np.union1d(self.again, both[count[group] > 1])
        self.unstable = both

    def _equal(self, pfns: NDArray[np.int64], stable: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each page a stable one (sorted by checksum) with its checksum, -1: there is none. Where several have it, they are taken in turn."""
        if not len(stable) or not len(pfns):
            return np.full(len(pfns), -1, np.int64)
        first = np.searchsorted(self.checksum[stable], self.checksum[pfns])
        number = np.searchsorted(self.checksum[stable], self.checksum[pfns], side="right") - first
        at = first + _rank(first) // (PER_STABLE // 2) % np.maximum(number, 1)
        return np.where(number > 0, stable[np.minimum(at, len(stable) - 1)], -1)

    def _merge(self, pfns: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        if not len(pfns):
            return
        self.found = True
        to = dict(zip(pfns.tolist(), targets.tolist(), strict=True))
        for order, blocks in alike_blocks(self.frames, pfns, lib.SY_HUGE_ORDER, targets):
            for pfn in blocks.tolist():
                self.txn.add(lib.SY_OP_MERGE, pfn, order, arg=to[pfn])

    def dump(self) -> dict[str, Any]:
        sharers = self.frames["refcount"][merged(self.frames)]
        shared, total = len(sharers), int(sharers.sum())
        return {
            "pages_shared": shared, "pages_sharing": total - shared, "pages_volatile": self.volatile, "full_scans": self.full_scans,
            "general_profit": (total - shared) * lib.SY_PAGE_SIZE - total * HOLDER, "merged": self.merged, "refused": self.refused,
        }  # fmt: skip
