"""The GPU's compute stream: kernels in order, slower while copies run.

Ends are worked out lazily: a kernel's end is settled once the link's activity is known up to it;
before that the estimate (the link goes idle after what is known) is a lower bound.
"""

from __future__ import annotations

from collections import deque

from sim.link import Link

SEGMENT, EXPERTS, HEAD = 0, 1, 2
#: the link stays idle until the host acts, which waits for the GPU
SETTLED = 1 << 62
_PPM = 1_000_000


class GpuStream:
    """Kernels submitted by the host. ``busy_ns`` by kind: SEGMENT, EXPERTS, HEAD.

    ``pending``: kernels whose end is not settled, as :meth:`submit` takes them.
    """

    def __init__(self, link: Link) -> None:
        self.busy_ns = [0, 0, 0]
        self._intervals = link.intervals
        self._free = 0
        self.pending: deque[tuple[int, int, int, int]] = deque()

    def submit(self, earliest: int, nominal_ns: int, slowdown_ppm: int, kind: int) -> None:
        """Queue a kernel that may start at ``earliest``."""
        self.pending.append((earliest, nominal_ns, slowdown_ppm, kind))

    def ran(self, kind: int, begin: int, end: int) -> None:
        """A kernel's times are settled."""
        self.busy_ns[kind] += end - begin

    def end(self, known_until: int) -> int:
        """When everything submitted ends, given the link's activity up to ``known_until``."""
        pending = self.pending
        free = self._free
        intervals = self._intervals
        while pending:
            earliest, nominal, slowdown, kind = pending[0]
            start = earliest if earliest > free else free
            if intervals and intervals[-1][1] > start and slowdown:
                end = self._run(start, nominal, slowdown)
            else:
                end = start + nominal
            if end > known_until:
                return self._estimate(free)
            pending.popleft()
            self.ran(kind, start, end)
            free = self._free = end
            while len(intervals) > 1 and intervals[0][1] <= free:
                intervals.popleft()
        return free

    def _estimate(self, free: int) -> int:
        for earliest, nominal, slowdown, _ in self.pending:
            free = self._run(earliest if earliest > free else free, nominal, slowdown)
        return free

    def _run(self, start: int, nominal: int, slowdown_ppm: int) -> int:
        """End of a kernel of ``nominal`` length begun at ``start``.

        While the link is busy the kernel advances at 1 / (1 + slowdown); whole nanoseconds, the
        time needed rounds up, the work done rounds down.
        """
        scale = _PPM + slowdown_ppm
        at, left = start, nominal
        for begin, end in self._intervals:
            if end <= at:
                continue
            if begin > at:
                if left <= begin - at:
                    return at + left
                left -= begin - at
                at = begin
            needed = -(-left * scale // _PPM)
            if needed <= end - at:
                return at + needed
            left -= (end - at) * _PPM // scale
            at = end
        return at + left
