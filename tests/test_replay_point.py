"""Points on a plain CPU: the same texts whatever is kept, the same decisions, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

import cli  # noqa: E402
from configs.errors import UserError  # noqa: E402
from policies.interface import Prediction  # noqa: E402
from replay.breakdown import predictions_ns  # noqa: E402
from replay.model import ReplayModel, from_checkpoint  # noqa: E402
from replay.play import Session  # noqa: E402
from replay.point import Replayed, decisions, predict_point, replay_point  # noqa: E402
from replay.validation.machine import _lines, _mean_times, host_times  # noqa: E402
from sim.inputs import Inputs  # noqa: E402
from sim.point import Point  # noqa: E402
from tests.machines import FlatTiming  # noqa: E402
from tracer.trace import Trace  # noqa: E402

ROWS = 52  # a prefill of 49 tokens, and 3 steps


@pytest.fixture(scope="module")
def twin(shared: Path) -> Iterator[ReplayModel]:
    ready = from_checkpoint(shared / "models" / "olmoe-twin", "cpu")
    yield ready
    ready.close()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(Trace.open("sample"), max_tokens=ROWS)


@pytest.fixture(scope="module")
def session(twin: ReplayModel, inputs: Inputs) -> Session:
    return Session(twin, inputs.workload("last-use").max_context)


@pytest.fixture(scope="module")
def resident(session: Session, inputs: Inputs) -> Replayed:
    return replay_point(session, inputs, Point(policy="resident", hardware="h200-pcie5"))


def point(policy: str, budget: str, **given: Any) -> Point:
    """A wide window: on a CPU a copy is there at once, so an event's experts come in few groups."""
    return Point(
        policy=policy, params=given, hardware="h200-pcie5", expert_budget=budget, window=64
    )


@pytest.mark.parametrize(
    ("policy", "budget", "given"),
    [
        ("lru", "12.5%", {}),
        ("belady", "25%", {}),
        ("next-gate", "25%", {"chunks": 3, "depth": 2}),
        ("pregated", "25%", {}),
    ],
)
def test_whatever_is_kept_the_model_says_the_same(
    session: Session,
    inputs: Inputs,
    resident: Replayed,
    policy: str,
    budget: str,
    given: dict[str, Any],
) -> None:
    found = replay_point(session, inputs, point(policy, budget, **given))
    assert found.measured.tokens == resident.measured.tokens
    assert len(set(found.measured.tokens)) > 1
    assert found.result["copied_bytes_measured"] == found.core.tally.copied_bytes > 0
    assert found.result["timing"] == "measured"
    parts = found.result["breakdown_ms"]
    told = sum(value for name, value in parts.items() if not name.startswith("stall"))
    assert told == pytest.approx(found.result["itl_ms"]["mean"], rel=0.02)


def test_the_simulator_decides_what_the_device_decided(session: Session, inputs: Inputs) -> None:
    found = replay_point(session, inputs, point("lru", "25%"))
    nbytes = session.ready.layout.nbytes
    simulated = predict_point(inputs, point("lru", "25%"), FlatTiming(), expert_bytes=nbytes)
    told = simulated.result
    assert found.log == decisions(simulated.core)
    assert told["decode"] == found.result["decode"]
    assert len(told["step_ms"]) == told["tokens"]["decode"]
    # The parts of a step are all of it, in a simulated run too.
    assert sum(told["host_ms"].values()) == pytest.approx(told["itl_ms"]["mean"], rel=1e-3)


