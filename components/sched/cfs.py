"""Completely fair: who has had the least weighted time runs (kernel/sched/fair.c before EEVDF; ghost-userspace's ``schedulers/cfs``)."""

from __future__ import annotations

from typing import Any, ClassVar

from bus.policy import Tunable
from components.sched.queues import Queues
from kernel.agent import Task

# sched_prio_to_weight of kernel/sched/core.c: nice -20 to 19, a quarter a step, 1024 at 0.
WEIGHT = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916, 9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137, 110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)  # fmt: skip


class Policy(Queues):
    """One queue for all CPUs, by vruntime: nanoseconds on a CPU times 1024 by weight."""

    granularity_ms: float
    tunables: ClassVar[dict[str, Tunable]] = {"granularity_ms": Tunable(3.0, 1.0, 100.0, "milliseconds that a thread runs before one that had less takes its CPU")}
    look_ms = 2

    def forget(self) -> None:
        super().forget()
        self.waiting: dict[int, Task] = {}
        self.min_vruntime = 0.0

    def account(self, task: Task) -> float:
        """Its vruntime now."""
        ran = task.status.runtime(self.now_ns())
        had = ran - task.own.setdefault("ran", ran)
        task.own["ran"] = ran
        task.own["vruntime"] = task.own.get("vruntime", self.min_vruntime) + max(0, had) * 1024 / WEIGHT[task.status.nice + 20]
        return float(task.own["vruntime"])

    def enqueue(self, task: Task, first: bool = False) -> None:
        """Who slept does not get back all that it did not use (place_entity)."""
        there = [self.account(t) for t in (*self.waiting.values(), *self.current.values()) if t is not None]
        self.min_vruntime = max(self.min_vruntime, min(there, default=0.0))
        task.own["vruntime"] = max(self.account(task), self.min_vruntime - self.granularity_ms * 1e6)
        self.waiting[task.gtid] = task

    def dequeue(self, task: Task) -> None:
        del self.waiting[task.gtid]

    def pick(self, cpu: int) -> Task | None:
        # (who waits may have been run by the kernel, when nothing chosen wanted the CPU)
        best = min((t for t in self.waiting.values() if t.may_use(cpu)), key=self.account, default=None)
        if best is not None:
            del self.waiting[best.gtid]
            best.own["began"] = best.own["ran"]
            self.min_vruntime = max(self.min_vruntime, best.own["vruntime"])
        return best

    def preempts(self, cpu: int, running: Task) -> bool:
        least = min((self.account(t) for t in self.waiting.values() if t.may_use(cpu)), default=None)
        if least is None:
            return False
        now = self.account(running)
        ran = running.own["ran"] - running.own["began"]
        return now > least and (ran >= self.granularity_ms * 1e6 or now > least + self.granularity_ms * 1e6)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"queued": len(self.waiting), "min_vruntime_ms": round(self.min_vruntime / 1e6, 1)}
