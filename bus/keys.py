"""Who is who on the bus: a CURVE key pair for the gateway, each component and the operator.

The gateway makes them once for a run directory; they stay over restarts, and go with ``sylvie down``. A secret can be read by
its owner only (a component's own uid; root for the gateway's and the operator's), so whoever speaks with a component's key is
that component. CURVE (http://curvezmq.org) encrypts and authenticates both ends; the gateway answers ZeroMQ's question whose a key is
(ZAP, https://rfc.zeromq.org/spec/27) with the name that every message of that connection then carries.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq
from zmq.utils import z85

from bus.codec import BusError
from kernel.abi import lib, names

COMPONENT_IDS = {name.lower(): value for value, name in names("SY_C_").items() if value != lib.SY_C_NONE}
GATEWAY, OPERATOR = "gateway", "operator"
FOLDER = "keys"


def uid_of(name: str) -> int:
    """The user that a name runs as: root for gateway and operator, for each component one of its own."""
    return int(lib.SY_COMPONENT_UID_BASE + COMPONENT_IDS[name]) if name in COMPONENT_IDS else 0


def make(run_dir: Path) -> None:
    """Makes what is missing in ``run_dir``: ``keys/NAME.secret``, mode 0400, NAME's own, and ``keys/NAME.public``."""
    folder = run_dir / FOLDER
    folder.mkdir(mode=0o755, exist_ok=True)
    for name in (GATEWAY, OPERATOR, *COMPONENT_IDS):
        secret, public = folder / f"{name}.secret", folder / f"{name}.public"
        if secret.exists() and public.exists():
            continue
        secret.unlink(missing_ok=True)
        open_part, secret_part = zmq.curve_keypair()
        # The secret is never readable by anybody else, not for an instant.
        fd = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with open(fd, "wb") as f:
            f.write(secret_part)
            if os.geteuid() == 0:
                os.fchown(fd, uid_of(name), uid_of(name))
        public.write_bytes(open_part)
        public.chmod(0o444)


def remove(run_dir: Path) -> None:
    """Removes the keys of a run directory."""
    folder = run_dir / FOLDER
    for key in [*folder.glob("*.secret"), *folder.glob("*.public")]:
        key.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _read(run_dir: Path, file: str) -> bytes:
    path = run_dir / FOLDER / file
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BusError(f"there is no key {path}: is an enclave up in {run_dir}?") from None
    except PermissionError:
        raise BusError(f"{path} is not for uid {os.geteuid()}: the bus is for its components and for root") from None


def connect_as(socket: zmq.Socket[bytes], run_dir: Path, name: str) -> None:
    """Gives a client socket the key of ``name``. :raises BusError: there is none, or it may not be read"""
    # A handshake that is not finished by then is begun anew, and what was sent meanwhile follows it. ZeroMQ's own patience is 30 s, as long as our
    # commands': twice on a busy machine a command was not answered although the gateway was well.
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.curve_secretkey = _read(run_dir, f"{name}.secret")
    socket.curve_publickey = _read(run_dir, f"{name}.public")
    socket.curve_serverkey = _read(run_dir, f"{GATEWAY}.public")


def serve(socket: zmq.Socket[bytes], run_dir: Path) -> None:
    """Makes a socket of the gateway's ask for keys. ``Zap`` must have begun, or any key would do."""
    socket.curve_secretkey = _read(run_dir, f"{GATEWAY}.secret")
    socket.curve_server = True


class Zap:
    """Answers whose a key is. ``socket`` is to be polled; ``answer`` called when it is readable.

    :param run_dir: with the keys made
    """

    def __init__(self, run_dir: Path) -> None:
        self._name_of = {
            z85.decode(_read(run_dir, f"{name}.public")): name.encode() for name in (OPERATOR, *COMPONENT_IDS)
        }
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Answers all questions that wait."""
        while True:
            try:
                route, _, version, request, _domain, _address, _identity, mechanism, *credentials = (
                    self.socket.recv_multipart(zmq.NOBLOCK)
                )
            except zmq.Again:
                return
            name = self._name_of.get(credentials[0]) if mechanism == b"CURVE" and credentials else None
            status = (b"200", b"OK", name) if name else (b"400", b"this key is nobody's here", b"")
            self.socket.send_multipart([route, b"", version, request, *status, b""])

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()
