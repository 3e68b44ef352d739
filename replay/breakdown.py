"""Where the time went, from the host's ledger: of a measured run and of a simulated one alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from replay.cores import LOOP_NS
from sim.spans import COPY, DECIDE, EXPERTS, ISSUE, NAMES, SEGMENT, STEP, Mark, Timeline
from tracer.workload import Workload

if TYPE_CHECKING:
    # Reports are read where torch is not installed.
    from replay.play import ForcedStep, Measured

_STALLS = ("stall_late", "stall_miss", "stall_cpu")

Ints = npt.NDArray[np.int64]
HOST = (STEP, SEGMENT, DECIDE, ISSUE, EXPERTS)
"""Kinds of marks that end work, no wait."""
COMPONENTS = tuple(name.replace(" ", "_").lower() for name in NAMES)
"""What the host did, by the kinds of :mod:`sim.spans`."""


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
        """The marks of a measured run, each with its step."""
        return cls.read(measured.marks, measured.times.begin)

    @classmethod
    def read(cls, marks: Sequence[Mark], begins: Sequence[int]) -> Self:
        """``begins``: of the steps, ns."""
        end, kind, layer, count = np.array(marks, np.int64).reshape(-1, 4).T
        step = _step_of(end, begins)
        return cls(np.diff(end, prepend=end[:1]), end, kind, layer, count, step)

    def at_usual_speed(self, loop_ns: float) -> Self:
        """What the host did as on one whose loop (:mod:`replay.cores`) takes ``LOOP_NS``.

        ``loop_ns``: what it took in this run. Waits and instants stay as they were.
        """
        host = np.isin(self.kind, HOST)
        scaled = np.where(host, self.duration * (LOOP_NS / loop_ns), self.duration)
        return replace(self, duration=scaled.round().astype(np.int64))

    def first_waves(self) -> npt.NDArray[np.bool_]:
        """Which marks end a decision about an event's first wave, bool [marks].

        It follows a segment's launch and the wait for it.
        """
        found: npt.NDArray[np.bool_] = self.kind == DECIDE
        found[2:] &= self.kind[:-2] == SEGMENT
        return found

    def launched_as_landed(self) -> npt.NDArray[np.bool_]:
        """Which marks end a launch of what was waited for, bool [marks]."""
        found: npt.NDArray[np.bool_] = self.kind == EXPERTS
        found[1:] &= self.kind[:-1] == COPY
        found[:1] = False
        return found

    def within(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which marks belong to ``chosen`` steps, bool [steps]."""
        return _within(self.step, chosen)


def _step_of(ends: Ints, begins: Sequence[int]) -> Ints:
    """The step in which something ends, -1 before the first.

    What ends where a step begins is the last of what was before.
    """
    return np.searchsorted(np.array(begins), ends, side="left") - 1


def _within(step: Ints, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    belongs: npt.NDArray[np.bool_] = (step >= 0) & chosen[np.maximum(step, 0)]
    return belongs


def predictions_ns(measured: Measured, chosen: npt.NDArray[np.bool_]) -> Ints:
    """What each prediction took that became effective within a wait. ``chosen``: bool [steps]."""
    end, took = np.array(measured.predictions, np.int64).reshape(-1, 2).T
    counted: Ints = took[_within(_step_of(end, measured.times.begin), chosen)]
    return counted


def components(marks: Marks, chosen: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """Mean time of a step by what the host did, ms. ``chosen``: which steps, bool [steps]."""
    number = int(chosen.sum())
    if not number:
        return dict.fromkeys(COMPONENTS)
    counted = marks.within(chosen)
    return {
        name: float(marks.duration[counted & (marks.kind == kind)].sum()) / number / 1e6
        for kind, name in enumerate(COMPONENTS)
    }


def breakdown(measured: Measured, steps: Sequence[ForcedStep]) -> dict[str, float | None]:
    """Mean time of a decode step by what the host did, ms, and of it the device's idle waits."""
    decode = np.array([not step.prefill for step in steps])
    parts = components(Marks.of(measured), decode)
    if not decode.any():
        return {**parts, **dict.fromkeys(_STALLS)}
    times = measured.times
    stalls = {name: np.array(getattr(times, name), np.int64)[decode] for name in _STALLS}
    return {**parts, **{name: float(each.mean()) / 1e6 for name, each in stalls.items()}}


def particulars(timeline: Timeline, workload: Workload) -> dict[str, Any]:
    """What a prediction and a measurement are compared by beside the metrics of all runs.

    ``step_ms``: of every decode step. ``prefill_ms``: mean time of a prefill by its tokens.
    ``host_ms``: of a decode step, by what the host did; ``prefill_host_ms``: likewise of a prefill.
    ``link_ms``: of a decode step, time in which the link carried something, None where nobody
    decodes.
    """
    steps = list(workload.steps())
    decode = np.array([step.prefill_tokens == 0 for step in steps])
    begin, end = np.array(timeline.step_begins), np.array(timeline.step_ends)
    taken = (end - begin) / 1e6
    marks = Marks.read(timeline.marks, timeline.step_begins)
    prefills: dict[int, list[float]] = {}
    for step, ms in zip(steps, taken.tolist(), strict=True):
        if step.prefill_tokens:
            prefills.setdefault(step.prefill_tokens, []).append(ms)
    return {
        "step_ms": taken[decode].round(6).tolist(),
        "prefill_ms": {str(size): float(np.mean(prefills[size])) for size in sorted(prefills)},
        "host_ms": components(marks, decode),
        "prefill_host_ms": components(marks, ~decode),
        "link_ms": _link_ms(timeline, decode),
    }


def _link_ms(timeline: Timeline, decode: npt.NDArray[np.bool_]) -> float | None:
    """Chunks count where they end; those after the last step's begin belong to it."""
    if not decode.any():
        return None
    spans = np.array([(chunk.begin, chunk.end) for chunk in timeline.chunks], np.int64)
    spans = spans.reshape(-1, 2)
    counted = _within(_step_of(spans[:, 1], timeline.step_begins), decode)
    busy = (spans[:, 1] - spans[:, 0])[counted].sum()
    return float(busy) / int(decode.sum()) / 1e6
