"""What a policy is shown of the step in progress, and of requests set aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sim.inputs import Inputs
from tests.traces import make_trace
from tracer.trace import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path: Path = tmp_path_factory.mktemp("signals") / "trace"
    make_trace(path, layers=3, experts=8, top_k=2, requests=6, prompt=4, output=5, seed=3)
    return Trace.open(path)


def test_gates_are_shown_once_they_have_run(trace: Trace) -> None:
    inputs = Inputs(trace)
    workload = inputs.workload()
    signals = inputs.signals("last-use")
    for step in (0, 1, workload.num_steps - 1):
        signals.begin_step(step)
        with pytest.raises(LookupError, match="weights of layer 0: the step has reached -1"):
            signals.layer_rows("weights", 0)
        signals.reach(1)
        mine = workload.step_of_row == step
        weights = trace.load(["weights"])["weights"][mine]
        np.testing.assert_array_equal(signals.layer_rows("weights", 1), weights[:, 1])
        with pytest.raises(LookupError, match="layer 2"):
            signals.layer_rows("weights", 2)
        assert len(signals.step_rows("request")) == mine.sum()
        with pytest.raises(LookupError, match="by layer only"):
            signals.step_rows("weights")


def test_set_aside_and_judged_rows_do_not_meet(trace: Trace) -> None:
    inputs = Inputs(trace, fit_share=0.4)
    fit = inputs.fit()
    assert fit is not None
    learned, judged = set(fit.request_of_row.tolist()), set(inputs.judged)
    assert learned == set(inputs.fitted_on)
    assert not learned & judged
    signals = inputs.signals("last-use")
    seen = set()
    for step in range(inputs.workload().num_steps):
        signals.begin_step(step)
        seen |= set(signals.step_rows("request").tolist())
    assert seen == judged
    assert len(fit.column("weights")) == len(fit.step_of_row) == len(fit.phase_of_row)
    assert Inputs(trace).fit() is None
