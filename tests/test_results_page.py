"""docs/policies.md is made by one command, from whatever traces there are."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.bench.results_page as page
import tests.bench.results_sweeps as sweeps
from tests.bench.results_sweeps import BUDGETS, LINKS, NO_CACHE
from tests.traces import make_trace

POLICIES = ("resident", "lru", "next-gate", "promoe", "belady-bypass", *NO_CACHE)


def test_the_page_names_what_cannot_run_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("weights", "lookahead_1")
    make_trace(
        tmp_path / "trace",
        experts=16,
        requests=4,
        prompt=3,
        output=5,
        seed=2,
        columns=columns,
    )
    chosen = tuple(sweeps.choice(name) for name in POLICIES)
    monkeypatch.setattr(sweeps, "everything", lambda: chosen)
    monkeypatch.setattr(sweeps, "list_hardware", lambda: ["rtx4090-pcie4", "t4-pcie3"])
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name
        target = out / "policies.md"
        options = {"work": tmp_path / "work", "page": target, "images": out / "img"}
        words = [word for key, path in options.items() for word in (f"--{key}", str(path))]
        out.mkdir()
        page.main(["--trace", str(tmp_path / "trace"), *words])
        texts.append(target.read_bytes() + (out / "img" / "policies-tiny.png").read_bytes())
    assert texts[0] == texts[1]
    text = (tmp_path / "one" / "policies.md").read_text(encoding="utf-8")
    assert "- promoe: not runnable: needs the column learned_2" in text
    for paper in ("ProMoE", "FineMoE", "SwapMoE"):
        section = text.split(f"### {paper} (arXiv")[1].split("###")[0]
        assert "Not runnable: no trace here has the column" in section
    matrices = text.split("### TPOT in ms")[1:]
    assert len(matrices) == len(LINKS)
    for matrix in matrices:
        own = matrix.split("###")[0]
        (row,) = (line for line in own.splitlines() if line.startswith("| lru |"))
        assert row.count("(") == len(BUDGETS)
