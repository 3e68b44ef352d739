"""From repeated timings to a value and its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

_PAUSE = 5
SPREAD = "half the 10-90 percentile range"

Unit = Literal["ns", "bytes", "bytes/s", "flop/s", "fraction"]


@dataclass(frozen=True)
class Value:
    """The median of `repeats` measurements and half their 10-90 percentile range."""

    value: float
    spread: float
    repeats: int


@dataclass(frozen=True)
class Reading:
    """One measured value: a field of the hardware profile, or a value beside it.

    `name` is the field's (`predictor_ns.learned` for a nested one); `how` says what was done.
    """

    name: str
    value: Value
    unit: Unit
    how: str


def summary(samples: Sequence[float]) -> Value:
    """Median and spread of samples. Raises ValueError where there are none."""
    if not len(samples):
        raise ValueError("no samples")
    low, middle, high = np.percentile(np.asarray(samples, dtype=float), [10, 50, 90])
    return Value(float(middle), float(high - low) / 2, len(samples))


def median_ns(times_ns: npt.ArrayLike) -> int:
    """The median of times, in whole ns."""
    return round(float(np.median(np.asarray(times_ns))))


def steady_mean_ns(times_ns: npt.ArrayLike) -> int | None:
    """The mean, without those more than five times the median; None where there are no times.

    Of few, one that was long for another's reasons would count for too much.
    """
    times = np.asarray(times_ns, dtype=float)
    if not len(times):
        return None
    return round(float(times[times <= _PAUSE * np.median(times)].mean()))


def rate(amount: float, times_ns: Sequence[float]) -> Value:
    """Amount a second, of each time in ns."""
    return summary([amount * 1e9 / time for time in times_ns])


def excess(alone: Sequence[float], beside: Sequence[float]) -> Value:
    """How much longer `beside` takes than the median of `alone`, as a fraction; never below 0."""
    middle = float(np.median(np.asarray(alone, dtype=float)))
    value = summary([time / middle - 1 for time in beside])
    return Value(max(0.0, value.value), value.spread, value.repeats)
