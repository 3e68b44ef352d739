"""Import the access log that the BigMoeOnEdge engine writes (`route_trace v1`).

    # route_trace v1
    # model=PATH arch=NAME n_layer=48 n_expert=128 n_expert_used=6
    # layer=0 expert_bytes=3059712 dense_bytes=11953152         (one line a layer)
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
    0,0,0,0,0,49,0.221297,0,3059712                             (one line an access)

A turn is a request. Phase 0 is its prefill, one batch whose steps are its tokens; phase 1 is
decoding, a step a token. Slot is the rank; residency 1 says that the engine found the expert in its
memory; expert_bytes is what an access read from storage. The engine may skip a layer for prefill
tokens other than the last.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.columns import DECODE, NULL_ID, NULL_RESIDENCY, PREFILL
from tracer.importers.directory import new_directory
from tracer.manifest import sha256_of
from tracer.writer import TraceWriter

_MAGIC = "# route_trace v1"
_COLUMNS = (
    "turn",
    "phase",
    "step",
    "layer",
    "slot",
    "expert",
    "weight",
    "residency",
    "expert_bytes",
)
_WEIGHT = _COLUMNS.index("weight")
_MODEL = re.compile(r"# model=(\S+) arch=\S+ n_layer=(\d+) n_expert=(\d+) n_expert_used=(\d+)$")
_LAYER = re.compile(r"# layer=(\d+) expert_bytes=([1-9]\d*)(?: dense_bytes=([1-9]\d*))?$")


@dataclass(frozen=True)
class _Header:
    model_file: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: tuple[int, ...]
    dense_bytes: tuple[int, ...] | None
    lines: int


@dataclass(frozen=True)
class _Log:
    """The accesses, [accesses] each, and the first one's line number in the file."""

    src: Path
    columns: dict[str, NDArray]
    first_line: int

    def fail(self, access: int, problem: str) -> NoReturn:
        _fail(self.src, self.first_line + access, problem)


def import_bigmoe_csv(src: str | Path, model: str, out: str | Path) -> None:
    """Write the access log `src` to the new directory `out` as a trace.

    `model` is a shipped model's name or the path of a YAML file with the log's layers and experts.
    Expert bytes by layer, the experts a token (k) and, where given, the non-expert bytes of each
    layer are the log's. The engine's hits and misses are kept in the column residency. Token ids
    are unknown. Raises UserError naming file and line for a log that is malformed or cut off and
    for one that does not fit the model; then nothing is written.
    """
    src = Path(src)
    public = load_geometry(model)
    if not src.is_file():
        raise UserError(f"{src}: no such file; name the log to import")
    data = src.read_bytes()
    lines = _lines(src, data)
    header = _read_header(src, lines)
    geometry = _geometry(src, public, header)
    log = _read_accesses(src, lines, header)
    _check_accesses(log, header)
    token_of = _tokens(log)
    _check_layers_ran(log, token_of, header)
    with new_directory(out) as draft:
        writer = TraceWriter(draft, _fields(src, data, geometry, header))
        writer.write_rows(**_rows(log, token_of, header))
        writer.close(_requests(log, token_of))


def _lines(src: Path, data: bytes) -> list[str]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        _fail(src, line, "not text; is this the log?")
    if not text.endswith("\n"):
        _fail(src, text.count("\n") + 1, "the line has no end: the file is cut off")
    return text.splitlines()


def _read_header(src: Path, lines: list[str]) -> _Header:
    comments = [line for line in lines if line.startswith("#")]
    if not lines or lines[0] != _MAGIC or len(comments) < 2:
        _fail(src, 1, f"the header {_MAGIC!r} is missing")
    model = _MODEL.match(lines[1])
    if model is None:
        _fail(src, 2, "expected '# model=.. arch=.. n_layer=.. n_expert=.. n_expert_used=..'")
    layers, experts, top_k = (int(number) for number in model.groups()[1:])
    sizes = [_read_layer(src, number, lines, number - 3) for number in range(3, 3 + layers)]
    columns_line = 3 + layers
    if len(lines) < columns_line or lines[columns_line - 1] != ",".join(_COLUMNS):
        _fail(src, columns_line, f"expected the column names {','.join(_COLUMNS)}")
    dense = [size for _, size in sizes if size is not None]
    if dense and len(dense) != layers:
        _fail(src, 3, "dense_bytes is given for some layers only")
    return _Header(
        model_file=Path(model[1]).name,
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=tuple(size for size, _ in sizes),
        dense_bytes=tuple(dense) or None,
        lines=columns_line,
    )


def _read_layer(src: Path, number: int, lines: list[str], layer: int) -> tuple[int, int | None]:
    match = _LAYER.match(lines[number - 1]) if number <= len(lines) else None
    if match is None or int(match[1]) != layer:
        _fail(src, number, f"expected '# layer={layer} expert_bytes=..'")
    return int(match[2]), int(match[3]) if match[3] else None


