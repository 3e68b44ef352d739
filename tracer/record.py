"""Record a trace from a transformers model as it prefills and decodes, batch 1.

    python -m tracer.record MODEL_DIR PROMPTS.jsonl OUT [--max-new-tokens N] [--seed N] ...

Every prompt is one prefill step of all its tokens and then one step a sampled token; the last
sampled token is never fed back. Expert ids and weights are those that were executed, seen by
`tracer.tap`; the model's outputs are bit for bit what they are without the recorder.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from configs.errors import UserError
from tracer.columns import DECODE, PREFILL
from tracer.prompts import Prompt, prompts_sha256, read_prompts
from tracer.writer import TraceWriter, refuse_non_empty

INSTALL = "pip install 'moesim[gpu]'"
try:
    import torch
    import transformers

    from tracer.modelinfo import describe_model
    from tracer.tap import RoutingTap
except ModuleNotFoundError as missing:
    message = f"recording needs torch and transformers 5 ({missing}): {INSTALL}"
    if __name__ == "__main__":
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    raise UserError(message) from missing

DEFAULT_COLUMNS = ("weights", "gate_probs", "embedding")
RECORDABLE = (*DEFAULT_COLUMNS, "gate_norms", "gate_inputs")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: give 1 or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: give more than 0, at most 1")

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Draw a token id from `logits` [vocabulary], on the CPU so that the seed decides alone."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        probs = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        ranked, order = probs.sort(descending=True, stable=True)
        likely = ranked.cumsum(0) - ranked < self.top_p
        nucleus = order[likely].sort().values
        edges = probs[nucleus].cumsum(0)
        # Not torch.multinomial: its random numbers depend on the CPU's vector width.
        point = torch.rand(1, generator=generator, dtype=torch.float64) * edges[-1]
        return int(nucleus[torch.searchsorted(edges[:-1], point, right=True)])


def record(
    model_dir: str | Path,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    lookahead: int = 3,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    prompt_set: str = "prompts",
    device: str = "cpu",
) -> None:
    """Run the model in `model_dir` on `prompts` and write the trace to the new directory `out`.

    `columns`: of RECORDABLE; `lookahead`: predictions for that many MoE layers ahead, 0 for none.
    Request i samples with seed + i, so that fewer prompts give the beginning of the same trace.
    Raises UserError for wrong values, a model whose experts transformers does not dispatch, a
    prompt longer than the model's context, and an `out` that is not empty.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p)
    unknown = sorted(set(columns) - set(RECORDABLE))
    if unknown:
        raise UserError(f"cannot record column {unknown[0]!r}: choose of {', '.join(RECORDABLE)}")
    refuse_non_empty(Path(out))
    model, tokenizer = load_model(model_dir, device)
    prompt_ids = _tokenize(tokenizer, prompts, model.config, max_new_tokens)
    tap = RoutingTap(model, columns, lookahead)
    fields = {
        **describe_model(model, Path(model_dir).resolve().name),
        "recording": _recording(sampling, seed, tap.kernel_name, device),
        "prompts": {"name": prompt_set, "sha256": prompts_sha256(prompts)},
    }
    outputs = []
    with TraceWriter(out, fields) as writer, tap:
        for request, ids in enumerate(prompt_ids):
            generator = torch.Generator().manual_seed(seed + request)
            draw = partial(sampling.draw, generator=generator)
            outputs.append(0)
            for step in generate_steps(model, tap, ids, max_new_tokens, draw):
                _write(writer, request, step)
                outputs[-1] += 1
        writer.close(_requests_table(prompts, prompt_ids, outputs))


@dataclass
class Step:
    """Tokens of one forward step, the position of the first, and their routing columns."""

    token_ids: list[int]
    position: int
    columns: dict[str, np.ndarray]


@torch.inference_mode()
def generate_steps(
    model: Any,
    tap: RoutingTap,
    prompt_ids: list[int],
    max_new_tokens: int,
    next_token: Callable[[torch.Tensor], int],
) -> Iterator[Step]:
    """Prefill the prompt, then decode until `max_new_tokens` are drawn or the model ends the text.

    `next_token` gets logits [vocabulary] and returns the token to go on with; it is asked once a
    step, hence steps = tokens drawn.
    """
    ends = _end_tokens(model)
    cache, feed, position = None, prompt_ids, 0
    for _ in range(max_new_tokens):
        tokens = torch.tensor([feed], device=model.device)
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield Step(feed, position, tap.take())
        cache, position = output.past_key_values, position + len(feed)
        feed = [next_token(output.logits[0, -1])]
        if feed[0] in ends:
            return


def load_model(model_dir: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model, at its checkpoint's dtype, and its tokenizer."""
    path = Path(model_dir)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no model lies here (config.json is missing); give its directory")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(path)


def _tokenize(
    tokenizer: Any, prompts: Sequence[Prompt], config: Any, max_new_tokens: int
) -> list[list[int]]:
    if not prompts:
        raise UserError("there are no prompts: give at least one")
    prompt_ids = [list(tokenizer(prompt["text"]).input_ids) for prompt in prompts]
    context = config.max_position_embeddings
    for request, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"prompt {request + 1} has no tokens: give it a text")
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"prompt {request + 1}: {len(ids)} tokens and {max_new_tokens} new ones exceed the"
                f" model's context of {context}; shorten it, or lower max_new_tokens"
            )
    return prompt_ids


def _end_tokens(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _write(writer: TraceWriter, request: int, step: Step) -> None:
    rows = len(step.token_ids)
    writer.write_step(
        request=request,
        row=np.arange(rows),
        phase=DECODE if step.position else PREFILL,
        position=step.position + np.arange(rows),
        token_id=np.array(step.token_ids),
        **step.columns,
    )


def _requests_table(
    prompts: Sequence[Prompt], prompt_ids: list[list[int]], outputs: list[int]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "request": range(len(prompts)),
            "prompt_tokens": [len(ids) for ids in prompt_ids],
            "output_tokens": outputs,
            "domain": [prompt["domain"] for prompt in prompts],
            "arrival_s": np.nan,
        }
    )


def _recording(sampling: Sampling, seed: int, kernel: str, device: str) -> dict[str, Any]:
    return {
        "generator": "moesim tracer.record",
        "sampling": asdict(sampling) | {"batch_size": 1, "experts_kernel": kernel},
        "seed": seed,
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Record a trace from a transformers model."
    parser = argparse.ArgumentParser(prog="python -m tracer.record", description=about)
    parser.add_argument("model_dir", help="directory of a transformers checkpoint")
    parser.add_argument("prompts", help='JSON lines, {"domain": ..., "text": ...} each')
    parser.add_argument("out", help="new directory for the trace")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lookahead", type=int, default=3, help="MoE layers to predict ahead")
    parser.add_argument("--columns", default=",".join(DEFAULT_COLUMNS), help="separated by commas")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = vars(_arguments(argv))
    options["columns"] = [name for name in options["columns"].split(",") if name]
    prompts_file = Path(options.pop("prompts"))
    transformers.utils.logging.disable_progress_bar()
    try:
        prompts = read_prompts(prompts_file)
        record(prompts=prompts, prompt_set=prompts_file.stem, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
