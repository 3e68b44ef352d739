"""What was asked and simulated, in words: the question that a report answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from sim.report.looks import KINDS, Look
from sim.report.results import Results
from sim.selection import link_name
from sim.wording import as_gib

_ROUTING = (
    *("tokens.prefill", "tokens.decode"),
    *("trace.judged_requests", "trace.fitted_requests", "trace.set_aside_for"),
)
_KIND_WORDS = {
    "causal": "Choices",
    "lossy": "Lossy (they change what the model says)",
    "what-if": "What-ifs (oracles of a given accuracy)",
    "bound": "Bounds (they know the future)",
}


def title_of(results: Results) -> str:
    """Model and machines."""
    points = results.points
    hardware = list(dict.fromkeys(points["hardware"]))
    where = hardware[0] if len(hardware) == 1 else f"{len(hardware)} machines"
    return f"{points['geometry'].iloc[0]} on {where}"


def facts_of(results: Results, looks: Sequence[Look]) -> list[tuple[str, list[str]]]:
    """What was asked and simulated: names, each with lines."""
    points = results.points
    facts = [
        *results.asker.facts(),
        ("Routing", _routing(results)),
        ("Model", _model(points)),
        ("Hardware", _hardware(points)),
        ("Links", [", ".join(link_name(rate) for rate in sorted(set(points["link_bytes_per_s"])))]),
        ("Budgets", [results.asker.budgets]),
    ]
    for kind in KINDS:
        labels = [look.label for look in looks if look.kind == kind]
        if labels:
            facts.append((_KIND_WORDS[kind], [", ".join(labels)]))
    return [*facts, ("Time", [time_words(points)]), ("Points", _points(results))]


def time_words(points: pd.DataFrame) -> str:
    """Whether times rest on a calibration of this model on this machine."""
    kinds = set(points["timing"]) if "timing" in points else {"estimated"}
    if kinds == {"calibrated"}:
        return "Calibrated: the model's times were measured on this hardware."
    if "estimated" in kinds and len(kinds) > 1:
        return "Partly estimated: some points have no times measured on their hardware."
    return (
        "Estimated: compute times are a roofline of the hardware profile, not measured. "
        "Differences under 2 % are not to be trusted."
    )


def _routing(results: Results) -> list[str]:
    points = results.points
    first = points.iloc[0]
    model = f" (recorded from {first['trace.model']})" if "trace.model" in points else ""
    lines = [f"{results.asker.trace}{model}, digest {results.trace_digest:.8}"]
    if {*_ROUTING} <= {*points}:
        lines.append(
            f"judged on {_counted(int(first['trace.judged_requests']), 'request')}: "
            f"{int(first['tokens.prefill']):,} prefill and {int(first['tokens.decode']):,} decode "
            "tokens"
        )
        if first["trace.fitted_requests"]:
            aside = _counted(int(first["trace.fitted_requests"]), "request")
            why = first["trace.set_aside_for"]
            lines.append(f"{aside} set aside for policies that learn ({why})")
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _model(points: pd.DataFrame) -> list[str]:
    lines = []
    for (geometry, dtype), rows in points.groupby(["geometry", "expert_dtype"], sort=False):
        total = as_gib(rows["memory.expert_bytes_total"].iloc[0])
        rest = _optional_gib(rows, "memory.nonexpert_bytes")
        lines.append(f"{geometry}: {total} of experts in {dtype}{rest}")
    return lines


def _optional_gib(rows: pd.DataFrame, column: str) -> str:
    return f", {as_gib(rows[column].iloc[0])} of other weights" if column in rows else ""


def _hardware(points: pd.DataFrame) -> list[str]:
    lines = []
    for name, rows in points.groupby("hardware", sort=False):
        memory = as_gib(rows["memory.gpu_memory_bytes"].iloc[0])
        measured = "hardware_calibrated" in rows and bool(rows["hardware_calibrated"].iloc[0])
        origin = "measured on such a machine" if measured else "from datasheets"
        lines.append(f"{name}: {memory} of GPU memory; profile {origin}")
    return lines


def _points(results: Results) -> list[str]:
    frame = results.frame
    lines = [f"{int((frame['status'] == 'ok').sum())} of {len(frame)} succeeded"]
    if results.silent:
        lines.append(f"{results.silent} of these decoded no token and are left out")
    return lines


def failures_of(results: Results) -> list[list[str]]:
    """Policy, where, and why, of each point that failed."""
    rows: Iterable[dict[Any, Any]] = results.failed.to_dict("records")
    return [
        [
            str(row["label"]),
            str(_given(row, "point.expert_budget") or _given(row, "point.budget") or "-"),
            ", ".join(
                str(part)
                for part in (_given(row, "point.hardware"), _given(row, "point.link"))
                if part
            ),
            str(row["error"]),
        ]
        for row in rows
    ]


def _given(row: dict[Any, Any], column: str) -> Any:
    value = row.get(column)
    return None if value is None or pd.isna(value) else value
