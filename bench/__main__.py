"""``python -m bench [NAME…]``: every bound of the first slice, measured side by side with native Linux in the same run.

Native and managed runs alternate, so the noise of the machine falls on both; the table shows medians, and the ratio of
medians. Results go to ``bench/results/latest.json`` as well. Exit status 0 whether or not a bound is reached: the table says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import bus_bench, sched, swap_bench
from bus.runtime import fetch_tables
from kernel.abi import lib
from sylvie.life import control

HERE = Path(__file__).resolve().parent
SYLVIE = Path(sys.executable).with_name("sylvie")
ROUNDS = 5


@dataclass
class Row:
    """One line: ``ratio`` is ours / native for costs, and for rates too; ``bound`` is its limit ("<= 1.0", ">= 0.9", "")."""

    what: str
    unit: str
    native: float | None
    ours: float | None
    ratio: float | None
    bound: str

    @property
    def reached(self) -> bool | None:
        if not self.bound or self.ratio is None:
            return None
        op, limit = self.bound.split()
        return self.ratio <= float(limit) if op == "<=" else self.ratio >= float(limit)


class Bench:
    """An enclave of its own and the compiled programs."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self.cli: list[str | Path] = [SYLVIE, "--run-dir", self.run_dir]
        self.memory = directory / "memory"
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-o", self.memory, HERE / "programs" / "memory.c", "-lpthread"], check=True
        )

    def sylvie(self, *args: str) -> None:
        subprocess.run([*self.cli, *args], check=True, stdout=subprocess.DEVNULL, timeout=300)

    def up(self, ram: str, *options: str) -> float:
        """Seconds from `sylvie up` to ready."""
        t = time.monotonic()
        self.sylvie("up", "--ram", ram, *options)
        return time.monotonic() - t

    def populated(self) -> None:
        """Waits until all RAM is populated, so that a measurement does not share the CPUs with that."""
        while (s := control(self.run_dir, {"t": "status"}))["populated"] < s["frames"]["total"]:
            time.sleep(0.1)

    def managed(self, cmd: list[str | Path], limit: int = 0) -> list[str]:
        """What `sylvie run` becomes, without Python's start in the measurement. ``limit``: frames, 0 for none."""
        native = HERE.parent / "kernel" / "native"
        bound = ["--limit", limit] if limit else []
        launch = [native / "sylvie-launch", self.run_dir, native / "libsylvie.so", native / "sylvie-keeper", *bound]
        return [*map(str, [*launch, "--", *cmd])]

    def values(self, cmd: list[str | Path], managed: bool) -> dict[str, list[float]]:
        """Runs a program that prints "name value" lines."""
        line = self.managed(cmd) if managed else list(map(str, cmd))
        out = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300).stdout
        found: dict[str, list[float]] = {}
        for name, value in re.findall(r"^(\w+) ([\d.]+)$", out, re.M):
            found.setdefault(name, []).append(float(value))
        return found

    def compare(
        self, label: str, cmd: list[str | Path], rounds: int = ROUNDS, native_cmd: list[str | Path] | None = None
    ) -> dict[str, tuple[float, float]]:
        """Medians (native, ours) by name, of alternating runs."""
        both: dict[str, tuple[list[float], list[float]]] = {}
        for _ in track(range(rounds), label, transient=True):
            for managed in (False, True):
                for name, found in self.values(cmd if managed else native_cmd or cmd, managed).items():
                    both.setdefault(name, ([], []))[managed].extend(found)
        return {name: (statistics.median(a), statistics.median(b)) for name, (a, b) in both.items() if a and b}


def row(what: str, unit: str, pair: tuple[float, float], bound: str = "") -> Row:
    return Row(what, unit, pair[0], pair[1], pair[1] / pair[0], bound)


