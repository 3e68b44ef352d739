"""What an expert's slot is worth, learned from the events as they come.

:class:`SlotWorth` is the cache rule of ``auto``: it evicts the smallest decayed use, with the
half-life that would have missed least, and knows how many hits a slot is expected to bring.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import chain, repeat
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
_HORIZON_ROWS = np.arange(len(HORIZONS))[:, None]
#: events of a layer that slots must have been kept on average for the second and third horizon
_KEPT = (120.0, 480.0)
#: events of a layer after which evictions counted so far count half
_LIFE_MEMORY = 64
#: classes of decayed use, half an octave each
_CLASSES = 24
_CENTRES = np.exp2((np.arange(_CLASSES) - 12) / 2)
_EDGES = np.exp2((np.arange(1, _CLASSES) - 12.5) / 2)
_EDGE_LIST: list[float] = _EDGES.tolist()
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
        target = _DISCOUNT * self.of_class[_HORIZON_ROWS, after]
        target[:, used] += 1.0
        flat = (before + _HORIZON_ROWS * _CLASSES).ravel()
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
        needed = np.zeros(held.shape[1], bool)
        needed[ids] = True
        self._misses *= _SHADOW_MEMORY
        self._misses += len(ids) - np.count_nonzero(held & needed, axis=1)
        held |= needed
        slots = self._slots[layer]
        if slots < len(needed):
            rank = np.where(held, use, -1.0)
            rank[:, needed] += _STAYS
            held &= rank >= np.partition(rank, -slots, axis=1)[:, -slots, None]
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
        self._slots = [plan.capacity[pool] for pool in plan.pool_of_layer]
        self.reset()

    def reset(self) -> None:
        """Uses, shadows and expectations start again."""
        shape = self.core.shape
        size = (len(HALF_LIVES), shape.experts)
        self._use = [np.zeros(size) for _ in range(shape.layers)]
        self._worth = [0.0] * shape.keys
        self._shadows = Shadows(shape.layers, shape.experts, self._slots)
        self._coming = ComingHits()
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
        shadowed = layer in self._shadows
        before = ComingHits.classes(use[_READ_ROWS]) if shadowed else None
        use *= _DECAY
        use += self._brought(layer, ids)
        self._events += 1
        if before is not None:
            self._coming.learn(before, ids, ComingHits.classes(use[_READ_ROWS]))
            self._shadows.see(layer, ids, use)
            self._choose_horizon()
            self._hits = self._coming.of_class[self._horizon].tolist()
        self._publish(layer)

    def _publish(self, layer: int) -> None:
        """Decayed uses as lists: those that victims and those that expected hits are read from."""
        first = layer * self._experts
        span = slice(first, first + self._experts)
        row, best = _READ[self._horizon], self._shadows.best
        self._read[span] = read = self._use[layer][row].tolist()
        self._worth[span] = read if best == row else self._use[layer][best].tolist()

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

    def _brought(self, layer: int, ids: list[int]) -> Floats:
        """What the event adds to each expert's use, float64 [E]: about one each to those needed."""
        if self._signals is None:
            plain = np.zeros(self._experts)
            plain[ids] = 1.0
            return plain
        rows = self._signals.layer_rows(PROBS, layer)
        scores = rows.astype(np.float64)
        brought: Floats = scores[0] if len(scores) == 1 else np.nanmean(scores, axis=0)
        brought *= _SOFT * self.core.shape.top_k
        brought[ids] += 1 - _SOFT
        return brought

    def kept(self, key: int) -> float:
        """Hits that a slot for ``key`` is expected to bring from now on."""
        return self._hits[bisect_right(_EDGE_LIST, self._read[key])]

    def renewed(self, key: int) -> float:
        """The same, once the expert is used in the event to come."""
        return self._hits[bisect_right(_EDGE_LIST, self._read[key] + 1.0)]

    def decayed_use(self, key: int) -> float:
        """Decayed use: who has least leaves."""
        return self._worth[key]

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        self._holders[self._pool_of[key]].add(key)

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self._evictions += 1
        self._holders[self._pool_of[key]].discard(key)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident of smallest decayed use."""
        worth, state = self._worth, self.state
        free = [key for key in self._holders[pool].difference(barred) if state[key] == RESIDENT]
        if not free:
            return None
        least = min([worth[key] for key in free])
        return min([key for key in free if worth[key] == least])

    def prices(self, layer: int, spared: Collection[int]) -> Iterator[float]:
        """Hits lost by each slot more that ``layer`` asks for, ``spared`` held fast, without end.

        Nothing for a free slot, then by who leaves, then more than anyone may bring.
        """
        core, worth, state = self.core, self._worth, self.state
        pool = core.plan.pool_of_layer[layer]
        free = core.memory.free[pool] // core.memory.unit_of[layer * self._experts]
        leaving = [
            (worth[key], key)
            for key in self._holders[pool].difference(core.pinned, spared)
            if state[key] == RESIDENT
        ]
        leaving.sort()
        lost = map(self.kept, [key for _, key in leaving])
        return chain(repeat(0.0, free), lost, repeat(inf))

    def facts(self) -> dict[str, Any]:
        """The half-life in use at the end."""
        return {"half_life": HALF_LIVES[self._shadows.best]}
