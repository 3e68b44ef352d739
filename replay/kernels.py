"""Triton kernels that compute a few tokens' experts straight from their slots.

A decode step is bound by reading weights: each program reads a block of rows of one expert's matrix
and multiplies it with one token. Assignments (token, rank) whose slot is -1 are not of this group
and cost nothing but the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from transformers.integrations.moe import _default_apply_gate

SILU, CLAMPED_GLU = 0, 1


@triton.jit
def _up(
    hidden,
    slots,
    weight,
    bias,
    act,
    width,
    inner,
    slot_stride,
    bias_stride,
    row_stride,
    column_stride,
    gate_step,
    up_offset,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    one = tl.program_id(0)
    slot = tl.load(slots + one).to(tl.int64)
    if slot < 0:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < inner
    gate_row = row * gate_step
    base = weight + slot * slot_stride
    token = hidden + (one // TOP_K) * width
    gate = tl.zeros((ROWS,), tl.float32)
    up = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        x = tl.load(token + column, mask=inside, other=0.0).to(tl.float32)
        both = there[:, None] & inside[None, :]
        at = base + gate_row[:, None] * row_stride + column[None, :] * column_stride
        gate += tl.sum(tl.load(at, mask=both, other=0.0).to(tl.float32) * x[None, :], 1)
        at += up_offset * row_stride
        up += tl.sum(tl.load(at, mask=both, other=0.0).to(tl.float32) * x[None, :], 1)
    if HAS_BIAS:
        biases = bias + slot * bias_stride + gate_row
        gate += tl.load(biases, mask=there, other=0.0).to(tl.float32)
        up += tl.load(biases + up_offset, mask=there, other=0.0).to(tl.float32)
    # The library's kernels round the projection to the weights' type before the activation.
    gate = gate.to(act.dtype.element_ty).to(tl.float32)
    up = up.to(act.dtype.element_ty).to(tl.float32)
    if KIND == 0:
        value = (gate * tl.sigmoid(gate)).to(act.dtype.element_ty).to(tl.float32) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        value = (up + 1.0) * (gate * tl.sigmoid(gate * 1.702))
    tl.store(act + one * inner + row, value.to(act.dtype.element_ty), mask=there)


@triton.jit
def _down(
    act,
    slots,
    weight,
    bias,
    out,
    width,
    inner,
    slot_stride,
    bias_stride,
    row_stride,
    column_stride,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    one = tl.program_id(0)
    slot = tl.load(slots + one).to(tl.int64)
    if slot < 0:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < width
    base = weight + slot * slot_stride
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, inner, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < inner
        x = tl.load(act + one * inner + column, mask=inside, other=0.0).to(tl.float32)
        both = there[:, None] & inside[None, :]
        at = base + row[:, None] * row_stride + column[None, :] * column_stride
        total += tl.sum(tl.load(at, mask=both, other=0.0).to(tl.float32) * x[None, :], 1)
    if HAS_BIAS:
        total += tl.load(bias + slot * bias_stride + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + one * width + row, total.to(out.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class GatedExperts:
    """The two products of a gated expert over slots: views [slots, ...] and how to read them."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    width: int
    inner: int
    transposed: bool
    interleaved: bool
    kind: int

    def launch(
        self, hidden: torch.Tensor, slots: torch.Tensor, act: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute the assignments whose slot is not -1.

        hidden [T, H]; slots int32 [T * k], device or pinned; act [T * k, I]; out [T * k, H].
        """
        count = len(slots)
        top_k = count // len(hidden)
        row, column = _strides(self.gate_up, self.transposed)
        rows, columns = (64, 32) if self.transposed else (8, 512)
        _up[(count, triton.cdiv(self.inner, rows))](
            hidden,
            slots,
            self.gate_up,
            self.gate_up if self.gate_up_bias is None else self.gate_up_bias,
            act,
            self.width,
            self.inner,
            self.gate_up.stride(0),
            0 if self.gate_up_bias is None else self.gate_up_bias.stride(0),
            row,
            column,
            2 if self.interleaved else 1,
            1 if self.interleaved else self.inner,
            TOP_K=top_k,
            HAS_BIAS=self.gate_up_bias is not None,
            KIND=self.kind,
            ROWS=rows,
            COLUMNS=columns,
        )
        row, column = _strides(self.down, self.transposed)
        _down[(count, triton.cdiv(self.width, rows))](
            act,
            slots,
            self.down,
            self.down if self.down_bias is None else self.down_bias,
            out,
            self.width,
            self.inner,
            self.down.stride(0),
            0 if self.down_bias is None else self.down_bias.stride(0),
            row,
            column,
            HAS_BIAS=self.down_bias is not None,
            ROWS=rows,
            COLUMNS=columns,
        )


def _strides(weight: torch.Tensor, transposed: bool) -> tuple[int, int]:
    """Strides along the output and the input dimension."""
    return (weight.stride(2), weight.stride(1)) if transposed else weight.stride()[1:]


def gated_experts(module: Any, views: dict[str, torch.Tensor]) -> GatedExperts | None:
    """The kernel's description of an experts module of transformers; None: another kind."""
    if not {"gate_up_proj", "down_proj"} <= views.keys() or not module.has_gate:
        return None
    clamped = type(module).__name__ == "GptOssExperts"
    default_gate = type(module)._apply_gate is _default_apply_gate
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLUActivation", "SiLU")
    if not clamped and not (default_gate and silu and module.is_concatenated):
        return None
    if clamped and (module.limit, module.alpha) != (7.0, 1.702):
        return None
    transposed = bool(module.is_transposed)
    down = views["down_proj"]
    inner, width = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    return GatedExperts(
        gate_up=views["gate_up_proj"],
        down=down,
        gate_up_bias=views.get("gate_up_proj_bias"),
        down_bias=views.get("down_proj_bias"),
        width=width,
        inner=inner,
        transposed=transposed,
        interleaved=clamped,
        kind=CLAMPED_GLU if clamped else SILU,
    )
