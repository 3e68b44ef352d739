"""The lean model and the plain one follow docs/contract.md to the same nanosecond."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import load_geometry, load_hardware
from policies.core import ORDERS, DecisionCore
from policies.interface import Shape, Tally
from sim.machine import Machine
from sim.tape import can_record, play, record
from sim.timing import HostCosts, LinkCosts, RooflineTiming, Timing
from tests.cases import (
    HOST,
    Case,
    OddTiming,
    make_columns,
    make_core,
    make_shape,
)
from tests.reference.plain_model import PlainModel, PlainResult
from tracer.workload import Workload

Run = Callable[..., dict[str, Any]]


def _with_host(timing: OddTiming, **costs_ns: int) -> OddTiming:
    return replace(timing, host=replace(timing.host, **costs_ns))


def outcome(result: Any, link_busy_ns: int, core: DecisionCore) -> dict[str, Any]:
    """All that must agree: times, tally, decisions in order, landings in order."""
    names = ("begin", "end", "segments", "experts", "stall_late", "stall_miss", "stall_cpu")
    figures = {name: list(getattr(result, name)) for name in names}
    log = core.log or []
    return {
        **figures,
        "link_busy_ns": link_busy_ns,
        "tally": core.tally,
        "decisions": [entry for entry in log if entry[0] != "landed"],
        "landings": [entry for entry in log if entry[0] == "landed"],
    }


def run_lean(
    case: Case, timing: Timing, shape: Shape | None = None, *, bursts: bool = True
) -> dict[str, Any]:
    workload = Workload(make_columns(case), case.experts)
    core = make_core(case, workload, shape or make_shape(case))
    machine = Machine(workload, core, timing, window=case.window, bursts=bursts)
    machine.run()
    return outcome(machine.times, machine.link.busy_ns, core)


def run_plain(case: Case, timing: Timing, shape: Shape | None = None) -> dict[str, Any]:
    workload = Workload(make_columns(case), case.experts)
    core = make_core(case, workload, shape or make_shape(case))
    result: PlainResult = PlainModel(workload, core, timing, window=case.window).run()
    return outcome(result, result.link_busy_ns, core)


def run_tape(case: Case, timing: Timing, shape: Shape | None = None) -> dict[str, Any] | None:
    """Decisions first, then their times; None where the decisions may depend on time."""
    workload = Workload(make_columns(case), case.experts)
    core = make_core(case, workload, shape or make_shape(case))
    if case.watching or not can_record(core):
        return None
    tape = record(workload, core)
    play(tape, workload, timing, window=case.window + 1)
    timed = play(tape, workload, timing, window=case.window)
    return outcome(timed.times, timed.link_busy_ns, core)


def assert_same(
    case: Case,
    timing: Timing,
    shape: Shape | None = None,
    *,
    with_bursts: tuple[bool, ...] = (True, False),
) -> Tally:
    """The lean model, with and without its short cuts, agrees with the plain one on everything."""
    plain = run_plain(case, timing, shape)
    for bursts in with_bursts:
        lean = run_lean(case, timing, shape, bursts=bursts)
        for name, figures in plain.items():
            assert lean[name] == figures, (name, bursts)
    taped = run_tape(case, timing, shape)
    if taped is not None:
        for name, figures in plain.items():
            assert taped[name] == figures, (name, "tape")
    return cast(Tally, plain["tally"])


# ---------------------------------------------------------------------- worked by hand

BY_HAND = OddTiming(
    HostCosts(
        segment_launch_ns=2,
        experts_launch_ns=3,
        readback_ns=4,
        decision_ns=5,
        copy_issue_ns=6,
        step_ns=7,
    ),
    LinkCosts(10**9, startup_ns=8, gap_ns=1),
    segment=17,
    experts=7,
    head=9,
    experts_slowdown_ppm=500_000,
)


MODELS = pytest.mark.parametrize("run", [run_lean, run_plain, run_tape])


@MODELS
def test_two_misses_through_a_window_of_one(run: Run) -> None:
    # Host: step work until 7, segment launched at 9, runs until 29, read back at 33, decided at 38.
    # First chunk handed over at 44, lands at 44 + 8 + 17 = 69; second named at 69, handed over at
    # 75, lands at 75 + 8 + 17 = 100. The spin from 44 ends at 75: kernel 78 to 88, of which it runs
    # 78 to 88 beside the copy: 15 long, 78 to 93. The spin from 78 ends at 100: kernel 103 to 113.
    # Head launched at 105, runs 113 to 123, read back at 127.
    figures = run(Case(window=1, layers=1, slots=2, steps=2), BY_HAND)
    assert figures["end"][0] == 127
    assert figures["segments"][0] == 20 + 10
    assert figures["experts"][0] == 15 + 10
    assert figures["stall_miss"][0] == (69 - 44) + (100 - 93)
    assert figures["stall_late"][0] == 0


@MODELS
def test_two_misses_through_a_window_of_two(run: Run) -> None:
    # As above until 38. Handed over at 44 and 50; they land at 44 + 8 + 17 = 69 and, back to back,
    # 69 + 1 + 17 = 87. The spin from 50 ends at 69: kernel from 72, 10 long, beside the copy 15, so
    # until 87. The spin from 72 ends at 87, the GPU is dry just then: kernel 90 to 100. Head
    # launched at 92, runs 100 to 110, read back at 114.
    figures = run(Case(window=2, layers=1, slots=2, steps=2), BY_HAND)
    assert figures["end"][0] == 114
    assert figures["segments"][0] == 20 + 10
    assert figures["experts"][0] == 15 + 10
    assert figures["stall_miss"][0] == 69 - 50


@MODELS
def test_the_host_takes_time_for_each_awaited_expert_and_each_landing(run: Run) -> None:
    # As above, but decided at 40. Handed over at 46 and 52; landed at 71 and 89. The spin from 52
    # ends at 71, the host goes on at 73: kernel from 76, beside the copy until 89, when 8 of its 10
    # are done, so until 91. The spin from 76 ends at 89, when the GPU is still busy; the host goes
    # on at 91: kernel 94 to 104. Head launched at 96, runs 104 to 114, read back at 118.
    timing = replace(BY_HAND, host=replace(BY_HAND.host, awaited_ns=1, landing_ns=2))
    figures = run(Case(window=2, layers=1, slots=2, steps=2), timing)
    assert figures["end"][0] == 118
    assert figures["experts"][0] == 15 + 10
    assert figures["stall_miss"][0] == 71 - 52


@pytest.mark.parametrize("run", [run_lean, run_plain])
def test_the_host_is_busy_with_a_finished_prediction(run: Run) -> None:
    """It names what it names at once; the hand-over and the end of the spin wait for the host."""
    case = Case(policy="accuracy-q", params={"q": 1.0}, layers=2, slots=4, prompt=0, steps=6)
    # Finished long before the GPU is, and long after it was: within a wait either way.
    for predictor_ns in (12, 30):
        quick = replace(BY_HAND, predictor_ns={"next_gate": predictor_ns})
        slow = replace(quick, host=replace(quick.host, prediction_ns=1_000))
        found, longer = run(case, quick), run(case, slow)
        predicted = 5  # of the second layer, in each step but the first, which all misses fill
        assert longer["end"][-1] - found["end"][-1] >= predicted * 900
        assert longer["tally"].prefetch_issued > 0


@MODELS
def test_a_launch_takes_longer_for_each_expert_and_in_a_step_of_many_tokens(run: Run) -> None:
    # One layer whose two experts are there in the second step. Step work 7, segment launched at 9,
    # runs until 29, read back at 33, decided at 38, launched at 41 + 10: kernel of 7 + 2 * 2 + 2
    # until 64. Head launched at 53, runs 64 to 74, read back at 78.
    timing = replace(BY_HAND, host=replace(BY_HAND.host, launch_each_ns=10))
    figures = run(Case(window=2, layers=1, slots=2, steps=2, experts=2), timing)
    assert figures["end"][1] - figures["end"][0] == 78
    slow = replace(timing, many_tokens=replace(timing.host, launch_each_ns=11))
    assert run(Case(window=2, layers=1, slots=2, steps=2, experts=2), slow) == figures


# ---------------------------------------------------------------------- chosen cases

DELAYED = {"oracle": 23, "next_gate": 31, "map_search": 37, "learned": 43}
SLOW = OddTiming(
    segment_slowdown_ppm=130_000,
    experts_slowdown_ppm=1_000_003,
    cpu_slowdown_ppm=250_000,
    link_slowdown_cpu_ppm=500_000,
)
TIMINGS = {
    "even": OddTiming(),
    "slowdown": SLOW,
    "delayed": OddTiming(predictor_ns=DELAYED),
    "delayed-slowdown": replace(SLOW, predictor_ns=DELAYED),
    "slow-host": OddTiming(HostCosts(9, 8, 5, 13, 10, 41, next_wave_ns=6), predictor_ns=DELAYED),
    "slow-planning": replace(
        SLOW, host=HostCosts(4, 3, 5, 6, 4, 7, prediction_ns=17), predictor_ns=DELAYED
    ),
    "by-size": OddTiming(
        replace(HOST, launch_each_ns=2, awaited_ns=3, landing_ns=4, cpu_start_ns=5),
        predictor_ns=DELAYED,
        experts_slowdown_ppm=90_000,
        ppm_each=170_000,
        many_tokens=HostCosts(
            9, 8, 5, 13, 10, 41, launch_each_ns=1, awaited_ns=2, landing_ns=6, cpu_start_ns=7
        ),
    ),
    "fast-gpu": OddTiming(HostCosts(1, 1, 1, 1, 1, 1), segment=1, experts=1, predictor_ns=DELAYED),
}
CASES = {
    "lru": Case(),
    "lru-window-1": Case(window=1, params={"chunks": 3}),
    "lru-window-3": Case(window=3, params={"chunks": 3}, steps=20),
    "lru-id-order": Case(params={"order": "id"}, top_k=3, slots=4),
    "lru-touch-order": Case(params={"order": "touch", "chunks": 2}, top_k=3, slots=4),
    "lru-uneven": Case(uneven=True, layers=4),
    "lru-global": Case(policy="lru-global", slots=2.5, uneven=True),
    "belady": Case(policy="belady", steps=20),
    "belady-bypass": Case(policy="belady-bypass", slots=5, top_k=3, steps=20),
    "static": Case(policy="static", slots=4, params={"chunks": 2}),
    "on-demand": Case(policy="on-demand", slots=1, layers=4, params={"chunks": 3}),
    "waves": Case(slots=2, top_k=4, params={"chunks": 2}),
    "waves-id-order": Case(slots=2, top_k=4, params={"order": "id"}),
    "waves-prefill": Case(slots=3, prompt=9, batch=2),
    "waves-staging": Case(policy="belady-bypass", slots=2, prompt=9, params={"staging_slots": 2}),
    "batch": Case(batch=3, slots=5, top_k=3, params={"chunks": 2}),
    "skipped-layers": Case(skip=True, layers=4, steps=20),
    "reset": Case(params={"reset": True}, steps=16),
    "oracle": Case(policy="oracle-prefetch", params={"chunks": 2}),
    "oracle-reset": Case(policy="oracle-prefetch", params={"reset": True, "depth": 2}, slots=4),
    "oracle-skipped": Case(policy="oracle-prefetch", params={"depth": 2}, skip=True, layers=4),
    "cpu": Case(cpu=True, top_k=3, slots=4),
    "cpu-waves": Case(cpu=True, top_k=4, slots=2, params={"chunks": 2}),
    "cpu-id-order": Case(cpu=True, top_k=3, slots=4, params={"order": "id"}),
    "cpu-prefetch": Case(policy="accuracy-q", cpu=True, slots=4, params={"depth": 2, "q": 0.3}),
}
CASES |= {
    "score-ema": Case(policy="score-ema", batch=2, slots=4),
    "reuse-distance": Case(policy="reuse-distance", steps=20),
    "mixtral-offloading": Case(policy="mixtral-offloading", params={"chunks": 2}, layers=4),
    "promoe": Case(policy="promoe", slots=4, top_k=3, steps=20, layers=4),
    "promoe-waves": Case(policy="promoe", params={"stride": 1}, slots=3, prompt=9, batch=2),
    "promoe-unpreempted": Case(
        policy="promoe", params={"order": "id", "preempt": False}, slots=4, top_k=3, batch=2
    ),
    "edgemoe": Case(policy="edgemoe", params={"chunks": 2}, steps=20, batch=2, layers=4),
    "moe-infinity": Case(policy="moe-infinity", steps=20, batch=2, layers=4),
    "finemoe": Case(policy="finemoe", params={"chunks": 2}, steps=20, batch=2, layers=5),
    "pregated": Case(policy="pregated", params={"chunks": 3}, layers=4, prompt=5, slots=2),
    "pregated-skipped": Case(policy="pregated", skip=True, layers=4, steps=20, slots=2),
    "layer-stream": Case(policy="layer-stream", window=3, layers=5, batch=2),
    "fiddler": Case(policy="fiddler", slots=4, steps=20),
    "fiddler-prefill": Case(policy="fiddler", slots=4, prompt=9, params={"chunks": 2}),
    "hybrid-split": Case(policy="hybrid-split", slots=4, top_k=4, steps=20),
    "hybrid-split-waves": Case(policy="hybrid-split", slots=2, prompt=9, batch=2),
    "hobbit": Case(policy="hobbit", slots=4, top_k=3, steps=20, uneven=True),
    "hobbit-batch": Case(policy="hobbit", slots=4, prompt=5, batch=3, params={"chunks": 2}),
    "auto": Case(policy="auto", slots=4, top_k=3, steps=20, layers=4),
    "auto-batch": Case(policy="auto", slots=4, prompt=9, batch=3, steps=20, layers=4),
    "auto-skipped": Case(policy="auto", skip=True, layers=4, steps=20, params={"chunks": 1}),
    "layer-stream-skipped": Case(policy="layer-stream", skip=True, layers=4),
}
CASES |= {
    f"accuracy-depth-{depth}-chunks-{chunks}-window-{window}": Case(
        policy="accuracy-q",
        params={"depth": depth, "chunks": chunks, "q": 0.7},
        window=window,
        layers=4,
        slots=4,
    )
    for depth in (1, 2, 3)
    for chunks in (1, 3)
    for window in (1, 2, 3)
}


@pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same(case: Case, timing: OddTiming) -> None:
    assert_same(case, timing)


def test_the_chosen_cases_cover_what_they_claim() -> None:
    timing = TIMINGS["delayed-slowdown"]
    tallies = {name: run_plain(case, timing)["tally"] for name, case in CASES.items()}
    total = {name: _totals(tally) for name, tally in tallies.items()}
    cacheless = ("on-demand", "pregated", "layer-stream")
    cached = [counts for name, counts in total.items() if not name.startswith(cacheless)]
    assert all(counts["hits"] for counts in cached)
    streamed = total.pop("layer-stream")
    assert streamed["late"]
    assert all(counts["misses"] for counts in total.values())
    for name in ("waves", "waves-id-order", "waves-prefill", "waves-staging", "cpu-waves"):
        assert total[name]["waves"] > total[name]["events"], name
    on_cpu = [name for name in CASES if name.startswith(("cpu", "fiddler", "hybrid-split"))]
    for name in on_cpu:
        assert total[name]["cpu"], name
    late = [counts["late"] for name, counts in total.items() if name.startswith("accuracy")]
    assert sum(late) > 50
    assert any(tally.collision_misses for tally in tallies.values())
    assert any(tally.prefetch_cancelled for tally in tallies.values())


def _totals(tally: Tally) -> dict[str, int]:
    names = ("hits", "late", "misses", "cpu", "waves", "events")
    buckets = tally.buckets.values()
    return {name: sum(getattr(bucket, name) for bucket in buckets) for name in names}


# ---------------------------------------------------------------------- one clause each

ONES = HostCosts(1, 1, 1, 1, 1, 1)
TICK = OddTiming(ONES, LinkCosts(10**9, 1, 1), segment=1, experts=1, head=1, cpu=1)
ONE_LAYER = Case(slots=2, layers=1, top_k=1, steps=2, prompt=5)
TWO_LAYERS = replace(ONE_LAYER, layers=2)
CLAUSES = {
    "a step's last kernels are booked in that step": (replace(ONE_LAYER, prompt=0), TICK),
    "step_begin comes after the step's host work": (
        replace(TWO_LAYERS, policy="oracle-prefetch", prompt=0),
        _with_host(TICK, step_ns=10),
    ),
    "a busy host names no chunk before its spin begins": (
        Case(policy="oracle-prefetch", layers=2, top_k=3, steps=2, seed=2, params={"chunks": 2}),
        replace(TICK, host=HostCosts(16, 16, 1, 4, 22, 26), segment=20, experts=15),
    ),
    "a spin lasts until the hand-over under way ends": (
        replace(ONE_LAYER, params={"chunks": 3}),
        _with_host(TICK, copy_issue_ns=7),
    ),
    "a copy that starts before the CPU group is not slowed": (
        replace(ONE_LAYER, cpu=True),
        replace(_with_host(TICK, copy_issue_ns=18), link_slowdown_cpu_ppm=130_000),
    ),
    "a spin for a CPU group that is done still refills": (
        replace(TWO_LAYERS, policy="oracle-prefetch", slots=3, cpu=True, params={"reset": True}),
        _with_host(TICK, copy_issue_ns=17),
    ),
    "a spin for the CPU lasts until the hand-over under way ends": (
        replace(
            TWO_LAYERS,
            policy="accuracy-q",
            top_k=2,
            batch=3,
            prompt=0,
            cpu=True,
            params={"q": 1.0, "chunks": 3, "preempt": False},
        ),
        _with_host(TICK, copy_issue_ns=7),
    ),
    "a strict order launches what is there before it spins": (
        replace(TWO_LAYERS, policy="lru-global", params={"order": "touch"}),
        _with_host(TICK, copy_issue_ns=18),
    ),
    "a prediction finished as a landing ends the spin takes effect in it": (
        replace(
            TWO_LAYERS, policy="accuracy-q", window=1, prompt=0, params={"q": 1.0, "wrap": True}
        ),
        replace(TICK, link=LinkCosts(7 * 10**8, 1, 1), predictor_ns={"next_gate": 15}),
    ),
    "a prediction comes before the refill of a chunk that lands at the same instant": (
        replace(TWO_LAYERS, policy="accuracy-q", window=1, params={"q": 1.0, "chunks": 2}),
        replace(TICK, predictor_ns={"next_gate": 43}),
    ),
    "a landing is told before a prediction that finishes at the same instant": (
        Case(
            policy="oracle-prefetch",
            params={"order": "id", "cache": "lfu"},
            slots=5.5,
            window=3,
            layers=2,
            top_k=3,
            steps=6,
            batch=3,
            uneven=True,
        ),
        replace(
            TICK,
            host=HostCosts(1, 4, 5, 3, 13, 1),
            link=LinkCosts(10**9, 7, 3),
            experts=23,
            segment_slowdown_ppm=130_000,
            predictor_ns={"oracle": 32},
        ),
    ),
    "a spin refills places that came free while the host was busy": (
        Case(
            policy="oracle-prefetch",
            params={"order": "id", "chunks": 2},
            layers=2,
            steps=2,
            batch=2,
            seed=3,
        ),
        replace(
            TICK,
            host=HostCosts(5, 39, 1, 6, 3, 5),
            link=LinkCosts(10**9, 2, 1),
            segment=10,
            experts=16,
            head=6,
            predictor_ns={"oracle": 16},
        ),
    ),
    "the last copy in flight lands while the host launches": (
        Case(
            policy="accuracy-q",
            params={"order": "touch"},
            window=1,
            layers=2,
            steps=2,
            seed=2,
        ),
        replace(
            TICK,
            host=HostCosts(3, 37, 2, 1, 23, 1),
            segment=19,
            experts=4,
            head=8,
            predictor_ns={"next_gate": 1},
        ),
    ),
}


@pytest.mark.parametrize(("case", "timing"), CLAUSES.values(), ids=CLAUSES)
def test_clause(case: Case, timing: OddTiming) -> None:
    assert_same(case, timing)


@pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)
def test_a_policy_that_asks_for_the_time_hears_the_same(timing: OddTiming) -> None:
    # Bursts decide ahead of the clock, so they are no place for a policy that asks for the time.
    prefetching = Case(policy="accuracy-q", slots=4, top_k=3, watching=True)
    assert_same(prefetching, timing, with_bursts=(False,))
    waves = Case(slots=2, top_k=3, batch=2, watching=True)
    assert_same(waves, timing, with_bursts=(False,))


# ---------------------------------------------------------------------- random cases

SMALL = st.integers(0, 6)
HOSTS = st.builds(
    HostCosts,
    *[SMALL] * 4,
    st.integers(0, 25),
    st.integers(0, 40),
    prediction_ns=st.one_of(st.just(0), st.integers(1, 60)),
)
LINKS = st.builds(LinkCosts, st.sampled_from([10**9, 7 * 10**8]), st.integers(0, 9), SMALL)
PPM = st.sampled_from([0, 130_000, 500_000, 1_000_003])
TIMES = st.integers(1, 60)
RANDOM_TIMINGS = st.builds(
    OddTiming,
    HOSTS,
    LINKS,
    *[TIMES] * 4,
    *[PPM] * 4,
    st.one_of(
        st.just({}),
        st.fixed_dictionaries(
            dict.fromkeys(("oracle", "next_gate", "map_search", "learned"), TIMES)
        ),
    ),
)
POLICIES = (
    "lru",
    "lru-global",
    "belady",
    "belady-bypass",
    "static",
    "on-demand",
    "accuracy-q",
    "oracle-prefetch",
    "score-ema",
    "reuse-distance",
    "mixtral-offloading",
    "promoe",
    "edgemoe",
    "moe-infinity",
    "finemoe",
    "pregated",
    "layer-stream",
    "fiddler",
    "hybrid-split",
    "hobbit",
    "auto",
)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    policy = draw(st.sampled_from(POLICIES))
    layers = draw(st.integers(1, 4))
    params: dict[str, Any] = {
        "order": draw(st.sampled_from(ORDERS)),
        "chunks": draw(st.integers(1, 3)),
        "reset": draw(st.booleans()),
    }
    if policy in ("accuracy-q", "oracle-prefetch"):
        layers = max(layers, 2)
        params |= {
            "depth": draw(st.integers(1, min(3, layers - 1))),
            "wrap": draw(st.booleans()),
            "preempt": draw(st.booleans()),
            "cache": draw(st.sampled_from(("lru", "lru-global", "lfu", "belady"))),
        }
    if policy == "promoe":
        params |= {"stride": draw(st.integers(1, 2)), "preempt": draw(st.booleans())}
    if policy == "accuracy-q":
        params["q"] = draw(st.sampled_from((1.0, 0.7, 0.3)))
    return Case(
        policy,
        params,
        slots=draw(st.sampled_from((2, 2.5, 3, 4, 5.5, 8))),
        window=draw(st.integers(1, 3)),
        layers=layers,
        top_k=draw(st.integers(1, 4)),
        steps=draw(st.integers(2, 10)),
        batch=draw(st.integers(1, 3)),
        prompt=draw(st.sampled_from((0, 5))),
        skip=draw(st.booleans()),
        uneven=draw(st.booleans()),
        cpu=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=200, deadline=None)
@given(random_cases(), RANDOM_TIMINGS)
def test_same_whatever_collides(case: Case, timing: OddTiming) -> None:
    assert_same(case, timing)


# ---------------------------------------------------------------------- estimated timings


@pytest.mark.parametrize(
    "case",
    [
        Case(policy="lru", slots=8),
        Case(policy="lru", slots=8, params={"order": "id", "chunks": 3}),
        Case(policy="belady-bypass", slots=10, batch=2, prompt=16),
        Case(policy="accuracy-q", slots=8, params={"depth": 2, "chunks": 3}),
        Case(policy="oracle-prefetch", slots=8, params={"depth": 3}, window=3),
        Case(policy="accuracy-q", slots=8, cpu=True, batch=2),
    ],
    ids=lambda case: f"{case.policy}-{case.batch}",
)
def test_same_on_an_estimated_machine(case: Case) -> None:
    geometry = load_geometry("gpt-oss-20b")
    timing = RooflineTiming(geometry, load_hardware("h200-pcie5"))
    full = replace(case, layers=24, experts=32, top_k=4, steps=24)
    tally = assert_same(full, timing, Shape(24, 32, 4, geometry.expert_bytes_by_layer))
    counts = _totals(tally)
    assert counts["misses"] + counts["late"] > 100
