"""`moesim inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect_command)


def inspect_command(
    trace: Annotated[str, typer.Argument(help="Trace directory, or sample.")],
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Draw a summary to this file: .png, .svg or .pdf."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", help="Draw a PNG and an SVG a topic to this new directory."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Show what a trace says about caching: skew, domains, overlap, reuse, hit rates, predictions.

    Example: moesim inspect sample --figures out/inspect
    """
    from rich.console import Console

    from tracer.inspect import as_json as tables_as_json
    from tracer.inspect import inspect_trace, render, subject
    from tracer.trace import Trace

    opened = Trace.open(trace)
    for note in opened.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    _check_outputs(figure, figures)
    with Console(stderr=True).status(f"measuring {opened.rows:,} tokens"):
        summary = inspect_trace(opened)
    if as_json:
        print(json.dumps(tables_as_json(opened, summary), allow_nan=False))
    else:
        render(Console(), summary)
    _draw(summary, subject(opened), figure, figures, sys.stderr if as_json else sys.stdout)


def _check_outputs(figure: Path | None, figures: Path | None) -> None:
    """Before anything is measured: what is in the way is known now."""
    from configs.files import prepare_figure, refuse_non_empty

    if figures is not None:
        refuse_non_empty(figures)
    if figure is not None:
        prepare_figure(figure)


def _draw(
    summary: Any, subject: str, figure: Path | None, figures: Path | None, out: TextIO
) -> None:
    if figure is None and figures is None:
        return
    from tracer.inspect.figures import draw_summary, draw_topics, missing_topics

    if figure is not None:
        draw_summary(summary, subject, figure)
        print(f"figure: {figure}", file=out)
    if figures is None:
        return
    for path in draw_topics(summary, subject, figures):
        print(f"figure: {path}", file=out)
    for topic, why in missing_topics(summary).items():
        print(f"moesim: note: no figure of {topic}: {why}", file=sys.stderr)
