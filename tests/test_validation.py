"""Predicted against measured: gaps, noise, ranking and the report, worked out by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

import cli  # noqa: E402
from configs.errors import UserError  # noqa: E402
from configs.timings import LinkTimes, PolicyTimes, render  # noqa: E402
from policies.errors import PolicyError  # noqa: E402
from replay.breakdown import COMPONENTS  # noqa: E402
from replay.commands import validate  # noqa: E402
from replay.model import from_checkpoint  # noqa: E402
from replay.play import Session  # noqa: E402
from replay.validation import machine  # noqa: E402
from replay.validation.campaign import (  # noqa: E402
    PlanInputs,
    choose,
    predicted_resident_ms,
    require_same_trace,
    shown,
    timelines,
)
from replay.validation.errors import (  # noqa: E402
    at,
    gap,
    hidden_share,
    naive_ms,
    naive_stall_ms,
    paired_errors,
    rankings,
    stall_ms,
)
from replay.validation.figure import draw_scatter  # noqa: E402
from replay.validation.files import (  # noqa: E402
    RunFiles,
    alone_in,
    open_campaign,
    open_cells,
    read_campaign,
)
from replay.validation.judged import Canary, Judged, Run  # noqa: E402
from replay.validation.machine import policy_times, scaled  # noqa: E402
from replay.validation.plan import (  # noqa: E402
    Cell,
    ValidationPlan,
    calibration_points,
    cells_of,
    load_plan,
)
from replay.validation.report import write_report  # noqa: E402
from replay.validation.run import (  # noqa: E402
    Target,
    digest,
    engine_memory,
    first_difference,
    measure,
    predict,
)
from replay.validation.together import write_together  # noqa: E402
from sim.point import Point  # noqa: E402
from sim.spans import Timeline  # noqa: E402
from tests.test_timings import a_pass, model_times  # noqa: E402
from tests.traces import make_trace  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]
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
repeats: 3
"""


def plan_of(tmp_path: Path, *changes: tuple[str, str]) -> ValidationPlan:
    text = PLAN
    for old, new in changes:
        text = text.replace(old, new)
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return load_plan(path)


def result(tpot: float, *, stall: float = 1.0, steps: tuple[float, ...] = (1.0, 2.0)) -> Any:
    """A run of 2 requests, 10 decode tokens, 20 misses and 10 late."""
    times = {"mean": tpot, "p50": tpot, "p90": tpot, "p99": tpot}
    return {
        "itl_ms": times,
        "ttft_ms": {**times, "mean": 100.0},
        "decode": {"hits": 50, "late": 10, "misses": 20, "events": 10 * 16},
        "tokens": {"prefill": 4, "decode": 10},
        "h2d_bytes": 1000,
        "breakdown_ms": {
            "stall_late": stall / 4,
            "stall_miss": stall / 2,
            "stall_cpu": stall / 4,
        },
        "memory": {"peak_bytes": 100},
        "peak_memory_bytes": 98,
        "step_ms": list(steps),
        "prefill_ms": {"8": tpot * 10},
        "host_ms": dict.fromkeys(COMPONENTS, tpot / len(COMPONENTS)),
        "link_ms": stall * 2,
        "prefill_host_ms": dict.fromkeys(COMPONENTS, 100.0 / len(COMPONENTS)),
        "batch": 1,
        "duration_ms": 1000.0,
        "trace": {"model": "made-up", "judged_requests": 2},
        "produced_by": "a test",
    }


FACTS = {
    "machine": "A GPU, driver 1",
    "weights": "Weights are random.",
    "command": "moesim validate plan",
    "expert_bytes": 55_000_000,
}
BEFORE, AFTER = Canary(4.0, 55 * 10**9), Canary(4.2, 55 * 10**9)
A_RUN = Run(1, FACTS, model_times(), BEFORE, AFTER, 55_000_000)
NOTHING = Timeline("simulated", [], [], [], [], [])


def judged(
    policy: str, predicted: float, measured: tuple[float, ...], *, free: bool = True
) -> Judged:
    point = Point(policy=policy, hardware="h200-pcie5", expert_budget="25%")
    told = [result(value) for value in measured]
    return Judged(Cell(point, 1.0), A_RUN, result(predicted), free, told)


def target(cell: Cell, predicted: float = 10.0) -> Target:
    return Target(cell, result(predicted), [], cell.point.policy == "lru", 64, NOTHING)


