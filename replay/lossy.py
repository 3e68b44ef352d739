"""Run an unmodified transformers model on what a lossy policy makes of its routing.

Where the model would call its experts, the decision core is told what the gate chose; the call goes
on, to the kernel that the model would have used, with the experts that the policy computes instead.
All weights stay in place and copies land at once: what is measured is the output, not the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from configs.errors import UserError
from policies.core import DecisionCore, Wave
from policies.interface import Prediction
from tracer.adapters import Gate, MoeBlock, find_moe_blocks, router_logits
from tracer.workload import distinct

IMPLEMENTATION = "moesim_lossy"
COLUMNS = frozenset({"experts", "weights", "gate_probs", "gate_norms"})
Array = npt.NDArray[Any]


class LiveSignals:
    """:class:`policies.interface.Signals` from the model as it runs: COLUMNS by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, dict[str, Array]] = {}

    def begin_step(self, step: int) -> None:
        """No gate has run yet."""
        self._layers.clear()

    def show(self, layer: int, columns: dict[str, Array]) -> None:
        """What the gate of ``layer`` said: arrays [rows, ...]."""
        self._layers[layer] = columns

    def reach(self, layer: int) -> None:
        """The gate has been shown by now."""

    def layer_rows(self, name: str, layer: int) -> Array:
        """A gate's rows; LookupError where it has not run or the column is not served."""
        return self._layers[layer][name]

    def step_rows(self, name: str) -> Array:
        """None are served live."""
        raise LookupError(f"{name} is not read from a running model")


class LossyRun:
    """One policy at one budget, fed with the events of a running model."""

    def __init__(self, core: DecisionCore, signals: LiveSignals) -> None:
        self.core = core
        self._signals = signals
        self._experts = core.shape.experts
        self._own = core.shape.layers * core.shape.experts
        self._step = -1
        self._previous = -1

    def begin_pass(self, tokens: int, begins: Sequence[int] = ()) -> None:
        """Before a forward pass of ``tokens`` tokens, which stands for as many decode steps.

        The policy's steps go by; what the gates say of all of them comes in the last.
        """
        for request in begins:
            self.core.request_begin(request)
        self._previous = -1
        for index in range(tokens):
            if index:
                self.core.step_end()
            self._step += 1
            self.core.step_begin(self._step, "decode")
            self._announce(self.core.predictions_at_step())
            self._land()

    def end_pass(self, ends: Sequence[int] = ()) -> None:
        """After a forward pass."""
        self.core.experts_done(self._previous)
        self._land()
        self.core.step_end()
        for request in ends:
            self.core.request_end(request)

    def event(self, layer: int, columns: dict[str, Array]) -> Routed:
        """What to compute in place of the gate's choice; ``columns``: COLUMNS, [rows, ...]."""
        core = self.core
        if self._previous >= 0:
            core.experts_done(self._previous)
            self._land()
        self._previous = layer
        self._signals.show(layer, columns)
        ids = columns["experts"]
        rows = np.zeros(len(ids), np.int64)
        found = distinct(ids[:, None, :], rows, 1, self._experts, "last-use")
        keys = (found.keys.astype(np.int64) + layer * self._experts).tolist()
        wave = core.gate(layer, keys, core.shape.assignments(keys, found.counts.tolist()))
        rule = core.policy.miss_rule
        instead = None if rule is None else rule.routed_rows()
        self._announce(core.predictions(layer, keys))
        computed = self._compute(wave)
        while not wave.last:
            wave = core.next_wave()
            computed |= self._compute(wave)
        if instead is not None:
            return Routed(*instead, np.zeros(np.shape(instead[0]), bool), changed=True)
        return self._as_computed(layer, columns, computed)

    def _compute(self, wave: Wave) -> set[int]:
        """All members of a wave, which are there once their copies have landed."""
        self._land()
        # An event that waits for nothing leaves what the one before it waited for.
        landed = [copy.key for copy in self.core.landed] if wave.waiting else []
        return {*wave.ready, *wave.cpu, *landed}

    def _as_computed(self, layer: int, columns: dict[str, Array], computed: set[int]) -> Routed:
        """The gate's own choice, as far as its experts are computed in full or at low bits."""
        first = layer * self._experts
        full, low = np.zeros(self._experts, bool), np.zeros(self._experts, bool)
        for key in computed:
            (full if key < self._own else low)[(key - first) % self._own] = True
        ids = columns["experts"]
        there = full[ids] | low[ids]
        at_low = low[ids] & ~full[ids]
        weights = np.where(there, columns["weights"], 0.0)
        return Routed(ids, weights, at_low, changed=not bool(there.all()))

    def _announce(self, predictions: Any) -> None:
        made: list[Prediction] = list(predictions)
        for prediction in made:
            self.core.prediction_ready(prediction)

    def _land(self) -> None:
        while (handed := self.core.next_chunk()) is not None:
            self.core.chunk_done(handed[0])


