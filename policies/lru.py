"""Least recently used: per layer (``lru``) or one pool over all layers (``lru-global``).

Source: the common baseline; per layer as in Mixtral-offloading (arXiv 2312.17238) and ProMoE
(arXiv 2410.22134). The global pool must show its cliff: no hits at all when the pool is smaller
than one token's cycle over the layers.

Our readings: recency is the touch order of the event (last use: token, then rank), whether the
expert was there or had to come; a prefetch that takes a slot counts as a touch, and so does one
that finds its expert resident.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Params


class Lru(CacheRule):
    """Victim: the resident touched longest ago."""

    def bind(self, core: DecisionCore) -> None:
        """One recency order a pool, oldest first."""
        super().bind(core)
        self._pool_of_layer = core.plan.pool_of_layer
        self._pool_of = core.memory.pool_of
        self._order: list[OrderedDict[int, None]] = [OrderedDict() for _ in core.plan.capacity]

    def on_event(self, layer: int, keys: Keys) -> None:
        """Touch in order; keys not resident yet are pinned until they are."""
        order = self._order[self._pool_of_layer[layer]]
        move = order.move_to_end
        for key in keys:
            order[key] = None
            move(key)

    def on_insert(self, key: int) -> None:
        """A prefetch enters as most recent; a demanded key is in the order already."""
        self._order[self._pool_of[key]].setdefault(key)

    def on_evict(self, key: int) -> None:
        """Forget the key."""
        del self._order[self._pool_of[key]][key]

    def on_predicted(self, keys: Keys) -> None:
        """A prefetch that finds its expert resident touches it."""
        for key in keys:
            self._order[self._pool_of[key]].move_to_end(key)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The first resident in recency order that may leave."""
        state = self.state
        for key in self._order[pool]:
            if state[key] == RESIDENT and key not in barred:
                return key
        return None

    def reset(self) -> None:
        """Nothing outlives the slots."""


@cache_rule(
    "lru",
    scope="layer",
    summary="least recently used, per layer",
    source="Mixtral-offloading, arXiv 2312.17238",
)
def build_lru(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return Lru()


@cache_rule(
    "lru-global",
    scope="global",
    summary="least recently used, one pool over all layers",
    source="BigMoeOnEdge's engine (github.com/Helldez/BigMoeOnEdge)",
)
def build_lru_global(params: Params, data: PolicyData) -> CacheRule:
    """One pool."""
    return Lru()