def test_a_gap_is_relative_to_the_median_measurement() -> None:
    found = gap(judged("lru", 11.0, (9.0, 10.0, 10.5)), at("itl_ms", "mean"))
    assert found is not None
    assert (found.predicted, found.measured) == (11.0, 10.0)
    assert found.spread == pytest.approx(0.15)
    assert found.error == pytest.approx(0.1)
    each = judged("lru", 1.0, (1.0,))
    stall = gap(each, stall_ms)
    assert stall is not None
    assert stall.error == 0
    assert gap(each, at("prefill_ms", "64")) is None
    # 2 ms of the link's time, in 3/4 of which somebody waited for it, and then for the CPU.
    assert hidden_share(each.measured[0]) == pytest.approx(1 - 0.75 / 2)


def test_the_naive_estimate_is_what_it_says() -> None:
    # 3 copies a step; each 55 MB at 55 GB/s, 1 ms, and 1 + 5 + 3 + 10 us of host time.
    assert naive_ms(judged("lru", 9.0, (9.0,))) == pytest.approx(4 + 3 * (1 + 0.019))
    assert naive_stall_ms(judged("lru", 9.0, (9.0,))) == pytest.approx(3)


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


def test_the_order_of_a_plan_decides_no_pair() -> None:
    """3.05 % of the one are 2.96 % of the other."""
    cells = [judged("lru", 10.0, (10.0,)), judged("lfu", 10.4, (10.305,))]
    for group in (cells, cells[::-1]):
        (found,) = rankings(group)
        assert (found.pairs, found.agreed) == (1, 1)


def test_one_prediction_for_both_is_no_right_sign() -> None:
    cells = [judged("lru", 10.0, (10.0,)), judged("lfu", 10.0, (12.0,))]
    for group in (cells, cells[::-1]):
        (found,) = rankings(group)
        assert (found.pairs, found.agreed) == (1, 0)
        assert found.regret == pytest.approx(0.2)


def with_digest(*cells: Judged, **changes: Any) -> None:
    for each in cells:
        each.run = replace(A_RUN, facts={**FACTS, "predictions_sha256": "0" * 64}, **changes)


def test_what_was_predicted_and_never_came_is_judged(tmp_path: Path) -> None:
    """A stall or a wait that only the simulator has."""
    each = judged("lru", 10.0, (10.0,))
    with_digest(each)
    each.measured[0]["breakdown_ms"] = dict.fromkeys(each.predicted["breakdown_ms"], 0.01)
    each.measured[0]["host_ms"]["wait_for_cpu"] = 0.0
    (row,) = write_report(tmp_path, plan_of(tmp_path), [each])["points"]
    assert row["stall_is_judged"]
    assert "| demand-only | wait for cpu | 0.000 | +1.250 |" in (tmp_path / "report.md").read_text()


def test_peak_memory_has_a_spread(tmp_path: Path) -> None:
    each = judged("lru", 10.0, (10.0, 10.0))
    with_digest(each)
    each.measured[1]["peak_memory_bytes"] = 102
    (row,) = write_report(tmp_path, plan_of(tmp_path), [each])["points"]
    assert row["figures"]["memory_bytes"]["spread"] == pytest.approx(0.04)


def test_a_link_that_is_not_the_calibrated_one_is_told(tmp_path: Path) -> None:
    each = judged("lru", 10.0, (10.0,))
    with_digest(each, before=Canary(4.0, round(A_RUN.times.link.bytes_per_s * 0.95)), after=None)
    write_report(tmp_path, plan_of(tmp_path), [each])
    told = "link, before against calibration: -5.00% (**the machine drifted**)"
    assert told in (tmp_path / "report.md").read_text()


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
    plan = plan_of(tmp_path)
    cells = [judged("lru", 10.2, (10.0, 10.1)), judged("next-gate", 8.0, (9.0, 9.0), free=False)]
    cells[0].difference = "event 1: simulated, on the device"
    cells[0].run = cells[1].run = replace(A_RUN, facts={**FACTS, "predictions_sha256": "0" * 64})
    report = write_report(tmp_path, plan, cells)
    text = (tmp_path / "report.md").read_text()
    assert "2 of 8 points" in text
    assert "resident, after against before: +5.00% (**the machine drifted**)" in text
    assert "link, after against before: +0.00% (steady)" in text
    assert "| lru | 25% | x1 | 10.050 | 1.0% | 10.200 | +1.5% |" in text
    assert "**differ**" in text
    assert "| TPOT, prefetching, worst | 1 | 8% | 11.1% | 21.6% | **missed** |" in text
    assert "| TPOT, demand-only, worst | 1 | 5% | 1.5% |" in text
    assert "| prefetching | 8 | 1 | 90.0 to 90.0 | 11.1% | 11.1% |" in text
    assert "| prefetching | decide | 1.125 | -0.125 | -1.4% | -1.4% |" in text
    assert "| lru | 25% | x1 | 10.050 | 1.0% | 10.200 | +1.5% | 10.050 | 1.0% |" in text
    assert "p99" not in text
    assert report["batch"] == 1
    assert [row["on_cpu"] for row in report["points"]] == [False, False]
    assert report["summary"]["prefetching"]["tpot_ms"]["worst"] == pytest.approx(1 / 9)
    assert json.loads((tmp_path / "report.json").read_text())["points"][0]["policy"] == "lru"
    assert {path.suffix for path in draw_scatter([report], tmp_path)} == {".png", ".svg"}
    other = tmp_path / "other"
    other.mkdir()
    write_report(other, plan, cells)
    both = write_together([tmp_path, other], tmp_path / "far" / "all")
    assert "| TPOT, prefetching, worst | 2 | 8% | 11.1% | 21.6% | **missed** |" in both
    assert json.loads((tmp_path / "far" / "all" / "summary.json").read_text())["all"]["ranking"][
        "groups"
    ]


