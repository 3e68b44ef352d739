"""The recorded hour of Azure conversations on the sample trace: requests and accesses a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.bench

MOST_SECONDS = 300
SERVE = """
import json, resource, sys, time
from tests.served import azure_hour

start = time.perf_counter()
result = azure_hour(sys.argv[1]).result
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "served_requests": result["requests"],
    "steps": result["batches"]["steps"],
    "accesses": result["decode"]["accesses"] + result["prefill"]["accesses"],
    "seconds": round(seconds, 1),
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
}))
"""


def test_an_hour_of_azure_conversations(shared: Path, benchmark: BenchmarkFixture) -> None:
    """In a fresh interpreter, whose peak memory is then its own."""
    root = Path(__file__).resolve().parents[2]
    outputs: list[str] = []

    def run() -> None:
        done = subprocess.run(
            [sys.executable, "-c", SERVE, str(shared)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)

    benchmark.pedantic(run, rounds=1)
    measured = json.loads(outputs[0])
    benchmark.extra_info.update(case="serving", **measured)
    assert measured["served_requests"] == 19_366
    assert measured["seconds"] < MOST_SECONDS
