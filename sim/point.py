"""One simulated point: its configuration, and the run of it."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

import policies
from configs.budget import bytes_at, low_bytes
from configs.errors import UserError
from configs.geometry import EXPERT_DTYPE_BITS, Geometry, load_geometry
from configs.hardware import Hardware, load_hardware
from configs.timings import ModelTimes, find_timings, load_timings
from configs.units import format_bytes, parse_rate
from policies.capacity import MemoryPlan
from policies.core import DecisionCore
from policies.errors import BudgetTooSmall
from policies.interface import Options, Policy, PolicyData, Recorded, Shape
from policies.registry import PolicyInfo
from policies.slots import plan_policy
from sim.budget import MemoryBudget, describe, resolve
from sim.calibrated import CalibratedTiming
from sim.inputs import Inputs, learned_among
from sim.machine import Machine
from sim.metrics import collect
from sim.tape import Tape, can_record, play, record
from sim.timing import RooflineTiming, Timing
from tracer.workload import Workload

DEFAULT_FIT_SHARE = 0.3
AnyInputs = TypeVar("AnyInputs", bound=Inputs)


class Point(BaseModel):
    """Everything that decides a point's result, beside the trace.

    ``budget``: GPU memory for the whole model, such as ``8GiB``; or ``expert_budget``: the slots
    alone, ``4000MiB``, ``25%`` or ``8/layer``. ``link``: another link rate (``25GB/s``).
    ``geometry``: a model of ``configs/models`` to time instead of the trace's own. ``timings``: a
    file of its measured times, in place of a shipped one. ``window``: chunks handed to the hardware
    at a time. ``fit_share``: share of the requests that fitted
    policies learn from (None: 0.3 for them, 0 for others). ``learned``: learned columns whose
    training requests are set aside instead, beside those that the policy itself reads. ``batch``:
    requests that run together (1: as recorded, see :mod:`sim.batches`). ``context``: KV tokens to
    reserve for a request (None: what the longest of the run has).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    params: dict[str, str | int | float | bool] = Field(default_factory=dict)
    hardware: str
    budget: str | None = None
    expert_budget: str | None = None
    link: str | None = None
    geometry: str | None = None
    dtype: str | None = None
    window: int = Field(default=2, ge=1, le=64)
    touch_order: str = "last-use"
    timings: str | None = None
    max_tokens: int | None = None
    fit_share: float | None = None
    learned: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, le=2**62)
    batch: int = Field(default=1, ge=1, le=2**16)
    context: int | None = Field(default=None, ge=1, le=2**30)

    @property
    def label(self) -> str:
        """Policy name with its given parameters, for tables and plots."""
        if not self.params:
            return self.policy
        given = " ".join(f"{name}={value}" for name, value in sorted(self.params.items()))
        return f"{self.policy} {given}"


def inputs_for(trace: Any, point: Point) -> Inputs:
    """Inputs of a single point: requests are set aside only if it learns from them."""
    return inputs_of(Inputs, trace, point)


def inputs_of(kind: type[AnyInputs], trace: Any, point: Point) -> AnyInputs:
    """:func:`inputs_for`, of a kind of Inputs."""
    info = policies.get(point.policy)
    params, options = info.parse(point.params)
    share = point.fit_share
    if share is None:
        share = DEFAULT_FIT_SHARE if info.learns(options) else 0.0
    learned = dict.fromkeys((*point.learned, *learned_among(info.all_columns(params))))
    return kind(
        trace,
        max_tokens=point.max_tokens,
        fit_share=share,
        learned=tuple(learned),
        batch=point.batch,
        context=point.context,
    )


#: What decisions of time-independent policies do not depend on.
_TIMING_FIELDS = ("hardware", "link", "window", "timings")


def decisions_of(point: Point) -> str:
    """Points with the same text here take the same decisions, if their policy asks no time."""
    return point.model_dump_json(exclude=set(_TIMING_FIELDS))


def can_share_decisions(point: Point) -> bool:
    """Whether the point's decisions depend on event contents only, whatever the machine."""
    info = policies.get(point.policy)
    return not (info.time_dependent or info.prefetches or info.reads_costs)


def run_point(inputs: Inputs, point: Point) -> dict[str, Any]:
    """Simulate one point; returns configuration, metrics and provenance, nested, JSON-ready.

    Raises UserError or PolicyError for what a user can mend.
    """
    return PointRunner(inputs).run(point)


@dataclass
class _Known:
    """Decisions that other points may share: those of points with equal ``decisions``."""

    decisions: str
    core: DecisionCore
    tape: Tape | None = None


