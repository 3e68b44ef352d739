"""Times of a model as they were measured on a machine (:mod:`configs.timings`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from configs.geometry import Geometry
from configs.hardware import Hardware
from configs.timings import HostTimes, ModelTimes, Pass, PolicyTimes
from sim.timing import HostCosts, LinkCosts, RooflineTiming

_PPM = 1_000_000


class CalibratedTiming(RooflineTiming):
    """Measured times of decode steps of one token and of prefills, of one request at a time.

    Between the measured sizes of a prefill, and between KV capacities, times are interpolated;
    beyond them the nearest size holds, in proportion to the tokens. CPU work is the hardware
    profile's where it was not measured. ``link_bytes_per_s``: another link than the measured one.
    """

    provenance = "calibrated"

    def __init__(
        self,
        geometry: Geometry,
        hardware: Hardware,
        times: ModelTimes,
        *,
        policy: str | None = None,
        link_bytes_per_s: int | None = None,
    ) -> None:
        super().__init__(geometry, hardware)
        self._own = times.policies.get(policy or "")
        self.predictor_ns = {**self.predictor_ns, **times.predictor_ns}
        self._decode = [each for each in times.passes if each.tokens == 1]
        self._prefill = [each for each in times.passes if each.tokens > 1]
        self._hosts: dict[int, HostCosts] = {}
        self._cpu = times.cpu
        self.host = self.host_for(1)
        self.link = LinkCosts(
            bytes_per_s=link_bytes_per_s or times.link.bytes_per_s,
            startup_ns=times.link.startup_ns,
            gap_ns=times.link.gap_ns,
        )
        self.segment_slowdown_ppm = round(times.segment_slowdown * _PPM)
        self._beside_ns = times.experts_beside_ns
        self.experts_slowdown_ppm = self.experts_ppm(1)
        if times.cpu is not None:
            self.cpu_slowdown_ppm = round(times.cpu.slowdown * _PPM)
            self.link_slowdown_cpu_ppm = round(times.cpu.link_slowdown * _PPM)

    def host_for(self, tokens: int) -> HostCosts:
        """Host costs of a pass of so many tokens."""
        known = self._hosts.get(tokens)
        if known is None:
            known = self._hosts[tokens] = self._host_for(tokens)
        return known

    def _host_for(self, tokens: int) -> HostCosts:
        low, high, share = self._between(tokens)
        costs = _mixed(low.host, high.host, share)
        if self._cpu is not None:
            costs = replace(costs, cpu_start_ns=self._cpu.start_ns)
        if self._own is None:
            return costs
        costs = _with_policy(costs, self._own, self._decode[0].host)
        return _with_decode_steps(costs, self._own) if tokens == 1 else costs

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        """By layer; decode steps by KV capacity."""
        self._refuse_batches(requests)
        if tokens == 1:
            low, high, share = _around(self._decode, [p.kv_tokens for p in self._decode], kv_tokens)
        else:
            low, high, share = self._between(tokens)
        return _mix(low.segment_ns[layer], high.segment_ns[layer], share)

    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """Decode steps assign one token to each expert; a launch of a prefill more."""
        if assignments <= experts or not self._prefill:
            return self._decode[0].experts_ns(experts)
        tokens = round(assignments / self._geometry.top_k)
        low, high, share = self._between(max(tokens, 2))
        return _mix(low.experts_ns(experts), high.experts_ns(experts), share)

    def experts_ppm(self, experts: int) -> int:
        """A launch beside copies takes a constant longer, whatever its size."""
        return round(self._beside_ns * _PPM / max(self._decode[0].experts_ns(experts), 1))

    def head_ns(self, requests: int) -> int:
        """Of a decode step."""
        return self._decode[0].head_ns

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """The lane's, from the hand-over; every layer alike."""
        if self._cpu is None:
            return super().cpu_experts_ns(layer, experts, assignments)
        return self._cpu.ns(experts, assignments)

    def combine_ns(self) -> int:
        """As one expert's launch where it was not measured."""
        return self._decode[0].experts_ns(1) if self._cpu is None else self._cpu.combine_ns

    def _between(self, tokens: int) -> tuple[Pass, Pass, float]:
        if tokens == 1 or not self._prefill:
            return self._decode[0], self._decode[0], 0.0
        return _around(self._prefill, [each.tokens for each in self._prefill], tokens)

    @staticmethod
    def _refuse_batches(requests: int) -> None:
        if requests > 1:
            raise ValueError(f"times of {requests} requests at a time were not measured")


def _around(passes: Sequence[Pass], sizes: list[int], size: int) -> tuple[Pass, Pass, float]:
    """The measured passes on both sides, and how far between them."""
    at = bisect_left(sizes, size)
    if at == 0:
        return passes[0], passes[0], 0.0
    if at == len(passes):
        return passes[-1], passes[-1], 0.0
    low, high = sizes[at - 1], sizes[at]
    return passes[at - 1], passes[at], (size - low) / (high - low)


def _mix(low: int, high: int, share: float) -> int:
    return round(low + share * (high - low))


def _mixed(low: HostTimes, high: HostTimes, share: float) -> HostCosts:
    names = [name for name in HostTimes.model_fields if name != "next_wave_ns"]
    mixed = {name: _mix(getattr(low, name), getattr(high, name), share) for name in names}
    later = [
        each.decision_ns if each.next_wave_ns is None else each.next_wave_ns for each in (low, high)
    ]
    if low.next_wave_ns is None and high.next_wave_ns is None:
        return HostCosts(**mixed)
    return HostCosts(**mixed, next_wave_ns=_mix(later[0], later[1], share))


def _with_policy(costs: HostCosts, own: PolicyTimes, plain: HostTimes) -> HostCosts:
    """The policy's decisions cost more or less than those that the pass was measured with."""
    return replace(
        costs,
        decision_ns=max(costs.decision_ns + own.decision_ns - plain.decision_ns, 0),
        awaited_ns=own.awaited_ns,
        copy_issue_ns=own.copy_issue_ns,
    )


def _with_decode_steps(costs: HostCosts, own: PolicyTimes) -> HostCosts:
    """What the policy's decode steps take beside its decisions, as far as it was measured."""
    names = ("step_ns", "segment_launch_ns", "experts_launch_ns")
    known = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    return replace(costs, **known)
