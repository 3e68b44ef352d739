"""No cache: every expert is copied for its event and dropped after it.

All slots are staging slots. The floor that a cache must beat (Accelerate's and DeepSpeed's
offloading behave so at the level of layers).
"""

from __future__ import annotations

from collections.abc import Collection

from policies.interface import CacheRule, Keys, Policy, PolicyData
from policies.registry import Params, register


class OnDemand(CacheRule):
    """Admission is always refused."""

    may_refuse = True

    def refused(self, layer: int, keys: Keys, misses: Keys) -> Collection[int]:
        """Every miss."""
        return misses

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """There are no residents."""
        return None


@register("on-demand", summary="no cache beyond the event in progress", source="bound")
def build(params: Params, data: PolicyData) -> Policy:
    """Staging slots only."""
    return Policy(OnDemand(), scope="staging")
