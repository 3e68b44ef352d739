"""A trace's part of docs/policies.md: who is first, by how much, and what lossy policies lose."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sim.compare import COLUMNS, LEGEND, Table, cells, compare, link_words, resident_words
from sim.plots_rankings import draw_rankings
from sim.ranking import tied_labels
from sim.selection import RESIDENT, prepare
from sim.wording import as_percent, three_figures
from tests.bench.results_source import Source
from tests.bench.results_sweeps import NO_CACHE
from tests.bench.results_tables import (
    TIME,
    by_budget,
    causal,
    cpu_labels,
    geometric_mean,
    markdown,
    ms,
    times,
)

Quality = dict[str, Any]
_MIDDLE_BUDGET, _MIDDLE_LINK = "25 %", 24_000_000_000


def section(
    source: Source, grid: pd.DataFrame, images: Path, page: Path, qualities: Sequence[Quality]
) -> str:
    """All of a trace, with its figure."""
    comparison = compare(grid)
    points = prepare(grid)
    figure = _figure(grid, source.model, images)
    cpu = cpu_labels(points)
    gpu_only = _figure(grid[~grid["label"].isin(cpu)], f"{source.model}-gpu", images)
    middle = next(table for table in comparison.tables if _is_middle(table))
    parts = [
        f"## Routing of {source.model}, times of {source.timed.name}",
        f"![Places by budget and link]({figure.relative_to(page.parent)})",
        "### Fastest by budget and link\n\nFirst line: of all causal, lossless policies; second: "
        "of those that never use the CPU (=: within 2 %); third: the fastest bound, which "
        "does not either.",
        _winners(points),
        "### Over all budgets and links",
        "Time a token over that of the fastest, of all causal, lossless policies:",
        overall_table(points, cpu=True),
        "Of those that never use the CPU, whose rate is an estimate:",
        overall_table(points, cpu=False),
        f"![Places without the CPU]({gpu_only.relative_to(page.parent)})",
        "### Times and hits\n\nLossy rows compute something else than the model: what they lose "
        "stands below.",
        *_matrices(points),
        *_lossy(points, qualities),
        f"### In full: {middle.title}",
        markdown(COLUMNS, [cells(row) for row in middle.rows]),
        "; ".join(filter(None, [resident_words(middle), *LEGEND])) + ".",
    ]
    if comparison.not_runnable:
        parts.append("Not runnable on this trace:")
        parts.append("\n".join(f"- {each}" for each in comparison.not_runnable))
    if comparison.failed:
        parts.append("Failed at some budgets:")
        parts.append("\n".join(f"- {each}" for each in comparison.failed))
    return "\n\n".join(parts)


def _is_middle(table: Table) -> bool:
    return table.budget == _MIDDLE_BUDGET and table.link_bytes_per_s == _MIDDLE_LINK


def _figure(grid: pd.DataFrame, model: str, images: Path) -> Path:
    target = images / f"policies-{model}.png"
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw_rankings(grid, scratch, target.stem)
        images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(path for path in drawn if path.suffix == ".png"), target)
    return target


# ---------------------------------------------------------------------- who is first


def _winners(points: pd.DataFrame) -> str:
    links = sorted(points["link_bytes_per_s"].unique())
    every, gpu_only = causal(points, cpu=True), causal(points, cpu=False)
    bounds = points[points["kind"] == "bound"]
    rows = []
    for budget, at_budget in by_budget(points):
        row = [budget]
        for link in links:
            here = at_budget.index[at_budget["link_bytes_per_s"] == link]
            first, second, third = (
                each.loc[each.index.intersection(here)] for each in (every, gpu_only, bounds)
            )
            row.append(f"**{_fastest(first)}**<br>{_fastest(second)}<br>bound {_least(third)}")
        rows.append(row)
    return markdown(("budget", *map(link_words, links)), rows)


def _least(points: pd.DataFrame) -> str:
    return "-" if points.empty else ms(points[TIME].min())


def _fastest(points: pd.DataFrame) -> str:
    """Up to three that tie, fastest first, and the least time."""
    tied = points[points["label"].isin(tied_labels(points))].sort_values([TIME, "label"])
    return f"{' = '.join(tied['label'].iloc[:3])} {_least(points)}"


def ratios(points: pd.DataFrame, *, cpu: bool) -> pd.DataFrame:
    """Causal policies with a cache, and ``ratio``: time over the fastest's at budget and link."""
    own = causal(points, cpu=cpu)
    own = own[~own["label"].isin(NO_CACHE)]
    best = own.groupby(["system", "expert_budget_bytes"])[TIME].transform("min")
    return own[["label", "system", "budget", "link_bytes_per_s", TIME]].assign(
        ratio=own[TIME] / best
    )


def overall(points: pd.DataFrame, *, cpu: bool) -> list[tuple[float, str, float, int, int]]:
    """Geometric mean, label, worst, how often first or within 2 %, and of how many; best first."""
    found = []
    for label, own in ratios(points, cpu=cpu).groupby("label"):
        ratio = own["ratio"]
        first = int((ratio <= 1.02).sum())
        found.append((geometric_mean(ratio), str(label), float(ratio.max()), first, len(own)))
    return sorted(found)


