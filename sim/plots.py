"""Figures of a sweep: latency against memory, hit rate against budget, where the time goes.

Each function draws to a directory and returns the paths, a PNG and an SVG a figure. The same frame
gives the same bytes. A file that is there already is left alone if it is the same and is an error
if it is not. Colours are Okabe and Ito's, which the colour-blind tell apart; markers repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullFormatter,
)

from configs.figure_style import GREY, INK, LOOKS, PALE, STYLE, save_figure
from sim.front import front, without_slivers
from sim.ranking import labels_by_speed, pick_of
from sim.selection import (
    BASELINE,
    RESIDENT,
    distinct,
    is_estimated,
    link_name,
    middle,
    middle_budget,
    prepare,
    systems,
)
from sim.wording import three_figures

_GIB = 2**30
_FRONT = "#F2D64B"
_MARKED: Any = {
    "markersize": 5,
    "linewidth": 1.4,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}
_BOUND_LINES = ((0, (5, 2)), (0, (1, 1.5)))
_LOG_FROM = 5  # ratio of slowest to fastest above which TPOT gets a logarithmic axis
_MOST_COLUMNS = 3
_MOST_BARS = 18
_MOST_TICKS = 8
_WIDTH_INCHES = 10.5
_SAMPLE_INCHES, _LETTER_INCHES = 0.65, 0.07  # of a legend entry, generous
_HEAD_INCHES, _FOOT_INCHES, _LEGEND_ROW_INCHES = 0.55, 0.22, 0.18
_LONGEST_NOTE = 90
PARTS = (
    ("host", "host", "#999999", ""),
    ("segments", "attention, norms, gates", "#0072B2", ""),
    ("experts", "experts", "#56B4E9", ""),
    ("stall_cpu", "stall on CPU experts", "#CC79A7", ""),
    ("stall_late", "stall on late prefetches", "#E69F00", "////"),
    ("stall_miss", "stall on misses", "#D55E00", ""),
)


def draw_pareto(frame: pd.DataFrame, out_dir: str | Path) -> list[Path]:
    """TPOT against GPU memory, a panel a link: policies, bounds, the Pareto front and the pick.

    One figure a hardware (and whatever else varies); where each has but one link, the hardware are
    the panels. Raises UserError where no point succeeded or a different file is in the way.
    """
    points = prepare(frame)
    paths: list[Path] = []
    for name, rows in _figures(points):
        with matplotlib.rc_context(STYLE):
            paths += save_figure(_pareto_figure(rows), Path(out_dir), f"pareto{name}")
    return paths


def draw_hits(frame: pd.DataFrame, out_dir: str | Path) -> list[Path]:
    """Decode hit rate against the budget, and how far each policy stays below the best bound.

    Drawn for the middle link: only prefetches depend on it. Raises as :func:`draw_pareto`.
    """
    points = prepare(frame)
    paths: list[Path] = []
    for name, rows in _figures(points):
        with matplotlib.rc_context(STYLE):
            paths += save_figure(
                _hits_figure(_middle_system(rows), _cast(rows)), Path(out_dir), f"hits{name}"
            )
    return paths


def draw_breakdown(frame: pd.DataFrame, out_dir: str | Path) -> list[Path]:
    """Where a decode step's time goes, a bar a policy, at the middle link and its middle budget.

    Raises as :func:`draw_pareto`.
    """
    points = prepare(frame)
    paths: list[Path] = []
    for name, rows in _figures(points):
        with matplotlib.rc_context(STYLE):
            figure = _breakdown_figure(_middle_system(rows))
            paths += save_figure(figure, Path(out_dir), f"breakdown{name}")
    return paths


# ---------------------------------------------------------------------- what is drawn where


def _figures(points: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Parts of the sweep that share a figure, with what their file names end in."""
    without_link = _without_link(points)
    per_figure = points.groupby(without_link)["system"].nunique()
    if len(per_figure) == 1 or (per_figure == 1).all():
        return [("", points)]
    return [
        (f"-{_file_name(name)}", points[without_link == name])
        for name in dict.fromkeys(without_link)
    ]


