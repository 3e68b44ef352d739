"""A quiet core for the host thread.

On a shared machine a neighbour on the same physical core makes it half as fast, for seconds; other
cores are quiet meanwhile (docs/decisions.md). The engine's host thread is one loop of Python, whose
time a token shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

ALL = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
"""Cores that this process may use."""

_LEAST_CORES = 4
_ROUNDS = 3
_LOOPS = 6
_SLOWER = 1.2  # than when it was chosen: another core is looked for
_TURNS = 1500  # of a loop: some 50 us
LOOP_NS = 50_000
"""What :func:`loop_ns` takes on the host that host times are brought to."""


class QuietCore:
    """The core that this thread is on, and how fast it was when it was chosen."""

    def __init__(self) -> None:
        self._round_ns = 0.0
        self._choose()

    def keep(self) -> None:
        """Move again where this core has become slow: some 0.5 ms, for a move 0.9 a core more."""
        if _round_ns() > _SLOWER * self._round_ns:
            self._choose()

    def _choose(self) -> None:
        core, self._round_ns = quietest()
        os.sched_setaffinity(0, {core})


@contextmanager
def on_quiet_core() -> Iterator[QuietCore | None]:
    """Inside, this thread stays on the core that is fastest now; None on machines of few cores.

    Threads and processes that it starts meanwhile stay there too.
    """
    if len(ALL) < _LEAST_CORES:
        yield None
        return
    kept = os.sched_getaffinity(0)
    try:
        yield QuietCore()
    finally:
        os.sched_setaffinity(0, kept)


def quietest() -> tuple[int, int]:
    """The core of :data:`ALL` whose slowest round is the fastest, and that round, ns.

    Leaves this thread on one of them.
    """
    slowest = dict.fromkeys(sorted(ALL), 0)
    for _ in range(_ROUNDS):
        for core in slowest:
            os.sched_setaffinity(0, {core})
            slowest[core] = max(slowest[core], _round_ns())
    core = min(slowest, key=lambda core: slowest[core])
    return core, slowest[core]


def _round_ns() -> int:
    """The median of some loops, ns."""
    return sorted(loop_ns() for _ in range(_LOOPS))[_LOOPS // 2]


def loop_ns() -> int:
    """What a fixed piece of Python takes here and now: how fast the host is."""
    began, total = perf_counter_ns(), 0
    for turn in range(_TURNS):
        total += turn * turn % 7
    return perf_counter_ns() - began
