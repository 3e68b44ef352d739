"""What policies of two precisions, and those that weigh CPU against link, are given in tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import policies
from policies.interface import Shape

#: answer misses otherwise than by copying each in full
LOSSY = [name for name in policies.names() if not policies.get(name).lossless]
#: execute experts that no gate asked for
REROUTING = ["swapmoe"]
ON_CPU = ["auto", "fiddler", "hybrid-split"]
#: of those, give the CPU also what is queued or under way
TAKING_LATE = ["auto"]


def shape_for(policy: str, shape: Shape) -> Shape:
    """The shape with low-bit copies, a third of the bytes, where the policy has such copies."""
    info = policies.get(policy)
    if info.low_dtype(info.parse({})[0]) is None:
        return shape
    return replace(shape, low_bytes_by_layer=tuple(size // 3 for size in shape.bytes_by_layer))


@dataclass(frozen=True)
class GivenCosts:
    """What :class:`policies.interface.Costs` asks for; a byte takes a nanosecond on the link."""

    copy_start: int = 0
    gpu_expert: int = 10
    cpu_start: int = 0
    cpu_expert: int = 10
    cpu_token: int = 5
    cpu_slowdown_ppm: int = 0
    link_slowdown_cpu_ppm: int = 0

    def copy_ns(self, nbytes: int) -> int:
        return self.copy_start + nbytes

    def gpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return self.gpu_expert * experts

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        return self.cpu_start + self.cpu_expert * experts + self.cpu_token * assignments
