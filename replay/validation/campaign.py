"""A campaign on the machine at hand: calibrate, predict, measure what is still open."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from configs.errors import UserError
from configs.hardware import load_hardware
from configs.timings import ModelTimes
from replay.calibrate.cuda import CudaRig
from replay.calibrate.lane import cpu_times
from replay.calibrate.model import LEAST_KV_TOKENS
from replay.model import ReplayModel
from replay.open import DTYPE, command_line, weights_of
from replay.play import Session
from replay.point import predict_setting, replay_point
from replay.validation.files import RunFiles, read_campaign
from replay.validation.machine import model_times, on_usual_host, policy_times
from replay.validation.plan import Cell, ValidationPlan, calibration_points, cells_of
from replay.validation.run import Target, canary, digest, measure, predict
from sim.calibrated import CalibratedTiming
from sim.inputs import Inputs
from sim.point import Point, make_core, resolve_point
from sim.spans import chrome_trace
from tracer.trace import Trace
from tracer.workload import Workload

_CLOSING_S = 20.0  # canary, report and picture
_SETUP_S = 1.0  # of a point's run beside its steps, until it was measured
_SHOWN_FROM, _SHOWN = 20, 3  # steps of the timeline


class Clock:
    """Progress told to ``print_line``, with the seconds since it was made.

    ``budget_s``: by when a run has to end; None: any time.
    """

    def __init__(self, print_line: Callable[[str], None], budget_s: float | None) -> None:
        self._began = time.monotonic()
        self._print = print_line
        self._budget_s = budget_s

    def __call__(self, text: str) -> None:
        self._print(f"{self.passed_s:5.0f} s  {text}")

    @property
    def passed_s(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float | None:
        """For measuring."""
        if self._budget_s is None:
            return None
        return self._budget_s - self.passed_s - _CLOSING_S


class PlanInputs:
    """The plan's trace, and its requests by what they are for."""

    def __init__(self, plan: ValidationPlan, trace: Trace) -> None:
        learned = tuple(dict.fromkeys(name for choice in plan.policies for name in choice.learned))

        def of(requests: tuple[int, ...]) -> Inputs:
            return Inputs(trace, requests=requests, fit_requests=plan.fit_requests, learned=learned)

        self.judged = of(plan.requests)
        self.calibration = of(plan.calibration_requests)
        for inputs, requests in (
            (self.judged, plan.requests),
            (self.calibration, plan.calibration_requests),
        ):
            if all(step.prefill_tokens for step in inputs.workload("last-use").steps()):
                raise UserError(
                    f"requests {', '.join(map(str, requests))} have no decode step to time: "
                    "choose others"
                )
        self.geometry = plan.geometry or trace.manifest.geometry.name
        self._require_cores(plan)

    def _require_cores(self, plan: ValidationPlan) -> None:
        """UserError or PolicyError for what a policy lacks, or a budget: before any calibration."""
        for cell in cells_of(plan):
            make_core(self.judged, resolve_point(self.judged, cell.point))
        for point in calibration_points(plan):
            make_core(self.calibration, resolve_point(self.calibration, point))

    @property
    def workloads(self) -> list[Workload]:
        """Of both."""
        return [inputs.workload("last-use") for inputs in (self.judged, self.calibration)]


def run_campaign(
    out: Path,
    plan: ValidationPlan,
    cells: Sequence[Cell],
    inputs: PlanInputs,
    ready: ReplayModel,
    say: Clock,
) -> Target | None:
    """One run: as many of the open ``cells`` as the clock allows. Returns one for the timeline."""
    say(f"{len(cells)} points to measure; the model is loaded")
    longest = max([LEAST_KV_TOKENS, *(tokens + 1 for tokens in plan.prefill_tokens)])
    whole = Session.for_workloads(ready, *inputs.workloads, at_least=longest)
    with closing(whole) as session:
        return _run(out, plan, inputs, session, cells, say)


def _run(
    out: Path,
    plan: ValidationPlan,
    inputs: PlanInputs,
    session: Session,
    cells: Sequence[Cell],
    say: Clock,
) -> Target | None:
    ready = session.ready
    machine = str(CudaRig().facts())
    require_same_trace(out, plan, inputs.judged.trace.digest)
    times, setup_s = _calibrate(plan, inputs, session, machine, say)
    targets = predict(session, inputs.judged, times, cells)
    chosen = choose(targets, plan.repeats, setup_s, say.left_s)
    sha256 = digest(chosen)
    facts = {
        "machine": machine,
        "weights": weights_of(ready),
        "command": command_line(),
        "expert_bytes": ready.layout.nbytes,
        "resident_predicted_ms": predicted_resident_ms(plan, inputs, session, times),
        # In the order of the runs: decode, three a size of prefill, then the policies'.
        "calibration_loops_ns": [round(loop_ns) for loop_ns in session.host_loops_ns],
    }
    files = RunFiles(out)
    files.predicted(times, chosen, sha256, facts)
    say(f"{len(chosen)} points are predicted: SHA-256 {sha256}")
    before = canary(session, inputs.calibration, plan.hardware, plan.geometry)
    files.canaries(before, None)
    measure(session, inputs.judged, chosen, plan.repeats, files.measured, say)
    after = canary(session, inputs.calibration, plan.hardware, plan.geometry)
    files.canaries(before, after)
    return shown(chosen)


