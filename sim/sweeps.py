"""Sweeps: policies x budgets x links x hardware, one row a point.

Points are independent; they run in this process or in joblib's workers (:mod:`sim.running`), on one
machine or many. Finished points are appended to ``points.jsonl`` as they come, so a
sweep that was broken off goes on where it stopped. At the end ``results.parquet`` and
``results.csv`` hold all rows in the order of the configuration, whoever ran them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
import pyarrow as pa
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

import policies
from configs.errors import UserError
from configs.files import draft_of, write_atomically
from configs.geometry import load_geometry
from configs.hardware import load_hardware
from configs.load import find, parse_json, read_yaml
from configs.units import parse_bytes, parse_expert_budget, parse_rate
from sim import backends
from sim.inputs import TraceSource, learned_among
from sim.point import DEFAULT_FIT_SHARE, Point, linked, produced_by
from sim.rows import Row, canonical
from sim.running import running
from tracer.trace import Trace
from tracer.workload import TOUCH_ORDERS

CONFIG_FILE, POINTS_FILE = "sweep.json", "points.jsonl"
PARQUET_FILE, CSV_FILE = "results.parquet", "results.csv"
RESULTS_SCHEMA = 3  # of a row; rows of different schemas do not share a directory

Progress = Callable[[int, int], None]
Rows = Iterable[dict[str, Any]]
Scalar = str | int | float | bool
NumberOrText = Annotated[str, Field(coerce_numbers_to_str=True)]

_MAX_INT = 2**62


class PolicyChoice(BaseModel):
    """A policy of a sweep: a bare name, or ``{name: ..., set: {...}}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    set: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether requests must be set aside for it to learn from."""
        info = policies.get(self.name)
        return info.learns(info.parse(self.set)[1])

    @property
    def learned(self) -> tuple[str, ...]:
        """Learned columns that it reads."""
        info = policies.get(self.name)
        return learned_among(info.all_columns(info.parse(self.set)[0]))

    @field_validator("set", mode="before")
    @classmethod
    def _scalars(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, value in given.items():
                _check_scalar(name, value)
        return given


def _from_bare_names(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return tuple({"name": item} if isinstance(item, str) else item for item in value)


PolicyChoices = Annotated[tuple[PolicyChoice, ...], BeforeValidator(_from_bare_names)]
"""Policies of a file, of which a bare name is one without parameters."""


class SweepConfig(BaseModel):
    """What to sweep. Lists multiply; ``links`` empty means each hardware's own link.

    One of ``budgets`` (whole model, ``8GiB``) and ``expert_budgets`` (slots, ``25%``) is given.
    Every policy is judged on the same requests: if any of them is fitted, or its slots a layer are,
    ``fit_share`` of the requests (0.3 if not given) is set aside for all. If any of them reads a
    learned column, the requests that trained its predictor are set aside for all instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trace: str
    policies: PolicyChoices = Field(min_length=1)
    hardware: tuple[str, ...] = Field(min_length=1)
    budgets: tuple[str, ...] = ()
    expert_budgets: tuple[str, ...] = ()
    links: tuple[NumberOrText, ...] = ()
    geometry: str | None = None
    dtype: str | None = None
    window: int = Field(default=2, ge=1, le=64)
    touch_order: str = "last-use"
    max_tokens: int | None = Field(default=None, ge=1)
    fit_share: float | None = Field(default=None, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, le=2**62)
    batch: int = Field(default=1, ge=1, le=2**16)
    context: int | None = Field(default=None, ge=1, le=2**30)

    @model_validator(mode="after")
    def _one_kind_of_budget(self) -> Self:
        if bool(self.budgets) == bool(self.expert_budgets):
            raise ValueError("give one of budgets and expert_budgets")
        return self

    @property
    def judged_fit_share(self) -> float:
        """Share of the requests set aside for fitted policies."""
        if self.fit_share is not None:
            return self.fit_share
        return DEFAULT_FIT_SHARE if any(choice.learns for choice in self.policies) else 0.0

    @property
    def learned(self) -> tuple[str, ...]:
        """Learned columns that any policy reads, sorted."""
        return tuple(sorted({name for choice in self.policies for name in choice.learned}))

    def check(self) -> None:
        """Raise for what would fail every point of a kind: names, parameters, units."""
        for choice in self.policies:
            policies.get(choice.name).parse(choice.set)
        names = [load_hardware(name).name for name in self.hardware]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two hardware entries are both named {name!r}: rename one")
        if self.touch_order not in TOUCH_ORDERS:
            raise UserError(
                f"touch_order {self.touch_order!r} is unknown: choose {', '.join(TOUCH_ORDERS)}"
            )
        for name, link in product(self.hardware, self.links):
            linked(load_hardware(name), link)
        for budget in self.budgets:
            parse_bytes(budget)
        for budget in self.expert_budgets:
            parse_expert_budget(budget)
        if self.geometry is not None:
            load_geometry(self.geometry, self.dtype)

    def points(self) -> list[Point]:
        """All points in order, equal ones once, as first spelt.

        A policy that needs all experts appears once a system.
        """
        seen: dict[str, Point] = {}
        systems = list(product(self.hardware, self.links or (None,)))
        fit_share, learned = self.judged_fit_share, self.learned
        for (hardware, link), choice in product(systems, self.policies):
            for budget, expert_budget in self._budgets(choice):
                point = Point(
                    policy=choice.name,
                    params=choice.set,
                    hardware=hardware,
                    link=link,
                    budget=budget,
                    expert_budget=expert_budget,
                    geometry=self.geometry,
                    dtype=self.dtype,
                    window=self.window,
                    touch_order=self.touch_order,
                    max_tokens=self.max_tokens,
                    fit_share=fit_share,
                    learned=learned,
                    seed=self.seed,
                    batch=self.batch,
                    context=self.context,
                )
                seen.setdefault(point_id(point), point)
        return list(seen.values())

    def _budgets(self, choice: PolicyChoice) -> list[tuple[str | None, str | None]]:
        if policies.get(choice.name).needs_all:
            return [(None, None)]
        if self.budgets:
            return [(budget, None) for budget in self.budgets]
        return [(None, budget) for budget in self.expert_budgets]


