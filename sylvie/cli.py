"""``sylvie``: every command, its options and its help. What a command does is in a module of its own, imported when called:
``sylvie run`` stands at the start of every program and must be quick."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DEFAULT_RUN_DIR = "/run/sylvie"


class Problem(click.ClickException):
    """What went wrong and what to do next; exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"sylvie: {self.message}", err=True, file=file)


def run_dir_option(f: Callable[..., Any]) -> Callable[..., Any]:
    """``--run-dir``, also after the command's name."""
    return click.option("--run-dir", default=None, metavar="DIR", help="Run directory of the enclave.")(f)


def json_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(f)


def chosen(ctx: click.Context, run_dir: str | None) -> Path:
    """The run directory: the option after the command, the one before it, SYLVIE_RUN_DIR, the default."""
    return Path(
        run_dir or (ctx.obj or {}).get("run_dir") or os.environ.get("SYLVIE_RUN_DIR") or DEFAULT_RUN_DIR
    ).absolute()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--run-dir", default=None, metavar="DIR", help="Run directory (default: SYLVIE_RUN_DIR, or /run/sylvie).")
@click.version_option(package_name="sylvie")
@click.pass_context
def cli(ctx: click.Context, run_dir: str | None) -> None:
    """The memory manager of Linux as restartable Python processes.

    \b
    Example:
      sylvie up --ram 1G
      sylvie run -- python3 -c 'print(len(bytearray(100 << 20)))'
      sylvie status
      sylvie down
    """
    ctx.obj = {"run_dir": run_dir}


@cli.command()
@click.option("--ram", default="1G", show_default=True, help="RAM of the enclave: a number with K, M or G.")
@click.option("--nodes", default=None, type=click.IntRange(1, 8), help="NUMA nodes to divide it into.  [default: the machine's]")
@click.option(
    "--implementation", "-i", multiple=True, metavar="COMPONENT=NAME", help="Another implementation of a component."
)
@click.option(
    "--oom",
    default="kill",
    show_default=True,
    type=click.Choice(["kill", "native"]),
    help="Out of frames: end the program with the most of them, as Linux does, or give native memory.",
)
@click.option("--overcommit", is_flag=True, help="A program may map more than RAM and swap hold, as long as it does not touch it.")
@click.option("--swap", default="0", show_default=True, help="Size of the swap file in the run directory; 0 for none.")
@click.option(
    "--pool",
    default="50%",
    show_default=True,
    help="Share of RAM that compressed pages may take before the swap file gets them; 0% for none.",
)
@click.option(
    "--heat-cpu",
    default="2%",
    show_default=True,
    help="Share of one core that finding out which pages are in use may take; 0% for not at all.",
)
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="NAME",
    help="Whose programs may run on it, beside root's and the caller's of sudo.",
)
@run_dir_option
@click.pass_context
def up(
    ctx: click.Context,
    ram: str,
    nodes: int | None,
    implementation: tuple[str, ...],
    oom: str,
    overcommit: bool,
    swap: str,
    pool: str,
    heat_cpu: str,
    users: tuple[str, ...],
    run_dir: str | None,
) -> None:
    """Bring an enclave up: supervisord, gateway, components. Needs root.

    \b
    Example: sylvie up --ram 4G --nodes 2 --user www-data
             sylvie up --ram 1G --swap 4G --pool 25%
    """
    from kernel.topology import machine_nodes
    from sylvie import life

    settings = {
        "ram": life.parse_size(ram),
        "nodes": nodes or min(8, len(machine_nodes())),
        "oom": oom,
        "overcommit": overcommit,
        "swap": life.parse_size(swap) if swap != "0" else 0,
        "pool": life.parse_share("--pool", pool),
        "heat_cpu": life.parse_share("--heat-cpu", heat_cpu),
        "users": life.parse_users(users),
    }
    life.up(chosen(ctx, run_dir), settings, life.parse_implementations(implementation))


@cli.command()
@click.option("--measure", is_flag=True, help="Infer it from how long a cache line takes from CPU to CPU.")
@json_option
@run_dir_option
@click.pass_context
def topology(ctx: click.Context, measure: bool, as_json: bool, run_dir: str | None) -> None:
    """Nodes, their CPUs and distances: of the enclave if one is up, else as it would have them.

    \b
    Example: sylvie topology
             sylvie topology --measure --json
    """
    from sylvie import show

    show.topology(chosen(ctx, run_dir), measure, as_json)


