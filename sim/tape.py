"""Decide once, time on many machines: for policies whose decisions do not depend on time.

Without prefetches nothing is under way when a gate is known: the link is idle, the GPU drained. So
what follows until the next gate depends on the event alone - its layer, how many experts are there,
which copies it waits for - and not on when it happens. :func:`record` notes that of every event;
:func:`play` times each distinct kind once a machine and adds up. The times are those of
:class:`sim.machine.Machine`, to the nanosecond.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from policies.core import DecisionCore, Wave
from policies.interface import Tally
from policies.transfers import Copy
from sim.gpu import EXPERTS, SETTLED, GpuStream
from sim.link import Link
from sim.machine import StepTimes, chunks_to_copy
from sim.quiet import QuietLink
from sim.timing import HostCosts, Timing
from tracer.workload import Workload

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WaveShape:
    """What a wave's time depends on: see :meth:`sim.quiet.QuietLink.burst`."""

    ready: tuple[int, int]
    sizes: tuple[int, ...]
    assigned: tuple[int, ...]


@dataclass(frozen=True)
class EventShape:
    """What an event's time depends on."""

    layer: int
    waves: tuple[WaveShape, ...]


@dataclass
class Tape:
    """Decisions of one run.

    ``kinds``: index into ``shapes`` of every event that ran, int64 [events]; ``layers``: its layer,
    int64 [events]; ``begins``: first event of each step, int64 [steps + 1].
    """

    kinds: Ints
    layers: Ints
    begins: Ints
    shapes: list[EventShape]
    tally: Tally


@dataclass
class _Shapes:
    """Shapes met so far; one-token events by their counts, which is quicker to look up."""

    known: dict[EventShape, int] = field(default_factory=dict)
    by_counts: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def index(self, shape: EventShape) -> int:
        return self.known.setdefault(shape, len(self.known))


def can_record(core: DecisionCore) -> bool:
    """Whether this core's decisions are free of time, and its events free of prefetches."""
    policy = core.policy
    plain = policy.prefetcher is None and policy.miss_rule is None
    return plain and core.options.order == "cached-first"


def record(workload: Workload, core: DecisionCore) -> Tape:
    """Run the decisions alone; the policy must not be one that asks for the time.

    Raises ValueError for a core whose decisions are not free of time.
    """
    if not can_record(core):
        raise ValueError("only demand copies in cached-first order can be recorded without time")
    kinds, layers = array("q"), array("q")
    begins = array("q", [0])
    shapes = _Shapes()
    uniform = core.shape.precisions == 1
    for step in workload.steps():
        for request in step.begins:
            core.request_begin(request)
        core.step_begin(step.index, "decode" if step.prefill_tokens == 0 else "prefill")
        counts = workload.events.step_counts(step.index) if step.tokens > 1 else None
        previous = -1
        for layer, keys in enumerate(workload.events.step(step.index)):
            if not keys:
                continue
            if previous >= 0:
                core.experts_done(previous)
            previous = layer
            tokens = dict(zip(keys, counts[layer], strict=True)) if counts else None
            wave = core.gate(layer, keys, tokens)
            layers.append(layer)
            if wave.last and tokens is None and uniform:
                kinds.append(_one_token_event(core, layer, wave, shapes))
            else:
                kinds.append(_event(core, layer, wave, tokens, shapes))
        if previous >= 0:
            core.experts_done(previous)
        core.step_end()
        for request in step.ends:
            core.request_end(request)
        begins.append(len(kinds))
    tally = core.finish()
    return Tape(
        np.array(kinds, np.int64),
        np.array(layers, np.int64),
        np.array(begins, np.int64),
        list(shapes.known),
        tally,
    )


def _one_token_event(core: DecisionCore, layer: int, wave: Wave, shapes: _Shapes) -> int:
    """Experts of a layer are of one size and have one token each: counts tell it all."""
    copies: list[Copy] = []
    if wave.waiting:
        copies = core.start_demands()
    counts = (layer, len(wave.ready), wave.waiting)
    index = shapes.by_counts.get(counts)
    if index is None:
        index = shapes.index(EventShape(layer, (_shape(wave, copies, None),)))
        shapes.by_counts[counts] = index
    if copies:
        core.land_demands(copies)
    return index


def _event(
    core: DecisionCore, layer: int, wave: Wave, tokens: dict[int, int] | None, shapes: _Shapes
) -> int:
    waves = [_wave(core, wave, tokens)]
    while not wave.last:
        wave = core.next_wave()
        waves.append(_wave(core, wave, tokens))
    return shapes.index(EventShape(layer, tuple(waves)))


def _wave(core: DecisionCore, wave: Wave, tokens: dict[int, int] | None) -> WaveShape:
    copies = core.start_demands() if wave.waiting else []
    shape = _shape(wave, copies, tokens)
    if copies:
        core.land_demands(copies)
    return shape


def _shape(wave: Wave, copies: list[Copy], tokens: dict[int, int] | None) -> WaveShape:
    sizes, assigned, _ = chunks_to_copy(copies, tokens)
    ready = len(wave.ready)
    there = ready if tokens is None else sum(tokens.get(key, 1) for key in wave.ready)
    return WaveShape((ready, there), tuple(sizes), tuple(assigned))


@dataclass
class Timed:
    """What :func:`play` gives: times of the steps, and how long the link was busy, ns."""

    times: StepTimes
    link_busy_ns: int


