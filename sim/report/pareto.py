"""Latency against memory, to hover and to filter by policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from configs.figure_style import INK, LOOKS
from sim.front import front, without_slivers
from sim.ranking import pick_of
from sim.report.canvas import FRONT, axis, layout, log_ms_axis, menu
from sim.report.looks import SYMBOLS, Look, plain, wrapped
from sim.selection import Row
from sim.wording import as_gib, as_ms, as_percent

_GIB = 2**30
_HOVER = (
    "<b>%{customdata[0]}</b><br>budget %{customdata[1]}<br>TPOT %{customdata[2]}<br>"
    "TTFT %{customdata[3]}<br>hits %{customdata[4]}<br>GPU memory %{customdata[5]}<extra></extra>"
)
_MEMORY = "GPU memory, whole model (GiB)"
_TPOT = "TPOT (ms a token, mean)"
_LEGEND_COLUMNS, _MENU_COLUMNS = 34, 28
_FIXED = 2  # traces that no menu hides: the front and the pick
_DASHES = ("solid", "dash", "dot", "dashdot")


def pareto_figure(points: pd.DataFrame, looks: Sequence[Look]) -> go.Figure:
    """One system's points by policy, its Pareto front and the pick; a menu filters policies."""
    drawn = points[~points["saturated"]]
    present = [look for look in looks if (drawn["label"] == look.label).any()]
    on_front = set(front(points).index)
    traces = [_front(points), _pick(points)]
    traces += [_policy(drawn[drawn["label"] == look.label], look, on_front) for look in present]
    figure = go.Figure(traces)
    figure.update_layout(
        layout(
            440 + 21 * (len(present) + _FIXED),
            xaxis=axis(_MEMORY, rangemode="tozero"),
            yaxis=log_ms_axis(_TPOT, drawn["tpot_ms.mean"].tolist()),
            updatemenus=[menu(_filters(present))],
            margin={"l": 10, "r": 14, "t": 60, "b": 10},
        )
    )
    _mark_limit(figure, points)
    return figure


def fronts_figure(fronts: Sequence[tuple[str, pd.DataFrame]]) -> go.Figure:
    """The Pareto front of every system in one figure; their names are the legend."""
    figure = go.Figure()
    for number, (name, line) in enumerate(fronts):
        colour = LOOKS[number % len(LOOKS)][0]
        figure.add_scatter(
            x=_gib(line),
            y=line["tpot_ms.mean"].tolist(),
            name=wrapped(name, _LEGEND_COLUMNS),
            mode="lines+markers",
            line={"color": colour, "dash": _DASHES[number // len(LOOKS) % len(_DASHES)]},
            marker={"size": 9, "symbol": SYMBOLS[number % len(SYMBOLS)], "color": colour},
            customdata=[_told(row) for row in line.to_dict("records")],
            hovertemplate=f"{plain(name)}<br>{_HOVER}",
        )
    values = [value for _, line in fronts for value in line["tpot_ms.mean"]]
    figure.update_layout(
        layout(
            400 + 21 * len(fronts),
            xaxis=axis(_MEMORY, rangemode="tozero"),
            yaxis=log_ms_axis(_TPOT, values),
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


def _pick(points: pd.DataFrame) -> go.Scatter:
    pick = pick_of(points)
    rows = points.iloc[:0] if pick is None else points.loc[[pick.name]]
    return go.Scatter(
        x=_gib(rows),
        y=rows["tpot_ms.mean"].tolist(),
        name="recommended",
        mode="markers",
        marker={"symbol": "circle-open", "size": 19, "color": INK, "line": {"width": 2}},
        hoverinfo="skip",
    )


def _policy(rows: pd.DataFrame, look: Look, on_front: set[Any]) -> go.Scatter:
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
        customdata=[_told(row) for row in rows.to_dict("records")],
        hovertemplate=_HOVER,
    )


def _told(row: Row) -> list[str]:
    misfit = (
        "" if row["memory.fits"] else f" (the GPU has {as_gib(row['memory.gpu_memory_bytes'])})"
    )
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


def _filters(looks: Sequence[Look]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """All, by kind where there are several, and each policy alone beside front and pick."""
    wanted = [("all policies", {look.label for look in looks})]
    choices = {look.label for look in looks if look.kind == "causal"}
    bounds = {look.label for look in looks if look.kind == "bound"}
    if choices and len(choices) < len(looks):
        wanted.append(("choices only", choices))
        if bounds and len(choices | bounds) < len(looks):
            wanted.append(("choices and bounds", choices | bounds))
    wanted += [(wrapped(f"only {look.name}", _MENU_COLUMNS), {look.label}) for look in looks]
    return [
        (name, {"visible": [True] * _FIXED + [look.label in shown for look in looks]}, {})
        for name, shown in wanted
    ]


def _mark_limit(figure: go.Figure, points: pd.DataFrame) -> None:
    """The GPU's memory, where it is not far beyond the points."""
    limit = float(points["memory.gpu_memory_bytes"].iloc[0] / _GIB)
    if limit > 1.25 * float(points["memory.peak_bytes"].max()) / _GIB:
        return
    figure.add_vline(x=limit, line_width=1.5, line_color=INK)
    figure.add_annotation(
        x=limit,
        y=0.99,
        yref="paper",
        text=f"GPU: {limit:.1f} GiB",
        textangle=-90,
        showarrow=False,
        xanchor="left",
        yanchor="top",
    )