def memory(b: Bench) -> list[Row]:
    """First touch, single faults, mmap and munmap, malloc and free."""
    touch = b.compare("first touch", [b.memory, "touch"])
    rows = [
        row("first touch, 512 MiB in sequence, recycled memory", "µs/page", touch["touch_recycled"], "<= 1.0"),
        row("… the program's first 512 MiB", "µs/page", touch["touch_first"]),
    ]
    control(b.run_dir, {"t": "fault-order", "asid": 0, "order": 0, "max_order": 0})
    try:
        random = b.compare("random fault", [b.memory, "random"], native_cmd=[b.memory, "minimal"])
    finally:
        control(b.run_dir, {"t": "fault-order", "asid": 0, "order": 4, "max_order": 9})
    rows.append(
        row(
            "random 4 KiB fault, order 0, p50 (against a minimal userfaultfd handler)",
            "µs",
            random["random_p50"],
            "<= 1.5",
        )
    )
    mmap = b.compare("mmap", [b.memory, "mmap"])
    rows.append(row("mmap + munmap of 64 KiB", "µs", mmap["mmap_munmap"], "<= 3.0"))
    rows.append(row("… with one page touched", "µs", mmap["mmap_touch_munmap"]))
    malloc = b.compare("malloc", [b.memory, "malloc"])
    rows.append(row("malloc + free around glibc's mmap threshold", "µs", malloc["malloc_free"], "<= 3.0"))
    rows.append(row("… with the threshold fixed: mmap and munmap every time", "µs", malloc["malloc_mmap"], "<= 3.0"))
    return rows


def starts(b: Bench) -> list[Row]:
    """`sh` running /bin/true 200 times."""
    script: list[str | Path] = ["sh", "-c", "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done"]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in track(range(ROUNDS), "program starts", transient=True):
        for managed in (False, True):
            t = time.perf_counter()
            subprocess.run(b.managed(script) if managed else list(map(str, script)), check=True)
            times[managed].append((time.perf_counter() - t) * 1e3)
    return [
        row(
            "sh running /bin/true 200 times", "ms", (statistics.median(times[0]), statistics.median(times[1])), "<= 3.0"
        )
    ]


def python(b: Bench) -> list[Row]:
    """CPython's string workload."""
    found = b.compare("CPython", [sys.executable, HERE / "programs" / "strings.py"])
    return [row("CPython: 1.5 M strings sorted, 200 MiB touched", "s", found["strings"], "<= 1.15")]


def redis(b: Bench) -> list[Row]:
    """SET and GET of 512 bytes, pipeline 16; the client is native in both cases."""
    rates: dict[str, tuple[list[float], list[float]]] = {"SET": ([], []), "GET": ([], [])}
    for _ in track(range(ROUNDS), "redis", transient=True):
        for managed in (False, True):
            sock = b.run_dir.parent / "redis.sock"
            cmd: list[str | Path] = [
                "redis-server",
                "--port",
                "0",
                "--unixsocket",
                sock,
                "--save",
                "",
                "--dir",
                b.run_dir.parent,
            ]
            server = subprocess.Popen(b.managed(cmd) if managed else list(map(str, cmd)), stdout=subprocess.DEVNULL)
            try:
                while subprocess.run(["redis-cli", "-s", sock, "ping"], capture_output=True, check=False).returncode:
                    time.sleep(0.05)
                test = [
                    "redis-benchmark",
                    "-s",
                    sock,
                    "-t",
                    "set,get",
                    "-n",
                    "200000",
                    "-P",
                    "16",
                    "-d",
                    "512",
                    "-r",
                    "100000",
                    "--csv",
                ]
                out = subprocess.run(
                    list(map(str, test)), capture_output=True, text=True, check=True, timeout=120
                ).stdout
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(30)
            for name in rates:
                rates[name][managed].append(float(re.search(rf'"{name}","([\d.]+)"', out)[1]) / 1e3)  # type: ignore[index]
    return [
        row(f"redis {n}, 512 B, pipeline 16", "k/s", (statistics.median(a), statistics.median(o)), ">= 0.9")
        for n, (a, o) in rates.items()
    ]


def bus(b: Bench) -> list[Row]:
    """Events from a channel to a Python component, beside raw pyzmq."""
    return [
        Row(what, unit, raw, ours, None if ratio is None else ratio, bound)
        for what, unit, raw, ours, ratio, bound in bus_bench.measure(b.run_dir)
    ]


def rebuilt(b: Bench) -> float:
    """Seconds from buddy's death to its successor online and rebuilt."""
    buddy = control(b.run_dir, {"t": "status"})["components"][0]
    os.kill(buddy["pid"], signal.SIGKILL)
    t = time.monotonic()
    while (c := control(b.run_dir, {"t": "status"})["components"][0])["state"] != "online" or c["pid"] == buddy["pid"]:
        time.sleep(0.005)
    return time.monotonic() - t


