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
#: weight of an event in the running mean of what a miss costs
_NEW = 0.02
#: of the delays and copies counted so far, kept at the next event with misses
_KEPT = 0.99
#: copies that the first guess of their charge counts for
_PRIOR = 3.0


class SoonestSplit(MissRule):
    """Copies what has fewest chunks left, most tokens, most worth, in this order; the CPU the rest.

    Experts under way are shared out too: where the CPU is sooner, their copies go on unawaited. A
    copy is credited with the hits that its slot gains, as far as they save another copy's charge.
    """

    takes_late = True

    def __init__(self, shape: Shape, costs: Costs, cache: SlotWorth, with_cpu: bool) -> None:
        self._shape = shape
        self._costs = costs
        self._cache = cache
        self.uses_cpu = with_cpu

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
        self._cpu_ns: dict[tuple[int, int, int], int] = {}
        self._known: dict[tuple[object, ...], tuple[int, float, float]] = {}
        self._cpu_slower = costs.cpu_slowdown_ppm / _PPM if self.uses_cpu else 0.0
        self._link_slower = costs.link_slowdown_cpu_ppm / _PPM if self.uses_cpu else 0.0
        self._copy_ns = [chunks * chunk * (1 + self._link_slower) for chunk in self._chunk_ns]
        charge = _GPU_TOLL + _CPU_DUTY * self._cpu_slower
        self._charge_ns = [copy * charge for copy in self._copy_ns]
        self._saved_ns = self._first_saved_ns()
        self._delay_ns = self._started = 0.0
        self._started_before = 0
        #: misses of the event in progress that the CPU computes
        self.taken: list[int] = []

    def _first_saved_ns(self) -> float:
        """What a miss costs with link and CPU together, until some have been seen."""
        link = self._copy_ns[0]
        if not self.uses_cpu:
            return link
        one, two = (self._on_cpu_ns(0, number, number, True) for number in (1, 2))
        return 1 / (1 / max(two - one, 1.0) + 1 / max(link, 1.0))

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        """Those that are sooner there on the CPU; their queued copies are taken back."""
        left, flying, others = self._under_way(misses)
        if not self.uses_cpu:
            self._book_delay((others - _LEFT) * self._chunk_ns[layer] if others else 0.0)
            return ()
        chunks, counts, order = self._ordered(misses, left, tokens)
        hits = max(len(tokens) or self._shape.top_k, len(order)) - len(order)
        room = self._slots[layer] - hits
        credits = self._credits(layer, order[: max(room, 0)])
        event = (layer, min(room, len(order)), chunks, counts, credits)
        low = bool(self.core.queue.low)
        copied, took, net = self._best(*event, flying, flying > 0 or low)
        self._saved_ns += _NEW * (took / len(order) - self._saved_ns)
        delay = 0.0
        if others or low:
            needed = flying - others
            delay = net - self._best(*event, needed, needed > 0)[2]
        self._book_delay(delay)
        self.taken = order[copied:]
        self._leave_to_cpu(self.taken)
        return self.taken

    def _ordered(
        self, misses: Keys, left: dict[int, int], tokens: Mapping[int, int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
        """Chunks left, tokens, and keys, in order of copying."""
        worth = self._cache.decayed_use
        if not tokens:
            alone = sorted([(left[key], -worth(key), key) for key in misses])
            return tuple([each[0] for each in alone]), (1,) * len(alone), [key for *_, key in alone]
        ranked = sorted([(left[key], -tokens.get(key, 1), -worth(key), key) for key in misses])
        chunks = tuple([each[0] for each in ranked])
        return chunks, tuple([-each[1] for each in ranked]), [each[3] for each in ranked]

    def _under_way(self, misses: Keys) -> tuple[dict[int, int], int, int]:
        """Chunks left of each miss; chunks handed over, not landed: all, and of other experts."""
        left = dict.fromkeys(misses, self._chunks)
        flying = others = 0
        for key, copy in self.core.copies.items():
            chunks = copy.sent - copy.landed
            flying += chunks
            if key in left:
                left[key] = copy.chunks - copy.sent
            else:
                others += chunks
        return left, flying, others

    def _leave_to_cpu(self, keys: Keys) -> None:
        """Nobody waits for their copies any longer."""
        core = self.core
        self._cache.computed_elsewhere(keys)
        under_way = [key for key in keys if key in core.copies and not core.cancel(key)]
        if under_way:
            core.reprioritise(dict.fromkeys(under_way, 0.0))

    def _credits(self, layer: int, keys: Keys) -> tuple[bool, ...]:
        """Whether each of ``keys``, copied now in turn, saves another copy's charge.

        So it does if the hits that it brings, less those of who leaves for it, are worth half of
        what it would be charged for if it were brought in behind.
        """
        least = self._charge_ns[layer] / self._saved_ns / 2
        renewed = self._cache.renewed_by(keys)
        priced = zip(renewed, self._cache.prices(layer, ()), strict=False)
        return tuple([hits - price > least for hits, price in priced])

    def _best(
        self,
        layer: int,
        room: int,
        left: tuple[int, ...],
        counts: tuple[int, ...],
        credits: tuple[bool, ...],
        flying: int,
        busy: bool,
    ) -> tuple[int, float, float]:
        """:meth:`_soonest`, remembered for events of one token."""
        if sum(counts) > len(counts):
            return self._soonest(layer, room, left, counts, credits, flying, busy)
        kind = (layer, room, left, credits, flying, busy)
        known = self._known.get(kind)
        if known is None:
            known = self._soonest(layer, room, left, counts, credits, flying, busy)
            self._known[kind] = known
        return known

    def _soonest(
        self,
        layer: int,
        room: int,
        left: tuple[int, ...],
        counts: tuple[int, ...],
        credits: tuple[bool, ...],
        flying: int,
        busy: bool,
    ) -> tuple[int, float, float]:
        """Try every number of copies; ties: the most. Returns it, its time, and less its credits.

        In order of copying: chunks ``left`` to hand over, tokens, credits. ``room``: slots for
        copies beside the event's hits; ``flying``: chunks handed over, not landed; ``busy``: copies
        run beside the CPU even if none is added. The CPU works beside the first wave alone: what
        finds no room there is copied afterwards.
        """
        waiting = flying - _LEFT if flying else 0.0
        startup = 0 if flying else self._startup_ns
        gpu, chunk, slower = self._gpu_ns[layer], self._chunk_ns[layer], self._link_slower
        charge = self._charge_ns[layer]
        experts, rest = len(left), sum(counts)
        first = handed = 0
        credit = 0.0
        best, best_ns, best_net = 0, 0.0, float("inf")
        for copied in range(experts + 1):
            if copied:
                rest -= counts[copied - 1]
                handed += left[copied - 1]
                if copied <= room:
                    first = handed
                    credit += charge if credits[copied - 1] else 0.0
            cpu = link = soonest = 0.0
            if copied < experts:
                cpu = self._on_cpu_ns(layer, experts - copied, rest, busy or copied > 0)
                soonest = cpu + gpu
            if copied and room > 0:
                link = startup + (waiting + first) * chunk
                # Copies take longer beside the CPU, as long as it works.
                link += min(link, cpu / (1 + slower)) * slower + gpu
                soonest = max(soonest, link)
            beyond = copied - max(room, 0)
            if beyond > 0:
                waves = -(-beyond // self._slots[layer])
                soonest += (handed - first) * chunk + waves * (startup + gpu)
            if soonest - credit <= best_net:
                best, best_ns, best_net = copied, soonest, soonest - credit
        return best, best_ns, best_net

    def _on_cpu_ns(self, layer: int, experts: int, tokens: int, busy: bool) -> float:
        """A group on the CPU; beside copies where the link is ``busy``."""
        alone = self._cpu_ns.get((layer, experts, tokens))
        if alone is None:
            alone = self._costs.cpu_experts_ns(layer, experts, tokens)
            self._cpu_ns[layer, experts, tokens] = alone
        return alone * (1 + self._cpu_slower) if busy else alone

    def _book_delay(self, delay_ns: float) -> None:
        """By how much copies that the event has no need of have delayed it."""
        started = self.core.tally.prefetch_started
        self._delay_ns = self._delay_ns * _KEPT + max(delay_ns, 0.0)
        self._started = self._started * _KEPT + started - self._started_before
        self._started_before = started

    def hits_to_pay(self, layer: int) -> float:
        """Hits that a copy at LOW must bring to be worth what it slows down and delays."""
        first = self._charge_ns[layer]
        delay = (self._delay_ns + _PRIOR * first) / (self._started + _PRIOR)
        return (max(delay, first) + _GPU_TOLL * self._copy_ns[layer]) / self._saved_ns
