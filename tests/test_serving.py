"""Serving: as plain simulations where both run the same; what is drawn and scaled is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from configs.errors import UserError
from sim import Point, run_point
from sim.point import inputs_for
from sim.serving import serve
from sim.serving.arrivals import coming, read_arrivals
from sim.serving.checks import Integral, Ledger
from sim.serving.config import Service
from sim.serving.requests import Request, draw, library
from sim.serving.schedule import Rules, Scheduler
from tests.served import at, azure_hour, run, workload
from tests.test_timings import a_pass, model_times, written
from tests.traces import ALL_COLUMNS, make_trace
from tracer.trace import Trace

MACHINE = {"hardware": "rtx4090-pcie4", "expert_budget": "50%"}
SAMPLE = {"hardware": "rtx4090-pcie4", "geometry": "olmoe-1b-7b", "expert_budget": "25%"}
SAME = (
    *("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "decode", "prefill", "prefetch", "quality"),
    *("h2d_bytes", "copies", "evictions", "breakdown_ms", "duration_ms", "tokens_per_s"),
    *("link_busy_share", "memory", "trace", "timing"),
)
CAUSAL = [name for name in policies.names() if not policies.get(name).oracle]
#: needs a trained predictor's column, which the sample has
LEARNED = "promoe"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Six requests of 5 prefill and 12 decode rows, all columns but a trained one."""
    columns = [name for name in ALL_COLUMNS if not name.startswith("learned")]
    return make_trace(
        tmp_path_factory.mktemp("serving") / "tiny", requests=6, columns=columns, seed=2
    )


def azure(path: Path, *rows: tuple[float, int, int]) -> Path:
    """A recorded file of (second of a minute, prompt, output) rows."""
    lines = [f"2023-11-16 18:17:{second:010.7f},{p},{o}" for second, p, o in rows]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


def same(served: dict[str, Any], simulated: dict[str, Any]) -> None:
    for name in SAME:
        assert served[name] == simulated[name], name


# ---------------------------------------------------------------------- equal to simulate


@pytest.mark.parametrize("policy", [name for name in CAUSAL if name != LEARNED])
def test_one_user_in_a_closed_loop_is_the_plain_simulation(policy: str, tiny: Trace) -> None:
    """Times, hits and bytes, whatever the policy reads of the trace."""
    share = "100%" if policy == "layer-stream" else "60%"
    given_budget = {} if policies.get(policy).needs_all else {"expert_budget": share}
    point = Point(policy=policy, hardware="rtx4090-pcie4", **given_budget)  # type: ignore[arg-type]
    simulated = run_point(inputs_for(tiny, point), point)
    served = serve(
        tiny,
        policy=policy,
        hardware="rtx4090-pcie4",
        arrivals="closed",
        users=1,
        batch=1,
        **given_budget,
    )
    same(served.result, simulated)
    assert served.result["queueing_ms"]["p99"] == 0


@pytest.mark.parametrize(
    ("policy", "scheduler"),
    [
        ("lru", "continuous"),
        ("next-gate", "static"),
        ("hybrid-split", "continuous"),
        (LEARNED, "continuous"),
    ],
)
def test_one_user_on_the_sample(policy: str, scheduler: str) -> None:
    """A cache policy, prefetching ones, and one with a CPU lane."""
    point = Point(policy=policy, max_tokens=400, **SAMPLE)  # type: ignore[arg-type]
    simulated = run_point(inputs_for(Trace.open("sample"), point), point)
    served = serve(
        "sample",
        policy=policy,
        max_tokens=400,
        arrivals="closed",
        users=1,
        batch=1,
        scheduler=scheduler,
        **SAMPLE,
    )
    same(served.result, simulated)


@pytest.mark.parametrize("policy", ["lru", "next-gate", "hybrid-split", "lfu-decay", "hobbit"])
def test_static_batches_are_those_of_a_trace_recorded_in_batches(
    policy: str, tmp_path: Path
) -> None:
    """Requests that decode together, recorded so or drawn so."""
    columns = ("weights", "lookahead_1", "gate_probs")
    trace = make_trace(tmp_path / "pairs", requests=6, prompt=0, batch=2, columns=columns)
    point = Point(policy=policy, **MACHINE)  # type: ignore[arg-type]
    simulated = run_point(inputs_for(trace, point), point)
    served = serve(
        trace, policy=policy, arrivals="closed", users=2, batch=2, scheduler="static", **MACHINE
    )
    same(served.result, simulated)
    assert served.result["ttft_ms"]["mean"] is None
    assert served.result["first_decode_ms"]["mean"] > 0


