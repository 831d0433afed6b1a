"""What every policy of thp shares: finding ranges to collapse (mm/khugepaged.c) and blocks to split (mm/huge_memory.c: split_huge_page), and learning
from what became of it. A policy says how full a range must be, and where."""

from __future__ import annotations

import errno
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy, Tunable
from bus.tables import FRAME_STATES
from kernel.abi import lib

MAPPED = FRAME_STATES["mapped"]
PAGES: int = lib.SY_CHUNK_PAGES  # 512: of a range, which is aligned to its size
AT_ONCE = 16  # ranges collapsed in one step, at most; the gateway takes 8 of one address space
DENSE = 0.9  # of a range's pages in use: it is nearly full
LEAVING = lib.SY_FF_STANDBY | lib.SY_FF_SWAPPING  # kswapd wants it


class Ranges:
    """Every range of 512 aligned pages with a mapped frame, ascending by address space and address.

    :param frames: the frame table
    :param heat: the heat array
    """

    def __init__(self, frames: NDArray[np.void], heat: NDArray[np.void]) -> None:
        pfn = np.flatnonzero(frames["state"] == MAPPED)
        vpage = frames["vpage"][pfn].astype(np.int64)
        key = frames["asid"][pfn].astype(np.int64) * lib.SY_CHUNKS + vpage // PAGES
        order = np.argsort(key, kind="stable")
        pfn, vpage, key = pfn[order], vpage[order], key[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        self.key = key[first]  # asid * SY_CHUNKS + number of the range; shape (n,), as all that follows
        self.pages = np.diff(first, append=len(key))  # mapped frames in it
        self.pfn = pfn[first]  # one of them
        # where a block would begin that has each page at its place: the same for all pages of a block
        begin = pfn - vpage % PAGES
        low, high = (f.reduceat(begin, first) if len(first) else self.key for f in (np.minimum, np.maximum))
        self.whole = (self.pages == PAGES) & (low == high) & (low % PAGES == 0)  # it is one block, mapped by one entry or in pieces

        def count(some: NDArray[np.bool_]) -> NDArray[np.int64]:
            return np.add.reduceat(some, first, dtype=np.int64) if len(first) else self.key

        flags, seen = frames["flags"][pfn], heat[pfn]
        aged = flags & lib.SY_FF_AGED != 0
        self.huge = count(frames["order"][pfn] == lib.SY_HUGE_ORDER)  # pages mapped in a block of 512
        self.hidden = count(aged)  # … taken from sight, and not touched since
        self.leaving = count(flags & LEAVING != 0)  # … that kswapd wants
        self.staying = count((flags & LEAVING == 0) & ~aged)  # … that it does not even suspect
        # Single pages are what hint faults look at; by the other sources (a folio at once) only the cold ones say something.
        single, cold = seen["source"] == lib.SY_HEAT_HINT, (seen["looks"] > 0) & (seen["seen"] == 0)
        self.looked, self.unseen = count(single & (seen["looks"] > 0)), count(single & cold)
        self.cold = count(aged | (cold & ~single))
        self.block = self.whole & (self.huge == PAGES)  # mapped by one entry

    @property
    def asid(self) -> NDArray[np.int64]:
        return self.key // lib.SY_CHUNKS


class CollapsePolicy(BasePolicy):
    """Looks through the frame table now and then, and has the fullest ranges collapsed while memory is plentiful."""

    tick = 0.2
    gather = 0.2
    only_advised = False  # only where the program asked for it by MADV_HUGEPAGE
    tunables: ClassVar[dict[str, Tunable]] = {
        "waste": Tunable(0.125, 0.0, 1.0, "pages that huge blocks have added, and of which nobody knows whether they are used: share of RAM, at most"),
        "cpu": Tunable(0.05, 0.001, 1.0, "share of one core that looking may take"),
    }
    waste: float
    cpu: float

    def max_ptes_none(self, free: float) -> int:
        """How many of a range's 512 pages may be untouched; -1: collapse nothing. ``free``: share of RAM that is."""
        raise NotImplementedError

    # ---- what happens ----
    def rebuild(self) -> None:
        self.not_before: dict[int, float] = {}  # by range: refused, so not again before
        self.pause: dict[int, float] = {}  # … and how long it was put off last
        self.filled: dict[int, int] = {}  # by range: zero pages that its collapse added
        self.asked: dict[int, int] = {}  # by the frame that a COLLAPSE or SPLIT named: its range
        self.orders: dict[int, tuple[int, int]] = {}  # by address space: the fault order that it was given, and up to which it grows
        self.look_at = 0.0
        self.collapsed = self.refused = self.split = 0
        for asid in np.unique(self.frames["asid"][self.frames["state"] == MAPPED]).tolist():  # what another policy may have told of ranges
            self.txn.fault_order(asid, lib.SY_ORDER_DEFAULT, 0, 0, lib.SY_CHUNKS)

    def page_collapsed(self, events: NDArray[np.void]) -> None:
        self.collapsed += len(events)
        for asid, vpage, there in zip(events["asid"].tolist(), events["vpage"].tolist(), events["arg"].tolist(), strict=True):
            key = asid * lib.SY_CHUNKS + vpage // PAGES
            self.filled[key] = PAGES - there
            self.pause.pop(key, None)

    def page_split(self, events: NDArray[np.void]) -> None:
        self.split += len(events)
        for asid, vpage in zip(events["asid"].tolist(), events["vpage"].tolist(), strict=True):
            self._put_off(asid * lib.SY_CHUNKS + vpage // PAGES, 1.0)

    def move_refused(self, events: NDArray[np.void]) -> None:
        for e in events[events["pfn"] == lib.SY_NO_FRAME]:
            self.refused += 1
            # It may not (foreign, locked, or no huge pages for this process at all), or something there was just changing.
            self._put_off(int(e["asid"]) * lib.SY_CHUNKS + int(e["vpage"]) // PAGES, 16.0 if e["arg"] == errno.EPERM else 0.5)

    def mm_madvise(self, events: NDArray[np.void]) -> None:
        """It may be permitted now."""
        for e in events[np.isin(events["arg"], (14, 15))]:  # MADV_HUGEPAGE, MADV_NOHUGEPAGE
            first = int(e["asid"]) * lib.SY_CHUNKS + int(e["vpage"]) // PAGES
            for key in range(first, first + int(e["npages"]) // PAGES + 1):
                self._forget(key)
            self.look_at = 0.0

    def mm_exit(self, events: NDArray[np.void]) -> None:
        gone = set(events["asid"].tolist())
        for key in [k for k in self.not_before | self.filled if k // lib.SY_CHUNKS in gone]:
            self._forget(key)
            self.filled.pop(key, None)
        for asid in gone:
            self.orders.pop(asid, None)

    def _put_off(self, key: int, least: float) -> None:
        self.pause[key] = max(least, min(2 * self.pause.get(key, 0.0), 64.0))
        self.not_before[key] = self.now() + self.pause[key]

    def _forget(self, key: int) -> None:
        self.not_before.pop(key, None)
        self.pause.pop(key, None)

    # ---- what to do ----
    def room(self) -> tuple[float, int]:
        """Share of RAM that is free, and blocks that may be taken without coming near the watermarks."""
        marks = [self.header.watermark[node] for node in range(len(self.nodes))]
        free = sum(int(m.free) for m in marks)
        return free / len(self.frames), max(0, free - 2 * sum(int(m.high) for m in marks)) // PAGES

    def short(self) -> bool:
        """Is kswapd at work anywhere, on a node or within a limit?"""
        zones = [*range(len(self.nodes)), *(lib.SY_MAX_NODES + k for k in range(lib.SY_MAX_LIMITS) if self.header.limit[k].members)]
        return any(self.header.watermark[z].free < 2 * self.header.watermark[z].high for z in zones)

    def left(self, ranges: Ranges) -> int:
        """Pages that may still be wasted."""
        return max(0, int(self.waste * len(self.frames)) - sum(self.filled.values()))

    def step(self) -> None:
        now = self.now()
        if now < self.look_at:
            return
        free, blocks = self.room()
        short = self.short()
        ranges = Ranges(self.frames, self.heat)
        whole = set(ranges.key[ranges.whole].tolist())
        self.filled = {k: n for k, n in self.filled.items() if k in whole}
        self.asked = {}
        left = self.left(ranges)
        self._set_orders(ranges, free, min(left // PAGES, blocks))
        chosen = self._choose(ranges, self.max_ptes_none(free), min(blocks, AT_ONCE), left, short, now)
        if short:
            self._split(ranges, now)
        self.look_at = self.now() + (1 / self.cpu - 1) * (self.now() - now) + (0.0 if chosen or short else 1.0)

    def _split(self, ranges: Ranges, now: float) -> None:
        """Takes blocks apart of which kswapd wants some pages, or suspects them (AGE), and others are in use. Of what is all cold nothing needs to stay mapped."""
        part = np.flatnonzero(ranges.whole & (ranges.huge > 0) & (ranges.leaving + ranges.hidden > 0) & (ranges.staying > 0))
        chosen = [i for i in part.tolist() if self.not_before.get(int(ranges.key[i]), 0.0) <= now][:AT_ONCE]
        self._ask(lib.SY_OP_SPLIT, ranges, chosen, 0, 0)

    def _ask(self, op: int, ranges: Ranges, chosen: list[int], order: int, arg: int) -> None:
        self.txn.add(op, ranges.pfn[chosen], order, arg=arg)
        self.asked |= zip(ranges.pfn[chosen].tolist(), ranges.key[chosen].tolist(), strict=True)

    def _choose(self, ranges: Ranges, most: int, count: int, waste: int, short: bool, now: float) -> int:
        """Has up to ``count`` ranges collapsed of which at most ``most`` pages are untouched, together no more than ``waste``; number.
        ``short``: nothing of which kswapd wants a part."""
        # (where somebody waits for a touch of a page, and all else is in place already, it would come to nothing)
        may = ~ranges.block & ~(ranges.whole & (ranges.hidden > 0)) & ~(short & (ranges.leaving > 0))
        full = np.flatnonzero(may & (ranges.pages >= PAGES - most))
        full = full[np.argsort(-ranges.pages[full], kind="stable")]
        chosen: list[int] = []
        for i in full.tolist():
            if len(chosen) == count:
                break
            missing = PAGES - int(ranges.pages[i])
            if missing > waste or self.not_before.get(int(ranges.key[i]), 0.0) > now:
                continue
            waste -= missing
            chosen.append(i)
        if chosen:
            self._ask(lib.SY_OP_COLLAPSE, ranges, chosen, lib.SY_HUGE_ORDER, most | (lib.SY_COLLAPSE_ADVISED if self.only_advised else 0))
        return len(chosen)

    def default_order(self) -> tuple[int, int]:
        """Fault order, and up to which it grows, of an address space of which nothing is known."""
        return int(self.header.default_fault_order), int(self.header.default_fault_order_max)

    def order_for(self, ranges: int, dense: float, sparse: float, free: float) -> tuple[int, int]:
        """Fault order, and up to which it grows, of an address space with so many ranges, of which these shares are (nearly) full and
        (nearly) empty."""
        return self.default_order()

    def _set_orders(self, ranges: Ranges, free: float, blocks: int) -> None:
        """Fault orders, now that so much is free; no more than ``blocks`` blocks of 512 may be taken for what was not touched."""
        asids, at = np.unique(ranges.asid, return_inverse=True)
        number = np.bincount(at, minlength=len(asids))
        dense = np.bincount(at, weights=ranges.pages >= DENSE * PAGES, minlength=len(asids)) / np.maximum(number, 1)
        sparse = np.bincount(at, weights=ranges.pages < PAGES // 16, minlength=len(asids)) / np.maximum(number, 1)
        for asid, n, full, thin in zip(asids.tolist(), number.tolist(), dense.tolist(), sparse.tolist(), strict=True):
            order = self.order_for(n, full, thin, free)
            if self.orders.get(asid) != order:
                self.orders[asid] = order
                self.txn.fault_order(asid, *order)

    def result(self, ops: NDArray[np.void]) -> None:
        failed = ops[(ops["result"] != lib.SY_R_COMPLETE) & np.isin(ops["op"], (lib.SY_OP_COLLAPSE, lib.SY_OP_SPLIT))]
        for pfn, result in zip(failed["pfn"].tolist(), failed["result"].tolist(), strict=True):
            if result == lib.SY_R_NOT_PERMITTED:
                self._put_off(self.asked[pfn], 16.0)
            elif result == lib.SY_R_FULL:  # no free block of that size: buddy may make some
                self.look_at = self.now() + 1.0
            elif result == lib.SY_R_STALE:
                self._put_off(self.asked[pfn], 0.2)

    def dump(self) -> dict[str, Any]:
        return {"collapsed": self.collapsed, "split": self.split, "refused": self.refused, "filled": sum(self.filled.values()), "put_off": len(self.not_before),
                "orders": {str(asid): list(order) for asid, order in list(self.orders.items())[-16:]}}  # fmt: skip
