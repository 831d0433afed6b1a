"""The gateway's tables as read-only NumPy arrays, and what anybody can compute from them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.abi import CPU_DTYPE, FRAME_DTYPE, HEAT_DTYPE, STORED_DTYPE, TASK_DTYPE, ffi, lib, names

MAX_ORDER: int = lib.SY_MAX_ORDER
# A region is what one block of the highest order covers, 4 MiB. Nodes are whole regions.
REGION: int = 1 << MAX_ORDER
FRAME_STATES: dict[str, int] = {
    name.lower(): value for value, name in names("SY_FRAME_").items() if value < lib.SY_FRAME_STATES
}


class Tables:
    """Enclave header, frame table, heat array, swap store's slots and tasks of a gateway, mapped from their read-only descriptors.

    :param header_fd: descriptor of ``struct sy_header``; not closed here
    :param frames_fd: descriptor of ``struct sy_frame[header.frames]``; not closed here
    :param heat_fd: descriptor of ``struct sy_heat[header.frames]``; not closed here
    :param slots_fd: descriptor of ``struct sy_stored[header.slots]``; not closed here
    :param tasks_fd: descriptor of the file of tasks; not closed here
    :param ram_fds: descriptors of each node's RAM, if there are any; not closed here
    :raises OSError: a descriptor cannot be mapped; ``ValueError``: the table is shorter than the header says
    """

    def __init__(self, header_fd: int, frames_fd: int, heat_fd: int, slots_fd: int, tasks_fd: int, ram_fds: Sequence[int] = ()) -> None:
        self._header_map = mmap.mmap(header_fd, lib.SY_HEADER_BYTES, prot=mmap.PROT_READ)
        self.header: Any = ffi.cast("struct sy_header *", ffi.from_buffer(self._header_map))
        count = self.header.frames
        frames_map = mmap.mmap(frames_fd, count * FRAME_DTYPE.itemsize, prot=mmap.PROT_READ)
        # shape (frames,), indexed by pfn; not writeable, since the mapping is not
        self.frames: NDArray[np.void] = np.frombuffer(frames_map, FRAME_DTYPE, count)
        heat_map = mmap.mmap(heat_fd, count * HEAT_DTYPE.itemsize, prot=mmap.PROT_READ)
        self.heat: NDArray[np.void] = np.frombuffer(heat_map, HEAT_DTYPE, count)  # as frames
        slots = self.header.slots
        # shape (slots,), indexed by slot; not writeable
        self.slots: NDArray[np.void] = np.zeros(0, STORED_DTYPE)
        if slots:
            slots_map = mmap.mmap(slots_fd, slots * STORED_DTYPE.itemsize, prot=mmap.PROT_READ)
            self.slots = np.frombuffer(slots_map, STORED_DTYPE, slots)
        self._tasks_map = mmap.mmap(tasks_fd, lib.SY_TASKS_BYTES, prot=mmap.PROT_READ)
        self.sched: Any = ffi.cast("struct sy_tasks *", ffi.from_buffer(self._tasks_map))
        # struct sy_cpu, shape (SY_MAX_CPUS,), and struct sy_task, shape (SY_MAX_TASKS,); not writeable
        self.cpus: NDArray[np.void] = np.frombuffer(self._tasks_map, CPU_DTYPE, lib.SY_MAX_CPUS, lib.SY_TASKS_CPU_OFF)
        self.tasks: NDArray[np.void] = np.frombuffer(self._tasks_map, TASK_DTYPE, lib.SY_MAX_TASKS, lib.SY_TASKS_TASK_OFF)
        # the pages of each node, shape (frames of the node, 4096); not writeable
        self.ram: list[NDArray[np.uint8]] = []
        for node, fd in enumerate(ram_fds):
            pages = self.header.node[node].frames
            ram_map = mmap.mmap(fd, pages * lib.SY_PAGE_SIZE, prot=mmap.PROT_READ)
            self.ram.append(np.frombuffer(ram_map, np.uint8).reshape(pages, lib.SY_PAGE_SIZE))
        # (first pfn, frames) of each node
        self.nodes = [(self.header.node[i].base, self.header.node[i].frames) for i in range(self.header.nodes)]


def maximal_blocks(free: NDArray[np.bool_]) -> NDArray[np.int8]:
    """The free blocks that a buddy allocator with full coalescing has: maximal, aligned to their size.

    :param free: which frames are free, shape (n,), n a multiple of ``REGION``, the first pfn too
    :return: shape (n,): the order of the block that begins at a frame, -1 where none begins
    """
    heads = np.full(len(free), -1, np.int8)
    level = free
    for order in range(MAX_ORDER):
        above = level[0::2] & level[1::2]
        heads[:: 1 << order][level & ~np.repeat(above, 2)] = order
        level = above
    heads[::REGION][level] = MAX_ORDER
    return heads


def alike_blocks(
    frames: NDArray[np.void], pfns: NDArray[np.int64], highest: int, beside: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Divides frames into aligned blocks, as large as can be, of pages that follow one another in one address space: what MIGRATE can move in
    one piece. Yields (order, first pfns), large ones first; together all of ``pfns``.

    :param pfns: ascending, each once
    :param highest: order of the largest
    :param beside: frames that belong to them, shape of ``pfns``; they must follow one another, too
    """
    away = np.zeros(len(pfns), np.int64) if beside is None else beside - pfns
    begin = (frames["vpage"][pfns].astype(np.int64) - pfns) + (frames["asid"][pfns].astype(np.int64) << 32)
    for order in range(highest, 0, -1):
        n = 1 << order
        if len(pfns) < n:
            continue
        # whole blocks: whose first is aligned, and whose last, n - 1 further in the list, is n - 1 frames further and has the same begin
        at = np.flatnonzero(pfns[: len(pfns) - n + 1] % n == 0)
        last = at + n - 1
        alike = (pfns[last] - pfns[at] == n - 1) & (begin[last] == begin[at]) & (away[last] == away[at])
        # (between them others may begin elsewhere)
        runs = np.cumsum((np.diff(begin, prepend=begin[0]) != 0) | (np.diff(away, prepend=away[0]) != 0))
        at = at[alike & (runs[last] == runs[at])]
        if not len(at):
            continue
        yield order, pfns[at]
        rest = np.ones(len(pfns), np.bool_)
        rest[(at[:, None] + np.arange(n)).reshape(-1)] = False
        pfns, begin, away = pfns[rest], begin[rest], away[rest]
    if len(pfns):
        yield 0, pfns


