"""On a GPU: what a policy brings into the slots is what the model computes with.

`MOESIM_TWIN=DIR pytest -m gpu tests/test_replay_gpu.py` runs a checkpoint of 16 x 64, top-8 or
24 x 60, top-4; the sample's routing drives the first, `MOESIM_TRACE=DIR` another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import policies  # noqa: E402
from policies.errors import PolicyError  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here"),
]
ROWS = 260
BUDGETS = ("12.5%", "25%", "50%")


def lossless_on_gpu() -> list[str]:
    """Causal or not, with the CPU or without: all that change nothing."""
    found = []
    for name in policies.names():
        info = policies.get(name)
        if info.lossless and not info.needs_all:
            found.append(name)
    return found


@pytest.fixture(scope="module")
def twin() -> Iterator[Any]:
    from replay.model import from_checkpoint

    path = os.environ.get("MOESIM_TWIN")
    if path is None:
        pytest.skip("MOESIM_TWIN names no checkpoint")
    ready = from_checkpoint(Path(path), "cuda")
    yield ready
    ready.close()


@pytest.fixture(scope="module")
def inputs() -> Any:
    from sim.inputs import Inputs
    from tracer.trace import Trace

    trace = Trace.open(os.environ.get("MOESIM_TRACE", "sample"))
    return Inputs(trace, max_tokens=ROWS, fit_share=0.4)


@pytest.fixture(scope="module")
def session(twin: Any, inputs: Any) -> Any:
    from replay.play import Session

    # Of the tests some decode texts of their own.
    session = Session(twin, max(inputs.workload("last-use").max_context, 128))
    yield session
    session.close()


def logits(session: Any, inputs: Any, point: Any) -> Any:
    """Of every step, float32 [steps, vocabulary]."""
    from replay.play import Replay
    from replay.point import forced_steps
    from sim.point import make_core, resolve_point

    setting = resolve_point(inputs, point, expert_bytes=session.ready.layout.nbytes)
    steps = forced_steps(inputs, setting.workload, session.vocabulary)
    measured = Replay(session, make_core(inputs, setting)).run(steps, keep_logits=True)
    return torch.stack(measured.logits)


def require_near(session: Any, inputs: Any, point: Any, resident: Any) -> None:
    """A CPU sums in another order than the GPU's kernels: equal but for rounding, and for ties."""
    found, expected = (logits(session, inputs, each) for each in (point, resident))
    gap = float((found - expected).abs().max())
    assert gap <= 0.05 * float(expected.abs().max())
    greedy, best = found.argmax(-1), expected.argmax(-1)
    apart = torch.nonzero(greedy != best).flatten().tolist()
    margins = [float(expected[at, best[at]] - expected[at, greedy[at]]) for at in apart]
    print(f"{point.label} {point.expert_budget}: largest gap {gap:.4f}, apart {apart}, {margins}")
    assert all(margin <= 2 * gap for margin in margins)


def run(session: Any, inputs: Any, policy: str, budget: str | None) -> Any:
    from replay.point import replay_point
    from sim.point import Point

    point = Point(policy=policy, hardware="h200-pcie5", expert_budget=budget)
    return replay_point(session, inputs, point)


@pytest.fixture(scope="module")
def resident(session: Any, inputs: Any) -> Any:
    return run(session, inputs, "resident", None)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("policy", lossless_on_gpu())
def test_greedy_tokens_are_those_of_the_resident_model(
    session: Any, inputs: Any, resident: Any, policy: str, budget: str
) -> None:
    from replay.point import decisions, predict_point
    from tests.machines import FlatTiming

    try:
        found = run(session, inputs, policy, budget)
    except PolicyError as error:
        pytest.skip(str(error))
    if found.core.uses_cpu:
        require_near(session, inputs, found.setting.point, resident.setting.point)
    else:
        assert found.measured.tokens == resident.measured.tokens
    info = policies.get(policy)
    if not (info.time_dependent or info.prefetches):
        simulated = predict_point(
            inputs,
            found.setting.point,
            FlatTiming(),
            expert_bytes=session.ready.layout.nbytes,
        )
        assert found.log == decisions(simulated.core)
        assert found.core.tally == simulated.core.tally


def test_an_emulated_links_scratch_is_no_memory_of_the_policy(session: Any, inputs: Any) -> None:
    from replay.point import replay_point
    from sim.point import Point

    point = Point(policy="lru", hardware="h200-pcie5", expert_budget="25%")
    peaks = [
        replay_point(session, inputs, point, link_scale=scale).result["peak_memory_bytes"]
        for scale in (1.0, 2.2)
    ]
    assert abs(peaks[1] - peaks[0]) <= 512  # the allocator's unit


