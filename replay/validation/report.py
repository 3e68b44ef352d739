"""The report of a campaign: a table for people, JSON with every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from configs.files import write_atomically
from replay.breakdown import COMPONENTS
from replay.validation.errors import (
    Gap,
    at,
    gap,
    gap_of,
    hidden_share,
    naive_ms,
    naive_stall_ms,
    paired_errors,
    rankings,
    stall_ms,
)
from replay.validation.files import as_json
from replay.validation.judged import Figures, Judged, Run
from replay.validation.plan import ValidationPlan, cells_of
from replay.validation.summary import (
    errors_by_part,
    percent,
    summary,
    summary_lines,
)

DRIFT = 0.02
"""A canary that moved more than this has to be told."""
_STALL_FROM_MS = 0.05  # below it, predicted and measured, stall is not judged in relative terms
_P99_FROM = 1000  # decode tokens
_FIGURES = {
    "tpot_ms": at("itl_ms", "mean"),
    "tpot_p50_ms": at("itl_ms", "p50"),
    "tpot_p90_ms": at("itl_ms", "p90"),
    "ttft_ms": at("ttft_ms", "mean"),
    "stall_ms": stall_ms,
    "link_ms": at("link_ms"),
    "hits": at("decode", "hits"),
    "late": at("decode", "late"),
    "misses": at("decode", "misses"),
    "bytes": at("h2d_bytes"),
}


def row_of(judged: Judged) -> Figures:
    """All figures of a cell: predicted, measured, spread, error."""
    point = judged.cell.point
    found = {name: gap(judged, figure) for name, figure in _FIGURES.items()}
    if judged.predicted["tokens"]["decode"] >= _P99_FROM:
        found["tpot_p99_ms"] = gap(judged, at("itl_ms", "p99"))
    found["memory_bytes"] = _memory(judged)
    tpot, stall = found["tpot_ms"], found["stall_ms"]
    assert tpot is not None, "a decode step was judged"
    assert stall is not None
    naive_stall = Gap(naive_stall_ms(judged), stall.measured, stall.spread)
    return {
        "policy": point.label,
        "budget": point.expert_budget,
        "link_scale": judged.cell.link_scale,
        "run": judged.run.number,
        "on_cpu": _on_cpu(judged.predicted),
        "repeats": len(judged.measured),
        "time_independent": judged.time_independent,
        "decisions_equal": judged.difference is None if judged.time_independent else None,
        "first_difference": judged.difference,
        "figures": {name: _told(each) for name, each in found.items()},
        "prefill_ms": {
            size: _told(gap(judged, at("prefill_ms", size)))
            for size in judged.predicted["prefill_ms"]
        },
        "components_ms": _components(judged, "host_ms"),
        "prefill_components_ms": _components(judged, "prefill_host_ms"),
        "link_hidden_share": float(np.median([hidden_share(each) for each in judged.measured])),
        "naive": {
            "tpot_ms": _told(Gap(naive_ms(judged), tpot.measured, tpot.spread)),
            "stall_ms": _told(naive_stall),
        },
        "stall_is_judged": max(stall.predicted, stall.measured) >= _STALL_FROM_MS,
        "paired": paired_errors(judged),
        "host_slowness": host_slowness(judged),
    }


def _components(judged: Judged, whose: str) -> Figures:
    """By what the host did; None where nobody measured it, or no step is of that kind."""
    return {name: _told(gap(judged, at(whose, name))) for name in COMPONENTS}


def _on_cpu(predicted: Figures) -> bool:
    """Whether the policy left any expert to the CPU."""
    return any(predicted.get(phase, {}).get("cpu", 0) > 0 for phase in ("decode", "prefill"))


def host_slowness(judged: Judged) -> list[float] | None:
    """How many times as slow as in calibration the host was in each run; None: not measured."""
    usual = judged.run.times.host_loop_ns
    loops = [each["host_loop_ns"] for each in judged.measured if "host_loop_ns" in each]
    if usual is None or len(loops) < len(judged.measured):
        return None
    return [float(loop / usual) for loop in loops]


def _memory(judged: Judged) -> Gap | None:
    """Peak GPU memory; None where nobody measured it."""
    predicted = judged.predicted["memory"]["peak_bytes"]
    return gap_of(predicted, map(at("peak_memory_bytes"), judged.measured))


def _told(found: Gap | None) -> Figures | None:
    return None if found is None else {**asdict(found), "error": _finite(found.error)}


def _finite(error: float) -> float | None:
    return error if np.isfinite(error) else None


def report_of(plan: ValidationPlan, judged: Sequence[Judged]) -> Figures:
    """Every figure of what has been measured so far."""
    rows = [row_of(each) for each in judged]
    ranks = [asdict(rank) for rank in rankings(judged)]
    runs = {each.run.number: each.run for each in judged}
    first = judged[0].predicted
    return {
        "plan": plan.model_dump(mode="json"),
        "cells": len(list(cells_of(plan))),
        "trace": first["trace"],
        "decode_tokens": first["tokens"]["decode"],
        # Measurements that do not say are of engines that ran one request at a time.
        "batch": judged[0].measured[0].get("batch", 1),
        "produced_by": first["produced_by"],
        "runs": [
            {**_run(runs[number]), "host_slowness": _host_of(rows, number)}
            for number in sorted(runs)
        ],
        "summary": summary(rows, ranks),
        "rankings": ranks,
        "points": rows,
    }


def _run(run: Run) -> Figures:
    return {
        "number": run.number,
        **run.facts,
        "before": asdict(run.before),
        "after": None if run.after is None else asdict(run.after),
        "drift": drift(run),
        "link_since_calibration": run.before.link_bytes_per_s / run.times.link.bytes_per_s - 1,
    }


def _host_of(rows: Sequence[Figures], run: int) -> Figures | None:
    """Of a run's measurements: how slow the host was, against its calibration."""
    known = [row["host_slowness"] for row in rows if row["run"] == run]
    if None in known:
        return None
    slowness = np.concatenate(known)
    low, middle, high = np.percentile(slowness, [0, 50, 100]).tolist()
    return {"least": low, "median": middle, "most": high, "measurements": len(slowness)}


