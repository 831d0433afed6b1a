"""What the bus accepts and what it refuses, without any process."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import codec
from bus.client import endpoint
from bus.codec import BusError
from bus.policy import Transaction
from bus.topics import MESSAGES, TOPIC_OF, TOPICS, topic_of
from kernel.abi import FRAME_DTYPE, MSG_DTYPE, OP_DTYPE, lib


def test_every_message_of_the_memory_group_has_a_topic() -> None:
    without = {name for name, value in MESSAGES.items() if value >= lib.SY_MSG_MM_NEW and TOPIC_OF[value] == 0}
    assert without == set()
    assert topic_of("PAGE_FREED") == topic_of("FRAMES_TAKEN") == b"frame"
    assert topic_of("MAGAZINE_LOW") == b"pressure"


def test_no_topic_is_the_beginning_of_another() -> None:
    """ZeroMQ subscribes to prefixes."""
    assert not [(a, b) for a in TOPICS for b in TOPICS if a != b and b.startswith(a)]


def test_a_batch_comes_back() -> None:
    events = np.zeros(3, MSG_DTYPE)
    events["pfn"] = [1, 2, 3]
    topic, first, back = codec.decode_batch(codec.encode_batch(b"page", 1 << 40, events))
    assert (topic, first) == (b"page", 1 << 40)
    assert (back == events).all()
    assert not back.flags.writeable


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([b"page", b""], "3 frames, not 2"),
        ([b"page", b"\xc1", b""], "not msgpack"),
        ([b"page", msgpack.packb([1]), b""], "is a list, not a map"),
        ([b"page", msgpack.packb({"n": 1}), b"x" * 40], "'first' is missing"),
        ([b"page", msgpack.packb({"first": "a", "n": 1}), b"x" * 40], "must be int, not str"),
        ([b"page", msgpack.packb({"first": True, "n": 1}), b"x" * 40], "must be int, not bool"),
        ([b"page", msgpack.packb({"first": 0, "n": 2}), b"x" * 40], "2 events take 80 bytes, not 40"),
    ],
)
def test_bad_batches_say_what_is_wrong(frames: list[bytes], why: str) -> None:
    with pytest.raises(BusError, match=why):
        codec.decode_batch(frames)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "positive number"),
        (b"x" * 31, "of 32 bytes, not 31"),
        (b"x" * 32 * (codec.MAX_OPS + 1), f"at most {codec.MAX_OPS}"),
    ],
)
def test_bad_transactions_say_what_is_wrong(raw: bytes, why: str) -> None:
    with pytest.raises(BusError, match=why):
        codec.decode_ops(raw)


@given(st.binary(max_size=200))
def test_unpack_gives_a_map_or_a_bus_error(frame: bytes) -> None:
    with contextlib.suppress(BusError):
        assert isinstance(codec.unpack(frame), dict)


def test_numpy_values_travel_as_plain_ones() -> None:
    header: dict[str, Any] = {"a": np.uint32(7), "b": np.arange(3), 4: 1}  # type: ignore[dict-item]
    assert codec.unpack(codec.pack(header)) == {"a": 7, "b": [0, 1, 2], 4: 1}
    with pytest.raises(TypeError, match="cannot send a set"):
        codec.pack({"a": {1}})


def test_a_long_run_directory_is_named() -> None:
    with pytest.raises(BusError, match="too long"):
        endpoint("/tmp/" + "x" * 120, "txn.ipc")


def test_transaction_takes_the_barrier_when_it_is_decided() -> None:
    frames = np.zeros(64, FRAME_DTYPE)
    frames["barrier"] = np.arange(64) + 100
    txn = Transaction(frames)
    txn.grant(7, [0, 16], 4)
    frames["barrier"] += 1
    txn.reserve(32, 5)
    assert len(txn) == 3
    ops = txn.take()
    assert ops.dtype == OP_DTYPE
    assert ops["barrier"].tolist() == [100, 116, 133]
    assert ops["op"].tolist() == [lib.SY_OP_GRANT, lib.SY_OP_GRANT, lib.SY_OP_RESERVE]
    assert ops["asid"].tolist() == [7, 7, 0]
    assert len(txn) == 0
    with pytest.raises(IndexError):
        txn.release(64, 0)
