"""A small trace of batches, recorded by the twins themselves, and what the plain model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from replay.batches import laid_out
from replay.play import ForcedStep
from tracer.record import Options, Sampling, record
from tracer.trace import Trace

TEXTS = (
    "def area(width, height):\n    return",
    "The river",
    "In the beginning the town had one bridge, and the bridge had one keeper, who",
    "Let x be a number such that",
    "import os",
)
NEW_TOKENS = 6


def record_batches(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, batch: int, device: str = "cpu"
) -> Trace:
    """Prompts of many lengths; every eleventh token ends a request, so batches thin out."""
    import tracer.record as recorder

    monkeypatch.setattr(recorder, "end_tokens", lambda model: frozenset(range(0, 8192, 11)))
    options = Options(
        max_new_tokens=NEW_TOKENS,
        batch_size=batch,
        sampling=Sampling(temperature=1.0, seed=5),
        columns=("weights", "gate_probs"),
        lookahead=1,
    )
    prompts = [{"domain": "test", "text": text} for text in TEXTS]
    record(model, prompts, out, options, device=device)
    return Trace.open(out)


def plain_logits(
    model: Path, steps: Sequence[ForcedStep], rows: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """Logits of transformers' own model on the same padded batches: by step, then by request.

    A whole batch in one pass without a cache.
    """
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(device)
    begins = [index for index, step in enumerate(steps) if step.begins]
    found = []
    for first, last in zip(begins, [*begins[1:], len(steps)], strict=True):
        batch = steps[first:last]
        parts = [laid_out(step.token_ids, step.seats_or_first, rows)[0] for step in batch]
        tokens = np.concatenate(parts, 1)
        counts = np.bincount(batch[0].seats_or_first, minlength=rows)
        pads = np.where(counts > 0, counts.max() - counts, 0)
        columns = np.arange(tokens.shape[1])
        inputs = {
            "input_ids": tokens,
            "attention_mask": (columns >= pads[:, None]).astype(np.int64),
            "position_ids": (columns - pads[:, None]).clip(min=0),
        }
        with torch.inference_mode():
            logits = whole(
                **{name: torch.from_numpy(each).to(device) for name, each in inputs.items()}
            ).logits.float()
        width = parts[0].shape[1]
        for index, step in enumerate(batch):
            found += [logits[line, width - 1 + index].cpu() for line in step.lines]
    return found
