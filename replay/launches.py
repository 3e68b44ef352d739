"""Experts' kernels of a captured decode step, launched a group of slots at a time.

How slot numbers get to a kernel decides what a launch costs. They travel in the launch's own
arguments where they fit (16 bits each, eight of them: all of one request's top-8, of a batch what
lands one by one), else in a write to device memory before it. A copy from pinned memory would cross
the link beside the experts.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from configs.errors import UserError
from replay.cuda_driver import KernelLaunch, SmallWrites
from replay.gated import MOST_IN_WORDS
from replay.kernels import (
    PLACE_WORDS,
    WORDS,
    GatedExperts,
    Launched,
    named_words,
)

if TYPE_CHECKING:
    from replay.graphs import CapturedStep

_SLOTS_A_WORD = 4
"""Slot numbers are of 16 bits: each word that is written costs the GPU some 2 us."""
_MOST_SLOTS = 2**15
_TOO_MANY = MOST_IN_WORDS + 1
_NO_NUMBERS = (-1,) * MOST_IN_WORDS
_WARP = 32
_ALIGNMENT = 16
"""Bytes: Triton compiles a kernel again for pointers that are no multiples of it."""


class GroupLaunches(Protocol):
    """Launches of all layers of a step."""

    def launch(self, layer: int, group: int, slots: Sequence[int]) -> None:
        """Compute the assignments whose slot is named, -1 elsewhere; one for each, in order.

        ``group``: which of the event's launches this is, from 0.
        """


def group_launches(
    step: CapturedStep, kernels: Sequence[GatedExperts], experts: int
) -> GroupLaunches:
    """The quickest that can name a slot for every assignment of the step.

    Raises UserError for more slots, or more assignments, than can be named.
    """
    if len(kernels[0].gate_up) > _MOST_SLOTS:
        raise UserError(
            f"{len(kernels[0].gate_up)} expert slots: the engine numbers up to {_MOST_SLOTS}, "
            "give a smaller budget"
        )
    assignments = len(step.boundaries[0].out)
    if assignments <= MOST_IN_WORDS:
        return NamedSlots(step, kernels)
    if assignments > _MOST_SLOTS:
        raise UserError(
            f"{assignments} experts are computed in a step: the engine numbers up to "
            f"{_MOST_SLOTS}, give a trace of smaller batches"
        )
    # Of an event's groups so many may be too large for a launch's arguments; each has an expert.
    large = min(assignments // _TOO_MANY, experts)
    return PlacedSlots(step, kernels, WrittenSlots(step, kernels, large))


def _activations(step: CapturedStep, kernels: Sequence[GatedExperts]) -> torch.Tensor:
    """Between the two products, of all assignments; layers use it in turn."""
    edge = step.boundaries[0]
    inner = max(kernel.inner for kernel in kernels)
    return torch.empty((len(edge.out), inner), dtype=edge.hidden.dtype, device=edge.hidden.device)


class Words:
    """Slots and whose each is, up to eight, in host memory that launches read as they are made.

    ``names``: of the kernel's arguments of 32 bits, those of slots first. ``places``: where each
    lies.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.buffer = ctypes.create_string_buffer(4 * len(names))
        self._write = struct.Struct(f"<{2 * MOST_IN_WORDS}h").pack_into
        begin = ctypes.addressof(self.buffer)
        self.places = {name: begin + 4 * index for index, name in enumerate(names)}
        self.name({})

    def name(self, slots: Mapping[int, int]) -> None:
        """Slot by whom it is for."""
        missing = _NO_NUMBERS[len(slots) :]
        self._write(self.buffer, 0, *slots.values(), *missing, *slots, *missing)


class BoundKernel:
    """A launch that was made through Triton, to be made again through the driver.

    ``places``: addresses of arguments whose values others write, by name, 32 bits each; the other
    arguments are as they were, until :meth:`point`, and their tensors are kept until then.
    ``launch``: makes it, with the arguments as they are then.
    """

    def __init__(self, launched: Launched, stream: int, places: Mapping[str, int]) -> None:
        kernel, grid, arguments = launched
        about = kernel.metadata
        if about.global_scratch_size or about.profile_scratch_size or about.num_ctas != 1:
            raise RuntimeError(f"{kernel.name}: this launch has no scratch memory and no clusters")
        self._held: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        addresses = []
        for name, kind in kernel.src.signature.items():
            if kind == "constexpr":
                continue
            if name not in places:
                addresses.append(self._hold(name, kind, arguments[name]))
            elif kind == "i32":
                addresses.append(places[name])
            else:
                raise RuntimeError(f"{kernel.name}: argument {name} was compiled as {kind}")
        # What Triton appends: scratch memory and a profiler's.
        addresses += [self._hold(name, "i64", 0) for name in ("scratch", "profile")]
        self._kernel = kernel  # unloaded without
        threads = _WARP * about.num_warps
        self.launch = KernelLaunch(kernel.function, grid, threads, about.shared, stream, addresses)

    def point(self, name: str, tensor: torch.Tensor) -> None:
        """Give a tensor in place of one from now on; it is to be kept until the device is done.

        Raises ValueError where it does not begin at a multiple of 16 bytes, as those did that the
        kernel was compiled for.
        """
        address = tensor.data_ptr()
        if address % _ALIGNMENT:
            raise ValueError(f"{name} begins at {address}, no multiple of {_ALIGNMENT} bytes")
        self._held[name].value = address
        self._kept.pop(name, None)

    def _hold(self, name: str, kind: str, value: Any) -> int:
        """An argument of a type of Triton's, kept; returns where it lies."""
        if kind.startswith("*"):
            held: Any = ctypes.c_uint64(value.data_ptr())
            self._kept[name] = value
        else:
            held = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind](value)
        self._held[name] = held
        return ctypes.addressof(held)


