"""`moesim advise`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from configs.errors import UserError
from configs.files import write_atomically
from sim.options import (
    BatchOption,
    ContextOption,
    DtypeOption,
    FitShareOption,
    GeometryOption,
    HardwareOption,
    LinkOption,
    MaxTokensOption,
    SeedOption,
    TimingsOption,
    TraceOption,
)

_MANY_TOKENS = 10_000


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("advise")(advise_command)


def advise_command(
    trace: TraceOption,
    hardware: HardwareOption,
    tpot_ms: Annotated[
        float | None, typer.Option("--tpot-ms", help="Target: time a token after the first.")
    ] = None,
    ttft_ms: Annotated[
        float | None, typer.Option("--ttft-ms", help="Target: time to the first token.")
    ] = None,
    percentile: Annotated[
        str, typer.Option("--percentile", help="Of the requests: mean, p50, p90 or p99.")
    ] = "mean",
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="For the whole model: 24GiB. The card's without it."),
    ] = None,
    context: ContextOption = None,
    batch: BatchOption = 1,
    policies: Annotated[
        str | None,
        typer.Option(
            "--policies",
            help="To choose from, parameters by colons: lru,next-gate:depth=2. All lossless "
            "ones without it.",
        ),
    ] = None,
    geometry: GeometryOption = None,
    dtype: DtypeOption = None,
    link: LinkOption = None,
    timings: TimingsOption = None,
    max_tokens: MaxTokensOption = None,
    fit_share: FitShareOption = None,
    seed: SeedOption = 0,
    what_if: Annotated[
        bool,
        typer.Option(
            "--what-if/--no-what-if", help="Simulate a faster link and lower-bit experts, too."
        ),
    ] = True,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Keep points and answers there; the same question goes on."),
    ] = None,
    pin: Annotated[
        Path | None, typer.Option("--pin", help="Write the experts to pin by layer, JSON.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Which memory, which policy, at what cost: the smallest that meets a target, and the bounds.

    Exit code 0: answered, also where no policy can meet the target; 1: some points failed by a
    fault of moesim; 2: the question could not be answered.

    Example: moesim advise --trace sample --geometry olmoe-1b-7b --hardware rtx4090-pcie4
    --tpot-ms 30 --policies lru,slru,next-gate --max-tokens 400
    """
    from sim.advising import answer
    from tracer.trace import Trace

    question = _question(
        trace=trace,
        hardware=hardware,
        tpot_ms=tpot_ms,
        ttft_ms=ttft_ms,
        percentile=percentile,
        gpu_memory=gpu_memory,
        policies=_chosen(policies),
        geometry=geometry,
        dtype=dtype,
        link=link,
        timings=timings,
        batch=batch,
        context=context,
        max_tokens=max_tokens,
        fit_share=fit_share,
        seed=seed,
        what_if=what_if,
    )
    if pin is not None and pin.exists():
        raise UserError(f"--pin {pin}: exists; name a new file or remove it")
    if pin is not None and not pin.parent.is_dir():
        raise UserError(f"--pin {pin}: {pin.parent} is not a directory: make it, or name another")
    opened = Trace.open(trace)
    _tell(opened, max_tokens)
    from sim.commands_compare import PointsBar

    with PointsBar() as bar:
        advice = answer(question, opened, jobs=jobs, out=out, progress=bar.tell)
    for note in advice.system["notes"]:
        print(f"moesim: note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(advice.to_dict(), indent=2, allow_nan=False))
    else:
        print(advice.text)
    _write_pins(advice, pin)
    for failure in advice.failed:
        print(f"moesim: failed: {failure}", file=sys.stderr)
    if advice.failed:
        raise typer.Exit(1)


def _question(**fields: Any) -> Any:
    from sim.advising import Question
    from sim.commands_compare import named_option

    try:
        return Question(**fields)
    except ValidationError as error:
        raise named_option(error) from None


def _chosen(policies: str | None) -> tuple[Any, ...]:
    if policies is None:
        return ()
    from sim.compare import chosen_of

    return chosen_of(policies)


def _tell(trace: Any, max_tokens: int | None) -> None:
    for note in trace.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    tokens = min(trace.rows, max_tokens or trace.rows)
    if tokens > _MANY_TOKENS:
        print(
            f"moesim: note: every point simulates up to {tokens} tokens; --max-tokens 4000 is "
            "quicker",
            file=sys.stderr,
        )


def _write_pins(advice: Any, pin: Path | None) -> None:
    if pin is None:
        return
    if advice.pins is None:
        why = "nothing can run" if advice.chosen is None else "all experts fit"
        print(f"moesim: note: {why}, so {pin} was not written", file=sys.stderr)
        return
    facts = {name: advice.system[name] for name in ("model", "trace_digest", "batch")}
    pinned = {**facts, **vars(advice.pins), "produced_by": advice.produced_by}
    text = json.dumps(pinned, indent=1)
    write_atomically(pin, f"{text}\n".encode())
    print(f"moesim: wrote {pin}", file=sys.stderr)
