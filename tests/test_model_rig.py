"""What a model's calibration does that needs no GPU: its memory run, and its traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.timings import LinkTimes
from policies.interface import Shape

torch = pytest.importorskip("torch")

from replay.calibrate import model as rigs  # noqa: E402
from replay.calibrate.model import ModelRig, PrefillRun, Run, Traffic, held_bytes  # noqa: E402
from replay.calibrate.rig import CalibrationError  # noqa: E402
from replay.calibrate.stats import steady_mean_ns  # noqa: E402
from replay.model import ReplayModel, from_checkpoint  # noqa: E402
from replay.play import Replay, Session  # noqa: E402
from sim.spans import COPY, DECIDE, EXPERTS, ISSUE, SEGMENT  # noqa: E402

MIB = 2**20


@pytest.fixture(scope="module")
def twin(shared: Path) -> Iterator[ReplayModel]:
    ready = from_checkpoint(shared / "models" / "olmoe-twin", "cpu")
    yield ready
    ready.close()


@pytest.mark.parametrize(("rows", "prefill"), [(1, 8), (1, None), (2, 8)])
def test_what_is_held_is_weights_cache_and_slots(
    twin: ReplayModel, rows: int, prefill: int | None
) -> None:
    session = Session(twin, 10, rows=rows)
    rig = ModelRig(session, 0)
    assert rig.workspace_bytes(prefill) is None  # nobody measures a plain CPU's
    slots = rig.run_for_memory(prefill)
    config = twin.model.config
    # Too few for the prefill's experts in one wave.
    assert slots == 16 * len(twin.modules)
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = rows * 10 * config.num_hidden_layers * 2 * heads * 2
    weights = sum(each.numel() * 2 for each in twin.model.parameters())
    assert held_bytes(session, slots) == weights + cache + slots * twin.layout.nbytes


def test_workspace_is_the_peak_less_what_is_held(
    twin: ReplayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(twin, 10)
    rig = ModelRig(session, 0)
    slots = rig.run_for_memory(8)
    said: list[str] = []
    monkeypatch.setattr(rig, "run_for_memory", lambda tokens: said.append(f"run {tokens}") or slots)
    monkeypatch.setattr(session, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: said.append("reset"))
    peak = held_bytes(session, slots) + 12_345
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    assert rig.workspace_bytes(8) == 12_345
    assert said == ["reset", "run 8"]


def test_prefills_alternate_with_decode_steps_and_are_told_apart(twin: ReplayModel) -> None:
    """Of six prefills the last three count, whatever decodes between them."""
    session = Session(twin, 30)
    rig = ModelRig(session, 0)
    steps = rig.prefill_steps(12, rig.shape.experts)
    prefills = [step.index for step in steps if step.prefill]
    assert [step.index for step in steps] == list(range(54))
    assert prefills == [0, 9, 18, 27, 36, 45]
    assert all(len(step.token_ids) == 1 for step in steps if not step.prefill)
    core = rigs._core(rig.shape, "lru", rig.shape.experts)
    measured = Replay(session, core).run(steps, sample_host=True)
    run = PrefillRun.measured(measured)
    layers = rig.shape.layers
    for kind in (SEGMENT, DECIDE):
        counted = run.settled(kind)
        heads = 3 if kind == SEGMENT else 0
        assert counted.sum() == 3 * layers + heads
        assert set(run.step[counted].tolist()) == {27, 36, 45}
    assert run.first_waves()[run.settled(DECIDE)].all()
    assert 0 < run.step_ns < 10**9


class Copies:
    """In place of the driver's: keeps what was asked for."""

    def __init__(self, stream: int, events: int) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def copy(self, target: int, source: int, nbytes: int) -> int:
        self.asked.append((target, source, nbytes))
        return len(self.asked)

    def landed(self, event: int) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("experts", "expert_bytes", "block"),
    [
        (256, 73 * 1024, 8 * MIB),  # blocks of many, the rest of the store left out
        (6, 9 * MIB, 9 * MIB),
        (4, 1024, 4096),  # a store smaller than a block
    ],
)
def test_traffic_is_of_blocks_that_take_a_while(
    monkeypatch: pytest.MonkeyPatch, experts: int, expert_bytes: int, block: int
) -> None:
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(rigs, "CopyStream", Copies)
    monkeypatch.setattr(rigs, "_TRAFFIC_BYTES", 4 * 9 * MIB)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    memory = torch.zeros((2, experts // 2, expert_bytes), dtype=torch.uint8)
    ready = SimpleNamespace(
        layout=SimpleNamespace(nbytes=expert_bytes), store=SimpleNamespace(memory=memory)
    )
    session: Any = SimpleNamespace(ready=ready, device=torch.device("cpu"))
    traffic: Any = Traffic(session)
    traffic.begin()
    asked = traffic._copies.asked
    assert {nbytes for _, _, nbytes in asked} == {block}
    assert len(asked) == 4 * 9 * MIB // block
    first, last = memory.data_ptr(), memory.data_ptr() + memory.numel()
    assert all(first <= source and source + block <= last for _, source, _ in asked)
    target = traffic._target
    ends = target.data_ptr(), target.data_ptr() + target.numel()
    assert all(ends[0] <= to and to + block <= ends[1] for to, _, _ in asked)
    assert traffic.ended()
    traffic.finish()


def a_run(*marks: tuple[int, int, int, int]) -> Run:
    """Of one settled step; each mark: how long it took, kind, layer, count."""
    duration, kind, layer, count = np.array(marks, np.int64).T
    step = np.full(len(marks), Run.settling)
    return Run(duration, np.cumsum(duration), kind, layer, count, step)


def test_a_batchs_first_launch_costs_its_experts_more() -> None:
    one = a_run((9, ISSUE, 0, 2), (50, EXPERTS, 0, 9), (99, COPY, 0, 0), (14, EXPERTS, 0, 1))
    two = a_run(
        (9, ISSUE, 0, 2), (54, EXPERTS, 0, 11), (99, COPY, 0, 0), (12, EXPERTS, 0, 1),
        (30, COPY, 0, 0), (16, EXPERTS, 0, 1), (40, ISSUE, 1, 0), (64, EXPERTS, 1, 13),
    )  # fmt: skip
    assert one.landings().tolist() == [False, False, False, True]
    # 14 the landed ones, 56 the others of 11 experts: 42 more for ten.
    assert rigs._launches_of_batch([one, two]) == (14, 4)


def test_a_landing_counts_from_where_its_copy_was_handed_over() -> None:
    """With others launched before the wait, and where all of an event is missing."""
    rig = ModelRig.__new__(ModelRig)
    rig.shape = Shape(1, 4, 1, (1000,))
    vars(rig)["link"] = LinkTimes(bytes_per_s=10**9, startup_ns=200, gap_ns=0)
    wait = (1150, COPY, 0, 0), (20, EXPERTS, 0, 1)
    # 1200 the copy; the launch that is usual takes 15.
    with_others = a_run((7, DECIDE, 0, 1), (9, ISSUE, 0, 1), (80, EXPERTS, 0, 3), *wait)
    assert rig._landing_ns(with_others, 15) == 80 + 1150 + 20 - 1200 - 15
    alone = a_run((7, DECIDE, 0, 1), (9, ISSUE, 0, 1), (1210, COPY, 0, 0), (20, EXPERTS, 0, 1))
    assert rig._landing_ns(alone, 15) == 1210 + 20 - 1200 - 15


def test_pauses_are_left_out_of_a_steady_mean() -> None:
    assert steady_mean_ns([]) is None
    assert steady_mean_ns([7]) == 7
    assert steady_mean_ns([10, 20]) == 15
    assert steady_mean_ns([10, 20, 45]) == 25  # a layer may well take twice as long as another
    assert steady_mean_ns([10, 12, 11, 400]) == 11


def test_a_top_1_models_events_miss_one_expert_at_most(
    twin: ReplayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = ModelRig(Session(twin, 10), 0)
    rig.shape = Shape(2, 8, 1, (1000, 1000))
    asked: list[int] = []

    def stop() -> None:
        raise CalibrationError("its runs are asked for")

    monkeypatch.setattr(rig, "_run_decode", asked.append)
    monkeypatch.setattr(rig, "_experts_alone", stop)
    with pytest.raises(CalibrationError, match="asked for"):
        _ = rig.decode
    assert asked == [0, 1]
    for misses in asked:
        for step in rigs.routing(rig.shape, 3, misses, 2 if misses else 8):
            assert step.experts is not None
            assert step.experts.min() >= 0
