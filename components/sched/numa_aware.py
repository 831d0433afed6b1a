"""Threads run near their frames: where a program has most of them the frame table says, which no scheduler by itself can see. On one node it is ``fifo_per_cpu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from components.sched import fifo_per_cpu
from kernel.abi import lib
from kernel.agent import Task

LOOK = 1.0  # seconds between two looks at the frame table
MOST = 0.6  # share of a program's frames on one node from which its threads belong there
QUEUED = 2  # more than elsewhere, and it is better to be far from one's frames than to wait


class Policy(fifo_per_cpu.Policy):
    """First in, first out, a queue for each CPU; of the CPUs those of the node that has the program's frames."""

    looked = -LOOK
    near = placed = 0

    def forget(self) -> None:
        super().forget()
        self.home: dict[int, int] = {}  # address space → node

    def look(self) -> None:
        """Where each address space has its frames."""
        if len(self.nodes) == 1 or self.now() - self.looked < LOOK:
            return
        self.looked = self.now()
        mapped = self.frames[self.frames["state"] == lib.SY_FRAME_MAPPED]
        spaces, which = np.unique(mapped["asid"], return_inverse=True)
        count = np.bincount(which * len(self.nodes) + mapped["node"], minlength=len(spaces) * len(self.nodes)).reshape(len(spaces), len(self.nodes))
        most = count.argmax(1)
        mine = count.max(1) >= MOST * count.sum(1)
        self.home = {int(a): int(n) for a, n in zip(spaces[mine], most[mine], strict=True)}

    def choose_cpu(self, task: Task) -> int:
        self.look()
        node = self.home.get(int(task.status.row["asid"]))
        best = super().choose_cpu(task)
        if node is None:
            return best
        near = [c for c in self.topology.on_node(node) if c in self.queue and task.may_use(c)]
        self.placed += 1
        if not near:
            return best
        there = min(near, key=lambda c: (len(self.queue[c]) + (self.current[c] is not None), c != task.cpu))
        if len(self.queue[there]) > len(self.queue[best]) + QUEUED:
            return best
        self.near += 1
        return there

    def pick(self, cpu: int) -> Task | None:
        """From its own queue; from another only what has nowhere to be, or would wait for long."""
        if self.queue[cpu] or len(self.nodes) == 1:
            return super().pick(cpu)
        node = self.topology.cpus[cpu].node
        for queue in sorted(self.queue.values(), key=len, reverse=True):
            for task in queue:
                if task.may_use(cpu) and (self.home.get(int(task.status.row["asid"]), node) == node or len(queue) > QUEUED):
                    queue.remove(task)
                    return task
        return None

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"homes": len(self.home), "near": self.near, "placed": self.placed}
