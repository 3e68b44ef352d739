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
searches cost the machine's ``map_search`` time, which is of 1,000 maps (more maps or rows take more
in proportion), and a prediction is void if it comes too late.

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

from policies._map_store import (
    UNITS,
    Floats,
    MapStore,
    Prefixes,
    SearchAhead,
    as_units,
    scatter,
)
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
_MEASURED_MAPS = 1000
"""Maps that the machine's ``map_search`` time is of (`moesim calibrate`)."""
_DECODE = 1  # the trace's word for a decode row
_LEAST_UNITS = 0.5
_BLOCK_STEPS = 16


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


class RecordedMaps:
    """Steps to come, and what is found for those of one decode row: many of them at once.

    A search uses the row's own gates up to the layer in progress, and the entries of the rows
    before; only their products are taken ahead of time.
    """

    def __init__(self, recording: Recorded, experts: int, has_probabilities: bool) -> None:
        self._experts = experts
        self._has_probabilities = has_probabilities
        self._recording = recording
        steps = np.asarray(recording.step_of_row)
        decode = np.asarray(recording.phase_of_row) == _DECODE
        self._rows = np.bincount(steps[decode], minlength=steps[-1] + 1)
        #: the step's first decode row, where it has one
        self._row = np.searchsorted(np.cumsum(decode), np.cumsum(self._rows) - self._rows + 1)
        self._place: dict[int, int] = {}

    def search(self, step: int, store: MapStore) -> tuple[SearchAhead, int]:
        """The searches of a block of steps, and the place in it of ``step``, of one decode row."""
        if step not in self._place:
            steps = self._block(step)
            self._place = {name: place for place, name in enumerate(steps.tolist())}
            self._searches = store.search_ahead(*self._read(self._row[steps]))
        return self._searches, self._place[step]

    def forget(self) -> None:
        """The store has changed behind the searches' back."""
        self._place.clear()

    def _block(self, first: int) -> npt.NDArray[np.intp]:
        """Steps of one decode row, up to one of several; those of none do not matter."""
        rows = self._rows[first : first + _BLOCK_STEPS]
        several = np.flatnonzero(rows > 1)
        last = int(several[0]) if len(several) else len(rows)
        steps: npt.NDArray[np.intp] = first + np.flatnonzero(rows[:last] == 1)
        return steps

    def _read(self, rows: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """Embeddings [n, H] and maps in units [n, L, E]."""
        column = self._recording.column
        if self._has_probabilities:
            full: Floats = column("gate_probs")[rows]
        else:
            full = scatter(column("experts")[rows], column("weights")[rows], self._experts)
        return column("embedding")[rows], as_units(full)


class MapPrefetcher(Prefetcher):
    """Semantic search when a step begins, trajectory search at every gate.

    ``recorded``: steps to come, None in live runs.
    """

    def __init__(
        self,
        reader: MapReader,
        recorded: RecordedMaps | None,
        store: MapStore,
        cache: MapCache,
        distance: int,
        update: bool,
    ) -> None:
        self._recorded = recorded
        self._ahead: tuple[SearchAhead, int] | None = None
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
        self._ahead = None
        if not self._rows:
            return ()
        if self._recorded is not None and self._rows == 1:
            return self._foresee(step)
        self._embeddings = self._reader.embeddings()
        self._semantic = self._store.semantic(self._embeddings)
        self._prefixes: Prefixes = self._store.prefixes(self._rows)
        self._map = np.zeros((self._rows, self._layers, self._experts), np.float32)
        if not self._store.size:
            return ()
        entries = self._semantic.argmax(axis=1).tolist()
        best = [(entry, float(self._semantic[row, entry])) for row, entry in enumerate(entries)]
        return [self._found(step, layer, best) for layer in range(self._distance)]

    def _foresee(self, step: int) -> Iterable[Prediction]:
        """Work out what the step's gates will find; each is told of its own in time."""
        assert self._recorded is not None
        self._ahead = searches, row = self._recorded.search(step, self._store)
        if not self._store.size:
            self._sets: list[tuple[list[int], list[float], Floats]] = []
            return ()
        entries, cosines = searches.find(row)
        # Of the layers that no gate predicts, and of those a distance ahead of each gate.
        source = np.maximum(np.arange(self._layers) - self._distance + 1, 0)
        units = self._store.maps[np.arange(self._layers), entries[source]]
        self._sets = prefetch_sets(units, 1.0 - cosines[source], self._top_k)
        return [self._foreseen(step, layer) for layer in range(self._distance)]

    def _foreseen(self, step: int, layer: int) -> Found:
        chosen, scores, units = self._sets[layer]
        first = layer * self._experts
        names = [first + expert for expert in chosen]
        return Found(_SOURCE, step, layer, names, scores, units, work=self._work())

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """What the most similar beginning of a map says of the layer that is ``distance`` ahead."""
        if self.core.awaits_copies:
            self.core.pause_low()
        self._reprioritise(layer)
        if self._ahead is not None:
            target = layer + self._distance
            return (self._foreseen(step, target),) if target < len(self._sets) else ()
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
        if self._ahead is not None:
            searches, row = self._ahead
            searches.add(row)
            return
        if self._recorded is not None:
            self._recorded.forget()
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

    def _work(self) -> float:
        """Of a search, in searches of one row over as many maps as its cost was measured with."""
        return max(self._store.size * max(self._rows, 1) / _MEASURED_MAPS, 1.0)

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
        return Found(_SOURCE, step, layer, keys, scores, units, work=self._work())


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


def prefetch_sets(
    units: Floats, deltas: Floats, top_k: int
) -> list[tuple[list[int], list[float], Floats]]:
    """As :func:`prefetch_set` for each row of ``units`` [n, E]: experts, p, and the row itself."""
    order = (-units).argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(units, order, 1)
    asked = (np.clip(deltas, 0.0, 1.0) * UNITS)[:, None]
    enough = np.count_nonzero(ranked.cumsum(axis=1, dtype=np.float64) < asked, axis=1) + 1
    counts = np.maximum(np.where(deltas > 0, enough, top_k), top_k)
    # Experts of no probability at all come last.
    counts = np.minimum(counts, np.count_nonzero(ranked, axis=1)).tolist()
    names, p = order.tolist(), (ranked * np.float32(1 / UNITS)).tolist()
    return [(names[row][:count], p[row][:count], units[row]) for row, count in enumerate(counts)]


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
    in_blocks=True,
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
    recorded = None
    if data.recording is not None:
        recorded = RecordedMaps(data.recording, shape.experts, has_probabilities)
    cache = MapCache()
    prefetcher = MapPrefetcher(reader, recorded, store, cache, distance, params["update"])
    return Policy(cache, prefetcher, scope=params["scope"], notes=notes)
