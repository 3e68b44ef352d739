"""`moesim validate`: predictions first, then the device."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import UserError

DIFFERS = 1
"""Exit code where the device decided otherwise than the simulator."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("validate")(validate_command)


def validate_command(
    plan: Annotated[str, typer.Argument(help="Plan in configs/validation, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the report; new or empty.")],
    trace: Annotated[
        str | None, typer.Option("--trace", help="Where the plan's trace lies, if elsewhere.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cuda; auto finds it.")] = "auto",
) -> None:
    """Predict every point of a plan, then measure them, and report the gaps.

    Calibrates on requests and at a budget that are not judged. Exit code 1 where a policy whose
    decisions do not depend on time decided otherwise on the device.

    Example: moesim validate olmoe-dev --out validation/h200/olmoe-dev
    """
    from tracer.extra import require_extra

    require_extra("moesim validate")
    from replay.validation.plan import load_plan

    chosen = load_plan(plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another directory")
    report = _validate(chosen, trace or chosen.trace, out, device)
    differing = [row for row in report["points"] if row["first_difference"]]
    for row in differing:
        print(
            f"moesim: {row['policy']} at {row['budget']}: {row['first_difference']}",
            file=sys.stderr,
        )
    print("\n".join(_short(report)))
    if differing:
        raise typer.Exit(DIFFERS)


def _validate(plan: Any, trace: str, out: Path, device: str) -> dict[str, Any]:
    from configs.files import write_atomically
    from configs.hardware import load_hardware
    from configs.timings import render
    from replay.calibrate.cuda import CudaRig
    from replay.open import DTYPE, command_line, open_model, weights_of
    from replay.play import Session
    from replay.point import replay_point
    from replay.validation.figure import draw_scatter
    from replay.validation.machine import model_times, policy_times
    from replay.validation.plan import cells_of, point_of
    from replay.validation.report import write_report
    from replay.validation.run import canary, digest, measure, predict
    from sim.inputs import Inputs
    from sim.point import Point
    from tracer.trace import Trace

    say = _Clock()
    opened = Trace.open(trace)
    learned = tuple(dict.fromkeys(name for choice in plan.policies for name in choice.learned))
    share = plan.fit_share or 0.0

    def inputs_of(requests: tuple[int, ...]) -> Inputs:
        return Inputs(opened, requests=requests, fit_share=share, learned=learned)

    judged_inputs, own = inputs_of(plan.requests), inputs_of(plan.calibration_requests)
    cells = list(cells_of(plan))
    hardware = load_hardware(plan.hardware)
    with closing(open_model(plan.model, plan.geometry, device)) as ready:
        say(f"{len(cells)} points; the model is loaded")
        contexts = [inputs.workload("last-use").max_context for inputs in (judged_inputs, own)]
        session = Session(ready, max(*contexts, max(plan.prefill_tokens) + 1))
        machine = str(CudaRig().facts())
        resident = Point(policy="resident", hardware=plan.hardware, geometry=plan.geometry)
        replay_point(session, own, resident)  # compiles, allocates, warms up
        geometry = plan.geometry or opened.manifest.geometry.name
        command = command_line()
        times = model_times(
            session, hardware, geometry, DTYPE, plan.prefill_tokens, machine, command
        )
        say("the model's times are measured")
        points = [point_of(plan, choice, plan.calibration_budget) for choice in plan.policies]
        times = times.model_copy(update={"policies": dict(policy_times(session, own, points))})
        say("the policies' host times are measured")
        judged = predict(session, judged_inputs, times, cells)
        sha256 = digest(judged)
        predictions = [{"cell": each.cell.label, "predicted": each.predicted} for each in judged]
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "timings.yaml", render(times).encode())
        write_atomically(
            out / "predictions.json",
            (json.dumps({"sha256": sha256, "predictions": predictions}, indent=1) + "\n").encode(),
        )
        say(f"predictions are written: SHA-256 {sha256}")
        before = canary(session, own, plan.hardware, plan.geometry)
        measure(session, judged_inputs, judged, plan.repeats, say)
        after = canary(session, own, plan.hardware, plan.geometry)
        facts = {
            "machine": machine,
            "weights": weights_of(ready),
            "command": command,
            "predictions_sha256": sha256,
            "trace": judged[0].predicted["trace"],
            "decode_tokens": judged[0].predicted["tokens"]["decode"],
            "produced_by": judged[0].predicted["produced_by"],
        }
        report = write_report(
            out,
            plan.model_dump(mode="json"),
            facts,
            times,
            judged,
            (before, after),
            ready.layout.nbytes,
        )
    draw_scatter(report, out)
    say(f"{out}/report.md")
    return report


class _Clock:
    """Progress on stderr, with the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        took = time.monotonic() - self._began
        print(f"moesim: {took:5.0f} s  {text}", file=sys.stderr, flush=True)


def _short(report: dict[str, Any]) -> list[str]:
    from replay.validation.report import lines

    told = lines(report)
    return told[: told.index("## Ranking")]
