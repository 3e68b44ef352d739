"""Experts at low precision: rounded to few bits and back, as a low-bit copy would compute.

Symmetric, in groups of 32 weights along the dimension that is summed over, with a float16 scale a
group (int8: a scale a row). int2 has the four levels -1.5, -0.5, 0.5 and 1.5. Biases stay as they
are. This shows what rounding does to a model's output; it saves no memory here.
"""

from __future__ import annotations

from typing import Any

import torch

GROUP = 32
BITS = {"int8": 8, "int4": 4, "int2": 2}


def low_bit_parameters(experts: Any, dtype: str) -> dict[str, torch.Tensor]:
    """Parameters of a fused experts module at ``dtype`` of BITS, in the module's own dtype."""
    # transformers keeps [E, out, in], or [E, in, out] where the class says so.
    summed = -2 if getattr(experts, "is_transposed", False) else -1
    return {
        name: parameter.detach()
        if parameter.dim() < 3
        else rounded(parameter.detach(), BITS[dtype], summed)
        for name, parameter in experts.named_parameters()
    }


def rounded(weight: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """``weight`` quantised along ``dim`` and dequantised: same shape and dtype."""
    along = weight.transpose(dim, -1)
    size = along.shape[-1]
    group = size if bits == 8 else GROUP
    padded = torch.nn.functional.pad(along.float(), (0, -size % group))
    groups = padded.unflatten(-1, (-1, group))
    levels = 1.5 if bits == 2 else 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / levels).half().float()
    # A group of zeros has no scale.
    steps = groups / scale.clamp(min=torch.finfo(torch.float16).tiny)
    steps = steps.floor() + 0.5 if bits == 2 else steps.round()
    values = (steps.clamp(-levels, levels) * scale).flatten(-2)[..., :size]
    return values.transpose(dim, -1).to(weight.dtype).contiguous()
