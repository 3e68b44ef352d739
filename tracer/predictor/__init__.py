"""Learned predictors of a later layer's experts: train on a recorded trace, apply, keep for replay.

    predictor = load("TRACE/predictors/promoe_s2.safetensors")
    ids = predictor.predict(gate_input, layer)      # [T, H] -> [T, min(2k, E)], best first

`split` divides requests, `data` streams a trace's rows, `train` fits, `model` predicts and keeps
the weights, `evaluate` compares on held-out requests and `pipeline` puts them together.
docs/predictors.md tells how to use and read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tracer.extra import require_extra

if TYPE_CHECKING:
    from tracer.predictor.model import Predictor

__all__ = ["load"]


def load(path: str | Path, *, sha256: str | None = None, device: str = "cpu") -> Predictor:
    """Load a predictor's weights onto `device`.

    `sha256`: the digest that a trace's manifest lists for the file. Raises UserError without torch,
    for a file that is missing, damaged, no predictor's, or has another digest.
    """
    require_extra("predictors")
    from tracer.predictor.model import Predictor

    return Predictor.load(path, sha256=sha256, device=device)
