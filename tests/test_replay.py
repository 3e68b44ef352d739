"""The replay engine on a plain CPU: the same decisions as the simulator, the same model outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import policies  # noqa: E402
from configs.errors import UserError  # noqa: E402
from policies.capacity import plan_memory  # noqa: E402
from policies.core import DecisionCore  # noqa: E402
from policies.interface import PolicyData, Shape  # noqa: E402
from replay.breakdown import HOST, Marks, components  # noqa: E402
from replay.checkpoint import ExpertReader  # noqa: E402
from replay.cores import LOOP_NS  # noqa: E402
from replay.model import ReplayModel, from_checkpoint  # noqa: E402
from replay.play import ForcedStep, Replay, Session  # noqa: E402
from replay.point import decisions, forced_steps  # noqa: E402
from replay.skeleton import experts_modules, meta_model, read_config  # noqa: E402
from sim.inputs import Inputs  # noqa: E402
from sim.machine import Machine  # noqa: E402
from sim.spans import APART  # noqa: E402
from tests.machines import FlatTiming  # noqa: E402
from tracer.trace import Trace  # noqa: E402
from tracer.workload import Workload  # noqa: E402

ROWS = 54


@pytest.fixture(scope="module")
def twin(shared: Path) -> Iterator[ReplayModel]:
    ready = from_checkpoint(shared / "models" / "olmoe-twin", "cpu")
    yield ready
    ready.close()


@pytest.fixture(scope="module")
def recorded() -> tuple[Workload, list[ForcedStep]]:
    """The sample's first rows, as steps to force."""
    inputs = Inputs(Trace.open("sample"), max_tokens=ROWS)
    work = inputs.workload("last-use")
    steps = forced_steps(inputs, work, vocabulary=2**31)
    return work, steps


def make_core(twin: ReplayModel, policy: str, share: float, **given: Any) -> DecisionCore:
    layers = len(twin.modules)
    shape = Shape(layers, twin.num_experts, twin.top_k, (twin.layout.nbytes,) * layers)
    info = policies.get(policy)
    params, options = info.parse(given)
    counts = np.arange(layers * twin.num_experts).reshape(layers, -1) % 7
    built = info.build(params, PolicyData(shape, popularity=counts))
    plan = plan_memory(
        shape,
        built.scope,
        int(share * twin.store.memory.numel()),
        needs_staging=built.cache.may_refuse,
    )
    return DecisionCore(shape, plan, built, options, log=[])


@pytest.mark.parametrize(
    ("policy", "share", "given", "window"),
    [
        ("lru", 0.25, {}, 2),
        ("lru-global", 0.25, {"chunks": 3}, 64),
        ("slru", 0.5, {"order": "id"}, 64),
        ("static", 0.25, {}, 64),
        ("on-demand", 0.125, {}, 64),
    ],
)
def test_the_replay_decides_what_the_simulator_decides(
    twin: ReplayModel,
    recorded: tuple[Workload, list[ForcedStep]],
    policy: str,
    share: float,
    given: dict[str, Any],
    window: int,
) -> None:
    work, steps = recorded
    replayed, simulated = (make_core(twin, policy, share, **given) for _ in range(2))
    measured = Replay(Session(twin, work.max_context), replayed, window=window).run(steps)
    Machine(work, simulated, FlatTiming()).run()
    assert replayed.log
    assert decisions(replayed) == decisions(simulated)
    assert replayed.tally == simulated.tally
    assert measured.copied_bytes == simulated.tally.copied_bytes
    assert measured.chunks == simulated.tally.chunks
    assert len(measured.times.end) == len(steps)


def test_the_host_is_sampled_between_steps(
    twin: ReplayModel, recorded: tuple[Workload, list[ForcedStep]]
) -> None:
    """What it does then is no step's, and a slow host's times are brought to the usual one's."""
    work, steps = recorded
    session = Session(twin, work.max_context)
    measured = Replay(session, make_core(twin, "lru", 0.25)).run(steps, sample_host=True)
    assert len(measured.loops_ns) == len(steps) + 12
    marks = Marks.of(measured)
    apart = marks.kind == APART
    assert apart.sum() == len(steps)
    assert min(measured.loops_ns) > 0
    decode = np.array([not step.prefill for step in steps])
    told = [value or 0 for value in components(marks, decode).values()]
    counted = marks.within(decode) & ~apart
    assert sum(told) * decode.sum() == pytest.approx(marks.duration[counted].sum() / 1e6)
    twice = marks.at_usual_speed(2 * LOOP_NS)
    host = np.isin(marks.kind, HOST)
    assert np.abs(twice.duration[host] * 2 - marks.duration[host]).max() <= 1
    assert (twice.duration[~host] == marks.duration[~host]).all()
    plain = Replay(session, make_core(twin, "lru", 0.25)).run(steps)
    assert len(plain.loops_ns) == 12
    assert not (Marks.of(plain).kind == APART).any()


def test_more_tokens_than_the_cache_holds_are_refused(
    twin: ReplayModel, recorded: tuple[Workload, list[ForcedStep]]
) -> None:
    """On a GPU the device itself would stop, and every session with it."""
    work, steps = recorded
    replay = Replay(Session(twin, work.max_context - 1), make_core(twin, "lru", 0.25))
    with pytest.raises(UserError, match=rf"fill {work.max_context} tokens .* holds"):
        replay.run(steps)


def test_a_wait_begins_with_a_refill(twin: ReplayModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device has run everything: the contract's spin."""
    driver = Replay(Session(twin, 8), make_core(twin, "lru", 0.25)).eager.driver
    spins: list[None] = []
    monkeypatch.setattr(driver, "spin", lambda: spins.append(None))
    driver.wait(0)
    assert len(spins) == 1


def test_outputs_are_those_of_the_whole_model(twin: ReplayModel, shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    from replay.eager import EagerEngine

    whole = AutoModelForCausalLM.from_pretrained(
        shared / "models" / "olmoe-twin", dtype=torch.bfloat16
    ).eval()
    tokens = torch.arange(40, 60)[None]
    with torch.inference_mode():
        expected = whole(tokens).logits
        engine = EagerEngine(twin.model, twin.modules, twin.store, make_core(twin, "lru", 0.125))
        with engine:
            engine.begin_step(0, "prefill", (0,))
            found = twin.model(tokens).logits
            engine.end_step((0,))
    assert torch.equal(found, expected)


def test_single_experts_read_are_those_of_the_whole_model(shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = shared / "models" / "qwen2moe-twin"
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    blocks = experts_modules(meta_model(read_config(path), torch.bfloat16))
    with ExpertReader(path, meta_model(read_config(path), torch.bfloat16), blocks) as reader:
        for block in (next(iter(blocks)), list(blocks)[-1]):
            module = whole.get_submodule(block)
            for expert in (0, 17, 59):
                for name, value in reader.read(block, expert).items():
                    assert torch.equal(value, getattr(module, name)[expert])
