"""What a program may map in all: RAM and swap, counted as Linux does with vm.overcommit_memory=2, unless --overcommit."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import Enclave, bring_up, module_enclave_of, take_down
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOT = 256  # pages
SLOTS = 96
LIMIT = (32 + 16) * 256  # pages
RW, NORESERVE, MAYMOVE, FIXED, DONTUNMAP = mmap.PROT_READ | mmap.PROT_WRITE, 0x4000, 1, 2, 4


# A touch is a page.
module_enclave, enclave = module_enclave_of("oc", "--ram", "32M", "--swap", "16M", prepare=lambda e: e.request(t="fault_order", asid=0, order=0, max_order=0))


class Commit:
    """tests/programs/commit.c, and what it has committed according to its stub."""

    def __init__(self, e: Enclave, program: Path, *options: str) -> None:
        self.e = e
        self.p = e.popen([program], *options, stdin=subprocess.PIPE)
        self("u", 0, 1)  # it has joined

    def __call__(self, op: str, *args: int) -> int:
        assert self.p.stdin and self.p.stdout
        print(op, *args, file=self.p.stdin, flush=True)
        return int(self.p.stdout.readline())

    def committed(self) -> int:
        return next(int(a["committed"]) for a in self.e.status()["address_spaces"] if a["pid"] == self.p.pid)

    def end(self) -> None:
        self.p.communicate(timeout=20)
        assert self.p.returncode == 0


@pytest.fixture
def program(enclave: Enclave, compiled: Callable[[str], Path]) -> Iterator[Commit]:
    p = Commit(enclave, compiled("commit"))
    yield p
    p.end()


@dataclass(frozen=True)
class Slot:
    """Pages of one mapping: the first of them, which is what is touched, and the others."""

    prot: int
    exempt: bool
    first: bool  # charged
    rest: bool
    touched: bool = False

    def charged(self) -> int:
        return self.first + (SLOT - 1) * self.rest

    def protected(self, prot: int) -> Slot:
        if prot & 2:
            return replace(self, prot=prot, first=not self.exempt, rest=not self.exempt)
        return replace(self, prot=prot, first=self.first and self.touched, rest=False)


class Model:
    def __init__(self) -> None:
        self.slot: dict[int, Slot] = {}

    def charged(self) -> int:
        return sum(s.charged() for s in self.slot.values())

    def after(self, op: str, args: tuple[int, ...], limit: int) -> tuple[int, dict[int, Slot]]:
        """errno and the slots afterwards; nothing changes where it fails."""
        at, n = args[0], args[1] if len(args) > 1 else 1
        here = {i: self.slot[i] for i in range(at, at + n) if i in self.slot}
        whole = len(here) == n
        new = dict(self.slot)
        if op == "m":
            counts = bool(args[2] & 2 and not args[3])
            new |= {i: Slot(args[2], bool(args[3]), counts, counts) for i in range(at, at + n)}
        elif op == "u":
            for i in here:
                del new[i]
        elif op == "p":
            if not whole:
                return errno.ENOMEM, self.slot
            new |= {i: s.protected(args[2]) for i, s in here.items()}
        elif op == "t":
            new[at] = replace(here[at], touched=True)
        else:
            to, m, flags = args[2:]
            if not whole or len({s.prot for s in here.values()}) > 1:
                return errno.EFAULT, self.slot
            if not flags & MAYMOVE and any(i in self.slot for i in range(at + n, at + m)):
                return errno.ENOMEM, self.slot
            if not flags & FIXED:
                to = at
            elif at < to + m and to < at + n:
                return errno.EINVAL, self.slot
            last = here[at + n - 1]
            more = Slot(last.prot, last.exempt, last.rest, last.rest)
            moved = {to + i: here[at + i] if i < n else more for i in range(m)}
            for i in range(at, at + n) if to != at else range(at + m, at + n):
                if not flags & DONTUNMAP:
                    del new[i]
                else:
                    new[i] = replace(new[i], touched=False)
            new |= moved
        after = sum(s.charged() for s in new.values())
        return (errno.ENOMEM, self.slot) if after > max(limit, self.charged()) else (0, new)


slots = st.integers(0, SLOTS - 1)
sizes = st.integers(1, 40)
calls = st.one_of(
    st.tuples(st.just("m"), slots, sizes, st.sampled_from([0, 1, RW, RW]), st.sampled_from([0, 0, NORESERVE])),
    st.tuples(st.just("u"), slots, sizes),
    st.tuples(st.just("p"), slots, sizes, st.sampled_from([0, 1, RW, RW])),
    st.tuples(st.just("t"), slots),
    st.tuples(st.just("r"), slots, sizes, st.just(-1), sizes, st.just(0)),
    st.tuples(st.just("r"), slots, sizes, slots, sizes, st.just(MAYMOVE | FIXED)),
    st.tuples(st.just("R"), slots, sizes, slots),
)


def test_counts_as_the_model(program: Commit) -> None:
    """Every memory call, split and merged: what it answers, and what is committed afterwards."""
    own = program.committed()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls, min_size=5, max_size=30))
    def run(some: list[tuple[str, *tuple[int, ...]]]) -> None:
        assert program("u", 0, 512) == 0
        model = Model()
        for op, *args in some:
            if op == "R":
                op, args = "r", [*args, args[1], MAYMOVE | FIXED | DONTUNMAP]
            if op == "t" and not (args[0] in model.slot and model.slot[args[0]].prot & 2):
                continue
            why, model.slot = model.after(op, tuple(args), LIMIT - own)
            assert program(op, *args) == why, (op, args)
            assert program.committed() == own + model.charged(), (op, args)

    run()
    assert program("u", 0, 512) == 0 and program.committed() == own


def test_brk_and_fork(program: Commit) -> None:
    """brk counts; a forked child begins with what its parent has, and its own mappings come on top."""
    own = program.committed()
    assert program("b", 20 * SLOT) == 0 and program.committed() == own + 20 * SLOT
    assert program("b", 49 * SLOT) == errno.ENOMEM and program.committed() == own + 20 * SLOT
    assert program("m", 0, 10, RW, 0) == 0
    assert program("f") == (LIMIT - own) // SLOT - 30
    assert program("b", 0) == 0 and program("u", 0, 10) == 0 and program.committed() == own
    assert program("f") == (LIMIT - own) // SLOT


def test_reservations_are_free(program: Commit) -> None:
    """As Go's runtime or a JVM does it: much without access, writable piece by piece."""
    own = program.committed()
    assert program("m", 0, 500, 0, 0) == 0 and program.committed() == own
    assert program("p", 100, 20, RW) == 0 and program("p", 130, 20, RW) == 0 and program.committed() == own + 40 * SLOT
    assert program("p", 140, 20, RW) == errno.ENOMEM and program.committed() == own + 40 * SLOT
    assert program("p", 100, 20, 0) == 0 and program.committed() == own + 20 * SLOT
    assert program("m", 0, 500, RW, NORESERVE) == 0 and program.committed() == own


def test_overcommit(enclave: Enclave, compiled: Callable[[str], Path], root_dir: Path) -> None:
    """For one program and what it starts; for all of an enclave."""
    p = Commit(enclave, compiled("commit"), "--overcommit")
    assert p("m", 0, 400, RW, 0) == 0 and p.committed() >= 400 * SLOT
    assert p("f") == 512
    p.end()
    code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import mmap; mmap.mmap(-1, 200 << 20, flags=mmap.MAP_PRIVATE)']).returncode)"
    for options, status in ([], 1), (["--overcommit"], 0):
        done = subprocess.run(enclave.command([sys.executable, "-c", code], *options), capture_output=True, text=True, timeout=60)
        assert done.returncode == status and ("Cannot allocate memory" in done.stderr) == bool(status), done
    e = bring_up(root_dir / "oca", "--ram", "32M", "--overcommit")
    try:
        p = Commit(e, compiled("commit"))
        assert p("m", 0, 400, RW, 0) == 0
        p.end()
        e.idle()
        e.check()
    finally:
        take_down(e)
