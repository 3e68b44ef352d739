"""Experts of many tokens on the GPU: groups of an event as tiles of the Triton kernels.

What tells a launch its assignments is brought to the device once an event, and the slots of a small
group travel in the launch's own arguments: kernels that read them from pinned memory would hold up
the copies on the link. Launches go through the driver, as those of decode steps do: through Triton
each takes the host three to seven times as long (docs/decisions.md has the times).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from replay.gated import MOST_IN_WORDS
from replay.kernels import (
    ALIGNED,
    EXPERT_WORDS,
    FETCHED,
    TILE_ROWS,
    WORDS,
    GatedExperts,
    fetch,
)
from replay.launches import BoundKernel, Words

_MOST_SLOTS = 2**15

Ints = npt.NDArray[np.int32]
Group = Mapping[int, int] | torch.Tensor
"""As :meth:`replay.kernels.GatedExperts.launch_tiles` has it."""


def _aligned(size: int) -> int:
    """At least ``size`` numbers, after which the next ones are aligned."""
    return -(-size // ALIGNED) * ALIGNED


class Fetched:
    """Numbers in pinned memory, piece after piece, and the same on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        size = max(size, 1)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._used = 0
        self._bound: BoundKernel | None = None
        if device.type == "cuda":
            self._count = ctypes.c_int32(0)
            launched = fetch(self._host[:1], self._device)
            places = {"count": ctypes.addressof(self._count)}
            self._bound = BoundKernel(launched, torch.cuda.current_stream().cuda_stream, places)

    def __len__(self) -> int:
        return len(self._host)

    def restart(self, used: int = 0) -> None:
        """Write over all but the first ``used`` numbers; the device has run what reads them."""
        self._used = used

    def take(self, size: int) -> tuple[Ints, slice]:
        """A piece to be written, and where it is."""
        where = slice(self._used, self._used + size)
        if where.stop > len(self._host):
            raise ValueError(f"{where.stop} numbers were taken, there are {len(self._host)}")
        self._used += _aligned(size)
        return self._numbers[where], where

    def bring(self, where: slice) -> torch.Tensor:
        """A piece that was written, on the device, in order with what is launched after this."""
        source, target = self._host[where], self._device[where]
        if self._bound is None:
            fetch(source, target)
            return target
        self._bound.point("source", source)
        self._bound.point("target", target)
        self._count.value = len(source)
        self._bound.launch.resize((-(-len(source) // FETCHED),))
        self._bound.launch()
        return target


class TileLaunches:
    """Both products of a launch over tiles, through the driver.

    ``like`` [1, H] has the hidden states' type and width; ``experts``: of a layer, a multiple of
    ``ALIGNED``. A first launch of each kind through Triton compiles it.
    """

    def __init__(self, kernel: GatedExperts, experts: int, top_k: int, like: torch.Tensor) -> None:
        self._columns = kernel.tile_columns
        self._dtype = like.dtype
        self._words = Words((*WORDS, *EXPERT_WORDS))
        stream = torch.cuda.current_stream().cuda_stream
        out = like.repeat_interleave(top_k, 0)
        act = torch.empty((len(out), kernel.inner), dtype=like.dtype, device=like.device)
        # No expert has anything to do: these launches compute nothing.
        nothing = torch.zeros(3 * experts + ALIGNED, dtype=torch.int32, device=like.device)
        self._bound: dict[tuple[int, bool], tuple[BoundKernel, BoundKernel]] = {}
        for rows in TILE_ROWS:
            for group in ({0: 0}, nothing[2 * experts : 3 * experts]):
                up, down = kernel.launch_tiles(
                    like, nothing, experts, group, act, out, tile_rows=rows, most=1
                )
                self._bound[rows, isinstance(group, dict)] = (
                    BoundKernel(up, stream, self._words.places),
                    BoundKernel(down, stream, self._words.places),
                )
        torch.cuda.synchronize()

    def launch_tiles(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        experts: int,
        group: Group,
        act: torch.Tensor,
        out: torch.Tensor,
        *,
        tile_rows: int,
        most: int,
    ) -> None:
        """As :meth:`replay.kernels.GatedExperts.launch_tiles`; ``experts`` as it was told before.

        The tensors are to be kept until the device has run it. Raises TypeError for hidden states
        of another type than the experts'.
        """
        if hidden.dtype != self._dtype:
            raise TypeError(f"hidden states are {hidden.dtype}, the experts {self._dtype}")
        in_words = not isinstance(group, torch.Tensor)
        up, down = self._bound[tile_rows, in_words]
        if isinstance(group, torch.Tensor):
            slots, count = group, experts
        else:
            slots, count = places, len(group)
            self._words.name(group)
        up.point("hidden", hidden)
        down.point("out", out)
        rows = -(-most // tile_rows)
        for bound, columns in zip((up, down), self._columns, strict=True):
            bound.point("places", places)
            bound.point("slots", slots)
            bound.point("act", act)
            bound.launch.resize((columns, rows, count))
            bound.launch()


class TileEvent:
    """One event: its assignments sorted by expert, and launches over some of its experts.

    ``flat``: expert of every assignment, int [T * k]; ``experts``: how many a layer has, rounded up
    to a multiple of ``ALIGNED``; ``fetched``: of at least :meth:`numbers` numbers, which nothing
    else may use until the device has run the event. ``kernel`` launches.
    """

    def __init__(
        self,
        kernel: TileLaunches | GatedExperts,
        act: torch.Tensor,
        hidden: torch.Tensor,
        flat: npt.NDArray[np.int64],
        out: torch.Tensor,
        experts: int,
        fetched: Fetched,
    ) -> None:
        self._kernel = kernel
        self._hidden = hidden
        self._act = act
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

    @staticmethod
    def numbers(experts: int, assignments: int, slots: int) -> int:
        """The most that an event of so many assignments writes, its experts in so many slots."""
        in_words = MOST_IN_WORDS if slots <= _MOST_SLOTS else 0
        return 2 * experts + assignments + ALIGNED + experts // (in_words + 1) * experts

    def restart(self) -> None:
        """Launch over its experts again; the device has run what was launched."""
        self._fetched.restart(_aligned(len(self._places)))

    def launch(self, slots: Mapping[int, int]) -> None:
        """Compute experts, each in its slot."""
        if not slots:
            return
        group: Group = slots
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
            most=max([self._counts[expert] for expert in slots]),
        )

    def _brought(self, slots: Mapping[int, int]) -> torch.Tensor:
        numbers, where = self._fetched.take(self._experts)
        numbers[:] = -1
        numbers[list(slots)] = list(slots.values())
        return self._fetched.bring(where)


class TileExperts:
    """Launches of all layers, and the memory that they read from.

    ``kernel``: of every layer, since all have their experts in the same slots. ``tokens``: of the
    largest event for which there shall be memory from the beginning; more is taken when needed.
    """

    def __init__(self, kernel: GatedExperts, experts: int, top_k: int, tokens: int = 0) -> None:
        self._kernel = kernel
        self._experts = _aligned(experts)
        weights = kernel.gate_up
        self._device = weights.device
        self._launches: TileLaunches | GatedExperts = kernel
        if weights.is_cuda:
            like = torch.zeros((1, kernel.width), dtype=weights.dtype, device=weights.device)
            self._launches = TileLaunches(kernel, self._experts, top_k, like)
        self._fetched = Fetched(self._numbers(tokens * top_k), self._device)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self._kernel.width

    def event(
        self, hidden: torch.Tensor, flat: npt.NDArray[np.int64], out: torch.Tensor
    ) -> TileEvent:
        """Begin an event; the device has run the one before."""
        size = self._numbers(len(flat))
        if size > len(self._fetched):
            self._fetched = Fetched(size, self._device)
        act = torch.empty((len(flat), self._kernel.inner), dtype=hidden.dtype, device=hidden.device)
        launches = self._launches
        return TileEvent(launches, act, hidden, flat, out, self._experts, self._fetched)

    def _numbers(self, assignments: int) -> int:
        return TileEvent.numbers(self._experts, assignments, len(self._kernel.gate_up))


def common_kernel(kernels: Sequence[GatedExperts | None]) -> GatedExperts | None:
    """That of all layers; None: one has none, or they differ.

    All are over the same slots, so that the tensors are the same.
    """
    first = kernels[0]
    if first is None or any(kernel is None or kernel.form != first.form for kernel in kernels):
        return None
    return first
