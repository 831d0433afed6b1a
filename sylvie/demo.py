"""``make run``: brings Sylvie up, runs real programs on it, kills buddy in the middle, shows that nothing was lost, takes it down.

With ``-- CMD…``: runs that instead. Uses a run directory of its own. Where no enclave can be up (no root, no userfaultfd): policies of
kswapd on the simulated machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from sylvie.doctor import essentials
from sylvie.life import ROOT, control

out = Console(highlight=False)
SYLVIE = Path(sys.executable).with_name("sylvie")
PROGRAM = [sys.executable, str(ROOT / "tests" / "programs" / "work.py")]
RELAY = ROOT / "tests" / "programs" / "relay.py"
PIPELINE = ["bash", "-c", "seq 200000 | sort -R --random-source=/usr/bin/env | sha256sum; echo $((6 * 7)) | tr 4 5"]
LONG = [
    sys.executable,
    "-c",
    """
import hashlib, time
kept, end, n = {}, time.time() + 10, 0
while time.time() < end:  # maps, fills, checks and frees memory all the time
    n += 1
    kept[n % 40] = bytes([n % 251]) * (100_000 + n * 7919 % 3_000_000)
    for k, v in kept.items():
        assert v[0] == v[-1] == (v[len(v) // 2])
print("rounds done:", n > 100, hashlib.sha256(b"".join(v[:9] for v in kept.values())).digest_size)
""",
]


def sylvie(run_dir: Path, *arguments: str) -> None:
    """One command, shown as a user would type it."""
    out.print(f"[bold green]$ sylvie {' '.join(arguments)}[/]")
    subprocess.run([SYLVIE, "--run-dir", run_dir, *arguments], check=True, timeout=120)


def managed(run_dir: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SYLVIE, "--run-dir", run_dir, "run", "--", *command], capture_output=True, text=True, timeout=300, check=False
    )


def compare(run_dir: Path, what: str, command: list[str]) -> bool:
    """The same program natively and managed: the same output?"""
    t0 = time.monotonic()
    native = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    t1 = time.monotonic()
    here = managed(run_dir, command)
    t2 = time.monotonic()
    same = (native.stdout, native.returncode) == (here.stdout, here.returncode)
    out.print(
        f"  {what}: natively {t1 - t0:.2f} s, on Sylvie {t2 - t1:.2f} s, output {'[green]identical[/]' if same else '[red]DIFFERENT[/]'}"
    )
    if not same:
        out.print(here.stdout, here.stderr)
    return same


def buddy_pid(run_dir: Path) -> int:
    buddy = next(c for c in control(run_dir, {"t": "status"})["components"] if c["name"] == "buddy")
    return int(buddy["pid"]) if buddy["state"] == "online" else 0


def kill_buddy_under(run_dir: Path) -> bool:
    """Starts a program that uses memory all the time, kills buddy twice meanwhile; did the program notice?"""
    out.print("\n[bold]A program at work, and buddy is killed under it[/]")
    program = subprocess.Popen(
        [SYLVIE, "--run-dir", run_dir, "run", "--", *LONG], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(2):
        time.sleep(1.5)
        pid = buddy_pid(run_dir)
        if pid:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while (fresh := buddy_pid(run_dir)) in (0, pid) and time.monotonic() < began + 20:
            time.sleep(0.02)
        out.print(
            f"  buddy {pid} killed; back as {fresh}, rebuilt from the frame table, after {time.monotonic() - began:.2f} s"
        )
    sylvie(run_dir, "status")
    text, _ = program.communicate(timeout=120)
    out.print(f"  the program: exit status {program.returncode}, {text.strip()}")
    return program.returncode == 0


def schedule(run_dir: Path) -> bool:
    """Threads that hand work to one another, scheduled; the policy is swapped and sched killed under them."""
    if problem := control(run_dir, {"t": "sched"})["problem"]:
        out.print(f"\nNo threads can be scheduled here: {problem}", soft_wrap=True, markup=False)
        return True
    out.print("\n[bold]Threads, scheduled; and sched is swapped and killed under them[/]")
    program = subprocess.Popen(
        [SYLVIE, "--run-dir", run_dir, "run", "--sched", "--", sys.executable, RELAY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        time.sleep(1.5)
        sylvie(run_dir, "swap", "sched", "shinjuku")
        pid = next(c["pid"] for c in control(run_dir, {"t": "status"})["components"] if c["name"] == "sched")
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
        sylvie(run_dir, "sched", "status")
        text, _ = program.communicate(timeout=60)
    finally:
        program.kill()
        program.wait(10)
    out.print(f"  the program: exit status {program.returncode}, {text.strip()}")
    return program.returncode == 0 and text == "sound True True\n"


def simulated(command: list[str], missing: list[str]) -> int:
    """What can be shown without frames: faults of every policy in made traces. 1 if there is a command, which needs frames."""
    out.print(f"On a simulated machine, for this one lacks: {'; '.join(missing)}", soft_wrap=True, markup=False)
    if command:
        out.print("No command can run on that: `sylvie doctor` tells what to do.")
        return 1
    from rich.progress import Progress

    from kernel.providers.sim.trace import generate
    from sylvie.replay import compare, frames_of, policies_of, show

    for name in ("loop", "zipf", "scan_plus_hot", "phases"):
        spec = f"{name}:pages=4000,accesses=16000"
        out.print(f"\n[bold green]$ sylvie replay {spec} --ram 50%,75%[/]")
        trace = generate(spec)
        sizes = frames_of("50%,75%", len(trace.vpages), 1)
        show(trace, compare(trace, policies_of(None), sizes, 1, None, Progress(disable=True)), name)
    out.print("\nopt is the bound: it knows the future. [bold]sylvie replay --help[/] tells how to go on.")
    return 0


def main() -> int:
    """0 when everything was as it should be."""
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else []
    if missing := essentials():
        return simulated(command, missing)
    with tempfile.TemporaryDirectory(prefix="sylvie-demo-") as d:
        os.chmod(d, 0o755)  # components run under uids of their own
        run_dir = Path(d) / "run"
        try:
            sylvie(run_dir, "up", "--ram", "1G")
            if command:
                shell = ["bash", "-c", " ".join(command)] if len(command) == 1 else command
                return subprocess.run([SYLVIE, "--run-dir", run_dir, "run", "--", *shell], check=False).returncode
            out.print("\n[bold]The same programs natively and on frames that buddy hands out[/]")
            ok = compare(run_dir, "CPython: threads, fork pool, spawn pool, subprocess", PROGRAM)
            ok &= compare(run_dir, "bash pipeline", PIPELINE)
            ok &= kill_buddy_under(run_dir)
            out.print()
            sylvie(run_dir, "swap", "buddy", "next_fit")
            ok &= compare(run_dir, "CPython on next_fit", PROGRAM)
            sylvie(run_dir, "buddyinfo")
            ok &= schedule(run_dir)
            sylvie(run_dir, "check")
            out.print("[bold green]Nothing was lost.[/]" if ok else "[bold red]Something differs: see above.[/]")
            return 0 if ok else 1
        except subprocess.CalledProcessError as e:
            return int(e.returncode)
        finally:
            if (run_dir / "config.json").exists():
                sylvie(run_dir, "down")


if __name__ == "__main__":
    sys.exit(main())
