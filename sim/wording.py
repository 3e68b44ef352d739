"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_GIB = 2**30


def three_figures(value: float) -> str:
    """Three significant figures, never an exponent: ``49.1``, ``7.59``, ``1234``."""
    if not np.isfinite(value):
        return "-"
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def as_ms(value: float) -> str:
    """Milliseconds with their unit."""
    return f"{three_figures(value)} ms"


def gib_figure(nbytes: float) -> str:
    """Bytes in GiB, without the unit."""
    return f"{nbytes / _GIB:.1f}"


def as_gib(nbytes: float) -> str:
    """Bytes in GiB, with the unit."""
    return f"{gib_figure(nbytes)} GiB"


def as_percent(share: float) -> str:
    """A share in percent, - where there is none."""
    return f"{share * 100:.1f}" if np.isfinite(share) else "-"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a row, the last ones counted only."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def spread_over(values: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of ``values``, evenly spread, with the first and last."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]
