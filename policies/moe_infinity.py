"""MoE-Infinity: experts prefetched and kept by past requests whose activations were alike.

Source: MoE-Infinity, arXiv 2401.14361. An activation matrix counts, by layer and expert, the tokens
routed there. After each gate the matrix of the iteration (forward step) so far is compared by
cosine with the matrices of past requests, a bounded collection; the matches are summed and their
rows normalised to p. At layer l, expert e of a later layer i is prefetched with priority
``p[i, e] * (1 - (i - l) / L)``, renewed at every gate. One pool over all layers; victim: the
smallest ``(p[l, e] + eps) * (1 - l / L)``, l the expert's own layer.

Our readings:
- The cosine is taken over the layers that have run. ``matches``: how many of the most similar
  requests are summed, if they have anything in common; ties: the first in the collection. p stays
  as it was where none has.
- ``mode=offline``: the requests set aside are in the collection from the start; ``online``: it
  begins empty. Either way a request enters when it ends. A full collection gives up the matrix most
  similar to the newcomer, so that it stays diverse.
- Layers l + 1 to l + ``depth`` are queued, at most ``candidates`` times top-k experts each, however
  many tokens the step has, and only such with p > 0.
- Eviction goes by the match made at the gate before: the one of this gate is still in the making.
- Several requests in a step: one matrix for the iteration, one for each request.
- A comparison costs the machine's ``map_search`` time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import Keys, Policy, PolicyData, Prediction, Prefetcher, Recorded, Signals
from policies.registry import Param, Params, register
from policies.scored import ArrayScoredRule

Floats = npt.NDArray[np.float64]

_BLOCK_STEPS = 64
#: matches that are kept in case they are found again
_MOST_MATCHES = 256


class Collection:
    """At most ``capacity`` activation matrices. Counts are whole, so every product is exact."""

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        self.matrices = np.zeros((capacity, layers, experts))
        self.size = 0
        # Sums of squares up to and including each layer.
        self._squares = np.zeros((capacity, layers))

    def add(self, matrix: Floats) -> None:
        """A request's matrix, float64 [L, E]; in the place of the most similar one if full."""
        if not matrix.any():
            return
        place = self.size if self.size < len(self.matrices) else self._nearest(matrix)
        self.size = max(self.size, place + 1)
        self.matrices[place] = matrix
        self._squares[place] = np.cumsum((matrix**2).sum(axis=1))

    def _nearest(self, matrix: Floats) -> int:
        products = np.tensordot(self.matrices, matrix, axes=2)
        return int(self.cosines(products, len(matrix) - 1, (matrix**2).sum()).argmax())

    def most_similar(self, counts: Floats, most: int) -> list[list[list[int]]]:
        """Of every step's ``counts`` [steps, L, E] and layer, compared up to that layer.

        At most ``most``, best first, and only such that have anything in common.
        """
        if not self.size:
            return [[[] for _ in step] for step in counts]
        products = np.einsum("sle,nle->sln", counts, self.matrices[: self.size], optimize=True)
        squares = np.cumsum((counts**2).sum(axis=2), axis=1)
        norms = self._squares[: self.size].T * squares[:, :, None]
        cosines = np.cumsum(products, axis=1) / np.sqrt(np.maximum(norms, 1.0))
        best = (-cosines).argsort(axis=2, kind="stable")[..., :most]
        likes = np.count_nonzero(np.take_along_axis(cosines, best, 2) > 0, axis=2)
        return [
            [names[:count] for names, count in zip(*layers, strict=True)]
            for layers in zip(best.tolist(), likes.tolist(), strict=True)
        ]

    def products(self, layer: int, row: Floats) -> Floats:
        """Of ``row`` with every matrix's row of ``layer``, float64 [size]."""
        result: Floats = self.matrices[: self.size, layer] @ row
        return result

    def cosines(self, products: Floats, layer: int, squares: float) -> Floats:
        """With every matrix up to ``layer``, given summed products and the sum of squares."""
        norms = self._squares[: self.size, layer] * squares
        return products / np.sqrt(np.maximum(norms, 1.0))


def normalised(matrix: Floats) -> Floats:
    """Rows that sum to 1; a row of zeros stays so."""
    shares: Floats = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)
    return shares


def counts(ids: npt.NDArray[Any], experts: int) -> Floats:
    """Tokens routed to each expert, float64 [E]; ids of any shape, -1: none."""
    flat = ids.ravel()
    return np.bincount(flat[flat >= 0], minlength=experts).astype(np.float64)


