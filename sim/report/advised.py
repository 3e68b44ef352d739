"""A question to `moesim advise` as what asked for the points of a report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from configs.errors import UserError
from configs.load import first_problem, parse_json, validated
from sim.advising.answers import ANSWER_FILE, Advice, WhatIf
from sim.advising.question import Question
from sim.advising.search import Found
from sim.advising.words import sections
from sim.report.askers import Answer, Asker, Goal
from sim.selection import Row
from sim.sweeps import PolicyChoice
from sim.wording import as_gib

_OPTIONS = {
    "trace": "--trace",
    "geometry": "--geometry",
    "dtype": "--dtype",
    "hardware": "--hardware",
    "link": "--link",
    "timings": "--timings",
    "tpot_ms": "--tpot-ms",
    "ttft_ms": "--ttft-ms",
    "percentile": "--percentile",
    "gpu_memory": "--gpu-memory",
    "policies": "--policies",
    "batch": "--batch",
    "context": "--context",
    "max_tokens": "--max-tokens",
    "fit_share": "--fit-share",
    "seed": "--seed",
}


_AGAIN = "run the same `moesim advise` again, it goes on from its points"


class _System(BaseModel):
    """What the words of an advice need of its ``system``."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    hardware: str
    link_bytes_per_s: float = Field(gt=0)
    geometry: str
    expert_dtype: str
    experts_a_layer: int
    moe_layers: int
    limit_bytes: int = Field(gt=0)
    card_bytes: int = Field(gt=0)
    fixed_bytes: int
    slot_a_layer_bytes: int
    context: int
    batch: int
    judged_requests: int
    judged_tokens: int


