"""Experts on the CPU: right results from a process of its own, which ends when it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import cli  # noqa: E402
import replay.cpu_lane  # noqa: E402
from configs.errors import UserError  # noqa: E402
from replay.calibrate.lane import LaneRig  # noqa: E402
from replay.cpu_lane import CpuLane, default_threads  # noqa: E402
from replay.model import ReplayModel, from_checkpoint, synthetic  # noqa: E402
from replay.play import Session  # noqa: E402
from replay.point import decisions, predict_point, replay_point  # noqa: E402
from replay.shared_memory import SharedMemory  # noqa: E402
from replay.validation.run import first_difference  # noqa: E402
from sim.inputs import Inputs  # noqa: E402
from sim.point import Point  # noqa: E402
from tests.machines import FlatTiming  # noqa: E402
from tests.tiny_models import COMMON, CONFIGS  # noqa: E402
from tests.traces import make_trace  # noqa: E402
from tracer.trace import Trace  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the lane needs Linux")

ROWS = 6
KINDS = {
    "olmoe": (OlmoeExperts, CONFIGS["olmoe"]),
    "gpt_oss": (
        GptOssExperts,
        {
            "num_hidden_layers": 2,
            "head_dim": 8,
            "intermediate_size": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def tiny(family: str) -> ReplayModel:
    """Random experts, large enough that the clamps of gpt-oss are reached."""
    config = type(transformers.AutoConfig.for_model(family))(**{**COMMON, **KINDS[family][1]})
    ready = synthetic(config, "cpu")
    ready.store.fill_random(seed=1, scale=0.7)
    return ready


@pytest.fixture(scope="module", params=list(KINDS))
def ready(request: pytest.FixtureRequest) -> Iterator[ReplayModel]:
    found = tiny(request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def lane(ready: ReplayModel) -> Iterator[CpuLane]:
    found = CpuLane(ready, ROWS, threads=1)
    yield found
    found.close()


def wait_for(lane: CpuLane) -> None:
    until = time.monotonic() + 60
    while not lane.done():
        assert time.monotonic() < until


def library_says(ready: ReplayModel, layer: int, expert: int, hidden: Any) -> Any:
    """One expert for all rows, by transformers' plain loop over the same weights."""
    family = ready.model.config.model_type
    module = KINDS[family][0](ready.model.config).to(torch.bfloat16)
    views = ready.layout.views(ready.store.memory[layer])
    module.load_state_dict({name: view.clone() for name, view in views.items()})
    module.config._experts_implementation = "eager"
    ids = torch.full((len(hidden), 1), expert)
    with torch.inference_mode():
        return module(hidden, ids, torch.ones((len(hidden), 1), dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, ROWS])
