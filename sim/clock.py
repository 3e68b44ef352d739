"""SimPy's environment, counting whole nanoseconds, and what comes first at one instant."""

from __future__ import annotations

from collections.abc import Callable

import simpy
from simpy.events import Event, EventPriority

#: At one instant landings come first, then polls and finished predictions, then the host's own
#: steps (SimPy's NORMAL).
LANDING, POLL = EventPriority(-1), EventPriority(0)


class Clock(simpy.Environment):
    """All delays given to it are integers, so its time stays one."""

    _now: int

    @property
    def now(self) -> int:
        """Nanoseconds since the start."""
        return self._now

    def call_at(
        self, instant: int, priority: EventPriority, callback: Callable[[Event], None]
    ) -> Event:
        """An event at ``instant`` that calls back; processes may wait for it too."""
        event = Event(self)
        event._ok = True
        event._value = None
        event.callbacks.append(callback)
        self.schedule(event, priority, instant - self._now)
        return event
