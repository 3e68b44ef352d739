"""Judge ``auto`` against every lossless causal policy, on requests that none of them learned from.

    python -m tests.bench.judge_auto TRACE GEOMETRY [--hardware NAME] [--fit-share 0.5] ...

A point is a budget and a link. Of each: the best of the others, and TPOT of ``auto`` over its; then
the geometric mean and the worst of these ratios, beside the same figures of every single policy
that could run at all points. A policy that cannot run is named with its reason. A table for people
on stdout, and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import exp, log
from typing import Any

import policies
from configs.errors import UserError
from policies.errors import PolicyError
from sim.inputs import Inputs
from sim.point import Point, PointRunner
from tracer.trace import Trace

BUDGETS = ("12.5%", "25%", "37.5%", "50%", "62.5%", "75%")
LINKS = ("12GB/s", "24GB/s", "50GB/s")
RIVALS = (
    "promoe",
    "finemoe",
    "moe-infinity",
    "mixtral-offloading",
    "fiddler",
    "hybrid-split",
    "edgemoe",
    "score-ema",
    "pregated",
    "layer-stream",
    "reuse-distance",
    "lru",
    "lru-global",
    "lfu",
    "lfu-decay",
    "lfru",
    "slru",
    "least-stale",
    "static",
    "next-gate",
)
JUDGED = "auto"

#: mean TPOT in ms, by (budget, link)
Times = dict[tuple[str, str], float]


def times_of(runner: PointRunner, policy: str, asked: argparse.Namespace) -> Times | str:
    """Mean TPOT of every point; a text where the policy cannot run on this trace."""
    times: Times = {}
    for budget in asked.budgets:
        for link in asked.links:
            point = Point(
                policy=policy,
                hardware=asked.hardware,
                geometry=asked.geometry,
                expert_budget=budget,
                link=link,
            )
            try:
                result = runner.run(point)
            except (PolicyError, UserError) as error:
                return f"{budget}, {link}: {error}"
            times[budget, link] = result["tpot_ms"]["mean"]
    return times


def summary(times: Times, best: Times) -> dict[str, float]:
    """Geometric mean and worst of the ratios to ``best``."""
    ratios = [times[point] / best[point] for point in best]
    return {"mean": exp(sum(map(log, ratios)) / len(ratios)), "worst": max(ratios)}


def judge(trace: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All policies at all points, and how ``auto`` compares."""
    learned = tuple(asked.learned)
    inputs = Inputs(Trace.open(trace), fit_share=asked.fit_share, learned=learned)
    runner = PointRunner(inputs)
    found: dict[str, Times] = {}
    failed: dict[str, str] = {}
    for policy in (JUDGED, *asked.rivals):
        times = times_of(runner, policy, asked)
        if isinstance(times, str):
            failed[policy] = times
        else:
            found[policy] = times
        print(f"{policy} done", file=sys.stderr)
    mine = found.pop(JUDGED)
    best = {point: min(times[point] for times in found.values()) for point in mine}
    by = {
        point: next(name for name, times in found.items() if times[point] == best[point])
        for point in mine
    }
    points = [
        {
            "budget": budget,
            "link": link,
            "auto_ms": mine[budget, link],
            "best_ms": best[budget, link],
            "best": by[budget, link],
            "ratio": mine[budget, link] / best[budget, link],
        }
        for budget, link in mine
    ]
    return {
        "trace": trace,
        "judged_requests": len(inputs.judged),
        "points": points,
        "auto": summary(mine, best),
        "others": {name: summary(times, best) for name, times in found.items()},
        "failed": failed,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table."""
    told = [f"{result['trace']}: {result['judged_requests']} requests judged"]
    told.append(f"{'budget':>8} {'link':>8} {'auto, ms':>9} {'best, ms':>9} {'ratio':>6}  best")
    told += [
        f"{point['budget']:>8} {point['link']:>8} {point['auto_ms']:9.3f} {point['best_ms']:9.3f} "
        f"{point['ratio']:6.3f}  {point['best']}"
        for point in result["points"]
    ]
    told.append(f"{'':18} {'mean':>6} {'worst':>6}  (TPOT over the best other's at each point)")
    everyone = {JUDGED: result["auto"], **result["others"]}
    ranked = sorted(everyone.items(), key=lambda item: item[1]["mean"])
    told += [f"{name:18} {of['mean']:6.3f} {of['worst']:6.3f}" for name, of in ranked]
    told += [f"{name}: not runnable: {why}" for name, why in result["failed"].items()]
    return told


def main(arguments: Sequence[str]) -> None:
    """Parse, judge, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.judge_auto")
    parser.add_argument("trace")
    parser.add_argument("geometry")
    parser.add_argument("--hardware", default="rtx4090-pcie4")
    parser.add_argument("--fit-share", type=float, default=0.5)
    parser.add_argument("--learned", nargs="*", default=[], help="learned columns to set aside for")
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--links", nargs="*", default=list(LINKS))
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=policies.names())
    asked = parser.parse_args(arguments)
    result = judge(asked.trace, asked)
    print("\n".join(lines(result)))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
