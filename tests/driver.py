"""Drivers without a clock: they feed events to a decision core and let its copies land.

:func:`run_instant` lands every copy at once, demand before prefetch; :func:`run_burst` takes a
wave's demand copies together, as the core offers for idle links. :func:`run_random` hands chunks
over through a submission window and lets a random number of them land between events, predictions
arriving late; a wave still waits for all of its experts. All fail when a wave can never complete
or when something is executed that is not resident.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import policies
from policies.capacity import MemoryPlan
from policies.core import DecisionCore, Wave
from policies.interface import Costs, EventTable, PolicyData, Prediction, Shape
from policies.memory import RESIDENT
from policies.slots import plan_policy
from policies.transfers import Copy
from tracer.workload import Ragged, first_use, next_use

#: [steps][layers]: keys in touch order; an empty event is a layer that did not run.
Steps = Sequence[Sequence[Sequence[int]]]
Log = list[tuple[Any, ...]]
Watch = Callable[[DecisionCore], None]

EXPERT_BYTES = 12


@dataclass(frozen=True)
class Launch:
    """One wave as it was executed: `ready` at once, `landed` as they arrived, `cpu` elsewhere."""

    step: int
    layer: int
    ready: tuple[int, ...]
    landed: tuple[int, ...]
    cpu: tuple[int, ...]

    @property
    def keys(self) -> list[int]:
        """Everything that the wave executed, sorted."""
        return sorted(self.ready + self.landed + self.cpu)


class InstantLink:
    """Copies land, and predictions are there, as soon as they are asked for."""

    def __init__(self, core: DecisionCore, watch: Watch | None = None) -> None:
        self.core = core
        self.watch = watch

    def announce(self, prediction: Prediction) -> None:
        self.core.prediction_ready(prediction)
        self.look()

    def between(self) -> None:
        while (handed := self.core.next_chunk()) is not None:
            self.look()
            self.core.chunk_done(handed[0])
            self.look()

    def settle(self, waiting: int) -> list[int]:
        """Wait for a wave; the keys that landed for it, in order."""
        self.between()
        assert len(self.core.landed) == waiting, "a demanded copy cannot start"
        return [copy.key for copy in self.core.landed]

    def look(self) -> None:
        if self.watch is not None:
            self.watch(self.core)


class BurstLink(InstantLink):
    """All demand copies of a wave start together, then land together."""

    def settle(self, waiting: int) -> list[int]:
        started = self.core.start_demands()
        self.look()
        self.core.land_demands(started)
        self.look()
        assert len(started) == waiting
        return [copy.key for copy in started]


class RandomLink(InstantLink):
    """`window` chunks at the hardware, landing in order at random moments."""

    def __init__(
        self,
        core: DecisionCore,
        rng: random.Random,
        window: int = 2,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(core, watch)
        self.rng = rng
        self.window = window
        self.flying: deque[Copy] = deque()
        self.announced: list[Prediction] = []

    def announce(self, prediction: Prediction) -> None:
        self.announced.append(prediction)

    def between(self) -> None:
        for _ in range(self.rng.randrange(6)):
            self._deliver()
            if self.rng.random() < 0.5:
                self._hand_over()
            else:
                self._land()

    def settle(self, waiting: int) -> list[int]:
        self.between()
        while len(self.core.landed) < waiting:
            handed = self._hand_over()
            assert handed or self.flying, "a demanded copy cannot start"
            self._land()
        return [copy.key for copy in self.core.landed]

    def _deliver(self) -> None:
        if self.announced and self.rng.random() < 0.4:
            chosen = self.rng.randrange(len(self.announced))
            self.core.prediction_ready(self.announced.pop(chosen))
            self.look()

    def _hand_over(self) -> bool:
        if len(self.flying) == self.window:
            return False
        handed = self.core.next_chunk()
        if handed is None:
            return False
        self.flying.append(handed[0])
        self.look()
        return True

    def _land(self) -> None:
        if self.flying:
            self.core.chunk_done(self.flying.popleft())
            self.look()


def run_instant(
    core: DecisionCore,
    steps: Steps,
    *,
    watch: Watch | None = None,
    requests: Sequence[int] | None = None,
    counts: Steps | None = None,
) -> list[Launch]:
    """Feed `steps` with copies that take no time; returns what was executed.

    `watch` is called after every command; `requests`: the request of each step (default: none
    begins); `counts`: token assignments of each key, as `steps` (default: one each).
    """
    return _run(core, InstantLink(core, watch), steps, requests, counts)


def run_burst(
    core: DecisionCore,
    steps: Steps,
    *,
    watch: Watch | None = None,
    requests: Sequence[int] | None = None,
) -> list[Launch]:
    """Feed `steps` to a policy that prefetches nothing, demand copies of a wave in one go."""
    return _run(core, BurstLink(core, watch), steps, requests, None)


def run_random(
    core: DecisionCore,
    steps: Steps,
    rng: random.Random,
    *,
    window: int = 2,
    watch: Watch | None = None,
    requests: Sequence[int] | None = None,
    counts: Steps | None = None,
) -> list[Launch]:
    """Feed `steps` while `rng` decides what lands between events; see :func:`run_instant`."""
    return _run(core, RandomLink(core, rng, window, watch), steps, requests, counts)


def _run(
    core: DecisionCore,
    link: InstantLink,
    steps: Steps,
    requests: Sequence[int] | None,
    counts: Steps | None,
) -> list[Launch]:
    launches: list[Launch] = []
    for step, events in enumerate(steps):
        _begin_requests(core, requests, step)
        link.look()
        core.step_begin(step, "decode")
        link.look()
        for prediction in core.predictions_at_step():
            link.announce(prediction)
        link.between()
        for layer, keys in enumerate(events):
            if keys:
                tokens = counts[step][layer] if counts else [1] * len(keys)
                _run_event(core, link, layer, list(keys), tokens, launches)
        core.step_end()
    core.finish()
    return launches


def _begin_requests(core: DecisionCore, requests: Sequence[int] | None, step: int) -> None:
    if requests is None or (step > 0 and requests[step] == requests[step - 1]):
        return
    if step > 0:
        core.request_end(requests[step - 1])
    core.request_begin(requests[step])


def _run_event(
    core: DecisionCore,
    link: InstantLink,
    layer: int,
    keys: list[int],
    tokens: Sequence[int],
    launches: list[Launch],
) -> None:
    wave = core.gate(layer, keys, dict(zip(keys, tokens, strict=True)))
    link.look()
    for prediction in core.predictions(layer, keys):
        link.announce(prediction)
    launches.append(_launch(core, link, wave))
    while not wave.last:
        wave = core.next_wave()
        link.look()
        launches.append(_launch(core, link, wave))
    core.experts_done(layer)
    link.look()
    link.between()


def _launch(core: DecisionCore, link: InstantLink, wave: Wave) -> Launch:
    landed: tuple[int, ...] = ()
    if wave.waiting:
        landed = tuple(link.settle(wave.waiting))
    else:
        link.between()
    absent = [key for key in (*wave.ready, *landed) if core.memory.state[key] != RESIDENT]
    assert not absent, f"step {core.step}, layer {core.layer}: executed but not there: {absent}"
    return Launch(core.step, core.layer, tuple(wave.ready), landed, tuple(wave.cpu))


# ---------------------------------------------------------------------- inputs of a core


def shape_of(
    layers: int, experts: int, top_k: int = 2, expert_bytes: int | tuple[int, ...] = EXPERT_BYTES
) -> Shape:
    """A shape whose experts all weigh `expert_bytes`, or as much as the layer's entry says."""
    sizes = (expert_bytes,) * layers if isinstance(expert_bytes, int) else expert_bytes
    return Shape(layers, experts, top_k, sizes)


