"""ksm: equal pages share a frame, across programs, and no write that comes at any moment is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Enclave, module_enclave_of, wait_for
from test_swap import tables
from test_thp import asid_of, in_place_of

from bus.client import subscriber
from bus.codec import decode_batch
from kernel.abi import lib

RAM = 160  # MiB
Compiled = Callable[[str], Path]


started: list[subprocess.Popen[str]] = []
module_enclave, enclave = module_enclave_of("ks", "--ram", f"{RAM}M", "--swap", "64M", started=started,
    prepare=lambda e: e.supervisorctl("stop", "thp"),  # it would make blocks of what is to be taken apart
    sound=lambda s: s["frames"]["shared"] == 0,
)  # fmt: skip




def alike(e: Enclave, compiled: Compiled, what: str, mib: int, distinct: int, *options: str) -> subprocess.Popen[str]:
    p = e.popen([compiled("alike"), what, mib, distinct], *options, stdin=subprocess.PIPE)
    started.append(p)
    assert p.stdout and p.stdout.readline() == "there\n"
    return p


def says(p: subprocess.Popen[str], what: str = "\n") -> str:
    assert p.stdin and p.stdout
    p.stdin.write(what)
    p.stdin.flush()
    return p.stdout.readline()


def shares(e: Enclave) -> tuple[int, int]:
    """Frames that are SHARED, and pages in them."""
    f = tables(e).frames
    f = f[f["state"] == lib.SY_FRAME_SHARED]
    return len(f), int(f["refcount"].sum())


def test_across_programs(enclave: Enclave, compiled: Compiled) -> None:
    """Both have the same 64 pages in turn, 2048 each. Written, each has its own again."""
    one, two, other = (alike(enclave, compiled, what, 8, 64) for what in ("same", "same", "plain"))
    wait_for(lambda: shares(enclave)[1] == 2 * 2048, 40, "not all are shared")
    frames, pages = shares(enclave)
    assert 64 <= frames <= 3 * 64 and pages == 4096
    s = enclave.status()
    a = {a["pid"]: a for a in s["address_spaces"]}
    assert a[one.pid]["shared"] == a[two.pid]["shared"] == 2048 and a[other.pid]["shared"] == 0
    dump = wait_for(lambda: (d := enclave.component("ksm")["dump"])["pages_sharing"] == pages - frames and d, 5, "it does not say so")
    assert dump["pages_shared"] == frames and dump["full_scans"] > 1 and dump["general_profit"] > 3800 * 4096
    assert "pages_sharing" in enclave.cli("status").stdout
    enclave.check()
    assert [says(p) for p in (one, two, other)] == ["wrong 0\n"] * 3
    assert shares(enclave)[1] == pages  # reading changes nothing
    assert says(one) == "written, wrong 0\n"
    assert a[one.pid]["asid"] and says(two, "\n") == "written, wrong 0\n"
    wait_for(lambda: enclave.status()["counters"]["unmerged"] >= 4000, 5, "not counted")  # (where a write was quicker than protection it made a copy of the kernel's)
    for p in (one, two):
        p.communicate("\n", timeout=20)
        assert p.returncode == 0
    other.communicate("\n\n", timeout=20)


def test_no_write_is_lost(enclave: Enclave, compiled: Compiled) -> None:
    """Two threads of each program write to pages that are being merged, again and again."""
    before = enclave.status()["counters"]
    several = [alike(enclave, compiled, "writes", 4, 8) for _ in range(2)]
    wait_for(lambda: (c := enclave.status()["counters"])["merged"] > before["merged"] + 4000 and c["unmerged"] > before["unmerged"] + 1000, 60, "too little happens")
    enclave.check()
    for p in several:
        assert p.communicate("\n", timeout=30)[0] == "lost 0, wrong 0\n"
        assert p.returncode == 0


@pytest.mark.parametrize("distinct", [1, 32])
def test_calls_meet_shared_pages(enclave: Enclave, compiled: Compiled, distinct: int) -> None:
    cmd = [str(compiled("alike")), "calls", "8", str(distinct)]
    native = subprocess.run(cmd, input="\n", capture_output=True, text=True, timeout=30).stdout
    p = alike(enclave, compiled, "calls", 8, distinct)
    wait_for(lambda: shares(enclave)[1] == 2048, 40, "not all are shared")
    assert "there\n" + p.communicate("\n", timeout=30)[0] == native
    assert p.returncode == 0


def test_what_a_fork_shares_is_not_merged(enclave: Enclave) -> None:
    """ksm counts it not as its own, nor takes it for a stable page; merged pages are shared by the child, too."""
    code = """
import os, sys
b = bytearray(b"k" * 4096) * 2048
own = os.urandom(4 << 20)
print("there", flush=True)
sys.stdin.readline()
r, w = os.pipe()
if not os.fork():
    os.close(w)
    os.read(r, 1)
    os._exit(b.count(b"k") != 4096 * 2048)
