"""What the engine asks of the CUDA driver itself: quick copies, and small writes without a copy.

PyTorch spends 15 to 45 us of host time on a copy to a side stream and its event; a policy's copies
are issued while the GPU waits for them. And what kernels read from pinned memory crosses the link
beside the copies: measured on an H200, each launch then took 25 us longer and held the copies up by
10 us. A stream's memory operations carry a batch's tokens in the command itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

_NOT_READY = 600
_DISABLE_TIMING = 2
_WRITE_64 = 5
_MOST_OPERATIONS = 128
"""In one call; the driver takes fewer than 256."""


class CudaDriverError(RuntimeError):
    """A call of the CUDA driver failed."""


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, pointer, size, pointer)
    library.cuEventCreate.argtypes = (ctypes.POINTER(pointer), ctypes.c_uint)
    library.cuEventRecord.argtypes = (pointer, pointer)
    library.cuEventQuery.argtypes = (pointer,)
    library.cuEventDestroy_v2.argtypes = (pointer,)
    library.cuStreamBatchMemOp_v2.argtypes = (pointer, ctypes.c_uint, pointer, ctypes.c_uint)
    library.cuLaunchKernelEx.argtypes = (pointer, pointer, pointer, pointer)
    return library


def _check(status: int, call: str) -> None:
    if status:
        raise CudaDriverError(f"{call} failed with CUDA driver error {status}")


class CopyStream:
    """Host-to-device copies on one stream, each with an event; PyTorch's context must be current.

    ``stream``: handle of a CUDA stream (``torch.cuda.Stream.cuda_stream``). ``events``: most copies
    under way at a time.
    """

    def __init__(self, stream: int, events: int) -> None:
        self._cuda = _library()
        self._stream = stream
        self._copy = self._cuda.cuMemcpyHtoDAsync_v2
        self._record = self._cuda.cuEventRecord
        self._query = self._cuda.cuEventQuery
        self._idle = [self._create() for _ in range(events)]
        self._all = list(self._idle)

    def _create(self) -> int:
        event = ctypes.c_void_p()
        _check(self._cuda.cuEventCreate(ctypes.byref(event), _DISABLE_TIMING), "cuEventCreate")
        assert event.value is not None
        return event.value

    def copy(
        self, target: int, source: int, nbytes: int, behind: tuple[int, int, int] | None = None
    ) -> int:
        """Begin a copy from a host to a device address; returns the event that tells its end.

        ``behind``: another copy to go with it: target, source, bytes.
        """
        event = self._idle.pop()
        status = self._copy(target, source, nbytes, self._stream)
        if behind is not None:
            status = status or self._copy(*behind, self._stream)
        status = status or self._record(event, self._stream)
        if status:
            _check(status, "a copy")
        return event

    def landed(self, event: int) -> bool:
        """Whether the copy has ended; its event may be used again then."""
        status = self._query(event)
        if status == _NOT_READY:
            return False
        _check(status, "cuEventQuery")
        self._idle.append(event)
        return True

    def close(self) -> None:
        """Destroy the events; no copy may be under way."""
        for event in self._all:
            _check(self._cuda.cuEventDestroy_v2(event), "cuEventDestroy")
        self._all = self._idle = []


class _Write(ctypes.Structure):
    """``CUstreamBatchMemOpParams`` as a write, padded to the union's 48 bytes."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("_pad", ctypes.c_uint64),
    )


_WRITE_BYTES = ctypes.sizeof(_Write)


class SmallWrites:
    """Writes ``words`` times 8 bytes to device memory, in order with a stream's kernels."""

    def __init__(self, words: int) -> None:
        self._batch = _library().cuStreamBatchMemOp_v2
        self._words = words
        self._writes = (_Write * words)()
        for write in self._writes:
            write.operation = _WRITE_64
        self._at = ctypes.addressof(self._writes)

    def write(self, stream: int, address: int, values: Sequence[int]) -> None:
        """Write unsigned 64-bit ``values`` from ``address`` on."""
        for write, value in zip(self._writes, values, strict=True):
            write.address, write.value = address, value
            address += 8
        for first in range(0, self._words, _MOST_OPERATIONS):
            count = min(self._words - first, _MOST_OPERATIONS)
            at = self._at + first * _WRITE_BYTES
            _check(self._batch(stream, count, at, 0), "cuStreamBatchMemOp")


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class KernelLaunch:
    """A kernel with its arguments in place, to be launched over and over: some 3 us of host time.

    ``function``: handle of a loaded kernel. ``arguments``: address of each, in order; what lies
    there when it is called goes with the launch. Whoever gives them keeps them.
    """

    def __init__(
        self,
        function: int,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[int],
    ) -> None:
        self._launch = _library().cuLaunchKernelEx
        self._function = function
        self._config = _LaunchConfig((1, 1, 1), (threads, 1, 1), shared_bytes, stream, None, 0)
        self._grid = self._config.grid
        self.resize(grid)
        self._arguments = (ctypes.c_void_p * len(arguments))(*arguments)
        self._where = ctypes.addressof(self._config), ctypes.addressof(self._arguments)

    def resize(self, grid: Sequence[int]) -> None:
        """Launch so many programs from now on, by up to three dimensions."""
        for dimension, programs in enumerate(grid):
            self._grid[dimension] = programs

    def __call__(self) -> None:
        """Launch, in order with the stream's other work."""
        config, arguments = self._where
        status = self._launch(config, self._function, arguments, None)
        if status:
            _check(status, "cuLaunchKernelEx")
