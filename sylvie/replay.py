"""``sylvie replay``: one trace, every policy, several sizes of RAM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernel.abi import lib
from kernel.providers.sim.machine import LEAST
from kernel.providers.sim.opt import opt
from kernel.providers.sim.replay import replay
from kernel.providers.sim.trace import BadTrace, Trace, generate, load
from sylvie.cli import Problem
from sylvie.life import bytes_of, implementations

OPT = "opt"
MOST = 1 << 24  # frames, 64 GiB
NOT_BY_DEFAULT = {"sampler", "spare_running"}  # looks on, chooses nothing; two_list, where nothing is known of threads


def trace_of(text: str) -> Trace:
    """From a file, else from a generator. :raises Problem: neither"""
    try:
        return load(Path(text)) if Path(text).exists() else generate(text)
    except BadTrace as e:
        raise Problem(str(e)) from None
    except IsADirectoryError:
        raise Problem(f"{text} is a directory: name a file that `sylvie record` wrote") from None


def policies_of(text: str | None) -> list[str]:
    """Names, each once. :raises Problem: one that does not exist; says which there are"""
    known = [*implementations("kswapd"), OPT]
    chosen = [p for p in known if p not in NOT_BY_DEFAULT] if text is None else text.split(",")
    for name in chosen:
        if name not in known:
            raise Problem(f"--policy {name}: kswapd has no such policy: choose from {', '.join(known)}")
    return list(dict.fromkeys(chosen))


def frames_of(text: str, pages: int, nodes: int) -> dict[str, int]:
    """Frames of each size of RAM, a multiple of ``nodes``, by the size as it was given.

    :raises Problem: no size, or too few
    """
    out = {}
    for size in text.split(","):
        part, percent, rest = size.partition("%")
        if percent and not rest and part.replace(".", "", 1).isdecimal():
            frames = int(pages * float(part) / 100)
        else:
            frames = bytes_of(size) // lib.SY_PAGE_SIZE
        if frames // nodes < LEAST:
            least = max(25, -(-100 * LEAST * nodes // pages))
            advice = f"give a part of the trace's {pages} pages, such as {least}%, or a size such as 64M"
            what = f"{frames} frames on {nodes} node(s), and each needs {LEAST}" if frames else "no size"
            raise Problem(f"--ram {size}: {what}: {advice}")
        if frames > MOST:
            raise Problem(f"--ram {size}: {frames} frames, and the trace has {pages} pages: give less, such as 100%")
        out[size] = frames // nodes * nodes
    return out


def run(trace: Trace, policy: str, frames: int, nodes: int, every: int | None, progress: Callable[[int], None]) -> dict[str, Any]:  # fmt: skip
    """``faults``, and of a policy the rest of ``Result``."""
    if policy == OPT:
        return {"faults": opt(trace.pages, frames, progress)}
    from bus.runtime import load_policy

    return asdict(replay(trace, load_policy("kswapd", policy), frames, nodes, every, progress))


def show(trace: Trace, rows: list[dict[str, Any]], name: str) -> None:
    """Prints faults by policy and size of RAM, and as a multiple of opt's where that is known."""
    sizes = list(dict.fromkeys((r["ram"], r["frames"]) for r in rows))
    cells = {(r["policy"], r["ram"]): r["faults"] for r in rows}
    t = Table(box=None, header_style="bold")
    t.add_column("policy")
    for ram, frames in sizes:
        t.add_column(f"{ram} ({frames} frames)", justify="right")
    for policy in dict.fromkeys(r["policy"] for r in rows):
        row = []
        for ram, _ in sizes:
            faults, least = cells[policy, ram], cells.get((OPT, ram))
            row.append(f"{faults}" + (f" {faults / least:6.2f}" if least else ""))
        t.add_row(policy, *row)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    out.print(f"{name}: faults in {len(trace)} accesses to {len(trace.vpages)} pages", markup=False, soft_wrap=True)
    out.print(t)


def compare(trace: Trace, policies: list[str], sizes: dict[str, int], nodes: int, every: int | None, bar: Progress) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each policy and size: ``policy ram frames faults`` …"""
    rows = []
    task = bar.add_task("", total=len(trace) * len(policies) * len(sizes))
    done = 0
    for policy in policies:
        for ram, frames in sizes.items():
            bar.update(task, description=f"{policy}, RAM {ram}")
            result = run(trace, policy, frames, nodes, every, lambda n, done=done: bar.update(task, completed=done + n))  # type: ignore[misc]
            done += len(trace)
            rows.append({"policy": policy, "ram": ram, "frames": frames} | result)
    return rows


def main(spec: str, policy: str | None, ram: str, nodes: int, every: int | None, as_json: bool) -> None:
    """What the command does. :raises Problem: what is wrong with the arguments"""
    trace = trace_of(spec)
    policies = policies_of(policy)
    sizes = frames_of(ram, len(trace.vpages), nodes)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        rows = compare(trace, policies, sizes, nodes, every, bar)
    if as_json:
        print(json.dumps({"trace": trace.about, "accesses": len(trace), "pages": len(trace.vpages), "nodes": nodes, "rows": rows}, indent=1))  # fmt: skip
        return
    show(trace, rows, spec)
