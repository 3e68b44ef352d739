"""The process that computes experts on the CPU, and the memory that it shares with the engine.

A process, not a thread: the engine's host thread spins in Python and would hold the interpreter's
lock. Requests and answers are numbers in shared memory that both sides poll; the order in which one
side's writes show on the other is that of x86.

Run by :class:`replay.cpu_lane.CpuLane` as ``python -m replay.cpu_worker``, a :class:`Job` on stdin.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from dataclasses import dataclass

import torch

from replay.gated import GatedForm, compute
from replay.layout import ExpertLayout
from replay.shared_memory import mapped

STOP = -1
_SPIN_NS = 50_000_000  # longer than from one step's last event to the next's first
_NAP_S, _SLEEP_S = 0.0002, 0.005
_NAPS_NS = 1_000_000_000
_WORD_BYTES, _LINE_BYTES = 8, 64


@dataclass(frozen=True)
class LaneShape:
    """What an event may have at most: ``rows`` tokens, ``top_k`` of ``experts`` each, [rows, H]."""

    rows: int
    top_k: int
    experts: int
    width: int
    dtype: torch.dtype

    @property
    def assignments(self) -> int:
        """At most, of an event."""
        return self.rows * self.top_k


class LaneMemory:
    """Request and answer, in memory that both processes map.

    ``control`` has the words below. ``experts`` and ``counts`` int32 [experts]: who is to be
    computed, for how many assignments; ``tokens`` and ``places`` int32 [assignments]: theirs, one
    expert's after the other's; ``hidden`` [rows, H] in, ``results`` [assignments, H] out.
    """

    #: words of ``control``, each in a cache line of its own: number of the last request, of the
    #: last answer (1: the worker is ready), the request's layer and how many experts it has
    REQUEST, ANSWER, LAYER, EXPERTS = (_LINE_BYTES // _WORD_BYTES * index for index in range(4))

    def __init__(self, shape: LaneShape, memory: torch.Tensor) -> None:
        self._memory = memory
        self._used = 0
        words = self._area((4, _LINE_BYTES // _WORD_BYTES), torch.int64)
        self.control = words.numpy().reshape(-1).data.cast("B").cast("q")
        self.experts = self._area((shape.experts,), torch.int32)
        self.counts = self._area((shape.experts,), torch.int32)
        self.tokens = self._area((shape.assignments,), torch.int32)
        self.places = self._area((shape.assignments,), torch.int32)
        self.hidden = self._area((shape.rows, shape.width), shape.dtype)
        self.results = self._area((shape.assignments, shape.width), shape.dtype)

    @staticmethod
    def nbytes(shape: LaneShape) -> int:
        """How much memory it takes."""
        numbers = 4 * (2 * shape.experts + 2 * shape.assignments)
        rows = (shape.rows + shape.assignments) * shape.width * shape.dtype.itemsize
        return 4 * _LINE_BYTES + numbers + rows + 7 * _LINE_BYTES

    def _area(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        first = self._used
        last = first + torch.Size(size).numel() * dtype.itemsize
        self._used = -(-last // _LINE_BYTES) * _LINE_BYTES
        return self._memory[first:last].view(dtype).view(size)


@dataclass(frozen=True)
class Job:
    """What the worker is told as it starts. ``engine``: the process that it works for.

    ``store`` and ``lane``: files of the experts uint8 [layers, experts, nbytes] and of the shared
    memory; ``form``: of the experts.
    """

    engine: int
    store: int
    lane: int
    layers: int
    layout: ExpertLayout
    form: GatedForm
    shape: LaneShape
    threads: int


class Worker:
    """Answers requests until it is told to stop or the engine is gone."""

    def __init__(self, job: Job) -> None:
        shape, layout = job.shape, job.layout
        experts = mapped(job.store, job.layers * shape.experts * layout.nbytes)
        memory = experts.view(job.layers, shape.experts, layout.nbytes)
        self._views = [layout.views(layer) for layer in memory]
        self._lane = LaneMemory(shape, mapped(job.lane, LaneMemory.nbytes(shape)))
        self._form = job.form
        self._engine = job.engine

    def run(self) -> None:
        """Until the end."""
        control = self._lane.control
        for _ in range(3):
            self._expert(0, 0, self._lane.hidden[:1])  # compiles, allocates, starts the threads
        answered = 1
        control[LaneMemory.ANSWER] = answered
        while True:
            request = self._next(answered)
            if request == STOP:
                return
            self._answer(control[LaneMemory.LAYER], control[LaneMemory.EXPERTS])
            control[LaneMemory.ANSWER] = answered = request

    def _next(self, answered: int) -> int:
        """Poll, then doze, until there is another request."""
        control = self._lane.control
        began = time.monotonic_ns()
        while (request := control[LaneMemory.REQUEST]) in (0, answered):
            idle = time.monotonic_ns() - began
            if idle < _SPIN_NS:
                os.sched_yield()
            elif os.getppid() != self._engine:
                return STOP
            else:
                time.sleep(_NAP_S if idle < _NAPS_NS else _SLEEP_S)
        return request

    def _answer(self, layer: int, experts: int) -> None:
        lane = self._lane
        first = 0
        for expert, count in zip(
            lane.experts[:experts].tolist(), lane.counts[:experts].tolist(), strict=True
        ):
            last = first + count
            tokens = lane.tokens[first:last]
            lane.results[first:last] = self._expert(layer, expert, lane.hidden[tokens])
            first = last

    def _expert(self, layer: int, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        parts = {name: view[expert] for name, view in self._views[layer].items()}
        return compute(self._form, parts, hidden)


def main() -> None:
    """Serve the engine that started this process."""
    # Ctrl-C goes to the whole group; the engine says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job: Job = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        Worker(job).run()


if __name__ == "__main__":
    main()
