"""Gaps between prediction and measurement, the noise beside them, and whether the ranking held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from replay.validation.judged import Judged

LEAST_DIFFERENCE = 0.03
"""Pairs of policies whose measured times are nearer than this, or twice the noise, are ties."""
HIDDEN_FROM = 0.15
"""Share of the link's time beside which the device works on: from here prefetching overlaps."""


@dataclass(frozen=True)
class Gap:
    """One figure: predicted, the median measurement, and the spread of the measurements."""

    predicted: float
    measured: float
    spread: float

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.measured - 1 if self.measured else float("nan")


Figure = Callable[[dict[str, Any]], float | None]


def gap(judged: Judged, figure: Figure) -> Gap | None:
    """A figure's gap; None where the trace has none of it. Spread: (max - min) / median."""
    return gap_of(figure(judged.predicted), map(figure, judged.measured))


def gap_of(predicted: float | None, measured: Iterable[float | None]) -> Gap | None:
    """Likewise, of figures that are known already."""
    values = [value for value in measured if value is not None]
    if predicted is None or not values:
        return None
    middle = float(np.median(values))
    spread = (max(values) - min(values)) / middle if middle else 0.0
    return Gap(predicted, middle, spread)


def at(*path: str) -> Figure:
    """A figure of a result by its path; None where the result has none of it."""

    def found(result: dict[str, Any]) -> float | None:
        value: Any = result
        for key in path:
            value = value.get(key)
            if value is None:
                return None
        return float(value)

    return found


def stall_ms(result: dict[str, Any]) -> float:
    """Exposed stall, ms a decode step: for late and missed experts and for the CPU together."""
    parts = result["breakdown_ms"]
    return float(parts["stall_late"] + parts["stall_miss"] + parts["stall_cpu"])


def hidden_share(result: dict[str, Any]) -> float:
    """Of the link's time in decode steps: the share in which nobody waits for it."""
    link, parts = result["link_ms"], result["breakdown_ms"]
    waited = parts["stall_late"] + parts["stall_miss"]  # not for the CPU
    return max(1 - waited / link, 0.0) if link else 0.0


def naive_ms(judged: Judged) -> float:
    """The estimate to beat: resident + bytes / bandwidth + c x misses, from the same calibration.

    Misses and bytes of decode steps are the simulator's; c is what the host does for each.
    """
    host = judged.run.times.passes[0].host
    each = host.awaited_ns + host.copy_issue_ns + host.landing_ns + host.experts_launch_ns
    work_ms = _copies(judged) * each / 1e6
    return judged.run.before.resident_ms + naive_stall_ms(judged) + work_ms


def naive_stall_ms(judged: Judged) -> float:
    """Its exposed stall, bytes / bandwidth: what the host does for a miss is no stall."""
    run = judged.run
    rate = run.times.link.bytes_per_s / judged.cell.link_scale
    return _copies(judged) * run.expert_bytes / rate * 1e3


def _copies(judged: Judged) -> float:
    """Missed and late experts of a decode step, as predicted."""
    decode = judged.predicted["decode"]
    # A step gives a token to every request of a batch, and its copies are shared.
    steps = decode["events"] / len(judged.run.times.passes[0].segment_ns)
    return float((decode["misses"] + decode["late"]) / steps)


def paired_errors(judged: Judged) -> dict[str, float]:
    """Absolute relative error of single decode steps: the median and the 90th percentile."""
    measured = np.median([result["step_ms"] for result in judged.measured], axis=0)
    errors = np.abs(np.array(judged.predicted["step_ms"]) / measured - 1)
    return {"p50": float(np.median(errors)), "p90": float(np.percentile(errors, 90))}


@dataclass(frozen=True)
class Ranking:
    """Of the policies at one budget and link. ``tau``: None where all pairs are ties."""

    budget: str
    link_scale: float
    pairs: int
    agreed: int
    tau: float | None
    picked: str
    best: str
    regret: float


def rankings(all_judged: Sequence[Judged]) -> list[Ranking]:
    """One for each budget and link with two policies or more that one run measured."""
    groups: dict[tuple[str, float, int], list[Judged]] = {}
    for each in all_judged:
        key = (str(each.cell.point.expert_budget), each.cell.link_scale, each.run.number)
        groups.setdefault(key, []).append(each)
    return [
        _rank(budget, scale, group) for (budget, scale, _), group in groups.items() if group[1:]
    ]


def _rank(budget: str, scale: float, group: list[Judged]) -> Ranking:
    gaps = [(each.cell.point.label, gap(each, at("itl_ms", "mean"))) for each in group]
    known = [(label, found) for label, found in gaps if found is not None]
    pairs = agreed = 0
    for (_, one), (_, other) in combinations(known, 2):
        # Of the faster one, whichever the plan names first.
        apart = abs(one.measured - other.measured) / min(one.measured, other.measured)
        if apart <= max(LEAST_DIFFERENCE, 2 * max(one.spread, other.spread)):
            continue
        pairs += 1
        # One time predicted for both is no sign.
        agreed += (one.measured - other.measured) * (one.predicted - other.predicted) > 0
    # Of equal predictions the worst choice counts.
    picked = min(known, key=lambda item: (item[1].predicted, -item[1].measured))
    best = min(known, key=lambda item: item[1].measured)
    return Ranking(
        budget=budget,
        link_scale=scale,
        pairs=pairs,
        agreed=agreed,
        tau=(2 * agreed - pairs) / pairs if pairs else None,
        picked=picked[0],
        best=best[0],
        regret=picked[1].measured / best[1].measured - 1,
    )
