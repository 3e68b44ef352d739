"""From an expert budget to slots: who owns how many, and what the budget's smallest value is.

Capacity is counted in **units**: slots where all experts of a pool have one size, bytes otherwise
(one pool over layers of different sizes). Staging slots hold experts that were refused admission
while they are computed; they count in the budget and are shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.errors import BudgetTooSmall, PolicyError
from policies.interface import Shape

_BUFFERS = ("buffers", "whole-layers")

#: from the cache's bytes to slots of each layer
Spread = Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class MemoryPlan:
    """Slots (or bytes) of every pool.

    ``pool_of_layer`` [layers]; ``capacity`` [pools] in units; ``unit_of_layer`` [layers]: units
    one expert of the layer takes; ``staging_slots``; ``used_bytes``: what all of it occupies.
    ``by_bytes``: the unit is the byte and slots have no numbers. ``buffers``: the pools are
    buffers that are emptied from layer to layer, so no run ever fills them for good.
    """

    pool_of_layer: tuple[int, ...]
    capacity: tuple[int, ...]
    unit_of_layer: tuple[int, ...]
    staging_slots: int
    used_bytes: int
    by_bytes: bool
    buffers: bool = False


def smallest_budget(shape: Shape, scope: str, staging_slots: int, least_slots: int = 1) -> int:
    """Fewest bytes with which every event can run, in waves if need be.

    ``least_slots``: of each layer, in scope ``layer``.
    """
    largest = max(shape.bytes_by_layer)
    if scope == "layer":
        return least_slots * sum(shape.bytes_by_layer) + staging_slots * largest
    if scope == "staging":
        return largest
    if scope == "buffers":
        return 2 * largest
    if scope == "whole-layers":
        return 2 * largest * shape.experts
    return largest * (1 + staging_slots)


def plan_memory(
    shape: Shape,
    scope: str,
    budget_bytes: int,
    *,
    staging_slots: int | None = None,
    needs_staging: bool = False,
    least_slots: int = 1,
    spread: Spread | None = None,
) -> MemoryPlan:
    """Spread ``budget_bytes`` over pools; fractions of slots round down.

    ``scope``: ``layer`` (the same number of slots for each), ``global`` (one pool), ``staging``
    (no cache at all: every slot is a staging slot), ``buffers`` (no cache either: two pools, layers
    take turns) or ``whole-layers`` (the same, each with room for a whole layer). ``staging_slots``
    None: as many as top-k where the cache rule may refuse admission (fewer where the budget holds
    fewer), else none. ``least_slots``: of each layer; ``spread``: slots of each, None: as many for
    each (both: scope ``layer``).

    Raises :class:`PolicyError` that names the smallest budget which can run.
    """
    wanted = staging_slots if staging_slots is not None else (shape.top_k if needs_staging else 0)
    if needs_staging and wanted < 1:
        raise PolicyError("staging_slots is 0, but this policy refuses admission: give at least 1")
    at_least = wanted if staging_slots is not None else min(wanted, 1)
    smallest = smallest_budget(shape, scope, 0 if scope == "staging" else at_least, least_slots)
    if budget_bytes < smallest:
        why = _explain(shape, scope, at_least, least_slots)
        raise BudgetTooSmall(budget_bytes, smallest, why)
    if scope == "staging":
        return _staging_only(shape, budget_bytes)
    if scope in _BUFFERS:
        return _two_buffers(shape, budget_bytes)
    largest = max(shape.bytes_by_layer)
    spare = budget_bytes - smallest_budget(shape, scope, 0, least_slots)
    staging = min(wanted, spare // largest)
    cache_bytes = budget_bytes - staging * largest
    if scope == "layer":
        return uneven_plan(shape, (spread or _even(shape))(cache_bytes), staging)
    return _global(shape, cache_bytes, staging)


def _explain(shape: Shape, scope: str, staging: int, least: int) -> str:
    parts = {
        "layer": f"{'one slot' if least == 1 else f'{least} slots'} in each of {shape.layers} "
        "layers",
        "global": "one slot",
        "buffers": "one slot in each of two buffers",
        "whole-layers": f"two buffers of a whole layer, {shape.experts} experts, each",
    }
    text = parts.get(scope, "one staging slot")
    return f"{text} and {staging} for staging" if staging and scope != "staging" else text


def _staging_only(shape: Shape, budget_bytes: int) -> MemoryPlan:
    largest = max(shape.bytes_by_layer)
    slots = min(budget_bytes // largest, shape.experts)
    units = (1,) * shape.layers
    return MemoryPlan((0,) * shape.layers, (0,), units, slots, slots * largest, False)


def _two_buffers(shape: Shape, budget_bytes: int) -> MemoryPlan:
    """Even layers take the first pool, odd ones the second; a slot fits the largest expert."""
    largest = max(shape.bytes_by_layer)
    slots = min(budget_bytes // (2 * largest), shape.experts)
    pools = tuple(layer % 2 for layer in range(shape.layers))
    units = (1,) * shape.layers
    return MemoryPlan(pools, (slots, slots), units, 0, 2 * slots * largest, False, buffers=True)


def _even(shape: Shape) -> Spread:
    def spread(cache_bytes: int) -> Sequence[int]:
        slots = min(cache_bytes // sum(shape.bytes_by_layer), shape.experts)
        return (slots,) * shape.layers

    return spread


def uneven_plan(shape: Shape, slots_by_layer: Sequence[int], staging: int) -> MemoryPlan:
    """Per-layer pools of the given sizes, in slots of the checkpoint's own precision."""
    sizes = shape.bytes_by_layer
    held = tuple(slots * size for slots, size in zip(slots_by_layer, sizes, strict=True))
    by_bytes = shape.precisions > 1
    return MemoryPlan(
        tuple(range(shape.layers)),
        held if by_bytes else tuple(slots_by_layer),
        sizes if by_bytes else (1,) * shape.layers,
        staging,
        sum(held) + staging * max(sizes),
        by_bytes,
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
