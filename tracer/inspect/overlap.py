"""How much of an earlier token's experts a decode token chooses again."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracer.columns import DECODE, NULL_ID
from tracer.inspect.popularity import counts_by_layer
from tracer.inspect.sets import set_sizes

LAGS = 64


def overlap(
    arrays: dict[str, NDArray], experts: NDArray, masks: NDArray, num_experts: int
) -> pd.DataFrame:
    """Lag, overlap, lowest_layer, highest_layer, chance; of tokens of the same request."""
    decode = np.flatnonzero(arrays["phase"] == DECODE)
    # Requests that decode together alternate row by row: order rows by request, then time.
    rows = decode[np.argsort(arrays["request"][decode], kind="stable")]
    request, sets = arrays["request"][rows], masks[rows]
    sizes = set_sizes(sets)
    values = [_overlap_at(lag, request, sets, sizes) for lag in range(1, LAGS + 1)]
    table = pd.DataFrame(values, columns=["overlap", "lowest_layer", "highest_layer"])
    table.insert(0, "lag", np.arange(1, LAGS + 1))
    table["chance"] = _chance_overlap(experts[rows], num_experts)
    return table


def _overlap_at(
    lag: int, request: NDArray, sets: NDArray, sizes: NDArray
) -> tuple[float, float, float]:
    """All layers together, the lowest and the highest of them; nan where no request is so long."""
    same = request[lag:] == request[:-lag]
    common = set_sizes(sets[lag:][same] & sets[:-lag][same]).sum(axis=0)
    chosen = sizes[lag:][same].sum(axis=0)
    if not chosen.any():
        return (float("nan"),) * 3
    layers = common[chosen > 0] / chosen[chosen > 0]
    return float(common.sum() / chosen.sum()), float(layers.min()), float(layers.max())


def _chance_overlap(experts: NDArray, num_experts: int) -> float:
    """Overlap of independent tokens: sum of q squared over sum of q, q: tokens choosing it."""
    chosen = token_shares(experts, num_experts)
    return float((chosen**2).sum() / chosen.sum()) if chosen.sum() else float("nan")


def token_shares(experts: NDArray, num_experts: int) -> NDArray:
    """Share of the layer's tokens that choose each expert, [L, E], from ids [n, L, k]."""
    tokens = np.maximum((experts[..., 0] != NULL_ID).sum(axis=0), 1)
    return counts_by_layer(experts, num_experts) / tokens[:, None]
