"""A transformers model without its routed experts: everything else loaded, experts never read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from configs.errors import UserError

_LOCK = threading.Lock()


def is_experts(module: nn.Module) -> bool:
    """Whether this is a fused experts module of transformers."""
    return type(module).__name__.endswith("Experts")


@contextmanager
def without_experts() -> Iterator[None]:
    """Models made or loaded inside get None for the parameters of their experts.

    A checkpoint key whose parameter is not there is never read by transformers. Not for use from
    two threads at once: it replaces ``Module.register_parameter`` for the while.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.dim() >= 2 and is_experts(self):
            # Else transformers initialises what is not there.
            self._is_hf_initialized = True  # type: ignore[assignment]
            parameter = None
        original(self, name, parameter)

    with _LOCK:
        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The whole model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_skeleton(path: str | Path, dtype: torch.dtype, device: str) -> Any:
    """A checkpoint's model on ``device`` without its experts.

    Raises UserError for a damaged checkpoint, and one that lacks other weights: transformers would
    draw them.
    """
    try:
        with without_experts(), _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map=device, output_loading_info=True
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({error}); get the checkpoint again") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{path}: holds no {missing[0]}: the checkpoint is not whole; get it again")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress, and its report of the experts as weights of no use."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def random_skeleton(config: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
    """A model of random weights on ``device`` without its experts: for timing a geometry."""
    torch.manual_seed(seed)
    with without_experts(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_config(path: str | Path) -> Any:
    """Configuration of a checkpoint. Raises UserError for what is no directory of a model."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{file} is not there: name the directory of a transformers model")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"{file}: transformers cannot read it ({told}); mend it") from error


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Fused experts modules by name, in order of execution."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}
