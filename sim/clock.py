"""SimPy's environment, counting whole nanoseconds."""

from __future__ import annotations

import simpy


class Clock(simpy.Environment):
    """All delays given to it are integers, so its time stays one."""

    _now: int

    @property
    def now(self) -> int:
        """Nanoseconds since the start."""
        return self._now
