"""Tables of docs/policies.md, and how its figures are taken from the sweeps' rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sim.selection import RESIDENT
from sim.wording import three_figures

TIME, TTFT, HITS = "tpot_ms.mean", "ttft_ms.mean", "decode.hit_rate"


def by_token(frame: pd.DataFrame) -> pd.DataFrame:
    """``TIME`` as a mean over tokens: hit rates are over accesses, and requests differ in length.

    A sweep's own is the mean over requests; every ranking of the page is by this one.
    """
    return frame.assign(**{TIME: frame["itl_ms.mean"]})


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
    return signed(new / old)


def signed(ratio: float) -> str:
    """A ratio as a change in percent: ``-22 %``."""
    percent = round(100 * (ratio - 1))
    return f"{percent:+d} %" if percent else "0 %"


def between(values: Sequence[float], form: str = "{:.2f}x") -> str:
    """The least and the most of some figures: ``1.05x to 1.31x``."""
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"


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


def cpu_labels(points: pd.DataFrame) -> frozenset[str]:
    """Policies that compute experts on the CPU at any point, and so are meant to."""
    used = (points["decode.cpu"].fillna(0) + points["prefill.cpu"].fillna(0)) > 0
    return frozenset(points.loc[used, "label"])


def causal(points: pd.DataFrame, *, cpu: bool) -> pd.DataFrame:
    """Causal, lossless policies with a cache; ``cpu=False``: only those that never use the CPU."""
    own = points[(points["kind"] == "causal") & (points["policy"] != RESIDENT)]
    return own if cpu else own[~own["label"].isin(cpu_labels(points))]


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