def life(b: Bench) -> list[Row]:
    """`sylvie up` and buddy's return, at two sizes; reported without a bound."""
    rows = []
    for ram in ("1G", "16G"):
        up = b.up(ram)
        b.populated()
        back = rebuilt(b)
        time.sleep(1.0)  # a heartbeat carries the new dump
        table = control(b.run_dir, {"t": "status"})["components"][0]["dump"].get("rebuild_ms")
        b.sylvie("down")
        rows += [
            Row(f"sylvie up to ready, {ram}", "s", None, up, None, ""),
            Row(f"buddy's death to rebuilt, {ram}", "s", None, back, None, ""),
            Row(f"… of that, reading the frame table, {ram}", "ms", None, table, None, ""),
        ]
    return rows


def thp(b: Bench) -> list[Row]:
    """20 million random reads over 512 MiB, by huge mappings and by small ones."""
    mib, program = 512, b.run_dir.parent / "huge"
    subprocess.run(["gcc", "-O2", "-o", program, HERE.parent / "tests/programs/huge.c", "-lpthread"], check=True)

    def read(p: subprocess.Popen[str]) -> float:
        assert p.stdin and p.stdout
        p.stdin.write("\n")
        p.stdin.flush()
        return float(p.stdout.readline())

    def huge_mib(p: subprocess.Popen[str]) -> int:
        smaps = Path(f"/proc/{p.pid}/smaps").read_text()
        return sum(int(kib) for kib in re.findall(r"(?:Anon|ShmemPmd)(?:HugePages|Mapped): +(\d+) kB", smaps)) >> 10

    def collapsed(p: subprocess.Popen[str]) -> float:
        began, before = time.monotonic(), -1
        while (now := huge_mib(p)) < mib and (now > before or time.monotonic() < began + 5):
            before = now
            time.sleep(1)
        return time.monotonic() - began

    with contextlib.ExitStack() as undo:

        def start(command: list[str]) -> subprocess.Popen[str]:
            p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            undo.callback(p.wait, 20)
            undo.callback(p.kill)
            assert p.stdout and p.stdout.readline()
            return p

        ctl = [str(SYLVIE.with_name("supervisorctl")), "-c", str(b.run_dir / "supervisord.conf")]
        subprocess.run([*ctl, "stop", "thp"], check=True, capture_output=True)
        control(b.run_dir, {"t": "fault_order", "asid": 0, "order": 4, "max_order": 4})
        native = [start([str(program), str(mib), what, "reads"]) for what in ("small", "advised")]
        ours = start(b.managed([str(program), str(mib), "plain", "reads"]))
        times: list[list[float]] = [[], [], [], []]
        for _ in range(ROUNDS):
            for k, p in enumerate((*native, ours)):
                times[k].append(read(p))
        before = huge_mib(ours)
        subprocess.run([*ctl, "start", "thp"], check=True, capture_output=True)
        took = collapsed(ours)
        for _ in range(ROUNDS):
            times[3].append(read(ours))
        control(b.run_dir, {"t": "fault_order", "asid": 0, "order": 4, "max_order": 9})
        off, on, scattered, blocks = (statistics.median(t) for t in times)
        return [
            Row(f"random reads, THP off natively; {before} MiB in huge mappings here", "s", off, scattered, scattered / off, ""),
            Row(f"random reads, THP on natively ({huge_mib(native[1])} MiB); {huge_mib(ours)} MiB here after collapse", "s", on, blocks, blocks / on, ""),
            Row("… collapse beside none, here; and natively", "ratio", on / off, blocks / scattered, None, ""),
            Row(f"collapse of {mib} MiB", "s", None, took, None, ""),
        ]


def fork(b: Bench) -> list[Row]:
    """fork of 512 MiB by the order of its blocks, beside native 4 KiB pages; what the child's reads and writes cost afterwards."""
    mib, program = "512", b.run_dir.parent / "fork"
    subprocess.run(["gcc", "-O2", "-o", program, HERE / "programs" / "fork.c", "-lpthread"], check=True)
    ctl = [str(SYLVIE.with_name("supervisorctl")), "-c", str(b.run_dir / "supervisord.conf")]
    rows = []
    subprocess.run([*ctl, "stop", "thp"], check=True, capture_output=True)  # it would make blocks of all
    try:
        for order, kib, threads, bound in ((9, "2 MiB blocks", 0, "<= 2.5"), (9, "2 MiB blocks, three threads beside", 3, "<= 2.5"), (4, "64 KiB blocks", 0, ""), (0, "single pages", 0, "")):
            control(b.run_dir, {"t": "fault_order", "asid": 0, "order": order, "max_order": order})
            n = "9" if order else "3"
            found = b.compare(f"fork, {kib}", [program, mib, n, str(threads), "blocks" if order == 9 else "pages"], 3, [program, mib, n, str(threads), "pages"])
            rows.append(row(f"fork of {mib} MiB in {kib}", "ms", found["fork"], bound))
            if order == 9 and not threads:
                rows += [row("… its child reads all of it", "µs/page", found["reads"]), row("… and writes one page of eight", "µs/page", found["writes"])]
    finally:
        control(b.run_dir, {"t": "fault_order", "asid": 0, "order": 4, "max_order": 9})
        subprocess.run([*ctl, "start", "thp"], check=True, capture_output=True)
    return rows


