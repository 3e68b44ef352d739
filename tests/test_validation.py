"""Predicted against measured: gaps, noise, ranking and the report, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from configs.errors import UserError  # noqa: E402
from configs.timings import LinkTimes  # noqa: E402
from replay.validation.errors import (  # noqa: E402
    gap,
    naive_ms,
    paired_errors,
    rankings,
    stall_gap,
)
from replay.validation.figure import draw_scatter  # noqa: E402
from replay.validation.machine import scaled  # noqa: E402
from replay.validation.plan import Cell, cells_of, load_plan  # noqa: E402
from replay.validation.report import write_report  # noqa: E402
from replay.validation.run import Canary, Judged, first_difference  # noqa: E402
from sim.point import Point  # noqa: E402
from sim.spans import Timeline  # noqa: E402
from tests.test_timings import model_times  # noqa: E402

PLAN = """
name: a plan
geometry: olmoe-1b-7b
trace: sample
hardware: h200-pcie5
calibration_requests: [0]
requests: [1, 2]
policies: [lru, {name: next-gate, set: {depth: 2}}]
budgets: [25%, 50%]
link_scales: [1, 2.2]
"""


def result(tpot: float, *, stall: float = 1.0, steps: tuple[float, ...] = (1.0, 2.0)) -> Any:
    """A run of 2 requests, 10 decode tokens, 20 misses and 10 late."""
    times = {"mean": tpot, "p50": tpot, "p90": tpot, "p99": tpot}
    return {
        "itl_ms": times,
        "ttft_ms": {**times, "mean": 100.0},
        "decode": {"hits": 50, "late": 10, "misses": 20},
        "tokens": {"prefill": 4, "decode": 10},
        "h2d_bytes": 1000,
        "breakdown_ms": {"stall_late": stall / 4, "stall_miss": stall * 3 / 4},
        "memory": {"peak_bytes": 100},
        "peak_memory_bytes": 98,
        "step_ms": list(steps),
        "trace": {"model": "made-up", "judged_requests": 2},
    }


def judged(
    policy: str, predicted: float, measured: tuple[float, ...], *, free: bool = True
) -> Judged:
    point = Point(policy=policy, hardware="h200-pcie5", expert_budget="25%")
    return Judged(
        Cell(point, 1.0), result(predicted), [], free, [result(value) for value in measured]
    )


def test_a_gap_is_relative_to_the_median_measurement() -> None:
    found = gap(judged("lru", 11.0, (9.0, 10.0, 10.5)), "itl_ms", "mean")
    assert found is not None
    assert (found.predicted, found.measured) == (11.0, 10.0)
    assert found.spread == pytest.approx(0.15)
    assert found.error == pytest.approx(0.1)
    assert stall_gap(judged("lru", 1.0, (1.0,))).error == 0


def test_the_naive_estimate_is_what_it_says() -> None:
    # 3 copies a token; each 55 MB at 55 GB/s, 1 ms, and 1 + 5 + 3 + 10 us of host time.
    found = naive_ms(judged("lru", 9.0, (9.0,)), model_times(), 4.0, 55_000_000)
    assert found == pytest.approx(4 + 3 * (1 + 0.019))


def test_steps_are_paired() -> None:
    each = judged("lru", 1.0, (1.0,))
    each.predicted["step_ms"] = [1.1, 2.0, 4.0]
    each.measured = [result(1.0, steps=(1.0, 2.0, 5.0)), result(1.0, steps=(1.0, 2.0, 5.0))]
    found = paired_errors(each)
    assert found["p50"] == pytest.approx(0.1)
    assert found["p90"] == pytest.approx(0.18)


def test_ties_are_left_out_of_the_ranking_and_wrong_signs_count() -> None:
    cells = [
        judged("lru", 10.0, (10.0, 10.1)),
        judged("lfu", 9.9, (10.2, 10.2)),  # within 3 % of lru: a tie
        judged("slru", 12.0, (9.0, 9.0)),  # predicted slowest, measured fastest
    ]
    (found,) = rankings(cells)
    assert (found.pairs, found.agreed, found.tau) == (2, 0, -1.0)
    assert (found.picked, found.best) == ("lfu", "slru")
    assert found.regret == pytest.approx(10.2 / 9.0 - 1)


def test_noise_makes_ties() -> None:
    noisy = [judged("lru", 10.0, (9.5, 10.5)), judged("lfu", 9.0, (8.8, 8.9))]
    (found,) = rankings(noisy)
    assert (found.pairs, found.tau) == (0, None)


def test_the_first_difference_is_shown() -> None:
    one: list[tuple[object, ...]] = [("gate", 0, 0), ("evict", 3)]
    assert first_difference(one, list(one)) is None
    assert first_difference(one, [("gate", 0, 0), ("evict", 4)]) == (
        "event 1: simulated ('evict', 3), on the device ('evict', 4)"
    )
    assert first_difference(one, one[:1]) == "simulated 2 events, on the device 1"


def test_a_slower_link_is_two_copies() -> None:
    link = LinkTimes(bytes_per_s=44 * 10**9, startup_ns=5, gap_ns=3)
    assert scaled(link, 1) is link
    assert scaled(link, 2.2) == LinkTimes(bytes_per_s=20 * 10**9, startup_ns=8, gap_ns=6)


def test_the_report_tells_drift_differences_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    plan = load_plan(path)
    cells = [judged("lru", 10.2, (10.0, 10.1)), judged("next-gate", 8.0, (9.0, 9.0), free=False)]
    cells[0].difference = "event 1: simulated, on the device"
    for each in cells:
        each.experts = 64
        each.simulated, each.timed = (
            Timeline(name, [(0, 0, -1, 0), (1500, 3, 0, 2)], [], [], [0], [2000])
            for name in ("simulated", "measured")
        )
    facts = {
        "machine": "A GPU, driver 1",
        "weights": "Weights are random.",
        "command": "moesim validate plan",
        "predictions_sha256": "0" * 64,
        "trace": {"model": "made-up", "judged_requests": 2},
        "decode_tokens": 10,
    }
    canaries = (Canary(4.0, 55 * 10**9), Canary(4.2, 55 * 10**9))
    report = write_report(
        tmp_path, plan.model_dump(mode="json"), facts, model_times(), cells, canaries, 55_000_000
    )
    text = (tmp_path / "report.md").read_text()
    assert "resident, after against before: +5.00% (**the machine drifted**)" in text
    assert "link, after against before: +0.00% (steady)" in text
    assert "| lru | 25% | x1 | 10.050 | 1.0% | 10.200 | +1.5% |" in text
    assert "**differ**" in text
    assert report["summary"]["prefetching"]["tpot_ms"]["worst"] == pytest.approx(1 / 9)
    assert json.loads((tmp_path / "report.json").read_text())["points"][0]["policy"] == "lru"
    shown = json.loads((tmp_path / "timeline.json").read_text())
    assert shown["otherData"]["point"] == "next-gate 25% x1"
    spans = [event for event in shown["traceEvents"] if event["ph"] == "X"]
    assert [(event["pid"], event["name"], event["dur"]) for event in spans] == [
        (1, "decide", 1.5),
        (2, "decide", 1.5),
    ]
    assert {path.suffix for path in draw_scatter(report, tmp_path)} == {".png", ".svg"}


def test_a_plan_is_every_policy_at_every_budget_and_link(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    cells = list(cells_of(load_plan(path)))
    assert len(cells) == 2 * 2 * 2
    assert cells[-1].label == "next-gate depth=2 50% x2.2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("requests: [1, 2]", "requests: [0, 2]"), "request 0 is judged and calibrated on"),
        (("budgets: [25%, 50%]", "budgets: [37.5%]"), "calibration_budget 37.5% is a judged"),
        (("[1, 2.2]", "[0.5]"), "slower, not faster"),
        (("geometry: olmoe-1b-7b", ""), "give geometry or model"),
    ],
)
def test_a_plan_that_judges_what_it_was_calibrated_on_is_refused(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace(*change))
    with pytest.raises(UserError, match=said):
        load_plan(path)


def test_the_shipped_plan_is_sound() -> None:
    plan = load_plan("olmoe-dev")
    assert len(list(cells_of(plan))) == 20
