"""Small workloads, a constant timing, and a machine that checks itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import policies
from policies.capacity import plan_memory, smallest_budget
from policies.core import DecisionCore
from policies.interface import Shape
from policies.memory import RESIDENT
from sim.machine import Machine
from sim.timing import HostCosts, LinkCosts, Timing
from tests.given import shape_for
from tests.made_up import all_data
from tracer.workload import Workload

NO_HOST = HostCosts(0, 0, 0, 0, 0, 0)


@dataclass
class FlatTiming(Timing):
    """Constant durations; host and link latencies zero unless given."""

    host: HostCosts = NO_HOST
    link: LinkCosts = field(default_factory=lambda: LinkCosts(10**9, 0, 0))
    segment: int = 100
    experts: int = 10
    per_expert: int = 0
    head: int = 50
    segment_slowdown_ppm: int = 0
    experts_slowdown_ppm: int = 0
    cpu_slowdown_ppm: int = 0
    link_slowdown_cpu_ppm: int = 0
    predictor_ns: dict[str, int] = field(default_factory=dict)
    provenance = "made up"

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        return self.segment

    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return self.experts + self.per_expert * experts

    def head_ns(self, requests: int) -> int:
        return self.head

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return 30 * experts

    def combine_ns(self) -> int:
        return 1


def random_workload(
    seed: int,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    steps: int = 20,
    prompt: int = 0,
    requests: int = 2,
) -> Workload:
    """Skewed random routing; each request opens with a prefill step of ``prompt`` rows, if any."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(experts, 0.5), size=layers) + 1e-6
    request, step, phase, position = [], [], [], []
    now = 0
    for name in range(requests):
        if prompt:
            request += [name] * prompt
            step += [now] * prompt
            phase += [0] * prompt
            position += list(range(prompt))
            now += 1
        for token in range(steps):
            request.append(name)
            step.append(now)
            phase.append(1)
            position.append(prompt + token)
            now += 1
    ids = np.empty((len(request), layers, top_k), np.int16)
    for layer in range(layers):
        chances = weights[layer] / weights[layer].sum()
        for row in range(len(request)):
            ids[row, layer] = rng.choice(experts, top_k, replace=False, p=chances)
    columns: dict[str, Any] = {
        "request": np.array(request, np.int32),
        "step": np.array(step, np.int32),
        "phase": np.array(phase, np.uint8),
        "position": np.array(position, np.int32),
        "experts": ids,
    }
    return Workload(columns, experts)


class CheckedMachine(Machine):
    """Fails when an expert is used before it landed, or time runs back."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, bursts=False, **named)
        self.landed_at: dict[int, int] = {}
        self.most_occupied = 0
        self.chunks = 0
        self.chunk_bytes = 0
        self._parts: dict[Any, int] = {}
        self._last = 0
        inner = self.core.chunk_done

        def chunk_done(copy: Any) -> bool:
            assert self.clock >= self._last
            self._last = self.clock
            size = copy.chunk_bytes[copy.landed]
            awaited = inner(copy)
            self.chunks += 1
            self.chunk_bytes += size
            self._parts[copy] = self._parts.get(copy, 0) + size
            if copy.landed == copy.chunks:
                assert self._parts.pop(copy) == sum(copy.chunk_bytes)
                self.landed_at[copy.key] = self.clock
            self.most_occupied = max(self.most_occupied, self.core.memory.occupied_bytes())
            return awaited

        self.core.chunk_done = chunk_done  # type: ignore[method-assign]

    def abandoned_bytes(self) -> int:
        """Bytes of copies that were begun and never completed."""
        return sum(self._parts.values())

    def _launch(self, layer: int, group: Any, tokens: Any, now: int) -> int:
        assert group
        for key in group:
            assert self.core.memory.state[key] == RESIDENT
            assert self.landed_at.get(key, 0) <= now
        return super()._launch(layer, group, tokens, now)


def make_machine(
    workload: Workload,
    policy: str,
    timing: Timing,
    *,
    slots: float = 3,
    expert_bytes: int = 1000,
    window: int = 2,
    checked: bool = True,
    **params: object,
) -> Any:
    """A machine for ``slots`` slots a layer, or the fewest that can stream whole layers."""
    layers, experts = workload.num_layers, workload.num_experts
    shape = shape_for(policy, Shape(layers, experts, workload.top_k, (expert_bytes,) * layers))
    info = policies.get(policy)
    values, options = info.parse(params)
    others = random_workload(17, layers=layers, experts=experts, top_k=workload.top_k, prompt=3)
    data = all_data(workload, others, shape, oracle=info.oracle, costs=timing)
    built = info.build(values, data)
    budget = int((experts if info.needs_all else slots) * layers * expert_bytes)
    if built.scope == "whole-layers":
        budget = max(budget, smallest_budget(shape, built.scope, 0))
    plan = plan_memory(
        shape,
        built.scope,
        budget,
        staging_slots=options.staging_slots,
        needs_staging=built.cache.may_refuse,
    )
    core = DecisionCore(shape, plan, built, options, signals=data.signals, log=[])
    make = CheckedMachine if checked else Machine
    return make(workload, core, timing, window=window)


def step_ns(machine: Machine) -> list[int]:
    """Duration of every step."""
    return [b - a for a, b in zip(machine.times.begin, machine.times.end, strict=True)]
