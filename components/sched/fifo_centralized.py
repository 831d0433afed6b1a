"""First in, first out, one queue for all CPUs (ghost-userspace's ``schedulers/fifo/centralized``)."""

from __future__ import annotations

from collections import deque
from typing import Any

from components.sched.queues import Queues
from kernel.agent import Task


class Policy(Queues):
    """Runs a thread until it blocks or yields."""

    def forget(self) -> None:
        super().forget()
        self.queue: deque[Task] = deque()

    def enqueue(self, task: Task, first: bool = False) -> None:
        self.queue.appendleft(task) if first else self.queue.append(task)

    def dequeue(self, task: Task) -> None:
        self.queue.remove(task)

    def pick(self, cpu: int) -> Task | None:
        for task in self.queue:
            if task.may_use(cpu):
                self.queue.remove(task)
                return task
        return None

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"queued": len(self.queue)}
