"""GPU memory of a simulated run: :mod:`configs.budget` for a workload's longest request."""

from __future__ import annotations

from configs.budget import MemoryBudget, describe, resolve_budget, workspace_bytes
from configs.geometry import Geometry
from tracer.workload import Workload

__all__ = ["MemoryBudget", "describe", "resolve", "workspace_bytes"]


def resolve(
    geometry: Geometry, workload: Workload, budget: str | None, expert_budget: str | None
) -> MemoryBudget:
    """The memory plan for one of ``budget`` (whole model) or ``expert_budget`` (slots alone).

    Neither given: all experts. Raises UserError if both are, or if the whole model's budget does
    not even hold what is not an expert.
    """
    return resolve_budget(
        geometry,
        budget,
        expert_budget,
        kv_tokens=workload.kv_capacity,
        step_tokens=workload.max_step_tokens,
        requests=workload.max_batch,
    )
