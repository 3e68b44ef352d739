"""The figure of rankings: who comes first at which budget, a panel a link, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from configs.errors import UserError
from configs.figure_style import GREY, INK, LOOKS, PALE, STYLE, save_figure
from sim.selection import RESIDENT, is_estimated, link_name, prepare, systems

_INCHES_A_PANEL, _INCHES_A_NAME, _RATIO_INCHES, _MARGIN_INCHES = 3.5, 0.155, 2.6, 1.5
_LEAST_INCHES = 6.5
_MOST_PANELS = 4
_NAME_SIZE = 7
_MARKED: Any = {
    "markersize": 5,
    "linewidth": 1.6,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}
_RATIOS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
_MOST_TIMES = 3.2  # of the first; slower ones leave the picture


def draw_rankings(frame: pd.DataFrame, out_dir: str | Path, name: str = "rankings") -> list[Path]:
    """Places of the causal, lossless policies by budget (above) and time over the first's (below).

    A column a system of the sweep, mostly a link. Coloured: whoever comes first somewhere, then the
    best over all; grey: the others; left out: those without a cache. Returns the paths, PNG and
    SVG. Raises UserError where fewer than two policies ran, there are more than four systems, or
    another figure is in the way.
    """
    points = contestants(prepare(frame))
    names = systems(points)
    refuse_rankings(points["label"].nunique(), len(names))
    with matplotlib.rc_context(STYLE):
        return save_figure(_figure(points, names), Path(out_dir), name)


def refuse_rankings(contestants: int, systems: int) -> None:
    """Raise UserError where so many policies on so many links and machines make no figure."""
    if contestants < 2:
        raise UserError("a ranking needs two causal, lossless policies: sweep more of them")
    if systems > _MOST_PANELS:
        raise UserError(
            f"a figure of rankings has room for {_MOST_PANELS} links or machines, not "
            f"{systems}: sweep fewer"
        )


def contestants(points: pd.DataFrame) -> pd.DataFrame:
    """Causal, lossless prepared points with their ``place`` and ``ratio`` to the first.

    Without those that a larger budget does not help (no cache), which have but one.
    """
    causal = points[(points["kind"] == "causal") & (points["policy"] != RESIDENT)]
    causal = causal[~causal["saturated"]]
    swept = causal.groupby("label")["expert_budget_bytes"].transform("nunique")
    causal = causal[(swept > 1) | (swept.max() == 1)]
    groups = causal.groupby(["system", "expert_budget_bytes"])["tpot_ms.mean"]
    place = groups.rank(method="first").astype(int)
    ratio = causal["tpot_ms.mean"] / groups.transform("min")
    # A copy: a sweep has more columns than pandas likes to see grow one by one.
    ranked: pd.DataFrame = causal.copy().assign(place=place, ratio=ratio)
    return ranked


def _figure(points: pd.DataFrame, names: Sequence[str]) -> Figure:
    labels = points["label"].nunique()
    heights = (max(2.2, _INCHES_A_NAME * labels), _RATIO_INCHES)
    width = max(_LEAST_INCHES, _INCHES_A_PANEL * len(names) + 0.6)
    size = (width, sum(heights) + _MARGIN_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        2, len(names), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    looks = _looks(points)
    top = min(_MOST_TIMES, max(1.12, 1.1 * float(points["ratio"].max())))
    for column, name in enumerate(names):
        own = points[points["system"] == name]
        _places(grid[0][column], own, looks)
        _ratios(grid[1][column], own, looks, top)
        grid[0][column].set_title(_panel_title(name, points))
    grid[0][0].set_ylabel("place by TPOT (1: fastest)")
    grid[1][0].set_ylabel("TPOT over the first's")
    first = points.iloc[0]
    basis = "; time is estimated, not validated" if is_estimated(points) else ""
    figure.suptitle(
        f"Who comes first at which budget\n{first['geometry']} ({first['expert_dtype']} experts), "
        f"routing of {first['trace.model']}{basis}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=INK,
    )
    return figure


def _panel_title(name: str, points: pd.DataFrame) -> str:
    hardware = points["hardware"].unique()
    if len(hardware) > 1:
        return name
    links = {name: link_name(own["link_bytes_per_s"].iloc[0]) for name, own in _systems(points)}
    return f"{hardware[0]}, {links[name]}" if len(set(links.values())) == len(links) else name


def _systems(points: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, points[points["system"] == name]) for name in systems(points)]


def _looks(points: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of the winners, most wins first, then of the best over all."""
    wins = points[points["place"] == 1]["label"].value_counts()
    mean = np.log(points["ratio"]).groupby(points["label"]).mean().sort_values(kind="stable")
    complete = points.groupby("label")["expert_budget_bytes"].nunique()
    winners = sorted(wins.index, key=lambda label: (-wins[label], label))
    runners_up = [label for label in mean.index if complete[label] == complete.max()]
    shown = list(dict.fromkeys([*winners, *runners_up]))[: len(LOOKS)]
    return dict(zip(shown, LOOKS, strict=False))


def _places(axes: Axes, points: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    budgets = _budget_axis(axes, points)
    for label, own in points.groupby("label"):
        _line(axes, own["expert_budget_bytes"].map(budgets), own["place"], str(label), looks)
    last = points.sort_values("expert_budget_bytes").groupby("label").tail(1)
    for row in last.to_dict("records"):
        _name(axes, budgets[row["expert_budget_bytes"]], row, looks)
    axes.set_ylim(points["place"].max() + 0.7, 0.3)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(False)


def _name(axes: Axes, x: float, row: dict[Any, Any], looks: dict[str, tuple[str, str]]) -> None:
    colour = looks[row["label"]][0] if row["label"] in looks else GREY
    axes.annotate(
        row["label"],
        (x, row["place"]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=_NAME_SIZE,
        color=colour,
        fontweight="bold" if row["label"] in looks else "normal",
        annotation_clip=False,
    )


def _ratios(
    axes: Axes, points: pd.DataFrame, looks: dict[str, tuple[str, str]], top: float
) -> None:
    budgets = _budget_axis(axes, points)
    for label, own in points.groupby("label"):
        if len(own) > 1 or len(budgets) == 1:
            _line(axes, own["expert_budget_bytes"].map(budgets), own["ratio"], str(label), looks)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = [ratio for ratio in _RATIOS if ratio <= top]
    axes.set_yticks(ticks, [f"{ratio:g}" for ratio in ticks])
    axes.set_ylim(0.97, top)  # after the ticks, which widen it
    axes.set_xlabel("budget (share of the experts on the GPU)")


def _budget_axis(axes: Axes, points: pd.DataFrame) -> dict[int, int]:
    """Budgets are evenly spaced: places change between them, however far apart they are."""
    rows = points.sort_values("expert_budget_bytes").drop_duplicates("expert_budget_bytes")
    axes.set_xticks(range(len(rows)), list(rows["budget"]))
    axes.set_xlim(-0.3, len(rows) - 0.7)
    return {int(nbytes): place for place, nbytes in enumerate(rows["expert_budget_bytes"])}


def _line(axes: Axes, x: Any, y: Any, label: str, looks: dict[str, tuple[str, str]]) -> None:
    if label not in looks:
        axes.plot(x, y, color=PALE, linewidth=0.9, marker=".", markersize=3, zorder=2)
        return
    colour, marker = looks[label]
    axes.plot(x, y, color=colour, marker=marker, **_MARKED, zorder=4)
