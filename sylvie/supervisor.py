"""supervisord over its Unix socket."""

from __future__ import annotations

import contextlib
import http.client
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _Connection(self._path)


def nudge(run_dir: Path) -> None:
    """supervisord starts what is to be started, and sees what has ended, once a second or when somebody calls: call."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(1)
        caller.connect(str(run_dir / "supervisor.sock"))


def rpc(run_dir: Path) -> Any:
    """supervisord's ``supervisor`` namespace; its methods raise OSError when it is not there."""
    return xmlrpc.client.ServerProxy(
        "http://localhost", transport=_Transport(str(run_dir / "supervisor.sock"))
    ).supervisor
