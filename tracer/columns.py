"""The columns of a trace: shape and dtype in memory, encoding in Parquet, and what makes one valid.

n rows (tokens), L MoE layers, E experts, k experts a token, H hidden size:

==================  =======  ==========  ==========================================================
column              dtype    shape       meaning
==================  =======  ==========  ==========================================================
request             int32    [n]         request id
step                int32    [n]         forward step, increasing in the file; its rows are adjacent
row                 int16    [n]         row in the step's batch
phase               uint8    [n]         0 prefill, 1 decode
position            int32    [n]         position in the request, the prompt's first token is 0
token_id            int32    [n]         -1 (null) where unknown
experts             int16    [n, L, k]   -1 (null) where the layer did not run for the token,
                                         and last where fewer than k experts with weights ran
weights             float16  [n, L, k]   nan (null) exactly where experts is null
gate_probs          float16  [n, L, E]   the gate's score (softmax or sigmoid) over all experts,
                                         normalised to sum 1
gate_norms          float32  [n, L]      norm of the gate's input
lookahead_d         int16    [n, L, 2k]  experts of MoE layer l + d as predicted by the gate of
                                         l + d from the gate input of l, best first; -1 (null)
                                         where there is no layer l + d
learned_d           int16    [n, L, 2k]  likewise, by a learned predictor
embedding           float16  [n, H]      the step's input embedding of the token
gate_inputs         float16  [n, L, H]   the gate's input; null in rows that do not keep it
residency           uint8    [n, L, k]   the recording engine's own hit (1) or miss (0); 255 (null)
                                         where the layer did not run
==================  =======  ==========  ==========================================================

`request` to `weights` lie together in the group "tokens" (weights may be absent); every other
column is a group of its own. Predictions are E wide where 2k > E.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry
from tracer.manifest import TOKENS, ColumnInfo

PREFILL, DECODE = 0, 1
SCALARS = ("request", "step", "row", "phase", "position", "token_id")
TOKEN_COLUMNS = (*SCALARS, "experts", "weights")
REQUIRED = (*SCALARS, "experts")
NULL_ID = -1
NULL_RESIDENCY = 255

_INT16_SCALARS = ("row",)
_PREDICTION = re.compile(r"^(lookahead|learned)_[1-9]$")
_OPTIONAL_NAMES = (
    "weights, gate_probs, gate_norms, lookahead_1.., learned_1.., embedding, gate_inputs, residency"
)

SQRT_U8_LEVELS = 255
_SQRT_HALF_STEP = 0.5 / SQRT_U8_LEVELS
_FLOAT16_REL_ERROR = 2.0**-11
_FLOAT16_ABS_ERROR = 2.0**-25
# |p - q| = |s - r| (s + r), |s - r| <= half a step and s, r <= 1; float16 rounds before and after.
SQRT_U8_MAX_ABS_ERROR = 2 * _SQRT_HALF_STEP + _FLOAT16_REL_ERROR

_ERRORS = {  # encoding: (largest absolute, largest relative error)
    "plain": (0.0, 0.0),
    "float16": (_FLOAT16_ABS_ERROR, _FLOAT16_REL_ERROR),
    "sqrt_u8": (SQRT_U8_MAX_ABS_ERROR, 0.0),
}


@dataclass(frozen=True)
class ColumnSpec:
    """One column of a trace of one geometry: `shape` is a row's, `null` the value of a null."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    null: float | None
    encodings: tuple[str, ...]

    @property
    def group(self) -> str:
        """Directory of the column's shards, and their `column` in the manifest."""
        return TOKENS if self.name in TOKEN_COLUMNS else self.name

    @property
    def width(self) -> int:
        """Values in a row."""
        return math.prod(self.shape)

    def info(self, encoding: str) -> ColumnInfo:
        """Describe the column for the manifest."""
        absolute, relative = _ERRORS[encoding]
        return ColumnInfo(
            dtype=self.dtype.name,
            shape=self.shape,
            encoding=encoding,
            max_abs_error=absolute,
            max_rel_error=relative,
        )


