"""`moesim timeline`: a valid trace, in which nothing is missing and nothing is told twice."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.core import DecisionCore
from sim.inputs import Inputs
from sim.link import NEVER
from sim.machine import Machine
from sim.point import Point, inputs_for, run_point
from sim.spans import KERNELS, NAMES, ChunkSpan, Timeline, chrome_trace
from sim.stretch import Stretch, simulate_stretch
from sim.timing import HostCosts, LinkCosts
from sim.traced import TracedMachine
from sim.watched import DEMAND, IN_TIME, LATE, OUTCOMES, WASTED, WatchedCore
from tests.cases import Case, OddTiming, make_columns, make_core, make_shape
from tests.given import ON_CPU
from tests.traces import make_trace
from tracer.trace import Trace
from tracer.workload import Workload

TRACKS = {1: "host", 2: "GPU", 3: "link", 4: "CPU"}
TIMING = OddTiming(
    HostCosts(
        9,
        8,
        5,
        13,
        10,
        41,
        awaited_ns=3,
        landing_ns=4,
        cpu_start_ns=5,
        next_wave_ns=7,
        prediction_ns=6,
    ),
    LinkCosts(10**9, startup_ns=3, gap_ns=1),
    experts_slowdown_ppm=300_000,
    cpu_slowdown_ppm=200_000,
    link_slowdown_cpu_ppm=100_000,
    predictor_ns={"next_gate": 31},
)


def check_format(trace: Any) -> None:
    """The trace event format's required fields, and spans that a viewer can draw."""
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    named = set()
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        assert event["ph"] in {"X", "M", "C"}
        if event["ph"] == "M":
            assert event["name"] in {"process_name", "thread_name"}
            assert isinstance(event["args"]["name"], str)
            named.add((event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named
        begin = round(event["ts"] * 1e3)
        tracks[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1e3)))
    for spans in tracks.values():
        assert spans == sorted(spans)
        for one, other in pairwise(spans):
            assert one[1] <= other[0]


def spans_of(trace: Any, track: str) -> list[Any]:
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X" and TRACKS[event["tid"]] == track
    ]


def total_ns(spans: list[Any]) -> int:
    return sum(round(event["dur"] * 1e3) for event in spans)


# ---------------------------------------------------------------------- small machines


class Run:
    """A case's run, written down in full or in part."""

    def __init__(self, case: Case, steps: tuple[int, int] | None = None) -> None:
        self.workload = Workload(make_columns(case), case.experts)
        self.shape = make_shape(case)
        plain = make_core(case, self.workload, self.shape)
        self.core = watched(plain)
        self.machine = TracedMachine(
            self.workload, self.core, TIMING, window=case.window, steps=steps
        )
        self.machine.run()
        self.timeline: Timeline = self.machine.timeline("simulated")
        self.times = self.machine.times

    @property
    def chunks(self) -> list[ChunkSpan]:
        under_way = self.timeline.under_way
        return [*self.timeline.chunks, *([under_way] if under_way else [])]

    def trace(self, first: int = 0, last: int | None = None) -> Any:
        last = self.workload.num_steps - 1 if last is None else last
        return chrome_trace([self.timeline], self.shape.experts, first, last, self.shape.layers)


def watched(core: DecisionCore) -> WatchedCore:
    """The same core, watched; it has not decided anything yet."""
    return WatchedCore(
        core.shape,
        core.plan,
        core.policy,
        core.options,
        signals=core.signals,
        log=[],
    )


