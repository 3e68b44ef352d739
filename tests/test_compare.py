"""`moesim compare`: tables are the sweep's rows, verdicts, what cannot run and why."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import cli
from configs.errors import UserError
from sim import sweep
from sim.compare import (
    BEYOND,
    BOUND,
    COLUMNS,
    Comparison,
    cells,
    choices_of,
    compare,
    config_of,
    everything,
    leave_out,
    render,
    verdict_of,
)
from sim.plots_rankings import contestants, draw_rankings
from sim.selection import prepare
from sim.sweeps import PolicyChoice
from tests.bench.results_tables import change, geometric_mean, markdown, times
from tests.traces import make_trace
from tracer.manifest import TrainedPredictor, read_manifest, write_manifest
from tracer.trace import Trace

POLICIES = "lru,slru,next-gate,hybrid-split,promoe"


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Look-ahead is there, what a learned predictor says is not."""
    path = tmp_path_factory.mktemp("compare") / "trace"
    columns = ("weights", "lookahead_1")
    make_trace(path, requests=4, prompt=4, output=10, seed=5, columns=columns)
    return path


def sweep_of(trace_dir: Path, policies: str = POLICIES, **changes: Any) -> pd.DataFrame:
    fields: dict[str, Any] = {
        "hardware": ("rtx4090-pcie4",),
        "expert_budgets": ("25%", "50%"),
        "links": ("12GB/s", "24GB/s"),
        **changes,
    }
    return sweep(config_of(str(trace_dir), policies=choices_of(policies), **fields))


@pytest.fixture(scope="module")
def frame(trace_dir: Path) -> pd.DataFrame:
    return sweep_of(trace_dir)


@pytest.fixture(scope="module")
def comparison(frame: pd.DataFrame) -> Comparison:
    return compare(frame)


def test_a_table_a_budget_and_link_with_every_row_of_the_sweep(
    frame: pd.DataFrame, comparison: Comparison
) -> None:
    places = [(table.link_bytes_per_s, table.budget) for table in comparison.tables]
    slow, fast = 12_000_000_000, 24_000_000_000
    assert places == [(slow, "25 %"), (slow, "50 %"), (fast, "25 %"), (fast, "50 %")]
    seen = 0
    for table in comparison.tables:
        for row in table.rows:
            own = frame[
                (frame["label"] == row["policy"])
                & (frame["link_bytes_per_s"] == table.link_bytes_per_s)
                & (frame["expert_budget_bytes"] == table.expert_budget_bytes)
            ].iloc[0]
            seen += 1
            assert row["tpot_ms"] == own["tpot_ms.mean"]
            assert row["ttft_ms"] == own["ttft_ms.mean"]
            assert row["hit_rate"] == own["decode.hit_rate"]
            assert row["late_share"] == own["decode.late"] / own["decode.asked"]
            assert row["mb_per_token"] == own["h2d_bytes_per_token"] / 1e6
            predicted = own["prefetch.precision"]
            assert row["precision"] == predicted or np.isnan([row["precision"], predicted]).all()
    succeeded = frame[(frame["status"] == "ok") & (frame["policy"] != "resident")]
    assert seen == len(succeeded)


def test_verdicts_follow_from_the_fastest_bound_of_the_table(comparison: Comparison) -> None:
    for table in comparison.tables:
        best = min(row["tpot_ms"] for row in table.rows if row["kind"] == "bound")
        for row in table.rows:
            saves = 1 - best / row["tpot_ms"]
            expected = BEYOND if saves < -0.02 else "capacity-limited"
            expected = "policy-limited" if saves >= 0.1 else expected
            assert row["verdict"] == ("" if row["kind"] == "bound" else expected)
            assert row["gap_to_bound"] == pytest.approx(saves)


@pytest.mark.parametrize(
    ("kind", "gap", "fits", "verdict"),
    [
        ("causal", 0.1, True, "policy-limited"),
        ("causal", 0.0999, True, "capacity-limited"),
        ("causal", -0.02, True, "capacity-limited"),
        ("causal", -0.021, True, BEYOND),
        ("lossy", -0.5, True, BEYOND),
        ("causal", float("nan"), True, "unknown"),
        ("causal", 0.5, False, "does not fit"),
        ("bound", 0.5, True, ""),
    ],
)
def test_verdict_words(kind: str, gap: float, fits: bool, verdict: str) -> None:
    assert verdict_of(kind, gap, fits) == verdict


def test_what_the_trace_cannot_run_is_named_with_the_command(comparison: Comparison) -> None:
    (missing,) = comparison.not_runnable
    assert str(missing).startswith("promoe: not runnable: needs the column learned_2")
    assert "moesim train-predictor" in missing.why
    assert all(row["policy"] != "promoe" for table in comparison.tables for row in table.rows)
    assert not comparison.failed
    assert str(missing) in render(comparison)


