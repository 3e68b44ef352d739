"""From an expert budget to slots: who owns how many, and what the budget's smallest value is.

Capacity is counted in **units**: slots where all experts of a pool have one size, bytes otherwise
(one pool over layers of different sizes). Staging slots hold experts that were refused admission
while they are computed; they count in the budget and are shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.errors import BudgetTooSmall, PolicyError
from policies.interface import Shape


@dataclass(frozen=True)
class MemoryPlan:
    """Slots (or bytes) of every pool.

    ``pool_of_layer`` [layers]; ``capacity`` [pools] in units; ``unit_of_layer`` [layers]: units
    one expert of the layer takes; ``staging_slots``; ``used_bytes``: what all of it occupies.
    ``by_bytes``: the unit is the byte and slots have no numbers.
    """

    pool_of_layer: tuple[int, ...]
    capacity: tuple[int, ...]
    unit_of_layer: tuple[int, ...]
    staging_slots: int
    used_bytes: int
    by_bytes: bool


def smallest_budget(shape: Shape, scope: str, staging_slots: int) -> int:
    """Fewest bytes with which every event can run, in waves if need be."""
    largest = max(shape.bytes_by_layer)
    if scope == "layer":
        return sum(shape.bytes_by_layer) + staging_slots * largest
    if scope == "staging":
        return largest
    return largest * (1 + staging_slots)


def plan_memory(
    shape: Shape,
    scope: str,
    budget_bytes: int,
    *,
    staging_slots: int | None = None,
    needs_staging: bool = False,
) -> MemoryPlan:
    """Spread ``budget_bytes`` over pools; fractions of slots round down.

    ``scope``: ``layer`` (the same number of slots for each), ``global`` (one pool), or ``staging``
    (no cache at all: every slot is a staging slot). ``staging_slots`` None: as many as top-k where
    the cache rule may refuse admission (fewer where the budget holds fewer), else none.

    Raises :class:`PolicyError` that names the smallest budget which can run.
    """
    wanted = staging_slots if staging_slots is not None else (shape.top_k if needs_staging else 0)
    if needs_staging and wanted < 1:
        raise PolicyError("staging_slots is 0, but this policy refuses admission: give at least 1")
    at_least = wanted if staging_slots is not None else min(wanted, 1)
    smallest = smallest_budget(shape, scope, 0 if scope == "staging" else at_least)
    if budget_bytes < smallest:
        raise BudgetTooSmall(budget_bytes, smallest, _explain(shape, scope, at_least))
    if scope == "staging":
        return _staging_only(shape, budget_bytes)
    largest = max(shape.bytes_by_layer)
    spare = budget_bytes - smallest_budget(shape, scope, 0)
    staging = min(wanted, spare // largest)
    cache_bytes = budget_bytes - staging * largest
    if scope == "layer":
        return _per_layer(shape, cache_bytes, staging)
    return _global(shape, cache_bytes, staging)


def _explain(shape: Shape, scope: str, staging: int) -> str:
    parts = {"layer": f"one slot in each of {shape.layers} layers", "global": "one slot"}
    text = parts.get(scope, "one staging slot")
    return f"{text} and {staging} for staging" if staging and scope != "staging" else text


def _staging_only(shape: Shape, budget_bytes: int) -> MemoryPlan:
    largest = max(shape.bytes_by_layer)
    slots = min(budget_bytes // largest, shape.experts)
    units = (1,) * shape.layers
    return MemoryPlan((0,) * shape.layers, (0,), units, slots, slots * largest, False)


def _per_layer(shape: Shape, cache_bytes: int, staging: int) -> MemoryPlan:
    slots = min(cache_bytes // sum(shape.bytes_by_layer), shape.experts)
    if shape.precisions > 1:
        capacity = tuple(slots * size for size in shape.bytes_by_layer)
        used = sum(capacity) + staging * max(shape.bytes_by_layer)
        return MemoryPlan(
            tuple(range(shape.layers)), capacity, shape.bytes_by_layer, staging, used, True
        )
    return uneven_plan(shape, (slots,) * shape.layers, staging)


def uneven_plan(shape: Shape, slots_by_layer: Sequence[int], staging: int) -> MemoryPlan:
    """Per-layer pools of the given sizes, in slots."""
    used = sum(
        slots * size for slots, size in zip(slots_by_layer, shape.bytes_by_layer, strict=True)
    )
    return MemoryPlan(
        tuple(range(shape.layers)),
        tuple(slots_by_layer),
        (1,) * shape.layers,
        staging,
        used + staging * max(shape.bytes_by_layer),
        False,
    )


def _global(shape: Shape, cache_bytes: int, staging: int) -> MemoryPlan:
    pools = (0,) * shape.layers
    sizes = shape.bytes_by_layer
    cache_bytes = min(cache_bytes, sum(sizes) * shape.experts)
    staged = staging * max(sizes)
    if shape.precisions == 1 and min(sizes) == max(sizes):
        slots = cache_bytes // sizes[0]
        units = (1,) * shape.layers
        return MemoryPlan(pools, (slots,), units, staging, slots * sizes[0] + staged, False)
    return MemoryPlan(pools, (cache_bytes,), sizes, staging, cache_bytes + staged, True)
