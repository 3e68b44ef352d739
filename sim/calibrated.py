"""Times of a model as they were measured on a machine (:mod:`configs.timings`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from configs.errors import UserError
from configs.geometry import Geometry
from configs.hardware import Hardware
from configs.timings import HostTimes, ModelTimes, Pass, PolicyTimes
from sim.timing import HostCosts, LinkCosts, RooflineTiming

_PPM = 1_000_000


#: measured passes and the weight of each; the weights sum to 1
Weighted = list[tuple[Pass, float]]


class CalibratedTiming(RooflineTiming):
    """Measured times of decode steps of ``batch`` tokens, one a request, and of prefills.

    Between the measured sizes of a batch and of a prefill, and between KV capacities, times are
    interpolated; beyond them the nearest prefill and capacity hold, the experts' in proportion to
    the tokens. A decode step whose batch has thinned out takes as long as a full one: the engine
    computes all its lines. CPU work is the hardware profile's where it was not measured.
    ``link_bytes_per_s``: another link than the measured one. ``expert_share``: the slots' share of
    all experts' bytes, between which the policy's own host times are interpolated (beyond what was
    measured the nearest, without one the middle). Raises UserError for a batch beyond those that
    were measured.
    """

    provenance = "calibrated"

    def __init__(
        self,
        geometry: Geometry,
        hardware: Hardware,
        times: ModelTimes,
        *,
        policy: str | None = None,
        expert_share: float | None = None,
        link_bytes_per_s: int | None = None,
        batch: int = 1,
    ) -> None:
        super().__init__(geometry, hardware)
        if not times.cover(batch):
            known = ", ".join(map(str, times.batches))
            raise UserError(
                f"times of {times.geometry} with {batch} requests at a time were not measured "
                f"(with {known} they were): calibrate with that batch, or record another"
            )
        self.smallest_batch = times.batches[0]
        self._own = times.policy_at(policy or "", expert_share)
        self.predictor_ns = {**self.predictor_ns, **times.predictor_ns}
        self._decode = _decode_passes(times, batch)
        self._prefill = _prefill_passes(times, batch)
        # A launch of a decode step of one request assigns one token to each expert.
        self._most_decoded = batch * geometry.top_k if batch > 1 else 0
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
        self.experts_slowdown_ppm = self.experts_ppm(1, 1)
        if times.cpu is not None:
            self.cpu_is_measured = True
            self.cpu_slowdown_ppm = round(times.cpu.slowdown * _PPM)
            self.link_slowdown_cpu_ppm = round(times.cpu.link_slowdown * _PPM)

    def host_for(self, tokens: int, requests: int = 1) -> HostCosts:
        """Host costs of a pass of so many tokens of so many requests."""
        size = 1 if tokens == requests else tokens
        known = self._hosts.get(size)
        if known is None:
            known = self._hosts[size] = self._host_for(size)
        return known

    def _host_for(self, tokens: int) -> HostCosts:
        plain = _mixed(self._step())
        costs = _mixed(self._between(tokens))
        if self._cpu is not None:
            costs = replace(costs, cpu_start_ns=self._cpu.start_ns)
        if self._own is None:
            return costs
        if tokens == 1:
            return _with_decode_steps(_with_policy(costs, self._own, plain), self._own)
        if self._own.prefill_tokens is None:
            return _with_policy(costs, self._own, plain)
        return _with_prefills(costs, self._own, _mixed(self._between(self._own.prefill_tokens)))

    def segment_ns(self, layer: int, tokens: int, requests: int, kv_tokens: int) -> int:
        """By layer; decode steps by KV capacity."""
        passes = self._step(kv_tokens) if tokens == requests else self._between(tokens)
        return _mean(passes, lambda each: each.segment_ns[layer])

    def experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """A launch of no more assignments than a decode step has is taken for one of a decode step.

        A prefill's assigns more tokens to an expert.
        """
        if self._decodes(experts, assignments):
            size = self._decode_size(experts, assignments)
            return _mean(self._step(), lambda each: each.experts_ns(size))
        tokens = round(assignments / self._geometry.top_k)
        return _mean(self._between(max(tokens, 2)), lambda each: each.experts_ns(experts))

    def _decodes(self, experts: int, assignments: int) -> bool:
        return assignments <= max(experts, self._most_decoded) or not self._prefill

    def _decode_size(self, experts: int, assignments: int) -> int:
        """By which a decode step's launches were measured; a prefill's counts by its experts."""
        if self._most_decoded and self._decodes(experts, assignments):
            return assignments
        return experts

    def experts_ppm(self, experts: int, assignments: int) -> int:
        """As measured of a decode step's launches."""
        size = self._decode_size(experts, assignments)

        def longer_ns(measured: Pass) -> int:
            found = measured.beside_ns(size)
            return self._beside_ns if found is None else found

        alone = _mean(self._step(), lambda each: each.experts_ns(size))
        return round(_mean(self._step(), longer_ns) * _PPM / max(alone, 1))

    def head_ns(self, requests: int) -> int:
        """Of a decode step."""
        return _mean(self._step(), lambda each: each.head_ns)

    def cpu_experts_ns(self, layer: int, experts: int, assignments: int) -> int:
        """The lane's, from the hand-over; every layer alike."""
        if self._cpu is None:
            return super().cpu_experts_ns(layer, experts, assignments)
        return self._cpu.ns(experts, assignments)

    def combine_ns(self) -> int:
        """As one expert's launch where it was not measured."""
        if self._cpu is not None:
            return self._cpu.combine_ns
        return _mean(self._step(), lambda each: each.experts_ns(1))

    def _step(self, kv_tokens: int = 0) -> Weighted:
        """Decode passes, and how much of each."""
        return [
            (each, share * part)
            for passes, share in self._decode
            for each, part in _around(passes, [one.kv_tokens for one in passes], kv_tokens)
        ]

    def _between(self, tokens: int) -> Weighted:
        if tokens == 1 or not self._prefill:
            return self._step()
        return _around(self._prefill, [each.tokens for each in self._prefill], tokens)