def test_how_slow_the_host_was_is_told(tmp_path: Path) -> None:
    each = judged("lru", 10.2, (10.0, 10.1))
    usual = A_RUN.times.model_copy(update={"host_loop_ns": 50_000})
    facts = {**FACTS, "predictions_sha256": "0" * 64}
    each.run = replace(A_RUN, facts=facts, times=usual)
    report = write_report(tmp_path, plan_of(tmp_path), [each])
    assert report["runs"][0]["host_slowness"] is None  # older measurements do not say
    for run, loop_ns in zip(each.measured, (50_000.0, 60_000.0), strict=True):
        run["host_loop_ns"] = loop_ns
    report = write_report(tmp_path, plan_of(tmp_path), [each])
    assert report["points"][0]["host_slowness"] == [1.0, 1.2]
    assert (
        "- host, 2 measurements against calibration: +10.0% in the median "
        "(**the machine drifted**), from +0.0% to +20.0%"
    ) in (tmp_path / "report.md").read_text()


def test_a_run_that_was_cut_off_says_so(tmp_path: Path) -> None:
    each = judged("lru", 10.2, (10.0, 10.1))
    each.run = replace(A_RUN, facts={**FACTS, "predictions_sha256": "0" * 64}, after=None)
    write_report(tmp_path, plan_of(tmp_path), [each])
    assert "The run was cut off" in (tmp_path / "report.md").read_text()


def test_tails_are_told_from_a_thousand_tokens_up(tmp_path: Path) -> None:
    each = judged("lru", 10.2, (10.0,))
    each.run = replace(A_RUN, facts={**FACTS, "predictions_sha256": "0" * 64})
    (row,) = write_report(tmp_path, plan_of(tmp_path), [each])["points"]
    assert "tpot_p99_ms" not in row["figures"]
    each.predicted["tokens"]["decode"] = 1000
    (row,) = write_report(tmp_path, plan_of(tmp_path), [each])["points"]
    assert row["figures"]["tpot_p99_ms"]["measured"] == 10.0
    told = (tmp_path / "report.md").read_text()
    assert "| p99 measured, ms | spread | predicted | error |" in told
    short = judged("lfu", 10.2, (10.0,))
    short.run = each.run
    write_report(tmp_path, plan_of(tmp_path), [each, short])
    assert "| +2.0% | - | - | - | - |" in (tmp_path / "report.md").read_text()


def test_a_prefills_error_is_told_by_what_the_host_did(tmp_path: Path) -> None:
    each = judged("fiddler", 10.2, (10.0,))
    each.run = replace(A_RUN, facts={**FACTS, "predictions_sha256": "0" * 64})
    parts = {"decide": 12.0, "wait_for_copy": 28.0}
    none = dict.fromkeys(COMPONENTS, 0.0)
    each.predicted["prefill_host_ms"] = {**none, **parts}
    each.measured[0]["prefill_host_ms"] = {**none, "decide": 20.0, "wait_for_copy": 20.0}
    each.predicted["prefill"] = {"cpu": 3}
    (row,) = write_report(tmp_path, plan_of(tmp_path), [each])["points"]
    told = (tmp_path / "report.md").read_text().partition("## Where a prefill's error")[2]
    assert "| demand-only | decide | 20.000 | -8.000 | -20.0% | -20.0% |" in told
    assert "| demand-only | wait for copy | 20.000 | +8.000 | +20.0% | +20.0% |" in told
    assert row["on_cpu"]
    del each.measured[0]["prefill_host_ms"]  # as older measurements
    del each.measured[0]["batch"]
    report = write_report(tmp_path, plan_of(tmp_path), [each])
    assert "## Where a prefill's error" not in (tmp_path / "report.md").read_text()
    assert report["batch"] == 1


