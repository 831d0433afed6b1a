"""ghOSt's library and the policies of sched, on a simulated machine of CPUs and threads."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
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

from kernel.abi import FRAME_DTYPE, lib, names
from kernel.agent import ANY_CPU, RunRequest, Scheduler, StatusWord, Topology, txn_state
from kernel.providers.sim.sched import STEP, Machine, Run
from sylvie.life import implementations

POLICIES = implementations("sched")
FOREVER = 10**6  # ms


def policy(name: str) -> Any:
    return importlib.import_module(f"components.sched.{name}").Policy


def ran(m: Machine, gtid: int) -> float:
    """Milliseconds on a CPU."""
    return float(m.tasks["runtime"][m.threads[gtid].row]) / 1e6


@pytest.mark.parametrize("name", POLICIES)
def test_no_cpu_is_idle_while_somebody_waits_and_all_get_on(name: str) -> None:
    m = Machine(2)
    r = Run(m, policy(name))
    rng = np.random.default_rng(3)
    gtids = [m.start([(float(rng.uniform(0.2, 6)), float(rng.uniform(0.5, 4))) for _ in range(400)]) for _ in range(6)]
    r.run(800)
    assert m.wasted < 160, f"{m.wasted} of 16000"  # (what is chosen for another CPU waits for it until it has been chosen anew)
    assert all(len(m.threads[g].bursts) > 20 for g in gtids if g in m.threads)
    assert r.policy.dump()["tasks"] == len(m.threads)


@pytest.mark.parametrize("name", ["fifo_per_cpu", "fifo_centralized"])
def test_first_in_first_out_until_it_blocks(name: str) -> None:
    m = Machine(1)
    r = Run(m, policy(name))
    gtids = []
    for _ in range(5):
        gtids.append(m.start([(20, 1000), (1, 0)]))
        r.run(1)
    r.run(150)
    ends = [m.threads[g].bursts[0][1] for g in gtids]
    assert ends == sorted(ends)
    # each in one piece, but for what the machine itself did while a decision was on its way
    assert all(b - a >= 19e6 for a, b in zip([ends[0] - 20_000_000, *ends[:-1]], ends, strict=True))


def test_round_robin_takes_turns() -> None:
    m = Machine(1)
    r = Run(m, policy("round_robin"))
    gtids = [m.start([(FOREVER, 0)]) for _ in range(4)]
    r.run(400)
    assert all(abs(ran(m, g) - 100) < 12 for g in gtids), [ran(m, g) for g in gtids]


@pytest.mark.parametrize("nice", [(0, 0, 0), (0, 5, 5), (-5, 0, 5)])
def test_cfs_is_fair_by_weight(nice: tuple[int, ...]) -> None:
    from components.sched.cfs import WEIGHT

    m = Machine(1)
    r = Run(m, policy("cfs"))
    gtids = [m.start([(FOREVER, 0)], nice=n) for n in nice]
    r.run(3000)
    total = sum(WEIGHT[n + 20] for n in nice)
    for g, n in zip(gtids, nice, strict=True):
        assert abs(ran(m, g) / 3000 - WEIGHT[n + 20] / total) < 0.04, (n, ran(m, g))


def test_cfs_gives_nothing_back_for_sleep() -> None:
    """Who slept for a second does not get a second to itself."""
    m = Machine(1)
    r = Run(m, policy("cfs"))
    spinner = m.start([(FOREVER, 0)])
    sleeper = m.start([(1, 1000), (FOREVER, 0)])
    r.run(1050)
    before = ran(m, spinner)
    r.run(200)
    assert ran(m, spinner) - before > 70
    assert ran(m, sleeper) > 70


def test_the_earliest_deadline_runs_first() -> None:
    """Nice makes deadlines: 20 ms at 0, 8.2 at -4, 48.8 at 4."""
    m = Machine(1)
    r = Run(m, policy("edf"))
    first = m.start([(30, 0)])
    r.run(1)
    late, soon, middle = (m.start([(10, 1000), (1, 0)], nice=n) for n in (4, -4, 0))
    del first
    r.run(100)
    ends = {n: m.threads[g].bursts[0][1] for n, g in (("late", late), ("soon", soon), ("middle", middle))}
    assert ends["soon"] < ends["middle"] < ends["late"]
    assert ends["soon"] < 14e6, "it takes the CPU from who was due later"


def dispersive(name: str | None, batch: int) -> tuple[float, float]:
    """p99 of short requests in ms, and the batch's share of the CPUs: 99 % of 1 ms, 1 % of 60 ms, load 0.7 on two CPUs."""
    rng = np.random.default_rng(5)
    m = Machine(2)
    r = Run(m, policy(name) if name else None)
    batches = [m.start([(FOREVER, 0)]) for _ in range(batch)]
    workers: list[int] = []
    r.run(10)
    end, at, short = 3000.0, 10.0, []
    while at < end:
        wait = rng.exponential(1 / (0.7 * 2 / 1.59))
        r.run(max(0.1, wait))
        at += max(0.1, wait)
        long = rng.random() < 0.01
        short.append((m.start([(60.0 if long else 1.0, 0)]), long))
        workers.append(short[-1][0])
    r.run(200)
    times = [m.ended[g].bursts[0][1] - m.ended[g].bursts[0][0] for g, long in short if not long and g in m.ended]
    assert len(times) > 0.95 * len(short)
    return float(np.percentile(np.array(times) / 1e6, 99)), sum(ran(m, b) for b in batches) / (2 * at)


