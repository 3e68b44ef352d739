"""The panels of the figures: one question each."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from configs.figure_style import BLUE, GREEN, GREY, LOOKS, ORANGE
from tracer.inspect.predictions import POPULARITY, PREDICTORS

_POPULARITY_RANGE = 8  # the heat maps' colours end at 8 times and 1/8 of a uniform share
_FEWEST_TOKENS_SHOWN = 8
_LEGEND_ROOM = 1.4
_POLICIES = {"lru": ("LRU", BLUE, "o"), "belady": ("Belady, every miss admitted", ORANGE, "s")}


def draw_skew(axes: Axes, popularity: pd.DataFrame) -> None:
    """Share of accesses against share of experts."""
    shares = _ranked(popularity)
    layers, experts = shares.shape
    cumulative = np.hstack([np.zeros((layers, 1)), np.cumsum(shares, axis=1)])
    x = np.arange(experts + 1) / experts
    _band(axes, x, cumulative.min(axis=0), cumulative.max(axis=0))
    axes.plot(x, cumulative.mean(axis=0), color=BLUE, label="mean (band: range) of layers")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="uniform")
    axes.set(
        title="Skew: share of accesses to popular experts",
        xlabel="most popular experts of the layer (%)",
        ylabel="share of accesses (%)",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    _as_percent(axes, x=True)
    axes.legend(loc="lower right")


def draw_popularity(figure: Figure, axes: Axes, popularity: pd.DataFrame) -> None:
    """Heat map layer x expert, each layer from its most to its least popular expert."""
    shares = _ranked(popularity)
    image = heat_map(axes, shares * shares.shape[1])
    axes.set(
        title="Popularity of each expert",
        xlabel="expert, by popularity in its layer (rank)",
        ylabel="MoE layer",
    )
    colour_bar(figure, image, [axes])


def _ranked(popularity: pd.DataFrame) -> NDArray:
    """Shares [L, E], each layer's experts from most to least popular."""
    table = popularity.pivot(index="layer", columns="expert", values="share").to_numpy()
    return -np.sort(-table, axis=1)


