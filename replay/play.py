"""Replay a trace's requests on the device: prefill one kernel at a time, decode in CUDA graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import StaticCache

from configs.errors import UserError
from policies.core import DecisionCore
from replay.batches import BatchInputs, Fed, columns_of, most_filled, seats_of
from replay.cores import QuietCore, loop_ns, on_quiet_core
from replay.eager import EagerEngine
from replay.memory import enough_memory
from replay.model import ReplayModel
from replay.slots import CopyEngine
from sim.machine import StepTimes
from sim.spans import APART, STEP, ChunkSpan
from tracer.workload import Workload

if TYPE_CHECKING:
    from replay.cpu_lane import CpuLane
    from replay.graphs import CapturedStep, GraphEngine
    from replay.predictors import Predictors

Ints = npt.NDArray[Any]

_HOST_SAMPLES = 6  # at either end of a run
_LESS = "give a smaller --budget or --expert-budget, or a trace of shorter requests"


@dataclass(frozen=True)
class ForcedStep:
    """One recorded forward step: what goes in, and which experts run.

    ``token_ids`` int [rows]; ``experts`` int [rows, layers, k], None: those that the model chooses.
    ``seats`` int [rows]: the line of the batch that each row belongs to, None: one request runs.
    """

    index: int
    prefill: bool
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    token_ids: Ints
    experts: Ints | None
    seats: Ints | None = None

    @property
    def seats_or_first(self) -> Ints:
        """As ``seats``; a single request sits in the first line."""
        return np.zeros(len(self.token_ids), np.int64) if self.seats is None else self.seats

    @property
    def lines(self) -> list[int]:
        """The lines that run, in the order of the step's rows."""
        return [0] if self.seats is None else list(dict.fromkeys(self.seats.tolist()))


@dataclass
class Measured:
    """Wall times of the steps, ns, what the host did, and the chunks that the link carried.

    ``loops_ns``: what a fixed loop of Python took around the run, between requests where the core
    is chosen, and, if it was to be sampled, after every step. ``apart_ns``: time between requests
    in which a core was looked for. ``marks`` and ``predictions``: as
    :class:`replay.ledger.Ledger` has them. Of ``times``, segments and experts are not told apart.
    ``tokens``: the model's greedy choice after every step, whatever text was forced on it, one for
    each request of the step. ``logits``: likewise, [vocabulary], float32 on the host, if they were
    to be kept. ``routing``: the executed ids [rows, k] of every event, if they were to be kept.
    """

    times: StepTimes = field(default_factory=StepTimes)
    chunks: int = 0
    copied_bytes: int = 0
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    routing: list[Ints] = field(default_factory=list)
    chunks_on_link: list[ChunkSpan] = field(default_factory=list)
    marks: list[tuple[int, int, int, int]] = field(default_factory=list)
    predictions: list[tuple[int, int]] = field(default_factory=list)
    loops_ns: list[int] = field(default_factory=list)
    apart_ns: int = 0

    @property
    def host_loop_ns(self) -> float:
        """How fast the host was: the median of the loops."""
        return float(np.median(self.loops_ns))


def static_cache(config: Any, kv_capacity: int) -> StaticCache:
    """A KV cache at fixed addresses, of full length in layers with a sliding window too.

    A cache of a window's length shifts its contents by a rule in Python, which a captured graph
    would not follow; the mask keeps to the window either way.
    """
    whole = copy.deepcopy(config.get_text_config())
    whole.sliding_window = None
    if getattr(whole, "layer_types", None):
        whole.layer_types = ["full_attention"] * len(whole.layer_types)
    return StaticCache(config=whole, max_cache_len=kv_capacity)


