"""What the benchmark of the replay engine makes of a run's ledger."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from replay.play import Measured
from sim.machine import StepTimes
from sim.spans import COPY, DECIDE, EXPERTS, GPU, ISSUE, SEGMENT, STEP
from tests.bench.host_event import Host, event_us
from tests.bench_replay import host_times, ratios, spread


def test_an_event_takes_the_host_longer_the_more_it_misses() -> None:
    rng = np.random.default_rng(0)
    experts = np.argpartition(rng.random((40, 4, 16)), 4, axis=-1)[..., :4]
    there, missing = (Host(experts, 16, share) for share in (1.0, 0.25))
    assert there.events == 160
    assert 0 < event_us(there, runs=3) < event_us(missing, runs=3)
    assert there._core.tally.copies == 64  # each expert once, in the run that fills
    assert missing._core.tally.copies > 4 * 160


def ledger(*steps: list[tuple[int, int, int, int]]) -> Measured:
    """Steps of (microseconds, kind, layer, count), one after the other."""
    times, marks, now = StepTimes(), [], 0
    marks.append((now, STEP, -1, 0))
    for step in steps:
        times.begin.append(now)
        for us, kind, layer, count in step:
            now += us * 1000
            marks.append((now, kind, layer, count))
        times.end.append(now)
    return Measured(times=times, marks=marks)


def test_host_time_an_event_leaves_waits_copies_and_prefill_out() -> None:
    prefill = [(900, STEP, -1, 0), (900, SEGMENT, 0, 0), (900, DECIDE, 0, 0)]
    missed = [
        (5, STEP, -1, 0),
        *((3, SEGMENT, 0, 0), (40, GPU, 0, 0), (6, DECIDE, 0, 2), (30, ISSUE, 0, 2)),
        *((4, EXPERTS, 0, 6), (200, COPY, 0, 0), (4, EXPERTS, 0, 2)),
        *((3, SEGMENT, 1, 0), (50, GPU, 1, 0), (5, DECIDE, 1, 0), (1, ISSUE, 1, 0)),
        *((4, EXPERTS, 1, 8), (9, SEGMENT, 2, 0), (60, GPU, 2, 0), (7, STEP, -1, 0)),
    ]
    found = host_times(ledger(prefill, missed), np.array([False, True]), layers=2)
    assert found["events"] == 2
    assert found["sum"]["mean"] == pytest.approx((17 + 13) / 2)
    assert found["mean_by_kind"] == pytest.approx(
        {"segment_launch": 3, "decide": 5.5, "refill_without_copies": 0.5, "experts_launch": 6}
    )
    assert found["mean_apart"] == pytest.approx(
        {"issue_copies": 15, "wait_for_gpu_and_readback": 45, "wait_for_copies": 100}
    )
    assert (found["chunks_an_event"], found["us_a_copy"]) == (1, 15)
    assert (found["groups_an_event"], found["a_step"]) == (1.5, 12)


def test_ratios_are_of_medians_with_the_rounds_beside() -> None:
    ours, theirs = [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]], [[4.0, 4.0, 4.0], [10.0, 10.0, 10.0]]
    assert ratios(ours, theirs) == pytest.approx({"ratio": 2 / 7, "low": 0.2, "high": 0.5})
    told = spread(ours)
    assert (told["median_ms"], told["steps"]) == (2.0, 6)
    assert told["medians_of_rounds_ms"] == [2.0, 2.0]
