"""Geometry of a loaded transformers model: its tensors are counted, not its configuration read."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

from configs.errors import UserError
from configs.geometry import Geometry
from tracer.adapters import MoeBlock, find_moe_blocks, shared_module
from tracer.tap import RoutingTap

NOT_FINITE = (
    "the model's logits are not finite (nan or inf): its weights are broken, or overflow at this "
    "precision; fetch them anew, or give --dtype bf16 or fp32"
)
SharedExperts = Literal["none", "before_gate", "after_gate"]
_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
}


def describe_model(model: Any, name: str, revision: str = "") -> dict[str, Any]:
    """Return the fields of a trace's manifest that the model alone tells, see `model_geometry`."""
    return {
        "model_id": name,
        "model_revision": revision,
        "geometry": model_geometry(model, name, revision),
        "expert_norms": expert_norms(model),
        "parts": expert_parts(model),
    }


def model_geometry(model: Any, name: str, revision: str = "") -> Geometry:
    """Count the bytes of `model` as `configs.geometry.Geometry` splits them.

    Runs one token through the model: where shared experts run and what the KV cache holds a token
    are seen, not looked up. Raises UserError for a model whose MoE layers cannot be recorded.
    """
    blocks = find_moe_blocks(model)
    config = model.config.get_text_config()
    shared_experts, kv_bytes, top_k = _probe(model, blocks)
    expert_bytes = [_expert_bytes(block) for block in blocks]
    segments, head = _segments(model, blocks, late_shared=shared_experts == "after_gate")
    first = blocks[0]
    return Geometry(
        name=name,
        revision=revision,
        num_layers=config.num_hidden_layers,
        model_layer_ids=tuple(block.layer_id for block in blocks),
        num_experts=first.num_experts,
        top_k=top_k,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        expert_params=sum(p[0].numel() for _, p in _expert_tensors(first)),
        expert_dtype=_dtype_name(first),
        expert_bytes_by_layer=tuple(expert_bytes),
        nonexpert_bytes=_bytes(model) - sum(map(_all_expert_bytes, blocks)),
        segment_bytes_by_layer=tuple(segments),
        head_bytes=head,
        kv_bytes_per_token=kv_bytes,
        shared_experts=shared_experts,
    )


def refuse_not_finite(logits: torch.Tensor) -> None:
    """Raise UserError for nan and inf among [..., V]; minus infinity may bar a token."""
    if not logits.is_meta and not bool(logits.amax(-1).isfinite().all()):
        raise UserError(NOT_FINITE)


def expert_norms(model: nn.Module) -> list[list[float]]:
    """Frobenius norm of every expert over all its tensors, [L][E], to 6 significant digits."""
    return [_norms(block) for block in find_moe_blocks(model)]


def expert_parts(model: nn.Module) -> list[dict[str, Any]]:
    """Name and bytes of each matrix of one expert; a fused gate and up projection is two."""
    parts = []
    for name, tensor in _expert_tensors(find_moe_blocks(model)[0]):
        size = tensor[0].numel() * tensor.element_size()
        names = [name]
        if name.startswith("gate_up_"):
            names = [name.replace("gate_up_", half) for half in ("gate_", "up_")]
        parts += [{"name": part, "bytes": size // len(names)} for part in names]
    return parts


def _expert_tensors(block: MoeBlock) -> list[tuple[str, torch.Tensor]]:
    """The experts' parameters as [E, ...]; some classes keep the experts' rows one below another.

    Rows beyond the experts' (Longcat keeps some for its identity experts) are never read.
    """
    count = block.num_experts
    total = getattr(block.experts, "total_experts", count)
    tensors = []
    for name, parameter in block.experts.named_parameters():
        rows = total if parameter.shape[0] == total else count
        whole = parameter.detach().reshape(rows, -1, *parameter.shape[1:])
        tensors.append((name.split(".")[-1], whole[:count]))
    return tensors


def _expert_bytes(block: MoeBlock) -> int:
    return sum(p[0].numel() * p.element_size() for _, p in _expert_tensors(block))


def _all_expert_bytes(block: MoeBlock) -> int:
    return _expert_bytes(block) * block.num_experts


def _dtype_name(block: MoeBlock) -> str:
    dtype = next(block.experts.parameters()).dtype
    if dtype not in _DTYPE_NAMES:
        raise UserError(
            f"{block.name}: experts of dtype {dtype} cannot be recorded; load the model with"
            " --dtype bf16"
        )
    return _DTYPE_NAMES[dtype]


def _norms(block: MoeBlock) -> list[float]:
    per_tensor = [
        torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64)
        for _, tensor in _expert_tensors(block)
    ]
    norms = torch.linalg.vector_norm(torch.stack(per_tensor), dim=0)
    return [float(f"{norm:.6g}") for norm in norms.tolist()]


def _segments(model: Any, blocks: list[MoeBlock], late_shared: bool) -> tuple[list[int], int]:
    """Bytes read before each gate [L], and after the last experts; the input table is not read."""
    prefix = re.split(r"\.\d+\.", blocks[0].name)[0]
    layers = [_bytes(layer) for layer in model.get_submodule(prefix)]
    shared = [
        _bytes(block.block) - _bytes(block.router) - _bytes(block.experts) for block in blocks
    ]
    for block in blocks:
        layers[block.layer_id] -= _all_expert_bytes(block)
    segments, begin = [], 0
    for index, block in enumerate(blocks):
        read = sum(layers[begin : block.layer_id + 1])
        if late_shared:
            read += (shared[index - 1] if index else 0) - shared[index]
        segments.append(read)
        begin = block.layer_id + 1
    table = model.get_input_embeddings()
    head = _bytes(model) - _bytes(table) - sum(layers[:begin])
    head -= sum(map(_all_expert_bytes, blocks))
    if model.get_output_embeddings().weight is table.weight:
        head += _bytes(table)
    return segments, head + (shared[-1] if late_shared else 0)


@torch.inference_mode()
def _probe(model: Any, blocks: list[MoeBlock]) -> tuple[SharedExperts, int, int]:
    """Run one token; return where shared experts run, the KV cache's bytes a token, and top-k."""
    order: list[str] = []
    shared = shared_module(blocks[0])
    watched = [("gate", blocks[0].router), *([("shared", shared)] if shared else [])]
    hooks = [
        module.register_forward_hook(lambda *_, event=event: order.append(event))
        for event, module in watched
    ]
    tap = RoutingTap(model, ())
    with tap:
        output = model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True)
        refuse_not_finite(output.logits)
        top_k = tap.top_k()
    for hook in hooks:
        hook.remove()
    kv_bytes = _cache_bytes(output.past_key_values)
    if "shared" not in order:
        return "none", kv_bytes, top_k
    early = order.index("shared") < order.index("gate")
    return "before_gate" if early else "after_gate", kv_bytes, top_k


def _cache_bytes(cache: Any) -> int:
    """Bytes of keys and values; layers that keep a state of fixed size instead have none."""
    kept = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
    ]
    tensors = [tensor for pair in kept for tensor in pair if isinstance(tensor, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
