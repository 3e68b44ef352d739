"""What the simulator does not know of another engine, fitted from a few speeds measured with it.

A token of one request takes

    time = base + waiting layers x wait + misses x miss

``misses`` a token are accesses x (1 - hit rate). A layer waits if one of its top-k experts is not
there; with independent misses that is layers x (1 - hit rate ** top-k). ``base`` is what a token
takes without any miss, ``miss`` what each missed expert adds (its copy and a fixed cost: speeds
alone cannot tell these apart), ``wait`` what a layer adds that missed anything, however much.

Two speeds determine two of the three. The line without ``wait`` is the prediction, and its
interval covers every curve with ``wait`` that explains the speeds as well: all of (base, wait,
miss), none negative, whose weighted squares are within the noise (a profile likelihood). From three
speeds up ``wait`` is fitted where the line does not explain them; what is left beyond the noise
widens the interval (Student's t), and so do errors of each speed as the others predict it, as far
as noise does not explain them and measured speeds with more and with fewer hits allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError
from sim.profile import NORMAL_95, Problem, Solution, Vector, student_95

BASE, WAIT, MISS = range(3)
LINE = "base + misses x miss"
CURVE = "base + waiting layers x wait + misses x miss"


@dataclass(frozen=True)
class Demand:
    """Experts that a token asks for: ``accesses``, and over how many ``layers`` if known."""

    accesses: int
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.accesses <= 0 or (self.layers is not None and self.layers <= 0):
            raise UserError(f"accesses {self.accesses}: give layers x top-k above zero, as in 48x8")
        if self.layers is not None and self.accesses % self.layers:
            raise UserError(f"{self.accesses} accesses are no multiple of {self.layers} layers")

    def misses(self, hit_rate: float) -> float:
        """Missed experts a token."""
        return self.accesses * (1 - hit_rate)

    def waiting_layers(self, hit_rate: float) -> float:
        """Layers a token with a miss, taken as independent; 0 where the layers are not known."""
        if self.layers is None:
            return 0.0
        top_k = self.accesses // self.layers
        return float(self.layers * (1 - hit_rate**top_k))

    def row(self, hit_rate: float) -> Vector:
        """Factors of base, wait and miss."""
        return np.array([1.0, self.waiting_layers(hit_rate), self.misses(hit_rate)])


@dataclass(frozen=True)
class Speed:
    """A measured speed: ``tokens_per_s`` of one request at a decode hit rate from 0 to 1."""

    hit_rate: float
    tokens_per_s: float

    @property
    def ms(self) -> float:
        """Time a token."""
        return 1e3 / self.tokens_per_s


@dataclass(frozen=True)
class Range:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, other: float) -> bool:
        return self.low <= other <= self.high


@dataclass(frozen=True)
class LeftOut:
    """A measured speed, and its time a token as the other speeds predict it, ms.

    ``noise``: deviation of :attr:`gap`, if the line were true.
    """

    speed: Speed
    predicted_ms: Range
    noise: float

    @property
    def error(self) -> float:
        """Predicted over measured speed, less 1."""
        return self.speed.ms / self.predicted_ms.value - 1

    @property
    def gap(self) -> float:
        """Logarithm of predicted over measured time: as much for half as for twice."""
        return math.log(self.predicted_ms.value / self.speed.ms)


@dataclass(frozen=True)
class Fit:
    """Speeds explained; times are ms.

    ``form``: :data:`LINE` or :data:`CURVE`; ``parameters``: base, wait, miss. ``unexplained``:
    deviation of left-out speeds beyond noise, of the logarithm. ``misfits``: why the engine does
    not fit, a line each; ``notes``: what these speeds cannot show.
    """

    demand: Demand
    speeds: tuple[Speed, ...]
    resident_ms: float | None
    form: str
    parameters: Vector
    problem: Problem
    radius: float
    line: _Line
    misfits: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    unexplained: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against the form."""
        return not self.misfits

    @property
    def base_ms(self) -> Range:
        """A token without a miss."""
        return self._parameter(BASE)

    @property
    def wait_ms(self) -> Range:
        """What a layer that misses anything adds, beside its misses."""
        return self._parameter(WAIT)

    @property
    def miss_ms(self) -> Range:
        """What each missed expert adds."""
        return self._parameter(MISS)

    def curve_ms(self, hit_rate: float) -> float:
        """Time of a token, not below the resident's; not above zero where it is not known."""
        return max(float(self.demand.row(hit_rate) @ self.parameters), self.resident_ms or 0.0)

    def predict_ms(self, hit_rate: float) -> Range:
        """Time of a token, with the interval in which a measured one lies.

        Raises UserError where the fitted curve is not above zero.
        """
        value = self.curve_ms(hit_rate)
        if value <= 0:
            raise UserError(
                f"at {hit_rate:.1%} hits the fitted curve is not above zero: these speeds do not "
                "determine it there; measure one nearer"
            )
        low, high = self.problem.extremes(self.demand.row(hit_rate), self.radius)
        noise = self.problem.noise
        deviation = math.hypot(noise, self.unexplained)
        widest = _spread(value, min(low, value), max(high, value), deviation)
        narrowest = _spread(value, value, value, noise)
        between = self._between_measured(hit_rate)
        floor = (self.resident_ms or 0.0) * (1 - NORMAL_95 * noise)
        return Range(
            value,
            max(min(narrowest.low, max(widest.low, between.low)), floor),
            max(narrowest.high, min(widest.high, between.high)),
        )

    def _between_measured(self, hit_rate: float) -> Range:
        """More misses take no less time: the measured times on either side, with their noise."""
        margin = math.exp(NORMAL_95 * math.sqrt(2) * self.problem.noise)
        fewer = [each.ms for each in self.speeds if each.hit_rate >= hit_rate]
        more = [each.ms for each in self.speeds if each.hit_rate <= hit_rate]
        return Range(
            self.curve_ms(hit_rate),
            max(fewer, default=0.0) / margin,
            min(more, default=math.inf) * margin,
        )

    def _parameter(self, which: int) -> Range:
        value = float(self.parameters[which])
        low, high = self.problem.extremes(np.eye(3)[which], self.radius)
        return Range(value, min(low, value), max(high, value))


