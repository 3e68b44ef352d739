"""How fast the decode kernels read weights from slots, by the block that a program reads.

    python -m tests.bench_kernels --geometry gpt-oss-20b [--out FILE.json]

Slots go around a pool of 64 experts, many times larger than a GPU's L2 cache, so weights come from
memory. A CUDA graph holds a launch for every slot; times are of the graph, divided by its launches,
medians of interleaved rounds. GB/s count the bytes of the matrix, for one expert a launch and for
top-k. The best choice goes into ``replay.kernels.DECODE_BLOCKS``.

Without a GPU (``--device cpu``, ``TRITON_INTERPRET=1``) it rehearses: a few blocks on small
matrices, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.files import write_atomically
from configs.units import parse_bytes
from replay.kernels import DECODE_BLOCKS, Block, GatedExperts, gated_experts
from replay.layout import layout_of
from replay.published import transformers_config
from replay.skeleton import experts_modules, meta_model
from replay.slots import SlotPool

SLOTS = 64
ROUNDS = 15
L2_BYTES = parse_bytes("64MiB")  # no GPU known here has more
_ALONG_INPUTS = ((4, 8, 16), (256, 512, 1024))
_REHEARSAL_SLOTS = 8
_REHEARSAL = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}


def candidates(kernel: GatedExperts, first: bool) -> list[Block]:
    """What is tried, today's choice first. ``first``: of the first product."""
    today = DECODE_BLOCKS[kernel.transposed][0 if first else 1]
    rows, columns = ((16, 32, 64), (16, 32, 64, 128)) if kernel.transposed else _ALONG_INPUTS
    tried = [today, *(Block(*size) for size in product(rows, columns, (4,)))]
    tried += [Block(*size, defer=True) for size in product(rows, columns, (4, 8))]
    if first and kernel.interleaved:
        tried += [replace(block, paired=True) for block in tried]
    return list(dict.fromkeys(tried))


class Bench:
    """Kernels of a geometry over a pool of slots."""

    def __init__(self, config: Any, device: str, slots: int) -> None:
        module = next(iter(experts_modules(meta_model(config, torch.bfloat16)).values()))
        text = config.get_text_config()
        self.top_k = getattr(text, "num_experts_per_tok", None) or text.num_experts_per_token
        self.cuda = device == "cuda"
        self.slots = slots
        pool = SlotPool(layout_of(module), slots, torch.device(device))
        for view in pool.views.values():
            view.normal_(std=0.02)
        kernel = gated_experts(module, pool.views)
        if kernel is None:
            raise SystemExit(f"{type(module).__name__}: no kernel of ours computes it")
        self.kernel = kernel
        like = {"dtype": torch.bfloat16, "device": device}
        self._hidden = torch.randn((1, kernel.width), **like)
        self._act = torch.randn((self.top_k, kernel.inner), **like)
        self._out = torch.empty((self.top_k, kernel.width), **like)

    def weight_bytes(self, first: bool) -> int:
        """Of one expert's matrix."""
        weight = self.kernel.gate_up if first else self.kernel.down
        return weight[0].numel() * weight.itemsize

    def cold(self, first: bool) -> bool:
        """Whether the pool's matrices are too many for a cache."""
        return self.slots * self.weight_bytes(first) > 4 * L2_BYTES

    def launches(self, first: bool, block: Block, experts: int) -> Callable[[], int]:
        """Reads every slot of the pool, ``experts`` a launch; returns how many launches."""
        count = self.slots // experts
        named = np.full((count, self.top_k), -1, np.int16)
        named[:, :experts] = np.arange(count * experts).reshape(-1, experts)
        slots = torch.from_numpy(named).to(self._hidden.device)

        def run() -> int:
            for row in slots:
                if first:
                    self.kernel.launch_up(self._hidden, row, self._act, block)
                else:
                    self.kernel.launch_down(self._act, row, self._out, block)
            return len(slots)

        return run

    def captured(self, run: Callable[[], int]) -> Callable[[], float]:
        """Gives seconds a launch."""
        if not self.cuda:
            return lambda: _host_seconds(run)
        count = run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return lambda: _device_seconds(graph) / count


