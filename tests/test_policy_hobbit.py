"""HOBBIT's three ways for a miss, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import policies
from configs.errors import UserError
from configs.geometry import EXPERT_DTYPE_BITS
from policies.errors import PolicyError
from policies.hobbit import standings
from policies.interface import Shape
from sim.inputs import Inputs
from sim.metrics import counts, quality
from sim.point import Point, run_point
from tests.driver import (
    GivenSignals,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    told,
    total,
)
from tracer.trace import Trace

# Keys 0 to 5 in full, 30 bytes; their low-bit copies are keys 6 to 11, 10 bytes.
SHAPE = Shape(1, 6, 3, (30,), (10,))
# One token a step: experts, best first, and their weights.
TOKENS = [
    ([0, 1, 2], [0.5, 0.3, 0.2]),
    ([2, 1, 3], [0.6, 0.35, 0.05]),
    ([4, 0, 5], [0.4, 0.3, 0.3]),
    ([3, 5, 0], [0.92, 0.05, 0.03]),
]


def signals_of(tokens) -> GivenSignals:
    """One layer, one token a step."""
    return GivenSignals(
        {
            "experts": [[np.array([experts])] for experts, _ in tokens],
            "weights": [[np.array([weights])] for _, weights in tokens],
        }
    )


def test_hobbit_copies_in_full_at_low_bits_or_not_at_all():
    steps = [[experts] for experts, _ in TOKENS]
    log: Log = []
    data = policy_data(SHAPE, steps, signals=signals_of(TOKENS))
    core = make_core("hobbit", data, budget=60, log=log)
    run_instant(core, steps)
    assert story(log) == told("""
        # s: 0, 0.5, 0.8: 2 at low bits (8). 30 + 30, then 10 more: two waves, oldest leaves
        0.0 | 0 1 8 | +0 +1 -0 +8
        # s: 0, 0.6, 0.95: 2 matters now, its low-bit copy will not do; 1 is there; 3 is skipped
        1.0 | 2 1* | -8 +2
        # s: 0, 0.4, 0.7: 5 at low bits (11), in a second wave
        2.0 | 4 0 11 | -2 +4 -1 +0 -4 +11
        # s: 0, 0.92, 0.97: 5's low-bit copy is there, 0 is there in full; 3 in a second wave
        3.0 | 3 11* 0* | -11 +3
    """)
    assert (total(core, "asked"), total(core, "accesses"), total(core, "changed")) == (12, 11, 4)
    assert (total(core, "hits"), total(core, "misses")) == (3, 8)
    assert total(core, "hit_bytes") == 30 + 10 + 30
    assert core.tally.copied_bytes == 30 * 6 + 10 * 2
    assert counts(core.tally, "decode")["hit_rate"] == 3 / 12  # of what was asked for
    lossy = quality(core.tally, "decode")
    assert lossy["changed_share"] == 4 / 12
    assert lossy["low_mass_share"] == pytest.approx((0.2 + 0.3 + 0.05) / 4)
    assert lossy["lost_mass_share"] == pytest.approx(0.05 / 4)
    assert lossy["retained_mass_share"] == pytest.approx(1 - 0.05 / 4)


def test_hobbit_with_thresholds_of_one_is_its_cache():
    steps = [[experts] for experts, _ in TOKENS]
    data = policy_data(SHAPE, steps, signals=signals_of(TOKENS))
    whole = make_core("hobbit", data, budget=60, full=1, low=1, log=[])
    run_instant(whole, steps)
    plain = make_core("lru", policy_data(shape_of(1, 6, 3, 30), steps), budget=60, log=[])
    run_instant(plain, steps)
    assert story(whole.log) == story(plain.log)
    assert total(whole, "changed") == total(whole, "low_mass") == total(whole, "lost_mass") == 0
    assert total(whole, "gate_mass") == len(steps)


def test_an_experts_most_important_use_decides():
    # Token 0 ranks 2 last (0.8 before it), token 1 first; 3 is last for token 1 (0.9 before it).
    experts = np.array([[0, 1, 2], [2, 0, 3]])
    weights = np.array([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    found = standings(experts, weights)
    assert set(found) == {0, 1, 2, 3}
    expected = {0: (0, 0.6), 1: (0.5, 0.3), 2: (0, 1.0), 3: (0.9, 0.1)}
    for expert, standing in expected.items():
        assert found[expert] == pytest.approx(standing), expert


def test_weights_count_relative_to_the_tokens_sum_in_any_order():
    found = standings(np.array([[7, 3, -1, 5]]), np.array([[0.1, 0.3, math.nan, 0.1]]))
    # Ranked 3, 7, 5; equal weights as they come.
    assert {expert: list(standing) for expert, standing in found.items()} == {
        3: pytest.approx([0, 0.6]),
        7: pytest.approx([0.6, 0.2]),
        5: pytest.approx([0.8, 0.2]),
    }


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_one_token_and_many_are_ranked_alike(seed, top_k, gaps):
    rng = np.random.default_rng(seed)
    experts = rng.permutation(8)[:top_k][None]
    weights = rng.integers(1, 4, (1, top_k)) / 4
    if gaps:
        experts = np.append(experts, -1)[None]
        weights = np.append(weights, math.nan)[None]
    one = standings(experts, weights)
    twice = standings(np.repeat(experts, 2, 0), np.repeat(weights, 2, 0))
    assert set(one) == set(twice)
    for expert, (before, mass) in one.items():
        assert twice[expert] == pytest.approx((before, 2 * mass))
    assert sum(mass for _, mass in one.values()) == pytest.approx(1)


def test_a_step_of_many_tokens_books_one_unit_a_token_that_ran():
    # The layer did not run for the third token.
    experts = np.array([[0, 1, 2], [2, 0, 3], [-1, -1, -1]])
    weights = np.array([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [math.nan] * 3])
    signals = GivenSignals({"experts": [[experts]], "weights": [[weights]]})
    steps = [[[1, 2, 0, 3]]]
    core = make_core("hobbit", policy_data(SHAPE, steps, signals=signals), budget=120)
    run_instant(core, steps)
    # 3 has 0.9 of the weight before it, in binary a little more or less; it is lost or low.
    mass = {name: total(core, f"{name}_mass") for name in ("gate", "low", "lost")}
    assert mass["gate"] == 2
    assert mass["low"] + mass["lost"] == pytest.approx(0.1)


def test_hobbit_refuses_what_it_cannot_do():
    steps = [[[0]]]
    with pytest.raises(PolicyError, match="hobbit needs the column weights"):
        make_core("hobbit", policy_data(SHAPE, steps), budget=60)
    data = policy_data(SHAPE, steps, signals=signals_of(TOKENS))
    with pytest.raises(PolicyError, match=r"low=0.5 is below full=0.6"):
        make_core("hobbit", data, budget=60, low=0.5)


def test_low_dtypes_are_known():
    choices = policies.get("hobbit").params["low_dtype"].allowed
    assert set(choices) <= set(EXPERT_DTYPE_BITS)
    assert [EXPERT_DTYPE_BITS[name] for name in choices] == [8, 4.5, 2.5]


# ---------------------------------------------------------------------- on the sample trace

SHARED = {"hardware": "rtx4090-pcie4", "geometry": "olmoe-1b-7b", "expert_budget": "25%"}


@pytest.fixture(scope="module")
def sample() -> Inputs:
    return Inputs(Trace.open("sample"))


def test_hobbit_on_the_sample_trace(sample):
    found, lru = (run_point(sample, Point(policy=name, **SHARED)) for name in ("hobbit", "lru"))
    full = 3 * 2048 * 1024 * 2
    low = full * 9 // 32
    lossy = found["quality"]["decode"]
    for phase in ("decode", "prefill"):
        mine = found[phase]
        assert mine["accesses"] == mine["hits"] + mine["late"] + mine["misses"]
        assert mine["accesses"] < lru[phase]["accesses"]
    # Every copy is one of the two kinds.
    misses = found["decode"]["misses"] + found["prefill"]["misses"] + found["collision_misses"]
    assert found["copies"] == misses
    in_full, rest = divmod(found["h2d_bytes"] - low * found["copies"], full - low)
    assert rest == 0
    assert 0 < in_full < found["copies"]
    assert lossy["retained_mass_share"] == 1 - lossy["lost_mass_share"]
    assert 0 < lossy["lost_mass_share"] < 0.1 < lossy["low_mass_share"]
    assert found["tpot_ms"]["mean"] < lru["tpot_ms"]["mean"]
    # The prefill fills every layer's slots, and none is ever empty again.
    assert found["decode"]["cold"]["accesses"] == 0
    assert found["decode"]["steady"]["accesses"] == found["decode"]["accesses"]
    assert (found["decode"]["hits"], found["decode"]["misses"], in_full) == (53767, 32437, 21965)


def test_smaller_copies_are_faster_and_lose_no_other_weight(sample):
    runs = [
        run_point(sample, Point(policy="hobbit", params={"low_dtype": name}, **SHARED))
        for name in ("int8", "int4", "int2")
    ]
    tpot = [run["tpot_ms"]["mean"] for run in runs]
    assert tpot == sorted(tpot, reverse=True)
    assert len(set(tpot)) == 3


def test_a_low_bit_copy_must_be_smaller(sample):
    point = Point(policy="hobbit", params={"low_dtype": "int8"}, dtype="int4", **SHARED)
    with pytest.raises(UserError, match=r"int8 copy of olmoe-1b-7b's experts has 6291456 bytes"):
        run_point(sample, point)


def test_lossless_policies_have_no_quality_figures(sample):
    found = run_point(sample, Point(policy="lru", **SHARED))
    assert set(found["quality"]["decode"].values()) == {None}
