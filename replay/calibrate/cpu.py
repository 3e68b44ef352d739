"""Experts on the CPU: their rate, what copies cost them, and what they cost the copies.

One token (for the rate of computing, many) goes through one expert's three matrices at a time, in
bf16 on all cores. The weights lie in the pinned memory that copies read from; each call takes the
next ones, so none is in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs.geometry import load_model_config
from replay.calibrate.compute import train_pairs
from replay.calibrate.link import Link, Train
from replay.calibrate.rig import CalibrationError, Pool, Rig, Sizes, Tensor, Work, spin
from replay.calibrate.stats import Reading, Value, excess, rate, summary

_WARM_UPS = 5
_MANY_TOKENS = 256


@dataclass(frozen=True)
class ExpertShape:
    """One expert: hidden size and width of its three matrices."""

    name: str
    hidden: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices in bf16."""
        return 6 * self.hidden * self.width


def expert_shape(model: str) -> ExpertShape:
    """A shipped model's expert. Raises UserError for an unknown name."""
    config = load_model_config(model).config
    return ExpertShape(model, config.hidden_size, config.expert_intermediate_size)


def expert_work(shape: ExpertShape, pool: Pool, tokens: int = 1) -> Work:
    """One expert for so many tokens, the next one of the pool at each call."""
    hidden, width = shape.hidden, shape.width
    x = torch.randn(tokens, hidden).to(torch.bfloat16)

    def run() -> Tensor:
        weights = pool.piece(shape.nbytes).view(torch.bfloat16)
        up = weights[: 2 * hidden * width].view(2 * width, hidden)
        down = weights[2 * hidden * width :].view(hidden, width)
        gated, plain = F.linear(x, up).chunk(2, dim=1)
        return F.linear(F.silu(gated) * plain, down)

    return Work("cpu_expert", run, nbytes=shape.nbytes, flops=shape.nbytes * tokens)


def expert_times_ns(rig: Rig, work: Work, repeats: int) -> list[int]:
    """Host times of one expert each."""
    for _ in range(_WARM_UPS):
        rig.on_host(work)
    times = []
    for _ in range(repeats):
        start = rig.now_ns()
        rig.on_host(work)
        times.append(rig.now_ns() - start)
    return times


def measure_cpu(rig: Rig, sizes: Sizes, pinned: Pool, link: Link) -> Iterator[Reading]:
    """Rates by model, activations over and back, slow-downs with copies."""
    rates = []
    for model in sizes.models:
        shape = expert_shape(model)
        times = expert_times_ns(rig, expert_work(shape, pinned), sizes.repeats)
        rates.append((rate(shape.nbytes, times), shape))
        how = f"one expert of {model}, {shape.nbytes} bytes in bf16, one token"
        yield Reading(f"cpu_{model}_bytes_per_s", rates[-1][0], "bytes/s", how)
    yield _middle_rate(rates)
    yield _many_tokens(rig, sizes, pinned)
    yield _transfer(rig, sizes)
    shape = ExpertShape("middle", sizes.hidden, sizes.width)
    yield from _beside_copies(rig, sizes, link, expert_work(shape, pinned))


def _middle_rate(rates: list[tuple[Value, ExpertShape]]) -> Reading:
    """The median model's rate; its spread covers the models."""
    middle = sorted(rates, key=lambda pair: pair[0].value)[len(rates) // 2]
    values = [value.value for value, _ in rates]
    spread = max(middle[0].spread, (max(values) - min(values)) / 2)
    names = ", ".join(f"{shape.name} {value.value / 1e9:.1f} GB/s" for value, shape in rates)
    how = f"median of {names}, one token, bf16; the spread covers the models"
    return Reading(
        "cpu_bytes_per_s", Value(middle[0].value, spread, middle[0].repeats), "bytes/s", how
    )


def _many_tokens(rig: Rig, sizes: Sizes, pool: Pool) -> Reading:
    """What the cores compute when the weights are read once for many tokens."""
    shape = ExpertShape("middle", sizes.hidden, sizes.width)
    work = expert_work(shape, pool, _MANY_TOKENS)
    times = expert_times_ns(rig, work, sizes.repeats)
    how = f"one expert of {shape.nbytes} bytes in bf16, {_MANY_TOKENS} tokens"
    return Reading("cpu_flops_per_s", rate(work.flops, times), "flop/s", how)


def _transfer(rig: Rig, sizes: Sizes) -> Reading:
    """One token's activations to the host, and a result back."""
    device = rig.random(1, sizes.hidden).view(torch.uint8).flatten()
    there, back = rig.pinned(device.numel()), rig.pinned(device.numel())
    event = rig.event(timing=False)
    times = []
    for _ in range(sizes.repeats):
        rig.synchronize()
        start = rig.now_ns()
        for dst, src in ((there, device), (device, back)):
            rig.copy(dst, src)
            rig.record(event)
            spin(rig, event)
        times.append(rig.now_ns() - start)
    how = f"{device.numel()} bytes to pinned memory and back, the host polling after each"
    return Reading("cpu_transfer_ns", summary(times), "ns", how)


def _beside_copies(rig: Rig, sizes: Sizes, link: Link, work: Work) -> Iterator[Reading]:
    alone = expert_times_ns(rig, work, sizes.repeats)
    beside: list[int] = []

    def keep_computing(train: Train) -> None:
        while True:
            start = rig.now_ns()
            rig.on_host(work)
            time = rig.now_ns() - start
            if not train.running:
                return
            beside.append(time)

    trains_alone, trains_beside = train_pairs(rig, sizes, link, keep_computing)
    if not beside:
        raise CalibrationError("the copies ended before the first expert beside them")
    alone += expert_times_ns(rig, work, sizes.repeats)
    how = (
        f"an expert of {work.nbytes} bytes at a time on the CPU beside copies of "
        f"{sizes.chunk_bytes} bytes back to back"
    )
    yield Reading("cpu_slowdown", excess(alone, beside), "fraction", how)
    yield Reading("link_slowdown_cpu", excess(trains_alone, trains_beside), "fraction", how)
