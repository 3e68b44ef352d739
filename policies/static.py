"""A fixed resident set: the most popular experts of each layer, fitted on other requests.

Source: Fiddler's placement (arXiv 2402.07033). Misses are computed from staging slots and never
enter. The popularity is counted on requests set aside, never on those judged; ties go to the lowest
expert. The set is loaded before the clock starts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from policies.caches import cache_rule
from policies.errors import PolicyError
from policies.interface import CacheRule, Keys, PolicyData
from policies.registry import Params


def most_popular(counts: Sequence[int], slots: int) -> list[int]:
    """The ``slots`` experts of a layer with the largest counts, by id; ties: the lowest ids."""
    ranked = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    return sorted(ranked[:slots])


class Static(CacheRule):
    """Nobody leaves, nobody enters."""

    may_refuse = True
    hit_curve = "popularity"

    def __init__(self, popularity: list[list[int]]) -> None:
        self._popularity = popularity

    def warm_set(self) -> Keys:
        """The top of each layer, as many as it has slots."""
        shape, plan = self.core.shape, self.core.plan
        chosen = []
        for layer, counts in enumerate(self._popularity):
            slots = plan.capacity[plan.pool_of_layer[layer]] // plan.unit_of_layer[layer]
            chosen += [layer * shape.experts + expert for expert in most_popular(counts, slots)]
        return chosen

    def refused(self, layer: int, keys: Keys, misses: Keys) -> Collection[int]:
        """Every miss."""
        return misses

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """Nobody."""
        return None


@cache_rule(
    "static",
    scope="layer",
    fitted=True,
    summary="the most popular experts stay; popularity from other requests",
    source="Fiddler, arXiv 2402.07033",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Per layer, fitted."""
    if data.popularity is None:
        raise PolicyError("static needs requests to learn from: give a fit share above 0")
    return Static([[int(count) for count in row] for row in data.popularity])