class PointRunner:
    """Simulates points on the same inputs; decisions that do not depend on time are taken once.

    Only the last recorded decisions are kept: run points of equal :func:`decisions_of` in a row.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: _Known | None = None

    def run(self, point: Point) -> dict[str, Any]:
        """As :func:`run_point`."""
        inputs = self.inputs
        setting = resolve_point(inputs, point)
        known = self._known
        if known is None or known.decisions != decisions_of(point):
            known = _Known(decisions_of(point), make_core(inputs, setting))
        self._known = None  # should the run break off, nothing half done is left for the next
        measured = _measure(point, setting.workload, known, setting.timing)
        if known.tape is not None:
            self._known = known
        return described(inputs, setting, known.core, measured)


@dataclass(frozen=True)
class Setting:
    """A point made out: what its run needs, but for the decisions."""

    point: Point
    info: PolicyInfo
    params: dict[str, Any]
    options: Options
    geometry: Geometry
    hardware: Hardware
    workload: Workload
    memory: MemoryBudget
    shape: Shape
    timing: Timing


def resolve_point(
    inputs: Inputs,
    point: Point,
    *,
    expert_bytes: int | None = None,
    workload: Workload | None = None,
) -> Setting:
    """What a point's names stand for. ``expert_bytes``: of one expert as an engine lays it out.

    ``workload``: what is run, None: the inputs' own.
    Raises UserError or PolicyError for what a user can mend.
    """
    info = policies.get(point.policy)
    params, options = info.parse(point.params)
    inputs.refuse_trained(learned_among(info.all_columns(params)))
    geometry = timed_geometry(inputs, point)
    if expert_bytes is not None:
        sizes = (expert_bytes,) * geometry.num_moe_layers
        geometry = geometry.model_copy(update={"expert_bytes_by_layer": sizes})
    hardware = timed_hardware(point)
    if workload is None:
        workload = inputs.workload(point.touch_order)
    memory = resolve(geometry, workload, *_budgets(info, point))
    shape = Shape(
        layers=geometry.num_moe_layers,
        experts=geometry.num_experts,
        top_k=geometry.top_k,
        bytes_by_layer=geometry.expert_bytes_by_layer,
        low_bytes_by_layer=low_bytes(geometry, point.policy, info.low_dtype(params)),
    )
    return Setting(
        point=point,
        info=info,
        params=params,
        options=options,
        geometry=geometry,
        hardware=hardware,
        workload=workload,
        memory=memory,
        shape=shape,
        timing=timing_of(point, geometry, hardware, workload, expert_share(memory, geometry)),
    )


def expert_share(memory: MemoryBudget, geometry: Geometry) -> float:
    """Of all experts' bytes, what the slots may take; staging slots are among them."""
    return min(memory.expert_bytes / geometry.expert_bytes_total, 1.0)


def timing_of(
    point: Point,
    geometry: Geometry,
    hardware: Hardware,
    workload: Workload,
    share: float | None = None,
) -> Timing:
    """Measured times where there are any for this model on this machine, else estimated ones.

    ``share``: as :func:`expert_share`. A workload of batches beyond those that were measured is
    estimated, unless the point names its times: UserError then.
    """
    return batch_timing(point, geometry, hardware, workload.max_batch, share)


def batch_timing(
    point: Point, geometry: Geometry, hardware: Hardware, batch: int, share: float | None = None
) -> Timing:
    """:func:`timing_of` batches of so many requests."""
    times = _measured_times(point, geometry, hardware)
    if times is None:
        return RooflineTiming(geometry, hardware)
    if not times.cover(batch):
        if point.timings is None:
            return RooflineTiming(geometry, hardware)
        known = ", ".join(map(str, times.batches))
        raise UserError(
            f"--timings {point.timings}: measured with {known} requests at a time, this run has "
            f"up to {batch} together; leave --timings out, or calibrate with --batch-size {batch}"
        )
    link = None if point.link is None else int(hardware.link_bytes_per_s)
    return CalibratedTiming(
        geometry,
        hardware,
        times,
        policy=point.label,
        expert_share=share,
        link_bytes_per_s=link,
        batch=batch,
    )


def _measured_times(point: Point, geometry: Geometry, hardware: Hardware) -> ModelTimes | None:
    if point.timings is None:
        times = find_timings(point.hardware, geometry.name)
        fits = times is not None and times.expert_dtype == geometry.expert_dtype
        return times if fits else None
    times = load_timings(point.timings)
    ours = (hardware.name, geometry.name, geometry.expert_dtype)
    theirs = (times.hardware, times.geometry, times.expert_dtype)
    if ours != theirs:
        raise UserError(
            f"--timings {point.timings} is of {' '.join(theirs[1:])} on {theirs[0]}, this run of "
            f"{' '.join(ours[1:])} on {ours[0]}: name the file of this model and machine"
        )
    return times


