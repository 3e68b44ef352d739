"""Import routing kept as Parquet with the columns `indices` and `scores`, a file a layer.

The layout is that of CMU-FLAME/FLAME-MoE-Traces on the Hugging Face Hub (its README), which the
FLAME-MoE models' routing during training was published in:

    actives/iter_5473/layer_02.parquet     a row a token: indices list<int16>[k] (expert ids),
    actives/iter_5473/layer_03.parquet     scores list<float16>[k] (their router probabilities, a
    ...                                    softmax over all experts)
    samples/000.parquet ...                token_id int32, row-aligned with the files above

The number in a file's name is the decoder layer, counted from 0 or from 1. The files say nothing
of sequences, positions or phases: whoever recorded them knows how long the sequences were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.checks import check_columns, check_nulls_match
from tracer.columns import column_spec
from tracer.importers.directory import new_directory
from tracer.importers.sequential import MAX_STEP_ROWS, SequentialWriter
from tracer.writer import TraceWriter

_LAYER_FILE = re.compile(r"^layer_(\d+)\.parquet$")
_READ_ROWS = 65_536
_UNREADABLE = (pa.ArrowException, OSError, NotImplementedError)


def import_hf_parquet(
    src: str | Path,
    model: str,
    out: str | Path,
    *,
    sequence_tokens: int,
    token_ids: str | Path | None = None,
    max_tokens: int | None = None,
) -> None:
    """Write the directory `src` of layer_NN.parquet files to the new directory `out`.

    `model` is a shipped model's name or the path of a YAML file; a file for each of its MoE layers
    must be there. Every `sequence_tokens` rows are a request: one prefill step, positions from 0.
    The scores become the weights as they are. `token_ids` is the directory of samples, or one file
    of them; without it token ids are unknown. `max_tokens` takes the first rows only. Raises
    UserError naming file and row for what is damaged, cut off or does not fit the model; then
    nothing is written. Reads one sequence at a time.
    """
    src = Path(src)
    geometry = load_geometry(model)
    files = _layer_files(src, geometry)
    rows = _common_rows(files)
    rows = _rows_taken(src, rows, sequence_tokens, max_tokens)
    samples = None if token_ids is None else _token_blocks(Path(token_ids), sequence_tokens, rows)
    readers = [_column_blocks(path, sequence_tokens) for path in files]
    with new_directory(out) as draft:
        writer = TraceWriter(draft, _fields(src, geometry, rows, sequence_tokens))
        requests = SequentialWriter(writer)
        for begin in range(0, rows, sequence_tokens):
            blocks = [next(reader) for reader in readers]
            where = f"{src}: rows counted from {begin}"
            experts, weights = _checked(where, files, blocks, geometry, begin)
            ids = None
            if samples is not None:
                ids = _checked_ids(next(samples), geometry, token_ids, begin)
            requests.add(where, experts, sequence_tokens, weights=weights, token_id=ids)
        requests.close()


def _layer_files(src: Path, geometry: Geometry) -> list[Path]:
    """The MoE layers' files, in the order of the layers."""
    if not src.is_dir():
        raise UserError(f"{src}: no such directory; name the one with layer_NN.parquet files")
    matches = [(_LAYER_FILE.match(path.name), path) for path in src.iterdir()]
    found = sorted((int(match.group(1)), path) for match, path in matches if match)
    numbers = [number for number, _ in found]
    expected = geometry.model_layer_ids
    if numbers not in ([*expected], [layer + 1 for layer in expected]):
        have = ", ".join(map(str, numbers)) or "none"
        raise UserError(
            f"{src}: holds layer_NN.parquet of layers {have}; {geometry.name} has MoE layers"
            f" {expected[0]} to {expected[-1]} ({len(expected)} of them, counted from 0; from 1 is"
            " accepted too); name the directory of one checkpoint, and the model that was recorded"
        )
    return [path for _, path in found]


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except _UNREADABLE as error:
        raise UserError(f"{path}: not readable Parquet: cut off or edited; restore it") from error


