"""Misses split between link and CPU by their rates, so that both finish at about the same time.

Source: FreeToken's rule: of an event's misses the share ``pcie / (pcie + cpu)`` is copied and the
rest runs on the CPU meanwhile.

Our readings: a rate is what one expert more takes, start-ups left out, beside the other's work (so
with both slow-downs), for the mean number of tokens a miss; copied are those with most tokens, then
in touch order, since the CPU's time grows with tokens and the copied ones stay in the cache. What
the CPU computes does not enter the cache, and the cache rule does not hear of it.

The number to copy is rounded to the nearest, halves up. Where the link's share is below one half,
that alone sends every lone miss to the CPU, so a cache that misses one expert an event learns
nothing more. ``rounding=owed`` therefore adds up the shares of a layer's events that round to none,
and copies one expert once they make one; an event that copies settles the account. On the machine
rtx4090-pcie4, its link at 12 GB/s, that decodes gpt-oss-20b's experts, 75 % of them in slots, in
9.4 ms a token (94 % hits) where ``nearest`` takes 14.2 (76 %). On the sample and on a recording of
a Qwen1.5-MoE-shaped model, 25 to 75 % in slots, it takes 2 % less to 5 % more at 12 GB/s, 2 % less
to 1 % more at 24 GB/s; at 50 GB/s the two are one. Carrying all remainders on, those of events that
copy, too, was up to 4 % slower there than ``owed``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from policies.caches import causal_caches, combine
from policies.errors import PolicyError
from policies.interface import Costs, Keys, MissRule, Policy, PolicyData, Shape
from policies.registry import Param, Params, register

ROUNDINGS = ("owed", "nearest")
_PPM = 1_000_000


class RateSplit(MissRule):
    """The link's share of the misses is copied, the CPU computes the others."""

    def __init__(self, shape: Shape, costs: Costs, rounding: str) -> None:
        self._shape = shape
        self._costs = costs
        self._owes = rounding == "owed"
        self._owed_ppm = [0] * shape.layers
        self._shares: dict[tuple[int, int, int], tuple[int, int]] = {}

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
        """The share's nearest; where that is none, one as soon as one is owed."""
        known = self._shares.get((layer, misses, tokens))
        if known is None:
            known = self._shares[layer, misses, tokens] = self._share(layer, misses, tokens)
        copied, share_ppm = known
        if copied:
            self._owed_ppm[layer] = 0
            return copied
        owed_ppm = self._owed_ppm[layer] + share_ppm
        if not self._owes or owed_ppm < _PPM:
            self._owed_ppm[layer] = owed_ppm
            return 0
        self._owed_ppm[layer] = 0
        return 1

    def _share(self, layer: int, misses: int, tokens: int) -> tuple[int, int]:
        """Copies that the link is due: the nearest number, halves up, and in millionths."""
        cpu_ns = self.cpu_ns(layer, -(-tokens // misses))
        both_ns = self.link_ns(layer) + cpu_ns
        # (1 / link) / (1 / link + 1 / cpu) = cpu / (link + cpu)
        due_ns = misses * cpu_ns
        # Rounded up: three thirds are one.
        return (2 * due_ns + both_ns) // (2 * both_ns), -(-due_ns * _PPM // both_ns)

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
    params={
        "cache": Param(str, "lru", "cache rule beneath", choices=causal_caches),
        "rounding": Param(
            str,
            "owed",
            "nearest number of copies; owed: shares that round to none add up until they make one",
            choices=ROUNDINGS,
        ),
    },
    reads_costs=True,
    summary="misses shared out between link and CPU by their rates",
    source="FreeToken's split",
)
def build(params: Params, data: PolicyData) -> Policy:
    """Over any causal cache."""
    if data.costs is None:
        raise PolicyError("hybrid-split weighs CPU against link: it needs the machine's costs")
    cache, scope = combine(params["cache"], data)
    return Policy(
        cache, miss_rule=RateSplit(data.shape, data.costs, params["rounding"]), scope=scope
    )
