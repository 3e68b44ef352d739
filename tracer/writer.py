"""Write a trace as it is recorded: one shard in memory, whole shards of whole steps on disk.

A killed recording keeps every shard that its manifest lists and reads as "not complete". Its
requests.parquet was not written yet: the reader then derives the lengths from the rows, and domains
and arrival times are unknown.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from configs.errors import UserError
from configs.files import refuse_non_empty, write_atomically
from tracer.checks import RowOrder, check_columns, check_nulls_match, check_step_order
from tracer.columns import (
    REQUIRED,
    TOKEN_COLUMNS,
    ColumnSpec,
    column_spec,
)
from tracer.manifest import (
    TOKENS,
    RequestsFile,
    TimingsFile,
    TrainedPredictor,
    build_manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from tracer.requests import REQUESTS_FILE, requests_table
from tracer.shards import parquet_bytes, write_shard
from tracer.timing_table import StepTimings, write_timings

DEFAULT_SHARD_ROWS = 4096

Block = dict[str, NDArray]


class TraceWriter:
    """Stream a recording into a new trace directory.

    `manifest_fields` are the fields of `Manifest` that the writer does not know itself: model_id,
    geometry, recording, and model_revision, prompts, expert_norms, parts where known. `encodings`
    chooses another encoding than a column's default (gate_probs: "float16" in place of "sqrt_u8").

        with TraceWriter(path, fields) as writer:
            writer.write_step(request=[0], row=[0], phase=DECODE, position=[7], token_id=[42],
                              experts=ids, weights=weights)
            writer.close(requests)

    The first step settles which columns the trace has. Leaving the block by an exception leaves a
    trace that is not complete. Raises UserError for a directory that holds something and for values
    that no trace may hold, ValueError for arrays of the wrong shape.
    """

    def __init__(
        self,
        path: str | Path,
        manifest_fields: Mapping[str, Any],
        *,
        shard_rows: int = DEFAULT_SHARD_ROWS,
        encodings: Mapping[str, str] | None = None,
    ) -> None:
        if shard_rows < 1:
            raise ValueError(f"shard_rows ({shard_rows}) must be at least 1")
        self.path = Path(path)
        self._manifest = build_manifest(manifest_fields)
        self._geometry = self._manifest.geometry
        self._shard_rows = shard_rows
        self._encodings = dict(encodings or {})
        self._specs: dict[str, ColumnSpec] = {}
        self._blocks: list[Block] = []
        self._buffered_rows = 0
        self._timings: list[tuple[int, StepTimings]] = []
        self._last_step = -1
        self._order = RowOrder()
        self._requests: dict[int, None] = {}
        self._closed = False
        refuse_non_empty(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_manifest(self.path, self._manifest)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None and not self._closed:
            raise RuntimeError("TraceWriter: close(requests) was not called inside the with block")

    def write_step(
        self,
        *,
        request: ArrayLike,
        row: ArrayLike,
        phase: ArrayLike,
        position: ArrayLike,
        token_id: ArrayLike,
        experts: ArrayLike,
        weights: ArrayLike | None = None,
        timings: StepTimings | None = None,
        **optional: ArrayLike,
    ) -> int:
        """Append the n rows of one forward step; return the step's number.

        request, row, phase, position, token_id: [n], or one value for all rows; experts: [n, L, k]
        with -1 where a layer did not run, weights: [n, L, k] with nan there; optional columns as in
        `tracer.columns`. n is taken from experts. `timings`: how long the step's layers took.
        """
        step = self._last_step + 1
        columns = {
            "request": request,
            "step": step,
            "row": row,
            "phase": phase,
            "position": position,
            "token_id": token_id,
        }
        rows = len(np.asarray(experts))
        scalars = {name: np.broadcast_to(np.asarray(v), (rows,)) for name, v in columns.items()}
        timed = () if timings is None else ((step, timings),)
        self.write_rows(**scalars, experts=experts, weights=weights, timings=timed, **optional)
        return step

    def write_rows(
        self,
        *,
        experts: ArrayLike,
        timings: Iterable[tuple[int, StepTimings]] = (),
        **columns: ArrayLike | None,
    ) -> None:
        """Append n rows of whole steps that come after all steps written so far.

        Columns as for `write_step`, with `step` [n] non-decreasing; `timings` by step.
        """
        if self._closed:
            raise ValueError("TraceWriter: the trace is closed")
        self._timings += timings
        given = {name: values for name, values in columns.items() if values is not None}
        block = self._as_block({"experts": experts, **given})
        step = block["step"]
        if len(step) == 0:
            raise ValueError("TraceWriter: a step needs at least one row")
        if step[0] <= self._last_step:
            raise ValueError(f"TraceWriter: step {step[0]} comes after step {self._last_step}")
        check_step_order(step, None, "rows to write")
        self._requests.update(dict.fromkeys(np.unique(block["request"]).tolist()))
        self._last_step = int(step[-1])
        for part in _split_at_steps(block, self._shard_rows):
            self._buffer(part)

    def _buffer(self, block: Block) -> None:
        self._blocks.append(block)
        self._buffered_rows += len(block["step"])
        if self._buffered_rows >= self._shard_rows:
            self._flush()

    def close(
        self,
        requests: pd.DataFrame | Iterable[Mapping[str, Any]],
        notes: str | None = None,
        predictors: tuple[TrainedPredictor, ...] = (),
    ) -> None:
        """Write what is buffered and requests.parquet, and mark the trace complete.

        `requests` has a row for every request: request, prompt_tokens, output_tokens (tokens
        generated: one by the prefill and one by each decode row), and domain and arrival_s where
        known. `notes` replaces those of the recording; `predictors` tells who predicted the
        learned columns.
        """
        if self._closed:
            raise ValueError("TraceWriter: the trace is closed")
        table = requests_table(requests, f"{self.path}: requests")
        self._check_requests(table)
        self._flush()
        if not self._manifest.shards:
            raise UserError(f"{self.path}: no rows were written; a trace needs at least one")
        data = parquet_bytes(table, dictionary=["domain"])
        write_atomically(self.path / REQUESTS_FILE, data)
        entry = RequestsFile(file=REQUESTS_FILE, rows=table.num_rows, sha256=sha256_of(data))
        update: dict[str, Any] = {"requests": entry, "complete": True, "predictors": predictors}
        if notes is not None:
            recording = self._manifest.recording
            update["recording"] = recording.model_copy(update={"notes": notes})
        self._manifest = self._manifest.model_copy(update=update)
        write_manifest(self.path, self._manifest)
        self._closed = True

    def _check_requests(self, table: pa.Table) -> None:
        listed = set(table["request"].to_pylist())
        missing = sorted(set(self._requests) - listed)
        if missing:
            raise UserError(
                f"{self.path}: requests: request {missing[0]} has rows but no entry; add it"
            )

    def _as_block(self, columns: Mapping[str, ArrayLike]) -> Block:
        if not self._specs:
            self._settle_columns(columns)
        if set(columns) != set(self._specs):
            raise ValueError(
                f"TraceWriter: columns {sorted(columns)} differ from the first step's"
                f" {sorted(self._specs)}"
            )
        rows = len(np.asarray(columns["experts"]))
        return {
            name: _as_column(spec, columns[name], rows, f"{self.path}")
            for name, spec in self._specs.items()
        }

    def _settle_columns(self, columns: Mapping[str, ArrayLike]) -> None:
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise ValueError(f"TraceWriter: column {missing[0]!r} is missing")
        order = [name for name in TOKEN_COLUMNS if name in columns]
        order += sorted(set(columns) - set(order))
        specs = {name: column_spec(name, self._geometry) for name in order}
        infos = {
            name: spec.info(_encoding(spec, self._encodings.get(name)))
            for name, spec in specs.items()
        }
        self._specs = specs
        self._manifest = self._manifest.model_copy(update={"columns": infos})

    def _flush(self) -> None:
        if not self._blocks:
            return
        block = {
            name: np.concatenate([part[name] for part in self._blocks]) for name in self._specs
        }
        index = len(self._manifest.shards_of(TOKENS))
        where = f"{self.path}, shard {index}"
        check_columns(block, self._specs, self._geometry.num_experts, where)
        check_nulls_match(block, where)
        self._order.check(block, where)
        shards = [
            write_shard(self.path, group, index, members, self._manifest.columns, self._geometry)
            for group, members in _by_group(block, self._specs).items()
        ]
        update = {"shards": (*self._manifest.shards, *shards), "timings": self._flush_timings()}
        self._manifest = self._manifest.model_copy(update=update)
        write_manifest(self.path, self._manifest)
        self._blocks, self._buffered_rows = [], 0

    def _flush_timings(self) -> tuple[TimingsFile, ...]:
        written = self._manifest.timings
        if self._timings:
            written = (*written, write_timings(self.path, len(written), self._timings))
            self._timings = []
        return written


def append_column(
    trace_dir: str | Path,
    name: str,
    arrays: Iterable[NDArray],
    *,
    encoding: str | None = None,
    fields: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Add an optional column to a trace on disk.

    `arrays` are blocks [m, *shape] of any number of rows, together the trace's rows in order. The
    manifest lists the column once all of it is written, and takes `fields()`, asked for then,
    at the same time. Raises UserError for a column that the
    trace has, for too few or too many rows and for values that no trace may hold.
    """
    trace_dir = Path(trace_dir)
    manifest = read_manifest(trace_dir)
    geometry = manifest.geometry
    spec = column_spec(name, geometry, str(trace_dir))
    if name in TOKEN_COLUMNS:
        raise UserError(f"{trace_dir}: column {name!r} belongs to the tokens; record again")
    if name in manifest.columns:
        raise UserError(f"{trace_dir}: column {name!r} is there already; nothing was written")
    refuse_non_empty(trace_dir / name)
    infos = {name: spec.info(_encoding(spec, encoding))}
    blocks = _rechunk(spec, arrays, manifest.shard_rows(TOKENS), f"{trace_dir}: column {name!r}")
    # The leading dot hides half a column from readers of the directory.
    with tempfile.TemporaryDirectory(dir=trace_dir, prefix=f".{name}.") as partial:
        shards = []
        for index, values in enumerate(blocks):
            block = {name: values}
            check_columns(block, {name: spec}, geometry.num_experts, f"{trace_dir}, shard {index}")
            shards.append(write_shard(Path(partial), name, index, block, infos, geometry))
        os.replace(Path(partial) / name, trace_dir / name)
    update = {"columns": manifest.columns | infos, "shards": (*manifest.shards, *shards)}
    update |= fields()
    write_manifest(trace_dir, manifest.model_copy(update=update))


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where no directory `path` can be made or written."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: {there} is no directory that can be written; name another")


