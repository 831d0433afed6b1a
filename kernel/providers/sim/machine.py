"""One address space on frames that do not exist: who has which frame, what is in the store, what a transaction of kswapd does to it. Pages have
no contents, and touches that change nothing are taken many at a time: for traces of millions.

As the gateway does it (kernel/native/gateway_swap.h, gateway_server.h), with these differences: a page that leaves is in the store at
once, a page that PREFETCH brings back is there at once, a frame goes from FREE to MAPPED without a magazine, and a fault brings one page, no
neighbours. The heat array is filled from the accesses themselves: as by hint faults, some frames a window, but their touches cost nothing.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from kernel.abi import lib
from kernel.providers.sim.base import BY_ITSELF, MAPPED, Base

ASID = 1
LEAST = 16  # frames of a node: with fewer there would be no room between the watermarks
SAMPLED = 8  # of the frames the 1/SAMPLED are looked at in one window
GONE = -1  # in no frame


class StoreFull(Exception):
    """A page is touched, no frame is free, and what is mapped finds no slot: where the OOM rule would apply."""


class Machine(Base):
    """
    :param vpages: the pages that can be touched, ascending, shape (pages,), uint64; everything below names a page by its index here
    :param frames: RAM, a multiple of ``nodes``
    :param slots: of the store; by default there is room for every page
    :raises ValueError: fewer than ``LEAST`` frames on a node, or not the same number on each
    """

    def __init__(self, vpages: NDArray[np.uint64], frames: int, nodes: int = 1, slots: int | None = None) -> None:
        super().__init__(frames, nodes, len(vpages) if slots is None else slots, LEAST)
        self.vpages = np.asarray(vpages, np.uint64)
        self.page_of = np.full(frames, GONE, np.int64)  # the page in each frame
        self.frame_of = np.full(len(self.vpages), GONE, np.int64)  # the frame of each page
        self.slot_of = np.full(len(self.vpages), GONE, np.int64)  # the slot of each page
        self._touched = np.zeros(len(self.vpages), np.bool_)  # in this window
        self._sample = np.zeros((2, 0), np.int64)  # frames that this window looks at, and their barriers
        self._look_at = 0
        self.header.monitor.source, self.header.monitor.active = lib.SY_HEAT_TRACE, 1
        # Touching such a page changes nothing: it is mapped, and not AGED.
        self._quiet = np.zeros(len(self.vpages), np.bool_)
        # First fit: the free frame with the lowest number.
        self._free = [list(range(base, base + size)) for base, size in self.nodes]
        self.first = 0

    @property
    def faults(self) -> int:
        """Touches of a page that was in no frame."""
        return self.first + self.refaults

    # ---- what programs do ----
    def hits(self, pages: NDArray[np.int64]) -> int:
        """How many of the first of these accesses change nothing."""
        quiet = self._quiet[pages]
        end = int(quiet.argmin()) if len(quiet) else 0
        return len(quiet) if not len(quiet) or quiet[end] else end

    def access(self, pages: NDArray[np.int64]) -> None:
        """Touches pages, shape (n,), one after the other. :raises StoreFull: see there; what was touched before stays so"""
        at = 0
        while at < len(pages):
            # Only what is not quiet now can do anything: within a batch pages become quiet, and nothing else happens to them …
            news = at + np.flatnonzero(~self._quiet[pages[at:]])
            at = len(pages)
            for i, page in zip(news.tolist(), pages[news].tolist(), strict=True):
                if not self._quiet[page] and self._touch(page):
                    at = i + 1  # … unless the gateway had to reclaim: look again.
                    break

    def _touch(self, page: int) -> bool:
        """Have pages left for it?"""
        pfn = int(self.frame_of[page])
        if pfn != GONE:
            self._flags[pfn] &= 0xFF ^ lib.SY_FF_AGED
            self._quiet[page] = True
            self.hints += 1
            self._event(lib.SY_MSG_PAGE_HINT, pfn, page)
            return False
        node = max(range(len(self.nodes)), key=lambda n: len(self._free[n]))
        reclaimed = not self._free[node]
        if reclaimed:
            node = self._reclaim_some()
        if self.slot_of[page] == GONE:
            self.first += 1
        else:
            self.refaults += 1
        self._arrive(page, node, lib.SY_MSG_PAGE_REFAULT)
        return self._relieve(node) or reclaimed

    def _arrive(self, page: int, node: int, why: int) -> None:
        """A page that is in no frame gets a free one of a node, with what the store has of it: ``why`` tells so."""
        pfn, slot = heapq.heappop(self._free[node]), int(self.slot_of[page])
        if slot != GONE:
            self._event(why, pfn, page, self.swapped_out - int(self.slots["out"][slot]))
            self.slot_of[page] = GONE
            self._free_slot(slot)
        self._state[pfn], self._flags[pfn], self._vpage[pfn] = MAPPED, 0, self.vpages[page]
        self._refcount[pfn], self._asid[pfn] = 1, ASID
        self._barrier[pfn] += 3  # FREE, ISOLATED, GRANTED, MAPPED
        self.page_of[pfn], self.frame_of[page], self._quiet[page] = page, pfn, True
        self._event(lib.SY_MSG_PAGE_MAPPED, pfn, page)
        self._zone_free(node, -1)

    # ---- how hot it is ----
    def note(self, pages: NDArray[np.int64]) -> None:
        """These pages were touched in this window, shape (n,)."""
        self._touched[pages] = True

    def end_window(self) -> None:
        """What it has shown goes into the heat array, HEAT_READY follows, and the next begins."""
        monitor = self.header.monitor
        pfns, barriers = self._sample
        pfns = pfns[self._barrier[pfns] == barriers]
        if len(pfns):
            touched, heat = self._touched[self.page_of[pfns]], self.heat
            heat["seen"][pfns] = heat["seen"][pfns] >> 1 | touched.astype(np.uint8) << 7
            heat["looks"][pfns] = np.minimum(heat["looks"][pfns] + 1, 8)
            heat["source"][pfns], heat["window"][pfns] = lib.SY_HEAT_TRACE, monitor.windows & 0xFF
            monitor.looked, monitor.touched = len(pfns), int(np.count_nonzero(touched))
            monitor.windows += 1
            self._message(lib.SY_MSG_HEAT_READY, npages=len(pfns), arg=monitor.windows)
        self._touched[:] = False
        mapped = np.flatnonzero(self._state == MAPPED)
        around = np.roll(mapped, -int(np.searchsorted(mapped, self._look_at)))[: len(self.frames) // SAMPLED]
        self._look_at = int(around[-1]) + 1 if len(around) else 0
        self._sample = np.stack([around, self._barrier[around].astype(np.int64)])

    # ---- what leaves ----
    def _reclaim_some(self) -> int:
        """The gateway by itself: until there are frames free again, but not beyond the high watermarks. The node of the first that is free now."""
        taken = self._hand_takes(min(BY_ITSELF, sum(self.header.watermark[n].high for n in range(len(self.nodes)))))
        if not len(taken):
            raise StoreFull(f"no frame is free, and the store's {self.header.slots} slots are taken")
        return int(taken[0]) // self._per

    def _freed(self, pfns: NDArray[np.int64]) -> None:
        for pfn in pfns.tolist():
            heapq.heappush(self._free[pfn // self._per], pfn)

    def _left(self, pfns: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        pages = self.page_of[pfns]
        self.slot_of[pages] = slots
        self.frame_of[pages], self.page_of[pfns], self._quiet[pages] = GONE, GONE, False

    # ---- what kswapd does ----
    def _taken_from_sight(self, pfns: NDArray[np.int64]) -> None:
        self._quiet[self.page_of[pfns]] = False

    def _knows(self, asid: int) -> bool:
        return asid == ASID

    def _bring(self, asid: int, vpage: int, node: int) -> None:
        self._arrive(int(np.searchsorted(self.vpages, vpage)), node, lib.SY_MSG_PAGE_PREFETCHED)

    # ---- what is told ----
    def _event(self, kind: int, pfn: int, page: int, arg: int = 0) -> None:
        self._events.append((kind, ASID, pfn, int(self.vpages[page]), 1, 0, pfn // self._per, arg))

    def check(self) -> list[str]:
        frames, bad = self.frames, super().check()
        mapped = np.flatnonzero(frames["state"] == MAPPED)
        if [sorted(free) for free in self._free] != [(base + np.flatnonzero(self._state[base : base + size] != MAPPED)).tolist() for base, size in self.nodes]:
            bad.append("a frame is neither MAPPED nor ready to be")
        pages = self.page_of[mapped]
        if (pages == GONE).any() or (self.frame_of[pages] != mapped).any() or (frames["vpage"][mapped] != self.vpages[pages]).any():  # fmt: skip
            bad.append("a MAPPED frame is not where its page says")
        if np.count_nonzero(self.frame_of != GONE) != len(mapped):
            bad.append("a page is in a frame that does not hold it")
        if ((self.frame_of != GONE) & (self.slot_of != GONE)).any():
            bad.append("a page is in a frame and in the store")
        slots = self.slot_of[self.slot_of != GONE]
        if np.flatnonzero(self.slots["asid"]).tolist() != sorted(slots.tolist()) or (self.slots["vpage"][slots] != self.vpages[self.slot_of != GONE]).any():
            bad.append("the table of slots is not what pages say")
        if np.count_nonzero(self.frame_of != GONE) + len(slots) != self.first:
            bad.append(f"{self.first} pages have been touched, {len(mapped) + len(slots)} are left")
        quiet = np.zeros_like(self._quiet)
        quiet[pages] = frames["flags"][mapped] & lib.SY_FF_AGED == 0
        if (quiet != self._quiet).any():
            bad.append("what a touch of a page would do is not what the table says")
        return bad
