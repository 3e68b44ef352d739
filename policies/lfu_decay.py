"""LFU with exponentially decayed counts and an admission threshold, per layer.

A miss enters a full cache only if its decayed count exceeds the smallest resident's by ``theta``;
otherwise it is computed from a staging slot and forgotten.

Our readings: counts decay by ``gamma`` every forward step, the use in progress counts, free slots
are filled without asking, and the misses of one event are paired with residents greedily (largest
count against smallest).
"""

from __future__ import annotations

from collections.abc import Collection

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Param, Params
from policies.scored import ScoredRule

# Counts are kept scaled by 1 / gamma ** step; rescaled before they leave the float range.
_RESCALE_AT = 1e100


class LfuDecay(ScoredRule):
    """Victim: the smallest decayed count."""

    may_refuse = True

    def __init__(self, gamma: float, theta: float) -> None:
        self._gamma = gamma
        self._theta = theta

    def bind(self, core: DecisionCore) -> None:
        """All counts zero."""
        super().bind(core)
        self._count = [0.0] * core.shape.keys
        self._one_use = 1.0

    def on_step(self, step: int) -> None:
        """Every count decays; done by making a new use worth more."""
        self._one_use /= self._gamma
        if self._one_use > _RESCALE_AT:
            self._count = [count / self._one_use for count in self._count]
            self._one_use = 1.0

    def on_event(self, layer: int, keys: Keys) -> None:
        """One use each."""
        for key in keys:
            self._count[key] += self._one_use

    def score(self, key: int) -> float:
        """Decayed count, scaled."""
        return self._count[key]

    def refused(self, layer: int, keys: Keys, misses: Keys) -> Collection[int]:
        """Misses that do not beat a resident by theta."""
        pool = self.core.plan.pool_of_layer[layer]
        free = self.core.memory.free[pool] // self.core.memory.unit_of[misses[0]]
        ranked = sorted(misses, key=lambda key: (-self._count[key], key))
        leaving = sorted(
            (key for key in self.holders[pool].difference(keys) if self.state[key] == RESIDENT),
            key=self.rank,
        )
        margin = self._theta * self._one_use
        admitted = set(ranked[:free])
        for key, out in zip(ranked[free:], leaving, strict=False):
            if self._count[key] <= self._count[out] + margin:
                break
            admitted.add(key)
        return set(misses) - admitted

    def reset(self) -> None:
        """Counts start again."""
        self._count = [0.0] * self.core.shape.keys


@cache_rule(
    "lfu-decay",
    scope="layer",
    refuses=True,
    params={
        "gamma": Param(float, 0.99, "decay of every count a step", low=0.01, high=1.0),
        "theta": Param(
            float, 0.5, "uses by which a miss must beat the smallest resident", low=0.0, high=1e9
        ),
    },
    summary="LFU on decayed counts; a miss must beat the smallest resident to enter",
    source="common admission-controlled baseline; rule stated in the module",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return LfuDecay(params["gamma"], params["theta"])
