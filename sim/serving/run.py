"""Serve a workload on a simulated machine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import policies
from configs.errors import UserError
from configs.files import prepare_directory, refuse_non_empty, write_atomically
from policies.registry import PolicyInfo
from sim.calibrated import CalibratedTiming
from sim.point import (
    Point,
    Setting,
    batch_timing,
    described,
    expert_share,
    inputs_of,
    make_core,
    resolve_point,
)
from sim.serving.arrivals import Coming, coming
from sim.serving.checks import check_run
from sim.serving.config import Service
from sim.serving.machine import Progress, ServedWorkload, Server, ServingMachine, rules_of
from sim.serving.metrics import (
    batches,
    goodput,
    latencies,
    request_frame,
    run_metrics,
    step_frame,
    throughput,
)
from sim.serving.requests import Draw, Request, draw, library
from sim.serving.stage import ServedInputs
from sim.timing import Timing
from tracer.workload import Workload

REQUESTS_FILE, STEPS_FILE, RESULT_FILE = "requests.parquet", "steps.parquet", "result.json"


@dataclass(frozen=True)
class Served:
    """A served run. ``result``: nested, JSON-ready; ``requests``, ``steps``: a row each."""

    result: dict[str, Any]
    requests: pd.DataFrame
    steps: pd.DataFrame

    def write(self, out: Path) -> None:
        """The result and both tables, into a new directory."""
        out.mkdir(parents=True, exist_ok=True)
        self.requests.to_parquet(out / REQUESTS_FILE, index=False)
        self.steps.to_parquet(out / STEPS_FILE, index=False)
        text = json.dumps(self.result, indent=2, allow_nan=False) + "\n"
        write_atomically(out / RESULT_FILE, text.encode())


def serve_point(
    trace: Any,
    point: Point,
    service: Service,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Served:
    """Serve ``service``'s requests, drawn from the trace, with the point's policy and memory.

    ``out``: a new directory for the result; ``progress`` is told how many of how many are answered.
    Raises UserError or PolicyError for what a user can mend, RuntimeError where one of the checks
    of :mod:`sim.serving.checks` does not hold.
    """
    service.check()
    refuse_oracle(point)
    if out is not None:
        refuse_non_empty(out)
    run = _Run(trace, point, service, progress)
    if out is not None:
        prepare_directory(out, "--out")
    served = run.served()
    if out is not None:
        served.write(out)
    return served


class _Run:
    """A run's parts, ready to go."""

    def __init__(
        self, trace: Any, point: Point, service: Service, progress: Progress | None
    ) -> None:
        self._service = service
        self._inputs = inputs_of(ServedInputs, trace, point)
        stage = self._inputs.set_stage(point.touch_order)
        drawn = library(stage.work)
        self._arrivals = coming(service, len(drawn))
        self._drawing = draw(drawn, self._arrivals, service.lengths)
        _refuse_ttft(service, self._drawing)
        self._requests = self._drawing.requests
        workload = served_workload(stage.work, service, self._arrivals, self._requests)
        self._setting = resolve_point(self._inputs, point, workload=workload)
        self._context = workload.max_context
        self._core = make_core(self._inputs, self._setting)
        self._server = Server(self._requests, self._arrivals.start(), workload.rules, progress)
        self._machine = ServingMachine(
            workload,
            self._core,
            _timings(self._setting),
            self._server,
            stage,
            window=point.window,
            # A burst decides ahead of the clock: no place for a policy that asks for the time.
            bursts=not self._setting.info.time_dependent,
        )

    def served(self) -> Served:
        """Run, check, and tell."""
        self._machine.run()
        times = self._machine.times
        little = self._checked()
        frame, steps = request_frame(self._requests), step_frame(times, self._machine.log)
        measured = {
            "requests": len(frame),
            "tokens": {
                "prefill": int(frame["prompt_tokens"].sum()),
                "decode": int(frame["decode_tokens"].sum()),
            },
            **latencies(frame, np.array(self._server.gaps_ns, np.int64)),
            **throughput(frame, steps, self._machine.idle_ns),
            "goodput": goodput(frame, self._service, times.end[-1] / 1e9),
            "batches": batches(steps),
            "kv": self._kv(),
            **run_metrics(self._core.tally, times, steps, self._machine.link.busy_ns),
            "little": little,
            "service": self._service.model_dump(),
            "arrivals": self._arrivals.facts,
            "lengths": self._drawing.lengths,
            "reuse": self._drawing.reuse,
        }
        result = described(self._inputs, self._setting, self._core, measured)
        alike = measured["batches"]["alike_share"]
        result["notes"] += _alike(alike, self._drawing.reuse["trace_requests"])
        return Served(result, frame, steps)

    def _checked(self) -> dict[str, Any]:
        server, machine = self._server, self._machine
        return check_run(
            self._requests,
            server.system,
            server.queue,
            (machine.times.begin, machine.times.end),
            machine.idle_ns,
            server.ledger.rows,
        )

    def _kv(self) -> dict[str, Any]:
        pool, most = self._server.rules.kv_tokens, self._server.ledger.kv_most
        return {
            "pool_tokens": pool,
            "context": self._context,
            "high_water_tokens": most,
            "high_water_share": most / pool,
        }


