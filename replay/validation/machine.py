"""Times of the machine at hand, measured before anything is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.hardware import Hardware
from configs.timings import LinkTimes, ModelTimes, PolicyTimes
from policies.interface import Prediction
from replay.breakdown import Marks, predictions_ns
from replay.calibrate.model import ModelRig
from replay.calibrate.stats import steady_mean_ns
from replay.cores import LOOP_NS
from replay.play import Session
from replay.point import Replayed, replay_point
from replay.predictors import LEARNED, NEXT_GATE
from sim.inputs import Inputs
from sim.point import Point, expert_share
from sim.spans import DECIDE, EXPERTS, ISSUE, SEGMENT, STEP

_REPEATS = 30


def model_times(
    session: Session,
    hardware: Hardware,
    geometry: str,
    expert_dtype: str,
    prefill_tokens: Sequence[int],
    machine: str,
    source: str,
) -> ModelTimes:
    """Segments, experts, host, link, predictors and memory of a session's model, with its batch.

    ``prefill_tokens``: of the whole batch; sizes of a token a request or less are left out. Host
    times are those of a host whose loop takes ``LOOP_NS``: see :func:`on_usual_host`.
    """
    rig = ModelRig(session, int(hardware.readback_ns))
    segment_slowdown, beside_ns = rig.beside_copies
    sizes = sorted(tokens for tokens in set(prefill_tokens) if tokens > session.rows)
    passes = (rig.decode, *(rig.prefill(tokens) for tokens in sizes))
    predictors = predictor_times(session)
    return ModelTimes(
        hardware=hardware.name,
        geometry=geometry,
        expert_dtype=expert_dtype,
        machine=machine,
        source=source,
        passes=passes,
        link=rig.link,
        segment_slowdown=segment_slowdown,
        experts_beside_ns=beside_ns[1],
        predictor_ns=predictors,
        # Last: what a session keeps for all its runs is there now.
        workspace_bytes=rig.workspace_bytes(max(sizes, default=None)),
    )


def on_usual_host(times: ModelTimes, session: Session) -> ModelTimes:
    """Host times as on the host of the session's median calibration run."""
    loop_ns = float(np.median(session.host_loops_ns))
    return times.on_host(loop_ns / LOOP_NS, round(loop_ns))


def predictor_times(session: Session) -> dict[str, int]:
    """From a predictor's start to the host knowing that it has ended, ns.

    A map search is the policy's own work on the host: it is in the policy's decision time.
    """
    predictors = session.predictors()
    found = {"map_search": 0}
    for source in (NEXT_GATE, LEARNED):
        times = []
        for repeat in range(_REPEATS):
            layer = repeat % len(session.ready.modules)
            ready = predictors.start(Prediction(source, 0, layer, []), layer)
            began = perf_counter_ns()
            while not ready():
                pass
            times.append(perf_counter_ns() - began)
        found[source] = round(float(np.median(times)))
    return found


def policy_times(
    session: Session, inputs: Inputs, points: Sequence[Point]
) -> Iterator[tuple[str, tuple[PolicyTimes, ...], float]]:
    """Host time of each policy's decisions by share of the experts, from a run of each point.

    On requests that are not judged. With it, what a run took beside its steps, s. Points run in
    their order: policies and budgets should alternate, so that a while in which the host is slow is
    nobody's alone.
    """
    found: dict[str, list[tuple[PolicyTimes, float]]] = {}
    for point in points:
        found.setdefault(point.label, []).append(_policy_run(session, inputs, point))
    for label, runs in found.items():
        yield label, _by_share([times for times, _ in runs]), max(setup for _, setup in runs)


def _policy_run(session: Session, inputs: Inputs, point: Point) -> tuple[PolicyTimes, float]:
    began, started = perf_counter(), session.lane_start_s
    run = replay_point(session, inputs, point, sample_host=True)
    session.host_loops_ns.append(run.measured.host_loop_ns)
    times = host_times(run)
    # The process for the CPU's experts starts once, for all points that need it.
    steps_s = run.result["duration_ms"] / 1e3 + session.lane_start_s - started
    return times, perf_counter() - began - steps_s


def _by_share(runs: Sequence[PolicyTimes]) -> tuple[PolicyTimes, ...]:
    """Going up; budgets that come to the same share count as one, its times their mean."""
    shares = sorted({each.expert_share or 0.0 for each in runs})
    return tuple(
        _mean_times([each for each in runs if each.expert_share == share]) for share in shares
    )


def _mean_times(runs: Sequence[PolicyTimes]) -> PolicyTimes:
    def mean(name: str) -> Any:
        known = [getattr(each, name) for each in runs if getattr(each, name) is not None]
        return _mean_ns(np.array(known))

    names = PolicyTimes.model_fields.keys() - {"expert_share"}
    return PolicyTimes(expert_share=runs[0].expert_share, **{name: mean(name) for name in names})


