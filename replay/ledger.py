"""What the host did, as it went: a mark ends whatever began at the mark before.

Durations come out by subtraction (:mod:`replay.breakdown`), so nothing is counted twice or lost.
"""

from __future__ import annotations

from time import perf_counter_ns

STEP, SEGMENT, GPU, DECIDE, ISSUE, EXPERTS, COPY, CPU = range(8)
NAMES = (
    "step",
    "segment launch",
    "wait for GPU",
    "decide",
    "issue copies",
    "experts launch",
    "wait for copy",
    "wait for CPU",
)
"""Of the kinds. STEP: everything between steps' layers; SEGMENT: a segment or the head is launched;
GPU: polled until the device has run everything; DECIDE: a gate event or its next wave; ISSUE: the
window is refilled; EXPERTS: a group is launched; COPY and CPU: polled until there is something."""


class Ledger:
    """``marks``: (end in ns of the monotonic clock, kind, layer, how many), in order.

    How many experts were awaited (DECIDE), chunks handed over (ISSUE), experts launched (EXPERTS).
    """

    def __init__(self) -> None:
        self.marks: list[tuple[int, int, int, int]] = []

    def mark(self, kind: int, layer: int, count: int = 0) -> int:
        """What went on since the mark before was ``kind``, for ``layer``; returns the time."""
        now = perf_counter_ns()
        self.marks.append((now, kind, layer, count))
        return now
