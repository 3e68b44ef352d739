"""Misses shared out between link and CPU so that both are done soonest, from measured costs.

:class:`SoonestSplit` is the miss rule of ``auto``. Where ``hybrid-split`` rounds a share, it tries
every number of copies, start-ups and what is already on the wire included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from policies._slot_worth import SlotWorth
from policies.core import DecisionCore
from policies.interface import Costs, Keys, MissRule, Shape

_PPM = 1_000_000
#: of a copy's time, what it takes from GPU kernels beside it (measured: 2 to 6 %)
_GPU_TOLL = 0.05
#: share of the time that CPU workers are at work, where they take part
_CPU_DUTY = 0.5
#: of the chunk on the wire, what is left on average
_LEFT = 0.5


class SoonestSplit(MissRule):
    """Copies what has fewest chunks left, most tokens, most worth, in this order; the CPU the rest.

    Experts under way are shared out too: where the CPU is sooner, their copies go on unawaited.
    """

    takes_late = True

    def __init__(self, shape: Shape, costs: Costs, cache: SlotWorth, with_cpu: bool) -> None:
        self._shape = shape
        self._costs = costs
        self._cache = cache
        self._with_cpu = with_cpu

    def bind(self, core: DecisionCore) -> None:
        """Costs of a chunk in each layer."""
        super().bind(core)
        costs, chunks = self._costs, core.options.chunks
        parts = [-(-size // chunks) for size in self._shape.bytes_by_layer]
        self._chunks = chunks
        plan = core.plan
        self._slots = [plan.capacity[pool] for pool in plan.pool_of_layer]
        self._chunk_ns = [costs.copy_ns(2 * part) - costs.copy_ns(part) for part in parts]
        self._startup_ns = costs.copy_ns(parts[0]) - self._chunk_ns[0]
        self._gpu_ns = [costs.gpu_experts_ns(layer, 1, 1) for layer in range(len(parts))]
        self._known: dict[tuple[int, int, int, bool, tuple[int, ...]], int] = {}
        self._cpu_ns: dict[tuple[int, int, int], int] = {}
        self._hits_to_pay = [self._to_pay(layer) for layer in range(len(parts))]
        #: misses of the event in progress that the CPU computes
        self.taken: list[int] = []

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        """Those that are sooner there on the CPU; their queued copies are taken back."""
        if not self._with_cpu:
            return ()
        copies, worth = self.core.copies, self._cache.decayed_use
        left = dict.fromkeys(misses, self._chunks)
        for key in misses:
            copy = copies.get(key)
            if copy is not None:
                left[key] = copy.chunks - copy.sent
        order = sorted(misses, key=lambda key: (left[key], -tokens.get(key, 1), -worth(key), key))
        hits = max(len(tokens) or self._shape.top_k, len(order)) - len(order)
        room = self._slots[layer] - hits
        counts = [tokens.get(key, 1) for key in order]
        copied = self._copied(layer, room, [left[key] for key in order], counts)
        self.taken = order[copied:]
        self._leave_to_cpu(self.taken)
        return self.taken

    def _leave_to_cpu(self, keys: Keys) -> None:
        """Nobody waits for their copies any longer."""
        core = self.core
        self._cache.computed_elsewhere(keys)
        under_way = [key for key in keys if key in core.copies and not core.cancel(key)]
        if under_way:
            core.reprioritise(dict.fromkeys(under_way, 0.0))

    def _copied(self, layer: int, room: int, left: list[int], counts: list[int]) -> int:
        """How many to copy, in order, of so many chunks to hand over and so many tokens each.

        ``room``: slots for them beside the event's hits.
        """
        core = self.core
        flying = sum([copy.sent - copy.landed for copy in core.copies.values()])
        busy = flying > 0 or bool(core.queue.low)
        if sum(counts) > len(counts):
            return self._soonest(layer, room, flying, busy, left, counts)
        kind = (layer, min(room, len(left)), flying, busy, tuple(left))
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = self._soonest(layer, room, flying, busy, left, counts)
        return known

    def _soonest(
        self, layer: int, room: int, flying: int, busy: bool, left: list[int], counts: list[int]
    ) -> int:
        """Try every number; ties: the most copies. ``flying``: chunks handed over, not landed.

        The CPU works beside the first wave alone: what finds no room there is copied afterwards.
        """
        waiting = flying - _LEFT if flying else 0.0
        startup = 0 if flying else self._startup_ns
        gpu, chunk = self._gpu_ns[layer], self._chunk_ns[layer]
        beside = self._beside_ns(layer)
        experts, rest = len(left), sum(counts)
        first = handed = 0
        best, best_ns = 0, float("inf")
        for copied in range(experts + 1):
            if copied:
                rest -= counts[copied - 1]
                handed += left[copied - 1]
                first = handed if copied <= room else first
            cpu = link = 0.0
            if copied and room > 0:
                wire = beside if copied < experts else chunk
                link = startup + (waiting + first) * wire + gpu
            if copied < experts:
                cpu = self._on_cpu_ns(layer, experts - copied, rest, busy or copied > 0) + gpu
            waves = -(-max(copied - max(room, 0), 0) // self._slots[layer])
            soonest = max(link, cpu) + (handed - first) * chunk + waves * (startup + gpu)
            if soonest <= best_ns:
                best, best_ns = copied, soonest
        return best

    def _on_cpu_ns(self, layer: int, experts: int, tokens: int, busy: bool) -> float:
        """A group on the CPU; beside copies where the link is ``busy``."""
        alone = self._cpu_ns.get((layer, experts, tokens))
        if alone is None:
            alone = self._costs.cpu_experts_ns(layer, experts, tokens)
            self._cpu_ns[layer, experts, tokens] = alone
        return alone * (1 + self._costs.cpu_slowdown_ppm / _PPM) if busy else alone

    def hits_to_pay(self, layer: int) -> float:
        """Hits that a copy on an otherwise idle link must bring to be worth what it slows down."""
        return self._hits_to_pay[layer]

    def _to_pay(self, layer: int) -> float:
        """What the copy slows down, over what a miss costs with link and CPU together."""
        link = self._chunks * self._beside_ns(layer)
        if not self._with_cpu:
            return _GPU_TOLL
        one, two = (self._on_cpu_ns(layer, number, number, True) for number in (1, 2))
        saved = 1 / (1 / max(two - one, 1.0) + 1 / max(link, 1.0))
        return link * (_GPU_TOLL + _CPU_DUTY * self._costs.cpu_slowdown_ppm / _PPM) / saved

    def _beside_ns(self, layer: int) -> float:
        """A chunk more on the link while the CPU computes."""
        return self._chunk_ns[layer] * (1 + self._costs.link_slowdown_cpu_ppm / _PPM)
