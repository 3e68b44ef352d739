"""Pre-gated MoE's double buffer, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from policies.buffers import TwoBuffers
from policies.capacity import plan_memory, smallest_budget
from policies.errors import PolicyError
from policies.memory import COPYING, RESIDENT
from tests.driver import (
    EXPERT_BYTES,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    told,
    total,
)
from tests.on_sample import run_on_sample, totals
from tracer.workload import Workload

# Three layers of four experts; keys 0-3, 4-7, 8-11.
SHAPE = shape_of(3, 4)


def test_a_buffer_too_small_gives_up_the_layer_whose_turn_is_farthest():
    layer_of = [0, 0, 2, 2, 4, 4]
    memory = SimpleNamespace(layer_of=layer_of, pool_of=[0] * 6, state=[RESIDENT] * 6)
    core = SimpleNamespace(memory=memory, layer=2, shape=SimpleNamespace(layers=6))
    rule = TwoBuffers()
    rule.bind(core)
    for key in range(6):
        rule.on_insert(key)
    # From layer 2: layer 4 comes in 2, layer 0 in 4, layer 2 is here.
    assert [rule.victim(0, barred) for barred in ((), (0,), (0, 1), (0, 1, 4, 5))] == [0, 1, 4, 2]
    memory.state[0] = COPYING
    assert rule.victim(0, ()) == 1
    assert rule.victim(1, ()) is None


def play(steps, guesses, slots):
    """`guesses`: what each gate says of the next layer, as keys of its own layer."""
    log: Log = []
    data = policy_data(SHAPE, steps, lookahead={"lookahead_1": guesses})
    core = make_core("pregated", data, slots=slots, log=log)
    run_instant(core, steps)
    return core, story(log)


def test_pregated_keeps_nothing_beyond_two_buffers():
    steps = [[[0], [5], [11]], [[0], [6, 7], [8]]]
    core, log = play(steps, [[[1, 2], [7, 4], []]] * 2, slots=4)
    # Two slots for layers 0 and 2, two for layer 1. Told at a gate: who leaves the other buffer.
    assert log == told("""
        0.0 | 0 | +0 ~5 ~6 -0
        0.1 | 5* | ~11 ~8 -5 -6
        0.2 | 11* |
        1.- | | -8 -11
        1.0 | 0 | +0 ~5 ~6 -0     # demanded again
        1.1 | 6* 7 | -5 +7 ~11 ~8 -6 -7
        1.2 | 8* |
    """)
    assert (total(core, "hits"), total(core, "misses")) == (4, 3)
    assert core.tally.wasted_prefetch_bytes == 4 * EXPERT_BYTES  # 6 and 8, then 5 and 11


def test_pregated_runs_an_event_larger_than_a_buffer_in_waves():
    steps = [[[0, 1, 2], [4, 5, 6], [8]]]
    core, log = play(steps, [[[0, 1, 2], [], []]], slots=4)
    assert log == told("""
        0.0 | 0 1 2 | +0 +1 ~4 ~5 -0 +2 -1 -2   # waves 0 1 | 2; of 4 5 6 two fit the buffer
        0.1 | 4* 5* 6 | -4 +6 -5 -6
        0.2 | 8 | +8
    """)
    assert total(core, "waves") == 5


def test_pregated_counts_as_steady_from_the_start():
    core, _ = play([[[0], [5], [11]]], [[[1], [3], []]], slots=4)
    assert set(core.tally.buckets) == {("decode", "steady")}


def test_two_buffers_have_equal_slots_of_the_largest_expert():
    shape = shape_of(3, 4, expert_bytes=(10, 30, 20))
    assert smallest_budget(shape, "buffers", 0) == 60
    plan = plan_memory(shape, "buffers", 200)
    assert (plan.pool_of_layer, plan.capacity, plan.used_bytes) == ((0, 1, 0), (3, 3), 180)
    assert plan_memory(shape, "buffers", 10_000).capacity == (4, 4)
    with pytest.raises(PolicyError, match=r"smallest .* is 60 bytes \(one slot in each of two"):
        plan_memory(shape, "buffers", 59)


def test_a_model_of_one_moe_layer_has_nothing_to_predict():
    rows = 4
    columns = {
        "request": np.zeros(rows, np.int32),
        "step": np.zeros(rows, np.int32),
        "phase": np.zeros(rows, np.uint8),
        "position": np.arange(rows, dtype=np.int32),
        "experts": np.arange(rows, dtype=np.int16)[:, None, None],
        "lookahead_1": np.full((rows, 1, 2), -1, np.int16),
    }
    assert Workload(columns, 4).predictions("lookahead_1", 1).step(0) == [[]]


def test_pregated_without_the_column_says_how_to_record_it():
    with pytest.raises(PolicyError, match=r"column lookahead_1, .*`moesim trace .*lookahead=1`"):
        make_core("pregated", policy_data(SHAPE, []), slots=4)


def test_pregated_on_the_sample_trace():
    found, on_demand = run_on_sample("pregated"), run_on_sample("on-demand")
    assert totals(found) == (0, 73317, 20123, 102322, 102314)
    # No cache, so it copies what on-demand does and the wrong ones beside; but it copies ahead.
    assert found["copies"] > on_demand["copies"]
    assert found["tpot_ms"]["mean"] < on_demand["tpot_ms"]["mean"]
