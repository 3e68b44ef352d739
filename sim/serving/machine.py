"""The machine of a served workload: steps are formed at the simulated time at which they begin."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from policies.core import DecisionCore
from sim.machine import Machine
from sim.quiet import QuietLink
from sim.serving.arrivals import Source
from sim.serving.checks import Integral, Ledger, fail
from sim.serving.requests import Request
from sim.serving.schedule import UNLIMITED, Rules, Scheduler, Share
from sim.serving.stage import Stage
from sim.timing import Timing
from tracer.workload import Step, Workload

#: told (answered, of how many) whenever a request is answered
Progress = Callable[[int, int], None]


class ServedWorkload(Workload):
    """Sizes of a workload whose steps are formed while time runs; it has no events of its own.

    ``max_context``: KV capacity of one request, ``kv_capacity`` of all; ``max_batch``: requests,
    ``max_step_tokens``: rows that a step may have.
    """

    # Given, where a recorded workload works them out.
    max_context: int = 0
    kv_capacity: int = 0
    max_batch: int = 0
    max_step_tokens: int = 0

    def __init__(self, work: Workload, rules: Rules, context: int, longest_prompt: int) -> None:
        self.rules = rules
        self.num_layers = work.num_layers
        self.num_experts = work.num_experts
        self.top_k = work.top_k
        self.touch_order = work.touch_order
        self.max_context = context
        self.kv_capacity = rules.kv_tokens
        self.max_batch = rules.batch
        rows = rules.batch * max(1, min(rules.chunk, longest_prompt))
        self.max_step_tokens = min(rules.step_tokens, rows)


class Server:
    """Arrivals, queue and scheduler, and the books that are kept of them."""

    def __init__(
        self,
        requests: list[Request],
        source: Source,
        rules: Rules,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self._requests = requests
        self._source = source
        self.rules = rules
        self.scheduler = Scheduler(rules)
        self.ledger = Ledger(rules)
        self.system = Integral("system")
        self.queue = Integral("queue")
        #: between each decode token and the token before it (or the admission), ns
        self.gaps_ns = array("q")
        self._last_token: dict[int, int] = {}
        self._arrived = 0
        self._finished = 0

    @property
    def is_done(self) -> bool:
        """Everybody is answered."""
        return self._finished == len(self._requests)

    def next_ns(self) -> int:
        """When the next one comes. RuntimeError: nobody will, and not all are answered."""
        coming = self._source.next_ns()
        if coming is None:
            fail(f"{self._finished} of {len(self._requests)} are answered, and nobody comes")
        return coming

    def take_until(self, now: int) -> None:
        """Who arrives until ``now`` joins the queue."""
        source = self._source
        while (coming := source.next_ns()) is not None and coming <= now:
            request = self._requests[self._arrived]
            self._arrived += 1
            request.arrival = source.take()
            self.system.change(coming, 1)
            self.queue.change(coming, 1)
            self.scheduler.waiting.append(request)

    def form(self, now: int) -> list[Share]:
        """The shares of a step that begins now; none: nobody is there."""
        self.take_until(now)
        shares, admitted = self.scheduler.form()
        for request in admitted:
            request.scheduled = now
            self.queue.change(now, -1)
        return shares

    def note(self, now: int, shares: list[Share], rows: list[int]) -> None:
        """The rows of the step that begins: see :mod:`sim.serving.checks`."""
        self.ledger.step(now, rows, shares)
        waiting = self.scheduler.waiting
        self.ledger.nobody_waits_in_vain(now, waiting, self.rules.step_tokens - len(rows))

    def complete(self, shares: list[Share], end: int) -> None:
        """The step is over: who is finished leaves, and who was waiting for that may come again."""
        self.take_until(end)
        self._note_gaps(shares, end)
        for request in self.scheduler.complete(shares, end):
            self._finished += 1
            del self._last_token[request.index]
            self.system.change(end, -1)
            self.ledger.finished(request)
            self._source.answered(end)
            if self._progress is not None:
                self._progress(self._finished, len(self._requests))
        if self.rules.static and not self.scheduler.running:
            self.ledger.batch_over()

    def _note_gaps(self, shares: list[Share], end: int) -> None:
        last = self._last_token
        for request, rows in shares:
            if request.done >= request.prompt:
                self.gaps_ns.append(end - last.get(request.index, request.scheduled))
            elif request.done + rows < request.prompt:
                continue
            last[request.index] = end


@dataclass
class StepLog:
    """Of each step: rows of either phase, requests, distinct experts, events and waves.

    ``lines``: of the batch, idle ones too; ``alike``: requests whose trace request another of the
    step has too. ``events``, ``waves``: of the run so far.
    """

    prefill_rows: list[int] = field(default_factory=list)
    decode_rows: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    alike: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)


class ServingMachine(Machine):
    """Runs what a :class:`Server` hands it. An idle host polls: copies and predictions go on.

    ``timing_at(lines)``: times of batches of so many requests. ``log``: of the steps; ``idle_ns``:
    time in which nobody was there.
    """

    def __init__(
        self,
        workload: ServedWorkload,
        core: DecisionCore,
        timing_at: Callable[[int], Timing],
        server: Server,
        stage: Stage,
        *,
        window: int = 2,
        bursts: bool = True,
    ) -> None:
        super().__init__(
            workload, core, timing_at(workload.max_batch), window=window, bursts=bursts
        )
        self.log = StepLog()
        self.idle_ns = 0
        self._server = server
        self._stage = stage
        self._timing_at = timing_at
        self._gears: dict[int, tuple[QuietLink, dict[tuple[int, int], list[int]]]] = {
            id(self.timing): (self._quiet, self._segments_ns)
        }

    def _host(self) -> Generator[simpy.Event, Any, None]:
        server, stage, times = self._server, self._stage, self.times
        kv_tokens = self.workload.max_context
        # Time passes to `now`; the step begins at `begin`, earlier where the host, which polled,
        # is still handing over.
        now = begin = index = 0
        while not server.is_done:
            shares = server.form(begin)
            if not shares:
                coming = server.next_ns()
                self.idle_ns += coming - begin
                begin, now = coming, self._idle(coming, now)
                continue
            step = stage.show(index, shares)
            server.note(begin, shares, stage.rows.tolist())
            self._shift(self._lines(step))
            marks = (*self.gpu.busy_ns, self.stall_late, self.stall_miss, self.stall_cpu)
            times.begin.append(begin)
            begin = now = self._step(step, kv_tokens, now)
            times.end.append(now)
            self._book(marks)
            self._note(step, shares)
            server.complete(shares, now)
            index += 1
            yield self.env.timeout(now - self.env.now)

    def _lines(self, step: Step) -> int:
        """Lines that the step computes: a static batch keeps its size."""
        server = self._server
        return server.scheduler.lines if server.rules.static else len(step.requests)

    def _idle(self, until: int, now: int) -> int:
        """The host polls until ``until``, and until it is free; returns when."""
        self._begin_spin(now)
        while (target := max(until, self.link.host_free)) > now:
            now = target
            self._advance(now)
        return now

    def _shift(self, lines: int) -> None:
        """Times of a batch of ``lines`` from now on."""
        timing = self._timing_at(lines)
        if timing is self.timing:
            return
        self.timing = timing
        known = self._gears.get(id(timing))
        if known is None:
            work = self.workload
            quiet = QuietLink(timing, self.link, self.gpu, work.num_layers, work.num_experts)
            known = self._gears[id(timing)] = quiet, {}
        self._quiet, self._segments_ns = known
        self._use(self._costs)

    def _events(self, step: Step) -> tuple[list[list[int]], list[list[int]] | None]:
        events, counts = self._stage.events()
        self.log.experts.append(sum([len(keys) for keys in events]))
        return events, counts

    def _note(self, step: Step, shares: list[Share]) -> None:
        log, buckets = self.log, self.core.tally.buckets.values()
        log.prefill_rows.append(step.prefill_tokens)
        log.decode_rows.append(step.decode_tokens)
        log.requests.append(len(step.requests))
        log.lines.append(self._lines(step))
        log.waiting.append(len(self._server.scheduler.waiting))
        log.alike.append(len(shares) - len({request.drawn.name for request, _ in shares}))
        log.events.append(sum([counters.events for counters in buckets]))
        log.waves.append(sum([counters.waves for counters in buckets]))


def rules_of(
    batch: int,
    kv_tokens: int,
    *,
    chunk: int | None,
    step_tokens: int | None,
    mixed: bool,
    static: bool,
) -> Rules:
    """Rules, with None for no limit."""
    return Rules(
        batch=batch,
        kv_tokens=kv_tokens,
        chunk=UNLIMITED if chunk is None else chunk,
        step_tokens=UNLIMITED if step_tokens is None else step_tokens,
        mixed=mixed,
        static=static,
    )
