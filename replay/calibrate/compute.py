"""The GPU: memory bandwidth, matrix products, decode-like work, and what copies cost it.

Decode-like work is a chain of the kernels that a decode step runs, in a CUDA graph: :func:`segment`
(norm, projections, gate, top-k; attention left out) and :func:`experts` (the top-k experts' three
matrices). Its weights are larger than any GPU's cache, and each layer has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from replay.calibrate.link import Link
from replay.calibrate.rig import CalibrationError, Rig, Sizes, Tensor, Work, device_ns, spin
from replay.calibrate.stats import Reading, excess, rate, summary


def segment(rig: Rig, sizes: Sizes, layers: int) -> Work:
    """So many layers from after the experts to the gate, for one token; gives expert ids."""
    hidden = sizes.hidden
    state = rig.random(1, hidden)
    norm = rig.random(hidden)
    qkv = [rig.random(3 * hidden, hidden) for _ in range(layers)]
    out = [rig.random(hidden, hidden) for _ in range(layers)]
    gate = [rig.random(sizes.experts, hidden) for _ in range(layers)]

    def run() -> Tensor:
        x, ids = state, None
        for layer in range(layers):
            projected = F.linear(F.rms_norm(x, (hidden,), norm), qkv[layer])
            x = x + F.linear(projected[:, :hidden], out[layer])
            logits = F.linear(F.rms_norm(x, (hidden,), norm), gate[layer])
            ids = logits.float().softmax(-1).topk(sizes.top_k).indices
        assert ids is not None
        return ids

    weights = layers * (4 * hidden + sizes.experts) * hidden
    return Work("segment", run, nbytes=2 * weights, flops=2 * weights)


def experts(rig: Rig, sizes: Sizes, layers: int) -> Work:
    """So many layers' top-k experts, for one token."""
    hidden, width, k = sizes.hidden, sizes.width, sizes.top_k
    state = rig.random(1, hidden, 1)
    up = [rig.random(k, 2 * width, hidden) for _ in range(layers)]
    down = [rig.random(k, hidden, width) for _ in range(layers)]

    def run() -> Tensor:
        x = state
        for layer in range(layers):
            gated, plain = torch.bmm(up[layer], x.expand(k, hidden, 1)).chunk(2, dim=1)
            x = torch.bmm(down[layer], F.silu(gated) * plain).sum(0, keepdim=True)
        return x

    weights = layers * k * 3 * hidden * width
    return Work("experts", run, nbytes=2 * weights, flops=2 * weights)


def measure_memory(rig: Rig, sizes: Sizes) -> Iterator[Reading]:
    """Size and bandwidth of the GPU's memory, rate of matrix products."""
    total = float(rig.facts().gpu_memory_bytes)
    yield Reading("gpu_memory_bytes", summary([total]), "bytes", "what CUDA reports")
    read = _read(rig, sizes)
    times = device_ns(rig, lambda read=read: rig.run(read), sizes.repeats)  # type: ignore[misc]
    how = f"one token times a matrix of {sizes.read_rows} x {sizes.read_columns}, bytes read"
    yield Reading("gpu_bytes_per_s", rate(read.nbytes, times), "bytes/s", how)
    del read
    copy = _copy(rig, sizes)
    times = device_ns(rig, lambda copy=copy: rig.run(copy), sizes.repeats)  # type: ignore[misc]
    how = f"copy within the GPU, {copy.nbytes} bytes read and written"
    yield Reading("gpu_copy_bytes_per_s", rate(copy.nbytes, times), "bytes/s", how)
    del copy
    chain = _chain(rig, sizes)
    graph = rig.capture(chain)
    times = device_ns(rig, lambda: rig.launch(graph), sizes.repeats)
    how = f"a CUDA graph of matrix-vector products, {chain.nbytes} bytes read in all"
    yield Reading("gpu_gemv_chain_bytes_per_s", rate(chain.nbytes, times), "bytes/s", how)
    product = _product(rig, sizes)
    times = device_ns(rig, lambda: rig.run(product), sizes.repeats)
    dtype = str(rig.dtype).removeprefix("torch.")
    how = f"product of two {sizes.gemm} x {sizes.gemm} matrices of random {dtype}"
    yield Reading("gpu_flops_per_s", rate(product.flops, times), "flop/s", how)