def test_a_timeline_has_both_runs_of_a_point_whose_decisions_depend_on_time() -> None:
    found = [
        target(Cell(Point(policy=name, hardware="h200-pcie5", expert_budget="25%"), 1.0))
        for name in ("lru", "next-gate")
    ]
    assert shown(found) is None
    for each in found:
        each.simulated, each.timed = (
            Timeline(name, [(0, 0, -1, 0), (1500, 3, 0, 2)], [], [], [0], [2000])
            for name in ("simulated", "measured")
        )
    chosen = shown(found)
    assert chosen is not None
    workload: Any = SimpleNamespace(steps=lambda: [SimpleNamespace(prefill_tokens=0)])
    (name,) = timelines(chosen, workload)
    assert name == "timeline.json"
    told: Any = timelines(chosen, workload)[name]
    assert told["otherData"]["point"] == "next-gate 25% x1"
    spans = [event for event in told["traceEvents"] if event["ph"] == "X"]
    assert [(event["pid"], event["name"], event["dur"]) for event in spans] == [
        (1, "decide", 1.5),
        (2, "decide", 1.5),
    ]


def test_the_last_prefill_has_a_timeline_too() -> None:
    one = target(Cell(Point(policy="next-gate", hardware="h200-pcie5", expert_budget="25%"), 1.0))
    begins, ends = [0, 2000, 4000, 6000], [2000, 4000, 6000, 8000]
    marks = [(0, 0, -1, 0), *((end - 500, 3, 0, 2) for end in ends)]
    one.simulated, one.timed = (
        Timeline(name, marks, [], [], begins, ends) for name in ("simulated", "measured")
    )
    tokens = (9, 0, 5, 0)
    workload: Any = SimpleNamespace(
        steps=lambda: [SimpleNamespace(prefill_tokens=each) for each in tokens]
    )
    found: Any = timelines(one, workload)
    assert found["timeline-prefill.json"]["otherData"]["steps"] == "2 to 2"
    assert found["timeline.json"]["otherData"]["steps"] == "3 to 3"


# ---------------------------------------------------------------------- a campaign


def a_run(out: Path, cells: list[Cell], measured: list[tuple[Cell, int]]) -> RunFiles:
    """A run that predicted ``cells`` and got as far as ``measured``."""
    files = RunFiles(out)
    targets = [target(cell) for cell in cells]
    files.predicted(model_times(), targets, digest(targets), FACTS)
    files.canaries(BEFORE, None)
    for cell, repeat in measured:
        files.measured(target(cell), repeat, result(10.0 + repeat), None)
    return files


def test_a_campaign_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    cells = open_cells(out, plan)
    assert len(cells) == 8
    first, second = cells[:2]
    a_run(out, cells, [(first, 0), (second, 0), (first, 1), (first, 2), (second, 1)])
    path = out / "run-1" / "measurements.jsonl"
    with path.open("a") as file:
        file.write('{"cell": "lru 25% x2.2", "rep')  # killed while it wrote
    (done,) = read_campaign(out, plan)
    assert (done.cell.label, len(done.measured), done.run.number) == (first.label, 3, 1)
    assert done.run.after is None
    open_campaign(out, plan)  # the same plan goes on
    left = open_cells(out, plan)
    assert [cell.label for cell in left] == [cell.label for cell in cells[1:]]
    files = a_run(out, left, [(cell, repeat) for cell in left for repeat in range(3)])
    files.canaries(BEFORE, AFTER)
    assert open_cells(out, plan) == []
    assert [each.run.number for each in read_campaign(out, plan)] == [1, *[2] * 7]
    assert read_campaign(out, plan)[0].run.times == model_times()


