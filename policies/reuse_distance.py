"""Learned eviction: the expert whose predicted reuse distance is longest leaves, per layer.

Source: FlashMoE (arXiv 2601.17063) and CECAR learn an evictor from recency and frequency on
recorded routing, to come near Belady's rule.

Our readings: the model is ridge regression in closed form, one for all layers, fitted on the
requests set aside. Target: log2 of the events of its layer until an expert is needed next, cut at
``horizon``. Features: log2 of the events since it was last needed (recency), and log2 of the share
of recent events that needed it, averaged with half-lives of 4, 32 and 256 events (frequency).
Examples: every (event, expert not in it) with a use in the last ``horizon`` events, whose next use
is known or known to lie beyond the horizon; of long runs, 4096 events a layer. Weights and
predictions are rounded to 1e-6, so that ties are ties everywhere: they leave by lowest expert.
State begins empty and goes on from request to request, in fitting as in judging.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import CacheRule, EventTable, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Param, Params
from policies.scored import ScoredRule

Floats = npt.NDArray[np.float64]

HALF_LIVES = (4, 32, 256)
FEATURES = 2 + len(HALF_LIVES)
_DECAY = np.exp2(-1 / np.array(HALF_LIVES))[:, None]
#: the least share that tells from none, so that its logarithm is finite
_FLOOR = 2.0**-10
#: events of a layer that examples are taken of, evenly spread
_MOST_EVENTS = 4096


class History:
    """Recency and frequency of one layer's experts, counted in its events."""

    def __init__(self, experts: int) -> None:
        self.events = 0
        self.last = np.full(experts, -1, np.int64)
        self._shares = np.zeros((len(HALF_LIVES), experts))

    def see(self, members: npt.NDArray[Any]) -> None:
        """An event needed ``members``, int [m]."""
        self.last[members] = self.events
        self.events += 1
        self._shares *= _DECAY
        self._shares[:, members] += 1 - _DECAY

    def features(self) -> Floats:
        """After the last event, float64 [E, features]; an expert never needed is as old as all."""
        result = np.ones((len(self.last), FEATURES))
        result[:, 1] = np.log2(self.events - self.last)
        result[:, 2:] = np.log2(self._shares + _FLOOR).T
        return result


def fit_weights(events: EventTable, experts: int, horizon: int, ridge: float) -> Floats:
    """Weights of the features, float64 [features]; the constant is not held back by ``ridge``."""
    gram, target = np.zeros((FEATURES, FEATURES)), np.zeros(FEATURES)
    examples = 0
    for members in _members_by_layer(events, experts):
        following = _next_events(members, experts)
        history = History(experts)
        every = -(-len(members) // _MOST_EVENTS)
        for now, needed in enumerate(members):
            history.see(needed)
            if now % every:
                continue
            distance = following[now] - now
            # Of an expert not needed again it is only known that the rest is shorter.
            known = (following[now] < len(members)) | (len(members) - now > horizon)
            recent = history.last >= max(0, now - horizon + 1)
            chosen = np.flatnonzero(known & recent & (history.last != now))
            rows = history.features()[chosen]
            gram += rows.T @ rows
            target += rows.T @ np.log2(np.minimum(distance[chosen], horizon))
            examples += len(chosen)
    if examples < FEATURES:
        raise PolicyError(
            f"reuse-distance has {examples} example(s) to learn from, too few: set more or longer "
            "requests aside (a larger fit share)"
        )
    held_back = np.diag([0.0] + [ridge * examples] * (FEATURES - 1))
    weights = np.linalg.solve(gram + held_back, target)
    return np.asarray(weights.round(6), np.float64)


def _members_by_layer(events: EventTable, experts: int) -> list[list[npt.NDArray[Any]]]:
    """Expert ids of each layer's events, those that did not run left out."""
    layers: list[list[npt.NDArray[Any]]] = [[] for _ in range(events.layers)]
    keys, offsets = np.asarray(events.keys, np.int64), np.asarray(events.offsets)
    for event, (first, last) in enumerate(pairwise(offsets.tolist())):
        if last > first:
            layers[event % events.layers].append(keys[first:last] % experts)
    return layers


def _next_events(members: list[npt.NDArray[Any]], experts: int) -> npt.NDArray[np.int64]:
    """Index of the event after each that needs each expert, int64 [events, E]; len: none."""
    following = np.empty((len(members), experts), np.int64)
    coming = np.full(experts, len(members), np.int64)
    for now in range(len(members) - 1, -1, -1):
        following[now] = coming
        coming[members[now]] = now
    return following


class ReuseDistance(ScoredRule):
    """Victim: the longest predicted distance."""

    def __init__(self, weights: Floats) -> None:
        self._weights = weights

    def bind(self, core: DecisionCore) -> None:
        """Nothing has been needed yet."""
        super().bind(core)
        self._experts = core.shape.experts
        self._layer_of = core.memory.layer_of
        self.reset()

    def on_event(self, layer: int, keys: Keys) -> None:
        """Uses of the layer's experts; its predictions are out of date."""
        self._history[layer].see(np.array(keys, np.int64) - layer * self._experts)
        self._worth[layer] = None

    def score(self, key: int) -> float:
        """Nearer is worth more."""
        layer, expert = divmod(key, self._experts)
        return self._worth_of(layer)[expert]

    def _worth_of(self, layer: int) -> list[float]:
        worth = self._worth[layer]
        if worth is None:
            distance = self._history[layer].features() @ self._weights
            worth = self._worth[layer] = (-distance.round(6)).tolist()
        return worth

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """As the base does, without a tuple a key."""
        state = self.state
        free = [key for key in self.holders[pool].difference(barred) if state[key] == RESIDENT]
        if not free:
            return None
        layer = self._layer_of[free[0]]
        worth, first = self._worth_of(layer), layer * self._experts
        least = min([worth[key - first] for key in free])
        return min([key for key in free if worth[key - first] == least])

    def reset(self) -> None:
        """Recency and frequency start again; the weights stay."""
        self._history = [History(self._experts) for _ in range(self.core.shape.layers)]
        self._worth: list[list[float] | None] = [None] * self.core.shape.layers


@cache_rule(
    "reuse-distance",
    scope="layer",
    params={
        "horizon": Param(int, 128, "events beyond which distances are alike", low=2, high=100_000),
        "ridge": Param(float, 1e-3, "regularisation, by example", low=1e-9, high=1e9),
    },
    fitted=True,
    summary="evict the longest reuse distance predicted from recency and frequency, per layer",
    source="FlashMoE, arXiv 2601.17063; CECAR",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Weights from the requests set aside."""
    if data.fit is None:
        raise PolicyError("reuse-distance needs requests to learn from: give a fit share above 0")
    weights = fit_weights(data.fit.events, data.shape.experts, params["horizon"], params["ridge"])
    return ReuseDistance(weights)
