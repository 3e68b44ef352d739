"""EdgeMoE, worked out by hand: the table of what follows, frequency over distance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies.edgemoe import fit_tables
from policies.errors import PolicyError
from tests.driver import GivenFit, Log, make_core, policy_data, run_instant, shape_of, story, told
from tests.made_up import fit_of
from tests.on_sample import run_on_sample, totals
from tracer.workload import distinct

# Three layers of three experts, top-1; keys 0-2, 3-5, 6-8.
SHAPE = shape_of(3, 3, top_k=1)
# What the fitted tokens needed in layers 0, 1, 2.
TOKENS = np.array([[0, 1, 2], [0, 1, 0], [0, 1, 2], [1, 1, 0]])[:, :, None]
POPULARITY = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 2]])


def fit_on(tokens):
    rows = np.arange(len(tokens))
    return GivenFit(
        events=distinct(tokens, rows, len(tokens), 3, "last-use"),
        columns={"experts": tokens},
        step_of_row=rows,
        request_of_row=0 * rows,
        phase_of_row=0 * rows + 1,
    )


def test_edgemoe_preloads_what_followed_and_evicts_frequency_over_distance():
    steps = [[[0], [4], [8]], [[1], [4], [6]], [[2], [3], [7]]]
    log: Log = []
    data = policy_data(SHAPE, steps, popularity=POPULARITY, fit=fit_on(TOKENS))
    core = make_core("edgemoe", data, slots=3, candidates=2, log=log)
    run_instant(core, steps)
    # After 0: 4 always. After 0 and 4: 8 in two of three, 6 in one. After 1 and 4: 6.
    assert story(log) == told("""
        0.0 | 0 | +0 ~4
        0.1 | 4* | ~8 -0 ~6       # for 6 only 0 may leave
        0.2 | 8* |
        1.0 | 1 | -6 +1           # uses / layers away: 4: 5/1, 8: 3/2, 6: 2/2
        1.1 | 4* | -1 ~6          # 8: 3/1, 1: 2/2
        1.2 | 6* |
        2.0 | 2 | -6 +2           # 4: 6/1, 8: 3/2, 6: 3/2, a tie
        2.1 | 3 | -2 +3           # 4: 6/3, 8: 3/1, 2: 1/2; nothing was seen after 2, nor after 3
        2.2 | 7 | -3 +7           # 4: 6/2, 8: 3/3, 3: 1/2
    """)
    assert (core.tally.predicted, core.tally.predicted_right) == (5, 4)


def test_chances_are_means_over_the_pairs_that_were_seen():
    first, second = fit_tables(TOKENS, 3)

    def chances(table, before, last):
        given = None if before is None else np.array([before], int)
        return table.chances(given, np.array([last]))[0]

    np.testing.assert_allclose(chances(first, None, [0]), [0, 1, 0])
    np.testing.assert_allclose(chances(second, [0], [1]), [1 / 3, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(chances(second, [0, 1], [1]), [2 / 3, 0, 1 / 3], rtol=1e-6)
    # Of the pairs (0, 1) and (2, 1) only the first was seen; of (2, 1) alone none: after 1 alone.
    np.testing.assert_allclose(chances(second, [0, 2], [1]), [1 / 3, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(chances(second, [2], [1]), [0.5, 0, 0.5])
    # Layer 0 did not run.
    np.testing.assert_allclose(chances(second, [], [1]), [0.5, 0, 0.5])
    np.testing.assert_allclose(chances(second, [2], [2]), [0, 0, 0])
    # Events at once are as events alone.
    both = second.chances(np.array([[0, 2], [0, 1]]), np.array([[1], [1]]))
    np.testing.assert_allclose(both, [[1 / 3, 0, 2 / 3], [2 / 3, 0, 1 / 3]], rtol=1e-6)


def test_tables_are_counts_of_pairs_within_a_token():
    """Against counting one by one, with layers that did not run for some tokens."""
    rng = np.random.default_rng(5)
    tokens = np.argsort(rng.random((60, 3, 6)), axis=-1)[..., :2]
    tokens[rng.random((60, 3)) < 0.2] = -1
    table = fit_tables(tokens, 6)[1]
    for a in range(6):
        for b in range(6):
            both = [t for t in tokens if (t >= 0).all() and a in t[0] and b in t[1]]
            if not both:
                assert table.row_of_pair[a, b] == -1
                continue
            share = [sum(e in t[2] for t in both) / len(both) for e in range(6)]
            np.testing.assert_allclose(table.after_pair[table.row_of_pair[a, b]], share, rtol=1e-6)


def test_edgemoe_learns_from_requests_set_aside_alone():
    shape = shape_of(3, 6)
    data = policy_data(shape, [], popularity=[[1] * 6] * 3, fit=fit_of(shape))
    blind = replace(data, events=None, next_use=None, first_use=None)
    core = make_core("edgemoe", blind, slots=4)
    assert len(core.policy.prefetcher._paths._tables) == 2
    with pytest.raises(PolicyError, match="requests to learn from"):
        make_core("edgemoe", replace(data, fit=None), slots=4)


def test_edgemoe_on_the_sample_trace():
    found = run_on_sample("edgemoe")
    assert totals(found) == (26730, 10839, 27839, 51285, 51029)
    assert found["trace"]["fitted_requests"] == 3
    # Better than drawing 8 of 64.
    assert found["prefetch"]["recall"] > 0.3
