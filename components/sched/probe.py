"""Looks on, for the bench: how old the message of a wake-up is when it is handled here, and how long a thread that waits for a CPU needs to get it once that is decided.

It has one thread at a time put before what runs on its CPU, and lets it wait again as soon as it is there. Else it chooses nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from kernel.abi import lib
from kernel.agent import Message, Scheduler, Task

SAMPLES = 10_000  # the latest so many
PAUSE = 2_000_000  # ns between two trials
GIVE_UP = 200_000_000  # ns


class Trial(NamedTuple):
    task: Task
    began: int
    runtime: int


class Policy(Scheduler):
    """probe"""

    tick_us = 2000

    def forget(self) -> None:
        self.delivered: deque[int] = deque(maxlen=SAMPLES)
        self.ran: deque[int] = deque(maxlen=SAMPLES)
        self.trial: Trial | None = None
        self.next = self.messages = self.interrupted = self.given_up = 0

    def task_wakeup(self, task: Task, msg: Message) -> None:
        self.messages += 1
        self.delivered.append(self.now_ns() - msg.runtime)

    def task_blocked(self, task: Task, msg: Message) -> None:
        """Every scheduler wants to know that; so it is sent."""
        self.messages += 1

    def cpu_tick(self, cpu: int, msg: Message) -> None:
        """So that somebody looks at the time."""

    def task_on_cpu(self, task: Task, msg: Message) -> None:
        if self.trial is None or self.trial.task is not task:
            return
        row = task.status.row
        # If it has left since, and be it for us, when it came is not known any more: the status word has when it came back.
        if int(row["runtime"]) == self.trial.runtime and int(row["switch_ns"]) > self.trial.began:
            self.ran.append(int(row["switch_ns"]) - self.trial.began)
        else:
            self.interrupted += 1
        self._end()

    def task_dead(self, task: Task, msg: Message | None = None) -> None:
        if self.trial is not None and self.trial.task is task:
            self.trial = None

    def run_failed(self, task: Task, cpu: int, state: str) -> None:
        self.task_dead(task)

    def _end(self) -> None:
        assert self.trial is not None
        self.wait(self.trial.task)
        self.trial, self.next = None, self.now_ns() + PAUSE

    def schedule(self) -> None:
        now = self.now_ns()
        if self.trial is not None:
            if now > self.trial.began + GIVE_UP:
                self.given_up += 1
                self._end()
            return
        if now < self.next:
            return
        t = self.tasks[: self.sched.top]
        busy = np.append(self.cpus["on"] != 0, False)  # (the last is for CPU -1)
        waits = (t["gtid"] != 0) & (t["flags"] & (lib.SY_TF_RUNNABLE | lib.SY_TF_ON_CPU | lib.SY_TF_CHOSEN) == lib.SY_TF_RUNNABLE) & busy[t["cpu"]]
        if not waits.any():
            return
        longest = t[np.flatnonzero(waits)[np.argmin(t["switch_ns"][waits])]]
        if (task := self.known.get(int(longest["gtid"]))) is not None:
            runtime, cpu = int(task.status.row["runtime"]), task.status.cpu
            self.run(task, cpu, run_flags=lib.SY_RUN_SEND_ON_CPU)
            self.trial = Trial(task, self.now_ns(), runtime)  # what follows is the runtime's: the commit

    def dump(self) -> dict[str, Any]:
        counts = {"messages": self.messages, "interrupted": self.interrupted, "given_up": self.given_up}
        return super().dump() | counts | {"delivered_us": _quantiles(self.delivered), "ran_us": _quantiles(self.ran)}


def _quantiles(ns: deque[int]) -> dict[str, float]:
    if not ns:
        return {"n": 0}
    p50, p99 = np.quantile(np.array(ns) / 1e3, (0.5, 0.99)).tolist()
    return {"n": len(ns), "p50": p50, "p99": p99}
