"""The fewest faults that any policy can have: MIN evicts what is needed last (Belady, "A study of replacement algorithms for a
virtual-storage computer", IBM Systems Journal 5(2), 1966)."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SAY = 1 << 16  # accesses between two reports of progress


def next_uses(pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each access, shape (n,), the position of the next one to the same page; n if there is none."""
    by_page = np.argsort(pages, kind="stable")
    following = np.full(len(pages), len(pages), np.int64)
    same = pages[by_page[1:]] == pages[by_page[:-1]]
    following[by_page[:-1][same]] = by_page[1:][same]
    return following


def opt(pages: NDArray[np.int64], frames: int, progress: Callable[[int], None] = lambda _done: None) -> int:
    """Faults of MIN, first touches included.

    :param pages: of each access, shape (n,)
    :param frames: pages that RAM holds, at least 1
    :param progress: called now and then with the accesses done
    """
    # A page's next access, while it is in RAM: an entry of the heap that says otherwise is out of date.
    needed: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    faults = 0
    for i, (page, following) in enumerate(zip(pages.tolist(), next_uses(pages).tolist(), strict=True)):
        if i % SAY == 0:
            progress(i)
        if page not in needed:
            faults += 1
            while len(needed) >= frames:
                when, last = heapq.heappop(heap)
                if needed.get(last) == -when:
                    del needed[last]
        needed[page] = following
        heapq.heappush(heap, (-following, page))
    progress(len(pages))
    return faults
