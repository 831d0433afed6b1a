"""sched beside the kernel's own scheduler: a dispersive load, alone and beside batch work; what a message and a decision take; how many messages are read without loss.

The load (``programs/dispersive.c``): requests of 1 ms, but for one in two hundred, of 100 ms; an open loop. The server is the same program on both sides; here `sylvie run
--sched` starts it. Who sends the requests is another process, of the same real-time priority on both sides, above everything. "Batch" are four processes that compute without
a pause (``programs/batch.c``): ordinary ones that sched does not have, then ones that it has. Native runs and ours alternate, with the same arrivals.

ghOSt's own figures (Humphries et al., SOSP '21, table 3; agents in C++, no virtual machine) are shown beside ours, and are of another order, for reasons that are no secret:
there, the kernel itself writes messages to memory, on which the global agent spins, or switches to the CPU's own; and a commit is a system call that hands a CPU over. Here a message is a record in perf's ring
that a thread of the gateway must wake up for (at most once in 150 µs, so that many come at once), goes through a ring to the bus, a socket, another process's wake-up and a few
microseconds of Python; a commit is a request and an answer over such sockets, then two system calls about the thread, then the kernel's own preemption. Each wake-up of another
thread costs tens of microseconds in a virtual machine, and there are three or four. So raw pyzmq, which has two of them, is what this is to be compared with; and policies that
must answer quicker decide beforehand (SY_RUN_STANDING): then no wake-up waits for a message at all.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import zmq
from rich.progress import track

from bench.bus_bench import raw_delays
from bus.client import Control
from bus.runtime import fetch_tables
from kernel.abi import OP_DTYPE, lib

if TYPE_CHECKING:
    from bench.__main__ import Bench

HERE = Path(__file__).resolve().parent
LOADS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SECONDS, ROUNDS = 10.0, 3
BATCHES = 4
PRIORITY = 40  # of who sends the requests: above all that is Sylvie's
POLICY = "shinjuku"
ALONE, UNKNOWN, KNOWN = "alone", "beside batch", "beside batch that sched has"
# (beside what, is it ours), in the order in which they are run; native runs beside batch are what both kinds are compared with
RUNS = ((ALONE, False), (ALONE, True), (UNKNOWN, False), (UNKNOWN, True), (KNOWN, True))
# p99 of short requests at this load, at most so many times the kernel's
AT = 0.7
BOUNDS = {ALONE: "<= 0.5", UNKNOWN: "<= 0.25", KNOWN: "<= 0.25"}
# Microseconds: SOSP '21, table 3.
GHOST = {"message": "0.725 to a local agent, 0.265 to the global one", "run": "0.888 locally, 1.772 to another CPU"}
Line = tuple[str, str, float | None, float | None, float | None, str]
Managed = Callable[[Sequence[str | Path]], list[str]]


# ---- all that depends on the command line of sylvie
@dataclass
class Side:
    """An enclave, by its commands."""

    bench: Bench

    def up(self, policy: str) -> None:
        self.bench.up("256M", "-i", f"sched={policy}")
        self.bench.populated()

    def managed(self, cmd: Sequence[str | Path]) -> list[str]:
        """The command line that runs ``cmd`` with all its threads scheduled by sched."""
        return [str(x) for x in (*self.bench.cli, "run", "--sched", "--", *cmd)]

    def swap(self, policy: str) -> None:
        self.bench.sylvie("swap", "sched", policy)

    def counters(self) -> dict[str, int]:
        """What the gateway has counted of sched."""
        out = subprocess.run([*self.bench.cli, "sched", "status", "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
        return {name: int(value) for name, value in json.loads(out)["counters"].items()}

    def status(self) -> tuple[dict[str, Any], int]:
        """Of sched, and the gateway's pid."""
        with Control(self.bench.run_dir, 60) as control:
            answer = control.request({"t": "status"})
        return next(c for c in answer["components"] if c["name"] == "sched"), int(answer["pid"])

    def dump(self) -> dict[str, Any]:
        """What the policy says of itself, with the next heartbeat but one."""
        time.sleep(1.2)
        return dict(self.status()[0]["dump"])

    def cpu(self) -> float:
        """Seconds that sched and the gateway have used so far."""
        component, gateway = self.status()
        return sum(t.user + t.system for t in (psutil.Process(pid).cpu_times() for pid in (component["pid"], gateway)))


