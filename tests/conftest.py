from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from tests.commands import Ran
from tests.traces import ALL_COLUMNS, make_trace
from tracer.importers import import_bigmoe_csv, import_npz
from tracer.trace import Trace


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of models, traces and prompts that the project reads but does not contain."""
    beside_the_project = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("MOESIM_SHARED", beside_the_project))
    if path.is_dir():
        return path
    if os.environ.get("CI"):
        pytest.fail(f"{path} is absent; set MOESIM_SHARED to its place")
    pytest.skip(f"{path} is absent; set MOESIM_SHARED to its place")


@pytest.fixture
def moesim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs a command: its words, each as text."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["moesim", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def tiny_trace(tmp_path: Path) -> Trace:
    """Three requests of 5 prefill and 12 decode tokens, 3 layers x 8 experts, all columns."""
    return make_trace(tmp_path / "tiny", columns=ALL_COLUMNS)


@pytest.fixture(scope="session")
def gpt_oss_trace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Real decoding of gpt-oss-20b: 213 requests, 64,794 tokens, 24 layers x 32 experts, top-4."""
    out = tmp_path_factory.mktemp("gpt-oss") / "trace"
    import_npz(shared / "traces" / "gpt-oss-20b-decode.npz", "gpt-oss-20b", out)
    return Trace.open(out)


@pytest.fixture(scope="session")
def bigmoe_trace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """An engine's log of Qwen3-30B-A3B with its own hits: 28 + 128 tokens, 48 x 128, top-6."""
    out = tmp_path_factory.mktemp("bigmoe") / "trace"
    import_bigmoe_csv(shared / "traces" / "bigmoe-qwen3-30b-route.csv", "qwen3-30b-a3b", out)
    return Trace.open(out)
