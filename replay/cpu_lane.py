"""The CPU lane: experts that a policy leaves to the CPU, computed by a process of its own.

The contract's CPU workers (docs/contract.md). Hidden states go to memory shared with the process,
which reads the experts from the store where they lie; results come back to the assignments' rows.
One event at a time: the engine waits for the answer before it goes on to the next layer.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UserError
from replay.cpu_worker import STOP, Job, LaneMemory, LaneShape
from replay.gated import form_of
from replay.model import ReplayModel
from replay.shared_memory import SharedMemory

_START_S = 300
_STOP_S = 10
_ANSWER_S = 120  # an event takes milliseconds, a prefill's seconds at most
_GAP_S = 1.0  # between two looks: longer ones are this process's own pauses
_LOOK_EVERY = 4096  # polls from one look at the process to the next
_KEPT_CORES = 2  # for the engine's own thread and the driver's


class CpuLane:
    """A worker for a model's experts, of events of up to ``rows`` tokens, on ``threads`` threads.

    ``width``: of the hidden states. Raises UserError for experts of a kind that it cannot compute,
    and wherever the process has ended by itself.
    """

    def __init__(self, ready: ReplayModel, rows: int, threads: int) -> None:
        store, layout = ready.store, ready.layout
        parts = {part.name: part for part in layout.parts}
        form = form_of(ready.modules[0], parts)
        if form is None:
            raise UserError(
                f"{type(ready.modules[0]).__name__}: experts of this kind cannot be computed on "
                "the CPU; choose a policy that copies every miss"
            )
        if store.file is None:
            raise UserError("computing experts on the CPU needs Linux; choose another policy")
        down = parts["down_proj"]
        shape = LaneShape(
            rows,
            ready.top_k,
            ready.num_experts,
            down.shape[1 if form.transposed else 0],
            down.dtype,
        )
        self.threads, self.width = threads, shape.width
        self._shared = SharedMemory(LaneMemory.nbytes(shape), "the CPU's share")
        self._memory = LaneMemory(shape, self._shared.bytes)
        self._places = self._memory.places.numpy()
        self._tokens = self._memory.tokens.numpy()
        self._request = 1
        self._assignments = 0
        self._polls = 0
        self._silent_s, self._looked, self._looked_for = 0.0, 0.0, 0
        self._copied = self._prepare_cuda() if next(ready.model.parameters()).is_cuda else None
        assert self._shared.file is not None
        job = Job(
            engine=os.getpid(),
            store=store.file,
            lane=self._shared.file,
            layers=len(ready.modules),
            layout=layout,
            form=form,
            shape=shape,
            threads=threads,
        )
        self.process = _start(job)
        self._stop = weakref.finalize(self, _end, self.process, self._memory.control)
        self._await_start()

    def start(
        self, layer: int, experts: Sequence[int], ids: npt.NDArray[Any], hidden: torch.Tensor
    ) -> None:
        """Begin ``experts`` of an event: ``ids`` int [rows, k], ``hidden`` [rows, H] known.

        Lines of a batch that do not run have ids of -1: nothing is computed for them.
        """
        memory = self._memory
        if self._copied is None:
            memory.hidden[: len(hidden)].copy_(hidden)
        else:
            memory.hidden[: len(hidden)].copy_(hidden, non_blocking=True)
            self._copied.record()
        self._name(experts, ids)
        if self._copied is not None:
            while not self._copied.query():
                pass
        control = memory.control
        control[LaneMemory.LAYER], control[LaneMemory.EXPERTS] = layer, len(experts)
        self._request += 1
        control[LaneMemory.REQUEST] = self._request

    def done(self) -> bool:
        """Whether what was started is computed. Raises UserError where nobody computes it."""
        if self._memory.control[LaneMemory.ANSWER] == self._request:
            return True
        self._polls += 1
        if self._polls % _LOOK_EVERY == 0:
            self._look()
            self._require_answer()
        return False

    def finish(self, out: torch.Tensor) -> None:
        """Put the results where they belong in ``out`` [rows * k, H], in order with the kernels."""
        memory, count = self._memory, self._assignments
        if self._copied is None:
            out[memory.places[:count].long()] = memory.results[:count]
            return
        from replay.kernels import scatter_rows

        scatter_rows(memory.results, memory.places, out, count)

    def close(self) -> None:
        """End the process."""
        self._stop()
        self._shared.close()

    def _name(self, experts: Sequence[int], ids: npt.NDArray[Any]) -> None:
        """Write down who is computed for whom."""
        memory, top_k = self._memory, ids.shape[1]
        flat = ids.reshape(-1)
        if len(ids) == 1:
            chosen = flat.tolist()
            places = [chosen.index(expert) for expert in experts]
            counts = [1] * len(experts)
        else:
            order = np.argsort(flat, kind="stable")
            first, last = (np.searchsorted(flat[order], experts, side) for side in _SIDES)
            places = np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)]).tolist()
            counts = (last - first).tolist()
        self._assignments = count = len(places)
        self._places[:count] = places
        self._tokens[:count] = self._places[:count] // top_k
        memory.experts.numpy()[: len(experts)] = experts
        memory.counts.numpy()[: len(experts)] = counts

    def _prepare_cuda(self) -> Any:
        """Pin what the GPU reads and writes, and compile its kernel."""
        from replay.kernels import scatter_rows

        self._shared.pin()
        memory = self._memory
        out = torch.empty((1, memory.results.shape[1]), dtype=memory.results.dtype, device="cuda")
        scatter_rows(memory.results, memory.places, out, 1)
        torch.cuda.synchronize()
        return torch.cuda.Event()

    def _await_start(self) -> None:
        until = time.monotonic() + _START_S
        while self._memory.control[LaneMemory.ANSWER] != 1:
            self._look()
            if time.monotonic() > until:
                self.close()
                raise UserError(f"the process for the CPU's experts did not start in {_START_S} s")
            time.sleep(0.002)

    def _look(self) -> None:
        """Raise UserError unless the process is still there."""
        code = self.process.poll()
        if code is not None:
            raise UserError(
                f"the process that computes experts on the CPU has ended (exit code {code}): see "
                "its messages above, or whether the host ran out of memory, and run again"
            )

    def _require_answer(self) -> None:
        """Raise UserError where the process is there and does nothing, as a stopped one does."""
        now = time.monotonic()
        if self._looked_for != self._request:
            self._looked_for, self._silent_s, self._looked = self._request, 0.0, now
        self._silent_s += min(now - self._looked, _GAP_S)
        self._looked = now
        if self._silent_s > _ANSWER_S:
            raise UserError(
                f"the process that computes experts on the CPU has not answered for {_ANSWER_S:g} "
                "s: see whether it was stopped or has no core to run on, and run again"
            )


_SIDES: tuple[Any, Any] = ("left", "right")


def _start(job: Job) -> subprocess.Popen[bytes]:
    # The same modules as here, wherever they came from, and none from the current directory.
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "replay.cpu_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        pass_fds=(job.store, job.lane),
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pickle.dump(job, pipe)
    return process


def _end(process: subprocess.Popen[bytes], control: memoryview) -> None:
    """Tell the process to stop; it may be busy for a while, and then it has to."""
    control[LaneMemory.REQUEST] = STOP
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def default_threads() -> int:
    """Physical cores that this process may use, less those that the engine needs; at least 1."""
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    return max(len(cores) - _KEPT_CORES, 1)


def _core_of(cpu: int) -> str:
    """A name that a core's hardware threads share; where the system does not say, their own."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list")
    return siblings.read_text() if siblings.is_file() else str(cpu)