def _without_link(points: pd.DataFrame) -> pd.Series[Any]:
    names = distinct(points["link_bytes_per_s"].unique().tolist(), link_name)
    pairs = zip(points["system"], points["link_bytes_per_s"], strict=True)
    without = [system.replace(f", {names[link]}", "") for system, link in pairs]
    return pd.Series(without, index=points.index)


def _file_name(system: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "-_." else " " for c in system).split())


def _middle_system(points: pd.DataFrame) -> pd.DataFrame:
    name: str = middle(systems(points))
    return points[points["system"] == name]


@dataclass(frozen=True)
class _Cast:
    """Who is drawn how: colours for the best, dashes for two bounds, thin grey for the rest."""

    colours: dict[str, tuple[str, str]]
    bounds: dict[str, Any]
    others: tuple[str, ...]


def _cast(points: pd.DataFrame) -> _Cast:
    """The fastest causal policies over all budgets and links, in their order.

    The same for all figures of a sweep, so that a policy keeps its colour.
    """
    contested = points[points["policy"] != RESIDENT]
    scores = labels_by_speed(contested)
    kinds = contested.groupby("label")["kind"].first()
    causal = [label for label in scores if kinds[label] == "causal" and label != BASELINE]
    shown = causal[: len(LOOKS)]
    return _Cast(
        colours=dict(zip(shown, LOOKS, strict=False)),
        bounds=_pick_bounds(contested, scores),
        others=tuple(
            label for label in scores if kinds[label] != "bound" and label not in (*shown, BASELINE)
        ),
    )


def _pick_bounds(points: pd.DataFrame, scores: Sequence[str]) -> dict[str, Any]:
    """The best bound on caching and the best that also prefetches, each with its dashes."""
    bounds = points[points["kind"] == "bound"]
    picked: dict[str, Any] = {}
    for prefetches, line in zip((False, True), _BOUND_LINES, strict=True):
        labels = set(bounds.loc[bounds["prefetches"] == prefetches, "label"])
        best = next((label for label in scores if label in labels), None)
        if best is not None:
            picked[best] = line
    return picked


# ---------------------------------------------------------------------- latency against memory


