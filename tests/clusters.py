"""Dask and Ray clusters of real processes on this machine, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster_worker import CONTROL

ROOT = Path(__file__).parents[1]
DEADLINE_S = 60


@dataclass
class Cluster:
    """A scheduler and its workers; ``path`` holds their logs and what controls the workers."""

    path: Path
    scheduler: subprocess.Popen[bytes]
    address: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_worker(self, preload: bool = True, **environment: str) -> None:
        """With one thread, in another directory; started again as it dies."""
        log = self.path / f"worker-{len(self.workers)}.log"
        options = ["--nthreads", "1"]
        if preload:
            options += ["--preload", str(ROOT / "tests" / "cluster_worker.py")]
        self.workers.append(_start(self.path, log, "worker", self.address, *options, **environment))

    def processes(self) -> list[int]:
        """Ids of the processes that compute, in the order of their workers."""
        return [
            child.pid
            for worker in self.workers
            for child in psutil.Process(worker.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]

    def logged(self, text: str) -> int:
        """Lines of the workers' logs that hold ``text``."""
        logs = self.path.glob("worker-*.log")
        return sum(text in line for log in logs for line in log.read_text().splitlines())

    def begun(self) -> list[str]:
        """Points in the order in which they began, one as often as it was begun."""
        lines = (self.path / "begun").read_text().splitlines()
        return [name for line in lines for name in line.split()[1:]]


@contextmanager
def dask_cluster(path: Path, workers: int, allowed_failures: int = 1) -> Iterator[Cluster]:
    """A cluster on 127.0.0.1; ``allowed_failures``: deaths at a task before Dask gives it up."""
    path.mkdir()
    found = path / "scheduler.json"
    failures = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
    scheduler = _start(
        path,
        path / "scheduler.log",
        "scheduler",
        *("--port", "0", "--scheduler-file", str(found)),
        **failures,
    )
    cluster = Cluster(path, scheduler)
    try:
        wait_until(lambda: found.exists() and bool(found.read_text()))
        cluster.address = json.loads(found.read_text())["address"]
        for _ in range(workers):
            cluster.start_worker()
        wait_until(lambda: cluster.logged("Registered to:") >= workers)
        yield cluster
    finally:
        for process in [*cluster.workers, scheduler]:
            _kill(process)


def _start(
    path: Path, log: Path, kind: str, *options: str, **environment: str
) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", f"distributed.cli.dask_{kind}"),
                *("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", *options),
            ],
            cwd=path,
            env={**os.environ, "PYTHONPATH": str(ROOT), CONTROL: str(path), **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started; the parent first, which would start children again."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def wait_until(met: Callable[[], bool], within_s: float = DEADLINE_S) -> None:
    """Fail where that does not come to be in time."""
    deadline = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.02)


@contextmanager
def ray_cluster(path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Address of a cluster of two cores on this machine, and the process that starts its workers.

    Ray's own script would stop every cluster of this machine, so it runs in the foreground.
    """
    path.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    words += ["--node-ip-address=127.0.0.1", f"--port={port}", "--disable-usage-stats"]
    with (path / "ray.log").open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *words],
            cwd=path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    head = psutil.Process(process.pid)
    try:
        wait_until(lambda: "Ray runtime started" in (path / "ray.log").read_text())
        yield f"127.0.0.1:{port}", head
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def ray_workers(head: psutil.Process) -> list[int]:
    """Processes that run a task of ours."""
    children = head.children(recursive=True)
    return [child.pid for child in children if child.name().startswith(("ray::_run", "ray::IDLE"))]
