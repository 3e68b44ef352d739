"""A server with a timing of constants, for tests that work times out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import policies
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from sim.serving import Served, serve
from sim.serving.arrivals import Closed, Open, Source
from sim.serving.checks import check_run
from sim.serving.machine import ServedWorkload, Server, ServingMachine
from sim.serving.requests import Request, library
from sim.serving.schedule import Rules
from sim.serving.stage import Stage
from tests.machines import FlatTiming
from tracer.workload import Workload

#: A step under ``FlatTiming()`` with one layer and everything resident: 100 + 10 + 50 ns.
STEP = 160


@dataclass
class RowTiming(FlatTiming):
    """Steps take longer by row and by request."""

    by_row: int = 7
    by_request: int = 1000

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        return self.segment + self.by_row * tokens + self.by_request * requests


def workload(
    lengths: Sequence[tuple[int, int]], *, layers: int = 1, experts: int = 4, top_k: int = 1
) -> Workload:
    """Requests of (prompt, decode) rows with random routing, one after the other."""
    rng = np.random.default_rng(5)
    request, step, phase, position = [], [], [], []
    now = 0
    for name, (prompt, decode) in enumerate(lengths):
        rows = prompt + decode
        request += [name] * rows
        phase += [0] * prompt + [1] * decode
        position += list(range(rows))
        begins = now + (1 if prompt else 0)
        step += [now] * prompt + list(range(begins, begins + decode))
        now = begins + decode
    drawn = rng.random((len(request), layers, experts))
    columns: dict[str, Any] = {
        "request": np.array(request, np.int32),
        "step": np.array(step, np.int32),
        "phase": np.array(phase, np.uint8),
        "position": np.array(position, np.int32),
        "experts": np.argsort(drawn, -1)[..., :top_k].astype(np.int16),
    }
    return Workload(columns, experts)


def run(
    work: Workload,
    source: Source,
    count: int,
    *,
    rules: Rules | None = None,
    timing: FlatTiming | None = None,
    policy: str = "resident",
    slots: int | None = None,
    timing_at: Any = None,
) -> Any:
    """Serve ``count`` requests; returns requests, machine, server and Little's figures."""
    rules = rules or Rules(batch=1, kv_tokens=10**6)
    timing = timing or FlatTiming()
    stage = Stage(work)
    drawn = library(work)
    requests = []
    for index in range(count):
        each = drawn[index % len(drawn)]
        prompt, decode = len(each.prefill_rows), len(each.decode_rows)
        requests.append(Request(index, each, prompt, decode))
    shape = Shape(work.num_layers, work.num_experts, work.top_k, (1000,) * work.num_layers)
    info = policies.get(policy)
    values, options = info.parse({})
    built = info.build(values, PolicyData(shape))
    budget = (slots or work.num_experts) * work.num_layers * 1000
    core = DecisionCore(shape, plan_memory(shape, built.scope, budget), built, options, log=[])
    server = Server(requests, source, rules)
    longest = max(request.prompt for request in requests)
    served = ServedWorkload(work, rules, work.max_context, longest)
    machine = ServingMachine(served, core, timing_at or (lambda lines: timing), server, stage)
    machine.run()
    little = check_run(
        requests,
        server.system,
        server.queue,
        (machine.times.begin, machine.times.end),
        machine.idle_ns,
        server.ledger.rows,
    )
    return SimpleNamespace(requests=requests, machine=machine, server=server, little=little)


def at(*times_ns: int) -> Open:
    """Open arrivals."""
    return Open(np.array(times_ns, np.int64))


def users(number: int, think_ns: int, count: int) -> Closed:
    """Closed arrivals."""
    return Closed(number, think_ns, count)


def azure_hour(shared: str | Path) -> Served:
    """The whole recorded hour of Azure conversations, lengths scaled to the sample trace's."""
    path = Path(shared) / "requests" / "azure_AzureLLMInferenceTrace_conv.csv"
    return serve(
        "sample",
        policy="lru",
        hardware="h200-pcie5",
        geometry="olmoe-1b-7b",
        budget="12GiB",
        arrivals=str(path),
        lengths="scaled",
        batch=16,
    )


def all_of(ran: Any, name: str) -> list[int]:
    """One of the requests' times."""
    return [getattr(request, name) for request in ran.requests]
