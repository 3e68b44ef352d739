"""The SimPy model: closed forms, queueing theory, invariants."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from policies.transfers import Copy
from sim.link import NEVER, Link
from sim.timing import HostCosts, LinkCosts
from tests.given import LOSSY
from tests.machines import FlatTiming, make_machine, random_workload, step_ns

POLICIES = policies.names()
CACHELESS = ("layer-stream", "on-demand", "pregated")


# ---------------------------------------------------------------------- closed forms


def test_all_resident_is_compute_only() -> None:
    work = random_workload(1, layers=4)
    machine = make_machine(work, "resident", FlatTiming())
    machine.run()
    assert set(step_ns(machine)) == {4 * (100 + 10) + 50}
    assert machine.link.busy_ns == 0
    assert machine.core.tally.copied_bytes == 0


def test_host_costs_of_a_resident_step_by_the_contract() -> None:
    # segment_launch 3, experts_launch 5, readback 7, decision 11, issue 13, step 17. A layer: the
    # host launches the segment at 3, the GPU ends 100 later, ids are read at +7, decided at +11,
    # experts launched at +5; they run 10, beside the next launch (3). The head ends the step.
    work = random_workload(1, layers=2, steps=3, requests=1)
    timing = FlatTiming(host=HostCosts(3, 5, 7, 11, 13, 17))
    machine = make_machine(work, "resident", timing)
    machine.run()
    layer = 100 + 7 + 11 + 5 + 10
    assert set(step_ns(machine)) == {17 + 3 + layer + layer + 50 + 7}


def test_no_cache_and_no_prefetch_is_compute_plus_misses_times_copy() -> None:
    # Host free, copies of 1000 bytes at 1 byte/ns. In each event k copies follow one another; all
    # groups but the last run (10 ns) under the next copy.
    work = random_workload(2, layers=3, top_k=3)
    machine = make_machine(work, "on-demand", FlatTiming(), slots=3)
    machine.run()
    assert set(step_ns(machine)) == {3 * (100 + 3 * 1000 + 10) + 50}
    assert machine.link.busy_ns == 1000 * work.num_accesses


def test_a_copy_costs_issue_startup_and_gap() -> None:
    # One layer, two misses: handed over at 13 and 26; the first starts then with start-up 8, the
    # second follows with gap 5.
    work = random_workload(3, layers=1, steps=1, requests=1)
    timing = FlatTiming(host=HostCosts(0, 0, 0, 0, 13, 0), link=LinkCosts(10**9, 8, 5))
    machine = make_machine(work, "lru", timing)
    machine.run()
    assert step_ns(machine) == [100 + 13 + (8 + 1000) + (5 + 1000) + 10 + 50]


def test_slowdown_beside_copies_lengthens_kernels_exactly() -> None:
    # The prefetches of layer 0 (two copies of 1000) run beside segment 0, those of layer 1 beside
    # segment 1: 100 ns become 125 each. Beside the head (50 ns) the link is idle.
    work = random_workload(4, layers=2, steps=1, requests=1)
    timing = FlatTiming(segment_slowdown_ppm=250_000)
    machine = make_machine(work, "oracle-prefetch", timing, wrap=False, depth=1)
    machine.run()
    plain = make_machine(work, "oracle-prefetch", FlatTiming(), wrap=False, depth=1)
    plain.run()
    assert machine.times.segments[0] == 125 + 125 + 50
    assert plain.times.segments[0] == 100 + 100 + 50


def test_strict_id_order_waits_where_cached_first_does_not() -> None:
    times = {}
    for order in ("cached-first", "id"):
        work = random_workload(5, layers=2, steps=60, top_k=3)
        machine = make_machine(work, "lru", FlatTiming(per_expert=400), slots=4, order=order)
        machine.run()
        times[order] = sum(step_ns(machine))
        assert machine.core.tally.collision_misses == 0
    assert times["cached-first"] < times["id"]


def test_prefill_waves_thrash_in_id_order_only() -> None:
    tallies = {}
    for order in ("cached-first", "id"):
        work = random_workload(6, layers=2, steps=4, prompt=12, requests=6)
        machine = make_machine(work, "lru", FlatTiming(), slots=3, order=order)
        machine.run()
        tallies[order] = machine.core.tally
    assert tallies["cached-first"].collision_misses == 0
    assert tallies["id"].collision_misses > 0
    assert tallies["id"].copied_bytes > tallies["cached-first"].copied_bytes


# ---------------------------------------------------------------------- queueing theory


class _Arrivals:
    """A chunk source that is fed by arrivals and keeps when each chunk was done."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Copy, int]] = deque()
        self.done: list[int] = []
        self.now = 0

    def next_chunk(self) -> tuple[Copy, int] | None:
        return self.queue.popleft() if self.queue else None

    def chunk_done(self, copy: Copy) -> bool:
        assert copy.key == len(self.done)
        self.done.append(self.now)
        return False


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_link_at_poisson_load_waits_as_m_d_1_says(load: float) -> None:
    """Pollaczek-Khinchine for deterministic service: W = rho * S / (2 * (1 - rho))."""
    service, chunks = 1000, 60_000
    rng = np.random.default_rng(7)
    arrived = np.cumsum(np.rint(rng.exponential(service / load, chunks))).astype(int)
    source = _Arrivals()
    link = Link(source, LinkCosts(10**9, 0, 0), window=1, issue_ns=0)

    def until(instant: int) -> None:
        while link.lands <= instant:
            source.now = link.lands
            link.land()
            link.refill(source.now)

    for key, instant in enumerate(arrived.tolist()):
        until(instant)
        source.queue.append((Copy(key, 0, (service,), key, True), service))
        link.refill(instant)
    until(NEVER - 1)
    waits = np.array(source.done) - arrived - service
    expected = load * service / (2 * (1 - load))
    assert (waits >= 0).all()
    assert waits.mean() == pytest.approx(expected, rel=0.06)
    assert link.busy_ns == service * chunks


