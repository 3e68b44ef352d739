"""The figure of `moesim inspect`: six panels, one question each. Colours tell apart without hue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from configs.errors import UserError

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_SUFFIXES = (".png", ".svg", ".pdf")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "moesim",
}
_DPI = 150
_POPULARITY_RANGE = 8  # the heat map's colours end at 8 times and 1/8 of a uniform share
_FEWEST_TOKENS_SHOWN = 8
_LEGEND_ROOM = 1.4


def draw_summary(summary: dict[str, pd.DataFrame], title: str, path: Path) -> None:
    """Draw what `tracer.inspect.inspect_trace` measured to a new file (.png, .svg or .pdf).

    Raises UserError for another suffix and where the file exists.
    """
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: a figure ends in one of {', '.join(_SUFFIXES)}")
    if path.exists():
        raise UserError(f"{path}: exists; name a new file or remove it")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 7.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes = figure.subplots(2, 3)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        _draw_skew(axes[0, 0], summary["popularity"])
        _draw_popularity(figure, axes[0, 1], summary["popularity"])
        _draw_layers(axes[0, 2], summary["skew"], summary["reuse_by_layer"])
        _draw_overlap(axes[1, 0], summary["overlap"])
        _draw_reuse(axes[1, 1], summary["reuse"])
        _draw_distinct(axes[1, 2], summary["distinct"], summary["counts"])
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        if path.suffix == ".pdf":
            metadata = {"CreationDate": None}
        figure.savefig(path, dpi=_DPI, metadata=metadata)


def _shares(popularity: pd.DataFrame) -> np.ndarray:
    """Shares [L, E], each layer's experts from most to least popular."""
    table = popularity.pivot(index="layer", columns="expert", values="share").to_numpy()
    return -np.sort(-table, axis=1)


