"""Requests put together: each whole, once and in order, on so many lines."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import policies
from configs.errors import UserError
from sim.batches import compose, recorded_in_batches
from sim.inputs import Inputs
from sim.point import Point, inputs_for, run_point
from sim.selection import prepare, systems
from sim.sweeps import SweepConfig, sweep
from tests.traces import ALL_COLUMNS, make_trace
from tracer.trace import Trace
from tracer.workload import DECODE, PREFILL

Recorded = list[tuple[int, list[int]]]
"""A request's steps: phase and rows."""


def columns_of(
    requests: dict[int, list[tuple[int, int]]], turns: list[int] | None = None
) -> dict[str, NDArray[Any]]:
    """Columns of requests, each a list of steps of (phase, rows); ``turns``: whose step is next.

    One request after the other without ``turns``.
    """
    rows: list[tuple[int, int, int]] = []
    left = {name: deque(steps) for name, steps in requests.items()}
    if turns is None:
        turns = [name for name, steps in requests.items() for _ in steps]
    for step, name in enumerate(turns):
        phase, size = left[name].popleft()
        rows += [(name, step, phase)] * size
    request, steps_, phases = np.array(rows).T
    return {"request": request, "step": steps_, "phase": phases}


def plainly(columns: dict[str, NDArray[Any]], requests: list[int], batch: int) -> list[list[int]]:
    """The rows of every composed step, by the rule as docs/contract.md words it, step by step."""
    recorded: dict[int, Recorded] = {}
    for row, (name, step) in enumerate(zip(columns["request"], columns["step"], strict=True)):
        if name not in requests:
            continue
        own = recorded.setdefault(int(name), [])
        if row and columns["step"][row - 1] == step:
            own[-1][1].append(row)
        else:
            own.append((int(columns["phase"][row]), [row]))
    waiting = deque(recorded.values())
    lines: list[deque[tuple[int, list[int]]]] = [deque() for _ in range(batch)]
    done: list[list[int]] = []
    while True:
        for line in lines:
            while True:
                while line and line[0][0] == PREFILL:
                    done.append(line.popleft()[1])
                if line or not waiting:
                    break
                line.extend(waiting.popleft())
        if not any(lines):
            return done
        done.append([row for line in lines if line for row in line.popleft()[1]])


def by_step(columns: dict[str, NDArray[Any]], requests: list[int], batch: int) -> list[list[int]]:
    made = compose(columns, requests, batch)
    assert (np.diff(made.steps) >= 0).all()
    return [made.rows[made.steps == step].tolist() for step in range(int(made.steps[-1]) + 1)]


def test_three_requests_on_two_lines() -> None:
    P, D = PREFILL, DECODE
    columns = columns_of({7: [(P, 2), (D, 1), (D, 1)], 3: [(D, 1)], 9: [(P, 1), (D, 1), (D, 1)]})
    # Rows: 7 has 0 1 | 2 | 3, 3 has 4, 9 has 5 | 6 | 7.
    assert by_step(columns, [7, 3, 9], 2) == [
        [0, 1],  # the prefill of 7; 3 has none
        [2, 4],  # 7 and 3 decode; 3 ends, and 9 takes its line
        [5],  # the prefill of 9, while 7 waits
        [3, 6],  # 7 ends
        [7],
    ]
    assert by_step(columns, [7, 9], 1) == [[0, 1], [2], [3], [5], [6], [7]]


@st.composite
def recordings(draw: st.DrawFn) -> tuple[dict[str, NDArray[Any]], list[int], int]:
    """Up to six requests with prefills in pieces, none, or nothing else; some are left out."""
    steps = st.lists(st.tuples(st.just(DECODE), st.integers(1, 2)), max_size=6)
    prefills = st.lists(st.tuples(st.just(PREFILL), st.integers(1, 4)), max_size=3)
    count = draw(st.integers(1, 6))
    names = draw(st.permutations(range(10, 10 + count)))
    requests = {}
    for name in names:
        own = [*draw(prefills), *draw(steps)]
        if draw(st.booleans()):  # prefilled anew in the middle, as after a preemption
            own += [*draw(prefills), *draw(steps)]
        requests[name] = own or [(DECODE, 1)]
    kept = [name for name in names if draw(st.booleans())] or [names[0]]
    turns = [name for name, own in requests.items() for _ in own]
    if draw(st.booleans()):  # served in turns, one request a step
        turns = draw(st.permutations(turns))
    return columns_of(requests, turns), kept, draw(st.integers(1, len(kept)))


