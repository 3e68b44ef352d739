"""The lean model and the plain one follow docs/contract.md to the same nanosecond."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from configs import load_geometry, load_hardware
from policies.capacity import MemoryPlan, plan_memory
from policies.core import DecisionCore
from policies.interface import Keys, MissRule, Policy, PolicyData, Shape
from sim.machine import Machine
from sim.timing import HostCosts, LinkCosts, RooflineTiming, Timing
from tests.reference.plain_model import PlainModel, PlainResult
from tracer.workload import Workload, first_use, next_use, popularity


@dataclass
class OddTiming(Timing):
    """Small numbers, so that events collide and interleave. One byte takes one nanosecond."""

    host: HostCosts = HostCosts(3, 2, 2, 4, 1, 5)
    link: LinkCosts = LinkCosts(10**9, 3, 1)
    segment: int = 11
    experts: int = 7
    head: int = 5
    cpu: int = 13
    segment_slowdown_ppm: int = 0
    experts_slowdown_ppm: int = 0
    cpu_slowdown_ppm: int = 0
    link_slowdown_cpu_ppm: int = 0
    predictor_ns: dict[str, int] = field(default_factory=dict)
    provenance = "made up"

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


def make_columns(case: Case) -> dict[str, np.ndarray]:
    """Two generations of ``batch`` requests; a prefill step of ``prompt`` rows opens each request."""
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
    return Shape(case.layers, case.experts, case.top_k, sizes)


def make_core(case: Case, workload: Workload, shape: Shape, slots: float) -> DecisionCore:
    info = policies.get(case.policy)
    params, options = info.parse({**case.params})
    data = PolicyData(
        shape,
        events=workload.events,
        next_use=next_use(workload.events),
        first_use=first_use(workload.events, shape.keys),
        popularity=popularity(workload),
        seed=case.seed,
    )
    policy: Policy = info.build(params, data)
    if case.cpu:
        policy = replace(policy, miss_rule=FirstMissToCpu())
    budget = int(slots * sum(shape.bytes_by_layer))
    plan: MemoryPlan = plan_memory(
        shape,
        policy.scope,
        budget,
        staging_slots=options.staging_slots,
        needs_staging=policy.cache.may_refuse,
    )
    return DecisionCore(shape, plan, policy, options, log=[])


def outcome(result: Any, link_busy_ns: int, core: DecisionCore) -> dict[str, Any]:
    """All that must agree."""
    names = ("begin", "end", "segments", "experts", "stall_late", "stall_miss", "stall_cpu")
    figures = {name: list(getattr(result, name)) for name in names}
    return {**figures, "link_busy_ns": link_busy_ns, "tally": core.tally, "log": core.log}


def both(case: Case, timing: Timing) -> tuple[dict[str, Any], dict[str, Any]]:
    workload = Workload(make_columns(case), case.experts)
    shape = make_shape(case)
    lean_core = make_core(case, workload, shape, case.slots)
    machine = Machine(workload, lean_core, timing, window=case.window)
    machine.run()
    lean = outcome(machine.times, machine.link.busy_ns, lean_core)
    plain_core = make_core(case, workload, shape, case.slots)
    result: PlainResult = PlainModel(workload, plain_core, timing, window=case.window).run()
    return lean, outcome(result, result.link_busy_ns, plain_core)


def assert_same(case: Case, timing: Timing) -> dict[str, Any]:
    lean, plain = both(case, timing)
    for name, figures in plain.items():
        assert lean[name] == figures, name
    return plain
