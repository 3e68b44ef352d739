"""What tracing costs on a CPU, and how fast traces are written and read and how large they are."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tracer.trace import Trace, TraceWriter

MOST_OVERHEAD = 0.05
PAIRS = 120
ROUNDS = 3
COLUMNS = ("tokens", "gate_probs", "embedding", "lookahead_1")
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 1024,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.bench
@pytest.mark.parametrize("case", ["ids+weights", "ids+weights+timings"])
def test_tracing_overhead_on_the_cpu(
    benchmark: BenchmarkFixture, tmp_path: Path, case: str
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")
    transformers = pytest.importorskip("transformers", reason="needs pip install 'moesim[gpu]'")
    from tests.bench.tracing_overhead import measure
    from tracer.modelinfo import describe_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2MoeConfig(**CONFIG), dtype=torch.float32
    ).eval()
    fields = {**describe_model(model, "random"), "recording": {"generator": "tests.bench"}}
    results: list[dict] = []
    benchmark.pedantic(
        lambda: results.append(measure(model, case, PAIRS, tmp_path, fields)), rounds=1
    )
    torch.set_num_threads(threads)
    benchmark.extra_info.update(tracing=case, **results[0]["step"])
    assert results[0]["step"]["overhead_interval_95"][0] < MOST_OVERHEAD


@pytest.mark.bench
def test_writing_and_reading(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The shipped sample, step by step as a recording writes it, and read again."""
    sample = Trace.open("sample")
    names = [name for name in sample.columns() if name != "step"]
    rows = sample.load([*names, "step"])
    starts = np.flatnonzero(np.diff(rows["step"], prepend=-1))
    steps = list(zip(starts, [*starts[1:], sample.rows], strict=True))
    fields = {
        name: getattr(sample.manifest, name) for name in ("model_id", "geometry", "recording")
    }
    write_s, read_s = [], []

    def run() -> None:
        out = tmp_path / str(len(write_s))
        begin = time.perf_counter()
        with TraceWriter(out, fields) as writer:
            for first, last in steps:
                writer.write_step(**{name: rows[name][first:last] for name in names})
            writer.close(sample.requests())
        write_s.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        Trace.open(out).load(names)
        read_s.append(time.perf_counter() - begin)

    benchmark.pedantic(run, rounds=ROUNDS)
    geometry = sample.manifest.geometry
    sizes = {
        column: sum((sample.path / shard.file).stat().st_size for shard in shards) / sample.rows
        for column in COLUMNS
        if (shards := sample.manifest.shards_of(column))
    }
    benchmark.extra_info.update(
        trace_tokens=sample.rows,
        columns=len(names),
        written_tokens_per_s=round(sample.rows / float(np.median(write_s))),
        read_tokens_per_s=round(sample.rows / float(np.median(read_s))),
        raw_id_bytes_per_token=geometry.num_moe_layers * geometry.top_k,
        bytes_per_token={column: round(size, 1) for column, size in sizes.items()},
    )
