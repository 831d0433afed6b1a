"""Components, clients and the gateway die or misbehave; programs do not notice, and nothing is lost."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, Enclave, commit_as, wait_for

from kernel.abi import OP_DTYPE, ffi, lib

Compiled = Callable[[str], Path]
# Maps, fills, checks and frees memory for some seconds.
LOAD = """
import sys, time
kept, end, n = {}, time.time() + float(sys.argv[1]), 0
while time.time() < end:
    n += 1
    kept[n % 30] = bytes([n % 251]) * (50_000 + n * 7919 % 2_000_000)
    for v in kept.values():
        assert v[0] == v[-1] == v[len(v) // 2]
print('ok', n)
"""


def load(e: Enclave, seconds: float) -> subprocess.Popen[str]:
    return e.popen([sys.executable, "-c", LOAD, str(seconds)])


def finished(p: subprocess.Popen[str]) -> None:
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 0 and out.startswith("ok"), out


def buddy_agrees_with_the_table(e: Enclave) -> None:
    """buddy's free lists equal what the frame table says, once nothing is under way."""

    def equal() -> bool:
        dump = e.component()["dump"]
        return bool(dump.get("free_blocks") == e.request(t="buddyinfo")["nodes"])

    wait_for(equal, 10, f"buddy believes {e.component()['dump']}, the table says {e.request(t='buddyinfo')}")


def another_buddy(e: Enclave, old: int) -> None:
    """Waits until a buddy that is not process ``old`` is online."""
    wait_for(lambda: (c := e.component())["state"] == "online" and c["pid"] != old, 20, "buddy does not come back")


def test_buddy_killed_under_load(enclave: Enclave) -> None:
    p = load(enclave, 6)
    for _ in range(3):
        pid = wait_for(lambda: (c := enclave.component())["state"] == "online" and c["pid"], 20, "buddy is not online")
        time.sleep(0.4)
        os.kill(pid, signal.SIGKILL)
        another_buddy(enclave, pid)
    finished(p)
    enclave.idle()
    buddy_agrees_with_the_table(enclave)


def test_buddy_stopped_for_ten_seconds(enclave: Enclave) -> None:
    pid = enclave.component()["pid"]
    urgent = enclave.status()["counters"]["urgent"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        finished(load(enclave, 2))
        wait_for(lambda: enclave.component()["state"] == "lost", 10, "nobody notices that buddy is lost")
        # Far more than magazines and reserve hold: our own first-fit allocator serves.
        out = enclave.run(
            [sys.executable, "-c", "b=bytearray(300<<20); b[::4096]=b'x'*len(b[::4096]); print(b.count(b'x'))"]
        )
        assert out.stdout == f"{300 * 256}\n"
        time.sleep(max(0.0, began + 10 - time.monotonic()))
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: enclave.component()["state"] == "online", 10, "buddy does not come back")
    assert enclave.component()["pid"] == pid
    counters = enclave.status()["counters"]
    assert counters["urgent"] > urgent and counters["first_fit"] > 0
    enclave.idle()
    buddy_agrees_with_the_table(enclave)


def test_swap_under_load(enclave: Enclave) -> None:
    p = load(enclave, 5)
    time.sleep(0.5)
    assert "next_fit" in enclave.cli("swap", "buddy", "next_fit").stdout
    assert enclave.component()["implementation"] == "next_fit"
    enclave.cli("swap", "buddy", "buddy")
    bad = enclave.cli("swap", "buddy", "nonsense", ok=False)
    assert bad.returncode == 1 and "next_fit" in bad.stderr
    finished(p)
    assert enclave.component()["implementation"] == "buddy"


def test_killed_clients_return_every_frame(enclave: Enclave) -> None:
    enclave.idle()
    for _ in range(5):
        p = load(enclave, 60)
        wait_for(lambda: enclave.status()["frames"]["mapped"] > 1000, 20, "nothing is mapped")
        psutil.Process(p.pid).kill()
        p.wait(20)
    s = enclave.idle()
    assert s["frames"]["mapped"] == s["frames"]["granted"] == 0
    assert s["frames"]["free"] + s["frames"]["reserved"] == s["frames"]["total"]


FORKER = """
import os, sys
b = bytearray(range(256)) * (60 << 12)
print('ready', flush=True)
sys.stdin.readline()
if os.fork() == 0:
    ok = b == bytearray(range(256)) * (60 << 12)
    with open(sys.argv[1] + '.new', 'w') as f: f.write(str(ok))
    os.rename(sys.argv[1] + '.new', sys.argv[1])
    os._exit(0)
import signal; signal.pause()
"""


def test_parent_killed_in_the_middle_of_a_fork(enclave: Enclave, tmp_path: Path) -> None:
    """The child that is still copying has all of its parent's memory, or was never there; frames return either way."""
    survived = 0
    for i in range(8):
        answer = tmp_path / f"answer{i}"
        p = enclave.popen([sys.executable, "-c", FORKER, answer], stdin=subprocess.PIPE)
        assert p.stdin and p.stdout and p.stdout.readline() == "ready\n"
        p.stdin.write("\n")
        p.stdin.flush()
        time.sleep(0.002 + 0.006 * i)
        p.kill()
        p.wait(10)
        noise = enclave.run(
            [sys.executable, "-c", "b = bytearray(b'x' * (150 << 20)); print(len(b))"]
        )  # takes what is free
        assert noise.returncode == 0
        assert p.stdout.read() == ""
        if answer.exists():
            survived += 1
            assert answer.read_text() == "True"
    assert survived > 0
    s = enclave.idle(30)
    assert s["frames"]["mapped"] == s["frames"]["granted"] == 0


def test_parent_killed_while_its_child_copies_for_long(enclave: Enclave, compiled: Compiled) -> None:
    """Its frames are nobody else's until then: for longer than the ten seconds that a child unknown to the gateway has. And theirs who end."""
    for ends in (False, True):
        p = enclave.popen([compiled("rare"), "slow_child"], stdin=subprocess.PIPE)
        assert p.stdin and p.stdout and p.stdout.readline() == "there\n"
        children = Path(f"/proc/{p.pid}/task/{p.pid}/children")
        p.stdin.write("\n")
        p.stdin.flush()
        while not (child := children.read_text()):
            pass
        os.kill(int(child), signal.SIGSTOP)
        try:
            p.kill()
            p.wait(10)
            wait_for(lambda child=child: Path(f"/proc/{int(child)}/stat").read_text().split()[2] == "T", 10, "it is not stopped")  # fmt: skip
            assert "sylvie-ram" in Path(f"/proc/{int(child)}/maps").read_text(), "it had copied"
            time.sleep(0.5 if ends else 11)
            frames = enclave.status()["frames"]
            assert frames["mapped"] + frames["shared"] >= 128 << 8  # (it may have got so far that they are shared)
            noise = enclave.run([sys.executable, "-c", "b = bytearray(b'x' * (150 << 20)); print(len(b))"])
            assert noise.returncode == 0
        finally:
            os.kill(int(child), signal.SIGKILL if ends else signal.SIGCONT)
        assert p.stdout.read() == ("" if ends else "intact\n")
        enclave.idle(5)


def test_stopped_client_is_no_trouble(enclave: Enclave) -> None:
    p = load(enclave, 3)
    time.sleep(0.7)
    os.kill(p.pid, signal.SIGSTOP)
    finished(load(enclave, 1))
    enclave.check()
    os.kill(p.pid, signal.SIGCONT)
    finished(p)


# ---- transactions that must be refused ----


@pytest.fixture
def as_buddy(own_enclave: Enclave) -> Callable[..., list[str]]:
    """``commit_as`` buddy."""
    commit = commit_as(own_enclave, "buddy")
    commit.enclave = own_enclave  # type: ignore[attr-defined]
    return commit


def tables(e: Enclave) -> np.ndarray:
    from bus.runtime import fetch_tables

    return fetch_tables(e.run_dir, lib.SY_C_BUDDY).frames


def test_refused_transactions_change_nothing(as_buddy: Callable[..., list[str]]) -> None:
    e: Enclave = as_buddy.enclave  # type: ignore[attr-defined]
    p = load(e, 20)
    space = wait_for(lambda: [a for a in e.status()["address_spaces"] if a["pid"] == p.pid], 10, "no address space")[0][
        "asid"
    ]
    frames = tables(e)
    free = int(np.flatnonzero(frames["state"].reshape(-1, 1024).min(axis=1) == lib.SY_FRAME_FREE)[-1]) * 1024
    assert (frames["state"][free : free + 1024] == lib.SY_FRAME_FREE).all()
    used = int(np.flatnonzero(frames["state"] == lib.SY_FRAME_MAPPED)[0])
    grant = {"op": lib.SY_OP_GRANT, "asid": space, "pfn": free, "order": 0, "barrier": int(frames["barrier"][free])}
    before = frames[free : free + 1024].copy()
    cases = [
        (grant | {"barrier": grant["barrier"] + 1}, "STALE"),
        (grant | {"pfn": used, "barrier": int(frames["barrier"][used])}, "STALE"),
        (grant | {"asid": 999999}, "NOT_FOUND"),
        (grant | {"order": 10}, "INVALID"),
        (grant | {"order": 9, "pfn": free + 1}, "INVALID"),
        (grant | {"pfn": 0xFFFFFFF0}, "INVALID"),
        (grant | {"op": 77}, "INVALID"),
        (grant | {"op": lib.SY_OP_RECLAIM}, "NOT_PERMITTED"),
        (grant | {"op": lib.SY_OP_FAULT_ORDER}, "NOT_PERMITTED"),
        (grant | {"op": lib.SY_OP_RELEASE}, "NOT_FOUND"),
    ]
    assert as_buddy(*(c for c, _ in cases)) == [r for _, r in cases]
    assert (frames[free : free + 1024] == before).all()
    assert as_buddy(grant) == ["COMPLETE"]
    assert as_buddy(grant) == ["STALE"]  # a replay
    assert frames["state"][free] in (lib.SY_FRAME_GRANTED, lib.SY_FRAME_MAPPED, lib.SY_FRAME_FREE)
    e.check()
    p.kill()
    p.wait(10)
    e.idle()


def test_only_the_component_itself_may_commit(own_enclave: Enclave) -> None:
    from bus.client import Control
    from bus.codec import BusError

    with Control(own_enclave.run_dir, 10, "buddy") as c:
        with pytest.raises(BusError, match=r"HELLO|not buddy"):
            c.exchange({"t": "txn", "name": "buddy"}, np.zeros(1, OP_DTYPE).tobytes())
        with pytest.raises(BusError, match="in the name of nobody, with the key of buddy"):
            c.exchange({"t": "txn", "name": "nobody"}, b"")
        with pytest.raises(BusError, match=rf"ABI 99.*{lib.SY_ABI_VERSION}"):
            c.request({"t": "hello", "name": "buddy", "implementation": "x", "abi": 99, "pid": 1})
        with pytest.raises(BusError):
            c.exchange({"t": "hello"}, b"x" * 100000)
        with pytest.raises(BusError):
            c.exchange({"t": 5, "name": [1]})
    own_enclave.check()
    assert own_enclave.component()["state"] == "online"


def test_garbage_on_the_gateways_socket(own_enclave: Enclave) -> None:
    """Truncated, oversized, with wrong descriptors, with another ABI: refused, and everything goes on."""
    path = str(own_enclave.run_dir / "gateway.sock")
    hello = ffi.new("struct sy_hello *", (lib.SY_MAGIC, lib.SY_ABI_VERSION, lib.SY_HELLO_STUB, 0))
    good = bytes(ffi.buffer(hello))
    before = own_enclave.status()["counters"]["bad_hellos"]
    null = os.open("/dev/null", os.O_RDONLY)
    for data, fds in [
        (b"", []),
        (b"x", []),
        (b"x" * 60000, []),
        (good, []),
        (good, [null]),
        (good, [null] * 3),
        (good[:-1], [null]),
        (good[:8] + b"\xff" * 8, []),
    ]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.connect(path)
            s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
            s.settimeout(5)
            answer = s.recv(4096)
            assert not answer or ffi.from_buffer("struct sy_welcome[]", answer)[0].status != lib.SY_W_OK
    os.close(null)
    hello.abi = 77
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(path)
        s.send(bytes(ffi.buffer(hello)))
        welcome = ffi.from_buffer("struct sy_welcome[]", s.recv(4096))[0]
        assert (welcome.status, welcome.abi) == (lib.SY_W_ABI, lib.SY_ABI_VERSION)
    assert own_enclave.status()["counters"]["bad_hellos"] > before
    assert own_enclave.run(["echo", "fine"]).stdout == "fine\n"
    own_enclave.check()


def test_tables_are_for_components_only(own_enclave: Enclave) -> None:
    """Another user gets no tables, and nobody can reopen them for writing."""
    from bus.codec import BusError
    from bus.runtime import fetch_tables

    pid = os.fork()
    if pid == 0:
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
        try:
            fetch_tables(own_enclave.run_dir, lib.SY_C_BUDDY)
        except BusError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # As buddy itself: it has the descriptors, read-only, and cannot make more of them.
    code = """
import array, ctypes, os, socket, sys
from kernel.abi import ffi, lib
hello = ffi.new("struct sy_hello *", (lib.SY_MAGIC, lib.SY_ABI_VERSION, lib.SY_HELLO_COMPONENT, lib.SY_C_BUDDY))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
    s.connect(sys.argv[1])
    s.send(bytes(ffi.buffer(hello)))
    _, fds, _, _ = socket.recv_fds(s, 4096, 8)
uid = lib.SY_COMPONENT_UID_BASE + lib.SY_C_BUDDY
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
for fd in fds:
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_PATH))
    try:
        os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    except PermissionError:
        print("refused", end=" ")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, own_enclave.run_dir / "gateway.sock"],
        cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.stdout == "refused " * 5, done  # header, frames, heat, slots, tasks


# ---- the gateway ----


def test_killed_gateway_leaves_programs_and_shells_running(own_enclave: Enclave) -> None:
    """What runs goes on natively, and so does what is started below it; a new gateway comes up and serves again."""
    e = own_enclave
    script = 'i=0; echo runs; while [ ! -e "$1" ]; do x=$(/bin/ls / | wc -l); i=$((i+1)); done; python=$2; "$python" -c "print(len(bytearray(50<<20)))"; echo shell ok'
    stop = e.run_dir.parent / f"{e.run_dir.name}.stop"
    shell = e.popen(["bash", "-c", script, "x", stop, sys.executable])
    assert shell.stdout and shell.stdout.readline() == "runs\n"
    p = load(e, 6)
    wait_for(lambda: e.status()["frames"]["mapped"] > 1000, 20, "nothing is mapped")
    old = e.gateway_pid()
    os.kill(old, signal.SIGKILL)
    e.successor(old)
    finished(p)
    stop.touch()
    out, _ = shell.communicate(timeout=60)
    stop.unlink()
    assert shell.returncode == 0 and out == "52428800\nshell ok\n", out
    wait_for(lambda: e.component()["state"] == "online", 30, "buddy does not come back")
    assert e.run(["echo", "again"]).stdout == "again\n"
    e.idle()
    e.check()


def test_down_with_a_program_running(root_dir: Path) -> None:
    """Its memory stays; it goes on natively, in every way that it may ask for more."""
    from conftest import bring_up, take_down

    e = bring_up(root_dir / "d", "--ram", "128M")
    code = LOAD.replace(
        "print('ok', n)",
        "import subprocess; print('ok', subprocess.run(['sh', '-c', 'echo 1 | cat'], capture_output=True, text=True).stdout)",
    )
    p = e.popen([sys.executable, "-c", code, "4"])
    wait_for(lambda: e.status()["frames"]["mapped"] > 1000, 20, "nothing is mapped")
    assert "natively" in e.cli("down").stdout
    finished(p)
    take_down(e)
    done = subprocess.run(
        [Path(sys.executable).with_name("sylvie"), "doctor", "--fix", "--json"],
        timeout=30,
        capture_output=True,
        check=False,
    )
    assert b'"fixed": true' in done.stdout or b'"fixed": false' in done.stdout
    assert ROOT.exists()


@contextlib.contextmanager
def stopped_thread(tid: int) -> Iterator[None]:
    """One thread of a program, by ptrace."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(0x4206, tid, None, None) == 0, os.strerror(ctypes.get_errno())  # PTRACE_SEIZE
    assert libc.ptrace(0x4207, tid, None, None) == 0  # PTRACE_INTERRUPT
    os.waitpid(tid, 0x40000000)  # __WALL
    try:
        yield
    finally:
        libc.ptrace(17, tid, None, None)  # PTRACE_DETACH


@pytest.mark.parametrize("killed", [True, False])
def test_very_many_calls_under_way(own_enclave: Enclave, compiled: Compiled, killed: bool) -> None:
    """600 that the stub does not carry out now: all are answered at the end, those that a killed gateway had taken, and those that it had not."""
    p = own_enclave.popen([compiled("rare"), "many_calls"], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout and p.stdout.readline() == "there\n"
        tasks = Path(f"/proc/{p.pid}/task")
        (command_thread,) = [int(t.name) for t in tasks.iterdir() if (t / "syscall").read_text().startswith("449 ")]
        before = own_enclave.status()["counters"]["notifications"]
        with stopped_thread(command_thread):
            p.stdin.write("\n")
            p.stdin.flush()
            wait_for(lambda: own_enclave.status()["counters"]["notifications"] >= before + 512, 20, "no calls come")
            time.sleep(0.2)
            assert own_enclave.status()["counters"]["notifications"] == before + 512  # what the keeper's page holds
            if killed:
                os.kill(own_enclave.gateway_pid(), signal.SIGKILL)
                wait_for(lambda: len(list(tasks.iterdir())) == 4, 20, "calls are not answered")
        assert p.communicate("\n", timeout=20)[0] == "failed: 0\n"
    finally:
        p.kill()
        p.wait(10)
