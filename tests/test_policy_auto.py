"""Auto, worked out by hand: who leaves, who computes, what is fetched ahead and behind."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from policies._lanes import SoonestSplit
from policies._slot_worth import ComingHits, Shadows, SlotWorth
from policies.auto import Chances
from policies.errors import PolicyError
from sim.inputs import Inputs
from sim.point import Point, run_point
from tests.driver import (
    Log,
    make_core,
    policy_data,
    run_instant,
    run_random,
    shape_of,
    story,
    told,
    total,
)
from tests.given import GivenCosts
from tests.made_up import signals_of
from tests.on_sample import run_on_sample, totals
from tests.test_core_invariants import draw_case
from tracer.trace import Trace

# A copy takes 12 and then 10 on the GPU; the CPU takes 15 an expert and 10 to add its result.
# One miss: 22 by the link, 25 by the CPU. Two: 34, 40, and one each 25.
COSTS = GivenCosts(cpu_expert=10, cpu_token=5, gpu_expert=10)
# A hit saves 1 / (1 / 15 + 1 / 12) = 6.7 where both work, a copy slows the GPU by 0.05 * 12: it
# pays from 0.09 hits on.


def test_auto_shares_misses_out_and_brings_in_behind_what_is_worth_a_slot():
    steps = [[[0, 1]], [[0, 2]], [[1, 3]], [[3]]]
    log: Log = []
    data = policy_data(shape_of(1, 4), steps, costs=COSTS)
    core = make_core("auto", data, slots=2, chunks=1, log=log)
    launches = run_instant(core, steps)
    # Decayed uses at half-life 8 (0.917 an event) after each event, of 0 1 2 3:
    assert story(log) == told("""
        0.0 | 0 | +0 ~1       # 1 on the CPU; a slot is free for it.  1    1    0    0
        1.0 | 0* 2 | -1 +2    # one miss: the link is sooner.         1.92 0.92 1    0
        2.0 | 1 | -2 +1       # 3 on the CPU: 1 is worth more.        1.76 1.84 0.92 1
                              # 3 stays out: 2 was as much worth, and 1 took its place.
        3.0 | 3 | -0 +3       #                                       1.61 1.69 0.84 1.92
    """)
    assert [launch.cpu for launch in launches] == [(1,), (), (3,), ()]
    assert (total(core, "hits"), total(core, "misses"), total(core, "cpu")) == (1, 6, 2)


def test_auto_prefetches_once_ranks_have_been_right_and_stops_when_they_are_wrong():
    # Two layers of four experts, top-1, two slots each: two candidates, of ranks 0 and 1.
    steps = [[[0], [layer_1]] for layer_1 in (5, 7, 5, 5, 5)]
    guesses = [[1, 2], [3, 0], [2, 0], [2, 0], [2, 0]]
    lookahead = {"lookahead_1": [[guess, []] for guess in guesses]}
    data = policy_data(shape_of(2, 4, top_k=1), steps, lookahead=lookahead, costs=COSTS)
    log: Log = []
    core = make_core("auto", data, slots=4, chunks=1, depth=1, log=log)
    run_instant(core, steps)
    # Chance of rank 0: 8 parts all layers' share (one half for one example at first).
    assert story(log) == told("""
        0.0 | 0 | +0
        0.1 | 5 | +5          # 1/2 before; then 1.5 / 2 of all: (1 + 8 * 0.75) / 9 = 0.78
        1.0 | 0* | ~7
        1.1 | 7* |            # (2 + 8 * 2.5 / 3) / 10 = 0.87
        2.0 | 0* | -5 ~6      # 0.87 * (1/2 + 1/2) hits, for 5's half: it pays
        2.1 | 5 | -6 +5       # wrong: (2 + 8 * 2.5 / 4) / 11 = 0.64
        3.0 | 0* | -7 ~6      # 7 was last used a step before 5
        3.1 | 5* |            # wrong: (2 + 8 * 2.5 / 5) / 12 = 0.5: no more
        4.0 | 0* |
        4.1 | 5* |
    """)
    assert (core.tally.prefetch_started, core.tally.prefetch_used) == (3, 1)


def test_experts_under_way_are_left_to_the_cpu_where_that_is_sooner():
    # Copies of 1200 against 15 on the CPU. Half of the first is handed over as the gate is known.
    shape = shape_of(1, 4, 2, 1200)
    data = policy_data(shape, [[[0, 1]]], costs=COSTS)
    core = make_core("auto", data, slots=2, chunks=2)
    core.step_begin(0, "decode")
    core.prefetch(0, [0, 1])
    sent = core.next_chunk()
    assert sent is not None
    assert sent[0].key == 0
    wave = core.gate(0, [0, 1], {0: 1, 1: 1})
    assert (wave.waiting, sorted(wave.cpu)) == (0, [0, 1])
    assert (total(core, "late"), total(core, "cpu"), total(core, "misses")) == (2, 2, 0)
    # 0 has a slot and goes on; 1 had none, and was taken back.
    assert [copy.key for copy in core.queue.low] == [0]
    core.experts_done(0)


@pytest.mark.parametrize(
    ("costs", "copied"),
    [
        (COSTS, [1, 1, 2, 2, 3]),
        (replace(COSTS, cpu_start=1000), [1, 2, 3, 4, 5]),
        (replace(COSTS, copy_start=1000), [0, 0, 0, 0, 0]),
        # Beside each other the CPU takes 30 an expert: two copies, 34, are sooner than one each. Of
        # three misses all are copied, 46: one on the CPU, 40, would be charged 6.6 if it were
        # brought in behind, since that slows the CPU.
        (replace(COSTS, cpu_slowdown_ppm=1_000_000), [1, 2, 3, 3, 4]),
    ],
)
def test_link_and_cpu_are_done_soonest(costs, copied):
    shape = shape_of(1, 8)
    counts = []
    for misses in range(1, 6):
        core = make_core("auto", policy_data(shape, [], costs=costs), slots=8, chunks=1)
        core.step_begin(0, "decode")
        keys = list(range(misses))
        counts.append(misses - len(core.gate(0, keys, dict.fromkeys(keys, 1)).cpu))
    assert counts == copied


def test_copies_without_a_slot_beside_the_hits_come_after_the_cpu_is_done():
    # The CPU takes 10 an expert. With room, one each: 22. Where 0 and 1 fill the slots: both on the
    # CPU, 20 + 10; one there, then a copy, 20 + 12 + 10; none there, a second wave of 24 + 10.
    costs = replace(COSTS, cpu_expert=5)
    core = make_core("auto", policy_data(shape_of(1, 4), [], costs=costs), slots=2, chunks=1)
    run_instant(core, [[[0]], [[1]]])
    core.step_begin(2, "decode")
    assert sorted(core.gate(0, [0, 1, 2, 3], dict.fromkeys(range(4), 1)).cpu) == [2, 3]
    roomy = make_core("auto", policy_data(shape_of(1, 4), [], costs=costs), slots=2, chunks=1)
    roomy.step_begin(0, "decode")
    assert list(roomy.gate(0, [2, 3], dict.fromkeys((2, 3), 1)).cpu) == [3]


def test_most_tokens_are_copied_first():
    # 9 tokens on the CPU: 10 + 45.
    core = make_core("auto", policy_data(shape_of(1, 4), [], costs=COSTS), slots=2, chunks=1)
    core.step_begin(0, "decode")
    assert list(core.gate(0, [0, 1], {0: 1, 1: 9}).cpu) == [0]


def test_every_slot_more_costs_the_next_who_leaves():
    core = make_core("auto", policy_data(shape_of(1, 6), [], costs=COSTS), slots=3, chunks=1)
    run_instant(core, [[[0]], [[1]]])
    cache = core.policy.cache
    assert isinstance(cache, SlotWorth)
    prices = cache.prices(0, ())
    first, second = cache.kept_by([0, 1])
    assert [next(prices) for _ in range(4)] == [0.0, first, second, np.inf]
    assert list(islice(cache.prices(0, (0,)), 3)) == [0.0, second, np.inf]


def test_without_the_cpu_all_is_copied():
    data = policy_data(shape_of(1, 4), [[[0, 1]]], costs=COSTS)
    core = make_core("auto", data, slots=2, cpu=False)
    run_instant(core, [[[0, 1]]])
    assert (total(core, "cpu"), core.tally.copies) == (0, 2)


# A copy of 1200 against 15 on the CPU: it pays from 1200 * (2 * 0.05) / 14.8 = 8.1 hits on.
FAR_SLOWER = 1200


def test_a_cold_cache_fills_though_the_cpu_beats_the_link_by_far():
    # 0 and 1 are used in every event. Until somebody leaves, the long horizon counts: eleven uses
    # promise 8.1 hits. Over the short horizon nothing would be brought in: at most 4.85.
    steps = [[[0, 1]]] * 20
    data = policy_data(shape_of(1, 8, 2, FAR_SLOWER), steps, costs=COSTS)
    core = make_core("auto", data, slots=4, chunks=1)
    run_instant(core, steps)
    assert core.memory.residents() == [0, 1]
    assert total(core, "hits") > 15


def test_a_full_cache_moves_on_though_the_cpu_beats_the_link_by_far():
    # Nobody is brought in for 3 events' hits, at most 4.85; but slots kept for 120 events and more
    # have time for 17.8.
    steps = [[[0, 1]]] * 10 + [[[2, 3]]] * 400
    data = policy_data(shape_of(1, 8, 2, FAR_SLOWER), steps, costs=COSTS)
    core = make_core("auto", data, slots=2, chunks=1)
    run_instant(core, steps)
    assert core.memory.residents() == [2, 3]
    assert total(core, "hits") > 400


def test_copies_that_delay_others_must_bring_more_hits():
    core = make_core("auto", policy_data(shape_of(1, 8), [], costs=COSTS), slots=4, chunks=1)
    split = core.policy.miss_rule
    assert isinstance(split, SoonestSplit)
    first = split.hits_to_pay(0)
    # 12 * (2 * 0.05) over what a miss costs with both, 6.7.
    assert first == pytest.approx(1.2 / (1 / (1 / 15 + 1 / 12)))
    core.tally.prefetch_started = 1
    split._book_delay(100.0)
    # (100 + 3 * 0.6) / (1 + 3) a copy, instead of 0.6
    assert split.hits_to_pay(0) == pytest.approx(first * (101.8 / 4 + 0.6) / 1.2)
    for _ in range(2000):
        split._book_delay(0.0)
    assert split.hits_to_pay(0) == pytest.approx(first)


def test_where_no_chance_is_enough_nothing_is_predicted():
    steps = [[[0], [5]], [[1], [6]]]
    lookahead = {"lookahead_1": [[[5, 6], []], [[6, 7], []]]}
    data = policy_data(shape_of(2, 4, top_k=1), steps, lookahead=lookahead, costs=COSTS)
    core = make_core("auto", data, slots=8, chunks=1, least_chance=1.0)
    run_instant(core, steps)
    assert core.tally.predicted == 0


# ---------------------------------------------------------------------- parts


def test_coming_hits_learn_a_steady_use():
    # Used in every event, an expert brings 1 / (1 - 2^(-1/3)) = 4.85 discounted hits, or 17.8 at a
    # half-life of 12; its decayed use is then 12, 24 and 93.
    hits = ComingHits()
    always = ComingHits.classes(np.array([[12.0], [24.0], [93.0]]))
    guessed = hits.of_class[2, always[2, 0]]
    for _ in range(60_000):
        hits.learn(always, [0], always)
    learned = hits.of_class[np.arange(3), always[:, 0]]
    assert learned[0] == pytest.approx(1 / (1 - 2 ** (-1 / 3)), rel=0.01)
    assert learned[1] == pytest.approx(1 / (1 - 2 ** (-1 / 12)), rel=0.01)
    assert guessed < learned[2] < 1 / (1 - 2 ** (-1 / 48))
    never = ComingHits.classes(np.zeros((3, 1)))
    for _ in range(5000):
        hits.learn(never, [], never)
    assert hits.of_class[0, never[0, 0]] < 0.01


def test_classes_are_half_octaves():
    assert ComingHits.classes(np.array([0.0, 1.0, 1.18, 1.2, 2.0, 1e9])).tolist() == [
        0,
        12,
        12,
        13,
        14,
        23,
    ]


def test_shadows_find_the_half_life_that_misses_least():
    # 0 and 1 every second event, between them ever new ones: recency keeps the wrong ones.
    experts = 32
    shadows = Shadows(1, experts, [3])
    decay = np.exp2(-1 / np.array([1.0, 4.0, 8.0, 16.0, 64.0]))[:, None]
    use = np.zeros((5, experts))
    for now in range(400):
        once = 2 + 3 * now % 30
        ids = [0, 1] if now % 3 == 0 else [once, once + (1 if once < 31 else -1)]
        use *= decay
        use[:, ids] += 1.0
        shadows.see(0, ids, use)
    assert shadows.best > 0


def test_chances_are_by_rank_and_shrink_to_those_of_all_layers():
    chances = Chances(2, 2)
    assert chances.of(0) == [0.5, 0.5]
    for _ in range(50):
        chances.learn(0, [(7, 0), (8, 1)], {7})
    near, far = chances.of(0), chances.of(1)
    assert near[0] > far[0] > 0.95
    assert near[1] < far[1] < 0.05


# ---------------------------------------------------------------------- what it may know


def test_auto_needs_costs_and_nothing_else():
    with pytest.raises(PolicyError, match="auto weighs CPU against link"):
        make_core("auto", policy_data(shape_of(1, 4), []), slots=2)
    steps = [[[0, 1], [4, 5]], [[1, 2], [6, 7]]]
    core = make_core("auto", policy_data(shape_of(2, 4), steps, costs=COSTS), slots=4)
    run_instant(core, steps)
    assert total(core, "accesses") == 8
    assert core.tally.predicted == 0


@pytest.mark.parametrize("seed", range(20))
def test_auto_sees_no_future(seed):
    """Runs that differ from a step on agree until then."""
    case = draw_case("auto", seed)
    changed = [*case.steps[:8], *reversed(case.steps[8:])]
    logs = []
    for steps in (case.steps, changed):
        log: Log = []
        other = replace(case, steps=steps)
        run_random(other.core(log), steps, random.Random(seed), window=case.window)
        logs.append([entry for entry in log if entry[1] < 8])
    assert logs[0] == logs[1]
    assert logs[0]


def test_gate_probabilities_are_read_up_to_the_gate_in_progress_only():
    shape = shape_of(2, 4)
    steps = [[[0, 1], [4, 5]], [[1, 2], [6, 7]]]
    data = policy_data(shape, steps, costs=COSTS, signals=signals_of(shape, steps))
    core = make_core("auto", data, slots=4)
    cache = core.policy.cache
    assert isinstance(cache, SlotWorth)
    run_instant(core, steps)
    soft = np.asarray(signals_of(shape, steps)._layered["gate_probs"][1][1][0], float)
    # Experts 2 and 3 of layer 1 ran: half a use each, the rest by probability, k in all.
    fresh = 0.5 * np.array([0, 0, 1, 1]) + 0.5 * 2 * soft
    before = cache._use[1][2] - fresh
    assert (before >= 0).all()
    assert before.sum() == pytest.approx(2 * 2 ** (-1 / 8), rel=1e-3)


class WrongAhead:
    """A trace whose look-ahead names only experts that the next layers do not need."""

    def __init__(self, trace: Any) -> None:
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trace, name)

    def load(self, columns: Any, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        found = dict(self._trace.load(columns, start, stop))
        for name in columns:
            if name.startswith("lookahead_"):
                experts = self._trace.load(["experts"], start, stop)["experts"]
                found[name] = self._wrong(experts, int(name[-1]), found[name].shape[2])
        return found

    @staticmethod
    def _wrong(experts: Any, distance: int, width: int) -> Any:
        needed = (experts[..., None] == np.arange(64)).any(2)
        ranked = np.argsort(needed, axis=2, kind="stable")[..., :width].astype(np.int16)
        wrong = np.full_like(ranked, -1)
        wrong[:, :-distance] = ranked[:, distance:]
        return wrong


@pytest.mark.parametrize("budget", ["25%", "75%"])
def test_a_predictor_that_is_always_wrong_costs_next_to_nothing(budget):
    # In a prefill, what one token does not need another does: only decode steps are all wrong.
    shared: dict[str, Any] = {
        "policy": "auto",
        "hardware": "rtx4090-pcie4",
        "geometry": "olmoe-1b-7b",
        "expert_budget": budget,
        "max_tokens": 500,
    }
    wrong = Inputs(WrongAhead(Trace.open("sample")), max_tokens=500)
    found = run_point(wrong, Point(**shared))
    without = run_point(wrong, Point(**shared, params={"depth": 0}))
    assert found["tpot_ms"]["mean"] < 1.02 * without["tpot_ms"]["mean"]
    assert without["prefetch"]["precision"] is None


# ---------------------------------------------------------------------- on the sample trace


def test_auto_on_the_sample_trace():
    found = run_on_sample("auto", chunks=1)
    assert totals(found) == (58378, 7618, 27444, 19257, 19001)
    assert found["chosen"]["half_life"] in (4.0, 8.0, 16.0)
    rival = run_on_sample("hybrid-split")
    assert found["tpot_ms"]["mean"] < rival["tpot_ms"]["mean"]