CASES = {
    "lru": Case(steps=16),
    "waves": Case(slots=2, top_k=3, prompt=9, steps=12),
    "prefetch": Case(policy="next-gate", layers=4, slots=4, params={"chunks": 3}, steps=16),
    "skipped-layers": Case(policy="next-gate", layers=4, slots=4, skip=True, steps=16),
    "in-order": Case(params={"order": "id"}, top_k=3, slots=4),
    "cpu": Case(policy="fiddler", top_k=3, slots=4, steps=16),
    "split": Case(policy="hybrid-split", top_k=3, slots=4, prompt=5, steps=16),
    "auto": Case(policy="auto", top_k=3, slots=4, steps=24),
    "low-bit": Case(policy="hobbit", top_k=3, slots=4, steps=16),
    "batch": Case(policy="promoe", batch=3, slots=4, prompt=5, params={"chunks": 2}),
    "streaming": Case(policy="layer-stream", top_k=3, slots=4, params={"chunks": 2}, steps=16),
    "uneven": Case(policy="oracle-prefetch", uneven=True, slots=2, steps=16),
    "a-chunk-begins-as-the-run-ends": Case(
        policy="layer-stream",
        params={"chunks": 1, "order": "id"},
        slots=2,
        window=3,
        layers=4,
        steps=10,
        prompt=1,
        seed=22,
    ),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def check_run(case: Case) -> Run:
    """What holds of any run that is shown from its first step to its last."""
    run = Run(case)
    plain = Machine(
        run.workload,
        make_core(case, run.workload, run.shape),
        TIMING,
        window=case.window,
        bursts=False,
    )
    plain.run()
    assert run.times == plain.times
    assert run.core.tally == plain.core.tally
    assert run.core.log == plain.core.log
    trace = run.trace()
    check_format(trace)
    times, tally, link = run.times, run.core.tally, run.machine.link
    # The host is always at something; the GPU and the link were busy so long, to the nanosecond.
    assert total_ns(spans_of(trace, "host")) == times.end[-1]
    assert total_ns(spans_of(trace, "GPU")) == sum(times.segments) + sum(times.experts)
    copies = spans_of(trace, "link")
    on_wire = run.timeline.under_way
    assert (on_wire is None) == (link.lands == NEVER)
    # One that begins as the run ends is no part of the picture.
    seen = on_wire if on_wire and on_wire.begin < times.end[-1] else None
    beyond = on_wire.end - on_wire.begin if on_wire and seen is None else 0
    assert total_ns(copies) + beyond == link.busy_ns
    landed = sum(event["args"]["bytes"] for event in copies) - (seen.nbytes if seen else 0)
    assert landed == tally.copied_bytes
    check_copies(run)
    return run


def check_copies(run: Run) -> None:
    """Chunks of a copy are told once, and outcomes are those of the tally."""
    tally = run.core.tally
    parts: dict[int, list[ChunkSpan]] = defaultdict(list)
    for chunk in run.chunks:
        parts[chunk.copy].append(chunk)
    wasted = 0
    for chunks in parts.values():
        assert [chunk.number for chunk in chunks] == list(range(1, len(chunks) + 1))
        assert len({(chunk.key, chunk.outcome, chunk.source) for chunk in chunks}) == 1
        outcome = chunks[0].outcome
        assert outcome in OUTCOMES
        assert (outcome == DEMAND) == chunks[0].demand == (chunks[0].source == DEMAND)
        landed = [chunk for chunk in chunks if chunk is not run.timeline.under_way]
        wasted += sum(chunk.nbytes for chunk in landed) if outcome == WASTED else 0
    complete = [chunks for chunks in parts.values() if len(chunks) == chunks[0].chunks]
    on_wire = run.timeline.under_way
    assert len(complete) - (on_wire in [chunks[-1] for chunks in complete]) == tally.copies
    assert wasted == tally.wasted_prefetch_bytes


@EACH
def test_nothing_is_missing_and_nothing_told_twice(case: Case) -> None:
    check_run(case)


@EACH
@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 3), (2, 5), (4, 11)])
def test_a_stretch_is_cut_out_of_the_whole(case: Case, first: int, last: int) -> None:
    """What is written down of a stretch is what all of the run tells of it, the rest is not."""
    whole, part = Run(case), Run(case, (first, last))
    assert part.times == whole.times
    expected, cut = whole.trace(first, last), part.trace(first, last)
    check_format(cut)
    assert cut == expected
    begin, end = whole.times.begin[first], whole.times.end[last]
    assert all(chunk.begin < end and chunk.end > begin for chunk in part.chunks)
    straddling = [chunk for chunk in whole.chunks if chunk.begin < end and chunk.end > begin]
    assert part.chunks == straddling
    assert len(part.timeline.kernels) == len(spans_of(cut, "GPU"))
    assert total_ns(spans_of(cut, "host")) == end - begin
    steps = {event["args"]["step"] for event in spans_of(cut, "host")}
    assert steps == set(range(first, last + 1))


def test_what_straddles_a_stretch_is_kept_whole() -> None:
    whole = Run(CASES["streaming"])
    begins, ends = whole.times.begin, whole.times.end
    straddled = [
        step
        for step, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if any(chunk.begin < begin < chunk.end for chunk in whole.chunks)
        and any(chunk.begin < end < chunk.end for chunk in whole.chunks)
    ]
    assert straddled
    for step in straddled:
        part = Run(CASES["streaming"], (step, step))
        chunks = part.chunks
        assert chunks[0].begin < begins[step] < chunks[0].end
        assert chunks[-1].begin < ends[step] < chunks[-1].end
        first, *_, last = spans_of(part.trace(step, step), "link")
        assert first["ts"] == 0
        assert first["dur"] == (chunks[0].end - chunks[0].begin) / 1e3
        assert last["dur"] == (chunks[-1].end - chunks[-1].begin) / 1e3


