"""Static placement; a miss is computed where that takes less time: on the CPU, or on the GPU.

Source: Fiddler (arXiv 2402.07033). The resident experts are those of ``static``. A missing expert
with n tokens runs on the CPU if ``cpu(n) < copy + gpu(n)``, else it is copied, computed and
forgotten.

Our readings: each miss is judged by itself, as if it were the event's only one (the CPU's group
shares one transfer of activations, and copies queue); times are the machine's measured ones, taken
alone, not beside each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from policies.caches import combine
from policies.errors import PolicyError
from policies.interface import Costs, Keys, MissRule, Policy, PolicyData, Shape
from policies.registry import Params, register


class CheaperSide(MissRule):
    """To the CPU if it is faster there than after a copy."""

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self._shape = shape
        self._costs = costs
        self._on_cpu: dict[tuple[int, int], bool] = {}

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        """Those that the CPU computes sooner."""
        return [key for key in misses if self._is_faster_on_cpu(layer, tokens.get(key, 1))]

    def _is_faster_on_cpu(self, layer: int, tokens: int) -> bool:
        known = self._on_cpu.get((layer, tokens))
        if known is None:
            costs = self._costs
            copied = costs.copy_ns(self._shape.bytes_by_layer[layer])
            on_gpu = copied + costs.gpu_experts_ns(layer, 1, tokens)
            known = self._on_cpu[layer, tokens] = costs.cpu_experts_ns(layer, 1, tokens) < on_gpu
        return known


@register(
    "fiddler",
    fitted=True,
    reads_costs=True,
    summary="static placement; a miss runs on the CPU if that takes less than copying it",
    source="Fiddler, arXiv 2402.07033",
)
def build(params: Params, data: PolicyData) -> Policy:
    """On the cache rule ``static``."""
    if data.costs is None:
        raise PolicyError("fiddler weighs CPU against link: it needs the machine's costs")
    cache, scope = combine("static", data)
    return Policy(cache, miss_rule=CheaperSide(data.shape, data.costs), scope=scope)