def test_logits_are_near_those_of_the_unmodified_model(twin: Any, session: Any) -> None:
    """Its own routing, token by token, against transformers' eager run of the same text."""
    from transformers import AutoModelForCausalLM

    from replay.play import ForcedStep, Replay
    from tests.test_replay import make_core

    tokens = np.arange(40, 104)
    steps = [
        ForcedStep(index, False, (0,) if index == 0 else (), (), tokens[index : index + 1], None)
        for index in range(len(tokens))
    ]
    replay = Replay(session, make_core(twin, "lru", 0.25))
    measured = replay.run(steps, keep_logits=True)
    whole = AutoModelForCausalLM.from_pretrained(
        os.environ["MOESIM_TWIN"], dtype=torch.bfloat16, device_map="cuda"
    ).eval()
    with torch.inference_mode():
        expected = whole(torch.from_numpy(tokens)[None].cuda()).logits[0].float().cpu()
    found = torch.stack(measured.logits)
    gap = (found - expected).abs()
    # Rounding in bfloat16 of sums in another order: 8 bits of mantissa of the largest logits.
    assert float(gap.max()) <= 0.05 * float(expected.abs().max())
    greedy, best = found.argmax(-1), expected.argmax(-1)
    apart = torch.nonzero(greedy != best).flatten().tolist()
    margins = [float(expected[at, best[at]] - expected[at, greedy[at]]) for at in apart]
    print(f"largest gap {float(gap.max()):.4f}, tokens apart {apart}, margins {margins}")
    assert all(margin <= 2 * float(gap.max()) for margin in margins)


@pytest.fixture(scope="module")
def steps(session: Any, inputs: Any) -> Any:
    from replay.point import forced_steps

    return forced_steps(inputs, inputs.workload("last-use"), session.vocabulary)[:40]


def checked(session: Any, steps: Any) -> list[int]:
    """Greedy tokens where copies take half a millisecond each, and slots hold NaNs until then."""
    from replay.play import Replay
    from tests.test_replay import make_core

    core = make_core(session.ready, "lru", 0.125)
    return Replay(session, core, link_scale=500, check=True).run(steps).tokens


def test_a_predictions_time_is_told_within_waits(session: Any, inputs: Any) -> None:
    from replay.validation.machine import host_times

    found = run(session, inputs, "next-gate", "25%")
    times = host_times(found)
    print(times)
    assert times.prediction_ns is not None
    assert 1_000 < times.prediction_ns < 10**6
    assert times.prefill_decision_ns is not None
    assert times.prefill_decision_ns > times.decision_ns
    assert len(found.measured.predictions) > len(found.measured.times.begin)


def test_slow_copies_are_waited_for(session: Any, steps: Any, resident: Any) -> None:
    assert checked(session, steps) == resident.measured.tokens[: len(steps)]