def test_results_are_those_of_the_library_and_go_to_their_places(
    ready: ReplayModel, lane: CpuLane, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    for layer in range(len(ready.modules)):
        ids = rng.permuted(np.tile(np.arange(ready.num_experts), (rows, 1)), axis=1)[:, :3]
        hidden = torch.randn((rows, 32)).to(torch.bfloat16)
        wanted = np.unique(ids)[::-2].tolist()  # in no order of the ids
        out = torch.full((rows * 3, 32), float("nan"), dtype=torch.bfloat16)
        lane.start(layer, wanted, ids, hidden)
        wait_for(lane)
        lane.finish(out)
        for place, expert in enumerate(ids.reshape(-1).tolist()):
            if expert not in wanted:
                assert out[place].isnan().all()
                continue
            token = hidden[place // 3][None]
            expected = library_says(ready, layer, expert, token)[0]
            # Both round to 8 bits; the library rounds the clamped activation more often.
            gap = (out[place].float() - expected.float()).abs().max()
            assert gap <= 0.02 * expected.float().abs().max()


def test_idle_lines_of_a_batch_are_left_alone(ready: ReplayModel, lane: CpuLane) -> None:
    ids = np.array([[2, 0, 1], [-1, -1, -1], [1, 3, 0], [-1, -1, -1], [0, 1, 4]])
    hidden = torch.randn((5, 32)).to(torch.bfloat16)
    hidden[[1, 3]] = float("nan")
    out = torch.full((15, 32), float("nan"), dtype=torch.bfloat16)
    lane.start(1, [3, 1], ids, hidden)
    wait_for(lane)
    lane.finish(out)
    assert torch.isfinite(out).all(1).nonzero()[:, 0].tolist() == [2, 6, 7, 13]
    expected = library_says(ready, 1, 3, hidden[2][None])[0].float()
    assert (out[7].float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.fixture(scope="module")
def olmoe() -> Iterator[ReplayModel]:
    found = tiny("olmoe")
    yield found
    found.close()


def test_close_leaves_no_process(olmoe: ReplayModel) -> None:
    lane = CpuLane(olmoe, ROWS, threads=1)
    assert lane.process.poll() is None
    lane.close()
    assert lane.process.returncode == 0


def test_a_lane_that_nobody_closed_ends_with_it(olmoe: ReplayModel) -> None:
    lane = CpuLane(olmoe, ROWS, threads=1)
    process = lane.process
    del lane
    assert process.returncode == 0


def test_a_worker_that_dies_is_an_error(olmoe: ReplayModel) -> None:
    lane = CpuLane(olmoe, ROWS, threads=1)
    lane.process.kill()
    lane.process.wait()
    lane.start(0, [1], np.array([[0, 1]]), torch.zeros((1, 32), dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"has ended \(exit code -9\)"):
        wait_for(lane)
    lane.close()


def test_a_worker_that_is_stopped_is_an_error(
    olmoe: ReplayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay.cpu_lane, "_ANSWER_S", 0.2)
    lane = CpuLane(olmoe, ROWS, threads=1)
    lane.process.send_signal(signal.SIGSTOP)
    lane.start(0, [1], np.array([[0, 1]]), torch.zeros((1, 32), dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"has not answered for 0\.2 s"):
        wait_for(lane)
    lane.process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(replay.cpu_lane, "_ANSWER_S", 60)  # of a machine that is busy
    wait_for(lane)  # it did no harm
    lane.close()
    lane.close()
    assert lane.process.returncode == 0


ORPHAN = """
import os
from tests.test_cpu_lane import CpuLane, tiny
lane = CpuLane(tiny("olmoe"), 2, threads=1)
print(lane.process.pid, flush=True)
os._exit(1)
"""


def test_a_worker_ends_with_the_engine() -> None:
    told = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, check=False)
    pid = int(told.stdout)
    until = time.monotonic() + 20
    while runs(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """A zombie does not run: nobody here may have asked how it ended."""
    facts = Path(f"/proc/{pid}/stat")
    try:
        return facts.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_machines_profile_has_no_lane(tmp_path: Path) -> None:
    command = ["calibrate", "--out", str(tmp_path / "mine.yaml"), "--cpu"]
    told = CliRunner().invoke(cli.app, command)
    assert isinstance(told.exception, UserError)
    assert "--cpu and --cpu-threads go with --geometry" in str(told.exception)


def test_threads_leave_room_for_the_engine() -> None:
    assert 1 <= default_threads() <= max(len(os.sched_getaffinity(0)) - 2, 1)


def test_the_host_is_asked_before_it_is_too_late() -> None:
    with pytest.raises(UserError, match=r"many experts: needs 64\.00 TiB of host memory"):
        SharedMemory(64 * 2**40, "many experts")


def test_groups_are_timed_by_experts_and_by_tokens(olmoe: ReplayModel) -> None:
    session = Session(olmoe, ROWS, cpu_threads=1)
    try:
        rig = LaneRig(session, readback_ns=0)
        groups = list(rig.groups())
        assert rig.start_ns() > 0
    finally:
        session.close()
    kinds = [(each.experts, each.tokens) for each in groups]
    most = olmoe.num_experts
    wide = [count for count in (2, 3, 6, 12) if count <= most]
    assert kinds == [(1, 1), (1, 2), (1, 4), *((count, 1) for count in wide)]
    assert all(each.ns > 0 for each in groups)


def test_a_batchs_lane_has_room_for_its_longest_step(olmoe: ReplayModel) -> None:
    session = Session(olmoe, ROWS, rows=2, most_tokens=5, cpu_threads=1)
    assert Session(olmoe, ROWS, rows=2).most_tokens == 2 * ROWS
    try:
        rig = LaneRig(session, readback_ns=0)
        assert [each.tokens for each in rig.groups() if each.experts == 1] == [1, 2, 4]
        assert rig.start_ns() > 0
    finally:
        session.close()


# ---------------------------------------------------------------------- whole points


TWINS = {
    "olmoe-twin": {"layers": 16, "experts": 64, "top_k": 8},
    "qwen2moe-twin": {"layers": 24, "experts": 60, "top_k": 4},
}


@pytest.fixture(
    scope="module",
    params=["olmoe-twin", pytest.param("qwen2moe-twin", marks=pytest.mark.exhaustive)],
)
def driven(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, Inputs, list[int]]]:
    """A twin with a trace of its shape, and what it says with all experts there."""
    path = tmp_path_factory.mktemp("made-up") / "trace"
    trace = make_trace(path, **TWINS[request.param], requests=3, prompt=12, output=6)
    inputs = Inputs(trace, fit_share=0.4)
    model = from_checkpoint(shared / "models" / request.param, "cpu")
    session = Session(model, inputs.workload("last-use").max_context, cpu_threads=1)
    resident = replay_point(session, inputs, Point(policy="resident", hardware="h200-pcie5"))
    assert not session.has_lane
    assert resident.result["cpu_threads"] is None
    yield session, inputs, resident.measured.tokens
    session.close()
    model.close()


@pytest.fixture
def seen_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at a group comes before it is computed, however fast this machine is."""
    done, seen = CpuLane.done, set()

    def looked(lane: CpuLane) -> bool:
        if lane._request in seen:
            return done(lane)
        seen.add(lane._request)
        return False

    monkeypatch.setattr(CpuLane, "done", looked)


@pytest.mark.parametrize("policy", ["fiddler", "hybrid-split", "auto"])
def test_the_model_says_the_same_whoever_computes(
    driven: tuple[Session, Inputs, list[int]], policy: str, seen_at_work: None
) -> None:
    session, inputs, tokens = driven
    point = Point(policy=policy, hardware="h200-pcie5", expert_budget="25%", window=64)
    found = replay_point(session, inputs, point)
    assert found.measured.tokens == tokens
    assert found.result["cpu_threads"] == 1
    phases = [found.result[phase] for phase in ("decode", "prefill")]
    on_cpu = sum(phase["cpu"] for phase in phases)
    assert 0 < on_cpu <= sum(phase["misses"] + phase["late"] for phase in phases)
    if policy == "auto":
        return
    nbytes = session.ready.layout.nbytes
    simulated = predict_point(inputs, point, FlatTiming(), expert_bytes=nbytes)
    assert first_difference(decisions(simulated.core), found.log) is None
    assert simulated.core.tally == found.core.tally
    if found.result["decode"]["cpu"]:
        assert found.result["breakdown_ms"]["stall_cpu"] > 0


def test_what_leaves_nothing_to_the_cpu_starts_no_process(shared: Path) -> None:
    inputs = Inputs(Trace.open("sample"), max_tokens=51)
    model = from_checkpoint(shared / "models" / "olmoe-twin", "cpu")
    session = Session(model, inputs.workload("last-use").max_context)
    point = Point(
        policy="auto",
        params={"cpu": "false"},
        hardware="h200-pcie5",
        expert_budget="25%",
        window=64,
    )
    assert replay_point(session, inputs, point).result["decode"]["cpu"] == 0
    assert not session.has_lane
    model.close()
