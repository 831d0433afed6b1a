"""The simulated machine: its invariants under any transactions, its traces, what no policy can undercut, `sylvie replay`."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SYLVIE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from bus.policy import Transaction
from bus.runtime import load_policy
from components.kswapd.sampler import blocks
from kernel.abi import MSG_DTYPE, OP_DTYPE, lib, names
from kernel.providers.sim.machine import Machine, StoreFull
from kernel.providers.sim.opt import next_uses, opt
from kernel.providers.sim.replay import Replay, replay
from kernel.providers.sim.trace import GENERATORS, BadTrace, Trace, generate, load, trace_of

POLICIES = ["clock", "mglru", "mru", "random", "superfetch", "two_list"]
RESULT = names("SY_R_")
MESSAGE = names("SY_MSG_")
FREE, MAPPED, AGED = lib.SY_FRAME_FREE, lib.SY_FRAME_MAPPED, lib.SY_FF_AGED
# A busy machine is no failure.
PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck))


def machine(pages: int = 100, frames: int = 64, **kw: Any) -> Machine:
    return Machine(np.arange(pages, dtype=np.uint64) + 7, frames, **kw)


def touch(m: Machine, *pages: int) -> list[str]:
    """Names of the events that come of it."""
    m.access(np.array(pages, np.int64))
    return [MESSAGE[int(t)] for t in m.events()["type"]]


def op(m: Machine, code: int, pfn: int, order: int = 0, stale: bool = False) -> np.ndarray:
    o = np.zeros(1, OP_DTYPE)
    o["op"], o["pfn"], o["order"] = code, pfn, order
    o["barrier"] = m.frames["barrier"][pfn % len(m.frames)] + stale
    return o


def commit(m: Machine, *ops: np.ndarray) -> list[str]:
    return [RESULT[int(r)] for r in m.commit(np.concatenate(ops))["result"]]


# ---- the machine ----
def test_a_pages_way() -> None:
    m = machine()
    assert touch(m, 5, 5, 6) == ["PAGE_MAPPED", "PAGE_MAPPED"]
    assert (m.frames["vpage"][:2].tolist(), m.frames["state"][:2].tolist()) == ([12, 13], [MAPPED, MAPPED])
    assert commit(m, op(m, lib.SY_OP_AGE, 0)) == ["COMPLETE"]
    assert commit(m, op(m, lib.SY_OP_AGE, 0)) == ["STALE"]  # it is already
    assert m.frames["flags"][0] == AGED
    assert touch(m, 6, 5, 5) == ["PAGE_HINT"]
    assert m.frames["flags"][0] == 0
    assert commit(m, op(m, lib.SY_OP_RECLAIM, 0)) == ["COMPLETE"]
    out = m.events()
    assert [MESSAGE[int(t)] for t in out["type"]] == ["PAGE_SWAPPED", "PAGE_FREED"]
    assert (int(out["vpage"][0]), int(out["pfn"][0]), m.header.slots_used) == (12, 0, 1)
    commit(m, op(m, lib.SY_OP_RECLAIM, 1))
    m.events()
    m.access(np.array([5]))
    back = m.events()
    assert [MESSAGE[int(t)] for t in back["type"]] == ["PAGE_REFAULT", "PAGE_MAPPED"]
    assert int(back["arg"][0]) == 2  # itself and another have left since
    assert (m.first, m.refaults, m.hints, m.header.slots_used) == (2, 1, 1, 1)
    assert m.check() == []


def test_results() -> None:
    """Each with its reason, as the gateway says it (tests/test_swap.py: test_refused_reclaims_change_nothing)."""
    m = machine()
    touch(m, *range(10))
    before = m.frames.copy()
    reclaim, age = lib.SY_OP_RECLAIM, lib.SY_OP_AGE
    assert commit(
        m, op(m, reclaim, 20), op(m, reclaim, 0, stale=True), op(m, reclaim, 0, 11), op(m, reclaim, len(m.frames)), op(m, reclaim, 1, 1),
        op(m, lib.SY_OP_GRANT, 0), op(m, lib.SY_OP_MIGRATE, 0), op(m, lib.SY_OP_PREFETCH, 0), op(m, 99, 0),
    ) == ["STALE", "STALE", "INVALID", "INVALID", "INVALID", "NOT_PERMITTED", "NOT_PERMITTED", "NOT_FOUND", "INVALID"]  # fmt: skip
    assert (m.frames == before).all()
    # Blocks: all of it or nothing; pages 8 and 9 are followed by free frames.
    assert commit(m, op(m, age, 0, 2), op(m, age, 8, 2), op(m, age, 2)) == ["COMPLETE", "STALE", "STALE"]
    # The same frame twice; one that AGE took away can still leave.
    assert commit(m, op(m, reclaim, 4), op(m, reclaim, 4), op(m, reclaim, 0)) == ["COMPLETE", "STALE", "COMPLETE"]
    assert m.check() == []


def test_store_full() -> None:
    m = machine(slots=2)
    touch(m, *range(64))
    assert commit(m, *(op(m, lib.SY_OP_RECLAIM, i) for i in range(3))) == ["COMPLETE", "COMPLETE", "FULL"]
    touch(m, 64, 65)
    with pytest.raises(StoreFull, match="2 slots"):
        m.access(np.array([66]))
    assert m.check() == []
    none = machine(slots=0)
    touch(none, 0)
    assert commit(none, op(none, lib.SY_OP_RECLAIM, 0)) == ["FULL"]


def test_the_gateway_by_itself() -> None:
    """No frame is free and kswapd does nothing: the hand goes round, and nothing is lost."""
    m = machine(pages=100, frames=64)
    touch(m, *range(64))
    assert m.by_gateway == 0 and m.header.watermark[0].free == 0
    assert "PAGE_SWAPPED" in touch(m, 64)
    assert m.by_gateway == m.header.watermark[0].high == m.swapped_out
    assert (m.slot_of[: m.by_gateway] >= 0).all()  # the first that came
    m.access(np.tile(np.arange(100), 5))
    assert m.check() == []


def test_watermarks() -> None:
    """Told once on the way down at each, once when high is reached again."""
    m = machine(pages=2000, frames=1024)
    mark = m.header.watermark[0]
    assert (mark.min, mark.low, mark.high, mark.free) == (8, 16, 32, 1024)
    m.access(np.arange(1024))
    told = m.events()
    told = told[told["type"] == lib.SY_MSG_WATERMARK]
    assert told[["npages", "arg"]].tolist() == [(15, 1), (7, 0)]
    commit(m, *(op(m, lib.SY_OP_RECLAIM, i) for i in range(31)))
    assert lib.SY_MSG_WATERMARK not in m.events()["type"]
    commit(m, op(m, lib.SY_OP_RECLAIM, 31))
    told = m.events()
    assert told[told["type"] == lib.SY_MSG_WATERMARK][["npages", "arg"]].tolist() == [(32, 2)]


def test_nodes_fill_evenly() -> None:
    m = machine(pages=90, frames=96, nodes=3)
    m.access(np.arange(90))
    assert np.bincount(m.frames["node"][m.frames["state"] == MAPPED]).tolist() == [30, 30, 30]
    assert m.events()["node"].tolist().count(2) >= 30
    with pytest.raises(ValueError, match="at least 16"):
        machine(frames=45, nodes=3)


class Life(RuleBasedStateMachine):
    """Any accesses and any transactions, against a model of a dictionary: a page is in RAM or in the store, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.m = Machine(np.arange(60, dtype=np.uint64) * 3, 32, 2, slots=45)
        self.touched: set[int] = set()
        self.seq = 0

    @rule(pages=st.lists(st.integers(0, 59), max_size=60))
    def access(self, pages: list[int]) -> None:
        present = set(np.flatnonzero(self.m.frame_of >= 0).tolist())
        before = self.m.faults, self.m.by_gateway
        try:
            self.m.access(np.array(pages, np.int64))
        except StoreFull:
            # The gateway had to take pages, and a page that is in RAM at the end may have gone and come back.
            self.touched = set(np.flatnonzero((self.m.frame_of >= 0) | (self.m.slot_of >= 0)).tolist())
            return
        self.touched |= set(pages)
        faults, by_gateway = self.m.faults - before[0], self.m.by_gateway - before[1]
        assert faults >= len(set(pages) - present) and (by_gateway or faults == len(set(pages) - present))
        if pages:
            assert self.m.frame_of[pages[-1]] >= 0  # the last one is there

    @rule(data=st.data(), n=st.integers(1, 20))
    def transaction(self, data: st.DataObject, n: int) -> None:
        codes = st.sampled_from([lib.SY_OP_AGE, lib.SY_OP_RECLAIM, lib.SY_OP_GRANT])
        ops = np.concatenate([
            op(self.m, data.draw(codes), data.draw(st.integers(0, 33)), data.draw(st.sampled_from([0, 0, 0, 1, 2])), data.draw(st.booleans()) and i % 4 == 0)
            for i in range(n)
        ])  # fmt: skip
        before = self.m.frames.copy()
        results = self.m.commit(ops)["result"]
        for o, result in zip(ops, results, strict=True):
            if result == lib.SY_R_COMPLETE:
                block = slice(int(o["pfn"]), int(o["pfn"]) + (1 << int(o["order"])))
                assert (before["state"][block] == MAPPED).all() and before["barrier"][block][0] == o["barrier"]
                if o["op"] == lib.SY_OP_RECLAIM:
                    assert (self.m.frames["state"][block] == FREE).all()
        completed = np.isin(ops["op"], [lib.SY_OP_RECLAIM]) & (results == lib.SY_R_COMPLETE)
        gone = int(np.sum(1 << ops["order"][completed].astype(int)))
        assert np.count_nonzero(self.m.frames["state"] == FREE) == np.count_nonzero(before["state"] == FREE) + gone

    @rule(data=st.data(), n=st.integers(1, 20))
    def prefetch(self, data: st.DataObject, n: int) -> None:
        there = np.flatnonzero(self.m.slots["asid"])
        if not len(there):
            return
        txn = Transaction(self.m.frames)
        txn.prefetch(self.m.slots, np.array([data.draw(st.sampled_from(there.tolist())) for _ in range(n)]))
        ops, free = txn.take(), np.count_nonzero(self.m.frames["state"] == FREE)
        ops["barrier"][0] += data.draw(st.sampled_from([0, 0, 0, 1]))
        results = self.m.commit(ops)["result"]
        done = ops["arg"][results == lib.SY_R_COMPLETE].tolist()
        assert len(set(done)) == len(done) == free - np.count_nonzero(self.m.frames["state"] == FREE)
        pages = np.searchsorted(self.m.vpages, done)
        assert (self.m.frame_of[pages] >= 0).all()

    @rule()
    def window(self) -> None:
        self.m.end_window()

    @rule()
    def listen(self) -> None:
        events = self.m.events()
        assert events.dtype == MSG_DTYPE
        assert events["seqnum"].tolist() == list(range(self.seq, self.seq + len(events)))
        self.seq += len(events)

    @invariant()
    def sound(self) -> None:
        assert self.m.check() == []
        there = np.flatnonzero((self.m.frame_of >= 0) | (self.m.slot_of >= 0)).tolist()
        assert set(there) == self.touched


