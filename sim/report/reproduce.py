"""What makes the same results again: commands, versions and digests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sim.report.results import Results
from sim.sweeps import CONFIG_FILE, PARQUET_FILE

_OPTIONS = {
    "hardware": "--hardware",
    "geometry": "--geometry",
    "dtype": "--dtype",
    "policy": "--policy",
    "budget": "--budget",
    "expert_budget": "--expert-budget",
    "link": "--link",
    "timings": "--timings",
    "max_tokens": "--max-tokens",
    "context": "--context",
    "fit_share": "--fit-share",
}
_DEFAULTS = {
    "window": ("--window", 2),
    "touch_order": ("--touch-order", "last-use"),
    "seed": ("--seed", 0),
    "batch": ("--batch", 1),
}


def commands_of(
    results: Results, validations: Sequence[Path] = (), trace: str | None = None
) -> list[tuple[str, str]]:
    """What each command line does, and the line. ``trace``: the page's, if it was named."""
    named = [word for folder in validations for word in ("--validation", str(folder))]
    if trace is not None:
        named += ["--trace", trace]
    asker = results.asker
    lines = [
        ("all points of this page", asker.command),
        ("this page", shlex.join(["moesim", "report", "results", *named])),
    ]
    for name in results.systems:
        pick = asker.pick(results.of_system(name))
        if pick is not None and "point.hardware" in results.points:
            lines.append(
                (f"the {asker.pick_name} point on {name}", simulate_command(results, pick))
            )
    return lines


def simulate_command(results: Results, point: Any) -> str:
    """`moesim simulate` of one point."""
    words = ["moesim", "simulate", "--trace", results.asker.trace]
    for name, option in _OPTIONS.items():
        value = _given(point, name)
        if value is not None:
            words += [option, _text(value)]
    for setting, value in sorted(json.loads(_given(point, "params") or "{}").items()):
        words += ["--set", f"{setting}={_text(value)}"]
    for name, (option, default) in _DEFAULTS.items():
        value = _given(point, name)
        if value is not None and value != default:
            words += [option, _text(value)]
    return shlex.join(words)


def _given(point: Any, name: str) -> Any:
    value = point.get(f"point.{name}")
    return None if value is None or pd.isna(value) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def versions_of(results: Results) -> list[tuple[str, str]]:
    """Software that made the points, and digests of what they rest on."""
    facts = []
    for column, title in (("moesim", "moesim"), ("git", "commit")):
        values = _values(results.frame, f"produced_by.{column}")
        if values:
            facts.append((title, ", ".join(values)))
    return [
        *facts,
        ("trace digest (SHA-256)", results.trace_digest),
        (f"{PARQUET_FILE} (SHA-256)", results.table_sha256),
    ]


def _values(frame: pd.DataFrame, column: str) -> list[str]:
    return sorted({str(value) for value in frame[column].dropna()}) if column in frame else []


def identity_text(results: Results) -> str:
    """The results' own record with the contents of the profiles that it read."""
    return json.dumps(results.identity, indent=1, sort_keys=True)


IDENTITY_FILE = CONFIG_FILE