def test_late_and_used_copies_are_those_of_the_tally() -> None:
    for name in ("prefetch", "skipped-layers", "uneven", "auto"):
        run = Run(CASES[name])
        copies = Counter({chunk.copy: chunk.outcome for chunk in run.chunks}.values())
        counted = run.core.tally.buckets.values()
        assert copies[LATE] == sum(each.late_queued + each.late_copying for each in counted)
        assert copies[IN_TIME] + copies[LATE] == run.core.tally.prefetch_used
        assert copies[LATE]
        assert copies[IN_TIME]


def test_every_kernel_and_group_says_what_it_computes() -> None:
    """By layer: the segment, then each expert of the event once, by whom ever; then the head."""
    for name in ("waves", "skipped-layers", "batch", "split", "streaming"):
        run = Run(CASES[name])
        told: list[tuple[int, set[int]]] = []
        by_cpu = iter(run.timeline.cpu)
        for kernel in run.timeline.kernels:
            if KERNELS[kernel.kind] == "experts":
                layer, keys = told[-1]
                assert kernel.layer == layer
                assert keys.isdisjoint(kernel.experts)
                keys |= {*kernel.experts}
                if kernel.adds_cpu:
                    group = next(by_cpu)
                    assert group.layer == layer
                    assert group.end <= kernel.begin
                    keys |= {*group.experts}
            else:
                told.append((kernel.layer, set()))
        expected = []
        for step in range(run.workload.num_steps):
            events = run.workload.events.step(step)
            expected += [(layer, {*keys}) for layer, keys in enumerate(events) if keys]
            expected.append((len(events), set()))
        assert told == expected
        assert next(by_cpu, None) is None
        host = [event["args"].get("layer") for event in spans_of(run.trace(), "host")]
        layers = {layer for layer, _ in expected[:-1]} - {run.shape.layers}
        assert set(host) == {*layers, "head", None}