# ---------------------------------------------------------------------- invariants

machines = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "policy": st.sampled_from(POLICIES),
        "slots": st.integers(2, 9),
        "window": st.integers(1, 3),
        "chunks": st.integers(1, 3),
        "order": st.sampled_from(["cached-first", "touch", "id"]),
        "prompt": st.sampled_from([0, 5, 11]),
        "issue": st.integers(0, 40),
        "rate": st.sampled_from([10**8, 10**9, 3 * 10**10]),
        "slowdown": st.sampled_from([0, 130_000]),
        "predictor": st.sampled_from([0, 170]),
    }
)


def _run(case, *, checked=True):  # type: ignore[no-untyped-def]
    work = random_workload(case["seed"], steps=8, prompt=case["prompt"])
    timing = FlatTiming(
        host=HostCosts(3, 4, 5, 6, case["issue"], 9),
        link=LinkCosts(case["rate"], 7, 2),
        segment_slowdown_ppm=case["slowdown"],
        experts_slowdown_ppm=case["slowdown"],
        predictor_ns=dict.fromkeys(("next_gate", "learned", "map_search"), case["predictor"]),
    )
    machine = make_machine(
        work,
        case["policy"],
        timing,
        slots=case["slots"],
        window=case["window"],
        chunks=case["chunks"],
        order=case["order"],
        checked=checked,
    )
    machine.run()
    return machine


@settings(max_examples=150, deadline=None)
@given(machines)
def test_arithmetic_bursts_equal_simpy_events(case) -> None:  # type: ignore[no-untyped-def]
    """Demand copies on an otherwise idle link are worked out without events: same nanoseconds."""
    slow, fast = _run(case), _run(case, checked=False)
    assert fast.times == slow.times
    assert fast.core.tally == slow.core.tally
    assert fast.link.busy_ns == slow.link.busy_ns