# ---- a dispersive load
@dataclass
class Point:
    """One load, one side, beside one kind of batch: the medians of its rounds. Milliseconds; endless if so many requests were not served."""

    beside: str
    ours: bool
    load: float
    value: dict[str, float] = field(default_factory=dict)

    def of(self, what: str) -> float:
        return self.value.get(what, math.nan)


def compiled(directory: Path) -> dict[str, Path]:
    """The programs of this suite."""
    for name in (names := ("dispersive", "batch", "wakes")):
        subprocess.run(["gcc", "-O2", "-Wall", "-o", directory / name, HERE / "programs" / f"{name}.c", "-lpthread", "-lm"], check=True)
    return {name: directory / name for name in names}


@contextlib.contextmanager
def batch(program: Path, wrap: Managed, count: int) -> Iterator[int]:
    """``count`` processes that compute, all on their way; gives the descriptor of their counters."""
    page = os.memfd_create("counters", 0)
    running: list[subprocess.Popen[bytes]] = []
    try:
        os.ftruncate(page, 4096)
        for k in range(count):
            running.append(subprocess.Popen(wrap([program, str(page), str(k)]), pass_fds=(page,)))
        end = time.monotonic() + 60
        while sum(np.frombuffer(os.pread(page, 4096, 0), np.uint64) > 0) < count:
            if time.monotonic() > end or any(p.poll() is not None for p in running):
                raise RuntimeError("batch work does not begin")
            time.sleep(0.05)
        yield page
    finally:
        for p in running:
            p.kill()
            p.wait(60)
        os.close(page)


def natively(cmd: Sequence[str | Path]) -> list[str]:
    return [*map(str, cmd)]


def once(programs: dict[str, Path], managed: Managed, beside: str, ours: bool, load: float, seconds: float, seed: int) -> dict[str, Any]:
    """One run: what dispersive prints, and what it was."""
    with batch(programs["batch"], managed if beside == KNOWN else natively, 0 if beside == ALONE else BATCHES) as page:
        options = {"load": load, "seconds": seconds, "seed": seed, "priority": PRIORITY, "counters": page}
        line = [str(programs["dispersive"]), *(f"--{name}={value:g}" for name, value in options.items()), "--", *(managed([]) if ours else [])]
        out = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 180, pass_fds=(page,)).stdout
    return {"beside": beside, "ours": ours, "seed": seed} | json.loads(out)