def drift(run: Run) -> dict[str, float] | None:
    """How far the machine moved between the canaries; None: the run was cut off."""
    before, after = run.before, run.after
    if after is None:
        return None
    return {
        "resident": after.resident_ms / before.resident_ms - 1,
        "link": after.link_bytes_per_s / before.link_bytes_per_s - 1,
    }


def write_report(out: Path, plan: ValidationPlan, judged: Sequence[Judged]) -> Figures:
    """Write `report.json` and `report.md`; returns the first."""
    report = report_of(plan, judged)
    write_atomically(out / "report.json", as_json(report))
    write_atomically(out / "report.md", ("\n".join(lines(report)) + "\n").encode())
    return report


def lines(report: Figures) -> list[str]:
    """The report as Markdown."""
    plan = report["plan"]
    told = [f"# {plan['name']}: predicted against measured", ""]
    told += [
        f"{len(report['points'])} of {report['cells']} points. Routing of "
        f"`{report['trace']['model']}` ({report['trace']['judged_requests']} requests, "
        f"{report['decode_tokens']} decode tokens), {plan['repeats']} repeats, interleaved.",
    ]
    for run in report["runs"]:
        told += _run_lines(run)
    told += ["", *summary_lines(report["summary"])]
    told += ["", "## Points", "", *_table(report["points"])]
    told += ["", "## A token's time: its spread", "", *_tails_table(report["points"])]
    told += errors_by_part(report["points"])
    told += ["", "## Ranking", "", *_ranking_table(report["rankings"])]
    return told


