"""Make docs/policies.md: every policy on the given traces, and the papers' ratios beside ours.

    make policies TRACES="sample DIR ..." [QUALITY="FILE ..."]

Sweeps are kept in out/policies: broken off, the same command goes on. What a trace has no columns
for is named in the page; a section whose trace is absent says so. Wall-clock goes to stderr, the
page has none. QUALITY: what `moesim quality --json` wrote for swapmoe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from configs.hardware import load_hardware
from sim.compare import COLUMNS, LEGEND, cells, compare, link_words, resident_words
from sim.plots_rankings import draw_rankings
from sim.ranking import tied_labels
from sim.selection import RESIDENT, link_name, prepare
from sim.wording import as_percent, three_figures
from tests.bench.results_papers import papers
from tests.bench.results_sweeps import MACHINE, NO_CACHE, Frames, Source, open_source, run_all
from tests.bench.results_tables import by_budget, geometric_mean, markdown, ms, uses_cpu

RECORD = """\
`sample` is shipped. The other traces of this page are made so (prompts of your own will do):

    moesim trace --model qwen2moe-twin --prompts prompts.jsonl --limit 240 --batch-size 24 \\
      --max-new-tokens 112 --sample 0.8,0.95,0 --record hidden,lookahead=2,timings --device cuda \\
      --ignore-eos --out traces/full
    moesim train-predictor --trace traces/full --stride 2 --device cuda
    moesim subset traces/full --requests 0-39 --drop gate_inputs --out traces/qwen2moe-twin
    moesim import npz gpt-oss-20b-decode.npz --model gpt-oss-20b --out traces/archive
    moesim subset traces/archive --requests 10,73,115,136,157,178,199 --out traces/gpt-oss-20b

