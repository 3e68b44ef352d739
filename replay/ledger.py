"""What the host did, as it went: a mark ends whatever began at the mark before.

Durations come out by subtraction (:mod:`replay.breakdown`), so nothing is counted twice or lost.
"""

from __future__ import annotations

from time import perf_counter_ns

from sim.spans import Mark


class Ledger:
    """``marks``: (end in ns of the monotonic clock, kind, layer, how many), in order.

    How many experts were awaited (DECIDE), chunks handed over (ISSUE), experts launched (EXPERTS).
    ``predictions``: of each that took effect within a wait, its end and how long it took, ns.
    """

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.predictions: list[tuple[int, int]] = []

    def mark(self, kind: int, layer: int, count: int = 0) -> int:
        """What went on since the mark before was ``kind``, for ``layer``; returns the time."""
        now = perf_counter_ns()
        self.marks.append((now, kind, layer, count))
        return now

    def predicted(self, began_ns: int) -> None:
        """A prediction took effect within the wait that goes on."""
        now = perf_counter_ns()
        self.predictions.append((now, now - began_ns))
