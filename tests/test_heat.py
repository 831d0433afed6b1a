"""The access monitor: what it finds out, from where, what it costs, and that nobody notices."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SYLVIE, Enclave, bring_up, module_enclave_of, take_down, wait_for
from numpy.typing import NDArray
from test_frames_model import Client, Real
from test_swap import lost_nothing, natively, swapped, tables, waiting

from bus.client import Control, subscriber
from bus.codec import decode_batch
from kernel.abi import FRAME_DTYPE, lib
from kernel.gateway import tables_of
from kernel.heat import Damon, Monitor, NotHere, PageIdle, runs, sources
from sylvie.doctor import access_information

# So many pages touched all the time, so many once.
PROGRAM = """
import sys, mmap, time, ctypes
hot, cold = (mmap.mmap(-1, int(n) << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for n in sys.argv[1:])
for m in (hot, cold):
    for i in range(0, len(m), 4096): m[i] = 1
print(*(ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (hot, cold)), flush=True)
while True:
    for i in range(0, len(hot), 4096): hot[i]
    time.sleep(0.005)
"""
HOT, COLD = 512, 2048  # pages


module_enclave, enclave = module_enclave_of("ht", "--ram", "48M", "--swap", "128M", "--heat-cpu", "10%")


def heat(e: Enclave) -> dict[str, Any]:
    return dict(e.status()["heat"])


def windows(e: Enclave, more: int) -> None:
    """Waits for so many windows to end."""
    now = heat(e)["windows"]
    wait_for(lambda: heat(e)["windows"] >= now + more, 30, "no window ends")


@contextlib.contextmanager
def subscribed(e: Enclave) -> Iterator[Callable[[], None]]:
    """A kswapd that waits for HEAT_READY, and lives for as long as it is called."""
    e.supervisorctl("stop", "kswapd")
    with Control(e.run_dir, 5, "kswapd") as c:
        hello = {"t": "hello", "name": "kswapd", "implementation": "x", "abi": lib.SY_ABI_VERSION, "pid": os.getpid(), "heat": True}
        c.request(hello)
        yield lambda: c.request({"t": "heartbeat", "name": "kswapd"}) and None
        c.request({"t": "goodbye", "name": "kswapd"})
    e.supervisorctl("start", "kswapd")
    wait_for(lambda: e.component("kswapd")["state"] == "online", 20, "kswapd")


# ---- live ----
def test_hot_pages_are_warm_and_cold_ones_are_not(enclave: Enclave) -> None:
    assert heat(enclave)["active"] is False  # nobody needs it: nothing runs, and nothing can have to leave
    p = subprocess.Popen(enclave.command([sys.executable, "-c", PROGRAM, HOT, COLD]), stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout
        places = [(int(at) - lib.SY_ARENA_START) // lib.SY_PAGE_SIZE for at in p.stdout.readline().split()]
        t = tables(enclave)
        assert not t.heat.flags.writeable and len(t.heat) == len(t.frames)

        def of(place: int, pages: int) -> NDArray[np.void]:
            vpage = t.frames["vpage"].astype(np.int64)
            return t.heat[(t.frames["state"] == lib.SY_FRAME_MAPPED) & (vpage >= place) & (vpage < place + pages)]

        with subscribed(enclave) as beat, subscriber(enclave.run_dir, [b"pressure"], "kswapd") as events:

            def looked_at() -> bool:
                beat()
                return all((of(*one)["looks"] >= 3).mean() > 0.9 for one in zip(places, (HOT, COLD), strict=True))

            wait_for(looked_at, 30, "not all are looked at")
            hot, cold = of(places[0], HOT), of(places[1], COLD)
            assert (len(hot), len(cold)) == (HOT, COLD)
            assert (cold["seen"] & 0x60 == 0).mean() > 0.9 and (hot["seen"] & 0xE0 == 0xE0).mean() > 0.9
            assert set(cold["source"].tolist()) <= {0, getattr(lib, f"SY_HEAT_{heat(enclave)['source'].upper()}")}
            told = 0
            while not told and events.poll(5000):
                batch = decode_batch(events.recv_multipart())[2]
                ready = batch[batch["type"] == lib.SY_MSG_HEAT_READY]
                told = int(ready["npages"].sum())
            assert told and ready["arg"][-1] <= heat(enclave)["windows"]
            shown = enclave.cli("status").stdout
            assert re.search(rf"heat by {heat(enclave)['source']}, looking: \d+ frames", shown) and "at most 10 %" in shown
    finally:
        p.kill()
        p.wait(20)
    enclave.idle()
    free = t.frames["state"] == lib.SY_FRAME_FREE
    assert (t.heat[free] == np.zeros((), t.heat.dtype)).all()  # what comes next is another page
    wait_for(lambda: not heat(enclave)["active"], 10, "it goes on though nobody needs it")
    before = heat(enclave)["windows"]
    time.sleep(0.6)
    assert heat(enclave)["windows"] == before


@pytest.fixture
def always_looking(root_dir: Path) -> Iterator[Enclave]:
    """As much as can be."""
    e = bring_up(root_dir / "hh", "--ram", "48M", "--swap", "256M", "--heat-cpu", "100%")
    yield e
    take_down(e)


def test_nobody_notices(always_looking: Enclave) -> None:
    e = always_looking
    p = waiting(e, 30)
    done = e.run(swapped("threads", mib=40), timeout=90)
    assert (done.stdout, done.stderr, done.returncode) == (natively("threads"), "", 0)
    assert e.status()["counters"]["sampled"] > 5000 or heat(e)["source"] != "hint"
    lost_nothing(p)
    e.idle()
    e.check()


def test_it_keeps_within_its_share(enclave: Enclave) -> None:
    """What it measures of itself; with everything in use, which is the dearest for hint faults."""
    p = waiting(enclave, 40)
    try:
        windows(enclave, 15)
        h = heat(enclave)
        assert 0 < h["cost_percent"] <= h["limit_percent"] == 10
        assert h["looked"] > 0 and h["touched"] > 0
    finally:
        lost_nothing(p)


@pytest.mark.parametrize("share", ["-1%", "101%", "2"])
def test_a_wrong_share_is_refused(root_dir: Path, share: str) -> None:
    done = subprocess.run([SYLVIE, "--run-dir", root_dir / "no", "up", "--heat-cpu", share], capture_output=True, text=True, timeout=30)
    assert done.returncode and "--heat-cpu" in done.stderr and not (root_dir / "no").exists()


@pytest.mark.alone
def test_doctor_says_which_and_why(enclave: Enclave) -> None:
    """DAMON where it is free; else who has it."""
    found = {f["what"]: f for f in json.loads(enclave.cli("doctor", "--json").stdout)["findings"]}
    kdamonds = Path("/sys/kernel/mm/damon/admin/kdamonds")
    if not kdamonds.exists():
        assert "CONFIG_DAMON" in found["DAMON"]["found"]
    elif (kdamonds / "nr_kdamonds").read_text().strip() != "0" and not Path("/run/sylvie-damon.json").exists():
        pid = (kdamonds / "0/pid").read_text().strip()
        assert f"in use by somebody else (kdamond PID {pid})" in found["DAMON"]["found"] or "none running" in found["DAMON"]["found"]
        assert found["access information"]["found"] != "from DAMON"
        with pytest.raises(NotHere, match="somebody else"):
            Damon().start(np.zeros(1, FRAME_DTYPE), 0.1)
        assert (kdamonds / "0/pid").read_text().strip() == pid
    else:
        assert found["access information"]["found"] == "from DAMON"
    if not Path("/sys/kernel/mm/page_idle/bitmap").exists():
        assert "CONFIG_IDLE_PAGE_TRACKING" in found["page_idle"]["found"]


# ---- DAMON and page_idle, on files of the kernel's shape ----
def frames_at(*phys: int) -> NDArray[np.void]:
    f = np.zeros(len(phys), FRAME_DTYPE)
    f["phys"] = phys
    return f


def put(root: Path, path: str, text: str | int) -> Path:
    at = root / path
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text(f"{text}\n")
    return at


@pytest.fixture
def damon(tmp_path: Path) -> Path:
    """What the kernel makes as numbers are written to it is there already."""
    admin = "sys/kernel/mm/damon/admin/kdamonds"
    context = f"{admin}/0/contexts/0"
    for path, text in {
        f"{admin}/nr_kdamonds": 0, f"{admin}/0/state": "off", f"{admin}/0/pid": 4711, f"{admin}/0/contexts/nr_contexts": 0,
        f"{context}/avail_operations": "vaddr\nfvaddr\npaddr", f"{context}/operations": "vaddr",
        f"{context}/monitoring_attrs/intervals/sample_us": 5000, f"{context}/monitoring_attrs/intervals/aggr_us": 100000,
        f"{context}/monitoring_attrs/nr_regions/max": 1000, f"{context}/targets/nr_targets": 0,
        **{f"{context}/targets/0/regions/{name}": 0 for name in ("nr_regions", "0/start", "0/end", "1/start", "1/end")},
        f"{context}/schemes/nr_schemes": 0, f"{context}/schemes/0/action": "stat",
        **{f"{context}/schemes/0/access_pattern/{name}/max": 0 for name in ("sz", "nr_accesses", "age")},
        f"{context}/schemes/0/tried_regions/total_bytes": 0,
    }.items():  # fmt: skip
        put(tmp_path, path, text)
    (tmp_path / "run").mkdir()
    (tmp_path / "proc").mkdir()
    return tmp_path


ADMIN = "sys/kernel/mm/damon/admin/kdamonds"


def value(root: Path, path: str) -> str:
    return (root / ADMIN / path).read_text().strip()


def test_damon(damon: Path) -> None:
    # Frames 0, 1 and 2 side by side in the machine's memory, 3 elsewhere, 4 unknown.
    frames, source = frames_at(101, 100, 102, 5000, 0), Damon(damon)
    assert sources(damon)[0] == ("damon", None)
    source.start(frames, 0.2)
    assert (value(damon, "nr_kdamonds"), value(damon, "0/state"), value(damon, "0/contexts/0/operations")) == ("1", "on", "paddr")
    at = "0/contexts/0/targets/0/regions"
    ranges = [(int(value(damon, f"{at}/{i}/start")) >> 12, int(value(damon, f"{at}/{i}/end")) >> 12) for i in range(2)]
    assert (value(damon, f"{at}/nr_regions"), ranges) == ("2", [(100, 103), (5000, 5001)])
    intervals = "0/contexts/0/monitoring_attrs/intervals"
    assert (value(damon, f"{intervals}/aggr_us"), value(damon, f"{intervals}/sample_us")) == ("200000", "10000")
    # Another enclave's doctor says so while this process lives.
    (damon / f"proc/{os.getpid()}").mkdir()
    with pytest.raises(NotHere, match=f"an enclave .gateway PID {os.getpid()}, kdamond PID 4711"):
        Damon(damon).check()
    source.begin(frames, 1.0)
    assert (value(damon, "0/state"), value(damon, f"{intervals}/aggr_us")) == ("commit", "1000000")
    for i, (first, end, accesses) in enumerate([(102, 103, 0), (100, 102, 3), (5000, 5001, 20), (90, 95, 7)]):
        for name, n in (("start", first << 12), ("end", end << 12), ("nr_accesses", accesses), ("age", 1)):
            put(damon, f"{ADMIN}/0/contexts/0/schemes/0/tried_regions/{i}/{name}", n)
    looks = source.end()
    assert value(damon, "0/state") == "update_schemes_tried_regions" and looks.touched is not None
    assert dict(zip(looks.pfns.tolist(), looks.touched.tolist(), strict=True)) == {0: 1, 1: 1, 2: 0, 3: 1}
    put(damon, "proc/4711/stat", "4711 (kdamond.0) S 2 0 0 0 -1 0 0 0 0 0 30 70 0 0 20")
    assert source.spent() == pytest.approx(100 / os.sysconf("SC_CLK_TCK"))
    source.stop()
    assert (value(damon, "nr_kdamonds"), value(damon, "0/state"), (damon / "run/sylvie-damon.json").exists()) == ("0", "off", False)


def test_somebody_elses_damon_is_left_alone(damon: Path) -> None:
    put(damon, f"{ADMIN}/nr_kdamonds", 1)
    put(damon, f"{ADMIN}/0/state", "on")
    before = {p: p.read_text() for p in damon.rglob("*") if p.is_file()}
    with pytest.raises(NotHere, match=r"in use by somebody else \(kdamond PID 4711\)"):
        Damon(damon).start(frames_at(100), 0.2)
    lines = {f.what: f for f in access_information(damon)}
    assert (lines["access information"].found, lines["DAMON"].ok) == ("from hint faults", None)
    assert "kdamond PID 4711" in lines["DAMON"].found and "CONFIG_IDLE_PAGE_TRACKING" in lines["page_idle"].found
    put(damon, f"{ADMIN}/0/state", "off")
    with pytest.raises(NotHere, match="1 set up, none running"):
        Damon(damon).check()
    put(damon, f"{ADMIN}/0/state", "on")
    assert {p: p.read_text() for p in damon.rglob("*") if p.is_file()} == before


def test_damon_of_a_killed_gateway_is_taken_over(damon: Path) -> None:
    put(damon, f"{ADMIN}/nr_kdamonds", 1)
    put(damon, f"{ADMIN}/0/state", "on")
    put(damon, "run/sylvie-damon.json", json.dumps({"kdamond": 4711, "gateway": 12345}))
    source = Damon(damon)
    source.start(frames_at(100), 0.2)
    assert json.loads((damon / "run/sylvie-damon.json").read_text()) == {"kdamond": 4711, "gateway": os.getpid()}
    source.stop()
    # Another kdamond than the one that was noted is not ours.
    put(damon, f"{ADMIN}/nr_kdamonds", 1)
    put(damon, f"{ADMIN}/0/state", "on")
    put(damon, "run/sylvie-damon.json", json.dumps({"kdamond": 4712, "gateway": 12345}))
    with pytest.raises(NotHere, match="somebody else"):
        Damon(damon).start(frames_at(100), 0.2)


def test_damon_that_cannot_do_it_is_left_as_it_was(damon: Path) -> None:
    put(damon, f"{ADMIN}/0/contexts/0/avail_operations", "vaddr")
    with pytest.raises(NotHere, match="CONFIG_DAMON_PADDR"):
        Damon(damon).start(frames_at(100), 0.2)
    assert value(damon, "nr_kdamonds") == "0"
    with pytest.raises(NotHere, match="pagemap"):
        Damon(damon).start(frames_at(0), 0.2)
    (damon / ADMIN / "nr_kdamonds").unlink()
    with pytest.raises(NotHere, match="CONFIG_DAMON_SYSFS"):
        Damon(damon).check()


def test_page_idle(tmp_path: Path) -> None:
    """Two folios of 512 pages and two single pages; the bits of tails are nobody's business."""
    bitmap, flags = put(tmp_path, "sys/kernel/mm/page_idle/bitmap", ""), put(tmp_path, "proc/kpageflags", "")
    bits, kinds = np.zeros(64, np.uint64), np.zeros(4096, np.uint64)
    for head in (512, 1024):
        kinds[head], kinds[head + 1 : head + 512] = 1 << 15, 1 << 16
    bitmap.write_bytes(bits.tobytes())
    flags.write_bytes(kinds.tobytes())
    frames = frames_at(*range(1024, 1536), 2000, *range(512, 1024), 0, 2001)
    assert sources(tmp_path)[:2] == [("damon", "not in this kernel (CONFIG_DAMON_SYSFS and CONFIG_DAMON_PADDR)"), ("page_idle", None)]
    source = PageIdle(tmp_path)
    source.start(frames, 0.2)
    for touched in ((), (512,), (1024, 2001)):
        source.begin(frames, 0.2)
        bits = np.frombuffer(bitmap.read_bytes(), np.uint64).copy()
        idle = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
        assert idle == [512, 1024, 2000, 2001]
        for page in touched:  # as the kernel does when it looks at a page that was touched
            bits[page // 64] &= ~(np.uint64(1) << np.uint64(page % 64))
        bitmap.write_bytes(bits.tobytes())
        looks = source.end()
        assert looks.touched is not None
        warm = looks.pfns[looks.touched == 1]
        expected = [p for p in range(len(frames)) if (t := int(frames["phys"][p])) and (t if t >= 2000 else t & ~511) in touched]
        assert len(looks.pfns) == 1026 and sorted(warm.tolist()) == expected
    source.stop()
    source.stop()


def test_runs() -> None:
    assert runs(np.array([], np.int64)) == []
    assert runs(np.array([5])) == [(5, 6)]
    some = np.array([1, 2, 3, 7, 8, 20, 22])
    assert runs(some) == [(1, 4), (7, 9), (20, 21), (22, 23)]
    assert runs(some, 2) == [(1, 9), (20, 23)] and runs(some, 1) == [(1, 23)]


# ---- the simulated machine ----
def test_on_the_simulated_machine() -> None:
    """Every page is looked at, those touched in each window are warm; and a frame's heat goes with its page."""
    from kernel.providers.sim.machine import Machine

    m = Machine(np.arange(200, dtype=np.uint64), 128)
    m.access(np.arange(100))
    for _ in range(40):
        m.note(np.arange(20))
        m.end_window()
    events = m.events()
    assert np.count_nonzero(events["type"] == lib.SY_MSG_HEAT_READY) == m.header.monitor.windows == 39
    looks, seen = m.heat["looks"][m.frame_of[:100]], m.heat["seen"][m.frame_of[:100]]
    assert (looks >= 4).all() and (seen[:20] == (0xFF << (8 - looks[:20].astype(int))) & 0xFF).all() and not seen[20:].any()
    m.access(np.arange(100, 130))
    gone = m.frames["state"] == lib.SY_FRAME_FREE
    assert gone.any() and not m.heat["looks"][gone].any() and m.check() == []


@pytest.mark.parametrize("policy", ["two_list", "mglru", "mru"])
def test_a_policy_that_starts_anew_knows_what_is_in_use(policy: str) -> None:
    """… from the heat array: started again and again, with it there are at least 5 % fewer faults than without."""
    from bus.runtime import load_policy
    from kernel.providers.sim.machine import Machine
    from kernel.providers.sim.replay import Replay
    from kernel.providers.sim.trace import generate

    trace, faults = generate("zipf:pages=4000,accesses=60000"), []
    for known in (True, False):
        m = Machine(trace.vpages, 2000)
        r = Replay(m, load_policy("kswapd", policy))
        if not known:
            r.policy.heat = np.zeros_like(m.heat)
        for part in np.split(trace.pages, range(2000, len(trace.pages), 2000)):
            m.events()
            r.policy.rebuild()
            r.run(part)
        assert m.check() == []
        faults.append(m.faults)
    assert faults[0] < 0.95 * faults[1], faults


def test_from_damon_to_the_heat_array(damon: Path, root_dir: Path) -> None:
    """The whole way, but for the kernel: a gateway, a program's frames at their places in the machine, and what DAMON would say of them."""
    run_dir = root_dir / "hd"
    run_dir.mkdir()
    r = Real(run_dir)
    t = tables_of(r.gw)
    wait_for(lambda: t.header.populated == len(t.frames), 20, "RAM is not populated")
    c = Client(r)
    c.map(pfn := c.pop(4), 4, 16)
    wait_for(lambda: (t.frames["state"][pfn : pfn + 16] == lib.SY_FRAME_MAPPED).all(), 5, "nothing is mapped")
    phys = t.frames["phys"][pfn : pfn + 16].astype(int)
    for i in range(64):
        for name in ("start", "end"):
            put(damon, f"{ADMIN}/0/contexts/0/targets/0/regions/{i}/{name}", 0)
    for i, page in enumerate(phys):  # every second one is in use
        for name, n in (("start", page << 12), ("end", page + 1 << 12), ("nr_accesses", i % 2)):
            put(damon, f"{ADMIN}/0/contexts/0/schemes/0/tried_regions/{i}/{name}", n)
    wanted = [True]
    m = Monitor(r.gw, t, 1.0, lambda: wanted[0], damon)
    m.start()
    try:
        wait_for(lambda: m.report()["windows"] >= 3, 20, "no window ends")
        assert (m.report()["source"], m.report()["active"], m.report()["looked"], m.report()["touched"]) == ("damon", True, 16, 8)
        assert value(damon, "nr_kdamonds") == "1"
        h = t.heat[pfn : pfn + 16]
        assert (h["source"] == lib.SY_HEAT_DAMON).all() and (h["looks"] >= 3).all()
        assert not h["seen"][::2].any() and (h["seen"][1::2] & 0xE0 == 0xE0).all()
        # Somebody has taken it: hint faults go on, and when nobody needs it, nothing.
        (damon / ADMIN / "0/state").unlink()
        (damon / ADMIN / "0/state").mkdir()
        put(damon, f"{ADMIN}/nr_kdamonds", 1)
        wait_for(lambda: m.report()["source"] == "hint" and m.report()["active"], 20, "it does not go on")
        wanted[0] = False
        wait_for(lambda: not m.report()["active"], 10, "it does not pause")
    finally:
        m.stop()
        c.die()
        assert r.check() == ""
        lib.sy_gw_stop(r.gw)
