"""What an enclave looks like: status, buddyinfo, check, events."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from sylvie.cli import Problem
from sylvie.life import control, supervisor_pid


def size(pages: int) -> str:
    """Pages of 4 KiB as text."""
    kib = pages * 4
    return f"{kib >> 20} GiB" if kib >= 10 << 20 else f"{kib >> 10} MiB" if kib >= 10 << 10 else f"{kib} KiB"


def status(run_dir: Path, as_json: bool) -> None:
    """Components, frames, address spaces with their managed and native shares, magazines."""
    s = control(run_dir, {"t": "status"})
    if as_json:
        print(json.dumps(s, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    out.print(f"[bold]Sylvie[/] in {s['run_dir']}, gateway pid {s['pid']}, up {s['uptime_s']:.0f} s, ABI {s['abi']}")
    if supervisor_pid(run_dir) is None:
        out.print("[bold red]supervisord is not there[/]: nothing is restarted. `sylvie down`, then up, starts anew")
    t = Table(
        "component",
        "implementation",
        "state",
        "pid",
        "up s",
        "restarts",
        "heartbeat s ago",
        box=None,
        header_style="bold",
    )
    for c in s["components"]:
        t.add_row(
            c["name"],
            c["implementation"],
            c["state"],
            *(str(c[k]) for k in ("pid", "uptime_s", "restarts", "heartbeat_age_s")),
        )
    out.print(t)
    frames = {k: v for k, v in s["frames"].items() if v and k != "total"}
    out.print(
        f"[bold]frames[/] {s['frames']['total']} ({size(s['frames']['total'])}): "
        + ", ".join(f"{k} {v}" for k, v in frames.items())
    )
    if s["swap"]["slots"]:
        c = s["counters"]
        out.print(
            f"[bold]swap[/] {size(s['swap']['used'])} of {size(s['swap']['slots'])}; pages out {c['swapped_out']}, in again {c['swapped_in']}, "
            f"touched on the way {c['swap_cancelled']}, taken by the gateway {c['evicted_by_gateway']}, errors {c['store_errors']}; "
            f"compressed pages take {size(s['swap']['pool_frames'])} of {size(s['swap']['pool_max'])}"
        )
    for limit in s["limits"]:
        out.print(
            f"[bold]limit {limit['zone']}[/] {size(limit['used'])} of {size(limit['frames'])}, {limit['members']} programs"
        )
    merging = next((c["dump"] for c in s["components"] if c["name"] == "ksm" and c["dump"].get("pages_shared")), None)
    if merging:
        names = ("pages_shared", "pages_sharing", "pages_volatile", "full_scans", "general_profit")
        out.print("[bold]ksm[/] " + ", ".join(f"{n} {merging[n]}" for n in names))
    h = s["heat"]
    if h["windows"]:
        at = "looking" if h["active"] else "nobody needs it now"
        out.print(
            f"[bold]heat[/] by {h['source']}, {at}: {h['looked']} frames in the last of {h['windows']} windows ({h['window_ms']} ms), "
            f"{h['touched']} in use; takes {h['cost_percent']:.2f} % of a core, at most {h['limit_percent']:g} %"
        )
    out.print("[bold]reserve[/] (order:blocks) " + " ".join(f"{o}:{n}" for o, n in s["reserve"].items() if n))
    t = Table(
        "asid",
        "pid",
        "program",
        "managed",
        "native",
        "swapped",
        "committed",
        "faults",
        "urgent",
        "magazine (order:blocks)",
        box=None,
        header_style="bold",
    )
    for a in s["address_spaces"]:
        native = a["native_kib"] // 4
        share = f" {100 * a['mapped'] // max(1, a['mapped'] + native)} %"
        t.add_row(str(a["asid"]), str(a["pid"]), a["command"], size(a["mapped"]) + share, size(native), size(a["swapped"]), size(a["committed"]), str(a["faults"]), str(a["urgent"]),
                  " ".join(f"{o}:{n}" for o, n in a["magazine"].items() if n))  # fmt: skip
    if s["address_spaces"]:
        out.print(t)


def topology(run_dir: Path, measure: bool, as_json: bool) -> None:
    """Nodes, CPUs and distances; with ``measure`` how long a cache line takes between any two CPUs that we may use.

    :raises Problem: it cannot be measured
    """
    import os

    from kernel import topology as machine

    if (run_dir / "txn.ipc").exists():
        answer = control(run_dir, {"t": "status"})["topology"]
    else:
        answer = machine.find(len(machine.machine_nodes())).as_dict()
    cpus = sorted(os.sched_getaffinity(0))
    if measure:
        if len(cpus) < 2:
            raise Problem("there is one CPU only: nothing to measure between")
        try:
            latency = machine.measure(cpus)
        except OSError as e:
            raise Problem(f"{e.strerror or e}: is the machine very busy, or are CPUs offline?") from None
        answer["latency_ns"] = {"cpus": cpus, "ns": latency.round(1).tolist()}
        answer["levels"] = [{"ns": round(t, 1), "groups": [[cpus[i] for i in g] for g in groups]} for t, groups in machine.levels(latency)]
    if as_json:
        print(json.dumps(answer))
        return
    how = "the machine's" if answer["source"] == "kernel" else "divided evenly" if len(answer["distance"]) > 1 else "one"
    print(f"nodes: {how}")
    for node, row in enumerate(answer["distance"]):
        mine = ",".join(str(c) for c, n in enumerate(answer["cpu_node"]) if n == node)
        print(f"node {node}: CPUs {mine or 'none'}; distances {' '.join(f'{d:3d}' for d in row)}")
    for level in answer.get("levels", []):
        print(f"within {level['ns']:.0f} ns: " + "  ".join("{" + ",".join(map(str, g)) + "}" for g in level["groups"]))


def sched(run_dir: Path, as_json: bool) -> None:
    """Threads, CPUs and counters of sched."""
    answer = control(run_dir, {"t": "sched"})
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console
    from rich.table import Table

    out = Console()
    if answer["problem"]:
        out.print(f"sched has no threads: {answer['problem']}")
    out.print(", ".join(f"{name} {value}" for name, value in answer["counters"].items()))
    by_gtid = {t["gtid"]: t for t in answer["tasks"]}
    for cpu in answer["cpus"]:
        on, best = (by_gtid.get(cpu[k], {}).get("tid", "-") for k in ("on", "chosen"))
        out.print(f"CPU {cpu['cpu']}: on it {on}, chosen {best}")
    t = Table("tid", "pid", "state", "CPU", "chosen for", "rank", "runtime ms", "nice", "messages", box=None, header_style="bold")
    for task in answer["tasks"]:
        state = "running" if task["on_cpu"] else "runnable" if task["runnable"] else "blocked"
        where = ("any" if task["run_cpu"] < 0 else str(task["run_cpu"])) + (", standing" if task["standing"] else "") if task["chosen"] else "-"
        rank = str(task["rank"]) if task["chosen"] else "-"
        t.add_row(str(task["tid"]), str(task["pid"]), state, str(task["cpu"]), where, rank, f"{task['runtime_now'] / 1e6:.1f}", str(task["own_nice"]), str(task["barrier"]))
    if answer["tasks"]:
        out.print(t)


def buddyinfo(run_dir: Path, as_json: bool) -> None:
    """Free blocks per node and order."""
    answer = control(run_dir, {"t": "buddyinfo"})
    print(json.dumps(answer["nodes"]) if as_json else answer["text"].rstrip())


def watermarks(run_dir: Path, node: int, marks: tuple[int, ...], as_json: bool) -> None:
    """Each node's and limit's watermarks, after setting one's if ``marks`` are given."""
    if marks:
        least, low, high = marks
        control(run_dir, {"t": "watermarks", "node": node, "min": least, "low": low, "high": high})
    answer = control(run_dir, {"t": "status"})
    zones = [{"zone": i} | n for i, n in enumerate(answer["nodes"])] + answer["limits"]
    if as_json:
        print(json.dumps(zones))
        return
    from rich.console import Console
    from rich.table import Table

    t = Table("zone", "frames", "min", "low", "high", "free", "standing by", box=None)
    for n in zones:
        name = f"node {n['zone']}" if "members" not in n else f"limit {n['zone']}"
        t.add_row(name, *(str(n[k]) for k in ("frames", "min", "low", "high", "free", "standby")))
    Console().print(t)


