"""Several reports read as one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomically
from replay.validation.figure import draw_scatter
from replay.validation.files import as_json
from replay.validation.judged import Figures
from replay.validation.summary import errors_by_part, summary, summary_lines


def write_together(folders: Sequence[Path], out: Path) -> list[str]:
    """Write `summary.md`, `summary.json` and the picture; returns the first's lines."""
    twice = [folder for folder, times in Counter(map(Path.resolve, folders)).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: its points would count twice")
    reports = [_read(folder) for folder in folders]
    rows = [row for report in reports for row in report["points"]]
    ranks = [rank for report in reports for rank in report["rankings"]]
    told = summary(rows, ranks)
    lines = ["# Predicted against measured", "", *_of_each(folders, reports, out)]
    lines += ["", *summary_lines(told)]
    lines += errors_by_part(rows)
    out.mkdir(parents=True, exist_ok=True)
    each = {str(folder): report["summary"] for folder, report in zip(folders, reports, strict=True)}
    write_atomically(out / "summary.json", as_json({"all": told, "each": each}))
    write_atomically(out / "summary.md", ("\n".join(lines) + "\n").encode())
    draw_scatter(reports, out)
    return lines


def _read(folder: Path) -> Figures:
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{path} is not there; `moesim validate` writes it")
    report: Figures = json.loads(path.read_text())
    if "cells" not in report:
        raise UserError(f"{path} is of another version: a campaign of this one makes it anew")
    return report


def _of_each(folders: Sequence[Path], reports: Sequence[Figures], out: Path) -> list[str]:
    lines = ["| what | points | machine |", "| --- | --- | --- |"]
    for folder, report in zip(folders, reports, strict=True):
        machine = report["runs"][0]["machine"].split(",")[0]
        name = report["plan"]["name"]
        link = Path(os.path.relpath(folder, out)) / "report.md"
        lines.append(f"| [{name}]({link.as_posix()}) | {len(report['points'])} | {machine} |")
    return lines