class Session:
    """A model and what points share: the KV cache, and the decode step captured from it once.

    ``kv_capacity``: tokens of a line of the static KV cache, the longest request (of a batch
    :func:`replay.batches.columns_of`). ``rows``: lines of the batch that every step computes;
    those of a smaller batch, or of requests that have ended, are idle. ``most_tokens``: of a step
    that leaves experts to the CPU; None: as many as the cache takes. ``cpu_threads``: for those
    experts; None: the physical cores less two. To be closed: a process computes them, from the
    first policy on that needs it.
    """

    def __init__(
        self,
        ready: ReplayModel,
        kv_capacity: int,
        *,
        rows: int = 1,
        most_tokens: int | None = None,
        cpu_threads: int | None = None,
    ) -> None:
        self.ready = ready
        self.device = next(ready.model.parameters()).device
        self.cache = static_cache(ready.model.config, kv_capacity)
        self.kv_capacity = kv_capacity
        self.rows = rows
        self.most_tokens = most_tokens or rows * kv_capacity
        # Without padding the model's own causal path runs.
        self.batch = BatchInputs(rows, kv_capacity, self.device) if rows > 1 else None
        self._captured: CapturedStep | None = None
        self._predictors: Predictors | None = None
        self._cpu_threads = cpu_threads
        self._lane: CpuLane | None = None
        #: how fast the host was in runs that calibrated
        self.host_loops_ns: list[float] = []
        #: what starting the process for the CPU's experts took
        self.lane_start_s = 0.0

    def close(self) -> None:
        """End the process that computes experts on the CPU, if there is one."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    @property
    def has_lane(self) -> bool:
        """Whether a policy has needed the CPU so far."""
        return self._lane is not None

    def lane(self) -> CpuLane:
        """Who computes experts on the CPU; started when first asked for."""
        from replay.cpu_lane import CpuLane, default_threads

        if self._lane is None:
            threads = self._cpu_threads or default_threads()
            began = perf_counter()
            self._lane = CpuLane(self.ready, self.most_tokens, threads)
            self.lane_start_s = perf_counter() - began
        return self._lane

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.ready.model.config.get_text_config().vocab_size)

    @classmethod
    def for_workloads(
        cls,
        ready: ReplayModel,
        *workloads: Workload,
        at_least: int = 1,
        cpu_threads: int | None = None,
    ) -> Session:
        """Of a size that these fit in; ``at_least``: KV capacity.

        Raises UserError for batches whose requests do not begin together.
        """
        for workload in workloads:
            seats_of(workload)
        rows = max(workload.max_batch for workload in workloads)
        longest = max(step.tokens for workload in workloads for step in workload.steps())
        return cls(
            ready,
            max([at_least, *map(columns_of, workloads)]),
            rows=rows,
            # A captured step hands over all its lines.
            most_tokens=max(longest, rows),
            cpu_threads=cpu_threads,
        )

    def begin(self, step: ForcedStep) -> None:
        """New requests: nothing is left of those before."""
        self.cache.reset()
        if self.batch is None:
            return
        self.batch.begin(step.seats_or_first, step.prefill)
        if self._captured is not None and not step.prefill:
            self._captured.begin(self.batch.positions())

    def feed(self, step: ForcedStep) -> Fed:
        """The model's inputs for an eager pass."""
        if self.batch is not None:
            fed = self.batch.feed(step.token_ids, step.seats_or_first)
            if self._captured is not None:
                self._captured.begin(self.batch.positions())
            return fed
        tokens = torch.from_numpy(step.token_ids[None].astype(np.int64))
        return Fed({"input_ids": tokens.to(self.device)})

    def captured(self) -> CapturedStep:
        """One decode step of a token a line, cut at the experts."""
        # Triton is there where CUDA is; a plain CPU needs neither.
        from replay.graphs import CapturedStep

        if self._captured is None:
            ready = self.ready
            mask = None if self.batch is None else self.batch.mask
            self._captured = CapturedStep(ready.model, ready.modules, self.cache, self.rows, mask)
        return self._captured

    def predictors(self) -> Predictors:
        """The work of predicting, of this model's shape."""
        from replay.predictors import Predictors, PredictorShape

        if self._predictors is None:
            inputs = [edge.hidden for edge in self.captured().boundaries]
            ready = self.ready
            shape = PredictorShape.of(inputs[0].shape[-1], ready.num_experts, ready.top_k)
            self._predictors = Predictors(shape, inputs)
        return self._predictors


