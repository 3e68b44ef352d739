"""All measurements of a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import prepare_figure
from tracer.columns import DECODE, NULL_ID, PREFILL
from tracer.inspect.batches import distinct_by_batch, distinct_by_step
from tracer.inspect.overlap import overlap
from tracer.inspect.popularity import domains, popularity, skew
from tracer.inspect.predictions import predictions
from tracer.inspect.reuse import reuse, reuse_by_layer, reuse_distances
from tracer.inspect.sets import expert_masks
from tracer.inspect.slots import hits_by_slots, lookups_by_layer, slot_counts
from tracer.trace import ArrayTrace, Trace
from tracer.workload import distinct

Summary = dict[str, pd.DataFrame]

_COLUMNS = ("request", "step", "phase", "experts")


def inspect_trace(trace: Trace | ArrayTrace) -> Summary:
    """Measure a trace; return tidy tables by name.

    - counts: quantity, value
    - popularity: layer, expert, accesses, share (of the layer's accesses)
    - skew: layer, top_10_share, top_25_share, top_50_share (accesses that go to the most popular
      10 % ... of experts, rounded up), entropy (of the shares, over log E: 1 is uniform)
    - domains: domain, requests, tokens, elsewhere, chance (see `popularity.domains`)
    - domain_popularity: domain, layer, expert, share (of the domain's accesses in the layer)
    - overlap: lag (tokens), overlap (of a decode token's experts, the share that the token `lag`
      before chose too; nan where no request is that long), lowest_layer, highest_layer (the same of
      single layers), chance (had the tokens been independent and each layer as skewed as it is)
    - reuse: slots (experts a layer), hit_share (look-ups with a reuse distance below that number,
      all layers together), lowest_layer, highest_layer (the same of single layers)
    - reuse_by_layer: layer, lookups, first_share (first look-ups of an expert), median, p90
      (distances; first look-ups count as infinite), lru_25_share (hit_share at a quarter of E)
    - hits: policy (lru, belady), slots (a layer, from k up), phase (a step with prompt tokens is
      prefill), accesses, hits, hit_share: what the policies of that name hit, see `slots`
    - predictions: predictor, distance, layer, tokens, top_k_share, top_2k_share (see `predictions`)
    - distinct: phase, tokens (in the step), steps, distinct (mean experts a layer), uniform (the
      mean for uniformly random experts)
    - batches: batch, groups, distinct, skewed, uniform (see `batches.distinct_by_batch`)

    Accesses are counted over prefill and decode. Raises UserError as `Trace.load` does, and where
    no layer ran for any token.
    """
    arrays = trace.load(_COLUMNS)
    num_experts = trace.manifest.geometry.num_experts
    experts = np.asarray(arrays["experts"])
    if (experts == NULL_ID).all():
        raise UserError(f"{trace.path}: no layer ran for any token: there is nothing to measure")
    table = popularity(experts, num_experts)
    by_domain = domains(arrays["request"], experts, trace.requests(), num_experts)
    lookups = _lookup_tables(arrays, experts, num_experts)
    return {
        "counts": _counts(trace, arrays, int(lookups["reuse_by_layer"]["lookups"].sum())),
        "popularity": table,
        "skew": skew(table, num_experts),
        "domains": by_domain[0],
        "domain_popularity": by_domain[1],
        **_set_tables(arrays, experts, num_experts),
        **lookups,
        "predictions": predictions(trace, experts, np.asarray(arrays["phase"]), num_experts),
    }


def _set_tables(arrays: dict[str, NDArray], experts: NDArray, num_experts: int) -> Summary:
    masks = expert_masks(experts, num_experts)
    return {
        "overlap": overlap(arrays, experts, masks, num_experts),
        "distinct": distinct_by_step(arrays, experts.shape[2], masks, num_experts),
        "batches": distinct_by_batch(arrays, experts, masks, num_experts),
    }


def _lookup_tables(arrays: dict[str, NDArray], experts: NDArray, num_experts: int) -> Summary:
    begins = np.diff(arrays["step"], prepend=arrays["step"][0] - 1) != 0
    starts = np.flatnonzero(begins)
    events = distinct(experts, np.cumsum(begins) - 1, len(starts), num_experts, "last-use")
    prefill = np.minimum.reduceat(arrays["phase"], starts) == PREFILL
    lookups = lookups_by_layer(events, num_experts)
    distances = [reuse_distances(ids, step, num_experts) for ids, step in lookups]
    slots = slot_counts(num_experts, experts.shape[2])
    return {
        "reuse": reuse(distances, num_experts),
        "reuse_by_layer": reuse_by_layer(distances, num_experts),
        "hits": hits_by_slots(events, lookups, distances, prefill, num_experts, slots),
    }


def _counts(trace: Trace | ArrayTrace, arrays: dict[str, NDArray], lookups: int) -> pd.DataFrame:
    geometry, phase = trace.manifest.geometry, arrays["phase"]
    rows = {
        "requests": len(np.unique(arrays["request"])),
        "prefill tokens": int((phase == PREFILL).sum()),
        "decode tokens": int((phase == DECODE).sum()),
        "steps": len(np.unique(arrays["step"])),
        "MoE layers": geometry.num_moe_layers,
        "experts a layer": geometry.num_experts,
        "experts a token (k)": geometry.top_k,
        "accesses (token, layer, rank)": int((arrays["experts"] != NULL_ID).sum()),
        "look-ups (step, layer, expert)": lookups,
    }
    return pd.DataFrame({"quantity": list(rows), "value": list(rows.values())})


def subject(trace: Trace | ArrayTrace) -> str:
    """One line on what a summary is of: model, tokens, geometry."""
    geometry = trace.manifest.geometry
    return (
        f"{trace.manifest.model_id}: {trace.rows:,} tokens, {geometry.num_moe_layers} MoE layers x"
        f" {geometry.num_experts} experts, top-{geometry.top_k}"
    )


def draw_inspection(trace: Trace | ArrayTrace, path: str | Path) -> None:
    """Measure a trace and draw its summary to a new file (.png, .svg or .pdf).

    Raises UserError for another suffix and where the file exists.
    """
    # Here, not above: matplotlib takes longer to import than the tables take to compute.
    from tracer.inspect.figures import draw_summary

    prepare_figure(Path(path))
    draw_summary(inspect_trace(trace), subject(trace), Path(path))
