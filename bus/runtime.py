"""The life of a component: everything that is not policy.

start → drop privileges → map the tables → subscribe → HELLO (answers with the sequence number at which events begin to
count) → rebuild from the tables → events in, transactions out, heartbeats → SIGTERM.

Subscribing comes before HELLO, and both before the tables are read: so every change is either in the tables when they
are read or in an event that is handled afterwards, or in both, never in neither.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import importlib
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from bus.client import Control, GatewayGone, subscriber
from bus.codec import BusError, decode_batch, field
from bus.keys import COMPONENT_IDS, uid_of
from bus.policy import BasePolicy, Transaction, commit, handlers_of
from bus.tables import Tables
from bus.topics import MESSAGES, TOPICS, topic_of
from kernel.abi import OP_DTYPE, ffi, lib

RT_TIME = (1_000_000, 2_000_000)  # microseconds at a real-time priority without a pause: SIGXCPU, SIGKILL
HEARTBEAT = 0.5  # seconds between two
# Seconds to wait for answers while joining: a gateway that populates RAM which the host must first find may be slow, and
# starting over would only begin the wait anew.
JOIN_PATIENCE = 30.0
PATIENCE = 5.0  # seconds without an answer after which the gateway is taken for dead
LATE = 2.0  # seconds after which an event that was sent and has not come counts as lost
BURST = 256  # batches handled in one go
DEFAULT_RUN_DIR = "/run/sylvie"
_NAME = {value: name for name, value in MESSAGES.items()}
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h

log = logging.getLogger("sylvie")


def drop_privileges(component: str) -> None:
    """Becomes the component's own user, for good; does nothing but forbid new privileges if already unprivileged."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if component == "sched":  # it goes before all that it schedules; if it runs without a pause for so long, it is ended
        resource.setrlimit(resource.RLIMIT_RTTIME, RT_TIME)
    if os.geteuid() == 0:
        uid = uid_of(component)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def wait_for_gateway(run_dir: str | Path) -> None:
    """Returns when the gateway says that it is ready, or after ``JOIN_PATIENCE``: both are started at once, and who started
    a component anew would look for its end only once a second."""
    deadline = time.monotonic() + JOIN_PATIENCE
    while not (Path(run_dir) / "gateway.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def fetch_tables(run_dir: str | Path, component: int) -> Tables:
    """The tables, from the gateway's Unix socket. :raises BusError: refused; OSError: no gateway there."""
    path = Path(run_dir) / "gateway.sock"
    hello = ffi.new("struct sy_hello *", (lib.SY_MAGIC, lib.SY_ABI_VERSION, lib.SY_HELLO_COMPONENT, component))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as conn:
        conn.settimeout(JOIN_PATIENCE)
        conn.connect(str(path))
        conn.send(bytes(ffi.buffer(hello)))
        room = socket.CMSG_SPACE((5 + lib.SY_MAX_NODES) * array.array("i").itemsize)
        data, ancillary, _, _ = conn.recvmsg(ffi.sizeof("struct sy_welcome"), room)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
    try:
        if len(data) < ffi.sizeof("struct sy_welcome"):
            raise BusError(f"{path} answered with {len(data)} bytes")
        welcome = ffi.from_buffer("struct sy_welcome[]", data)[0]
        if welcome.status == lib.SY_W_ABI:
            raise BusError(f"ABI {lib.SY_ABI_VERSION} asked, gateway speaks {welcome.abi}: build both from one tree")
        if welcome.status != lib.SY_W_OK or len(fds) < 5:
            raise BusError(f"the gateway refused the tables to component {component}, uid {os.geteuid()}")
        return Tables(fds[0], fds[1], fds[2], fds[3], fds[4], list(fds[5:]))
    finally:
        for fd in fds:
            os.close(fd)


class Runtime:
    """One component on the bus of ``run_dir``. Single-threaded; ``stop`` may be called from a signal handler."""

    def __init__(self, name: str, implementation: str, policy_class: type[BasePolicy], run_dir: str | Path) -> None:
        self.name, self.implementation = name, implementation
        self.run_dir = Path(run_dir)
        self.stopping = False
        self.rebuilds = self.gaps = self.events = 0
        self.tables = fetch_tables(run_dir, COMPONENT_IDS[name])
        self.txn = Transaction(self.tables.frames)
        t = self.tables
        self.policy = policy_class(t.frames, t.header, t.nodes, self.txn)
        self.policy.heat, self.policy.slots, self.policy.ram = t.heat, t.slots, t.ram
        self.policy.sched, self.policy.cpus, self.policy.tasks = t.sched, t.cpus, t.tasks
        for tunable, value in tuned(name, policy_class, run_dir).items():
            setattr(self.policy, tunable, value)
        self._handlers = handlers_of(self.policy)
        # In the order of TOPICS: the gateway's sync batches come in that order too, see join().
        wanted = {topic_of(_NAME[value]) for value in self._handlers}
        self._topics = [topic for topic in TOPICS if topic in wanted]
        self._next: dict[bytes, int] = {}  # sequence number of the next event of each topic
        self._promised: dict[bytes, int] = {}  # … as the gateway said at _promised_at, until all of it has come
        self._promised_at = 0.0
        self._beat_at = 0.0
        self.control = Control(run_dir, JOIN_PATIENCE, name)
        self.events_in = subscriber(run_dir, self._topics, name) if self._topics else None

    # ---- joining ----
    def join(self) -> None:
        """Subscribes for certain, says HELLO, rebuilds. :raises BusError: refused, or no gateway."""
        self._wait_for_subscription()
        answer = self.control.request(
            {
                "t": "hello", "name": self.name, "implementation": self.implementation, "abi": lib.SY_ABI_VERSION,
                "pid": os.getpid(), "words": self.policy.words(), "heat": lib.SY_MSG_HEAT_READY in self._handlers,
            }
        )  # fmt: skip
        self._next = self._promise(answer)
        self._rebuild()
        if not self.stopping:
            self.control.timeout = PATIENCE

    def _wait_for_subscription(self) -> None:
        """A subscription takes effect some time after connect(). The gateway answers "sync" with an empty batch on
        every topic, in order: when that of our last topic arrives, all have."""
        deadline = time.monotonic() + JOIN_PATIENCE
        while self.events_in is not None:
            self.control.request({"t": "sync"})
            while self.events_in.poll(50):
                if decode_batch(self.events_in.recv_multipart())[0] == self._topics[-1]:
                    return
            if time.monotonic() > deadline:
                raise GatewayGone(f"no event within {JOIN_PATIENCE:g} s after subscribing to {self._topics}")

    @staticmethod
    def _promise(answer: dict[str, Any]) -> dict[bytes, int]:
        return {topic.encode(): seq for topic, seq in field(answer, "seqs", dict).items()}

    def _rebuild(self) -> None:
        self.rebuilds += 1
        self.policy.rebuild()

    # ---- the loop ----
    def run(self) -> None:
        """Works until ``stop``. :raises BusError: the gateway has gone or does not want this process any more."""
        stepped = 0.0
        while not self.stopping:
            if (early := stepped + self.policy.gather - time.monotonic()) > 0:
                time.sleep(early)
            self._receive()
            stepped = time.monotonic()
            self.policy.step()
            commit(self.policy, self._send)
            now = time.monotonic()
            if now >= self._beat_at:
                self._beat_at = now + HEARTBEAT
                dump = self.policy.dump() | {"rebuilds": self.rebuilds, "gaps": self.gaps, "events": self.events}
                answer = self.control.request({"t": "heartbeat", "name": self.name, "dump": dump})
                if not self._promised:
                    self._promised, self._promised_at = self._promise(answer), now

    def stop(self) -> None:
        """Ends ``run`` within a tick, or half a second if the gateway does not answer."""
        self.stopping = True
        self.control.timeout = 0.5

    def close(self) -> None:
        """Says goodbye, if anybody is there to hear it, and closes the sockets."""
        with contextlib.suppress(BusError):
            self.stop()
            self.control.request({"t": "goodbye", "name": self.name})
        self.control.close()
        if self.events_in is not None:
            self.events_in.close()

    def _receive(self) -> None:
        if self.events_in is None:
            time.sleep(self.policy.tick)
            return
        if not self.events_in.poll(int(self.policy.tick * 1000)):
            # Nothing is on the way any more, so what the gateway said long ago it had sent, and is not here, was lost.
            if all(self._next[topic] >= self._promised.get(topic, 0) for topic in self._topics):
                self._promised = {}
            elif time.monotonic() - self._promised_at > LATE:
                self._rebuild_after_gap(self._note_gap(self._promised))
            return
        parts: list[NDArray[np.void]] = []
        lost = 0
        for _ in range(BURST):
            try:
                frames = self.events_in.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            topic, first, events = decode_batch(frames)
            expected = self._next[topic]
            if first > expected:
                lost += self._note_gap({topic: first})
                expected = first
            # Older than HELLO: the tables had it already.
            parts.append(events[max(0, expected - first) :])
            self._next[topic] = max(expected, first + len(events))
        if lost:
            self._rebuild_after_gap(lost)
        if parts:
            self._dispatch(np.concatenate(parts))

    def _note_gap(self, upto: dict[bytes, int]) -> int:
        """Events before these numbers will not come any more; how many."""
        lost = 0
        for topic in self._topics:
            missing = upto.get(topic, 0) - self._next[topic]
            if missing > 0:
                lost += missing
                self._next[topic] += missing
        return lost

    def _rebuild_after_gap(self, lost: int) -> None:
        self.gaps += 1
        log.warning("%s: %d events were lost, rebuilding", self.name, lost)
        self._rebuild()

    def _dispatch(self, events: NDArray[np.void]) -> None:
        self.events += len(events)
        self.policy.dispatch(self._handlers, events)

    def _send(self, ops: NDArray[np.void]) -> NDArray[np.void]:
        _, raw = self.control.exchange({"t": "txn", "name": self.name}, ops.tobytes())
        if len(raw) != ops.nbytes:
            raise BusError(f"{len(ops)} operations sent, {len(raw)} bytes of results came back")
        return np.frombuffer(raw, OP_DTYPE)


def run(name: str, implementation: str, policy_class: type[BasePolicy], run_dir: str | Path) -> int:
    """Runs one component until SIGTERM. 0 after an orderly stop, 1 when it cannot go on (the reason is in the log)."""
    _log_to_stderr()
    runtime: Runtime | None = None
    try:
        drop_privileges(name)
        wait_for_gateway(run_dir)
        runtime = Runtime(name, implementation, policy_class, run_dir)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runtime.stop() if runtime else None)
        runtime.join()
        log.info("%s ready: %s, pid %d, uid %d", name, implementation, os.getpid(), os.getuid())
        runtime.run()
    except (BusError, OSError) as error:
        if runtime is None or not runtime.stopping:
            log.error("%s stops: %s", name, error)
            return 1
    finally:
        if runtime is not None:
            runtime.close()
    log.info("%s stopped after %d events, %d rebuilds", name, runtime.events, runtime.rebuilds)
    return 0


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")


