"""FineMoE on stories worked out by hand, its parts one by one, and its totals on the sample."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies._map_store import UNITS, MapStore, _directions, as_units, scatter
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.finemoe import MapCache, MapPrefetcher, prefetch_set
from policies.interface import PolicyData
from policies.memory import COPYING, RESIDENT
from sim.commands import simulate_command
from sim.inputs import Inputs
from sim.machine import Machine
from sim.point import Point, inputs_for, run_point
from sim.sweeps import SweepConfig, sweep
from sim.timing import HostCosts
from tests.cases import Case, OddTiming, make_columns, make_shape
from tests.driver import (
    EXPERT_BYTES,
    GivenFit,
    GivenSignals,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    table,
    told,
    total,
)
from tests.machines import FlatTiming
from tests.made_up import all_data
from tests.reference.plain_model import PlainModel
from tests.test_plain_model import outcome
from tests.traces import make_trace
from tracer.trace import Trace
from tracer.workload import Workload

# An iteration: the embedding of its token and, for each layer, what its gate said.
Iteration = tuple[list[float], list[list[float]]]

FAVOUR = {expert: [1.0 if other == expert else 0.0 for other in range(4)] for expert in range(4)}
MOSTLY_0 = [0.75, 0.25, 0.0, 0.0]


def signals_of(iterations: list[Iteration]) -> GivenSignals:
    """One decode row a step."""
    probs = [[np.array([gate], np.float16) for gate in gates] for _, gates in iterations]
    embeddings = [np.array([embedding], np.float16) for embedding, _ in iterations]
    return GivenSignals(
        {"gate_probs": probs},
        {"embedding": embeddings, "phase": [np.ones(1, np.uint8)] * len(iterations)},
    )


def events_of(iterations: list[Iteration]) -> list[list[list[int]]]:
    """Top-1: the event of a layer is the key of its largest probability."""
    return [
        [[layer * 4 + int(np.argmax(gate))] for layer, gate in enumerate(gates)]
        for _, gates in iterations
    ]


def core_of(
    iterations: list[Iteration], log: Log | None = None, *, slots: int = 6, **given: Any
) -> DecisionCore:
    shape = shape_of(len(iterations[0][1]), 4, 1)
    data = policy_data(shape, events_of(iterations), signals=signals_of(iterations))
    return make_core("finemoe", data, slots=slots, log=log, **{"mode": "online", **given})


# ---------------------------------------------------------------------- the story

STORY: list[Iteration] = [
    ([1, 0], [MOSTLY_0, MOSTLY_0, MOSTLY_0]),
    ([0, 1], [FAVOUR[2], FAVOUR[1], FAVOUR[2]]),
    ([0.8, 0.6], [FAVOUR[0], FAVOUR[3], FAVOUR[0]]),
    ([1, 0], [FAVOUR[2], FAVOUR[1], FAVOUR[3]]),
]


def test_finemoe_finds_by_embedding_then_by_trajectory_and_evicts_the_improbable():
    log: Log = []
    core = core_of(STORY, log, distance=1)
    run_instant(core, events_of(STORY))
    # Two slots a layer; layer 0 by embedding, layers 1 and 2 by the maps up to the one before.
    assert story(log) == told("""
        0.0 | 0 | +0              # the store is empty: demand only
        0.1 | 4 | +4
        0.2 | 8 | +8
        # cosine 0 with the only entry, so delta = 1: all that it thinks possible, 0 and 1
        1.- | | ~1
        1.0 | 2 | -1 +2 ~5        # p * visits: 0: 3/4, 1: 1/4. Layer 1: 4 and 5, cosine 0
        1.1 | 5* | ~9             # cosine (1/4) / sqrt(2 * 5/8 * 2) = 0.16: 3/4 is not enough
        1.2 | 10 | -9 +10         # 8: 3/4, 9: 1/4
        # delta = 0.2 to the first entry: 0 alone, and it is there
        2.0 | 0* |                # cosine 0.95 with the first: 4 alone
        2.1 | 7 | -5 +7           # 4: 3/4, 5: 1/4; cosine (3/4) / sqrt(2 * 2 * 5/8) = 0.47: 8 alone
        2.2 | 8* |
        # the embedding finds the first entry: 0; what the gate says, the second, which then used 5
        3.0 | 2* | -4 ~5          # 4 and 7 are equally improbable and were visited once each
        3.1 | 5* |                # the second entry says 10, which is there
        3.2 | 11 | -8 +11         # 8 was visited twice, but 10 is the probable one
    """)
    assert total(core, "hits") == 5
    assert total(core, "hits") + total(core, "misses") == 12
    # Of layer 0: {0, 1}, {0}, {0}; of layer 1: {4, 5}, {4}, {5}; of layer 2: {8, 9}, {8}, {10}.
    assert core.tally.predicted == 12
    assert core.tally.predicted_right == 4
    assert core.tally.predictable == 9


def test_finemoe_at_distance_2_serves_two_layers_by_embedding_and_the_third_from_the_first_gate():
    iterations: list[Iteration] = [
        ([1, 0], [FAVOUR[0], FAVOUR[0], FAVOUR[0]]),
        ([1, 0], [FAVOUR[0], FAVOUR[0], FAVOUR[0]]),
    ]
    core = core_of(iterations, distance=2)
    asked: list[tuple[int, int]] = []
    ready = core.prediction_ready

    def noting(prediction: Any) -> None:
        asked.append((core.layer, prediction.layer))
        ready(prediction)

    core.prediction_ready = noting  # type: ignore[method-assign]
    run_instant(core, events_of(iterations))
    assert asked == [(-1, 0), (-1, 1), (0, 2)]


def test_finemoe_of_few_layers_asks_the_embedding_alone():
    log: Log = []
    core = core_of(STORY, log, distance=64)
    asked: list[int] = []
    ready = core.prediction_ready

    def noting(prediction: Any) -> None:
        asked.append(core.layer)
        ready(prediction)

    core.prediction_ready = noting  # type: ignore[method-assign]
    run_instant(core, events_of(STORY))
    assert asked == [-1] * 9


def test_finemoe_leaves_the_store_alone_without_update():
    log: Log = []
    run_instant(core_of(STORY, log, update=False), events_of(STORY))
    assert not any("~" in line for line in story(log).splitlines())


# ---------------------------------------------------------------------- priorities and pausing

LEANING: Iteration = ([1, 0], [FAVOUR[0], [0.5, 0.5, 0, 0], [0.1, 0, 0.9, 0]])


def queued(core: DecisionCore) -> list[int]:
    return [copy.key for copy in core.queue.low]


def begin(core: DecisionCore, step: int) -> None:
    """A step begins, and its predictions are there."""
    core.step_begin(step, "decode")
    for prediction in core.predictions_at_step():
        core.prediction_ready(prediction)


def pass_gate(core: DecisionCore, layer: int, key: int) -> None:
    core.gate(layer, [key], {key: 1})
    for prediction in core.predictions(layer, [key]):
        core.prediction_ready(prediction)


def land(core: DecisionCore) -> int:
    """The next copy lands at once; its key."""
    handed = core.next_chunk()
    assert handed is not None
    core.chunk_done(handed[0])
    return handed[0].key


def run_one(core: DecisionCore, iteration: Iteration) -> None:
    """The first step, by demand alone."""
    begin(core, 0)
    for layer, (key,) in enumerate(events_of([iteration])[0]):
        pass_gate(core, layer, key)
        assert land(core) == key
        core.experts_done(layer)
    core.step_end()


def test_prefetches_go_by_probability_over_distance_anew_at_every_gate():
    # The map found leans to 0, then 4 and 5 alike, then 10. No budget to keep them: all anew.
    core = core_of([LEANING, LEANING], slots=12, distance=3, reset=True)
    run_one(core, LEANING)
    core.request_begin(1)
    assert core.memory.residents() == []
    begin(core, 1)
    # p / (l - l_now): 0: 1/1; 10: (9/10)/3; 4: (1/2)/2. delta is 0: top-1 of each.
    assert queued(core) == [0, 10, 4]
    pass_gate(core, 0, 0)
    # 0 is demanded. 4: (1/2)/1; 10: (9/10)/2.
    assert queued(core) == [4, 10]


def test_a_miss_pauses_prefetching_until_the_event_has_all_it_waits_for():
    core = core_of([LEANING, LEANING], slots=12, distance=3, reset=True, chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(2, [8])
    core.gate(0, [0, 1], {0: 1, 1: 1})
    list(core.predictions(0, [0, 1]))
    handed = [core.next_chunk() for _ in range(4)]
    assert [copy.key for copy, _ in handed if copy] == [0, 0, 1, 1]
    for copy, _ in handed[:3]:
        assert core.next_chunk() is None
        core.chunk_done(copy)
    assert core.awaits_copies
    assert core.next_chunk() is None
    core.chunk_done(handed[3][0])
    assert not core.awaits_copies
    assert land(core) == 8


def test_prefetching_pauses_from_the_first_wave_to_the_last_copy_of_the_last():
    core = core_of([LEANING], slots=6, distance=3)
    core.step_begin(0, "decode")
    core.prefetch(2, [8])
    wave = core.gate(0, [0, 1, 2], dict.fromkeys([0, 1, 2], 1))
    list(core.predictions(0, [0, 1, 2]))
    assert not wave.last
    assert [land(core), land(core)] == [0, 1]
    assert core.next_chunk() is None
    core.next_wave()
    assert land(core) == 2
    assert land(core) == 8


def test_an_event_of_hits_pauses_nothing():
    core = core_of([LEANING], slots=12, distance=3)
    core.step_begin(0, "decode")
    pass_gate(core, 0, 0)
    assert land(core) == 0
    core.experts_done(0)
    core.step_begin(1, "decode")
    core.prefetch(2, [8])
    core.gate(0, [0], {0: 1})
    list(core.predictions(0, [0]))
    assert land(core) == 8


# ---------------------------------------------------------------------- rows of a step


def two_rows(phases: list[int]) -> GivenSignals:
    """Two steps alike of two rows each: one favours expert 1 of each layer, one expert 2."""
    gates = [np.array([[0.0, 0.75, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]], np.float16)] * 2
    embeddings = np.array([[1, 0], [0, 1]], np.float16)
    return GivenSignals(
        {"gate_probs": [gates, gates]},
        {"embedding": [embeddings] * 2, "phase": [np.array(phases, np.uint8)] * 2},
    )


def core_of_rows(phases: list[int]) -> DecisionCore:
    shape = shape_of(2, 4, 1)
    steps = [[[1, 2], [5, 6]]] * 2
    data = policy_data(shape, steps, signals=two_rows(phases))
    core = make_core("finemoe", data, slots=8, mode="online", distance=2)
    run_instant(core, steps[:1])
    return core


def test_a_batch_prefetches_the_union_at_the_larger_probability():
    core = core_of_rows([1, 1])
    core.step_begin(1, "decode")
    found = list(core.predictions_at_step())
    assert [prediction.layer for prediction in found] == [0, 1]
    # Each row finds itself, delta 0: top-1 of both. Expert 2: 1/4 and 1, so 1.
    assert list(found[0].keys) == [2, 1]
    assert list(found[0].scores) == [1.0, 0.75]
    assert list(found[1].keys) == [6, 5]


def test_prefill_rows_are_neither_searched_for_nor_stored():
    core = core_of_rows([0, 0])
    core.step_begin(1, "prefill")
    assert list(core.predictions_at_step()) == []
    # A decode row beside a prefill row counts alone.
    core = core_of_rows([0, 1])
    core.step_begin(1, "prefill")
    found = list(core.predictions_at_step())
    assert [list(prediction.keys) for prediction in found] == [[2], [6]]


def test_layers_that_did_not_run_count_for_nothing():
    nan = [math.nan] * 4
    iterations: list[Iteration] = [
        ([1, 0], [FAVOUR[0], nan, FAVOUR[2]]),
        ([1, 0], [FAVOUR[0], nan, FAVOUR[2]]),
    ]
    steps = [[[0], [], [10]]] * 2
    data = policy_data(shape_of(3, 4, 1), steps, signals=signals_of(iterations))
    log: Log = []
    core = make_core("finemoe", data, slots=12, log=log, mode="online", distance=1, reset=True)
    run_instant(core, steps, requests=[0, 1])
    assert story(log) == told("""
        0.0 | 0 | +0
        0.2 | 10 | +10 -0 -10     # the next request begins with an empty cache
        1.- | | ~0
        1.0 | 0* |
        1.2 | 10 | +10            # layer 2 is looked for at the gate of layer 1, which did not run
    """)


# ---------------------------------------------------------------------- the prefetch set


@pytest.mark.parametrize(
    ("delta", "top_k", "chosen"),
    [
        (0.0, 1, [2]),
        (0.0, 2, [2, 0]),
        (0.5, 1, [2]),
        (0.51, 1, [2, 0]),
        (0.75, 1, [2, 0]),
        (0.76, 1, [2, 0, 3]),
        (0.9, 1, [2, 0, 3, 4]),
        (1.0, 1, [2, 0, 3, 4]),
        (7.0, 1, [2, 0, 3, 4]),
        (-1e-16, 3, [2, 0, 3]),
        (0.0, 5, [2, 0, 3, 4]),
    ],
)
def test_the_set_reaches_delta_and_top_k_and_leaves_out_the_impossible(delta, top_k, chosen):
    units = np.array([0.25, 0, 0.5, 0.125, 0.125], np.float32) * UNITS
    assert prefetch_set(units, delta, top_k).tolist() == chosen


def test_maps_keep_probabilities_to_the_4096th_and_take_what_did_not_run_as_0():
    given_probs = np.array([[0.5, 1 / 4096, 0.4 / 4096], [math.nan] * 3])
    assert as_units(given_probs).tolist() == [[2048, 1, 0], [0, 0, 0]]
    experts = np.array([[2, 0], [3, -1]])
    weights = np.array([[0.5, 0.25], [0.125, math.nan]])
    assert scatter(experts, weights, 4).tolist() == [[0.25, 0, 0.5, 0], [0, 0, 0, 0.125]]


# ---------------------------------------------------------------------- the store


def random_maps(seed: int, entries: int, layers: int, experts: int) -> Any:
    rng = np.random.default_rng(seed)
    maps = rng.dirichlet(np.full(experts, 0.2), (entries, layers))
    return as_units(maps), rng.standard_normal((entries, 5)).astype(np.float16)


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def plain_fill(maps: Any, embeddings: Any, capacity: int, share: float) -> list[int]:
    """Which entries a store ends with, place by place, by the rule as it is written."""
    held: list[int] = []
    for new in range(len(maps)):
        if len(held) < capacity:
            held.append(new)
            continue
        redundancy = [
            share * cosine(embeddings[old], embeddings[new])
            + (1 - share) * cosine(maps[old], maps[new])
            for old in held
        ]
        held[int(np.argmax(redundancy))] = new
    return held


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 30))
@example(439, 5, 19)
def test_filling_replaces_the_most_redundant_however_it_is_split(seed, capacity, entries):
    maps, embeddings = random_maps(seed, entries, 3, 6)
    whole = MapStore(capacity, 3, 6, 1 / 3)
    whole.fill(embeddings, maps)
    split = MapStore(capacity, 3, 6, 1 / 3)
    for first in range(0, entries, 4):
        split.fill(embeddings[first : first + 4], maps[first : first + 4])
    # The store keeps embeddings as unit vectors in whole numbers; near ties are decided by those.
    directions, _ = _directions(embeddings)
    held = plain_fill(maps, directions, capacity, 1 / 3)
    assert whole.size == split.size == len(held)
    for place, entry in enumerate(held):
        assert whole.maps[:, place].tolist() == maps[entry].tolist()
    assert np.array_equal(whole.maps, split.maps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 3))
def test_searches_find_what_the_cosine_says(seed, entries, rows):
    maps, embeddings = random_maps(seed, entries + rows, 3, 6)
    store = MapStore(20, 3, 6, 1 / 3)
    store.fill(embeddings[rows:], maps[rows:])
    semantic = store.semantic(embeddings[:rows])
    prefixes = store.prefixes(rows)
    for row in range(rows):
        expected = [cosine(embeddings[row], other) for other in embeddings[rows:]]
        assert semantic[row] == pytest.approx(expected, abs=2e-3)
    for layer in range(3):
        prefixes.extend(layer, maps[:rows, layer])
        for row, (entry, found) in enumerate(prefixes.best()):
            scores = [cosine(maps[row, : layer + 1], other[: layer + 1]) for other in maps[rows:]]
            assert found == pytest.approx(max(scores), abs=1e-12)
            assert scores[entry] == pytest.approx(max(scores), abs=1e-12)
    assert prefixes.cosines()[0, 0] == pytest.approx(cosine(maps[0], maps[rows]), abs=1e-12)


def test_products_are_exact_in_any_order():
    """So that another machine's summation finds the same entry."""
    maps, embeddings = random_maps(1, 40, 4, 64)
    store = MapStore(40, 4, 64, 0.5)
    store.fill(embeddings, maps)
    order = np.random.default_rng(2).permutation(64)
    for layer in range(4):
        forward = store.maps[layer] @ store.maps[layer].T
        shuffled = store.maps[layer][:, order] @ store.maps[layer][:, order].T
        exact = store.maps[layer].astype(np.int64) @ store.maps[layer].astype(np.int64).T
        assert np.array_equal(forward, shuffled)
        assert np.array_equal(forward.astype(np.int64), exact)


