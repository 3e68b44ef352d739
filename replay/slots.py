"""Expert slots on the device, and the copies that fill them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

from policies.core import DecisionCore
from policies.transfers import Copy
from replay.layout import ExpertLayout
from replay.store import ExpertStore


class SlotPool:
    """``slots`` experts' places on ``device``; the core numbers them.

    ``views``: the parts of all slots by name, [slots, *shape], as a fused experts module has them.
    """

    def __init__(self, layout: ExpertLayout, slots: int, device: torch.device) -> None:
        self.memory = torch.zeros((slots, layout.nbytes), dtype=torch.uint8, device=device)
        self.views = layout.views(self.memory)

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self.memory)


@dataclass
class _Flight:
    """A chunk handed to the hardware; ``done`` is None where a copy is complete at once."""

    copy: Copy
    done: Any


class CopyEngine:
    """Feeds the core's chunks to the device through a submission window.

    On CUDA, copies run on a stream of their own; a chunk has landed once its event is reached. On a
    CPU a chunk is there as soon as it is handed over. ``issued_ns``: host time spent handing over.
    """

    def __init__(
        self, core: DecisionCore, store: ExpertStore, pool: SlotPool, window: int = 2
    ) -> None:
        self._core = core
        self._store = store
        self._pool = pool
        self._window = window
        self._flights: deque[_Flight] = deque()
        self.cuda = pool.memory.is_cuda
        self._stream = torch.cuda.Stream() if self.cuda else None
        self._idle_events: list[Any] = []
        self.issued_ns = 0
        self.chunks = 0
        self.nbytes = 0

    @property
    def busy(self) -> bool:
        """Whether a chunk is under way."""
        return bool(self._flights)

    def refill(self) -> None:
        """Hand over chunks while the window has room and the core names one."""
        room = self._window - len(self._flights)
        began = perf_counter_ns()
        for _ in range(room):
            chunk = self._core.next_chunk()
            if chunk is None:
                break
            self._flights.append(self._hand_over(*chunk))
        self.issued_ns += perf_counter_ns() - began

    def poll(self) -> bool:
        """Tell the core of chunks that have landed, in order; True: there was one."""
        landed = False
        flights = self._flights
        while flights and (flights[0].done is None or flights[0].done.query()):
            flight = flights.popleft()
            if flight.done is not None:
                self._idle_events.append(flight.done)
            self._core.chunk_done(flight.copy)
            landed = True
        return landed

    def _hand_over(self, copy: Copy, nbytes: int) -> _Flight:
        experts = self._core.shape.experts
        # The core has counted this chunk as sent.
        offset = sum(copy.chunk_bytes[: copy.sent - 1])
        layer, expert = divmod(copy.key, experts)
        source = self._store.expert(layer, expert)[offset : offset + nbytes]
        slot = self._core.memory.slot_of[copy.key]
        target = self._pool.memory[slot, offset : offset + nbytes]
        self.chunks += 1
        self.nbytes += nbytes
        if self._stream is None:
            target.copy_(source)
            return _Flight(copy, None)
        done = self._idle_events.pop() if self._idle_events else torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return _Flight(copy, done)
