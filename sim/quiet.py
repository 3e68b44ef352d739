"""Experts' launches, and demand copies on a link that has nothing else to do.

While nothing but the host can act, an event's times follow by arithmetic: no SimPy event is needed.
:class:`sim.machine.Machine` works so whenever the link is idle, :mod:`sim.tape` always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sim.gpu import EXPERTS, GpuStream
from sim.link import Link
from sim.timing import HostCosts, Timing


class QuietLink:
    """Launches groups of experts on ``gpu``, and times copies on ``link`` while it is idle."""

    def __init__(self, timing: Timing, link: Link, gpu: GpuStream, layers: int, experts: int):
        self._timing = timing
        self._link = link
        self._gpu = gpu
        self._host = timing.host
        # One token assigned to each expert: a decode step of one request.
        self._decode_ns = [
            [timing.experts_ns(layer, size, size) for size in range(experts + 1)]
            for layer in range(layers)
        ]
        self._decode_ppm = [timing.experts_ppm(size, size) for size in (1, *range(1, experts + 1))]
        self._launches: dict[tuple[int, int, int], tuple[int, int]] = {}

    def use(self, host: HostCosts) -> None:
        """Host costs from now on."""
        self._host = host

    def launch(self, layer: int, size: int, assigned: int, now: int) -> int:
        """The host launches a group of ``size`` experts; returns when it is free again.

        ``assigned``: how many tokens are assigned to them, all together.
        """
        if assigned == size:
            cost, slowdown_ppm = self._decode_ns[layer][size], self._decode_ppm[size]
        else:
            known = self._launches.get((layer, size, assigned))
            if known is None:
                timing = self._timing
                known = timing.experts_ns(layer, size, assigned), timing.experts_ppm(size, assigned)
                self._launches[layer, size, assigned] = known
            cost, slowdown_ppm = known
        host = self._host
        now += host.experts_launch_ns + (size - 1) * host.launch_each_ns
        self._gpu.pending.append((now, cost, slowdown_ppm, EXPERTS))
        return now

    def burst(
        self,
        layer: int,
        ready: tuple[int, int],
        sizes: Sequence[int],
        assigned: Sequence[int],
        now: int,
        book_stall: Callable[[int, int], None],
    ) -> int:
        """Hand chunks over, launch the resident group, then one group for all that has landed.

        ``ready``: experts that are there, and their tokens. ``sizes``: bytes of each chunk;
        ``assigned``: tokens of the expert that this chunk completes, 0 where it completes none.
        ``book_stall(chunk, ns)`` is told how long the GPU stood idle for it.
        """
        link, gpu, window, issue = (
            self._link,
            self._gpu,
            self._link.window,
            self._host.copy_issue_ns,
        )
        ends: list[int] = []
        for size in sizes[:window]:
            now += issue
            ends.append(link.occupy(size, now))
        if ready[0]:
            now = self.launch(layer, *ready, now)
        total, landed = len(sizes), 0
        while landed < total:
            free, done, seen = now, landed, now
            while done < len(ends) and ends[done] <= now:
                done += 1
            for size in sizes[len(ends) : done + window]:
                free += issue
                ends.append(link.occupy(size, free))
            completed = any(assigned[landed:done])
            while not completed:
                seen = ends[done]
                if len(ends) < total:
                    free = (free if free > seen else seen) + issue
                    ends.append(link.occupy(sizes[len(ends)], free))
                completed = assigned[done] > 0
                done += 1
            if seen > now:
                idle_from = gpu.end(seen)
                if idle_from < now:
                    idle_from = now
                if idle_from < seen:
                    book_stall(done - 1, seen - idle_from)
            while done < len(ends) and ends[done] <= free:
                if len(ends) < total:
                    free += issue
                    ends.append(link.occupy(sizes[len(ends)], free))
                done += 1
            group = [tokens for tokens in assigned[landed:done] if tokens]
            landed = done
            now = (free if free > seen else seen) + self._host.landing_ns
            now = self.launch(layer, len(group), sum(group), now)
        return now
