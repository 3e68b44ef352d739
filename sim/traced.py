"""The SimPy model with a record of what the host, the GPU and the link did when."""

from __future__ import annotations

from typing import Any

from policies.core import DecisionCore, Wave
from sim.gpu import GpuStream
from sim.link import Link
from sim.machine import Machine
from sim.spans import (
    COPY,
    CPU,
    DECIDE,
    EXPERTS,
    GPU,
    ISSUE,
    SEGMENT,
    STEP,
    ChunkSpan,
    Kernel,
    Mark,
    Timeline,
)
from sim.timing import Timing
from tracer.workload import Step, Workload


class RecordedLink(Link):
    """Writes down every chunk."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chunks: list[ChunkSpan] = []
        self._began = 0

    def occupy(self, nbytes: int, ready: int) -> int:
        """As the link's."""
        before = self._end
        end = super().occupy(nbytes, ready)
        self._began = max(ready, before)
        return end

    def land(self) -> None:
        """As the link's."""
        copy = self._moving
        assert copy is not None
        chunk = ChunkSpan(copy.key, copy.source, copy.demand, self._began, self.lands)
        self.chunks.append(chunk)
        super().land()


class RecordedGpu(GpuStream):
    """Writes down every kernel."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.kernels: list[Kernel] = []

    def ran(self, kind: int, begin: int, end: int) -> None:
        """As the stream's."""
        self.kernels.append((kind, begin, end))
        super().ran(kind, begin, end)


class TracedMachine(Machine):
    """Takes no short cuts; the same times to the nanosecond. ``marks``: of the host."""

    link_class = RecordedLink
    gpu_class = RecordedGpu

    def __init__(
        self, workload: Workload, core: DecisionCore, timing: Timing, *, window: int = 2
    ) -> None:
        super().__init__(workload, core, timing, window=window, bursts=False)
        self.marks: list[Mark] = [(0, STEP, -1, 0)]

    def timeline(self, name: str) -> Timeline:
        """What happened, once :meth:`run` is over."""
        link, gpu = self.link, self.gpu
        assert isinstance(link, RecordedLink)
        assert isinstance(gpu, RecordedGpu)
        times = self.times
        return Timeline(name, self.marks, link.chunks, gpu.kernels, times.begin, times.end)

    def _mark(self, end: int, kind: int, layer: int, count: int = 0) -> None:
        if end > self.marks[-1][0]:
            self.marks.append((end, kind, layer, count))

    def _layers(self, step: Step, kv_tokens: int, now: int) -> int:
        self._mark(now, STEP, -1)
        now = super()._layers(step, kv_tokens, now)
        self._mark(now, GPU, self.workload.num_layers)
        return now

    def _spin_for_gpu(self, now: int) -> int:
        self._mark(now, SEGMENT, self.core.layer + 1)
        end = super()._spin_for_gpu(now)
        self._mark(end, GPU, self.core.layer + 1)
        return end

    def _at_once(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        return 0

    def _execute(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        last = self.marks[-1][0]
        if last < now:
            # The quiet way past the segment: launched, run and read back in one go.
            self._mark(min(last + self._costs.segment_launch_ns, now), SEGMENT, layer)
            self._mark(now, GPU, layer)
        decided = self._costs.gate_ns(wave.waiting, first=self._first_wave)
        self._mark(now + decided, DECIDE, layer, wave.waiting)
        return super()._execute(layer, wave, tokens, now)

    def _launch(self, layer: int, group: Any, tokens: dict[int, int] | None, now: int) -> int:
        self._until(now, layer)
        end = super()._launch(layer, group, tokens, now)
        self._mark(end, EXPERTS, layer, len(group))
        return end

    def _spin_for_landing(self, key: int | None, now: int) -> int:
        self._until(now, self.core.layer)
        end = super()._spin_for_landing(key, now)
        self._mark(end, COPY, self.core.layer)
        return end

    def _start_cpu(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        self._until(now - self._costs.cpu_start_ns, layer)
        self._mark(now, CPU, layer, len(wave.cpu))
        return super()._start_cpu(layer, wave, tokens, now)

    def _join_cpu(self, cpu_end: int, now: int) -> int:
        self._until(now, self.core.layer)
        end = super()._join_cpu(cpu_end, now)
        self._mark(end - self._costs.experts_launch_ns, CPU, self.core.layer)
        self._mark(end, EXPERTS, self.core.layer)
        return end

    def _until(self, now: int, layer: int) -> None:
        """What came before this: the refill, or what a landing takes."""
        kind = COPY if self.marks[-1][1] == COPY else ISSUE
        self._mark(now, kind, layer)
