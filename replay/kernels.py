"""Triton kernels that compute experts straight from their slots.

A decode step is bound by reading weights: each program of :func:`_up` and :func:`_down` reads a
block of rows of one expert's matrix and multiplies it with one token. Assignments (token, rank)
whose slot is -1 are not of this group and cost nothing but the launch.

For many tokens, :func:`_up_tiles` and :func:`_down_tiles` multiply tiles: up to ``BM`` assignments
of one expert. Each expert's sums do not depend on what else is launched with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from transformers.integrations.moe import _default_apply_gate

SILU, CLAMPED_GLU = 0, 1
TILE_ROWS = (16, 32, 64)
TILE_COLUMNS, TILE_DEPTH = 64, 64
TILE_FIELDS = tl.constexpr(4)
"""Of a tile's description: three numbers, padded so that any run of tiles is aligned to 16 bytes
(Triton compiles a kernel again for pointers that are not)."""


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


@triton.jit
def _up_tiles(
    hidden,
    order,
    tiles,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * TILE_FIELDS
    slot = tl.load(tile).to(tl.int64)
    m = tl.arange(0, BM)
    there = m < tl.load(tile + 2)
    which = tl.load(order + tl.load(tile + 1) + m, mask=there, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < inner
    gate_row = n * gate_step
    base = weight + slot * slot_stride + gate_row[None, :] * row_stride
    token = hidden + (which // TOP_K)[:, None] * width
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        known = k < width
        x = tl.load(token + k[None, :], mask=there[:, None] & known[None, :], other=0.0)
        at = base + k[:, None] * column_stride
        both = known[:, None] & inside[None, :]
        gate = tl.dot(x, tl.load(at, mask=both, other=0.0), gate)
        up = tl.dot(x, tl.load(at + up_offset * row_stride, mask=both, other=0.0), up)
    if HAS_BIAS:
        biases = bias + slot * bias_stride + gate_row
        gate += tl.load(biases, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(biases + up_offset, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate = gate.to(act.dtype.element_ty).to(tl.float32)
    up = up.to(act.dtype.element_ty).to(tl.float32)
    if KIND == 0:
        value = (gate * tl.sigmoid(gate)).to(act.dtype.element_ty).to(tl.float32) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        value = (up + 1.0) * (gate * tl.sigmoid(gate * 1.702))
    target = act + which[:, None] * inner + n[None, :]
    tl.store(target, value.to(act.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _down_tiles(
    act,
    order,
    tiles,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * TILE_FIELDS
    slot = tl.load(tile).to(tl.int64)
    m = tl.arange(0, BM)
    there = m < tl.load(tile + 2)
    which = tl.load(order + tl.load(tile + 1) + m, mask=there, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < width
    base = weight + slot * slot_stride + n[None, :] * row_stride
    row = act + which[:, None] * inner
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        known = k < inner
        x = tl.load(row + k[None, :], mask=there[:, None] & known[None, :], other=0.0)
        at = base + k[:, None] * column_stride
        weights = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, weights, total)
    if HAS_BIAS:
        biases = tl.load(bias + slot * bias_stride + n, mask=inside, other=0.0)
        total += biases.to(tl.float32)[None, :]
    target = out + which[:, None] * width + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


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

        hidden [T, H]; slots int16 [T * k]; act [T * k, I]; out [T * k, H].
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

    def launch_tiles(
        self,
        hidden: torch.Tensor,
        order: torch.Tensor,
        tiles: torch.Tensor,
        act: torch.Tensor,
        out: torch.Tensor,
        tile_rows: int,
    ) -> None:
        """Compute assignments in tiles of at most ``tile_rows`` (16, 32 or 64) of one expert.

        hidden [T, H]; order int32 [T * k]: assignments (token * k + rank) by expert; tiles int32
        [tiles, 4]: slot, first place in ``order``, how many, 0; act [T * k, I]; out [T * k, H].
        ``order`` and ``tiles`` may lie in pinned memory.
        """
        row, column = _strides(self.gate_up, self.transposed)
        _up_tiles[(triton.cdiv(self.inner, TILE_COLUMNS), len(tiles))](
            hidden,
            order,
            tiles,
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
            TOP_K=len(out) // len(hidden),
            HAS_BIAS=self.gate_up_bias is not None,
            KIND=self.kind,
            BM=tile_rows,
            BN=TILE_COLUMNS,
            BK=TILE_DEPTH,
        )
        row, column = _strides(self.down, self.transposed)
        _down_tiles[(triton.cdiv(self.width, TILE_COLUMNS), len(tiles))](
            act,
            order,
            tiles,
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
            BM=tile_rows,
            BN=TILE_COLUMNS,
            BK=TILE_DEPTH,
        )


def _strides(weight: torch.Tensor, transposed: bool) -> tuple[int, int]:
    """Strides along the output and the input dimension."""
    _, row, column = weight.stride()
    return (column, row) if transposed else (row, column)


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
