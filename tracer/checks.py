"""What makes the rows of a trace valid; the writer asks before it writes, the reader after reading.

Every check is vectorised and names the first offending row: rows count from 0 within the file that
`where` names, layers are MoE layers from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from tracer.columns import DECODE, NULL_ID, NULL_RESIDENCY, PREFILL, ColumnSpec

NULL_WHERE_EXPERTS_ARE = ("weights", "residency", "gate_probs", "gate_norms", "gate_inputs")
_MEND = "restore the file, or record or import the trace again"


def check_columns(
    arrays: Mapping[str, NDArray], specs: Mapping[str, ColumnSpec], num_experts: int, where: str
) -> None:
    """Raise UserError at the first value that no trace may hold; `arrays` are [n, *shape]."""
    for name, values in arrays.items():
        _check_column(specs[name], values, num_experts, where)


def check_nulls_match(arrays: Mapping[str, NDArray], where: str) -> None:
    """Given columns of NULL_WHERE_EXPERTS_ARE are null exactly where experts is.

    A whole row of gate_inputs may be null beside.
    """
    for name in NULL_WHERE_EXPERTS_ARE:
        if name not in arrays:
            continue
        experts, values = arrays["experts"], arrays[name]
        null = values == NULL_RESIDENCY if name == "residency" else np.isnan(values)
        if values.shape != experts.shape:  # one value or vector a layer, not one an expert
            experts = experts[..., :1]
            null = null.reshape(*experts.shape[:2], -1)
        if name == "gate_inputs":  # too large to keep for every row: whole rows may be null
            left_out = null.all(axis=(1, 2), keepdims=True)
            null = np.where(left_out, experts == NULL_ID, null)
        _check_nulls_match(experts, null, name, where)


def check_step_order(step: NDArray, previous: int | None, where: str) -> None:
    """Steps never decrease, also from the row before these (`previous`)."""
    before = np.concatenate(([step[0] if previous is None else previous], step[:-1]))
    bad = np.flatnonzero(step < before)
    if bad.size:
        row = int(bad[0])
        _fail(where, f"row {row}", f"step {step[row]} follows step {before[row]}: rows go by step")


class RowOrder:
    """What holds from row to row, over blocks of rows in the file's order.

    Steps never decrease, and a batch row occurs once in a step. A request's positions go on by one
    from wherever they begin (prefill may be cached, or not recorded), and none of its prefill
    follows its decoding. What lies before the first block is unknown.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._batch_rows = np.empty(0, np.int64)
        self._position: dict[int, int] = {}
        self._phase: dict[int, int] = {}

    def check(self, arrays: Mapping[str, NDArray], where: str) -> None:
        """Raise UserError at the first row that cannot follow; of columns, check those given."""
        if "step" in arrays:
            self._check_steps(arrays, where)
        if "request" not in arrays:
            return
        if "position" in arrays:
            self._check_positions(arrays["request"], arrays["position"], where)
        if "phase" in arrays:
            self._check_phases(arrays["request"], arrays["phase"], where)

    def _check_steps(self, arrays: Mapping[str, NDArray], where: str) -> None:
        step = arrays["step"]
        check_step_order(step, self._step, where)
        if "row" in arrays:
            self._check_batch_rows(step, arrays["row"], where)
        self._step = int(step[-1])

    def _check_batch_rows(self, step: NDArray, batch_row: NDArray, where: str) -> None:
        # The last step may have begun in the block before.
        begun = self._batch_rows if step[0] == self._step else self._batch_rows[:0]
        steps = np.concatenate((np.full(len(begun), step[0]), step))
        batch_rows = np.concatenate((begun, batch_row))
        order = np.lexsort((batch_rows, steps))
        ordered = np.stack((steps[order], batch_rows[order]))
        again = order[1:][(ordered[:, 1:] == ordered[:, :-1]).all(axis=0)] - len(begun)
        if again.size:
            row = int(again.min())
            problem = f"batch row {batch_row[row]} occurs twice in step {step[row]}"
            _fail(where, f"row {row}", problem)
        self._batch_rows = batch_rows[steps == step[-1]]

    def _check_positions(self, request: NDArray, position: NDArray, where: str) -> None:
        position = position.astype(np.int64)
        before = _of_row_before(request, position, position - 1, self._position)
        bad = np.flatnonzero(position != before + 1)
        if bad.size:
            row = int(bad[0])
            _fail(
                where,
                f"row {row}",
                f"position {position[row]} of request {request[row]} follows position"
                f" {before[row]}: positions go on by one",
            )

    def _check_phases(self, request: NDArray, phase: NDArray, where: str) -> None:
        before = _of_row_before(request, phase, phase, self._phase)
        bad = np.flatnonzero((phase == PREFILL) & (before == DECODE))
        if bad.size:
            row = int(bad[0])
            _fail(where, f"row {row}", f"request {request[row]} decoded before this prefill row")


