"""`moesim train-predictor` and `moesim apply-predictor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tracer.predictor.train import Epoch
    from tracer.trace import Trace

TraceDir = Annotated[str, typer.Option("--trace", help="Trace directory with gate inputs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("train-predictor")(train_predictor_command)
    app.command("apply-predictor")(apply_predictor_command)


def train_predictor_command(
    trace: TraceDir,
    kind: Annotated[str, typer.Option("--kind", help="promoe: one 2-layer MLP a layer.")] = (
        "promoe"
    ),
    stride: Annotated[
        int, typer.Option("--stride", help="Layer l predicts the experts of layer l + stride.")
    ] = 2,
    hidden_units: Annotated[
        int | None,
        typer.Option("--hidden-units", help="By default 2 M parameters a layer, at most 4 x H."),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", help="At most; it stops when no layer gets better.")
    ] = 30,
    seed: Annotated[int, typer.Option("--seed", help="Of split, weights and order.")] = 0,
    device: Device = "auto",
    test_share: Annotated[
        float, typer.Option("--test-share", help="Share of the requests held out.")
    ] = 0.3,
    memory: Annotated[
        str, typer.Option("--memory", help="Gate inputs held at a time, on the device too.")
    ] = "8GiB",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Weights, .safetensors; else TRACE/predictors/KIND_sSTRIDE."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not add the predictions to the trace.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a predictor of later layers' experts on a trace; add its predictions as a column.

    Example: moesim train-predictor --trace traces/mine --kind promoe --stride 2
    """
    from configs.units import parse_bytes
    from tracer.extra import require_extra

    require_extra("moesim train-predictor")
    from tracer.predictor.pipeline import Options, train_predictor

    options = Options(
        kind=kind,
        stride=stride,
        hidden_units=hidden_units,
        epochs=epochs,
        seed=seed,
        device=device,
        test_share=test_share,
        memory_bytes=parse_bytes(memory),
        out=out,
        weights_only=weights_only,
    )
    _show(train_predictor(_open(trace), options, _tell), as_json)


def apply_predictor_command(
    trace: TraceDir,
    weights: Annotated[
        Path, typer.Option("--weights", help="What train-predictor wrote: a .safetensors file.")
    ],
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Add a trained predictor's predictions to another trace of the same model.

    Example: moesim apply-predictor --trace traces/other --weights promoe_s2.safetensors
    """
    from tracer.extra import require_extra

    require_extra("moesim apply-predictor")
    from tracer.predictor.pipeline import apply_predictor

    _show(apply_predictor(_open(trace), weights, device), as_json)


def _open(trace: str) -> Trace:
    from tracer.trace import Trace

    opened = Trace.open(trace)
    for note in opened.notes:
        print(f"moesim: note: {note}", file=sys.stderr)
    return opened


def _tell(epoch: Epoch) -> None:
    print(
        f"epoch {epoch.number}: validation loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.1%},"
        f" better in {epoch.better} layers",
        file=sys.stderr,
    )


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from tracer.predictor.table import render

    render(Console(), report)
