"""sched as a user has it: `sylvie run --sched`, add, remove, status; programs do not notice; killed, stopped, swapped, flooding, lying."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROGRAMS, ROOT, Enclave, bring_up, commit_as, take_down, wait_for

from bus.client import Control
from kernel.abi import lib
from sylvie.life import implementations

CPUS = sorted(os.sched_getaffinity(0))
ATTRIBUTES = [sys.executable, PROGRAMS / "attributes.py"]
RELAY = [sys.executable, PROGRAMS / "relay.py"]
# Without Python, which an ordinary user may not be able to reach here.
SHELL = """look() { taskset -p $$ | sed 's/.*: //'; chrt -p $$ | sed 's/.*: //'; nice; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; }
look; sleep 0.1; look; taskset -p 1 $$ >/dev/null; renice -n 4 $$ >/dev/null; sleep 0.2; look; chrt -b -p 0 $$; sleep 0.1; look; chrt -f -p 10 $$ 2>&1 | sed 's/[0-9]*//g'; taskset -p 3 $$ >/dev/null; look"""
POLICIES = [p for p in implementations("sched") if p != "probe"]  # which looks on
OURS = 25  # a priority that interrupts what is chosen, and takes its place no more than the gateway does
WATCHDOG = 1.0  # seconds


@pytest.fixture(scope="module")
def scheduled(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "sl", "--ram", "256M")
    yield e
    take_down(e)


@pytest.fixture(autouse=True)
def attentive() -> Iterator[None]:
    """What is chosen may have all CPUs but for what the kernel keeps for the others; who looks on must not be among those. What it starts is (SCHED_RESET_ON_FORK)."""
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(OURS))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture
def enclave(scheduled: Enclave) -> Iterator[Enclave]:
    yield scheduled
    scheduled.idle()
    scheduled.check()
    wait_for(lambda: scheduled.request(t="sched")["tasks"] == [], 5, "threads are left")


def online(e: Enclave, but: int = 0) -> int:
    """Pid of the sched that is online, and not that one."""
    return int(wait_for(lambda: (c := e.component("sched"))["state"] == "online" and c["pid"] != but and c["pid"], 30, "no sched"))


def policies_of(pid: int) -> set[int]:
    """What the kernel has of a program's threads, but for the stub's."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            tid = int(task.name)
            if os.sched_getparam(tid).sched_priority < 90:
                found.add(os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK)
        except OSError:
            pass
    return found


def chosen(e: Enclave, pid: int) -> bool:
    """Is one of a program's threads, now or for as long as nothing else is?"""
    return os.SCHED_FIFO in policies_of(pid)


def runs(e: Enclave) -> int:
    return int(e.request(t="sched")["counters"]["runs"])


def agree(e: Enclave) -> None:
    """Status words and /proc: the same threads, and who is blocked is."""

    def wrong() -> list[str]:
        found = []
        tasks = e.request(t="sched")["tasks"]
        by_pid: dict[int, set[int]] = {}
        for t in tasks:
            by_pid.setdefault(t["pid"], set()).add(t["tid"])
        for pid, tids in by_pid.items():
            try:
                real = {int(t.name) for t in Path(f"/proc/{pid}/task").iterdir()}
            except OSError:
                real = set()
            spaces = {t for t in real if _service(t)}
            if tids != real - spaces:
                found.append(f"{pid}: {tids} are {real - spaces}")
        return found

    wait_for(lambda: not wrong(), 5, "status words do not agree with /proc")


def _service(tid: int) -> bool:
    try:
        return os.sched_getparam(tid).sched_priority > 90
    except OSError:
        return False


@contextlib.contextmanager
def relay(e: Enclave) -> Iterator[subprocess.Popen[str]]:
    """tests/programs/relay.py, scheduled; sound at the end."""
    p = e.popen(RELAY, "--sched", stdin=subprocess.PIPE)
    try:
        wait_for(lambda: len(e.request(t="sched")["tasks"]) > 8, 20, "no threads")
        yield p
        assert p.poll() is None, "it was to see all that"
        out = p.communicate(timeout=60)[0]
        assert p.returncode == 0 and out == "sound True True\n", out
    finally:
        p.kill()
        p.wait(10)