class Replay:
    """One policy on a session's model: the slots live as long as this object.

    ``link_scale``: emulate a link so many times slower. ``check``: a SlotRaceError tells where an
    expert was computed before its copy was there; slower, for tests. Raises UserError where the
    device has not the memory.
    """

    @enough_memory("a run", _LESS)
    def __init__(
        self,
        session: Session,
        core: DecisionCore,
        *,
        window: int = 2,
        link_scale: float = 1.0,
        check: bool = False,
    ) -> None:
        ready = session.ready
        self._session = session
        self._check = check
        self._core = core
        self.eager = EagerEngine(
            ready.model,
            ready.modules,
            ready.store,
            core,
            window=window,
            link_scale=link_scale,
            most_tokens=session.rows * session.kv_capacity,
            check=check,
        )
        if core.uses_cpu:
            self.eager.driver.lane = session.lane()
        self._graphs = self._graph_engine() if session.device.type == "cuda" else None
        if self._graphs is not None and core.policy.prefetcher is not None:
            self.eager.predictors = session.predictors()
            self.eager.driver.start_predictor = self.eager.predictors.start

    @enough_memory("a run", _LESS)
    @torch.inference_mode()
    def run(
        self,
        steps: Sequence[ForcedStep],
        *,
        keep_logits: bool = False,
        keep_routing: bool = False,
        sample_host: bool = False,
    ) -> Measured:
        """Run recorded steps in order; the ids of the trace are executed, where a step has them.

        ``sample_host``: see how fast the host is between steps, too: for calibration, since the
        time goes to what comes after a step.
        """
        self._require_room(steps)
        measured = Measured()
        driver = self.eager.driver
        copies = self.eager.copies
        driver.routing = measured.routing if keep_routing else None
        with self._alone() as core, _no_collection(), _drained(copies):
            measured.loops_ns += [loop_ns() for _ in range(_HOST_SAMPLES)]
            for number, step in enumerate(steps):
                if core is not None and step.begins and number:
                    ended = perf_counter_ns()
                    core.keep()
                    measured.loops_ns += [loop_ns() for _ in range(_HOST_SAMPLES)]
                    driver.ledger.mark(APART, -1)
                    measured.apart_ns += perf_counter_ns() - ended
                began = driver.ledger.mark(STEP, -1)
                before = driver.stall_late_ns, driver.stall_miss_ns, driver.stall_cpu_ns
                if step.begins:
                    self._session.begin(step)
                greedy = self._prefill if step.prefill or self._graphs is None else self._decode
                chosen, logits = greedy(step)
                times = measured.times
                times.begin.append(began)
                times.end.append(driver.ledger.mark(STEP, -1))
                for line in step.lines:
                    measured.tokens.append(int(chosen[line]))
                    if keep_logits:
                        measured.logits.append(logits[line].float().cpu())
                times.stall_late.append(driver.stall_late_ns - before[0])
                times.stall_miss.append(driver.stall_miss_ns - before[1])
                times.stall_cpu.append(driver.stall_cpu_ns - before[2])
                if sample_host:
                    measured.loops_ns.append(loop_ns())
                    driver.ledger.mark(APART, -1)
            measured.loops_ns += [loop_ns() for _ in range(_HOST_SAMPLES)]
        measured.chunks, measured.copied_bytes = copies.chunks, copies.nbytes
        measured.marks = driver.ledger.marks
        measured.predictions = driver.ledger.predictions
        measured.chunks_on_link = copies.spans
        self._core.finish()
        return measured

    def _require_room(self, steps: Sequence[ForcedStep]) -> None:
        """UserError for requests longer than the KV cache: the device would write beyond it."""
        needed = most_filled((bool(step.begins), step.seats_or_first) for step in steps)
        if needed > self._session.kv_capacity:
            raise UserError(
                f"these steps fill {needed} tokens of KV cache, the session's holds "
                f"{self._session.kv_capacity}: make one that fits (Session.for_workloads)"
            )

    def _alone(self) -> AbstractContextManager[QuietCore | None]:
        """A core for the host thread; where the device is the CPU itself, it has all."""
        return nullcontext() if self._graphs is None else on_quiet_core()

    def _prefill(self, step: ForcedStep) -> tuple[torch.Tensor, torch.Tensor]:
        fed = self._session.feed(step)
        engine = self.eager
        engine.forced = None if step.experts is None else list(step.experts.transpose(1, 0, 2))
        engine.keep(fed.places)
        with engine:
            engine.begin_step(step.index, "prefill" if step.prefill else "decode", step.begins)
            output = self._session.ready.model(
                **fed.inputs, past_key_values=self._session.cache, use_cache=True, logits_to_keep=1
            )
            logits: torch.Tensor = output.logits[:, -1]
            greedy = logits.argmax(-1)
            engine.end_step(step.ends)
        return greedy, logits

    def _decode(self, step: ForcedStep) -> tuple[torch.Tensor, torch.Tensor]:
        graphs = self._graphs
        assert graphs is not None
        graphs.seats = None if self._session.rows == 1 else step.seats_or_first
        graphs.step.feed(step.token_ids, graphs.seats)
        graphs.forced = None if step.experts is None else step.experts.transpose(1, 0, 2)
        graphs.decode(step.index, step.begins, step.ends)
        if self._check:
            self.eager.require_finite(graphs.step.logits[step.lines], f"step {step.index}")
        return graphs.step.next_on_host, graphs.step.logits

    def _graph_engine(self) -> GraphEngine:
        from replay.graphs import GraphEngine, require_kernels
        from replay.launches import group_launches

        ready = self._session.ready
        kernels = require_kernels(ready.modules, self.eager.pool.views)
        step = self._session.captured()
        launches = group_launches(step, kernels)
        return GraphEngine(self.eager.driver, step, launches)


@contextmanager
def _drained(copies: CopyEngine) -> Iterator[None]:
    """However the run ends, no copy is under way afterwards: the slots' memory may go."""
    try:
        yield
    finally:
        copies.drain()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: its pauses are longer than a layer."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
