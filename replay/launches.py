"""Experts' kernels of a captured decode step, launched a group of slots at a time.

How slot numbers get to a kernel decides what a launch costs. They travel in the launch's own
arguments where they fit (16 bits each, eight of them: all of one request's top-8, of a batch what
lands one by one), else in those of a small kernel before it, which stores them on the device. A
copy from pinned memory would cross the link beside the experts.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from configs.errors import UserError
from replay.cuda_driver import KernelLaunch
from replay.gated import MOST_IN_WORDS
from replay.kernels import (
    NUMBERS,
    PLACE_WORDS,
    WORDS,
    GatedExperts,
    Launched,
    named_words,
    store,
)

if TYPE_CHECKING:
    from replay.graphs import CapturedStep

_MOST_SLOTS = 2**15
_NO_NUMBERS = (-1,) * MOST_IN_WORDS
_WARP = 32
_ALIGNMENT = 16
"""Bytes: Triton compiles a kernel again for pointers that are no multiples of it."""


class GroupLaunches(Protocol):
    """Launches of all layers of a step."""

    def launch(self, layer: int, slots: Sequence[int]) -> None:
        """Compute the assignments whose slot is named, -1 elsewhere; one for each, in order."""


def group_launches(step: CapturedStep, kernels: Sequence[GatedExperts]) -> GroupLaunches:
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
    return PlacedSlots(step, kernels, StoredSlots(step, kernels))


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

    def launch(self, layer: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        self._write(self._words.buffer, 0, *slots)
        up, down = self._launches[layer]
        up()
        down()


class PlacedSlots(NamedSlots):
    """Of steps of many assignments: groups of few as :class:`NamedSlots`, others by ``stored``."""

    def __init__(
        self, step: CapturedStep, kernels: Sequence[GatedExperts], stored: GroupLaunches
    ) -> None:
        super().__init__(step, kernels)
        self._stored = stored

    def launch(self, layer: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        named = {place: slot for place, slot in enumerate(slots) if slot >= 0}
        if not named:
            return
        if len(named) > MOST_IN_WORDS:
            self._stored.launch(layer, slots)
            return
        self._words.name(named)
        for kernel in self._launches[layer]:
            kernel.resize((len(named),))
            kernel()


class StoredSlots:
    """Slot numbers of all assignments are stored on the device ahead of both kernels.

    They are arguments of small kernels, 32 slots each, and lie where the next launch stores its
    own: all are in order on one stream. A batch of 512 assignments takes 16 such kernels a launch,
    some 3 us of the host's time each.
    """

    def __init__(self, step: CapturedStep, kernels: Sequence[GatedExperts]) -> None:
        count = len(step.boundaries[0].out)
        pieces = -(-count // (2 * len(NUMBERS)))
        numbers = torch.full(
            (pieces, len(NUMBERS)), -1, dtype=torch.int32, device=step.boundaries[0].out.device
        )
        slots = numbers.view(-1).view(torch.int16)[:count]
        self._named = ctypes.create_string_buffer(b"\xff" * (4 * numbers.numel()))
        self._write = struct.Struct(f"<{count}h").pack_into
        stream = torch.cuda.current_stream().cuda_stream
        self._act = _activations(step, kernels)
        at = ctypes.addressof(self._named)
        self._stores = []
        for piece in numbers:
            places = {name: at + 4 * index for index, name in enumerate(NUMBERS)}
            self._stores.append(BoundKernel(store(piece, (-1,) * len(NUMBERS)), stream, places))
            at += 4 * len(NUMBERS)
        self._launches = []
        for layer, kernel in enumerate(kernels):
            edge = step.boundaries[layer]
            pair = kernel.launch(edge.hidden, slots, self._act, edge.out)
            self._launches.append([BoundKernel(each, stream, {}) for each in pair])
        torch.cuda.synchronize()

    def launch(self, layer: int, slots: Sequence[int]) -> None:
        """As :meth:`GroupLaunches.launch`."""
        self._write(self._named, 0, *slots)
        for kernel in (*self._stores, *self._launches[layer]):
            kernel.launch()
