"""Misses by how much they matter: in full, as a low-bit copy, or not at all. Lossy.

Source: HOBBIT (arXiv 2411.01433). A token's experts are ranked by gate weight; s is the share of
the weight that ranks before one. A miss with s <= ``full`` is copied in full, one with s <= ``low``
as a low-bit copy, any other is skipped.

Our readings: only misses are cut. An expert that is there in full is used in full; one with
s > ``full`` of which only the low-bit copy is there is computed from that. Weights are taken
relative to the token's top-k sum. With several tokens an expert's s is its smallest, so that its
most important use decides for all. Both precisions share the layer's slots, in bytes, under one
cache rule; HOBBIT's own has a pool for each and a mixed score. A low-bit expert takes the GPU as
long as a full one. HOBBIT's prefetching is left out.

Counted: gate weight that was computed at low precision (``low_mass``) and lost (``lost_mass``), one
unit a token and layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import numpy as np

from policies.caches import causal_caches, combine
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import Keys, MissRule, Policy, PolicyData
from policies.memory import ABSENT
from policies.registry import Param, Params, register

Standing = dict[int, tuple[float, float]]
_WEIGHT = itemgetter(0)


class ByImportance(MissRule):
    """Chooses each miss's precision by the gate weight before it."""

    lossy = True

    def __init__(self, full: float, low: float) -> None:
        self._full = full
        self._low = low

    def bind(self, core: DecisionCore) -> None:
        """Low-bit copies have keys of their own."""
        super().bind(core)
        assert core.signals is not None
        self._signals = core.signals
        self._state = core.memory.state
        self._experts = core.shape.experts
        self._shift = core.shape.layers * core.shape.experts

    def route(self, step: int, layer: int, keys: Keys) -> Keys:
        """Full keys for what is there or matters, low-bit keys or nothing for the rest."""
        weights = self._signals.layer_rows("weights", layer)
        state, shift = self._state, self._shift
        if ABSENT not in [state[key] for key in keys]:
            self.core.book_gate_mass(_gated(weights), 0.0, 0.0)
            return keys
        experts = self._signals.layer_rows("experts", layer)
        standing = standings(experts, weights)
        base = layer * self._experts
        chosen: list[int] = []
        low_mass = lost_mass = 0.0
        for key in keys:
            before, mass = standing[key - base]
            if state[key] != ABSENT or before <= self._full:
                chosen.append(key)
            elif before <= self._low or state[key + shift] != ABSENT:
                chosen.append(key + shift)
                low_mass += mass
            else:
                lost_mass += mass
        self.core.book_gate_mass(_gated(weights), low_mass, lost_mass)
        return chosen


def _gated(weights: Any) -> int:
    """Tokens for which the layer ran."""
    return 1 if len(weights) == 1 else int(np.isfinite(weights).any(1).sum())


def standings(experts: Any, weights: Any) -> Standing:
    """By expert: least share of a token's weight that ranks before it, and its own shares' sum.

    ``experts`` int [rows, k], -1 for none; ``weights`` [rows, k], any order. Equal weights rank as
    they come.
    """
    if len(experts) == 1:
        return _of_one(experts[0].tolist(), weights[0].tolist())
    return _of_many(experts, weights)


def _of_one(experts: list[int], weights: list[float]) -> Standing:
    """As :func:`_of_many`, quicker for one token."""
    pairs: Iterable[tuple[float, int]] = zip(weights, experts, strict=True)
    if -1 in experts:
        pairs = ((weight, expert) for weight, expert in pairs if expert >= 0)
    # Sorting backwards keeps equal weights as they come.
    ranked = sorted(pairs, key=_WEIGHT, reverse=True)
    total = sum([weight for weight, _ in ranked])
    standing: Standing = {}
    before = 0.0
    for weight, expert in ranked:
        standing[expert] = (before / total, weight / total)
        before += weight
    return standing


def _of_many(experts: Any, weights: Any) -> Standing:
    there = experts >= 0
    weights = np.where(there, weights, 0.0).astype(np.float64)
    order = np.argsort(-weights, axis=1, kind="stable")
    ranked = np.take_along_axis(weights, order, 1)
    total = np.maximum(ranked.sum(1, keepdims=True), np.finfo(float).tiny)
    before = np.empty_like(ranked)
    np.put_along_axis(before, order, np.cumsum(ranked, 1) - ranked, 1)
    ids = experts[there]
    most = int(ids.max(initial=-1)) + 1
    least, mass = np.full(most, np.inf), np.zeros(most)
    np.minimum.at(least, ids, (before / total)[there])
    np.add.at(mass, ids, (weights / total)[there])
    return {expert: (float(least[expert]), float(mass[expert])) for expert in set(ids.tolist())}


@register(
    "hobbit",
    params={
        "cache": Param(str, "lru", "cache rule beneath", choices=causal_caches),
        "full": Param(float, 0.6, "weight before a miss up to which it comes in full", 0, 1),
        "low": Param(float, 0.9, "weight before a miss up to which it comes at low bits", 0, 1),
        "low_dtype": Param(
            str, "int4", "precision of the low-bit copies", choices=("int8", "int4", "int2")
        ),
    },
    lossless=False,
    reads_signals=True,
    columns=lambda params: ("weights",),
    low_dtype=lambda params: str(params["low_dtype"]),
    summary="misses by gate weight: in full, as a low-bit copy, or skipped",
    source="HOBBIT, arXiv 2411.01433",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Over any causal cache."""
    if data.signals is None or "weights" not in data.columns:
        raise PolicyError(
            "hobbit needs the column weights, which this trace lacks: record the trace with "
            "`moesim trace ... --out DIR`, which keeps them"
        )
    if params["low"] < params["full"]:
        raise PolicyError(f"hobbit: low={params['low']:g} is below full={params['full']:g}")
    cache, scope = combine(params["cache"], data)
    rule = ByImportance(params["full"], params["low"])
    return Policy(cache, miss_rule=rule, scope=scope)
