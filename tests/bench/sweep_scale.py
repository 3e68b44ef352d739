"""A sweep of 2,000 points of the sample trace: points/s, peak memory, backends beside each other.

    python -m tests.bench.sweep_scale                       # 2,000 points, joblib's two processes
    python -m tests.bench.sweep_scale --points 250 --max-tokens 300 --rounds 3 \\
        --variants 1,loky-2,dask-1,dask-2
    python -m tests.bench.sweep_scale --sharing             # 10 machines: decided once, and each

Each run is the command line in a process of its own. Variants are interleaved, so that what else
the machine does meets all alike; the load is told, and CPU time stands beside wall-clock time. All
must write the same bytes. Memory is sampled every 0.2 s over the process and all that it started:
RSS counts what processes share once each, PSS once. A table for people, then one JSON object on the
last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import sim.point
import sim.running
from sim import SweepConfig, sweep

SAMPLE_S = 0.2
ON_DEMAND = (
    *("on-demand", "lru", "lru-global", "lfu", "lfu-decay", "lfru", "slru", "score-ema"),
    *("least-stale", "reuse-distance", "static", "belady", "belady-bypass", "belady-global"),
)
PREFETCHING = (
    *("next-gate", "oracle-prefetch", "promoe", "finemoe", "moe-infinity"),
    *("mixtral-offloading", "pregated", "swapmoe"),
)
OTHERS = ("fiddler", "hybrid-split", "hobbit")
BUDGETS = ("12.5%", "18.75%", "25%", "31.25%", "37.5%", "50%", "62.5%", "75%")
LINKS = ("8GB/s", "12GB/s", "24GB/s", "40GB/s", "55GB/s")
HARDWARE = ("h200-pcie5", "rtx4090-pcie4")
MACHINES = len(LINKS) * len(HARDWARE)


def mix(points: int, max_tokens: int | None = None) -> SweepConfig:
    """25 policies x 8 budgets x 5 links x 2 machines; fewer points: fewer budgets, or links."""
    policies = (*ON_DEMAND, *PREFETCHING, *OTHERS)
    budgets, rest = divmod(points, len(policies) * MACHINES)
    if rest or not 1 <= budgets <= len(BUDGETS):
        raise SystemExit(f"--points {points}: give a multiple of {len(policies) * MACHINES}")
    return SweepConfig.model_validate(
        {
            "trace": "sample",
            "geometry": "olmoe-1b-7b",
            "hardware": HARDWARE,
            "links": LINKS,
            "expert_budgets": BUDGETS[-budgets:] if budgets > 1 else ("25%",),
            "policies": policies,
            "max_tokens": max_tokens,
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--variants", default="loky-2", help="of 1, loky-N, dask-N, ray-N")
    parser.add_argument("--max-tokens", type=int, help="the first rows of the trace only")
    parser.add_argument("--sharing", action="store_true")
    options = parser.parse_args()
    result = sharing() if options.sharing else race(options)
    print(json.dumps(result))
    return 0


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All variants, interleaved."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants.split(",")}
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "mix.yaml"
        config.write_text(
            mix(options.points, options.max_tokens).model_dump_json(exclude_none=True)
        )
        for turn in range(options.rounds):
            for name in runs:
                out = Path(scratch) / f"{name}-{turn}"
                runs[name].append(run(name, config, out, options.points))
                digests.add(digest(out))
    head = f"{'variant':8} {'seconds':>22} {'points/s':>20} {'CPU s':>6} {'peak RSS':>9} {'PSS':>9}"
    print(f"{options.points} points, {options.rounds} rounds, {os.cpu_count()} cores")
    print(f"{head} {'load':>8}")
    for name, turns in runs.items():
        print(row(name, turns))
    assert len(digests) == 1, "variants wrote different bytes (or the commit changed meanwhile)"
    return {"points": options.points, "cores": os.cpu_count(), "variants": runs}


def row(name: str, turns: list[dict[str, Any]]) -> str:
    middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    spread = {key: [f(turn[key] for turn in turns) for f in (min, max)] for key in turns[0]}
    seconds = f"{middle['seconds']:.1f} ({spread['seconds'][0]:.1f}-{spread['seconds'][1]:.1f})"
    rate = f"{middle['points_per_s']:.2f} ({{:.2f}}-{{:.2f}})".format(*spread["points_per_s"])
    memory = " ".join(f"{middle[key] / 1e6:6.0f} MB" for key in ("peak_rss", "peak_pss"))
    load = "{:.1f}-{:.1f}".format(*spread["load"])
    cpu = f"{middle['cpu_s']:6.0f}"
    return f"{name:8} {seconds:>22} {rate:>20} {cpu} {memory} {load:>8}"


def run(variant: str, config: Path, out: Path, points: int) -> dict[str, Any]:
    """One sweep by the command line."""
    backend, _, jobs = variant.partition("-")
    words = ["sweep", str(config), "--out", str(out)]
    words += ["--backend", backend, "--jobs", jobs] if jobs else ["--jobs", backend]
    start, used = time.perf_counter(), cpu_of_children()
    process = subprocess.Popen(
        [sys.executable, "-c", "import cli; cli.main()", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak_rss = peak_pss = 0
    loads = []
    while process.poll() is None:
        rss, pss = memory_of(process.pid)
        peak_rss, peak_pss = max(peak_rss, rss), max(peak_pss, pss)
        loads.append(os.getloadavg()[0])
        time.sleep(SAMPLE_S)
    seconds = time.perf_counter() - start
    assert process.returncode == 0, f"{variant} ended with {process.returncode}"
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_of_children() - used, 1),
        "points_per_s": round(points / seconds, 2),
        "peak_rss": peak_rss,
        "peak_pss": peak_pss,
        "load": round(statistics.mean(loads), 1),
    }


def cpu_of_children() -> float:
    """Seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory_of(pid: int) -> tuple[int, int]:
    """RSS and PSS of a process and all that it started, bytes."""
    rss = pss = 0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        rss, pss = rss + memory.rss, pss + memory.pss
    return rss, pss


