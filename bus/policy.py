"""What a policy is: a class with a handler per message and a ``step()``. No sockets, no descriptors, no process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bus.codec import MAX_OPS
from bus.topics import MESSAGES
from kernel.abi import CPU_DTYPE, HEAT_DTYPE, OP_DTYPE, STORED_DTYPE, TASK_DTYPE, ffi, lib

Handler = Callable[[NDArray[np.void]], None]


class Tunable(NamedTuple):
    """What an operator may set of a policy (``sylvie tune``): least <= value <= most."""

    default: float
    least: float
    most: float
    what: str


class Transaction:
    """Operations that a policy has decided on and that the runtime will commit in one batch.

    The barrier of each is read from the frame table here, at the time of the decision: if the frame changes before the
    gateway carries the operation out, its result is STALE and nothing happened.
    """

    def __init__(self, frames: NDArray[np.void]) -> None:
        self._frames = frames
        self._parts: list[NDArray[np.void]] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, op: int, pfns: ArrayLike, order: int, asid: int = 0, arg: int = 0) -> None:
        """One operation for each of ``pfns``, a number or an array of them. ``IndexError`` if one is not in the
        table."""
        at = np.atleast_1d(np.asarray(pfns, np.int64))
        part = np.zeros(len(at), OP_DTYPE)
        part["op"], part["order"], part["asid"], part["arg"] = op, order, asid, arg
        part["pfn"] = at
        part["barrier"] = self._frames["barrier"][at]
        self._parts.append(part)

    def grant(self, asid: int, pfns: ArrayLike, order: int) -> None:
        """Free blocks of 2**order frames into the magazine of ``asid``."""
        self.add(lib.SY_OP_GRANT, pfns, order, asid)

    def reserve(self, pfns: ArrayLike, order: int) -> None:
        """Free blocks into the gateway's reserve."""
        self.add(lib.SY_OP_RESERVE, pfns, order)

    def release(self, pfns: ArrayLike, order: int) -> None:
        """Blocks of the gateway's reserve become free."""
        self.add(lib.SY_OP_RELEASE, pfns, order)

    def fault_order(self, asid: int, order: int, most: int = 0, first: int = 0, chunks: int = 0) -> None:
        """Order of the block that a first touch takes, and up to which it may grow for a sequential toucher (``most``); for an
        address space, or for ``chunks`` ranges of 512 pages from number ``first`` on (SY_ORDER_DEFAULT: as for the address space)."""
        part = np.zeros(1, OP_DTYPE)
        part["op"], part["asid"], part["order"], part["arg"] = lib.SY_OP_FAULT_ORDER, asid, order, most
        part["pfn"], part["barrier"] = first, chunks
        self._parts.append(part)

    def prefetch(self, slots: NDArray[np.void], at: NDArray[np.int64]) -> None:
        """The pages in these slots, in order, back into frames before they are asked for; neighbours in a row are cheapest.

        :param slots: the policy's ``slots``
        :param at: which, shape (n,)
        """
        part = np.zeros(len(at), OP_DTYPE)
        part["op"], part["pfn"] = lib.SY_OP_PREFETCH, at
        part["asid"], part["arg"], part["barrier"] = slots["asid"][at], slots["vpage"][at], slots["out"][at]
        self._parts.append(part)

    def run(self, gtid: int, cpu: int, barrier: int, flags: int = 0, agent_barrier: int = 0) -> None:
        """A thread onto a CPU: see RUN in the ABI.

        :param gtid: 0: nothing is chosen for that CPU any more
        :param cpu: or SY_ANY_CPU
        :param barrier: the thread's, from its status word or its last message
        :param flags: SY_RUN_…, and its rank << SY_RUN_RANK_SHIFT
        :param agent_barrier: ``cpus[cpu]["seqnum"]`` that it was decided on; 0: whatever it is
        """
        part = np.zeros(1, OP_DTYPE)
        part["op"], part["order"], part["arg"], part["pfn"] = lib.SY_OP_RUN, flags, gtid, cpu
        part["barrier"], part["asid"] = barrier, agent_barrier
        self._parts.append(part)

    def timer(self, cpu: int, microseconds: int, cookie: int = 0) -> None:
        """CPU_TIMER_EXPIRED for that CPU by then; 0: not any more."""
        part = np.zeros(1, OP_DTYPE)
        part["op"], part["pfn"], part["barrier"], part["arg"] = lib.SY_OP_TIMER, cpu, microseconds, cookie
        self._parts.append(part)

    def take(self) -> NDArray[np.void]:
        """All queued operations, in order, shape (n,); the queue is empty afterwards."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.zeros(0, OP_DTYPE)


class BasePolicy:
    """Base of every policy; everything here may be left as it is.

    A method named after a message in lower case is its handler: ``def page_mapped(self, events)`` gets the events of
    that type in one batch, shape (n,), as ``struct sy_msg`` (``events.view(TASK_MSG_DTYPE)`` for those of tasks and CPUs). The runtime subscribes to what has a handler.

    The tables are the truth and an event says where to look: the gateway changes the table before it tells, so the
    table may already be ahead of the event at hand, and after ``rebuild()`` events may come whose effect is in the
    tables already. Handlers must be right then too. Of one batch, types are handled in ascending order of their
    number.
    """

    tick = 0.1  # seconds after which step() is called although nothing came
    # Each is an attribute of that name; it is set before rebuild(), by a restart.
    tunables: ClassVar[dict[str, Tunable]] = {}

    def __init__(
        self,
        frames: NDArray[np.void],
        header: Any,
        nodes: list[tuple[int, int]],
        txn: Transaction,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.frames = frames  # struct sy_frame, shape (frames,), read-only
        # The runtime puts the gateway's in their place before rebuild().
        # struct sy_heat, shape (frames,), read-only: what the access monitor saw of each frame's page
        self.heat: NDArray[np.void] = np.zeros(len(frames), HEAT_DTYPE)
        # struct sy_stored, shape (slots,), read-only: which page each slot of the store has; asid 0: none
        self.slots: NDArray[np.void] = np.zeros(0, STORED_DTYPE)
        # for ksm only: the pages of each node, shape (frames of the node, 4096), read-only
        self.ram: list[NDArray[np.uint8]] = []
        # Threads that sched schedules: struct sy_tasks; struct sy_cpu, shape (SY_MAX_CPUS,); struct sy_task, shape (SY_MAX_TASKS,); all read-only
        self.sched: Any = ffi.new("struct sy_tasks *")
        self.cpus: NDArray[np.void] = np.zeros(0, CPU_DTYPE)
        self.tasks: NDArray[np.void] = np.zeros(0, TASK_DTYPE)
        self.header = header  # struct sy_header, read-only
        self.nodes = nodes  # (first pfn, frames) of each node
        self.txn = txn
        for name, tunable in self.tunables.items():
            setattr(self, name, tunable.default)
        self.now = now  # seconds; a policy asks no other clock, so that a simulated machine can have its own

    def dispatch(self, handlers: dict[int, Handler], events: NDArray[np.void]) -> None:
        """Hands one batch, shape (n,), to the handlers: type by type, in ascending order of their number."""
        dispatch(handlers, events)

    gather = 0.0  # seconds between two steps, at least: who is in no hurry handles more events at once

    def asleep(self) -> bool:
        """Is there nothing to do on this enclave, ever? Then no event is sent to this process."""
        return False

    def rebuild(self) -> None:
        """Forget everything and start from the tables: at start, and after events were lost."""

    def step(self) -> None:
        """Decide: called after each batch and at least once a ``tick``. Queue operations on ``self.txn``."""

    def result(self, ops: NDArray[np.void]) -> None:
        """What became of the operations of the last step; operations queued here are committed at once."""

    def dump(self) -> dict[str, Any]:
        """State for people and tests; travels with each heartbeat, so: short and cheap."""
        return {}

    def words(self) -> dict[str, list[int]]:
        """Tunables for the gateway to keep, by name; sent once, with HELLO. See ``kernel/gateway.py``."""
        return {}


def handlers_of(policy: BasePolicy) -> dict[int, Handler]:
    """A policy's handlers by message type; none while it is asleep."""
    return {
        value: getattr(policy, message.lower())
        for message, value in MESSAGES.items()
        if hasattr(policy, message.lower()) and not policy.asleep()
    }


def dispatch(handlers: dict[int, Handler], events: NDArray[np.void]) -> None:
    """Hands one batch, shape (n,), to the handlers, type by type in ascending order."""
    types = events["type"]
    present = np.flatnonzero(np.bincount(types, minlength=1)).tolist()
    for kind in present:
        handler = handlers.get(kind)
        if handler is not None:
            handler(events if len(present) == 1 else events[types == kind])


def commit(policy: BasePolicy, send: Callable[[NDArray[np.void]], NDArray[np.void]]) -> None:
    """Sends what a policy has queued and tells it the results.

    :param send: carries out at most ``MAX_OPS`` operations, shape (n,), and returns them with ``result`` filled in
    """
    # result() may answer a failure with other operations; a policy that always does must not starve the events.
    for _ in range(4):
        ops = policy.txn.take()
        if not len(ops):
            return
        for start in range(0, len(ops), MAX_OPS):
            policy.result(send(ops[start : start + MAX_OPS]))