@settings(max_examples=200, deadline=None)
@given(recordings())
def test_composition_is_the_plain_one_and_keeps_its_laws(
    recording: tuple[dict[str, NDArray[Any]], list[int], int],
) -> None:
    columns, kept, batch = recording
    steps = by_step(columns, kept, batch)
    assert steps == plainly(columns, kept, batch)
    rows = [row for step in steps for row in step]
    assert sorted(rows) == np.flatnonzero(np.isin(columns["request"], kept)).tolist()
    left = {name: int((columns["request"] == name).sum()) for name in kept}
    for name in kept:
        own = [row for row in rows if columns["request"][row] == name]
        assert own == sorted(own)
    begun: set[int] = set()
    for step in steps:
        members = {int(columns["request"][row]) for row in step}
        prefills = columns["phase"][step] == PREFILL
        assert len(members) <= (1 if prefills.any() else batch)
        assert prefills.all() or not prefills.any()
        begun |= members
        for row in step:
            left[int(columns["request"][row])] -= 1
        if not prefills.any() and len(members) < batch:  # a line is idle: nobody waits
            assert begun == set(kept)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("batches") / "trace"
    return make_trace(path, requests=7, output=9, columns=ALL_COLUMNS, seed=4)


def test_one_line_is_the_trace_as_recorded(trace: Trace) -> None:
    columns = trace.load(["request", "step", "phase"])
    made = compose(columns, list(range(7)), 1)
    assert (made.rows == np.arange(trace.rows)).all()
    assert (made.steps == columns["step"]).all()


def test_events_are_the_unions_of_the_rows(trace: Trace) -> None:
    work = Inputs(trace, batch=3).workload("id")
    experts = trace.load(["experts"])["experts"]
    steps = plainly(trace.load(["request", "step", "phase"]), list(range(7)), 3)
    assert work.num_steps == len(steps)
    assert work.max_batch == 3
    for step, rows in enumerate(steps):
        for layer, keys in enumerate(work.events.step(step)):
            needed = {int(expert) for row in rows for expert in experts[row, layer] if expert >= 0}
            assert keys == [layer * 8 + expert for expert in sorted(needed)]


def test_optional_columns_are_permuted_alike(trace: Trace) -> None:
    inputs = Inputs(trace, batch=3)
    made = compose(trace.load(["request", "step", "phase"]), inputs.judged, 3)
    for name in ("weights", "lookahead_1", "embedding"):
        inputs.ensure(name)
        wanted = trace.load([name])[name][made.rows]
        np.testing.assert_array_equal(inputs.workload().column(name), wanted)


def test_fitted_requests_run_together_too_and_stay_apart(trace: Trace) -> None:
    inputs = Inputs(trace, batch=3, fit_share=0.3)
    fit = inputs.fit()
    assert fit is not None
    assert len(inputs.fitted_on) == 2
    assert fit.workload.max_batch == 2  # as many as there are
    assert inputs.workload().max_batch == 3
    assert not set(fit.request_of_row.tolist()) & set(inputs.workload().request_of_row.tolist())


BOUND: dict[str, Any] = {"hardware": "rtx4090-pcie4", "expert_budget": "4/layer"}


def decode_hits(trace: Trace, policy: str, batch: int) -> int:
    point = Point(policy=policy, batch=batch, fit_share=0.3, params={"staging_slots": 2}, **BOUND)
    result = run_point(inputs_for(trace, point), point)
    hits = [result[phase] for phase in ("decode", "prefill")]
    assert all(each["accesses"] == each["hits"] + each["late"] + each["misses"] for each in hits)
    return sum(int(each["hits"]) for each in hits)


def test_oracles_stay_bounds(trace: Trace) -> None:
    bound = decode_hits(trace, "belady-bypass", 2)
    assert bound > 0
    for policy in ("lru", "slru", "lfu", "static", "lfu-decay", "belady"):
        assert decode_hits(trace, policy, 2) <= bound, policy


def test_distinct_experts_and_waves_grow_with_the_batch(trace: Trace) -> None:
    work = {batch: Inputs(trace, batch=batch).workload() for batch in (1, 3, 6)}
    an_event = [w.num_accesses / w.num_steps for w in work.values()]
    assert an_event == sorted(an_event)
    assert len({w.num_tokens for w in work.values()}) == 1
    waves = []
    for batch in (1, 6):
        point = Point(policy="lru", batch=batch, **BOUND)
        decode = run_point(inputs_for(trace, point), point)["decode"]
        waves.append(decode["waves"] / decode["events"])
    assert waves[0] == 1 < waves[1]


