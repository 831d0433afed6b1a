"""A simulated enclave: programs (``programs``), and every transaction of the ABI on their memory.

As the gateway does it (phase1() in kernel/native/gateway_server.h, gateway_move.h, gateway_share.h), with these differences: RECLAIM, AGE and
PREFETCH are done at once; nobody has a limit; a magazine's block that a smaller one is wanted of is not split; a stub's answer to MIGRATE, COLLAPSE and
MERGE comes at once, or, with ``prompt=False``, when ``answer()`` is called: what happens between shows in it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import MAX_ORDER
from kernel.abi import lib
from kernel.providers.sim.base import FREE, MAPPED
from kernel.providers.sim.programs import (
    CHUNK,
    GRANTED,
    HUGE,
    LOCK,
    NATIVE,
    NONE,
    ORDERS,
    RESERVED,
    SHARED,
    SHARED_RO,
    SHIFT,
    STATE,
    SWAPPED,
    Programs,
    Space,
    Words,
    in_frame,
    pfns_of,
)

# Of one address space, on the way (gateway.c): pages that move, in how many moves; pages that are merged, in how many merges; and of all.
MOVING_MOST, MOVES_AT_ONCE, SHARING_MOST, SHARES_AT_ONCE, MOVE_RING = 8 * CHUNK, 128, 32 * CHUNK, 768, 1024
NO_FRAME: int = lib.SY_NO_FRAME


@dataclass(frozen=True)
class Op:
    """An operation, as ``struct sy_op``."""

    op: int
    order: int
    asid: int
    pfn: int
    barrier: int
    arg: int


@dataclass(frozen=True)
class Move:
    """What a stub has been told and has not answered: ``n`` pages go to the frames from ``to`` on. They must be in those from ``origin`` on, or
    (NO_FRAME, a COLLAPSE) anywhere, with at most ``most`` untouched. ``share``: a MERGE."""

    asid: int
    vpage: int
    n: int
    to: int
    origin: int
    most: int = 0
    share: bool = False


class Enclave(Programs):
    """:param prompt: stubs answer before ``commit`` returns. Others: see ``Programs``"""

    def __init__(self, *args: Any, prompt: bool = True, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.prompt = prompt
        self.moves: deque[Move] = deque()
        self.moved = self.merged = self.refused = 0  # pages
        self._ops: dict[int, Callable[[Op], int]] = {
            lib.SY_OP_GRANT: self._op_grant, lib.SY_OP_RESERVE: self._op_reserve, lib.SY_OP_RELEASE: self._op_release,
            lib.SY_OP_FAULT_ORDER: self._op_fault_order, lib.SY_OP_COLLAPSE: self._op_collapse, lib.SY_OP_SPLIT: self._op_split,
            lib.SY_OP_MIGRATE: self._op_migrate, lib.SY_OP_MERGE: self._op_merge,
        }  # fmt: skip

    # ---- transactions ----
    def commit(self, ops: NDArray[np.void], component: int = lib.SY_C_KSWAPD) -> NDArray[np.void]:
        done = super().commit(ops, component)
        if self.prompt:
            self.answer()
        return done

    def _commit_one(self, op: np.void, component: int) -> int:
        o = Op(*(int(op[name]) for name in ("op", "order", "asid", "pfn", "barrier", "arg")))
        return self._ops[o.op](o) if o.op in self._ops else int(lib.SY_R_INVALID)

    def _is_block(self, op: Op) -> bool:
        return op.order <= MAX_ORDER and op.pfn % (1 << op.order) == 0 and op.pfn + (1 << op.order) <= len(self.frames)

    def _op_grant(self, op: Op) -> int:
        if not self._is_block(op) or op.order > HUGE:
            return int(lib.SY_R_INVALID)
        s = self.spaces.get(op.asid)
        if s is None:
            return int(lib.SY_R_NOT_FOUND)
        if len(s.ready[op.order]) >= lib.SY_MAG_SLOTS:
            return int(lib.SY_R_FULL)
        if not self._current(op.pfn, op.barrier) or not self._all_free(op.pfn, op.order):
            return int(lib.SY_R_STALE)
        self._isolate(op.pfn, op.order)
        self._zero(op.pfn, op.order)
        self._push(s, op.pfn, op.order)
        return int(lib.SY_R_COMPLETE)

    def _op_reserve(self, op: Op) -> int:
        if not self._is_block(op):
            return int(lib.SY_R_INVALID)
        if not self._current(op.pfn, op.barrier) or not self._all_free(op.pfn, op.order):
            return int(lib.SY_R_STALE)
        self._isolate(op.pfn, op.order)
        self._zero(op.pfn, op.order)
        self._reserve_push(op.pfn, op.order)
        return int(lib.SY_R_COMPLETE)

    def _op_release(self, op: Op) -> int:
        if not self._is_block(op):
            return int(lib.SY_R_INVALID)
        if not self._current(op.pfn, op.barrier):
            return int(lib.SY_R_STALE)
        if op.pfn not in self.reserve[op.order]:
            return int(lib.SY_R_NOT_FOUND)
        self.reserve[op.order].remove(op.pfn)
        pfns = np.arange(op.pfn, op.pfn + (1 << op.order))
        self._release(pfns)
        self._flags[pfns] = lib.SY_FF_ZERO
        return int(lib.SY_R_COMPLETE)

    def _op_fault_order(self, op: Op) -> int:
        default = op.barrier > 0 and op.order == lib.SY_ORDER_DEFAULT
        if op.order > HUGE and not default:
            return int(lib.SY_R_INVALID)
        if op.arg or op.pfn >= lib.SY_CHUNKS or op.barrier > lib.SY_CHUNKS - op.pfn if op.barrier else not op.order <= op.arg <= HUGE:
            return int(lib.SY_R_INVALID)
        s = self.spaces.get(op.asid)
        if s is None:
            return int(lib.SY_R_NOT_FOUND)
        if op.barrier:
            s.chunk_order[op.pfn : op.pfn + op.barrier] = 0 if default else op.order + 1
        else:
            s.fault_order = op.order  # (nobody is seen to touch in sequence: up to where it may grow is all the same)
        return int(lib.SY_R_COMPLETE)

    def _movable(self, pfn: int, n: int) -> Space | None:
        """The address space in which these frames are MAPPED one after the other and may move; None: they are not."""
        if self._state[pfn] != MAPPED:
            return None
        pfns = np.arange(pfn, pfn + n)
        at = self._vpage[pfn] + np.arange(n, dtype=np.uint64)
        same = (self._state[pfns] == MAPPED) & (self._asid[pfns] == self._asid[pfn]) & (self._vpage[pfns] == at)
        return self.spaces[int(self._asid[pfn])] if same.all() and not self._fixed(pfns).any() else None

    def _on_the_way(self, s: Space) -> tuple[int, int]:
        """Pages, moves."""
        mine = [m.n for m in self.moves if m.asid == s.asid]
        return sum(mine), len(mine)

    def _queue_move(self, s: Space, vpage: int, n: int, to: int, origin: int, most: int, node: int, order: int) -> int:
        pages, moves = self._on_the_way(s)
        if pages + n > MOVING_MOST or moves >= MOVES_AT_ONCE or len(self.moves) == MOVE_RING:
            return int(lib.SY_R_BUSY)
        if to == NO_FRAME:
            base, size = self.nodes[node]
            found = self._first_free(order, base, base + size)
            if found is None:
                return int(lib.SY_R_FULL)
            to = found
        elif not self._all_free(to, order):
            return int(lib.SY_R_STALE)
        self._isolate(to, order)
        self._message(lib.SY_MSG_FRAMES_TAKEN, s.asid, to, npages=1 << order, order=order)
        self._grant(s, to, order, lib.SY_FF_TARGET)
        self.moves.append(Move(s.asid, vpage, n, to, origin, most))
        return int(lib.SY_R_COMPLETE)

    def _op_migrate(self, op: Op) -> int:
        n, to = 1 << op.order, NO_FRAME
        if not self._is_block(op):
            return int(lib.SY_R_INVALID)
        if not self._current(op.pfn, op.barrier):
            return int(lib.SY_R_STALE)
        if op.arg & lib.SY_MIGRATE_TO:
            to = op.arg - lib.SY_MIGRATE_TO
            if to % n or to + n > len(self.frames):
                return int(lib.SY_R_INVALID)
        if op.order > HUGE or (to == NO_FRAME and op.arg >= len(self.nodes)):
            return int(lib.SY_R_INVALID)
        s = self._movable(op.pfn, n)
        if s is None or (to == NO_FRAME and op.pfn // self._per == op.arg):
            return int(lib.SY_R_STALE)
        return self._queue_move(s, int(self._vpage[op.pfn]), n, to, op.pfn, 0, op.arg, op.order)

    def _op_collapse(self, op: Op) -> int:
        most = op.arg & 0xFFFF
        if op.order != HUGE or op.pfn >= len(self.frames) or op.arg & ~(lib.SY_COLLAPSE_ADVISED | 0xFFFF) or most >= CHUNK:
            return int(lib.SY_R_INVALID)
        s = self._movable(op.pfn, 1) if self._current(op.pfn, op.barrier) else None
        if s is None:
            return int(lib.SY_R_STALE)
        chunk = int(self._vpage[op.pfn]) // CHUNK
        advised = s.advised(chunk)
        if advised & lib.SY_ADVICE_SMALL or (op.arg & lib.SY_COLLAPSE_ADVISED and not advised & lib.SY_ADVICE_HUGE):
            return int(lib.SY_R_NOT_PERMITTED)
        if s.is_huge(chunk):
            return int(lib.SY_R_STALE)
        return self._queue_move(s, chunk * CHUNK, CHUNK, NO_FRAME, NO_FRAME, most, op.pfn // self._per, HUGE)

    def _op_split(self, op: Op) -> int:
        if op.order >= HUGE or op.pfn >= len(self.frames) or op.arg:
            return int(lib.SY_R_INVALID)
        s = self._movable(op.pfn, 1) if self._current(op.pfn, op.barrier) else None
        chunk = int(self._vpage[op.pfn]) // CHUNK
        if s is None or not s.is_huge(chunk):
            return int(lib.SY_R_STALE)
        s.split[chunk] = True
        return int(lib.SY_R_COMPLETE)

    def _op_merge(self, op: Op) -> int:
        n, to = 1 << op.order, op.arg
        if not self._is_block(op):
            return int(lib.SY_R_INVALID)
        if not self._current(op.pfn, op.barrier):
            return int(lib.SY_R_STALE)
        if op.order > HUGE or to + n > len(self.frames) or 0 < abs(to - op.pfn) < n:
            return int(lib.SY_R_INVALID)
        s = self._movable(op.pfn, n)
        if s is None:
            return int(lib.SY_R_STALE)
        for pfn, target in zip(range(op.pfn, op.pfn + n), range(to, to + n), strict=True):
            flags = int(self._flags[pfn])
            if not flags & lib.SY_FF_MERGEABLE:
                return int(lib.SY_R_NOT_PERMITTED)
            if flags & lib.SY_FF_SHARING:
                return int(lib.SY_R_BUSY)
            if to != op.pfn and (self._state[target] != SHARED or self._asid[target]):  # (what a fork shares may be written again)
                return int(lib.SY_R_STALE)
            if to != op.pfn and self._refcount[target] >= lib.SY_MAX_SHARING:
                return int(lib.SY_R_FULL)
        pages, moves = self._on_the_way(s)
        if pages + n > SHARING_MOST or moves >= SHARES_AT_ONCE or len(self.moves) == MOVE_RING:
            return int(lib.SY_R_BUSY)
        m = Move(s.asid, int(self._vpage[op.pfn]), n, to, op.pfn, share=True)
        for page, _, target in self._shares(m):
            if m.to != m.origin:
                self._hold(target, s.asid, page)  # it stays SHARED meanwhile, whoever else lets go
        self._flags[op.pfn : op.pfn + n] |= lib.SY_FF_SHARING
        self.moves.append(m)
        return int(lib.SY_R_COMPLETE)

    @staticmethod
    def _shares(m: Move) -> list[tuple[int, int, int]]:
        """Of each page of a MERGE: itself, its frame, the frame that it is to share."""
        return [(m.vpage + i, m.origin + i, m.to + i) for i in range(m.n)]

    # ---- what stubs do with it ----
    def answer(self, most: int = MOVE_RING) -> int:
        """Stubs do what they have been told, at most so many moves, and say how it went; number."""
        for done in range(most):
            if not self.moves:
                return done
            m = self.moves.popleft()
            s = self.spaces[m.asid]
            words = s.pte[m.vpage : m.vpage + m.n].copy()
            error = self._refusal(s, m, words)
            kind = lib.SY_MSG_MERGE_REFUSED if m.share else lib.SY_MSG_MOVE_REFUSED
            if error:
                (self._unshare if m.share else self._give_back)(m)
                self.refused += m.n
                self._message(kind, m.asid, m.origin, m.vpage, m.n, m.n.bit_length() - 1, node=0, arg=error)
            elif m.share:
                self._share(s, m)
            else:
                self._move(s, m, words)
        return most

    def _settle(self) -> bool:
        return self.answer() > 0

    def _refusal(self, s: Space, m: Move, words: Words) -> int:
        """Why a stub does not do it, an errno; 0: it does (move_pages() in stub_move.h, share_pages() in stub_share.h)."""
        at, own = slice(m.vpage, m.vpage + m.n), in_frame(words)
        if not s.mapped[at].all() or (words & LOCK).any() or (m.share and not (s.advice[at] & lib.SY_ADVICE_MERGE).all()):
            return errno.EPERM
        if m.origin == NO_FRAME:
            if not (own | (words & STATE == NONE)).all():
                return errno.EAGAIN
        elif not (own & (pfns_of(words) == np.arange(m.origin, m.origin + m.n))).all():
            return errno.EAGAIN
        if m.share:
            return 0 if self._alike(m) else errno.EILSEQ
        return errno.ENODATA if m.n - np.count_nonzero(own) > m.most else 0

    def _alike(self, m: Move) -> bool:
        return bool((self.ram[m.origin : m.origin + m.n] == self.ram[m.to : m.to + m.n]).all())

    def _move(self, s: Space, m: Move, words: Words) -> None:
        own = in_frame(words)
        old = pfns_of(words[own])
        self.ram[m.to : m.to + m.n] = 0
        self._copy_content(old, m.to + np.flatnonzero(own))
        self._map(s, m.vpage, m.to, m.n)
        self._release(old)
        self.moved += m.n
        kind = lib.SY_MSG_PAGE_COLLAPSED if m.origin == NO_FRAME else lib.SY_MSG_PAGE_MIGRATED
        self._message(kind, m.asid, m.to, m.vpage, m.n, m.n.bit_length() - 1, arg=len(old) if m.origin == NO_FRAME else m.origin)

    def _give_back(self, m: Move) -> None:
        self._release(np.arange(m.to, m.to + m.n))

    def _share(self, s: Space, m: Move) -> None:
        for page, pfn, target in self._shares(m):
            if pfn == target:
                self._state[pfn], self._flags[pfn], self._asid[pfn], self._vpage[pfn], self._refcount[pfn] = SHARED, 0, 0, 0, 0
                self._barrier[pfn] += 1
                self.holders[pfn] = []
                self._hold(pfn, s.asid, page)
            s.pte[page] = target << SHIFT | SHARED_RO
        if m.to != m.origin:
            self._release(np.arange(m.origin, m.origin + m.n))
        self.merged += m.n
        self._message(lib.SY_MSG_PAGE_MERGED, m.asid, m.to, m.vpage, m.n, m.n.bit_length() - 1, arg=m.origin)

    def _unshare(self, m: Move) -> None:
        """A MERGE comes to nothing."""
        for _, pfn, _ in self._shares(m):
            if self._state[pfn] == MAPPED and self._asid[pfn] == m.asid:
                self._flags[pfn] &= 0xFF ^ lib.SY_FF_SHARING
        self._drop_pending(m)

    def _drop_pending(self, m: Move) -> None:
        for page, pfn, target in self._shares(m):
            if pfn != target:
                self._let_go(target, m.asid, page)

    def _bury(self, s: Space) -> None:
        for m in [m for m in self.moves if m.asid == s.asid]:
            self.moves.remove(m)  # (the frames that it was to go to are its own)
            if m.share:
                self._drop_pending(m)
        super()._bury(s)

    # ---- invariants ----
    def check(self) -> list[str]:
        return super().check() + self._check_words() + self._check_blocks()

    def _check_words(self) -> list[str]:
        """Who names what. Arrays of words have shape (address spaces, pages)."""
        bad = []
        spaces = list(self.spaces.values())
        pte = np.stack([s.pte for s in spaces]) if spaces else np.zeros((0, self.pages), np.uint64)
        asids = np.array([s.asid for s in spaces], np.int64)
        state, own, at = pte & STATE, in_frame(pte), pfns_of(pte)
        who, page = np.nonzero(own)
        pfn = at[own]
        if (self._state[pfn] != MAPPED).any() or (self._asid[pfn] != asids[who]).any() or (self._vpage[pfn] != page).any():
            bad.append("a page names a frame that does not know of it")
        mapped = self._state == MAPPED
        if (np.bincount(pfn, minlength=len(self.frames)) != mapped).any() or (self._refcount[mapped] != 1).any():
            bad.append("a MAPPED frame is not in exactly one word")
        if ((self._flags[pfn] & lib.SY_FF_AGED != 0) != (state[own] == SWAPPED)).any():
            bad.append("what was taken from sight is not what the table says")
        stored = (state == SWAPPED) & ~own
        who, page = np.nonzero(stored)
        slot = at[stored]
        if (self.slots["asid"][slot] != asids[who]).any() or (self.slots["vpage"][slot] != page).any() or (pte[stored] & LOCK).any():
            bad.append("a page names a slot that is not its own, or is locked and in the store")
        if len(slot) != np.count_nonzero(self.slots["asid"]):
            bad.append("a slot has a page whose word does not name it")
        native = (state == NATIVE).sum(axis=1).tolist()
        if native != [len(s.native) for s in spaces] or any(int(s.pte[page]) & STATE != NATIVE for s in spaces for page in s.native):
            bad.append("what is native is not what words say")
        if any(s.pte[~s.mapped].any() for s in spaces):
            bad.append("there is a page where nothing is mapped")
        shared = state == SHARED_RO
        who, page = np.nonzero(shared)
        pending = [(to, m.asid, page) for m in self.moves if m.share for page, pfn, to in self._shares(m) if pfn != to]
        # frame, address space and page of each that shares it, in one number
        named = np.concatenate([at[shared] << 44 | asids[who] << 24 | page, [to << 44 | asid << 24 | page for to, asid, page in pending]])
        held = [pfn << 44 | asid << 24 | page for pfn, holders in self.holders.items() for asid, page in holders]
        if not np.array_equal(np.sort(named), np.sort(held)):
            bad.append("who shares a frame is not who words, and merges on the way, say")
        pfns = np.flatnonzero(self._state == SHARED)
        if pfns.tolist() != sorted(self.holders) or [len(self.holders[pfn]) for pfn in pfns.tolist()] != self._refcount[pfns].tolist():
            bad.append("a SHARED frame's refcount is not the number of its holders")
        forked = pfns[self._asid[pfns] != 0]
        for pfn, *owner in zip(forked.tolist(), self._asid[forked].tolist(), self._vpage[forked].tolist(), strict=True):
            if len(self.holders[pfn]) < 2 or tuple(owner) not in self.holders[pfn]:
                bad.append(f"frame {pfn} is shared by a fork, and its owner has it not, or is alone")
        if (self._refcount[pfns[self._asid[pfns] == 0]] > lib.SY_MAX_SHARING).any():
            bad.append("a merged frame is shared by too many")
        return bad

    def _check_blocks(self) -> list[str]:
        """What lies ready."""
        bad = []
        ready = [(s.asid, pfn, order) for s in self.spaces.values() for order in ORDERS for pfn in s.ready[order]]
        granted, reserved, target = (np.zeros(len(self.frames), np.uint32) for _ in range(3))
        for asid, pfn, order in ready:
            granted[pfn : pfn + (1 << order)] = asid
        for m in self.moves:
            if not m.share:
                target[m.to : m.to + m.n] = m.asid
        for order, pfns in enumerate(self.reserve):
            for pfn in pfns:
                reserved[pfn : pfn + (1 << order)] = 1
        if (np.where(self._state == GRANTED, self._asid, 0) != granted + target).any():
            bad.append("what is GRANTED is in no magazine, or in another")
        if ((self._flags & lib.SY_FF_TARGET != 0) != (target != 0)).any():
            bad.append("what a page is to move to is not what the table says")
        if ((self._state == RESERVED) != (reserved != 0)).any() or self._asid[self._state == RESERVED].any():
            bad.append("what is RESERVED is not in the reserve, or somebody's")
        clean = (granted != 0) | (reserved != 0) | ((self._state == FREE) & (self._flags & lib.SY_FF_ZERO != 0))
        if self.ram[clean].any():
            bad.append("a frame that is zero is not")
        return bad