def fit_of(iterations: list[Iteration], phases: list[int]) -> GivenFit:
    """One row a step."""
    rows = np.arange(len(iterations))
    return GivenFit(
        events=table(events_of(iterations), len(iterations[0][1])),
        columns={
            "gate_probs": np.array([gates for _, gates in iterations], np.float16),
            "embedding": np.array([embedding for embedding, _ in iterations], np.float16),
        },
        step_of_row=rows,
        request_of_row=rows,
        phase_of_row=np.array(phases, np.uint8),
    )


def store_of(core: DecisionCore) -> MapStore:
    prefetcher = core.policy.prefetcher
    assert isinstance(prefetcher, MapPrefetcher)
    return prefetcher._store


def test_offline_the_store_holds_the_decode_rows_of_the_requests_set_aside_and_no_others():
    learned = [STORY[1], STORY[0], STORY[2]]
    judged = [STORY[3], STORY[0]]
    shape = shape_of(3, 4, 1)
    data = policy_data(
        shape, events_of(judged), signals=signals_of(judged), fit=fit_of(learned, [0, 1, 1])
    )
    core = make_core("finemoe", data, slots=6)
    store = store_of(core)
    expected = as_units(np.array([learned[1][1], learned[2][1]]))
    assert store.size == 2
    assert np.array_equal(store.maps[:, :2].swapaxes(0, 1), expected)
    core = make_core("finemoe", data, slots=6, update=False)
    run_instant(core, events_of(judged))
    assert store_of(core).size == 2


