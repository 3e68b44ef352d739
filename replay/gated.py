"""Gated experts: which kinds the engine knows, and how one is computed on the CPU.

Here and in the GPU's kernels each product is summed in float32 and rounded to the weights' type
once, its bias included; the activation is computed in float32 and rounded as the library does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MOST_IN_WORDS = 8
"""Slots that a launch's own arguments can name, and whose each is; 16 bits each."""

SILU, CLAMPED_GLU = 0, 1
LIMIT, ALPHA = 7.0, 1.702
"""Of the clamped activation."""


@dataclass(frozen=True)
class GatedForm:
    """How a gated experts module lays out its weights.

    ``transposed``: [in, out] instead of [out, in]. ``interleaved``: gate and up in turn instead of
    one after the other. ``kind``: of the activation, SILU or CLAMPED_GLU.
    """

    transposed: bool
    interleaved: bool
    kind: int


def form_of(module: Any, names: Collection[str]) -> GatedForm | None:
    """The form of an experts module of transformers with parameters ``names``; None: another."""
    # The CPU's worker has no need of the library.
    from transformers.integrations.moe import _default_apply_gate

    if not {"gate_up_proj", "down_proj"} <= set(names) or not module.has_gate:
        return None
    clamped = type(module).__name__ == "GptOssExperts"
    default_gate = type(module)._apply_gate is _default_apply_gate
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLUActivation", "SiLU")
    if not clamped and not (default_gate and silu and module.is_concatenated):
        return None
    if clamped and (module.limit, module.alpha) != (LIMIT, ALPHA):
        return None
    kind = CLAMPED_GLU if clamped else SILU
    return GatedForm(bool(module.is_transposed), interleaved=clamped, kind=kind)


def compute(
    form: GatedForm, parts: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """One expert's output [rows, H] for ``hidden`` [rows, H]; ``parts``: its parameters by name."""
    both = _product(form, hidden, parts["gate_up_proj"], parts.get("gate_up_proj_bias"))
    if form.interleaved:
        gate, up = both[:, ::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, dim=1)
    return _product(
        form, _activated(form, gate, up), parts["down_proj"], parts.get("down_proj_bias")
    )


def _product(
    form: GatedForm, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if not form.transposed:
        return F.linear(rows, weight, bias)
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def _activated(form: GatedForm, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if form.kind == SILU:
        return F.silu(gate) * up
    narrow = gate.dtype
    gate = gate.float().clamp(max=LIMIT)
    up = up.float().clamp(-LIMIT, LIMIT)
    return ((up + 1) * (gate * torch.sigmoid(gate * ALPHA))).to(narrow)