def load_config(name_or_path: str | Path) -> SweepConfig:
    """A sweep of ``configs/sweeps`` by name, or a YAML file of the user's."""
    return read_yaml(SweepConfig, find(name_or_path, "sweeps", "sweep"))


def point_id(point: Point) -> str:
    """Digest of what a point's configuration says, however it is spelt: 8GiB is 8192MiB."""
    meant = {**point.model_dump(), "params": policies.get(point.policy).parse_given(point.params)}
    if point.budget is not None:
        meant["budget"] = parse_bytes(point.budget)
    if point.expert_budget is not None:
        meant["expert_budget"] = str(parse_expert_budget(point.expert_budget))
    if point.link is not None:
        meant["link"] = parse_rate(point.link)
    return hashlib.sha256(canonical(meant).encode()).hexdigest()[:16]


def _check_scalar(name: object, value: object) -> None:
    if not isinstance(value, Scalar):
        raise ValueError(f"parameter {name} is neither text, a number nor true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"parameter {name}={value} is not a finite number")
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise ValueError(f"parameter {name} is beyond +-2**62")


def sweep(
    config: SweepConfig | str | Path,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    scheduler: str | None = None,
    trace: TraceSource | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run all points; returns one row a point, in the configuration's order.

    ``config``: a :class:`SweepConfig`, the name of a shipped sweep, or a YAML file. ``out``: a
    directory for results; finished points found there are not run again. ``jobs``, ``backend``,
    ``scheduler``: who runs them, see :func:`sim.backends.choose`; results are the same.
    ``trace``: an opened trace in place of the configuration's. ``progress(done, total)`` is called
    as points finish. A point that fails is a row with ``status`` failed and its ``error``.

    Raises UserError for a wrong configuration or trace and for an ``out`` that holds another
    sweep's results, before ``progress`` is first called and anything is computed.
    """
    if not isinstance(config, SweepConfig):
        config = load_config(config)
    chosen = backends.choose(backend, jobs, scheduler)
    config.check()
    opened: TraceSource = Trace.open(config.trace) if trace is None else trace
    points = config.points()
    store = Store(None if out is None else Path(out), _identity(config, opened.digest))
    ids = [point_id(point) for point in points]
    rows = store.finished(set(ids))
    waiting = {name: point for name, point in zip(ids, points, strict=True) if name not in rows}
    with running(opened, waiting, chosen) as fresh:
        if progress is not None:
            progress(len(rows), len(points))
        for row in fresh:
            rows[row["point_id"]] = row
            store.append(row)
            if progress is not None:
                progress(len(rows), len(points))
    frame = to_frame([rows[name] for name in ids])
    store.write_tables(frame)
    return frame


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table; columns in the order in which they first appear."""
    return pd.DataFrame(list(rows))


def read_results(directory: str | Path) -> pd.DataFrame:
    """The table of a finished sweep."""
    path = Path(directory) / PARQUET_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is not there: run `moesim sweep CONFIG --out {directory}` to the end"
        )
    try:
        return pd.read_parquet(path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path} is cut off or edited ({error}); delete it and run the sweep again"
        ) from error


