"""Sweeps on any backend: the same bytes, the trace sent once a worker, lost workers."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

import cli
import sim.running as running_module
from configs.errors import UserError
from sim import SweepConfig, backends, sweep
from sim.backend_cluster import ClusterBackend
from sim.same_code import check_same_code, fingerprint
from tests.clusters import ROOT, Cluster, dask_cluster, ray_cluster, ray_workers, wait_until
from tests.traces import make_trace
from tracer.trace import Trace, load_arrays

pytest.importorskip("distributed", reason="needs Dask: pip install 'moesim[dask]'")
import sim.backend_dask as dask_module

RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'moesim[ray]'")
HARDWARE = ROOT / "configs" / "hardware" / "t4-pcie3.yaml"
TABLES = ("results.parquet", "results.csv")
POLICIES = ["resident", "lru", "lfu", "slru", "static", "belady", "next-gate", "oracle-prefetch"]
FAILING = "1%"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the client works: its paths mean nothing in the workers' directories."""
    path = tmp_path_factory.mktemp("client")
    columns = ("weights", "lookahead_1")
    make_trace(path / "trace", layers=3, experts=8, top_k=2, requests=6, seed=3, columns=columns)
    (path / "mine.yaml").write_text(HARDWARE.read_text().replace("t4-pcie3", "mine"))
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


@pytest.fixture(scope="module")
def config(here: Path) -> SweepConfig:
    fields: dict[str, Any] = {
        "trace": "./trace",
        "hardware": ["mine.yaml", "rtx4090-pcie4"],
        "links": ["12GB/s", "24GB/s"],
        "expert_budgets": ["25%", "50%", FAILING],
        "policies": POLICIES,
        "max_tokens": 60,
    }
    return SweepConfig(**fields)


@pytest.fixture(scope="module")
def expected(here: Path, config: SweepConfig) -> Path:
    """The results of one process."""
    sweep(config, out=here / "expected")
    return here / "expected"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with dask_cluster(tmp_path_factory.mktemp("dask") / "cluster", workers=2) as started:
        yield started


def assert_equal_bytes(out: Path, expected: Path) -> None:
    for name in TABLES:
        assert (out / name).read_bytes() == (expected / name).read_bytes()


# Dask


def test_a_killed_worker_costs_nothing(
    cluster: Cluster, config: SweepConfig, expected: Path, tmp_path: Path
) -> None:
    """One of two is killed in mid-sweep: its points run again, results are equal to the byte."""
    killed = []

    def kill_one(done: int, total: int) -> None:
        if not killed and done >= total // 4:
            killed.append(cluster.processes()[0])
            os.kill(killed[0], signal.SIGKILL)
            wait_until(lambda: cluster.logged("bytes of arrays") == 3)

    frame = sweep(
        config, out=tmp_path, backend="dask", scheduler=cluster.address, progress=kill_one
    )
    assert_equal_bytes(tmp_path, expected)
    assert killed
    assert set(frame["status"]) == {"ok", "failed"}
    begun = Counter(cluster.begun())
    assert set(begun) == set(frame["point_id"])
    again = [name for name, times in begun.items() if times > 1]
    assert again
    # The other worker went on: not all was lost.
    assert len(again) < len(frame)
    # Two processes and the one that took the place of the killed one, once each.
    assert cluster.logged("bytes of arrays") == 3
    assert cluster.logged("Removing Worker plugin moesim-") == 2


def test_points_that_kill_their_workers_end_the_sweep_and_a_task_is_named(
    cluster: Cluster, config: SweepConfig, expected: Path, tmp_path: Path
) -> None:
    poison = cluster.path / "poison"
    poison.write_text("slru")
    try:
        with pytest.raises(UserError, match="2 workers died one after the other") as caught:
            sweep(config, out=tmp_path, backend="dask", scheduler=cluster.address)
    finally:
        poison.unlink()
    message = str(caught.value)
    # A task's points; whether slru's own or those next in line with both workers is Dask's choice.
    named = re.search(r"under way: (.*?)( and \d more)?; finished points are kept", message)
    assert named is not None
    points = named[1].split("; ")
    assert len({point.split(" over ")[0].split(" on ")[0] for point in points}) == 1, message
    assert len(points) >= 2
    assert "\n" not in message
    kept = (tmp_path / "points.jsonl").read_text().splitlines()
    assert len(kept) >= 4
    assert not (tmp_path / "results.csv").exists()
    # The same command goes on; at most two tasks at a time this time.
    sweep(config, out=tmp_path, backend="dask", scheduler=cluster.address, jobs=2)
    assert_equal_bytes(tmp_path, expected)


