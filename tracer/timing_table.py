"""timings/part-N.parquet of a trace: nanoseconds by step and MoE layer, a row each.

Columns step, layer (MoE layer from 0), segment_ns, experts_ns, shared_ns (null where the model has
no shared experts); what is measured: `tracer.timings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import write_atomically
from tracer.manifest import TimingsFile, sha256_of
from tracer.shards import DAMAGED, parquet_bytes, read_table

TIMINGS = "timings"
_PARTS = ("segment_ns", "experts_ns", "shared_ns")
_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("segment_ns", pa.int64(), nullable=False),
        pa.field("experts_ns", pa.int64(), nullable=False),
        pa.field("shared_ns", pa.int64()),
    ]
)


@dataclass(frozen=True)
class StepTimings:
    """Nanoseconds by MoE layer, int64 [L]; `shared_ns` is None where there are no such experts."""

    segment_ns: NDArray
    experts_ns: NDArray
    shared_ns: NDArray | None


def write_timings(
    trace_dir: Path, index: int, steps: Sequence[tuple[int, StepTimings]]
) -> TimingsFile:
    """Write file `index` with the times of some steps; return its entry for the manifest."""
    layers = len(steps[0][1].segment_ns)
    columns = {
        "step": np.repeat([step for step, _ in steps], layers),
        "layer": np.tile(np.arange(layers), len(steps)),
        "segment_ns": np.concatenate([times.segment_ns for _, times in steps]),
        "experts_ns": np.concatenate([times.experts_ns for _, times in steps]),
        "shared_ns": _shared([times for _, times in steps], layers),
    }
    arrays = [pa.array(columns[field.name], type=field.type) for field in _SCHEMA]
    data = parquet_bytes(pa.Table.from_arrays(arrays, schema=_SCHEMA), dictionary=[])
    file = f"{TIMINGS}/part-{index:05d}.parquet"
    (trace_dir / TIMINGS).mkdir(exist_ok=True)
    write_atomically(trace_dir / file, data)
    return TimingsFile(file=file, rows=layers * len(steps), sha256=sha256_of(data))


def read_timings(trace_dir: Path, files: Sequence[TimingsFile], layers: int) -> pd.DataFrame:
    """Read all files; a UserError where one is missing, edited or holds what no step can take."""
    frames = []
    for entry in files:
        path = trace_dir / entry.file
        table = read_table(path, entry.sha256, entry.rows, None)
        if not table.schema.equals(_SCHEMA):
            raise UserError(f"{path}: its columns are not {_SCHEMA.names}; {DAMAGED}")
        frames.append(_checked(table.to_pandas(), layers, path))
    frame = pd.concat(frames, ignore_index=True)
    return frame.astype({"shared_ns": "Int64"})


def _shared(times: Sequence[StepTimings], layers: int) -> NDArray | list[None]:
    given = [each.shared_ns for each in times if each.shared_ns is not None]
    return np.concatenate(given) if given else [None] * (layers * len(times))


def _checked(frame: pd.DataFrame, layers: int, path: Path) -> pd.DataFrame:
    for name, bound in (("layer", layers), *((part, np.inf) for part in _PARTS)):
        values = frame[name].to_numpy(float)
        bad = np.flatnonzero((values < 0) | (values >= bound))
        if bad.size:
            row = int(bad[0])
            raise UserError(
                f"{path}: row {row}: {name} {values[row]:g} is out of bounds; {DAMAGED}"
            )
    return frame
