"""How one expert lies in memory: its parts one after the other, the same on the host and in a slot.

An expert is copied as one run of bytes (or a few chunks of it), and the parts are views into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

ALIGNMENT_BYTES = 256
"""Of every part and slot: what vectorised loads and copies want."""


@dataclass(frozen=True)
class Part:
    """One tensor of an expert: ``shape`` without the expert dimension, ``offset`` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertLayout:
    """Parts of one expert and its size in bytes, padding included."""

    parts: tuple[Part, ...]
    nbytes: int

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parts of the experts in ``memory``, uint8 [experts, nbytes]: views [experts, *shape].

        They are strided by ``nbytes``; nothing is copied.
        """
        views = {}
        for part in self.parts:
            run = memory[:, part.offset : part.offset + part.nbytes]
            views[part.name] = run.view(part.dtype).unflatten(1, part.shape)
        return views


def layout_of(experts: Any) -> ExpertLayout:
    """Layout of an experts module of transformers: its parameters are [E, ...]; meta is enough."""
    parts, offset = [], 0
    for name, parameter in experts.named_parameters():
        part = Part(name, tuple(parameter.shape[1:]), parameter.dtype, offset)
        parts.append(part)
        offset = _aligned(offset + part.nbytes)
    return ExpertLayout(tuple(parts), offset)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