def tunables(run_dir: Path, component: str, as_json: bool) -> None:
    """What can be set of a component's policy."""
    from sylvie import life

    found = life.tunables(run_dir, component)
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    t = Table(component, "value", "default", "from", "to", "", box=None)
    for name, of in found.items():
        t.add_row(name, *(f"{of[k]:g}" for k in ("value", "default", "least", "most")), of["what"])
    Console().print(t if found else f"the policy of {component} has no tunables")


def slabinfo(run_dir: Path, as_json: bool) -> None:
    """Compressed pages by size."""
    answer = control(run_dir, {"t": "slabinfo"})
    print(json.dumps(answer["caches"]) if as_json else answer["text"])


def check(run_dir: Path, as_json: bool) -> None:
    """:raises Problem: an invariant does not hold; names what is broken"""
    answer = control(run_dir, {"t": "check"}, timeout=120)
    lines = answer["text"].splitlines()
    if as_json:
        print(json.dumps({"violations": answer["violations"], "text": lines}))
        sys.exit(1 if answer["violations"] else 0)
    if answer["violations"]:
        raise Problem(f"{answer['violations']} violations:\n" + "\n".join(f"  {line}" for line in lines))
    print("every invariant holds")


def events(run_dir: Path, topic: str | None, count: int | None, as_json: bool) -> None:
    """Prints events as they come."""
    import numpy as np

    from bus.client import subscribe
    from bus.topics import MESSAGES, TOPICS
    from kernel.abi import TASK_MSG_DTYPE, lib

    if topic is not None and topic.encode() not in TOPICS:
        raise Problem(f"there is no topic {topic}: choose from {', '.join(t.decode() for t in TOPICS)}")
    control(run_dir, {"t": "status"})  # says so if nothing is up
    name = {v: k for k, v in MESSAGES.items()}
    left = count or sys.maxsize
    expected: dict[bytes, int] = {}
    try:
        for where, first, batch in subscribe(run_dir, topic or b""):
            if (gap := first - expected.get(where, first)) > 0:
                print(f"{gap} events of {where.decode()} were lost: too slow a reader", file=sys.stderr)
            expected[where] = first + len(batch)
            for e in batch[:left]:
                row: dict[str, Any] = {
                    "time": round(time.time(), 3),
                    "topic": where.decode(),
                    "type": name.get(int(e["type"]), str(e["type"])),
                }
                if where == b"task":
                    t = np.array([e]).view(TASK_MSG_DTYPE)[0]
                    row |= {"tid": int(t["gtid"]) >> lib.SY_GTID_SHIFT}
                    row |= {k: int(t[k]) for k in ("seqnum", "gtid", "barrier", "cpu", "cpu_seqnum", "last_cpu", "waker_cpu", "runtime", "nice", "runnable")}
                else:
                    row |= {k: int(e[k]) for k in ("seqnum", "asid", "pfn", "vpage", "npages", "order", "node", "arg")}
                print(
                    json.dumps(row)
                    if as_json
                    else " ".join(f"{k}={v}" if k not in ("time", "topic", "type") else str(v) for k, v in row.items()),
                    flush=True,
                )
            left -= len(batch)
            if left <= 0:
                return
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()
