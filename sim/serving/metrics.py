"""From a served run to numbers: latencies, throughput, goodput, hits, batches, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from policies.interface import Tally
from sim.machine import StepTimes
from sim.metrics import breakdown_of, counts, quality, summary, transfers
from sim.serving.config import Service
from sim.serving.machine import StepLog
from sim.serving.requests import Request

_NS_PER_MS = 1e6
_NEVER = -1


def request_frame(requests: list[Request]) -> pd.DataFrame:
    """One row a request, in order of arrival; times in ns from the start.

    ``first_token_ns``: end of its prefill, missing where the trace has none; ``first_decode_ns``:
    end of its first decode step, missing where it has none.
    """
    columns: dict[str, Any] = {
        "request": [each.index for each in requests],
        "trace_request": [each.drawn.name for each in requests],
        "prompt_tokens": [each.prompt for each in requests],
        "decode_tokens": [each.decode for each in requests],
        "kv_tokens": [each.kv_tokens for each in requests],
    }
    for name in ("arrival", "scheduled", "first_token", "first_decode", "finish"):
        values = [getattr(each, name) for each in requests]
        known = [None if value == _NEVER else value for value in values]
        columns[f"{name}_ns"] = pd.array(known, dtype="Int64")
    return pd.DataFrame(columns)


def step_frame(times: StepTimes, log: StepLog) -> pd.DataFrame:
    """One row a step: when, whose rows, distinct experts, events and waves; times in ns."""
    return pd.DataFrame(
        {
            "begin_ns": times.begin,
            "end_ns": times.end,
            "requests": log.requests,
            "lines": log.lines,
            "waiting": log.waiting,
            "alike": log.alike,
            "prefill_rows": log.prefill_rows,
            "decode_rows": log.decode_rows,
            "distinct_experts": log.experts,
            "events": np.diff(log.events, prepend=0),
            "waves": np.diff(log.waves, prepend=0),
        }
    )


def latencies(frame: pd.DataFrame, gaps_ns: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Latencies from the arrival on, ms, and where they were spent; ``gaps_ns``: between tokens.

    A request recorded without its prefill has no ttft; its tpot is its decoding time over its
    tokens.
    """
    arrival, scheduled, finish = (
        frame[f"{name}_ns"].to_numpy(np.int64) for name in ("arrival", "scheduled", "finish")
    )
    first_decode = frame["first_decode_ns"].dropna()
    as_ns: dict[str, Any] = {
        "ttft_ms": _ttft_ns(frame),
        "tpot_ms": _tpot_ns(frame),
        "itl_ms": gaps_ns,
        "e2el_ms": finish - arrival,
        "queueing_ms": scheduled - arrival,
        "service_ms": finish - scheduled,
        "first_decode_ms": first_decode.to_numpy(np.int64) - arrival[first_decode.index],
    }
    return {name: summary(_known(values) / _NS_PER_MS) for name, values in as_ns.items()}


def _known(values: Any) -> npt.NDArray[np.float64]:
    numbers = np.asarray(values, np.float64)
    known: npt.NDArray[np.float64] = numbers[~np.isnan(numbers)]
    return known


