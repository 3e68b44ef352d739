"""Experts of many tokens on the GPU: groups of an event as tiles of the Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from replay.kernels import TILE_FIELDS, TILE_ROWS, GatedExperts

_FIELDS = int(TILE_FIELDS.value)


class TileEvent:
    """One event: its assignments sorted by expert, and launches over some of its experts.

    ``flat``: expert of every assignment, int [T * k]; ``order`` and ``table``: pinned memory of at
    least as many int32, and [experts + T * k / 16, 4]. They must not change until the device has
    run the event.
    """

    def __init__(
        self,
        kernel: GatedExperts,
        hidden: torch.Tensor,
        flat: npt.NDArray[np.int64],
        out: torch.Tensor,
        order: torch.Tensor,
        table: torch.Tensor,
    ) -> None:
        self._kernel = kernel
        self._hidden = hidden
        self._out = out
        self._order = order[: len(flat)]
        self._order.numpy()[:] = np.argsort(flat, kind="stable")
        counts = np.bincount(flat)
        self._starts = (np.cumsum(counts) - counts).tolist()
        self._counts = counts.tolist()
        # By the event, not by the group: sums must not depend on what has landed.
        most = int(counts.max())
        self._rows = next((rows for rows in TILE_ROWS if rows >= most), TILE_ROWS[-1])
        self._act = torch.empty((len(flat), kernel.inner), dtype=hidden.dtype, device=hidden.device)
        self._table = table
        self._used = 0

    def restart(self) -> None:
        """Launch over its experts again; the device has run what was launched."""
        self._used = 0

    def launch(self, slots: Mapping[int, int]) -> None:
        """Compute experts, each in its slot."""
        rows = self._rows
        tiles = []
        for expert, slot in slots.items():
            first, count = self._starts[expert], self._counts[expert]
            tiles += [
                (slot, first + done, min(rows, count - done), 0) for done in range(0, count, rows)
            ]
        table = self._table[self._used : self._used + len(tiles)]
        table.numpy()[:] = tiles
        self._used += len(tiles)
        self._kernel.launch_tiles(self._hidden, self._order, table, self._act, self._out, rows)


class TileExperts:
    """Kernels of all layers, and the pinned memory that their launches read from."""

    def __init__(self, kernels: Sequence[GatedExperts], experts: int, top_k: int) -> None:
        self._kernels = list(kernels)
        self._experts = experts
        self._top_k = top_k
        self._order = torch.empty(0, dtype=torch.int32)
        self._table = torch.empty((0, _FIELDS), dtype=torch.int32)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self._kernels[0].width

    def warm_up(self, like: torch.Tensor) -> None:
        """Compile all kernels; ``like`` [1, H] has the hidden states' type and width."""
        kernel = self._kernels[0]
        for rows in TILE_ROWS:
            tiles = torch.zeros((1, _FIELDS), dtype=torch.int32, pin_memory=True)
            order = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            out = like.repeat_interleave(self._top_k, 0)
            act = torch.empty((len(out), kernel.inner), dtype=like.dtype, device=like.device)
            kernel.launch_tiles(like, order, tiles, act, out, rows)
        torch.cuda.synchronize()

    def event(
        self, layer: int, hidden: torch.Tensor, flat: npt.NDArray[np.int64], out: torch.Tensor
    ) -> TileEvent:
        """Begin an event; the device has run the one before."""
        if len(flat) > len(self._order):
            size = self._experts + len(flat) // TILE_ROWS[0]
            self._order = torch.empty(len(flat), dtype=torch.int32, pin_memory=True)
            self._table = torch.empty((size, _FIELDS), dtype=torch.int32, pin_memory=True)
        kernel = self._kernels[layer]
        return TileEvent(kernel, hidden, flat, out, self._order, self._table)
