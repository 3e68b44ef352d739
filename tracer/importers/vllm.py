"""Import the routed experts that vLLM returns (`enable_return_routed_experts`).

vLLM gives every completion an integer array [tokens, layers, k] of expert ids, without weights:
`RequestOutput.outputs[i].routed_experts`, and in the server's answers `choices[i].routed_experts`,
as the base64 text of an .npy file or as nested lists. The rows are

- the prompt's tokens and all generated tokens but the last, which no forward pass needs; or
- where the answer has `prompt_routed_experts` (vLLM 0.21) the prompt's tokens in there, and the
  generated ones in `routed_experts`, -1 for prompt tokens whose keys and values were cached.

`layers` are the MoE layers, or all decoder layers with zeros in the dense ones (before 0.21).

Sources: vLLM, docs/training/routed_experts_replay.md, docs/training/routed_experts.md,
vllm/model_executor/layers/fused_moe/routed_experts_capturer.py; pull requests 28284 and 44638.

Files that are read, a request each (.jsonl: a line each), in the order of their names:

- .npy: the array alone
- .npz: `routed_experts`, and where known `prompt_routed_experts`, `prompt_token_ids`, `token_ids`
  (the generated ones), `prompt_tokens` (their number)
- .json, .jsonl: answers of /v1/completions, /v1/chat/completions or /inference/v1/generate
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.checks import check_columns
from tracer.columns import NULL_ID, column_spec
from tracer.importers.directory import new_directory
from tracer.importers.sequential import SequentialWriter
from tracer.manifest import sha256_of
from tracer.writer import TraceWriter

_SUFFIXES = (".npy", ".npz", ".json", ".jsonl")
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    AttributeError,
    TypeError,
    MemoryError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,
    binascii.Error,
)


@dataclass(frozen=True)
class _Answer:
    """One request as it was saved; None where the file does not say."""

    where: str
    experts: NDArray
    prompt_experts: NDArray | None = None
    prompt_ids: NDArray | None = None
    output_ids: NDArray | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.where}: {problem}")


def import_vllm(
    src: str | Path,
    model: str,
    out: str | Path,
    *,
    prompt_tokens: int | None = None,
    prefill_chunk: int | None = None,
) -> None:
    """Write the requests in `src`, a file or a directory of files, to the new directory `out`.

    `model` is a shipped model's name or the path of a YAML file. vLLM keeps no record of batches
    and steps: requests are written one after another as if each ran alone, the prompt in one step
    or in steps of `prefill_chunk` tokens. `prompt_tokens` is the length of the prompts where the
    files do not tell it; without it they could not be told from generated tokens. Token ids are
    kept where the files have them; there are no weights. Raises UserError naming file and request
    for what is damaged or does not fit the model; then nothing is written.
    """
    src = Path(src)
    geometry = load_geometry(model)
    files = _files(src)
    with new_directory(out) as draft:
        writer = TraceWriter(draft, _fields(src, files, geometry))
        requests = SequentialWriter(writer, prefill_chunk)
        for path in files:
            for answer in _answers(path):
                _add(requests, answer, geometry, prompt_tokens)
        requests.close()


def _files(src: Path) -> list[Path]:
    if src.is_dir():
        files = sorted(path for path in src.iterdir() if path.suffix in _SUFFIXES)
        if not files:
            raise UserError(f"{src}: holds no {', '.join(_SUFFIXES)} file; name the directory")
        return files
    if not src.is_file():
        raise UserError(f"{src}: no such file or directory; name what to import")
    if src.suffix not in _SUFFIXES:
        raise UserError(f"{src}: the name ends in none of {', '.join(_SUFFIXES)}; rename the file")
    return [src]


def _answers(path: Path) -> Iterator[_Answer]:
    if path.suffix == ".npy":
        yield _Answer(str(path), _read_npy(str(path), path.read_bytes()))
    elif path.suffix == ".npz":
        yield _from_npz(path)
    elif path.suffix == ".json":
        yield _from_json(str(path), path.read_bytes())
    else:
        yield from _from_lines(path)


def _from_lines(path: Path) -> Iterator[_Answer]:
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = True
                yield _from_json(f"{path}: line {number}", line)
    if not found:
        raise UserError(f"{path}: is empty; save the server's answers in it, one a line")


def _read_npy(where: str, data: bytes) -> NDArray:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
    except _UNREADABLE as error:
        raise UserError(
            f"{where}: not a readable .npy array ({_reason(error)}); restore it"
        ) from error
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise UserError(f"{where}: an archive, not one array; let its name end in .npz")
    return loaded


def _from_npz(path: Path) -> _Answer:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: not a readable .npz file ({_reason(error)}); restore it"
        ) from error
    where = str(path)
    if "routed_experts" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise UserError(
            f"{where}: no array 'routed_experts', only {found}; save it under that name"
        )
    prompt_tokens = arrays.get("prompt_tokens")
    return _Answer(
        where,
        arrays["routed_experts"],
        arrays.get("prompt_routed_experts"),
        _ids(where, "prompt_token_ids", arrays.get("prompt_token_ids")),
        _ids(where, "token_ids", arrays.get("token_ids")),
        None if prompt_tokens is None else _count(where, "prompt_tokens", prompt_tokens.tolist()),
    )


def _from_json(where: str, data: bytes) -> _Answer:
    try:
        content = json.loads(data)
    except _UNREADABLE as error:
        raise UserError(
            f"{where}: not valid JSON ({_reason(error)}); is it cut off? Save it again"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise UserError(f"{where}: no object with 'choices'; save the server's answer as it came")
    choices = content["choices"]
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise UserError(f"{where}: {len(choices)} choices; a request needs one: ask with n=1")
    choice, usage = choices[0], content.get("usage")
    experts = _decoded(where, "routed_experts", choice.get("routed_experts"))
    if experts is None:
        raise UserError(
            f"{where}: no routed_experts; start vllm serve with --enable-return-routed-experts"
        )
    counts = usage if isinstance(usage, dict) else {}
    prompt_ids = content.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return _Answer(
        where,
        experts,
        _decoded(where, "prompt_routed_experts", content.get("prompt_routed_experts")),
        _ids(where, "prompt_token_ids", prompt_ids),
        _ids(where, "token_ids", choice.get("token_ids")),
        _optional_count(where, "prompt_tokens", counts),
        _optional_count(where, "completion_tokens", counts),
    )


def _decoded(where: str, name: str, value: Any) -> NDArray | None:
    """An array from the base64 text of an .npy file or from nested lists."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise UserError(
                f"{where}: {name} is not base64 ({error}); is it cut off? Save it again"
            ) from error
        return _read_npy(f"{where}: {name}", data)
    try:
        return np.asarray(value)
    except ValueError:
        raise UserError(f"{where}: {name} holds lists of different lengths; restore it") from None


