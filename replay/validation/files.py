"""A campaign's files: what was predicted and measured, kept as it comes, run by run.

`plan.json`, and for every run on a machine `run-N/` with `timings.yaml`, `predictions.json` (both
written before anything is measured), `measurements.jsonl` (a line a measurement, as it comes) and
`run.json` (the machine, the digest, the canaries).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomically
from configs.load import validated
from configs.timings import ModelTimes, load_timings, render
from replay.validation.judged import Canary, Figures, Judged, Run
from replay.validation.plan import Cell, ValidationPlan, cells_of
from replay.validation.run import Target

_PLAN, _TIMES, _PREDICTIONS = "plan.json", "timings.yaml", "predictions.json"
_MEASUREMENTS, _RUN = "measurements.jsonl", "run.json"


def as_json(data: object) -> bytes:
    """Bytes of a file."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def open_campaign(out: Path, plan: ValidationPlan) -> None:
    """Begin in a new or empty directory, or go on in one of the same plan. Raises UserError.

    Budgets to calibrate at are not compared: each run's `timings.yaml` says at which it did.
    """
    known = out / _PLAN
    if known.is_file():
        before = validated(ValidationPlan, json.loads(known.read_text()), str(known))
        if not plan.judges_as(before):
            raise UserError(
                f"{out}: holds another plan's results ({_PLAN} differs): name another directory"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(known, as_json(plan.model_dump(mode="json")))


class RunFiles:
    """One run's directory, for writing."""

    def __init__(self, out: Path) -> None:
        number = len(_runs(out)) + 1
        self.folder = out / f"run-{number}"
        self.folder.mkdir()
        self._facts: Figures = {}

    def predicted(
        self, times: ModelTimes, targets: Sequence[Target], sha256: str, facts: Figures
    ) -> None:
        """Before anything is measured."""
        self._facts = {**facts, "predictions_sha256": sha256}
        rows = [
            {
                "cell": each.cell.label,
                "time_independent": each.time_independent,
                "predicted": each.predicted,
            }
            for each in targets
        ]
        write_atomically(self.folder / _TIMES, render(times).encode())
        write_atomically(self.folder / _PREDICTIONS, as_json(rows))

    def canaries(self, before: Canary, after: Canary | None) -> None:
        """Once at the begin of measuring, once at its end."""
        told = {"before": asdict(before), "after": None if after is None else asdict(after)}
        write_atomically(self.folder / _RUN, as_json({**self._facts, "canaries": told}))

    def measured(
        self, target: Target, repeat: int, result: Figures, difference: str | None
    ) -> None:
        """A measurement, at once: a run that is killed keeps what it has."""
        row = {
            "cell": target.cell.label,
            "repeat": repeat,
            "difference": difference,
            "measured": result,
        }
        with (self.folder / _MEASUREMENTS).open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")


def read_campaign(out: Path, plan: ValidationPlan) -> list[Judged]:
    """Every cell that has been measured, by the first run that measured it ``repeats`` times."""
    cells = {cell.label: cell for cell in cells_of(plan)}
    done: dict[str, Judged] = {}
    for folder in _runs(out):
        if not (folder / _RUN).is_file():
            continue  # ended before it measured anything
        for each in _read_run(folder, cells):
            if len(each.measured) >= plan.repeats:
                done.setdefault(each.cell.label, each)
    return [done[label] for label in cells if label in done]


def open_cells(out: Path, plan: ValidationPlan) -> list[Cell]:
    """What no run has measured in full."""
    done = {each.cell.label for each in read_campaign(out, plan)}
    return [cell for cell in cells_of(plan) if cell.label not in done]


def _runs(out: Path) -> list[Path]:
    return sorted(out.glob("run-*"), key=lambda path: int(path.name.removeprefix("run-")))


def _read_run(folder: Path, cells: dict[str, Cell]) -> list[Judged]:
    facts = json.loads((folder / _RUN).read_text())
    canaries = facts.pop("canaries")
    run = Run(
        number=int(folder.name.removeprefix("run-")),
        facts=facts,
        times=load_timings(folder / _TIMES),
        before=Canary(**canaries["before"]),
        after=None if canaries["after"] is None else Canary(**canaries["after"]),
        expert_bytes=facts["expert_bytes"],
    )
    rows = json.loads((folder / _PREDICTIONS).read_text())
    judged = {
        row["cell"]: Judged(cells[row["cell"]], run, row["predicted"], row["time_independent"])
        for row in rows
    }
    for row in _measurements(folder):
        each = judged[row["cell"]]
        each.measured.append(row["measured"])
        each.difference = each.difference or row["difference"]
    return list(judged.values())


def _measurements(folder: Path) -> list[Figures]:
    path = folder / _MEASUREMENTS
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A run that was killed while it wrote leaves a line without an end.
    return [json.loads(line) for line in lines if line.endswith("\n")]
