"""Running out of memory, told as something that a user can mend."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.errors import UserError
from configs.units import format_bytes

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
_GPU_REFUSES = "CUDA error: out of memory"  # of graphs and libraries, past PyTorch's allocator
_HOST_REFUSES = "DefaultCPUAllocator"
_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@contextmanager
def enough_memory(what: str, mend: str) -> Iterator[None]:
    """Inside, an allocation that fails is a UserError: ``what`` wanted how much, how much is free.

    ``mend``: what to do about it. What the failed call held is released. Also a decorator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        where = _short_of(error)
        if where is None:
            raise
        # Else the error's frames keep their tensors for as long as anyone holds the error.
        traceback.clear_frames(error.__traceback__)
        found = _ASKED.search(str(error))
        asked = f": {found[1]} more asked for" if found else ""
        told = f"{where} is out of memory for {what}{asked}, {_free(where)}; {mend}"
    else:
        return
    raise UserError(told)


def require_host_memory(nbytes: int, what: str, mend: str) -> None:
    """UserError where the host has less memory than that left; nothing is told where it is unknown.

    An allocation alone does not tell: Linux grants more than there is, and ends whoever uses it.
    """
    left = free_host_bytes()
    if left is not None and nbytes > left:
        raise UserError(
            f"{what}: needs {format_bytes(nbytes)} of host memory, {format_bytes(left)} are free; "
            f"{mend}"
        )


def free_host_bytes() -> int | None:
    """Memory that the host can still give to this process; None: it does not say."""
    found = re.search(r"^MemAvailable: +(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    known = [int(found[1]) * 1024] if found else []
    for limit, used in _CONTROL_GROUPS:
        numbers = _read(Path(limit)).strip(), _read(Path(used)).strip()
        if all(number.isdigit() for number in numbers):
            # What the group has cached of files counts as used here, but would make room.
            known.append(int(numbers[0]) - int(numbers[1]) + _cached(Path(limit).parent))
    return max(min(known), 0) if known else None


def _cached(group: Path) -> int:
    stat = _read(group / "memory.stat")
    found = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
    return int(found[1]) if found else 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _short_of(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError) or _GPU_REFUSES in str(error):
        return "the GPU"
    if isinstance(error, MemoryError) or _HOST_REFUSES in str(error):
        return "the host"
    return None


def _free(where: str) -> str:
    if where == "the host":
        left = free_host_bytes()
        return "how much is free is unknown" if left is None else f"{format_bytes(left)} are free"
    if not torch.cuda.is_available():
        return "how much is free is unknown"
    torch.cuda.empty_cache()
    left, total = torch.cuda.mem_get_info()
    return f"{format_bytes(left)} of {format_bytes(total)} are free"
