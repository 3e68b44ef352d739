"""How far a campaign's predictions are off at the speed that the host had in each run.

    python -m tests.bench.host_speed PLAN validation/h200/PLAN

Each measured run has what a fixed loop of Python took beside it. Here every point is simulated
again for each of its runs, with the calibration's host times stretched by that loop, all else as it
was. What is left of the error is not the host's speed. This is no prediction: nobody knows the
speed before. The plan's trace has to be there (docs/validation.md says how it is made).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.hardware import load_hardware
from configs.timings import ModelTimes
from replay.point import predict_setting
from replay.validation.campaign import PlanInputs
from replay.validation.errors import stall_ms
from replay.validation.files import read_campaign
from replay.validation.judged import Judged
from replay.validation.machine import scaled
from replay.validation.plan import ValidationPlan, load_plan
from sim.calibrated import CalibratedTiming
from sim.point import expert_share, resolve_point
from tracer.trace import Trace


@dataclass(frozen=True)
class Errors:
    """Of one point, as fractions of what was measured: as predicted, and at the runs' speed."""

    label: str
    prefetches: bool
    tpot: tuple[float, float]
    stall: tuple[float, float]


def main(plan: str, campaign: Path) -> None:
    """Errors of all points, and by group the median and the worst."""
    try:
        found = errors_of(load_plan(plan), campaign)
    except UserError as error:
        sys.exit(str(error))
    table = Table("point", "TPOT", "at the runs' speed", "stall", "at the runs' speed")
    for each in found:
        table.add_row(each.label, *(f"{error:+.1%}" for error in (*each.tpot, *each.stall)))
    console = Console(width=100)
    console.print(table)
    for name, chosen in (("demand-only", False), ("prefetching", True)):
        group = [each for each in found if each.prefetches == chosen]
        for what in ("tpot", "stall"):
            for index, when in enumerate(("as predicted", "at the runs' speed")):
                sizes = sorted(abs(getattr(each, what)[index]) for each in group)
                if sizes:
                    console.print(
                        f"{name}, {what}, {when}: median {median(sizes):.1%}, worst {sizes[-1]:.1%}"
                    )


def errors_of(plan: ValidationPlan, campaign: Path) -> list[Errors]:
    """In the order of the plan."""
    inputs = PlanInputs(plan, Trace.open(plan.trace))
    return [_errors(plan, inputs, judged) for judged in read_campaign(campaign, plan)]


def _errors(plan: ValidationPlan, inputs: PlanInputs, judged: Judged) -> Errors:
    again = [_at_speed(plan, inputs, judged, run["host_loop_ns"]) for run in judged.measured]

    def of(figure: Any) -> tuple[float, float]:
        measured = [figure(run) for run in judged.measured]
        at_speed = [
            one / other - 1 for one, other in zip(map(figure, again), measured, strict=True)
        ]
        return figure(judged.predicted) / median(measured) - 1, median(at_speed)

    return Errors(
        label=judged.cell.label,
        prefetches=not judged.time_independent,
        tpot=of(lambda result: result["itl_ms"]["mean"]),
        stall=of(stall_ms),
    )


def _at_speed(
    plan: ValidationPlan, inputs: PlanInputs, judged: Judged, loop_ns: float
) -> dict[str, Any]:
    """The simulation's result with host times as where the loop took so long."""
    times: ModelTimes = judged.run.times
    assert times.host_loop_ns is not None
    cell = judged.cell
    link = scaled(times.link, cell.link_scale)
    times = times.on_host(loop_ns / times.host_loop_ns, round(loop_ns))
    times = times.model_copy(update={"link": link})
    setting = resolve_point(inputs.judged, cell.point, expert_bytes=judged.run.expert_bytes)
    timing = CalibratedTiming(
        setting.geometry,
        load_hardware(plan.hardware),
        times,
        policy=cell.point.label,
        expert_share=expert_share(setting.memory, setting.geometry),
        batch=setting.workload.max_batch,
    )
    return predict_setting(inputs.judged, setting, timing).result


if __name__ == "__main__":
    typer.run(main)
