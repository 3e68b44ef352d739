"""Variants of machines and traces for docs/policies.md, one thing changed in each."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from configs.geometry import Geometry
from configs.hardware import Hardware, load_hardware
from sim.inputs import set_aside
from sim.timing import RooflineTiming
from tests.bench.results_source import Source, share_of
from tracer.subset import Choice, subset
from tracer.trace import Trace

EAGER_MS = {
    "olmoe-1b-7b": 19.0,
    "qwen1.5-moe-a2.7b": 34.6,
    "gpt-oss-20b": 23.7,
    "deepseek-v2-lite": 29.8,
}
"""A decode step of one token in eager transformers, all resident, as measured on an H200."""


def eager_ms(geometry: Geometry) -> tuple[float, bool]:
    """Of a public model, and whether it was measured; else by layer, as those that were."""
    known = EAGER_MS.get(geometry.name)
    if known is not None:
        return known, True
    layers = {"olmoe-1b-7b": 16, "qwen1.5-moe-a2.7b": 24, "gpt-oss-20b": 24, "deepseek-v2-lite": 27}
    a_layer = sum(EAGER_MS[name] / count for name, count in layers.items()) / len(layers)
    return a_layer * geometry.num_layers, False


def token_bytes(geometry: Geometry) -> int:
    """Bytes of the routed experts that one token runs through."""
    return geometry.top_k * sum(geometry.expert_bytes_by_layer)


def resident_ms(source: Source, name: str) -> float:
    """A decode step of one token with all experts on the GPU, by the roofline."""
    geometry, timing = source.timed, RooflineTiming(source.timed, load_hardware(name))
    host = timing.host
    decide = host.readback_ns + host.decision_ns + host.experts_launch_ns
    layers = sum(
        timing.segment_ns(layer, 1, 1, 0)
        + decide
        + timing.experts_ns(layer, geometry.top_k, geometry.top_k)
        for layer in range(geometry.num_moe_layers)
    )
    return (host.step_ns + layers + timing.head_ns(1)) / 1e6


def link_to_compute(source: Source, name: str) -> float:
    """Time to copy the experts of a token over that of a resident step."""
    copying_ms = token_bytes(source.timed) / load_hardware(name).link_bytes_per_s * 1e3
    return copying_ms / resident_ms(source, name)


def eager(name: str, source: Source, work: Path) -> str:
    """The machine with each layer's segment so long that a resident step takes eager's time."""
    target, _ = eager_ms(source.timed)
    why = f"a resident step takes {target:g} ms, as eager transformers"
    return _slower(name, source, work, target, f"{name}-eager", why)


def at_ratio(name: str, source: Source, work: Path, ratio: float) -> str:
    """The machine with longer segments or, beyond its own ratio, a slower link."""
    base = load_hardware(name)
    variant, why = f"{name}-ratio-{ratio:g}", f"link over compute of {ratio:g}"
    if ratio <= link_to_compute(source, name):
        target = token_bytes(source.timed) / base.link_bytes_per_s * 1e3 / ratio
        return _slower(name, source, work, target, variant, why)
    rate = round(token_bytes(source.timed) / (ratio * resident_ms(source, name)) * 1e3)
    return derived(base, work / source.model, variant, {"link_bytes_per_s": rate}, why)


def _slower(name: str, source: Source, work: Path, target_ms: float, variant: str, why: str) -> str:
    base, geometry = load_hardware(name), source.timed
    missing_ns = (target_ms - resident_ms(source, name)) * 1e6 / geometry.num_moe_layers
    timing = RooflineTiming(geometry, base)
    longest = max(timing.segment_ns(layer, 1, 1, 0) for layer in range(geometry.num_moe_layers))
    floor = {"segment_floor_ns": round(longest + missing_ns)}
    return derived(base, work / source.model, variant, floor, why)


def cpu_rate(name: str, work: Path, gb_per_s: float) -> str:
    """The machine whose CPU reads experts at another rate."""
    rate = {"cpu_bytes_per_s": round(gb_per_s * 1e9)}
    return derived(load_hardware(name), work, f"{name}-cpu-{gb_per_s:g}", rate, "the CPU's rate")


def small_device(name: str, work: Path) -> str:
    """No floors, and a tenth of the memory bandwidth: a step's time is that of its bytes."""
    base = load_hardware(name)
    values = {"segment_floor_ns": 0, "experts_floor_ns": 0, "head_floor_ns": 0}
    values["gpu_bytes_per_s"] = round(base.gpu_bytes_per_s / 10)
    return derived(base, work, f"{name}-small", values, "bytes alone count")


def free_search(name: str, work: Path) -> str:
    """The machine on which a map search takes no time."""
    values = {"predictor_ns": {"map_search": 0}}
    return derived(load_hardware(name), work, f"{name}-free-search", values, "a free search")


def derived(base: Hardware, work: Path, name: str, values: dict[str, Any], why: str) -> str:
    """Write a profile that differs from ``base`` in ``values``; returns its path."""
    data = base.model_dump(mode="json")
    data["name"] = name
    _replace(data, values, why)
    path = work / "hardware" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return str(path)


def _replace(data: dict[str, Any], values: dict[str, Any], why: str) -> None:
    for field, new in values.items():
        if isinstance(new, dict):
            _replace(data[field], new, why)
            continue
        data[field] = {"value": new, "source": f"what-if: {why}"}


# ---------------------------------------------------------------------- traces


def fewer_fitted(source: Source, count: int, work: Path) -> Source:
    """The same requests judged, but only ``count`` of the others set aside."""
    judged = source.judged
    kept = thinned(source.request_ids, judged, count)
    return _kept(source, kept, work / f"fitted-{count}", len(judged))


def thinned(requests: Sequence[int], judged: Sequence[int], count: int) -> list[int]:
    """``judged``, and ``count`` of the others so placed that a sweep sets just those aside.

    Raises ValueError where too few lie between two judged ones.
    """
    total = count + len(judged)
    fitted = set(set_aside(range(total), share_of(total, len(judged))))
    gaps = _gaps(requests, set(judged))
    wanted = _gaps(range(total), set(range(total)) - fitted)
    chosen = [
        request
        for gap, need in zip(gaps, wanted, strict=True)
        for request in _spread(gap, len(need))
    ]
    return sorted([*chosen, *judged])


def _gaps(requests: Sequence[int], judged: Set[int]) -> list[list[int]]:
    """Requests before, between and after the judged ones."""
    gaps: list[list[int]] = [[]]
    for request in requests:
        if request in judged:
            gaps.append([])
        else:
            gaps[-1].append(request)
    return gaps


def _spread(requests: Sequence[int], count: int) -> list[int]:
    if count > len(requests):
        raise ValueError(f"{count} requests wanted of {len(requests)} between two judged ones")
    return [requests[(2 * i + 1) * len(requests) // (2 * count)] for i in range(count)]


def without_first(source: Source, count: int, work: Path) -> Source:
    """Without its first requests: others are judged, others set aside."""
    return _kept(source, source.request_ids[count:], work / f"split-{count}", None)


def _kept(source: Source, requests: Sequence[int], out: Path, judged: int | None) -> Source:
    if not out.exists():
        subset(source.trace, out, Choice(requests=tuple(requests)))
    return Source(Trace.open(str(out)), str(out), judged)
