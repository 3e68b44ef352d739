"""What to take away from docs/policies.md, in eight lines, computed from its own figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from sim.compare import link_words
from sim.selection import prepare
from tests.bench.results_causes import best_without_cpu, contrary, rates_of
from tests.bench.results_finemoe import PUBLISHED, verdict
from tests.bench.results_promoe import NEAR, PUBLISHED_DECODE, crossing, speedups
from tests.bench.results_source import Source
from tests.bench.results_swapmoe import MEMORY, loss_words, nearest_budget, resident
from tests.bench.results_sweeps import CPU_POLICIES, MACHINE, Frames
from tests.bench.results_tables import (
    TIME,
    TTFT,
    between,
    by_budget,
    causal,
    change,
    geometric_mean,
    spaced,
    value,
)
from tests.bench.results_trace import Quality, overall, quality_at, ratios


def take_away(
    sources: Sequence[Source],
    results: dict[str, Frames],
    grids: dict[str, pd.DataFrame],
    qualities: dict[str, list[Quality]],
) -> str:
    """Eight lines, numbered."""
    points = {model: prepare(grid) for model, grid in grids.items()}
    lines = [
        _best("With a CPU that computes misses", points, cpu=True) + _needed_rate(results, grids),
        _best("Without it", points, cpu=False),
        _flips(points),
        _room(points),
        _hits(points),
        _promoe(sources, results),
        _finemoe(sources, results),
        _swapmoe(sources, results, qualities),
    ]
    numbered = [f"{number}. {line}" for number, line in enumerate(lines, start=1)]
    return "\n".join(["## What to take away", "", *numbered])


def _best(title: str, points: dict[str, pd.DataFrame], *, cpu: bool) -> str:
    found = []
    for model, own in points.items():
        (mean, label, worst, first, count), second = overall(own, cpu=cpu)[:2]
        found.append(
            f"{label} on {model} (time over the fastest's {mean:.2f}, worst {worst:.2f}, first "
            f"or within 2 % at {first} of {count}; next {second[1]} {second[0]:.2f})"
        )
    return f"**{title}**, best over all budgets and links: {'; '.join(found)}."


def _needed_rate(results: dict[str, Frames], grids: dict[str, pd.DataFrame]) -> str:
    for model, frames in results.items():
        if "cpu-rates" not in frames:
            continue
        found = []
        for budget in ("25%", "50%"):
            best = best_without_cpu(grids[model], spaced(budget))[TIME]
            by_policy = [rates_of(frames["cpu-rates"], label, budget) for label in CPU_POLICIES]
            fastest = pd.concat(by_policy, axis=1).min(axis=1)
            enough = [float(str(rate)) for rate, own in fastest.items() if own < best]
            least = f"from {min(enough):g} GB/s" if enough else "at no rate swept"
            found.append(f"{least} at {spaced(budget)}")
        return f" On {model} the CPU pays {', '.join(found)} (24 GB/s link)."
    return ""


def _flips(points: dict[str, pd.DataFrame]) -> str:
    found = []
    for model, own in points.items():
        ranked = ratios(own[own["policy"] != "auto"], cpu=False)
        first = ranked[ranked["ratio"] == 1.0]
        counts = first["label"].value_counts()
        names = sorted(counts.index, key=lambda label: (-counts[label], label))
        each = ", ".join(f"{name} {counts[name]}" for name in names)
        found.append(f"{model}: {each}{_loser(ranked)}")
    return (
        "**Rankings flip** with budget and link (first places of published policies without the "
        f"CPU, and the furthest fall of one that is first elsewhere): {'; '.join(found)}."
    )


def _loser(ranked: pd.DataFrame) -> str:
    """Of those that are first somewhere, who is worst elsewhere, and where."""
    winners = set(ranked.loc[ranked["ratio"] == 1.0, "label"])
    row = ranked[ranked["label"].isin(winners)].sort_values("ratio").iloc[-1]
    if row["ratio"] <= 1.02:
        return ""
    where = f"{row['budget']}, {link_words(row['link_bytes_per_s'])}"
    return f" ({row['label']} is {row['ratio']:.2f} times the first's at {where})"


def _room(points: dict[str, pd.DataFrame]) -> str:
    found = []
    for model, own in points.items():
        gaps = []
        for _, group in by_budget(own):
            for _, here in group.groupby("link_bytes_per_s"):
                best = causal(own, cpu=False)
                best = best.loc[best.index.intersection(here.index), TIME].min()
                gaps.append(here.loc[here["kind"] == "bound", TIME].min() / best)
        found.append(f"{100 * (1 - geometric_mean(gaps)):.0f} % on {model}")
    return (
        "**Room**: the fastest bound would save, over the best policy without the CPU (geometric "
        f"mean): {', '.join(found)}."
    )


def _hits(points: dict[str, pd.DataFrame]) -> str:
    found = []
    for model, own in points.items():
        pairs, count = contrary(own)
        found.append(f"{len(pairs)} of {count} on {model}")
    return (
        "**Hit rate is not time**: of pairs that differ by three points of hit rate or more, the "
        f"one with more hits is no faster in {', '.join(found)}."
    )


def _with(name: str, sources: Sequence[Source], results: dict[str, Frames]) -> list[str]:
    return [source.model for source in sources if name in results[source.model]]


def _joined(models: Sequence[str], words: Callable[[str], str]) -> str:
    return "; ".join(f"{model}: {words(model)}" for model in models)


def _promoe(sources: Sequence[Source], results: dict[str, Frames]) -> str:
    models = _with("promoe", sources, results)
    if not models:
        return "**ProMoE**: not runnable."

    def words(model: str) -> str:
        found = speedups(results[model]["promoe"], TIME)
        prefill = speedups(results[model]["promoe"], TTFT)
        by_ratio = results[model]["promoe-ratios"]
        reached = ", ".join(f"{spaced(b)} {crossing(by_ratio, b)}" for b in ("25%", "50%"))
        state = "reproduced" if max(found) >= NEAR * PUBLISHED_DECODE else "not reproduced"
        return (
            f"{between(found)} at eager's pace, {state} ({reached}); "
            f"prefill (2.21x) {between(prefill)}"
        )

    return (
        f"**ProMoE**, 1.31x in decode over LRU in id order (within 5 %): {_joined(models, words)}."
    )


def _finemoe(sources: Sequence[Source], results: dict[str, Frames]) -> str:
    models = _with("finemoe", sources, results)
    if not models:
        return "**FineMoE**: not runnable."

    def words(model: str) -> str:
        frames = results[model]
        return ", ".join(
            f"{name.split(' (')[0]} {verdict(frames, label, published)}"
            for label, name, published, *_ in PUBLISHED
            if published
        )

    return (
        "**FineMoE**, change of time a token over all budgets and both paces, against: "
        f"{_joined(models, words)}."
    )


def _swapmoe(
    sources: Sequence[Source], results: dict[str, Frames], qualities: dict[str, list[Quality]]
) -> str:
    models = _with("swapmoe", sources, results)
    if not models:
        return "**SwapMoE**: not runnable."

    def words(model: str) -> str:
        frame = results[model]["swapmoe"]
        budget = nearest_budget(frame)
        memory, own = (value(frame, each, "swapmoe", budget, MACHINE) for each in (MEMORY, TIME))
        saved = change(memory, resident(frame, MEMORY, MACHINE))
        slower = change(own, resident(frame, TIME, MACHINE))
        return (
            f"memory {saved}, time a token {slower} (paper -67 and -50 %), but "
            f"{loss_words(qualities[model], budget)}{_hobbit(qualities[model])}"
        )

    return f"**Lossy**: SwapMoE: {_joined(models, words)}."


def _hobbit(qualities: Sequence[Quality]) -> str:
    own = quality_at([each for each in qualities if each["policy"] == "hobbit"], "hobbit", 0.25)
    if own is None:
        return ""
    rise = 100 * (own["perplexity"] / own["unmodified"] - 1)
    return f"; hobbit at 25 %: perplexity {rise:+.1f} %"