def test_offline_learns_from_top_k_weights_alike():
    learned = [STORY[0], STORY[1]]
    fit = fit_of(learned, [1, 1])
    experts = np.array([[[0, 1]] * 3, [[2, 0], [1, 0], [2, 0]]], np.int16)
    probs = np.asarray(fit.columns["gate_probs"])
    weights = np.take_along_axis(probs, experts.astype(np.int64), -1)
    scarce = replace(fit, columns={**fit.columns, "experts": experts, "weights": weights})
    del scarce.columns["gate_probs"]  # type: ignore[attr-defined]
    full = signals_of(STORY)
    layered = {
        "experts": [[experts[:1, layer] for layer in range(3)]] * 4,
        "weights": [[weights[:1, layer] for layer in range(3)]] * 4,
    }
    poorer = GivenSignals(layered, full._stepped)
    shape = shape_of(3, 4, 1)
    stores = []
    for signals, fitted in ((full, fit), (poorer, scarce)):
        data = policy_data(shape, events_of(STORY), signals=signals, fit=fitted)
        core = make_core("finemoe", data, slots=6)
        stores.append(store_of(core).maps)
        assert len(core.policy.notes) == (signals is poorer)
    assert np.array_equal(*stores)


# ---------------------------------------------------------------------- the cache rule