def _decode_passes(times: ModelTimes, batch: int) -> list[tuple[list[Pass], float]]:
    """Those of the measured batches next to ``batch``, and how much of each."""
    passes = {
        size: [each for each in times.passes if each.decodes and each.requests == size]
        for size in times.batches
    }
    nearest = _around([passes[size][0] for size in times.batches], list(times.batches), batch)
    return [(passes[each.requests], share) for each, share in nearest]


def _prefill_passes(times: ModelTimes, batch: int) -> list[Pass]:
    """Those of the measured batch nearest to ``batch``."""
    passes = [each for each in times.passes if not each.decodes]
    if not passes:
        return []
    nearest = min({each.requests for each in passes}, key=lambda size: (abs(size - batch), size))
    return [each for each in passes if each.requests == nearest]


def _around(passes: Sequence[Pass], sizes: list[int], size: int) -> Weighted:
    """The measured passes on both sides, and how much of each."""
    at = bisect_left(sizes, size)
    if at == 0:
        return [(passes[0], 1.0)]
    if at == len(passes):
        return [(passes[-1], 1.0)]
    if sizes[at] == size:
        return [(passes[at], 1.0)]
    low, high = sizes[at - 1], sizes[at]
    share = (size - low) / (high - low)
    return [(passes[at - 1], 1 - share), (passes[at], share)]


def _mean(passes: Weighted, value: Callable[[Pass], int]) -> int:
    return round(sum(share * value(each) for each, share in passes))


def _mixed(passes: Weighted) -> HostCosts:
    def mean(name: str) -> int:
        return _mean(passes, lambda each: getattr(each.host, name))

    names = HostTimes.model_fields.keys() - {"next_wave_ns"}
    costs = HostCosts(**{name: mean(name) for name in names})
    if all(each.host.next_wave_ns is None for each, _ in passes):
        return costs
    return replace(costs, next_wave_ns=_mean(passes, _later_ns))


def _later_ns(measured: Pass) -> int:
    """Of a decision about an event's later waves."""
    host = measured.host
    return host.decision_ns if host.next_wave_ns is None else host.next_wave_ns


def _with_policy(costs: HostCosts, own: PolicyTimes, plain: HostCosts) -> HostCosts:
    """The policy's decisions cost more or less than those that the pass was measured with."""
    return replace(
        costs,
        decision_ns=max(costs.decision_ns + own.decision_ns - plain.decision_ns, 0),
        awaited_ns=own.awaited_ns,
        copy_issue_ns=own.copy_issue_ns,
        prediction_ns=own.prediction_ns or 0,
    )


def _with_prefills(costs: HostCosts, own: PolicyTimes, measured_at: HostCosts) -> HostCosts:
    """A prefill's costs, with what the policy's own prefills took.

    ``measured_at``: of the pass at the tokens of those. A decision's time has all that it awaits
    in it, as the pass' has.
    """
    assert own.prefill_decision_ns is not None
    later_ns = own.prefill_next_wave_ns
    issue_ns = own.prefill_copy_issue_ns

    def with_own(name: str) -> int:
        found: int = getattr(costs, name)
        own_ns: int | None = getattr(own, f"prefill_{name}")
        at_own: int = getattr(measured_at, name)
        return found if own_ns is None else max(found + own_ns - at_own, 0)

    names = ("decision_ns", "step_ns", "segment_launch_ns", "experts_launch_ns")
    return replace(
        costs,
        **{name: with_own(name) for name in names},
        next_wave_ns=costs.next_wave_ns if later_ns is None else later_ns,
        awaited_ns=0,
        copy_issue_ns=own.copy_issue_ns if issue_ns is None else issue_ns,
        prediction_ns=own.prefill_prediction_ns or 0,
    )


def _with_decode_steps(costs: HostCosts, own: PolicyTimes) -> HostCosts:
    """What the policy's decode steps take beside its decisions, as far as it was measured."""
    names = ("step_ns", "segment_launch_ns", "experts_launch_ns", "next_wave_ns")
    known = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    return replace(costs, **known)
