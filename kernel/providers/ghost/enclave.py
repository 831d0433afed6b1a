"""Enclaves of a real ghOSt kernel: made, attached to, filled with CPUs and tasks, listened to, and told what to run.

Sources: google/ghost-userspace lib/ghost.h @d1d2e328, lib/ghost.cc @61aa48a7, lib/enclave.cc @328e3e32, lib/enclave.h @8a44ebdc (files of an enclave, commands,
ioctls); google/ghost-kernel kernel/sched/ghost.c @a09aeb01 (what the kernel does with them, at ABI 69).

Who may commit: the kernel lets an agent do it, that is a thread which has called ``become_agent`` and stays on its CPU; any other gets NOT_PERMITTED.

Left out, as Python has no compare-and-swap: ``abort`` of a READY transaction, and groups that BPF programs or other processes commit to as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kernel.providers.ghost.abi import abi
from kernel.providers.ghost.fs import ROOT, BusyError, GhostError, RingError, agree, asking
from kernel.providers.ghost.shared import Queue, StatusWords, Transactions
from kernel.topology import numbers

TUNABLES = (
    "commit_at_tick", "deliver_agent_runnability", "deliver_cpu_availability", "deliver_ticks", "live_dangerously", "runnable_timeout",
    "switchto_disabled", "wake_on_waker_cpu",
)  # fmt: skip
MASK = 128  # bytes of a cpu_set_t (glibc's CPU_SETSIZE / 8)


def _ioctl(fd: int, number: int, arg: Any) -> int:
    return fcntl.ioctl(fd, number, arg, True)


@dataclass(frozen=True)
class System:
    """The calls that reach the kernel. ``ioctl`` gets a writable buffer, which it may change, and returns what the kernel did; all raise OSError."""

    open: Callable[[Path, int], int] = os.open
    write: Callable[[int, bytes], int] = os.write
    ioctl: Callable[[int, int, Any], int] = _ioctl


def gtid_of(pid: int, proc: Path = Path("/proc")) -> int:
    """ghOSt's name for a thread, of /proc/PID/ghost/gtid (lib/base.cc @06c7bf02). GoneError: no such thread, or a kernel without it."""
    with asking(f"gtid of {pid}"):
        return int((proc / str(pid) / "ghost" / "gtid").read_text())


class Ghostfs:
    """The machine's ghostfs. ``version``: the ABI that new enclaves speak."""

    def __init__(self, root: Path = ROOT, system: System | None = None, filesystems: Path = Path("/proc/filesystems")) -> None:
        """NoGhostError; VersionError when there is no version that both sides speak."""
        self.root, self.system = root, system or System()
        self.version = agree(root, filesystems)

    def enclaves(self) -> list[int]:
        """Ids of all that there are."""
        return sorted(int(p.name.removeprefix("enclave_")) for p in self.root.glob("enclave_[0-9]*"))

    def create(self, cpus: Iterable[int] = (), options: str = "") -> Enclave:
        """A new one with these CPUs. ``options``: ghOSt's ``gid=N`` or ``ephemeral``. NotPermittedError; BusyError if a CPU is another enclave's: then there is none."""
        number = 1
        with asking(f"{self.root}/ctl"):
            fd = self.system.open(self.root / "ctl", os.O_WRONLY)
        try:
            while True:
                command = f"create {number} {self.version} {options}".strip()
                with asking(f"{self.root}/ctl: {command}"):
                    try:
                        self.system.write(fd, command.encode())
                        break
                    except FileExistsError:
                        number += 1
        finally:
            os.close(fd)
        enclave = self.attach(number)
        try:
            if cpus := list(cpus):
                enclave.set_cpus(cpus)
        except GhostError:
            enclave.destroy()
            raise
        return enclave

    def attach(self, number: int) -> Enclave:
        """One that exists; its tasks run on. GoneError; VersionError if it was made for another ABI."""
        return Enclave(self.root / f"enclave_{number}", self.system)


