"""The optional packages that only recording, training and replay need."""

from __future__ import annotations

from importlib.util import find_spec

from configs.errors import UserError

INSTALL = "pip install 'moesim[gpu]'"
PACKAGES = ("torch", "transformers", "safetensors")


def require_extra(what: str) -> None:
    """Raise UserError, naming the installation, where `what` lacks one of PACKAGES."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: {missing[0]} is not installed; run {INSTALL}")