def _ids(where: str, name: str, values: Any) -> NDArray | None:
    if values is None:
        return None
    ids = _decoded(where, name, values)
    assert ids is not None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"{where}: {name} is {ids.dtype} {list(ids.shape)}, expected integers [n]")
    return ids


def _optional_count(where: str, name: str, counts: Mapping[str, Any]) -> int | None:
    return _count(where, name, counts[name]) if counts.get(name) is not None else None


def _count(where: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name} {value!r} is no number of at least 1")
    return value


def _add(
    requests: SequentialWriter, answer: _Answer, geometry: Geometry, given: int | None
) -> None:
    rows = _moe_layers(answer, "routed_experts", answer.experts, geometry)
    prompt = answer.prompt_experts
    if prompt is not None:
        # An answer of one token may have no rows of its own, and then no shape.
        parts = [_moe_layers(answer, "prompt_routed_experts", prompt, geometry), rows]
        rows = np.concatenate(parts)
    prompt_tokens = _prompt_tokens(answer, given)
    rows = _without_last_token(answer, rows, prompt_tokens)
    skipped = _cached_rows(answer, rows, prompt_tokens)
    experts = rows[skipped:]
    specs = {"experts": column_spec("experts", geometry)}
    where = answer.where if not skipped else f"{answer.where}: counted from row {skipped}"
    check_columns({"experts": experts}, specs, geometry.num_experts, where)
    _check_all_ran(answer, experts, skipped)
    requests.add(
        answer.where,
        experts,
        prompt_tokens,
        first_position=skipped,
        token_id=_token_ids(answer, len(rows), geometry)[skipped:],
    )


