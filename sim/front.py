"""The latency-memory Pareto front of a sweep's points, and its knee."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.selection import Row, choices, prepare, systems


def front(points: pd.DataFrame) -> pd.DataFrame:
    """Non-dominated :func:`choices` among prepared ``points``, by memory ascending.

    Of points equal in both memory and TPOT, that with the smaller budget (then first label) stays.
    """
    axes = ["memory.peak_bytes", "tpot_ms.mean"]
    ordered = choices(points).sort_values([*axes, "expert_budget_bytes", "label"], kind="stable")
    fastest_before = ordered["tpot_ms.mean"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["tpot_ms.mean"] < fastest_before]


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """The Pareto front of one system: least GPU memory (peak bytes) and least TPOT (mean).

    Causal, lossless policies whose memory fits the GPU: the others are no choices. By memory
    ascending, so by TPOT descending; equal points appear once. Raises ValueError for several
    systems.
    """
    points = prepare(frame)
    found = systems(points)
    if len(found) > 1:
        raise ValueError(f"a front belongs to one system, not to {len(found)}: {'; '.join(found)}")
    return front(points).reset_index(drop=True)


def without_slivers(line: pd.DataFrame) -> pd.DataFrame:
    """A front less its points that take under 5 % less memory than the next, which is faster.

    Policies round their slots differently at one budget, which puts a tooth beside each winner.
    """
    memory = line["memory.peak_bytes"].to_numpy(np.float64)
    keep: npt.NDArray[np.bool_] = np.append(memory[:-1] <= 0.95 * memory[1:], True)
    return line[keep[: len(line)]]


def knee(line: pd.DataFrame) -> Row | None:
    """The point of a front farthest below the chord between its ends, both axes scaled to 0..1.

    None where the front has fewer than three points or none lies below its chord.
    """
    if len(line) < 3:
        return None
    x = _scaled(line["memory.peak_bytes"])
    y = _scaled(line["tpot_ms.mean"])
    below_chord = 1 - x - y
    best = int(below_chord.argmax())
    return line.iloc[best] if below_chord[best] > 1e-9 else None


def _scaled(values: pd.Series[Any]) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.to_numpy(np.float64)
    return np.asarray((array - array.min()) / np.ptp(array))
