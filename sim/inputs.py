"""What a simulation reads: a trace's columns, turned into events once and shared by all points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from configs.errors import UserError
from policies.interface import EventTable
from tracer.manifest import Manifest
from tracer.workload import Ragged, Workload, first_use, next_use, popularity

BASE_COLUMNS = ("request", "step", "phase", "position", "experts")


class TraceSource(Protocol):
    """What :class:`tracer.trace.Trace` and its memory-mapped twin offer."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def rows(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def columns(self) -> list[str]: ...

    def requests(self) -> pd.DataFrame: ...

    def load(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> dict[str, npt.NDArray[Any]]: ...


def set_aside(requests: Sequence[int], share: float) -> list[int]:
    """The requests that fitted policies learn from: a ``share``, at least one, evenly spread.

    Evenly spread rather than the first ones, so that all domains of a trace that is ordered by
    domain are on both sides.
    """
    if share <= 0:
        return []
    count = max(1, int(len(requests) * share + 1e-9))
    return [requests[(2 * index + 1) * len(requests) // (2 * count)] for index in range(count)]


class Inputs:
    """The judged events of a trace and what policies may learn or foresee, computed on demand.

    ``max_tokens``: the first rows only. ``fit_share``: share of the requests set aside for fitted
    policies; the others are judged.
    """

    def __init__(
        self,
        trace: TraceSource,
        *,
        max_tokens: int | None = None,
        fit_share: float = 0.0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"--max-tokens {max_tokens}: give at least 1")
        if not 0 <= fit_share < 1:
            raise UserError(f"fit share {fit_share}: give a share from 0 to below 1")
        self.trace = trace
        self.fit_share = fit_share
        self.max_tokens = max_tokens
        self.manifest = trace.manifest
        self._columns = dict(trace.load(list(BASE_COLUMNS), 0, max_tokens))
        present = list(dict.fromkeys(self._columns["request"].tolist()))
        self.fitted_on = set_aside(present, fit_share)
        if fit_share > 0 and not 0 < len(self.fitted_on) < len(present):
            raise UserError(
                f"{len(present)} request(s) cannot be split into a fitted and a judged part with a "
                f"share of {fit_share:g}: use a longer trace, a larger --max-tokens, or policies "
                "that need no fitting"
            )
        fitted = set(self.fitted_on)
        self.judged = [request for request in present if request not in fitted]
        self._workloads: dict[str, Workload] = {}
        self._futures: dict[str, tuple[Any, Any]] = {}
        self._lookahead: dict[tuple[str, int, str], Ragged] = {}
        self._popularity: Any = None

    @property
    def num_experts(self) -> int:
        """E of the trace."""
        return self.manifest.geometry.num_experts

    def workload(self, touch_order: str = "last-use") -> Workload:
        """The judged requests' steps and events."""
        known = self._workloads.get(touch_order)
        if known is None:
            known = Workload(
                self._columns,
                self.num_experts,
                requests=self.judged if self.fitted_on else None,
                touch_order=touch_order,
            )
            self._workloads[touch_order] = known
        return known

    def future(self, touch_order: str) -> tuple[Any, Any]:
        """Next use of every entry, first use of every key: for declared oracles."""
        known = self._futures.get(touch_order)
        if known is None:
            work = self.workload(touch_order)
            size = work.num_layers * work.num_experts
            known = (next_use(work.events), first_use(work.events, size))
            self._futures[touch_order] = known
        return known

    def popularity(self) -> Any:
        """Events that needed each expert, int [L, E], on the requests set aside; None: none are."""
        if not self.fitted_on:
            return None
        if self._popularity is None:
            fit = Workload(self._columns, self.num_experts, requests=self.fitted_on)
            self._popularity = popularity(fit)
        return self._popularity

    def lookahead(self, name: str, width: int, touch_order: str) -> EventTable:
        """Recorded predictions of the judged requests."""
        known = self._lookahead.get((name, width, touch_order))
        if known is None:
            if name not in self._columns:
                loaded = self.trace.load([name], 0, self.max_tokens)
                self._columns[name] = np.asarray(loaded[name])
            known = self.workload(touch_order).predictions(name, width)
            self._lookahead[name, width, touch_order] = known
        return known
