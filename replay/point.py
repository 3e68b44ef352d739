"""One point on the device: the simulator's decisions, real copies, real kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from policies.core import DecisionCore
from replay.breakdown import breakdown, particulars
from replay.play import ForcedStep, Measured, Replay, Session
from sim.inputs import Inputs
from sim.metrics import collect
from sim.point import Point, Setting, described, make_core, resolve_point
from sim.spans import Timeline
from sim.timing import Timing
from sim.traced import TracedMachine
from tracer.workload import Workload

Log = list[tuple[object, ...]]


@dataclass
class Replayed:
    """A measured run. ``result``: as :func:`sim.point.run_point` gives it, of what was measured."""

    setting: Setting
    core: DecisionCore
    measured: Measured
    result: dict[str, Any]

    @property
    def log(self) -> Log:
        """Decisions without landings, whose order is time's."""
        return decisions(self.core)


def decisions(core: DecisionCore) -> Log:
    """A core's log without landings, whose order is time's."""
    return [entry for entry in core.log or () if entry[0] != "landed"]


def forced_steps(inputs: Inputs, workload: Workload, vocabulary: int) -> list[ForcedStep]:
    """The judged requests' steps, one request at a time.

    ``vocabulary``: token ids beyond it, of a tokenizer with more words, are folded into it. Raises
    UserError for a trace of batches, and for layers that did not run.
    """
    if workload.max_batch > 1:
        raise UserError(
            f"the trace has up to {workload.max_batch} requests in a step: replay runs one at a "
            "time; record with --batch-size 1"
        )
    if (workload.experts < 0).any():
        raise UserError("the trace has tokens that skipped a layer: replay needs all layers' ids")
    inputs.ensure("token_id")
    tokens = np.maximum(workload.column("token_id").astype(np.int64), 0) % vocabulary
    experts = workload.experts.astype(np.int64)
    bounds = np.append(workload.row_of_step, workload.num_tokens).tolist()
    return [
        ForcedStep(
            step.index,
            step.prefill_tokens > 0,
            step.begins,
            step.ends,
            tokens[bounds[step.index] : bounds[step.index + 1]],
            experts[bounds[step.index] : bounds[step.index + 1]],
        )
        for step in workload.steps()
    ]


def replay_point(
    session: Session, inputs: Inputs, point: Point, *, link_scale: float = 1.0
) -> Replayed:
    """Run a point on the session's device. ``link_scale``: emulate a link so many times slower.

    Raises UserError or PolicyError for what a user can mend.
    """
    setting = resolve_point(inputs, point, expert_bytes=session.ready.layout.nbytes)
    if not setting.info.lossless:
        raise UserError(
            f"{point.policy} changes the routing: the replay engine runs lossless policies only; "
            "moesim quality shows what it does to a model"
        )
    core = make_core(inputs, setting, log=[])
    steps = forced_steps(inputs, setting.workload, session.vocabulary)
    _require_same_shape(session, setting)
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    replay = Replay(session, core, window=point.window, link_scale=link_scale)
    measured = replay.run(steps)
    result = described(inputs, setting, core, _metrics(setting, core, measured))
    result["timing"] = "measured"
    result["link_scale"] = link_scale
    result["breakdown_ms"] = breakdown(measured, steps)
    result["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    result["copied_bytes_measured"] = measured.copied_bytes
    result["cpu_threads"] = session.lane().threads if core.uses_cpu else None
    return Replayed(setting, core, measured, result)


def _require_same_shape(session: Session, setting: Setting) -> None:
    """UserError unless the model has the trace's layers, experts and top-k."""
    ready, shape = session.ready, setting.shape
    model = len(ready.modules), ready.num_experts, ready.top_k
    trace = shape.layers, shape.experts, shape.top_k
    if model != trace:
        sizes = "{} MoE layers x {} experts, top-{}"
        raise UserError(
            f"the model has {sizes.format(*model)}, the trace {sizes.format(*trace)}: replay a "
            "trace that was recorded from this model, or one of its shape"
        )


def _metrics(setting: Setting, core: DecisionCore, measured: Measured) -> dict[str, Any]:
    times = measured.times
    # What the device did in between is told by the ledger.
    nothing = [0] * len(times.end)
    times.segments, times.experts = nothing, nothing
    metrics = collect(setting.workload, times, core.tally, 0)
    del metrics["link_busy_share"]
    return metrics


def timeline_of(run: Replayed, name: str) -> Timeline:
    """What the host and the link did; the device's kernels were not timed."""
    measured = run.measured
    times = measured.times
    return Timeline(name, measured.marks, measured.chunks_on_link, (), times.begin, times.end)


@dataclass
class Predicted:
    """A simulated run; the core has its log. ``result``: as :func:`sim.point.run_point` has it."""

    core: DecisionCore
    result: dict[str, Any]
    timeline: Timeline


def predict_point(inputs: Inputs, point: Point, timing: Timing, *, expert_bytes: int) -> Predicted:
    """The same point simulated with ``timing``."""
    setting = resolve_point(inputs, point, expert_bytes=expert_bytes)
    core = make_core(inputs, setting, log=[])
    machine = TracedMachine(setting.workload, core, timing, window=point.window)
    machine.run()
    metrics = collect(setting.workload, machine.times, core.tally, machine.link.busy_ns)
    result = described(inputs, setting, core, metrics)
    result["timing"] = timing.provenance
    timeline = machine.timeline("simulated")
    return Predicted(core, {**result, **particulars(timeline, setting.workload)}, timeline)
