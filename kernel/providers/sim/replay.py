"""Policies on a simulated machine: the classes that live components run, called as their runtime calls them; and a trace with one of kswapd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.policy import BasePolicy, Transaction, commit, dispatch, handlers_of
from kernel.abi import lib
from kernel.providers.sim.base import Base
from kernel.providers.sim.machine import Machine
from kernel.providers.sim.programs import Programs
from kernel.providers.sim.trace import Trace

MOST_BETWEEN = 64  # accesses between two steps of kswapd
ACCESS = 1e-6  # seconds that one takes, on the machine's clock
SPAN = 1 << 16  # accesses looked at in one go, at most, when nothing happens


class Agent:
    """A component's policy on a simulated machine, called as its runtime calls it.

    :param component: enum sy_component_id
    """

    def __init__(self, machine: Base, policy: type[BasePolicy], component: int) -> None:
        self.machine, self.component = machine, component
        self.policy = policy(_read_only(machine.frames), machine.header, machine.nodes, Transaction(machine.frames), lambda: machine.now)
        self.policy.heat, self.policy.slots = _read_only(machine.heat), _read_only(machine.slots)
        if isinstance(machine, Programs) and machine.ram[0].nbytes == lib.SY_PAGE_SIZE:
            self.policy.ram = [_read_only(machine.ram[base : base + size].view(np.uint8)) for base, size in machine.nodes]
        self.handlers = handlers_of(self.policy)
        self.policy.rebuild()

    def step(self, events: NDArray[np.void]) -> None:
        """Events in, transactions out."""
        if len(events):
            dispatch(self.handlers, events)
        self.policy.step()
        commit(self.policy, lambda ops: self.machine.commit(ops, self.component))


def _read_only(table: NDArray[Any]) -> NDArray[Any]:
    view = table.view()
    view.flags.writeable = False
    return view


class Replay:
    """
    :param every: accesses between two steps of the policy while events come. By default half the low watermark, at most
        ``MOST_BETWEEN``: as a live kswapd, which takes a millisecond or so, it usually comes before the last frame is taken, and has no
        say in each fault
    """

    def __init__(self, machine: Machine, policy: type[BasePolicy], every: int | None = None) -> None:
        self.machine = machine
        self.every = every or max(1, min(MOST_BETWEEN, machine.header.watermark[0].low // 2))
        self.agent = Agent(machine, policy, lib.SY_C_KSWAPD)
        self.policy = self.agent.policy

    def step(self) -> None:
        """Events in, transactions out."""
        self.agent.step(self.machine.events())

    def run(self, pages: NDArray[np.int64], progress: Callable[[int], None] = lambda _done: None) -> None:
        """Accesses, shape (n,), and a step after every ``every`` of them among which something happened.

        :param progress: called now and then with the accesses done
        :raises StoreFull: no frame, no slot
        """
        at, span, began = 0, self.every, self.machine.now
        window_ends = 0
        while at < len(pages):
            start = at
            done = self.machine.hits(pages[at : at + span])
            span = min(2 * span, SPAN) if done == span else self.every
            at += done
            end = min((at // self.every + 1) * self.every, len(pages))
            self.machine.access(pages[at:end])
            self.machine.note(pages[start:end])
            if end >= window_ends:
                window_ends = end + len(self.machine.frames)
                self.machine.end_window()
            self.machine.now = began + end * ACCESS
            self.step()
            at = end
            progress(at)


@dataclass(frozen=True)
class Result:
    """Of one replay. ``faults`` = first touches + refaults; ``hints``: touches of pages in RAM that AGE had taken away; ``evicted``
    by anybody, of which ``by_gateway`` because kswapd was too late."""

    faults: int
    refaults: int
    hints: int
    evicted: int
    by_gateway: int


def replay(
    trace: Trace, policy: type[BasePolicy], frames: int, nodes: int = 1, every: int | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> Result:  # fmt: skip
    """The whole trace on a machine of its own. The same arguments, the same result. :raises ValueError: as ``Machine``"""
    m = Machine(trace.vpages, frames, nodes)
    Replay(m, policy, every).run(trace.pages, progress)
    assert not (broken := m.check()), broken
    return Result(m.faults, m.refaults, m.hints, m.swapped_out, m.by_gateway)
