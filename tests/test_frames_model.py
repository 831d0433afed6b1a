"""The life of frames against a model: a gateway in this process, clients that play the stub (and lie), buddy's transactions."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import wait_for
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kernel.abi import FRAME_DTYPE, MSG_DTYPE, OP_DTYPE, ffi, lib, names

FREE, GRANTED, MAPPED, RESERVED = lib.SY_FRAME_FREE, lib.SY_FRAME_GRANTED, lib.SY_FRAME_MAPPED, lib.SY_FRAME_RESERVED
FRAMES = 8192  # 32 MiB
PS = lib.SY_PAGE_SIZE
RESULT = names("SY_R_")
# A process whose memory the userfaultfd is about: makes one, hands it over, and waits for its end.
HELPER = """
import ctypes, os, socket, sys
fd = ctypes.CDLL(None, use_errno=True).syscall(323, os.O_CLOEXEC)
s = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(s, [b'u'], [fd])
s.recv(1)
"""


class Real:
    """A gateway in this process and what can be read from it. ``swap``: bytes of a store."""

    def __init__(self, run_dir: Path, swap: int = 0) -> None:
        self.run_dir = run_dir
        err = ffi.new("char[]", 500)
        self.gw = lib.sy_gw_new(str(run_dir).encode(), FRAMES * PS, 1, err, 500)
        assert self.gw != ffi.NULL, ffi.string(err)
        assert not swap or lib.sy_gw_set_swap(self.gw, str(run_dir / "swap").encode(), swap, 0) == 0
        assert lib.sy_gw_start(self.gw) == 0
        table = mmap.mmap(lib.sy_gw_frames_fd(self.gw), FRAMES * FRAME_DTYPE.itemsize, prot=mmap.PROT_READ)
        self.frames = np.frombuffer(table, FRAME_DTYPE, FRAMES)
        self.seq: int | None = None

    def check(self) -> str:
        """The violations; empty when there are none."""
        text = ffi.new("char[]", 8192)
        n = lib.sy_gw_check(self.gw, text, 8192)
        return f"{n}: {ffi.string(text).decode()}" if n else ""

    def events(self) -> np.ndarray:
        """All that wait; their numbers must be without a gap."""
        out = np.zeros(4096, MSG_DTYPE)
        got = []
        while n := lib.sy_gw_events(self.gw, ffi.from_buffer("struct sy_msg[]", out), len(out)):
            got.append(out[:n].copy())
        every = np.concatenate(got) if got else out[:0]
        if len(every):
            first = every["seqnum"][0] if self.seq is None else self.seq + 1
            assert (every["seqnum"] == np.arange(first, first + len(every))).all()
            self.seq = int(every["seqnum"][-1])
        return every

    def commit(self, component: int = lib.SY_C_BUDDY, **op: int) -> str:
        ops = np.zeros(1, OP_DTYPE)
        for k, v in op.items():
            ops[0][k] = v
        done = lib.sy_gw_commit(self.gw, component, ffi.from_buffer("struct sy_op[]", ops), 1)
        result = RESULT[int(ops["result"][0])]
        assert done == (result == "COMPLETE")
        return result

    def spaces(self) -> dict[int, Any]:
        out = ffi.new("struct sy_as_info[]", 64)
        n = lib.sy_gw_as_list(self.gw, out, 64)
        return {out[i].asid: ffi.new("struct sy_as_info *", out[i])[0] for i in range(n)}  # copies: out goes


class Client:
    """Joins as a stub does. Its address space is that of a helper process, so that it can die."""

    def __init__(self, real: Real) -> None:
        self.real = real
        mine, its = socket.socketpair()
        with mine, its:
            self.helper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", HELPER, str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
            )
            self.keep = mine.dup()  # its read() ends with us
            mine.settimeout(20)
            _, fds, _, _ = socket.recv_fds(mine, 1, 1)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(str(real.run_dir / "gateway.sock"))
        hello = ffi.new("struct sy_hello *", (lib.SY_MAGIC, lib.SY_ABI_VERSION, lib.SY_HELLO_STUB, 0))
        socket.send_fds(self.sock, [bytes(ffi.buffer(hello))], fds)
        os.close(fds[0])
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 16)
        welcome = ffi.from_buffer("struct sy_welcome[]", data)[0]
        assert welcome.status == lib.SY_W_OK and welcome.nodes == 1 and len(fds) == 6
        self.asid = int(welcome.asid)
        self.memory = mmap.mmap(fds[0], lib.SY_AS_BYTES)
        self.mag_memory = mmap.mmap(fds[1], lib.SY_MAG_BYTES, prot=mmap.PROT_READ)
        with pytest.raises(OSError):
            mmap.mmap(fds[1], lib.SY_MAG_BYTES)  # the magazine is not ours to write
        self.ram = np.frombuffer(mmap.mmap(fds[5], FRAMES * PS), np.uint8).reshape(FRAMES, PS)
        for fd in fds:
            os.close(fd)
        base = ffi.cast("char *", ffi.from_buffer(self.memory, require_writable=True))
        self.ctl = ffi.cast("struct sy_as_ctl *", base + lib.SY_AS_CTL_OFF)
        self.chunks = ffi.cast("uint8_t *", base + lib.SY_AS_CHUNKS_OFF)
        self.channel = ffi.cast("struct sy_channel *", base + lib.SY_AS_CHANNEL_OFF)
        self.pte = ffi.cast("uint64_t *", base + lib.SY_AS_PTE_OFF)
        self.mag = ffi.cast("struct sy_mag *", ffi.from_buffer(self.mag_memory))
        assert (self.mag.magic, self.mag.asid) == (lib.SY_MAGIC, self.asid)
        self.tails = [0] * 10  # of the rings, as far as the model has seen them
        self.runs: list[tuple[int, int, int]] = []  # mapped: vpage, pfn, pages
        self.next_vpage = 512 * self.asid
        self.hung_up = False

    def post(self, kind: int, **fields: int) -> None:
        """The channel's protocol, for one producer (this machine's stores stay in order)."""
        h = self.channel.head
        slot = self.channel.slots[h % lib.SY_CHANNEL_SLOTS]
        wait_for(lambda: slot.turn == h, 5, "the channel is full")
        self.channel.head = h + 1
        slot.msg = {"type": kind, "length": 40, "seqnum": self.channel.seqnum, "asid": 0xDEAD, **fields}
        self.channel.seqnum += 1
        slot.turn = h + 1

    def fresh(self) -> list[tuple[int, int]]:
        """Blocks (pfn, order) that have come into the magazine since the last look."""
        out = []
        for order in range(10):
            r = self.mag.ring[order]
            while self.tails[order] != r.tail:
                out.append((int(r.slot[self.tails[order] % lib.SY_MAG_SLOTS]), order))
                self.tails[order] += 1
        return out

    def level(self, order: int) -> int:
        return int(self.mag.ring[order].tail - self.ctl.mag_head[order])

    def nearest(self, order: int) -> int:
        """That order or the nearest of which the magazine has blocks; -1: it is empty."""
        return min((o for o in range(10) if self.level(o)), key=lambda o: abs(o - order), default=-1)

    def pop(self, order: int) -> int:
        h = self.ctl.mag_head[order]
        pfn = int(self.mag.ring[order].slot[h % lib.SY_MAG_SLOTS])
        self.ctl.in_hand_order[0], self.ctl.in_hand[0] = order, pfn
        self.ctl.mag_head[order] = h + 1
        return pfn

    def write_pte(self, vpage: int, pfn: int, n: int, state: int) -> None:
        for i in range(n):
            self.chunks[(vpage + i) // lib.SY_CHUNK_PAGES] = 1
            self.pte[vpage + i] = ((pfn + i) << lib.SY_PTE_PFN_SHIFT) | state

    def map(self, pfn: int, order: int, n: int) -> int:
        """As first_touch() of the stub. Returns the vpage."""
        vpage = self.next_vpage
        self.next_vpage += n
        self.write_pte(vpage, pfn, n, lib.SY_PTE_LOCKED | lib.SY_PTE_HASFRAME)
        self.ctl.in_hand[0] = lib.SY_NO_FRAME
        self.ram[pfn : pfn + n] = self.asid % 251 + 1
        self.post(lib.SY_MSG_PAGE_MAPPED, vpage=vpage, pfn=pfn, npages=n, order=order)
        self.write_pte(vpage, pfn, n, lib.SY_PTE_PRESENT)
        self.runs.append((vpage, pfn, n))
        return vpage

    def clear(self, vpage: int, n: int) -> None:
        for i in range(n):
            self.pte[vpage + i] = lib.SY_PTE_STALE

    def move(self, at: int) -> tuple[int, int, int]:
        """As mremap() of the stub, to where nothing was: that run, as it is now."""
        vpage, pfn, n = self.runs.pop(at)
        new = self.next_vpage
        self.next_vpage += n
        self.write_pte(new, pfn, n, lib.SY_PTE_LOCKED | lib.SY_PTE_HASFRAME)
        self.clear(vpage, n)
        self.post(lib.SY_MSG_PAGE_MOVED, vpage=new, pfn=pfn, npages=n)
        self.write_pte(new, pfn, n, lib.SY_PTE_PRESENT)
        self.runs.append((new, pfn, n))
        return self.runs[-1]

    def bad_claims(self) -> int:
        return int(self.real.spaces()[self.asid].bad_claims)

    def hang_up(self) -> None:
        if not self.hung_up:
            self.sock.close()
            self.hung_up = True

    def die(self) -> None:
        """The process ends, then its memory, and with it the address space."""
        self.hang_up()
        self.helper.kill()
        self.helper.wait(10)
        self.keep.close()
        wait_for(lambda: self.asid not in self.real.spaces(), 10, f"address space {self.asid} stays")


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    assert os.geteuid() == 0, "userfaultfd needs root: sudo make test"
    run_dir = Path(tempfile.mkdtemp(prefix="sy-"))
    r = Real(run_dir)
    yield r
    lib.sy_gw_stop(r.gw)
    shutil.rmtree(run_dir)


orders = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 4, 5, 9])
places = st.integers(0, FRAMES - 1)
which = st.integers(0, 5)
seldom = st.sampled_from([False, False, False, False, True])


class Machine(RuleBasedStateMachine):
    """``state`` and ``owner`` are what the frame table must say."""

    real: Real

    def __init__(self) -> None:
        super().__init__()
        self.state = np.full(FRAMES, FREE, np.uint8)
        self.owner = np.zeros(FRAMES, np.uint32)
        self.vpage = np.zeros(FRAMES, np.uint64)
        self.reserve: list[list[int]] = [[] for _ in range(lib.SY_MAX_ORDER + 1)]
        self.clients: list[Client] = []
        self.real.events()

    def put(self, pfn: int, n: int, state: int, owner: int = 0, vpage: int | None = None) -> None:
        self.state[pfn : pfn + n], self.owner[pfn : pfn + n] = state, owner
        self.vpage[pfn : pfn + n] = 0 if vpage is None else np.arange(vpage, vpage + n)

    def barrier(self, pfn: int) -> int:
        return int(self.real.frames["barrier"][pfn])

    def client(self, i: int) -> Client:
        return self.clients[i % len(self.clients)]

    def live(self, i: int) -> Client | None:
        talking = [c for c in self.clients if not c.hung_up]
        return talking[i % len(talking)] if talking else None

    def settle(self) -> None:
        """The gateway carries out what is in the channels."""
        assert self.real.check() == ""

    # ---- what the gateway gives of itself

    def expect_given(self, c: Client) -> int:
        """Takes note of new blocks in the magazine: from the reserve's stack as long as it has any, else FREE ones."""
        blocks = c.fresh()
        for pfn, order in blocks:
            o = next((o for o in range(order, lib.SY_MAX_ORDER + 1) if self.reserve[o]), None)
            if o is not None:
                assert self.reserve[o].pop() == pfn
                while o > order:
                    o -= 1
                    self.reserve[o].append(pfn + (1 << o))
            wanted = FREE if o is None else RESERVED
            n = 1 << order
            assert pfn % n == 0 and (self.state[pfn : pfn + n] == wanted).all(), (pfn, order)
            assert not c.ram[pfn : pfn + n].any(), f"block {pfn} of order {order} is not zero"
            self.put(pfn, n, GRANTED, c.asid)
        return len(blocks)

    @initialize()
    def two_programs_start(self) -> None:
        self.join()
        self.join()

    @precondition(lambda self: len(self.clients) < 3)
    @rule()
    def join(self) -> None:
        c = Client(self.real)
        self.clients.append(c)
        assert self.expect_given(c) == 28

    @rule(i=which, order=orders)
    def refill(self, i: int, order: int) -> None:
        c = self.live(i)
        # Enough must be free for every block to be had at its own order.
        if (
            not c
            or order > 4
            or np.count_nonzero(self.state.reshape(-1, 16).max(axis=1) == FREE) < 64
            or c.level(order) > 400
        ):
            return
        seq = c.mag.refill_seq
        request = ffi.new("struct sy_request *", {"kind": lib.SY_REQ_REFILL, "order": order})
        c.sock.send(bytes(ffi.buffer(request)))
        wait_for(lambda: c.mag.refill_seq != seq, 5, "no answer to a refill")
        assert c.mag.no_frames == 0
        assert self.expect_given(c) == (16 if order >= 4 else 32)

    # ---- buddy

    @rule(
        i=which,
        order=orders | st.integers(0, 11),
        place=places,
        off=st.sampled_from([0, 0, 0, 0, 1, -1]),
        aligned=st.sampled_from([True, True, True, False]),
    )
    def grant(self, i: int, order: int, place: int, off: int, aligned: bool) -> None:
        if not self.clients:
            return
        c = self.client(i)
        n = 1 << order
        pfn = place & ~(n - 1) if aligned else place
        barrier = (self.barrier(pfn) + off) % (1 << 32)
        if order > lib.SY_HUGE_ORDER or pfn % n:
            expected = "INVALID"
        elif c.hung_up and self.dying(c):
            expected = "NOT_FOUND"
        elif off or not (self.state[pfn : pfn + n] == FREE).all():
            expected = "STALE"
        elif order == 9 and np.count_nonzero(self.state == FREE) < 3000:
            return
        else:
            expected = "COMPLETE"
        got = self.real.commit(op=lib.SY_OP_GRANT, asid=c.asid, pfn=pfn, order=order, barrier=barrier)
        assert got == expected, (pfn, order)
        if got == "COMPLETE":
            assert c.fresh() == [(pfn, order)]
            assert not c.ram[pfn : pfn + n].any(), f"block {pfn} of order {order} is not zero"
            self.put(pfn, n, GRANTED, c.asid)

    @rule(place=places, order=st.integers(0, 11), off=st.sampled_from([0, 0, 0, 1]))
    def reserve_block(self, place: int, order: int, off: int) -> None:
        n = 1 << order
        pfn = place & ~(n - 1)
        if np.count_nonzero(self.state == RESERVED) + n > FRAMES // 4:
            return
        barrier = self.barrier(pfn) + off
        free = (self.state[pfn : pfn + n] == FREE).all()
        expected = "INVALID" if order > lib.SY_MAX_ORDER else "COMPLETE" if free and not off else "STALE"
        assert self.real.commit(op=lib.SY_OP_RESERVE, pfn=pfn, order=order, barrier=barrier) == expected
        if expected == "COMPLETE":
            self.reserve[order].append(pfn)
            self.put(pfn, n, RESERVED)

    @rule(i=which, order=st.integers(0, 10), off=st.sampled_from([0, 0, 1]))
    def release_block(self, i: int, order: int, off: int) -> None:
        if not self.reserve[order]:
            return
        stack = self.reserve[order]
        at = i % len(stack)
        pfn = stack[at]
        got = self.real.commit(op=lib.SY_OP_RELEASE, pfn=pfn, order=order, barrier=self.barrier(pfn) + off)
        assert got == ("STALE" if off else "COMPLETE")
        if not off:
            stack[at] = stack[-1]
            stack.pop()
            self.put(pfn, 1 << order, FREE)

    @rule(place=places, order=st.integers(0, 10))
    def release_what_is_not_reserved(self, place: int, order: int) -> None:
        pfn = place & ~((1 << order) - 1)
        if pfn not in self.reserve[order]:
            got = self.real.commit(op=lib.SY_OP_RELEASE, pfn=pfn, order=order, barrier=self.barrier(pfn))
            assert got == "NOT_FOUND"

    @precondition(lambda self: self.clients)
    @rule(place=places, component=st.sampled_from([0, 2, 3, 4, 5, 6, 7]), op=st.sampled_from([1, 2, 3]))
    def others_may_not(self, place: int, component: int, op: int) -> None:
        asid = self.clients[0].asid if self.clients else 1
        assert self.real.commit(component, op=op, asid=asid, pfn=place, barrier=self.barrier(place)) == "NOT_PERMITTED"

    # ---- the stub

    @rule(i=which, order=orders, used=st.integers(1, 512), part=st.booleans())
    def take_and_map(self, i: int, order: int, used: int, part: bool) -> None:
        c = self.live(i)
        if not c or (order := c.nearest(order)) < 0:
            return
        pfn, n = c.pop(order), 1 << order
        assert not c.ram[pfn : pfn + n].any()
        k = min(used, n) if part else n
        vpage = c.map(pfn, order, k)
        self.put(pfn, k, MAPPED, c.asid, vpage)
        if k < n:
            c.post(lib.SY_MSG_PAGE_FREED, vpage=lib.SY_ARENA_PAGES, pfn=pfn + k, npages=n - k)
            self.put(pfn + k, n - k, FREE)

    @rule(i=which, order=orders)
    def take_and_give_back(self, i: int, order: int) -> None:
        c = self.live(i)
        if not c or (order := c.nearest(order)) < 0:
            return
        pfn, n = c.pop(order), 1 << order
        c.ram[pfn : pfn + n] = 255
        c.ctl.in_hand[0] = lib.SY_NO_FRAME
        c.post(lib.SY_MSG_PAGE_FREED, vpage=lib.SY_ARENA_PAGES, pfn=pfn, npages=n)
        self.put(pfn, n, FREE)

    @precondition(lambda self: any(c.runs and not c.hung_up for c in self.clients))
    @rule(i=which, j=st.integers(0, 50), lo=st.integers(0, 511), count=st.integers(1, 512))
    def unmap(self, i: int, j: int, lo: int, count: int) -> None:
        c = self.live(i)
        if not c or not c.runs:
            return
        vpage, pfn, n = c.runs.pop(j % len(c.runs))
        assert (c.ram[pfn : pfn + n] == c.asid % 251 + 1).all()  # what it wrote, it reads
        lo %= n
        count = min(count, n - lo)
        c.clear(vpage + lo, count)
        c.post(lib.SY_MSG_PAGE_FREED, vpage=vpage + lo, pfn=pfn + lo, npages=count)
        self.put(pfn + lo, count, FREE)
        if lo:
            c.runs.append((vpage, pfn, lo))
        if lo + count < n:
            c.runs.append((vpage + lo + count, pfn + lo + count, n - lo - count))

    @precondition(lambda self: any(c.runs and not c.hung_up for c in self.clients))
    @rule(i=which, j=st.integers(0, 50))
    def move(self, i: int, j: int) -> None:
        c = self.live(i)
        if not c or not c.runs:
            return
        new, pfn, n = c.move(j % len(c.runs))
        self.put(pfn, n, MAPPED, c.asid, new)

    @rule(i=which, order=st.integers(0, 9))
    def harmless_words(self, i: int, order: int) -> None:
        if c := self.live(i):
            c.post(lib.SY_MSG_MAGAZINE_LOW, order=order, npages=12345)
            c.post(lib.SY_MSG_MM_MMAP, vpage=2**63, npages=2**32 - 1, pfn=2**32 - 1)

    # ---- lies

    @rule(i=which, place=places, n=st.integers(1, 40), kind=st.sampled_from(["MAPPED", "FREED", "MOVED"]))
    def claim_what_is_not_ours(self, i: int, place: int, n: int, kind: str) -> None:
        """Other clients' frames, FREE ones, RESERVED ones, or in the wrong order of events."""
        c = self.live(i)
        if not c:
            return
        states = {"MAPPED": [GRANTED], "FREED": [GRANTED, MAPPED], "MOVED": [MAPPED]}[kind]
        run = slice(place, place + n)
        if place + n <= FRAMES and (self.owner[run] == c.asid).all() and np.isin(self.state[run], states).all():
            return  # it would be true
        self.refused(c, getattr(lib, f"SY_MSG_PAGE_{kind}"), vpage=7, pfn=place, npages=n, order=9)

    @rule(i=which, j=st.integers(0, 50), kind=st.sampled_from(["again", "range", "beyond", "wrap"]))
    def claim_for_mapped_frames(self, i: int, j: int, kind: str) -> None:
        c = self.live(i)
        if not c or not c.runs:
            return
        vpage, pfn, n = c.runs[j % len(c.runs)]
        moved = lib.SY_MSG_PAGE_MOVED
        if kind == "again":
            self.refused(c, lib.SY_MSG_PAGE_MAPPED, vpage=vpage, pfn=pfn, npages=n, order=9)
        elif kind == "range":
            self.refused(c, moved, vpage=lib.SY_ARENA_PAGES - n + 1, pfn=pfn, npages=n)
        elif kind == "beyond":
            self.refused(c, moved, vpage=lib.SY_ARENA_PAGES, pfn=pfn, npages=n)
        else:
            self.refused(c, moved, vpage=2**64 - n, pfn=pfn, npages=n)

    @rule(
        i=which,
        lie=st.sampled_from([
            {"npages": 0}, {"npages": 2}, {"order": 10}, {"order": 65535}, {"vpage": 1 << 24}, {"vpage": 2**64 - 1},
            {"pfn": FRAMES}, {"pfn": 2**32 - 1}, {"npages": 2**32 - 1}, {"type": 0}, {"type": 65535},
            {"type": lib.SY_MSG_MM_EXIT}, {"type": lib.SY_MSG_FRAMES_ONLINE},
        ]),
    )  # fmt: skip
    def malformed(self, i: int, lie: dict[str, int]) -> None:
        """One thing wrong with an otherwise true claim."""
        c = self.live(i)
        if not c or not c.level(0):
            return
        head = c.ctl.mag_head[0] % lib.SY_MAG_SLOTS
        claim = {"type": lib.SY_MSG_PAGE_MAPPED, "vpage": 3, "pfn": int(c.mag.ring[0].slot[head]), "npages": 1} | lie
        self.refused(c, claim.pop("type"), **claim)

    def refused(self, c: Client, kind: int, **claim: int) -> None:
        before = c.bad_claims()
        c.post(kind, **claim)
        self.settle()
        assert c.bad_claims() == before + 1, claim

    @rule(i=which, order=st.integers(0, 9), by=st.sampled_from([1, 600, 2**31, 2**32 - 1]))
    def false_head(self, i: int, order: int, by: int) -> None:
        """It claims to have taken more than there was, or less than before."""
        c = self.live(i)
        if not c:
            return
        true = c.ctl.mag_head[order]
        level = c.level(order)
        if self.real.spaces()[c.asid].mag_level[order] != level or (by == 1 and level):
            return
        before = c.bad_claims()
        c.ctl.mag_head[order] = (true + by) % 2**32
        if by != 2**32 - 1 or true:
            assert self.real.spaces()[c.asid].mag_level[order] == level
            assert c.bad_claims() > before
        c.ctl.mag_head[order] = true

    # ---- ends

    def dying(self, c: Client) -> bool:
        """The gateway has noticed that it hung up."""
        return bool(wait_for(lambda: self.real.spaces()[c.asid].state == 1, 5, "a hang-up is not noticed"))

    @rule(i=which, really=seldom)
    def hang_up(self, i: int, really: bool) -> None:
        """Frames stay: its memory is there yet, and somebody in it may touch them."""
        if really and (c := self.live(i)):
            c.hang_up()
            assert self.dying(c)

    @rule(i=which, really=seldom)
    def die(self, i: int, really: bool) -> None:
        if really and self.clients:
            self.bury(self.client(i))

    def bury(self, c: Client) -> None:
        c.die()
        self.clients.remove(c)
        mine = self.owner == c.asid
        self.state[mine], self.owner[mine], self.vpage[mine] = FREE, 0, 0

    # ---- always

    @invariant()
    def table_is_as_the_model_says(self) -> None:
        self.settle()
        f = self.real.frames
        for name, model in (("state", self.state), ("asid", self.owner), ("vpage", self.vpage)):
            wrong = np.flatnonzero(f[name] != model)
            assert not len(wrong), f"{name} of frames {wrong[:10]}: {f[name][wrong[:10]]}, model {model[wrong[:10]]}"
        assert (f["refcount"] == (self.state == MAPPED)).all()
        levels = ffi.new("uint32_t[]", lib.SY_MAX_ORDER + 1)
        lib.sy_gw_reserve_levels(self.real.gw, levels)
        assert list(levels) == [len(stack) for stack in self.reserve]
        spaces = self.real.spaces()
        assert set(spaces) == {c.asid for c in self.clients}
        for c in self.clients:
            assert spaces[c.asid].frames == np.count_nonzero(self.owner == c.asid)
            assert spaces[c.asid].mapped == np.count_nonzero((self.owner == c.asid) & (self.state == MAPPED))
        self.real.events()

    def teardown(self) -> None:
        for c in list(self.clients):
            self.bury(c)
        for order, stack in enumerate(self.reserve):
            for pfn in list(stack):
                self.real.commit(op=lib.SY_OP_RELEASE, pfn=pfn, order=order, barrier=self.barrier(pfn))
        assert self.real.check() == "" and (self.real.frames["state"] == FREE).all()


