"""A resident set a layer, routed to alone and exchanged in the background. Lossy, and never waits.

Source: SwapMoE (arXiv 2308.15030). Each layer keeps its n_l *virtual experts*; the gate's logits of
the others are masked, so a token takes the best k of those that are there. An expert matters by
the sum, over the tokens that the unmasked gate sends to it, of ||x|| * gate weight * ||W_e||. Every
``frequency`` steps the target of a layer becomes its n_l experts that matter most, and the
difference is copied at LOW priority, spread over the steps until the next target.

Our readings:

- Of a token's experts those that are there stay, and the most probable others that are there take
  the places of the rest: the masked top-k. Its weights are :meth:`Masked.routed_rows`'s.
- Importance is an exponential mean: a token counts ``decay`` times as much as the next. It begins
  with the mean of the requests set aside, whose top is loaded before the clock starts. Without the
  column gate_norms, ||x|| is 1.
- A victim leaves when its successor's first chunk is handed over, as everywhere; the successor
  takes part once it has landed. A spare slot for it would be memory that is idle at all other
  times: instead the layer serves one expert less while one is on its way. The best exchange of
  every layer goes first, then the second best, so that a layer rarely has two under way. At most
  ``swaps`` copies a step are queued; one whose slot cannot be given up at once is queued anew.
- In prefill and in batches all tokens of a step see one resident set, and all count.
- Planning: the budget goes slot by slot to the layer where it retains most gate weight on the
  requests set aside (``slots=greedy``), at least top-k each, as if its set never changed.
  ``frequency=0`` takes the longest of ``FREQUENCIES`` whose retained weight there is within 0.5 %
  of the best: half of them give the first importance, the other half judge. The paper profiles a
  model's accuracy and searches genetically; gate weight is what a trace can tell.

Counted: the weight of experts that were asked for and not computed (``lost_mass``), one unit a
token and layer. Masking a layer changes the inputs of later ones, which a trace cannot show:
`moesim quality` runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import (
    CacheRule,
    Keys,
    MissRule,
    Policy,
    PolicyData,
    Prediction,
    Prefetcher,
    Recorded,
    Shape,
)
from policies.memory import ABSENT, QUEUED, RESIDENT
from policies.registry import Param, Params, register
from policies.slots import SPREADS

FREQUENCIES = (1, 2, 4, 8, 16, 32, 64, 128)
WEIGHTS = ("sum", "masked", "own")
_WORTH = 0.005
_MOST_STEPS = 2000
_UNITS = 1 << 20
_SAME_SUM = 0.02  # top-k weights of a row in float16, and those of a model in bf16

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Gates:
    """What the gates said of some tokens: by row, layer and rank, importance and weight.

    ``experts`` int [rows, L, k]; ``weights`` [rows, L, k], each token's summing to 1, 0 for none;
    ``importance`` alike; ``step_of_row`` int [rows]; ``num_experts``.
    """

    experts: npt.NDArray[Any]
    weights: Floats
    importance: Floats
    step_of_row: npt.NDArray[Any]
    num_experts: int

    def rows(self, chosen: Any) -> Gates:
        """Some of the rows."""
        return Gates(
            self.experts[chosen],
            self.weights[chosen],
            self.importance[chosen],
            self.step_of_row[chosen],
            self.num_experts,
        )

    def sums(self, values: Floats) -> Floats:
        """``values`` [rows, L, k] summed by layer and expert, [L, E]."""
        layers = self.experts.shape[1]
        first = np.arange(layers)[:, None] * self.num_experts
        keys = np.maximum(self.experts, 0) + first
        size = layers * self.num_experts
        flat: Floats = np.bincount(keys.ravel(), values.ravel(), minlength=size).astype(float)
        return flat.reshape(layers, self.num_experts)


def read_gates(fit: Recorded, factors: Floats, has_norms: bool) -> Gates:
    """The requests set aside. ``factors`` [L, E]: norms of the experts' weights."""
    experts = np.asarray(fit.column("experts"))
    there = experts >= 0
    weights = np.where(there, fit.column("weights"), 0).astype(np.float64)
    layer = np.arange(experts.shape[1])[:, None]
    importance = weights * factors[layer, np.maximum(experts, 0)]
    if has_norms:
        norms = np.nan_to_num(np.asarray(fit.column("gate_norms"), np.float64))
        importance *= norms[..., None]
    total = np.maximum(weights.sum(-1, keepdims=True), np.finfo(float).tiny)
    step_of_row = np.asarray(fit.step_of_row)
    return Gates(experts, weights / total, importance, step_of_row, factors.shape[1])


