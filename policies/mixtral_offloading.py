"""Mixtral-offloading: per-layer LRU and speculative loading by the next layer's gate.

Source: Eliseev and Mazur, "Fast inference of Mixture-of-Experts language models with offloading",
arXiv 2312.17238. As soon as a layer's own experts are under way, the next layer's gate is applied
to this layer's gate input and its best experts are loaded. A speculated expert throws nobody out
for good unless it is used: then it takes the place of the least recently used one.

Our readings: the paper's few extra buffers for speculated experts are the coldest slots of the next
layer, so they count in the budget: a speculated expert enters as least recently used, becomes the
most recent by use only, and leaves first if it was wrong (``newcomers=recent``: it enters as most
recent, and a prediction touches what is there: then this is ``next-gate`` on ``lru``). As many
experts a token as top-k (the paper tries 1 and 2 of Mixtral's top 2), times ``overfetch``; the
union over a step's tokens. The predictor costs the machine's ``next_gate`` time.
"""

from __future__ import annotations

import math

from policies.errors import PolicyError
from policies.interface import Keys, Policy, PolicyData
from policies.lru import Lru
from policies.next_gate import NextGate
from policies.registry import Param, Params, register

COLUMN = "lookahead_1"


class SpeculatedFirst(Lru):
    """LRU whose prefetched experts are the first to leave until they are used."""

    def on_insert(self, key: int) -> None:
        """A demanded key is in the order already; a prefetched one goes to its old end."""
        order = self._order[self._pool_of[key]]
        if key not in order:
            order[key] = None
            order.move_to_end(key, last=False)

    def on_predicted(self, keys: Keys) -> None:
        """Speculation touches nobody."""


@register(
    "mixtral-offloading",
    params={
        "overfetch": Param(float, 1.0, "speculated experts a token over top-k", low=0.1, high=2),
        "newcomers": Param(
            str, "cold", "where speculated experts enter the LRU order", choices=("cold", "recent")
        ),
    },
    prefetches=True,
    columns=lambda params: (COLUMN,),
    summary="per-layer LRU; the next layer's gate loads speculatively into the coldest slots",
    source="Mixtral-offloading, arXiv 2312.17238",
)
def build(params: Params, data: PolicyData) -> Policy:
    """From the trace's look-ahead column."""
    if COLUMN not in data.columns or data.lookahead is None:
        raise PolicyError(
            f"mixtral-offloading needs the column {COLUMN}, which this trace lacks: record it with "
            "`moesim trace ... --record lookahead=1`"
        )
    shape = data.shape
    width = max(1, math.floor(params["overfetch"] * shape.top_k + 0.5))
    predictions = {1: data.lookahead(COLUMN, width)}
    cache = SpeculatedFirst() if params["newcomers"] == "cold" else Lru()
    return Policy(cache, NextGate(predictions, shape.layers, shape.experts))
