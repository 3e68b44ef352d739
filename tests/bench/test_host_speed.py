"""A campaign whose host was slower than calibrated: at the runs' own speed nothing is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from configs.timings import ModelTimes, load_timings
from replay.validation.campaign import PlanInputs
from replay.validation.judged import Canary, Judged, Run
from replay.validation.plan import ValidationPlan, cells_of
from tests.bench import host_speed
from tracer.trace import Trace

TIMINGS = Path(__file__).parents[2] / "validation" / "h200" / "fifth-olmoe" / "run-1"


@pytest.fixture(scope="module")
def plan() -> ValidationPlan:
    given: dict[str, Any] = {
        "name": "a point of the sample",
        "geometry": "olmoe-1b-7b",
        "trace": "sample",
        "hardware": "h200-pcie5",
        "requests": (0,),
        "calibration_requests": (1,),
        "policies": ["lru"],
        "budgets": ("25%",),
        "link_scales": (2.2,),
    }
    return ValidationPlan(**given)


@pytest.fixture(scope="module")
def inputs(plan: ValidationPlan) -> PlanInputs:
    return PlanInputs(plan, Trace.open(plan.trace))


def test_what_the_hosts_speed_made_is_taken_away(plan: ValidationPlan, inputs: PlanInputs) -> None:
    times: ModelTimes = load_timings(TIMINGS / "timings.yaml")
    assert times.host_loop_ns is not None
    before = Canary(resident_ms=4.0, link_bytes_per_s=times.link.bytes_per_s)
    run = Run(1, {}, times, before, None, expert_bytes=12_582_912)
    (cell,) = cells_of(plan)
    judged = Judged(cell, run, {}, time_independent=True)
    predicted, slower = (
        host_speed._at_speed(plan, inputs, judged, times.host_loop_ns * factor)
        for factor in (1, 1.5)
    )
    judged.predicted = predicted
    judged.measured = [slower | {"host_loop_ns": times.host_loop_ns * 1.5}]
    found = host_speed._errors(plan, inputs, judged)
    assert found.tpot[0] < -0.01
    assert found.stall[0] != 0.0
    assert (found.tpot[1], found.stall[1]) == (0.0, 0.0)
    assert found.label == cell.label
    assert not found.prefetches
