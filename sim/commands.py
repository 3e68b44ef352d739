"""`moesim policies`, `simulate`, `timeline`, `sweep`, `plot`, `report` and `compare`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from configs.errors import UserError
from configs.units import format_bytes
from sim import commands_compare, commands_report, commands_timeline
from sim.options import (
    BatchOption,
    BudgetOption,
    ContextOption,
    DtypeOption,
    ExpertBudgetOption,
    FitShareOption,
    GeometryOption,
    HardwareOption,
    LinkOption,
    MaxTokensOption,
    PolicyOption,
    SeedOption,
    SettingsOption,
    TimingsOption,
    TouchOrderOption,
    TraceOption,
    WindowOption,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("policies")(policies_command)
    app.command("simulate")(simulate_command)
    commands_timeline.register(app)
    app.command("sweep")(sweep_command)
    app.command("plot")(plot_command)
    commands_report.register(app)
    commands_compare.register(app)


def tell_notes(trace: Any) -> None:
    """What a trace's readers should know, on stderr."""
    for note in trace.notes:
        print(f"moesim: note: {note}", file=sys.stderr)


def policies_command() -> None:
    """List the policies: capabilities, parameters, source.

    Example: moesim policies
    """
    import policies

    for name in policies.names():
        info = policies.get(name)
        print(f"{name:16} {info.summary} [{info.flags}] ({info.source})")
        for parameter, traits in info.params.items():
            print(f"{'':16}   {parameter}={traits.default}  {traits.help}")
        for option, value in info.defaults.items():
            print(f"{'':16}   {option}={value}  its own default of this option")
    from policies.registry import COMMON

    print("\nOptions of any policy (--set):")
    for parameter, traits in COMMON.items():
        print(f"{'':16}   {parameter}={traits.default}  {traits.help}")


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Of repeated --set key=value."""
    parsed: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--set {setting!r} is not key=value, such as --set depth=2")
        if name in parsed:
            raise UserError(f"--set {name} is given twice")
        parsed[name] = value
    return parsed


def simulate_command(
    trace: TraceOption,
    hardware: HardwareOption,
    policy: PolicyOption,
    budget: BudgetOption = None,
    expert_budget: ExpertBudgetOption = None,
    geometry: GeometryOption = None,
    dtype: DtypeOption = None,
    timings: TimingsOption = None,
    link: LinkOption = None,
    settings: SettingsOption = None,
    max_tokens: MaxTokensOption = None,
    window: WindowOption = 2,
    touch_order: TouchOrderOption = "last-use",
    fit_share: FitShareOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 1,
    context: ContextOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Simulate one policy at one budget over one link.

    Example: moesim simulate --trace sample --geometry olmoe-1b-7b --hardware rtx4090-pcie4
    --policy lru --expert-budget 25%
    """
    from sim.point import inputs_for, run_point
    from tracer.trace import Trace

    point = parse_point(
        policy=policy,
        params=parse_settings(settings or []),
        hardware=hardware,
        budget=budget,
        expert_budget=expert_budget,
        link=link,
        geometry=geometry,
        dtype=dtype,
        timings=timings,
        window=window,
        touch_order=touch_order,
        max_tokens=max_tokens,
        fit_share=fit_share,
        seed=seed,
        batch=batch,
        context=context,
    )
    opened = Trace.open(trace)
    tell_notes(opened)
    result = run_point(inputs_for(opened, point), point)
    for note in result["notes"]:
        print(f"moesim: note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    _print_result(result)


def parse_point(**fields: Any) -> Any:
    """A :class:`sim.point.Point`; a field out of bounds is named as its option."""
    from sim.point import Point

    try:
        return Point(**fields)
    except ValidationError as error:
        raise commands_compare.named_option(error) from None


def _print_result(result: dict[str, Any]) -> None:
    """The figures that a person looks for first."""
    decode, memory, parts = result["decode"], result["memory"], result["breakdown_ms"]
    calibrated = "" if result["timing"] == "calibrated" else f" ({result['timing']} timing)"
    print(f"{result['label']} on {result['hardware']}, {result['geometry']}{calibrated}")
    print(
        f"  memory   {format_bytes(memory['peak_bytes'])} in all, "
        f"{format_bytes(memory['slots_bytes'])} of it expert slots "
        f"({memory['slots_bytes'] / memory['expert_bytes_total']:.1%} of the experts)"
    )
    if not memory["fits"]:
        print(f"           more than the GPU's {format_bytes(memory['gpu_memory_bytes'])}")
    for name in ("ttft", "tpot"):
        values = result[f"{name}_ms"]
        if values["mean"] is None:
            print(f"  {name}     none in this trace")
            continue
        print(
            f"  {name}     {values['mean']:.3f} ms mean, {values['p50']:.3f} p50, "
            f"{values['p99']:.3f} p99"
        )
    if decode["accesses"]:
        asked = decode["asked"]
        print(
            f"  decode   {decode['hit_rate']:.1%} hits, {decode['late'] / asked:.1%} "
            f"late, {decode['misses'] / asked:.1%} missed of {asked}"
        )
        loss = loss_line(result["quality"]["decode"])
        if loss:
            print(loss)
        print("  a token  " + ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items()) + " ms")
    print(
        f"  link     {result['h2d_bytes_per_token'] / 1e6:.1f} MB a token, "
        f"busy {result['link_busy_share']:.1%} of the time"
    )


