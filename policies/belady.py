"""Belady's rule, the bounds: evict the expert whose next use is farthest.

``belady`` (per layer) and ``belady-global`` (one pool) must admit every miss; among policies that
admit every miss they are optimal for equal sizes and one scope. ``belady-bypass`` may decline: it
keeps, after each event, those whose next use is nearest among residents and the event's members.
A miss whose slot would have to come from a member of the event itself is staged and takes over that
member's slot once it is computed. It bounds every cache of the same scope, sizes and staging that
executes cached-first; a strict order with too few staging slots may cost it hits.

Source: Belady, IBM Systems Journal 5(2), 1966; bypass as in Michaud, "Some mathematical facts about
optimal cache replacement", 2016. Ties leave by lowest (layer, expert).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import Any

from policies.caches import cache_rule
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import CacheRule, EventTable, Keys, PolicyData
from policies.memory import RESIDENT
from policies.registry import Params
from policies.scored import ScoredRule


class _Future(ScoredRule):
    """Knows each key's next use; :meth:`score` is its negative."""

    def __init__(self, data: PolicyData) -> None:
        if data.events is None or data.next_use is None or data.first_use is None:
            raise PolicyError("belady needs the future: only a driver of recorded events has it")
        self._events: EventTable = data.events
        self._next_use = data.next_use
        self._first_use = data.first_use

    def bind(self, core: DecisionCore) -> None:
        """Before its first event, an expert's next use is its first."""
        super().bind(core)
        self.next_use: list[int] = self._first_use.tolist()

    def on_step(self, step: int) -> None:
        """Read the step's next uses."""
        first = step * self._events.layers
        self._base = int(self._events.offsets[first])
        bounds: list[Any] = self._events.offsets[first : first + self._events.layers + 1].tolist()
        self._bounds = bounds
        self._step_next = self._next_use[bounds[0] : bounds[-1]].tolist()

    def on_event(self, layer: int, keys: Keys) -> None:
        """The event's members now look ahead to the use after it."""
        start, stop = self._bounds[layer] - self._base, self._bounds[layer + 1] - self._base
        next_use, following = self.next_use, self._step_next[start:stop]
        if not self.core.as_recorded:
            # The CPU computes some, or the routing was changed: the recorded event has them all.
            keys = self._events.step(self.core.step)[layer]
        for key, use in zip(keys, following, strict=True):
            next_use[key] = use

    def score(self, key: int) -> float:
        """Nearer is worth more."""
        return -self.next_use[key]


class Belady(_Future):
    """Admission forced; a scan of the pool."""


class BeladyGlobal(_Future):
    """Admission forced; one large pool, so a heap. Entries are checked when they surface."""

    def bind(self, core: DecisionCore) -> None:
        """The heap holds (-next use, key)."""
        super().bind(core)
        self._heap: list[tuple[int, int]] = []

    def on_event(self, layer: int, keys: Keys) -> None:
        """Members' entries are renewed."""
        super().on_event(layer, keys)
        for key in keys:
            heapq.heappush(self._heap, (-self.next_use[key], key))
        self._compact()

    def on_insert(self, key: int) -> None:
        """A prefetched key has no entry yet."""
        super().on_insert(key)
        heapq.heappush(self._heap, (-self.next_use[key], key))

    def _compact(self) -> None:
        """Drop outdated entries when they are many; members still to come get theirs on entry."""
        holders = self.holders[0]
        if len(self._heap) > 64 + 8 * len(holders):
            self._heap = [(-self.next_use[key], key) for key in holders]
            heapq.heapify(self._heap)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """Pop until an entry is current, resident and free to leave; put the others back."""
        heap, holders = self._heap, self.holders[0]
        kept: list[tuple[int, int]] = []
        found = None
        while heap and found is None:
            entry = heapq.heappop(heap)
            key = entry[1]
            if key not in holders or -entry[0] != self.next_use[key]:
                continue
            kept.append(entry)
            if self.state[key] == RESIDENT and key not in barred:
                found = key
        for entry in kept:
            heapq.heappush(heap, entry)
        return found


class BeladyBypass(_Future):
    """Keeps the nearest next uses; the rest passes through staging."""

    may_refuse = True

    def _leaving(self, pool: int, keep: Collection[int]) -> list[int]:
        """Residents outside ``keep``, farthest next use first."""
        candidates = self.holders[pool].difference(keep)
        return sorted((key for key in candidates if self.state[key] == RESIDENT), key=self.rank)

    def refused(self, layer: int, keys: Keys, misses: Keys) -> Collection[int]:
        """Misses that are not worth keeping, or whose slot a member of the event still needs.

        Worth keeping are the nearest next uses among residents and misses, as many as slots.
        """
        pool = self.core.plan.pool_of_layer[layer]
        free = self.core.memory.free[pool] // self.core.memory.unit_of[misses[0]]
        residents = self._leaving(pool, ())
        nearest = sorted((*residents, *misses), key=lambda key: (self.next_use[key], key))
        kept = set(nearest[: free + len(residents)])
        room = free + len(set(residents).difference(kept, keys))
        wanted = [key for key in nearest if key in kept and key in misses]
        return set(misses).difference(wanted[:room])

    def adopt(self, layer: int, staged: Keys, coming: Collection[int]) -> Iterable[tuple[int, int]]:
        """Staged experts nearer than residents (members of the event included) take their slots."""
        pool = self.core.plan.pool_of_layer[layer]
        ranked = sorted(staged, key=lambda key: (self.next_use[key], key))
        pairs = zip(ranked, self._leaving(pool, coming), strict=False)
        return [(key, out) for key, out in pairs if self.next_use[key] < self.next_use[out]]


@cache_rule(
    "belady",
    scope="layer",
    oracle=True,
    summary="farthest next use leaves, per layer; every miss is admitted",
    source="Belady 1966",
)
def build_belady(params: Params, data: PolicyData) -> CacheRule:
    """Per layer."""
    return Belady(data)


@cache_rule(
    "belady-global",
    scope="global",
    oracle=True,
    summary="farthest next use leaves, one pool; every miss is admitted",
    source="Belady 1966",
)
def build_belady_global(params: Params, data: PolicyData) -> CacheRule:
    """One pool."""
    return BeladyGlobal(data)


@cache_rule(
    "belady-bypass",
    scope="layer",
    oracle=True,
    summary="keeps the nearest next uses, may decline a miss: the true bound on hits, per layer",
    source="Michaud 2016",
)
def build_belady_bypass(params: Params, data: PolicyData) -> CacheRule:
    """Per layer, with staging."""
    return BeladyBypass(data)
