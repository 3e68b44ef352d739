"""Triton kernels that compute experts straight from their slots.

A decode step is bound by reading weights: each program of :func:`_up` and :func:`_down` reads a
block of rows of one expert's matrix and multiplies it with one token. Assignments (token, rank)
whose slot is -1 are not of this group and cost nothing but the launch.

For many tokens, :func:`_up_tiles` and :func:`_down_tiles` multiply tiles: up to ``BM`` assignments
of one expert. Each expert's sums do not depend on what else is launched with it.

``python -m tests.bench_kernels`` times the decode kernels over blocks of many sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from replay.gated import MOST_IN_WORDS, form_of

WORDS = ("word_0", "word_1", "word_2", "word_3")
PLACE_WORDS = ("place_0", "place_1", "place_2", "place_3")
EXPERT_WORDS = ("expert_0", "expert_1", "expert_2", "expert_3")

NUMBERS = tuple(f"number_{index}" for index in range(16))
"""Arguments of :func:`store`."""

TILE_ROWS = (16, 32, 64)
TILE_COLUMNS, TILE_DEPTH = 64, 64
ALIGNED = 4
"""Numbers of 32 bits whose multiples are places that Triton needs no other kernel for."""


@dataclass(frozen=True)
class Block:
    """What a decode program reads at a time: ``rows`` outputs times ``columns`` inputs.

    ``defer``: products are summed over the columns once at the end, not block by block. ``paired``:
    where gate and up rows alternate, both are read as one run (of no effect elsewhere).
    """

    rows: int
    columns: int
    warps: int = 4
    defer: bool = False
    paired: bool = False


DECODE_BLOCKS = {
    False: (Block(8, 512, defer=True), Block(4, 512)),
    True: (Block(16, 64, warps=8, defer=True, paired=True), Block(32, 64, warps=8, defer=True)),
}
"""Of :func:`_up` and :func:`_down`, by whether weights are transposed: [in, out].

Chosen on an H200 among some 80 (docs/decisions.md has the times)."""


@triton.jit
def _activated(gate, up, biases, up_offset, known, act, HAS_BIAS: tl.constexpr, KIND: tl.constexpr):
    """Activation of projections [..., n]; their biases, where known, lie from ``biases`` on."""
    if HAS_BIAS:
        gate += tl.load(biases, mask=known, other=0.0).to(tl.float32)
        up += tl.load(biases + up_offset, mask=known, other=0.0).to(tl.float32)
    # The library's kernels round the projection to the weights' type before the activation.
    gate = gate.to(act.dtype.element_ty).to(tl.float32)
    up = up.to(act.dtype.element_ty).to(tl.float32)
    if KIND == 0:
        value = (gate * tl.sigmoid(gate)).to(act.dtype.element_ty).to(tl.float32) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        value = (up + 1.0) * (gate * tl.sigmoid(gate * 1.702))
    return value.to(act.dtype.element_ty)


@triton.jit
def _part(vector, column, depth):
    """Elements ``column`` of a vector of ``depth``."""
    return tl.load(vector + column, mask=column < depth, other=0.0).to(tl.float32)


@triton.jit
def _products(x, base, row, there, column, depth, row_stride, column_stride):
    """A block of a matrix times its part of the vector, element by element."""
    at = base + row[:, None] * row_stride + column[None, :] * column_stride
    inside = column < depth
    weights = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    return weights.to(tl.float32) * x[None, :]


@triton.jit
def _times(
    vector,
    base,
    row,
    there,
    depth,
    row_stride,
    column_stride,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEFER: tl.constexpr,
):
    """So many (``COUNT``) rows of a matrix times a vector of ``depth``."""
    total = tl.zeros((COUNT, COLUMNS) if DEFER else (COUNT,), tl.float32)
    for start in range(0, depth, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _part(vector, column, depth)
        block = _products(x, base, row, there, column, depth, row_stride, column_stride)
        total += block if DEFER else tl.sum(block, 1)
    return tl.sum(total, 1) if DEFER else total


@triton.jit
def _in_word(one, word_0, word_1, word_2, word_3):
    """Number ``one`` of those that :func:`in_words` packed."""
    later = tl.where(one < 6, word_2, word_3)
    word = tl.where(one < 2, word_0, tl.where(one < 4, word_1, later))
    # Shifted up and down again, so that the sign is kept.
    return (word << (16 - 16 * (one % 2))) >> 16


@triton.jit
def _slot_of(one, slots, word_0, word_1, word_2, word_3, IN_WORDS: tl.constexpr):
    """The slot of an assignment: 16 bits of a launch's arguments, or from memory."""
    if IN_WORDS:
        slot = _in_word(one, word_0, word_1, word_2, word_3)
    else:
        slot = tl.load(slots + one)
    return slot.to(tl.int64)


