"""Clients that send nonsense to the gateway's sockets, rings and notifications; real programs beside them notice nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Enclave, bring_up, take_down, wait_for
from test_failures import finished, load

from kernel.abi import ffi, lib

Compiled = Callable[[str], Path]


class Raw:
    """A connection to the gateway's socket on which anything can be said."""

    def __init__(self, e: Enclave) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(str(e.run_dir / "gateway.sock"))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.sock, [data], fds)

    def hello(self, kind: int, fds: tuple[int, ...] = (), arg: int = 0) -> None:
        self.say(hello(kind, arg), fds)

    def answer(self) -> int | None:
        """Status of the welcome; None: hung up without one. What came with it is closed."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 4096, 16)
        except ConnectionResetError:
            return None
        for fd in fds:
            os.close(fd)
        return int(ffi.from_buffer("struct sy_welcome[]", data)[0].status) if data else None


def hello(kind: int, arg: int = 0, magic: int = lib.SY_MAGIC, abi: int = lib.SY_ABI_VERSION) -> bytes:
    return bytes(ffi.buffer(ffi.new("struct sy_hello *", (magic, abi, kind, arg))))


def memfd(size: int, flags: int = 0) -> int:
    fd = os.memfd_create("test", flags)
    os.truncate(fd, size)
    return fd


@pytest.fixture(scope="module")
def besieged(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "h", "--ram", "256M")
    yield e
    take_down(e)


@pytest.fixture
def e(besieged: Enclave) -> Iterator[Enclave]:
    """An enclave in which a real program works during the test; gateway and buddy must be the same afterwards, and everything sound."""
    pids = besieged.gateway_pid(), wait_for(lambda: besieged.component()["pid"], 10, "no buddy")
    p = load(besieged, 4)
    wait_for(lambda: besieged.status()["address_spaces"], 10, "the program is not managed")
    yield besieged
    finished(p)
    besieged.idle()
    besieged.check()
    assert (besieged.gateway_pid(), besieged.component()["pid"]) == pids


def refused(e: Enclave) -> int:
    return int(e.status()["counters"]["refused"])


def idle_cpu(e: Enclave, seconds: float = 1) -> float:
    """Share of a CPU that the gateway's server thread uses."""
    gateway = psutil.Process(e.gateway_pid())
    before = {t.id: t.system_time + t.user_time for t in gateway.threads()}
    time.sleep(seconds)
    return max(t.system_time + t.user_time - before.get(t.id, 0) for t in gateway.threads()) / seconds


def test_what_is_not_a_listener_is_refused(e: Enclave) -> None:
    """A pipe with something to read in it would keep the server thread, which has the highest priority, busy for ever."""
    out, into = os.pipe()
    os.write(into, b"x")
    page = memfd(4096)
    try:
        before = refused(e)
        with Raw(e) as raw:
            raw.hello(lib.SY_HELLO_KEEPER, (out, page))
            assert raw.answer() is None
            assert refused(e) == before + 1
            assert idle_cpu(e) < 0.5
    finally:
        for fd in (out, into, page):
            os.close(fd)


# A process under a filter of its own, which holds the listener and so can do what a keeper must not. It asks for the
# notification of getpgid() only.
KEEPER = """
import array, ctypes, fcntl, os, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
class Prog(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_void_p)]
# load nr; equal to getpgid: notify; allow
code = struct.pack("<" + "HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 121, 6, 0, 0, 0x7fc00000, 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(code)
prog = Prog(4, ctypes.addressof(buffer))
libc.prctl(38, 1, 0, 0, 0)
listener = libc.syscall(317, 1, 8, ctypes.byref(prog))
assert listener >= 0, ctypes.get_errno()
gateway = socket.socket(fileno=int(sys.argv[2]))
page = os.memfd_create("page", os.MFD_ALLOW_SEALING)
os.truncate(page, 4096)
def offer():
    socket.send_fds(gateway, [bytes.fromhex(sys.argv[1])], [listener, page])
def call():  # answered by whoever serves the listener
    return threading.Thread(target=libc.getpgid, args=(0,), daemon=True)
"""
SEAL = "fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)\n"


def bad_keeper(e: Enclave, code: str) -> str:
    """Runs KEEPER and code; what it printed."""
    with Raw(e) as raw:
        at = raw.sock.fileno()
        done = subprocess.run(
            [sys.executable, "-c", KEEPER + code, hello(lib.SY_HELLO_KEEPER).hex(), str(at)],
            pass_fds=[at], capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done
    return done.stdout


def test_keeper_whose_page_shrinks_is_refused(e: Enclave) -> None:
    """The gateway writes to that page: it would get SIGBUS."""
    before = refused(e)
    said = bad_keeper(e, "offer(); time.sleep(0.5); os.truncate(page, 0); t = call(); t.start(); t.join(1); print(gateway.recv(9))")
    assert said == "b''\n"
    assert refused(e) == before + 1


def test_notifications_that_somebody_else_takes(e: Enclave) -> None:
    """Between the gateway's being told of a notification and its taking it, the client's own thread takes it: the gateway's would wait."""
    code = SEAL + """
def steal():
    n = ctypes.create_string_buffer(80)
    while True:
        ctypes.memset(n, 0, 80)
        if not libc.ioctl(listener, ctypes.c_ulong(0xc0502100), n):
            r = struct.pack("<QqiI", struct.unpack_from("<Q", n)[0], 0, 0, 1)
            libc.ioctl(listener, ctypes.c_ulong(0xc0182101), r)
offer()
for _ in range(2):
    threading.Thread(target=steal, daemon=True).start()
time.sleep(0.2)
for _ in range(300):
    t = call()
    t.start()
    t.join(5)
    assert not t.is_alive()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:  # does the gateway still serve others?
        s.settimeout(5)
        s.connect(gateway.getpeername())
        s.send(b"nonsense")
        assert s.recv(9) == b""
print("done")
"""
    assert bad_keeper(e, code) == "done\n"


def test_keeper_that_says_something_is_dropped(e: Enclave) -> None:
    """… while it holds the listener still, and notifications come."""
    code = SEAL + "offer(); gateway.send(b'x'); time.sleep(0.3)\nfor _ in range(50): call().start()\ntime.sleep(0.5)\nprint(gateway.recv(9))"
    assert bad_keeper(e, code) == "b''\n"
    assert idle_cpu(e) < 0.5