def cache_core(scope: str = "layer", slots: int = 6) -> tuple[DecisionCore, MapCache]:
    core = core_of([LEANING], slots=slots, scope=scope)
    rule = core.policy.cache
    assert isinstance(rule, MapCache)
    return core, rule


def hold(core: DecisionCore, *keys: int) -> None:
    for key in keys:
        core.memory.take(key)
        core.memory.state[key] = RESIDENT
        core.policy.cache.on_insert(key)


def test_victims_by_probability_times_visits():
    core, rule = cache_core(slots=9)
    hold(core, 0, 1, 3)
    rule.on_event(0, [0])
    for _ in range(3):
        rule.on_event(0, [1, 3])
    # Nothing found yet: by visits alone, 0: 1, 1: 3, 3: 3.
    assert rule.victim(0, ()) == 0
    assert rule.victim(0, {0}) == 1
    rule.expect(0, np.array([0.7, 0.1, 0.0, 0.2], np.float32) * UNITS)
    # 0: 0.7, 1: 0.3, 3: 0.6.
    assert [rule.victim(0, set(barred)) for barred in ((), (1,), (1, 3))] == [1, 3, 0]
    core.memory.state[1] = COPYING
    assert rule.victim(0, ()) == 3
    assert rule.victim(0, {0, 3}) is None
    rule.on_evict(3)
    assert rule.victim(0, ()) == 0
    rule.reset()
    assert rule.victim(0, ()) == 0