def _geometry(src: Path, public: Geometry, header: _Header) -> Geometry:
    found = (header.layers, header.experts)
    if found != (public.num_layers, public.num_experts):
        _fail(
            src,
            2,
            f"n_layer={found[0]} n_expert={found[1]}, but {public.name} has {public.num_layers} and"
            f" {public.num_experts}; name the model that was recorded",
        )
    if public.num_moe_layers != public.num_layers:
        _fail(src, 2, f"{public.name} has dense layers, which this log cannot describe")
    if not 1 <= header.top_k <= header.experts:
        _fail(src, 2, f"n_expert_used={header.top_k} is outside [1, {header.experts}]")
    update: dict[str, Any] = {
        "top_k": header.top_k,
        "expert_dtype": "recorded",
        "expert_bytes_by_layer": header.expert_bytes,
    }
    if header.dense_bytes:
        outside = public.nonexpert_bytes - sum(public.segment_bytes_by_layer)
        update["segment_bytes_by_layer"] = header.dense_bytes
        update["nonexpert_bytes"] = outside + sum(header.dense_bytes)
    return public.model_copy(update=update)


def _read_accesses(src: Path, lines: list[str], header: _Header) -> _Log:
    first_line = header.lines + 1
    rows = [
        _read_access(src, number, line)
        for number, line in enumerate(lines[header.lines :], start=first_line)
    ]
    if not rows:
        _fail(src, first_line, "the log holds no accesses: the file is cut off")
    columns = {
        name: np.array([row[index] for row in rows], np.float64 if index == _WEIGHT else np.int64)
        for index, name in enumerate(_COLUMNS)
    }
    return _Log(src, columns, first_line)


def _read_access(src: Path, number: int, line: str) -> list[int | float]:
    fields = line.split(",")
    if len(fields) != len(_COLUMNS):
        _fail(src, number, f"{len(fields)} fields, expected {len(_COLUMNS)}: the line is cut off")
    return [_number(src, number, index, text) for index, text in enumerate(fields)]


def _number(src: Path, number: int, index: int, text: str) -> int | float:
    kind = float if index == _WEIGHT else int
    try:
        value = kind(text)
    except ValueError:
        _fail(src, number, f"{_COLUMNS[index]} {text!r} is no {kind.__name__}")
    if not 0 <= value <= np.iinfo(np.int32).max or not math.isfinite(value):
        _fail(src, number, f"{_COLUMNS[index]} {text} is out of range")
    return value


def _check_accesses(log: _Log, header: _Header) -> None:
    limits = {
        "phase": 2,
        "layer": header.layers,
        "slot": header.top_k,
        "expert": header.experts,
        "residency": 2,
    }
    for name, limit in limits.items():
        values = log.columns[name]
        bad = np.flatnonzero(values >= limit)
        if bad.size:
            log.fail(int(bad[0]), f"{name} {values[bad[0]]} is outside [0, {limit})")
    full = np.array(header.expert_bytes)[log.columns["layer"]]
    bad = np.flatnonzero((log.columns["expert_bytes"] != 0) & (log.columns["expert_bytes"] != full))
    if bad.size:
        log.fail(
            int(bad[0]),
            f"expert_bytes {log.columns['expert_bytes'][bad[0]]} is neither 0 nor the header's"
            f" {full[bad[0]]}",
        )
    _check_ranks(log, header.top_k)
    _check_duplicates(log, header.top_k)


def _check_ranks(log: _Log, top_k: int) -> None:
    """The k accesses of a token's layer are k adjacent lines, slot 0 to k - 1."""
    slot = log.columns["slot"]
    expected = np.arange(len(slot)) % top_k
    keys = np.stack([log.columns[name] for name in ("turn", "phase", "step", "layer")])
    moved = np.concatenate(([True], (np.diff(keys) != 0).any(axis=0)))
    bad = np.flatnonzero((slot != expected) | (moved & (expected != 0)))
    if bad.size:
        access = int(bad[0])
        log.fail(
            access,
            f"expected slot {expected[access]} of the layer begun before (n_expert_used={top_k})",
        )
    if len(slot) % top_k:
        log.fail(len(slot) - 1, f"the last layer has fewer than {top_k} accesses: cut off")
    first = keys[:, ::top_k]
    order = np.lexsort(first)
    repeated = (np.diff(first[:, order]) == 0).all(axis=0)
    if repeated.any():
        log.fail(int(order[1:][repeated].min()) * top_k, "this token's layer occurs a second time")