def launch(e: Enclave, cmd: list[str]) -> list[str]:
    """As `sylvie run --sched` becomes it: an ordinary user may not be able to reach that here."""
    if cmd[0] != "sh":
        return e.command(cmd, "--sched")
    native = e.run_dir.parent / "native"
    if not native.exists():
        native.mkdir()
        for name in ("sylvie-launch", "sylvie-keeper", "libsylvie.so"):
            shutil.copy(ROOT / "kernel" / "native" / name, native)
    return [str(native / "sylvie-launch"), str(e.run_dir), str(native / "libsylvie.so"), str(native / "sylvie-keeper"), "--sched", "--", *cmd]


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_programs_read_what_they_set_themselves(enclave: Enclave, user: str) -> None:
    who: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": "/"} if user == "nobody" else {}
    cmd = ["sh", "-c", SHELL] if user == "nobody" else [*map(str, ATTRIBUTES)]
    expected = subprocess.run(cmd, capture_output=True, text=True, timeout=60, check=True, **who).stdout
    p = subprocess.Popen(launch(enclave, cmd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **who)
    seen: set[int] = set()
    end = time.monotonic() + 60
    while p.poll() is None and time.monotonic() < end:
        seen |= policies_of(p.pid) if Path(f"/proc/{p.pid}").exists() else set()
        time.sleep(0.02)
    assert p.communicate(timeout=60)[0] == expected and p.returncode == 0
    assert os.SCHED_FIFO in seen, f"nothing was ever chosen: {seen}"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_under_load(enclave: Enclave, policy: str) -> None:
    with relay(enclave) as p:
        before = runs(enclave)
        enclave.cli("swap", "sched", policy)
        wait_for(lambda: runs(enclave) > before + 5 and chosen(enclave, p.pid), 10, f"{policy} chooses nothing")
        agree(enclave)
        enclave.cli("swap", "sched", "fifo_per_cpu")


def test_killed_stopped_and_restarted_under_load(enclave: Enclave) -> None:
    with relay(enclave) as p:
        wait_for(lambda: chosen(enclave, p.pid), 10, "nothing is chosen")
        for _ in range(3):
            pid = online(enclave)
            os.kill(pid, signal.SIGKILL)
            before = runs(enclave)
            online(enclave, pid)
            wait_for(lambda b=before: runs(enclave) > b + 5, 10, "its successor chooses nothing")
        pid = online(enclave)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: policies_of(p.pid) == {os.SCHED_OTHER}, 3 * WATCHDOG, "they have not their own attributes within the watchdog's time")
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: chosen(enclave, p.pid), 10, "it does not go on")
        enclave.supervisorctl("restart", "sched")
        online(enclave, pid)
        before = runs(enclave)
        wait_for(lambda: runs(enclave) > before + 5, 10, "nothing is chosen after a restart")


