"""Parts of docs/policies.md over all traces: hits and time, fitting, the CPU's rate, machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sim.compare import link_words
from sim.selection import RESIDENT, link_name, prepare
from sim.wording import as_percent, three_figures
from tests.bench.results_sweeps import CPU_POLICIES, FITTED, MIDDLE_LINK, Frames
from tests.bench.results_tables import TIME, causal, geometric_mean, markdown, ms, spaced

# ---------------------------------------------------------------------- hits and time

_MORE_HITS = 0.03


def hits_up(grids: dict[str, pd.DataFrame]) -> str:
    """Pairs of policies of which the one that hits more is no faster."""
    rows: list[list[str]] = []
    counts = []
    for model, grid in grids.items():
        pairs, count = contrary(prepare(grid))
        counts.append(_count_words(model, pairs, count))
        once = pairs.drop_duplicates(["one", "other"]).head(5)
        rows += [[model, *row] for row in once[list(_SHOWN)].to_numpy().tolist()]
    names = ("routing of", "budget, link", "more hits", "fewer hits", "hits %", "ms a token")
    return "\n\n".join(
        [
            "## Hit rate up, time flat or worse",
            "Pairs of causal, lossless policies that never use the CPU, at one budget and link: "
            "the first hits at least three points more and is no faster. Hits and time are means "
            "over the same accesses and tokens.",
            " ".join(counts),
            "The widest of each trace, each pair of policies once:",
            markdown((*names, "late %", "MB a token"), rows),
        ]
    )


def _count_words(model: str, pairs: pd.DataFrame, total: int) -> str:
    share = 100 * len(pairs) / max(1, total)
    words = (
        f"{model}: {len(pairs)} of {total} pairs whose hit rates are that far apart ({share:.1f} %)"
    )
    if pairs.empty:
        return f"{words}."
    return (
        f"{words}; in {pairs['more_bytes'].sum()} of them the policy with more hits copies more "
        f"bytes, in {pairs['other_late'].sum()} more accesses of the other are late: no hits, but "
        "a part of the copy is hidden."
    )


_SHOWN = ("where", "one", "other", "hits", "times", "late", "bytes")


def contrary(points: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Those pairs, widest first, and of how many."""
    own = causal(points, cpu=False)
    found: list[dict[str, Any]] = []
    count = 0
    for _, group in own.groupby(["system", "expert_budget_bytes"], sort=False):
        records = group.to_dict("records")
        for one in records:
            for other in records:
                gain = one["decode.hit_rate"] - other["decode.hit_rate"]
                if gain < _MORE_HITS:
                    continue
                count += 1
                if one[TIME] >= other[TIME]:
                    found.append(_pair(one, other, gain))
    frame = pd.DataFrame(found, columns=["gain", "more_bytes", "other_late", *_SHOWN])
    return frame.sort_values("gain", ascending=False, kind="stable"), count


def _pair(one: dict[Any, Any], other: dict[Any, Any], gain: float) -> dict[str, Any]:
    pair = (one, other)
    late = [each["decode.late"] / each["decode.accesses"] for each in pair]
    copied = [each["h2d_bytes_per_token"] / 1e6 for each in pair]
    return {
        "gain": gain,
        "more_bytes": copied[0] > copied[1],
        "other_late": late[1] > late[0],
        "where": f"{one['budget']}, {link_words(one['link_bytes_per_s'])}",
        "one": one["label"],
        "other": other["label"],
        "hits": " against ".join(as_percent(each["decode.hit_rate"]) for each in pair),
        "times": " against ".join(three_figures(each[TIME]) for each in pair),
        "late": " against ".join(map(as_percent, late)),
        "bytes": " against ".join(map(three_figures, copied)),
    }


# ---------------------------------------------------------------------- fitting


def fitting(results: dict[str, Frames]) -> str:
    """What fitted policies gain from more requests."""
    title = "## How much fitted policies have to learn from"
    found = {model: by_requests(frames) for model, frames in results.items()}
    found = {model: sweeps for model, sweeps in found.items() if len(sweeps) > 1}
    if not found:
        return f"{title}\n\nNot swept: no trace here has requests enough."
    return "\n\n".join([title, *(_fits(*each) for each in found.items())])


def by_requests(frames: Frames) -> list[pd.DataFrame]:
    """25 % of the experts over the middle link, by how many requests were set aside."""
    grid = frames["grid"]
    here = (grid["point.expert_budget"] == "25%") & (grid["point.link"] == MIDDLE_LINK)
    fewer = [frame for name, frame in frames.items() if name.startswith("fits-")]
    return sorted([*fewer, grid[here]], key=lambda frame: frame["trace.fitted_requests"].max())


