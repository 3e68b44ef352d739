"""The decision core against an independent replay, access by access."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from policies.core import DecisionCore
from policies.interface import Shape
from tests.driver import Log, Steps, make_core, policy_data, run_instant, shape_of
from tests.reference import bruteforce
from tests.reference.bruteforce import Event, Outcome
from tracer.workload import DECODE, PREFILL, Workload

MIB = 2**20


def flat(steps: Steps) -> list[Event]:
    """Events that ran, in order."""
    return [
        (step, layer, keys)
        for step, events in enumerate(steps)
        for layer, keys in enumerate(events)
        if len(keys)
    ]


def outcomes(log: Iterable[tuple[Any, ...]]) -> list[Outcome]:
    """The core's log in the words of the reference."""
    found: list[Outcome] = []
    for kind, step, layer, *rest in log:
        if kind == "gate":
            keys, hits = rest
            misses = tuple(key for key in keys if key not in hits)
            found.append(Outcome(step, layer, hits, misses, ()))
        elif kind == "evict":
            found[-1].evicted += (rest[0],)
        elif kind == "adopt":
            found[-1].evicted += (rest[1],)
    return found


@st.composite
def small_traces(draw: st.DrawFn, most: int = 5) -> tuple[Shape, Steps]:
    """Up to 14 steps over at most 3 layers of at most 6 experts; events may be empty."""
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(2, 6))
    ids = st.lists(st.integers(0, experts - 1), max_size=min(most, experts), unique=True)
    steps = draw(st.lists(st.lists(ids, min_size=layers, max_size=layers), min_size=1, max_size=14))
    keyed = [
        [[layer * experts + expert for expert in event] for layer, event in enumerate(step)]
        for step in steps
    ]
    sizes = tuple(draw(st.sampled_from([12, 12, 7, 30])) for _ in range(layers))
    return shape_of(layers, experts, 2, sizes), keyed


def one_size(shape: Shape) -> Shape:
    return shape_of(shape.layers, shape.experts, shape.top_k)


def recorded(core_name: str, shape: Shape, steps: Steps, slots: int, **given: Any) -> Any:
    log: Log = []
    core = make_core(core_name, policy_data(shape, steps), slots=slots, log=log, **given)
    run_instant(core, steps)
    return core, outcomes(log)


def hits(found: Iterable[Outcome]) -> int:
    return sum(len(event.hits) for event in found)


# ---------------------------------------------------------------------- random small traces

PER_LAYER = {"lru": bruteforce.lru, "belady": bruteforce.belady}
GLOBAL = {"lru-global": bruteforce.lru, "belady-global": bruteforce.belady}