def test_life() -> None:
    run_state_machine_as_test(Life, settings=settings(PATIENT, max_examples=25, stateful_step_count=20))


# ---- policies on it ----
SPECS = [
    "loop:pages=600,accesses=2000", "zipf:pages=600,accesses=2000,seed=3", "scan_plus_hot:pages=600,accesses=2000,seed=4",
    "phases:pages=600,accesses=2000,seed=5",
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_no_policy_undercuts_opt(policy: str, spec: str) -> None:
    trace = generate(spec)
    for share, nodes in ((0.3, 1), (0.9, 1), (0.5, 2)):
        frames = int(len(trace.vpages) * share) // nodes * nodes
        r = replay(trace, load_policy("kswapd", policy), frames, nodes)
        assert opt(trace.pages, frames) <= r.faults <= len(trace)
        assert r.faults - r.refaults == len(trace.vpages)  # each page's first touch
        assert r.by_gateway <= r.evicted // 4, "kswapd is too late"
    assert r == replay(trace, load_policy("kswapd", policy), frames, nodes), "not deterministic"


@settings(PATIENT, max_examples=40)
@given(
    accesses=st.lists(st.integers(0, 50), min_size=1, max_size=400),
    frames=st.integers(16, 40),
    policy=st.sampled_from(POLICIES),
    every=st.integers(1, 100),
)
def test_any_trace(accesses: list[int], frames: int, policy: str, every: int) -> None:
    """replay() asserts every invariant at its end."""
    trace = trace_of(np.array(accesses, np.uint64), {})
    assert replay(trace, load_policy("kswapd", policy), frames, every=every).faults >= opt(trace.pages, frames)


def test_policies_see_what_the_live_ones_see() -> None:
    """The tables are read-only, the clock is the machine's, handlers are called for what has happened."""
    trace = generate(SPECS[0])
    r = Replay(Machine(trace.vpages, 200), load_policy("kswapd", "two_list"))
    r.run(trace.pages)
    with pytest.raises(ValueError, match="read-only"):
        r.policy.frames["state"] = 0
    assert r.policy.now() == pytest.approx(len(trace) * 1e-6)
    dump = r.policy.dump()
    assert dump["refaults"] == r.machine.refaults and dump["chosen"] >= r.machine.swapped_out - r.machine.by_gateway > 0
    for source in (ROOT / "components" / "kswapd").glob("*.py"):
        assert "import time" not in source.read_text(), source


def test_the_policies_of_the_documentation() -> None:
    """docs/write-a-policy.md: what is written there runs, and does what a beginner's policy should."""
    text = (Path(__file__).parent.parent / "docs" / "write-a-policy.md").read_text()
    first, body = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    trace = generate("zipf:pages=1000,accesses=20000")
    least, found = opt(trace.pages, 500), []
    for source in (first, re.sub(r"        return .*\n", body, first)):
        names: dict[str, Any] = {}
        exec(source, names)
        found.append(replay(trace, names["Policy"], 500))
        assert least < found[-1].faults < 3 * least
    assert found[0].hints == 0 < found[1].hints  # the second asks what is in use


def test_mru_is_best_on_loops() -> None:
    """What each is for shows: MRU keeps most of a loop that LRU loses all of."""
    trace = generate("loop:pages=1000,accesses=20000")
    faults = {p: replay(trace, load_policy("kswapd", p), 750).faults for p in ("mru", "two_list")}
    least = opt(trace.pages, 750)
    assert faults["mru"] < 1.5 * least and faults["two_list"] > 2 * least


def test_lru_keeps_what_is_wanted() -> None:
    """Where recency tells something, those that look at it have fewer faults than chance; and two_list's second chance is used."""
    for spec in ("zipf:pages=2000,accesses=30000", "phases:pages=2000,accesses=30000"):
        trace = generate(spec)
        r = {p: replay(trace, load_policy("kswapd", p), 1000) for p in ("random", "two_list", "mglru")}
        assert r["mglru"].faults < 0.95 * r["random"].faults and r["two_list"].faults < 0.95 * r["random"].faults
        assert r["two_list"].hints > 500


def test_refault_and_mapped_in_any_order() -> None:
    """The gateway sends PAGE_REFAULT before PAGE_MAPPED, in one batch or in two: a page that came back is known as such."""
    trace = generate(SPECS[0])
    for name, says in (("two_list", "active"), ("mglru", "touched")):
        r = Replay(Machine(trace.vpages, 300), load_policy("kswapd", name))
        policy: Any = r.policy
        r.machine.access(np.arange(8))
        r.step()
        if name == "two_list":
            policy.active[1:4] = True  # what a refault distance is compared with
        else:
            policy.victims(np.array([0]), 1, False)
            policy.youngest[:] = 5
            policy.frames.base["flags"][0] = AGED
            assert policy.victims(np.array([0]), 1, False).tolist() == [0]
        commit(r.machine, op(r.machine, lib.SY_OP_RECLAIM, 0))
        r.machine.access(np.array([0]))
        events = r.machine.events()
        back, mapped = (events[events["type"] == t] for t in (lib.SY_MSG_PAGE_REFAULT, lib.SY_MSG_PAGE_MAPPED))
        assert (len(back), len(mapped)) == (1, 1)
        for first, second in ((policy.page_refault, policy.page_mapped), (policy.page_mapped, policy.page_refault)):
            getattr(policy, says)[int(back["pfn"][0])] = 0
            first(back if first == policy.page_refault else mapped)
            second(back if second == policy.page_refault else mapped)
            assert getattr(policy, says)[int(back["pfn"][0])] == 1, (name, first)


# ---- traces and MIN ----
def belady(pages: list[int], frames: int) -> int:
    """As the paper says it, without anything clever."""
    held: set[int] = set()
    faults = 0
    for i, page in enumerate(pages):
        if page not in held:
            faults += 1
            if len(held) == frames:
                rest = pages[i + 1 :]
                held.remove(max(held, key=lambda p: rest.index(p) if p in rest else len(pages)))
            held.add(page)
    return faults


@settings(PATIENT, max_examples=150)
@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 9))
def test_opt(pages: list[int], frames: int) -> None:
    assert opt(np.array(pages, np.int64), frames) == belady(pages, frames)


