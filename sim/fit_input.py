"""What `moesim fit-engine` is given: measured speeds and a model, from options or a YAML file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from configs.load import read_yaml, validated
from configs.units import parse_bytes, parse_rate
from sim.fit_engine import Demand, Fit, Speed, fit_engine

_ANY_MACHINE = "h200-pcie5"  # hits of the policies that are let in do not depend on it
_FACTORS = re.compile(r"(\d{1,6})\s*[xX]\s*(\d{1,4})", re.ASCII)


def parse_share(value: object) -> float:
    """A share as `36.6%` or 0.366. Raises UserError for what is neither."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"{value!r} is no share: give 36.6% or 0.366") from None
    if text.endswith("%"):
        number /= 100
    elif number > 1:
        raise UserError(f"{value!r} is above 1: give percent with their sign, such as 36.6%")
    if not (math.isfinite(number) and 0 <= number <= 1):
        raise UserError(f"{value!r} is not within 0% to 100%")
    return number


def parse_accesses(value: object) -> Demand:
    """Experts a token: `48x8` (MoE layers x top-k), or 384 where the layers are not known."""
    text = str(value).strip()
    factors = _FACTORS.fullmatch(text)
    if factors:
        layers, top_k = map(int, factors.groups())
        return Demand(layers * top_k, layers)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UserError(f"{value!r} is not layers x top-k: give 48x8, or 384")
    return Demand(int(text))


Share = Annotated[float, BeforeValidator(parse_share)]
PerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Place(BaseModel):
    """Where on the curve: a hit rate, or slots a layer of which it is simulated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: Annotated[int, Field(ge=1)] | None = None
    hit: Share | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Place:
        if self.slots is None and self.hit is None:
            raise ValueError("neither hit nor slots; give hit=36.6%, or slots=24 and a trace")
        return self


class Measured(Place):
    """A measured speed, tokens/s of one request."""

    tps: PerSecond


class Case(BaseModel):
    """A whole case, as a YAML file holds it. Options of the same names mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[Measured, ...]
    predict: tuple[Place, ...] = ()
    accesses: str | int | None = None
    geometry: str | None = None
    dtype: str | None = None
    expert_bytes: str | int | None = None
    link: str | float | None = None
    resident_tps: PerSecond | None = None
    noise: Share = 0.03
    trace: str | None = None
    policy: str = "lru"


@dataclass(frozen=True)
class Curve:
    """A case made out. ``expert_bytes``: of one expert, with its origin in words, if known."""

    fit: Fit
    points: tuple[tuple[Measured, Speed], ...]
    places: tuple[tuple[Place, float], ...]
    expert_bytes: float | None
    expert_bytes_from: str
    link_bytes_per_s: int | None


def parse_fields(text: str, option: str, cls: type[Place]) -> Any:
    """A point or place from `slots=24,hit=36.6%,tps=10.5`."""
    fields: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise UserError(f"{option} {text!r}: {part!r} is not key=value, such as hit=36.6%")
        if name in fields:
            raise UserError(f"{option} {text!r}: {name} is given twice")
        fields[name] = value
    return validated(cls, fields, f"{option} {text!r}")


def read_case(path: Path) -> Case:
    """The case of a YAML file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a YAML file with points, or --point options")
    return read_yaml(Case, path)


def make_curve(case: Case) -> Curve:
    """Fit a case; hit rates are simulated where only slots are given. Raises UserError."""
    geometry = None if case.geometry is None else load_geometry(case.geometry, case.dtype)
    hits, demand = _hits_and_demand(case, geometry)
    points = tuple((point, Speed(_hit(point, hits), point.tps)) for point in case.points)
    fit = fit_engine(
        [speed for _, speed in points],
        demand,
        noise=case.noise,
        resident_tokens_per_s=case.resident_tps,
    )
    size, origin = _expert_bytes(case, geometry)
    return Curve(
        fit=fit,
        points=points,
        places=tuple((place, _hit(place, hits)) for place in case.predict),
        expert_bytes=size,
        expert_bytes_from=origin,
        link_bytes_per_s=None if case.link is None else parse_rate(case.link),
    )


def _hit(place: Place, hits: dict[int, float]) -> float:
    if place.hit is not None:
        return place.hit
    assert place.slots is not None  # by Place
    return hits[place.slots]


def _hits_and_demand(case: Case, geometry: Geometry | None) -> tuple[dict[int, float], Demand]:
    if case.accesses is not None and geometry is not None:
        raise UserError("give accesses or geometry, not both: a geometry has its layers x top-k")
    unknown = [p.slots for p in (*case.points, *case.predict) if p.hit is None]
    slots = sorted({each for each in unknown if each is not None})
    if case.trace is None:
        if slots:
            raise UserError(
                f"slots={slots[0]} has no hit rate: give hit=..., or a trace to simulate it on"
            )
        return {}, _demand(case, geometry)
    hits, own = _simulated(case, slots)
    return hits, own if case.accesses is None else parse_accesses(case.accesses)


def _demand(case: Case, geometry: Geometry | None) -> Demand:
    if case.accesses is not None:
        return parse_accesses(case.accesses)
    if geometry is None:
        raise UserError(
            "how many experts a token asks for is not known: give accesses (MoE layers x top-k, "
            "such as 48x8), a geometry or a trace"
        )
    return Demand(geometry.num_moe_layers * geometry.top_k, geometry.num_moe_layers)


def _simulated(case: Case, slots: Sequence[int]) -> tuple[dict[int, float], Demand]:
    """Decode hit rates of the policy by slots a layer, and what the trace's tokens ask for."""
    from sim.point import Point, can_share_decisions, inputs_for, run_point
    from tracer.trace import Trace

    trace = Trace.open(case.trace or "")
    hits = {}
    for count in slots:
        point = Point(
            policy=case.policy,
            hardware=_ANY_MACHINE,
            expert_budget=f"{count}/layer",
            geometry=case.geometry,
            dtype=case.dtype,
        )
        if not can_share_decisions(point):
            raise UserError(
                f"hit rates of {case.policy} depend on the machine's times, which are what is "
                "looked for: give the engine's own as hit=..., or a policy without prefetching"
            )
        rate = run_point(inputs_for(trace, point), point)["decode"]["hit_rate"]
        if rate is None:
            raise UserError(f"trace {case.trace} decodes no token: give hit=... instead")
        hits[count] = float(rate)
    own = trace.manifest.geometry
    return hits, Demand(own.num_moe_layers * own.top_k, own.num_moe_layers)


def _expert_bytes(case: Case, geometry: Geometry | None) -> tuple[float | None, str]:
    if case.expert_bytes is not None:
        return float(parse_bytes(case.expert_bytes)), "as given"
    if geometry is None:
        return None, ""
    sizes = geometry.expert_bytes_by_layer
    return sum(sizes) / len(sizes), f"{geometry.name} at {geometry.expert_dtype}"
