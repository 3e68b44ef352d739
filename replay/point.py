"""One point on the device: the simulator's decisions, real copies, real kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from policies.core import DecisionCore
from policies.registry import PolicyInfo
from replay.batches import seats_of
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
TRACE, MODEL = "trace", "model"
ROUTINGS = (TRACE, MODEL)


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


def forced_steps(
    inputs: Inputs, workload: Workload, vocabulary: int, routing: str = TRACE
) -> list[ForcedStep]:
    """The judged requests' steps, batch by batch.

    ``vocabulary``: token ids beyond it, of a tokenizer with more words, are folded into it.
    ``routing``: whose experts run, of ROUTINGS; the text is the trace's either way. Raises
    UserError for batches whose requests do not begin together, and for layers that did not run.
    """
    if (workload.experts < 0).any():
        raise UserError("the trace has tokens that skipped a layer: replay needs all layers' ids")
    seats = seats_of(workload)
    inputs.ensure("token_id")
    tokens = np.maximum(workload.column("token_id").astype(np.int64), 0) % vocabulary
    experts = workload.experts.astype(np.int64)
    bounds = np.append(workload.row_of_step, workload.num_tokens).tolist()
    rows = [slice(low, high) for low, high in pairwise(bounds)]
    return [
        ForcedStep(
            step.index,
            step.prefill_tokens > 0,
            step.begins,
            step.ends,
            tokens[rows[step.index]],
            None if routing == MODEL else experts[rows[step.index]],
            seats[step.index],
        )
        for step in workload.steps()
    ]


def refuse_recorded(info: PolicyInfo, params: dict[str, Any]) -> None:
    """Raise UserError for a policy that goes by the trace's routing while the model's own runs."""
    columns = info.all_columns(params)
    parts = info.parts(params)
    if any(part.oracle for part in parts):
        reason = "knows the trace's future"
    elif columns:
        reason = f"reads the trace's {', '.join(columns)}"
    elif any(part.reads_signals or part.in_blocks for part in parts):
        reason = "reads what the trace recorded of each gate"
    else:
        return
    raise UserError(
        f"{info.name} {reason}, which is not this run's where the model routes by itself: leave "
        "--routing model out, or choose a policy that goes by the experts alone"
    )


def replay_point(
    session: Session,
    inputs: Inputs,
    point: Point,
    *,
    link_scale: float = 1.0,
    routing: str = TRACE,
    sample_host: bool = False,
) -> Replayed:
    """Run a point on the session's device. ``link_scale``: emulate a link so many times slower.

    ``sample_host``: as :meth:`replay.play.Replay.run`.

    ``routing`` "model": the experts that the model chooses itself run, on the trace's text; the
    result tells by how much they are the trace's. Raises UserError or PolicyError for what a user
    can mend.
    """
    setting = resolve_point(inputs, point, expert_bytes=session.ready.layout.nbytes)
    if not setting.info.lossless:
        raise UserError(
            f"{point.policy} changes the routing: the replay engine runs lossless policies only; "
            "moesim quality shows what it does to a model"
        )
    if routing == MODEL:
        refuse_recorded(setting.info, setting.params)
    core = make_core(inputs, setting, log=[])
    workload = setting.workload
    steps = forced_steps(inputs, workload, session.vocabulary, routing)
    _require_same_shape(session, setting)
    if workload.max_batch > session.rows:
        raise UserError(
            f"the trace has {workload.max_batch} requests in a step, the session {session.rows}: "
            "make it with Session.for_workloads"
        )
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    replay = Replay(session, core, window=point.window, link_scale=link_scale)
    measured = replay.run(steps, keep_routing=routing == MODEL, sample_host=sample_host)
    result = described(inputs, setting, core, _metrics(setting, core, measured))
    result["timing"] = "measured"
    result["routing"] = routing
    result["routing_agreement"] = agreement(workload, measured) if routing == MODEL else None
    result["batch"] = session.rows
    result["link_scale"] = link_scale
    result["host_loop_ns"] = measured.host_loop_ns
    result["breakdown_ms"] = breakdown(measured, steps)
    # A link that is that slow would not need it.
    emulation = replay.eager.copies.scratch_bytes
    result["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - emulation if cuda else None
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


def agreement(workload: Workload, measured: Measured) -> float:
    """Share of the trace's expert ids that were executed, whatever their rank."""
    layers = workload.num_layers
    executed = [
        np.stack(measured.routing[at : at + layers], 1)
        for at in range(0, len(measured.routing), layers)
    ]
    ours, theirs = np.concatenate(executed), workload.experts
    same = (theirs[..., :, None] == ours[..., None, :]).any(-1)
    return float(same.mean())


def _metrics(setting: Setting, core: DecisionCore, measured: Measured) -> dict[str, Any]:
    times = measured.times
    # What the device did in between is told by the ledger.
    nothing = [0] * len(times.end)
    times.segments, times.experts = nothing, nothing
    metrics = collect(setting.workload, times, core.tally, 0, measured.apart_ns)
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
    return predict_setting(inputs, resolve_point(inputs, point, expert_bytes=expert_bytes), timing)


def predict_setting(inputs: Inputs, setting: Setting, timing: Timing) -> Predicted:
    """Likewise, of a point that is resolved."""
    core = make_core(inputs, setting, log=[])
    machine = TracedMachine(setting.workload, core, timing, window=setting.point.window)
    machine.run()
    metrics = collect(setting.workload, machine.times, core.tally, machine.link.busy_ns)
    result = described(inputs, setting, core, metrics)
    result["timing"] = timing.provenance
    timeline = machine.timeline("simulated")
    return Predicted(core, {**result, **particulars(timeline, setting.workload)}, timeline)