def test_next_uses() -> None:
    assert next_uses(np.array([3, 1, 3, 3, 1])).tolist() == [2, 4, 3, 5, 5]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name: str) -> None:
    seeds = [""] if name == "loop" else [",seed=1", ",seed=2"]
    made = [generate(f"{name}:pages=300,accesses=5000{s}") for s in seeds + seeds]
    for a, b in itertools.pairwise(made):
        assert len(a) == 5000 and a.vpages.max() < 300
        assert (name == "loop") == np.array_equal(a.vpages[a.pages], b.vpages[b.pages])
    assert np.array_equal(made[0].pages, made[len(seeds)].pages), "not deterministic"


def test_generators_are_what_they_say() -> None:
    counts = np.bincount(generate("zipf:pages=1000,accesses=100000").pages)
    top = heapq.nlargest(10, counts.tolist())
    assert 0.35 < sum(top) / 100000 < 0.43 and top[0] > 1.5 * top[1]  # 1 + 1/2 + … + 1/10 = 2.93 of H(1000) = 7.49
    t = generate("scan_plus_hot:pages=1000,accesses=50000,hot=0.1,share=0.3")
    assert 0.28 < np.mean(t.vpages[t.pages] < 100) < 0.32
    t = generate("phases:pages=900,accesses=8000,phases=4")
    assert all(len(np.unique(t.pages[i * 2000 : (i + 1) * 2000])) <= 300 for i in range(4))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing", "neither a file nor a generator"), ("zipf:size=3", "no parameter 'size'"), ("zipf:pages=many", "not a number"),
        ("loop:pages=0", "from 1"), ("phases:phases=0", "from 1"), ("zipf:seed=-1", "negative"), ("scan_plus_hot:hot=2", "from 0 to 1"),
        ("scan_plus_hot:pages=1", "two pages"), ("loop:pages", "not a number"), ("zipf:s=nan", "from 0"),
    ],
)  # fmt: skip
def test_bad_generators(spec: str, says: str) -> None:
    with pytest.raises(BadTrace, match=says):
        generate(spec)