class Enclave:
    """An open enclave, which outlives it: ``close`` leaves it to the next agent, ``destroy`` ends it and its tasks go back to the kernel's scheduler."""

    def __init__(self, where: Path, system: System) -> None:
        self.where, self.system, self._online = where, system, -1
        text = self.get("abi_version")
        if not text.isdigit():
            raise RingError(f"{where}/abi_version: asked for a number, found {text!r}; is this an enclave of ghOSt?")
        self.abi = abi(int(text))
        self._ctl = self._open("ctl", os.O_RDWR)
        self._txns: Transactions | None = None

    # ---- files ----
    def _open(self, name: str, flags: int) -> int:
        with asking(f"{self.where}/{name}"):
            return self.system.open(self.where / name, flags)

    def _put(self, fd: int, what: str, text: str) -> None:
        with asking(what):
            if (n := self.system.write(fd, text.encode())) != len(text):
                raise GhostError(f"{what}: the kernel took {n} of {len(text)} bytes; a command must be written at once")

    def get(self, name: str) -> str:
        """What a file of the enclave says. GoneError."""
        with asking(f"{self.where}/{name}"):
            return (self.where / name).read_text().strip()

    def set(self, name: str, value: int | str) -> None:
        """Writes a file of the enclave: a tunable (TUNABLES; 0 or 1, ``runnable_timeout`` in ms), ``cpulist``, ``tasks``."""
        fd = self._open(name, os.O_WRONLY)
        try:
            self._put(fd, f"{self.where}/{name} = {value}", str(value))
        finally:
            os.close(fd)

    def command(self, text: str) -> None:
        """A command to ``ctl``. GhostError: EINVAL is a kernel that does not know it."""
        self._put(self._ctl, f"{self.where}/ctl: {text}", text)

    def status(self) -> dict[str, str]:
        """``version``, ``active`` (yes: an agent is online), ``nr_tasks``."""
        return dict(line.split(" ", 1) for line in self.get("status").splitlines() if " " in line)

    def cpus(self) -> list[int]:
        """The CPUs that are the enclave's."""
        return numbers(self.get("cpulist"))

    def set_cpus(self, cpus: Iterable[int], patience: float = 0.5) -> None:
        """Makes these its CPUs. ``patience``, in s: an enclave that was just destroyed gives its CPUs back a little later. BusyError."""
        until = time.monotonic() + patience
        while True:
            try:
                return self.set("cpulist", ",".join(str(c) for c in sorted(set(cpus))))
            except BusyError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    def tasks(self) -> list[int]:
        """Thread ids of its tasks, as many as fit a page."""
        return [int(t) for t in self.get("tasks").split()]

    def add_task(self, pid: int) -> None:
        """Moves a thread into the enclave; 0: the caller. NotPermittedError, GoneError. A TASK_NEW in the default queue says that it is there."""
        self.set("tasks", pid)

    # ---- agents ----
    def become_agent(self, cpu: int, queue: Queue | None = None) -> None:
        """Makes the calling thread the agent of a CPU, for good; without a queue it has the default one. BusyError while an older agent leaves: ask again.
        From then on this thread can open no file of ghostfs (EDEADLK, in kernels newer than @a09aeb01), so transactions are mapped before."""
        _ = self.transactions
        self.command(f"become agent {cpu} {queue.fd if queue else -1}")

    def advertise(self) -> None:
        """Says that an agent is online, until ``close`` or the end of this process. BusyError: there is one."""
        if self._online < 0:
            self._online = self._open("agent_online", os.O_RDWR)

    def wait_online(self, online: bool = True, timeout: float = 5.0) -> bool:
        """Waits until an agent is online, or none is; whether that came about within ``timeout`` s."""
        fd = self._open("agent_online", os.O_RDONLY)
        try:
            poll, until = select.poll(), time.monotonic() + timeout
            poll.register(fd, select.POLLPRI)
            while True:
                # Read, then poll: the kernel reports a change since the last read from the beginning.
                text = os.pread(fd, 20, 0).decode().strip()
                if text not in ("0", "1"):
                    raise RingError(f"{self.where}/agent_online: asked for 0 or 1, found {text!r}")
                if bool(int(text)) == online:
                    return True
                if (left := until - time.monotonic()) <= 0:
                    return False
                poll.poll(min(left, 0.1) * 1000)
        finally:
            os.close(fd)

    def discover(self) -> None:
        """Has the kernel send TASK_NEW for every task there is, to a new agent or after an overflow."""
        self.command("discover tasks")

    # ---- ioctls ----
    def _ask(self, name: str, what: str, struct: str, **fields: Any) -> tuple[int, Any]:
        arg = self.abi.ffi.new(f"struct {struct} *", fields)
        with asking(f"{self.where.name}: {what}"):
            return self.system.ioctl(self._ctl, self.abi.ioctl(name), self.abi.ffi.buffer(arg)), arg

    def create_queue(self, elems: int = 1024, node: int = 0, wake: Iterable[int] = ()) -> Queue:
        """A queue of ``elems`` slots of 8 bytes, near a NUMA node. ``wake``: CPUs whose agents a message wakes, at most two. ValueError, RingError."""
        if not 0 < elems <= self.abi.constants["GHOST_MAX_QUEUE_ELEMS"] or elems & (elems - 1):
            raise ValueError(f"asked for a queue of {elems} slots; a power of two is needed, at most {self.abi.constants['GHOST_MAX_QUEUE_ELEMS']}")
        fd, arg = self._ask("CREATE_QUEUE", f"queue of {elems} slots on node {node}", "ghost_ioc_create_queue", elems=elems, node=node)
        try:
            queue = Queue(self.abi, fd, arg.mapsize)
        except GhostError:
            os.close(fd)
            raise
        try:
            if wake := list(wake):
                self.wake(queue, wake)
        except (GhostError, ValueError):
            queue.close()
            raise
        return queue

    def wake(self, queue: Queue, cpus: Iterable[int]) -> None:
        """Whose agents a message in the queue wakes; none: they look by themselves."""
        cpus = list(cpus)
        if len(cpus) > self.abi.constants["GHOST_MAX_WINFO"]:
            raise ValueError(f"asked to wake the agents of {cpus}; at most {self.abi.constants['GHOST_MAX_WINFO']} CPUs can be")
        w = self.abi.ffi.new("struct ghost_agent_wakeup[]", [(c, 0) for c in cpus])
        self._ask("CONFIG_QUEUE_WAKEUP", f"wake agents of {cpus}", "ghost_ioc_config_queue_wakeup", qfd=queue.fd, w=w, ninfo=len(cpus))

    def set_default_queue(self, queue: Queue) -> None:
        """Where messages of new tasks go."""
        self._ask("SET_DEFAULT_QUEUE", "default queue", "ghost_ioc_set_default_queue", fd=queue.fd)

    def associate(self, queue: Queue, gtid: int, barrier: int) -> frozenset[str]:
        """Sends a task's messages to a queue. ``barrier``: seqnum of its last message. Returns of ALREADY (it was that queue) and BRAND_NEW (TASK_NEW is still
        to come) what holds. StaleError: there are newer messages; GoneError: no such task."""
        src = {"type": self.abi.constants["GHOST_TASK"], "arg": gtid}
        flags, _ = self._ask("ASSOC_QUEUE", f"queue for task {gtid}", "ghost_ioc_assoc_queue", fd=queue.fd, src=src, barrier=barrier)
        return frozenset(n for n in ("ALREADY", "BRAND_NEW") if flags & self.abi.constants[f"GHOST_ASSOC_SF_{n}"])

    def status_words(self, region: int = 0, node: int = 0) -> StatusWords:
        """A region of status words, made near ``node`` unless it exists. Tasks get theirs only where there is one."""
        try:
            self.system.write(self._ctl, f"create sw_region {region} {node}".encode())
        except OSError as e:
            if e.errno != errno.EEXIST:
                with asking(f"{self.where}/ctl: create sw_region {region} {node}"):
                    raise
        fd = self._open(f"sw_regions/sw_{region}", os.O_RDONLY)
        try:
            return StatusWords(self.abi, fd, region)
        finally:
            os.close(fd)

    def status_word_of(self, gtid: int = 0, agent: int = -1) -> tuple[int, int]:
        """(region, index) of a task's word, or with ``agent`` of that CPU's agent's. GoneError."""
        kind, arg = ("GHOST_AGENT", agent) if agent >= 0 else ("GHOST_TASK", gtid)
        request = {"type": self.abi.constants[kind], "arg": arg}
        _, info = self._ask("SW_GET_INFO", f"status word of {kind} {arg}", "ghost_ioc_sw_get_info", request=request)
        return info.response.id, info.response.index

    def free_status_word(self, region: int, index: int) -> None:
        """After TASK_DEAD or TASK_DEPARTED. GhostError (EINVAL): the kernel still needs it."""
        self._ask("SW_FREE", f"free status word {index} of region {region}", "ghost_sw_info", id=region, index=index)

    def cpu_time(self, gtid: int) -> int:
        """ns that a task has spent on CPUs, up to now. GoneError."""
        return int(self._ask("GET_CPU_TIME", f"CPU time of task {gtid}", "ghost_ioc_get_cpu_time", gtid=gtid)[1].runtime)

    def run(self, cpu: int, gtid: int, agent_barrier: int = 0, run_flags: int = 0) -> None:
        """GHOST_NULL_GTID: gives the caller's own CPU away until there is something to do; GHOST_AGENT_GTID: wakes that CPU's agent. StaleError: read messages first."""
        self._ask("RUN", f"run {gtid} on CPU {cpu}", "ghost_ioc_run", gtid=gtid, agent_barrier=agent_barrier, run_cpu=cpu, run_flags=run_flags)

    # ---- transactions ----
    @property
    def transactions(self) -> Transactions:
        """Mapped when first asked for."""
        if self._txns is None:
            fd = self._open("cpu_data", os.O_RDWR)
            try:
                self._txns = Transactions(self.abi, fd)
            finally:
                os.close(fd)
        return self._txns

    def propose(
        self, cpu: int, gtid: int, task_barrier: int, agent_barrier: int = 0, run_flags: int = 0, commit_flags: int = 0, group: int = -1
    ) -> None:
        """Writes that ``gtid`` shall run on ``cpu``, decided on these barriers; ``commit`` has it done, or the kernel where ``commit_flags`` say so.
        ``group`` >= 0: for ``commit_group``. BusyError: the last one is not over, or is another group's. As ``LocalRunRequest::Open``."""
        txn = self.transactions[cpu]
        if txn.state >= 0:
            raise BusyError(f"transaction of CPU {cpu} is {self.transactions.state(cpu)}; commit it, and wait")
        if txn.sync_group_owner not in (-1, group):
            raise BusyError(f"transaction of CPU {cpu} belongs to group {txn.sync_group_owner}, asked for {group}; wait for that group")
        txn.sync_group_owner = group
        txn.agent_barrier, txn.gtid, txn.task_barrier = agent_barrier, gtid, task_barrier
        txn.run_flags, txn.commit_flags = run_flags, commit_flags
        txn.state = self.abi.constants["GHOST_TXN_READY"]  # the last store: the kernel may claim it from here on

    def commit(self, cpus: Iterable[int], timeout: float = 0.1) -> dict[int, str]:
        """Has the proposals of these CPUs carried out. CPU -> what became of it; READY or CLAIMED: not over after ``timeout`` s (another CPU commits it later)."""
        cpus = list(cpus)
        self._commit("COMMIT_TXN", cpus)
        return self._outcome(cpus, timeout)

    def commit_group(self, cpus: Iterable[int], timeout: float = 0.1) -> tuple[bool, dict[int, str]]:
        """All of them or none: whether all, and what became of each (POISONED: another one failed). The group is dissolved."""
        cpus = list(cpus)
        done = self._commit("SYNC_GROUP_TXN", cpus) == 1
        outcome = self._outcome(cpus, timeout)
        if not done:  # else the kernel has let go of them, and they may be somebody's again
            for cpu in cpus:
                self.transactions[cpu].sync_group_owner = -1
        return done, outcome

    def _commit(self, name: str, cpus: list[int]) -> int:
        mask = self.abi.ffi.new(f"uint8_t[{MASK}]")
        for cpu in cpus:
            if not 0 <= cpu < min(MASK * 8, self.transactions.cpus):
                raise IndexError(f"asked to commit on CPU {cpu}; the machine has {self.transactions.cpus}")
            mask[cpu // 8] |= 1 << cpu % 8
        pointer = self.abi.ffi.cast("void *", mask)
        return self._ask(name, f"commit on CPUs {cpus}", "ghost_ioc_commit_txn", mask_ptr=pointer, mask_len=MASK)[0]

    def _outcome(self, cpus: list[int], timeout: float) -> dict[int, str]:
        until = time.monotonic() + timeout
        while not all(self.transactions.committed(c) for c in cpus) and time.monotonic() < until:
            time.sleep(0)
        return {c: self.transactions.state(c) for c in cpus}

    # ---- ends ----
    def destroy(self) -> None:
        """Ends the enclave: agents are killed, tasks go back to the kernel's scheduler. Then closes."""
        try:
            self.command("destroy")
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of it, and is no longer online. Queues and status words that it made are closed by who holds them."""
        if self._txns is not None:
            self._txns.close()
        for fd in (self._online, self._ctl):
            if fd >= 0:
                os.close(fd)
        self._txns, self._online, self._ctl = None, -1, -1

    def __enter__(self) -> Enclave:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
