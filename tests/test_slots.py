"""Slots a layer: what they would have brought, and how a budget is spread by it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import policies
from policies.capacity import uneven_plan
from policies.errors import PolicyError
from policies.interface import Shape
from policies.slots import dp, greedy, plan_policy, popularity_curves, reuse_curves
from sim.inputs import Inputs
from sim.point import Point, inputs_for, run_point
from sim.sweeps import SweepConfig
from tests.driver import (
    GivenFit,
    Steps,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    table,
)
from tests.traces import make_trace
from tracer.trace import Trace


def fit_of(steps: Steps, layers: int) -> GivenFit:
    """Requests set aside, one row a step."""
    rows = np.arange(len(steps))
    return GivenFit(table(steps, layers), {}, rows, np.zeros_like(rows), np.ones_like(rows))


# ---------------------------------------------------------------------- curves


def test_a_use_hits_with_more_slots_than_others_were_used_since():
    steps = [[[0, 1], [4]], [[1, 2], [4]], [[0], []], [[2, 0], [5]]]
    curves = reuse_curves(fit_of(steps, 2), shape_of(2, 4))
    # Layer 0, most recent last: 0 1 | 1 is the last: 1 slot, 2 is new | 0 1 2 -> 0 1 2: 0 is third
    # from the end | 1 2 0: 2 second, 0 first. Layer 1: 4 again at once; 5 is new.
    assert curves.tolist() == [[0, 2, 3, 4, 4], [0, 1, 1, 1, 1]]


seeds = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(seeds, st.integers(1, 3))
@QUICK
def test_reuse_curves_are_the_hits_of_lru_where_events_fit(seed, largest):
    rng = np.random.default_rng(seed)
    shape = shape_of(2, 5)

    def event(layer: int) -> list[int]:
        size = int(rng.integers(0, largest + 1))
        return (layer * 5 + rng.permutation(5)[:size]).tolist()

    steps = [[event(layer) for layer in range(2)] for _ in range(25)]
    curves = reuse_curves(fit_of(steps, 2), shape)
    for slots in range(largest, 6):
        core = make_core("lru", policy_data(shape, steps), plan=uneven_plan(shape, (slots,) * 2, 0))
        run_instant(core, steps)
        hits = sum(bucket.hits for bucket in core.tally.buckets.values())
        assert hits == curves[:, slots].sum()


def test_popular_experts_first():
    steps = [[[0, 1], [4]], [[1, 2], [5]], [[1], [5]]]
    curves = popularity_curves(fit_of(steps, 2), shape_of(2, 4))
    assert curves.tolist() == [[0, 3, 4, 5, 5], [0, 2, 3, 3, 3]]


# ---------------------------------------------------------------------- spreading

# Layer 0 gains little at first and much at its third slot; layer 1 evenly.
HUMPED = np.array([[0, 10, 11, 30, 31], [0, 10, 15, 20, 22]])


def test_greedy_gives_the_next_slot_where_it_brings_most():
    # One each, then layer 1 (5 against 1), again (5 against 1), then 2 against 1, then layer 0.
    assert [greedy(HUMPED, (1, 1), n) for n in range(2, 9)] == [
        [1, 1],
        [1, 2],
        [1, 3],
        [1, 4],
        [2, 4],
        [3, 4],
        [4, 4],
    ]


def test_the_programme_sees_beyond_the_next_slot():
    # Worth of slots beyond the first: layer 0 1, 20, 21; layer 1 5, 10, 12.
    assert [dp(HUMPED, (1, 1), n) for n in range(2, 9)] == [
        [1, 1],
        [1, 2],
        [3, 1],  # 20 against 5 + 1 and 10
        [3, 2],
        [3, 3],
        [3, 4],  # 32 against 31
        [4, 4],
    ]


def test_a_slot_must_fit_in_bytes():
    # 20 bytes for a slot of layer 0, 7 for one of layer 1: the first two take 27.
    curves = np.array([[0, 0, 100, 200], [0, 0, 5, 10]])
    assert greedy(curves, (20, 7), 40) == [1, 2]
    assert greedy(curves, (20, 7), 47) == [2, 1]
    assert dp(curves, (20, 7), 46) == [1, 3]
    assert dp(curves, (20, 7), 54) == [2, 2]


def test_slots_that_bring_nothing_go_where_there_are_fewest():
    flat = np.zeros((3, 5), int)
    assert greedy(flat, (1, 1, 1), 8) == dp(flat, (1, 1, 1), 8) == [3, 3, 2]
    assert greedy(flat, (1, 1, 1), 100) == dp(flat, (1, 1, 1), 100) == [4, 4, 4]


spreads = st.tuples(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(0, 40))


def draw(seed: int, layers: int, experts: int, spare: int) -> tuple[np.ndarray, list[int], int]:
    rng = np.random.default_rng(seed)
    gains = rng.integers(0, 9, (layers, experts))
    curves = np.pad(np.cumsum(gains, 1), ((0, 0), (1, 0)))
    sizes = rng.choice([2, 3, 5], layers).tolist()
    return curves, sizes, sum(sizes) + spare


def saved(curves: np.ndarray, sizes: list[int], slots: tuple[int, ...]) -> int:
    return sum(int(curve[n]) * size for curve, size, n in zip(curves, sizes, slots, strict=True))


@given(spreads)
@settings(QUICK, max_examples=100)
def test_the_programme_saves_as_many_bytes_as_any_spread(given_spread):
    curves, sizes, budget = draw(*given_spread)
    most = curves.shape[1] - 1
    possible = [
        saved(curves, sizes, slots)
        for slots in product(range(1, most + 1), repeat=len(sizes))
        if sum(n * size for n, size in zip(slots, sizes, strict=True)) <= budget
    ]
    assert saved(curves, sizes, tuple(dp(curves, sizes, budget))) == max(possible)


@given(spreads, st.sampled_from([greedy, dp]), st.sampled_from([1, 1_000_003]))
@QUICK
def test_every_spread_fits_and_leaves_no_room(given_spread, choose, scale):
    """Also where bytes are counted in coarser units (``scale``)."""
    curves, sizes, budget = draw(*given_spread)
    sizes, budget = [size * scale + 1 for size in sizes], budget * scale + len(sizes)
    slots = choose(curves, sizes, budget)
    left = budget - sum(n * size for n, size in zip(slots, sizes, strict=True))
    assert left >= 0
    most = curves.shape[1] - 1
    assert all(1 <= n <= most for n in slots)
    assert all(n == most or size > left for n, size in zip(slots, sizes, strict=True))


# ---------------------------------------------------------------------- as an option


@pytest.mark.parametrize(
    ("slots", "capacity"), [("even", (3, 3)), ("greedy", (3, 3)), ("dp", (2, 4))]
)
def test_slots_go_to_the_layer_that_used_them(slots, capacity):
    # Set aside: layer 0 always needs the same two, layer 1 goes around four. Greedy sees no gain in
    # a second or third slot of layer 1, the programme that of the fourth.
    others = [[[0, 1], [4 + step % 4]] for step in range(12)]
    judged = [[[2, 3], [4]]] * 3
    shape = shape_of(2, 4)
    values, options = policies.get("lru").parse({"slots": slots})
    policy = policies.get("lru").build(values, policy_data(shape, judged))
    plan = plan_policy(shape, policy, options, 6 * 12, fit_of(others, 2))
    assert plan.capacity == capacity
    assert plan.used_bytes == 6 * 12


def test_two_precisions_share_uneven_pools_in_bytes():
    shape = Shape(2, 4, 2, (30, 20), (8, 5))
    assert uneven_plan(shape, (3, 1), 0).capacity == (90, 20)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path: Path = tmp_path_factory.mktemp("slots") / "trace"
    make_trace(path, layers=4, experts=8, top_k=2, requests=8, prompt=4, output=20, seed=3)
    return Trace.open(path)


def point(slots: str, **changes: object) -> Point:
    return Point(
        **{
            "policy": "lru",
            "params": {"slots": slots},
            "hardware": "rtx4090-pcie4",
            "expert_budget": "50%",
            **changes,
        }
    )


def test_uneven_slots_set_requests_aside(trace):
    assert inputs_for(trace, point("even")).fitted_on == []
    inputs = inputs_for(trace, point("greedy"))
    assert inputs.fitted_on
    assert not set(inputs.fitted_on) & set(inputs.judged)
    even, greedy_run = (run_point(inputs, point(slots)) for slots in ("even", "greedy"))
    assert even["memory"]["slots_by_layer"] is None
    assert sum(greedy_run["memory"]["slots_by_layer"]) == greedy_run["memory"]["slots"] == 16
    assert len(set(greedy_run["memory"]["slots_by_layer"])) > 1
    assert even["decode"]["accesses"] == greedy_run["decode"]["accesses"]


def test_uneven_slots_of_one_policy_set_requests_aside_for_all_of_a_sweep():
    def share(*chosen: object) -> float:
        return SweepConfig(
            trace="sample",
            policies=chosen,
            hardware=("rtx4090-pcie4",),
            expert_budgets=("25%",),
        ).judged_fit_share

    assert share("lru", "slru") == 0
    assert share("lru", {"name": "slru", "set": {"slots": "dp"}}) == 0.3


def test_slots_do_not_depend_on_the_judged_requests(trace):
    """The same requests set aside, other ones judged: the same slots."""
    inputs = Inputs(trace, fit_share=0.3)
    first = run_point(inputs, point("dp"))["memory"]["slots_by_layer"]
    inputs.judged = inputs.judged[:2]
    inputs._workloads.clear()
    second = run_point(inputs, point("dp"))
    assert second["requests"] == 2
    assert second["memory"]["slots_by_layer"] == first


def test_uneven_slots_need_layers_of_their_own_and_requests_to_learn_from(trace):
    with pytest.raises(PolicyError, match=r"slots=dp spreads a budget .* \(scope global\)"):
        run_point(Inputs(trace, fit_share=0.3), point("dp", policy="lru-global"))
    with pytest.raises(PolicyError, match="slots=greedy needs requests to learn from"):
        run_point(Inputs(trace), point("greedy", fit_share=0))
    with pytest.raises(PolicyError, match="slots=best is not one of even, greedy, dp"):
        inputs_for(trace, point("best"))


def test_the_programmes_slots_hit_most_on_the_requests_they_are_fitted_on(trace):
    fit = Inputs(trace, fit_share=0.5).fit()
    assert fit is not None
    shape = shape_of(4, 8, 2, 10)
    steps = [
        keys
        for keys in map(fit.events.step, range(fit.workload.num_steps))
        if max(map(len, keys)) <= 2
    ]
    curves = reuse_curves(fit_of(steps, 4), shape)

    def hits(slots: list[int]) -> int:
        core = make_core("lru", policy_data(shape, steps), plan=uneven_plan(shape, slots, 0))
        run_instant(core, steps)
        return sum(bucket.hits for bucket in core.tally.buckets.values())

    best = dp(curves, (10,) * 4, 160)
    assert len(set(best)) > 1
    assert min(best) >= 2
    # Events of two experts fit into two slots and more, so the curves are exact there.
    assert hits(best) == sum(int(curve[n]) for curve, n in zip(curves, best, strict=True))
    assert hits(best) >= hits([4] * 4)
