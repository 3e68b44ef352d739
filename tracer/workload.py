"""The events of a trace: which distinct experts each (step, layer) needs, in touch order.

An *event* is one (forward step, MoE layer). Its experts are the distinct ones that the step's
tokens were routed to, in **touch order**. Both drivers feed the policies from here, so that the
simulator and the GPU see the same events.

An expert of layer ``l`` is named by its **key** ``l * E + e`` everywhere below this point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

IntArray = npt.NDArray[Any]

PREFILL, DECODE = 0, 1
TOUCH_ORDERS = ("last-use", "first-use", "id")
# Rows handled at once when distinct experts are extracted: bounds the memory of the sort.
_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Ragged:
    """Keys of every event, concatenated: event ``i`` owns ``keys[offsets[i]:offsets[i + 1]]``.

    ``keys``: int array [entries]; ``offsets``: int64 [steps * layers + 1];
    ``counts``: tokens routed to each entry, int32 [entries].
    """

    keys: IntArray
    offsets: IntArray
    counts: IntArray
    layers: int

    def step(self, step: int) -> list[list[int]]:
        """Keys of each layer's event in one step, as lists (the hot loop wants plain ints)."""
        lo = step * self.layers
        offsets = self.offsets[lo : lo + self.layers + 1].tolist()
        first = offsets[0]
        flat = self.keys[first : offsets[-1]].tolist()
        return [flat[a - first : b - first] for a, b in pairwise(offsets)]

    def step_counts(self, step: int) -> list[list[int]]:
        """Token assignments of each entry of :meth:`step`, same shape."""
        lo = step * self.layers
        offsets = self.offsets[lo : lo + self.layers + 1].tolist()
        first = offsets[0]
        flat = self.counts[first : offsets[-1]].tolist()
        return [flat[a - first : b - first] for a, b in pairwise(offsets)]

    def with_entries(self, keys: IntArray, offsets: IntArray) -> Ragged:
        """Other keys for the same events, one token assignment each."""
        return Ragged(keys, offsets, _ones(len(keys)), self.layers)

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Step:
    """One forward step. ``context`` is the longest position + 1 among its rows."""

    index: int
    prefill_tokens: int
    decode_tokens: int
    context: int
    requests: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step, prefill and decode together."""
        return self.prefill_tokens + self.decode_tokens


def distinct(
    experts: IntArray, step_of_row: IntArray, steps: int, num_experts: int, order: str
) -> Ragged:
    """Distinct experts of every (step, layer), in touch order.

    ``experts``: int [rows, layers, m], -1 where a layer did not run; ``step_of_row``: int [rows],
    non-decreasing, in [0, steps). Touch order by ``last-use`` (token, then rank) reproduces a
    real engine's log to the last access; ``first-use`` and ``id`` are the alternatives.
    """
    _check_order(order)
    rows, layers, _ = experts.shape
    starts = np.searchsorted(step_of_row, np.arange(steps + 1))
    if rows == steps and order != "id" and bool((np.diff(starts) == 1).all()):
        return _one_row_a_step(experts, num_experts)
    blocks = []
    first = 0
    while first < steps:
        last = int(np.searchsorted(starts, starts[first] + _BLOCK_ROWS, side="right")) - 1
        last = min(max(last, first + 1), steps)
        lo, hi = int(starts[first]), int(starts[last])
        blocks.append(
            _distinct_block(
                experts[lo:hi], step_of_row[lo:hi] - first, last - first, num_experts, order
            )
        )
        first = last
    return _join(blocks, layers, _key_dtype(layers * num_experts))


def touched(rows: Sequence[Sequence[int]], order: str) -> dict[int, int]:
    """Distinct experts of one event, in touch order, and how many tokens each is assigned.

    As :func:`distinct` has them, sooner where tokens are few. ``rows``: of each token the experts
    by rank, all of which it runs (no -1). Raises UserError for an order that is unknown.
    """
    _check_order(order)
    tokens: dict[int, int] = {}
    for row in zip(*rows, strict=True) if order == "best-first" else rows:
        for expert in row:
            if order == "last-use":
                tokens[expert] = tokens.pop(expert, 0) + 1
            else:
                tokens[expert] = tokens.get(expert, 0) + 1
    return dict(sorted(tokens.items())) if order == "id" else tokens


def _check_order(order: str) -> None:
    if order not in (*TOUCH_ORDERS, "best-first"):
        raise UserError(f"touch order '{order}' is unknown: choose {', '.join(TOUCH_ORDERS)}")


def _key_dtype(size: int) -> Any:
    return np.int16 if size <= np.iinfo(np.int16).max else np.int32


def _ones(size: int) -> IntArray:
    """As many ones, in the memory of one."""
    return np.broadcast_to(np.int32(1), (size,))


def _one_row_a_step(experts: IntArray, num_experts: int) -> Ragged:
    """Single-token steps: ids are distinct already, and last use is the rank order."""
    _, layers, width = experts.shape
    ran = experts[:, :, 0] >= 0
    base = (np.arange(layers) * num_experts).astype(np.int32)
    keys = (experts + base[None, :, None])[ran].reshape(-1)
    sizes = np.where(ran, width, 0).reshape(-1)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    key_dtype = _key_dtype(layers * num_experts)
    return Ragged(keys.astype(key_dtype), offsets, _ones(len(keys)), layers)


def _distinct_block(
    experts: IntArray, step_of_row: IntArray, steps: int, num_experts: int, order: str
) -> tuple[IntArray, IntArray, IntArray]:
    """Keys, counts and event sizes of the steps of one block of rows."""
    rows, layers, width = experts.shape
    event = step_of_row[:, None].astype(np.int64) * layers + np.arange(layers)
    group = (event[:, :, None] * num_experts + experts)[experts >= 0]
    # Position of a use: (token, rank), or (rank, token) where the best candidates go first.
    token, rank = np.arange(rows)[:, None, None], np.arange(width)
    used_at = rank * rows + token if order == "best-first" else token * width + rank
    position = np.broadcast_to(used_at, experts.shape)[experts >= 0]
    by_group = np.lexsort((position, group))
    group, position = group[by_group], position[by_group]
    begins = np.ones(len(group), bool)
    begins[1:] = group[1:] != group[:-1]
    edges = np.flatnonzero(begins)
    counts = np.diff(np.concatenate((edges, [len(group)])))
    entry = group[edges]
    used = position[edges + counts - 1] if order == "last-use" else position[edges]
    entry_event = entry // num_experts
    if order == "id":
        arrange = np.arange(len(entry))
    else:
        arrange = np.lexsort((used, entry_event))
    entry, counts, entry_event = entry[arrange], counts[arrange], entry_event[arrange]
    keys = (entry_event % layers) * num_experts + entry % num_experts
    sizes = np.bincount(entry_event, minlength=steps * layers)
    return keys, counts, sizes


def _join(
    blocks: Sequence[tuple[IntArray, IntArray, IntArray]], layers: int, key_dtype: Any
) -> Ragged:
    keys = np.concatenate([block[0] for block in blocks]).astype(key_dtype)
    counts = np.concatenate([block[1] for block in blocks]).astype(np.int32)
    sizes = np.concatenate([block[2] for block in blocks])
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Ragged(keys, offsets, counts, layers)


def next_use(events: Ragged) -> IntArray:
    """Index of the event that next needs each entry's expert, int32 [entries]; ``len``: none.

    Only policies that declare themselves oracles are given this.
    """
    never = len(events)
    event_of_entry = np.repeat(
        np.arange(never, dtype=np.int32), np.diff(events.offsets).astype(np.int64)
    )
    by_key = np.argsort(events.keys, kind="stable").astype(np.int32)
    sorted_keys = events.keys[by_key]
    following = np.full(len(by_key), never, np.int32)
    same = sorted_keys[1:] == sorted_keys[:-1]
    following[:-1][same] = event_of_entry[by_key[1:]][same]
    result = np.empty(len(by_key), np.int32)
    result[by_key] = following
    return result


def first_use(events: Ragged, size: int) -> IntArray:
    """Index of the first event that needs each key, int32 [size]; none: ``len(events)``."""
    result = np.full(size, len(events), np.int32)
    keys, first = np.unique(events.keys, return_index=True)
    event_of_entry = np.searchsorted(events.offsets, first, side="right") - 1
    result[keys] = event_of_entry
    return result


@dataclass(frozen=True)
class Schedule:
    """Rows in another order than they were recorded in, and the step of each.

    ``rows``: int [rows], of the trace's columns, each at most once; ``steps``: int [rows],
    non-decreasing; ``lines``: requests that are in memory together, whoever shares a step.
    """

    rows: IntArray
    steps: IntArray
    lines: int = 1


class Workload:
    """The steps of a trace and their events, ready for a driver.

    ``columns``: arrays as :meth:`tracer.trace.Trace.load` gives them (at least request, step,
    phase, position, experts). ``requests``: the request ids to keep, all if ``None``.
    ``schedule``: rows to keep, and their steps, in place of those; ``context``: KV tokens to
    reserve for a request, where that is more than the longest has.
    """

    def __init__(
        self,
        columns: dict[str, IntArray],
        num_experts: int,
        *,
        requests: Sequence[int] | None = None,
        touch_order: str = "last-use",
        schedule: Schedule | None = None,
        context: int | None = None,
    ) -> None:
        keep: IntArray | slice = slice(None)
        if schedule is not None:
            keep = schedule.rows
        elif requests is not None:
            keep = np.isin(columns["request"], np.asarray(requests))
        self._columns = columns
        self._keep = keep
        self.request_of_row = columns["request"][keep]
        self.experts = columns["experts"][keep]
        if len(self.experts) == 0:
            raise UserError("no token is left to simulate: no row belongs to the chosen requests")
        self.num_layers: int = self.experts.shape[1]
        self.top_k: int = self.experts.shape[2]
        self.num_experts = num_experts
        self.touch_order = touch_order
        self._context = context or 0
        self._lines = 1 if schedule is None else schedule.lines
        raw_steps = columns["step"][keep] if schedule is None else schedule.steps
        boundary = np.concatenate(([True], raw_steps[1:] != raw_steps[:-1]))
        self.step_of_row = np.cumsum(boundary) - 1
        self.row_of_step = np.flatnonzero(boundary)
        self.phase_of_row = columns["phase"][keep]
        self.position_of_row = columns["position"][keep]
        self.num_steps = len(self.row_of_step)
        self.events = distinct(
            self.experts, self.step_of_row, self.num_steps, num_experts, touch_order
        )

    @property
    def num_tokens(self) -> int:
        """Rows of the workload."""
        return len(self.request_of_row)

    @property
    def num_accesses(self) -> int:
        """Distinct experts summed over events: one look-up each."""
        return len(self.events.keys)

    @property
    def max_step_tokens(self) -> int:
        """Rows of the largest step."""
        return int(np.diff(np.append(self.row_of_step, self.num_tokens)).max())

    @property
    def kv_capacity(self) -> int:
        """Tokens of KV cache to reserve: the longest context times the largest batch."""
        return self.max_context * self.max_batch

    @property
    def max_context(self) -> int:
        """Longest context of any request, in tokens, or what is reserved for one."""
        return max(int(self.position_of_row.max()) + 1, self._context)

    @property
    def max_batch(self) -> int:
        """Most requests that share one step, or that are in memory together."""
        return max(self._lines, max(len(step.requests) for step in self.steps()))

    def column(self, name: str) -> IntArray:
        """An optional column's rows, for the requests kept."""
        return self._columns[name][self._keep]

    def has(self, name: str) -> bool:
        """Whether an optional column was loaded."""
        return name in self._columns

    def predictions(self, name: str, width: int) -> Ragged:
        """Distinct predicted experts of column ``name``: every token's best, then the second best.

        The event (step, l) holds what the gate of layer ``l`` predicts, as keys of layer ``l``
        (callers move them to the layer that the column is about). ``width``: how many of the
        recorded candidates a token to take.
        """
        return distinct(
            self.predicted(name, width),
            self.step_of_row,
            self.num_steps,
            self.num_experts,
            "best-first",
        )

    def predicted(self, name: str, width: int) -> IntArray:
        """The first ``width`` candidates of column ``name``, [rows, L, width].

        Raises UserError where fewer were recorded.
        """
        columns = self.column(name)
        if width > columns.shape[2]:
            raise UserError(
                f"column {name} holds {columns.shape[2]} candidates a token, {width} were asked "
                "for: lower overfetch, or record more"
            )
        return columns[:, :, :width]

    def steps(self) -> Iterator[Step]:
        """The steps in order, with the requests that begin and end in each."""
        yield from self._step_list()

    def _step_list(self) -> list[Step]:
        cached: list[Step] | None = self.__dict__.get("_steps")
        if cached is not None:
            return cached
        bounds = np.append(self.row_of_step, self.num_tokens).tolist()
        request = self.request_of_row.tolist()
        prefill = (self.phase_of_row == PREFILL).tolist()
        position = self.position_of_row.tolist()
        last_step: dict[int, int] = {}
        members: list[tuple[int, ...]] = []
        for index, (lo, hi) in enumerate(pairwise(bounds)):
            present = (request[lo],) if hi - lo == 1 else tuple(dict.fromkeys(request[lo:hi]))
            members.append(present)
            for name in present:
                last_step[name] = index
        seen: set[int] = set()
        steps = []
        for index, (lo, hi) in enumerate(pairwise(bounds)):
            present = members[index]
            begins = tuple(name for name in present if name not in seen)
            seen.update(begins)
            ends = tuple(name for name in present if last_step[name] == index)
            filled = sum(prefill[lo:hi])
            context = max(position[lo:hi]) + 1
            steps.append(Step(index, filled, hi - lo - filled, context, present, begins, ends))
        self.__dict__["_steps"] = steps
        return steps


def popularity(workload: Workload) -> IntArray:
    """How many events needed each expert, int64 [layers, E]: what static placement is fitted on."""
    counts = np.bincount(workload.events.keys, minlength=workload.num_layers * workload.num_experts)
    return counts.reshape(workload.num_layers, workload.num_experts)