def implementation_of(name: str, run_dir: str | Path) -> str:
    """Which implementation config.json names for a component; by default that of its own name.

    :raises BusError: unreadable, or not the name of a module
    """
    path = Path(run_dir) / "config.json"
    try:
        chosen = json.loads(path.read_text()).get("components", {}).get(name, name)
    except (OSError, ValueError, AttributeError) as error:
        raise BusError(f"{path}: {error}") from None
    if not isinstance(chosen, str) or not chosen.isidentifier() or chosen.startswith("_"):
        raise BusError(f"{path}: {chosen!r} is not the name of an implementation of {name}")
    return chosen


def tuned(name: str, policy_class: type[BasePolicy], run_dir: str | Path) -> dict[str, float]:
    """What config.json sets of a policy's tunables; what is meant for another policy of that component, or out of bounds, is left out."""
    try:
        chosen = json.loads((Path(run_dir) / "config.json").read_text()).get("tuned", {}).get(name, {})
        return {k: float(v) for k, v in chosen.items() if k in policy_class.tunables and policy_class.tunables[k].least <= v <= policy_class.tunables[k].most}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("no tunables from config.json: %s", error)
        return {}


def load_policy(name: str, implementation: str) -> type[BasePolicy]:
    """The class ``Policy`` of ``components/NAME/IMPLEMENTATION.py``. :raises BusError: there is none."""
    try:
        policy = importlib.import_module(f"components.{name}.{implementation}").Policy
    except (ImportError, AttributeError) as error:
        raise BusError(f"{name} has no implementation {implementation}: {error}") from None
    if not (isinstance(policy, type) and issubclass(policy, BasePolicy)):
        raise BusError(f"components.{name}.{implementation}.Policy is not a policy")
    return policy


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """What ``python -m components.NAME`` does. The exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m components.{name}")
    parser.add_argument("--run-dir", default=os.environ.get("SYLVIE_RUN_DIR", DEFAULT_RUN_DIR))
    arguments = parser.parse_args(argv)
    _log_to_stderr()
    try:
        # Before privileges are dropped: afterwards the source may not be readable any more.
        implementation = implementation_of(name, arguments.run_dir)
        policy_class = load_policy(name, implementation)
    except BusError as error:
        log.error("%s cannot start: %s", name, error)
        return 1
    return run(name, implementation, policy_class, arguments.run_dir)
