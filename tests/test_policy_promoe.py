"""ProMoE: its decisions by hand, its switches, and that nobody is judged on what trained it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import policies
from configs.errors import UserError
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import Prediction
from policies.memory import ABSENT, COPYING, RESIDENT
from policies.registry import register
from sim.inputs import Inputs
from sim.point import Point, inputs_for, run_point
from sim.sweeps import SweepConfig, load_config, sweep
from tests.driver import (
    EXPERT_BYTES,
    Log,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    told,
)
from tests.machines import FlatTiming, make_machine, random_workload, step_ns
from tests.traces import make_trace
from tracer.manifest import Manifest, TrainedPredictor, write_manifest
from tracer.trace import Trace

# ---------------------------------------------------------------------- by hand


def test_promoe_prefetches_two_layers_ahead_and_touches_what_it_predicts():
    shape = shape_of(4, 4)
    steps = [
        [[0], [5], [8, 10], [12]],
        [[0], [5], [9], [15]],
    ]
    # What layers 0 and 1 say of layers 2 and 3, as keys of layers 0 and 1.
    learned = [
        [[0, 1], [4, 7], [], []],
        [[2, 0], [4, 7], [], []],
    ]
    log: Log = []
    data = policy_data(shape, steps, lookahead={"learned_2": learned})
    core = make_core("promoe", data, slots=8, log=log)
    run_instant(core, steps)
    assert story(log) == told("""
        0.0 | 0 | +0 ~8 ~9        # demand before prefetch; two slots a layer
        0.1 | 5 | +5 ~12 ~15      # layers 0 and 1 are demand only
        0.2 | 8* 10 | -9 +10      # layer 2, oldest first: 8 10
        0.3 | 12* |               # layer 3, oldest first: 15 12
        1.0 | 0* |                # 10 and 8 are there: touched, so 10 8
        1.1 | 5* |                # 12 and 15 likewise
        1.2 | 9 | -10 +9          # by use alone 8 would be the oldest
        1.3 | 15* |
    """)
    tally = core.tally
    # 8 9 / 12 15 / 10 8 / 12 15, of which 8, 12 and 15 were needed.
    assert (tally.predicted, tally.predicted_right, tally.predictable) == (8, 3, 5)
    assert (tally.prefetch_issued, tally.prefetch_used) == (4, 3)
    assert tally.wasted_prefetch_bytes == EXPERT_BYTES
    assert tally.chunks == 3 * tally.copies


def test_promoe_predicts_the_union_of_a_prefill_without_throwing_out_its_own():
    # Two slots a layer; layer 1 holds 6 and 7, and 8, 9, 7, 6 are predicted, best first.
    shape = shape_of(2, 6, top_k=4)
    steps = [[[0], [6, 7]], [[0], [6, 8]]]
    learned = [[[], []], [[2, 3, 1, 0], []]]
    log: Log = []
    data = policy_data(shape, steps, lookahead={"learned_1": learned})
    core = make_core("promoe", data, slots=4, stride=1, log=log)
    run_instant(core, steps)
    assert story(log) == told("""
        0.0 | 0 | +0
        0.1 | 6 7 | +6 +7
        1.0 | 0* |                # 7, then 6 are touched and fill the room: 8 and 9 stay out
        1.1 | 6* 8 | -7 +8        # touched in the order 6 8: 7 is the oldest
    """)


# ---------------------------------------------------------------------- chunk by chunk

LEARNED = {"learned_1": [[[], []]] * 3}


def gated(**given: Any) -> DecisionCore:
    """Layer 0 of step 0 is done; two layers of four, keys 0-3 and 4-7."""
    shape = shape_of(2, 4)
    data = policy_data(shape, [[[], []]] * 3, lookahead=LEARNED)
    core = make_core("promoe", data, **{"slots": 6, "stride": 1, **given})
    core.step_begin(0, "decode")
    core.gate(0, [])
    return core


def predict(core: DecisionCore, keys: Sequence[int]) -> None:
    core.prediction_ready(Prediction("learned", core.step, 1, keys))


def land(core: DecisionCore, chunks: int) -> list[int]:
    """Copy so many chunks, one after the other; the experts they belong to."""
    moved = []
    for _ in range(chunks):
        handed = core.next_chunk()
        assert handed is not None
        assert handed[1] == EXPERT_BYTES // 3
        core.chunk_done(handed[0])
        moved.append(handed[0].key)
    return moved


def low(core: DecisionCore) -> list[int]:
    return [copy.key for copy in core.queue.low]


def high(core: DecisionCore) -> list[int]:
    return [copy.key for copy in core.queue.high]


def next_step(core: DecisionCore) -> None:
    core.experts_done(1)
    core.step_end()
    core.step_begin(core.step + 1, "decode")
    core.gate(0, [])


def test_the_gate_asks_for_those_with_most_chunks_ready_first_and_resumes_them():
    core = gated()
    predict(core, [6, 4])
    assert land(core, 2) == [6, 6]
    wave = core.gate(1, [7, 4, 6])
    assert (wave.ready, wave.waiting, wave.order) == ([], 3, None)
    # 6 lacks a chunk; 7 and 4 lack all three: in touch order.
    assert high(core) == [6, 7, 4]
    assert land(core, 7) == [6, 7, 7, 7, 4, 4, 4]
    assert [copy.key for copy in core.landed] == [6, 7, 4]


def test_order_id_asks_in_the_order_of_ids():
    core = gated(order="id")
    predict(core, [6, 4])
    land(core, 2)
    wave = core.gate(1, [7, 4, 6])
    assert wave.order == [4, 6, 7]
    assert high(core) == [4, 6, 7]


def test_waves_take_the_most_complete_first():
    # Three slots; 5 is resident, 7 lacks one chunk, 6 lacks two, 4 was not predicted.
    core = gated()
    core.gate(1, [5])
    land(core, 3)
    next_step(core)
    predict(core, [7])
    land(core, 1)
    predict(core, [6])
    low_7, low_6 = core.queue.low
    core.queue.low[:] = [low_6]
    land(core, 1)
    core.queue.low[:] = [low_6, low_7]
    land(core, 0)
    core.queue.low[:] = [low_7, low_6]
    land(core, 1)
    wave = core.gate(1, [4, 6, 7, 5])
    assert wave.ready == [5]
    assert (wave.waiting, wave.last) == (2, False)
    assert high(core) == [7, 6]
    assert land(core, 3) == [7, 6, 6]
    wave = core.next_wave()
    assert (wave.ready, wave.waiting, wave.last) == ([], 1, True)
    assert high(core) == [4]


def test_preemption_drops_the_layers_low_tasks_and_keeps_half_an_expert():
    core = gated()
    predict(core, [5, 6])
    assert land(core, 1) == [5]
    core.gate(1, [4])
    state = core.memory.state
    assert (low(core), high(core)) == ([], [4])
    assert (state[5], state[6]) == (COPYING, ABSENT)
    assert core.tally.prefetch_cancelled == 2
    land(core, 3)
    next_step(core)
    # Predicted again, 5 goes first although 6 is the better guess: two chunks are left.
    predict(core, [6, 5])
    assert low(core) == [5, 6]
    assert land(core, 3) == [5, 5, 6]
    assert state[5] == RESIDENT
    assert core.tally.copied_bytes == 2 * EXPERT_BYTES


def test_without_preemption_wrong_predictions_stay_queued_behind_the_demand():
    core = gated(preempt=False)
    predict(core, [5, 6])
    land(core, 1)
    core.gate(1, [4])
    assert (low(core), high(core)) == ([5, 6], [4])
    assert land(core, 6) == [4, 4, 4, 5, 5, 6]
    assert core.tally.prefetch_cancelled == 0


@pytest.mark.parametrize(("predicted", "leaves"), [([5], 4), ([], 5)])
def test_a_partly_copied_expert_is_touched_by_being_predicted(predicted, leaves):
    core = gated(slots=4, log=[])
    predict(core, [5])
    land(core, 2)
    core.gate(1, [4])
    land(core, 3)
    next_step(core)
    # Layer 1 is full of 5, begun first, and 4.
    if predicted:
        predict(core, predicted)
    else:
        core.prefetch(1, [5])  # resumed, and nobody touched
    land(core, 1)
    core.gate(1, [6])
    land(core, 3)
    assert core.log is not None
    assert [entry[3] for entry in core.log if entry[0] == "evict"] == [leaves]


# ---------------------------------------------------------------------- switches


def test_its_own_defaults_of_common_options_give_way_to_what_is_set():
    assert policies.get("promoe").parse({})[1].chunks == 3
    assert policies.get("promoe").parse({"chunks": "1"})[1].chunks == 1
    assert policies.get("lru").parse({})[1].chunks == 1
    with pytest.raises(RuntimeError, match="speed is no common option"):
        register("fast", defaults={"speed": 1})(lambda params, data: None)
    assert "fast" not in policies.names()


def test_all_off_it_is_lru_in_the_order_of_ids():
    shape = shape_of(3, 6)
    steps = [[[0, 1], [6, 8], [13, 12]], [[2, 0], [7, 8], [14, 12]], [[1, 5], [6, 9], [12, 13]]] * 3
    data = policy_data(shape, steps)
    off = {"prefetch": False, "preempt": False, "order": "id"}
    logs: list[Log] = [[], []]
    for name, given, log in [("promoe", off, logs[0]), ("lru", {"order": "id"}, logs[1])]:
        run_instant(make_core(name, data, slots=9, log=log, **given), steps)
    assert logs[0] == logs[1]
    assert story(logs[0]).count("-") > 5


def test_without_its_column_it_says_how_to_train_one():
    data = policy_data(shape_of(3, 4), [], lookahead={"learned_1": []})
    with pytest.raises(PolicyError, match=r"column learned_2, .*train-predictor --trace DIR --str"):
        make_core("promoe", data, slots=6)
    make_core("promoe", data, slots=6, prefetch=False)
    assert policies.get("promoe").all_columns({"prefetch": False, "stride": 2}) == ()


def test_a_predictor_that_is_too_slow_brings_nothing():
    work = random_workload(8, layers=4, steps=15, prompt=3)
    runs = []
    for given in ({}, {"prefetch": False}):
        timing = FlatTiming(predictor_ns={"learned": 10**9})
        machine = make_machine(work, "promoe", timing, **given)
        machine.run()
        assert machine.core.tally.prefetch_issued == 0
        runs.append(step_ns(machine))
    assert runs[0] == runs[1]
    quick = make_machine(work, "promoe", FlatTiming(predictor_ns={"learned": 5}))
    quick.run()
    assert quick.core.tally.prefetch_used > 0


# ---------------------------------------------------------------------- who trained, who is judged


def trained_trace(path: Path, trained: Sequence[int] | None) -> Trace:
    """Six requests, of which ``trained`` trained ``learned_2``; None: nobody knows."""
    trace = make_trace(
        path, layers=4, requests=6, prompt=4, output=10, columns=("lookahead_1", "learned_2")
    )
    if trained is None:
        return trace
    write_manifest(path, with_predictor(trace.manifest, trained))
    return Trace.open(path)


def with_predictor(manifest: Manifest, trained: Sequence[int]) -> Manifest:
    predictor = TrainedPredictor(
        column="learned_2",
        kind="promoe",
        stride=2,
        hidden_units=64,
        seed=0,
        trained_requests=tuple(trained),
        weights_file="predictors/promoe_s2.safetensors",
        weights_sha256="0" * 64,
    )
    return manifest.model_copy(update={"predictors": (predictor,)})


def point(policy: str = "promoe", **changes: Any) -> Point:
    return Point(
        **{"policy": policy, "hardware": "rtx4090-pcie4", "expert_budget": "50%", **changes}
    )


def requests_of(inputs: Inputs) -> set[int]:
    return set(inputs.workload().request_of_row.tolist())


def test_requests_that_trained_are_not_judged(tmp_path):
    trace = trained_trace(tmp_path / "t", [0, 3, 4])
    inputs = inputs_for(trace, point())
    fit = inputs.fit()
    assert fit is not None
    assert requests_of(inputs) == set(inputs.judged) == {1, 2, 5}
    assert set(fit.request_of_row.tolist()) == set(inputs.fitted_on) == {0, 3, 4}
    result = run_point(inputs, point())
    assert result["requests"] == 3
    facts = result["trace"]
    assert (facts["judged_requests"], facts["fitted_requests"]) == (3, 3)
    assert facts["set_aside_for"] == "they trained learned_2"
    assert result["notes"] == [
        "3 of 6 requests trained learned_2: they are set aside, and the other 3 are judged"
    ]


def test_a_fit_share_applies_only_where_nobody_trained(tmp_path):
    trace = trained_trace(tmp_path / "t", [0, 3, 4])
    assert inputs_for(trace, point(fit_share=0.9)).judged == [1, 2, 5]
    assert inputs_for(trace, point("static", learned=("learned_2",))).judged == [1, 2, 5]
    plain = inputs_for(trace, point("static"))
    assert (plain.fitted_on, plain.set_aside_for) == ([3], "fit share 0.3")
    assert inputs_for(trace, point("lru")).set_aside_for is None
    assert inputs_for(trace, point(params={"prefetch": False})).fitted_on == []
    nobody = trained_trace(tmp_path / "nobody", [])
    assert inputs_for(nobody, point()).judged == list(range(6))
    assert inputs_for(nobody, point(fit_share=0.5)).set_aside_for == "fit share 0.5"


def test_a_column_whose_training_is_unknown_is_refused(tmp_path):
    trace = trained_trace(tmp_path / "t", None)
    with pytest.raises(UserError, match=r"column learned_2: .* which requests .*apply-predictor"):
        inputs_for(trace, point())
    with pytest.raises(UserError, match="column learned_2"):
        sweep(config(tmp_path / "t"))


def test_somebody_must_be_left_to_judge(tmp_path):
    trace = trained_trace(tmp_path / "t", range(6))
    with pytest.raises(UserError, match=r"all 6 requests .*--test-share.*apply-predictor"):
        inputs_for(trace, point())
    first = trained_trace(tmp_path / "first", [0])
    with pytest.raises(UserError, match=r"all 1 requests .*--max-tokens"):
        inputs_for(first, point(max_tokens=5))


def test_inputs_that_would_judge_the_trained_are_refused(tmp_path):
    trace = trained_trace(tmp_path / "t", [0, 3, 4])
    with pytest.raises(UserError, match=r"3 of the judged requests trained .*learned=\['learned_2"):
        run_point(Inputs(trace), point())
    with pytest.raises(UserError, match="2 of the judged requests"):
        run_point(Inputs(trace, fit_share=0.4), point())  # 1 and 4 are set aside


def config(trace: Path, *names: str) -> SweepConfig:
    return SweepConfig(
        trace=str(trace),
        policies=names or ("static", "lru", "promoe"),
        hardware=("rtx4090-pcie4",),
        expert_budgets=("50%",),
    )


def test_a_sweep_judges_all_policies_on_those_who_trained_nothing(tmp_path):
    trained_trace(tmp_path / "t", [0, 3, 4])
    alone, shared = (sweep(config(tmp_path / "t"), jobs=jobs) for jobs in (1, 2))
    assert alone.equals(shared)
    assert (alone["status"] == "ok").all()
    assert alone["trace.judged_requests"].tolist() == alone["trace.fitted_requests"].tolist()
    assert alone["trace.judged_requests"].tolist() == [3, 3, 3]
    assert set(alone["point.learned"]) == {'["learned_2"]'}
    assert alone["decode.accesses"].nunique() == 1


def test_a_resumed_sweep_sets_the_same_requests_aside(tmp_path):
    """Of what is left to run none reads the column."""
    trained_trace(tmp_path / "t", [0, 3, 4])
    whole = sweep(config(tmp_path / "t"), out=tmp_path / "out")
    points = tmp_path / "out" / "points.jsonl"
    kept = [line for line in points.read_text().splitlines() if '"policy": "promoe"' in line]
    assert len(kept) == 1
    points.write_text(kept[0] + "\n")
    again = sweep(config(tmp_path / "t"), out=tmp_path / "out", jobs=2)
    assert again.equals(whole)


def test_a_sweep_over_a_trace_without_the_column_runs_the_others_on_all(tmp_path):
    make_trace(tmp_path / "t", layers=4, requests=6)
    frame = sweep(config(tmp_path / "t", "lru", "promoe"))
    assert frame["status"].tolist() == ["ok", "failed"]
    assert "train-predictor" in frame.loc[1, "error"]
    assert frame.loc[0, "trace.judged_requests"] == 6


def test_the_ablation_is_one_sweep(tmp_path):
    trained_trace(tmp_path / "t", [0, 3, 4])
    chosen = load_config("promoe-ablation").model_copy(update={"geometry": None})
    frame = sweep(chosen, trace=Trace.open(tmp_path / "t"))
    assert (frame["status"] == "ok").all()
    assert len(frame) == 8 * 3
    issued = frame.groupby("label", sort=False)["prefetch.issued"].sum()
    assert issued.index.tolist() == [
        "promoe order=id preempt=False prefetch=False",
        "promoe order=id preempt=False",
        "promoe order=id",
        "promoe",
        "promoe prefetch=False",
        "lru",
        "next-gate chunks=3",
        "next-gate",
    ]
    assert (issued > 0).tolist() == [False, True, True, True, False, False, True, True]


# ---------------------------------------------------------------------- the sample


SAMPLE = {"geometry": "olmoe-1b-7b", "expert_budget": "25%", "max_tokens": 700}
ORDERED = {"preempt": False, "order": "id"}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return inputs_for(Trace.open("sample"), point(**SAMPLE))


@pytest.fixture(scope="module")
def results(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The paper's ablation."""
    given = {
        "lru, by id": {"prefetch": False, **ORDERED},
        "+ prefetch": ORDERED,
        "+ preemption": {"order": "id"},
        "+ reordering": {},
    }
    return {
        name: run_point(inputs, point(params=params, **SAMPLE)) for name, params in given.items()
    }


