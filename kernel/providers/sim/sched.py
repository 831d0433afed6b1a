"""CPUs and threads in Python: the table of tasks, the messages and RUN of ``kernel/native/gateway_sched.h``, deterministic and in its own time, for policies of sched.

Time goes in steps. A thread is a list of (milliseconds on a CPU, milliseconds asleep after it); it ends after the last. Of what is chosen for a CPU the highest rank runs, of equals the one that
came first; else, as a stand-in for the kernel's own scheduler, those that wait take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy, Transaction, commit, handlers_of
from kernel.abi import CPU_DTYPE, FRAME_DTYPE, MSG_DTYPE, TASK_DTYPE, TASK_MSG_DTYPE, ffi, lib

STEP = 100_000  # ns
TURN = 4_000_000  # ns that one runs before the next of those that wait has its turn
_FLAGS = {"on": lib.SY_TF_ON_CPU, "runnable": lib.SY_TF_RUNNABLE, "chosen": lib.SY_TF_CHOSEN, "standing": lib.SY_TF_STANDING}


@dataclass
class Thread:
    """``row`` of the table; what it has still to do."""

    row: int
    work: deque[tuple[int, int]]  # ns on a CPU, ns asleep
    left: int = 0  # ns of the current burst
    wakes: int | None = None  # when, if it sleeps
    since: int = 0  # when it became ready, or was put at the end: the order among equals
    bursts: list[tuple[int, int]] = field(default_factory=list)  # (woke, done), ns


class Machine:
    """``cpus`` CPUs; ``nodes`` divides them, in order. ``events()`` are the messages since."""

    def __init__(self, cpus: int, nodes: int = 1) -> None:
        self.ns = 1
        self.header = ffi.new("struct sy_header *", {"nodes": nodes})
        for cpu in range(cpus):
            self.header.cpu_node[cpu] = cpu * nodes // cpus
        self.sched = ffi.new("struct sy_tasks *")
        self.tasks: NDArray[np.void] = np.zeros(256, TASK_DTYPE)
        self.cpus: NDArray[np.void] = np.zeros(cpus, CPU_DTYPE)
        self.cpus["state"], self.cpus["seqnum"] = lib.SY_CPU_ONLINE | lib.SY_CPU_IDLE, 1
        self.threads: dict[int, Thread] = {}  # by gtid
        self.on: list[Thread | None] = [None] * cpus
        self.until = [0] * cpus  # end of a turn
        self.said: list[tuple[Any, ...]] = []
        self.seq = 0
        self.timers: dict[int, tuple[int, int]] = {}
        self.tick_ns = self.next_tick = 0
        self.ended: dict[int, Thread] = {}
        self.wasted = 0  # steps that a CPU was idle in while somebody could have run there

    # ---- threads
    def start(self, work: Iterable[tuple[float, float]], nice: int = 0, affinity: Iterable[int] | None = None, asid: int = 0, tid: int = 0) -> int:
        """A thread begins; its gtid. ``work``: (ms on a CPU, ms asleep)."""
        row = int(np.flatnonzero(self.tasks["gtid"] == 0)[0])
        tid = tid or 1000 + self.seq
        gtid = tid << lib.SY_GTID_SHIFT | (self.ns // STEP & 0xFFFFFFFF)
        t = self.tasks[row]
        self.tasks[row] = np.zeros(1, TASK_DTYPE)[0]
        t["gtid"], t["tid"], t["pid"], t["asid"], t["own_nice"], t["cpu"], t["run_cpu"] = gtid, tid, tid, asid, nice, -1, -1
        t["own_mask"][0] = sum(1 << c for c in (affinity if affinity is not None else range(len(self.cpus))))
        thread = Thread(row, deque((round(a * 1e6), round(b * 1e6)) for a, b in work), since=self.ns)
        thread.left = thread.work[0][0]
        self.threads[gtid] = thread
        self.sched.top = max(self.sched.top, row + 1)
        self.sched.count += 1
        self._woken(thread)
        self._say("TASK_NEW", thread, runnable=1)
        return gtid

    def end(self, gtid: int) -> None:
        """It is killed."""
        self._leave(self.threads[gtid], "TASK_DEAD")

    def set_affinity(self, gtid: int, cpus: Iterable[int]) -> None:
        thread = self.threads[gtid]
        t = self.tasks[thread.row]
        t["own_mask"][0] = sum(1 << c for c in cpus)
        self._say("TASK_AFFINITY_CHANGED", thread)
        if self._is(thread, "chosen") and t["run_cpu"] >= 0 and not self._may(thread, int(t["run_cpu"])):
            self._unchoose(thread)

    def _is(self, thread: Thread, flag: str) -> bool:
        return bool(self.tasks["flags"][thread.row] & _FLAGS[flag])

    def _set(self, thread: Thread, flag: str, to: bool) -> None:
        flags = int(self.tasks["flags"][thread.row])
        self.tasks["flags"][thread.row] = flags | _FLAGS[flag] if to else flags & ~_FLAGS[flag]

    def _may(self, thread: Thread, cpu: int) -> bool:
        return bool(int(self.tasks["own_mask"][thread.row][0]) >> cpu & 1)

    def _woken(self, thread: Thread) -> None:
        t = self.tasks[thread.row]
        t["wake_ns"], t["wake_runtime"], thread.wakes, thread.since = self.ns, t["runtime"], None, self.ns
        self._set(thread, "runnable", True)

    def _unchoose(self, thread: Thread) -> None:
        cpu = int(self.tasks["run_cpu"][thread.row])
        if cpu >= 0 and self.cpus["chosen"][cpu] == self.tasks["gtid"][thread.row]:
            self.cpus["chosen"][cpu] = 0
        self._set(thread, "chosen", False)
        self._set(thread, "standing", False)

    def _off(self, thread: Thread) -> None:
        for cpu, running in enumerate(self.on):
            if running is thread:
                self.on[cpu], self.cpus["on"][cpu] = None, 0
                self._set(thread, "on", False)

    def _leave(self, thread: Thread, message: str) -> None:
        cpu = int(self.tasks["run_cpu"][thread.row])
        was = self._is(thread, "chosen") and cpu >= 0
        self._off(thread)
        self._unchoose(thread)
        self.tasks["flags"][thread.row] = 0
        self._say(message, thread)
        if was:
            self._say_cpu("CPU_AVAILABLE", cpu)
        self.ended[int(self.tasks["gtid"][thread.row])] = self.threads.pop(int(self.tasks["gtid"][thread.row]))
        self.tasks["gtid"][thread.row] = 0
        self.sched.count -= 1

    def _block(self, thread: Thread) -> None:
        self._off(thread)
        self._set(thread, "runnable", False)
        cpu = int(self.tasks["run_cpu"][thread.row])
        free = self._is(thread, "chosen") and not self._is(thread, "standing")
        if free:
            self._unchoose(thread)
        self._say("TASK_BLOCKED", thread)
        if free and cpu >= 0:
            self._say_cpu("CPU_AVAILABLE", cpu)

    # ---- messages
    def _say(self, message: str, thread: Thread, **fields: int) -> None:
        t = self.tasks[thread.row]
        t["barrier"] += 1
        cpu = int(t["cpu"])
        if cpu >= 0:
            self.cpus["seqnum"][cpu] += 1
        self._put(message, {"gtid": int(t["gtid"]), "runtime": int(t["runtime"]), "barrier": int(t["barrier"]), "cpu": cpu, "nice": int(t["own_nice"])} | fields)

    def _say_cpu(self, message: str, cpu: int, cookie: int = 0) -> None:
        self.cpus["seqnum"][cpu] += 1
        self._put(message, {"cpu": cpu, "runtime": cookie})

    def _put(self, message: str, fields: dict[str, int]) -> None:
        row = np.zeros(1, TASK_MSG_DTYPE)
        self.seq += 1
        row["type"], row["length"], row["seqnum"] = getattr(lib, f"SY_MSG_{message}"), row.itemsize, self.seq
        for name, value in fields.items():
            row[name] = value
        self.said.append((message, row))

    def events(self) -> NDArray[np.void]:
        """Messages since, shape (n,), as ``struct sy_msg``."""
        rows, self.said = [row for _, row in self.said], []
        return np.concatenate(rows).view(MSG_DTYPE) if rows else np.zeros(0, MSG_DTYPE)

    # ---- time
    def step(self) -> None:
        """One step of time."""
        for thread in list(self.threads.values()):
            if thread.wakes is not None and self.ns >= thread.wakes:
                self._woken(thread)
                self._say("TASK_WAKEUP", thread, runtime=self.ns, runnable=1)
        self._dispatch()
        self.ns += STEP
        for running in self.on:
            if running is None:
                continue
            self.tasks["runtime"][running.row] += STEP
            self.tasks["switch_ns"][running.row] = self.ns
            running.left -= STEP
            if running.left > 0:
                continue
            running.bursts.append((int(self.tasks["wake_ns"][running.row]), self.ns))
            _, asleep = running.work.popleft()
            if not running.work:
                self._leave(running, "TASK_DEAD")
                continue
            running.left = running.work[0][0]
            if asleep:
                running.wakes = self.ns + asleep
                self._block(running)
        for cpu, (at, cookie) in list(self.timers.items()):
            if self.ns >= at:
                del self.timers[cpu]
                self._say_cpu("CPU_TIMER_EXPIRED", cpu, cookie)
        if self.tick_ns and self.ns >= self.next_tick:
            self.next_tick = self.ns + self.tick_ns
            for busy in np.flatnonzero(self.cpus["on"]):
                self._say_cpu("CPU_TICK", int(busy))

    def _dispatch(self) -> None:
        """Who runs where, for this step."""
        ready = [t for t in self.threads.values() if self._is(t, "runnable")]
        taken: set[int] = set()
        for cpu in range(len(self.cpus)):
            mine = [t for t in ready if t.row not in taken and self._may(t, cpu)]
            best = [t for t in mine if self._is(t, "chosen") and self.tasks["run_cpu"][t.row] in (-1, cpu)]
            if best:
                pick = min(best, key=lambda t: (-int(self.tasks["rank"][t.row]), t is not self.on[cpu], t.since))
            else:
                mine = [t for t in mine if not self._is(t, "chosen")]
                running = self.on[cpu]
                if running in mine and self.ns < self.until[cpu]:
                    pick = running
                elif mine:
                    pick = min(mine, key=lambda t: t.since)
                    pick.since = self.ns
                    self.until[cpu] = self.ns + TURN
                else:
                    pick = None
            if pick is not None:
                taken.add(pick.row)
            self._put_on(cpu, pick)
        rest = [t for t in ready if t.row not in taken]
        self.wasted += sum(t is None and any(self._may(w, cpu) for w in rest) for cpu, t in enumerate(self.on))

    def _put_on(self, cpu: int, thread: Thread | None) -> None:
        running = self.on[cpu]
        if running is thread:
            return
        if thread is not None:
            self._off(thread)
        if running is not None and running.row is not None and self.on[cpu] is running:
            self._off(running)
        self.on[cpu] = thread
        self.cpus["on"][cpu] = self.tasks["gtid"][thread.row] if thread else 0
        self.cpus["state"][cpu] = lib.SY_CPU_ONLINE | (0 if thread else lib.SY_CPU_IDLE)
        if thread is not None:
            self.tasks["cpu"][thread.row], self.tasks["switch_ns"][thread.row] = cpu, self.ns
            self._set(thread, "on", True)

    # ---- transactions
    def commit(self, ops: NDArray[np.void]) -> NDArray[np.void]:
        """Carries out operations, shape (n,), which are returned with their results."""
        ops = ops.copy()
        at = 0
        while at < len(ops):
            end = at
            while end < len(ops) and ops["op"][end] == lib.SY_OP_RUN and ops["order"][end] & lib.SY_RUN_SYNC:
                end += 1
            if end == at:
                ops["result"][at] = self._timer(ops[at]) if ops["op"][at] == lib.SY_OP_TIMER else self._check(ops[at])
                if ops["op"][at] == lib.SY_OP_RUN and ops["result"][at] == lib.SY_R_COMPLETE:
                    self._run(ops[at])
                at += 1
                continue
            group = ops[at:end]
            for i, op in enumerate(group):
                op["result"] = self._check(op)
                twice = [o for o in group[:i] if o["arg"] == op["arg"] or (o["pfn"] == op["pfn"] != lib.SY_ANY_CPU and not (o["order"] | op["order"]) & lib.SY_RUN_WAIT)]
                if twice:
                    op["result"] = lib.SY_R_INVALID_CPU
            if (group["result"] == lib.SY_R_COMPLETE).all():
                for op in group:
                    self._run(op)
            else:
                group["result"][group["result"] == lib.SY_R_COMPLETE] = lib.SY_R_POISONED
            at = end
        return ops

    def _timer(self, op: np.void) -> int:
        if op["pfn"] >= len(self.cpus):
            return int(lib.SY_R_INVALID_CPU)
        self.timers.pop(int(op["pfn"]), None)
        if op["barrier"]:
            self.timers[int(op["pfn"])] = (self.ns + int(op["barrier"]) * 1000, int(op["arg"]))
        return int(lib.SY_R_COMPLETE)

    def _check(self, op: np.void) -> int:
        """As ``check_run`` in the gateway."""
        flags, cpu, gtid = int(op["order"]), int(op["pfn"]), int(op["arg"])
        if op["op"] != lib.SY_OP_RUN:
            return int(lib.SY_R_NOT_PERMITTED)
        if flags & ~lib.SY_RUN_FLAGS or (flags & lib.SY_RUN_WAIT and flags & ~(lib.SY_RUN_WAIT | lib.SY_RUN_SYNC)):
            return int(lib.SY_R_INVALID_FLAGS)
        any_cpu = cpu == lib.SY_ANY_CPU or flags & lib.SY_RUN_WAIT
        if not any_cpu and cpu >= len(self.cpus):
            return int(lib.SY_R_INVALID_CPU)
        if not any_cpu and not self.cpus["state"][cpu] & lib.SY_CPU_ONLINE:
            return int(lib.SY_R_CPU_OFFLINE)
        if not any_cpu and op["asid"] and op["asid"] != self.cpus["seqnum"][cpu]:
            return int(lib.SY_R_AGENT_STALE)
        if not gtid:
            return int(lib.SY_R_INVALID_CPU if any_cpu else lib.SY_R_COMPLETE)
        if not gtid >> lib.SY_GTID_SHIFT:
            return int(lib.SY_R_INVALID_TARGET)
        thread = self.threads.get(gtid)
        if thread is None:
            return int(lib.SY_R_NOT_FOUND)
        if self.tasks["barrier"][thread.row] != op["barrier"]:
            return int(lib.SY_R_STALE)
        if flags & lib.SY_RUN_WAIT:
            return int(lib.SY_R_COMPLETE)
        if not self._is(thread, "runnable") and not flags & lib.SY_RUN_STANDING:
            return int(lib.SY_R_TARGET_NOT_RUNNABLE)
        if not any_cpu and not self._may(thread, cpu):
            return int(lib.SY_R_INVALID_CPU)
        elsewhere = self._is(thread, "chosen") and self.tasks["run_cpu"][thread.row] not in (-1, cpu)
        if elsewhere and self._is(thread, "runnable") and not flags & lib.SY_RUN_ALLOW_ONCPU:
            return int(lib.SY_R_TARGET_ONCPU)
        return int(lib.SY_R_COMPLETE)

    def _run(self, op: np.void) -> None:
        flags, cpu = int(op["order"]), int(op["pfn"])
        thread = self.threads.get(int(op["arg"]))
        if thread is not None:
            self._unchoose(thread)
        if flags & lib.SY_RUN_WAIT:
            return
        if cpu != lib.SY_ANY_CPU:
            before = self.threads.get(int(self.cpus["chosen"][cpu]))
            if before is not None and before is not thread:
                self._unchoose(before)
                before.since = self.ns
                if self._is(before, "runnable") and not flags & lib.SY_RUN_ELIDE_PREEMPT:
                    self._say("TASK_PREEMPT", before, runnable=1)
        if thread is None:
            return
        t = self.tasks[thread.row]
        t["run_cpu"], t["rank"] = -1 if cpu == lib.SY_ANY_CPU else cpu, flags >> lib.SY_RUN_RANK_SHIFT & (lib.SY_RUN_RANKS - 1)
        thread.since = self.ns
        self._set(thread, "chosen", True)
        self._set(thread, "standing", bool(flags & lib.SY_RUN_STANDING))
        if cpu != lib.SY_ANY_CPU:
            self.cpus["chosen"][cpu] = t["gtid"]


class Run:
    """A policy on a machine: messages in, decisions out, ``delay`` steps later, as over a bus.

    :param policy_class: None: nothing but the machine's own choice
    """

    def __init__(self, machine: Machine, policy_class: type[BasePolicy] | None, delay: int = 2, frames: NDArray[np.void] | None = None) -> None:
        self.machine, self.delay = machine, delay
        self.frames = np.zeros(1, FRAME_DTYPE) if frames is None else frames
        self.late: deque[tuple[int, NDArray[np.void]]] = deque()
        self.policy: Any = None
        if policy_class is not None:
            self.agent(policy_class)

    def agent(self, policy_class: type[BasePolicy]) -> None:
        """A new instance takes over, from the tables."""
        m = self.machine
        nodes = m.header.nodes
        self.policy = policy_class(self.frames, m.header, [(0, len(self.frames) // nodes)] * nodes, Transaction(self.frames), lambda: m.ns / 1e9)
        self.policy.sched, self.policy.cpus, self.policy.tasks = m.sched, m.cpus, m.tasks
        self.handlers = handlers_of(self.policy)
        self.wanted = set(self.policy.words().get("messages", ()))
        m.tick_ns = self.policy.words().get("tick", [0])[0] * 1000
        m.events()
        self.late.clear()
        self.policy.rebuild()
        self._decide()

    def _decide(self) -> None:
        self.decided = self.machine.ns
        self.policy.step()
        commit(self.policy, self.machine.commit)

    def run(self, ms: float) -> None:
        """So many milliseconds of the machine's time."""
        end = self.machine.ns + round(ms * 1e6)
        while self.machine.ns < end:
            self.machine.step()
            if self.policy is None:
                self.machine.events()
                continue
            if len(events := self.machine.events()):
                self.late.append((self.machine.ns + self.delay * STEP, events))
            due = []
            while self.late and self.late[0][0] <= self.machine.ns:
                due.append(self.late.popleft()[1])
            if due:
                batch = np.concatenate(due)
                batch = batch[np.isin(batch["type"], list(self.wanted))]
                if len(batch):
                    self.policy.dispatch(self.handlers, batch)
                    self._decide()
            elif self.machine.ns - self.decided >= self.policy.tick * 1e9:
                self._decide()
