"""A trace's summary as tables for people, and as one JSON object for programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tracer.inspect.popularity import TOP_SHARES
from tracer.inspect.predictions import POPULARITY
from tracer.trace import ArrayTrace, Trace

MOST_STEP_SIZES = 8
MOST_DOMAINS = 12
_LAGS = (1, 2, 4, 8, 16, 32, 64)
_SLOT_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


def render(console: Console, summary: dict[str, pd.DataFrame]) -> None:
    """Print the summary as tables for people."""
    console.print(_counts_table(summary["counts"]))
    console.print(_skew_table(summary["skew"]))
    if len(summary["domains"]) > 1:
        console.print(_domains_table(summary["domains"]))
    console.print(_overlap_table(summary["overlap"]))
    console.print(_reuse_table(summary["reuse"], summary["reuse_by_layer"]))
    console.print(_hits_table(summary["hits"], len(summary["reuse"])))
    if len(summary["predictions"]):
        console.print(_predictions_table(summary["predictions"]))
    console.print(_distinct_table(summary["distinct"]))
    if len(summary["batches"]) > 1:
        console.print(_batches_table(summary["batches"]))


def as_json(trace: Trace | ArrayTrace, summary: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """The summary as plain values: what it is of, and each table by column, nan and inf as None."""
    geometry = trace.manifest.geometry
    about: dict[str, Any] = {
        "model_id": trace.manifest.model_id,
        "trace_digest": trace.digest,
        "num_moe_layers": geometry.num_moe_layers,
        "num_experts": geometry.num_experts,
        "top_k": geometry.top_k,
    }
    return about | {name: _columns(table) for name, table in summary.items()}


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): [_plain(value) for value in table[name].tolist()] for name in table}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _counts_table(counts: pd.DataFrame) -> Table:
    table = _table("Trace", "", "count")
    for quantity, value in zip(counts["quantity"], counts["value"], strict=True):
        table.add_row(quantity, f"{value:,}")
    return table


def _skew_table(skew: pd.DataFrame) -> Table:
    tops = [f"top {percent} %" for percent in TOP_SHARES]
    table = _table("Share of a layer's accesses to its most popular experts", "", *tops, "entropy")
    columns = [f"top_{percent}_share" for percent in TOP_SHARES] + ["entropy"]
    for name in ("mean", "min", "max"):
        values = skew[columns].agg(name)
        label = "mean of layers" if name == "mean" else f"{name}. layer"
        table.add_row(label, *(_percent(v) for v in values.iloc[:-1]), f"{values.iloc[-1]:.3f}")
    return table


def _domains_table(domains: pd.DataFrame) -> Table:
    title = "Accesses to other experts than all domains together make"
    table = _table(title, "domain", "requests", "tokens", "share", "by chance")
    shown = domains.nlargest(MOST_DOMAINS, "tokens").sort_index()
    if len(shown) < len(domains):
        table.caption = f"the {len(shown)} largest of {len(domains)} domains"
    for row in shown.itertuples():
        counts = (f"{row.requests:,}", f"{row.tokens:,}")
        table.add_row(str(row.domain), *counts, _percent(row.elsewhere), _percent(row.chance))
    return table


def _overlap_table(overlap: pd.DataFrame) -> Table:
    shown = overlap[overlap["lag"].isin(_LAGS)]
    lags = [str(lag) for lag in shown["lag"]]
    table = _table(
        "A decode token's experts that an earlier token chose too", "tokens before", *lags
    )
    table.add_row("share", *(_percent(value) for value in shown["overlap"]))
    table.add_row("by chance", *(_percent(value) for value in shown["chance"]))
    return table


def _reuse_table(reuse: pd.DataFrame, by_layer: pd.DataFrame) -> Table:
    title = "Reuse distance (experts of the layer used since the expert's last use)"
    quarter = max(len(reuse) // 4, 1)
    lru = f"below {quarter} (25 % of experts)"
    table = _table(title, "", "median", "p90", "first look-ups", lru)
    for label, row in (
        ("mean of layers", by_layer.mean()),
        ("min. layer", by_layer.min()),
        ("max. layer", by_layer.max()),
    ):
        distances = (f"{row[name]:.1f}" for name in ("median", "p90"))
        table.add_row(
            label, *distances, _percent(row["first_share"]), _percent(row["lru_25_share"])
        )
    return table


def _hits_table(hits: pd.DataFrame, num_experts: int) -> Table:
    slots = hits["slots"].unique()
    shown = sorted(
        {int(min(slots, key=lambda s: abs(s - share * num_experts))) for share in _SLOT_SHARES}
    )
    table = _table(
        "Hit rate of a cache a layer", "slots", *(f"{s} ({s / num_experts:.0%})" for s in shown)
    )
    shares = hits.set_index(["policy", "phase", "slots"])["hit_share"]
    for phase in hits["phase"].unique():
        for policy in hits["policy"].unique():
            values = (_percent(shares[policy, phase, count]) for count in shown)
            table.add_row(f"{phase}, {policy}", *values)
    return table


def _predictions_table(predictions: pd.DataFrame) -> Table:
    title = "A token's experts among the predicted ones, mean of layers"
    table = _table(title, "predictor", "layers ahead", "first k", "first 2k", "lowest layer (k)")
    for (predictor, distance), rows in predictions.groupby(["predictor", "distance"], sort=False):
        shares = rows[["top_k_share", "top_2k_share"]].mean()
        ahead = "any" if predictor == POPULARITY else str(distance)
        values = (*shares, rows["top_k_share"].min())
        table.add_row(str(predictor), ahead, *(_percent(value) for value in values))
    return table


def _distinct_table(distinct: pd.DataFrame) -> Table:
    shown = _spread(distinct)
    title = "Distinct experts a layer and step"
    table = _table(title, "phase", "tokens", "steps", "distinct", "if uniform")
    if len(shown) < len(distinct):
        table.caption = f"{len(shown)} of {len(distinct)} step sizes"
    for row in shown.itertuples():
        values = (f"{row.tokens:,}", f"{row.steps:,}", f"{row.distinct:.2f}", f"{row.uniform:.2f}")
        table.add_row(str(row.phase), *values)
    return table


def _batches_table(batches: pd.DataFrame) -> Table:
    title = "Distinct experts of a batch"
    table = _table(title, "requests decoding", *(str(batch) for batch in batches["batch"]))
    rows = {"distinct": "distinct", "skewed": "if independent", "uniform": "if uniform"}
    for column, label in rows.items():
        table.add_row(label, *(f"{value:.1f}" for value in batches[column]))
    return table


def _spread(distinct: pd.DataFrame) -> pd.DataFrame:
    """Up to MOST_STEP_SIZES rows a phase, evenly over the sizes, smallest and largest among."""
    parts = []
    for _, rows in distinct.groupby("phase", sort=False):
        picked = np.unique(np.linspace(0, len(rows) - 1, MOST_STEP_SIZES).round().astype(int))
        parts.append(rows.iloc[picked])
    return pd.concat(parts)


def _table(title: str, label: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(label)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(share: Any) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f} %"
