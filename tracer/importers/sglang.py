"""Import what SGLang's expert distribution recorder dumps in its `per_token` mode.

A dump (.pt, a dict) holds `records`, one a forward pass, and `last_physical_to_logical_map`
[layers, physical experts]. A record has

- `topk_ids_of_layer` int32 [layers, tokens, 8]: ids of physical experts of every decoder layer; -1
  (or 255) in dense layers and behind the k-th expert. The width is fixed: k may be at most 8
- `input_ids`, `positions` [tokens], `forward_mode` (1 extend, 2 decode, 4 idle)
- `extend_seq_lens` [sequences] of an extend pass, None in decoding
- `rids` [sequences], the requests' names, in early versions only

There are no weights. Without `rids`, requests are recognised as the scheduler runs them: an extend
sequence is a new request, except that the first one continues the last one of the extend pass just
before (a chunked prefill) where it begins at the position that one has reached; decoding requests
keep the order in which they were prefilled, and positions tell who has left. Where positions leave
a choice, the dump is refused rather than guessed at. One case cannot be seen: a request whose
cached prefix is the whole prompt of the last one prefilled, which generated a single token; the two
become one. `--disable-radix-cache` rules it out.

Sources: SGLang, python/sglang/srt/eplb/expert_distribution.py (recorder),
python/sglang/srt/model_executor/forward_batch_info.py (forward modes).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.checks import check_columns
from tracer.columns import DECODE, PREFILL, column_spec
from tracer.extra import require_extra
from tracer.importers.directory import new_directory
from tracer.importers.sequential import MAX_STEP_ROWS
from tracer.manifest import sha256_of
from tracer.writer import TraceWriter

_PER_TOKEN = "record with --expert-distribution-recorder-mode per_token"
_EXTEND, _DECODE, _IDLE = 1, 2, 4
_OTHER_MODES = {
    3: ("mixes prefill and decoding", "record without --enable-mixed-chunk"),
    5: ("verifies drafted tokens", "record without speculative decoding"),
    6: ("extends a draft model", "record without speculative decoding"),
}
_PADS = (-1, 255)


@dataclass
class _Request:
    """A request so far: its number, its next position, the end of its prefilled part."""

    number: int
    next_position: int
    prompt_tokens: int
    decode_rows: int = 0
    rid: str | None = None


@dataclass(frozen=True)
class _Pass:
    """One forward pass, checked: n tokens of some sequences."""

    where: str
    phase: int
    experts: NDArray
    token_ids: NDArray
    positions: NDArray
    lengths: tuple[int, ...]
    rids: tuple[str, ...] | None

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.where}: {problem}")


def import_sglang(src: str | Path, model: str, out: str | Path) -> None:
    """Write the dump `src` (.pt, of one rank) to the new directory `out`, a step a forward pass.

    `model` is a shipped model's name or the path of a YAML file. Physical ids are translated by the
    dump's map, hence record without `--enable-eplb`, which moves experts while it runs. Tokens that
    the radix cache spared are no rows. Raises UserError naming file and record for a dump of
    another mode, one that is damaged or does not fit the model, or whose requests cannot be told
    apart; then nothing is written. Needs torch, and loads with `weights_only`.
    """
    src = Path(src)
    geometry = load_geometry(model)
    dump = _load(src)
    requests = _Requests()
    with new_directory(out) as draft:
        writer = TraceWriter(draft, _fields(src, geometry))
        step = 0
        for forward in _passes(src, dump, geometry):
            request = requests.follow(forward)
            rows = len(forward.positions)
            writer.write_rows(
                request=request,
                step=np.full(rows, step),
                row=np.arange(rows),
                phase=np.full(rows, forward.phase),
                position=forward.positions,
                token_id=forward.token_ids,
                experts=forward.experts,
            )
            step += 1
        if not step:
            raise UserError(f"{src}: no record holds a token; start recording before the requests")
        writer.close(requests.lengths())


def _load(src: Path) -> dict[str, Any]:
    if not src.is_file():
        raise UserError(f"{src}: no such file; name the .pt file to import")
    require_extra("import of SGLang's dumps")
    import torch

    try:
        dump = torch.load(src, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        # Torch's own message advises to unpickle, which nobody should do with a stranger's file.
        raise UserError(
            f"{src}: not a readable dump of tensors: damaged, or it holds other objects, which are"
            " never unpickled; restore it or dump again"
        ) from error
    if isinstance(dump, dict) and "logical_count" in dump:
        raise UserError(f"{src}: has only counts of experts (mode stat); {_PER_TOKEN}")
    if not isinstance(dump, dict) or not isinstance(dump.get("records"), list):
        raise UserError(f"{src}: no dict with 'records': no dump of the recorder; {_PER_TOKEN}")
    if not dump["records"]:
        raise UserError(f"{src}: 'records' is empty; send requests between start and dump")
    return dump


def _passes(src: Path, dump: dict[str, Any], geometry: Geometry) -> Iterator[_Pass]:
    logical = _physical_to_logical(src, dump, geometry)
    for index, record in enumerate(dump["records"]):
        forward = _as_pass(f"{src}: record {index}", record, geometry, logical)
        if forward is not None:
            yield forward


def _as_pass(where: str, record: Any, geometry: Geometry, logical: NDArray | None) -> _Pass | None:
    """Check one record; None where it holds no token."""
    if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
        raise UserError(f"{where}: no topk_ids_of_layer (mode per_pass?); {_PER_TOKEN}")
    positions = _integers(where, record, "positions")
    token_ids = _integers(where, record, "input_ids")
    if len(positions) != len(token_ids):
        raise UserError(
            f"{where}: {len(positions)} positions for {len(token_ids)} input_ids; restore the file"
        )
    if len(positions) > MAX_STEP_ROWS:
        raise UserError(
            f"{where}: {len(positions)} tokens, a step holds at most {MAX_STEP_ROWS}; record with"
            " a smaller --chunked-prefill-size"
        )
    ids = _physical_ids(where, record["topk_ids_of_layer"], len(positions), geometry)
    lengths = _lengths(where, record, len(positions))
    if not len(positions):
        return None
    _check_values(where, positions, token_ids, geometry)
    experts = _logical_ids(where, ids, geometry, logical)
    specs = {"experts": column_spec("experts", geometry)}
    check_columns({"experts": experts}, specs, geometry.num_experts, where)
    return _Pass(
        where,
        PREFILL if record.get("extend_seq_lens") is not None else DECODE,
        experts,
        token_ids,
        positions,
        lengths,
        _rids(where, record.get("rids"), len(lengths)),
    )


def _integers(where: str, record: dict[str, Any], name: str) -> NDArray:
    values = record.get(name)
    if values is None:
        raise UserError(f"{where}: no {name}; dump again with a version of SGLang that keeps them")
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"{where}: {name} is {array.dtype} {list(array.shape)}, expected integers")
    return array.astype(np.int64)


def _lengths(where: str, record: dict[str, Any], tokens: int) -> tuple[int, ...]:
    """Tokens of each sequence of the pass."""
    mode = record.get("forward_mode")
    if not isinstance(mode, int):
        raise UserError(f"{where}: forward_mode {mode!r} is no integer; restore the file")
    extends = record.get("extend_seq_lens") is not None
    if mode in _OTHER_MODES:
        what, how = _OTHER_MODES[mode]
        raise UserError(f"{where}: a pass that {what} (forward_mode {mode}); {how}")
    if mode not in (_EXTEND, _DECODE, _IDLE) or (tokens and extends != (mode == _EXTEND)):
        raise UserError(
            f"{where}: forward_mode {mode!r} {'with' if extends else 'without'} extend_seq_lens is"
            " neither an extend nor a decode pass; record plain prefill and decoding"
        )
    if not extends:
        return (1,) * tokens
    lengths = _integers(where, record, "extend_seq_lens")
    if (lengths < 1).any() or lengths.sum() != tokens:
        raise UserError(
            f"{where}: extend_seq_lens {lengths[:8].tolist()} add up to {lengths.sum()}, the pass"
            f" has {tokens} tokens; restore the file"
        )
    return tuple(lengths.tolist())


def _rids(where: str, rids: Any, sequences: int) -> tuple[str, ...] | None:
    if rids is None:
        return None
    if not isinstance(rids, list) or not all(isinstance(rid, str) for rid in rids):
        raise UserError(f"{where}: rids is no list of names; restore the file")
    if len(rids) != sequences or len(set(rids)) != sequences:
        raise UserError(f"{where}: {len(set(rids))} different rids for {sequences} sequences")
    return tuple(rids)


def _check_values(where: str, positions: NDArray, token_ids: NDArray, geometry: Geometry) -> None:
    limits = {"positions": np.iinfo(np.int32).max, "input_ids": geometry.vocab_size}
    for name, values in (("positions", positions), ("input_ids", token_ids)):
        bad = np.flatnonzero((values < 0) | (values >= limits[name]))
        if bad.size:
            raise UserError(
                f"{where}: row {bad[0]}: {values[bad[0]]} in {name} is outside"
                f" [0, {limits[name]}) of {geometry.name}; name the model that ran"
            )


def _physical_ids(where: str, ids: Any, tokens: int, geometry: Geometry) -> NDArray:
    """The ids of the MoE layers, int64 [tokens, L, width]."""
    array = _tensor(where, "topk_ids_of_layer", ids, 3)
    layers, count, width = array.shape
    if layers not in (geometry.num_layers, geometry.num_moe_layers):
        raise UserError(
            f"{where}: topk_ids_of_layer has {layers} layers, {geometry.name} has"
            f" {geometry.num_layers} ({geometry.num_moe_layers} MoE layers); name the model that"
            " ran"
        )
    if count != tokens:
        raise UserError(f"{where}: ids of {count} tokens for {tokens} positions; restore the file")
    if width < geometry.top_k:
        raise UserError(
            f"{where}: ids are {width} wide, {geometry.name} has top-{geometry.top_k}: the recorder"
            " keeps no more; record by other means (moesim trace, vLLM)"
        )
    if layers == geometry.num_moe_layers:
        return array.transpose(1, 0, 2)
    dense = np.delete(array, geometry.model_layer_ids, axis=0)
    if not np.isin(dense, _PADS).all():
        raise UserError(
            f"{where}: ids in a layer that is dense in {geometry.name}; name the model that ran"
        )
    return array[list(geometry.model_layer_ids)].transpose(1, 0, 2)


def _logical_ids(where: str, ids: NDArray, geometry: Geometry, logical: NDArray | None) -> NDArray:
    """The k experts of every token and MoE layer, as numbered in the model: [tokens, L, k]."""
    chosen, behind = ids[..., : geometry.top_k], ids[..., geometry.top_k :]
    if not np.isin(behind, _PADS).all():
        row, layer, rank = (int(index) for index in np.argwhere(~np.isin(behind, _PADS))[0])
        raise UserError(
            f"{where}: row {row}, layer {layer}: id {behind[row, layer, rank]} behind the"
            f" {geometry.top_k} experts of {geometry.name}: name the model that ran; if it has"
            " shared experts, record with --disable-shared-experts-fusion"
        )
    physical = geometry.num_experts if logical is None else logical.shape[1]
    bad = (chosen < 0) | (chosen >= physical)
    if bad.any():
        row, layer, rank = (int(index) for index in np.argwhere(bad)[0])
        value = chosen[row, layer, rank]
        what = "padding where an expert ran" if value in _PADS else f"outside [0, {physical})"
        raise UserError(
            f"{where}: row {row}, layer {layer}, rank {rank}: id {value} is {what}; restore the"
            f" file, or name the model that ran ({geometry.name}?)"
        )
    if logical is None:
        return chosen
    return logical[np.arange(geometry.num_moe_layers)[:, None], chosen]


def _physical_to_logical(src: Path, dump: dict[str, Any], geometry: Geometry) -> NDArray | None:
    """The map of the MoE layers, [L, physical experts]; None where the dump has none."""
    where = str(src)
    if dump.get("last_physical_to_logical_map") is None:
        return None
    array = _tensor(where, "last_physical_to_logical_map", dump["last_physical_to_logical_map"], 2)
    if len(array) == geometry.num_layers:
        array = array[list(geometry.model_layer_ids)]
    if len(array) != geometry.num_moe_layers or array.shape[1] < geometry.num_experts:
        raise UserError(
            f"{where}: last_physical_to_logical_map is {list(array.shape)}, {geometry.name} has"
            f" {geometry.num_moe_layers} MoE layers x {geometry.num_experts} experts; name the"
            " model that ran"
        )
    bad = np.argwhere((array < 0) | (array >= geometry.num_experts))
    if bad.size:
        layer, expert = (int(index) for index in bad[0])
        raise UserError(
            f"{where}: last_physical_to_logical_map: layer {layer}, physical expert {expert} is"
            f" expert {array[layer, expert]}, outside [0, {geometry.num_experts}); name the model"
            " that ran"
        )
    return array


def _tensor(where: str, name: str, value: Any, dimensions: int) -> NDArray:
    import torch

    fits = isinstance(value, torch.Tensor) and value.dim() == dimensions
    if not fits or value.is_floating_point() or value.dtype in (torch.bool, torch.complex64):
        raise UserError(f"{where}: {name} is no tensor of integers in {dimensions} dimensions")
    array: NDArray = value.to(torch.int64).numpy()
    return array


@dataclass
class _Requests:
    """Which request every row of the passes belongs to."""

    all: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    chunked: _Request | None = None
    """The last sequence of the pass before, if that was an extend pass."""

    def follow(self, forward: _Pass) -> NDArray:
        """Request number of each row of the next pass, [n]."""
        if forward.phase == DECODE:
            found = self._decode(forward)
            self.chunked = None
        else:
            found = self._extend(forward)
            self.chunked = found[-1]
        return np.repeat([request.number for request in found], forward.lengths)

    def lengths(self) -> list[dict[str, int]]:
        """Rows of requests.parquet."""
        return [
            {
                "request": request.number,
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.decode_rows + 1,
            }
            for request in self.all
        ]

    def _extend(self, forward: _Pass) -> list[_Request]:
        found = []
        ends = np.cumsum(forward.lengths)
        for index, (end, length) in enumerate(zip(ends, forward.lengths, strict=True)):
            part = forward.positions[end - length : end]
            if (np.diff(part) != 1).any():
                forward.fail(f"sequence {index}: its positions have gaps; restore the file")
            request = self._extended(forward, index, int(part[0]))
            request.next_position = request.prompt_tokens = int(part[-1]) + 1
            found.append(request)
        self.running = [request for request in self.running if request not in found] + found
        return found

    def _extended(self, forward: _Pass, index: int, start: int) -> _Request:
        rid = forward.rids[index] if forward.rids else None
        if rid is not None:
            known = next((request for request in self.all if request.rid == rid), None)
            if known is None:
                return self._new(start, rid)
            if known.next_position != start or known.decode_rows:
                forward.fail(
                    f"request {rid} is prefilled again from position {start} (it was retracted);"
                    " record with fewer requests at a time"
                )
            return known
        if start == 0:
            return self._new(start, None)
        if index == 0 and self.chunked is not None and self.chunked.next_position == start:
            return self.chunked
        if any(r.next_position == start and not r.decode_rows for r in self.all):
            forward.fail(
                f"sequence {index} begins at position {start}: a prefill that goes on or a new"
                " request with a cached prefix; record with --disable-radix-cache"
            )
        return self._new(start, None)

    def _new(self, start: int, rid: str | None) -> _Request:
        request = _Request(len(self.all), start, start, rid=rid)
        self.all.append(request)
        return request

    def _decode(self, forward: _Pass) -> list[_Request]:
        positions = forward.positions.tolist()
        found = self._by_rid(forward) if forward.rids else self._by_position(forward, positions)
        for request in found:
            request.next_position += 1
            request.decode_rows += 1
        self.running = found
        return found

    def _by_rid(self, forward: _Pass) -> list[_Request]:
        running = {request.rid: request for request in self.all}
        found = []
        assert forward.rids is not None
        for rid, position in zip(forward.rids, forward.positions.tolist(), strict=True):
            request = running.get(rid)
            if request is None or request.next_position != position:
                forward.fail(
                    f"request {rid} decodes position {position}, which does not follow what was"
                    " recorded of it; start recording before the requests"
                )
            found.append(request)
        return found

    def _by_position(self, forward: _Pass, positions: Sequence[int]) -> list[_Request]:
        """The one way to find the rows, in order, among the running requests."""
        first = _embed(positions, self.running)
        last = _embed(positions[::-1], self.running[::-1])
        if first is None or last is None:
            forward.fail(
                f"rows at positions {positions[:8]} do not follow the requests recorded so far;"
                " start recording before the requests, and send them again"
            )
        if [request.number for request in first] != [request.number for request in last[::-1]]:
            forward.fail(
                f"requests at equal positions ({positions[:8]}) cannot be told apart after one has"
                " left; record with --max-running-requests 1, or prompts of different lengths"
            )
        return first


def _embed(positions: Sequence[int], running: Sequence[_Request]) -> list[_Request] | None:
    """The first requests, in order, whose next positions are these; None where there are none."""
    found: list[_Request] = []
    candidates = iter(running)
    for position in positions:
        match = next((r for r in candidates if r.next_position == position), None)
        if match is None:
            return None
        found.append(match)
    return found


def _fields(src: Path, geometry: Geometry) -> dict[str, Any]:
    return {
        "model_id": geometry.name,
        "model_revision": geometry.revision,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import sglang",
            "notes": (
                f"{src.name}, sha256 {sha256_of(src.read_bytes())}; no weights; physical experts"
                " translated by last_physical_to_logical_map"
            ),
        },
    }
