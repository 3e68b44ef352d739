"""Tables of docs/policies.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sim.wording import three_figures


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are text already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(value: float) -> str:
    """Milliseconds without their unit."""
    return three_figures(float(value))


def times(slow: float, fast: float) -> str:
    """How many times faster: ``1.31x``."""
    return f"{slow / fast:.2f}x"


def change(new: float, old: float) -> str:
    """Relative change in percent with its sign: ``-22 %``."""
    percent = round(100 * (new / old - 1))
    return f"{percent:+d} %" if percent else "0 %"


def spaced(budget: str) -> str:
    """A budget for people: ``12.5 %``."""
    return budget.replace("%", " %")


def geometric_mean(values: Any) -> float:
    return float(np.exp(np.log(np.asarray(values, float)).mean()))


def by_budget(points: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Budgets below all experts, by name, ascending."""
    contested = points[points["expert_share"] < 1]
    for _, group in contested.groupby("expert_budget_bytes"):
        yield str(group["budget"].iloc[0]), group


def uses_cpu(points: pd.DataFrame) -> pd.Series[bool]:
    """Which points computed experts on the CPU."""
    return (points["decode.cpu"].fillna(0) + points["prefill.cpu"].fillna(0)) > 0


def value(frame: pd.DataFrame, column: str, label: str, budget: str, hardware: str) -> float:
    """One figure of a sweep's frame."""
    own = frame[
        (frame["label"] == label)
        & (frame["point.expert_budget"] == budget)
        & (frame["hardware"] == hardware)
        & (frame["status"] == "ok")
    ]
    if len(own) != 1:
        raise ValueError(f"{len(own)} points of {label} at {budget} on {hardware}")
    return float(own[column].iloc[0])
