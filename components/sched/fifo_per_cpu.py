"""First in, first out, a queue for each CPU; a CPU that has nothing takes from the longest (ghost-userspace's ``schedulers/fifo/per_cpu``)."""

from __future__ import annotations

from collections import deque
from typing import Any

from components.sched.queues import Queues
from kernel.agent import Task


class Policy(Queues):
    """Runs a thread until it blocks or yields."""

    def forget(self) -> None:
        super().forget()
        self.queue: dict[int, deque[Task]] = {c.id: deque() for c in self.topology}

    def choose_cpu(self, task: Task) -> int:
        """The one that it had, which knows its data, unless another has less to do."""
        may = [c for c in self.queue if task.may_use(c)] or list(self.queue)
        return min(may, key=lambda c: (len(self.queue[c]) + (self.current[c] is not None), c != task.cpu))

    def enqueue(self, task: Task, first: bool = False) -> None:
        task.cpu = self.choose_cpu(task)
        queue = self.queue[task.cpu]
        queue.appendleft(task) if first else queue.append(task)

    def dequeue(self, task: Task) -> None:
        self.queue[task.cpu].remove(task)

    def pick(self, cpu: int) -> Task | None:
        if self.queue[cpu]:
            return self.queue[cpu].popleft()
        for queue in sorted(self.queue.values(), key=len, reverse=True):
            for task in queue:
                if task.may_use(cpu):
                    queue.remove(task)
                    return task
        return None

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"queued": {str(c): len(q) for c, q in self.queue.items()}}
