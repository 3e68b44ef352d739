"""The SimPy model with a record of what the host, the GPU and the link did when."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from policies.core import DecisionCore, Wave
from policies.transfers import Copy
from sim.gpu import EXPERTS, HEAD, GpuStream
from sim.link import NEVER, Link
from sim.machine import Machine
from sim.spans import (
    COPY,
    CPU,
    DECIDE,
    GPU,
    ISSUE,
    SEGMENT,
    STEP,
    ChunkSpan,
    CpuSpan,
    Kernel,
    Mark,
    Timeline,
)
from sim.spans import EXPERTS as LAUNCH
from sim.timing import Timing
from sim.watched import outcome_of
from tracer.workload import Step, Workload

Steps = tuple[int, int]


class RecordedLink(Link):
    """Writes down every chunk that was on the wire between ``since`` and ``until``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.since, self.until = 0, NEVER
        self._seen: list[tuple[Copy, int, int, int]] = []
        self._began = 0

    @property
    def chunks(self) -> list[ChunkSpan]:
        """Those that have landed."""
        return [_span(*seen) for seen in self._seen]

    @property
    def on_wire(self) -> ChunkSpan | None:
        """The one that has not landed."""
        copy = self._moving
        if copy is None or not self._shown():
            return None
        return _span(copy, copy.landed, self._began, self.lands)

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
        if self._shown():
            self._seen.append((copy, copy.landed, self._began, self.lands))
        super().land()

    def _shown(self) -> bool:
        return self.lands > self.since and self._began < self.until


def _span(copy: Copy, index: int, begin: int, end: int) -> ChunkSpan:
    return ChunkSpan(
        copy.key,
        copy.source,
        copy.demand,
        begin,
        end,
        copy.chunk_bytes[index],
        copy.seq,
        index + 1,
        copy.chunks,
        outcome_of(copy),
    )


class RecordedGpu(GpuStream):
    """Writes down every kernel while ``recording``.

    ``layer``: of the last segment; after the last layer comes the head, ``head``.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.kernels: list[Kernel] = []
        self.recording = True
        self.layer = self.head = -1
        self._ahead: deque[int] = deque()
        self._contents: deque[tuple[int, Sequence[int], bool]] = deque()

    def begin_step(self, layers: Sequence[int]) -> None:
        """Segments of these layers follow, and the head."""
        self._ahead.extend(layers)

    def submit(self, earliest: int, nominal_ns: int, slowdown_ppm: int, kind: int) -> None:
        """As the stream's; the only experts that come by here are those of the CPU."""
        super().submit(earliest, nominal_ns, slowdown_ppm, kind)
        if kind != EXPERTS:
            self.layer = self.head if kind == HEAD else self._ahead.popleft()
        self._contents.append((self.layer, (), kind == EXPERTS))

    def launched(self, experts: Sequence[int]) -> None:
        """The kernel submitted last computes these."""
        self._contents.append((self.layer, experts, False))

    def ran(self, kind: int, begin: int, end: int) -> None:
        """As the stream's."""
        contents = self._contents.popleft()
        if self.recording:
            self.kernels.append(Kernel(kind, begin, end, *contents))
        super().ran(kind, begin, end)


class TracedMachine(Machine):
    """Takes no short cuts; the same times to the nanosecond. ``marks``: of the host.

    ``steps``: the first and the last to be written down, all without it. Times are kept of all.
    """

    link_class = RecordedLink
    gpu_class = RecordedGpu
    link: RecordedLink
    gpu: RecordedGpu

    def __init__(
        self,
        workload: Workload,
        core: DecisionCore,
        timing: Timing,
        *,
        window: int = 2,
        steps: Steps | None = None,
    ) -> None:
        super().__init__(workload, core, timing, window=window, bursts=False)
        self._last: Mark = (0, STEP, -1, 0)
        self.marks = [self._last]
        self._recording = True
        self._groups: list[CpuSpan] = []
        self._stretch = steps
        self.gpu.head = workload.num_layers
        if steps is not None:
            self._record(False)
            self.link.since = NEVER

    def timeline(self, name: str) -> Timeline:
        """What happened, once :meth:`run` is over."""
        link, times = self.link, self.times
        return Timeline(
            name,
            self.marks,
            link.chunks,
            self.gpu.kernels,
            times.begin,
            times.end,
            link.on_wire,
            self._groups,
        )

    def _record(self, recording: bool) -> None:
        self._recording = self.gpu.recording = recording

    def _mark(self, end: int, kind: int, layer: int, count: int = 0) -> None:
        if end > self._last[0]:
            self._last = (end, kind, layer, count)
            if self._recording:
                self.marks.append(self._last)

    def _step(self, step: Step, kv_tokens: int, now: int) -> int:
        first, last = self._stretch or (-1, -1)
        if step.index == first:
            self.marks = [self._last]
            self.link.since = now
            self._record(True)
        now = super()._step(step, kv_tokens, now)
        if step.index == last:
            self.link.until = now
            self._record(False)
        return now

    def _layers(self, step: Step, kv_tokens: int, now: int) -> int:
        self._mark(now, STEP, -1)
        events = self.workload.events.step(step.index)
        self.gpu.begin_step([layer for layer, keys in enumerate(events) if keys])
        return super()._layers(step, kv_tokens, now)

    def _spin_for_gpu(self, now: int) -> int:
        self._mark(now, SEGMENT, self.gpu.layer)
        end = super()._spin_for_gpu(now)
        self._mark(end, GPU, self.gpu.layer)
        return end

    def _at_once(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        return 0

    def _execute(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        last = self._last[0]
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
        self.gpu.launched([*group])
        self._mark(end, LAUNCH, layer, len(group))
        return end

    def _spin_for_landing(self, key: int | None, now: int) -> int:
        self._until(now, self.core.layer)
        end = super()._spin_for_landing(key, now)
        self._mark(end, COPY, self.core.layer)
        return end

    def _start_cpu(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        self._until(now - self._costs.cpu_start_ns, layer)
        self._mark(now, CPU, layer, len(wave.cpu))
        end = super()._start_cpu(layer, wave, tokens, now)
        if self._recording:
            self._groups.append(CpuSpan(layer, [*wave.cpu], self.link.cpu_from, end))
        return end

    def _join_cpu(self, cpu_end: int, now: int) -> int:
        self._until(now, self.core.layer)
        end = super()._join_cpu(cpu_end, now)
        self._mark(end - self._costs.experts_launch_ns, CPU, self.core.layer)
        self._mark(end, LAUNCH, self.core.layer)
        return end

    def _until(self, now: int, layer: int) -> None:
        """What came before this: the refill, or what a landing takes."""
        kind = COPY if self._last[1] == COPY else ISSUE
        self._mark(now, kind, layer)
