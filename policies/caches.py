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
    causal: bool

    def with_defaults(self, data: PolicyData) -> CacheRule:
        """The rule with its parameters at their defaults."""
        return self.build({name: param.default for name, param in self.params.items()}, data)


CACHES: dict[str, CachePart] = {}


def causal_caches() -> tuple[str, ...]:
    """Caches that a causal prefetcher can stand on: no oracle, nothing fitted, all admitted."""
    return tuple(sorted(name for name, part in CACHES.items() if part.causal))


def all_caches() -> tuple[str, ...]:
    """Caches that an oracle prefetcher can stand on: the causal ones and Belady's."""
    return (*causal_caches(), "belady", "belady-global")


def cache_rule(
    name: str,
    *,
    scope: str,
    params: Mapping[str, Param] | None = None,
    refuses: bool = False,
    **traits: Any,
) -> Callable[[RuleBuilder], RuleBuilder]:
    """Decorator: register a rule as a part and as the policy of the same name.

    ``refuses``: it declines misses, so a prefetched expert may have no place in it.
    """
    own = dict(params or {})

    def decorate(build: RuleBuilder) -> RuleBuilder:
        apart = ("oracle", "fitted", "needs_all")
        causal = not refuses and not any(traits.get(trait) for trait in apart)
        CACHES[name] = CachePart(build, scope, own, causal)

        def build_policy(values: Params, data: PolicyData) -> Policy:
            return Policy(build(values, data), scope=scope)

        register(name, params=own, **traits)(build_policy)
        return build

    return decorate


def combine(cache: str, data: PolicyData) -> tuple[CacheRule, str]:
    """Rule and scope of the cache called ``cache``."""
    part = CACHES[cache]
    return part.with_defaults(data), part.scope
