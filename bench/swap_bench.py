"""Working sets of twice the memory: every kswapd policy beside a memory cgroup of the same size that swaps to zram (lz4), in the same run.

Both sides may have ``MEMORY`` resident, by a cgroup's limit and by ``sylvie run --limit``; what compressed pages take comes on top on both.
Each workload (``programs/reclaim.c``) checks what it reads.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import track

from bus.client import Control
from kernel import host
from sylvie.life import implementations
from sylvie.replay import NOT_BY_DEFAULT

HERE = Path(__file__).resolve().parent
MEMORY = 128  # MiB; working sets are twice that
ROUNDS = 3
WORKLOADS = {"cyclic": 260, "random": 150, "zipf": 400, "sequential": 262}  # thousands of accesses
Values = tuple[float, int]  # seconds or µs, pages brought back
Line = tuple[str, str, float | None, float | None, float | None, str]


class NoBaseline(Exception):
    """This machine lacks what the native side needs; says what."""


@contextlib.contextmanager
def native_limit() -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """zram swap and a memory cgroup (v1), both gone afterwards. Gives what a child does before exec, and a count of major faults so far."""
    with contextlib.ExitStack() as undo:
        host.acquire("the native side")  # the same settings for both
        undo.callback(host.release, "the native side")
        group = Path("/sys/fs/cgroup/memory/sylvie-bench")
        free = [d for d in Path("/sys/block").glob("zram*") if (d / "disksize").read_text().strip() == "0"]
        if not free or not group.parent.is_dir():
            raise NoBaseline("no unused zram device" if not free else "no memory cgroup (v1)")
        zram, device = free[0], f"/dev/{free[0].name}"
        undo.callback((zram / "reset").write_text, "1")
        (zram / "comp_algorithm").write_text("lz4")
        (zram / "disksize").write_text("1G")
        subprocess.run(["mkswap", device], check=True, capture_output=True)
        subprocess.run(["swapon", "-p", "32767", device], check=True)
        undo.callback(subprocess.run, ["swapoff", device], check=True)
        group.mkdir()
        undo.callback(group.rmdir)
        (group / "memory.limit_in_bytes").write_text(str(MEMORY << 20))

        def faults() -> int:
            return int(re.search(r"^pgmajfault (\d+)", (group / "memory.stat").read_text(), re.M)[1])  # type: ignore[index]

        def enter() -> None:
            (group / "tasks").write_text(str(os.getpid()))

        yield enter, faults


class Redis:
    """A dataset of twice the memory in redis; GETs by a Zipf law of exponent 1, pipelined by 16. Seconds."""

    KEYS, SIZE, GETS = 60_000, 4096, 60_000

    def __init__(self, sock: Path) -> None:
        self.sock = sock
        r = random.Random(0)
        weights = [1 / (i + 1) for i in range(self.KEYS)]
        order = r.sample(range(self.KEYS), self.KEYS)
        self.wanted = r.choices(order, weights, k=self.GETS)
        self.values = [r.randbytes(self.SIZE // 2) + b"such text " * (self.SIZE // 20) for _ in range(64)]

    def command(self) -> list[str]:
        return ["redis-server", "--port", "0", "--unixsocket", str(self.sock), "--save", "", "--dir", str(self.sock.parent)]

    def _exchange(self, s: socket.socket, requests: list[bytes], size: int) -> None:
        for i in range(0, len(requests), 16):
            s.sendall(b"".join(requests[i : i + 16]))
            left = size * len(requests[i : i + 16])
            while left:
                left -= len(s.recv(left))

    def run(self, server: subprocess.Popen[bytes]) -> float:
        deadline = time.monotonic() + 30
        while not self.sock.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(300)
            s.connect(str(self.sock))
            value = len(self.values[0])
            sets = [b"*3\r\n$3\r\nSET\r\n$8\r\n%08d\r\n$%d\r\n%s\r\n" % (k, value, self.values[k % 64]) for k in range(self.KEYS)]
            self._exchange(s, sets, len(b"+OK\r\n"))
            t = time.perf_counter()
            self._exchange(s, [b"*2\r\n$3\r\nGET\r\n$8\r\n%08d\r\n" % k for k in self.wanted], value + len(b"$%d\r\n\r\n" % value))
            t = time.perf_counter() - t
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        return t


def single(run_dir: Path, managed: Callable[[list[str | Path]], list[str]], sylvie: Callable[..., None]) -> list[Line]:
    """One page brought back for a touch, out of each tier, beside a minimal userfaultfd handler that asks another process for it; no pressure."""
    program = run_dir.parent / "swapin"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, HERE / "programs" / "swapin.c", "-lpthread"], check=True)

    def p50(cmd: list[str]) -> float:
        return float(subprocess.run(cmd, capture_output=True, text=True, check=True, timeout=120).stdout.split()[1])

    lines: list[Line] = []
    for tier, pool in (("compressed", "50%"), ("in the swap file", "0%")):
        sylvie("up", "--ram", f"{MEMORY}M", "--swap", "2G", "--pool", pool)
        try:
            both = [
                (p50([str(program), "minimal"]), p50(managed([program, "swapped", str(2 * MEMORY)])))
                for _ in track(range(ROUNDS), f"single swap-in, {tier}", transient=True)
            ]
        finally:
            sylvie("down")
        least, ours = (statistics.median(of) for of in zip(*both, strict=True))
        what = f"single 4 KiB swap-in, {tier}, p50 (against a minimal userfaultfd handler with one hop)"
        lines.append((what, "µs", least, ours, ours / least, "<= 1.5"))
    return lines


def measure(run_dir: Path, managed: Callable[[list[str | Path]], list[str]], sylvie: Callable[..., None]) -> list[Line]:
    """All workloads under every policy; the plot goes to ``bench/results/swap.png``. Brings its own enclave up in ``run_dir`` and down."""
    program = run_dir.parent / "reclaim"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, HERE / "programs" / "reclaim.c", "-lm"], check=True)
    redis = Redis(run_dir.parent / "swap-redis.sock")
    names = [*WORKLOADS, "redis", "CPython sort"]

    def once(what: str, wrap: Callable[[list[str | Path]], list[str]], before: Callable[[], None] | None) -> float:
        if what == "redis":
            server = subprocess.Popen(wrap([*redis.command()]), stdout=subprocess.DEVNULL, preexec_fn=before)
            try:
                return redis.run(server)
            finally:
                server.kill()
                server.wait(30)
        cmd: list[str | Path] = (
            [program, what, str(2 * MEMORY), str(WORKLOADS[what])]
            if what in WORKLOADS
            else [sys.executable, HERE / "programs" / "strings.py"]
        )
        out = subprocess.run(wrap(cmd), preexec_fn=before, capture_output=True, text=True, check=True, timeout=300).stdout
        return float(out.split()[1])

    native: dict[str, list[Values]] = {w: [] for w in names}
    why = ""
    try:
        with native_limit() as (enter, faults):
            for what in track(names, "native, memory cgroup and zram", transient=True):
                for _ in range(ROUNDS):
                    had = faults()
                    native[what].append((once(what, lambda c: [*map(str, c)], enter), faults() - had))
    except NoBaseline as missing:
        why = f" (native not measured: {missing})"
    ours: dict[str, dict[str, list[Values]]] = {}
    sylvie("up", "--ram", f"{4 * MEMORY}M", "--swap", "2G")
    try:
        with Control(run_dir, 30) as control:

            def pages() -> int:
                return int(control.request({"t": "status"})["counters"]["swapped_in"])

            policies = sorted({*implementations("kswapd")} - NOT_BY_DEFAULT, key=lambda p: (p != "two_list", p))
            for policy in policies:
                sylvie("swap", "kswapd", policy)
                ours[policy] = {w: [] for w in names}
                for what in track(names, policy, transient=True):
                    for _ in range(ROUNDS if policy == policies[0] else 1):
                        had = pages()
                        ours[policy][what].append((once(what, managed, None), pages() - had))
    finally:
        sylvie("down")
    medians = {p: {w: statistics.median(v[0] for v in ours[p][w]) for w in names} for p in ours}
    base = {w: statistics.median(v[0] for v in native[w]) if native[w] else None for w in names}
    lines = single(run_dir, managed, sylvie)
    for what in names:
        unit = "µs" if what in WORKLOADS else "s"
        bound = {"random": "", "CPython sort": ""}.get(what, "<= 1.0")
        best = min(medians, key=lambda p: medians[p][what])
        fewest = {p: min(v[1] for v in ours[p][what]) for p in ours}
        there = f", {native[what][0][1]} major faults natively" if native[what] else why
        for policy in medians:
            of = medians[policy][what]
            ratio = of / base[what] if base[what] else None  # type: ignore[operator]
            limit = bound if policy == "two_list" else "<= 0.6" if what == "cyclic" and policy == best else ""
            lines.append((f"{what}, {policy}: {fewest[policy]} pages back{there}", unit, base[what], of, ratio, limit))
    plot(names, base, medians)
    return lines


def plot(names: list[str], base: dict[str, float | None], medians: dict[str, dict[str, float]]) -> None:
    """Time by workload and policy, as a multiple of native, on a logarithmic scale."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing (`make bench` installs it)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    shown = [w for w in names if base[w]]
    for k, policy in enumerate(medians):
        at = [i + (k - len(medians) / 2 + 0.5) * 0.8 / len(medians) for i in range(len(shown))]
        axes.bar(at, [medians[policy][w] / (base[w] or 1) for w in shown], 0.8 / len(medians), label=policy)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(shown)), shown)
    axes.set(yscale="log", ylabel="time, native zram = 1", title=f"Twice as much as {MEMORY} MiB hold")
    axes.legend()
    (HERE / "results").mkdir(exist_ok=True)
    figure.savefig(HERE / "results" / "swap.png", dpi=120)
