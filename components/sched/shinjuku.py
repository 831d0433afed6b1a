"""Short requests before long ones, without knowing which are which: whoever has run for a quantum without a pause makes way (Kaffes et al., *Shinjuku: Preemptive Scheduling for
µsecond-scale Tail Latency*, NSDI '19; ghost-userspace's ``schedulers/shinjuku``).

There a preempted request goes to the end of one queue, and a core polls. Here every thread that has its quantum before it is chosen already, on whatever CPU is free and
also for the next time that it wakes: so a request starts without waiting for this process. Who has used it up waits, with the others of that kind and everything else, for what
is left, shared by the kernel's own scheduler, until it blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bus.policy import Tunable
from kernel.abi import lib
from kernel.agent import ANY_CPU, Scheduler


class Policy(Scheduler):
    """Decides from the status words alone, a look every two milliseconds."""

    quantum_ms: float
    tunables: ClassVar[dict[str, Tunable]] = {"quantum_ms": Tunable(3.0, 0.5, 1000.0, "milliseconds that a thread may run without a pause before it makes way")}
    look_ms = 2
    demoted = promoted = 0

    def schedule(self) -> None:
        t = self.tasks[: self.sched.top]
        flags, now = t["flags"], self.now_ns()
        on = flags & lib.SY_TF_ON_CPU != 0
        ran = t["runtime"] - t["wake_runtime"] + np.where(on, np.maximum(now - t["switch_ns"].astype(np.int64), 0), 0).astype(np.uint64)
        used_up = (flags & lib.SY_TF_RUNNABLE != 0) & (ran > np.uint64(self.quantum_ms * 1e6))
        standing = flags & lib.SY_TF_STANDING != 0
        there = t["gtid"] != 0
        for row in np.flatnonzero(there & used_up & standing):
            self.txn.run(int(t["gtid"][row]), ANY_CPU, int(t["barrier"][row]), lib.SY_RUN_WAIT)
            self.demoted += 1
        for row in np.flatnonzero(there & ~used_up & ~standing):
            self.txn.run(int(t["gtid"][row]), ANY_CPU, int(t["barrier"][row]), lib.SY_RUN_STANDING)
            self.promoted += 1

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"quantum_ms": self.quantum_ms, "demoted": self.demoted, "promoted": self.promoted}
