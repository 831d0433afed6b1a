"""What schedulers have in common that choose one thread for each CPU and let it run until it blocks, or something better comes."""

from __future__ import annotations

from typing import Any

from kernel.agent import Message, Scheduler, Task


class Queues(Scheduler):
    """A policy says how it queues and what it picks; who runs, blocks and comes back is kept here."""

    current: dict[int, Task | None]

    # ---- of the policy
    def enqueue(self, task: Task, first: bool = False) -> None:
        """It can run. ``first``: it was interrupted, so before others."""
        raise NotImplementedError

    def dequeue(self, task: Task) -> None:
        """It can no longer, or is not there any more; it may not be queued."""
        raise NotImplementedError

    def pick(self, cpu: int) -> Task | None:
        """The next for a CPU that has nothing to do, out of its queue."""
        raise NotImplementedError

    def preempts(self, cpu: int, running: Task) -> bool:
        """Should what runs on ``cpu`` make way for what is queued?"""
        return False

    # ---- messages
    def forget(self) -> None:
        self.current = {c.id: None for c in self.topology}

    def ready(self, task: Task, first: bool = False) -> None:
        if not task.queued and task not in self.current.values():
            self.enqueue(task, first)
            task.queued = True

    def gone(self, task: Task) -> None:
        """From its CPU, or its queue."""
        if task.queued:
            self.dequeue(task)
            task.queued = False
        elif self.current.get(task.cpu) is task:
            self.current[task.cpu] = None

    def task_new(self, task: Task, msg: Message | None = None) -> None:
        if task.status.runnable:
            self.ready(task)

    def task_wakeup(self, task: Task, msg: Message) -> None:
        self.ready(task)

    def task_blocked(self, task: Task, msg: Message) -> None:
        self.gone(task)

    def task_dead(self, task: Task, msg: Message | None = None) -> None:
        self.gone(task)

    def task_preempt(self, task: Task, msg: Message) -> None:
        if self.current.get(task.cpu) is task:
            self.gone(task)
            self.ready(task, first=True)

    def task_yield(self, task: Task, msg: Message) -> None:
        if self.current.get(task.cpu) is task:
            self.gone(task)
            self.ready(task)

    def task_affinity_changed(self, task: Task, msg: Message) -> None:
        """Its queue, or its CPU, may not be for it any more."""
        was = task.queued or self.current.get(task.cpu) is task
        self.gone(task)
        if was:
            self.ready(task)

    def cpu_available(self, cpu: int, msg: Message) -> None:
        """So that somebody looks what to do with it."""

    # ---- decisions
    def schedule(self) -> None:
        for cpu, running in self.current.items():
            if running is not None and self.preempts(cpu, running):
                self.gone(running)
                self.ready(running)
            if self.current[cpu] is None and (task := self.next(cpu)) is not None:
                self.current[cpu], task.cpu = task, cpu
                if not (task is running and task.status.chosen):
                    self.run(task, cpu)

    def next(self, cpu: int) -> Task | None:
        """… that can run, as far as is known by now: the message of whoever has blocked is on its way."""
        while (task := self.pick(cpu)) is not None:
            task.queued = False
            if task.status.runnable and int(task.status.row["gtid"]) == task.gtid:
                return task
        return None

    def run_failed(self, task: Task, cpu: int, state: str) -> None:
        if self.current.get(cpu) is task:
            self.current[cpu] = None
        if task.status.runnable and int(task.status.row["gtid"]) == task.gtid:
            self.ready(task, first=True)

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"running": {str(c): t.gtid.tid for c, t in self.current.items() if t}}
