"""The rings between a stub and the gateway under real concurrency: nothing twice, nothing torn, nothing lost uncounted."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Compiled = Callable[[str], Path]
SLOTS = 8192
CALM = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ring(compiled: Compiled, kind: str, threads: int, amount: int, delay_us: int) -> tuple[int, int]:
    """Runs ring.c, which checks everything itself. The two numbers that it prints."""
    done = subprocess.run(
        [compiled("ring"), kind, str(threads), str(amount), str(delay_us)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (kind, threads, amount, delay_us, done)
    a, b = re.findall(r"\d+", done.stdout)
    return int(a), int(b)


@pytest.mark.parametrize("producers", [1, 2, 4])
def test_channel(compiled: Compiled, producers: int) -> None:
    arrived, lost = ring(compiled, "channel", producers, 300_000, 0)
    assert arrived + lost == producers * 300_000 and arrived >= SLOTS


@pytest.mark.parametrize("producers", [1, 2, 4])
def test_channel_with_room_for_all_loses_nothing(compiled: Compiled, producers: int) -> None:
    assert ring(compiled, "channel", producers, SLOTS // producers, 5000) == (SLOTS, 0)


@pytest.mark.parametrize("producers", [1, 4])
def test_channel_overflows_and_counts(compiled: Compiled, producers: int) -> None:
    arrived, lost = ring(compiled, "channel", producers, 100_000, 20_000)
    assert lost > 0 and arrived + lost == producers * 100_000


@CALM
@given(st.integers(1, 6), st.integers(0, 20_000), st.sampled_from([0, 0, 10, 200, 3000]))
def test_channel_in_any_mixture(compiled: Compiled, producers: int, messages: int, delay_us: int) -> None:
    arrived, lost = ring(compiled, "channel", producers, messages, delay_us)
    assert arrived + lost == producers * messages
    assert lost == 0 or arrived >= SLOTS


@pytest.mark.parametrize("takers", [1, 2])
@pytest.mark.parametrize("delay_us", [0, 50])
def test_magazine(compiled: Compiled, takers: int, delay_us: int) -> None:
    amount = 20_000 if delay_us else 1_000_000
    assert ring(compiled, "magazine", takers, amount, delay_us)[0] == amount


@CALM
@given(st.integers(1, 2), st.integers(0, 20_000), st.sampled_from([0, 0, 1, 100]))
def test_magazine_in_any_mixture(compiled: Compiled, takers: int, blocks: int, delay_us: int) -> None:
    assert ring(compiled, "magazine", takers, blocks, delay_us)[0] == blocks
