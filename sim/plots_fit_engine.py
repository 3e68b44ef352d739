"""A fitted engine as a figure: speed by hit rate, time by misses."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.figure_style import BLUE, GREY, INK, ORANGE, STYLE, save_figure
from sim.fit_engine import Fit
from sim.fit_input import Curve
from sim.profile import Vector

_STEPS = 200


def draw_curve(curve: Curve, out_dir: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg: the curve, its 95 % interval, points measured and asked for.

    Raises UserError where a different figure is in the way.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_speed(left, curve)
        _draw_time(right, curve)
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
        )
        return save_figure(figure, out_dir, name)


def _draw_speed(axes: Axes, curve: Curve) -> None:
    fit, hits = curve.fit, _hits(curve)
    values, low, high = _band(fit, hits)
    percent = hits * 100
    with np.errstate(divide="ignore"):
        axes.fill_between(percent, 1e3 / high, 1e3 / low, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(percent, 1e3 / values, color=BLUE, label="fitted, with 95 % interval")
    _scatter(axes, [(s.hit_rate * 100, s.tokens_per_s) for s in fit.speeds], "measured")
    asked = [(hit * 100, 1e3 / fit.predict_ms(hit).value) for _, hit in curve.places]
    _scatter(axes, asked, "predicted")
    if fit.resident_ms is not None:
        # A line for the legend; far above the others it would flatten them.
        axes.plot([], [], color=GREY, linestyle="--", label=_resident(fit))
        if 1e3 / fit.resident_ms <= 3 * (1e3 / values).max():
            axes.axhline(1e3 / fit.resident_ms, color=GREY, linestyle="--")
    axes.set_ylim(0, 1.6 * max(speed for _, speed in [*_points(fit), *asked]))
    axes.set_xlabel("decode hit rate, %")
    axes.set_ylabel("tokens/s")
    axes.set_title("Speed")


def _draw_time(axes: Axes, curve: Curve) -> None:
    fit, hits = curve.fit, _hits(curve)
    values, low, high = _band(fit, hits)
    misses = np.array([fit.demand.misses(hit) for hit in hits])
    axes.fill_between(misses, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(misses, values, color=BLUE)
    _scatter(axes, [(fit.demand.misses(s.hit_rate), s.ms) for s in fit.speeds], "measured")
    asked = [(fit.demand.misses(hit), fit.predict_ms(hit).value) for _, hit in curve.places]
    _scatter(axes, asked, "predicted")
    if fit.resident_ms is not None:
        axes.axhline(fit.resident_ms, color=GREY, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("missed experts a token")
    axes.set_ylabel("ms a token")
    axes.set_title("Time")


def _resident(fit: Fit) -> str:
    return f"all resident: {1e3 / (fit.resident_ms or 1.0):.3g} tokens/s"


def _points(fit: Fit) -> list[tuple[float, float]]:
    return [(speed.hit_rate, speed.tokens_per_s) for speed in fit.speeds]


def _scatter(axes: Axes, points: list[tuple[float, float]], what: str) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour, marker = (INK, "o") if what == "measured" else (ORANGE, "D")
    axes.plot(x, y, marker, color=colour, markersize=5, label=what, zorder=3)


def _hits(curve: Curve) -> Vector:
    """From the least hit rate named to all hits, where the curve is above zero."""
    named = [speed.hit_rate for speed in curve.fit.speeds] + [hit for _, hit in curve.places]
    hits = np.linspace(min(named), 1.0, _STEPS)
    return hits[[curve.fit.curve_ms(float(hit)) > 0 for hit in hits]]


def _band(fit: Fit, hits: Vector) -> tuple[Vector, Vector, Vector]:
    ranges = [fit.predict_ms(float(hit)) for hit in hits]
    return tuple(  # type: ignore[return-value]
        np.array([getattr(each, name) for each in ranges]) for name in ("value", "low", "high")
    )