def most(importance: Floats, slots: Sequence[int]) -> Mask:
    """The experts of each layer that matter most, as many as it has slots: bool [L, E].

    Ties: lowest expert.
    """
    return np.asarray(_ranks(importance) < np.asarray(slots)[:, None])


def _ranks(importance: Floats) -> npt.NDArray[np.int64]:
    """Each expert's place in its layer, 0 for the most important."""
    order = (-importance).argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(importance.shape[1])[None], 1)
    return ranks


def in_turn(members: Mask, importance: Floats, *, best_first: bool) -> list[int]:
    """Keys of ``members`` [L, E]: the first of every layer by importance, then the second ...

    Ties: lowest key.
    """
    worth = -importance if best_first else importance
    layers, experts = members.nonzero()
    order = np.lexsort((experts, worth[layers, experts], layers))
    layers, experts = layers[order], experts[order]
    starts = np.searchsorted(layers, layers)
    turn = np.arange(len(layers)) - starts
    keys = layers * members.shape[1] + experts
    found: list[int] = keys[np.lexsort((layers, turn))].tolist()
    return found


def quota(waiting: int, steps_left: int, limit: int) -> int:
    """Copies to queue now, so that all are queued evenly before the next target."""
    return min(limit, -(-waiting // max(1, steps_left)))


class VirtualExperts(CacheRule):
    """Who is resident, who should be, and how much each expert matters."""

    def __init__(
        self, prior: Floats, factors: Floats, decay: float, gates: Gates, frequency: int, swaps: int
    ) -> None:
        self._prior = prior
        self._factors = factors
        self._decay = decay
        self._gates = gates
        self.swaps = swaps
        self.frequency = frequency
        self.planned = frequency == 0

    def bind(self, core: DecisionCore) -> None:
        """The slots are known now: plan the frequency where none was given."""
        super().bind(core)
        plan = core.plan
        self._experts = core.shape.experts
        self._pool_of = core.memory.pool_of
        self.slots = [
            min(plan.capacity[pool] // unit, core.shape.experts)
            for pool, unit in zip(plan.pool_of_layer, plan.unit_of_layer, strict=True)
        ]
        self._held: list[set[int]] = [set() for _ in plan.capacity]
        if self.planned:
            self.frequency = plan_frequency(self._gates, self.slots, self._decay, self.swaps)
        self.reset()

    def reset(self) -> None:
        """Back to what the requests set aside told."""
        self.importance = self._prior.copy()
        self.target = most(self.importance, self.slots)
        self.missing: list[int] = []
        self._rows = 0

    def facts(self) -> dict[str, Any]:
        """What was planned."""
        return {"frequency": self.frequency, "slots_by_layer": self.slots}

    def worth(self, fit: Recorded, shape: Shape) -> npt.NDArray[np.int64]:
        """Gate weight that the most important 0 to E experts of each layer would retain for good.

        In units of 2**-20 of a token's weight, the mean over tokens.
        """
        gates = self._gates
        order = (-self._prior).argsort(axis=1, kind="stable")
        mass = np.take_along_axis(gates.sums(gates.weights), order, 1)
        mass *= _UNITS / max(1, len(gates.experts))
        return np.pad(np.cumsum(mass, axis=1), ((0, 0), (1, 0))).astype(np.int64)

    def warm_set(self) -> Keys:
        """The first target, as far as there is room beside what is still on its way."""
        memory = self.core.memory
        keys = in_turn(self.target, self.importance, best_first=True)
        room = list(memory.free)
        chosen = []
        for key in keys:
            pool = self._pool_of[key]
            if self.state[key] == ABSENT and room[pool] > 0:
                room[pool] -= 1
                chosen.append(key)
        return sorted(chosen)

    def count(self, layer: int, experts: Any, weights: Any, norms: Any) -> None:
        """A gate's rows: experts and weights [rows, k], norms of its inputs [rows] or None."""
        if len(experts) > self._rows:
            self._rows = len(experts)
        values = weights * self._factors[layer][experts]
        if norms is not None:
            values *= np.asarray(norms, np.float64)[:, None]
        if len(experts) == 1 and -1 not in experts[0].tolist():
            self.importance[layer, experts[0]] += values[0]
            return
        there = experts >= 0
        self.importance[layer] += np.bincount(
            experts[there], values[there], minlength=self._experts
        )

    def age(self) -> None:
        """A step is over: its tokens age all that was counted."""
        self.importance *= self._decay**self._rows
        self._rows = 0

    def retarget(self) -> None:
        """Choose the targets anew, and put what is missing in order of copying."""
        self.target = most(self.importance, self.slots)
        held = np.zeros(self.target.shape, bool)
        keys = [key for pool in self._held for key in pool]
        held.reshape(-1)[keys] = True
        self.missing = in_turn(self.target & ~held, self.importance, best_first=True)

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        self._held[self._pool_of[key]].add(key)

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self._held[self._pool_of[key]].discard(key)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """Of those that are no target the one that matters least; ties: lowest key."""
        target, importance = self.target.reshape(-1), self.importance.reshape(-1)
        state = self.state
        leavers = [
            key
            for key in self._held[pool]
            if state[key] == RESIDENT and not target[key] and key not in barred
        ]
        return min(leavers, key=lambda key: (importance[key], key), default=None)


class Swapper(Prefetcher):
    """Queues what the targets lack, some of it every step."""

    def __init__(self, cache: VirtualExperts) -> None:
        self._cache = cache

    def bind(self, core: DecisionCore) -> None:
        """Nothing is missing yet."""
        super().bind(core)
        self._age = 0

    def on_step(self, step: int) -> Iterable[Prediction]:
        """New targets when it is time, and this step's share of the copies."""
        cache, core, state = self._cache, self.core, self.core.memory.state
        if self._age >= cache.frequency:
            self._age = 0
            before = cache.missing
            cache.retarget()
            target = cache.target.reshape(-1)
            for key in before:
                if state[key] == QUEUED and not target[key]:
                    core.cancel(key)
        self._age += 1
        waiting = [key for key in cache.missing if state[key] == ABSENT]
        if waiting:
            now = quota(len(waiting), cache.frequency - self._age + 1, cache.swaps)
            core.bring_in(waiting[:now], "swap")
        return ()

    def on_step_end(self, step: int) -> None:
        """The step's tokens have been counted."""
        self._cache.age()


class Masked(MissRule):
    """Routes to residents alone."""

    lossy = True

    def __init__(self, cache: VirtualExperts, has_norms: bool, weights: str, normalised: bool):
        self._cache = cache
        self._has_norms = has_norms
        self._how = "sum" if normalised and weights == "masked" else weights

    def bind(self, core: DecisionCore) -> None:
        """Where the gates are read."""
        super().bind(core)
        assert core.signals is not None
        self._signals = core.signals
        self._state = core.memory.state
        self._experts = core.shape.experts
        self._ids: Any = None

    def route(self, step: int, layer: int, keys: Keys) -> Keys:
        """The keys of the masked top-k, in order of last use."""
        rows = self._signals.layer_rows
        experts, weights = rows("experts", layer), rows("weights", layer)
        norms = rows("gate_norms", layer) if self._has_norms else None
        self._cache.count(layer, experts, weights, norms)
        self._layer, self._ids = layer, None
        state = self._state
        ran = 1 if len(experts) == 1 else int((experts >= 0).any(1).sum())
        if all(state[key] == RESIDENT for key in keys):
            self.core.book_gate_mass(ran, 0.0, 0.0)
            return keys
        probs = rows("gate_probs", layer)
        first = layer * self._experts
        if len(experts) == 1:
            there = [now == RESIDENT for now in state[first : first + self._experts]]
            chosen, lost = _mask_one(experts[0].tolist(), weights[0].tolist(), probs[0], there)
            self._ids = [chosen]
            self.core.book_gate_mass(ran, 0.0, lost)
            return [first + expert for expert in chosen if expert >= 0]
        resident = self._residents(layer)
        self._ids = masked_top_k(experts, probs, resident)
        self.core.book_gate_mass(ran, 0.0, lost_weight(experts, weights, resident))
        used = [first + expert for expert in self._ids.ravel().tolist() if expert >= 0]
        self.core.reassign(Counter(used))
        return list(dict.fromkeys(reversed(used)))[::-1]

    def _residents(self, layer: int) -> Mask:
        first = layer * self._experts
        return np.asarray(np.array(self._state[first : first + self._experts]) == RESIDENT)

    def routed_rows(self) -> tuple[Any, Any] | None:
        """Ids and weights [rows, k] to compute with; None: the gate's own.

        ``sum``: in proportion to the gate's, each token's summing to what they summed to;
        ``masked``: softmax over the residents' logits, so larger the less probable the residents
        are (where the gate itself normalises over its top-k, the same as ``sum``); ``own``: what
        the gate gave to each.
        """
        resident = self._residents(self._layer)
        if resident.all() or (self._ids is None and self._how != "masked"):
            return None
        rows = self._signals.layer_rows
        experts, weights = rows("experts", self._layer), rows("weights", self._layer)
        ids = np.asarray(experts if self._ids is None else self._ids, np.int64)
        probs = np.asarray(rows("gate_probs", self._layer), np.float64)
        return ids, masked_weights(experts, weights, ids, probs, resident, self._how)


def masked_top_k(experts: Any, probs: Any, resident: Mask) -> npt.NDArray[np.int64]:
    """``experts`` [rows, k], every absent one replaced by the most probable resident not chosen.

    ``probs`` [rows, E], ``resident`` bool [E]. -1 stays, and stands where no resident is left.
    Ties: lowest expert.
    """
    asked = np.asarray(experts, np.int64)
    there = asked >= 0
    lost = there & ~resident[asked]
    open_probs = np.where(resident, probs, -1.0)
    row, rank = there.nonzero()
    open_probs[row, asked[row, rank]] = -1.0
    best = (-open_probs).argsort(axis=1, kind="stable")[:, : asked.shape[1]]
    available = (open_probs >= 0).sum(1, keepdims=True)
    place = np.maximum(lost.cumsum(1) - 1, 0)
    substitute = np.take_along_axis(best, np.minimum(place, best.shape[1] - 1), 1)
    substitute = np.where(place < available, substitute, -1)
    return np.where(lost, substitute, asked)


def _mask_one(
    asked: list[int], weights: list[float], probs: Any, resident: list[bool]
) -> tuple[list[int], float]:
    """:func:`masked_top_k` and :func:`lost_weight` of one token, quicker."""
    total = lost = 0.0
    gaps = []
    for rank, (expert, weight) in enumerate(zip(asked, weights, strict=True)):
        if expert < 0:
            continue
        total += weight
        if not resident[expert]:
            lost += weight
            gaps.append(rank)
    chosen = list(asked)
    best = iter((-probs).argsort(kind="stable").tolist())
    others = (expert for expert in best if resident[expert] and expert not in asked)
    for rank in gaps:
        chosen[rank] = next(others, -1)
    return chosen, lost / total if total else 0.0


def lost_weight(experts: Any, weights: Any, resident: Mask) -> float:
    """Of each token's weight, the share of experts that are not resident; summed over tokens."""
    there = experts >= 0
    values = np.where(there, weights, 0).astype(np.float64)
    total = np.maximum(values.sum(1), np.finfo(float).tiny)
    lost = (values * (there & ~resident[experts])).sum(1)
    return float((lost / total).sum())


def masked_weights(
    experts: Any, weights: Any, ids: Any, probs: Floats, resident: Mask, how: str
) -> Floats:
    """Weights [rows, k] of ``ids``; see :meth:`Masked.routed_rows`. 0 where an id is -1."""
    given = np.where(experts >= 0, weights, 0).astype(np.float64)
    asked = np.where(experts >= 0, np.take_along_axis(probs, np.maximum(experts, 0), 1), 0.0)
    chosen = np.where(ids >= 0, np.take_along_axis(probs, np.maximum(ids, 0), 1), 0.0)
    tiny = np.finfo(float).tiny
    total = given.sum(1, keepdims=True)
    if how == "sum":
        scaled = chosen * total / np.maximum(chosen.sum(1, keepdims=True), tiny)
    else:
        # A gate's weights are its probabilities times a factor, such as a scaling of the model's.
        scaled = chosen * total / np.maximum(asked.sum(1, keepdims=True), tiny)
        if how == "masked":
            return np.asarray(scaled / np.maximum(probs[:, resident].sum(1, keepdims=True), tiny))
    unchanged = (ids == experts).all(1, keepdims=True)
    return np.where(unchanged, given, scaled)


def plan_frequency(gates: Gates, slots: Sequence[int], decay: float, swaps: int) -> int:
    """The longest of FREQUENCIES that retains nearly as much gate weight as the best.

    The first half of the steps gives the first importance, the second half judges (at most
    2,000 steps).
    """
    prior, judging = _halves(gates, decay)
    retained = [_retained(judging, prior, slots, decay, each, swaps) for each in FREQUENCIES]
    enough = max(retained) * (1 - _WORTH)
    return max(f for f, mass in zip(FREQUENCIES, retained, strict=True) if mass >= enough)


def _halves(gates: Gates, decay: float) -> tuple[Floats, Gates]:
    """Importance after the first half of the steps, and the second half, at most 2,000 steps."""
    steps = int(gates.step_of_row[-1]) + 1
    half = int(np.searchsorted(gates.step_of_row, steps // 2))
    stop = int(np.searchsorted(gates.step_of_row, steps // 2 + _MOST_STEPS))
    return start_importance(gates.rows(slice(0, half)), decay), gates.rows(slice(half, stop))


def _bounds(gates: Gates) -> list[int]:
    """Where each step's rows begin and, last, where they end."""
    found: list[int] = np.flatnonzero(
        np.diff(gates.step_of_row, prepend=-1, append=np.iinfo(np.int64).max)
    ).tolist()
    return found


def start_importance(gates: Gates, decay: float) -> Floats:
    """Importance [L, E] that tokens such as these settle at."""
    return gates.sums(gates.importance) / max(1, len(gates.experts)) / (1 - decay)


def _retained(
    gates: Gates, prior: Floats, slots: Sequence[int], decay: float, frequency: int, swaps: int
) -> float:
    """Gate weight that stays where copies of a step are there in the next."""
    importance = prior.copy()
    resident = most(importance, slots)
    flat = resident.reshape(-1)
    layer = np.arange(resident.shape[0])[:, None]
    coming: list[tuple[int, int]] = []
    mass = 0.0
    for step, (lo, hi) in enumerate(pairwise(_bounds(gates))):
        if step and step % frequency == 0:
            target = most(importance, slots)
            newcomers = in_turn(target & ~resident, importance, best_first=True)
            leavers = in_turn(resident & ~target, importance, best_first=False)
            coming = list(zip(newcomers, leavers, strict=True))
        if coming:
            now = quota(len(coming), frequency - step % frequency, swaps)
            for newcomer, leaver in coming[:now]:
                flat[newcomer], flat[leaver] = True, False
            del coming[:now]
        experts = np.maximum(gates.experts[lo:hi], 0)
        mass += float((gates.weights[lo:hi] * resident[layer, experts]).sum())
        np.add.at(importance, (layer, experts), gates.importance[lo:hi])
        importance *= decay ** (hi - lo)
    return mass


def _columns(params: Params) -> tuple[str, ...]:
    return ("experts", "weights", "gate_probs", "gate_norms")


def _notes(data: PolicyData) -> tuple[str, ...]:
    """What the trace lacks: an error where nothing can replace it, a note where something does."""
    for name in ("gate_probs", "weights"):
        if name not in data.columns:
            raise PolicyError(
                f"swapmoe needs the column {name}, which this trace lacks: record it with "
                "`moesim trace ... --record probs,hidden`"
            )
    notes = []
    if "gate_norms" not in data.columns:
        notes.append(
            "swapmoe: the trace has no gate_norms, so experts matter by gate weight whatever the "
            "size of their inputs; record it with `moesim trace ... --record probs,hidden`"
        )
    if data.expert_norms is None:
        notes.append("swapmoe: the trace has no norms of expert weights, so they count alike")
    return tuple(notes)


@register(
    "swapmoe",
    params={
        "frequency": Param(
            int, 0, "steps from target to target; 0: planned on requests set aside", 0, 1 << 20
        ),
        "decay": Param(float, 0.99, "what a token counts beside the next one", 0, 0.9999),
        "swaps": Param(int, 4, "copies queued a step at most", low=1, high=1 << 20),
        "weights": Param(
            str,
            "sum",
            "weights in live runs: the token's sum kept, a masked softmax, or the gate's own",
            choices=WEIGHTS,
        ),
        "slots": Param(
            str, "greedy", "slots a layer: by retained gate weight, or even", choices=SPREADS
        ),
    },
    lossless=False,
    prefetches=True,
    fitted=True,
    reads_signals=True,
    columns=_columns,
    summary="routes to a resident set alone, exchanged in the background by importance",
    source="SwapMoE, arXiv 2308.15030",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Fitted on the requests set aside."""
    notes = _notes(data)
    if data.signals is None:
        raise PolicyError("swapmoe reads the gates of the step in progress: give it signals")
    if data.fit is None:
        raise PolicyError("swapmoe needs requests to plan with: give a fit share above 0")
    shape = data.shape
    ones = np.ones((shape.layers, shape.experts))
    factors = ones if data.expert_norms is None else np.asarray(data.expert_norms, np.float64)
    has_norms = "gate_norms" in data.columns
    gates = read_gates(data.fit, factors, has_norms)
    prior = start_importance(gates, params["decay"])
    cache = VirtualExperts(
        prior, factors, params["decay"], gates, params["frequency"], params["swaps"]
    )
    rule = Masked(cache, has_norms, params["weights"], normalised(data.fit.column("weights")))
    return Policy(cache, Swapper(cache), rule, notes=notes, least_slots=shape.top_k)


def normalised(weights: Any) -> bool:
    """Whether every token's weights [rows, L, k] have one sum: the gate normalises its top-k."""
    values = np.asarray(weights, np.float64)
    sums = values[np.isfinite(values).all(-1)].sum(-1)
    return bool(len(sums)) and float(np.ptp(sums)) <= _SAME_SUM * float(sums.mean())
