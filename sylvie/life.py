"""Bringing an enclave up and down, and swapping components."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import subprocess
import sys
import time
import xmlrpc.client
from pathlib import Path
from typing import Any

import psutil

from sylvie.cli import DEFAULT_RUN_DIR, Problem
from sylvie.supervisor import nudge, rpc

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ROOT / "components"
DEFAULT = {"kswapd": "two_list", "thp": "adaptive", "autonuma": "hinting", "ksm": "scan", "sched": "fifo_per_cpu"}  # implementation of each component; of the others: that of its own name
PATIENCE = 60.0  # seconds for processes to become ready or to end
OURS = ("config.json", "supervisord.conf", "supervisor.sock", "supervisord.pid", "supervisord.log", "gateway.sock", "gateway.ready",
        "events.ipc", "txn.ipc", "swap", "tasks")  # fmt: skip


def bytes_of(text: str) -> int:
    """Bytes of "512M", "4G", "65536"; 0 if it is no size."""
    m = re.fullmatch(r"(\d+)([KMGkmg]?)(i?[Bb])?", text.strip())
    return int(m[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[m[2].lower()] if m else 0


def parse_size(text: str) -> int:
    """As ``bytes_of``. :raises Problem: no size, or less than 16 MiB"""
    if (size := bytes_of(text)) < 16 << 20:
        raise Problem(f"--ram {text}: give a size of at least 16M, such as 512M or 4G")
    return size


def parse_share(option: str, text: str) -> float:
    """0 to 1, of "25%". :raises Problem: anything else"""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if not m or float(m[1]) > 100:
        raise Problem(f"{option} {text}: give a share from 0% to 100%, such as 25%")
    return float(m[1]) / 100


def implementations(component: str) -> list[str]:
    """Names of the policies of a component: the modules of its folder that define ``Policy``."""
    files = sorted((COMPONENTS / component).glob("*.py"))
    return [f.stem for f in files if not f.stem.startswith("_") and re.search(r"^class Policy\b", f.read_text(), re.M)]


def components() -> list[str]:
    """Components that this tree has."""
    return sorted(d.parent.name for d in COMPONENTS.glob("*/__main__.py"))


def known(component: str, implementation: str) -> None:
    """:raises Problem: there is no such component or implementation; says which there are"""
    if component not in components():
        raise Problem(f"there is no component {component}: choose from {', '.join(components())}")
    if implementation not in implementations(component):
        raise Problem(
            f"{component} has no implementation {implementation}: choose from {', '.join(implementations(component))}"
        )


def parse_implementations(pairs: tuple[str, ...]) -> dict[str, str]:
    """{"buddy": "next_fit"} of ("buddy=next_fit",). :raises Problem: malformed or unknown"""
    out = {}
    for pair in pairs:
        component, eq, name = pair.partition("=")
        if not eq:
            raise Problem(f"{pair}: write COMPONENT=NAME, such as buddy=next_fit")
        known(component, name)
        out[component] = name
    return out


def parse_users(names: tuple[str, ...]) -> list[int]:
    """Uids of users beside root, with the one who called sudo. :raises Problem: there is none of that name"""
    if caller := os.environ.get("SUDO_UID", ""):
        names += (caller,)
    uids = set()
    for name in names:
        try:
            uids.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise Problem(f"--user {name}: no such user (getent passwd lists them)") from None
    return sorted(uids - {0})


def control(run_dir: Path, request: dict[str, Any], timeout: float = 30.0) -> dict[str, Any]:
    """One request to the gateway. :raises Problem: it is not there, or says no"""
    from bus.client import Control
    from bus.codec import BusError

    if not (run_dir / "txn.ipc").exists():
        raise Problem(f"no enclave is up in {run_dir}: start one with `sylvie --run-dir {run_dir} up`")
    try:
        with Control(run_dir, timeout) as c:
            return c.request(request)
    except BusError as e:
        raise Problem(f"the gateway in {run_dir}: {e}") from None


def supervisor_pid(run_dir: Path) -> int | None:
    """Pid of the supervisord of that run directory, if it lives."""
    try:
        pid = int((run_dir / "supervisord.pid").read_text())
        return pid if "supervisord" in " ".join(psutil.Process(pid).cmdline()) else None
    except (OSError, ValueError, psutil.Error):
        return None


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """config.json, in one step."""
    fresh = run_dir / "config.new"
    try:
        fresh.write_text(json.dumps(config, indent=1))
        fresh.chmod(0o644)
        fresh.rename(run_dir / "config.json")
    finally:
        fresh.unlink(missing_ok=True)


def supervisor_conf(run_dir: Path) -> Path:
    """The repository's supervisord.conf for the default run directory; a copy made from it for another."""
    here = ROOT / "supervisord.conf"
    if str(run_dir) == DEFAULT_RUN_DIR:
        return here
    conf = run_dir / "supervisord.conf"
    conf.write_text(here.read_text().replace(DEFAULT_RUN_DIR, str(run_dir)).replace("%(here)s", str(ROOT)))
    return conf