@dataclass(frozen=True)
class Advised(Asker):
    """A question with its answers."""

    advice: Advice
    noun = "question"
    pick_name = "answer"
    picks_words = (
        "The same target on each system: the smallest memory that meets it; where there is not as "
        "much, the fastest in what there is"
    )

    @property
    def trace(self) -> str:
        """As asked."""
        return self.advice.question.trace

    @property
    def max_tokens(self) -> int | None:
        """As asked."""
        return self.advice.question.max_tokens

    @property
    def goal(self) -> Goal:
        """The target, and the memory where that is less than the card's."""
        question, system = self.advice.question, self.advice.system
        of = question.percentile
        limit = system["limit_bytes"]
        return Goal(
            of if of == "mean" else f"{of} of the requests",
            question.tpot_ms,
            limit if limit < system["card_bytes"] else None,
        )

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Times of that percentile, and what tells points apart."""
        of = self.advice.question.percentile
        return (
            *("point_id", "point.budget", "point.expert_budget", "memory.peak_bytes"),
            *(f"tpot_ms.{of}", f"ttft_ms.{of}"),
        )

    def require_points(self, frame: pd.DataFrame, path: Path) -> None:
        """Those of the answers, each once."""
        kept = [point.get("point_id") for point in self.advice.points]
        if len(frame) != len(kept):
            raise UserError(
                f"{path} has {len(frame)} rows, {ANSWER_FILE} {len(kept)} points: {_AGAIN}"
            )
        found = set(frame["point_id"])
        answers = [each.point_id for each in (*self._answers, self.advice.everything)]
        if found != set(kept) or not found.issuperset(answers):
            raise UserError(f"{path} has other points than {ANSWER_FILE}: {_AGAIN}")

    @property
    def budgets(self) -> str:
        """Where the search went."""
        return (
            f"found by search: slots a layer of {self.advice.system['experts_a_layer']}, and all "
            f"of {as_gib(self.advice.system['limit_bytes'])}"
        )

    @property
    def command(self) -> str:
        """The question as it is typed."""
        return shlex.join(["moesim", "advise", *_words(self.advice.question), "--out", "results"])

    @cached_property
    def _sections(self) -> dict[str, list[str]]:
        return {
            name: [line for line in lines if line] for name, lines in sections(self.advice).items()
        }

    @property
    def answer(self) -> Answer:
        """In the words of advice.txt."""
        said = self._sections
        return Answer(
            answers=said["answers"],
            what_ifs=said["what-ifs"],
            confidence=said["confidence"],
            elsewhere_for=next(iter(said["elsewhere"]), ""),
            elsewhere=[(line.text, f"{line.tool}: {line.assumes}") for line in self.advice.lines],
            left_out=said["left out"],
        )

    def question(self, points: pd.DataFrame) -> str:
        """How much memory, and which policy."""
        system = self.advice.system
        return (
            f"How much GPU memory does {system['geometry']} (experts in {system['expert_dtype']}) "
            f"need on {system['hardware']} to meet the target, and with which expert caching or "
            "prefetching policy?"
        )

    def facts(self) -> list[tuple[str, list[str]]]:
        """Target, memory, and which policies were to choose from."""
        _, target, memory, _ = self._sections["question"]
        named = [_choice_text(choice) for choice in self.advice.question.policies]
        usual = "all lossless ones that know no future"
        return [
            ("Target", [_capital(target)]),
            ("Memory", [_capital(memory)]),
            ("Policies to choose from", [", ".join(named) or usual]),
        ]

    def judged(self, frame: pd.DataFrame) -> pd.DataFrame:
        """By the percentile and the memory asked for; of equal points, an answer is kept."""
        percentile = self.advice.question.percentile
        frame = frame.assign(
            **{f"{name}.mean": frame[f"{name}.{percentile}"] for name in ("tpot_ms", "ttft_ms")}
        )
        frame["memory.fits"] = frame["memory.peak_bytes"] <= self.advice.system["limit_bytes"]
        answers = {found.point_id for found in self._answers}
        return frame.sort_values(
            "point_id", key=lambda ids: ~ids.isin(answers), kind="stable", ignore_index=True
        )

    def named(self, points: pd.DataFrame) -> pd.DataFrame:
        """Slots a layer, or the whole memory in GiB."""
        limit = as_gib(self.advice.system["limit_bytes"])
        given = points["point.expert_budget"].where(points["point.budget"].isna(), limit)
        return points.assign(budget=given.where(given.notna(), points["budget"]))

    @property
    def _answers(self) -> list[Found]:
        """One of each system, as far as there is one."""
        found = [self.advice.chosen, *map(self._chosen_if, self.advice.what_ifs)]
        return [each for each in found if each is not None]

    def _chosen_if(self, what_if: WhatIf) -> Found | None:
        smallest = what_if.smallest
        limit = self.advice.system["limit_bytes"]
        met = smallest is not None and smallest.gpu_memory_bytes <= limit
        return smallest if met else what_if.fastest

    def pick(self, points: pd.DataFrame) -> Row | None:
        """The answer on this system."""
        rows = points[points["point_id"].isin([found.point_id for found in self._answers])]
        return None if rows.empty else rows.iloc[0]

    def first(self, points: pd.DataFrame) -> str:
        """The system asked about; the others are what-ifs."""
        own = points["point_id"] == self.advice.everything.point_id
        return str(points.loc[own, "system"].iloc[0])


def _capital(line: str) -> str:
    """What a line says after its name."""
    said = line.partition(": ")[2]
    return said[:1].upper() + said[1:]


def _words(question: Question) -> list[str]:
    words = []
    for name, option in _OPTIONS.items():
        value = getattr(question, name)
        if value != Question.model_fields[name].default:
            words += [option, _text(value)]
    return words if question.what_if else [*words, "--no-what-if"]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_choice_text, value))
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value)


def _choice_text(choice: PolicyChoice) -> str:
    return ":".join([choice.name, *(f"{name}={value}" for name, value in choice.set.items())])


def read_advised(directory: Path, identity: dict[str, Any]) -> Advised:
    """The answers that a directory keeps to the question of its ``identity``.

    Raises UserError where they are missing, damaged, or those to another question.
    """
    path = directory / ANSWER_FILE
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {_AGAIN}") from None
    except ValueError:
        raise UserError(f"{path} is cut off or edited: {_AGAIN}") from None
    advice = _validated(data, path)
    validated(_System, advice.system, f"{path}, system")
    if advice.question.model_dump(mode="json") != identity["question"]:
        raise UserError(f"{path} answers another question than the directory's: {_AGAIN}")
    return Advised(advice)


def _validated(data: Any, path: Path) -> Advice:
    try:
        return TypeAdapter(Advice).validate_python(data)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
