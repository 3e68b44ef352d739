"""What the engine's Python takes an event, without a GPU.

    python -m tests.bench.host_event

Deciding, landings, refills and slot numbers, for lru on the sample's decode rows with all, half and
a quarter of the experts there. Copies land at once and launches compute nothing, so CUDA's calls
and all waiting are left out: what is left is the least that a host thread in Python takes, however
fast driver and GPU are. CPU time, the best of some runs.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Sequence
from time import process_time
from typing import Any

import numpy as np

import policies
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from policies.transfers import Copy
from replay.driver import Driver, Rows
from sim.inputs import Inputs
from tracer.trace import Trace
from tracer.workload import DECODE

SHARES = (1.0, 0.5, 0.25)
RUNS = 7
WINDOW = 2


class AtOnce:
    """Copies that have landed when the host looks next."""

    cuda = False
    landed_at_ns = 0

    def __init__(self, core: DecisionCore) -> None:
        self.chunks = 0
        self._core = core
        self._under_way: list[Copy] = []

    def refill(self) -> None:
        for _ in range(WINDOW - len(self._under_way)):
            chunk = self._core.next_chunk()
            if chunk is None:
                return
            self._under_way.append(chunk[0])
            self.chunks += 1

    def poll(self) -> bool:
        if not self._under_way:
            return False
        self._core.chunk_done(self._under_way.pop(0))
        return True


class Host:
    """The engine's decode loop around a driver, with nothing behind it."""

    def __init__(self, experts: np.ndarray, num_experts: int, share: float) -> None:
        rows, layers, top_k = experts.shape
        shape = Shape(layers, num_experts, top_k, (1,) * layers)
        info = policies.get("lru")
        params, options = info.parse({})
        built = info.build(params, PolicyData(shape))
        plan = plan_memory(shape, built.scope, int(share * layers * num_experts))
        self._core = DecisionCore(shape, plan, built, options, log=[])
        copies: Any = AtOnce(self._core)
        self._driver = Driver(self._core, copies, "last-use")
        self._experts = experts
        self._num_experts = num_experts
        self._named = bytearray(2 * top_k)
        self._write = struct.Struct(f"<{top_k}h").pack_into
        self.events = rows * layers

    def run(self) -> None:
        nothing: Any = None
        for step, row in enumerate(self._experts):
            self._driver.begin_step(step, "decode", ())
            for layer, ids in enumerate(row):
                self._driver.wait(layer)
                self._event(layer, ids[None], nothing)
            self._driver.end_step(())

    def _event(self, layer: int, ids: np.ndarray, nothing: Any) -> None:
        flat = ids.reshape(-1).tolist()
        base, slot_of = layer * self._num_experts, self._core.memory.slot_of

        def launch(keys: Sequence[int]) -> None:
            chosen = {key - base: slot_of[key] for key in keys}
            self._write(self._named, 0, *[chosen.get(expert, -1) for expert in flat])

        self._driver.event(layer, ids, launch, Rows(nothing, nothing, ids))


def event_us(host: Host, runs: int = RUNS) -> float:
    """CPU time an event, us: the best of some runs, after one that fills the cache."""
    host.run()
    gc.collect()
    gc.disable()
    taken = []
    try:
        for _ in range(runs):
            began = process_time()
            host.run()
            taken.append(process_time() - began)
    finally:
        gc.enable()
    return min(taken) / host.events * 1e6


def main() -> None:
    inputs = Inputs(Trace.open("sample"))
    work = inputs.workload()
    experts = work.experts[work.phase_of_row == DECODE].astype(np.int64)
    for share in SHARES:
        host = Host(experts, work.num_experts, share)
        print(f"{share:.0%} of the experts there: {event_us(host):.1f} us an event")


if __name__ == "__main__":
    main()
