"""The engine's driver keeps docs/contract.md: in a made-up time it is the simulator, to the ns.

Its device is made up: copies land, kernels end and predictions finish when the contract says, and
the host's work takes the contract's costs. Time passes only there, and where the driver waits: to
the next instant at which something happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import replay.driver
import replay.ledger
import replay.slots
from policies.core import DecisionCore
from policies.interface import Prediction
from replay.driver import Driver, Rows
from replay.slots import CopyEngine
from sim.link import Link
from sim.machine import Machine, StepTimes
from sim.spans import COPY, DECIDE
from sim.timing import HostCosts
from tests.cases import Case, OddTiming, make_columns, make_core, make_shape
from tracer.workload import Workload

HOST = HostCosts(
    segment_launch_ns=3,
    experts_launch_ns=2,
    readback_ns=2,
    decision_ns=4,
    copy_issue_ns=0,
    step_ns=5,
    launch_each_ns=1,
    awaited_ns=2,
    landing_ns=1,
    next_wave_ns=3,
)


class Clock:
    """``gpu_end``: of everything that was launched."""

    def __init__(self) -> None:
        self.now = 1
        self.gpu_end = 0

    def __call__(self) -> int:
        return self.now


class Landings:
    """In place of :class:`replay.cuda_driver.CopyStream`: copies take what the contract says."""

    def __init__(self, clock: Clock, timing: OddTiming, window: int) -> None:
        self._clock, self._issue_ns = clock, timing.host.copy_issue_ns
        nothing: Any = None
        self._link = Link(nothing, timing.link, window, 0)
        self.at: dict[int, int] = {}

    def copy(self, target: int, source: int, nbytes: int) -> int:
        self._clock.now += self._issue_ns
        self.at[len(self.at)] = self._link.occupy(nbytes, self._clock.now)
        return len(self.at) - 1

    def landed(self, event: int) -> bool:
        return self.at[event] <= self._clock.now


class Reached:
    """In place of a CUDA event. ``later_ns``: until the host knows."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at = self.later_ns = 0

    def record(self) -> None:
        self.at = self._clock.gpu_end + self.later_ns

    def query(self) -> bool:
        return self.at <= self._clock.now


class InMadeUpTime(Driver):
    """Time passes between two looks of a wait."""

    def __init__(self, core: DecisionCore, timing: OddTiming, window: int) -> None:
        self.clock = Clock()
        nbytes = max(core.shape.bytes_by_layer)
        memory = torch.zeros((core.shape.keys, nbytes), dtype=torch.uint8)
        store: Any = SimpleNamespace(memory=memory, layout=SimpleNamespace(nbytes=nbytes))
        pool: Any = SimpleNamespace(memory=torch.zeros((1, nbytes), dtype=torch.uint8))
        copies = CopyEngine(core, store, pool, window)
        super().__init__(core, copies, "last-use")
        self.landings = Landings(self.clock, timing, window)
        self.reached = Reached(self.clock)
        made_up: Any = self
        made_up.copies._copies, made_up._reached = self.landings, self.reached
        copies.cuda = True
        self._timing = timing
        self._first_wave = self._looked = False
        self._finished: list[int] = []
        self.start_predictor = self._predict
        self._marked = self.ledger.mark
        self._told_predicted = self.ledger.predicted
        made_up.ledger.mark, made_up.ledger.predicted = self._mark, self._predicted
        self._last_look = 0

    def _predict(self, prediction: Prediction, layer: int) -> Callable[[], bool]:
        cost = prediction.cost_ns(self._timing.predictor_ns.get(prediction.source, 0))
        finished = self.clock.now + cost
        self._finished.append(finished)
        return lambda: finished <= self.clock.now

    def _mark(self, kind: int, layer: int, count: int = 0) -> int:
        if kind == DECIDE:
            self.clock.now += self._timing.host.gate_ns(count, first=self._first_wave)
            self._first_wave = False
        told = self._marked(kind, layer, count)
        if kind == COPY:
            self.clock.now += self._timing.host.landing_ns
        return told

    def _predicted(self, began_ns: int) -> None:
        self.clock.now += self._timing.host.prediction_ns
        self._told_predicted(began_ns)

    def event(self, *args: Any) -> None:
        self._first_wave = True
        super().event(*args)

    def wait(self, layer: int) -> None:
        self._looked, self.reached.later_ns = False, self._timing.host.readback_ns
        super().wait(layer)

    def _await(self, *args: Any) -> int:
        self._looked, self.reached.later_ns = False, 0
        return super()._await(*args)

    def spin(self) -> None:
        if self._looked:
            coming = (*self.landings.at.values(), *self._finished, self.reached.at)
            # What came while the host was busy is looked at first.
            self.clock.now = max(
                self.clock.now, min(instant for instant in coming if instant > self._last_look)
            )
        self._looked, self._last_look = True, self.clock.now
        super().spin()

    def launch(self, host_ns: int, gpu_ns: int) -> None:
        """The host launches a kernel."""
        self.clock.now += host_ns
        self.clock.gpu_end = max(self.clock.gpu_end, self.clock.now) + gpu_ns


