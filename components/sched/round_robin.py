"""One queue for all CPUs, and a time slice (``schedulers/fifo/centralized`` with ``--preemption_time_slice``)."""

from __future__ import annotations

from typing import Any, ClassVar

from bus.policy import Tunable
from components.sched import fifo_centralized
from kernel.agent import Task


class Policy(fifo_centralized.Policy):
    """Who has had its slice goes to the end of the queue, if anybody is in it."""

    slice_ms: float
    tunables: ClassVar[dict[str, Tunable]] = {"slice_ms": Tunable(5.0, 1.0, 1000.0, "milliseconds that a thread runs before the next one's turn")}
    look_ms = 2

    def enqueue(self, task: Task, first: bool = False) -> None:
        if not first or "began" not in task.own:
            task.own["began"] = None  # its slice begins when it runs
        super().enqueue(task, first)

    def preempts(self, cpu: int, running: Task) -> bool:
        ran = running.status.runtime(self.now_ns())
        if running.own["began"] is None:
            running.own["began"] = ran
        return ran - running.own["began"] >= self.slice_ms * 1e6 and any(t.may_use(cpu) for t in self.queue)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"slice_ms": self.slice_ms}
