"""Least-Stale: evict experts last touched in an earlier pass before those of this pass.

Source: SpecMD, arXiv 2602.03921. One pool over all layers. Our readings: a pass is one forward
step; a touch is a use or a prefetch; inside a class experts leave layer by layer, first layers
first, and first in first out within a layer (the order in which they took their slot).
"""

from __future__ import annotations

from collections.abc import Collection

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Params


class LeastStale(CacheRule):
    """Victim: the first stale expert by layer; if none is stale, the first by layer."""

    def bind(self, core: DecisionCore) -> None:
        """Slot holders of each layer in order of entry, and each key's last pass."""
        super().bind(core)
        layers = core.shape.layers
        self._layer_of = core.memory.layer_of
        self._held: list[dict[int, None]] = [{} for _ in range(layers)]
        self._stale = [0] * layers
        self._last = [-1] * core.shape.keys
        self._pass = -1

    def on_step(self, step: int) -> None:
        """A new pass: everything held becomes stale."""
        self._pass = step
        self._stale = [len(held) for held in self._held]

    def _touch(self, key: int) -> None:
        if self._last[key] == self._pass:
            return
        self._last[key] = self._pass
        layer = self._layer_of[key]
        if key in self._held[layer]:
            self._stale[layer] -= 1

    def on_event(self, layer: int, keys: Keys) -> None:
        """Uses are touches."""
        for key in keys:
            self._touch(key)

    def on_predicted(self, keys: Keys) -> None:
        """So are prefetches that find their expert resident."""
        for key in keys:
            self._touch(key)

    def on_insert(self, key: int) -> None:
        """And copies: the newcomer is fresh."""
        self._last[key] = self._pass
        self._held[self._layer_of[key]][key] = None

    def on_evict(self, key: int) -> None:
        """Forget the key."""
        layer = self._layer_of[key]
        del self._held[layer][key]
        if self._last[key] != self._pass:
            self._stale[layer] -= 1

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """Stale ones first."""
        now, state, last = self._pass, self.state, self._last
        for layer, stale in enumerate(self._stale):
            if not stale:
                continue
            for key in self._held[layer]:
                if last[key] != now and state[key] == RESIDENT and key not in barred:
                    return key
        for held in self._held:
            for key in held:
                if state[key] == RESIDENT and key not in barred:
                    return key
        return None


@cache_rule(
    "least-stale",
    scope="global",
    summary="evict what earlier passes touched before what this pass did; one pool",
    source="SpecMD, arXiv 2602.03921",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """One pool."""
    return LeastStale()
