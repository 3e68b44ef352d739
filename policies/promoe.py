"""ProMoE: a learned predictor some layers ahead, copies in chunks, cached experts first.

Source: ProMoE, arXiv 2410.22134. A small network a layer, trained offline on the layer's input,
says which experts layer l + stride will need (column ``learned_{stride}``, made by ``moesim
train-predictor``). What it predicts is queued at LOW priority, in three chunks an expert; at the
gate the truth preempts it: the layer's LOW tasks are dropped, what is missing is queued at HIGH
from its first missing chunk, and experts are computed in the order in which they are there.

Each part can be switched off, as in the paper's ablation: ``prefetch``, and the common options
``preempt`` (false: wrong predictions stay queued) and ``order`` (``id``: experts are computed, and
copied, in the order of their ids). All off, the policy is the paper's LRU baseline.

Our readings:
- The predictor reads the gate's input, so a prediction starts at the gate of layer l. It takes the
  machine's ``learned`` time, however many tokens there are.
- The first ``stride`` layers are demand only.
- Exactly top-k experts a token, times ``overfetch``; the union over a step's tokens, every token's
  best first.
- PushPredicted handles experts with most chunks handed over first, as PushPrecise does. What is
  there so counts first against the layer's slots: a prediction never throws out an expert that it
  names itself. Without that a prefill, which predicts more experts than there are slots, would.
- Being predicted touches a partly copied expert as it does a resident one. A partly copied expert
  whose LOW task is dropped keeps its slot until the slot is needed, and resumes where it stood.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from policies.errors import PolicyError
from policies.interface import EventTable, Keys, Policy, PolicyData, Prediction, Prefetcher
from policies.lru import Lru
from policies.memory import ABSENT, COPYING, RESIDENT
from policies.registry import Param, Params, register


class LearnedPrefetcher(Prefetcher):
    """``table``: what the predictor of layer l says of layer l + ``stride``, as keys of layer l."""

    def __init__(self, table: EventTable, stride: int, cache: Lru) -> None:
        self._table = table
        self._stride = stride
        self._cache = cache
        self._step: list[list[int]] = []

    def on_step(self, step: int) -> Iterable[Prediction]:
        """Read the step's predictions; none can be made before the first gate."""
        self._step = self._table.step(step)
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """One layer, ``stride`` ahead."""
        if layer + self._stride >= self.core.shape.layers:
            return ()
        shift = self._stride * self.core.shape.experts
        predicted = [key + shift for key in self._step[layer]]
        return (Prediction("learned", step, layer + self._stride, predicted),)

    def on_ready(self, prediction: Prediction) -> None:
        """PushPredicted: touch what has a slot, queue what is missing."""
        keys = sorted(prediction.keys, key=self._chunks_left)
        state = self.core.memory.state
        self._cache.on_predicted([key for key in keys if state[key] == COPYING])
        self.core.prefetch(prediction.layer, keys, source=prediction.source)

    def _chunks_left(self, key: int) -> int:
        state = self.core.memory.state[key]
        if state == RESIDENT:
            return -1
        if state == ABSENT:
            return self.core.options.chunks
        copy = self.core.copies[key]
        return copy.chunks - copy.sent


def _columns(params: Params) -> tuple[str, ...]:
    return (f"learned_{params['stride']}",) if params["prefetch"] else ()


@register(
    "promoe",
    params={
        "prefetch": Param(bool, True, "prefetch what the learned predictor names"),
        "stride": Param(int, 2, "layers ahead", low=1, high=9),
        "overfetch": Param(float, 1.0, "predicted experts a token over top-k", low=0.1, high=2),
    },
    defaults={"chunks": 3},
    prefetches=True,
    columns=_columns,
    summary="per-layer LRU; a learned predictor prefetches in chunks, gates preempt it",
    source="ProMoE, arXiv 2410.22134",
)
def build(params: Params, data: PolicyData) -> Policy:
    """From the trace's learned column; without prefetching, from nothing."""
    cache = Lru()
    if not params["prefetch"]:
        return Policy(cache)
    (column,) = _columns(params)
    if column not in data.columns or data.lookahead is None:
        raise PolicyError(
            f"promoe needs the column {column}, which this trace lacks: train its predictor with "
            f"`moesim train-predictor --trace DIR --stride {params['stride']}` on a trace that was "
            "recorded with `--record hidden`"
        )
    width = max(1, math.floor(params["overfetch"] * data.shape.top_k + 0.5))
    table = data.lookahead(column, width)
    return Policy(cache, LearnedPrefetcher(table, params["stride"], cache))
