"""Predictions worked out for many steps at once: as those made one by one, and as blind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import policies
import sim.point
from sim.inputs import Inputs
from sim.point import DEFAULT_FIT_SHARE, Point, run_point
from tracer.trace import Trace

TOKENS = 480
POLICIES = [name for name in policies.names() if policies.get(name).in_blocks]


def _run(name: str, inputs: Inputs) -> dict[str, Any]:
    point = Point(
        policy=name,
        hardware="rtx4090-pcie4",
        geometry="olmoe-1b-7b",
        expert_budget="25%",
        max_tokens=TOKENS,
    )
    return run_point(inputs, point)


def _inputs() -> Inputs:
    return Inputs(Trace.open("sample"), fit_share=DEFAULT_FIT_SHARE, max_tokens=TOKENS)


def test_there_are_such_policies() -> None:
    assert {"edgemoe", "finemoe", "moe-infinity"} <= set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_in_blocks_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live runs have no recording: they predict step by step."""
    in_blocks = _run(name, _inputs())
    monkeypatch.setattr(Inputs, "recording", lambda self, touch_order: None)
    one_by_one = _run(name, _inputs())
    assert json.dumps(in_blocks, default=str) == json.dumps(one_by_one, default=str)


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_know_nothing_of_later_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other routing from some step on, all decisions before it stay as they are."""
    first = _decisions(name, None, monkeypatch)
    changed_from = 90
    second = _decisions(name, changed_from, monkeypatch)

    def before(log: list[Any]) -> list[Any]:
        return [entry for entry in log if entry[1] < changed_from]

    assert before(first) == before(second)
    assert first != second


def _decisions(name: str, changed_from: int | None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The core's log, with the judged experts of later steps rotated by one."""
    inputs = _inputs()
    if changed_from is not None:
        later = np.flatnonzero(inputs.workload().step_of_row >= changed_from)
        judged = np.flatnonzero(np.isin(inputs._columns["request"], inputs.judged))
        columns = inputs._columns
        for column in ("experts", "gate_probs", "embedding"):
            inputs.ensure(column)
        rows = judged[later]
        columns["experts"] = columns["experts"].copy()
        columns["experts"][rows] = (columns["experts"][rows] + 1) % inputs.num_experts
        for column in ("gate_probs", "embedding"):
            columns[column] = columns[column].copy()
            columns[column][rows] = np.roll(columns[column][rows], 1, axis=-1)
        inputs._workloads.clear()
    log: list[Any] = []
    core = sim.point.DecisionCore

    def logged(*args: Any, **named: Any) -> Any:
        return core(*args, **{**named, "log": log})

    with monkeypatch.context() as patched:
        patched.setattr(sim.point, "DecisionCore", logged)
        _run(name, inputs)
    return log
