"""What an expert's slot is worth, learned from the events as they come.

:class:`SlotWorth` is the cache rule of ``auto``: it evicts the smallest decayed use, with the
half-life that would have missed least, and knows how many hits a slot is expected to bring.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Collection, Iterable, Iterator
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.core import DecisionCore
from policies.interface import CacheRule, Keys, Signals
from policies.memory import RESIDENT

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PROBS = "gate_probs"
#: events of a layer in which a use loses half its weight; short is recency, long is frequency
HALF_LIVES = (1.0, 4.0, 8.0, 16.0, 64.0)
#: the half-life to begin with
_FIRST = 2
_DECAY = np.exp2(-1 / np.array(HALF_LIVES))[:, None]
#: share of the gate's probabilities in a use; the rest is whether the expert ran
_SOFT = 0.5
#: layers whose events also run through a shadow cache for every half-life
_SHADOWED = 2
#: added to the use of those in the event, more than any use: they stay
_STAYS = 1e6
#: of the misses counted so far, kept at the next shadowed event
_SHADOW_MEMORY = 0.998
#: another half-life must have missed this much less to be taken
_LEAD = 0.98
#: events of a layer in which the weight of a coming hit halves, short to long, and for each the
#: half-life of the uses that it is read from
HORIZONS = (3.0, 12.0, 48.0)
_READ = (2, 3, 4)
_READ_ROWS = slice(_READ[0], _READ[-1] + 1)
_DISCOUNT = np.exp2(-1 / np.array(HORIZONS))[:, None]
#: events of a layer that slots must have been kept on average for the second and third horizon
_KEPT = (120.0, 480.0)
#: events of a layer after which evictions counted so far count half
_LIFE_MEMORY = 64
#: classes of decayed use, half an octave each
_CLASSES = 24
_CENTRES = np.exp2((np.arange(_CLASSES) - 12) / 2)
_EDGES = np.exp2((np.arange(1, _CLASSES) - 12.5) / 2)
_EDGE_LIST: list[float] = _EDGES.tolist()
#: where each horizon's classes begin when all are in one row
_FIRST_CLASS = np.arange(len(HORIZONS))[:, None] * _CLASSES
#: examples that the first guess counts for, and that a class remembers
_PRIOR, _MEMORY = 20.0, 2000.0


class ComingHits:
    """Expected hits of an expert in the discounted future, by class of decayed use.

    Learned by temporal differences: what a class is worth is a use in the next event, if there is
    one, and the discounted worth of the class after it.
    """

    def __init__(self) -> None:
        # As of a steady use: decayed uses are what it has brought, hits what it will bring.
        steady = (1 - _DECAY[list(_READ)]) / (1 - _DISCOUNT)
        self.of_class: Floats = _CENTRES * steady
        self._examples = np.full((len(HORIZONS), _CLASSES), _PRIOR)

    @staticmethod
    def classes(use: Floats) -> Ints:
        """Class of each decayed use, of any shape."""
        return np.asarray(_EDGES.searchsorted(use, side="right"), np.int64)

    def learn(self, before: Ints, used: list[int], after: Ints) -> None:
        """An event of a layer: classes before and after it, int [horizons, E], and who was used."""
        target = _DISCOUNT * self.of_class.take(after + _FIRST_CLASS)
        target[:, used] += 1.0
        flat = (before + _FIRST_CLASS).ravel()
        size = self.of_class.size
        count = np.bincount(flat, minlength=size).reshape(self.of_class.shape)
        total = np.bincount(flat, target.ravel(), minlength=size).reshape(self.of_class.shape)
        self._examples += count
        self.of_class += (total - count * self.of_class) / self._examples
        np.minimum(self._examples, _MEMORY, out=self._examples)


class Shadows:
    """Caches of keys alone, one for each half-life, over a few layers; misses are counted."""

    def __init__(self, layers: int, experts: int, slots_by_layer: list[int]) -> None:
        every = max(1, layers // _SHADOWED)
        chosen = range(every // 2, layers, every)[:_SHADOWED]
        size = (len(HALF_LIVES), experts)
        self._held = {layer: np.zeros(size, bool) for layer in chosen}
        self._slots = slots_by_layer
        self._misses = np.zeros(len(HALF_LIVES))
        self.best = _FIRST

    def __contains__(self, layer: int) -> bool:
        return layer in self._held

    def see(self, layer: int, ids: list[int], use: Floats) -> None:
        """An event needed ``ids``; ``use``: decayed uses after it, float64 [half-lives, E]."""
        held = self._held[layer]
        self._misses *= _SHADOW_MEMORY
        self._misses += len(ids) - held[:, ids].sum(axis=1)
        held[:, ids] = True
        slots = self._slots[layer]
        if slots < held.shape[1]:
            rank = np.where(held, use, -1.0)
            rank[:, ids] += _STAYS
            ordered = rank.copy()
            ordered.partition(-slots, axis=1)
            np.greater_equal(rank, ordered[:, -slots, None], out=held)
        best = int(self._misses.argmin())
        if self._misses[best] < _LEAD * self._misses[self.best]:
            self.best = best


class SlotWorth(CacheRule):
    """Victim: the smallest decayed use; ties: lowest key.

    A use counts one, or half for having run and half by the gate's probability, times top-k.
    ``signals``: the gates' probabilities, None where there are none.
    """

    def __init__(self, signals: Signals | None) -> None:
        self._signals = signals

    def bind(self, core: DecisionCore) -> None:
        """Nothing has been used yet."""
        super().bind(core)
        plan = core.plan
        self._experts = core.shape.experts
        self._pool_of = core.memory.pool_of
        self._holders: list[set[int]] = [set() for _ in plan.capacity]
        # By pool: (decayed use, key) of the holders, ascending; None: not known.
        self._order: list[list[tuple[float, int]] | None] = []
        self._slots = [plan.capacity[pool] for pool in plan.pool_of_layer]
        self.reset()

    def reset(self) -> None:
        """Uses, shadows and expectations start again."""
        shape = self.core.shape
        size = (len(HALF_LIVES), shape.experts)
        self._use = [np.zeros(size) for _ in range(shape.layers)]
        self._decay = np.repeat(_DECAY, shape.experts, axis=1)
        self._brought = np.zeros(shape.experts)
        self._items: Any = self._brought.data
        self._worth = [0.0] * shape.keys
        self._order = [None for _ in self._holders]
        self._shadows = Shadows(shape.layers, shape.experts, self._slots)
        self._coming = ComingHits()
        self._classes: dict[int, Ints] = {}
        self._elsewhere: Keys = ()
        self._read = [0.0] * shape.keys
        self._horizon = len(HORIZONS) - 1
        self._hits: list[float] = self._coming.of_class[self._horizon].tolist()
        self._events = self._evictions = 0.0

    def computed_elsewhere(self, keys: Keys) -> None:
        """The event about to be told also needs ``keys``, which the CPU computes."""
        self._elsewhere = keys

    def on_event(self, layer: int, keys: Keys) -> None:
        """A use each, of those on the CPU too."""
        first = layer * self._experts
        ids = [key - first for key in (*keys, *self._elsewhere)]
        self._elsewhere = ()
        use = self._use[layer]
        use *= self._decay
        use += self._bring(layer, ids)
        self._events += 1
        if layer in self._shadows:
            self._learn(layer, ids, use)
        self._publish(layer)

    def _learn(self, layer: int, ids: list[int], use: Floats) -> None:
        """Expectations and shadows see an event. ``use``: decayed uses after it."""
        before = self._classes.get(layer)
        after = ComingHits.classes(use[_READ_ROWS])
        self._coming.learn(np.zeros_like(after) if before is None else before, ids, after)
        self._classes[layer] = after
        self._shadows.see(layer, ids, use)
        self._choose_horizon()
        self._hits = self._coming.of_class[self._horizon].tolist()

    def _publish(self, layer: int) -> None:
        """Decayed uses as lists: those that victims and those that expected hits are read from."""
        first = layer * self._experts
        span = slice(first, first + self._experts)
        row, best = _READ[self._horizon], self._shadows.best
        self._read[span] = read = self._use[layer][row].tolist()
        self._worth[span] = read if best == row else self._use[layer][best].tolist()
        self._order[self._pool_of[first]] = None

    def _choose_horizon(self) -> None:
        """By how long a slot has been kept: events of a layer by evictions of a slot."""
        layers = len(self._slots)
        kept = sum(self._slots) * self._events / layers
        horizon = bisect_right(_KEPT, kept / self._evictions if self._evictions else inf)
        if horizon != self._horizon:
            self._horizon = horizon
            for layer in range(layers):
                self._publish(layer)
        if self._events > layers * _LIFE_MEMORY:
            self._events /= 2
            self._evictions /= 2

    def _bring(self, layer: int, ids: list[int]) -> Floats:
        """What the event adds to each expert's use, float64 [E]: about one each to those needed.

        Valid until the next event.
        """
        brought, items = self._brought, self._items
        if self._signals is None:
            brought.fill(0.0)
            hard = 1.0
        else:
            rows = self._signals.layer_rows(PROBS, layer)
            soft = rows[0] if len(rows) == 1 else np.nanmean(rows.astype(np.float64), axis=0)
            scale = _SOFT * self.core.shape.top_k
            np.multiply(soft, scale, out=brought, dtype=np.float64)
            hard = 1 - _SOFT
        # A few items are sooner changed one by one than by an index array.
        for expert in ids:
            items[expert] += hard
        return brought

    def kept_by(self, keys: Iterable[int]) -> list[float]:
        """Hits that a slot for each of ``keys`` is expected to bring from now on."""
        hits, read = self._hits, self._read
        return [hits[bisect_right(_EDGE_LIST, read[key])] for key in keys]

    def renewed_by(self, keys: Iterable[int]) -> list[float]:
        """The same, once the expert is used in the event to come."""
        hits, read = self._hits, self._read
        return [hits[bisect_right(_EDGE_LIST, read[key] + 1.0)] for key in keys]

    def brought_in_time(self, chances: dict[int, float], now: float) -> list[tuple[float, int]]:
        """Hits that those of ``chances`` who are not resident may bring, and key, most first.

        ``chances``: of a use in the event to come; ``now``: what that use itself counts for.
        """
        hits, read, state = self._hits, self._read, self.state
        ranked = [
            (
                -chance * (now + hits[bisect_right(_EDGE_LIST, read[key] + 1.0)])
                - (1 - chance) * hits[bisect_right(_EDGE_LIST, read[key])],
                key,
            )
            for key, chance in chances.items()
            if state[key] != RESIDENT
        ]
        ranked.sort()
        return [(-less, key) for less, key in ranked]

    def decayed_use(self, key: int) -> float:
        """Decayed use: who has least leaves."""
        return self._worth[key]

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        pool = self._pool_of[key]
        self._holders[pool].add(key)
        order = self._order[pool]
        if order is not None:
            insort(order, (self._worth[key], key))

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self._evictions += 1
        pool = self._pool_of[key]
        self._holders[pool].discard(key)
        order = self._order[pool]
        if order is not None:
            order.remove((self._worth[key], key))  # most often the first

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident of smallest decayed use."""
        state = self.state
        for _, key in self._ordered(pool):
            if state[key] == RESIDENT and key not in barred:
                return key
        return None

    def _ordered(self, pool: int) -> list[tuple[float, int]]:
        """Decayed use and key of those who hold a slot of ``pool``, ascending."""
        order = self._order[pool]
        if order is None:
            worth = self._worth
            order = self._order[pool] = sorted([(worth[key], key) for key in self._holders[pool]])
        return order

    def prices(self, layer: int, spared: Collection[int]) -> Iterator[float]:
        """Hits lost by each slot more that ``layer`` asks for, ``spared`` held fast, without end.

        Nothing for a free slot, then by who leaves, then more than anyone may bring. Valid as long
        as no slot changes hands.
        """
        first = layer * self._experts
        pool, memory = self._pool_of[first], self.core.memory
        if memory.free[pool]:
            for _ in range(memory.free[pool] // memory.unit_of[first]):
                yield 0.0
        state, pinned = self.state, self.core.pinned
        hits, read = self._hits, self._read
        for _, key in self._ordered(pool):
            if state[key] == RESIDENT and key not in pinned and key not in spared:
                yield hits[bisect_right(_EDGE_LIST, read[key])]
        while True:
            yield inf

    def facts(self) -> dict[str, Any]:
        """The half-life in use at the end."""
        return {"half_life": HALF_LIVES[self._shadows.best]}
