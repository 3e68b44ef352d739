"""What docs/policies.md is computed from: who is judged, means by token, variants of a machine."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.inputs import set_aside
from tests.bench.results_source import open_source, share_of
from tests.bench.results_sweeps import MACHINE, choice
from tests.bench.results_tables import TIME, by_token, cpu_labels
from tests.bench.results_variants import at_ratio, eager, link_to_compute, resident_ms, thinned


@given(st.integers(40, 200), st.integers(1, 8), st.integers(1, 12))
def test_fewer_requests_set_aside_leave_the_same_ones_judged(
    count: int, judges: int, kept: int
) -> None:
    requests = [3 * number + 1 for number in range(count)]
    fitted = set_aside(requests, share_of(count, judges))
    judged = [request for request in requests if request not in set(fitted)]
    assert len(judged) == judges
    chosen = thinned(requests, judged, kept)
    again = set_aside(chosen, share_of(len(chosen), judges))
    assert len(again) == kept
    assert sorted(set(chosen) - set(again)) == judged


def test_too_few_requests_between_judged_ones() -> None:
    with pytest.raises(ValueError, match="between two judged ones"):
        thinned([0, 1, 2, 3], [1, 2], 7)


def test_times_are_means_over_tokens() -> None:
    frame = pd.DataFrame({"tpot_ms.mean": [1.0], "itl_ms.mean": [2.0]})
    assert by_token(frame)[TIME].tolist() == [2.0]
    assert frame["tpot_ms.mean"].tolist() == [1.0]


def test_a_policy_that_uses_the_cpu_somewhere_is_one_that_does() -> None:
    """fiddler on a fast link computes nothing there, but is no policy without the CPU."""
    points = pd.DataFrame(
        {
            "label": ["fiddler", "fiddler", "lru"],
            "decode.cpu": [5, 0, 0],
            "prefill.cpu": [0.0, float("nan"), 0.0],
        }
    )
    assert cpu_labels(points) == {"fiddler"}


@pytest.mark.parametrize("ratio", [2.0, 10.0, 23.0])
def test_a_machine_of_a_given_ratio_has_it(tmp_path: Path, ratio: float) -> None:
    source = open_source("sample")
    variant = at_ratio(MACHINE, source, tmp_path, ratio)
    assert link_to_compute(source, variant) == pytest.approx(ratio, rel=1e-3)


def test_an_eager_step_takes_as_long_as_was_measured(tmp_path: Path) -> None:
    source = open_source("sample")
    assert resident_ms(source, eager(MACHINE, source, tmp_path)) == pytest.approx(19.0, rel=1e-3)


def test_labels_and_choices_are_each_others_inverse() -> None:
    chosen = choice("promoe order=id preempt=False overfetch=1.5 stride=2")
    assert chosen.set == {"order": "id", "preempt": False, "overfetch": 1.5, "stride": 2}
