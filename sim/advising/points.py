"""Points that a search asks for, each simulated once, and the rows kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from sim import backends
from sim.inputs import TraceSource
from sim.point import Point
from sim.running import running
from sim.sweeps import Progress, Store, point_id, to_frame


class Points:
    """Rows by point, in the order in which they were first asked for.

    ``progress(done, asked)`` is called as points finish. With ``out``, finished points are kept
    there, and found there by the same question. Raises UserError where ``out`` holds another's.
    """

    def __init__(
        self,
        trace: TraceSource,
        *,
        jobs: int = 1,
        out: Path | None = None,
        identity: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._trace = trace
        self._backend = backends.choose("loky", jobs)
        self._store = Store(out, identity or {})
        self._found = self._store.finished()
        self._rows: dict[str, dict[str, Any]] = {}
        self._progress = progress or (lambda done, asked: None)

    def rows(self, points: Iterable[Point]) -> list[dict[str, Any]]:
        """Rows of these points, in their order; what is not known yet is simulated."""
        wanted = {point_id(point): point for point in points}
        new = {name: point for name, point in wanted.items() if name not in self._rows}
        missing = {name: point for name, point in new.items() if name not in self._found}
        self._found |= self._simulate(missing, known=len(self._rows) + len(new) - len(missing))
        self._rows |= {name: self._found[name] for name in new}
        return [self._rows[name] for name in wanted]

    def _simulate(self, missing: dict[str, Point], known: int) -> dict[str, dict[str, Any]]:
        fresh: dict[str, dict[str, Any]] = {}
        asked = known + len(missing)
        if not missing:
            return fresh
        with running(self._trace, missing, self._backend) as rows:
            self._progress(known, asked)
            for row in rows:
                fresh[row["point_id"]] = row
                self._store.append(row)
                self._progress(known + len(fresh), asked)
        return fresh

    def all(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return list(self._rows.values())

    def frame(self) -> pd.DataFrame:
        """All rows so far, as a table."""
        return to_frame(self.all())

    def write_tables(self) -> None:
        """All rows as Parquet and CSV, where they are kept."""
        self._store.write_tables(self.frame())
