"""The same things for longer: `make soak`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Enclave, module_enclave_of, wait_for
from test_failures import another_buddy, buddy_agrees_with_the_table, finished, load
from test_swap import POLICIES, larger_than_memory

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

pressed = module_enclave_of("pressed", "--ram", "128M", "--swap", "1G")[0]


def swapped_in_turn(e: Enclave, turn: int) -> None:
    e.cli("swap", "kswapd", POLICIES[turn % len(POLICIES)])


def restarted(e: Enclave, turn: int) -> None:
    e.supervisorctl("restart", "kswapd")


def killed_and_stopped(e: Enclave, turn: int) -> None:
    if (c := e.component("kswapd"))["state"] != "online":
        return
    # (what the gateway said last is not what supervisord has done since)
    with contextlib.suppress(ProcessLookupError):
        if turn % 2:
            os.kill(c["pid"], signal.SIGKILL)
        else:
            os.kill(c["pid"], signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(c["pid"], signal.SIGCONT)


@pytest.mark.parametrize("how", [swapped_in_turn, restarted, killed_and_stopped])
@pytest.mark.parametrize("what", ["redis", "sqlite", "memtester"])
def test_larger_than_memory(pressed: Enclave, what: str, how: Callable[[Enclave, int], None], tmp_path: Path) -> None:
    """Every second, for two minutes at least, under a program of twice the memory; again and again if it is through before."""
    e, turn, deadline = pressed, 0, time.monotonic() + size(120)
    cmd = larger_than_memory(what, 128, tmp_path)
    native = subprocess.run(cmd, capture_output=True, text=True, timeout=900) if what != "memtester" else None
    while turn == 0 or time.monotonic() < deadline:
        before = e.status()["counters"]["swapped_in"]
        p = e.popen(cmd)
        while p.poll() is None:
            time.sleep(1)
            how(e, turn)
            turn += 1
            assert turn < 1800
        out = p.communicate()[0]
        assert p.returncode == 0, out
        if native:
            assert out == native.stdout
        assert e.idle(60)["counters"]["swapped_in"] > before + 20000
        e.check()
        assert e.status()["swap"]["used"] == 0
