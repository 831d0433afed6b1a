"""Settings of the host that an enclave needs changed: recorded, counted, put back.

``acquire`` and ``release`` are called by each gateway; the first one changes what must change, the last one puts it back,
unless a program still runs whose address space holds frame mappings: with ``vm.max_map_count`` lowered under it, it would
get ENOMEM everywhere. Then the record stays, and a process of its own (``python -m kernel.host``) waits for the program's end
and finishes the job; so does the next ``release`` or ``restore_if_idle`` (``sylvie down``, ``sylvie doctor --fix``). A holder
that died without releasing is recognised by pid and start time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel.abi import lib

__all__ = ["Host", "Setting", "acquire", "later", "release", "restore_if_idle"]


@dataclass(frozen=True)
class Setting:
    """One file under /proc/sys or /sys. ``wanted`` maps what is there to what we need (the same: nothing to change)."""

    path: str
    wanted: Callable[[str], str]


def _at_least(n: int) -> Callable[[str], str]:
    return lambda now: now if int(now) >= n else str(n)


def _shmem(now: str) -> str:
    return now if now in ("always", "within_size", "advise", "force") else "advise"


SETTINGS = (
    # Each block that a program has mapped is a mapping of its own.
    Setting("/proc/sys/vm/max_map_count", _at_least(2_000_000)),
    # RAM files get 2 MiB folios where the gateway asks for them by MADV_HUGEPAGE.
    Setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled", _shmem),
    # A virtual machine's idle CPU looks for work so long (ns) before it halts: waking it by an interrupt takes ten times as long, and a
    # program's faults and the bus are made of wake-ups. 200 µs is Linux's own default (drivers/cpuidle/governors/haltpoll.c).
    Setting("/sys/module/haltpoll/parameters/guest_halt_poll_ns", _at_least(200_000)),
)


@dataclass
class Host:
    """The settings and their record. ``root`` is another place than / for tests.

    :raises OSError: a setting cannot be read or written; nothing is recorded then
    """

    root: Path = Path("/")
    record: Path = Path("/run/sylvie-host.json")
    settings: tuple[Setting, ...] = field(default=SETTINGS)

    def value(self, path: str) -> str | None:
        """What a setting is now; None: this kernel does not have it."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.root / path.lstrip("/")).read_text().strip()
            chosen = re.search(r"\[(\w+)\]", text)  # sysfs marks the choice among several
            return chosen[1] if chosen else text
        return None

    def _write(self, path: str, value: str) -> None:
        (self.root / path.lstrip("/")).write_text(value)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The record under a lock; written back atomically, removed when empty."""
        with contextlib.ExitStack() as undo:
            lock = os.open(
                self.record.parent, os.O_RDONLY | os.O_DIRECTORY
            )  # the directory itself: no file of ours stays
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            state: dict[str, Any] = {"original": {}, "holders": {}}
            with contextlib.suppress(FileNotFoundError, ValueError):
                state = json.loads(self.record.read_text())
            state["holders"] = {k: h for k, h in state["holders"].items() if self._alive(h)}
            yield state
            self._save(state)

    def _save(self, state: dict[str, Any]) -> None:
        if state["original"] or state["holders"]:
            fresh = self.record.with_suffix(".new")
            fresh.write_text(json.dumps(state))
            fresh.chmod(0o600)
            fresh.rename(self.record)
        else:
            self.record.unlink(missing_ok=True)

    def _started(self, pid: int) -> str | None:
        """Start time of a process in clock ticks since boot; tells a reused pid from the old one."""
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return None

    def _alive(self, holder: dict[str, Any]) -> bool:
        return holder["started"] is not None and self._started(int(holder["pid"])) == holder["started"]

    def on_frames(self) -> list[int]:
        """Processes that have frames mapped, whoever serves them."""
        low = f"{lib.SY_ARENA_START:x}"[:4]
        found = []
        for maps in (self.root / "proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError), maps.open() as lines:
                if any(line.startswith(low) and "sylvie-ram" in line for line in lines):
                    found.append(int(maps.parent.name))
        return found

    def _restore(self, state: dict[str, Any]) -> bool:
        if state["holders"] or (state["original"] and self.on_frames()):
            return False
        for path, original in state["original"].items():
            self._write(path, original)
        state["original"] = {}
        return True

    def acquire(self, name: str, pid: int | None = None) -> None:
        """Counts ``name`` (a run directory) in, for as long as process ``pid`` lives, and makes the settings fit."""
        pid = os.getpid() if pid is None else pid
        with self._locked() as state, contextlib.ExitStack() as undo:
            undo.callback(self._save, state | {"original": dict(state["original"])})
            for setting in self.settings:
                now = self.value(setting.path)
                if now is None:  # this kernel has no such knob; doctor tells
                    continue
                if (wanted := setting.wanted(now)) != now:
                    undo.callback(self._write, setting.path, now)  # if a later one fails
                    state["original"].setdefault(setting.path, now)
                    self._save(state)  # before it is changed: we may be killed between the two
                    self._write(setting.path, wanted)
            undo.pop_all()
            state["holders"][name] = {"pid": pid, "started": self._started(pid)}

    def release(self, name: str) -> bool:
        """Counts ``name`` out; True when everything is as it was."""
        with self._locked() as state:
            state["holders"].pop(name, None)
            return self._restore(state)

    def restore_if_idle(self) -> bool:
        """Puts back what crashed holders left; True when nothing of ours remains."""
        if not self.record.exists():
            return True
        with self._locked() as state:
            return self._restore(state)

    def later(self) -> None:
        """Has the rest put back after the end of the last program on frames, by a process that waits for it. While an
        enclave is up there is nothing to wait for: it will be told to release."""
        with self._locked() as state:
            if state["holders"] or not state["original"] or self._alive(state.get("waiter", {"started": None})):
                return
            waiter = subprocess.Popen(
                [sys.executable, "-m", "kernel.host", str(self.root), str(self.record)],
                cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            state["waiter"] = {"pid": waiter.pid, "started": self._started(waiter.pid)}

    def restore_when_idle(self) -> None:
        """What the waiting process does; it ends, too, when there is a holder again."""
        patience = 0.1
        while not self.restore_if_idle():
            with self._locked() as state:
                if state["holders"]:
                    state.pop("waiter", None)  # that is over: who comes after this holder needs a new one
                    return
            patience = min(2 * patience, 60.0)
            with contextlib.ExitStack() as undo:
                ends = select.poll()
                for pid in self.on_frames():
                    with contextlib.suppress(OSError):
                        fd = os.pidfd_open(pid)
                        undo.callback(os.close, fd)
                        ends.register(fd, select.POLLIN)
                ends.poll(patience * 1000)  # until one ends; looking costs reading all its mappings

    def pending(self) -> dict[str, str]:
        """Settings that are changed now: path -> original value."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return dict(json.loads(self.record.read_text())["original"])
        return {}

    def holders(self) -> list[str]:
        """Names of those that are counted in and alive."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return [name for name, h in json.loads(self.record.read_text())["holders"].items() if self._alive(h)]
        return []


def acquire(run_dir: str | Path) -> None:
    """For a gateway: counts this process in. See ``Host.acquire``."""
    Host().acquire(str(run_dir))


def release(run_dir: str | Path) -> None:
    """For a gateway: counts it out; what programs that still run need is put back after their end. See ``Host.release``."""
    if not Host().release(str(run_dir)):
        later()


def restore_if_idle() -> bool:
    """See ``Host.restore_if_idle``."""
    return Host().restore_if_idle()


def later() -> None:
    """See ``Host.later``."""
    Host().later()


if __name__ == "__main__":
    Host(Path(sys.argv[1]), Path(sys.argv[2])).restore_when_idle()
