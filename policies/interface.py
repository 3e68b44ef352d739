"""What a policy is made of, and what it may ask of the core.

A policy is a composition: a cache rule, perhaps a prefetcher, a miss rule, and an execution order
(a common option). Every part is a pure state machine: no clock, no SimPy, no torch. A part that
wants time asks ``core.clock_ns`` and its policy declares ``time_dependent``.

Experts are named by **key**: ``(precision * layers + layer) * E + expert`` with precision 0 the
checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from policies.core import DecisionCore

Keys = Sequence[int]


@dataclass(frozen=True)
class Shape:
    """Sizes that every part needs: MoE layers, experts a layer, top-k, an expert's bytes by layer.

    ``low_bytes_by_layer``: bytes of the low-bit copy of an expert for lossy mixed-precision
    policies; empty where experts exist at one precision only.
    """

    layers: int
    experts: int
    top_k: int
    bytes_by_layer: tuple[int, ...]
    low_bytes_by_layer: tuple[int, ...] = ()

    @property
    def precisions(self) -> int:
        """How many precisions an expert exists in."""
        return 2 if self.low_bytes_by_layer else 1

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.precisions * self.layers * self.experts

    def layer_of(self, key: int) -> int:
        """MoE layer of a key."""
        return key // self.experts % self.layers

    def assignments(self, keys: Keys, counts: Sequence[int]) -> dict[int, int]:
        """Tokens assigned to each of ``keys``, and as many to its low-bit copy where there is one.

        ``keys`` name the checkpoint's own precision.
        """
        tokens = dict(zip(keys, counts, strict=True))
        if self.precisions > 1:
            shift = self.layers * self.experts
            tokens |= {key + shift: count for key, count in tokens.items()}
        return tokens

    def bytes_of(self, key: int) -> int:
        """Bytes of one expert at the key's precision."""
        high = key < self.layers * self.experts
        return (self.bytes_by_layer if high else self.low_bytes_by_layer)[self.layer_of(key)]


class CacheRule:
    """Decides which resident expert leaves when a slot is needed, and who may enter.

    The core calls :meth:`on_event` once an event (after classification, before any copy), the
    others as slots change hands. ``state`` is the core's list of key states, for skipping keys
    that are not resident.
    """

    #: refuses admission of some misses; the core then needs staging slots
    may_refuse = False
    #: how hits grow with slots: by ``reuse`` distance, or by ``popularity`` where nobody moves
    hit_curve = "reuse"

    def bind(self, core: DecisionCore) -> None:
        """Called once, before the first event, with the core's memory in place."""
        self.core = core
        self.state = core.memory.state

    def on_step(self, step: int) -> None:
        """A forward step begins."""

    def on_event(self, layer: int, keys: Keys) -> None:
        """The step needs ``keys`` of ``layer``, in touch order."""

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot: its first chunk starts to copy."""

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""

    def on_predicted(self, keys: Keys) -> None:
        """A prefetcher named these resident experts; recency rules may touch them."""

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident key of ``pool``, not in ``barred``, that should leave; None: no such key."""
        raise NotImplementedError

    def refused(self, layer: int, keys: Keys, misses: Keys) -> Collection[int]:
        """Those of ``misses`` that may not enter the cache: they go through staging slots."""
        return ()

    def adopt(self, layer: int, staged: Keys, coming: Collection[int]) -> Iterable[tuple[int, int]]:
        """(staged key, resident key) pairs to swap once a wave is computed: no copy is needed.

        ``coming``: members of the event's later waves, which must stay.
        """
        return ()

    def warm_set(self) -> Keys:
        """Keys resident before the clock starts."""
        return ()

    def reset(self) -> None:
        """Forget what was learned from earlier requests (option ``reset``); slots are empty now."""

    def worth(self, fit: Recorded, shape: Shape) -> Any:
        """What 0 to E slots of each layer bring on requests set aside, int [layers, E + 1].

        None: hits, counted as ``hit_curve`` says.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """What the rule chose by itself, for the result; JSON-ready."""
        return {}


@dataclass(frozen=True)
class Prediction:
    """A prefetcher's guess: ``keys`` of ``layer`` (best first) will be needed.

    ``source`` names the predictor; the driver delays ``prediction_ready`` by that predictor's
    measured cost, so what is predicted and how long it takes stay apart. ``scores`` may be empty.
    ``step`` is the step it is about. ``work``: how many times the predictor's usual work it takes.
    """

    source: str
    step: int
    layer: int
    keys: Keys
    scores: Sequence[float] = ()
    work: float = field(default=1.0, kw_only=True)

    def cost_ns(self, usual_ns: int) -> int:
        """Time from the predictor's start, where its usual work takes ``usual_ns``."""
        return usual_ns if self.work == 1 else round(usual_ns * self.work)


