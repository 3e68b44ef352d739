"""manifest.json of a trace: what was recorded, how, and the digest of every file.

The manifest is the only file that a reader trusts: a Parquet file that it does not list is not part
of the trace, and one whose digest differs is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs.errors import UserError
from configs.files import write_atomically
from configs.geometry import Geometry
from configs.load import parse_json, validated

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
READABLE_VERSIONS = (1,)
TOKENS = "tokens"

_SHA256 = r"^[0-9a-f]{64}$"
_TIMINGS_FILE = r"^timings/part-[0-9]{5,}\.parquet$"
_SHARD_FILE = r"^[a-z0-9_]+/part-[0-9]{5,}\.parquet$"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Recording(_Record):
    """How a trace came to be: the program, its sampling parameters and the machine."""

    generator: str
    sampling: dict[str, str | int | float | bool | None] = {}
    seed: int | None = None
    software: dict[str, str] = {}
    gpu: str | None = None
    notes: str = ""


class PromptSet(_Record):
    """The prompts' name and the SHA-256 of their file."""

    name: str
    sha256: str = Field(pattern=_SHA256)


class Part(_Record):
    """One matrix of an expert and its bytes at the geometry's expert dtype."""

    name: str
    bytes: int = Field(gt=0)


class ColumnInfo(_Record):
    """A column as the reader returns it, and how its values are encoded in Parquet.

    The two errors are bounds of |decoded - recorded|, absolute and relative to |recorded|; a value
    meets the larger of both. Zero and zero: lossless.
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0


class Shard(_Record):
    """One Parquet file of one column group (`column` is "tokens" or an optional column's name)."""

    file: str = Field(pattern=_SHARD_FILE)
    rows: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)
    column: str


class TimingsFile(_Record):
    """Parquet file of times by step and layer; see `Trace.timings`."""

    file: str = Field(pattern=_TIMINGS_FILE)
    rows: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)


class RequestsFile(_Record):
    """requests.parquet of a complete trace."""

    file: str = Field(pattern=r"^requests\.parquet$")
    rows: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)


class TrainedPredictor(_Record):
    """Whose predictions a learned column holds, and which requests they were trained on.

    Predictions about `trained_requests` (those that decided when to stop included) are in-sample:
    judge on the others. `heldout_accuracy`: share of the true k experts among the k predicted on
    the others, by phase, where there are such rows. `weights_file` is relative to the trace where
    the file lies in it, else its bare name.
    """

    column: str
    kind: str
    stride: int = Field(gt=0)
    hidden_units: int = Field(gt=0)
    seed: int
    trained_requests: tuple[int, ...]
    heldout_accuracy: dict[str, float] = {}
    weights_file: str
    weights_sha256: str = Field(pattern=_SHA256)


