"""An enclave for tests: brought up as a user would, in a run directory of its own, checked and taken down afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernel.host import Host

ROOT = Path(__file__).resolve().parent.parent
SYLVIE = Path(sys.executable).with_name("sylvie")
# What has been ignored stays so in every program that is started: without a terminal (nohup) tests of that signal would mislead.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
PROGRAMS = Path(__file__).resolve().parent / "programs"


# On a machine so many times slower (tests/vm) every wait for something may take so much longer. Where nothing is awaited, time.sleep() stays as it is.
SLOW = float(os.environ.get("SYLVIE_TEST_SLOW", "1"))


def _longer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of subprocess.Popen: its ``timeout``, times SLOW."""

    @functools.wraps(method)
    def with_patience(*args: Any, **kw: Any) -> Any:
        bound = inspect.signature(method).bind(*args, **kw)
        if bound.arguments.get("timeout") is not None:
            bound.arguments["timeout"] *= SLOW
        return method(*bound.args, **bound.kwargs)

    return with_patience


if SLOW != 1:
    for _name in ("communicate", "wait"):
        setattr(subprocess.Popen, _name, _longer(getattr(subprocess.Popen, _name)))


def lock_file(config: pytest.Config) -> Path | None:
    """Shared by the processes that divide the tests among them (pytest-xdist); None: there is only this one."""
    run = getattr(config, "workerinput", {}).get("testrunuid")
    return Path(tempfile.gettempdir(), f"sy-{run}.lock") if run else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Tests marked ``alone`` run while no other does."""
    path = lock_file(item.config)
    if path is None:
        return (yield)
    with path.open("w") as room, path.with_suffix(".door").open("w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits to be alone keeps the others from coming in again
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := lock_file(session.config)) is not None:
        path.unlink(missing_ok=True)
        path.with_suffix(".door").unlink(missing_ok=True)


class Enclave:
    """``sylvie`` on one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def cli(self, *args: str, ok: bool = True, timeout: float = 120, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Any command of sylvie; must succeed unless ok=False."""
        done = subprocess.run(
            [SYLVIE, "--run-dir", self.run_dir, *args], capture_output=True, text=True, timeout=timeout, **kw
        )
        assert not ok or done.returncode == 0, (
            f"sylvie {' '.join(args)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def command(self, cmd: list[Any], *options: str) -> list[str]:
        """The command line that runs cmd managed."""
        return [str(SYLVIE), "--run-dir", str(self.run_dir), "run", *options, "--", *map(str, cmd)]

    def run(self, cmd: list[Any], timeout: float = 120, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Runs cmd managed, to its end."""
        return subprocess.run(self.command(cmd), capture_output=True, text=True, timeout=timeout, **kw)

    def popen(self, cmd: list[Any], *options: str, **kw: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(cmd, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

    def status(self) -> dict[str, Any]:
        """As ``sylvie status --json``, without a process of its own: the tests ask very often."""
        return self.request(t="status")

    def component(self, name: str = "buddy") -> dict[str, Any]:
        return dict(next(c for c in self.status()["components"] if c["name"] == name))

    def supervisorctl(self, *args: str) -> str:
        done = subprocess.run(
            [SYLVIE.with_name("supervisorctl"), "-c", self.run_dir / "supervisord.conf", *args],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done
        return done.stdout

    def gateway_pid(self) -> int:
        return int(self.status()["pid"])

    def successor(self, old: int = 0) -> int:
        """Waits for a gateway that is not ``old``, which may have died; its pid."""

        def serving() -> int:
            # Not in-process: a request to one that is about to die would be waited for.
            done = self.cli("status", "--json", ok=False)
            return int(json.loads(done.stdout)["pid"]) if done.returncode == 0 else 0

        return int(wait_for(lambda: (pid := serving()) != old and pid, 60, "no new gateway"))

    def check(self) -> None:
        """As ``sylvie check``."""
        answer = self.request(t="check")
        assert not answer["violations"], answer["text"]

    def idle(self, timeout: float = 10) -> dict[str, Any]:
        """Waits until no address space is left, then returns the status."""
        return wait_for(lambda: (s := self.status())["address_spaces"] == [] and s, timeout, "address spaces are left")

    def request(self, **request: Any) -> dict[str, Any]:
        from bus.client import Control

        with Control(self.run_dir, 60) as control:
            return control.request(request)


def commit_as(e: Enclave, name: str, **hello: Any) -> Callable[..., list[str]]:
    """Commits operations, a dict of fields each, in the name of a component, which is stopped for that; returns the names of the results."""
    import numpy as np

    from bus.client import Control
    from kernel.abi import OP_DTYPE, lib, names

    e.supervisorctl("stop", name)
    control = Control(e.run_dir, 10, name)
    control.request({"t": "hello", "name": name, "implementation": "test", "abi": lib.SY_ABI_VERSION, "pid": os.getpid()} | hello)
    result = names("SY_R_")

    def commit(*ops: dict[str, int]) -> list[str]:
        a = np.zeros(len(ops), OP_DTYPE)
        for i, op in enumerate(ops):
            for k, v in op.items():
                a[i][k] = v
        _, raw = control.exchange({"t": "txn", "name": name}, a.tobytes())
        return [result[int(r)] for r in np.frombuffer(raw, OP_DTYPE)["result"]]

    return commit


def open_files(directory: str, named: str = "") -> dict[str, int]:
    """Inodes of what a process has open (/proc/PID/fd), by path; what it closes meanwhile is left out."""
    found = {}
    for fd in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            if named in os.readlink(f"{directory}/{fd}"):
                found[f"{directory}/{fd}"] = os.stat(f"{directory}/{fd}").st_ino
    return found


def wait_for(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Polls until condition() is true and returns its value. AssertionError after timeout seconds."""
    deadline = time.monotonic() + timeout * SLOW
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"after {timeout:g} s: {what}"
        time.sleep(0.03 * SLOW)


@pytest.fixture(scope="session")
def root_dir() -> Iterator[Path]:
    """A short-named directory that components can reach (socket names are limited to 107 bytes)."""
    assert os.geteuid() == 0, "the tests bring a real enclave up, which needs root: sudo make test"
    path = Path(tempfile.mkdtemp(prefix="sy-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def bring_up(run_dir: Path, *args: str) -> Enclave:
    e = Enclave(run_dir)
    e.cli("up", "--user", "nobody", *(args or ("--ram", "512M")))
    return e


def take_down(e: Enclave) -> None:
    if (e.run_dir / "config.json").exists():
        e.cli("down")


@pytest.fixture(scope="session")
def session_enclave(root_dir: Path) -> Iterator[Enclave]:
    e = bring_up(root_dir / "s")
    yield e
    take_down(e)
    assert not e.run_dir.exists()


@pytest.fixture
def enclave(session_enclave: Enclave) -> Iterator[Enclave]:
    """The session's enclave; the invariants are checked after every test that used it."""
    yield session_enclave
    session_enclave.idle()
    session_enclave.check()


@pytest.fixture
def own_enclave(root_dir: Path, request: pytest.FixtureRequest) -> Iterator[Enclave]:
    """One for a single test that will hurt it."""
    e = bring_up(root_dir / f"o{os.getpid()}{abs(hash(request.node.name)) % 10000}", "--ram", "256M")
    yield e
    take_down(e)


def module_enclave_of(
    name: str,
    *up: str,
    prepare: Callable[[Enclave], object] | None = None,
    started: list[subprocess.Popen[str]] | None = None,
    patience: float = 10,
    sound: Callable[[dict[str, Any]], bool] = lambda status: True,
) -> tuple[Any, Any]:
    """Two fixtures, to be called ``module_enclave`` and ``enclave``: one for all tests of a module, brought up with these options and prepared; and
    the same, idle within ``patience`` seconds after every test that used it, with its invariants checked, and its status ``sound``. What is in
    ``started`` by then is ended."""

    @pytest.fixture(scope="module")
    def module_enclave(root_dir: Path) -> Iterator[Enclave]:
        e = bring_up(root_dir / name, *up)
        try:
            if prepare:
                prepare(e)
            yield e
        finally:
            take_down(e)

    @pytest.fixture
    def enclave(module_enclave: Enclave) -> Iterator[Enclave]:
        yield module_enclave
        while started:  # of a test that failed
            p = started.pop()
            p.kill()
            p.wait(10)
        s = module_enclave.idle(patience)
        module_enclave.check()
        assert sound(s), s

    return module_enclave, enclave


def compile_program(name: str, target: Path) -> None:
    """tests/programs/NAME.c."""
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-o", target, PROGRAMS / f"{name}.c", "-lpthread", "-ldl", "-llz4"],
        check=True,
        timeout=60,
    )


@pytest.fixture(scope="session")
def compiled(root_dir: Path) -> Callable[[str], Path]:
    """Compiles tests/programs/NAME.c, once."""

    def build(name: str) -> Path:
        target = root_dir / name
        if not target.exists():
            if ready := os.environ.get("SYLVIE_TEST_PROGRAMS"):  # where there is no compiler
                shutil.copy(Path(ready, name), target)
            else:
                compile_program(name, target)
        return target

    return build


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(root_dir: Path) -> Iterator[None]:
    """No process of ours outlives the tests, and the machine's settings are as before."""

    def now() -> dict[str, str]:
        return {s.path: value for s in Host().settings if (value := Host().value(s.path)) is not None}

    before = now()
    # Another enclave may be up, and may still be, or not, when we are done: both are as before.
    without_it = before | Host().pending()
    yield

    def left() -> list[str]:
        lines = (" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
        return [line for line in lines if str(root_dir) in line]

    wait_for(lambda: not left(), 20, f"processes are left: {left()}")


    def restored() -> bool:
        """… or are as another enclave needs them."""
        others = [run_dir for run_dir in Host().holders() if str(root_dir) not in run_dir]
        return bool(others) or now() in (before, without_it)

    with contextlib.suppress(AssertionError):
        wait_for(restored, 20, "not restored")
    assert restored(), f"to be restored: {Host().pending()}; on frames: {Host().on_frames()}"


@pytest.fixture(autouse=True)
def no_program_left_behind(root_dir: Path) -> Iterator[None]:
    """No program of a test outlives it: named at that test, and ended by its pid so that the next ones stand for themselves."""
    yield

    def ours() -> list[int]:
        """Programs of the enclaves below root_dir, as their environment says; others may be up, too."""
        found = []
        for pid in Host().on_frames():
            with contextlib.suppress(OSError):
                if os.fsencode(root_dir) in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found

    try:
        wait_for(lambda: not ours(), 10, "programs on frames are left")
    except AssertionError:
        left = []
        for pid in ours():
            with contextlib.suppress(psutil.Error):
                p = psutil.Process(pid)
                left.append((pid, p.ppid(), p.status(), p.cmdline()))
                p.kill()
        assert not left, f"programs on frames are left: {left}"
