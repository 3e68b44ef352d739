"""The sweeps behind docs/policies.md: every policy on every trace, and what tells causes apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from configs.hardware import list_hardware
from sim.compare import everything
from sim.sweeps import PolicyChoice, SweepConfig, load_config, sweep
from tests.bench.results_source import Source
from tests.bench.results_tables import by_token
from tests.bench.results_variants import (
    EAGER_MS,
    at_ratio,
    cpu_rate,
    eager,
    fewer_fitted,
    free_search,
    small_device,
    without_first,
)

MACHINE, FINEMOE_MACHINE = "rtx4090-pcie4", "rtx3090-pcie4"
MIDDLE_LINK = "24GB/s"
NO_CACHE = ("on-demand", "pregated", "layer-stream")
"""They use the same memory at any budget, so one budget tells all."""

FITTED = ("edgemoe", "moe-infinity", "static", "reuse-distance")
"""Policies that learn from the requests set aside, by label; ``lru`` beside them learns nothing."""

CPU_POLICIES = ("auto", "fiddler", "hybrid-split")
ENOUGH_REQUESTS = 50
PAPERS_FIT_SHARE = 0.7

Frames = dict[str, pd.DataFrame]
Planned = tuple[str, Source, SweepConfig]


@dataclass(frozen=True)
class Extent:
    """How much is swept. ``fits``: requests set aside, beside all; ``splits``: of FineMoE's."""

    budgets: tuple[str, ...] = ("12.5%", "25%", "37.5%", "50%", "62.5%", "75%")
    links: tuple[str, ...] = ("12GB/s", MIDDLE_LINK, "50GB/s")
    promoe_budgets: tuple[str, ...] = ("25%", "50%", "75%")
    finemoe_budgets: tuple[str, ...] = ("12.5%", "25%", "50%", "90%")
    ratios: tuple[float, ...] = (1, 2, 3.5, 5, 8, 14, 23)
    fits: tuple[int, ...] = (2, 10, 30)
    cpu_gb_per_s: tuple[float, ...] = (5, 10, 20, 30, 45, 60)
    splits: int = 3
    machines: int = 100


QUICK = Extent(
    budgets=("25%", "50%"),
    links=(MIDDLE_LINK,),
    promoe_budgets=("25%", "50%"),
    finemoe_budgets=("25%", "50%"),
    ratios=(3.5, 23),
    fits=(2,),
    cpu_gb_per_s=(10, 45),
    splits=2,
    machines=2,
)


def choice(text: str) -> PolicyChoice:
    """A policy from its label: ``lru order=id``."""
    name, *settings = text.split()
    pairs = (setting.split("=") for setting in settings)
    return PolicyChoice(name=name, set={key: _scalar(value) for key, value in pairs})


def _scalar(text: str) -> str | bool | int | float:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def choices(*labels: str) -> list[PolicyChoice]:
    return [choice(label) for label in labels]


def _config(source: Source, **fields: Any) -> SweepConfig:
    given: dict[str, Any] = {
        "trace": source.path,
        "geometry": source.geometry,
        "hardware": [MACHINE],
        "fit_share": source.fit_share,
        **fields,
    }
    return SweepConfig(**given)


# ---------------------------------------------------------------------- plans


def grid(source: Source, extent: Extent) -> Iterator[Planned]:
    """Every policy at all budgets over all links; those without a cache at one budget."""
    caching = [each for each in everything() if each.name not in NO_CACHE]
    # promoe goes along so that the same requests are set aside as beside the others.
    streaming = choices(*NO_CACHE, "promoe")
    yield (
        "grid",
        source,
        _config(
            source,
            policies=[*caching, choice("auto cpu=False")],
            links=extent.links,
            expert_budgets=extent.budgets,
        ),
    )
    budgets = extent.budgets[:1]
    streams = _config(source, policies=streaming, links=extent.links, expert_budgets=budgets)
    yield "streams", source, streams


def machines(source: Source, extent: Extent) -> Iterator[Planned]:
    """Every policy on every machine over its own link, at a quarter of the experts."""
    chosen = [each for each in everything() if each.name not in NO_CACHE[1:]]
    hardware = list_hardware()[: extent.machines]
    config = _config(source, policies=chosen, hardware=hardware, expert_budgets=["25%"])
    yield "machines", source, config


def cpu_rates(source: Source, extent: Extent, work: Path) -> Iterator[Planned]:
    """Policies that compute misses on the CPU, by the rate at which it reads experts."""
    hardware = [cpu_rate(MACHINE, work, rate) for rate in extent.cpu_gb_per_s]
    config = _config(
        source,
        policies=[choice(name) for name in (*CPU_POLICIES, "promoe")],
        hardware=hardware,
        links=[MIDDLE_LINK],
        expert_budgets=["25%", "50%"],
    )
    yield "cpu-rates", source, config


def fits(source: Source, extent: Extent, work: Path) -> Iterator[Planned]:
    """Fitted policies after fewer requests; the same ones are judged. After all: the grid."""
    for count in extent.fits:
        fewer = fewer_fitted(source, count, work / source.model)
        chosen = choices(*FITTED, "lru")
        config = _config(fewer, policies=chosen, links=[MIDDLE_LINK], expert_budgets=["25%"])
        yield f"fits-{count}", fewer, config


