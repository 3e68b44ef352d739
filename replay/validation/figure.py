"""Predicted against measured, as a picture: on the line they agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from configs.figure_style import BLUE, GREY, INK, ORANGE, STYLE, save_figure

_KINDS = (
    (True, "demand-only", BLUE, "o"),
    (False, "prefetching", ORANGE, "^"),
)


def draw_scatter(reports: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """TPOT and exposed stall, measured on x, predicted on y; the naive estimate in grey.

    Beside them the error of TPOT, with the spread of the measurements as a bar.
    """
    rows = [row for report in reports for row in report["points"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 4.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw(left, rows, "tpot_ms", "time a token, ms")
        left.scatter(
            [row["figures"]["tpot_ms"]["measured"] for row in rows],
            [row["naive"]["tpot_ms"]["predicted"] for row in rows],
            s=14,
            marker="x",
            color=GREY,
            linewidths=0.8,
            label="naive: resident + bytes / bandwidth + c x misses",
        )
        _draw(middle, rows, "stall_ms", "exposed stall a token, ms")
        _draw_errors(right, rows)
        left.legend(loc="upper left", fontsize=8)
        names = "; ".join(report["plan"]["name"] for report in reports)
        machine = reports[0]["runs"][0]["machine"].split(",")[0]
        figure.suptitle(
            f"{names}: {len(rows)} points, {machine}",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        return save_figure(figure, out, "scatter")


def _draw_errors(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for kind, _, colour, marker in _KINDS:
        found = [row["figures"]["tpot_ms"] for row in rows if row["time_independent"] is kind]
        if not found:
            continue
        axes.errorbar(
            [each["measured"] for each in found],
            [each["error"] * 100 for each in found],
            yerr=[each["spread"] * 50 for each in found],
            fmt=marker,
            markersize=4.5,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.4,
            elinewidth=0.7,
            zorder=3,
        )
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    axes.axhspan(-5, 5, color="#EEEEEE", zorder=0)
    axes.set_xscale("log")
    axes.set_title("error of time a token, %; bars: measured spread")
    axes.set_xlabel("measured, ms")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw(axes: Any, rows: Sequence[dict[str, Any]], name: str, title: str) -> None:
    found = [row["figures"][name] for row in rows]
    values = [each[side] for each in found for side in ("predicted", "measured") if each[side] > 0]
    for kind, label, colour, marker in _KINDS:
        chosen = [
            each
            for row, each in zip(rows, found, strict=True)
            if row["time_independent"] is kind and each["measured"] > 0
        ]
        if chosen:
            axes.scatter(
                [each["measured"] for each in chosen],
                [each["predicted"] for each in chosen],
                s=22,
                marker=marker,
                color=colour,
                edgecolors="white",
                linewidths=0.4,
                label=label,
                zorder=3,
            )
    axes.set_title(title)
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")
    if not values:
        return
    low, high = min(values) * 0.85, max(values) * 1.18
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, zorder=1)
    axes.fill_between(
        [low, high], [low * 0.95, high * 0.95], [low * 1.05, high * 1.05], color="#EEEEEE", zorder=0
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