def test_low_bit_copies_are_told_from_others() -> None:
    run = Run(CASES["low-bit"])
    copies = spans_of(run.trace(), "link")
    low = [event for event in copies if event["args"].get("precision") == "low"]
    assert 0 < len(low) < len(copies)
    full = CASES["low-bit"]
    for event in copies:
        assert event["args"]["layer"] < full.layers
        assert event["args"]["expert"] < full.experts
        assert (" low-bit " in event["name"]) == (event in low)
    assert {event["args"]["bytes"] for event in low} == {17 // 3}


def test_the_cpu_has_a_track() -> None:
    run = Run(CASES["split"])
    groups = spans_of(run.trace(), "CPU")
    assert len(groups) == len(run.timeline.cpu) > 0
    assert all(event["name"].startswith(f"{event['args']['layer']}/") for event in groups)
    assert all(event["args"]["experts"] for event in groups)


SPREAD = ["lru", "next-gate", "promoe", "layer-stream", "hobbit", "auto", "hybrid-split"]


@given(
    policy=st.sampled_from(SPREAD),
    slots=st.integers(2, 6),
    window=st.integers(1, 3),
    top_k=st.integers(1, 3),
    batch=st.integers(1, 2),
    prompt=st.integers(0, 6),
    chunks=st.integers(1, 3),
    skip=st.booleans(),
    order=st.sampled_from(["cached-first", "id"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_any_run_is_told_in_sane_spans(policy: str, chunks: int, order: str, **sizes: Any) -> None:
    params = {"chunks": chunks, "order": order}
    if policy in ON_CPU:
        del params["order"]
    sizes["skip"] = sizes["skip"] and policy == "lru"
    check_run(Case(policy=policy, params=params, steps=10, layers=4, **sizes))


def test_two_runs_begin_their_first_steps_at_one_instant() -> None:
    one, other = Run(CASES["streaming"]), Run(CASES["lru"])
    step = next(
        step
        for step, begin in enumerate(one.times.begin)
        if any(chunk.begin < begin < chunk.end for chunk in one.chunks)
    )
    trace = chrome_trace([one.timeline, other.timeline], 8, step, step, 3)
    check_format(trace)
    host = [event for event in trace["traceEvents"] if event["tid"] == 1 and event["ph"] == "X"]
    begins = {pid: min(each["ts"] for each in host if each["pid"] == pid) for pid in (1, 2)}
    assert begins[1] == begins[2] > 0


# ---------------------------------------------------------------------- points


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timeline") / "trace"
    columns = ("lookahead_1", "lookahead_2")
    make_trace(path, layers=3, experts=8, top_k=2, requests=3, prompt=4, output=12, columns=columns)
    return path


def stretch_of(trace_dir: Path, steps: tuple[int, int], **fields: Any) -> tuple[Stretch, Inputs]:
    point = Point(hardware="rtx4090-pcie4", **fields)
    inputs = inputs_for(Trace.open(trace_dir), point)
    return simulate_stretch(inputs, point, steps), inputs


@pytest.mark.parametrize("policy", ["lru", "next-gate", "fiddler", "resident"])
def test_a_stretch_of_all_steps_is_the_simulated_run(trace_dir: Path, policy: str) -> None:
    budget = {} if policy == "resident" else {"expert_budget": "50%"}
    probe, inputs = stretch_of(trace_dir, (0, 0), policy=policy, **budget)
    last = len(probe.timeline.step_ends) - 1
    drawn, _ = stretch_of(trace_dir, (0, last), policy=policy, **budget)
    result = run_point(inputs, drawn.setting.point)
    trace = drawn.chrome_trace()
    check_format(trace)
    assert json.loads(json.dumps(trace, allow_nan=False))["otherData"]["steps"] == f"0 to {last}"
    busy_ns = total_ns(spans_of(trace, "link"))
    assert busy_ns / drawn.duration_ns == pytest.approx(result["link_busy_share"], rel=1e-9)
    landed = [chunk for chunk in drawn.chunks if chunk is not drawn.timeline.under_way]
    assert sum(chunk.nbytes for chunk in landed) == result["h2d_bytes"]
    assert drawn.timeline.step_ends == probe.timeline.step_ends


# ---------------------------------------------------------------------- the command


def words(trace_dir: Path, out: Path, steps: str = "5:7", **more: object) -> list[object]:
    options = {
        "trace": trace_dir,
        "hardware": "rtx4090-pcie4",
        "policy": "next-gate",
        "expert_budget": "50%",
        "steps": steps,
        "out": out,
        **more,
    }
    told: list[object] = ["timeline"]
    for name, value in options.items():
        told += [f"--{name.replace('_', '-')}", value]
    return told


def test_the_command_writes_a_trace(moesim, trace_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, again = tmp_path / "new" / "one.json", tmp_path / "two.json"
    code, out, err = moesim(*words(trace_dir, first, set="chunks=2", link="12GB/s"))
    assert (code, err) == (0, "")
    assert out.startswith("next-gate chunks=2, steps 5 to 7: ")
    assert "copies: demand\n" in out
    assert "copies: next_gate, " in out
    trace = json.loads(first.read_text())
    check_format(trace)
    assert set(NAMES) >= {event["name"] for event in spans_of(trace, "host")}
    assert set(KERNELS) == {event["name"] for event in spans_of(trace, "GPU")}
    for event in spans_of(trace, "link"):
        told = event["args"]
        assert event["name"].startswith(f"{told['layer']}/{told['expert']} {told['why']}")
        assert told["outcome"] in trace["otherData"]["outcomes"]
        assert event["name"].endswith(told["outcome"]) or told["outcome"] == IN_TIME
        assert told["bytes"] > 0
        assert told["chunks"] == 2
    assert trace["otherData"]["point"]["link"] == "12GB/s"
    assert moesim(*words(trace_dir, again, set="chunks=2", link="12GB/s"))[0] == 0
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": "36:40"}, ["--steps 36:40", "39 steps, 0 to 38"]),
        ({"steps": "39"}, ["--steps 39", "39 steps, 0 to 38"]),
        ({"steps": "7:5"}, ["--steps 7:5", "give 5:7"]),
        ({"steps": "-1:5"}, ["'-1:5'", "20:24"]),
        ({"steps": "5:"}, ["'5:'", "20:24"]),
        ({"steps": ""}, ["''", "20:24"]),
        ({"steps": "1:2:3"}, ["'1:2:3'", "20:24"]),
        ({"steps": "\u0663"}, ["20:24"]),
        ({"steps": "9" * 5000}, ["20:24"]),
        ({"policy": "lrru"}, ["lrru", "did you mean lru"]),
        ({"window": 0}, ["--window 0"]),
        ({"set": "depth"}, ["depth", "key=value"]),
        ({"expert_budget": "1%"}, ["smallest that can run"]),
    ],
)
def test_wrong_input_is_one_line(  # type: ignore[no-untyped-def]
    moesim, trace_dir: Path, tmp_path: Path, changes: dict[str, object], expected: list[str]
) -> None:
    out = tmp_path / "out.json"
    code, told, err = moesim(*words(trace_dir, out, **changes))
    assert code == 2
    assert told == ""
    assert err.startswith("moesim: error: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert not out.exists()


def test_an_existing_file_is_kept(moesim, trace_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "mine.json"
    out.write_text("mine")
    code, _, err = moesim(*words(trace_dir, out))
    assert code == 2
    assert "mine.json exists" in err
    assert out.read_text() == "mine"
    code, _, err = moesim(*words(trace_dir, out / "sub.json"))
    assert code == 2
    assert err.count("\n") == 1


def test_the_help_has_an_example(moesim) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = moesim("timeline", "--help")
    assert code == 0
    assert "Example: moesim timeline" in out
