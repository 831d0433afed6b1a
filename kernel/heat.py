"""The access monitor: which frames are in use. One thread of the gateway, which fills the heat array.

It works in windows of time, and only while somebody needs it. At the end of each it says of the frames that it looked at whether they were
touched within (``struct sy_heat``), and posts HEAT_READY. Where from, the best that the machine has:

* ``Damon``: the kernel's monitor on the RAM file's physical ranges (Documentation/admin-guide/mm/damon/usage.rst), if nobody else uses it;
* ``PageIdle``: idle bits by physical page (Documentation/admin-guide/mm/idle_page_tracking.rst);
* ``HintFaults``: pages are taken away for a touch to show, as AGE does; on every machine.

The first two look at the folios of the RAM file, as a rule of 2 MiB, and cost programs nothing; the last looks at single pages, and a page
that is in use costs a minor fault. CPU time, its own, the kernel's for it and what programs lose, is kept within a share of one core: the
hint faults become fewer, windows longer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bus.tables import FRAME_STATES, Tables
from kernel.abi import ffi, lib, names

WINDOW, LONGEST = 0.2, 60.0  # seconds
LOOK_AGAIN = 0.25  # seconds until it is asked again whether anybody needs us
FIRST, LEAST = 256, 16  # hint faults: frames sampled in the first window, and in any
# Seconds of CPU time, of everybody, that taking a page away costs, and touching it then (docs/decisions/0010 has how that was measured).
TAKEN, TOUCHED = 2e-5, 3e-5
AIM = 0.8  # of the limit: no window is like the one before
AT_ONCE = 1 << 14  # frames in one call: others wait for the gateway's lock meanwhile
SAMPLES = 20  # DAMON: samples in one window
REGIONS = 500  # DAMON: ranges, at most; what lies between is looked at, too, when there would be more
MAPPED = FRAME_STATES["mapped"]
NAMES = {value: name.lower() for value, name in names("SY_HEAT_").items()}
TAIL = 1 << 16  # KPF_COMPOUND_TAIL (linux/kernel-page-flags.h)

log = logging.getLogger("sylvie")


class NotHere(Exception):
    """This source cannot be used; says why, and what would help."""


@dataclass
class Looks:
    """What a window showed: ``pfns`` and which of them were ``touched``, both shape (n,); None: as the frame table says, if a
    frame's barrier is still that of ``barriers``."""

    pfns: NDArray[np.uint32]
    touched: NDArray[np.uint8] | None = None
    barriers: NDArray[np.uint32] | None = None


class Source:
    """Where looks come from. ``root`` is another place than / for tests.

    :raises NotHere: at start
    """

    id = lib.SY_HEAT_NONE
    amount = 0  # frames that the next window samples, if that can be chosen

    def start(self, frames: NDArray[np.void], window: float) -> None:
        """Before the first window after a pause."""

    def begin(self, frames: NDArray[np.void], window: float) -> None:
        """A window of so many seconds begins."""

    def end(self) -> Looks:
        """… and ends."""
        raise NotImplementedError

    def spent(self) -> float:
        """Seconds of CPU time, so far, beside this process's."""
        return 0.0

    def stop(self) -> None:
        """A pause, or the end: nothing goes on, and nothing is left behind."""


