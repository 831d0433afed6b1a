"""The provider for a real ghOSt kernel: layouts of three ABI versions, and its logic against an imitation of ghostfs. No such kernel is met here."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel.providers.ghost import fs
from kernel.providers.ghost.abi import HERE, IOCTLS, Message, abi
from kernel.providers.ghost.enclave import TUNABLES, Enclave, Ghostfs, System, gtid_of
from kernel.providers.ghost.shared import Queue, Transactions
from sylvie.doctor import ghost

CALM = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
U32, SLOT, START, RING = 1 << 32, 8, 64, 12
GTID = (4711 << 41) | 5

# Worked out by hand from the three headers (abi.py names them), not by the code under test: message -> number, bytes of payload in 84, and in 90 and 91.
MESSAGES = {
    "MSG_TASK_DEAD": (64, 8, 16), "MSG_TASK_BLOCKED": (65, 32, 32), "MSG_TASK_WAKEUP": (66, 32, 32), "MSG_TASK_NEW": (67, 40, 48),
    "MSG_TASK_PREEMPT": (68, 40, 40), "MSG_TASK_YIELD": (69, 40, 40), "MSG_TASK_DEPARTED": (70, 24, 24), "MSG_TASK_SWITCHTO": (71, 32, 32),
    "MSG_TASK_AFFINITY_CHANGED": (72, 8, 8), "MSG_TASK_ON_CPU": (73, 32, 32), "MSG_TASK_PRIORITY_CHANGED": (74, 16, 16),
    "MSG_TASK_LATCH_FAILURE": (75, 16, 16), "MSG_CPU_TICK": (128, 4, 8), "MSG_CPU_TIMER_EXPIRED": (129, 24, 24), "MSG_CPU_NOT_IDLE": (130, 16, 16),
    "MSG_CPU_AVAILABLE": (131, 4, 4), "MSG_CPU_BUSY": (132, 4, 4), "MSG_CPU_AGENT_BLOCKED": (133, 4, 4), "MSG_CPU_AGENT_WAKEUP": (134, 4, 4),
}  # fmt: skip
SIZES = {
    "ghost_msg_src": 16, "ghost_sw_info": 8, "ghost_ioc_sw_get_info": 24, "ghost_ioc_create_queue": 24, "ghost_ioc_assoc_queue": 32,
    "ghost_ioc_config_queue_wakeup": 24, "ghost_ioc_commit_txn": 16, "ghost_ioc_timerfd_settime": 48, "ghost_ioc_run": 24, "ghost_sw_region_header": 64,
    "ghost_status_word": 32, "ghost_queue_header": 64, "ghost_msg": SLOT, "ghost_ring": RING, "ghost_txn": 64, "ghost_cpu_data": 4096,
}  # fmt: skip
# As the headers write them.
MACROS = {
    "NULL": "_IO('g', 0)", "SW_GET_INFO": "_IOWR('g', 1, struct ghost_ioc_sw_get_info)", "SW_FREE": "_IOW('g', 2, struct ghost_sw_info)",
    "CREATE_QUEUE": "_IOWR('g', 3, struct ghost_ioc_create_queue)", "ASSOC_QUEUE": "_IOW('g', 4, struct ghost_ioc_assoc_queue)",
    "SET_DEFAULT_QUEUE": "_IOW('g', 5, struct ghost_ioc_set_default_queue)",
    "CONFIG_QUEUE_WAKEUP": "_IOW('g', 6, struct ghost_ioc_config_queue_wakeup)", "GET_CPU_TIME": "_IOWR('g', 7, struct ghost_ioc_get_cpu_time)",
    "COMMIT_TXN": "_IOW('g', 8, struct ghost_ioc_commit_txn)", "SYNC_GROUP_TXN": "_IOW('g', 9, struct ghost_ioc_commit_txn)",
    "TIMERFD_SETTIME": "_IOWR('g', 10, struct ghost_ioc_timerfd_settime)", "RUN": "_IOW('g', 11, struct ghost_ioc_run)",
}  # fmt: skip


# ---- layouts ----
@pytest.mark.parametrize("version", fs.VERSIONS)
def test_layouts_as_in_the_headers(version: int) -> None:
    a = abi(version)
    assert {n: (v, a.size(a.payloads[v])) for v, n in a.messages.items() if v} == {n: (v, old if version == 84 else new) for n, (v, old, new) in MESSAGES.items()}
    assert {s: a.size(s) for s in SIZES} == SIZES
    assert a.offsets("ghost_txn") == {
        "version": 0, "cpu": 4, "state": 8, "agent_barrier": 12, "task_barrier": 16, "run_flags": 20, "commit_flags": 22, "unused": 23, "gtid": 24,
        "commit_time": 32, "cpu_seqnum": 40, "sync_group_owner": 48,
    }  # fmt: skip
    assert a.offsets("ghost_status_word") == {"barrier": 0, "flags": 4, "gtid": 8, "switch_time": 16, "runtime": 24}
    assert (a.ioctl("COMMIT_TXN"), a.ioctl("CREATE_QUEUE")) == (0x40106708, 0xC0186703)
    states = {n: v - -(1 << 31) for v, n in a.txn_states.items() if v < 0}
    assert len(states) == 16 and states["COMPLETE"] == 0 and states["TARGET_STALE"] == 3 and states["POISONED"] == 15 and a.txn_states[(1 << 31) - 1] == "READY"


@pytest.mark.parametrize("version", fs.VERSIONS)
def test_layouts_as_a_c_compiler_has_them(version: int, tmp_path: Path) -> None:
    a = abi(version)
    headers = ["ghost.h", "ghost84.h" if version == 84 else "ghost90.h"]
    structs = re.findall(r"^struct (\w+) \{", "\n".join((HERE / h).read_text() for h in headers), re.M)
    wanted = {f"sizeof(struct {s})": a.size(s) for s in structs}
    wanted |= {f"offsetof(struct {s}, {f})": at for s in structs for f, at in a.offsets(s).items()}
    wanted |= {macro: a.ioctl(name) for name, macro in MACROS.items()} | a.constants
    assert len(structs) > 30 and MACROS.keys() == IOCTLS.keys()
    lines = "".join(f'printf("%lld\\n", (long long)({what}));\n' for what in wanted)
    includes = "".join(f'#include "{HERE / h}"\n' for h in headers)
    (tmp_path / "a.c").write_text(f"#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <linux/ioctl.h>\n{includes}int main(void) {{\n{lines}}}\n")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)
    found = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(wanted, map(int, found), strict=True)) == wanted


@CALM
@given(st.sampled_from(fs.VERSIONS), st.sampled_from(sorted(MESSAGES)), st.integers(0, U32 - 1), st.data())
def test_any_message_is_understood(version: int, name: str, seqnum: int, data: st.DataObject) -> None:
    a, kind = abi(version), MESSAGES[name][0]
    payload = data.draw(st.binary(min_size=(n := a.size(a.payloads[kind])), max_size=n))
    m = a.message(kind, seqnum, payload)
    assert (m.type, m.name, m.seqnum) == (kind, name, seqnum)
    if kind < 128:
        assert m.gtid == struct.unpack_from("<Q", payload)[0] == m.fields["gtid"]
    else:
        assert m.cpu == struct.unpack_from("<i", payload)[0] == m.fields["cpu"]
    if name == "MSG_TASK_NEW":
        assert (m.fields["nice"], m.fields["sw_info_index"]) == struct.unpack_from("<i4xI", payload, 28)
        assert ("agent_data" in m.fields) == (version != 84)
    if name == "MSG_TASK_PREEMPT":
        assert (m.cpu, m.fields["from_switchto"], m.fields["was_latched"]) == struct.unpack_from("<ibb", payload, 32)
    for wrong in (payload + b"\0", payload[:-1]):
        with pytest.raises(fs.MessageError, match=rf"{name}.*{len(wrong)} bytes.*ABI {version} has {n}"):
            a.message(kind, 0, wrong)
    with pytest.raises(fs.MessageError, match="type 76"):
        a.message(76, 0, payload)


# ---- an imitation of ghostfs ----
class Kernel:
    """Answers as kernel/sched/ghost.c does, on plain files and memfds. ``fail`` makes the next call of a kind fail with an errno."""

    def __init__(self, root: Path, versions: str = "91\n") -> None:
        self.root, self.fail = root, dict[str, int]()
        self.calls: list[tuple[Any, ...]] = []
        self.verdict = dict[int, str]()  # CPU -> state that a commit gives; otherwise COMPLETE
        self.rings = dict[int, mmap.mmap]()
        self.tasks = {GTID: 7}  # gtid -> barrier
        self.lie = dict[str, int]()  # fields of a queue's header that are wrong
        root.mkdir(exist_ok=True)
        (root / "version").write_text(versions)
        (root / "ctl").touch()
        self.system = System(self.open, self.write, self.ioctl)

    def _may(self, what: str) -> None:
        if code := self.fail.pop(what, 0):
            raise OSError(code, os.strerror(code))

    def open(self, path: Path, flags: int) -> int:
        self._may(f"open {path.name}")
        if path.name == "agent_online" and flags & os.O_RDWR:
            if path.read_text() == "1":
                raise OSError(errno.EBUSY, "busy")
            path.write_text("1")
        return os.open(path, flags)

    def write(self, fd: int, data: bytes) -> int:
        path, text = Path(os.readlink(f"/proc/self/fd/{fd}")), data.decode()
        self.calls.append((path.name, text))
        self._may(text.split()[0] if path.name == "ctl" else path.name)
        if path == self.root / "ctl":
            _, number, version, *_ = text.split()
            if version not in (self.root / "version").read_text().split():
                raise OSError(errno.ESRCH, "no such version")
            (e := self.root / f"enclave_{number}").mkdir()  # FileExistsError as the kernel's
            (e / "sw_regions").mkdir()
            for name, content in dict.fromkeys(TUNABLES, "0").items() | {
                ("abi_version", version), ("agent_online", "0"), ("cpulist", ""), ("ctl", number), ("tasks", ""), ("status", f"version {version}\nactive no\n")
            }:  # fmt: skip
                (e / name).write_text(content)
            (e / "cpu_data").write_bytes(bytes(4 * 4096))
        elif path.name == "ctl":
            if text == "destroy":
                shutil.rmtree(path.parent)
            elif match := re.fullmatch(r"create sw_region (\d+) (\d+)", text):
                with open(path.parent / "sw_regions" / f"sw_{match[1]}", "xb") as f:
                    f.write(struct.pack("<6I", 0, int(match[1]), int(match[2]), 64, 126, 126).ljust(4096, b"\0"))
            elif not re.fullmatch(r"become agent \d+ -?\d+|discover tasks", text):
                raise OSError(errno.EINVAL, "bad cmd")
        elif path.name == "cpulist":
            cpus = set(text.split(","))
            if any(cpus & set(p.read_text().split(",")) for p in self.root.glob("enclave_*/cpulist") if p != path):
                raise OSError(errno.EBUSY, "busy")
            path.write_text(text)
            with open(path.parent / "cpu_data", "r+b") as f:
                for cpu in map(int, cpus):
                    f.seek(cpu * 4096)
                    f.write(struct.pack("<iii", 0, cpu, -(1 << 31)) + bytes(36) + struct.pack("<i", -1))
        else:
            path.write_text(text)
        return len(data)

    def ioctl(self, fd: int, number: int, arg: Any) -> int:
        where = Path(os.readlink(f"/proc/self/fd/{fd}")).parent
        a = abi(int((where / "abi_version").read_text()))
        name = next(n for n in IOCTLS if a.ioctl(n) == number)
        self._may(name)
        v = a.ffi.from_buffer(f"struct {IOCTLS[name][2]} *", arg, require_writable=True)
        self.calls.append((name, {f: getattr(v, f) for f, t in a.ffi.typeof(v).item.fields if t.type.kind == "primitive"}))
        if name == "CREATE_QUEUE":
            v.mapsize = -(-(START + RING + v.elems * SLOT) // 4096) * 4096
            queue = os.memfd_create("queue")
            os.ftruncate(queue, v.mapsize)
            self.rings[queue] = mmap.mmap(queue, v.mapsize)
            header = {"version": 0, "start": START, "nelems": v.elems} | self.lie
            struct.pack_into("<3I", self.rings[queue], 0, *header.values())
            return queue
        if name == "ASSOC_QUEUE":
            if v.src.arg not in self.tasks:
                raise OSError(errno.ENOENT, "none")
            if v.barrier != self.tasks[v.src.arg]:
                raise OSError(errno.ESTALE, "stale")
            return 1 if v.fd in self.rings else 0
        if name in ("COMMIT_TXN", "SYNC_GROUP_TXN"):
            mask = bytes(a.ffi.buffer(a.ffi.cast("uint8_t *", v.mask_ptr), v.mask_len))
            cpus = [c for c in range(8 * v.mask_len) if mask[c // 8] >> c % 8 & 1]
            return self.commit(where, cpus, name == "SYNC_GROUP_TXN")
        if name == "SW_GET_INFO":
            v.response.id, v.response.index = (0, 3) if (v.request.type, v.request.arg) == (1, GTID) else (0, 4)
        if name == "GET_CPU_TIME":
            v.runtime = 12345
        return 0

    def commit(self, where: Path, cpus: list[int], group: bool) -> int:
        with open(where / "cpu_data", "r+b") as f, mmap.mmap(f.fileno(), 0) as m:
            names = {n: s for s, n in abi(91).txn_states.items()}
            failed = any(self.verdict.get(c, "COMPLETE") != "COMPLETE" for c in cpus)
            for cpu in cpus:
                assert struct.unpack_from("<i", m, cpu * 4096 + 8)[0] == (1 << 31) - 1, "only READY ones are committed"
                state = self.verdict.get(cpu, "POISONED" if group and failed else "COMPLETE")
                struct.pack_into("<i", m, cpu * 4096 + 8, cpu if state == "CLAIMED" else names[state])
                if group and not failed:
                    struct.pack_into("<i", m, cpu * 4096 + 48, -1)
            return int(group and not failed)

    def produce(self, queue: int, kind: int, seqnum: int, payload: bytes) -> bool:
        """``_produce`` of kernel/sched/ghost.c @a09aeb01. False: it overflowed."""
        m = self.rings[queue]
        nelems, (head, tail, overflow) = struct.unpack_from("<I", m, 8)[0], struct.unpack_from("<3I", m, START)
        need, used = -(-(8 + len(payload)) // 8), (head - tail) % U32
        h, t = head % nelems, tail % nelems
        ahead, behind = (0, 0) if used >= nelems else (nelems - h, t) if t <= h else (t - h, 0)
        if max(ahead, behind) < need:
            struct.pack_into("<I", m, START + 8, overflow + 1)
            return False
        skipped = 0
        if ahead < need:
            struct.pack_into("<HH", m, START + RING + h * SLOT, 0, ahead * SLOT)
            h, skipped = 0, ahead
        at = START + RING + h * SLOT
        m[at : at + 8 + len(payload)] = struct.pack("<HHI", kind, 8 + len(payload), seqnum) + payload
        struct.pack_into("<I", m, START, (head + skipped + need) % U32)
        return True


@pytest.fixture
def machine(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path / "ghost")


@pytest.fixture
def enclave(machine: Kernel) -> Iterator[Enclave]:
    with Ghostfs(machine.root, machine.system).create([0, 1, 2]) as e:
        yield e


# ---- versions ----
@pytest.mark.parametrize(("text", "spoken"), [("84", 84), ("90\n84\n", 90), ("91\n90\n84\n", 91), ("92\n91\n", 91)])
def test_the_best_version_is_chosen(tmp_path: Path, text: str, spoken: int) -> None:
    machine = Kernel(tmp_path / "ghost", text)
    with Ghostfs(machine.root, machine.system).create() as e:
        assert e.abi.version == spoken and machine.calls[0] == ("ctl", f"create 1 {spoken}")
    (machine.root / "enclave_1" / "abi_version").write_text("83")
    with pytest.raises(fs.VersionError, match=r"83.*84, 90 and 91"):
        Ghostfs(machine.root, machine.system).attach(1)


def test_a_mismatch_names_both_sides(tmp_path: Path) -> None:
    machine = Kernel(tmp_path / "ghost", "83\n92\n")
    with pytest.raises(fs.VersionError, match="offers ABI 83 and 92, Sylvie speaks 84, 90 and 91; boot"):
        Ghostfs(machine.root, machine.system)
    (machine.root / "version").write_text("ninety")
    with pytest.raises(fs.RingError, match="'ninety'"):
        Ghostfs(machine.root, machine.system)


def test_doctor_says_which(tmp_path: Path) -> None:
    where, types = tmp_path / "sys/fs/ghost", tmp_path / "proc/filesystems"
    where.mkdir(parents=True)
    types.parent.mkdir()
    types.write_text("nodev\tsysfs\n\text4\n")
    assert (f := ghost(tmp_path)).ok is None and f.found == "no ghostfs" and "84, 90 and 91" in f.advice
    with pytest.raises(fs.NoGhostError, match="CONFIG_SCHED_CLASS_GHOST"):
        Ghostfs(where, filesystems=types)
    types.write_text("nodev\tghost\n")
    assert (f := ghost(tmp_path)).ok is None and f.advice.startswith("mount -t ghost")
    with pytest.raises(fs.NoGhostError, match="not mounted"):
        Ghostfs(where, filesystems=types)
    for text, ok, found in [("91\n84\n", True, "version 91, spoken"), ("83\n", False, "version 83, not spoken"), ("?", False, "'?'")]:
        (where / "version").write_text(text)
        f = ghost(tmp_path)
        assert f.ok is ok and found in f.found and not f.essential and (ok or "84, 90 and 91" in f.advice)


def test_a_kernel_without_ghost_refuses_the_mount(tmp_path: Path) -> None:
    if fs.look().kernel:
        pytest.skip("this kernel has ghOSt")
    with pytest.raises(fs.NoGhostError if os.geteuid() == 0 else fs.NotPermittedError, match="mount -t ghost"):
        fs.mount(tmp_path)


# ---- enclaves ----
def test_life_of_an_enclave(machine: Kernel) -> None:
    top = Ghostfs(machine.root, machine.system)
    first, second = top.create([0, 1]), top.create(options="ephemeral")
    assert (first.where.name, second.where.name, top.enclaves()) == ("enclave_1", "enclave_2", [1, 2])
    assert ("ctl", "create 2 91 ephemeral") in machine.calls and first.cpus() == [0, 1]
    assert first.status() == {"version": "91", "active": "no"}
    first.set("deliver_ticks", 1)
    first.add_task(4711)
    assert first.get("deliver_ticks") == "1" and first.tasks() == [4711]
    first.become_agent(1)
    machine.fail["open cpu_data"] = errno.EDEADLK  # as the kernel tells agents: what they need has been opened before
    assert first.transactions.cpus == 4
    first.discover()
    assert machine.calls[-2:] == [("ctl", "become agent 1 -1"), ("ctl", "discover tasks")]
    assert not second.wait_online(timeout=0) and second.wait_online(online=False, timeout=0)
    second.advertise()
    assert second.wait_online(timeout=0)
    again = top.attach(2)
    with pytest.raises(fs.BusyError, match="agent_online"):
        again.advertise()
    again.close()
    first.destroy()
    second.destroy()
    assert top.enclaves() == []
    with pytest.raises(fs.GoneError, match=r"enclave_1/abi_version.*destroyed"):
        top.attach(1)


def test_an_agent_is_waited_for(enclave: Enclave) -> None:
    later = threading.Timer(0.2, lambda: (enclave.where / "agent_online").write_text("1"))
    later.start()
    assert enclave.wait_online(timeout=10)
    later.join()
    (enclave.where / "agent_online").write_text("perhaps")
    with pytest.raises(fs.RingError, match="perhaps"):
        enclave.wait_online()


def test_busy_cpus_leave_no_enclave(machine: Kernel, enclave: Enclave) -> None:
    top = Ghostfs(machine.root, machine.system)
    with pytest.raises(fs.BusyError, match=r"cpulist = 2,3.*EBUSY.*destroy"):
        top.create([3, 2])
    assert top.enclaves() == [1]
    machine.fail["cpulist"] = errno.EBUSY  # once: of an enclave that is just going
    with top.create([3]) as e:
        assert e.cpus() == [3]


@pytest.mark.parametrize(
    ("call", "code", "kind"),
    [("open ctl", errno.EACCES, fs.NotPermittedError), ("create", errno.EPERM, fs.NotPermittedError), ("create", errno.ENOMEM, fs.GhostError)],
)
def test_creation_that_fails(machine: Kernel, call: str, code: int, kind: type[Exception]) -> None:
    machine.fail[call] = code
    with pytest.raises(kind, match=f"ctl.*{errno.errorcode[code]}"):
        Ghostfs(machine.root, machine.system).create()
    assert list(machine.root.glob("enclave_*")) == []


def test_calls_that_fail(machine: Kernel, enclave: Enclave) -> None:
    def failing(what: str, code: int, kind: type[Exception], call: Callable[[], object]) -> None:
        machine.fail[what] = code
        with pytest.raises(kind, match=errno.errorcode[code]):
            call()

    failing("tasks", errno.EPERM, fs.NotPermittedError, lambda: enclave.add_task(1))
    failing("tasks", errno.ESRCH, fs.GoneError, lambda: enclave.add_task(1))
    failing("become", errno.EBUSY, fs.BusyError, lambda: enclave.become_agent(0))
    failing("open cpulist", errno.EDEADLK, fs.GhostError, lambda: enclave.set_cpus([1]))
    failing("RUN", errno.ESTALE, fs.StaleError, lambda: enclave.run(0, 0))
    failing("CREATE_QUEUE", errno.ENOMEM, fs.GhostError, enclave.create_queue)
    failing("SW_FREE", errno.EINVAL, fs.GhostError, lambda: enclave.free_status_word(0, 1))
    failing("create", errno.ENODEV, fs.GoneError, enclave.status_words)
    with pytest.raises(fs.GhostError, match=r"bad cmd \(EINVAL\)"):
        enclave.command("make tea")
    for elems in (0, 3, 131072):
        with pytest.raises(ValueError, match=f"{elems} slots"):
            enclave.create_queue(elems)
    machine.rings.clear()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="at most 2"):
        enclave.create_queue(8, wake=[0, 1, 2])
    failing("CONFIG_QUEUE_WAKEUP", errno.EINVAL, fs.GhostError, lambda: enclave.create_queue(8, wake=[9]))
    machine.rings.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_real_ioctl_fills_the_struct() -> None:
    """The call that is replaced everywhere else here."""
    out, into = os.pipe()
    os.write(into, b"12345")
    there = abi(91).ffi.new("int *")
    assert System().ioctl(out, termios.FIONREAD, abi(91).ffi.buffer(there)) == 0 and there[0] == 5
    with pytest.raises(OSError):
        System().ioctl(out, abi(91).ioctl("NULL"), abi(91).ffi.buffer(there))
    os.close(out)
    os.close(into)


def test_gtid(tmp_path: Path) -> None:
    (tmp_path / "7/ghost").mkdir(parents=True)
    (tmp_path / "7/ghost/gtid").write_text(f"{GTID}\n")
    assert gtid_of(7, tmp_path) == GTID
    with pytest.raises(fs.GoneError, match="gtid of 8"):
        gtid_of(8, tmp_path)


# ---- queues ----
def test_queue(machine: Kernel, enclave: Enclave) -> None:
    queue = enclave.create_queue(32, wake=[1])
    assert [c[0] for c in machine.calls[-2:]] == ["CREATE_QUEUE", "CONFIG_QUEUE_WAKEUP"] and machine.calls[-1][1]["ninfo"] == 1
    enclave.set_default_queue(queue)
    assert machine.calls[-1] == ("SET_DEFAULT_QUEUE", {"fd": queue.fd})
    assert enclave.associate(queue, GTID, 7) == {"ALREADY"}
    with pytest.raises(fs.StaleError, match="read the queue"):
        enclave.associate(queue, GTID, 6)
    with pytest.raises(fs.GoneError):
        enclave.associate(queue, GTID + 1, 7)
    assert queue.pop() is None
    machine.produce(queue.fd, 64, 9, struct.pack("<Qi4x", GTID, 2))
    machine.produce(queue.fd, 128, 10, struct.pack("<ii", 1, 1))
    assert list(queue) == [
        Message(64, "MSG_TASK_DEAD", 9, GTID, 2, {"gtid": GTID, "cpu": 2}), Message(128, "MSG_CPU_TICK", 10, 0, 1, {"cpu": 1, "is_agent": 1}),
    ]  # fmt: skip
    fd = queue.fd
    queue.close()
    with pytest.raises(OSError):
        os.fstat(fd)


@CALM
@given(st.sampled_from([8, 16, 32]), st.integers(0, U32 - 1) | st.integers(U32 - 40, U32 - 1), st.lists(st.sampled_from([0, *MESSAGES]), max_size=200))
def test_nothing_is_lost_uncounted_or_torn(tmp_path_factory: pytest.TempPathFactory, elems: int, start: int, steps: list[Any]) -> None:
    """Any mixture of messages and reads, from any place of the ring, indexes that wrap included."""
    machine = Kernel(tmp_path_factory.mktemp("ghost"))
    with Ghostfs(machine.root, machine.system).create() as e:
        queue = e.create_queue(elems)
        struct.pack_into("<2I", machine.rings[queue.fd], START, start, start)
        expected, lost, received = [], 0, []
        for n, step in enumerate(steps):
            if step == 0:
                received += list(queue)
                continue
            kind, _, size = MESSAGES[step]
            if machine.produce(queue.fd, kind, n, payload := struct.pack("<i", n).ljust(size, b"\1")):
                expected.append(e.abi.message(kind, n, payload))
            else:
                lost += 1
        assert [*received, *queue] == expected and queue.overflow == lost
        queue.close()


def test_overflow(machine: Kernel, enclave: Enclave) -> None:
    queue = enclave.create_queue(8)
    made = [machine.produce(queue.fd, 72, n, struct.pack("<Q", n)) for n in range(6)]
    assert made == [True] * 4 + [False] * 2 and queue.overflow == 2
    assert [m.seqnum for m in queue] == [0, 1, 2, 3]


def test_a_bad_message_is_passed_over(machine: Kernel, enclave: Enclave) -> None:
    queue = enclave.create_queue(16)
    machine.produce(queue.fd, 99, 1, b"12345678")
    machine.produce(queue.fd, 64, 2, b"12345678")  # ABI 84's
    machine.produce(queue.fd, 72, 3, struct.pack("<Q", GTID))
    with pytest.raises(fs.MessageError, match="type 99"):
        queue.pop()
    with pytest.raises(fs.MessageError, match="MSG_TASK_DEAD: 8 bytes of payload, ABI 91 has 16"):
        queue.pop()
    assert (m := queue.pop()) is not None and m.gtid == GTID


@pytest.mark.parametrize(
    ("at", "value"), [(START, 17), (START + 4, 1), (START + RING, 72 | 4 << 16), (START + RING, 72 | 24 << 16), (START + RING, 72 | 0xFFFF << 16)]
)
def test_a_broken_ring_is_not_read(machine: Kernel, enclave: Enclave, at: int, value: int) -> None:
    """head too far ahead of tail, or behind; a length below a header's, beyond what is filled, beyond the ring."""
    queue = enclave.create_queue(16)
    machine.produce(queue.fd, 72, 3, struct.pack("<Q", GTID))
    struct.pack_into("<I", machine.rings[queue.fd], at, value if at != START + 4 else 3)
    for _ in range(2):  # and it stays so
        with pytest.raises(fs.RingError, match=r"make another, then Enclave.discover\(\)"):
            queue.pop()


