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
        return int(self.report.get("batch", 1))  # older ones ran one at a time

    def points(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Those of policies of a kind; None: all."""
        points: list[dict[str, Any]] = self.report["points"]
        return [each for each in points if kind is None or _kind_of(each) == kind]

    def judges(self, policy: str, kind: str | None = None) -> bool:
        """Whether a point is of the policy, and of that kind."""
        return any(each["policy"] == policy for each in self.points(kind))

    def errors(self, kind: str) -> list[float]:
        """Of the mean TPOT of its points of that kind, without sign."""
        return [abs(each["figures"]["tpot_ms"]["error"]) for each in self.points(kind)]

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

    Errors are of the mean TPOT, of points of the same kind with as many requests at a time: those
    of the model's own campaigns, or, for a policy that has no such point in them, of all
    ``campaigns`` of the machine. With a CPU's help they are of the model's own alone.
    """
    of_model = [each for each in campaigns if each.plan["geometry"] == setting.geometry.name]
    if setting.timing.provenance != "calibrated":
        return Confidence("estimated", _why_estimated(setting, of_model))
    if not of_model:
        why = "measured times of this model on this machine; nobody has validated them"
        return Confidence("calibrated", f"{why} (see moesim validate)")
    if found.on_cpu and not setting.timing.cpu_is_measured:
        why = "measured times, but for the CPU's, which are from the machine's rates"
        return Confidence("calibrated", f"{why} (see moesim calibrate --cpu)", of_model[0].name)
    batch = setting.workload.max_batch
    kind = _CPU if found.on_cpu else _PREFETCH if found.prefetches else _DEMAND
    together = "one request" if batch == 1 else f"{batch} requests"
    own = _of_kind(of_model, batch, kind)
    if not own:
        why = f"measured times; policies {kind} were not validated on this model with {together}"
        return Confidence("calibrated", f"{why} at a time", of_model[0].name)
    here = found.on_cpu or any(each.judges(found.policy, kind) for each in own)
    used = own if here else _of_kind(campaigns, batch, kind)
    errors = np.concatenate([each.errors(kind) for each in used])
    worst = float(errors.max())
    names = sorted({each.plan["geometry"] for each in used})
    models = "this model" if here else listed(names)
    why = f"policies {kind} on {models}, {together} at a time"
    said = [*_unmeasured(found.policy, kind, own, of_model), *_beyond(found, setting, own)]
    if percentile != "mean":
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


def _of_kind(campaigns: Sequence[Campaign], batch: int, kind: str) -> list[Campaign]:
    """Those of so many requests at a time that have points of that kind."""
    return [each for each in campaigns if each.batch == batch and each.points(kind)]


def _kind_of(point: dict[str, Any]) -> str:
    if point.get("on_cpu", False):
        return _CPU
    return _DEMAND if point["time_independent"] else _PREFETCH


def _unmeasured(
    policy: str, kind: str, own: Sequence[Campaign], of_model: Sequence[Campaign]
) -> list[str]:
    """Where the policy has no point of that kind with as many requests at a time."""
    if any(each.judges(policy, kind) for each in own):
        return []
    if any(each.judges(policy) for each in of_model):
        return [f"{policy} was not measured so on this model"]
    return [f"{policy} was not measured on this model"]


def _beyond(found: Found, setting: Setting, own: Sequence[Campaign]) -> list[str]:
    """What was not among the validated points of the model's ``own`` campaigns."""
    said = []
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
