"""See what a transformers model routes, without changing what it computes or waiting for the GPU.

The tap hooks the one module that every MoE block has, `experts`: what it is called with is what is
executed, whichever kernel transformers then dispatches to (`generate` chooses another one for
decoding on a GPU, and still does). Gates are hooked only for columns that need them.

In the layers' path tensors are only kept; after the step each column is stacked and copied to the
host without waiting. `Capture.result` waits for it: best asked for while the next step runs.

    with RoutingTap(model, ["weights"]) as tap:
        model(tokens)
        columns = tap.take().result()
    with tap.collect() as steps:
        model.generate(tokens)               # one element of `steps` for each forward pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from configs.errors import UserError
from tracer.adapters import (
    Gate,
    Pair,
    find_moe_blocks,
    fit_gate,
    is_dispatched,
    router_logits,
)
from tracer.timing_table import StepTimings
from tracer.timings import StepTimer

GATE_COLUMNS = ("gate_probs", "gate_norms", "gate_inputs")
_PROBE_TOKENS = 32


class Capture:
    """The columns of one forward pass, on their way to the host."""

    def __init__(
        self, columns: dict[str, torch.Tensor], event: Any, timer: StepTimer | None
    ) -> None:
        self._columns, self._event, self._timer = columns, event, timer
        self._marks = timer.take() if timer else []

    def result(self) -> dict[str, NDArray]:
        """Wait for the copies; return columns by name as `tracer.columns` shapes them."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._columns.items()}

    def timings(self) -> StepTimings | None:
        """The step's times, None where the tap takes none; to be asked for once, after `result`."""
        return self._timer.read(self._marks) if self._timer else None


def check_lookahead(layers: int) -> None:
    """Raise UserError where predictions cannot be recorded for so many layers ahead."""
    if not 0 <= layers < 10:
        raise UserError(f"lookahead {layers}: give 0 to 9 layers")