def test_an_unvisited_expert_counts_as_visited_once_and_an_impossible_one_has_the_floor():
    core, rule = cache_core()
    hold(core, 0, 1)
    rule.expect(0, np.array([0, 3, 0, 0], np.float32))
    # 0: half a unit times 6 visits is not above 3 units, unvisited: a tie, lowest key.
    for _ in range(6):
        rule.on_event(0, [0])
    assert rule.victim(0, ()) == 0
    rule.on_event(0, [0])
    assert rule.victim(0, ()) == 1


def test_one_pool_compares_layers():
    core, rule = cache_core("global")
    hold(core, 0, 5, 10)
    rule.expect(1, np.array([0, 0.125, 0, 0.875], np.float32) * UNITS)
    # 5: 1/8, the others 1/4 of nothing found.
    assert rule.victim(0, ()) == 5
    assert rule.victim(0, {5}) == 0


# ---------------------------------------------------------------------- what it needs


def test_columns_that_are_missing_are_named():
    shape = shape_of(3, 4, 1)
    signals = signals_of(STORY)
    data = policy_data(shape, events_of(STORY), signals=signals)
    for columns, missing in (
        ({"gate_probs"}, "column embedding.*--record probs,embedding"),
        ({"embedding"}, "column gate_probs, or weights.*--record probs,embedding"),
    ):
        with pytest.raises(PolicyError, match=missing):
            make_core("finemoe", replace(data, columns=frozenset(columns)), slots=6)
    with pytest.raises(PolicyError, match="mode=online"):
        make_core("finemoe", data, slots=6)