def digest(out: Path) -> str:
    tables = (out / "results.parquet", out / "results.csv")
    return hashlib.sha256(b"".join(table.read_bytes() for table in tables)).hexdigest()


def sharing() -> dict[str, Any]:
    """On demand, a quarter of the experts: CPU time of a sweep in this process, both ways."""
    every = mix(250)
    chosen = tuple(choice for choice in every.policies if choice.name in ON_DEMAND)
    config = every.model_copy(update={"policies": chosen})
    once, each, ratios = [], [], []
    for _ in range(3):
        start = time.process_time()
        shared = sweep(config)
        once.append(time.process_time() - start)
        with decisions_taken_each_time():
            start = time.process_time()
            alone = sweep(config)
            each.append(time.process_time() - start)
        assert shared.equals(alone), "sharing decisions changed results"
        ratios.append(each[-1] / once[-1])
    figures = {
        "points": len(shared),
        "machines": MACHINES,
        "once_s": round(statistics.median(once), 1),
        "each_s": round(statistics.median(each), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    print(
        f"{figures['points']} on-demand points, {MACHINES} machines: {figures['once_s']} s of CPU "
        f"decided once, {figures['each_s']} s each alone: {figures['ratio']} times "
        f"({figures['ratio_range'][0]} to {figures['ratio_range'][1]})"
    )
    return {"sharing": figures}


@contextmanager
def decisions_taken_each_time() -> Iterator[None]:
    """As before :mod:`sim.tape`: a simulation for each machine."""
    modules = (sim.point, sim.running)
    before = sim.point.can_share_decisions
    for module in modules:
        module.can_share_decisions = lambda point: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.can_share_decisions = before  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
