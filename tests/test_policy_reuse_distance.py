"""The learned reuse-distance evictor: decisions by given weights, and how weights are fitted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from policies import reuse_distance
from policies.errors import PolicyError
from policies.reuse_distance import FEATURES, HALF_LIVES, History, fit_weights
from tests.driver import Log, make_core, policy_data, run_instant, shape_of, story, table, told
from tests.made_up import fit_of
from tests.on_sample import run_on_sample, totals

SHAPE = shape_of(1, 4)


def one_layer(*events):
    return [[event] for event in events]


def test_reuse_distance_evicts_by_age_and_frequency_as_the_weights_say(monkeypatch):
    # log2(age) - log2(share in recent events, half-life 4): the largest age / share leaves.
    weights = np.array([0.0, 1, -1, 0, 0])
    monkeypatch.setattr(reuse_distance, "fit_weights", lambda *_: weights)
    steps = one_layer([0], [0], [1], [2], [3], [2], [1])
    log: Log = []
    core = make_core(
        "reuse-distance", policy_data(SHAPE, steps, fit=fit_of(SHAPE)), slots=2, log=log
    )
    run_instant(core, steps)
    # A use adds 1 - d = 0.159 to the share, an event multiplies it by d = 0.841.
    assert story(log) == told("""
        0.0 | 0 | +0
        1.0 | 0* |
        2.0 | 1 | +1
        3.0 | 2 | -1 +2           # 0: 3 / 0.208 = 14.4, 1: 2 / 0.135 = 14.8; LRU would evict 0
        4.0 | 3 | -0 +3           # 0: 4 / 0.175 = 22.8, 2: 2 / 0.135 = 14.8
        5.0 | 2* |
        6.0 | 1 | -3 +1           # 2: 2 / 0.229 = 8.7, 3: 3 / 0.113 = 26.4
    """)


def test_reuse_distance_by_age_alone_is_lru_whose_ties_leave_by_lowest_expert(monkeypatch):
    monkeypatch.setattr(reuse_distance, "fit_weights", lambda *_: np.array([0.0, 1, 0, 0, 0]))
    steps = one_layer([3], [1, 0], [2], [3], [1])
    log: Log = []
    core = make_core(
        "reuse-distance", policy_data(SHAPE, steps, fit=fit_of(SHAPE)), slots=3, log=log
    )
    run_instant(core, steps)
    assert story(log) == told("""
        0.0 | 3 | +3
        1.0 | 1 0 | +1 +0
        2.0 | 2 | -3 +2
        3.0 | 3 | -0 +3           # 0 and 1 are of one age
        4.0 | 1* |
    """)


def test_history_counts_events_of_its_layer():
    history = History(3)
    for members in ([0], [1], [0]):
        history.see(np.array(members))
    features = history.features()
    np.testing.assert_allclose(features[:, 0], 1)
    # Needed by the last event: age 1; never needed: as old as all events and one more.
    np.testing.assert_allclose(features[:, 1], np.log2([1, 2, 4]))
    for column, half_life in enumerate(HALF_LIVES, start=2):
        decay = 2 ** (-1 / half_life)
        shares = np.array([(1 - decay) * (1 + decay**2), (1 - decay) * decay, 0])
        np.testing.assert_allclose(features[:, column], np.log2(shares + 2**-10))


@pytest.mark.parametrize("most", [4096, 15, 40])
@pytest.mark.parametrize(("horizon", "ridge"), [(4, 1e-3), (8, 0.1), (1000, 1e-6)])
def test_weights_are_ridge_regression_on_every_example(horizon, ridge, most, monkeypatch):
    """Against examples enumerated one by one from the definition.

    Of at most ``most`` events a layer, evenly spread: of 40 events every third, if it is 15.
    """
    monkeypatch.setattr(reuse_distance, "_MOST_EVENTS", most)
    rng = np.random.default_rng(3)
    steps = [
        [list(rng.permutation(5)[:2]), [5 + int(e) for e in rng.permutation(5)[: rng.integers(3)]]]
        for _ in range(40)
    ]
    rows, targets = [], []
    for layer in range(2):
        events = [[key % 5 for key in step[layer]] for step in steps if step[layer]]
        history = History(5)
        for now, members in enumerate(events):
            history.see(np.array(members))
            if now % math.ceil(len(events) / most):
                continue
            for expert in set(range(5)) - set(members):
                before = [t for t in range(now) if expert in events[t]]
                after = [t - now for t in range(now + 1, len(events)) if expert in events[t]]
                if not before or now - before[-1] >= horizon:
                    continue
                if after or len(events) - now > horizon:
                    rows.append(history.features()[expert])
                    targets.append(np.log2(min([*after[:1], horizon])))
    x, y = np.array(rows), np.array(targets)
    penalty = np.diag([0, *[ridge * len(y)] * (FEATURES - 1)])
    expected = np.linalg.inv(x.T @ x + penalty) @ x.T @ y
    found = fit_weights(table(steps, 2), 5, horizon, ridge)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_reuse_distance_learns_what_recency_cannot_tell():
    """0 is needed every other event, 1 to 6 in turn: what waited longest comes next."""
    events = [[0] if now % 2 == 0 else [1 + now // 2 % 6] for now in range(240)]
    shape = shape_of(1, 7, top_k=1)
    steps = one_layer(*events)
    fit = replace(fit_of(shape), events=table(steps, 1))
    data = policy_data(shape, steps, fit=fit)
    weights = make_core("reuse-distance", data, slots=2).policy.cache._weights
    history = History(7)
    for members in events:
        history.see(np.array(members))
    predicted = history.features() @ weights
    # Next needed in 1, 2, 4, ... events; last needed 2, 12, 10, ... ago: LRU would throw out 1.
    assert np.argsort(predicted).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_reuse_distance_says_what_it_lacks():
    with pytest.raises(PolicyError, match="requests to learn from"):
        make_core("reuse-distance", policy_data(SHAPE, []), slots=2)
    short = replace(fit_of(SHAPE), events=table(one_layer([0], [1]), 1))
    with pytest.raises(PolicyError, match=r"0 example\(s\) to learn from, too few"):
        make_core("reuse-distance", policy_data(SHAPE, [], fit=short), slots=2)


def test_reuse_distance_on_the_sample_trace():
    found = run_on_sample("reuse-distance")
    assert found["copies"] == found["decode"]["misses"] + found["prefill"]["misses"]
    assert totals(found) == (37145, 0, 28263, 32810, 32554)