def test_a_message_does_not_go_on_at_the_beginning(machine: Kernel, enclave: Enclave) -> None:
    queue = enclave.create_queue(16)
    struct.pack_into("<2I", machine.rings[queue.fd], START, 18, 15)
    struct.pack_into("<HHI", machine.rings[queue.fd], START + RING + 15 * SLOT, 72, 16, 1)
    with pytest.raises(fs.RingError, match="slot 15 of 16 has type 72, length 16"):
        queue.pop()


@pytest.mark.parametrize("lie", [{"nelems": 4096}, {"nelems": 15}, {"nelems": 0}, {"version": 1}, {"start": 1 << 31}, {"start": 65}])
def test_a_truncated_queue_is_not_opened(machine: Kernel, enclave: Enclave, lie: dict[str, int]) -> None:
    machine.lie = lie
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(fs.RingError, match=r"queue: .*header"):
        enclave.create_queue(16)
    machine.rings.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_shorter_than_said(tmp_path: Path) -> None:
    with open(tmp_path / "queue", "w+b") as f:
        f.truncate(4096)
        with pytest.raises(fs.RingError, match="asked to map 8192 bytes, the file has 4096"):
            Queue(abi(91), f.fileno(), 8192)
        with pytest.raises(fs.RingError, match="too short for its header"):
            Queue(abi(91), f.fileno(), 32)
        f.truncate(0)
        with pytest.raises(fs.RingError, match="asked to map 0 bytes"):
            Transactions(abi(91), f.fileno())


