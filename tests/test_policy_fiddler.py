"""Fiddler, worked out by hand: static placement, and the cheaper side for each miss."""

from __future__ import annotations

import pytest

from policies.errors import PolicyError
from sim.inputs import Inputs
from sim.point import Point, run_point
from tests.driver import Log, make_core, policy_data, run_instant, shape_of, story, told, total
from tests.given import GivenCosts
from tracer.trace import Trace

# A copy of 12 bytes takes 8 + 12, an expert on the GPU 10: together 30. On the CPU 4 + 10 an expert
# + 5 a token: 19, 24, 29, 34, so it is cheaper for up to three tokens.
COSTS = GivenCosts(copy_start=8, gpu_expert=10, cpu_start=4, cpu_expert=10, cpu_token=5)
POPULARITY = [[1, 5, 2, 9, 0, 0]]


def test_fiddler_computes_a_miss_on_the_cheaper_side_and_keeps_nothing():
    steps = [[[3, 0, 2]], [[1, 2]], [[0, 4, 5]]]
    counts = [[[1, 1, 4]], [[2, 3]], [[4, 5, 1]]]
    shape = shape_of(1, 6)
    log: Log = []
    data = policy_data(shape, steps, popularity=POPULARITY, costs=COSTS)
    core = make_core("fiddler", data, slots=3, staging_slots=1, log=log)
    launches = run_instant(core, steps, counts=counts)
    # Resident for good: the popular 3 and 1. What the CPU takes is not told to the cache.
    assert story(log) == told("""
        0.0 | 3* 2 | +2           # 0: one token, CPU; 2: four, copied to the staging slot
        1.0 | 1* |                # 2: three tokens, 29 < 30, CPU
        2.0 | 0 4 | +0 +4         # one staging slot: one after the other; 5: one token, CPU
    """)
    assert [launch.cpu for launch in launches] == [(0,), (2,), (5,), ()]
    assert (total(core, "hits"), total(core, "misses"), total(core, "cpu")) == (2, 6, 3)
    assert core.tally.copied_bytes == 12 * 3
    assert core.memory.residents() == [1, 3]


def test_fiddler_asks_each_layers_own_size():
    # Layer 1's experts have 1 byte: 9 + 10 for copy and GPU, 19 on the CPU: not less, so copied.
    shape = shape_of(2, 3, expert_bytes=(12, 1))
    steps = [[[1], [4]]]
    data = policy_data(shape, steps, popularity=[[1, 0, 0]] * 2, costs=COSTS)
    core = make_core("fiddler", data, budget=12 + 1 + 12)
    launches = run_instant(core, steps)
    assert [(launch.landed, launch.cpu) for launch in launches] == [((), (1,)), ((4,), ())]


def test_fiddler_needs_costs():
    shape = shape_of(1, 6)
    with pytest.raises(PolicyError, match="fiddler weighs CPU against link"):
        make_core("fiddler", policy_data(shape, [[[0]]], popularity=POPULARITY), slots=3)


def test_fiddler_on_the_sample_trace():
    inputs = Inputs(Trace.open("sample"), fit_share=0.3)
    shared = {"hardware": "rtx4090-pcie4", "geometry": "olmoe-1b-7b", "expert_budget": "25%"}
    results = {
        name: run_point(inputs, Point(policy=name, **shared)) for name in ("static", "fiddler")
    }
    found = results["fiddler"]
    expert = 3 * 2048 * 1024 * 2
    for phase in ("decode", "prefill"):
        mine = found[phase]
        assert mine["accesses"] == mine["hits"] + mine["late"] + mine["misses"]
        # Same placement, same hits: only where misses are computed differs.
        assert mine["hits"] == results["static"][phase]["hits"]
        assert mine["accesses"] == results["static"][phase]["accesses"]
    misses = found["decode"]["misses"] + found["prefill"]["misses"]
    on_cpu = found["decode"]["cpu"] + found["prefill"]["cpu"]
    assert found["h2d_bytes"] == expert * found["copies"] == expert * (misses - on_cpu)
    assert found["evictions"] == 0
    # One token is always cheaper on this CPU: 280 + 30 us against 555 + 39 us.
    assert found["decode"]["cpu"] == found["decode"]["misses"]
    assert (
        found["decode"]["hits"],
        found["decode"]["cpu"],
        found["prefill"]["cpu"],
    ) == (19143, 46265, 4288)
    assert found["tpot_ms"]["mean"] < results["static"]["tpot_ms"]["mean"]
