"""`moesim advise`: every answer is what a full sweep says, found by other code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import policies
from configs.errors import UserError
from configs.geometry import load_geometry
from configs.hardware import load_hardware
from configs.timings import load_timings
from sim import advise, sweep
from sim.advising import Advice
from sim.advising.confidence import VALIDATION, confidence_in, find_campaigns
from sim.advising.elsewhere import cpu_layers, slots_in
from sim.advising.search import Found, System
from sim.calibrated import CalibratedTiming
from sim.compare import BOUND
from sim.inputs import Inputs
from sim.point import Setting
from sim.sweeps import PolicyChoice, SweepConfig
from tests.traces import make_trace
from tracer.subset import Choice, subset
from tracer.trace import Trace

GIB = 2**30
HARDWARE = "rtx4090-pcie4"
#: a cache, an admission rule that stages, and one that lets the CPU compute
QUICK = ("lru", "lfu-decay", "hybrid-split")
#: the first two requests of a few; the slow checks take more of everything
SHORT: dict[str, Any] = {"dtype": "bf16", "max_tokens": 94}
BOUNDS = (PolicyChoice(name="belady-bypass"), BOUND)


# ---------------------------------------------------------------------- by brute force


def table(trace: Trace, slots: range, names: tuple[Any, ...], **fields: Any) -> pd.DataFrame:
    """TPOT of every policy at every number of slots a layer: ``policy, slots, tpot, bytes``."""
    config = SweepConfig(
        trace="by hand",
        policies=(*names, "resident"),
        hardware=(HARDWARE,),
        expert_budgets=tuple(f"{count}/layer" for count in slots),
        **fields,
    )
    rows = sweep(config, trace=trace)
    rows = rows[rows["status"] == "ok"]
    experts = trace.manifest.geometry.num_experts
    given = rows["point.expert_budget"].str.removesuffix("/layer")
    return pd.DataFrame(
        {
            "policy": rows["label"],
            "slots": given.fillna(str(experts)).astype(int),
            "tpot": rows["tpot_ms.mean"],
            "bytes": rows["memory.peak_bytes"],
        }
    )


def fewest(points: pd.DataFrame, target: float) -> Any:
    """The fastest of those that meet the target with the fewest slots; None: there are none."""
    good = points[points["tpot"] <= target]
    if good.empty:
        return None
    least = good[good["slots"] == good["slots"].min()]
    return least.loc[least["tpot"].idxmin()]


def is_row(found: Found | None, row: Any) -> bool:
    return found is not None and (found.policy, found.slots, found.tpot_ms) == (
        row["policy"],
        row["slots"],
        row["tpot"],
    )


@pytest.fixture(scope="module")
def few(gpt_oss_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Four of gpt-oss-20b's 213 requests, the shortest ones, whole: 179 tokens, so seconds."""
    chosen = Choice(requests=(58, 112, 125, 186))
    return subset(gpt_oss_trace, tmp_path_factory.mktemp("few") / "trace", chosen)


@pytest.fixture(scope="module")
def points(few: Trace) -> pd.DataFrame:
    """Experts in bf16: 38 GiB in all, of which a card of 24 GiB holds a half."""
    return table(few, range(1, 32), QUICK, **SHORT)


def ask(trace: Trace, **fields: Any) -> Advice:
    return advise(trace, **{"hardware": HARDWARE, "policies": QUICK, "what_if": False, **fields})


@pytest.mark.exhaustive
def test_question_1_the_smallest_memory_for_38_ms(few: Trace, points: pd.DataFrame) -> None:
    """Which memory, at least, and which policy, for 38 ms a token? And for 28 ms?"""
    advice = ask(few, tpot_ms=38, **SHORT)
    expected = fewest(points, 38)
    assert is_row(advice.smallest, expected)
    assert expected["bytes"] < 24 * 10**9
    assert advice.met
    assert advice.chosen == advice.smallest
    assert advice.below is not None
    assert advice.below.tpot_ms > 38
    assert advice.below.slots == expected["slots"] - 1
    quicker = ask(few, tpot_ms=28, **SHORT)
    expected = fewest(points, 28)
    assert is_row(quicker.smallest, expected)
    assert (quicker.smallest.policy, quicker.met) == ("lru", False)  # another one, and no room


