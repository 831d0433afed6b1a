"""One address space on frames that do not exist: who has which frame, what is in the store, what a transaction does to it.

As the gateway does it (kernel/native/gateway_swap.h, gateway_server.h), with these differences: a page that leaves is in the store at
once, a page that PREFETCH brings back is there at once, a frame goes from FREE to MAPPED without a magazine, and a fault brings one page, no
neighbours. The heat array is filled from the accesses themselves: as by hint faults, some frames a window, but their touches cost nothing.
"""

from __future__ import annotations

import heapq
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import FRAME_STATES, frames_by_state
from kernel.abi import FRAME_DTYPE, HEAT_DTYPE, MSG_DTYPE, STORED_DTYPE, ffi, lib

FREE, MAPPED = FRAME_STATES["free"], FRAME_STATES["mapped"]
ASID = 1
LEAST = 16  # frames of a node: with fewer there would be no room between the watermarks
BY_ITSELF = (
    1024  # frames that the gateway reclaims at once when none is free, at most (refill_urgent in gateway_server.h)
)
SAMPLED = 8  # of the frames the 1/SAMPLED are looked at in one window
GONE = -1  # in no frame
# What kswapd may not do, and what nobody can (permitted() in gateway_server.h); all others are INVALID.
FORBIDDEN = {lib.SY_OP_GRANT, lib.SY_OP_RESERVE, lib.SY_OP_RELEASE, lib.SY_OP_FAULT_ORDER, lib.SY_OP_COLLAPSE,
             lib.SY_OP_SPLIT, lib.SY_OP_MERGE, lib.SY_OP_MIGRATE, lib.SY_OP_RUN}  # fmt: skip


class StoreFull(Exception):
    """A page is touched, no frame is free, and what is mapped finds no slot: where the OOM rule would apply."""


