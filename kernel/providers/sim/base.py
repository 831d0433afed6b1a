"""What all simulated machines have: frames, zones, the store's slots, events, and kswapd's transactions."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import FRAME_STATES, frames_by_state
from kernel.abi import FRAME_DTYPE, HEAT_DTYPE, MSG_DTYPE, STORED_DTYPE, ffi, lib

FREE, MAPPED = FRAME_STATES["free"], FRAME_STATES["mapped"]
BY_ITSELF = (
    1024  # frames that the gateway reclaims at once when none is free, at most (refill_urgent in gateway_server.h)
)
STANDBY_MOST = 32768  # frames of a zone that stand by, at most (STANDBY_RING in gateway.c)
NOTHING = np.zeros((), FRAME_DTYPE)
# Which components may do what (permitted() in gateway_server.h); what is not named is INVALID for all.
MAY: dict[int, set[int]] = {
    lib.SY_OP_GRANT: {lib.SY_C_BUDDY}, lib.SY_OP_RESERVE: {lib.SY_C_BUDDY}, lib.SY_OP_RELEASE: {lib.SY_C_BUDDY},
    lib.SY_OP_RECLAIM: {lib.SY_C_KSWAPD}, lib.SY_OP_PREFETCH: {lib.SY_C_KSWAPD}, lib.SY_OP_AGE: {lib.SY_C_KSWAPD, lib.SY_C_AUTONUMA},
    lib.SY_OP_FAULT_ORDER: {lib.SY_C_THP}, lib.SY_OP_COLLAPSE: {lib.SY_C_THP}, lib.SY_OP_SPLIT: {lib.SY_C_THP},
    lib.SY_OP_MERGE: {lib.SY_C_KSM}, lib.SY_OP_MIGRATE: {lib.SY_C_AUTONUMA, lib.SY_C_BUDDY}, lib.SY_OP_RUN: {lib.SY_C_SCHED},
}  # fmt: skip


class Base:
    """Who has a frame, where its content goes, and what a program notices of it a subclass knows.

    :param frames: RAM, a multiple of ``nodes``
    :param slots: of the store
    :param least: frames that a node must have
    :raises ValueError: fewer on a node, or not the same number on each
    """

    def __init__(self, frames: int, nodes: int, slots: int, least: int) -> None:
        per = frames // nodes if nodes > 0 else 0
        if per < least or frames % nodes or not 1 <= nodes <= lib.SY_MAX_NODES:
            raise ValueError(f"{frames} frames on {nodes} nodes: give each of 1 to {lib.SY_MAX_NODES} nodes the same, at least {least}")  # fmt: skip
        self.frames: NDArray[np.void] = np.zeros(frames, FRAME_DTYPE)
        self.nodes = [(n * per, per) for n in range(nodes)]
        self.frames["state"], self.frames["flags"] = FREE, lib.SY_FF_ZERO
        # Views of its columns: a touch looks at one frame, and a column is quicker to find once.
        self._state, self._flags, self._vpage, self._barrier, self._asid, self._refcount = (
            self.frames[name] for name in ("state", "flags", "vpage", "barrier", "asid", "refcount")
        )
        self._per = per
        self.frames["node"] = np.repeat(np.arange(nodes), per)
        self.header: Any = ffi.new("struct sy_header *")
        head = self.header
        head.magic, head.abi, head.nodes, head.frames, head.populated = lib.SY_MAGIC, lib.SY_ABI_VERSION, nodes, frames, frames  # fmt: skip
        head.slots = slots
        for n, (base, size) in enumerate(self.nodes):
            head.node[n].base, head.node[n].frames = base, size
            mark = head.watermark[n]
            # As the gateway sets them, but never so small that they are one.
            mark.min, mark.low, mark.high, mark.free = max(1, per // 128), max(2, per // 64), max(4, per // 32), per
        self.now = 0.0  # seconds
        self.heat: NDArray[np.void] = np.zeros(frames, HEAT_DTYPE)
        self.slots: NDArray[np.void] = np.zeros(slots, STORED_DTYPE)
        self._slots = list(range(slots - 1, -1, -1))
        self._told = [2] * nodes  # arg of the last WATERMARK
        # What kswapd has chosen to leave, in order: (pfn, its barrier then, was it AGED).
        self._standby: list[deque[tuple[int, int, bool]]] = [deque() for _ in range(nodes)]
        self._reclaiming = [False] * nodes
        self._hand = 0
        self._events: list[tuple[int, ...]] = []
        self._seqnum = 0
        self.refaults = self.hints = self.swapped_out = self.by_gateway = self.prefetched = 0

    # ---- what a subclass knows ----
    def _freed(self, pfns: NDArray[np.int64]) -> None:
        """Frames are FREE."""

    def _left(self, pfns: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """The pages in these frames, which are theirs no more in a moment, are in these slots."""
        raise NotImplementedError

    def _taken_from_sight(self, pfns: NDArray[np.int64]) -> None:
        """The next touch of the pages in these frames shows."""
        raise NotImplementedError

    def _fixed(self, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these frames, MAPPED, hold pages that must not leave, shape of ``pfns``."""
        return np.zeros(pfns.shape, np.bool_)

    def _knows(self, asid: int) -> bool:
        """Is there such an address space?"""
        raise NotImplementedError

    def _bring(self, asid: int, vpage: int, node: int) -> None:
        """A page that is in the store comes back to a node, where there are FREE frames, as PAGE_PREFETCHED."""
        raise NotImplementedError

    def _commit_one(self, op: np.void, component: int) -> int:
        """An operation that is not kswapd's, and that the component may do; its result."""
        return int(lib.SY_R_INVALID)

    # ---- frames and slots ----
    def _make_free(self, pfns: NDArray[np.int64]) -> None:
        for name in ("state", "flags", "refcount", "asid", "vpage"):
            self.frames[name][pfns] = FREE if name == "state" else 0
        self._barrier[pfns] += 1
        self.heat[pfns] = np.zeros((), HEAT_DTYPE)
        self._freed(pfns)
        for node, more in enumerate(np.bincount(pfns // self._per).tolist()):
            if more:
                self._zone_free(node, more)

    def _zone_free(self, node: int, more: int) -> None:
        """A node has so many more frames FREE; WATERMARK if it has crossed one (zone_free in gateway.c)."""
        mark = self.header.watermark[node]
        mark.free = free = mark.free + more
        level = 0 if free < mark.min else 1 if free < mark.low else 2
        if (self._told[node] != 2 and free >= mark.high) if level == 2 else level < self._told[node]:
            self._told[node] = level
            self._message(lib.SY_MSG_WATERMARK, npages=free, node=node, arg=level)

    def _free_slot(self, slot: int) -> None:
        self.slots[slot] = np.zeros((), STORED_DTYPE)
        self._slots.append(slot)
        self.header.slots_used -= 1

    # ---- what leaves ----
    def _hand_takes(self, want: int) -> NDArray[np.int64]:
        """The gateway by itself: so many frames under the hand, round and round, as far as there are slots (reclaim_some)."""
        around = np.flatnonzero(self._state == MAPPED)
        around = around[~self._fixed(around)]
        around = np.roll(around, -int(np.searchsorted(around, self._hand)))[: min(want, BY_ITSELF, len(self._slots))]
        if len(around):
            self._hand = int(around[-1]) + 1
            self.by_gateway += len(around)
            self._evict(around)
        return around

    def _evict(self, pfns: NDArray[np.int64]) -> None:
        """MAPPED frames, for each of which there is a slot, become FREE."""
        slots = np.array([self._slots.pop() for _ in range(len(pfns))])
        asids, vpages = self._asid[pfns], self._vpage[pfns]
        self.slots["asid"][slots], self.slots["vpage"][slots] = asids, vpages
        self.slots["out"][slots] = self.swapped_out + np.arange(len(pfns))
        self.swapped_out += len(pfns)
        self.header.slots_used += len(pfns)
        self._left(pfns, slots)
        for pfn, asid, vpage, slot in zip(pfns.tolist(), asids.tolist(), vpages.tolist(), slots.tolist(), strict=True):
            node = pfn // self._per
            self._events.append((lib.SY_MSG_PAGE_SWAPPED, asid, pfn, vpage, 1, 0, node, slot))
            self._events.append((lib.SY_MSG_PAGE_FREED, 0, pfn, 0, 1, 0, node, 0))
        self._make_free(pfns)

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
            if (not aged or self._flags[pfn] & lib.SY_FF_AGED) and not self._fixed(np.array([pfn]))[0]:
                leaving.append(pfn)
        mark.standby = len(waiting)
        if leaving:
            self._evict(np.array(leaving))
        if mark.free >= mark.high:
            self._reclaiming[node] = False
        return bool(leaving)

    # ---- transactions ----
    def commit(self, ops: NDArray[np.void], component: int = lib.SY_C_KSWAPD) -> NDArray[np.void]:
        """Operations of a component, shape (n,), OP_DTYPE, carried out one after the other; the same with their results."""
        ops = ops.copy()
        kind = ops["op"].astype(np.int64) << 17 | ops["order"] << 1 | (self._low_word(ops["arg"]) == lib.SY_RECLAIM_STANDBY)
        ends = [*(np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist(), len(ops)]
        for start, end in pairwise([0, *ends]):
            if end > start:
                ops["result"][start:end] = self._commit_run(ops[start:end], component)
        for node in range(len(self.nodes)):
            self._relieve(node)
        return ops

    @staticmethod
    def _low_word(arg: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return np.asarray(arg & np.uint64(0xFFFFFFFF))

    def _permitted(self, op: int, component: int) -> int:
        return int(lib.SY_R_INVALID if op not in MAY else lib.SY_R_COMPLETE if component in MAY[op] else lib.SY_R_NOT_PERMITTED)

    def _current(self, pfns: Any, barriers: Any) -> Any:
        """Are these the barriers of the frames now? Numbers, or arrays of them."""
        return self._barrier[pfns] == barriers

    def _commit_run(self, ops: NDArray[np.void], component: int) -> NDArray[np.uint32]:
        """Operations of one kind and order; their results, shape (n,)."""
        op, order = int(ops["op"][0]), int(ops["order"][0])
        result = np.full(len(ops), self._permitted(op, component), np.uint32)
        if result[0] != lib.SY_R_COMPLETE:
            return result
        result[:] = lib.SY_R_INVALID
        if op == lib.SY_OP_PREFETCH and not order:
            return np.array([self._prefetch(*(int(o[name]) for name in ("pfn", "barrier", "asid", "arg"))) for o in ops], np.uint32)
        if op not in (lib.SY_OP_RECLAIM, lib.SY_OP_AGE):
            return np.array([self._commit_one(o, component) for o in ops], np.uint32)
        if order > lib.SY_MAX_ORDER:
            return result
        n, pfn = 1 << order, ops["pfn"].astype(np.int64)
        at = np.flatnonzero((pfn % n == 0) & (pfn + n <= len(self.frames)))
        result[at] = lib.SY_R_STALE
        at = at[self._current(pfn[at], ops["barrier"][at])]
        if op == lib.SY_OP_RECLAIM and not self.header.slots:
            result[at] = lib.SY_R_FULL
            return result
        if (pfn[at][1:] <= pfn[at][:-1]).any():  # named twice, the second is too late
            at = np.sort(at[np.unique(pfn[at], return_index=True)[1]])
        if op == lib.SY_OP_RECLAIM and self._low_word(ops["arg"][:1])[0] == lib.SY_RECLAIM_STANDBY:
            result[at] = self._stand_by(pfn[at, None] + np.arange(n), ops["arg"][at] >> np.uint64(lib.SY_RECLAIM_ZONE_SHIFT))
            return result
        at = at[self._whole(pfn[at, None] + np.arange(n), op)]
        if op == lib.SY_OP_RECLAIM:
            room = len(self._slots) >> order
            result[at[room:]] = lib.SY_R_FULL
            at = at[:room]
        result[at] = lib.SY_R_COMPLETE
        chosen = (pfn[at, None] + np.arange(n)).ravel()
        if op == lib.SY_OP_AGE:
            self._flags[chosen] |= lib.SY_FF_AGED
            self._taken_from_sight(chosen)
        elif len(chosen):
            self._evict(chosen)
        return result

    def _prefetch(self, slot: int, out: int, asid: int, vpage: int) -> int:
        """The page in a slot comes back (prefetch() in gateway_heat.h). The result."""
        if slot >= len(self.slots) or vpage >= lib.SY_ARENA_PAGES:
            return int(lib.SY_R_INVALID)
        if not self._knows(asid):
            return int(lib.SY_R_NOT_FOUND)
        if self.slots[slot].tolist()[:3] != (asid, vpage, out):
            return int(lib.SY_R_STALE)
        marks = [self.header.watermark[n] for n in range(len(self.nodes))]
        node = max(range(len(marks)), key=lambda n: int(marks[n].free) - int(marks[n].low))
        if marks[node].free <= marks[node].low:
            return int(lib.SY_R_FULL)
        self.prefetched += 1
        self._bring(asid, vpage, node)
        return int(lib.SY_R_COMPLETE)

    def _stand_by(self, blocks: NDArray[np.int64], zones: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """Blocks, shape (k, n), are to leave when memory is short in a zone each (stand_by() in gateway_swap.h). The results, shape (k,)."""
        limit = (zones >= lib.SY_MAX_NODES) & (zones < lib.SY_MAX_ZONES)  # (nobody has one here)
        result = np.where((zones < len(self.nodes)) | limit, lib.SY_R_STALE, lib.SY_R_INVALID).astype(np.uint32)
        can = ((self._state[blocks] == MAPPED) & (self._flags[blocks] & lib.SY_FF_STANDBY == 0)).all(axis=1)
        for node, waiting in enumerate(self._standby):
            at = np.flatnonzero(can & (zones == node) & (blocks[:, 0] // self._per == node))
            room = (STANDBY_MOST - len(waiting)) // blocks.shape[1]
            result[at[:room]], result[at[room:]] = lib.SY_R_COMPLETE, lib.SY_R_FULL
            pfns = blocks[at[:room]].ravel()
            aged = self._flags[pfns] & lib.SY_FF_AGED != 0
            self._flags[pfns] |= lib.SY_FF_STANDBY
            waiting.extend(zip(pfns.tolist(), self._barrier[pfns].tolist(), aged.tolist(), strict=True))
            self.header.watermark[node].standby = len(waiting)
        return result

    def _whole(self, blocks: NDArray[np.int64], op: int) -> NDArray[np.bool_]:
        """Which blocks, shape (k, n), are MAPPED one page after the other in one address space, free to leave, and not AGED already if they
        are to be (take_run)."""
        vpages, asids = self._vpage[blocks], self._asid[blocks]
        whole = (self._state[blocks] == MAPPED) & (asids == asids[:, :1])
        whole &= vpages == vpages[:, :1] + np.arange(blocks.shape[1], dtype=np.uint64)
        if op == lib.SY_OP_AGE:
            whole &= self._flags[blocks] & lib.SY_FF_AGED == 0
        whole[whole] = ~self._fixed(blocks[whole])
        return np.asarray(whole.all(axis=1))

    # ---- what is told ----
    def _message(
        self, kind: int, asid: int = 0, pfn: int = 0, vpage: int = 0, npages: int = 1, order: int = 0, node: int = -1, arg: int = 0
    ) -> None:  # fmt: skip
        """``node``: of the frame, by default."""
        self._events.append((kind, asid, pfn, vpage, npages, order, pfn // self._per if node < 0 else node, arg))

    def events(self) -> NDArray[np.void]:
        """What has happened since the last call, shape (n,), MSG_DTYPE, numbered without a gap."""
        out = np.zeros(len(self._events), MSG_DTYPE)
        if self._events:
            columns = zip(*self._events, strict=True)
            for name, column in zip(("type", "asid", "pfn", "vpage", "npages", "order", "node", "arg"), columns, strict=True):
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
        if sum(states.values()) != 2 * len(frames):  # (the total is among them)
            bad.append(f"states do not add up: {states}")
        for n, (base, size) in enumerate(self.nodes):
            free = int(np.count_nonzero(self._state[base : base + size] == FREE))
            if head.watermark[n].free != free:
                bad.append(f"node {n}: {free} frames are FREE, the header says {head.watermark[n].free}")
        owned = self._asid.astype(np.bool_) | self._refcount.astype(np.bool_) | self._vpage.astype(np.bool_)
        if (owned & (self._state == FREE)).any():
            bad.append("a FREE frame has an owner")
        waiting = [pfn for some in self._standby for pfn, barrier, _ in some if self._barrier[pfn] == barrier]
        if sorted({*waiting}) != np.flatnonzero(self._flags & lib.SY_FF_STANDBY).tolist():
            bad.append("what stands by is not what the table says")
        used = np.flatnonzero(self.slots["asid"])
        if sorted([*used.tolist(), *self._slots]) != list(range(head.slots)) or head.slots_used != len(used):
            bad.append(f"{len(used)} slots have a page, {head.slots_used} of {head.slots} are taken")
        return bad
