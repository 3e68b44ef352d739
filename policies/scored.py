"""Bases of cache rules that evict the resident with the smallest score.

Not policies of their own. :class:`ScoredRule` scans the pool key by key: cheap where pools are of
one layer. :class:`ArrayScoredRule` scores all keys at once: for one pool over all layers.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

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


class ArrayScoredRule(CacheRule):
    """Victim: the smallest of :meth:`scores` in the pool; ties: lowest key.

    The pool is put in order once for all victims between two calls of :meth:`renew`.
    """

    def bind(self, core: DecisionCore) -> None:
        """Who holds a slot, bool [pools, keys]."""
        super().bind(core)
        pools = len(core.plan.capacity)
        self._pool_of = core.memory.pool_of
        self._held = np.zeros((pools, core.shape.keys), bool)
        self._ordered: list[list[int] | None] = [None] * pools
        self._newcomers: list[list[int]] = [[] for _ in range(pools)]

    def scores(self) -> npt.NDArray[np.float64]:
        """Worth of keeping each key now, float64 [keys]."""
        raise NotImplementedError

    def renew(self) -> None:
        """To be called when scores have changed."""
        self._ordered = [None] * len(self._ordered)

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        pool = self._pool_of[key]
        self._held[pool, key] = True
        self._newcomers[pool].append(key)

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self._held[self._pool_of[key], key] = False

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident of smallest score."""
        state = self.state
        ordered = self._ordered[pool]
        if ordered is None:
            ordered = self._order(pool)
        first = next((k for k in ordered if state[k] == RESIDENT and k not in barred), None)
        candidates = [] if first is None else [first]
        newcomers = self._newcomers[pool]
        candidates += [key for key in newcomers if state[key] == RESIDENT and key not in barred]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        worth = self._worth
        return min(candidates, key=lambda key: (worth[key], key))

    def _order(self, pool: int) -> list[int]:
        self._worth = self.scores()
        held = self._held[pool].nonzero()[0]
        ordered: list[int] = held[self._worth[held].argsort(kind="stable")].tolist()
        self._ordered[pool] = ordered
        self._newcomers[pool].clear()
        return ordered
