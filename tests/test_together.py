"""All memory components at once, under programs of twice the memory: killed together, swapped in turn, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Enclave, module_enclave_of, wait_for
from test_swap import larger_than_memory, natively, swapped

from sylvie.life import implementations

RAM = 48  # MiB
TURNS = {
    "buddy": ["compaction", "next_fit", "buddy"],
    "kswapd": ["mglru", "clock", "random", "two_list"],
    "thp": ["always", "madvise", "adaptive"],
    "autonuma": ["interleave", "tiering", "hinting"],
    "ksm": ["hot_aware", "scan"],
}


# Two nodes, a store, the busiest policy of each component.
BUSY = [x for c, names in TURNS.items() if c != "kswapd" for x in ("-i", f"{c}={names[0] if c != 'ksm' else 'scan'}")]
module_enclave, enclave = module_enclave_of(
    "al", "--ram", f"{RAM}M", "--nodes", "2", "--swap", "256M", *BUSY, patience=30, sound=lambda s: s["swap"]["used"] == 0 and s["frames"]["shared"] == 0
)


def disturb(e: Enclave, turn: int, r: random.Random) -> None:
    """One of: all killed at once; one stopped for a moment; one swapped for another."""
    pids = {c["name"]: c["pid"] for c in e.status()["components"] if c["state"] == "online"}
    with contextlib.suppress(ProcessLookupError):
        if turn % 3 == 0:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
        elif turn % 3 == 1 and pids:
            pid = r.choice(sorted(pids.values()))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(pid, signal.SIGCONT)
        else:
            component = r.choice(sorted(TURNS))
            e.cli("swap", component, r.choice(TURNS[component]))


def ended_under(e: Enclave, p: subprocess.Popen[str], seed: int, least: int) -> str:
    """Its output; components are disturbed until it ends."""
    r, turn = random.Random(seed), 0
    while p.poll() is None:
        disturb(e, turn, r)
        turn += 1
        time.sleep(0.2)
    assert turn >= least
    return p.communicate(timeout=60)[0]


def test_these_are_all() -> None:
    assert {c: sorted(names) for c, names in TURNS.items() if c in ("thp", "autonuma", "ksm")} == {c: implementations(c) for c in ("thp", "autonuma", "ksm")}


@pytest.mark.parametrize("what", ["redis", "sqlite", pytest.param("memtester", marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_programs_of_twice_the_memory(enclave: Enclave, what: str, tmp_path: Path) -> None:
    cmd = larger_than_memory(what, RAM, tmp_path)
    native = subprocess.run(cmd, capture_output=True, text=True, timeout=60).stdout
    p = enclave.popen(cmd, "--ksm")
    out = ended_under(enclave, p, 1, 3)
    assert p.returncode == 0 and (out == native or what == "memtester"), out  # (which writes how far it is)


@pytest.mark.parametrize("what", ["forks", "calls"])
def test_patterns(enclave: Enclave, what: str) -> None:
    before = enclave.status()["counters"]
    p = enclave.popen(swapped(what, mib=2 * RAM), "--ksm")
    assert ended_under(enclave, p, 2, 3) == natively(what, mib=2 * RAM)
    wait_for(lambda: all(c["state"] == "online" for c in enclave.status()["components"]), 20, "not all are back")
    after = enclave.status()["counters"]
    assert after["swapped_in"] > before["swapped_in"]
