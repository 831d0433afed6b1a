"""buddy's allocators against a simple model, and its refilling against a gateway that is a few lines of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from bus.policy import Transaction
from bus.tables import MAX_ORDER, REGION, buddyinfo, frames_by_state, free_blocks, maximal_blocks
from components.buddy import buddy, next_fit
from components.buddy.buddy import BuddyAllocator
from components.buddy.free_map import FreeMap
from components.buddy.next_fit import NextFitAllocator
from components.buddy.refill import QUICK, SHARE, SLOW, RefillPolicy, most, reserve_targets, start_target
from kernel.abi import FRAME_DTYPE, MSG_DTYPE, lib

FREE, GRANTED, MAPPED, RESERVED, OFFLINE = (
    lib.SY_FRAME_FREE, lib.SY_FRAME_GRANTED, lib.SY_FRAME_MAPPED, lib.SY_FRAME_RESERVED, lib.SY_FRAME_OFFLINE,
)  # fmt: skip
NODES = [(0, 2 * REGION), (2 * REGION, REGION)]
FRAMES = 3 * REGION


def table(regions: int, state: int = FREE) -> NDArray[np.void]:
    frames = np.zeros(regions * REGION, FRAME_DTYPE)
    frames["state"] = state
    return frames


def set_state(frames: NDArray[np.void], pfn: int, npages: int, state: int, asid: int = 0, order: int = 0) -> None:
    part = frames[pfn : pfn + npages]
    part["state"], part["asid"], part["order"] = state, asid, order
    part["barrier"] += 1


def slow_maximal_blocks(free: list[bool]) -> dict[int, int]:
    """{first pfn: order}, by the definition: aligned, all free, and not part of a larger such block."""
    blocks: dict[int, int] = {}
    pfn = 0
    while pfn < len(free):
        order = MAX_ORDER
        while order >= 0 and (pfn % (1 << order) or not all(free[pfn : pfn + (1 << order)])):
            order -= 1
        if order >= 0:
            blocks[pfn] = order
        pfn += 1 << max(order, 0)
    return blocks


class AllocatorMachine(RuleBasedStateMachine):
    """The table is the model. Rules change it as the gateway does; the allocator hears of it, late, twice or not at
    all where that may happen, and must equal the table whenever it has heard everything."""

    make: type[FreeMap]

    def __init__(self) -> None:
        super().__init__()
        self.frames = table(3, OFFLINE)
        self.allocator = self.make(self.frames, NODES)
        self.allocator.load()
        self.unheard: list[tuple[int, int]] = []

    @initialize(pfn=st.sampled_from([0, 0, REGION, 2 * REGION]), npages=st.sampled_from([FRAMES, REGION, 700]))
    def populate(self, pfn: int, npages: int) -> None:
        self.online(pfn, npages)

    @rule(pfn=st.integers(0, FRAMES - 1), npages=st.integers(1, 2 * REGION))
    def online(self, pfn: int, npages: int) -> None:
        part = self.frames["state"][pfn : pfn + npages]
        part[part == OFFLINE] = FREE
        self.allocator.look(pfn, npages)

    @rule(order=st.integers(0, MAX_ORDER), count=st.integers(1, 40), node=st.integers(0, 1))
    def take(self, order: int, count: int, node: int) -> None:
        base, size = NODES[node]
        whole = np.all(self.believed_free()[base : base + size].reshape(-1, 1 << order), axis=1, keepdims=False)
        pfns = self.allocator.take(order, count, node)
        assert len(pfns) == min(count, int(whole.sum()))
        assert len(set(pfns.tolist())) == len(pfns)
        stale = []
        for pfn in pfns.tolist():
            assert pfn % (1 << order) == 0
            assert base <= pfn < base + size
            assert whole[(pfn - base) >> order]
            if (self.frames["state"][pfn : pfn + (1 << order)] == FREE).all():
                set_state(self.frames, pfn, 1 << order, GRANTED, 1, order)
            else:  # the gateway answers STALE: we look at that region again
                stale.append(pfn)
        for pfn in stale:
            self.allocator.look(pfn // REGION * REGION, REGION)

    def believed_free(self) -> NDArray[np.bool_]:
        free: NDArray[np.bool_] = self.frames["state"] == FREE
        for pfn, npages in self.unheard:
            free[pfn : pfn + npages] = self.allocator._free[pfn : pfn + npages]
        return free

    @rule(pfn=st.integers(0, FRAMES - 1), npages=st.integers(1, REGION))
    def freed(self, pfn: int, npages: int) -> None:
        part = self.frames["state"][pfn : pfn + npages]
        part[part == GRANTED] = FREE
        self.allocator.look(pfn, npages)

    @rule(starts=st.lists(st.integers(0, FRAMES - 1), max_size=20), npages=st.integers(1, 9))
    def freed_many(self, starts: list[int], npages: int) -> None:
        for pfn in starts:
            part = self.frames["state"][pfn : pfn + npages]
            part[part == GRANTED] = FREE
        self.allocator.look(np.array(starts, np.uint32), np.full(len(starts), npages, np.uint32))

    @rule(pfn=st.integers(0, FRAMES - 1), npages=st.integers(1, 300), at_once=st.booleans())
    def first_fit(self, pfn: int, npages: int, at_once: bool) -> None:
        part = self.frames["state"][pfn : pfn + npages]
        part[part == FREE] = GRANTED
        if at_once:
            self.allocator.look(pfn, npages)
        else:
            self.unheard.append((pfn, npages))

    @precondition(lambda self: self.unheard)
    @rule()
    def hear(self) -> None:
        for pfn, npages in self.unheard:
            self.allocator.look(pfn, npages)
        self.unheard.clear()

    @rule(pfn=st.integers(0, 1 << 32), npages=st.integers(0, 1 << 31))
    def nonsense(self, pfn: int, npages: int) -> None:
        if pfn >= FRAMES or pfn + npages <= FRAMES:
            self.allocator.look(pfn, npages)
            self.unheard = [run for run in self.unheard if not pfn <= run[0] <= run[0] + run[1] <= pfn + npages]

    @rule()
    def rebuild(self) -> None:
        self.allocator.load()
        self.unheard.clear()

    @invariant()
    def equals_the_table(self) -> None:
        if self.unheard:
            return
        free = self.frames["state"] == FREE
        assert self.allocator.free_frames == int(free.sum())
        assert (self.allocator._free == free).all()
        if isinstance(self.allocator, BuddyAllocator):
            blocks = slow_maximal_blocks(free.tolist())
            heads = self.allocator._heads.reshape(-1)
            assert {int(pfn): int(heads[pfn]) for pfn in np.flatnonzero(heads >= 0)} == blocks
            counts = [[0] * (MAX_ORDER + 1) for _ in NODES]
            for pfn, order in blocks.items():
                counts[0 if pfn < NODES[1][0] else 1][order] += 1
            assert self.allocator.blocks() == counts == free_blocks(self.frames, NODES)


class BuddyMachine(AllocatorMachine):
    make = BuddyAllocator


class NextFitMachine(AllocatorMachine):
    make = NextFitAllocator


_settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBuddyMachine = BuddyMachine.TestCase
TestBuddyMachine.settings = _settings
TestNextFitMachine = NextFitMachine.TestCase
TestNextFitMachine.settings = _settings


def test_smallest_block_of_the_fullest_region() -> None:
    frames = table(3)
    set_state(frames, 0, 4, GRANTED)  # region 0: one block of order 2 in use
    set_state(frames, REGION, REGION // 2 + 4, GRANTED)  # region 1: more than half
    allocator = BuddyAllocator(frames, [(0, 3 * REGION)])
    allocator.load()
    # Both have a block of order 2, region 1 has less left; region 2 stays whole until the others are used up.
    assert allocator.take(2, 1, 0).tolist() == [REGION + REGION // 2 + 4]
    assert allocator.take(2, 1, 0).tolist() == [4]
    assert allocator.take(0, 2 * REGION, 0).tolist()[-1] >= 2 * REGION


def test_taking_many_splits_one_block() -> None:
    frames = table(1)
    allocator = BuddyAllocator(frames, [(0, REGION)])
    allocator.load()
    assert allocator.take(4, 3, 0).tolist() == [0, 16, 32]
    assert allocator.blocks()[0] == [0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0]


def test_next_fit_goes_on_where_it_was() -> None:
    frames = table(1)
    allocator = NextFitAllocator(frames, [(0, REGION)])
    allocator.load()
    assert allocator.take(0, 3, 0).tolist() == [0, 1, 2]
    assert allocator.take(2, 1, 0).tolist() == [4]
    allocator.look(0, 8)  # never committed: free again, but behind the cursor
    assert allocator.take(0, 1, 0).tolist() == [8]


@pytest.mark.parametrize("make", [BuddyAllocator, NextFitAllocator])
def test_nodes_must_be_whole_regions(make: type[FreeMap]) -> None:
    with pytest.raises(ValueError, match="whole regions"):
        make(table(2), [(0, REGION + 8), (REGION + 8, REGION - 8)])


def test_buddyinfo_has_the_kernels_form() -> None:
    frames = table(3)
    set_state(frames, 2 * REGION, REGION - 1, MAPPED, 1)
    counts = free_blocks(frames, NODES)
    assert counts == [[0] * 10 + [2], [1] + [0] * 10]
    first, second = buddyinfo(counts).splitlines()
    assert first == "Node 0, zone   Sylvie" + "      0" * 10 + "      2 "
    assert second.split() == ["Node", "1,", "zone", "Sylvie", "1", *["0"] * 10]
    assert frames_by_state(frames)["mapped"] == REGION - 1


def test_maximal_blocks_against_the_definition() -> None:
    free = np.random.default_rng(5).random(REGION) < 0.9
    heads = maximal_blocks(free)
    assert {int(pfn): int(heads[pfn]) for pfn in np.flatnonzero(heads >= 0)} == slow_maximal_blocks(free.tolist())


# ---- refilling ----
class FakeGateway:
    """What ``sy_gw_commit`` does, for GRANT and RESERVE, on a table in memory; and the stub's side of magazines."""

    def __init__(self, module: Any, regions: int = 256) -> None:
        self.frames = table(regions)
        self.magazines: dict[tuple[int, int], list[int]] = {}
        self.consumed: dict[tuple[int, int], int] = {}
        self.reserve: dict[int, list[int]] = {}
        self.dead: set[int] = set()
        self.now = 0.0
        self.ops_done = 0
        self.make: Callable[[], RefillPolicy] = lambda: self._policy(module.Policy, regions)
        self.policy: RefillPolicy = self.make()

    def _policy(self, policy_class: type[RefillPolicy], regions: int) -> RefillPolicy:
        nodes = [(0, regions // 2 * REGION), (regions // 2 * REGION, (regions - regions // 2) * REGION)]
        policy = policy_class(self.frames, None, nodes, Transaction(self.frames))
        policy.clock = lambda: self.now
        policy.rebuild()
        return policy

    def settle(self) -> None:
        """What the runtime does after a batch of events."""
        self.policy.step()
        for _ in range(4):
            ops = self.policy.txn.take()
            if not len(ops):
                return
            for op in ops:
                op["result"] = self.commit(op)
            self.policy.result(ops)

    def commit(self, op: np.void) -> int:
        pfn, order, asid = int(op["pfn"]), int(op["order"]), int(op["asid"])
        block = self.frames[pfn : pfn + (1 << order)]
        assert pfn % (1 << order) == 0
        if asid in self.dead:
            return int(lib.SY_R_NOT_FOUND)
        if op["barrier"] != self.frames[pfn]["barrier"] or (block["state"] != FREE).any():
            return int(lib.SY_R_STALE)
        self.ops_done += 1
        if op["op"] == lib.SY_OP_RESERVE:
            set_state(self.frames, pfn, 1 << order, RESERVED, 0, order)
            self.reserve.setdefault(order, []).append(pfn)
        else:
            assert op["op"] == lib.SY_OP_GRANT
            ring = self.magazines.setdefault((asid, order), [])
            if len(ring) >= lib.SY_MAG_SLOTS:
                return int(lib.SY_R_FULL)
            set_state(self.frames, pfn, 1 << order, GRANTED, asid, order)
            ring.append(pfn)
        return int(lib.SY_R_COMPLETE)

    def event(self, handler: str, **fields: int) -> None:
        events = np.zeros(1, MSG_DTYPE)
        for name, value in fields.items():
            events[name] = value
        getattr(self.policy, handler)(events)

    def use(self, asid: int, order: int, blocks: int) -> None:
        """A program maps ``blocks`` from its magazine, and its stub says that it is low."""
        ring = self.magazines.setdefault((asid, order), [])
        for _ in range(blocks):
            set_state(self.frames, ring.pop(0), 1 << order, MAPPED, asid, order)
        self.consumed[asid, order] = self.consumed.get((asid, order), 0) + blocks
        self.low(asid, order)
        self.settle()

    def low(self, asid: int, order: int) -> None:
        """MAGAZINE_LOW, as things are now."""
        level, consumed = self.level(asid, order), self.consumed.get((asid, order), 0)
        self.event("magazine_low", asid=asid, order=order, npages=level, arg=consumed)

    def level(self, asid: int, order: int) -> int:
        return len(self.magazines.get((asid, order), []))


@pytest.fixture(params=[buddy, next_fit], ids=["buddy", "next_fit"])
def gateway(request: pytest.FixtureRequest) -> FakeGateway:
    fake = FakeGateway(request.param)
    fake.settle()
    return fake


def test_reserve_is_filled_and_refilled(gateway: FakeGateway) -> None:
    targets = reserve_targets(len(gateway.frames))
    assert targets[9] == len(gateway.frames) // 16 >> 9
    assert gateway.policy.words() == {"reserve": targets}
    assert [len(gateway.reserve.get(order, [])) for order in range(MAX_ORDER + 1)] == targets
    assert {pfn // (128 * REGION) for pfn in gateway.reserve[0]} == {0, 1}, "both nodes hold some"
    for pfn in gateway.reserve[4][:40]:
        set_state(gateway.frames, pfn, 16, MAPPED, 3, 4)
    del gateway.reserve[4][:40]
    gateway.event("reserve_low", order=4, npages=24)
    gateway.settle()
    assert len(gateway.reserve[4]) == targets[4]


def test_small_reserve_is_filled_as_frames_come_online() -> None:
    fake = FakeGateway(buddy, 8)
    fake.frames["state"][REGION:] = OFFLINE
    fake.policy.rebuild()
    fake.settle()
    assert sum(len(pfns) << order for order, pfns in fake.reserve.items()) < REGION // 2
    fake.frames["state"][REGION:] = FREE
    fake.event("frames_online", pfn=REGION, npages=7 * REGION)
    fake.settle()
    assert [len(fake.reserve.get(order, [])) for order in (0, 4)] == reserve_targets(len(fake.frames))[0:5:4]


@pytest.mark.parametrize("order", [0, 4, 9])
def test_target_doubles_under_demand_and_decays(gateway: FakeGateway, order: int) -> None:
    gateway.use(7, order, 0)
    assert gateway.level(7, order) == start_target(order)
    gateway.now += QUICK / 2
    gateway.use(7, order, start_target(order) - 1)
    assert gateway.level(7, order) == 2 * start_target(order)
    for _ in range(12):
        gateway.now += QUICK / 2
        gateway.use(7, order, gateway.level(7, order))
    assert gateway.policy.magazines[7, order].target == most(order)
    assert gateway.level(7, order) <= gateway.policy.allocator.free_frames // (SHARE - 1) >> order
    grown = gateway.policy.magazines[7, order].target
    gateway.now += SLOW * 1.5
    gateway.use(7, order, gateway.level(7, order))
    assert gateway.policy.magazines[7, order].target == max(grown // 2, start_target(order))
    gateway.now += SLOW * 100
    gateway.use(7, order, gateway.level(7, order))
    assert gateway.policy.magazines[7, order].target == start_target(order)


def test_never_more_than_the_ring_holds(gateway: FakeGateway) -> None:
    for _ in range(20):
        gateway.use(7, 0, gateway.level(7, 0) // 2)
    assert gateway.level(7, 0) <= lib.SY_MAG_SLOTS
    assert gateway.policy.refused == {}


def test_low_that_was_said_before_the_refill_is_not_answered_twice(gateway: FakeGateway) -> None:
    gateway.use(7, 4, 0)
    gateway.use(7, 4, 28)
    assert gateway.level(7, 4) == 64
    gateway.event("magazine_low", asid=7, order=4, npages=5, arg=28)  # sent when one block of that refill had come
    gateway.settle()
    assert gateway.policy.magazines[7, 4].target == 128, "it ran low while it was being filled"
    assert gateway.level(7, 4) == 128
    gateway.low(7, 0)
    gateway.low(7, 0)
    gateway.settle()
    assert gateway.level(7, 0) == start_target(0), "said twice before it was answered: answered once"


def test_dead_are_forgotten(gateway: FakeGateway) -> None:
    gateway.use(7, 4, 0)
    gateway.event("mm_exit", asid=7)
    assert gateway.policy.magazines == {}
    gateway.dead.add(8)  # its MM_EXIT has not come yet
    free = gateway.policy.allocator.free_frames
    gateway.use(8, 4, 0)
    assert gateway.policy.magazines == {}
    assert gateway.policy.allocator.free_frames == free, "refused blocks are still ours"


def test_stale_is_looked_at_again_and_granted_elsewhere(gateway: FakeGateway) -> None:
    victims = np.flatnonzero(gateway.frames["state"] == FREE)[: 4 * REGION]
    gateway.frames["state"][victims] = MAPPED  # the gateway's first fit took them; FRAMES_TAKEN is still on its way
    gateway.frames["barrier"][victims] += 1
    gateway.use(7, 4, 0)
    gateway.settle()
    for _ in range(200):
        if gateway.level(7, 4) == start_target(4):
            break
        gateway.settle()
    assert gateway.level(7, 4) == start_target(4)


def test_owed_until_frames_come_back(gateway: FakeGateway) -> None:
    free = gateway.frames["state"] == FREE
    gateway.frames["state"][free] = MAPPED
    gateway.policy.rebuild()
    gateway.use(7, 4, 0)
    assert gateway.level(7, 4) == 0
    gateway.frames["state"][free] = FREE
    gateway.event("page_freed", pfn=0, npages=len(gateway.frames))
    gateway.settle()
    assert gateway.level(7, 4) == start_target(4)


def test_restart_finds_everything_in_the_table(gateway: FakeGateway) -> None:
    gateway.use(7, 4, 0)
    gateway.use(9, 0, 0)
    for pfn in gateway.magazines[7, 4]:  # used up while nobody listened
        set_state(gateway.frames, pfn, 16, MAPPED, 7, 4)
    gateway.magazines[7, 4].clear()
    before = gateway.policy
    gateway.policy = gateway.make()
    assert gateway.policy.allocator.free_frames == before.allocator.free_frames
    assert gateway.policy._reserve == before._reserve
    gateway.settle()
    assert gateway.level(7, 4) == start_target(4)
    assert gateway.level(7, 0) == start_target(0), "orders that every program uses"
    assert gateway.level(9, 0) == start_target(0), "was full, stays"
    assert gateway.policy.refused == {}


def test_no_single_refill_takes_the_last_memory() -> None:
    fake = FakeGateway(buddy, 8)
    fake.settle()
    free = fake.policy.allocator.free_frames
    fake.policy.magazines.clear()
    for _ in range(10):
        fake.use(7, 9, fake.level(7, 9))
    assert fake.level(7, 9) << 9 <= free // SHARE


def test_rebuild_of_16_gib_is_quick() -> None:
    frames = table(4096)
    rng = np.random.default_rng(1)
    frames["state"][rng.random(len(frames)) < 0.3] = MAPPED
    frames["asid"][frames["state"] == MAPPED] = 5
    policy = buddy.Policy(frames, None, [(0, len(frames))], Transaction(frames))
    policy.rebuild()
    assert policy.rebuild_seconds < 3, "about 0.5 s on an idle machine"
