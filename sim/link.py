"""The copy engine: a submission window in front of one link, in first-in first-out order.

It moves when the host looks: what has landed up to an instant follows by arithmetic from what was
handed over before.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from policies.transfers import Copy
from sim.timing import LinkCosts

_PPM = 1_000_000

#: the link has nothing under way
NEVER = 1 << 62


class ChunkSource(Protocol):
    """Where chunks come from and are reported to: the decision core."""

    def next_chunk(self) -> tuple[Copy, int] | None:
        """The chunk to hand over now, or None."""
        ...

    def chunk_done(self, copy: Copy) -> bool:
        """A chunk has landed."""
        ...


class Link:
    """One host-to-device copy engine.

    ``lands``: when the chunk on the wire completes, :data:`NEVER` on an idle link. ``room``: free
    places of the window. ``host_free``: the host is busy handing over until then. ``intervals``:
    the link's busy periods ``[start, end]``, maximal, for the GPU's slowdown; the reader prunes
    them.
    """

    def __init__(
        self,
        source: ChunkSource,
        costs: LinkCosts,
        window: int,
        issue_ns: int,
        cpu_slowdown_ppm: int = 0,
    ) -> None:
        self.window = window
        self.room = window
        self.host_free = 0
        self.lands = NEVER
        self.intervals: deque[list[int]] = deque()
        self.busy_ns = 0
        self.cpu_from = self.cpu_until = 0
        self._source = source
        self._costs = costs
        self.issue_ns = issue_ns
        self._cpu_slowdown_ppm = cpu_slowdown_ppm
        self._wire_ns: dict[int, int] = {}
        self._waiting: deque[tuple[Copy, int, int]] = deque()
        self._moving: Copy | None = None
        self._end = 0

    def refill(self, now: int) -> int:
        """The host hands over chunks while there is room; returns when it is free again."""
        free = now if now > self.host_free else self.host_free
        room = self.room
        while room > 0:
            chunk = self._source.next_chunk()
            if chunk is None:
                break
            free += self.issue_ns
            room -= 1
            if self._moving is None:
                self._moving = chunk[0]
                self.lands = self.occupy(chunk[1], free)
            else:
                self._waiting.append((chunk[0], chunk[1], free))
        self.room = room
        self.host_free = free
        return free

    def land(self) -> None:
        """The chunk on the wire has completed: tell it, and put the next one on the wire."""
        copy = self._moving
        assert copy is not None
        self._source.chunk_done(copy)
        self.room += 1
        if self._waiting:
            self._moving, nbytes, ready = self._waiting.popleft()
            self.lands = self.occupy(nbytes, ready)
        else:
            self._moving = None
            self.lands = NEVER

    def under_way(self) -> list[Copy]:
        """Copies of the chunks that were handed over and have not landed, in order."""
        if self._moving is None:
            return []
        return [self._moving, *[copy for copy, _, _ in self._waiting]]

    def land_and_send(self, chunks: deque[tuple[Copy, int]], polled: bool) -> Copy:
        """As :meth:`land`, but the copy alone is told; it is returned.

        ``polled``: the host sees it at once, and hands over the next of ``chunks``.
        """
        landed = self._moving
        assert landed is not None
        landed.landed += 1
        now = self.lands
        self.room += 1
        if self._waiting:
            self._moving, nbytes, ready = self._waiting.popleft()
            self.lands = self.occupy(nbytes, ready)
        else:
            self._moving = None
            self.lands = NEVER
        if polled and chunks:
            self.send(chunks, now)
        return landed

    def send(self, chunks: deque[tuple[Copy, int]], now: int) -> None:
        """As :meth:`refill`, from ``chunks`` that the source has named ahead."""
        free = now if now > self.host_free else self.host_free
        while self.room > 0 and chunks:
            copy, nbytes = chunks.popleft()
            free += self.issue_ns
            self.room -= 1
            if self._moving is None:
                self._moving = copy
                self.lands = self.occupy(nbytes, free)
            else:
                self._waiting.append((copy, nbytes, free))
        self.host_free = free

    def occupy(self, nbytes: int, ready: int) -> int:
        """A chunk handed over at ``ready`` follows the one before; returns when it has landed."""
        wire = self._wire_ns.get(nbytes, 0)
        if not wire:
            wire = self._wire_ns[nbytes] = self._costs.transfer_ns(nbytes)
        previous = self._end
        if ready > previous or not self.intervals:
            start = ready if ready > previous else previous
            wire += self._costs.startup_ns
            self.intervals.append([start, start])
        else:
            start = previous
            wire += self._costs.gap_ns
        if self.cpu_from <= start < self.cpu_until:
            wire += wire * self._cpu_slowdown_ppm // _PPM
        self._end = end = start + wire
        self.intervals[-1][1] = end
        self.busy_ns += wire
        return end
