"""A decision core that notes what became of every copy; the same decisions."""

from __future__ import annotations

from typing import Any

from policies.core import DecisionCore
from policies.interface import Keys, Tally
from policies.memory import RESIDENT
from policies.transfers import Copy

DEMAND, IN_TIME, LATE, WASTED = "demand", "in time", "late", "wasted"
OUTCOMES = {
    DEMAND: "an event needed it, and nothing had been done for it",
    IN_TIME: "prefetched, and there when an event needed it",
    LATE: "prefetched, and still queued or under way when an event needed it",
    WASTED: "prefetched, and thrown out or left over before any event needed it",
}


class WatchedCore(DecisionCore):
    """Fills in ``outcome`` of prefetches: late, in time and wasted are those of the tally.

    One that an event needs, or that is thrown out, before it has a slot gets none here:
    :func:`outcome_of` knows.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # Of each expert that came or comes by prefetch and that no event has needed yet.
        self._carriers: dict[int, Copy] = {}
        super().__init__(*args, **options)

    def finish(self) -> Tally:
        """As the core's."""
        for key in [*self._carriers]:
            self._settle(key, WASTED)
        return super().finish()

    def _count_used(self, keys: Keys) -> None:
        for key in keys:
            self._settle(key, IN_TIME if self._state[key] == RESIDENT else LATE)
        super()._count_used(keys)

    def _take_slot(self, copy: Copy) -> bool:
        took = super()._take_slot(copy)
        if took and not copy.demand and not copy.awaited:
            self._settle(copy.key, WASTED)
            self._carriers[copy.key] = copy
        return took

    def _forget(self, key: int) -> None:
        self._settle(key, WASTED)
        super()._forget(key)

    def _settle(self, key: int, outcome: str) -> None:
        copy = self._carriers.pop(key, None)
        if copy is not None:
            copy.outcome = outcome


def outcome_of(copy: Copy) -> str:
    """What became of a copy, of OUTCOMES, once the run is over; empty where nobody watched."""
    if copy.demand:
        return DEMAND
    return LATE if copy.awaited and not copy.outcome else copy.outcome