@pytest.mark.parametrize("batch", [0, 4])
def test_shinjuku_puts_short_requests_first(batch: int) -> None:
    p99, left = dispersive("shinjuku", batch)
    default, had = dispersive(None, batch)
    assert p99 < (0.6 if batch == 0 else 0.3) * default, (p99, default)
    if batch:
        assert left > 0.15, "the batch has what is left"
        assert left > 0.5 * had, (left, had)


def test_numa_aware_runs_threads_near_their_frames() -> None:
    frames = np.zeros(2000, FRAME_DTYPE)
    frames["state"], frames["node"][1000:] = lib.SY_FRAME_MAPPED, 1
    frames["asid"][:1000], frames["asid"][1000:] = 7, 8
    spent = {}
    for name in ("numa_aware", "fifo_per_cpu"):
        m = Machine(4, nodes=2)
        r = Run(m, policy(name), frames=frames)
        near = far = 0
        gtids = [m.start([(1.5, 3.0)] * 2000, asid=7 + k % 2) for k in range(6)]
        for _ in range(6000):
            r.run(STEP / 1e6)
            for cpu, t in enumerate(m.on):
                if t is not None:
                    at_home = int(m.tasks["asid"][t.row]) - 7 == cpu // 2
                    near, far = near + at_home, far + (not at_home)
        spent[name] = near / (near + far)
        assert all(g in m.threads for g in gtids)
    assert spent["numa_aware"] > 0.8 and spent["numa_aware"] > spent["fifo_per_cpu"] + 0.15, spent
    m = Machine(2)
    a, b = Run(Machine(2), policy("numa_aware")), Run(Machine(2), policy("fifo_per_cpu"))
    for r in (a, b):
        for k in range(5):
            r.machine.start([(1 + k, 2.0)] * 50)
        r.run(200)
    assert sorted(map(int, a.machine.tasks["runtime"])) == sorted(map(int, b.machine.tasks["runtime"])), "on one node it is fifo_per_cpu"
    del m


@pytest.mark.parametrize("name", POLICIES)
def test_another_instance_goes_on_from_the_status_words(name: str) -> None:
    m = Machine(2)
    r = Run(m, policy(name))
    gtids = [m.start([(3, 2)] * 300) for _ in range(5)]
    for _ in range(6):
        r.run(40)
        r.agent(policy(name))
        assert set(r.policy.known) == set(m.threads)
    done = [len(m.threads[g].bursts) for g in gtids]
    assert min(done) > 10, done


def test_messages_that_were_lost_do_no_harm() -> None:
    """The runtime sees the gap and has everything rebuilt, as on the bus."""
    m = Machine(2)
    r = Run(m, policy("fifo_centralized"))
    for _ in range(5):
        m.start([(2, 2)] * 300)
    for _ in range(10):
        r.run(20)
        m.step()
        m.events()
        r.late.clear()
        r.policy.rebuild()
    before = sum(len(t.bursts) for t in m.threads.values())
    r.run(100)
    assert sum(len(t.bursts) for t in m.threads.values()) - before > 60