def dispersive(programs: dict[str, Path], side: Side, loads: Sequence[float], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All runs; those of one round have the same arrivals at the same load."""
    runs = []
    for r, load, (beside, ours) in track([*itertools.product(range(rounds), loads, RUNS)], "dispersive load", transient=True):
        used, began = side.cpu(), time.monotonic()
        run = once(programs, side.managed, beside, ours, load, seconds, 1 + r)
        runs.append(run | {"own_cpu": (side.cpu() - used) / (time.monotonic() - began)})
    return runs


def points(runs: Sequence[dict[str, Any]]) -> list[Point]:
    """Medians over rounds, in the order in which they first come."""
    found: dict[tuple[str, bool, float], list[dict[str, Any]]] = {}
    for r in runs:
        found.setdefault((r["beside"], r["ours"], r["load"]), []).append(r)
    result = []
    for (beside, ours, load), of in found.items():
        p = Point(beside, ours, load)
        for kind in ("short", "long"):
            for q in ("p50", "p99", "p999"):
                p.value[f"{kind}_{q}"] = statistics.median(math.inf if r[kind][q] is None else r[kind][q] for r in of)
        for name in ("drops", "unfinished", "iterations", "late_p99", "own_cpu"):
            p.value[name] = statistics.median(math.inf if r[name] is None else r[name] for r in of)
        p.value["overhead"] = statistics.median(r["cpu_ms"] / r["work_ms"] if r["work_ms"] else math.nan for r in of)
        result.append(p)
    return result


def pairs(found: Sequence[Point]) -> list[tuple[Point, Point]]:
    """(native, ours): each of ours with the native one of that load, beside batch for both kinds of it."""
    native = {(p.beside, p.load): p for p in found if not p.ours}
    matched = [(native.get((UNKNOWN if p.beside == KNOWN else p.beside, p.load)), p) for p in found if p.ours]
    return sorted(((n, p) for n, p in matched if n is not None), key=lambda pair: (BESIDE[pair[1].beside], pair[1].load))


BESIDE = {ALONE: 0, UNKNOWN: 1, KNOWN: 2}


def ratio(ours: float, native: float) -> float:
    """0 beside what natively has no end; nothing can be said of two that have none, or of what was not measured."""
    if math.isinf(native):
        return 0.0 if math.isfinite(ours) else math.nan
    return ours / native if native else math.nan


def markdown(found: Sequence[Point]) -> str:
    """The table, for people and for docs."""
    head = ("short requests, ms", "load", "p50 native", "sched", "p99 native", "sched", "ratio", "p99.9 native", "sched", "p99 of long ones, ratio", "batch, ratio", "CPU used, of work asked for", "CPUs of sched and gateway", "not served", "sent late, p99")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for n, p in pairs(found):
        cells = [p.beside, f"{p.load:g}"]
        cells += [_number(x.of(f"short_{q}")) for q in ("p50", "p99") for x in (n, p)]
        cells.append(_number(ratio(p.of("short_p99"), n.of("short_p99"))))
        cells += [_number(x.of("short_p999")) for x in (n, p)]
        cells.append(_number(ratio(p.of("long_p99"), n.of("long_p99"))))
        cells.append("" if p.beside == ALONE else _number(ratio(p.of("iterations"), n.of("iterations"))))
        cells.append(f"{_number(n.of('overhead'))} / {_number(p.of('overhead'))}")
        cells.append(_number(p.of("own_cpu")))
        cells.append(" / ".join(f"{x.of('drops') + x.of('unfinished'):g}" for x in (n, p)))
        cells.append(" / ".join(_number(x.of("late_p99")) for x in (n, p)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(x: float) -> str:
    return "–" if math.isnan(x) else "∞" if math.isinf(x) else f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def text_plot(found: Sequence[Point], what: str = "short_p99", width: int = 60) -> str:
    """``what`` by load, a row each, on a logarithmic scale: N native, S sched, X both at the same place; > beyond all, as of what was never served."""
    shown = pairs(found)
    finite = [v for pair in shown for p in pair if math.isfinite(v := p.of(what)) and v > 0]
    if not finite:
        return "nothing to plot\n"
    low, high = math.log(min(finite)), math.log(max(finite))

    def at(v: float) -> int:
        return width - 1 if not math.isfinite(v) else round((math.log(v) - low) / (high - low or 1) * (width - 2))

    lines, before = [f"{what.replace('_', ' requests, ')}, ms"], ""
    for n, p in shown:
        if p.beside != before:
            lines.append(p.beside)
            before = p.beside
        row = [" "] * width
        for point, mark in ((n, "N"), (p, "S")):
            v = point.of(what)
            row[at(v)] = ">" if not math.isfinite(v) else "X" if row[at(v)] != " " else mark
        lines.append(f" {p.load:4g} |{''.join(row)}| {_number(n.of(what)):>6} → {_number(p.of(what))}")
    left, right = _number(math.exp(low)), _number(math.exp(high))
    lines.append(f"       {left}{' ' * max(1, width - len(left) - len(right))}{right}   (N native, S sched; logarithmic)")
    return "\n".join(lines) + "\n"


def picture(found: Sequence[Point], path: Path) -> None:
    """The same with matplotlib, where it is installed (`make bench` does that)."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing (`make bench` installs it)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, kinds in zip(axes, ((ALONE,), (UNKNOWN, KNOWN)), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for p in sorted(found, key=lambda p: p.load):
            if p.beside in kinds and math.isfinite(p.of("short_p99")):
                lines.setdefault("kernel" if not p.ours else f"sched, {p.beside}", []).append((p.load, p.of("short_p99")))
        for label, line in lines.items():
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        axis.set(yscale="log", xlabel="load", title=kinds[0])
        axis.legend()
    axes[0].set_ylabel("p99 of short requests, ms")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def lines_of(found: Sequence[Point]) -> list[Line]:
    """Rows for the table of all suites."""
    lines: list[Line] = []
    for n, p in pairs(found):
        a, b = n.of("short_p99"), p.of("short_p99")
        lines.append((f"short requests' p99, load {p.load:g}, {p.beside}", "ms", a, b, ratio(b, a), BOUNDS[p.beside] if p.load == AT else ""))
    for n, p in pairs(found):
        if p.beside != ALONE:
            a, b = n.of("iterations"), p.of("iterations")
            lines.append((f"batch work done, load {p.load:g}, {p.beside}", "blocks", a, b, ratio(b, a), ""))
    return lines


# ---- messages and decisions
def _replies(address: str, n: int) -> None:
    rep = zmq.Context().socket(zmq.REP)
    rep.bind(address)
    for _ in range(n):
        rep.send_multipart(rep.recv_multipart())
    rep.close()


def raw_round_trips(n: int) -> list[float]:
    """µs of requests and answers as large as a commit of one RUN, between two processes by plain pyzmq."""
    with tempfile.TemporaryDirectory() as d:
        address = f"ipc://{d}/raw"
        p = mp.get_context("spawn").Process(target=_replies, args=(address, n))
        p.start()
        req: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        req.connect(address)
        took, op = [], np.zeros(1, OP_DTYPE).tobytes()
        for _ in range(n):
            t = time.monotonic_ns()
            req.send_multipart([b"transaction: sched", op])
            req.recv_multipart()
            took.append((time.monotonic_ns() - t) / 1e3)
        p.join(10)
        req.close()
        return took


def latencies(programs: dict[str, Path], side: Side, seconds: float) -> list[Line]:
    """Under ``components/sched/probe.py``: from a wake-up to its handler; from a decision to the CPU, past what computes there."""
    side.swap("probe")
    subprocess.run(side.managed([programs["wakes"], f"{seconds:g}", "sleep", "2000"]), check=True, stdout=subprocess.DEVNULL, timeout=seconds * 10 + 60)
    message = side.dump()["delivered_us"]
    with batch(programs["batch"], side.managed, BATCHES):
        time.sleep(seconds)
        ran = side.dump()
    run = ran["ran_us"]
    pub, req = raw_delays(500), raw_round_trips(2000)
    result: list[Line] = []
    for what, mine, raw, ghost in (
        ("wake-up in the kernel to Python handler", message, pub, f"raw PUB/SUB; ghOSt {GHOST['message']}"),
        ("RUN of a waiting thread, decision to on CPU", run, req, f"raw REQ/REP; ghOSt {GHOST['run']}"),
    ):
        for q, name in ((0.5, "p50"), (0.99, "p99")):
            native, ours = float(np.quantile(raw, q)), float(mine.get(name, math.nan))
            label = f"{what}, p50, of {mine['n']} ({ghost})" if name == "p50" else "… p99"
            result.append((label, "µs", native, ours, ratio(ours, native), ""))
    return result


def sustained(programs: dict[str, Path], side: Side, seconds: float) -> list[Line]:
    """Threads that wake one another over pipes: how often natively and here, what that is in messages, and whether any was lost."""
    lines: list[Line] = []

    def wakes(cmd: list[str]) -> float:
        return float(subprocess.run(cmd, check=True, capture_output=True, text=True, timeout=seconds * 10 + 60).stdout.split()[1]) / seconds

    # each wake-up is two messages: probe handles both, fifo_per_cpu answers them too, shinjuku has decided beforehand
    for policy, n in (("probe", 1), ("probe", 8), ("fifo_per_cpu", 8), (POLICY, 8)):
        side.swap(policy)
        cmd = [str(programs["wakes"]), f"{seconds:g}", "pipe", str(n)]
        native = wakes(cmd)
        dumped, before = side.dump(), side.counters()
        ours = wakes(side.managed(cmd))
        after = side.counters()
        dump = side.dump()
        more = {name: after[name] - before[name] for name in after}
        gaps = dump.get("gaps", 0) - dumped.get("gaps", 0)
        lost = more["lost"] + max(0, gaps)
        lines += [
            (f"wake-ups over pipes, {n} pairs, {policy}", "1/s", native, ours, ratio(ours, native), ""),
            (f"… messages ({more['lost']} records lost, {gaps} gaps, {more['resyncs']} resyncs, {more['fallbacks']} fallbacks)", "1/s", None, more["messages"] / seconds if not lost else 0.0, None, ""),
        ]
        if more["runs"] + more["refused"]:
            lines.append((f"… RUNs ({more['refused']} refused: too late)", "1/s", None, more["runs"] / seconds, None, ""))
    # Reading what the kernel's scheduler does is not free for programs that are none of sched's business.
    cmd = [str(programs["wakes"]), f"{seconds:g}", "pipe", "8"]
    alone = wakes(cmd)
    read = side.counters()["records"]
    with batch(programs["batch"], side.managed, 1):
        beside_ours = wakes(cmd)
    with batch(programs["batch"], natively, 1):
        beside = wakes(cmd)
    read = side.counters()["records"] - read
    lines.append((f"wake-ups of a program that sched does not have, beside one that it has ({read / seconds:,.0f} records/s; alone {alone:,.0f})", "1/s", beside, beside_ours, ratio(beside_ours, beside), ""))
    return lines


# ---- what each knows of the other
PACE = """
import sys, time
mib, work, rest, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
b = bytearray(mib << 20)
print(flush=True)
sys.stdin.readline()
passes, took, end = 0, 0.0, time.monotonic() + seconds
while time.monotonic() < end:
    began = time.monotonic()
    while True:
        for at in range(0, len(b), 1 << 20):
            b[at : at + (1 << 20) : 4096] = b"x" * 256
        passes += 1
        if time.monotonic() - began >= work:
            break
    took += time.monotonic() - began
    time.sleep(rest)
print(passes, took, flush=True)
"""


@contextlib.contextmanager
def paced(wrap: Managed, *what: tuple[int, float, float], seconds: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that go through so many MiB for so many seconds, and rest for so many, again and again; all have their memory, and have begun."""
    running: list[subprocess.Popen[str]] = []
    try:
        for one in what:
            p = subprocess.Popen(wrap([sys.executable, "-c", PACE, *map(str, one), str(seconds)]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(p)
            if not (p.stdout and p.stdout.readline()):
                raise RuntimeError("it does not begin")
        for p in running:
            if p.stdin:
                p.stdin.write("\n")
                p.stdin.flush()
        yield running
    finally:
        for p in running:
            p.kill()
            p.wait(60)


def spared(bench: Bench, seconds: float) -> list[Line]:
    """A program that runs all the time beside one that sleeps most of it; RAM holds one and a half of them. kswapd without, and with what sched knows."""
    found: dict[str, tuple[float, float]] = {}
    for policy in ("two_list", "spare_running"):
        bench.up("96M", "--swap", "512M", "-i", f"kswapd={policy}")
        try:
            bench.populated()
            with paced(Side(bench).managed, (64, 0.0, 0.0), (48, 0.0, 2.0), seconds=seconds) as (runner, sleeper):
                ran, slept = ([float(x) for x in p.communicate(timeout=seconds * 5 + 60)[0].split()] for p in (runner, sleeper))
            found[policy] = ran[0] / seconds, slept[1] / slept[0] * 1e3
        finally:
            bench.sylvie("down")
    (a, b), (c, d) = found["two_list"], found["spare_running"]
    return [
        ("passes of a program beside one that sleeps: kswapd two_list, spare_running", "1/s", a, c, ratio(c, a), ""),
        ("… what the sleeper needs for a pass when it wakes", "ms", b, d, ratio(d, b), ""),
    ]


def near(bench: Bench, seconds: float) -> list[Line]:
    """Of the times that programs are seen on a CPU, the share on the node that has most of their frames: RAM divided in two, four programs that work and rest."""
    share = {}
    for policy in ("fifo_per_cpu", "numa_aware"):
        bench.up("256M", "--nodes", "2", "-i", f"sched={policy}")
        try:
            bench.populated()
            with paced(Side(bench).managed, *[(16, 0.004, 0.004)] * 4, seconds=seconds), Control(bench.run_dir, 60) as control:
                home, node_of, seen, here = {}, [], 0, 0
                end = time.monotonic() + seconds - 1
                frames, looked = _frames(bench), 0.0
                node_of = control.request({"t": "status"})["topology"]["cpu_node"]
                while time.monotonic() < end:
                    if time.monotonic() - looked > 0.5:
                        looked = time.monotonic()
                        mapped = frames[frames["state"] == lib.SY_FRAME_MAPPED]
                        home = {int(a): int(np.bincount(mapped["node"][mapped["asid"] == a], minlength=2).argmax()) for a in np.unique(mapped["asid"])}
                    for task in control.request({"t": "sched"})["tasks"]:
                        if task["on_cpu"] and task["asid"] in home:
                            seen, here = seen + 1, here + (node_of[task["cpu"]] == home[task["asid"]])
                    time.sleep(0.01)
                share[policy] = here / max(1, seen)
        finally:
            bench.sylvie("down")
    a, b = share["fifo_per_cpu"], share["numa_aware"]
    return [("threads on the node that has their frames: fifo_per_cpu, numa_aware", "share", a, b, ratio(b, a), "")]


def _frames(bench: Bench) -> np.ndarray:
    """The frame table of the enclave that is up."""
    return fetch_tables(bench.run_dir, lib.SY_C_SCHED).frames


def measure(bench: Bench, policy: str = POLICY, loads: Sequence[float] = LOADS, seconds: float = SECONDS, rounds: int = ROUNDS) -> list[Line]:
    """Brings its own enclave up, and down. The table and the plots go to ``bench/results/sched.*`` and to standard output."""
    programs, side = compiled(bench.run_dir.parent), Side(bench)
    side.up(policy)
    try:
        runs = dispersive(programs, side, loads, seconds, rounds)
        report(runs)
        lines = [*lines_of(points(runs)), *latencies(programs, side, seconds), *sustained(programs, side, seconds)]
    finally:
        bench.sylvie("down")
    return [*lines, *spared(bench, max(10.0, seconds)), *near(bench, max(5.0, seconds))]


def report(runs: Sequence[dict[str, Any]], directory: Path = HERE / "results") -> None:
    """``sched.json`` (every run), ``sched.md``, ``sched.png``; the plot in text to standard output."""
    found = points(runs)
    directory.mkdir(exist_ok=True)
    (directory / "sched.json").write_text(json.dumps(runs, indent=1))
    (directory / "sched.md").write_text(markdown(found))
    picture(found, directory / "sched.png")
    print(text_plot(found))


def main() -> int:
    """``python -m bench.sched``: this suite alone, shorter or for another policy. 0."""
    from bench.__main__ import Bench, Row, show

    parser = argparse.ArgumentParser(prog="python -m bench.sched")
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy-bench-") as d:
        os.chmod(d, 0o755)
        show([Row(*line) for line in measure(Bench(Path(d)), a.policy, [float(x) for x in a.loads.split(",")], a.seconds, a.rounds)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
