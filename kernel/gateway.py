"""The gateway's control: ``python -m kernel.gateway --run-dir DIR``.

Programs are served by the C threads (``kernel/native/gateway.c``); this process's one Python thread carries events
from them to the bus, transactions from the bus to them, and answers questions. It may be slow without anybody's page
fault noticing.

Requests are a msgpack map ``{"t": KIND, ...}``, answered by ``{"ok": true, ...}`` or ``{"ok": false, "error": why}``; a
``rid`` is handed back. KIND is one of, from components: ``hello sync txn heartbeat goodbye``; from the command line:
``status check buddyinfo slabinfo fault-order low watermarks release sched sched-add sched-remove post-test``. Each is a method ``request_KIND`` of ``Gateway``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq
from numpy.typing import NDArray

from bus import codec, keys
from bus.client import EVENTS, HIGH_WATER, REQUESTS, endpoint
from bus.codec import BusError
from bus.keys import COMPONENT_IDS
from bus.tables import MAX_ORDER, Tables, buddyinfo, frames_by_state, free_blocks, slabinfo
from bus.topics import MESSAGES, TOPIC_OF, TOPICS
from kernel import host, topology
from kernel.abi import MSG_DTYPE, dtype_of, ffi, lib, names
from kernel.agent import StatusWord
from kernel.heat import Monitor
from kernel.providers import linux_sched

BATCH = 512  # events in one message: more is hardly faster, and this bounds what a slow subscriber can pile up
RELAY = 256  # batches carried before requests have their turn; together what the C half's ring can hold
# Seconds between two relays: each costs the same, however many events it carries. The first after a pause goes at once.
GATHER = 0.01
GATHER_URGENT = 0.001  # … when among them is what a program will soon want, and the last one carried more than …
FEW = 8  # events
SOON = 4  # times the high watermark: with so few frames free, pages may have to leave soon
LOST_AFTER = 2.0  # seconds without a heartbeat
TICK = 0.25  # seconds between two looks at the heartbeats
MAX_TEST = 1 << 16  # events of one post-test: half of the C half's ring
HAND_BACK = 60.0  # seconds for programs to take their pages back from the store when we stop
MAX_AS = 4096  # address spaces that one status lists
MAX_FRAME = 64 << 20  # bytes
OF_COMPONENTS = {"hello", "txn", "heartbeat", "goodbye"}  # requests that a component makes in its own name
# Whichever side is quicker to find that keys do not fit names the event.
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
OF_ALL = {"sync"}  # all others are the operator's
OOM = {name.lower(): value for value, name in names("SY_OOM_").items()}
# Message type → its bit in the mask that the C half keeps of what sched handles.
OF_SCHED = {v: v - lib.SY_MSG_TASK_DEAD for n, v in MESSAGES.items() if n.startswith("TASK_")} | {
    v: 32 + v - lib.SY_MSG_CPU_TICK for n, v in MESSAGES.items() if n.startswith("CPU_")
}
TASK_FLAGS = {bit: name.lower() for bit, name in names("SY_TF_").items()}
MAX_WORD = 64  # numbers of one tunable
MAX_WHY = 1000  # characters of a refusal
MAX_DUMP = 1 << 16  # bytes
RESULTS = {value: name.lower() for value, name in names("SY_R_").items()}
# States of a component, as ``sylvie status`` says them; their index is ``sy_component.state``.
STATES = ("down", "online", "lost")

log = logging.getLogger("sylvie")


@dataclass
class Component:
    """One configured component; ``route`` is the ZeroMQ identity that last said HELLO, the only one that may commit."""

    name: str
    id: int
    implementation: str
    state: str = "down"
    pid: int = 0
    route: bytes = b""
    restarts: int = 0
    since: float = 0.0  # monotonic seconds
    heartbeat: float = 0.0
    heat: bool = False  # it waits for HEAT_READY
    dump: dict[str, Any] = field(default_factory=dict)

    def report(self, now: float) -> dict[str, Any]:
        """For ``sylvie status``."""
        up = self.state != "down"
        return {
            "name": self.name, "pid": self.pid if up else None, "state": self.state,
            "implementation": self.implementation, "uptime_s": round(now - self.since, 1) if up else None,
            "heartbeat_age_s": round(now - self.heartbeat, 2) if up else None, "restarts": self.restarts,
            "dump": self.dump,
        }  # fmt: skip


class Gateway:
    """One enclave and its bus.

    :param run_dir: existing directory, with keys; the sockets appear in it
    :param config: ``{"ram": bytes, "nodes": n, "components": {name: implementation}, "oom": "kill" or "native", "overcommit": bool,
        "swap": bytes of the swap file, 0 for none, "pool": share of RAM for compressed pages before it, 0 to 1,
        "heat_cpu": share of one core for the access monitor, 0 for none, "users": [uid beside root whose programs may join, …]}``
    :raises BusError: the configuration or the machine does not allow it; says what was found
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.started = time.monotonic()
        chosen = codec.field(config, "components", dict)
        if unknown := sorted(set(chosen) - set(COMPONENT_IDS)):
            raise BusError(f"config.json names unknown components {unknown}: known are {sorted(COMPONENT_IDS)}")
        self.components = {name: Component(name, COMPONENT_IDS[name], str(chosen[name])) for name in chosen}
        self.counters = {"bad_requests": 0, "bad_keys": 0, "batches": 0, "published": 0, "lost_events": 0}
        self.refusals: Counter[str] = Counter()  # of requests and operations, by reason
        self._stopping = False
        self._sched_words = (0, 0)  # see ``_keep_words``
        self._important = 0  # pid of the sched that has a real-time priority, with us

        why = ffi.new("char[]", 512)
        ram, nodes = codec.field(config, "ram", int), codec.field(config, "nodes", int)
        if ram <= 0 or nodes <= 0:
            raise BusError(f"config.json asks for {ram} bytes of RAM on {nodes} nodes")
        self.gw = lib.sy_gw_new(str(run_dir).encode(), ram, nodes, why, len(why))
        if self.gw == ffi.NULL:
            raise BusError(ffi.string(why).decode(errors="replace") or "the enclave could not be made")
        self.topology = topology.find(nodes)
        near = self.topology
        rows = [[*row, *[0] * (lib.SY_MAX_NODES - nodes)] for row in near.distance]
        flat = bytes(x for row in rows for x in row).ljust(64, b"\0")
        if error := -lib.sy_gw_set_topology(self.gw, bytes(near.cpu_node), len(near.cpu_node), flat, near.kernel_node):
            raise BusError(f"RAM cannot be bound to the machine's nodes {near.kernel_node}: {os.strerror(error)}")
        oom = config.get("oom", "kill")
        if oom not in OOM:
            raise BusError(f"config.json has 'oom': {oom!r}; it is one of {sorted(OOM)}")
        lib.sy_gw_set_oom(self.gw, OOM[oom])
        lib.sy_gw_set_overcommit(self.gw, "overcommit" in config and codec.field(config, "overcommit", bool))
        swap = codec.field(config, "swap", int) if config.get("swap") else 0
        pool = int(lib.sy_gw_frames(self.gw) * codec.field(config, "pool", float)) if "pool" in config else 0
        if swap and (error := -lib.sy_gw_set_swap(self.gw, str(run_dir / "swap").encode(), swap, pool)):
            raise BusError(f"no swap file of {swap >> 20} MiB in {run_dir}: {os.strerror(error)}")
        users = codec.field(config, "users", list) if "users" in config else []
        for uid in users:
            if not isinstance(uid, int) or not 0 <= uid < 1 << 32:
                raise BusError(f"config.json has {uid!r} among 'users': they are numbers")
            if lib.sy_gw_admit(self.gw, uid):
                raise BusError(f"config.json has {len(users)} 'users': at most {lib.SY_MAX_USERS}")
        self.tables = tables_of(self.gw)
        heat_cpu = codec.field(config, "heat_cpu", float) if "heat_cpu" in config else 0.02
        if not 0 <= heat_cpu <= 1:
            raise BusError(f"config.json has 'heat_cpu': {heat_cpu}; it is a share of one core, 0 to 1")
        self.monitor = Monitor(self.gw, self.tables, heat_cpu, self._heat_needed)

        self._events = np.zeros(BATCH, MSG_DTYPE)
        self._events_c = ffi.from_buffer("struct sy_msg[]", self._events)
        self._last_seq = self.tables.header.event_seq  # seqnum of the last event taken from the C half
        self._seq = [0] * len(TOPICS)  # next sequence number, per topic
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.pub = context.socket(zmq.PUB)
        # A subscriber that does not read loses batches beyond this, and sees so by the next sequence number: it
        # rebuilds.
        self.pub.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self.pub.setsockopt(zmq.LINGER, 0)
        self.router = context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        # Who sends more is hung up on by ZeroMQ, before it has taken our memory; who sends less is told why it is too much.
        self.router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self.zap = keys.Zap(run_dir)
        self._handshakes = []
        # Anybody may connect; what counts is the key.
        for sock, name in ((self.pub, EVENTS), (self.router, REQUESTS)):
            keys.serve(sock, run_dir)
            self._handshakes.append(sock.get_monitor_socket(FAILED_HANDSHAKES))
            sock.bind(endpoint(run_dir, name))
            os.chmod(run_dir / name, 0o666)

    # ---- the loop ----
    def start(self) -> None:
        """Starts the C threads. :raises BusError: they do not start."""
        if (status := lib.sy_gw_start(self.gw)) < 0:
            raise BusError(f"the gateway's threads do not start: {os.strerror(-status)}")
        self.monitor.start()
        self.no_sched = "" if "sched" in self.components else "config.json has no component sched"
        if not self.no_sched:
            try:
                if (status := lib.sy_gw_sched_start(self.gw, linux_sched.tracepoints())) < 0:
                    self.no_sched = f"the kernel's tracepoints cannot be read: {os.strerror(-status)}"
            except OSError as error:
                self.no_sched = error.strerror or str(error)
            if self.no_sched:
                log.warning("sched will have no threads: %s", self.no_sched)

    def serve(self) -> None:
        """Until ``stop``."""
        # A signal must end the poll, not wait for it.
        wake_in, wake_out = socket.socketpair()
        wake_out.setblocking(False)
        before = signal.set_wakeup_fd(wake_out.fileno())
        event_fd = lib.sy_gw_event_fd(self.gw)
        poller = zmq.Poller()
        urgent_fd = lib.sy_gw_urgent_fd(self.gw)
        for readable in (event_fd, urgent_fd, wake_in.fileno(), self.router, self.zap.socket, *self._handshakes):
            poller.register(readable, zmq.POLLIN)
        look_at = relayed = 0.0
        before_last = 0  # events published before the last relay
        try:
            while not self._stopping:
                gathering = relayed + GATHER - time.monotonic()
                poller.register(event_fd, 0 if gathering > 0 else zmq.POLLIN)
                ready = dict(poller.poll(int(min(TICK, gathering) * 1000) + 1 if gathering > 0 else int(TICK * 1000)))
                if event_fd in ready or urgent_fd in ready:
                    early = relayed + GATHER_URGENT - time.monotonic()
                    if early > 0 and self.counters["published"] > before_last + FEW:
                        time.sleep(early)
                    before_last = self.counters["published"]
                    relayed = time.monotonic() if self._relay() else 0.0
                if self.zap.socket in ready:
                    self.zap.answer()
                for monitor in self._handshakes:
                    if monitor in ready:
                        monitor.recv_multipart()
                        self.counters["bad_keys"] += 1
                if self.router in ready:
                    self._answer_all()
                if (now := time.monotonic()) >= look_at:
                    look_at = now + TICK
                    self._look_for_lost(now)
                    self._look_for_threads()
                    self._look_for_run_dir()
            self._hand_back()
        finally:
            signal.set_wakeup_fd(before)
            wake_in.close()
            wake_out.close()

    def _hand_back(self) -> None:
        """The store goes with us: programs that have pages in it get all their memory back first, as the kernel's own."""
        deadline = time.monotonic() + HAND_BACK
        asked: set[int] = set()
        while (spaces := [a for a in self._address_spaces() if a["swapped"]]) and time.monotonic() < deadline:
            for space in spaces:
                if space["asid"] not in asked:
                    asked.add(space["asid"])
                    lib.sy_gw_release(self.gw, space["asid"])
            time.sleep(0.02)
        for space in spaces:
            log.error(
                "%s (%d) has %d pages in the store and has not let go: it will wait for ever when it touches one",
                space["command"], space["pid"], space["swapped"],
            )  # fmt: skip

    def stop(self) -> None:
        """Ends ``serve``; may be called from a signal handler."""
        self._stopping = True

    def close(self) -> None:
        """Ends the threads and closes and removes the sockets."""
        self.monitor.stop()
        lib.sy_gw_stop(self.gw)
        for sock in (self.pub, self.router):
            sock.disable_monitor()
            sock.close()
        self.zap.close()
        for name in (EVENTS, REQUESTS):
            (self.run_dir / name).unlink(missing_ok=True)

    # ---- events ----
    def _relay(self) -> bool:
        """Publishes what waits, but not for ever: requests have their turn too. Was that all?"""
        for _ in range(RELAY):
            taken = lib.sy_gw_events(self.gw, self._events_c, BATCH)
            if taken:
                self._publish(self._events[:taken])
            if taken < BATCH:
                return True
        return False

    def _publish(self, events: NDArray[np.void]) -> None:
        last = int(events["seqnum"][-1])
        for event in events[(events["type"] == lib.SY_MSG_OOM) & (events["arg"] != 0)]:
            log.error(
                "out of frames: ended pid %d (address space %d), which had the most, %d MiB",
                event["arg"], event["asid"], int(event["npages"]) * lib.SY_PAGE_SIZE >> 20,
            )  # fmt: skip
        if lost := ((last - self._last_seq) & 0xFFFFFFFF) - len(events):
            # The C half's ring was full. Nobody knows of which topics they were, so each has a gap.
            self.counters["lost_events"] += lost
            self._seq = [seq + lost for seq in self._seq]
            self._publish_empty()
        self._last_seq = last
        topics = TOPIC_OF[events["type"]]
        present = np.flatnonzero(np.bincount(topics)).tolist()
        for topic in present:
            part = events if len(present) == 1 else events[topics == topic]
            self.pub.send_multipart(codec.encode_batch(TOPICS[topic], self._seq[topic], part))
            self._seq[topic] += len(part)
        self.counters["batches"] += len(present)
        self.counters["published"] += len(events)

    def _publish_empty(self) -> None:
        """A batch of no events on every topic: carries the sequence number."""
        for topic, seq in zip(TOPICS, self._seq, strict=True):
            self.pub.send_multipart(codec.encode_batch(topic, seq, self._events[:0]))

    def _post(self, message: str, arg: int) -> None:
        event = ffi.new("struct sy_msg *", {"type": MESSAGES[message], "arg": arg})
        lib.sy_gw_post(self.gw, event)

    # ---- components ----
    def _look_for_lost(self, now: float) -> None:
        for component in self.components.values():
            if component.state == "online" and now - component.heartbeat > LOST_AFTER:
                log.warning("%s (pid %d) is lost: no heartbeat for %.0f s", component.name, component.pid, LOST_AFTER)
                self._enter(component, "lost")

    def _look_for_run_dir(self) -> None:
        """Who removes the run directory takes the enclave down: nothing could reach it any more."""
        if (self.run_dir / REQUESTS).exists():
            return
        log.error("%s has been removed: taking the enclave down; programs go on natively", self.run_dir / REQUESTS)
        parent = os.getppid()
        if os.environ.get("SUPERVISOR_ENABLED") and "supervisord" in " ".join(psutil.Process(parent).cmdline()):
            os.kill(parent, signal.SIGTERM)  # or it would start us again
        self.stop()

    def _enter(self, component: Component, state: str) -> None:
        component.state = state
        self._publish_state(component)
        if component.name == "sched":
            self._look_for_threads()
            lib.sy_gw_sched_words(self.gw, *(self._sched_words if state == "online" else (0, 0)))
        self._post("COMPONENT_UP" if state == "online" else "COMPONENT_LOST", component.id)

    def _heat_needed(self) -> bool:
        """Does a component wait for it, or may pages have to leave soon? (The monitor's thread asks.)"""
        header = self.tables.header
        marks = (header.watermark[node] for node in range(header.nodes))
        return any(c.heat and c.state == "online" for c in self.components.values()) or bool(
            header.slots and any(mark.free < SOON * mark.high for mark in marks)
        )

    def _look_for_threads(self) -> None:
        """While sched has some, it and what carries its decisions are more important than they."""
        sched = self.components.get("sched")
        pid = sched.pid if sched and sched.state == "online" and self.tables.sched.count else 0
        if pid != self._important:
            self._important = pid
            self._priorities(pid)

    def _priorities(self, pid: int) -> None:
        """What decides, and what carries it there, runs before whatever it may choose; ``pid`` 0: nobody has to."""
        for tid in _bus_threads(os.getpid()) | {thread.native_id for thread in threading.enumerate() if thread.native_id}:
            _fifo(tid, lib.SY_PRIORITY_RELAY if pid else 0)
        claimed = self.components["sched"].pid
        try:
            ours = psutil.Process(claimed).uids().real == keys.uid_of("sched")  # not whatever it says that it is
        except psutil.Error:
            return
        for tid in _bus_threads(claimed) | {claimed} if ours else ():
            _fifo(tid, lib.SY_PRIORITY_OWN if pid else 0)

    def _publish_state(self, component: Component) -> None:
        state = STATES.index(component.state)
        lib.sy_gw_heartbeat(self.gw, component.id, component.pid, state, component.restarts)

    def _sender(self, route: bytes, header: dict[str, Any]) -> Component:
        """The component that a request is from. :raises BusError: unknown, or not the process that said HELLO."""
        name = codec.field(header, "name", str)
        component = self.components.get(name)
        if component is None:
            raise BusError(
                f"there is no component {name!r}: config.json has {sorted(self.components)}", "not_permitted"
            )
        if component.route != route:
            raise BusError(
                f"this process is not {name}: it has not said HELLO, or pid {component.pid} has taken over",
                "not_permitted",
            )
        return component

    # ---- requests ----
    def _answer_all(self) -> None:
        for _ in range(64):
            try:
                messages = self.router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            route, *frames = (message.bytes for message in messages)
            sender = str(messages[-1].get("User-Id"))  # whose key it is, as Zap said
            self.router.send_multipart([route, *self.answer(sender, route, frames)])

    def answer(self, sender: str, route: bytes, frames: list[bytes]) -> list[bytes]:
        """The frames of the answer to one request; never raises. What is refused is counted by its reason."""
        rid: Any = None
        try:
            if not 1 <= len(frames) <= 2:
                raise BusError(f"a request has 1 or 2 frames, not {len(frames)}")
            header = codec.unpack(frames[0])
            if "rid" in header:
                rid = codec.field(header, "rid", int)  # goes into the answer: whatever could be in it would, too
            kind = codec.field(header, "t", str)
            handler: Callable[..., Any] | None = getattr(self, "request_" + kind.replace("-", "_"), None)
            if handler is None:
                raise BusError(f"unknown request {kind!r}", "unknown")
            self._permit(sender, kind, header)
            raw = b""
            if kind == "txn":
                answer, raw = handler(route, header, frames[1] if len(frames) == 2 else b"")
            else:
                answer = handler(route, header)
            head = codec.pack({"ok": True} | answer | ({} if rid is None else {"rid": rid}))
            return [head, raw] if raw else [head]
        except BusError as error:
            reason, why = error.reason, str(error)
        except Exception as error:  # the gateway must outlive whatever a request holds
            log.exception("a request failed")
            reason, why = "internal", f"{type(error).__name__}: {error}"
        self.counters["bad_requests"] += 1
        self.refusals[reason] += 1
        # What was wrong may be in it, and as long as it likes.
        refusal = {"ok": False, "error": why[:MAX_WHY], "reason": reason}
        return [codec.pack(refusal if rid is None else refusal | {"rid": rid})]

    @staticmethod
    def _permit(sender: str, kind: str, header: dict[str, Any]) -> None:
        """:raises BusError: the key that a request came with is not of one who may make it"""
        if kind in OF_COMPONENTS:
            if (name := codec.field(header, "name", str)) != sender:
                raise BusError(f"{kind!r} in the name of {name}, with the key of {sender}", "not_permitted")
        elif kind not in OF_ALL and sender != keys.OPERATOR:
            raise BusError(f"{kind!r} is for the operator, not for {sender}", "not_permitted")

    def _seqs(self) -> dict[str, int]:
        return {topic.decode(): seq for topic, seq in zip(TOPICS, self._seq, strict=True)}

    def request_hello(self, route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """A component presents itself; a second process of the same name takes over from the first."""
        name = codec.field(header, "name", str)
        component = self.components.get(name)
        if component is None:
            raise BusError(
                f"there is no component {name!r}: config.json has {sorted(self.components)}", "not_permitted"
            )
        abi = codec.field(header, "abi", int)
        if abi != lib.SY_ABI_VERSION:
            raise BusError(f"ABI {abi} asked, gateway speaks {lib.SY_ABI_VERSION}: build both from one tree")
        implementation, pid = codec.field(header, "implementation", str), codec.field(header, "pid", int)
        if not 0 < pid < 1 << 32:
            raise BusError(f"{pid} is not a process id")
        if not implementation.isidentifier() or len(implementation) > 100:
            raise BusError(f"{implementation!r} is not the name of an implementation")
        self._keep_words(component, header.get("words") or {})
        component.heat = codec.field(header, "heat", bool) if "heat" in header else False
        now = time.monotonic()
        if component.since:
            component.restarts += 1
        component.route, component.pid, component.implementation = route, pid, implementation
        component.since = component.heartbeat = now
        component.dump = {}
        self._relay()  # what is already true when the answer is sent has a number below the answer's
        answer = {"id": component.id, "seqs": self._seqs()}
        self._enter(component, "online")
        log.info("%s is online: %s, pid %d", name, implementation, pid)
        return answer

    def _keep_words(self, component: Component, words: Any) -> None:
        """Tunables that a component owns: buddy's ``reserve`` (blocks per order 0..10) and ``low`` (per order 0..9); sched's ``messages``
        (types that it handles) and ``tick`` (microseconds between two CPU_TICK, 0 for none)."""
        lengths = {"reserve": MAX_ORDER + 1, "low": lib.SY_HUGE_ORDER + 1} if component.name == "buddy" else {}
        if component.name == "sched":
            lengths = {"messages": -1, "tick": 1}
        if not isinstance(words, dict):
            raise BusError("'words' must be a map")
        for word, values in words.items():
            if word not in lengths:
                raise BusError(f"{component.name} has no tunable {word!r}")
            if not isinstance(values, list) or len(values) != lengths[word] != -1 or len(values) > MAX_WORD:
                raise BusError(f"{word!r} must be a list of {lengths[word]} numbers")
            if not all(isinstance(value, int) and 0 <= value < 1 << 32 for value in values):
                raise BusError(f"{word!r} must hold numbers of 32 bits")
        if component.name == "sched":
            wanted = {*words.get("messages", ())} & OF_SCHED.keys()
            self._sched_words = (sum(1 << OF_SCHED[message] for message in wanted), *words.get("tick", [0]))
        if "reserve" in words:
            lib.sy_gw_reserve_targets(self.gw, words["reserve"])
        for order, low in enumerate(words.get("low", [])):
            if lib.sy_gw_set_low(self.gw, 0, order, low) < 0:
                raise BusError(f"a low mark of {low} blocks of order {order} is not possible")

    def request_sync(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """An empty batch on every topic, in their order: who receives it is subscribed."""
        self._publish_empty()
        return {"seqs": self._seqs()}

    def request_txn(self, route: bytes, header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
        """Carries out operations; the answer's second frame is the same operations with their results."""
        component = self._sender(route, header)
        ops = codec.decode_ops(raw)
        ops["result"] = lib.SY_R_PENDING
        complete = lib.sy_gw_commit(self.gw, component.id, ffi.from_buffer("struct sy_op[]", ops), len(ops))
        results = np.bincount(ops["result"], minlength=len(RESULTS))
        for result in np.flatnonzero(results):
            if result != lib.SY_R_COMPLETE:
                self.refusals[RESULTS[int(result)]] += int(results[result])
        return {"complete": complete}, ops.tobytes()

    def request_heartbeat(self, route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """A component lives; ``dump`` is its state for people. Answers with the sequence numbers reached."""
        component = self._sender(route, header)
        component.heartbeat = time.monotonic()
        if "dump" in header:
            component.dump = _plain_map(codec.field(header, "dump", dict))
        if component.state != "online":  # it was stopped, or starved
            log.info("%s is back", component.name)
            self._enter(component, "online")
        self._publish_state(component)
        return {"seqs": self._seqs()}

    def request_goodbye(self, route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """An orderly end: nobody need wait for heartbeats to stop."""
        component = self._sender(route, header)
        component.route = b""
        self._enter(component, "down")
        log.info("%s has stopped", component.name)
        return {}

    def request_status(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """Everything that ``sylvie status`` shows."""
        now = time.monotonic()
        levels = np.zeros(MAX_ORDER + 1, np.uint32)
        lib.sy_gw_reserve_levels(self.gw, ffi.from_buffer("uint32_t[]", levels))
        header = self.tables.header
        counters = {name.lower(): int(header.counters[value]) for value, name in names("SY_CNT_").items()}
        return {
            "run_dir": str(self.run_dir),
            "abi": lib.SY_ABI_VERSION,
            "pid": os.getpid(),
            "uptime_s": round(now - self.started, 1),
            "components": [component.report(now) for component in self.components.values()],
            "frames": frames_by_state(self.tables.frames),
            "populated": header.populated,
            "nodes": [
                {"base": base, "frames": size}
                | {name: getattr(header.watermark[node], name) for name in ("min", "low", "high", "free", "standby")}
                for node, (base, size) in enumerate(self.tables.nodes)
            ],
            "limits": [
                {"zone": zone, "frames": limit.frames, "members": limit.members, "used": limit.frames - mark.free}
                | {name: getattr(mark, name) for name in ("min", "low", "high", "free", "standby")}
                for k in range(lib.SY_MAX_LIMITS)
                for limit, zone in [(header.limit[k], lib.SY_MAX_NODES + k)]
                for mark in [header.watermark[zone]]
                if limit.members
            ],
            "swap": {
                "slots": header.slots, "used": header.slots_used,
                "pool_frames": header.pool_frames, "pool_max": header.pool_max,
            },
            "address_spaces": self._address_spaces(),
            "heat": self.monitor.report(),
            "topology": self.topology.as_dict(),
            "reserve": _by_order(levels),
            "refusals": dict(self.refusals),
            "counters": counters | self.counters | {"events_lost": header.events_lost, "event_seq": header.event_seq},
        }

    def _address_spaces(self) -> list[dict[str, Any]]:
        info = np.zeros(MAX_AS, dtype_of("struct sy_as_info"))
        count = lib.sy_gw_as_list(self.gw, ffi.from_buffer("struct sy_as_info[]", info), len(info))
        spaces = []
        for row in info[:count]:
            plain = {name: int(row[name]) for name in info.dtype.names or () if name not in ("mag_level", "pad")}
            command, native_kib = _process(plain["pid"])
            spaces.append(plain | {
                "command": command, "native_kib": native_kib, "magazine": _by_order(row["mag_level"]),
            })  # fmt: skip
        return spaces

    def request_check(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """The invariants: number of ``violations``, and one line for each in ``text``."""
        text = ffi.new("char[]", 1 << 16)
        violations = lib.sy_gw_check(self.gw, text, len(text))
        return {"violations": violations, "text": ffi.string(text).decode(errors="replace")}

    def request_buddyinfo(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """Free blocks by node and order from the frame table: ``nodes``, and ``text`` in the form of
        /proc/buddyinfo."""
        counts = free_blocks(self.tables.frames, self.tables.nodes)
        return {"nodes": counts, "text": buddyinfo(counts)}

    def request_slabinfo(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """The compressed pages' caches: ``caches``, and ``text`` in the form of /proc/slabinfo."""
        info = np.zeros(lib.SY_SLAB_CACHES, dtype_of("struct sy_slab_info"))
        lib.sy_gw_slabinfo(self.gw, ffi.from_buffer("struct sy_slab_info[]", info))
        caches = [{name: int(row[name]) for name in info.dtype.names or ()} for row in info]
        return {"caches": caches, "text": slabinfo(caches)}

    def request_fault_order(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """Sets the order of first touches: ``asid`` (0: new address spaces), ``order``, ``max_order``."""
        asid, order, largest = (_u32(header, name) for name in ("asid", "order", "max_order"))
        if (status := lib.sy_gw_set_fault_order(self.gw, asid, order, largest)) < 0:
            raise BusError(f"fault order {order} up to {largest} for address space {asid}: {os.strerror(-status)}")
        return {}

    def _zones(self) -> dict[int, int]:
        """Frames of each zone in use."""
        limits = ((lib.SY_MAX_NODES + k, self.tables.header.limit[k].frames) for k in range(lib.SY_MAX_LIMITS))
        return {node: size for node, (_, size) in enumerate(self.tables.nodes)} | {z: n for z, n in limits if n}

    def request_watermarks(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """Sets the watermarks of a zone (a node, or a limit in use), in frames: ``node``, ``min``, ``low``, ``high``."""
        node, least, low, high = (_u32(header, name) for name in ("node", "min", "low", "high"))
        if lib.sy_gw_set_watermarks(self.gw, node, least, low, high) < 0:
            sizes = self._zones()
            if node not in sizes:
                raise BusError(f"there is no node {node}: nodes are 0 to {len(self.tables.nodes) - 1}, limits in use: {sorted(sizes)[len(self.tables.nodes) :]}")
            raise BusError(
                f"watermarks {least}, {low}, {high} of node {node}: they ascend, up to half of its {sizes[node]} frames"
            )
        return {}

    def request_release(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """Turns the memory of process ``pid`` native, for good. It is done when its address space is gone from the
        status. Answers with ``bytes``, what moves."""
        pid = _u32(header, "pid")
        space = next((a for a in self._address_spaces() if a["pid"] == pid), None)
        if space is None:
            raise BusError(f"process {pid} has no managed memory: `sylvie status` lists those that have")
        moves, room = (space["mapped"] + space["swapped"]) * lib.SY_PAGE_SIZE, psutil.virtual_memory().available
        if moves + lib.SY_MACHINE_KEEPS > room:
            raise BusError(
                f"process {pid} has {moves >> 20} MiB in frames, and the machine has {room >> 20} MiB available "
                f"beside the enclave's: free {(moves + lib.SY_MACHINE_KEEPS - room) >> 20} MiB first"
            )
        lib.sy_gw_release(self.gw, space["asid"])
        return {"asid": space["asid"], "bytes": moves}

    def request_sched_add(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """sched has the threads of process ``pid``, and all that they start, from now on."""
        pid = _u32(header, "pid")
        if self.no_sched:
            raise BusError(f"no threads can be scheduled: {self.no_sched}")
        if own := next((c.name for c in self.components.values() if c.pid == pid and c.state != "down"), None):
            raise BusError(f"process {pid} is {own}, which is not to be scheduled by it")
        why = {
            errno.ESRCH: f"there is no process {pid}", errno.EPERM: f"process {pid} is the gateway, or the first of all",
            errno.EINVAL: f"process {pid} is SCHED_DEADLINE: nothing goes before that", errno.ENOSPC: f"there are {lib.SY_MAX_TASKS} threads already",
        }  # fmt: skip
        if error := -lib.sy_gw_sched_add(self.gw, pid):
            raise BusError(why.get(error, f"process {pid}: {os.strerror(error)}"))
        self._look_for_threads()
        return {"pid": pid}

    def request_sched_remove(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """The threads of process ``pid`` are the kernel's again; their attributes are as they set them."""
        pid = _u32(header, "pid")
        if self.no_sched or lib.sy_gw_sched_remove(self.gw, pid):
            raise BusError(f"sched has no thread of process {pid}: `sylvie sched status` lists those that it has")
        return {"pid": pid}

    def request_sched(self, _route: bytes, _header: dict[str, Any]) -> dict[str, Any]:
        """Status words of threads and CPUs, and what has been counted, as ``sylvie sched status`` shows them."""
        t = self.tables
        tasks = t.tasks[: t.sched.top]
        now = time.monotonic_ns()
        plain = []
        for row in tasks[tasks["gtid"] != 0]:
            task: dict[str, Any] = {n: int(row[n]) for n in row.dtype.names if n not in ("pad", "own_mask")}
            task |= {name: bool(task["flags"] & bit) for bit, name in TASK_FLAGS.items()}
            word = StatusWord(row)
            task["runtime_now"] = word.runtime(now)
            task["own_cpus"] = sorted(word.affinity())
            plain.append(task)
        cpus = [{"cpu": i} | {n: int(c[n]) for n in ("chosen", "on", "seqnum", "state")} for i, c in enumerate(t.cpus) if c["state"]]
        counters = {n: int(getattr(t.sched, n)) for n in ("count", "records", "messages", "lost", "resyncs", "runs", "refused", "fallbacks", "full")}
        return {"tasks": plain, "cpus": cpus, "counters": counters, "problem": self.no_sched}

    def request_low(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """Sets a magazine's low mark: ``asid`` (0: new address spaces), ``order``, ``low`` in blocks."""
        asid, order, low = (_u32(header, name) for name in ("asid", "order", "low"))
        if (status := lib.sy_gw_set_low(self.gw, asid, order, low)) < 0:
            raise BusError(f"low mark {low} of order {order} for address space {asid}: {os.strerror(-status)}")
        return {}

    def request_post_test(self, _route: bytes, header: dict[str, Any]) -> dict[str, Any]:
        """Posts ``n`` TEST events through the C half's ring, each with the monotonic nanosecond of its posting in
        ``arg``, and its number in ``vpage``: for measuring the bus."""
        count = _u32(header, "n")
        if count > MAX_TEST:
            raise BusError(f"{count} test events: at most {MAX_TEST} at once")
        lib.sy_gw_post_test(self.gw, count)
        return {"n": count}


def _deeper_than(levels: int, value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper_than(levels - 1, entry) for entry in inner)


def _plain_map(dump: dict[str, Any]) -> dict[str, Any]:
    """A component's dump, which goes into everybody's status. :raises BusError: too much of it, or not fit for JSON."""
    if _deeper_than(20, dump):
        raise BusError("'dump' is nested more than 20 deep")
    try:
        size = len(json.dumps(dump))
    except (TypeError, ValueError) as error:
        raise BusError(f"'dump' must be what JSON can say: {error}") from None
    if size > MAX_DUMP:
        raise BusError(f"'dump' is {size} bytes of JSON: at most {MAX_DUMP}", "oversized")
    return dump


def _u32(header: dict[str, Any], name: str) -> int:
    value = codec.field(header, name, int)
    if not 0 <= value < 1 << 32:
        raise BusError(f"{name!r} must be a number of 32 bits, not {value}")
    return value


def tables_of(gw: Any) -> Tables:
    """The tables of a ``struct sy_gateway *`` of this process."""
    return Tables(*(fd(gw) for fd in (lib.sy_gw_header_fd, lib.sy_gw_frames_fd, lib.sy_gw_heat_fd, lib.sy_gw_slots_fd, lib.sy_gw_tasks_fd)))


def _bus_threads(pid: int) -> set[int]:
    """Threads of ZeroMQ's own in a process."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().startswith("ZMQbg"):
                found.add(int(task.name))
    return found


def _fifo(tid: int, priority: int) -> None:
    """SCHED_FIFO for a thread that has no real-time priority of its own; 0: not any more."""
    with contextlib.suppress(OSError):  # it has ended
        if priority:
            os.sched_setscheduler(tid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        else:
            os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))


def _by_order(values: NDArray[np.uint32]) -> dict[str, int]:
    return {str(order): int(value) for order, value in enumerate(values)}


def _process(pid: int) -> tuple[str, int]:
    """Command name, and anonymous resident memory in KiB, of a process; the latter is all native: frames are a file to
    the kernel. ("", 0) if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return "", 0
    values = dict(line.partition(":")[::2] for line in status.splitlines())
    return values.get("Name", "").strip(), int(values.get("RssAnon", "0 kB").split()[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a gateway until SIGTERM. Exit status 0, or 1 with the reason in the log."""
    parser = argparse.ArgumentParser(prog="python -m kernel.gateway")
    parser.add_argument("--run-dir", type=Path, default=os.environ.get("SYLVIE_RUN_DIR", "/run/sylvie"))
    run_dir: Path = parser.parse_args(argv).run_dir
    # A program costs the C half six descriptors.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    ready = run_dir / "gateway.ready"
    ready.unlink(missing_ok=True)
    gateway: Gateway | None = None
    with contextlib.ExitStack() as undo:
        try:
            config = json.loads((run_dir / "config.json").read_text())
            if not isinstance(config, dict):
                raise BusError("config.json is not an object")
            host.acquire(run_dir)
            undo.callback(host.release, run_dir)
            keys.make(run_dir)
            undo.callback(keys.remove, run_dir)
            gateway = Gateway(run_dir, config)
            undo.callback(gateway.close)
            undo.callback(ready.unlink, missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: gateway.stop() if gateway else None)
            gateway.start()
        except (BusError, OSError, ValueError) as error:
            log.error("gateway cannot start in %s: %s", run_dir, error)
            return 1
        header = gateway.tables.header
        ready.touch()
        log.info(
            "gateway ready: %d MiB on %d nodes in %s, pid %d", header.frames >> 8, header.nodes, run_dir, os.getpid()
        )
        gateway.serve()
        log.info("gateway stops after %d events", gateway.counters["published"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
