"""Copies that an event waits for, and that nothing can get in between.

While everything under way and queued HIGH is awaited and no prediction is coming, the order in
which chunks are handed over is known: the core takes all slots at once, and is told once, as the
last of them lands. In between only the link moves.
"""

from __future__ import annotations

from collections import deque

from policies.core import DecisionCore
from policies.transfers import Copy
from sim.link import Link


def can_rush(core: DecisionCore, link: Link) -> bool:
    """Whether an event waits for all that is under way or queued HIGH."""
    return all(copy.awaited for copy in (*link.under_way(), *core.queue.high))


class Rush:
    """``waiting``: awaited copies still to land; ``landed``: complete since the last launch."""

    def __init__(self, core: DecisionCore, link: Link, waiting: int) -> None:
        self.waiting = waiting
        self.landed: list[Copy] = []
        self._core = core
        self._link = link
        self._all: list[Copy] = []
        self._chunks: deque[tuple[Copy, int]] = deque()
        for copy in core.queue.high:
            for nbytes in copy.chunk_bytes[copy.sent :] if copy.sent else copy.chunk_bytes:
                self._chunks.append((copy, nbytes))
        core.start_demands()

    def spin(self, now: int) -> int:
        """The host polls from ``now`` until a copy is complete; returns when."""
        link = self._link
        while link.lands <= now:
            self._land(False)
        link.host_free = now
        if link.room:
            self._refill(now)
        while not self.landed:
            now = link.lands
            self._land(True)
        return now

    def land_until(self, until: int) -> None:
        """What lands up to and at ``until``, the host polling."""
        while self._link.lands <= until:
            self._land(True)

    def _land(self, polled: bool) -> None:
        link = self._link
        now = link.lands
        copy = link.land_and_send(self._chunks, polled)
        if copy.landed == copy.chunks:
            self.landed.append(copy)
            self._all.append(copy)
            self.waiting -= 1
            if not self.waiting:
                self._core.land_demands(self._all)
        if polled and link.room:
            link.refill(now)

    def _refill(self, now: int) -> None:
        if self._chunks:
            self._link.send(self._chunks, now)
        if self._link.room:
            self._link.refill(now)
