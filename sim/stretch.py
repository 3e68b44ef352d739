"""A stretch of a simulated run as a timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from sim.inputs import Inputs
from sim.point import Point, Setting, make_core, produced_by, resolve_point
from sim.spans import ChunkSpan, Timeline, chrome_trace
from sim.traced import TracedMachine
from sim.watched import OUTCOMES, WatchedCore


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run, first and last of them in ``steps``.

    ``timeline`` holds what overlaps these steps; ``notes``: what a reader should know.
    """

    setting: Setting
    steps: tuple[int, int]
    timeline: Timeline
    notes: tuple[str, ...]
    digest: str

    @property
    def chunks(self) -> list[ChunkSpan]:
        """All that were on the wire in these steps, at least partly, by when they began."""
        return self.timeline.on_wire

    @property
    def duration_ns(self) -> int:
        """From the first step's begin to the last one's end."""
        first, last = self.steps
        return self.timeline.step_ends[last] - self.timeline.step_begins[first]

    def copies(self) -> dict[tuple[str, str], int]:
        """Experts that were on the wire, at least partly, by source and outcome."""
        seen = {(chunk.key, chunk.copy): chunk for chunk in self.chunks}
        return Counter((chunk.source, chunk.outcome) for chunk in seen.values())

    def chrome_trace(self) -> dict[str, Any]:
        """Trace events with what made them: JSON-ready."""
        setting, (first, last) = self.setting, self.steps
        shape, point = setting.shape, setting.point
        events = chrome_trace([self.timeline], shape.experts, first, last, shape.layers)
        told = {
            "point": point.model_dump(),
            "steps": f"{first} to {last}",
            "geometry": setting.geometry.name,
            "timing": setting.timing.provenance,
            "trace": self.digest,
            "outcomes": OUTCOMES,
            "produced_by": produced_by(),
        }
        return {**events, "otherData": told}


def simulate_stretch(inputs: Inputs, point: Point, steps: tuple[int, int]) -> Stretch:
    """Simulate a point, all of it, and keep what happened in steps ``steps[0]`` to ``steps[1]``.

    Raises UserError or PolicyError for what a user can mend.
    """
    setting = resolve_point(inputs, point)
    workload = setting.workload
    first, last = steps
    if last >= workload.num_steps:
        raise UserError(
            f"--steps {first}:{last}: the run has {workload.num_steps} steps, 0 to "
            f"{workload.num_steps - 1}; choose among these, or a longer trace or --max-tokens"
        )
    core = make_core(inputs, setting, kind=WatchedCore)
    machine = TracedMachine(workload, core, setting.timing, window=point.window, steps=steps)
    machine.run()
    timeline = machine.timeline(f"simulated: {point.label}")
    notes = (*inputs.notes, *core.policy.notes)
    return Stretch(setting, steps, timeline, notes, inputs.trace.digest)
