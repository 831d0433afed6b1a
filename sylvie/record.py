"""``sylvie record``: a program on an enclave of its own, whose kswapd does nothing but look on; what it touches becomes a trace.

The trace has one access for each page and sampling interval in which the page was touched, in the order of these first touches, and one
for each page that was mapped. So it says which pages a program works on, not how often it touches them within some 30 ms, and not which it
only read. Native memory (docs/limits.md) is not in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.client import Control, subscriber
from bus.codec import BusError, decode_batch
from kernel.abi import lib
from kernel.providers.sim.trace import trace_of
from sylvie import life
from sylvie.cli import Problem

SAMPLER = "sampler"
PAGE_BITS = 24  # of a page in its arena


def accesses(events: NDArray[np.void]) -> NDArray[np.uint64]:
    """Of events of one batch, in order, those that tell of a touch: asid << 24 | page, shape (accesses,)."""
    told = events[np.isin(events["type"], [lib.SY_MSG_PAGE_MAPPED, lib.SY_MSG_PAGE_HINT])]
    count = told["npages"].astype(np.int64)
    first = told["asid"].astype(np.uint64) << np.uint64(PAGE_BITS) | told["vpage"]
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(first, count) + offset.astype(np.uint64)


class Listener(threading.Thread):
    """Follows the topic ``page`` until told to stop. ``parts``: accesses by batch; ``lost``: events that did not come."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.parts: list[NDArray[np.uint64]] = []
        self.lost = 0
        self.enough = threading.Event()
        self.joined = threading.Event()
        self._socket = subscriber(run_dir, [b"page"])

    def run(self) -> None:
        expected: int | None = None
        with self._socket as socket:
            # What is still on the way when the program ends comes within one more poll.
            while socket.poll(200) or not self.enough.is_set():
                if not socket.poll(0):
                    continue
                _, first, events = decode_batch(socket.recv_multipart())
                self.joined.set()
                self.lost += max(0, first - expected) if expected is not None else 0
                expected = first + len(events)
                if len(touched := accesses(events)):
                    self.parts.append(touched)


def follow(run_dir: Path) -> Listener:
    """One that certainly hears everything from now on. :raises Problem: nothing comes"""
    listener = Listener(run_dir)
    listener.start()
    with Control(run_dir) as control:
        for _ in range(200):
            control.request({"t": "sync"})  # is answered by an empty batch to all who listen
            if listener.joined.wait(0.05):
                return listener
    raise Problem("the gateway publishes nothing: see the logs, and `sylvie doctor`")


def main(command: list[str], out: Path, ram: int, swap: int) -> int:
    """Runs ``command``, writes the trace; the program's exit status.

    :raises Problem: no enclave comes up; nothing was touched; OSError: the trace cannot be written
    """
    out.parent.resolve(strict=True)
    with tempfile.TemporaryDirectory(prefix="sylvie-record-") as d:
        os.chmod(d, 0o755)  # components run under uids of their own
        run_dir = Path(d) / "run"
        settings = {"ram": ram, "nodes": 1, "oom": "kill", "swap": swap, "users": life.parse_users(())}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the program's
                life.up(run_dir, settings, {"kswapd": SAMPLER})
            with Control(run_dir) as control:  # page by page, or what lies beside a touched page would look touched
                control.request({"t": "fault-order", "asid": 0, "order": 0, "max_order": 0})
            listener = follow(run_dir)
            status = run(run_dir, command)
            overflows, dump = counts(run_dir)
            listener.enough.set()
            listener.join()
        except BusError as e:
            raise Problem(str(e)) from None
        finally:
            if (run_dir / "config.json").exists():
                with contextlib.redirect_stdout(sys.stderr):
                    life.down(run_dir)
    if not listener.parts:
        raise Problem(f"the program touched no managed memory (it exited with status {status}): `sylvie doctor`, and docs/limits.md, tell what is not managed")  # fmt: skip
    trace = trace_of(
        np.concatenate(listener.parts), {"command": command, "lost": listener.lost, "samples": dump["samples"]}
    )
    trace.save(out)
    print(f"{out}: {len(trace)} accesses to {len(trace.vpages)} pages, {dump['samples']} samples", file=sys.stderr)
    if listener.lost or overflows:
        print(f"{listener.lost} events were lost, and {overflows} times a program's channel was full: this is not all that was touched", file=sys.stderr)  # fmt: skip
    return status


def run(run_dir: Path, command: list[str]) -> int:
    """The program's exit status, as a shell says it. Ctrl-C is for the program, and we wait for its end; told to end ourselves, we
    end it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    sylvie = Path(sys.executable).with_name("sylvie")
    program = subprocess.Popen([sylvie, "--run-dir", run_dir, "run", "--", *command])
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                status = program.wait()
                return status if status >= 0 else 128 - status
    finally:
        program.terminate()  # (nothing happens to who has ended)


def counts(run_dir: Path) -> tuple[int, dict[str, Any]]:
    """How often a channel was full; what the sampler says of itself."""
    s = life.control(run_dir, {"t": "status"})
    dump = next(c["dump"] for c in s["components"] if c["name"] == "kswapd")
    return int(s["counters"]["overflows"]), {"samples": 0} | dump
