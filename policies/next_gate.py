"""Next-gate prefetch: the gate of layer l+d applied to the gate input of layer l.

Source: Mixtral-offloading (arXiv 2312.17238), Fate (arXiv 2502.12224), SpecMD (arXiv 2602.03921).
Predictions are those recorded in the trace (columns ``lookahead_d``). Our readings: each layer is
predicted once, ``depth`` layers ahead; at layer 0 also the layers before ``depth``, each by its own
distance. Those gates run side by side: all their predictions are there after the time of one, and
no more is counted for three. Top-k times ``overfetch`` candidates a token, united over the step's
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from policies.caches import causal_caches, combine
from policies.errors import PolicyError
from policies.interface import EventTable, Keys, Policy, PolicyData, Prediction, Prefetcher
from policies.registry import Param, Params, register


class NextGate(Prefetcher):
    """``tables[d]``: what the gate of l predicts for l+d, as keys of layer l."""

    def __init__(self, tables: dict[int, EventTable], layers: int, experts: int) -> None:
        self._tables = tables
        self._depth = max(tables)
        self._layers = layers
        self._experts = experts
        self._step: dict[int, list[list[int]]] = {}

    def on_step(self, step: int) -> Iterable[Prediction]:
        """Read the step's predictions; none can be made before the first gate."""
        self._step = {distance: table.step(step) for distance, table in self._tables.items()}
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """One layer ahead by ``depth``; from the first gate, all layers up to it."""
        distances = range(1, self._depth + 1) if layer == 0 else (self._depth,)
        return [
            self._predict(step, layer, distance)
            for distance in distances
            if layer + distance < self._layers
        ]

    def _predict(self, step: int, layer: int, distance: int) -> Prediction:
        shift = distance * self._experts
        keys = [key + shift for key in self._step[distance][layer]]
        return Prediction("next_gate", step, layer + distance, keys)


def _columns(params: Params) -> tuple[str, ...]:
    return tuple(f"lookahead_{distance}" for distance in range(1, params["depth"] + 1))


@register(
    "next-gate",
    params={
        "cache": Param(str, "lru", "cache rule beneath", choices=causal_caches),
        "depth": Param(int, 1, "layers ahead", low=1, high=3),
        "overfetch": Param(float, 1.0, "candidates a token over top-k", low=0.1, high=2),
    },
    prefetches=True,
    columns=_columns,
    summary="prefetch what the gate of layer l+d says of layer l's gate input",
    source="Mixtral-offloading, arXiv 2312.17238; Fate, arXiv 2502.12224",
)
def build(params: Params, data: PolicyData) -> Policy:
    """From the trace's look-ahead columns."""
    wanted = _columns(params)
    missing = [name for name in wanted if name not in data.columns]
    if missing or data.lookahead is None:
        raise PolicyError(
            f"next-gate needs the column {missing[0] if missing else wanted[0]}, which this trace "
            "lacks: record it with `moesim trace --record lookahead=3`, or use accuracy-q"
        )
    width = max(1, math.floor(params["overfetch"] * data.shape.top_k + 0.5))
    tables = {
        distance: data.lookahead(name, width) for distance, name in enumerate(wanted, start=1)
    }
    cache, scope = combine(params["cache"], data)
    return Policy(cache, NextGate(tables, data.shape.layers, data.shape.experts), scope=scope)
