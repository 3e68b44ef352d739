"""Several requests in a step: who sits where in the model's batch, and what it is fed.

As the recorder runs them: prompts are padded to the left, decode steps have one column, and the
padding is masked and left out of positions. A request that has ended leaves its line idle: the
model goes on computing it, but none of its experts, and the decision core does not see it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UserError
from tracer.workload import DECODE, PREFILL, Workload

Ints = npt.NDArray[Any]

RECORD_SO = "record with `moesim trace --batch-size`"


def seats_of(workload: Workload) -> list[Ints]:
    """Of every step the line of the batch that each row belongs to, int [rows].

    Raises UserError unless requests that share a step begin together, with their whole prompts or
    all of them without.
    """
    bounds = np.append(workload.row_of_step, workload.num_tokens).tolist()
    requests = workload.request_of_row.tolist()
    batch: dict[int, int] = {}
    seats = []
    for step, (low, high) in zip(workload.steps(), pairwise(bounds), strict=True):
        first = bool(step.begins)
        if first:
            batch = {request: seat for seat, request in enumerate(step.requests)}
        _check(workload, step.index, slice(low, high), first, batch, step.begins)
        seats.append(np.array([batch[request] for request in requests[low:high]], np.int64))
    return seats


def _check(
    workload: Workload,
    step: int,
    rows: slice,
    first: bool,
    batch: dict[int, int],
    begins: tuple[int, ...],
) -> None:
    requests, phases = workload.request_of_row[rows], workload.phase_of_row[rows]
    if first and len(begins) < len(batch):
        raise UserError(
            f"step {step}: request {begins[0]} joins others that run already; replay runs batches "
            f"whose requests begin together: {RECORD_SO}"
        )
    strangers = set(requests.tolist()) - batch.keys()
    if strangers:
        raise UserError(
            f"step {step}: request {min(strangers)} goes on after another batch began; {RECORD_SO}"
        )
    if len(batch) == 1:
        return
    if len(set(phases.tolist())) > 1 or (not first and phases[0] == PREFILL):
        raise UserError(
            f"step {step}: prompts of a batch run in pieces or beside decoding; replay runs them "
            f"whole and together: {RECORD_SO}"
        )
    if phases[0] == DECODE and len(np.unique(requests)) < len(requests):
        raise UserError(f"step {step}: a request has several rows in a decode step")


def columns_of(workload: Workload) -> int:
    """Columns of KV cache that the longest batch fills: its padded prompts, and a column a step."""
    bounds = np.append(workload.row_of_step, workload.num_tokens).tolist()
    return most_filled(
        (bool(step.begins), workload.request_of_row[low:high])
        for step, (low, high) in zip(workload.steps(), pairwise(bounds), strict=True)
    )


def most_filled(steps: Iterable[tuple[bool, Ints]]) -> int:
    """Columns that steps fill: of each whether requests begin, and whose each row is, [rows]."""
    longest = filled = 0
    for begins, owners in steps:
        width = int(np.unique(owners, return_counts=True)[1].max())
        filled = width if begins else filled + width
        longest = max(longest, filled)
    return longest


def laid_out(token_ids: Ints, seats: Ints, rows: int) -> tuple[Ints, Ints]:
    """Tokens padded to the left, int64 [rows, width], and where each of them lies in it, [n]."""
    counts = np.bincount(seats, minlength=rows)
    width = int(counts.max())
    by_seat = np.argsort(seats, kind="stable")
    starts = np.cumsum(counts) - counts
    ordered = seats[by_seat]
    within = np.arange(len(seats)) - starts[ordered] + width - counts[ordered]
    places = np.empty(len(seats), np.int64)
    places[by_seat] = ordered * width + within
    padded = np.zeros(rows * width, np.int64)
    padded[places] = token_ids
    return padded.reshape(rows, width), places


@dataclass(frozen=True)
class Fed:
    """A forward pass's inputs; ``places`` int64 [n]: its tokens that are not padding, None: all."""

    inputs: dict[str, torch.Tensor]
    places: Ints | None = None


class BatchInputs:
    """What a model of ``rows`` lines is fed, step by step.

    ``mask``: bool [rows, kv_capacity], False where a line is padded; it keeps its address.
    """

    def __init__(self, rows: int, kv_capacity: int, device: torch.device) -> None:
        self.rows = rows
        self.mask = torch.ones((rows, kv_capacity), dtype=torch.bool, device=device)
        self._pads = np.zeros(rows, np.int64)
        self._column = 0

    def begin(self, seats: Ints, prefill: bool) -> None:
        """A batch begins with a step of these ``seats``."""
        counts = np.bincount(seats, minlength=self.rows) if prefill else np.zeros(self.rows)
        # Idle lines have no padding: attention over nothing at all is nobody's business.
        self._pads = np.where(counts > 0, counts.max() - counts, 0).astype(np.int64)
        self._column = 0
        seen = np.arange(self.mask.shape[1]) >= self._pads[:, None]
        self.mask.copy_(torch.from_numpy(seen))

    def positions(self, width: int = 1) -> torch.Tensor:
        """Of the next ``width`` columns, int64 [rows, width] on the host; padding has 0."""
        columns = np.arange(self._column, self._column + width)
        return torch.from_numpy((columns - self._pads[:, None]).clip(min=0))

    def passed(self, width: int = 1) -> None:
        """The model has run ``width`` columns."""
        self._column += width

    def feed(self, token_ids: Ints, seats: Ints) -> Fed:
        """Inputs of the next pass."""
        tokens, places = laid_out(token_ids, seats, self.rows)
        width = tokens.shape[1]
        device = self.mask.device
        inputs = {
            "input_ids": torch.from_numpy(tokens).to(device),
            "attention_mask": self.mask,
            "position_ids": self.positions(width).to(device),
        }
        self.passed(width)
        return Fed(inputs, places)
