"""FineMoE: expert maps of past iterations, found again by meaning and by trajectory.

Source: FineMoE / fMoE (EuroSys 2026, arXiv 2502.05370). The map of an iteration (one token through
the model) is its gate probabilities, layers x experts; the store keeps (embedding of the token,
map). When a step begins, the entry of the most similar embedding predicts layers 1 to d; at the
gate of layer l - d, the entry whose map is most similar up to there predicts layer l. The less
similar (delta = 1 - cosine, clipped to 0..1), the more is prefetched: experts by descending
probability p until they sum to delta and are at least top-k. Prefetches go by p / (l - l_now), anew
at every gate; a miss pauses them all until what the event waits for has landed. Victim: the
smallest p * visits, whatever its recency. After an iteration its map enters the store, at capacity
in the place of the most redundant: d/L of the embeddings' cosine and (L-d)/L of the maps'. Both
searches cost the machine's ``map_search`` time, and a prediction is void if it comes too late.

Our readings:
- ``mode=offline``: the requests set aside fill the store before the clock starts. That is 30 % of
  them unless another fit share is asked for; the paper fills with 70 % and judges on 30 %
  (``--fit-share 0.7``). ``mode=online``: the store begins empty. Either goes on learning from the
  requests it serves (``update=false``: frozen), which takes no time on the model's critical path.
- Prefill rows are neither searched for nor stored: a step of nothing else is demand only.
- Several tokens in a step: each is searched for; the union of their sets, at the larger p.
- With no more than d layers, embeddings serve them all.
- l_now is 0 until the first gate of a step.
- "Visits" are the events that needed the expert, here or not; less than one counts as one, and p
  has a floor of 1/8192. p is that of the map last found for the layer, 1/E before any was.
- Prefetching pauses whether the event misses an expert or finds it still under way.
- Each layer has slots of its own; ``scope=global``: one pool of bytes over all layers.
- The most redundant entry is the one that is most similar to the newcomer; ties: the oldest place.
- The store takes 4 * capacity * (L * E + H) bytes of host memory, H the embedding's length.
- Where the trace has no full probabilities, maps are made of the top-k weights, and a note says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from policies._map_store import UNITS, Floats, MapStore, Prefixes, as_units, scatter
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import (
    CacheRule,
    Keys,
    Policy,
    PolicyData,
    Prediction,
    Prefetcher,
    Recorded,
    Signals,
)
from policies.memory import RESIDENT
from policies.registry import Param, Params, register

_SOURCE = "map_search"
_DECODE = 1  # the trace's word for a decode row
_LEAST_UNITS = 0.5


class MapCache(CacheRule):
    """Victim: the smallest p * visits; ties: lowest key."""

    def bind(self, core: DecisionCore) -> None:
        """Nothing is known of any expert: all p alike, no visit."""
        super().bind(core)
        shape = core.shape
        #: p * visits of those that hold a slot, inf for the others
        self._rank = np.full(shape.keys, np.inf)
        self._absent = np.full(shape.keys, np.inf)
        self._own = [
            slice(layer * shape.experts, (layer + 1) * shape.experts)
            for layer in range(shape.layers)
        ]
        everything = slice(0, shape.keys)
        self._span = self._own if len(core.plan.capacity) == shape.layers else [everything]
        self.reset()

    def reset(self) -> None:
        """Forget probabilities and visits."""
        shape = self.core.shape
        self._units = np.full(shape.keys, UNITS / shape.experts)
        self._visits = np.ones(shape.keys)
        self._visited: set[int] = set()
        np.add(self._units, self._absent, out=self._rank)

    def expect(self, layer: int, units: Floats) -> None:
        """A map has been found for ``layer``: its probabilities, in units [E]."""
        own = self._own[layer]
        floored = np.maximum(units, _LEAST_UNITS, out=self._units[own])
        rank = np.multiply(floored, self._visits[own], out=self._rank[own])
        rank += self._absent[own]

    def on_event(self, layer: int, keys: Keys) -> None:
        """A visit each."""
        visited = self._visited
        for key in keys:
            if key not in visited:
                visited.add(key)
                continue
            self._visits[key] += 1
            self._rank[key] = self._visits[key] * self._units[key] + self._absent[key]

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        self._absent[key] = 0.0
        self._rank[key] = self._units[key] * self._visits[key]

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot; its visits outlive it."""
        self._absent[key] = self._rank[key] = np.inf

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident that is least probable and least visited."""
        span = self._span[pool]
        rank, first, state = self._rank[span], span.start, self.state
        place = int(rank.argmin())
        if state[first + place] == RESIDENT and first + place not in barred:
            return first + place
        rank = rank.copy()
        while rank[place] < np.inf:
            key = first + place
            if state[key] == RESIDENT and key not in barred:
                return key
            rank[place] = np.inf
            place = int(rank.argmin())
        return None


@dataclass(frozen=True)
class Found(Prediction):
    """What the found entries say of a layer: ``units`` [E], the larger where rows differ."""

    units: Any = None


class MapReader:
    """The decode rows of the step in progress: embeddings, and probabilities in units."""

    def __init__(self, signals: Signals, experts: int, has_probabilities: bool) -> None:
        self._signals = signals
        self._experts = experts
        self._has_probabilities = has_probabilities
        self._chosen: Any = slice(None)

    def begin_step(self) -> int:
        """How many decode rows the step has."""
        decode = self._signals.step_rows("phase") == _DECODE
        rows = int(np.count_nonzero(decode))
        self._chosen = slice(None) if rows == len(decode) else decode
        return rows

    def embeddings(self) -> Floats:
        """[rows, H]."""
        chosen: Floats = self._signals.step_rows("embedding")[self._chosen]
        return chosen

    def units(self, layer: int) -> Floats:
        """[rows, E], once the gate of ``layer`` has run."""
        return as_units(self._probabilities(layer)[self._chosen])

    def _probabilities(self, layer: int) -> Floats:
        rows = self._signals.layer_rows
        if self._has_probabilities:
            full: Floats = rows("gate_probs", layer)
            return full
        return scatter(rows("experts", layer), rows("weights", layer), self._experts)


class MapPrefetcher(Prefetcher):
    """Semantic search when a step begins, trajectory search at every gate."""

    def __init__(
        self, reader: MapReader, store: MapStore, cache: MapCache, distance: int, update: bool
    ) -> None:
        self._reader = reader
        self._store = store
        self._cache = cache
        self._distance = distance
        self._update = update
        self._rows = 0
        self._p: dict[int, float] = {}

    def bind(self, core: DecisionCore) -> None:
        """Sizes."""
        super().bind(core)
        self._layers = core.shape.layers
        self._experts = core.shape.experts
        self._top_k = core.shape.top_k

    def on_step(self, step: int) -> Iterable[Prediction]:
        """What the most similar embedding's map says of the first layers."""
        self._p.clear()
        self._rows = self._reader.begin_step()
        if not self._rows:
            return ()
        self._embeddings = self._reader.embeddings()
        self._semantic = self._store.semantic(self._embeddings)
        self._prefixes: Prefixes = self._store.prefixes(self._rows)
        self._map = np.zeros((self._rows, self._layers, self._experts), np.float32)
        if not self._store.size:
            return ()
        entries = self._semantic.argmax(axis=1).tolist()
        best = [(entry, float(self._semantic[row, entry])) for row, entry in enumerate(entries)]
        return [self._found(step, layer, best) for layer in range(self._distance)]

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """What the most similar beginning of a map says of the layer that is ``distance`` ahead."""
        if self.core.awaits_copies:
            self.core.pause_low()
        self._reprioritise(layer)
        if not self._rows:
            return ()
        units = self._reader.units(layer)
        self._map[:, layer] = units
        self._prefixes.extend(layer, units)
        target = layer + self._distance
        if target >= self._layers or not self._store.size:
            return ()
        return (self._found(step, target, self._prefixes.best()),)

    def on_ready(self, prediction: Prediction) -> None:
        """Queue the set by p / (l - l_now)."""
        assert isinstance(prediction, Found)
        layer = prediction.layer
        self._cache.expect(layer, prediction.units)
        self._p.update(zip(prediction.keys, prediction.scores, strict=True))
        ahead = layer - self.core.layer
        priorities = [p / ahead for p in prediction.scores]
        self.core.prefetch(layer, prediction.keys, priorities, prediction.source)

    def on_landed(self, layer: int) -> None:
        """Nothing is missed any more: prefetching goes on."""
        self.core.resume_low()

    def on_step_end(self, step: int) -> None:
        """The iteration's maps enter the store."""
        if not (self._rows and self._update):
            return
        self._store.add(self._embeddings, self._map, self._semantic, self._prefixes.cosines())

    def _reprioritise(self, layer: int) -> None:
        """l_now has advanced; what is left over from layers already passed goes last."""
        low, p = self.core.queue.low, self._p
        if not low:
            return
        self.core.reprioritise(
            {
                copy.key: p.get(copy.key, 0.0) / (copy.layer - layer) if copy.layer > layer else 0.0
                for copy in low
            }
        )

    def _found(self, step: int, layer: int, best: Sequence[tuple[int, float]]) -> Found:
        """The union of what each row's entry asks for, at the larger probability."""
        maps, top_k = self._store.maps[layer], self._top_k
        if len(best) == 1:
            entry, cosine = best[0]
            units = maps[entry].copy()
            chosen = prefetch_set(units, 1.0 - cosine, top_k)
        else:
            units = maps[[entry for entry, _ in best]].max(axis=0)
            sets = [prefetch_set(maps[entry], 1.0 - cosine, top_k) for entry, cosine in best]
            union = np.unique(np.concatenate(sets))
            chosen = union[(-units[union]).argsort(kind="stable")]
        keys = (chosen + layer * self._experts).tolist()
        scores = (units[chosen] * (1 / UNITS)).tolist()
        return Found(_SOURCE, step, layer, keys, scores, units)