The archive is that of AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting: decoding alone, without gate
probabilities or embeddings. Of its 213 requests (64,794 tokens) seven, of GPQA and MMLU, remain."""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    sources = [open_source(path) for path in given.trace]
    results = run_all(sources, given.work, given.jobs)
    qualities = [json.loads(path.read_text(encoding="utf-8")) for path in given.quality]
    write(sources, results, qualities, given.page, given.images)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", action="append", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/policies"))
    parser.add_argument("--page", type=Path, default=Path("docs/policies.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/img"))
    parser.add_argument("--quality", type=Path, action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    return parser


def write(
    sources: Sequence[Source],
    results: dict[str, Frames],
    qualities: Sequence[dict[str, Any]],
    page: Path,
    images: Path,
) -> None:
    """The page and its figures, in place of those that are there."""
    grids = {model: whole_grid(frames) for model, frames in results.items()}
    parts = [
        _head(sources, grids),
        *(_section(source, grids[source.model], images, page) for source in sources),
        _hits_up(grids),
        _machines(results),
        papers(results, qualities),
    ]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def whole_grid(frames: Frames) -> pd.DataFrame:
    """Caching policies at all budgets and those without a cache at one, each label once."""
    streams = frames["streams"]
    return pd.concat([frames["grid"], streams[streams["policy"].isin(NO_CACHE)]], ignore_index=True)


# ---------------------------------------------------------------------- head


def _head(sources: Sequence[Source], grids: dict[str, pd.DataFrame]) -> str:
    cpu = load_hardware(MACHINE).cpu_bytes_per_s / 1e9
    return "\n\n".join(
        [
            "# Policies compared",
            "Every policy on the same requests, at six budgets over three links: what PCIe 3, 4 "
            "and 5 x16 achieve, 12, 24 and 50 GB/s. The machine is `rtx4090-pcie4` with that link; "
            "the other machines follow below. **All times are simulated and estimated, not "
            "validated**; hits and bytes of policies that ask no time are exact. What computes "
            f"misses on the CPU rests on a rate of {cpu:g} GB/s there, an estimate. Made by",
            f'    make policies TRACES="{" ".join(map(_public_name, sources))}"',
            _trace_table(sources, grids),
            RECORD,
        ]
    )


def _public_name(source: Source) -> str:
    return source.path if source.path == "sample" else f"traces/{source.model}"


def _trace_table(sources: Sequence[Source], grids: dict[str, pd.DataFrame]) -> str:
    rows = []
    for source in sources:
        grid = grids[source.model]
        row = grid[grid["status"] == "ok"].iloc[0]
        optional = [name for name in source.trace.columns() if name not in _ALWAYS]
        rows.append(
            [
                source.model,
                source.timed.name,
                f"{row['trace.judged_requests']:.0f} + {row['trace.fitted_requests']:.0f}",
                f"{row['tokens.prefill']:.0f} + {row['tokens.decode']:.0f}",
                str(source.trace.manifest.recording.sampling.get("batch_size", 1)),
                ", ".join(optional) or "none",
            ]
        )
    head = ("routing of", "times", "requests judged + set aside", "tokens judged: prefill + decode")
    return markdown((*head, "batch", "optional columns"), rows)


_ALWAYS = ("request", "step", "row", "phase", "position", "token_id", "experts", "weights")


# ---------------------------------------------------------------------- a trace


def _section(source: Source, grid: pd.DataFrame, images: Path, page: Path) -> str:
    comparison = compare(grid)
    points = prepare(grid)
    figure = _figure(grid, source.model, images)
    middle = next(table for table in comparison.tables if _is_middle(table))
    parts = [
        f"## Routing of {source.model}, times of {source.timed.name}",
        f"![Places by budget and link]({figure.relative_to(page.parent)})",
        "### Fastest by budget and link\n\nFirst line: of all causal, lossless policies; second: "
        "of those that keep the CPU out of it (=: within 2 %); third: the fastest bound, which "
        "does so too.",
        _winners(points),
        "### Over all budgets and links\n\nTPOT over that of the fastest causal, lossless policy "
        "at each budget and link.",
        _overall(points),
        *_matrices(points),
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


def _is_middle(table: Any) -> bool:
    return table.budget == "25 %" and table.link_bytes_per_s == 24_000_000_000


def _figure(grid: pd.DataFrame, model: str, images: Path) -> Path:
    target = images / f"policies-{model}.png"
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw_rankings(grid, scratch, target.stem)
        images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(path for path in drawn if path.suffix == ".png"), target)
    return target


def _winners(points: pd.DataFrame) -> str:
    links = sorted(points["link_bytes_per_s"].unique())
    rows = []
    for budget, at_budget in by_budget(points):
        groups = [at_budget[at_budget["link_bytes_per_s"] == link] for link in links]
        rows.append([budget, *(_winner_cell(group) for group in groups)])
    return markdown(("budget", *map(link_words, links)), rows)


def _winner_cell(group: pd.DataFrame) -> str:
    causal = group[group["kind"] == "causal"].sort_values(["tpot_ms.mean", "label"])
    gpu_only = causal[~uses_cpu(causal)]
    bounds = group[group["kind"] == "bound"].sort_values(["tpot_ms.mean", "label"])
    return "<br>".join([f"**{_fastest(causal)}**", _fastest(gpu_only), f"bound {_least(bounds)}"])


def _least(sorted_points: pd.DataFrame) -> str:
    return "-" if sorted_points.empty else ms(sorted_points["tpot_ms.mean"].iloc[0])


def _fastest(sorted_points: pd.DataFrame) -> str:
    """Up to three that tie, and the least TPOT."""
    tied = sorted_points[sorted_points["label"].isin(tied_labels(sorted_points))]["label"]
    return f"{' = '.join(tied[:3])} {_least(sorted_points)}"


def _overall(points: pd.DataFrame) -> str:
    causal = points[(points["kind"] == "causal") & (points["policy"] != RESIDENT)]
    causal = causal[~causal["label"].isin(NO_CACHE)]
    best = causal.groupby(["system", "expert_budget_bytes"])["tpot_ms.mean"].transform("min")
    ratio = causal["tpot_ms.mean"] / best
    rows = []
    for label, own in ratio.groupby(causal["label"]):
        first = int((own <= 1.02).sum())
        rows.append((geometric_mean(own), str(label), own.max(), first, len(own)))
    return markdown(
        ("policy", "geometric mean", "worst", "first or within 2 %"),
        [
            [label, f"{mean:.2f}", f"{worst:.2f}", f"{first} of {count}"]
            for mean, label, worst, first, count in sorted(rows)
        ],
    )


def _matrices(points: pd.DataFrame) -> list[str]:
    parts = []
    for link in sorted(points["link_bytes_per_s"].unique()):
        own = points[points["link_bytes_per_s"] == link]
        parts.append(f"### TPOT in ms (decode hits in %): {link_words(link)}")
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
        key = (order[kind], label in NO_CACHE, geometric_mean(own["tpot_ms.mean"]))
        found.append((key, [str(label), kind, *row]))
    resident = points[points["policy"] == RESIDENT]["tpot_ms.mean"]
    lines = [row for _, row in sorted(found)]
    if not resident.empty:
        lines.append([RESIDENT, "causal", f"{ms(resident.iloc[0])} at 100 %", *[""] * 5])
    return markdown(("policy", "kind", *(budget for budget, _ in budgets)), lines)


def _entry(group: pd.DataFrame, label: str) -> str:
    own = group[group["label"] == label]
    if own.empty:
        return "same" if label in NO_CACHE else "-"
    row = own.iloc[0]
    return f"{three_figures(row['tpot_ms.mean'])} ({_whole_percent(row['decode.hit_rate'])})"


def _whole_percent(share: Any) -> str:
    return f"{float(share) * 100:.0f}"


# ---------------------------------------------------------------------- hits and time


def _hits_up(grids: dict[str, pd.DataFrame]) -> str:
    head = (
        "## Hit rate up, time flat or worse\n\nPairs of causal, lossless policies that keep the "
        "CPU out of it, at one budget and link: the first hits at least three points more and is "
        "no faster."
    )
    rows, total, worse = [], 0, 0
    for model, grid in grids.items():
        pairs, count = _contrary(prepare(grid))
        total, worse = total + count, worse + len(pairs)
        rows += [[model, *row] for row in pairs.head(4).drop(columns="gain").to_numpy().tolist()]
    names = ("routing of", "budget, link", "more hits", "fewer hits", "hits %", "TPOT ms")
    share = f"{100 * worse / max(1, total):.0f} %"
    return "\n\n".join(
        [
            head,
            f"{worse} of {total} pairs whose hit rates are that far apart ({share}). The widest of "
            "each trace, each pair of policies once:",
            markdown(names, rows),
            "Late prefetches count as no hit though they hide a part of the copy; and a hit that a "
            "prefetch brought cost the link as much as a miss.",
        ]
    )


def _contrary(points: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    causal = points[(points["kind"] == "causal") & (points["policy"] != RESIDENT)]
    causal = causal[~uses_cpu(causal)]
    found: list[dict[str, Any]] = []
    count = 0
    for (_, _), group in causal.groupby(["system", "expert_budget_bytes"], sort=False):
        records = group.to_dict("records")
        for one in records:
            for other in records:
                gain = one["decode.hit_rate"] - other["decode.hit_rate"]
                if gain < 0.03:
                    continue
                count += 1
                if one["tpot_ms.mean"] >= other["tpot_ms.mean"]:
                    found.append(_pair(one, other, gain))
    if not found:
        return pd.DataFrame(columns=["gain"]), count
    frame = pd.DataFrame(found).sort_values("gain", ascending=False, kind="stable")
    once = frame.drop_duplicates(["one", "other"])
    rest = frame.drop(once.index)
    return pd.concat([once, rest]), count


def _pair(one: dict[Any, Any], other: dict[Any, Any], gain: float) -> dict[str, Any]:
    hits = (as_percent(each["decode.hit_rate"]) for each in (one, other))
    times = (three_figures(each["tpot_ms.mean"]) for each in (one, other))
    return {
        "where": f"{one['budget']}, {link_words(one['link_bytes_per_s'])}",
        "one": one["label"],
        "other": other["label"],
        "hits": " against ".join(hits),
        "times": " against ".join(times),
        "gain": gain,
    }


# ---------------------------------------------------------------------- machines


def _machines(results: dict[str, Frames]) -> str:
    title = "## Machines"
    found = [
        (model, frames["machines"]) for model, frames in results.items() if "machines" in frames
    ]
    if not found:
        return f"{title}\n\nNot swept."
    model, frame = found[0]
    points = prepare(frame)
    machines = list(dict.fromkeys(points["hardware"]))
    rows = []
    contested = points[points["policy"] != RESIDENT]
    for label, own in contested.groupby("label"):
        times = own.set_index("hardware")["tpot_ms.mean"]
        fastest = geometric_mean(times)
        rows.append(
            (fastest, [str(label), str(own["kind"].iloc[0]), *(ms(times[m]) for m in machines)])
        )
    resident = points[points["policy"] == RESIDENT].set_index("hardware")
    last = [ms(resident.loc[m, "tpot_ms.mean"]) + _misfit(resident.loc[m]) for m in machines]
    links = points.drop_duplicates("hardware").set_index("hardware")["link_bytes_per_s"]
    names = [f"{m}, {link_name(links[m])}" for m in machines]
    table = [row for _, row in sorted(rows, key=lambda each: (each[0], each[1]))]
    return "\n\n".join(
        [
            title,
            f"TPOT in ms, each machine over its own link, a quarter of the experts on the GPU; "
            f"routing of {model}. A dagger: more than the GPU's memory.",
            markdown(("policy", "kind", *names), [*table, [RESIDENT, "causal", *last]]),
        ]
    )


def _misfit(row: Any) -> str:
    return "" if row["memory.fits"] else " †"


if __name__ == "__main__":
    main()
