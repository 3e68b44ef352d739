"""`moesim report` of a directory of `moesim advise`: the question, its answers, and its target."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import cli
from configs.errors import UserError
from sim import advise
from sim.advising import Advice, Question
from sim.report import write_report
from sim.report.advised import Advised
from sim.report.looks import looks_of
from sim.report.pareto import pareto_figure
from sim.report.reproduce import commands_of
from sim.report.results import Results, read
from tests.reported import HOSTILE, Page

ROOT = Path(__file__).resolve().parents[1]
ASKED = {
    "geometry": "olmoe-1b-7b",
    "hardware": "laptop-pcie4x8",
    "tpot_ms": 60.0,
    "gpu_memory": "5GiB",
    "percentile": "p90",
    "max_tokens": 60,
    "policies": ({"name": "next-gate", "set": {"depth": "2"}},),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("advised") / "results"


@pytest.fixture(scope="module")
def advice(directory: Path) -> Advice:
    return advise("sample", out=directory, **ASKED)


@pytest.fixture(scope="module")
def loaded(directory: Path, advice: Advice) -> Results:
    return read(directory)


@pytest.fixture(scope="module")
def page(directory: Path, advice: Advice, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(directory, tmp_path_factory.mktemp("page") / "report.html")[0])


def test_the_page_has_every_word_of_the_advice(page: Page, directory: Path) -> None:
    _, _, _, judged, *lines = (directory / "advice.txt").read_text().splitlines()
    assert judged.startswith("Judged on ")
    for line in lines:
        assert " ".join(line.split()) in page.words, line
    for words in (
        "olmoe-1b-7b on laptop-pcie4x8",
        "At most TPOT 60 ms (p90 of the requests); 1 request at a time",
        "5.0 GiB; 0.9 GiB without experts",
        "next-gate:depth=2",
        "In brackets: does not fit 5.0 GiB.",
    ):
        assert words in page.words
    notes = [attrs for attrs in page.named("p") if attrs.get("class") == "note confidence"]
    assert len(notes) == 1


def test_answer_and_target_are_drawn(loaded: Results, advice: Advice) -> None:
    """Of the percentile asked for, as advise has them."""
    asker = loaded.asker
    name = asker.first(loaded.points)
    assert name == "bf16, laptop-pcie4x8, 12 GB/s"
    assert len(loaded.systems) == 1 + len(advice.what_ifs)
    points = loaded.of_system(name)
    figure = pareto_figure(points, looks_of(points), ("answer", asker.pick(points)), asker.goal)
    _, answer, target, *policies = figure.data
    chosen = advice.chosen
    assert chosen is not None
    assert (answer.name, list(answer.x), list(answer.y)) == (
        "answer",
        [chosen.gpu_memory_bytes / 2**30],
        [chosen.tpot_ms],
    )
    assert (target.name, set(target.y)) == ("target: at most 60 ms", {60.0})
    assert figure.layout.yaxis.title.text == "TPOT (ms a token, p90 of the requests)"
    assert [note.text for note in figure.layout.annotations] == ["limit: 5.0 GiB"]
    for button in figure.layout.updatemenus[0].buttons:
        assert button.args[0]["visible"][:3] == [True] * 3
        assert len(button.args[0]["visible"]) == 3 + len(policies)
    assert set(points["budget"]) >= {"8/layer", "5.0 GiB", "100 %"}


def test_each_what_if_has_its_own_answer(loaded: Results, advice: Advice) -> None:
    picks = [loaded.asker.pick(loaded.of_system(name)) for name in loaded.systems]
    ids = {each.smallest.point_id for each in advice.what_ifs if each.smallest is not None}
    assert len(picks) == 4
    assert ids <= {pick["point_id"] for pick in picks if pick is not None}


def test_the_commands_ask_the_same_and_give_the_answer(
    loaded: Results,
    directory: Path,
    advice: Advice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = dict(commands_of(loaded))
    moesim, verb, *words = shlex.split(lines["all points of this page"])
    assert (moesim, verb, words[-2:]) == ("moesim", "advise", ["--out", "results"])
    again = Path(shutil.copytree(directory, tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    _run(monkeypatch, verb, *words)  # refused if it were another question
    capsys.readouterr()
    for name in ("advice.json", "results.parquet", "sweep.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes()
    line = lines["the answer point on bf16, laptop-pcie4x8, 12 GB/s"]
    _run(monkeypatch, *shlex.split(line)[1:], "--json")
    told = json.loads(capsys.readouterr().out)
    assert advice.chosen is not None
    assert told["tpot_ms"]["p90"] == advice.chosen.tpot_ms


def test_the_command_has_all_that_was_asked(advice: Advice) -> None:
    fields: dict[str, Any] = {
        **ASKED,
        **{"trace": "my trace", "dtype": "int8", "link": "24GB/s", "timings": "t.yaml"},
        **{"ttft_ms": 250.5, "batch": 4, "context": 8192, "fit_share": 0.25, "seed": 7},
        "what_if": False,
    }
    question = Question(**fields)
    line = Advised(replace(advice, question=question)).command
    assert line == (
        "moesim advise --trace 'my trace' --geometry olmoe-1b-7b --dtype int8 --hardware "
        "laptop-pcie4x8 --link 24GB/s --timings t.yaml --tpot-ms 60 --ttft-ms 250.5 --percentile "
        "p90 --gpu-memory 5GiB --policies next-gate:depth=2 --batch 4 --context 8192 "
        "--max-tokens 60 --fit-share 0.25 --seed 7 --no-what-if --out results"
    )


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["moesim", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_the_same_bytes_elsewhere(page: Page, directory: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(directory, tmp_path / "moved"))
    ran = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "report", str(moved)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert (moved / "report.html").read_text(encoding="utf-8") == page.source


def _edited(directory: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(directory, out)
    told = json.loads((out / "advice.json").read_text())
    change(told)
    (out / "advice.json").write_text(json.dumps(told))
    return out


def test_all_text_is_escaped(directory: Path, advice: Advice, tmp_path: Path) -> None:
    def hostile(told: dict[str, Any]) -> None:
        told["lines"][0]["text"] = told["lines"][1]["assumes"] = HOSTILE
        told["system"]["geometry"] = told["smallest"]["policy"] = HOSTILE
        told["what_ifs"][0]["name"] = told["confidence"]["smallest"]["why"] = HOSTILE

    source = write_report(_edited(directory, tmp_path / "hostile", hostile))[0]
    page = Page(source)
    assert page.words.count(HOSTILE) >= 6
    assert page.named("img") == []
    assert "<script>window" not in page.source.partition("<body>")[2]


def _refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError) as error:
        write_report(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_what_is_wrong_is_one_line(directory: Path, advice: Advice, tmp_path: Path) -> None:
    missing = Path(shutil.copytree(directory, tmp_path / "missing"))
    whole = (missing / "advice.json").read_text()
    (missing / "advice.json").unlink()
    _refused(missing, "advice.json is not there: run the same `moesim advise` again")
    for text in (whole[:5000], "\xff"):
        (missing / "advice.json").write_text(text, encoding="latin-1")
        _refused(missing, "advice.json is cut off or edited")
    for number, (keys, value, words) in enumerate(
        (
            (("smallest", "tpot_ms"), "fast", "field 'smallest.tpot_ms'"),
            (("system", "limit_bytes"), "5", "system: field 'limit_bytes'"),
            (("system", "batch"), None, "system: field 'batch'"),
            (("question", "tpot_ms"), 61.0, "answers another question"),
            (("everything", "point_id"), "none", "has other points than advice.json"),
            (("points", 0, "point_id"), "none", "has other points than advice.json"),
            (("points",), [], "rows, advice.json 0 points"),
        )
    ):

        def change(told: Any, keys: Any = keys, value: Any = value) -> None:
            *path, last = keys
            for key in path:
                told = told[key]
            told[last] = value

        _refused(_edited(directory, tmp_path / str(number), change), words)
    fewer = Path(shutil.copytree(directory, tmp_path / "fewer"))
    frame = pd.read_parquet(fewer / "results.parquet")
    frame.iloc[1:].to_parquet(fewer / "results.parquet")
    _refused(fewer, f"has {len(frame) - 1} rows, advice.json {len(frame)} points")
    frame.drop(columns="tpot_ms.p90").to_parquet(fewer / "results.parquet")
    _refused(fewer, "column tpot_ms.p90 is missing")