def promoe(source: Source, extent: Extent, work: Path) -> Iterator[Planned]:
    """ProMoE's ablation in our engine and at eager's pace; then by the ratio of link to compute."""
    hardware = with_eager(MACHINE, source, work)
    chosen = choices("lru order=id", "lru", "promoe")
    budgets = extent.promoe_budgets
    config = _config(source, policies=chosen, hardware=hardware, expert_budgets=budgets)
    yield "promoe", source, config
    # on-demand: what an LRU that hits nothing would take.
    ablation = (*load_config("promoe-ablation").policies, choice("on-demand"))
    parts = [each for each in ablation if each not in chosen]
    config = _config(source, policies=parts, hardware=hardware, expert_budgets=["50%"])
    yield "promoe-parts", source, config
    ratios = [at_ratio(MACHINE, source, work, ratio) for ratio in extent.ratios]
    chosen.append(choice("next-gate"))
    config = _config(source, policies=chosen, hardware=ratios, expert_budgets=["25%", "50%"])
    yield "promoe-ratios", source, config


#: FineMoE's parts, and what its baselines might have been, for causes
PARTS = (
    "finemoe capacity=32",
    "finemoe capacity=1000",
    "finemoe distance=1",
    "finemoe distance=6",
    "finemoe mode=online",
    "finemoe scope=global",
    "finemoe order=id",
    "accuracy-q depth=3 predictor=map_search q=0.6",
    "accuracy-q depth=3 predictor=map_search q=0.85",
    "accuracy-q depth=3 predictor=map_search q=1.0",
    "mixtral-offloading order=id",
    "next-gate chunks=3 order=id",
    "moe-infinity order=id",
    "lru order=id",
    "lru",
)


def finemoe(source: Source, extent: Extent, work: Path) -> Iterator[Planned]:
    """FineMoE and its baselines on its machine; other splits; parts; a search that is free."""
    every = load_config("finemoe-baselines").policies
    baselines = [each for each in every if each.name not in NO_CACHE]
    hardware = with_eager(FINEMOE_MACHINE, source, work)
    shared: dict[str, Any] = {"fit_share": PAPERS_FIT_SHARE, "hardware": hardware}
    budgets = extent.finemoe_budgets
    config = _config(source, policies=baselines, expert_budgets=budgets, **shared)
    yield "finemoe", source, config
    # promoe goes along so that the same requests are set aside as beside the others.
    streams = [each for each in every if each.name in (*NO_CACHE, "promoe")]
    config = _config(source, policies=streams, expert_budgets=["50%"], **shared)
    yield "finemoe-streams", source, config
    for skipped in range(1, extent.splits):
        other = without_first(source, skipped, work / source.model)
        once = {**shared, "hardware": [FINEMOE_MACHINE], "expert_budgets": ["25%"]}
        config = _config(other, policies=baselines, **once)
        yield f"finemoe-split-{skipped}", other, config
    shared["expert_budgets"] = ["25%"]
    yield "finemoe-parts", source, _config(source, policies=choices(*PARTS), **shared)
    shared["hardware"] = [free_search(FINEMOE_MACHINE, work)]
    yield "finemoe-free", source, _config(source, policies=choices("finemoe", "lru"), **shared)


def swapmoe(source: Source, extent: Extent, work: Path) -> Iterator[Planned]:
    """SwapMoE's memory and latency, beside a lossless cache of the same size and none at all."""
    config = _config(
        source,
        policies=choices("swapmoe", "lru", "on-demand", "resident"),
        hardware=[MACHINE, small_device(MACHINE, work)],
        expert_budgets=extent.budgets,
    )
    yield "swapmoe", source, config


def with_eager(name: str, source: Source, work: Path) -> list[str]:
    """The machine, and its eager variant where that was measured, for one token a step."""
    if source.timed.name not in EAGER_MS or source.batch != 1:
        return [name]
    return [name, eager(name, source, work)]


# ---------------------------------------------------------------------- running


def run_all(sources: Sequence[Source], extent: Extent, work: Path, jobs: int) -> dict[str, Frames]:
    """Results by model, then by sweep. What a trace has no columns for is not planned for it."""
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Frames] = {}
    begin = time.monotonic()
    for number, source in enumerate(sources):
        frames: Frames = {}
        for plan in _plans(source, first=number == 0, extent=extent, work=work):
            for name, judged, config in plan():
                frames[name] = _run(name, judged, config, work / source.model / name, jobs)
        results[source.model] = frames
    print(f"all sweeps: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return results


def _plans(
    source: Source, *, first: bool, extent: Extent, work: Path
) -> list[Callable[[], Iterator[Planned]]]:
    planned: list[Callable[[], Iterator[Planned]]] = [lambda: grid(source, extent)]
    if source.has("gate_probs"):
        planned.append(lambda: swapmoe(source, extent, work))
    if source.has("embedding"):
        planned.append(lambda: finemoe(source, extent, work))
    if source.has("learned_2"):
        planned.append(lambda: promoe(source, extent, work))
    if first:
        planned.append(lambda: machines(source, extent))
        planned.append(lambda: cpu_rates(source, extent, work))
    if len(source.request_ids) >= ENOUGH_REQUESTS:
        planned.append(lambda: fits(source, extent, work))
    return planned


def _run(name: str, source: Source, config: SweepConfig, out: Path, jobs: int) -> pd.DataFrame:
    """One sweep, kept in ``out``; wall-clock on stderr."""
    begin = time.monotonic()
    frame = sweep(config, out=out, jobs=jobs, trace=source.trace)
    seconds = time.monotonic() - begin
    print(f"{source.model} {name}: {len(frame)} points, {seconds:.0f} s", file=sys.stderr)
    return by_token(frame)