class Prefetcher:
    """Turns predictions into copies at LOW priority."""

    def bind(self, core: DecisionCore) -> None:
        """Called once, before the first event."""
        self.core = core

    def on_step(self, step: int) -> Iterable[Prediction]:
        """Predictions that can be made when a step begins."""
        return ()

    def on_gate(self, step: int, layer: int, keys: Keys) -> Iterable[Prediction]:
        """Predictions that can be made once the gate of ``layer`` is known."""
        return ()

    def on_ready(self, prediction: Prediction) -> None:
        """A prediction has been computed: queue what it calls for."""
        self.core.prefetch(prediction.layer, prediction.keys, prediction.scores, prediction.source)

    def on_landed(self, layer: int) -> None:
        """The last copy that the event of ``layer`` waited for has landed.

        Called for events that wait (``core.awaits_copies``), before the link is refilled. A place
        for :meth:`DecisionCore.resume_low`; new prefetches belong to the other calls.
        """

    def on_step_end(self, step: int) -> None:
        """A step is over."""

    def on_request_end(self, request: int) -> None:
        """The last step of ``request`` is over."""


class MissRule:
    """What happens to the experts that an event needs and that are not resident.

    :meth:`route` may change the routing itself (lossy policies); :meth:`on_misses` says which of
    the missing experts the CPU computes instead of copying them.
    """

    #: changes which experts are computed
    lossy = False
    #: :meth:`on_misses` is also asked about experts that are queued or under way; what the CPU
    #: takes of those is not waited for, and its copy goes on as any prefetch
    takes_late = False
    #: False: :meth:`on_misses` leaves nothing to the CPU, as it was set up
    uses_cpu = True

    def bind(self, core: DecisionCore) -> None:
        """Called once, before the first event."""
        self.core = core

    def route(self, step: int, layer: int, keys: Keys) -> Keys:
        """The experts to execute instead of ``keys``: substituted, masked, or as they are."""
        return keys

    def on_misses(self, layer: int, misses: Keys, tokens: Mapping[int, int]) -> Collection[int]:
        """Those of ``misses`` to run on the CPU. ``tokens``: assignments of each key."""
        return ()

    def routed_rows(self) -> tuple[Any, Any] | None:
        """Ids and weights [rows, k] to compute the event just routed with, for live runs.

        None: the gate's own, as far as their experts are executed.
        """
        return None


class EventTable(Protocol):
    """Keys of every event: what :class:`tracer.workload.Ragged` offers."""

    @property
    def keys(self) -> Any:
        """Keys of all events, concatenated."""
        ...

    @property
    def offsets(self) -> Any:
        """Where each event's keys begin and, last, where they end: int [events + 1]."""
        ...

    @property
    def layers(self) -> int:
        """Events a step."""
        ...

    def step(self, step: int) -> list[list[int]]:
        """Keys of each layer's event in a step."""
        ...

    def with_entries(self, keys: Any, offsets: Any) -> EventTable:
        """Other entries for the same events."""
        ...

    def __len__(self) -> int: ...


class Signals(Protocol):
    """What the model says of the step in progress, beside the expert ids.

    The driver serves it: from a trace, or live from the GPU. The core moves it on, and it refuses
    to show a gate that has not run yet, so no policy can look ahead by mistake.
    """

    def begin_step(self, step: int) -> None:
        """A forward step begins (called by the core)."""
        ...

    def reach(self, layer: int) -> None:
        """The gate of ``layer`` has run (called by the core)."""
        ...

    def layer_rows(self, name: str, layer: int) -> Any:
        """A column by layer, such as ``gate_probs``: array [rows, ...], a row a token of the step.

        Raises LookupError for a gate that has not run.
        """
        ...

    def step_rows(self, name: str) -> Any:
        """A column known when the step begins, such as ``embedding``: array [rows, ...]."""
        ...


class Recorded(Protocol):
    """Steps known as a whole, such as those of the requests set aside for fitting.

    ``events``: what each (step, layer) needed. ``column(name)``: array [rows, ...]; by row
    ``step_of_row`` (from 0, int [rows]) and ``request_of_row``.
    """

    @property
    def events(self) -> EventTable: ...

    @property
    def step_of_row(self) -> Any: ...

    @property
    def request_of_row(self) -> Any: ...

    @property
    def phase_of_row(self) -> Any: ...

    def column(self, name: str) -> Any:
        """Array [rows, ...] of a column that the policy declared."""
        ...


