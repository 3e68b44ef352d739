"""The papers' ratios beside ours: ProMoE, FineMoE, SwapMoE; and what explains the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from configs.hardware import load_hardware
from sim.wording import as_gib, as_percent
from tests.bench.results_sweeps import (
    BUDGETS,
    EAGER_STEP_MS,
    FINEMOE_MACHINE,
    MACHINE,
    Frames,
)
from tests.bench.results_tables import change, markdown, ms, spaced, times, value

TPOT, TTFT, HITS = "tpot_ms.mean", "ttft_ms.mean", "decode.hit_rate"
COLLISIONS = "collision_misses"
LRU_BY_ID = "promoe order=id preempt=False prefetch=False"
LRU_CACHED_FIRST = "promoe prefetch=False"
ABLATION = (
    (LRU_BY_ID, "LRU, experts in the order of ids"),
    ("promoe order=id preempt=False", "+ prefetch"),
    ("promoe order=id", "+ early preemption"),
    ("promoe", "+ cached first: ProMoE"),
    (LRU_CACHED_FIRST, "LRU, cached first"),
)
PROXY = "next-gate chunks=3"
_PROMOE_BUDGETS = ("25%", "50%", "75%")
_FINEMOE_BUDGETS = ("12.5%", "25%", "50%")


def papers(results: dict[str, Frames], qualities: Sequence[dict[str, Any]]) -> str:
    """The section, a part a paper."""
    return "\n\n".join(
        [
            "## The papers' ratios beside ours",
            "Routing is that of the traces above: small trained models in place of the papers' "
            "DeepSeek-MoE, Qwen2-57B, Mixtral-8x7B, Qwen1.5-MoE and Phi-3.5-MoE. Links are the "
            "papers' (PCIe 4 x16), budgets what they had. The papers' engines are eager PyTorch, "
            f"whose step is longer: {EAGER_STEP_MS:g} ms a token for OLMoE-1B-7B with all experts "
            "resident, as we measured on an H200, against CUDA graphs in ours. *Eager* stretches "
            "every layer until a resident step takes that time: the ratio of link to compute is "
            "then near the papers'. It is measured for that model and one token a step alone.",
            *_promoe(results),
            *_finemoe(results),
            *_swapmoe(results, qualities),
        ]
    )


def _with(results: dict[str, Frames], name: str) -> list[tuple[str, pd.DataFrame]]:
    return [(model, frames[name]) for model, frames in results.items() if name in frames]


# ---------------------------------------------------------------------- ProMoE


def _promoe(results: dict[str, Frames]) -> list[str]:
    title = "### ProMoE (arXiv 2410.22134)"
    found = _with(results, "promoe")
    if not found:
        return [title, "Not runnable: no trace here has the column learned_2 (train-predictor)."]
    parts = [
        title,
        "Its RTX 4090 over PCIe 4. Published: decode 1.31x over its LRU on transformers, 1.09x on "
        "llama.cpp; prefill 2.21x (ablation: 1.27x up to early preemption, 2.39x with reordering). "
        "Its LRU computes experts in the order of ids.",
    ]
    for model, frame in found:
        parts.append(f"Routing of {model}; speed-up over LRU in id order (over LRU cached first):")
        parts.append(_promoe_speedups(frame))
        parts.append("The ablation at 50 % of the experts:")
        parts.append(_ablation(frame))
        parts.append(_promoe_words(frame, results[model]["promoe-floor"]))
    return parts


def _engines(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return [
        (hardware, "eager" if hardware.endswith("-eager") else "ours")
        for hardware in dict.fromkeys(frame["hardware"])
    ]


def _promoe_speedups(frame: pd.DataFrame) -> str:
    rows = [["paper: transformers", "", "1.31x", "2.21x"], ["paper: llama.cpp", "", "1.09x", ""]]
    for hardware, engine in _engines(frame):
        for budget in _PROMOE_BUDGETS:
            cells = []
            for column in (TPOT, TTFT):
                base, better, own = (
                    value(frame, column, label, budget, hardware)
                    for label in (LRU_BY_ID, LRU_CACHED_FIRST, "promoe")
                )
                cells.append(f"{times(base, own)} ({times(better, own)})")
            rows.append([engine, spaced(budget), *cells])
    return markdown(("engine", "budget", "decode", "prefill"), rows)


def _ablation(frame: pd.DataFrame) -> str:
    rows = []
    engines = _engines(frame)
    for label, words in ABLATION:
        cells = [words]
        for hardware, _ in engines:
            decode, prefill = (
                value(frame, column, label, "50%", hardware) for column in (TPOT, TTFT)
            )
            base = [value(frame, column, LRU_BY_ID, "50%", hardware) for column in (TPOT, TTFT)]
            cells += [f"{ms(decode)} ({times(base[0], decode)})"]
            cells += [f"{ms(prefill)} ({times(base[1], prefill)})"]
        rows.append([*cells, f"{value(frame, COLLISIONS, label, '50%', engines[0][0]):,.0f}"])
    names = [f"{what} ms, {engine}" for _, engine in engines for what in ("TPOT", "TTFT")]
    return markdown(("", *names, "hits lost (ours)"), rows)


def _promoe_words(frame: pd.DataFrame, floor: pd.DataFrame) -> str:
    ours, slow = _engines(frame)[0][0], _engines(frame)[-1][0]

    def gain(column: str, slower: str, hardware: str) -> str:
        base, own = (value(frame, column, label, "50%", hardware) for label in (slower, "promoe"))
        return times(base, own)

    decode = f"Decode gains {gain(TPOT, LRU_BY_ID, ours)} at 50 %"
    if slow != ours:
        decode = (
            "Decode depends on the time that there is to prefetch in: at 50 %, the same policy on "
            f"the same routing gains {gain(TPOT, LRU_BY_ID, ours)} in our engine and "
            f"{gain(TPOT, LRU_BY_ID, slow)} at eager's pace"
        )

    def count(column: str, label: str) -> str:
        return f"{value(frame, column, label, '50%', ours):,.0f}"

    uncached = value(floor, TTFT, "on-demand", "50%", slow)  # the same at any budget
    thrashed = [
        f"{times(uncached, value(frame, TTFT, 'promoe', budget, slow))} at {spaced(budget)}"
        for budget in _PROMOE_BUDGETS
    ]
    return (
        f"{decode}. In prefill the order does it, as in the "
        f"paper's ablation: {gain(TTFT, LRU_BY_ID, slow)} in all, of it "
        f"{gain(TTFT, LRU_CACHED_FIRST, slow)} over LRU cached first. In the order of ids, LRU "
        f"finds {count('prefill.hits', LRU_BY_ID)} experts in prefill and loses "
        f"{count(COLLISIONS, LRU_BY_ID)} (counted over the whole run) before it computes them; "
        f"cached first, {count(COLLISIONS, LRU_CACHED_FIRST)}. Against a cache that loses them all "
        f"(on-demand) ProMoE's prefill gains {', '.join(thrashed)} (the paper: 2.21x; which share "
        "of the experts was resident there is not known to us). The learned predictor gains "
        f"{gain(TPOT, 'next-gate', slow)} over next-gate, "
        f"and {gain(TPOT, PROXY, slow)} over next-gate in three chunks (decode, 50 %)."
    )


# ---------------------------------------------------------------------- FineMoE

_PUBLISHED = (
    # FineMoE against: label here, name there, TPOT, TTFT, hit rate
    ("layer-stream", "DeepSpeed-Inference", "-46 %", "-74 %", ""),
    ("mixtral-offloading", "Mixtral-offloading", "-38 %", "-67 %", "+14 %"),
    (PROXY, "ProMoE (as run there: a proxy)", "-27 %", "-56 %", "+37 %"),
    ("moe-infinity", "MoE-Infinity", "-22 %", "-53 %", "+68 %"),
    ("promoe", "ProMoE with its learned predictor", "", "", ""),
    ("on-demand", "no cache, no streaming", "", "", ""),
    ("lru", "LRU", "", "", ""),
)


def _finemoe(results: dict[str, Frames]) -> list[str]:
    title = "### FineMoE (arXiv 2502.05370)"
    found = _with(results, "finemoe")
    if not found:
        return [title, "Not runnable: no trace here has the columns gate_probs and embedding."]
    parts = [
        title,
        "Its RTX 3090 over PCIe 4; 70 % of the requests fill the store. Published averages over "
        "three models and cache limits of 6 to 96 GB. Changes of FineMoE's time and hit rate "
        "against each baseline:",
    ]
    for model, frame in found:
        fit = frame[frame["status"] == "ok"].iloc[0]
        parts.append(
            f"Routing of {model}: {fit['trace.fitted_requests']:.0f} requests fill the store, "
            f"{fit['trace.judged_requests']:.0f} are judged."
        )
        parts += [_finemoe_table(frame, column) for column in (TPOT, TTFT, HITS)]
        parts += _finemoe_causes(results[model], frame)
    return parts


_NO_HITS = 0.05  # a hit rate below which a ratio says nothing
_COLUMN_WORDS = {TPOT: "TPOT", TTFT: "TTFT", HITS: "decode hit rate"}


def _finemoe_table(frame: pd.DataFrame, column: str) -> str:
    place = [TPOT, TTFT, HITS].index(column) + 2
    engines = _engines(frame)
    rows = []
    for published in _PUBLISHED:
        label, name = published[:2]
        cells = []
        for hardware, _ in engines:
            for budget in _FINEMOE_BUDGETS:
                own, other = (
                    value(frame, column, each, budget, hardware) for each in ("finemoe", label)
                )
                cells.append(change(own, other) if other > _NO_HITS or column != HITS else "-")
        rows.append([name, published[place] or "-", *cells])
    names = [f"{engine}, {spaced(budget)}" for _, engine in engines for budget in _FINEMOE_BUDGETS]
    return markdown((f"{_COLUMN_WORDS[column]} against", "paper", *names), rows)


def _finemoe_causes(frames: Frames, frame: pd.DataFrame) -> list[str]:
    parts, free = frames["finemoe-parts"], frames["finemoe-free"]
    labels = list(parts["label"])
    rows = []
    for label in labels:
        at = (parts, label)
        rows.append(
            [
                label,
                ms(_part(*at, TPOT)),
                *(as_percent(_part(*at, name)) for name in (HITS, "prefetch.precision")),
            ]
        )
    rows.append(["finemoe, a search that is free", ms(_part(free, "finemoe", TPOT)), "", ""])
    head = ("25 %, our engine", "TPOT ms", "hits %", "precision %")
    return ["What it depends on:", markdown(head, rows), _finemoe_words(parts, free, frame)]


def _part(frame: pd.DataFrame, label: str, column: str) -> float:
    return value(frame, column, label, "25%", str(frame["hardware"].iloc[0]))


def _finemoe_words(parts: pd.DataFrame, free: pd.DataFrame, frame: pd.DataFrame) -> str:
    def right(label: str) -> str:
        return as_percent(_part(parts, label, "prefetch.precision"))

    def against(label: str) -> str:
        return change(at(TPOT, "finemoe"), at(TPOT, label))

    def at(column: str, label: str) -> float:
        return value(frame, column, label, "25%", FINEMOE_MACHINE)

    def late(label: str) -> str:
        return as_percent(at("decode.late", label) / at("decode.accesses", label))

    full, lru = _part(parts, "finemoe capacity=1000", TPOT), _part(parts, "lru", TPOT)
    poor, perfect = (
        change(_part(parts, f"accuracy-q depth=3 q={q}", TPOT), lru) for q in (0.6, 1.0)
    )
    gate = as_percent(at("prefetch.precision", PROXY))
    streamed = as_percent(at("prefetch.precision", "layer-stream"))
    hits = change(at(HITS, "finemoe"), at(HITS, "mixtral-offloading"))
    traffic = change(*(at("h2d_bytes", each) for each in ("finemoe", "mixtral-offloading")))
    entries = change(_part(parts, "finemoe capacity=32", TPOT), full)
    saved = change(_part(free, "finemoe", TPOT), full)
    return (
        "Against policies that look ahead by the gates, Mixtral-offloading and the ProMoE proxy, "
        f"TPOT changes by {against('mixtral-offloading')} and {against(PROXY)} at 25 % (published: "
        "-38 and -27 %). "
        f"Against Mixtral-offloading the hit rate changes by {hits} (published: +14 %); but "
        f"{late('mixtral-offloading')} % of its accesses are late, which hides a part of the copy "
        f"(FineMoE: {late('finemoe')} %), and the bytes copied change by {traffic}. "
        f"The maps are right in {right('finemoe capacity=1000')} % of what they name, the next "
        f"gates of this model in {gate} %; and three layers ahead, on an LRU cache, a predictor "
        f"that is right in 60 % changes TPOT by {poor}, a perfect one by {perfect}. The store "
        f"matters: with 32 entries {right('finemoe capacity=32')} % are right and TPOT changes by "
        f"{entries}; requests set aside are few here. The time of the search does not (free: "
        f"{saved}). Of the whole layers that are streamed {streamed} % is needed (Mixtral, 2 of 8 "
        f"experts: 25 %), so against that TPOT changes by {against('layer-stream')}; against "
        f"on-demand copies by {against('on-demand')}. TTFT: our reading of the rules prefetches "
        "nothing in prefill, so the published -53 to -74 % are not to be had; what the authors "
        "did there in addition is not known to us."
    )


# ---------------------------------------------------------------------- SwapMoE


def _swapmoe(results: dict[str, Frames], qualities: Sequence[dict[str, Any]]) -> list[str]:
    title = "### SwapMoE (arXiv 2308.15030)"
    found = _with(results, "swapmoe")
    if not found:
        return [title, "Not runnable: no trace here has the column gate_probs."]
    parts = [
        title,
        "Lossy. Published: Switch Transformer 14.2 to 4.7 GiB, latency -50 %, Rouge-2 -0.041, it "
        f"seems against the fully resident model. Here on `{MACHINE}` over its own link "
        f"({load_hardware(MACHINE).link_bytes_per_s / 1e9:g} GB/s).",
    ]
    for model, frame in found:
        matching = [each for each in qualities if each["model"].split("/")[-1] == model]
        parts.append(f"Routing of {model}:")
        parts.append(_front(frame, matching))
        parts += [_measured_words(quality) for quality in matching]
        if not matching:
            parts.append(
                "Perplexity: not measured for this page; `moesim quality --model "
                f"{model} --policy swapmoe --text FILE --expert-budget ... --json`, then --quality."
            )
        parts.append(_swapmoe_words(frame))
    return parts


def _measured_words(quality: dict[str, Any]) -> str:
    return (
        f"Perplexity and next tokens: {quality['tokens']:,} tokens of held-out text, "
        f"{quality['chunk']} a step, by `moesim quality` (docs/quality.md)."
    )


def _front(frame: pd.DataFrame, qualities: Sequence[dict[str, Any]]) -> str:
    resident = frame[frame["policy"] == "resident"].iloc[0]
    measured = {
        round(each["expert_share"], 3): each
        for quality in qualities
        for each in _with_share(quality)
    }
    rows = []
    for budget in BUDGETS:
        own = frame[(frame["policy"] == "swapmoe") & (frame["point.expert_budget"] == budget)]
        row = own.iloc[0]
        lossless = value(frame, TPOT, "lru", budget, MACHINE)
        cells = [spaced(budget), as_gib(row["memory.peak_bytes"]), ms(row[TPOT]), ms(lossless)]
        cells += [ms(row[TTFT]), as_percent(row["quality.decode.retained_mass_share"])]
        cells += [as_percent(row["quality.decode.changed_share"])]
        cells += _quality_cells(measured.get(round(float(budget[:-1]) / 100, 3)))
        rows.append(cells)
    last = ["100 %", as_gib(resident["memory.peak_bytes"]), ms(resident[TPOT]), ms(resident[TPOT])]
    rows.append([*last, ms(resident[TTFT]), "100.0", "0.0", *_unmodified(qualities)])
    head = ("budget", "memory", "TPOT ms", "LRU's", "TTFT ms", "gate weight kept %", "changed %")
    return markdown((*head, "perplexity", "next token as before %"), rows)


def _with_share(quality: dict[str, Any]) -> list[dict[str, Any]]:
    whole = quality["unmodified"]["expert_bytes"]
    return [
        {**each, "expert_share": each["expert_budget_bytes"] / whole} for each in quality["budgets"]
    ]


def _quality_cells(measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return ["not measured", "not measured"]
    agreement = as_percent(measured["next_token_agreement"])
    return [f"{measured['perplexity']:.1f}", agreement]


def _unmodified(qualities: Sequence[dict[str, Any]]) -> list[str]:
    if not qualities:
        return ["not measured", "not measured"]
    return [f"{qualities[0]['unmodified']['perplexity']:.1f}", "100.0"]


def _swapmoe_words(frame: pd.DataFrame) -> str:
    resident = frame[frame["policy"] == "resident"].iloc[0]

    def against(column: str, budget: str) -> str:
        return change(value(frame, column, "swapmoe", budget, MACHINE), resident[column])

    memory = "memory.peak_bytes"
    return (
        f"At 25 and 37.5 % memory changes by {against(memory, '25%')} and "
        f"{against(memory, '37.5%')} (the paper: -67 %), but TPOT by {against(TPOT, '25%')} and "
        f"{against(TPOT, '37.5%')} against the resident model: one token runs as many experts as "
        "before. Where many tokens share a step, fewer distinct experts run: prefill changes by "
        f"{against(TTFT, '25%')} and {against(TTFT, '37.5%')} (the paper's latency: -50 %). "
        "Against a lossless cache of the same memory see LRU's TPOT."
    )