def up(run_dir: Path, settings: dict[str, Any], chosen: dict[str, str]) -> None:
    """Starts everything and returns when all are ready; otherwise says why and leaves nothing behind.

    :param settings: of config.json: ram, nodes, oom, overcommit, swap, pool, users (``kernel.gateway.Gateway``)
    :param chosen: implementations that are not the default, by component
    """
    began = time.monotonic()
    ram, nodes = settings["ram"], settings["nodes"]
    if os.geteuid() != 0:
        raise Problem(
            "`sylvie up` needs root: it holds descriptors and settings that only root may have. Try it with sudo."
        )
    if supervisor_pid(run_dir):
        raise Problem(f"an enclave is up in {run_dir} already: `sylvie --run-dir {run_dir} status`, or `down` first")
    available = psutil.virtual_memory().available
    if ram + ram // 64 > available:
        raise Problem(f"--ram {ram >> 20}M: the machine has {available >> 20}M available")
    from sylvie.doctor import essentials

    if missing := essentials():
        raise Problem("this machine lacks what Sylvie needs: " + "; ".join(missing) + ". `sylvie doctor` tells more")
    if closed := [str(d) for d in run_dir.parents if d.exists() and not d.stat().st_mode & 0o001]:
        raise Problem(
            f"components run under uids of their own and could not reach {run_dir}: chmod o+x {closed[0]}, or another --run-dir"
        )
    existed = run_dir.exists()
    stop(run_dir)  # what a crash may have left
    clean(run_dir, existed=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_dir.chmod(0o755)
    wanted = {name: DEFAULT.get(name, name) for name in components()} | chosen
    try:
        write_config(run_dir, settings | {"components": wanted})
        supervisord = Path(sys.executable).with_name("supervisord")
        done = subprocess.run(
            [supervisord, "-c", supervisor_conf(run_dir)], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if done.returncode:
            raise Problem(f"supervisord does not start: {done.stderr.strip() or done.stdout.strip()}")
        wait_ready(run_dir, wanted)
    except BaseException as e:
        reason = log_tail(run_dir)
        stop(run_dir)
        clean(run_dir, existed)
        if isinstance(e, Problem):
            raise Problem(f"{e.message}{reason}") from None
        raise
    print(
        f"up in {time.monotonic() - began:.1f} s: {ram >> 20} MiB on {nodes} node(s), {', '.join(f'{c} ({i})' for c, i in wanted.items())}; run directory {run_dir}"
    )


def wait_ready(run_dir: Path, wanted: dict[str, str]) -> None:
    """:raises Problem: not all are online in time, or the gateway has given up"""
    deadline = time.monotonic() + PATIENCE
    waiting = "the gateway"
    while time.monotonic() < deadline:
        if (run_dir / "gateway.ready").exists():
            answer = control(run_dir, {"t": "status"})
            waiting = ", ".join(c["name"] for c in answer["components"] if c["state"] != "online")
            if not waiting:
                return
        elif (run_dir / "gateway.log").exists() and "cannot start" in (run_dir / "gateway.log").read_text():
            raise Problem("the gateway cannot start")
        nudge(run_dir)
        time.sleep(0.02)
    raise Problem(f"not ready after {PATIENCE:.0f} s: {waiting}")


def log_tail(run_dir: Path) -> str:
    """Last lines of the logs, for an error message."""
    lines = [
        f"\n  {log.name}: {line}"
        for log in sorted(run_dir.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()[-3:]
    ]
    return "".join(lines)


def processes(run_dir: Path) -> list[psutil.Process]:
    """supervisord and what it started, also what outlived it."""
    marks = {"kernel.gateway", *(f"components.{name}" for name in components())}
    found = []
    for p in psutil.process_iter(["cmdline"]):
        line = p.info["cmdline"] or []
        if str(run_dir) in line and marks.intersection(line):
            found.append(p)
    if pid := supervisor_pid(run_dir):
        found.append(psutil.Process(pid))
    return found


def stop(run_dir: Path) -> None:
    """Ends supervisord and all it started; by signal what does not listen."""
    family = processes(run_dir)
    with contextlib.suppress(OSError, xmlrpc.client.Error):
        rpc(run_dir).shutdown()  # from now on it starts nothing again
    # It ends one after the other, a second each unless nudged; and it may not be there, or not listen. The gateway stays until
    # the components have said goodbye to it.
    last = [p for p in family if "kernel.gateway" in command_line(p)]
    first = [p for p in family if p not in last]
    terminate(first)
    supervisor = supervisor_pid(run_dir)
    ended(run_dir, [p for p in first if p.pid != supervisor], 1.0)
    terminate(last)
    # Pages in the swap store go back to their programs first.
    alive = ended(run_dir, family, 70.0 if (run_dir / "swap").exists() else 20.0)
    for p in alive:
        with contextlib.suppress(psutil.Error):
            p.kill()
    ended(run_dir, alive, 5.0)


def terminate(some: list[psutil.Process]) -> None:
    for p in some:
        with contextlib.suppress(psutil.Error):
            p.terminate()


def command_line(p: psutil.Process) -> list[str]:
    """[] for a process that has ended."""
    try:
        return [] if p.status() == psutil.STATUS_ZOMBIE else list(p.cmdline())
    except psutil.Error:
        return []


def ended(run_dir: Path, some: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Waits for their end; those that still live after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while (alive := [p for p in some if p.is_running() and command_line(p)]) and time.monotonic() < deadline:
        nudge(run_dir)
        time.sleep(0.02)
    return alive


def clean(run_dir: Path, existed: bool) -> None:
    """Removes our files; the directory too, unless somebody else made it or has put something into it."""
    from bus import keys
    from kernel.abi import lib

    lib.sy_sched_restore(str(run_dir / "tasks").encode())  # of a gateway that was killed
    for name in OURS:
        (run_dir / name).unlink(missing_ok=True)
    keys.remove(run_dir)
    for log in [*run_dir.glob("*.log"), *run_dir.glob("*.log.[0-9]")]:
        log.unlink(missing_ok=True)
    if not existed and run_dir.exists() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def programs(run_dir: Path) -> list[str]:
    """Programs that the enclave holds frames of, as "name (pid)"."""
    try:
        return [f"{a['command']} ({a['pid']})" for a in control(run_dir, {"t": "status"}, 5)["address_spaces"]]
    except Problem:
        return []


def down(run_dir: Path) -> None:
    """Ends all processes, removes the run directory, puts settings back."""
    if not (run_dir / "config.json").exists() and not processes(run_dir):
        raise Problem(f"no enclave is up in {run_dir}")
    still = programs(run_dir)
    stop(run_dir)
    clean(run_dir, existed=False)
    from kernel import host

    if not host.restore_if_idle():
        print("settings of the host stay until the last enclave is down and the last program on frames has ended")
        host.later()
    if still:
        print(f"still running, natively from now on: {', '.join(still[:10])}")
    print(f"down: {run_dir}")


def swap(run_dir: Path, component: str, implementation: str) -> None:
    """Configures another implementation, restarts that one process, waits until it is online."""
    known(component, implementation)
    if not (run_dir / "config.json").exists():
        raise Problem(f"no enclave is up in {run_dir}: start one with `sylvie --run-dir {run_dir} up`")
    if supervisor_pid(run_dir) is None:
        raise Problem(
            f"no supervisord for {run_dir}: `sylvie --run-dir {run_dir} down`, then up, starts everything anew"
        )
    config = json.loads((run_dir / "config.json").read_text())
    before = config["components"].get(component)
    write_config(run_dir, config | {"components": config["components"] | {component: implementation}})
    began = time.monotonic()
    restart(run_dir, component)
    while time.monotonic() < began + PATIENCE:
        for c in control(run_dir, {"t": "status"})["components"]:
            if (
                c["name"] == component
                and c["state"] == "online"
                and c["implementation"] == implementation
                and c["uptime_s"] <= time.monotonic() - began + 0.1
            ):
                print(f"{component}: {before} → {implementation} in {time.monotonic() - began:.1f} s (pid {c['pid']})")
                return
        time.sleep(0.02)
    raise Problem(
        f"{component} does not come up as {implementation}:{log_tail(run_dir)}\nBack with: sylvie swap {component} {before}"
    )


def tunables(run_dir: Path, component: str) -> dict[str, dict[str, Any]]:
    """What can be set of a component's policy: by name its ``value`` now, ``default``, ``least``, ``most``, and ``what`` it is."""
    from bus.runtime import implementation_of, load_policy, tuned

    if component not in components():
        raise Problem(f"there is no component {component}: choose from {', '.join(components())}")
    if not (run_dir / "config.json").exists():
        raise Problem(f"no enclave is up in {run_dir}: start one with `sylvie --run-dir {run_dir} up`")
    policy = load_policy(component, implementation_of(component, run_dir))
    now = tuned(component, policy, run_dir)
    return {name: t._asdict() | {"value": now.get(name, t.default)} for name, t in policy.tunables.items()}


def tune(run_dir: Path, component: str, settings: tuple[str, ...]) -> None:
    """Sets NAME=VALUE of a component's policy and restarts it. :raises Problem: unknown, malformed or out of bounds: nothing is changed"""
    there = tunables(run_dir, component)
    fresh = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in there:
            raise Problem(f"{component} has no tunable {name}: {', '.join(there) or 'its policy has none'}")
        try:
            value = parse_share(name, text) if text.endswith("%") else float(text)
        except ValueError:
            raise Problem(f"{setting}: give a number, or a share such as 25%") from None
        if not there[name]["least"] <= value <= there[name]["most"]:
            raise Problem(f"{setting}: from {there[name]['least']:g} to {there[name]['most']:g}")
        fresh[name] = value
    config = json.loads((run_dir / "config.json").read_text())
    before = config.get("tuned", {})
    write_config(run_dir, config | {"tuned": before | {component: before.get(component, {}) | fresh}})
    swap(run_dir, component, config["components"].get(component, component))


def restart(run_dir: Path, component: str) -> None:
    """As ``supervisorctl restart``."""
    s = rpc(run_dir)
    # One that keeps dying is between two lives, and supervisord may be quicker than we are to begin the next.
    for call, fine in ((s.stopProcess, "NOT_RUNNING"), (s.startProcess, "ALREADY_STARTED")):
        try:
            call(component, True)
        except xmlrpc.client.Fault as e:
            if fine not in e.faultString:
                raise Problem(f"supervisord: {e.faultString}") from None


def release(run_dir: Path, pid: int) -> None:
    """Turns process ``pid``'s memory native and waits until it is.

    :raises Problem: it is not managed, or does not fit into the machine; it still is, or is not done after a minute
    """
    began = time.monotonic()
    answer = control(run_dir, {"t": "release", "pid": pid})
    while any(a["asid"] == answer["asid"] for a in control(run_dir, {"t": "status"})["address_spaces"]):
        if time.monotonic() > began + PATIENCE:
            raise Problem(f"process {pid} has not let go after {PATIENCE:.0f} s: is it stopped (state T in ps), or limited (RLIMIT_DATA)?")
        time.sleep(0.02)
    print(f"{pid} runs natively: {answer['bytes'] >> 20} MiB moved in {time.monotonic() - began:.1f} s")
