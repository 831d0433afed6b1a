"""Programs larger than RAM: what leaves comes back, whoever decides what leaves, and whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROGRAMS, Enclave, bring_up, take_down, wait_for

from bus.client import Control
from kernel.abi import FRAME_DTYPE, OP_DTYPE, lib, names

POLICIES = ["clock", "mglru", "mru", "random", "two_list"]  # in this order: the default is there again at the end
LARGE = 80  # MiB, in 48 MiB of RAM


@pytest.fixture(scope="module")
def small(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "sw", "--ram", "48M", "--swap", "256M")
    yield e
    take_down(e)


@pytest.fixture
def enclave(small: Enclave) -> Iterator[Enclave]:
    """With nothing in its store at the end."""
    yield small
    s = small.idle()
    small.check()
    assert s["swap"]["used"] == 0


def swapped(*what: str, mib: int = LARGE) -> list[Any]:
    return [sys.executable, PROGRAMS / "swapped.py", mib, *what]


def natively(*what: str) -> str:
    return subprocess.run([*map(str, swapped(*what))], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("what", ["calls", "forks", "threads", "release"])
def test_as_natively(enclave: Enclave, what: str) -> None:
    """Every call, fork, threads and the way out, on pages that are in the store."""
    before = enclave.status()["counters"]
    done = enclave.run(swapped(what), timeout=90)
    assert (done.stdout, done.stderr, done.returncode) == (natively(what), "", 0)
    after = enclave.status()["counters"]
    assert after["swapped_out"] - before["swapped_out"] > 3000
    assert after["swapped_in"] - before["swapped_in"] > 3000 or what == "release"


def test_policies_are_swapped_under_a_program(enclave: Enclave) -> None:
    p = enclave.popen(swapped("waits"))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    for policy in POLICIES:
        enclave.cli("swap", "kswapd", policy)
        wait_for(
            lambda: enclave.component("kswapd")["dump"].get("reclaimed", 0) > 1000, 30, f"{policy} reclaims nothing"
        )
    p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=60)[0].splitlines()[-2:] == ["waited: 0", "after waits: 0"]


def test_kswapd_killed_stopped_and_gone(enclave: Enclave) -> None:
    """Again and again; and for as long as it is stopped the gateway reclaims by itself."""
    p = enclave.popen(swapped("waits"))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    for _ in range(2):
        time.sleep(0.2)
        pid = enclave.component("kswapd")["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: enclave.component("kswapd")["pid"] != pid and enclave.component("kswapd")["state"] == "online", 20, "no new kswapd")  # fmt: skip
    pid = enclave.component("kswapd")["pid"]
    before = enclave.status()["counters"]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(
            lambda: enclave.status()["counters"]["swapped_in"] > before["swapped_in"] + 4000,
            40,
            "the program does not go on",
        )
        assert enclave.status()["counters"]["evicted_by_gateway"] > before["evicted_by_gateway"] + 1000
    finally:
        os.kill(pid, signal.SIGCONT)
    p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=60)[0].splitlines()[-2:] == ["waited: 0", "after waits: 0"]


def test_killed_programs_leave_no_slot(enclave: Enclave) -> None:
    for delay in (0.05, 0.4):
        p = enclave.popen(swapped("waits"))
        assert p.stdout and p.stdout.readline() == "filled: 0\n"
        time.sleep(delay)
        p.kill()
        p.wait(20)
    assert enclave.idle()["swap"]["used"] == 0


def test_no_page_shows_another_programs_bytes(enclave: Enclave) -> None:
    """Two programs out and in at once, then a third looks at what it gets."""
    two = [enclave.popen(swapped("waits", mib=40)) for _ in range(2)]
    for p in two:
        assert p.stdout and p.stdout.readline() == "filled: 0\n"
    look = "print(sum(any(bytearray(1 << 20)) for _ in range(30)))"
    assert enclave.run([sys.executable, "-c", look]).stdout == "0\n"
    for p in two:
        p.send_signal(signal.SIGTERM)
        assert p.communicate(timeout=60)[0].splitlines()[-1] == "after waits: 0"


def test_down_gives_everything_back(root_dir: Path) -> None:
    """sylvie down under a program with pages in the store: it goes on, natively, with all of them."""
    e = bring_up(root_dir / "swd", "--ram", "48M", "--swap", "256M")
    p = e.popen(swapped("waits", mib=80))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    wait_for(lambda: e.status()["swap"]["used"] > 1000, 20, "nothing is in the store")
    swap = e.run_dir / "swap"
    assert (swap.stat().st_mode & 0o777, swap.stat().st_uid) == (0o600, 0)
    e.cli("down")
    assert not swap.exists()
    p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=60)[0].splitlines()[-2:] == ["waited: 0", "after waits: 0"]


def test_store_and_ram_full(root_dir: Path) -> None:
    """Then the OOM rule applies: the largest is ended, the other goes on; and a mapping beyond both is ENOMEM."""
    e = bring_up(root_dir / "swf", "--ram", "64M", "--swap", "64M")
    try:
        small = e.popen(swapped("waits", mib=20))
        assert small.stdout and small.stdout.readline() == "filled: 0\n"
        large = e.popen(swapped("waits", mib=160))
        assert large.wait(60) == -signal.SIGKILL
        small.send_signal(signal.SIGTERM)
        assert small.communicate(timeout=60)[0].splitlines()[-1] == "after waits: 0"
        code = (
            "import mmap\ntry: mmap.mmap(-1, 140 << 20, flags=mmap.MAP_PRIVATE)\nexcept OSError as e: print(e.strerror)"
        )
        assert e.run([sys.executable, "-c", code]).stdout == "Cannot allocate memory\n"
        assert e.idle()["counters"]["oom_kills"] == 1
        e.check()
    finally:
        take_down(e)


def test_refused_reclaims_change_nothing(root_dir: Path) -> None:
    """Stale, foreign and impossible ones: each with its reason."""
    e = bring_up(root_dir / "swr", "--ram", "64M", "--swap", "64M")
    try:
        conf = ["-c", str(e.run_dir / "supervisord.conf"), "stop", "kswapd"]
        subprocess.run(
            [Path(sys.executable).with_name("supervisorctl"), *conf], check=True, timeout=30, capture_output=True
        )
        p = e.popen(
            [sys.executable, "-c", "b = bytearray(8 << 20); print('there', flush=True); input()"], stdin=subprocess.PIPE
        )
        assert p.stdout and p.stdout.readline() == "there\n"
        from bus.runtime import fetch_tables

        tables = fetch_tables(e.run_dir, lib.SY_C_KSWAPD)
        frames: Any = tables.frames
        assert frames.dtype == FRAME_DTYPE
        mapped = np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)
        free = np.flatnonzero(frames["state"] == lib.SY_FRAME_FREE)
        before = e.status()["frames"]
        with Control(e.run_dir, 5, "kswapd") as c:
            c.request(
                {"t": "hello", "name": "kswapd", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()}
            )
            ops = np.zeros(5, OP_DTYPE)
            ops["op"] = lib.SY_OP_RECLAIM
            ops["pfn"] = [free[0], mapped[0], mapped[0], len(frames), mapped[1]]
            ops["order"] = [0, 0, 11, 0, 0]
            ops["barrier"] = frames["barrier"][ops["pfn"] % len(frames)]
            ops["barrier"][1] += 1
            ops["op"][4] = lib.SY_OP_GRANT
            _, raw = c.exchange({"t": "txn", "name": "kswapd"}, ops.tobytes())
            results = [names("SY_R_")[int(r)] for r in np.frombuffer(raw, OP_DTYPE)["result"]]
        assert results == ["STALE", "STALE", "INVALID", "INVALID", "NOT_PERMITTED"]
        assert e.status()["frames"] == before and e.status()["swap"]["used"] == 0
        p.communicate("\n", timeout=20)
    finally:
        take_down(e)


def test_a_stopped_program_does_not_hold_up_others(enclave: Enclave) -> None:
    """It executes nothing, so what is asked of it does not leave: another's pages do, and its own are all there afterwards."""
    stopped = enclave.popen(swapped("waits", mib=30))
    assert stopped.stdout and stopped.stdout.readline() == "filled: 0\n"
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        assert enclave.run(swapped(mib=30), timeout=60).stdout == "filled: 0\n"
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.communicate(timeout=60)[0].splitlines()[-1] == "after waits: 0"