def test_workers_of_another_version_are_refused() -> None:
    """All that are there, before anything is sent to them."""
    check_same_code(fingerprint())
    found: dict[str, Any] = {"tcp://w1": fingerprint(), "tcp://w2": fingerprint()}
    client = SimpleNamespace(run=lambda function, on_error: found)
    dask_module._check_workers(client)
    found["tcp://w2"] = {**fingerprint(), "NumPy": "1.0"}
    with pytest.raises(UserError, match=r"worker tcp://w2 has another version \(NumPy 1\.0, here "):
        dask_module._check_workers(client)
    found["tcp://w2"] = ModuleNotFoundError("No module named 'sim'")
    with pytest.raises(UserError, match=r"worker tcp://w2 cannot run moesim .*No module named"):
        dask_module._check_workers(client)


def test_a_worker_that_joins_later_is_checked_too(
    cluster: Cluster, config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its tasks, which carry what the client has."""
    ours = {**fingerprint(), "moesim": "0123456789abcdef"}
    monkeypatch.setattr(running_module, "fingerprint", lambda: ours)
    with pytest.raises(UserError, match=r"worker .* has another version \(moesim .*, here 0123456"):
        sweep(config, backend="dask", scheduler=cluster.address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "zzz://127.0.0.1:1"])
def test_a_scheduler_that_is_not_there_is_one_line(
    config: SweepConfig,
    expected: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, soon, and what is there stays as it is."""
    monkeypatch.setattr(dask_module, "CONNECT_S", 0.3)
    line = (expected / "points.jsonl").read_text().splitlines()[0]
    (tmp_path / "sweep.json").write_bytes((expected / "sweep.json").read_bytes())
    (tmp_path / "points.jsonl").write_text(f"{line}\n")
    (tmp_path / "results.csv").write_text("as it was")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", command(config, tmp_path, "--backend=dask", address))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"moesim: error: --scheduler {address}: no Dask scheduler answers there"
    )
    assert error.count("\n") == 1
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before}
    assert after == before


def command(config: SweepConfig, out: Path, backend: str, address: str) -> list[str]:
    path = out / "config.yaml"
    path.write_text(config.model_dump_json(exclude_none=True))
    return ["moesim", "sweep", str(path), "--out", str(out), backend, "--scheduler", address]


def test_a_cluster_without_workers_is_one_line(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_module, "CONNECT_S", 1)
    with (
        dask_module.LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as empty,
        pytest.raises(UserError, match="it has no workers; start some with `dask worker tcp://"),
    ):
        sweep(config, backend="dask", scheduler=empty.scheduler_address)


def test_a_cluster_that_lost_all_workers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_module, "NO_WORKER_S", 0)
    monkeypatch.setattr(dask_module, "LOOK_S", 0.01)
    given_up: list[Exception] = []
    dask_module._watch(lambda: False, threading.Event(), given_up.append)
    assert "has had no worker for 0 s" in str(given_up[0])
    stop = threading.Event()

    def one_look() -> bool:
        stop.set()
        return True

    dask_module._watch(one_look, stop, given_up.append)
    assert len(given_up) == 1


@pytest.mark.exhaustive
def test_a_scheduler_that_dies_is_one_line(
    config: SweepConfig, expected: Path, tmp_path: Path
) -> None:
    with dask_cluster(tmp_path / "cluster", workers=1) as cluster:

        def kill_the_scheduler(done: int, total: int) -> None:
            if done >= 4:
                cluster.scheduler.kill()

        with pytest.raises(UserError, match="connection to the Dask scheduler was lost; under way"):
            sweep(
                config,
                out=tmp_path / "out",
                backend="dask",
                scheduler=cluster.address,
                progress=kill_the_scheduler,
            )
    sweep(config, out=tmp_path / "out")
    assert_equal_bytes(tmp_path / "out", expected)


@pytest.mark.exhaustive
def test_a_worker_without_moesim_is_one_line(config: SweepConfig, tmp_path: Path) -> None:
    """Another program's ``sim`` is first on its path.

    An editable installation still finds modules in ours, of which the digest is another then.
    """
    (tmp_path / "other" / "sim").mkdir(parents=True)
    (tmp_path / "other" / "sim" / "__init__.py").write_text("")
    with dask_cluster(tmp_path / "cluster", workers=0) as cluster:
        cluster.start_worker(preload=False, PYTHONPATH=str(tmp_path / "other"))
        said = r"(cannot run moesim|has another version) .*install the same"
        with pytest.raises(UserError, match=said):
            sweep(config, backend="dask", scheduler=cluster.address)


# Processes of our own


@pytest.mark.parametrize(
    "backend", ["dask", pytest.param("ray", marks=[RAY, pytest.mark.exhaustive])]
)
def test_same_bytes_on_any_backend(
    config: SweepConfig, expected: Path, tmp_path: Path, backend: str
) -> None:
    """As those of one process; tests/test_sweep.py has joblib's own."""
    before = set(psutil.Process().children(recursive=True))
    sweep(config, out=tmp_path, backend=backend, jobs=2)
    assert_equal_bytes(tmp_path, expected)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [child for child in left if is_alive(child) and "tracker" not in child.cmdline()[-1]]


