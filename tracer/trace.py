"""Read a trace: only the columns and rows asked for, every value checked, nothing guessed.

    trace = Trace.open("sample")
    arrays = trace.load(["step", "phase", "experts"])     # numpy arrays, one row a token

The format: `tracer.manifest` (manifest.json), `tracer.columns` (columns, dtypes, encodings); the
Parquet files open in pandas as they are: `pd.read_parquet(trace_dir / "tokens")`. `export_arrays`
and `load_arrays` hand one memory-mapped copy to many processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import refuse_non_empty
from tracer.arrays import ARRAYS_FILE, Arrays, ArrayTrace, load_arrays, row_range
from tracer.checks import NULL_WHERE_EXPERTS_ARE, RowOrder, check_columns, check_nulls_match
from tracer.columns import (
    DECODE,
    PREFILL,
    REQUIRED,
    ColumnSpec,
    column_spec,
    decode,
    stored_type,
)
from tracer.manifest import TOKENS, Manifest, Shard, read_manifest, write_manifest
from tracer.requests import REQUESTS_FILE, REQUESTS_SCHEMA, requests_table
from tracer.shards import DAMAGED, read_table
from tracer.timing_table import read_timings
from tracer.writer import TraceWriter, append_column

__all__ = [
    "DECODE",
    "PREFILL",
    "ArrayTrace",
    "Manifest",
    "Trace",
    "TraceWriter",
    "append_column",
    "list_samples",
    "load_arrays",
    "refuse_sample",
]

DEFAULT_SAMPLE = "olmoe-twin"


class Trace:
    """A trace directory opened for reading.

    `manifest` is what was recorded and how; `notes` what a user should be told (a recording that
    was killed); `digest` the SHA-256 over what is simulated. Opening reads the
    manifest alone; `load` and `requests` read, verify and check their files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.notes: list[str] = []
        self._check_listed_columns()
        self._check_complete()

    @classmethod
    def open(cls, name_or_path: str | Path) -> Trace:
        """Open a trace directory, or a shipped sample by name ("sample" is the default one).

        Raises UserError for a path that does not exist (the message lists the samples), for a name
        that is both, and for a directory that is no trace.
        """
        return cls(_find(name_or_path))

    @property
    def rows(self) -> int:
        """Number of rows (tokens)."""
        return self.manifest.rows

    @property
    def digest(self) -> str:
        """SHA-256 over what is simulated, see `Manifest.digest`."""
        return self.manifest.digest

    def columns(self) -> list[str]:
        """Names of the columns that `load` can return."""
        return list(self.manifest.columns)

    def requests(self) -> pd.DataFrame:
        """One row a request: request, prompt_tokens, output_tokens, domain, arrival_s.

        output_tokens counts generated tokens: one by the prefill and one by each decode row. Of a
        trace that is not complete the lengths are those of the rows that there are.
        """
        entry = self.manifest.requests
        if entry is None:
            return self._requests_from_rows()
        path = self.path / entry.file
        table = read_table(path, entry.sha256, entry.rows, None)
        if not table.schema.equals(REQUESTS_SCHEMA):
            raise UserError(f"{path}: its columns are not {REQUESTS_SCHEMA.names}; {DAMAGED}")
        return requests_table(table.to_pandas(), str(path)).to_pandas()

    def timings(self) -> pd.DataFrame:
        """One row a step and MoE layer: step, layer, segment_ns, experts_ns, shared_ns.

        shared_ns is null where the model has no shared experts; `tracer.timings` says what counts
        to which. Raises UserError for a trace that was recorded without.
        """
        if not self.manifest.timings:
            raise UserError(f"{self.path}: there are no timings; {_how_to_get('timings')}")
        layers = self.manifest.geometry.num_moe_layers
        return read_timings(self.path, self.manifest.timings, layers)

    def load(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Arrays:
        """Load rows [start, stop) of some columns, as `tracer.columns` describes them.

        A `stop` beyond the last row means the last row; None too. Only the shards that hold these
        rows are read. Raises UserError for a column that the trace lacks, an empty range, a file
        that is missing or whose digest differs, and values that no trace may hold.
        """
        start, stop = row_range(self.path, self.rows, start, stop)
        specs = {name: self._spec(name) for name in columns}
        arrays = {n: np.empty((stop - start, *s.shape), s.dtype) for n, s in specs.items()}
        self._fill(arrays, start, stop)
        return arrays

    def export_arrays(
        self, directory: str | Path, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> None:
        """Write rows [start, stop) of some columns as .npy files for `load_arrays`.

        For processes that share one copy of a trace in memory; scratch, not a trace format. Raises
        UserError as `load` does and for a directory that holds something.
        """
        directory = Path(directory)
        start, stop = row_range(self.path, self.rows, start, stop)
        specs = {name: self._spec(name) for name in columns}
        refuse_non_empty(directory)
        directory.mkdir(parents=True, exist_ok=True)
        shape = {name: (stop - start, *spec.shape) for name, spec in specs.items()}
        arrays = {
            name: np.lib.format.open_memmap(
                directory / f"{name}.npy", mode="w+", dtype=spec.dtype, shape=shape[name]
            )
            for name, spec in specs.items()
        }
        self._fill(dict(arrays), start, stop)
        for array in arrays.values():
            array.flush()
        self.requests().to_parquet(directory / REQUESTS_FILE, index=False)
        write_manifest(directory, self.manifest)
        described = {"columns": list(specs), "start": start, "rows": stop - start}
        (directory / ARRAYS_FILE).write_text(json.dumps(described), encoding="utf-8")

    def _check_listed_columns(self) -> None:
        listed = self.manifest.columns
        if self.manifest.shards:
            missing = [name for name in REQUIRED if name not in listed]
            if missing:
                raise UserError(f"{self.path}: manifest.json lists no column {missing[0]!r}")
        for name, info in listed.items():
            spec = column_spec(name, self.manifest.geometry, str(self.path))
            fits = info.dtype == spec.dtype.name and info.shape == spec.shape
            if not fits or info.encoding not in spec.encodings:
                raise UserError(
                    f"{self.path}: manifest.json: column {name!r} is {info.dtype}{info.shape}"
                    f" {info.encoding!r}; the geometry asks for {spec.dtype.name}{spec.shape}"
                    f" {' or '.join(map(repr, spec.encodings))}"
                )
            if self.manifest.shards and not self.manifest.shards_of(spec.group):
                raise UserError(f"{self.path}: manifest.json lists no shard of column {name!r}")

    def _check_complete(self) -> None:
        if self.manifest.complete and self.rows and self.manifest.requests:
            return
        if self.manifest.complete:
            raise UserError(f"{self.path}: the trace is empty; record or import it again")
        if not self.rows:
            raise UserError(
                f"{self.path}: the recording broke off before its first whole shard; record again"
            )
        self.notes.append(
            f"{self.path}: not complete: the recording broke off; {self.rows} rows of whole shards"
            " are read, domains and arrival times are unknown"
        )

    def _requests_from_rows(self) -> pd.DataFrame:
        rows = pd.DataFrame(self.load(["request", "phase", "position"]))
        grouped = rows.groupby("request")
        prefill = grouped["phase"].agg(lambda phase: int((phase == PREFILL).sum()))
        decode_rows = grouped.size() - prefill
        first = grouped["position"].min()
        frame = pd.DataFrame(
            {
                "request": prefill.index,
                # Where no prefill was recorded, all tokens before the first row were the prompt.
                "prompt_tokens": prefill.where(prefill > 0, first).to_numpy(),
                "output_tokens": (decode_rows + 1).to_numpy(),
            }
        )
        return requests_table(frame).to_pandas()

    def _spec(self, name: str) -> ColumnSpec:
        spec = column_spec(name, self.manifest.geometry, str(self.path))
        if name not in self.manifest.columns:
            raise UserError(
                f"{self.path}: there is no column {name!r}, only {', '.join(self.columns())};"
                f" {_how_to_get(name)}"
            )
        return spec

    def _fill(self, arrays: Arrays, start: int, stop: int) -> None:
        """Read rows [start, stop) into arrays that are `stop - start` rows long."""
        if not arrays:
            return
        order = RowOrder()
        request_ids = self._listed_requests() if "request" in arrays else None
        for index, begin, rows in self._overlapping(start, stop):
            shard = self._read_shard(index, list(arrays))
            low, high = max(start - begin, 0), min(stop - begin, rows)
            where = str(self.path / self.manifest.shards_of(TOKENS)[index].file)
            order.check(shard, where)
            if request_ids is not None:
                _check_requests_listed(shard["request"], request_ids, where)
            for name, target in arrays.items():
                target[begin + low - start : begin + high - start] = shard[name][low:high]

    def _listed_requests(self) -> NDArray | None:
        if self.manifest.requests is None:
            return None
        return self.requests()["request"].to_numpy()

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield index, first row and rows of the shards that hold rows [start, stop)."""
        begin = 0
        for index, rows in enumerate(self.manifest.shard_rows(TOKENS)):
            if begin < stop and begin + rows > start:
                yield index, begin, rows
            begin += rows

    def _read_shard(self, index: int, columns: list[str]) -> Arrays:
        """Read and check one shard of the columns (and of those they are checked against)."""
        names = list(columns)
        if set(NULL_WHERE_EXPERTS_ARE) & set(names) and "experts" not in names:
            names.append("experts")
        specs = {name: self._spec(name) for name in names}
        arrays: Arrays = {}
        for group in dict.fromkeys(spec.group for spec in specs.values()):
            members = [name for name in names if specs[name].group == group]
            shard = self.manifest.shards_of(group)[index]
            read = self._read_group(shard, members, specs)
            where = str(self.path / shard.file)
            check_columns(read, specs, self.manifest.geometry.num_experts, where)
            arrays |= read
        check_nulls_match(arrays, str(self.path / self.manifest.shards_of(TOKENS)[index].file))
        return arrays

    def _read_group(self, shard: Shard, names: list[str], specs: dict[str, ColumnSpec]) -> Arrays:
        path = self.path / shard.file
        table = read_table(path, shard.sha256, shard.rows, names)
        geometry = self.manifest.geometry
        arrays: Arrays = {}
        for name in names:
            spec, encoding = specs[name], self.manifest.columns[name].encoding
            column = table[name].combine_chunks()
            expected = stored_type(spec, encoding, geometry)
            if column.type != expected:
                raise UserError(f"{path}: column {name!r} is {column.type}, expected {expected}")
            _check_nulls(spec, column, path)
            arrays[name] = decode(spec, encoding, column)
        return arrays


def list_samples() -> list[str]:
    """Names of the traces that come with the package."""
    return sorted(entry.name for entry in _samples_dir().iterdir() if entry.is_dir())


def refuse_sample(trace: Trace) -> None:
    """Raise UserError where `trace` is one that comes with the package: it stays as it is."""
    if trace.path.resolve().parent == _samples_dir().resolve():
        raise UserError(
            f"{trace.path.name} is a shipped sample and is not changed; copy it first: moesim"
            f" subset {trace.path.name} --out DIR"
        )


def _samples_dir() -> Path:
    return Path(str(resources.files("tracer") / "samples"))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    name = DEFAULT_SAMPLE if str(name_or_path) == "sample" else str(name_or_path)
    if name in list_samples():
        if path.is_dir():
            raise UserError(
                f"{name_or_path!r} is a shipped sample and a directory here; write"
                f" ./{name_or_path} for the directory"
            )
        return _samples_dir() / name
    if not path.is_dir():
        raise UserError(
            f"{path}: no such trace directory; shipped samples: sample, {', '.join(list_samples())}"
        )
    return path


def _check_nulls(spec: ColumnSpec, column: pa.Array, path: Path) -> None:
    elements = column.flatten() if spec.shape else column
    bad = column.null_count if spec.shape else 0
    if spec.null is None:
        bad += elements.null_count
    if bad:
        raise UserError(f"{path}: column {spec.name!r} holds {bad} nulls where none may be")


def _check_requests_listed(request: NDArray, listed: NDArray, where: str) -> None:
    bad = np.flatnonzero(~np.isin(request, listed))
    if bad.size:
        row = int(bad[0])
        raise UserError(f"{where}: row {row}: request {request[row]} is not in requests.parquet")


def _how_to_get(name: str) -> str:
    if name == "residency":
        return "only a log of an engine's own hits and misses has it"
    if name.startswith("learned_"):
        return f"add it: moesim train-predictor --trace ... --stride {name.rsplit('_', 1)[1]}"
    if name.startswith("lookahead_"):
        return f"record it: moesim trace ... --record lookahead={name.rsplit('_', 1)[1]}"
    option = {"gate_probs": "probs", "gate_norms": "norms", "gate_inputs": "hidden"}.get(name, name)
    return f"record it: moesim trace ... --record {option}"
