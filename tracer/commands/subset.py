"""`moesim subset`: a smaller trace from a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError
from tracer.commands.imports import say_imported

_LONGEST_RANGE = 1_000_000


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("subset")(subset_command)


def subset_command(
    trace: Annotated[str, typer.Argument(help="Trace directory, or sample.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")],
    requests: Annotated[
        str | None, typer.Option("--requests", help="Requests to keep: 0-9,12; all without it.")
    ] = None,
    drop: Annotated[
        str | None, typer.Option("--drop", help="Columns to leave out, by commas; timings too.")
    ] = None,
    hidden: Annotated[
        float, typer.Option("--hidden", help="Share of the rows that keep their gate inputs.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which rows those are.")] = 0,
) -> None:
    """Keep some requests, fewer columns, or the gate inputs of a share of the rows.

    Example: moesim subset traces/large --requests 0-9 --hidden 0.1 --out traces/small
    """
    from tracer.subset import Choice, subset
    from tracer.trace import Trace

    dropped = [] if drop is None else [name.strip() for name in drop.split(",")]
    if not all(dropped):
        raise UserError(f"--drop {drop!r} has an empty entry: give columns by commas")
    choice = Choice(
        requests=None if requests is None else _parse_requests(requests),
        drop=tuple(name for name in dropped if name != "timings"),
        timings="timings" not in dropped,
        hidden_share=hidden,
        seed=seed,
    )
    subset(Trace.open(trace), out, choice)
    say_imported(out)


def _parse_requests(text: str) -> tuple[int, ...]:
    """Numbers and ranges, such as ``0-9,12``."""
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise UserError(f"--requests {text!r}: give numbers and ranges, such as 0-9,12")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not 0 < len(numbers) <= _LONGEST_RANGE:
            raise UserError(
                f"--requests {text!r}: {part.strip()} is a range of {len(numbers)} requests; give"
                " such as 0-9"
            )
        chosen |= dict.fromkeys(numbers)
    return tuple(chosen)
