"""Experts of many tokens on the GPU: groups of an event as tiles of the Triton kernels.

What tells a launch its assignments is brought to the device once an event, and the slots of a small
group travel in the launch's own arguments: kernels that read them from pinned memory would hold up
the copies on the link (docs/decisions.md has the times).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from replay.kernels import ALIGNED, MOST_IN_WORDS, TILE_ROWS, GatedExperts, fetch

_MOST_SLOTS = 2**15


class Fetched:
    """Numbers in pinned memory, piece after piece, and the same on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._device = torch.empty(size, dtype=torch.int32, device=device)
        self._used = 0

    def __len__(self) -> int:
        return len(self._host)

    def restart(self, used: int = 0) -> None:
        """Write over all but the first ``used`` numbers; the device has run what reads them."""
        self._used = used

    def take(self, size: int) -> tuple[npt.NDArray[np.int32], slice]:
        """A piece to be written, and where it is."""
        where = slice(self._used, self._used + size)
        # So that every piece begins at a multiple of 16 bytes.
        self._used += -(-size // ALIGNED) * ALIGNED
        return self._numbers[where], where

    def bring(self, where: slice) -> torch.Tensor:
        """A piece that was written, on the device, in order with what is launched after this."""
        target = self._device[where]
        fetch(self._host[where], target)
        return target


class TileEvent:
    """One event: its assignments sorted by expert, and launches over some of its experts.

    ``flat``: expert of every assignment, int [T * k]; ``experts``: how many a layer has, rounded up
    to a multiple of ``ALIGNED``; ``fetched``: of at least :meth:`numbers` numbers, which nothing
    else may use until the device has run the event.
    """

    def __init__(
        self,
        kernel: GatedExperts,
        hidden: torch.Tensor,
        flat: npt.NDArray[np.int64],
        out: torch.Tensor,
        experts: int,
        fetched: Fetched,
    ) -> None:
        self._kernel = kernel
        self._hidden = hidden
        self._out = out
        self._experts = experts
        counts = np.bincount(flat, minlength=experts)
        self._counts = counts.tolist()
        fetched.restart()
        numbers, where = fetched.take(2 * experts + len(flat))
        numbers[:experts] = np.cumsum(counts) - counts
        numbers[experts : 2 * experts] = counts
        numbers[2 * experts :] = np.argsort(flat, kind="stable")
        self._places = fetched.bring(where)
        self._fetched = fetched
        # By the event, not by the group: sums must not depend on what has landed.
        most = int(counts.max())
        self._rows = next((rows for rows in TILE_ROWS if rows >= most), TILE_ROWS[-1])
        self._act = torch.empty((len(flat), kernel.inner), dtype=hidden.dtype, device=hidden.device)

    @staticmethod
    def numbers(experts: int, assignments: int, slots: int) -> int:
        """The most that an event of so many assignments writes, its experts in so many slots."""
        in_words = MOST_IN_WORDS if slots <= _MOST_SLOTS else 0
        return 2 * experts + assignments + ALIGNED + experts // (in_words + 1) * experts

    def restart(self) -> None:
        """Launch over its experts again; the device has run what was launched."""
        self._fetched.restart(-(-len(self._places) // ALIGNED) * ALIGNED)

    def launch(self, slots: Mapping[int, int]) -> None:
        """Compute experts, each in its slot."""
        group: Mapping[int, int] | torch.Tensor = slots
        if len(slots) > MOST_IN_WORDS or max(slots.values()) >= _MOST_SLOTS:
            group = self._brought(slots)
        self._kernel.launch_tiles(
            self._hidden,
            self._places,
            self._experts,
            group,
            self._act,
            self._out,
            tile_rows=self._rows,
            most=max(self._counts[expert] for expert in slots),
        )

    def _brought(self, slots: Mapping[int, int]) -> torch.Tensor:
        numbers, where = self._fetched.take(self._experts)
        numbers[:] = -1
        numbers[list(slots)] = list(slots.values())
        return self._fetched.bring(where)


class TileExperts:
    """Kernels of all layers, and the memory that their launches read from."""

    def __init__(self, kernels: Sequence[GatedExperts], experts: int, top_k: int) -> None:
        self._kernels = list(kernels)
        self._experts = -(-experts // ALIGNED) * ALIGNED
        self._top_k = top_k
        self._device = self._kernels[0].gate_up.device
        self._fetched = Fetched(0, self._device)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self._kernels[0].width

    def warm_up(self, like: torch.Tensor) -> None:
        """Compile all kernels; ``like`` [1, H] has the hidden states' type and width."""
        kernel = self._kernels[0]
        out = like.repeat_interleave(self._top_k, 0)
        act = torch.empty((len(out), kernel.inner), dtype=like.dtype, device=like.device)
        fetched = Fetched(3 * self._experts, self._device)
        numbers, where = fetched.take(len(fetched))
        numbers[:] = 0
        places = fetched.bring(where)
        for rows in TILE_ROWS:
            for group in ({0: 0}, places[2 * self._experts :]):
                kernel.launch_tiles(
                    like, places, self._experts, group, act, out, tile_rows=rows, most=1
                )
        torch.cuda.synchronize()

    def event(
        self, layer: int, hidden: torch.Tensor, flat: npt.NDArray[np.int64], out: torch.Tensor
    ) -> TileEvent:
        """Begin an event; the device has run the one before."""
        kernel = self._kernels[layer]
        size = TileEvent.numbers(self._experts, len(flat), len(kernel.gate_up))
        if size > len(self._fetched):
            self._fetched = Fetched(size, self._device)
        return TileEvent(kernel, hidden, flat, out, self._experts, self._fetched)