def _spread(value: float, low: float, high: float, deviation: float) -> Range:
    """An interval with an independent relative deviation added, on a logarithmic scale."""
    scatter = NORMAL_95 * deviation
    most = value * math.exp(math.hypot(math.log(high / value), scatter))
    if low <= 0:
        return Range(value, 0.0, most)
    return Range(value, value * math.exp(-math.hypot(math.log(value / low), scatter)), most)


def fit_engine(
    speeds: Sequence[Speed],
    demand: Demand,
    *,
    noise: float = 0.03,
    resident_tokens_per_s: float | None = None,
) -> Fit:
    """The engine's times from two measured speeds or more.

    ``noise``: standard deviation of a measured speed, relative. ``resident_tokens_per_s``: of the
    engine with all experts on the GPU, which many run in another way than an offloaded model: no
    prediction is faster, and ``base`` is compared with it, but it is not fitted. (A speed of the
    offloading engine at 100 % hits is one of ``speeds``.) Raises UserError for what cannot be
    fitted.
    """
    _check(speeds, noise, resident_tokens_per_s)
    resident_ms = None if resident_tokens_per_s is None else 1e3 / resident_tokens_per_s
    fit = _fitted(tuple(speeds), demand, noise, resident_ms)
    left_out = _leave_each_out(fit)
    beyond = [max(0.0, each.gap**2 - each.noise**2) for each in left_out]
    unexplained = math.sqrt(sum(beyond) / len(beyond)) if beyond else 0.0
    notes = fit.notes
    if unexplained > noise:
        note = "the speeds do not predict each other within the noise: intervals are widened by it"
        notes = (*notes, note)
    return replace(fit, left_out=left_out, unexplained=unexplained, notes=notes)


def _check(speeds: Sequence[Speed], noise: float, resident: float | None) -> None:
    for speed in speeds:
        if not 0 <= speed.hit_rate <= 1:
            raise UserError(f"hit rate {speed.hit_rate:.6g} is not between 0 and 1 (100%)")
        if not (math.isfinite(speed.tokens_per_s) and speed.tokens_per_s > 0):
            raise UserError(f"{speed.tokens_per_s:g} tokens/s: give a speed above zero")
    if not (math.isfinite(noise) and 0 < noise <= 0.5):
        raise UserError(f"noise {noise:.4g}: give the spread of a measured speed, above 0 to 50%")
    if resident is not None and not (math.isfinite(resident) and resident > 0):
        raise UserError(f"resident speed {resident:g} tokens/s: give one above zero")
    if len({speed.hit_rate for speed in speeds}) < 2:
        have = "none is given"
        if speeds:
            have = f"{len(speeds)} given, at {speeds[0].hit_rate:.1%}"
        raise UserError(
            "base and time a miss need measured speeds at two different hit rates or more (a small "
            f"and a large cache): {have}"
        )


def _fitted(
    speeds: tuple[Speed, ...], demand: Demand, noise: float, resident_ms: float | None
) -> Fit:
    rows = np.array([demand.row(speed.hit_rate) for speed in speeds])
    times = np.array([speed.ms for speed in speeds])
    line = _Line(rows, times, noise)
    used = (BASE, MISS) if demand.layers is None else (BASE, WAIT, MISS)
    least = np.array([_least_base(line.base, noise, resident_ms), 0.0, 0.0])
    problem = Problem(rows, times, noise, least, used)
    best = problem.best()
    takes_line = best.is_beyond_noise or not line.solution.is_beyond_noise
    return Fit(
        demand=demand,
        speeds=speeds,
        resident_ms=resident_ms,
        form=LINE if takes_line else CURVE,
        parameters=line.solution.parameters if takes_line else best.parameters,
        problem=problem,
        radius=_radius(best),
        line=line,
        misfits=tuple(_misfits(line, best, speeds, problem, resident_ms)),
        notes=tuple(_notes(takes_line, best, speeds, demand)),
    )