@CALM
@given(st.binary(min_size=16 * SLOT, max_size=16 * SLOT), st.integers(0, 20), st.integers(0, U32 - 1))
def test_noise_in_a_ring(tmp_path_factory: pytest.TempPathFactory, noise: bytes, filled: int, tail: int) -> None:
    """Whatever is there: messages, or one of the two errors, and an end."""
    machine = Kernel(tmp_path_factory.mktemp("ghost"))
    with Ghostfs(machine.root, machine.system).create() as e:
        queue = e.create_queue(16)
        struct.pack_into("<2I", machine.rings[queue.fd], START, (tail + filled) % U32, tail)
        machine.rings[queue.fd][START + RING : START + RING + len(noise)] = noise
        for _ in range(17):
            try:
                if queue.pop() is None:
                    break
            except fs.MessageError:
                continue
            except fs.RingError:
                break
        else:
            raise AssertionError("more messages than slots")
        left = (struct.unpack_from("<I", machine.rings[queue.fd], START)[0] - queue._ring.tail) % U32
        assert left <= filled
        queue.close()


# ---- status words ----
def test_status_words(machine: Kernel, enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    words = enclave.status_words()
    assert words.words.shape == (126,) and list(words.tasks()) == []
    with open(enclave.where / "sw_regions/sw_0", "r+b") as f:
        for index, flags in [(3, 1 << 0 | 1 << 17), (4, 1 << 0 | 1 << 18), (5, 1 << 1)]:
            f.seek(64 + index * 32)
            f.write(struct.pack("<IIQqQ", 7, flags, GTID, 11, 13))
    again = enclave.status_words()  # exists: EEXIST is well
    assert list(again.tasks()) == [3] and enclave.status_word_of(GTID) == (0, 3) and enclave.status_word_of(agent=1) == (0, 4)
    assert again.read(3) == {"barrier": 7, "flags": 1 | 1 << 17, "gtid": GTID, "switch_time": 11, "runtime": 13}
    with pytest.raises(ValueError, match="read-only"):
        again.words["flags"][3] = 0
    with pytest.raises(IndexError, match="126"):
        again.read(126)
    # The kernel is in the middle of it: the barrier is new, the flags follow.
    seen = iter([struct.pack("<IIQqQ", b, f, GTID, 0, 0) for b, f in [(7, 1), (8, 1), (8, 3), (8, 3)]])
    monkeypatch.setattr(again, "_copy", lambda index: next(seen))
    assert (word := again.read(3))["barrier"] == 8 and word["flags"] == 3
    counter = iter(range(5000))
    monkeypatch.setattr(again, "_copy", lambda index: struct.pack("<IIQqQ", next(counter), 0, 0, 0, 0))
    with pytest.raises(fs.GhostError, match="no two alike"):
        again.read(3)
    assert enclave.cpu_time(GTID) == 12345


@pytest.mark.parametrize("header", [(1, 0, 0, 64, 126), (0, 5, 0, 64, 126), (0, 0, 0, 64, 127), (0, 0, 0, 4090, 126)])
def test_a_region_that_is_none(enclave: Enclave, header: tuple[int, ...]) -> None:
    (enclave.where / "sw_regions/sw_0").write_bytes(struct.pack("<5I", *header).ljust(4096, b"\0"))
    with pytest.raises(fs.RingError, match="sw_0: header says"):
        enclave.status_words()


# ---- transactions ----
@pytest.mark.parametrize("state", [s for s in abi(91).txn_states.values() if s != "READY"])
def test_what_becomes_of_a_transaction(machine: Kernel, enclave: Enclave, state: str) -> None:
    machine.verdict[1] = state
    enclave.propose(1, GTID, task_barrier=7, agent_barrier=3, run_flags=1 << 12, commit_flags=1 << 1)
    with open(enclave.where / "cpu_data", "rb") as f:
        f.seek(4096)
        assert struct.unpack("<iiiIIHBBqqQi", f.read(52)) == (0, 1, (1 << 31) - 1, 3, 7, 1 << 12, 1 << 1, 0, GTID, 0, 0, -1)
    assert enclave.transactions.state(1) == "READY"
    assert enclave.commit([1]) == {1: state}
    assert machine.calls[-1][1]["mask_len"] == 128


def test_transactions_that_are_not_over(machine: Kernel, enclave: Enclave) -> None:
    machine.verdict[1] = "CLAIMED"
    enclave.propose(1, GTID, 7)
    with pytest.raises(fs.BusyError, match="CPU 1 is READY"):
        enclave.propose(1, GTID, 8)
    assert enclave.commit([1], timeout=0.01) == {1: "CLAIMED"}
    enclave.transactions[1].state = -5
    with pytest.raises(fs.RingError, match="state -5"):
        enclave.transactions.state(1)
    with pytest.raises(fs.RingError, match=r"CPU 3: found version 0, CPU 0.*cpulist"):
        enclave.propose(3, GTID, 7)
    for cpu in (-1, 4):
        with pytest.raises(IndexError):
            enclave.propose(cpu, GTID, 7)
        with pytest.raises(IndexError):
            enclave.commit([cpu])


def test_groups(machine: Kernel, enclave: Enclave) -> None:
    for cpu in (0, 2):
        enclave.propose(cpu, GTID + cpu, 7, group=9)
    assert enclave.commit_group([0, 2]) == (True, {0: "COMPLETE", 2: "COMPLETE"})
    machine.verdict[2] = "TARGET_STALE"
    for cpu in (0, 2):
        enclave.propose(cpu, GTID + cpu, 7, group=9)
    enclave.transactions[0].state = -(1 << 31)
    with pytest.raises(fs.BusyError, match="group 9"):
        enclave.propose(0, GTID, 7)
    enclave.propose(0, GTID, 7, group=9)
    assert enclave.commit_group([0, 2]) == (False, {0: "POISONED", 2: "TARGET_STALE"})
    enclave.propose(0, GTID, 7)  # the group is dissolved
