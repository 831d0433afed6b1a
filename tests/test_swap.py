"""Programs larger than RAM: what leaves comes back, whoever decides what leaves, and whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROGRAMS, Enclave, bring_up, module_enclave_of, take_down, wait_for
from numpy.typing import ArrayLike

from bus.client import Control
from bus.runtime import fetch_tables
from bus.tables import Tables
from kernel.abi import OP_DTYPE, lib, names

POLICIES = ["clock", "mglru", "mru", "random", "spare_running", "superfetch", "two_list"]  # in this order: the default is there again at the end
LARGE = 80  # MiB, in 48 MiB of RAM


module_enclave, enclave = module_enclave_of("sw", "--ram", "48M", "--swap", "256M", sound=lambda s: s["swap"]["used"] == 0)


def tables(e: Enclave) -> Tables:
    return fetch_tables(e.run_dir, lib.SY_C_KSWAPD)


@contextlib.contextmanager
def as_kswapd(e: Enclave) -> Iterator[Callable[..., list[str]]]:
    """Commits in kswapd's place: commit(op, pfns, order=0, behind=0, arg=0), with barriers of so many changes ago; the results' names."""
    frames = tables(e).frames
    with Control(e.run_dir, 5, "kswapd") as c:
        c.request(
            {"t": "hello", "name": "kswapd", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()}
        )

        def commit(op: int, pfns: ArrayLike, order: int = 0, behind: int = 0, arg: int = 0) -> list[str]:
            at = np.asarray(pfns)
            ops = np.zeros(len(at), OP_DTYPE)
            ops["op"], ops["pfn"], ops["order"], ops["arg"] = op, at, order, arg
            ops["barrier"] = frames["barrier"][at % len(frames)] - behind
            _, raw = c.exchange({"t": "txn", "name": "kswapd"}, ops.tobytes())
            return [names("SY_R_")[int(r)] for r in np.frombuffer(raw, OP_DTYPE)["result"]]

        yield commit


def swapped(*what: str, mib: int = LARGE) -> list[Any]:
    return [sys.executable, PROGRAMS / "swapped.py", mib, *what]


def waiting(e: Enclave, mib: int = LARGE) -> subprocess.Popen[str]:
    """A program that has filled its memory and looks at all of it until it is told to end."""
    p = e.popen(swapped("waits", mib=mib))
    assert p.stdout and p.stdout.readline() == "filled: 0\n"
    return p


def lost_nothing(p: subprocess.Popen[str]) -> None:
    """Ends it: everything was there."""
    p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=60)[0].splitlines()[-2:] == ["waited: 0", "after waits: 0"]


REDIS = """
cd "$1"
redis-server --port 0 --unixsocket "$1/sock" --save "" --enable-debug-command yes > log 2>&1 &
trap 'kill $! 2>/dev/null; wait' EXIT
cli="redis-cli -s $1/sock"
for i in $(seq 100); do $cli ping > /dev/null 2>&1 && break; sleep 0.05; done
awk -v n=$2 'BEGIN{for(i=0;i<n;i++) printf "SET key:%d %0800d\\r\\n", i, i*7919}' | $cli --pipe > /dev/null
$cli debug digest
for k in $(seq $3); do redis-benchmark -s "$1/sock" -r $2 -t get -n $2 -P 16 -q > /dev/null; done
$cli debug digest
$cli dbsize
"""
SQLITE = """
sqlite3 :memory: "PRAGMA cache_size=-400000; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<$1) INSERT INTO t SELECT i, printf('%0300d', i*7919) FROM n;
CREATE INDEX x ON t(b); UPDATE t SET b=b||'x' WHERE a%7=0; PRAGMA integrity_check; SELECT count(*), sum(length(b)) FROM t;"
"""


def larger_than_memory(what: str, mib: int, directory: Path) -> list[str]:
    """A command that needs twice ``mib`` MiB and checks what it has; its output does not depend on where it runs, but for memtester's."""
    return {
        "redis": ["bash", "-c", REDIS, "x", str(directory), str(mib * 1600), str(mib // 40)],
        "sqlite": ["bash", "-c", SQLITE, "x", str(mib * 2000)],
        # Without RLIMIT_MEMLOCK 0 it locks its buffer, and root may lock anything.
        "memtester": ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "prlimit", "--memlock=0",
                      "env", "MEMTESTER_TEST_MASK=7", "memtester", f"{2 * mib}M", "1"],
    }[what]  # fmt: skip


def test_arguments_of_calls_past_libc(root_dir: Path, compiled: Callable[[str], Path]) -> None:
    """Who looks at them is who makes room: it does not wait for a frame to see those that are in the store."""
    e = bring_up(root_dir / "swp", "--ram", "48M", "--swap", "256M")
    try:
        done = e.run([compiled("rare"), "arguments_away"], timeout=60)
        assert (done.stdout, done.returncode) == ("wrong: 0 0 0 0\n", 0), done
        assert e.idle()["counters"]["oom_kills"] == 0
        e.check()
    finally:
        take_down(e)


@pytest.mark.parametrize("what", ["redis", "sqlite"])
def test_larger_than_memory(enclave: Enclave, what: str, tmp_path: Path) -> None:
    """All five policies in turn, and restarts, under a program of twice the memory. For longer, and memtester, in test_soak.py."""
    cmd = larger_than_memory(what, 48, tmp_path)
    native = subprocess.run(cmd, capture_output=True, text=True, timeout=60).stdout
    before = enclave.status()["counters"]["swapped_in"]
    p = enclave.popen(cmd)
    turn = 0
    try:
        while p.poll() is None:
            if turn % 2:
                enclave.supervisorctl("restart", "kswapd")
            else:
                enclave.cli("swap", "kswapd", POLICIES[turn // 2 % len(POLICIES)])
            turn += 1
            time.sleep(0.2)
    finally:
        enclave.cli("swap", "kswapd", POLICIES[-1])
    out = p.communicate(timeout=60)[0]
    assert (p.returncode, out) == (0, native)
    # One of each kind at least; how many more there is time for depends on the machine, and on what else it does.
    assert enclave.status()["counters"]["swapped_in"] > before + 4000 and turn >= 2


def natively(*what: str, mib: int = LARGE) -> str:
    return subprocess.run([*map(str, swapped(*what, mib=mib))], capture_output=True, text=True, timeout=60, check=True).stdout


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
    p = waiting(enclave)
    for policy in POLICIES:
        enclave.cli("swap", "kswapd", policy)
        wait_for(
            lambda: enclave.component("kswapd")["dump"].get("chosen", 0) > 1000, 30, f"{policy} reclaims nothing"
        )
    lost_nothing(p)


def test_kswapd_killed_stopped_and_gone(enclave: Enclave) -> None:
    """Again and again; and for as long as it is stopped the gateway reclaims by itself."""
    p = waiting(enclave)
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
    lost_nothing(p)


def test_killed_programs_leave_no_slot(enclave: Enclave) -> None:
    for delay in (0.05, 0.4):
        p = waiting(enclave)
        time.sleep(delay)
        p.kill()
        p.wait(20)
    assert enclave.idle()["swap"]["used"] == 0


def test_no_page_shows_another_programs_bytes(enclave: Enclave) -> None:
    """Two programs out and in at once, then a third looks at what it gets."""
    two = [waiting(enclave, 40) for _ in range(2)]
    look = "print(sum(any(bytearray(1 << 20)) for _ in range(30)))"
    assert enclave.run([sys.executable, "-c", look]).stdout == "0\n"
    for p in two:
        lost_nothing(p)


def test_down_gives_everything_back(root_dir: Path) -> None:
    """sylvie down under a program with pages in the store: it goes on, natively, with all of them."""
    e = bring_up(root_dir / "swd", "--ram", "48M", "--swap", "256M")
    p = waiting(e)
    wait_for(lambda: e.status()["swap"]["used"] > 1000, 20, "nothing is in the store")
    swap = e.run_dir / "swap"
    assert (swap.stat().st_mode & 0o777, swap.stat().st_uid) == (0o600, 0)
    e.cli("down")
    assert not swap.exists()
    lost_nothing(p)


def test_store_and_ram_full(root_dir: Path) -> None:
    """Then the OOM rule applies: the largest is ended, the other goes on; and a mapping beyond both is ENOMEM."""
    e = bring_up(root_dir / "swf", "--ram", "64M", "--swap", "64M")
    try:
        small = waiting(e, 20)
        large = e.popen(swapped("waits", mib=160))
        assert large.wait(60) == -signal.SIGKILL
        lost_nothing(small)
        code = (
            "import mmap\ntry: mmap.mmap(-1, 140 << 20, flags=mmap.MAP_PRIVATE)\nexcept OSError as e: print(e.strerror)"
        )
        assert e.run([sys.executable, "-c", code]).stdout == "Cannot allocate memory\n"
        assert e.idle()["counters"]["oom_kills"] == 1
        e.check()
    finally:
        take_down(e)


def test_watermarks_are_set_at_run_time(enclave: Enclave) -> None:
    """Wrong ones are refused and change nothing; new ones are kept to at once, under a program."""
    before = json.loads(enclave.cli("watermarks", "--json").stdout)
    for wrong, why in (
        ([300, 200, 400], "ascend"), ([1, 2, 7000], "half of its 12288"), ([1, 2, 3, "--node", 1], "nodes are 0 to 0"), ([1, 2], "three"),
    ):  # fmt: skip
        done = enclave.cli("watermarks", *map(str, wrong), ok=False)
        assert done.returncode and why in done.stderr and "Traceback" not in done.stderr, done
    assert [{k: n[k] for k in ("min", "low", "high")} for n in json.loads(enclave.cli("watermarks", "--json").stdout)] == [
        {k: n[k] for k in ("min", "low", "high")} for n in before
    ]
    p = waiting(enclave)
    least, low, high = 500, 2000, 3000
    out = enclave.cli("watermarks", str(least), str(low), str(high)).stdout
    assert out.split()[-5:-2] == [str(least), str(low), str(high)]
    wait_for(lambda: enclave.status()["nodes"][0]["free"] > low, 20, "nothing leaves for the new marks")
    lost_nothing(p)
    enclave.cli("watermarks", *(str(before[0][k]) for k in ("min", "low", "high")))


def test_tiers_of_the_store(root_dir: Path, compiled: Callable[[str], Path]) -> None:
    """Zeros take nothing, a repeated word the smallest object, what compresses a slab's object, the rest the file; slabinfo says so, and all of it is
    given back."""
    assert subprocess.run([compiled("unpack")], capture_output=True, text=True, timeout=60).stdout == "20000 100000 100000\n"
    e = bring_up(root_dir / "swt", "--ram", "48M", "--swap", "256M", "--pool", "30%")
    try:
        p = waiting(e)
        wait_for(lambda: e.status()["swap"]["used"] > 4000, 20, "nothing is in the store")
        p.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        used = e.status()["swap"]
        caches = {c["size"]: c for c in json.loads(e.cli("slabinfo", "--json").stdout)}
        lines = e.cli("slabinfo").stdout.splitlines()
        objects = sum(c["active"] for c in caches.values())
        # a quarter each: words, and half pages of text and random bytes
        assert caches[64]["active"] > used["used"] / 8 and caches[2336]["active"] > used["used"] / 8
        assert objects < used["used"] * 5 / 8
        assert 0 < used["pool_frames"] <= used["pool_max"] == 48 * 256 * 30 // 100
        assert used["pool_frames"] == sum(c["frames"] for c in caches.values()) <= e.status()["frames"]["reserved"]
        # as /proc/slabinfo on this machine, field by field
        kernels = Path("/proc/slabinfo").read_text().splitlines()
        assert [len(line.split()) for line in lines[:1] + lines[2:]] == [5 - 1] + [16] * len(caches)
        assert lines[0] == kernels[0] and lines[1].split() == kernels[1].split()
        assert all(re.sub(r"\d+", "N", a.split(None, 1)[1]).split() == re.sub(r"\d+", "N", kernels[2].split(None, 1)[1]).split() for a in lines[2:])
        e.check()
        p.send_signal(signal.SIGCONT)
        lost_nothing(p)
        s = e.idle()
        assert (s["swap"]["used"], s["swap"]["pool_frames"]) == (0, 0)
        e.check()
    finally:
        take_down(e)


def test_stopped_in_the_middle_of_coming_back(enclave: Enclave) -> None:
    """A program stopped at any instant, also one of its own service threads with a page half back, breaks no rule of ``sylvie check``."""
    code = (
        "import mmap\nm = mmap.mmap(-1, 80 << 20, flags=mmap.MAP_PRIVATE)\n"
        "for i in range(0, len(m), 4096): m[i:i + 4] = i.to_bytes(4, 'little')\n"
        "print('there', flush=True)\n"
        "while True:\n for i in range(0, len(m), 4096): assert m[i:i + 4] == i.to_bytes(4, 'little')\n"
    )
    p = enclave.popen([sys.executable, "-c", code])
    assert p.stdout and p.stdout.readline() == "there\n"
    for _ in range(20):
        p.send_signal(signal.SIGCONT)
        time.sleep(0.02)
        p.send_signal(signal.SIGSTOP)
        enclave.check()
    p.send_signal(signal.SIGCONT)
    assert p.poll() is None
    p.kill()
    p.wait(10)


def test_refused_reclaims_change_nothing(root_dir: Path) -> None:
    """Stale, foreign and impossible ones: each with its reason."""
    e = bring_up(root_dir / "swr", "--ram", "64M", "--swap", "64M")
    try:
        e.supervisorctl("stop", "kswapd", "thp")  # (thp would move them meanwhile)
        p = e.popen(
            [sys.executable, "-c", "b = bytearray(8 << 20); print('there', flush=True); input()"], stdin=subprocess.PIPE
        )
        assert p.stdout and p.stdout.readline() == "there\n"
        frames = tables(e).frames
        mapped = np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)
        free = np.flatnonzero(frames["state"] == lib.SY_FRAME_FREE)
        before = e.status()["frames"]["mapped"]
        with as_kswapd(e) as commit:
            assert commit(lib.SY_OP_RECLAIM, free[:1]) == ["STALE"]
            assert commit(lib.SY_OP_RECLAIM, mapped[:1], behind=1) == ["STALE"]
            assert commit(lib.SY_OP_RECLAIM, mapped[:1], order=11) == ["INVALID"]
            assert commit(lib.SY_OP_RECLAIM, [len(frames)]) == ["INVALID"]
            assert commit(lib.SY_OP_GRANT, mapped[1:2]) == ["NOT_PERMITTED"]
            assert commit(lib.SY_OP_RECLAIM, free[:1], arg=lib.SY_RECLAIM_STANDBY) == ["STALE"]
            assert commit(lib.SY_OP_RECLAIM, mapped[2:4], arg=lib.SY_RECLAIM_STANDBY) == ["COMPLETE"] * 2
            assert commit(lib.SY_OP_RECLAIM, mapped[2:4], arg=lib.SY_RECLAIM_STANDBY) == ["STALE"] * 2  # it does already
        # RAM is not short: what stands by stays
        time.sleep(0.3)
        assert e.status()["frames"]["mapped"] == before and e.status()["swap"]["used"] == 0
        p.communicate("\n", timeout=20)
    finally:
        p.kill()
        p.wait(10)
        take_down(e)


MOVES = """
import ctypes, sys, threading
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
n, over = 4 << 20, threading.Event()
def mmap(): return libc.mmap(None, ctypes.c_size_t(n), 3, 0x22, -1, ctypes.c_long(0))
def moved(a, b): return libc.mremap(ctypes.c_void_p(a), ctypes.c_size_t(n), ctypes.c_size_t(n), 3, ctypes.c_void_p(b))
a, b = mmap(), mmap()
ctypes.memset(a, 7, n)
print("there", flush=True)
threading.Thread(target=lambda: (sys.stdin.readline(), over.set())).start()
while not over.is_set():
    assert moved(a, b) == b and moved(b, a) == a
print("moved", flush=True)
sys.stdin.readline()
print(ctypes.string_at(a, n) == bytes([7]) * n)
"""


def test_pages_that_are_moved_on_their_way_out(root_dir: Path) -> None:
    """mremap of pages that are to leave: they stay, and may be told to leave again; no frame is counted as leaving for ever."""
    e = bring_up(root_dir / "swm", "--ram", "64M", "--swap", "64M")
    try:
        e.supervisorctl("stop", "kswapd")
        p = e.popen([sys.executable, "-c", MOVES], stdin=subprocess.PIPE)
        assert p.stdout and p.stdin and p.stdout.readline() == "there\n"
        frames = tables(e).frames
        with as_kswapd(e) as commit:
            for i in range(40):
                if len(some := np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[i % 8 :: 8]):
                    commit(lib.SY_OP_RECLAIM, some)
        p.stdin.write("\n"), p.stdin.flush()
        assert p.stdout.readline() == "moved\n"
        leaving = wait_for(lambda: not np.count_nonzero(frames["flags"] & lib.SY_FF_SWAPPING), 10, "frames are still to leave")
        assert leaving and p.communicate("\n", timeout=20)[0] == "True\n"
        e.idle()
        e.check()
    finally:
        take_down(e)


def test_a_full_disk_keeps_the_pages(root_dir: Path) -> None:
    """The swap file cannot take them: they stay in their frames, are counted, and go on being the program's."""
    disk = root_dir / "errors"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M,mode=755", "sylvie-test", disk], check=True)
    try:
        e = bring_up(disk / "r", "--ram", "64M", "--swap", "256M", "--pool", "0%")
        try:
            e.supervisorctl("stop", "kswapd")
            p = waiting(e, 24)
            frames = tables(e).frames

            def reclaim() -> int:
                with as_kswapd(e) as commit:
                    commit(lib.SY_OP_RECLAIM, np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[:4096])
                return int(e.status()["counters"]["store_errors"])

            wait_for(lambda: reclaim() > 100, 30, "the disk does not run full")
            lost_nothing(p)
            s = e.idle()
            assert s["counters"]["oom_kills"] == s["swap"]["used"] == 0
            e.check()
        finally:
            take_down(e)
    finally:
        subprocess.run(["umount", disk], check=True)


LOOKS = """
import os, sys, zlib
b = os.urandom(24 << 20)
s = zlib.crc32(b)
print("there", flush=True)
for _ in sys.stdin: print(zlib.crc32(b) == s, flush=True)
"""


def test_a_disk_with_errors(root_dir: Path) -> None:
    """What cannot be written stays in its frame; for what cannot be read, or is read wrong, the program waits, and goes on when it can be."""
    disk, image, good = root_dir / "bad", root_dir / "bad.img", root_dir / "good.img"
    disk.mkdir()
    with open(image, "wb") as f:
        f.truncate(200 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        e = bring_up(disk / "r", "--ram", "64M", "--swap", "128M", "--pool", "0%")
        try:
            e.supervisorctl("stop", "kswapd")
            p = e.popen([sys.executable, "-c", LOOKS], stdin=subprocess.PIPE)
            assert p.stdin and p.stdout and p.stdout.readline() == "there\n"
            frames, gateway = tables(e).frames, e.gateway_pid()

            def reclaim() -> dict[str, int]:
                with as_kswapd(e) as commit:
                    commit(lib.SY_OP_RECLAIM, np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[:4096])
                s = e.status()
                return {"used": s["swap"]["used"], "errors": s["counters"]["store_errors"]}

            def look() -> None:
                assert p.stdin
                p.stdin.write("\n")
                p.stdin.flush()

            limits = resource.prlimit(gateway, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # EFBIG
            wait_for(lambda: reclaim()["errors"] > 100, 30, "no error where nothing can be written")
            resource.prlimit(gateway, resource.RLIMIT_FSIZE, limits)
            look()
            assert p.stdout.readline() == "True\n"
            fd = os.open(e.run_dir / "swap", os.O_RDWR)
            for broken in ("device", "content"):
                wait_for(lambda: reclaim()["used"] > 5000, 30, "nothing leaves")
                wait_for(lambda: not np.any(frames["flags"] & lib.SY_FF_SWAPPING), 20, "it does not end")
                os.fsync(fd)
                before = e.status()["counters"]["store_errors"]
                if broken == "device":  # it ends before the file does: EIO
                    subprocess.run(["sync", "-f", e.run_dir], check=True)
                    shutil.copyfile(image, good)
                    os.truncate(image, 0)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                else:  # what a disk has lost after it was written
                    content = os.pread(fd, 128 << 20, 0)
                    os.pwrite(fd, bytes(len(content)), 0)
                look()
                wait_for(lambda b=before: e.status()["counters"]["store_errors"] > b + 10, 30, f"{broken}: all is read")
                if broken == "device":
                    with open(good, "rb") as whole, open(image, "r+b") as to:
                        shutil.copyfileobj(whole, to, 1 << 20)
                else:
                    os.pwrite(fd, content, 0)
                assert p.stdout.readline() == "True\n"
            os.close(fd)
            p.communicate(timeout=20)
            s = e.idle()
            assert s["counters"]["oom_kills"] == s["swap"]["used"] == 0
            e.check()
        finally:
            take_down(e)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_frames_are_aged_without_a_store(root_dir: Path) -> None:
    """Who watches what is in use needs none: a touch after AGE is a PAGE_HINT, and nothing is lost."""
    e = bring_up(root_dir / "swa", "--ram", "64M")
    try:
        e.supervisorctl("stop", "kswapd")
        p = waiting(e, 20)
        frames, gateway = tables(e).frames, e.gateway_pid()
        with as_kswapd(e) as commit:
            results = set()
            for _ in range(20):
                results |= {*commit(lib.SY_OP_AGE, np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[:4096])}
                aged = int(np.count_nonzero(frames["flags"] & lib.SY_FF_AGED))
            wait_for(lambda: np.count_nonzero(frames["flags"] & lib.SY_FF_AGED) < aged, 20, "no touch shows")
            assert {*commit(lib.SY_OP_RECLAIM, np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[:10])} == {"FULL"}
        assert "COMPLETE" in results and results <= {"COMPLETE", "STALE", "BUSY"}
        lost_nothing(p)
        assert e.gateway_pid() == gateway
        e.check()
    finally:
        take_down(e)


def test_a_stopped_program_does_not_hold_up_others(enclave: Enclave) -> None:
    """It executes nothing, so what is asked of it does not leave: another's pages do, and its own are all there afterwards."""
    stopped = waiting(enclave, 30)
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        assert enclave.run(swapped(mib=30), timeout=60).stdout == "filled: 0\n"
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    lost_nothing(stopped)
