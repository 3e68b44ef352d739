"""All experts in host memory: one buffer, registered for the GPU's copy engine where there is one.

PyTorch's pinned allocator rounds every block up to a power of two (23 GB become 45): one large
buffer is registered with CUDA instead, which copies as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from configs.errors import UserError
from configs.units import format_bytes
from replay.layout import ExpertLayout
from replay.memory import require_host_memory

_MEND = "close other programs, or choose a smaller model or precision"

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
        require_host_memory(size, f"{layers * experts} experts", _MEND)
        try:
            self.memory = torch.empty((layers, experts, layout.nbytes), dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(
                f"the host cannot give {format_bytes(size)} for {layers * experts} experts: {_MEND}"
            ) from error
        self._registered = False
        if register:
            self.register()

    def register(self) -> None:
        """Pin the buffer for the copy engine."""
        size = self.memory.numel()
        status = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0)
        if int(status) != 0:
            raise UserError(
                f"CUDA cannot pin {format_bytes(size)} of host memory (error {int(status)}): raise "
                "the limit on locked memory, or choose a smaller model"
            )
        self._registered = True

    def close(self) -> None:
        """Release the memory."""
        if self._registered:
            # A run that broke off may have left copies under way.
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self._registered = False
        self.memory = torch.empty(0, dtype=torch.uint8)

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
