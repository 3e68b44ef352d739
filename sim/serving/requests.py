"""Which rows of the trace each request of a served workload takes: whole requests, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from sim.serving.arrivals import Coming, Recorded
from sim.serving.config import EXACT, SCALED
from tracer.workload import PREFILL, Workload

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drawn:
    """A request of the trace: its rows (indices into the workload) and the context before them."""

    name: int
    prefill_rows: list[int]
    decode_rows: list[int]
    context: int

    @property
    def outputs(self) -> int:
        """Tokens it yields: one by the prefill, if there is one, and one by each decode row."""
        return len(self.decode_rows) + bool(self.prefill_rows)


def library(work: Workload) -> list[Drawn]:
    """The workload's requests in the order in which they begin.

    ``context``: tokens before the first row, of a request recorded without its prefill.
    """
    names = list(dict.fromkeys(work.request_of_row.tolist()))
    by_request = np.argsort(work.request_of_row, kind="stable")
    sorted_names = work.request_of_row[by_request]
    position, phase = work.position_of_row, work.phase_of_row
    found = []
    for name in names:
        lo, hi = np.searchsorted(sorted_names, (name, name + 1))
        rows = by_request[lo:hi]
        prefill = rows[phase[rows] == PREFILL]
        prefill = prefill[np.argsort(position[prefill], kind="stable")]
        decode = rows[phase[rows] != PREFILL]
        first = int(position[rows].min())
        found.append(Drawn(int(name), prefill.tolist(), decode.tolist(), first))
    return found


class Request:
    """A request being served.

    ``prompt``, ``decode``: rows that it takes of ``drawn``, from the front. ``done``: rows
    computed. ``kv_tokens``: its context when the last row is computed. Times are ns; ``arrival``,
    ``scheduled`` (admitted to the batch), ``first_token``, ``first_decode``, ``finish``: -1 until
    it is so.
    """

    __slots__ = (
        "arrival",
        "decode",
        "done",
        "drawn",
        "finish",
        "first_decode",
        "first_token",
        "index",
        "kv_tokens",
        "prompt",
        "scheduled",
    )

    def __init__(self, index: int, drawn: Drawn, prompt: int, decode: int) -> None:
        self.index = index
        self.drawn = drawn
        self.prompt = prompt
        self.decode = decode
        self.kv_tokens = drawn.context + prompt + decode
        self.done = 0
        self.arrival = self.scheduled = self.first_token = self.first_decode = self.finish = -1

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.prompt + self.decode

    def rows_of_trace(self, first: int, count: int) -> list[int]:
        """The trace's rows behind its own ``first`` to ``first + count``, of one phase."""
        if first < self.prompt:
            return self.drawn.prefill_rows[first : first + count]
        first -= self.prompt
        return self.drawn.decode_rows[first : first + count]


@dataclass(frozen=True)
class Draw:
    """Requests to serve, in order of arrival, and how their lengths came about."""

    requests: list[Request]
    lengths: dict[str, Any]
    reuse: dict[str, Any]


def draw(drawn: list[Drawn], arrivals: Coming, lengths: str) -> Draw:
    """Request i takes the trace's request i mod N. ``lengths``: of :mod:`sim.serving.config`.

    Raises UserError for an ``exact`` length that the drawn request does not have.
    """
    source = [drawn[index % len(drawn)] for index in range(arrivals.count)]
    prompts = np.array([len(each.prefill_rows) for each in source], np.int64)
    outputs = np.array([each.outputs for each in source], np.int64)
    facts: dict[str, Any] = {"mode": lengths, "prefill_in_trace": bool(prompts.any())}
    if lengths == SCALED:
        assert arrivals.recorded is not None
        prompts, outputs, scaling = _scaled(arrivals.recorded, arrivals.count, prompts, outputs)
        facts |= scaling
    elif lengths == EXACT:
        assert arrivals.recorded is not None
        prompts, outputs = _exact(arrivals.recorded, arrivals.count, prompts, outputs)
    facts["prompt_tokens_mean"] = float(prompts.mean())
    facts["output_tokens_mean"] = float(outputs.mean())
    requests = [
        Request(index, each, prompt, output - bool(each.prefill_rows))
        for index, (each, prompt, output) in enumerate(
            zip(source, prompts.tolist(), outputs.tolist(), strict=True)
        )
    ]
    return Draw(requests, facts, _reuse(drawn, arrivals.count))


def _scaled(
    recorded: Recorded, count: int, prompts: Ints, outputs: Ints
) -> tuple[Ints, Ints, dict[str, Any]]:
    """Lengths times one factor each, so that the longest is the trace's longest; at most 1."""
    facts: dict[str, Any] = {}
    found = []
    for name, asked, there in (
        ("prompt", recorded.prompts[:count], prompts),
        ("output", recorded.outputs[:count], outputs),
    ):
        longest = int(there.max())
        factor = min(1.0, longest / int(asked.max()))
        wanted = np.maximum(1, np.rint(asked * factor).astype(np.int64))
        cut = (wanted > there) & (there > 0)
        facts[f"{name}_factor"] = factor if longest else None
        facts[f"{name}_cut"] = int(cut.sum())
        facts[f"{name}_cut_tokens"] = int((wanted - there)[cut].sum())
        found.append(np.minimum(wanted, there))
    return found[0], found[1], facts


def _exact(recorded: Recorded, count: int, prompts: Ints, outputs: Ints) -> tuple[Ints, Ints]:
    """The arrivals' own lengths. A trace without prefills has the outputs alone."""
    found = []
    for name, asked, there in (
        ("prompt", recorded.prompts[:count], prompts),
        ("output", recorded.outputs[:count], outputs),
    ):
        beyond = np.flatnonzero((asked > there) & (there > 0))
        if len(beyond):
            first = int(beyond[0])
            raise UserError(
                f"{recorded.where(first)}: {asked[first]} {name} tokens, the trace's request drawn "
                f"for it has {there[first]} (so with {len(beyond)} of {count} requests): give "
                "--lengths scaled or --lengths trace, or a longer trace"
            )
        found.append(np.minimum(asked, there))
    return found[0], found[1]


def _reuse(drawn: list[Drawn], count: int) -> dict[str, Any]:
    """How often each of the trace's requests was taken."""
    whole, left = divmod(count, len(drawn))
    times = [whole + (index < left) for index in range(len(drawn))]
    return {
        "trace_requests": len(drawn),
        "served_requests": count,
        "reused": count > len(drawn),
        "most_times": max(times),
        "times": {str(each.name): used for each, used in zip(drawn, times, strict=True)},
    }
