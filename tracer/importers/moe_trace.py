"""Import the CSV of moe-trace, the tool that logs llama.cpp's routing: a line `layer,expert`.

The tool evaluates one prompt, `--ubatch-size` tokens a pass, and then decodes greedily. It writes
the ids of every pass layer by layer, of every layer token by token, k lines each. The last decoder
layer runs for the pass's last token alone. There is nothing else: no weights, no token ids, and no
mark between tokens, hence k and the layers are the model's.

Source: ggml-org/llama.cpp, pull request 28544, examples/moe-trace/moe-trace.cpp. In its first
version the ids of a pass of several tokens are read without regard to the tensor's stride: they
are the first token's ranking of all experts, not the tokens' top-k. Passes of one token are right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tracer.columns import NULL_ID
from tracer.importers.directory import new_directory
from tracer.importers.sequential import SequentialWriter
from tracer.manifest import sha256_of
from tracer.writer import TraceWriter

_HEADER = b"layer,expert\n"
_LOG_RARE = math.log(1e-9)
_WRONG_LINE = re.compile(r"^(?!\d{1,9},\d{1,9}$)", re.MULTILINE | re.ASCII)


@dataclass(frozen=True)
class _Run:
    """Adjacent lines of one layer."""

    layer: int
    line: int
    experts: NDArray


@dataclass(frozen=True)
class _Pass:
    """One forward pass: experts [n, L, k], -1 where the layer did not run for the token."""

    runs: tuple[_Run, ...]
    experts: NDArray

    @property
    def line(self) -> int:
        return self.runs[0].line


def import_moe_trace(
    src: str | Path,
    model: str,
    out: str | Path,
    *,
    prompt_tokens: int | None = None,
    decode_only: bool = False,
) -> None:
    """Write the log `src` to the new directory `out` as one request.

    `model` is a shipped model's name or the path of a YAML file. `prompt_tokens` is the length of
    the prompt, which the tool prints. It may be left out only where the last prefill pass is
    shorter than the one before: else a prompt whose last pass has one token looks like the first
    decode step. `decode_only` drops the prefill. Token ids are unknown, there are no weights.
    Raises UserError naming file and line for a log that is malformed, cut off, of several prompts,
    of another model, or whose prefill was read without strides; then nothing is written.
    """
    src = Path(src)
    geometry = load_geometry(model)
    if not src.is_file():
        raise UserError(f"{src}: no such file; name the CSV to import")
    data = src.read_bytes()
    passes = _passes(src, _runs(src, data), geometry)
    prefill = _prefill_passes(src, passes, prompt_tokens)
    prompt = sum(len(part.experts) for part in passes[:prefill])
    kept = passes[prefill:] if decode_only else passes
    if not kept:
        raise UserError(f"{src}: holds no decode pass; record with -n, the tokens to decode")
    for part in kept:
        _check_strides(src, part, geometry)
        _check_distinct(src, part, geometry.top_k)
    experts = np.concatenate([part.experts for part in kept])
    with new_directory(out) as draft:
        writer = TraceWriter(draft, _fields(src, data, geometry, decode_only))
        requests = SequentialWriter(writer, prefill_chunk=len(passes[0].experts))
        requests.add(str(src), experts, prompt, first_position=prompt if decode_only else 0)
        requests.close()


def _runs(src: Path, data: bytes) -> list[_Run]:
    layers, experts = _accesses(src, data).T
    first_line = 2 if data.startswith(_HEADER.rstrip()) else 1
    starts = np.flatnonzero(np.diff(layers, prepend=layers[0] - 1))
    ends = [*starts[1:], len(layers)]
    return [
        _Run(int(layers[begin]), first_line + int(begin), experts[begin:end])
        for begin, end in zip(starts, ends, strict=True)
    ]


def _accesses(src: Path, data: bytes) -> NDArray:
    """The file's lines as numbers, int64 [lines, 2]."""
    body = data.replace(b"\r\n", b"\n")
    first = 0
    if body.startswith(_HEADER):
        body, first = body[len(_HEADER) :], 1
    if not body:
        _fail(src, 1, "the file holds no accesses; record again")
    if not body.endswith(b"\n"):
        line = first + body.count(b"\n") + 1
        _fail(src, line, "the line has no end: the file is cut off; restore it")
    text = body[:-1].decode("ascii", errors="replace")
    wrong = _WRONG_LINE.search(text)
    if wrong is not None:
        line = first + text.count("\n", 0, wrong.start()) + 1
        found = text[wrong.start() :].partition("\n")[0][:40]
        _fail(src, line, f"{found!r} is not 'layer,expert', such as 0,17; restore it")
    flat = np.fromstring(text.replace("\n", ","), dtype=np.int64, sep=",")
    return flat.reshape(-1, 2)


def _passes(src: Path, runs: Sequence[_Run], geometry: Geometry) -> list[_Pass]:
    """Group the runs of the MoE layers, in order, into forward passes."""
    expected = geometry.model_layer_ids
    if len(expected) == 1:
        raise UserError(
            f"{src}: {geometry.name} has one MoE layer, so nothing parts the passes in this format"
        )
    for index, run in enumerate(runs):
        layer = expected[index % len(expected)]
        if run.layer != layer:
            _fail(
                src,
                run.line,
                f"layer {run.layer} where layer {layer} of {geometry.name} follows; name the model"
                " that ran",
            )
    if len(runs) % len(expected):
        last = runs[-1]
        line = last.line + len(last.experts)
        _fail(src, line, f"the pass ends at layer {last.layer}: the file is cut off; restore it")
    starts = range(0, len(runs), len(expected))
    return [_one_pass(src, runs[begin : begin + len(expected)], geometry) for begin in starts]


