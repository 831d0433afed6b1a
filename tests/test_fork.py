"""fork: parent and child share frames, a write makes a copy, and nothing is lost whoever dies, or is short of memory, meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Enclave, bring_up, module_enclave_of, take_down, wait_for
from test_swap import lost_nothing, tables, waiting
from test_thp import Huge
from test_together import TURNS, disturb

from kernel.abi import lib

Compiled = Callable[[str], Path]
RAM = 128
# Shares 48 MiB with a child that goes on, both until they are told to end; each looks whether it has what it should.
FAMILY = """
import os, sys
n = int(sys.argv[1]) << 20
pages = n // 4096
b = bytearray(os.urandom(n))
was = bytes(b[::4096])
r, w = os.pipe()
pid = os.fork()
me = "child" if pid == 0 else "parent"
if pid == 0: os.read(r, 1)
else: print(f"there {pid}", flush=True)
for line in sys.stdin if pid else []:
    what = line.split()[0]
    if what == "write": b[: 4096 * pages // 4 : 4096] = bytes(pages // 4); print("written", flush=True)
    elif what == "end": break
if pid: os.write(w, b"x")
same = b[::4096] == (bytes(pages // 4) + was[pages // 4:] if pid and "write" in sys.argv else was)
os.write(1, f"{me} {same}\\n".encode())
if pid: assert os.waitpid(pid, 0)[1] == 0
"""


module_enclave, enclave = module_enclave_of(
    "fk", "--ram", f"{RAM}M", "--swap", "512M", patience=30,
    sound=lambda s: s["swap"]["used"] == 0 and s["frames"]["shared"] == s["frames"]["mapped"] == 0,
)  # fmt: skip


def family(e: Enclave, mib: int, *args: str) -> subprocess.Popen[str]:
    """FAMILY, running."""
    p = e.popen([sys.executable, "-c", FAMILY, mib, *args], stdin=subprocess.PIPE)
    assert p.stdout and p.stdin
    assert p.stdout.readline().startswith("there ")
    return p


def say(p: subprocess.Popen[str], what: str) -> None:
    assert p.stdin
    p.stdin.write(what + "\n")
    p.stdin.flush()


def test_memory_only_for_what_is_written(enclave: Enclave) -> None:
    """48 MiB twice are 48 MiB, in SHARED frames, until one writes; and the parent's alone again when its child has ended."""
    before = enclave.status()["counters"]
    p = family(enclave, 48, "write")
    frames = enclave.status()["frames"]
    assert frames["shared"] > 48 * 256 and frames["mapped"] < 16 * 256
    after = enclave.status()["counters"]
    assert after["fork_shared"] >= before["fork_shared"] + 48 * 256 and after["unmerged"] < before["unmerged"] + 2000
    enclave.check()
    say(p, "write")
    assert p.stdout and p.stdout.readline() == "written\n"
    wait_for(lambda: (now := enclave.status()["counters"]["unmerged"] - after["unmerged"]) >= 12 * 256 and now < 16 * 256, 5, "not what was written is copied")
    assert enclave.status()["frames"]["shared"] > 30 * 256
    out = p.communicate("end\n", timeout=30)[0]
    assert p.returncode == 0 and sorted(out.split("\n")) == ["", "child True", "parent True"]


def test_alone_again(enclave: Enclave, compiled: Compiled) -> None:
    """After the child's end pages leave and come back as before the fork, and huge mappings are there again."""
    h = Huge(enclave, compiled, "forks", 32)
    wait_for(lambda: h.mapped_huge() >= 30, 40, "not mapped by huge entries")
    assert h.p.stdin and h.p.stdout
    h.p.stdin.write("\n")
    h.p.stdin.flush()
    assert h.p.stdout.readline() == "forked\n"
    wait_for(lambda: h.mapped_huge() >= 30, 10, "not mapped by huge entries any more")
    assert enclave.status()["frames"]["shared"] == 0
    before = enclave.status()["counters"]["swapped_out"]
    p = waiting(enclave, RAM)
    lost_nothing(p)
    assert enclave.status()["counters"]["swapped_out"] > before + 8 * 256
    h.ends_well()


@pytest.mark.parametrize("mib", [16, 64])
def test_generations(enclave: Enclave, compiled: Compiled, mib: int) -> None:
    """Forks of forks, children that outlive their parents, dropped, moved, protected and locked pages; also with more than RAM holds."""
    before = enclave.status()["counters"]
    for seed in range(2):
        done = enclave.run([compiled("forked"), seed, mib * 256, 150, 3 if mib < 32 else 2], timeout=60)
        assert done.returncode == 0 and " 0 wrong, first 0\n" in done.stdout, done
    after = enclave.status()["counters"]
    assert after["fork_shared"] > before["fork_shared"] + 4 * mib * 256
    assert mib < 32 or after["swapped_in"] > before["swapped_in"] + 1000


def test_disturbed(root_dir: Path, compiled: Compiled) -> None:
    """All components killed, stopped and swapped under it, with 24 MiB of RAM for programs of several times that."""
    e = bring_up(root_dir / "fkd", "--ram", "24M", "--swap", "512M", "--nodes", "2")
    try:
        r, turn, ps = random.Random(3), 0, list[subprocess.Popen[str]]()
        while turn < 3 or any(p.poll() is None for p in ps):  # each kind of disturbance once, at least: again, if they are through before
            if all(p.poll() is not None for p in ps):
                ps += [e.popen([compiled("forked"), seed, 16 * 256, 200, 3], "--ksm") for seed in (11, 12)]
            disturb(e, turn, r)
            turn += 1
            time.sleep(0.1)
        for p in ps:
            out = p.communicate(timeout=60)[0]
            assert p.returncode == 0 and " 0 wrong, first 0\n" in out, out
        assert set(TURNS) <= {c["name"] for c in e.status()["components"]}
        e.idle(20)
        e.check()
    finally:
        take_down(e)


def test_nothing_can_leave(root_dir: Path) -> None:
    """No store, and no room for the copies: the child makes its own in the machine's memory, nobody is ended."""
    e = bring_up(root_dir / "fkn", "--ram", "64M")
    writes = "import os, sys\nn = int(sys.argv[1]) << 20\nb = bytearray(b'x') * n\npid = os.fork()\nb[::4096] = (b'c' if pid == 0 else b'p') * (n // 4096)\nos.write(1, b'%d %d\\n' % (b.count(b'x') == n - n // 4096, b.count(b'c' if pid == 0 else b'p') == n // 4096))\nif pid: print(os.waitpid(pid, 0)[1])\n"
    try:
        done = e.run([sys.executable, "-c", writes, 40], timeout=60)
        assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "0", "1 1", "1 1"], done
        assert (c := e.status()["counters"])["forks_parted"] >= 1 and c["oom_kills"] == 0
        # within a limit, too
        done = subprocess.run(e.command([sys.executable, "-c", writes, 14], "--limit", "24M"), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "0", "1 1", "1 1"], done
        assert (c := e.status()["counters"])["oom_kills"] == 0
        e.idle()
        e.check()
    finally:
        take_down(e)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_one_is_killed(enclave: Enclave, who: str) -> None:
    """What they shared is the other's; nothing leaks."""
    p = family(enclave, 40)
    child = next(a["pid"] for a in enclave.status()["address_spaces"] if a["pid"] != p.pid and a["shared"] > 9000)
    os.kill(p.pid if who == "parent" else child, signal.SIGKILL)
    wait_for(lambda: enclave.status()["frames"]["shared"] == 0, 20, "still shared")
    wait_for(lambda: enclave.status()["frames"]["mapped"] > 40 * 256, 5, "not the other's")
    enclave.check()
    if who == "child":
        assert p.stdin
        p.stdin.write("end\n")
        p.stdin.close()
        assert p.stdout
        assert p.stdout.read().startswith("parent True\n")
        p.wait(10)
    else:
        os.kill(child, signal.SIGKILL)
        p.wait(10)


def test_child_with_pages_from_the_store_is_released(enclave: Enclave, compiled: Compiled) -> None:
    """What was in the store at the fork is the kernel's in the child; while that turns native as a whole it goes on writing there."""
    for _ in range(2):
        before = enclave.status()["counters"]["released"]
        p = enclave.popen([compiled("rare"), "released_child"])
        assert p.stdout
        enclave.cli("release", p.stdout.readline().strip(), ok=False)  # (where nothing else could leave, it has been released by itself)
        assert p.stdout.read() == "0 pages have lost counts\n"
        assert p.wait(20) == 0
        assert enclave.status()["counters"]["released"] == before + 1


def test_killed_at_any_moment(enclave: Enclave) -> None:
    """Parents and children killed in the middle of fork, join and copy."""
    forks = "import os\nb = bytearray(b'x') * (24 << 20)\nprint('there', flush=True)\nwhile True:\n    pid = os.fork()\n    if pid == 0:\n        b[::8192] = b'y' * (len(b) // 8192)\n        os._exit(0 if b.count(b'y') == len(b) // 8192 else 1)\n    assert os.waitpid(pid, 0)[1] in (0, 9)\n    assert b.count(b'x') == len(b)\n"
    r = random.Random(5)
    for turn in range(12):
        p = enclave.popen([sys.executable, "-c", forks])
        assert p.stdout and p.stdout.readline() == "there\n"
        for _ in range(6):
            time.sleep(r.random() * 0.05)
            if turn % 2:
                for child in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
            assert p.poll() is None
        p.kill()
        p.wait(10)
        if turn % 4 == 3:
            enclave.idle(20)
            enclave.check()


def test_gateway_killed_meanwhile(root_dir: Path) -> None:
    """Forks go on, by copies; what was shared stays whole, and a write to it makes a copy of the kernel's."""
    e = bring_up(root_dir / "fkg", "--ram", "192M")
    forks = "import os\nb = bytearray(b'x') * (24 << 20)\nprint('there', flush=True)\nfor i in range(20):\n    pid = os.fork()\n    b[::4096] = (b'y' if pid else b'z') * (len(b) // 4096)\n    ok = b.count(b'x') == len(b) - len(b) // 4096\n    if pid == 0: os._exit(not ok)\n    assert os.waitpid(pid, 0)[1] == 0 and ok and b.count(b'y') == len(b) // 4096\nprint('done')\n"
    try:
        for delay in (0.05, 0.3):
            ps = [e.popen([sys.executable, "-c", forks]) for _ in range(2)]
            for p in ps:
                assert p.stdout and p.stdout.readline() == "there\n"
            time.sleep(delay)
            old = e.gateway_pid()
            os.kill(old, signal.SIGKILL)
            for p in ps:
                assert p.communicate(timeout=60)[0] == "done\n" and p.returncode == 0
            e.successor(old)
    finally:
        take_down(e)


def test_claims_to_be_a_fork(enclave: Enclave) -> None:
    """Who says so and is none gets nothing: a stub's protocol, spoken by a liar."""
    import socket

    from kernel.abi import ffi

    bad = enclave.status()["counters"]["bad_hellos"]
    p = waiting(enclave, 16)
    asid = next(a["asid"] for a in enclave.status()["address_spaces"] if a["pid"] == p.pid)
    import ctypes

    fd = ctypes.CDLL(None, use_errno=True).syscall(323, os.O_CLOEXEC)
    hello = ffi.new("struct sy_hello *", {"magic": lib.SY_MAGIC, "abi": lib.SY_ABI_VERSION, "kind": lib.SY_HELLO_FORK, "arg": asid})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(str(enclave.run_dir / "gateway.sock"))
        s.settimeout(10)
        socket.send_fds(s, [bytes(ffi.buffer(hello))], [fd])
        answer = np.frombuffer(s.recv(4096), np.uint32)
        assert answer[2] == lib.SY_W_REFUSED
    os.close(fd)
    assert enclave.status()["counters"]["bad_hellos"] == bad + 1
    frames = tables(enclave).frames
    assert not (frames["state"] == lib.SY_FRAME_SHARED).any()
    lost_nothing(p)


def test_redis_saves_in_the_background(enclave: Enclave, tmp_path: Path) -> None:
    """Its dump has the data of the moment of the fork, and loads to the same digest."""
    script = """
cd "$1"; redis-server --port 0 --unixsocket s --save "" --enable-debug-command local --dir "$1" >/dev/null & p=$!
c="redis-cli -s s"
for i in $(seq 100); do $c ping >/dev/null 2>&1 && break; sleep 0.1; done
$c debug populate 40000 k 700 >/dev/null; a=$($c debug digest); $c bgsave >/dev/null
for i in 1 2 3; do $c debug populate 10000 x$i 100 >/dev/null; done
while $c info persistence | grep -qa "in_progress:1"; do sleep 0.1; done
$c info persistence | grep -a last_bgsave_status
$c flushall >/dev/null; $c debug reload nosave noflush; [ "$a" = "$($c debug digest)" ] && echo same
$c shutdown nosave; wait $p
"""
    before = enclave.status()["counters"]["fork_shared"]
    done = enclave.run(["bash", "-c", script, "x", tmp_path], timeout=90)
    assert done.stdout.replace("\r", "") == "rdb_last_bgsave_status:ok\nOK\nsame\n", done
    assert enclave.status()["counters"]["fork_shared"] > before + 5000


def test_small_ones_copy(enclave: Enclave) -> None:
    """A shell's forks share nothing: a copy is cheaper."""
    before: dict[str, Any] = enclave.status()["counters"]
    done = enclave.run(["sh", "-c", "for i in 1 2 3 4 5; do (echo $i); done"])
    assert done.stdout == "1\n2\n3\n4\n5\n"
    assert enclave.status()["counters"]["fork_shared"] == before["fork_shared"]