def _alike(share: float, trace_requests: int) -> list[str]:
    """What to make of steps that held one of the trace's requests more than once."""
    if share == 0:
        return []
    return [
        f"{share:.1%} of the requests in a step had the routing of another there, as the trace has "
        f"{trace_requests}: they share experts more than live ones would; a longer trace has less "
        "of it"
    ]


def refuse_oracle(point: Point) -> None:
    """Raise UserError for a policy that is given the future: here it depends on what it does."""
    info = policies.get(point.policy)
    params, _ = info.parse(point.params)
    for part in info.parts(params):
        if part.oracle:
            raise UserError(_oracle_text(part))


def _oracle_text(info: PolicyInfo) -> str:
    return (
        f"{info.name} knows the steps to come, and here they are formed while time runs, so they "
        f"depend on what it does: choose a causal policy; moesim simulate --policy {info.name} "
        "gives the bound of a trace's own steps"
    )


def _refuse_ttft(service: Service, drawing: Draw) -> None:
    if service.slo_ttft_ms is not None and not drawing.lengths["prefill_in_trace"]:
        raise UserError(
            f"--slo-ttft-ms {service.slo_ttft_ms:g}: the trace has no prefill rows, so no time to "
            "the first token; give --slo-tpot-ms alone, or record prefills"
        )


def served_workload(
    work: Workload, service: Service, arrivals: Coming, requests: list[Request]
) -> ServedWorkload:
    """Sizes of what is served. Raises UserError for a request that can never fit."""
    largest = max(requests, key=lambda request: request.kv_tokens)
    context = service.context or largest.kv_tokens
    kv_tokens = service.kv_tokens or service.batch * context
    for option, limit in (("--context", context), ("--kv-tokens", kv_tokens)):
        if largest.kv_tokens > limit:
            recorded = arrivals.recorded
            where = f" ({recorded.where(largest.index)})" if recorded else ""
            raise UserError(
                f"{option} {limit}: request {largest.index}{where} needs {largest.kv_tokens} "
                f"tokens of KV cache and can never fit; give at least {largest.kv_tokens}"
            )
    rules = rules_of(
        service.batch,
        kv_tokens,
        chunk=service.prefill_chunk,
        step_tokens=service.step_tokens,
        mixed=service.mixed,
        static=service.scheduler == "static",
    )
    longest_prompt = max(request.prompt for request in requests)
    return ServedWorkload(work, rules, context, longest_prompt)


def _timings(setting: Setting) -> Callable[[int], Timing]:
    """Times of batches of so many requests: measured ones differ by size, estimated ones do not.

    Of batches smaller than any that was measured, the smallest.
    """
    timing = setting.timing
    if not isinstance(timing, CalibratedTiming):
        return lambda lines: timing
    share = expert_share(setting.memory, setting.geometry)
    least = timing.smallest_batch

    @functools.cache
    def timing_at(lines: int) -> Timing:
        batch = max(lines, least)
        return batch_timing(setting.point, setting.geometry, setting.hardware, batch, share)

    return timing_at
