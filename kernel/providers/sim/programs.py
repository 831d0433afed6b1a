"""Programs on a simulated machine: address spaces with page-table words and contents, magazines, faults, memory calls, fork, exec, death.

As stub and gateway do it between them (kernel/native/stub_*.h, gateway.c), in one step each: no word is ever LOCKED, and who waits for a frame has
it, or has ended, when the call returns. A page's content is a row of ``words`` numbers, of which programs write the first.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bus.tables import FRAME_STATES, MAX_ORDER, REGION
from kernel.abi import lib
from kernel.providers.sim.base import FREE, MAPPED, Base

GRANTED, ISOLATED, SHARED, RESERVED = (FRAME_STATES[name] for name in ("granted", "isolated", "shared", "reserved"))
NONE, PRESENT, SWAPPED, SHARED_RO, NATIVE = (
    lib.SY_PTE_NONE, lib.SY_PTE_PRESENT, lib.SY_PTE_SWAPPED, lib.SY_PTE_SHARED_RO, lib.SY_PTE_NATIVE
)  # fmt: skip
STATE, SHIFT, LOCK = lib.SY_PTE_STATE_MASK, lib.SY_PTE_PFN_SHIFT, lib.SY_PTE_MLOCKED
AGED = SWAPPED | lib.SY_PTE_HASFRAME  # a word's state when AGE has taken the page away
CHUNK: int = lib.SY_CHUNK_PAGES
HUGE: int = lib.SY_HUGE_ORDER
ORDERS = range(HUGE + 1)
AT_ONCE = 64  # frames that the gateway reclaims when none is left; more would empty a small machine
LOW = {0: 8, 4: 4}  # blocks of a magazine at which it is low, by order; of others: none
ALL = (1 << 64) - 1
Words = NDArray[np.uint64]
Pages = NDArray[np.int64]


class NotMapped(Exception):
    """A program touches what it has not mapped: SIGSEGV."""


class Killed(Exception):
    """No frame, no slot, and the program that wants one is the one with the most frames."""


def pfns_of(words: Words) -> Pages:
    """The frames, or slots, that words name."""
    return (words >> SHIFT).astype(np.int64)


def in_frame(words: Words) -> NDArray[np.bool_]:
    """Which pages have a frame of their own."""
    return (words & STATE == PRESENT) | (words & (STATE | lib.SY_PTE_HASFRAME) == AGED)


def runs(pfns: Pages) -> Iterator[tuple[int, int]]:
    """(first, how many) of numbers in a row."""
    if len(pfns):
        cuts = np.flatnonzero(np.diff(pfns) != 1) + 1
        for start, end in pairwise([0, *cuts.tolist(), len(pfns)]):
            yield int(pfns[start]), end - start


@dataclass
class Space:
    """One address space; of its arena the first ``pages``. Arrays have that shape unless it is said otherwise."""

    asid: int
    pid: int
    cpu: int  # that it runs on
    pages: int
    fault_order: int
    pte: Words = field(init=False)
    mapped: NDArray[np.bool_] = field(init=False)  # by the program, touched or not
    advice: NDArray[np.uint8] = field(init=False)  # what the program said of each page, enum sy_advice
    split: NDArray[np.bool_] = field(init=False)  # shape (chunks,): SPLIT, and not one mapping since
    chunk_order: NDArray[np.uint8] = field(init=False)  # shape (chunks,): as in struct sy_mag
    native: dict[int, Words] = field(default_factory=dict)  # contents of NATIVE pages
    ready: list[deque[int]] = field(default_factory=lambda: [deque() for _ in ORDERS])  # the magazine: blocks of each order
    consumed: list[int] = field(default_factory=lambda: [0 for _ in ORDERS])
    told_low: set[int] = field(default_factory=set)  # orders

    def __post_init__(self) -> None:
        self.pte, self.advice = np.zeros(self.pages, np.uint64), np.zeros(self.pages, np.uint8)
        self.mapped = np.zeros(self.pages, np.bool_)
        self.split, self.chunk_order = np.zeros(self.pages // CHUNK, np.bool_), np.zeros(self.pages // CHUNK, np.uint8)

    def advised(self, chunk: int) -> int:
        """Bits of enum sy_advice, as the stub keeps them for a chunk."""
        of = self.advice[chunk * CHUNK : (chunk + 1) * CHUNK]
        return int(np.bitwise_or.reduce(of)) & ~lib.SY_ADVICE_HUGE | int(np.bitwise_and.reduce(of)) & lib.SY_ADVICE_HUGE

    def locked(self) -> NDArray[np.bool_]:
        return self.pte & LOCK != 0

    def in_one_block(self, chunk: int) -> bool:
        """Are its pages in a block, so that one mapping has them all?"""
        words = self.pte[chunk * CHUNK : (chunk + 1) * CHUNK]
        pfns = pfns_of(words)
        return bool(pfns[0] % CHUNK == 0 and (words & STATE == PRESENT).all() and (np.diff(pfns) == 1).all())

    def is_huge(self, chunk: int) -> bool:
        """Is it mapped by one entry?"""
        return not self.split[chunk] and self.in_one_block(chunk)


class Programs(Base):
    """
    :param frames: RAM, a multiple of ``nodes``; of each node whole regions, as live
    :param slots: of the store
    :param pages: of each address space, whole chunks
    :param words: numbers that a page's content has; with 512 it has a page's size
    :param oom: enum sy_oom, what comes when nothing is left
    :raises ValueError: numbers that do not go together
    """

    def __init__(
        self, frames: int, nodes: int = 1, slots: int = 0, pages: int = 4 * CHUNK, words: int = 1, oom: int = lib.SY_OOM_KILL
    ) -> None:  # fmt: skip
        super().__init__(frames, nodes, slots, REGION)
        if self._per % REGION or pages % CHUNK or not 0 < pages <= lib.SY_ARENA_PAGES:
            raise ValueError(f"{self._per} frames a node, {pages} pages: give whole regions of {REGION} and whole chunks of {CHUNK}")
        self.pages = pages
        self.header.oom = oom
        self.header.default_fault_order = self.header.default_fault_order_max = 4
        for cpu in range(nodes):
            self.header.cpu_node[cpu] = cpu
        self.ram = np.zeros((frames, words), np.uint64)  # content of each frame
        self.store = np.zeros((slots, words), np.uint64)  # … and slot
        self.spaces: dict[int, Space] = {}
        self.holders: dict[int, list[tuple[int, int]]] = {}  # of each SHARED frame: (asid, page)
        self.reserve: list[list[int]] = [[] for _ in range(MAX_ORDER + 1)]  # blocks
        self.reserve_targets = [0] * (MAX_ORDER + 1)
        self._reserve_told: set[int] = set()
        self._last_asid, self._last_pid = 0, 999
        self.cows = self.first = 0

    # ---- what programs do ----
    def start(self, cpu: int = 0) -> int:
        """A new program; its address space."""
        self._last_pid += 1
        s = self._new_space(self._last_pid, cpu)
        self._message(lib.SY_MSG_MM_NEW, s.asid, arg=s.pid)
        return s.asid

    def read(self, asid: int, first: int, n: int = 1) -> Words:
        """What is in pages, shape (n,). :raises NotMapped, Killed: see there; what came before has happened"""
        out = np.zeros(n, np.uint64)
        for at, k, rows in self._touch_all(self.spaces[asid], first, n, False):
            out[at : at + k] = rows[:, 0]
        return out

    def write(self, asid: int, first: int, values: Words, bits: int = ALL) -> None:
        """:param values: for each page, shape (n,)
        :param bits: of each, that are written; the others stay, as when a part of a page is written
        :raises NotMapped, Killed: as ``read``"""
        mask, keep = np.uint64(bits), np.uint64(ALL ^ bits)
        for at, k, rows in self._touch_all(self.spaces[asid], first, len(values), True):
            rows[:, 0] = rows[:, 0] & keep | values[at : at + k] & mask

    def map(self, asid: int, first: int, n: int) -> None:
        """mmap of private memory, MAP_FIXED. :raises OSError: not in the arena"""
        s = self._range(asid, first, n)
        self._forget(s, first, n)
        s.mapped[first : first + n] = True
        self._message(lib.SY_MSG_MM_MMAP, asid, vpage=first, npages=n, arg=3)

    def unmap(self, asid: int, first: int, n: int) -> None:
        """munmap. :raises OSError: not in the arena"""
        self._forget(self._range(asid, first, n), first, n)
        self._message(lib.SY_MSG_MM_MUNMAP, asid, vpage=first, npages=n)

    def remap(self, asid: int, first: int, n: int, to: int) -> None:
        """mremap, MREMAP_FIXED. :raises OSError: not in the arena, not mapped, or on top of itself"""
        s = self._range(asid, first, n, mapped=True)
        self._range(asid, to, n)
        if abs(first - to) < n:
            raise OSError(errno.EINVAL, "old and new place overlap")
        self._forget(s, to, n)
        self._make_native(s, first + np.flatnonzero(s.pte[first : first + n] & STATE == SHARED_RO))
        old, new = slice(first, first + n), slice(to, to + n)
        s.pte[new], s.mapped[new], s.advice[new] = s.pte[old], True, s.advice[old]
        s.pte[old], s.mapped[old], s.advice[old] = NONE, False, 0
        for page in [page for page in s.native if first <= page < first + n]:
            s.native[page - first + to] = s.native.pop(page)
        owns = in_frame(s.pte[new])
        self._say_where(s, to + np.flatnonzero(owns), pfns_of(s.pte[new][owns]))
        stored = (s.pte[new] & STATE == SWAPPED) & ~owns
        self.slots["vpage"][pfns_of(s.pte[new][stored])] = to + np.flatnonzero(stored)
        self._message(lib.SY_MSG_MM_MREMAP, asid, vpage=to, npages=n, arg=first)

    def advise(self, asid: int, first: int, n: int, advice: int) -> None:
        """madvise: MADV_DONTNEED, (NO)HUGEPAGE, (UN)MERGEABLE. :raises OSError: not mapped, locked, or something else is advised"""
        s = self._range(asid, first, n, mapped=True)
        at = slice(first, first + n)
        keep = {
            mmap.MADV_DONTNEED: 0xFF, mmap.MADV_MERGEABLE: 0xFF, mmap.MADV_UNMERGEABLE: 0xFF ^ lib.SY_ADVICE_MERGE,
            mmap.MADV_HUGEPAGE: 0xFF ^ lib.SY_ADVICE_SMALL, mmap.MADV_NOHUGEPAGE: 0xFF ^ lib.SY_ADVICE_HUGE,
        }  # fmt: skip
        if advice not in keep or (advice == mmap.MADV_DONTNEED and s.locked()[at].any()):
            raise OSError(errno.EINVAL, "no such advice, or locked")
        add = {mmap.MADV_MERGEABLE: lib.SY_ADVICE_MERGE, mmap.MADV_HUGEPAGE: lib.SY_ADVICE_HUGE, mmap.MADV_NOHUGEPAGE: lib.SY_ADVICE_SMALL}
        s.advice[at] = s.advice[at] & keep[advice] | add.get(advice, 0)
        if advice == mmap.MADV_DONTNEED:
            self._drop(s, first, n)
        elif advice == mmap.MADV_MERGEABLE:
            words = s.pte[at]
            self._flags[pfns_of(words[in_frame(words)])] |= lib.SY_FF_MERGEABLE
        elif advice == mmap.MADV_UNMERGEABLE:
            for page in (first + np.flatnonzero(s.pte[at] & STATE == SHARED_RO)).tolist():
                if not self._asid[int(s.pte[page]) >> SHIFT]:
                    self._touch(s, page, True)
        self._message(lib.SY_MSG_MM_MADVISE, asid, vpage=first, npages=n, arg=advice)

    def lock(self, asid: int, first: int, n: int) -> None:
        """mlock: the pages are in RAM, and stay where they are. :raises OSError: not mapped; Killed: as ``read``"""
        s = self._range(asid, first, n, mapped=True)
        for at, k, _ in self._touch_all(s, first, n, False):
            s.pte[first + at : first + at + k] |= np.uint64(LOCK)

    def unlock(self, asid: int, first: int, n: int) -> None:
        """munlock. :raises OSError: not mapped"""
        s = self._range(asid, first, n, mapped=True)
        s.pte[first : first + n] &= ~np.uint64(LOCK)

    def fork(self, asid: int) -> int:
        """The child. What is in frames both share from now on; what is not, the child gets a copy of, natively."""
        parent = self.spaces[asid]
        self._last_pid += 1
        child = self._new_space(self._last_pid, parent.cpu)
        self._message(lib.SY_MSG_MM_FORK, asid, arg=child.pid)
        self._message(lib.SY_MSG_MM_NEW, child.asid, arg=child.pid)
        child.mapped[:], child.advice[:] = parent.mapped, parent.advice
        own = np.flatnonzero(in_frame(parent.pte))
        pfns = pfns_of(parent.pte[own])
        self._state[pfns], self._flags[pfns] = SHARED, 0
        self._barrier[pfns] += 1
        self.holders.update((pfn, [(asid, page)]) for pfn, page in zip(pfns.tolist(), own.tolist(), strict=True))
        parent.pte[own] = (pfns << SHIFT).astype(np.uint64) | SHARED_RO | parent.pte[own] & LOCK
        state = parent.pte & STATE
        for page in np.flatnonzero(state == SHARED_RO).tolist():
            pfn = int(parent.pte[page]) >> SHIFT
            if self._asid[pfn] == 0 and self._refcount[pfn] >= lib.SY_MAX_SHARING:
                self._put_native(child, page, self.ram[pfn])
                continue
            child.pte[page] = pfn << SHIFT | SHARED_RO
            self._hold(pfn, child.asid, page)
        for page in np.flatnonzero((state == SWAPPED) | (state == NATIVE)).tolist():
            self._put_native(child, page, self.store[int(parent.pte[page]) >> SHIFT] if state[page] == SWAPPED else parent.native[page])
        return child.asid

    def exec(self, asid: int) -> int:
        """Another program in its place; the address space that it has."""
        old = self.spaces[asid]
        new = self._new_space(old.pid, old.cpu)
        self._message(lib.SY_MSG_MM_EXEC, new.asid, vpage=asid, arg=new.pid)
        self._bury(old)
        return new.asid

    def exit(self, asid: int) -> None:
        """It ends, or is ended."""
        self._bury(self.spaces[asid])

    def contents(self, asid: int) -> Words:
        """What it would read, of each page, shape (pages,); untouched and unmapped ones are 0. Touches nothing."""
        s = self.spaces[asid]
        state, at, out = s.pte & STATE, pfns_of(s.pte), np.zeros(self.pages, np.uint64)
        ram = in_frame(s.pte) | (state == SHARED_RO)
        stored = (state == SWAPPED) & ~ram
        out[ram], out[stored] = self.ram[at[ram], 0], self.store[at[stored], 0]
        for page, content in s.native.items():
            out[page] = content[0]
        return out

    def owned(self, asid: int) -> int:
        """Pages in frames that are its own, or of which it is the owner."""
        return int(np.count_nonzero((self._asid == asid) & ((self._state == MAPPED) | (self._state == SHARED))))

    def _range(self, asid: int, first: int, n: int, mapped: bool = False) -> Space:
        s = self.spaces[asid]
        if n <= 0 or not 0 <= first <= self.pages - n or (mapped and not s.mapped[first : first + n].all()):
            raise OSError(errno.ENOMEM, f"pages [{first}, {first + n}) are not there")
        return s

    def _new_space(self, pid: int, cpu: int) -> Space:
        self._last_asid += 1
        s = self.spaces[self._last_asid] = Space(self._last_asid, pid, cpu, self.pages, self.header.default_fault_order)
        return s

    # ---- faults ----
    def _touch_all(self, s: Space, first: int, n: int, write: bool) -> Iterator[tuple[int, int, Words]]:
        """Touches pages one after the other, and gives the content of those that are there: (offset, how many, shape (how many, words))."""
        at = 0
        if first < 0:
            raise NotMapped(f"page {first} of address space {s.asid}")
        while at < n:
            state = s.pte[first + at : first + n] & STATE
            quiet = (state == PRESENT) if write else (state == PRESENT) | (state == SHARED_RO)
            k = len(quiet) if quiet.all() else int(quiet.argmin())
            if k:
                pfns = pfns_of(s.pte[first + at : first + at + k])
                rows = self.ram[pfns]
                yield at, k, rows
                if write:
                    self.ram[pfns] = rows
                at += k
            if at < n:
                yield at, 1, self._touch(s, first + at, write)[None]
                at += 1
                for node in range(len(self.nodes)):
                    self._relieve(node)

    def _touch(self, s: Space, page: int, write: bool) -> Words:
        """A page is there, for the purpose; its content, to read or to write."""
        while True:
            if not 0 <= page < self.pages or not s.mapped[page]:
                raise NotMapped(f"page {page} of address space {s.asid}")
            word = int(s.pte[page])
            state = word & STATE
            if state == PRESENT or (state == SHARED_RO and not write):
                return np.asarray(self.ram[word >> SHIFT])
            if state == NATIVE:
                return s.native[page]
            if state == SWAPPED and word & lib.SY_PTE_HASFRAME:
                self._hint(s, page, word)
                continue
            block = self._take(s, self._order_at(s, page) if state == NONE else 0)
            if int(s.pte[page]) != word:  # something has happened to it while a frame was looked for
                if block is not None:
                    self._release(np.arange(block[0], block[0] + (1 << block[1])))
            elif block is None:
                self._make_native(s, np.array([page]))
            elif state == NONE:
                self._first_touch(s, page, *block)
            elif state == SWAPPED:
                self._fetch(s, page, block[0], lib.SY_MSG_PAGE_REFAULT)
            else:
                self._copy(s, page, block[0])

    def _order_at(self, s: Space, page: int) -> int:
        """Of the block that a first touch takes: as said, but nothing that is touched or not mapped is in the way."""
        order = int(s.chunk_order[page // CHUNK]) - 1
        for o in range(order if order >= 0 else s.fault_order, 0, -1):
            at = slice(page >> o << o, (page >> o) + 1 << o)
            if s.mapped[at].all() and not s.pte[at].any():
                return o
        return 0

    def _first_touch(self, s: Space, page: int, pfn: int, order: int) -> None:
        self.first += 1
        self._map(s, page >> order << order, pfn, 1 << order)

    def _hint(self, s: Space, page: int, word: int) -> None:
        """A page that AGE took away is where it was."""
        pfn = word >> SHIFT
        self._flags[pfn] &= 0xFF ^ lib.SY_FF_AGED
        s.pte[page] = pfn << SHIFT | PRESENT | word & LOCK
        self.hints += 1
        self._message(lib.SY_MSG_PAGE_HINT, s.asid, pfn, page, arg=1 + s.cpu)

    def _fetch(self, s: Space, page: int, pfn: int, why: int) -> None:
        """What the store has of a page is in a frame, GRANTED to it."""
        slot = int(s.pte[page]) >> SHIFT
        self.ram[pfn] = self.store[slot]
        self.refaults += why == lib.SY_MSG_PAGE_REFAULT
        self._message(why, s.asid, pfn, page, arg=self.swapped_out - int(self.slots["out"][slot]))
        self._free_slot(slot)
        self._map(s, page, pfn, 1)

    def _copy(self, s: Space, page: int, pfn: int) -> None:
        """A write to a SHARED page."""
        old = int(s.pte[page]) >> SHIFT
        self._copy_content(old, pfn)
        self._let_go(old, s.asid, page)
        self.cows += 1
        self._map(s, page, pfn, 1, lib.SY_MSG_PAGE_COW, old)

    def _copy_content(self, old: int | Pages, new: int | Pages) -> None:
        self.ram[new] = self.ram[old]

    def _map(self, s: Space, page: int, pfn: int, n: int, why: int = lib.SY_MSG_PAGE_MAPPED, arg: int = 0) -> None:
        """Frames that are GRANTED to it, one after the other, are at these pages."""
        pages, pfns = np.arange(page, page + n), np.arange(pfn, pfn + n)
        self._state[pfns], self._refcount[pfns], self._flags[pfns] = MAPPED, 1, 0
        s.pte[pages] = (pfns << SHIFT).astype(np.uint64) | PRESENT | s.pte[pages] & LOCK
        if n == CHUNK and page % CHUNK == 0 and pfn % CHUNK == 0:
            s.split[page // CHUNK] = False
        self._say_where(s, pages, pfns)
        self._message(why, s.asid, pfn, page, n, n.bit_length() - 1, arg=arg)

    def _say_where(self, s: Space, pages: Pages, pfns: Pages) -> None:
        """What the table says of MAPPED frames, whose pages, ascending, are here now."""
        self._vpage[pfns] = pages
        self._barrier[pfns] += 1
        self._flags[pfns] &= 0xFF ^ (lib.SY_FF_MERGEABLE | lib.SY_FF_STANDBY)
        for chunk in range(int(pages[0]) // CHUNK, int(pages[-1]) // CHUNK + 1) if len(pages) else ():
            if s.advised(chunk) & lib.SY_ADVICE_MERGE:
                self._flags[pfns[pages // CHUNK == chunk]] |= lib.SY_FF_MERGEABLE

    def _put_native(self, s: Space, page: int, content: Words) -> None:
        s.native[page] = content.copy()
        s.pte[page] = NATIVE | int(s.pte[page]) & LOCK

    def _make_native(self, s: Space, pages: Pages) -> None:
        """Pages that have no frame of their own."""
        for page in pages.tolist():
            word = int(s.pte[page])
            at, state = word >> SHIFT, word & STATE
            zero = np.zeros(self.ram.shape[1], np.uint64)
            self._put_native(s, page, self.ram[at] if state == SHARED_RO else self.store[at] if state == SWAPPED else zero)
            if state == SHARED_RO:
                self._let_go(at, s.asid, page)
            elif state == SWAPPED:
                self._free_slot(at)

    # ---- what goes ----
    def _forget(self, s: Space, first: int, n: int) -> None:
        self._drop(s, first, n)
        s.mapped[first : first + n], s.advice[first : first + n] = False, 0

    def _drop(self, s: Space, first: int, n: int) -> None:
        """Pages are untouched again."""
        words = s.pte[first : first + n].copy()
        state, own = words & STATE, in_frame(words)
        s.pte[first : first + n] = NONE
        self._release(pfns_of(words[own]))
        for i in np.flatnonzero((state == SWAPPED) & ~own).tolist():
            self._message(lib.SY_MSG_SLOT_FREED, s.asid, lib.SY_NO_FRAME, first + i, node=0, arg=int(words[i]) >> SHIFT)
            self._free_slot(int(words[i]) >> SHIFT)
        for i in np.flatnonzero(state == SHARED_RO).tolist():
            self._let_go(int(words[i]) >> SHIFT, s.asid, first + i)
        for i in np.flatnonzero(state == NATIVE).tolist():
            del s.native[first + i]

    def _release(self, pfns: Pages) -> None:
        """Frames that are somebody's, and named by no word any more, are FREE."""
        if len(pfns):
            self._make_free(pfns)
        for pfn, n in runs(pfns):
            self._message(lib.SY_MSG_PAGE_FREED, 0, pfn, npages=n)

    def _hold(self, pfn: int, asid: int, page: int) -> None:
        self.holders[pfn].append((asid, page))
        self._refcount[pfn] = len(self.holders[pfn])

    def _let_go(self, pfn: int, asid: int, page: int) -> None:
        """A page is no longer in a SHARED frame."""
        left = self.holders[pfn]
        left.remove((asid, page))
        self._refcount[pfn] = len(left)
        if not left:
            del self.holders[pfn]
            self._release(np.array([pfn]))
        elif self._asid[pfn] and len(left) == 1:  # of a fork: it is its own again
            self._alone(pfn, *left[0])
        elif (self._asid[pfn], self._vpage[pfn]) == (asid, page):
            self._asid[pfn], self._vpage[pfn] = left[0]
            self._barrier[pfn] += 1

    def _alone(self, pfn: int, asid: int, page: int) -> None:
        s = self.spaces[asid]
        del self.holders[pfn]
        self._asid[pfn] = asid
        s.pte[page] = int(s.pte[page]) & ~STATE | PRESENT
        self._state[pfn] = MAPPED
        self._say_where(s, np.array([page]), np.array([pfn]))
        self._message(lib.SY_MSG_PAGE_MAPPED, asid, pfn, page)

    def _bury(self, s: Space) -> None:
        for page in np.flatnonzero(s.pte & STATE == SHARED_RO).tolist():
            self._let_go(int(s.pte[page]) >> SHIFT, s.asid, page)
        self._release(np.flatnonzero((self._asid == s.asid) & (self._state != SHARED)))
        for slot in np.flatnonzero(self.slots["asid"] == s.asid).tolist():
            self._free_slot(slot)
        del self.spaces[s.asid]
        self._message(lib.SY_MSG_MM_EXIT, s.asid, arg=s.pid)

    # ---- the store ----
    def _by_space(self, pfns: Pages) -> Iterator[tuple[Space, NDArray[np.bool_], Pages]]:
        """MAPPED frames, by owner: (whose, which of them, their pages)."""
        asids = self._asid[pfns]
        for asid in np.unique(asids).tolist():
            mine = asids == asid
            yield self.spaces[asid], mine, self._vpage[pfns[mine]].astype(np.int64)

    def _left(self, pfns: Pages, slots: Pages) -> None:
        self.store[slots] = self.ram[pfns]
        for s, mine, pages in self._by_space(pfns):
            s.pte[pages] = (slots[mine] << SHIFT).astype(np.uint64) | SWAPPED

    def _taken_from_sight(self, pfns: Pages) -> None:
        for s, mine, pages in self._by_space(pfns):
            s.pte[pages] = (pfns[mine] << SHIFT).astype(np.uint64) | AGED

    def _fixed(self, pfns: Pages) -> NDArray[np.bool_]:
        out = np.zeros(pfns.shape, np.bool_)
        for s, mine, pages in self._by_space(pfns):
            out[mine] = s.pte[pages] & LOCK != 0
        return out

    def _knows(self, asid: int) -> bool:
        return asid in self.spaces

    def _bring(self, asid: int, vpage: int, node: int) -> None:
        s, (base, size) = self.spaces[asid], self.nodes[node]
        pfn = base + int((self._state[base : base + size] == FREE).argmax())
        self._isolate(pfn, 0)
        self._grant(s, pfn, 0, 0)
        self._fetch(s, vpage, pfn, lib.SY_MSG_PAGE_PREFETCHED)

    # ---- frames ----
    def _all_free(self, pfn: int, order: int) -> bool:
        return bool((self._state[pfn : pfn + (1 << order)] == FREE).all())

    def _isolate(self, pfn: int, order: int) -> None:
        """A FREE block is nobody's, but not FREE."""
        self._set_state(pfn, order, ISOLATED)
        self._zone_free(pfn // self._per, -1 << order)

    def _set_state(self, pfn: int, order: int, state: int) -> None:
        at = slice(pfn, pfn + (1 << order))
        self._state[at], self.frames["order"][at] = state, order
        self._barrier[at] += 1

    def _zero(self, pfn: int, order: int) -> None:
        at = slice(pfn, pfn + (1 << order))
        self.ram[at][self._flags[at] & lib.SY_FF_ZERO == 0] = 0

    def _grant(self, s: Space, pfn: int, order: int, flags: int) -> None:
        """An ISOLATED block is a program's."""
        at = slice(pfn, pfn + (1 << order))
        self._asid[at], self._flags[at] = s.asid, flags
        self._set_state(pfn, order, GRANTED)

    def _push(self, s: Space, pfn: int, order: int) -> None:
        """… and ready in its magazine."""
        self._grant(s, pfn, order, 0)
        s.ready[order].append(pfn)
        s.told_low.discard(order)

    def _reserve_push(self, pfn: int, order: int) -> None:
        self._set_state(pfn, order, RESERVED)
        self._flags[pfn : pfn + (1 << order)] = lib.SY_FF_ZERO
        self.reserve[order].append(pfn)
        if 2 * len(self.reserve[order]) >= self.reserve_targets[order]:
            self._reserve_told.discard(order)

    def _reserve_pop(self, order: int) -> int | None:
        """A block, zero and ISOLATED, split off a larger one if need be."""
        o = next((o for o in range(order, MAX_ORDER + 1) if self.reserve[o]), None)
        pfn = None if o is None else self.reserve[o].pop()
        low = order if o is None else o
        if low not in self._reserve_told and 2 * len(self.reserve[low]) < self.reserve_targets[low]:
            self._reserve_told.add(low)
            self._message(lib.SY_MSG_RESERVE_LOW, npages=len(self.reserve[low]), order=low)
        if pfn is None or o is None:
            return None
        for half in range(o - 1, order - 1, -1):
            self._reserve_push(pfn + (1 << half), half)
        self._set_state(pfn, order, ISOLATED)
        return pfn

    def _first_free(self, order: int, first: int, end: int) -> int | None:
        """The first FREE block in [first, end)."""
        free = (self._state[first:end] == FREE).reshape(-1, 1 << order).all(axis=1)
        return first + (int(free.argmax()) << order) if free.any() else None

    def _give(self, s: Space, order: int) -> int:
        """A block of at most that order, from the reserve or the first that is FREE, into a magazine; pages."""
        while order and len(s.ready[order]) >= lib.SY_MAG_SLOTS:
            order -= 1
        if len(s.ready[order]) >= lib.SY_MAG_SLOTS:
            return 0
        for o in range(order, -1, -1):
            pfn = self._reserve_pop(o)
            if pfn is None:
                pfn = self._first_free(o, 0, len(self.frames))
                if pfn is None:
                    continue
                self._isolate(pfn, o)
                self._message(lib.SY_MSG_FRAMES_TAKEN, 0, pfn, npages=1 << o, order=o)
                self._zero(pfn, o)
            self._push(s, pfn, o)
            return 1 << o
        return 0

    def _take(self, s: Space, order: int) -> tuple[int, int] | None:
        """A block of at most that order out of its magazine: (pfn, order), still GRANTED. None: there is nothing, let it be native."""
        level = len(s.ready[order])
        if level <= LOW.get(order, 0) and order not in s.told_low:
            s.told_low.add(order)
            self._message(lib.SY_MSG_MAGAZINE_LOW, s.asid, npages=level, order=order, node=0, arg=s.consumed[order])
        while True:
            o = next((o for o in range(order, -1, -1) if s.ready[o]), None)
            if o is not None:
                s.consumed[o] += 1
                return s.ready[o].popleft(), o
            got = sum(self._give(s, order) for _ in range(1 if order >= 4 else 8))
            if not got and not self._make_room(s):
                return None

    def _make_room(self, s: Space) -> bool:
        """Nothing is left for a program: what lies ready goes, then what can leave, then a program. False: nothing comes of it."""
        ready = [pfn + i for v in self.spaces.values() for o in ORDERS for pfn in v.ready[o] for i in range(1 << o)]
        if ready:
            for v in self.spaces.values():
                v.ready = [deque() for _ in ORDERS]
            self._release(np.array(sorted(ready)))
            return True
        if self._settle() or len(self._hand_takes(AT_ONCE)):
            return True
        if self.header.oom == lib.SY_OOM_NATIVE:
            self._message(lib.SY_MSG_OOM, s.asid)
            return False
        victim = max(self.spaces.values(), key=lambda v: self.owned(v.asid))
        self._message(lib.SY_MSG_OOM, victim.asid, npages=self.owned(victim.asid), node=0, arg=victim.pid)
        self._bury(victim)
        if victim is s:
            raise Killed(f"address space {s.asid} had the most frames")
        return True

    def _settle(self) -> bool:
        """What stubs have been told is done; was there anything?"""
        return False
