"""What programs stand on fails: the gateway, supervisord, the run directory, the disk, descriptors (docs/failures.md)."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Enclave, bring_up, take_down, wait_for

Compiled = Callable[[str], Path]

# Kinds of program, by what the gateway does for them: each checks its own data, prints "ok" and ends when the file argv[1] is there.
PYTHON = """
import hashlib, os, random, subprocess, sys, threading
r = random.Random(1)
held = {}
n = 0
def once():
    global n
    n += 1
    k = r.randrange(30)
    if k in held:
        assert hashlib.blake2b(held[k][0]).digest() == held[k][1], "lost"
    b = bytearray(r.randbytes(50)) * r.randrange(1, 30000)
    held[k] = b, hashlib.blake2b(b).digest()
"""
KINDS = {
    "allocates": PYTHON + "while not os.path.exists(sys.argv[1]): once()\nprint('ok')",
    "forks": PYTHON
    + """
while not os.path.exists(sys.argv[1]):
    once()
    pid = os.fork()
    if pid == 0:
        for k in held: assert hashlib.blake2b(held[k][0]).digest() == held[k][1]
        x = bytearray(b"x") * (1 << 20)
        os._exit(0 if x.count(b"x") == 1 << 20 else 3)
    assert os.waitpid(pid, 0)[1] == 0
print('ok')""",
    "starts others": PYTHON
    + """
while not os.path.exists(sys.argv[1]):
    once()
    out = subprocess.run([sys.executable, "-S", "-c", "print(len(bytearray(3 << 20)))"], capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "3145728\\n", ""), out
print('ok')""",
    "threads": PYTHON
    + """
bad = []
def work(seed):
    q = random.Random(seed)
    while not os.path.exists(sys.argv[1]):
        b = bytearray(bytes([seed])) * q.randrange(1, 3 << 20)
        if b.count(seed) != len(b): bad.append(seed)
threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
for t in threads: t.start()
for t in threads: t.join()
print('bad' if bad else 'ok')""",
}
SHELL = 'while [ ! -e "$1" ]; do x=$(/bin/ls / | sort | wc -l); [ "$x" -gt 3 ] || echo bad "$x"; done; echo ok'


def everything(e: Enclave, stop: Path) -> list[subprocess.Popen[str]]:
    """One program of each kind, begun: ``sylvie run`` has become it."""
    programs = [e.popen([sys.executable, "-c", code, stop]) for code in KINDS.values()]
    programs.append(e.popen(["bash", "-c", SHELL, "x", stop]))
    for p in programs:
        wait_for(lambda p=p: str(e.run_dir) not in " ".join(psutil.Process(p.pid).cmdline()), 30, "it does not start")
    return programs


def all_ok(programs: list[subprocess.Popen[str]], stop: Path) -> None:
    stop.touch()
    try:
        outs = [(p.communicate(timeout=90)[0], p.returncode) for p in programs]
    finally:
        stop.unlink()
    assert outs == [("ok\n", 0)] * len(programs)


def family(e: Enclave) -> list[psutil.Process]:
    """supervisord, gateway and components of that run directory."""
    found = []
    for p in psutil.process_iter(["cmdline"]):
        line = p.info["cmdline"] or []
        if str(e.run_dir) in line or str(e.run_dir / "supervisord.conf") in line:
            found.append(p)
    return found


@pytest.mark.alone
def test_gateway_killed_at_any_moment(own_enclave: Enclave, root_dir: Path) -> None:
    """Again and again, under every kind of program: nobody crashes or loses a byte, and the next gateway serves again."""
    e, r = own_enclave, random.Random(11)
    stop = root_dir / "stop-gateway"
    for _ in range(2):
        programs = everything(e, stop)
        time.sleep(r.uniform(0.05, 1.2))
        old = e.gateway_pid()
        os.kill(old, signal.SIGKILL)
        e.successor(old)
        time.sleep(r.uniform(0, 0.5))
        all_ok(programs, stop)
    wait_for(lambda: e.component()["state"] == "online", 30, "buddy does not come back")
    assert e.run([sys.executable, "-c", "print(len(bytearray(20 << 20)))"]).stdout == f"{20 << 20}\n"
    assert e.idle()["counters"]["registered"] > 0
    e.check()


def test_gateway_stopped_for_a_while(own_enclave: Enclave, root_dir: Path) -> None:
    """SIGSTOP for three seconds: programs wait where they must, and go on."""
    stop = root_dir / "stop-stop"
    programs = everything(own_enclave, stop)
    time.sleep(0.5)
    pid = own_enclave.gateway_pid()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)
    all_ok(programs, stop)
    own_enclave.idle()
    own_enclave.check()


def test_supervisord_killed(root_dir: Path) -> None:
    """The enclave goes on, unwatched, and says so; down takes all of it down; up starts anew."""
    e = bring_up(root_dir / "sv", "--ram", "256M")
    stop = root_dir / "stop-supervisord"
    programs = everything(e, stop)
    time.sleep(0.5)
    os.kill(int((e.run_dir / "supervisord.pid").read_text()), signal.SIGKILL)
    assert e.run(["echo", "on"]).stdout == "on\n"
    assert "supervisord is not there" in e.cli("status").stdout
    e.check()
    assert "no supervisord" in e.cli("swap", "buddy", "next_fit", ok=False).stderr
    e.cli("down")
    all_ok(programs, stop)
    assert not family(e) and not e.run_dir.exists()
    e = bring_up(root_dir / "sv", "--ram", "64M")
    assert e.run(["echo", "again"]).stdout == "again\n"
    take_down(e)


def test_run_directory_removed(root_dir: Path) -> None:
    """Nothing can reach the enclave any more: it takes itself down, and programs go on natively."""
    e = bring_up(root_dir / "rd", "--ram", "256M")
    stop = root_dir / "stop-run-dir"
    programs = everything(e, stop)
    time.sleep(0.5)
    before = family(e)
    assert len(before) >= 3
    shutil.rmtree(e.run_dir)
    wait_for(lambda: not family(e), 30, "processes are left")
    time.sleep(0.5)
    all_ok(programs, stop)
    assert "no enclave is up" in e.cli("status", ok=False).stderr
    assert not family(e)


@pytest.fixture
def small_disk(root_dir: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = root_dir / "full"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0755", "tmpfs", disk], check=True, timeout=10)
    yield disk
    take_down(Enclave(disk / "r"))
    subprocess.run(["umount", disk], check=True, timeout=10)
    disk.rmdir()


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    try:
        with path.open("wb", buffering=0) as f:
            while True:
                f.write(b"x" * 512)
    except OSError:
        pass


def test_disk_full(small_disk: Path, root_dir: Path) -> None:
    """With no room for a byte of log: programs, a restart of a component and check work; what needs room says so."""
    e = Enclave(small_disk / "r")
    fill(small_disk / "full")
    done = e.cli("up", "--ram", "64M", ok=False)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert not family(e)
    (small_disk / "full").unlink()

    e = bring_up(small_disk / "r", "--ram", "256M")
    fill(small_disk / "full")
    stop = root_dir / "stop-disk"
    programs = everything(e, stop)
    old = e.component()["pid"]
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: (c := e.component())["state"] == "online" and c["pid"] != old, 30, "buddy does not come back")
    done = e.cli("swap", "buddy", "next_fit", ok=False)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert e.component()["implementation"] == "buddy"
    all_ok(programs, stop)
    e.idle()
    e.check()
    e.cli("down")
    assert not family(e) and [p.name for p in small_disk.iterdir()] == ["full"]


def test_descriptors_exhausted(own_enclave: Enclave) -> None:
    """A gateway that may open no more: programs that it cannot take run natively; the server thread does not spin."""
    e = own_enclave
    pid = e.gateway_pid()
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, limit[1]))
    cmd = [
        sys.executable,
        "-c",
        "import sys; print(len(bytearray(3 << 20)), flush=True); sys.stdin.read(); print('end')",
    ]
    programs = [e.popen(cmd, stdin=subprocess.PIPE) for _ in range(12)]
    assert [p.stdout.readline() for p in programs if p.stdout] == ["3145728\n"] * 12
    cpu = psutil.Process(pid).cpu_times()
    time.sleep(1)
    after = psutil.Process(pid).cpu_times()
    assert (after.user + after.system) - (cpu.user + cpu.system) < 0.8
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    assert [p.communicate(timeout=30)[0] for p in programs] == ["end\n"] * 12
    s = e.idle()
    assert 0 < s["counters"]["registered"] < 12
    assert e.run([sys.executable, "-c", "print(len(bytearray(3 << 20)))"]).stdout == "3145728\n"
    assert e.idle()["counters"]["registered"] > s["counters"]["registered"]
    e.check()


def test_memory_exhausted(own_enclave: Enclave, root_dir: Path) -> None:
    """A gateway that gets no more memory: what it cannot take runs natively; if it dies of it, the next one serves."""
    e = own_enclave
    stop = root_dir / "stop-memory"
    programs = everything(e, stop)
    time.sleep(0.3)
    pid = e.gateway_pid()
    limit = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + (1 << 20), limit[1]))
    programs += everything(e, stop)
    time.sleep(1)
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_AS, limit)
    all_ok(programs, stop)
    e.successor()
    wait_for(lambda: e.component()["state"] == "online", 30, "buddy does not come back")
    registered = e.idle()["counters"]["registered"]
    assert e.run([sys.executable, "-c", "print(len(bytearray(3 << 20)))"]).stdout == "3145728\n"
    assert e.idle()["counters"]["registered"] > registered
    e.check()
