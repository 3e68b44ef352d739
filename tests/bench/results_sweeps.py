"""The sweeps behind docs/policies.md: every policy on every trace, and the papers' settings.

All times are simulated. `derived_hardware` writes the variants of a profile that tell causes apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from configs.geometry import Geometry, load_geometry
from configs.hardware import Hardware, list_hardware, load_hardware
from sim.compare import everything
from sim.sweeps import PolicyChoice, SweepConfig, load_config, sweep
from tracer.trace import Trace

MACHINE = "rtx4090-pcie4"
FINEMOE_MACHINE = "rtx3090-pcie4"
LINKS = ("12GB/s", "24GB/s", "50GB/s")
BUDGETS = ("12.5%", "25%", "37.5%", "50%", "62.5%", "75%")
FIT_SHARE = 0.3
NO_CACHE = ("on-demand", "pregated", "layer-stream")
"""They use the same memory at any budget, so one budget tells all."""

PUBLIC = {"olmoe-twin": "olmoe-1b-7b", "qwen2moe-twin": "qwen1.5-moe-a2.7b"}
EAGER_MODEL, EAGER_STEP_MS = "olmoe-1b-7b", 19.0
"""A decode step of one token in eager transformers, all resident, as measured on an H200."""

Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Source:
    """A trace of the page."""

    trace: Trace
    path: str

    @property
    def model(self) -> str:
        return self.trace.manifest.model_id

    @property
    def geometry(self) -> str | None:
        """Model to time; None: the trace's own."""
        return PUBLIC.get(self.model)

    @property
    def timed(self) -> Geometry:
        own = self.trace.manifest.geometry
        return own if self.geometry is None else load_geometry(self.geometry)

    def has(self, column: str) -> bool:
        return column in self.trace.columns()


def open_source(path: str) -> Source:
    return Source(Trace.open(path), path)


def choice(name: str, **settings: Any) -> PolicyChoice:
    return PolicyChoice(name=name, set=settings)


def _config(source: Source, **fields: Any) -> SweepConfig:
    given: dict[str, Any] = {
        "trace": source.path,
        "geometry": source.geometry,
        "hardware": [MACHINE],
        "fit_share": FIT_SHARE,
        **fields,
    }
    return SweepConfig(**given)


def grid(source: Source) -> dict[str, SweepConfig]:
    """Every policy at six budgets over three links; those without a cache at one budget."""
    caching = [each for each in everything() if each.name not in NO_CACHE]
    # promoe goes along so that the same requests are set aside as beside the others.
    streaming = [choice(name) for name in (*NO_CACHE, "promoe")]
    return {
        "grid": _config(source, policies=caching, links=LINKS, expert_budgets=BUDGETS),
        "streams": _config(source, policies=streaming, links=LINKS, expert_budgets=BUDGETS[:1]),
    }


def machines(source: Source) -> dict[str, SweepConfig]:
    """Every policy on every machine over its own link, at a quarter of the experts."""
    chosen = [each for each in everything() if each.name not in NO_CACHE[1:]]
    hardware = list_hardware()
    return {"machines": _config(source, policies=chosen, hardware=hardware, expert_budgets=["25%"])}


def promoe(source: Source, work: Path) -> dict[str, SweepConfig]:
    """ProMoE's ablation, with our decode step and with one as slow as eager transformers."""
    hardware = with_eager(MACHINE, source, work)
    chosen = load_config("promoe-ablation").policies
    budgets = ["25%", "50%", "75%"]
    # What an LRU that hits nothing would take; promoe has the same requests set aside.
    floor = [choice("on-demand"), choice("promoe")]
    return {
        "promoe": _config(source, policies=chosen, hardware=hardware, expert_budgets=budgets),
        "promoe-floor": _config(source, policies=floor, hardware=hardware, expert_budgets=["50%"]),
    }


def finemoe(source: Source, work: Path) -> dict[str, SweepConfig]:
    """FineMoE and its baselines on its machine; then its parts, and what its predictions cost."""
    baselines = load_config("finemoe-baselines")
    free = str(free_search(FINEMOE_MACHINE, work))
    shared = {"fit_share": baselines.fit_share}
    parts = [
        *(choice("finemoe", capacity=capacity) for capacity in (32, 128, 1000)),
        *(choice("finemoe", distance=distance) for distance in (1, 2, 6)),
        choice("finemoe", mode="online"),
        choice("finemoe", scope="global"),
        *(choice("accuracy-q", q=q, depth=3) for q in (0.6, 0.85, 1.0)),
        choice("lru"),
    ]
    return {
        "finemoe": _config(
            source,
            policies=baselines.policies,
            hardware=with_eager(FINEMOE_MACHINE, source, work),
            expert_budgets=baselines.expert_budgets,
            **shared,
        ),
        "finemoe-parts": _config(
            source,
            policies=parts,
            hardware=[FINEMOE_MACHINE],
            expert_budgets=["25%"],
            **shared,
        ),
        "finemoe-free": _config(
            source,
            policies=[choice("finemoe"), choice("lru")],
            hardware=[free],
            expert_budgets=["25%"],
            **shared,
        ),
    }


