"""``sylvie run``: becomes the program. Standard library only: this is in the way of every start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import NoReturn

NATIVE = Path(__file__).resolve().parent.parent / "kernel" / "native"
EM_X86_64, PT_INTERP = 62, 3


def why_native(program: Path, depth: int = 0) -> str | None:
    """Why a program cannot be managed (static, setuid, another architecture), or None when it can.

    Scripts are judged by their interpreter.
    """
    info = program.stat()
    if info.st_mode & (stat.S_ISUID | stat.S_ISGID) and os.geteuid() != 0:
        return "is setuid or setgid"
    if info.st_mode & (stat.S_ISUID | stat.S_ISGID) and info.st_uid != os.geteuid():
        return "is setuid or setgid"
    with open(program, "rb") as f:
        head = f.read(4096)
    if head[:2] == b"#!" and depth < 4:
        words = head[2:].split(b"\n", 1)[0].split()
        interpreter = Path(os.fsdecode(words[0])) if words else program
        if interpreter.name == "env" and len(words) > 1 and (found := shutil.which(os.fsdecode(words[-1]))):
            interpreter = Path(found)
        return why_native(interpreter, depth + 1) if interpreter.exists() else None
    if head[:4] != b"\x7fELF":
        return None  # exec decides
    if head[4] != 2 or struct.unpack_from("<H", head, 18)[0] != EM_X86_64:
        return "is not an x86-64 program"
    phoff, entry, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
    for i in range(count):
        at = phoff + i * entry
        if at + 4 <= len(head) and struct.unpack_from("<I", head, at)[0] == PT_INTERP:
            return None
    return "is statically linked"


LEAST_LIMIT = 1024  # SY_LEAST_LIMIT


def run(run_dir: Path, command: list[str], limit: int | None = None, overcommit: bool = False, ksm: bool = False, sched: bool = False) -> NoReturn:
    """Replaces this process by ``command``, managed. Exit status 125: Sylvie cannot; 126, 127: as a shell says.

    :param limit: frames that it and all it starts may have together
    :param overcommit: it and what it starts may map more than RAM and swap hold
    :param ksm: all their pages may be merged with equal ones
    :param sched: sched has all their threads
    """
    if limit is not None and not LEAST_LIMIT <= limit < 1 << 32:
        fail("--limit: give a size of at least 4M, such as 128M or 4G", 125)
    if command and command[0] == "--":
        command = command[1:]
    program = command[0] if "/" in command[0] else shutil.which(command[0])
    if not program or not os.path.exists(program):
        fail(f"{command[0]}: command not found", 127)
    if not os.access(program, os.X_OK) or os.path.isdir(program):
        fail(f"{program}: not an executable file", 126)
    gateway = run_dir / "gateway.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(gateway))
        except OSError:
            fail(f"no enclave is up in {run_dir}: start one with `sylvie --run-dir {run_dir} up`", 125)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; the program must not inherit that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if sched and why_native(Path(program)):
        fail(f"{command[0]} {why_native(Path(program))}: start it without Sylvie and give it to `sylvie sched add`", 125)
    if limit and (reason := why_native(Path(program))):
        fail(f"{command[0]} {reason}: it would run natively, and --limit bounds managed memory only", 125)
    if reason := why_native(Path(program)):
        print(f"sylvie: {command[0]} {reason}: it runs natively", file=sys.stderr, flush=True)
        os.execve(program, command, environment())
    if os.geteuid() not in (0, *users(run_dir)):
        if limit or sched:
            fail(f"this enclave is not for user {os.geteuid()} (sylvie up --user): it cannot be limited or scheduled", 125)
        print(
            f"sylvie: this enclave is not for user {os.geteuid()} (sylvie up --user): {command[0]} runs natively",
            file=sys.stderr,
            flush=True,
        )
        os.execve(program, command, environment())
    launcher = NATIVE / "sylvie-launch"
    if not launcher.exists():
        fail("the C parts are not built: run `make setup`", 125)
    options = (["--sched"] if sched else []) + (["--ksm"] if ksm else []) + (["--overcommit"] if overcommit else []) + (["--limit", str(limit)] if limit else [])
    # The launcher executes its last arguments by execvp; the name as given stays argv[0].
    os.execve(
        launcher,
        [str(launcher), str(run_dir), str(NATIVE / "libsylvie.so"), str(NATIVE / "sylvie-keeper"), *options, "--", *command],
        environment(),
    )


def users(run_dir: Path) -> list[int]:
    """Whose programs the gateway admits, beside root's."""
    try:
        return list(json.loads((run_dir / "config.json").read_text()).get("users", []))
    except (OSError, ValueError):
        return []


def environment() -> dict[bytes, bytes]:
    """The environment as it was given to us: in the C locale Python adds LC_CTYPE, which the program must not inherit."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return {name: value for name, eq, value in (e.partition(b"=") for e in entries) if eq}


def fail(message: str, status: int) -> NoReturn:
    """One line on stderr, then exit."""
    print(f"sylvie run: {message}", file=sys.stderr)
    sys.exit(status)
