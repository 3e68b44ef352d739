"""Timelines, checked against the published format by a schema that knows nothing of moesim."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sim.point import Point, inputs_for
from sim.stretch import simulate_stretch
from tests.trace_event_format import SCHEMA, problems_of, read_strictly
from tracer.trace import Trace

VALIDATIONS = Path(__file__).resolve().parents[1] / "validation" / "h200"
KINDS = ["next-gate", "hobbit", "hybrid-split", "layer-stream"]


@pytest.fixture(scope="module")
def written() -> Any:
    """A timeline's begin: enough to go wrong in every way, and quick to check."""
    trace = timeline("next-gate")
    events = trace["traceEvents"]
    begin = [event for event in events if event["ph"] == "M" or event["ts"] < 10_000]
    assert 20 < len(begin) < 400
    return {**trace, "traceEvents": begin}


def timeline(policy: str) -> Any:
    """Two decode steps on the shipped trace, as the command writes them."""
    point = Point(
        policy=policy,
        hardware="laptop-pcie4x8",
        geometry="olmoe-1b-7b",
        expert_budget="25%",
        max_tokens=60,
    )
    inputs = inputs_for(Trace.open("sample"), point)
    stretch = simulate_stretch(inputs, point, (2, 3))
    return read_strictly(json.dumps(stretch.chrome_trace()))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("policy", KINDS)
def test_simulated_timelines_are_of_the_format(policy: str) -> None:
    trace = timeline(policy)
    assert problems_of(trace) == []
    shown = {event["ph"] for event in trace["traceEvents"]}
    assert {"X", "M"} <= shown
    assert trace["displayTimeUnit"] == "ns"
    # Microseconds: the host is busy or waiting all the time, and a step of decoding takes some ms.
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == 1]
    total_ms = sum(event["dur"] for event in spans) / 1e3
    assert 2 * 10 < total_ms < 2 * 2000


@pytest.mark.parametrize("name", ["locked-gpt-oss", "locked-olmoe", "locked-qwen"])
def test_measured_timelines_are_of_the_format(name: str) -> None:
    trace = read_strictly((VALIDATIONS / name / "timeline.json").read_bytes())
    assert problems_of(trace) == []
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"simulated", "measured", "host", "link"} <= names


def test_every_kind_of_event_in_the_text_is_known() -> None:
    """So that the schema is the format's and not ours."""
    track = {"pid": 1, "tid": 2}
    named = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "p"}},
        {"ph": "M", "name": "process_labels", "pid": 1, "tid": 0, "args": {"labels": "l"}},
        {"ph": "M", "name": "process_sort_index", "pid": 1, "tid": 0, "args": {"sort_index": 3}},
        {"ph": "M", "name": "thread_name", **track, "args": {"name": "t"}},
        {"ph": "M", "name": "thread_sort_index", **track, "args": {"sort_index": -3}},
    ]
    events = [
        {"ph": "X", "name": "span", "cat": "a,b", "ts": 0.5, "dur": 9.5, "tdur": 1, **track},
        {"ph": "B", "name": "outer", "ts": 1, "args": {"x": 1}, **track},
        {"ph": "B", "name": "inner", "ts": 2, **track},
        {"ph": "E", "ts": 3, **track},
        {"ph": "E", "ts": 4, "args": {"y": 2}, **track},
        {"ph": "i", "name": "instant", "ts": 5, "s": "g", **track},
        {"ph": "C", "name": "counter", "ts": 5, "args": {"cats": 0, "dogs": 7.5}, **track},
        {"ph": "b", "cat": "c", "id": 256, "name": "async", "ts": 6, **track},
        {"ph": "n", "cat": "c", "id": 256, "name": "async", "ts": 7, **track},
        {"ph": "e", "cat": "c", "id": 256, "name": "async", "ts": 8, **track},
        {"ph": "s", "cat": "c", "id": "0x1", "name": "flow", "ts": 6, **track},
        {"ph": "t", "cat": "c", "id": "0x1", "name": "flow", "ts": 7, **track},
        {"ph": "f", "bp": "e", "cat": "c", "id": "0x1", "name": "flow", "ts": 8, **track},
        {"ph": "N", "id": "0x2", "name": "object", "ts": 6, **track},
        {"ph": "R", "name": "mark", "cat": "blink.user_timing", "ts": 9, **track},
    ]
    trace = {"traceEvents": [*named, *events], "displayTimeUnit": "ms", "mine": {"any": "thing"}}
    assert problems_of(trace) == []
    for event in events[-5:-2]:  # without one part of it, an arrow leads nowhere, or not at all
        left = [other for other in events if other is not event]
        assert bool(problems_of({"traceEvents": [*named, *left]})) == (event["ph"] != "t")


def _with(**changes: Any) -> Callable[[Any], None]:
    """The first span with other fields."""

    def change(trace: Any) -> None:
        first = next(event for event in trace["traceEvents"] if event["ph"] == "X")
        for name, value in changes.items():
            if value is ...:
                del first[name]
            else:
                first[name] = value

    return change


def _without(name: str) -> Callable[[Any], None]:
    def change(trace: Any) -> None:
        events = trace["traceEvents"]
        events.remove(next(event for event in events if event["name"] == name))

    return change


def _added(**event: Any) -> Callable[[Any], None]:
    full = {"pid": 1, "tid": 1, "ts": 5, "name": "n", **event}
    return lambda trace: trace["traceEvents"].append(full)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda trace: trace.pop("traceEvents"), "'traceEvents' is a required property"),
        (lambda trace: trace.update(displayTimeUnit="us"), "'us' is not one of"),
        (_with(ph="Z"), "'Z' is not one of"),
        (_with(ph=...), "'ph' is a required property"),
        (_with(ts="0"), "'0' is not of type 'number'"),
        (_with(ts=...), "'ts' is a required property"),
        (_with(dur=...), "'dur' is a required property"),
        (_with(dur=-1), "less than the minimum"),
        (_with(dur=125), "overlaps"),
        (_with(pid="1"), "is not of type 'integer'"),
        (_with(tid=...), "'tid' is a required property"),
        (_with(tid=77), "thread 77 of process 1 has no name"),
        (_with(pid=9), "process 9 has no name"),
        (_with(name=...), "'name' is a required property"),
        (_with(args=[1]), "is not of type 'object'"),
        (_without("process_name"), "process 1 has no name"),
        (_without("thread_name"), "thread 1 of process 1 has no name"),
        (_added(ph="M", name="thread_name", args={"name": "again"}), "is given 2 times"),
        (_added(ph="M", name="thread_name", args={}), "'name' is a required property"),
        (_added(ph="M", name="nickname", args={}), "'nickname' is not one of"),
        (_added(ph="B"), "n does not end"),
        (_added(ph="E"), "ends nothing"),
        (_added(ph="b", cat="c", id=1), "does not end"),
        (_added(ph="e", cat="c", id=1), "begins nowhere"),
        (_added(ph="s", cat="c"), "is not valid under any of the given schemas"),
        (_added(ph="s", cat="c", id=1), "does not end"),
        (_added(ph="C", args={"a": "much"}), "'much' is not of type 'number'"),
    ],
)
def test_what_is_wrong_is_found(written: Any, change: Callable[[Any], Any], words: str) -> None:
    trace = copy.deepcopy(written)
    change(trace)
    found = problems_of(trace)
    assert any(words in problem for problem in found), found


def test_numbers_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN is no JSON"):
        read_strictly('{"traceEvents": [{"ts": NaN}]}')
