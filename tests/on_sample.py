"""A policy on the shipped sample trace: totals that do not change unless the policy does."""

from __future__ import annotations

from typing import Any

import policies
from sim.inputs import Inputs
from sim.point import DEFAULT_FIT_SHARE, Point, run_point
from tracer.trace import Trace

EXPERT_BYTES = 3 * 2048 * 1024 * 2


def run_on_sample(policy: str, *, max_tokens: int | None = None, **params: Any) -> dict[str, Any]:
    """The result on OLMoE-1B-7B with a quarter of its experts on the GPU, laws checked."""
    share = DEFAULT_FIT_SHARE if policies.get(policy).fitted else 0.0
    inputs = Inputs(Trace.open("sample"), fit_share=share, max_tokens=max_tokens)
    point = Point(
        policy=policy,
        params=params,
        hardware="rtx4090-pcie4",
        geometry="olmoe-1b-7b",
        expert_budget="25%",
        max_tokens=max_tokens,
    )
    result = run_point(inputs, point)
    check_laws(result, inputs)
    return result


def check_laws(result: dict[str, Any], inputs: Inputs) -> None:
    """What holds whatever the policy, where experts are copied whole."""
    accesses = 0
    for phase in ("prefill", "decode"):
        counts = result[phase]
        accesses += counts["accesses"]
        assert counts["accesses"] == counts["hits"] + counts["late"] + counts["misses"]
    assert accesses == inputs.workload().num_accesses
    assert result["h2d_bytes"] == EXPERT_BYTES * result["copies"]
    prefetch = result["prefetch"]
    assert prefetch["used"] <= prefetch["started"] <= prefetch["issued"]
    if result["memory"]["staging_slots"] == 0:
        # What came and did not leave is there; staged experts leave without being evicted.
        assert 0 <= result["copies"] - result["evictions"] <= result["memory"]["slots"]


def totals(result: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Decode hits, late and misses; copies and evictions of the whole run."""
    decode = result["decode"]
    counts = (decode["hits"], decode["late"], decode["misses"])
    return (*counts, result["copies"], result["evictions"])
