"""How far a predicted time may be off: from what was measured, where there is a measurement.

The repository's ``validation/`` holds predictions and measurements of whole campaigns, each of one
machine and model. An installed package has no such directory: then nothing is known of errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.timings import load_timings
from configs.units import parse_expert_budget
from sim.advising.search import Found
from sim.point import Setting
from sim.wording import listed

VALIDATION = Path(__file__).resolve().parents[2] / "validation"

_FIGURES = {
    "mean": "tpot_ms",
    "p50": "tpot_p50_ms",
    "p90": "tpot_p90_ms",
    "p99": "tpot_p99_ms",
}
_DEMAND, _PREFETCH, _CPU = (
    "that copy on demand",
    "that prefetch",
    "whose misses the CPU computes in part",
)


@dataclass(frozen=True)
class Confidence:
    """``level``: ``validated``, ``calibrated`` (measured times, no validation) or ``estimated``.

    Where validated: the errors of ``points`` measured ones of its kind (on demand, prefetching, or
    with the CPU's help), relative and without sign, and the TPOT between which the measured one
    then lies if the worst of them holds. ``why``: what this rests on, and what of it was not
    validated; ``source``: where.
    """

    level: str
    why: str
    source: str | None = None
    points: int = 0
    median_error: float | None = None
    worst_error: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None


@dataclass(frozen=True)
class Campaign:
    """A validation of one machine and model that took no part in development."""

    directory: Path
    plan: dict[str, Any]
    report: dict[str, Any]

    @property
    def name(self) -> str:
        """Its place, for people."""
        return str(self.directory.relative_to(VALIDATION.parent))

    @property
    def batch(self) -> int:
        """Requests that ran together."""
        return int(self.report["batch"])

    @property
    def policies(self) -> set[str]:
        """Policies of its points."""
        return {str(point["policy"]) for point in self.report["points"]}

    @property
    def timings(self) -> Path | None:
        """The measured times that its predictions rest on."""
        return next(iter(sorted(self.directory.glob("run-*/timings.yaml"))), None)


def find_campaigns(hardware: str, root: Path = VALIDATION) -> list[Campaign]:
    """The validations on this hardware profile, one or more a model; empty: there are none here."""
    found = []
    for path in sorted(root.glob("*/*/plan.json")):
        plan = json.loads(path.read_text(encoding="utf-8"))
        report = path.with_name("report.json")
        if plan["hardware"] == hardware and report.is_file():
            told = json.loads(report.read_text(encoding="utf-8"))
            found.append(Campaign(path.parent, plan, told))
    return found


def confidence_in(
    found: Found, setting: Setting, percentile: str, campaigns: Sequence[Campaign]
) -> Confidence:
    """What is known of the error of a predicted TPOT.

    Errors are those of the model's own campaigns, or, for a policy that is in none of them, of all
    ``campaigns`` of the machine; of as many requests at a time. With a CPU's help errors are those
    of the model's own campaigns alone.
    """
    of_model = [each for each in campaigns if each.plan["geometry"] == setting.geometry.name]
    if setting.timing.provenance != "calibrated":
        return Confidence("estimated", _why_estimated(setting, of_model))
    if not of_model:
        why = "measured times of this model on this machine; nobody has validated them"
        return Confidence("calibrated", f"{why} (see moesim validate)")
    batch = setting.workload.max_batch
    kind = _CPU if found.on_cpu else _PREFETCH if found.prefetches else _DEMAND
    figure = _FIGURES[percentile]
    own = _with_errors(of_model, batch, kind, figure)
    if not own:
        figure = _FIGURES["mean"]
        own = _with_errors(of_model, batch, kind, figure)
    if not own:
        what = f"policies {kind}" if batch == 1 else f"{batch} requests at a time"
        why = f"measured times; on this model {what} were not validated"
        return Confidence("calibrated", why, of_model[0].name)
    is_own = any(found.policy in each.policies for each in own)
    here = is_own or found.on_cpu
    used = own if here else _with_errors(campaigns, batch, kind, figure)
    errors = np.concatenate([_errors(each, kind, figure) for each in used])
    worst = float(errors.max())
    names = sorted({each.plan["geometry"] for each in used})
    models = "this model" if here else listed(names)
    together = "one request" if batch == 1 else f"{batch} requests"
    why = f"policies {kind} on {models}, {together} at a time"
    said = _beyond(found, setting, own)
    if figure != _FIGURES[percentile]:
        said.append("errors are of the mean")
    return Confidence(
        level="validated",
        why="; ".join([why, *said]),
        source=used[0].name if not used[1:] else str(Path(used[0].name).parent),
        points=len(errors),
        median_error=float(np.median(errors)),
        worst_error=worst,
        low_ms=found.tpot_ms / (1 + worst),
        high_ms=found.tpot_ms / (1 - worst),
    )


def _why_estimated(setting: Setting, campaigns: Sequence[Campaign]) -> str:
    why = "from bytes and flops, not measured; the error is not known"
    timings = next((each.timings for each in campaigns if each.timings), None)
    if timings is None:
        return why
    shown = timings.relative_to(VALIDATION.parent)
    dtype = load_timings(str(timings)).expert_dtype
    own = setting.geometry.expert_dtype
    if dtype == own:
        return f"{why}. Times were measured: --timings {shown}"
    return f"{why}. Times of {dtype} experts were measured: --dtype {dtype} --timings {shown}"


def _with_errors(
    campaigns: Sequence[Campaign], batch: int, kind: str, figure: str
) -> list[Campaign]:
    """Those of so many requests at a time that have the figure of policies of that kind."""
    return [each for each in campaigns if each.batch == batch and _errors(each, kind, figure)]


def _kind_of(point: dict[str, Any]) -> str:
    if point["on_cpu"]:
        return _CPU
    return _DEMAND if point["time_independent"] else _PREFETCH


def _errors(campaign: Campaign, kind: str, figure: str) -> list[float]:
    """Of the campaign's points of that kind that have the figure, without sign."""
    points = [each for each in campaign.report["points"] if _kind_of(each) == kind]
    known = [each["figures"][figure] for each in points if figure in each["figures"]]
    return [abs(each["error"]) for each in known]


def _beyond(found: Found, setting: Setting, own: Sequence[Campaign]) -> list[str]:
    """What was not among the validated points of the model's ``own`` campaigns."""
    said = []
    if not any(found.policy in each.policies for each in own):
        said.append(f"{found.policy} was not measured on this model")
    plans = [each.plan for each in own]
    budgets = [text for plan in plans for text in plan["budgets"]]
    shares = [float(parse_expert_budget(text).value) for text in budgets]
    if not min(shares) <= found.expert_share <= max(shares):
        low, high = (f"{share * 100:g}" for share in (min(shares), max(shares)))
        said.append(f"they had {low} to {high} % of the experts on the GPU")
    if setting.point.link is not None:
        slower = sorted({scale for plan in plans for scale in plan["link_scales"] if scale != 1})
        scales = " and ".join(f"{scale:g}" for scale in slower)
        links = f"own link and {scales} times slower" if slower else "own link"
        said.append(f"they were over the machine's {links}")
    return said
