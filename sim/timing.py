"""How long things take: the numbers that the SimPy model runs on, in integer nanoseconds.

:class:`Timing` is the interface; :class:`RooflineTiming` estimates a geometry that nobody has
calibrated from bytes and flops. Results that rest on it say "estimated".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from configs.geometry import Geometry
from configs.hardware import Hardware

_PPM = 1_000_000
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class HostCosts:
    """Host time of each action, ns. See docs/contract.md for where each is spent.

    ``launch_each_ns``: more for each expert of a launch beyond the first. ``awaited_ns``: more for
    each expert that a wave awaits. ``landing_ns``: from an awaited landing until the host goes on.
    ``cpu_start_ns``: to hand a group to the CPU. ``next_wave_ns``: ``decision_ns`` of an event's
    later waves, None: the same. ``prediction_ns``: for each finished prediction that takes effect
    while the host spins.
    """

    segment_launch_ns: int
    experts_launch_ns: int
    readback_ns: int
    decision_ns: int
    copy_issue_ns: int
    step_ns: int
    launch_each_ns: int = 0
    awaited_ns: int = 0
    landing_ns: int = 0
    cpu_start_ns: int = 0
    next_wave_ns: int | None = None
    prediction_ns: int = 0

    def gate_ns(self, awaited: int, *, first: bool = True) -> int:
        """Of a decision about an event's ``first`` or a later wave that awaits so many experts."""
        if first or self.next_wave_ns is None:
            return self.decision_ns + awaited * self.awaited_ns
        return self.next_wave_ns + awaited * self.awaited_ns