class NamedSlots:
    """Slot numbers are arguments of both kernels, which are launched through the driver.

    A first launch through Triton compiles; the words that name slots, and the assignments that are
    computed with them, lie in one place of host memory, which every launch reads as it is made.
    """

    def __init__(self, step: CapturedStep, kernels: Sequence[GatedExperts]) -> None:
        count = min(len(step.boundaries[0].out), MOST_IN_WORDS)
        self._words = Words((*WORDS, *PLACE_WORDS))
        self._words.name(dict.fromkeys(range(count), -1))
        self._write = struct.Struct(f"<{count}h").pack_into
        stream = torch.cuda.current_stream().cuda_stream
        self._act = _activations(step, kernels)
        unread = torch.empty(
            len(step.boundaries[0].out), dtype=torch.int16, device=self._act.device
        )
        self._kept: list[Any] = [unread]
        self._launches = []
        for layer, kernel in enumerate(kernels):
            edge = step.boundaries[layer]
            pair = kernel.launch(edge.hidden, unread, self._act, edge.out, named_words({}))
            up, down = (BoundKernel(each, stream, self._words.places) for each in pair)
            self._launches.append((up.launch, down.launch))
            self._kept += [up, down]
        torch.cuda.synchronize()

    def launch(self, layer: int, group: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        self._write(self._words.buffer, 0, *slots)
        up, down = self._launches[layer]
        up()
        down()


class PlacedSlots(NamedSlots):
    """Of steps of many assignments: groups of few as :class:`NamedSlots`, others by ``written``."""

    def __init__(
        self, step: CapturedStep, kernels: Sequence[GatedExperts], written: WrittenSlots
    ) -> None:
        super().__init__(step, kernels)
        self._written = written
        self._large = 0

    def launch(self, layer: int, group: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        if group == 0:
            self._large = 0
        named = {place: slot for place, slot in enumerate(slots) if slot >= 0}
        if not named:
            return
        if len(named) > MOST_IN_WORDS:
            self._written.launch(layer, self._large, slots)
            self._large += 1
            return
        self._words.name(named)
        for kernel in self._launches[layer]:
            kernel.resize((len(named),))
            kernel()


class WrittenSlots:
    """Both kernels of a launch are a CUDA graph; their slots are written to memory before it.

    There is a piece of memory for every layer and each of ``groups`` of a step, so that none is
    overwritten before it was read.
    """

    def __init__(self, step: CapturedStep, kernels: Sequence[GatedExperts], groups: int) -> None:
        count = len(step.boundaries[0].out)
        layers = len(step.boundaries)
        device = step.token.device
        # An even number of words, so that every piece is aligned as the first one is.
        words = 2 * -(-count // (2 * _SLOTS_A_WORD))
        self._named = np.full(words * _SLOTS_A_WORD, -1, np.int16)
        self._count = count
        self._writes = SmallWrites(words)
        self._slots = torch.full(
            (layers, groups, words * _SLOTS_A_WORD), -1, dtype=torch.int16, device=device
        )
        self._stream = torch.cuda.current_stream().cuda_stream
        self._act = _activations(step, kernels)
        self._kernels = list(kernels)  # whose weights the graphs read
        self._graphs: list[list[torch.cuda.CUDAGraph]] = []
        pool = torch.cuda.graph_pool_handle()
        for layer, kernel in enumerate(kernels):
            edge = step.boundaries[layer]
            pieces = self._slots[layer, :, :count]
            kernel.launch(edge.hidden, pieces[0], self._act, edge.out)
            torch.cuda.synchronize()
            row = []
            for group in range(groups):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    kernel.launch(edge.hidden, pieces[group], self._act, edge.out)
                row.append(graph)
            self._graphs.append(row)
        for graph in (graph for row in self._graphs for graph in row):
            graph.replay()  # the first replay of a graph sends it to the device
        torch.cuda.synchronize()
        self._at = [[int(piece.data_ptr()) for piece in row] for row in self._slots]

    def launch(self, layer: int, group: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        named = self._named
        named[: self._count] = slots
        words = named.view(np.uint64).tolist()
        self._writes.write(self._stream, self._at[layer][group], words)
        self._graphs[layer][group].replay()