@pytest.mark.parametrize("policy", policies.names())
def test_every_policy_runs_on_composed_batches(trace: Trace, policy: str) -> None:
    budget = {} if policies.get(policy).needs_all else {"expert_budget": "6/layer"}
    params = {"prefetch": False} if policy == "promoe" else {}  # no predictor was trained
    point = Point(policy=policy, params=params, hardware="rtx4090-pcie4", batch=3, **budget)
    result = run_point(inputs_for(trace, point), point)
    assert result["point"]["batch"] == 3
    assert any("3 requests run together" in note for note in result["notes"])
    tokens = result["tokens"]
    assert result["requests"] * 9 == tokens["decode"]


def test_context_is_reserved_and_attended_to(trace: Trace) -> None:
    short = Point(policy="lru", **BOUND)
    long = Point(policy="lru", context=2**28, batch=2, **BOUND)
    few, many = (run_point(inputs_for(trace, point), point) for point in (short, long))
    kv = trace.manifest.geometry.kv_bytes_per_token
    assert few["memory"]["kv_bytes"] == kv * 14
    assert many["memory"]["kv_bytes"] == kv * 2**28 * 2
    assert many["breakdown_ms"]["segments"] > few["breakdown_ms"]["segments"]


def test_who_only_prefills_has_a_kv_cache_too(trace: Trace) -> None:
    rows = 2 * 14 + 5  # the third request is cut off before it decodes
    work = Inputs(trace, max_tokens=rows, batch=3).workload()
    assert max(len(step.requests) for step in work.steps()) == 2
    assert (work.max_batch, work.kv_capacity) == (3, 3 * 14)


def test_a_longer_context_leaves_less_for_experts(trace: Trace) -> None:
    slots = []
    for context in (14, 40, 60):
        point = Point(policy="lru", hardware="rtx4090-pcie4", budget="16KiB", context=context)
        result = run_point(inputs_for(trace, point), point)
        slots.append(result["memory"]["slots"])
        assert result["memory"]["peak_bytes"] <= 16 * 1024
    assert slots[0] > slots[1] > slots[2]


def test_what_cannot_be_put_together_is_one_line(trace: Trace, tmp_path: Path) -> None:
    batched = make_trace(tmp_path / "batched", requests=4, batch=2)
    assert recorded_in_batches(batched.load(["request", "step"]))
    with pytest.raises(UserError, match="--batch 2: the trace was recorded in batches"):
        Inputs(batched, batch=2)
    assert Inputs(batched, batch=1, context=500).workload().kv_capacity == 1000
    with pytest.raises(UserError, match="--batch 8: the rows read have 7 requests to judge"):
        Inputs(trace, batch=8)
    with pytest.raises(UserError, match=r"--batch 6: .* 5 requests to judge"):
        Inputs(trace, batch=6, fit_share=0.3)
    with pytest.raises(UserError, match="--context 13: request 0 of the trace has 14 tokens"):
        Inputs(trace, context=13)


def test_batch_and_context_are_parts_of_a_systems_name(trace: Trace) -> None:
    fields: dict[str, Any] = {"hardware": ["rtx4090-pcie4"], "expert_budgets": ["50%"]}
    frames = [
        sweep(SweepConfig(trace="t", policies=["lru"], **fields, **more), trace=trace)
        for more in ({}, {"batch": 2}, {"batch": 2, "context": 64})
    ]
    assert frames[0]["point_id"].nunique() == 1
    points = prepare(pd.concat(frames, ignore_index=True))
    assert systems(points) == [
        "rtx4090-pcie4, 23.5 GB/s, batch 1, context default",
        "rtx4090-pcie4, 23.5 GB/s, batch 2, context 64",
        "rtx4090-pcie4, 23.5 GB/s, batch 2, context default",
    ]


def test_same_rows_for_any_number_of_jobs(trace: Trace) -> None:
    config = SweepConfig(
        trace="t",
        policies=["lru", "next-gate", "static"],
        hardware=["rtx4090-pcie4"],
        expert_budgets=["50%"],
        batch=2,
        context=64,
    )
    one, two = (sweep(config, trace=trace, jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two)
