"""Whose processes run a sweep's points: joblib's own (loky), or those of Dask or Ray.

Each backend says where its workers find the trace, and how :class:`joblib.Parallel` reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from joblib.externals.loky.process_executor import BrokenProcessPool

from configs.errors import UserError
from sim.inputs import TraceSource
from tracer.arrays import ArrayTrace, load_arrays

NAMES = ("loky", "dask", "ray")
PACKAGES = {"dask": "distributed", "ray": "ray"}
RESTARTS = 3
CONNECT_S = 10
"""How long a scheduler may take to answer."""


class Source(Protocol):
    """Where a worker finds the trace; hashable, and small when pickled."""

    def __hash__(self) -> int: ...

    def open(self) -> TraceSource: ...


@dataclass(frozen=True)
class Mapped:
    """Exported arrays on a disk that the worker sees: all map one copy."""

    directory: str

    def open(self) -> TraceSource:
        """Map them."""
        return load_arrays(self.directory)


class WorkersLost(Exception):
    """Workers died or left, and what they ran is not run again. ``task``: whose fault, if known."""

    def __init__(self, why: str, task: int | None = None) -> None:
        super().__init__(why)
        self.task = task


@dataclass
class Workers:
    """Workers that are there, and what to do when they are lost.

    ``options``: of joblib.Parallel. ``lost``: what it raises then; the missing tasks are started
    again ``restarts`` times before it ends the sweep, with ``why`` where the error has no words.
    """

    source: Source
    options: dict[str, Any]
    lost: tuple[type[BaseException], ...] = (WorkersLost,)
    restarts: int = 0
    why: str = field(default="")


class Backend(Protocol):
    """Where points run."""

    def in_this_process(self, tasks: int) -> bool:
        """Whether so many tasks need no workers at all."""
        ...

    def workers(self, arrays: ArrayTrace) -> AbstractContextManager[Workers]:
        """Workers that can open ``arrays``; those of ours end with the block."""
        ...


@dataclass(frozen=True)
class Loky:
    """Processes of joblib's on this machine."""

    jobs: int

    def in_this_process(self, tasks: int) -> bool:
        """One process would be this one."""
        return self.jobs == 1 or tasks < 2

    @contextmanager
    def workers(self, arrays: ArrayTrace) -> Iterator[Workers]:
        """They map the arrays that were exported."""
        yield Workers(
            Mapped(str(arrays.path)),
            {"backend": "loky", "n_jobs": self.jobs},
            lost=(BrokenProcessPool,),
            restarts=RESTARTS,
            why=f"worker processes were killed {RESTARTS + 1} times (out of memory?): lower --jobs",
        )


def choose(name: str, jobs: int | None = None, scheduler: str | None = None) -> Backend:
    """The backend ``loky``, ``dask`` or ``ray``.

    ``jobs``: processes on this machine (1 if not given); with a ``scheduler``, which is the address
    of a running Dask or Ray cluster, the most tasks under way there at a time (all if not given).

    Raises UserError for what is unknown, contradicts itself or is not installed.
    """
    if name not in NAMES:
        raise UserError(f"--backend {name} is unknown: choose {', '.join(NAMES)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    if name == "loky":
        if scheduler is not None:
            raise UserError(f"--scheduler {scheduler}: give --backend dask or ray with it")
        return Loky(jobs or 1)
    _require(name)
    if name == "dask":
        from sim.backend_dask import Dask

        return Dask(jobs, scheduler)
    from sim.backend_ray import Ray

    return Ray(jobs, scheduler)


def _require(name: str) -> None:
    try:
        import_module(PACKAGES[name])
    except ImportError as error:
        raise UserError(
            f"--backend {name}: {error.name or PACKAGES[name]} is not installed; run pip install "
            f"'moesim[{name}]'"
        ) from None
