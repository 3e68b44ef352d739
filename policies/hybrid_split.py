"""Misses split between link and CPU by their rates, so that both finish at about the same time.

Source: FreeToken's rule: of an event's misses the share ``pcie / (pcie + cpu)`` is copied and the
rest runs on the CPU meanwhile.

Our readings: a rate is what one expert more takes, start-ups left out, beside the other's work (so
with both slow-downs), for the mean number of tokens a miss; the number to copy is rounded to the
nearest, halves up; copied are those with most tokens, then in touch order, since the CPU's time
grows with tokens and the copied ones stay in the cache. What the CPU computes does not enter the
cache, and the cache rule does not hear of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from policies.caches import causal_caches, combine
from policies.errors import PolicyError
from policies.interface import Costs, Keys, MissRule, Policy, PolicyData, Shape
from policies.registry import Param, Params, register

_PPM = 1_000_000


class RateSplit(MissRule):
    """The link's share of the misses is copied, the CPU computes the others."""

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self._shape = shape
        self._costs = costs
        self._copied: dict[tuple[int, int, int], int] = {}

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        """Those with fewest tokens."""
        counts = [tokens.get(key, 1) for key in misses]
        total = sum(counts)
        copied = self._copies(layer, len(misses), total)
        if total == len(misses):
            return misses[copied:]
        ranked = sorted(range(len(misses)), key=lambda index: -counts[index])
        return [misses[index] for index in ranked[copied:]]

    def _copies(self, layer: int, misses: int, tokens: int) -> int:
        known = self._copied.get((layer, misses, tokens))
        if known is None:
            cpu_ns = self.cpu_ns(layer, -(-tokens // misses))
            both = self.link_ns(layer) + cpu_ns
            # share = (1 / link) / (1 / link + 1 / cpu) = cpu / (link + cpu)
            known = (2 * misses * cpu_ns + both) // (2 * both)
            self._copied[layer, misses, tokens] = known
        return known

    def link_ns(self, layer: int) -> int:
        """One copy more, back to back, while the CPU computes."""
        size, costs = self._shape.bytes_by_layer[layer], self._costs
        alone = costs.copy_ns(2 * size) - costs.copy_ns(size)
        return alone + alone * costs.link_slowdown_cpu_ppm // _PPM

    def cpu_ns(self, layer: int, tokens: int) -> int:
        """One expert of so many tokens more, while copies run."""
        costs = self._costs
        alone = costs.cpu_experts_ns(layer, 2, 2 * tokens) - costs.cpu_experts_ns(layer, 1, tokens)
        return alone + alone * costs.cpu_slowdown_ppm // _PPM


@register(
    "hybrid-split",
    params={"cache": Param(str, "lru", "cache rule beneath", choices=causal_caches)},
    reads_costs=True,
    summary="misses shared out between link and CPU by their rates",
    source="FreeToken's split",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Over any causal cache."""
    if data.costs is None:
        raise PolicyError("hybrid-split weighs CPU against link: it needs the machine's costs")
    cache, scope = combine(params["cache"], data)
    return Policy(cache, miss_rule=RateSplit(data.shape, data.costs), scope=scope)
