"""What this machine offers, what is missing, and how to get it. Everything is tried, not guessed from version numbers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# linux/userfaultfd.h, asm/unistd_64.h, linux/seccomp.h: Python has no names for them.
NR_USERFAULTFD, NR_SECCOMP = 323, 317
UFFD_API, UFFDIO_API = 0xAA, 0xC018AA3F
UFFD_FEATURES = {
    "missing on shmem": 1 << 5,
    "minor on shmem": 1 << 10,
    "write-protect on shmem": 1 << 12,
    "events of fork": 1 << 1,
    "thread id": 1 << 8,
}
SECCOMP_GET_ACTION_AVAIL, SECCOMP_RET_USER_NOTIF = 2, 0x7FC00000


@dataclass
class Finding:
    """One line: ``ok`` None = missing, but nothing needs it now."""

    what: str
    ok: bool | None
    found: str
    advice: str = ""
    essential: bool = False


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def userfaultfd() -> Finding:
    """Asks the kernel through UFFDIO_API."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC)
    if fd < 0:
        code = errno.errorcode.get(ctypes.get_errno(), "?")
        return Finding("userfaultfd", False, code, "run as root, and on a kernel with CONFIG_USERFAULTFD", True)
    try:
        answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, 0, 0))
    except OSError as e:
        return Finding("userfaultfd", False, str(e), "a kernel of 6.1 or newer", True)
    finally:
        os.close(fd)
    features = struct.unpack("<QQQ", answer)[1]
    lacking = [name for name, bit in UFFD_FEATURES.items() if not features & bit]
    found = "all of: " + ", ".join(UFFD_FEATURES) if not lacking else "lacks " + ", ".join(lacking)
    return Finding("userfaultfd", not lacking, found, "a kernel of 6.1 or newer" if lacking else "", True)


