"""Interim: everything is chosen, standing, on any CPU."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy
from kernel.abi import TASK_MSG_DTYPE, lib


class Policy(BasePolicy):
    seen = 0
    def words(self):
        return {"messages": list(range(64, 76)), "tick": [0]}
    def task_new(self, events: NDArray[np.void]) -> None:
        for m in events.view(TASK_MSG_DTYPE):
            self.txn.run(int(m["gtid"]), lib.SY_ANY_CPU, int(m["barrier"]), lib.SY_RUN_STANDING)
    def task_wakeup(self, events):
        self.seen += len(events)
    task_blocked = task_dead = task_preempt = task_yield = task_wakeup
    def result(self, ops):
        print("results", ops["result"].tolist(), flush=True)
        for o in ops:
            if o["result"] == lib.SY_R_STALE:
                t = self.tasks[self.tasks["gtid"] == o["arg"]]
                if len(t):
                    self.txn.run(int(o["arg"]), lib.SY_ANY_CPU, int(t["barrier"][0]), lib.SY_RUN_STANDING)