def table(steps: Steps, layers: int) -> Ragged:
    """`steps` as the table of events that a trace would give."""
    events = [list(keys) for step in steps for keys in step]
    offsets = np.cumsum([0, *map(len, events)])
    keys = np.array([key for keys in events for key in keys], np.int32)
    return Ragged(keys, offsets, np.ones(len(keys), np.int32), layers)


def policy_data(
    shape: Shape,
    steps: Steps,
    *,
    lookahead: Mapping[str, Steps] | None = None,
    popularity: Any = None,
    signals: GivenSignals | None = None,
    fit: GivenFit | None = None,
    costs: Costs | None = None,
    expert_norms: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
) -> PolicyData:
    """All that any policy may know; `lookahead`: predictions by column, best first."""
    events = table(steps, shape.layers)
    known = lookahead or {}

    def read(name: str, width: int) -> EventTable:
        cut = [[keys[:width] for keys in step] for step in known[name]]
        return table(cut, shape.layers)

    return PolicyData(
        shape=shape,
        lookahead=read if known else None,
        columns=frozenset(known) | (signals.names if signals else frozenset()),
        popularity=popularity,
        signals=signals,
        fit=fit,
        costs=costs,
        expert_norms=expert_norms,
        events=events,
        next_use=next_use(events),
        first_use=first_use(events, shape.keys),
        seed=seed,
    )