@dataclass(frozen=True)
class LinkCosts:
    """The copy engine: rate in bytes/s, start-up on an idle link and gap back to back in ns."""

    bytes_per_s: int
    startup_ns: int
    gap_ns: int

    def transfer_ns(self, nbytes: int) -> int:
        """Time on the wire, without start-up or gap; rounded up."""
        return -(-nbytes * 1_000_000_000 // self.bytes_per_s)


class Timing(ABC):
    """Durations of GPU and CPU work, and the machine's constants.

    Slowdowns are in millionths: a kernel of nominal length n takes n * (1 + ppm / 10**6) while
    copies run all along. ``host``: of a decode step. ``cpu_is_measured``: of this model's experts,
    not from the machine's rates.
    """

    provenance: str
    host: HostCosts
    link: LinkCosts
    segment_slowdown_ppm: int
    experts_slowdown_ppm: int
    cpu_slowdown_ppm: int
    link_slowdown_cpu_ppm: int
    predictor_ns: dict[str, int]
    cpu_is_measured: bool = False

    @abstractmethod
    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        """GPU time from the experts of the layer before up to this layer's gate.

        ``kv_tokens``: KV capacity of one request; a static cache is read whole.
        """

    @abstractmethod
    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """GPU time of one launch over ``experts`` distinct experts and their token assignments."""

    @abstractmethod
    def head_ns(self, requests: int) -> int:
        """GPU time after the last MoE layer: final norm, head, sampling."""

    @abstractmethod
    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """CPU time of one group of experts, activations over and back included."""

    @abstractmethod
    def combine_ns(self) -> int:
        """GPU time to add what the CPU computed."""

    def experts_ppm(self, experts: int, assignments: int) -> int:
        """Slowdown of a launch while copies run, in millionths; see :meth:`experts_ns`."""
        return self.experts_slowdown_ppm

    def host_for(self, tokens: int, requests: int = 1) -> HostCosts:
        """Host costs of a step of so many tokens of so many requests."""
        return self.host

    def copy_ns(self, nbytes: int) -> int:
        """A copy of ``nbytes`` on an idle link, from the host's hand-over to its landing."""
        return self.host.copy_issue_ns + self.link.startup_ns + self.link.transfer_ns(nbytes)

    def gpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """The experts' launch, as policies ask for it (:class:`policies.interface.Costs`)."""
        return self.experts_ns(layer, experts, assignments)


class RooflineTiming(Timing):
    """Bytes over bandwidth or flops over rate, whichever is longer, and never below a floor."""

    provenance = "estimated"

    def __init__(self, geometry: Geometry, hardware: Hardware) -> None:
        self._geometry = geometry
        self._hardware = hardware
        self._bytes_per_s = int(hardware.gpu_bytes_per_s)
        self._flops_per_s = int(hardware.gpu_flops_per_s)
        self._segment_params = [size // 2 for size in geometry.segment_bytes_by_layer]
        self.host = HostCosts(
            segment_launch_ns=hardware.segment_launch_ns,
            experts_launch_ns=hardware.experts_launch_ns,
            readback_ns=hardware.readback_ns,
            decision_ns=hardware.decision_ns,
            copy_issue_ns=hardware.copy_issue_ns,
            step_ns=hardware.step_ns,
        )
        self.link = LinkCosts(
            bytes_per_s=int(hardware.link_bytes_per_s),
            startup_ns=hardware.link_startup_ns,
            gap_ns=hardware.link_gap_ns,
        )
        self.segment_slowdown_ppm = _ppm(hardware.segment_slowdown)
        self.experts_slowdown_ppm = _ppm(hardware.experts_slowdown)
        self.cpu_slowdown_ppm = _ppm(hardware.cpu_slowdown)
        self.link_slowdown_cpu_ppm = _ppm(hardware.link_slowdown_cpu)
        costs = hardware.predictor_ns
        self.predictor_ns = {
            "next_gate": costs.next_gate,
            "learned": costs.learned,
            "map_search": costs.map_search,
        }

    def _roofline(self, nbytes: int, flops: int, floor_ns: int) -> int:
        memory = -(-nbytes * 1_000_000_000 // self._bytes_per_s)
        compute = -(-flops * 1_000_000_000 // self._flops_per_s)
        return max(memory, compute, floor_ns)

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        """Weights and the whole KV capacity are read; attention: 4 flops a pair and channel."""
        geometry = self._geometry
        kv_bytes = geometry.kv_bytes_per_token * kv_tokens * requests // geometry.num_layers
        nbytes = geometry.segment_bytes_by_layer[layer] + kv_bytes
        flops = 2 * self._segment_params[layer] * tokens
        flops += 4 * geometry.hidden_size * tokens * kv_tokens
        return self._roofline(nbytes, flops, self._hardware.segment_floor_ns)

    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """Each distinct expert's weights are read once."""
        nbytes = experts * self._geometry.expert_bytes_by_layer[layer]
        flops = 2 * self._geometry.expert_params * assignments
        return self._roofline(nbytes, flops, self._hardware.experts_floor_ns)

    def head_ns(self, requests: int) -> int:
        """One row a request goes through the head."""
        nbytes = self._geometry.head_bytes
        return self._roofline(nbytes, nbytes * requests, self._hardware.head_floor_ns)

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """Weights are streamed once an expert or computed with, whichever takes longer.

        One token's activations there and back are in the hardware's figure; each assignment more
        costs its bytes on the link, twice.
        """
        geometry, hardware = self._geometry, self._hardware
        nbytes = experts * geometry.expert_bytes_by_layer[layer]
        streaming = -(-nbytes * 1_000_000_000 // int(hardware.cpu_bytes_per_s))
        flops = 2 * geometry.expert_params * assignments
        computing = -(-flops * 1_000_000_000 // int(hardware.cpu_flops_per_s))
        moved = 2 * _ACTIVATION_BYTES * geometry.hidden_size * (assignments - 1)
        transfer = hardware.cpu_transfer_ns + self.link.transfer_ns(moved)
        return max(streaming, computing) + transfer

    def combine_ns(self) -> int:
        """One small kernel."""
        return self._hardware.experts_floor_ns


def _ppm(fraction: float) -> int:
    return round(fraction * _PPM)