def _fits(model: str, sweeps: Sequence[pd.DataFrame]) -> str:
    control = {float(_of(frame, "lru")[TIME]) for frame in sweeps}
    if len(control) > 1:
        raise ValueError(f"lru learns nothing and yet differs: {control}; were others judged?")
    rows = [
        [label, *(f"{ms(own[TIME])} ({_hits(own)})" for own in (_of(f, label) for f in sweeps))]
        for label in (*FITTED, "lru")
    ]
    counts = [f"{frame['trace.fitted_requests'].max():.0f} requests" for frame in sweeps]
    judged = sweeps[0]["trace.judged_requests"].max()
    words = (
        f"Routing of {model}, 25 % of the experts, {spaced_link()}: ms a token (decode hits in %) "
        f"on the same {judged:.0f} requests, by how many others were set aside to learn from."
    )
    return f"{words}\n\n{markdown(('policy', *counts), rows)}"


def worth_of_requests(results: dict[str, Frames], label: str) -> str:
    """What a fitted policy gains from more requests, in words; empty where that was not swept."""
    for model, frames in results.items():
        sweeps = by_requests(frames)
        if len(sweeps) == 1:
            continue
        each = ", ".join(
            f"{ms(_of(frame, label)[TIME])} ms after {frame['trace.fitted_requests'].max():.0f}"
            for frame in sweeps
        )
        return f"on {model}, {each} requests"
    return ""


def spaced_link() -> str:
    return MIDDLE_LINK.replace("GB", " GB")


def _of(frame: pd.DataFrame, label: str) -> Any:
    return frame[frame["label"] == label].iloc[0]


def _hits(row: Any) -> str:
    return f"{100 * float(row['decode.hit_rate']):.0f}"


# ---------------------------------------------------------------------- the CPU's rate


def cpu_rate(results: dict[str, Frames], grids: dict[str, pd.DataFrame]) -> str:
    """From which rate on computing misses on the CPU pays."""
    title = "## The CPU's rate"
    found = [(model, frames) for model, frames in results.items() if "cpu-rates" in frames]
    if not found:
        return f"{title}\n\nNot swept."
    model, frames = found[0]
    rows = []
    for budget in ("25%", "50%"):
        best = best_without_cpu(grids[model], spaced(budget))
        for label in CPU_POLICIES:
            own = rates_of(frames["cpu-rates"], label, budget)
            cells = [f"{ms(each)}{'' if each < best[TIME] else ' *'}" for each in own.to_list()]
            rows.append([spaced(budget), label, *cells])
        same = [ms(best[TIME])] * (len(rows[0]) - 2)  # whatever the CPU's rate
        rows.append([spaced(budget), f"without the CPU: {best['label']}", *same])
    rates = rates_of(frames["cpu-rates"], CPU_POLICIES[0], "25%").index
    names = [f"{rate:g} GB/s" for rate in rates]
    return "\n\n".join(
        [
            title,
            f"Routing of {model}, {spaced_link()}: ms a token by the rate at which the CPU reads "
            "the experts that it computes. *: no faster than the best policy without it.",
            markdown(("budget", "policy", *names), rows),
        ]
    )


def best_without_cpu(grid: pd.DataFrame, budget: str) -> Any:
    """The fastest policy that never uses the CPU, over the middle link."""
    points = prepare(grid)
    own = causal(points, cpu=False)
    here = own[(own["budget"] == budget) & (own["link_bytes_per_s"] == 24_000_000_000)]
    return here.sort_values([TIME, "label"]).iloc[0]


def rates_of(frame: pd.DataFrame, label: str, budget: str) -> pd.Series[float]:
    """ms a token by the CPU's rate in GB/s."""
    own = frame[(frame["label"] == label) & (frame["point.expert_budget"] == budget)]
    rates = own["hardware"].str.rpartition("-cpu-")[2].astype(float)
    return own.assign(rate=rates).set_index("rate")[TIME].sort_index()


# ---------------------------------------------------------------------- machines


def machines(results: dict[str, Frames]) -> str:
    """Every policy on every machine."""
    title = "## Machines"
    found = [(model, frames) for model, frames in results.items() if "machines" in frames]
    if not found:
        return f"{title}\n\nNot swept."
    model, frames = found[0]
    points = prepare(frames["machines"])
    names = list(dict.fromkeys(points["hardware"]))
    rows = []
    for label, own in points[points["policy"] != RESIDENT].groupby("label"):
        by_name = own.set_index("hardware")[TIME]
        cells = [ms(by_name[name]) for name in names]
        rows.append((geometric_mean(by_name), [str(label), str(own["kind"].iloc[0]), *cells]))
    resident = points[points["policy"] == RESIDENT].set_index("hardware")
    last = [ms(resident.loc[name, TIME]) + _misfit(resident.loc[name]) for name in names]
    links = points.drop_duplicates("hardware").set_index("hardware")["link_bytes_per_s"]
    heads = [f"{name}, {link_name(links[name])}" for name in names]
    table = [row for _, row in sorted(rows, key=lambda each: (each[0], each[1]))]
    return "\n\n".join(
        [
            title,
            f"ms a token, each machine over its own link, a quarter of the experts on the GPU; "
            f"routing of {model}. A dagger: more than the GPU's memory. What lossy policies lose "
            "stands above.",
            markdown(("policy", "kind", *heads), [*table, [RESIDENT, "causal", *last]]),
        ]
    )


def _misfit(row: Any) -> str:
    return "" if row["memory.fits"] else " †"