class GivenSignals:
    """By name: `layered[name][step][layer]` rows, and `stepped[name][step]` rows."""

    def __init__(
        self,
        layered: Mapping[str, Sequence[Sequence[Any]]],
        stepped: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self._layered = layered
        self._stepped = stepped or {}
        self._step = self._reached = -1

    @property
    def names(self) -> frozenset[str]:
        """The columns that there are."""
        return frozenset(self._layered) | frozenset(self._stepped)

    def begin_step(self, step: int) -> None:
        self._step, self._reached = step, -1

    def reach(self, layer: int) -> None:
        self._reached = layer

    def layer_rows(self, name: str, layer: int) -> Any:
        if layer > self._reached:
            raise LookupError(f"{name} of layer {layer}: the step has reached {self._reached}")
        return np.asarray(self._layered[name][self._step][layer])

    def step_rows(self, name: str) -> Any:
        return np.asarray(self._stepped[name][self._step])


@dataclass
class GivenFit:
    """Requests set aside, written down: one row a step unless `step_of_row` says otherwise."""

    events: Ragged
    columns: Mapping[str, Any]
    step_of_row: Any
    request_of_row: Any
    phase_of_row: Any

    def column(self, name: str) -> Any:
        return np.asarray(self.columns[name])


def make_core(
    name: str,
    data: PolicyData,
    *,
    slots: int | None = None,
    budget: int | None = None,
    plan: MemoryPlan | None = None,
    log: Log | None = None,
    **given: Any,
) -> DecisionCore:
    """Core of policy `name`.

    Memory is one of `slots` (so many of the largest experts, staging included), `budget` (bytes)
    and `plan`. `given`: the policy's parameters and the common options.
    """
    info = policies.get(name)
    values, options = info.parse(given)
    policy = info.build(values, data)
    if plan is None:
        if budget is None:
            assert slots is not None, "give slots, budget or plan"
            budget = slots * max(data.shape.bytes_by_layer)
        plan = plan_policy(data.shape, policy, options, budget, data.fit)
    return DecisionCore(data.shape, plan, policy, options, signals=data.signals, log=log)


# ---------------------------------------------------------------------- reading the result


def total(core: DecisionCore, counter: str) -> int:
    """A counter summed over phases and stages."""
    return sum(getattr(bucket, counter) for bucket in core.tally.buckets.values())


def story(log: Log) -> str:
    """A log as text, one line an event.

    `1.0 | 4* 2 | -1 +2` reads: at step 1, layer 0 needed 4, a hit, and 2; then 1 left, 2 landed.
    `~5`: a prefetch landed; `2/4`: staged 2 was kept in the place of 4. What happens before the
    first event of a step stands on a line of its own: `1.- | | ~5`.
    """
    lines: list[str] = []
    for kind, step, layer, *rest in log:
        if kind == "gate":
            keys, hits = rest
            needs = " ".join(f"{key}*" if key in hits else str(key) for key in keys)
            lines.append(f"{step}.{layer} | {needs} |")
            continue
        begin = f"{step}.- | |"
        if layer < 0 and not (lines and lines[-1].startswith(begin)):
            lines.append(begin)
        lines[-1] += " " + _action(kind, rest)
    return "\n".join(lines)


def _action(kind: str, rest: Sequence[Any]) -> str:
    if kind == "evict":
        return f"-{rest[0]}"
    if kind == "adopt":
        return f"{rest[0]}/{rest[1]}"
    key, source = rest
    return f"+{key}" if source == "demand" else f"~{key}"


def told(text: str) -> str:
    """A story as tests write it: indented, and with working after `#`."""
    lines = (line.split("#")[0].strip() for line in text.strip().splitlines())
    return "\n".join(line for line in lines if line)
