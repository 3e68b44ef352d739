"""What a trace says about caching: skew, overlap, reuse, distinct experts; as tables and a figure.

A *look-up* is one expert needed by one layer in one step, however many of the step's tokens chose
it: what a cache is asked. An expert's *reuse distance* is the number of experts of its layer used
between its last use and the step's begin, so that an LRU cache of C experts a layer hits exactly
the look-ups with a distance below C, where no step needs more than C.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tracer.columns import DECODE, NULL_ID, PREFILL
from tracer.trace import ArrayTrace, Trace

LAGS = 64
TOP_SHARES = (10, 25, 50)
PHASES = {PREFILL: "prefill", DECODE: "decode"}
_COLUMNS = ("request", "step", "phase", "experts")
_WORD_BITS = 64
MAX_STEP_SIZES = 8

Summary = dict[str, pd.DataFrame]


def inspect_trace(trace: Trace | ArrayTrace) -> Summary:
    """Measure a trace; return tidy tables by name.

    - counts: quantity, value
    - popularity: layer, expert, accesses, share (of the layer's accesses)
    - skew: layer, top_10_share, top_25_share, top_50_share (accesses that go to the most popular
      10 % ... of experts, rounded up), entropy (of the shares, over log E: 1 is uniform)
    - overlap: lag (tokens), overlap (of a decode token's experts, the share that the token `lag`
      before chose too; nan where no request is that long), chance (the same, had the tokens been
      independent and each layer as skewed as it is)
    - reuse: slots (experts a layer), hit_share (look-ups with a reuse distance below that number,
      all layers together), lowest_layer, highest_layer (the same of single layers)
    - reuse_by_layer: layer, lookups, first_share (first look-ups of an expert), median, p90
      (distances; first look-ups count as infinite), lru_25_share (hit_share at a quarter of E)
    - distinct: phase, tokens (in the step), steps, distinct (mean experts a layer), uniform (the
      mean for uniformly random experts)

    Accesses are counted over prefill and decode. Raises UserError as `Trace.load` does.
    """
    arrays = trace.load(_COLUMNS)
    num_experts = trace.manifest.geometry.num_experts
    experts = np.asarray(arrays["experts"])
    masks = _expert_masks(experts, num_experts)
    popularity = _popularity(experts, num_experts)
    distances = [
        _reuse_distances(ids, step, num_experts)
        for ids, step in _lookups(np.asarray(arrays["step"]), experts)
    ]
    return {
        "counts": _counts(trace, arrays, sum(len(layer) for layer in distances)),
        "popularity": popularity,
        "skew": _skew(popularity, num_experts),
        "overlap": _overlap(arrays, experts, masks, num_experts),
        "reuse": _reuse(distances, num_experts),
        "reuse_by_layer": _reuse_by_layer(distances, num_experts),
        "distinct": _distinct(arrays, experts, masks, num_experts),
    }


def _counts(trace: Trace | ArrayTrace, arrays: dict[str, NDArray], lookups: int) -> pd.DataFrame:
    geometry, phase = trace.manifest.geometry, arrays["phase"]
    rows = {
        "requests": len(np.unique(arrays["request"])),
        "prefill tokens": int((phase == PREFILL).sum()),
        "decode tokens": int((phase == DECODE).sum()),
        "steps": len(np.unique(arrays["step"])),
        "MoE layers": geometry.num_moe_layers,
        "experts a layer": geometry.num_experts,
        "experts a token (k)": geometry.top_k,
        "accesses (token, layer, rank)": int((arrays["experts"] != NULL_ID).sum()),
        "look-ups (step, layer, expert)": lookups,
    }
    return pd.DataFrame({"quantity": list(rows), "value": list(rows.values())})


def _popularity(experts: NDArray, num_experts: int) -> pd.DataFrame:
    layers = experts.shape[1]
    counts = np.stack([_bincount(experts[:, layer], num_experts) for layer in range(layers)])
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), num_experts),
            "expert": np.tile(np.arange(num_experts), layers),
            "accesses": counts.reshape(-1),
            "share": (counts / totals).reshape(-1),
        }
    )


def _bincount(ids: NDArray, num_experts: int) -> NDArray:
    return np.bincount(ids[ids != NULL_ID].astype(np.int64), minlength=num_experts)


def _shares_by_layer(popularity: pd.DataFrame, num_experts: int) -> NDArray:
    """Shares [L, E] of each layer's accesses."""
    return popularity["share"].to_numpy().reshape(-1, num_experts)


def _skew(popularity: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    shares = _shares_by_layer(popularity, num_experts)
    cumulative = np.cumsum(np.sort(shares, axis=1)[:, ::-1], axis=1)
    columns: dict[str, NDArray] = {"layer": np.arange(len(shares))}
    for percent in TOP_SHARES:
        experts = -(-num_experts * percent // 100)
        columns[f"top_{percent}_share"] = cumulative[:, experts - 1]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    columns["entropy"] = -(shares * logs).sum(axis=1) / np.log(max(num_experts, 2))
    return pd.DataFrame(columns)


def _expert_masks(experts: NDArray, num_experts: int) -> NDArray:
    """Sets of experts as bits: uint64 [n, L, words], from ids [n, L, k]."""
    words = -(-num_experts // _WORD_BITS)
    masks = np.zeros((*experts.shape[:2], words), np.uint64)
    for rank in range(experts.shape[2]):
        ids = experts[..., rank].astype(np.int64)
        bits = np.left_shift(np.uint64(1), (ids % _WORD_BITS).astype(np.uint64))
        for word in range(words):
            masks[..., word] |= np.where(ids // _WORD_BITS == word, bits, np.uint64(0))
    return masks


def _set_sizes(masks: NDArray) -> NDArray:
    """Number of experts in each set of masks [..., words]."""
    return np.bitwise_count(masks).sum(axis=-1, dtype=np.int64)


def _overlap(
    arrays: dict[str, NDArray], experts: NDArray, masks: NDArray, num_experts: int
) -> pd.DataFrame:
    decode = np.flatnonzero(arrays["phase"] == DECODE)
    # Requests that decode together alternate row by row: order rows by request, then time.
    rows = decode[np.argsort(arrays["request"][decode], kind="stable")]
    request, sets = arrays["request"][rows], masks[rows]
    sizes = _set_sizes(sets)
    values = [_overlap_at(lag, request, sets, sizes) for lag in range(1, LAGS + 1)]
    chance = _chance_overlap(experts[rows], num_experts)
    lags = np.arange(1, LAGS + 1)
    return pd.DataFrame({"lag": lags, "overlap": values, "chance": chance})


def _overlap_at(lag: int, request: NDArray, sets: NDArray, sizes: NDArray) -> float:
    same = request[lag:] == request[:-lag]
    common = _set_sizes(sets[lag:][same] & sets[:-lag][same]).sum()
    chosen = sizes[lag:][same].sum()
    return float(common / chosen) if chosen else float("nan")


def _chance_overlap(experts: NDArray, num_experts: int) -> float:
    """Overlap of independent tokens: sum of q squared over sum of q, q: tokens choosing it."""
    counts = np.stack(
        [_bincount(experts[:, layer], num_experts) for layer in range(experts.shape[1])]
    )
    tokens = np.maximum((experts[..., 0] != NULL_ID).sum(axis=0), 1)
    chosen = counts / tokens[:, None]
    return float((chosen**2).sum() / chosen.sum()) if chosen.sum() else float("nan")


def _lookups(step: NDArray, experts: NDArray) -> list[tuple[NDArray, NDArray]]:
    """Each layer's look-ups in order of last use (token, then rank): expert ids and their steps."""
    k = experts.shape[2]
    index = np.repeat(np.cumsum(np.diff(step, prepend=step[0]) != 0), k)
    return [_last_uses(index, experts[:, layer].reshape(-1)) for layer in range(experts.shape[1])]


def _last_uses(step: NDArray, ids: NDArray) -> tuple[NDArray, NDArray]:
    """Drop all but the last occurrence of each id within its step; and nulls."""
    ran = ids != NULL_ID
    step, ids = step[ran], ids[ran].astype(np.int64)
    if ids.size == 0:
        return ids, step
    key = step * (int(ids.max()) + 1) + ids
    _, from_end = np.unique(key[::-1], return_index=True)
    kept = np.sort(len(key) - 1 - from_end)
    return ids[kept], step[kept]


def _reuse_distances(ids: NDArray, step: NDArray, num_experts: int) -> NDArray:
    """Depth of each look-up's expert in the LRU order at its step's begin, num_experts if new.

    That is the number of experts used later than it. One pass an expert over the whole sequence
    counts those: its last use before the step, held against the looked-up expert's.
    """
    if ids.size == 0:
        return ids
    before_step = np.searchsorted(step, step) - 1
    positions = np.arange(len(ids), dtype=np.int32)
    previous = np.full(len(ids), -1, np.int32)
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    previous[order[1:][again]] = order[:-1][again]
    depth = np.zeros(len(ids), np.int32)
    for expert in np.unique(ids):
        last = np.maximum.accumulate(np.where(ids == expert, positions, np.int32(-1)))
        depth += (last[before_step] > previous) & (before_step >= 0)
    return np.where(previous >= 0, depth, num_experts)


def _reuse(distances: list[NDArray], num_experts: int) -> pd.DataFrame:
    shares = _hit_shares(distances, num_experts)
    pooled = _hit_shares([np.concatenate(distances)], num_experts)[0]
    return pd.DataFrame(
        {
            "slots": np.arange(1, num_experts + 1),
            "hit_share": pooled,
            "lowest_layer": np.nanmin(shares, axis=0),
            "highest_layer": np.nanmax(shares, axis=0),
        }
    )


def _hit_shares(distances: list[NDArray], num_experts: int) -> NDArray:
    """Share of look-ups with a distance below 1 .. E: [sequences, E], nan without look-ups."""
    shares = np.full((len(distances), num_experts), np.nan)
    for row, values in enumerate(distances):
        if len(values):
            counts = np.bincount(values, minlength=num_experts + 1)[:num_experts]
            shares[row] = np.cumsum(counts) / len(values)
    return shares


def _reuse_by_layer(distances: list[NDArray], num_experts: int) -> pd.DataFrame:
    slots = max(num_experts // 4, 1)
    return pd.DataFrame(
        {
            "layer": np.arange(len(distances)),
            "lookups": [len(values) for values in distances],
            "first_share": [_mean(values == num_experts) for values in distances],
            "median": [_quantile(values, 0.5, num_experts) for values in distances],
            "p90": [_quantile(values, 0.9, num_experts) for values in distances],
            "lru_25_share": _hit_shares(distances, num_experts)[:, slots - 1],
        }
    )


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _quantile(distances: NDArray, quantile: float, num_experts: int) -> float:
    if len(distances) == 0:
        return float("nan")
    # A distance of one look-up, not interpolated: infinity has no neighbours.
    value = float(np.quantile(distances, quantile, method="higher"))
    return float("inf") if value == num_experts else value


def _distinct(
    arrays: dict[str, NDArray], experts: NDArray, masks: NDArray, num_experts: int
) -> pd.DataFrame:
    step, phase = arrays["step"], arrays["phase"]
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1))
    tokens = np.diff(np.append(starts, len(step)))
    sizes = _set_sizes(np.bitwise_or.reduceat(masks, starts, axis=0))
    ran = np.maximum((sizes > 0).sum(axis=1), 1)
    frame = pd.DataFrame(
        {
            "phase": _step_phases(phase, starts),
            "tokens": tokens,
            "distinct": sizes.sum(axis=1) / ran,
        }
    )
    grouped = frame.groupby(["phase", "tokens"])["distinct"].agg(["size", "mean"]).reset_index()
    table = grouped.rename(columns={"size": "steps", "mean": "distinct"})
    k = experts.shape[2]
    table["uniform"] = num_experts * (1 - (1 - k / num_experts) ** table["tokens"])
    return table


def _step_phases(phase: NDArray, starts: NDArray) -> NDArray:
    low, high = np.minimum.reduceat(phase, starts), np.maximum.reduceat(phase, starts)
    names = np.where(low == PREFILL, PHASES[PREFILL], PHASES[DECODE])
    return np.where(low == high, names, "mixed")


def render(console: Console, summary: Summary) -> None:
    """Print the summary as tables for people."""
    console.print(_counts_table(summary["counts"]))
    console.print(_skew_table(summary["skew"]))
    console.print(_overlap_table(summary["overlap"]))
    console.print(_reuse_table(summary["reuse"], summary["reuse_by_layer"]))
    console.print(_distinct_table(summary["distinct"]))


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


def _overlap_table(overlap: pd.DataFrame) -> Table:
    shown = overlap[overlap["lag"].isin([1, 2, 4, 8, 16, 32, 64])]
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


def _spread(distinct: pd.DataFrame) -> pd.DataFrame:
    """Up to MAX_STEP_SIZES rows a phase, evenly over the step sizes, smallest and largest among."""
    parts = []
    for _, rows in distinct.groupby("phase", sort=False):
        picked = np.unique(np.linspace(0, len(rows) - 1, MAX_STEP_SIZES).round().astype(int))
        parts.append(rows.iloc[picked])
    return pd.concat(parts)


def _table(title: str, label: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(label)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f} %"


def draw_inspection(trace: Trace | ArrayTrace, path: str | Path) -> None:
    """Draw the trace's summary to a new file (.png, .svg or .pdf).

    Raises UserError for another suffix and where the file exists.
    """
    # Here, not above: matplotlib takes longer to import than the tables take to compute.
    from tracer.inspect_figure import draw_summary

    geometry = trace.manifest.geometry
    title = (
        f"{trace.manifest.model_id}: {trace.rows:,} tokens, {geometry.num_moe_layers} MoE layers x"
        f" {geometry.num_experts} experts, top-{geometry.top_k}"
    )
    draw_summary(inspect_trace(trace), title, Path(path))
