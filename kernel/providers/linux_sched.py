"""Scheduling events of a stock kernel: where its sched tracepoints are and what their records look like.

The records are read in C (``kernel/native/gateway_sched.h``); their layout differs from kernel to kernel, so it is asked for here, once, from tracefs
(``Documentation/trace/events.rst``). tracefs is mounted for nobody but us: by a descriptor, at no place in the file system.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

from kernel.abi import ffi

__all__ = ["tracepoints"]

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # asm/unistd_64.h
_CREATE = 6  # FSCONFIG_CMD_CREATE
# Calls after which a thread's attributes may be others.
CALLS = (
    "sched_setaffinity", "sched_getaffinity", "sched_setscheduler", "sched_getscheduler", "sched_setparam", "sched_getparam", "sched_setattr", "sched_getattr",
    "setpriority",
)  # fmt: skip


class NoTracepoints(OSError):
    """What this kernel lacks; says what it is for."""


def _tracefs() -> int:
    """A descriptor of a tracefs of our own. :raises OSError: not allowed, or the kernel has none."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: Any) -> int:
        result: int = libc.syscall(number, *arguments)
        if result < 0:
            raise NoTracepoints(ctypes.get_errno(), f"tracefs cannot be mounted ({os.strerror(ctypes.get_errno())}): sched needs root and CONFIG_TRACING")
        return result

    fs = call(_FSOPEN, b"tracefs", 1)
    try:
        call(_FSCONFIG, fs, _CREATE, None, None, 0)
        return call(_FSMOUNT, fs, 1, 0)
    finally:
        os.close(fs)


def _read(root: int, path: str) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=root)) as file:
        return file.read()


def offsets(text: str) -> dict[str, int]:
    """Field → offset in bytes, from an event's ``format``."""
    return {name: int(at) for name, at in re.findall(r"field:[^;]*?(\w+)(?:\[\d*\])?;\s*offset:(\d+);", text)}


def tracepoints() -> Any:
    """``struct sy_tracepoints`` of the running kernel. :raises OSError: it lacks one that cannot be done without."""
    root = _tracefs()
    try:

        def event(name: str, needed: bool = True, group: str = "sched") -> tuple[int, dict[str, int]]:
            try:
                return int(_read(root, f"events/{group}/{name}/id")), offsets(_read(root, f"events/{group}/{name}/format"))
            except FileNotFoundError:
                if needed:
                    raise NoTracepoints(2, f"this kernel has no tracepoint {group}:{name}, which sched needs") from None
                return -1, {}

        switch, wakeup, new = event("sched_switch"), event("sched_wakeup"), event("sched_wakeup_new")
        fork, execute, leave = event("sched_process_fork"), event("sched_process_exec"), event("sched_process_exit")
        migrate = event("sched_migrate_task")
        calls = [number for name in CALLS if (number := event(f"sys_exit_{name}", False, "syscalls")[0]) >= 0]
        return ffi.new("struct sy_tracepoints *", {
            "switch_id": switch[0], "prev_pid": switch[1]["prev_pid"], "prev_state": switch[1]["prev_state"],
            "next_pid": switch[1]["next_pid"], "next_prio": switch[1]["next_prio"],
            "wakeup_id": wakeup[0], "wakeup_new_id": new[0], "wake_pid": wakeup[1]["pid"], "wake_cpu": wakeup[1]["target_cpu"],
            "fork_id": fork[0], "parent_pid": fork[1]["parent_pid"], "child_pid": fork[1]["child_pid"],
            "exec_id": execute[0], "exec_pid": execute[1]["pid"], "exec_old_pid": execute[1]["old_pid"],
            "exit_id": leave[0], "exit_pid": leave[1]["pid"],
            "migrate_id": migrate[0], "migrate_pid": migrate[1]["pid"], "migrate_cpu": migrate[1]["dest_cpu"],
            "yield_id": event("sys_enter_sched_yield", False, "syscalls")[0],
            "ncalls": len(calls), "call_id": calls,
        })  # fmt: skip
    finally:
        os.close(root)
