"""Score EMA: evict the expert whose smoothed routing score is smallest, per layer.

Source: HybriMoE's minus recent score (MRS), arXiv 2504.05897. After every gate the scores of its
layer move: ``S <- alpha * TopP(scores) + (1 - alpha) * S``, where TopP keeps the 2k best experts'
routing scores and takes the others as 0. An expert that nearly made it thus counts as well.

Our readings: scores are the full gate probabilities; ``candidates`` is the 2 of 2k; equals of the
last of the best count as well; where a step has several tokens, TopP is each token's and their mean
counts; S starts at 0 and outlives eviction; ties leave by lowest expert. Reads the column
``gate_probs``; may be the cache beneath a prefetcher.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import CacheRule, Keys, PolicyData, Signals
from policies.memory import RESIDENT
from policies.registry import Param, Params
from policies.scored import ScoredRule

COLUMN = "gate_probs"


class ScoreEma(ScoredRule):
    """Victim: the smallest smoothed score. ``kept``: how many of a token's experts TopP keeps."""

    def __init__(self, signals: Signals, alpha: float, kept: int) -> None:
        self._signals = signals
        self._alpha = alpha
        self._kept = kept

    def bind(self, core: DecisionCore) -> None:
        """All scores 0."""
        super().bind(core)
        self._experts = core.shape.experts
        self.reset()

    def on_event(self, layer: int, keys: Keys) -> None:
        """The gate's scores are known."""
        old = self._smoothed[layer]
        rows = self._signals.layer_rows(COLUMN, layer)
        new = self._alpha * top_scores(rows, self._kept) + (1 - self._alpha) * old
        self._smoothed[layer] = new
        first = layer * self._experts
        self._scores[first : first + self._experts] = new.tolist()

    def score(self, key: int) -> float:
        """Smoothed score."""
        return self._scores[key]

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """As the base does, without a tuple a key."""
        scores, state = self._scores, self.state
        free = [key for key in self.holders[pool].difference(barred) if state[key] == RESIDENT]
        if not free:
            return None
        least = min([scores[key] for key in free])
        return min([key for key in free if scores[key] == least])

    def reset(self) -> None:
        """Scores start again."""
        shape = self.core.shape
        self._smoothed: list[Any] = [np.zeros(shape.experts)] * shape.layers
        self._scores = [0.0] * shape.keys


def top_scores(rows: Any, kept: int) -> Any:
    """Mean over tokens of each one's ``kept`` best scores, the others 0.

    ``rows``: [tokens, E], nan for a token whose layer did not run; result: float64 [E]. Scores
    equal to the last of the best count as well.
    """
    scores = rows.astype(np.float64)
    beyond = scores.shape[1] - kept
    if len(scores) == 1:
        row = scores[0]
        return row if beyond <= 0 else np.where(row >= np.partition(row, beyond)[beyond], row, 0.0)
    scores = scores[~np.isnan(scores[:, 0])]
    if beyond > 0:
        last = np.partition(scores, beyond, axis=1)[:, beyond, None]
        scores = np.where(scores >= last, scores, 0.0)
    return scores.mean(axis=0)


@cache_rule(
    "score-ema",
    scope="layer",
    params={
        "alpha": Param(float, 0.5, "weight of the newest scores", low=0.0, high=1.0),
        "candidates": Param(
            float, 2.0, "experts whose scores count, over top-k", low=1.0, high=1000
        ),
    },
    reads_signals=True,
    columns=lambda params: (COLUMN,),
    summary="evict the smallest moving average of routing scores, per layer (MRS)",
    source="HybriMoE, arXiv 2504.05897",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """From the gate probabilities of the step in progress."""
    if COLUMN not in data.columns:
        raise PolicyError(
            f"score-ema needs the column {COLUMN}, which this trace lacks: record it with "
            "`moesim trace ... --record probs`"
        )
    if data.signals is None:
        raise PolicyError("score-ema reads the gates of the step in progress: give it signals")
    kept = max(1, round(params["candidates"] * data.shape.top_k))
    return ScoreEma(data.signals, params["alpha"], kept)