def make_core(
    inputs: Inputs,
    setting: Setting,
    log: list[tuple[object, ...]] | None = None,
    kind: type[DecisionCore] | None = None,
) -> DecisionCore:
    """The point's decisions, before the first step. ``kind``: of core, None: the usual one."""
    point, info, shape = setting.point, setting.info, setting.shape
    data = _policy_data(info, setting.params, inputs, point, shape, setting.timing)
    policy = info.build(setting.params, data)
    fit = inputs.fit() if info.learns(setting.options) else None
    plan = _plan(shape, policy, setting.options, setting.memory, point, fit)
    made = DecisionCore if kind is None else kind
    return made(shape, plan, policy, setting.options, signals=data.signals, log=log)


def described(
    inputs: Inputs, setting: Setting, core: DecisionCore, measured: dict[str, Any]
) -> dict[str, Any]:
    """A run's metrics with what it ran on, nested, JSON-ready."""
    point = setting.point
    return {
        **_configuration(
            point, setting.params, setting.geometry, setting.hardware, setting.memory, core.plan
        ),
        **measured,
        "chosen": core.policy.cache.facts(),
        "notes": [*inputs.notes, *core.policy.notes],
        "trace": _trace_facts(inputs),
        "timing": setting.timing.provenance,
        "produced_by": produced_by(),
    }


def _measure(point: Point, workload: Workload, known: _Known, timing: Timing) -> dict[str, Any]:
    if can_share_decisions(point) and can_record(known.core):
        if known.tape is None:
            known.tape = record(workload, known.core)
        played = play(known.tape, workload, timing, window=point.window)
        return collect(workload, played.times, known.tape.tally, played.link_busy_ns)
    # A burst decides ahead of the clock: no place for a policy that asks for the time.
    bursts = not policies.get(point.policy).time_dependent
    machine = Machine(workload, known.core, timing, window=point.window, bursts=bursts)
    machine.run()
    return collect(workload, machine.times, machine.core.tally, machine.link.busy_ns)


def _budgets(info: PolicyInfo, point: Point) -> tuple[str | None, str | None]:
    if info.needs_all:
        if point.budget is not None or point.expert_budget is not None:
            raise UserError(f"{point.policy} holds all experts: leave the budget out")
        return None, None
    if point.budget is None and point.expert_budget is None:
        raise UserError(
            f"{point.policy} needs a budget: give --budget 8GiB (the whole model) or "
            "--expert-budget 25% (the expert slots)"
        )
    return point.budget, point.expert_budget


def timed_geometry(inputs: Inputs, point: Point) -> Geometry:
    """The geometry whose time is modelled; it must have the trace's MoE layers x E x k."""
    own = inputs.manifest.geometry
    if point.geometry is None:
        return own if point.dtype is None else _at_dtype(own, point.dtype)
    chosen = load_geometry(point.geometry, point.dtype)
    ours = (chosen.num_moe_layers, chosen.num_experts, chosen.top_k)
    theirs = (own.num_moe_layers, own.num_experts, own.top_k)
    if ours != theirs:
        raise UserError(
            f"geometry {chosen.name} has {_sizes(ours)}, the trace of {own.name} {_sizes(theirs)}: "
            "a trace can only drive a model of its own layers x experts x top-k"
        )
    return chosen


def _sizes(sizes: tuple[int, int, int]) -> str:
    return f"{sizes[0]} layers x {sizes[1]} experts, top-{sizes[2]}"


def _at_dtype(geometry: Geometry, dtype: str) -> Geometry:
    if dtype not in EXPERT_DTYPE_BITS:
        known = ", ".join(EXPERT_DTYPE_BITS)
        raise UserError(f"expert dtype '{dtype}' is unknown: choose one of {known}")
    if len(set(geometry.expert_bytes_by_layer)) > 1:
        raise UserError(
            f"--dtype {dtype}: the experts of {geometry.name} differ in size by layer, as its file "
            "gave them; leave --dtype out"
        )
    sizes = (bytes_at(geometry, dtype),) * geometry.num_moe_layers
    return geometry.model_copy(update={"expert_dtype": dtype, "expert_bytes_by_layer": sizes})


def timed_hardware(point: Point) -> Hardware:
    """The hardware profile, with the point's link if it names one."""
    hardware = load_hardware(point.hardware)
    return hardware if point.link is None else linked(hardware, point.link)


