from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from policies.core import DecisionCore
from tests.driver import make_core, policy_data, run_instant, shape_of, table
from tests.traces import make_trace
from tracer.inspect.reuse import reuse_distances
from tracer.inspect.slots import (
    MOST_SLOT_COUNTS,
    POLICIES,
    belady_depths,
    hits_by_slots,
    lookups_by_layer,
    slot_counts,
)
from tracer.trace import Trace
from tracer.workload import PREFILL, Ragged, distinct

EventKeys = list[list[list[int]]]


def steps_of(events: Ragged) -> EventKeys:
    return [events.step(step) for step in range(len(events) // events.layers)]


def measured(
    events: Ragged, prefill: NDArray, num_experts: int, slots: list[int]
) -> dict[tuple[str, int, str], int]:
    lookups = lookups_by_layer(events, num_experts)
    distances = [reuse_distances(ids, step, num_experts) for ids, step in lookups]
    found = hits_by_slots(events, lookups, distances, prefill, num_experts, slots)
    assert found["hit_share"].between(0, 1).all()
    return found.set_index(["policy", "slots", "phase"])["hits"].to_dict()


def core_after(policy: str, steps: EventKeys, num_experts: int, slots: int) -> DecisionCore:
    """The decision core after `steps`, with a log of its events."""
    shape = shape_of(len(steps[0]), num_experts)
    core = make_core(policy, policy_data(shape, steps), slots=slots * shape.layers, log=[])
    run_instant(core, steps)
    return core


def hits_of_core(
    policy: str, events: Ragged, prefill: NDArray, num_experts: int, slots: int
) -> dict[str, int]:
    core = core_after(policy, steps_of(events), num_experts, slots)
    hits = {"decode": 0, "prefill": 0}
    assert core.log is not None
    for kind, step, _, *rest in core.log:
        if kind == "gate":
            hits["prefill" if prefill[step] else "decode"] += len(rest[1])  # type: ignore[arg-type]
    return hits


def events_of(trace: Trace, stop: int | None = None) -> tuple[Ragged, NDArray]:
    """Events of a trace, and which steps are prefill."""
    arrays = trace.load(["step", "phase", "experts"], 0, stop)
    begins = np.diff(arrays["step"], prepend=-1) != 0
    starts = np.flatnonzero(begins)
    num_experts = trace.manifest.geometry.num_experts
    step = np.cumsum(begins) - 1
    events = distinct(arrays["experts"], step, len(starts), num_experts, "last-use")
    return events, np.minimum.reduceat(arrays["phase"], starts) == PREFILL


def assert_equals_core(
    events: Ragged, prefill: NDArray, num_experts: int, slots: list[int]
) -> None:
    found = measured(events, prefill, num_experts, slots)
    for policy in POLICIES:
        for count in slots:
            expected = hits_of_core(policy, events, prefill, num_experts, count)
            for phase, hits in expected.items():
                assert found.get((policy, count, phase), 0) == hits, (policy, count, phase)


# Against the decision core


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.integers(4, 10),
    top_k=st.integers(1, 3),
    batch=st.integers(1, 3),
    prompt=st.integers(0, 6),
)
def test_hits_are_those_of_the_decision_core(
    seed: int, experts: int, top_k: int, batch: int, prompt: int
) -> None:
    """For every number of slots, also where the steps need several waves."""
    with tempfile.TemporaryDirectory() as scratch:
        trace = make_trace(
            Path(scratch) / "t",
            layers=2,
            experts=experts,
            top_k=top_k,
            requests=4,
            prompt=prompt,
            output=8,
            seed=seed,
            batch=batch,
        )
        events, prefill = events_of(trace)
    assert_equals_core(events, prefill, experts, list(range(1, experts + 1)))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.lists(st.integers(0, 6), max_size=5, unique=True), min_size=2, max_size=2),
        min_size=1,
        max_size=25,
    ).filter(lambda steps: any(keys for step in steps for keys in step))
)
def test_any_events(steps: list[list[list[int]]]) -> None:
    """Layers that do not run, steps of any size: one stack where it may be, else each its own."""
    keyed = [[[7 * layer + e for e in keys] for layer, keys in enumerate(step)] for step in steps]
    events = table(keyed, 2)
    prefill = np.zeros(len(steps), bool)
    largest = int(np.diff(events.offsets).max())
    assert_equals_core(events, prefill, 7, list(range(largest, 8)))
    assert_equals_core(events, prefill, 7, list(range(1, 8)))


