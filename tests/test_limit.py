"""`sylvie run --limit`: what a program and all that it starts own stays within, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
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
from conftest import PROGRAMS, Enclave, module_enclave_of, wait_for
from test_swap import lost_nothing, natively, swapped, tables

from kernel.abi import lib

MIB = 256  # frames
LIMIT = 20  # MiB
LARGE = 48  # MiB


module_enclave, enclave = module_enclave_of("li", "--ram", "192M", "--swap", "256M", sound=lambda s: s["limits"] == [])


def limited(e: Enclave, cmd: list[Any], mib: int = LIMIT) -> list[str]:
    return [sys.executable, "-m", "sylvie", "--run-dir", str(e.run_dir), "run", "--limit", f"{mib}M", "--", *map(str, cmd)]


def popen(cmd: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def owned(e: Enclave, zone: int) -> int:
    """Frames that the frame table shows within a limit."""
    return int(np.count_nonzero(tables(e).frames["limit"] == zone))


@contextlib.contextmanager
def watched(e: Enclave) -> Iterator[list[int]]:
    """The most frames, by the frame table, that any limit's programs were seen with, as the list's only element. (Frames that change hands
    while it is read are seen twice. So it is read twice: whose limit is the same both times has been that one's in between.)"""
    frames, most, over = tables(e).frames, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            once, again = frames["limit"].copy(), frames["limit"].copy()
            most[0] = max(most[0], int(np.bincount(once[once == again])[lib.SY_MAX_NODES :].max(initial=0)))

    t = threading.Thread(target=watch)
    t.start()
    try:
        yield most
    finally:
        over.set()
        t.join()


@pytest.mark.parametrize("what", ["forks", "threads"])
def test_as_natively(enclave: Enclave, what: str) -> None:
    """Two and a half times the limit: every call, fork and threads, with the same output, and never more frames than allowed; not all of
    the enclave's RAM is in use, so nobody else has to give any."""
    before = enclave.status()["counters"]
    with watched(enclave) as most:
        done = subprocess.run(limited(enclave, swapped(what, mib=LARGE)), capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr, done.returncode) == (natively(what, mib=LARGE), "", 0)
    assert LIMIT * MIB * 0.9 < most[0] < LIMIT * MIB * 1.03
    assert enclave.status()["counters"]["swapped_out"] - before["swapped_out"] > (LARGE - LIMIT) * MIB * 0.9


def test_a_neighbour_keeps_its_frames(enclave: Enclave) -> None:
    p = enclave.popen(swapped("waits", mib=24))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    subprocess.run(limited(enclave, swapped("calls", mib=LARGE)), capture_output=True, timeout=90, check=True)
    (space,) = enclave.status()["address_spaces"]
    assert space["swapped"] == 0 and space["mapped"] >= 24 * MIB
    lost_nothing(p)


def test_two_limits_and_what_is_started_below(enclave: Enclave, tmp_path: Path) -> None:
    """A shell's children share its limit, whatever they execute, also by another `sylvie run`; another tree has its own."""
    inner = [sys.executable, "-m", "sylvie", "--run-dir", enclave.run_dir, "run", "--", *swapped("waits", mib=12)]
    below = [swapped("waits", mib=12), swapped("waits", mib=12), inner]
    script = " & ".join(" ".join(map(str, cmd)) + f" >{tmp_path}/{i}" for i, cmd in enumerate(below)) + " & wait"
    tree, other = popen(limited(enclave, ["bash", "-c", script])), popen(limited(enclave, swapped("waits", mib=LARGE), mib=8))
    outputs = [tmp_path / str(i) for i in range(len(below))]

    def programs() -> list[int]:
        return [a["pid"] for a in enclave.status()["address_spaces"] if a["command"] != "bash"]

    try:
        assert other.stdout and other.stdout.readline() == "filled: 0\n"
        wait_for(lambda: all(o.exists() and "filled" in o.read_text() for o in outputs), 60, "not all run")
        s = enclave.status()
        limits = {limit["frames"]: limit for limit in s["limits"]}
        assert sorted(limits) == [8 * MIB, LIMIT * MIB]
        assert limits[8 * MIB]["members"] == 1 and limits[LIMIT * MIB]["members"] == 4
        for limit in s["limits"]:
            assert limit["used"] <= limit["frames"] and owned(enclave, limit["zone"]) <= limit["frames"] * 1.03
    finally:
        ended = programs()
        for pid in ended:
            os.kill(pid, signal.SIGTERM)
    assert len(ended) == 4
    assert tree.wait(60) == other.wait(60) == 0
    for text in (*(o.read_text() for o in outputs), "filled: 0\n" + other.stdout.read()):
        assert text.splitlines()[-2:] == ["waited: 0", "after waits: 0"]


@pytest.mark.parametrize("how", ["stop", "SIGSTOP"])
def test_without_kswapd(enclave: Enclave, how: str) -> None:
    """The gateway takes the oldest by itself, within the limit."""
    pid = enclave.component("kswapd")["pid"]
    if how == "stop":
        enclave.supervisorctl("stop", "kswapd")
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        with watched(enclave) as most:
            done = subprocess.run(limited(enclave, swapped("calls", mib=LARGE)), capture_output=True, text=True, timeout=90)
    finally:
        if how == "stop":
            enclave.supervisorctl("start", "kswapd")
        else:
            os.kill(pid, signal.SIGCONT)
    assert (done.stdout, done.returncode) == (natively("calls", mib=LARGE), 0)
    assert most[0] < LIMIT * MIB * 1.03
    wait_for(lambda: enclave.component("kswapd")["state"] == "online", 20, "kswapd is not back")


def test_policies_choose_within_it(enclave: Enclave) -> None:
    """kswapd, not the gateway, finds what leaves: the zone's own frames stand by."""
    chosen = enclave.component("kswapd")["dump"]["chosen"]
    p = popen(limited(enclave, swapped("waits", mib=LARGE)))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    wait_for(lambda: enclave.component("kswapd")["dump"]["chosen"] > chosen + 2000, 30, "kswapd chooses nothing")
    assert enclave.status()["nodes"][0]["standby"] == 0  # the node has enough
    lost_nothing(p)


def test_watermarks_of_a_limit(enclave: Enclave) -> None:
    p = popen(limited(enclave, swapped("waits", mib=LARGE)))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    zone = enclave.status()["limits"][0]["zone"]
    assert f"limit {zone}" in enclave.cli("watermarks", "128", "256", "2000", "--node", str(zone)).stdout
    limit = enclave.status()["limits"][0]
    assert [limit[k] for k in ("min", "low", "high")] == [128, 256, 2000]
    assert enclave.cli("watermarks", "1", "2", "3000", "--node", str(zone), ok=False).returncode != 0
    assert "no node 30" in enclave.cli("watermarks", "1", "2", "3", "--node", "30", ok=False).stderr
    lost_nothing(p)


def test_out_of_memory_within_a_limit(own_enclave: Enclave) -> None:
    """Without a store: the program with the most frames of that limit is ended, named on the bus; nobody outside is, who has far more."""
    big = own_enclave.popen(swapped("waits", mib=60))
    assert big.stdout and big.stdout.readline() == "filled: 0\n"
    done = subprocess.run(limited(own_enclave, swapped("calls", mib=LARGE)), capture_output=True, text=True, timeout=60)
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done
    assert own_enclave.status()["counters"]["oom_kills"] == 1
    lost_nothing(big)
    own_enclave.idle()
    own_enclave.check()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "1M", "--", "true"], "at least 4M"),
        (["--limit", "much", "--", "true"], "at least 4M"),
        (["--limit", "64M", "--", "{static}"], "statically linked"),
    ],
)
def test_what_cannot_be_limited(enclave: Enclave, root_dir: Path, arguments: list[str], says: str) -> None:
    static = root_dir / "static"
    if not static.exists():
        subprocess.run(["gcc", "-static", "-o", static, "-x", "c", "-"], input="int main(){return 0;}", text=True, check=True)
    done = enclave.cli("run", *(a.format(static=static) for a in arguments), ok=False)
    assert done.returncode != 0 and says in done.stderr


