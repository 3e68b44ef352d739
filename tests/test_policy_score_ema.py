"""Score EMA (HybriMoE's MRS), worked out by hand from its rule."""

from __future__ import annotations

import numpy as np
import pytest

import policies
from policies.errors import PolicyError
from policies.score_ema import top_scores
from tests.driver import (
    GivenSignals,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    told,
)
from tests.on_sample import run_on_sample, totals

SHAPE = shape_of(1, 4, top_k=1)


def play(steps, eighths, **given):
    """One layer, one token a step; `eighths`: its gate's probabilities."""
    signals = GivenSignals({"gate_probs": [[[np.array(row) / 8]] for row in eighths]})
    log: Log = []
    data = policy_data(SHAPE, steps, signals=signals)
    core = make_core("score-ema", data, log=log, **given)
    run_instant(core, steps)
    return story(log)


def test_score_ema_evicts_the_smallest_average_of_scores_not_the_oldest():
    steps = [[[0]], [[1]], [[2]], [[3]], [[1]]]
    eighths = [[5, 2, 1, 0], [3, 4, 0, 1], [2, 1, 4, 1], [0, 3, 1, 4], [1, 5, 1, 1]]
    # Top 2 of each step's scores enter, at half weight. S in 256ths after each gate:
    #   80 32 0 0 | 88 80 0 0 | 76 40 64 0 | 38 68 32 64 | 35 114 32 48
    # (at the last gate three scores share the second place, and all of them count).
    assert play(steps, eighths, slots=2) == told("""
        0.0 | 0 | +0
        1.0 | 1 | +1
        2.0 | 2 | -1 +2           # 0: 76, 1: 40; the oldest is 0
        3.0 | 3 | -2 +3           # 0: 38, 2: 32
        4.0 | 1 | -0 +1           # 0: 35, 3: 48
    """)


def test_score_ema_at_alpha_1_knows_the_last_gate_only_and_ties_leave_by_lowest_expert():
    steps = [[[2]], [[1]], [[3]], [[0]]]
    eighths = [[0, 0, 8, 0], [0, 6, 2, 0], [1, 0, 1, 6], [4, 0, 0, 4]]
    assert play(steps, eighths, slots=2, alpha=1) == told("""
        0.0 | 2 | +2
        1.0 | 1 | +1
        2.0 | 3 | -1 +3           # 1: 0, 2: 1/8
        3.0 | 0 | -2 +0           # 2: 0, 3: 1/2
    """)
    assert play(steps, [[2, 2, 2, 2]] * 4, slots=2).endswith("-1 +3\n3.0 | 0 | -2 +0")


def test_score_ema_forgets_at_a_reset():
    steps = [[[0]], [[1]], [[2]]]
    signals = GivenSignals({"gate_probs": [[[[0.9, 0.1, 0, 0]]]] * 3})
    core = make_core("score-ema", policy_data(SHAPE, steps, signals=signals), slots=2, reset=True)
    run_instant(core, steps, requests=[0, 0, 0])
    assert core.memory.residents() == [0, 2]
    core.request_begin(1)
    assert [core.policy.cache.score(key) for key in range(4)] == [0, 0, 0, 0]


def test_top_scores_of_several_tokens_are_averaged_over_those_that_ran():
    rows = np.array([[0.5, 0.25, 0.25, 0], [np.nan] * 4, [0, 0.125, 0.375, 0.5]], np.float16)
    found = top_scores(rows, 1)
    assert found.tolist() == [0.25, 0, 0, 0.25]
    # Of the first token the second and third share the last place.
    assert top_scores(rows, 2).tolist() == [0.25, 0.125, 0.3125, 0.25]
    assert top_scores(rows, 4).tolist() == [0.25, 0.1875, 0.3125, 0.25]
    assert top_scores(rows[:1], 1).tolist() == [0.5, 0, 0, 0]


def test_score_ema_without_the_column_says_how_to_record_it():
    with pytest.raises(PolicyError, match=r"column gate_probs, .*`moesim trace .* probs`"):
        make_core("score-ema", policy_data(SHAPE, []), slots=2)


def test_what_the_cache_beneath_reads_is_read_for_the_prefetcher_too():
    info = policies.get("next-gate")
    beneath, _ = info.parse({"cache": "score-ema"})
    assert info.asks_signals(beneath)
    assert set(info.all_columns(beneath)) == {"lookahead_1", "gate_probs"}
    alone, _ = info.parse({})
    assert not info.asks_signals(alone)
    assert info.all_columns(alone) == ("lookahead_1",)


def test_score_ema_on_the_sample_trace():
    lru, found = run_on_sample("lru"), run_on_sample("score-ema")
    assert found["copies"] == found["decode"]["misses"] + found["prefill"]["misses"]
    assert totals(found) == (51683, 0, 41757, 48129, 47873)
    assert found["decode"]["hits"] > lru["decode"]["hits"]
    assert found["tpot_ms"]["mean"] < lru["tpot_ms"]["mean"]


def test_score_ema_beneath_next_gate_on_the_sample_trace():
    found = run_on_sample("next-gate", cache="score-ema", max_tokens=200)
    assert totals(found) == (7279, 5125, 1804, 8844, 8588)
