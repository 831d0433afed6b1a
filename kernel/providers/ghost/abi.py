"""Layouts and numbers of one ABI version, from ghost.h and ghost84.h or ghost90.h through cffi, and messages made from them.

Nothing is typed twice: sizes and offsets are cffi's, ioctl numbers are computed from them as ``include/uapi/asm-generic/ioctl.h`` of Linux does.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from kernel.providers.ghost.fs import VERSIONS, MessageError, VersionError, listed

HERE = Path(__file__).resolve().parent
DIFFERING = {84: "ghost84.h", 90: "ghost90.h", 91: "ghost90.h"}
_ALIGNED = re.compile(r"struct (\w+) (\{[^{}]*\}) GHOST_ALIGNED\((\d+)\);")

NONE, WRITE, READ = 0, 1, 2  # whether the kernel reads what is passed (WRITE), or writes to it
# Name: direction, number, what is passed. ghost_uapi.h of 84 @8c5d1146, ghost.h of 90 @8a44ebdc and 91 @9ca0a1fb: the same.
IOCTLS: dict[str, tuple[int, int, str]] = {
    "NULL": (NONE, 0, ""),
    "SW_GET_INFO": (READ | WRITE, 1, "ghost_ioc_sw_get_info"),
    "SW_FREE": (WRITE, 2, "ghost_sw_info"),
    "CREATE_QUEUE": (READ | WRITE, 3, "ghost_ioc_create_queue"),
    "ASSOC_QUEUE": (WRITE, 4, "ghost_ioc_assoc_queue"),
    "SET_DEFAULT_QUEUE": (WRITE, 5, "ghost_ioc_set_default_queue"),
    "CONFIG_QUEUE_WAKEUP": (WRITE, 6, "ghost_ioc_config_queue_wakeup"),
    "GET_CPU_TIME": (READ | WRITE, 7, "ghost_ioc_get_cpu_time"),
    "COMMIT_TXN": (WRITE, 8, "ghost_ioc_commit_txn"),
    "SYNC_GROUP_TXN": (WRITE, 9, "ghost_ioc_commit_txn"),
    "TIMERFD_SETTIME": (READ | WRITE, 10, "ghost_ioc_timerfd_settime"),
    "RUN": (WRITE, 11, "ghost_ioc_run"),
}
# Payloads that are not called after their message.
PAYLOADS = {
    "MSG_CPU_TIMER_EXPIRED": "timer",
    "MSG_CPU_AGENT_BLOCKED": "agent_blocked",
    "MSG_CPU_AGENT_WAKEUP": "agent_wakeup",
}


@dataclass(frozen=True)
class Message:
    """One message. ``seqnum``: the barrier of its source (a task's, or the CPU's agent's). ``gtid`` 0, ``cpu`` -1: the payload has none.
    ``fields``: all of the payload by ghOSt's names, ``sw_info.id`` as ``sw_info_id``."""

    type: int
    name: str
    seqnum: int
    gtid: int
    cpu: int
    fields: dict[str, int]


class Abi:
    """One version; ``abi(version)`` has them ready. ``ffi`` makes its structs, ``constants`` has its numbers by ghOSt's names."""

    def __init__(self, version: int) -> None:
        if version not in DIFFERING:
            raise VersionError(f"asked for ghOSt's ABI {version}; Sylvie speaks {listed(VERSIONS)}")
        self.version = version
        text = (HERE / "ghost.h").read_text() + (HERE / DIFFERING[version]).read_text()
        # cffi knows no alignment: the size that it would give is made by room at the end, which is what a compiler does, too.
        self._aligned = {name: int(to) for name, _, to in _ALIGNED.findall(text)}
        self.ffi = cffi.FFI()
        self.ffi.cdef(re.sub(r"^#.*$", "", _ALIGNED.sub(r"struct \1 \2;", text), flags=re.M))
        lib: Any = self.ffi.dlopen(None)
        self.constants: dict[str, int] = {n: getattr(lib, n) for n in dir(lib)}
        states = self.ffi.typeof("enum ghost_txn_state").elements
        self.txn_states: dict[int, str] = {v: n.removeprefix("GHOST_TXN_") for v, n in states.items()}
        self.messages = {v: n for n, v in self.constants.items() if n.startswith("MSG_")}
        self.payloads = {
            v: f"ghost_msg_payload_{PAYLOADS.get(n, n.removeprefix('MSG_').lower())}" for v, n in self.messages.items() if v
        }

    def size(self, struct: str) -> int:
        """Bytes of a struct, as a C compiler has it."""
        align = self._aligned.get(struct, 1)
        return -(-self.ffi.sizeof(f"struct {struct}") // align) * align

    def offsets(self, struct: str) -> dict[str, int]:
        """Field -> bytes from the beginning."""
        return {name: f.offset for name, f in self.ffi.typeof(f"struct {struct}").fields}

    def ioctl(self, name: str) -> int:
        """Number of GHOST_IOC_``name``: direction at bit 30, size at 16, type at 8, number at 0."""
        direction, number, struct = IOCTLS[name]
        return direction << 30 | (self.size(struct) if struct else 0) << 16 | ord("g") << 8 | number

    def dtype(self, struct: str) -> np.dtype[Any]:
        """NumPy's form of a struct of plain numbers."""
        fields = self.ffi.typeof(f"struct {struct}").fields
        return np.dtype({
            "names": [n for n, _ in fields],
            "formats": [f"{'u' if f.type.cname[0] == 'u' else 'i'}{self.ffi.sizeof(f.type)}" for _, f in fields],
            "offsets": [f.offset for _, f in fields],
            "itemsize": self.size(struct),
        })  # fmt: skip

    def message(self, kind: int, seqnum: int, payload: bytes) -> Message:
        """The message that these are; ``payload``: exactly as long as this version's. MessageError if it is not, or the type is unknown."""
        if kind not in self.payloads:
            raise MessageError(f"message of type {kind}: ABI {self.version} has none; is /sys/fs/ghost/version true of this kernel?")
        name, struct = self.messages[kind], self.payloads[kind]
        if len(payload) != (size := self.size(struct)):
            raise MessageError(
                f"{name}: {len(payload)} bytes of payload, ABI {self.version} has {size}; a kernel with changes of its own? Compare its struct {struct}"
            )
        fields = self._numbers(self.ffi.from_buffer(f"struct {struct} *", payload))
        return Message(kind, name, seqnum, fields.get("gtid", 0), fields.get("cpu", -1), fields)

    def _numbers(self, struct: Any, prefix: str = "") -> dict[str, int]:
        out: dict[str, int] = {}
        ctype = self.ffi.typeof(struct)
        for name, field in (ctype.item if ctype.kind == "pointer" else ctype).fields:
            value = getattr(struct, name)
            out |= self._numbers(value, f"{prefix}{name}_") if field.type.kind == "struct" else {prefix + name: value}
        return out


abi = functools.cache(Abi)
