"""The decision core's commands, driven by hand and by little policies made for the test."""

from __future__ import annotations

import tracemalloc

import pytest

import policies
from policies.capacity import MemoryPlan, plan_memory, uneven_plan
from policies.core import DecisionCore, Wave
from policies.errors import PolicyError
from policies.interface import MissRule, Options, Policy, Prediction, Prefetcher, Shape
from policies.lru import Lru
from policies.memory import ABSENT, COPYING, QUEUED, RESIDENT
from policies.transfers import Copy
from tests.driver import (
    EXPERT_BYTES,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    told,
    total,
)

# Three layers of four experts: keys 0-3, 4-7, 8-11.
SHAPE = shape_of(3, 4)


class Idle(Prefetcher):
    """Predicts nothing; the test gives the commands."""


def lru_core(
    *,
    shape: Shape = SHAPE,
    slots: int = 2,
    scope: str = "layer",
    plan: MemoryPlan | None = None,
    prefetcher: Prefetcher | None = None,
    miss_rule: MissRule | None = None,
    log: Log | None = None,
    **options,
) -> DecisionCore:
    """LRU with `slots` of the largest experts (a layer, or in all)."""
    if plan is None:
        pools = shape.layers if scope == "layer" else 1
        plan = plan_memory(shape, scope, slots * pools * max(shape.bytes_by_layer))
    policy = Policy(Lru(), prefetcher or Idle(), miss_rule, scope)
    return DecisionCore(shape, plan, policy, Options(**options), log=log)


def hand_over(core: DecisionCore) -> tuple[Copy, int]:
    """Hand one chunk over; its copy and bytes."""
    handed = core.next_chunk()
    assert handed is not None
    return handed


def send(core: DecisionCore) -> Copy:
    """Hand one chunk over."""
    return hand_over(core)[0]


def land_all(core: DecisionCore) -> list[int]:
    """Hand over and land everything; the keys of the chunks in order."""
    order = []
    while (handed := core.next_chunk()) is not None:
        order.append(handed[0].key)
        core.chunk_done(handed[0])
    return order


def run_event(core: DecisionCore, layer: int, keys: list[int]) -> Wave:
    """Gate, copies, and execution of an event that fits in one wave."""
    wave = core.gate(layer, keys)
    land_all(core)
    assert wave.last
    core.experts_done(layer)
    return wave


# ---------------------------------------------------------------------- chunks


def test_an_expert_is_there_only_with_its_last_chunk():
    core = lru_core(chunks=3, shape=shape_of(3, 4, 2, 11))
    core.step_begin(0, "decode")
    wave = core.gate(0, [0, 1])
    assert (list(wave.ready), wave.waiting) == ([], 2)
    handed = [hand_over(core) for _ in range(6)]
    assert [(copy.key, size) for copy, size in handed] == [
        (0, 4),
        (0, 4),
        (0, 3),
        (1, 4),
        (1, 4),
        (1, 3),
    ]
    assert core.next_chunk() is None
    assert [core.chunk_done(copy) for copy, _ in handed] == [False, False, True, False, False, True]
    assert [copy.key for copy in core.landed] == [0, 1]
    assert (core.tally.copies, core.tally.chunks, core.tally.copied_bytes) == (2, 6, 22)


def test_a_slot_is_taken_with_the_first_chunk_not_when_the_copy_is_queued():
    core = lru_core(slots=1, chunks=3)
    core.step_begin(0, "decode")
    run_event(core, 0, [0])
    core.step_begin(1, "decode")
    core.prefetch(0, [1])
    assert (core.memory.state[0], core.memory.state[1]) == (RESIDENT, QUEUED)
    send(core)
    assert (core.memory.state[0], core.memory.state[1]) == (ABSENT, COPYING)


def test_a_demand_copy_overtakes_the_rest_of_a_prefetch_but_not_its_chunk_in_flight():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    first = send(core)
    core.gate(0, [0])
    order = [first.key] + [send(core).key for _ in range(5)]
    assert order == [4, 0, 0, 0, 4, 4]


# ---------------------------------------------------------------------- promotion


