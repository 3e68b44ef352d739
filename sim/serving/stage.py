"""The step in progress as policies see it: events, signals and predictions of the rows drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from policies.interface import EventTable
from sim.inputs import Inputs, RecordedRows
from sim.serving.schedule import Share
from tracer.workload import Step, Workload

Ids = npt.NDArray[Any]


class EventMaker:
    """Distinct experts of any rows of a workload, in touch order.

    ``experts``: ids [rows, L, m], -1 where a layer did not run. ``order``: of
    :data:`tracer.workload.TOUCH_ORDERS`, or ``best-first``. The same events as
    :func:`tracer.workload.distinct` makes of a step of these rows.
    """

    def __init__(self, experts: Ids, num_experts: int, order: str) -> None:
        layers = experts.shape[1]
        base = np.arange(layers, dtype=np.int32) * num_experts
        self._keys = np.where(experts >= 0, experts + base[:, None], -1).astype(np.int32)
        self._whole: list[bool] = np.all(experts >= 0, axis=(1, 2)).tolist()
        self._layers, self._num_experts, self._order = layers, num_experts, order

    def one(self, row: int) -> list[list[int]]:
        """Keys by layer of a step of one row."""
        events: list[list[int]] = self._keys[row].tolist()
        if not self._whole[row]:
            events = [[key for key in keys if key >= 0] for keys in events]
        return [sorted(keys) for keys in events] if self._order == "id" else events

    def several(self, rows: Ids) -> tuple[list[list[int]], list[list[int]]]:
        """Keys by layer, and the tokens assigned to each."""
        layers, size = self._layers, self._layers * self._num_experts
        # By layer, then token, then rank; best-first: by layer, then rank, then token.
        axes = (1, 2, 0) if self._order == "best-first" else (1, 0, 2)
        flat = self._keys[rows].transpose(axes).reshape(-1)
        used = np.arange(len(flat))
        if not (flat >= 0).all():
            used = used[flat >= 0]
            flat = flat[flat >= 0]
        counts = np.bincount(flat, minlength=size)
        entries = np.flatnonzero(counts)
        if self._order != "id":
            at = np.empty(size, np.int64)
            # Of repeated indices the last assignment stays.
            if self._order == "last-use":
                at[flat] = used
            else:
                at[flat[::-1]] = used[::-1]
            entries = entries[np.argsort(at[entries])]
        edges = np.searchsorted(entries // self._num_experts, np.arange(layers + 1)).tolist()
        keys, tokens = entries.tolist(), counts[entries].tolist()
        spans = [(edges[layer], edges[layer + 1]) for layer in range(layers)]
        return [keys[a:b] for a, b in spans], [tokens[a:b] for a, b in spans]


class Stage:
    """The rows of the step in progress.

    ``step``: its number, from 0; ``rows``: indices into the workload, int64 [n]; ``requests``: the
    served request of each row, int64 [n].
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.step = -1
        self.rows: Ids = np.empty(0, np.int64)
        self.requests: Ids = np.empty(0, np.int64)
        self._events = EventMaker(work.experts, work.num_experts, work.touch_order)
        self._positions: list[int] = work.position_of_row.tolist()

    def show(self, index: int, shares: Sequence[Share]) -> Step:
        """The step of these shares is about to begin."""
        rows: list[int] = []
        owners: list[int] = []
        prefill = 0
        for request, count in shares:
            own = request.rows_of_trace(request.done, count)
            if len(own) != count:
                raise RuntimeError(
                    f"request {request.index}: {count} rows from {request.done} on are not there"
                )
            rows += own
            owners += [request.index] * count
            if request.done < request.prompt:
                prefill += count
        self.step = index
        self.rows = np.array(rows, np.int64)
        self.requests = np.array(owners, np.int64)
        return Step(
            index=index,
            prefill_tokens=prefill,
            decode_tokens=len(rows) - prefill,
            context=max([self._positions[row] for row in rows]) + 1,
            requests=tuple([request.index for request, _ in shares]),
            begins=tuple([request.index for request, _ in shares if not request.done]),
            ends=tuple([each.index for each, count in shares if each.done + count == each.rows]),
        )

    def events(self) -> tuple[list[list[int]], list[list[int]] | None]:
        """Keys by layer, and the tokens assigned to each; None: one each."""
        if len(self.rows) == 1:
            return self._events.one(int(self.rows[0])), None
        return self._events.several(self.rows)


