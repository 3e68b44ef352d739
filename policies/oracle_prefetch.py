"""Prefetch by perfect knowledge, and by knowledge of a given accuracy.

``oracle-prefetch``: the experts of the event ``depth`` layers ahead, all right: the bound on what
prefetching can bring over a link. ``accuracy-q``: the same with each expert wrong with probability
1 - q (a wrong one is drawn among those the event does not need): it stands for a predictor of known
accuracy where a trace has no predictions. Both are oracles: no causal predictor knows the truth.

Our readings: depth counts events, so with ``wrap`` the last layers look into the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from policies.caches import all_caches, combine
from policies.errors import PolicyError
from policies.interface import EventTable, Keys, Policy, PolicyData, Prediction, Prefetcher
from policies.registry import Param, Params, register

_CHUNK_EVENTS = 4096


class OraclePrefetch(Prefetcher):
    """Names the keys of the event ``depth`` ahead, as ``table`` has them."""

    def __init__(self, table: EventTable, depth: int, wrap: bool, source: str) -> None:
        self._table = table
        self._depth = depth
        self._wrap = wrap
        self._source = source
        self._layers = table.layers
        self._steps = len(table) // table.layers
        self._first = True

    def on_step(self, step: int) -> Iterable[Prediction]:
        """The layers that no earlier gate of this run could announce."""
        self._now = self._table.step(step)
        has_next = self._wrap and step + 1 < self._steps
        self._next = self._table.step(step + 1) if has_next else []
        announced = self._wrap and not self._first
        self._first = False
        if announced:
            return ()
        return [
            Prediction(self._source, step, layer, self._now[layer])
            for layer in range(min(self._depth, self._layers))
        ]

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """One event ahead by ``depth``."""
        target = layer + self._depth
        if target < self._layers:
            return (Prediction(self._source, step, target, self._now[target]),)
        target -= self._layers
        if target < len(self._next) and target < layer:
            return (Prediction(self._source, step + 1, target, self._next[target]),)
        return ()


def perturb(events: EventTable, experts: int, accuracy: float, seed: int) -> EventTable:
    """Each key replaced with probability ``1 - accuracy`` by one its event does not need.

    Wrong keys are distinct within an event; where an event needs nearly all experts there may be
    too few others, and the remainder is dropped from the prediction.
    """
    rng = np.random.default_rng(seed)
    offsets = np.asarray(events.offsets)
    sizes = np.diff(offsets)
    kept_keys, kept_sizes = [], []
    for first in range(0, len(sizes), _CHUNK_EVENTS):
        last = min(first + _CHUNK_EVENTS, len(sizes))
        keys, size = _perturb_block(
            np.asarray(events.keys[offsets[first] : offsets[last]]),
            sizes[first:last],
            (np.arange(first, last) % events.layers) * experts,
            experts,
            accuracy,
            rng,
        )
        kept_keys.append(keys)
        kept_sizes.append(size)
    new_offsets = np.concatenate(([0], np.cumsum(np.concatenate(kept_sizes)))).astype(np.int64)
    return events.with_entries(np.concatenate(kept_keys), new_offsets)


def _perturb_block(
    keys: Any, sizes: Any, base: Any, experts: int, accuracy: float, rng: np.random.Generator
) -> tuple[Any, Any]:
    event = np.repeat(np.arange(len(sizes)), sizes)
    ids = keys - base[event]
    order = rng.random((len(sizes), experts))
    order[event, ids] = 2.0
    others = np.argsort(order, axis=1)
    wrong = rng.random(len(ids)) >= accuracy
    # Rank of each wrong entry among the wrong ones of its event.
    running = np.cumsum(wrong) - 1
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    before = np.concatenate(([0], np.cumsum(wrong)))[starts]
    rank = running - before[event]
    available = (experts - sizes)[event]
    ids = np.where(wrong, others[event, np.where(wrong, np.minimum(rank, experts - 1), 0)], ids)
    keep = ~wrong | (rank < available)
    new_sizes = np.bincount(event[keep], minlength=len(sizes))
    return (ids + base[event])[keep].astype(keys.dtype), new_sizes


_PARAMS = {
    "cache": Param(str, "lru", "cache rule beneath", choices=all_caches),
    "depth": Param(int, 1, "layers ahead", low=1, high=16),
}


def _events(data: PolicyData) -> EventTable:
    if data.events is None:
        raise PolicyError("oracle prefetch needs the future: it runs on recorded events only")
    return data.events


def _check_depth(params: Params, data: PolicyData) -> None:
    if params["depth"] >= data.shape.layers:
        raise PolicyError(
            f"depth {params['depth']} reaches beyond the model: it has {data.shape.layers} MoE "
            f"layers, so give at most {data.shape.layers - 1}"
        )


@register(
    "oracle-prefetch",
    params={**_PARAMS, "wrap": Param(bool, True, "look into the next step from the last layers")},
    prefetches=True,
    oracle=True,
    summary="prefetch exactly what the event d layers ahead needs: the bound on prefetching",
    source="bound",
)
def build_oracle(params: Params, data: PolicyData) -> Policy:
    """All right."""
    cache, scope = combine(params["cache"], data)
    _check_depth(params, data)
    prefetcher = OraclePrefetch(_events(data), params["depth"], params["wrap"], "oracle")
    return Policy(cache, prefetcher, scope=scope)


@register(
    "accuracy-q",
    params={
        **_PARAMS,
        "q": Param(float, 0.85, "share of predicted experts that are right", low=0, high=1),
        "wrap": Param(bool, False, "look into the next step from the last layers"),
        "predictor": Param(
            str,
            "next_gate",
            "whose measured cost a prediction takes; free: none",
            choices=("next_gate", "learned", "map_search", "free"),
        ),
    },
    prefetches=True,
    oracle=True,
    summary="prefetch with a share q of right experts: a predictor of given accuracy",
    source="bound",
)
def build_accuracy(params: Params, data: PolicyData) -> Policy:
    """Right with probability q."""
    events = _events(data)
    table = perturb(events, data.shape.experts, params["q"], data.seed)
    cache, scope = combine(params["cache"], data)
    _check_depth(params, data)
    prefetcher = OraclePrefetch(table, params["depth"], params["wrap"], params["predictor"])
    return Policy(cache, prefetcher, scope=scope)
