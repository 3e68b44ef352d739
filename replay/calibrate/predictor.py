"""How long predictors take: from their start until the host has the predicted ids.

Sizes only: the weights are random. Where a predictor could run on either side, the faster one is
kept and both are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from replay.calibrate.rig import Rig, Sizes, Tensor, Work, spin
from replay.calibrate.stats import Reading, Value, summary


def next_gate(rig: Rig, sizes: Sizes) -> Work:
    """The gate of a later layer on this layer's input."""
    x, gate = rig.random(1, sizes.hidden), rig.random(sizes.experts, sizes.hidden)

    def run() -> Tensor:
        return F.linear(x, gate).topk(sizes.top_k).indices

    return Work("next_gate", run, 2 * gate.numel())


def learned(x: Tensor, first: Tensor, second: Tensor, top_k: int) -> Work:
    """Two layers and top-k, wherever the tensors lie."""

    def run() -> Tensor:
        return F.linear(F.relu(F.linear(x, first)), second).topk(top_k).indices

    nbytes = (first.numel() + second.numel()) * first.element_size()
    return Work("learned", run, nbytes)


def map_search(rig: Rig, sizes: Sizes) -> Work:
    """The nearest of recorded expert maps by cosine, and the best experts in its last E places."""
    maps, query = rig.random(sizes.maps, sizes.map_length), rig.random(sizes.map_length)
    norms = maps.float().norm(dim=1)

    def run() -> Tensor:
        best = (torch.mv(maps, query) / norms).argmax().view(1)
        row = maps.index_select(0, best)
        return row[:, -sizes.experts :].topk(sizes.top_k).indices

    return Work("map_search", run, 2 * maps.numel())


def measure_predictors(rig: Rig, sizes: Sizes) -> Iterator[Reading]:
    """The three predictors of a hardware profile; the learned one on both sides."""
    size = f"gate of {sizes.hidden} x {sizes.experts}"
    yield _reading(
        "predictor_ns.next_gate",
        _on_gpu(rig, next_gate(rig, sizes), sizes.repeats),
        f"{size}, top-k and readback, on the GPU in a CUDA graph",
    )
    yield from _learned(rig, sizes)
    how = f"cosine over {sizes.maps} maps of {sizes.map_length} values, top-k and readback"
    time = _on_gpu(rig, map_search(rig, sizes), sizes.repeats)
    yield _reading("predictor_ns.map_search", time, f"{how}, on the GPU in a CUDA graph")


def _learned(rig: Rig, sizes: Sizes) -> Iterator[Reading]:
    hidden, width, out = sizes.hidden, sizes.predictor_width, sizes.experts
    x, first, second = rig.random(1, hidden), rig.random(width, hidden), rig.random(out, width)
    on_gpu = _on_gpu(rig, learned(x, first, second, sizes.top_k), sizes.repeats)
    on_cpu = _on_cpu(rig, x, first.float().cpu(), second.float().cpu(), sizes)
    how = f"two layers {hidden} x {width} x {out}, top-k"
    sides = {
        "gpu": (on_gpu, f"{how} and readback, on the GPU in a CUDA graph"),
        "cpu": (on_cpu, f"input to the host, {how}, on the CPU in float32"),
    }
    for side, (time, what) in sides.items():
        yield _reading(f"learned_{side}_ns", time, what)
    side, (time, what) = min(sides.items(), key=lambda item: item[1][0].value)
    other = "cpu" if side == "gpu" else "gpu"
    slower = f"on the {other.upper()} {sides[other][0].value:.0f} ns"
    yield _reading("predictor_ns.learned", time, f"{what} ({slower})")


def _on_gpu(rig: Rig, work: Work, repeats: int) -> Value:
    graph = rig.capture(work)
    ids = graph.output
    host = rig.pinned(ids.numel() * ids.element_size()).view(ids.dtype).view(ids.shape)
    event = rig.event(timing=False)

    def predict() -> None:
        rig.launch(graph)
        rig.copy(host, ids)
        rig.record(event)
        spin(rig, event)

    return _timed(rig, predict, repeats)


def _on_cpu(rig: Rig, x: Tensor, first: Tensor, second: Tensor, sizes: Sizes) -> Value:
    """The input is read back first, as the gate's ids are."""
    host = rig.pinned(x.numel() * x.element_size()).view(x.dtype).view(x.shape)
    event = rig.event(timing=False)
    size = second.numel() + first.numel()

    def run() -> Tensor:
        return learned(host.float(), first, second, sizes.top_k).run()

    work = Work("learned", run, 4 * size)

    def predict() -> None:
        rig.copy(host, x)
        rig.record(event)
        spin(rig, event)
        rig.on_host(work)

    return _timed(rig, predict, sizes.repeats)


def _timed(rig: Rig, predict: Callable[[], None], repeats: int) -> Value:
    times = []
    for turn in range(repeats + 5):
        rig.synchronize()
        start = rig.now_ns()
        predict()
        if turn >= 5:
            times.append(rig.now_ns() - start)
    return summary(times)


def _reading(name: str, time: Value, how: str) -> Reading:
    return Reading(name, time, "ns", how)
