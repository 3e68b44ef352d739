"""How fast the lean model is beside the plain one, and how much memory a long trace takes.

Both models run the same system in the same process, one after the other in every round, so that
a busy machine slows both; the ratio is of one round, its spread over the rounds is told. Results
are compared before anything is timed: a fast model that is wrong has no speed.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import policies
from configs import load_geometry, load_hardware
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from sim.machine import Machine
from sim.tape import play, record
from sim.timing import RooflineTiming
from tests.bench.routing import EXPERTS, LAYERS, TOP_K, decode_columns
from tests.reference.plain_model import PlainModel
from tracer.workload import Workload, first_use, next_use

pytestmark = pytest.mark.bench

TOKENS = 400
ROUNDS = 5
BUDGET_SHARE = 0.25
LONG_TOKENS = 78_200
GIGABYTE = 10**9
#: Times as fast as the plain model that the lean one must be.
LEAST_RATIO = 4.0


@dataclass(frozen=True)
class System:
    """A workload and everything that both models are built from."""

    workload: Workload
    shape: Shape
    timing: RooflineTiming
    data: PolicyData

    def core(self, policy: str, params: dict[str, Any]) -> DecisionCore:
        info = policies.get(policy)
        values, options = info.parse(params)
        built = info.build(values, self.data)
        budget = int(BUDGET_SHARE * EXPERTS * sum(self.shape.bytes_by_layer))
        plan = plan_memory(self.shape, built.scope, budget)
        return DecisionCore(self.shape, plan, built, options)


@pytest.fixture(scope="module")
def system() -> System:
    geometry = load_geometry("olmoe-1b-7b")
    workload = Workload(decode_columns(TOKENS), EXPERTS)
    shape = Shape(LAYERS, EXPERTS, TOP_K, geometry.expert_bytes_by_layer)
    data = PolicyData(
        shape,
        events=workload.events,
        next_use=next_use(workload.events),
        first_use=first_use(workload.events, shape.keys),
    )
    return System(workload, shape, RooflineTiming(geometry, load_hardware("h200-pcie5")), data)


CASES = {
    "lru": ("lru", {}),
    "accuracy-q": ("accuracy-q", {"q": 0.85, "depth": 1}),
    "accuracy-q depth 2, 3 chunks": ("accuracy-q", {"q": 0.85, "depth": 2, "chunks": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_lean_beside_plain(name: str, system: System, benchmark: BenchmarkFixture) -> None:
    policy, params = CASES[name]

    def lean() -> Machine:
        return Machine(system.workload, system.core(policy, params), system.timing)

    def plain() -> PlainModel:
        return PlainModel(system.workload, system.core(policy, params), system.timing)

    hit_rate = _compare(lean(), plain())
    seconds: dict[str, list[float]] = {"lean": [], "plain": []}

    def one_round() -> None:
        seconds["plain"].append(_time(plain().run))
        seconds["lean"].append(_time(lean().run))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    figures = _figures(seconds, system.workload.num_accesses)
    benchmark.extra_info.update(case=name, hit_rate=round(hit_rate, 4), **figures)
    assert figures["ratio"] >= LEAST_RATIO


def test_decided_once_beside_each_alone(system: System, benchmark: BenchmarkFixture) -> None:
    """Ten machines: the decisions of lru once, timed for all, beside a run of each."""
    links = [4, 6, 8, 12, 16, 24, 32, 40, 48, 55]
    hardware = load_hardware("h200-pcie5")
    geometry = load_geometry("olmoe-1b-7b")
    machines = [RooflineTiming(geometry, hardware.with_link(rate * 1e9)) for rate in links]

    def shared() -> list[int]:
        tape = record(system.workload, system.core("lru", {}))
        return [play(tape, system.workload, timing).times.end[-1] for timing in machines]

    def alone() -> list[int]:
        ends = []
        for timing in machines:
            machine = Machine(system.workload, system.core("lru", {}), timing)
            machine.run()
            ends.append(machine.times.end[-1])
        return ends

    assert shared() == alone()
    seconds: dict[str, list[float]] = {"lean": [], "plain": []}

    def one_round() -> None:
        seconds["plain"].append(_time(alone))
        seconds["lean"].append(_time(shared))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=0)
    figures = _figures(seconds, len(links) * system.workload.num_accesses)
    benchmark.extra_info.update(case="lru on 10 machines: once, each alone", **figures)
    assert figures["ratio"] >= LEAST_RATIO


def _compare(lean: Machine, plain: PlainModel) -> float:
    """Run both, assert that they agree; returns the hit rate."""
    lean.run()
    result = plain.run()
    assert lean.times.begin == result.begin
    assert lean.times.end == result.end
    assert lean.times.segments == result.segments
    assert lean.times.experts == result.experts
    assert lean.times.stall_late == result.stall_late
    assert lean.times.stall_miss == result.stall_miss
    assert lean.link.busy_ns == result.link_busy_ns
    assert lean.core.tally == result.tally
    buckets = lean.core.tally.buckets.values()
    return sum(bucket.hits for bucket in buckets) / sum(bucket.accesses for bucket in buckets)


def _time(run: Callable[[], object]) -> float:
    """CPU seconds: what else the machine does counts for less than in wall time."""
    gc.collect()
    start = process_time()
    run()
    return process_time() - start


def _figures(seconds: dict[str, list[float]], accesses: int) -> dict[str, Any]:
    ratios = [plain / lean for lean, plain in zip(seconds["lean"], seconds["plain"], strict=True)]
    lean, plain = ([accesses / each for each in seconds[model]] for model in ("lean", "plain"))
    return {
        "accesses": accesses,
        "rounds": len(ratios),
        "lean_accesses_per_s": round(median(lean)),
        "lean_range": [round(min(lean)), round(max(lean))],
        "plain_accesses_per_s": round(median(plain)),
        "plain_range": [round(min(plain)), round(max(plain))],
        "ratio": round(median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


# ---------------------------------------------------------------------- memory

WRITE = """
import sys
from tests.bench.long_trace import write
write(sys.argv[1], int(sys.argv[2]))
"""
SIMULATE = """
import json, resource, sys, time
from sim.point import Point, inputs_for, run_point
from tracer.trace import load_arrays

start = time.perf_counter()
point = Point(policy="lru", hardware="h200-pcie5", expert_budget="25%")
result = run_point(inputs_for(load_arrays(sys.argv[1]), point), point)
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps({
    "accesses": result["decode"]["accesses"],
    "seconds": round(seconds, 2),
    "peak_rss_bytes": peak,
}))
"""


def test_memory_of_ten_million_accesses(tmp_path: Path, benchmark: BenchmarkFixture) -> None:
    arrays = tmp_path / "arrays"
    _python(WRITE, str(arrays), str(LONG_TOKENS))
    outputs: list[str] = []
    benchmark.pedantic(lambda: outputs.append(_python(SIMULATE, str(arrays))), rounds=1)
    measured = json.loads(outputs[0])
    benchmark.extra_info.update(case="memory", **measured)
    assert measured["accesses"] >= 10_000_000
    assert measured["peak_rss_bytes"] < GIGABYTE


def _python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter, whose peak memory is then its own; returns its output."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