def test_real_decoding(gpt_oss_trace: Trace) -> None:
    events, prefill = events_of(gpt_oss_trace, 400)
    assert_equals_core(events, prefill, 32, [4, 8, 17, 31])


def test_real_prefill_and_decoding_with_a_layer_that_did_not_run(bigmoe_trace: Trace) -> None:
    events, prefill = events_of(bigmoe_trace)
    assert_equals_core(events, prefill, 128, [6, 32, 100])


def test_the_sample() -> None:
    events, prefill = events_of(Trace.open("sample"), 400)
    assert_equals_core(events, prefill, 64, [8, 16, 40])


# Why there are two ways


@pytest.mark.parametrize("policy", POLICIES)
def test_waves_break_the_inclusion_that_a_stack_needs(policy: str) -> None:
    """One slot ends with an expert that two slots have thrown out, so no stack describes both.

    The last step needs three experts. One slot holds 2: the order is 2, 0, 1, and 1 stays. Two
    slots hold 1 and 2, which go first; 0 comes last and throws out 1: touched before 2, and (for
    Belady) needed after it.
    """
    steps = [[[1, 2]], [[0, 1, 2]], [[2]], [[1]]]
    residents = {}
    for slots in (1, 2):
        shape = shape_of(1, 4)
        data = policy_data(shape, steps)
        core = make_core(policy, data, slots=slots)
        run_instant(core, steps[:2])
        residents[slots] = set(core.memory.residents())
    assert residents == {1: {1}, 2: {0, 2}}
    assert_equals_core(table(steps, 1), np.zeros(4, bool), 4, [1, 2, 3, 4])


def test_belady_depths_by_hand() -> None:
    ids = np.array([0, 1, 2, 0, 1, 0, 2])
    depths = belady_depths(ids, np.arange(7), 3)
    # Two slots: after 0 1, 2 throws out 1 (next at 4, 0 at 3). Then 0 hits, 1 throws out 2 (last
    # of all), 0 hits, 2 misses.
    assert depths.tolist() == [3, 3, 3, 1, 2, 1, 2]


def test_belady_never_hits_less_than_lru_while_a_step_fits(gpt_oss_trace: Trace) -> None:
    events, prefill = events_of(gpt_oss_trace, 3000)
    slots = slot_counts(32, 4)
    found = measured(events, prefill, 32, slots)
    gains = [found["belady", n, "decode"] - found["lru", n, "decode"] for n in slots]
    assert min(gains) == 0
    assert max(gains) > 0.1 * len(events.keys)
    assert found["lru", 32, "decode"] == len(events.keys) - len(np.unique(events.keys))


# What is evaluated


@pytest.mark.parametrize(
    ("experts", "top_k"), [(8, 2), (32, 4), (64, 8), (128, 6), (256, 8), (4, 4)]
)
def test_slot_counts_go_from_k_to_all_and_meet_a_quarter(experts: int, top_k: int) -> None:
    slots = slot_counts(experts, top_k)
    assert slots == sorted(set(slots))
    assert (slots[0], slots[-1]) == (top_k, experts)
    assert len(slots) <= MOST_SLOT_COUNTS + 2
    assert experts // 4 < top_k or experts // 4 in slots


def test_phases_are_counted_apart(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", requests=2, prompt=3, output=4)
    events, prefill = events_of(trace)
    lookups = lookups_by_layer(events, 8)
    distances = [reuse_distances(ids, step, 8) for ids, step in lookups]
    found = hits_by_slots(events, lookups, distances, prefill, 8, [2, 8])
    assert found.groupby("phase")["accesses"].first().sum() == len(events.keys)
    decode = found[(found["phase"] == "decode") & (found["slots"] == 8)]
    assert isinstance(decode, pd.DataFrame)
    assert decode["accesses"].tolist() == [2 * 4 * 3 * 2] * 2
