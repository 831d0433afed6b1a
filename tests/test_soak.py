"""The same things for longer: `make soak`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Enclave, bring_up, take_down, wait_for
from test_failures import another_buddy, buddy_agrees_with_the_table, finished, load

Compiled = Callable[[str], Path]
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
# Sizes are divided by this: `SYLVIE_SOAK_DIVISOR=20` tries the tests themselves.
DIVISOR = int(os.environ.get("SYLVIE_SOAK_DIVISOR", "1"))


def size(n: int) -> int:
    return max(2, n // DIVISOR)


@pytest.fixture
def sound(enclave: Enclave) -> Enclave:
    """The enclave with a buddy online and nothing in it."""
    enclave.idle()
    wait_for(lambda: enclave.component()["state"] == "online", 30, "buddy is not online")
    return enclave


def nothing_leaked(e: Enclave) -> None:
    frames = e.idle(30)["frames"]
    assert frames["mapped"] == frames["granted"] == 0
    assert frames["free"] + frames["reserved"] == frames["total"]
    buddy_agrees_with_the_table(e)
    e.check()


def test_buddy_killed_every_second(sound: Enclave) -> None:
    seconds = size(120)
    p = load(sound, seconds)
    try:
        deadline, kills = time.monotonic() + seconds - 1, 0
        while time.monotonic() < deadline:
            pid = wait_for(lambda: (c := sound.component())["state"] == "online" and c["pid"], 20, "no buddy")
            os.kill(pid, signal.SIGKILL)
            kills += 1
            another_buddy(sound, pid)
            time.sleep(1)
        assert kills >= (seconds - 1) // 5
        finished(p)
    finally:
        if p.poll() is None:
            p.kill()
            p.wait(10)
    nothing_leaked(sound)


def test_processes_one_after_another(sound: Enclave) -> None:
    n = size(1000)
    registered = sound.status()["counters"]["registered"]
    gateway = psutil.Process(sound.gateway_pid())
    for i in range(5):  # what is made once is there then
        assert sound.run(["echo", i]).stdout == f"{i}\n"
    sound.idle()
    descriptors = gateway.num_fds()
    for i in range(n):
        done = sound.run([sys.executable, "-S", "-c", f"print(len(bytearray(1 << 20)) + {i})"])
        assert (done.returncode, done.stdout) == (0, f"{(1 << 20) + i}\n"), (i, done)
    nothing_leaked(sound)
    assert sound.status()["counters"]["registered"] >= registered + n
    # A pool of prepared address spaces, three descriptors each, comes and goes.
    wait_for(lambda: gateway.num_fds() <= descriptors + 24, 10, f"descriptors: {descriptors} before")


def test_many_forks_under_threads(sound: Enclave, compiled: Compiled) -> None:
    done = sound.run([compiled("fork_threads"), size(300)], timeout=1800)
    assert (done.returncode, done.stdout) == (0, "torn 0 crashed 0 leaked 0\n"), done
    nothing_leaked(sound)


def test_memory_calls_of_eight_threads(sound: Enclave, compiled: Compiled) -> None:
    done = sound.run([compiled("memory_stress"), 8, size(2000)], timeout=1800)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done
    nothing_leaked(sound)


def test_swap_back_and_forth_under_load(sound: Enclave) -> None:
    n = size(30)
    p = load(sound, n * 2)
    try:
        for i in range(n):
            name = ("next_fit", "buddy")[i % 2]
            sound.cli("swap", "buddy", name)
            c = sound.component()
            assert (c["implementation"], c["state"]) == (name, "online")
            sound.check()
        finished(p)
    finally:
        if p.poll() is None:
            p.kill()
            p.wait(10)
        if sound.component()["implementation"] != "buddy":
            sound.cli("swap", "buddy", "buddy")
    nothing_leaked(sound)


# ---- programs twice as large as RAM (128 MiB), while kswapd is killed, stopped and replaced

REDIS = """
cd "$1"
redis-server --port 0 --unixsocket "$1/sock" --save "" --enable-debug-command yes > log 2>&1 &
trap 'kill $! 2>/dev/null; wait' EXIT
cli="redis-cli -s $1/sock"
for i in $(seq 100); do $cli ping > /dev/null 2>&1 && break; sleep 0.05; done
awk 'BEGIN{for(i=0;i<200000;i++) printf "SET key:%d %0800d\\r\\n", i, i*7919}' | $cli --pipe > /dev/null
$cli debug digest
for k in 1 2 3; do redis-benchmark -s "$1/sock" -r 200000 -t get -n 200000 -P 16 -q > /dev/null; done
$cli debug digest
$cli dbsize
"""
SQLITE = """
sqlite3 :memory: "PRAGMA cache_size=-400000; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<600000) INSERT INTO t SELECT i, printf('%0300d', i*7919) FROM n;
CREATE INDEX x ON t(b); UPDATE t SET b=b||'x' WHERE a%7=0; PRAGMA integrity_check; SELECT count(*), sum(length(b)) FROM t;"
"""


@pytest.fixture(scope="module")
def pressed(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "pressed", "--ram", "128M", "--swap", "1G")
    yield e
    take_down(e)


@pytest.mark.parametrize("what", ["redis", "sqlite", "memtester"])
def test_larger_than_memory(pressed: Enclave, what: str, tmp_path: Path) -> None:
    e = pressed
    cmd = {
        "redis": ["bash", "-c", REDIS, "x", tmp_path],
        "sqlite": ["bash", "-c", SQLITE],
        # Without RLIMIT_MEMLOCK 0 it locks its buffer, and root may lock anything.
        "memtester": ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "prlimit", "--memlock=0",
                      "env", "MEMTESTER_TEST_MASK=7", "memtester", "256M", "1"],
    }[what]  # fmt: skip
    native = (
        subprocess.run([*map(str, cmd)], capture_output=True, text=True, timeout=900) if what != "memtester" else None
    )
    before = e.status()["counters"]["swapped_in"]
    p = e.popen(cmd)
    turn = 0
    while p.poll() is None:
        time.sleep(1)
        turn += 1
        c = e.component("kswapd")
        if c["state"] != "online":
            continue
        with contextlib.suppress(
            ProcessLookupError
        ):  # (what the gateway said last is not what supervisord has done since)
            if turn % 3 == 0:
                os.kill(c["pid"], signal.SIGKILL)
            elif turn % 3 == 1:
                e.cli("swap", "kswapd", ("two_list", "clock", "mru", "random")[turn // 3 % 4], ok=False)
            else:
                os.kill(c["pid"], signal.SIGSTOP)
                time.sleep(0.5)
                os.kill(c["pid"], signal.SIGCONT)
        assert turn < 1800
    out = p.communicate()[0]
    assert p.returncode == 0, out
    if native:
        assert out == native.stdout
    assert e.idle(60)["counters"]["swapped_in"] > before + 20000
    e.check()
    assert e.status()["swap"]["used"] == 0
