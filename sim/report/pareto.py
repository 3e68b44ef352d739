"""Latency against memory, to hover and to filter by policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from configs.figure_style import INK, LOOKS
from sim.front import front, without_slivers
from sim.report.askers import GOAL, Goal
from sim.report.canvas import FRONT, axis, layout, log_ms_axis, menu
from sim.report.looks import SYMBOLS, Look, in_template, plain, wrapped
from sim.selection import Row
from sim.wording import as_gib, as_ms, as_percent

_GIB = 2**30
_HOVER = (
    "<b>%{customdata[0]}</b><br>budget %{customdata[1]}<br>TPOT %{customdata[2]}<br>"
    "TTFT %{customdata[3]}<br>hits %{customdata[4]}<br>GPU memory %{customdata[5]}<extra></extra>"
)
_MEMORY = "GPU memory, whole model (GiB)"
_LEGEND_COLUMNS, _MENU_COLUMNS = 34, 28
_DASHES = ("solid", "dash", "dot", "dashdot")


def pareto_figure(
    points: pd.DataFrame, looks: Sequence[Look], pick: tuple[str, Row | None], goal: Goal = GOAL
) -> go.Figure:
    """One system's points by policy, its Pareto front, the pick and the target, if there is one.

    ``pick``: its name and the point. A menu filters policies; front, pick and target stay.
    """
    drawn = points[~points["saturated"]]
    present = [look for look in looks if (drawn["label"] == look.label).any()]
    on_front = set(front(points).index)
    fixed = [_front(points), _pick(*pick), *_target(points, goal)]
    traces = [
        _policy(drawn[drawn["label"] == look.label], look, on_front, goal) for look in present
    ]
    figure = go.Figure([*fixed, *traces])
    figure.update_layout(
        layout(
            440 + 21 * (len(present) + len(fixed)),
            xaxis=axis(_MEMORY, rangemode="tozero"),
            yaxis=_tpot_axis(drawn["tpot_ms.mean"].tolist(), goal),
            updatemenus=[menu(_filters(present, len(fixed)))],
            margin={"l": 10, "r": 14, "t": 60, "b": 10},
        )
    )
    _mark_limit(figure, points, goal)
    return figure


def fronts_figure(fronts: Sequence[tuple[str, pd.DataFrame]], goal: Goal = GOAL) -> go.Figure:
    """The Pareto front of every system in one figure; their names are the legend."""
    figure = go.Figure(_target(pd.concat([line for _, line in fronts]), goal))
    for number, (name, line) in enumerate(fronts):
        colour = LOOKS[number % len(LOOKS)][0]
        figure.add_scatter(
            x=_gib(line),
            y=line["tpot_ms.mean"].tolist(),
            name=wrapped(name, _LEGEND_COLUMNS),
            mode="lines+markers",
            line={"color": colour, "dash": _DASHES[number // len(LOOKS) % len(_DASHES)]},
            marker={"size": 9, "symbol": SYMBOLS[number % len(SYMBOLS)], "color": colour},
            customdata=[_told(row, goal) for row in line.to_dict("records")],
            hovertemplate=f"{in_template(name)}<br>{_HOVER}",
        )
    values = [value for _, line in fronts for value in line["tpot_ms.mean"]]
    figure.update_layout(
        layout(
            400 + 21 * len(fronts),
            xaxis=axis(_MEMORY, rangemode="tozero"),
            yaxis=_tpot_axis(values, goal),
            showlegend=True,
        )
    )
    return figure


def _front(points: pd.DataFrame) -> go.Scatter:
    line = without_slivers(front(points))
    return go.Scatter(
        x=_gib(line),
        y=line["tpot_ms.mean"].tolist(),
        name="Pareto front of choices",
        mode="lines",
        line={"color": FRONT, "width": 9},
        hoverinfo="skip",
    )


def _pick(name: str, pick: Row | None) -> go.Scatter:
    rows = [] if pick is None else [pick]
    return go.Scatter(
        x=[row["memory.peak_bytes"] / _GIB for row in rows],
        y=[row["tpot_ms.mean"] for row in rows],
        name=name,
        mode="markers",
        marker={"symbol": "circle-open", "size": 19, "color": INK, "line": {"width": 2}},
        hoverinfo="skip",
    )


def _target(points: pd.DataFrame, goal: Goal) -> list[go.Scatter]:
    if goal.tpot_ms is None:
        return []
    return [
        go.Scatter(
            x=[0, max(_gib(points))],
            y=[goal.tpot_ms] * 2,
            name=f"target: at most {goal.tpot_ms:g} ms",
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    ]


def _tpot_axis(values: Sequence[float], goal: Goal) -> dict[str, Any]:
    target = [] if goal.tpot_ms is None else [goal.tpot_ms]
    return log_ms_axis(f"TPOT (ms a token, {goal.of})", [*values, *target])


def _policy(rows: pd.DataFrame, look: Look, on_front: set[Any], goal: Goal) -> go.Scatter:
    rows = rows.sort_values("memory.peak_bytes", kind="stable")
    return go.Scatter(
        x=_gib(rows),
        y=rows["tpot_ms.mean"].tolist(),
        name=wrapped(look.name, _LEGEND_COLUMNS),
        mode="lines+markers",
        line={"color": look.colour, "dash": look.dash, "width": 1.6},
        marker={
            "symbol": look.symbol,
            "opacity": 1,
            "color": look.colour,
            "size": [11 if name in on_front else 8 for name in rows.index],
            "line": {"width": 1.6 if look.symbol.endswith("-open") else 0.6, "color": look.colour},
        },
        customdata=[_told(row, goal) for row in rows.to_dict("records")],
        hovertemplate=_HOVER,
    )


def _told(row: Row, goal: Goal) -> list[str]:
    limit, whose = _limit(row, goal)
    misfit = "" if row["memory.fits"] else f" ({whose}: {as_gib(limit)})"
    rate = row["decode.hit_rate"]
    return [
        plain(row["label"] if row["kind"] == "causal" else f"{row['label']} ({row['kind']})"),
        plain(row["budget"]),
        as_ms(row["tpot_ms.mean"]),
        as_ms(row["ttft_ms.mean"]),
        "-" if pd.isna(rate) else f"{as_percent(rate)} %",
        as_gib(row["memory.peak_bytes"]) + misfit,
    ]


def _gib(rows: pd.DataFrame) -> list[float]:
    return [value / _GIB for value in rows["memory.peak_bytes"]]


def _limit(row: Row, goal: Goal) -> tuple[float, str]:
    """Bytes that the whole model may take, and what sets them."""
    if goal.limit_bytes is None:
        return float(row["memory.gpu_memory_bytes"]), "GPU"
    return float(goal.limit_bytes), "limit"


def _filters(looks: Sequence[Look], fixed: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """All, by kind where there are several, and each policy alone beside the ``fixed`` first."""
    wanted = [("all policies", {look.label for look in looks})]
    choices = {look.label for look in looks if look.kind == "causal"}
    bounds = {look.label for look in looks if look.kind == "bound"}
    if choices and len(choices) < len(looks):
        wanted.append(("choices only", choices))
        if bounds and len(choices | bounds) < len(looks):
            wanted.append(("choices and bounds", choices | bounds))
    wanted += [(wrapped(f"only {look.name}", _MENU_COLUMNS), {look.label}) for look in looks]
    return [
        (name, {"visible": [True] * fixed + [look.label in shown for look in looks]}, {})
        for name, shown in wanted
    ]


def _mark_limit(figure: go.Figure, points: pd.DataFrame, goal: Goal) -> None:
    """The memory there is, where it is not far beyond the points."""
    nbytes, whose = _limit(points.iloc[0], goal)
    limit = nbytes / _GIB
    if limit > 1.25 * float(points["memory.peak_bytes"].max()) / _GIB:
        return
    figure.add_vline(x=limit, line_width=1.5, line_color=INK)
    figure.add_annotation(
        x=limit,
        y=0.99,
        yref="paper",
        text=f"{whose}: {limit:.1f} GiB",
        textangle=-90,
        showarrow=False,
        xanchor="left",
        yanchor="top",
    )