# ---------------------------------------------------------------------- what is served


def test_requests_are_drawn_whole_in_order_and_reuse_is_declared(tiny: Trace) -> None:
    served = serve(tiny, policy="lru", arrivals="poisson", rate=50.0, requests=14, **MACHINE)
    assert served.requests["trace_request"].tolist() == [0, 1, 2, 3, 4, 5] * 2 + [0, 1]
    reuse = served.result["reuse"]
    assert reuse["reused"]
    assert reuse["most_times"] == 3
    assert reuse["times"] == {"0": 3, "1": 3, "2": 2, "3": 2, "4": 2, "5": 2}
    assert served.result["tokens"] == {"prefill": 14 * 5, "decode": 14 * 12}


def test_requests_that_a_policy_learned_from_are_not_served(tiny: Trace) -> None:
    served = serve(
        tiny, policy="static", arrivals="closed", users=2, requests=8, fit_share=0.34, **MACHINE
    )
    inputs = inputs_for(tiny, Point(policy="static", fit_share=0.34, **MACHINE))  # type: ignore[arg-type]
    assert set(served.requests["trace_request"]) == set(inputs.judged)
    assert inputs.fitted_on
    assert served.result["trace"]["fitted_requests"] == len(inputs.fitted_on)


def test_scaled_lengths_fit_the_trace_and_what_is_cut_is_counted(tmp_path: Path) -> None:
    """Prompts x 4 / 8, outputs x 7 / 14; the trace's second request has 3 prompt rows only."""
    work = workload([(4, 6), (3, 6)])
    path = azure(tmp_path / "a.csv", (1, 8, 14), (2, 8, 1), (3, 2, 14), (4, 1, 5))
    arrivals = coming(Service(arrivals=str(path), lengths="scaled"), 2)
    drawing = draw(library(work), arrivals, "scaled")
    assert drawing.lengths["prompt_factor"] == drawing.lengths["output_factor"] == 0.5
    assert drawing.lengths["prompt_cut"] == 1
    assert drawing.lengths["prompt_cut_tokens"] == 1
    assert drawing.lengths["output_cut"] == 0
    assert [request.prompt for request in drawing.requests] == [4, 3, 1, 1]
    # An output token less than decode rows: the prefill yields the first.
    assert [request.decode for request in drawing.requests] == [6, 0, 6, 1]


def test_exact_lengths_are_the_arrivals_own(tiny: Trace, tmp_path: Path) -> None:
    path = azure(tmp_path / "a.csv", (1, 2, 4), (1.5, 5, 13), (2, 1, 1))
    served = serve(tiny, policy="lru", arrivals=str(path), lengths="exact", **MACHINE)
    assert served.requests["prompt_tokens"].tolist() == [2, 5, 1]
    assert served.requests["decode_tokens"].tolist() == [3, 12, 0]
    assert served.requests["arrival_ns"].tolist() == [0, 500_000_000, 1_000_000_000]
    assert served.result["arrivals"]["rows"] == 3


def test_answers_of_one_token_have_no_tpot(tiny: Trace, tmp_path: Path) -> None:
    path = azure(tmp_path / "a.csv", (1, 2, 1), (1, 5, 1))
    served = serve(tiny, policy="lru", arrivals=path, lengths="exact", slo_tpot_ms=1e-3, **MACHINE)
    result = served.result
    assert result["tpot_ms"]["mean"] is result["itl_ms"]["mean"] is None
    assert result["first_decode_ms"]["mean"] is None
    assert result["goodput"]["share"] == 1
    assert result["e2el_ms"] == result["ttft_ms"]
    assert result["output_tokens_per_s"] == pytest.approx(result["requests_per_s"])


def test_requests_that_are_alike_in_a_step_are_told(tiny: Trace) -> None:
    """Six requests of the trace: eight users have the first and the second twice."""
    served = serve(tiny, policy="lru", arrivals="closed", users=8, requests=8, **MACHINE)
    assert served.result["batches"]["alike_share"] == 2 / 8
    assert any("25.0% of the requests in a step" in note for note in served.result["notes"])
    few = serve(tiny, policy="lru", arrivals="closed", users=6, requests=8, **MACHINE)
    assert few.result["notes"] == []


