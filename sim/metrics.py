"""From a run to numbers: latencies as vLLM's benchmarks name them, hits, bytes, time by cause."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.interface import Counters, Tally
from sim.machine import StepTimes
from tracer.workload import DECODE, Workload

_NS_PER_MS = 1e6
Summary = dict[str, float | None]


def summary(values_ms: npt.NDArray[np.float64]) -> Summary:
    """Mean, median and tail; all None where there is nothing to average."""
    if len(values_ms) == 0:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(values_ms, [50, 90, 99])
    return {
        "mean": float(values_ms.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
    }


def latencies(workload: Workload, times: StepTimes) -> dict[str, Summary]:
    """ttft, tpot, e2el by request and itl by token, ms.

    A prefill yields a request's first token, each decode row one more. A request recorded without
    its prefill has no ttft; its tpot is its decoding time over its tokens.
    """
    begin = np.array(times.begin, np.int64)
    end = np.array(times.end, np.int64)
    pairs, phase = _request_steps(workload)
    request, step = pairs[:, 0], pairs[:, 1]
    first = np.concatenate(([True], request[1:] != request[:-1]))
    previous_end = np.where(first, begin[step], np.concatenate(([0], end[step][:-1])))
    decode = phase == DECODE
    itl = (end[step] - previous_end)[decode] / _NS_PER_MS
    starts = np.flatnonzero(first)
    stops = np.append(starts[1:], len(request))
    ttft, tpot, e2el = [], [], []
    for lo, hi in zip(starts.tolist(), stops.tolist(), strict=True):
        decoded = int(decode[lo:hi].sum())
        total = int(end[step[hi - 1]] - begin[step[lo]])
        before = hi - lo - decoded
        token = int(end[step[lo + before - 1]] - begin[step[lo]]) if before else 0
        e2el.append(total)
        if before:
            ttft.append(token)
        if decoded:
            tpot.append((total - token) / decoded)
    as_ms = {
        "ttft_ms": np.array(ttft, np.float64) / _NS_PER_MS,
        "tpot_ms": np.array(tpot, np.float64) / _NS_PER_MS,
        "itl_ms": itl,
        "e2el_ms": np.array(e2el, np.float64) / _NS_PER_MS,
    }
    return {name: summary(values) for name, values in as_ms.items()}


def _request_steps(workload: Workload) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(request, step) pairs in order of request, then step, and each pair's phase."""
    rows = np.stack((workload.request_of_row, workload.step_of_row), axis=1).astype(np.int64)
    pairs, where = np.unique(rows, axis=0, return_index=True)
    return pairs, workload.phase_of_row[where]


def counts(tally: Tally, phase: str) -> dict[str, Any]:
    """Hits, late and missed accesses of one phase, in all and by cold and steady stage."""
    stages = {stage: counters for (own, stage), counters in tally.buckets.items() if own == phase}
    total = Counters()
    for counters in stages.values():
        for field in fields(Counters):
            name = field.name
            setattr(total, name, getattr(total, name) + getattr(counters, name))
    result = _counts(total)
    for stage in ("cold", "steady"):
        result[stage] = _counts(stages.get(stage, Counters()))
    return result


def _counts(counters: Counters) -> dict[str, Any]:
    """Of a lossy policy the hit rate is of the experts that the gate asked for."""
    lossy = counters.asked > 0
    of = counters.asked if lossy else counters.accesses
    return {
        "accesses": counters.accesses,
        "asked": of,
        "hits": counters.hits,
        "late": counters.late,
        "late_copying": counters.late_copying,
        "late_queued": counters.late_queued,
        "misses": counters.misses,
        "hit_rate": (counters.asked_hits if lossy else counters.hits) / of if of else None,
        "hit_bytes": counters.hit_bytes,
        "cpu": counters.cpu,
        "events": counters.events,
        "waves": counters.waves,
    }


def quality(tally: Tally, phase: str) -> dict[str, float | None]:
    """What a lossy policy changed: shares of experts and of gate weight; None for lossless ones.

    Estimated from the recorded routing: what it does to the model's output is not known here.
    """
    mine = [counters for (own, _), counters in tally.buckets.items() if own == phase]
    asked = sum(counters.asked for counters in mine)
    mass = sum(counters.gate_mass for counters in mine)
    changed = sum(counters.changed for counters in mine)
    low = sum(counters.low_mass for counters in mine)
    lost = sum(counters.lost_mass for counters in mine)
    return {
        "changed_share": changed / asked if asked else None,
        "low_mass_share": low / mass if mass else None,
        "lost_mass_share": lost / mass if mass else None,
        "retained_mass_share": 1 - lost / mass if mass else None,
    }


def breakdown_ms(workload: Workload, times: StepTimes) -> dict[str, float | None]:
    """Mean time of a decode step by where it went; the parts sum to the step."""
    return breakdown_of(np.array([step.prefill_tokens == 0 for step in workload.steps()]), times)


def breakdown_of(decode: npt.NDArray[np.bool_], times: StepTimes) -> dict[str, float | None]:
    """As :func:`breakdown_ms`. ``decode`` [steps]: steps without a prefill row."""
    names = ("segments", "experts", "stall_late", "stall_miss", "stall_cpu")
    if not decode.any():
        return dict.fromkeys(("host", *names))
    step_ns = np.array(times.end, np.int64) - np.array(times.begin, np.int64)
    parts = {name: np.array(getattr(times, name), np.int64) for name in names}
    host = step_ns - sum(parts.values())
    return {
        name: float(values[decode].mean()) / _NS_PER_MS
        for name, values in {"host": host, **parts}.items()
    }


def transfers(tally: Tally) -> dict[str, Any]:
    """What prefetching brought, and what was evicted."""
    started = tally.prefetch_started
    return {
        "issued": tally.prefetch_issued,
        "started": started,
        "used": tally.prefetch_used,
        "cancelled": tally.prefetch_cancelled,
        "dropped": tally.prefetch_dropped,
        "wasted_bytes": tally.wasted_prefetch_bytes,
        "useful_share": tally.prefetch_used / started if started else None,
        "precision": tally.predicted_right / tally.predicted if tally.predicted else None,
        "recall": tally.predicted_right / tally.predictable if tally.predictable else None,
    }


def collect(
    work: Workload, times: StepTimes, tally: Tally, link_busy_ns: int, apart_ns: int = 0
) -> dict[str, Any]:
    """All metrics of a finished run, nested, JSON-ready.

    ``apart_ns``: time between steps that is not the run's.
    """
    span_ns = times.end[-1] - times.begin[0] - apart_ns
    decode_tokens = int((work.phase_of_row == DECODE).sum())
    return {
        "requests": len(set(work.request_of_row.tolist())),
        "tokens": {"prefill": work.num_tokens - decode_tokens, "decode": decode_tokens},
        **latencies(work, times),
        "decode": counts(tally, "decode"),
        "prefill": counts(tally, "prefill"),
        "h2d_bytes": tally.copied_bytes,
        "h2d_bytes_per_token": tally.copied_bytes / work.num_tokens,
        "copies": tally.copies,
        "chunks": tally.chunks,
        "evictions": tally.evictions,
        "collision_misses": tally.collision_misses,
        "warm_bytes": tally.warm_bytes,
        "prefetch": transfers(tally),
        "quality": {phase: quality(tally, phase) for phase in ("decode", "prefill")},
        "breakdown_ms": breakdown_ms(work, times),
        "link_busy_share": link_busy_ns / span_ns,
        "duration_ms": span_ns / _NS_PER_MS,
        "tokens_per_s": work.num_tokens / span_ns * 1e9,
    }
