"""ProMoE's published ratios beside ours, and the ratio of link to compute that they hang on."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from configs.geometry import list_models, load_geometry
from tests.bench.results_source import Source
from tests.bench.results_sweeps import MACHINE, Frames
from tests.bench.results_tables import (
    TIME,
    TTFT,
    between,
    markdown,
    ms,
    spaced,
    times,
    value,
)
from tests.bench.results_variants import eager_ms, link_to_compute, token_bytes

LRU_BY_ID, LRU_CACHED_FIRST = "lru order=id", "lru"
PUBLISHED_DECODE, PUBLISHED_PREFILL = 1.31, 2.21
ABLATION = (
    (LRU_BY_ID, "LRU, experts in the order of ids"),
    ("promoe order=id preempt=False prefetch=False", "in three chunks"),
    ("promoe order=id preempt=False", "+ prefetch"),
    ("promoe order=id", "+ early preemption"),
    ("promoe", "+ cached first: ProMoE"),
    (LRU_CACHED_FIRST, "LRU, cached first"),
)
PROXY = "next-gate chunks=3"
NEAR = 0.95
"""Share of a published speed-up from which on it counts as reproduced."""

_COLLISIONS = "collision_misses"
_LIMITS_GB = (6, 12, 24, 48, 96)
_USED_BY = {
    "deepseek-v2-lite": "ProMoE (its DeepSeek-MoE has as many experts)",
    "mixtral-8x7b": "FineMoE",
    "phi-3.5-moe": "FineMoE",
    "qwen1.5-moe-a2.7b": "FineMoE",
}


# ---------------------------------------------------------------------- link and compute


def ratios(sources: Sequence[Source]) -> str:
    """Link over compute and residency of the public models, and ours."""
    rows = []
    for name in sorted(list_models()):
        geometry = load_geometry(name)
        step_ms, measured = eager_ms(geometry)
        copying_ms = token_bytes(geometry) / 24e9 * 1e3
        shares = [limit * 1e9 / geometry.expert_bytes_total for limit in _LIMITS_GB]
        rows.append(
            [
                name,
                _USED_BY.get(name, ""),
                f"{geometry.expert_bytes_total / 2**30:.1f}",
                ms(copying_ms),
                f"{ms(step_ms)}{'' if measured else ' (by layers)'}",
                f"{copying_ms / step_ms:.1f}",
                *(f"{100 * share:.0f}" if share < 1 else "all" for share in shares),
            ]
        )
    limits = [f"% at {limit} GB" for limit in _LIMITS_GB]
    head = ("model", "used by", "experts GiB", "copy ms", "eager step ms", "ratio", *limits)
    ours = "; ".join(
        f"{source.timed.name} {link_to_compute(source, MACHINE):.1f}" for source in sources
    )
    return "\n\n".join(
        [
            "### Link over compute, and residency",
            "What prefetching can hide depends on the time to copy a token's routed experts (24 "
            "GB/s) over that of a step with all resident. The papers' engines are eager PyTorch; "
            "their steps as we measured them on an H200, others by the same time a layer. "
            "Residency: which share of the experts the papers' cache limits hold, computed; the "
            "first is FineMoE's smallest.",
            markdown(head, rows),
            f"Our engine replays CUDA graphs, so its ratios are higher ({MACHINE}): {ours}. "
            "*Eager* below stretches every layer until a resident step takes the eager time: the "
            "ratio is that of the model's row, not that of another paper's model.",
        ]
    )


# ---------------------------------------------------------------------- ProMoE


def promoe(sources: Sequence[Source], results: dict[str, Frames]) -> list[str]:
    """The section."""
    title = "### ProMoE (arXiv 2410.22134)"
    found = [source for source in sources if "promoe" in results[source.model]]
    if not found:
        return [title, "Not runnable: no trace here has the column learned_2 (train-predictor)."]
    parts = [
        title,
        "Its RTX 4090 over PCIe 4. Published: decode 1.31x over its LRU on transformers, 1.09x on "
        "llama.cpp; prefill 2.21x (ablation: 1.27x up to early preemption, 2.39x with reordering). "
        "Its LRU computes experts in the order of ids; which share of the experts was resident is "
        "not known to us.",
    ]
    for source in found:
        frames = results[source.model]
        frame = _whole(frames)
        parts += [
            f"**Routing of {source.model}**; speed-up over LRU in id order (over LRU cached "
            f"first); link over compute {link_to_compute(source, MACHINE):.1f} in our engine:",
            _speedups(frame),
            "Decode by the ratio of link to compute, all else equal:",
            _by_ratio(frames["promoe-ratios"]),
            "The ablation at 50 % of the experts:",
            _ablation(frame),
            _words(frame, frames["promoe-ratios"]),
        ]
    return parts


def _whole(frames: Frames) -> pd.DataFrame:
    """ProMoE and LRU at all budgets, the other parts at 50 %."""
    return pd.concat([frames["promoe"], frames["promoe-parts"]], ignore_index=True)


def engines(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Hardware names of a paper's sweep, and what they stand for."""
    return [
        (hardware, "eager" if hardware.endswith("-eager") else "ours")
        for hardware in dict.fromkeys(frame["hardware"])
    ]


def _budgets(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["point.expert_budget"]))


def _gain(frame: pd.DataFrame, column: str, slower: str, budget: str, hardware: str) -> float:
    base, own = (value(frame, column, each, budget, hardware) for each in (slower, "promoe"))
    return base / own