def test_a_report_grows_with_its_campaign(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    cells = list(cells_of(plan))
    for some in (cells[:2], cells[2:]):
        a_run(out, some, [(cell, repeat) for cell in some for repeat in range(3)])
        report = validate._report(out, plan)
    assert len(report["points"]) == 8
    assert [run["number"] for run in report["runs"]] == [1, 2]
    assert (out / "scatter.png").is_file()


def test_a_report_of_what_is_there_needs_no_gpu(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    first, *_ = cells_of(plan)
    command = ["validate", str(tmp_path / "plan.yaml"), "--out", str(out), "--report-only"]
    told = CliRunner().invoke(cli.app, command)
    assert isinstance(told.exception, UserError)
    assert "no point has been measured 3 times yet" in str(told.exception)
    a_run(out, [first], [(first, repeat) for repeat in range(3)])
    told = CliRunner().invoke(cli.app, command)
    assert told.exit_code == 0, told.output
    assert "1 of 8 points" in (out / "report.md").read_text()
    assert "7 of 8 points are not measured yet" in told.output


def test_results_are_read_where_torch_is_not_installed(tmp_path: Path) -> None:
    """A campaign's report from its files, and a summary of it."""
    shipped = PROJECT / "validation" / "h200" / "locked-gpt-oss"
    kept = tmp_path / "kept"
    shutil.copytree(shipped, kept)
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors')));"
        "import cli; sys.exit(cli.main())"
    )
    for command in (
        ["validate", "locked-gpt-oss", "--out", str(kept), "--report-only"],
        ["validation-summary", str(kept), "--out", str(tmp_path / "all")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=PROJECT
        )
        assert done.returncode == 0, done.stderr
        assert "| TPOT, prefetching, median |" in done.stdout
    assert (kept / "report.json").read_bytes() == (shipped / "report.json").read_bytes()


def test_the_first_full_measurement_of_a_point_stays(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    (cell, *_) = cells_of(plan)
    for _ in range(2):
        a_run(out, [cell], [(cell, repeat) for repeat in range(3)])
    (found,) = read_campaign(out, plan)
    assert found.run.number == 1


def test_a_run_that_ended_before_it_measured_is_passed_over(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    RunFiles(out)
    assert read_campaign(out, plan) == []
    assert RunFiles(out).folder.name == "run-2"


def test_only_directories_of_runs_count(tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    for name in ("run-old", "run-2.bak", "run-3"):
        (out / name).mkdir()
    assert RunFiles(out).folder.name == "run-4"  # 1 and 2 were moved away
    assert read_campaign(out, plan) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("measurements.jsonl", '{"cell"', '{"ce', r"measurements.jsonl, line 1: is damaged"),
        ("run.json", "{", "", r"run.json: is damaged"),
        ("predictions.json", '"late": 10', '"late": 11', r"not what run.json has the SHA-256 of"),
    ],
)
def test_what_was_damaged_or_changed_is_told(
    tmp_path: Path, name: str, old: str, new: str, said: str
) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    (cell, *_) = cells_of(plan)
    a_run(out, [cell], [(cell, repeat) for repeat in range(3)])
    path = out / "run-1" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        read_campaign(out, plan)
    assert path.read_text() == text.replace(old, new, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="campaigns run on CUDA under Linux")
def test_two_campaigns_do_not_measure_in_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    open_campaign(out, plan_of(tmp_path))
    with alone_in(out):
        with pytest.raises(UserError, match="another `moesim validate` is at work"), alone_in(out):
            raise AssertionError("two at once")
        told = CliRunner().invoke(
            cli.app, ["validate", str(tmp_path / "plan.yaml"), "--out", str(out)]
        )
        assert "is at work" in str(told.exception)
    with alone_in(out):
        assert list(out.iterdir()) == [out / "plan.json"]


def test_reports_that_cannot_be_read_as_one_are_refused(tmp_path: Path) -> None:
    each = judged("lru", 10.0, (10.0,))
    with_digest(each)
    write_report(tmp_path, plan_of(tmp_path), [each])
    with pytest.raises(UserError, match="is named twice"):
        write_together([tmp_path, tmp_path / "." / "sub" / ".."], tmp_path / "all")
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text('{"points": []}')
    with pytest.raises(UserError, match="is of another version"):
        write_together([old], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    lines = write_together([tmp_path], tmp_path / "far" / "all")
    assert "| [a plan](../../report.md) | 1 | A GPU |" in lines


def test_another_plans_directory_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    open_campaign(out, plan_of(tmp_path))
    with pytest.raises(UserError, match=r"holds another plan's results \(plan.json differs\)"):
        open_campaign(out, plan_of(tmp_path, ("[25%, 50%]", "[25%]")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    with pytest.raises(UserError, match="exists and is not empty"):
        open_campaign(tmp_path / "full", plan_of(tmp_path))
    assert (tmp_path / "full" / "file").read_text() == "something"


def test_a_campaign_of_one_calibration_budget_goes_on(tmp_path: Path) -> None:
    """As an older release wrote its plan, and its times without shares."""
    plan, out = plan_of(tmp_path), tmp_path / "out"
    open_campaign(out, plan)
    path = out / "plan.json"
    told = json.loads(path.read_text())
    assert told.pop("calibration_budgets") == [
        "18.75%",
        "37.5%",
        "62.5%",
        "87.5%",
    ]
    older = json.dumps({**told, "calibration_budget": "37.5%"})
    path.write_text(older)
    cells = open_cells(out, plan)
    a_run(out, cells, [(cells[0], repeat) for repeat in range(3)])
    open_campaign(out, plan)
    assert len(open_cells(out, plan)) == 7
    assert path.read_text() == older
    with pytest.raises(UserError, match="another plan's results"):
        open_campaign(out, plan_of(tmp_path, ("[1, 2.2]", "[1]")))
    path.write_text(json.dumps({**told, "calibration_budget": "25%"}))
    with pytest.raises(UserError, match=r"plan\.json: calibration_budgets: 25% is a judged"):
        open_campaign(out, plan)


@pytest.mark.parametrize(
    ("name", "left"), [("locked-olmoe", 0), ("locked-qwen", 4), ("locked-gpt-oss", 9)]
)
def test_what_was_measured_first_can_go_on(tmp_path: Path, name: str, left: int) -> None:
    """Of each campaign's first run, with one calibration budget and no workspace."""
    kept = Path(__file__).resolve().parents[1] / "validation" / "h200" / name
    shutil.copy(kept / "plan.json", tmp_path)
    shutil.copytree(kept / "run-1", tmp_path / "run-1")
    plan = load_plan(name)
    open_campaign(tmp_path, plan)
    assert len(open_cells(tmp_path, plan)) == left


def test_policies_and_calibration_budgets_alternate(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("policies: [lru, ", "policies: [lru, slru, lfu, "))
    points = list(calibration_points(plan))
    told = [(point.label, point.expert_budget) for point in points]
    assert len(set(told)) == len(told) == 4 * 4
    for first, second in pairwise(told):
        assert first[0] != second[0]
        assert first[1] != second[1] or second[0] == "lru"  # the next turn


def test_policy_times_are_by_share_of_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run a point; budgets that are the same share count as one."""
    plan = plan_of(tmp_path, ("repeats: 3", "calibration_budgets: [60%, 20%, 60.0%]"))
    ran: list[Point] = []

    def run(session: Any, inputs: Any, point: Point) -> tuple[PolicyTimes, float]:
        ran.append(point)
        share = {"60%": 0.6, "20%": 0.2, "60.0%": 0.6}[str(point.expert_budget)]
        ns = 10 * len(ran)
        return PolicyTimes(
            expert_share=share,
            decision_ns=ns,
            awaited_ns=ns,
            copy_issue_ns=ns,
            step_ns=ns,
            segment_launch_ns=ns,
            experts_launch_ns=ns,
        ), float(ns)

    monkeypatch.setattr(machine, "_policy_run", run)
    points = list(calibration_points(plan))
    nothing: Any = None
    found = {
        label: (times, setup) for label, times, setup in policy_times(nothing, nothing, points)
    }
    assert ran == points
    times, setup = found["lru"]
    assert setup == 50
    # lru ran first, third and fifth: at 60%, at 20% and at 60.0%.
    assert [(each.expert_share, each.decision_ns) for each in times] == [(0.2, 30), (0.6, 30)]
    assert set(found) == {"lru", "next-gate depth=2"}


def test_the_measured_workspace_is_in_the_prediction() -> None:
    planned = {
        "nonexpert_bytes": 1000,
        "kv_bytes": 5,
        "workspace_bytes": 7,
        "slots_bytes": 300,
        "gpu_memory_bytes": 1400,
        "slots": 3,
    }
    found = engine_memory(planned, 20, 191)
    assert found == {"kv_bytes": 20, "workspace_bytes": 191, "peak_bytes": 1511, "fits": False}


def test_only_whole_groups_that_fit_into_the_time_are_measured(tmp_path: Path) -> None:
    targets = [target(cell) for cell in cells_of(plan_of(tmp_path))]
    assert choose(targets, 3, 1.0, None) == targets
    # A group is 2 policies of 2 s each, 3 times.
    found = choose(targets, 3, 1.0, 25.0)
    assert len(found) == 4
    assert len({(each.cell.point.expert_budget, each.cell.link_scale) for each in found}) == 2
    assert choose(targets, 3, 1.0, 25.0) == found
    with pytest.raises(UserError, match="give more --minutes"):
        choose(targets, 3, 1.0, 11.0)


def test_predictions_and_measurements_of_a_campaign_become_a_report(
    shared: Path, tmp_path: Path
) -> None:
    """The way of a campaign on a plain CPU, with times of no machine: all but the calibration."""
    model = str(shared / "models" / "olmoe-twin")
    layers, columns = 16, ("weights", "lookahead_1")
    trace = make_trace(
        tmp_path / "trace", layers=layers, experts=64, top_k=8, prompt=3, output=3, columns=columns
    )
    plan = plan_of(
        tmp_path,
        ("geometry: olmoe-1b-7b", f"model: {model}"),
        ("{name: next-gate, set: {depth: 2}}", "next-gate"),
        ("[25%, 50%]", "[50%]"),
        ("[1, 2.2]", "[1]"),
        ("requests: [1, 2]", "requests: [2]"),
        ("requests: [0]", "requests: [0]"),
        ("repeats: 3", "repeats: 1"),
    )
    inputs = PlanInputs(plan, trace)
    passes = [
        a_pass(tokens).model_copy(update={"segment_ns": (150_000,) * layers}) for tokens in (1, 8)
    ]
    times, out, said = model_times(*passes, workspace_bytes=1_000), tmp_path / "out", []
    open_campaign(out, plan)
    ready = from_checkpoint(Path(model), "cpu")
    try:
        session = Session.for_workloads(ready, *inputs.workloads)
        targets = predict(session, inputs.judged, times, open_cells(out, plan))
        cache = session.kv_capacity * inputs.judged.manifest.geometry.kv_bytes_per_token
        for each in targets:
            told = each.predicted["memory"]
            assert (told["workspace_bytes"], told["kv_bytes"]) == (1_000, cache)
            slots = told["slots"] * ready.layout.nbytes
            nonexpert = told["nonexpert_bytes"]
            assert told["peak_bytes"] == nonexpert + cache + 1_000 + slots
        files = RunFiles(out)
        resident_ms = predicted_resident_ms(plan, inputs, session, times)
        # No copies, no misses: the segments and what the host and the experts take beside them.
        assert resident_ms > 0.15 * layers
        facts = {
            **FACTS,
            "expert_bytes": ready.layout.nbytes,
            "resident_predicted_ms": BEFORE.resident_ms / 1.5,
        }
        files.predicted(times, targets, digest(targets), facts)
        files.canaries(BEFORE, None)
        measure(session, inputs.judged, targets, plan.repeats, files.measured, said.append)
        files.canaries(BEFORE, AFTER)
    finally:
        ready.close()
    judged_cells = read_campaign(out, plan)
    report = write_report(out, plan, judged_cells)
    assert [row["decisions_equal"] for row in report["points"]] == [True, None]
    assert len(said) == 2
    row = report["points"][0]
    assert row["figures"]["bytes"]["error"] == 0
    assert row["figures"]["memory_bytes"] is None
    found = row["figures"]["tpot_ms"]
    parts = [part["measured"] for part in row["components_ms"].values() if part]
    assert sum(parts) == pytest.approx(found["measured"], rel=0.02)
    parts = [part["predicted"] for part in row["components_ms"].values() if part]
    assert sum(parts) == pytest.approx(found["predicted"], rel=1e-3)
    told = (out / "report.md").read_text()
    assert "resident, before against its prediction: +50.00% (**the machine drifted**)" in told
    require_same_trace(out, plan, inputs.judged.trace.digest)
    with pytest.raises(UserError, match="run 1 judged the trace of digest"):
        require_same_trace(out, plan, "0" * 64)
    assert (out / "run-1" / "timings.yaml").read_text() == render(times)
    assert json.loads((out / "run-1" / "run.json").read_text())["canaries"]["after"] == asdict(
        AFTER
    )


def test_requests_that_decode_nothing_are_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    trace = make_trace(tmp_path / "trace", layers=16, experts=64, top_k=8, output=0)
    plan = plan_of(tmp_path)
    with pytest.raises(UserError, match=r"requests 1, 2 have no decode step to time"):
        PlanInputs(plan, trace)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("next-gate, set: {depth: 2}", "score-ema, set: {}"), "score-ema needs the column"),
        (("[25%, 50%]", "[50%, 1%]"), "expert budget"),
    ],
)
def test_what_a_policy_lacks_is_told_before_anything_is_measured(
    tmp_path: Path, changed: tuple[str, str], said: str
) -> None:
    columns = ("weights", "lookahead_1", "lookahead_2")
    trace = make_trace(tmp_path / "trace", layers=16, experts=64, top_k=8, columns=columns)
    PlanInputs(plan_of(tmp_path), trace)
    with pytest.raises((UserError, PolicyError), match=said):
        PlanInputs(plan_of(tmp_path, changed), trace)
    # The plan, once mended, may have the same directory.
    command = ["validate", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(cli.app, [*command, "--trace", str(tmp_path / "trace")])
    assert isinstance(told.exception, UserError | PolicyError)
    assert said in str(told.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("olmoe-dev --out {out} --minutes 0", "--minutes 0: give a number above 0"),
        ("nobodys --out {out}", "nobodys"),
        ("olmoe-dev --out {full}", "exists and is not empty"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, options: str, said: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("something")
    command = options.format(out=tmp_path / "out", full=full)
    told = CliRunner().invoke(cli.app, ["validate", *command.split()])
    assert isinstance(told.exception, UserError)
    assert said in str(told.exception)


def test_a_plan_is_every_policy_at_every_budget_and_link(tmp_path: Path) -> None:
    cells = list(cells_of(plan_of(tmp_path)))
    assert len(cells) == 2 * 2 * 2
    assert cells[-1].label == "next-gate depth=2 50% x2.2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("requests: [1, 2]", "requests: [0, 2]"), "request 0 is judged and calibrated on"),
        (("budgets: [25%, 50%]", "budgets: [37.5%]"), "calibration_budgets: 37.5% is a judged"),
        (("budgets: [25%, 50%]", "budgets: [5%]\ncalibration_budget: 5%"), "5% is a judged"),
        (("repeats: 3", "repeats: 3\ncalibration_budgets: []"), "calibration_budgets"),
        (("requests: [0]", "requests: [0]\nfit_requests: [2]"), "2 is judged and fitted on"),
        (("[1, 2.2]", "[0.5]"), "slower, not faster"),
        (("[1, 2.2]", "[.nan]"), "slower, not faster"),
        (("[1, 2.2]", "[2.2, 2.2000001]"), "lru 25% x2.2 is there twice"),
        (("budgets: [25%, 50%]", "budgets: [25%, 25.0%]"), "lru 25% x1 is there twice"),
        (("[lru,", "[lru, lru,"), "lru 25% x1 is there twice"),
        (("budgets: [25%, 50%]", "budgets: [37.50%]"), "calibration_budgets: 37.5% is a judged"),
        (("budgets: [25%, 50%]", "budgets: [plenty]"), "expert budget 'plenty'"),
        (("[lru,", "[swapmoe,"), "policy swapmoe changes the routing"),
        (("[lru,", "[resident,"), "policy resident has no budget"),
        (("geometry: olmoe-1b-7b", ""), "give geometry or model"),
    ],
)
def test_a_plan_that_judges_what_it_was_calibrated_on_is_refused(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(tmp_path, change)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("olmoe-dev", 20),
        ("gpt-oss-dev", 4),
        ("locked-olmoe", 32),
        ("locked-qwen", 32),
        ("locked-gpt-oss", 24),
        ("second-olmoe", 24),
        ("second-qwen", 24),
        ("second-gpt-oss", 24),
        ("lane-olmoe", 18),
        ("batch-olmoe", 18),
        ("long-olmoe", 4),
        ("third-olmoe", 24),
        ("third-batch-olmoe", 9),
    ],
)
def test_the_shipped_plans_are_sound(name: str, points: int) -> None:
    assert len(list(cells_of(load_plan(name)))) == points


def test_the_second_sets_requests_are_of_other_traces() -> None:
    """Prompts and sampling are others, so the same numbers name other requests."""
    first, second = (
        {load_plan(f"{kind}-{name}").trace for name in ("olmoe", "qwen", "gpt-oss")}
        for kind in ("locked", "second")
    )
    assert not first & second


def test_what_is_locked_was_not_developed_on() -> None:
    developed, locked = (
        [load_plan(name) for name in names]
        for names in (
            ("olmoe-dev", "gpt-oss-dev"),
            ("locked-olmoe", "locked-qwen", "locked-gpt-oss"),
        )
    )
    known = {choice.name for plan in developed for choice in plan.policies}
    judged_names = {choice.name for plan in locked for choice in plan.policies}
    assert len(judged_names) >= 8
    assert len(judged_names - known) >= 2
    assert {plan.geometry for plan in locked} - {plan.geometry for plan in developed}
    assert sum(len(list(cells_of(plan))) for plan in locked) >= 60
    for plan in locked:
        others = [other for other in developed if other.trace == plan.trace]
        assert not any(set(other.requests) & set(plan.requests) for other in others)