def test_a_late_prefetch_is_promoted_and_resumes_where_it_stands():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    core.chunk_done(send(core))
    wave = core.gate(1, [6, 4, 5])
    counters = core.counters
    assert (counters.late_copying, counters.late_queued, counters.misses) == (1, 1, 1)
    assert wave.waiting == 2  # two slots: 4 and 5, which are under way, then 6
    assert land_all(core) == [4, 4, 5, 5, 5]
    assert [copy.key for copy in core.landed] == [4, 5]
    assert [(copy.demand, copy.high, copy.awaited) for copy in core.landed] == [
        (False, True, True)
    ] * 2
    assert core.tally.copied_bytes == 2 * EXPERT_BYTES


def test_a_prefetch_wholly_handed_over_is_awaited_without_another_chunk():
    core = lru_core(chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    copies = [send(core), send(core)]
    wave = core.gate(1, [4])
    assert wave.waiting == 1
    assert core.next_chunk() is None
    assert [core.chunk_done(copy) for copy in copies] == [False, True]


def test_a_policy_may_promote_a_prefetch_that_no_event_waits_for_yet():
    core = lru_core(chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    core.prefetch(2, [8])
    assert core.promote(8)
    assert not core.promote(8)
    assert not core.promote(9)
    core.gate(0, [0])
    assert land_all(core) == [8, 8, 0, 0, 4, 4, 5, 5]
    assert [copy.key for copy in core.landed] == [0]


def test_a_prefetch_set_aside_can_be_promoted():
    """Partly copied, then dropped at its own gate: a policy that wants it first may say so."""
    core = lru_core(chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    run_event(core, 1, [5])
    core.step_begin(1, "decode")
    assert core.promote(4)
    assert land_all(core) == [4]
    assert core.memory.state[4] == RESIDENT


# ---------------------------------------------------------------------- cancellation


def test_cancelling_before_the_first_chunk_leaves_no_trace():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    assert core.cancel(4)
    assert core.memory.state[4] == ABSENT
    assert land_all(core) == [5, 5, 5]
    assert (core.tally.prefetch_issued, core.tally.prefetch_cancelled) == (2, 1)
    core.prefetch(1, [4])
    assert land_all(core) == [4, 4, 4]


def test_cancelling_after_the_first_chunk_is_too_late():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    send(core)
    assert not core.cancel(4)
    assert not core.cancel(5)
    assert [send(core).key for _ in range(2)] == [4, 4]


def test_demand_copies_cannot_be_cancelled():
    core = lru_core()
    core.step_begin(0, "decode")
    core.gate(0, [0])
    assert not core.cancel(0)


def test_a_gate_drops_its_layers_wrong_prefetches_only():
    core = lru_core()
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    core.prefetch(2, [8])
    core.gate(1, [5])
    assert core.memory.state[4] == ABSENT
    assert core.tally.prefetch_cancelled == 1
    assert land_all(core) == [5, 8]


def test_without_preemption_wrong_prefetches_stay_behind_demand():
    core = lru_core(preempt=False)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    core.gate(1, [6])
    # Two slots: 5 takes that of 4, which nothing protects any more once its layer has passed.
    assert land_all(core) == [6, 4, 5]
    assert core.memory.residents() == [5, 6]


def test_a_wrong_prefetch_partly_copied_keeps_its_slot_and_resumes():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    run_event(core, 1, [5])
    assert core.memory.state[4] == COPYING
    assert core.next_chunk() is None
    core.step_begin(1, "decode")
    wave = core.gate(1, [4])
    assert core.counters.late_copying == 1
    assert wave.waiting == 1
    assert land_all(core) == [4, 4]
    assert core.tally.copied_bytes == 2 * EXPERT_BYTES


def test_a_wrong_prefetch_partly_copied_resumes_when_predicted_again():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    run_event(core, 1, [5])
    core.step_begin(1, "decode")
    core.prefetch(1, [4])
    assert land_all(core) == [4, 4]
    assert core.tally.prefetch_issued == 1


def test_a_wrong_prefetch_partly_copied_gives_way_when_no_resident_can():
    log: Log = []
    core = lru_core(chunks=3, log=log)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    run_event(core, 1, [5, 6])
    assert story(log) == "0.1 | 5 6 | +5 -4 +6"
    assert core.tally.wasted_prefetch_bytes == EXPERT_BYTES // 3


# ---------------------------------------------------------------------- priorities


class NearestFirst(Prefetcher):
    """Priority p / (l - l_now), renewed at every gate (FineMoE)."""

    def __init__(self, share: dict[int, float]) -> None:
        self.share = share

    def on_gate(self, step, layer, keys):
        self.core.reprioritise(
            {
                key: p / (self.core.shape.layer_of(key) - layer)
                for key, p in self.share.items()
                if self.core.shape.layer_of(key) > layer
            }
        )
        return ()


def test_priorities_follow_the_distance_to_the_layer():
    shape = shape_of(4, 4)
    # 8 of layer 2 and 12 of layer 3.
    share = {8: 0.5, 12: 0.9}
    core = lru_core(shape=shape, prefetcher=NearestFirst(share), chunks=4)
    core.step_begin(0, "decode")
    core.prefetch(2, [8], [0.5])
    core.prefetch(3, [12], [0.9])
    assert [copy.key for copy in core.queue.low] == [12, 8]
    core.gate(0, [])
    core.predictions(0, [])
    assert [send(core).key for _ in range(2)] == [12, 12]  # 0.9 / 3 against 0.5 / 2
    core.gate(1, [])
    core.predictions(1, [])
    assert [send(core).key for _ in range(2)] == [8, 8]  # 0.9 / 2 against 0.5 / 1


def test_renewing_no_priority_changes_no_order():
    """A prefetch set aside and queued again stands behind those queued meanwhile, for good."""
    core = lru_core(chunks=2, slots=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    run_event(core, 1, [5])
    core.step_begin(1, "decode")
    core.prefetch(2, [8])
    core.prefetch(1, [4])
    before = [copy.key for copy in core.queue.low]
    core.reprioritise({})
    assert [copy.key for copy in core.queue.low] == before


def test_a_prefetch_queued_again_takes_its_new_priority():
    core = lru_core(chunks=2, slots=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4], [0.1])
    core.chunk_done(send(core))
    run_event(core, 1, [5])
    core.step_begin(1, "decode")
    core.prefetch(2, [8], [0.5])
    core.prefetch(1, [4], [0.9])
    assert [copy.key for copy in core.queue.low] == [4, 8]


# ---------------------------------------------------------------------- pausing


def test_while_paused_only_demand_moves():
    core = lru_core(chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    core.pause_low()
    assert core.next_chunk() is None
    core.gate(0, [0])
    assert land_all(core) == [0, 0]
    core.resume_low()
    assert land_all(core) == [4]


def test_a_paused_prefetch_that_the_event_needs_goes_on():
    core = lru_core(chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.pause_low()
    core.gate(1, [4])
    assert land_all(core) == [4, 4]


def test_a_paused_prefetch_partly_copied_gives_way_to_demand():
    """Or the event would wait for a slot that nobody frees."""
    core = lru_core(slots=1, scope="global", chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    core.pause_low()
    core.gate(0, [0])
    assert land_all(core) == [0, 0]
    assert core.memory.state[4] == ABSENT


def test_demand_waits_for_the_slot_of_a_prefetch_in_flight():
    core = lru_core(slots=1, scope="global", chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    flying = send(core)
    core.gate(0, [0])
    core.pause_low()
    assert core.next_chunk() is None
    core.chunk_done(flying)
    assert land_all(core) == [0, 0]


# ---------------------------------------------------------------------- what a prefetch may take


def test_a_prefetch_never_throws_out_the_event_in_progress():
    core = lru_core(slots=1, scope="global")
    core.step_begin(0, "decode")
    run = core.gate(0, [0])
    assert run.waiting == 1
    land_all(core)
    core.prefetch(1, [4])
    assert core.next_chunk() is None
    assert (core.memory.state[0], core.memory.state[4]) == (RESIDENT, ABSENT)
    assert core.tally.prefetch_dropped == 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_prefetch_never_throws_out_another_of_the_same_layer(scope):
    core = lru_core(slots=2, scope=scope)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5, 6])
    assert land_all(core) == [4, 5]
    core.prefetch(1, [7])
    assert land_all(core) == []
    assert core.tally.prefetch_issued == 2


def test_a_prefetch_in_one_pool_never_throws_out_another_that_is_still_to_be_used():
    core = lru_core(slots=2, scope="global")
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    land_all(core)
    core.prefetch(2, [8])
    assert land_all(core) == []
    run_event(core, 1, [4])  # the others of layer 1 are known to be wrong now
    core.prefetch(2, [9])
    assert land_all(core) == [9]
    assert core.memory.residents() == [4, 9]


def test_a_prefetch_that_finds_its_expert_touches_it():
    core = lru_core(slots=2)
    core.step_begin(0, "decode")
    run_event(core, 0, [0, 1])
    core.step_begin(1, "decode")
    core.prefetch(0, [0])
    assert core.next_chunk() is None
    core.gate(0, [2])
    land_all(core)
    assert core.memory.residents() == [0, 2]


def test_a_prefetch_thrown_out_by_demand_may_come_back():
    core = lru_core(slots=1, scope="global")
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    land_all(core)
    run_event(core, 0, [0])
    assert core.memory.state[4] == ABSENT
    core.prefetch(1, [4])
    assert land_all(core) == [4]


# ---------------------------------------------------------------------- prefetches counted


def test_a_prefetch_used_is_not_wasted():
    core = lru_core(slots=1)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    land_all(core)
    run_event(core, 1, [4])
    core.step_begin(1, "decode")
    run_event(core, 1, [5])
    tally = core.finish()
    assert (tally.prefetch_used, tally.wasted_prefetch_bytes) == (1, 0)


def test_a_prefetch_evicted_unused_is_wasted():
    core = lru_core(slots=1)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    land_all(core)
    run_event(core, 1, [5])
    tally = core.finish()
    assert (tally.prefetch_used, tally.wasted_prefetch_bytes) == (0, EXPERT_BYTES)


def test_a_prefetch_still_unused_at_the_end_is_wasted():
    core = lru_core()
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    land_all(core)
    assert core.finish().wasted_prefetch_bytes == EXPERT_BYTES


def test_a_prefetch_promoted_before_its_first_chunk_is_not_wasted():
    """Its event waited for it and used it; leaving later wastes nothing."""
    core = lru_core(slots=1)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    run_event(core, 1, [4])
    core.step_begin(1, "decode")
    run_event(core, 1, [5])
    assert core.finish().wasted_prefetch_bytes == 0


def test_no_more_is_wasted_than_was_copied():
    core = lru_core(chunks=3)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    core.chunk_done(send(core))
    assert core.finish().wasted_prefetch_bytes == EXPERT_BYTES // 3


# ---------------------------------------------------------------------- predictions


class Foretold(Prefetcher):
    """Hands out given predictions at the gate of layer 0."""

    def __init__(self, *predictions: Prediction) -> None:
        self.predictions = predictions

    def on_gate(self, step, layer, keys):
        return self.predictions if layer == 0 else ()


@pytest.mark.parametrize(
    ("step", "layer", "counts"),
    [(0, 0, False), (0, 1, False), (0, 2, True), (1, 0, True), (1, 1, True)],
)
def test_a_prediction_that_comes_after_its_gate_is_void(step, layer, counts):
    prediction = Prediction("slow", step, layer, [4 * layer + 3])
    core = lru_core(prefetcher=Foretold(prediction))
    core.step_begin(0, "decode")
    core.gate(0, [0])
    (announced,) = core.predictions(0, [0])
    land_all(core)
    core.experts_done(0)
    run_event(core, 1, [4])
    core.prediction_ready(announced)
    assert land_all(core) == ([4 * layer + 3] if counts else [])
    assert core.tally.prefetch_issued == counts


def test_a_prediction_of_the_step_before_is_void():
    core = lru_core(prefetcher=Foretold())
    core.step_begin(1, "decode")
    core.prediction_ready(Prediction("slow", 0, 2, [8]))
    assert core.next_chunk() is None


def test_the_source_of_a_prediction_goes_with_its_copy():
    core = lru_core(prefetcher=Foretold())
    core.step_begin(0, "decode")
    core.prediction_ready(Prediction("map_search", 0, 2, [8, 9], [0.2, 0.7]))
    assert [(copy.key, copy.source, copy.priority) for copy in core.queue.low] == [
        (9, "map_search", 0.7),
        (8, "map_search", 0.2),
    ]


def test_precision_and_recall_of_predictions():
    core = lru_core()
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    run_event(core, 0, [0])  # nothing was predicted for layer 0: it does not count
    run_event(core, 1, [5, 6])
    tally = core.tally
    assert (tally.predicted, tally.predicted_right, tally.predictable) == (2, 1, 2)


# ---------------------------------------------------------------------- lossy routing


class Masked(MissRule):
    """Executes residents only."""

    lossy = True

    def route(self, step, layer, keys):
        state = self.core.memory.state
        return [key for key in keys if state[key] == RESIDENT]


class Substituted(MissRule):
    """Executes a fixed expert of the layer instead of any that is missing."""

    lossy = True

    def __init__(self, stand_in: int) -> None:
        self.stand_in = stand_in

    def route(self, step, layer, keys):
        state = self.core.memory.state
        kept = [key if state[key] == RESIDENT else self.stand_in for key in keys]
        return list(dict.fromkeys(kept))


def test_masked_experts_are_neither_copied_nor_counted_as_accesses():
    core = lru_core(miss_rule=Masked())
    core.step_begin(0, "decode")
    core.prefetch(0, [0])
    land_all(core)
    wave = core.gate(0, [0, 1])
    assert (list(wave.ready), wave.waiting) == ([0], 0)
    counters = core.counters
    assert (counters.accesses, counters.hits, counters.misses, counters.changed) == (1, 1, 0, 1)
    assert core.next_chunk() is None


def test_masking_all_executes_nothing():
    core = lru_core(miss_rule=Masked())
    core.step_begin(0, "decode")
    wave = core.gate(0, [0, 1])
    assert (list(wave.ready), wave.waiting, wave.last) == ([], 0, True)
    assert core.counters.changed == 2


def test_a_substitute_is_what_the_event_needs():
    log: Log = []
    core = lru_core(miss_rule=Substituted(3), log=log)
    core.step_begin(0, "decode")
    run_event(core, 0, [0, 1])
    run_event(core, 0, [3, 2])
    assert story(log) == told("""
        0.0 | 3 | +3
        0.0 | 3* |
    """)
    assert (core.counters.accesses, core.counters.changed) == (2, 3)


def test_a_lossless_rule_cannot_change_the_routing():
    rule = Masked()
    rule.lossy = False
    core = lru_core(miss_rule=rule)
    core.step_begin(0, "decode")
    assert core.gate(0, [0, 1]).waiting == 2


# ---------------------------------------------------------------------- the CPU


class FewTokens(MissRule):
    """The CPU computes missing experts of one token; the rest is copied (Fiddler's shape)."""

    def on_misses(self, layer, misses, tokens):
        return [key for key in misses if tokens[key] == 1]


def test_the_cpu_takes_its_share_of_the_misses_and_no_slot():
    log: Log = []
    core = lru_core(miss_rule=FewTokens(), log=log)
    steps = [[[0, 1, 2]], [[0, 1, 2]]]
    counts = [[[5, 1, 1]], [[1, 1, 9]]]
    launches = run_instant(core, steps, counts=counts)
    assert [(wave.ready, wave.landed, wave.cpu) for wave in launches] == [
        ((), (0,), (1, 2)),
        ((0,), (2,), (1,)),
    ]
    assert core.memory.residents() == [0, 2]
    assert (total(core, "accesses"), total(core, "hits"), total(core, "misses")) == (6, 1, 5)
    assert total(core, "cpu") == 3
    assert core.tally.copies == 2


def test_the_cpu_may_take_all():
    core = lru_core(miss_rule=FewTokens())
    launches = run_instant(core, [[[0, 1, 2]]])
    assert [(wave.keys, wave.cpu) for wave in launches] == [([0, 1, 2], (0, 1, 2))]
    assert core.tally.copies == 0


def test_an_expert_run_on_the_cpu_is_no_use_of_the_cache():
    core = lru_core(miss_rule=FewTokens())
    # 3 is copied in the place of the oldest, 0: what the CPU ran in between touched nothing.
    run_instant(core, [[[0, 1]], [[2]], [[3]]], counts=[[[2, 2]], [[1]], [[2]]])
    assert core.memory.residents() == [1, 3]


def test_experts_in_flight_are_not_given_to_the_cpu():
    core = lru_core(miss_rule=FewTokens())
    core.step_begin(0, "decode")
    core.prefetch(0, [0])
    send(core)
    core.prefetch(0, [1])
    wave = core.gate(0, [0, 1, 2], {0: 1, 1: 1, 2: 1})
    assert (wave.waiting, list(wave.cpu)) == (2, [2])


class AllFewTokens(FewTokens):
    """Likewise, and what is queued or under way."""

    takes_late = True


def test_a_rule_may_give_the_cpu_experts_under_way_whose_copies_go_on_unawaited():
    log: Log = []
    core = lru_core(miss_rule=AllFewTokens(), log=log)
    core.step_begin(0, "decode")
    core.prefetch(0, [0, 1])
    copy = send(core)
    wave = core.gate(0, [0, 1, 2], {0: 1, 1: 1, 2: 5})
    assert (wave.waiting, list(wave.cpu)) == (1, [0, 1])
    assert (total(core, "late"), total(core, "misses"), total(core, "cpu")) == (2, 1, 2)
    assert not core.chunk_done(copy)  # nobody waits for it
    assert [(low.key, low.high) for low in core.queue.low] == [(1, False)]
    assert core.memory.residents() == [0]


def test_cpu_misses_count_before_waves_are_cut():
    core = lru_core(miss_rule=FewTokens(), slots=1)
    launches = run_instant(core, [[[0, 1, 2]]], counts=[[[2, 1, 2]]])
    assert [(wave.landed, wave.cpu) for wave in launches] == [((0,), (1,)), ((2,), ())]


# ---------------------------------------------------------------------- waves and order


def test_a_batch_that_needs_more_experts_than_slots_runs_each_once():
    # Five requests' experts of one layer, seven distinct ones of eight.
    core = lru_core(shape=shape_of(1, 8), slots=3)
    launches = run_instant(core, [[[1, 2]], [[7, 6, 5, 4, 2, 1, 0]]])
    assert [wave.keys for wave in launches] == [[1, 2], [1, 2, 7], [4, 5, 6], [0]]
    assert (total(core, "hits"), total(core, "waves")) == (2, 4)


def test_waves_take_what_is_in_flight_before_what_is_absent():
    core = lru_core(shape=shape_of(1, 8), slots=2)
    core.step_begin(0, "decode")
    core.prefetch(0, [3])
    send(core)
    core.gate(0, [1, 2, 3])
    assert sorted(core.pinned) == [1, 3]


def test_waves_take_residents_before_what_is_in_flight():
    core = lru_core(shape=shape_of(1, 8), slots=2)
    core.step_begin(0, "decode")
    run_event(core, 0, [0])
    core.step_begin(1, "decode")
    core.prefetch(0, [3, 4])
    send(core)
    core.gate(0, [3, 4, 0])
    assert sorted(core.pinned) == [0, 3]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("cached-first", None), ("touch", [2, 0, 1]), ("id", [0, 1, 2])],
)
def test_the_order_of_execution_is_an_option(order, expected):
    core = lru_core(shape=shape_of(1, 8), slots=3, order=order)
    core.step_begin(0, "decode")
    run_event(core, 0, [1])
    wave = core.gate(0, [2, 0, 1])
    assert wave.order == expected
    assert (list(wave.ready), wave.waiting) == ([1], 2)
    land_all(core)
    core.experts_done(0)
    assert core.gate(0, [2, 0, 1]).order == expected


def test_strict_order_cuts_waves_in_that_order_and_counts_collisions():
    log: Log = []
    core = lru_core(shape=shape_of(1, 8), slots=2, order="id", log=log)
    run_instant(core, [[[5, 4]], [[5, 1, 0, 4]]])
    assert story(log) == told("""
        0.0 | 5 4 | +4 +5
        # by id in waves 0 1 | 4 5; touched in the order 5 1 0 4: 5 and 4 leave, then 1 and 0
        1.0 | 5* 1 0 4* | -5 +0 -4 +1 -1 +4 -0 +5
    """)
    assert core.tally.collision_misses == 2
    assert (total(core, "hits"), total(core, "misses")) == (2, 4)


def test_unknown_order_and_chunks_below_one_are_errors():
    with pytest.raises(PolicyError, match="order 'random' is unknown"):
        lru_core(order="random")
    with pytest.raises(PolicyError, match="chunks is 0"):
        lru_core(chunks=0)


# ---------------------------------------------------------------------- reset


def test_the_cache_carries_over_from_request_to_request():
    core = lru_core()
    run_instant(core, [[[0]], [[0]]], requests=[0, 1])
    assert total(core, "hits") == 1


def test_a_reset_empties_the_cache_at_every_request():
    log: Log = []
    core = lru_core(reset=True, log=log)
    run_instant(core, [[[0]], [[0]], [[0]]], requests=[0, 0, 1])
    assert story(log) == told("""
        0.0 | 0 | +0
        1.0 | 0* | -0
        2.0 | 0 | +0
    """)


@pytest.mark.parametrize(("name", "slots"), [("static", 4), ("resident", 4)])
def test_a_reset_loads_the_warm_set_again(name, slots):
    shape = shape_of(1, 4)
    data = policy_data(shape, [], popularity=[[1, 2, 3, 4]])
    core = make_core(name, data, slots=slots, reset=True)
    warm = core.memory.residents()
    run_instant(core, [[[0]], [[1]]], requests=[0, 1])
    assert core.memory.residents() == warm
    assert warm


def test_a_reset_forgets_counts():
    data = policy_data(shape_of(1, 4), [])
    log: Log = []
    core = make_core("lfu", data, slots=2, reset=True, log=log)
    run_instant(core, [[[0]], [[0]], [[1, 0]], [[1]], [[2]]], requests=[0, 0, 1, 1, 1])
    # In the second request 0 was used once and 1 twice, whatever the first one did.
    assert story(log).splitlines()[-1] == "4.0 | 2 | -0 +2"


def test_a_reset_lets_copies_in_flight_land():
    core = lru_core(chunks=2, reset=True)
    core.step_begin(0, "decode")
    core.prefetch(1, [4, 5])
    flying = send(core)
    core.request_begin(1)
    assert (core.memory.state[4], core.memory.state[5]) == (COPYING, ABSENT)
    core.chunk_done(flying)
    core.step_begin(1, "decode")
    core.gate(1, [4, 6])
    assert land_all(core) == [4, 6, 6]


def test_a_reset_lets_what_was_thrown_out_be_predicted_again():
    core = lru_core(reset=True)
    core.step_begin(0, "decode")
    core.prefetch(1, [4])
    land_all(core)
    core.request_begin(1)
    assert core.memory.state[4] == ABSENT
    core.step_begin(1, "decode")
    core.prefetch(1, [4])
    assert land_all(core) == [4]


# ---------------------------------------------------------------------- sizes and precisions


def test_a_pool_of_bytes_never_holds_more_than_it_has():
    shape = shape_of(2, 3, 2, (10, 30))
    log: Log = []
    core = lru_core(shape=shape, plan=plan_memory(shape, "global", 45), log=log)
    run_instant(core, [[[0, 1], [3]], [[2], [4]], [[0], [4]]])
    assert story(log) == told("""
        0.0 | 0 1 | +0 +1
        0.1 | 3 | -0 +3       # 10 + 10 + 30 > 45
        1.0 | 2 | -1 +2       # 5 left over
        1.1 | 4 | -3 +4       # 10 + 30 + 30 > 45
        2.0 | 0 | -2 +0
        2.1 | 4* |
    """)
    assert core.tally.copied_bytes == 4 * 10 + 2 * 30


def test_an_event_larger_than_a_pool_of_bytes_runs_in_waves():
    shape = shape_of(2, 3, 2, (10, 30))
    core = lru_core(shape=shape, plan=plan_memory(shape, "global", 65))
    launches = run_instant(core, [[[0, 1, 2], [3, 4, 5]]])
    assert [wave.keys for wave in launches] == [[0, 1, 2], [3, 4], [5]]


def test_layers_may_have_pools_of_their_own_size():
    shape = shape_of(2, 4)
    core = lru_core(shape=shape, plan=uneven_plan(shape, (3, 1), 0))
    launches = run_instant(core, [[[0, 1, 2], [4, 5]]])
    assert [wave.keys for wave in launches] == [[0, 1, 2], [4], [5]]


# One layer, three experts of 30 bytes, low-bit copies (keys 3-5) of 10.
MIXED = Shape(1, 3, 3, (30,), low_bytes_by_layer=(10,))


class LowBits(MissRule):
    """Takes the low-bit copy of some experts."""

    lossy = True

    def __init__(self, *low: int) -> None:
        self.low = low

    def route(self, step, layer, keys):
        return [key + 3 if key in self.low else key for key in keys]


def test_both_precisions_of_an_expert_are_kept_apart():
    log: Log = []
    rule = LowBits(0)
    core = lru_core(shape=MIXED, plan=plan_memory(MIXED, "layer", 60), miss_rule=rule, log=log)
    run_instant(core, [[[0, 1]], [[0, 1]]])
    rule.low = ()
    assert core.memory.occupied_bytes() == 40
    core.step_begin(2, "decode")
    run_event(core, 0, [0])
    assert story(log) == told("""
        0.0 | 3 1 | +3 +1
        1.0 | 3* 1* |
        2.0 | 0 | -3 +0       # 10 + 30 + 30 > 60: the older of the two leaves
    """)


def test_hit_bytes_are_those_of_the_precision_hit():
    core = lru_core(shape=MIXED, plan=plan_memory(MIXED, "layer", 60), miss_rule=LowBits(0))
    run_instant(core, [[[0, 1]], [[0, 1]]])
    assert total(core, "hit_bytes") == 10 + 30


@pytest.mark.parametrize("keys", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_an_event_of_both_precisions_runs_in_waves_that_fit(keys):
    """30 bytes: the low-bit copy of 0, and 1 and 2 in full, one at a time."""
    plan = plan_memory(MIXED, "layer", 30)
    core = lru_core(shape=MIXED, plan=plan, miss_rule=LowBits(0))
    launches = run_instant(core, [[keys]])
    assert sorted(key for wave in launches for key in wave.keys) == [1, 2, 3]


# ---------------------------------------------------------------------- slots


def test_a_slot_is_always_large_enough_for_its_expert():
    """Adoption swaps the roles of slots: staging must keep slots for the largest experts."""
    shape = shape_of(2, 4, 2, (30, 10))
    steps = [[[], [4]], [[], [4, 5]], [[], [5]], [[0, 1], []], [[0], []]]
    core = make_core(
        "belady-bypass", policy_data(shape, steps), budget=30 + 10 + 30, staging_slots=1
    )
    sizes = {0: 30, 1: 10, 2: 30}

    def fits(core: DecisionCore) -> None:
        for key, slot in core.memory.slot_of.items():
            assert shape.bytes_of(key) <= sizes[slot], f"key {key} in slot {slot}"

    run_instant(core, steps, watch=fits)


# ---------------------------------------------------------------------- memory of the core itself


def test_a_long_run_of_hits_leaves_nothing_behind():
    """A pool that never has to evict must not remember every event of a long trace."""
    shape = shape_of(4, 8)
    steps = [[[8 * layer + step % 8] for layer in range(4)] for step in range(4000)]
    core = make_core("belady-global", policy_data(shape, steps), slots=32)
    tracemalloc.start()
    run_instant_quietly(core, steps)
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 200_000


def run_instant_quietly(core: DecisionCore, steps: list[list[list[int]]]) -> None:
    for step, events in enumerate(steps):
        core.step_begin(step, "decode")
        for layer, keys in enumerate(events):
            core.gate(layer, keys)
            land_all(core)
            core.experts_done(layer)


def test_belady_knows_next_uses_also_where_the_cpu_takes_a_part():
    """Next uses belong to keys, not to places in what the cache rule is told."""

    class SecondToCpu(MissRule):
        def on_misses(self, layer, misses, tokens):
            return [key for key in misses if key == 2]

    steps = [[[2, 3, 1]], [[1]], [[2]], [[3]]]
    shape = shape_of(1, 4)
    data = policy_data(shape, steps)
    built = policies.get("belady").build({}, data)
    core = DecisionCore(
        shape,
        plan_memory(shape, "layer", 3 * EXPERT_BYTES),
        Policy(built.cache, miss_rule=SecondToCpu()),
    )
    core.step_begin(0, "decode")
    core.gate(0, [2, 3, 1])
    assert {key: built.cache.next_use[key] for key in (1, 2, 3)} == {1: 1, 2: 2, 3: 3}