def drive(driver: InMadeUpTime, work: Workload, timing: OddTiming) -> StepTimes:
    """All steps of a workload; segments and stalls as in a simulation."""
    host, clock = timing.host, driver.clock
    times = StepTimes()
    base = clock.now
    for step in work.steps():
        before = driver.stall_late_ns, driver.stall_miss_ns
        times.begin.append(clock.now - base)
        clock.now += host.step_ns
        phase = "prefill" if step.prefill_tokens else "decode"
        driver.begin_step(step.index, phase, step.begins)
        ids = work.experts[work.step_of_row == step.index].astype(np.int64)
        for layer in range(work.num_layers):
            requests = len(step.requests)
            segment = timing.segment_ns(layer, step.tokens, requests, work.max_context)
            driver.launch(host.segment_launch_ns, segment)
            driver.wait(layer)
            _event(driver, timing, layer, ids[:, layer])
        driver.launch(host.segment_launch_ns, timing.head_ns(len(step.requests)))
        driver.wait(work.num_layers)
        driver.end_step(step.ends)
        times.end.append(clock.now - base)
        times.stall_late.append(driver.stall_late_ns - before[0])
        times.stall_miss.append(driver.stall_miss_ns - before[1])
    driver.core.finish()
    return times


def _event(driver: InMadeUpTime, timing: OddTiming, layer: int, ids: np.ndarray) -> None:
    first = layer * driver.core.shape.experts

    def launch(keys: Sequence[int]) -> None:
        host_ns = timing.host.experts_launch_ns + (len(keys) - 1) * timing.host.launch_each_ns
        assigned = int(np.isin(ids, np.array(keys) - first).sum())
        driver.launch(host_ns, timing.experts_ns(layer, len(keys), assigned))

    nothing: Any = None
    driver.event(layer, ids, launch, Rows(nothing, nothing, ids))


def both(case: Case, timing: OddTiming) -> list[dict[str, Any]]:
    """What a simulation and the driver tell of a case."""
    work = Workload(make_columns(case), case.experts)
    core = make_core(case, work, make_shape(case))
    machine = Machine(work, core, timing, window=case.window, bursts=False)
    machine.run()
    own = make_core(case, work, make_shape(case))
    driver = InMadeUpTime(own, timing, case.window)
    with pytest.MonkeyPatch.context() as patch:
        for module in (replay.driver, replay.ledger, replay.slots):
            patch.setattr(module, "perf_counter_ns", driver.clock)
        own.clock_ns = driver.clock
        times = drive(driver, work, timing)
    names = ("begin", "end", "stall_late", "stall_miss")
    return [
        {name: getattr(told, name) for name in names} | {"log": by.log, "tally": by.tally}
        for told, by in ((machine.times, core), (times, own))
    ]


def cases(*names: str) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        policy=st.sampled_from(names),
        params=st.sampled_from([{}, {"chunks": 2}, {"order": "touch"}, {"order": "id"}]),
        slots=st.integers(2, 7),
        window=st.integers(1, 3),
        batch=st.integers(1, 3),
        prompt=st.sampled_from([0, 5]),
        seed=st.integers(0, 10**6),
    )


DEMAND = ("lru", "on-demand", "score-ema", "lfru")
PREFETCH = ("next-gate", "accuracy-q", "promoe", "edgemoe", "moe-infinity", "mixtral-offloading")


TIMES = ("begin", "end")


@settings(deadline=None, max_examples=150)
@given(
    cases(*DEMAND, *PREFETCH), st.integers(0, 40), st.sampled_from([1, 3]), st.sampled_from([1, 9])
)
@example(Case("next-gate", slots=5, window=1), 1, 3, 1)  # lands between two steps
def test_the_driver_is_the_simulator_in_a_made_up_time(
    case: Case, predictor_ns: int, byte_ns: int, landing_ns: int
) -> None:
    """Times, stalls, decisions and landings, where a hand-over takes no time.

    Where it does, what finishes meanwhile is known at once to the simulator, later to the host.
    """
    host = replace(HOST, landing_ns=landing_ns)
    timing = OddTiming(host=host, predictor_ns={"next_gate": predictor_ns, "learned": predictor_ns})
    timing.link = replace(timing.link, bytes_per_s=10**9 // byte_ns)
    simulated, driven = both(case, timing)
    assert driven == simulated


@settings(deadline=None, max_examples=60)
@given(cases(*DEMAND, *PREFETCH), st.integers(1, 16))
def test_hand_overs_take_the_driver_as_long(case: Case, issue_ns: int) -> None:
    """Decisions and times; stalls, too, where one copy at a time is handed over, and whole.

    Else what runs dry or lands during a hand-over is seen after it.
    """
    simulated, driven = both(case, OddTiming(host=replace(HOST, copy_issue_ns=issue_ns)))
    if case.policy in PREFETCH or case.window > 1 or case.params:
        for told in (simulated, driven):
            del told["stall_late"], told["stall_miss"]
    assert driven == simulated


@settings(deadline=None, max_examples=60)
@given(cases(*PREFETCH), st.integers(1, 40), st.integers(1, 8))
def test_predictions_take_the_driver_as_long(
    case: Case, predictor_ns: int, prediction_ns: int
) -> None:
    """While none takes longer than a copy, no step ends later.

    What lands meanwhile may be told, and a copy named, some ns later.
    """
    host = replace(HOST, prediction_ns=prediction_ns)
    predictor = {"next_gate": predictor_ns, "learned": predictor_ns}
    simulated, driven = both(case, OddTiming(host=host, predictor_ns=predictor))
    assert [driven[name] for name in TIMES] == [simulated[name] for name in TIMES]