@pytest.mark.parametrize("name", PER_LAYER)
@given(trace=small_traces(), slots=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_per_layer_caches_agree_with_brute_force(name, trace, slots):
    shape, steps = trace
    shape = one_size(shape)
    core, found = recorded(name, shape, steps, slots * shape.layers)
    expected = PER_LAYER[name](
        flat(steps), core.plan.capacity, range(shape.layers), (1,) * shape.layers
    )
    assert found == list(expected)


@pytest.mark.parametrize("name", GLOBAL)
@given(trace=small_traces(), slots=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_global_caches_agree_with_brute_force_in_bytes(name, trace, slots):
    shape, steps = trace
    _, found = recorded(name, shape, steps, slots)
    budget = slots * max(shape.bytes_by_layer)
    expected = GLOBAL[name](flat(steps), (budget,), (0,) * shape.layers, shape.bytes_by_layer)
    assert found == list(expected)


@given(trace=small_traces(), slots=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_bypass_hits_as_often_in_every_event_as_the_greedy_rule(trace, slots):
    """Which of two experts needed again by one event is kept is a matter of taste: counts agree."""
    shape, steps = trace
    shape = one_size(shape)
    staging = shape.experts
    _, found = recorded(
        "belady-bypass", shape, steps, slots * shape.layers + staging, staging_slots=staging
    )
    expected = bruteforce.bypass(flat(steps), slots)
    assert [len(event.hits) for event in found] == [len(event.hits) for event in expected]


@st.composite
def crowded_layers(draw: st.DrawFn) -> tuple[Shape, Steps, int, int]:
    """One layer whose events nearly fill its slots: shape, steps, slots, staging slots."""
    experts = draw(st.integers(3, 6))
    event = st.permutations(range(experts)).flatmap(
        lambda ids: st.integers(1, min(5, experts)).map(lambda size: list(ids[:size]))
    )
    steps = draw(st.lists(event, min_size=4, max_size=7))
    slots, staging = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return shape_of(1, experts), [[keys] for keys in steps], slots, staging


@given(case=crowded_layers())
@settings(max_examples=250, deadline=None)
def test_bypass_finds_the_most_hits_that_any_choice_gives(case):
    """With few staging slots too, where an event passes through them in waves."""
    shape, steps, slots, staging = case
    _, found = recorded("belady-bypass", shape, steps, slots + staging, staging_slots=staging)
    assert hits(found) == bruteforce.most_hits([keys for (keys,) in steps], slots)


@given(trace=small_traces(most=2), slots=st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_forced_belady_is_optimal_where_events_fit(trace, slots):
    shape, steps = trace
    shape = one_size(shape)
    _, found = recorded("belady", shape, steps, slots * shape.layers)
    most = sum(
        bruteforce.most_hits([step[layer] for step in steps if step[layer]], slots, forced=True)
        for layer in range(shape.layers)
        if any(step[layer] for step in steps)
    )
    assert hits(found) == most


@given(trace=small_traces(most=2), slots=st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_forced_global_belady_is_optimal_where_events_fit(trace, slots):
    shape, steps = trace
    shape = one_size(shape)
    _, found = recorded("belady-global", shape, steps, slots)
    events = [keys for _, _, keys in flat(steps)]
    assert hits(found) == (bruteforce.most_hits(events, slots, forced=True) if events else 0)


# ---------------------------------------------------------------------- gpt-oss-20b at 25 %

QUICK_TOKENS = 6_000


@pytest.fixture(scope="module")
def gpt_oss(shared: Path) -> NDArray[np.int32]:
    """Keys [tokens, layers, k]; the ids of a token are in rank order, which is touch order."""
    with np.load(shared / "traces" / "gpt-oss-20b-decode.npz") as recording:
        ids = recording["experts"].astype(np.int32)
    assert ids.shape == (64_794, 24, 4)
    return ids + np.arange(24, dtype=np.int32)[:, None] * 32


@pytest.mark.parametrize(
    "tokens", [QUICK_TOKENS, pytest.param(64_794, marks=pytest.mark.exhaustive, id="all")]
)
@pytest.mark.parametrize(
    ("name", "low", "high"), [("lru", 0.64, 0.68), ("belady", 0.75, 0.79)], ids=["lru", "belady"]
)
def test_gpt_oss_at_a_quarter_agrees_to_the_last_access(gpt_oss, name, tokens, low, high):
    """6.2 million accesses in all; the quick suite replays the first 1.2 million."""
    steps = [[tuple(keys) for keys in token.tolist()] for token in gpt_oss[:tokens]]
    shape = shape_of(24, 32, 4)
    log: Log = []
    core = make_core(name, policy_data(shape, steps), slots=8 * 24, log=log)
    assert core.plan.capacity == (8,) * 24
    expected = PER_LAYER[name](flat(steps), (8,) * 24, range(24), (1,) * 24)
    found = 0
    for step, events in enumerate(steps):
        replay_step(core, step, events)
        replayed = outcomes(log)
        assert replayed == list(islice(expected, 24))
        found += hits(replayed)
        log.clear()
    assert next(expected, None) is None
    assert low < found / (tokens * 96) < high


def replay_step(core: DecisionCore, step: int, events: Sequence[Sequence[int]]) -> None:
    """One decode step with instant copies; the general driver would take twice as long."""
    core.step_begin(step, "decode")
    for layer, keys in enumerate(events):
        wave = core.gate(layer, keys)
        if wave.waiting:
            core.land_demands(core.start_demands())
        assert wave.last
        core.experts_done(layer)
    core.step_end()


# ---------------------------------------------------------------------- the engine's own log


class Recording:
    """The engine's access log: events, and what the engine itself found in its memory."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        sizes = [int(line.split("expert_bytes=")[1].split()[0]) for line in _layer_lines(lines)]
        self.shape = Shape(layers=48, experts=128, top_k=6, bytes_by_layer=tuple(sizes))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        tokens: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.residency: list[bool] = []
        for row in rows:
            phase, layer = int(row["phase"]), int(row["layer"])
            tokens[phase, int(row["step"])][layer].append(int(row["expert"]))
            if phase == DECODE:
                self.residency.append(row["residency"] == "1")
        self.steps = _steps(tokens)


def _layer_lines(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if line.startswith("# layer="))


def _steps(tokens: dict[tuple[int, int], dict[int, list[int]]]) -> list[list[list[int]]]:
    """Prefill is one step of all its tokens, decoding a step a token."""
    experts = np.full((len(tokens), 48, 6), -1, np.int32)
    for row, (_, by_layer) in enumerate(sorted(tokens.items())):
        for layer, ids in by_layer.items():
            experts[row, layer] = ids
    phase = np.array([phase for phase, _ in sorted(tokens)])
    step = np.cumsum(phase == DECODE)
    assert (phase == PREFILL).sum() == 28
    zeros = np.zeros(len(phase), np.int32)
    columns = {
        "request": zeros,
        "step": step,
        "phase": phase,
        "position": zeros,
        "experts": experts,
    }
    events = Workload(columns, 128).events
    return [events.step(index) for index in range(len(events) // 48)]


@pytest.fixture(scope="module")
def engine(shared: Path) -> Recording:
    return Recording(shared / "traces" / "bigmoe-qwen3-30b-route.csv")


def run_engine(engine: Recording, name: str, mebibytes: int) -> list[Outcome]:
    """Outcomes of all events; the first 48 are the prefill."""
    log: Log = []
    data = policy_data(engine.shape, engine.steps)
    core = make_core(name, data, budget=mebibytes * MIB, log=log)
    assert core.plan.by_bytes
    run_instant(core, engine.steps)
    return outcomes(log)


def decode_hit_rate(found: Sequence[Outcome]) -> float:
    decode = found[48:]
    accesses = sum(len(event.hits) + len(event.misses) for event in decode)
    assert accesses == 36_864
    return hits(decode) / accesses


def test_global_lru_reproduces_every_access_of_the_engine(engine):
    found = run_engine(engine, "lru-global", 4000)
    simulated = [
        key in event.hits
        for event, keys in zip(found[48:], _decode_events(engine), strict=True)
        for key in keys
    ]
    assert len(simulated) == 36_864
    assert simulated == engine.residency
    assert round(100 * decode_hit_rate(found), 1) == 80.3


def _decode_events(engine: Recording) -> list[list[int]]:
    return [keys for step in engine.steps[1:] for keys in step]


@pytest.mark.parametrize(
    ("name", "mebibytes", "published"),
    [
        ("lru-global", 250, 0.0),
        ("lru-global", 750, 0.0),
        ("belady-global", 1000, 62.7),
        ("belady-global", 4000, 92.7),
    ],
)
def test_hit_rates_published_for_the_engines_trace(engine, name, mebibytes, published):
    found = run_engine(engine, name, mebibytes)
    assert 100 * decode_hit_rate(found) == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(("name", "mebibytes"), [("lru-global", 4000), ("belady-global", 1000)])
def test_the_engines_trace_agrees_with_brute_force(engine, name, mebibytes):
    expected = GLOBAL[name](
        flat(engine.steps), (mebibytes * MIB,), (0,) * 48, engine.shape.bytes_by_layer
    )
    assert run_engine(engine, name, mebibytes) == list(expected)
