"""GPU memory: what the experts may have, and what the rest of the model takes.

A budget for the whole model covers non-expert weights, KV cache for the longest request (times the
largest batch), workspace and expert slots, staging included.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from configs.errors import UserError
from configs.geometry import EXPERT_DTYPE_BITS, Geometry
from configs.units import ExpertBudget, format_bytes, parse_bytes, parse_expert_budget

_ACTIVATION_BYTES = 2
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of GPU memory by use; ``expert_bytes`` is what the slots may take."""

    nonexpert_bytes: int
    kv_bytes: int
    workspace_bytes: int
    expert_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """Everything but the slots."""
        return self.nonexpert_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        """The whole model's share of the GPU."""
        return self.fixed_bytes + self.expert_bytes


def workspace_bytes(geometry: Geometry, step_tokens: int, requests: int) -> int:
    """Activations of the largest step and the logits: an estimate, not a measurement.

    Hidden states in and out of every expert assignment, the intermediate of each (an expert has
    three matrices of hidden x intermediate), and one row of fp32 logits a request.
    """
    intermediate = geometry.expert_params // (3 * geometry.hidden_size)
    a_token = geometry.top_k * (2 * geometry.hidden_size + 3 * intermediate)
    activations = step_tokens * (a_token + 4 * geometry.hidden_size) * _ACTIVATION_BYTES
    return activations + requests * geometry.vocab_size * _LOGIT_BYTES


def expert_budget_bytes(budget: ExpertBudget, geometry: Geometry) -> int:
    """Bytes that an expert budget stands for, rounded down."""
    if budget.kind == "bytes":
        return min(int(budget.value), geometry.expert_bytes_total)
    if budget.kind == "fraction":
        share = Fraction(str(budget.value))
        return int(geometry.expert_bytes_total * share)
    if budget.value > geometry.num_experts:
        raise UserError(
            f"expert budget {budget} is more than the {geometry.num_experts} experts of a layer; "
            f"give at most {geometry.num_experts}/layer"
        )
    return int(budget.value) * sum(geometry.expert_bytes_by_layer)


def resolve_budget(
    geometry: Geometry,
    budget: str | None,
    expert_budget: str | None,
    *,
    kv_tokens: int,
    step_tokens: int,
    requests: int,
) -> MemoryBudget:
    """The memory plan for one of ``budget`` (whole model) or ``expert_budget`` (slots alone).

    ``kv_tokens``: tokens of KV cache to reserve, all requests together; ``step_tokens``: rows of
    the largest step; ``requests``: most that share one. Neither budget given: all experts. Raises
    UserError if both are, or if the whole model's does not even hold what is not an expert.
    """
    if budget is not None and expert_budget is not None:
        raise UserError("give --budget (the whole model) or --expert-budget (slots), not both")
    kv_bytes = geometry.kv_bytes_per_token * kv_tokens
    workspace = workspace_bytes(geometry, step_tokens, requests)
    fixed = MemoryBudget(geometry.nonexpert_bytes, kv_bytes, workspace, 0)
    if budget is None:
        slots = (
            geometry.expert_bytes_total
            if expert_budget is None
            else expert_budget_bytes(parse_expert_budget(expert_budget), geometry)
        )
    else:
        slots = parse_bytes(budget) - fixed.fixed_bytes
        if slots <= 0:
            raise UserError(
                f"budget {budget} is too small: without any expert slot {geometry.name} needs "
                f"{fixed.fixed_bytes} bytes ({describe(fixed)})"
            )
    return MemoryBudget(geometry.nonexpert_bytes, kv_bytes, workspace, slots)


def describe(memory: MemoryBudget) -> str:
    """The fixed parts, for people."""
    return (
        f"{format_bytes(memory.nonexpert_bytes)} non-expert weights, "
        f"{format_bytes(memory.kv_bytes)} KV cache, "
        f"{format_bytes(memory.workspace_bytes)} workspace"
    )


def bytes_at(geometry: Geometry, dtype: str) -> int:
    """Bytes of one expert at a dtype of EXPERT_DTYPE_BITS."""
    return -(-int(geometry.expert_params * EXPERT_DTYPE_BITS[dtype] * 4) // 32)


def low_bytes(geometry: Geometry, policy: str, dtype: str | None) -> tuple[int, ...]:
    """Bytes of an expert's low-bit copy in each layer; none where the policy has no such copies."""
    if dtype is None:
        return ()
    low, smallest = bytes_at(geometry, dtype), min(geometry.expert_bytes_by_layer)
    if low >= smallest:
        raise UserError(
            f"{policy}: a {dtype} copy of {geometry.name}'s experts has {low} bytes, no fewer than "
            f"the {smallest} of its own {geometry.expert_dtype}: choose a smaller low_dtype, or "
            "time the model at a larger --dtype"
        )
    return (low,) * geometry.num_moe_layers
