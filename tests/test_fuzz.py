"""The gateway's C half under a coverage-guided fuzzer: see tests/fuzz/gateway_fuzz.c for what must hold after each input."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "fuzz" / "run"


def fuzz(*arguments: str, timeout: float) -> str:
    """Runs the fuzzer; what it said. Its sentence about the first failure is in the assertion."""
    done = subprocess.run(
        [RUN, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )
    why = re.findall(r"VIOLATED.*|ERROR.*|SUMMARY.*|.*Test unit written to.*|.*error:.*", done.stderr)
    assert done.returncode == 0, "\n".join(why) or done.stderr[-2000:]
    return done.stderr


def test_everything_found_so_far_again() -> None:
    said = fuzz("replay", timeout=150)
    assert "Done" in said


def test_some_seconds_of_new_inputs() -> None:
    said = fuzz("5", timeout=150)
    assert int(re.findall(r"number_of_executed_units: (\d+)", said)[0]) > 500


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_inputs() -> None:
    said = fuzz("0", "-runs=1000000", "-max_len=128", timeout=3500)
    assert int(re.findall(r"number_of_executed_units: (\d+)", said)[0]) >= 1_000_000
