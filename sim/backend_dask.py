"""Sweeps in the workers of a Dask cluster.

Workers on this machine map the exported arrays. A cluster's are sent them by a worker plugin: once
to each worker process, those that join later too, which Dask's scattered data does not promise (it
is lost with the workers that hold it, and copies are dropped and fetched again).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, KilledWorker, LocalCluster, Security, WorkerPlugin
from distributed.comm import connect

from configs.errors import UserError
from sim.backend_cluster import Cluster, ClusterBackend, cannot_run
from sim.backends import CONNECT_S, Mapped, Source, Workers, WorkersLost
from sim.inputs import TraceSource
from sim.same_code import fingerprint, refuse_other
from tracer.arrays import ArrayTrace

NO_WORKER_S = 60
"""How long a cluster may be without a worker in mid-sweep."""
LOOK_S = 1

_log = logging.getLogger("distributed.moesim")  # shown as Dask's own messages are
_received: dict[str, ArrayTrace] = {}


class Dask(Cluster):
    """Dask's."""

    @contextmanager
    def workers(self, arrays: ArrayTrace) -> Iterator[Workers]:
        """Connect, compare the code, send the arrays."""
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            client = stack.enter_context(
                _own_cluster(self.jobs or 1) if self.scheduler is None else _connect(self.scheduler)
            )
            _check_workers(client)
            source: Source = Mapped(str(arrays.path))
            if self.scheduler is not None:
                source = stack.enter_context(_sent(client, arrays))
            backend = _backend(client)
            stack.enter_context(_watched(client, backend))
            yield Workers(source, self.options(backend))


@contextmanager
def _quiet() -> Iterator[None]:
    """What Dask's client logs of lost workers and schedulers, a sweep says itself, in one line."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _backend(client: Client) -> ClusterBackend:
    run = uuid.uuid4().hex

    def start(task: Any) -> Any:
        return client.submit(task, key=f"moesim-{run}-{task.items[0][1][1]}", pure=False)

    return ClusterBackend(start, _result_of, sum(client.nthreads().values()))


def _result_of(future: Any, task: int) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        # Dask does not tell which of a worker's tasks it died at: it may be the one before in line.
        raise WorkersLost(
            f"{error.allowed_failures + 1} workers died one after the other that had one task in "
            "hand or next in line (out of memory?): give the workers more of it",
            task,
        ) from error
    except CancelledError as error:
        raise WorkersLost("the connection to the Dask scheduler was lost") from error


@contextmanager
def _own_cluster(jobs: int) -> Iterator[Client]:
    # Without a limit, as joblib's own processes: a share of the memory for each would be Dask's.
    with (
        LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(_ignore_ctrl_c)
        yield client


def _ignore_ctrl_c() -> None:
    """A terminal tells all its processes; ours end when their client does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _connect(scheduler: str) -> Iterator[Client]:
    try:
        asyncio.run(asyncio.wait_for(_probe(scheduler), CONNECT_S + 1))
    except Exception as error:  # a stranger may answer anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--scheduler {scheduler}: no Dask scheduler answers there ({reason}); give the "
            "address that `dask scheduler` prints, such as tcp://10.0.0.5:8786"
        ) from error
    with Client(scheduler, timeout=CONNECT_S, set_as_default=False) as client:
        _await_a_worker(client, scheduler)
        yield client


async def _probe(scheduler: str) -> None:
    """A client that fails to connect would hang for a while as it is dropped."""
    options = Security().get_connection_args("client")
    comm = await connect(scheduler, timeout=CONNECT_S, **options)
    await comm.close()


def _await_a_worker(client: Client, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError:
        raise UserError(
            f"--scheduler {scheduler}: it has no workers; start some with `dask worker {scheduler}`"
        ) from None


def _check_workers(client: Client) -> None:
    """Later workers check themselves, in each task."""
    for worker, found in client.run(fingerprint, on_error="return").items():
        if isinstance(found, BaseException):
            raise cannot_run(f"worker {worker}", found) from found
        refuse_other(worker, fingerprint(), found)


@dataclass(frozen=True)
class Received:
    """Arrays that the worker's process was sent."""

    name: str

    def open(self) -> TraceSource:
        """The arrays."""
        return _received[self.name]


class SendArrays(WorkerPlugin):
    """Brings arrays to each worker process, once."""

    def __init__(self, name: str, arrays: ArrayTrace) -> None:
        self.name = name
        self._arrays: ArrayTrace | None = arrays

    def setup(self, worker: Any) -> None:
        """As the plugin is registered, or as the worker joins later."""
        assert self._arrays is not None
        _received[self.name] = self._arrays
        _log.info("%s: received, %d bytes of arrays", self.name, self._arrays.nbytes)

    def teardown(self, worker: Any) -> None:
        """As the sweep ends."""
        _received.pop(self.name, None)
        self._arrays = None


@contextmanager
def _sent(client: Client, arrays: ArrayTrace) -> Iterator[Source]:
    name = f"moesim-{uuid.uuid4().hex}"
    client.register_plugin(SendArrays(name, arrays), name=name)
    try:
        yield Received(name)
    finally:
        if client.status == "running":
            with suppress(OSError):  # of a worker that dies meanwhile
                client.unregister_worker_plugin(name)


@contextmanager
def _watched(client: Client, backend: ClusterBackend) -> Iterator[None]:
    """End the sweep where no worker is left and none comes: Dask itself would wait for ever."""
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(lambda: _has_workers(client), stop, backend.give_up), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(
    has_workers: Callable[[], bool], stop: threading.Event, give_up: Callable[[Exception], None]
) -> None:
    seen = time.monotonic()
    while not stop.wait(LOOK_S):
        if has_workers():
            seen = time.monotonic()
        elif time.monotonic() - seen > NO_WORKER_S:
            give_up(WorkersLost(f"the Dask cluster has had no worker for {NO_WORKER_S} s"))
            return


def _has_workers(client: Client) -> bool:
    # As the client last heard, every two seconds.
    return bool(client.scheduler_info(n_workers=1)["workers"])
