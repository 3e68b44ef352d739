"""What all figures of a report share: fonts, axes, menus, and how they become HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from configs.figure_style import INK

RULE, PAPER = "#DDDDDD", "#FFFFFF"
FRONT = "#F2D64B"
_FONT = {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "color": INK}
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # Named one by one: the default has a button that leads to a web site.
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}
Menu = dict[str, Any]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis of the house style."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "gridcolor": RULE,
        "linecolor": INK,
        "zeroline": False,
        "automargin": True,
        **more,
    }


def log_ms_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """An axis of milliseconds, logarithmic where the values spread over more than a factor of 5."""
    if not values or max(values) <= 5 * min(values):
        return axis(title, rangemode="tozero")
    return axis(title, type="log", dtick="D2", tickformat="~g", minor={"showgrid": False})


def menu(entries: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> Menu:
    """A drop-down above a figure: what each entry is called, restyles and relays out."""
    return {
        "type": "dropdown",
        "direction": "down",
        "showactive": True,
        "active": 0,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 10},
        "bgcolor": PAPER,
        "bordercolor": "#767676",
        "font": {"size": 13},
        "buttons": [
            {"label": label, "method": "update", "args": [traces, layout]}
            for label, traces, layout in entries
        ],
    }


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Of a figure so many pixels high, as wide as its place, its legend below."""
    base: dict[str, Any] = {
        "template": "none",
        "height": height,
        "autosize": True,
        "font": {**_FONT, "size": 13},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 10, "r": 14, "t": 14, "b": 10},
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": INK, "align": "left", "font": _FONT},
        "hovermode": "closest",
        "modebar": {"orientation": "v", "bgcolor": "rgba(255,255,255,0.6)"},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0.005,
            "yanchor": "bottom",
            "maxheight": 0.6,
            "traceorder": "normal",
        },
    }
    return base | more


def as_html(figure: go.Figure, name: str, least_width: int = 0) -> Markup:
    """A place of this name for the figure, and the figure as JSON; the page draws it when seen.

    In a window narrower than ``least_width`` pixels it is scrolled sideways.
    """
    drawn = {**json.loads(figure.to_json()), "config": _CONFIG}
    text = json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c")
    style = f"height:{figure.layout.height}px;min-width:{least_width}px"
    place = Markup('<div class="figure" id="{}" style="{}"></div>').format(name, style)
    data = Markup('<script type="application/json" id="{}-figure">{}</script>')
    return place + data.format(name, Markup(text))
