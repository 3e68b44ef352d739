"""Replay a trace's requests on the device: prefill one kernel at a time, decode in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import StaticCache

from policies.core import DecisionCore
from replay.eager import EagerEngine
from replay.model import ReplayModel
from replay.slots import SlotPool
from sim.machine import StepTimes

if TYPE_CHECKING:
    from replay.graphs import GraphEngine

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class ForcedStep:
    """One recorded forward step of one request: what goes in, and which experts run.

    ``token_ids`` int [rows]; ``experts`` int [rows, layers, k].
    """

    index: int
    prefill: bool
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    token_ids: Ints
    experts: Ints


@dataclass
class Measured:
    """Wall times of the steps, ns, and the chunks that the link carried."""

    times: StepTimes = field(default_factory=StepTimes)
    chunks: int = 0
    copied_bytes: int = 0
    issue_ns: int = 0


class Replay:
    """One model, one policy: the slots and the captured graphs live as long as this object.

    ``kv_capacity``: tokens of the static KV cache, the longest request.
    """

    def __init__(
        self, ready: ReplayModel, core: DecisionCore, kv_capacity: int, *, window: int = 2
    ) -> None:
        self._ready = ready
        self._core = core
        self._device = next(ready.model.parameters()).device
        self._cache = StaticCache(config=ready.model.config, max_cache_len=kv_capacity)
        self._eager = EagerEngine(ready.model, ready.modules, ready.store, core, window=window)
        self._graphs: GraphEngine | None = None

    @torch.inference_mode()
    def run(self, steps: Sequence[ForcedStep]) -> Measured:
        """Run recorded steps in order; the ids of the trace are executed."""
        measured = Measured()
        if self._device.type == "cuda":
            self._capture()
        for step in steps:
            began = perf_counter_ns()
            if step.begins:
                self._cache.reset()
            if step.prefill or self._graphs is None:
                self._prefill(step)
            else:
                self._decode(step)
            measured.times.begin.append(began)
            measured.times.end.append(perf_counter_ns())
        copies = self._eager.copies
        measured.chunks, measured.copied_bytes = copies.chunks, copies.nbytes
        measured.issue_ns = copies.issued_ns
        self._core.finish()
        return measured

    def _prefill(self, step: ForcedStep) -> None:
        tokens = torch.from_numpy(step.token_ids[None].astype(np.int64)).to(self._device)
        self._eager.forced = [step.experts[:, layer] for layer in range(step.experts.shape[1])]
        with self._eager as engine:
            engine.begin_step(step.index, "prefill" if step.prefill else "decode", step.begins)
            self._ready.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            engine.end_step(step.ends)

    def _decode(self, step: ForcedStep) -> None:
        graphs = self._graphs
        assert graphs is not None
        graphs.step.token.fill_(int(step.token_ids[0]))
        graphs.forced = step.experts.transpose(1, 0, 2)
        graphs.decode(step.index, step.begins, step.ends)

    def _capture(self) -> None:
        """Capture the decode step once; the cache is emptied afterwards."""
        # Triton is there where CUDA is; a plain CPU needs neither.
        from replay.graphs import CapturedStep, GraphEngine, GroupLaunches, require_kernels

        if self._graphs is not None:
            return
        ready, pool = self._ready, self._eager.pool
        kernels = require_kernels(ready.modules, pool.views)
        self._warm_up(pool)
        step = CapturedStep(ready.model, ready.modules, self._cache, 1)
        launches = GroupLaunches(step, kernels, ready.top_k + 1)
        self._graphs = GraphEngine(self._eager.driver, pool, step, launches)
        self._cache.reset()

    def _warm_up(self, pool: SlotPool) -> None:
        """The cache's tensors and the libraries' workspaces must be there before the capture."""
        token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._eager.idle = True
        with self._eager:
            self._ready.model(token, past_key_values=self._cache, use_cache=True)
        self._eager.idle = False
        torch.cuda.synchronize()
