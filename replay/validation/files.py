"""A campaign's files: what was predicted and measured, kept as it comes, run by run.

`plan.json`, and for every run on a machine `run-N/` with `timings.yaml`, `predictions.json` (both
written before anything is measured), `measurements.jsonl` (a line a measurement, as it comes) and
`run.json` (the machine, the digest, the canaries).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.files import refuse_non_empty, write_atomically
from configs.load import validated
from configs.timings import ModelTimes, load_timings, render
from replay.validation.judged import Canary, Figures, Judged, Run, digest_of
from replay.validation.plan import Cell, ValidationPlan, cells_of

if TYPE_CHECKING:
    # Campaigns are read where torch is not installed.
    from replay.validation.run import Target

_PLAN, _TIMES, _PREDICTIONS = "plan.json", "timings.yaml", "predictions.json"
_MEASUREMENTS, _RUN = "measurements.jsonl", "run.json"
_DIGEST = "predictions_sha256"


def as_json(data: object) -> bytes:
    """Bytes of a file."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def is_campaign(out: Path) -> bool:
    """Whether a campaign was begun there."""
    return (out / _PLAN).is_file()


def open_campaign(out: Path, plan: ValidationPlan) -> None:
    """Begin in a new or empty directory, or go on in one of the same plan. Raises UserError.

    Budgets to calibrate at are not compared: each run's `timings.yaml` says at which it did.
    """
    known = out / _PLAN
    if known.is_file():
        data = _parsed(known, known.read_text(), "name another directory")
        if not plan.judges_as(validated(ValidationPlan, data, str(known))):
            raise UserError(
                f"{out}: holds another plan's results ({_PLAN} differs): name another directory"
            )
        return
    refuse_non_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(known, as_json(plan.model_dump(mode="json")))


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Nobody else measures in this campaign meanwhile: both would time each other's load.

    However a run ends, its claim ends with it. Raises UserError where another is at work.
    """
    import fcntl  # not on every system, and only a run on CUDA comes here

    with (out / _PLAN).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another `moesim validate` is at work here: wait until it has ended"
            ) from None
        yield


class RunFiles:
    """One run's directory, for writing."""

    def __init__(self, out: Path) -> None:
        number = max(map(_number, _runs(out)), default=0) + 1
        self.folder = out / f"run-{number}"
        self.folder.mkdir()
        self._facts: Figures = {}

    def predicted(
        self, times: ModelTimes, targets: Sequence[Target], sha256: str, facts: Figures
    ) -> None:
        """Before anything is measured."""
        self._facts = {**facts, _DIGEST: sha256}
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
    """Directories of other names, such as a copy that somebody keeps, are none."""
    found = (path for path in out.glob("run-*") if path.name.removeprefix("run-").isdecimal())
    return sorted(found, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("run-"))


def _parsed(path: Path, text: str, mend: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = "" if line is None else f", line {line}"
        raise UserError(f"{path}{where}: is damaged ({error.msg}): {mend}") from error


def _read_run(folder: Path, cells: dict[str, Cell]) -> list[Judged]:
    whole = f"restore it, or move {folder} away to measure its points again"
    facts = _parsed(folder / _RUN, (folder / _RUN).read_text(), whole)
    canaries = facts.pop("canaries")
    run = Run(
        number=_number(folder),
        facts=facts,
        times=load_timings(folder / _TIMES),
        before=Canary(**canaries["before"]),
        after=None if canaries["after"] is None else Canary(**canaries["after"]),
        expert_bytes=facts["expert_bytes"],
    )
    path = folder / _PREDICTIONS
    rows = _parsed(path, path.read_text(), whole)
    if digest_of([(row["cell"], row["predicted"]) for row in rows]) != run.facts[_DIGEST]:
        raise UserError(f"{path}: is not what {_RUN} has the SHA-256 of: {whole}")
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
    return [
        _parsed(path, line, "remove the line; its point is measured again", number)
        for number, line in enumerate(lines, 1)
        if line.endswith("\n")
    ]
