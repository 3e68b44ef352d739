"""Timelines: the recorded model takes the same time, and its spans add up to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from sim.machine import Machine
from sim.spans import (
    COPY,
    CPU,
    DECIDE,
    EXPERTS,
    GPU,
    SEGMENT,
    ChunkSpan,
    Kernel,
    Timeline,
    chrome_trace,
)
from sim.timing import HostCosts, LinkCosts
from sim.traced import TracedMachine
from tests.cases import Case, OddTiming, make_columns, make_core, make_shape
from tracer.workload import Workload

CASES = {
    "lru": Case(slots=3, steps=16),
    "waves": Case(slots=2, top_k=3, prompt=9, steps=12),
    "prefetch": Case(policy="next-gate", slots=4, layers=4, params={"chunks": 3}, steps=16),
    "in-order": Case(params={"order": "id"}, top_k=3, slots=4),
    "cpu": Case(policy="fiddler", top_k=3, slots=4, steps=16),
    "batch": Case(batch=3, slots=4, prompt=5),
}
TIMING = OddTiming(
    HostCosts(
        9,
        8,
        5,
        13,
        10,
        41,
        launch_each_ns=2,
        awaited_ns=3,
        landing_ns=4,
        cpu_start_ns=5,
        next_wave_ns=7,
    ),
    LinkCosts(10**9, startup_ns=3, gap_ns=1),
    experts_slowdown_ppm=300_000,
    predictor_ns={"next_gate": 31},
)


def run(case: Case, kind: Any) -> Any:
    workload = Workload(make_columns(case), case.experts)
    core = make_core(case, workload, make_shape(case))
    machine = kind(workload, core, TIMING, window=case.window)
    machine.run()
    return machine


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_recorded_model_takes_the_same_time_and_its_spans_add_up(case: Case) -> None:
    plain, traced = run(case, Machine), run(case, TracedMachine)
    assert traced.times == plain.times
    assert traced.core.tally == plain.core.tally
    assert traced.link.busy_ns == plain.link.busy_ns
    timeline = traced.timeline("simulated")
    ends = [end for end, *_ in timeline.marks]
    assert ends == sorted(set(ends))
    assert ends[-1] == traced.times.end[-1]
    assert {kind for _, kind, *_ in timeline.marks} >= {SEGMENT, GPU, DECIDE, EXPERTS}
    for one, other in pairwise(timeline.kernels):
        assert one.end <= other.begin
    assert (CPU in {kind for _, kind, *_ in timeline.marks}) == (case.policy == "fiddler")
    busy = sum(kernel.end - kernel.begin for kernel in timeline.kernels)
    assert busy == sum(traced.times.segments) + sum(traced.times.experts)
    for chunk, following in pairwise(timeline.chunks):
        assert chunk.end <= following.begin
    landed = sum(chunk.end - chunk.begin for chunk in timeline.chunks)
    assert landed <= traced.link.busy_ns
    assert len(timeline.chunks) <= traced.core.tally.chunks


def test_a_chrome_trace_names_what_was_copied_and_why() -> None:
    marks = [(100, 0, -1, 0), (140, SEGMENT, 0, 0), (190, COPY, 0, 0), (250, EXPERTS, 1, 2)]
    chunks = [ChunkSpan(13, "next_gate", False, 150, 180), ChunkSpan(3, "demand", True, 300, 310)]
    timeline = Timeline("simulated", marks, chunks, [Kernel(0, 120, 160)], [100, 200], [200, 260])
    told = chrome_trace([timeline], experts=10, first=0, last=0)
    events = told["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [
        "simulated",
        "host",
        "GPU",
        "link",
        "CPU",
    ]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["tid"], event["name"], event["ts"], event["dur"]) for event in spans] == [
        (1, "segment launch", 0.0, 0.04),
        (1, "wait for copy", 0.04, 0.05),
        (1, "experts launch", 0.09, 0.06),
        (2, "segment", 0.02, 0.04),
        (3, "1/3 next_gate", 0.05, 0.03),
    ]
    assert spans[-1]["args"] == {"layer": 1, "expert": 3, "why": "next_gate"}