print("forked", flush=True)
sys.stdin.readline()
b[::4096] = b"p" * 2048
os.close(w)
sys.exit(os.wait()[1])
"""
    p = enclave.popen([sys.executable, "-c", code], "--ksm", stdin=subprocess.PIPE)
    assert p.stdin and p.stdout and p.stdout.readline() == "there\n"
    f = tables(enclave).frames
    wait_for(lambda: f["refcount"][f["state"] == lib.SY_FRAME_SHARED].sum() > 2000, 30, "nothing is merged")
    p.stdin.write("\n")
    p.stdin.flush()
    assert p.stdout.readline() == "forked\n"
    shared = f[f["state"] == lib.SY_FRAME_SHARED]
    assert (shared["asid"] != 0).sum() > 500 and shared["refcount"][shared["asid"] == 0].sum() > 4000
    wait_for(lambda: (d := enclave.component("ksm")["dump"])["pages_sharing"] > 3900 and d["pages_shared"] < 200, 10, "ksm counts others")
    out = p.communicate("\n", timeout=30)[0]
    assert p.returncode == 0, out


def test_all_of_a_program(enclave: Enclave, compiled: Compiled) -> None:
    """`run --ksm`; and zero pages are pages like others."""
    p = alike(enclave, compiled, "plain", 8, 1, "--ksm")
    wait_for(lambda: shares(enclave)[1] >= 2048, 40, "not all are shared")
    assert shares(enclave)[0] <= 2 * 2048 // lib.SY_MAX_SHARING + 64
    assert (says(p), says(p)) == ("wrong 0\n", "written, wrong 0\n")
    p.communicate("\n", timeout=20)


def test_refused_and_nothing_changes(enclave: Enclave, compiled: Compiled) -> None:
    with in_place_of(enclave, "ksm") as commit:
        p, plain = alike(enclave, compiled, "same", 4, 4), alike(enclave, compiled, "plain", 4, 4)
        f = tables(enclave).frames

        def of(q: subprocess.Popen[str]) -> Any:
            """Its frames by address, of the large mapping."""
            at = np.flatnonzero((f["state"] == lib.SY_FRAME_MAPPED) & (f["asid"] == asid_of(enclave, q.pid)))
            at = at[np.argsort(f["vpage"][at])]
            ends = np.flatnonzero(np.diff(f["vpage"][at].astype(np.int64), prepend=-9) != 1)
            return max(np.split(at, ends[1:]), key=len)[:1024]

        wait_for(lambda: len(of(p)) == len(of(plain)) == 1024, 5, "the gateway has not heard of all")
        mine, others = of(p), of(plain)
        a, b, c = int(mine[0]), int(mine[4]), int(mine[1])
        refused = [
            commit(lib.SY_OP_MERGE, a, 0, a, behind=1), commit(lib.SY_OP_MERGE, a, 0, b), commit(lib.SY_OP_MERGE, a, 0, len(f)), commit(lib.SY_OP_MERGE, a, 10, a),
            commit(lib.SY_OP_MERGE, int(others[0]), 0, int(others[0])), commit(lib.SY_OP_RECLAIM, a, 0), commit(lib.SY_OP_MIGRATE, a, 0, 0),
        ]  # fmt: skip
        assert refused == [["STALE"], ["STALE"], ["INVALID"], ["INVALID"], ["NOT_PERMITTED"], ["NOT_PERMITTED"], ["NOT_PERMITTED"]]
        with subscriber(enclave.run_dir, [b"merge"], "ksm") as events:
            time.sleep(0.3)

            def answer() -> tuple[int, int, int]:
                assert events.poll(5000)
                (m,) = decode_batch(events.recv_multipart())[2]
                return int(m["type"]), int(m["pfn"]), int(m["arg"])

            assert commit(lib.SY_OP_MERGE, a, 0, a) == ["COMPLETE"]
            assert answer() == (lib.SY_MSG_PAGE_MERGED, a, a)
            assert (f["state"][a], f["refcount"][a], f["asid"][a]) == (lib.SY_FRAME_SHARED, 1, 0)
            assert commit(lib.SY_OP_MERGE, c, 0, a) == ["COMPLETE"]  # it has another content
            assert answer() == (lib.SY_MSG_MERGE_REFUSED, c, 84)
            assert (f["state"][c], f["refcount"][a]) == (lib.SY_FRAME_MAPPED, 1)
            assert commit(lib.SY_OP_MERGE, b, 0, a) == ["COMPLETE"]
            assert answer() == (lib.SY_MSG_PAGE_MERGED, a, b)
            assert (f["state"][b], f["refcount"][a]) == (lib.SY_FRAME_FREE, 2)
            assert commit(lib.SY_OP_MERGE, a, 0, a) == ["STALE"]
        assert says(p) == "wrong 0\n" and says(plain) == "wrong 0\n"


def test_killed_and_swapped_and_programs_killed(enclave: Enclave, compiled: Compiled) -> None:
    several = [alike(enclave, compiled, "writes", 4, 4) for _ in range(3)]
    for turn in range(3):
        if turn == 1:
            enclave.cli("swap", "ksm", "hot_aware")
        with contextlib.suppress(ProcessLookupError):
            os.kill(enclave.component("ksm")["pid"], signal.SIGKILL)
        time.sleep(0.5)
    enclave.cli("swap", "ksm", "scan")
    wait_for(lambda: shares(enclave)[1] > 500, 40, "the last one does not go on")
    several[0].kill()
    several[0].wait(20)
    several[1].send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    enclave.check()
    several[1].send_signal(signal.SIGCONT)
    for p in several[1:]:
        assert p.communicate("\n", timeout=30)[0] == "lost 0, wrong 0\n"


def test_release(enclave: Enclave, compiled: Compiled) -> None:
    p = alike(enclave, compiled, "same", 8, 16)
    wait_for(lambda: shares(enclave)[1] == 2048, 40, "not all are shared")
    enclave.cli("release", str(p.pid))
    assert (says(p), says(p)) == ("wrong 0\n", "written, wrong 0\n")
    p.communicate("\n", timeout=20)
