"""Mixtral-offloading, worked out by hand: speculation into the coldest slots."""

from __future__ import annotations

import random

import pytest

from policies.errors import PolicyError
from tests.driver import Log, make_core, policy_data, run_instant, run_random, shape_of, story, told
from tests.on_sample import run_on_sample, totals
from tests.test_core_invariants import draw_case

# Two layers of four experts, keys 0-3 and 4-7; two slots a layer.
SHAPE = shape_of(2, 4)


def test_mixtral_offloading_throws_out_speculated_experts_first_unless_they_are_used():
    steps = [[[0], [5]], [[0], [5]], [[1], [6, 7]], [[0], [4]], [[1], [6]]]
    # What the gate of layer 1 says of layer 0's input, as keys of layer 0.
    guesses = [[1, 2], [3, 2], [2, 0], [0], [1]]
    lookahead = {"lookahead_1": [[guess, []] for guess in guesses]}
    log: Log = []
    core = make_core(
        "mixtral-offloading", policy_data(SHAPE, steps, lookahead=lookahead), slots=4, log=log
    )
    run_instant(core, steps)
    # Layer 1's slots, coldest first:
    assert story(log) == told("""
        0.0 | 0 | +0 ~5 ~6        # 6 5
        0.1 | 5* |                # 6 5
        1.0 | 0* | -5 ~7          # 7 6; 6 is predicted again: it stays, untouched
        1.1 | 5 | -7 +5           # 6 5
        2.0 | 1 | +1 -5 ~4        # 4 6; 6 is predicted again
        2.1 | 6* 7 | -4 +7        # 6 7
        3.0 | 0* | -6 ~4          # 4 7
        3.1 | 4* |                # 7 4: used, so it is the most recent
        4.0 | 1* | -7 ~5          # 5 4
        4.1 | 6 | -5 +6           # 4 6: 5 was wrong; plain LRU would throw out 4
    """)
    # 4 and 7 left unused once, 5 as well.
    assert core.tally.wasted_prefetch_bytes == 3 * 12


@pytest.mark.parametrize("seed", range(8))
def test_with_recent_newcomers_it_is_next_gate_on_lru(seed):
    case = draw_case("mixtral-offloading", seed)
    data = policy_data(case.shape, case.steps, lookahead=case.lookahead)
    logs: list[Log] = [[], []]
    for log, (name, given) in zip(
        logs, [("mixtral-offloading", {"newcomers": "recent"}), ("next-gate", {})], strict=True
    ):
        core = make_core(name, data, budget=case.budget, log=log, **given)
        run_random(core, case.steps, random.Random(seed))
    assert logs[0] == logs[1]


def test_mixtral_offloading_without_the_column_says_how_to_record_it():
    with pytest.raises(PolicyError, match=r"column lookahead_1, .*`moesim trace .*lookahead=1`"):
        make_core("mixtral-offloading", policy_data(SHAPE, []), slots=4)


def test_mixtral_offloading_on_the_sample_trace():
    found = run_on_sample("mixtral-offloading")
    recent, next_gate = (
        run_on_sample("mixtral-offloading", newcomers="recent"),
        run_on_sample("next-gate"),
    )
    assert totals(found) == (47550, 34200, 11690, 55362, 55106)
    assert totals(recent) == totals(next_gate)
    assert recent["tpot_ms"] == next_gate["tpot_ms"]
