from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.traces import ALL_COLUMNS, make_trace
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
def tiny_trace(tmp_path: Path) -> Trace:
    """Three requests of 5 prefill and 12 decode tokens, 3 layers x 8 experts, all columns."""
    return make_trace(tmp_path / "tiny", columns=ALL_COLUMNS)