class Manifest(_Record):
    """Everything about a trace except its rows.

    `expert_norms` is [L][E], the norm of each expert's weights if known; `parts` an expert's
    matrices if known. `complete` is false until the writer was closed: a recording that was killed
    keeps what `shards` lists. `geometry_sha256` and `predictors_sha256` are the digests of
    `geometry` and `predictors` as the file has them; `write_manifest` sets them, and a manifest
    without them is not checked.
    """

    schema_version: int = SCHEMA_VERSION
    model_id: str
    model_revision: str = ""
    geometry: Geometry
    geometry_sha256: str | None = Field(default=None, pattern=_SHA256)
    recording: Recording
    prompts: PromptSet | None = None
    expert_norms: tuple[tuple[float, ...], ...] | None = None
    parts: tuple[Part, ...] | None = None
    columns: dict[str, ColumnInfo] = {}
    shards: tuple[Shard, ...] = ()
    timings: tuple[TimingsFile, ...] = ()
    requests: RequestsFile | None = None
    predictors: tuple[TrainedPredictor, ...] = ()
    predictors_sha256: str | None = Field(default=None, pattern=_SHA256)
    complete: bool = False

    @model_validator(mode="after")
    def _norms_fit_geometry(self) -> Manifest:
        if self.expert_norms is None:
            return self
        shape = (self.geometry.num_moe_layers, self.geometry.num_experts)
        if len(self.expert_norms) != shape[0] or {len(n) for n in self.expert_norms} != {shape[1]}:
            raise ValueError(f"expert_norms must be {shape[0]} layers x {shape[1]} experts")
        return self

    @model_validator(mode="after")
    def _shards_are_aligned(self) -> Manifest:
        files = [shard.file for shard in self.shards]
        if len(set(files)) != len(files):
            raise ValueError("shards lists a file twice")
        rows = self.shard_rows(TOKENS)
        for column in {shard.column for shard in self.shards}:
            if self.shard_rows(column) != rows:
                raise ValueError(f"the shards of column {column!r} do not have the tokens' rows")
        return self

    @model_validator(mode="after")
    def _predictors_have_columns(self) -> Manifest:
        columns = [predictor.column for predictor in self.predictors]
        if len(set(columns)) != len(columns):
            raise ValueError("predictors lists a column twice")
        if not set(columns) <= set(self.columns):
            raise ValueError("predictors lists a column that the trace does not have")
        return self

    def predictor_of(self, column: str) -> TrainedPredictor | None:
        """Return who predicted a learned column; None where that is not known."""
        return next((p for p in self.predictors if p.column == column), None)

    def shards_of(self, column: str) -> list[Shard]:
        """Return the shards of one column group, in row order."""
        return [shard for shard in self.shards if shard.column == column]

    def shard_rows(self, column: str) -> list[int]:
        """Rows of each shard of one column group."""
        return [shard.rows for shard in self.shards_of(column)]

    @property
    def rows(self) -> int:
        """Number of token rows in the listed shards."""
        return sum(self.shard_rows(TOKENS))

    @property
    def digest(self) -> str:
        """SHA-256 over what is simulated: the geometry, the files, and who trained predictors.

        Not over the timings, which differ from run to run and are read by no simulation.
        """
        files = sorted((shard.file, shard.sha256) for shard in self.shards)
        requests = self.requests.sha256 if self.requests else None
        content = {
            "geometry": self.geometry.model_dump(mode="json"),
            "files": files,
            "requests": requests,
        }
        if self.predictors:
            content["trained_requests"] = {p.column: p.trained_requests for p in self.predictors}
        return sha256_of(json.dumps(content, sort_keys=True).encode())


def build_manifest(fields: Mapping[str, Any]) -> Manifest:
    """Make a manifest from keyword fields; one that does not fit is a UserError."""
    return validated(Manifest, dict(fields), "trace manifest")


def read_manifest(trace_dir: Path) -> Manifest:
    """Read and check `trace_dir/manifest.json`.

    Raises UserError where it is absent, cut off, of an unknown schema version, or where a field is
    missing, unknown or of the wrong type, and where geometry or predictors are not those that were
    written.
    """
    path = trace_dir / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"{trace_dir}: not a trace (no {MANIFEST_FILE}); name a directory with a trace"
        )
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it from the source") from error
    _check_version(path, content)
    manifest = validated(Manifest, content, str(path))
    mend = "restore it, or pass --geometry to time another model"
    _check_field(path, "geometry", manifest.geometry_sha256, content, mend)
    _check_field(path, "predictors", manifest.predictors_sha256, content, "restore it")
    return manifest


def _check_field(
    path: Path, field: str, listed: str | None, content: Mapping[str, Any], mend: str
) -> None:
    # As the file has it: a field that a later version adds must not change the digest.
    if listed not in (None, _field_sha256(content, field)):
        raise UserError(f"{path}: {field} differs from its digest ({field}_sha256); {mend}")


def _field_sha256(content: Mapping[str, Any], field: str) -> str:
    return sha256_of(json.dumps(content.get(field), sort_keys=True).encode())


def _check_version(path: Path, content: object) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path}: field schema_version is missing; this is no trace manifest")
    if version not in READABLE_VERSIONS:
        readable = ", ".join(str(known) for known in READABLE_VERSIONS)
        raise UserError(
            f"{path}: schema_version {version} is not known (this version of moesim reads"
            f" {readable}); update moesim or record the trace again"
        )


def write_manifest(trace_dir: Path, manifest: Manifest) -> None:
    """Replace `trace_dir/manifest.json` atomically, with the digests of its fields."""
    content = manifest.model_dump(mode="json")
    for field in ("geometry", "predictors"):
        content[f"{field}_sha256"] = _field_sha256(content, field)
    write_atomically(trace_dir / MANIFEST_FILE, _layout(content).encode())


def sha256_of(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _layout(content: dict[str, Any]) -> str:
    """JSON with one line a field, and one line an entry of a dict or of a list of records."""
    fields = [f" {json.dumps(key)}: {_layout_value(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _layout_value(value: Any) -> str:
    if isinstance(value, dict) and value:
        entries = [f"  {json.dumps(key)}: {_dumps(item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(entries) + "\n }"
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return "[\n" + ",\n".join(f"  {_dumps(item)}" for item in value) + "\n ]"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
