"""The execution contract a second time: plain SimPy, a process a chunk and a process a kernel.

Written from docs/contract.md as one would write it without caring for speed, so that it can hold
the lean model of ``sim/`` to the same nanosecond. What happens at one instant is put in order by
SimPy's priorities: completions are ordinary events, the host acts at priority ``LAST``, hence after
all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any

import simpy
from simpy.events import Event

from policies.core import DecisionCore, Wave
from policies.interface import Prediction, Tally
from policies.memory import RESIDENT
from policies.transfers import Copy
from sim.timing import Timing
from tracer.workload import Step, Workload

PPM = 10**6
LAST = 2  # after SimPy's URGENT (0) and NORMAL (1)
HIGH, LOW = 0, 1

Steps = Generator[Event, Any, None]


@dataclass
class PlainResult:
    """Per step, ns: begin, end and where the time went; for the run: link busy ns and tally."""

    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    stall_late: list[int] = field(default_factory=list)
    stall_miss: list[int] = field(default_factory=list)
    stall_cpu: list[int] = field(default_factory=list)
    link_busy_ns: int = 0
    tally: Tally | None = None


class PlainLink:
    """The copy engine: chunks in the order of their hand-over, one on the wire at a time."""

    def __init__(self, env: simpy.Environment, core: DecisionCore, timing: Timing, window: int):
        self.env = env
        self.core = core
        self.timing = timing
        self.window = simpy.PriorityResource(env, window)
        self.wire = simpy.Resource(env, 1)
        self.busy: list[list[int]] = []
        self.changed = env.event()
        self.completed = env.event()
        self.landings: list[tuple[int, Copy]] = []
        self.cpu_from = self.cpu_until = 0
        self.handed_over = 0

    def free_places(self) -> int:
        return self.window.capacity - self.window.count

    def take_place(self, copy: Copy) -> Event:
        return self.window.request(priority=HIGH if copy.high else LOW)

    def carry(self, copy: Copy, nbytes: int, place: Event) -> Steps:
        """A chunk from its hand-over to its completion."""
        handed_at = self.env.now
        self.handed_over += 1
        with self.wire.request() as turn:
            yield turn
            yield self.env.timeout(self._occupy(handed_at, nbytes))
        self.handed_over -= 1
        self.window.release(place)
        if self.core.chunk_done(copy):
            self.landings.append((self.env.now, copy))
        self.completed.succeed()
        self.completed = self.env.event()

    def _occupy(self, handed_at: int, nbytes: int) -> int:
        now, costs = self.env.now, self.timing.link
        on_idle_link = not self.busy or handed_at > self.busy[-1][1]
        wire_ns = -(-nbytes * 10**9 // costs.bytes_per_s)
        duration = wire_ns + (costs.startup_ns if on_idle_link else costs.gap_ns)
        if self.cpu_from <= now < self.cpu_until:
            duration += duration * self.timing.link_slowdown_cpu_ppm // PPM
        if self.busy and self.busy[-1][1] == now:
            self.busy[-1][1] = now + duration
        else:
            self.busy.append([now, now + duration])
        self.changed.succeed()
        self.changed = self.env.event()
        return duration

    def busy_after(self, instant: int) -> list[tuple[int, int]]:
        """Maximal busy periods, the parts after ``instant``."""
        periods = []
        for start, end in reversed(self.busy):
            if end <= instant:
                break
            periods.append((max(start, instant), end))
        return periods[::-1]


class PlainGpu:
    """The stream: a process a kernel, whose end is worked out anew whenever the link changes."""

    def __init__(self, env: simpy.Environment, link: PlainLink):
        self.env = env
        self.link = link
        self.stream = simpy.Resource(env, 1)
        self.dry_since = 0
        self.last: Event | None = None

    def submit(self, nominal_ns: int, slowdown_ppm: int, book: list[int]) -> None:
        self.last = self.env.process(self._kernel(nominal_ns, slowdown_ppm, book))

    def _kernel(self, nominal_ns: int, slowdown_ppm: int, book: list[int]) -> Steps:
        with self.stream.request() as turn:
            yield turn
            start = self.env.now
            while True:
                left = self._end(start, nominal_ns, slowdown_ppm) - self.env.now
                if left == 0:
                    break
                yield self.env.any_of([self.env.timeout(left), self.link.changed])
        book[-1] += self.env.now - start
        self.dry_since = self.env.now

    def _end(self, start: int, nominal_ns: int, slowdown_ppm: int) -> int:
        scale = PPM + slowdown_ppm
        now, left = start, nominal_ns
        for begin, end in self.link.busy_after(start):
            if left <= begin - now:
                return now + left
            left -= begin - now
            slowed = -(-left * scale // PPM)
            if slowed <= end - begin:
                return begin + slowed
            left -= (end - begin) * PPM // scale
            now = end
        return now + left

    def ran_dry_by(self, instant: int) -> int | None:
        """Since when the stream has had nothing to run at ``instant``; None: it was running."""
        if self.last is not None and not self.last.processed:
            return None
        return self.dry_since if self.dry_since <= instant else None


class PlainModel:
    """Host process of the contract over a :class:`PlainLink` and a :class:`PlainGpu`."""

    def __init__(
        self, workload: Workload, core: DecisionCore, timing: Timing, *, window: int = 2
    ) -> None:
        self.env = simpy.Environment()
        self.workload = workload
        self.core = core
        self.timing = timing
        # Durations are asked for once, so that a benchmark compares models, not roofline sums.
        self.segment_ns = cache(timing.segment_ns)
        self.experts_ns = cache(timing.experts_ns)
        self.head_ns = cache(timing.head_ns)
        self.kv_tokens = workload.max_context
        self.host = timing.host
        self.link = PlainLink(self.env, core, timing, window)
        self.gpu = PlainGpu(self.env, self.link)
        self.hands = simpy.Resource(self.env, 1)
        self.finished: list[Prediction] = []
        self.predicted = self.env.event()
        self.result = PlainResult()
        self.cpu: Event | None = None
        core.clock_ns = lambda: int(self.env.now)

    def run(self) -> PlainResult:
        """Simulate the whole workload."""
        self.env.run(until=self.env.process(self._host()))
        result = self.result
        result.link_busy_ns = sum(end - start for start, end in self.link.busy)
        result.tally = self.core.finish()
        return result

    # ------------------------------------------------------------------ host

    def _host(self) -> Steps:
        for step in self.workload.steps():
            self._open_books()
            yield from self._step(step)
            self.result.end.append(self.env.now)

    def _open_books(self) -> None:
        result = self.result
        result.begin.append(self.env.now)
        for book in (result.segments, result.experts):
            book.append(0)
        for book in (result.stall_late, result.stall_miss, result.stall_cpu):
            book.append(0)

    def _step(self, step: Step) -> Steps:
        core = self.core
        self.host = self.timing.host_for(step.tokens, len(step.requests))
        yield self._host_event(self.host.step_ns)
        for request in step.begins:
            core.request_begin(request)
        core.step_begin(step.index, "prefill" if step.prefill_tokens else "decode")
        self._announce(core.predictions_at_step())
        keys = self.workload.events.step(step.index)
        counts = self.workload.events.step_counts(step.index)
        before: int | None = None
        for layer in range(self.workload.num_layers):
            if keys[layer]:
                tokens = core.shape.assignments(keys[layer], counts[layer])
                yield from self._layer(step, layer, keys[layer], tokens, before)
                before = layer
        yield from self._submit_segment(self.head_ns(len(step.requests)))
        yield from self._spin_for_gpu()
        if before is not None:
            core.experts_done(before)
        core.step_end()
        for request in step.ends:
            core.request_end(request)

    def _layer(
        self, step: Step, layer: int, keys: list[int], tokens: dict[int, int], before: int | None
    ) -> Steps:
        core, host = self.core, self.host
        yield from self._submit_segment(
            self.segment_ns(layer, step.tokens, len(step.requests), self.kv_tokens)
        )
        yield from self._spin_for_gpu()
        if before is not None:
            core.experts_done(before)
        wave = core.gate(layer, keys, tokens)
        tokens = core.reassigned or tokens
        if step.tokens == 1:
            # Whichever experts a lossy rule chose, the token is assigned to each once.
            tokens = defaultdict(lambda: 1)
        self._announce(core.predictions(layer, keys))
        yield self._host_event(host.decision_ns + host.awaited_ns * wave.waiting)
        yield from self._wave(wave, layer, tokens)
        while not wave.last:
            yield from self._spin_for_gpu()
            wave = core.next_wave()
            later = host.decision_ns if host.next_wave_ns is None else host.next_wave_ns
            yield self._host_event(later + host.awaited_ns * wave.waiting)
            yield from self._wave(wave, layer, tokens)

    def _wave(self, wave: Wave, layer: int, tokens: dict[int, int]) -> Steps:
        yield from self._refill_before_launch()
        if wave.cpu:
            yield self._host_event(self.host.cpu_start_ns)
            self._start_cpu(layer, wave.cpu, tokens)
        if wave.order is not None:
            yield from self._in_order(wave.order, layer, tokens)
        else:
            yield from self._as_they_land(wave, layer, tokens)
        if wave.cpu:
            yield from self._join_cpu()

    def _as_they_land(self, wave: Wave, layer: int, tokens: dict[int, int]) -> Steps:
        landed = self.core.landed
        if wave.ready:
            yield from self._launch(wave.ready, layer, tokens)
        missing = wave.waiting
        while missing:
            yield from self._spin_for_landing(lambda: bool(landed))
            group = [copy.key for copy in landed]
            landed.clear()
            missing -= len(group)
            yield self._host_event(self.host.landing_ns)
            yield from self._launch(group, layer, tokens)

    def _in_order(self, order: list[int], layer: int, tokens: dict[int, int]) -> Steps:
        state = self.core.memory.state
        rest = list(order)
        while rest:
            group = list(takewhile(lambda key: state[key] == RESIDENT, rest))
            del rest[: len(group)]
            if group:
                yield from self._launch(group, layer, tokens)
            if rest:
                yield from self._spin_for_landing(lambda: state[rest[0]] == RESIDENT)
                yield self._host_event(self.host.landing_ns)

    def _launch(self, group: Iterable[int], layer: int, tokens: dict[int, int]) -> Steps:
        group = list(group)
        assignments = sum(tokens[key] for key in group)
        more_ns = self.host.launch_each_ns * (len(group) - 1)
        yield self._host_event(self.host.experts_launch_ns + more_ns)
        nominal_ns = self.experts_ns(layer, len(group), assignments)
        slowdown_ppm = self.timing.experts_ppm(len(group), assignments)
        self.gpu.submit(nominal_ns, slowdown_ppm, self.result.experts)

    def _submit_segment(self, nominal_ns: int) -> Steps:
        yield self._host_event(self.host.segment_launch_ns)
        self.gpu.submit(nominal_ns, self.timing.segment_slowdown_ppm, self.result.segments)

    def _host_event(self, delay_ns: int = 0) -> Event:
        """An event after ``delay_ns``, behind everything that completes at that instant."""
        event = Event(self.env)
        event._ok, event._value = True, None
        self.env.schedule(event, priority=LAST, delay=delay_ns)
        return event

    # ------------------------------------------------------------------ spinning and refilling

    def _spin(self, is_over: Callable[[], bool], *awaited: Event) -> Steps:
        """Poll until ``is_over`` and no hand-over is under way; ``awaited`` may make it so."""
        handing = self._take_effect()
        handing += self._refill_while_spinning()
        while not is_over() or self.hands.count:
            completed, predicted = self.link.completed, self.predicted
            pending = [event for event in (*awaited, *handing) if not event.processed]
            yield self.env.any_of([completed, predicted, *pending])
            yield self._host_event()
            if completed.triggered or predicted.triggered:
                handing += self._take_effect()
                handing += self._refill_while_spinning()

    def _spin_for_gpu(self) -> Steps:
        read = self.env.process(self._read_back())
        yield from self._spin(lambda: read.processed, read)

    def _read_back(self) -> Steps:
        assert self.gpu.last is not None
        yield self.gpu.last
        yield self.env.timeout(self.host.readback_ns)

    def _spin_for_landing(self, is_over: Callable[[], bool]) -> Steps:
        began = self.env.now
        over_at_once = is_over()
        self.link.landings.clear()
        ending: list[tuple[int, Copy]] = []

        def landed() -> bool:
            if not is_over():
                return False
            if not over_at_once and not ending:
                ending.append(self.link.landings[-1])
            return True

        yield from self._spin(landed)
        for instant, copy in ending:
            book = self.result.stall_miss if copy.demand else self.result.stall_late
            book[-1] += self._stalled(began, instant)

    def _stalled(self, began: int, until: int) -> int:
        dry_since = self.gpu.ran_dry_by(until)
        return 0 if dry_since is None else until - max(began, dry_since)

    def _refill(self) -> list[tuple[Copy, int, Event]]:
        """Chunks for the free places, all named at this instant; each holds its place at once."""
        named = []
        for _ in range(self.link.free_places()):
            chunk = self.core.next_chunk()
            if chunk is None:
                break
            named.append((*chunk, self.link.take_place(chunk[0])))
        return named

    def _refill_before_launch(self) -> Steps:
        """The refill after a decision: the host does nothing else until all is handed over."""
        for chunk in self._refill():
            yield self._host_event(self.host.copy_issue_ns)
            self.env.process(self.link.carry(*chunk))

    def _refill_while_spinning(self) -> list[Event]:
        """Chunks are handed over one by one, behind those under way; the polling goes on."""
        return [
            self.env.process(self._hand_over(*chunk, self.hands.request()))
            for chunk in self._refill()
        ]

    def _hand_over(self, copy: Copy, nbytes: int, place: Event, turn: Event) -> Steps:
        yield turn
        yield self.env.timeout(self.host.copy_issue_ns)
        self.hands.release(turn)
        self.env.process(self.link.carry(copy, nbytes, place))

    # ------------------------------------------------------------------ predictions

    def _announce(self, predictions: Iterable[Prediction]) -> None:
        for prediction in predictions:
            usual_ns = self.timing.predictor_ns.get(prediction.source, 0)
            cost_ns = round(usual_ns * prediction.work)
            if cost_ns:
                self.env.process(self._predict(prediction, cost_ns))
            else:
                self.core.prediction_ready(prediction)

    def _predict(self, prediction: Prediction, cost_ns: int) -> Steps:
        yield self.env.timeout(cost_ns)
        self.finished.append(prediction)
        self.predicted.succeed()
        self.predicted = self.env.event()

    def _take_effect(self) -> list[Event]:
        """The host is busy with each, as with a hand-over, and in the same order."""
        busy: list[Event] = []
        for prediction in self.finished:
            self.core.prediction_ready(prediction)
            busy.append(self.env.process(self._be_busy(self.hands.request())))
        self.finished.clear()
        return busy

    def _be_busy(self, turn: Event) -> Steps:
        yield turn
        yield self.env.timeout(self.host.prediction_ns)
        self.hands.release(turn)

    # ------------------------------------------------------------------ CPU lane

    def _start_cpu(self, layer: int, group: Iterable[int], tokens: dict[int, int]) -> None:
        group = list(group)
        assignments = sum(tokens[key] for key in group)
        duration = self.timing.cpu_experts_ns(layer, len(group), assignments)
        if self.link.handed_over:
            duration += duration * self.timing.cpu_slowdown_ppm // PPM
        start = max(self.env.now, self.link.cpu_until)
        self.link.cpu_from, self.link.cpu_until = start, start + duration
        self.cpu = self.env.timeout(start + duration - self.env.now)

    def _join_cpu(self) -> Steps:
        assert self.cpu is not None
        cpu, began, ready = self.cpu, self.env.now, self.link.cpu_until
        yield from self._spin(lambda: cpu.processed, cpu)
        if ready > began:
            self.result.stall_cpu[-1] += self._stalled(began, ready)
        yield self._host_event(self.host.experts_launch_ns)
        self.gpu.submit(
            self.timing.combine_ns(), self.timing.experts_slowdown_ppm, self.result.experts
        )
