"""The decision core: events in, commands out. One for both clocks, simulated and real.

A driver (``sim/`` on SimPy, ``replay/`` on CUDA) feeds events in this order, per forward step::

    step_begin -> for each MoE layer: gate -> (next_chunk / chunk_done)* -> [next_wave ...]
               -> experts_done -> ... -> step_end

and obeys: :meth:`DecisionCore.next_chunk` says what to copy when the submission window has room,
the :class:`Wave` returned by :meth:`gate` and :meth:`next_wave` what to execute and in which order.
Predictions are announced by :meth:`predictions` and take effect in :meth:`prediction_ready`, which
the driver calls once the predictor's time has passed.

No clock, no SimPy, no torch in here: same events, same decisions, to the last eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from policies.capacity import MemoryPlan
from policies.errors import PolicyError
from policies.interface import (
    Counters,
    Keys,
    MissRule,
    Options,
    Policy,
    Prediction,
    Shape,
    Signals,
    Tally,
)
from policies.memory import ABSENT, COPYING, QUEUED, RESIDENT, ExpertMemory
from policies.transfers import Copy, TransferQueue, split_chunks

ORDERS = ("cached-first", "touch", "id")
_NONE: tuple[int, ...] = ()


class Wave:
    """What to execute now.

    ``ready``: keys that can run at once; ``order``: all keys of the wave in execution order where
    the order is strict, else None (resident group first, then groups as they land); ``waiting``:
    how many are still to land; ``cpu``: keys that the CPU computes; ``last``: no wave follows.
    """

    __slots__ = ("cpu", "last", "order", "ready", "waiting")

    def __init__(
        self, ready: Keys, waiting: int, cpu: Keys, order: list[int] | None, last: bool
    ) -> None:
        self.ready = ready
        self.waiting = waiting
        self.cpu = cpu
        self.order = order
        self.last = last


class DecisionCore:
    """Expert memory, transfer queue and policy, driven by events."""

    def __init__(
        self,
        shape: Shape,
        plan: MemoryPlan,
        policy: Policy,
        options: Options | None = None,
        *,
        signals: Signals | None = None,
        clock_ns: Callable[[], int] | None = None,
        log: list[tuple[object, ...]] | None = None,
    ) -> None:
        options = options or Options()
        if options.order not in ORDERS:
            raise PolicyError(f"order '{options.order}' is unknown: choose {', '.join(ORDERS)}")
        if options.chunks < 1:
            raise PolicyError(f"chunks is {options.chunks}: give at least 1")
        self.shape = shape
        self.plan = plan
        self.policy = policy
        self.options = options
        self.signals = signals
        self.clock_ns = clock_ns
        self.log = log
        self.memory = ExpertMemory(shape, plan)
        self.queue = TransferQueue()
        self.copies: dict[int, Copy] = {}
        self.landed: list[Copy] = []
        #: token assignments of an event that was routed anew; None: those that the driver gave
        self.reassigned: dict[int, int] | None = None
        self.pinned: set[int] = set()
        self.guard: list[set[int]] = [set() for _ in range(shape.layers)]
        self.guarded: set[int] = set()
        self.parked: dict[int, Copy] = {}
        self.step = -1
        self.layer = -1
        self.stage = "cold"
        self.tally = Tally()
        self.counters = Counters()
        self._state = self.memory.state
        self._rule = policy.cache
        self._prefetcher = policy.prefetcher
        self._miss_rule = policy.miss_rule
        self._lossy = policy.miss_rule is not None and policy.miss_rule.lossy
        self._has_cpu = policy.miss_rule is not None and (
            type(policy.miss_rule).on_misses is not MissRule.on_misses
        )
        #: the CPU may have to compute experts
        self.uses_cpu = self._has_cpu and policy.miss_rule is not None and policy.miss_rule.uses_cpu
        self._takes_late = policy.miss_rule is not None and policy.miss_rule.takes_late
        #: cache rules are told the recorded events, neither routed anew nor shared with the CPU
        self.as_recorded = not (self._lossy or self._has_cpu)
        self._strict = options.order != "cached-first"
        #: copies may have stopped half way: those with fewest chunks left go first
        self._resumes = self._prefetcher is not None and options.chunks > 1 and not self._strict
        self._one_precision = shape.precisions == 1
        self._one_pool = len(plan.capacity) == 1
        self._chunk_bytes = [split_chunks(size, options.chunks) for size in self.memory.bytes_of]
        self._pending: list[list[int]] = []
        self._unlanded = 0
        self._refused: Collection[int] = _NONE
        self._hits: set[int] | None = None
        self._prefetched: dict[int, int] = {}
        self._predicted: list[set[int] | None] = [None] * shape.layers
        self._seq = 0
        self._rule.bind(self)
        if self._prefetcher is not None:
            self._prefetcher.bind(self)
        if policy.miss_rule is not None:
            policy.miss_rule.bind(self)
        self._load_warm_set()

    # ------------------------------------------------------------------ events of a step

    def request_begin(self, request: int) -> None:
        """A request's first step is about to begin."""
        if self.options.reset:
            self._reset()

    def request_end(self, request: int) -> None:
        """A request's last step is over."""
        if self._prefetcher is not None:
            self._prefetcher.on_request_end(request)

    def step_begin(self, step: int, phase: str) -> None:
        """A forward step begins. ``phase``: ``prefill`` or ``decode`` (the counters' bucket)."""
        self.step = step
        self.layer = -1
        if self.stage == "cold" and self.memory.full:
            self.stage = "steady"
        bucket = (phase, self.stage)
        counters = self.tally.buckets.get(bucket)
        if counters is None:
            counters = self.tally.buckets[bucket] = Counters()
        self.counters = counters
        if self.signals is not None:
            self.signals.begin_step(step)
        self._rule.on_step(step)

    def step_end(self) -> None:
        """The step's last layer has been executed."""
        if self._prefetcher is not None:
            self._prefetcher.on_step_end(self.step)

    def gate(self, layer: int, keys: Keys, tokens: Mapping[int, int] | None = None) -> Wave:
        """The step needs ``keys`` (distinct, touch order) of ``layer``; classify and decide.

        ``tokens``: assignments of each key, asked for by CPU miss rules only.
        """
        self.layer = layer
        if self.signals is not None:
            self.signals.reach(layer)
        asked = keys
        if self._lossy:
            keys = self._route(layer, keys)
        state = self._state
        hits = [key for key in keys if state[key] == RESIDENT]
        counters = self.counters
        if self._lossy:
            counters.asked_hits += len(hits) if keys is asked else self._among(asked, hits)
        counters.events += 1
        counters.accesses += len(keys)
        counters.hits += len(hits)
        counters.hit_bytes += (
            len(hits) * self.shape.bytes_by_layer[layer]
            if self._one_precision
            else sum(self.memory.bytes_of[key] for key in hits)
        )
        if self._prefetcher is not None:
            self._settle_predictions(layer, keys)
            if self._prefetched:
                self._count_used(keys)
        if len(hits) == len(keys):
            self.pinned = set(keys)
            self._rule.on_event(layer, keys)
            counters.waves += 1
            if self.log is not None:
                self.log.append(("gate", self.step, layer, tuple(keys), tuple(hits)))
            return Wave(keys, 0, _NONE, self._ordered(keys) if self._strict else None, True)
        return self._gate_with_misses(layer, keys, hits, tokens)

    def next_wave(self) -> Wave:
        """The wave before has been computed; bring in the next one of this event."""
        if self.memory.staged:
            self._adopt(self.layer)
            self._release_staged()
        return self._begin_wave(self._pending.pop(0), _NONE)

    def experts_done(self, layer: int) -> None:
        """All experts of the event have been computed: its members are ordinary residents now."""
        if self.memory.staged:
            self._adopt(layer)
            self._release_staged()
        self.pinned = set()

    # ------------------------------------------------------------------ predictions

    def predictions_at_step(self) -> Iterable[Prediction]:
        """Predictions that become computable as the step begins."""
        return () if self._prefetcher is None else self._prefetcher.on_step(self.step)

    def predictions(self, layer: int, keys: Keys) -> Iterable[Prediction]:
        """Predictions that become computable once this layer's gate is known."""
        if self._prefetcher is None:
            return ()
        return self._prefetcher.on_gate(self.step, layer, keys)

    def prediction_ready(self, prediction: Prediction) -> None:
        """The predictor has finished. A prediction about a layer already passed is void."""
        if self._prefetcher is None or self._is_past(prediction):
            return
        self._prefetcher.on_ready(prediction)

    def _is_past(self, prediction: Prediction) -> bool:
        return (prediction.step, prediction.layer) <= (self.step, self.layer)

    # ------------------------------------------------------------------ commands of policies

    def prefetch(
        self, layer: int, keys: Keys, priorities: Sequence[float] = (), source: str = "prefetch"
    ) -> None:
        """Queue LOW copies for the absent ones of ``keys`` (best first).

        Never more than the pool can hold beside what is already predicted for the layer: a
        prefetch must not throw out another prefetch of the same layer.
        """
        predicted = self._predicted[layer]
        if predicted is None:
            self._predicted[layer] = set(keys)
        else:
            predicted.update(keys)
        new = self._guard_new(layer, keys)
        if not new:
            return
        state, parked = self._state, self.parked
        absent = [key for key in new if state[key] == ABSENT or key in parked]
        ranks = (
            [priorities[keys.index(key)] for key in absent] if priorities else [0.0] * len(absent)
        )
        self._queue_low(absent, layer, source, ranks)
        resident = [key for key in new if state[key] == RESIDENT]
        if resident:
            self._rule.on_predicted(resident)

    def _guard_new(self, layer: int, keys: Keys) -> list[int]:
        """Those of ``keys`` not guarded yet, as many as the pool holds beside the guarded ones."""
        guard = self.guard[layer]
        new = [key for key in keys if key not in guard] if guard else list(keys)
        if not new:
            return new
        room = self.plan.capacity[self.plan.pool_of_layer[layer]]
        if self.plan.by_bytes:
            # A guarded expert's bytes are in the pool or on their way: room is checked by the copy.
            room //= self.memory.unit_of[layer * self.shape.experts]
        else:
            room -= len(guard)
        if len(new) > room:
            del new[max(room, 0) :]
        guard.update(new)
        if self._one_pool:
            self.guarded.update(new)
        return new

    def _queue_low(self, keys: Keys, layer: int, source: str, priorities: Sequence[float]) -> None:
        """Queue prefetches, or take those up again that were set aside."""
        state, copies, parked, push = self._state, self.copies, self.parked, self.queue.push_low
        for key, priority in zip(keys, priorities, strict=True):
            self._seq += 1
            copy = parked.pop(key, None) if parked else None
            if copy is None:
                copy = Copy(key, layer, self._chunk_bytes[key], self._seq, False, source)
                copies[key] = copy
                state[key] = QUEUED
                self.tally.prefetch_issued += 1
            else:
                copy.seq = self._seq
            copy.priority = priority
            push(copy)

    @property
    def awaits_copies(self) -> bool:
        """Whether the event in progress waits for copies, those of its later waves included."""
        return self._unlanded > 0 or bool(self._pending)

    def cancel(self, key: int) -> bool:
        """Take back a queued prefetch none of whose chunks was handed over; False: too late."""
        copy = self.copies.get(key)
        if copy is None or copy.high or copy.sent:
            return False
        self._drop(copy)
        self.tally.prefetch_cancelled += 1
        return True

    def evict(self, key: int) -> bool:
        """Throw ``key`` out although nobody needs its slot; False: it is not there or has to stay.

        A prefetch that was set aside half copied may go, one with a chunk in flight has to stay.
        """
        half = self.parked.get(key)
        idle = half is not None and half.sent == half.landed
        resident = self._state[key] == RESIDENT and key not in self.memory.staged
        if key in self.pinned or not (resident or idle):
            return False
        self._evict(key)
        return True

    def evict_all(self, keys: Keys) -> None:
        """:meth:`evict` each of ``keys`` that may go."""
        state, staged, pinned = self._state, self.memory.staged, self.pinned
        for key in keys:
            if state[key] == RESIDENT:
                if key not in pinned and key not in staged:
                    self._evict(key)
            elif self.parked:
                self.evict(key)

    def promote(self, key: int) -> bool:
        """Make a queued prefetch HIGH; False: there is none."""
        copy = self.copies.get(key)
        if copy is None or copy.high:
            return False
        self._raise(copy)
        return True

    def promote_all(self, keys: Keys) -> None:
        """:meth:`promote` each of ``keys``, in this order."""
        if self.parked:
            for key in keys:
                self.promote(key)
            return
        copies = [copy for key in keys if (copy := self.copies.get(key)) and not copy.high]
        self.queue.promote_all(copies)

    def reprioritise(self, priorities: Mapping[int, float]) -> None:
        """Change the order of LOW copies."""
        self.queue.reprioritise(priorities)

    def pause_low(self) -> None:
        """Hand over no LOW chunk until :meth:`resume_low`."""
        self.queue.paused = True

    def resume_low(self) -> None:
        """Undo :meth:`pause_low`."""
        self.queue.paused = False

    def bring_in(self, keys: Keys, source: str) -> None:
        """Queue LOW copies for the absent ones of ``keys`` that are no guess about the next event.

        No gate cancels them, and they are not counted as predictions.
        """
        for key in keys:
            if self._state[key] == ABSENT or key in self.parked:
                self._queue_low((key,), self.memory.layer_of[key], source, (0.0,))

    def reassign(self, tokens: dict[int, int]) -> None:
        """A lossy miss rule routes the event anew: assignments of the keys that it chose."""
        self.reassigned = tokens

    def book_gate_mass(self, whole: float, low: float, lost: float) -> None:
        """What a lossy miss rule makes of an event's gate weight: see :class:`Counters`."""
        counters = self.counters
        counters.gate_mass += whole
        counters.low_mass += low
        counters.lost_mass += lost

    # ------------------------------------------------------------------ the link's side

    def next_chunk(self) -> tuple[Copy, int] | None:
        """The chunk to hand to the hardware now and its bytes, or None.

        The expert's slot is taken with its first chunk; that is when a victim leaves.
        """
        queue = self.queue
        if queue.high:
            copy = queue.high[0]
            if copy.sent or self._take_slot(copy):
                copy.sent += 1
                if copy.sent == copy.chunks:
                    queue.high.popleft()
                return copy, copy.chunk_bytes[copy.sent - 1]
            # No slot until a copy in flight lands: others may go first.
            for copy in queue.high:
                if copy.sent or self._take_slot(copy):
                    return self._send(copy)
        if queue.low and not queue.paused:
            return self._next_low()
        return None

    def start_demands(self) -> list[Copy]:
        """All demand copies at once, slots taken in order: for a link with nothing else to do.

        The same decisions as :meth:`next_chunk` makes one by one, since members of the wave are
        pinned whether they have landed or not. :meth:`land_demands` must follow before any other
        event but :meth:`next_chunk`. Nothing may be under way that the wave does not wait for.
        """
        high = self.queue.high
        started = list(high)
        for copy in started:
            if not copy.sent and not self._take_slot(copy):
                raise RuntimeError(f"no slot for {copy} although nothing else is under way")
            copy.sent = copy.chunks
        high.clear()
        return started

    def land_demands(self, copies: Iterable[Copy]) -> None:
        """Everything that :meth:`start_demands` gave has landed, in this order."""
        state, tally, waiting = self._state, self.tally, self.copies
        for copy in copies:
            key = copy.key
            copy.landed = copy.chunks
            state[key] = RESIDENT
            del waiting[key]
            tally.copies += 1
            tally.chunks += copy.chunks
            tally.copied_bytes += self.memory.bytes_of[key]
            if self.log is not None:
                self.log.append(("landed", self.step, self.layer, key, copy.source))
        self._count_unlanded(0)

    def chunk_done(self, copy: Copy) -> bool:
        """A chunk has landed. True: it completes an expert that the event in progress awaits."""
        copy.landed += 1
        if copy.landed < copy.chunks:
            return False
        key = copy.key
        tally = self.tally
        tally.copies += 1
        tally.chunks += copy.chunks
        tally.copied_bytes += self.memory.bytes_of[key]
        self._state[key] = RESIDENT
        del self.copies[key]
        if self.log is not None:
            self.log.append(("landed", self.step, self.layer, key, copy.source))
        if copy.awaited:
            self.landed.append(copy)
            self._unlanded -= 1
            if self._unlanded == 0:
                self._count_unlanded(0)
            return True
        return False

    def _count_unlanded(self, copies: int) -> None:
        """So many copies are still to land for the wave."""
        self._unlanded = copies
        if copies == 0 and not self._pending and self._prefetcher is not None:
            self._prefetcher.on_landed(self.layer)

    # ------------------------------------------------------------------ inside an event

    def _gate_with_misses(
        self, layer: int, keys: Keys, hits: list[int], tokens: Mapping[int, int] | None
    ) -> Wave:
        state = self._state
        counters = self.counters
        misses = [key for key in keys if state[key] == ABSENT]
        late = len(keys) - len(hits) - len(misses)
        counters.misses += len(misses)
        if late:
            copying = sum(1 for key in keys if state[key] == COPYING)
            counters.late_copying += copying
            counters.late_queued += late - copying
        cpu: Keys = _NONE
        if self._has_cpu and (misses or self._takes_late):
            assert self._miss_rule is not None
            offered = misses
            if self._takes_late:
                offered = [key for key in keys if state[key] != RESIDENT]
            cpu = list(self._miss_rule.on_misses(layer, offered, tokens or {}))
            counters.cpu += len(cpu)
            keys = [key for key in keys if key not in cpu]
            misses = [key for key in misses if key not in cpu]
        self._rule.on_event(layer, keys)
        self._refused = (
            set(self._rule.refused(layer, keys, misses))
            if self._rule.may_refuse and misses
            else _NONE
        )
        if self.log is not None:
            self.log.append(("gate", self.step, layer, tuple(keys), tuple(hits)))
        self._pending = self._waves(layer, keys, hits)
        self._hits = set(hits) if len(self._pending) > 1 else None
        return self._begin_wave(self._pending.pop(0), cpu)

    def _ordered(self, keys: Keys) -> list[int]:
        return sorted(keys) if self.options.order == "id" else list(keys)

    def _waves(self, layer: int, keys: Keys, hits: list[int]) -> list[list[int]]:
        """Split an event into waves that fit: residents first, unless the order is strict."""
        units = self.memory.unit_of
        refused = self._refused
        capacity = self.plan.capacity[self.plan.pool_of_layer[layer]]
        slots = self.plan.staging_slots
        # No member is larger than the layer's experts at full precision.
        largest = units[layer * self.shape.experts]
        if self._strict:
            order = self._ordered(keys)
        elif (len(keys) - len(refused)) * largest <= capacity and len(refused) <= slots:
            return [list(keys)]
        else:
            state = self._state
            coming = [key for key in keys if state[key] in (QUEUED, COPYING)]
            if self._resumes:
                coming.sort(key=self._chunks_left)
            order = hits + coming + [key for key in keys if state[key] == ABSENT]
        waves: list[list[int]] = [[]]
        cached = staged = 0
        for key in order:
            goes_to_staging = key in refused
            full = staged == slots if goes_to_staging else cached + units[key] > capacity
            if full:
                waves.append([])
                cached = staged = 0
            if goes_to_staging:
                staged += 1
            else:
                cached += units[key]
            waves[-1].append(key)
        return waves

    def _begin_wave(self, members: list[int], cpu: Keys) -> Wave:
        """Pin the wave's members and queue demand copies for those that are not there.

        Those with fewest chunks left first, unless the order is strict; ties: in touch order.
        """
        self.counters.waves += 1
        self.pinned = set(members)
        self.landed.clear()
        state = self._state
        ready: list[int] = []
        missing: list[int] = []
        for key in members:
            (ready if state[key] == RESIDENT else missing).append(key)
        if self._resumes:
            missing.sort(key=self._chunks_left)
        copies = self.copies
        for key in missing:
            if state[key] == ABSENT:
                self._demand(key)
                continue
            copy = copies[key]
            copy.awaited = True
            if not copy.high:
                self._raise(copy)
        self._count_unlanded(len(missing))
        order = list(members) if self._strict else None
        return Wave(ready, len(missing), cpu, order, not self._pending)

    def _chunks_left(self, key: int) -> int:
        """Chunks of an expert that is not resident which are still to be handed over."""
        copy = self.copies.get(key)
        return self.options.chunks if copy is None else copy.chunks - copy.sent

    def _demand(self, key: int) -> None:
        if self._hits is not None and key in self._hits:
            # Resident when the event began, thrown out by an earlier wave of the same event.
            self.tally.collision_misses += 1
        self._seq += 1
        copy = Copy(key, self.layer, self._chunk_bytes[key], self._seq, True)
        self.copies[key] = copy
        if self._refused:
            copy.staged = key in self._refused
        self._state[key] = QUEUED
        self.queue.high.append(copy)

    def _raise(self, copy: Copy) -> None:
        """LOW, or set aside: HIGH from now on."""
        if self.parked.pop(copy.key, None) is None:
            self.queue.promote(copy)
            return
        copy.high = True
        self.queue.push_high(copy)

    def _route(self, layer: int, keys: Keys) -> Keys:
        assert self._miss_rule is not None
        self.reassigned = None
        routed = self._miss_rule.route(self.step, layer, keys)
        self.counters.asked += len(keys)
        if routed is not keys:
            self.counters.changed += len(set(keys) - set(routed))
        return routed

    def _among(self, asked: Keys, hits: Keys) -> int:
        """How many experts of ``hits``, at any precision, are ``asked`` for."""
        own = self.shape.layers * self.shape.experts
        return len(set(asked).intersection([key % own for key in hits]))

    def _settle_predictions(self, layer: int, keys: Keys) -> None:
        """The truth about ``layer`` is known: score its predictions, drop those that were wrong."""
        predicted = self._predicted[layer]
        if predicted is None:
            return
        tally = self.tally
        tally.predicted += len(predicted)
        tally.predictable += len(keys)
        right = predicted.intersection(keys)
        tally.predicted_right += len(right)
        self._predicted[layer] = None
        guard = self.guard[layer]
        if guard:
            if self._one_pool:
                self.guarded -= guard
            guard.clear()
        if not self.options.preempt or not self.queue.low:
            return
        for copy in self.queue.low_of(layer):
            if copy.key in right or copy.key not in predicted:
                continue
            tally.prefetch_cancelled += 1
            if copy.sent:
                self.queue.remove(copy)
                self.parked[copy.key] = copy
            else:
                self._drop(copy)

    def _count_used(self, keys: Keys) -> None:
        """Prefetched experts are used once an event needs them while they are there or coming."""
        prefetched = self._prefetched
        for key in keys:
            if prefetched.pop(key, None) is not None:
                self.tally.prefetch_used += 1

    # ------------------------------------------------------------------ slots

    def _take_slot(self, copy: Copy) -> bool:
        """Make room for a copy's expert; False: nothing may leave now."""
        memory = self.memory
        key = copy.key
        if copy.staged:
            if memory.staging_free == 0:
                return False
            memory.take_staging(key)
            return True
        pool = memory.pool_of[key]
        units = memory.unit_of[key]
        if memory.free[pool] >= units:
            memory.take(key)
        else:
            barred: Collection[int] = self.pinned
            if not copy.high:
                barred = self._barred_to_low(copy.layer)
            if not self._make_room(key, pool, units, barred):
                return False
        self._rule.on_insert(key)
        if not copy.demand and not copy.awaited:
            self.tally.prefetch_started += 1
            self._prefetched[key] = memory.bytes_of[key]
        return True

    def _barred_to_low(self, layer: int) -> Collection[int]:
        """What a prefetch for ``layer`` must not throw out: the wave, and other prefetches."""
        if self._one_pool:
            return self.pinned | self.guarded
        guard, pool_of = self.guard[layer], self.plan.pool_of_layer
        return self.pinned | guard if pool_of[layer] == pool_of[self.layer] else guard

    def _make_room(self, key: int, pool: int, units: int, barred: Collection[int]) -> bool:
        """Throw out as many residents as ``key`` needs, and give it the place."""
        memory, by_bytes = self.memory, self.plan.by_bytes
        while memory.free[pool] < units:
            victim = self._rule.victim(pool, barred)
            if victim is None:
                victim = self._stalled(pool, barred)
            if victim is None:
                return False
            self._forget(victim)
            if not by_bytes:
                memory.replace(victim, key)
                return True
            memory.release(victim)
        memory.take(key)
        return True

    def _stalled(self, pool: int, barred: Collection[int]) -> int | None:
        """A half-copied prefetch of ``pool`` with no chunk in flight, not needed now."""
        for copy in (*self.parked.values(), *self.queue.low):
            idle = copy.sent and copy.sent == copy.landed
            if idle and copy.key not in barred and self.memory.pool_of[copy.key] == pool:
                return copy.key
        return None

    def _evict(self, key: int) -> None:
        self._forget(key)
        self.memory.release(key)

    def _forget(self, key: int) -> None:
        """Everything that an eviction means beside the slot itself."""
        copy = None if self._state[key] == RESIDENT else self.copies.pop(key)
        if copy is not None:
            self._count_abandoned(copy)
            if self.parked.pop(key, None) is None:
                self.queue.remove(copy)
        self.tally.evictions += 1
        if self._prefetcher is not None:
            self.guard[self.memory.layer_of[key]].discard(key)
            if self._one_pool:
                self.guarded.discard(key)
        if self._prefetched:
            wasted = self._prefetched.pop(key, None)
            if wasted is not None:
                self.tally.wasted_prefetch_bytes += wasted if copy is None else _landed(copy)
        self._rule.on_evict(key)
        if self.log is not None:
            self.log.append(("evict", self.step, self.layer, key))

    def _send(self, copy: Copy) -> tuple[Copy, int]:
        copy.sent += 1
        if copy.sent == copy.chunks:
            self.queue.remove(copy)
        return copy, copy.chunk_bytes[copy.sent - 1]

    def _next_low(self) -> tuple[Copy, int] | None:
        low = self.queue.low
        while low:
            copy = low[0]
            if copy.sent or self._take_slot(copy):
                copy.sent += 1
                if copy.sent == copy.chunks:
                    low.remove(copy)
                return copy, copy.chunk_bytes[copy.sent - 1]
            self._drop(copy)
            self.tally.prefetch_dropped += 1
        return None

    def _drop(self, copy: Copy) -> None:
        """Forget a queued copy that holds no slot."""
        self.queue.remove(copy)
        del self.copies[copy.key]
        self._state[copy.key] = ABSENT
        self._unguard(copy.key, copy.layer)

    def _unguard(self, key: int, layer: int) -> None:
        self.guard[layer].discard(key)
        if self._one_pool:
            self.guarded.discard(key)

    def _adopt(self, layer: int) -> None:
        """Let the cache rule keep staged experts in the place of residents: slots change roles."""
        memory = self.memory
        staged = sorted(memory.staged)
        coming = {key for wave in self._pending for key in wave}
        for newcomer, leaver in self._rule.adopt(layer, staged, coming):
            memory.swap(newcomer, leaver)
            self.tally.evictions += 1
            self._rule.on_evict(leaver)
            self._rule.on_insert(newcomer)
            if self.log is not None:
                self.log.append(("adopt", self.step, layer, newcomer, leaver))

    def _count_abandoned(self, copy: Copy) -> None:
        """Chunks of a copy that never completed went over the link all the same."""
        self.tally.chunks += copy.landed
        self.tally.copied_bytes += _landed(copy)

    def finish(self) -> Tally:
        """The run is over: prefetched experts that nobody used count as wasted."""
        for copy in self.copies.values():
            self._count_abandoned(copy)
        for key, nbytes in self._prefetched.items():
            half = self.copies.get(key)
            self.tally.wasted_prefetch_bytes += nbytes if half is None else _landed(half)
        self._prefetched.clear()
        return self.tally

    def _release_staged(self) -> None:
        for key in sorted(self.memory.staged):
            self.memory.release(key)

    # ------------------------------------------------------------------ warm start, reset

    def _load_warm_set(self) -> None:
        for key in self._rule.warm_set():
            memory = self.memory
            if memory.free[memory.pool_of[key]] < memory.unit_of[key]:
                raise PolicyError(f"the warm set does not fit: key {key} has no slot left")
            memory.take(key)
            memory.state[key] = RESIDENT
            self._rule.on_insert(key)
            self.tally.warm_bytes += memory.bytes_of[key]

    def _reset(self) -> None:
        """Empty the memory between requests. Copies in flight keep their slots and land."""
        for copy in [*self.queue.low]:
            if not copy.sent:
                self._drop(copy)
        for key in [*self.parked]:
            if self.parked[key].sent == self.parked[key].landed:
                self._evict(key)
        for key in self.memory.residents():
            self._evict(key)
        self._rule.reset()
        self._load_warm_set()


def _landed(copy: Copy) -> int:
    """Bytes of a copy that have arrived."""
    return sum(copy.chunk_bytes[: copy.landed])