def _moe_layers(answer: _Answer, name: str, array: NDArray, geometry: Geometry) -> NDArray:
    """The array's MoE layers, int64 [tokens, L, k]."""
    layers, k = geometry.num_moe_layers, geometry.top_k
    if array.size == 0:
        return np.zeros((0, layers, k), np.int64)
    fits = array.ndim == 3 and array.shape[2] == k and array.dtype.kind in "iu"
    if not fits or array.shape[1] not in (layers, geometry.num_layers):
        answer.fail(
            f"{name} is {array.dtype} {list(array.shape)}, expected integers [tokens, {layers},"
            f" {k}] for {geometry.name} ({layers} MoE layers, top-{k}); name the model that ran"
        )
    if array.dtype.itemsize == 8 and array.max() > np.iinfo(np.int64).max:
        answer.fail(f"{name} holds {array.max()}, no expert's id; restore the file")
    ids = array.astype(np.int64)
    if array.shape[1] == layers:
        return ids
    dense = np.delete(ids, geometry.model_layer_ids, axis=1)
    if (dense > 0).any():
        token = int(np.argmax((dense > 0).any(axis=(1, 2))))
        answer.fail(
            f"row {token}: {name} has ids in a layer that is dense in {geometry.name} (MoE layers:"
            f" {geometry.model_layer_ids[0]} to {geometry.model_layer_ids[-1]}); name the model"
            " that ran"
        )
    return ids[:, list(geometry.model_layer_ids)]


def _prompt_tokens(answer: _Answer, given: int | None) -> int:
    known = {
        "the rows of prompt_routed_experts": _length(answer.prompt_experts),
        "prompt_token_ids": _length(answer.prompt_ids),
        "the prompt_tokens there": answer.prompt_tokens,
        "--prompt-tokens": given,
    }
    said = {name: value for name, value in known.items() if value is not None}
    if not said:
        answer.fail(
            "the length of the prompt is unknown; give --prompt-tokens, or save prompt_token_ids"
            " beside the experts (.npz)"
        )
    if len(set(said.values())) > 1:
        lengths = ", ".join(f"{value} by {name}" for name, value in said.items())
        answer.fail(f"the prompt's length differs: {lengths}; restore the file")
    return next(iter(said.values()))


def _length(array: NDArray | None) -> int | None:
    return None if array is None else len(array)


def _without_last_token(answer: _Answer, rows: NDArray, prompt_tokens: int) -> NDArray:
    """Rows of the tokens that a forward pass read: all but the last generated token."""
    if len(rows) < prompt_tokens:
        answer.fail(
            f"{len(rows)} rows, but the prompt has {prompt_tokens} tokens: the array is cut off,"
            " or the length is another request's"
        )
    said = {"token_ids": _length(answer.output_ids), "completion_tokens": answer.output_tokens}
    lengths = {name: value for name, value in said.items() if value is not None}
    if not lengths:
        return rows
    name, output_tokens = next(iter(lengths.items()))
    total = prompt_tokens + output_tokens
    if len(set(lengths.values())) > 1 or len(rows) not in (total - 1, total):
        answer.fail(
            f"{len(rows)} rows, expected {total - 1}: {prompt_tokens} tokens of the prompt and"
            f" {output_tokens} by {name}, without the last one; the array is cut off"
        )
    return rows[: total - 1]


def _cached_rows(answer: _Answer, rows: NDArray, prompt_tokens: int) -> int:
    """Number of first rows that are -1: tokens of the prompt that did not run."""
    ran = (rows != NULL_ID).any(axis=(1, 2))
    if not ran[:prompt_tokens].any():
        answer.fail("no token of the prompt has experts; record with an empty prefix cache")
    return int(np.argmax(ran))


def _check_all_ran(answer: _Answer, experts: NDArray, skipped: int) -> None:
    absent = experts == NULL_ID
    if absent.any():
        row, layer, _ = (int(index) for index in np.argwhere(absent)[0])
        answer.fail(f"row {skipped + row}, layer {layer}: no expert (-1) of a token that ran")


def _token_ids(answer: _Answer, rows: int, geometry: Geometry) -> NDArray:
    ids = np.full(rows, NULL_ID)
    if answer.prompt_ids is None:
        return ids
    known = answer.prompt_ids
    if answer.output_ids is not None:
        known = np.concatenate([known, answer.output_ids])
    known = known[:rows]
    bad = np.flatnonzero((known < 0) | (known >= geometry.vocab_size))
    if bad.size:
        answer.fail(
            f"token id {known[bad[0]]} at position {bad[0]} is outside [0, {geometry.vocab_size})"
            f" of {geometry.name}; name the model that ran"
        )
    ids[: len(known)] = known
    return ids


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fields(src: Path, files: list[Path], geometry: Geometry) -> dict[str, Any]:
    digests = "".join(sha256_of(path.read_bytes()) for path in files)
    digest = digests if len(files) == 1 else sha256_of(digests.encode())
    return {
        "model_id": geometry.name,
        "model_revision": geometry.revision,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import vllm",
            "sampling": {"batch": 1},
            "notes": (
                f"{src.name}, {len(files)} files, sha256 {digest}; batches and steps were not"
                " recorded: requests are written one after another; no weights"
            ),
        },
    }
