"""Memory that another process can map, and that CUDA can pin.

An unnamed file in memory (``memfd_create``): it needs no /dev/shm, and it is gone with the last
process that maps it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import sys

import torch

from configs.errors import UserError
from configs.units import format_bytes
from replay.memory import require_host_memory

_MEND = "close other programs, or choose a smaller model or precision"


class SharedMemory:
    """``bytes``: uint8 [nbytes], zeros at first. ``file``: what another process maps.

    Where there is no Linux the memory is the process's own, and ``file`` None. Raises UserError
    where the host has less than ``nbytes`` left; ``what`` it is for, in words.
    """

    def __init__(self, nbytes: int, what: str) -> None:
        require_host_memory(nbytes, what, _MEND)
        self.file: int | None = None
        if sys.platform == "linux":
            self.file = os.memfd_create("moesim")
            os.ftruncate(self.file, nbytes)
        try:
            self.bytes = mapped(-1 if self.file is None else self.file, nbytes)
        except OSError as error:
            raise UserError(
                f"the host cannot give {format_bytes(nbytes)} for {what}: {_MEND}"
            ) from error
        self._pinned = False

    def pin(self) -> None:
        """Register it for the GPU's copy engine."""
        size = self.bytes.numel()
        status = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
        if int(status) != 0:
            raise UserError(
                f"CUDA cannot pin {format_bytes(size)} of host memory (error {int(status)}): raise "
                "the limit on locked memory, or choose a smaller model"
            )
        self._pinned = True

    def close(self) -> None:
        """Release it; views keep it alive."""
        if self._pinned:
            # A run that broke off may have left copies under way.
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self.file is not None:
            os.close(self.file)
            self.file = None


def mapped(file: int, nbytes: int) -> torch.Tensor:
    """A file's first ``nbytes``, shared with whoever else maps them: uint8 [nbytes]."""
    return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