def heat_map(axes: Axes, multiples: NDArray) -> AxesImage:
    """Multiples of a uniform share [L, E] as colours, layer 0 at the bottom."""
    layers, experts = multiples.shape
    limits = (1 / _POPULARITY_RANGE, _POPULARITY_RANGE)
    image = axes.imshow(
        np.clip(multiples, *limits),
        aspect="auto",
        cmap="PuOr_r",
        norm=LogNorm(*limits),
        interpolation="nearest",
        origin="lower",
        extent=(0.5, experts + 0.5, -0.5, layers - 0.5),
    )
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: list[Axes]) -> None:
    """The key of heat maps that share colours."""
    bar = figure.colorbar(image, ax=axes, label="accesses (multiples of a uniform share)")
    ticks = [1 / _POPULARITY_RANGE, 0.25, 0.5, 1, 2, 4, _POPULARITY_RANGE]
    bar.set_ticks(ticks, labels=["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.ax.yaxis.set_minor_locator(NullLocator())


def draw_layers(axes: Axes, skew: pd.DataFrame, reuse: pd.DataFrame) -> None:
    """Skew and LRU hits, layer by layer."""
    lines = (
        ("entropy of popularity (% of log E)", skew["entropy"], GREY, "s", ":"),
        ("reuse distances below 25 % of E", reuse["lru_25_share"], ORANGE, "o", "-"),
        ("accesses to the most popular 25 %", skew["top_25_share"], BLUE, "^", "--"),
    )
    for label, values, colour, marker, style in lines:
        axes.plot(
            skew["layer"], values, color=colour, marker=marker, markersize=4, ls=style, label=label
        )
    axes.set(title="Layer by layer", xlabel="MoE layer", ylabel="share (%)")
    _leave_room_for_legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _as_percent(axes)
    axes.legend(loc="upper left")


def draw_overlap(axes: Axes, overlap: pd.DataFrame) -> None:
    """Overlap against lag."""
    lags = overlap["lag"]
    _band(axes, lags, overlap["lowest_layer"], overlap["highest_layer"])
    axes.plot(
        lags,
        overlap["overlap"],
        color=BLUE,
        marker="o",
        markersize=3,
        label="same request (band: range of layers)",
    )
    axes.plot(
        lags,
        overlap["chance"],
        color=GREY,
        linestyle="--",
        label="independent tokens, same popularity",
    )
    axes.legend(loc="upper right")
    _count_by_powers_of_two(axes, len(overlap))
    axes.set(
        title="Overlap with an earlier decode token",
        xlabel="tokens before",
        ylabel="experts chosen again (% of k)",
    )
    highest = np.nanmax(overlap[["highest_layer", "chance"]].to_numpy(), initial=0.01)
    axes.set_ylim(0, 1.3 * highest)
    _as_percent(axes)


def draw_reuse(axes: Axes, reuse: pd.DataFrame) -> None:
    """Cumulative distribution of reuse distances."""
    _band(axes, reuse["slots"], reuse["lowest_layer"], reuse["highest_layer"])
    axes.plot(
        reuse["slots"], reuse["hit_share"], color=BLUE, label="all layers (band: range of layers)"
    )
    experts = len(reuse)
    axes.plot([0, experts], [0, 1], color=GREY, linestyle="--", label="uniformly random, once warm")
    axes.axhline(
        reuse["hit_share"].iloc[-1], color=ORANGE, linestyle=":", label="all but first look-ups"
    )
    axes.set(
        title="Reuse distance",
        xlabel="experts of the layer used since, fewer than",
        ylabel="share of look-ups (%)",
        xlim=(0, experts),
    )
    _leave_room_for_legend(axes)
    _as_percent(axes)
    axes.legend(loc="upper left")


def draw_reuse_by_layer(axes: Axes, reuse: pd.DataFrame, num_experts: int) -> None:
    """Median and p90 of the reuse distance of each layer."""
    lines = (("p90", "p90", ORANGE, "s", "--"), ("median", "median", BLUE, "o", "-"))
    for label, column, colour, marker, style in lines:
        values = reuse[column].replace(np.inf, np.nan)
        label += " (gap: first look-up)" if values.isna().any() else ""
        axes.plot(
            reuse["layer"], values, color=colour, marker=marker, markersize=4, ls=style, label=label
        )
    axes.set(
        title="Layer by layer",
        xlabel="MoE layer",
        ylabel="experts of the layer used since",
        ylim=(0, _LEGEND_ROOM * num_experts),
        yticks=np.linspace(0, num_experts, 5),
    )
    axes.axhline(num_experts, color=GREY, linestyle=":", label="all experts of the layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")


def draw_hits(axes: Axes, hits: pd.DataFrame, phase: str, num_experts: int) -> None:
    """Hit rate of one phase against slots."""
    rows = hits[hits["phase"] == phase]
    for policy, (label, colour, marker) in _POLICIES.items():
        line = rows[rows["policy"] == policy]
        axes.plot(
            line["slots"], line["hit_share"], color=colour, marker=marker, markersize=3, label=label
        )
    axes.plot(
        [0, num_experts],
        [0, 1],
        color=GREY,
        linestyle="--",
        label="LRU of uniformly random routing",
    )
    axes.set(
        title=f"{phase.capitalize()}: {int(rows['accesses'].iloc[0]):,} look-ups",
        xlabel="slots a layer (experts)",
        ylabel="hit rate (%)",
        xlim=(0, num_experts),
    )
    axes.set_ylim(0, 1.02)
    _as_percent(axes)
    axes.legend(loc="lower right")


def draw_accuracy_by_distance(axes: Axes, predictions: pd.DataFrame) -> None:
    """Mean of layers against how far ahead, for k and 2k predicted experts."""
    popular = predictions[predictions["predictor"] == POPULARITY]
    ahead = predictions[predictions["predictor"] != POPULARITY]
    for predictor, (colour, marker) in zip(PREDICTORS.values(), LOOKS, strict=False):
        rows = ahead[ahead["predictor"] == predictor]
        if rows.empty:
            continue
        means = rows.groupby("distance")[["top_k_share", "top_2k_share"]].mean()
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
        axes.plot(
            means.index, means["top_2k_share"], ls="--", label=f"{predictor}, first 2k", **look
        )
        axes.plot(means.index, means["top_k_share"], label=f"{predictor}, first k", **look)
    for column, style, label in (("top_2k_share", "--", "2k"), ("top_k_share", "-", "k")):
        level = popular[column].mean()
        axes.axhline(level, color=GREY, ls=style, label=f"most popular {label} of the layer")
    axes.set(
        title="By distance (mean of layers)",
        xlabel="layers ahead",
        ylabel="token's experts among the predicted (%)",
    )
    farthest = int(ahead["distance"].max())
    axes.set_xlim(0.7, farthest + 0.3)
    axes.xaxis.set_major_locator(FixedLocator(range(1, farthest + 1)))
    axes.set_ylim(0, 1.02)
    _as_percent(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_accuracy_by_layer(axes: Axes, predictions: pd.DataFrame, predictor: str) -> None:
    """First k of one predictor against the predicted layer, a line a distance."""
    rows = predictions[predictions["predictor"] == predictor]
    for (distance, line), (colour, marker) in zip(
        rows.groupby("distance"), cycle(LOOKS), strict=False
    ):
        ahead = "1 layer ahead" if distance == 1 else f"{distance} layers ahead"
        axes.plot(
            line["layer"],
            line["top_k_share"],
            color=colour,
            marker=marker,
            markersize=4,
            label=ahead,
        )
    popular = predictions[predictions["predictor"] == POPULARITY]
    axes.plot(popular["layer"], popular["top_k_share"], color=GREY, label="most popular k")
    axes.set(
        title=f"First k of {predictor}, by layer",
        xlabel="predicted MoE layer",
        ylabel="token's experts among the predicted (%)",
        ylim=(0, 1.02),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _as_percent(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_batches(axes: Axes, batches: pd.DataFrame, num_experts: int) -> None:
    """Distinct experts a layer against the requests that decode together."""
    batch = batches["batch"]
    axes.plot(batch, batches["uniform"], color=GREY, ls="--", label="uniformly random experts")
    axes.plot(
        batch, batches["skewed"], color=ORANGE, ls=":", label="independent tokens, same popularity"
    )
    axes.plot(batch, batches["distinct"], color=BLUE, marker="o", markersize=5, label="this trace")
    _count_by_powers_of_two(axes, int(batch.max()))
    _experts_axis(axes, num_experts)
    axes.set(title="Had so many requests decoded together", xlabel="requests in the step")


def draw_distinct(axes: Axes, distinct: pd.DataFrame, num_experts: int, top_k: int) -> None:
    """Distinct experts a layer against the tokens of the steps as recorded."""
    looks = {"decode": (ORANGE, "o"), "prefill": (BLUE, "^"), "mixed": (GREEN, "s")}
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
    most = max(int(distinct["tokens"].max()), _FEWEST_TOKENS_SHOWN)
    tokens = np.geomspace(1, most, 100)
    axes.plot(
        tokens,
        num_experts * (1 - (1 - top_k / num_experts) ** tokens),
        color=GREY,
        linestyle="--",
        label="uniformly random experts",
    )
    _count_by_powers_of_two(axes, most)
    _experts_axis(axes, num_experts)
    axes.set(title="Distinct experts a step, as recorded", xlabel="tokens in the step")


def _experts_axis(axes: Axes, num_experts: int) -> None:
    axes.set(
        ylabel="distinct experts a layer",
        ylim=(0, _LEGEND_ROOM * num_experts),
        yticks=np.linspace(0, num_experts, 5),
    )
    axes.legend(loc="upper left")


def _band(
    axes: Axes, x: NDArray | pd.Series, low: NDArray | pd.Series, high: NDArray | pd.Series
) -> None:
    axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)


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
