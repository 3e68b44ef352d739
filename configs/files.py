"""Files that are written: whole or not at all, and over nothing."""

from __future__ import annotations

import os
from pathlib import Path

from configs.errors import UserError

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


def prepare_figure(path: Path) -> None:
    """Check that a figure can be drawn to `path`, and make its directory.

    Raises UserError for a suffix other than FIGURE_SUFFIXES and where the file exists, OSError
    where the directory cannot be made.
    """
    if path.suffix not in FIGURE_SUFFIXES:
        raise UserError(f"{path}: a figure ends in one of {', '.join(FIGURE_SUFFIXES)}")
    if path.exists():
        raise UserError(f"{path}: exists; name a new file or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)


def refuse_non_empty(path: Path) -> None:
    """Raise UserError where `path` is a file or a directory that holds something."""
    if path.is_file():
        raise UserError(f"{path}: is a file; name a new directory")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: exists and is not empty; name a new directory or remove it")


def prepare_directory(path: Path, option: str) -> None:
    """Make the directory of what is written at the end of a long run, now.

    Raises UserError where it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{option}: {path} is no directory: name another") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{option}: {path} cannot be written to: name another")


def draft_of(path: Path) -> Path:
    """The hidden name beside `path` under which `write_atomically` prepares it."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a name that readers ignore, then rename it to `path`.

    An OSError, such as that of a full disk, names the file.
    """
    draft = draft_of(path)
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)
