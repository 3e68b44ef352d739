"""What a simulation reads: a trace's columns, turned into events once and shared by all points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from configs.errors import UserError
from policies.interface import EventTable, Signals
from sim.batches import compose, refuse_composing
from tracer.manifest import Manifest
from tracer.workload import (
    Ragged,
    Schedule,
    Workload,
    first_use,
    next_use,
    popularity,
)

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


def learned_among(columns: Iterable[str]) -> tuple[str, ...]:
    """Those of ``columns`` that hold a trained predictor's predictions."""
    return tuple(name for name in columns if name.startswith("learned_"))


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
    policies; the others are judged. ``learned``: learned columns that policies read; the requests
    that trained their predictors are set aside in place of that share, where there are any.
    ``requests``: of the rows read, those of these requests only. ``fit_requests``: others that
    fitted policies learn from, in place of a share. ``batch``: requests that run together
    (:mod:`sim.batches`; 1: as recorded), the fitted ones too, as far as there are so many.
    ``context``: KV tokens to reserve for a request (None: what the longest judged one has).

    ``fitted_on`` and ``judged`` are the two sides, ``set_aside_for`` says why they were parted
    (None: they were not), ``notes`` what a user should be told of it.
    """

    def __init__(
        self,
        trace: TraceSource,
        *,
        max_tokens: int | None = None,
        fit_share: float = 0.0,
        learned: Sequence[str] = (),
        requests: Sequence[int] | None = None,
        fit_requests: Sequence[int] = (),
        batch: int = 1,
        context: int | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"--max-tokens {max_tokens}: give at least 1")
        if not 0 <= fit_share < 1:
            raise UserError(f"fit share {fit_share}: give a share from 0 to below 1")
        self.trace = trace
        self.fit_share = fit_share
        self.max_tokens = max_tokens
        self.manifest = trace.manifest
        self._only: npt.NDArray[np.bool_] | None = None
        self._columns = dict(trace.load(list(BASE_COLUMNS), 0, max_tokens))
        if requests is not None:
            self._keep_only([*requests, *fit_requests])
        present = list(dict.fromkeys(self._columns["request"].tolist()))
        trained = set().union(*(self._trained_on(name) for name in learned))
        self.fitted_on = [request for request in present if request in trained]
        chosen = set(fit_requests)
        self.set_aside_for: str | None = None
        self.notes: tuple[str, ...] = ()
        if self.fitted_on:
            self._part_from_trained(", ".join(learned), len(present))
        elif chosen:
            self.fitted_on = [request for request in present if request in chosen]
            self.set_aside_for = f"{len(chosen)} requests were named to fit on"
        else:
            self._part_for_fitting(present)
        fitted = set(self.fitted_on)
        self.judged = [request for request in present if request not in fitted]
        self.batch = batch
        self.context = context
        if batch > 1:
            self._refuse_batch()
        if context is not None:
            self._refuse_context(context)
        self._workloads: dict[str, Workload] = {}
        self._futures: dict[str, tuple[Any, Any]] = {}
        self._lookahead: dict[tuple[str, int, str], Ragged] = {}
        self._popularity: Any = None
        self._fit: RecordedRows | None = None

    def _refuse_batch(self) -> None:
        """Raise UserError where so many cannot be put together; the notes say what is."""
        refuse_composing(self._columns, self.judged, self.batch, len(self.fitted_on))
        self.notes = (
            *self.notes,
            f"{self.batch} requests run together: {len(self.judged)} of the trace, each whole and "
            "once; as one ends the next begins",
        )

    def _refuse_context(self, context: int) -> None:
        position = self._columns["position"]
        longest = int(position.max()) + 1
        if context < longest:
            request = self._columns["request"][position.argmax()]
            raise UserError(
                f"--context {context}: request {request} of the trace has {longest} tokens: give "
                "at least that, or leave --context out"
            )

    def _keep_only(self, requests: Sequence[int]) -> None:
        present = set(self._columns["request"].tolist())
        absent = sorted(set(requests) - present)
        if absent or not requests:
            raise UserError(
                f"request {absent[0] if absent else 'none'}: the rows read have the requests "
                f"{min(present)} to {max(present)}; choose among them"
            )
        self._only = np.isin(self._columns["request"], np.asarray(requests))
        self._columns = {name: rows[self._only] for name, rows in self._columns.items()}

    def _part_from_trained(self, columns: str, present: int) -> None:
        """Say who was set aside for having trained ``columns``; somebody must be left to judge."""
        trained = len(self.fitted_on)
        if trained == present:
            raise UserError(
                f"all {present} requests read trained the predictor of {columns}, so none is left "
                "to judge it on: hold some out when training (`moesim train-predictor "
                "--test-share 0.3`), read more of the trace (--max-tokens), or judge on another "
                "trace (`moesim apply-predictor --trace OTHER --weights FILE`)"
            )
        self.set_aside_for = f"they trained {columns}"
        self.notes = (
            f"{trained} of {present} requests trained {columns}: they are set aside, and the other "
            f"{present - trained} are judged",
        )

    def _part_for_fitting(self, present: list[int]) -> None:
        """Set the share aside that fitted policies learn from."""
        self.fitted_on = set_aside(present, self.fit_share)
        if self.fit_share <= 0:
            return
        self.set_aside_for = f"fit share {self.fit_share:g}"
        if not 0 < len(self.fitted_on) < len(present):
            raise UserError(
                f"{len(present)} request(s) cannot be split into a fitted and a judged part with a "
                f"share of {self.fit_share:g}: use a longer trace, a larger --max-tokens, "
                "policies that need no fitting, or --fit-share 0 for one that can begin with "
                "nothing (mode=online)"
            )

    def _trained_on(self, column: str) -> set[int]:
        """Requests that trained the predictor behind ``column``.

        None where the trace lacks the column: the policy that wants it says so. UserError where
        the trace does not say who trained it.
        """
        predictor = self.manifest.predictor_of(column)
        if predictor is not None:
            return set(predictor.trained_requests)
        if column not in self.manifest.columns:
            return set()
        raise UserError(
            f"column {column}: the trace's manifest.json does not say which requests trained its "
            "predictor (predictors), so nobody can be judged with it; make the column with `moesim "
            "train-predictor` or `moesim apply-predictor`, which keep that"
        )

    def refuse_trained(self, columns: Iterable[str]) -> None:
        """Raise UserError if a judged request trained the predictor of a column to be read."""
        for name in columns:
            seen = len(self._trained_on(name).intersection(self.judged))
            if seen:
                raise UserError(
                    f"{seen} of the judged requests trained the predictor of {name}: set them "
                    f"aside with Inputs(..., learned=[{name!r}])"
                )

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
                schedule=self._schedule(self.judged),
                context=self.context,
            )
            self._workloads[touch_order] = known
        return known

    def _schedule(self, requests: Sequence[int]) -> Schedule | None:
        """How these run together; None: as recorded."""
        if self.batch == 1:
            return None
        return compose(self._columns, requests, min(self.batch, len(requests)))

    def future(self, touch_order: str) -> tuple[Any, Any]:
        """Next use of every entry, first use of every key: for declared oracles."""
        known = self._futures.get(touch_order)
        if known is None:
            work = self.workload(touch_order)
            size = work.num_layers * work.num_experts
            known = (next_use(work.events), first_use(work.events, size))
            self._futures[touch_order] = known
        return known

    def fit(self) -> RecordedRows | None:
        """The requests set aside; None: none are."""
        if not self.fitted_on:
            return None
        if self._fit is None:
            work = Workload(
                self._columns,
                self.num_experts,
                requests=self.fitted_on,
                schedule=self._schedule(self.fitted_on),
            )
            self._fit = RecordedRows(self, work)
        return self._fit

    def popularity(self) -> Any:
        """Events that needed each expert, int [L, E], on the requests set aside; None: none are."""
        fit = self.fit()
        if fit is None:
            return None
        if self._popularity is None:
            self._popularity = popularity(fit.workload)
        return self._popularity

    def ensure(self, name: str) -> None:
        """Load an optional column unless it is there already."""
        if name not in self._columns:
            rows = np.asarray(self.trace.load([name], 0, self.max_tokens)[name])
            self._columns[name] = rows if self._only is None else rows[self._only]

    def recording(self, touch_order: str) -> RecordedRows | None:
        """The judged requests as a whole: for policies that predict in blocks."""
        return RecordedRows(self, self.workload(touch_order))

    def signals(self, touch_order: str) -> Signals:
        """The judged requests' columns, one step at a time."""
        return TraceSignals(self, self.workload(touch_order))

    def lookahead(self, name: str, width: int, touch_order: str) -> EventTable:
        """Recorded predictions of the judged requests."""
        known = self._lookahead.get((name, width, touch_order))
        if known is None:
            self.ensure(name)
            known = self.workload(touch_order).predictions(name, width)
            self._lookahead[name, width, touch_order] = known
        return known