def seccomp() -> Finding:
    """Asks whether filters may notify user space."""
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(SECCOMP_RET_USER_NOTIF)
    ok = libc.syscall(NR_SECCOMP, SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
    return Finding(
        "seccomp user notification",
        ok,
        "available" if ok else "not available",
        "" if ok else "a kernel with CONFIG_SECCOMP_FILTER",
        True,
    )


def access_information(root: Path = Path("/")) -> list[Finding]:
    """Which source the access monitor uses, and why not the better ones."""
    try:
        from kernel.heat import sources
    except ImportError:  # the C parts are not built
        return []
    found = sources(root)
    used = next(name for name, why in found if why is None)
    names = {"damon": "DAMON", "page_idle": "page_idle", "hint": "hint faults"}
    out = [Finding("access information", True, f"from {names[used]}")]
    for name, why in found:
        here = "used" if name == used else f"there; {names[used]} comes first"
        out.append(Finding(names[name], True if why is None else None, why or here))
    return out


def tracepoints() -> Finding:
    """Whether sched can read what the kernel's own scheduler does."""
    try:
        from kernel.providers.linux_sched import tracepoints as found
    except ImportError:  # the C parts are not built
        return Finding("tracepoints", None, "not looked for", "make setup")
    try:
        calls = found().ncalls
    except OSError as e:
        return Finding("tracepoints", None, e.strerror or str(e), "without them sched has no threads")
    if not calls:
        return Finding("tracepoints", True, "of sched; none of system calls", "CONFIG_FTRACE_SYSCALLS: without it TASK_YIELD is never sent")
    return Finding("tracepoints", True, "of sched and system calls")


def real_time(root: Path = Path("/")) -> Finding:
    """Whether SCHED_FIFO may be used here, and what it leaves to others. With CONFIG_RT_GROUP_SCHED a cgroup (v1) has its own share, which is 0 unless somebody gave it some:
    SCHED_FIFO is EPERM there, also for root (Documentation/scheduler/sched-rt-group.rst)."""
    groups = _read(str(root / "proc/self/cgroup")) or ""
    mine = next((line.split(":", 2)[2] for line in groups.splitlines() if "cpu" in line.split(":", 2)[1].split(",")), None)
    for at in ("cpu", "cpu,cpuacct", "cpuacct,cpu") if mine is not None else ():
        share = _read(f"{root}/sys/fs/cgroup/{at}{mine}/cpu.rt_runtime_us")
        if share is not None and int(share) == 0:
            return Finding("real-time priorities", None, f"cpu.rt_runtime_us of {mine} is 0", f"sched, and service threads, need some: echo 950000 > /sys/fs/cgroup/{at}{mine}/cpu.rt_runtime_us")
    runtime, period = (int(_read(f"{root}/proc/sys/kernel/sched_rt_{name}_us") or default) for name, default in (("runtime", -1), ("period", 1_000_000)))
    if runtime < 0:
        return Finding("real-time priorities", True, "not limited", "sysctl kernel.sched_rt_runtime_us=950000: or a thread that sched chose, and that never stops, can lock everybody out")
    return Finding("real-time priorities", True, f"may have {100 * runtime // period} % of a CPU, the rest is for others")


def ghost(root: Path = Path("/")) -> Finding:
    """Whether the kernel is ghOSt's, and of a version that Sylvie speaks."""
    from kernel.providers.ghost import fs

    where, known = root / "sys/fs/ghost", fs.listed(fs.VERSIONS)
    try:
        state = fs.look(where, root / "proc/filesystems")
    except fs.RingError as e:
        return Finding("ghOSt", False, str(e), f"Sylvie speaks ABI {known}")
    if state.versions is None:
        if state.kernel:
            return Finding("ghOSt", None, "no ghostfs mounted", f"mount -t ghost ghost {where} (as root)")
        return Finding("ghOSt", None, "no ghostfs", f"only needed to schedule by a ghOSt kernel: {fs.KERNEL}, ABI {known}")
    if state.spoken is None:
        found = f"version {fs.listed(state.versions)}, not spoken"
        return Finding("ghOSt", False, found, f"Sylvie speaks ABI {known}: boot a ghOSt kernel of one of those")
    return Finding("ghOSt", True, f"version {state.spoken}, spoken (the kernel offers {fs.listed(state.versions)})")


def findings() -> list[Finding]:
    """Everything, essentials first."""
    import psutil

    from sylvie.life import ROOT

    machine, kernel = platform.machine(), platform.release()
    version = tuple(int(x) for x in kernel.split("-")[0].split(".")[:2])
    built = (ROOT / "kernel" / "native" / "libsylvie.so").exists()
    libc = platform.libc_ver()
    out = [
        Finding(
            "machine", machine == "x86_64", machine, "" if machine == "x86_64" else "Sylvie knows x86-64 only", True
        ),
        Finding("kernel", version >= (6, 1), kernel, "" if version >= (6, 1) else "Linux 6.1 or newer", True),
        Finding(
            "C library", libc[0] == "glibc", " ".join(libc), "" if libc[0] == "glibc" else "a system with glibc", True
        ),
        Finding(
            "root",
            os.geteuid() == 0,
            f"uid {os.geteuid()}",
            "" if os.geteuid() == 0 else "run `sylvie up` with sudo",
            True,
        ),
        userfaultfd(),
        seccomp(),
        Finding("C parts", built, "built" if built else "not built", "" if built else "make setup", True),
    ]
    dev = os.path.exists("/dev/userfaultfd")
    out.append(
        Finding(
            "/dev/userfaultfd",
            dev or None,
            "there" if dev else "not there",
            "" if dev else "without it, programs of ordinary users run natively",
        )
    )
    gcc = shutil.which("gcc")
    out.append(
        Finding(
            "gcc",
            bool(gcc) or None,
            gcc or "not installed",
            "" if gcc else "apt-get install gcc (only to rebuild the C parts)",
        )
    )
    knob = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    thp = _read(knob)
    out.append(
        Finding(
            "huge pages for RAM files",
            thp is not None,
            thp or "no knob",
            "" if thp else "CONFIG_TRANSPARENT_HUGEPAGE: without it, every frame is mapped singly",
        )
    )
    maps = _read("/proc/sys/vm/max_map_count")
    out.append(Finding("vm.max_map_count", True, f"{maps} (raised to 2,000,000 while an enclave is up)"))
    poll = _read("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
    governor = _read("/sys/devices/system/cpu/cpuidle/current_governor")
    in_use = poll is not None and governor == "haltpoll"
    out.append(
        Finding(
            "guest_halt_poll_ns",
            True if in_use else None,
            f"{poll} (raised to 200,000 while an enclave is up)" if in_use else "not in use",
            "" if in_use else "on a virtual machine, waking a CPU is dearer without it (cpuidle governor haltpoll)",
        )
    )
    memory = psutil.virtual_memory()
    out.append(Finding("memory", True, f"{memory.total >> 20} MiB, {memory.available >> 20} MiB available"))
    out.append(Finding("CPUs", True, str(os.cpu_count())))
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    out.append(
        Finding(
            "NUMA nodes",
            True,
            str(max(1, nodes)),
            "" if nodes > 1 else "sylvie up --nodes 2 divides RAM in two for trying things",
        )
    )

    def optional(what: str, path: str, advice: str, test: Callable[[str], bool] = os.path.exists) -> None:
        there = test(path)
        out.append(Finding(what, True if there else None, path if there else "not there", "" if there else advice))

    out.extend(access_information())
    optional("pressure (PSI)", "/proc/pressure/memory", "boot with psi=1")
    out.append(tracepoints())
    out.append(real_time())
    out.append(ghost())
    optional("cgroup memory controller", "/sys/fs/cgroup/memory", "only needed to measure against native limits")
    from kernel.host import Host

    try:
        left = ", ".join(f"{p} (was {v})" for p, v in Host().pending().items())
    except PermissionError:  # there are some: an enclave is up, or was
        left = "some, which root may read"
    out.append(
        Finding(
            "settings changed by Sylvie",
            True,
            left or "none",
            "sylvie doctor --fix puts them back if no enclave is up" if left else "",
        )
    )
    return out


def essentials() -> list[str]:
    """What is essential and missing, one sentence each."""
    return [f"{f.what}: {f.found} ({f.advice})" for f in findings() if f.essential and not f.ok]


def doctor(as_json: bool, fix: bool) -> None:
    """Prints the findings; exit status 1 when something essential is missing."""
    fixed = None
    if fix:
        from kernel.host import restore_if_idle

        fixed = restore_if_idle()
    found = findings()
    bad = [f for f in found if f.essential and not f.ok]
    if as_json:
        print(
            json.dumps(
                {"ok": not bad, "findings": [asdict(f) for f in found]} | ({"fixed": fixed} if fix else {}), indent=1
            )
        )
    else:
        for f in found:
            mark = "ok     " if f.ok else "MISSING" if f.ok is False else "without"
            print(f"{mark} {f.what}: {f.found}" + (f" — {f.advice}" if f.advice else ""))
        if fix:
            print(
                "settings are as they were"
                if fixed
                else "an enclave is up, or a program still runs on frames: settings stay"
            )
    raise SystemExit(1 if bad else 0)
