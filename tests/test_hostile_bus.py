"""Garbage, floods, replays and forgeries on the bus: each refused with a reason and counted; a buddy beside them goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bus_live import ROOT, Enclave, wait_for

from bus import keys
from bus.client import REQUESTS, endpoint
from bus.codec import MAX_HEADER, unpack
from kernel.abi import OP_DTYPE, lib
from kernel.gateway import Gateway

# A sender in a process of its own; what it does follows. The one line that makes the socket is this and sender()'s.
SENDER = """
import os, sys, zmq
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from test_hostile_bus import sender
s = sender(sys.argv[1])
"""


def sender(run_dir: str | Path) -> zmq.Socket[bytes]:
    """A socket on which anything can be said to the gateway."""
    s: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    s.setsockopt(zmq.LINGER, 0)
    keys.connect_as(s, Path(run_dir), "kswapd")  # one that has a key, and lies
    s.connect(endpoint(run_dir, REQUESTS))
    return s


def ask(s: zmq.Socket[bytes], *frames: bytes) -> dict[str, Any]:
    s.send_multipart(frames)
    assert s.poll(10_000), "no answer"
    return unpack(s.recv_multipart()[0])


@pytest.fixture(scope="module")
def up() -> Iterator[Enclave]:
    """A gateway and a buddy."""
    with tempfile.TemporaryDirectory(prefix="sylvie-") as directory:
        os.chmod(directory, 0o755)
        e = Enclave(Path(directory))
        try:
            e.buddy()
            yield e
        finally:
            e.close()
        assert e.gateway.returncode == 0


@pytest.fixture
def besieged(up: Enclave) -> Iterator[Enclave]:
    """Afterwards the same buddy is online, has missed nothing of importance, and the invariants hold."""
    before = up.component("buddy")
    yield up
    wait_for(lambda: up.component("buddy")["dump"].get("free_blocks") == up.free_blocks())
    after = up.component("buddy")
    assert (after["state"], after["pid"], after["restarts"]) == ("online", before["pid"], before["restarts"])
    assert up.control.request({"t": "check"})["violations"] == 0
    assert "a request failed" not in up.log(), "an exception that nobody expected"


def refusals(e: Enclave) -> dict[str, int]:
    return dict(e.control.request({"t": "status"})["refusals"])


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def packed_deep(header: dict[str, Any], name: str, depth: int) -> bytes:
    """header with a list of that depth in it, deeper than a packer goes by itself."""
    count = len(header) + 1
    body = msgpack.packb(header)[1:]
    return bytes([0x80 | count]) + body + msgpack.packb(name) + b"\x91" * depth + b"\x01"


@pytest.mark.parametrize("rid", [nested(3), {"a": 1}, "x" * 1000, b"x", 1.5])
def test_an_odd_request_number_is_refused(besieged: Enclave, rid: Any) -> None:
    with sender(besieged.run_dir) as s:
        answer = ask(s, msgpack.packb({"t": "status", "rid": rid}))
        assert not answer["ok"] and "'rid'" in answer["error"]


def test_a_request_number_deeper_than_an_answer_can_be(besieged: Enclave) -> None:
    with sender(besieged.run_dir) as s:
        for depth in (700, *range(1015, 1030)):
            assert not ask(s, packed_deep({"t": "status"}, "rid", depth))["ok"]
            assert not ask(s, packed_deep({"t": "no-such"}, "rid", depth))["ok"]


@pytest.mark.parametrize("dump", [{"a": "x" * (1 << 19)}, {"a": b"\xff"}, {b"a": 1}, {"a": msgpack.ExtType(5, b"x")}])
def test_a_dump_that_nobody_could_read_is_refused(besieged: Enclave, dump: dict[Any, Any]) -> None:
    """… or one component would make `status` fail for all."""
    with sender(besieged.run_dir) as s:
        assert ask(s, msgpack.packb(hello("kswapd")))["ok"]
        answer = ask(s, msgpack.packb({"t": "heartbeat", "name": "kswapd", "dump": dump}))
        assert not answer["ok"] and "'dump'" in answer["error"]
        for depth in (700, *range(1005, 1030)):  # as deep as a request can be; `status` would be two levels deeper
            inner = b"\x83\xa1t\xa9heartbeat\xa4name\xa6kswapd\xa4dump\x81\xa1a" + b"\x91" * depth + b"\x01"
            assert not ask(s, inner)["ok"]
            assert besieged.control.request({"t": "status"})
        assert besieged.component("kswapd")["dump"] == {}
        assert ask(s, msgpack.packb({"t": "goodbye", "name": "kswapd"}))["ok"]


def hello(name: str, **changes: Any) -> dict[str, Any]:
    return {"t": "hello", "name": name, "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()} | changes


def test_every_refusal_has_a_reason_and_is_counted(besieged: Enclave) -> None:
    op = np.zeros(1, OP_DTYPE).tobytes()
    txn = msgpack.packb({"t": "txn", "name": "buddy"})
    with sender(besieged.run_dir) as s:
        for reason, frames in [
            ("malformed", (b"",)), ("malformed", (b"\xc1",)), ("malformed", (b"\x80", b"", b"")), ("malformed", (b"\x81\xa1t",)),
            ("malformed", (msgpack.packb({"t": 5}),)), ("malformed", (msgpack.packb(hello("kswapd", implementation="a\nb")),)),
            ("oversized", (b"x" * (MAX_HEADER + 1),)), ("oversized", (b"x" * (40 << 20),)),
            ("unknown", (msgpack.packb({"t": "no-such"}),)), ("unknown", (msgpack.packb({"t": "x" * 100_000}),)),
            ("not_permitted", (txn, op)), ("not_permitted", (msgpack.packb({"t": "heartbeat", "name": "sched"}), op)),
            ("not_permitted", (msgpack.packb(hello("nobody")),)),
        ]:  # fmt: skip
            before = refusals(besieged)
            answer = ask(s, *frames)
            assert not answer["ok"] and 5 < len(answer["error"]) <= 1000, frames[0][:100]
            after = refusals(besieged)
            assert after.get(reason, 0) == before.get(reason, 0) + 1, (reason, frames[0][:100], answer)


def test_a_frame_that_would_eat_the_memory(besieged: Enclave) -> None:
    rss = psutil.Process(besieged.gateway.pid).memory_info().rss
    with sender(besieged.run_dir) as s:
        s.send(bytes(300 << 20))
        assert not s.poll(1000)
    assert psutil.Process(besieged.gateway.pid).memory_info().rss < rss + (200 << 20)


def test_replayed_operations_are_stale(besieged: Enclave) -> None:
    """What was right once is not a second time, even from the right one."""
    with tempfile.TemporaryDirectory(prefix="sylvie-") as directory:
        e = Enclave(Path(directory))
        try:
            wait_for(lambda: e.control.request({"t": "status"})["frames"]["offline"] == 0)
            e.as_buddy.request(hello("buddy"))
            ops = np.zeros(64, OP_DTYPE)
            ops["op"], ops["pfn"], ops["barrier"] = lib.SY_OP_RESERVE, np.arange(64), 1
            answer, raw = e.as_buddy.exchange({"t": "txn", "name": "buddy"}, ops.tobytes())
            assert answer["complete"] == 64
            for _ in range(20):
                answer, raw = e.as_buddy.exchange({"t": "txn", "name": "buddy"}, ops.tobytes())
                assert answer["complete"] == 0
                assert (np.frombuffer(raw, OP_DTYPE)["result"] == lib.SY_R_STALE).all()
            assert refusals(e)["stale"] == 20 * 64
            assert e.control.request({"t": "check"})["violations"] == 0
        finally:
            e.close()


def test_a_flood_of_small_requests(besieged: Enclave) -> None:
    """100,000, as fast as they go, by somebody who reads no answer; others are answered within reason."""
    # It stays until all is read: ZeroMQ drops what waits from somebody who has gone.
    code = SENDER + "for i in range(100_000): s.send(b'x')\nsys.stdin.read()"
    before, slowest = refusals(besieged).get("malformed", 0), 0.0
    command = [sys.executable, "-c", code, str(besieged.run_dir), str(ROOT)]
    with sender(besieged.run_dir) as s, subprocess.Popen(command, stdin=subprocess.PIPE) as flood:
        deadline = time.monotonic() + 60
        while refusals(besieged).get("malformed", 0) < before + 100_000:
            assert flood.poll() is None and time.monotonic() < deadline
            began = time.monotonic()
            assert ask(s, msgpack.packb({"t": "sync"}))["ok"]
            slowest = max(slowest, time.monotonic() - began)
        assert flood.stdin
        flood.stdin.close()
        assert flood.wait(10) == 0
    assert slowest < 10


def test_death_in_the_middle_of_a_message(besieged: Enclave) -> None:
    code = SENDER + "print(1, flush=True)\nwhile True: s.send_multipart([b'x' * (20 << 20)] * 8)"
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(besieged.run_dir), str(ROOT)],
            stdout=subprocess.PIPE,
        ) as p:  # fmt: skip
            assert p.stdout and p.stdout.readline() == b"1\n"
            time.sleep(random.random() / 10)
            p.send_signal(signal.SIGKILL)
        assert besieged.control.request({"t": "sync"})


# ---- many generated requests, straight into the function that answers them
KINDS = [
    "hello",
    "sync",
    "txn",
    "heartbeat",
    "goodbye",
    "status",
    "buddyinfo",
    "fault-order",
    "low",
    "post-test",
    "__init__",
    "",
]
FIELDS = ["name", "abi", "pid", "implementation", "words", "dump", "asid", "order", "low", "max_order", "n", "rid"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
small = st.sampled_from([0, 1, 2, 9, 10, 11, 511, 512, 2**16, 2**32 - 1, 2**32])
names = st.sampled_from(["buddy", "kswapd", "thp", "", "bud\0dy"])
values = (
    small
    | names
    | st.recursive(scalars, lambda x: st.lists(x, max_size=12) | st.dictionaries(scalars, x, max_size=3), max_leaves=12)
)
headers = st.fixed_dictionaries(
    {"t": st.sampled_from(KINDS) | values}, optional=dict.fromkeys(FIELDS, values) | {"words": st.fixed_dictionaries(
        {}, optional={"reserve": st.lists(values, min_size=11, max_size=11), "low": st.lists(values, min_size=10, max_size=10)})},
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> list[bytes]:
    header = draw(headers)
    if header["t"] == "hello" and header.get("name") == "buddy":
        header["name"] = "kswapd"  # who may say HELLO as whom is the keys' affair
    frame = msgpack.packb(header)
    what = draw(st.integers(0, 9))
    if what == 0:
        frame = draw(st.binary(max_size=60))
    elif what == 1:
        frame = frame[: draw(st.integers(0, len(frame)))]
    elif what == 2:
        at = draw(st.integers(0, len(frame) - 1))
        frame = frame[:at] + draw(st.binary(min_size=1, max_size=2)) + frame[at + 1 :]
        if b"buddy" in frame and b"hello" in frame:
            frame = frame.replace(b"buddy", b"bady!")
    ops = st.binary(max_size=100) | st.integers(1, 5).flatmap(lambda n: st.binary(min_size=32 * n, max_size=32 * n))
    return [frame, *draw(st.lists(ops, max_size=3))]


@pytest.fixture(scope="module")
def inside() -> Iterator[Gateway]:
    """A gateway in this process, and in it a buddy whose route is b"good" and a kswapd whose route is b"bad"."""
    with tempfile.TemporaryDirectory(prefix="sylvie-") as directory:
        keys.make(Path(directory))
        gateway = Gateway(Path(directory), {"ram": 16 << 20, "nodes": 1, "components": {"buddy": "x", "kswapd": "x"}})
        gateway.start()
        assert unpack(gateway.answer("buddy", b"good", [msgpack.packb(hello("buddy"))])[0])["ok"]
        yield gateway
        gateway.close()


def one_generated(gateway: Gateway, frames: list[bytes]) -> None:
    before = sum(gateway.refusals.values())
    answer, *_ = gateway.answer("kswapd" if b"kswapd" in frames[0] else keys.OPERATOR, b"bad", frames)
    header = unpack(answer)
    assert isinstance(header["ok"], bool)
    if not header["ok"]:
        assert header["error"] and sum(gateway.refusals.values()) == before + 1
    assert gateway.refusals["internal"] == 0, header
    assert gateway.components["buddy"].route == b"good"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(frames=requests())
def test_generated_requests(inside: Gateway, frames: list[bytes]) -> None:
    one_generated(inside, frames)


def mutants(rng: random.Random) -> Iterator[list[bytes]]:
    """For volume: requests that were right, with some bytes changed, cut or repeated."""
    right = [msgpack.packb(h) for h in (
        hello("kswapd", words={"reserve": [1] * 11}), {"t": "txn", "name": "kswapd"}, {"t": "heartbeat", "name": "kswapd", "dump": {"a": [1, {"b": 2}]}},
        {"t": "low", "asid": 1, "order": 3, "low": 5, "rid": 7}, {"t": "fault-order", "asid": 0, "order": 4, "max_order": 9}, {"t": "post-test", "n": 3},
        {"t": "sync"}, {"t": "goodbye", "name": "kswapd"}, {"t": "status", "rid": 1},
    )]  # fmt: skip
    while True:
        frame = bytearray(rng.choice(right))
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
            at = rng.randrange(len(frame))
            frame[at : at + rng.choice([0, 1, 1, 1, 3])] = rng.randbytes(rng.choice([0, 1, 1, 1, 2]))
            if not frame:
                break
        yield [
            bytes(frame),
            *(rng.randbytes(rng.choice([0, 31, 32, 64, 320])) for _ in range(rng.choice([0, 0, 1, 1, 2]))),
        ]


def bulk(gateway: Gateway, n: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    made = mutants(random.Random(seed))
    for i in range(n):
        one_generated(gateway, next(made))
        if i % 1000 == 0:
            gateway._relay()
    assert unpack(gateway.answer(keys.OPERATOR, b"good", [msgpack.packb({"t": "check"})])[0])["violations"] == 0


def test_mutated_requests(inside: Gateway) -> None:
    bulk(inside, 20_000)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_mutated_requests(inside: Gateway) -> None:
    bulk(inside, 1_000_000)
