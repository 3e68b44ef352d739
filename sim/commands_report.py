"""`moesim report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("report")(report_command)


def report_command(
    directory: Annotated[Path, typer.Argument(help="Results of a sweep, or of advise --out.")],
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            "--validation", help="Directory of `moesim validate`, of the same geometry; repeatable."
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option("--trace", help="Where the trace lies, if not under its own name."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file; DIRECTORY/report.html without it.")
    ] = None,
) -> None:
    """Write a sweep or an advice as one HTML file to hand on; it needs no network.

    The question, the recommendation, latency against memory to hover and filter, ranking, where the
    time goes, which experts are popular, predicted against measured, and how to reproduce it.

    Example: moesim report out/demo --validation validation/h200/locked-olmoe
    """
    from sim.report import write_report

    path, notes = write_report(directory, out, validations=validation or (), trace=trace)
    for note in notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    print(path)