def play(tape: Tape, workload: Workload, timing: Timing, *, window: int = 2) -> Timed:
    """Time a tape on one machine. ``window``: chunks handed to the hardware at a time."""
    hosts = [timing.host_for(step.tokens, len(step.requests)) for step in workload.steps()]
    until_next, experts, stall, link_busy = _events_ns(tape, workload, timing, window, hosts).T
    segments = _segments_ns(tape, workload, timing)
    heads = np.array([timing.head_ns(len(step.requests)) for step in workload.steps()], np.int64)
    readback = np.array([host.readback_ns for host in hosts], np.int64)
    gated = segments + np.repeat(readback, np.diff(tape.begins)) + until_next
    edges = readback + [host.step_ns + host.segment_launch_ns for host in hosts]
    lengths = _by_step(gated, tape.begins) + heads + edges
    ends = np.cumsum(lengths)
    zeros = [0] * len(lengths)
    times = StepTimes(
        begin=(ends - lengths).tolist(),
        end=ends.tolist(),
        segments=(_by_step(segments, tape.begins) + heads).tolist(),
        experts=_by_step(experts, tape.begins).tolist(),
        stall_late=zeros,
        stall_miss=_by_step(stall, tape.begins).tolist(),
        stall_cpu=zeros,
    )
    return Timed(times, int(link_busy.sum()))


def _events_ns(
    tape: Tape, workload: Workload, timing: Timing, window: int, hosts: list[HostCosts]
) -> Ints:
    """Of every event what :meth:`_EventClock.event` gives, int [events, 4]."""
    clock = _EventClock(timing, workload, window)
    kinds_of_host = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
    host_of_step = np.array([kinds_of_host[host] for host in hosts], np.int64)
    host_of_event = np.repeat(host_of_step, np.diff(tape.begins))
    # Distinct pairs of host and kind, by a table of all: sorting would cost more than timing them.
    pairs = host_of_event * len(tape.shapes) + tape.kinds
    occurs = np.zeros(len(kinds_of_host) * len(tape.shapes), np.bool_)
    occurs[pairs] = True
    known = list(kinds_of_host)
    times = [
        clock.event(tape.shapes[pair % len(tape.shapes)], known[pair // len(tape.shapes)])
        for pair in np.flatnonzero(occurs).tolist()
    ]
    index = np.cumsum(occurs) - 1
    result: Ints = np.array(times, np.int64).reshape(-1, 4)[index[pairs]]
    return result


def _by_step(values: Ints, begins: Ints) -> Ints:
    """Sums over each step's events."""
    sums: Ints = np.concatenate(([0], np.cumsum(values)))
    return sums[begins[1:]] - sums[begins[:-1]]


def _segments_ns(tape: Tape, workload: Workload, timing: Timing) -> Ints:
    """Nominal segment time of every event: no copy is under way while a segment runs."""
    kv_tokens = workload.max_context
    known: dict[tuple[int, int], int] = {}
    table: list[list[int]] = []
    row_of_step = []
    for step in workload.steps():
        size = (step.tokens, len(step.requests))
        if size not in known:
            known[size] = len(table)
            table.append(
                [timing.segment_ns(layer, *size, kv_tokens) for layer in range(workload.num_layers)]
            )
        row_of_step.append(known[size])
    row_of_event = np.repeat(np.array(row_of_step), np.diff(tape.begins))
    segments: Ints = np.array(table, np.int64)[row_of_event, tape.layers]
    return segments


class _EventClock:
    """Times one kind of event after the other on an idle machine."""

    def __init__(self, timing: Timing, workload: Workload, window: int) -> None:
        # A link of its own that nobody asks for chunks: only its arithmetic is used.
        self._link = Link(_Nothing(), timing.link, window, timing.host.copy_issue_ns)
        self._gpu = GpuStream(self._link)
        self._quiet = QuietLink(
            timing, self._link, self._gpu, workload.num_layers, workload.num_experts
        )
        self._gate = 1
        self._stall = 0

    def event(self, shape: EventShape, host: HostCosts) -> tuple[int, int, int, int]:
        """Ns from the gate to the next segment's start on the GPU; experts, stalls, link busy."""
        link, gpu = self._link, self._gpu
        link.issue_ns = host.copy_issue_ns
        self._quiet.use(host)
        began = self._gate
        experts, link_busy, self._stall = gpu.busy_ns[EXPERTS], link.busy_ns, 0
        now = began
        for index, wave in enumerate(shape.waves):
            if index:
                now = gpu.end(SETTLED) + host.readback_ns
            awaited = len(wave.assigned) - wave.assigned.count(0)
            now += host.gate_ns(awaited, first=not index)
            if wave.sizes:
                now = self._quiet.burst(
                    shape.layer, wave.ready, wave.sizes, wave.assigned, now, self._book_stall
                )
            elif wave.ready[0]:
                now = self._quiet.launch(shape.layer, *wave.ready, now)
        drained = gpu.end(SETTLED)
        # The next segment is launched once the host is free, and runs once the GPU is.
        until_next = max(now + host.segment_launch_ns, drained) - began
        self._gate = max(now, drained) + 1
        return (
            until_next,
            gpu.busy_ns[EXPERTS] - experts,
            self._stall,
            link.busy_ns - link_busy,
        )

    def _book_stall(self, _: int, stall_ns: int) -> None:
        self._stall += stall_ns


class _Nothing:
    """A source without chunks."""

    def next_chunk(self) -> None:
        return None

    def chunk_done(self, copy: Copy) -> bool:
        raise AssertionError(f"{copy} was never handed over")
