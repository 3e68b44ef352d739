"""The page: sections in order, figures with a table beside each, one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from configs.errors import UserError
from configs.files import write_atomically
from sim.advice import recommend
from sim.front import front, without_slivers
from sim.report import facts, reproduce
from sim.report.breakdown import breakdown_figure
from sim.report.canvas import as_html
from sim.report.experts import Popularity, experts_figure, layers_table, popularity_of
from sim.report.grid import grid_figure
from sim.report.looks import KIND_NAMES, Look, looks_of
from sim.report.measured import (
    Validation,
    errors_table,
    points_table,
    read_validations,
    scatter_figure,
)
from sim.report.pareto import fronts_figure, pareto_figure
from sim.report.results import Results, read
from sim.tables import winner_row, winner_runs
from sim.wording import as_gib, as_ms, as_percent, gib_figure, three_figures

REPORT_FILE = "report.html"
_MOST_CHIPS = 5  # systems that are shown side by side; more are a list
_NAME_PIXELS, _CELL_PIXELS = 150, 44  # least of the ranking's grid


@dataclass(frozen=True)
class Panel:
    """What the page shows of one system."""

    number: int
    name: str
    advice: list[str]
    pareto: Markup
    grid: Markup
    breakdown: Markup
    winner_cells: list[list[str]]
    ranking: list[list[str]]
    reference: str
    parts: list[list[str]]
    alt: str


def write_report(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    validations: Sequence[str | Path] = (),
    trace: str | None = None,
) -> tuple[Path, list[str]]:
    """Write the page of a directory of `moesim sweep` or `advise`.

    Returns where, and what the user should be told.

    ``out``: the file, ``report.html`` in the directory if not given. ``validations``: directories
    of `moesim validate`. ``trace``: where the trace lies, if not under its own name.

    The same inputs give the same bytes. Raises UserError for a directory without a finished sweep,
    for what does not belong to it, and where another file is in the way.
    """
    directory = Path(directory)
    target = directory / REPORT_FILE if out is None else Path(out)
    if target.is_dir():
        raise UserError(f"--out {target} is a directory: name a file, such as {target}/report.html")
    results = read(directory)
    found = read_validations([Path(each) for each in validations], results)
    popularity = popularity_of(results, trace)
    content = render(results, found, popularity, trace).encode()
    if target.exists() and target.read_bytes() != content:
        raise UserError(f"{target}: another file is there: remove it or name another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    notes = [f"no heat map of experts: {popularity}"] if isinstance(popularity, str) else []
    if len(results.failed):
        notes.append(f"{len(results.failed)} of {len(results.frame)} points failed")
    return target, notes


def render(
    results: Results,
    validation: Validation | None,
    popularity: Popularity | str,
    trace: str | None = None,
) -> str:
    """The page as text. ``trace``: as for :func:`write_report`."""
    looks = looks_of(results.points)
    asker = results.asker
    answer = asker.answer
    advice = {} if answer else {each.system: each.text for each in recommend(results.frame)}
    panels = [
        _panel(number, name, results, looks, advice.get(name, ""))
        for number, name in enumerate(results.systems, start=1)
    ]
    environment = Environment(
        loader=PackageLoader("sim", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first = results.systems.index(asker.first(results.points)) + 1
    return environment.get_template("page.html.j2").render(
        title=facts.title_of(results),
        question=asker.question(results.points),
        facts=facts.facts_of(results, looks),
        failures=facts.failures_of(results),
        time_words=facts.time_words(results.points),
        panels=panels,
        first=first,
        most_chips=_MOST_CHIPS,
        of="" if asker.goal.of == "mean" else f" ({asker.goal.of})",
        target_ms=asker.goal.tpot_ms,
        room="the GPU" if asker.goal.limit_bytes is None else as_gib(asker.goal.limit_bytes),
        answer=answer,
        picks_words=asker.picks_words,
        overview=[_overview(name, results) for name in results.systems],
        fronts=_fronts(results),
        kinds={look.kind for look in looks},
        experts=_experts(popularity),
        validation=_validation(validation, results),
        file=asker.file,
        commands=reproduce.commands_of(
            results, () if validation is None else validation.folders, trace
        ),
        versions=_versions(results, validation),
        identity=reproduce.identity_text(results),
        identity_file=reproduce.IDENTITY_FILE,
        plotlyjs=Markup(get_plotlyjs()),
    )


def _versions(results: Results, validation: Validation | None) -> list[tuple[str, str]]:
    measured = [] if validation is None else validation.digests
    return [
        *reproduce.versions_of(results),
        *((f"validation {name} (SHA-256)", digest) for name, digest in measured),
        ("drawn with", f"plotly {plotly.__version__}"),
    ]


def _panel(number: int, name: str, results: Results, looks: Sequence[Look], advice: str) -> Panel:
    points = results.of_system(name)
    ranked = results.ranked[results.ranked["system"] == name]
    asker = results.asker
    pick = (asker.pick_name, asker.pick(points))
    reference = str(ranked["faster_than"].mode().iloc[0])
    return Panel(
        number=number,
        name=name,
        advice=[line.strip() for line in advice.splitlines()[1:]],
        pareto=as_html(pareto_figure(points, looks, pick, asker.goal), f"pareto-{number}"),
        grid=_grid(points, looks, number),
        breakdown=as_html(breakdown_figure(points, looks), f"breakdown-{number}"),
        winner_cells=_winners(points, ranked),
        ranking=[_ranking_row(row, reference) for row in ranked.to_dict("records")],
        reference=reference,
        parts=_parts(points),
        alt=_front_words(points),
    )


def _grid(points: pd.DataFrame, looks: Sequence[Look], number: int) -> Markup:
    figure = grid_figure(points, looks)
    width = _NAME_PIXELS + _CELL_PIXELS * len(figure.data[0].x)
    return as_html(figure, f"ranking-{number}", least_width=width)


def _front_words(points: pd.DataFrame) -> str:
    line = without_slivers(front(points))
    if line.empty:
        return "No choice fits the GPU, so there is no front."
    told = [
        f"{row['label']} in {as_gib(row['memory.peak_bytes'])}: {as_ms(row['tpot_ms.mean'])}"
        for row in line.to_dict("records")
    ]
    return f"Pareto front of choices, from little memory to much: {'; '.join(told)}."


def _winners(points: pd.DataFrame, ranked: pd.DataFrame) -> list[list[str]]:
    runs = winner_runs(points)
    groups = ranked.groupby("expert_budget_bytes", sort=True)
    cells = []
    for _, group in groups:
        budget, memory, fastest, tpot, sign, second, other, bound = winner_row(group, runs)
        tie = f"{second} (tie)" if sign == "=" else second
        cells.append([budget, fastest, tie, memory, tpot, other, bound])
    return cells


def _ranking_row(row: dict[Any, Any], reference: str) -> list[str]:
    """``reference``: what the column of speed-ups is headed with; another one is named."""
    causal = row["kind"] == "causal"
    than = "" if row["faster_than"] == reference else f" ({row['faster_than']})"
    notes = [] if causal else [KIND_NAMES[row["kind"]]]
    if causal and row["tie"]:
        notes.append("fastest" if row["place"] == 1 else "tie")
    if not row["fits"]:
        notes.append("does not fit")
    if row["saturated"]:
        notes.append("as at a smaller budget")
    return [
        row["budget"],
        row["policy"],
        ", ".join(notes),
        three_figures(row["tpot_ms"]),
        three_figures(row["ttft_ms"]),
        gib_figure(row["gpu_memory_bytes"]),
        as_percent(row["hit_rate"]),
        as_percent(row["late_share"]),
        three_figures(row["stall_ms"]),
        three_figures(row["mb_per_token"]),
        f"{row['times_faster']:.2f}{than}",
        "-" if row["kind"] == "bound" else as_percent(row["gap_to_bound"]),
    ]


def _parts(points: pd.DataFrame) -> list[list[str]]:
    """Budget, policy and the parts of a step in ms."""
    names = ("host", "segments", "experts", "stall_cpu", "stall_late", "stall_miss")
    return [
        [
            row["budget"],
            row["label"] if row["kind"] == "causal" else f"{row['kind']}: {row['label']}",
            *(three_figures(_number(row[f"breakdown_ms.{name}"])) for name in names),
            three_figures(row["step_ms"]),
        ]
        for row in points.to_dict("records")
    ]


def _number(value: Any) -> float:
    return 0.0 if pd.isna(value) else float(value)


def _overview(name: str, results: Results) -> list[str]:
    """System, policy, budget, GPU memory, TPOT, TTFT and hits of the pick."""
    pick = results.asker.pick(results.of_system(name))
    if pick is None:
        return [name, "nothing to recommend", *["-"] * 5]
    rate = pick["decode.hit_rate"]
    return [
        name,
        pick["label"],
        pick["budget"],
        as_gib(pick["memory.peak_bytes"]),
        as_ms(pick["tpot_ms.mean"]),
        as_ms(pick["ttft_ms.mean"]),
        "-" if pd.isna(rate) else f"{as_percent(rate)} %",
    ]


def _fronts(results: Results) -> Markup | None:
    if len(results.systems) < 2:
        return None
    lines = [(name, without_slivers(front(results.of_system(name)))) for name in results.systems]
    drawn = [(name, line) for name, line in lines if not line.empty]
    return as_html(fronts_figure(drawn, results.asker.goal), "fronts") if drawn else None


def _experts(found: Popularity | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"missing": found}
    layers = layers_table(found)
    most = max(layers, key=lambda row: row["quarter"])
    least = min(layers, key=lambda row: row["quarter"])
    return {
        "missing": None,
        "subject": found.subject,
        "figure": as_html(experts_figure(found), "experts"),
        "layers": [_layer_row(row) for row in layers],
        "alt": f"Most skewed is layer {most['layer']}, whose most popular quarter of experts gets "
        f"{most['quarter'] * 100:.0f} % of the accesses; least is layer {least['layer']} with "
        f"{least['quarter'] * 100:.0f} %.",
    }


def _layer_row(row: dict[str, Any]) -> list[str]:
    shares = (f"{row[name] * 100:.1f} %" for name in ("first", "quarter"))
    return [str(row["layer"]), row["top"], *shares, str(row["unused"])]


def _validation(found: Validation | None, results: Results) -> dict[str, Any] | None:
    if found is None:
        return None
    swept = set(results.points["hardware"])
    measured = set(found.hardware)
    return {
        "reports": found.reports,
        "figure": as_html(scatter_figure(found), "measured"),
        "errors": [[*row.values()] for row in errors_table(found)],
        "points": points_table(found),
        "unmeasured": sorted(swept - measured),
        "foreign": not swept & measured,
    }
