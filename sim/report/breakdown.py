"""Where a decode step's time goes, a bar a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sim.plots import PARTS
from sim.ranking import by_budget
from sim.report.canvas import axis, layout, menu
from sim.report.looks import Look, pitch_of, plain, wrapped
from sim.selection import middle_budget
from sim.wording import as_ms

_ROOM = 1.25  # for the totals beside the bars
_HATCHES = {"stall_late": "/"}


def breakdown_figure(points: pd.DataFrame, looks: Sequence[Look]) -> go.Figure:
    """One system's steps by part, at the budget that a menu chooses; the middle one first."""
    groups = by_budget(points)
    first = middle_budget(points)
    ordered = [first, *(budget for budget in groups if budget != first)]
    names = {look.label: look.name for look in looks}
    traces: list[Any] = []
    owners: list[int] = []
    for budget in ordered:
        drawn = _bars(groups[budget], names)
        traces += drawn
        owners += [budget] * len(drawn)
    for trace, owner in zip(traces, owners, strict=True):
        trace.visible = owner == first
    most = max(groups[budget]["label"].nunique() for budget in ordered)
    slowest = float(points["step_ms"].max())
    figure = go.Figure(traces)
    entries = [
        (
            f"budget {plain(groups[budget]['budget'].iloc[0])}",
            {"visible": [owner == budget for owner in owners]},
            {"yaxis.categoryarray": _order(groups[budget], names)},
        )
        for budget in ordered
    ]
    figure.update_layout(
        layout(
            230 + (4 + pitch_of([look.name for look in looks])) * most,
            barmode="stack",
            bargap=0.25,
            xaxis=axis("ms a decode step", range=[0, _ROOM * slowest]),
            yaxis=axis(
                "",
                type="category",
                autorange="reversed",
                categoryorder="array",
                categoryarray=_order(groups[first], names),
                showgrid=False,
                tickfont={"size": 12},
            ),
            updatemenus=[menu(entries)],
            margin={"l": 10, "r": 14, "t": 60, "b": 10},
        )
    )
    return figure


def _order(group: pd.DataFrame, names: dict[str, str]) -> list[str]:
    ordered = group.sort_values(["step_ms", "label"], kind="stable")
    return [wrapped(names[label]) for label in ordered["label"]]


def _bars(group: pd.DataFrame, names: dict[str, str]) -> list[Any]:
    rows = group.sort_values(["step_ms", "label"], kind="stable")
    places = _order(group, names)
    bars: list[Any] = []
    for part, title, colour, _ in PARTS:
        values = rows[f"breakdown_ms.{part}"].astype(float).fillna(0).tolist()
        if any(values):
            bars.append(
                go.Bar(
                    x=values,
                    y=places,
                    name=title,
                    orientation="h",
                    marker={
                        "color": colour,
                        "line": {"color": "white", "width": 0.5},
                        "pattern": {
                            "shape": _HATCHES.get(part, ""),
                            "fillmode": "overlay",
                            "fgcolor": "white",
                            "size": 7,
                        },
                    },
                    customdata=[
                        [as_ms(value), plain(label)]
                        for value, label in zip(values, rows["label"], strict=True)
                    ],
                    hovertemplate="%{customdata[1]}<br>"
                    + title
                    + ": %{customdata[0]}<extra></extra>",
                )
            )
    totals = rows["step_ms"].tolist()
    bars.append(
        go.Scatter(
            x=totals,
            y=places,
            mode="text",
            text=[f" {as_ms(total)}" for total in totals],
            textposition="middle right",
            cliponaxis=False,
            showlegend=False,
            hoverinfo="skip",
        )
    )
    return bars