# ---------------------------------------------------------------------- keeping


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        begun = parse_json(path.read_bytes())
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise UserError(f"{path} is not what a sweep writes: name another --out directory")
    return begun


def _read_row(path: Path, number: int, line: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"point_id", "status"} <= row.keys():
        raise UserError(f"{path}, line {number}: no result of a sweep; delete the line to go on")
    return row


def _identity(config: SweepConfig, digest: str) -> dict[str, Any]:
    """What two runs have in common that may share a directory."""
    return {
        **config.model_dump(mode="json"),
        **contents(config.hardware, config.geometry, config.dtype),
        "trace digest": digest,
    }


def contents(
    hardware: Iterable[str], geometry: str | None, dtype: str | None = None
) -> dict[str, Any]:
    """What the named files hold, and who writes the results: a part of a directory's identity."""
    return {
        "hardware contents": [load_hardware(name).model_dump(mode="json") for name in hardware],
        "geometry contents": None
        if geometry is None
        else load_geometry(geometry, dtype).model_dump(mode="json"),
        "results schema": RESULTS_SCHEMA,
        "version": produced_by()["moesim"],
    }


class Store:
    """A directory of points' rows; with no directory, nothing is kept.

    ``identity``: JSON-ready; a directory that holds results of another one is refused (UserError).
    """

    def __init__(self, out: Path | None, identity: dict[str, Any]) -> None:
        self._out = out
        if out is not None:
            self._claim(out, identity)

    @staticmethod
    def _claim(out: Path, identity: dict[str, Any]) -> None:
        path = out / CONFIG_FILE
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file: name a directory")
        if path.is_file():
            begun = _read_identity(path)
            differs = [name for name in identity if begun.get(name) != identity[name]]
            if differs:
                raise UserError(
                    f"--out {out} holds results of another sweep (different: "
                    f"{', '.join(differs)}): name another directory"
                )
            return
        if out.exists() and set(out.iterdir()) - {draft_of(path)}:
            raise UserError(f"--out {out} is not empty and holds no sweep: name another directory")
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity, indent=1, sort_keys=True)
        write_atomically(path, f"{text}\n".encode())

    def finished(self, wanted: set[str] | None = None) -> dict[str, Row]:
        """Rows of wanted points (None: all) that succeeded before, by point.

        A last line cut off by a kill is dropped.
        """
        if self._out is None or not (self._out / POINTS_FILE).is_file():
            return {}
        path = self._out / POINTS_FILE
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_atomically(path, whole.encode())
        lines = [_read_row(path, *line) for line in enumerate(whole.splitlines(), start=1)]
        good = [row for row in lines if row["status"] == "ok"]
        if wanted is not None:
            good = [row for row in good if row["point_id"] in wanted]
        rows = {row["point_id"]: row for row in good}
        _note_other_commits(path, rows.values())
        return rows

    def append(self, row: Row) -> None:
        """Keep a finished point now."""
        if self._out is None:
            return
        with (self._out / POINTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_tables(self, frame: pd.DataFrame) -> None:
        """Parquet and CSV of all rows."""
        if self._out is None:
            return
        write_atomically(self._out / PARQUET_FILE, frame.to_parquet(index=False))
        write_atomically(self._out / CSV_FILE, frame.to_csv(index=False).encode())


def _note_other_commits(path: Path, rows: Iterable[Row]) -> None:
    """Each row names its own commit; a user who mixes them should know."""
    now = produced_by()["git"] or "unknown"
    commits = Counter(row.get("produced_by.git") or "unknown" for row in rows)
    for commit, count in commits.items():
        if commit != now:
            print(
                f"moesim: note: {path}: {count} points of commit {commit} are kept beside those of "
                f"commit {now}; for results of one commit, name another --out directory",
                file=sys.stderr,
            )