def _one_pass(src: Path, runs: Sequence[_Run], geometry: Geometry) -> _Pass:
    k = geometry.top_k
    tokens = len(runs[0].experts) // k
    experts = np.full((tokens, len(runs), k), NULL_ID, np.int64)
    for index, run in enumerate(runs):
        lengths = {tokens * k}
        if run.layer == geometry.num_layers - 1:
            lengths.add(k)
        if tokens == 0 or len(run.experts) not in lengths:
            _fail(
                src,
                run.line,
                f"layer {run.layer} has {len(run.experts)} lines, expected {max(tokens, 1) * k} for"
                f" top-{k} of {geometry.name}; name the model that ran, or the file is cut off",
            )
        ids = run.experts.reshape(-1, k)
        bad = np.flatnonzero(run.experts >= geometry.num_experts)
        if bad.size:
            _fail(
                src,
                run.line + int(bad[0]),
                f"expert {run.experts[bad[0]]} is outside [0, {geometry.num_experts}) of"
                f" {geometry.name}; name the model that ran",
            )
        experts[tokens - len(ids) :, index] = ids
    return _Pass(tuple(runs), experts)


def _check_distinct(src: Path, part: _Pass, k: int) -> None:
    for run in part.runs:
        ordered = np.sort(run.experts.reshape(-1, k), axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if repeated.any():
            token = int(np.argmax(repeated))
            _fail(
                src,
                run.line + token * k,
                f"an expert occurs twice in the {k} lines of one token; restore the file, or name"
                " the model that ran",
            )


def _prefill_passes(src: Path, passes: Sequence[_Pass], prompt_tokens: int | None) -> int:
    """Number of passes that belong to the prompt."""
    sizes = [len(part.experts) for part in passes]
    several = [index for index, size in enumerate(sizes) if size > 1]
    least = several[-1] + 1 if several else 1
    if any(size != sizes[0] for size in sizes[: least - 1]) or sizes[least - 1] > sizes[0]:
        _fail(
            src,
            passes[least - 1].line,
            f"a pass of {sizes[least - 1]} tokens after a shorter one: more than one prompt, which"
            " the format cannot part; import each alone",
        )
    if prompt_tokens is None:
        if len(several) < 2 or sizes[least - 1] == sizes[0]:
            raise UserError(
                f"{src}: where the prompt ends is not certain; give --prompt-tokens as moe-trace"
                f" printed it ({sum(sizes[:least])}?)"
            )
        return least
    full = sizes[least - 1] == sizes[0]
    ends = np.cumsum(sizes).tolist()
    possible = ends[least - 1 :] if sizes[0] == 1 else ends[least - 1 : least + full]
    if prompt_tokens not in possible:
        raise UserError(
            f"{src}: no pass ends after {prompt_tokens} tokens of a prompt, but after"
            f" {' or '.join(map(str, possible[:2]))}; give --prompt-tokens as moe-trace printed it"
        )
    return ends.index(prompt_tokens) + 1


def _check_strides(src: Path, part: _Pass, geometry: Geometry) -> None:
    """Refuse a pass of several tokens that share no expert in any layer, where chance is no cause.

    That is what one token's ranking of all experts looks like.
    """
    ran = part.experts[:, (part.experts != NULL_ID).all(axis=(0, 2))]
    tokens = min(len(ran), geometry.num_experts // geometry.top_k)
    ordered = np.sort(ran[:tokens].transpose(1, 0, 2).reshape(ran.shape[1], -1), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return
    if ran.shape[1] * _log_chance_disjoint(geometry, tokens) > _LOG_RARE:
        return
    _fail(
        src,
        part.line,
        f"{tokens} tokens share no expert in any of {ran.shape[1]} layers: this pass was read"
        " without the tensor's stride and holds no token's top-k; import the rest with"
        " --decode-only, or record with a version that heeds strides",
    )


def _log_chance_disjoint(geometry: Geometry, tokens: int) -> float:
    """Log of the chance that tokens with k random experts each share none."""
    count, k = geometry.num_experts, geometry.top_k
    every = math.comb(count, k)
    return sum(math.log(math.comb(count - k * other, k) / every) for other in range(tokens))


def _fields(src: Path, data: bytes, geometry: Geometry, decode_only: bool) -> dict[str, Any]:
    left_out = "; prefill was left out" if decode_only else ""
    return {
        "model_id": geometry.name,
        "model_revision": geometry.revision,
        "geometry": geometry,
        "recording": {
            "generator": "moesim import moe-trace",
            "sampling": {"batch": 1},
            "notes": f"{src.name}, sha256 {sha256_of(data)}; token ids and weights are unknown"
            + left_out,
        },
    }


def _fail(src: Path, line: int, problem: str) -> NoReturn:
    raise UserError(f"{src}: line {line}: {problem}")
