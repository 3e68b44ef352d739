"""Predicted against measured: a report of `moesim validate`, as far as it concerns a sweep."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import plotly.graph_objects as go
from pydantic import BaseModel, ConfigDict, Field

from configs.errors import UserError
from configs.figure_style import BLUE, GREY, INK, ORANGE
from configs.load import parse_json, validated
from sim.report.canvas import axis, layout
from sim.report.looks import plain
from sim.report.results import Results
from sim.wording import as_ms

REPORT_FILE = "report.json"
_KINDS = ((True, "demand-only", BLUE, "circle"), (False, "prefetching", ORANGE, "triangle-up"))


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Gap(_Part):
    """A figure predicted and measured; ``error`` is relative, None where nothing was measured."""

    predicted: float
    measured: float
    spread: float
    error: float | None


class MeasuredFigures(_Part):
    """Of a point, what the report shows; None where it was not measured."""

    tpot_ms: Gap
    ttft_ms: Gap | None = None
    stall_ms: Gap | None = None
    bytes: Gap | None = None
    memory_bytes: Gap | None = None


class NaiveFigures(_Part):
    """The same point by the naive estimate."""

    tpot_ms: Gap
    stall_ms: Gap | None = None


class MeasuredPoint(_Part):
    """One point of a validation."""

    policy: str
    budget: str | None
    link_scale: float
    time_independent: bool
    figures: MeasuredFigures
    naive: NaiveFigures | None = None


class MeasuredRun(_Part):
    """A run on a machine."""

    machine: str


class MeasuredPlan(_Part):
    """What was to be validated."""

    name: str
    geometry: str | None = None
    hardware: str
    repeats: int


class MeasuredTrace(_Part):
    """Whose routing was replayed."""

    model: str


class Measured(_Part):
    """A `report.json` of `moesim validate`."""

    plan: MeasuredPlan
    trace: MeasuredTrace
    decode_tokens: int
    runs: tuple[MeasuredRun, ...] = Field(min_length=1)
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Validation:
    """Validations of the swept geometry, read as one."""

    reports: tuple[Measured, ...]
    folders: tuple[Path, ...]

    @property
    def points(self) -> list[MeasuredPoint]:
        """Of all reports."""
        return [point for report in self.reports for point in report.points]

    @property
    def digests(self) -> list[tuple[str, str]]:
        """Name and SHA-256 of each report."""
        return [
            (report.plan.name, hashlib.sha256((folder / REPORT_FILE).read_bytes()).hexdigest())
            for report, folder in zip(self.reports, self.folders, strict=True)
        ]

    @property
    def hardware(self) -> list[str]:
        """Profiles that were measured, once each."""
        return list(dict.fromkeys(report.plan.hardware for report in self.reports))


def read_validations(folders: Sequence[Path], results: Results) -> Validation | None:
    """Read directories of `moesim validate`; None without any.

    Raises UserError for a directory without a report, a report that is damaged or of another
    geometry, and one that is named twice.
    """
    if not folders:
        return None
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError("--validation: a directory is named twice: its points would count twice")
    return Validation(tuple(_read(folder, results) for folder in folders), tuple(folders))


def _read(folder: Path, results: Results) -> Measured:
    path = folder / REPORT_FILE
    if not path.is_file():
        raise UserError(
            f"--validation: {path} is not there: name a directory that `moesim validate` wrote"
        )
    try:
        data = parse_json(path.read_bytes())
    except ValueError:
        raise UserError(
            f"--validation: {path} is cut off or edited: restore it, or run `moesim validate "
            "--report-only` there"
        ) from None
    if isinstance(data, dict) and "points" in data and "runs" not in data:
        raise UserError(
            f"--validation: {path} is of another version: `moesim validate` of this one makes it "
            "anew"
        )
    report = validated(Measured, data, f"--validation: {path}")
    swept = sorted(set(results.points["geometry"]))
    if report.plan.geometry not in swept:
        raise UserError(
            f"--validation: {path} is of geometry {report.plan.geometry}, the "
            f"{results.asker.noun} of {', '.join(swept)}: name a validation of the same"
        )
    return report


def errors_table(found: Validation) -> list[dict[str, str]]:
    """Median and worst error without sign, by kind of policy and figure, the naive one beside."""
    rows = []
    for independent, kind, _, _ in _KINDS:
        points = [point for point in found.points if point.time_independent is independent]
        for title, gaps, naive in (
            (
                "time a token (TPOT)",
                [point.figures.tpot_ms for point in points],
                [point.naive.tpot_ms for point in points if point.naive is not None],
            ),
            (
                "exposed stall",
                [point.figures.stall_ms for point in points],
                [point.naive.stall_ms for point in points if point.naive is not None],
            ),
            ("time to first token (TTFT)", [point.figures.ttft_ms for point in points], []),
            ("bytes copied", [point.figures.bytes for point in points], []),
            ("peak GPU memory", [point.figures.memory_bytes for point in points], []),
        ):
            known = [gap for gap in gaps if gap is not None]
            if any(gap.error is not None for gap in known):
                rows.append(
                    {
                        "figure": title,
                        "kind": kind,
                        "points": str(sum(gap.error is not None for gap in known)),
                        **_sizes("", known),
                        **_sizes("naive_", naive),
                    }
                )
    return rows


def _sizes(prefix: str, gaps: Sequence[Gap | None]) -> dict[str, str]:
    errors = [abs(gap.error) for gap in gaps if gap is not None and gap.error is not None]
    if not errors:
        return {f"{prefix}median": "-", f"{prefix}worst": "-"}
    return {
        f"{prefix}median": f"{median(errors) * 100:.1f} %",
        f"{prefix}worst": f"{max(errors) * 100:.1f} %",
    }


def scatter_figure(found: Validation) -> go.Figure:
    """TPOT measured across, predicted up; on the line they agree."""
    figure = go.Figure()
    points = found.points
    values = [
        value
        for point in points
        for value in (point.figures.tpot_ms.measured, point.figures.tpot_ms.predicted)
    ]
    low, high = min(values) / 1.2, max(values) * 1.2
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        name="predicted = measured",
        line={"color": INK, "width": 1},
        hoverinfo="skip",
    )
    naive = [point for point in points if point.naive is not None]
    if naive:
        figure.add_scatter(
            x=[point.figures.tpot_ms.measured for point in naive],
            y=[point.naive.tpot_ms.predicted for point in naive if point.naive is not None],
            mode="markers",
            name="naive estimate",
            marker={"symbol": "x-thin-open", "size": 7, "color": GREY, "line": {"width": 1.3}},
            hoverinfo="skip",
        )
    for independent, kind, colour, symbol in _KINDS:
        chosen = [point for point in points if point.time_independent is independent]
        if chosen:
            figure.add_scatter(
                x=[point.figures.tpot_ms.measured for point in chosen],
                y=[point.figures.tpot_ms.predicted for point in chosen],
                mode="markers",
                name=kind,
                marker={
                    "symbol": symbol,
                    "size": 10,
                    "color": colour,
                    "line": {"color": "white", "width": 0.8},
                },
                customdata=[_told(point) for point in chosen],
                hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<br>measured "
                "%{customdata[2]}<br>predicted %{customdata[3]}<br>error %{customdata[4]}"
                "<extra></extra>",
            )
    side = {"type": "log", "dtick": "D2", "tickformat": "~g"}
    figure.update_layout(
        layout(
            560,
            xaxis=axis("measured TPOT (ms)", **side),
            yaxis=axis("predicted TPOT (ms)", **side),
        )
    )
    return figure


def _told(point: MeasuredPoint) -> list[str]:
    gap = point.figures.tpot_ms
    link = "" if point.link_scale == 1 else f", link x{point.link_scale:g} slower"
    return [
        plain(point.policy),
        plain(f"budget {point.budget}{link}"),
        as_ms(gap.measured),
        as_ms(gap.predicted),
        "-" if gap.error is None else f"{gap.error * 100:+.1f} %",
    ]


def points_table(found: Validation) -> list[list[str]]:
    """Policy, budget, link, measured, spread, predicted and error of each point."""
    rows = []
    for point in found.points:
        gap = point.figures.tpot_ms
        rows.append(
            [
                point.policy,
                point.budget or "all",
                f"x{point.link_scale:g}",
                as_ms(gap.measured),
                f"{gap.spread * 100:.1f} %",
                as_ms(gap.predicted),
                "-" if gap.error is None else f"{gap.error * 100:+.1f} %",
            ]
        )
    return rows
