"""No expert is computed from a slot in the making, and what goes wrong ends in a clear line.

The device here is a plain CPU whose copies take their time: bytes arrive after so many polls.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import cli  # noqa: E402
import replay.memory  # noqa: E402
import replay.open  # noqa: E402
import replay.slots  # noqa: E402
from configs.errors import UserError  # noqa: E402
from policies.errors import BudgetTooSmall  # noqa: E402
from replay.layout import ExpertLayout, Part  # noqa: E402
from replay.model import ReplayModel, from_checkpoint  # noqa: E402
from replay.play import ForcedStep, Replay, Session  # noqa: E402
from replay.point import forced_steps, replay_point  # noqa: E402
from replay.slots import SlotRaceError  # noqa: E402
from replay.store import ExpertStore  # noqa: E402
from sim.inputs import Inputs  # noqa: E402
from sim.point import Point  # noqa: E402
from tests.test_replay import make_core  # noqa: E402
from tests.traces import make_trace  # noqa: E402
from tracer.trace import Trace  # noqa: E402

ROWS = 52  # a prefill of 49 tokens, and 3 steps
HARDWARE = "h200-pcie5"


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
def steps(inputs: Inputs) -> list[ForcedStep]:
    return forced_steps(inputs, inputs.workload("last-use"), vocabulary=2**31)


# ---------------------------------------------------------------------- a planted race


class SlowCopies:
    """Stands in for :class:`replay.cuda_driver.CopyStream`: one copy arrives every few polls."""

    POLLS = 3

    def __init__(self) -> None:
        self.under_way: list[tuple[int, int, int, int]] = []
        self.arrived: set[int] = set()
        self.polls = self.begun = 0

    def copy(self, target: int, source: int, nbytes: int, behind: Any = None) -> int:
        self.begun += 1
        self.under_way.append((self.begun, target, source, nbytes))
        return self.begun

    def landed(self, event: int) -> bool:
        self.polls += 1
        if self.under_way and self.polls % self.POLLS == 0:
            done, target, source, nbytes = self.under_way.pop(0)
            ctypes.memmove(target, source, nbytes)
            self.arrived.add(done)
        return self.says(event)

    def says(self, event: int) -> bool:
        return event in self.arrived

    def close(self) -> None:
        pass


class SaysAtOnce(SlowCopies):
    """Takes a copy that was begun for one that has ended."""

    def says(self, event: int) -> bool:
        return True


class SaysOneEarly(SlowCopies):
    """Off by one: takes the end of a copy for that of the copy behind it."""

    def says(self, event: int) -> bool:
        return event in self.arrived or event - 1 in self.arrived


def run_with(
    copies: SlowCopies, session: Session, steps: list[ForcedStep], *, check: bool, chunks: int
) -> list[int]:
    core = make_core(session.ready, "lru", 0.125, chunks=chunks)
    replay = Replay(session, core, check=check)
    replay.eager.copies._copies = copies  # type: ignore[assignment]
    tokens = replay.run(steps).tokens
    assert copies.begun > 1000
    return tokens


@pytest.fixture(scope="module")
def resident(session: Session, inputs: Inputs) -> list[int]:
    point = Point(policy="resident", hardware=HARDWARE)
    return replay_point(session, inputs, point).measured.tokens


@pytest.mark.parametrize("chunks", [1, 3])
def test_slow_copies_are_waited_for(
    session: Session, steps: list[ForcedStep], resident: list[int], chunks: int
) -> None:
    assert run_with(SlowCopies(), session, steps, check=True, chunks=chunks) == resident


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("planted", [SaysAtOnce, SaysOneEarly])
def test_an_engine_that_does_not_wait_is_caught(
    session: Session, steps: list[ForcedStep], planted: type[SlowCopies], chunks: int
) -> None:
    with pytest.raises(SlotRaceError, match="layer 0: an expert was computed before"):
        run_with(planted(), session, steps, check=True, chunks=chunks)


def test_a_copy_that_went_nowhere_is_caught(
    session: Session, steps: list[ForcedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "memmove", lambda target, source, nbytes: None)
    with pytest.raises(SlotRaceError):
        run_with(SlowCopies(), session, steps, check=True, chunks=1)


# ---------------------------------------------------------------------- out of memory


def refuse(error: Exception) -> Callable[..., Any]:
    def allocate(*sizes: object, **named: object) -> Any:
        raise type(error)(*error.args)  # one that is raised again would keep its frames

    return allocate


GPU_IS_FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of "
    "which 1.00 GiB is free."
)
HOST_IS_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 274877906944 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GPU_IS_FULL, "the GPU is out of memory for 256 expert slots .*20.00 GiB more asked for"),
        (HOST_IS_FULL, "the host is out of memory for .*274877906944 bytes more asked .* are free"),
    ],
)
def test_no_room_for_slots_is_told_and_the_session_goes_on(
    session: Session,
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    point = Point(policy="lru", hardware=HARDWARE, expert_budget="25%", window=64)
    with monkeypatch.context() as patch:
        patch.setattr(replay.slots.torch, "zeros", refuse(error))
        with pytest.raises(UserError, match=f"{said}.*give a smaller --budget"):
            replay_point(session, inputs, point)
    assert replay_point(session, inputs, point).measured.copied_bytes > 0


def test_what_a_run_held_is_released_when_memory_runs_out_in_it(
    session: Session, steps: list[ForcedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Replay(session, make_core(session.ready, "lru", 0.25))
    memory = weakref.ref(engine.eager.pool)
    monkeypatch.setattr(engine.eager, "_compute", refuse(GPU_IS_FULL))
    with pytest.raises(UserError, match="the GPU is out of memory for a run: 20"):
        engine.run(steps)
    assert session.ready.model.config._experts_implementation != "moesim_replay"
    del engine
    monkeypatch.undo()
    gc.collect()
    assert memory() is None


def test_other_errors_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        replay.memory.enough_memory("a product", "none"),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_experts_that_the_host_has_no_room_for_are_refused_before_they_are_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = ExpertLayout((Part("weight", (2**20,), torch.bfloat16, 0),), 2**21)
    monkeypatch.setattr(replay.memory, "free_host_bytes", lambda: 3 * 2**30)
    with pytest.raises(UserError, match=r"4096 experts: needs 8.00 GiB .* 3.00 GiB are free"):
        ExpertStore(layout, 64, 64)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:       4 kB\n"}, 4096),
        ({"meminfo": "MemAvailable: 4 kB\n", "max": "3000\n", "current": "1000\n"}, 2000),
        (
            {
                "meminfo": "MemAvailable: 4 kB\n",
                "max": "3000",
                "current": "2900",
                "memory.stat": "active_file 7\ninactive_file 500\n",
            },
            600,
        ),
        ({"meminfo": "MemAvailable: 4 kB\n", "max": "max\n", "current": "1000\n"}, 4096),
        ({}, None),
    ],
)
def test_free_host_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    group = (str(tmp_path / "max"), str(tmp_path / "current"))
    monkeypatch.setattr(replay.memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(replay.memory, "_CONTROL_GROUPS", (group,))
    assert replay.memory.free_host_bytes() == left


# ---------------------------------------------------------------------- wrong input


def command(shared: Path, *more: str) -> list[str]:
    model = str(shared / "models" / "olmoe-twin")
    words = ["replay", "--model", model, "--trace", "sample", "--hardware", HARDWARE]
    return [*words, "--device", "cpu", *more]


def fails(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> str:
    """The one line on stderr with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["moesim", *words])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.out == ""
    assert told.err.startswith("moesim: error: ")
    assert told.err.count("\n") == 1
    return told.err