class Lacking:
    """A trace without some of its columns."""

    def __init__(self, trace: Trace, *names: str) -> None:
        self._trace = trace
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trace, name)

    def columns(self) -> list[str]:
        return [name for name in self._trace.columns() if name not in self._names]


POINT = Point(
    policy="finemoe",
    hardware="rtx4090-pcie4",
    geometry="olmoe-1b-7b",
    expert_budget="25%",
    max_tokens=300,
)


def test_a_result_from_top_k_weights_alone_says_so():
    trace = Trace.open("sample")
    full = run_point(inputs_for(trace, POINT), POINT)
    poorer = run_point(inputs_for(Lacking(trace, "gate_probs"), POINT), POINT)
    assert full["notes"] == []
    assert len(poorer["notes"]) == 1
    assert "no gate_probs" in poorer["notes"][0]
    assert poorer["prefetch"]["recall"] != full["prefetch"]["recall"]


def test_simulate_tells_the_note_and_a_sweep_keeps_it(tmp_path, capsys):
    make_trace(tmp_path / "trace", requests=6, columns=("weights", "embedding"))
    simulate_command(
        trace=str(tmp_path / "trace"),
        hardware="rtx4090-pcie4",
        policy="finemoe",
        expert_budget="50%",
        as_json=True,
    )
    printed = capsys.readouterr()
    (note,) = json.loads(printed.out)["notes"]
    assert f"note: {note}" in printed.err
    config = SweepConfig(
        trace=str(tmp_path / "trace"),
        hardware=["rtx4090-pcie4"],
        expert_budgets=["50%"],
        policies=["lru", "finemoe"],
    )
    rows = sweep(config).set_index("policy")
    assert json.loads(rows.loc["finemoe", "notes"]) == [note]
    assert json.loads(rows.loc["lru", "notes"]) == []