def _of_row_before(
    request: NDArray, values: NDArray, otherwise: NDArray, last: dict[int, int]
) -> NDArray:
    """The value of the row before of the same request, [n].

    Of a request's first row it is the one in `last`, which is brought up to date, or `otherwise`.
    """
    order = np.argsort(request, kind="stable")
    grouped = request[order]
    begins = np.concatenate(([True], grouped[1:] != grouped[:-1]))
    first, final = order[begins], order[np.append(begins[1:], True)]
    before = np.empty_like(values)
    before[order[1:]] = values[order[:-1]]
    ids = request[first].tolist()
    before[first] = [last.get(i, v) for i, v in zip(ids, otherwise[first].tolist(), strict=True)]
    last.update(zip(ids, values[final].tolist(), strict=True))
    return before


def _check_column(spec: ColumnSpec, values: NDArray, num_experts: int, where: str) -> None:
    if spec.name == "phase":
        _check_range(values, spec, 0, DECODE, where)
    elif spec.name == "token_id":
        _check_range(values, spec, NULL_ID, np.iinfo(np.int32).max, where)
    elif not spec.shape:
        _check_range(values, spec, 0, np.iinfo(spec.dtype).max, where)
    elif spec.name == "residency":
        _check_residency(spec, values, where)
    elif spec.dtype.kind == "f":
        _check_finite(spec, values, where)
    else:
        _check_ids(spec, values, num_experts, where)


def _check_range(values: NDArray, spec: ColumnSpec, low: int, high: int, where: str) -> None:
    if values.size == 0 or (values.min() >= low and values.max() <= high):
        return
    at = np.unravel_index(np.argmax((values < low) | (values > high)), values.shape)
    _fail(where, _place(at), f"{spec.name} {values[at]} is outside [{low}, {high}]")


def _check_ids(spec: ColumnSpec, ids: NDArray, num_experts: int, where: str) -> None:
    if ids.size == 0:
        return
    if ids.min() < NULL_ID or ids.max() >= num_experts:
        at = np.unravel_index(np.argmax((ids < NULL_ID) | (ids >= num_experts)), ids.shape)
        _fail(where, _place(at), f"{spec.name}: expert id {ids[at]} is outside [0, {num_experts})")
    ordered = np.sort(ids, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NULL_ID)
    if repeated.any():
        at = np.unravel_index(np.argmax(repeated), repeated.shape)
        _fail(where, _place(at[:2]), f"{spec.name}: expert id {ordered[at]} occurs twice")
    if ordered[..., 0].min() == NULL_ID:
        _check_nulls_last(spec, ids, where)


def _check_nulls_last(spec: ColumnSpec, ids: NDArray, where: str) -> None:
    bad = (ids[..., :-1] == NULL_ID) & (ids[..., 1:] != NULL_ID)
    if bad.any():
        at = np.unravel_index(np.argmax(bad), bad.shape)
        _fail(where, _place(at), f"{spec.name}: a null before expert id {ids[..., 1:][at]}")


def _check_finite(spec: ColumnSpec, values: NDArray, where: str) -> None:
    infinite = np.isinf(values) if spec.null is not None else ~np.isfinite(values)
    if infinite.any():
        at = np.unravel_index(np.argmax(infinite), values.shape)
        _fail(where, _place(at), f"{spec.name} {values[at]} is not a finite {spec.dtype}")
    if spec.name == "gate_probs" and ((values < 0) | (values > 1)).any():
        at = np.unravel_index(np.argmax((values < 0) | (values > 1)), values.shape)
        _fail(where, _place(at), f"gate_probs {values[at]} is outside [0, 1]")


def _check_residency(spec: ColumnSpec, values: NDArray, where: str) -> None:
    bad = (values > 1) & (values != NULL_RESIDENCY)
    if bad.any():
        at = np.unravel_index(np.argmax(bad), values.shape)
        _fail(where, _place(at), f"{spec.name} {values[at]} is neither 0, 1 nor null")


def _check_nulls_match(experts: NDArray, null: NDArray, name: str, where: str) -> None:
    absent = experts == NULL_ID
    differ = absent != null
    if not differ.any():
        return
    at = np.unravel_index(np.argmax(differ), differ.shape)
    ran = not np.broadcast_to(absent, differ.shape)[at]
    problem = f"{name} is null where an expert ran" if ran else f"a value of {name} where none ran"
    _fail(where, _place(at), problem)


def _place(at: tuple[np.intp, ...]) -> str:
    names = ("row", "layer", "rank")
    return ", ".join(f"{name} {int(index)}" for name, index in zip(names, at, strict=False))


def _fail(where: str, place: str, problem: str) -> NoReturn:
    raise UserError(f"{where}: {place}: {problem}; {_MEND}")
