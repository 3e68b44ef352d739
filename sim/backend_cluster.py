"""joblib's side of a cluster: what its Dask and Ray backends have in common.

Neither backend that comes with them serves here. joblib's of Dask waits for ever for a result of a
task that Dask gave up, runs all tasks in the client where a cluster has one core, and opens a
client in every worker; Ray's cannot hand results on as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from joblib.parallel import ParallelBackendBase

from configs.errors import UserError

Callback = Callable[[Any], None]


def cannot_run(worker: str, error: BaseException) -> UserError:
    """The error for a worker without moesim, or with one of another age."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        f"{worker} cannot run moesim ({reason}): install the same version on all machines and "
        "start the workers again"
    )


@dataclass(frozen=True)
class Cluster:
    """Workers of a running cluster, or without its address ``jobs`` of our own."""

    jobs: int | None
    scheduler: str | None

    def in_this_process(self, tasks: int) -> bool:
        """Never: who names a backend wants its workers."""
        return False

    def options(self, backend: ParallelBackendBase) -> dict[str, Any]:
        """Joblib's: a task at a time, and no more under way in a running cluster than ``jobs``."""
        at_once = "all" if self.scheduler is None or self.jobs is None else self.jobs
        return {"backend": backend, "batch_size": 1, "pre_dispatch": at_once}


class ClusterBackend(ParallelBackendBase):
    """Hands tasks of :func:`sim.running.work` to a cluster, one at a time.

    ``start``: submits a callable and returns a future with ``add_done_callback``. ``result_of``:
    its result, or the error to be raised. ``cores``: of the cluster.
    """

    supports_retrieve_callback = True

    def __init__(
        self, start: Callable[[Any], Any], result_of: Callable[[Any, int], Any], cores: int
    ) -> None:
        super().__init__()
        self._start = start
        self._result_of = result_of
        self._cores = cores
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Callback, Any]] = {}

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Two at least: with one, joblib takes the tasks into this process."""
        return max(2, self._cores)

    def submit(self, func: Any, callback: Callback) -> Any:
        """Start a task."""
        task: int = func.items[0][1][1]
        future = self._start(func)
        with self._lock:
            self._waiting[task] = callback, future
        future.add_done_callback(lambda done: self._done(task, lambda: self._result_of(done, task)))
        return future

    def _done(self, task: int, outcome: Callable[[], Any]) -> None:
        with self._lock:
            callback, _ = self._waiting.pop(task, (None, None))
        if callback is not None:
            callback(outcome)

    def retrieve_result_callback(self, out: Callable[[], Any]) -> Any:
        """What :meth:`_done` was given: a result or an error."""
        try:
            return out()
        except (ImportError, AttributeError) as error:  # the task could not be unpickled there
            raise cannot_run("a worker", error) from error

    def give_up(self, error: BaseException) -> None:
        """End the sweep with an error, whatever the cluster does."""

        def failed() -> Any:
            raise error

        for task in list(self._waiting):
            self._done(task, failed)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Ask the cluster to drop what it has not begun."""
        with self._lock:
            futures = [future for _, future in self._waiting.values()]
            self._waiting.clear()
        for future in futures:
            future.cancel()
