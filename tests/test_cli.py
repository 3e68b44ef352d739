"""The command line: what it prints, and that wrong input ends in one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from tests.traces import make_trace


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "trace"
    make_trace(path, layers=3, experts=8, top_k=2, requests=3, prompt=4, output=12, seed=3)
    return path


def simulate(trace_dir: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "trace": trace_dir,
        "hardware": "rtx4090-pcie4",
        "policy": "lru",
        "expert_budget": "50%",
        **changes,
    }
    words: list[object] = ["simulate"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return words


def test_json_is_one_object_with_the_documented_fields(moesim, trace_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = moesim(*simulate(trace_dir), "--json")
    assert ran.code == 0
    assert ran.err == ""
    result = json.loads(ran.out)
    assert {"hits", "late", "accesses", "hit_rate"} <= set(result["decode"])
    assert "hit_rate" in result["prefill"]
    for name in ("tpot_ms", "itl_ms"):
        assert {"mean", "p50", "p99"} <= set(result[name])
    assert "mean" in result["ttft_ms"]
    assert result["policy"] == "lru"
    assert result["budget_bytes"] > result["expert_budget_bytes"] > 0
    assert result["h2d_bytes"] > 0
    parts = [value for name, value in result["breakdown_ms"].items()]
    assert sum(parts) == pytest.approx(result["itl_ms"]["mean"])


def test_same_command_same_bytes(moesim, trace_dir: Path) -> None:  # type: ignore[no-untyped-def]
    words = [*simulate(trace_dir, policy="accuracy-q"), "--json"]
    assert moesim(*words).out == moesim(*words).out


def test_a_lossy_result_says_what_is_lost(moesim, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "trace"
    make_trace(path, requests=4, prompt=4, output=12, columns=("weights", "gate_probs"))
    for policy in ("swapmoe", "hobbit"):
        words = simulate(path, policy=policy, fit_share=0.3)
        result = json.loads(moesim(*words, "--json").out)
        loss, decode = result["quality"]["decode"], result["decode"]
        shown = moesim(*words).out
        assert f"{decode['hit_rate']:.1%} hits" in shown
        assert f"missed of {decode['asked']}" in shown
        assert f"lossy    {loss['changed_share']:.1%} of these replaced" in shown
        assert f"of the gate weight {loss['lost_mass_share']:.1%} lost" in shown
        assert loss["changed_share"] > 0
    assert "lossy" not in moesim(*simulate(path)).out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"policy": "lrru"}, ["lrru", "did you mean lru", "belady"]),
        ({"hardware": "h200"}, ["h200", "h200-pcie5"]),
        ({"geometry": "olmo"}, ["olmo", "olmoe-1b-7b"]),
        ({"geometry": "olmoe-1b-7b"}, ["16 layers x 64 experts", "3 layers x 8 experts"]),
        ({"trace": "nowhere"}, ["nowhere", "sample"]),
        ({"expert_budget": "5"}, ["'5'", "4000MiB"]),
        ({"expert_budget": "0%"}, ["0%", "above"]),
        ({"expert_budget": "101%"}, ["101%", "100%"]),
        ({"expert_budget": "25 parsecs"}, ["parsecs"]),
        ({"expert_budget": "9/layer"}, ["9/layer", "8"]),
        ({"expert_budget": "nan%"}, ["nan%"]),
        ({"expert_budget": "1%"}, ["smallest that can run"]),
        ({"expert_budget": None}, ["--budget", "--expert-budget"]),
        ({"policy": "resident"}, ["resident", "leave the budget out"]),
        ({"budget": "8GiB"}, ["not both"]),
        ({"expert_budget": None, "budget": "1KiB"}, ["1KiB", "too small"]),
        ({"link": "0"}, ["'0'", "25GB/s"]),
        ({"link": "-3GB/s"}, ["-3GB/s"]),
        ({"link": "fast"}, ["--link fast", "25GB/s"]),
        ({"link": "900TB/s"}, ["--link 900TB/s", "900000 GB/s", "0.1 to 2000 GB/s"]),
        ({"link": "1KB/s"}, ["--link 1KB/s", "0.1 to 2000 GB/s"]),
        ({"dtype": "int3"}, ["int3", "int4"]),
        ({"window": 0}, ["--window 0"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"max_tokens": 0}, ["--max-tokens 0"]),
        ({"fit_share": 1.5}, ["1.5"]),
        ({"touch_order": "rank"}, ["rank", "last-use"]),
        ({"set": "depth"}, ["depth", "key=value"]),
        ({"set": "depth=2"}, ["lru", "depth", "chunks"]),
        ({"set": "chunks=0"}, ["chunks=0"]),
        ({"set": "chunks=two"}, ["chunks=two", "whole number"]),
        ({"set": "chunks=1_0"}, ["chunks=1_0", "whole number"]),
        ({"set": "chunks=\u0663"}, ["chunks=", "whole number"]),
        ({"set": "chunks=" + "9" * 5000}, ["chunks=99", "whole number"]),
        ({"policy": "accuracy-q", "set": "q=0_0.5"}, ["q=0_0.5", "a number"]),
        ({"set": "order=random"}, ["random", "cached-first"]),
        ({"policy": "accuracy-q", "set": "q=1.5"}, ["q=1.5"]),
        ({"policy": "accuracy-q", "set": "q=nan"}, ["q=nan"]),
        ({"policy": "accuracy-q", "set": "depth=3"}, ["depth 3", "at most 2"]),
        ({"policy": "next-gate"}, ["lookahead_1", "record"]),
        ({"policy": "static", "set": "staging_slots=0"}, ["staging_slots"]),
        ({"policy": "static", "fit_share": 0}, ["fit share"]),
        ({"policy": None}, ["--policy"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(  # type: ignore[no-untyped-def]
    moesim, trace_dir: Path, changes: dict[str, object], expected: list[str]
) -> None:
    ran = moesim(*simulate(trace_dir, **changes))
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("moesim: error: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    for words in expected:
        assert words in ran.err


def test_an_unknown_command_or_option_is_one_plain_line(moesim) -> None:  # type: ignore[no-untyped-def]
    for words in (["simulat"], ["simulate", "--polizy", "lru"], ["import", "parquet"]):
        ran = moesim(*words)
        assert ran.code == 2
        assert ran.err.count("\n") == 1
        assert "─" not in ran.err


def test_every_command_has_help_with_an_example(moesim) -> None:  # type: ignore[no-untyped-def]
    commands = [["inspect"], ["simulate"], ["sweep"], ["plot"], ["policies"]]
    commands += [["import", "npz"], ["import", "bigmoe-csv"]]
    for words in commands:
        ran = moesim(*words, "--help")
        assert ran.code == 0
        assert f"Example: moesim {' '.join(words)}" in " ".join(ran.out.split())


def test_policies_lists_every_name_with_flags_and_source(moesim) -> None:  # type: ignore[no-untyped-def]
    import policies

    ran = moesim("policies")
    for name in policies.names():
        line = next(line for line in ran.out.splitlines() if line.startswith(name + " "))
        assert "lossless" in line or "lossy" in line
        assert policies.get(name).source in line


def test_inspect_prints_and_draws_and_does_not_overwrite(  # type: ignore[no-untyped-def]
    moesim, trace_dir: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.png"
    ran = moesim("inspect", trace_dir, "--figure", figure)
    assert ran.code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("mine")
    for wrong, problem in (
        (figure, "exists"),
        (tmp_path / "figure.jpg", "ends in one of .png"),
        (tmp_path / "figure", "ends in one of .png"),
        (tmp_path / "file" / "figure.png", "name a place that can be written"),
    ):
        ran = moesim("inspect", trace_dir, "--figure", wrong)
        assert ran.code == 2
        assert ran.out == ""  # before the tables
        assert str(wrong.parent) in ran.err
        assert problem in ran.err
    ran = moesim("inspect", trace_dir, "--figure", tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").is_file()


def test_sweep_then_plot(moesim, trace_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"trace: {trace_dir}\nhardware: [rtx4090-pcie4]\nexpert_budgets: [1%, 25%, 50%, 75%]\n"
        "policies: [resident, on-demand, lru, lfu, belady, oracle-prefetch]\n"
    )
    ran = moesim("sweep", config, "--out", tmp_path / "out")
    assert ran.code == 1  # the points at 1% failed
    assert "Which policy to pick" in ran.out
    assert "smallest that can run" in ran.err
    assert "5 of 21 points failed" in ran.err
    config.write_text(config.read_text().replace("1%, ", ""))
    assert moesim("sweep", config, "--out", tmp_path / "good").code == 0
    ran = moesim("plot", tmp_path / "out")
    assert ran.code == 0
    drawn = [Path(line) for line in ran.out.splitlines()]
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_a_sweep_without_one_good_point_fails(moesim, trace_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"trace: {trace_dir}\nhardware: [rtx4090-pcie4]\nexpert_budgets: [1%]\npolicies: [lru]\n"
    )
    ran = moesim("sweep", config, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "no point of this sweep succeeded" in ran.err


@pytest.mark.parametrize("wrong", ["geometry: olmoe-1b-7b", "links: [900TB/s]", "fit_share: 0.99"])
def test_what_stops_a_sweep_is_said_alone(  # type: ignore[no-untyped-def]
    moesim, trace_dir: Path, tmp_path: Path, wrong: str
) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"trace: {trace_dir}\nhardware: [t4-pcie3]\nexpert_budgets: [50%]\npolicies: [lru]\n"
        f"{wrong}\nmax_tokens: 5\n"
    )
    ran = moesim("sweep", config, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("moesim: error: ")
    assert ran.err.count("\n") == 1


HEEDS_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_sweep_that_is_stopped_leaves_no_scratch_and_no_workers(
    trace_dir: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    scratch, out, config = tmp_path / "scratch", tmp_path / "out", tmp_path / "sweep.yaml"
    scratch.mkdir()
    budgets = ", ".join(f"{30 + index / 100}%" for index in range(5000))
    config.write_text(
        f"trace: {trace_dir}\nhardware: [t4-pcie3]\nexpert_budgets: [{budgets}]\npolicies: [lru]\n"
    )
    words = ["sweep", str(config), "--out", str(out), "--jobs", "2"]
    running = subprocess.Popen(
        # A shell's background jobs ignore SIGINT, and so do their children.
        [sys.executable, "-c", f"{HEEDS_SIGINT}; import cli; cli.main()", *words],
        cwd=Path(cli.__file__).parent,
        env={**os.environ, "TMPDIR": str(scratch), "JOBLIB_TEMP_FOLDER": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its workers are the processes of this group
    )
    points = out / "points.jsonl"
    assert within_a_minute(lambda: points.is_file() and points.stat().st_size > 0)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert within_a_minute(lambda: not processes_of(running.pid))
    assert [path.name for path in scratch.iterdir()] == []


def within_a_minute(holds) -> bool:  # type: ignore[no-untyped-def]
    ends_s = time.monotonic() + 60
    while not holds() and time.monotonic() < ends_s:
        time.sleep(0.05)
    return holds()


def processes_of(group: int) -> list[int]:
    """Processes of a group that still run; one that ended and was not waited for does not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(") ")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_the_installed_command_runs() -> None:
    """The console script, as a user calls it, without torch imported."""
    code = (
        "import sys, cli; sys.argv=['moesim', 'policies']\n"
        "try: cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("accuracy-q")


def test_outputs_that_cannot_be_written_are_one_line(  # type: ignore[no-untyped-def]
    moesim, trace_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"trace: {trace_dir}\nhardware: [t4-pcie3]\nexpert_budgets: [50%]\npolicies: [lru]\n"
    )
    for words in (
        ["sweep", config, "--out", tmp_path / "file" / "sub"],
        ["inspect", trace_dir, "--figure", tmp_path / "file" / "x.png"],
    ):
        ran = moesim(*words)
        assert ran.code == 2
        assert ran.err.splitlines()[-1].startswith("moesim: error: ")
        assert "Traceback" not in ran.err
    assert (tmp_path / "file").read_text() == "mine"