class Recorder(Scheduler):
    """Handles everything, decides nothing."""

    def forget(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.failed: list[tuple[int, str]] = []

    def task_new(self, task: Any, msg: Any = None) -> None:
        self.heard.append(("new", task.gtid))

    def task_wakeup(self, task: Any, msg: Any) -> None:
        self.heard.append((msg.type, msg.waker_cpu))

    def task_blocked(self, task: Any, msg: Any) -> None:
        self.heard.append((msg.type, msg.runtime))
        assert msg.gtid.tid == task.gtid.tid and msg.seqnum == task.seqnum

    def cpu_timer_expired(self, cpu: int, msg: Any) -> None:
        self.heard.append(("timer", msg.runtime))

    def run_failed(self, task: Any, cpu: int, state: str) -> None:
        self.failed.append((task.gtid, state))


def test_the_library() -> None:
    m = Machine(2)
    r = Run(m, Recorder, delay=0)
    words = r.policy.words()
    assert set(words["messages"]) == {lib.SY_MSG_TASK_NEW, lib.SY_MSG_TASK_DEAD, lib.SY_MSG_TASK_DEPARTED, lib.SY_MSG_TASK_WAKEUP, lib.SY_MSG_TASK_BLOCKED, lib.SY_MSG_CPU_TIMER_EXPIRED}
    assert words["tick"] == [0]
    a, b, c = m.start([(5, 5), (5, 0)], nice=3), m.start([(FOREVER, 0)], affinity=[1]), m.start([(FOREVER, 0)])
    r.run(12)
    assert [k for k, _ in r.policy.heard] == ["new"] * 3 + ["TASK_BLOCKED", "TASK_WAKEUP"]
    task = r.policy.known[a]
    word: StatusWord = task.status
    assert word.gtid == a and word.nice == 3 and r.policy.known[b].status.affinity() == {1} and word.runnable
    assert abs(word.runtime(m.ns) / 1e6 - ran(m, a)) < 0.2
    p = r.policy

    def commit(*requests: RunRequest, sync: bool = False) -> list[tuple[int, str]]:
        p.failed.clear()
        p.commit(*requests, sync=sync)
        r._decide()
        return list(p.failed)

    on_b, on_c = p.known[b], p.known[c]
    assert commit(RunRequest(on_b, 0)) == [(b, "INVALID_CPU")]
    assert commit(RunRequest(on_b, 1, target_barrier=99)) == [(b, "TARGET_STALE")]
    assert commit(RunRequest(on_b, 1, agent_barrier=99)) == [(b, "AGENT_STALE")]
    assert commit(RunRequest(on_b, 1, rank=2)) == []
    assert word.chosen is False and on_b.status.chosen
    # sync group: the second cannot be, so the first is not
    assert commit(RunRequest(on_c, 0), RunRequest(on_b, 1, target_barrier=12345), sync=True) == [(c, "POISONED"), (b, "TARGET_STALE")]
    assert not on_c.status.chosen
    assert commit(RunRequest(on_c, 0), RunRequest(on_b, 1), sync=True) == [] and on_c.status.chosen
    assert commit(RunRequest(on_c, 1)) == [(c, "TARGET_ONCPU")]
    p.unrun(0)
    r._decide()
    assert not on_c.status.chosen
    p.txn.timer(0, 2000, 5)
    r._decide()
    r.run(4)
    assert p.heard[-1] == ("timer", 5)
    m.end(b)
    r.run(1)
    assert b not in p.known and commit(RunRequest(on_c, ANY_CPU, run_flags=lib.SY_RUN_STANDING)) == []
    assert {txn_state(v) for v in names("SY_R_")} >= {"COMPLETE", "TARGET_NOT_FOUND", "TARGET_STALE", "POISONED", "CPU_UNAVAIL"}


def test_topology(tmp_path: Any) -> None:
    for cpu, siblings, l3 in ((0, "0,2", "0-3"), (1, "1,3", "0-3"), (2, "0,2", "0-3"), (3, "1,3", "0-3")):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/cache/index3").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
        (tmp_path / f"cpu{cpu}/cache/index3/shared_cpu_list").write_text(l3 + "\n")
    t = Topology(range(5), bytes([0, 0, 1, 1, 1]), tmp_path)
    assert [(c.id, c.core, c.l3, c.node) for c in t] == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 0, 1), (3, 1, 0, 1), (4, 4, 4, 1)]
    assert t.cpus[0].siblings == {0, 2} and t.on_node(1) == [2, 3, 4]


