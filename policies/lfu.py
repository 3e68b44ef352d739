"""Least frequently used, per layer.

Source: the common baseline (FineMoE, arXiv 2502.05370, and SpecMD, arXiv 2602.03921, compare with
it). Our reading: a use is one event, counts cover the whole run and outlive eviction; ties leave by
lowest (layer, expert).
"""

from __future__ import annotations

from collections.abc import Collection

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Params
from policies.scored import ScoredRule


class Lfu(ScoredRule):
    """Victim: the resident used in fewest events."""

    def bind(self, core: DecisionCore) -> None:
        """Count and key in one integer: ``count * keys + key`` orders by count, then key."""
        super().bind(core)
        self._weight = core.shape.keys
        self._rank = list(range(core.shape.keys))

    def on_event(self, layer: int, keys: Keys) -> None:
        """One use each."""
        rank, weight = self._rank, self._weight
        for key in keys:
            rank[key] += weight

    def score(self, key: int) -> float:
        """Uses so far."""
        return self._rank[key] // self._weight

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """As the base does, on precomputed ranks."""
        candidates = self.holders[pool].difference(barred)
        ranks = self._rank.__getitem__
        while candidates:
            key = min(candidates, key=ranks)
            if self.state[key] == RESIDENT:
                return key
            candidates.discard(key)
        return None

    def reset(self) -> None:
        """Counts start again."""
        self._rank = list(range(self.core.shape.keys))


@cache_rule(
    "lfu",
    scope="layer",
    summary="least frequently used, per layer; counts outlive eviction",
    source="baseline of FineMoE, arXiv 2502.05370",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return Lfu()
