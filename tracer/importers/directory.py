"""An output directory that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.files import refuse_non_empty


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """Yield a directory to write to; it becomes `out` when the block ends without an exception.

    Raises UserError where `out` is a file or holds something. After an exception, `out` is as it
    was before.
    """
    out = Path(out)
    refuse_non_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as holder:
        draft = Path(holder) / out.name
        draft.mkdir()
        yield draft
        os.replace(draft, out)