def _run_lines(run: Figures) -> list[str]:
    before = run["before"]
    told = [
        "",
        f"## Run {run['number']}",
        "",
        f"{run['machine']}. {run['weights']}",
        "",
        f"    {run['command']}",
        "",
        "Predictions were written first; their SHA-256 is "
        f"`{run['predictions_sha256']}`. A step with all experts there takes "
        f"{before['resident_ms']:.3f} ms, the link carries "
        f"{before['link_bytes_per_s'] / 1e9:.2f} GB/s.",
        "",
    ]
    told.append(_drift_line("link, before against calibration", run["link_since_calibration"]))
    if "resident_predicted_ms" in run:
        gap = before["resident_ms"] / run["resident_predicted_ms"] - 1
        told.append(_drift_line("resident, before against its prediction", gap))
    if run["host_slowness"] is not None:
        told.append(_host_line(run["host_slowness"]))
    if run["drift"] is None:
        return [*told, "- The run was cut off: nobody knows whether the machine drifted."]
    moves = run["drift"].items()
    return told + [_drift_line(f"{name}, after against before", moved) for name, moved in moves]


def _host_line(slowness: Figures) -> str:
    median, least, most = (slowness[name] - 1 for name in ("median", "least", "most"))
    verdict = "**the machine drifted**" if abs(median) > DRIFT else "steady"
    return (
        f"- host, {slowness['measurements']} measurements against calibration: {median:+.1%} in "
        f"the median ({verdict}), from {least:+.1%} to {most:+.1%}"
    )


def _drift_line(what: str, moved: float) -> str:
    verdict = "**the machine drifted**" if abs(moved) > DRIFT else "steady"
    return f"- {what}: {moved:+.2%} ({verdict})"


def _table(rows: Sequence[Figures]) -> list[str]:
    titles = (
        "policy",
        "budget",
        "link",
        "TPOT measured, ms",
        "spread",
        "predicted",
        "error",
        "naive",
        "by token: p50, p90",
        "stall, ms",
        "error",
        "naive",
        "link hidden",
        "TTFT, ms",
        "error",
        "bytes",
        "memory",
        "decisions",
    )
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    return lines + [f"| {' | '.join(_cells(row))} |" for row in rows]


def _cells(row: Figures) -> list[str]:
    figures, naive, paired = row["figures"], row["naive"], row["paired"]
    tpot, stall, ttft = (figures[name] for name in ("tpot_ms", "stall_ms", "ttft_ms"))
    equal = row["decisions_equal"]
    return [
        row["policy"],
        row["budget"],
        f"x{row['link_scale']:g}",
        *_gap_cells(tpot),
        percent(naive["tpot_ms"]),
        f"{paired['p50']:.1%}, {paired['p90']:.1%}",
        f"{stall['measured']:.3f}",
        percent(stall) if row["stall_is_judged"] else "-",
        percent(naive["stall_ms"]) if row["stall_is_judged"] else "-",
        f"{row['link_hidden_share']:.0%}",
        "-" if ttft is None else f"{ttft['measured']:.1f}",
        percent(ttft),
        percent(figures["bytes"]),
        percent(figures["memory_bytes"]),
        "time-dependent" if equal is None else "equal" if equal else "**differ**",
    ]


_TAILS = {"tpot_p50_ms": "p50", "tpot_p90_ms": "p90", "tpot_p99_ms": "p99"}


def _tails_table(rows: Sequence[Figures]) -> list[str]:
    """Percentiles of the time of a token: measured, and the prediction's error."""
    known = [name for name in _TAILS if any(row["figures"].get(name) for row in rows)]
    titles = ["policy", "budget", "link"]
    for name in known:
        titles += [f"{_TAILS[name]} measured, ms", "spread", "predicted", "error"]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row in rows:
        cells = [row["policy"], row["budget"], f"x{row['link_scale']:g}"]
        for name in known:
            cells += _gap_cells(row["figures"].get(name))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gap_cells(found: Figures | None) -> list[str]:
    if found is None:
        return ["-"] * 4
    return [
        f"{found['measured']:.3f}",
        f"{found['spread']:.1%}",
        f"{found['predicted']:.3f}",
        percent(found),
    ]


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
