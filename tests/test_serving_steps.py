"""A served run is the plain simulation of the steps that it formed, whatever policies read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import policies
from policies.core import DecisionCore
from sim import Point, run_point
from sim.inputs import Inputs
from sim.point import inputs_for
from sim.serving import Served, serve
from sim.serving.checks import Ledger
from tests.traces import ALL_COLUMNS, make_trace
from tracer.trace import Trace

Arrays = dict[str, Any]
SAME = (
    *("decode", "prefill", "prefetch", "quality", "breakdown_ms"),
    *("h2d_bytes", "copies", "chunks", "evictions", "collision_misses", "link_busy_share"),
    *("duration_ms", "tokens_per_s", "timing"),
)
POLICIES = [
    name
    for name in policies.names()
    if not policies.get(name).oracle and name != "promoe"  # it needs a trained predictor's column
]


class Recomposed:
    """A trace's rows in other steps, as :class:`sim.inputs.TraceSource`."""

    def __init__(self, trace: Trace, rows: Any, requests: Any, steps: Any) -> None:
        self._trace = trace
        self._rows = rows
        self._own = {"request": requests, "step": steps}
        self.manifest = trace.manifest
        self.digest = trace.digest

    @property
    def rows(self) -> int:
        return len(self._rows)

    def columns(self) -> list[str]:
        return self._trace.columns()

    def requests(self) -> pd.DataFrame:
        return self._trace.requests()

    def load(self, columns: Any, start: int = 0, stop: int | None = None) -> Arrays:
        loaded = self._trace.load([name for name in columns if name not in self._own])
        rows = {name: values[self._rows] for name, values in loaded.items()}
        return {**rows, **{name: self._own[name] for name in columns if name in self._own}}


class Noted:
    """Rows of the trace, their requests and steps, as the ledger is told of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.requests: list[int] = []
        self.steps: list[int] = []
        step = Ledger.step

        def note(ledger: Ledger, begin: int, rows: Any, shares: Any) -> None:
            number = self.steps[-1] + 1 if self.steps else 0
            self.rows += rows
            self.steps += [number] * len(rows)
            for request, count in shares:
                self.requests += [request.index] * count
            step(ledger, begin, rows, shares)

        monkeypatch.setattr(Ledger, "step", note)

    def recomposed(self, trace: Trace, judged: Any, fitted: Any) -> Recomposed:
        """The served steps, and before them the requests set aside, in steps of their own."""
        request = trace.load(["request", "step"])
        rows = np.flatnonzero(np.isin(request["request"], judged))[self.rows]
        aside = np.flatnonzero(np.isin(request["request"], fitted))
        step = np.unique(request["step"][aside], return_inverse=True)[1]
        after = 0 if len(aside) == 0 else int(step.max()) + 1
        names = np.array(self.requests, np.int32)
        return Recomposed(
            trace,
            np.concatenate((aside, rows)),
            np.concatenate((request["request"][aside] + 1000, names)).astype(np.int32),
            np.concatenate((step, np.array(self.steps) + after)).astype(np.int32),
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    columns = [name for name in ALL_COLUMNS if not name.startswith("learned")]
    path = tmp_path_factory.mktemp("steps") / "tiny"
    return make_trace(path, requests=8, columns=columns, seed=21)


RULES: dict[str, dict[str, Any]] = {
    "mixed": {"batch": 3, "prefill_chunk": 2},
    "apart": {"batch": 3, "mixed": False},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rules", RULES)
def test_steps_formed_while_time_runs_are_simulated_as_recorded_ones(
    policy: str, rules: str, tiny: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come at once, so there is no idle time, and the formed steps can be run as a trace."""
    path = tmp_path / "a.csv"
    lengths = [(5, 9), (2, 3), (4, 12), (5, 2), (1, 6), (3, 7), (5, 1), (4, 10), (2, 8), (5, 13)]
    rows = "".join(f"2023-11-16 18:10:00,{prompt},{output}\n" for prompt, output in lengths)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    share = "100%" if policy == "layer-stream" else "60%"
    budget = {} if policies.get(policy).needs_all else {"expert_budget": share}
    point = Point(policy=policy, hardware="rtx4090-pcie4", **budget)  # type: ignore[arg-type]
    original = inputs_for(tiny, point)
    noted = Noted(monkeypatch)
    served = serve(
        tiny,
        policy=policy,
        hardware="rtx4090-pcie4",
        arrivals=str(path),
        lengths="exact",
        **budget,
        **RULES[rules],
    ).result
    trace = noted.recomposed(tiny, original.judged, original.fitted_on)
    inputs = inputs_for(trace, point.model_copy(update={"fit_share": 0.0}))
    if original.fitted_on:
        fitted = [name + 1000 for name in original.fitted_on]
        judged = sorted(set(noted.requests))
        inputs = Inputs(trace, requests=judged, fit_requests=fitted)
    simulated = run_point(inputs, point)
    for name in SAME:
        assert served[name] == simulated[name], name
    # Means of the same numbers, summed up in another order.
    for name in ("tpot_ms", "itl_ms"):
        assert served[name] == pytest.approx(simulated[name], rel=1e-12), name
    assert served["batches"]["max"] == 3
    assert (served["batches"]["mixed_steps"] > 0) == (rules == "mixed")


def test_copies_go_on_while_nobody_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches that a step left behind land in the idle time after it, more than a window."""
    landings: list[int] = []
    chunk_done = DecisionCore.chunk_done

    def note(core: DecisionCore, copy: Any) -> bool:
        assert core.clock_ns is not None
        landings.append(core.clock_ns())
        return chunk_done(core, copy)

    monkeypatch.setattr(DecisionCore, "chunk_done", note)
    path = tmp_path / "a.csv"
    rows = "".join(f"2023-11-16 18:{minute}:00,4,5\n" for minute in (10, 11, 12))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    served = serve(
        "sample",
        policy="next-gate",
        params={"preempt": False, "overfetch": 2.0},
        link="4GB/s",
        hardware="rtx4090-pcie4",
        geometry="olmoe-1b-7b",
        expert_budget="75%",
        arrivals=str(path),
        lengths="exact",
        window=1,
    )
    idle = _gaps(served)
    assert len(idle) == 2
    for begin, end in idle:
        assert sum(begin < at < end for at in landings) > 1
    assert served.result["utilisation"] < 0.5


def _gaps(served: Served) -> list[tuple[int, int]]:
    ends = served.steps["end_ns"].to_numpy()[:-1]
    begins = served.steps["begin_ns"].to_numpy()[1:]
    return [(int(a), int(b)) for a, b in zip(ends, begins, strict=True) if b > a]
