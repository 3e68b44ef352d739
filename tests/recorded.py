"""A small trace of batches, recorded by the twins themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

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
