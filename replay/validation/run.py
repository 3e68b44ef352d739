"""Predictions first, then measurements: points interleaved, a canary before and after."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import policies
from configs.timings import ModelTimes
from replay.breakdown import particulars
from replay.calibrate.model import measure_link
from replay.play import Session
from replay.point import Log, decisions, predict_setting, replay_point, timeline_of
from replay.validation.judged import Canary, Figures, digest_of
from replay.validation.machine import scaled
from replay.validation.plan import Cell
from sim.calibrated import CalibratedTiming
from sim.inputs import Inputs
from sim.point import Point, expert_share, resolve_point
from sim.spans import Timeline

Say = Callable[[str], None]
Keep = Callable[["Target", int, Figures, str | None], None]


@dataclass
class Target:
    """A predicted cell that is to be measured. ``experts``: a layer's.

    ``simulated``, ``timed``: both runs' timelines, the last measurement's.
    """

    cell: Cell
    predicted: Figures
    log: Log
    time_independent: bool
    experts: int
    simulated: Timeline
    timed: Timeline | None = None

    @property
    def measured_ms(self) -> float:
        """How long all steps take, as predicted."""
        return float(self.predicted["duration_ms"])


def predict(
    session: Session, inputs: Inputs, times: ModelTimes, cells: Sequence[Cell]
) -> list[Target]:
    """Simulate all cells with the measured times; nothing has been measured of them yet."""
    return [_predict(session, inputs, times, cell) for cell in cells]


def _predict(session: Session, inputs: Inputs, times: ModelTimes, cell: Cell) -> Target:
    info = policies.get(cell.point.policy)
    nbytes = session.ready.layout.nbytes
    setting = resolve_point(inputs, cell.point, expert_bytes=nbytes)
    geometry = setting.geometry
    timing = CalibratedTiming(
        geometry,
        setting.hardware,
        times.model_copy(update={"link": scaled(times.link, cell.link_scale)}),
        policy=cell.point.label,
        expert_share=expert_share(setting.memory, geometry),
        batch=session.rows,
    )
    found = predict_setting(inputs, setting, timing)
    if times.workspace_bytes is not None:
        kv_bytes = geometry.kv_bytes_per_token * session.rows * session.kv_capacity
        planned = found.result["memory"]
        planned.update(engine_memory(planned, kv_bytes, times.workspace_bytes))
    return Target(
        cell,
        found.result,
        decisions(found.core),
        not (info.time_dependent or info.prefetches),
        setting.shape.experts,
        found.timeline,
    )


def engine_memory(planned: Figures, kv_bytes: int, workspace_bytes: int) -> Figures:
    """What of a result's memory is another in the engine than the simulator's estimate.

    ``kv_bytes``: of the session's cache, which its longest request needs. ``workspace_bytes``: as
    it was measured.
    """
    peak = planned["nonexpert_bytes"] + kv_bytes + workspace_bytes + planned["slots_bytes"]
    return {
        "kv_bytes": kv_bytes,
        "workspace_bytes": workspace_bytes,
        "peak_bytes": peak,
        "fits": peak <= planned["gpu_memory_bytes"],
    }


def digest(targets: Sequence[Target]) -> str:
    """SHA-256 of all predictions."""
    return digest_of([(each.cell.label, each.predicted) for each in targets])


def measure(
    session: Session,
    inputs: Inputs,
    targets: Sequence[Target],
    repeats: int,
    keep: Keep,
    say: Say,
) -> None:
    """Run every cell ``repeats`` times, in another order each time; ``keep`` each as it comes."""
    order = list(range(len(targets)))
    for repeat in range(repeats):
        random.Random(repeat).shuffle(order)
        for done, index in enumerate(order):
            each = targets[index]
            run = replay_point(session, inputs, each.cell.point, link_scale=each.cell.link_scale)
            difference = first_difference(each.log, run.log) if each.time_independent else None
            each.timed = timeline_of(run, "measured")
            result = {**run.result, **particulars(each.timed, run.setting.workload)}
            keep(each, repeat, result, difference)
            tpot = _tpot(result), _tpot(each.predicted)
            say(
                f"round {repeat + 1}, {done + 1} of {len(order)}: {each.cell.label}: measured "
                f"{tpot[0]:.3f} ms a token, predicted {tpot[1]:.3f} ({tpot[1] / tpot[0] - 1:+.1%})"
            )
            del run
            free()


def _tpot(result: dict[str, Any]) -> float:
    return float(result["itl_ms"]["mean"])


def free() -> None:
    """Give back what the run before held on the device."""
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
    free()
    return result