def test_running_programs_come_and_go(enclave: Enclave) -> None:
    code = "import time, threading\nfor _ in range(3): threading.Thread(target=lambda: [time.sleep(0.001) for _ in range(10**6)], daemon=True).start()\nprint(flush=True)\ntime.sleep(60)"
    p = subprocess.Popen(["nice", "-n", "3", sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert p.stdout and p.stdout.readline()
        before = {t.name: (os.sched_getscheduler(int(t.name)), os.sched_getaffinity(int(t.name)), os.getpriority(os.PRIO_PROCESS, int(t.name))) for t in Path(f"/proc/{p.pid}/task").iterdir()}
        enclave.cli("sched", "add", str(p.pid))
        wait_for(lambda: chosen(enclave, p.pid), 10, "nothing is chosen")
        answer = json.loads(enclave.cli("sched", "status", "--json").stdout)
        assert {t["tid"] for t in answer["tasks"]} == {int(tid) for tid in before}
        assert all(t["own_nice"] == before[str(t["tid"])][2] and t["barrier"] > 0 for t in answer["tasks"])
        assert str(p.pid) in enclave.cli("sched", "status").stdout
        enclave.cli("sched", "remove", str(p.pid))
        after = {t: (os.sched_getscheduler(int(t)), os.sched_getaffinity(int(t)), os.getpriority(os.PRIO_PROCESS, int(t))) for t in before}
        assert after == before
        for what, pid, why in (("remove", p.pid, "has no thread"), ("add", online(enclave), "not to be scheduled"), ("add", 4_000_000, "there is no process"), ("add", enclave.gateway_pid(), "is the gateway")):
            done = enclave.cli("sched", what, str(pid), ok=False)
            assert done.returncode == 1 and why in done.stderr, done
    finally:
        p.kill()
        p.wait(10)


def test_a_managed_program_is_given_later(enclave: Enclave) -> None:
    """Its own threads, not those that serve its memory."""
    p = enclave.popen([sys.executable, "-c", "import time\nprint(flush=True)\nfor _ in range(10**6): time.sleep(0.002), sum(range(100_000))"])
    try:
        assert p.stdout and p.stdout.readline()
        enclave.cli("sched", "add", str(p.pid))
        wait_for(lambda: chosen(enclave, p.pid), 10, "nothing is chosen")
        agree(enclave)
        assert [t["tid"] for t in enclave.request(t="sched")["tasks"]] == [p.pid] and len(os.listdir(f"/proc/{p.pid}/task")) == 1 + 3
        assert {os.sched_getparam(int(t)).sched_priority for t in os.listdir(f"/proc/{p.pid}/task")} >= {98}
    finally:
        p.kill()
        p.wait(10)


@pytest.mark.alone  # (beside it others have what the kernel keeps for what is not real-time)
def test_runaway_threads_lock_nobody_out(enclave: Enclave) -> None:
    spin = f"import os, sys\nfor _ in range({2 * len(CPUS)}):\n    if not os.fork():\n        while True: pass\nprint(flush=True); sys.stdin.readline(); os.killpg(0, 9)"
    p = enclave.popen([sys.executable, "-c", spin], "--sched", stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert p.stdout
        p.stdout.readline()
        wait_for(lambda: sum(t["chosen"] for t in enclave.request(t="sched")["tasks"]) >= len(CPUS), 10, "nothing is chosen")
        before = {t["tid"]: t["runtime_now"] for t in enclave.request(t="sched")["tasks"]}
        for _ in range(3):  # a shell, which has what the kernel keeps for what is not real-time; and the gateway, which goes before them
            assert subprocess.run(["sh", "-c", "echo here"], capture_output=True, text=True, timeout=30, check=True).stdout == "here\n"
        ages = [enclave.component("sched")["heartbeat_age_s"] for _ in range(3)]
        assert max(ages) < 2, "the gateway, and what decides, are not kept waiting"
        # and those that wait run too: the kernel keeps a share for what is not real-time
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.1)
        after = {t["tid"]: t["runtime_now"] for t in enclave.request(t="sched")["tasks"]}
        spun = [after[t] - before[t] for t in before if t in after and after[t] > 1e6]
        assert len(spun) >= 2 * len(CPUS) and min(sorted(spun)[-2 * len(CPUS) :]) > 0, spun
    finally:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait(10)


def test_a_bounded_fork_bomb(enclave: Enclave) -> None:
    bomb = "import os, sys\ndef split(n):\n    pids = []\n    for _ in range(2 if n else 0):\n        if not (pid := os.fork()):\n            split(n - 1); os._exit(0)\n        pids.append(pid)\n    for pid in pids: assert os.waitpid(pid, 0)[1] == 0\nsplit(6)\nprint('over', flush=True)"
    p = enclave.popen([sys.executable, "-c", bomb], "--sched")
    assert p.communicate(timeout=120)[0] == "over\n" and p.returncode == 0
    wait_for(lambda: enclave.request(t="sched")["tasks"] == [], 10, "threads that ended are still there")
    counters = enclave.request(t="sched")["counters"]
    assert counters["full"] == 0


def test_killed_gateway(root_dir: Path) -> None:
    """Programs go on; when there is a gateway again, or none any more, their threads have their own attributes."""
    e = bring_up(root_dir / "sg", "--ram", "128M")
    p = subprocess.Popen([sys.executable, "-c", "import time\nprint(flush=True)\nwhile True: time.sleep(0.001), sum(range(100_000))"], stdout=subprocess.PIPE)
    try:
        assert p.stdout
        p.stdout.readline()
        for restarts in (True, False):
            online(e)
            e.cli("sched", "add", str(p.pid))
            wait_for(lambda: chosen(e, p.pid), 10, "it is not chosen")
            gateway = e.gateway_pid()
            if not restarts:
                os.kill(int((e.run_dir / "supervisord.pid").read_text()), signal.SIGKILL)
            os.kill(gateway, signal.SIGKILL)
            if restarts:
                e.successor(gateway)
            else:
                e.cli("down")
            assert policies_of(p.pid) == {os.SCHED_OTHER} and os.sched_getaffinity(p.pid) == set(CPUS)
    finally:
        p.kill()
        p.wait(10)
        take_down(e)


def test_down_with_a_program_running(root_dir: Path) -> None:
    e = bring_up(root_dir / "sd", "--ram", "128M")
    try:
        with relay(e) as p:
            wait_for(lambda: chosen(e, p.pid), 10, "nothing is chosen")
            e.cli("down")
            assert policies_of(p.pid) == {os.SCHED_OTHER}
    finally:
        take_down(e)


@pytest.fixture
def as_sched(enclave: Enclave) -> Iterator[Callable[..., list[str]]]:
    """Commits in sched's name, which is stopped meanwhile."""
    commit = commit_as(enclave, "sched", words={"messages": [64], "tick": [0]})
    yield lambda *ops: commit(*({"op": lib.SY_OP_RUN, "pfn": lib.SY_ANY_CPU} | op for op in ops))
    enclave.supervisorctl("start", "sched")
    online(enclave)


@pytest.mark.alone  # (beside it others have what the kernel keeps for what is not real-time)
def test_faults_do_not_wait_for_what_is_chosen(enclave: Enclave, as_sched: Callable[..., list[str]]) -> None:
    """Service threads go before whatever may be chosen; else a fault takes as long as the kernel lets real-time threads keep all others from a CPU, 950 ms."""
    code = f"""
import mmap, os, sys, time
for _ in range({len(CPUS)}):
    if not os.fork():
        while True: pass
print("forked", flush=True)
sys.stdin.readline()
m, worst = mmap.mmap(-1, 64 << 20), 0
for k in range(0, len(m), 65536):
    began = time.monotonic_ns()
    m[k] = 1
    worst = max(worst, time.monotonic_ns() - began)
    time.sleep(0.001)
print(worst // 1000000, flush=True)
"""
    p = enclave.popen([sys.executable, "-c", code], "--sched", stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert p.stdin and p.stdout and p.stdout.readline() == "forked\n"

        def choose() -> bool:
            """The others on a CPU each, and it before them, wherever it is."""
            tasks = enclave.request(t="sched")["tasks"]
            others = [t for t in tasks if t["pid"] != p.pid]
            ops = [{"arg": t["gtid"], "barrier": t["barrier"], "pfn": cpu} for t, cpu in zip(others, CPUS, strict=False)]
            mine = [{"arg": t["gtid"], "barrier": t["barrier"], "order": lib.SY_RUN_STANDING | 5 << lib.SY_RUN_RANK_SHIFT} for t in tasks if t["tid"] == p.pid]
            return as_sched(*ops, *mine) == ["COMPLETE"] * (len(CPUS) + 1)

        wait_for(choose, 10, "they are not chosen")
        p.stdin.write("\n")
        p.stdin.flush()
        out: list[str] = []
        reader = threading.Thread(target=lambda: out.append(p.stdout.readline() if p.stdout else ""))
        reader.start()
        while reader.is_alive():  # (or the watchdog lets all wait)
            choose()
            reader.join(0.1)
        assert int(out[0]) < 400, f"a fault took {out[0]} ms"
    finally:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait(10)


def test_a_sched_that_lies_and_floods(enclave: Enclave, as_sched: Callable[..., list[str]]) -> None:
    assert os.sched_getparam(0).sched_priority == OURS, "whoever says that it is sched is not made important for that"
    with relay(enclave):
        dead = subprocess.Popen(["true"])
        dead.wait(10)
        results: dict[str, int] = {}
        end = time.monotonic() + 3
        rng = np.random.default_rng(1)
        while time.monotonic() < end:
            tasks = enclave.request(t="sched")["tasks"]
            ops = []
            for _ in range(500):
                t = tasks[rng.integers(len(tasks))]
                ops.append({
                    "arg": int(rng.choice([t["gtid"], t["gtid"] ^ 1, os.getpid() << lib.SY_GTID_SHIFT, dead.pid << lib.SY_GTID_SHIFT, 0])),
                    "barrier": int(t["barrier"] - rng.integers(2)) & 0xFFFFFFFF, "order": int(rng.choice([0, 1, 2, 32, 0x101, 0xFFFF])),
                    "pfn": int(rng.choice([0, 1, 99, 1023, 1 << 20, lib.SY_ANY_CPU])), "op": int(rng.choice([lib.SY_OP_RUN, lib.SY_OP_TIMER, lib.SY_OP_GRANT, lib.SY_OP_MERGE, 77])),
                })  # fmt: skip
            for r in as_sched(*ops):
                results[r] = results.get(r, 0) + 1
        assert {"COMPLETE", "NOT_FOUND", "INVALID_CPU", "INVALID_FLAGS", "NOT_PERMITTED", "INVALID", "STALE"} <= set(results), results
        assert os.sched_getparam(0).sched_priority == OURS and os.sched_getaffinity(0) == set(CPUS), "we were never its own"
        agree(enclave)


def test_words_that_are_none(enclave: Enclave) -> None:
    enclave.supervisorctl("stop", "sched")
    try:
        with Control(enclave.run_dir, 10, "sched") as control:
            for words in ({"messages": "all"}, {"tick": [1, 2]}, {"tick": [-1]}, {"reserve": [0] * 11}, {"messages": [0] * 1000}):
                with pytest.raises(Exception, match=r"must|tunable"):
                    control.request({"t": "hello", "name": "sched", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid(), "words": words})
    finally:
        enclave.supervisorctl("start", "sched")
        online(enclave)
