"""Which frames are free: a copy of one column of the frame table, renewed where an event says that it changed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bus.tables import REGION
from kernel.abi import lib


class FreeMap(ABC):
    """Base of the allocators. What is free is never concluded from events, only read from the table where they point:
    so a lost, doubled or late event cannot make this differ from the table for longer than until the next look.

    :param frames: the frame table, shape (frames,); whole regions
    :param nodes: (first pfn, frames) of each node; whole regions
    """

    def __init__(self, frames: NDArray[np.void], nodes: list[tuple[int, int]]) -> None:
        if len(frames) % REGION or any(base % REGION or size % REGION for base, size in nodes):
            raise ValueError(f"nodes {nodes} of {len(frames)} frames are not whole regions of {REGION} frames")
        self._frames = frames
        self.nodes = nodes
        self._free = np.zeros(len(frames), np.bool_)

    def load(self) -> None:
        """Reads the whole table."""
        self._free = self._frames["state"] == lib.SY_FRAME_FREE
        self._changed(None)

    def look(self, pfns: ArrayLike, npages: ArrayLike) -> None:
        """Reads the table again for runs of frames; both arguments have shape (n,) or are numbers. What lies outside of
        the table is ignored: an event cannot be refused."""
        total = len(self._free)
        start = np.atleast_1d(np.asarray(pfns, np.int64))
        stop = np.minimum(start + np.atleast_1d(np.asarray(npages, np.int64)), total)
        length = np.maximum(stop - start, 0)
        # index = every frame of every run, without a loop
        index = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
        if not index.size:
            return
        self._free[index] = self._frames["state"][index] == lib.SY_FRAME_FREE
        touched = np.zeros(total // REGION, np.bool_)
        touched[index // REGION] = True
        self._changed(np.flatnonzero(touched))

    def hide(self, pfn: int, npages: int) -> None:
        """Regards these frames as taken, until ``look`` is told to read them again."""
        self._free[pfn : pfn + npages] = False
        self._changed(np.arange(pfn // REGION, (pfn + npages - 1) // REGION + 1))

    @property
    def free_frames(self) -> int:
        """Frames that can be taken, all nodes."""
        return int(np.count_nonzero(self._free))

    @abstractmethod
    def take(self, order: int, count: int, node: int) -> NDArray[np.int64]:
        """Chooses up to ``count`` free blocks of ``order`` on ``node`` and regards them as taken. First pfns, shape
        (n,), n < count only if the node has no more."""

    def _changed(self, regions: NDArray[np.intp] | None) -> None:
        """``_free`` is new in these regions (numbers, in units of ``REGION`` frames), or everywhere."""
        return  # nothing is derived from it here
