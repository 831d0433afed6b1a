"""The bus for everybody who is not a component: requests to the gateway, and following events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from bus import keys
from bus.codec import BusError, decode_batch, pack, unpack

EVENTS = "events.ipc"
REQUESTS = "txn.ipc"
# Batches that may wait on each side of the bus for one slow subscriber before further ones are dropped (and noticed as
# a gap). At 512 events a batch this bounds the memory one hung component can cost the gateway at about 350 MB.
HIGH_WATER = 16384


def endpoint(run_dir: str | Path, name: str) -> str:
    """The ZeroMQ address of a socket in the run directory. :raises BusError: longer than a Unix socket's name can
    be."""
    path = str(Path(run_dir) / name)
    if len(path.encode()) > 107:
        raise BusError(f"{path} is too long for the name of a socket (107 bytes): choose a shorter run directory")
    return f"ipc://{path}"


class GatewayGone(BusError):
    """No answer in time."""


class Control:
    """Requests to the gateway of ``run_dir``, one at a time; also what a component's runtime asks through.

    :param timeout: seconds to wait for each answer
    :param name: with whose key
    :raises BusError: there is no such key, or it may not be read
    """

    def __init__(self, run_dir: str | Path, timeout: float = 10.0, name: str = keys.OPERATOR) -> None:
        self.run_dir = Path(run_dir)
        self.timeout = timeout
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        keys.connect_as(self._socket, self.run_dir, name)
        self._socket.connect(endpoint(run_dir, REQUESTS))
        self._asked = 0

    def exchange(self, header: dict[str, Any], raw: bytes | None = None) -> tuple[dict[str, Any], bytes]:
        """Sends one request and waits for its answer: (header, raw frame or b"").

        :raises BusError: the answer is "no", with the gateway's reason; GatewayGone: no answer in time
        """
        # Numbered, so that an answer that came after its time-out is not taken for the next one's.
        self._asked += 1
        frames = [pack(header | {"rid": self._asked})]
        self._socket.send_multipart(frames if raw is None else [*frames, raw])
        asked_at = time.monotonic()
        # In pieces: ``timeout`` may be shortened meanwhile, by a signal handler that wants an end.
        while (left := asked_at + self.timeout - time.monotonic()) > 0:
            if not self._socket.poll(int(min(left, 0.2) * 1000) + 1):
                continue
            head, *rest = self._socket.recv_multipart()
            answer = unpack(head)
            if answer.pop("rid", None) != self._asked:
                continue
            if not answer.pop("ok", False):
                raise BusError(str(answer.get("error", "refused without a reason")))
            return answer, rest[0] if rest else b""
        raise GatewayGone(f"no answer from the gateway in {self.run_dir} within {self.timeout:g} s: is it up?")

    def request(self, header: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``{"t": KIND, ...}``; kinds are in ``kernel/gateway.py``. Raises as ``exchange``."""
        return self.exchange(header)[0]

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def subscriber(run_dir: str | Path, topics: list[bytes], name: str = keys.OPERATOR) -> zmq.Socket[bytes]:
    """A socket that receives the batches of these topics; an empty list means all. Raises as ``Control``."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    keys.connect_as(socket, Path(run_dir), name)
    for topic in topics or [b""]:
        socket.subscribe(topic)
    socket.connect(endpoint(run_dir, EVENTS))
    return socket


def subscribe(
    run_dir: str | Path, topic: bytes | str = b"", timeout: float | None = None
) -> Iterator[tuple[bytes, int, NDArray[np.void]]]:
    """Follows a topic (all by default): yields (topic, sequence number of the first event, events of shape (n,)).

    :param timeout: end after so many seconds without a batch; ``None``: never
    """
    with subscriber(run_dir, [topic.encode() if isinstance(topic, str) else topic]) as socket:
        while socket.poll(None if timeout is None else int(timeout * 1000)):
            batch = decode_batch(socket.recv_multipart())
            if len(batch[2]):  # empty ones only carry the sequence number
                yield batch