def test_a_policys_host_times_are_of_decode_steps_and_of_prefills_apart(
    session: Session, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = host_times(replay_point(session, inputs, point("next-gate", "25%")))
    assert at_once.prediction_ns is None  # in the decision's time
    assert at_once.prefill_tokens == 49
    assert at_once.prefill_next_wave_ns is not None  # 64 experts do not fit at once
    assert at_once.prefill_decision_ns is not None
    assert at_once.prefill_decision_ns > at_once.decision_ns

    def second_look(prediction: Prediction, layer: int) -> Callable[[], bool]:
        looks = iter((False, True))
        return lambda: next(looks)

    monkeypatch.setattr("replay.driver._at_once", second_look)
    found = replay_point(session, inputs, point("next-gate", "25%"))
    layers, steps = 16, 4
    assert len(found.measured.predictions) == steps * (layers - 1)
    decode = np.array([False, True, True, True])
    assert len(predictions_ns(found.measured, decode)) == 3 * (layers - 1)
    assert len(predictions_ns(found.measured, ~decode)) == layers - 1
    times = host_times(found)
    assert times.prediction_ns is not None
    assert times.prefill_prediction_ns is not None
    assert 0 < times.prediction_ns < 10**7
    plain = host_times(replay_point(session, inputs, point("lru", "25%")))
    assert (plain.prediction_ns, plain.prefill_prediction_ns) == (None, None)
    # What one run has not counts for nothing in the mean.
    mean = _mean_times([times, times.model_copy(update={"prediction_ns": None})])
    assert mean == times


@pytest.mark.parametrize(
    ("counts", "times", "expected"),
    [
        ([1, 2, 4], [7.0, 9.0, 13.0], (2.0, 5.0)),
        ([2, 2], [7.0, 9.0], (0.0, 8.0)),  # nothing says what one more costs
        ([1, 3], [9.0, 5.0], (0.0, 7.0)),  # more awaited cannot cost less
        ([2, 4], [1.0, 9.0], (5 / 3, 0.0)),  # none awaited cannot cost less than nothing
    ],
)
def test_a_line_through_decisions_keeps_their_mean(
    counts: list[int], times: list[float], expected: tuple[float, float]
) -> None:
    group = np.array(counts), np.array(times)
    nothing = np.array([], np.int64), np.array([])
    for groups in ([group], [group, nothing]):
        slope, levels = _lines(groups)
        assert (slope, levels[0]) == pytest.approx(expected)
        assert levels[0] + slope * np.mean(counts) == pytest.approx(np.mean(times))
        assert levels[1:] in ([], [0.0])


def test_first_and_later_waves_have_one_slope() -> None:
    first = np.array([4, 8, 12]), np.array([48.0, 56.0, 64.0])
    later = np.array([2, 6]), np.array([7.0, 15.0])
    assert _lines([first, later]) == (pytest.approx(2.0), pytest.approx([40.0, 3.0]))
    # A slope of 2 is more than these later waves take: it is what they take at most.
    quick = np.array([4, 8]), np.array([6.0, 6.0])
    slope, levels = _lines([first, quick])
    assert (slope, levels) == (pytest.approx(1.0), pytest.approx([48.0, 0.0]))


def test_what_the_engine_cannot_run_is_said(session: Session, inputs: Inputs) -> None:
    with pytest.raises(UserError, match="swapmoe changes the routing"):
        replay_point(session, inputs, point("swapmoe", "25%"))
    with pytest.raises(UserError, match="--link-scale emulates a slower link on CUDA only"):
        replay_point(session, inputs, point("lru", "25%"), link_scale=2.0)


def test_the_command_tells_what_it_measured(shared: Path) -> None:
    model = str(shared / "models" / "olmoe-twin")
    options = "--trace sample --policy lru --hardware h200-pcie5 --max-tokens 51 --window 64"
    command = ["replay", "--model", model, *options.split(), "--expert-budget", "25%"]
    command += ["--device", "cpu"]
    told = CliRunner().invoke(cli.app, command)
    assert told.exit_code == 0, told.output
    assert "256 expert slots" in told.output
    assert "Weights are the checkpoint's." in told.output


def test_the_commands_json_is_of_a_measurement(shared: Path) -> None:
    model = str(shared / "models" / "olmoe-twin")
    options = "--trace sample --policy resident --hardware h200-pcie5 --max-tokens 50 --json"
    command = ["replay", "--model", model, *options.split(), "--device", "cpu"]
    result = json.loads(CliRunner().invoke(cli.app, command).stdout)
    told = (result["weights"], result["device"], result["timing"])
    assert told == ("checkpoint", "cpu", "measured")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "give --model DIRECTORY or --geometry NAME"),
        ("--geometry olmoe-1b-7b --link-scale 0.5", "--link-scale 0.5"),
        ("--geometry olmoe-1b-7b --device cuda", "PyTorch sees no GPU here"),
    ],
)
def test_bad_options_are_one_line(options: str, said: str) -> None:
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("there is a GPU")
    base = "replay --trace sample --policy lru --hardware h200-pcie5 --expert-budget 25%"
    told = CliRunner().invoke(cli.app, [*base.split(), *options.split()])
    assert isinstance(told.exception, UserError)
    assert said in str(told.exception)


def test_a_sliding_window_is_kept_by_the_mask_over_a_cache_of_full_length() -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    from replay.play import static_cache

    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=50,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(1, 15)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        cache = static_cache(config, 16)
        pieces = [(0, 5), *((at, at + 1) for at in range(5, 14))]
        found = [
            model(tokens[:, first:last], past_key_values=cache, use_cache=True).logits
            for first, last in pieces
        ]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
