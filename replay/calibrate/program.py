"""All measurements in order, in parts that can also run alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from configs.errors import UserError
from configs.hardware import CurvePoint
from replay.calibrate.compute import experts, measure_memory, measure_slowdown, segment
from replay.calibrate.cpu import measure_cpu
from replay.calibrate.host import (
    measure_decision,
    measure_issue,
    measure_launches,
    measure_pinning,
    measure_readback,
)
from replay.calibrate.link import Link, measure_link
from replay.calibrate.predictor import measure_predictors
from replay.calibrate.rig import Pool, Rig, Sizes, fill
from replay.calibrate.stats import Reading
from tracer.trace import Trace

PARTS = {
    "link": "copies by size and kind, and the fit",
    "memory": "GPU memory and matrix products",
    "host": "launches, hand-over, readback, decision, pinning",
    "slowdown": "decode-like kernels beside copies",
    "cpu": "experts on the CPU",
    "predictors": "time until a prediction is there",
}

_READBACK_LAYERS = 4


@dataclass
class Bench:
    """What the parts share: a rig, a pinned pool, graphs of decode-like work (made when asked)."""

    rig: Rig
    sizes: Sizes
    pinned: Pool

    @cached_property
    def link(self) -> Link:
        return Link(self.rig, self.sizes, self.pinned)

    @cached_property
    def segments(self) -> Any:
        return self.rig.capture(segment(self.rig, self.sizes, self.sizes.segment_layers))

    @cached_property
    def groups(self) -> Any:
        return self.rig.capture(experts(self.rig, self.sizes, self.sizes.expert_layers))


def measure(rig: Rig, sizes: Sizes, parts: Sequence[str]) -> Iterator[str | Reading | CurvePoint]:
    """Run the parts, each announced by its title; readings come as they are made."""
    with _pool(rig, sizes) as pinned:
        bench = Bench(rig, sizes, pinned)
        for part in parts:
            yield f"{part}: {PARTS[part]}"
            yield from _part(part, bench)


def parse_parts(text: str | None) -> list[str]:
    """Parts named in a comma-separated list, in their own order; all without one.

    Raises UserError for an unknown one.
    """
    if text is None:
        return list(PARTS)
    wanted = [word.strip() for word in text.split(",")]
    unknown = [word for word in wanted if word not in PARTS]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is no part; known: {', '.join(PARTS)}")
    return [part for part in PARTS if part in wanted]


@contextmanager
def _pool(rig: Rig, sizes: Sizes) -> Iterator[Pool]:
    """Pinned as the replay pins its experts; unpinned before its memory goes."""
    buffer = rig.pageable(sizes.pool_bytes)
    fill(buffer)
    rig.register(buffer)
    try:
        yield Pool(buffer)
    finally:
        rig.synchronize()
        rig.unregister(buffer)


def _part(part: str, bench: Bench) -> Iterator[Reading | CurvePoint]:
    rig, sizes, pinned = bench.rig, bench.sizes, bench.pinned
    if part == "link":
        yield from measure_link(rig, sizes, bench.link, bench.segments)
    elif part == "memory":
        yield from measure_memory(rig, sizes)
    elif part == "host":
        yield from _host(bench)
    elif part == "slowdown":
        yield from measure_slowdown(rig, sizes, bench.link, bench.segments, bench.groups)
    elif part == "cpu":
        yield from measure_cpu(rig, sizes, pinned, bench.link)
    else:
        yield from measure_predictors(rig, sizes)


def _host(bench: Bench) -> Iterator[Reading]:
    rig, sizes = bench.rig, bench.sizes
    one = rig.capture(segment(rig, sizes, 1))
    group = rig.capture(experts(rig, sizes, 1))
    yield from measure_launches(rig, sizes, one, group)
    yield from measure_issue(rig, sizes, bench.pinned)
    few = rig.capture(segment(rig, sizes, _READBACK_LAYERS))
    yield from measure_readback(rig, sizes, few)
    yield from measure_decision(Trace.open("sample"), sizes, rig.now_ns)
    yield from measure_pinning(rig, sizes)