def _pareto_figure(points: pd.DataFrame) -> Figure:
    names = systems(points)
    columns = min(len(names), _MOST_COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(_WIDTH_INCHES, 1.8 + 3.8 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    cast = _cast(points)
    tpot = _near(points)["tpot_ms.mean"]
    if tpot.max() > _LOG_FROM * tpot.min():
        _log_ms(panels[0], float(tpot.min()), float(tpot.max()))
    for axes, name in zip(panels, names, strict=False):
        _pareto_panel(axes, points[points["system"] == name], cast)
        if len(names) > 1:
            axes.set_title(_panel_title(name, points))
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("TPOT (ms a token, mean)")
    for axes in panels[: len(names)]:
        axes.set_xlabel("GPU memory, whole model (GiB)")
        axes.tick_params(labelbottom=True)
    handles = _pareto_handles(points, cast)
    _frame_figure(figure, "Latency against GPU memory", points, handles, cast.others)
    return figure


def _near(points: pd.DataFrame) -> pd.DataFrame:
    """The points that are drawn in their panels."""
    parts = [points[points["system"] == name] for name in systems(points)]
    return pd.concat([part[~_far_resident(part)] for part in parts])


def _panel_title(name: str, points: pd.DataFrame) -> str:
    """What tells this panel from its neighbours."""
    hardware = points["hardware"].unique()
    return name if len(hardware) > 1 else name.replace(f"{hardware[0]}, ", "link ")


def _log_ms(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.25)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _pareto_panel(axes: Axes, points: pd.DataFrame, cast: _Cast) -> None:
    _draw_front(axes, points)
    for label in cast.others:
        _line(axes, points, label, color=PALE, linewidth=0.9, zorder=2)
    for label, dashes in cast.bounds.items():
        _line(axes, points, label, color=GREY, linestyle=dashes, linewidth=1.4, zorder=3)
    for label, (colour, marker) in reversed(cast.colours.items()):
        _line(
            axes,
            points,
            label,
            color=colour,
            marker=marker,
            **_MARKED,
            zorder=4,
        )
    _line(axes, points, BASELINE, color=INK, marker="x", markersize=6, linestyle="", zorder=5)
    near = points[~_far_resident(points)]
    _line(axes, near, RESIDENT, color=INK, marker="*", markersize=12, linestyle="", zorder=5)
    limit = _mark_limit(axes, near)
    _panel_note(axes, points, limit)


def _far_resident(points: pd.DataFrame) -> pd.Series[bool]:
    """Points with everything resident that would only widen the axis: no choice, and far right."""
    resident = points["policy"] == RESIDENT
    most = points.loc[~resident, "memory.peak_bytes"].max()  # nan, so never far, without others
    far: pd.Series[bool] = points["memory.peak_bytes"] > 1.2 * most
    return resident & ~points["memory.fits"] & far


def _line(axes: Axes, points: pd.DataFrame, label: str, **look: Any) -> None:
    own = points[points["label"] == label].sort_values("memory.peak_bytes")
    if not own.empty:
        axes.plot(own["memory.peak_bytes"] / _GIB, own["tpot_ms.mean"], **look)


def _draw_front(axes: Axes, points: pd.DataFrame) -> None:
    line = front(points)
    if line.empty:
        return
    drawn = without_slivers(line)
    axes.plot(
        drawn["memory.peak_bytes"] / _GIB,
        drawn["tpot_ms.mean"],
        color=_FRONT,
        linewidth=8,
        solid_capstyle="round",
        solid_joinstyle="round",
        zorder=1,
    )
    pick = pick_of(points)
    if pick is not None:
        where = (pick["memory.peak_bytes"] / _GIB, pick["tpot_ms.mean"])
        axes.plot(*where, marker="o", markersize=11, color=INK, fillstyle="none", zorder=6)


def _panel_note(axes: Axes, points: pd.DataFrame, limit: float | None) -> None:
    """The pick, and what is too far right to be drawn, left of the GPU's ``limit`` in GiB."""
    lines = []
    pick = pick_of(points)
    if pick is not None:
        lines += [
            f"\N{WHITE CIRCLE} pick: {pick['label']}",
            f"{pick['budget']}, {three_figures(pick['tpot_ms.mean'])} ms",
        ]
    far = points[_far_resident(points)]
    if not far.empty:
        row = far.iloc[0]
        lines += [
            f"all resident: {row['memory.peak_bytes'] / _GIB:.1f} GiB,",
            f"{three_figures(row['tpot_ms.mean'])} ms, does not fit",
        ]
    axes.annotate(
        "\n".join(lines),
        (0.98 if limit is None else limit, 0.98),
        xycoords="axes fraction" if limit is None else ("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=INK,
    )


def _mark_limit(axes: Axes, points: pd.DataFrame) -> float | None:
    """The GPU's memory in GiB, drawn and returned where it is not far beyond the points."""
    limit = float(points["memory.gpu_memory_bytes"].iloc[0] / _GIB)
    if limit > 1.25 * points["memory.peak_bytes"].max() / _GIB:
        return None
    axes.axvline(limit, color=INK, linewidth=1)
    axes.annotate(
        f"GPU: {limit:.1f} GiB",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=8,
    )
    return limit


def _pareto_handles(points: pd.DataFrame, cast: _Cast) -> list[Line2D]:
    handles = _cast_handles(_near(points), cast)
    handles.append(Line2D([], [], color=_FRONT, linewidth=6, label="Pareto front"))
    picks = [pick_of(points[points["system"] == name]) for name in systems(points)]
    if any(pick is not None for pick in picks):
        handles.append(_dot("o", "pick: fastest that fits", markersize=10, fillstyle="none"))
    return handles


def _cast_handles(points: pd.DataFrame, cast: _Cast) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
        for label, (colour, marker) in cast.colours.items()
    ]
    present = set(points["label"])
    if BASELINE in present:
        handles.append(_dot("x", f"{BASELINE} (no cache)", markersize=6))
    if RESIDENT in present:
        handles.append(_dot("*", "all experts resident", markersize=11))
    if cast.others:
        handles.append(Line2D([], [], color=PALE, linewidth=1.2, label=_others_name(cast.others)))
    handles += [
        Line2D([], [], color=GREY, linestyle=dashes, linewidth=1.4, label=f"bound: {label}")
        for label, dashes in cast.bounds.items()
    ]
    return handles


def _dot(marker: str, label: str, **look: Any) -> Line2D:
    return Line2D([], [], color=INK, marker=marker, linestyle="", label=label, **look)


def _others_name(labels: Sequence[str]) -> str:
    return f"others: {labels[0]}" if len(labels) == 1 else f"{len(labels)} others"


# ---------------------------------------------------------------------- hit rate against budget


def _hits_figure(points: pd.DataFrame, cast: _Cast) -> Figure:
    contested = points[points["decode.hit_rate"].notna() & (points["policy"] != RESIDENT)]
    cast = replace(cast, bounds=_with_belady(cast.bounds, contested))
    bounds = contested[contested["kind"] == "bound"]
    best = bounds.groupby("expert_share")["decode.hit_rate"].max()
    figure = Figure(figsize=(_WIDTH_INCHES, 5.2))
    panels = figure.subplots(1, 1 if best.empty else 2, sharex=True, squeeze=False)[0]
    shares = sorted(contested["expert_share"].unique())
    for axes in panels:
        _share_axis(axes, shares)
    left = panels[0]
    left.plot((0, 1), (0, 1), color=PALE, linestyle=":", zorder=1)
    _hit_lines(left, contested, cast)
    _hit_line(left, contested, BASELINE, color=INK, marker="x", linestyle="", clip_on=False)
    left.set(title="Decode hits", ylabel="hit rate (% of accesses)", ylim=(0, 1.02))
    left.set_xlim(0, 1.05 * max(shares, default=1))
    if not best.empty:
        short = contested.assign(
            **{
                "decode.hit_rate": contested["expert_share"].map(best)
                - contested["decode.hit_rate"]
            }
        )
        _hit_lines(panels[1], short, cast)
        panels[1].set_ylim(bottom=0)
        panels[1].set(title="Short of the best bound", ylabel="missing (points of hit rate)")
    handles = _cast_handles(contested, cast)
    handles.append(Line2D([], [], color=PALE, linestyle=":", label="uniformly random routing"))
    _frame_figure(figure, "Hit rate against budget", points, handles, cast.others)
    return figure


def _with_belady(bounds: dict[str, Any], points: pd.DataFrame) -> dict[str, Any]:
    """Belady's rule is what hit rates are measured by, even beside better bounds."""
    if "belady" in bounds or "belady" not in set(points["label"]):
        return bounds
    return {"belady": "-", **bounds}


def _share_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xlabel("budget (% of the experts)")
    if len(shares) <= _MOST_TICKS:
        axes.set_xticks(shares)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}"))


def _hit_lines(axes: Axes, points: pd.DataFrame, cast: _Cast) -> None:
    for label in cast.others:
        _hit_line(axes, points, label, color=PALE, linewidth=0.9, zorder=2)
    for label, dashes in cast.bounds.items():
        _hit_line(axes, points, label, color=GREY, linestyle=dashes, linewidth=1.4, zorder=3)
    for label, (colour, marker) in reversed(cast.colours.items()):
        _hit_line(axes, points, label, color=colour, marker=marker, **_MARKED, zorder=4)


def _hit_line(axes: Axes, points: pd.DataFrame, label: str, **look: Any) -> None:
    own = points[points["label"] == label].sort_values("expert_share")
    if not own.empty:  # an empty line without clipping would claim the figure's corner
        axes.plot(own["expert_share"], own["decode.hit_rate"], **look)


# ---------------------------------------------------------------------- where the time goes


def _breakdown_figure(points: pd.DataFrame) -> Figure:
    nbytes = middle_budget(points)
    at_budget = points[points["expert_budget_bytes"] == nbytes]
    rows = pd.concat([at_budget, points[points["policy"] == RESIDENT]])
    rows = rows.sort_values(["tpot_ms.mean", "label"], kind="stable").drop_duplicates("label")
    shown = rows.head(_MOST_BARS - 1)
    if len(rows) > len(shown):
        shown = pd.concat([shown, rows.tail(1)])
    figure = Figure(figsize=(_WIDTH_INCHES, 1.9 + 0.27 * len(shown)))
    axes = figure.subplots()
    _bars(axes, shown)
    axes.set_xlabel("time of a decode step (ms)")
    budget_name = at_budget["budget"].iloc[0]
    of = " of the experts" if budget_name.endswith("%") else ""
    title = f"Where a decode step's time goes, budget {budget_name}{of}"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)} policies)"
    handles, _ = axes.get_legend_handles_labels()
    _frame_figure(figure, title, points, handles)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    for name, label, colour, hatch in PARTS:
        width = rows[f"breakdown_ms.{name}"].astype(float).fillna(0).to_numpy()
        if width.any():
            axes.barh(
                places,
                width,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
                height=0.78,
                label=label,
            )
        left += width
    for place, end, tpot in zip(places.tolist(), left, rows["tpot_ms.mean"], strict=True):
        axes.text(end, place, f" {three_figures(tpot)} ms", va="center", fontsize=8.5)
    axes.set_yticks(places, labels=[_bar_name(row) for row in rows.to_dict("records")])
    for tick, kind in zip(axes.get_yticklabels(), rows["kind"], strict=True):
        tick.set_color(INK if kind == "causal" else GREY)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _bar_name(row: dict[Any, Any]) -> str:
    if row["policy"] == RESIDENT:
        misfit = "" if row["memory.fits"] else ", does not fit"
        return f"{row['label']} ({row['memory.peak_bytes'] / _GIB:.1f} GiB{misfit})"
    return row["label"] if row["kind"] == "causal" else f"{row['label']} ({row['kind']})"


