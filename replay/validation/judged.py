"""What is judged: a point, its prediction, its measurements, and the run that it was part of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.timings import ModelTimes
from replay.validation.plan import Cell

Figures = dict[str, Any]


@dataclass(frozen=True)
class Canary:
    """Is the machine still what it was calibrated as? ``resident_ms``: a decode step, all there."""

    resident_ms: float
    link_bytes_per_s: int


@dataclass(frozen=True)
class Run:
    """One stretch of a campaign on one machine, with the times that were measured on it.

    ``facts``: machine, weights, command, digest of the predictions. ``after``: None where the run
    was cut off. ``expert_bytes``: of one expert.
    """

    number: int
    facts: Figures
    times: ModelTimes
    before: Canary
    after: Canary | None
    expert_bytes: int


@dataclass
class Judged:
    """A cell: what was predicted, and each measurement of it.

    ``difference``: the first decision in which the device's run was another, None if there is none
    or the policy's decisions depend on time.
    """

    cell: Cell
    run: Run
    predicted: Figures
    time_independent: bool
    measured: list[Figures] = field(default_factory=list)
    difference: str | None = None


def digest_of(predictions: Sequence[tuple[str, Figures]]) -> str:
    """SHA-256 of predictions: cells' labels and figures."""
    return hashlib.sha256(json.dumps(predictions, sort_keys=True).encode()).hexdigest()