def swapmoe(source: Source) -> dict[str, SweepConfig]:
    """SwapMoE's memory and latency, beside a lossless cache of the same size."""
    chosen = [choice(name) for name in ("swapmoe", "lru", "resident")]
    return {"swapmoe": _config(source, policies=chosen, expert_budgets=BUDGETS)}


# ---------------------------------------------------------------------- variants of a machine


def with_eager(name: str, source: Source, work: Path) -> list[str]:
    """The machine, and its eager variant where the trace is of one token a step of that model."""
    batch = source.trace.manifest.recording.sampling.get("batch_size", 1)
    if source.geometry != EAGER_MODEL or batch != 1:
        return [name]
    return [name, str(eager(name, source, work))]


def eager(name: str, source: Source, work: Path) -> Path:
    """The machine with each layer's segment so long that a resident step takes eager's time."""
    base = load_hardware(name)
    quick = _config(source, policies=["resident"], hardware=[name], expert_budgets=["100%"])
    resident_ms = float(sweep(quick, trace=source.trace)["tpot_ms.mean"].iloc[0])
    layers = source.trace.manifest.geometry.num_moe_layers
    longer = round((EAGER_STEP_MS - resident_ms) * 1e6 / layers)
    floor = _segment_ns(base, source) + longer
    why = f"a resident step takes {EAGER_STEP_MS:g} ms, as eager transformers"
    return derived_hardware(base, work, f"{name}-eager", {"segment_floor_ns": floor}, why)


def _segment_ns(base: Hardware, source: Source) -> int:
    """Mean time of a segment: the floor, unless its bytes take longer."""
    sizes = source.timed.segment_bytes_by_layer
    return round(
        sum(max(base.segment_floor_ns, size / base.gpu_bytes_per_s * 1e9) for size in sizes)
        / len(sizes)
    )


def free_search(name: str, work: Path) -> Path:
    """The machine on which a map search takes no time."""
    base = load_hardware(name)
    return derived_hardware(base, work, f"{name}-free-search", {}, "a search that is free")


def derived_hardware(
    base: Hardware, work: Path, name: str, values: dict[str, int], why: str
) -> Path:
    data = base.model_dump(mode="json")
    data["name"] = name
    for field, value in values.items():
        data[field] = {"value": value, "source": f"what-if: {why}"}
    if not values:
        data["predictor_ns"]["map_search"] = {"value": 0, "source": f"what-if: {why}"}
    path = work / "hardware" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


# ---------------------------------------------------------------------- running


def run(configs: dict[str, SweepConfig], source: Source, work: Path, jobs: int) -> Frames:
    """Results by sweep, kept in ``work``; wall-clock on stderr."""
    frames = {}
    for name, config in configs.items():
        begin = time.monotonic()
        where = work / source.model / name
        frames[name] = sweep(config, out=where, jobs=jobs, trace=source.trace)
        seconds = time.monotonic() - begin
        print(
            f"{source.model} {name}: {len(frames[name])} points, {seconds:.0f} s", file=sys.stderr
        )
    return frames


def run_all(sources: Sequence[Source], work: Path, jobs: int) -> dict[str, Frames]:
    """Results by model, then by sweep. The papers' settings run where a trace has their columns."""
    results: dict[str, Frames] = {}
    for number, source in enumerate(sources):
        planned: list[Callable[[], dict[str, SweepConfig]]] = []
        if source.has("gate_probs"):
            planned.append(lambda source=source: swapmoe(source))
        if source.has("embedding"):
            planned.append(lambda source=source: finemoe(source, work))
        if source.has("learned_2"):
            planned.append(lambda source=source: promoe(source, work))
        if number == 0:
            planned.append(lambda source=source: machines(source))
        planned.append(lambda source=source: grid(source))
        frames: Frames = {}
        for plan in planned:
            frames.update(run(plan(), source, work, jobs))
        results[source.model] = frames
    return results
