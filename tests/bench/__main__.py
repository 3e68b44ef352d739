"""Run the benchmarks; a table for people, then one JSON object on the last line.

    python -m tests.bench [pytest arguments]

Exit status: pytest's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "benchmark.json"
        status = pytest.main(
            [
                str(Path(__file__).parent),
                *("-m", "bench", "-p", "no:cacheprovider", "--no-header", "--quiet"),
                *(f"--benchmark-json={report}", "--benchmark-quiet"),
                # What failed is told by the test; an error about a missing report would hide it.
                *("-W", "default:Not saving anything"),
                *arguments,
            ]
        )
        if not report.exists():
            return int(status)
        benchmarks = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    figures = [benchmark["extra_info"] for benchmark in benchmarks]
    compared = [each for each in figures if "ratio" in each]
    memory = [each for each in figures if "peak_rss_bytes" in each]
    sweeps = [each for each in figures if "points" in each]
    tracing = [each for each in figures if "tracing" in each]
    traces = [each for each in figures if "trace_tokens" in each]
    ranked = [each for each in figures if "slowest" in each]
    serving = [each for each in figures if "served_requests" in each]
    lines = [*_table(compared), *map(_memory_line, memory), *map(_sweep_line, sweeps)]
    lines += [line for each in ranked for line in _policy_lines(each)]
    for line in [
        *lines,
        *map(_tracing_line, tracing),
        *map(_trace_line, traces),
        *map(_serving_line, serving),
    ]:
        print(line)
    result = {
        "passed": int(status) == 0,
        "cases": compared,
        "memory": memory,
        "sweeps": sweeps,
        "tracing": tracing,
        "traces": traces,
        "policies": ranked,
        "serving": serving,
    }
    print(json.dumps(result))
    return int(status)


def _table(cases: list[dict[str, Any]]) -> list[str]:
    if not cases:
        return []
    head = f"{'case':38} {'hit rate':>8} {'lean, accesses/s':>32} {'plain, accesses/s':>32}"
    return [f"{head} {'ratio':>22}", *map(_row, cases)]


def _row(case: dict[str, Any]) -> str:
    lean = _spread(case["lean_accesses_per_s"], case["lean_range"])
    plain = _spread(case["plain_accesses_per_s"], case["plain_range"])
    low, high = case["ratio_range"]
    ratio = f"{case['ratio']:.2f} ({low:.2f} to {high:.2f})"
    rate = f"{case['hit_rate']:.1%}" if "hit_rate" in case else ""
    return f"{case['case']:38} {rate:>8} {lean:>32} {plain:>32} {ratio:>22}"


def _spread(middle: int, ends: list[int]) -> str:
    return f"{middle:,} ({ends[0]:,} to {ends[1]:,})"


def _memory_line(case: dict[str, Any]) -> str:
    return (
        f"{case['accesses']:,} accesses through lru: peak {case['peak_rss_bytes'] / 1e6:.0f} MB, "
        f"{case['seconds']:.1f} s, {case['accesses'] / case['seconds']:,.0f} accesses/s"
    )


def _sweep_line(case: dict[str, Any]) -> str:
    return f"{case['points']} points in {case['jobs']} processes: {case['seconds']:.1f} s"


def _tracing_line(case: dict[str, Any]) -> str:
    low, high = case["overhead_interval_95"]
    return (
        f"tracing {case['tracing']}: {case['overhead']:+.1%} a decode step "
        f"({low:+.1%} to {high:+.1%}, {case['pairs']} pairs of {case['untraced_ms']:.1f} ms)"
    )


def _trace_line(case: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size:g}" for name, size in case["bytes_per_token"].items())
    return (
        f"a trace of {case['trace_tokens']:,} tokens, {case['columns']} columns: "
        f"{case['written_tokens_per_s']:,} tokens/s written, "
        f"{case['read_tokens_per_s']:,} tokens/s read; bytes a token: {sizes} "
        f"(raw ids {case['raw_id_bytes_per_token']})"
    )


def _serving_line(case: dict[str, Any]) -> str:
    requests, seconds = case["served_requests"], case["seconds"]
    return (
        f"{requests:,} requests in {case['steps']:,} steps served: {seconds:.1f} s, "
        f"{requests / seconds:,.0f} requests/s, {case['accesses'] / seconds:,.0f} accesses/s, "
        f"peak {case['peak_bytes'] / 1e6:.0f} MB"
    )


def _policy_lines(case: dict[str, Any]) -> list[str]:
    rows = [
        f"{name:20} {speed['accesses_per_s'] / 1e6:17.3f} {speed['of_lru']:7.2f}"
        for name, speed in case["policies"].items()
    ]
    head = f"{'policy':20} {'M accesses/s':>17} {'of lru':>7}"
    return [head, *rows, f"slowest: {case['slowest']}, own time by function", *case["profile"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