def _host_seconds(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = run()
    return (time.perf_counter() - began) / count


def _device_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(bench: Bench, first: bool, blocks: list[Block], rounds: int) -> Iterator[dict]:
    """Times of every block, for one expert a launch and for top-k, best top-k first."""
    counts = (1, bench.top_k)
    timers = [[bench.captured(bench.launches(first, b, n)) for n in counts] for b in blocks]
    taken: list[list[list[float]]] = [[[] for _ in counts] for _ in blocks]
    for _ in range(rounds):
        for row, samples in zip(timers, taken, strict=True):
            for timer, into in zip(row, samples, strict=True):
                into.append(timer())
    nbytes = bench.weight_bytes(first)
    medians = [[float(np.median(each)) for each in samples] for samples in taken]
    for at in sorted(range(len(blocks)), key=lambda index: medians[index][1]):
        one, many = medians[at]
        low, high = np.percentile(taken[at][1], [10, 90])
        yield {
            **asdict(blocks[at]),
            "today": at == 0,
            "one_us": one * 1e6,
            "one_gb_per_s": nbytes / one / 1e9,
            "top_k_us": many * 1e6,
            "top_k_us_p10_p90": [float(low) * 1e6, float(high) * 1e6],
            "top_k_gb_per_s": bench.top_k * nbytes / many / 1e9,
        }


def table(name: str, found: list[dict], most: int = 12) -> Iterator[str]:
    """The best, and today's choice wherever it stands."""
    yield f"{name}: rows x columns, warps | 1 expert: us, GB/s | top-k: us (p10 to p90), GB/s"
    for rank, each in enumerate(found):
        if rank >= most and not each["today"]:
            continue
        flags = [flag for flag in ("defer", "paired", "today") if each[flag]]
        low, high = each["top_k_us_p10_p90"]
        yield (
            f"  {rank + 1:3} {each['rows']:4} x {each['columns']:4}, {each['warps']} | "
            f"{each['one_us']:8.2f} {each['one_gb_per_s']:7.0f} | "
            f"{each['top_k_us']:8.2f} ({low:.2f} to {high:.2f}) {each['top_k_gb_per_s']:7.0f}  "
            + " ".join(flags)
        )


def small(config: Any) -> Any:
    """The same architecture with tiny experts, for a rehearsal."""
    for name, value in _REHEARSAL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="olmoe-1b-7b", help="name in configs/models")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="JSON file, new")
    options = parser.parse_args(argv)
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists: name another file")
    cuda = options.device == "cuda"
    config = transformers_config(options.geometry)
    slots = SLOTS if cuda else _REHEARSAL_SLOTS
    bench = Bench(config if cuda else small(config), options.device, slots)
    told: dict[str, Any] = {
        "geometry": options.geometry,
        "device": torch.cuda.get_device_name() if cuda else "cpu: a rehearsal, times mean nothing",
        "torch": torch.__version__,
        "transposed": bench.kernel.transposed,
        "interleaved": bench.kernel.interleaved,
        "top_k": bench.top_k,
        "slots": slots,
    }
    print(json.dumps(told))
    for name, first in (("up", True), ("down", False)):
        if cuda and not bench.cold(first):
            print(f"{name}: {slots} matrices may stay in L2: GB/s are too good")
        blocks = candidates(bench.kernel, first)
        if not cuda:
            blocks = [replace(block, rows=8, columns=32) for block in blocks[:1] + blocks[-1:]]
        told[name] = list(measure(bench, first, blocks, ROUNDS if cuda else 1))
        print("\n".join(table(name, told[name])), flush=True)
    if options.out is not None:
        write_atomically(options.out, (json.dumps(told, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
