"""Columns of a trace as memory-mapped .npy files: one copy in memory for many processes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs.errors import UserError
from tracer.manifest import read_manifest
from tracer.requests import REQUESTS_FILE

ARRAYS_FILE = "arrays.json"

Arrays = dict[str, NDArray]


class ArrayTrace:
    """Rows of a trace exported by `Trace.export_arrays`, memory-mapped and read-only.

    Answers like a `Trace` whose first row is the first one exported and which has the exported
    columns alone; `digest` is the trace's. Pickled, it holds the arrays themselves, for a machine
    that does not see the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        described = self.path / ARRAYS_FILE
        if not described.is_file():
            raise UserError(f"{self.path}: holds no exported arrays (no {ARRAYS_FILE})")
        content: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
        self.manifest = read_manifest(self.path)
        self.notes: list[str] = []
        self.rows: int = content["rows"]
        self._arrays = {
            name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in content["columns"]
        }

        self._requests: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        """With the files' content in place of maps of them."""
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        requests = self._requests or (self.path / REQUESTS_FILE).read_bytes()
        return {**self.__dict__, "_arrays": arrays, "_requests": requests}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read-only, as maps are."""
        self.__dict__.update(state)
        for array in self._arrays.values():
            array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def digest(self) -> str:
        """The digest of the trace that the arrays were exported from."""
        return self.manifest.digest

    def columns(self) -> list[str]:
        """Names of the exported columns."""
        return list(self._arrays)

    def requests(self) -> pd.DataFrame:
        """All requests of the trace, as `Trace.requests`."""
        if self._requests is not None:
            return pd.read_parquet(io.BytesIO(self._requests))
        return pd.read_parquet(self.path / REQUESTS_FILE)

    def load(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Arrays:
        """Return views of rows [start, stop), shapes and dtypes as `Trace.load`."""
        start, stop = row_range(self.path, self.rows, start, stop)
        missing = [name for name in columns if name not in self._arrays]
        if missing:
            raise UserError(f"{self.path}: column {missing[0]!r} was not exported")
        return {name: self._arrays[name][start:stop] for name in columns}


def load_arrays(directory: str | Path) -> ArrayTrace:
    """Open what `Trace.export_arrays` wrote."""
    return ArrayTrace(directory)


def row_range(path: Path, rows: int, start: int, stop: int | None) -> tuple[int, int]:
    """Resolve [start, stop) within `rows` rows; a UserError where it holds none of them."""
    stop = rows if stop is None else min(stop, rows)
    if not 0 <= start < stop:
        raise UserError(f"{path}: rows [{start}, {stop}) are none of the trace's {rows} rows")
    return start, stop
