"""The second clock: the decision core driven by what really happens.

Same events, same order as :mod:`sim.machine` (docs/contract.md); time is the wall's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from policies.core import DecisionCore
from policies.interface import Prediction
from policies.memory import RESIDENT
from replay.slots import CopyEngine
from tracer.workload import distinct

Launch = Callable[[Sequence[int]], None]
Predict = Callable[[Prediction], None]


class Driver:
    """Turns gates into launches, and looks after copies and predictions whenever the host waits."""

    def __init__(self, core: DecisionCore, copies: CopyEngine, touch_order: str) -> None:
        self.core = core
        self.copies = copies
        self._touch_order = touch_order
        self._reached = torch.cuda.Event() if copies.cuda else None
        self._experts = core.shape.experts
        self._previous = -1
        #: predictions whose predictor is at work, with the test whether it has finished
        self._coming: list[tuple[Callable[[], bool], Prediction]] = []
        self.start_predictor: Callable[[Prediction], Callable[[], bool]] = lambda _: lambda: True

    def begin_step(self, step: int, phase: str, begins: Sequence[int]) -> None:
        """A forward step begins."""
        for request in begins:
            self.core.request_begin(request)
        self.core.step_begin(step, phase)
        self._previous = -1
        for prediction in self.core.predictions_at_step():
            self._announce(prediction)

    def end_step(self, ends: Sequence[int]) -> None:
        """The device has run everything of the step."""
        if self._previous >= 0:
            self.core.experts_done(self._previous)
        self.core.step_end()
        for request in ends:
            self.core.request_end(request)

    def event(self, layer: int, ids: npt.NDArray[Any], launch: Launch) -> None:
        """The gate of ``layer`` is known: ``ids`` int [rows, k]; calls ``launch(keys)`` by group.

        The device has run everything launched before this gate.
        """
        core = self.core
        keys, tokens = self._distinct(layer, ids)
        self._take_in()
        if self._previous >= 0:
            core.experts_done(self._previous)
        self._previous = layer
        wave = core.gate(layer, keys, tokens)
        for prediction in core.predictions(layer, keys):
            self._announce(prediction)
        while True:
            self.copies.refill()
            if wave.order is not None and wave.waiting:
                self._in_order(wave.order, launch)
            else:
                if wave.ready:
                    launch(wave.ready)
                self._as_they_land(wave.waiting, launch)
            if wave.last:
                return
            self.wait()
            wave = core.next_wave()

    def wait(self) -> None:
        """Spin until the device has run everything that was launched."""
        event = self._reached
        if event is None:
            return
        event.record()
        while not event.query():
            self.spin()

    def spin(self) -> None:
        """What the host does whenever it waits: landings, finished predictions, refills."""
        self._take_in()
        self.copies.refill()

    def _distinct(
        self, layer: int, ids: npt.NDArray[Any]
    ) -> tuple[list[int], dict[int, int] | None]:
        base = layer * self._experts
        if len(ids) == 1:
            return [base + expert for expert in ids[0].tolist()], None
        rows = np.zeros(len(ids), np.int64)
        events = distinct(ids[:, None, :], rows, 1, self._experts, self._touch_order)
        keys = (events.keys.astype(np.int64) + base).tolist()
        return keys, dict(zip(keys, events.counts.tolist(), strict=True))

    def _as_they_land(self, waiting: int, launch: Launch) -> None:
        landed = self.core.landed
        while waiting:
            self.spin()
            if not landed:
                continue
            group = [copy.key for copy in landed]
            landed.clear()
            waiting -= len(group)
            launch(group)

    def _in_order(self, order: Sequence[int], launch: Launch) -> None:
        state = self.core.memory.state
        at = 0
        while at < len(order):
            first = at
            while at < len(order) and state[order[at]] == RESIDENT:
                at += 1
            if at > first:
                launch(order[first:at])
            if at < len(order):
                self.spin()
        self.core.landed.clear()

    def _take_in(self) -> None:
        self.copies.poll()
        finished = [prediction for ready, prediction in self._coming if ready()]
        if not finished:
            return
        self._coming = [each for each in self._coming if each[1] not in finished]
        for prediction in finished:
            self.core.prediction_ready(prediction)

    def _announce(self, prediction: Prediction) -> None:
        ready = self.start_predictor(prediction)
        if ready():
            self.core.prediction_ready(prediction)
            return
        self._coming.append((ready, prediction))
