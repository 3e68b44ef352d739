"""How an expert budget is spread over layers that have slots of their own.

``even``: the same number for each. ``greedy`` and ``dp`` look at requests set aside, never at those
judged: a slot more goes where it would have brought most hits (greedy), or all slots lie where they
would have saved most bytes (``dp``, AdapMoE's dynamic programme, arXiv 2408.10284).

Our readings: hits by slots are counted for each layer from reuse distances, so for an LRU cache
whose events fit; caches that never change are judged by popularity (:attr:`CacheRule.hit_curve`).
AdapMoE weighs expected loads after prefetching and gating; here every hit counts alike, worth the
bytes that it saves. Every layer keeps one slot at least, or what the policy needs. Where nothing
more is to be gained, or the programme leaves bytes over, layers with fewest slots get them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.capacity import MemoryPlan, Spread, plan_memory
from policies.errors import PolicyError
from policies.interface import Options, Policy, Recorded, Shape

SPREADS = ("even", "greedy", "dp")
#: the programme counts bytes in units of the budget over this, where sizes have no larger one
_MOST_UNITS = 1 << 15

Curves = npt.NDArray[np.int64]


def plan_policy(
    shape: Shape, policy: Policy, options: Options, budget_bytes: int, fit: Recorded | None
) -> MemoryPlan:
    """The memory of a policy under its options.

    Raises PolicyError for a budget that is too small, and for uneven slots without layers of their
    own or without requests set aside.
    """
    return plan_memory(
        shape,
        policy.scope,
        budget_bytes,
        staging_slots=options.staging_slots,
        needs_staging=policy.cache.may_refuse,
        least_slots=policy.least_slots,
        spread=None if options.slots == "even" else _spread(shape, policy, options.slots, fit),
    )


def _spread(shape: Shape, policy: Policy, slots: str, fit: Recorded | None) -> Spread:
    curves = _curves(shape, policy, slots, fit)
    choose = {"greedy": greedy, "dp": dp}[slots]
    return lambda cache_bytes: choose(curves, shape.bytes_by_layer, cache_bytes, policy.least_slots)


def _curves(shape: Shape, policy: Policy, slots: str, fit: Recorded | None) -> Curves:
    if policy.scope != "layer":
        raise PolicyError(
            f"slots={slots} spreads a budget over layers with slots of their own; this policy "
            f"has none (scope {policy.scope}): leave it out, or take a cache per layer"
        )
    if fit is None:
        raise PolicyError(f"slots={slots} needs requests to learn from: give a fit share above 0")
    own = policy.cache.worth(fit, shape)
    if own is not None:
        return np.asarray(own, np.int64)
    if policy.cache.hit_curve == "popularity":
        return popularity_curves(fit, shape)
    return reuse_curves(fit, shape)


def reuse_curves(fit: Recorded, shape: Shape) -> Curves:
    """Hits of an LRU cache with 0 to E slots in each layer, int64 [layers, E + 1].

    A use hits with more slots than other experts of the layer were used since; events are atomic.
    """
    found = np.zeros((shape.layers, shape.experts + 1), np.int64)
    # Most recent last, so that the distance is the way from the end.
    stacks: list[list[int]] = [[] for _ in range(shape.layers)]
    events = fit.events
    for step in range(len(events) // shape.layers):
        for layer, keys in enumerate(events.step(step)):
            stack = stacks[layer]
            depth = len(stack)
            known = [(key, depth - stack.index(key)) for key in keys if key in stack]
            for key, distance in known:
                found[layer, distance] += 1
                stack.remove(key)
            stack += keys
    return np.cumsum(found, axis=1)


def popularity_curves(fit: Recorded, shape: Shape) -> Curves:
    """Hits of the most popular 0 to E experts of each layer, int64 [layers, E + 1]."""
    keys = np.asarray(fit.events.keys)
    counts = np.bincount(keys, minlength=shape.layers * shape.experts)
    ranked = -np.sort(-counts.reshape(shape.layers, shape.experts), axis=1)
    return np.pad(np.cumsum(ranked, axis=1), ((0, 0), (1, 0))).astype(np.int64)


def greedy(curves: Curves, sizes: Sequence[int], cache_bytes: int, least: int = 1) -> list[int]:
    """Slots of each layer: ``least``, then one more where it brings most hits and still fits.

    ``curves`` [layers, E + 1]; ``sizes``: bytes of an expert by layer. Ties: fewest slots, then the
    first layer.
    """
    return _fill([least] * len(sizes), curves, sizes, cache_bytes)


def _fill(slots: list[int], curves: Curves, sizes: Sequence[int], cache_bytes: int) -> list[int]:
    """Add slots one by one until nothing fits."""
    gains = np.diff(curves, axis=1).tolist()
    most = curves.shape[1] - 1
    left = cache_bytes - sum(n * size for n, size in zip(slots, sizes, strict=True))
    while True:
        open_layers = [
            layer for layer, size in enumerate(sizes) if size <= left and slots[layer] < most
        ]
        if not open_layers:
            return slots
        best = min(open_layers, key=lambda layer: (-gains[layer][slots[layer]], slots[layer]))
        slots[best] += 1
        left -= sizes[best]


def dp(curves: Curves, sizes: Sequence[int], cache_bytes: int, least: int = 1) -> list[int]:
    """Slots of each layer that save most bytes in all, at least ``least`` each.

    Exact where the budget is at most 2**15 times the sizes' greatest common divisor; else sizes are
    rounded up to so many units, which never exceeds the budget. Ties: fewest slots in later layers.
    """
    unit = max(math.gcd(*sizes), -(-cache_bytes // _MOST_UNITS))
    weights = [-(-size // unit) for size in sizes]
    budget = cache_bytes // unit
    # The first slots are given; they fit in bytes, and must do so in units too.
    spare = max(0, budget - least * sum(weights))
    best = np.zeros(spare + 1, np.int64)
    choices: list[npt.NDArray[np.int16]] = []
    for curve, size, weight in zip(curves, sizes, weights, strict=True):
        best, more = _with_layer(best, (curve[least:] - curve[least]) * size, weight)
        choices.append(more)
    slots = [least + extra for extra in _read_back(choices, weights, spare)]
    return _fill(slots, curves, sizes, cache_bytes)


def _with_layer(best: Any, worth: Any, weight: int) -> tuple[Any, npt.NDArray[np.int16]]:
    """Most bytes saved by spare units with one layer more; how many slots above one it takes."""
    total = best.copy()
    more = np.zeros(len(best), np.int16)
    for extra in range(1, len(worth)):
        used = extra * weight
        if used >= len(best):
            break
        candidate = best[: len(best) - used] + worth[extra]
        better = candidate > total[used:]
        total[used:][better] = candidate[better]
        more[used:][better] = extra
    return total, more


def _read_back(choices: Sequence[Any], weights: Sequence[int], spare: int) -> list[int]:
    slots = []
    for more, weight in zip(reversed(choices), reversed(weights), strict=True):
        extra = int(more[spare])
        slots.append(extra)
        spare -= extra * weight
    return slots[::-1]