@cli.command()
@run_dir_option
@click.pass_context
def down(ctx: click.Context, run_dir: str | None) -> None:
    """Take the enclave down. Programs that still run go on natively.

    \b
    Example: sylvie down
    """
    from sylvie import life

    life.down(chosen(ctx, run_dir))


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--limit", metavar="SIZE", help="Frames that it and all it starts may have together, as 128M; the rest is swapped.")
@click.option("--overcommit", is_flag=True, help="It and what it starts may map more than RAM and swap hold.")
@click.option("--sched", is_flag=True, help="Its threads, and those of all it starts, are sched's to schedule.")
@click.option("--ksm", is_flag=True, help="All of its pages may share frames with equal ones, as if it had said MADV_MERGEABLE.")
@run_dir_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, limit: str | None, overcommit: bool, ksm: bool, sched: bool, run_dir: str | None, command: tuple[str, ...]) -> None:
    """Run a program on the enclave's memory: same input, output, status, signals, directory and environment.

    \b
    Example: sylvie run -- redis-server --port 7000
             sylvie run --limit 128M -- sort huge.txt
             sylvie run --overcommit -- ./maps-much-touches-little
    """
    from sylvie import launch

    frames = None
    if limit is not None:
        from sylvie.life import bytes_of

        frames = bytes_of(limit) >> 12
    launch.run(chosen(ctx, run_dir), list(command), frames, overcommit, ksm, sched)


@cli.command()
@json_option
@run_dir_option
@click.pass_context
def status(ctx: click.Context, as_json: bool, run_dir: str | None) -> None:
    """Components, programs, frames and magazines.

    \b
    Example: sylvie status --json
    """
    from sylvie import show

    show.status(chosen(ctx, run_dir), as_json)


@cli.group()
def sched() -> None:
    """Give threads to the scheduler, take them away, see them.

    \b
    Example: sylvie sched add $(pgrep redis-server)
             sylvie sched status
    """


@sched.command()
@click.argument("pid", type=click.IntRange(1))
@run_dir_option
@click.pass_context
def add(ctx: click.Context, pid: int, run_dir: str | None) -> None:
    """sched has the threads of a running process, and all that they start, from now on.

    \b
    Example: sylvie sched add $(pgrep redis-server)
    """
    from sylvie import life

    life.control(chosen(ctx, run_dir), {"t": "sched-add", "pid": pid})


@sched.command()
@click.argument("pid", type=click.IntRange(1))
@run_dir_option
@click.pass_context
def remove(ctx: click.Context, pid: int, run_dir: str | None) -> None:
    """The kernel has the threads of a process again, with the attributes that they set themselves.

    \b
    Example: sylvie sched remove $(pgrep redis-server)
    """
    from sylvie import life

    life.control(chosen(ctx, run_dir), {"t": "sched-remove", "pid": pid})


@sched.command(name="status")
@json_option
@run_dir_option
@click.pass_context
def sched_status(ctx: click.Context, as_json: bool, run_dir: str | None) -> None:
    """Threads that sched has, what is chosen for each CPU, and what has been counted.

    \b
    Example: sylvie sched status --json
    """
    from sylvie import show

    show.sched(chosen(ctx, run_dir), as_json)


@cli.command()
@json_option
@run_dir_option
@click.pass_context
def buddyinfo(ctx: click.Context, as_json: bool, run_dir: str | None) -> None:
    """Free blocks by node and order, in the form of /proc/buddyinfo.

    \b
    Example: sylvie buddyinfo
    """
    from sylvie import show

    show.buddyinfo(chosen(ctx, run_dir), as_json)


@cli.command()
@click.argument("marks", nargs=-1, type=click.IntRange(0), metavar="[MIN LOW HIGH]")
@click.option("--node", default=0, show_default=True, type=click.IntRange(0), help="Whose watermarks to set: a node, or the number of a limit.")
@json_option
@run_dir_option
@click.pass_context
def watermarks(ctx: click.Context, marks: tuple[int, ...], node: int, as_json: bool, run_dir: str | None) -> None:
    """Show every node's and limit's watermarks, in frames of 4 KiB; or set those of one.

    Below LOW pages leave until HIGH frames are free; below MIN the gateway reclaims by itself if kswapd is not there.

    \b
    Example: sylvie watermarks
             sylvie watermarks 512 1024 2048 --node 0
    """
    from sylvie import show

    if len(marks) not in (0, 3):
        raise click.UsageError(f"{len(marks)} watermarks given: none to see them, or three, MIN LOW HIGH, to set them")
    show.watermarks(chosen(ctx, run_dir), node, marks, as_json)


@cli.command()
@click.argument("component")
@click.argument("settings", nargs=-1, metavar="[NAME=VALUE…]")
@json_option
@run_dir_option
@click.pass_context
def tune(ctx: click.Context, component: str, settings: tuple[str, ...], as_json: bool, run_dir: str | None) -> None:
    """Show what can be set of a component's policy; or set it, under whatever runs.

    \b
    Example: sylvie tune ksm
             sylvie tune ksm cpu=5% pages_to_scan=1000
    """
    from sylvie import life, show

    if settings:
        life.tune(chosen(ctx, run_dir), component, settings)
    else:
        show.tunables(chosen(ctx, run_dir), component, as_json)


