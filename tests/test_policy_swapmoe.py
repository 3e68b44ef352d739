"""SwapMoE: who is resident, where tokens go instead, and what is exchanged, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import policies
from policies.errors import BudgetTooSmall, PolicyError
from policies.memory import ABSENT, QUEUED, RESIDENT
from policies.slots import plan_policy
from policies.swapmoe import (
    FREQUENCIES,
    Gates,
    _mask_one,
    in_turn,
    lost_weight,
    masked_top_k,
    masked_weights,
    most,
    normalised,
    plan_frequency,
    quota,
)
from sim.inputs import Inputs
from sim.machine import Machine
from sim.metrics import counts, quality
from sim.point import Point, run_point
from tests.cases import Case, make_columns, make_shape
from tests.driver import (
    GivenFit,
    GivenSignals,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    table,
    told,
    total,
)
from tests.made_up import all_data, fit_of, signals_of
from tests.on_sample import EXPERT_BYTES
from tests.reference.plain_model import PlainModel
from tests.test_plain_model import TIMINGS, outcome
from tracer.trace import Trace
from tracer.workload import Workload

# One layer, five experts, two a token. Importance is the gate weight: no norms are given.
SHAPE = shape_of(1, 5, 2)
SET_ASIDE = [([0, 1], [0.6, 0.4]), ([0, 2], [0.5, 0.5])]
TOKENS = [
    ([0, 3], [0.5, 0.3], [0.5, 0.1, 0.05, 0.3, 0.05]),
    ([3, 4], [0.4, 0.4], [0.05, 0.05, 0.1, 0.4, 0.4]),
    ([3, 1], [0.5, 0.25], [0.1, 0.25, 0.1, 0.5, 0.05]),
    ([0, 4], [0.6, 0.2], [0.6, 0.1, 0.05, 0.05, 0.2]),
    ([1, 2], [0.5, 0.5], [0.0, 0.5, 0.5, 0.0, 0.0]),
    ([1, 0], [0.5, 0.5], [0.5, 0.5, 0.0, 0.0, 0.0]),
    ([1, 2], [0.5, 0.5], [0.1, 0.4, 0.4, 0.05, 0.05]),
]


def set_aside(tokens: Any, experts: int) -> GivenFit:
    """One layer, one token a step, one request."""
    rows = np.arange(len(tokens))
    ids = np.array([ids for ids, _ in tokens])[:, None]
    weights = np.array([weights for _, weights in tokens])[:, None]
    return GivenFit(
        events=table([[list(ids)] for ids, _ in tokens], 1),
        columns={"experts": ids, "weights": weights},
        step_of_row=rows,
        request_of_row=np.zeros_like(rows),
        phase_of_row=np.ones_like(rows),
    )


def signals(tokens: Any) -> GivenSignals:
    """One layer, one token a step."""
    names = ("experts", "weights", "gate_probs")
    return GivenSignals(
        {name: [[np.array([token[index]])] for token in tokens] for index, name in enumerate(names)}
    )


def data_of(tokens: Any) -> Any:
    steps = [[list(token[0])] for token in tokens]
    return policy_data(SHAPE, steps, signals=signals(tokens), fit=set_aside(SET_ASIDE, 5)), steps


def test_swapmoe_routes_to_residents_and_exchanges_them_by_importance():
    data, steps = data_of(TOKENS)
    log: Log = []
    core = make_core("swapmoe", data, slots=3, log=log, frequency=2, decay=0.5, swaps=1)
    run_instant(core, steps)
    # Set aside: 0 has 1.1 / 2, 1 has 0.4 / 2, 2 has 0.5 / 2, twice that in the long run: 0 1 2
    # are loaded. Every token is added, then all is halved.
    assert story(log) == told("""
        0.0 | 0* 1* |         # 3 is absent; of 1 and 2 the gate likes 1 better
        1.0 | 2* 0* |         # both absent; 2, then 0 and 1 alike: the lowest
        # now 0.4 0.1 0.125 0.275 0.2: 0 3 4 are the target; one copy a step, 3 first; 1 leaves
        2.- | | -1 ~3
        2.0 | 3* 0* |         # 1 has just left; 0 and 2 alike
        3.- | | -2 ~4
        3.0 | 0* 4* |
        # now 0.4 0.0875 0.03125 0.19375 0.15: as it is
        4.0 | 0* 3* |         # 1 and 2 absent, none of the rest has a chance: the lowest
        5.0 | 3* 0* |         # 3 in the place of 1
        # now 0.35 0.396875 0.1328125 0.0484375 0.0375: 1 comes first, 4 leaves first
        6.- | | -4 ~1
        6.0 | 1* 0* |
    """)
    assert (total(core, "asked"), total(core, "changed")) == (14, 1 + 2 + 1 + 0 + 2 + 1 + 1)
    assert (total(core, "accesses"), total(core, "hits"), total(core, "misses")) == (14, 14, 0)
    # Those that stand in for others are there, and no hits: 14 asked for, 8 of them changed.
    decode = counts(core.tally, "decode")
    assert (decode["asked"], decode["hit_rate"]) == (14, 6 / 14)
    lossy = quality(core.tally, "decode")
    lost = 0.3 / 0.8 + 1 + 1 / 3 + 0 + 1 + 0.5 + 0.5
    assert lossy["retained_mass_share"] == pytest.approx(1 - lost / 7)
    assert core.tally.copies == 3
    assert core.tally.predicted == 0


def test_an_exchange_whose_slot_cannot_be_given_up_is_queued_anew():
    data, _ = data_of(TOKENS[1:2] * 4)
    core = make_core("swapmoe", data, slots=2, frequency=1, decay=0.1, swaps=1)
    state = core.memory.state
    core.step_begin(0, "decode")
    core.predictions_at_step()
    core.gate(0, [3, 4])
    core.experts_done(0)
    core.step_end()
    core.step_begin(1, "decode")
    core.predictions_at_step()
    assert state[:5] == [RESIDENT, ABSENT, RESIDENT, QUEUED, ABSENT]
    core.gate(0, [3, 4])
    # 0 and 2 stand in for 3 and 4: neither can leave while they are computed.
    assert core.next_chunk() is None
    assert state[3] == ABSENT
    assert core.tally.prefetch_dropped == 1
    core.experts_done(0)
    core.step_end()
    core.step_begin(2, "decode")
    core.predictions_at_step()
    handed = core.next_chunk()
    assert handed is not None
    assert handed[0].key == 3
    assert state[2] == ABSENT


def test_a_new_target_takes_back_what_still_waits():
    # Set aside 0 comes to 0.61 and 2 to 0.28; a token leaves a tenth of what was counted before.
    tokens = [([4, 3], [0.8, 0.1], [0.1] * 5), ([3, 1], [0.5, 0.45], [0.1] * 5)] * 2
    data, _ = data_of(tokens)
    core = make_core("swapmoe", data, slots=2, frequency=1, decay=0.1, swaps=9)
    for step in range(2):
        core.step_begin(step, "decode")
        core.predictions_at_step()
        core.gate(0, tokens[step][0])
        core.experts_done(0)
        core.step_end()
    assert [copy.key for copy in core.queue.low] == [4]
    core.step_begin(2, "decode")
    core.predictions_at_step()
    assert [copy.key for copy in core.queue.low] == [3, 1]
    assert core.tally.prefetch_cancelled == 1


def test_what_waits_and_is_still_wanted_is_left_waiting():
    data, _ = data_of(TOKENS[1:2] * 3)
    core = make_core("swapmoe", data, slots=2, frequency=1, decay=0.1, swaps=9)
    # 0 comes to 0.61 on the requests set aside: it is wanted until two tokens have aged it.
    for step, waiting in enumerate(([], [3], [3, 4])):
        core.step_begin(step, "decode")
        core.predictions_at_step()
        assert [copy.key for copy in core.queue.low] == waiting
        core.gate(0, [3, 4])
        core.experts_done(0)
        core.step_end()
    assert (core.tally.prefetch_issued, core.tally.prefetch_cancelled) == (2, 0)


def test_every_token_of_a_step_ages_what_was_counted():
    """In a prefill and in batches as in as many steps of one token."""
    tokens = np.array([[0, 1], [3, 4], [0, 4]])
    weights = np.array([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]])
    columns = {"experts": tokens, "weights": weights, "gate_probs": np.full((3, 5), 0.2)}
    given = GivenSignals({name: [[values]] for name, values in columns.items()})
    data = policy_data(SHAPE, [[[0, 1, 3, 4]]], signals=given, fit=set_aside(SET_ASIDE, 5))
    core = make_core("swapmoe", data, slots=3, decay=0.5)
    before = core.policy.cache.importance[0].copy()
    core.step_begin(0, "prefill")
    core.gate(0, [0, 1, 3, 4])
    core.experts_done(0)
    core.step_end()
    counted = np.array([0.6 + 0.7, 0.4, 0, 0.5, 0.5 + 0.3])
    assert core.policy.cache.importance[0] == pytest.approx((before + counted) * 0.5**3)


def test_a_prefill_routes_every_token_and_keeps_all_assignments():
    rng = np.random.default_rng(3)
    experts = np.argsort(rng.random((40, 8)))[:, :3]
    probs = rng.random((40, 1, 8))
    columns = {"experts": experts, "weights": probs[:, 0, :3], "gate_probs": probs[:, 0]}
    given = GivenSignals({name: [[values]] for name, values in columns.items()})
    shape = shape_of(1, 8, 3)
    steps = [[list(dict.fromkeys(experts.ravel().tolist()))]]
    data = policy_data(shape, steps, signals=given, fit=fit_of(shape))
    core = make_core("swapmoe", data, slots=4)
    core.step_begin(0, "prefill")
    wave = core.gate(0, steps[0][0])
    assert core.reassigned is not None
    assert sum(core.reassigned.values()) == 40 * 3
    assert set(wave.ready) == set(core.reassigned) == set(core.memory.residents())
    assert total(core, "gate_mass") == 40


def test_a_reset_begins_with_what_was_set_aside_again():
    data, steps = data_of(TOKENS[1:3] * 2)
    core = make_core("swapmoe", data, slots=3, frequency=1, decay=0.5, reset=True)
    run_instant(core, steps, requests=[0, 0, 0, 0])
    assert core.memory.residents() != [0, 1, 2]
    core.request_begin(1)
    assert core.memory.residents() == [0, 1, 2]


# ---------------------------------------------------------------------- routing


def brute_force(asked: list[int], probs: list[float], resident: list[bool]) -> set[int]:
    """The masked top-k, one expert after the other."""
    kept = [expert for expert in asked if expert >= 0 and resident[expert]]
    others = [e for e in range(len(probs)) if resident[e] and e not in asked]
    others.sort(key=lambda expert: (-probs[expert], expert))
    wanted = sum(expert >= 0 for expert in asked) - len(kept)
    return {*kept, *others[:wanted]}


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_one_token_and_many_are_masked_alike(seed, top_k, rows, gaps):
    rng = np.random.default_rng(seed)
    resident = rng.random(8) < 0.5
    probs = rng.integers(0, 5, (rows, 8)) / 8
    experts = np.argsort(rng.random((rows, 8)))[:, :top_k]
    weights = rng.random((rows, top_k)) + 0.1
    if gaps:
        experts[rng.random(experts.shape) < 0.3] = -1
        weights[experts < 0] = np.nan
    many = masked_top_k(experts, probs, resident)
    lost = 0.0
    for row in range(rows):
        asked = experts[row].tolist()
        arguments = (asked, weights[row].tolist(), probs[row], resident.tolist())
        chosen, share = _mask_one(*arguments)
        assert chosen == many[row].tolist()
        lost += share
        expected = brute_force(asked, probs[row].tolist(), resident.tolist())
        computed = [expert for expert in chosen if expert >= 0]
        assert set(computed) == expected
        assert len(computed) == len(expected)
    assert lost_weight(experts, weights, resident) == pytest.approx(lost)


def test_masking_is_the_top_k_of_what_is_left():
    """Where the gate's own choice is its top-k, as it is."""
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.ones(12), 50)
    resident = np.arange(12) % 3 != 1
    experts = np.argsort(-probs, 1)[:, :4]
    left = np.where(resident, probs, -1)
    masked = masked_top_k(experts, probs, resident)
    assert np.array_equal(np.sort(masked, 1), np.sort(np.argsort(-left, 1)[:, :4], 1))


