"""Synthetic traces for tests: random routing with the structure of a real recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.geometry import Geometry
from tracer.trace import DECODE, PREFILL, Trace, TraceWriter

ALL_COLUMNS = (
    "weights",
    "gate_probs",
    "gate_norms",
    "lookahead_1",
    "lookahead_2",
    "lookahead_3",
    "learned_1",
    "embedding",
    "gate_inputs",
    "residency",
)
DOMAINS = ("code", "prose", "maths")


def make_geometry(layers: int = 3, experts: int = 8, top_k: int = 2, hidden: int = 4) -> Geometry:
    """A small made-up model whose expert sizes differ from layer to layer."""
    params = 3 * hidden * 6
    return Geometry(
        name="tiny",
        num_layers=layers + 1,
        model_layer_ids=tuple(range(1, layers + 1)),
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        vocab_size=100,
        expert_params=params,
        expert_dtype="bf16",
        expert_bytes_by_layer=tuple(2 * params + 16 * (layer % 2) for layer in range(layers)),
        nonexpert_bytes=10_000,
        segment_bytes_by_layer=(1_000,) * layers,
        head_bytes=500,
        kv_bytes_per_token=64,
        shared_experts="none",
    )


def make_trace(
    path: Path,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    requests: int = 3,
    prompt: int = 5,
    output: int = 12,
    seed: int = 0,
    columns: Sequence[str] = ("weights",),
    batch: int = 1,
    shard_rows: int = 4096,
) -> Trace:
    """Write a trace of random routing to `path` and open it.

    Each request is a prefill step of `prompt` tokens (none at 0) and `output` decode steps; `batch`
    requests decode together, one row each. Experts repeat from token to token as in real models.
    `columns` are optional columns, of ALL_COLUMNS.
    """
    geometry = make_geometry(layers, experts, top_k)
    rng = np.random.default_rng(seed)
    fields = {
        "model_id": "tiny",
        "geometry": geometry,
        "recording": {"generator": "tests.traces.make_trace", "seed": seed},
    }
    with TraceWriter(path, fields, shard_rows=shard_rows) as writer:
        for members in _batches(requests, batch):
            _write_batch(writer, geometry, rng, members, prompt, output, columns)
        writer.close(_requests(requests, prompt, output))
    return Trace.open(path)


def random_ids(rng: np.random.Generator, shape: tuple[int, ...], experts: int, k: int) -> NDArray:
    """Draw k distinct expert ids for every element of `shape`: int16 [*shape, k]."""
    return np.argsort(rng.random((*shape, experts)), axis=-1)[..., :k].astype(np.int16)


def random_columns(
    rng: np.random.Generator, geometry: Geometry, experts: NDArray, columns: Sequence[str]
) -> dict[str, NDArray]:
    """Draw optional columns that fit the ids experts [n, L, k]."""
    return {name: _random_column(rng, geometry, experts, name) for name in columns}


def _random_column(
    rng: np.random.Generator, geometry: Geometry, experts: NDArray, name: str
) -> NDArray:
    n, layers, k = experts.shape
    hidden, count = geometry.hidden_size, geometry.num_experts
    if name.startswith(("lookahead_", "learned_")):
        distance = int(name.rsplit("_", 1)[1])
        ids = random_ids(rng, (n, layers), count, min(2 * k, count))
        ids[:, max(layers - distance, 0) :] = -1
        return ids
    if name == "weights":
        weights = rng.dirichlet(np.ones(k), (n, layers)).astype(np.float16)
        weights[experts < 0] = np.nan
        return weights
    if name == "residency":
        return np.where(experts < 0, 255, rng.integers(0, 2, experts.shape)).astype(np.uint8)
    if name == "gate_probs":
        return rng.dirichlet(np.full(count, 0.3), (n, layers)).astype(np.float16)
    shape = {
        "gate_norms": (n, layers),
        "embedding": (n, hidden),
        "gate_inputs": (n, layers, hidden),
    }[name]
    values = rng.normal(size=shape)
    return np.abs(values).astype(np.float32) if name == "gate_norms" else values.astype(np.float16)


def _batches(requests: int, batch: int) -> Iterator[list[int]]:
    for first in range(0, requests, batch):
        yield list(range(first, min(first + batch, requests)))


def _write_batch(
    writer: TraceWriter,
    geometry: Geometry,
    rng: np.random.Generator,
    members: list[int],
    prompt: int,
    output: int,
    columns: Sequence[str],
) -> None:
    layers, count, k = geometry.num_moe_layers, geometry.num_experts, geometry.top_k

    def write(request: Any, phase: int, position: Any, ids: NDArray) -> None:
        writer.write_step(
            request=request,
            row=np.arange(len(ids)),
            phase=phase,
            position=position,
            token_id=rng.integers(0, geometry.vocab_size, len(ids)),
            experts=ids,
            **random_columns(rng, geometry, ids, columns),
        )

    for request in members if prompt else []:
        write(request, PREFILL, np.arange(prompt), random_ids(rng, (prompt, layers), count, k))
    ids = random_ids(rng, (len(members), layers), count, k)
    for step in range(output):
        fresh = rng.random((len(members), layers)) < 0.6
        ids = np.where(fresh[..., None], random_ids(rng, fresh.shape, count, k), ids)
        write(members, DECODE, prompt + step, ids)


def _requests(requests: int, prompt: int, output: int) -> list[dict[str, Any]]:
    return [
        {
            "request": request,
            "prompt_tokens": prompt,
            "output_tokens": output + 1,
            "domain": DOMAINS[request % len(DOMAINS)],
            "arrival_s": None,
        }
        for request in range(requests)
    ]