# ---------------------------------------------------------------------- on machines

DELAYS = {
    "free": OddTiming(),
    "delayed": OddTiming(predictor_ns={"map_search": 31}),
    "slow-host": OddTiming(HostCosts(9, 8, 5, 13, 10, 41), predictor_ns={"map_search": 23}),
}
RUNS = {
    "decode": (Case(slots=4, layers=4), {}),
    "prefill": (Case(slots=3, layers=4, prompt=9), {"chunks": 3}),
    "batch": (Case(slots=5, layers=4, batch=3, top_k=3), {"distance": 2, "chunks": 2}),
    "one-pool": (Case(slots=4, layers=4, window=1), {"scope": "global"}),
    "id-order": (Case(slots=3, layers=4, top_k=3), {"order": "id", "distance": 1}),
    "skipped-layers": (Case(slots=4, layers=5, skip=True), {"mode": "online", "capacity": 5}),
    "kept-prefetches": (Case(slots=4, layers=5), {"preempt": False, "distance": 4}),
}


def machine_core(case: Case, given: dict[str, Any]) -> tuple[Workload, DecisionCore]:
    workload = Workload(make_columns(case), case.experts)
    others = Workload(make_columns(replace(case, seed=case.seed + 1)), case.experts)
    shape = make_shape(case)
    data = all_data(workload, others, shape, oracle=False)
    budget = case.slots * sum(shape.bytes_by_layer)
    core = make_core("finemoe", data, budget=budget, log=[], **given)
    return workload, core


