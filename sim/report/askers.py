"""What asked for the points of a report: a sweep's configuration, or a question to `advise`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import yaml

from configs.errors import UserError
from sim.ranking import pick_of
from sim.selection import Row, middle, systems
from sim.sweeps import CONFIG_FILE, SweepConfig
from sim.wording import as_gib

_MOST_NAMED = 3


@dataclass(frozen=True)
class Goal:
    """What points are judged by.

    ``of``: which of the requests' times; ``tpot_ms``: the target, if there is one;
    ``limit_bytes``: of GPU memory, where that is not what the GPU has.
    """

    of: str = "mean"
    tpot_ms: float | None = None
    limit_bytes: int | None = None


GOAL = Goal()


@dataclass(frozen=True)
class Answer:
    """A question's answers in words; lines of ``answers`` and ``what_ifs`` may be indented.

    ``elsewhere``: what to type into another engine, and what that assumes.
    """

    answers: list[str]
    what_ifs: list[str]
    confidence: list[str]
    elsewhere_for: str
    elsewhere: list[tuple[str, str]]
    left_out: list[str]


class Asker(ABC):
    """What asked for the points: how they are judged, and what the page says of that."""

    noun: ClassVar[str]
    #: of a system's point that the page points out: in a legend, and over a table
    pick_name: ClassVar[str]
    picks_words: ClassVar[str]

    @property
    @abstractmethod
    def trace(self) -> str:
        """Its name, as it was given."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """How many tokens of it were read; None: all."""

    @abstractmethod
    def require_points(self, frame: pd.DataFrame, path: Path) -> None:
        """UserError where the table at ``path`` does not have the points that were asked for."""

    @property
    @abstractmethod
    def budgets(self) -> str:
        """Which budgets were simulated."""

    @property
    @abstractmethod
    def command(self) -> str:
        """The command line that makes the points again."""

    @property
    def goal(self) -> Goal:
        """What points are judged by."""
        return GOAL

    @property
    def file(self) -> tuple[str, str] | None:
        """Name and text of the file that the command reads, if it reads one."""
        return None

    @property
    def answer(self) -> Answer | None:
        """Answers of its own; None: each system gets :func:`sim.advice.recommend`'s words."""
        return None

    @abstractmethod
    def question(self, points: pd.DataFrame) -> str:
        """One sentence."""

    def facts(self) -> list[tuple[str, list[str]]]:
        """What the page says first of what was asked: names, each with lines."""
        return []

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Those that :meth:`judged` reads."""
        return ()

    def judged(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows as they count for what was asked; ready for :func:`sim.selection.prepare`."""
        return frame

    def named(self, points: pd.DataFrame) -> pd.DataFrame:
        """Prepared points with budgets named as they were asked for."""
        return points

    def pick(self, points: pd.DataFrame) -> Row | None:
        """The point of one system to point out, if there is one."""
        return pick_of(points)

    def first(self, points: pd.DataFrame) -> str:
        """The system that is shown first."""
        return str(middle(systems(points)))


@dataclass(frozen=True)
class Swept(Asker):
    """A sweep's configuration."""

    config: SweepConfig
    noun = "sweep"
    pick_name = "recommended"
    picks_words = "The pick on each system: the fastest choice that fits the GPU"

    @property
    def trace(self) -> str:
        """As configured."""
        return self.config.trace

    @property
    def max_tokens(self) -> int | None:
        """As configured."""
        return self.config.max_tokens

    @property
    def budgets(self) -> str:
        """As configured."""
        if self.config.budgets:
            return f"{', '.join(self.config.budgets)} for the whole model"
        return f"{', '.join(self.config.expert_budgets)} of the experts' bytes, for expert slots"

    @property
    def command(self) -> str:
        """A sweep of :attr:`file`."""
        return "moesim sweep sweep.yaml --out results"

    @property
    def file(self) -> tuple[str, str]:
        """The configuration."""
        return "sweep.yaml", as_yaml(self.config)

    def require_points(self, frame: pd.DataFrame, path: Path) -> None:
        """As many as configured."""
        asked = len(self.config.points())
        if len(frame) != asked:
            raise UserError(
                f"{path} has {len(frame)} rows, {CONFIG_FILE} asks for {asked} points: run `moesim "
                "sweep` to the end"
            )

    def question(self, points: pd.DataFrame) -> str:
        """Which policy, budget and link."""
        total = as_gib(points["memory.expert_bytes_total"].iloc[0])
        names = list(dict.fromkeys(points["hardware"]))
        hardware = " or ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} machines"
        return (
            f"{points['geometry'].iloc[0]} has {total} of experts "
            f"({points['expert_dtype'].iloc[0]}). On {hardware}: which expert caching or "
            "prefetching policy, at which GPU memory budget, over which link, gives which latency?"
        )


def as_yaml(config: SweepConfig) -> str:
    """The sweep as a file of `moesim sweep`; what is not given has its default."""
    given: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    given["policies"] = [
        choice if choice.get("set") else choice["name"] for choice in given["policies"]
    ]
    first = ["trace", "geometry", "dtype", "hardware", "links", "budgets", "expert_budgets"]
    ordered = {name: given[name] for name in [*first, *given] if name in given}
    text: str = yaml.safe_dump(
        ordered, sort_keys=False, allow_unicode=True, width=88, default_flow_style=None
    )
    return text
