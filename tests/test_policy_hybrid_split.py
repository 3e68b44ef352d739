"""The split between link and CPU, worked out by hand; and that both work at the same time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from policies.errors import PolicyError
from policies.hybrid_split import RateSplit
from sim.inputs import Inputs
from sim.machine import Machine
from sim.point import Point, run_point
from sim.tape import can_record
from tests.driver import Log, make_core, policy_data, run_instant, shape_of, story, told, total
from tests.given import GivenCosts
from tests.machines import FlatTiming
from tracer.trace import Trace
from tracer.workload import Workload

# One expert more: 12 on the link; on the CPU 10 + 5 a token.
COSTS = GivenCosts(copy_start=100, cpu_start=100, cpu_expert=10, cpu_token=5)
SHAPE = shape_of(1, 8)


def test_hybrid_split_copies_the_links_share_and_those_with_most_tokens():
    steps = [[[0, 1, 2]], [[2, 1]], [[3, 4, 5]]]
    counts = [[[1, 1, 1]], [[1, 1]], [[1, 4, 2]]]
    log: Log = []
    core = make_core("hybrid-split", policy_data(SHAPE, steps, costs=COSTS), slots=2, log=log)
    launches = run_instant(core, steps, counts=counts)
    assert story(log) == told("""
        # share 15 / (12 + 15) = 0.56: 1.7 of three misses, so two; the first in touch order
        0.0 | 0 1 | +0 +1
        1.0 | 2 1* | -0 +2        # 0.56 of one miss, so it is copied
        # 7 tokens, 3 a miss: CPU 25, share 25 / 37 = 0.68: 2.03 of three; 3 has fewest tokens
        2.0 | 4 5 | -2 +4 -1 +5   # 1 was touched after 2
    """)
    assert [launch.cpu for launch in launches] == [(2,), (), (3,)]
    assert (total(core, "hits"), total(core, "misses"), total(core, "cpu")) == (1, 7, 2)


@pytest.mark.parametrize(
    ("cpu_ppm", "link_ppm", "copied"),
    [
        (0, 0, [1, 1, 2, 2, 3]),  # 15 / 27 = 0.556
        (1_000_000, 0, [1, 1, 2, 3, 4]),  # 30 / 42 = 0.714
        (0, 1_000_000, [0, 1, 1, 2, 2]),  # 15 / 39 = 0.385
        (250_000, 250_000, [1, 1, 2, 2, 3]),  # 18 / 33 = 0.545
    ],
)
def test_rates_are_those_beside_each_other(cpu_ppm, link_ppm, copied):
    costs = replace(COSTS, cpu_slowdown_ppm=cpu_ppm, link_slowdown_cpu_ppm=link_ppm)
    rule = RateSplit(SHAPE, costs, "nearest")
    sizes = [len(rule.on_misses(0, list(range(n)), {})) for n in range(1, 6)]
    assert [n - size for n, size in zip(range(1, 6), sizes, strict=True)] == copied


def test_halves_are_copied():
    rule = RateSplit(
        SHAPE, replace(COSTS, cpu_expert=7), "nearest"
    )  # 12 and 12: half of the misses each
    assert [len(rule.on_misses(0, list(range(n)), {})) for n in (1, 2, 3, 4)] == [0, 1, 1, 2]


def test_tokens_a_miss_are_rounded_up():
    # 5 tokens for 4 misses, so 2 each: CPU 20, share 20 / 32 = 0.625, 2.5 copies. At one token
    # each it would be 15 / 27 = 0.556, 2.2 copies.
    on_cpu = RateSplit(SHAPE, COSTS, "nearest").on_misses(0, [0, 1, 2, 3], {2: 2})
    assert on_cpu == [3]


def test_hybrid_split_owes_the_link_what_rounds_to_no_copy():
    # One expert more: 12 on the link, 1 + 5 on the CPU: share 1/3.
    data = policy_data(shape_of(2, 8), [], costs=replace(COSTS, cpu_expert=1))
    steps = [
        [[0], [8]],  # 1/3 owed in each layer
        [[1], [9, 10]],  # 2/3 owed; 2/3 of two misses make one copy, which settles layer 1
        [[2], [8]],  # 3/3: copied; 1/3
        [[1], [10]],  # 1/3; 2/3
        [[2], [11]],  # a hit owes nothing; 3/3: copied
    ]
    log: Log = []
    core = make_core("hybrid-split", data, slots=4, log=log)
    run_instant(core, steps)
    assert story(log) == told("""
        0.0 |  |                   # what the CPU computes is not told
        0.1 |  |
        1.0 |  |
        1.1 | 9 | +9
        2.0 | 2 | +2
        2.1 |  |
        3.0 |  |
        3.1 |  |
        4.0 | 2* |
        4.1 | 11 | +11
    """)


def test_hybrid_split_by_the_nearest_alone_copies_no_lone_miss_of_a_slow_link():
    data = policy_data(SHAPE, [], costs=replace(COSTS, cpu_expert=1))
    core = make_core("hybrid-split", data, slots=2, rounding="nearest")
    run_instant(core, [[[0]]] * 9)
    assert (total(core, "hits"), total(core, "cpu")) == (0, 9)
    owed = make_core("hybrid-split", data, slots=2)
    run_instant(owed, [[[0]]] * 9)
    assert (total(owed, "hits"), total(owed, "cpu")) == (6, 2)  # the third is copied


def test_hybrid_split_needs_costs():
    with pytest.raises(PolicyError, match="hybrid-split weighs CPU against link"):
        make_core("hybrid-split", policy_data(SHAPE, [[[0]]]), slots=3)


# ---------------------------------------------------------------------- in time


@dataclass
class SlowCpu(FlatTiming):
    """1500 ns an expert on the CPU, beside copies of 1000 ns."""

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return 1500 * experts


def one_event(timing: FlatTiming) -> Machine:
    """One step of one layer that needs three experts, none of them there."""
    columns: dict[str, Any] = {
        "request": np.zeros(1, np.int32),
        "step": np.zeros(1, np.int32),
        "phase": np.ones(1, np.uint8),
        "position": np.zeros(1, np.int32),
        "experts": np.array([[[0, 1, 2]]], np.int16),
    }
    shape = shape_of(1, 4, 3, 1000)
    core = make_core("hybrid-split", policy_data(shape, [[[0, 1, 2]]], costs=timing), slots=3)
    assert not can_record(core)
    machine = Machine(Workload(columns, 4), core, timing)
    machine.run()
    assert total(core, "cpu") == 1
    return machine


def test_copies_run_while_the_cpu_computes():
    # Share 1500 / 2500: two of three are copied, 2000 ns, the last expert takes 10 then. The CPU is
    # done at 1500; its result is added (1) after the experts. Segment 100, head 50.
    times = one_event(SlowCpu()).times
    assert times.end == [100 + 2000 + 10 + 1 + 50]
    assert times.stall_miss == [1000 + 990]
    assert times.stall_cpu == [0]


def test_each_slows_the_other_down():
    # The first copy starts before the CPU does, the second (1000 later) beside it: half as long
    # again. The CPU takes 1500 x 1.8 = 2700, and is waited for: 100 to 2800.
    timing = SlowCpu(cpu_slowdown_ppm=800_000, link_slowdown_cpu_ppm=500_000)
    machine = one_event(timing)
    assert machine.link.busy_ns == 1000 + 1500
    assert machine.times.end == [100 + 2700 + 1 + 50]
    # The experts of the last copy ran from 2600 to 2610: the GPU was dry from then on.
    assert machine.times.stall_cpu == [2800 - 2610]


# ---------------------------------------------------------------------- on the sample trace


def test_hybrid_split_on_the_sample_trace():
    inputs = Inputs(Trace.open("sample"))
    shared = {"hardware": "rtx4090-pcie4", "geometry": "olmoe-1b-7b", "expert_budget": "25%"}
    found, lru = (
        run_point(inputs, Point(policy=name, **shared)) for name in ("hybrid-split", "lru")
    )
    expert = 3 * 2048 * 1024 * 2
    for phase in ("decode", "prefill"):
        mine = found[phase]
        assert mine["accesses"] == mine["hits"] + mine["late"] + mine["misses"]
        assert mine["accesses"] == lru[phase]["accesses"]
        assert 0 < mine["cpu"] < mine["misses"]
    misses = found["decode"]["misses"] + found["prefill"]["misses"]
    on_cpu = found["decode"]["cpu"] + found["prefill"]["cpu"]
    assert found["h2d_bytes"] == expert * found["copies"]
    # Collisions: thrown out by an earlier wave of the same event, and copied again.
    assert found["copies"] == misses - on_cpu + found["collision_misses"]
    resident = found["copies"] - found["evictions"]
    assert resident == 16 * 16
    golden = (found["decode"]["hits"], found["decode"]["cpu"], found["prefill"]["cpu"])
    assert golden == (50824, 27940, 4057)
    assert found["tpot_ms"]["mean"] < lru["tpot_ms"]["mean"]
