"""Segmented LRU, per layer: newcomers are on probation, promoted after ``promote_after`` hits.

Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", 1994.
Our readings: promotion on the second hit (the entry itself is no hit); the protected segment holds
at most ``protected`` of a pool's slots, its least recent falls back to the recent end of probation;
victims come from probation first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Param, Params


class Slru(CacheRule):
    """Victim: least recent on probation, then least recent protected."""

    def __init__(self, protected: float, promote_after: int) -> None:
        self._share = protected
        self._promote_after = promote_after

    def bind(self, core: DecisionCore) -> None:
        """Two recency orders a pool, oldest first."""
        super().bind(core)
        self._pool_of = core.memory.pool_of
        units = core.plan.unit_of_layer
        self._limit = [
            int(self._share * (capacity // unit))
            for capacity, unit in zip(core.plan.capacity, units, strict=False)
        ]
        # Probation keeps the hits so far.
        self._probation: list[OrderedDict[int, int]] = [OrderedDict() for _ in core.plan.capacity]
        self._protected: list[OrderedDict[int, None]] = [OrderedDict() for _ in core.plan.capacity]

    def on_event(self, layer: int, keys: Keys) -> None:
        """Hits are counted; misses enter probation as most recent."""
        pool = self.core.plan.pool_of_layer[layer]
        probation, protected = self._probation[pool], self._protected[pool]
        for key in keys:
            if key in protected:
                protected.move_to_end(key)
            elif key in probation:
                self._hit(pool, key, probation.pop(key) + 1)
            else:
                probation[key] = 0

    def _hit(self, pool: int, key: int, hits: int) -> None:
        probation, protected = self._probation[pool], self._protected[pool]
        if hits < self._promote_after or self._limit[pool] == 0:
            probation[key] = hits
            return
        protected[key] = None
        if len(protected) > self._limit[pool]:
            fallen, _ = protected.popitem(last=False)
            probation[fallen] = 0

    def on_insert(self, key: int) -> None:
        """A prefetch enters probation; a demanded key is there already."""
        pool = self._pool_of[key]
        if key not in self._protected[pool]:
            self._probation[pool].setdefault(key, 0)

    def on_evict(self, key: int) -> None:
        """Forget the key."""
        pool = self._pool_of[key]
        if self._probation[pool].pop(key, None) is None:
            del self._protected[pool][key]

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The first that may leave, probation before protected."""
        state = self.state
        for order in (self._probation[pool], self._protected[pool]):
            for key in order:
                if state[key] == RESIDENT and key not in barred:
                    return key
        return None


@cache_rule(
    "slru",
    scope="layer",
    params={
        "protected": Param(float, 0.5, "share of the slots for protected experts", low=0, high=1),
        "promote_after": Param(int, 2, "hits on probation that promote", low=1, high=1_000_000),
    },
    summary="segmented LRU, per layer: probation, promotion on the second hit",
    source="Karedla et al., IEEE Computer 27(3), 1994",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return Slru(params["protected"], params["promote_after"])
