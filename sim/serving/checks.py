"""What must hold in every run, each worked out apart from what it is held to; RuntimeError if not.

Little's law: the time integral of how many are in the system (and in the queue), kept as time
passes, against the sum of the requests' own times. Conservation of work: the rows that were
computed, noted as they were, against those that each request was to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sim.serving.requests import Request
from sim.serving.schedule import Rules, Share

Ints = npt.NDArray[np.int64]


def fail(what: str) -> NoReturn:
    """A check of ours does not hold: a bug."""
    raise RuntimeError(f"serving: {what}")


class Integral:
    """How many there are, summed over time: ``area`` in requests x ns."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = 0
        self.number = 0
        self.most = 0
        self.area = 0

    def change(self, now: int, by: int) -> None:
        """At ``now`` ``by`` more (or fewer) are there. RuntimeError where time runs back."""
        if now < self._last:
            fail(f"{self._name}: time runs back from {self._last} to {now} ns")
        self.area += self.number * (now - self._last)
        self._last = now
        self.number += by
        if self.number < 0:
            fail(f"{self._name}: fewer than none at {now} ns")
        if self.number > self.most:
            self.most = self.number


class Ledger:
    """Notes what is computed for whom, and holds every step to the rules."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._rows: dict[int, list[int]] = {}
        self._held: dict[int, int] = {}
        self.rows = 0
        self.kv_most = 0

    def step(self, begin: int, rows: Sequence[int], shares: Sequence[Share]) -> None:
        """A step of these rows of the trace begins; they belong to the shares, in order."""
        rules, held, at = self._rules, self._held, 0
        if not 0 < len(rows) <= rules.step_tokens or len(shares) > rules.batch:
            fail(f"step at {begin} ns: {len(rows)} rows of {len(shares)} requests break the rules")
        kinds = set()
        for request, count in shares:
            if request.arrival < 0 or request.arrival > begin:
                fail(f"step at {begin} ns: request {request.index} has not arrived")
            fills = request.done < request.prompt
            kinds.add(fills)
            if count > (rules.chunk if fills else 1):
                fail(f"step at {begin} ns: request {request.index} has {count} rows")
            self._rows.setdefault(request.index, []).extend(rows[at : at + count])
            held[request.index] = request.kv_tokens
            at += count
        if at != len(rows) or (len(kinds) > 1 and not rules.mixed):
            fail(f"step at {begin} ns: its rows are not those of its requests")
        self.rows += at
        self.kv_most = max(self.kv_most, reserved := sum(held.values()))
        if reserved > rules.kv_tokens or len(held) > rules.batch:
            fail(f"step at {begin} ns: {reserved} KV tokens of {len(held)} requests are held")

    def nobody_waits_in_vain(self, begin: int, waiting: Sequence[Request], room: int) -> None:
        """After admission: the first in the queue does not fit. ``room``: rows left in the step."""
        rules, held = self._rules, self._held
        if rules.static or not waiting or not rules.mixed or room <= 0:
            return
        if len(held) < rules.batch and sum(held.values()) + waiting[0].kv_tokens <= rules.kv_tokens:
            fail(f"step at {begin} ns: request {waiting[0].index} fits and is not admitted")

    def finished(self, request: Request) -> None:
        """All its rows must have been computed, once each, in order."""
        drawn = request.drawn
        due = drawn.prefill_rows[: request.prompt] + drawn.decode_rows[: request.decode]
        if self._rows.pop(request.index, []) != due:
            fail(f"request {request.index}: its rows were not computed once each, in order")
        if not self._rules.static:
            del self._held[request.index]

    def batch_over(self) -> None:
        """A static batch gives its places back."""
        self._held.clear()


def check_run(
    requests: Sequence[Request],
    system: Integral,
    queue: Integral,
    steps: tuple[Sequence[int], Sequence[int]],
    idle_ns: int,
    rows: int,
) -> dict[str, Any]:
    """Of a whole run; returns Little's law in figures.

    ``steps``: begins and ends, ns; ``rows``: computed in all.
    """
    arrival, scheduled, finish = (
        np.array([getattr(request, name) for request in requests], np.int64)
        for name in ("arrival", "scheduled", "finish")
    )
    if (arrival < 0).any() or (scheduled < arrival).any() or (finish <= scheduled).any():
        fail("a request is out of order: it arrives, is admitted, and finishes")
    if rows != sum(request.rows for request in requests):
        fail(f"{rows} rows were computed, not those of the requests")
    begin, end = np.array(steps[0], np.int64), np.array(steps[1], np.int64)
    busy = int((end - begin).sum())
    if busy + idle_ns != int(end[-1]):
        fail(f"{busy} ns of steps and {idle_ns} ns idle are not {int(end[-1])} ns")
    _check_idle(arrival, finish, begin, end)
    span = int(end[-1])
    return {
        "system": _little("system", system, arrival, finish, span),
        "queue": _little("queue", queue, arrival, scheduled, span),
    }


def _check_idle(arrival: Ints, finish: Ints, begin: Ints, end: Ints) -> None:
    """No step is under way only while nobody is there."""
    gap_from = np.concatenate(([0], end[:-1]))
    gaps = np.flatnonzero(begin > gap_from)
    come = np.searchsorted(np.sort(arrival), begin[gaps], side="left")
    gone = np.searchsorted(np.sort(finish), gap_from[gaps], side="right")
    if (come != gone).any() or (begin < gap_from).any():
        fail("the server idles while somebody is there")


def _little(name: str, kept: Integral, entered: Ints, left: Ints, span: int) -> dict[str, Any]:
    """L = lambda W. Integers: the two sides must be equal, not nearly so."""
    if kept.number != 0:
        fail(f"{name}: {kept.number} are left in it at the end")
    spent = sum((left - entered).tolist())
    if kept.area != spent:
        fail(f"Little's law, {name}: {kept.area} requests x ns over time, {spent} by request")
    count = len(entered)
    return {
        "mean_number": kept.area / span,
        "arrivals_per_s": count / span * 1e9,
        "mean_time_ms": spent / count / 1e6,
        "most": kept.most,
    }