def _check_duplicates(log: _Log, top_k: int) -> None:
    groups = log.columns["expert"].reshape(-1, top_k)
    ordered = np.sort(groups, axis=1)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if not repeated.any():
        return
    group = int(np.argmax(repeated.any(axis=1)))
    expert = ordered[group, 1:][repeated[group]][0]
    rank = int(np.flatnonzero(groups[group] == expert)[1])
    log.fail(group * top_k + rank, f"expert {expert} occurs twice for one token and layer")


@dataclass(frozen=True)
class _Tokens:
    """Tokens in the order of turn and step, [n] each; `of_access` maps accesses to them."""

    of_access: NDArray
    turn: NDArray
    phase: NDArray
    position: NDArray


def _tokens(log: _Log) -> _Tokens:
    keys = np.stack([log.columns[name] for name in ("turn", "step", "phase")], axis=1)
    tokens, first_access, of_access = np.unique(
        keys, axis=0, return_index=True, return_inverse=True
    )
    turn, step, phase = tokens.T
    same_turn = turn[1:] == turn[:-1]
    bad = np.flatnonzero(same_turn & (np.diff(step) != 1)) + 1
    if bad.size:
        at = int(bad[0])
        log.fail(int(first_access[at]), f"step {step[at]} follows step {step[at - 1]} of its turn")
    bad = np.flatnonzero(same_turn & (phase[1:] < phase[:-1])) + 1
    if bad.size:
        log.fail(int(first_access[bad[0]]), "a prefill token after the turn's first decode step")
    turn_starts = np.flatnonzero(np.concatenate(([True], ~same_turn)))
    position = step - np.repeat(step[turn_starts], np.diff(np.append(turn_starts, len(turn))))
    return _Tokens(of_access.reshape(-1), turn, phase, position)


def _check_layers_ran(log: _Log, tokens: _Tokens, header: _Header) -> None:
    """Decode tokens and the last token of a prefill ran every layer."""
    ran = np.zeros((len(tokens.turn), header.layers), bool)
    ran[tokens.of_access, log.columns["layer"]] = True
    next_turn = np.append(tokens.turn[1:], -1)
    next_phase = np.append(tokens.phase[1:], PREFILL)
    prefill_ends = (tokens.turn != next_turn) | (next_phase == DECODE)
    absent = ~ran & ((tokens.phase == DECODE) | prefill_ends)[:, None]
    if absent.any():
        token, layer = (int(index) for index in np.argwhere(absent)[0])
        last_access = int(np.flatnonzero(tokens.of_access == token)[-1])
        log.fail(last_access, f"layer {layer} of this token is absent: the file is cut off")


def _rows(log: _Log, tokens: _Tokens, header: _Header) -> dict[str, NDArray]:
    rows = len(tokens.turn)
    shape = (rows, header.layers, header.top_k)
    at = (tokens.of_access, log.columns["layer"], log.columns["slot"])
    experts = np.full(shape, NULL_ID, np.int16)
    experts[at] = log.columns["expert"]
    weights = np.full(shape, np.nan, np.float32)
    weights[at] = log.columns["weight"]
    residency = np.full(shape, NULL_RESIDENCY, np.uint8)
    residency[at] = log.columns["residency"]
    continues = (
        (tokens.phase == PREFILL)
        & np.append(False, tokens.turn[1:] == tokens.turn[:-1])
        & np.append(False, tokens.phase[:-1] == PREFILL)
    )
    return {
        "request": tokens.turn,
        "step": np.cumsum(~continues) - 1,
        "row": np.where(tokens.phase == PREFILL, tokens.position, 0),
        "phase": tokens.phase,
        "position": tokens.position,
        "token_id": np.full(rows, NULL_ID),
        "experts": experts,
        "weights": weights,
        "residency": residency,
    }


def _requests(log: _Log, tokens: _Tokens) -> pd.DataFrame:
    turns = np.unique(tokens.turn)
    prefill = [int(((tokens.turn == turn) & (tokens.phase == PREFILL)).sum()) for turn in turns]
    decode = [int(((tokens.turn == turn) & (tokens.phase == DECODE)).sum()) for turn in turns]
    return pd.DataFrame(
        {
            "request": turns,
            "prompt_tokens": prefill,
            "output_tokens": np.array(decode) + 1,
        }
    )


def _fields(src: Path, data: bytes, geometry: Geometry, header: _Header) -> dict[str, Any]:
    return {
        "model_id": geometry.name,
        "model_revision": header.model_file,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import bigmoe-csv",
            "sampling": {"batch": 1, "top_k": header.top_k},
            "notes": (
                f"{src.name}, sha256 {sha256_of(data)}; token ids are unknown; residency holds the"
                " engine's own hits and misses"
            ),
        },
    }


def _fail(src: Path, line: int, problem: str) -> NoReturn:
    raise UserError(f"{src}: line {line}: {problem}; restore the file")
