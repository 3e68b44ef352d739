"""The transfer queue: copies waiting for the link, HIGH before LOW, in chunks.

FIFO inside a priority class, except that LOW copies may carry a priority number (larger first;
FineMoE changes it every layer). Nothing here knows time: a driver asks for the next chunk when its
submission window has room.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Mapping


class Copy:
    """One expert on its way to the GPU.

    ``sent`` and ``landed`` count chunks handed to the hardware and completed. ``awaited``: the
    event in progress needs it. ``staged``: it goes to a staging slot. ``outcome``: what became of
    it, filled in by cores that watch for it.
    """

    __slots__ = (
        "awaited",
        "chunk_bytes",
        "chunks",
        "demand",
        "high",
        "key",
        "landed",
        "layer",
        "outcome",
        "priority",
        "sent",
        "seq",
        "source",
        "staged",
    )

    def __init__(
        self,
        key: int,
        layer: int,
        chunk_bytes: tuple[int, ...],
        seq: int,
        high: bool,
        source: str = "demand",
    ) -> None:
        self.key = key
        self.layer = layer
        self.chunk_bytes = chunk_bytes
        self.chunks = len(chunk_bytes)
        self.seq = seq
        self.high = self.demand = self.awaited = high
        self.priority = 0.0
        self.source = source
        self.staged = False
        self.outcome = ""
        self.sent = 0
        self.landed = 0

    def __repr__(self) -> str:
        level = "HIGH" if self.high else "LOW"
        chunks = f"{self.landed}/{self.sent}/{self.chunks}"
        return f"Copy(key={self.key}, {level}, {chunks}, {self.source})"


def _low_order(copy: Copy) -> tuple[float, int]:
    return (-copy.priority, copy.seq)


def split_chunks(nbytes: int, chunks: int) -> tuple[int, ...]:
    """Sizes of ``chunks`` nearly equal pieces of ``nbytes``, larger ones first."""
    piece, rest = divmod(nbytes, chunks)
    return tuple(piece + (index < rest) for index in range(chunks))


class TransferQueue:
    """Copies with chunks left to hand over."""

    def __init__(self) -> None:
        self.high: deque[Copy] = deque()
        self.low: list[Copy] = []
        self.paused = False

    def __len__(self) -> int:
        return len(self.high) + len(self.low)

    @property
    def ready(self) -> bool:
        """Whether a chunk may be handed over now."""
        return bool(self.high) or (bool(self.low) and not self.paused)

    def push_high(self, copy: Copy) -> None:
        """Queue a demand copy behind the other demand copies."""
        self.high.append(copy)

    def push_low(self, copy: Copy) -> None:
        """Queue a prefetch by priority, then arrival."""
        low = self.low
        if not low or low[-1].priority >= copy.priority:
            low.append(copy)
        else:
            insort(low, copy, key=_low_order)

    def promote(self, copy: Copy) -> None:
        """Move a prefetch behind the demand copies; chunks already handed over stay so."""
        copy.high = True
        if copy.sent < copy.chunks:
            self.low.remove(copy)
            self.high.append(copy)

    def promote_all(self, copies: Iterable[Copy]) -> None:
        """:meth:`promote` each, in this order."""
        for copy in copies:
            copy.high = True
            if copy.sent < copy.chunks:
                self.high.append(copy)
        self.low[:] = [copy for copy in self.low if not copy.high]

    def remove(self, copy: Copy) -> None:
        """Take out a copy whose remaining chunks are not wanted."""
        (self.high if copy.high else self.low).remove(copy)

    def reprioritise(self, priorities: Mapping[int, float]) -> None:
        """Set the priority of LOW copies by key and reorder; unnamed ones keep theirs."""
        for copy in self.low:
            copy.priority = priorities.get(copy.key, copy.priority)
        self.low.sort(key=_low_order)

    def low_of(self, layer: int) -> Iterable[Copy]:
        """LOW copies of one layer, in queue order."""
        return [copy for copy in self.low if copy.layer == layer]
