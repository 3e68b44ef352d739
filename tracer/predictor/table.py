"""A predictor's report for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tracer.predictor.evaluate import LEARNED, NEXT_GATE, PHASES, POPULARITY

TITLES = {LEARNED: "learned", NEXT_GATE: "next gate", POPULARITY: "popularity"}


def render(console: Console, report: dict[str, Any]) -> None:
    """Print accuracies by layer, decode and prefill apart, then sizes and latency."""
    for phase in PHASES:
        scores = report["accuracy"][phase]
        if scores["mean"] is None:
            console.print(f"{phase}: no held-out rows")
            continue
        console.print(_accuracies(phase, scores))
    if not any(NEXT_GATE in (report["accuracy"][phase]["mean"] or ()) for phase in PHASES):
        console.print(
            f"next gate: the trace has no column lookahead_{report['stride']} to compare with"
        )
    for line in _summary(report):
        console.print(line, highlight=False, soft_wrap=True)


def _accuracies(phase: str, scores: dict[str, Any]) -> Table:
    names = [name for name in TITLES if name in scores["mean"]]
    table = Table(title=f"{phase}: held-out experts foretold, among k and among 2k predicted")
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(TITLES[name], justify="right")
        table.add_column("2k", justify="right")
    for layer in scores["layers"]:
        table.add_row(str(layer["model_layer_id"]), *_cells(layer, names))
    table.add_section()
    table.add_row("all", *_cells(scores["mean"], names))
    return table


def _cells(scores: dict[str, Any], names: list[str]) -> list[str]:
    measures = ("accuracy", "recall_2k")
    return [f"{scores[name][measure]:.1%}" for name in names for measure in measures]


def _summary(report: dict[str, Any]) -> list[str]:
    requests = report["requests"]
    lines = [
        f"{report['kind']}, stride {report['stride']}: {report['layers']} layers x"
        f" {report['parameters_per_layer']:,} parameters ({report['hidden_units']} hidden units)",
        f"trained on {requests['trained']} of {requests['all']} requests (seed {report['seed']});"
        " judge policies on the others",
    ]
    lines += [_latency(device, times) for device, times in report.get("latency", {}).items()]
    lines.append(f"weights: {report['weights_file']} (SHA-256 {report['weights_sha256']})")
    if report["appended"]:
        lines.append(f"column: {report['column']} added to the trace")
    return lines


def _latency(device: str, times: dict[str, Any]) -> str:
    median, low, high = (times[name] / 1000 for name in ("median_ns", "p10_ns", "p90_ns"))
    where = times.get("gpu") or f"{times['threads']} thread(s)"
    return (
        f"latency, one token, one layer, {device}, {where}: {median:.1f} us"
        f" (10th to 90th percentile {low:.1f} to {high:.1f})"
    )