def host_times(run: Replayed) -> PolicyTimes:
    """Lines through decision times by experts awaited, and the means of everything else.

    Of prefills, where the run has any, the means. On a host of the usual speed
    (:meth:`replay.breakdown.Marks.at_usual_speed`).
    """
    marks = Marks.of(run.measured).at_usual_speed(run.measured.host_loop_ns)
    phases = np.array([step.prefill_tokens == 0 for step in run.setting.workload.steps()])
    decode = marks.within(phases)
    decided, first = decode & (marks.kind == DECIDE), marks.first_waves()
    handed = decode & (marks.kind == ISSUE) & (marks.count > 0)
    idle = decode & (marks.kind == ISSUE) & (marks.count == 0)
    # Means: what is rare and long costs as much as it takes.
    later = decided & ~first
    slope, levels = _lines(
        [(marks.count[each], marks.duration[each]) for each in (decided & first, later)]
    )
    refill = float(marks.duration[idle].mean()) if idle.any() else 0.0
    issue = float((marks.duration[handed] / marks.count[handed]).mean()) if handed.any() else 0.0
    steps = decode & (marks.kind == STEP)
    launches = decode & (marks.kind == EXPERTS)
    landed = launches & marks.launched_as_landed()
    if run.setting.workload.max_batch > 1 and landed.any():
        launches = landed  # what a batch launches first costs its experts more: launch_each_ns
    return PolicyTimes(
        expert_share=expert_share(run.setting.memory, run.setting.geometry),
        decision_ns=round(levels[0] + refill),
        awaited_ns=round(slope),
        next_wave_ns=round(levels[1] + refill) if later.any() else None,
        copy_issue_ns=round(issue),
        step_ns=round(float(marks.duration[steps].sum() / phases.sum())),
        segment_launch_ns=round(float(marks.duration[decode & (marks.kind == SEGMENT)].mean())),
        experts_launch_ns=round(float(marks.duration[launches].mean())),
        prediction_ns=_prediction_ns(run, phases),
        **_prefill_times(run, marks, ~phases),
    )


def _lines(
    groups: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
) -> tuple[float, list[float]]:
    """Lines of one slope through groups of counts and times: the slope, and each group's level.

    None of them is negative, and each group's mean time is kept. An empty group has level 0.
    """
    means = [(float(c.mean()), float(t.mean())) if len(c) else (0.0, 0.0) for c, t in groups]
    apart = [
        (counts - count, times - time)
        for (counts, times), (count, time) in zip(groups, means, strict=True)
    ]
    spread = sum(float((counts**2).sum()) for counts, _ in apart)
    together = sum(float((counts * times).sum()) for counts, times in apart)
    most = [time / count for count, time in means if count]
    slope = max(min([together / spread if spread else 0.0, *most]), 0.0)
    return slope, [max(time - slope * count, 0.0) for count, time in means]


def _prefill_times(run: Replayed, marks: Marks, chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What the policy's prefills take the host. ``chosen``: which steps are ones, bool [steps]."""
    if not chosen.any():
        return {}
    tokens = [step.tokens for step in run.setting.workload.steps() if step.prefill_tokens]
    within, first = marks.within(chosen), marks.first_waves()

    def of(kind: int) -> npt.NDArray[np.bool_]:
        counted: npt.NDArray[np.bool_] = within & (marks.kind == kind)
        return counted

    decided, handed = of(DECIDE), of(ISSUE) & (marks.count > 0)
    # There are few of them, and one long pause would count for a policy's own.
    return {
        "prefill_tokens": round(float(np.mean(tokens))),
        "prefill_decision_ns": steady_mean_ns(marks.duration[decided & first]),
        "prefill_next_wave_ns": steady_mean_ns(marks.duration[decided & ~first]),
        "prefill_prediction_ns": _prediction_ns(run, chosen),
        "prefill_step_ns": round(float(marks.duration[of(STEP)].sum() / chosen.sum())),
        "prefill_segment_launch_ns": steady_mean_ns(marks.duration[of(SEGMENT)]),
        "prefill_experts_launch_ns": steady_mean_ns(
            marks.duration[of(EXPERTS) & (marks.count == 1)]
        ),
        "prefill_copy_issue_ns": steady_mean_ns(marks.duration[handed] / marks.count[handed]),
    }


def _prediction_ns(run: Replayed, chosen: npt.NDArray[np.bool_]) -> int | None:
    """Of one within a wait, on a host of the usual speed. ``chosen``: bool [steps]."""
    slowness = run.measured.host_loop_ns / LOOP_NS
    return _mean_ns(predictions_ns(run.measured, chosen) / slowness)


def _mean_ns(durations: npt.NDArray[Any]) -> int | None:
    return round(float(durations.mean())) if len(durations) else None


def scaled(link: LinkTimes, scale: float) -> LinkTimes:
    """A link that is emulated ``scale`` times slower: each chunk is followed by another copy."""
    if scale == 1:
        return link
    return LinkTimes(
        bytes_per_s=round(link.bytes_per_s / scale),
        startup_ns=link.startup_ns + link.gap_ns,
        gap_ns=2 * link.gap_ns,
    )