def _common_rows(files: list[Path]) -> int:
    counts = []
    for path in files:
        with _open(path) as file:
            missing = {"indices", "scores"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(
                    f"{path}: no column {min(missing)!r}, only"
                    f" {', '.join(file.schema_arrow.names)}; it needs indices and scores"
                )
            counts.append(file.metadata.num_rows)
        if counts[-1] != counts[0]:
            raise UserError(
                f"{path}: {counts[-1]} rows, {files[0].name} has {counts[0]}; restore the file"
            )
    return counts[0]


def _rows_taken(src: Path, rows: int, sequence_tokens: int, max_tokens: int | None) -> int:
    if not 1 <= sequence_tokens <= MAX_STEP_ROWS:
        raise UserError(f"--sequence-tokens {sequence_tokens} is outside [1, {MAX_STEP_ROWS}]")
    if rows == 0:
        raise UserError(f"{src}: the files hold no rows; nothing to import")
    if rows % sequence_tokens:
        raise UserError(
            f"{src}: {rows} rows are no multiple of --sequence-tokens {sequence_tokens}; give the"
            " length of the sequences that were recorded"
        )
    if max_tokens is None:
        return rows
    if max_tokens < 1 or max_tokens % sequence_tokens:
        raise UserError(
            f"--max-tokens {max_tokens} is no multiple of --sequence-tokens {sequence_tokens}"
        )
    return min(rows, max_tokens)


def _column_blocks(path: Path, rows: int) -> Iterator[pa.Table]:
    with _open(path) as file:
        yield from _blocks(path, file, ["indices", "scores"], rows)


def _token_blocks(src: Path, block_rows: int, rows: int) -> Iterator[pa.Table]:
    """Blocks of column token_id over all files of samples, checked to be enough."""
    files = sorted(src.glob("*.parquet")) if src.is_dir() else [src]
    if not files or not files[0].is_file():
        raise UserError(f"{src}: no Parquet files of token ids; name the directory of samples")
    available = 0
    for path in files:
        with _open(path) as file:
            if "token_id" not in file.schema_arrow.names:
                raise UserError(f"{path}: no column 'token_id'; name the directory of samples")
            available += file.metadata.num_rows
    if available < rows:
        raise UserError(f"{src}: {available} token ids for {rows} rows; name all of the samples")
    return _all_blocks(files, ["token_id"], block_rows)


def _all_blocks(files: list[Path], columns: list[str], rows: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for path in files:
        with _open(path) as file:
            held.extend(_blocks(path, file, columns, rows))
            whole = pa.concat_tables(held)
        while whole.num_rows >= rows:
            yield whole.slice(0, rows)
            whole = whole.slice(rows)
        held = [whole]


def _blocks(path: Path, file: pq.ParquetFile, columns: list[str], rows: int) -> Iterator[pa.Table]:
    """Tables of `rows` rows each; the last may be shorter."""
    held = file.schema_arrow.empty_table().select(columns)
    batches = file.iter_batches(batch_size=max(rows, _READ_ROWS), columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except _UNREADABLE as error:
            raise UserError(f"{path}: cut off or edited; restore it") from error
        if batch is None:
            break
        held = pa.concat_tables([held, pa.Table.from_batches([batch])])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held.num_rows:
        yield held


def _checked(
    where: str, files: list[Path], blocks: list[pa.Table], geometry: Geometry, begin: int
) -> tuple[NDArray, NDArray]:
    """Experts and weights of one sequence, [n, L, k]."""
    experts, weights = [], []
    for path, block in zip(files, blocks, strict=True):
        ids = _matrix(path, block, "indices", geometry, begin)
        scores = _matrix(path, block, "scores", geometry, begin)
        bad = np.argwhere(~((scores >= 0) & (scores <= 1)))
        if bad.size:
            row, rank = (int(index) for index in bad[0])
            _fail(path, begin + row, f"scores: {scores[row, rank]} is no probability")
        experts.append(ids)
        weights.append(scores)
    arrays = {"experts": np.stack(experts, axis=1), "weights": np.stack(weights, axis=1)}
    specs = {name: column_spec(name, geometry) for name in arrays}
    _check_range(files, arrays["experts"], geometry, begin)
    check_columns(arrays, specs, geometry.num_experts, where)
    check_nulls_match(arrays, where)
    return arrays["experts"], arrays["weights"]


def _check_range(files: list[Path], experts: NDArray, geometry: Geometry, begin: int) -> None:
    bad = np.argwhere((experts < 0) | (experts >= geometry.num_experts))
    if bad.size:
        row, layer, rank = (int(index) for index in bad[0])
        _fail(
            files[layer],
            begin + row,
            f"indices: expert {experts[row, layer, rank]} is outside [0, {geometry.num_experts}) of"
            f" {geometry.name}",
        )


def _matrix(path: Path, block: pa.Table, name: str, geometry: Geometry, begin: int) -> NDArray:
    """A column of lists as [n, k]."""
    column = block[name].combine_chunks()
    kind = column.type
    lists = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    right = pa.types.is_integer if name == "indices" else pa.types.is_floating
    if not lists or not right(kind.value_type):
        wanted = "integers" if name == "indices" else "floats"
        raise UserError(f"{path}: column {name} is {kind}, expected lists of {wanted}; restore it")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != geometry.top_k)
    if bad.size:
        _fail(
            path,
            begin + int(bad[0]),
            f"{name} holds {lengths[bad[0]]} values, {geometry.name} has top-{geometry.top_k}",
        )
    values = column.flatten()
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        _fail(path, begin + at // geometry.top_k, f"{name} holds a null")
    matrix: NDArray = values.to_numpy(zero_copy_only=False).reshape(-1, geometry.top_k)
    return matrix.astype(np.int64) if name == "indices" else matrix


def _checked_ids(
    block: pa.Table, geometry: Geometry, src: str | Path | None, begin: int
) -> NDArray:
    column = block["token_id"].combine_chunks()
    if not pa.types.is_integer(column.type) or column.null_count:
        raise UserError(f"{src}: token_id is {column.type} or holds nulls, expected integers")
    ids: NDArray = column.to_numpy(zero_copy_only=False).astype(np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= geometry.vocab_size))
    if bad.size:
        raise UserError(
            f"{src}: row {begin + bad[0]}: token_id {ids[bad[0]]} is outside"
            f" [0, {geometry.vocab_size}) of {geometry.name}; name the model that was recorded"
        )
    return ids


def _fail(path: Path, row: int, problem: str) -> NoReturn:
    raise UserError(
        f"{path}: row {row}: {problem}; restore the file, or name the model that was recorded"
    )


def _fields(src: Path, geometry: Geometry, rows: int, sequence_tokens: int) -> dict[str, Any]:
    return {
        "model_id": geometry.name,
        "model_revision": geometry.revision,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import hf-parquet",
            "notes": (
                f"{src.name}, {rows} rows as sequences of {sequence_tokens} tokens, each one"
                " prefill step; nothing was decoded; weights are the scores, a softmax over all"
                " experts"
            ),
        },
    }