def prefetch_set(units: Floats, delta: float, top_k: int) -> npt.NDArray[np.intp]:
    """Experts by descending probability until they sum to ``delta`` and are at least ``top_k``.

    ``units`` [E]. ``delta`` is clipped to 0..1. Ties: lowest expert. Experts of no probability at
    all are left out.
    """
    order = (-units).argsort(kind="stable")
    ranked = units[order]
    count = top_k
    if delta > 0:
        enough = int(ranked.cumsum().searchsorted(min(delta, 1.0) * UNITS)) + 1
        count = max(enough, top_k)
    if count > len(ranked) or ranked[count - 1] == 0:
        count = int(np.count_nonzero(ranked))
    return order[:count]


def fill_store(store: MapStore, fit: Recorded, experts: int, has_probabilities: bool) -> None:
    """Enter the decode rows of the requests set aside, in their order."""
    chosen = np.flatnonzero(np.asarray(fit.phase_of_row) == _DECODE)
    names: Sequence[str] = ("gate_probs",) if has_probabilities else ("experts", "weights")
    columns = [fit.column(name) for name in names]
    embeddings = fit.column("embedding")
    for rows in np.array_split(chosen, max(1, len(chosen) // 1024)):
        values = [column[rows] for column in columns]
        full = values[0] if has_probabilities else scatter(values[0], values[1], experts)
        store.fill(embeddings[rows], as_units(full))


def _columns(params: Params) -> tuple[str, ...]:
    return ("phase", "embedding", "gate_probs", "experts", "weights")


def _notes(data: PolicyData) -> tuple[str, ...]:
    """What the trace lacks: an error where nothing can replace it, a note where something does."""
    if "embedding" not in data.columns:
        raise PolicyError(
            "finemoe needs the column embedding, which this trace lacks: record it with "
            "`moesim trace ... --record probs,embedding`"
        )
    if "gate_probs" in data.columns:
        return ()
    if "weights" not in data.columns:
        raise PolicyError(
            "finemoe needs the column gate_probs, or weights at least, which this trace lacks: "
            "record it with `moesim trace ... --record probs,embedding`"
        )
    return (
        "finemoe: the trace has no gate_probs, so expert maps hold the top-k weights only and say "
        "nothing of the other experts; record it with `moesim trace ... --record probs,embedding`",
    )


@register(
    "finemoe",
    params={
        "mode": Param(
            str,
            "offline",
            "offline: requests set aside fill the store; online: it begins empty",
            choices=("offline", "online"),
        ),
        "distance": Param(
            int,
            3,
            "layers ahead, d (paper: Mixtral 3, Phi-3.5-MoE 4, Qwen1.5-MoE 6)",
            low=1,
            high=64,
        ),
        "capacity": Param(int, 1000, "entries in the store", low=1, high=100_000),
        "update": Param(bool, True, "enter the maps of the requests served, too"),
        "scope": Param(
            str, "layer", "slots for each layer, or one pool", choices=("layer", "global")
        ),
    },
    prefetches=True,
    fitted=True,
    reads_signals=True,
    columns=_columns,
    summary="expert maps of past iterations, found by embedding and by trajectory",
    source="FineMoE, arXiv 2502.05370",
)
def build(params: Params, data: PolicyData) -> Policy:
    """A store filled from the requests set aside, or an empty one."""
    notes = _notes(data)
    if data.signals is None:
        raise PolicyError("finemoe reads the gates of the step in progress: give it signals")
    shape = data.shape
    distance = min(params["distance"], shape.layers)
    store = MapStore(params["capacity"], shape.layers, shape.experts, distance / shape.layers)
    has_probabilities = not notes
    if params["mode"] == "offline":
        if data.fit is None:
            raise PolicyError(
                "finemoe needs requests to fill its store from: give a fit share above 0, or set "
                "mode=online"
            )
        fill_store(store, data.fit, shape.experts, has_probabilities)
    reader = MapReader(data.signals, shape.experts, has_probabilities)
    cache = MapCache()
    prefetcher = MapPrefetcher(reader, store, cache, distance, params["update"])
    return Policy(cache, prefetcher, scope=params["scope"], notes=notes)