def overall_table(points: pd.DataFrame, *, cpu: bool) -> str:
    return markdown(
        ("policy", "geometric mean", "worst", "first or within 2 %"),
        [
            [label, f"{mean:.2f}", f"{worst:.2f}", f"{first} of {count}"]
            for mean, label, worst, first, count in overall(points, cpu=cpu)
        ],
    )


# ---------------------------------------------------------------------- all times


def _matrices(points: pd.DataFrame) -> list[str]:
    parts = []
    for link in sorted(points["link_bytes_per_s"].unique()):
        own = points[points["link_bytes_per_s"] == link]
        parts.append(f"ms a token (decode hits in %), {link_words(link)}:")
        parts.append(_matrix(own))
    return parts


def _matrix(points: pd.DataFrame) -> str:
    contested = points[points["policy"] != RESIDENT]
    budgets = list(by_budget(contested))
    order = {"causal": 0, "lossy": 1, "what-if": 2, "bound": 3}
    found = []
    for label, own in contested.groupby("label"):
        row = [_entry(group, str(label)) for _, group in budgets]
        kind = str(own["kind"].iloc[0])
        key = (order[kind], label in NO_CACHE, geometric_mean(own[TIME]))
        found.append((key, [str(label), kind, *row]))
    resident = points[points["policy"] == RESIDENT][TIME]
    lines = [row for _, row in sorted(found)]
    if not resident.empty:
        empty = [""] * (len(budgets) - 1)
        lines.append([RESIDENT, "causal", f"{ms(resident.iloc[0])} at 100 %", *empty])
    return markdown(("policy", "kind", *(budget for budget, _ in budgets)), lines)


def _entry(group: pd.DataFrame, label: str) -> str:
    own = group[group["label"] == label]
    if own.empty:
        return "same" if label in NO_CACHE else "-"
    row = own.iloc[0]
    return f"{three_figures(row[TIME])} ({100 * float(row['decode.hit_rate']):.0f})"


# ---------------------------------------------------------------------- lossy


def _lossy(points: pd.DataFrame, qualities: Sequence[Quality]) -> list[str]:
    """What lossy policies gain and lose, over the middle link."""
    here = points[points["link_bytes_per_s"] == _MIDDLE_LINK]
    own = here[here["kind"] == "lossy"]
    if own.empty:
        return []
    lossless = here[here["label"] == "lru"].set_index("expert_budget_bytes")[TIME]
    rows = []
    for _, row in own.sort_values(["label", "expert_budget_bytes"]).iterrows():
        lru = lossless[row["expert_budget_bytes"]]
        measured = quality_at(qualities, str(row["label"]), float(row["expert_share"]))
        rows.append(
            [
                str(row["label"]),
                str(row["budget"]),
                ms(row[TIME]),
                times(lru, row[TIME]),
                as_percent(row["quality.decode.retained_mass_share"]),
                as_percent(row["quality.decode.low_mass_share"]),
                as_percent(row["quality.decode.changed_share"]),
                *quality_cells(measured),
            ]
        )
    head = ("policy", "budget", "ms", "faster than lru", "gate weight kept %", "of it low-bit %")
    table = markdown((*head, "changed %", "perplexity", "next token as before %"), rows)
    words = (
        "Kept, low-bit: of the gate weight of decoded tokens; changed: of the experts asked for, "
        "skipped, replaced or at few bits, all as recorded routing tells."
    )
    return [
        f"### What lossy policies lose: {link_words(_MIDDLE_LINK)}",
        table,
        f"{words} {quality_words(qualities)}",
    ]


def quality_words(qualities: Sequence[Quality]) -> str:
    """How perplexity was measured."""
    if not qualities:
        return "Perplexity was not measured on this model for this page (`moesim quality --json`)."
    each = "; ".join(map(_measured_words, qualities))
    return (
        "Perplexity and next tokens are measured on the model itself by `moesim quality` on "
        f"held-out text: {each}. There copies land at once, here they take their time."
    )


def _measured_words(quality: Quality) -> str:
    step = "a token a step" if quality["chunk"] == 1 else f"{quality['chunk']} tokens a step"
    unmodified = quality["unmodified"]["perplexity"]
    return f"{quality['policy']} {quality['tokens']:,} tokens, {step}, unmodified {unmodified:.1f}"


def quality_at(qualities: Sequence[Quality], policy: str, share: float) -> Quality | None:
    """What was measured at a share of the experts."""
    for quality in qualities:
        whole = quality["unmodified"]["expert_bytes"]
        for each in quality["budgets"]:
            near = abs(each["expert_budget_bytes"] / whole - share) < 1e-3
            if quality["policy"] == policy and near:
                return {**each, "unmodified": quality["unmodified"]["perplexity"]}
    return None


def quality_cells(measured: Quality | None) -> list[str]:
    if measured is None:
        return ["not measured", "not measured"]
    rise = 100 * (measured["perplexity"] / measured["unmodified"] - 1)
    agreement = as_percent(measured["next_token_agreement"])
    return [f"{measured['perplexity']:.1f} ({rise:+.1f} %)", agreement]
