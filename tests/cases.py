"""Small workloads whose events collide, for models of the execution contract to agree on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import policies
from policies.capacity import MemoryPlan, plan_memory, smallest_budget
from policies.core import DecisionCore
from policies.interface import Keys, MissRule, Policy, Shape
from policies.lru import Lru
from sim.timing import HostCosts, LinkCosts, Timing
from tests.given import shape_for
from tests.made_up import all_data
from tracer.workload import Workload

HOST = HostCosts(3, 2, 2, 4, 1, 5)
LINK = LinkCosts(10**9, startup_ns=3, gap_ns=1)


@dataclass
class OddTiming(Timing):
    """Small numbers, so that events collide and interleave. One byte takes one nanosecond."""

    host: HostCosts = HOST
    link: LinkCosts = LINK
    segment: int = 11
    experts: int = 7
    head: int = 5
    cpu: int = 13
    segment_slowdown_ppm: int = 0
    experts_slowdown_ppm: int = 0
    cpu_slowdown_ppm: int = 0
    link_slowdown_cpu_ppm: int = 0
    predictor_ns: dict[str, int] = field(default_factory=dict)
    many_tokens: HostCosts | None = None
    ppm_each: int = 0
    provenance = "made up"

    def host_for(self, tokens: int, requests: int = 1) -> HostCosts:
        return self.host if tokens == 1 or self.many_tokens is None else self.many_tokens

    def experts_ppm(self, experts: int, assignments: int) -> int:
        return self.experts_slowdown_ppm + self.ppm_each * (3 * experts - 2 * assignments) ** 2

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        return self.segment + layer % 2 + tokens + 2 * requests + kv_tokens // 8

    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return self.experts + 2 * experts + assignments

    def head_ns(self, requests: int) -> int:
        return self.head + requests

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return self.cpu + 3 * experts + assignments

    def combine_ns(self) -> int:
        return 2


class FirstMissToCpu(MissRule):
    """Of two or more misses, or of an odd key, the CPU computes the first."""

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        return misses[:1] if len(misses) > 1 or misses[0] % 2 else ()


class Watching(Lru):
    """LRU that writes down what the clock says whenever it is asked anything."""

    def _note(self, what: str) -> None:
        assert self.core.log is not None
        clock_ns = self.core.clock_ns
        self.core.log.append(("clock", what, None if clock_ns is None else clock_ns()))

    def on_step(self, step: int) -> None:
        self._note("step")
        super().on_step(step)

    def on_event(self, layer: int, keys: Keys) -> None:
        self._note("event")
        super().on_event(layer, keys)

    def on_insert(self, key: int) -> None:
        self._note("insert")
        super().on_insert(key)

    def on_predicted(self, keys: Keys) -> None:
        self._note("predicted")
        super().on_predicted(keys)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        self._note("victim")
        return super().victim(pool, barred)


@dataclass(frozen=True)
class Case:
    """One run: the workload's sizes, a policy with its parameters, a budget in slots a layer."""

    policy: str = "lru"
    params: dict[str, Any] = field(default_factory=dict)
    slots: int = 3
    window: int = 2
    layers: int = 3
    experts: int = 8
    top_k: int = 2
    steps: int = 12
    batch: int = 1
    prompt: int = 0
    skip: bool = False
    uneven: bool = False
    cpu: bool = False
    seed: int = 0
    watching: bool = False


def make_columns(case: Case) -> dict[str, np.ndarray]:
    """Two generations of ``batch`` requests; each opens with a prefill of ``prompt`` rows."""
    rng = np.random.default_rng(case.seed)
    rows: list[tuple[int, int, int, int]] = []
    step = 0
    for generation in range(2):
        members = range(generation * case.batch, (generation + 1) * case.batch)
        for request in members if case.prompt else ():
            rows += [(request, step, 0, position) for position in range(case.prompt)]
            step += 1
        for offset in range(case.steps // 2):
            rows += [(request, step, 1, case.prompt + offset) for request in members]
            step += 1
    shape = (len(rows), case.layers, case.experts)
    skew = np.arange(case.experts) / case.experts
    experts = np.argsort(rng.random(shape) + skew, axis=-1)[..., : case.top_k].astype(np.int16)
    if case.skip:
        experts[rng.random(shape[:2]) < 0.3] = -1
    request, steps, phase, position = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "request": request.astype(np.int32),
        "step": steps.astype(np.int32),
        "phase": phase.astype(np.uint8),
        "position": position.astype(np.int32),
        "experts": experts,
    }


def make_shape(case: Case) -> Shape:
    sizes = tuple(17 + (5 * layer if case.uneven else 0) for layer in range(case.layers))
    return shape_for(case.policy, Shape(case.layers, case.experts, case.top_k, sizes))


def make_core(case: Case, workload: Workload, shape: Shape) -> DecisionCore:
    info = policies.get(case.policy)
    params, options = info.parse({**case.params})
    apart = replace(case, steps=20, batch=1, prompt=3, skip=False, seed=case.seed + 100)
    others = Workload(make_columns(apart), case.experts)
    data = all_data(workload, others, shape, oracle=info.oracle, costs=OddTiming(), seed=case.seed)
    policy: Policy = info.build(params, data)
    if case.cpu and policy.miss_rule is None:
        policy = replace(policy, miss_rule=FirstMissToCpu())
    if case.watching:
        policy = replace(policy, cache=Watching())
    budget = int(case.slots * sum(shape.bytes_by_layer))
    if policy.scope == "whole-layers":
        budget = max(budget, smallest_budget(shape, policy.scope, 0))
    plan: MemoryPlan = plan_memory(
        shape,
        policy.scope,
        budget,
        staging_slots=options.staging_slots,
        needs_staging=policy.cache.may_refuse,
    )
    return DecisionCore(shape, plan, policy, options, signals=data.signals, log=[])