@pytest.mark.parametrize("timing", DELAYS.values(), ids=DELAYS)
@pytest.mark.parametrize(("case", "given"), RUNS.values(), ids=RUNS)
def test_lean_and_plain_model_agree_to_the_nanosecond(case, given, timing):
    case = replace(case, steps=24)
    workload, core = machine_core(case, given)
    plain = PlainModel(workload, core, timing, window=case.window).run()
    expected = outcome(plain, plain.link_busy_ns, core)
    assert core.tally.prefetch_used > 0
    for bursts in (True, False):
        workload, core = machine_core(case, given)
        machine = Machine(workload, core, timing, window=case.window, bursts=bursts)
        machine.run()
        assert outcome(machine.times, machine.link.busy_ns, core) == expected


def test_a_slow_search_is_no_free_search():
    """The later the prediction, the less of it is of use; one that takes forever brings nothing."""
    used = []
    for delay in (0, 100, 10_000):
        case = Case(slots=4, layers=4, steps=40)
        workload, core = machine_core(case, {})
        Machine(workload, core, OddTiming(predictor_ns={"map_search": delay})).run()
        used.append(core.tally.prefetch_used)
    assert used[0] > used[1] > used[2] == 0


def test_a_search_over_more_maps_than_were_measured_takes_longer(monkeypatch):
    """As if the machine's time were of 4 maps: the same as a predictor so many times slower."""
    case = Case(slots=4, layers=4, steps=24)
    given = {"update": False}
    monkeypatch.setattr("policies.finemoe._MEASURED_MAPS", 4)
    workload, core = machine_core(case, given)
    entries = core.policy.prefetcher._store.size
    assert entries > 4
    machine = Machine(workload, core, OddTiming(predictor_ns={"map_search": 31}))
    machine.run()
    found = outcome(machine.times, machine.link.busy_ns, core)
    workload, core = machine_core(case, given)
    plain = PlainModel(workload, core, OddTiming(predictor_ns={"map_search": 31})).run()
    assert outcome(plain, plain.link_busy_ns, core) == found
    monkeypatch.setattr("policies.finemoe._MEASURED_MAPS", 10**6)
    workload, core = machine_core(case, given)
    slower = OddTiming(predictor_ns={"map_search": round(31 * entries / 4)})
    machine = Machine(workload, core, slower)
    machine.run()
    assert outcome(machine.times, machine.link.busy_ns, core) == found


# ---------------------------------------------------------------------- the sample

GOLDEN = {
    "offline": ({}, None, (51661, 306, 19301, 53462, 34032, 21088, 66678, 40839)),
    "online": (
        {"mode": "online", "scope": "global", "distance": 6, "capacity": 50},
        400,
        (12588, 282, 8319, 19981, 11490, 5501, 23884, 10512),
    ),
}


@pytest.mark.parametrize(("given", "tokens", "totals"), GOLDEN.values(), ids=GOLDEN)
def test_totals_on_the_sample_and_the_laws_they_obey(given, tokens, totals):
    """OLMoE's routing, a quarter resident, on a machine of round numbers."""
    trace = Trace.open("sample")
    inputs = Inputs(trace, fit_share=0.3, max_tokens=tokens)
    shape = shape_of(16, 64, 8)
    data = PolicyData(
        shape,
        columns=frozenset(trace.columns()),
        signals=inputs.signals("last-use"),
        fit=inputs.fit(),
    )
    core = make_core("finemoe", data, slots=256, **given)
    workload = inputs.workload()
    machine = Machine(workload, core, FlatTiming(predictor_ns={"map_search": 20}))
    machine.run()
    tally = core.tally
    assert (
        total(core, "hits"),
        total(core, "late"),
        total(core, "misses"),
        tally.copies,
        tally.prefetch_started,
        tally.prefetch_used,
        tally.predicted,
        tally.predicted_right,
    ) == totals
    assert total(core, "accesses") == sum(totals[:3]) == workload.num_accesses
    assert tally.copies == tally.evictions + len(core.memory.residents())
    assert tally.copied_bytes == tally.copies * EXPERT_BYTES
    assert tally.predicted_right <= min(tally.predicted, tally.predictable)
    assert len(core.memory.residents()) == 256