def test_trace_files(tmp_path: Any) -> None:
    t = Trace(np.array([5, 1 << 40], np.uint64), np.array([0, 1, 1, 0]), {"command": "x"})
    t.save(tmp_path / "t")
    back = load(tmp_path / "t")
    assert back.vpages.tolist() == [5, 1 << 40] and back.pages.tolist() == [0, 1, 1, 0] and back.about["command"] == "x"
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("1 2 3\n")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "old.npz", vpage=np.zeros(3, np.uint32), about=np.array('{"version": 0}'))
    np.savez(tmp_path / "real.npz", vpage=np.zeros(3), about=np.array('{"version": 1}'))
    np.savez(tmp_path / "none.npz", vpage=np.zeros(0, np.uint32), about=np.array('{"version": 1}'))
    for bad in ("empty", "text", "other.npz", "old.npz", "real.npz", "none.npz"):
        with pytest.raises(BadTrace):
            load(tmp_path / bad)


# ---- sylvie replay ----
def sylvie_replay(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SYLVIE, "replay", *map(str, args)], capture_output=True, text=True, timeout=100, check=False)


def test_replay_prints_a_table() -> None:
    spec = "scan_plus_hot:pages=600,accesses=2000,seed=1"
    done, again = (sylvie_replay(spec, "--ram", "50%,1M") for _ in range(2))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == again.stdout
    lines = done.stdout.splitlines()
    assert lines[0].strip() == f"{spec}: faults in 2000 accesses to 600 pages"
    assert lines[1].split() == ["policy", "50%", "(300", "frames)", "1M", "(256", "frames)"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == [*POLICIES, "opt"]
    assert rows["opt"][1] == rows["opt"][3] == "1.00"
    assert all(float(row[1]) >= 1 and float(row[3]) >= 1 for row in rows.values())


def test_replay_json_nodes_and_files(tmp_path: Any) -> None:
    file = tmp_path / "t.npz"
    generate("zipf:pages=600,accesses=5000").save(file)
    done = sylvie_replay(file, "--json", "--policy", "opt,random,random", "--nodes", 3, "--ram", "50%", "--every", 7)
    out = json.loads(done.stdout)
    assert (out["accesses"], out["nodes"], out["trace"]["name"]) == (5000, 3, "zipf:pages=600,accesses=5000")
    least, random = out["rows"]
    assert (least["policy"], random["policy"], random["ram"], random["frames"] % 3) == ("opt", "random", "50%", 0)
    assert least["faults"] <= random["faults"] == out["pages"] + random["refaults"]
    assert random["evicted"] >= random["faults"] - random["frames"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nothing"], "zipf:pages=10000"), (["zipf:x=1"], "no parameter 'x'"), (["/etc/passwd"], "sylvie record -o FILE"),
        (["/etc"], "is a directory"), (["loop", "--policy", "lru"], "choose from clock, "), (["loop", "--ram", "much"], "no size: give a part"),
        (["loop", "--ram", "1%", "--nodes", "8"], "each needs 16"), (["loop", "--ram", "900G"], "such as 100%"),
        (["loop:pages=10"], "160%"), (["loop", "--ram", ""], "no size"),
    ],
)  # fmt: skip
def test_replay_says_what_to_do_next(args: list[str], says: str) -> None:
    done = sylvie_replay(*args)
    assert done.returncode == 1 and done.stderr.startswith("sylvie: ") and says in done.stderr, done
    assert "Traceback" not in done.stderr