def test_frames_follow_the_model(real: Real) -> None:
    bound = type("Bound", (Machine,), {"real": real})
    run_state_machine_as_test(
        bound,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_what_stood_by_and_moved_may_do_so_again() -> None:
    """A page that mremap has moved while it stood by leaves by what is said of it from then on, and is not passed over."""
    run_dir = Path(tempfile.mkdtemp(prefix="sy-"))
    r = Real(run_dir, swap=64 * PS)
    c = Client(r)
    try:
        c.fresh()
        pfn = c.pop(0)
        c.map(pfn, 0, 1)
        wait_for(lambda: r.frames["state"][pfn] == MAPPED, 5, "it is not mapped")
        assert r.check() == ""

        def stand_by() -> str:
            return r.commit(lib.SY_C_KSWAPD, op=lib.SY_OP_RECLAIM, pfn=pfn, barrier=int(r.frames["barrier"][pfn]), arg=lib.SY_RECLAIM_STANDBY)

        assert (stand_by(), stand_by()) == ("COMPLETE", "STALE")
        new = c.move(0)[0]
        wait_for(lambda: r.frames["vpage"][pfn] == new, 5, "it has not moved")
        assert r.check() == ""  # (under the lock: its barrier is new, too)
        assert stand_by() == "COMPLETE"
    finally:
        c.die()
        lib.sy_gw_stop(r.gw)
        shutil.rmtree(run_dir)


def test_lost_messages_are_made_up_for(real: Real) -> None:
    """A message that found the channel full is lost; the page table says what it would have said."""
    c = Client(real)
    try:
        c.fresh()
        first, second, third = c.pop(4), c.pop(4), c.pop(4)
        at = c.map(first, 4, 16)
        assert real.check() == ""
        c.clear(at, 16)  # PAGE_FREED of the first is lost
        c.write_pte(9000, second, 16, lib.SY_PTE_PRESENT)  # and PAGE_MAPPED of the second
        c.ctl.in_hand[1], c.ctl.in_hand_order[1] = third, 4  # still in a hand: must stay
        c.channel.overflow += 2
        state = real.frames["state"]
        wait_for(lambda: (state[first : first + 16] == FREE).all(), 5, "frames are lost")
        assert (state[second : second + 16] == MAPPED).all()
        assert (state[third : third + 16] == GRANTED).all()
        assert (real.frames["vpage"][second : second + 16] == np.arange(9000, 9016)).all()
        assert real.check() == ""
        assert real.spaces()[c.asid].overflow == 2
        assert lib.SY_MSG_OVERFLOW in real.events()["type"]
    finally:
        c.die()


def test_refills_of_a_full_magazine(real: Real) -> None:
    """Buddy may have filled it since the stub asked: no lie, but nothing is taken from the reserve for them, and nobody is told that memory has run out."""
    c = Client(real)
    try:
        for pfn in range(FRAMES - 64, FRAMES):
            barrier = int(real.frames["barrier"][pfn])
            assert real.commit(op=lib.SY_OP_RESERVE, pfn=pfn, order=0, barrier=barrier) == "COMPLETE"
        request = bytes(ffi.buffer(ffi.new("struct sy_request *", {"kind": lib.SY_REQ_REFILL, "order": 0})))

        def refill() -> None:
            seq = c.mag.refill_seq
            c.sock.send(request)
            wait_for(lambda: c.mag.refill_seq != seq, 5, "no answer to a refill")

        while c.level(0) < lib.SY_MAG_SLOTS:
            refill()
        for pfn in np.flatnonzero(real.frames["state"] == FREE)[:40].tolist():
            real.commit(op=lib.SY_OP_RESERVE, pfn=pfn, order=0, barrier=int(real.frames["barrier"][pfn]))
        real.events()
        bad, reserved = c.bad_claims(), np.count_nonzero(real.frames["state"] == RESERVED)
        assert reserved >= 40
        for _ in range(20):
            refill()
        assert np.count_nonzero(real.frames["state"] == RESERVED) == reserved
        assert c.bad_claims() == bad and c.mag.no_frames == 0
        assert lib.SY_MSG_OOM not in real.events()["type"]
    finally:
        c.die()
        for pfn in np.flatnonzero(real.frames["state"] == RESERVED).tolist():
            real.commit(op=lib.SY_OP_RELEASE, pfn=pfn, order=0, barrier=int(real.frames["barrier"][pfn]))
    assert real.check() == ""


def test_garbage_in_everything_a_client_may_write(real: Real) -> None:
    """Control page, channel and page table full of noise: the gateway's own tables stay sound."""
    rng = np.random.default_rng(1)
    c, good = Client(real), Client(real)
    try:
        good.fresh()
        pfn = good.pop(4)
        good.map(pfn, 4, 16)
        assert real.check() == ""
        noise = np.frombuffer(c.memory, np.uint8)[: lib.SY_AS_PTE_OFF + (1 << 16)]
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            noise[:] = rng.integers(0, 256, len(noise), np.uint8)
            with contextlib.suppress(BlockingIOError):
                c.sock.send(rng.bytes(int(rng.integers(1, 60))), socket.MSG_DONTWAIT)
            real.events()
            real.spaces()
            f = real.frames
            assert (f["asid"][pfn : pfn + 16] == good.asid).all() and (f["state"][pfn : pfn + 16] == MAPPED).all()
    finally:
        c.die()
    assert real.check() == ""
    good.die()
    assert real.check() == "" and (real.frames["state"] == FREE).all()


def test_check_names_what_is_broken(real: Real) -> None:
    """Words that name frames which are not theirs, and frames whose word was taken away, are found and named."""
    a, b = Client(real), Client(real)
    try:
        pfn = a.pop(0)
        vpage = a.map(pfn, 0, 1)
        assert real.check() == ""
        b.write_pte(77, pfn, 1, lib.SY_PTE_PRESENT)
        assert f"page 77 of address space {b.asid} names frame {pfn}" in real.check()
        b.clear(77, 1)
        assert real.check() == ""
        a.clear(vpage, 1)
        assert f"frame {pfn} is MAPPED for address space {a.asid} at page {vpage}" in real.check()
    finally:
        a.die()
        b.die()