class Machine:
    """
    :param vpages: the pages that can be touched, ascending, shape (pages,), uint64; everything below names a page by its index here
    :param frames: RAM, a multiple of ``nodes``
    :param slots: of the store; by default there is room for every page
    :raises ValueError: fewer than ``LEAST`` frames on a node, or not the same number on each
    """

    def __init__(self, vpages: NDArray[np.uint64], frames: int, nodes: int = 1, slots: int | None = None) -> None:
        per = frames // nodes
        if per < LEAST or frames % nodes or not 1 <= nodes <= lib.SY_MAX_NODES:
            raise ValueError(f"{frames} frames on {nodes} nodes: give each of 1 to {lib.SY_MAX_NODES} nodes the same, at least {LEAST}")  # fmt: skip
        self.vpages = np.asarray(vpages, np.uint64)
        self.frames: NDArray[np.void] = np.zeros(frames, FRAME_DTYPE)
        self.nodes = [(n * per, per) for n in range(nodes)]
        self.frames["state"], self.frames["flags"] = FREE, lib.SY_FF_ZERO
        # Views of its columns: a touch looks at one frame, and a column is quicker to find once.
        self._state, self._flags, self._vpage, self._barrier = (self.frames[name] for name in ("state", "flags", "vpage", "barrier"))  # fmt: skip
        self._per = per
        self.frames["node"] = np.repeat(np.arange(nodes), per)
        self.header: Any = ffi.new("struct sy_header *")
        head = self.header
        head.magic, head.abi, head.nodes, head.frames, head.populated = lib.SY_MAGIC, lib.SY_ABI_VERSION, nodes, frames, frames  # fmt: skip
        head.slots = len(self.vpages) if slots is None else slots
        for n, (base, size) in enumerate(self.nodes):
            head.node[n].base, head.node[n].frames = base, size
            mark = head.watermark[n]
            # As the gateway sets them, but never so small that they are one.
            mark.min, mark.low, mark.high, mark.free = max(1, per // 128), max(2, per // 64), max(4, per // 32), per
        self.now = 0.0  # seconds
        self.page_of = np.full(frames, GONE, np.int64)  # the page in each frame
        self.frame_of = np.full(len(self.vpages), GONE, np.int64)  # the frame of each page
        self.slot_of = np.full(len(self.vpages), GONE, np.int64)  # the slot of each page
        self.heat: NDArray[np.void] = np.zeros(frames, HEAT_DTYPE)
        self.slots: NDArray[np.void] = np.zeros(head.slots, STORED_DTYPE)
        self._touched = np.zeros(len(self.vpages), np.bool_)  # in this window
        self._sample = np.zeros((2, 0), np.int64)  # frames that this window looks at, and their barriers
        self._look_at = 0
        head.monitor.source, head.monitor.active = lib.SY_HEAT_TRACE, 1
        # Touching such a page changes nothing: it is mapped, and not AGED.
        self._quiet = np.zeros(len(self.vpages), np.bool_)
        # First fit: the free frame with the lowest number.
        self._free = [list(range(base, base + size)) for base, size in self.nodes]
        self._slots = list(range(head.slots - 1, -1, -1))
        self._told = [2] * nodes  # arg of the last WATERMARK
        # What kswapd has chosen to leave, in order: (pfn, its barrier then, was it AGED).
        self._standby: list[deque[tuple[int, int, bool]]] = [deque() for _ in range(nodes)]
        self._reclaiming = [False] * nodes
        self._hand = 0
        self._events: list[tuple[int, ...]] = []
        self._seqnum = 0
        self.first = self.refaults = self.hints = self.swapped_out = self.by_gateway = self.prefetched = 0

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
            self.slot_of[page], self.slots[slot] = GONE, np.zeros((), STORED_DTYPE)
            self._slots.append(slot)
            self.header.slots_used -= 1
        self._state[pfn], self._flags[pfn], self._vpage[pfn] = MAPPED, 0, self.vpages[page]
        self.frames["refcount"][pfn], self.frames["asid"][pfn] = 1, ASID
        self._barrier[pfn] += 3  # FREE, ISOLATED, GRANTED, MAPPED
        self.page_of[pfn], self.frame_of[page], self._quiet[page] = page, pfn, True
        self._event(lib.SY_MSG_PAGE_MAPPED, pfn, page)
        self._free_changed(node)

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
            self._events.append((lib.SY_MSG_HEAT_READY, 0, 0, 0, len(pfns), 0, monitor.windows))
        self._touched[:] = False
        mapped = np.flatnonzero(self._state == MAPPED)
        around = np.roll(mapped, -int(np.searchsorted(mapped, self._look_at)))[: len(self.frames) // SAMPLED]
        self._look_at = int(around[-1]) + 1 if len(around) else 0
        self._sample = np.stack([around, self._barrier[around].astype(np.int64)])

    # ---- what leaves ----
    def _reclaim_some(self) -> int:
        """Frames under the hand, round and round, until there is one free again: as many as the gateway takes at once, but not
        beyond the high watermarks. The node of the first that is free now."""
        want = min(BY_ITSELF, sum(self.header.watermark[n].high for n in range(len(self.nodes))), len(self._slots))
        around = np.flatnonzero(self._state == MAPPED)
        around = np.roll(around, -int(np.searchsorted(around, self._hand)))[:want]
        if not len(around):
            raise StoreFull(f"no frame is free, and the store's {self.header.slots} slots are taken")
        self._hand = int(around[-1]) + 1
        self.by_gateway += len(around)
        self._evict(around)
        return int(self.frames["node"][around[0]])

    def _evict(self, pfns: NDArray[np.int64]) -> None:
        """MAPPED frames, for each of which there is a slot, become FREE."""
        pages = self.page_of[pfns]
        slots = [self._slots.pop() for _ in range(len(pfns))]
        self.slot_of[pages] = slots
        self.slots["asid"][slots], self.slots["vpage"][slots] = ASID, self.vpages[pages]
        self.slots["out"][slots] = self.swapped_out + np.arange(len(pfns))
        self.heat[pfns] = np.zeros((), HEAT_DTYPE)
        self.swapped_out += len(pfns)
        self.header.slots_used += len(pfns)
        self.frame_of[pages], self.page_of[pfns], self._quiet[pages] = GONE, GONE, False
        for pfn, page, slot in zip(pfns.tolist(), pages.tolist(), slots, strict=True):
            self._event(lib.SY_MSG_PAGE_SWAPPED, pfn, page, slot)
            self._event(lib.SY_MSG_PAGE_FREED, pfn)
        for name, value in (("state", FREE), ("flags", 0), ("refcount", 0), ("asid", 0), ("vpage", 0)):
            self.frames[name][pfns] = value
        self.frames["barrier"][pfns] += 1
        nodes = [pfn // self._per for pfn in pfns.tolist()]
        for node, pfn in zip(nodes, pfns.tolist(), strict=True):
            heapq.heappush(self._free[node], pfn)
        for node in sorted(set(nodes)):
            self._free_changed(node)

    def _relieve(self, node: int) -> bool:
        """What stands by leaves, from below the low watermark up to the high one. Has anything left?"""
        mark, waiting = self.header.watermark[node], self._standby[node]
        self._reclaiming[node] |= mark.free < mark.low
        leaving: list[int] = []
        while self._reclaiming[node] and waiting and mark.free + len(leaving) < mark.high and len(leaving) < len(self._slots):
            pfn, barrier, aged = waiting.popleft()
            if self._barrier[pfn] != barrier or not self._flags[pfn] & lib.SY_FF_STANDBY:
                continue
            self._flags[pfn] &= 0xFF ^ lib.SY_FF_STANDBY
            if not aged or self._flags[pfn] & lib.SY_FF_AGED:
                leaving.append(pfn)
        mark.standby = len(waiting)
        if leaving:
            self._evict(np.array(leaving))
        if mark.free >= mark.high:
            self._reclaiming[node] = False
        return bool(leaving)

    def _free_changed(self, node: int) -> None:
        """The header's count, and WATERMARK if it has crossed one (set_free_bits in gateway.c)."""
        mark = self.header.watermark[node]
        mark.free = free = len(self._free[node])
        level = 0 if free < mark.min else 1 if free < mark.low else 2
        if (self._told[node] != 2 and free >= mark.high) if level == 2 else level < self._told[node]:
            self._told[node] = level
            self._events.append((lib.SY_MSG_WATERMARK, 0, 0, 0, free, node, level))

    # ---- what kswapd does ----
    def commit(self, ops: NDArray[np.void]) -> NDArray[np.void]:
        """Operations of kswapd, shape (n,), OP_DTYPE, carried out one after the other; the same with their results."""
        ops = ops.copy()
        kind = ops["op"].astype(np.int64) << 17 | ops["order"] << 1 | (ops["arg"] == lib.SY_RECLAIM_STANDBY)
        ends = [*(np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist(), len(ops)]
        for start, end in pairwise([0, *ends]):
            if end > start:
                ops["result"][start:end] = self._commit_run(ops[start:end])
        for node in range(len(self.nodes)):
            self._relieve(node)
        return ops

    def _commit_run(self, ops: NDArray[np.void]) -> NDArray[np.uint32]:
        """Operations of one kind and order; their results, shape (n,)."""
        op, order = int(ops["op"][0]), int(ops["order"][0])
        result = np.full(len(ops), lib.SY_R_INVALID, np.uint32)
        if op == lib.SY_OP_PREFETCH and not order:
            return np.array([self._prefetch(*(int(o[name]) for name in ("pfn", "barrier", "asid", "arg"))) for o in ops], np.uint32)
        if op not in (lib.SY_OP_RECLAIM, lib.SY_OP_AGE):
            result[:] = lib.SY_R_NOT_PERMITTED if op in FORBIDDEN else lib.SY_R_INVALID
            return result
        if order > lib.SY_MAX_ORDER:
            return result
        n, pfn = 1 << order, ops["pfn"].astype(np.int64)
        at = np.flatnonzero((pfn % n == 0) & (pfn + n <= len(self.frames)))
        if op == lib.SY_OP_RECLAIM and not self.header.slots:
            result[at] = lib.SY_R_FULL
            return result
        result[at] = lib.SY_R_STALE
        at = at[self._barrier[pfn[at]] == ops["barrier"][at]]
        if (pfn[at][1:] <= pfn[at][:-1]).any():  # named twice, the second is too late
            at = np.sort(at[np.unique(pfn[at], return_index=True)[1]])
        standing = op == lib.SY_OP_RECLAIM and int(ops["arg"][0]) == lib.SY_RECLAIM_STANDBY
        if standing:
            blocks = pfn[at, None] + np.arange(n)
            at = at[((self._state[blocks] == MAPPED) & (self._flags[blocks] & lib.SY_FF_STANDBY == 0)).all(axis=1)]
        else:
            at = at[self._whole(pfn[at, None] + np.arange(n), op)]
        if op == lib.SY_OP_RECLAIM and not standing:
            room = len(self._slots) >> order
            result[at[room:]] = lib.SY_R_FULL
            at = at[:room]
        result[at] = lib.SY_R_COMPLETE
        chosen = (pfn[at, None] + np.arange(n)).ravel()
        if op == lib.SY_OP_AGE:
            self._flags[chosen] |= lib.SY_FF_AGED
            self._quiet[self.page_of[chosen]] = False
        elif standing:
            self._stand_by(chosen)
        elif len(chosen):
            self._evict(chosen)
        return result

    def _prefetch(self, slot: int, out: int, asid: int, vpage: int) -> int:
        """The page in a slot comes back (prefetch() in gateway_heat.h). The result."""
        if slot >= len(self.slots) or vpage >= lib.SY_ARENA_PAGES:
            return int(lib.SY_R_INVALID)
        if asid != ASID:
            return int(lib.SY_R_NOT_FOUND)
        if self.slots[slot].tolist()[:3] != (asid, vpage, out):
            return int(lib.SY_R_STALE)
        node = max(range(len(self.nodes)), key=lambda n: len(self._free[n]) - int(self.header.watermark[n].low))
        if len(self._free[node]) <= self.header.watermark[node].low:
            return int(lib.SY_R_FULL)
        self.prefetched += 1
        self._arrive(int(np.searchsorted(self.vpages, vpage)), node, lib.SY_MSG_PAGE_PREFETCHED)
        return int(lib.SY_R_COMPLETE)

    def _stand_by(self, pfns: NDArray[np.int64]) -> None:
        aged = self._flags[pfns] & lib.SY_FF_AGED != 0
        self._flags[pfns] |= lib.SY_FF_STANDBY
        for pfn, barrier, was in zip(pfns.tolist(), self._barrier[pfns].tolist(), aged.tolist(), strict=True):
            self._standby[pfn // self._per].append((pfn, barrier, was))
        for node, waiting in enumerate(self._standby):
            self.header.watermark[node].standby = len(waiting)

    def _whole(self, blocks: NDArray[np.int64], op: int) -> NDArray[np.bool_]:
        """Which blocks, shape (k, n), are MAPPED one page after the other and not AGED already if they are to be (take_run)."""
        vpages = self._vpage[blocks]
        whole = self._state[blocks] == MAPPED
        whole &= vpages == vpages[:, :1] + np.arange(blocks.shape[1], dtype=np.uint64)
        if op == lib.SY_OP_AGE:
            whole &= self._flags[blocks] & lib.SY_FF_AGED == 0
        return np.asarray(whole.all(axis=1))

    # ---- what is told ----
    def _event(self, kind: int, pfn: int, page: int = GONE, arg: int = 0) -> None:
        vpage, asid = (0, 0) if page == GONE else (int(self.vpages[page]), ASID)
        self._events.append((kind, asid, pfn, vpage, 1, pfn // self._per, arg))

    def events(self) -> NDArray[np.void]:
        """What has happened since the last call, shape (n,), MSG_DTYPE, numbered without a gap."""
        out = np.zeros(len(self._events), MSG_DTYPE)
        if self._events:
            columns = zip(*self._events, strict=True)
            for name, column in zip(("type", "asid", "pfn", "vpage", "npages", "node", "arg"), columns, strict=True):
                out[name] = column
        out["length"] = MSG_DTYPE.itemsize
        out["seqnum"] = self._seqnum + np.arange(len(out))
        self._seqnum += len(out)
        self._events = []
        return out

    def check(self) -> list[str]:
        """Invariants that do not hold, a sentence each."""
        frames, head, bad = self.frames, self.header, []
        states = frames_by_state(frames)
        mapped = np.flatnonzero(frames["state"] == MAPPED)
        if states["free"] + states["mapped"] != len(frames):
            bad.append(f"states do not add up: {states}")
        for n, (base, size) in enumerate(self.nodes):
            free = base + np.flatnonzero(frames["state"][base : base + size] == FREE)
            if sorted(self._free[n]) != free.tolist() or head.watermark[n].free != len(free):
                bad.append(f"node {n}: {len(free)} frames are FREE, the header says {head.watermark[n].free}")
        if (frames[["asid", "refcount", "vpage"]][frames["state"] == FREE] != np.zeros((), frames[["asid", "refcount", "vpage"]].dtype)).any():  # fmt: skip
            bad.append("a FREE frame has an owner")
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
        if sorted([*slots.tolist(), *self._slots]) != list(range(head.slots)) or head.slots_used != len(slots):
            bad.append(f"{len(slots)} pages are in the store, {head.slots_used} of its {head.slots} slots are taken")
        if np.count_nonzero(self.frame_of != GONE) + len(slots) != self.first:
            bad.append(f"{self.first} pages have been touched, {len(mapped) + len(slots)} are left")
        waiting = [pfn for some in self._standby for pfn, barrier, _ in some if self._barrier[pfn] == barrier]
        if sorted({*waiting}) != np.flatnonzero(frames["flags"] & lib.SY_FF_STANDBY).tolist():
            bad.append("what stands by is not what the table says")
        quiet = np.zeros_like(self._quiet)
        quiet[pages] = frames["flags"][mapped] & lib.SY_FF_AGED == 0
        if (quiet != self._quiet).any():
            bad.append("what a touch of a page would do is not what the table says")
        return bad
