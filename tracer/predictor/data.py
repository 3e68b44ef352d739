"""A trace's gate inputs and the experts to foretell from them, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from tracer.columns import NULL_ID
from tracer.manifest import TOKENS
from tracer.trace import Trace

GATE_INPUTS = "gate_inputs"
_FLOAT16_BYTES = 2
_INT16_BYTES = 2


@dataclass(frozen=True)
class Rows:
    """Training rows; P = L - stride layers predict.

    inputs: float16 [n, P, H], zero where the layer did not run; targets: int16 [n, P, k], the
    experts of the layer `stride` later, -1 where either of the two did not run.
    """

    inputs: NDArray
    targets: NDArray

    def __len__(self) -> int:
        return len(self.inputs)


def refuse_without_gate_inputs(trace: Trace) -> None:
    """Raise UserError where a trace holds nothing to predict from."""
    if GATE_INPUTS not in trace.columns():
        raise UserError(
            f"{trace.path}: there is no column {GATE_INPUTS!r} to predict from; record it:"
            " moesim trace ... --record hidden"
        )


def as_rows(experts: NDArray, gate_inputs: NDArray, stride: int) -> Rows:
    """Pair the gate inputs [n, L, H] of a layer with the experts [n, L, k] `stride` layers on."""
    ran = experts[:, :, 0] != NULL_ID
    if np.isnan(gate_inputs[ran][:, 0]).any():
        raise UserError(
            "the gate inputs of some rows are missing (moesim subset --hidden thinned them?): use"
            " the whole trace"
        )
    both = ran[:, :-stride] & ran[:, stride:]
    inputs = np.where(ran[:, :-stride, None], gate_inputs[:, :-stride], np.float16(0))
    targets = np.where(both[:, :, None], experts[:, stride:], np.int16(NULL_ID))
    return Rows(inputs, targets)


def shard_ranges(trace: Trace) -> list[tuple[int, int]]:
    """First row and row after the last of each shard."""
    stops = np.cumsum(trace.manifest.shard_rows(TOKENS)).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


class RowSource:
    """The rows of some requests of a trace, in windows of at most `memory_bytes`.

    Rows that fit into one window are read once and kept; others are read again, shard by shard, on
    every pass. A window holds whole shards (of the requests' rows), at least one.
    """

    def __init__(
        self, trace: Trace, requests: Sequence[int], stride: int, memory_bytes: int
    ) -> None:
        refuse_without_gate_inputs(trace)
        geometry = trace.manifest.geometry
        self._trace = trace
        self._requests = np.array(requests)
        self._stride = stride
        self._shards = [
            (*rows, count) for rows in shard_ranges(trace) if (count := self._count(*rows))
        ]
        self.rows = sum(count for *_, count in self._shards)
        self.layers = geometry.num_moe_layers - stride
        self.num_experts, self.top_k = geometry.num_experts, geometry.top_k
        self.hidden_size = geometry.hidden_size
        values = self.hidden_size * _FLOAT16_BYTES + self.top_k * _INT16_BYTES
        self._row_bytes = self.layers * values
        self._window_rows = memory_bytes // self._row_bytes
        self._kept: Rows | None = None

    @property
    def bytes(self) -> int:
        """Size of all rows in memory."""
        return self.rows * self._row_bytes

    def windows(self, rng: np.random.Generator | None = None) -> Iterator[Rows]:
        """Go through all rows once; with `rng`, the shards in an order drawn from it.

        A window may be overwritten once the next one is asked for.
        """
        if self.rows > self._window_rows:
            yield from self._read_windows(rng)
            return
        if self._kept is None:
            self._kept = self._read(self._shards, self._buffer(self.rows))
        yield self._kept

    def _read_windows(self, rng: np.random.Generator | None) -> Iterator[Rows]:
        order = range(len(self._shards)) if rng is None else rng.permutation(len(self._shards))
        capacity = max(self._window_rows, *(count for *_, count in self._shards))
        buffer = self._buffer(capacity)
        chosen: list[tuple[int, int, int]] = []
        for index in order:
            shard = self._shards[index]
            if sum(count for *_, count in chosen) + shard[2] > capacity:
                yield self._read(chosen, buffer)
                chosen = []
            chosen.append(shard)
        yield self._read(chosen, buffer)

    def _buffer(self, rows: int) -> Rows:
        return Rows(
            np.empty((rows, self.layers, self.hidden_size), np.float16),
            np.empty((rows, self.layers, self.top_k), np.int16),
        )

    def _count(self, start: int, stop: int) -> int:
        request = self._trace.load(["request"], start, stop)["request"]
        return int(np.isin(request, self._requests).sum())

    def _read(self, shards: list[tuple[int, int, int]], buffer: Rows) -> Rows:
        """Fill the buffer from its beginning with these shards' rows; return that part of it."""
        end = 0
        for start, stop, count in shards:
            shard = self._trace.load(["request", "experts", GATE_INPUTS], start, stop)
            mine = np.isin(shard["request"], self._requests)
            rows = as_rows(shard["experts"][mine], shard[GATE_INPUTS][mine], self._stride)
            buffer.inputs[end : end + count] = rows.inputs
            buffer.targets[end : end + count] = rows.targets
            end += count
        return Rows(buffer.inputs[:end], buffer.targets[:end])
