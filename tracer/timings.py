"""How long each MoE layer's parts took in a forward step, without an added synchronisation.

On a GPU: CUDA events on the current stream, made once and used again, read after the step is known
to have ended. They count from event to event, so the gaps in which the stream waits for the host
to launch work are part of a time. On a CPU: the clock.

- segment: from the end of the previous MoE layer's experts (or the step's begin) to the begin of
  this layer's: attention, norms, dense layers in between, the gate;
- experts: the routed experts;
- shared: the layer's shared experts. They run within a segment, their own layer's or the next
  one's, which includes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tracer.adapters import MoeBlock, shared_module
from tracer.timing_table import StepTimings


class StepTimer:
    """Marks the parts of a forward step by hooks on the model's modules."""

    def __init__(self, model: nn.Module, blocks: Sequence[MoeBlock], device: torch.device) -> None:
        self._model, self._blocks, self._device = model, blocks, device
        shared = [shared_module(block) for block in blocks]
        self._shared = [module for module in shared if module is not None]
        if len(self._shared) != len(blocks):
            self._shared = []
        self._cuda = device.type == "cuda"
        self._free: list[list[Any]] = []
        self._stream: Any = None
        self.marks: list[Any] = self._fresh()

    def hooks(self) -> list[Any]:
        """Install the hooks; return their handles."""
        handles = [self._model.register_forward_pre_hook(self._begin)]
        for index, block in enumerate(self._blocks):
            handles.append(block.experts.register_forward_pre_hook(self._mark(1 + 2 * index)))
            handles.append(block.experts.register_forward_hook(self._mark(2 + 2 * index)))
        offset = 1 + 2 * len(self._blocks)
        for index, module in enumerate(self._shared):
            handles.append(module.register_forward_pre_hook(self._mark(offset + 2 * index)))
            handles.append(module.register_forward_hook(self._mark(offset + 2 * index + 1)))
        return handles

    def take(self) -> list[Any]:
        """Hand over the marks of the step just made; read them by `read` once it has ended."""
        marks, self.marks = self.marks, self._free.pop() if self._free else self._fresh()
        return marks

    def read(self, marks: list[Any]) -> StepTimings:
        """Turn the marks of a step that has ended into times; they are used again afterwards."""
        layers = len(self._blocks)
        begins, ends = marks[1 : 2 * layers + 1 : 2], marks[2 : 2 * layers + 1 : 2]
        segment = self._between([marks[0], *ends[:-1]], begins)
        experts = self._between(begins, ends)
        shared = None
        if self._shared:
            shared = self._between(marks[2 * layers + 1 :: 2], marks[2 * layers + 2 :: 2])
        self._free.append(marks)
        return StepTimings(segment, experts, shared)

    def _between(self, begins: list[Any], ends: list[Any]) -> NDArray:
        if not self._cuda:
            return np.array(ends, np.int64) - np.array(begins, np.int64)
        ms = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
        return np.rint(np.array(ms) * 1e6).astype(np.int64)

    def _fresh(self) -> list[Any]:
        count = 1 + 2 * (len(self._blocks) + len(self._shared))
        if not self._cuda:
            return [0] * count
        return [torch.cuda.Event(enable_timing=True) for _ in range(count)]

    def _begin(self, *_: object) -> None:
        if not self._cuda:
            self.marks[0] = perf_counter_ns()
            return
        # Looked up once a step: asking for the stream costs as much as recording an event.
        self._stream = torch.cuda.current_stream(self._device)
        self.marks[0].record(self._stream)

    def _mark(self, place: int) -> Any:
        def mark_cpu(*_: object) -> None:
            self.marks[place] = perf_counter_ns()

        def mark_cuda(*_: object) -> None:
            self.marks[place].record(self._stream)

        return mark_cuda if self._cuda else mark_cpu