class RecordedRows:
    """:class:`policies.interface.Recorded` over a workload, such as the requests set aside."""

    def __init__(self, inputs: Inputs, workload: Workload) -> None:
        self.workload = workload
        self._inputs = inputs

    @property
    def events(self) -> EventTable:
        return self.workload.events

    @property
    def step_of_row(self) -> npt.NDArray[Any]:
        return self.workload.step_of_row

    @property
    def request_of_row(self) -> npt.NDArray[Any]:
        return self.workload.request_of_row

    @property
    def phase_of_row(self) -> npt.NDArray[Any]:
        return self.workload.phase_of_row

    def column(self, name: str) -> npt.NDArray[Any]:
        """Rows of these requests."""
        self._inputs.ensure(name)
        return self.workload.column(name)


class TraceSignals:
    """:class:`policies.interface.Signals` from the recorded columns of the judged requests."""

    def __init__(self, inputs: Inputs, workload: Workload) -> None:
        self._inputs = inputs
        self._workload = workload
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._bounds = np.append(workload.row_of_step, workload.num_tokens).tolist()
        self._rows = slice(0, 0)
        self._reached = -1

    def begin_step(self, step: int) -> None:
        """Show the rows of ``step``, and no gate yet."""
        self._rows = slice(self._bounds[step], self._bounds[step + 1])
        self._reached = -1

    def reach(self, layer: int) -> None:
        """Show the gates up to ``layer``."""
        self._reached = layer

    def layer_rows(self, name: str, layer: int) -> npt.NDArray[Any]:
        """A gate's rows; LookupError where it has not run."""
        if layer > self._reached:
            raise LookupError(f"{name} of layer {layer}: the step has reached {self._reached}")
        rows: npt.NDArray[Any] = self._column(name)[self._rows, layer]
        return rows

    def step_rows(self, name: str) -> npt.NDArray[Any]:
        """The step's rows of a column that has no layers."""
        column = self._column(name)
        if column.ndim > 1 and name != "embedding":
            raise LookupError(f"{name} is known by layer only: ask for layer_rows")
        return column[self._rows]

    def _column(self, name: str) -> npt.NDArray[Any]:
        known = self._columns.get(name)
        if known is None:
            self._inputs.ensure(name)
            known = self._columns[name] = self._workload.column(name)
        return known
