"""What a set of points says in all: errors beside targets, by component, by prompt.

Works on a report's rows, so that several reports can be read as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from replay.breakdown import COMPONENTS
from replay.validation.errors import HIDDEN_FROM
from replay.validation.judged import Figures

DEMAND, PREFETCH = "demand-only", "prefetching"


@dataclass(frozen=True)
class Target:
    """What was aimed at. ``limit``: of the median or the worst error without sign."""

    group: str
    figure: str
    statistic: str
    limit: float


TARGETS = (
    Target(DEMAND, "tpot_ms", "median", 0.02),
    Target(DEMAND, "tpot_ms", "worst", 0.05),
    Target(PREFETCH, "tpot_ms", "median", 0.03),
    Target(PREFETCH, "tpot_ms", "worst", 0.08),
    Target(DEMAND, "stall_ms", "median", 0.10),
    Target(PREFETCH, "stall_ms", "median", 0.10),
    Target(DEMAND, "ttft_ms", "median", 0.08),
    Target(PREFETCH, "ttft_ms", "median", 0.08),
    Target(DEMAND, "bytes", "worst", 0.0),
    Target(PREFETCH, "bytes", "worst", 0.02),
    Target(DEMAND, "memory_bytes", "worst", 0.03),
    Target(PREFETCH, "memory_bytes", "worst", 0.03),
)
LEAST_TAU, MOST_REGRET = 0.9, 0.02
_TITLES = {
    "tpot_ms": "TPOT",
    "stall_ms": "exposed stall",
    "ttft_ms": "TTFT",
    "bytes": "bytes copied",
    "memory_bytes": "peak memory",
}
_NAIVE = ("tpot_ms", "stall_ms")


def summary(rows: Sequence[Figures], ranks: Sequence[Figures]) -> Figures:
    """Median and worst errors without sign, apart for demand-only and prefetching policies."""
    told: Figures = {}
    for name, members in groups(rows):
        told[name] = {
            "points": len(members),
            "hidden": sum(row["link_hidden_share"] >= HIDDEN_FROM for row in members),
            **{figure: _spread_of(_judged(members, "figures", figure)) for figure in _TITLES},
            "naive": {figure: _spread_of(_judged(members, "naive", figure)) for figure in _NAIVE},
            "paired": _spread_of([{"error": row["paired"]["p50"]} for row in members]),
        }
    taus = [rank["tau"] for rank in ranks if rank["tau"] is not None]
    told["ranking"] = {
        "groups": len(ranks),
        "pairs": sum(rank["pairs"] for rank in ranks),
        "agreed": sum(rank["agreed"] for rank in ranks),
        "least_tau": min(taus) if taus else None,
        "most_regret": max((rank["regret"] for rank in ranks), default=None),
    }
    return told


def groups(rows: Sequence[Figures]) -> Iterator[tuple[str, list[Figures]]]:
    """Points of policies whose decisions ask no time, and of the others."""
    for name, free in ((DEMAND, True), (PREFETCH, False)):
        members = [row for row in rows if row["time_independent"] is free]
        if members:
            yield name, members


def _judged(rows: Sequence[Figures], whose: str, figure: str) -> list[Figures | None]:
    """``whose``: figures, the simulator's, or naive."""
    stall = figure == "stall_ms"
    return [row[whose][figure] for row in rows if row["stall_is_judged"] or not stall]


def _spread_of(found: Iterable[Figures | None]) -> Figures | None:
    errors = [each["error"] for each in found if each is not None]
    sizes = [abs(error) for error in errors if error is not None]
    if not sizes:
        return None
    return {"median": float(np.median(sizes)), "worst": max(sizes)}


def percent(found: Figures | None) -> str:
    """A figure's error, signed."""
    if found is None or found["error"] is None:
        return "-"
    return f"{found['error']:+.1%}"