def test_question_2_the_fastest_in_12_gib(few: Trace) -> None:
    """What is the fastest in 12 GiB, and what could an oracle make of them?"""
    advice = ask(few, tpot_ms=38, gpu_memory="12GiB", **SHORT)
    config = SweepConfig(
        trace="by hand",
        policies=(*QUICK, *BOUNDS),
        hardware=(HARDWARE,),
        budgets=("12GiB",),
        **SHORT,
    )
    rows = sweep(config, trace=few)
    own = rows[~rows["oracle"]]
    best = own.loc[own["tpot_ms.mean"].idxmin()]
    assert advice.fastest is not None
    assert advice.fastest.policy == best["policy"]
    assert advice.fastest.tpot_ms == best["tpot_ms.mean"]
    assert advice.fastest.gpu_memory_bytes <= 12 * GIB
    near = own[own["tpot_ms.mean"] <= 1.02 * best["tpot_ms.mean"]]["policy"]
    assert set(advice.fastest.ties) == set(near) - {best["policy"]}
    assert advice.bound is not None
    assert advice.bound.tpot_ms == rows[rows["oracle"]]["tpot_ms.mean"].min()
    assert advice.limits["fastest"].saves == 1 - advice.bound.tpot_ms / best["tpot_ms.mean"]


def test_question_3_has_no_answer(few: Trace, points: pd.DataFrame) -> None:
    """3 ms a token: no policy and no memory can. 38 ms in 16 GiB: the capacity is short."""
    assert fewest(points, 3) is None
    hopeless = ask(few, tpot_ms=3, **SHORT)
    assert hopeless.smallest is None
    assert not hopeless.met
    assert hopeless.short_by_bytes is None
    assert "no policy can" in hopeless.text
    assert "no oracle could either" in hopeless.text
    all_there = points[points["policy"] == "resident"].iloc[0]
    assert hopeless.everything.tpot_ms == all_there["tpot"]

    scarce = ask(few, tpot_ms=38, gpu_memory="16GiB", **SHORT)
    expected = fewest(points, 38)
    assert is_row(scarce.smallest, expected)
    assert not scarce.met
    assert scarce.short_by_bytes == expected["bytes"] - 16 * GIB
    assert f"the capacity is short by {scarce.short_by_bytes / GIB:.1f} GiB" in scarce.text
    assert scarce.chosen == scarce.fastest
    bounds = table(few, range(10, 14), BOUNDS, **SHORT)
    assert is_row(scarce.oracle, fewest(bounds[bounds["slots"] > 10], 38))


@pytest.mark.exhaustive
def test_question_4_four_at_a_time_with_8192_tokens_each(few: Trace) -> None:
    """And for four requests that run together, each with 8192 tokens of KV cache, in 60 ms?"""
    names = ("lru", "hybrid-split")
    fields = {"dtype": "bf16", "batch": 4, "context": 8192}
    expected = fewest(table(few, range(14, 32), names, **fields), 60)
    advice = ask(few, tpot_ms=60, policies=names, **fields)
    assert advice.oracle is None or advice.oracle.tpot_ms <= 60
    assert is_row(advice.smallest, expected)
    assert not advice.met  # a card of 24 GiB has no room for it
    assert advice.system["kv_bytes"] == 4 * 8192 * few.manifest.geometry.kv_bytes_per_token
    assert "4 requests at a time, 8192 tokens of KV cache each" in advice.text


@pytest.mark.exhaustive
def test_question_5_what_a_faster_link_brings(few: Trace) -> None:
    """In mxfp4, for 15 ms: what would a link of 47 GB/s bring?"""
    names = ("lru", "hybrid-split")
    advice = ask(few, tpot_ms=15, policies=names, what_if=True, max_tokens=94)
    (what,) = advice.what_ifs  # no lower precision than its own is tried
    assert what.name == "link x2 (47 GB/s)"
    expected = fewest(table(few, range(1, 32), names, max_tokens=94, links=("47GB/s",)), 15)
    assert is_row(what.smallest, expected)
    assert advice.smallest is not None
    assert expected["slots"] < advice.smallest.slots
    assert "link x2 (47 GB/s): " in advice.text


@pytest.mark.exhaustive
def test_what_fewer_bits_bring(few: Trace) -> None:
    """All policies of the quick questions, at every budget and precision."""
    advice = ask(few, tpot_ms=35, what_if=True, dtype="bf16")
    whats = {each.name: each for each in advice.what_ifs}
    assert list(whats) == ["link x2 (47 GB/s)", "experts in int8", "experts in mxfp4"]
    for name, changed in (
        ("link x2 (47 GB/s)", {"links": ("47GB/s",), "dtype": "bf16"}),
        ("experts in int8", {"dtype": "int8"}),
        ("experts in mxfp4", {"dtype": "mxfp4"}),
    ):
        expected = fewest(table(few, range(1, 32), QUICK, **changed), 35)
        assert is_row(whats[name].smallest, expected), name