def test_weights_keep_their_sum_or_are_those_of_a_masked_softmax_or_the_gates():
    probs = np.array([[0.4, 0.3, 0.2, 0.1]])
    resident = np.array([True, False, True, True])
    experts, weights, ids = np.array([[0, 1]]), np.array([[0.4, 0.3]]), np.array([[0, 2]])
    found = {
        how: masked_weights(experts, weights, ids, probs, resident, how).tolist()[0]
        for how in ("sum", "masked", "own")
    }
    assert found["own"] == pytest.approx([0.4, 0.2])
    assert found["sum"] == pytest.approx([0.7 * 0.4 / 0.6, 0.7 * 0.2 / 0.6])
    assert found["masked"] == pytest.approx([0.4 / 0.7, 0.2 / 0.7])
    # A gate that scales its weights keeps doing so.
    doubled = masked_weights(experts, 2 * weights, ids, probs, resident, "own")
    assert doubled.tolist()[0] == pytest.approx([0.8, 0.4])


def test_a_token_whose_experts_are_all_there_keeps_its_weights_to_the_bit():
    probs = np.array([[0.4, 0.3, 0.2, 0.1]])
    weights = np.array([[0.4007, 0.2998]])
    ids = np.array([[0, 1]])
    resident = np.array([True, True, True, False])
    for how in ("sum", "own"):
        kept = masked_weights(ids, weights, ids, probs, resident, how)
        assert kept.tolist() == weights.tolist()


