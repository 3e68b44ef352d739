"""The report's files: a table for people, JSON with every figure, the raw measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import write_atomically
from configs.timings import ModelTimes
from replay.validation.errors import (
    Gap,
    Ranking,
    gap,
    naive_ms,
    paired_errors,
    rankings,
    stall_gap,
)
from replay.validation.run import Canary, Judged
from sim.spans import chrome_trace

DRIFT = 0.02
"""A canary that moved more than this has to be told."""
_STALL_FROM_MS = 0.05  # exposed stall below this is not judged in relative terms
_SHOWN_FROM, _SHOWN = 20, 3  # steps of the timeline

Figures = dict[str, Any]


def row_of(judged: Judged, times: ModelTimes, resident_ms: float, expert_bytes: int) -> Figures:
    """All figures of a cell: predicted, measured, spread, error."""
    point = judged.cell.point
    naive = naive_ms(judged, times, resident_ms, expert_bytes)
    figures: dict[str, Gap | None] = {
        "tpot_ms": gap(judged, "itl_ms", "mean"),
        "tpot_p50_ms": gap(judged, "itl_ms", "p50"),
        "tpot_p90_ms": gap(judged, "itl_ms", "p90"),
        "ttft_ms": gap(judged, "ttft_ms", "mean"),
        "stall_ms": stall_gap(judged),
        "hits": gap(judged, "decode", "hits"),
        "late": gap(judged, "decode", "late"),
        "misses": gap(judged, "decode", "misses"),
        "bytes": gap(judged, "h2d_bytes"),
    }
    if judged.measured[0]["peak_memory_bytes"] is not None:
        figures["memory_bytes"] = Gap(
            judged.predicted["memory"]["peak_bytes"],
            float(np.median([each["peak_memory_bytes"] for each in judged.measured])),
            0.0,
        )
    tpot = figures["tpot_ms"]
    assert tpot is not None, "a decode step was judged"
    stall = figures["stall_ms"]
    assert stall is not None
    rest = Gap(tpot.predicted - stall.predicted, tpot.measured - stall.measured, 0.0)
    return {
        "policy": point.label,
        "budget": point.expert_budget,
        "link_scale": judged.cell.link_scale,
        "time_independent": judged.time_independent,
        "decisions_equal": judged.difference is None if judged.time_independent else None,
        "first_difference": judged.difference,
        "figures": {
            name: None if found is None else {**asdict(found), "error": found.error}
            for name, found in {**figures, "without_stall_ms": rest}.items()
        },
        "naive": {"tpot_ms": naive, "error": naive / tpot.measured - 1},
        "naive_stall_error": (naive - resident_ms) / stall.measured - 1
        if stall.measured >= _STALL_FROM_MS
        else None,
        "paired": paired_errors(judged),
    }


def summary(rows: Sequence[Figures], ranks: Sequence[Ranking]) -> Figures:
    """Median and worst absolute errors, apart for demand-only and prefetching policies."""
    groups = {
        "demand-only": [row for row in rows if row["time_independent"]],
        "prefetching": [row for row in rows if not row["time_independent"]],
    }
    told: Figures = {}
    for name, members in groups.items():
        if not members:
            continue
        told[name] = {
            figure: _spread_of([row["figures"][figure] for row in members])
            for figure in ("tpot_ms", "ttft_ms", "stall_ms", "without_stall_ms", "bytes")
        }
        told[name]["memory_bytes"] = _spread_of(
            [row["figures"].get("memory_bytes") for row in members]
        )
        told[name]["naive tpot"] = _spread_of([row["naive"] for row in members])
        told[name]["points"] = len(members)
    taus = [rank.tau for rank in ranks if rank.tau is not None]
    told["ranking"] = {
        "groups": len(ranks),
        "pairs": sum(rank.pairs for rank in ranks),
        "agreed": sum(rank.agreed for rank in ranks),
        "least_tau": min(taus) if taus else None,
        "most_regret": max((rank.regret for rank in ranks), default=None),
    }
    return told


def _spread_of(found: Sequence[Figures | None]) -> Figures | None:
    errors = [abs(each["error"]) for each in found if each is not None]
    errors = [error for error in errors if np.isfinite(error)]
    if not errors:
        return None
    return {"median": float(np.median(errors)), "worst": max(errors)}


def write_report(
    out: Path,
    plan: Figures,
    facts: Figures,
    times: ModelTimes,
    judged: Sequence[Judged],
    canaries: tuple[Canary, Canary],
    expert_bytes: int,
) -> Figures:
    """Write `report.json`, `report.md` and `measurements.json`; returns the first."""
    resident_ms = canaries[0].resident_ms
    rows = [row_of(each, times, resident_ms, expert_bytes) for each in judged]
    ranks = rankings(judged)
    report = {
        **facts,
        "plan": plan,
        "canaries": {"before": asdict(canaries[0]), "after": asdict(canaries[1])},
        "drift": drift(canaries),
        "summary": summary(rows, ranks),
        "rankings": [asdict(rank) for rank in ranks],
        "points": rows,
    }
    raw = [{"cell": each.cell.label, "measured": each.measured} for each in judged]
    shown = _timelines(judged)
    if shown is not None:
        write_atomically(out / "timeline.json", _json(shown))
    write_atomically(out / "report.json", _json(report))
    write_atomically(out / "measurements.json", _json(raw))
    write_atomically(out / "report.md", ("\n".join(lines(report)) + "\n").encode())
    return report


def _timelines(judged: Sequence[Judged]) -> Figures | None:
    """A few decode steps of one point, simulated and measured, for chrome://tracing or Perfetto.

    The first point whose decisions depend on time, or the first of all.
    """
    chosen = sorted(judged, key=lambda each: each.time_independent)[0]
    if chosen.simulated is None or chosen.timed is None:
        return None
    steps = len(chosen.simulated.step_begins)
    first = min(_SHOWN_FROM, steps - 1)
    last = min(first + _SHOWN - 1, steps - 1)
    trace = chrome_trace([chosen.simulated, chosen.timed], chosen.experts, first, last)
    return {**trace, "otherData": {"point": chosen.cell.label, "steps": f"{first} to {last}"}}


def drift(canaries: tuple[Canary, Canary]) -> dict[str, float]:
    """How far the machine moved between the canaries."""
    before, after = canaries
    return {
        "resident": after.resident_ms / before.resident_ms - 1,
        "link": after.link_bytes_per_s / before.link_bytes_per_s - 1,
    }


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def lines(report: Figures) -> list[str]:
    """The report as Markdown."""
    before = report["canaries"]["before"]
    told = [
        f"# {report['plan']['name']}: predicted against measured",
        "",
        f"{report['machine']}. {report['weights']} Routing of `{report['trace']['model']}`"
        f" ({report['trace']['judged_requests']} requests, {report['decode_tokens']} decode tokens)"
        f", {report['plan']['repeats']} repeats, interleaved.",
        "",
        f"    {report['command']}",
        "",
        "Predictions were written first; their SHA-256 is "
        f"`{report['predictions_sha256']}`. A step with all experts there takes "
        f"{before['resident_ms']:.3f} ms, the link carries "
        f"{before['link_bytes_per_s'] / 1e9:.2f} GB/s.",
    ]
    told += [_drift_line(name, moved) for name, moved in report["drift"].items()]
    told += ["", "## In short", ""]
    told += _summary_lines(report["summary"])
    told += ["", "## Points", "", *_table(report["points"])]
    told += ["", "## Ranking", "", *_ranking_table(report["rankings"])]
    return told


def _drift_line(name: str, moved: float) -> str:
    verdict = "**the machine drifted**" if abs(moved) > DRIFT else "steady"
    return f"- {name}, after against before: {moved:+.2%} ({verdict})"


def _summary_lines(told: Figures) -> list[str]:
    lines = [
        "| policies | points | TPOT | naive TPOT | exposed stall | all but stall | TTFT | bytes | "
        "peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("demand-only", "prefetching"):
        if name not in told:
            continue
        group = told[name]
        figures = (
            "tpot_ms",
            "naive tpot",
            "stall_ms",
            "without_stall_ms",
            "ttft_ms",
            "bytes",
            "memory_bytes",
        )
        cells = [_of(group[figure]) for figure in figures]
        lines.append(f"| {name} | {group['points']} | {' | '.join(cells)} |")
    rank = told["ranking"]
    lines += ["", "Errors without sign: median, worst.", ""]
    if rank["groups"]:
        tau = "-" if rank["least_tau"] is None else f"{rank['least_tau']:.2f}"
        lines.append(
            f"Of {rank['pairs']} pairs that differ by more than 3 % and twice the noise, "
            f"{rank['agreed']} have the predicted sign; least Kendall tau {tau}; regret of the "
            f"simulator's pick at most {rank['most_regret']:.1%}."
        )
    return lines


def _of(spread: Figures | None) -> str:
    return "-" if spread is None else f"{spread['median']:.1%}, {spread['worst']:.1%}"


def _table(rows: Sequence[Figures]) -> list[str]:
    lines = [
        "| policy | budget | link | TPOT measured, ms | spread | predicted | error | naive | "
        "stall, ms | error | TTFT, ms | error | bytes | decisions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = row["figures"]
        tpot, stall, ttft, size = (
            figures[name] for name in ("tpot_ms", "stall_ms", "ttft_ms", "bytes")
        )
        equal = row["decisions_equal"]
        verdict = "time-dependent" if equal is None else "equal" if equal else "**differ**"
        cells = [
            row["policy"],
            row["budget"],
            f"x{row['link_scale']:g}",
            f"{tpot['measured']:.3f}",
            f"{tpot['spread']:.1%}",
            f"{tpot['predicted']:.3f}",
            f"{tpot['error']:+.1%}",
            f"{row['naive']['error']:+.1%}",
            f"{stall['measured']:.3f}",
            _signed(stall),
            "-" if ttft is None else f"{ttft['measured']:.1f}",
            _signed(ttft),
            _signed(size),
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _signed(found: Figures | None) -> str:
    if found is None or not np.isfinite(found["error"]):
        return "-"
    return f"{found['error']:+.1%}"


def _ranking_table(ranks: Sequence[Figures]) -> list[str]:
    lines = [
        "| budget | link | pairs | sign right | tau | simulator's pick | measured best | regret |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rank in ranks:
        tau = "-" if rank["tau"] is None else f"{rank['tau']:.2f}"
        lines.append(
            f"| {rank['budget']} | x{rank['link_scale']:g} | {rank['pairs']} | {rank['agreed']} | "
            f"{tau} | {rank['picked']} | {rank['best']} | {rank['regret']:.1%} |"
        )
    return lines
