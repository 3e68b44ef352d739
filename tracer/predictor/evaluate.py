"""How well experts are foretold on held-out requests: learned, next gate and popularity.

All predictors are judged on the same rows and layers, prefill and decode apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.geometry import Geometry
from tracer.columns import DECODE, NULL_ID, PREFILL
from tracer.predictor.data import GATE_INPUTS, as_rows, shard_ranges
from tracer.predictor.model import Predictor
from tracer.trace import Trace

LEARNED, NEXT_GATE, POPULARITY = "learned", "next_gate", "popularity"
PHASES = {"decode": DECODE, "prefill": PREFILL}


class Accuracy:
    """Counts of rightly foretold experts, by predictor, phase and layer.

    Accuracy: share of a token's k experts among the k best predicted; recall_2k: among all that are
    predicted, min(2k, E).
    """

    def __init__(self, geometry: Geometry, stride: int, predictors: list[str]) -> None:
        self._geometry = geometry
        self._stride = stride
        layers = geometry.num_moe_layers - stride
        self.predictors = predictors
        self._found = {name: np.zeros((len(PHASES), layers, 2), np.int64) for name in predictors}
        self._needed = np.zeros((len(PHASES), layers), np.int64)

    def add(self, targets: NDArray, phase: NDArray, predicted: dict[str, NDArray]) -> None:
        """Count rows: targets [n, P, k] with -1 where nothing is to foretell, phase [n].

        `predicted` has the ids [n, P, min(2k, E)], best first, of every predictor.
        """
        k = self._geometry.top_k
        for index, code in enumerate(PHASES.values()):
            rows = phase == code
            wanted = targets[rows]
            self._needed[index] += (wanted != NULL_ID).sum((0, 2))
            for name in self.predictors:
                ids = predicted[name][rows]
                # A -1 is wanted by none of the predictors' ids: those are compared where it is not.
                right = (wanted[..., None] == ids[..., None, :]) & (wanted != NULL_ID)[..., None]
                self._found[name][index, :, 0] += right[..., :k].sum((0, 2, 3))
                self._found[name][index, :, 1] += right.sum((0, 2, 3))

    def overall(self, phase: str) -> float | None:
        """Accuracy of the learned predictor over all layers; None without held-out rows."""
        mean = self._scores(phase)["mean"]
        return None if mean is None else mean[LEARNED]["accuracy"]

    def report(self) -> dict[str, Any]:
        """By phase: `mean` over all layers' experts, None without rows, and `layers` with rows."""
        return {phase: self._scores(phase) for phase in PHASES}

    def _scores(self, phase: str) -> dict[str, Any]:
        index = list(PHASES).index(phase)
        found = {name: counts[index] for name, counts in self._found.items()}
        needed = self._needed[index]
        if not needed.any():
            return {"mean": None, "layers": []}
        layers = [
            {
                "layer": layer + self._stride,
                "model_layer_id": self._geometry.model_layer_ids[layer + self._stride],
                **{name: _shares(counts[layer], needed[layer]) for name, counts in found.items()},
            }
            for layer in np.flatnonzero(needed).tolist()
        ]
        mean = {name: _shares(counts.sum(0), needed.sum()) for name, counts in found.items()}
        return {"mean": mean, "layers": layers}


def _shares(found: NDArray, needed: np.int64) -> dict[str, float]:
    accuracy, recall = (found / needed).tolist()
    return {"accuracy": round(accuracy, 6), "recall_2k": round(recall, 6)}


def predictors_of(trace: Trace, stride: int) -> list[str]:
    """The predictors that can be compared on a trace: the next gate's only where recorded."""
    recorded = f"lookahead_{stride}" in trace.columns()
    return [LEARNED, *([NEXT_GATE] if recorded else []), POPULARITY]


def predictions(
    trace: Trace, predictor: Predictor, trained: frozenset[int], accuracy: Accuracy
) -> Iterator[NDArray]:
    """Yield the predictor's column shard by shard: int16 [m, L, min(2k, E)].

    Predictions made from layer l for l + stride stand at l; -1 where layer l did not run or there
    is no layer l + stride. `accuracy` counts the rows of all requests but `trained`.
    """
    stride = predictor.info.stride
    lookahead = f"lookahead_{stride}"
    optional = [lookahead] if NEXT_GATE in accuracy.predictors else []
    ranked = _by_popularity(predictor)
    for start, stop in shard_ranges(trace):
        shard = trace.load(["request", "phase", "experts", GATE_INPUTS, *optional], start, stop)
        rows = as_rows(shard["experts"], shard[GATE_INPUTS], stride)
        learned = predictor.predict_all(torch.from_numpy(rows.inputs)).cpu().numpy()
        heldout = ~np.isin(shard["request"], list(trained))
        predicted = {
            LEARNED: learned[heldout],
            POPULARITY: np.broadcast_to(ranked, learned.shape)[heldout],
        }
        if optional:
            predicted[NEXT_GATE] = shard[lookahead][heldout, :-stride]
        accuracy.add(rows.targets[heldout], shard["phase"][heldout], predicted)
        yield _column(shard["experts"], learned, stride)


def _by_popularity(predictor: Predictor) -> NDArray:
    """The experts that training used most, int64 [P, min(2k, E)], the lowest id among equals."""
    uses = predictor.weights.popularity.cpu().numpy()
    return np.argsort(-uses, axis=-1, kind="stable")[:, : predictor.width]


def _column(experts: NDArray, learned: NDArray, stride: int) -> NDArray:
    column = np.full((*experts.shape[:2], learned.shape[-1]), NULL_ID, np.int16)
    ran = experts[:, :-stride, :1] != NULL_ID
    column[:, :-stride] = np.where(ran, learned, NULL_ID)
    return column
