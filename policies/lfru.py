"""Frequency over recency, per layer: evict the smallest ``freq / (now - last + 1)``.

Source: vLLM pull request 37190. Our readings: ``now`` and ``last`` count forward steps, ``freq``
counts events and outlives eviction; ties leave by lowest (layer, expert).
"""

from __future__ import annotations

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.registry import Params
from policies.scored import ScoredRule


class Lfru(ScoredRule):
    """Victim: the smallest frequency over age."""

    def bind(self, core: DecisionCore) -> None:
        """Nothing used yet."""
        super().bind(core)
        self._freq = [0] * core.shape.keys
        self._last = [0] * core.shape.keys
        self._now = 0

    def on_step(self, step: int) -> None:
        """Age is counted in steps."""
        self._now = step

    def on_event(self, layer: int, keys: Keys) -> None:
        """One use each, now."""
        now = self._now
        for key in keys:
            self._freq[key] += 1
            self._last[key] = now

    def score(self, key: int) -> float:
        """Frequency over age."""
        return self._freq[key] / (self._now - self._last[key] + 1)

    def reset(self) -> None:
        """Counts start again."""
        self._freq = [0] * self.core.shape.keys


@cache_rule(
    "lfru",
    scope="layer",
    summary="evict the smallest frequency / age, per layer",
    source="vLLM pull request 37190",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return Lfru()