class ActivationCache(ArrayScoredRule):
    """Victim: the smallest (p + eps) * (1 - l / L)."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def bind(self, core: DecisionCore) -> None:
        """Before the first match p is 0."""
        super().bind(core)
        shape = core.shape
        self._nearness = 1 - np.arange(shape.layers)[:, None] / shape.layers
        self._matched = self.worth_by(np.zeros((shape.layers, shape.experts)))

    def worth_by(self, chances: Floats) -> Floats:
        """What each key is worth by p, float64 [L, E]: [L * E]."""
        worth: Floats = ((chances + self._eps) * self._nearness).ravel()
        return worth

    def learn(self, worth: Floats) -> None:
        """``worth``: by the newest match."""
        if worth is not self._matched:
            self._matched = worth
            self.renew()

    def scores(self) -> Floats:
        """As of the last match."""
        return self._matched


class Match:
    """What some requests of the collection say together.

    ``worth`` [L * E]: to the cache.
    """

    def __init__(self, chances: Floats, worth: Floats, depth: int, width: int) -> None:
        layers, experts = chances.shape
        self.worth = worth
        best = (-chances).argsort(axis=1, kind="stable")[:, :width]
        self._chances = np.take_along_axis(chances, best, 1)
        self._keys = (best + np.arange(layers)[:, None] * experts).tolist()
        self._depth = depth
        self._ahead: dict[int, list[tuple[int, list[int], list[float]]]] = {}

    def ahead(self, layer: int) -> list[tuple[int, list[int], list[float]]]:
        """Layers up to ``depth`` ahead, each one's likely keys, best first, and priorities.

        Ties: lowest expert.
        """
        known = self._ahead.get(layer)
        if known is None:
            known = self._ahead[layer] = self._look_ahead(layer)
        return known

    def _look_ahead(self, layer: int) -> list[tuple[int, list[int], list[float]]]:
        layers = len(self._keys)
        found = []
        for target in range(layer + 1, min(layer + 1 + self._depth, layers)):
            scores = (self._chances[target] * (1 - (target - layer) / layers)).tolist()
            likely = len(scores) - scores.count(0.0)
            found.append((target, self._keys[target][:likely], scores[:likely]))
        return found


@dataclass(frozen=True)
class StepMatches:
    """One request's step: ``counts`` float64 [L, E]; by layer the most similar requests."""

    counts: Floats
    best: list[list[int]]


class ActivationPrefetcher(Prefetcher):
    """Matches the iteration so far with the collection, at every gate.

    ``recording``: steps to come. Where they belong to one request they are compared for many steps
    at once: the collection does not change before that request ends.
    """

    def __init__(
        self,
        signals: Signals,
        collection: Collection,
        cache: ActivationCache,
        matches: int,
        depth: int,
        width: int,
        recording: Recorded | None,
    ) -> None:
        self._signals = signals
        self._collection = collection
        self._cache = cache
        self._matches = matches
        self._depth = depth
        self._width = width
        self._recording = recording

    def bind(self, core: DecisionCore) -> None:
        """No request has begun."""
        super().bind(core)
        self._layers, self._experts = core.shape.layers, core.shape.experts
        self._of_request: dict[int, Floats] = {}
        self._match: Match | None = None
        self._known_matches: dict[tuple[int, ...], Match] = {}
        self._block: dict[int, StepMatches] = {}
        if self._recording is not None:
            self._steps = _StepRows(self._recording)

    def on_step(self, step: int) -> Iterable[Prediction]:
        """A new iteration."""
        self._settle()
        requests = self._signals.step_rows("request")
        present = np.unique(requests).tolist()
        for request in present:
            if request not in self._of_request:
                self._of_request[request] = np.zeros((self._layers, self._experts))
        self._compared = None
        if self._recording is not None and len(present) == 1:
            self._compared = self._compare_ahead(step)
            self._of_request[present[0]] += self._compared.counts
            return ()
        self._present = present
        self._request_of_row = requests
        self._products = np.zeros(self._collection.size)
        self._squares = 0.0
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """Compare, and predict the layers ahead."""
        self._settle()
        best = self._compare(layer) if self._compared is None else self._compared.best[layer]
        if not best:
            return ()
        match = self._match = self._sum_of(best)
        return [
            Prediction("map_search", step, target, names, scores)
            for target, names, scores in match.ahead(layer)
        ]

    def _settle(self) -> None:
        """The comparison made at the gate before is over."""
        if self._match is not None:
            self._cache.learn(self._match.worth)
            self._match = None

    def _compare(self, layer: int) -> list[int]:
        """The requests most similar to the iteration so far, best first."""
        row = self._count(layer)
        if not self._collection.size:
            return []
        self._products += self._collection.products(layer, row)
        self._squares += float(row @ row)
        cosines = self._collection.cosines(self._products, layer, self._squares)
        best = (-cosines).argsort(kind="stable")[: self._matches]
        similar: list[int] = best[cosines[best] > 0].tolist()
        return similar

    def _compare_ahead(self, step: int) -> StepMatches:
        if step not in self._block:
            counts = self._steps.counts(step, self._layers, self._experts)
            best = self._collection.most_similar(counts, self._matches)
            known = map(StepMatches, counts, best)
            self._block = dict(enumerate(known, step))
        return self._block[step]

    def _sum_of(self, best: list[int]) -> Match:
        """Counts are whole, so the sum does not depend on the order."""
        name = tuple(sorted(best))
        match = self._known_matches.get(name)
        if match is None:
            chances = normalised(self._collection.matrices[best].sum(axis=0))
            match = Match(chances, self._cache.worth_by(chances), self._depth, self._width)
            if len(self._known_matches) == _MOST_MATCHES:
                self._known_matches.clear()
            self._known_matches[name] = match
        return match

    def _count(self, layer: int) -> Floats:
        """Add the gate's routing to its requests' matrices; the counts of the whole step."""
        ids = self._signals.layer_rows("experts", layer)
        if len(self._present) == 1:
            row = counts(ids, self._experts)
            self._of_request[self._present[0]][layer] += row
            return row
        row = np.zeros(self._experts)
        for request in self._present:
            own = counts(ids[self._request_of_row == request], self._experts)
            self._of_request[request][layer] += own
            row += own
        return row

    def on_ready(self, prediction: Prediction) -> None:
        """Queue what is new, and renew the priority of what is queued."""
        if self.core.queue.low:
            self.core.reprioritise(dict(zip(prediction.keys, prediction.scores, strict=True)))
        super().on_ready(prediction)

    def on_request_end(self, request: int) -> None:
        """Its matrix joins the collection."""
        self._settle()
        self._collection.add(self._of_request.pop(request))
        self._block.clear()
        self._known_matches.clear()