def _read(rig: Rig, sizes: Sizes) -> Work:
    matrix = rig.random(sizes.read_rows, sizes.read_columns)
    x = rig.random(1, sizes.read_columns)
    return Work("read", lambda: F.linear(x, matrix), 2 * matrix.numel(), 2 * matrix.numel())


def _copy(rig: Rig, sizes: Sizes) -> Work:
    source = rig.random(sizes.read_rows, sizes.read_columns)
    target = torch.empty_like(source)
    return Work("copy", lambda: target.copy_(source), 4 * source.numel())


def _chain(rig: Rig, sizes: Sizes) -> Work:
    """Matrix-vector products of a decode step's size, one after another."""
    size = 2 * sizes.hidden
    matrices = [rig.random(size, size) for _ in range(2 * sizes.segment_layers)]
    state = rig.random(1, size)

    def run() -> Tensor:
        x = state
        for matrix in matrices:
            x = F.linear(x, matrix)
        return x

    weights = sum(matrix.numel() for matrix in matrices)
    return Work("gemv_chain", run, 2 * weights, 2 * weights)


def _product(rig: Rig, sizes: Sizes) -> Work:
    left, right = rig.random(sizes.gemm, sizes.gemm), rig.random(sizes.gemm, sizes.gemm)
    return Work("gemm", lambda: left @ right, 6 * sizes.gemm**2, 2 * sizes.gemm**3)


def measure_slowdown(
    rig: Rig, sizes: Sizes, link: Link, segments: Any, group: Any
) -> Iterator[Reading]:
    """What copies cost decode-like work, and it them. ``segments``, ``group``: captured graphs."""
    for name, graph in (("segment_slowdown", segments), ("experts_slowdown", group)):
        alone, beside = _pairs(rig, sizes, link, graph)
        how = (
            f"a CUDA graph of {name.split('_')[0]}-like kernels beside copies of "
            f"{sizes.chunk_bytes} bytes, alone and beside in turn"
        )
        yield Reading(name, excess(alone, beside), "fraction", how)
    alone, beside = train_pairs(rig, sizes, link, lambda train: _keep_busy(rig, segments, train))
    how = f"copies of {sizes.chunk_bytes} bytes back to back, alone and beside segments in turn"
    yield Reading("link_slowdown_gpu", excess(alone, beside), "fraction", how)


def _pairs(rig: Rig, sizes: Sizes, link: Link, graph: Any) -> tuple[list[float], list[float]]:
    """Device times of a graph alone and while copies run, in turn."""
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(sizes.repeats):
        alone += device_ns(rig, lambda: rig.launch(graph), 1)
        train = link.train(sizes.chunk_bytes, sizes.train)
        time = device_ns(rig, lambda: rig.launch(graph), 1)
        if train.running:
            beside += time
        train.wait_ns()
    if 2 * len(beside) < sizes.repeats:
        raise CalibrationError("the copies ended before the work beside them")
    return alone, beside


def train_pairs(
    rig: Rig, sizes: Sizes, link: Link, work: Callable[[Any], object]
) -> tuple[list[float], list[float]]:
    """Device times of a train of copies alone and while `work(train)` runs until its end.

    The first quarter is not counted, since the work starts once the train is handed over.
    """
    skip = sizes.train // 4
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(sizes.repeats):
        alone.append(link.train(sizes.chunk_bytes, sizes.train, skip).wait_ns())
        train = link.train(sizes.chunk_bytes, sizes.train, skip)
        work(train)
        beside.append(train.wait_ns())
    return alone, beside


def _keep_busy(rig: Rig, graph: Any, train: Any) -> None:
    """The GPU always has the next graph before the one under way ends."""
    ends = [rig.event(timing=False) for _ in range(3)]
    for end in ends:
        rig.launch(graph)
        rig.record(end)
    while train.running:
        spin(rig, ends[0])
        rig.launch(graph)
        rig.record(ends[0])
        ends.append(ends.pop(0))
    spin(rig, ends[-1])
