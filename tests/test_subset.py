"""A smaller trace from a larger one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from tests.traces import make_trace
from tracer.commands.subset import _parse_requests, subset_command
from tracer.manifest import TrainedPredictor, read_manifest, write_manifest
from tracer.subset import Choice, subset
from tracer.trace import Trace


@pytest.fixture(scope="module")
def sample() -> Trace:
    return Trace.open("sample")


def test_everything_kept_is_the_same_trace(sample: Trace, tmp_path: Path) -> None:
    copy = subset(sample, tmp_path / "copy", Choice())
    assert copy.columns() == sample.columns()
    assert copy.manifest.predictors == sample.manifest.predictors
    for name in sample.columns():
        np.testing.assert_array_equal(copy.load([name])[name], sample.load([name])[name])
    assert copy.requests().equals(sample.requests())
    assert "subset of trace" in copy.manifest.recording.notes
    if sample.manifest.timings:
        assert copy.timings().equals(sample.timings())


def test_requests_and_columns_are_chosen(sample: Trace, tmp_path: Path) -> None:
    small = subset(sample, tmp_path / "s", Choice(requests=(1, 3), drop=("gate_probs", "weights")))
    assert set(small.requests()["request"]) == {1, 3}
    assert not {"gate_probs", "weights"} & set(small.columns())
    whole = sample.load(["request", "experts", "step"])
    mine = np.isin(whole["request"], (1, 3))
    assert 0 < mine.sum() < len(mine)
    kept = small.load(["request", "experts", "step"])
    for name, values in kept.items():
        np.testing.assert_array_equal(values, whole[name][mine])
    if sample.manifest.timings:
        assert set(small.timings()["step"]) == set(kept["step"].tolist())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(requests=(99,)), "there is no request 99"),
        (Choice(drop=("experts",)), "'experts' cannot be dropped"),
        (Choice(drop=("nonsense",)), "no column 'nonsense'"),
        (Choice(hidden_share=1.5), r"hidden share 1\.5"),
    ],
)
def test_what_cannot_be_chosen(sample: Trace, tmp_path: Path, choice: Choice, message: str) -> None:
    with pytest.raises(UserError, match=message):
        subset(sample, tmp_path / "out", choice)
    assert not (tmp_path / "out").exists()


def test_a_share_of_the_gate_inputs(tmp_path: Path) -> None:
    make_trace(tmp_path / "t", requests=6, output=30, columns=("weights", "gate_inputs"))
    whole = Trace.open(tmp_path / "t")
    thin = subset(whole, tmp_path / "thin", Choice(hidden_share=0.25, seed=1))
    before, after = (t.load(["gate_inputs"])["gate_inputs"] for t in (whole, thin))
    there = ~np.isnan(after).any(axis=(1, 2))
    assert 0.1 < there.mean() < 0.4
    np.testing.assert_array_equal(after[there], before[there])
    assert np.isnan(after[~there]).all()
    few = subset(whole, tmp_path / "few", Choice(requests=(2,), hidden_share=0.25, seed=1))
    mine = thin.load(["request"])["request"] == 2
    np.testing.assert_array_equal(few.load(["gate_inputs"])["gate_inputs"], after[mine])


def test_thinned_gate_inputs_train_no_predictor(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    assert torch
    from tracer.predictor.pipeline import Options, train_predictor

    make_trace(tmp_path / "t", requests=6, output=30, columns=("weights", "gate_inputs"))
    thin = subset(Trace.open(tmp_path / "t"), tmp_path / "thin", Choice(hidden_share=0.5))
    with pytest.raises(UserError, match="gate inputs of some rows are missing"):
        train_predictor(thin, Options(stride=1, epochs=1))


def test_the_weights_of_a_predictor_stay_with_the_whole_trace(tmp_path: Path) -> None:
    whole = make_trace(tmp_path / "whole", columns=["weights", "learned_1"])
    manifest = read_manifest(whole.path)
    predictor = TrainedPredictor(
        column="learned_1",
        kind="promoe",
        stride=1,
        hidden_units=1,
        seed=0,
        trained_requests=(0, 2),
        weights_file="predictors/promoe_s1.safetensors",
        weights_sha256="0" * 64,
    )
    write_manifest(whole.path, manifest.model_copy(update={"predictors": (predictor,)}))
    part = subset(Trace.open(whole.path), tmp_path / "part", Choice(requests=(0, 1)))
    (kept,) = part.manifest.predictors
    assert kept.weights_file == "promoe_s1.safetensors"
    assert kept.trained_requests == (0,)


def test_a_part_of_a_recording_that_broke_off_says_so(tmp_path: Path) -> None:
    whole = make_trace(tmp_path / "whole")
    broken = read_manifest(whole.path).model_copy(update={"complete": False, "requests": None})
    write_manifest(whole.path, broken)
    part = subset(Trace.open(whole.path), tmp_path / "part", Choice(requests=(1,)))
    assert "a recording that broke off" in part.manifest.recording.notes


@pytest.mark.parametrize("drop", ["", "weights,,gate_probs", ","])
def test_columns_to_drop_are_named(tmp_path: Path, drop: str) -> None:
    with pytest.raises(UserError, match=r"--drop .* has an empty entry"):
        subset_command("sample", tmp_path / "out", drop=drop)
    assert not (tmp_path / "out").exists()


def test_ranges_of_requests() -> None:
    assert _parse_requests("0-2, 7") == (0, 1, 2, 7)
    for text in ("", "a", "3-", "-3", "5-2", "1,5-2", "0-99999999999"):
        with pytest.raises(UserError, match="--requests"):
            _parse_requests(text)
