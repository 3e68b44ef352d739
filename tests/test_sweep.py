"""Sweeps: rows, resuming, failures, the same bytes whatever the number of jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from configs.errors import UserError
from policies.core import DecisionCore
from sim import SweepConfig, simulate, sweep
from sim.inputs import set_aside
from sim.point import Point, PointRunner, inputs_for, run_point
from sim.sweeps import load_config, point_id, read_results
from sim.tape import Tape, record
from tests.traces import make_trace
from tracer.trace import Trace
from tracer.workload import Workload


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "trace"
    make_trace(path, layers=3, experts=8, top_k=2, requests=6, prompt=4, output=12, seed=3)
    return path


def make_config(trace_dir: Path, **changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "trace": str(trace_dir),
        "hardware": ["rtx4090-pcie4"],
        "links": ["12GB/s", "24GB/s"],
        "expert_budgets": ["25%", "50%"],
        "policies": ["resident", "lru", {"name": "accuracy-q", "set": {"q": 0.9, "depth": 2}}],
        **changes,
    }
    return SweepConfig(**fields)


def test_a_sweep_has_a_row_a_point_with_its_whole_configuration(trace_dir: Path) -> None:
    frame = sweep(make_config(trace_dir))
    # resident once a system; the other two at both budgets; two links.
    assert len(frame) == 2 * (1 + 2 * 2)
    assert (frame["status"] == "ok").all()
    row = frame[frame["policy"] == "accuracy-q"].iloc[0]
    assert json.loads(row["point.params"]) == {"depth": 2, "q": 0.9}
    assert row["trace.digest"] == Trace.open(trace_dir).digest
    assert row["produced_by.moesim"]
    assert row["link_bytes_per_s"] == 12_000_000_000
    assert row["decode.accesses"] == row["decode.hits"] + row["decode.late"] + row["decode.misses"]


def test_rows_equal_single_points(trace_dir: Path) -> None:
    frame = sweep(make_config(trace_dir, policies=["lru"], links=[], expert_budgets=["25%"]))
    single = simulate(trace_dir, policy="lru", hardware="rtx4090-pcie4", expert_budget="25%")
    for column in ("tpot_ms.mean", "decode.hits", "h2d_bytes", "ttft_ms.p99"):
        assert frame.loc[0, column] == single.loc[0, column]


def test_same_bytes_for_any_number_of_jobs(trace_dir: Path, tmp_path: Path) -> None:
    config = make_config(trace_dir, policies=["resident", "lru", "static", "belady"])
    sweep(config, out=tmp_path / "one", jobs=1)
    sweep(config, out=tmp_path / "two", jobs=2)
    for name in ("results.parquet", "results.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_broken_off_sweep_goes_on_where_it_stopped(trace_dir: Path, tmp_path: Path) -> None:
    config, out = make_config(trace_dir), tmp_path / "out"
    whole = sweep(config, out=tmp_path / "whole")
    seen: list[tuple[int, int]] = []

    class Stop(Exception):
        pass

    def stop_at_four(done: int, total: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        sweep(config, out=out, progress=stop_at_four)
    lines = (out / "points.jsonl").read_text().splitlines()
    assert len(lines) == 4
    # A kill in the middle of a line.
    (out / "points.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
    resumed = sweep(config, out=out, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (3, 10)
    assert seen[-1] == (10, 10)
    pd.testing.assert_frame_equal(resumed, whole)
    assert (out / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


def test_a_failed_point_is_a_row_and_does_not_stop_the_others(trace_dir: Path) -> None:
    frame = sweep(make_config(trace_dir, links=[], expert_budgets=["1%", "50%"], policies=["lru"]))
    assert frame["status"].tolist() == ["failed", "ok"]
    assert "smallest that can run" in frame.loc[0, "error"]
    assert pd.isna(frame.loc[1, "error"])


def test_a_fault_of_ours_is_a_row_too_and_shows_its_traceback(
    trace_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sim.rows as module

    def broken(runner: Any, point: Point) -> dict[str, Any]:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(module.PointRunner, "run", broken)
    frame = sweep(make_config(trace_dir, links=[], policies=["lru"]))
    assert frame["status"].tolist() == ["failed", "failed"]
    assert "internal error: ZeroDivisionError" in frame.loc[0, "error"]
    assert "Traceback" in capsys.readouterr().err


def test_results_of_another_sweep_are_not_overwritten(trace_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(make_config(trace_dir, policies=["lru"]), out=out)
    before = (out / "results.csv").read_bytes()
    with pytest.raises(UserError, match="another sweep"):
        sweep(make_config(trace_dir, policies=["lfu"]), out=out)
    assert (out / "results.csv").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        sweep(make_config(trace_dir, policies=["lru"]), out=tmp_path / "mine")


def test_fitted_policies_set_requests_aside_for_all(trace_dir: Path) -> None:
    frame = sweep(make_config(trace_dir, links=[], policies=["lru", "static"]))
    assert frame["trace.fitted_requests"].unique().tolist() == [1]
    assert frame["trace.judged_requests"].unique().tolist() == [5]
    assert frame["decode.accesses"].nunique() == 1


def test_set_aside_is_spread_and_disjoint() -> None:
    assert set_aside(range(10), 0.3) == [1, 5, 8]
    assert set_aside(range(3), 0.3) == [1]
    assert set_aside(range(10), 0) == []


def test_static_never_sees_the_requests_it_is_judged_on(trace_dir: Path) -> None:
    point = Point(policy="static", hardware="t4-pcie3", expert_budget="50%")
    inputs = inputs_for(Trace.open(trace_dir), point)
    judged = set(inputs.workload().request_of_row.tolist())
    assert judged.isdisjoint(inputs.fitted_on)
    assert judged | set(inputs.fitted_on) == set(range(6))
    fit_rows = Trace.open(trace_dir).load(["request"])["request"]
    rows = sum(1 for request in fit_rows.tolist() if request in set(inputs.fitted_on))
    # One look-up an expert and event, so popularity holds the fitted requests' look-ups alone.
    assert 0 < inputs.popularity().sum() <= rows * 3 * 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("trace: sample\n", "policies"),
        ("trace: sample\npolicies: [lru]\nhardware: [t4-pcie3]\n", "budgets"),
        ("trace: [\n", "line"),
        ("trace: sample\npolicies: [lru]\nhardware: [t4-pcie3]\nbudget: 3\n", "budget"),
        (
            "trace: sample\npolicies: [lru]\nhardware: [t4-pcie3]\nexpert_budgets: [25%]\n"
            "window: 0\n",
            "window",
        ),
    ],
)
def test_a_wrong_sweep_file_is_one_line_that_names_file_and_field(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert "sweep.yaml" in str(caught.value)


def test_unfinished_results_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moesim sweep"):
        read_results(tmp_path)


def test_max_tokens_takes_the_first_rows(trace_dir: Path) -> None:
    row = simulate(
        trace_dir, policy="lru", hardware="t4-pcie3", expert_budget="50%", max_tokens=10
    ).iloc[0]
    assert row["tokens.prefill"] + row["tokens.decode"] == 10


def test_the_demo_configuration_is_valid() -> None:
    assert len(load_config("demo").points()) == 3 * (1 + 9 * 4)


def test_an_edited_hardware_file_is_another_sweep(trace_dir: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "configs" / "hardware" / "t4-pcie3.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text())
    config = make_config(trace_dir, hardware=[str(mine)], links=[], policies=["lru"])
    sweep(config, out=tmp_path / "out")
    mine.write_text(shipped.read_text().replace("calibrated: false", "calibrated: true"))
    with pytest.raises(UserError, match="hardware contents"):
        sweep(config, out=tmp_path / "out")


def test_two_machines_of_one_name_are_refused(trace_dir: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "configs" / "hardware" / "t4-pcie3.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text())
    with pytest.raises(UserError, match="both named 't4-pcie3'"):
        sweep(make_config(trace_dir, hardware=["t4-pcie3", str(mine)]))


def test_a_damaged_result_is_named_by_its_line(trace_dir: Path, tmp_path: Path) -> None:
    config = make_config(trace_dir, links=[], policies=["lru"])
    sweep(config, out=tmp_path / "out")
    points = tmp_path / "out" / "points.jsonl"
    points.write_text(points.read_text() + "not json\n")
    with pytest.raises(UserError, match="line 3"):
        sweep(config, out=tmp_path / "out")
    (tmp_path / "out" / "results.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="cut off or edited"):
        read_results(tmp_path / "out")


def test_decisions_are_taken_once_for_all_machines(
    trace_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sim.point as module

    taken: list[DecisionCore] = []

    def counted(workload: Workload, core: DecisionCore) -> Tape:
        taken.append(core)
        return record(workload, core)

    monkeypatch.setattr(module, "record", counted)
    config = make_config(
        trace_dir,
        policies=["lru", "static", "oracle-prefetch"],
        hardware=["rtx4090-pcie4", "t4-pcie3"],
        links=["5GB/s", "50GB/s"],
    )
    frame = sweep(config)
    budgets = len(frame["point.expert_budget"].unique())
    assert len(taken) == 2 * budgets
    assert (frame["status"] == "ok").all()
    trace = Trace.open(trace_dir)
    for point, (_, row) in zip(config.points(), frame.iterrows(), strict=True):
        alone = run_point(inputs_for(trace, point), point)
        assert row["tpot_ms.mean"] == alone["tpot_ms"]["mean"]
        assert row["duration_ms"] == alone["duration_ms"]
        assert row["h2d_bytes"] == alone["h2d_bytes"]


def test_a_point_that_breaks_off_leaves_nothing_to_the_next(
    trace_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sim.point as module

    calls = iter(range(10))

    def sometimes(workload: Workload, core: DecisionCore) -> Tape:
        tape = record(workload, core)
        if next(calls) == 0:
            raise ZeroDivisionError("half way")
        return tape

    points = make_config(trace_dir, policies=["lru"], links=["5GB/s", "50GB/s"]).points()
    first, second = points[0], points[0].model_copy(update={"link": "50GB/s"})
    runner = PointRunner(inputs_for(Trace.open(trace_dir), first))
    expected = run_point(runner.inputs, second)
    monkeypatch.setattr(module, "record", sometimes)
    with pytest.raises(ZeroDivisionError):
        runner.run(first)
    assert runner.run(second) == expected


# Equal points, however they are spelt


@pytest.mark.parametrize(
    ("field", "spellings"),
    [
        ("expert_budgets", ["25%", "25.0%", " 25 %"]),
        ("expert_budgets", ["1KiB", "1024B", "1.0KiB"]),
        ("expert_budgets", ["4/layer", "4 / layer"]),
        ("links", ["25", "25GB/s", "25000MB/s", 25, 25.0]),
        (
            "policies",
            [{"name": "lru", "set": {"chunks": chunks}} for chunks in (2, "2", "02")],
        ),
        (
            "policies",
            [
                {"name": "accuracy-q", "set": {"q": 0.5, "preempt": True}},
                {"name": "accuracy-q", "set": {"preempt": "yes", "q": "0.50"}},
            ],
        ),
    ],
)
def test_equal_points_are_one_row_as_first_spelt(
    trace_dir: Path, field: str, spellings: list[Any]
) -> None:
    base = {"links": [], "expert_budgets": ["50%"], "policies": ["lru"]}
    alone = make_config(trace_dir, **{**base, field: spellings[:1]}).points()
    config = make_config(trace_dir, **{**base, field: spellings})
    assert config.points() == alone
    for spelling in spellings:
        (point,) = make_config(trace_dir, **{**base, field: [spelling]}).points()
        assert point_id(point) == point_id(alone[0])


def test_whole_budgets_in_any_unit_are_equal(trace_dir: Path) -> None:
    config = make_config(
        trace_dir, expert_budgets=[], budgets=["8GiB", "8192MiB"], policies=["lru"]
    )
    assert [point.budget for point in config.points()] == ["8GiB"] * 2  # two links


def test_points_that_differ_keep_their_own_rows(trace_dir: Path) -> None:
    """A default that is given is a point of its own: a later version may change the default."""
    choices = ["lru", {"name": "lru", "set": {"chunks": 1}}, {"name": "lru", "set": {"chunks": 2}}]
    config = make_config(trace_dir, links=[], expert_budgets=["25%", "25.5%"], policies=choices)
    assert len(config.points()) == 6


# Parameters that are no scalars


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("{q: .nan}", "q=nan is not a finite number"),
        ("{q: -.inf}", "q=-inf is not a finite number"),
        ("{depth: [1, [2]]}", "parameter depth is neither text, a number"),
        ("{depth: {a: 1}}", "parameter depth is neither text, a number"),
        ("{depth: }", "parameter depth is neither text, a number"),
        ("{chunks: 9000000000000000000}", r"parameter chunks is beyond \+-2\*\*62"),
        ("{chunks: 99999999999999999999}", "beyond 64 bits"),
        ("{chunks: " + "9" * 5000 + "}", "not valid YAML"),
        ("{chunks: 0x" + "f" * 5000 + "}", "beyond 64 bits"),
        ("{chunks: " + "[" * 5000, "nested too deeply"),
        ("{chunks: 2024-13-45}", "not valid YAML"),
    ],
)
def test_wrong_parameters_are_one_line_that_names_the_file(
    trace_dir: Path, tmp_path: Path, given: str, problem: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"trace: {trace_dir}\nhardware: [t4-pcie3]\nexpert_budgets: [50%]\n"
        f"policies:\n- name: accuracy-q\n  set: {given}\n"
    )
    with pytest.raises(UserError, match=problem) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert "sweep.yaml" in str(caught.value)


def test_results_nested_too_deeply_are_named(trace_dir: Path, tmp_path: Path) -> None:
    config = make_config(trace_dir, links=[], policies=["lru"])
    sweep(config, out=tmp_path / "out")
    (tmp_path / "out" / "points.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1: no result of a sweep"):
        sweep(config, out=tmp_path / "out")
    (tmp_path / "out" / "sweep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not what a sweep writes"):
        sweep(config, out=tmp_path / "out")


# What stops a sweep is found before it begins


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"geometry": "olmoe-1b-7b"}, "can only drive a model of its own layers"),
        ({"dtype": "int3"}, "int3"),
        ({"touch_order": "rank"}, "touch_order 'rank' is unknown"),
        ({"links": ["24GB/s", "900TB/s"]}, "900000 GB/s: a link has 0.1 to 2000 GB/s"),
        ({"links": ["fast"]}, "--link fast .in a sweep: links.: rate 'fast'"),
        ({"fit_share": 0.9, "max_tokens": 2}, "cannot be split"),
    ],
)
def test_what_stops_a_sweep_is_found_before_it_begins(
    trace_dir: Path, changes: dict[str, Any], problem: str, jobs: int
) -> None:
    begun = []
    config = make_config(trace_dir, **changes)
    with pytest.raises(UserError, match=problem):
        sweep(config, jobs=jobs, progress=lambda done, total: begun.append(done))
    assert begun == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_trace_is_found_before_the_sweep_begins(tmp_path: Path, jobs: int) -> None:
    trace = make_trace(tmp_path / "trace")
    shard = trace.path / "tokens" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    begun = []
    with pytest.raises(UserError, match="SHA-256 differs"):
        sweep(make_config(trace.path), jobs=jobs, progress=lambda done, total: begun.append(done))
    assert begun == []


# Going on with another commit, and breaking off


def at_commit(monkeypatch: pytest.MonkeyPatch, commit: str | None) -> None:
    import sim.point as point_module
    import sim.rows as rows_module
    import sim.sweeps as module

    for changed in (module, rows_module, point_module):
        monkeypatch.setattr(changed, "produced_by", lambda: {"moesim": "0.1.0", "git": commit})


def test_rows_of_another_commit_are_kept_with_a_note(
    trace_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = make_config(trace_dir, links=[], policies=["lru"]), tmp_path / "out"
    at_commit(monkeypatch, "aaaa")
    sweep(config, out=out)
    sweep(config, out=out)
    assert capsys.readouterr().err == ""
    first = (out / "points.jsonl").read_text().splitlines()[0]
    (out / "points.jsonl").write_text(first + "\n")
    at_commit(monkeypatch, "bbbb")
    frame = sweep(config, out=out)
    assert frame["produced_by.git"].tolist() == ["aaaa", "bbbb"]
    note = capsys.readouterr().err
    assert note.startswith("moesim: note: ")
    assert "1 points of commit aaaa are kept beside those of commit bbbb" in note
    assert note.count("\n") == 1


def test_another_version_is_another_sweep(
    trace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sim.sweeps as module

    config = make_config(trace_dir, links=[], policies=["lru"])
    sweep(config, out=tmp_path / "out")
    monkeypatch.setattr(module, "produced_by", lambda: {"moesim": "99.0.0", "git": None})
    with pytest.raises(UserError, match=r"another sweep \(different: version\)"):
        sweep(config, out=tmp_path / "out")


def test_files_are_replaced_whole(
    trace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import configs.files as module

    config, out = make_config(trace_dir, links=[], policies=["lru"]), tmp_path / "out"
    sweep(config, out=out)
    names = ("results.parquet", "results.csv", "sweep.json")
    before = {name: (out / name).read_bytes() for name in names}

    def no_room(old: Path, new: Path) -> None:
        raise OSError(28, "No space left on device", str(new))

    monkeypatch.setattr(module.os, "replace", no_room)
    with pytest.raises(OSError, match="No space left"):
        sweep(config, out=out)
    assert {name: (out / name).read_bytes() for name in names} == before
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "points.jsonl"])


def test_a_sweep_killed_at_its_very_start_goes_on(trace_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".sweep.json.tmp").write_text('{"trace"')
    frame = sweep(make_config(trace_dir, links=[], policies=["lru"]), out=tmp_path / "out")
    assert (frame["status"] == "ok").all()


def test_an_exception_ends_the_workers(trace_dir: Path, tmp_path: Path) -> None:
    """No warning of joblib's either: warnings are errors here."""

    class Stop(Exception):
        pass

    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        sweep(make_config(trace_dir), out=tmp_path / "out", jobs=2, progress=stop_at_two)
    assert len((tmp_path / "out" / "points.jsonl").read_text().splitlines()) == 2
