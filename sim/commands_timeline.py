"""`moesim timeline`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import UserError
from configs.files import prepare_directory, write_atomically
from configs.units import format_bytes
from sim.options import (
    BudgetOption,
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


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("timeline")(timeline_command)


def timeline_command(
    trace: TraceOption,
    hardware: HardwareOption,
    policy: PolicyOption,
    steps: Annotated[
        str,
        typer.Option("--steps", help="Forward steps to show, from 0 on: 20, or 20:24 with 24."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="JSON file to write, for Perfetto or chrome://tracing.")
    ],
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
) -> None:
    """Draw a stretch of a simulation: what the host, the GPU, the link and the CPU did when.

    Each copy is named by layer, expert and why it was made, and says whether it came in time, late,
    or for nothing. To know that, all steps are simulated; --max-tokens makes them fewer. What
    straddles the stretch's ends is shown whole.

    Example: moesim timeline --trace sample --geometry olmoe-1b-7b --hardware rtx4090-pcie4
    --policy next-gate --expert-budget 25% --steps 20:24 --out out/timeline.json
    """
    from sim.commands import parse_point, parse_settings, tell_notes
    from sim.point import inputs_for
    from sim.stretch import simulate_stretch
    from tracer.trace import Trace

    stretch = parse_steps(steps)
    if out.exists():
        raise UserError(f"--out: {out} exists; name a new file or remove it")
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
    )
    opened = Trace.open(trace)
    tell_notes(opened)
    drawn = simulate_stretch(inputs_for(opened, point), point, stretch)
    for note in drawn.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    prepare_directory(out.parent, "--out")
    text = json.dumps(drawn.chrome_trace(), separators=(",", ":"), allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    _summarise(drawn)
    print(f"  {out}: open it at https://ui.perfetto.dev or in chrome://tracing")


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of ``20:24`` or ``20``. Raises UserError."""
    first, colon, last = text.partition(":")
    if not colon:
        last = first
    if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in (first, last)):
        raise UserError(
            f"--steps {text!r} is no step and no range of them: give 20, or 20:24 with both shown"
        )
    chosen = int(first), int(last)
    if chosen[0] > chosen[1]:
        raise UserError(f"--steps {text}: the first step comes after the last; give {last}:{first}")
    return chosen


def _summarise(drawn: Any) -> None:
    """What the stretch holds."""
    first, last = drawn.steps
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    on_link = format_bytes(sum(chunk.nbytes for chunk in drawn.chunks))
    label = drawn.setting.point.label
    print(f"{label}, {steps}: {drawn.duration_ns / 1e6:.3f} ms, {on_link} over the link")
    for (source, outcome), number in sorted(drawn.copies().items()):
        what = source if source == outcome else f"{source}, {outcome}"
        print(f"  {number:6} copies: {what}")
