"""Cache rules by name, for policies that combine a prefetcher with a cache of choice.

A rule's own file registers it with :func:`cache_rule`; its pure-cache policy is registered there
too, so ``lru`` the policy and ``cache=lru`` the part are one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.interface import CacheRule, Policy, PolicyData
from policies.registry import Param, Params, register

RuleBuilder = Callable[[Params, PolicyData], CacheRule]


@dataclass(frozen=True)
class CachePart:
    """A cache rule that can be combined: its builder and scope (``layer`` or ``global``)."""

    build: RuleBuilder
    scope: str
    params: Mapping[str, Param]

    def with_defaults(self, data: PolicyData) -> CacheRule:
        """The rule with its parameters at their defaults."""
        return self.build({name: param.default for name, param in self.params.items()}, data)


CACHES: dict[str, CachePart] = {}

#: Causal rules without admission control, the choices of causal prefetchers.
CAUSAL_CACHES = ("lru", "lru-global", "lfu", "lfru", "slru", "least-stale")


def cache_rule(
    name: str, *, scope: str, params: Mapping[str, Param] | None = None, **traits: Any
) -> Callable[[RuleBuilder], RuleBuilder]:
    """Decorator: register a rule as a part and as the policy of the same name."""
    own = dict(params or {})

    def decorate(build: RuleBuilder) -> RuleBuilder:
        CACHES[name] = CachePart(build, scope, own)

        def build_policy(values: Params, data: PolicyData) -> Policy:
            return Policy(build(values, data), scope=scope)

        register(name, params=own, **traits)(build_policy)
        return build

    return decorate


def combine(cache: str, data: PolicyData) -> tuple[CacheRule, str]:
    """Rule and scope of the cache called ``cache``."""
    part = CACHES[cache]
    return part.with_defaults(data), part.scope
