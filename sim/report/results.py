"""What a report is made of: a directory of `moesim sweep` or `moesim advise`, read once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from configs.errors import UserError
from configs.load import parse_json, validated
from sim.plots import PARTS
from sim.ranking import rank_points
from sim.report.advised import read_advised
from sim.report.askers import Asker, Swept
from sim.selection import prepare, systems
from sim.sweeps import CONFIG_FILE, PARQUET_FILE, SweepConfig, read_results

_UNSHOWN = (
    *("prefill.", "decode.cold.", "decode.steady.", "decode.hit_bytes", "itl_ms.", "e2el_ms."),
    *("prefetch.", "quality.prefill.", "tpot_ms.p", "ttft_ms.p", "memory.s", "memory.w"),
)
_DIGEST = "trace digest"
_AGAIN = "run the same command again into {} directory"
#: what the page shows beside the columns that :func:`sim.selection.prepare` asks for
_SHOWN = (
    *("decode.asked", "decode.late", "decode.hit_rate", "h2d_bytes_per_token"),
    *(f"breakdown_ms.{part}" for part, *_ in PARTS),
)


@dataclass(frozen=True)
class Results:
    """A finished sweep, or a question that was answered.

    ``asker``: what asked for the points. ``frame`` has a row a point as it was written, ``points``
    those that can be compared (see :func:`sim.selection.prepare`), judged as was asked; their
    ``step_ms`` is the mean TPOT, whatever they are judged by. ``identity`` is what the directory
    says of itself: configuration or question, and the contents of the files that it named.
    """

    asker: Asker
    identity: dict[str, Any]
    frame: pd.DataFrame
    points: pd.DataFrame
    table_sha256: str

    @cached_property
    def ranked(self) -> pd.DataFrame:
        """As :func:`sim.ranking.rank`."""
        return rank_points(self.points)

    @cached_property
    def systems(self) -> list[str]:
        """Names of the systems, in order."""
        return systems(self.points)

    def of_system(self, name: str) -> pd.DataFrame:
        """The prepared points of one system."""
        return self.points[self.points["system"] == name]

    @property
    def failed(self) -> pd.DataFrame:
        """Rows of points that failed."""
        return self.frame[self.frame["status"] == "failed"]

    @property
    def silent(self) -> int:
        """Points that succeeded but decoded no token, so that they have no TPOT."""
        succeeded = self.frame[self.frame["status"] == "ok"]
        return int(succeeded["tpot_ms.mean"].isna().sum())

    @property
    def trace_digest(self) -> str:
        """Of the trace that was replayed."""
        return str(self.identity[_DIGEST])


def read(directory: Path) -> Results:
    """Read a results directory.

    Raises UserError where it is none, where it is not finished, and where a file is cut off or
    belongs to another sweep.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory: name one that `moesim sweep` or `moesim advise` wrote"
        )
    identity = _identity(directory / CONFIG_FILE, directory)
    asker = _asker(directory, identity)
    path = directory / PARQUET_FILE
    frame = read_results(directory)
    _require_sound(frame, path)
    points = _points(asker, frame, path)
    digests = set(frame["trace.digest"].dropna()) if "trace.digest" in frame else set()
    if digests - {identity[_DIGEST]}:
        raise UserError(
            f"{path} is of another trace than {CONFIG_FILE} says: {_AGAIN.format('an empty')}"
        )
    asker.require_points(frame, path)
    return Results(
        asker=asker,
        identity=identity,
        frame=_needed(frame),
        points=points,
        table_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _asker(directory: Path, identity: dict[str, Any]) -> Asker:
    if "question" in identity:
        return read_advised(directory, identity)
    names = SweepConfig.model_fields
    config = {name: value for name, value in identity.items() if name in names}
    return Swept(validated(SweepConfig, config, str(directory / CONFIG_FILE)))


def _points(asker: Asker, frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Prepared and judged; UserError where a column is missing that the page shows."""
    absent = [name for name in asker.judged_columns if name not in frame]
    if absent:
        raise UserError(f"{path}: column {absent[0]} is missing: {_AGAIN.format('a new')}")
    stepped = frame.assign(step_ms=frame["tpot_ms.mean"]) if "tpot_ms.mean" in frame else frame
    points = prepare(_needed(asker.judged(stepped)))
    missing = [name for name in _SHOWN if name not in points]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing: {_AGAIN.format('a new')}")
    return asker.named(points).copy()  # in one block a type: it is cut up often


def _require_sound(frame: pd.DataFrame, path: Path) -> None:
    """UserError naming row, column and value of a table that moesim does not write."""
    for name, sound in _SOUND.items():
        if name not in frame or "status" not in frame:
            continue  # told where it is needed
        for row, value in frame.loc[frame["status"] == "ok", name].items():
            if not sound(value):
                raise UserError(
                    f"{path}, row {row}, column {name}: {value!r} is no result of a point; "
                    f"{_AGAIN.format('a new')}"
                )
    odd = set(frame.get("status", ())) - {"ok", "failed"}
    if odd:
        raise UserError(f"{path}, column status: {min(map(str, odd))} is neither ok nor failed")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: object) -> bool:
    """A finite one above 0."""
    return isinstance(value, int | float) and 0 < value < float("inf")


def _is_mapping(value: object) -> bool:
    try:
        return isinstance(value, str) and isinstance(parse_json(value), dict)
    except ValueError:
        return False


def _missing_or(sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or value != value or sound(value)


_SOUND: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("policy", "label", "hardware", "geometry"), _is_text),
    **dict.fromkeys(
        ("expert_budget_bytes", "memory.peak_bytes", "memory.expert_bytes_total"), _is_number
    ),
    **dict.fromkeys(("tpot_ms.mean", "ttft_ms.mean"), _missing_or(_is_number)),
    "point.params": _is_mapping,
}


def _needed(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the columns that no report shows, which are most."""
    return frame[[name for name in frame if not str(name).startswith(_UNSHOWN)]].copy()


def _identity(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is not there: name a directory that `moesim sweep CONFIG --out {directory}` "
            "or `moesim advise` wrote"
        )
    try:
        identity = parse_json(path.read_bytes())
    except ValueError:
        identity = None
    if not isinstance(identity, dict) or not isinstance(identity.get(_DIGEST), str):
        raise UserError(f"{path} is cut off or edited: {_AGAIN.format('a new')}")
    return identity