def test_no_more_limits(enclave: Enclave) -> None:
    """Each running tree takes one; who gets none does not run without."""
    sleeping = [popen(limited(enclave, ["sleep", "60"], mib=4)) for _ in range(lib.SY_MAX_LIMITS)]
    try:
        wait_for(lambda: len(enclave.status()["limits"]) == lib.SY_MAX_LIMITS, 30, "not all run")
        done = subprocess.run(limited(enclave, ["echo", "ran"]), capture_output=True, text=True, timeout=30)
        assert (done.stdout, done.returncode) == ("", 125) and "no more limits" in done.stderr
    finally:
        for p in sleeping:
            p.kill()
            p.wait(30)
    wait_for(lambda: enclave.status()["limits"] == [], 20, "limits are left")
    assert subprocess.run(limited(enclave, ["echo", "ran"]), capture_output=True, text=True, timeout=30).stdout == "ran\n"


def test_programs(enclave: Enclave) -> None:
    """A compiler and a sort in little memory."""
    source = PROGRAMS / "unpack.c"
    for cmd in (["gcc", "-O2", "-E", source], ["sort", "-S", "64M", "/usr/share/dict/words"]):
        if Path(str(cmd[-1])).exists():
            want = subprocess.run([*map(str, cmd)], capture_output=True, text=True, timeout=60, check=True).stdout
            done = subprocess.run(limited(enclave, cmd, mib=8), capture_output=True, text=True, timeout=90)
            assert (done.stdout, done.returncode) == (want, 0)


@pytest.mark.parametrize("what", ["in_libc", "past_libc", "forks", "protects", "moves_out", "moves_out_unreadable"])
def test_memory_asked_for_in_one_piece(enclave: Enclave, compiled: Callable[[str], Path], what: str) -> None:
    """More than the limit, by one call: what fills it must not keep what is to leave from leaving. And forks, and calls
    on those very pages, while threads wait for frames."""
    cmd = [compiled("populate"), what, str(LARGE)]
    before = enclave.status()["counters"]
    done = subprocess.run(limited(enclave, cmd), capture_output=True, text=True, timeout=90)
    native = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (native.stdout, "", 0)
    after = enclave.status()["counters"]
    assert after["swapped_out"] > before["swapped_out"] and after["oom_kills"] == before["oom_kills"]


def test_stopped_at_its_limit(enclave: Enclave, compiled: Callable[[str], Path]) -> None:
    """Whoever is stopped while he waits for frames cannot make room, and is not ended for it: not with a limit of his own, where nobody else can either."""
    before = enclave.status()["counters"]["oom_kills"]
    cmd = limited(enclave, [compiled("populate"), "touches", LARGE])
    several = [subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for p in several:
        assert p.stdout and p.stdout.readline() == "touches\n"
    time.sleep(0.5)
    for p in several:
        p.send_signal(signal.SIGSTOP)
    time.sleep(2.5)  # longer than anybody waits for a page to leave
    for p in several:
        p.send_signal(signal.SIGCONT)
    assert [p.communicate("\n", timeout=30)[0] for p in several] == ["forked\n"] * 4
    assert enclave.status()["counters"]["oom_kills"] == before