def test_a_planted_race_is_caught(
    session: Any, steps: Any, resident: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are taken for landed as soon as they are handed over; prefill, and decode alone."""
    from replay.cuda_driver import CopyStream
    from replay.slots import SlotRaceError

    def landed(self: Any, event: int) -> bool:
        self._idle.append(event)
        return True

    with monkeypatch.context() as planted:
        planted.setattr(CopyStream, "landed", landed)
        with pytest.raises(SlotRaceError, match="layer"):
            checked(session, steps)
        decode = [step for step in steps if not step.prefill]
        decode[0] = replace(decode[0], begins=(0,))
        with pytest.raises(SlotRaceError, match="step"):
            checked(session, decode)
    assert checked(session, steps) == resident.measured.tokens[: len(steps)]


def test_no_gpu_memory_is_told_and_the_session_goes_on(session: Any, inputs: Any) -> None:
    import gc

    from configs.errors import UserError

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    hogs = []
    for size in (2**30, 2**26, 2**23):
        try:
            while True:
                hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue
    with pytest.raises(UserError, match=r"the GPU is out of memory for .* expert slots .* free"):
        run(session, inputs, "lru", "50%")
    hogs.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert run(session, inputs, "lru", "50%").measured.tokens


def test_the_cpu_lanes_results_reach_their_places_and_its_times_are_told(session: Any) -> None:
    """Against the same sums on the CPU; then what the simulator asks of the lane."""
    from replay.calibrate.lane import cpu_times
    from replay.gated import compute, form_of

    lane, ready = session.lane(), session.ready
    top_k, rows = ready.top_k, 5
    ids = np.stack([np.arange(row, row + top_k) for row in range(rows)])
    hidden = torch.randn((rows, lane.width), device="cuda").to(torch.bfloat16)
    out = torch.full((rows * top_k, lane.width), float("nan"), device="cuda").to(torch.bfloat16)
    wanted = [4, 1]
    lane.start(3, wanted, ids, hidden)
    while not lane.done():
        pass
    lane.finish(out)
    found = out.cpu()
    views = ready.layout.views(ready.store.memory[3])
    form = form_of(ready.modules[0], views)
    assert form is not None
    for place, expert in enumerate(ids.reshape(-1).tolist()):
        if expert not in wanted:
            assert found[place].isnan().all()
            continue
        parts = {name: view[expert] for name, view in views.items()}
        expected = compute(form, parts, hidden[place // top_k][None].cpu())[0]
        torch.testing.assert_close(found[place], expected, rtol=0.02, atol=1e-3)
    times = cpu_times(session, readback_ns=8_000)
    print(times)
    assert 0 < times.start_ns < 10**6
    assert times.ns(top_k, top_k) > times.ns(1, 1) > 0


@pytest.mark.parametrize(
    ("policy", "budget", "link_scale"),
    [("lru", "12.5%", 1.0), ("lru", "50%", 2.2), ("next-gate", "25%", 1.0)],
)
def test_peak_memory_is_what_was_calibrated(
    session: Any, inputs: Any, policy: str, budget: str, link_scale: float
) -> None:
    """The workspace measured with few slots and made-up routing, at other slots, on a trace."""
    import gc

    from replay.calibrate.model import ModelRig, held_bytes
    from replay.point import replay_point
    from sim.point import Point

    session.predictors()
    largest = inputs.workload("last-use").max_step_tokens
    workspace = ModelRig(session, 8_000).workspace_bytes(largest)
    gc.collect()
    torch.cuda.empty_cache()
    point = Point(policy=policy, hardware="h200-pcie5", expert_budget=budget)
    found = replay_point(session, inputs, point, link_scale=link_scale).result
    rest = found["peak_memory_bytes"] - held_bytes(session, found["memory"]["slots"])
    print(f"{policy} {budget} x{link_scale:g}: workspace {workspace}, in the run {rest}")
    assert workspace == pytest.approx(rest, rel=0.03)


# ---------------------------------------------------------------------- batches

BATCH = 4


@pytest.fixture(scope="module")
def batches(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Five requests of many lengths, four and one at a time, recorded here by the twin itself."""
    from sim.inputs import Inputs
    from tests.recorded import record_batches

    with pytest.MonkeyPatch.context() as monkeypatch:
        trace = record_batches(
            Path(os.environ["MOESIM_TWIN"]),
            tmp_path_factory.mktemp("trace") / "batches",
            monkeypatch,
            batch=BATCH,
            device="cuda",
        )
    return Inputs(trace)


@pytest.fixture(scope="module")
def batch_session(twin: Any, batches: Any) -> Any:
    from replay.play import Session

    # Calibration decodes 60 steps.
    session = Session.for_workloads(twin, batches.workload("last-use"), at_least=80)
    yield session
    session.close()


@pytest.fixture(scope="module")
def batch_resident(batch_session: Any, batches: Any) -> Any:
    return run(batch_session, batches, "resident", None)


@pytest.mark.parametrize("policy", ["lru", "on-demand", "next-gate"])
def test_a_batchs_tokens_are_those_of_the_resident_model(
    batch_session: Any, batches: Any, batch_resident: Any, policy: str
) -> None:
    from replay.point import decisions, predict_point
    from tests.machines import FlatTiming

    assert batch_session.rows == BATCH
    found = run(batch_session, batches, policy, "50%")
    steps = list(batches.workload("last-use").steps())
    assert len(found.measured.tokens) == sum(len(step.requests) for step in steps)
    assert found.measured.tokens == batch_resident.measured.tokens
    if policy == "next-gate":
        return
    simulated = predict_point(
        batches,
        found.setting.point,
        FlatTiming(),
        expert_bytes=batch_session.ready.layout.nbytes,
    )
    assert found.log == decisions(simulated.core)
    assert found.core.tally == simulated.core.tally


@pytest.mark.parametrize("policy", ["fiddler", "hybrid-split", "auto"])
def test_a_batch_is_near_the_resident_model_whoever_computes(
    batch_session: Any, batches: Any, batch_resident: Any, policy: str
) -> None:
    """Lines that have ended are idle: the CPU's results go to those that run."""
    from replay.point import decisions, predict_point
    from sim.inputs import Inputs
    from tests.machines import FlatTiming

    first = Inputs(batches.trace, fit_requests=(4,))
    found = run(batch_session, first, policy, "25%")
    require_near(batch_session, first, found.setting.point, batch_resident.setting.point)
    assert found.result["decode"]["cpu"] + found.result["prefill"]["cpu"] > 0
    if policy == "auto":
        return
    nbytes = batch_session.ready.layout.nbytes
    simulated = predict_point(first, found.setting.point, FlatTiming(), expert_bytes=nbytes)
    assert found.log == decisions(simulated.core)
    assert found.core.tally == simulated.core.tally


def test_idle_lines_are_no_race_and_one_in_a_batch_is_caught(
    batch_session: Any, batches: Any, batch_resident: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NaNs that a race leaves behind do not reach the next run, in idle lines neither."""
    from replay.cuda_driver import CopyStream
    from replay.point import forced_steps
    from replay.slots import SlotRaceError

    steps = forced_steps(batches, batches.workload("last-use"), batch_session.vocabulary)
    assert any(len(step.lines) < BATCH for step in steps)
    assert checked(batch_session, steps) == batch_resident.measured.tokens

    def landed(self: Any, event: int) -> bool:
        self._idle.append(event)
        return True

    second = next(step.index for step in steps[1:] if step.begins)
    decode = [step for step in steps[:second] if not step.prefill]
    decode[0] = replace(decode[0], begins=tuple(range(BATCH)))
    with monkeypatch.context() as planted:
        planted.setattr(CopyStream, "landed", landed)
        with pytest.raises(SlotRaceError, match="step"):
            checked(batch_session, decode)
    assert checked(batch_session, steps) == batch_resident.measured.tokens


def test_a_batchs_lane_is_calibrated_with_its_lines(batch_session: Any) -> None:
    from replay.calibrate.lane import cpu_times

    times = cpu_times(batch_session, readback_ns=8_000)
    print(times)
    assert 0 < times.start_ns < 10**6
    assert times.combine_ns >= 0


def test_a_batchs_logits_are_near_those_of_the_plain_model(
    twin: Any, batch_session: Any, batches: Any
) -> None:
    """Decoded in graphs with padding masked, against one pass over the whole padded batch."""
    from replay.play import Replay
    from replay.point import MODEL, agreement, forced_steps
    from tests.recorded import plain_logits
    from tests.test_replay import make_core

    workload = batches.workload("last-use")
    steps = forced_steps(batches, workload, batch_session.vocabulary, MODEL)
    replay = Replay(batch_session, make_core(twin, "lru", 0.5))
    measured = replay.run(steps, keep_logits=True, keep_routing=True)
    found = torch.stack(measured.logits)
    path = Path(os.environ["MOESIM_TWIN"])
    expected = torch.stack(plain_logits(path, steps, BATCH, "cuda"))
    gap = float((found - expected).abs().max())
    share = agreement(workload, measured)
    print(f"largest gap {gap:.4f} of {float(expected.abs().max()):.2f}, routing {share:.4f}")
    assert gap <= 0.05 * float(expected.abs().max())
    assert share > 0.98


def test_a_batch_is_calibrated_with_its_own_size(batch_session: Any, batches: Any) -> None:
    from configs.hardware import load_hardware
    from replay.validation.machine import model_times
    from sim.calibrated import CalibratedTiming

    hardware = load_hardware("h200-pcie5")
    geometry = batches.manifest.geometry
    times = model_times(batch_session, hardware, geometry.name, "bf16", (32,), "here", "a test")
    assert times.batches == (BATCH,)
    assert times.workspace_bytes is not None
    assert times.workspace_bytes > 0
    decode, prefill = times.passes
    assert (prefill.tokens, prefill.requests) == (32, BATCH)
    assert decode.experts[-1].experts == BATCH * batch_session.ready.top_k
    assert decode.experts[0].beside_ns == times.experts_beside_ns
    assert decode.experts[-1].beside_ns is not None
    assert sum(decode.segment_ns) > 0
    timing = CalibratedTiming(geometry, hardware, times, batch=BATCH)
    assert timing.segment_ns(1, 3, 3, 80) == decode.segment_ns[1]
    print(decode.host, [each.ns for each in decode.experts])
