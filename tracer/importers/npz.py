"""Import decode traces kept as one .npz: expert ids and scores, token by token.

The layout is that of AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting (batch-1 greedy decoding):
experts uint8 [n, L, k], scores float16 [n, L, k] (softmax over the k), token int32 [n], offsets
int64 [R + 1] (rows of request r: offsets[r] to offsets[r + 1]), prompt_len int32 [R], dataset
str [R], n_experts int. Prefill rows were not recorded.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.checks import check_columns, check_nulls_match
from tracer.columns import DECODE, column_spec
from tracer.importers.directory import new_directory
from tracer.manifest import sha256_of
from tracer.writer import TraceWriter

_FIELDS = ("experts", "scores", "token", "offsets", "prompt_len", "dataset", "n_experts")
_BLOCK_ROWS = 65_536

Arrays = dict[str, NDArray]


def import_npz(src: str | Path, model: str, out: str | Path) -> None:
    """Write the trace in `src` (.npz) to the new directory `out`.

    `model` is a shipped model's name or the path of a YAML file; its MoE layers, experts and top-k
    must be the file's. Every row becomes a decode step of its own, at position prompt length + row
    in the request; the dataset becomes the domain. Token ids are kept as they are: an arbitrary
    index, not a tokenizer's. Raises UserError for a file that is damaged, lacks an array or does
    not fit the model; then nothing is written.
    """
    src = Path(src)
    geometry = load_geometry(model)
    arrays = _read(src)
    _check_shapes(src, arrays, geometry)
    _check_requests(src, arrays)
    columns = _columns(arrays)
    specs = {name: column_spec(name, geometry) for name in columns}
    check_columns(columns, specs, geometry.num_experts, str(src))
    check_nulls_match(columns, str(src))
    with new_directory(out) as draft, TraceWriter(draft, _fields(src, geometry)) as writer:
        for begin in range(0, len(columns["step"]), _BLOCK_ROWS):
            rows = slice(begin, begin + _BLOCK_ROWS)
            writer.write_rows(**{name: values[rows] for name, values in columns.items()})
        writer.close(_requests(arrays))


def _read(src: Path) -> Arrays:
    if not src.is_file():
        raise UserError(f"{src}: no such file; name the .npz file to import")
    if not zipfile.is_zipfile(src):
        raise UserError(f"{src}: not a readable .npz file (no archive, or cut off); restore it")
    try:
        with src.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in _FIELDS if name not in archive]
            arrays = {name: archive[name] for name in _FIELDS if name in archive}
    except (
        OSError,
        EOFError,
        ValueError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        TypeError,
    ) as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason:  # numpy's advice is to load it nevertheless
            reason = "it holds Python objects, which are not loaded"
        raise UserError(f"{src}: not a readable .npz file ({reason}); restore it") from error
    if missing:
        raise UserError(f"{src}: array {missing[0]!r} is missing; it needs {', '.join(_FIELDS)}")
    return arrays


def _check_shapes(src: Path, arrays: Arrays, geometry: Geometry) -> None:
    rows, requests = arrays["token"].size, arrays["prompt_len"].size
    ids = (rows, geometry.num_moe_layers, geometry.top_k)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token": ("iu", (rows,)),
        "prompt_len": ("iu", (requests,)),
        "experts": ("iu", ids),
        "scores": ("f", ids),
        "offsets": ("iu", (requests + 1,)),
        "dataset": ("U", (requests,)),
        "n_experts": ("iu", ()),
    }
    for name, (kinds, shape) in expected.items():
        array = arrays[name]
        if array.dtype.kind in kinds and array.shape == shape:
            continue
        raise UserError(
            f"{src}: array {name!r} is {array.dtype} {list(array.shape)}, expected"
            f" {_KINDS[kinds]} {list(shape)}{_why(array, shape, geometry)}"
        )
    if arrays["n_experts"] != geometry.num_experts:
        raise UserError(
            f"{src}: n_experts is {arrays['n_experts']}, {geometry.name} has"
            f" {geometry.num_experts}; name the model that was recorded"
        )


def _why(array: NDArray, shape: tuple[int, ...], geometry: Geometry) -> str:
    """What a wrong shape tells: another model, or arrays that do not belong together."""
    if array.ndim == 3 and array.shape[1:] != shape[1:]:
        return (
            f" for {geometry.name} ({geometry.num_moe_layers} MoE layers, top-{geometry.top_k});"
            " name the model that was recorded"
        )
    if array.ndim == len(shape) and array.shape != shape:
        return (
            ": token has an entry a row, prompt_len an entry a request; the arrays are cut off or"
            " not of one recording, restore the file"
        )
    return "; restore the file"


_KINDS = {"iu": "integers", "f": "floats", "U": "text"}


def _check_requests(src: Path, arrays: Arrays) -> None:
    offsets, rows = arrays["offsets"].astype(np.int64), len(arrays["token"])
    if rows == 0:
        raise UserError(f"{src}: holds no rows; nothing to import")
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != rows or (lengths <= 0).any():
        bad = int(np.argmax(lengths <= 0)) if (lengths <= 0).any() else len(lengths)
        raise UserError(
            f"{src}: offsets must increase from 0 to the {rows} rows (found {offsets[bad]} at"
            f" entry {bad}, {offsets[-1]} at the end); restore the file"
        )
    negative = np.flatnonzero(arrays["prompt_len"] < 0)
    if negative.size:
        request = int(negative[0])
        raise UserError(
            f"{src}: prompt_len {arrays['prompt_len'][request]} of request {request} is negative"
        )


def _fields(src: Path, geometry: Geometry) -> dict[str, Any]:
    return {
        "model_id": geometry.name,
        "model_revision": geometry.revision,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import npz",
            "sampling": {"batch": 1},
            "notes": (
                f"{src.name}, sha256 {sha256_of(src.read_bytes())}; decode rows alone, prefill was"
                " not recorded; token ids are an arbitrary index, not a tokenizer's; weights are"
                " the scores, a softmax over the chosen experts"
            ),
        },
    }


def _columns(arrays: Arrays) -> Arrays:
    rows = len(arrays["token"])
    lengths = np.diff(arrays["offsets"])
    request = np.repeat(np.arange(len(lengths)), lengths)
    step = np.arange(rows)
    row_in_request = step - arrays["offsets"][:-1][request]
    return {
        "request": request,
        "step": step,
        "row": np.zeros(rows, np.int16),
        "phase": np.full(rows, DECODE),
        "position": arrays["prompt_len"][request] + row_in_request,
        "token_id": arrays["token"],
        "experts": arrays["experts"],
        "weights": arrays["scores"],
    }


def _requests(arrays: Arrays) -> pd.DataFrame:
    lengths = np.diff(arrays["offsets"])
    return pd.DataFrame(
        {
            "request": np.arange(len(lengths)),
            "prompt_tokens": arrays["prompt_len"],
            "output_tokens": lengths + 1,
            "domain": arrays["dataset"].tolist(),
        }
    )
