"""What travels on the bus, and the one place that checks it.

* An event batch is three frames: topic, msgpack ``{"first": sequence number of the first event, "n": count}``, and
``n`` ``struct sy_msg``.
* A request or an answer is one msgpack map, for transactions followed by one frame of ``struct sy_op``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from kernel.abi import MSG_DTYPE, OP_DTYPE

MAX_HEADER = 1 << 20  # bytes; a status answer with thousands of address spaces fits
MAX_OPS = 4096  # operations in one transaction

T = TypeVar("T")


class BusError(Exception):
    """Something on the bus is not what it must be, or an answer said no. The text says what was found.

    :param reason: the kind of refusal, as ``refusals`` in the gateway's status counts it
    """

    def __init__(self, text: str, reason: str = "malformed") -> None:
        super().__init__(text)
        self.reason = reason


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot send a {type(value).__name__} over the bus")


def pack(header: dict[str, Any]) -> bytes:
    """msgpack of a map; NumPy scalars and arrays become plain ones."""
    data: bytes = msgpack.packb(header, default=_plain)
    return data


def unpack(frame: bytes) -> dict[str, Any]:
    """The map in one frame. :raises BusError: too long, not msgpack, not a map."""
    if len(frame) > MAX_HEADER:
        raise BusError(f"a header of {len(frame)} bytes: at most {MAX_HEADER} are accepted", "oversized")
    try:
        header = msgpack.unpackb(frame, strict_map_key=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types for bad input
        raise BusError(f"the header is not msgpack: {error or type(error).__name__}") from None
    if not isinstance(header, dict):
        raise BusError(f"the header is a {type(header).__name__}, not a map")
    return header


def field(header: dict[str, Any], name: str, kind: type[T]) -> T:
    """``header[name]``. :raises BusError: missing, or not a ``kind``."""
    if name not in header:
        raise BusError(f"{name!r} is missing")
    value = header[name]
    # bool is an int to Python, but never a count or a number here
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BusError(f"{name!r} must be {kind.__name__}, not {type(value).__name__}")
    return value


def encode_batch(topic: bytes, first: int, events: NDArray[np.void]) -> list[bytes]:
    """The frames of one batch; ``events`` has shape (n,) and the dtype of ``struct sy_msg``."""
    return [topic, pack({"first": first, "n": len(events)}), events.tobytes()]


def decode_batch(frames: Sequence[bytes]) -> tuple[bytes, int, NDArray[np.void]]:
    """(topic, first sequence number, events). :raises BusError: not a batch."""
    if len(frames) != 3:
        raise BusError(f"a batch has 3 frames, not {len(frames)}")
    topic, head, raw = frames
    header = unpack(head)
    first, count = field(header, "first", int), field(header, "n", int)
    if len(raw) != count * MSG_DTYPE.itemsize:
        raise BusError(f"{count} events take {count * MSG_DTYPE.itemsize} bytes, not {len(raw)}")
    return topic, first, np.frombuffer(raw, MSG_DTYPE)


def decode_ops(raw: bytes) -> NDArray[np.void]:
    """A writable copy of the operations of a transaction. :raises BusError: none, too many, or a piece of one."""
    size = OP_DTYPE.itemsize
    if not raw or len(raw) % size:
        raise BusError(f"a transaction is a positive number of operations of {size} bytes, not {len(raw)} bytes")
    if len(raw) > MAX_OPS * size:
        raise BusError(f"{len(raw) // size} operations: at most {MAX_OPS} in one transaction", "oversized")
    return np.frombuffer(raw, OP_DTYPE).copy()
