"""`moesim report`: what the page says, that all text is escaped, and that it needs no network."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from configs.errors import UserError
from sim.advice import recommend
from sim.ranking import pick_of
from sim.report import write_report
from sim.report.askers import Swept, as_yaml
from sim.report.breakdown import breakdown_figure
from sim.report.experts import Popularity, experts_figure, popularity_of
from sim.report.grid import grid_figure
from sim.report.looks import looks_of, pitch_of, wrapped
from sim.report.measured import errors_table, read_validations
from sim.report.pareto import fronts_figure, pareto_figure
from sim.report.reproduce import commands_of
from sim.report.results import Results, read
from sim.sweeps import load_config
from tests.reported import (
    HOSTILE,
    KINDS,
    VALIDATION,
    Page,
    edited,
    hostile,
    swept,
    validation_summary,
)
from tests.traces import make_trace
from tracer.trace import Trace

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
SECTIONS = [
    "question",
    "recommendation",
    "pareto",
    "ranking",
    "breakdown",
    "experts-section",
    "measured-section",
    "reproduce",
]
FETCHING = ("src", "href", "action", "data", "poster", "srcset", "formaction", "xlink:href")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One machine, one policy, budgets of the whole model."""
    out = tmp_path_factory.mktemp("small") / "results"
    fields = {"hardware": ("laptop-pcie4x8",), "policies": ("lru",)}
    return swept(out, expert_budgets=(), budgets=("4GiB", "6GiB"), **fields)


@pytest.fixture(scope="module")
def loaded(results: Path) -> Results:
    return read(results)


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    path, notes = write_report(str(results), str(out), validations=[str(VALIDATION)])
    assert (path, notes) == (out, [])
    return Page(out)


# ---------------------------------------------------------------------- the page


def test_sections_come_in_their_order(page: Page) -> None:
    assert [attrs["id"] for attrs in page.named("section")] == SECTIONS
    links = [attrs["href"] for attrs in page.named("a")]
    assert [f"#{name}" for name in SECTIONS] == [link for link in links[1:] if link]


def test_the_page_says_what_was_swept_and_which_policy_to_pick(page: Page, loaded: Results) -> None:
    for words in (
        "olmoe-1b-7b on 2 machines",
        "olmoe-1b-7b has 12.0 GiB of experts (bf16).",
        "which expert caching or prefetching policy, at which GPU memory budget",
        "laptop-pcie4x8: 8.0 GiB of GPU memory; profile from datasheets",
        "25%, 50% of the experts' bytes",
        "30 of 30 succeeded",
        "laptop-pcie4x8, 12 GB/s",
        "Estimated: compute times are a roofline",
        "Most skewed is layer",
        "h200-pcie5): 32 points, 3 repeats",
        "Not measured: laptop-pcie4x8.",
    ):
        assert words in page.words
    for advice in recommend(loaded.frame):
        for line in advice.text.splitlines()[1:]:
            assert " ".join(line.split()) in page.words