def _ttft_ns(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """By request; nan: no prefill."""
    waited = frame["first_token_ns"] - frame["arrival_ns"]
    values: npt.NDArray[np.float64] = waited.to_numpy(np.float64, na_value=np.nan)
    return values


def _tpot_ns(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """By request; nan: no token after the first."""
    begun = frame["first_token_ns"].fillna(frame["scheduled_ns"])
    decode = frame["decode_tokens"].to_numpy(np.float64)
    spent = (frame["finish_ns"] - begun).to_numpy(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(decode > 0, spent / decode, np.nan)


def goodput(frame: pd.DataFrame, service: Service, span_s: float) -> dict[str, Any] | None:
    """Requests that meet the objectives given, a second, and their share; None: none given.

    A request without a second token meets any tpot.
    """
    if service.slo_ttft_ms is None and service.slo_tpot_ms is None:
        return None
    met = np.ones(len(frame), bool)
    if service.slo_ttft_ms is not None:
        met &= _ttft_ns(frame) <= service.slo_ttft_ms * _NS_PER_MS
    if service.slo_tpot_ms is not None:
        met &= ~(_tpot_ns(frame) > service.slo_tpot_ms * _NS_PER_MS)
    return {
        "slo_ttft_ms": service.slo_ttft_ms,
        "slo_tpot_ms": service.slo_tpot_ms,
        "requests": int(met.sum()),
        "share": float(met.mean()),
        "requests_per_s": float(met.sum()) / span_s,
    }


def by_batch(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """Decode steps by how many requests they had: distinct experts and waves an event, length."""
    decode = steps[steps["prefill_rows"] == 0]
    lengths = decode.assign(step_ns=decode["end_ns"] - decode["begin_ns"])
    found = []
    for size, group in lengths.groupby("requests"):
        events = int(group["events"].sum())
        found.append(
            {
                "requests": int(str(size)),
                "steps": len(group),
                "distinct_per_event": float(group["distinct_experts"].sum() / events),
                "waves_per_event": float(group["waves"].sum() / events),
                "step_ms": float(group["step_ns"].mean() / _NS_PER_MS),
            }
        )
    return found


def batches(steps: pd.DataFrame) -> dict[str, Any]:
    """Requests and rows a step."""
    rows = steps["prefill_rows"] + steps["decode_rows"]
    mixed = (steps["prefill_rows"] > 0) & (steps["decode_rows"] > 0)
    return {
        "steps": len(steps),
        "mean": float(steps["requests"].mean()),
        "max": int(steps["requests"].max()),
        "rows_mean": float(rows.mean()),
        "rows_max": int(rows.max()),
        "mixed_steps": int(mixed.sum()),
        "waiting_max": int(steps["waiting"].max()),
        "alike_share": float(steps["alike"].sum() / steps["requests"].sum()),
        "decode_by_requests": by_batch(steps),
    }


def run_metrics(
    tally: Tally, times: StepTimes, steps: pd.DataFrame, link_busy_ns: int
) -> dict[str, Any]:
    """Hits, bytes and where the time of the steps went."""
    rows = int((steps["prefill_rows"] + steps["decode_rows"]).sum())
    span_ns = int(times.end[-1])
    return {
        "decode": counts(tally, "decode"),
        "prefill": counts(tally, "prefill"),
        "h2d_bytes": tally.copied_bytes,
        "h2d_bytes_per_token": tally.copied_bytes / rows,
        "copies": tally.copies,
        "chunks": tally.chunks,
        "evictions": tally.evictions,
        "collision_misses": tally.collision_misses,
        "warm_bytes": tally.warm_bytes,
        "prefetch": transfers(tally),
        "quality": {phase: quality(tally, phase) for phase in ("decode", "prefill")},
        "breakdown_ms": breakdown_of(steps["prefill_rows"].to_numpy() == 0, times),
        "link_busy_share": link_busy_ns / span_ns,
    }


def throughput(frame: pd.DataFrame, steps: pd.DataFrame, idle_ns: int) -> dict[str, Any]:
    """Requests and tokens a second from time 0 to the last answer, and the share not idle.

    ``output_tokens_per_s``: a prefill yields a token, and each decode row one more;
    ``tokens_per_s``: rows computed, as elsewhere.
    """
    span_ns = int(steps["end_ns"].iloc[-1])
    outputs = int(frame["decode_tokens"].sum() + (frame["prompt_tokens"] > 0).sum())
    rows = int((frame["prompt_tokens"] + frame["decode_tokens"]).sum())
    return {
        "duration_ms": span_ns / _NS_PER_MS,
        "requests_per_s": len(frame) / span_ns * 1e9,
        "output_tokens_per_s": outputs / span_ns * 1e9,
        "tokens_per_s": rows / span_ns * 1e9,
        "utilisation": 1 - idle_ns / span_ns,
    }
