"""From a channel to a Python component: rate without loss, and delivery time, beside raw pyzmq doing the same.

A program's stub would be the producer; here a C loop in the gateway's own process posts TEST events into the event ring (what the
drain thread does with each message that it has taken from a channel), and a component process counts what arrives.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import zmq

from bus.client import Control, subscribe, subscriber
from bus.codec import decode_batch
from kernel.abi import MSG_DTYPE

EVENTS, BATCH = 2_000_000, 512


def _count(run_dir: Path, n: int, answer: mp.Queue[tuple[int, int, float]]) -> None:
    """A component's receiving end: events received, gaps, seconds from the first to the last."""
    got = gaps = 0
    expected = first = None
    for _, seq, batch in subscribe(run_dir, "test", timeout=5):
        if expected is not None and seq != expected:
            gaps += 1
        expected = seq + len(batch)
        first = first or time.monotonic()
        got += len(batch)
        last = time.monotonic()
        if got >= n:
            break
    answer.put((got, gaps, last - first if first else 0.0))


def _raw_publisher(address: str, n: int, delays: bool) -> None:
    pub = zmq.Context().socket(zmq.PUB)
    pub.sndhwm = 0
    pub.bind(address)
    time.sleep(0.5)
    batch = np.zeros(1 if delays else BATCH, MSG_DTYPE)
    for i in range(n // len(batch)):
        batch["vpage"], batch["arg"] = i, time.monotonic_ns()
        pub.send_multipart([b"test", batch.tobytes()])
        if delays:
            time.sleep(0.002)
    pub.close()


def _raw(n: int, delays: bool) -> tuple[list[float], float]:
    """Plain pyzmq: µs from sending to receipt of each batch, and events a second."""
    with tempfile.TemporaryDirectory() as d:
        address = f"ipc://{d}/raw"
        p = mp.get_context("spawn").Process(target=_raw_publisher, args=(address, n, delays))
        p.start()
        sub: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        sub.rcvhwm = 0
        sub.subscribe(b"test")
        sub.connect(address)
        got, took, first = 0, [], 0.0
        while got < n and sub.poll(10000):
            _, data = sub.recv_multipart()
            now = time.monotonic_ns()
            batch = np.frombuffer(data, MSG_DTYPE)
            first = first or now / 1e9
            got += len(batch)
            took.append((now - int(batch["arg"][0])) / 1e3)
        p.join(10)
        sub.close()
        return took, got / (now / 1e9 - first)


def raw_rate(n: int) -> float:
    """Events a second."""
    return _raw(n, False)[1]


def raw_delays(n: int) -> list[float]:
    """µs from sending to receipt, of ``n`` single events."""
    return _raw(n, True)[0]


def measure(run_dir: Path) -> list[tuple[str, str, float, float, float | None, str]]:
    """Rows (what, unit, raw pyzmq, Sylvie, ratio, bound); the bound on the rate is against 500,000 events a second."""
    context = mp.get_context("spawn")
    answer: mp.Queue[tuple[int, int, float]] = context.Queue()
    counter = context.Process(target=_count, args=(run_dir, EVENTS, answer))
    counter.start()
    with Control(run_dir, 30) as c:
        time.sleep(1.0)  # the subscription
        posted = 0
        while posted < EVENTS:
            # At most half the ring at a time: more than a real burst, less than what no reader could follow.
            posted += c.request({"t": "post-test", "n": min(1 << 16, EVENTS - posted)})["n"]
        got, gaps, seconds = answer.get(timeout=60)
        counter.join(10)
        rate = got / seconds
        took = []
        with subscriber(run_dir, [b"test"]) as events:
            time.sleep(0.5)
            for _ in range(200):
                c.request({"t": "post-test", "n": 1})
                while not len(batch := decode_batch(events.recv_multipart())[2]):
                    pass  # an empty one carries sequence numbers only
                took.append((time.monotonic_ns() - int(batch["arg"][-1])) / 1e3)
        lost = EVENTS - got + gaps
    return [
        (
            f"kernel events to a Python component ({lost} lost)",
            "events/s",
            500_000.0,
            rate,
            rate / 500_000 if not lost else 0.0,
            ">= 1.0",
        ),
        ("… the same by raw pyzmq, batches of 512", "events/s", raw_rate(EVENTS), rate, None, ""),
        ("delivery of one event, p50 (native: raw pyzmq)", "µs", statistics.median(raw_delays(500)), statistics.median(took), None, ""),
    ]