def _least_base(base: float, noise: float, resident_ms: float | None) -> float:
    """A base below the resident's time is the mark of copies hidden behind computing."""
    floor = 0.0 if resident_ms is None else resident_ms * (1 - NORMAL_95 * noise)
    return floor if base >= floor else 0.0


def _radius(best: Solution) -> float:
    if not best.is_beyond_noise:
        return best.squares + NORMAL_95**2
    variance = best.squares / best.freedom
    return best.squares + float(student_95(best.freedom) ** 2 * variance)


def _leave_each_out(fit: Fit) -> tuple[LeftOut, ...]:
    """Each speed from the others, where these determine it."""
    result = []
    for index, speed in enumerate(fit.speeds):
        others = fit.speeds[:index] + fit.speeds[index + 1 :]
        if len({other.hit_rate for other in others}) < 2:
            continue
        smaller = _fitted(others, fit.demand, fit.problem.noise, fit.resident_ms)
        if smaller.curve_ms(speed.hit_rate) <= 0:
            continue
        predicted = smaller.predict_ms(speed.hit_rate)
        deviation = smaller.line.deviation(fit.demand.misses(speed.hit_rate)) / predicted.value
        noise = math.hypot(deviation, fit.problem.noise)
        result.append(LeftOut(speed, predicted, noise))
    return tuple(result)


# ---------------------------------------------------------------------- why it does not fit


class _Line:
    """Weighted least squares of base and miss alone, of any sign."""

    def __init__(self, rows: Vector, times: Vector, noise: float) -> None:
        weights = 1 / (noise * times)
        factors = rows[:, [BASE, MISS]] * weights[:, None]
        inverse = np.linalg.inv(factors.T @ factors)
        found = inverse @ factors.T @ (times * weights)
        residual = factors @ found - times * weights
        self.base, self.miss = float(found[0]), float(found[1])
        self._covariance = inverse
        self.solution = Solution(
            np.array([self.base, 0.0, self.miss]), float(residual @ residual), len(times) - 2
        )

    def deviation(self, misses: float) -> float:
        """Of the line at so many misses, ms, from the noise of the speeds."""
        row = np.array([1.0, misses])
        return math.sqrt(float(row @ self._covariance @ row))


def _misfits(
    line: _Line,
    best: Solution,
    speeds: Sequence[Speed],
    problem: Problem,
    resident_ms: float | None,
) -> list[str]:
    if line.miss < 0:
        return [
            f"a miss would take {line.miss:.3g} ms: the engine is faster with more misses; are the "
            "hit rates those of these runs?"
        ]
    if line.base < -NORMAL_95 * line.deviation(0.0):
        return [
            f"a token without a miss would take {line.base:.3g} ms: each miss costs more the more "
            "there are, which no constant time a miss explains"
        ]
    lines = []
    if best.is_beyond_noise:
        gaps = problem.rows @ best.parameters / problem.values - 1
        worst = int(abs(gaps).argmax())
        lines.append(
            f"the best curve is off by {gaps[worst]:+.1%} in time at "
            f"{speeds[worst].hit_rate:.1%} hits, beyond the noise of {problem.noise:.1%}"
        )
    if resident_ms is not None:
        lines += _against_resident(line, problem.noise, resident_ms)
    return lines


def _against_resident(line: _Line, noise: float, resident_ms: float) -> list[str]:
    tolerance = NORMAL_95 * math.hypot(line.deviation(0.0), noise * resident_ms)
    gap = line.base - resident_ms
    if abs(gap) <= tolerance:
        return []
    facts = f"base is {line.base:.3g} ms a token, all resident takes {resident_ms:.3g} ms"
    if gap < 0:
        return [f"{facts}: copies are hidden behind computing, and the curve ends there"]
    return [
        f"{facts}: offloading costs {gap:.3g} ms beside its misses (other kernels, no CUDA graph, "
        "a wait a layer), or the curve bends where hits are many"
    ]


def _notes(takes_line: bool, best: Solution, speeds: Sequence[Speed], demand: Demand) -> list[str]:
    lines = []
    if len(speeds) == 2:
        lines.append("two speeds determine the line: a third would show whether the engine fits it")
    elif not takes_line and best.freedom == 0:
        lines.append("as many speeds as parameters: one more would show whether the engine fits")
    if len(speeds) > 2 and max(speed.hit_rate for speed in speeds) == 1 and not takes_line:
        lines.append(
            "the speeds are off a line: if that at 100% hits is of a run without offloading, give "
            "it as the resident speed instead"
        )
    if not takes_line and best.parameters[BASE] == 0:
        lines.append("base is at its limit: these speeds do not tell a token's time without a miss")
    if demand.layers is None:
        lines.append(
            "layers are not known (accesses such as 48x8): intervals take the time of a token for "
            "a line in its misses"
        )
    return lines
