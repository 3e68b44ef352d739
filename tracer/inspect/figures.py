"""The figures of `moesim inspect`: a summary of six panels, and a figure a topic."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from configs.figure_style import DPI, GREY, INK, STYLE, save_figure
from configs.files import prepare_figure
from tracer.inspect import panels
from tracer.inspect.predictions import POPULARITY

Summary = dict[str, pd.DataFrame]

_PANEL_INCHES = (5.2, 4.2)
_HEAD_INCHES = 0.55
_MOST_DOMAINS = 8
_LONGEST_NAME = 28


def draw_summary(summary: Summary, subject: str, path: Path) -> None:
    """Draw the main tables to a new file (.png, .svg or .pdf).

    `subject`: the line above the panels. Raises UserError as :func:`configs.files.prepare_figure`.
    """
    prepare_figure(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes = figure.subplots(2, 3)
        figure.suptitle(subject, x=0.01, ha="left", fontsize=12)
        panels.draw_skew(axes[0, 0], summary["popularity"])
        panels.draw_popularity(figure, axes[0, 1], summary["popularity"])
        panels.draw_layers(axes[0, 2], summary["skew"], summary["reuse_by_layer"])
        panels.draw_overlap(axes[1, 0], summary["overlap"])
        panels.draw_hits(axes[1, 1], summary["hits"], _main_phase(summary), _experts(summary))
        axes[1, 1].set_title(f"Hit rate of a cache a layer, {_main_phase(summary)}")
        panels.draw_distinct(axes[1, 2], summary["distinct"], _experts(summary), _top_k(summary))
        for letter, panel in zip("abcdef", axes.flat, strict=True):
            panel.set_title(f"{letter}  {panel.get_title(loc='left')}")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        if path.suffix == ".pdf":
            metadata = {"CreationDate": None}
        figure.savefig(path, dpi=DPI, metadata=metadata)


def draw_topics(summary: Summary, subject: str, out_dir: Path) -> list[Path]:
    """Draw a PNG and an SVG a topic to a directory; the paths.

    A topic that the trace says nothing about is left out, see :func:`missing_topics`. Raises
    UserError where another file is in the way.
    """
    paths: list[Path] = []
    for name, draw in _TOPICS.items():
        if not _has(summary, name):
            continue
        with matplotlib.rc_context(STYLE):
            paths += save_figure(draw(summary, subject), out_dir, name)
    return paths


def missing_topics(summary: Summary) -> dict[str, str]:
    """Topics that cannot be drawn, and why."""
    return {name: why for name, why in _WHY_MISSING.items() if not _has(summary, name)}


_WHY_MISSING = {
    "domains": "the requests are of one domain",
    "overlap": "no request has two decode tokens",
    "predictions": "the trace has no lookahead or learned column",
    "batches": "no two requests decode",
}


def _has(summary: Summary, topic: str) -> bool:
    if topic == "overlap":
        return bool(summary["overlap"]["overlap"].notna().any())
    if topic == "predictions":
        return len(summary["predictions"]) > 0
    if topic == "batches":
        return len(summary["batches"]) > 1
    if topic == "domains":
        return len(summary["domains"]) > 1
    return True


def _experts(summary: Summary) -> int:
    return len(summary["reuse"])


def _top_k(summary: Summary) -> int:
    return int(summary["counts"].set_index("quantity")["value"]["experts a token (k)"])


def _main_phase(summary: Summary) -> str:
    """Decode where anything decodes."""
    return str(summary["hits"]["phase"].iloc[0])


def _canvas(
    title: str, subject: str, columns: int, rows: int = 1, size: tuple[float, float] = _PANEL_INCHES
) -> tuple[Figure, list[Axes]]:
    """A figure with its title and subject above `rows` x `columns` panels."""
    width, height = max(columns * size[0], 7.0), rows * size[1] + _HEAD_INCHES
    figure = Figure(figsize=(width, height))
    figure.text(
        0.08 / width, 1 - 0.09 / height, title, va="top", fontsize=12, fontweight="bold", color=INK
    )
    figure.text(0.08 / width, 1 - 0.32 / height, subject, va="top", fontsize=9.5, color=GREY)
    below_head = (0, 0, 1, 1 - _HEAD_INCHES / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, rect=below_head))
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def _skew_figure(summary: Summary, subject: str) -> Figure:
    figure, axes = _canvas("How unevenly are the experts used?", subject, 3, size=(4.8, 4.2))
    panels.draw_skew(axes[0], summary["popularity"])
    panels.draw_popularity(figure, axes[1], summary["popularity"])
    panels.draw_layers(axes[2], summary["skew"], summary["reuse_by_layer"])
    return figure


def _domains_figure(summary: Summary, subject: str) -> Figure:
    """A heat map of all tokens, and one a domain, experts in the order of all."""
    maps = _domain_maps(summary)
    if len(maps) <= len(summary["domains"]):
        subject += f"; the {len(maps) - 1} largest of {len(summary['domains'])} domains"
    columns = 2 if len(maps) == 4 else min(len(maps), 3)
    rows = math.ceil(len(maps) / columns)
    title = "Which experts does each domain use?"
    size = (4.6, 2.6) if rows > 1 else (4.8, 4.2)
    figure, axes = _canvas(title, subject, columns, rows, size=size)
    order = np.argsort(-maps[0][1], axis=1, kind="stable")
    for panel, (name, multiples) in zip(axes, maps, strict=False):
        image = panels.heat_map(panel, np.take_along_axis(multiples, order, axis=1))
        panel.set_title(name)
    for panel in axes[len(maps) :]:
        panel.remove()
    panels.colour_bar(figure, image, axes[: len(maps)])
    figure.supxlabel("expert of the layer, by popularity over all tokens (rank)", fontsize=9)
    figure.supylabel("MoE layer", fontsize=9)
    return figure


def _domain_maps(summary: Summary) -> list[tuple[str, np.ndarray]]:
    """Title and multiples of a uniform share [L, E]: all tokens, then the largest domains."""
    experts = _experts(summary)
    domains = summary["domains"]
    whole = summary["popularity"]["share"].to_numpy().reshape(-1, experts) * experts
    maps = [(f"all: {domains['tokens'].sum():,} tokens", whole)]
    shown = domains.nlargest(_MOST_DOMAINS, "tokens").sort_index()
    tables = dict(list(summary["domain_popularity"].groupby("domain")))
    for row in shown.to_dict("records"):
        name = str(row["domain"])
        short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        multiples = tables[name]["share"].to_numpy().reshape(-1, experts) * experts
        maps.append((f"{short}: {row['tokens']:,} tokens", multiples))
    return maps


def _overlap_figure(summary: Summary, subject: str) -> Figure:
    figure, axes = _canvas("How much of an earlier token's experts comes again?", subject, 1)
    panels.draw_overlap(axes[0], summary["overlap"])
    return figure


def _reuse_figure(summary: Summary, subject: str) -> Figure:
    figure, axes = _canvas("How soon is an expert used again?", subject, 2)
    panels.draw_reuse(axes[0], summary["reuse"])
    panels.draw_reuse_by_layer(axes[1], summary["reuse_by_layer"], _experts(summary))
    return figure


def _hits_figure(summary: Summary, subject: str) -> Figure:
    # A prefill that finds an empty cache, and no other, is no curve.
    best = summary["hits"].groupby("phase", sort=False)["hits"].max()
    phases = [str(phase) for phase in best.index if best[phase]] or [_main_phase(summary)]
    figure, axes = _canvas("How much does a cache a layer hit?", subject, len(phases))
    for panel, phase in zip(axes, phases, strict=True):
        panels.draw_hits(panel, summary["hits"], phase, _experts(summary))
    return figure


def _predictions_figure(summary: Summary, subject: str) -> Figure:
    table = summary["predictions"]
    kinds = [kind for kind in table["predictor"].unique() if kind != POPULARITY]
    title = "How often are the recorded predictions right?"
    figure, axes = _canvas(title, subject, 1 + len(kinds), size=(4.8, 4.8))
    panels.draw_accuracy_by_distance(axes[0], table)
    for panel, kind in zip(axes[1:], kinds, strict=True):
        panels.draw_accuracy_by_layer(panel, table, kind)
    return figure


def _batches_figure(summary: Summary, subject: str) -> Figure:
    recorded = summary["distinct"]
    many_rows = bool(recorded["tokens"].max() > 1)
    figure, axes = _canvas("How many experts does a batch need?", subject, 1 + many_rows)
    panels.draw_batches(axes[0], summary["batches"], _experts(summary))
    if many_rows:
        panels.draw_distinct(axes[1], recorded, _experts(summary), _top_k(summary))
    return figure


_TOPICS: dict[str, Callable[[Summary, str], Figure]] = {
    "skew": _skew_figure,
    "domains": _domains_figure,
    "overlap": _overlap_figure,
    "reuse": _reuse_figure,
    "hits": _hits_figure,
    "predictions": _predictions_figure,
    "batches": _batches_figure,
}
