"""Predictions first, then measurements: points interleaved, a canary before and after."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import policies
from configs.timings import ModelTimes
from replay.calibrate.model import measure_link
from replay.play import Session
from replay.point import decisions, predict_point, replay_point, step_ms, timeline_of
from replay.validation.machine import scaled
from replay.validation.plan import Cell
from sim.calibrated import CalibratedTiming
from sim.inputs import Inputs
from sim.point import Point, resolve_point
from sim.spans import Timeline

Say = Callable[[str], None]


@dataclass
class Judged:
    """A cell: what was predicted, and each measurement of it.

    ``difference``: the first decision in which the device's run was another, None if there is none
    or the policy's decisions depend on time. ``simulated``, ``timed``: both runs' timelines.
    """

    cell: Cell
    predicted: dict[str, Any]
    log: list[tuple[object, ...]]
    time_independent: bool
    measured: list[dict[str, Any]] = field(default_factory=list)
    difference: str | None = None
    experts: int = 0
    simulated: Timeline | None = None
    timed: Timeline | None = None


@dataclass(frozen=True)
class Canary:
    """Is the machine still what it was calibrated as? ``resident_ms``: a decode step, all there."""

    resident_ms: float
    link_bytes_per_s: int


def predict(
    session: Session, inputs: Inputs, times: ModelTimes, cells: Sequence[Cell]
) -> list[Judged]:
    """Simulate all cells with the measured times; nothing has been measured of them yet."""
    judged = []
    for cell in cells:
        info = policies.get(cell.point.policy)
        nbytes = session.ready.layout.nbytes
        setting = resolve_point(inputs, cell.point, expert_bytes=nbytes)
        timing = CalibratedTiming(
            setting.geometry,
            setting.hardware,
            times.model_copy(update={"link": scaled(times.link, cell.link_scale)}),
            policy=cell.point.label,
        )
        found = predict_point(inputs, cell.point, timing, expert_bytes=nbytes)
        free = not (info.time_dependent or info.prefetches)
        judged.append(
            Judged(
                cell,
                found.result,
                decisions(found.core),
                free,
                experts=setting.shape.experts,
                simulated=found.timeline,
            )
        )
    return judged


def digest(judged: Sequence[Judged]) -> str:
    """SHA-256 of all predictions."""
    told = [[each.cell.label, each.predicted] for each in judged]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def measure(
    session: Session, inputs: Inputs, judged: Sequence[Judged], repeats: int, say: Say
) -> None:
    """Run every cell ``repeats`` times, in another order each time."""
    order = list(range(len(judged)))
    for repeat in range(repeats):
        random.Random(repeat).shuffle(order)
        for done, index in enumerate(order):
            each = judged[index]
            run = replay_point(session, inputs, each.cell.point, link_scale=each.cell.link_scale)
            if each.time_independent and each.difference is None:
                each.difference = first_difference(each.log, run.log)
            result = {**run.result, "step_ms": step_ms(run.measured.times)}
            each.measured.append(result)
            each.timed = timeline_of(run, "measured")
            tpot = _tpot(result), _tpot(each.predicted)
            say(
                f"round {repeat + 1}, {done + 1} of {len(order)}: {each.cell.label}: measured "
                f"{tpot[0]:.3f} ms a token, predicted {tpot[1]:.3f} ({tpot[1] / tpot[0] - 1:+.1%})"
            )
            del run
            _free()


def _tpot(result: dict[str, Any]) -> float:
    return float(result["itl_ms"]["mean"])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_difference(
    ours: list[tuple[object, ...]], theirs: list[tuple[object, ...]]
) -> str | None:
    """The first event in which two decision logs differ, in words; None: they are equal."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"event {index}: simulated {one}, on the device {other}"
    if len(ours) != len(theirs):
        return f"simulated {len(ours)} events, on the device {len(theirs)}"
    return None


def canary(session: Session, inputs: Inputs, hardware: str, geometry: str | None) -> Canary:
    """A resident run, and copies back to back."""
    point = Point(policy="resident", hardware=hardware, geometry=geometry)
    run = replay_point(session, inputs, point)
    link = measure_link(session).bytes_per_s
    result = Canary(float(run.result["itl_ms"]["mean"]), link)
    del run
    _free()
    return result