def free_blocks(frames: NDArray[np.void], nodes: list[tuple[int, int]]) -> list[list[int]]:
    """Free blocks per node and order 0..10, as the frame table has them now."""
    free = frames["state"] == FRAME_STATES["free"]
    counts = []
    for base, size in nodes:
        heads = maximal_blocks(free[base : base + size])
        counts.append(np.bincount(heads[heads >= 0], minlength=MAX_ORDER + 1).tolist())
    return counts


def buddyinfo(counts: list[list[int]]) -> str:
    """``free_blocks()`` in the form of /proc/buddyinfo."""
    lines = (f"Node {node}, zone {'Sylvie':>8} " + "".join(f"{n:6d} " for n in row) for node, row in enumerate(counts))
    return "\n".join(lines)


def slabinfo(caches: list[dict[str, int]]) -> str:
    """The store's ``struct sy_slab_info`` in the form of /proc/slabinfo (mm/slab_common.c)."""
    head = (
        "slabinfo - version: 2.1\n"
        "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>"
        " : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>"
    )
    rows = []
    for c in caches:
        slabs = max(1, c["slabs"])
        rows.append(
            f"{'zpage-' + str(c['size']):<17} {c['active']:6d} {c['objects']:6d} {c['size']:6d} "
            f"{c['objects'] // slabs:4d} {c['frames'] // slabs:4d} : tunables    0    0    0 "
            f": slabdata {c['slabs']:6d} {c['slabs']:6d}      0"
        )
    return "\n".join([head, *rows])


def frames_by_state(frames: NDArray[np.void]) -> dict[str, int]:
    """Number of frames in each state, and their ``total``."""
    counts = np.bincount(frames["state"], minlength=len(FRAME_STATES))
    return {name: int(counts[value]) for name, value in FRAME_STATES.items()} | {"total": len(frames)}