class StagedSignals:
    """:class:`policies.interface.Signals` of the step on stage."""

    def __init__(self, inputs: Inputs, stage: Stage) -> None:
        self._inputs = inputs
        self._stage = stage
        self._columns: dict[str, Ids] = {}
        self._reached = -1

    def begin_step(self, step: int) -> None:
        """No gate has run."""
        if step != self._stage.step:
            raise RuntimeError(f"step {step} begins while {self._stage.step} is on stage")
        self._reached = -1

    def reach(self, layer: int) -> None:
        """Show the gates up to ``layer``."""
        self._reached = layer

    def layer_rows(self, name: str, layer: int) -> Ids:
        """A gate's rows; LookupError where it has not run."""
        if layer > self._reached:
            raise LookupError(f"{name} of layer {layer}: the step has reached {self._reached}")
        rows: Ids = self._column(name)[self._stage.rows, layer]
        return rows

    def step_rows(self, name: str) -> Ids:
        """The step's rows of a column that has no layers; ``request``: those served."""
        if name == "request":
            return self._stage.requests
        column = self._column(name)
        if column.ndim > 1 and name != "embedding":
            raise LookupError(f"{name} is known by layer only: ask for layer_rows")
        rows: Ids = column[self._stage.rows]
        return rows

    def _column(self, name: str) -> Ids:
        known = self._columns.get(name)
        if known is None:
            self._inputs.ensure(name)
            known = self._columns[name] = self._stage.work.column(name)
        return known


class StagedTable:
    """Recorded predictions of the step on stage, as an :class:`policies.interface.EventTable`."""

    def __init__(self, predicted: Ids, stage: Stage) -> None:
        work = stage.work
        self._stage = stage
        self._maker = EventMaker(predicted, work.num_experts, "best-first")
        self.layers = work.num_layers

    def step(self, step: int) -> list[list[int]]:
        """Keys of each layer's event; of the step in progress alone."""
        if step != self._stage.step:
            raise RuntimeError(f"step {step} is asked for while {self._stage.step} is on stage")
        rows = self._stage.rows
        return self._maker.one(int(rows[0])) if len(rows) == 1 else self._maker.several(rows)[0]

    @property
    def keys(self) -> Any:
        """All events are never known."""
        return self._unknown()

    @property
    def offsets(self) -> Any:
        """All events are never known."""
        return self._unknown()

    def with_entries(self, keys: Any, offsets: Any) -> EventTable:
        """All events are never known."""
        return self._unknown()

    def __len__(self) -> int:
        return self._unknown()

    def _unknown(self) -> NoReturn:
        raise RuntimeError("steps to come are asked for: they are formed while time runs")


class ServedInputs(Inputs):
    """Inputs whose policies are shown the step on stage in place of the trace's steps.

    :meth:`set_stage` must come before a core is made.
    """

    stage: Stage

    def set_stage(self, touch_order: str) -> Stage:
        """The judged requests' rows, to be drawn from."""
        self.stage = Stage(self.workload(touch_order))
        return self.stage

    def signals(self, touch_order: str) -> StagedSignals:
        """Of the step on stage."""
        return StagedSignals(self, self.stage)

    def lookahead(self, name: str, width: int, touch_order: str) -> EventTable:
        """Recorded predictions of the step on stage."""
        self.ensure(name)
        work = self.stage.work
        return StagedTable(work.predicted(name, width), self.stage)

    def recording(self, touch_order: str) -> RecordedRows | None:
        """None: predictions are made one by one, as in a live run."""
        return None
