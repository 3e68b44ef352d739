"""EdgeMoE: experts preloaded by a table of what follows the last two layers' experts.

Source: EdgeMoE, arXiv 2308.14352. A table, made offline, gives P(expert of layer l | experts of
layers l - 2 and l - 1). At the gate of layer l - 1 the experts of layer l are queued in that order,
and loading goes on until the gate of layer l is known. One pool over all layers; victim: the
smallest frequency / layers until its next use.

Our readings:
- The paper's models are top-1. With top-k, P is the mean over the pairs (a of l - 2, b of l - 1) of
  P(expert | a and b in the same token), over the pairs that the fitted requests have; where they
  have none, over b alone. Layer 1 has one layer before it, layer 0 none: it is demand only.
- Several tokens in a step: pairs are taken of the union of their experts.
- Fitted on all tokens, prefill and decode, of the requests set aside. At most ``candidates`` times
  top-k experts are queued an event, however many tokens it has: decoding, a limit only where the
  link copies more than that in a layer's time; in prefill and in batches it holds prefetching back.
  Experts that never followed are not queued.
- Frequency: events that needed the expert, on the requests set aside and so far.
- "Layers until its next use" goes on into the next step: the layer in progress is L layers away.
- A look-up costs the machine's ``next_gate`` time: on the host, a few rows averaged and sorted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import (
    Keys,
    Policy,
    PolicyData,
    Prediction,
    Prefetcher,
    Recorded,
    Shape,
)
from policies.registry import Param, Params, register
from policies.scored import ArrayScoredRule

Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 1024
_BLOCK_STEPS = 32


@dataclass(frozen=True)
class LayerTable:
    """What follows, for one layer.

    ``row_of_pair``: int32 [E, E], row of ``after_pair`` for experts a and b, -1: never seen;
    ``after_pair``: float32 [pairs seen + 1, E], zeros the last; ``after_one``: float32 [E, E],
    zeros: never seen.
    """

    row_of_pair: npt.NDArray[np.int32]
    after_pair: npt.NDArray[np.float32]
    after_one: npt.NDArray[np.float32]

    def chances(self, before: Ints | None, last: Ints) -> npt.NDArray[np.float32]:
        """P of each expert, float32 [n, E], for n events.

        ``before`` and ``last``: int [n, experts needed] of two layers before (None: there is none)
        and of the last.
        """
        after_one = _sum(self.after_one[last])
        after_one /= np.float32(last.shape[1])
        if before is None:
            return after_one
        rows = self.row_of_pair[before[:, :, None], last[:, None, :]].reshape(len(last), -1)
        seen = np.count_nonzero(rows >= 0, axis=1)[:, None].astype(np.float32)
        # A pair never seen takes the last row: zeros.
        after_pair = _sum(self.after_pair[rows])
        return np.where(seen > 0, after_pair / np.maximum(seen, 1), after_one)


def _sum(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the middle axis, one after the other."""
    total: npt.NDArray[np.float32] = np.add.reduce(rows, axis=1)
    return total


def fit_tables(experts: npt.NDArray[Any], num_experts: int) -> list[LayerTable]:
    """Tables of layers 1, 2, ... from expert ids [tokens, L, k], -1 where a layer did not run."""
    return [
        _fit_layer(experts[:, max(0, layer - 2) : layer + 1], num_experts)
        for layer in range(1, experts.shape[1])
    ]


def _fit_layer(experts: npt.NDArray[Any], size: int) -> LayerTable:
    """``experts``: [tokens, 2 or 3, k], the layer itself last."""
    ran = (experts >= 0).all(axis=(1, 2))
    ids = experts[ran].astype(np.int64)
    last, now = ids[:, -2], ids[:, -1]
    after_one = np.bincount(_codes(last, now, size), minlength=size * size).reshape(size, size)
    row_of_pair = np.full((size, size), -1, np.int32)
    if ids.shape[1] == 2:
        return LayerTable(row_of_pair, np.zeros((1, size), np.float32), _shares(after_one, ids))
    followers = np.zeros(size**3, np.int64)
    for first in range(0, len(ids), _BLOCK_ROWS):
        block = ids[first : first + _BLOCK_ROWS]
        pairs = _codes(block[:, 0], block[:, 1], size).reshape(len(block), -1)
        followers += np.bincount(_codes(pairs, block[:, 2], size), minlength=size**3)
    counts = followers.reshape(size * size, size)
    seen = np.flatnonzero(counts.any(axis=1))
    row_of_pair.flat[seen] = np.arange(len(seen))
    after_pair = np.append(_shares(counts[seen], ids), np.zeros((1, size), np.float32), axis=0)
    return LayerTable(row_of_pair, after_pair, _shares(after_one, ids))


