"""`moesim validate`: predictions first, then the device."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import UserError

DIFFERS = 1
"""Exit code where the device decided otherwise than the simulator."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("validate")(validate_command)
    app.command("validation-summary")(summary_command)


def validate_command(
    plan: Annotated[str, typer.Argument(help="Plan in configs/validation, or a YAML file.")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the report: new, empty, or to go on in.")
    ],
    trace: Annotated[
        str | None, typer.Option("--trace", help="Where the plan's trace lies, if elsewhere.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Measure as many points as fit; run again for the rest."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report what is measured; needs no GPU.")
    ] = False,
) -> None:
    """Predict every point of a plan, then measure them on a GPU, and report the gaps.

    Calibrates on requests and at budgets that are not judged. What was measured is kept as it
    comes: the same command goes on where one was cut off, with a calibration and predictions of its
    own. Exit code 1 where a policy whose decisions do not depend on time decided otherwise on the
    device.

    Example: moesim validate olmoe-dev --out validation/h200/olmoe-dev --minutes 9
    """
    from replay.validation.files import alone_in, is_campaign, open_campaign, open_cells
    from replay.validation.plan import load_plan
    from tracer.extra import require_extra

    if not report_only:
        require_extra("moesim validate")

    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: give a number above 0")
    chosen = load_plan(plan)
    # What a new plan lacks is told before there is a directory that holds it.
    begun = report_only or is_campaign(out)
    inputs = None if begun else _inputs(chosen, trace)
    open_campaign(out, chosen)
    with alone_in(out):
        cells = [] if report_only else open_cells(out, chosen)
        if cells:
            budget_s = None if minutes is None else minutes * 60
            _measure(out, chosen, cells, inputs or _inputs(chosen, trace), budget_s)
        report = _report(out, chosen)
    _tell(report, out)
    if any(row["first_difference"] for row in report["points"]):
        raise typer.Exit(DIFFERS)


def _inputs(plan: Any, trace: str | None) -> Any:
    from replay.validation.campaign import PlanInputs
    from tracer.trace import Trace

    return PlanInputs(plan, Trace.open(trace or plan.trace))


def _measure(out: Path, plan: Any, cells: Any, inputs: Any, budget_s: float | None) -> None:
    from configs.files import write_atomically
    from replay.open import open_model
    from replay.validation.campaign import Clock, run_campaign, timelines
    from replay.validation.files import as_json

    say = Clock(_say, budget_s)
    with closing(open_model(plan.model, plan.geometry, "cuda")) as ready:
        target = run_campaign(out, plan, cells, inputs, ready, say)
    if target is not None:
        for name, trace in timelines(target, inputs.judged.workload("last-use")).items():
            write_atomically(out / name, as_json(trace))


def _report(out: Path, plan: Any) -> dict[str, Any]:
    from replay.validation.figure import draw_scatter
    from replay.validation.files import read_campaign
    from replay.validation.report import write_report

    judged = read_campaign(out, plan)
    if not judged:
        raise UserError(f"{out}: no point has been measured {plan.repeats} times yet: run it again")
    report = write_report(out, plan, judged)
    for drawn in out.glob("scatter.*"):
        drawn.unlink()  # of the points before
    draw_scatter([report], out)
    return report


def _tell(report: dict[str, Any], out: Path) -> None:
    from replay.validation.summary import summary_lines

    for row in report["points"]:
        if row["first_difference"]:
            _say(f"{row['policy']} at {row['budget']}: {row['first_difference']}")
    print("\n".join(summary_lines(report["summary"])))
    left = report["cells"] - len(report["points"])
    if left:
        _say(f"{left} of {report['cells']} points are not measured yet: run the command again")
    _say(f"{out}/report.md")


def _say(text: str) -> None:
    print(f"moesim: {text}", file=sys.stderr, flush=True)


def summary_command(
    reports: Annotated[list[Path], typer.Argument(help="Directories of `moesim validate`.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to; new or empty.")],
) -> None:
    """Read several validations as one: the targets, the components and a picture of all points.

    Example: moesim validation-summary validation/h200/olmoe validation/h200/qwen --out all
    """
    from configs.files import refuse_non_empty
    from replay.validation.together import write_together

    refuse_non_empty(out)
    for line in write_together(reports, out):
        print(line)
