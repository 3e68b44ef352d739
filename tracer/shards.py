"""One Parquet file of a trace: written atomically, read only if its digest is the listed one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import write_atomically
from configs.geometry import Geometry
from tracer.columns import SCALARS, column_spec, encode, stored_type
from tracer.manifest import ColumnInfo, Shard, sha256_of

_ZSTD_LEVEL = 9
# Activations are noise to a compressor: a high level takes 3 times as long and gains nothing.
_ZSTD_LEVEL_OF_ACTIVATIONS = 1
_ACTIVATIONS = ("embedding", "gate_inputs")
DAMAGED = "the file is cut off or edited; restore it, or record or import the trace again"


def write_shard(
    trace_dir: Path,
    group: str,
    index: int,
    block: Mapping[str, NDArray],
    infos: Mapping[str, ColumnInfo],
    geometry: Geometry,
) -> Shard:
    """Write shard `index` of a column group, rows [n, *shape] by column; return its entry."""
    arrays = {}
    for name, values in block.items():
        spec, encoding = column_spec(name, geometry), infos[name].encoding
        arrays[name] = encode(spec, encoding, values, stored_type(spec, encoding, geometry))
    table = pa.table(arrays)
    level = _ZSTD_LEVEL_OF_ACTIVATIONS if group in _ACTIVATIONS else _ZSTD_LEVEL
    data = parquet_bytes(table, dictionary=[], level=level)
    file = f"{group}/part-{index:05d}.parquet"
    (trace_dir / group).mkdir(exist_ok=True)
    write_atomically(trace_dir / file, data)
    return Shard(file=file, rows=table.num_rows, sha256=sha256_of(data), column=group)


def parquet_bytes(table: pa.Table, dictionary: list[str], level: int = _ZSTD_LEVEL) -> bytes:
    """Encode a table; columns named in `dictionary` by dictionary.

    Byte-stream-split and zstd make lists of ids and reals smaller than dictionaries do.
    """
    encodings = {}
    for field in table.schema:
        if field.name in SCALARS:
            encodings[field.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_fixed_size_list(field.type):
            encodings[f"{field.name}.list.element"] = "BYTE_STREAM_SPLIT"
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=level,
        use_dictionary=dictionary,
        column_encoding=encodings or None,
        store_schema=True,
    )
    return sink.getvalue()


def read_table(path: Path, sha256: str, rows: int, columns: list[str] | None) -> pa.Table:
    """Read columns (None: all) of a Parquet file.

    Raises UserError where the file is missing, has another digest or number of rows than listed,
    or lacks a column.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing, but listed in manifest.json; restore it")
    data = path.read_bytes()
    if sha256_of(data) != sha256:
        raise UserError(f"{path}: its SHA-256 differs from manifest.json's: {DAMAGED}")
    try:
        return _decode(path, data, rows, columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable Parquet; {DAMAGED}") from error


def _decode(path: Path, data: bytes, rows: int, columns: list[str] | None) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(data))
    absent = [name for name in columns or [] if name not in file.schema_arrow.names]
    if absent:
        raise UserError(f"{path}: has no column {absent[0]!r}; record or import the trace again")
    if file.metadata.num_rows != rows:
        raise UserError(
            f"{path}: has {file.metadata.num_rows} rows, manifest.json lists {rows}; {DAMAGED}"
        )
    return file.read(columns=columns)
