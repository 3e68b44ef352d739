"""600 points of the sample trace on two processes: the size of sweep that people run."""

from __future__ import annotations

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sim import SweepConfig, sweep

MOST_SECONDS = 180

CONFIG = SweepConfig.model_validate(
    {
        "trace": "sample",
        "geometry": "olmoe-1b-7b",
        "hardware": ["h200-pcie5", "rtx4090-pcie4"],
        "links": ["8GB/s", "12GB/s", "24GB/s", "40GB/s", "55GB/s"],
        "expert_budgets": ["12.5%", "25%", "37.5%", "50%", "75%"],
        "policies": [
            "on-demand",
            "lru",
            "lru-global",
            "lfu",
            "lfru",
            "slru",
            "static",
            "least-stale",
            "belady",
            "belady-bypass",
            "next-gate",
            "oracle-prefetch",
        ],
    }
)


@pytest.mark.bench
def test_six_hundred_points(benchmark: BenchmarkFixture) -> None:
    seconds: list[float] = []

    def run() -> None:
        start = time.perf_counter()
        frame = sweep(CONFIG, jobs=2)
        seconds.append(time.perf_counter() - start)
        assert len(frame) == 600
        assert (frame["status"] == "ok").all()

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(case="sweep", points=600, jobs=2, seconds=round(seconds[0], 1))
    assert seconds[0] < MOST_SECONDS
