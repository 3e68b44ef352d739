"""A trace of many accesses as memory-mapped arrays, as a sweep hands it to its workers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from configs import load_geometry
from tests.bench.routing import EXPERTS, LAYERS, TOP_K, routing
from tracer.trace import DECODE, Trace, TraceWriter

TOKENS_A_REQUEST = 1_000


def write(directory: str, tokens: int) -> None:
    """Decode steps only, requests of 1,000 tokens, OLMoE-1B-7B's geometry."""
    geometry = load_geometry("olmoe-1b-7b")
    assert (geometry.num_moe_layers, geometry.num_experts, geometry.top_k) == (
        LAYERS,
        EXPERTS,
        TOP_K,
    )
    index = np.arange(tokens)
    fields = {
        "model_id": geometry.name,
        "geometry": geometry,
        "recording": {"generator": "tests.bench.long_trace"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        with TraceWriter(Path(scratch) / "trace", fields) as writer:
            writer.write_rows(
                experts=routing(tokens),
                request=index // TOKENS_A_REQUEST,
                step=index,
                row=np.zeros(tokens, np.int16),
                phase=np.full(tokens, DECODE, np.uint8),
                position=index % TOKENS_A_REQUEST,
                token_id=np.zeros(tokens, np.int32),
            )
            writer.close(_requests(tokens))
        columns = ["request", "step", "phase", "position", "experts"]
        Trace.open(Path(scratch) / "trace").export_arrays(directory, columns)


def _requests(tokens: int) -> list[dict[str, object]]:
    starts = range(0, tokens, TOKENS_A_REQUEST)
    return [
        {
            "request": number,
            "prompt_tokens": 0,
            "output_tokens": min(TOKENS_A_REQUEST, tokens - start),
            "domain": "synthetic",
            "arrival_s": None,
        }
        for number, start in enumerate(starts)
    ]
