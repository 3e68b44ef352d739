"""`moesim compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from configs.errors import UserError
from configs.files import prepare_directory
from sim.options import (
    DtypeOption,
    FitShareOption,
    GeometryOption,
    HardwareOption,
    MaxTokensOption,
    SeedOption,
)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("compare")(compare_command)


def compare_command(
    trace: Annotated[str, typer.Argument(help="Trace directory, or sample.")],
    hardware: HardwareOption,
    geometry: GeometryOption = None,
    dtype: DtypeOption = None,
    policies: Annotated[
        str | None,
        typer.Option(
            "--policies",
            help="By commas, parameters by colons: lru,next-gate:depth=2. All without it.",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            help="Expert slots by commas: 12.5%,25%,50% (default), 8/layer, 4GiB.",
        ),
    ] = None,
    links: Annotated[
        str | None,
        typer.Option("--links", help="Link rates by commas, such as 12GB/s,24GB/s,50GB/s."),
    ] = None,
    max_tokens: MaxTokensOption = None,
    fit_share: FitShareOption = None,
    seed: SeedOption = 0,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Keep the points there; a part of this sweep is resumed."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the rankings: FILE.png and FILE.svg.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Compare policies on a trace: one table a budget and link, with what limits each.

    What the trace cannot run is listed with the column that it needs. Exit code 1: some points
    failed beside others of their policy, and stderr says why.

    Example: moesim compare sample --geometry olmoe-1b-7b --hardware rtx4090-pcie4
    --policies lru,slru,next-gate --budgets 25%,50%
    """
    from sim.compare import choices_of, compare, config_of, leave_out, render
    from sim.sweeps import sweep
    from tracer.trace import Trace

    try:
        config = config_of(
            trace,
            hardware=(hardware,),
            geometry=geometry,
            dtype=dtype,
            policies=() if policies is None else choices_of(policies),
            expert_budgets=_listed("--budgets", budgets),
            links=_listed("--links", links),
            max_tokens=max_tokens,
            fit_share=fit_share,
            seed=seed,
        )
    except ValidationError as error:
        raise named_option(error) from None
    opened = Trace.open(trace)
    for note in opened.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    config, left_out = leave_out(config, opened)
    if figure is not None:
        _check_figure(config, figure)
    with PointsBar() as progress:
        frame = sweep(config, out=out, jobs=jobs, trace=opened, progress=progress.tell)
    comparison = compare(frame, left_out)
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
    else:
        print(render(comparison))
    if figure is not None:
        _draw(frame, figure)
    for failure in comparison.failed:
        print(f"moesim: failed: {failure}", file=sys.stderr)
    if comparison.failed:
        raise typer.Exit(1)


def named_option(error: ValidationError) -> UserError:
    """A field that is out of bounds, as its option."""
    first = error.errors()[0]
    option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
    why = first["msg"].lower().removeprefix("value error, ")
    return UserError(f"{option} {first['input']}: {why}")


def _listed(option: str, text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    items = tuple(item.strip() for item in text.split(","))
    if not all(items):
        raise UserError(f"{option} {text!r} has an empty entry: give values by commas")
    return items


def _check_figure(config: Any, figure: Path) -> None:
    """What would keep the figure from being drawn, before anything is computed."""
    from sim.plots_rankings import refuse_rankings

    contested = {point.label for point in config.points() if _is_ranked(point.policy)}
    refuse_rankings(len(contested), max(1, len(config.links)) * len(config.hardware))
    prepare_directory(figure.parent, "--figure")


def _is_ranked(policy: str) -> bool:
    from policies import get

    info = get(policy)
    return info.lossless and not info.oracle and not info.needs_all


def _draw(frame: Any, figure: Path) -> None:
    from sim.plots_rankings import draw_rankings

    stem = figure.stem if figure.suffix in (".png", ".svg") else figure.name
    for path in draw_rankings(frame, figure.parent, stem):
        print(f"moesim: drew {path}", file=sys.stderr)


class PointsBar:
    """A bar on stderr that appears with the first point: before, an error is all there is."""

    def __init__(self) -> None:
        from sim.commands import progress_bar

        self._bar = progress_bar()
        self._task = self._bar.add_task("points", total=None)
        self._shown = False

    def __enter__(self) -> PointsBar:
        return self

    def tell(self, done: int, total: int) -> None:
        if not self._shown:
            self._bar.start()
            self._shown = True
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._bar.stop()