class _StepRows:
    """Rows of a recording by step."""

    def __init__(self, recording: Recorded) -> None:
        step_of_row = np.asarray(recording.step_of_row)
        request_of_row = np.asarray(recording.request_of_row)
        self._bounds = np.searchsorted(step_of_row, np.arange(step_of_row[-1] + 2))
        first, last = self._bounds[:-1], self._bounds[1:] - 1
        lowest = np.minimum.reduceat(request_of_row, first)
        alone = (lowest == np.maximum.reduceat(request_of_row, first)) & (last >= first)
        #: the step's only request, -1: it has several
        self._owner = np.where(alone, lowest, -1)
        self._experts = recording.column("experts")

    def counts(self, step: int, layers: int, experts: int) -> Floats:
        """Of ``step``, which has one request, and those after it of the same one: [steps, L, E]."""
        others = np.flatnonzero(self._owner[step : step + _BLOCK_STEPS] != self._owner[step])
        steps = int(others[0]) if len(others) else len(self._owner[step : step + _BLOCK_STEPS])
        bounds = self._bounds[step : step + steps + 1]
        ids = self._experts[bounds[0] : bounds[-1]]
        within = np.repeat(np.arange(steps), np.diff(bounds))
        events = within[:, None] * layers + np.arange(layers)
        codes = (events[:, :, None] * experts + ids)[ids >= 0]
        flat = np.bincount(codes, minlength=steps * layers * experts)
        return flat.reshape(steps, layers, experts).astype(np.float64)


def collect(collection: Collection, fit: Recorded) -> None:
    """Add the matrices of the requests set aside, in their order."""
    layers, experts = collection.matrices.shape[1:]
    ids, owner = fit.column("experts"), np.asarray(fit.request_of_row)
    for request in np.unique(owner):
        own = ids[owner == request]
        collection.add(np.stack([counts(own[:, layer], experts) for layer in range(layers)]))


@register(
    "moe-infinity",
    params={
        "mode": Param(
            str, "offline", "what the collection begins with", choices=("offline", "online")
        ),
        "capacity": Param(int, 120, "requests in the collection", low=1, high=10_000),
        "matches": Param(int, 3, "most similar requests that are summed", low=1, high=10_000),
        "depth": Param(int, 3, "layers ahead", low=1, high=1000),
        "candidates": Param(
            float, 1.0, "experts queued for a layer, over top-k", low=0.1, high=1000
        ),
        "eps": Param(float, 1e-4, "added to p in the eviction score", low=0.0, high=1e6),
    },
    prefetches=True,
    fitted=True,
    reads_signals=True,
    in_blocks=True,
    columns=lambda params: ("experts", "request"),
    summary="prefetch and keep by past requests with a like activation matrix; one pool",
    source="MoE-Infinity, arXiv 2401.14361",
)
def build(params: Params, data: PolicyData) -> Policy:
    """The collection begins with the requests set aside, or empty."""
    if data.signals is None:
        raise PolicyError("moe-infinity reads the routing of the step in progress: give it signals")
    shape = data.shape
    collection = Collection(params["capacity"], shape.layers, shape.experts)
    if params["mode"] == "offline":
        if data.fit is None:
            raise PolicyError(
                "moe-infinity needs requests to collect: give a fit share above 0, or set "
                "mode=online"
            )
        collect(collection, data.fit)
    cache = ActivationCache(params["eps"])
    width = max(1, round(params["candidates"] * shape.top_k))
    prefetcher = ActivationPrefetcher(
        data.signals,
        collection,
        cache,
        params["matches"],
        params["depth"],
        width,
        data.recording,
    )
    return Policy(cache, prefetcher, scope="global")
