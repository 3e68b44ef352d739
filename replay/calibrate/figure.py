"""A calibration at a glance: the link's rate by size of the copy, and the values beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from configs.figure_style import GREY, INK, STYLE, save_figure
from configs.hardware import Hardware
from configs.units import format_bytes
from replay.calibrate.profile import MEASURED

_INCHES = (14, 6)
_LOOKS = {
    "pinned_h2d": ("pinned, to the GPU", "#0072B2", "o", "-"),
    "pinned_h2d_back_to_back": ("the same, back to back", "#56B4E9", "^", "-"),
    "pinned_h2d_gpu_busy": ("the same, beside a busy GPU", "#D55E00", "s", "--"),
    "pinned_d2h": ("pinned, to the host", "#009E73", "D", "-"),
    "pageable_h2d": ("pageable, to the GPU", "#CC79A7", "v", "-"),
    "pageable_d2h": ("pageable, to the host", "#E69F00", "P", "-"),
}


def figure_paths(directory: Path, stem: str) -> list[Path]:
    """The files that :func:`draw` writes."""
    return [directory / f"{stem}.png", directory / f"{stem}.svg"]


def draw(hardware: Hardware, directory: Path, stem: str) -> list[Path]:
    """Draw a profile that has a link curve, as PNG and SVG; files of that name are replaced."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _draw_curve(left, hardware)
        _draw_values(right, hardware)
        for path in figure_paths(directory, stem):
            path.unlink(missing_ok=True)
        return save_figure(figure, directory, stem)


def value_rows(hardware: Hardware) -> list[tuple[str, str, str, bool]]:
    """Name, value and spread as text, and whether it was measured, of every value."""
    rows = []
    for part, prefix in ((hardware, ""), (hardware.predictor_ns, "predictor_ns.")):
        for field, origin in part.provenance.items():
            unit = _unit(field, prefix)
            spread = "" if origin.spread is None else f"± {shown(origin.spread, unit)}"
            measured = origin.source.startswith(MEASURED)
            rows.append((prefix + field, shown(getattr(part, field), unit), spread, measured))
    return rows


def shown(value: float, unit: str) -> str:
    """A value for people: `55.1 GB/s`, `9.3 us`, `4.2 %`."""
    if unit == "bytes":
        return format_bytes(int(value))
    if unit == "fraction":
        return f"{value * 100:.1f} %"
    if unit == "ns":
        return f"{value:.0f} ns" if value < 1000 else f"{_digits(value / 1e3)} us"
    base = "FLOP/s" if unit == "flop/s" else "B/s"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{_digits(value / scale)} {letter}{base}"
    return f"{value:.0f} {base}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _unit(field: str, prefix: str) -> str:
    if prefix or field.endswith("_ns"):
        return "ns"
    for ending, unit in (("_flops_per_s", "flop/s"), ("_per_s", "bytes/s"), ("_bytes", "bytes")):
        if field.endswith(ending):
            return unit
    return "fraction"


def _draw_curve(axes: Axes, hardware: Hardware) -> None:
    for kind, (label, colour, marker, line) in _LOOKS.items():
        points = [point for point in hardware.link_curve if point.kind == kind]
        if not points:
            continue
        sizes = [point.bytes for point in points]
        rates = [point.bytes_per_s / 1e9 for point in points]
        axes.plot(sizes, rates, line, color=colour, marker=marker, markersize=4, label=label)
        slow = [p.bytes / (p.ns + p.spread_ns) for p in points]
        fast = [p.bytes / max(p.ns - p.spread_ns, 1) for p in points]
        axes.fill_between(
            sizes, slow, np.minimum(fast, 2 * np.array(rates)), color=colour, alpha=0.15, lw=0
        )
    ticks = sorted({point.bytes for point in hardware.link_curve})[::2]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _short_bytes(int(n))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.axhline(hardware.link_bytes_per_s / 1e9, color=GREY, lw=0.8, ls=":")
    axes.set_xlabel("size of the copy")
    axes.set_ylabel("GB/s (shade: spread; dotted: the fitted rate)")
    axes.set_title(f"{hardware.name}: link by size of the copy")
    axes.legend(loc="lower right", fontsize=8)


def _short_bytes(nbytes: int) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= scale:
            return f"{nbytes / scale:g}\n{unit}"
    return str(nbytes)


def _draw_values(axes: Axes, hardware: Hardware) -> None:
    axes.axis("off")
    calibrated = "calibrated" if hardware.calibrated else "not calibrated"
    axes.set_title(f"Values ({calibrated}; grey: not measured, provisional)")
    rows = value_rows(hardware)
    others = [
        (other.name, shown(other.value, other.unit), _spread_text(other.spread, other.unit), True)
        for other in hardware.also_measured
    ]
    _column(axes, rows, 0.0, 0.47)
    _column(axes, others, 0.5, 1.0)


def _spread_text(spread: float | None, unit: str) -> str:
    return "" if spread is None else f"± {shown(spread, unit)}"


def _column(axes: Axes, rows: list[tuple[str, str, str, bool]], left: float, right: float) -> None:
    step = 1 / 28
    for index, (name, value, spread, measured) in enumerate(rows):
        y = 1 - (index + 0.5) * step
        colour = INK if measured else GREY
        style: Any = {"transform": axes.transAxes, "fontsize": 7, "color": colour, "va": "center"}
        axes.text(left, y, name, **style)
        axes.text(right - 0.13, y, value, ha="right", **style)
        axes.text(right, y, spread, ha="right", **style)
