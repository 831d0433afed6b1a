"""What a ghOSt kernel and its agents share: queues of messages, status words, transactions.

Order of memory accesses. The kernel publishes with release stores (``_produce``: payload, then ``head``) and ghOSt's library reads with acquire loads
(``lib/channel.cc`` @1afedebb). Python has neither. On x86-64 loads are not reordered with loads, nor stores with older loads or stores, so what is needed is
only that each index and state is one access and that they happen in program order: every access here is a call of cffi into C, which copies an aligned word of
four bytes (gcc makes one ``mov`` of it), and the interpreter makes calls in order. Compare-and-swap there is none: what needs it is left out (``enclave``).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.providers.ghost.abi import Abi, Message
from kernel.providers.ghost.fs import GhostError, RingError, asking

U32 = 1 << 32


def map_file(fd: int, size: int, write: bool) -> mmap.mmap:
    """Maps ``size`` bytes of a file of the kernel. RingError if it has fewer, or none."""
    there = os.fstat(fd).st_size
    # A queue is an anonymous inode, which has no size.
    if size <= 0 or (0 < there < size):
        raise RingError(f"asked to map {size} bytes, the file has {there}; the kernel and /sys/fs/ghost/version disagree")
    with asking(f"mmap of {size} bytes"):
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if write else 0))


class Queue:
    """The reading end of one queue. One reader. ``fd`` names it to the kernel; ``close`` gives it back.

    The kernel's half is ``_produce`` of google/ghost-kernel kernel/sched/ghost.c @a09aeb01: a message is never split at the end of the ring, MSG_NOP fills
    what is left there; one that finds no room is counted in ``overflow`` and is lost.
    """

    def __init__(self, abi: Abi, fd: int, size: int) -> None:
        """Maps a queue of ``size`` bytes. RingError if its header is not that of a ring which fits."""
        self.abi, self.fd = abi, fd
        self._map = map_file(fd, size, write=True)
        whole = memoryview(self._map)
        if size < abi.size("ghost_queue_header"):
            raise RingError(f"queue of {size} bytes: too short for its header of {abi.size('ghost_queue_header')}")
        head = abi.ffi.from_buffer("struct ghost_queue_header *", whole)
        version, start, self.nelems = head.version, head.start, head.nelems
        self.slot, ring = abi.size("ghost_msg"), abi.size("ghost_ring")
        need = start + ring + self.nelems * self.slot
        if version != abi.constants["GHOST_QUEUE_VERSION"] or self.nelems & (self.nelems - 1) or not self.nelems or start % 4:
            raise RingError(f"queue: header says version {version}, {self.nelems} slots from byte {start}; ABI {abi.version} has version 0, a power of two")
        if need > size:
            raise RingError(f"queue: its header needs {need} bytes, the kernel gave {size}; the kernel and /sys/fs/ghost/version disagree")
        self._ring = abi.ffi.from_buffer("struct ghost_ring *", whole[start:], require_writable=True)
        self._slots = whole[start + ring : need]

    @property
    def overflow(self) -> int:
        """Messages that the kernel could not place, ever. When it grows: ``Enclave.discover``, and make queues larger."""
        return int(self._ring.overflow)

    def pop(self) -> Message | None:
        """The next message, or None. MessageError: one that this ABI has not, taken from the queue; RingError: nothing more can be read, ever."""
        ffi, ring = self.abi.ffi, self._ring
        while True:
            tail, head = ring.tail, ring.head
            used = (head - tail) % U32
            if used == 0:
                return None
            if used > self.nelems:
                raise RingError(f"queue: head {head}, tail {tail}, but {self.nelems} slots; close it, make another, then Enclave.discover()")
            at = tail & (self.nelems - 1)
            msg = ffi.from_buffer("struct ghost_msg *", self._slots[at * self.slot :])
            kind, length, seqnum = msg.type, msg.length, msg.seqnum
            slots = -(-length // self.slot)
            if length < self.slot or slots > min(used, self.nelems - at):
                raise RingError(
                    f"queue: slot {at} of {self.nelems} has type {kind}, length {length}, but {used} slots are filled; close it, make another, then Enclave.discover()"
                )
            payload = bytes(self._slots[(at + 1) * self.slot : at * self.slot + length])
            ring.tail = (tail + slots) % U32  # after the copy: from here on the kernel may write there
            if kind != self.abi.constants["MSG_NOP"]:
                return self.abi.message(kind, seqnum, payload)

    def __iter__(self) -> Iterator[Message]:
        """All that are there, and those that come meanwhile."""
        while (message := self.pop()) is not None:
            yield message

    def close(self) -> None:
        """Closes the descriptor, and unmaps it unless somebody holds a part; then the kernel frees it."""
        del self._ring, self._slots, self._map
        os.close(self.fd)


class StatusWords:
    """One region of status words, as ``words``: shape (capacity,), the fields of ``struct ghost_status_word``; read-only, and changing."""

    def __init__(self, abi: Abi, fd: int, region: int) -> None:
        """Maps all of the file. RingError if its header is not that of this region."""
        self.abi = abi
        self._map = map_file(fd, os.fstat(fd).st_size, write=False)
        size, header = len(self._map), abi.size("ghost_sw_region_header")
        if size < header:
            raise RingError(f"sw_{region}: {size} bytes, too short for its header of {header}")
        h = abi.ffi.from_buffer("struct ghost_sw_region_header *", memoryview(self._map))
        version, found, start, capacity = h.version, h.id, h.start, h.capacity
        del h
        word = abi.dtype("ghost_status_word")
        if version != abi.constants["GHOST_SW_REGION_VERSION"] or found != region or start + capacity * word.itemsize > size:
            raise RingError(f"sw_{region}: header says version {version}, region {found}, {capacity} words from byte {start}; the file has {size} bytes")
        self.words: NDArray[np.void] = np.frombuffer(self._map, word, capacity, start)

    def _copy(self, index: int) -> bytes:
        return self.words[index : index + 1].tobytes()

    def read(self, index: int) -> dict[str, int]:
        """One word, of one moment: two copies that agree, since the kernel changes barrier and flags one after the other. GhostError if it never rests."""
        if not 0 <= index < len(self.words):
            raise IndexError(f"status word {index}: the region has {len(self.words)}")
        before = self._copy(index)
        for _ in range(1000):
            after = self._copy(index)
            if before == after:
                word = np.frombuffer(after, self.words.dtype)[0]
                return {name: int(word[name]) for name in word.dtype.names}
            before = after
        raise GhostError(f"status word {index}: 1000 reads, no two alike; ask again")

    def tasks(self) -> NDArray[np.int64]:
        """Indexes of the words that belong to tasks, not to agents: shape (n,). As ``ForEachTaskStatusWord`` of lib/ghost.h @d1d2e328 chooses them."""
        flags, c = self.words["flags"], self.abi.constants
        return np.flatnonzero((flags & (c["GHOST_SW_F_INUSE"] | c["GHOST_SW_TASK_IS_AGENT"])) == c["GHOST_SW_F_INUSE"])

    def close(self) -> None:
        """Unmaps it unless an array that was taken from ``words`` is still held."""
        del self.words, self._map


class Transactions:
    """The transactions of an enclave, one for each possible CPU of the machine: ``cpu_data``."""

    def __init__(self, abi: Abi, fd: int) -> None:
        """Maps all of the file. RingError if it is empty."""
        self.abi = abi
        self._map = map_file(fd, os.fstat(fd).st_size, write=True)
        self.page = abi.size("ghost_cpu_data")
        self.cpus = len(self._map) // self.page

    def __getitem__(self, cpu: int) -> Any:
        """``struct ghost_txn *`` of a CPU. IndexError; RingError if the kernel has not made it this CPU's (it is not one of the enclave's)."""
        if not 0 <= cpu < self.cpus:
            raise IndexError(f"transaction of CPU {cpu}: cpu_data has {self.cpus}")
        view = memoryview(self._map)[cpu * self.page :]
        txn = self.abi.ffi.from_buffer("struct ghost_txn *", view, require_writable=True)
        if txn.version != self.abi.constants["GHOST_TXN_VERSION"] or txn.cpu != cpu:
            raise RingError(f"transaction of CPU {cpu}: found version {txn.version}, CPU {txn.cpu}; is the CPU in the enclave's cpulist?")
        return txn

    def state(self, cpu: int) -> str:
        """READY, CLAIMED, or what became of it (COMPLETE, TARGET_STALE, …). RingError for a value that ghOSt has not."""
        value = self[cpu].state
        if 0 <= value < self.cpus:
            return "CLAIMED"
        if value not in self.abi.txn_states:
            raise RingError(f"transaction of CPU {cpu}: state {value}, ABI {self.abi.version} has none such")
        return self.abi.txn_states[value]

    def committed(self, cpu: int) -> bool:
        """It is over, whichever way."""
        return bool(self[cpu].state < 0)

    def close(self) -> None:
        """Unmaps them unless one is still held."""
        del self._map