def test_a_budget_that_is_too_small_is_a_failure_not_a_missing_column(trace_dir: Path) -> None:
    found = compare(sweep_of(trace_dir, "lru", expert_budgets=("1%", "50%"), links=()))
    assert [table.budget for table in found.tables] == ["50 %"]
    (failure,) = (each for each in found.failed if each.startswith("lru "))
    assert failure.startswith("lru at 1%, rtx4090-pcie4: ")
    assert "smallest that can run" in failure
    assert not found.not_runnable


def test_a_fault_of_ours_is_never_called_not_runnable(frame: pd.DataFrame) -> None:
    broken = frame.copy()
    mine = broken["policy"] == "promoe"
    broken.loc[mine, "error"] = "internal error: ZeroDivisionError()"
    found = compare(broken)
    assert not found.not_runnable
    assert len(found.failed) == mine.sum() == 4


def test_nothing_that_could_run_is_an_error(frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no policy could run; the first: promoe: not runnable"):
        compare(frame[frame["policy"] == "promoe"])


def test_resident_stands_beside_the_tables(frame: pd.DataFrame, comparison: Comparison) -> None:
    resident = frame[frame["policy"] == "resident"].set_index("link_bytes_per_s")
    for table in comparison.tables:
        assert table.resident is not None
        assert table.resident["tpot_ms"] == resident.loc[table.link_bytes_per_s, "tpot_ms.mean"]
        assert all(row["policy"] != "resident" for row in table.rows)


def test_text_has_a_line_a_row(comparison: Comparison) -> None:
    text = render(comparison)
    assert text.count("\n" + COLUMNS[0]) == len(comparison.tables)
    assert text == render(comparison)
    for row in comparison.tables[0].rows:
        assert any(line.startswith(row["policy"]) for line in text.splitlines())


def test_lossy_policies_show_what_they_lose(tmp_path: Path) -> None:
    columns = ("weights", "gate_probs")
    path = tmp_path / "trace"
    make_trace(path, requests=4, prompt=4, output=10, seed=5, columns=columns)
    frame = sweep_of(path, "swapmoe,hobbit,lru", expert_budgets=("50%",), links=())
    (table,) = compare(frame).tables
    for row in table.rows:
        own = frame[frame["label"] == row["policy"]].iloc[0]
        shown = dict(zip(COLUMNS, cells(row), strict=True))
        if row["kind"] != "lossy":
            assert (shown["changed %"], shown["lost %"]) == ("-", "-")
            assert own["decode.asked"] == own["decode.accesses"]
            continue
        assert row["changed_share"] == own["quality.decode.changed_share"] > 0
        assert row["lost_share"] == own["quality.decode.lost_mass_share"] > 0
        assert shown["changed %"] == f"{100 * row['changed_share']:.1f}"
        assert shown["lost %"] == f"{100 * row['lost_share']:.1f}"
        assert row["hit_rate"] < 1
    asked = frame.loc[frame["status"] == "ok", "decode.asked"]
    assert asked.nunique() == 1


def test_policies_by_commas_and_parameters_by_colons() -> None:
    chosen = choices_of("lru, next-gate:depth=2:overfetch=1.5,belady-bypass")
    assert chosen[:3] == (
        PolicyChoice(name="lru"),
        PolicyChoice(name="next-gate", set={"depth": "2", "overfetch": "1.5"}),
        PolicyChoice(name="belady-bypass"),
    )
    assert chosen[3:] == (PolicyChoice(name="resident"), BOUND)


@pytest.mark.parametrize("text", ["lru,", "lru:depth", "lru:=2", ":depth=2"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a policy"):
        choices_of(text)


def test_everything_is_every_policy_and_the_bound_that_prefetches() -> None:
    import policies

    assert [each.name for each in everything()] == [*policies.names(), "oracle-prefetch"]


def test_places_count_from_one_in_every_budget_and_link(frame: pd.DataFrame) -> None:
    points = contestants(prepare(frame))
    assert set(points["kind"]) == {"causal"}
    for _, group in points.groupby(["system", "expert_budget_bytes"]):
        ordered = group.sort_values("place")
        assert ordered["place"].tolist() == list(range(1, len(group) + 1))
        assert ordered["tpot_ms.mean"].is_monotonic_increasing
        assert ordered["ratio"].iloc[0] == 1


def test_the_figure_is_the_same_every_time_and_refuses_to_rank_one(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    first = draw_rankings(frame, tmp_path / "a")
    again = draw_rankings(frame, tmp_path / "b")
    assert [path.name for path in first] == ["rankings.png", "rankings.svg"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UserError, match="needs two"):
        draw_rankings(frame[frame["policy"].isin(["lru", "belady-bypass"])], tmp_path / "c")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["moesim", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_prints_what_the_sweep_says(
    trace_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comparison: Comparison,
) -> None:
    words = ["compare", trace_dir, "--hardware", "rtx4090-pcie4", "--policies", POLICIES]
    words += ["--budgets", "25%,50%", "--links", "12GB/s,24GB/s"]
    assert run(monkeypatch, *words, "--json", "--figure", tmp_path / "rank.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(comparison.to_dict()))
    assert {path.name for path in tmp_path.iterdir()} == {"rank.png", "rank.svg"}
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out == render(comparison) + "\n"


def test_policies_that_leave_nobody_to_judge_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("weights", "lookahead_1", "gate_probs")
    one = make_trace(tmp_path / "one", requests=1, prompt=4, output=10, columns=columns).path
    words = ["--hardware", "rtx4090-pcie4", "--budgets", "50%"]
    assert run(monkeypatch, "compare", one, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ran = {row["policy"] for row in found["tables"][0]["rows"]}
    assert {"lru", "next-gate", "score-ema", "belady-bypass"} <= ran
    why = {each["policy"]: each["why"] for each in found["not_runnable"]}
    assert {"static", "moe-infinity", "swapmoe"} <= set(why)
    assert why["static"].startswith("1 request(s) cannot be split")
    assert "--fit-share 0" in why["moe-infinity"]
    assert not ran & set(why)
    assert not found["failed"]


def test_a_column_that_all_requests_trained_is_left_out_alone(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", requests=4, output=10, columns=("weights", "learned_2"))
    predictor = TrainedPredictor(
        column="learned_2",
        kind="promoe",
        stride=2,
        hidden_units=1,
        seed=0,
        trained_requests=(0, 1, 2, 3),
        weights_file="predictors/promoe_s2.safetensors",
        weights_sha256="0" * 64,
    )
    manifest = read_manifest(trace.path)
    write_manifest(trace.path, manifest.model_copy(update={"predictors": (predictor,)}))
    config = config_of(
        str(trace.path),
        hardware=("rtx4090-pcie4",),
        policies=choices_of("promoe,static,lru"),
        expert_budgets=("50%",),
    )
    kept, left = leave_out(config, Trace.open(trace.path))
    assert [choice.name for choice in kept.policies][:2] == ["static", "lru"]
    assert [each.policy for each in left] == ["promoe"]
    assert left[0].why.startswith("all 4 requests read trained the predictor of learned_2")
    found = compare(sweep(kept), left)
    assert found.not_runnable == left
    assert {"static", "lru"} <= {row["policy"] for row in found.tables[0].rows}
    without = config.model_copy(update={"policies": config.policies[1:]})
    assert leave_out(without, Trace.open(trace.path)) == (without, ())


@pytest.mark.parametrize(
    ("policies", "links", "place", "message"),
    [
        ("lru", "24GB/s", "rank", "needs two causal, lossless policies"),
        ("lru,swapmoe", "24GB/s", "rank", "needs two causal, lossless policies"),
        ("lru,slru", "1,2,3,4,5", "rank", "room for 4 links or machines, not 5"),
        ("lru,slru", "24GB/s", "file/rank", "--figure: .*file is no directory"),
    ],
)
def test_a_figure_that_cannot_be_is_refused_before_anything_is_computed(
    trace_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policies: str,
    links: str,
    place: str,
    message: str,
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["compare", trace_dir, "--hardware", "rtx4090-pcie4", "--policies", policies]
    words += ["--links", links, "--figure", tmp_path / place]
    monkeypatch.setattr("sim.sweeps.sweep", pytest.fail)
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert not printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "25%,,50%"], "--budgets '25%,,50%' has an empty entry"),
        (["--policies", "lrru"], "policy 'lrru' is unknown (did you mean lru?)"),
        (["--links", "nonsense"], "--link nonsense"),
        (["--fit-share", "1"], "--fit-share 1.0: input should be less than 1"),
        (["--fit-share", "nan"], "--fit-share nan: input should be a finite number"),
        (["--max-tokens", "0"], "--max-tokens 0: input should be greater than or equal to 1"),
        (["--seed", "-1"], "--seed -1: input should be greater than or equal to 0"),
    ],
)
def test_wrong_options_end_in_one_line(
    trace_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "compare", trace_dir, "--hardware", "rtx4090-pcie4", *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


def test_some_failed_points_are_exit_code_one(
    trace_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", trace_dir, "--hardware", "rtx4090-pcie4", "--policies", "lru"]
    assert run(monkeypatch, *words, "--budgets", "1%,50%") == 1
    printed = capsys.readouterr()
    assert "moesim: failed: lru at 1%" in printed.err
    assert "budget 50 %" in printed.out


def test_words_of_the_results_page() -> None:
    assert times(2.62, 2.0) == "1.31x"
    assert change(78, 100) == "-22 %"
    assert geometric_mean([1, 4]) == pytest.approx(2)
    assert markdown(("a", "b"), [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