class RoutingTap:
    """Records the routing of `model` while it is entered; one `take()` for each forward pass.

    `model`: a decoder-only model, or one stack of an encoder-decoder. `columns`: which of weights,
    gate_probs, gate_norms, gate_inputs, embedding to give beside the expert ids; `lookahead`: how
    many MoE layers ahead the next gates predict; `timings`: time each layer's parts. Entering and
    leaving again costs a few microseconds a layer; a model that is not tapped has no trace of it.

    Raises UserError for a model that is not covered, and for a look-ahead where the gates' choice
    does not follow from their logits by a known rule.
    """

    def __init__(
        self,
        model: Any,
        columns: Iterable[str] = ("weights",),
        lookahead: int = 0,
        timings: bool = False,
    ) -> None:
        check_lookahead(lookahead)
        self.blocks = find_moe_blocks(model)
        self._model = model
        self._columns = frozenset(columns)
        self._lookahead = lookahead
        self._num_experts = self.blocks[0].num_experts
        self._device = next(model.parameters()).device
        self._routes: list[Any] = [None] * len(self.blocks)
        self._gates: list[Any] = [None] * len(self.blocks)
        self._embedding: torch.Tensor | None = None
        self._handles: list[Any] = []
        self._top_k = 0
        self.gate = self._probe() if lookahead or "gate_probs" in self._columns else None
        if lookahead and (self.gate is None or self.gate.rule is None):
            raise UserError(
                f"{type(model).__name__}: its gates do not choose by their logits alone, nor by a"
                " rule known here; record with lookahead 0"
            )
        self._timer = StepTimer(model, self.blocks, self._device) if timings else None

    @property
    def kernel_name(self) -> str:
        """The experts implementation that the model is set to; eager where it has only its own."""
        if not is_dispatched(self.blocks[0].experts):
            return "eager"
        config = self._model.config.get_text_config()
        return str(getattr(config, "_experts_implementation", None) or "eager")

    @property
    def score(self) -> str | None:
        """How gate_probs come from logits: softmax, sigmoid or probability; None if not asked."""
        return self.gate.score if self.gate else None

    def __enter__(self) -> RoutingTap:
        if self._handles:
            raise RuntimeError("RoutingTap: it is entered already")
        if self._timer:
            self._handles += self._timer.hooks()
        gate_wanted = bool(self._lookahead or self._columns.intersection(GATE_COLUMNS))
        self._handles += self._hooks(gate_wanted)
        if "embedding" in self._columns:
            table = self._model.get_input_embeddings()
            self._handles.append(table.register_forward_hook(self._note_embedding))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    @contextmanager
    def collect(self) -> Iterator[list[dict[str, NDArray]]]:
        """Enter the tap and collect the columns of every forward pass, padding included."""
        steps: list[dict[str, NDArray]] = []
        with self:
            handle = self._model.register_forward_hook(
                lambda *_: steps.append(self.take().result())
            )
            try:
                yield steps
            finally:
                handle.remove()

    def take(self, rows: torch.Tensor | None = None) -> Capture:
        """Return the columns of the forward pass just made; its GPU work need not have ended.

        `rows` [n]: which of the T tokens (batch x sequence, flattened) to keep; None: all.
        Raises RuntimeError where the pass did not run every MoE layer once.
        """
        with torch.inference_mode():
            columns = self._stack(rows)
            event = None
            if self._device.type == "cuda":
                # To pinned memory, which PyTorch keeps and hands out again.
                columns = {n: c.to("cpu", non_blocking=True) for n, c in columns.items()}
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
        self._forget()
        return Capture(columns, event, self._timer)

    def top_k(self) -> int:
        """Experts that a token is routed to, from the forward pass just made, before `take`."""
        return int(self._pairs()[0][0].shape[-1])

    def _forget(self) -> None:
        layers = len(self.blocks)
        self._routes[:] = [None] * layers
        self._gates[:] = [None] * layers
        self._embedding = None

    def _hooks(self, gates: bool) -> list[Any]:
        handles = []
        for index, block in enumerate(self.blocks):
            from_router = block.adapter.from_router
            if not from_router:
                hook = _experts_hook(self._routes, index, block.adapter.amend)
                handles.append(block.experts.register_forward_pre_hook(hook, with_kwargs=True))
            if gates or from_router:
                hook = _router_hook(self._gates, index)
                handles.append(block.router.register_forward_hook(hook))
        return handles

    def _note_embedding(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        self._embedding = output

    def _stack(self, rows: torch.Tensor | None) -> dict[str, torch.Tensor]:
        pairs = self._pairs()
        wanted = self._columns
        columns = {"experts": _stack([ids for ids, _ in pairs], rows).to(torch.int16)}
        if "weights" in wanted:
            columns["weights"] = _stack([weights for _, weights in pairs], rows).float()
        if "embedding" in wanted:
            assert self._embedding is not None
            flat = self._embedding.reshape(-1, self._embedding.shape[-1])
            columns["embedding"] = (flat if rows is None else flat[rows]).half()
        if self._lookahead or wanted.intersection(GATE_COLUMNS):
            columns |= self._gate_columns(rows)
        if any(block.adapter.read for block in self.blocks):
            _blank_nulls(columns)
        return columns

    def _pairs(self) -> list[Pair]:
        """Ids and weights [T, k] of each layer, as they ran."""
        pairs = []
        for block, route, gate in zip(self.blocks, self._routes, self._gates, strict=True):
            noted = gate[1][:2] if block.adapter.from_router and gate else route
            if noted is None:
                raise RuntimeError(f"RoutingTap: {block.name} did not run in this forward pass")
            first, second = noted
            read = block.adapter.read
            pairs.append(read(block, first, second) if read else (first, second))
        return pairs

    def _gate_columns(self, rows: torch.Tensor | None) -> dict[str, torch.Tensor]:
        inputs = _stack([_flat(gate_input) for gate_input, _ in self._gates], rows)
        columns = {}
        if "gate_inputs" in self._columns:
            columns["gate_inputs"] = inputs.half()
        if "gate_norms" in self._columns:
            columns["gate_norms"] = torch.linalg.vector_norm(inputs, dim=-1, dtype=torch.float32)
        if "gate_probs" in self._columns:
            assert self.gate is not None
            columns["gate_probs"] = self.gate.probabilities(_stack(self._logits(), rows))
        for distance in range(1, self._lookahead + 1):
            columns[f"lookahead_{distance}"] = self._predict(inputs, distance)
        return columns

    def _logits(self) -> list[torch.Tensor]:
        gates = zip(self.blocks, self._gates, strict=True)
        return [router_logits(block, *noted) for block, noted in gates]

    def _predict(self, inputs: torch.Tensor, distance: int) -> torch.Tensor:
        """Best 2k experts of layer l + distance, by its gate on the gate input of layer l.

        int16 [T, L, 2k], -1 where layer l + distance does not exist. Equal scores: lowest id first.
        """
        gate = self.gate
        assert gate is not None
        tokens, layers = inputs.shape[:2]
        width = min(2 * self._top_k, self._num_experts)
        predicted = torch.full((tokens, layers, width), -1, dtype=torch.int16, device=inputs.device)
        later = layers - distance
        if later <= 0:
            return predicted
        products = self._later_logits(gate, inputs, distance)
        # In their layers' places: a correction may differ from layer to layer.
        logits = products.new_zeros((tokens, layers, products.shape[-1]))
        logits[:, distance:] = products
        ranking = gate.ranking(logits)[:, distance:]
        ranked = ranking.sort(dim=-1, descending=True, stable=True).indices
        predicted[:, :later] = ranked[..., :width].to(torch.int16)
        return predicted

    def _later_logits(self, gate: Gate, inputs: torch.Tensor, distance: int) -> torch.Tensor:
        """Logits [T, L - distance, G] of the layers from `distance` on, on earlier gate inputs."""
        if gate.weight is None:
            # `forward` and not the call: the tap's hook must not take this for the real pass.
            logits = [
                router_logits(block, inputs[:, index], block.router.forward(inputs[:, index]))
                for index, block in enumerate(self.blocks[distance:])
            ]
            return torch.stack(logits, dim=1)
        products = torch.bmm(inputs[:, :-distance].transpose(0, 1), gate.weight[distance:])
        if gate.bias is not None:
            products += gate.bias[distance:]
        return products.transpose(0, 1)

    def _probe(self) -> Gate:
        """Run a few tokens to learn how the gates score and choose."""
        model = self._model
        tokens = torch.arange(_PROBE_TOKENS, device=self._device)[None]
        tokens = tokens * 7919 % model.get_input_embeddings().num_embeddings
        handles = self._hooks(gates=True)
        try:
            with torch.inference_mode():
                model(tokens, use_cache=False)
                pairs = self._pairs()
                inputs = [_flat(gate_input) for gate_input, _ in self._gates]
                gate = fit_gate(self.blocks, inputs, self._logits(), pairs)
        finally:
            for handle in handles:
                handle.remove()
            self._forget()
        self._top_k = int(pairs[0][0].shape[-1])
        return gate


def _experts_hook(routes: list[Any], index: int, amend: Any) -> Callable[..., Any]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs:
            args = (*args, *kwargs.values())
        if routes[index] is not None:
            raise RuntimeError("RoutingTap: a layer ran twice; take() each forward pass")
        if amend is not None:
            args = amend(args)
            routes[index] = args[1:3]
            return args, {}
        routes[index] = args[1:3]
        return None

    return note


def _router_hook(gates: list[Any], index: int) -> Callable[..., None]:
    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        gates[index] = (inputs[0], output)

    return note


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _stack(per_layer: list[torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
    """[T, ...] of each layer -> [n, L, ...]."""
    stacked = torch.stack(per_layer, dim=1)
    return stacked if rows is None else stacked[rows]


def _blank_nulls(columns: dict[str, torch.Tensor]) -> None:
    """Weights are nan where no expert ran, a layer's values where none of its experts did."""
    absent = columns["experts"] < 0
    if "weights" in columns:
        columns["weights"].masked_fill_(absent, np.nan)
    for name in GATE_COLUMNS:
        if name in columns:
            values = columns[name]
            none_ran = absent[..., 0]
            values.masked_fill_(none_ran if values.dim() == 2 else none_ran[..., None], np.nan)
