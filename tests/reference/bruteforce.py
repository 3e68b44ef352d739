"""Event-atomic cache replays written from the rules, with lists and dicts, slow on purpose.

Nothing of the project is imported, so that a shared mistake would have to be made twice. An event
is ``(step, layer, keys)``, keys in touch order. Rules: hits are what is held when the event starts;
all keys are touched in order; an event that does not fit runs in waves, residents first, then
misses in touch order; no member of the wave in progress leaves; ties leave by lowest key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

Event = tuple[int, int, Sequence[int]]
NEVER = 1 << 60


@dataclass(slots=True)
class Outcome:
    """What one event found and whom it threw out, in the order of leaving."""

    step: int
    layer: int
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    evicted: tuple[int, ...]


@dataclass
class Pool:
    """Keys that share `capacity`, each with what it takes of it."""

    capacity: int
    held: dict[int, int]
    used: int = 0

    def enter(
        self, key: int, size: int, wave: Collection[int], worst: Callable[[Collection[int]], int]
    ) -> Iterator[int]:
        """Let `key` in; yields whom it throws out, never a member of `wave`."""
        while self.used + size > self.capacity:
            leaver = worst(self.held.keys() - wave)
            self.used -= self.held.pop(leaver)
            yield leaver
        self.held[key] = size
        self.used += size


def waves(keys: Sequence[int], held: Collection[int], fit: int) -> Iterator[Sequence[int]]:
    """The members of each wave, at most `fit` of them."""
    if len(keys) <= fit:
        yield keys
        return
    order = [key for key in keys if key in held] + [key for key in keys if key not in held]
    for first in range(0, len(order), fit):
        yield order[first : first + fit]


def _replay(
    events: Iterable[Event],
    capacity: Sequence[int],
    pool_of_layer: Sequence[int],
    sizes: Sequence[int],
    notice: Callable[[int, Sequence[int]], None],
    worst: Callable[[Collection[int]], int],
) -> Iterator[Outcome]:
    """Admission is forced: every miss takes a place."""
    pools = [Pool(units, {}) for units in capacity]
    for index, (step, layer, keys) in enumerate(events):
        pool = pools[pool_of_layer[layer]]
        size = sizes[layer]
        hits = tuple([key for key in keys if key in pool.held])
        misses = tuple([key for key in keys if key not in pool.held])
        notice(index, keys)
        evicted: list[int] = []
        if misses:
            for wave in waves(keys, set(pool.held), pool.capacity // size):
                for key in wave:
                    if key not in pool.held:
                        evicted += pool.enter(key, size, wave, worst)
        yield Outcome(step, layer, hits, misses, tuple(evicted))


def lru(
    events: Iterable[Event],
    capacity: Sequence[int],
    pool_of_layer: Sequence[int],
    sizes: Sequence[int],
) -> Iterator[Outcome]:
    """Least recently used. `capacity` of each pool and `sizes` of a layer's experts in one unit."""
    touched: dict[int, int] = {}
    clock = 0

    def notice(index: int, keys: Sequence[int]) -> None:
        nonlocal clock
        for key in keys:
            clock += 1
            touched[key] = clock

    def worst(candidates: Collection[int]) -> int:
        return min(candidates, key=touched.__getitem__)

    return _replay(events, capacity, pool_of_layer, sizes, notice, worst)


class Future:
    """When each key is used next: its uses are written down first, then crossed out one by one."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.uses: dict[int, list[int]] = {}
        for index in range(len(events) - 1, -1, -1):
            for key in events[index][2]:
                self.uses.setdefault(key, [NEVER]).append(index)

    def notice(self, index: int, keys: Sequence[int]) -> None:
        """The event `index` takes place: its members look to the use after it."""
        for key in keys:
            assert self.uses[key].pop() == index

    def next_use(self, key: int) -> int:
        return self.uses[key][-1]

    def worst(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda key: (-self.uses[key][-1], key))

    def best(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda key: (self.uses[key][-1], key))


def belady(
    events: Sequence[Event],
    capacity: Sequence[int],
    pool_of_layer: Sequence[int],
    sizes: Sequence[int],
) -> Iterator[Outcome]:
    """Farthest next use leaves. Arguments as for :func:`lru`."""
    future = Future(events)
    return _replay(events, capacity, pool_of_layer, sizes, future.notice, future.worst)


def bypass(events: Sequence[Event], slots: int) -> Iterator[Outcome]:
    """Per layer, `slots` each; a miss may be declined, and staging slots abound.

    Misses fill free slots, nearest first. Then, as long as that helps, the nearest of those left
    out takes the place of the farthest that is held, member of the event or not.
    """
    future = Future(events)
    held_by_layer: dict[int, set[int]] = {}
    for index, (step, layer, keys) in enumerate(events):
        future.notice(index, keys)
        held = held_by_layer.setdefault(layer, set())
        hits = tuple([key for key in keys if key in held])
        misses = tuple([key for key in keys if key not in held])
        outside = set(misses)
        while outside and len(held) < slots:
            _move(future.best(outside), outside, held)
        evicted = _improve(future, held, outside)
        yield Outcome(step, layer, hits, misses, tuple(evicted))


def _move(key: int, source: set[int], target: set[int]) -> None:
    source.remove(key)
    target.add(key)


def _improve(future: Future, held: set[int], outside: set[int]) -> list[int]:
    evicted: list[int] = []
    while outside and held:
        newcomer, leaver = future.best(outside), future.worst(held)
        if future.next_use(newcomer) >= future.next_use(leaver):
            break
        held.remove(leaver)
        evicted.append(leaver)
        _move(newcomer, outside, held)
    return evicted


def most_hits(events: Sequence[Collection[int]], slots: int, *, forced: bool = False) -> int:
    """Most hits that any choice of residents gives one pool: all choices are tried.

    `forced`: the members of an event stay until it is over, and none may be declined; events must
    then fit.
    """
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for event in events:
        keys = frozenset(event)
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            for kept in _choices(held, keys, slots, forced):
                after[kept] = max(after.get(kept, 0), hits + len(held & keys))
        best = after
    return max(best.values())


def _choices(
    held: frozenset[int], keys: frozenset[int], slots: int, forced: bool
) -> Iterator[frozenset[int]]:
    """Every set that may be held after the event. Keeping fewer than fit is never better."""
    stay = keys if forced else frozenset()
    free = sorted((held | keys) - stay)
    for chosen in combinations(free, min(slots - len(stay), len(free))):
        yield stay.union(chosen)