LRU = ("--policy", "lru", "--max-tokens", "50")


def test_no_memory_is_one_line(shared: Path, capsys: Any, monkeypatch: Any) -> None:
    words = command(shared, *LRU, "--expert-budget", "25%")
    with monkeypatch.context() as patch:
        patch.setattr(replay.slots.torch, "zeros", refuse(GPU_IS_FULL))
        told = fails(words, capsys, monkeypatch)
    assert "20.00 GiB more asked for" in told
    monkeypatch.setattr(replay.memory, "free_host_bytes", lambda: 2**20)
    told = fails(words, capsys, monkeypatch)
    assert "1024 experts: needs" in told
    assert "1.00 MiB are free" in told


def test_no_memory_is_one_line_of_validate_too(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(replay.open, "resolve_device", lambda name: "cpu")
    monkeypatch.setattr(replay.memory, "free_host_bytes", lambda: 2**30)
    words = ["validate", "olmoe-dev", "--out", str(tmp_path / "out")]
    assert "1024 experts: needs 12.00 GiB" in fails(words, capsys, monkeypatch)


def test_a_budget_too_small_is_one_line(shared: Path, capsys: Any, monkeypatch: Any) -> None:
    words = command(shared, *LRU, "--expert-budget", "100KiB")
    told = fails(words, capsys, monkeypatch)
    assert "the expert budget of 102400 bytes is too small: the smallest that can run is" in told


def test_the_smallest_budget_that_is_named_can_run(session: Session, inputs: Inputs) -> None:
    with pytest.raises(BudgetTooSmall) as refused:
        replay_point(session, inputs, Point(policy="lru", hardware=HARDWARE, expert_budget="1KiB"))
    smallest = f"{refused.value.smallest_bytes / 1024:.6f}KiB"
    point = Point(policy="lru", hardware=HARDWARE, expert_budget=smallest, window=64)
    assert replay_point(session, inputs, point).measured.copied_bytes > 0


def test_a_trace_of_another_geometry_is_one_line(
    shared: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    trace = make_trace(tmp_path / "trace")  # 3 layers x 8 experts
    words = command(shared, *LRU, "--expert-budget", "4/layer")
    words[words.index("sample")] = str(trace.path)
    told = fails(words, capsys, monkeypatch)
    assert "the model has 16 MoE layers x 64 experts, top-8, the trace 3 MoE layers x 8" in told


def test_another_geometry_is_told_before_its_weights_are_made(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    trace = make_trace(tmp_path / "trace")
    words = ["replay", "--geometry", "olmoe-1b-7b", "--trace", str(trace.path)]
    words += ["--hardware", HARDWARE, *LRU, "--expert-budget", "4/layer", "--device", "cpu"]
    told = fails(words, capsys, monkeypatch)
    assert "a trace can only drive a model of its own layers x experts x top-k" in told


def test_an_expert_that_its_shard_lacks_is_one_line(
    shared: Path, sharded: Path, capsys: Any, monkeypatch: Any
) -> None:
    index = sharded / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    files = told["weight_map"]
    second = "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, sharded / second)
    expert = next(key for key in sorted(files) if ".experts." in key)
    told["weight_map"] = {**dict.fromkeys(files, files[expert]), expert: second}
    index.write_text(json.dumps(told))
    words = command(shared, *LRU, "--expert-budget", "25%")
    words[2] = str(sharded)
    assert f"{second}: cannot be read" in fails(words, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config.json is not there: name the directory of a transformers model"),
        ("{}", "config.json: transformers cannot read it (Unrecognized model"),
        ("{broken", "config.json: transformers cannot read it"),
    ],
)
def test_what_is_no_model_is_one_line(
    shared: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, config: str | None, said: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    words = command(shared, *LRU, "--expert-budget", "25%")
    words[2] = str(tmp_path)
    assert said in fails(words, capsys, monkeypatch)


@pytest.fixture
def sharded(shared: Path, tmp_path: Path) -> Path:
    """The twin under an index of two shards: the whole file, and one that is not there."""
    path = tmp_path / "sharded"
    path.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(shared / "models" / "olmoe-twin" / name, path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    whole = shared / "models" / "olmoe-twin" / "model.safetensors"
    (path / first).symlink_to(whole)
    with safe_open(str(whole), "pt") as file:
        keys = sorted(file.keys())
    index = {key: second if key == keys[-1] else first for key in keys}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)
    return path


def test_a_missing_shard_is_one_line(
    shared: Path, sharded: Path, capsys: Any, monkeypatch: Any
) -> None:
    words = command(shared, *LRU, "--expert-budget", "25%")
    words[2] = str(sharded)
    told = fails(words, capsys, monkeypatch)
    assert "shard model-00002-of-00002.safetensors is missing; get it from the source" in told
    index = sharded / "model.safetensors.index.json"
    named = index.read_text()
    index.write_text("{broken")
    assert "is no index of a checkpoint" in fails(words, capsys, monkeypatch)
    index.write_text(named)
    (sharded / "model-00002-of-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    told = fails(words, capsys, monkeypatch)
    assert "model-00002-of-00002.safetensors" in told


# ---------------------------------------------------------------------- a run that is killed

ANNOUNCED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from replay.eager import EagerEngine
begin = EagerEngine.begin_step
def told(self, *rest):
    print("a step begins", file=sys.stderr, flush=True)
    return begin(self, *rest)
EagerEngine.begin_step = told
import cli
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, ["moesim: interrupted"]),
        pytest.param(signal.SIGTERM, 143, [], marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, [], marks=pytest.mark.exhaustive),
    ],
    ids=["int", "term", "kill"],
)
def test_a_run_that_is_killed_leaves_nothing(
    shared: Path, tmp_path: Path, number: signal.Signals, code: int, said: list[str]
) -> None:
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    words = command(shared, "--policy", "lru", "--expert-budget", "25%", "--json")
    running = subprocess.Popen(
        [sys.executable, "-c", ANNOUNCED, *words],
        cwd=here,
        env={
            **os.environ,
            "TMPDIR": str(scratch),
            "PYTHONPATH": str(Path(cli.__file__).parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line == "a step begins\n":
            break
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert out == ""
    assert [line for line in err.splitlines() if line != "a step begins"] == said
    assert list(here.iterdir()) == list(scratch.iterdir()) == []
