"""Whether workers compute what the client would: same code, same Python, same NumPy."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

import numpy as np

from configs.errors import UserError

CODE = ("configs", "tracer", "policies", "sim")
"""Packages of ours that a result depends on."""

Fingerprint = Mapping[str, str]


@functools.cache
def fingerprint() -> Fingerprint:
    """What equal results depend on, beside the inputs."""
    digest = hashlib.sha256()
    for package in CODE:
        for name, text in _sources(package):
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return {
        "moesim": digest.hexdigest()[:16],
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "NumPy": np.__version__,
    }


def _sources(package: str) -> Iterator[tuple[str, bytes]]:
    root = Path(str(resources.files(package)))
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            yield f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()


def check_same_code(wanted: Fingerprint) -> None:
    """In a worker: raise UserError if it would not compute what the client computes."""
    refuse_other(platform.node(), wanted, fingerprint())


def refuse_other(worker: str, wanted: Fingerprint, found: Fingerprint) -> None:
    """Raise UserError where the code ``found`` in a worker is not the client's."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        pairs = ", ".join(f"{name} {found.get(name)}, here {wanted[name]}" for name in names)
        raise UserError(
            f"worker {worker} has another version ({pairs}; moesim by the digest of its source): "
            "install the same on all machines and start the workers again"
        )
