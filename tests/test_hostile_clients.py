"""Clients that send nonsense to the gateway's sockets, rings and notifications; real programs beside them notice nothing."""

from __future__ import annotations

import contextlib
import os
import socket
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