def column_spec(name: str, geometry: Geometry, where: str = "trace") -> ColumnSpec:
    """Return the spec of column `name`; an unknown name is a UserError that begins with `where`."""
    layers, experts, k = geometry.num_moe_layers, geometry.num_experts, geometry.top_k
    hidden, wide = geometry.hidden_size, min(2 * k, experts)
    f16, f32, i16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int16)
    if name in SCALARS:
        return ColumnSpec(name, _scalar_dtype(name), (), _scalar_null(name), ("plain",))
    if _PREDICTION.match(name):
        return ColumnSpec(name, i16, (layers, wide), NULL_ID, ("plain",))
    known = {
        "experts": ColumnSpec(name, i16, (layers, k), NULL_ID, ("plain",)),
        "weights": ColumnSpec(name, f16, (layers, k), math.nan, ("float16",)),
        "gate_probs": ColumnSpec(name, f16, (layers, experts), math.nan, ("sqrt_u8", "float16")),
        "gate_norms": ColumnSpec(name, f32, (layers,), math.nan, ("plain",)),
        "embedding": ColumnSpec(name, f16, (hidden,), None, ("float16",)),
        "gate_inputs": ColumnSpec(name, f16, (layers, hidden), math.nan, ("float16",)),
        "residency": ColumnSpec(name, np.dtype(np.uint8), (layers, k), NULL_RESIDENCY, ("plain",)),
    }
    if name not in known:
        raise UserError(
            f"{where}: column {name!r} is not known; the columns are {', '.join(REQUIRED)},"
            f" {_OPTIONAL_NAMES}"
        )
    return known[name]


def _scalar_dtype(name: str) -> np.dtype:
    if name == "phase":
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if name in _INT16_SCALARS else np.int32)


def _scalar_null(name: str) -> int | None:
    return NULL_ID if name == "token_id" else None


def stored_type(spec: ColumnSpec, encoding: str, geometry: Geometry) -> pa.DataType:
    """Arrow type of a column on disk.

    Ids take the narrowest unsigned integer that holds E - 1. Reals are float32 (holding float16
    values where the encoding says so): readers of Parquet that know no float16 open them too, and
    byte-stream-split makes them as small.
    """
    if spec.dtype == np.int16 and spec.shape:
        value = pa.uint8() if geometry.num_experts <= 256 else pa.uint16()
    elif encoding == "sqrt_u8":
        value = pa.uint8()
    elif spec.dtype.kind == "f":
        value = pa.float32()
    else:
        value = pa.from_numpy_dtype(spec.dtype)
    return pa.list_(value, spec.width) if spec.shape else value


def encode(spec: ColumnSpec, encoding: str, values: NDArray, stored: pa.DataType) -> pa.Array:
    """Turn [n, *shape] values of the spec's dtype into an Arrow array of type `stored`."""
    flat = np.ascontiguousarray(values).reshape(-1)
    nulls = _nulls(spec, flat)
    if encoding == "sqrt_u8":
        flat = _to_sqrt_u8(flat, nulls)
    element = stored.value_type if spec.shape else stored
    cast = flat.astype(element.to_pandas_dtype(), copy=False)
    array = pa.array(cast, type=element, mask=nulls)
    return pa.FixedSizeListArray.from_arrays(array, type=stored) if spec.shape else array


def _nulls(spec: ColumnSpec, flat: NDArray) -> NDArray | None:
    if spec.null is None:
        return None
    mask = np.isnan(flat) if spec.dtype.kind == "f" else flat == spec.null
    return mask if mask.any() else None


def _to_sqrt_u8(flat: NDArray, nulls: NDArray | None) -> NDArray:
    filled = flat.astype(np.float32)
    if nulls is not None:
        filled[nulls] = 0.0
    return np.rint(SQRT_U8_LEVELS * np.sqrt(filled)).astype(np.uint8)


def decode(spec: ColumnSpec, encoding: str, array: pa.Array) -> NDArray:
    """Turn a stored Arrow array of n rows into values [n, *shape] of the spec's dtype."""
    rows = len(array)
    elements = array.flatten() if spec.shape else array
    # The values under a null are undefined, hence fill_null before anything reads them.
    nulls = elements.is_null().to_numpy(zero_copy_only=False) if elements.null_count else None
    flat = (elements.fill_null(0) if nulls is not None else elements).to_numpy(zero_copy_only=False)
    if encoding == "sqrt_u8":
        values = _SQRT_U8_TABLE[flat]
    else:
        values = flat.astype(spec.dtype, copy=nulls is not None)
    if nulls is not None:
        values[nulls] = spec.null
    return values.reshape(rows, *spec.shape)


_SQRT_U8_TABLE = ((np.arange(SQRT_U8_LEVELS + 1) / SQRT_U8_LEVELS) ** 2).astype(np.float16)