def _draw_skew(axes: Axes, popularity: pd.DataFrame) -> None:
    shares = _shares(popularity)
    layers, experts = shares.shape
    cumulative = np.hstack([np.zeros((layers, 1)), np.cumsum(shares, axis=1)])
    x = np.arange(experts + 1) / experts
    axes.fill_between(
        x, cumulative.min(axis=0), cumulative.max(axis=0), color=_BLUE, alpha=0.2, linewidth=0
    )
    axes.plot(x, cumulative.mean(axis=0), color=_BLUE, label="mean (band: range) of layers")
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", label="uniform")
    axes.set(
        title="a  Skew: share of accesses to popular experts",
        xlabel="most popular experts of the layer (%)",
        ylabel="share of accesses (%)",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    _as_percent(axes, x=True)
    axes.legend(loc="lower right")


def _draw_popularity(figure: Figure, axes: Axes, popularity: pd.DataFrame) -> None:
    shares = _shares(popularity)
    layers, experts = shares.shape
    limits = (1 / _POPULARITY_RANGE, _POPULARITY_RANGE)
    image = axes.imshow(
        np.clip(shares * experts, *limits),
        aspect="auto",
        cmap="PuOr_r",
        norm=LogNorm(*limits),
        interpolation="nearest",
        origin="lower",
        extent=(0.5, experts + 0.5, -0.5, layers - 0.5),
    )
    axes.grid(False)
    axes.set(
        title="b  Popularity of each expert",
        xlabel="expert, by popularity in its layer (rank)",
        ylabel="MoE layer",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, label="accesses (multiples of a uniform share)")
    ticks = [limits[0], 0.25, 0.5, 1, 2, 4, limits[1]]
    bar.set_ticks(ticks, labels=["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _draw_layers(axes: Axes, skew: pd.DataFrame, reuse: pd.DataFrame) -> None:
    lines = (
        ("entropy of popularity (% of log E)", skew["entropy"], _GREY, "s", ":"),
        ("LRU hits with slots for 25 %", reuse["lru_25_share"], _ORANGE, "o", "-"),
        ("accesses to the most popular 25 %", skew["top_25_share"], _BLUE, "^", "--"),
    )
    for label, values, colour, marker, style in lines:
        axes.plot(
            skew["layer"], values, color=colour, marker=marker, markersize=4, ls=style, label=label
        )
    axes.set(title="c  Layer by layer", xlabel="MoE layer", ylabel="share (%)")
    _leave_room_for_legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _as_percent(axes)
    axes.legend(loc="upper left")


def _draw_overlap(axes: Axes, overlap: pd.DataFrame) -> None:
    axes.plot(overlap["lag"], overlap["overlap"], color=_BLUE, marker="o", markersize=3)
    axes.plot(overlap["lag"], overlap["chance"], color=_GREY, linestyle="--")
    axes.legend(["same request", "independent tokens, same popularity"], loc="upper right")
    _count_by_powers_of_two(axes, len(overlap))
    axes.set(
        title="d  Overlap with an earlier decode token",
        xlabel="tokens before",
        ylabel="experts chosen again (% of k)",
    )
    highest = np.nanmax(overlap[["overlap", "chance"]].to_numpy(), initial=0.01)
    axes.set_ylim(0, 1.3 * highest)
    _as_percent(axes)


def _draw_reuse(axes: Axes, reuse: pd.DataFrame) -> None:
    axes.fill_between(
        reuse["slots"],
        reuse["lowest_layer"],
        reuse["highest_layer"],
        color=_BLUE,
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(
        reuse["slots"], reuse["hit_share"], color=_BLUE, label="all layers (band: range of layers)"
    )
    experts = len(reuse)
    axes.plot(
        [0, experts], [0, 1], color=_GREY, linestyle="--", label="uniformly random, once warm"
    )
    axes.axhline(
        reuse["hit_share"].iloc[-1], color=_ORANGE, linestyle=":", label="all but first look-ups"
    )
    axes.set(
        title="e  Reuse: look-ups that LRU would hit",
        xlabel="reuse distance below (experts) = LRU slots a layer",
        ylabel="share of look-ups (%)",
        xlim=(0, experts),
    )
    _leave_room_for_legend(axes)
    _as_percent(axes)
    axes.legend(loc="upper left")


def _draw_distinct(axes: Axes, distinct: pd.DataFrame, counts: pd.DataFrame) -> None:
    looks = {"decode": (_ORANGE, "o"), "prefill": (_BLUE, "^"), "mixed": (_GREEN, "s")}
    for phase, rows in distinct.groupby("phase"):
        colour, marker = looks[str(phase)]
        axes.plot(
            rows["tokens"],
            rows["distinct"],
            color=colour,
            marker=marker,
            linestyle="",
            alpha=0.8,
            label=str(phase),
        )
    number = counts.set_index("quantity")["value"]
    experts, k = number["experts a layer"], number["experts a token (k)"]
    most = max(int(distinct["tokens"].max()), _FEWEST_TOKENS_SHOWN)
    tokens = np.geomspace(1, most, 100)
    axes.plot(
        tokens,
        experts * (1 - (1 - k / experts) ** tokens),
        color=_GREY,
        linestyle="--",
        label="uniformly random experts",
    )
    _count_by_powers_of_two(axes, most)
    axes.set(
        title="f  Distinct experts a step",
        xlabel="tokens in the step",
        ylabel="distinct experts a layer",
        ylim=(0, _LEGEND_ROOM * experts),
        yticks=np.linspace(0, experts, 5),
    )
    axes.legend(loc="upper left")


def _count_by_powers_of_two(axes: Axes, most: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(2**-0.25, most * 2**0.25)
    powers = range(int(np.log2(most)) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _leave_room_for_legend(axes: Axes) -> None:
    """Shares end at 1; a legend of three lines fits above."""
    axes.set_ylim(0, _LEGEND_ROOM)
    axes.set_yticks(np.arange(0, 1.01, 0.2))


def _as_percent(axes: Axes, x: bool = False) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    if x:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
