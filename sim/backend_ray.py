"""Sweeps in the workers of a Ray cluster.

The arrays are put into Ray's object store: once on each machine, whose workers map one copy. Ray
runs a task of a lost worker again, three times at most.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody

import ray
from ray import exceptions

from configs.errors import UserError
from sim.backend_cluster import Cluster, ClusterBackend
from sim.backends import CONNECT_S, RESTARTS, Workers, WorkersLost
from sim.inputs import TraceSource
from tracer.arrays import ArrayTrace


class Ray(Cluster):
    """Ray's."""

    @contextmanager
    def workers(self, arrays: ArrayTrace) -> Iterator[Workers]:
        """Connect, and put the arrays where all machines get them; each task checks the code."""
        with _connected(self.jobs or 1, self.scheduler):
            run = ray.remote(_run).options(max_retries=RESTARTS)
            cores = int(ray.cluster_resources().get("CPU", 0))
            backend = ClusterBackend(lambda task: _Answer(run.remote(task)), _result_of, cores)
            yield Workers(Stored(ray.put(arrays)), self.options(backend))


@dataclass(frozen=True)
class Stored:
    """Arrays in the object store."""

    reference: Any

    def open(self) -> TraceSource:
        """Map them; fetched once a machine."""
        arrays: TraceSource = ray.get(self.reference)
        return arrays


def _run(task: Any) -> Any:
    return task()


class _Answer:
    """A Ray task as a future that can be cancelled."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._future = reference.future()
        self.add_done_callback = self._future.add_done_callback

    def cancel(self) -> None:
        ray.cancel(self._reference, force=True)


def _result_of(future: Any, task: int) -> Any:
    try:
        return future.result()
    except exceptions.RayTaskError as error:
        raise error.cause from error
    except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
        raise WorkersLost(
            f"{RESTARTS + 1} workers died one after the other at one task (out of memory?): give "
            "the workers more of it",
            task,
        ) from error
    except exceptions.RayError as error:
        raise WorkersLost(f"Ray gave up ({' '.join(str(error).split())})", task) from error


@contextmanager
def _connected(jobs: int, scheduler: str | None) -> Iterator[None]:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if scheduler is None:
        options |= {"address": "local", "num_cpus": jobs, "include_dashboard": False}
    else:
        _check_listens(scheduler)
        options["address"] = scheduler
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--backend ray: Ray does not start ({reason})") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # Ray puts its own in place
        yield
    finally:
        ray.shutdown()


def _check_listens(scheduler: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = scheduler.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scheduler {scheduler}: no Ray cluster answers there ({error}); give the address "
            "that `ray start --head` prints, such as 10.0.0.5:6379, or ray://10.0.0.5:10001"
        ) from None
