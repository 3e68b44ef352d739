"""What a machine under test can be told to do, and how much of it.

The measurements speak to a :class:`Rig` alone; `cuda` is the rig on a CUDA GPU, the tests have one
with a clock of its own. Tensors are torch's; streams, events and graphs are the rig's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configs.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30

Tensor = torch.Tensor


class CalibrationError(UserError):
    """A measurement gave what cannot be used, such as copies beside a GPU that was idle."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: run again on a machine that does nothing else")


@dataclass(frozen=True)
class Facts:
    """The machine's names, for the values' sources."""

    gpu: str
    gpu_memory_bytes: int
    driver: str
    torch: str
    cuda: str
    cpu_cores: int

    def __str__(self) -> str:
        return (
            f"{self.gpu}, driver {self.driver}, torch {self.torch}, CUDA {self.cuda}, "
            f"{self.cpu_cores} host cores"
        )


@dataclass(frozen=True)
class Work:
    """Something to compute, and what it costs: bytes read and written, floating-point operations.

    ``run`` takes nothing, can be repeated, and gives a tensor that holds its result (the same one
    each time once it is captured as a graph).
    """

    name: str
    run: Callable[[], Tensor]
    nbytes: int = 0
    flops: int = 0


class Rig(Protocol):
    """A GPU with its link and host. `None` for a stream is the one that computes."""

    device: str
    dtype: torch.dtype

    def facts(self) -> Facts: ...

    def now_ns(self) -> int:
        """The host's clock."""
        ...

    def stream(self) -> Any:
        """A stream of its own beside the one that computes."""
        ...

    def event(self, timing: bool = True) -> Any: ...

    def record(self, event: Any, stream: Any = None) -> None: ...

    def done(self, event: Any) -> bool:
        """Whether all before the event has run; does not wait."""
        ...

    def wait(self, event: Any) -> None:
        """Block until the event is done."""
        ...

    def elapsed_ns(self, start: Any, end: Any) -> float:
        """Device time between two timing events that are done."""
        ...

    def copy(self, dst: Tensor, src: Tensor, stream: Any = None) -> None:
        """Hand a copy over; does not wait where the host's memory is pinned."""
        ...

    def run(self, work: Work) -> Tensor:
        """Launch work kernel by kernel."""
        ...

    def capture(self, work: Work) -> Any:
        """Work as a graph, warmed up; `graph.output` is its result."""
        ...

    def launch(self, graph: Any) -> None: ...

    def on_host(self, work: Work) -> Tensor:
        """Compute on the CPU."""
        ...

    def synchronize(self) -> None: ...

    def random(self, *shape: int) -> Tensor:
        """Random device memory in the rig's dtype; small values."""
        ...

    def device_bytes(self, nbytes: int) -> Tensor: ...

    def pageable(self, nbytes: int) -> Tensor:
        """Host memory that nothing has touched yet."""
        ...

    def pinned(self, nbytes: int) -> Tensor: ...

    def register(self, buffer: Tensor) -> None:
        """Pin a host buffer where it lies."""
        ...

    def unregister(self, buffer: Tensor) -> None: ...


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """Powers of two from `low` to `high`, both included."""
    return tuple(2**n for n in range(low.bit_length() - 1, high.bit_length()))


@dataclass(frozen=True)
class Sizes:
    """How much is moved and computed, and how often; the defaults are a full run.

    ``copies``: sizes of the link's curve; ``fit_from``: the fit leaves smaller copies out.
    ``pool_bytes``: host memory that copies and CPU experts go around in, so that no cache helps.
    ``train``: copies of ``chunk_bytes`` in a queue that other work is timed beside.
    ``hidden`` and ``width``: of decode-like work, and of the expert on the CPU that is timed beside
    copies; ``experts``: a layer's; ``top_k`` of them run. ``models``: whose experts the CPU
    computes.
    """

    copies: tuple[int, ...] = powers_of_two(4 * KIB, 256 * MIB)
    fit_from: int = 64 * KIB
    rounds: int = 30
    repeats: int = 100
    pool_bytes: int = 2 * GIB
    pin_bytes: int = GIB
    pin_repeats: int = 3
    queue: int = 32
    chunk_bytes: int = 4 * MIB
    train: int = 64
    hidden: int = 2048
    width: int = 1024
    experts: int = 64
    top_k: int = 8
    segment_layers: int = 16
    expert_layers: int = 8
    read_rows: int = 65536
    read_columns: int = 8192
    gemm: int = 8192
    maps: int = 1000
    map_length: int = 1440
    predictor_width: int = 960
    models: tuple[str, ...] = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "gpt-oss-20b")
    decisions: int = 20_000


def spin(rig: Rig, event: Any) -> int:
    """Poll until the event is done, as the replay does; returns the host's time then, ns."""
    while not rig.done(event):
        pass
    return rig.now_ns()


def device_ns(rig: Rig, launch: Callable[[], object], repeats: int) -> list[float]:
    """Device time of what `launch` launches, once a repeat, without the launch itself.

    What is timed is queued behind another run of the same, so the GPU never waits for the host.
    """
    start, end = rig.event(), rig.event()
    times = []
    for _ in range(repeats):
        launch()
        rig.record(start)
        launch()
        rig.record(end)
        spin(rig, end)
        times.append(rig.elapsed_ns(start, end))
    return times


def host_ns(rig: Rig, call: Callable[[], object], repeats: int) -> list[int]:
    """Host time of `call`, once a repeat, on a GPU that has nothing to do."""
    times = []
    for _ in range(repeats):
        rig.synchronize()
        start = rig.now_ns()
        call()
        times.append(rig.now_ns() - start)
    rig.synchronize()
    return times


class Pool:
    """Host memory handed out piece after piece, around and around."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._at = 0

    def piece(self, nbytes: int) -> Tensor:
        """The next `nbytes` of it, aligned to 4 KiB, as bytes."""
        if nbytes > self.buffer.numel():
            raise ValueError(f"{nbytes} bytes are more than the pool of {self.buffer.numel()}")
        if self._at + nbytes > self.buffer.numel():
            self._at = 0
        piece = self.buffer[self._at : self._at + nbytes]
        self._at += -(-nbytes // (4 * KIB)) * 4 * KIB
        return piece


def fill(buffer: Tensor) -> None:
    """Small random bf16 numbers, never zeros: time may depend on the data."""
    block = torch.randn(min(buffer.numel() // 2, 16 * MIB)).mul_(0.02).to(torch.bfloat16)
    numbers = buffer[: buffer.numel() // 2 * 2].view(torch.bfloat16)
    for at in range(0, numbers.numel(), block.numel()):
        part = numbers[at : at + block.numel()]
        part.copy_(block[: part.numel()])
