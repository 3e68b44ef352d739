"""A model to replay, by what a user names: a checkpoint, or a geometry's random weights."""

from __future__ import annotations

import shlex
import sys

from configs.errors import UserError
from replay.memory import enough_memory
from replay.model import ReplayModel, from_checkpoint, synthetic
from replay.published import transformers_config
from tracer.load_model import resolve_device

DTYPE = "bf16"


@enough_memory("the model", "free the GPU of other programs, or choose a smaller model")
def open_model(model: str | None, geometry: str | None, device: str) -> ReplayModel:
    """Experts in host memory, the rest on the device.

    Raises UserError unless just one of ``model`` and ``geometry`` is given.
    """
    if (model is None) == (geometry is None):
        raise UserError("give --model DIRECTORY or --geometry NAME, one of them")
    place = resolve_device(device)
    if model is not None:
        return from_checkpoint(model, place)
    assert geometry is not None
    return synthetic(transformers_config(geometry), place)


def command_line() -> str:
    """The command that is running, to stand beside what it writes."""
    return " ".join(["moesim", *map(shlex.quote, sys.argv[1:])])


def weights_of(ready: ReplayModel) -> str:
    """Whose weights they are, in a sentence."""
    if ready.source == "synthetic":
        return "Weights are random, of the model's shapes: times are real, texts are not."
    return "Weights are the checkpoint's."
