"""When to refill what: the part that the policies of buddy share.

Every address space has a magazine, a ring of blocks per order, from which its stub takes at a page fault without asking
anybody. A stub says MAGAZINE_LOW once a ring falls below its low mark, and not again until it has been refilled. The
answer is GRANT up to a target, which is learnt: an order that runs low again soon gets twice as much next time, one
that does not falls back to where it began. The gateway's reserve, from which it serves those who could not wait, is
filled likewise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy, Transaction
from bus.tables import MAX_ORDER, REGION
from components.buddy.free_map import FreeMap
from kernel.abi import lib, names

RESULTS = names("SY_R_")

# Blocks with which a magazine begins, by order; orders not named begin with START_OTHER. Twice what the gateway itself
# gives a new address space, or of the low mark, so that the first MAGAZINE_LOW is already answered with more.
START = {0: 32, 4: 32, 9: 8}
START_OTHER = 4
# A magazine never holds more than 128 blocks of order 9, nor more blocks than its ring has room for.
MOST_FRAMES = 128 << lib.SY_HUGE_ORDER
# No single refill takes more than this part of what is free: the last memory is shared, not given to who asks first.
SHARE = 8
QUICK = 1.0  # seconds: low again within this time, the target doubles
SLOW = 5.0  # seconds: for each that it was not low, the target halves


def start_target(order: int) -> int:
    """Blocks that a magazine of ``order`` is first filled to."""
    return START.get(order, START_OTHER)


def most(order: int) -> int:
    """Blocks that a magazine of ``order`` is filled to at most."""
    return int(min(lib.SY_MAG_SLOTS, MOST_FRAMES >> order))


def reserve_targets(frames: int) -> list[int]:
    """Blocks per order 0..10 that the gateway should hold: enough for a burst of urgent refills of each kind of fault.

    :param frames: frames of the enclave
    """
    targets = [0] * (MAX_ORDER + 1)
    targets[0] = 128
    targets[4] = 64
    targets[lib.SY_HUGE_ORDER] = max(4, frames // 16 >> lib.SY_HUGE_ORDER)
    return targets


def _by_magazine(entries: NDArray[np.void]) -> list[tuple[int, int, int]]:
    """(asid, order, how many) of operations or frames."""
    keys, counts = np.unique(entries["asid"].astype(np.int64) << 8 | entries["order"], return_counts=True)
    return [(key >> 8, key & 255, count) for key, count in zip(keys.tolist(), counts.tolist(), strict=True)]


class Magazine:
    """What is known of one ring: ``target`` in blocks, ``low_at`` = when it was last low, ``short`` = blocks still
    owed, ``put`` = blocks that were ever put into the ring, as far as we know,
    ``answered`` = something was put in since it was last low."""

    __slots__ = ("answered", "low_at", "node", "put", "short", "target")

    def __init__(self, order: int) -> None:
        self.target = start_target(order)
        self.low_at = float("-inf")
        self.answered = True
        self.node = 0
        self.put = 0
        self.short = 0


class RefillPolicy(BasePolicy):
    """Keeps magazines and reserve filled from whatever allocator a subclass names."""

    allocator_class: type[FreeMap]

    def __init__(
        self, frames: NDArray[np.void], header: Any, nodes: list[tuple[int, int]], txn: Transaction, now: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        super().__init__(frames, header, nodes, txn, now)
        self.clock = now
        self.allocator = self.allocator_class(frames, nodes)
        self.magazines: dict[tuple[int, int], Magazine] = {}  # by (asid, order)
        self._owed: set[tuple[int, int]] = set()  # magazines whose ``short`` is not 0
        self._targets = reserve_targets(len(frames))
        self._reserve = [0] * (MAX_ORDER + 1)  # blocks, as far as we were told
        self._more_free = True  # something may have become free since we last found too little
        self.rebuild_seconds = 0.0
        self.grants = 0
        self.granted = [0] * (MAX_ORDER + 1)  # blocks, by order
        self.refused: dict[str, int] = {}  # by result

    def words(self) -> dict[str, list[int]]:
        return {"reserve": self._targets}

    # ---- from the tables ----
    def rebuild(self) -> None:
        """Free blocks, magazine levels and the reserve, from the frame table; a 16 GiB table takes well under a
        second."""
        began = time.monotonic()
        self.allocator.load()
        self.magazines.clear()
        self._owed.clear()
        self._more_free = True
        state = np.ascontiguousarray(self.frames["state"])
        held = self.frames["order"][state == lib.SY_FRAME_RESERVED]
        frames_held = np.bincount(held, minlength=MAX_ORDER + 1).tolist()
        self._reserve = [frames_held[order] >> order for order in range(MAX_ORDER + 1)]

        # The MAGAZINE_LOW that came while nobody listened is not sent again, so look who is low. An order without a
        # single granted block does not show here; those that every program uses are filled all the same.
        granted = self.frames[state == lib.SY_FRAME_GRANTED]
        level = {(asid, order): frames >> order for asid, order, frames in _by_magazine(granted)}
        for asid in np.unique(self.frames["asid"][state == lib.SY_FRAME_MAPPED]).tolist():
            level.setdefault((asid, 0), 0)
            level.setdefault((asid, 4), 0)
        for (asid, order), blocks in level.items():
            if asid and blocks < start_target(order) // 2:
                self._owe(asid, order, start_target(order) - blocks)
        self.rebuild_seconds = time.monotonic() - began

    # ---- messages ----
    def page_freed(self, events: NDArray[np.void]) -> None:
        """Frames came back: programs unmapped them or ended."""
        self._look(events["pfn"], events["npages"])

    frames_online = page_freed
    frames_taken = page_freed

    def mm_new(self, events: NDArray[np.void]) -> None:
        """A new address space: the gateway gave it its first blocks; whatever had its number before is forgotten."""
        self._forget(events["asid"].tolist())

    mm_exit = mm_new

    def magazine_low(self, events: NDArray[np.void]) -> None:
        """A ring fell below its mark."""
        now = self.clock()
        columns = (events[name].tolist() for name in ("asid", "order", "npages", "node", "arg"))
        for asid, order, level, node, consumed in zip(*columns, strict=True):
            if not asid or order > lib.SY_HUGE_ORDER:  # magazines have no ring for order 10
                continue
            magazine = self.magazines.setdefault((asid, order), Magazine(order))
            # While we put in many blocks, the first of them already allow the stub to say again that it is low: told
            # before our refill was complete, read after. Count what has come since, or each refill is made twice.
            since_told = magazine.put - consumed - level
            if 0 < since_told <= lib.SY_MAG_SLOTS:
                level += since_told
            else:
                magazine.put = consumed + level
            since = now - magazine.low_at
            if not magazine.answered:
                pass  # said again before we could answer
            elif since < QUICK:
                magazine.target = min(magazine.target * 2, most(order))
            elif magazine.target > start_target(order):
                magazine.target = max(magazine.target >> min(int(since / SLOW), 32), start_target(order))
            magazine.answered = False
            magazine.low_at = now
            magazine.node = node if node < len(self.nodes) else 0
            self._owe(asid, order, magazine.target - level)

    def reserve_low(self, events: NDArray[np.void]) -> None:
        """The gateway used up half of its reserve of an order."""
        for order, level in zip(events["order"].tolist(), events["npages"].tolist(), strict=True):
            if order <= MAX_ORDER:
                self._reserve[order] = level
                self._more_free = True

    # ---- decisions ----
    def step(self) -> None:
        for key in sorted(self._owed, key=lambda key: key[1]):
            self._refill(*key)
        # Without this, a reserve that cannot be filled would be tried again at every step.
        if self._more_free:
            self._more_free = False
            self._fill_reserve()

    def _refill(self, asid: int, order: int) -> None:
        magazine = self.magazines[asid, order]
        limit = max(1, self.allocator.free_frames // SHARE >> order)
        pfns = self._take(order, min(magazine.short, limit), magazine.node)
        if pfns.size:
            # Less than wanted is an answer too: the stub will say when it is low again.
            self._settle(asid, order)
            self.txn.grant(asid, pfns, order)

    def _fill_reserve(self) -> None:
        for order, target in enumerate(self._targets):
            short = min(target - self._reserve[order], self.allocator.free_frames // SHARE >> order)
            for node in range(len(self.nodes)):  # each holds its part
                part = (short + node) // len(self.nodes)
                pfns = self._take(order, part, node)
                if pfns.size:
                    self.txn.reserve(pfns, order)

    def _take(self, order: int, count: int, node: int) -> NDArray[np.int64]:
        """Blocks from ``node``, and what it does not have from the others."""
        parts = [np.zeros(0, np.int64)]
        for offset in range(len(self.nodes)):
            if count <= 0:
                break
            part = self.allocator.take(order, count, (node + offset) % len(self.nodes))
            parts.append(part)
            count -= len(part)
        return np.concatenate(parts)

    def result(self, ops: NDArray[np.void]) -> None:
        done = ops["result"] == lib.SY_R_COMPLETE
        reserved = ops[done & (ops["op"] == lib.SY_OP_RESERVE)]["order"]
        for order, blocks in enumerate(np.bincount(reserved, minlength=MAX_ORDER + 1).tolist()):
            self._reserve[order] += blocks
        granted = ops[done & (ops["op"] == lib.SY_OP_GRANT)]
        self.grants += len(granted)
        for asid, order, blocks in _by_magazine(granted):
            self.granted[order] += blocks
            if (asid, order) in self.magazines:
                self.magazines[asid, order].put += blocks
                self.magazines[asid, order].answered = True
        if done.all():
            return
        failed = ops[~done]
        for result, count in enumerate(np.bincount(failed["result"]).tolist()):
            if count:
                name = RESULTS.get(result, str(result))
                self.refused[name] = self.refused.get(name, 0) + count
        # Somebody was faster in that region, or it is not what we believe: look at all of it again.
        self._look(failed["pfn"] // REGION * REGION, np.full(len(failed), REGION))
        grants = failed[failed["op"] == lib.SY_OP_GRANT]
        self._forget(grants["asid"][grants["result"] == lib.SY_R_NOT_FOUND].tolist())
        for asid, order, blocks in _by_magazine(grants[grants["result"] == lib.SY_R_STALE]):
            self._owe(asid, order, blocks)

    def dump(self) -> dict[str, Any]:
        busiest = sorted(self.magazines.items(), key=lambda item: -item[1].low_at)[:32]
        return {
            "free_frames": self.allocator.free_frames,
            "reserve": self._reserve,
            "targets": {f"{asid}/{order}": magazine.target for (asid, order), magazine in busiest},
            "granted": self.granted,
            "owed": len(self._owed),
            "grants": self.grants,
            "refused": self.refused,
            "rebuild_ms": round(self.rebuild_seconds * 1000, 1),
        }

    # ---- bookkeeping ----
    def _look(self, pfns: NDArray[np.void], npages: NDArray[np.void]) -> None:
        self.allocator.look(pfns, npages)
        self._more_free = True

    def _owe(self, asid: int, order: int, blocks: int) -> None:
        if blocks > 0:
            self.magazines.setdefault((asid, order), Magazine(order)).short = blocks
            self._owed.add((asid, order))

    def _settle(self, asid: int, order: int) -> None:
        self.magazines[asid, order].short = 0
        self._owed.discard((asid, order))

    def _forget(self, asids: list[int]) -> None:
        gone = set(asids)
        for key in [key for key in self.magazines if key[0] in gone]:
            del self.magazines[key]
            self._owed.discard(key)
