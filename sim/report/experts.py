"""How often each expert of the trace is chosen, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from configs.errors import UserError
from sim.report.canvas import axis, layout, menu
from sim.report.results import Results
from tracer.inspect.popularity import popularity
from tracer.trace import Trace

_LOG_RANGE = 3  # colours end at 2**3 and 2**-3 times a uniform share
#: ColorBrewer's PuOr, reversed: purple below a uniform share, orange above
_SCALE = [
    (0.0, "#542788"),
    (0.17, "#998EC3"),
    (0.33, "#D8DAEB"),
    (0.5, "#F7F7F7"),
    (0.67, "#FEE0B6"),
    (0.83, "#F1A340"),
    (1.0, "#B35806"),
]


@dataclass(frozen=True)
class Popularity:
    """Accesses by layer and expert of the rows that were replayed; ``subject`` says which."""

    subject: str
    table: pd.DataFrame


def popularity_of(results: Results, name: str | None) -> Popularity | str:
    """The trace's, opened under its name in the results or ``name``; else why there is none.

    Raises UserError where ``name`` is given and is another trace.
    """
    try:
        trace = Trace.open(results.asker.trace if name is None else name)
        if trace.digest != results.trace_digest:
            noun = results.asker.noun
            raise UserError(
                f"{trace.path} is not the trace of this {noun} (its digest begins "
                f"{trace.digest:.8}, the {noun}'s {results.trace_digest:.8})"
            )
        experts = trace.load(["experts"], 0, results.asker.max_tokens)["experts"]
    except UserError as error:
        if name is not None:
            raise UserError(f"--trace {name}: {error}") from None
        return f"{error}; name the trace by --trace"
    geometry = trace.manifest.geometry
    subject = (
        f"{len(experts):,} tokens of {trace.manifest.model_id}, {geometry.num_moe_layers} MoE "
        f"layers x {geometry.num_experts} experts, top-{geometry.top_k}"
    )
    return Popularity(subject, popularity(experts, geometry.num_experts))


def experts_figure(found: Popularity) -> go.Figure:
    """Multiples of a uniform share, by expert id or by rank within the layer."""
    shares = _pivot(found.table, "share")
    accesses = _pivot(found.table, "accesses")
    by_rank = np.argsort(-shares, axis=1, kind="stable")
    ids = np.broadcast_to(np.arange(shares.shape[1]), shares.shape)
    orders = {"by expert": ids, "by rank in the layer": by_rank}
    entries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for label, order in orders.items():
        z, told = _cells(shares, accesses, order)
        title = "expert" if label == "by expert" else "expert, by popularity in its layer (rank)"
        entries.append((label, {"z": [z], "customdata": [told]}, {"xaxis.title.text": title}))
    figure = go.Figure(
        go.Heatmap(
            z=entries[0][1]["z"][0],
            customdata=entries[0][1]["customdata"][0],
            hovertemplate="layer %{y}, expert %{customdata[0]}<br>%{customdata[1]} accesses, "
            "%{customdata[2]} % of the layer's<br>%{customdata[3]} times a uniform share"
            "<extra></extra>",
            colorscale=_SCALE,
            zmin=-_LOG_RANGE,
            zmax=_LOG_RANGE,
            colorbar={
                "title": {
                    "text": "accesses, times a uniform share",
                    "side": "top",
                    "font": {"size": 13},
                },
                "orientation": "h",
                "thickness": 10,
                "y": -0.12,
                "yanchor": "top",
                "ypad": 30,
                "tickvals": list(range(-_LOG_RANGE, _LOG_RANGE + 1)),
                "ticktext": ["\u2264 1/8", "1/4", "1/2", "1", "2", "4", "\u2265 8"],
            },
        )
    )
    figure.update_layout(
        layout(
            max(420, 240 + 12 * len(shares)),
            xaxis=axis("expert", showgrid=False),
            yaxis=axis("MoE layer", showgrid=False),
            updatemenus=[menu(entries)],
            margin={"l": 10, "r": 14, "t": 60, "b": 10},
        )
    )
    return figure


def layers_table(found: Popularity) -> list[dict[str, Any]]:
    """By layer: the most popular experts and what share of the accesses goes to few of them."""
    shares = _pivot(found.table, "share")
    rows = []
    for layer, row in enumerate(shares):
        order = np.argsort(-row, kind="stable")
        quarter = max(1, len(row) // 4)
        rows.append(
            {
                "layer": layer,
                "top": ", ".join(str(expert) for expert in order[:4]),
                "first": float(row[order[0]]),
                "quarter": float(row[order[:quarter]].sum()),
                "unused": int((row == 0).sum()),
            }
        )
    return rows


def _pivot(table: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    values = table.pivot(index="layer", columns="expert", values=column)
    return values.to_numpy(np.float64)


def _cells(
    shares: npt.NDArray[np.float64],
    accesses: npt.NDArray[np.float64],
    order: npt.NDArray[np.int64],
) -> tuple[list[list[float]], list[list[list[str]]]]:
    """Logarithms of the multiples and what is told of each cell, each layer in its order."""
    multiples = np.take_along_axis(shares, order, axis=1) * shares.shape[1]
    logs = np.log2(np.clip(multiples, 2.0**-_LOG_RANGE, 2.0**_LOG_RANGE))
    told = [
        [
            [
                str(expert),
                f"{int(accesses[layer, expert]):,}",
                f"{shares[layer, expert] * 100:.2f}",
                f"{shares[layer, expert] * shares.shape[1]:.2f}",
            ]
            for expert in row
        ]
        for layer, row in enumerate(order.tolist())
    ]
    return np.round(logs, 4).tolist(), told