def together(b: Bench) -> list[Row]:
    """What all five components cost a program beside buddy and kswapd alone, in turn: no pressure, then twice a limit."""
    reclaim, others = b.run_dir.parent / "reclaim", ("thp", "ksm", "autonuma")
    subprocess.run(["gcc", "-O2", "-o", reclaim, HERE / "programs" / "reclaim.c", "-lm"], check=True)
    ctl = [str(SYLVIE.with_name("supervisorctl")), "-c", str(b.run_dir / "supervisord.conf")]
    limit = swap_bench.MEMORY << 8
    runs: list[tuple[str, str, list[str]]] = [
        ("touch_recycled", "µs/page", b.managed([b.memory, "touch"])),
        ("malloc_free", "µs", b.managed([b.memory, "malloc"])),
        ("strings", "s", b.managed([sys.executable, HERE / "programs" / "strings.py"])),
        *((w, "µs", b.managed([reclaim, w, str(2 * swap_bench.MEMORY), str(n)], limit)) for w, n in swap_bench.WORKLOADS.items()),
    ]
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name, _, _ in runs}
    for _ in track(range(ROUNDS), "all five components, or two", transient=True):
        for all_five in (False, True):
            subprocess.run([*ctl, "start" if all_five else "stop", *others], check=True, capture_output=True)
            time.sleep(1.0)
            for name, _, cmd in runs:
                out = subprocess.run(cmd, capture_output=True, text=True, check=True, timeout=300).stdout
                found[name][all_five].extend(float(x) for x in re.findall(rf"^{name} ([\d.]+)$", out, re.M))
    return [
        row(f"all five components beside two: {name}{'' if name not in swap_bench.WORKLOADS else ', twice its limit'}", unit, (statistics.median(found[name][0]), statistics.median(found[name][1])), "<= 1.1")
        for name, unit, _ in runs
    ]


KSM = Path("/sys/kernel/mm/ksm")


@contextlib.contextmanager
def ksmd() -> Iterator[psutil.Process]:
    """Linux's own, as quick as it can; its settings are put back, and what it merged is taken apart."""
    before = {f: (KSM / f).read_text() for f in ("pages_to_scan", "sleep_millisecs", "run")}
    # (max_page_sharing stays as it is: 256, as here)
    try:
        for f, value in (("pages_to_scan", "100000"), ("sleep_millisecs", "0"), ("run", "1")):
            (KSM / f).write_text(value)
        yield next(p for p in psutil.process_iter(["name"]) if p.info["name"] == "ksmd")
    finally:
        (KSM / "run").write_text("2")
        for f, value in before.items():
            (KSM / f).write_text(value)


def cpu(*processes: psutil.Process) -> float:
    return sum(t.user + t.system for t in (p.cpu_times() for p in processes))


