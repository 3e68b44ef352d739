"""The smallest budget that meets a target, the fastest policy in a memory, and the bend between.

Budgets are whole slots a layer, the same for all layers: the resolution of every answer. Time need
not fall with every slot more, for any policy. So a coarse grid comes first; then, for each policy,
bisection below the first budget of the grid at which it meets the target; then every policy at the
two budgets below the smallest found, and the search goes on from there if one of them meets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

import policies
from sim.advising.points import Points
from sim.advising.question import ALL, Asked
from sim.ranking import by_tpot, tied_labels, winner_at_knee
from sim.selection import prepare
from sim.sweeps import PolicyChoice, to_frame

Choices = dict[str, PolicyChoice]

VERIFIED_BELOW = 2
"""Budgets below the smallest that meets the target at which every policy is simulated."""

_COARSE_STEPS = 8


@dataclass(frozen=True)
class Found:
    """A point that answers a question. Times are of the percentile asked for.

    ``slots``: a layer; None where the budget was the whole memory. ``ties``: other policies within
    2 % of it in the same budget. ``gpu_memory_bytes``: of the whole model. ``on_cpu``: the CPU
    computed some of its misses.
    """

    policy: str
    slots: int | None
    expert_bytes: int
    expert_share: float
    gpu_memory_bytes: int
    tpot_ms: float
    ttft_ms: float | None
    ties: tuple[str, ...]
    prefetches: bool
    lossless: bool
    holds_all: bool
    point_id: str
    on_cpu: bool = False


class System:
    """One machine and model; ``changes`` are what a what-if has in place of the question's."""

    def __init__(self, asked: Asked, points: Points, **changes: Any) -> None:
        self._asked = asked
        self._points = points
        self._changes = changes
        self.limit_bytes = asked.limit_bytes
        self.experts = asked.setting.geometry.num_experts
        step = max(1, self.experts // _COARSE_STEPS)
        self.grid = sorted({1, *range(step, self.experts, step)} - {self.experts})

    # ------------------------------------------------------------------ points

    def at_slots(self, choices: Iterable[PolicyChoice], *slots: int) -> pd.DataFrame:
        """Prepared points of these policies with so many slots a layer, those that could run.

        With as many slots as experts no policy is needed: that is ``resident``.
        """
        points = [
            self._asked.point(choice, **self._changes, expert_budget=f"{count}/layer")
            for count in slots
            for choice in ([ALL] if count >= self.experts else choices)
        ]
        return self._judged(self._points.rows(points))

    def in_memory(self, choices: Iterable[PolicyChoice], nbytes: int) -> pd.DataFrame:
        """Prepared points with so many bytes for the whole model; empty where none could run."""
        budget = f"{nbytes}B"
        points = [self._asked.point(each, **self._changes, budget=budget) for each in choices]
        return self._judged(self._points.rows(points))

    def _judged(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """Ready for :mod:`sim.ranking`: the percentile asked for, the memory that there is."""
        frame = to_frame(row for row in rows if row["status"] == "ok")
        if frame.empty:
            return frame
        percentile = self._asked.question.percentile
        frame = frame.assign(really_lossless=frame["lossless"])
        frame["lossless"] = True  # a lossy policy is here only if it was asked for
        frame["memory.fits"] = frame["memory.peak_bytes"] <= self.limit_bytes
        for name in ("tpot_ms", "ttft_ms"):
            frame[f"{name}.mean"] = frame[f"{name}.{percentile}"]
        return prepare(frame)

    # ------------------------------------------------------------------ answers

    def meets(self, points: pd.DataFrame) -> pd.DataFrame:
        """Those of the points that meet every target."""
        if points.empty:
            return points
        asked = self._asked.question
        good = pd.Series(True, index=points.index)
        for target, column in ((asked.tpot_ms, "tpot_ms.mean"), (asked.ttft_ms, "ttft_ms.mean")):
            if target is not None:
                good &= points[column] <= target
        return points[good]

    def smallest(self, choices: Choices, most: int | None = None) -> int | None:
        """The fewest slots a layer with which any policy meets the target; None: nobody does.

        ``most``: try no more than that, and take it that somebody does with so many.
        """
        most = most or self._enough(choices)
        if most is None:
            return None
        grid = [slots for slots in self.grid if slots < most]
        good = self.meets(self.at_slots(choices.values(), *grid))
        brackets = {label: _Bracket.of(self._first(good, label), grid, most) for label in choices}
        while True:
            best = min((bracket.high for bracket in brackets.values()), default=most)
            tried = {
                label: (bracket.low + min(bracket.high, best)) // 2
                for label, bracket in brackets.items()
                if bracket.low + 1 < min(bracket.high, best)
            }
            if not tried:
                return self._verified(choices, best)
            met = self._met(choices, tried)
            for label, slots in tried.items():
                brackets[label].note(slots, met[label])

    def _enough(self, choices: Choices) -> int | None:
        """Slots a layer with which the target is met: all, else the fewest of the grid.

        A lossy policy may be faster than all experts on the GPU, which then says nothing of it.
        """
        if not self.meets(self.at_slots([], self.experts)).empty:
            return self.experts
        lossy = [each for each in choices.values() if not policies.get(each.name).lossless]
        good = self.meets(self.at_slots(lossy, *self.grid)) if lossy else None
        return None if good is None or good.empty else min(map(_slots, good["point.expert_budget"]))

    def _met(self, choices: Choices, tried: dict[str, int]) -> dict[str, bool]:
        rows = self._points.rows(
            self._asked.point(choices[label], **self._changes, expert_budget=f"{slots}/layer")
            for label, slots in tried.items()
        )
        good = self.meets(self._judged(rows))
        labels = set() if good.empty else set(good["label"])
        return {label: label in labels for label in tried}

    def _first(self, good: pd.DataFrame, label: str) -> int | None:
        """The smallest budget of the grid at which a policy meets the target."""
        if good.empty:
            return None
        own = good.loc[good["label"] == label, "point.expert_budget"]
        return min(map(_slots, own), default=None)

    def _verified(self, choices: Choices, best: int) -> int:
        while True:
            below = [best - down for down in range(1, VERIFIED_BELOW + 1) if best > down]
            good = self.meets(self.at_slots(choices.values(), *below)) if below else None
            if good is None or good.empty:
                return best
            best = min(map(_slots, good["point.expert_budget"]))

    def best_at(self, choices: Choices, slots: int) -> Found | None:
        """The fastest that meets the target with so many slots a layer, else the fastest."""
        points = self.at_slots(choices.values(), slots)
        good = self.meets(points)
        chosen = points if good.empty else good
        return None if chosen.empty else self._found(chosen, slots)

    def fastest_at(self, choices: Choices, slots: int) -> Found | None:
        """The fastest with so many slots a layer; None where nothing can run."""
        return self._fastest(self.at_slots(choices.values(), slots), slots)

    def fastest_in(self, choices: Choices, nbytes: int) -> Found | None:
        """The fastest in so much memory; with room for all experts, that is all of them.

        A lossy policy may be faster with less, so that its points of the grid count too.
        """
        everything = self.everything()
        fits = everything.gpu_memory_bytes <= nbytes
        found = [everything if fits else self.best_in(choices, nbytes)]
        lossy = [each for each in choices.values() if not policies.get(each.name).lossless]
        for slots in self.grid if lossy else ():
            points = self.at_slots(lossy, slots)
            if not points.empty:
                there = points[points["memory.peak_bytes"] <= nbytes]
                found.append(self._fastest(there, slots))
        known = [each for each in found if each is not None]
        return min(known, key=lambda each: each.tpot_ms, default=None)

    def best_in(self, choices: Choices, nbytes: int) -> Found | None:
        """The fastest in so much memory, by policy; None where nothing can run."""
        return self._fastest(self.in_memory(choices.values(), nbytes), None)

    def meeting_at(self, choices: Choices, slots: int) -> Found | None:
        """The fastest of those that meet the target with so many slots a layer."""
        return self._fastest(self.meets(self.at_slots(choices.values(), slots)), slots)

    def meeting_in(self, choices: Choices, nbytes: int) -> Found | None:
        """The fastest of those that meet the target in so much memory."""
        return self._fastest(self.meets(self.in_memory(choices.values(), nbytes)), None)

    def everything(self) -> Found:
        """All experts on the GPU."""
        return self._found(self.at_slots([], self.experts), self.experts)

    def _fastest(self, points: pd.DataFrame, slots: int | None) -> Found | None:
        return None if points.empty else self._found(points, slots)

    def _found(self, points: pd.DataFrame, slots: int | None) -> Found:
        best = by_tpot(points).iloc[0]
        tied = tied_labels(points) - {best["label"]}
        ttft = float(best["ttft_ms.mean"])
        return Found(
            policy=str(best["label"]),
            slots=slots,
            expert_bytes=int(best["memory.slots_bytes"]),
            expert_share=float(best["memory.slots_bytes"] / best["memory.expert_bytes_total"]),
            gpu_memory_bytes=int(best["memory.peak_bytes"]),
            tpot_ms=float(best["tpot_ms.mean"]),
            ttft_ms=ttft if math.isfinite(ttft) else None,
            ties=tuple(label for label in by_tpot(points)["label"] if label in tied),
            prefetches=bool(best["prefetches"]),
            lossless=bool(best["really_lossless"]),
            holds_all=best["policy"] == ALL.name,
            point_id=str(best["point_id"]),
            on_cpu=any(best[f"{phase}.cpu"] > 0 for phase in ("decode", "prefill")),
        )

    def knee(self, choices: Choices) -> Found | None:
        """Best value for little memory, of the grid's budgets that fit; None without a bend."""
        points = self.at_slots(choices.values(), *self.grid, self.experts)
        best = winner_at_knee(points)
        if best is None:
            return None
        budget = best["point.expert_budget"]
        slots = _slots(budget) if isinstance(budget, str) else self.experts
        same = points[points["expert_budget_bytes"] == best["expert_budget_bytes"]]
        return self._found(same, slots)

    def contenders(self, choices: Choices) -> Choices:
        """Those within 2 % of the fastest at any budget of the grid."""
        points = self.at_slots(choices.values(), *self.grid)
        groups = (group for _, group in points.groupby("expert_budget_bytes"))
        labels: set[str] = set().union(*(tied_labels(group) for group in groups))
        return {label: choice for label, choice in choices.items() if label in labels}


@dataclass
class _Bracket:
    """Where a policy begins to meet the target: above ``low`` slots, at ``high`` at most."""

    low: int
    high: int

    @classmethod
    def of(cls, first: int | None, grid: list[int], most: int) -> _Bracket:
        """``first``: of the grid to meet it; None: as if it did at ``most``."""
        high = most if first is None else first
        return cls(max((slots for slots in grid if slots < high), default=0), high)

    def note(self, slots: int, met: bool) -> None:
        """One more budget is known."""
        if met:
            self.high = slots
        else:
            self.low = slots


def _slots(budget: str) -> int:
    return int(budget.split("/")[0])
