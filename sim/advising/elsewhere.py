"""The answer for other engines: which experts to pin, and flags that keep as many on the GPU.

``--n-cpu-moe N`` of llama.cpp keeps the MoE weights of the model's first N layers in the CPU
(https://github.com/ggml-org/llama.cpp/pull/15077); ``--kt-num-gpu-experts N`` of KTransformers in
SGLang is the number of GPU experts of each MoE layer
(https://github.com/kvcache-ai/ktransformers, doc/en/kt-kernel/experts-sched-Tutorial.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.geometry import Geometry
from policies.static import most_popular
from sim.advising.question import Asked
from sim.inputs import Inputs
from tracer.workload import popularity


@dataclass(frozen=True)
class Line:
    """Something to use elsewhere: ``text`` as it is typed there, and what it assumes."""

    tool: str
    text: str
    assumes: str


@dataclass(frozen=True)
class Pins:
    """Experts to keep on the GPU, by model layer.

    ``covered``: share of the accesses that they serve in the very requests that they were counted
    on. ``tokens``: rows counted.
    """

    experts_a_layer: int
    layers: dict[str, list[int]]
    covered_share: float
    counted_tokens: int


def pins_of(asked: Asked, slots: int) -> Pins:
    """The most popular experts of each layer, as the policy ``static`` ranks them.

    Counted on all requests read: those that policies are judged on here are not judged by it.
    """
    question = asked.question
    everyone = Inputs(asked.trace, max_tokens=question.max_tokens, batch=question.batch)
    counts = popularity(everyone.workload())
    chosen = [most_popular(row.tolist(), slots) for row in counts]
    served = sum(int(row[own].sum()) for row, own in zip(counts, chosen, strict=True))
    ids = asked.setting.geometry.model_layer_ids
    return Pins(
        experts_a_layer=slots,
        layers={str(layer): own for layer, own in zip(ids, chosen, strict=True)},
        covered_share=served / int(np.sum(counts)),
        counted_tokens=everyone.workload().num_tokens,
    )


def slots_in(geometry: Geometry, expert_bytes: int) -> int:
    """Whole slots a layer in so many bytes."""
    return min(expert_bytes // sum(geometry.expert_bytes_by_layer), geometry.num_experts)


def cpu_layers(geometry: Geometry, expert_bytes: int) -> int:
    """How many of the model's first layers leave their experts on the CPU, that the rest fit."""
    left = expert_bytes
    first = geometry.num_layers
    pairs = zip(geometry.model_layer_ids, geometry.expert_bytes_by_layer, strict=True)
    for layer, nbytes in reversed(list(pairs)):
        left -= geometry.num_experts * nbytes
        if left < 0:
            return first
        first = layer
    return 0


def lines_for(
    asked: Asked, expert_bytes: int, pins: Pins, policy: str, split_ms: float | None
) -> list[Line]:
    """``policy``: of the answer.

    ``split_ms``: simulated TPOT of ``fiddler`` there, the nearest to both engines, if any.
    """
    geometry = asked.setting.geometry
    memory = f"{expert_bytes / 2**30:.1f} GiB of {geometry.expert_dtype} experts"
    nearest = "moesim has no such policy" + (
        " (the nearest: fiddler, if --policies names it)"
        if split_ms is None
        else f"; the nearest, fiddler, takes {split_ms:.1f} ms a token"
    )
    times = f"; the times above are those of {policy}"
    covered = f"{pins.covered_share * 100:.0f} %"
    return [
        Line("any engine", f"{pins.experts_a_layer} slots a layer", f"{memory} in all{times}"),
        Line(
            "pinned experts (--pin FILE)",
            f"{pins.experts_a_layer} experts a layer, the most popular",
            f"they serve {covered} of the accesses of the {pins.counted_tokens} tokens that they "
            "were counted on; other workloads have other favourites",
        ),
        Line(
            "llama.cpp",
            f"--n-cpu-moe {cpu_layers(geometry, expert_bytes)}",
            f"as many whole layers as {memory} hold stay on the GPU, the first ones on the CPU; "
            f"experts of a GGUF file have other sizes; {nearest}",
        ),
        Line(
            "KTransformers in SGLang",
            f"--kt-num-gpu-experts {pins.experts_a_layer} --kt-expert-placement-strategy frequency",
            "fixed experts, the CPU computes the others; --init-expert-location takes the counts "
            f"of `moesim export sglang-location`; {nearest}",
        ),
    ]
