"""The ranking as tables on a terminal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sim.ranking import TIE_MARGIN, Winner, find_winners, rank_points
from sim.selection import (
    Row,
    choices,
    holds_all,
    is_estimated,
    middle,
    middle_budget,
    prepare,
    systems,
)
from sim.wording import as_gib, as_percent, gib_figure, listed, spread_over, three_figures

_WIDTH = 100
_MOST_ROWS = 16
_MOST_BUDGETS = 12
_MOST_BOUNDS = 3
_TEXT_COLUMNS = ("policy", "fastest", "runner-up")
_LEAST_TEXT = 9
_RANK_COLUMNS = (
    "policy",
    "TPOT ms",
    "",
    "speed-up",
    "gap %",
    "hits %",
    "late %",
    "stall ms",
    "MB/token",
    "TTFT ms",
)
_FEW_COLUMNS = 7  # of them, where the terminal is narrow


def render_ranking(console: Console, frame: pd.DataFrame) -> None:
    """Print who wins at which budget, a table a system, and one full ranking.

    The full ranking is that of the middle system at its middle budget. Tables are at most 100
    columns wide and 12 rows long; what is left out is counted below. Where the console is no
    terminal, there are no lines and no colours.
    """
    points = prepare(frame)
    ranked = rank_points(points)
    for name in systems(points):
        own = ranked[ranked["system"] == name]
        if own["expert_budget_bytes"].nunique() > 1:
            runs = winner_runs(points[points["system"] == name])
            table = _winner_table(console, own, runs)
            _print(console, f"{name}: fastest policy by budget", table)
    chosen = middle(systems(points))
    own = ranked[ranked["system"] == chosen]
    budget = middle_budget(points[points["system"] == chosen])
    group = own[own["expert_budget_bytes"] == budget]
    _print(console, _full_title(group.iloc[0]), _full_table(console, group))
    for line in _legend(group):
        _say(console, line)
    if is_estimated(points):
        _say(console, "Time is estimated, not validated.")


def winner_runs(points: pd.DataFrame) -> tuple[Winner, ...]:
    """Who wins from which budget to which, where policies compete, of one system."""
    options = choices(points)
    return find_winners(options[~holds_all(options)])


def _legend(group: pd.DataFrame) -> list[str]:
    bound = group["bound"].iloc[0]
    limit = "the fastest bound" if bound is None else f"the fastest bound ({bound})"
    return [
        "fastest: of policies within 2 % of each other, the one that lasts over the most budgets",
        "bound ms: an oracle that knows the future, the fastest in the same memory; no choice",
        f"gap %: time that {limit} would save",
        "late %: accesses whose prefetch had not arrived; stall ms: wait for experts, a step",
        "=: a tie, within 2 % of the first",
        *_losses(group),
    ]


def _losses(group: pd.DataFrame) -> list[str]:
    """What each lossy policy does not compute as the gate asked."""
    return [
        f"{row['policy']} is lossy: {as_percent(row['changed_share'])} % of the experts changed, "
        f"{as_percent(row['lost_share'])} % of the gate weight lost"
        for row in group[group["kind"] == "lossy"].to_dict("records")
    ]


def _table(console: Console, columns: Sequence[str], gap: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        collapse_padding=True,
        caption_justify="left",
    )
    for column in columns:
        if column in _TEXT_COLUMNS:
            table.add_column(column, min_width=_LEAST_TEXT, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _width(console: Console) -> int:
    """A pipe has no width of its own: there the tables get their full one."""
    return min(console.width, _WIDTH) if console.is_terminal else _WIDTH


def _print(console: Console, title: str, table: Table) -> None:
    _say(console, title, style="bold")
    if console.is_terminal:
        console.print(table, width=_width(console))
        return
    options = console.options.update(width=_WIDTH)
    lines = console.render_lines(table, options, pad=False)
    for line in lines:
        _say(console, "".join(segment.text for segment in line).rstrip())
    _say(console, "")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _winner_table(console: Console, ranked: pd.DataFrame, runs: Sequence[Winner]) -> Table:
    columns = ("budget", "GPU GiB", "fastest", "TPOT ms", "", "runner-up", "TPOT ms", "bound ms")
    table = _table(console, columns, gap=2)
    budgets = sorted(ranked["expert_budget_bytes"].unique())
    picked = spread_over(budgets, _MOST_BUDGETS)
    for budget in picked:
        table.add_row(*winner_row(ranked[ranked["expert_budget_bytes"] == budget], runs))
    if len(picked) < len(budgets):
        table.caption = f"{len(picked)} of {len(budgets)} budgets"
    return table


def winner_row(group: pd.DataFrame, runs: Sequence[Winner]) -> list[str]:
    """Budget, GPU GiB, fastest, its TPOT ms, ``=`` or ``<``, runner-up, its TPOT ms, bound ms.

    ``group``: one system's ranking at one budget; ``runs``: see :func:`winner_runs`.
    """
    causal = group[group["kind"] == "causal"]
    fitting = causal[causal["fits"] & ~causal["saturated"]]
    share = str(group["budget"].iloc[0])
    bound_ms = group.loc[group["kind"] == "bound", "tpot_ms"].min()
    if fitting.empty:
        memory = gib_figure(group["gpu_memory_bytes"].max())
        why = "does not fit" if len(causal) else "none swept"
        return [share, memory, why, "-", "", "-", "-", "-"]
    fastest = fitting.iloc[0]
    budget = fastest["expert_budget_bytes"]
    run = [w for w in runs if w.from_expert_bytes <= budget <= w.to_expert_bytes]
    if not run:
        memory = gib_figure(fastest["gpu_memory_bytes"])
        figure = three_figures(fastest["tpot_ms"])
        return [share, memory, "all resident", figure, "", "-", "-", three_figures(bound_ms)]
    first = fitting[fitting["policy"] == run[0].policy].iloc[0]
    memory = gib_figure(first["gpu_memory_bytes"])
    row = [share, memory, first["policy"], three_figures(first["tpot_ms"])]
    rest = fitting[fitting["policy"] != first["policy"]]
    if rest.empty:
        return [*row, "", "-", "-", three_figures(bound_ms)]
    second = rest.iloc[0]
    sign = "=" if second["tpot_ms"] <= fastest["tpot_ms"] * (1 + TIE_MARGIN) else "<"
    return [*row, sign, second["policy"], three_figures(second["tpot_ms"]), three_figures(bound_ms)]


def _full_title(row: Row) -> str:
    return (
        f"{row['system']}, budget {row['budget']}: {as_gib(row['expert_budget_bytes'])} of experts "
        f"(speed-up over {row['faster_than']})"
    )


def _full_table(console: Console, group: pd.DataFrame) -> Table:
    columns = _RANK_COLUMNS if _width(console) == _WIDTH else _RANK_COLUMNS[:_FEW_COLUMNS]
    table = _table(console, columns, gap=1)
    shown = _shown(group)
    for row in shown.to_dict("records"):
        cells = _full_row(row)[: len(columns)]
        table.add_row(*cells, style="dim" if row["kind"] != "causal" else None)
    left = [label for label in group["policy"] if label not in set(shown["policy"])]
    notes = [f"{len(shown)} of {len(group)} policies, without {listed(left)}"] if left else []
    if not group["fits"].all():
        notes.append(f"{int((~group['fits']).sum())} do not fit the GPU")
    table.caption = "; ".join(notes) or None
    return table


def _shown(group: pd.DataFrame) -> pd.DataFrame:
    """The fastest of each kind; the slowest causal one, mostly the baseline, stays in sight."""
    if len(group) <= _MOST_ROWS:
        return group
    bounds = group[group["kind"] == "bound"].head(_MOST_BOUNDS)
    rest = group[group["kind"] != "bound"]
    room = _MOST_ROWS - len(bounds)
    if len(rest) <= room:
        return pd.concat([rest, bounds])
    last = rest[rest["kind"] == "causal"].tail(1)
    return pd.concat([rest.drop(last.index).head(room - len(last)), last, bounds])


def _full_row(row: dict[Hashable, Any]) -> list[str]:
    sign = "=" if row["tie"] and row["place"] > 1 else ""
    return [
        escape(row["policy"]),
        three_figures(row["tpot_ms"]),
        sign if row["kind"] == "causal" else row["kind"],
        f"{row['times_faster']:.2f}",
        "-" if row["kind"] == "bound" else as_percent(row["gap_to_bound"]),
        as_percent(row["hit_rate"]),
        as_percent(row["late_share"]),
        three_figures(row["stall_ms"]),
        three_figures(row["mb_per_token"]),
        three_figures(row["ttft_ms"]),
    ]
