"""The SimPy model of the execution contract (docs/contract.md): host thread, GPU, copy engine.

One long-lived process, the host, an event a step. Within a step only the host decides what happens
next: what the copy engine, the GPU stream and the predictors do in the meantime follows by
arithmetic from what the host has submitted, so it is worked out when the host looks, in the order
in which it happens. ``tests/reference/plain_model.py`` has a process for each of them instead.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NoReturn

import simpy

from policies.core import DecisionCore, Wave
from policies.interface import Prediction
from policies.memory import RESIDENT
from policies.transfers import Copy
from sim.gpu import EXPERTS, HEAD, SEGMENT, SETTLED, GpuStream
from sim.link import NEVER, Link
from sim.quiet import QuietLink
from sim.rush import Rush, can_rush
from sim.timing import HostCosts, Timing
from tracer.workload import Step, Workload

_PPM = 1_000_000


@dataclass
class StepTimes:
    """Per step, ns: begin, end, and where the time between went (host is the rest)."""

    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    stall_late: list[int] = field(default_factory=list)
    stall_miss: list[int] = field(default_factory=list)
    stall_cpu: list[int] = field(default_factory=list)


class Machine:
    """Runs a workload through a decision core on modelled hardware.

    ``window``: chunks handed to the hardware at a time (W of the contract). ``bursts`` False: take
    no short cut where demand copies have the link to themselves (a policy that asks the time sees
    each landing then). After :meth:`run`, ``times`` holds the steps' times, ``link.busy_ns`` the
    link's, ``core.tally`` the decisions'.
    """

    link_class: type[Link] = Link
    gpu_class: type[GpuStream] = GpuStream

    def __init__(
        self,
        workload: Workload,
        core: DecisionCore,
        timing: Timing,
        *,
        window: int = 2,
        bursts: bool = True,
    ) -> None:
        self.env = simpy.Environment()
        self.workload = workload
        self.core = core
        self.timing = timing
        self.link = self.link_class(
            core,
            timing.link,
            window,
            timing.host.copy_issue_ns,
            timing.link_slowdown_cpu_ppm,
        )
        self.gpu = self.gpu_class(self.link)
        self._quiet = QuietLink(
            timing, self.link, self.gpu, workload.num_layers, workload.num_experts
        )
        self.times = StepTimes()
        self._costs = timing.host
        self._first_wave = True
        self.stall_late = self.stall_miss = self.stall_cpu = 0
        self.clock = 0
        self._bursts = bursts and core.options.order == "cached-first"
        self._cpu_free = 0
        # Predictions in the making: (finished at, serial number, prediction), a heap.
        self._coming: list[tuple[int, int, Prediction]] = []
        self._announced = 0
        self._segments_ns: dict[tuple[int, int], list[int]] = {}
        self._queue = core.queue
        self._state = core.memory.state
        core.clock_ns = lambda: self.clock

    def run(self) -> None:
        """Simulate the whole workload."""
        # A run makes no reference cycles, and looking for them took an eighth of its time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.env.run(until=self.env.process(self._host()))
        finally:
            if collecting:
                gc.enable()
        self.core.finish()

    # ------------------------------------------------------------------ the host thread

    def _host(self) -> Generator[simpy.Event, Any, None]:
        times = self.times
        kv_tokens = self.workload.max_context
        now = 0
        for step in self.workload.steps():
            marks = (*self.gpu.busy_ns, self.stall_late, self.stall_miss, self.stall_cpu)
            times.begin.append(now)
            now = self._step(step, kv_tokens, now)
            times.end.append(now)
            self._book(marks)
            yield self.env.timeout(now - self.env.now)

    def _step(self, step: Step, kv_tokens: int, now: int) -> int:
        core = self.core
        host = self.timing.host_for(step.tokens, len(step.requests))
        if host is not self._costs:
            self._use(host)
        now += host.step_ns
        self._catch_up(now)
        self.clock = now
        for request in step.begins:
            core.request_begin(request)
        core.step_begin(step.index, "decode" if step.prefill_tokens == 0 else "prefill")
        for prediction in core.predictions_at_step():
            self._announce(prediction, now)
        now = self._layers(step, kv_tokens, now)
        core.step_end()
        for request in step.ends:
            core.request_end(request)
        return now

    def _use(self, host: HostCosts) -> None:
        """Host costs from now on."""
        self._costs = host
        self.link.issue_ns = host.copy_issue_ns
        self._quiet.use(host)

    def _book(self, marks: tuple[int, ...]) -> None:
        """Where the step's time went, as differences of running sums."""
        times, busy = self.times, self.gpu.busy_ns
        segment, experts, head, late, miss, cpu = marks
        times.segments.append(busy[SEGMENT] - segment + busy[HEAD] - head)
        times.experts.append(busy[EXPERTS] - experts)
        times.stall_late.append(self.stall_late - late)
        times.stall_miss.append(self.stall_miss - miss)
        times.stall_cpu.append(self.stall_cpu - cpu)

    def _layers(self, step: Step, kv_tokens: int, now: int) -> int:
        core, link, gpu, timing = self.core, self.link, self.gpu, self.timing
        host = self._costs
        slowdown = timing.segment_slowdown_ppm
        events, counts = self._events(step)
        requests = len(step.requests)
        segments = self._segments(step.tokens, requests, kv_tokens)
        predicting = core.policy.prefetcher is not None
        previous = -1
        for layer, keys in enumerate(events):
            if not keys:
                continue
            now += host.segment_launch_ns
            gpu.submit(now, segments[layer], slowdown, SEGMENT)
            if link.lands == NEVER and not self._coming and not self._queue.ready:
                now = gpu.end(SETTLED) + host.readback_ns
            else:
                now = self._spin_for_gpu(now)
            if previous >= 0:
                core.experts_done(previous)
            previous = layer
            self.clock = now
            tokens = core.shape.assignments(keys, counts[layer]) if counts else None
            wave = core.gate(layer, keys, tokens)
            if core.reassigned is not None:
                tokens = core.reassigned
            if predicting:
                for prediction in core.predictions(layer, keys):
                    self._announce(prediction, now)
            self._first_wave = True
            at_once = self._at_once(layer, wave, tokens, now)
            now = at_once or self._execute(layer, wave, tokens, now)
            while not wave.last:
                self._first_wave = False
                now = self._spin_for_gpu(now)
                self.clock = now
                wave = core.next_wave()
                at_once = self._at_once(layer, wave, tokens, now)
                now = at_once or self._execute(layer, wave, tokens, now)
        now += host.segment_launch_ns
        gpu.submit(now, timing.head_ns(requests), slowdown, HEAD)
        now = self._spin_for_gpu(now)
        if previous >= 0:
            core.experts_done(previous)
        self.clock = now
        return now

    def _events(self, step: Step) -> tuple[list[list[int]], list[list[int]] | None]:
        """Keys of each layer's event, and the tokens assigned to each; None: one each."""
        events = self.workload.events
        counts = events.step_counts(step.index) if step.tokens > 1 else None
        return events.step(step.index), counts

    def _segments(self, tokens: int, requests: int, kv_tokens: int) -> list[int]:
        """Nominal segment times by layer."""
        known = self._segments_ns.get((tokens, requests))
        if known is None:
            known = [
                self.timing.segment_ns(layer, tokens, requests, kv_tokens)
                for layer in range(self.workload.num_layers)
            ]
            self._segments_ns[tokens, requests] = known
        return known

    # ------------------------------------------------------------------ executing a wave

    def _at_once(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        """What :meth:`_execute` does where nothing but the host can act; 0: it is not so."""
        queue = self._queue
        if self.link.lands != NEVER or self._coming or queue.low or wave.cpu:
            return 0
        if len(queue.high) != wave.waiting:
            return 0  # promoted prefetches that this wave does not wait for
        now += self._costs.gate_ns(wave.waiting, first=self._first_wave)
        if not wave.waiting:
            return self._launch(layer, wave.ready, tokens, now) if wave.ready else now
        return self._burst(layer, wave, tokens, now) if self._bursts else 0

    def _execute(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        """Decide, refill, and launch the wave's groups as their experts are there."""
        link = self.link
        now += self._costs.gate_ns(wave.waiting, first=self._first_wave)
        if link.lands <= now:
            self._catch_up(now)
        self.clock = now
        now = link.refill(now)
        cpu_end = 0
        if wave.cpu:
            now += self._costs.cpu_start_ns
            self._catch_up(now)
            cpu_end = self._start_cpu(layer, wave, tokens, now)
        if wave.order is not None and wave.waiting:
            now = self._in_order(layer, wave.order, tokens, now)
        else:
            if wave.ready:
                now = self._launch(layer, wave.ready, tokens, now)
            if wave.waiting:
                now = self._as_they_land(layer, wave.waiting, tokens, now)
        if cpu_end:
            now = self._join_cpu(cpu_end, now)
        return now

    def _launch(self, layer: int, group: Any, tokens: dict[int, int] | None, now: int) -> int:
        size = len(group)
        if tokens is None:
            return self._quiet.launch(layer, size, size, now)
        assigned = sum([tokens.get(key, 1) for key in group])
        return self._quiet.launch(layer, size, assigned, now)

    def _burst(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        """Demand copies on a link with nothing else to do: :meth:`_as_they_land`, by arithmetic."""
        copies = self.core.start_demands()
        sizes, assigned, owners = chunks_to_copy(copies, tokens)
        ready = len(wave.ready)
        if tokens is not None:
            there = (ready, sum([tokens.get(key, 1) for key in wave.ready]))
        else:
            there = (ready, ready)

        def book_stall(chunk: int, stall_ns: int) -> None:
            self._book_stall(owners[chunk], stall_ns)

        now = self._quiet.burst(layer, there, sizes, assigned, now, book_stall)
        self.core.land_demands(copies)
        return now

    def _as_they_land(
        self, layer: int, waiting: int, tokens: dict[int, int] | None, now: int
    ) -> int:
        """One launch for all that has landed since the last."""
        landed = self.core.landed
        while waiting:
            if self._bursts and not (landed or self._coming) and can_rush(self.core, self.link):
                return self._rush(layer, waiting, tokens, now)
            now = self._spin_for_landing(None, now)
            group = [copy.key for copy in landed]
            landed.clear()
            waiting -= len(group)
            now = self._launch(layer, group, tokens, now + self._costs.landing_ns)
        return now

    def _rush(self, layer: int, waiting: int, tokens: dict[int, int] | None, now: int) -> int:
        """:meth:`_as_they_land` where the order of what lands is known: the core is told at once.

        Other copies follow behind, so none of them lands before the last that is awaited.
        """
        core, link = self.core, self.link
        rush = Rush(core, link, waiting)
        while rush.waiting:
            began = now
            now = rush.spin(now)
            if now > began:
                self._count_stall(rush.landed[-1], began, now)
            while link.host_free > now:
                now = link.host_free
                if rush.waiting:
                    rush.land_until(now)
                else:
                    self._advance(now)
            group = [copy.key for copy in rush.landed]
            now = self._launch(layer, group, tokens, now + self._costs.landing_ns)
            rush.landed.clear()
        return now

    def _in_order(
        self, layer: int, order: list[int], tokens: dict[int, int] | None, now: int
    ) -> int:
        """Strict order: the longest run that is there, then wait for the next expert."""
        state = self._state
        at = 0
        while at < len(order):
            self._catch_up(now)
            first = at
            while at < len(order) and state[order[at]] == RESIDENT:
                at += 1
            if at > first:
                now = self._launch(layer, order[first:at], tokens, now)
            if at < len(order):
                now = self._spin_for_landing(order[at], now) + self._costs.landing_ns
        self.core.landed.clear()
        return now

    def _spin_for_landing(self, key: int | None, now: int) -> int:
        """Poll until ``key`` (None: any awaited expert) is there and no hand-over is under way."""
        link, state, landed = self.link, self._state, self.core.landed
        began = now
        self._begin_spin(now)
        while not (landed if key is None else state[key] == RESIDENT):
            now = self._next_instant()
        if now > began:
            self._count_stall(landed[-1], began, now)
        while link.host_free > now:
            now = link.host_free
            self._advance(now)
        return now

    # ------------------------------------------------------------------ time passes

    def _catch_up(self, now: int) -> None:
        """What lands until ``now`` while the host is busy: noticed, but nothing is refilled."""
        link = self.link
        while link.lands <= now:
            self.clock = link.lands
            link.land()

    def _begin_spin(self, now: int) -> None:
        """The host begins to poll."""
        link = self.link
        if link.lands <= now:
            self._catch_up(now)
        link.host_free = now
        if self._coming or (link.room > 0 and self._queue.ready):
            self._poll(now)

    def _next_instant(self) -> int:
        """Until the next landing or finished prediction, which the spinning host looks after."""
        link, coming = self.link, self._coming
        now = link.lands
        if coming and coming[0][0] < now:
            now = coming[0][0]
        elif now == NEVER:
            self._no_copy()
        else:
            self.clock = now
            link.land()
        self._poll(now)
        return now

    def _advance(self, until: int) -> None:
        """Everything up to and at ``until``, the host spinning."""
        link, coming = self.link, self._coming
        while link.lands <= until or (coming and coming[0][0] <= until):
            self._next_instant()

    def _known_until(self, now: int) -> int:
        """The link's activity is settled up to this instant."""
        return now if self.link.lands == NEVER else self.link.lands

    def _no_copy(self) -> NoReturn:
        raise RuntimeError(
            f"step {self.core.step}, layer {self.core.layer}: an expert is awaited but no copy is "
            "under way"
        )

    def _count_stall(self, copy: Copy, began: int, now: int) -> None:
        """Time the GPU stood idle because the host waited for this copy since ``began``."""
        lands = self.link.lands
        idle_from = self.gpu.end(now if lands == NEVER else lands)
        if idle_from < began:
            idle_from = began
        if idle_from >= now:
            return
        if copy.demand:
            self.stall_miss += now - idle_from
        else:
            self.stall_late += now - idle_from

    def _book_stall(self, copy: Copy, stall_ns: int) -> None:
        if copy.demand:
            self.stall_miss += stall_ns
        else:
            self.stall_late += stall_ns

    # ------------------------------------------------------------------ spinning

    def _poll(self, now: int) -> None:
        """Take in predictions that are finished, then refill the window."""
        self.clock = now
        coming, link = self._coming, self.link
        while coming and coming[0][0] <= now:
            self.core.prediction_ready(heappop(coming)[2])
            link.host_free = max(link.host_free, now) + self._costs.prediction_ns
        if self._queue.high or self._queue.low:
            link.refill(now)

    def _spin_for_gpu(self, now: int) -> int:
        """Poll until everything submitted has run and its result is on the host."""
        link, gpu = self.link, self.gpu
        readback = self._costs.readback_ns
        self._begin_spin(now)
        while True:
            quiet = link.lands == NEVER and not self._coming
            done = gpu.end(SETTLED if quiet else self._known_until(now)) + readback
            target = done if done > link.host_free else link.host_free
            if quiet or target <= now:
                return target if target > now else now
            now = target
            self._advance(now)

    # ------------------------------------------------------------------ predictions, CPU

    def _announce(self, prediction: Prediction, now: int) -> None:
        """A predictor starts; its result is polled once its time has passed."""
        cost = prediction.cost_ns(self.timing.predictor_ns.get(prediction.source, 0))
        if cost == 0:
            self.core.prediction_ready(prediction)
            return
        self._announced += 1
        heappush(self._coming, (now + cost, self._announced, prediction))

    def _start_cpu(self, layer: int, wave: Wave, tokens: dict[int, int] | None, now: int) -> int:
        """The CPU workers take their experts; returns when the result is back."""
        size = len(wave.cpu)
        assigned = size if tokens is None else sum(tokens.get(key, 1) for key in wave.cpu)
        duration = self.timing.cpu_experts_ns(layer, size, assigned)
        if self.link.lands != NEVER:
            duration += duration * self.timing.cpu_slowdown_ppm // _PPM
        start = max(now, self._cpu_free)
        self._cpu_free = start + duration
        self.link.cpu_from, self.link.cpu_until = start, self._cpu_free
        return self._cpu_free

    def _join_cpu(self, cpu_end: int, now: int) -> int:
        """Wait for the CPU's result and add it."""
        link = self.link
        began = now
        self._begin_spin(now)
        while (target := max(cpu_end, link.host_free)) > now:
            now = target
            self._advance(now)
        if cpu_end > began:
            idle_from = max(began, self.gpu.end(self._known_until(now)))
            self.stall_cpu += max(0, cpu_end - idle_from)
        now += self._costs.experts_launch_ns
        self.gpu.submit(now, self.timing.combine_ns(), self.timing.experts_slowdown_ppm, EXPERTS)
        return now


def chunks_to_copy(
    copies: Sequence[Copy], tokens: dict[int, int] | None
) -> tuple[list[int], list[int], list[Copy]]:
    """Bytes of every chunk, tokens of the expert that it completes (0: none), and its copy."""
    sizes: list[int] = []
    assigned: list[int] = []
    owners: list[Copy] = []
    for copy in copies:
        left = copy.chunks - copy.landed
        sizes += copy.chunk_bytes[copy.landed :]
        assigned += [0] * (left - 1)
        assigned.append(1 if tokens is None else tokens.get(copy.key, 1))
        owners += [copy] * left
    return sizes, assigned, owners