@cli.command()
@json_option
@run_dir_option
@click.pass_context
def slabinfo(ctx: click.Context, as_json: bool, run_dir: str | None) -> None:
    """Compressed pages of the swap store by size, in the form of /proc/slabinfo.

    \b
    Example: sylvie slabinfo
    """
    from sylvie import show

    show.slabinfo(chosen(ctx, run_dir), as_json)


@cli.command()
@json_option
@run_dir_option
@click.pass_context
def check(ctx: click.Context, as_json: bool, run_dir: str | None) -> None:
    """Verify the invariants; exit status 1 names what is broken.

    \b
    Example: sylvie check && echo sound
    """
    from sylvie import show

    show.check(chosen(ctx, run_dir), as_json)


@cli.command()
@click.argument("topic", required=False)
@click.option("--count", type=click.IntRange(1), help="Stop after so many events.")
@json_option
@run_dir_option
@click.pass_context
def events(ctx: click.Context, topic: str | None, count: int | None, as_json: bool, run_dir: str | None) -> None:
    """Follow the bus. Topics are in docs/events.md; without one: all.

    \b
    Example: sylvie events mm --count 20
    """
    from sylvie import show

    show.events(chosen(ctx, run_dir), topic, count, as_json)


@cli.command()
@click.argument("pid", type=click.IntRange(1))
@run_dir_option
@click.pass_context
def release(ctx: click.Context, pid: int, run_dir: str | None) -> None:
    """Give a running program's memory to the kernel's own memory manager, for good; the program goes on.

    \b
    Example: sylvie release $(pgrep redis-server)
    """
    from sylvie import life

    life.release(chosen(ctx, run_dir), pid)


@cli.command()
@click.argument("component")
@click.argument("implementation")
@run_dir_option
@click.pass_context
def swap(ctx: click.Context, component: str, implementation: str, run_dir: str | None) -> None:
    """Replace a component's implementation, under whatever runs.

    \b
    Example: sylvie swap buddy next_fit
    """
    from sylvie import life

    life.swap(chosen(ctx, run_dir), component, implementation)


@cli.command()
@click.argument("trace")
@click.option(
    "--policy", default=None, metavar="NAME,…", help="Policies of kswapd, and opt, the bound.  [default: all]"
)
@click.option(
    "--ram", default="25%,50%,75%", show_default=True, help="Sizes of RAM: parts of the pages in the trace, or as 64M."
)
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1, 8), help="NUMA nodes to divide it into.")
@click.option(
    "--every",
    type=click.IntRange(1),
    help="Accesses between two steps of kswapd.  [default: half the low watermark, 64 at most]",
)
@json_option
def replay(trace: str, policy: str | None, ram: str, nodes: int, every: int | None, as_json: bool) -> None:
    """Faults of each policy on a simulated machine. TRACE: a file that `sylvie record` wrote, or a generator with its parameters:
    loop, zipf, scan_plus_hot, phases. Needs no root.

    \b
    Example: sylvie replay zipf:pages=10000,accesses=200000,seed=1 --policy clock,two_list,opt --ram 10%,16M
    """
    from sylvie import replay as r

    r.main(trace, policy, ram, nodes, every, as_json)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-o", "--output", default="sylvie.trace", show_default=True, metavar="FILE", help="Where the trace goes.")
@click.option("--ram", default="1G", show_default=True, help="RAM of the enclave: enough for the program.")
@click.option("--swap", default="1G", show_default=True, help="Size of its swap file, for when RAM is not enough.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def record(output: str, ram: str, swap: str, command: tuple[str, ...]) -> None:
    """Run a program on an enclave of its own and write down which pages it touches, for `sylvie replay`. Needs root.

    \b
    Example: sylvie record -o sort.trace -- sort --parallel=1 /usr/share/dict/words
    """
    from sylvie import life
    from sylvie import record as r

    sys.exit(r.main(list(command), Path(output), life.parse_size(ram), life.parse_size(swap)))


@cli.command()
@click.option("--fix", is_flag=True, help="Put back settings that a crashed run left.")
@json_option
def doctor(fix: bool, as_json: bool) -> None:
    """What this machine offers, what is missing, and how to get it.

    \b
    Example: sylvie doctor
    """
    from sylvie import doctor as d

    d.doctor(as_json, fix)


def main() -> None:
    """The console script."""
    try:
        sys.exit(cli())
    except OSError as e:  # of the machine, not of the arguments: no room, no descriptors, no permission
        what = f" ({e.filename})" if e.filename else ""
        hint = {errno.ENOSPC: ": free some space and try again", errno.EROFS: ": choose another --run-dir"}
        hint |= {errno.EACCES: ": are you root?", errno.EPERM: ": are you root?"}
        print(f"sylvie: {e.strerror or e}{what}{hint.get(e.errno or 0, '')}", file=sys.stderr)
        sys.exit(1)
