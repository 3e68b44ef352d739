"""The ranking at every budget as one grid: policies down, budgets across."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from configs.figure_style import INK
from sim.ranking import TIE_MARGIN, by_budget
from sim.report.canvas import axis, layout
from sim.report.looks import Look, pitch_of, plain, wrapped
from sim.selection import choices
from sim.wording import three_figures

_SLOWEST = 4  # times the fastest choice, from which on the colour is the same
_ABSENT = "#E9E9E9"
_BARE = {"showgrid": False, "showline": False, "ticks": "", "tickfont": {"size": 12}}
_SCALE = [(0.0, "#FFFFFF"), (0.15, "#DCEBF5"), (0.5, "#A6CEE8"), (1.0, "#5AA3CF")]


def grid_figure(points: pd.DataFrame, looks: Sequence[Look]) -> go.Figure:
    """One system's TPOT in ms; the colour is its ratio to the fastest choice of that budget."""
    groups = by_budget(points)
    present = [look for look in looks if (points["label"] == look.label).any()]
    budgets = [str(group["budget"].iloc[0]) for group in groups.values()]
    ratios: list[list[float | None]] = []
    texts: list[list[str]] = []
    told: list[list[str]] = []
    for look in present:
        cells = [_cell(group, look) for group in groups.values()]
        ratios.append([ratio for ratio, _, _ in cells])
        texts.append([text for _, text, _ in cells])
        told.append([words for _, _, words in cells])
    figure = go.Figure(
        go.Heatmap(
            x=[plain(budget.replace(" %", "%")) for budget in budgets],
            y=[wrapped(look.name) for look in present],
            z=ratios,
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 12, "color": INK},
            customdata=told,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=_SCALE,
            zmin=1,
            zmax=_SLOWEST,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            colorbar={
                "title": {"text": "times the fastest choice", "side": "top", "font": {"size": 13}},
                "orientation": "h",
                "thickness": 10,
                "y": 0,
                "yanchor": "top",
                "ypad": 18,
                "tickvals": [1, 2, 3, _SLOWEST],
                "ticktext": ["1", "2", "3", f"\u2265 {_SLOWEST}"],
            },
        )
    )
    figure.update_layout(
        layout(
            130 + pitch_of([look.name for look in present]) * len(present),
            xaxis=axis("", type="category", side="top", tickangle=0, **_BARE),
            yaxis=axis("", type="category", autorange="reversed", **_BARE),
            plot_bgcolor=_ABSENT,
        )
    )
    return figure


def _cell(group: pd.DataFrame, look: Look) -> tuple[float | None, str, str]:
    """Ratio, text and words of a policy at a budget; nothing where it was not swept there."""
    own = group[group["label"] == look.label]
    if own.empty:
        return None, "", ""
    row = own.iloc[0]
    fitting = choices(group)
    causal = group[group["kind"] == "causal"]
    rivals = next(rows for rows in (fitting, causal, group) if not rows.empty)
    fastest = float(rivals["tpot_ms.mean"].min())
    ratio = float(row["tpot_ms.mean"]) / fastest
    text = three_figures(row["tpot_ms.mean"])
    words = f"{plain(look.name)}<br>budget {plain(row['budget'])}: {text} ms a token"
    if not row["memory.fits"]:
        return ratio, f"({text})", f"{words}<br>does not fit"
    if row.name in fitting.index and ratio <= 1 + TIE_MARGIN:
        return ratio, f"<b>{text}</b>", f"{words}<br>fastest, or within 2 % of it"
    return ratio, text, f"{words}<br>{ratio:.2f} times the fastest choice"