def test_a_killed_process_of_joblibs_costs_nothing(
    config: SweepConfig,
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed = []

    def kill_one(done: int, total: int) -> None:
        if done and not killed:
            killed.append(loky_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    sweep(config, out=tmp_path, jobs=2, progress=kill_one)
    assert_equal_bytes(tmp_path, expected)
    assert capsys.readouterr().err.count("a worker was lost; its points run again") == 1


def test_processes_of_joblibs_that_are_killed_again_and_again_end_the_sweep(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "RESTARTS", 0)

    killed = []

    def kill_one(done: int, total: int) -> None:
        if done and not killed:
            killed.append(loky_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(UserError, match=r"worker processes were killed 1 times.*lower --jobs; und"):
        sweep(config, jobs=2, progress=kill_one)


def loky_workers() -> list[int]:
    children = [child for child in psutil.Process().children(recursive=True) if is_alive(child)]
    return [child.pid for child in children if "popen_loky" in " ".join(child.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("backend", ["dask", pytest.param("ray", marks=RAY)])
@pytest.mark.exhaustive
def test_a_sweep_that_is_stopped_leaves_no_workers(
    here: Path, tmp_path: Path, backend: str, number: signal.Signals
) -> None:
    """Ctrl-C goes to all processes of a terminal, SIGTERM to one."""
    config, out = tmp_path / "sweep.yaml", tmp_path / "out"
    budgets = ", ".join(f"{30 + index / 100}%" for index in range(2000))
    config.write_text(
        f"trace: {here / 'trace'}\nhardware: [t4-pcie3]\nexpert_budgets: [{budgets}]\n"
        "policies: [lru]\n"
    )
    heeds_sigint = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    words = ["sweep", str(config), "--out", str(out), "--jobs", "2", "--backend", backend]
    running = subprocess.Popen(
        [sys.executable, "-c", f"{heeds_sigint}; import cli; cli.main()", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    points = out / "points.jsonl"
    try:
        wait_until(lambda: points.is_file() and points.stat().st_size > 0, within_s=180)
        children = psutil.Process(running.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        _, err = running.communicate(timeout=60)
    finally:
        if running.poll() is None:  # or all that comes after would run beside it
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
    assert running.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    wait_until(lambda: not [child for child in children if is_alive(child)])


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Ray


@pytest.mark.exhaustive
@RAY
def test_a_ray_cluster_gets_the_arrays_and_runs_lost_points_again(
    config: SweepConfig, expected: Path, tmp_path: Path
) -> None:
    """A cluster that was there before: `ray start --head`; one of its workers is killed."""
    with ray_cluster(tmp_path / "ray") as (address, head):
        killed = []

        def kill_one(done: int, total: int) -> None:
            if done >= total // 4 and not killed:
                killed.append(ray_workers(head)[0])
                os.kill(killed[0], signal.SIGKILL)

        sweep(
            config,
            out=tmp_path / "out",
            backend="ray",
            scheduler=address,
            jobs=2,
            progress=kill_one,
        )
    assert killed
    assert_equal_bytes(tmp_path / "out", expected)


def test_a_task_that_a_worker_cannot_read_is_one_line() -> None:
    def unreadable() -> Any:
        raise ModuleNotFoundError("No module named 'sim'")

    backend = ClusterBackend(lambda task: None, lambda future, task: None, cores=1)
    with pytest.raises(
        UserError, match=r"a worker cannot run moesim \(ModuleNotFoundError: No mod"
    ):
        backend.retrieve_result_callback(unreadable)
    assert backend.effective_n_jobs(1) == 2


# What is chosen


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ({"name": "spark"}, "--backend spark is unknown: choose loky, dask, ray"),
        ({"name": "loky", "jobs": 0}, "--jobs 0: give at least 1"),
        ({"name": "dask", "jobs": -1}, "--jobs -1: give at least 1"),
        ({"name": "loky", "scheduler": "x:1"}, "--scheduler x:1: give --backend dask or ray"),
    ],
)
def test_wrong_choices_are_one_line(chosen: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        backends.choose(**chosen)


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_extra_names_its_installation(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        sweep(config, backend=backend)
    assert str(caught.value) == (
        f"--backend {backend}: {package} is not installed; run pip install 'moesim[{backend}]'"
    )


def test_arrays_travel_whole_and_read_only(here: Path, tmp_path: Path) -> None:
    trace = Trace.open(here / "trace")
    columns = ["request", "experts", "weights"]
    trace.export_arrays(tmp_path / "arrays", columns)
    sent = pickle.loads(pickle.dumps(load_arrays(tmp_path / "arrays")))
    shutil.rmtree(tmp_path / "arrays")
    assert sent.digest == trace.digest
    assert sent.nbytes == sum(array.nbytes for array in trace.load(columns).values())
    pd.testing.assert_frame_equal(sent.requests(), trace.requests())
    for name, rows in trace.load(columns).items():
        np.testing.assert_array_equal(sent.load([name])[name], rows)
        with pytest.raises(ValueError, match="read-only"):
            sent.load([name])[name][0] = 0
    again = pickle.loads(pickle.dumps(sent))
    pd.testing.assert_frame_equal(again.requests(), trace.requests())