@settings(max_examples=120, deadline=None)
@given(machines)
def test_invariants_of_every_run(case) -> None:  # type: ignore[no-untyped-def]
    machine = _run(case)
    core, tally, times = machine.core, machine.core.tally, machine.times
    buckets = tally.buckets.values()
    accesses = sum(bucket.accesses for bucket in buckets)
    lossy = case["policy"] in LOSSY
    asked = sum(bucket.asked for bucket in buckets) if lossy else accesses
    assert asked == machine.workload.num_accesses
    assert accesses == sum(bucket.hits + bucket.late + bucket.misses for bucket in buckets)
    assert tally.chunks == machine.chunks
    assert tally.copied_bytes == machine.chunk_bytes
    # Copies that were given up half way are all that may differ from whole experts.
    if core.shape.precisions == 1:
        assert tally.copied_bytes - 1000 * tally.copies == machine.abandoned_bytes()
    assert machine.most_occupied <= core.plan.used_bytes
    assert all(a <= b for a, b in zip(times.begin, times.end, strict=True))
    assert all(end == begin for end, begin in zip(times.end, times.begin[1:], strict=False))
    parts = zip(
        times.segments,
        times.experts,
        times.stall_late,
        times.stall_miss,
        times.stall_cpu,
        strict=True,
    )
    for step, part in zip(step_ns(machine), parts, strict=True):
        assert min(part) >= 0
        assert sum(part) <= step
    assert machine.link.busy_ns <= times.end[-1] + 10 * 10**9
    assert tally.prefetch_used <= tally.prefetch_issued


@settings(max_examples=25, deadline=None)
@given(machines)
def test_same_inputs_same_outputs(case) -> None:  # type: ignore[no-untyped-def]
    first, second = _run(case), _run(case)
    assert first.times == second.times
    assert first.core.tally == second.core.tally
    assert first.core.log == second.core.log


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(
        [
            name
            for name in POLICIES
            if policies.get(name).source != "bound"
            and name not in (*CACHELESS, *LOSSY)
            and name not in ("hybrid-split", "auto")  # what the CPU takes need not enter
        ]
    ),
)
def test_unlimited_budget_is_compute_only_once_warm(seed: int, policy: str) -> None:
    """With a slot for every expert each is copied at most once; a second pass copies nothing."""
    work = random_workload(seed, steps=40, requests=1)
    machine = make_machine(work, policy, FlatTiming(), slots=8 + 2)
    machine.run()
    tally = machine.core.tally
    assert tally.evictions == 0
    # Prefetches may bring an expert that is never needed, but each comes at most once.
    assert tally.copies <= 3 * 8
    compute = 3 * (100 + 10) + 50
    needed = [len({key for event in events for key in event}) for events in [work.events.step(0)]]
    assert needed[0] == 6
    assert min(step_ns(machine)) == compute


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["lru", "lfu", "belady", "slru", "lfru"]))
def test_decisions_of_time_independent_policies_do_not_depend_on_time(
    seed: int, policy: str
) -> None:
    work = random_workload(seed, steps=25)
    logs = []
    for rate, issue in ((10**8, 0), (10**10, 33)):
        timing = FlatTiming(host=HostCosts(1, 2, 3, 4, issue, 6), link=LinkCosts(rate, 5, 1))
        machine = make_machine(work, policy, timing, slots=3)
        machine.run()
        logs.append([entry for entry in machine.core.log or [] if entry[0] != "landed"])
    assert logs[0] == logs[1]


def test_a_faster_link_is_never_slower_for_demand_only_policies() -> None:
    work = random_workload(9, steps=50)
    spans = []
    for rate in (10**8, 10**9, 10**10):
        machine = make_machine(work, "lru", FlatTiming(link=LinkCosts(rate, 5, 1)))
        machine.run()
        spans.append(sum(step_ns(machine)))
    assert all(slow > fast for slow, fast in pairwise(spans))
