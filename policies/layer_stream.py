"""Streaming of whole layers: while layer l computes, all experts of layer l + 1 are copied.

Source: DeepSpeed ZeRO-Inference (DeepSpeed-Inference, arXiv 2207.00032). Two buffers of a whole
layer each; every forward step moves all experts over the link, whatever the routing.

Our readings: a layer is a copy an expert, in order of expert, on one queue that nothing overtakes.
A layer's experts run as they land; the rest of the layer is copied all the same, and the next
layer's copies wait behind it. The copies of a layer are queued at the gate of the layer before it,
those of the first layer when the step begins. Nothing is predicted, so nothing is spent on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from policies.buffers import TwoBuffers
from policies.interface import Keys, Policy, PolicyData, Prediction, Prefetcher
from policies.registry import Params, register

#: costs nothing: no hardware profile has a predictor of this name
SOURCE = "layer_stream"


class LayerStream(Prefetcher):
    """Queues whole layers, HIGH: neither dropped at a gate nor overtaken."""

    def __init__(self, layers: int, experts: int) -> None:
        self._layers = layers
        self._experts = experts

    def _layer(self, step: int, layer: int) -> Prediction:
        first = layer * self._experts
        return Prediction(SOURCE, step, layer, range(first, first + self._experts))

    def on_step(self, step: int) -> Iterable[Prediction]:
        """The first layer, beside its attention."""
        return (self._layer(step, 0),)

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """The layer after this one."""
        return (self._layer(step, layer + 1),) if layer + 1 < self._layers else ()

    def on_ready(self, prediction: Prediction) -> None:
        """Queue it behind all that is queued."""
        super().on_ready(prediction)
        self.core.promote_all(prediction.keys)


@register(
    "layer-stream",
    prefetches=True,
    summary="no cache: every layer is copied whole while the layer before it computes",
    source="DeepSpeed-Inference, arXiv 2207.00032",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Needs room for two whole layers."""
    prefetcher = LayerStream(data.shape.layers, data.shape.experts)
    return Policy(TwoBuffers(), prefetcher, scope="whole-layers")
