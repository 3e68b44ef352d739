"""Auto: cache, prefetch and CPU share chosen while running, by what has paid so far.

Ours; published nowhere else. Lossless, causal, nothing fitted beforehand. Four decisions, each from
its own online estimate:

- **Who leaves** (:mod:`policies._slot_worth`): the smallest decayed use, per layer; a use counts
  half for having run and half by the gate's probability, where the trace has ``gate_probs``. The
  half-life (1, 4, 8, 16 or 64 events: from recency to frequency) is the one whose shadow caches, of
  keys alone, over two layers, missed least; another must have missed 2 % less to take over. The
  contents stay. Beside it, expected hits by decayed use are learned by temporal differences; they
  reach as far (half as much weight every 3, 12 or 48 events) as slots have been kept: far while a
  cold cache fills and where nobody has been worth a copy for long, near where slots change hands.
- **Who computes a miss** (:mod:`policies._lanes`): link and CPU share an event's misses so that
  both are done soonest, by measured costs; copies that find no slot beside the event's hits come
  after the CPU is done. A copy that saves bringing the expert in behind is credited with that.
  Experts under way are shared out too; where the CPU is sooner it computes
  them, and the copy goes on unawaited.
- **What is fetched ahead**: the gates of layers l + 1 to l + ``depth``, applied to the gate input
  of layer l (``lookahead_d``, twice top-k a token), name candidates. How often a candidate that
  was absent has been needed is counted by distance, layer and rank: its chance c. A candidate is
  queued if c is at least ``least_chance`` and the hits it is expected to bring (c times a half for
  this event, since it may come late, and those after it), less those of who leaves for it, pay for
  the copy. So prefetching stops by itself where predictions are wrong.
- **What is brought in behind**: what the CPU computes takes no slot; the link, where idle, copies
  those that are expected to bring more hits than who leaves for them, at most four at a time.

A copy pays if the hits that it is expected to bring, each saving what a miss has cost of late, with
link and CPU together, outweigh what it costs: 5 % of its time, for the GPU kernels that it slows
down, and the larger of what it is expected to take from GPU and CPU, and what such copies have of
late delayed events that had no need of them.

Our readings: a copy is queued by the hits it is expected to bring, over the distance; a layer's
first steps have no chances yet, so they are taken from all layers, and at first as even. The union
over a step's tokens, every token's best first; ranks of a batch are scaled to one token's, and
chances are kept apart by how many candidates there are, in octaves: a prefill needs nearly all.
Predictions take the machine's ``next_gate`` time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from policies._lanes import SoonestSplit
from policies._slot_worth import PROBS, SlotWorth
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import EventTable, Keys, Policy, PolicyData, Prediction, Prefetcher, Shape
from policies.memory import COPYING, QUEUED, RESIDENT
from policies.registry import Param, Params, register

#: of a prefetched expert's use in the event it came for, what counts: half of them come late
_IN_TIME = 0.5
#: of the least chance to be prefetched, what holds fast an expert that is there already
_HELD_FAST = 0.5
#: experts brought in behind that may be queued at once
_MOST_BEHIND = 4


class Chances:
    """How often an absent candidate has been needed, by layer and rank; of one distance."""

    #: examples from all layers that stand in for a layer's own
    _PRIOR = 8.0
    #: examples of a layer and rank beyond which old and new ones count half as much
    _MOST = 500.0

    def __init__(self, layers: int, ranks: int) -> None:
        self._needed = [[0.0] * ranks for _ in range(layers)]
        self._seen = [[0.0] * ranks for _ in range(layers)]
        self._all_needed = [0.5] * ranks
        self._all_seen = [1.0] * ranks

    def learn(self, layer: int, absent: list[tuple[int, int]], needed: Collection[int]) -> None:
        """Absent candidates of ``layer``, key and rank of each, and who was needed."""
        most = self._MOST
        right, seen = self._needed[layer], self._seen[layer]
        all_right, all_seen = self._all_needed, self._all_seen
        for key, rank in absent:
            count, all_count = seen[rank], all_seen[rank]
            if count > most:
                count /= 2
                right[rank] /= 2
            if all_count > most:
                all_count /= 2
                all_right[rank] /= 2
            seen[rank] = count + 1
            all_seen[rank] = all_count + 1
            if key in needed:
                right[rank] += 1
                all_right[rank] += 1

    def of(self, layer: int) -> list[float]:
        """Chance of each rank in ``layer``."""
        prior = self._PRIOR
        return [
            (needed + prior * all_needed / all_seen) / (seen + prior)
            for needed, seen, all_needed, all_seen in zip(
                self._needed[layer],
                self._seen[layer],
                self._all_needed,
                self._all_seen,
                strict=False,  # equal, and checked at every prediction it would take time
            )
        ]


class Ahead(Prefetcher):
    """``tables[d]``: what the gate of l + d says of layer l's gate input, as keys of layer l."""

    def __init__(
        self,
        tables: dict[int, EventTable],
        shape: Shape,
        cache: SlotWorth,
        split: SoonestSplit,
        least_chance: float,
    ) -> None:
        self._tables = tables
        self._layers, self._experts = shape.layers, shape.experts
        self._ranks = 2 * shape.top_k
        self._cache = cache
        self._split = split
        self._least_chance = least_chance

    def bind(self, core: DecisionCore) -> None:
        """Nothing has been predicted yet."""
        super().bind(core)
        self._state = core.memory.state
        # By distance, and how many times a token's candidates there are, in octaves.
        self._chances: dict[tuple[int, int], Chances] = {}
        # By layer, of the step in progress: absent candidates with their ranks.
        self._open: list[list[tuple[Chances, list[tuple[int, int]]]]] = [
            [] for _ in range(self._layers)
        ]
        self._step: dict[int, list[list[int]]] = {}
        self._ranks_of: dict[int, list[int]] = {}
        self._behind: list[int] = []

    def on_step(self, step: int) -> Iterable[Prediction]:
        """Read the step's predictions; none can be made before the first gate."""
        self._step = {distance: table.step(step) for distance, table in self._tables.items()}
        for candidates in self._open:
            candidates.clear()
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """Score what was said of this layer; look behind and ahead."""
        self._score(layer, keys)
        self._bring_in()
        found = []
        for distance, said in self._step.items():
            if layer + distance < self._layers:
                shift = distance * self._experts
                named = [key + shift for key in said[layer]]
                found.append(Prediction("next_gate", step, layer + distance, named))
        return found

    def _score(self, layer: int, keys: Keys) -> None:
        candidates = self._open[layer]
        if not candidates:
            return
        needed = set(keys)
        for chances, absent in candidates:
            chances.learn(layer, absent, needed)
        candidates.clear()

    # ------------------------------------------------------------------ ahead

    def on_ready(self, prediction: Prediction) -> None:
        """Queue the candidates that pay."""
        layer, keys, state = prediction.layer, prediction.keys, self._state
        distance = layer - self.core.layer
        if distance not in self._tables or not keys:
            return  # it took longer than a layer: a nearer one has been asked
        ranks = self._ranks_of.get(len(keys)) or self._ranks_among(len(keys))
        known = self._known(distance, len(keys))
        chances = known.of(layer)
        least, held = self._least_chance, self._least_chance * _HELD_FAST
        absent: list[tuple[int, int]] = []
        chosen: dict[int, float] = {}
        for key, rank in zip(keys, ranks, strict=True):
            chance = chances[rank]
            if state[key] < COPYING:
                absent.append((key, rank))
                if chance >= least:
                    chosen[key] = chance
            elif chance >= held:
                chosen[key] = chance
        if absent:
            self._open[layer].append((known, absent))
        if chosen:
            self._queue(layer, distance, chosen, prediction.source)

    def _ranks_among(self, size: int) -> list[int]:
        """Rank of each of so many candidates, scaled to one token's."""
        ranks = [index * self._ranks // size for index in range(size)]
        self._ranks_of[size] = ranks
        return ranks

    def _known(self, distance: int, size: int) -> Chances:
        """Chances at ``distance`` where there are so many candidates."""
        kind = (distance, (size // self._ranks).bit_length())
        known = self._chances.get(kind)
        if known is None:
            known = self._chances[kind] = Chances(self._layers, self._ranks)
        return known

    def _queue(self, layer: int, distance: int, chosen: dict[int, float], source: str) -> None:
        """Queue what is absent and pays; what is there already is only held fast."""
        state = self._state
        priorities = {key: 0.0 for key in chosen if state[key] == RESIDENT}
        if len(priorities) < len(chosen) and self._add_paying(layer, distance, chosen, priorities):
            self.core.reprioritise(priorities)
        if priorities:
            self.core.prefetch(layer, list(priorities), list(priorities.values()), source)

    def _add_paying(
        self, layer: int, distance: int, chosen: dict[int, float], priorities: dict[int, float]
    ) -> bool:
        """Add those not resident that pay; whether a copy of any is queued or under way already."""
        state = self._state
        least = self._split.hits_to_pay(layer)
        prices = self._cache.prices(layer, chosen)
        queued = False
        for hits, key in self._cache.brought_in_time(chosen, _IN_TIME):
            if state[key] == COPYING:
                priorities[key] = hits / distance
                queued = True
                continue
            gain = hits - next(prices)
            if gain <= least:
                break
            priorities[key] = gain / distance
            queued = queued or state[key] == QUEUED
        return queued

    # ------------------------------------------------------------------ behind

    def _bring_in(self) -> None:
        """The best of what the CPU computed and of what is still queued from before."""
        core, state = self.core, self._state
        queued = [key for key in self._behind if state[key] == QUEUED]
        taken = self._split.taken
        if not queued and not taken:
            return
        self._split.taken = []
        candidates = {*queued, *taken} if queued else taken
        paying = self._paying([key for key in candidates if state[key] <= QUEUED])
        best = {key: -less for less, key in paying[:_MOST_BEHIND]}
        for key in queued:
            if key not in best:
                core.cancel(key)
        self._behind = list(best)
        if best:
            core.bring_in(self._behind, "behind")
            core.reprioritise(best)

    def _paying(self, keys: Keys) -> list[tuple[float, int]]:
        """Those that pay for the copy: hits expected to be gained, negative, and key; sorted."""
        layer_of = self.core.memory.layer_of
        priced: dict[int, tuple[Iterator[float], float]] = {}
        paying = []
        ranked = [(-kept, key) for kept, key in zip(self._cache.kept_by(keys), keys, strict=True)]
        ranked.sort()
        for less, key in ranked:
            layer = layer_of[key]
            if layer not in priced:
                priced[layer] = self._cache.prices(layer, ()), self._split.hits_to_pay(layer)
            prices, least = priced[layer]
            gain = -less - next(prices)
            if gain > least:
                paying.append((-gain, key))
        paying.sort()
        return paying


def _columns(params: Params) -> tuple[str, ...]:
    """All that are read where there are any; none is a must."""
    depth = params["depth"] if params["least_chance"] < 1 else 0
    return (PROBS, *(f"lookahead_{distance}" for distance in range(1, depth + 1)))


@register(
    "auto",
    params={
        "depth": Param(int, 2, "layers ahead, as far as the trace has look-ahead", low=0, high=3),
        "least_chance": Param(
            float,
            0.6,
            "share of a rank's candidates needed so far, to prefetch; 1 never does",
            low=0,
            high=1,
        ),
        "cpu": Param(bool, True, "let the CPU compute misses where that is sooner"),
    },
    defaults={"chunks": 3},
    prefetches=True,
    reads_costs=True,
    reads_signals=True,
    columns=_columns,
    summary="cache rule, prefetching and CPU share chosen while running, by what has paid",
    source="moesim",
)
def build(params: Params, data: PolicyData) -> Policy:
    """With the gate probabilities and look-ahead columns that the trace has."""
    if data.costs is None:
        raise PolicyError("auto weighs CPU against link: it needs the machine's costs")
    shape = data.shape
    cache = SlotWorth(data.signals if PROBS in data.columns else None)
    split = SoonestSplit(shape, data.costs, cache, params["cpu"])
    wanted = dict(enumerate(_columns(params)[1:], start=1))
    width = min(2 * shape.top_k, shape.experts)
    tables = {
        distance: data.lookahead(name, width)
        for distance, name in wanted.items()
        if name in data.columns and data.lookahead is not None
    }
    ahead = Ahead(tables, shape, cache, split, params["least_chance"])
    return Policy(cache, ahead, split)