@triton.jit(do_not_specialize=(*WORDS, *PLACE_WORDS))
def _up(
    hidden,
    slots,
    word_0,
    word_1,
    word_2,
    word_3,
    place_0,
    place_1,
    place_2,
    place_3,
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
    IN_WORDS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEFER: tl.constexpr,
    PAIRED: tl.constexpr,
):
    one = tl.program_id(0)
    slot = _slot_of(one, slots, word_0, word_1, word_2, word_3, IN_WORDS)
    if slot < 0:
        return
    if IN_WORDS:
        one = _in_word(one, place_0, place_1, place_2, place_3)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < inner
    gate_row = row * gate_step
    base = weight + slot * slot_stride
    token = hidden + (one // TOP_K) * width
    if PAIRED:
        pair = tl.program_id(1) * (2 * ROWS) + tl.arange(0, 2 * ROWS)
        total = _times(
            token, base, pair, pair < 2 * inner, width, row_stride, column_stride,
            2 * ROWS, COLUMNS, DEFER,
        )  # fmt: skip
        gate, up = tl.split(tl.reshape(total, (ROWS, 2)))
    else:
        gate = tl.zeros((ROWS, COLUMNS) if DEFER else (ROWS,), tl.float32)
        up = tl.zeros((ROWS, COLUMNS) if DEFER else (ROWS,), tl.float32)
        up_base = base + up_offset * row_stride
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x = _part(token, column, width)
            block = _products(x, base, gate_row, there, column, width, row_stride, column_stride)
            gate += block if DEFER else tl.sum(block, 1)
            block = _products(x, up_base, gate_row, there, column, width, row_stride, column_stride)
            up += block if DEFER else tl.sum(block, 1)
        if DEFER:
            gate = tl.sum(gate, 1)
            up = tl.sum(up, 1)
    biases = bias + slot * bias_stride + gate_row
    value = _activated(gate, up, biases, up_offset, there, act, HAS_BIAS, KIND)
    tl.store(act + one * inner + row, value, mask=there)


@triton.jit(do_not_specialize=(*WORDS, *PLACE_WORDS))
def _down(
    act,
    slots,
    word_0,
    word_1,
    word_2,
    word_3,
    place_0,
    place_1,
    place_2,
    place_3,
    weight,
    bias,
    out,
    width,
    inner,
    slot_stride,
    bias_stride,
    row_stride,
    column_stride,
    IN_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEFER: tl.constexpr,
):
    one = tl.program_id(0)
    slot = _slot_of(one, slots, word_0, word_1, word_2, word_3, IN_WORDS)
    if slot < 0:
        return
    if IN_WORDS:
        one = _in_word(one, place_0, place_1, place_2, place_3)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < width
    total = _times(
        act + one * inner, weight + slot * slot_stride, row, there, inner, row_stride,
        column_stride, ROWS, COLUMNS, DEFER,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + slot * bias_stride + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + one * width + row, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _tile_of(
    places,
    slots,
    word_0,
    word_1,
    word_2,
    word_3,
    expert_0,
    expert_1,
    expert_2,
    expert_3,
    experts,
    IN_WORDS: tl.constexpr,
    BM: tl.constexpr,
):
    """The program's slot, how many assignments its tile and those after it have, and the first."""
    one = tl.program_id(2)
    slot = _slot_of(one, slots, word_0, word_1, word_2, word_3, IN_WORDS)
    expert = _in_word(one, expert_0, expert_1, expert_2, expert_3) if IN_WORDS else one
    done = tl.program_id(1) * BM
    left = tl.where(slot < 0, 0, tl.load(places + experts + expert) - done)
    return slot, left, places + 2 * experts + tl.load(places + expert) + done


@triton.jit(do_not_specialize=(*WORDS, *EXPERT_WORDS, "experts"))
def _up_tiles(
    hidden,
    places,
    slots,
    word_0,
    word_1,
    word_2,
    word_3,
    expert_0,
    expert_1,
    expert_2,
    expert_3,
    experts,
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
    IN_WORDS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    slot, left, order = _tile_of(
        places, slots, word_0, word_1, word_2, word_3, expert_0, expert_1, expert_2, expert_3,
        experts, IN_WORDS, BM,
    )  # fmt: skip
    if left <= 0:
        return
    m = tl.arange(0, BM)
    there = m < left
    which = tl.load(order + m, mask=there, other=0).to(tl.int64)
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
    biases = bias + slot * bias_stride + gate_row
    value = _activated(gate, up, biases, up_offset, inside, act, HAS_BIAS, KIND)
    target = act + which[:, None] * inner + n[None, :]
    tl.store(target, value, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=(*WORDS, *EXPERT_WORDS, "experts"))
def _down_tiles(
    act,
    places,
    slots,
    word_0,
    word_1,
    word_2,
    word_3,
    expert_0,
    expert_1,
    expert_2,
    expert_3,
    experts,
    weight,
    bias,
    out,
    width,
    inner,
    slot_stride,
    bias_stride,
    row_stride,
    column_stride,
    IN_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    slot, left, order = _tile_of(
        places, slots, word_0, word_1, word_2, word_3, expert_0, expert_1, expert_2, expert_3,
        experts, IN_WORDS, BM,
    )  # fmt: skip
    if left <= 0:
        return
    m = tl.arange(0, BM)
    there = m < left
    which = tl.load(order + m, mask=there, other=0).to(tl.int64)
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


def in_words(numbers: Sequence[int]) -> tuple[int, ...]:
    """Up to ``MOST_IN_WORDS`` slots or experts as words of 32 bits, two each; missing ones: -1."""
    padded = [*numbers, *[-1] * (MOST_IN_WORDS - len(numbers))]
    return struct.unpack("<4i", struct.pack("<8h", *padded))


class Launched(NamedTuple):
    """A launch that was made: Triton's compiled kernel, the grid and the arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


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
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        act: torch.Tensor,
        out: torch.Tensor,
        words: Sequence[int] | None = None,
    ) -> tuple[Launched, Launched]:
        """Compute the assignments whose slot is not -1; returns both launches.

        hidden [T, H]; slots int16 [T * k]; act [T * k, I]; out [T * k, H]. ``words``: in place of
        what is in ``slots``, see :func:`named_words`.
        """
        up, down = DECODE_BLOCKS[self.transposed]
        return (
            self.launch_up(hidden, slots, act, up, words),
            self.launch_down(act, slots, out, down, words),
        )

    def launch_up(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        act: torch.Tensor,
        block: Block,
        words: Sequence[int] | None = None,
    ) -> Launched:
        """The first product and the activation; as :meth:`launch`."""
        grid = (_programs(slots, words), triton.cdiv(self.inner, block.rows))
        arguments = {
            "hidden": hidden,
            "slots": slots,
            "act": act,
            "TOP_K": len(slots) // len(hidden),
            "PAIRED": block.paired and self.interleaved,
            **_word_arguments(words),
            **self._up_arguments(),
        }
        return Launched(_up[grid](**arguments, **_block_arguments(block)), grid, arguments)

    def launch_down(
        self,
        act: torch.Tensor,
        slots: torch.Tensor,
        out: torch.Tensor,
        block: Block,
        words: Sequence[int] | None = None,
    ) -> Launched:
        """The second product; as :meth:`launch`."""
        grid = (_programs(slots, words), triton.cdiv(self.width, block.rows))
        arguments = {
            "act": act,
            "slots": slots,
            "out": out,
            **_word_arguments(words),
            **self._down_arguments(),
        }
        return Launched(_down[grid](**arguments, **_block_arguments(block)), grid, arguments)

    def launch_tiles(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        experts: int,
        group: Mapping[int, int] | torch.Tensor,
        act: torch.Tensor,
        out: torch.Tensor,
        *,
        tile_rows: int,
        most: int,
    ) -> tuple[Launched, Launched]:
        """Compute assignments in tiles of one expert each; returns both launches.

        hidden [T, H]; act [T * k, I]; out [T * k, H]. ``places`` int32 [2 * experts + T * k], on
        the device: of each expert where its assignments begin in what follows, then how many they
        are, at most ``most``; then the assignments (token * k + rank) by expert. ``experts`` is a
        multiple of ``ALIGNED``. ``group``: slot by expert, up to ``MOST_IN_WORDS`` of them below
        2**15; or of every expert, int32 [experts] on the device, -1: not of this group. A tile has
        at most ``tile_rows`` assignments: one of ``TILE_ROWS``.
        """
        if isinstance(group, torch.Tensor):
            slots, count = group, experts
            named = dict.fromkeys((*WORDS, *EXPERT_WORDS), 0)
        else:
            slots, count = places, len(group)
            named = dict(zip(WORDS, in_words(list(group.values())), strict=True))
            named |= dict(zip(EXPERT_WORDS, in_words(list(group)), strict=True))
        rows = triton.cdiv(most, tile_rows)
        common = {
            "places": places,
            "slots": slots,
            **named,
            "experts": experts,
            "IN_WORDS": slots is places,
            "BM": tile_rows,
            "BN": TILE_COLUMNS,
            "BK": TILE_DEPTH,
        }
        up = {"hidden": hidden, "act": act, **common, **self._up_arguments()}
        up["TOP_K"] = len(out) // len(hidden)
        down = {"act": act, "out": out, **common, **self._down_arguments()}
        grids = [(columns, rows, count) for columns in self.tile_columns]
        return (
            Launched(_up_tiles[grids[0]](**up), grids[0], up),
            Launched(_down_tiles[grids[1]](**down), grids[1], down),
        )

    @property
    def form(self) -> tuple[int, int, bool, bool, int]:
        """All but the tensors."""
        return self.width, self.inner, self.transposed, self.interleaved, self.kind

    @property
    def tile_columns(self) -> tuple[int, int]:
        """Tiles of either product side by side: the first dimension of the grids."""
        return triton.cdiv(self.inner, TILE_COLUMNS), triton.cdiv(self.width, TILE_COLUMNS)

    def _up_arguments(self) -> dict[str, Any]:
        return {
            **self._matrix(self.gate_up, self.gate_up_bias),
            "gate_step": 2 if self.interleaved else 1,
            "up_offset": 1 if self.interleaved else self.inner,
            "KIND": self.kind,
        }

    def _down_arguments(self) -> dict[str, Any]:
        return self._matrix(self.down, self.down_bias)

    def _matrix(self, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
        row, column = _strides(weight, self.transposed)
        return {
            "weight": weight,
            "bias": weight if bias is None else bias,
            "width": self.width,
            "inner": self.inner,
            "slot_stride": weight.stride(0),
            "bias_stride": 0 if bias is None else bias.stride(0),
            "row_stride": row,
            "column_stride": column,
            "HAS_BIAS": bias is not None,
        }


def named_words(slots: Mapping[int, int]) -> tuple[int, ...]:
    """What a decode kernel's ``WORDS`` and ``PLACE_WORDS`` are: slot by assignment, up to eight."""
    return *in_words(list(slots.values())), *in_words(list(slots))


def _programs(slots: torch.Tensor, words: Sequence[int] | None) -> int:
    """One an assignment that may have a slot."""
    return len(slots) if words is None else min(len(slots), MOST_IN_WORDS)


def _word_arguments(words: Sequence[int] | None) -> dict[str, Any]:
    names = (*WORDS, *PLACE_WORDS)
    named = (0,) * len(names) if words is None else words
    return {**dict(zip(names, named, strict=True)), "IN_WORDS": words is not None}


def _block_arguments(block: Block) -> dict[str, Any]:
    return {
        "ROWS": block.rows,
        "COLUMNS": block.columns,
        "DEFER": block.defer,
        "num_warps": block.warps,
    }


def _strides(weight: torch.Tensor, transposed: bool) -> tuple[int, int]:
    """Strides along the output and the input dimension."""
    _, row, column = weight.stride()
    return (column, row) if transposed else (row, column)


def gated_experts(module: Any, views: dict[str, torch.Tensor]) -> GatedExperts | None:
    """The kernel's description of an experts module of transformers; None: another kind."""
    form = form_of(module, views)
    if form is None:
        return None
    down = views["down_proj"]
    rows, columns = down.shape[1:]
    inner, width = (rows, columns) if form.transposed else (columns, rows)
    return GatedExperts(
        gate_up=views["gate_up_proj"],
        down=down,
        gate_up_bias=views.get("gate_up_proj_bias"),
        down_bias=views.get("down_proj_bias"),
        width=width,
        inner=inner,
        transposed=form.transposed,
        interleaved=form.interleaved,
        kind=form.kind,
    )


@triton.jit
def _scatter(rows, places, out, width, COLUMNS: tl.constexpr):
    one = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    place = tl.load(places + one).to(tl.int64)
    row = tl.load(rows + one * width + column, mask=there)
    tl.store(out + place * width + column, row, mask=there)


def scatter_rows(rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """``out[places[i]] = rows[i]`` for the first ``count``: rows [n, H], places int32, out [m, H].

    ``rows`` and ``places`` lie in pinned memory and are read from there: a copy would queue up
    behind the experts that are being copied.
    """
    width, columns = rows.shape[1], 512
    _scatter[(count, triton.cdiv(width, columns))](rows, places, out, width, COLUMNS=columns)


@triton.jit(do_not_specialize=("count",))
def _fetch(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    tl.store(target + at, tl.load(source + at, mask=there), mask=there)


FETCHED = 1024
"""Numbers that a program of :func:`fetch` brings."""


def fetch(source: torch.Tensor, target: torch.Tensor) -> Launched:
    """``target[:len(source)] = source``, int32, from pinned memory and by a kernel.

    A copy would queue up behind the experts that are being copied.
    """
    arguments = {"source": source, "target": target, "count": len(source), "BLOCK": FETCHED}
    grid = (triton.cdiv(len(source), FETCHED),)
    return Launched(_fetch[grid](**arguments), grid, arguments)


@triton.jit(do_not_specialize=NUMBERS)
def _store(
    target,
    number_0,
    number_1,
    number_2,
    number_3,
    number_4,
    number_5,
    number_6,
    number_7,
    number_8,
    number_9,
    number_10,
    number_11,
    number_12,
    number_13,
    number_14,
    number_15,
):
    tl.store(target + 0, number_0)
    tl.store(target + 1, number_1)
    tl.store(target + 2, number_2)
    tl.store(target + 3, number_3)
    tl.store(target + 4, number_4)
    tl.store(target + 5, number_5)
    tl.store(target + 6, number_6)
    tl.store(target + 7, number_7)
    tl.store(target + 8, number_8)
    tl.store(target + 9, number_9)
    tl.store(target + 10, number_10)
    tl.store(target + 11, number_11)
    tl.store(target + 12, number_12)
    tl.store(target + 13, number_13)
    tl.store(target + 14, number_14)
    tl.store(target + 15, number_15)


def store(target: torch.Tensor, numbers: Sequence[int]) -> Launched:
    """``target[:] = numbers``, int32 [16], which travel in the launch's arguments."""
    arguments = {"target": target, **dict(zip(NUMBERS, numbers, strict=True))}
    return Launched(_store[(1,)](**arguments, num_warps=1), (1,), arguments)
