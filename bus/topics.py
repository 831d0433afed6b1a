"""Topics: which message goes where.

A topic is a ZeroMQ subscription prefix and the unit of sequence numbers: events of one topic arrive in the order in
which they happened, and a gap in one topic says nothing about another. Topics separate what different policies need,
so that buddy does not wade through every page that is mapped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernel.abi import names

# Message types by name without the prefix ("MM_NEW": 192); in the ABI once, here only looked up.
MESSAGES: dict[str, int] = {name: value for value, name in names("SY_MSG_").items()}

_MEMBERS: dict[bytes, tuple[str, ...]] = {
    b"mm": ("MM_NEW", "MM_EXIT", "MM_FORK", "MM_EXEC", "MM_MMAP", "MM_MUNMAP", "MM_MREMAP", "MM_MADVISE", "MM_RELEASE"),
    b"page": (
        "PAGE_FAULT", "PAGE_MAPPED", "PAGE_HINT", "PAGE_SWAPPED", "PAGE_REFAULT", "PAGE_PREFETCHED", "PAGE_COW",
        "PAGE_MOVED", "PAGE_SHARED", "SLOT_FREED", "SLOT_MOVED",
    ),
    b"frame": ("PAGE_FREED", "FRAMES_ONLINE", "FRAMES_TAKEN"),
    b"move": ("PAGE_MIGRATED", "PAGE_COLLAPSED", "PAGE_SPLIT", "MOVE_REFUSED"),
    b"merge": ("PAGE_MERGED", "MERGE_REFUSED"),
    b"pressure": ("MAGAZINE_LOW", "RESERVE_LOW", "WATERMARK", "OOM", "PRESSURE", "HEAT_READY"),
    b"task": (
        "TASK_DEAD", "TASK_BLOCKED", "TASK_WAKEUP", "TASK_NEW", "TASK_PREEMPT", "TASK_YIELD", "TASK_DEPARTED", "TASK_SWITCHTO",
        "TASK_AFFINITY_CHANGED", "TASK_ON_CPU", "TASK_PRIORITY_CHANGED",
        "CPU_TICK", "CPU_TIMER_EXPIRED", "CPU_NOT_IDLE", "CPU_AVAILABLE", "CPU_BUSY",
    ),
    b"component": ("COMPONENT_UP", "COMPONENT_LOST", "OVERFLOW"),
    b"test": ("TEST",),
}  # fmt: skip
# Everything that no topic claims.
OTHER = b"other"
TOPICS: tuple[bytes, ...] = (OTHER, *_MEMBERS)


def _table() -> NDArray[np.uint8]:
    table = np.zeros(1 << 16, np.uint8)
    for topic, members in _MEMBERS.items():
        table[[MESSAGES[member] for member in members]] = TOPICS.index(topic)
    return table


# TOPIC_OF[message type] = index into TOPICS; shape (65536,).
TOPIC_OF: NDArray[np.uint8] = _table()


def topic_of(message: str) -> bytes:
    """The topic of a message named as in the ABI, without prefix. ``KeyError`` if there is no such message."""
    return TOPICS[int(TOPIC_OF[MESSAGES[message]])]
