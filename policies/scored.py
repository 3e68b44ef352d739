"""Bases of cache rules that evict the resident with the smallest score.

Not policies of their own. :class:`ScoredRule` scans the pool key by key: cheap where pools are of
one layer. :class:`ArrayScoredRule` scores all keys at once: for one pool over all layers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection
from math import inf

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

    Between two calls of :meth:`renew` a pool's keys are kept in order: its ``_FIRST`` least worthy
    and their equals to begin with, all of them only where those do not do.
    """

    _FIRST = 24

    def bind(self, core: DecisionCore) -> None:
        """Who holds a slot, bool [pools, keys]."""
        super().bind(core)
        pools = len(core.plan.capacity)
        self._pool_of = core.memory.pool_of
        self._held = np.zeros((pools, core.shape.keys), bool)
        #: by pool: (worth, key) of all keys worth no more than the bound, in order
        self._ordered: list[list[tuple[float, int]] | None] = [None] * pools
        self._bound = [inf] * pools

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
        ordered = self._ordered[pool]
        if ordered is None:
            return
        worth = self._worth.item(key)
        if worth <= self._bound[pool]:
            insort(ordered, (worth, key))

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        pool = self._pool_of[key]
        self._held[pool, key] = False
        ordered = self._ordered[pool]
        if ordered is None:
            return
        worth = self._worth.item(key)
        if worth <= self._bound[pool]:
            del ordered[bisect_left(ordered, (worth, key))]

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident of smallest score."""
        state = self.state
        ordered = self._ordered[pool]
        if ordered is None:
            self._worth = self.scores()
            ordered = self._order(pool, self._FIRST)
        for _, key in ordered:
            if state[key] == RESIDENT and key not in barred:
                return key
        if self._bound[pool] == inf:
            return None
        ordered = self._order(pool, None)
        return next((k for _, k in ordered if state[k] == RESIDENT and k not in barred), None)

    def _order(self, pool: int, least: int | None) -> list[tuple[float, int]]:
        """The pool's ``least`` least worthy and their equals, in order; None: all."""
        held = self._held[pool].nonzero()[0]
        worth = self._worth[held]
        bound = inf
        if least is not None and least < len(held):
            bound = np.partition(worth, least).item(least)
            few = (worth <= bound).nonzero()[0]
            held, worth = held[few], worth[few]
        # Stable: equals stay in order of key.
        order = worth.argsort(kind="stable")
        ordered = list(zip(worth[order].tolist(), held[order].tolist(), strict=True))
        self._ordered[pool] = ordered
        self._bound[pool] = bound
        return ordered
