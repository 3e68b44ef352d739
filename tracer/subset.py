"""A smaller trace from a larger one: some requests, fewer columns, thinned gate inputs.

Traces that train predictors are large (gate inputs take kilobytes a token); what is kept or handed
on need not be. Rows, ids and steps stay what they were recorded as.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import refuse_non_empty
from tracer.columns import REQUIRED
from tracer.manifest import TOKENS, TrainedPredictor
from tracer.timing_table import StepTimings
from tracer.trace import Trace
from tracer.writer import TraceWriter

GATE_INPUTS = "gate_inputs"


@dataclass(frozen=True)
class Choice:
    """What to keep.

    `requests`: request ids, None for all; `drop`: columns to leave out; `timings`: keep the times;
    `hidden_share`: share of the rows that keep their gate inputs, drawn by `seed`; the others are
    null.
    """

    requests: tuple[int, ...] | None = None
    drop: tuple[str, ...] = ()
    timings: bool = True
    hidden_share: float = 1.0
    seed: int = 0


def subset(trace: Trace, out: str | Path, choice: Choice) -> Trace:
    """Write what `choice` keeps of a trace to the new directory `out`, a shard at a time.

    Raises UserError for requests and columns that the trace does not have, for columns that every
    trace needs, and for an `out` that is not empty.
    """
    refuse_non_empty(Path(out))
    _check(trace, choice)
    names = [name for name in trace.columns() if name not in choice.drop]
    manifest = trace.manifest
    fields = {
        "model_id": manifest.model_id,
        "model_revision": manifest.model_revision,
        "geometry": manifest.geometry,
        "recording": manifest.recording,
        "prompts": manifest.prompts,
        "expert_norms": manifest.expert_norms,
        "parts": manifest.parts,
    }
    encodings = {name: manifest.columns[name].encoding for name in names}
    times = _Times(trace if choice.timings and manifest.timings else None)
    table = trace.requests()
    if choice.requests is not None:
        table = table[table["request"].isin(choice.requests)]
    with TraceWriter(out, fields, encodings=encodings) as writer:
        for block in _blocks(trace, names, choice):
            writer.write_rows(timings=times.of(block["step"]), **block)
        writer.close(table, notes=_notes(trace, choice), predictors=_predictors(trace, choice))
    return Trace.open(out)


def _check(trace: Trace, choice: Choice) -> None:
    if not 0 <= choice.hidden_share <= 1:
        raise UserError(f"hidden share {choice.hidden_share}: give a share from 0 to 1")
    if choice.hidden_share < 1 and GATE_INPUTS not in trace.columns():
        raise UserError(f"{trace.path}: there are no gate inputs to thin")
    for name in choice.drop:
        if name in REQUIRED:
            raise UserError(f"column {name!r} cannot be dropped: every trace needs it")
        if name not in trace.columns():
            raise UserError(
                f"{trace.path}: there is no column {name!r}; it has {', '.join(trace.columns())}"
            )
    if choice.requests is None:
        return
    missing = sorted(set(choice.requests) - set(trace.requests()["request"].tolist()))
    if missing:
        raise UserError(f"{trace.path}: there is no request {missing[0]}; see moesim inspect")


def _blocks(trace: Trace, names: list[str], choice: Choice) -> Iterator[dict[str, NDArray]]:
    """The rows to write, one shard of the source at a time."""
    start = 0
    for rows in trace.manifest.shard_rows(TOKENS):
        block = trace.load(names, start, start + rows)
        start += rows
        if choice.requests is not None:
            mine = np.isin(block["request"], choice.requests)
            block = {name: values[mine] for name, values in block.items()}
        if choice.hidden_share < 1 and GATE_INPUTS in block:
            block[GATE_INPUTS][~_drawn(block, choice)] = np.nan
        if len(block["step"]):
            yield block


def _drawn(block: dict[str, NDArray], choice: Choice) -> NDArray:
    """Rows that keep their gate inputs: told by request and position, whatever else is there."""
    rows = zip(block["request"].tolist(), block["position"].tolist(), strict=True)
    draws = [np.random.default_rng((choice.seed, *row)).random() for row in rows]
    return np.array(draws) < choice.hidden_share


class _Times:
    """The source's times, by step."""

    def __init__(self, trace: Trace | None) -> None:
        self._layers = 0 if trace is None else trace.manifest.geometry.num_moe_layers
        self._frame: pd.DataFrame | None = None if trace is None else trace.timings()

    def of(self, steps: NDArray) -> list[tuple[int, StepTimings]]:
        """Times of the steps that have rows."""
        if self._frame is None:
            return []
        frame = self._frame[self._frame["step"].isin(np.unique(steps))]
        times = []
        for step, rows in frame.groupby("step", sort=True):
            shared = rows["shared_ns"]
            times.append(
                (
                    int(str(step)),
                    StepTimings(
                        segment_ns=rows["segment_ns"].to_numpy(np.int64),
                        experts_ns=rows["experts_ns"].to_numpy(np.int64),
                        shared_ns=None if shared.isna().any() else shared.to_numpy(np.int64),
                    ),
                )
            )
        return times


def _predictors(trace: Trace, choice: Choice) -> tuple[TrainedPredictor, ...]:
    """Who predicted the learned columns that stay, and which of the requests that stay trained.

    The weights stay with the whole trace: their file's bare name says that they lie elsewhere.
    """
    kept = []
    for predictor in trace.manifest.predictors:
        if predictor.column in choice.drop:
            continue
        trained: Sequence[int] = predictor.trained_requests
        if choice.requests is not None:
            trained = [request for request in trained if request in choice.requests]
        weights = PurePosixPath(predictor.weights_file).name
        update = {"trained_requests": tuple(trained), "weights_file": weights}
        kept.append(predictor.model_copy(update=update))
    return tuple(kept)


def _notes(trace: Trace, choice: Choice) -> str:
    made = [f"subset of trace {trace.digest[:16]}"]
    if not trace.manifest.complete:
        made.append("a recording that broke off")
    if choice.requests is not None:
        made.append(f"{len(choice.requests)} requests")
    if choice.drop:
        made.append(f"without {', '.join(choice.drop)}")
    if choice.hidden_share < 1:
        made.append(f"gate inputs of {choice.hidden_share:.0%} of the rows (seed {choice.seed})")
    before = trace.manifest.recording.notes
    return "; ".join([before, *made] if before else made)
