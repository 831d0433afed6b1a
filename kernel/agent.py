"""ghOSt's library in Python, in ghOSt's terms: what a scheduler is written with. ``docs/ghost.md`` maps each name to ghost-userspace's.

A scheduler is a class with one handler a message and a ``schedule()``, as there (``lib/scheduler.h``). One process decides for all CPUs of the enclave: ghOSt's agents, one
pinned to each CPU, are threads of a kernel that hands the CPU over to them; here the kernel never waits, see ``RunRequest``.

On a stock kernel a thread that is not chosen *waits*: it has the attributes that it set itself, so the kernel runs it whenever nothing that is chosen wants its CPU. What
is chosen runs by SCHED_FIFO. So no CPU is idle while somebody waits, and without a scheduler all that is left is the kernel's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy, Handler
from bus.topics import MESSAGES
from kernel.abi import TASK_MSG_DTYPE, lib, names

__all__ = ["ANY_CPU", "Cpu", "Gtid", "Message", "RunRequest", "Scheduler", "StatusWord", "Task", "Topology", "txn_state"]

ANY_CPU: int = lib.SY_ANY_CPU
_KIND = {value: name for name, value in MESSAGES.items() if name.startswith(("TASK_", "CPU_"))}
_STATES = names("SY_R_")
# What a scheduler must know of whatever else it handles.
_ALWAYS = ("TASK_NEW", "TASK_DEAD", "TASK_DEPARTED")


def txn_state(result: int) -> str:
    """A transaction's state by ghOSt's name, without GHOST_TXN_ (``enum ghost_txn_state``)."""
    name = _STATES[result]
    return {"STALE": "TARGET_STALE", "NOT_FOUND": "TARGET_NOT_FOUND"}.get(name, name)


class Gtid(int):
    """Names a thread for good: its tid and when it began (ghOSt's ``lib/ghost.h``)."""

    @property
    def tid(self) -> int:
        return int(self) >> lib.SY_GTID_SHIFT


@dataclass(frozen=True)
class StatusWord:
    """A thread's status word: a view of its row of ``tasks``, always as it is now (ghOSt's ``StatusWord``)."""

    row: np.void

    @property
    def gtid(self) -> Gtid:
        return Gtid(self.row["gtid"])

    @property
    def barrier(self) -> int:
        """Messages about it so far."""
        return int(self.row["barrier"])

    @property
    def on_cpu(self) -> bool:
        return bool(self.row["flags"] & lib.SY_TF_ON_CPU)

    @property
    def runnable(self) -> bool:
        """… or running."""
        return bool(self.row["flags"] & lib.SY_TF_RUNNABLE)

    @property
    def chosen(self) -> bool:
        return bool(self.row["flags"] & lib.SY_TF_CHOSEN)

    @property
    def nice(self) -> int:
        return int(self.row["own_nice"])

    @property
    def cpu(self) -> int:
        """That it is on, or was last; -1: not known."""
        return int(self.row["cpu"])

    def runtime(self, now_ns: int) -> int:
        """Nanoseconds on a CPU so far."""
        since = max(0, now_ns - int(self.row["switch_ns"])) if self.on_cpu else 0
        return int(self.row["runtime"]) + since

    def affinity(self) -> set[int]:
        """CPUs that it may use, as it set that itself."""
        return {64 * k + bit for k, word in enumerate(self.row["own_mask"].tolist()) if word for bit in range(64) if word >> bit & 1}


@dataclass(frozen=True)
class Message:
    """One message (``lib/channel.h``): a row of ``struct sy_task_msg``; its fields have ghOSt's names."""

    row: np.void

    @property
    def type(self) -> str:
        return _KIND[int(self.row["type"])]

    @property
    def gtid(self) -> Gtid:
        return Gtid(self.row["gtid"])

    @property
    def seqnum(self) -> int:
        """Of its source: the thread's barrier after it."""
        return int(self.row["barrier"])

    def __getattr__(self, name: str) -> int:
        """``cpu cpu_seqnum runtime last_cpu waker_cpu nice runnable``."""
        try:
            return int(self.row[name])
        except ValueError:
            raise AttributeError(name) from None


@dataclass
class Task:
    """What a scheduler keeps of a thread; a policy may add attributes of its own (``lib/scheduler.h``, ``Task<>``)."""

    gtid: Gtid
    status: StatusWord
    seqnum: int  # of the last message that was handled
    cpu: int = -1  # that its queue is for, or that it was chosen for
    queued: bool = False
    own: dict[str, Any] = field(default_factory=dict)

    def may_use(self, cpu: int) -> bool:
        return bool(int(self.status.row["own_mask"][cpu // 64]) >> cpu % 64 & 1)


@dataclass
class RunRequest:
    """A transaction that puts a thread on a CPU (``lib/enclave.h``): open, then commit. All that one step commits goes together; its state comes by ``run_done``.

    :param run_flags: SY_RUN_…, as in the ABI. STANDING: decided already, also for after it has blocked and woken, so that no wake-up waits for us
    :param rank: among what is chosen, 0 to 7; the higher runs first
    """

    target: Task | None
    cpu: int = ANY_CPU
    target_barrier: int | None = None  # None: the status word's, which is what was decided on
    agent_barrier: int = 0  # 0: whatever has been said of that CPU since
    run_flags: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Cpu:
    """One CPU of the machine (``lib/topology.h``): numbers of its core, last-level cache and node."""

    id: int
    core: int
    l3: int
    node: int
    siblings: frozenset[int]


class Topology:
    """The machine's CPUs, from sysfs."""

    def __init__(self, cpus: Iterable[int], cpu_node: NDArray[np.uint8] | bytes = b"", root: Path = Path("/sys/devices/system/cpu")) -> None:
        def read(cpu: int, name: str, otherwise: str) -> str:
            try:
                return (root / f"cpu{cpu}" / name).read_text().strip()
            except OSError:
                return otherwise

        self.cpus: dict[int, Cpu] = {}
        for cpu in sorted(cpus):
            siblings = frozenset(_list(read(cpu, "topology/thread_siblings_list", str(cpu))))
            cache = _list(read(cpu, "cache/index3/shared_cpu_list", read(cpu, "topology/package_cpus_list", str(cpu))))
            self.cpus[cpu] = Cpu(cpu, min(siblings), min(cache), int(cpu_node[cpu]) if len(cpu_node) > cpu else 0, siblings)

    def __iter__(self) -> Iterator[Cpu]:
        return iter(self.cpus.values())

    def on_node(self, node: int) -> list[int]:
        return [c.id for c in self if c.node == node]


def _list(text: str) -> list[int]:
    """"0-2,5" → [0, 1, 2, 5]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


class Scheduler(BasePolicy):
    """Base of schedulers. A method named after a message is its handler, ``def task_wakeup(self, task, msg)``, ``def cpu_tick(self, cpu, msg)``; what has none is not
    sent. Messages come in the order in which they happened. Handlers change the scheduler's own state; ``schedule()``, called after each batch, decides.

    Tasks are found in the status words when it starts, and whenever messages were lost: then ``task_new`` is called for each, and every queue is empty before
    (``forget``).
    """

    tick_us: ClassVar[int] = 0  # between two CPU_TICK, for each CPU that one of ours is on
    look_ms: ClassVar[float] = 100  # schedule() is called so often though nothing came, while there are threads; cheaper than ticks, which come over the bus

    def words(self) -> dict[str, list[int]]:
        handled = [v for n, v in MESSAGES.items() if n.startswith(("TASK_", "CPU_")) and hasattr(self, n.lower())]
        return {"messages": sorted({*handled, *(MESSAGES[n] for n in _ALWAYS)}), "tick": [self.tick_us if hasattr(self, "cpu_tick") else 0]}

    # ---- handlers that every scheduler has
    def task_new(self, task: Any, msg: Any = None) -> None:
        """A thread is ours; ``task.status.runnable``."""

    def task_dead(self, task: Any, msg: Any = None) -> None:
        """… and is not any more: it has ended, …"""

    def task_departed(self, task: Any, msg: Any = None) -> None:
        """… or was taken away."""
        self.task_dead(task, msg)

    @property
    def tick(self) -> float:  # type: ignore[override]
        return self.look_ms / 1000 if self.sched.count else 0.1

    def forget(self) -> None:
        """Everything that was queued."""

    def schedule(self) -> None:
        """Decide: ``run``, ``wait``, ``unrun``."""

    def run_failed(self, task: Task, cpu: int, state: str) -> None:
        """A RUN was not carried out, as ``txn_state`` says. A message that explains it has come, or will."""

    # ---- what they decide with
    def run(self, task: Task, cpu: int = ANY_CPU, rank: int = 0, run_flags: int = 0) -> None:
        """``task`` onto ``cpu``, from whatever was chosen for it."""
        self.commit(RunRequest(task, cpu, run_flags=run_flags, rank=rank))

    def wait(self, task: Task) -> None:
        """``task`` waits again."""
        self.commit(RunRequest(task, run_flags=lib.SY_RUN_WAIT))

    def unrun(self, cpu: int) -> None:
        """Nothing is chosen for ``cpu`` any more."""
        self.commit(RunRequest(None, cpu))

    def commit(self, *requests: RunRequest, sync: bool = False) -> None:
        """Goes out with all others of this step. ``sync``: all of these are carried out, or none (ghOSt's sync group)."""
        for r in requests:
            flags = r.run_flags | r.rank << lib.SY_RUN_RANK_SHIFT | (lib.SY_RUN_SYNC if sync else 0)
            barrier = 0 if r.target is None else r.target.status.barrier if r.target_barrier is None else r.target_barrier
            self.txn.run(r.target.gtid if r.target else 0, r.cpu, barrier, flags, r.agent_barrier)

    def now_ns(self) -> int:
        return int(self.now() * 1e9)

    def online(self) -> list[int]:
        """CPUs of the enclave."""
        return [int(c) for c in np.flatnonzero(self.cpus["state"] & lib.SY_CPU_ONLINE)]

    # ---- what the runtime calls
    def rebuild(self) -> None:
        self.known: dict[int, Task] = {}
        self.topology = Topology(self.online() or sorted(os.sched_getaffinity(0)), bytes(self.header.cpu_node[i] for i in range(lib.SY_MAX_CPUS)))
        self.forget()
        for row in np.flatnonzero(self.tasks["gtid"][: self.sched.top]):
            self._found(int(row), None)

    def _found(self, row: int, msg: Message | None) -> Task:
        status = StatusWord(self.tasks[row])
        task = Task(status.gtid, status, msg.seqnum if msg else status.barrier)
        self.known[int(task.gtid)] = task
        self.task_new(task, msg)
        return task

    def dispatch(self, handlers: dict[int, Handler], events: NDArray[np.void]) -> None:
        """In the order in which they happened, whatever their type."""
        del handlers
        for row in events.view(TASK_MSG_DTYPE):
            msg = Message(row)
            kind = msg.type
            if kind.startswith("CPU_"):
                getattr(self, kind.lower())(msg.cpu, msg)
                continue
            task = self.known.get(msg.gtid)
            if task is None:
                # (who has ended meanwhile has no status word any more, and needs no place)
                if kind == "TASK_NEW" and len(at := np.flatnonzero(self.tasks["gtid"][: self.sched.top] == msg.gtid)):
                    self._found(int(at[0]), msg)
                continue
            if (msg.seqnum - task.seqnum) & 0x80000000 or msg.seqnum == task.seqnum:
                continue  # what it was found with had this in it
            task.seqnum = msg.seqnum
            if kind in ("TASK_DEAD", "TASK_DEPARTED"):
                del self.known[msg.gtid]
            if (handler := getattr(self, kind.lower(), None)) is not None:
                handler(task, msg)

    def step(self) -> None:
        self.schedule()

    def result(self, ops: NDArray[np.void]) -> None:
        for op in ops[ops["result"] != lib.SY_R_COMPLETE]:
            task = self.known.get(int(op["arg"]))
            if task is not None and op["op"] == lib.SY_OP_RUN:
                self.run_failed(task, int(op["pfn"]), txn_state(int(op["result"])))

    def dump(self) -> dict[str, Any]:
        return {"tasks": len(self.known)}
