"""Made-up columns beside the routing: for policies that read more than events.

Equal experts, seed and step give equal columns, so that two runs which differ from a step on see
the same until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.interface import Costs, PolicyData, Shape
from sim.inputs import BASE_COLUMNS, Inputs, RecordedRows
from tests.driver import GivenFit, GivenSignals, Steps
from tracer.workload import Workload, distinct, first_use, next_use, popularity

HIDDEN = 4
DISTANCES = (1, 2, 3)


def gate_columns(
    experts: NDArray[Any], num_experts: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """What a gate says of `experts` [rows, L, k], -1 where fewer ran; nan where none did."""
    logits = rng.random((*experts.shape[:2], num_experts)) * 3
    chosen = (experts[..., None] == np.arange(num_experts)).any(-2)
    logits[chosen] += 2
    probs = np.exp(logits)
    probs /= probs.sum(-1, keepdims=True)
    weights = np.take_along_axis(probs, np.maximum(experts, 0).astype(np.int64), -1)
    ran = (experts >= 0).any(-1)
    return {
        "gate_probs": np.where(ran[..., None], probs, np.nan).astype(np.float16),
        "weights": np.where(experts >= 0, weights, np.nan).astype(np.float16),
        "gate_norms": np.where(ran, 1 + rng.random(ran.shape), np.nan).astype(np.float32),
        "embedding": rng.standard_normal((len(experts), HIDDEN)).astype(np.float16),
        "gate_inputs": rng.standard_normal((*experts.shape[:2], HIDDEN)).astype(np.float16),
    }


def prediction_columns(
    experts: NDArray[Any], num_experts: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """`lookahead_d` and `learned_d`: 2k experts of layer l + d, more often right than not."""
    width = min(2 * experts.shape[-1], num_experts)
    chosen = (experts[..., None] == np.arange(num_experts)).any(-2)
    columns = {}
    for name in ("lookahead", "learned"):
        for distance in DISTANCES:
            guess = np.argsort(rng.random(chosen.shape) * 2 - chosen, axis=-1)[..., :width]
            told = np.full(guess.shape, -1, np.int16)
            told[:, :-distance] = guess[:, distance:]
            columns[f"{name}_{distance}"] = told
    return columns


# ---------------------------------------------------------------------- for tests.driver


def signals_of(shape: Shape, steps: Steps, seed: int = 0) -> GivenSignals:
    """Signals that go with `steps`: as few rows a step as hold its largest event."""
    layered: dict[str, list[Any]] = {}
    stepped: dict[str, list[Any]] = {}
    for index, step in enumerate(steps):
        experts = _rows(step, shape)
        columns = gate_columns(experts, shape.experts, np.random.default_rng((seed, index)))
        columns["experts"] = experts
        for name, values in columns.items():
            if name == "embedding":
                stepped.setdefault(name, []).append(values)
            else:
                layered.setdefault(name, []).append(values.swapaxes(0, 1))
        stepped.setdefault("request", []).append(np.full(len(experts), index // 4, np.int32))
        stepped.setdefault("phase", []).append(np.full(len(experts), index % 4 > 0, np.uint8))
    return GivenSignals(layered, stepped)


def _rows(step: Sequence[Sequence[int]], shape: Shape) -> NDArray[np.int16]:
    """A step's keys as expert ids [rows, L, k], -1 where an event has fewer."""
    largest = max(map(len, step), default=0)
    rows = max(1, -(-largest // shape.top_k))
    experts = np.full((shape.layers, rows * shape.top_k), -1, np.int16)
    for layer, keys in enumerate(step):
        experts[layer, : len(keys)] = [key % shape.experts for key in keys]
    return experts.reshape(shape.layers, rows, shape.top_k).swapaxes(0, 1)


def fit_of(shape: Shape, seed: int = 0, requests: int = 3, steps: int = 12) -> GivenFit:
    """Requests set aside, a prefill of two rows and then a row a step."""
    rng = np.random.default_rng((seed, 7))
    rows_of_step = [2 if step % steps == 0 else 1 for step in range(requests * steps)]
    step_of_row = np.repeat(np.arange(len(rows_of_step)), rows_of_step)
    skew = np.arange(shape.experts) / shape.experts / 2
    drawn = rng.random((len(step_of_row), shape.layers, shape.experts)) + skew
    width = max(1, min(shape.top_k, shape.experts - 1))  # some expert is always left out
    experts = np.argsort(drawn, axis=-1)[..., :width].astype(np.int16)
    return GivenFit(
        events=distinct(experts, step_of_row, len(rows_of_step), shape.experts, "last-use"),
        columns={"experts": experts, **gate_columns(experts, shape.experts, rng)},
        step_of_row=step_of_row,
        request_of_row=step_of_row // steps,
        phase_of_row=(step_of_row % steps != 0).astype(np.uint8),
    )


# ---------------------------------------------------------------------- for machines


class MemoryTrace:
    """Columns in memory, as :class:`sim.inputs.Inputs` reads a trace."""

    digest = "made up"

    def __init__(self, columns: dict[str, NDArray[Any]], num_experts: int) -> None:
        self._columns = columns
        geometry = SimpleNamespace(num_experts=num_experts)
        self.manifest: Any = SimpleNamespace(geometry=geometry, expert_norms=None)

    @property
    def rows(self) -> int:
        return len(self._columns["request"])

    def columns(self) -> list[str]:
        return list(self._columns)

    def requests(self) -> Any:
        raise NotImplementedError

    def load(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Any:
        return {name: self._columns[name][start:stop] for name in columns}


def inputs_of(columns: dict[str, NDArray[Any]], num_experts: int, seed: int = 0) -> Inputs:
    """Routing columns with everything else made up."""
    rng = np.random.default_rng((seed, 11))
    experts = columns["experts"]
    extra = {
        **gate_columns(experts, num_experts, rng),
        **prediction_columns(experts, num_experts, rng),
    }
    return Inputs(MemoryTrace({**columns, **extra}, num_experts))


def all_data(
    workload: Workload,
    others: Workload,
    shape: Shape,
    *,
    oracle: bool,
    costs: Costs | None = None,
    seed: int = 0,
) -> PolicyData:
    """All that a policy may know of `workload`; fitted ones learn from `others`."""
    inputs = inputs_of(_routing(workload), shape.experts, seed)
    others_inputs = inputs_of(_routing(others), shape.experts, seed + 1)
    fit = RecordedRows(others_inputs, others_inputs.workload())
    future: dict[str, Any] = {}
    if oracle:
        events = inputs.workload().events
        first = first_use(events, shape.keys)
        future = {"events": events, "next_use": next_use(events), "first_use": first}
    return PolicyData(
        shape,
        lookahead=lambda name, width: inputs.lookahead(name, width, "last-use"),
        columns=frozenset(inputs.trace.columns()),
        popularity=popularity(fit.workload),
        seed=seed,
        signals=inputs.signals("last-use"),
        fit=fit,
        costs=costs,
        **future,
    )


def _routing(workload: Workload) -> dict[str, NDArray[Any]]:
    return {name: workload.column(name) for name in BASE_COLUMNS}
