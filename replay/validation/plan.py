"""What is validated: a YAML file, so that a set of points can be fixed before it is measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

import policies
from configs.load import find, read_yaml
from configs.units import parse_expert_budget
from sim.point import Point
from sim.sweeps import PolicyChoice, PolicyChoices


class ValidationPlan(BaseModel):
    """``geometry`` (random weights of its shapes) or ``model`` (a checkpoint), driven by ``trace``.

    ``requests``: those that are judged. ``calibration_requests``: others, on which each policy's
    host time is measured at each of ``calibration_budgets``, none of which is among ``budgets``.
    ``fit_requests``: again others, from which fitted policies learn. ``link_scales``: 1, and
    emulated slower links. ``prefill_tokens``: sizes of prefill to calibrate, of a whole batch where
    the trace has batches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    geometry: str | None = None
    model: str | None = None
    trace: str
    hardware: str
    requests: tuple[int, ...] = Field(min_length=1)
    calibration_requests: tuple[int, ...] = Field(min_length=1)
    calibration_budgets: tuple[str, ...] = Field(
        ("18.75%", "37.5%", "62.5%", "87.5%"), min_length=1
    )
    prefill_tokens: tuple[int, ...] = (8, 64)
    policies: PolicyChoices = Field(min_length=1)
    budgets: tuple[str, ...] = Field(min_length=1)
    link_scales: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    repeats: int = Field(default=3, ge=1, le=20)
    fit_requests: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_one_budget(cls, value: Any) -> Any:
        """Plans of older runs name one budget to calibrate at."""
        old, new = "calibration_budget", "calibration_budgets"
        if not isinstance(value, dict) or old not in value or new in value:
            return value
        return {**{name: given for name, given in value.items() if name != old}, new: [value[old]]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.geometry is None) == (self.model is None):
            raise ValueError("give geometry or model, one of them")
        uses = {
            "judged": self.requests,
            "calibrated on": self.calibration_requests,
            "fitted on": self.fit_requests,
        }
        for (one, mine), (other, theirs) in combinations(uses.items(), 2):
            both = set(mine) & set(theirs)
            if both:
                raise ValueError(f"request {min(both)} is {one} and {other}: choose one")
        if not all(1 <= scale < math.inf for scale in self.link_scales):
            raise ValueError(
                "link_scales: a link can be emulated slower, not faster; give 1 or more"
            )
        return self

    def judges_as(self, other: ValidationPlan) -> bool:
        """Whether both judge the same; what is calibrated may differ, each run does it anew."""
        apart = {"calibration_budgets": ()}
        return self.model_copy(update=apart) == other.model_copy(update=apart)

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        """What would else be told after minutes of calibration, or never."""
        for choice in self.policies:
            info = policies.get(choice.name)
            info.parse(choice.set)
            if not info.lossless or info.needs_all:
                does = "changes the routing" if not info.lossless else "has no budget"
                raise ValueError(f"policy {choice.name} {does}: it cannot be judged here")
        points = Counter(
            (cell.point.label, _same(str(cell.point.expert_budget)), f"x{cell.link_scale:g}")
            for cell in cells_of(self)
        )
        twice = [" ".join(point) for point, times in points.items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]} is there twice: name each policy, budget and link once")
        judged = set(map(_same, self.budgets))
        for budget in self.calibration_budgets:
            if _same(budget) in judged:
                raise ValueError(f"calibration_budgets: {budget} is a judged budget")
        return self


@dataclass(frozen=True)
class Cell:
    """One point and the emulated link it is judged on."""

    point: Point
    link_scale: float

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.point.label} {self.point.expert_budget} x{self.link_scale:g}"


def _same(budget: str) -> str:
    """One text for all ways to write a budget."""
    return str(parse_expert_budget(budget))


def load_plan(name_or_path: str | Path) -> ValidationPlan:
    """A shipped plan by name, or a file. Raises UserError naming file, field and value."""
    return read_yaml(ValidationPlan, find(name_or_path, "validation", "validation plan"))


def cells_of(plan: ValidationPlan) -> Iterator[Cell]:
    """All points, policy by policy."""
    for choice in plan.policies:
        for budget in plan.budgets:
            for scale in plan.link_scales:
                yield Cell(point_of(plan, choice, budget), scale)


def calibration_points(plan: ValidationPlan) -> Iterator[Point]:
    """Every policy at every calibration budget, in turns of another budget a policy each."""
    budgets = plan.calibration_budgets
    for turn in range(len(budgets)):
        for index, choice in enumerate(plan.policies):
            yield point_of(plan, choice, budgets[(turn + index) % len(budgets)])


def point_of(plan: ValidationPlan, choice: PolicyChoice, budget: str) -> Point:
    """The simulator's name for a point."""
    return Point(
        policy=choice.name,
        params=choice.set,
        hardware=plan.hardware,
        geometry=plan.geometry,
        expert_budget=budget,
    )
