"""The copy engine: a submission window in front of one link, in first-in first-out order.

It is driven by SimPy events' callbacks, one event a chunk: when a chunk has landed the next one of
the window starts, and the host (if it is spinning) refills the window. Chunk completions are
scheduled so that at one instant a landing comes before anything the host does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from simpy.events import Event

from policies.transfers import Copy
from sim.clock import LANDING, POLL, Clock
from sim.timing import LinkCosts

_PPM = 1_000_000


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

    ``spinning``: the host polls (from ``spin_from`` on), so a landing is noticed at once; it is
    busy handing over until ``host_free``. ``poll`` is what it does at a completion.
    ``current``: the SimPy event of the chunk under way, None when idle. ``intervals``: the link's
    busy periods ``[start, end]``, maximal, for the GPU's slowdown; the reader prunes them.
    """

    def __init__(
        self,
        env: Clock,
        source: ChunkSource,
        costs: LinkCosts,
        window: int,
        issue_ns: int,
        cpu_slowdown_ppm: int = 0,
    ) -> None:
        self.env = env
        self.source = source
        self.window = window
        self.room = window
        self.spinning = False
        self.spin_from = 0
        self.host_free = 0
        self.poll: Callable[[int], object] = self.refill
        self.current: Event | None = None
        self.intervals: deque[list[int]] = deque()
        self.busy_ns = 0
        self.cpu_from = self.cpu_until = 0
        self._costs = costs
        self._issue_ns = issue_ns
        self._cpu_slowdown_ppm = cpu_slowdown_ppm
        self._wire_ns: dict[int, int] = {}
        self._waiting: deque[tuple[Copy, int, int]] = deque()
        self._moving: Copy | None = None
        self._on_landing = self._landed
        self._owed = False
        self._end = 0

    def known_until(self, now: int) -> int:
        """The link's activity is settled up to this instant."""
        return self._end if self._moving is not None else now

    def refill(self, now: int) -> int:
        """The host hands over chunks while there is room; returns when it is free again."""
        free = now if now > self.host_free else self.host_free
        room = self.room
        while room > 0:
            chunk = self.source.next_chunk()
            if chunk is None:
                break
            free += self._issue_ns
            self.room -= 1
            if self._moving is None:
                self._begin(chunk[0], chunk[1], free)
            else:
                self._waiting.append((chunk[0], chunk[1], free))
            room -= 1
        self.host_free = free
        return free

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

    def _begin(self, copy: Copy, nbytes: int, ready: int) -> None:
        end = self.occupy(nbytes, ready)
        self._moving = copy
        self.current = self.env.call_at(end, LANDING, self._on_landing)

    def _landed(self, _: Event) -> None:
        copy = self._moving
        assert copy is not None
        self.source.chunk_done(copy)
        self.room += 1
        if self._waiting:
            self._begin(*self._waiting.popleft())
        else:
            self._moving = self.current = None
        if not self.spinning:
            return
        now = self.env._now
        if now >= self.spin_from:
            self.poll(now)
        else:
            self.owe_poll()

    def owe_poll(self) -> None:
        """Something completed while the host is busy: it polls when its spin begins."""
        if self._owed:
            return
        self._owed = True
        self.env.call_at(self.spin_from, POLL, self._pay_poll)

    def _pay_poll(self, _: Event) -> None:
        self._owed = False
        self.poll(self.env._now)

    def spin(self, now: int) -> None:
        """The host begins to poll at ``now``, which may lie ahead of the environment's time."""
        self.spinning = True
        self.spin_from = self.host_free = now

    @property
    def still_handing(self) -> bool:
        """Whether something may complete before the hand-over under way ends."""
        free = self.host_free
        return free > self.env._now and self._moving is not None and self._end <= free