def _calibrate(
    plan: ValidationPlan, inputs: PlanInputs, session: Session, machine: str, say: Clock
) -> tuple[ModelTimes, float]:
    """The model's and the policies' times, and what a point's run takes beside its steps, s."""
    resident = Point(policy="resident", hardware=plan.hardware, geometry=plan.geometry)
    replay_point(session, inputs.calibration, resident)  # compiles, allocates, warms up
    hardware = load_hardware(plan.hardware)
    times = model_times(
        session,
        hardware,
        inputs.geometry,
        DTYPE,
        plan.prefill_tokens,
        machine,
        command_line(),
    )
    say("the model's times are measured")
    points = list(calibration_points(plan))
    own, setup = {}, _SETUP_S
    for label, policy, setup_s in policy_times(session, inputs.calibration, points):
        own[label] = policy
        setup = max(setup, setup_s)
    say("the policies' host times are measured")
    times = on_usual_host(times.model_copy(update={"policies": own}), session)
    if session.has_lane:
        lane = cpu_times(session, int(hardware.readback_ns))
        times = times.model_copy(update={"cpu": lane})
        say(f"the CPU's times are measured, on {lane.threads} threads")
    return times, setup


def require_same_trace(out: Path, plan: ValidationPlan, digest: str) -> None:
    """UserError where this campaign's runs so far judged another trace."""
    for each in read_campaign(out, plan):
        known = each.predicted["trace"]["digest"]
        if known != digest:
            raise UserError(
                f"{out}: run {each.run.number} judged the trace of digest {known:.12}, this is "
                f"{digest:.12}: give the same trace, or name another directory"
            )


def predicted_resident_ms(
    plan: ValidationPlan, inputs: PlanInputs, session: Session, times: ModelTimes
) -> float:
    """A decode step of the canary, simulated."""
    point = Point(policy="resident", hardware=plan.hardware, geometry=plan.geometry)
    nbytes = session.ready.layout.nbytes
    setting = resolve_point(inputs.calibration, point, expert_bytes=nbytes)
    timing = CalibratedTiming(setting.geometry, setting.hardware, times, batch=session.rows)
    found = predict_setting(inputs.calibration, setting, timing)
    return float(found.result["itl_ms"]["mean"])


def choose(
    targets: Sequence[Target], repeats: int, setup_s: float, left_s: float | None
) -> list[Target]:
    """Whole groups of a budget and a link, in an order drawn once, that can be measured in time.

    Raises UserError where not one fits.
    """
    if left_s is None:
        return list(targets)
    groups: dict[tuple[str, float], list[Target]] = {}
    for target in targets:
        groups.setdefault(_group(target.cell), []).append(target)
    order = sorted(groups)
    random.Random(0).shuffle(order)
    chosen: list[Target] = []
    for key in order:
        needed = repeats * sum(setup_s + each.measured_ms / 1e3 for each in groups[key])
        if needed > left_s:
            continue
        left_s -= needed
        chosen += groups[key]
    if not chosen:
        raise UserError(
            f"{left_s:.0f} s are left for measuring, too few for any budget and link with all its "
            "policies: give more --minutes, or fewer policies or requests"
        )
    return chosen


def _group(cell: Cell) -> tuple[str, float]:
    return str(cell.point.expert_budget), cell.link_scale


def shown(targets: Sequence[Target]) -> Target | None:
    """The point whose timelines are kept: the first whose decisions depend on time, if any do."""
    timed = [each for each in targets if each.timed is not None]
    return min(timed, key=lambda each: each.time_independent, default=None)


def timelines(target: Target, workload: Workload) -> dict[str, dict[str, object]]:
    """By file name, for Perfetto: a few decode steps, and the last prefill if there is any.

    Simulated and measured, of ``workload``, which is judged.
    """
    steps = len(target.simulated.step_begins)
    first = min(_SHOWN_FROM, steps - 1)
    last = min(first + _SHOWN - 1, steps - 1)
    found = {"timeline.json": _stretch(target, first, last)}
    prefills = [place for place, step in enumerate(workload.steps()) if step.prefill_tokens]
    if prefills:
        found["timeline-prefill.json"] = _stretch(target, prefills[-1], prefills[-1])
    return found


def _stretch(target: Target, first: int, last: int) -> dict[str, object]:
    assert target.timed is not None
    trace = chrome_trace([target.simulated, target.timed], target.experts, first, last)
    return {**trace, "otherData": {"point": target.cell.label, "steps": f"{first} to {last}"}}