#: hits, late, misses, copies, chunks, prefetched experts that were used
GOLDEN = {
    "lru, by id": (28957, 0, 29894, 30624, 91872, 0),
    "+ prefetch": (29128, 18363, 11360, 35037, 105123, 4202),
    "+ preemption": (29375, 18069, 11407, 31308, 93940, 6180),
    "+ reordering": (29445, 18022, 11384, 30353, 91059, 6179),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_totals_on_the_sample_and_the_laws_they_obey(inputs, results, name):
    found = results[name]
    phases = [found["decode"], found["prefill"]]
    for phase in phases:
        assert phase["accesses"] == phase["hits"] + phase["late"] + phase["misses"]
    assert sum(phase["accesses"] for phase in phases) == inputs.workload().num_accesses
    expert_bytes = 3 * 2048 * 1024 * 2
    assert found["h2d_bytes"] % (expert_bytes // 3) == 0
    assert found["copies"] * expert_bytes <= found["h2d_bytes"]
    assert found["evictions"] >= found["copies"] - 16 * 64 // 4
    totals = [sum(phase[count] for phase in phases) for count in ("hits", "late", "misses")]
    chunks = found["h2d_bytes"] // (expert_bytes // 3)
    assert (*totals, found["copies"], chunks, found["prefetch"]["used"]) == GOLDEN[name]


def test_each_part_of_the_ablation_brings_something_on_the_sample(results):
    lru, prefetch, preempt, whole = results.values()
    assert whole["collision_misses"] == 0 < preempt["collision_misses"]
    assert whole["ttft_ms"]["mean"] < 0.95 * preempt["ttft_ms"]["mean"]
    assert preempt["h2d_bytes"] < prefetch["h2d_bytes"]
    assert preempt["tpot_ms"]["mean"] < prefetch["tpot_ms"]["mean"]
    assert whole["tpot_ms"]["mean"] < lru["tpot_ms"]["mean"]
