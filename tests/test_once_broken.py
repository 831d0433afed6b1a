"""What a review found, each proven by a program: as it is natively now."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Enclave

Compiled = Callable[[str], Path]


WHAT = [
    "trimmed heap", "purged blocks", "large environment", "ignored children", "ids in memory", "replaced mappings", "ranges over both",
    "mappings past libc", "survivor", "bad pointers", "refused calls", "protection keys", "advice to oneself", "refused file", "read-only target",
]  # fmt: skip


@pytest.mark.parametrize("what", WHAT)
def test_once_broken(enclave: Enclave, compiled: Compiled, what: str) -> None:
    cmd = [str(compiled("once_broken")), what]
    native = subprocess.run(cmd, capture_output=True, text=True, timeout=60)
    assert native.returncode == 0 and native.stdout
    managed = enclave.run(cmd, timeout=60)
    assert (managed.returncode, managed.stdout) == (0, native.stdout)
