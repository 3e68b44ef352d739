"""All experts in host memory: one buffer, registered for the GPU's copy engine where there is one.

PyTorch's pinned allocator rounds every block up to a power of two (23 GB become 45): one large
buffer is registered with CUDA instead, which copies as fast. Other processes can map it, so that
the one that computes experts on the CPU (:mod:`replay.cpu_lane`) reads them where they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from replay.layout import ExpertLayout
from replay.shared_memory import SharedMemory

Reader = Callable[[int, int], dict[str, torch.Tensor]]


class ExpertStore:
    """Experts of all MoE layers on the host: uint8 [layers, experts, nbytes].

    ``register``: pin the buffer for CUDA. Raises UserError where the host has not the memory.
    """

    def __init__(
        self, layout: ExpertLayout, layers: int, experts: int, *, register: bool = False
    ) -> None:
        self.layout = layout
        self.layers = layers
        self.experts = experts
        size = layers * experts * layout.nbytes
        self._shared = SharedMemory(size, f"{layers * experts} experts")
        self.memory = self._shared.bytes.view(layers, experts, layout.nbytes)
        if register:
            self.register()

    @property
    def file(self) -> int | None:
        """What another process maps; None where it cannot."""
        return self._shared.file

    def register(self) -> None:
        """Pin the buffer for the copy engine."""
        self._shared.pin()

    def close(self) -> None:
        """Release the memory."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._shared.close()

    def expert(self, layer: int, expert: int) -> torch.Tensor:
        """Bytes of one expert: uint8 [nbytes]."""
        return self.memory[layer, expert]

    def fill(self, read: Reader) -> None:
        """Fill from ``read(layer, expert)``, which gives the parts by name."""
        for layer in range(self.layers):
            views = self.layout.views(self.memory[layer])
            for expert in range(self.experts):
                parts = read(layer, expert)
                for name, view in views.items():
                    view[expert].copy_(parts[name])

    def fill_random(self, seed: int, scale: float = 0.02) -> None:
        """Fill with random weights of a spread that keeps activations finite.

        One layer's worth of noise is drawn, the others are shifted copies of it: time depends on
        shapes and bytes, and drawing tens of gigabytes would take minutes.
        """
        generator = torch.Generator().manual_seed(seed)
        for view in self.layout.views(self.memory[0]).values():
            noise = torch.randn(view.shape[1:], generator=generator) * scale
            for expert in range(self.experts):
                view[expert].copy_(noise.roll(expert + 1, 0))
        for layer in range(1, self.layers):
            self.memory[layer].copy_(self.memory[0].roll(layer, 0))