def test_a_page_is_for_people_with_and_without_eyes(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    assert "olmoe-1b-7b on 2 machines - moesim report" in page.source.partition("</title>")[0]
    figures = [attrs for attrs in page.named("div") if attrs.get("role") == "img"]
    assert len(figures) == 2 * 3 + 3
    assert all(len(attrs["aria-label"] or "") > 30 for attrs in figures)
    regions = [attrs for attrs in page.named("div") if attrs.get("role") == "region"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    headings = [tag for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert len(page.named("table")) == len(page.named("caption")) > 6
    names = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(names) == len(set(names))


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attrs in page.tags:
        for name in FETCHING:
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert all(set(attrs) == {"rel", "href"} for attrs in page.named("link"))
    styles = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles


def test_all_text_is_escaped(results: Path, tmp_path: Path) -> None:
    folder = edited(results, tmp_path / HOSTILE.replace("/", ":"), hostile)
    path, notes = write_report(folder)
    assert notes == ["1 of 30 points failed"]
    page = Page(path)
    assert page.named("img") == []
    figures = [attrs for attrs in page.named("script") if attrs.get("type") == "application/json"]
    assert len(figures) == 2 * 3 + 2
    assert [attrs for attrs in page.named("script") if "type" not in attrs] == [{}, {}]
    assert f"slru path={HOSTILE}" in page.words
    assert f"boom {HOSTILE}" in page.words
    assert "1 point failed" in page.words
    assert "29 of 30 succeeded" in page.words
    body = page.source.partition("<body>")[2]
    assert "<script>window" not in body
    assert "<img" not in body
    for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', body, re.S):
        drawn = json.dumps(json.loads(text), ensure_ascii=False)
        assert "<script" not in drawn
        assert ("&lt;script" in drawn) == ("slru" in drawn)


def test_the_same_inputs_give_the_same_bytes(page: Page, results: Path, tmp_path: Path) -> None:
    """In another process, with other hashes, in another place, under another name."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(results, moved)
    words = ["report", str(moved), "--validation", str(VALIDATION)]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *words],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    written = Path(ran.stdout.strip())
    assert written == moved / "report.html"
    assert written.read_text(encoding="utf-8") == page.source


# ---------------------------------------------------------------------- figures are the table's


def test_kinds_are_told_apart(loaded: Results) -> None:
    looks = looks_of(loaded.points)
    assert {kind: {look.label for look in looks if look.kind == kind} for kind in KINDS} == KINDS
    assert [look.kind for look in looks] == sorted(
        (look.kind for look in looks), key=list(KINDS).index
    )
    assert len({(look.colour, look.symbol, look.dash) for look in looks}) == len(looks)
    assert all(look.name.startswith(f"{look.kind}: ") for look in looks if look.kind != "causal")
    assert {look.dash for look in looks if look.kind == "causal"} == {"solid"}
    assert "solid" not in {look.dash for look in looks if look.kind != "causal"}


def test_the_front_figure_has_every_point_once(loaded: Results) -> None:
    looks = looks_of(loaded.points)
    for name in loaded.systems:
        points = loaded.of_system(name)
        figure = pareto_figure(points, looks, ("recommended", pick_of(points)))
        drawn = sorted(
            (x, y) for trace in figure.data[2:] for x, y in zip(trace.x, trace.y, strict=True)
        )
        kept = points[~points["saturated"]]
        expected = zip(kept["memory.peak_bytes"] / GIB, kept["tpot_ms.mean"], strict=True)
        assert drawn == sorted(expected)
        hover = {tuple(row) for trace in figure.data[2:] for row in trace.customdata}
        assert len(hover) == len(kept)


def test_the_menu_filters_policies(loaded: Results) -> None:
    points = loaded.of_system(loaded.systems[0])
    pick = ("recommended", pick_of(points))
    figure = pareto_figure(points, looks_of(loaded.points), pick)
    names = [trace.name for trace in figure.data]
    shown = {
        button.label: [
            name for name, seen in zip(names, button.args[0]["visible"], strict=True) if seen
        ]
        for button in figure.layout.updatemenus[0].buttons
    }
    fixed = ["Pareto front of choices", "recommended"]
    assert shown["all policies"] == names
    assert set(shown["choices only"]) == {*fixed, *KINDS["causal"]}
    assert len(shown["choices and bounds"]) == len(fixed) + 4 + 2
    assert shown["only lru"] == [*fixed, "lru"]
    assert len(shown) == 3 + len(names) - len(fixed)


def test_the_grid_and_the_bars_show_the_times(loaded: Results) -> None:
    looks = looks_of(loaded.points)
    points = loaded.of_system(loaded.systems[0])
    grid = grid_figure(points, looks).data[0]
    row = list(grid.y).index("lru")
    for column, budget in enumerate(grid.x):
        own = points[(points["label"] == "lru") & (points["budget"] == budget.replace("%", " %"))]
        if own.empty:
            assert grid.z[row][column] is None
            continue
        usable = points["memory.fits"] & ~points["saturated"]
        rivals = points[(points["kind"] == "causal") & usable]
        rivals = rivals[rivals["expert_budget_bytes"] == own["expert_budget_bytes"].iloc[0]]
        tpot = own["tpot_ms.mean"].iloc[0]
        assert grid.z[row][column] == pytest.approx(tpot / rivals["tpot_ms.mean"].min())
    figure = breakdown_figure(points, looks)
    visible = [trace for trace in figure.data if trace.visible and trace.type == "bar"]
    totals: dict[str, float] = {}
    for trace in visible:
        for place, value in zip(trace.y, trace.x, strict=True):
            totals[place] = totals.get(place, 0) + value
    [labels] = [trace for trace in figure.data if trace.visible and trace.type == "scatter"]
    assert dict(zip(labels.y, labels.x, strict=True)) == pytest.approx(totals)
    for button in figure.layout.updatemenus[0].buttons:
        chosen = [
            trace
            for trace, seen in zip(figure.data, button.args[0]["visible"], strict=True)
            if seen
        ]
        order = button.args[1]["yaxis.categoryarray"]
        budget = points[points["budget"] == button.label.removeprefix("budget ")]
        assert all(list(trace.y) == order for trace in chosen)
        assert list(chosen[-1].x) == sorted(budget["tpot_ms.mean"])


def test_a_speed_up_over_another_policy_names_it(page: Page) -> None:
    """At 100 % nothing but `resident` was swept: it is not 1.00 times as fast as on-demand."""
    assert "times faster than on-demand" in page.words
    assert page.words.count("1.00 (resident)") == 2


def test_long_names_do_not_touch() -> None:
    assert wrapped("a<b c") == "a&lt;b c"
    assert wrapped("bound: oracle-prefetch cache=belady depth=2").count("<br>") == 2
    assert pitch_of(["lru", "slru"]) < pitch_of(["bound: oracle-prefetch cache=belady depth=2"] * 2)


# ---------------------------------------------------------------------- the trace


def test_the_heat_map_counts_the_accesses(loaded: Results) -> None:
    found = popularity_of(loaded, None)
    assert isinstance(found, Popularity)
    ids = Trace.open("sample").load(["experts"], 0, 60)["experts"]
    counts = np.zeros((16, 64))
    for layer in range(16):
        np.add.at(counts[layer], ids[:, layer].reshape(-1), 1)
    figure = experts_figure(found)
    told = figure.data[0].customdata
    assert [[float(cell[1].replace(",", "")) for cell in row] for row in told] == counts.tolist()
    ratio = np.clip(counts / counts.sum(axis=1, keepdims=True) * 64, 1 / 8, 8)
    assert np.allclose(figure.data[0].z, np.log2(ratio), atol=1e-4)
    _, ranked = figure.layout.updatemenus[0].buttons
    assert (np.diff(np.array(ranked.args[0]["z"][0]), axis=1) <= 0).all()


def test_a_trace_that_is_gone_is_said_and_can_be_named(tmp_path: Path, moesim: Any) -> None:
    trace = make_trace(tmp_path / "trace").path
    fields = {"hardware": ("rtx4090-pcie4",), "policies": ("lru",), "expert_budgets": ("50%",)}
    results = swept(tmp_path / "r", trace=str(trace), geometry=None, max_tokens=None, **fields)
    moved = trace.rename(tmp_path / "moved")
    code, out, err = moesim("report", results)
    assert (code, out) == (0, f"{results / 'report.html'}\n")
    assert err.startswith("moesim: note: no heat map of experts: ")
    page = Page(results / "report.html")
    assert "Left out: " in page.words
    assert "no such trace directory" in page.words
    assert "Heat map" not in page.source.partition("<body>")[2]
    code, _, err = moesim("report", results, "--trace", moved, "--out", tmp_path / "b.html")
    assert (code, err) == (0, "")
    assert "3 MoE layers x 8 experts" in Page(tmp_path / "b.html").words
    other = make_trace(tmp_path / "other", seed=5).path
    code, _, err = moesim("report", results, "--trace", other, "--out", tmp_path / "c.html")
    assert code == 2
    assert "is not the trace of this sweep" in err
    # Under the sweep's name there may be another trace by now.
    other.rename(trace)
    _, notes = write_report(results, tmp_path / "d.html")
    assert "is not the trace of this sweep" in notes[0]


# ---------------------------------------------------------------------- measured


def test_errors_are_those_of_the_validation(loaded: Results) -> None:
    found = read_validations([VALIDATION], loaded)
    assert found is not None
    summary = validation_summary()
    titles = {
        "time a token (TPOT)": "tpot_ms",
        "time to first token (TTFT)": "ttft_ms",
        "bytes copied": "bytes",
        "peak GPU memory": "memory_bytes",
    }
    rows = [row for row in errors_table(found) if row["figure"] in titles]
    assert len(rows) == 8
    for row in rows:
        expected = summary[row["kind"]][titles[row["figure"]]]
        assert row["median"] == f"{expected['median'] * 100:.1f} %"
        assert row["worst"] == f"{expected['worst'] * 100:.1f} %"
    naive = summary["prefetching"]["naive"]["tpot_ms"]
    [row] = [r for r in rows if r["kind"] == "prefetching" and "TPOT" in r["figure"]]
    assert row["naive_median"] == f"{naive['median'] * 100:.1f} %"


# ---------------------------------------------------------------------- again


def test_the_page_reproduces_the_sweep(loaded: Results, page: Page, tmp_path: Path) -> None:
    assert isinstance(loaded.asker, Swept)
    text = as_yaml(loaded.asker.config)
    assert " ".join(text.split()) in page.words
    (tmp_path / "sweep.yaml").write_text(text)
    assert load_config(tmp_path / "sweep.yaml") == loaded.asker.config
    assert yaml.safe_load(text)["policies"][-1] == {
        "name": "oracle-prefetch",
        "set": {"cache": "belady"},
    }
    measured = hashlib.sha256((VALIDATION / "report.json").read_bytes()).hexdigest()
    for digest in (loaded.trace_digest, loaded.table_sha256, measured):
        assert digest in page.words
    assert f"moesim report results --validation {VALIDATION}" in page.words


def test_the_pages_command_names_a_trace_that_was_named(loaded: Results) -> None:
    assert dict(commands_of(loaded))["this page"] == "moesim report results"
    told = dict(commands_of(loaded, (), "other traces/sample"))["this page"]
    assert shlex.split(told)[-2:] == ["--trace", "other traces/sample"]


def test_a_systems_name_is_no_field_of_a_template(loaded: Results) -> None:
    name = "<b>%{x}</b> %{customdata[0]"
    figure = fronts_figure([(name, loaded.of_system(loaded.systems[0]))])
    (line,) = [trace for trace in figure.data if trace.hovertemplate]
    told, _, rest = line.hovertemplate.partition("<br>")
    assert "%{" not in told
    assert html.unescape(told) == name
    assert "%{customdata[0]}" in rest


def test_the_command_of_the_pick_gives_its_time(loaded: Results, moesim: Any) -> None:
    lines = [line for what, line in commands_of(loaded) if "recommended" in what]
    assert len(lines) == len(loaded.systems)
    for name, line in zip(loaded.systems, lines, strict=True):
        code, out, _ = moesim(*shlex.split(line)[1:], "--json")
        assert code == 0
        pick = pick_of(loaded.of_system(name))
        assert pick is not None
        assert json.loads(out)["tpot_ms"]["mean"] == pick["tpot_ms.mean"]


def test_the_command_has_all_digits(tmp_path: Path, moesim: Any) -> None:
    decay = {"name": "lfu-decay", "set": {"gamma": 0.987654321}}
    out = swept(tmp_path / "digits", hardware=("laptop-pcie4x8",), policies=(decay,))
    loaded = read(out)
    (line,) = [line for what, line in commands_of(loaded) if "recommended" in what]
    assert "--set gamma=0.987654321" in line
    assert moesim(*shlex.split(line)[1:])[0] == 0


# ---------------------------------------------------------------------- errors


def test_what_is_wrong_is_one_line(results: Path, tmp_path: Path, moesim: Any) -> None:
    def refused(words: str, *arguments: object) -> None:
        code, out, err = moesim("report", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert words in err, err

    def copy(name: str) -> Path:
        return Path(shutil.copytree(results, tmp_path / name))

    (tmp_path / "empty").mkdir()
    refused("no such directory", tmp_path / "none")
    refused("sweep.json is not there", tmp_path / "empty")
    cut = copy("cut")
    whole = (cut / "results.parquet").read_bytes()
    (cut / "results.parquet").write_bytes(whole[: len(whole) // 2])
    refused("results.parquet is cut off or edited", cut)
    (cut / "results.parquet").unlink()
    refused("results.parquet is not there", cut)
    frame = pd.read_parquet(results / "results.parquet")
    odd = copy("odd")
    for column, value, said in (
        ("tpot_ms.mean", 0.0, "row 0, column tpot_ms.mean: 0.0 is no result"),
        ("tpot_ms.mean", -1.0, "column tpot_ms.mean: -1.0"),
        ("label", None, "column label: nan"),
        ("expert_budget_bytes", float("nan"), "column expert_budget_bytes: nan"),
        ("point.params", "[]", "column point.params: '[]'"),
        ("status", "fine", "fine is neither ok nor failed"),
    ):
        changed = frame.copy()
        changed[column] = changed[column].astype(object)
        changed.loc[0, column] = value
        if column != "label":
            changed[column] = changed[column].infer_objects()
        changed.to_parquet(odd / "results.parquet")
        refused(said, odd)
    frame.iloc[:1].to_parquet(odd / "results.parquet")
    refused("has 1 rows, sweep.json asks for", odd)
    broken = copy("broken")
    text = (broken / "sweep.json").read_text()
    (broken / "sweep.json").write_text(text[: len(text) // 2])
    refused("sweep.json is cut off or edited", broken)
    (broken / "sweep.json").write_text(text.replace(read(results).trace_digest, "0" * 64))
    refused("is of another trace", broken)
    for column in ("decode.late", "breakdown_ms.stall_cpu", "status"):
        less = edited(results, tmp_path / column, functools.partial(_without, column))
        refused(f"column {column} is missing", less)
    refused("is a directory: name a file", results, "--out", tmp_path / "empty")
    refused("report.json is not there", results, "--validation", tmp_path / "empty")
    refused("report.json is not there", results, "--validation", VALIDATION.parent / "locked")
    refused("is of another version", results, "--validation", VALIDATION.parent / "olmoe-dev")
    twice = ("--validation", VALIDATION, "--validation", VALIDATION / ".." / VALIDATION.name)
    refused("named twice", results, *twice)
    qwen = VALIDATION.parent / "locked-qwen"
    refused(
        "is of geometry qwen1.5-moe-a2.7b, the sweep of olmoe-1b-7b", results, "--validation", qwen
    )
    damaged = Path(shutil.copytree(VALIDATION, tmp_path / "damaged")) / "report.json"
    text = damaged.read_text()
    damaged.write_text(text[:5000])
    refused("is cut off or edited", results, "--validation", damaged.parent)
    damaged.write_text(text.replace('"measured":', '"measurd":', 400))
    refused("field 'points.0.", results, "--validation", damaged.parent)
    assert not list(results.glob("*report*"))


def _without(column: str, frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=column)


def test_no_point_succeeded(results: Path, tmp_path: Path) -> None:
    def all_failed(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(status="failed", error="no memory")

    with pytest.raises(UserError, match="no point of this sweep succeeded: 30 failed"):
        write_report(edited(results, tmp_path / "failed", all_failed))


def test_another_file_is_left_alone(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    write_report(small, out)
    first = out.read_bytes()
    write_report(small, out)  # the same page again is no harm
    assert out.read_bytes() == first
    out.write_text("mine")
    with pytest.raises(UserError, match="another file is there"):
        write_report(small, out)
    assert out.read_text() == "mine"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_a_missing_library_is_named(missing: str, results: Path) -> None:
    """In a process of its own: here everything has been imported."""
    program = f"import sys; sys.modules[{missing!r}] = None; import cli; cli.main()"
    command = [sys.executable, "-c", program, "report", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2
    assert f"{missing} is not installed; run pip install 'moesim[report]'" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_one_system_needs_no_choice(small: Path, tmp_path: Path) -> None:
    page = Page(write_report(small, tmp_path / "a.html", validations=[VALIDATION])[0])
    assert "confirms nothing for laptop-pcie4x8" in page.words
    assert "Show system" not in page.words
    assert "4GiB, 6GiB for the whole model" in page.words
    assert "lru with 6GiB in all" in page.words
