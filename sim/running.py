"""Running a sweep's points: in this process, or by joblib in the workers of a backend.

Points that take the same decisions are one task. A worker opens the trace once, from wherever its
backend put it (:mod:`sim.backends`), and makes its inputs once.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

import policies
from configs.errors import UserError
from configs.load import sent_files, user_files
from policies.errors import PolicyError
from sim.backends import Backend, Source, Workers, WorkersLost
from sim.inputs import BASE_COLUMNS, Inputs, TraceSource
from sim.point import (
    Point,
    PointRunner,
    can_share_decisions,
    decisions_of,
    timed_geometry,
)
from sim.rows import Row, made_by, run_row
from sim.same_code import Fingerprint, check_same_code, fingerprint
from tracer.trace import load_arrays

Group = dict[str, Point]
"""Points by their ids, run one after the other."""


@contextmanager
def running(
    trace: TraceSource, points: Mapping[str, Point], backend: Backend
) -> Iterator[Iterator[Row]]:
    """Rows as they come. What would stop all points is raised at the start."""
    groups = group_points(points)
    if not groups or backend.in_this_process(len(groups)):
        shared = _shared_inputs(trace)
        _check_first(shared, points)
        yield (row for group in groups for row in _run_rows(shared, group))
        return
    with _exported(trace, points.values()) as directory:
        arrays = load_arrays(directory)
        _check_first(_shared_inputs(arrays), points)
        with backend.workers(arrays) as workers:
            job = _Job(workers.source, fingerprint(), _files_of(points.values()))
            with closing(_Run(job, groups, workers).rows()) as rows:
                yield rows


def group_points(points: Mapping[str, Point]) -> list[Group]:
    """Points that take the same decisions on other machines together, the others alone."""
    groups: dict[str, Group] = {}
    for name, point in points.items():
        key = decisions_of(point) if can_share_decisions(point) else name
        groups.setdefault(key, {})[name] = point
    return list(groups.values())


def _check_first(shared: _Shared, points: Mapping[str, Point]) -> None:
    """All points of a sweep time one geometry, on the same rows."""
    for point in list(points.values())[:1]:
        timed_geometry(shared.get(point), point)


@contextmanager
def _exported(trace: TraceSource, points: Collection[Point]) -> Iterator[str]:
    """The columns and rows that the points need, once, for all workers."""
    wanted = set(BASE_COLUMNS)
    for point in points:
        wanted |= set(_needed_columns(point)) & set(trace.columns())
    limits = [point.max_tokens for point in points]
    stop = None if None in limits else max(limit for limit in limits if limit is not None)
    with tempfile.TemporaryDirectory(prefix="moesim-") as scratch:
        directory = Path(scratch) / "trace"
        trace.export_arrays(directory, sorted(wanted), 0, stop)  # type: ignore[attr-defined]
        yield str(directory)


def _needed_columns(point: Point) -> tuple[str, ...]:
    info = policies.get(point.policy)
    try:
        params, _ = info.parse(point.params)
    except PolicyError:
        return ()  # the point fails by itself, with this error in its row
    return info.all_columns(params)


def _files_of(points: Collection[Point]) -> dict[str, str]:
    """Text of the users' own files that the points name: a worker's machine may lack them."""
    return {
        **user_files({point.hardware for point in points}, "hardware"),
        **user_files({point.geometry for point in points if point.geometry}, "models"),
    }


# ---------------------------------------------------------------------- here


@dataclass
class _Run:
    """Tasks in workers; those of lost workers are started again, within reason."""

    job: _Job
    groups: list[Group]
    workers: Workers
    _under_way: dict[int, Group] = field(default_factory=dict)

    def rows(self) -> Generator[Row, None, None]:
        """Rows as they come."""
        waiting = dict(enumerate(self.groups))
        produced = made_by()
        for lives in range(self.workers.restarts, -1, -1):
            try:
                with self._results(waiting) as results:
                    for index, rows in results:
                        del waiting[index]
                        del self._under_way[index]
                        # The code is the same (fingerprint); whether git is there is not.
                        yield from ({**row, **produced} for row in rows)
                return
            except self.workers.lost as error:
                if not lives:
                    raise UserError(self._lost(error)) from error
            self._under_way.clear()
            print("moesim: note: a worker was lost; its points run again", file=sys.stderr)

    @contextmanager
    def _results(self, waiting: Mapping[int, Group]) -> Iterator[Iterator[tuple[int, list[Row]]]]:
        parallel = Parallel(return_as="generator_unordered", **self.workers.options)
        results = parallel(self._tasks(waiting))
        try:
            yield results
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # joblib's, that closing it cancels its tasks
                results.close()

    def _tasks(self, waiting: Mapping[int, Group]) -> Iterator[Any]:
        for index, group in list(waiting.items()):
            self._under_way[index] = group
            yield delayed(work)(
                self.job, index, {name: point.model_dump() for name, point in group.items()}
            )

    def _lost(self, error: BaseException) -> str:
        why, groups = self.workers.why, self._under_way
        if isinstance(error, WorkersLost):
            why = str(error)
            groups = groups if error.task is None else {error.task: self.groups[error.task]}
        points = [point for group in groups.values() for point in group.values()]
        return (
            f"{why}; under way: {_named(points)}; finished points are kept, and the same command "
            "goes on where it stopped"
        )


def _named(points: list[Point], most: int = 3) -> str:
    more = f" and {len(points) - most} more" if len(points) > most else ""
    return "; ".join(map(describe, points[:most])) + more


def describe(point: Point) -> str:
    """A point in a few words."""
    budget = point.budget or point.expert_budget
    link = f" over {point.link}" if point.link else ""
    return f"{point.label}{f' at {budget}' if budget else ''} on {point.hardware}{link}"


# ---------------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class _Job:
    """What all tasks of a sweep have in common."""

    source: Source
    fingerprint: Fingerprint
    files: dict[str, str]


_one_at_a_time = threading.Lock()


def work(job: _Job, index: int, points: dict[str, dict[str, Any]]) -> tuple[int, list[Row]]:
    """Runs in a worker: points that belong together, on the worker's one copy of the trace.

    Threads of one worker take turns: they share its inputs.
    """
    check_same_code(job.fingerprint)
    with _one_at_a_time, sent_files(job.files):
        parsed = {name: Point.model_validate(point) for name, point in points.items()}
        return index, list(_run_rows(_inputs_of(job.source), parsed))


@lru_cache(maxsize=1)
def _inputs_of(source: Source) -> _Shared:
    return _shared_inputs(source.open())


class _Shared:
    """Inputs by what they depend on, made once."""

    def __init__(self, make: Callable[[Point], Inputs]) -> None:
        self._make = make
        self._known: dict[tuple[Any, ...], Inputs] = {}

    def get(self, point: Point) -> Inputs:
        key = (point.max_tokens, point.fit_share, point.learned, point.batch, point.context)
        if key not in self._known:
            self._known[key] = self._make(point)
        return self._known[key]


def _shared_inputs(trace: TraceSource) -> _Shared:
    return _Shared(
        lambda point: Inputs(
            trace,
            max_tokens=point.max_tokens,
            fit_share=point.fit_share or 0.0,
            learned=point.learned,
            batch=point.batch,
            context=point.context,
        )
    )


def _run_rows(shared: _Shared, group: Group) -> Iterator[Row]:
    runner = PointRunner(shared.get(next(iter(group.values()))))
    return (run_row(runner, name, point) for name, point in group.items())
