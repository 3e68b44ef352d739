"""How good the recorded predictions are, beside predicting each layer's most popular experts."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracer.columns import DECODE, NULL_ID
from tracer.inspect.popularity import counts_by_layer
from tracer.trace import ArrayTrace, Trace

PREDICTORS = {"lookahead": "next gate", "learned": "learned"}
POPULARITY = "popularity"
_COLUMN = re.compile(r"(lookahead|learned)_(\d)")
_BLOCK_ROWS = 16_384


def predictions(
    trace: Trace | ArrayTrace, experts: NDArray, phase: NDArray, num_experts: int
) -> pd.DataFrame:
    """Predictor, distance, layer, tokens, top_k_share, top_2k_share; no row without predictions.

    `layer` is the predicted one, `distance` layers after the predicting one. The shares are of a
    token's experts that are among the first k, and all 2k, predicted for it. "popularity" (at
    distance 0) names the layer's k and 2k most popular experts, counted on the same tokens, so that
    no fixed choice does better. Decode tokens are judged; all tokens where none decodes.
    """
    judged = phase == DECODE if (phase == DECODE).any() else np.ones(len(phase), bool)
    there = sorted(filter(_COLUMN.fullmatch, trace.columns()))
    there = [name for name in there if int(name.split("_")[1]) < experts.shape[1]]
    columns = [name for kind in PREDICTORS for name in there if name.startswith(kind)]
    parts = [_of_column(trace, name, experts, judged) for name in columns]
    if not parts:
        return pd.DataFrame(columns=_empty_columns())
    parts.append(_of_popularity(experts[judged], num_experts))
    return pd.concat(parts, ignore_index=True)


def _empty_columns() -> list[str]:
    return ["predictor", "distance", "layer", "tokens", "top_k_share", "top_2k_share"]


def _of_column(
    trace: Trace | ArrayTrace, name: str, experts: NDArray, judged: NDArray
) -> pd.DataFrame:
    kind, distance = name.split("_")
    layers = np.arange(int(distance), experts.shape[1])
    totals = np.zeros((3, len(layers)), np.int64)  # tokens, right in k, right in 2k
    for start in range(0, len(experts), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(experts))
        predicted = trace.load([name], start, stop)[name][judged[start:stop], : len(layers)]
        truth = experts[start:stop][judged[start:stop], int(distance) :]
        totals += _right(np.asarray(predicted), truth)
    return _rows(PREDICTORS[kind], int(distance), layers, totals, experts.shape[2])


def _right(predicted: NDArray, truth: NDArray) -> NDArray:
    """By layer [3, L]: tokens with both; their experts among the first k, and among all."""
    k = truth.shape[2]
    both = (predicted[..., 0] != NULL_ID) & (truth[..., 0] != NULL_ID)
    found = [
        ((predicted[..., rank, None] == truth).any(axis=-1) & both).sum(axis=0)
        for rank in range(predicted.shape[2])
    ]
    return np.stack([both.sum(axis=0), sum(found[:k]), sum(found)])


def _of_popularity(experts: NDArray, num_experts: int) -> pd.DataFrame:
    k, layers = experts.shape[2], np.arange(experts.shape[1])
    ranked = -np.sort(-counts_by_layer(experts, num_experts), axis=1)
    tokens = (experts[..., 0] != NULL_ID).sum(axis=0)
    totals = np.stack([tokens, ranked[:, :k].sum(axis=1), ranked[:, : 2 * k].sum(axis=1)])
    return _rows(POPULARITY, 0, layers, totals, k)


def _rows(predictor: str, distance: int, layers: NDArray, totals: NDArray, k: int) -> pd.DataFrame:
    chosen = np.where(totals[0] > 0, totals[0] * k, np.nan)
    return pd.DataFrame(
        {
            "predictor": predictor,
            "distance": distance,
            "layer": layers,
            "tokens": totals[0],
            "top_k_share": totals[1] / chosen,
            "top_2k_share": totals[2] / chosen,
        }
    )
