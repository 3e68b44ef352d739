"""Weighted least squares with lower limits, and how far a prediction can go within the noise.

With at most three parameters every combination of limits that hold can be tried, so results are
exact, also where there are fewer measurements than parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

NORMAL_95 = 1.959964
_NORMAL_ONE_SIDED_95 = 1.644854
_SLACK = 1e-9  # relative, for rounding


@dataclass(frozen=True)
class Solution:
    """``parameters``; ``squares``: of weighted residuals; ``freedom``: measurements not used up."""

    parameters: Vector
    squares: float
    freedom: int

    @property
    def is_beyond_noise(self) -> bool:
        """Whether residuals are too large for the stated noise (chi-square, 5 %)."""
        return self.freedom > 0 and self.squares > chi_square_95(self.freedom)


@dataclass(frozen=True)
class Problem:
    """``rows`` [n, p] x parameters = ``values`` [n], each known to a relative deviation ``noise``.

    ``least`` [p]: lower limits; ``used``: parameters that vary, the others stay at their limit.
    """

    rows: Vector
    values: Vector
    noise: float
    least: Vector
    used: tuple[int, ...]

    def best(self) -> Solution:
        """The parameters of least squares within the limits. Fewest parameters off them, of equals.

        A parameter at its limit is not fitted: it uses up no measurement.
        """
        solutions = [self._solved(face) for face in self._faces() if self._is_inside(face)]
        least = min(solution.squares for solution in solutions)
        equals = [each for each in solutions if each.squares <= least + _SLACK * len(self.values)]
        return max(equals, key=lambda solution: solution.freedom)

    def extremes(self, row: Vector, radius: float) -> tuple[float, float]:
        """Least and most of ``row`` x parameters where the squares are at most ``radius``.

        ``radius``: at least the squares of :meth:`best`.
        """
        found = []
        for face in self._faces():
            found += [float(row @ end) for end in face.ends(row, radius) if self._is_above(end)]
        return min(found), max(found)

    def _faces(self) -> Iterator[_Face]:
        """All choices of parameters at their limits that the measurements determine."""
        weights = 1 / (self.noise * self.values)
        factors = self.rows * weights[:, None]
        for count in range(len(self.used) + 1):
            for free in itertools.combinations(self.used, count):
                face = _Face(factors, self.values * weights, self.least, free)
                if face.is_determined:
                    yield face

    def _solved(self, face: _Face) -> Solution:
        return Solution(face.centre, face.squares, len(self.values) - len(face.free))

    def _is_inside(self, face: _Face) -> bool:
        return self._is_above(face.centre)

    def _is_above(self, parameters: Vector) -> bool:
        return bool((parameters >= self.least - _SLACK * (1 + abs(parameters).max())).all())


class _Face:
    """Some parameters free, the rest at their limits: an ellipsoid about a centre."""

    def __init__(self, factors: Vector, aims: Vector, least: Vector, free: Sequence[int]) -> None:
        self.free = list(free)
        columns = factors[:, self.free]
        self.is_determined = np.linalg.matrix_rank(columns) == len(self.free)
        if not self.is_determined:
            return
        left = aims - factors @ np.where(np.isin(np.arange(len(least)), self.free), 0.0, least)
        self._inverse = np.linalg.inv(columns.T @ columns)
        self.centre = least.astype(np.float64)
        self.centre[self.free] = self._inverse @ columns.T @ left
        residual = factors @ self.centre - aims
        self.squares = float(residual @ residual)

    def ends(self, row: Vector, radius: float) -> list[Vector]:
        """The points of least and most ``row`` x parameters; the centre where all are equal."""
        room = radius * (1 + _SLACK) + _SLACK - self.squares
        if room < 0:
            return []
        direction = self._inverse @ row[self.free]
        steepness = float(row[self.free] @ direction)
        if steepness <= 0:
            return [self.centre]
        step = np.zeros_like(self.centre)
        step[self.free] = direction * math.sqrt(room / steepness)
        return [self.centre - step, self.centre + step]


def chi_square_95(freedom: int) -> float:
    """What a chi-square of so many degrees of freedom exceeds in 5 % (Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return freedom * float(1 - spread + _NORMAL_ONE_SIDED_95 * math.sqrt(spread)) ** 3


def student_95(freedom: int) -> float:
    """Half of Student's 95 % interval, from the exact distribution."""
    low, high = NORMAL_95, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < 0.95 else (low, middle)
    return high


def _student(t: float, freedom: int) -> float:
    """Probability within -t to t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