def test_gates_that_normalise_are_told_from_those_that_do_not():
    rng = np.random.default_rng(0)
    weights = rng.random((30, 2, 3))
    assert not normalised(weights)
    weights /= weights.sum(-1, keepdims=True)
    weights[4] = np.nan
    assert normalised(weights.astype(np.float16))


# ---------------------------------------------------------------------- planning


def gates_of(layers: list[list[int]], experts: int = 4) -> Gates:
    """One expert a token, weight 1; ``layers``: by layer, the expert of each step."""
    ids = np.array(layers).T[:, :, None]
    ones = np.ones(ids.shape)
    return Gates(ids, ones, ones, np.arange(len(ids)), experts)


def test_most_and_turns():
    importance = np.array([[3.0, 1, 2, 2], [5, 9, 0, 1]])
    assert most(importance, [2, 1]).tolist() == [
        [True, False, True, False],
        [False, True, False, False],
    ]
    members = np.array([[True, True, True, False], [False, True, False, True]])
    # Layer 0: 0, 2, 1; layer 1: 5, 7.
    assert in_turn(members, importance, best_first=True) == [0, 5, 2, 7, 1]
    assert in_turn(members, importance, best_first=False) == [1, 7, 2, 5, 0]


def test_copies_are_spread_evenly_over_the_steps_that_are_left():
    assert [quota(waiting, left, 9) for waiting, left in ((5, 4), (3, 3), (2, 2), (1, 1))] == [
        2,
        1,
        1,
        1,
    ]
    assert quota(40, 2, 4) == 4


