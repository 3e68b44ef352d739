"""Everything on the GPU: the bound that needs no link."""

from __future__ import annotations

from collections.abc import Collection

from policies.caches import cache_rule
from policies.interface import CacheRule, Keys, PolicyData
from policies.registry import Params


class Resident(CacheRule):
    """All experts are loaded before the clock starts."""

    def warm_set(self) -> Keys:
        """All keys of the checkpoint's precision."""
        return range(self.core.shape.layers * self.core.shape.experts)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """Nobody leaves."""
        return None


@cache_rule(
    "resident",
    scope="layer",
    needs_all=True,
    summary="everything on the GPU: the upper bound where it fits",
    source="bound",
)
def build(params: Params, data: PolicyData) -> CacheRule:
    """Needs the whole of the experts as its budget."""
    return Resident()
