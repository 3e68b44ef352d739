"""Expert loads for EPLB and SGLang, and the commands of import and export."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from configs.errors import UserError
from tests.traces import make_trace
from tracer.commands import export, imports
from tracer.exporters import expert_counts, export_eplb, export_sglang_location
from tracer.exporters import load as load_module
from tracer.trace import DECODE, PREFILL, Trace


def counted(trace: Trace, phases: tuple[int, ...], domain: str | None = None) -> Any:
    """Counts, one access at a time."""
    arrays = trace.load(["request", "phase", "experts"])
    domains = trace.requests().set_index("request")["domain"]
    uses: Counter[tuple[int, int]] = Counter()
    for request, phase, ids in zip(
        *(arrays[n] for n in ("request", "phase", "experts")), strict=True
    ):
        if phase in phases and domain in (None, domains[request]):
            uses.update((layer, int(e)) for layer, row in enumerate(ids) for e in row if e >= 0)
    counts = np.zeros((3, 8), int)
    for place, count in uses.items():
        counts[place] = count
    return counts


@pytest.mark.parametrize(
    ("phase", "phases"),
    [("prefill", (PREFILL,)), ("decode", (DECODE,)), ("both", (PREFILL, DECODE))],
)
def test_counts_are_those_of_the_rows(
    tiny_trace: Trace, monkeypatch: pytest.MonkeyPatch, phase: str, phases: tuple[int, ...]
) -> None:
    monkeypatch.setattr(load_module, "_BLOCK_ROWS", 7)
    for domain in (None, "prose"):
        counts = expert_counts(tiny_trace, phase, None if domain is None else [domain])
        np.testing.assert_array_equal(counts, counted(tiny_trace, phases, domain))


def test_a_layer_that_did_not_run_counts_nothing(bigmoe_trace: Trace) -> None:
    prefill = expert_counts(bigmoe_trace, "prefill")
    assert prefill.sum(axis=1).tolist() == [28 * 6] * 47 + [6]


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_eplb_reads_a_matrix_of_moe_layers(tiny_trace: Trace, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / f"load{suffix}"
    export_eplb(tiny_trace, out, "decode")
    weight = np.load(out) if suffix == ".npy" else np.array(json.loads(out.read_text()))
    np.testing.assert_array_equal(weight, counted(tiny_trace, (DECODE,)))
    again = tmp_path / f"again{suffix}"
    export_eplb(tiny_trace, again, "decode")
    assert again.read_bytes() == out.read_bytes()


def test_sglang_reads_a_count_of_every_decoder_layer(tiny_trace: Trace, tmp_path: Path) -> None:
    export_sglang_location(tiny_trace, tmp_path / "location.json")
    content = json.loads((tmp_path / "location.json").read_text())
    assert list(content) == ["logical_count"]
    counts = np.array(content["logical_count"])
    assert counts.shape == (4, 8)
    assert not counts[0].any()
    np.testing.assert_array_equal(counts[1:], counted(tiny_trace, (PREFILL, DECODE)))


def test_what_cannot_be_exported(tiny_trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(UserError, match=r"there\.json exists already: name another file"):
        export_eplb(tiny_trace, tmp_path / "there.json")
    assert (tmp_path / "there.json").read_text() == "mine"
    with pytest.raises(UserError, match=r"must end in \.json or \.npy"):
        export_eplb(tiny_trace, tmp_path / "load.csv")
    with pytest.raises(UserError, match=r"must end in \.json"):
        export_sglang_location(tiny_trace, tmp_path / "load.npy")
    with pytest.raises(UserError, match="no domain 'law'; its domains: code, maths, prose"):
        export_eplb(tiny_trace, tmp_path / "load.json", "both", ["law"])
    with pytest.raises(UserError, match="--phase 'all' is none of prefill, decode, both"):
        export_eplb(tiny_trace, tmp_path / "load.json", "all")
    without = make_trace(tmp_path / "decode", prompt=0)
    with pytest.raises(UserError, match="no prefill tokens of domain code; choose another"):
        export_eplb(without, tmp_path / "load.json", "prefill", ["code"])
    assert not (tmp_path / "load.json").exists()


@pytest.fixture
def app() -> typer.Typer:
    built, importer = typer.Typer(), typer.Typer()
    imports.register(importer)
    built.add_typer(importer, name="import")
    export.register(built)
    return built


def test_commands_export(app: typer.Typer, tiny_trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    words = ["export", "eplb", str(tiny_trace.path), "--out", str(out), "--domain", "code"]
    ran = CliRunner().invoke(app, [*words, "--phase", "decode"], catch_exceptions=False)
    assert ran.exit_code == 0
    assert ran.output == f"{out}: 72 expert uses, 3 layers x 8 experts\n"
    out = tmp_path / "location.json"
    words = ["export", "sglang-location", str(tiny_trace.path), "--out", str(out)]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ran.output == f"{out}: 306 expert uses, 4 layers x 8 experts\n"
    assert "eplb" in CliRunner().invoke(app, ["export"]).output


@pytest.mark.parametrize("words", ["import vllm", "import sglang", "import hf-parquet"])
def test_help_shows_an_example(app: typer.Typer, words: str) -> None:
    ran = CliRunner().invoke(app, [*words.split(), "--help"])
    assert f"Example: moesim {words} " in ran.output


def test_commands_import(app: typer.Typer, tmp_path: Path) -> None:
    experts = np.tile(np.arange(8, dtype=np.int16), (5, 16, 1))
    np.save(tmp_path / "a.npy", experts)
    out = tmp_path / "out"
    words = ["import", "vllm", str(tmp_path / "a.npy"), "--model", "olmoe-1b-7b"]
    words += ["--prompt-tokens", "3", "--out", str(out)]
    ran = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ran.output == f"{out}: 5 tokens, 16 MoE layers x 64 experts, top-8\n"
