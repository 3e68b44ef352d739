"""Predictors that really run: the device computes them beside the experts, and the host polls.

*What* is predicted comes from the trace; the work is of the true shape, with weights drawn at
random, so that a prediction takes as long as it would. Sources that have no work here (oracles; a
map search, which the policy itself does on the host) are there at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from policies.interface import Prediction

Ready = Callable[[], bool]

NEXT_GATE, LEARNED = "next_gate", "learned"
_PARAMETERS = 2_000_000  # of a learned predictor: its hidden layer is sized by them


@dataclass(frozen=True)
class PredictorShape:
    """``hidden_units``: of the learned predictor's one hidden layer."""

    width: int
    experts: int
    top_k: int
    hidden_units: int

    @classmethod
    def of(
        cls, width: int, experts: int, top_k: int, hidden_units: int | None = None
    ) -> PredictorShape:
        """``hidden_units`` None: about 2 M parameters, at most four times the width."""
        units = hidden_units or min(_PARAMETERS // (width + experts), 4 * width)
        return cls(width, experts, top_k, units)


class Predictors:
    """Work of both kinds on a stream of its own.

    ``inputs``: gate input of each layer's captured decode step, [rows, H]. ``hidden``: of the eager
    pass in progress, [T, H]; None while the captured step decodes.
    """

    def __init__(self, shape: PredictorShape, inputs: list[torch.Tensor]) -> None:
        self._shape = shape
        self._inputs = inputs
        self._stream = torch.cuda.Stream()
        like = inputs[0]

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=like.dtype, device=like.device) / size[-1] ** 0.5

        self._gate = drawn(shape.experts, shape.width)
        self._first = drawn(shape.hidden_units, shape.width)
        self._second = drawn(shape.experts, shape.hidden_units)
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._events: list[torch.cuda.Event] = []
        self.hidden: torch.Tensor | None = None
        # The graphs write to the first for as long as they live; an eager pass has its own.
        self._captured_ids = torch.empty(
            (len(like), shape.top_k), dtype=torch.int64, pin_memory=True
        )
        self._eager_ids = self._captured_ids
        for source in (NEXT_GATE, LEARNED):
            self._capture_all(source)

    def start(self, prediction: Prediction, layer: int) -> Ready:
        """Begin what the gate of ``layer`` makes known; the test tells whether it is there.

        -1: known as the step begins; the work is that of layer 0.
        """
        source = prediction.source
        if source not in (NEXT_GATE, LEARNED):
            return _at_once
        event = self._events.pop() if self._events else torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if self.hidden is None:
                self._graphs[source, max(layer, 0)].replay()
            else:
                self._predict(source, self.hidden, self._ids_for(self.hidden))
            event.record(self._stream)

        def ready() -> bool:
            if not event.query():
                return False
            self._events.append(event)
            return True

        return ready

    def _capture_all(self, source: str) -> None:
        self._predict(source, self._inputs[0], self._captured_ids)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for layer, hidden in enumerate(self._inputs):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._predict(source, hidden, self._captured_ids)
            self._graphs[source, layer] = graph

    def _ids_for(self, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > len(self._eager_ids):
            size = (len(hidden), self._shape.top_k)
            self._eager_ids = torch.empty(size, dtype=torch.int64, pin_memory=True)
        return self._eager_ids[: len(hidden)]

    def _predict(self, source: str, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        if source == NEXT_GATE:
            scores = F.linear(hidden, self._gate)
        else:
            scores = F.linear(F.relu(F.linear(hidden, self._first)), self._second)
        ids.copy_(scores.topk(self._shape.top_k).indices, non_blocking=True)


def _at_once() -> bool:
    return True
