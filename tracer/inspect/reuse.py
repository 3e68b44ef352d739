"""Reuse distances: how many experts of the layer were used since an expert's last use."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def reuse_distances(ids: NDArray, step: NDArray, num_experts: int) -> NDArray:
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


def reuse(distances: list[NDArray], num_experts: int) -> pd.DataFrame:
    """Slots, hit_share, lowest_layer, highest_layer; from the distances of each layer."""
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


def reuse_by_layer(distances: list[NDArray], num_experts: int) -> pd.DataFrame:
    """Layer, lookups, first_share, median, p90, lru_25_share."""
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
