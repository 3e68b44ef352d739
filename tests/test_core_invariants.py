"""What must hold for every policy, budget and arrival of copies: properties over random traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import policies
from policies.capacity import plan_memory, smallest_budget, uneven_plan
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import Policy, Shape
from policies.memory import ABSENT, COPYING
from tests.driver import (
    Launch,
    Log,
    Steps,
    Watch,
    make_core,
    policy_data,
    run_burst,
    run_instant,
    run_random,
    shape_of,
    total,
)
from tests.given import LOSSY, ON_CPU, REROUTING, TAKING_LATE, shape_for
from tests.machines import FlatTiming
from tests.made_up import fit_of, signals_of

NAMES = policies.names()
PREFETCHERS = [name for name in NAMES if policies.get(name).prefetches]
EXACT = [name for name in NAMES if name not in PREFETCHERS]
CAUSAL = [name for name in NAMES if not policies.get(name).oracle]
CACHELESS = ["layer-stream", "on-demand", "pregated"]
PER_LAYER = ["belady", "lfru", "lfu", "lfu-decay", "lru", "slru"]

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
THOROUGH = settings(QUICK, max_examples=50)


@dataclass(frozen=True)
class Case:
    """A policy on a random trace under a random budget; `seed` decides arrivals."""

    name: str
    shape: Shape
    steps: Steps
    lookahead: dict[str, Steps]
    popularity: Any
    budget: int
    given: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    window: int = 2

    def core(self, log: Log | None = None) -> DecisionCore:
        data = policy_data(
            self.shape,
            self.steps,
            lookahead=self.lookahead,
            popularity=self.popularity,
            signals=signals_of(self.shape, self.steps, self.seed),
            fit=fit_of(self.shape, self.seed),
            costs=FlatTiming(),
            seed=self.seed,
        )
        return make_core(self.name, data, budget=self.budget, log=log, **self.given)

    @property
    def requests(self) -> list[int]:
        """The request of each step: four steps each."""
        return [step // 4 for step in range(len(self.steps))]

    def instant(self, core: DecisionCore, watch: Watch | None = None) -> list[Launch]:
        return run_instant(core, self.steps, watch=watch, requests=self.requests)

    def burst(self, core: DecisionCore, watch: Watch | None = None) -> list[Launch]:
        return run_burst(core, self.steps, watch=watch, requests=self.requests)

    def random(self, core: DecisionCore, watch: Watch | None = None) -> list[Launch]:
        rng = random.Random(self.seed)
        return run_random(
            core, self.steps, rng, window=self.window, watch=watch, requests=self.requests
        )


DRIVERS = [Case.instant, Case.random]
drivers = pytest.mark.parametrize("run", DRIVERS, ids=["instant", "random"])
Run = Callable[..., list[Launch]]


def draw_steps(rng: random.Random, shape: Shape, largest: int) -> Steps:
    """12 steps of events of at most `largest` experts, some of them popular; some do not run."""
    popularity = [[rng.random() ** 3 + 0.01 for _ in range(shape.experts)]] * shape.layers

    def event(layer: int) -> list[int]:
        ranked = sorted(
            range(shape.experts), key=lambda expert: rng.expovariate(popularity[layer][expert])
        )
        size = rng.randint(0, largest)
        return [layer * shape.experts + expert for expert in ranked[:size]]

    return [[event(layer) for layer in range(shape.layers)] for _ in range(12)]


def draw_lookahead(rng: random.Random, shape: Shape, distance: int) -> Steps:
    """Predictions of up to four experts; the last layers have nothing to predict."""
    last = shape.layers - distance
    return [
        [keys if layer < last else [] for layer, keys in enumerate(step)]
        for step in draw_steps(rng, shape, min(4, shape.experts))
    ]


def draw_case(name: str, seed: int, *, one_size: bool = False, largest: int | None = None) -> Case:
    """A case of policy `name`: 2-3 layers, 2-8 experts, 12 steps, any budget that can run it."""
    rng = random.Random(seed)
    layers, experts = rng.randint(2, 3), rng.randint(2, 8)
    sizes = tuple(12 if one_size else rng.choice([12, 24, 36]) for _ in range(layers))
    shape = shape_for(name, shape_of(layers, experts, 2, sizes))
    policy = _at_defaults(name, shape)
    staging = 0 if policy.scope == "staging" else 1
    least = smallest_budget(shape, policy.scope, staging, policy.least_slots)
    everything = sum(sizes) * experts
    return Case(
        name=name,
        shape=shape,
        steps=draw_steps(rng, shape, min(largest or experts, experts)),
        lookahead={
            f"{kind}_{distance}": draw_lookahead(rng, shape, distance)
            for kind in ("lookahead", "learned")
            for distance in (1, 2)
        },
        popularity=[[rng.randint(0, 9) for _ in range(experts)] for _ in range(layers)],
        budget=everything if name == "resident" else least + rng.randint(0, everything),
        given=_draw_options(name, rng, layers),
        seed=rng.randrange(1 << 30),
        window=rng.randint(1, 3),
    )


def _at_defaults(name: str, shape: Shape) -> Policy:
    """A policy at its defaults, whose scope needs no less than its other scopes."""
    steps = [[[0]] + [[]] * (shape.layers - 1)]
    data = policy_data(
        shape,
        steps,
        lookahead=dict.fromkeys(("lookahead_1", "lookahead_2", "learned_2"), steps),
        popularity=[[1] * shape.experts] * shape.layers,
        signals=signals_of(shape, steps),
        fit=fit_of(shape),
        costs=FlatTiming(),
    )
    info = policies.get(name)
    return info.build(info.parse({})[0], data)


def _draw_options(name: str, rng: random.Random, layers: int) -> dict[str, Any]:
    given: dict[str, Any] = {
        "order": rng.choice(["cached-first", "touch", "id"]),
        "chunks": rng.choice([1, 2, 3, 4]),
        "preempt": rng.random() < 0.7,
        "reset": rng.random() < 0.3,
    }
    params = policies.get(name).params
    if "cache" in params:
        given["cache"] = rng.choice(params["cache"].allowed)
    if "depth" in params:
        given["depth"] = rng.randint(1, layers - 1)
    if "stride" in params:
        given["stride"] = rng.randint(1, layers - 1)
    if name in ("oracle-prefetch", "accuracy-q"):
        given["wrap"] = rng.random() < 0.5
    return given


seeds = st.integers(0, 2**32 - 1)
every_policy = pytest.mark.parametrize("name", NAMES)


class Watchman:
    """Checks the memory after every command."""

    def __init__(self, core: DecisionCore) -> None:
        self.read = 0
        self.budget = core.plan.used_bytes

    def __call__(self, core: DecisionCore) -> None:
        memory, plan = core.memory, core.plan
        assert memory.occupied_bytes() <= self.budget
        assert min(memory.free) >= 0
        assert memory.staging_free == plan.staging_slots - len(memory.staged)
        held = [key for key, state in enumerate(memory.state) if state >= COPYING]
        used = [0] * len(plan.capacity)
        for key in held:
            if key not in memory.staged:
                used[memory.pool_of[key]] += memory.unit_of[key]
        assert [a - b for a, b in zip(plan.capacity, used, strict=True)] == memory.free
        if not plan.by_bytes:
            assert sorted(memory.slot_of) == held
            assert len(set(memory.slot_of.values())) == len(held)
        self._victims(core)

    def _victims(self, core: DecisionCore) -> None:
        """Nobody who left belongs to the wave in progress."""
        assert core.log is not None
        for kind, _, _, key, *_ in core.log[self.read :]:
            assert kind != "evict" or key not in core.pinned
        self.read = len(core.log)


@every_policy
@drivers
@given(seed=seeds)
@QUICK
def test_memory_never_holds_more_than_planned_nor_loses_a_member_of_the_wave(name, run, seed):
    case = draw_case(name, seed)
    core = case.core([])
    assert core.plan.used_bytes <= case.budget
    run(case, core, Watchman(core))


class PredictionWatch:
    """What is predicted for each layer until its gate, told apart from the core's own account.

    A prediction counts as long as its expert is there or on its way, and only as many of a layer as
    its pool can hold.
    """

    def __init__(self, core: DecisionCore) -> None:
        self._core = core
        self._predicted: list[list[int]] = [[] for _ in range(core.shape.layers)]
        self._prefetch, self._gate, self._take = core.prefetch, core.gate, core._take_slot
        core.prefetch, core.gate, core._take_slot = self.prefetch, self.gate, self.take
        self.thrown_out = 0

    def prefetch(self, layer: int, keys: Any, *rest: Any, **named: Any) -> None:
        if not keys:
            self._prefetch(layer, keys, *rest, **named)
            return
        self._forget_absent()
        plan = self._core.plan
        room = plan.capacity[plan.pool_of_layer[layer]] // self._core.memory.unit_of[keys[0]]
        known = self._predicted[layer]
        new = [key for key in keys if key not in known]
        known += new[: max(room - len(known), 0)]
        self._prefetch(layer, keys, *rest, **named)

    def gate(self, layer: int, *rest: Any) -> Any:
        self._predicted[layer] = []
        return self._gate(layer, *rest)

    def take(self, copy: Any) -> bool:
        core = self._core
        assert core.log is not None
        self._forget_absent()
        alone = len(core.plan.capacity) == 1
        layers = self._predicted if alone else [self._predicted[copy.layer]]
        safe = {key for keys in layers for key in keys}
        high, seen = copy.high, len(core.log)
        done = self._take(copy)
        left = [entry[3] for entry in core.log[seen:] if entry[0] == "evict"]
        for keys in self._predicted:
            keys[:] = [key for key in keys if key not in left]
        if not high:
            self.thrown_out += len(left)
            assert safe.isdisjoint(left)
        return bool(done)

    def _forget_absent(self) -> None:
        state = self._core.memory.state
        for keys in self._predicted:
            keys[:] = [key for key in keys if state[key] != ABSENT]


def _prefetch_run(name: str, seed: int) -> PredictionWatch:
    case = draw_case(name, seed, one_size=True)
    case = replace(case, given={**case.given, "reset": False})
    core = case.core([])
    watch = PredictionWatch(core)
    case.random(core)
    return watch


@pytest.mark.parametrize("name", PREFETCHERS)
@given(seed=seeds)
@QUICK
def test_a_prefetch_never_throws_out_what_is_predicted_for_its_layer(name, seed):
    _prefetch_run(name, seed)


@pytest.mark.parametrize("name", ["next-gate", "oracle-prefetch", "promoe"])
def test_prefetches_do_throw_others_out_in_these_cases(name):
    assert sum(_prefetch_run(name, seed).thrown_out for seed in range(30)) > 30


NUMBERS = [
    (name, parameter)
    for name in NAMES
    for parameter, traits in policies.get(name).params.items()
    if traits.kind in (int, float)
]


@pytest.mark.parametrize(("name", "parameter"), NUMBERS)
def test_no_number_that_a_parameter_takes_breaks_its_policy(name, parameter):
    """The largest and the smallest; a fault would be any error that names no remedy."""
    info = policies.get(name)
    traits = info.params[parameter]
    huge = 10**15 if traits.kind is int else 1e308
    for value in (huge, -huge):
        bound = traits.high if value > 0 else traits.low
        if bound is not None:
            with pytest.raises(PolicyError, match=f"{parameter}=.* is (above|below)"):
                info.parse({parameter: value})
            value = traits.kind(bound)
        case = draw_case(name, 5)
        case = replace(case, given={**case.given, parameter: value})
        try:
            core = case.core()
        except PolicyError:
            continue  # refused beside the trace's columns, or for lack of slots
        case.instant(core)
        assert total(core, "events") > 0


@every_policy
@drivers
@given(seed=seeds)
@QUICK
def test_counts_and_bytes_add_up(name, run, seed):
    case = draw_case(name, seed, one_size=True)
    log: Log = []
    core = case.core(log)
    run(case, core)
    tally = core.tally
    needed = sum(len(keys) for step in case.steps for keys in step)
    assert total(core, "asked" if name in LOSSY else "accesses") == needed
    for bucket in tally.buckets.values():
        assert bucket.accesses == bucket.hits + bucket.late + bucket.misses
        offered = bucket.misses + (bucket.late if name in TAKING_LATE else 0)
        assert bucket.cpu <= (offered if name in ON_CPU else 0)
        if name in LOSSY:
            assert bucket.asked - bucket.accesses <= bucket.changed <= bucket.asked
            assert bucket.low_mass + bucket.lost_mass <= bucket.gate_mass
            unchanged = bucket.asked - bucket.changed
            stand_ins = bucket.accesses - unchanged
            assert bucket.hits - stand_ins <= bucket.asked_hits <= min(bucket.hits, bucket.asked)
            continue
        assert bucket.asked == bucket.asked_hits == bucket.changed == bucket.gate_mass == 0
        assert bucket.hit_bytes == 12 * bucket.hits
    if core.shape.precisions == 1:
        assert tally.copied_bytes == tally.chunks * 12 // core.options.chunks
    kinds = Counter(entry[0] for entry in log)
    assert kinds["landed"] == tally.copies
    assert kinds["evict"] + kinds["adopt"] == tally.evictions
    assert total(core, "events") == kinds["gate"]
    assert tally.prefetch_started <= tally.prefetch_issued
    assert tally.prefetch_used <= tally.prefetch_started
    assert tally.predicted_right <= min(tally.predicted, tally.predictable)
    assert tally.chunks >= tally.copies * core.options.chunks


@pytest.mark.parametrize("name", PREFETCHERS)
@drivers
@given(seed=seeds)
@QUICK
def test_a_prefetch_that_no_event_used_before_it_left_is_wasted(name, run, seed):
    case = draw_case(name, seed, one_size=True)
    case = replace(case, given={**case.given, "chunks": 1})
    log: Log = []
    core = case.core(log)
    run(case, core)
    assert core.tally.wasted_prefetch_bytes == 12 * unused_prefetches(log)


def unused_prefetches(log: Log) -> int:
    """Prefetched experts that landed but left, or saw the end, before any event needed them."""
    waiting: set[int] = set()
    wasted = 0
    now, needed = None, ()
    for kind, step, layer, *rest in log:
        if kind == "gate":
            now, needed = (step, layer), rest[0]
            waiting.difference_update(needed)
        elif kind == "landed" and rest[1] != "demand":
            if now != (step, layer) or rest[0] not in needed:
                waiting.add(rest[0])
        elif kind == "evict" and rest[0] in waiting:
            waiting.remove(rest[0])
            wasted += 1
    return wasted + len(waiting)


@every_policy
@drivers
@given(seed=seeds)
@QUICK
def test_every_expert_is_executed_once_for_its_event(name, run, seed):
    case = draw_case(name, seed)
    executed: dict[tuple[int, int], list[int]] = {}
    own = case.shape.layers * case.shape.experts
    for launch in run(case, case.core()):
        # At whichever precision.
        keys = [key % own for key in launch.keys]
        executed.setdefault((launch.step, launch.layer), []).extend(keys)
    needed = {
        (step, layer): sorted(keys)
        for step, events in enumerate(case.steps)
        for layer, keys in enumerate(events)
        if keys
    }
    if name not in LOSSY:
        assert {event: sorted(keys) for event, keys in executed.items()} == needed
        return
    assert executed.keys() == needed.keys()
    for event, keys in executed.items():
        assert len(set(keys)) == len(keys)
        assert {case.shape.layer_of(key) for key in keys} <= {event[1]}
        assert name in REROUTING or set(keys) <= set(needed[event])


@every_policy
@given(seed=seeds)
@QUICK
def test_what_came_stayed_or_left(name, seed):
    """With copies that take no time: landed + warm = evicted + dropped from staging + resident."""
    case = draw_case(name, seed, one_size=True)
    log: Log = []
    core = case.core(log)
    staged: set[tuple[int, int, int]] = set()

    def watch(core: DecisionCore) -> None:
        staged.update((core.step, core.layer, key) for key in core.memory.staged)

    case.instant(core, watch)
    swaps = Counter(entry[0] for entry in log)["adopt"]
    dropped = len(staged) - swaps
    left = core.tally.evictions + dropped
    assert core.tally.copies + core.tally.warm_bytes // 12 == left + len(core.memory.residents())


@every_policy
@drivers
@given(seed=seeds)
@QUICK
def test_same_inputs_same_log(name, run, seed):
    case = draw_case(name, seed)
    logs: list[Log] = [[], []]
    for log in logs:
        run(case, case.core(log))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", EXACT)
@given(seed=seeds)
@QUICK
def test_without_prefetching_decisions_do_not_depend_on_when_copies_land(name, seed):
    case = draw_case(name, seed)
    decisions = []
    for run in (Case.instant, Case.random, Case.burst):
        log: Log = []
        core = case.core(log)
        launches = run(case, core, Watchman(core))
        decided = [entry for entry in log if entry[0] != "landed"]
        arrived = [entry for entry in log if entry[0] == "landed"]
        decisions.append((decided, arrived, launches, core.tally))
    assert decisions[0] == decisions[1] == decisions[2]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {*CACHELESS, *LOSSY}))
@drivers
@given(seed=seeds)
@QUICK
def test_with_room_for_all_nobody_leaves_and_each_comes_once(name, run, seed):
    case = draw_case(name, seed)
    shape = case.shape
    everything = sum(shape.bytes_by_layer) * shape.experts
    case = replace(
        case,
        budget=everything + 2 * max(shape.bytes_by_layer),
        given={**case.given, "reset": False},
    )
    log: Log = []
    core = case.core(log)
    run(case, core)
    assert core.tally.evictions == 0
    came = Counter(entry[3] for entry in log if entry[0] == "landed")
    assert max(came.values(), default=1) == 1
    assert core.memory.occupied_bytes() <= everything


# ---------------------------------------------------------------------- bounds


@given(
    seed=seeds,
    slots=st.integers(1, 4),
    staging=st.integers(1, 3),
    order=st.sampled_from(["cached-first", "touch", "id"]),
)
@THOROUGH
def test_belady_with_bypass_bounds_every_cache_of_its_scope_and_slots(seed, slots, staging, order):
    case = draw_case("lru", seed, one_size=True)
    shape = case.shape
    plan = uneven_plan(shape, (min(slots, shape.experts),) * shape.layers, staging)
    data = policy_data(shape, case.steps, popularity=case.popularity)

    def hits(name: str, order: str) -> int:
        core = make_core(name, data, plan=plan, order=order)
        run_instant(core, case.steps)
        return total(core, "hits")

    bound = hits("belady-bypass", "cached-first")
    found = {name: hits(name, order) for name in PER_LAYER}
    assert max(found.values()) <= bound
    # The warm set is a head start: each of its members may save one miss.
    assert hits("static", order) <= bound + sum(plan.capacity)


@given(seed=seeds)
@THOROUGH
def test_forced_belady_in_one_pool_bounds_its_kind_where_events_fit(seed):
    case = draw_case("lru-global", seed, one_size=True, largest=2)
    plan = plan_memory(case.shape, "global", max(case.budget, 24))
    data = policy_data(case.shape, case.steps)
    hits = {}
    for name in ("belady-global", "lru-global", "least-stale"):
        core = make_core(name, data, plan=plan)
        run_instant(core, case.steps)
        hits[name] = total(core, "hits")
    assert max(hits.values()) == hits["belady-global"]


@pytest.mark.parametrize("cache", ["lru", "belady"])
@given(seed=seeds)
@QUICK
def test_instant_oracle_prefetch_misses_only_what_does_not_fit(cache, seed):
    """One event ahead nothing else needs the layer's slots: an event that fits is there."""
    case = draw_case("oracle-prefetch", seed, one_size=True)
    case = replace(case, given={"cache": cache, "depth": 1, "wrap": True})
    first_expert = [[layer * case.shape.experts] for layer in range(case.shape.layers)]
    steps = [
        [keys or stand_in for keys, stand_in in zip(step, first_expert, strict=True)]
        for step in case.steps
    ]
    case = replace(case, steps=steps)
    log: Log = []
    core = case.core(log)
    case.instant(core)
    slots = core.plan.capacity[0]
    for kind, _, _, keys, *rest in log:
        if kind == "gate" and len(keys) <= slots:
            assert len(rest[0]) == len(keys)


# ---------------------------------------------------------------------- no future


@pytest.mark.parametrize("name", CAUSAL)
@drivers
@given(seed=seeds, until=st.integers(0, 11))
@QUICK
def test_a_causal_policy_decides_without_what_comes_later(name, run, seed, until):
    case = draw_case(name, seed)
    rng = random.Random(seed + 1)

    def spliced(old: Steps, new: Steps) -> Steps:
        return [*old[: until + 1], *new[until + 1 :]]

    other = replace(
        case,
        steps=spliced(case.steps, draw_steps(rng, case.shape, case.shape.experts)),
        lookahead={
            name: spliced(steps, draw_lookahead(rng, case.shape, int(name[-1])))
            for name, steps in case.lookahead.items()
        },
    )
    logs = []
    for each in (case, other):
        log: Log = []
        run(each, each.core(log))
        logs.append([entry for entry in log if entry[1] <= until])
    assert logs[0] == logs[1]