def _codes(first: npt.NDArray[Any], second: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """``a * size + b`` of all a and b in the same token, flat."""
    codes: npt.NDArray[Any] = (first[:, :, None] * size + second[:, None, :]).ravel()
    return codes


def _shares(counts: npt.NDArray[Any], ids: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Of the tokens behind each row, the share that needed each expert: rows sum to k or to 0."""
    tokens = counts.sum(axis=1, keepdims=True) / ids.shape[2]
    shares: npt.NDArray[np.float32] = (counts / np.maximum(tokens, 1)).astype(np.float32)
    return shares


class Paths:
    """Predictions from paths: what the tables say of the layer that follows.

    ``recording``: steps to come. Where all their events need top-k experts, predictions are worked
    out for many steps at once; each uses the events before it only.
    """

    def __init__(
        self, tables: list[LayerTable], shape: Shape, width: int, recording: Recorded | None
    ) -> None:
        self._tables = tables
        self._experts = shape.experts
        self._width = width
        self._events = None if recording is None else recording.events
        self._block: dict[int, list[list[int]]] = {}
        if self._events is not None:
            sizes = np.diff(np.asarray(self._events.offsets)).reshape(-1, shape.layers)
            self._even = (sizes == shape.top_k).all(axis=1)
            self._sizes = (shape.layers, shape.top_k)

    def of_step(self, step: int) -> list[list[int]] | None:
        """Keys of layers 1, 2, ...; None: to be asked for layer by layer."""
        if self._events is None or not self._even[step]:
            return None
        if step not in self._block:
            self._block = self._work_out(step)
        return self._block[step]

    def _work_out(self, first: int) -> dict[int, list[list[int]]]:
        assert self._events is not None
        steps = first + np.flatnonzero(self._even[first : first + _BLOCK_STEPS])
        layers, width = self._sizes
        offsets = np.asarray(self._events.offsets)[steps * layers]
        entries = offsets[:, None] + np.arange(layers * width)
        keys = np.asarray(self._events.keys)[entries].astype(np.int64)
        experts = keys.reshape(len(steps), layers, width) % self._experts
        by_layer = [
            self.after(layer, experts[:, layer - 1] if layer else None, experts[:, layer])
            for layer in range(len(self._tables))
        ]
        by_step = [list(predicted) for predicted in zip(*by_layer, strict=True)]
        return dict(zip(steps.tolist(), by_step, strict=True))

    def after(self, layer: int, before: Ints | None, last: Ints) -> list[list[int]]:
        """The likeliest keys after ``layer``, best first, of each event; ties: lowest expert."""
        chances = self._tables[layer].chances(before, last)
        best = (-chances).argsort(axis=1, kind="stable")[:, : self._width]
        likely = np.count_nonzero(np.take_along_axis(chances, best, 1) > 0, axis=1)
        keys = (best + (layer + 1) * self._experts).tolist()
        return [names[:count] for names, count in zip(keys, likely.tolist(), strict=True)]


class PathPrefetcher(Prefetcher):
    """Predicts the next layer from this one and the one before."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def bind(self, core: DecisionCore) -> None:
        """No layer has run."""
        super().bind(core)
        self._experts = core.shape.experts
        self._last = core.shape.layers - 1
        self._before: Ints | None = None

    def on_step(self, step: int) -> Iterable[Prediction]:
        """The first layer has none before it."""
        self._before = None
        self._layer = -1
        self._known = self._paths.of_step(step)
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """The likeliest of the next layer."""
        if layer == self._last:
            return ()
        if self._known is not None:
            return (Prediction("next_gate", step, layer + 1, self._known[layer]),)
        last = np.array([keys], np.int64) - layer * self._experts
        before = self._before if layer == self._layer + 1 else None
        self._before, self._layer = last, layer
        if not keys:
            return ()
        return (
            Prediction("next_gate", step, layer + 1, self._paths.after(layer, before, last)[0]),
        )


class FrequencyOverDistance(ArrayScoredRule):
    """Victim: the smallest frequency / layers until the next use."""

    def __init__(self, counts: npt.NDArray[Any]) -> None:
        self._fitted = np.asarray(counts, np.float64).ravel()

    def bind(self, core: DecisionCore) -> None:
        """Layers until each key's next use, by layer in progress (-1: none yet)."""
        super().bind(core)
        layers = np.arange(core.shape.layers)
        away = (layers[None, :] - layers[:, None] - 1) % core.shape.layers + 1
        away = np.concatenate((away, layers[None, :] + 1))
        self._away = np.repeat(away, core.shape.experts, axis=1).astype(np.float64)
        self.reset()

    def on_step(self, step: int) -> None:
        """All are as far away as their layers."""
        self.renew()

    def on_event(self, layer: int, keys: Keys) -> None:
        """One use each; all come a layer nearer."""
        self._counts[list(keys)] += 1
        self.renew()

    def scores(self) -> npt.NDArray[np.float64]:
        """Frequency over distance."""
        worth: npt.NDArray[np.float64] = self._counts / self._away[self.core.layer]
        return worth

    def reset(self) -> None:
        """Back to the fitted counts."""
        self._counts = self._fitted.copy()
        self.renew()


@register(
    "edgemoe",
    params={
        "candidates": Param(
            float, 1.0, "experts queued for a layer, over top-k", low=0.1, high=1000
        ),
    },
    prefetches=True,
    fitted=True,
    in_blocks=True,
    columns=lambda params: ("experts",),
    summary="preload by a table of what followed the last two layers' experts; one pool",
    source="EdgeMoE, arXiv 2308.14352",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Tables and frequencies from the requests set aside."""
    if data.fit is None or data.popularity is None:
        raise PolicyError("edgemoe needs requests to learn from: give a fit share above 0")
    shape = data.shape
    tables = fit_tables(data.fit.column("experts"), shape.experts)
    width = max(1, round(params["candidates"] * shape.top_k))
    paths = Paths(tables, shape, width, data.recording)
    cache = FrequencyOverDistance(data.popularity)
    return Policy(cache, PathPrefetcher(paths), scope="global")
