"""Where the measured time went, from the host's ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from replay.play import ForcedStep, Measured
from sim.spans import NAMES

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Marks:
    """A run's ledger as arrays. ``step``: index of the step that a mark belongs to, -1 before."""

    duration: Ints
    end: Ints
    kind: Ints
    layer: Ints
    count: Ints
    step: Ints

    @classmethod
    def of(cls, measured: Measured) -> Self:
        """The marks of a run, each with its step."""
        end, kind, layer, count = np.array(measured.marks, np.int64).reshape(-1, 4).T
        # The mark that ends where a step begins is the last of what was before.
        step = np.searchsorted(np.array(measured.times.begin), end, side="left") - 1
        return cls(np.diff(end, prepend=end[:1]), end, kind, layer, count, step)


def breakdown(measured: Measured, steps: Sequence[ForcedStep]) -> dict[str, float | None]:
    """Mean time of a decode step by what the host did, ms, and of it the device's idle waits."""
    decode = np.array([not step.prefill for step in steps])
    names = [name.replace(" ", "_").lower() for name in NAMES]
    if not decode.any():
        return dict.fromkeys((*names, "stall_late", "stall_miss"))
    marks = Marks.of(measured)
    counted = (marks.step >= 0) & decode[np.maximum(marks.step, 0)]
    number = int(decode.sum())
    parts = {
        name: float(marks.duration[counted & (marks.kind == kind)].sum()) / number / 1e6
        for kind, name in enumerate(names)
    }
    times = measured.times
    late, miss = np.array(times.stall_late), np.array(times.stall_miss)
    return {
        **parts,
        "stall_late": float(late[decode].mean()) / 1e6,
        "stall_miss": float(miss[decode].mean()) / 1e6,
    }