def test_time_to_first_token_is_a_target_too() -> None:
    fields = {"geometry": "olmoe-1b-7b", "max_tokens": 150, "policies": ("lru", "slru")}
    trace = Trace.open("sample")
    config = {**fields, "hardware": (HARDWARE,), "trace": "sample"}
    config["expert_budgets"] = tuple(f"{slots}/layer" for slots in range(32, 40))
    rows = sweep(SweepConfig(**config), trace=trace)
    good = rows[(rows["tpot_ms.p90"] <= 30) & (rows["ttft_ms.p90"] <= 462)]
    slots = good["point.expert_budget"].str.removesuffix("/layer").astype(int)
    advice = advise(
        trace, hardware=HARDWARE, tpot_ms=30, ttft_ms=462, percentile="p90", what_if=False, **fields
    )
    assert advice.smallest is not None
    assert advice.smallest.slots == slots.min()
    least = good[slots == slots.min()]
    assert advice.smallest.tpot_ms == least["tpot_ms.p90"].min()
    assert "p90 of the requests" in advice.text


@pytest.fixture(scope="module", params=[1, 4])
def every(request: Any, gpt_oss_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every policy at every budget on the eight shortest requests, and how many run together."""
    names = tuple(
        name
        for name in policies.names()
        if policies.get(name).lossless and not policies.get(name).oracle and name != "resident"
    )
    chosen = Choice(requests=(58, 62, 64, 112, 115, 124, 125, 186))
    trace = subset(gpt_oss_trace, tmp_path_factory.mktemp("eight") / "trace", chosen)
    return trace, table(trace, range(1, 32), names, batch=request.param), request.param


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", [8, 15, 25, 60])
def test_every_policy_at_every_budget(every: Any, target: float) -> None:
    trace, points, batch = every
    advice = advise(trace, hardware=HARDWARE, tpot_ms=target, what_if=False, batch=batch)
    expected = fewest(points, target)
    assert (advice.smallest is None) == (expected is None)
    if expected is not None:
        assert is_row(advice.smallest, expected)


# ---------------------------------------------------------------------- the search itself


class Made:
    """Rows of made-up times, by policy and slots; ``asked`` counts them."""

    def __init__(self, times: dict[str, list[float | None]]) -> None:
        self.times = times
        self.asked: set[tuple[str, str]] = set()

    def rows(self, points: Any) -> list[dict[str, Any]]:
        return [self.row(point) for point in points]

    def row(self, point: Any) -> dict[str, Any]:
        known = self.times[point.policy]
        slots = (
            len(known) if point.expert_budget is None else int(point.expert_budget.split("/")[0])
        )
        ms = known[slots - 1]
        self.asked.add((point.policy, str(slots)))
        return {
            "status": "failed" if ms is None else "ok",
            "error": None,
            "policy": point.policy,
            "label": point.policy,
            "point_id": f"{point.policy} {slots}",
            "hardware": "h",
            "geometry": "g",
            "expert_dtype": "bf16",
            "link_bytes_per_s": 1,
            "expert_budget_bytes": slots,
            "memory.peak_bytes": slots,
            "memory.slots_bytes": slots,
            "memory.gpu_memory_bytes": len(known),
            "memory.expert_bytes_total": len(known),
            "memory.fits": True,
            "tpot_ms.mean": ms,
            "ttft_ms.mean": None,
            "oracle": False,
            "lossless": True,
            "prefetches": False,
            "point.expert_budget": point.expert_budget,
        }


class _Stub:
    """What a search reads of a question."""

    def __init__(self, experts: int, target: float) -> None:
        self.limit_bytes = experts
        self.question = type("Q", (), {"tpot_ms": target, "ttft_ms": None, "percentile": "mean"})()
        geometry = type("G", (), {"num_experts": experts})()
        self.setting = type("S", (), {"geometry": geometry})()

    def point(self, choice: PolicyChoice, **changes: Any) -> Any:
        budget = None if choice.name == "resident" else changes["expert_budget"]
        return type("P", (), {"policy": choice.name, "expert_budget": budget})()


def search(times: dict[str, list[float | None]], target: float) -> tuple[int | None, Made]:
    experts = len(times["resident"])
    made = Made(times)
    system = System(_Stub(experts, target), made)  # type: ignore[arg-type]
    names = [name for name in times if name != "resident"]
    return system.smallest({name: PolicyChoice(name=name) for name in names}), made


def fewest_of(times: dict[str, list[float | None]], target: float) -> int | None:
    good = [
        slots
        for row in times.values()
        for slots, ms in enumerate(row, start=1)
        if ms is not None and ms <= target
    ]
    return min(good, default=None)


@st.composite
def falling(draw: st.DrawFn) -> tuple[dict[str, list[float | None]], float]:
    """Times that fall with every slot more, some policies needing more slots than one to run."""
    experts = draw(st.integers(4, 40))
    end = draw(st.integers(1, 5))
    times: dict[str, list[float | None]] = {"resident": [None] * (experts - 1) + [float(end)]}
    for name in ("lru", "slru", "lfu"):
        drops = draw(st.lists(st.integers(0, 9), min_size=experts - 1, max_size=experts - 1))
        own: list[float | None] = [float(end)]
        for drop in drops:
            own.insert(0, float(own[0] or 0) + drop)
        least = draw(st.integers(0, 3))
        times[name] = [None] * least + own[least:]
    return times, float(draw(st.integers(0, 60)))


@settings(max_examples=25, deadline=None)
@given(falling())
def test_the_smallest_budget_is_found_where_times_fall(
    drawn: tuple[dict[str, list[float | None]], float],
) -> None:
    times, target = drawn
    found, _ = search(times, target)
    assert found == fewest_of(times, target)


@settings(max_examples=25, deadline=None)
@given(falling(), st.randoms(use_true_random=False))
def test_where_they_do_not_what_is_said_of_it_holds(
    drawn: tuple[dict[str, list[float | None]], float], random: Any
) -> None:
    """It meets the target, and at the two budgets below nobody does."""
    times, target = drawn
    for name in ("lru", "slru", "lfu"):
        inner = times[name][:-1]
        random.shuffle(inner)
        times[name] = [*inner, times[name][-1]]
    found, _ = search(times, target)
    if found is None:
        assert fewest_of({"resident": times["resident"]}, target) is None
        return
    met = {
        slots: any((ms := own[slots - 1]) is not None and ms <= target for own in times.values())
        for slots in range(1, len(times["resident"]) + 1)
    }
    assert met[found]
    assert not any(met[slots] for slots in (found - 1, found - 2) if slots > 0)


def test_a_lossy_policy_may_be_faster_than_all_experts() -> None:
    times: dict[str, list[float | None]] = {
        "swapmoe": [float(slots) for slots in range(2, 33)] + [20.0],
        "lru": [float(40 - slots) for slots in range(1, 32)] + [20.0],
        "resident": [20.0] * 32,
    }
    times["swapmoe"][:5] = [None] * 5
    assert search(times, 14.0)[0] == fewest_of(times, 14.0) == 6
    assert search(times, 5.0)[0] is None


def test_bisection_asks_for_few_points() -> None:
    times: dict[str, list[float | None]] = {
        name: [float(200 - slots) for slots in range(1, 129)] for name in ("lru", "slru")
    }
    times["resident"] = times["lru"]
    found, made = search(times, 137.0)
    assert found == 63
    assert len(made.asked) < 0.15 * 2 * 128


# ---------------------------------------------------------------------- beside the answer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("advise") / "trace"
    make_trace(path, requests=6, output=8, seed=2, columns=("weights", "lookahead_1", "gate_probs"))
    return path


def quick(trace: Path | Trace, **fields: Any) -> Advice:
    return advise(trace, **{"hardware": HARDWARE, "tpot_ms": 100, **fields})


def test_all_policies_are_candidates_but_lossy_ones_and_oracles(tiny: Path) -> None:
    advice = quick(tiny)
    simulated = {row["policy"] for row in advice.points}
    missing = {each.policy for each in advice.not_runnable}
    assert missing == {"finemoe", "promoe"}  # columns that this trace lacks
    for name in policies.names():
        info = policies.get(name)
        expected = name in ("belady", "belady-bypass", "oracle-prefetch") or (
            info.lossless and not info.oracle
        )
        assert (name in simulated) == expected, name
    assert advice.text.count("lossy") == 0


def test_a_lossy_policy_counts_where_it_is_named_and_says_so(tiny: Path) -> None:
    times = {}
    for names in (["lru"], ["lru", "swapmoe"]):
        advice = quick(tiny, policies=names, gpu_memory="13KiB", tpot_ms=0.9, what_if=False)
        assert advice.fastest is not None
        times[tuple(names)] = advice
    assert times["lru", "swapmoe"].fastest.policy == "swapmoe"
    assert not times["lru", "swapmoe"].fastest.lossless
    assert "swapmoe (lossy: it changes what the model says)" in times["lru", "swapmoe"].text
    # With room for all experts too: nothing that was simulated and fits is faster.
    whole = quick(tiny, policies=["lru", "swapmoe"], what_if=False)
    fitting = [
        row["tpot_ms.mean"]
        for row in whole.points
        if row["status"] == "ok"
        and not row["oracle"]
        and row["memory.peak_bytes"] <= whole.system["limit_bytes"]
    ]
    assert whole.fastest is not None
    assert whole.fastest.tpot_ms == min(fitting)


def test_where_all_experts_fit_no_flag_is_needed(tiny: Path) -> None:
    """The card of 24 GiB, as it is called, has 23.99: that is no error."""
    plain = quick(tiny, policies=["lru"], what_if=False, tpot_ms=0.0001)
    named = quick(tiny, policies=["lru"], what_if=False, tpot_ms=0.0001, gpu_memory="24GiB")
    assert named.system == plain.system
    assert named.chosen is not None
    assert named.chosen.holds_all
    assert [(line.text, line.assumes) for line in named.lines] == [
        ("no flag", "all experts fit on the GPU")
    ]
    assert named.pins is None
    with pytest.raises(UserError, match=r"has 23.99 GiB: give at most that"):
        quick(tiny, policies=["lru"], gpu_memory="25GiB")


def test_a_ttft_alone_says_by_what_policies_are_compared(tiny: Path) -> None:
    said = "told by TPOT"
    assert (
        said
        in advise(
            "sample",
            hardware=HARDWARE,
            geometry="olmoe-1b-7b",
            max_tokens=60,
            policies=["lru"],
            ttft_ms=5000,
            what_if=False,
        ).text
    )
    assert said not in quick(tiny, policies=["lru"], what_if=False).text


def test_whose_misses_the_cpu_computes(tiny: Path) -> None:
    for name in ("lru", "hybrid-split"):
        advice = quick(tiny, policies=[name], gpu_memory="13KiB", what_if=False)
        assert advice.fastest is not None
        assert advice.fastest.on_cpu == (name == "hybrid-split")
        assert advice.lines[0].assumes.endswith(f"the times above are those of {name}")


def test_same_answers_on_any_number_of_jobs_and_from_a_directory(
    tiny: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"policies": ["lru", "next-gate"], "what_if": False}
    alone = quick(tiny, **fields).to_dict()
    out = tmp_path / "out"
    kept = quick(tiny, jobs=2, out=out, **fields)
    assert kept.to_dict() == alone
    assert json.loads((out / "advice.json").read_text()) == json.loads(json.dumps(alone))
    assert (out / "advice.txt").read_text() == f"{kept.text}\n"
    calls: list[tuple[int, int]] = []
    again = quick(tiny, out=out, progress=lambda *at: calls.append(at), **fields)
    assert again.to_dict() == alone
    failed = [row for row in alone["points"] if row["status"] == "failed"]
    assert max(at[1] - at[0] for at in calls) <= len(failed)  # what failed alone is tried again
    with pytest.raises(UserError, match="holds results of another sweep"):
        quick(tiny, out=out, tpot_ms=50, **{k: v for k, v in fields.items() if k != "tpot_ms"})
    from sim.sweeps import read_results

    assert len(read_results(out)) == len(alone["points"])


def test_a_memory_in_which_nothing_runs(tiny: Path) -> None:
    advice = quick(tiny, policies=["lru"], gpu_memory="12000B", what_if=False)
    assert advice.fastest is None
    assert advice.bound is None
    assert not advice.met
    assert advice.short_by_bytes == advice.smallest.gpu_memory_bytes - 12000
    assert (advice.lines, advice.pins, advice.chosen) == ((), None, None)
    assert "nothing can run in it" in advice.text


def test_json_is_complete(tiny: Path) -> None:
    told = quick(tiny, policies=["lru"]).to_dict()
    assert told["question"]["tpot_ms"] == 100
    assert told["system"]["trace_digest"] == Trace.open(tiny).digest
    assert told["produced_by"].keys() == {"moesim", "git"}
    by_id = {row["point_id"]: row for row in told["points"]}
    for found in (told["smallest"], told["fastest"], told["everything"]):
        assert by_id[found["point_id"]]["tpot_ms.mean"] == found["tpot_ms"]
    json.dumps(told, allow_nan=False)


def test_pins_are_those_of_static(tiny: Path) -> None:
    advice = quick(tiny, policies=["lru"], gpu_memory="13KiB", tpot_ms=0.0001, what_if=False)
    assert advice.pins is not None
    experts = Trace.open(tiny).load(["experts"])["experts"]
    step = Trace.open(tiny).load(["step"])["step"]
    for layer, (name, own) in enumerate(advice.pins.layers.items()):
        assert name == str(layer + 1)  # the model's layer 0 is dense
        events = {
            (int(s), int(e)) for s, row in zip(step, experts, strict=True) for e in row[layer]
        }
        counts = [sum(expert == e for _, e in events) for expert in range(8)]
        ranked = sorted(range(8), key=lambda expert: (-counts[expert], expert))
        assert own == sorted(ranked[: advice.pins.experts_a_layer])


def test_layers_left_on_the_cpu_are_the_models_first() -> None:
    deepseek = load_geometry("deepseek-v2-lite")  # layer 0 is dense
    a_layer = deepseek.num_experts * deepseek.expert_bytes_by_layer[0]
    assert deepseek.num_layers == 27
    assert cpu_layers(deepseek, 26 * a_layer) == 0
    assert cpu_layers(deepseek, 26 * a_layer - 1) == 2  # layers 0 and 1; 1 has the first experts
    assert cpu_layers(deepseek, a_layer) == 26
    assert cpu_layers(deepseek, a_layer - 1) == 27
    assert slots_in(deepseek, a_layer) == deepseek.num_experts // 26
    assert slots_in(deepseek, 10**15) == deepseek.num_experts


# ---------------------------------------------------------------------- confidence


def found_of(**changes: Any) -> Found:
    base = Found("lru", 8, 1, 0.25, 1, 50.0, None, (), False, True, False, "id")
    return replace(base, **changes)


def errors_of(names: Sequence[str], kind: str) -> list[float]:
    """Of the campaigns' points of a kind: demand, prefetching or cpu."""
    found = []
    for name in names:
        for row in json.loads((VALIDATION / "h200" / name / "report.json").read_text())["points"]:
            free, on_cpu = row["time_independent"], row["on_cpu"]
            its = "cpu" if on_cpu else "demand" if free else "prefetching"
            if its == kind:
                found.append(abs(row["figures"]["tpot_ms"]["error"]))
    assert found
    return found


GPT_OSS = ("locked-gpt-oss", "second-gpt-oss")
QWEN = ("locked-qwen", "second-qwen")
OLMOE = (
    "locked-olmoe", "second-olmoe", "lane-olmoe", "long-olmoe", "third-olmoe", "fourth-olmoe",
    "fifth-olmoe",
)  # fmt: skip
BATCHES = (
    "batch-olmoe", "third-batch-olmoe", "fourth-batch-olmoe", "fifth-batch-olmoe",
    "sixth-batch-olmoe",
)  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(few: Trace) -> Setting:
    """gpt-oss-20b, one request at a time, with the times that were measured."""
    from sim.advising.question import Question
    from sim.advising.question import ask as make_out

    campaigns = find_campaigns("h200-pcie5")
    (timings,) = [each.timings for each in campaigns if each.name.endswith(GPT_OSS[0])]
    question = Question(
        trace="t",
        hardware="h200-pcie5",
        dtype="bf16",
        timings=str(timings),
        tpot_ms=30,
        policies=["lru"],
    )
    setting = make_out(question, few).setting
    assert setting.timing.provenance == "calibrated"
    return setting


def of_model(setting: Setting, name: str) -> Setting:
    return replace(setting, geometry=setting.geometry.model_copy(update={"name": name}))


def test_errors_are_those_of_the_validation(calibrated: Setting) -> None:
    campaigns = find_campaigns("h200-pcie5")
    known = confidence_in(found_of(), calibrated, "mean", campaigns)
    expected = errors_of(GPT_OSS, "demand")
    assert (known.level, known.points) == ("validated", len(expected))
    assert known.median_error == pytest.approx(np.median(expected))
    assert known.worst_error == pytest.approx(max(expected))
    assert known.low_ms == pytest.approx(50 / (1 + max(expected)))
    assert known.high_ms == pytest.approx(50 / (1 - max(expected)))
    # One campaign: its own summary says the same.
    first = [each for each in campaigns if each.name.endswith(GPT_OSS[0])]
    summary = first[0].report["summary"]["demand-only"]
    alone = confidence_in(found_of(), calibrated, "mean", first)
    assert alone.points == summary["points"]
    assert alone.median_error == pytest.approx(summary["tpot_ms"]["median"])
    assert alone.source == "validation/h200/locked-gpt-oss"

    other = found_of(policy="promoe", prefetches=True, expert_share=0.9)
    also = confidence_in(other, calibrated, "mean", campaigns)  # of all models
    expected = errors_of(GPT_OSS + QWEN + OLMOE, "prefetching")
    assert (also.points, also.worst_error) == (len(expected), pytest.approx(max(expected)))
    assert also.source == "validation/h200"
    for part in (
        "promoe was not measured on this model",
        "12.5 to 75 % of the experts",
        "on gpt-oss-20b, olmoe-1b-7b and qwen1.5-moe-a2.7b,",
    ):
        assert part in also.why
    # A model of several campaigns: the errors of all.
    both = confidence_in(other, of_model(calibrated, "olmoe-1b-7b"), "mean", campaigns)
    expected = errors_of(OLMOE, "prefetching")
    assert (both.points, both.worst_error) == (len(expected), pytest.approx(max(expected)))
    assert confidence_in(found_of(), calibrated, "mean", []).level == "calibrated"


def test_errors_are_of_the_mean_whatever_is_asked_for(calibrated: Setting) -> None:
    """Reports have percentiles of tokens; the question is about percentiles of requests."""
    campaigns = find_campaigns("h200-pcie5")
    mean, tail = (
        confidence_in(found_of(), calibrated, name, campaigns) for name in ("mean", "p99")
    )
    assert "errors are of the mean" in tail.why
    assert "errors are of the mean" not in mean.why
    assert (tail.points, tail.worst_error) == (mean.points, mean.worst_error)


def test_another_link_is_told(calibrated: Setting) -> None:
    campaigns = find_campaigns("h200-pcie5")
    point = calibrated.point.model_copy(update={"link": "32GB/s"})
    linked = replace(calibrated, point=point)
    told = confidence_in(found_of(), linked, "mean", campaigns).why.split("; ")
    assert "they were over the machine's own link and 2.2 times slower" in told
    few = [each for each in campaigns if each.name.endswith("long-olmoe")]
    told = confidence_in(found_of(), of_model(linked, "olmoe-1b-7b"), "mean", few).why.split("; ")
    assert "they were over the machine's own link" in told


def test_reports_of_older_versions_are_read(calibrated: Setting) -> None:
    campaigns = [each for each in find_campaigns("h200-pcie5") if each.name.endswith(GPT_OSS)]
    known = confidence_in(found_of(), calibrated, "mean", campaigns)
    for each in campaigns:
        del each.report["batch"]
        for point in each.report["points"]:
            del point["on_cpu"]
    assert confidence_in(found_of(), calibrated, "mean", campaigns) == known


def test_a_cpus_help_was_measured_on_one_model(calibrated: Setting) -> None:
    campaigns = find_campaigns("h200-pcie5")
    auto = found_of(policy="auto", on_cpu=True)
    assert not calibrated.timing.cpu_is_measured
    of_rates = of_model(calibrated, "olmoe-1b-7b")
    estimated = confidence_in(auto, of_rates, "mean", campaigns)
    assert (estimated.level, estimated.high_ms) == ("calibrated", None)
    assert "but for the CPU's" in estimated.why
    lane = load_timings(str(VALIDATION / "h200" / "lane-olmoe" / "run-1" / "timings.yaml"))
    timing = CalibratedTiming(load_geometry("olmoe-1b-7b"), load_hardware("h200-pcie5"), lane)
    calibrated = replace(calibrated, timing=timing)
    unknown = confidence_in(auto, calibrated, "mean", campaigns)
    assert (unknown.level, unknown.high_ms) == ("calibrated", None)
    assert "policies whose misses the CPU computes in part were not validated" in unknown.why
    assert unknown.why.endswith("on this model with one request at a time")
    known = confidence_in(auto, of_model(calibrated, "olmoe-1b-7b"), "mean", campaigns)
    expected = errors_of(["lane-olmoe"], "cpu")
    assert (known.points, known.worst_error) == (6, pytest.approx(max(expected)))
    assert known.source == "validation/h200/lane-olmoe"
    assert "auto was not measured on this model" in known.why
    # All points of fiddler were on demand: the link is faster than the CPU.
    other = replace(auto, policy="fiddler")
    told = confidence_in(other, of_model(calibrated, "olmoe-1b-7b"), "mean", campaigns).why
    assert "fiddler was not measured so on this model" in told
    lone = replace(auto, policy="hybrid-split")
    told = confidence_in(lone, of_model(calibrated, "olmoe-1b-7b"), "mean", campaigns).why
    assert "not measured" not in told


def test_batches_were_measured_on_one_model(calibrated: Setting, tmp_path: Path) -> None:
    campaigns = find_campaigns("h200-pcie5")
    batches = make_trace(tmp_path / "four", requests=4, batch=4)
    together = replace(calibrated, workload=Inputs(batches).workload("last-use"))
    assert together.workload.max_batch == 4
    unknown = confidence_in(found_of(), together, "mean", campaigns)
    assert unknown.level == "calibrated"
    assert "were not validated on this model with 4 requests at a time" in unknown.why
    known = confidence_in(found_of(), of_model(together, "olmoe-1b-7b"), "mean", campaigns)
    expected = errors_of(BATCHES, "demand")
    assert (known.points, known.worst_error) == (len(expected), pytest.approx(max(expected)))
    assert "4 requests at a time" in known.why
    # Nor do a batch's errors tell about one request.
    alone = confidence_in(found_of(), of_model(calibrated, "olmoe-1b-7b"), "mean", campaigns)
    assert alone.points == len(errors_of(OLMOE, "demand"))


def test_without_measured_times_it_is_estimated(tiny: Path, few: Trace) -> None:
    advice = quick(tiny, policies=["lru"], what_if=False)
    assert {each.level for each in advice.confidence.values()} == {"estimated"}
    assert "Confidence: estimated" in advice.text
    asked = ask(few, hardware="h200-pcie5", tpot_ms=99, max_tokens=20, policies=["lru"])
    hint = "--dtype bf16 --timings validation/h200/locked-gpt-oss/run-1/timings.yaml"
    assert hint in asked.text


def test_a_package_without_the_directory_knows_of_no_errors(tmp_path: Path) -> None:
    assert VALIDATION.name == "validation"
    assert find_campaigns("h200-pcie5", tmp_path) == []
    known = [each.plan["geometry"] for each in find_campaigns("h200-pcie5")]
    assert set(known) == {"gpt-oss-20b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b"}
    assert find_campaigns("rtx4090-pcie4") == []


# ---------------------------------------------------------------------- the command


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moesim", "advise", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


WRONG: dict[str, tuple[list[str], str]] = {
    "no target": ([], "no target: give --tpot-ms 30"),
    "zero": (["--tpot-ms", "0"], "--tpot-ms 0.0: a target is a number of milliseconds above zero"),
    "no place for pins": (
        ["--tpot-ms", "3", "--pin", "no-such-place/pins.json"],
        "no-such-place is not a directory",
    ),
    "negative": (["--tpot-ms=-3"], "--tpot-ms -3"),
    "not a number": (["--tpot-ms", "nan"], "--tpot-ms nan"),
    "negative TTFT": (["--tpot-ms", "3", "--ttft-ms=-1"], "--ttft-ms -1"),
    "percentile": (["--tpot-ms", "3", "--percentile", "p42"], "--percentile p42"),
    "below the fixed part": (
        ["--tpot-ms", "3", "--gpu-memory", "1KiB"],
        "--gpu-memory 1KiB: without any expert tiny needs",
    ),
    "above the card": (
        ["--tpot-ms", "3", "--gpu-memory", "48GiB"],
        "--gpu-memory 48GiB: rtx4090-pcie4 has 23.99 GiB",
    ),
    "no unit": (["--tpot-ms", "3", "--gpu-memory", "8"], "--gpu-memory: size '8' has no unit"),
    "unknown policy": (["--tpot-ms", "3", "--policies", "lru,lrru"], "lrru"),
    "an oracle": (
        ["--tpot-ms", "3", "--policies", "belady-global"],
        "--policies belady-global: it knows",
    ),
    "more context than the card": (
        ["--tpot-ms", "3", "--context", "1073741824"],
        "without any expert",
    ),
    "bounds alone": (
        ["--tpot-ms", "3", "--policies", "belady-bypass,resident"],
        "--policies belady-bypass, resident: simulated beside every answer anyway",
    ),
    "an empty entry": (["--tpot-ms", "3", "--policies", "lru,,slru"], "is not a policy"),
    "short context": (
        ["--tpot-ms", "3", "--policies", "lru", "--context", "5"],
        "--context 5: request 0 of the trace has 13 tokens",
    ),
    "too many together": (
        ["--tpot-ms", "3", "--policies", "lru", "--batch", "7"],
        "--batch 7: the rows read have 6 requests to judge",
    ),
    "no batch": (["--tpot-ms", "3", "--batch", "0"], "--batch 0"),
    "hardware": (["--tpot-ms", "3", "--hardware", "abacus"], "unknown hardware"),
    "jobs": (["--tpot-ms", "3", "--jobs", "0"], "--jobs 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    args, said = WRONG[name]
    status = run(monkeypatch, "--trace", str(tiny), "--hardware", HARDWARE, *args)
    shown = capsys.readouterr()
    assert status == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err


def test_ttft_needs_a_prefill(tmp_path: Path) -> None:
    bare = make_trace(tmp_path / "bare", prompt=0)
    with pytest.raises(UserError, match="--ttft-ms: this trace has no prefill"):
        quick(bare, ttft_ms=5)


def test_the_command_prints_pins_and_json(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pin = tmp_path / "pins.json"
    common = ["--trace", str(tiny), "--hardware", HARDWARE, "--tpot-ms", "50", "--policies", "lru"]
    assert run(monkeypatch, *common, "--no-what-if", "--pin", str(pin)) == 0
    shown = capsys.readouterr()
    for part in ("Smallest memory for the target", "--n-cpu-moe", "--kt-num-gpu-experts", "slot"):
        assert part in shown.out
    pinned = json.loads(pin.read_text())
    assert set(pinned["layers"]) == {"1", "2", "3"}
    assert run(monkeypatch, *common, "--no-what-if", "--json") == 0
    assert json.loads(capsys.readouterr().out)["met"]
    assert run(monkeypatch, *common, "--pin", str(pin)) == 2  # nothing is written over
    assert "exists" in capsys.readouterr().err


def test_the_machine_of_a_what_if_is_the_profiles_own() -> None:
    assert load_hardware(HARDWARE).link_bytes_per_s == 23.5e9
