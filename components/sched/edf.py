"""Earliest deadline first (Liu and Layland, *Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment*, 1973; ghost-userspace's ``schedulers/edf``).

Programs say nothing of deadlines, so a thread's is when it woke plus a relative one: ``deadline_ms`` at nice 0, a quarter more for each step of nice above, as Linux weighs
them. One queue for all CPUs: the global variant.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any, ClassVar

from bus.policy import Tunable
from components.sched.queues import Queues
from kernel.agent import Message, Task


class Policy(Queues):
    """Whoever is due first runs; who becomes ready and is due before one that runs takes its CPU."""

    deadline_ms: float
    tunables: ClassVar[dict[str, Tunable]] = {"deadline_ms": Tunable(20.0, 0.1, 10_000.0, "milliseconds from its wake-up by which a thread of nice 0 is due")}

    def forget(self) -> None:
        super().forget()
        self.heap: list[tuple[int, int, Task]] = []
        self.count = itertools.count()  # of two with the same deadline, the first

    def due(self, task: Task) -> int:
        """Nanoseconds of the monotonic clock."""
        return int(task.status.row["wake_ns"]) + int(self.deadline_ms * 1e6 * 1.25**task.status.nice)

    def enqueue(self, task: Task, first: bool = False) -> None:
        task.own["due"] = self.due(task)
        heapq.heappush(self.heap, (task.own["due"], next(self.count), task))

    def dequeue(self, task: Task) -> None:
        self.heap = [entry for entry in self.heap if entry[2] is not task]
        heapq.heapify(self.heap)

    def pick(self, cpu: int) -> Task | None:
        best = min((entry for entry in self.heap if entry[2].may_use(cpu)), default=None)
        if best is None:
            return None
        self.dequeue(best[2])
        return best[2]

    def preempts(self, cpu: int, running: Task) -> bool:
        return any(due < running.own["due"] and task.may_use(cpu) for due, _, task in self.heap)

    def task_priority_changed(self, task: Task, msg: Message) -> None:
        """Its deadline is another."""
        if task.queued:
            self.gone(task)
            self.ready(task)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"queued": len(self.heap)}
