"""The figure of a lossy policy: memory against quality, and memory against time per token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.figure_style import BLUE, GREY, INK, ORANGE, STYLE, save_figure

_INCHES_A_PANEL, _HEIGHT_INCHES = 4.6, 3.6
_LOWEST = 0.9  # of the unmodified perplexity: where the axis begins


def draw_front(result: dict[str, Any], directory: Path, stem: str) -> list[Path]:
    """Draw what `moesim quality` measured at several budgets; returns the files, PNG and SVG.

    Left: perplexity by the share of experts that are resident. With simulated times, middle: TPOT
    beside a lossless LRU cache of the same size; right: the front of time and quality. A figure
    that is there already is left alone if it is the same, and is a UserError if it is not.
    """
    timed = all("tpot_ms" in each for each in result["budgets"])
    panels = 3 if timed else 1
    with matplotlib.rc_context(STYLE):
        size = (_INCHES_A_PANEL * panels, _HEIGHT_INCHES)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        budgets = sorted(result["budgets"], key=lambda each: each["expert_budget_bytes"])
        _draw_quality(axes[0], result, budgets)
        if timed:
            _draw_time(axes[1], result, budgets)
            _draw_front(axes[2], result, budgets)
        return save_figure(figure, directory, stem)


def _percent(result: dict[str, Any], budgets: Sequence[dict[str, Any]]) -> list[float]:
    whole = result["unmodified"]["expert_bytes"]
    return [100 * each["expert_budget_bytes"] / whole for each in budgets]


def _draw_quality(axes: Axes, result: dict[str, Any], budgets: Sequence[dict[str, Any]]) -> None:
    share = _percent(result, budgets)
    perplexity = [each["perplexity"] for each in budgets]
    own = result["unmodified"]["perplexity"]
    axes.plot(share, perplexity, color=BLUE, marker="o", label=result["policy"])
    axes.axhline(own, color=GREY, linestyle="--", label=f"unmodified model, {own:.2f}")
    for x, y, each in zip(share, perplexity, budgets, strict=True):
        _label(axes, x, y, f"{100 * each['next_token_agreement']:.0f} %")
    axes.set_title(f"Quality: {result['model']}, {result['tokens']:,} tokens")
    axes.set_xlabel("expert budget, % of all experts")
    axes.set_ylabel("perplexity (label: next-token agreement)")
    axes.set_ylim(_LOWEST * own, max(perplexity) * 1.1)
    axes.legend(loc="upper right")


def _draw_time(axes: Axes, result: dict[str, Any], budgets: Sequence[dict[str, Any]]) -> None:
    share = _percent(result, budgets)
    axes.plot(share, [each["tpot_ms"] for each in budgets], color=BLUE, marker="o")
    axes.plot(share, [each["lru_tpot_ms"] for each in budgets], color=ORANGE, marker="s")
    axes.set_title(f"Time: {result['simulated']['geometry']}")
    axes.set_xlabel("expert budget, % of all experts")
    axes.set_ylabel("TPOT, ms (simulated)")
    axes.set_ylim(0, 1.15 * max(each["lru_tpot_ms"] for each in budgets))
    last = budgets[0]
    axes.annotate(
        "lru, lossless", (share[0], last["lru_tpot_ms"]), (8, 2), "data",
        textcoords="offset points", color=ORANGE,
    )  # fmt: skip
    axes.annotate(
        result["policy"], (share[0], last["tpot_ms"]), (8, 6), "data",
        textcoords="offset points", color=BLUE,
    )  # fmt: skip


def _draw_front(axes: Axes, result: dict[str, Any], budgets: Sequence[dict[str, Any]]) -> None:
    own = result["unmodified"]["perplexity"]
    looks = (("tpot_ms", BLUE, "o", None), ("lru_tpot_ms", ORANGE, "s", own))
    for name, colour, marker, perplexity in looks:
        times = [each[name] for each in budgets]
        quality = [perplexity or each["perplexity"] for each in budgets]
        label = result["policy"] if name == "tpot_ms" else "lru, lossless"
        axes.plot(times, quality, color=colour, marker=marker, linestyle="none", label=label)
        steep = name == "lru_tpot_ms"
        for x, y, each in zip(times, quality, budgets, strict=True):
            _label(axes, x, y, each["budget"], left=not steep, steep=steep)
    axes.set_title(f"Front: {result['simulated']['hardware']}")
    axes.set_xlabel("TPOT, ms (simulated; label: expert budget)")
    axes.set_ylabel("perplexity")
    axes.set_xlim(0, 1.1 * max(each["lru_tpot_ms"] for each in budgets))
    axes.set_ylim(_LOWEST * own, max(each["perplexity"] for each in budgets) * 1.1)
    axes.legend(loc="upper right")


def _label(
    axes: Axes, x: float, y: float, text: str, *, left: bool = False, steep: bool = False
) -> None:
    offset, side = ((-6, -3), "right") if left else ((4, 6), "left")
    axes.annotate(
        text, (x, y), offset, "data",
        textcoords="offset points", ha=side, color=INK, fontsize=8, rotation=45 if steep else 0,
    )  # fmt: skip