def ksm(b: Bench) -> list[Row]:
    """256 MiB of which 16 are distinct: how much memory is saved, and how many pages are merged in a second of CPU time."""
    if not (KSM / "run").exists():
        return [Row("merging equal pages: this kernel has no ksmd to compare with (CONFIG_KSM)", "", None, None, None, "")]
    mib, distinct, program = 256, 4096, b.run_dir.parent / "alike"
    expected = mib * 256 - distinct
    subprocess.run(["gcc", "-O2", "-o", program, HERE.parent / "tests/programs/alike.c", "-lpthread"], check=True)
    command = [str(program), "same", str(mib), str(distinct)]

    def merged(start: list[str], shared: Callable[[], int], others: Callable[[psutil.Process], list[psutil.Process]]) -> tuple[int, float, float]:
        """Pages saved, CPU seconds, seconds."""
        p = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert p.stdin and p.stdout
        try:
            ours = others(psutil.Process(p.pid))
            before = cpu(*ours)
            assert p.stdout.readline() == "there\n"
            filled, began, most, last = cpu(psutil.Process(p.pid)), time.monotonic(), 0, time.monotonic()
            while most < expected and time.monotonic() < last + 10:
                if (now := shared()) > most:
                    most, last = now, time.monotonic()
                time.sleep(0.05)
            took = cpu(*ours) - before - (filled if psutil.Process(p.pid) in ours else 0)
            seconds = last - began
            p.stdin.write("\n")
            p.stdin.flush()
            assert p.stdout.readline() == "wrong 0\n"
            return most, took, seconds
        finally:
            p.kill()
            p.wait(20)

    def here() -> int:
        frames = fetch_tables(b.run_dir, lib.SY_C_KSM).frames
        shares = frames["refcount"][frames["state"] == lib.SY_FRAME_SHARED]
        return int(shares.sum()) - len(shares)

    with ksmd() as k:
        native = merged(command, lambda: int((KSM / "pages_sharing").read_text()), lambda _: [k])
    s = control(b.run_dir, {"t": "status"})
    mine = [s["pid"], *(c["pid"] for c in s["components"] if c["name"] == "ksm")]
    ours = merged(b.managed([*command]), here, lambda p: [p, *map(psutil.Process, mine)])
    rate = [n / max(seconds, 1e-3) for n, seconds, _ in (native, ours)]
    return [
        Row(f"equal pages merged, of {expected}", "pages", native[0], ours[0], ours[0] / max(1, native[0]), ">= 1.0"),
        Row("… per CPU-second (ksmd; ksm, gateway and stub together)", "1/s", rate[0], rate[1], rate[1] / rate[0], ">= 0.5"),
        Row("… in so many seconds", "s", native[2], ours[2], ours[2] / native[2], ""),
    ]


SUITES: dict[str, Callable[[Bench], list[Row]]] = {
    "memory": memory,
    "starts": starts,
    "python": python,
    "redis": redis,
    "bus": bus,
    "thp": thp,
    "fork": fork,
    "ksm": ksm,
}


def show(rows: list[Row]) -> None:
    table = Table("what", "unit", "native", "Sylvie", "ratio", "bound", "", title="Sylvie beside native Linux, medians")
    for r in rows:
        number = [
            f"{x:.3g}" if x is not None and x < 1000 else f"{x:,.0f}" if x is not None else ""
            for x in (r.native, r.ours)
        ]
        mark = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}[r.reached]
        table.add_row(r.what, r.unit, *number, f"{r.ratio:.2f}" if r.ratio is not None else "", r.bound, mark)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> int:
    """0 when everything could be measured."""
    own = ["together", "swap", "sched", "life"]  # these bring their own enclaves up
    wanted = sys.argv[1:] or [*SUITES, *own]
    if unknown := [w for w in wanted if w not in SUITES and w not in own]:
        print(f"unknown: {', '.join(unknown)}; choose from {', '.join([*SUITES, *own])}", file=sys.stderr)
        return 2
    if not shutil.which("redis-benchmark") and {"redis", "swap"} & {*wanted}:
        print("redis-server and redis-tools are missing: make setup installs them", file=sys.stderr)
        return 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sy-bench-") as d:
        os.chmod(d, 0o755)
        b = Bench(Path(d))
        try:
            if any(w in SUITES for w in wanted):
                b.up("2G")
                b.populated()
                for name in wanted:
                    if name in SUITES:
                        rows += SUITES[name](b)
                b.sylvie("check")
                b.sylvie("down")
            if "together" in wanted:
                b.up("1G", "--swap", "1G")
                b.populated()
                rows += together(b)
                b.sylvie("down")
            if "swap" in wanted:
                found = swap_bench.measure(b.run_dir, lambda c: b.managed(c, swap_bench.MEMORY << 8), b.sylvie)
                rows += [Row(*line) for line in found]
            if "sched" in wanted:
                rows += [Row(*line) for line in sched.measure(b)]
            if "life" in wanted:
                rows += life(b)
        finally:
            if (b.run_dir / "config.json").exists():
                b.sylvie("down")
    show(rows)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "latest.json").write_text(
        json.dumps([asdict(r) | {"reached": r.reached} for r in rows], indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