def test_a_file_can_be_denser(tiny: Trace, tmp_path: Path) -> None:
    path = azure(tmp_path / "a.csv", (1, 2, 4), (3, 2, 4))
    served = serve(tiny, policy="lru", arrivals=str(path), rate_scale=4.0, **MACHINE)
    assert served.requests["arrival_ns"].tolist() == [0, 500_000_000]


def test_mooncake_files(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [{"timestamp": t, "input_length": 5, "output_length": 2} for t in (10, 10, 3010.5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_arrivals(path)
    assert found.kind == "mooncake"
    assert found.times_ns.tolist() == [0, 0, 3_000_500_000]
    assert found.lines.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "count", "seconds"),
    [
        ("azure_AzureLLMInferenceTrace_conv.csv", 19_366, 3501.721937),
        ("azure_AzureLLMInferenceTrace_code.csv", 8_819, 3435.948056),
        ("mooncake_conversation_trace.jsonl", 12_031, 3536.999),
    ],
)
def test_recorded_files_of_others(shared: Path, name: str, count: int, seconds: float) -> None:
    found = read_arrivals(shared / "requests" / name)
    assert len(found.times_ns) == count
    assert found.times_ns[-1] / 1e9 == pytest.approx(seconds)


def test_a_real_trace_without_prefills(gpt_oss_trace: Trace) -> None:
    served = serve(
        gpt_oss_trace,
        policy="lru",
        hardware="rtx4090-pcie4",
        budget="12GiB",
        arrivals="poisson",
        rate=2.0,
        requests=6,
        batch=4,
        max_tokens=1500,
    )
    result = served.result
    assert result["ttft_ms"]["mean"] is None
    assert result["first_decode_ms"]["mean"] > 0
    assert result["queueing_ms"]["mean"] is not None
    assert not result["lengths"]["prefill_in_trace"]


@pytest.mark.exhaustive
def test_the_whole_recorded_hour_of_azure_conversations(shared: Path) -> None:
    served = azure_hour(shared)
    result, lengths = served.result, served.result["lengths"]
    assert result["requests"] == len(served.requests) == 19_366
    assert result["arrivals"]["rows"] == 19_366
    assert lengths["mode"] == "scaled"
    assert lengths["prompt_factor"] == 56 / 14_050
    assert lengths["output_factor"] == 74 / 1000
    assert result["reuse"]["times"] == {str(name): 1937 - (name > 5) for name in range(10)}
    assert 3501 < result["duration_ms"] / 1000 < 3510


# ---------------------------------------------------------------------- memory


def test_more_context_leaves_fewer_slots() -> None:
    def slots(**changes: Any) -> dict[str, Any]:
        served = serve(
            "sample",
            policy="lru",
            hardware="rtx4090-pcie4",
            geometry="olmoe-1b-7b",
            budget="8GiB",
            arrivals="closed",
            users=2,
            requests=2,
            max_tokens=130,
            **changes,
        )
        memory: dict[str, Any] = served.result["memory"]
        return memory

    short, long = slots(batch=2, context=256), slots(batch=2, context=4096)
    assert long["kv_bytes"] - short["kv_bytes"] == 2 * (4096 - 256) * 131_072
    assert long["slots_bytes"] < short["slots_bytes"]
    assert long["peak_bytes"] <= 8 * 2**30
    assert slots(batch=2, kv_tokens=256)["kv_bytes"] == 256 * 131_072
    assert slots(batch=4, context=256)["kv_bytes"] == 2 * short["kv_bytes"]
    chunked = slots(batch=2, context=256, prefill_chunk=8)
    assert chunked["workspace_bytes"] < short["workspace_bytes"]


# ---------------------------------------------------------------------- measured times of batches


def test_measured_batches_take_their_own_times(tmp_path: Path) -> None:
    """Continuous: by requests of the step; static: by those that the batch was formed with."""
    passes = [
        a_pass(size).model_copy(update={"requests": size, "head_ns": 10_000_000 * size})
        for size in (1, 2, 4)
    ]
    file = written(tmp_path, model_times(*passes))

    def steps(scheduler: str) -> pd.DataFrame:
        served = serve(
            "sample",
            policy="resident",
            hardware="h200-pcie5",
            geometry="olmoe-1b-7b",
            timings=str(file),
            arrivals="closed",
            users=2,
            requests=2,
            batch=2,
            max_tokens=200,
            scheduler=scheduler,
        )
        assert served.result["timing"] == "calibrated"
        decode = served.steps[served.steps["prefill_rows"] == 0]
        return decode.assign(ns=decode["end_ns"] - decode["begin_ns"])

    thinned = steps("continuous")
    assert set(thinned["requests"]) == {1, 2}
    alone = thinned[thinned["requests"] == 1]["ns"]
    assert alone.max() < 20_000_000 < thinned[thinned["requests"] == 2]["ns"].min()
    static = steps("static")
    assert set(static["requests"]) == {1, 2}
    assert set(static["lines"]) == {2}
    assert static["ns"].min() > 20_000_000


def test_one_user_with_measured_times(tmp_path: Path) -> None:
    """Also where batches were measured, and a prefill has times of its own."""
    passes = [a_pass(size).model_copy(update={"requests": size}) for size in (1, 2)]
    passes.insert(1, a_pass(64, scale=3, decision_ns=65_000))
    timings = str(written(tmp_path, model_times(*passes)))
    fields: dict[str, Any] = {**SAMPLE, "hardware": "h200-pcie5", "timings": timings}
    point = Point(policy="next-gate", max_tokens=200, **fields)
    simulated = run_point(inputs_for(Trace.open("sample"), point), point)
    assert simulated["timing"] == "calibrated"
    for scheduler in ("static", "continuous"):
        served = serve(
            "sample",
            policy="next-gate",
            max_tokens=200,
            arrivals="closed",
            users=1,
            batch=1,
            scheduler=scheduler,
            **fields,
        )
        same(served.result, simulated)


# ---------------------------------------------------------------------- results


def test_objectives_and_what_meets_them(tiny: Trace) -> None:
    rate = 0.0
    plain = serve(tiny, policy="lru", arrivals="closed", users=4, requests=12, **MACHINE)
    assert plain.result["goodput"] is None
    middle = plain.result["ttft_ms"]["p50"]
    for factor, shares in ((1e-3, {0.0}), (1.0, None), (1e3, {1.0})):
        found = serve(
            tiny,
            policy="lru",
            arrivals="closed",
            users=4,
            requests=12,
            slo_ttft_ms=middle * factor,
            slo_tpot_ms=1e6,
            **MACHINE,
        ).result["goodput"]
        assert found["requests_per_s"] >= rate
        assert shares is None or {found["share"]} == shares
        rate = found["requests_per_s"]
    assert rate == pytest.approx(plain.result["requests_per_s"])


def test_experts_an_event_grow_with_the_batch() -> None:
    served = serve(
        "sample", policy="lru", arrivals="closed", users=6, requests=10, batch=6, **SAMPLE
    )
    rows = served.result["batches"]["decode_by_requests"]
    grown = {row["requests"]: row["distinct_per_event"] for row in rows}
    assert 8 < grown[4] < grown[6] < 48
    assert served.result["batches"]["max"] == 6


def test_tables_are_written_once_and_over_nothing(tiny: Trace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    served = serve(tiny, policy="lru", arrivals="closed", users=2, out=str(out), **MACHINE)
    assert (out / "result.json").read_text() == json.dumps(served.result, indent=2) + "\n"
    frame = pd.read_parquet(out / "requests.parquet")
    pd.testing.assert_frame_equal(frame, served.requests)
    assert len(pd.read_parquet(out / "steps.parquet")) == served.result["batches"]["steps"]
    with pytest.raises(UserError, match="not empty"):
        serve(tiny, policy="lru", arrivals="closed", users=2, out=out, **MACHINE)


def test_the_same_seed_gives_the_same_bytes(tiny: Trace) -> None:
    def text(seed: int) -> str:
        return json.dumps(
            serve(
                tiny,
                policy="next-gate",
                arrivals="poisson",
                rate=300.0,
                requests=20,
                batch=3,
                arrival_seed=seed,
                **MACHINE,
            ).result
        )

    assert text(4) == text(4)
    assert text(4) != text(5)


# ---------------------------------------------------------------------- what always holds


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_comes_is_served_by_the_rules(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Little's law, conservation and limits are checked in every run; times are in order."""
    trace = _any_trace(tmp_path_factory)
    arrivals = data.draw(
        st.one_of(
            st.fixed_dictionaries(
                {
                    "arrivals": st.just("poisson"),
                    "rate": st.sampled_from([20.0, 500.0, 1e5]),
                    "arrival_seed": st.integers(0, 99),
                }
            ),
            st.fixed_dictionaries(
                {
                    "arrivals": st.just("closed"),
                    "users": st.integers(1, 7),
                    "think_ms": st.sampled_from([0.0, 0.5, 20.0]),
                }
            ),
        )
    )
    batch = data.draw(st.integers(1, 4))
    rules = data.draw(
        st.fixed_dictionaries(
            {
                "scheduler": st.sampled_from(["continuous", "static"]),
                "prefill_chunk": st.sampled_from([None, 1, 3]),
                "step_tokens": st.sampled_from([None, batch, batch + 3]),
                "kv_tokens": st.sampled_from([None, 17, 40]),
                "mixed": st.booleans(),
            }
        )
    )
    policy = data.draw(
        st.sampled_from(["lru", "next-gate", "hybrid-split", "auto", "finemoe", "lfu-decay"])
    )
    count = data.draw(st.integers(1, 9))
    served = serve(
        trace,
        policy=policy,
        hardware="t4-pcie3",
        expert_budget="60%",
        batch=batch,
        requests=count,
        **arrivals,
        **rules,
    )
    frame, result = served.requests, served.result
    assert len(frame) == count
    order = frame[["arrival_ns", "scheduled_ns", "first_token_ns", "finish_ns"]].to_numpy(np.int64)
    assert (np.diff(order, axis=1) >= 0).all()
    assert (np.diff(frame["scheduled_ns"].to_numpy(np.int64)) >= 0).all()
    assert result["batches"]["max"] <= batch
    assert served.steps["prefill_rows"].sum() == frame["prompt_tokens"].sum()
    assert served.steps["decode_rows"].sum() == frame["decode_tokens"].sum()
    for law in result["little"].values():
        assert law["mean_number"] == pytest.approx(
            law["arrivals_per_s"] * law["mean_time_ms"] / 1e3
        )


_TRACES: list[Trace] = []


def _any_trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    if not _TRACES:
        columns = ("weights", "gate_probs", "embedding", "lookahead_1", "lookahead_2")
        path = tmp_path_factory.mktemp("any") / "trace"
        _TRACES.append(make_trace(path, requests=4, columns=columns, seed=9))
    return _TRACES[0]


# ---------------------------------------------------------------------- checks that can fail


def test_a_row_computed_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Request, "rows_of_trace", lambda self, first, count: self.drawn.decode_rows[:count]
    )
    with pytest.raises(RuntimeError, match="not computed once each"):
        run(workload([(0, 3)]), at(0), 1)


def test_a_server_that_idles_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that lets the first wait until a second is there."""
    form = Scheduler.form

    def lazy(self: Scheduler) -> Any:
        alone = not self.running and len(self.waiting) == 1 and self.waiting[0].index == 0
        return ([], []) if alone else form(self)

    monkeypatch.setattr(Scheduler, "form", lazy)
    with pytest.raises(RuntimeError, match="idles while somebody is there"):
        run(workload([(0, 3)] * 2), at(0, 5000), 2)


def test_a_scheduler_that_turns_somebody_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    may_enter = Scheduler._may_enter
    monkeypatch.setattr(Scheduler, "_may_enter", lambda self: not self.running and may_enter(self))
    with pytest.raises(RuntimeError, match="fits and is not admitted"):
        run(workload([(0, 3)] * 2), at(0, 0), 2, rules=Rules(batch=2, kv_tokens=100))


def test_a_time_that_is_not_the_requests_own_breaks_littles_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    complete = Scheduler.complete

    def late(self: Scheduler, shares: Any, end: int) -> Any:
        return complete(self, shares, end + 1)

    monkeypatch.setattr(Scheduler, "complete", late)
    with pytest.raises(RuntimeError, match="Little's law, system"):
        run(workload([(0, 3)]), at(0), 1)


def test_limits_are_held() -> None:
    ledger = Ledger(Rules(batch=1, kv_tokens=3, chunk=2))
    (one,) = library(workload([(3, 1)]))
    request = Request(0, one, 3, 1)
    request.arrival = 0
    with pytest.raises(RuntimeError, match="has 3 rows"):
        ledger.step(0, one.prefill_rows, [(request, 3)])
    with pytest.raises(RuntimeError, match="4 KV tokens"):
        ledger.step(0, one.prefill_rows[:2], [(request, 2)])
    request.arrival = 9
    with pytest.raises(RuntimeError, match="not arrived"):
        ledger.step(0, one.prefill_rows[:2], [(request, 2)])
    system = Integral("system")
    system.change(5, 1)
    with pytest.raises(RuntimeError, match="time runs back"):
        system.change(4, 1)
    with pytest.raises(RuntimeError, match="fewer than none"):
        system.change(6, -2)
