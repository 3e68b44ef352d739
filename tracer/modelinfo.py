"""Geometry of a loaded transformers model: its tensors are counted, not its configuration read."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

from configs.geometry import Geometry
from tracer.tap import MoeBlock, find_moe_blocks

SharedExperts = Literal["none", "before_gate", "after_gate"]
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """Return the fields of a trace's manifest that the model alone tells, see `model_geometry`."""
    return {
        "model_id": name,
        "geometry": model_geometry(model, name),
        "expert_norms": expert_norms(model),
        "parts": expert_parts(model),
    }


def model_geometry(model: Any, name: str, revision: str = "") -> Geometry:
    """Count the bytes of `model` as `configs.geometry.Geometry` splits them.

    Runs one token through the model: where shared experts run and what the KV cache holds a token
    are seen, not looked up. Raises UserError for a model whose MoE layers cannot be recorded.
    """
    blocks = find_moe_blocks(model)
    shared_experts, kv_bytes = _probe(model, blocks)
    expert_bytes = [_bytes(block.experts) // block.experts.num_experts for block in blocks]
    segments, head = _segments(model, blocks, late_shared=shared_experts == "after_gate")
    first = blocks[0].experts
    return Geometry(
        name=name,
        revision=revision,
        num_layers=model.config.num_hidden_layers,
        model_layer_ids=tuple(block.layer_id for block in blocks),
        num_experts=first.num_experts,
        top_k=model.config.num_experts_per_tok,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        expert_params=sum(p.numel() for p in first.parameters()) // first.num_experts,
        expert_dtype=_DTYPE_NAMES[next(first.parameters()).dtype],
        expert_bytes_by_layer=tuple(expert_bytes),
        nonexpert_bytes=_bytes(model) - sum(_bytes(block.experts) for block in blocks),
        segment_bytes_by_layer=tuple(segments),
        head_bytes=head,
        kv_bytes_per_token=kv_bytes,
        shared_experts=shared_experts,
    )


def expert_norms(model: nn.Module) -> list[list[float]]:
    """Frobenius norm of every expert over all its tensors, [L][E], to 6 significant digits."""
    return [_norms(block.experts) for block in find_moe_blocks(model)]


def expert_parts(model: nn.Module) -> list[dict[str, Any]]:
    """Name and bytes of each matrix of one expert; a fused gate and up projection is two."""
    experts = find_moe_blocks(model)[0].experts
    parts = []
    for name, parameter in experts.named_parameters():
        size = parameter.numel() * parameter.element_size() // experts.num_experts
        names = [name]
        if name.startswith("gate_up_"):
            names = [name.replace("gate_up_", half) for half in ("gate_", "up_")]
        parts += [{"name": part, "bytes": size // len(names)} for part in names]
    return parts


def _norms(experts: Any) -> list[float]:
    squares = sum(
        parameter.detach().double().square().flatten(1).sum(1) for parameter in experts.parameters()
    )
    return [float(f"{norm:.6g}") for norm in squares.sqrt().tolist()]


def _segments(model: Any, blocks: list[MoeBlock], late_shared: bool) -> tuple[list[int], int]:
    """Bytes read before each gate [L], and after the last experts; the input table is not read."""
    prefix = re.split(r"\.\d+\.", blocks[0].name)[0]
    layers = [_bytes(layer) for layer in model.get_submodule(prefix)]
    shared = [
        _bytes(block.block) - _bytes(block.router) - _bytes(block.experts) for block in blocks
    ]
    for block in blocks:
        layers[block.layer_id] -= _bytes(block.experts)
    segments, begin = [], 0
    for index, block in enumerate(blocks):
        read = sum(layers[begin : block.layer_id + 1])
        if late_shared:
            read += (shared[index - 1] if index else 0) - shared[index]
        segments.append(read)
        begin = block.layer_id + 1
    table = model.get_input_embeddings()
    head = _bytes(model) - _bytes(table) - sum(layers[:begin])
    head -= sum(_bytes(block.experts) for block in blocks)
    if model.get_output_embeddings().weight is table.weight:
        head += _bytes(table)
    return segments, head + (shared[-1] if late_shared else 0)


@torch.inference_mode()
def _probe(model: Any, blocks: list[MoeBlock]) -> tuple[SharedExperts, int]:
    """Run one token; return where shared experts run, and the KV cache's bytes a token."""
    order: list[str] = []
    shared = [m for n, m in blocks[0].block.named_children() if n.startswith("shared_expert")]
    watched = [("gate", blocks[0].router), *(("shared", module) for module in shared[:1])]
    hooks = [
        module.register_forward_hook(lambda *_, event=event: order.append(event))
        for event, module in watched
    ]
    output = model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True)
    for hook in hooks:
        hook.remove()
    kv_bytes = sum(
        tensor.numel() * tensor.element_size()
        for layer in output.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    )
    if "shared" not in order:
        return "none", kv_bytes
    early = order.index("shared") < order.index("gate")
    return "before_gate" if early else "after_gate", kv_bytes


def _bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
