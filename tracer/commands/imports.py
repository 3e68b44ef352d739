"""`moesim import`: routing that other tools recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="Name in configs/models, or a YAML file.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")]


def register(importer: typer.Typer) -> None:
    """Add the commands to the typer app of `moesim import`."""
    importer.command("npz")(import_npz_command)
    importer.command("bigmoe-csv")(import_csv_command)
    importer.command("vllm")(import_vllm_command)
    importer.command("sglang")(import_sglang_command)
    importer.command("hf-parquet")(import_hf_parquet_command)
    importer.command("moe-trace")(import_moe_trace_command)


def import_npz_command(
    src: Annotated[Path, typer.Argument(help="Arrays experts and scores [tokens, L, k], offsets.")],
    model: Model,
    out: Out,
) -> None:
    """Import a decode trace from a NumPy archive.

    Example: moesim import npz gpt-oss-20b-decode.npz --model gpt-oss-20b --out traces/gpt-oss
    """
    from tracer.importers.npz import import_npz

    import_npz(src, model, out)
    say_imported(out)


def import_csv_command(
    src: Annotated[Path, typer.Argument(help="BigMoeOnEdge's route trace (CSV).")],
    model: Model,
    out: Out,
) -> None:
    """Import a BigMoeOnEdge route trace.

    Example: moesim import bigmoe-csv route.csv --model qwen3-30b-a3b --out traces/qwen3
    """
    from tracer.importers.bigmoe_csv import import_bigmoe_csv

    import_bigmoe_csv(src, model, out)
    say_imported(out)


def import_vllm_command(
    src: Annotated[
        Path,
        typer.Argument(help="Routed experts: .npy, .npz, .json, .jsonl, or a directory of them."),
    ],
    model: Model,
    out: Out,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=1, help="Prompt length, where files do not tell it."),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", min=1, help="Tokens of a prefill step; default: all."),
    ] = None,
) -> None:
    """Import the routed experts that vLLM returns (--enable-return-routed-experts).

    Example: moesim import vllm answers.jsonl --model qwen3-30b-a3b --out traces/vllm
    """
    from tracer.importers.vllm import import_vllm

    import_vllm(src, model, out, prompt_tokens=prompt_tokens, prefill_chunk=prefill_chunk)
    say_imported(out)


def import_sglang_command(
    src: Annotated[Path, typer.Argument(help="Dump (.pt) of the recorder, mode per_token.")],
    model: Model,
    out: Out,
) -> None:
    """Import a dump of SGLang's expert distribution recorder (per_token mode).

    Example: moesim import sglang expert_distribution_recorder_1_0.pt --model qwen3-30b-a3b
    --out traces/sglang
    """
    from tracer.importers.sglang import import_sglang

    import_sglang(src, model, out)
    say_imported(out)


def import_hf_parquet_command(
    src: Annotated[Path, typer.Argument(help="Directory of layer_NN.parquet, indices and scores.")],
    model: Model,
    out: Out,
    sequence_tokens: Annotated[
        int, typer.Option("--sequence-tokens", min=1, help="Rows that are one sequence.")
    ],
    token_ids: Annotated[
        Path | None,
        typer.Option("--token-ids", help="Parquet of token_id: a file, or a directory of them."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Only the first N rows.")
    ] = None,
) -> None:
    """Import Parquet files of indices and scores, one a layer (FLAME-MoE-Traces).

    Example: moesim import hf-parquet actives/iter_5473 --model flame-moe-290m.yaml
    --sequence-tokens 2048 --token-ids samples --max-tokens 204800 --out traces/flame
    """
    from tracer.importers.hf_parquet import import_hf_parquet

    import_hf_parquet(
        src,
        model,
        out,
        sequence_tokens=sequence_tokens,
        token_ids=token_ids,
        max_tokens=max_tokens,
    )
    say_imported(out)


def import_moe_trace_command(
    src: Annotated[Path, typer.Argument(help="CSV of lines layer,expert.")],
    model: Model,
    out: Out,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=1, help="Prompt length, as moe-trace prints it."),
    ] = None,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Leave the prefill out.")
    ] = False,
) -> None:
    """Import the CSV of llama.cpp's moe-trace.

    Example: moesim import moe-trace moe_trace.csv --model qwen3-30b-a3b --prompt-tokens 64
    --out traces/llama
    """
    from tracer.importers.moe_trace import import_moe_trace

    import_moe_trace(src, model, out, prompt_tokens=prompt_tokens, decode_only=decode_only)
    say_imported(out)


def say_imported(out: Path) -> None:
    """Print what the new trace holds."""
    from tracer.trace import Trace

    trace = Trace.open(out)
    geometry = trace.manifest.geometry
    print(
        f"{out}: {trace.rows} tokens, {geometry.num_moe_layers} MoE layers x "
        f"{geometry.num_experts} experts, top-{geometry.top_k}"
    )