# ---------------------------------------------------------------------- around every figure


def _frame_figure(
    figure: Figure,
    title: str,
    points: pd.DataFrame,
    handles: Sequence[Artist],
    others: Sequence[str] = (),
) -> None:
    """Title and what it is of above; legend and notes below, without overlap."""
    height = figure.get_figheight()
    top, foot = _HEAD_INCHES / height, _FOOT_INCHES / height
    figure.text(0.01, 1 - 0.09 / height, title, va="top", fontsize=12, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.32 / height, _subject(points), va="top", fontsize=9.5, color=GREY)
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    figure.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0.006, foot),
        ncols=columns,
        fontsize=8.5,
        borderaxespad=0,
    )
    rows = math.ceil(len(handles) / columns)
    bottom = foot + (_LEGEND_ROW_INCHES * rows + 0.15) / height
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom - top))
    notes = {"left": _others_note(others), "right": _basis_note(points)}
    for side, note in notes.items():
        x = 0.01 if side == "left" else 0.995
        figure.text(x, 0.06 / height, note, ha=side, fontsize=7.5, color=GREY)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many columns as fit the figure's width, each as wide as its longest label."""
    most = 6 if len(labels) <= 6 else 4
    for columns in range(most, 1, -1):
        split = np.array_split(np.array(labels, dtype=object), columns)
        widths = [max((len(label) for label in part), default=0) for part in split]
        inches = sum(_SAMPLE_INCHES + _LETTER_INCHES * width for width in widths)
        if inches <= _WIDTH_INCHES:
            return columns
    return 1


def _subject(points: pd.DataFrame) -> str:
    """Model, hardware and whatever else all of ``points`` share."""
    first = points.iloc[0]
    names = systems(points)
    if len(names) == 1:
        where = names[0]
    elif points["hardware"].nunique() == 1:
        where = first["hardware"]
    else:
        where = f"{points['hardware'].nunique()} machines"
    return f"{first['geometry']} ({first['expert_dtype']} experts) on {where}"


def _others_note(others: Sequence[str]) -> str:
    names = ", ".join(others)
    if len(others) < 2 or len(names) > _LONGEST_NOTE:
        return ""
    return f"others: {names}"


def _basis_note(points: pd.DataFrame) -> str:
    routing = f"routing of {points['trace.model'].iloc[0]}; " if "trace.model" in points else ""
    return f"{routing}time is estimated, not validated" if is_estimated(points) else routing[:-2]