def _encoding(spec: ColumnSpec, wanted: str | None) -> str:
    if wanted is None:
        return spec.encodings[0]
    if wanted not in spec.encodings:
        raise ValueError(f"column {spec.name}: encoding {wanted!r} is none of {spec.encodings}")
    return wanted


def _as_column(spec: ColumnSpec, values: ArrayLike, rows: int, where: str) -> NDArray:
    array = np.asarray(values)
    shape = (rows, *spec.shape)
    if array.shape != shape:
        raise ValueError(f"column {spec.name}: shape {array.shape}, expected {shape}")
    if spec.dtype.kind == "f":
        # Overflow to inf is reported by the checks, with its row.
        with np.errstate(over="ignore"):
            return array.astype(spec.dtype)
    if array.dtype.kind not in "iub":
        raise ValueError(f"column {spec.name}: dtype {array.dtype}, expected integers")
    cast = array.astype(spec.dtype)
    if (cast != array).any():
        value = array[cast != array].flat[0]
        raise UserError(f"{where}: {spec.name} {value} does not fit {spec.dtype}; nothing written")
    return cast


def _split_at_steps(block: Block, shard_rows: int) -> Iterator[Block]:
    """Cut a block into parts of at least `shard_rows` rows that begin with a step's first row."""
    step = block["step"]
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1))
    begin = 0
    while len(step) - begin > shard_rows:
        later = starts[starts >= begin + shard_rows]
        if later.size == 0:
            break
        end = int(later[0])
        yield {name: values[begin:end] for name, values in block.items()}
        begin = end
    yield {name: values[begin:] for name, values in block.items()}


def _by_group(block: Block, specs: Mapping[str, ColumnSpec]) -> dict[str, Block]:
    groups: dict[str, Block] = {}
    for name, values in block.items():
        groups.setdefault(specs[name].group, {})[name] = values
    return groups


def _rechunk(
    spec: ColumnSpec, arrays: Iterable[NDArray], rows: list[int], where: str
) -> Iterator[NDArray]:
    """Regroup blocks of any number of rows into blocks of `rows[i]` rows each."""
    blocks = iter(arrays)
    held: list[NDArray] = []
    count = 0
    for wanted in rows:
        while count < wanted:
            block = next(blocks, None)
            if block is None:
                raise UserError(f"{where}: {sum(rows)} rows expected, the data ended early")
            held.append(_as_column(spec, block, len(block), where))
            count += len(block)
        joined = np.concatenate(held)
        yield joined[:wanted]
        held, count = [joined[wanted:]], count - wanted
    if count or any(len(block) for block in blocks):
        raise UserError(f"{where}: {sum(rows)} rows expected, more were given")