class Life(RuleBasedStateMachine):
    """Threads come, go, are pinned and killed, agents are replaced: everything that can run runs, nothing is chosen twice."""

    name = ""

    @initialize(cpus=st.integers(1, 4), delay=st.integers(0, 5))
    def begin(self, cpus: int, delay: int) -> None:
        self.m = Machine(cpus)
        self.r = Run(self.m, policy(self.name), delay)
        self.mean: dict[int, int] = {}

    @precondition(lambda self: len(self.m.threads) < 8)
    @rule(run=st.floats(0.1, 8), sleep=st.floats(0, 8), times=st.integers(1, 40), nice=st.integers(-3, 3))
    def start(self, run: float, sleep: float, times: int, nice: int) -> None:
        self.m.start([(run, sleep)] * times, nice=nice)

    @precondition(lambda self: self.m.threads)
    @rule(k=st.integers(0, 1000))
    def kill(self, k: int) -> None:
        self.m.end(sorted(self.m.threads)[k % len(self.m.threads)])

    @precondition(lambda self: self.m.threads)
    @rule(k=st.integers(0, 1000), mask=st.integers(1, 15))
    def pin(self, k: int, mask: int) -> None:
        cpus = [c for c in range(len(self.m.cpus)) if mask >> c & 1] or [0]
        self.m.set_affinity(sorted(self.m.threads)[k % len(self.m.threads)], cpus)

    @rule(ms=st.floats(0.1, 30))
    def wait(self, ms: float) -> None:
        self.r.run(ms)

    @rule()
    def replace(self) -> None:
        self.r.agent(policy(self.name))

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "m"):
            return
        t = self.m.tasks[self.m.tasks["gtid"] != 0]
        assert {int(g) for g in t["gtid"]} == set(self.m.threads)
        pinned = t[(t["flags"] & lib.SY_TF_CHOSEN != 0) & (t["run_cpu"] >= 0)]
        assert len(set(pinned["run_cpu"].tolist())) == len(pinned), "two are chosen for one CPU"

    def teardown(self) -> None:
        """Left alone, every thread that can run does, within a bound."""
        if not hasattr(self, "m"):
            return
        for _ in range(20):
            before = {g: int(self.m.tasks["runtime"][t.row]) + len(t.bursts) for g, t in self.m.threads.items() if self.m.tasks["flags"][t.row] & lib.SY_TF_RUNNABLE}
            self.r.run(60)
            stuck = [g for g, had in before.items() if g in self.m.threads and int(self.m.tasks["runtime"][self.m.threads[g].row]) + len(self.m.threads[g].bursts) == had]
            if not stuck:
                return
        raise AssertionError(f"{len(stuck)} threads never ran in a second and more")


@pytest.mark.parametrize("name", POLICIES)
def test_random_lives(name: str) -> None:
    life = type("Life", (Life,), {"name": name})
    run_state_machine_as_test(life, settings=settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)))


def test_kswapd_spares_programs_that_run() -> None:
    """What sched knows decides which frames leave: those of the program that sleeps, though they are the youngest."""
    from bus.policy import Transaction
    from components.kswapd import spare_running, two_list

    frames = np.zeros(400, FRAME_DTYPE)
    frames["state"] = lib.SY_FRAME_MAPPED
    frames["asid"][:200], frames["asid"][200:] = 1, 2
    m = Machine(2)
    m.start([(FOREVER, 0)], asid=1)
    m.start([(1, FOREVER), (1, 0)], asid=2)
    third = m.start([(0.5, FOREVER), (1, 0)], asid=2)
    for _ in range(7000):
        m.step()
        m.said.clear()
    left = {}
    for kind in (two_list.Policy, spare_running.Policy):
        p: Any = kind(frames, m.header, [(0, 400)], Transaction(frames), lambda: m.ns / 1e9)
        p.tasks, p.sched = m.tasks, m.sched
        p.rebuild()
        p.arrived(np.arange(200))
        p.arrived(np.arange(200, 400))
        victims = p.victims(np.arange(400), 100, True)
        left[kind] = np.bincount(frames["asid"][victims], minlength=3)
    assert left[two_list.Policy].tolist() == [0, 100, 0], "the oldest"
    assert left[spare_running.Policy].tolist() == [0, 0, 100], "the sleeper's"
    assert spare_running.Policy.tunables["idle_s"].default < 1.5
    # one of its threads runs again: it does not sleep
    m.threads[third].wakes = m.ns
    for _ in range(5):
        m.step()
    p.tasks, p.sched = m.tasks, m.sched
    assert p.sleeping().tolist() == []
    assert len(p.victims(np.arange(400), 100, True)) == 100
