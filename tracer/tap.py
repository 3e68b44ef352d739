"""See what a transformers model routes: one interception point for all its MoE classes.

Transformers (version 5) looks the experts' kernel up by name on every call. The tap registers a
name of its own, notes the ids and weights it is called with - those that are executed, which the
top-k of the logits need not be - and hands on to the kernel that the model was set to. The gate is
seen by a forward hook that returns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from configs.errors import UserError

IMPLEMENTATION = "moesim_tap"
_LAYER_ID = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer's modules: its block, its router and its fused experts."""

    name: str
    layer_id: int
    block: nn.Module
    router: nn.Module
    experts: Any


@dataclass
class _Seen:
    """What one forward pass showed of one layer: [T, k], [T, k], [T, H], [T, E]."""

    ids: torch.Tensor
    weights: torch.Tensor
    gate_input: torch.Tensor
    logits: torch.Tensor


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Find the MoE layers, in order of execution.

    Raises UserError for a model that has none, or whose experts transformers does not dispatch.
    """
    blocks = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        router = children.get("gate", children.get("router"))
        if "experts" not in children or router is None:
            continue
        match = _LAYER_ID.search(name)
        if match is None or not hasattr(type(children["experts"]).forward, "__wrapped__"):
            raise UserError(f"{name}: experts of {type(block).__name__} cannot be recorded")
        blocks.append(MoeBlock(name, int(match[1]), block, router, children["experts"]))
    if not blocks:
        raise UserError(f"{type(model).__name__} has no MoE layers: nothing to record")
    return blocks


class RoutingTap:
    """Records the routing of `model` while it is entered; one `take()` for each forward pass.

    `columns`: which of weights, gate_probs, gate_norms, gate_inputs, embedding to give beside the
    expert ids; `lookahead`: how many MoE layers ahead the next gates predict. Raises UserError for
    a router whose choice its logits do not tell, where a look-ahead is asked for.
    """

    def __init__(self, model: Any, columns: Iterable[str], lookahead: int) -> None:
        self.blocks = find_moe_blocks(model)
        self._model = model
        self._columns = frozenset(columns)
        self._lookahead = lookahead
        self._num_experts = int(self.blocks[0].experts.num_experts)
        self._seen: list[dict[str, torch.Tensor]] = [{} for _ in self.blocks]
        self._embedding: torch.Tensor | None = None
        self._hooks: list[Any] = []
        if not 0 <= lookahead < 10:
            raise UserError(f"lookahead {lookahead}: give 0 to 9 layers")
        if lookahead:
            _refuse_corrected_scores(self.blocks)
        self.kernel_name = str(model.config._experts_implementation)

    def __enter__(self) -> RoutingTap:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _tapped_experts)
        for seen, block in zip(self._seen, self.blocks, strict=True):
            block.experts._moesim_tap = (seen, self._kernel(block.experts))
            hook = block.router.register_forward_hook(self._router_hook(seen))
            self._hooks.append(hook)
        embed = self._model.get_input_embeddings()
        self._hooks.append(embed.register_forward_hook(self._embedding_hook))
        self._model.set_experts_implementation(IMPLEMENTATION)
        return self

    def __exit__(self, *error: object) -> None:
        self._model.set_experts_implementation(self.kernel_name)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self.blocks:
            del block.experts._moesim_tap

    def take(self) -> dict[str, np.ndarray]:
        """Return the columns of the forward pass just made, as `tracer.columns` shapes them."""
        layers = [_Seen(**seen) for seen in self._seen]
        columns = {"experts": _stack(layer.ids for layer in layers).astype(np.int16)}
        if "weights" in self._columns:
            columns["weights"] = _stack(layer.weights for layer in layers)
        if "gate_probs" in self._columns:
            columns["gate_probs"] = _stack(layer.logits.float().softmax(-1) for layer in layers)
        if "gate_inputs" in self._columns:
            columns["gate_inputs"] = _stack(layer.gate_input for layer in layers)
        if "gate_norms" in self._columns:
            columns["gate_norms"] = _stack(
                layer.gate_input.float().norm(dim=-1) for layer in layers
            )
        if "embedding" in self._columns:
            assert self._embedding is not None
            columns["embedding"] = self._embedding.float().cpu().numpy()
        for distance in range(1, self._lookahead + 1):
            columns[f"lookahead_{distance}"] = self._predict(layers, distance)
        for seen in self._seen:
            seen.clear()
        return columns

    def _predict(self, layers: list[_Seen], distance: int) -> np.ndarray:
        """Best 2k experts of layer l + distance, by its gate on the gate input of layer l.

        [T, L, 2k], -1 where layer l + distance does not exist. Equal logits: lowest id first.
        """
        tokens, top_k = layers[0].ids.shape
        width = min(2 * top_k, self._num_experts)
        predicted = np.full((tokens, len(layers), width), -1, np.int16)
        for index, (layer, later) in enumerate(zip(layers, self.blocks[distance:], strict=False)):
            # `forward` and not the call: the router's hook must not take this for the real pass.
            logits = _logits(later.router.forward(layer.gate_input), self._num_experts)
            ranked = logits.float().argsort(dim=-1, descending=True, stable=True)
            predicted[:, index] = ranked[:, :width].cpu().numpy()
        return predicted

    def _kernel(self, experts: Any) -> Any:
        if self.kernel_name == "eager":
            return type(experts).forward.__wrapped__
        return ALL_EXPERTS_FUNCTIONS[self.kernel_name]

    def _router_hook(self, seen: dict[str, torch.Tensor]) -> Any:
        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            gate_input = inputs[0].detach()
            seen["gate_input"] = gate_input.reshape(-1, gate_input.shape[-1]).clone()
            seen["logits"] = _logits(output, self._num_experts).detach().clone()

        return note

    def _embedding_hook(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        self._embedding = output.detach().reshape(-1, output.shape[-1]).clone()


def _tapped_experts(experts: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The registered implementation: note ids and weights (the first two arguments), hand on."""
    seen, kernel = experts._moesim_tap
    ids, weights = (*args, *kwargs.values())[:2]
    seen["ids"], seen["weights"] = ids.detach().clone(), weights.detach().clone()
    return kernel(experts, hidden, *args, **kwargs)


def _logits(output: Any, num_experts: int) -> torch.Tensor:
    """Find the logits [T, E] in a router's output; their place differs between classes."""
    candidates = output if isinstance(output, tuple) else (output,)
    for tensor in candidates:
        if tensor.is_floating_point() and tensor.shape[-1] == num_experts:
            return tensor.reshape(-1, num_experts)
    raise UserError("a router gave no logits over all experts: its model cannot be recorded")


def _refuse_corrected_scores(blocks: list[MoeBlock]) -> None:
    for block in blocks:
        for owner in (block.router, block.block):
            if hasattr(owner, "e_score_correction_bias"):
                raise UserError(
                    f"{block.name}: its gate chooses by a corrected score, not by its logits alone;"
                    " record with lookahead 0"
                )


def _stack(per_layer: Iterable[torch.Tensor]) -> np.ndarray:
    """[T, ...] of each layer -> [T, L, ...]; reals as float32, numpy knows no bfloat16."""
    stacked = torch.stack(list(per_layer), dim=1).cpu()
    return (stacked.float() if stacked.is_floating_point() else stacked).numpy()