def _speedups(frame: pd.DataFrame) -> str:
    rows = [["paper: transformers", "", "1.31x", "2.21x"], ["paper: llama.cpp", "", "1.09x", ""]]
    for hardware, engine in engines(frame):
        for budget in _budgets(frame):
            cells = []
            for column in (TIME, TTFT):
                by_id, first = (
                    _gain(frame, column, slower, budget, hardware)
                    for slower in (LRU_BY_ID, LRU_CACHED_FIRST)
                )
                cells.append(f"{by_id:.2f}x ({first:.2f}x)")
            rows.append([engine, spaced(budget), *cells])
    return markdown(("engine", "budget", "decode", "prefill"), rows)


def gains_by_ratio(frame: pd.DataFrame, budget: str, slower: str) -> dict[float, float]:
    """Decode speed-up of ProMoE by link over compute, ascending."""
    found = {
        float(hardware.rpartition("-ratio-")[2]): _gain(frame, TIME, slower, budget, hardware)
        for hardware in dict.fromkeys(frame["hardware"])
    }
    return dict(sorted(found.items()))


def _by_ratio(frame: pd.DataFrame) -> str:
    rows = []
    for budget in _budgets(frame):
        for slower, words in ((LRU_BY_ID, "LRU in id order"), ("next-gate", "next-gate")):
            gains = gains_by_ratio(frame, budget, slower)
            rows.append([f"{spaced(budget)}, over {words}", *(f"{g:.2f}x" for g in gains.values())])
    names = [f"{ratio:g}" for ratio in gains_by_ratio(frame, _budgets(frame)[0], LRU_BY_ID)]
    return markdown(("link over compute", *names), rows)


def _ablation(frame: pd.DataFrame) -> str:
    rows = []
    for label, words in ABLATION:
        cells = [words]
        for hardware, _ in engines(frame):
            for column in (TIME, TTFT):
                own, base = (value(frame, column, n, "50%", hardware) for n in (label, LRU_BY_ID))
                cells.append(f"{ms(own)} ({times(base, own)})")
        lost = value(frame, _COLLISIONS, label, "50%", engines(frame)[0][0])
        rows.append([*cells, f"{lost:,.0f}"])
    names = [f"{what}, {engine}" for _, engine in engines(frame) for what in ("ms", "TTFT ms")]
    return markdown(("", *names, "hits lost (ours)"), rows)


def speedups(frame: pd.DataFrame, column: str) -> list[float]:
    """Speed-ups over LRU in id order at all budgets, at eager's pace where that was swept."""
    hardware = engines(frame)[-1][0]
    return [_gain(frame, column, LRU_BY_ID, budget, hardware) for budget in _budgets(frame)]


def crossing(frame: pd.DataFrame, budget: str) -> str:
    """At which ratios the published decode gain lies, in words."""
    gains = gains_by_ratio(frame, budget, LRU_BY_ID)
    reached = [ratio for ratio, gain in gains.items() if gain >= NEAR * PUBLISHED_DECODE]
    if not reached:
        best = max(gains, key=lambda ratio: gains[ratio])
        return f"at no ratio (most: {gains[best]:.2f}x at {best:g})"
    least, most = min(reached), max(reached)
    return f"at ratios of {least:g} to {most:g}" if least < most else f"at a ratio of {least:g}"


def _words(frame: pd.DataFrame, by_ratio: pd.DataFrame) -> str:
    ours, slow = engines(frame)[0][0], engines(frame)[-1][0]

    def count(column: str, label: str) -> str:
        return f"{value(frame, column, label, '50%', ours):,.0f}"

    def gain(column: str, slower: str) -> str:
        return f"{_gain(frame, column, slower, '50%', slow):.2f}x"

    reached = "; ".join(
        f"{spaced(budget)}: {crossing(by_ratio, budget)}" for budget in _budgets(by_ratio)
    )
    uncached = value(frame, TTFT, "on-demand", "50%", slow)  # the same at any budget
    thrashed = [
        f"{times(uncached, value(frame, TTFT, 'promoe', budget, slow))} at {spaced(budget)}"
        for budget in _budgets(frame)
    ]
    prefill = [_gain(frame, TTFT, LRU_BY_ID, budget, slow) for budget in _budgets(frame)]
    return (
        f"*Decode*: the published 1.31x is reached (within 5 %) {reached}. *Prefill*: "
        f"{between(prefill)} where 2.21x is published. The order does it, as in the paper's "
        f"ablation: at 50 % {gain(TTFT, LRU_BY_ID)} in all, of it "
        f"{gain(TTFT, LRU_CACHED_FIRST)} over LRU cached first; in the order of ids LRU finds "
        f"{count('prefill.hits', LRU_BY_ID)} experts in prefill and loses "
        f"{count(_COLLISIONS, LRU_BY_ID)} over the whole run before it computes "
        f"them, cached first {count(_COLLISIONS, LRU_CACHED_FIRST)}. Against a cache that loses "
        f"them all (on-demand) ProMoE's prefill gains {', '.join(thrashed)}. Beyond that 2.21x is "
        "not explained; tried: residency, order, chunks, pace, a cache that loses all. *Learned "
        f"against next gates* (decode, 50 %): {gain(TIME, 'next-gate')}, "
        f"and {gain(TIME, PROXY)} where next-gate has three chunks, too."
    )