def loss_line(loss: dict[str, float | None]) -> str:
    """What a lossy policy did not compute as the gate asked; empty for others."""
    if loss["changed_share"] is None:
        return ""
    return (
        f"  lossy    {loss['changed_share']:.1%} of these replaced, at low bits or left out; "
        f"of the gate weight {loss['lost_mass_share']:.1%} lost, "
        f"{loss['low_mass_share']:.1%} at low bits"
    )


def sweep_command(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped sweep: demo.")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory for results; a part of this sweep is resumed.")
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            help="Processes on this machine, 1 if not given; with --scheduler the most tasks under "
            "way at a time, all if not given.",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="Whose processes: loky (joblib's), dask or ray.")
    ] = "loky",
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="Address of a running Dask or Ray cluster to use."),
    ] = None,
) -> None:
    """Run all points of a sweep; print the ranking and which policy to pick.

    Exit code 0: all points succeeded; 1: some failed, and the results say why; 2: the sweep could
    not run, or no point succeeded.

    Example: moesim sweep demo --out out/demo --jobs 2
    Example: moesim sweep demo --out out/demo --backend dask --scheduler tcp://10.0.0.5:8786
    """
    from sim.sweeps import load_config, sweep

    chosen = load_config(config)
    bar = progress_bar()
    task = bar.add_task("points", total=None)
    kept = [0, 0]
    with ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            if kept[1] == 0:  # the sweep can run: before, an error is all there is to show
                shown.enter_context(bar)
                if done:
                    bar.console.print(f"{done} of {total} points found in {out}; going on")
            kept[:] = done, total
            bar.update(task, completed=done, total=total)

        try:
            frame = sweep(
                chosen,
                out=out,
                jobs=jobs,
                backend=backend,
                scheduler=scheduler,
                progress=progress,
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            shown.close()
            print(
                f"moesim: interrupted: {kept[0]} points are kept in {out}; the same command "
                "goes on",
                file=sys.stderr,
            )
            raise SystemExit(getattr(stop, "code", INTERRUPTED)) from None
    _conclude(frame)
    failed = frame[frame["status"] == "failed"]
    for _, row in failed.iterrows():
        where = row["point.expert_budget"] or row["point.budget"]
        print(f"moesim: failed: {row['label']} at {where}: {row['error']}", file=sys.stderr)
    if len(failed):
        print(f"moesim: {len(failed)} of {len(frame)} points failed", file=sys.stderr)
    print(f"\n{len(frame) - len(failed)} of {len(frame)} points; table: {out / 'results.csv'}")
    if len(failed) == len(frame):
        raise UserError("no point of this sweep succeeded; see the errors above")
    if len(failed):
        raise typer.Exit(1)


def _conclude(frame: Any) -> None:
    """Ranking and recommendation."""
    from sim.advice import recommend
    from sim.tables import render_ranking

    if not (frame["status"] == "ok").any():
        return
    render_ranking(Console(), frame)
    print("\nWhich policy to pick")
    for advice in recommend(frame):
        print(f"- {advice}")


def progress_bar() -> Progress:
    """Points done, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def plot_command(
    directory: Annotated[Path, typer.Argument(help="Results of a sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to draw, if not in DIRECTORY.")
    ] = None,
) -> None:
    """Draw a sweep: Pareto front, hit rates, where the time goes.

    Example: moesim plot out/demo
    """
    from sim.plots import draw_breakdown, draw_hits, draw_pareto
    from sim.sweeps import read_results

    frame = read_results(directory)
    target = out or directory
    target.mkdir(parents=True, exist_ok=True)
    for draw in (draw_pareto, draw_hits, draw_breakdown):
        for path in draw(frame, target):
            print(path)