class Routed:
    """Ids, weights and whether each is computed at low bits, [rows, k].

    ``changed`` False: ids and weights are the gate's own, to be left untouched.
    """

    __slots__ = ("changed", "ids", "low", "weights")

    def __init__(self, ids: Any, weights: Any, low: Array, changed: bool) -> None:
        self.ids, self.weights, self.low, self.changed = ids, weights, low, changed


class LossyModel:
    """A loaded model whose experts listen to ``run``; None: the model as it is.

    ``gate``: how its gates score, from :class:`tracer.tap.RoutingTap`. ``low``: low-bit parameters
    of each MoE layer, for policies that compute with them. Use as a context manager.
    """

    def __init__(
        self, model: Any, gate: Gate, low: Sequence[dict[str, torch.Tensor]] | None = None
    ) -> None:
        self.blocks = covered_blocks(model)
        self.run: LossyRun | None = None
        self._model = model
        self._gate = gate
        self._low = low
        self._gated: list[Any] = [None] * len(self.blocks)
        self._handles: list[Any] = []

    def __enter__(self) -> LossyModel:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _routed)
        self._kept = self._model.config._experts_implementation
        for layer, block in enumerate(self.blocks):
            block.experts._moesim_lossy = (self, layer)
            self._handles.append(block.router.register_forward_hook(self._note(layer)))
        self._model.set_experts_implementation(IMPLEMENTATION)
        return self

    def __exit__(self, *error: object) -> None:
        self._model.set_experts_implementation(self._kept)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self.blocks:
            del block.experts._moesim_lossy

    @contextmanager
    def listening_to(self, run: LossyRun | None) -> Any:
        """Forward passes inside go by ``run``."""
        self.run = run
        try:
            yield
        finally:
            self.run = None

    def _note(self, layer: int) -> Any:
        def note(_: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if self.run is not None:
                self._gated[layer] = (inputs[0], output)

        return note

    def experts(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts module returns, [rows, H], for ids and weights [rows, k]."""
        module = self.blocks[layer].experts
        if self.run is None:
            return self._kernel(module, hidden, ids, weights)
        routed = self.run.event(layer, self._columns(layer, ids, weights))
        if routed.changed:
            # An id of none has weight 0: some expert is computed and counts for nothing.
            chosen = np.maximum(np.asarray(routed.ids, np.int64), 0)
            ids = torch.from_numpy(chosen).to(ids)
            weights = torch.from_numpy(np.asarray(routed.weights, np.float64)).to(weights)
        if not routed.low.any():
            return self._kernel(module, hidden, ids, weights)
        at_low = torch.from_numpy(routed.low).to(weights.device)
        out = self._kernel(module, hidden, ids, weights.masked_fill(at_low, 0))
        return out + self._at_low_bits(layer, hidden, ids, weights.masked_fill(~at_low, 0))

    def _at_low_bits(self, layer: int, *arguments: torch.Tensor) -> torch.Tensor:
        assert self._low is not None
        module = self.blocks[layer].experts
        kept = dict(module._parameters)
        module._parameters.update(self._low[layer])
        try:
            return self._kernel(module, *arguments)
        finally:
            module._parameters.update(kept)

    def _kernel(
        self, module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The kernel that the model is set to."""
        eager = self._kept in (None, "eager")
        own = type(module).forward.__wrapped__
        kernel = own if eager else ALL_EXPERTS_FUNCTIONS[self._kept]
        result: torch.Tensor = kernel(module, hidden, ids, weights)
        return result

    def _columns(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, Array]:
        block = self.blocks[layer]
        inputs, output = self._gated[layer]
        flat = inputs.reshape(-1, inputs.shape[-1])
        probs = self._gate.probabilities(router_logits(block, inputs, output))
        norms = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32)
        return {
            "experts": ids.cpu().numpy().astype(np.int16),
            "weights": weights.float().cpu().numpy(),
            "gate_probs": probs.cpu().numpy(),
            "gate_norms": norms.cpu().numpy(),
        }


def covered_blocks(model: Any) -> list[MoeBlock]:
    """The MoE layers; UserError where the model's experts are not dispatched by transformers."""
    blocks = find_moe_blocks(model)
    for block in blocks:
        if not hasattr(type(block.experts).forward, "__wrapped__"):
            raise UserError(
                f"{block.name}: {type(block.experts).__name__} is not dispatched by transformers; "
                "quality can be measured for models whose experts are, such as Mixtral, OLMoE, "
                "Qwen-MoE, gpt-oss"
            )
    return blocks


def _routed(
    module: Any, hidden: torch.Tensor, *args: torch.Tensor, **named: torch.Tensor
) -> torch.Tensor:
    """Stands in for the experts of a model that is measured."""
    ids, weights = (*args, *named.values())[:2]
    listener, layer = module._moesim_lossy
    result: torch.Tensor = listener.experts(layer, hidden, ids, weights)
    return result
