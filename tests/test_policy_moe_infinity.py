"""MoE-Infinity, worked out by hand: matrices of past requests, matched at every gate."""

from __future__ import annotations

import numpy as np
import pytest

from policies.errors import PolicyError
from policies.moe_infinity import Collection
from tests.driver import (
    GivenFit,
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
from tracer.workload import distinct

# Two layers of three experts, top-1; keys 0-2, 3-5.
SHAPE = shape_of(2, 3, top_k=1)
# What the tokens of requests A and B, set aside, needed in layers 0 and 1.
TOKENS = np.array([[0, 1], [0, 1], [1, 2], [1, 2], [1, 0]])[:, :, None]
FIT = GivenFit(
    events=distinct(TOKENS, np.arange(5), 5, 3, "last-use"),
    columns={"experts": TOKENS},
    step_of_row=np.arange(5),
    request_of_row=np.array([0, 0, 1, 1, 1]),
    phase_of_row=np.ones(5),
)


def signals_for(steps, requests):
    """One row a request and step."""
    experts = [[[[key % 3] for key in keys] for keys in step] for step in steps]
    return GivenSignals({"experts": experts}, {"request": requests})


def play(steps, requests, **given):
    log: Log = []
    signals = signals_for(steps, [[request] for request in requests])
    data = policy_data(SHAPE, steps, signals=signals, fit=FIT)
    core = make_core("moe-infinity", data, slots=2, log=log, eps=0.125, **given)
    run_instant(core, steps, requests=requests)
    return core, story(log)


def test_moe_infinity_prefetches_and_keeps_what_a_like_request_needed():
    steps = [[[1], [5]], [[0], [4]], [[2], [3]]]
    core, log = play(steps, [0, 0, 1], matches=1, depth=1, candidates=2)
    # Matrices, rows normalised: A 1 0 0 / 0 1 0, B 0 1 0 / 1/3 0 2/3. Worth: (p + 1/8) * 1 in
    # layer 0, * 1/2 in layer 1, with p as matched at the gate before.
    assert log == told("""
        0.0 | 1 | +1 ~5           # B: 5, then 3, but neither 1 nor 5 may leave for it
        0.1 | 5* |                # B
        1.0 | 0 | -5 +0 -1 ~4     # by B 1: 9/8, 5: 19/48; now A: 4, for which only 1 may leave
        1.1 | 4* |                # A
        2.0 | 2 | -4 +2           # by A 0: 9/8, 4: 9/16; nobody needed 2 before: no match
        2.1 | 3 | -2 +3           # still by A 0: 9/8, 2: 1/8
    """)
    assert core.tally.prefetch_dropped == 1
    # Requests 0 and (not ended by the driver) 1: the collection has A, B and 0.
    collection = core.policy.prefetcher._collection
    assert collection.size == 3
    assert collection.matrices[2].tolist() == [[1, 1, 0], [0, 1, 1]]


def test_moe_infinity_online_knows_no_request_before_the_first_ends():
    steps = [[[0], [4]], [[0], [4]], [[0], [4]]]
    core, log = play(steps, [0, 0, 1], mode="online")
    # p is 0: worth 1/8 in layer 0, 1/16 in layer 1; from request 1 on it is known that 4 follows 0.
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 4 | +4
        1.0 | 0* |
        1.1 | 4* |
        2.0 | 0* |
        2.1 | 4* |
    """)
    assert (core.tally.predicted, core.tally.predicted_right) == (1, 1)


def test_priorities_fall_with_distance_and_are_renewed():
    shape = shape_of(4, 3, top_k=1)
    tokens = np.array([[0, 1, 2, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])[:, :, None]
    fit = GivenFit(
        events=distinct(tokens, np.arange(4), 4, 3, "last-use"),
        columns={"experts": tokens},
        step_of_row=np.arange(4),
        request_of_row=np.zeros(4, int),
        phase_of_row=np.ones(4),
    )
    steps = [[[0], [4], [7], [9]]]
    data = policy_data(shape, steps, signals=signals_for(steps, [[0]]), fit=fit)
    core = make_core("moe-infinity", data, slots=8, depth=3, candidates=2)
    core.step_begin(0, "decode")
    assert list(core.predictions_at_step()) == []
    core.gate(0, [0])
    first = core.predictions(0, [0])
    assert [(found.layer, found.keys) for found in first] == [(1, [4]), (2, [7, 8]), (3, [9])]
    np.testing.assert_allclose(
        [score for found in first for score in found.scores],
        [1 * 3 / 4, 3 / 4 * 2 / 4, 1 / 4 * 2 / 4, 1 * 1 / 4],
    )
    for prediction in first:
        core.prediction_ready(prediction)
    assert [copy.key for copy in core.queue.low] == [4, 7, 9, 8]
    core.gate(1, [4])
    for prediction in core.predictions(1, [4]):
        core.prediction_ready(prediction)
    # A layer nearer: 7: 3/4 * 3/4, 9: 1 * 2/4, 8: 1/4 * 3/4.
    assert [(copy.key, copy.priority) for copy in core.queue.low] == [
        (7, 9 / 16),
        (9, 1 / 2),
        (8, 3 / 16),
    ]


def test_requests_that_share_steps_have_matrices_of_their_own():
    steps = [[[0, 1], [4]], [[2], [3]]]
    experts = [[[[0], [1]], [[1], [1]]], [[[2]], [[0]]]]
    signals = GivenSignals({"experts": experts}, {"request": [[7, 8], [8]]})
    data = policy_data(SHAPE, steps, signals=signals)
    core = make_core("moe-infinity", data, slots=3, mode="online")
    run_instant(core, steps)
    matrices = core.policy.prefetcher._of_request
    assert matrices[7].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert matrices[8].tolist() == [[0, 1, 1], [1, 1, 0]]


def test_a_full_collection_gives_up_the_most_similar():
    collection = Collection(2, 1, 3)
    for row in ([4.0, 0, 0], [0, 2.0, 1.0], [0, 3.0, 2.0]):
        collection.add(np.array([row]))
    assert collection.size == 2
    assert collection.matrices.tolist() == [[[4, 0, 0]], [[0, 3, 2]]]
    collection.add(np.zeros((1, 3)))
    assert collection.matrices.tolist() == [[[4, 0, 0]], [[0, 3, 2]]]
    row = np.array([1.0, 1.0, 0])
    cosines = collection.cosines(collection.products(0, row), 0, 2.0)
    np.testing.assert_allclose(cosines, [1 / np.sqrt(2), 3 / np.sqrt(2 * 13)])


def test_moe_infinity_says_what_it_lacks():
    with pytest.raises(PolicyError, match="give it signals"):
        make_core("moe-infinity", policy_data(SHAPE, [], fit=FIT), slots=2)
    data = policy_data(SHAPE, [], signals=signals_for([], []))
    with pytest.raises(PolicyError, match="fit share above 0, or set mode=online"):
        make_core("moe-infinity", data, slots=2)


def test_moe_infinity_on_the_sample_trace():
    found, online = run_on_sample("moe-infinity"), run_on_sample("moe-infinity", mode="online")
    assert totals(found) == (25171, 4878, 35359, 56301, 56045)
    assert found["decode"]["hits"] > online["decode"]["hits"]
