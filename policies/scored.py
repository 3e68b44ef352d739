"""Base of cache rules that evict the resident with the smallest score, by scanning the pool.

Not a policy of its own. Pools of one layer hold at most E experts, so a scan is cheap.
"""

from __future__ import annotations

from collections.abc import Collection

from policies.core import DecisionCore
from policies.interface import CacheRule
from policies.memory import RESIDENT


class ScoredRule(CacheRule):
    """Victim: the smallest :meth:`score`; ties: lowest key, so lowest (layer, expert)."""

    def bind(self, core: DecisionCore) -> None:
        """Keep the slot holders of each pool."""
        super().bind(core)
        self._pool_of = core.memory.pool_of
        self.holders: list[set[int]] = [set() for _ in core.plan.capacity]

    def score(self, key: int) -> float:
        """Worth of keeping ``key``."""
        raise NotImplementedError

    def rank(self, key: int) -> tuple[float, int]:
        """Score, then key."""
        return self.score(key), key

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        self.holders[self._pool_of[key]].add(key)

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self.holders[self._pool_of[key]].discard(key)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident of smallest score."""
        candidates = self.holders[pool].difference(barred)
        while candidates:
            key = min(candidates, key=self.rank)
            if self.state[key] == RESIDENT:
                return key
            candidates.discard(key)
        return None