def summary_lines(told: Figures) -> list[str]:
    """In Markdown: each target and what was found, then the ranking."""
    lines = ["## In short", "", "Errors without sign.", ""]
    lines += ["| | points | aim | found | naive | |", "| --- | --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        if target.group in told and told[target.group][target.figure] is not None:
            lines.append(_target_line(target, told[target.group]))
    lines += _ranking_lines(told["ranking"])
    for name in (DEMAND, PREFETCH):
        if name in told:
            lines += ["", *_group_lines(name, told[name])]
    return lines


def _target_line(target: Target, group: Figures) -> str:
    found = group[target.figure][target.statistic]
    naive = group["naive"].get(target.figure)
    cells = (
        f"{_TITLES[target.figure]}, {target.group}, {target.statistic}",
        str(group["points"]),
        f"{target.limit:.0%}",
        f"{found:.1%}",
        "" if naive is None else f"{naive[target.statistic]:.1%}",
        _verdict(found <= target.limit),
    )
    return f"| {' | '.join(cells)} |"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _ranking_lines(rank: Figures) -> list[str]:
    if not rank["groups"]:
        return []
    pairs, agreed, tau = rank["pairs"], rank["agreed"], rank["least_tau"]
    regret = rank["most_regret"]
    told = [("sign of pairs that differ", pairs, "all", str(agreed), agreed == pairs)]
    if tau is not None:
        told.append(("Kendall tau, least", rank["groups"], "0.9", f"{tau:.2f}", tau >= LEAST_TAU))
    aim, found = f"{MOST_REGRET:.0%}", f"{regret:.1%}"
    told.append(("regret, most", rank["groups"], aim, found, regret <= MOST_REGRET))
    return [
        f"| {what} | {points} | {aim} | {found} | | {_verdict(met)} |"
        for what, points, aim, found, met in told
    ]


def _group_lines(name: str, group: Figures) -> list[str]:
    stall, naive, paired = group["stall_ms"], group["naive"]["stall_ms"], group["paired"]
    told = f"Of {group['points']} {name} points, {group['hidden']} have at least "
    told += f"{HIDDEN_FROM:.0%} of the link's time hidden behind the device's work. "
    if stall and naive:
        ratio = stall["median"] / naive["median"]
        told += f"The stall's median error is {ratio:.2f} of the naive estimate's "
        told += f"({'' if ratio <= 0.5 else '**not** '}half or less). "
    told += f"A single decode step is off by {paired['median']:.1%} in the median point."
    return [told]


def errors_by_part(rows: Sequence[Figures]) -> list[str]:
    """Sections: errors of decode steps and of prefills by component, of prefills by prompt."""
    told = ["", "## Where the error comes from", ""]
    told += _component_lines(rows, "components_ms", "TPOT")
    timed = [row for row in rows if _has_prefill_parts(row)]
    if timed:
        told += ["", "## Where a prefill's error comes from", ""]
        told += _component_lines(timed, "prefill_components_ms", "a prefill")
    if any(row["prefill_ms"] for row in rows):
        told += ["", "## Prefills by prompt", "", *_prefill_lines(rows)]
    return told


def _has_prefill_parts(row: Figures) -> bool:
    """Older measurements, and traces without prefills, have none."""
    return any(row.get("prefill_components_ms", {}).values())


def _component_lines(rows: Sequence[Figures], parts: str, whole: str) -> list[str]:
    """By what the host did: mean time, and the mean and the worst error in parts of the whole.

    ``whole``: TPOT, or the time of a prefill, the sum of its parts.
    """
    titles = (
        "policies",
        "the host's",
        "measured, ms",
        "error, ms",
        f"of {whole}, mean",
        f"of {whole}, worst",
    )
    lines = [
        f"Mean over points; errors in percent of the point's {whole}, so that they add up.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * len(titles)}",
    ]
    for name, members in groups(rows):
        totals = np.array([_whole_ms(row, parts) for row in members])
        for component in COMPONENTS:
            found = [row[parts][component] for row in members]
            if not any(each and (each["measured"] or each["predicted"]) for each in found):
                continue
            gaps = np.array([each["predicted"] - each["measured"] for each in found])
            shares = gaps / totals
            worst = shares[np.argmax(np.abs(shares))]
            measured = np.mean([each["measured"] for each in found])
            lines.append(
                f"| {name} | {component.replace('_', ' ')} | {measured:.3f} | {gaps.mean():+.3f} | "
                f"{shares.mean():+.1%} | {worst:+.1%} |"
            )
    return lines


def _whole_ms(row: Figures, parts: str) -> float:
    if parts == "components_ms":
        return float(row["figures"]["tpot_ms"]["measured"])
    return float(sum(each["measured"] for each in row[parts].values() if each))


def _prefill_lines(rows: Sequence[Figures]) -> list[str]:
    """Errors of prefills by the prompt's tokens."""
    sizes = sorted({int(size) for row in rows for size in row["prefill_ms"]})
    lines = [
        "| policies | prompt, tokens | points | measured, ms | median error | worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, members in groups(rows):
        for size in sizes:
            found = [row["prefill_ms"].get(str(size)) for row in members]
            known = [each for each in found if each is not None]
            spread = _spread_of(known)
            if spread is None:
                continue
            times = [each["measured"] for each in known]
            lines.append(
                f"| {name} | {size} | {len(known)} | {min(times):.1f} to {max(times):.1f} | "
                f"{spread['median']:.1%} | {spread['worst']:.1%} |"
            )
    return lines
