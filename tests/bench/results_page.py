"""Make docs/policies.md: every policy on the given traces, and the papers' ratios beside ours.

    make policies TRACES="sample DIR ..." [QUALITY="FILE ..."]

Sweeps are kept in out/policies: broken off, the same command goes on; delete it after a change of
code. What a trace has no columns for is named in the page. Wall-clock goes to stderr, the page has
none. QUALITY: what `moesim quality --json` wrote. `--quick` rehearses: fewer budgets, one link, a
page in the work directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from configs.errors import UserError
from configs.hardware import load_hardware
from tests.bench.results_causes import cpu_rate, fitting, hits_up, machines
from tests.bench.results_finemoe import finemoe
from tests.bench.results_promoe import promoe, ratios
from tests.bench.results_source import Source, open_source
from tests.bench.results_summary import take_away
from tests.bench.results_swapmoe import swapmoe
from tests.bench.results_sweeps import MACHINE, NO_CACHE, QUICK, Extent, Frames, run_all
from tests.bench.results_tables import markdown
from tests.bench.results_trace import Quality, section

RECORD = """\
`sample` is shipped. The other traces of this page are made so (prompts of your own will do;
`train.jsonl` and `judge.jsonl` have none in common):

    moesim trace --model qwen2moe-twin --prompts train.jsonl --batch-size 24 --max-new-tokens 112 \\
      --sample 0.8,0.95,0 --record hidden --device cuda --ignore-eos --out traces/full
    moesim train-predictor --trace traces/full --stride 2 --device cuda --weights-only \\
      --out promoe_s2.safetensors
    moesim trace --model qwen2moe-twin --prompts judge.jsonl --max-new-tokens 112 \\
      --sample 0.8,0.95,0 --record probs,norms,embedding,hidden,lookahead=3 --device cuda \\
      --ignore-eos --out traces/judge
    moesim apply-predictor --trace traces/judge --weights promoe_s2.safetensors
    moesim subset traces/judge --drop gate_inputs --out traces/qwen2moe-twin
    moesim import npz gpt-oss-20b-decode.npz --model gpt-oss-20b --out traces/archive
    moesim subset traces/archive --requests 18-124 --out traces/gpt-oss-20b

and perplexities, on held-out text, so (each model and lossy policy):

    moesim quality --model olmoe-twin --policy swapmoe --text heldout.jsonl --chunk 1 \\
      --max-tokens 1024 --dtype fp32 --expert-budget 12.5% --expert-budget 25% ... \\
      --json > quality/swapmoe-olmoe-twin.json

The archive is that of AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting: decoding alone, without gate
probabilities, embeddings or look-ahead. Of its 213 requests 107 in a row remain.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    sources = [open_source(path) for path in given.trace]
    work = given.work or Path("out/policies-quick" if given.quick else "out/policies")
    page = given.page or (work / "policies.md" if given.quick else Path("docs/policies.md"))
    try:
        results = run_all(sources, QUICK if given.quick else Extent(), work, given.jobs)
    except UserError as error:
        sys.exit(f"{error} (sweeps are kept in {work}: delete it after a change of code)")
    read = [json.loads(path.read_text(encoding="utf-8")) for path in given.quality]
    qualities = {
        source.model: [each for each in read if _name(each["model"]) == source.model]
        for source in sources
    }
    write(sources, results, qualities, page)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", action="append", required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--page", type=Path, help="figures go to img/ beside it")
    parser.add_argument("--quality", type=Path, action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    return parser


def _name(model: str) -> str:
    return model.rstrip("/").split("/")[-1]


def write(
    sources: Sequence[Source],
    results: dict[str, Frames],
    qualities: dict[str, list[Quality]],
    page: Path,
) -> None:
    """The page and its figures, in place of those that are there."""
    grids = {model: whole_grid(frames) for model, frames in results.items()}
    parts = [
        "# Policies compared",
        take_away(sources, results, grids, qualities),
        *_method(sources, grids),
        *(
            section(source, grids[source.model], page.parent / "img", page, qualities[source.model])
            for source in sources
        ),
        hits_up(grids),
        fitting(results),
        cpu_rate(results, grids),
        machines(results),
        "## The papers' ratios beside ours",
        "Routing is that of the traces above: small trained models in place of the papers' "
        "DeepSeek-MoE, Qwen2-57B, Mixtral-8x7B, Qwen1.5-MoE, Phi-3.5-MoE and Switch Transformer.",
        ratios(sources),
        *promoe(sources, results),
        *finemoe(sources, results),
        *swapmoe(sources, results, qualities),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def whole_grid(frames: Frames) -> pd.DataFrame:
    """Caching policies at all budgets and those without a cache at one, each label once."""
    streams = frames["streams"]
    return pd.concat([frames["grid"], streams[streams["policy"].isin(NO_CACHE)]], ignore_index=True)


# ---------------------------------------------------------------------- method


def _method(sources: Sequence[Source], grids: dict[str, pd.DataFrame]) -> list[str]:
    cpu = load_hardware(MACHINE).cpu_bytes_per_s / 1e9
    return [
        "## Method",
        "Every policy on the same requests, at six budgets (shares of the experts on the GPU) over "
        "three links: what PCIe 3, 4 and 5 x16 achieve, 12, 24 and 50 GB/s. The machine is "
        f"`{MACHINE}` with that link; the other machines follow below.",
        "- **All times are simulated and estimated, not validated**; hits and bytes of policies "
        "that ask no time are exact.\n"
        "- **Every ranking is by time a token**: decode time over decoded tokens, so that long "
        "requests weigh as in the hit rate. Figures and tables that say TPOT mean this.\n"
        f"- What computes misses on the CPU rests on a rate of {cpu:g} GB/s, an estimate: rankings "
        "are given without the CPU, too, and by its rate.\n"
        "- `auto` is ours; `auto cpu=False` is the same without the CPU.\n"
        "- Six requests are judged, spread over the domains; fitted policies "
        "learn from the others, which nobody is judged on. FineMoE's own section fills with 70 %.\n"
        "- Lossless policies compute what the model computes. Lossy ones do not: what they lose "
        "stands beside their times.",
        "Made by",
        f'    make policies TRACES="{" ".join(map(_public_name, sources))}" QUALITY=...',
        _trace_table(sources, grids),
        RECORD.rstrip(),
    ]


def _public_name(source: Source) -> str:
    return source.path if source.path == "sample" else f"traces/{source.model}"


def _trace_table(sources: Sequence[Source], grids: dict[str, pd.DataFrame]) -> str:
    rows = []
    for source in sources:
        grid = grids[source.model]
        row = grid[grid["status"] == "ok"].iloc[0]
        optional = [name for name in source.trace.columns() if name not in _ALWAYS]
        rows.append(
            [
                source.model,
                source.timed.name,
                f"{row['trace.judged_requests']:.0f} + {row['trace.fitted_requests']:.0f}",
                f"{row['tokens.prefill']:.0f} + {row['tokens.decode']:.0f}",
                str(source.batch),
                ", ".join(optional) or "none",
            ]
        )
    head = ("routing of", "times", "requests judged + set aside", "tokens judged: prefill + decode")
    return markdown((*head, "batch", "optional columns"), rows)


_ALWAYS = ("request", "step", "row", "phase", "position", "token_id", "experts", "weights")


if __name__ == "__main__":
    main()
