"""`moesim export`: a trace's expert loads for other tools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tracer.trace import Trace

TraceName = Annotated[str, typer.Argument(help="Trace directory, or sample.")]
PhaseName = Annotated[
    str, typer.Option("--phase", help="Tokens to count: prefill, decode or both.")
]
Domains = Annotated[
    list[str] | None,
    typer.Option("--domain", help="Only requests of this domain; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add `export` and its commands to the app."""
    exporter = typer.Typer(
        help="Write a trace's expert loads for another tool.",
        rich_markup_mode=None,
    )
    exporter.callback(invoke_without_command=True)(_help_without_command)
    exporter.command("eplb")(export_eplb_command)
    exporter.command("sglang-location")(export_sglang_location_command)
    app.add_typer(exporter, name="export")


def _help_without_command(context: typer.Context) -> None:
    """Show the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def export_eplb_command(
    trace: TraceName,
    out: Annotated[Path, typer.Option("--out", help="New file, .json or .npy.")],
    phase: PhaseName = "both",
    domain: Domains = None,
) -> None:
    """Write load counts [MoE layers, experts] for DeepSeek's EPLB.

    Example: moesim export eplb sample --phase decode --out load.json
    """
    from tracer.exporters import export_eplb

    opened = _open(trace)
    _say_exported(out, export_eplb(opened, out, phase, domain or None))


def export_sglang_location_command(
    trace: TraceName,
    out: Annotated[Path, typer.Option("--out", help="New file, .json.")],
    phase: PhaseName = "both",
    domain: Domains = None,
) -> None:
    """Write counts of all decoder layers for SGLang's --init-expert-location.

    Example: moesim export sglang-location sample --domain code --out location.json
    """
    from tracer.exporters import export_sglang_location

    opened = _open(trace)
    _say_exported(out, export_sglang_location(opened, out, phase, domain or None))


def _open(name: str) -> Trace:
    from tracer.trace import Trace

    trace = Trace.open(name)
    for note in trace.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    return trace


def _say_exported(out: Path, counts: NDArray) -> None:
    layers, experts = counts.shape
    print(f"{out}: {counts.sum()} expert uses, {layers} layers x {experts} experts")