def _physical(frames: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Frames whose place in the machine is known: (physical page numbers ascending, their pfns)."""
    phys = frames["phys"].astype(np.int64)
    known = np.flatnonzero(phys)
    order = known[np.argsort(phys[known], kind="stable")]
    return phys[order], order


def runs(numbers: NDArray[np.int64], most: int = 0) -> list[tuple[int, int]]:
    """[from, to) of what follows without a gap in ascending ``numbers``; over the smallest gaps if there were more than ``most``."""
    if not len(numbers):
        return []
    gaps = np.diff(numbers)
    cuts = np.flatnonzero(gaps > 1)
    if most and len(cuts) >= most:
        cuts = np.sort(cuts[np.argsort(gaps[cuts], kind="stable")[len(cuts) - most + 1 :]])
    return list(zip(numbers[[0, *(cuts + 1)]].tolist(), (numbers[[*cuts, -1]] + 1).tolist(), strict=True))


class Damon(Source):
    """DAMON's sysfs interface. It serves one user at a time: one that somebody else has is left alone. What we had when we were killed, the
    record names, and the next of us takes it away."""

    id = lib.SY_HEAT_DAMON

    def __init__(self, root: Path = Path("/")) -> None:
        self.at = root / "sys/kernel/mm/damon/admin/kdamonds"
        self.record = root / "run/sylvie-damon.json"
        self.proc = root / "proc"
        self.kdamond = 0
        self.before = 0.0  # seconds that earlier kdamonds of ours took

    def _read(self, what: str) -> str:
        return (self.at / what).read_text().strip()

    def _write(self, what: str, value: int | str) -> None:
        (self.at / what).write_text(str(value))

    def _whose(self) -> tuple[int, int]:
        """(kdamond, the gateway it is for) as the record says; (0, 0): none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(self.record.read_text())
            return int(noted["kdamond"]), int(noted["gateway"])
        return 0, 0

    def check(self) -> None:
        """:raises NotHere: it is not there, or not free"""
        try:
            count = int(self._read("nr_kdamonds"))
        except FileNotFoundError:
            raise NotHere("not in this kernel (CONFIG_DAMON_SYSFS and CONFIG_DAMON_PADDR)") from None
        except OSError as error:
            raise NotHere(f"{error.strerror}: root may use it") from None
        if not count:
            return
        pid, (ours, gateway) = 0, self._whose()
        for i in range(count):
            with contextlib.suppress(OSError, ValueError):
                if self._read(f"{i}/state") == "on":
                    pid = int(self._read(f"{i}/pid"))
                    break
        if pid and pid == ours and count == 1:
            if (self.proc / str(gateway)).exists():
                raise NotHere(f"in use by an enclave (gateway PID {gateway}, kdamond PID {pid})")
            self._write("0/state", "off")  # of a gateway that was killed
            self._write("nr_kdamonds", 0)
            return
        raise NotHere(f"in use by somebody else ({f'kdamond PID {pid}' if pid else f'{count} set up, none running'})")

    def start(self, frames: NDArray[np.void], window: float) -> None:
        self.check()
        self.phys, self.pfns = _physical(frames)
        if not len(self.phys):
            raise NotHere("no frame's physical address is known: root may read /proc/self/pagemap")
        ranges = runs(self.phys, REGIONS)
        context, self.window = "0/contexts/0", window
        try:
            self._write("nr_kdamonds", 1)
            self._write("0/contexts/nr_contexts", 1)
            if "paddr" not in self._read(f"{context}/avail_operations").split():
                raise NotHere("this kernel's watches virtual addresses only (CONFIG_DAMON_PADDR)")
            self._write(f"{context}/operations", "paddr")
            self._intervals(window)
            self._write(f"{context}/monitoring_attrs/nr_regions/max", 2 * REGIONS)
            self._write(f"{context}/targets/nr_targets", 1)
            self._write(f"{context}/targets/0/regions/nr_regions", len(ranges))
            for i, (first, end) in enumerate(ranges):
                self._write(f"{context}/targets/0/regions/{i}/start", first * lib.SY_PAGE_SIZE)
                self._write(f"{context}/targets/0/regions/{i}/end", end * lib.SY_PAGE_SIZE)
            # A scheme that matches everything and does nothing but tell.
            self._write(f"{context}/schemes/nr_schemes", 1)
            self._write(f"{context}/schemes/0/action", "stat")
            for name, most in (("sz", 1 << 60), ("nr_accesses", 1 << 30), ("age", 1 << 30)):
                self._write(f"{context}/schemes/0/access_pattern/{name}/max", most)
            self._write("0/state", "on")
            self.kdamond = int(self._read("0/pid"))
            self.record.write_text(json.dumps({"kdamond": self.kdamond, "gateway": os.getpid()}))
        except (OSError, ValueError) as error:
            self._undo()
            raise NotHere(f"does not start: {error}") from None
        except NotHere:
            self._undo()
            raise

    def _intervals(self, window: float) -> None:
        at = "0/contexts/0/monitoring_attrs/intervals"
        self._write(f"{at}/sample_us", int(window * 1e6 / SAMPLES))
        self._write(f"{at}/aggr_us", int(window * 1e6))

    def begin(self, frames: NDArray[np.void], window: float) -> None:
        if abs(window - self.window) > self.window / 4:
            self.window = window
            self._intervals(window)
            self._write("0/state", "commit")

    def end(self) -> Looks:
        self._write("0/state", "update_schemes_tried_regions")
        at, rows = self.at / "0/contexts/0/schemes/0/tried_regions", []
        for region in at.iterdir():
            if region.name.isdigit():
                rows.append([int((region / name).read_text()) for name in ("start", "end", "nr_accesses")])
        if not rows:
            return Looks(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
        first, end, accesses = np.array(sorted(rows), np.int64).T
        place = self.phys * lib.SY_PAGE_SIZE
        which = np.searchsorted(first, place, side="right") - 1
        known = (which >= 0) & (place < end[which])
        return Looks(self.pfns[known].astype(np.uint32), (accesses[which[known]] > 0).astype(np.uint8))

    def spent(self) -> float:
        now = 0.0
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (self.proc / str(self.kdamond) / "stat").read_text().rpartition(")")[2].split()
            now = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return self.before + now

    def _undo(self) -> None:
        for what, value in (("0/state", "off"), ("nr_kdamonds", 0)):
            with contextlib.suppress(OSError):
                self._write(what, value)
        self.record.unlink(missing_ok=True)

    def stop(self) -> None:
        if self.kdamond:
            self.before = self.spent()
            self._undo()
            self.kdamond = 0


class PageIdle(Source):
    """The idle bit of each folio's first page: set when a window begins, clear at its end if it was touched."""

    id = lib.SY_HEAT_PAGE_IDLE

    def __init__(self, root: Path = Path("/")) -> None:
        self.bitmap, self.flags = root / "sys/kernel/mm/page_idle/bitmap", root / "proc/kpageflags"
        self.fd = -1

    def check(self) -> None:
        """:raises NotHere: it is not there"""
        if not self.bitmap.exists():
            raise NotHere("not in this kernel (CONFIG_IDLE_PAGE_TRACKING)")
        if not os.access(self.bitmap, os.W_OK) or not os.access(self.flags, os.R_OK):
            raise NotHere("root may use it")

    def start(self, frames: NDArray[np.void], window: float) -> None:
        self.check()
        phys, self.pfns = _physical(frames)
        if not len(phys):
            raise NotHere("no frame's physical address is known: root may read /proc/self/pagemap")
        try:
            tail = np.zeros(len(phys), np.bool_)
            with self.flags.open("rb") as f:
                for first, end in runs(phys):
                    f.seek(first * 8)
                    part = np.frombuffer(f.read((end - first) * 8), np.uint64)
                    at = int(np.searchsorted(phys, first))
                    tail[at : at + len(part)] = part & np.uint64(TAIL) != 0
            # The RAM file's folios are ours as a whole: the head of each tail is among these numbers.
            head = np.maximum.accumulate(np.where(tail, 0, phys))
            self.heads, self.of = np.unique(head, return_inverse=True)
            self.words, word = np.unique(self.heads // 64, return_inverse=True)
            self.bits = np.zeros(len(self.words), np.uint64)
            np.bitwise_or.at(self.bits, word, np.uint64(1) << (self.heads % 64).astype(np.uint64))
            self.word, self.pieces = word, runs(self.words)
            self.fd = os.open(self.bitmap, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NotHere(f"does not work: {error}") from None

    def begin(self, frames: NDArray[np.void], window: float) -> None:
        at = 0
        for first, end in self.pieces:
            os.pwrite(self.fd, self.bits[at : at + end - first].tobytes(), first * 8)
            at += end - first

    def end(self) -> Looks:
        read = b"".join(os.pread(self.fd, (end - first) * 8, first * 8) for first, end in self.pieces)
        idle = np.frombuffer(read, np.uint64)[self.word] >> (self.heads % 64).astype(np.uint64) & np.uint64(1)
        return Looks(self.pfns.astype(np.uint32), (idle == 0).astype(np.uint8)[self.of])

    def stop(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HintFaults(Source):
    """The mapped frames one after the other, round and round, some in each window.

    :param sample: of frames, shape (n,), those that could be taken away, and their barriers (``sy_gw_sample``)
    """

    id = lib.SY_HEAT_HINT

    def __init__(self, sample: Callable[[NDArray[np.uint32]], tuple[NDArray[np.uint32], NDArray[np.uint32]]]) -> None:
        self.sample, self.amount, self.hand = sample, FIRST, 0
        self.looks = Looks(np.zeros(0, np.uint32))

    def begin(self, frames: NDArray[np.void], window: float) -> None:
        found: list[NDArray[np.int64]] = []
        left, passed = self.amount, 0
        while left > 0 and passed < len(frames):
            part = frames["state"][self.hand : self.hand + min(4 * self.amount, len(frames) - passed)]
            mapped = np.flatnonzero(part == MAPPED)[:left]
            step = len(part) if len(mapped) < left else int(mapped[-1]) + 1
            found.append(self.hand + mapped)
            left, passed, self.hand = left - len(mapped), passed + step, (self.hand + step) % len(frames)
        pfns, barriers = self.sample(np.concatenate(found).astype(np.uint32))
        self.looks = Looks(pfns, barriers=barriers)

    def end(self) -> Looks:
        return self.looks


def sources(root: Path = Path("/")) -> list[tuple[str, str | None]]:
    """The best first: (name, why it cannot be used, None if it can). The first that can is used; the last always can."""
    found: list[tuple[str, str | None]] = []
    for source in (Damon(root), PageIdle(root)):
        try:
            source.check()
            found.append((NAMES[source.id], None))
        except NotHere as why:
            found.append((NAMES[source.id], str(why)))
    return [*found, (NAMES[HintFaults.id], None)]


class Monitor:
    """The thread. ``needed`` is asked before each window; ``limit``: the share of one core, 0 for no monitor at all."""

    def __init__(self, gw: Any, tables: Tables, limit: float, needed: Callable[[], bool], root: Path = Path("/")) -> None:
        self.gw, self.tables, self.limit, self.needed = gw, tables, limit, needed
        self.candidates: list[Source] = [Damon(root), PageIdle(root), HintFaults(self._sample)]
        self.why_not: dict[str, str] = {}
        self.source: Source | None = None
        self.window, self.cost = WINDOW, 0.0  # the next window's seconds; mean cost of the last, as a share of one core
        self.state = ffi.new("struct sy_monitor *", {"limit_ppm": int(limit * 1e6)})
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heat", daemon=True)

    def start(self) -> None:
        lib.sy_gw_monitor(self.gw, self.state)
        if self.limit > 0:
            self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def report(self) -> dict[str, Any]:
        """For ``sylvie status``."""
        m = self.tables.header.monitor
        return {
            "source": NAMES[m.source], "why_not": dict(self.why_not), "active": bool(m.active), "windows": m.windows,
            "window_ms": m.window_ms, "looked": m.looked, "touched": m.touched,
            "cost_percent": m.cost_ppm / 1e4, "limit_percent": m.limit_ppm / 1e4,
        }  # fmt: skip

    def _sample(self, pfns: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        barriers = np.zeros_like(pfns)
        n = lib.sy_gw_sample(self.gw, ffi.from_buffer("uint32_t[]", pfns), ffi.from_buffer("uint32_t[]", barriers), len(pfns))
        return pfns[:n], barriers[:n]

    def _run(self) -> None:
        while not self._stopping.wait(0 if self.source else LOOK_AGAIN):
            try:
                if self.needed():
                    self._one_window()
                elif self.source:
                    self._pause()
            except (OSError, ValueError) as error:  # what was there has gone: what else is there?
                log.warning("access monitor: %s", error)
                self._pause()
        self._pause()

    def _pause(self) -> None:
        if self.source:
            self.source.stop()
        self.source, self.state.active = None, 0
        lib.sy_gw_monitor(self.gw, self.state)

    def _choose(self) -> Source:
        self.why_not = {}
        for source in self.candidates:
            try:
                source.start(self.tables.frames, self.window)
            except NotHere as why:
                self.why_not[NAMES[source.id]] = str(why)
            else:
                if self.state.source != source.id:
                    log.info("access monitor: %s", NAMES[source.id])
                self.state.source, self.state.active = source.id, 1
                self.populated = self.tables.header.populated
                return source
        raise AssertionError("hint faults are always there")

    def _one_window(self) -> None:
        began, thread = time.monotonic(), time.thread_time()
        if self.source and self.populated != self.tables.header.populated:
            self._pause()  # there are more frames now
        source = self.source = self.source or self._choose()
        elsewhere = source.spent()
        source.begin(self.tables.frames, self.window)
        lib.sy_gw_monitor(self.gw, self.state)
        self._stopping.wait(self.window)
        taken = int(self.tables.header.counters[lib.SY_CNT_SAMPLED])
        self.state.looked, self.state.touched = self._look(source, source.end())
        hints = taken - self._sampled, self.state.touched
        self._sampled = taken
        spent = time.thread_time() - thread + source.spent() - elsewhere
        if source.id == lib.SY_HEAT_HINT:
            spent += TAKEN * hints[0] + TOUCHED * hints[1]
        self._adapt(source, spent)
        if (rest := spent / self.limit - (time.monotonic() - began)) > 0:  # too dear: a break before the next
            self._stopping.wait(rest)
        elapsed = time.monotonic() - began
        self.cost += (spent / elapsed - self.cost) / 4
        self.state.windows += 1
        self.state.window_ms, self.state.cost_ppm = int(elapsed * 1e3), int(self.cost * 1e6)
        lib.sy_gw_monitor(self.gw, self.state)

    _sampled = 0  # counter of that name when the last window ended

    def _look(self, source: Source, looks: Looks) -> tuple[int, int]:
        """Into the heat array: (frames looked at, touched)."""
        looked, touched, out = 0, 0, ffi.new("uint32_t *")

        def column(values: NDArray[Any] | None, kind: str, at: int) -> Any:
            return ffi.NULL if values is None else ffi.from_buffer(kind, np.ascontiguousarray(values[at : at + AT_ONCE]))

        for at in range(0, len(looks.pfns), AT_ONCE):
            pfns = column(looks.pfns, "uint32_t[]", at)
            touched += lib.sy_gw_look(
                self.gw, pfns, column(looks.barriers, "uint32_t[]", at), column(looks.touched, "uint8_t[]", at), len(pfns), source.id, out
            )
            looked += out[0]
        return looked, touched

    def _adapt(self, source: Source, spent: float) -> None:
        """The next window costs what it may: as much more or less as is sampled; when that is little already, it lasts longer."""
        share = AIM * self.limit * self.window / max(spent, 1e-9)
        if source.amount:
            source.amount = max(LEAST, min(int(source.amount * min(max(share, 0.5), 2.0)), AT_ONCE))
        if share < 1 and source.amount in (0, LEAST):
            self.window = min(self.window / share, LONGEST)
        elif share > 1:
            self.window = max(WINDOW, self.window / min(share, 2.0))
