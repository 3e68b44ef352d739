"""Requests of a trace put together: continuous batching on a fixed number of lines.

A closed loop without think time: ``batch`` lines, and each takes the trace's next request as its
own ends. Requests stay whole and in order, and a request's steps follow each other as recorded. The
schedule does not ask the time, so what comes of it is a plain workload: other step numbers, rows in
another order.

A prefill runs in steps of its own, before the next decode step; the lines that decode wait for it.
A decode step takes one recorded step of every line, in the order of the lines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from tracer.workload import PREFILL, Schedule

IntArray = npt.NDArray[Any]


def recorded_in_batches(columns: dict[str, IntArray]) -> bool:
    """Whether any recorded step has rows of several requests."""
    step, request = columns["step"], columns["request"]
    return bool(((step[1:] == step[:-1]) & (request[1:] != request[:-1])).any())


def refuse_composing(
    columns: dict[str, IntArray], requests: Sequence[int], batch: int, aside: int = 0
) -> None:
    """Raise UserError where the trace was recorded in batches, or has fewer requests than lines.

    ``aside``: requests that are there but not among these, which the error names.
    """
    if recorded_in_batches(columns):
        raise UserError(
            f"--batch {batch}: the trace was recorded in batches of its own, which are kept: leave "
            "--batch out, or record with --batch-size 1"
        )
    if batch > len(requests):
        beside = f" beside the {aside} that policies learn from" if aside else ""
        raise UserError(
            f"--batch {batch}: the rows read have {len(requests)} requests to judge{beside}: give "
            f"at most {len(requests)}, or read more of the trace (--max-tokens)"
        )


def compose(columns: dict[str, IntArray], requests: Sequence[int], batch: int) -> Schedule:
    """Rows of ``requests`` in the order in which ``batch`` lines run them, and their steps.

    ``columns``: ``request``, ``step`` and ``phase`` of a trace's rows, int [rows], steps
    non-decreasing, each of one request. Requests begin in the order of the trace.
    """
    recorded = _Recorded.of(columns, requests)
    units = _in_order(recorded, batch)
    step_of_unit = np.concatenate([np.full(len(each), at) for at, each in enumerate(units)])
    chosen = np.concatenate(units)
    sizes = recorded.sizes[chosen]
    offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.repeat(recorded.starts[chosen], sizes) + offset
    return Schedule(rows=rows, steps=np.repeat(step_of_unit, sizes), lines=batch)


@dataclass(frozen=True)
class _Recorded:
    """The recorded steps of the chosen requests, by their number in the trace's rows.

    ``of_request``: for each request, in the order in which they begin, its steps.
    """

    starts: IntArray
    sizes: IntArray
    is_prefill: npt.NDArray[np.bool_]
    of_request: list[IntArray]

    @classmethod
    def of(cls, columns: dict[str, IntArray], requests: Sequence[int]) -> _Recorded:
        step, request = columns["step"], columns["request"]
        starts = np.flatnonzero(np.concatenate(([True], step[1:] != step[:-1])))
        sizes = np.diff(np.append(starts, len(step)))
        owner = request[starts]
        is_prefill = np.logical_or.reduceat(columns["phase"] == PREFILL, starts)
        by_owner = np.argsort(owner, kind="stable")
        names, first = np.unique(owner[by_owner], return_index=True)
        runs = dict(zip(names.tolist(), np.split(by_owner, first[1:]), strict=True))
        own = sorted((runs[name] for name in set(requests)), key=lambda steps: int(steps[0]))
        return cls(starts, sizes, is_prefill, own)


class _Line:
    """One line: the recorded steps of its request that are still to run."""

    def __init__(self) -> None:
        self.steps: IntArray = np.empty(0, np.int64)

    def prefills(self, is_prefill: npt.NDArray[np.bool_]) -> list[IntArray]:
        """The leading prefill steps, taken off."""
        decodes = np.flatnonzero(~is_prefill[self.steps])
        count = int(decodes[0]) if len(decodes) else len(self.steps)
        taken, self.steps = self.steps[:count], self.steps[count:]
        return [taken[i : i + 1] for i in range(count)]


def _in_order(recorded: _Recorded, batch: int) -> list[IntArray]:
    """Recorded steps by composed step."""
    waiting = deque(recorded.of_request)
    lines = [_Line() for _ in range(batch)]
    steps: list[IntArray] = []
    while True:
        for line in lines:
            steps += line.prefills(recorded.is_prefill)
            while waiting and not len(line.steps):
                line.steps = waiting.popleft()
                steps += line.prefills(recorded.is_prefill)
        active = [line for line in lines if len(line.steps)]
        if not active:
            return steps
        # Until the first of them ends or prefills again, the lines go on together.
        reach = min(_decodes_ahead(line, recorded.is_prefill) for line in active)
        steps += list(np.stack([line.steps[:reach] for line in active], axis=1))
        for line in active:
            line.steps = line.steps[reach:]


def _decodes_ahead(line: _Line, is_prefill: npt.NDArray[np.bool_]) -> int:
    prefills = np.flatnonzero(is_prefill[line.steps])
    return int(prefills[0]) if len(prefills) else len(line.steps)
