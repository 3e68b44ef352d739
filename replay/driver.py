"""The second clock: the decision core driven by what really happens.

Same events, same order as :mod:`sim.machine` (docs/contract.md); time is the wall's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from policies.core import DecisionCore
from policies.interface import Prediction
from policies.memory import RESIDENT
from policies.transfers import Copy
from replay.ledger import Ledger
from replay.slots import CopyEngine
from sim.spans import COPY, CPU, DECIDE, EXPERTS, GPU, ISSUE, STEP
from tracer.workload import distinct, touched

if TYPE_CHECKING:
    from replay.cpu_lane import CpuLane

_FEW = 512
"""Assignments of an event up to which a loop counts faster than arrays do: 32 in 10 us in place of
130, 512 in 90 in place of 160; 4,096 take 650 in place of 410 (on a shared cloud core)."""

Launch = Callable[[Sequence[int]], None]
Predict = Callable[[Prediction], None]


class Rows(NamedTuple):
    """What the experts of an event get and give.

    ``hidden``: states [rows, H]; ``out`` [rows * k, H]: the experts' outputs; ``ids`` int
    [rows, k]: the expert of each, -1 in lines of a batch that do not run.
    """

    hidden: torch.Tensor
    out: torch.Tensor
    ids: npt.NDArray[Any]


class Driver:
    """Turns gates into launches, and looks after copies and predictions whenever the host waits.

    ``ledger``: what the host did and when. ``stall_late_ns``, ``stall_miss_ns`` and
    ``stall_cpu_ns``: time that the device stood idle because a prefetched or a demanded expert, or
    the CPU's result, was awaited, so far. ``lane``: who computes what the policy leaves to the CPU.
    """

    def __init__(self, core: DecisionCore, copies: CopyEngine, touch_order: str) -> None:
        self.core = core
        self.copies = copies
        self._touch_order = touch_order
        self._reached = torch.cuda.Event() if copies.cuda else None
        self._experts = core.shape.experts
        self._previous = -1
        #: launched anything since the device was last known to be idle
        self._launched = False
        self.ledger = Ledger()
        self.stall_late_ns = self.stall_miss_ns = self.stall_cpu_ns = 0
        self.lane: CpuLane | None = None
        #: where the ids of every event go, if they are to be kept
        self.routing: list[npt.NDArray[Any]] | None = None
        core.clock_ns = perf_counter_ns
        #: predictions whose predictor is at work, with the test whether it has finished
        self._coming: list[tuple[Callable[[], bool], Prediction]] = []
        #: begins a prediction's work, and gives the test; at once where nobody predicts
        self.start_predictor: Callable[[Prediction, int], Callable[[], bool]] = _at_once

    def begin_step(self, step: int, phase: str, begins: Sequence[int]) -> None:
        """A forward step begins."""
        self.copies.poll()  # what has landed since the step before is there as it begins
        for request in begins:
            self.core.request_begin(request)
        self.core.step_begin(step, phase)
        self._previous = -1
        for prediction in self.core.predictions_at_step():
            self._announce(prediction, -1)
        self.ledger.mark(STEP, -1)

    def end_step(self, ends: Sequence[int]) -> None:
        """The device has run everything of the step."""
        if self._previous >= 0:
            self.core.experts_done(self._previous)
        self.core.step_end()
        for request in ends:
            self.core.request_end(request)
        self.ledger.mark(STEP, -1)

    def event(self, layer: int, ids: npt.NDArray[Any], launch: Launch, rows: Rows) -> None:
        """The gate of ``layer`` is known: ``ids`` int [n, k]; calls ``launch(keys)`` by group.

        The device has run everything launched before this gate. What the CPU computes goes from
        and to ``rows``, which may have idle lines beside those of ``ids``.
        """
        core, ledger = self.core, self.ledger
        if self.routing is not None:
            self.routing.append(np.array(ids))
        # What lands while the host counts has not landed at the gate.
        self.copies.poll()
        self._take_effect(waiting=False)
        keys, tokens = self._distinct(layer, ids)
        if self._previous >= 0:
            core.experts_done(self._previous)
        self._previous = layer
        wave = core.gate(layer, keys, tokens)
        for prediction in core.predictions(layer, keys):
            self._announce(prediction, layer)
        ledger.mark(DECIDE, layer, wave.waiting)
        while True:
            handed = self.copies.chunks
            self.copies.poll()  # what has landed during the decision leaves room in the window
            self.copies.refill()
            ledger.mark(ISSUE, layer, self.copies.chunks - handed)
            if wave.cpu:
                self._start_cpu(layer, wave.cpu, rows)
            if wave.order is not None and wave.waiting:
                self._in_order(layer, wave.order, launch)
            else:
                if wave.ready:
                    self._launch(layer, wave.ready, launch)
                if wave.waiting:
                    self._as_they_land(layer, wave.waiting, launch)
            if wave.cpu:
                self._join_cpu(layer, len(wave.cpu), rows)
            if wave.last:
                return
            self.wait(layer)
            wave = core.next_wave()
            ledger.mark(DECIDE, layer, wave.waiting)

    def wait(self, layer: int) -> None:
        """Spin until the device has run everything that was launched."""
        event = self._reached
        if event is not None:
            event.record()
        # A spin begins with a refill, also where there is nothing to wait for (the contract): the
        # host was busy with a whole segment, and chunks have landed meanwhile.
        self.spin()
        while event is not None and not event.query():
            self.spin()
        self._launched = False
        self.ledger.mark(GPU, layer)

    def spin(self) -> None:
        """What the host does whenever it waits: landings, finished predictions, refills.

        No wait ends while a copy is handed over or a prediction takes effect: what lands meanwhile
        is looked after, too. Where copies are the host's own work they land at once, and there is
        no such time.
        """
        copies = self.copies
        while True:
            handed = copies.chunks
            copies.poll()
            took_effect = self._take_effect(waiting=True)
            copies.refill()
            if not copies.cuda or not (took_effect or copies.chunks != handed):
                return

    def _distinct(
        self, layer: int, ids: npt.NDArray[Any]
    ) -> tuple[list[int], dict[int, int] | None]:
        base = layer * self._experts
        if len(ids) == 1:
            return [base + expert for expert in ids[0].tolist()], None
        if ids.size <= _FEW:
            found = touched(ids.tolist(), self._touch_order)
            keys = [base + expert for expert in found]
            return keys, dict(zip(keys, found.values(), strict=True))
        rows = np.zeros(len(ids), np.int64)
        events = distinct(ids[:, None, :], rows, 1, self._experts, self._touch_order)
        keys = (events.keys.astype(np.int64) + base).tolist()
        return keys, dict(zip(keys, events.counts.tolist(), strict=True))

    def _launch(self, layer: int, group: Sequence[int], launch: Launch) -> None:
        launch(group)
        self._launched = True
        self.ledger.mark(EXPERTS, layer, len(group))

    def _as_they_land(self, layer: int, waiting: int, launch: Launch) -> None:
        landed = self.core.landed
        while waiting:
            self._spin_for(layer, None)
            group = [copy.key for copy in landed]
            landed.clear()
            waiting -= len(group)
            self._launch(layer, group, launch)

    def _in_order(self, layer: int, order: Sequence[int], launch: Launch) -> None:
        state = self.core.memory.state
        at = 0
        while at < len(order):
            self.copies.poll()
            first = at
            while at < len(order) and state[order[at]] == RESIDENT:
                at += 1
            if at > first:
                self._launch(layer, order[first:at], launch)
            if at < len(order):
                self._spin_for(layer, order[at])
        self.core.landed.clear()

    def _spin_for(self, layer: int, key: int | None) -> None:
        """Poll until ``key`` (None: any awaited expert) is there; book the device's idleness."""
        landed, state = self.core.landed, self.core.memory.state
        if key is None:
            idle_ns = self._await(lambda: bool(landed), COPY, layer)
        else:
            idle_ns = self._await(lambda: state[key] == RESIDENT, COPY, layer)
        if idle_ns:
            self._book_stall(landed[-1], idle_ns)

    def _await(self, done: Callable[[], bool], kind: int, layer: int) -> int:
        """Spin until ``done`` and mark it; ns for which the device has had nothing to run.

        Until the last landing that was seen in it: what the host does then is no stall. For the
        CPU's result, until the host is done with what it did as it came. A wait whose condition
        holds when it begins has none.
        """
        dry = self._reached if self._launched else None
        if dry is not None:
            dry.record()
        idle_from = perf_counter_ns() if dry is None else 0
        self.spin()
        waited = False
        while not done():
            waited = True
            if not idle_from and dry is not None and dry.query():
                idle_from = perf_counter_ns()
            self.spin()
        until = self.ledger.mark(kind, layer)
        if kind == COPY:
            until = self.copies.landed_at_ns
        return max(until - idle_from, 0) if waited and idle_from else 0

    def _start_cpu(self, layer: int, keys: Sequence[int], rows: Rows) -> None:
        assert self.lane is not None
        base = layer * self._experts
        self.lane.start(layer, [key - base for key in keys], rows.ids, rows.hidden)
        self.ledger.mark(CPU, layer, len(keys))

    def _join_cpu(self, layer: int, experts: int, rows: Rows) -> None:
        """Poll until the CPU is done, and launch what adds its result."""
        lane = self.lane
        assert lane is not None
        self.stall_cpu_ns += self._await(lane.done, CPU, layer)
        lane.finish(rows.out)
        self.ledger.mark(EXPERTS, layer, experts)

    def _book_stall(self, copy: Copy, stall_ns: int) -> None:
        if copy.demand:
            self.stall_miss_ns += stall_ns
        else:
            self.stall_late_ns += stall_ns

    def _take_effect(self, *, waiting: bool) -> bool:
        """Finished predictions; what they take is told apart from the wait, not from a decision.

        Returns whether there was one.
        """
        if not self._coming:
            return False
        still = []
        for each in self._coming:
            ready, prediction = each
            if ready():
                began = perf_counter_ns()
                self.core.prediction_ready(prediction)
                if waiting:
                    self.ledger.predicted(began)
            else:
                still.append(each)
        took_effect = len(still) < len(self._coming)
        self._coming = still
        return took_effect

    def _announce(self, prediction: Prediction, layer: int) -> None:
        ready = self.start_predictor(prediction, layer)
        if ready():
            self.core.prediction_ready(prediction)
            return
        self._coming.append((ready, prediction))


def _at_once(prediction: Prediction, layer: int) -> Callable[[], bool]:
    return lambda: True
