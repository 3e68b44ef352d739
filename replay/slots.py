"""Expert slots on the device, and the copies that fill them."""

from __future__ import annotations

from collections import deque
from time import perf_counter_ns

import torch

from configs.errors import UserError
from configs.units import format_bytes
from policies.core import DecisionCore
from policies.transfers import Copy
from replay.cuda_driver import CopyStream
from replay.layout import ExpertLayout
from replay.memory import enough_memory
from replay.store import ExpertStore
from sim.spans import ChunkSpan

POISON = 0xFF
"""A byte that makes every floating-point number that it fills a NaN."""


class SlotRaceError(RuntimeError):
    """An expert was computed from a slot before all of it was there: a fault of the engine."""


def scratch_bytes(expert_bytes: int, link_scale: float) -> int:
    """Device memory that emulating a link so many times slower takes; none for the link itself."""
    return int(expert_bytes * (link_scale - 1)) + 1 if link_scale > 1 else 0


class SlotPool:
    """``slots`` experts' places on ``device``; the core numbers them.

    ``views``: the parts of all slots by name, [slots, *shape], as a fused experts module has them.
    Raises UserError where the device has not the memory.
    """

    def __init__(self, layout: ExpertLayout, slots: int, device: torch.device) -> None:
        what = f"{slots} expert slots ({format_bytes(slots * layout.nbytes)})"
        with enough_memory(what, "give a smaller --budget or --expert-budget"):
            self.memory = torch.zeros((slots, layout.nbytes), dtype=torch.uint8, device=device)
        self.views = layout.views(self.memory)

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self.memory)


class CopyEngine:
    """Feeds the core's chunks to the device through a submission window.

    On CUDA, copies run on a stream of their own; a chunk has landed once its event is reached. On a
    CPU a chunk is there as soon as it is handed over. ``chunks``, ``nbytes``: handed over so far.
    ``landed_at_ns``: when the host saw the last landing.
    ``scale``: every chunk is followed by ``scale`` - 1 times its bytes into a scratch area, as if
    the link were so much slower; CUDA only. ``poison``: a slot holds NaNs from where a copy to it
    is handed over until its bytes are there, so that what is computed too early shows.
    """

    def __init__(
        self,
        core: DecisionCore,
        store: ExpertStore,
        pool: SlotPool,
        window: int = 2,
        scale: float = 1.0,
        *,
        poison: bool = False,
    ) -> None:
        self._core = core
        self._poison = poison
        self._window = window
        self._source = store.memory.view(-1, store.layout.nbytes)
        self._pool = pool
        self._nbytes = store.layout.nbytes
        self._flights: deque[tuple[Copy, int, int]] = deque()
        #: chunks from their hand-over, or the landing before, to where the host saw them landed
        self.spans: list[ChunkSpan] = []
        self.landed_at_ns = 0
        self.cuda = pool.memory.is_cuda
        self._stream = torch.cuda.Stream() if self.cuda else None
        self._copies = (
            None if self._stream is None else CopyStream(self._stream.cuda_stream, window)
        )
        self._source_at = self._source.data_ptr()
        self._pool_at = pool.memory.data_ptr()
        self.chunks = 0
        self.nbytes = 0
        self._more = scale - 1
        largest = max(core.shape.bytes_by_layer)
        self._scratch = self._scratch_area(largest, scale) if scale > 1 else None

    def _scratch_area(self, nbytes: int, scale: float) -> torch.Tensor:
        """As many bytes as follow the largest chunk."""
        if not self.cuda:
            raise UserError("--link-scale emulates a slower link on CUDA only; use --device cuda")
        size = scratch_bytes(nbytes, scale)
        if size > self._source.numel():
            raise UserError(
                f"--link-scale {scale:g}: the host's experts are too few for it; "
                f"give less than {self._source.numel() // nbytes}"
            )
        with enough_memory("a slower link's scratch area", "give a smaller --link-scale or budget"):
            return torch.empty(size, dtype=torch.uint8, device=self._pool.memory.device)

    @property
    def scratch_bytes(self) -> int:
        """GPU memory that only the emulation of a slower link takes."""
        return 0 if self._scratch is None else self._scratch.numel()

    def refill(self) -> None:
        """Hand over chunks while the window has room and the core names one."""
        core = self._core
        for _ in range(self._window - len(self._flights)):
            chunk = core.next_chunk()
            if chunk is None:
                return
            self._hand_over(*chunk)

    def poll(self) -> bool:
        """Tell the core of chunks that have landed, in order; True: there was one."""
        landed = False
        flights, copies = self._flights, self._copies
        while flights and (copies is None or copies.landed(flights[0][1])):
            copy, _, handed = flights.popleft()
            now = perf_counter_ns()
            begin = max(handed, self.landed_at_ns)
            self.landed_at_ns = now
            self.spans.append(ChunkSpan(copy.key, copy.source, copy.demand, begin, now))
            self._core.chunk_done(copy)
            landed = True
        return landed

    def drain(self) -> None:
        """Wait for what is under way, and tell nobody: the run is over."""
        if self._stream is not None:
            self._stream.synchronize()
        if self._copies is not None:
            self._copies.close()
        self._flights.clear()

    def _hand_over(self, copy: Copy, nbytes: int) -> None:
        key, slot = copy.key, self._core.memory.slot_of[copy.key]
        # The core has counted this chunk as sent.
        offset = sum(copy.chunk_bytes[: copy.sent - 1]) if copy.chunks > 1 else 0
        self.chunks += 1
        self.nbytes += nbytes
        if self._poison and copy.sent == 1:
            self._spoil(slot)
        if self._copies is None:
            run = slice(offset, offset + nbytes)
            self._pool.memory[slot, run].copy_(self._source[key, run])
            self._flights.append((copy, 0, perf_counter_ns()))
            return
        target = self._pool_at + slot * self._nbytes + offset
        source = self._source_at + key * self._nbytes + offset
        if self._scratch is None:
            event = self._copies.copy(target, source, nbytes)
            self._flights.append((copy, event, perf_counter_ns()))
            return
        behind = (self._scratch.data_ptr(), self._source_at, int(nbytes * self._more))
        event = self._copies.copy(target, source, nbytes, behind)
        self._flights.append((copy, event, perf_counter_ns()))

    def _spoil(self, slot: int) -> None:
        """Fill a slot in order with the kernels; its copy waits for that."""
        self._pool.memory[slot].fill_(POISON)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
