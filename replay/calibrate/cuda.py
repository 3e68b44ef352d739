"""The rig on a CUDA GPU: every call that the tests cannot make."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Any

import torch

from configs.errors import UserError
from replay.calibrate.rig import Facts, Tensor, Work

_WARM_UPS = 3


class CudaGraph:
    """A captured graph and the tensor that its result stands in.

    It keeps ``work``: the graph reads tensors that work alone holds, wherever they lay at capture.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor, work: Work) -> None:
        self.replay = graph.replay
        self.output = output
        self._work = work


class CudaRig:
    """The current CUDA device.

    Raises UserError where there is none.
    """

    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                "no CUDA GPU here: run moesim calibrate on a machine with one (torch "
                f"{torch.__version__} sees none), or use a profile of configs/hardware"
            )
        torch.cuda.init()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if native else torch.float16
        torch.set_num_threads(_cores())

    def facts(self) -> Facts:
        return Facts(
            gpu=torch.cuda.get_device_name(),
            gpu_memory_bytes=torch.cuda.mem_get_info()[1],
            driver=_driver(),
            torch=torch.__version__,
            cuda=str(torch.version.cuda),
            cpu_cores=_cores(),
        )

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def event(self, timing: bool = True) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timing)
        event.record()  # it is created by its first record
        return event

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream | None = None) -> None:
        event.record(stream)

    def done(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def elapsed_ns(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e6

    def copy(self, dst: Tensor, src: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        if stream is None:
            dst.copy_(src, non_blocking=True)
            return
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)

    def run(self, work: Work) -> Tensor:
        return work.run()

    def capture(self, work: Work) -> CudaGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = work.run()
        captured = CudaGraph(graph, output, work)
        for _ in range(_WARM_UPS):
            graph.replay()
        torch.cuda.synchronize()
        return captured

    def launch(self, graph: CudaGraph) -> None:
        graph.replay()

    def on_host(self, work: Work) -> Tensor:
        return work.run()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(0.02)

    def device_bytes(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pageable(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def register(self, buffer: Tensor) -> None:
        _check(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))

    def unregister(self, buffer: Tensor) -> None:
        _check(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))


def _check(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA error {int(code)}: {code}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _driver() -> str:
    """The driver's version as nvidia-smi says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout.split()[0]