def test_routing_that_stays_is_exchanged_rarely_and_one_that_moves_often():
    steady = gates_of([[0, 1] * 400])
    assert plan_frequency(steady, [2], 0.9, 4) == max(FREQUENCIES)
    moving = gates_of([[step // 20 % 4 for step in range(800)]])
    assert plan_frequency(moving, [1], 0.7, 4) <= 4


def test_the_budget_goes_where_it_retains_most():
    # Layer 0 always asks for expert 0, layer 1 for any.
    shape = shape_of(2, 4, 1)
    ids = np.array([[[0], [step]] for step in range(4)])
    fit = GivenFit(
        events=table([[[0], [4 + step]] for step in range(4)], 2),
        columns={"experts": ids, "weights": np.ones(ids.shape)},
        step_of_row=np.arange(4),
        request_of_row=np.zeros(4, int),
        phase_of_row=np.ones(4, int),
    )
    given = GivenSignals({name: [] for name in ("experts", "weights", "gate_probs")})
    data = policy_data(shape, [], signals=given, fit=fit)
    for spread, slots in (("greedy", (1, 4)), ("dp", (1, 4)), ("even", (2, 2))):
        info = policies.get("swapmoe")
        values, options = info.parse({"slots": spread})
        plan = plan_policy(shape, info.build(values, data), options, 5 * 12, fit)
        assert plan.capacity == slots


def test_every_layer_keeps_as_many_as_a_token_takes():
    data, _ = data_of(TOKENS)
    with pytest.raises(BudgetTooSmall, match="2 slots in each of 1 layers"):
        make_core("swapmoe", data, slots=1)


def test_what_swapmoe_cannot_do_without():
    data, _ = data_of(TOKENS)
    build = policies.get("swapmoe").build
    params = policies.get("swapmoe").parse({})[0]
    lacking = replace(data, columns=frozenset({"weights"}))
    with pytest.raises(PolicyError, match="swapmoe needs the column gate_probs"):
        build(params, lacking)
    with pytest.raises(PolicyError, match="give a fit share above 0"):
        build(params, replace(data, fit=None))
    notes = build(params, data).notes
    assert len(notes) == 2
    assert "no gate_norms" in notes[0]
    assert "no norms of expert weights" in notes[1]


def test_norms_of_inputs_and_weights_count():
    """0 is asked for with most weight, 1 with the larger input, 2 has the larger weights."""
    tokens = [([0, 1], [0.6, 0.4]), ([0, 2], [0.6, 0.4])]
    fit = set_aside(tokens, 5)
    normed = replace(fit, columns={**fit.columns, "gate_norms": np.array([[9.0], [1.0]])})
    steps = [[[0, 1]]]
    given = GivenSignals(
        {name: [[np.zeros((1, 2))]] for name in ("experts", "weights", "gate_probs", "gate_norms")}
    )

    def ranked(fit: GivenFit, norms: Any) -> list[int]:
        data = policy_data(SHAPE, steps, signals=given, fit=fit, expert_norms=norms)
        if fit is not normed:
            data = replace(data, columns=data.columns - {"gate_norms"})
        core = make_core("swapmoe", data, slots=2)
        return core.memory.residents()

    assert ranked(fit, None) == [0, 1]
    assert ranked(fit, [[1.0, 1, 5, 1, 1]]) == [0, 2]
    assert ranked(normed, [[0.1, 1, 5, 1, 1]]) == [1, 2]


# ---------------------------------------------------------------------- on machines

RUNS = {
    "decode": (Case(slots=4, layers=4), {}),
    "prefill": (Case(slots=3, layers=4, prompt=9), {"chunks": 3, "frequency": 2}),
    "batch": (Case(slots=5, layers=4, batch=3, top_k=3), {"swaps": 9, "frequency": 1}),
    "window-1": (Case(slots=4, layers=4, window=1), {"frequency": 2, "swaps": 9}),
    "id-order": (Case(slots=3, layers=4, top_k=3), {"order": "id", "frequency": 1}),
    "skipped-layers": (Case(slots=4, layers=5, skip=True), {"frequency": 1, "chunks": 2}),
    "as-few-as-can-be": (Case(slots=2, layers=3), {"frequency": 1, "swaps": 9, "reset": True}),
}


def machine_core(case: Case, given: dict[str, Any]) -> Any:
    workload = Workload(make_columns(case), case.experts)
    others = Workload(make_columns(replace(case, seed=case.seed + 1)), case.experts)
    shape = make_shape(case)
    data = all_data(workload, others, shape, oracle=False)
    budget = case.slots * sum(shape.bytes_by_layer)
    return workload, make_core("swapmoe", data, budget=budget, log=[], **{"decay": 0.8, **given})


@pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)
@pytest.mark.parametrize(("case", "params"), RUNS.values(), ids=RUNS)
def test_lean_and_plain_model_agree_to_the_nanosecond(case, params, timing):
    case = replace(case, steps=24)
    workload, core = machine_core(case, params)
    plain = PlainModel(workload, core, timing, window=case.window).run()
    expected = outcome(plain, plain.link_busy_ns, core)
    assert core.tally.copies > 0
    assert total(core, "changed") > 0
    for bursts in (True, False):
        workload, core = machine_core(case, params)
        machine = Machine(workload, core, timing, window=case.window, bursts=bursts)
        machine.run()
        assert outcome(machine.times, machine.link.busy_ns, core) == expected


@given(st.integers(0, 2**32 - 1))
def test_nothing_is_ever_waited_for(seed):
    shape = shape_of(2, 6, 2)
    rng = np.random.default_rng(seed)
    steps = [
        [[layer * 6 + int(e) for e in rng.permutation(6)[:2]] for layer in range(2)]
        for _ in range(15)
    ]
    data = policy_data(shape, steps, signals=signals_of(shape, steps, seed), fit=fit_of(shape))
    core = make_core("swapmoe", data, slots=int(rng.integers(4, 13)), frequency=1, swaps=9)
    launches = run_instant(core, steps)
    assert not any(launch.landed for launch in launches)
    assert total(core, "misses") == total(core, "late") == 0
    assert all(len(launch.keys) == 2 for launch in launches)


# ---------------------------------------------------------------------- on the sample trace


def test_totals_on_the_sample_and_the_laws_they_obey():
    """Nothing is waited for, and what is copied are exchanges of one expert for another."""
    inputs = Inputs(Trace.open("sample"), fit_share=0.3)
    shared = {"hardware": "rtx4090-pcie4", "geometry": "olmoe-1b-7b", "expert_budget": "25%"}
    found, lru = (run_point(inputs, Point(policy=name, **shared)) for name in ("swapmoe", "lru"))
    decode, lossy = found["decode"], found["quality"]["decode"]
    assert decode["hits"] == decode["accesses"]
    assert decode["late"] == decode["misses"] == 0
    assert decode["accesses"] == decode["events"] * 8
    assert found["h2d_bytes"] == EXPERT_BYTES * found["copies"]
    assert found["copies"] - found["evictions"] == 0
    assert found["warm_bytes"] == EXPERT_BYTES * 256
    assert sum(found["chosen"]["slots_by_layer"]) == 256
    assert min(found["chosen"]["slots_by_layer"]) >= 8
    assert found["breakdown_ms"]["stall_miss"] == found["breakdown_ms"]["stall_late"] == 0
    assert found["tpot_ms"]["mean"] < lru["tpot_ms"]["mean"] / 5
    assert lossy["retained_mass_share"] == pytest.approx(1 - lossy["lost_mass_share"])
    assert (found["chosen"]["frequency"], decode["events"], found["copies"]) == (8, 8176, 1240)
