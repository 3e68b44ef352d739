"""Policies side by side on one trace: a table a budget and link, and what could not run and why.

A comparison is a sweep (:mod:`sim.sweeps`); this module chooses its points and reads its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

import policies
from configs.errors import UserError
from sim.inputs import Inputs, TraceSource
from sim.ranking import POLICY_LIMITED_FROM, TIE_MARGIN, rank_points
from sim.selection import RESIDENT, is_estimated, link_name, prepare
from sim.sweeps import PolicyChoice, SweepConfig
from sim.wording import as_gib, as_percent, three_figures

BOUND = PolicyChoice(name="oracle-prefetch", set={"cache": "belady", "depth": 2})
"""Perfect prefetching over a perfect cache: beside ``belady-bypass``, what gaps are measured by."""

BUDGETS = ("12.5%", "25%", "50%")

BEYOND = "beyond bound"
"""Faster than every bound swept: part of the work is done elsewhere (CPU), or skipped (lossy)."""

COLUMNS = (
    "policy",
    "TPOT ms",
    "kind",
    "hits %",
    "prec. %",
    "recall %",
    "late %",
    "changed %",
    "lost %",
    "MB/token",
    "stall ms",
    "TTFT ms",
    "gap %",
    "verdict",
)
_SHARES = ("hit_rate", "precision", "recall", "late_share", "changed_share", "lost_share")
LEGEND = (
    "hits, late: shares of the experts that decode asked for; late: the prefetch had not arrived",
    "changed: experts replaced, at low bits or left out; lost: gate weight that was not computed",
    "prec., recall: of predicted experts, whether or not they had to be copied",
    "MB/token: copied to the GPU; stall ms: wait for experts, a decode step",
    "gap %: time that the fastest bound would save; policy-limited: 10 % or more",
    f"{BEYOND}: faster than any bound here, which copies all it misses and skips nothing",
    "=: within 2 % of the first of its kind",
)


@dataclass(frozen=True)
class NotRunnable:
    """A policy none of whose points could run, and why, with what would mend it."""

    policy: str
    why: str

    def __str__(self) -> str:
        return f"{self.policy}: not runnable: {self.why}"


@dataclass(frozen=True)
class Table:
    """One budget on one system; ``rows`` as :func:`sim.ranking.rank` has them, and ``verdict``.

    ``resident``: the same system with all experts on the GPU, None where that was not swept.
    """

    system: str
    budget: str
    expert_budget_bytes: int
    link_bytes_per_s: int
    resident: dict[str, Any] | None
    rows: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        """System and budget."""
        return f"{self.system}, budget {self.budget} ({as_gib(self.expert_budget_bytes)})"


@dataclass(frozen=True)
class Comparison:
    """Tables by system, then budget; what could not run; and points that failed by themselves."""

    tables: tuple[Table, ...]
    not_runnable: tuple[NotRunnable, ...]
    failed: tuple[str, ...]
    estimated: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers as in the sweep's rows, None where there is none."""
        return {
            "tables": [_plain(vars(table)) for table in self.tables],
            "not_runnable": [vars(each) for each in self.not_runnable],
            "failed": list(self.failed),
            "timing": "estimated" if self.estimated else "calibrated",
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def everything() -> tuple[PolicyChoice, ...]:
    """Every registered policy at its defaults, and the bound that prefetches."""
    return (*(PolicyChoice(name=name) for name in policies.names()), BOUND)


def choices_of(text: str) -> tuple[PolicyChoice, ...]:
    """Policies from ``name,name:key=value:key=value``; resident and the bounds join them.

    Raises UserError for text of another form; names and parameters are checked by the sweep.
    """
    chosen = chosen_of(text)
    beside = (PolicyChoice(name=RESIDENT), PolicyChoice(name="belady-bypass"), BOUND)
    return (*chosen, *(each for each in beside if each not in chosen))


def chosen_of(text: str) -> tuple[PolicyChoice, ...]:
    """As :func:`choices_of`, of those that the text names alone."""
    return tuple(_choice(item.strip()) for item in text.split(","))


def _choice(item: str) -> PolicyChoice:
    name, *settings = item.split(":")
    pairs = [setting.partition("=") for setting in settings]
    if not name or not all(key and value for key, _, value in pairs):
        raise UserError(
            f"--policies {item!r} is not a policy: give names by commas, parameters by colons, "
            "such as lru,next-gate:depth=2:overfetch=1.5"
        )
    return PolicyChoice(name=name, set={key: value for key, _, value in pairs})


def leave_out(
    config: SweepConfig, trace: TraceSource
) -> tuple[SweepConfig, tuple[NotRunnable, ...]]:
    """The sweep without policies that would leave no request to judge anybody on, and those.

    Such are policies that learn, on a trace of one request, and learned columns whose predictor all
    requests trained. One policy more is taken, in order, as long as somebody is left to judge.
    """
    if _no_requests(config, trace) is None:
        return config, ()
    kept = [choice for choice in config.policies if not (choice.learns or choice.learned)]
    left: list[NotRunnable] = []
    for choice in config.policies:
        if choice in kept:
            continue
        tried = config.model_copy(update={"policies": (*kept, choice)})
        why = _no_requests(tried, trace)
        if why is None:
            kept.append(choice)
        else:
            left.append(NotRunnable(tried.points()[-1].label, why))
    chosen = tuple(choice for choice in config.policies if choice in kept)
    return config.model_copy(update={"policies": chosen}), tuple(left)


def _no_requests(config: SweepConfig, trace: TraceSource) -> str | None:
    """Why nobody can be judged; None: somebody can."""
    try:
        Inputs(
            trace,
            max_tokens=config.max_tokens,
            fit_share=config.judged_fit_share,
            learned=config.learned,
            batch=config.batch,
            context=config.context,
        )
    except UserError as error:
        return str(error)
    return None


def compare(frame: pd.DataFrame, left_out: Sequence[NotRunnable] = ()) -> Comparison:
    """Tables of a sweep's frame (all its columns); ``left_out`` of it from the start.

    A policy all of whose points failed is not runnable here, for the reason of the first; points
    that failed beside others of their policy, and faults of ours, are ``failed``. Raises UserError
    where nothing succeeded.
    """
    missing, failed = split_failures(frame)
    if not (frame["status"] == "ok").any():
        raise UserError(f"no policy could run; the first: {(*map(str, missing), *failed)[0]}")
    points = prepare(frame)
    tables = tuple(_tables(points))
    return Comparison(tables, (*left_out, *missing), failed, is_estimated(points))


def split_failures(frame: pd.DataFrame) -> tuple[tuple[NotRunnable, ...], tuple[str, ...]]:
    """Policies none of whose points ran, and why; points that failed beside others of theirs."""
    missing: list[NotRunnable] = []
    failed: list[str] = []
    for label, rows in frame.groupby("label", sort=False):
        bad = rows[rows["status"] != "ok"]
        if bad.empty:
            continue
        faults = bad["error"].str.startswith("internal error")
        if len(bad) == len(rows) and not faults.any():
            why = str(bad["error"].iloc[0])
            missing.append(NotRunnable(str(label), _without_name(why, str(bad["policy"].iloc[0]))))
            continue
        failed += [f"{label} at {_where(row)}: {row['error']}" for row in bad.to_dict("records")]
    return tuple(missing), tuple(failed)


def _without_name(text: str, policy: str) -> str:
    return text.removeprefix(policy).lstrip(": ")


def _where(row: dict[Any, Any]) -> str:
    parts = [row["point.expert_budget"] or row["point.budget"], row["point.hardware"]]
    return ", ".join(str(part) for part in (*parts, row["point.link"]) if isinstance(part, str))


def _tables(points: pd.DataFrame) -> Iterator[Table]:
    ranked = rank_points(points)
    for system, own in ranked.groupby("system", sort=False):
        is_resident = own["policy"] == RESIDENT
        resident = own[is_resident].to_dict("records")
        for _, group in own[~is_resident].groupby("expert_budget_bytes", sort=True):
            rows = [_with_verdict(row) for row in group.to_dict("records")]
            yield Table(
                system=str(system),
                budget=rows[0]["budget"],
                expert_budget_bytes=int(rows[0]["expert_budget_bytes"]),
                link_bytes_per_s=int(rows[0]["link_bytes_per_s"]),
                resident=_named(resident[0]) if resident else None,
                rows=tuple(rows),
            )


def _named(row: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def _with_verdict(row: dict[Any, Any]) -> dict[str, Any]:
    return {**_named(row), "verdict": verdict_of(row["kind"], row["gap_to_bound"], row["fits"])}


def verdict_of(kind: str, gap_to_bound: float, fits: bool) -> str:
    """What holds a policy back: its own choices, or the memory and the link.

    ``policy-limited``: the fastest bound would save at least 10 % of the time;
    ``capacity-limited``: less; ``beyond bound``: no bound is as fast; ``unknown``: none was swept;
    ``does not fit`` the GPU; empty for the bounds.
    """
    if kind == "bound":
        return ""
    if not fits:
        return "does not fit"
    if not math.isfinite(gap_to_bound):
        return "unknown"
    if gap_to_bound < -TIE_MARGIN:
        return BEYOND
    return "policy-limited" if gap_to_bound >= POLICY_LIMITED_FROM else "capacity-limited"


# ---------------------------------------------------------------------- as text


def cells(row: dict[str, Any]) -> list[str]:
    """One row of a table as text, in the order of :data:`COLUMNS`."""
    tie = "=" if row["tie"] and row["place"] > 1 and row["kind"] == "causal" else ""
    return [
        str(row["policy"]),
        f"{tie}{three_figures(row['tpot_ms'])}",
        str(row["kind"]),
        *(as_percent(row[name]) for name in _SHARES),
        *(three_figures(row[name]) for name in ("mb_per_token", "stall_ms", "ttft_ms")),
        "-" if row["kind"] == "bound" else as_percent(row["gap_to_bound"]),
        str(row["verdict"]),
    ]


def resident_words(table: Table) -> str:
    """What the system would do with every expert on the GPU."""
    row = table.resident
    if row is None:
        return ""
    fits = "" if row["fits"] else ", which this GPU does not have"
    time = f"TPOT {three_figures(row['tpot_ms'])} ms"
    if math.isfinite(row["ttft_ms"]):
        time += f", TTFT {three_figures(row['ttft_ms'])} ms"
    return f"all resident: {time} in {as_gib(row['gpu_memory_bytes'])}{fits}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text: the first and last columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    last = len(head) - 1
    return [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def render(comparison: Comparison) -> str:
    """All tables as plain text, then what could not run."""
    parts = [_render_table(table) for table in comparison.tables]
    parts.append("\n".join(LEGEND))
    if comparison.not_runnable:
        parts.append("\n".join(map(str, comparison.not_runnable)))
    if comparison.estimated:
        parts.append("Time is estimated, not validated.")
    return "\n\n".join(parts)


def _render_table(table: Table) -> str:
    lines = [table.title, *aligned(COLUMNS, [cells(row) for row in table.rows])]
    return "\n".join(filter(None, [*lines, resident_words(table)]))


def config_of(trace: str, **fields: Any) -> SweepConfig:
    """The sweep of a comparison: empty ``policies`` are all, empty budgets :data:`BUDGETS`."""
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if "budgets" not in given and "expert_budgets" not in given:
        given["expert_budgets"] = BUDGETS
    return SweepConfig(trace=trace, **{"policies": everything(), **given})


def link_words(link_bytes_per_s: float) -> str:
    """A link for people, with the PCIe generation whose x16 reaches about that."""
    generations = {12e9: "PCIe 3", 24e9: "PCIe 4", 50e9: "PCIe 5"}
    name = generations.get(link_bytes_per_s)
    return f"{link_name(link_bytes_per_s)} ({name} x16)" if name else link_name(link_bytes_per_s)