def linked(hardware: Hardware, link: str) -> Hardware:
    """The same machine over another link (``25GB/s``; a bare number is in GB/s)."""
    where = f"--link {link} (in a sweep: links)"
    try:
        rate = parse_rate(link)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    low, high = _link_bounds()
    if not low <= rate <= high:
        raise UserError(
            f"{where} is {rate / 1e9:g} GB/s: a link has {low / 1e9:g} to {high / 1e9:g} GB/s"
        )
    return hardware.with_link(rate)


@functools.cache
def _link_bounds() -> tuple[float, float]:
    bounds = Hardware.model_json_schema()["properties"]["link_bytes_per_s"]
    return bounds["minimum"], bounds["maximum"]


def _policy_data(
    info: PolicyInfo,
    params: dict[str, Any],
    inputs: Inputs,
    point: Point,
    shape: Shape,
    timing: Timing,
) -> PolicyData:
    """What this policy may know, by what it declares: the future only if it is an oracle."""
    touch = point.touch_order
    future: dict[str, Any] = {}
    if info.oracle:
        following, first = inputs.future(touch)
        events = inputs.workload(touch).events
        future = {"events": events, "next_use": following, "first_use": first}
    return PolicyData(
        shape,
        lookahead=lambda name, width: inputs.lookahead(name, width, touch),
        columns=frozenset(inputs.trace.columns()),
        popularity=inputs.popularity() if info.fitted else None,
        fit=inputs.fit() if info.fitted else None,
        recording=inputs.recording(touch) if info.in_blocks else None,
        signals=inputs.signals(touch) if info.asks_signals(params) else None,
        costs=timing if info.reads_costs else None,
        expert_norms=inputs.manifest.expert_norms,
        seed=point.seed,
        **future,
    )


def _plan(
    shape: Shape,
    policy: Policy,
    options: Options,
    memory: MemoryBudget,
    point: Point,
    fit: Recorded | None,
) -> MemoryPlan:
    try:
        return plan_policy(shape, policy, options, memory.expert_bytes, fit)
    except BudgetTooSmall as error:
        if point.budget is None:
            raise
        smallest = memory.fixed_bytes + error.smallest_bytes
        raise UserError(
            f"budget {point.budget} is too small: the smallest that can run is {smallest} bytes "
            f"({describe(memory)}, {format_bytes(error.smallest_bytes)} of experts: {error.why})"
        ) from None


def _configuration(
    point: Point,
    params: dict[str, Any],
    geometry: Geometry,
    hardware: Hardware,
    memory: MemoryBudget,
    plan: MemoryPlan,
) -> dict[str, Any]:
    slots = None if plan.by_bytes else sum(plan.capacity) + plan.staging_slots
    return {
        "policy": point.policy,
        "label": point.label,
        "params": params,
        "point": point.model_dump(),
        "hardware": hardware.name,
        "hardware_calibrated": hardware.calibrated,
        "link_bytes_per_s": int(hardware.link_bytes_per_s),
        "geometry": geometry.name,
        "expert_dtype": geometry.expert_dtype,
        "budget_bytes": memory.total_bytes,
        "expert_budget_bytes": memory.expert_bytes,
        "memory": {
            "nonexpert_bytes": memory.nonexpert_bytes,
            "kv_bytes": memory.kv_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "slots_bytes": plan.used_bytes,
            "slots": slots,
            "slots_by_layer": list(plan.capacity) if _is_uneven(plan) else None,
            "staging_slots": plan.staging_slots,
            "peak_bytes": memory.fixed_bytes + plan.used_bytes,
            "expert_bytes_total": geometry.expert_bytes_total,
            "gpu_memory_bytes": hardware.gpu_memory_bytes,
            "fits": memory.fixed_bytes + plan.used_bytes <= hardware.gpu_memory_bytes,
        },
    }


def _is_uneven(plan: MemoryPlan) -> bool:
    return not plan.by_bytes and len(set(plan.capacity)) > 1


def _trace_facts(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": inputs.manifest.model_id,
        "digest": inputs.trace.digest,
        "judged_requests": len(inputs.judged),
        "fitted_requests": len(inputs.fitted_on),
        "set_aside_for": inputs.set_aside_for,
    }


@functools.cache
def produced_by() -> dict[str, str | None]:
    """Version and, in a git checkout, commit of this program."""
    try:
        release: str | None = version("moesim")
    except PackageNotFoundError:
        release = None
    return {"moesim": release, "git": _git_commit()}


def _git_commit() -> str | None:
    """Commit of the checkout that this file lies in; None where it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
