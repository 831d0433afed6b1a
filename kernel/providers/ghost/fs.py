"""ghostfs: whether this machine has one, which ABI versions it offers, and what went wrong, in words. Needs nothing that must be built.

Sources: google/ghost-userspace ``docs/ghostfs.md`` @1d27035b (mounting, ``version``, ``ctl``) and ``lib/ghost.cc`` @61aa48a7; google/ghost-kernel
``kernel/sched/ghost_core.c`` @e51808ca (``gf_top_version_show``: one number a line).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/ghost")
VERSIONS = (84, 90, 91)  # spoken; the best last
KERNEL = "github.com/google/ghost-kernel"


class GhostError(RuntimeError):
    """What was asked of the kernel, what it answered, and what to do next."""


class NoGhostError(GhostError):
    """This kernel has no ghOSt, or its file system is not mounted."""


class VersionError(GhostError):
    """The kernel speaks none of VERSIONS."""


class NotPermittedError(GhostError):
    """EPERM or EACCES."""


class BusyError(GhostError):
    """EBUSY: CPUs belong to another enclave, or an agent is there already."""


class StaleError(GhostError):
    """ESTALE: decided on a state that is no longer; read the messages, and decide again."""


class GoneError(GhostError):
    """The enclave, the task or the file is no longer there (ENOENT, ENODEV, ESRCH)."""


class RingError(GhostError):
    """A shared region is not what the ABI says; nothing more can be read from it."""


class MessageError(GhostError):
    """One message is not what the ABI says. It has been taken from the queue."""


KINDS: dict[int, tuple[type[GhostError], str]] = {
    errno.EPERM: (NotPermittedError, "needs CAP_SYS_NICE: run as root"),
    errno.EACCES: (NotPermittedError, "run as root, or as the group that the enclave was created for (gid=)"),
    errno.EBUSY: (BusyError, "`cat /sys/fs/ghost/enclave_*/cpulist` shows whose they are; wait, or destroy that enclave"),
    errno.EDEADLK: (GhostError, "an agent's thread must open no file of ghostfs: have another thread do it, or set live_dangerously"),
    errno.ESTALE: (StaleError, "read the queue, and decide again"),
    errno.ENOENT: (GoneError, "it has ended, or the enclave was destroyed"),
    errno.ENODEV: (GoneError, "the enclave was destroyed, or the CPU is not one of its"),
    errno.ESRCH: (GoneError, "no such process or version"),
}


@contextlib.contextmanager
def asking(what: str, advice: str = "") -> Iterator[None]:
    """Turns an OSError of the block into the GhostError that fits, which says ``what`` was asked. ``advice`` replaces the usual one."""
    try:
        yield
    except OSError as e:
        kind, usual = KINDS.get(e.errno or 0, (GhostError, f"`dmesg | grep ghost` may say more; {KERNEL} has the source"))
        code = errno.errorcode.get(e.errno or 0, "?")
        raise kind(f"{what}: {e.strerror or e} ({code}); {advice or usual}") from e


@dataclass(frozen=True)
class State:
    """``kernel``: it knows the file system type. ``versions``: what a mounted one offers; None: not mounted."""

    kernel: bool
    versions: tuple[int, ...] | None

    @property
    def spoken(self) -> int | None:
        """The best version that both sides speak."""
        return max(set(self.versions or ()) & set(VERSIONS), default=None)


def listed(versions: tuple[int, ...]) -> str:
    """``"84, 90 and 91"``."""
    texts = [str(v) for v in versions] or ["none"]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def look(root: Path = ROOT, filesystems: Path = Path("/proc/filesystems")) -> State:
    """What this machine has; asks nothing of ghOSt but its ``version`` file. RingError when that holds no numbers."""
    try:
        known = "ghost" in filesystems.read_text().split()
    except OSError:
        known = False
    try:
        text = (root / "version").read_text()
    except OSError:
        return State(known, None)
    try:
        return State(True, tuple(int(line) for line in text.split()))
    except ValueError as e:
        raise RingError(f"{root}/version: asked for numbers, found {text!r}; is this a ghostfs?") from e


def agree(root: Path = ROOT, filesystems: Path = Path("/proc/filesystems")) -> int:
    """The version to speak with this kernel. NoGhostError, VersionError (which names both sides' versions)."""
    state = look(root, filesystems)
    if state.versions is None:
        if state.kernel:
            raise NoGhostError(f"{root}: ghostfs is not mounted; as root: mount -t ghost ghost {root}")
        raise NoGhostError(f"{root}: this kernel has no ghOSt; boot one built from {KERNEL}, with CONFIG_SCHED_CLASS_GHOST=y")
    if state.spoken is None:
        raise VersionError(
            f"{root}/version: the kernel offers ABI {listed(state.versions)}, Sylvie speaks {listed(VERSIONS)}; boot a ghOSt kernel of one of "
            f"those, or add its layouts beside kernel/providers/ghost/ghost90.h"
        )
    return state.spoken


def mount(root: Path = ROOT) -> None:
    """mount(2) as ghOSt's library does it; mounted already is well, too. NoGhostError (ENODEV), NotPermittedError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"ghost", os.fsencode(root), b"ghost", 0, None) == 0 or (code := ctypes.get_errno()) == errno.EBUSY:
        return
    if code == errno.ENODEV:
        raise NoGhostError(f"mount -t ghost ghost {root}: this kernel has no ghOSt; boot one built from {KERNEL}")
    with asking(f"mount -t ghost ghost {root}"):
        raise OSError(code, os.strerror(code))