class Costs(Protocol):
    """The machine's measured costs, for policies that weigh one way against another, ns.

    A policy that asks declares ``reads_costs``: its decisions differ from machine to machine.
    """

    def copy_ns(self, nbytes: int) -> int:
        """A copy of ``nbytes`` on an idle link, issue included."""
        ...

    def gpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """One launch over ``experts`` distinct experts and their token assignments."""
        ...

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """The same on the CPU workers, activations over and back included."""
        ...

    @property
    def cpu_slowdown_ppm(self) -> int:
        """By how many millionths the CPU workers take longer beside copies."""
        ...

    @property
    def link_slowdown_cpu_ppm(self) -> int:
        """By how many millionths copies take longer beside the CPU workers."""
        ...


@dataclass(frozen=True)
class PolicyData:
    """What a policy may know beyond the events it is fed. Absent inputs are None.

    ``lookahead(name, width)``: recorded predictions as an :class:`EventTable`, see
    :meth:`tracer.workload.Workload.predictions`. ``popularity``: int [layers, E], counted on other
    requests than those judged. ``events``, ``next_use``, ``first_use``: the future, given to
    declared oracles only. ``columns``: names of the trace's columns.

    ``signals``: the step in progress. ``fit``: the requests set aside, for fitted policies.
    ``recording``: the judged requests as recorded, for policies that declare ``in_blocks``: they
    work predictions out for many steps at once, each from what is known when it is made. None in
    live runs, where the same predictions are made one by one.
    ``costs``: the machine's, for policies that declare ``reads_costs``. ``expert_norms``: weight
    norms [layers][E] where the trace has them.
    """

    shape: Shape
    lookahead: Callable[[str, int], EventTable] | None = None
    columns: frozenset[str] = frozenset()
    popularity: Any = None
    events: EventTable | None = None
    next_use: Any = None
    first_use: Any = None
    seed: int = 0
    signals: Signals | None = None
    fit: Recorded | None = None
    recording: Recorded | None = None
    costs: Costs | None = None
    expert_norms: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class Policy:
    """A composition, ready to be bound to a core."""

    cache: CacheRule
    prefetcher: Prefetcher | None = None
    miss_rule: MissRule | None = None
    scope: str = "layer"
    #: slots given to the cache beyond staging; on-demand has none
    staging_only: bool = False
    #: what the user should know of this composition, such as an input replaced by a poorer one
    notes: tuple[str, ...] = ()
    #: slots of a layer (scope ``layer``) below which it cannot run
    least_slots: int = 1


@dataclass(frozen=True)
class Options:
    """Options common to all policies (see ``policies/registry.py`` for their help).

    ``order``: execution order inside an event. ``chunks``: pieces an expert is copied in.
    ``staging_slots``: slots for experts refused admission, None: as many as top-k where needed.
    ``preempt``: at a gate, cancel that layer's queued prefetches which turned out wrong.
    ``reset``: empty the cache at every request. ``slots``: how a budget is spread over layers that
    have slots of their own (:mod:`policies.slots`).
    """

    order: str = "cached-first"
    chunks: int = 1
    staging_slots: int | None = None
    preempt: bool = True
    reset: bool = False
    slots: str = "even"


@dataclass
class Counters:
    """Counts of one phase and stage; see design's metrics.

    Of lossy policies: ``asked``, experts the gate asked for; of them ``asked_hits`` were there,
    at the precision that was computed, and ``changed`` were replaced or left out; ``gate_mass``,
    the gates' weight in the unit of the policy's choice, and of it ``low_mass``, computed at low
    precision, and ``lost_mass``, not computed at all.
    """

    accesses: int = 0
    hits: int = 0
    late_copying: int = 0
    late_queued: int = 0
    misses: int = 0
    hit_bytes: int = 0
    cpu: int = 0
    asked: int = 0
    asked_hits: int = 0
    changed: int = 0
    gate_mass: float = 0.0
    low_mass: float = 0.0
    lost_mass: float = 0.0
    waves: int = 0
    events: int = 0

    @property
    def late(self) -> int:
        """Accesses to experts in flight or queued when the gate was known."""
        return self.late_copying + self.late_queued


@dataclass
class Tally:
    """Counters by (phase, stage) and the totals of a run's transfers."""

    buckets: dict[tuple[str, str], Counters] = field(default_factory=dict)
    evictions: int = 0
    collision_misses: int = 0
    prefetch_issued: int = 0
    prefetch_started: int = 0
    prefetch_used: int = 0
    prefetch_cancelled: int = 0
    prefetch_dropped: int = 0
    copies: int = 0
    chunks: int = 0
    copied_bytes: int = 0
    wasted_prefetch_bytes: int = 0
    warm_bytes: int = 0
    predicted: int = 0
    predicted_right: int = 0
    predictable: int = 0