# ---- sylvie record ----
TOUCHES = """
import sys, time
b = bytearray(12 << 20)
end = time.time() + 1
while time.time() < end:
    for i in range(0, 4 << 20, 4096): b[i] = 1
print("done")
sys.exit(3)
"""


def test_record_and_replay(root_dir: Path, tmp_path: Path) -> None:
    """The program's output and status are its own; the trace has every page once, and those it works on again and again."""
    file = tmp_path / "t.npz"
    done = subprocess.run(
        [SYLVIE, "record", "-o", file, "--ram", "128M", "--swap", "64M", "--", sys.executable, "-c", TOUCHES],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"TMPDIR": str(root_dir)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "done\n"), done
    assert "lost" not in done.stderr and not list(root_dir.glob("sylvie-record-*"))
    trace = load(file)
    assert trace.about["samples"] >= 3 and trace.about["lost"] == 0 and trace.about["command"][0] == sys.executable
    often = np.bincount(trace.pages)
    assert 3 << 20 >> 12 < len(often) < 24 << 20 >> 12
    # b is zeroed once, and its first third is touched in every interval.
    assert np.count_nonzero(often >= 3) >= 1000 and np.count_nonzero(often < 3) >= 1800
    out = json.loads(sylvie_replay(file, "--policy", "two_list,opt", "--ram", "50%", "--json").stdout)
    two_list, least = (row["faults"] for row in out["rows"])
    assert out["pages"] == len(often) <= least <= two_list < len(trace)


def test_record_says_what_is_wrong(tmp_path: Path) -> None:
    for args, says in (
        (["-o", tmp_path / "no" / "t", "--", "true"], "No such file or directory"), (["--ram", "1M", "--", "true"], "at least 16M"),
    ):  # fmt: skip
        done = subprocess.run([SYLVIE, "record", *args], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done
    assert not list(Path(tempfile.gettempdir()).glob("sylvie-record-*"))


@PATIENT
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 2), st.booleans()), min_size=1, max_size=80))
def test_blocks(pages: list[tuple[int, int, bool]]) -> None:
    """Each chosen frame in one block, none other, and a block's pages follow one another: what AGE takes whole."""
    m = machine(frames=len(pages) + 16)
    frames = m.frames[: len(pages)]
    frames["vpage"] = np.cumsum([step for step, _, _ in pages])
    frames["asid"] = [asid for _, asid, _ in pages]
    chosen = np.array([c for *_, c in pages])
    seen = np.zeros(len(pages), int)
    for order, pfns in enumerate(blocks(frames, chosen)):
        for pfn in pfns.tolist():
            part = frames[pfn : pfn + (1 << order)]
            assert pfn % (1 << order) == 0 and len(part) == 1 << order
            assert len(set(part["asid"].tolist())) == 1 and set(np.diff(part["vpage"]).tolist()) <= {1}
            seen[pfn : pfn + (1 << order)] += 1
    assert (seen == chosen).all()


# ---- without root ----
def test_make_run_without_root() -> None:
    """By the system's interpreter: that of the virtual environment may be in root's home."""
    site = next((ROOT / ".venv" / "lib").glob("python3*/site-packages"))
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1"}

    def demo(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*nobody, "/usr/bin/python3", "-m", "sylvie.demo", *args],
            capture_output=True, text=True, timeout=150, env=environment, cwd=ROOT, check=False,
        )  # fmt: skip

    if subprocess.run(
        [*nobody, "/usr/bin/python3", "-c", "import numpy, kernel._sylvie"], env=environment, check=False
    ).returncode:
        pytest.skip("no interpreter that nobody may run has these libraries")
    done = demo()
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert lines[0].startswith("On a simulated machine, for this one lacks: root")
    assert sum(line.split()[:1] == ["mglru"] for line in lines) == 4
    done = demo("--", "true")
    assert done.returncode == 1 and "simulated" in done.stdout and "doctor" in done.stdout
