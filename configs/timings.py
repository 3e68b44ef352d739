"""Times of one model on one machine, measured: what the simulator reads where it is there.

A file of `configs/timings/HARDWARE/GEOMETRY.yaml`, or the user's own, written by
`moesim calibrate --geometry`. Without one, times are estimated from bytes and flops.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from configs.errors import UserError
from configs.load import read_yaml

_MAX_NS = 10_000_000_000
Ns = Annotated[int, Field(ge=0, le=_MAX_NS)]
Slowdown = Annotated[float, Field(ge=0, le=10)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_TimesT = TypeVar("_TimesT", bound=_Strict)


def _times(times: _TimesT, factor: float, apart: set[str]) -> _TimesT:
    """Every number but those of ``apart`` so many times as large."""
    known = {
        name: round(value * factor)
        for name, value in times
        if value is not None and name not in apart
    }
    return times.model_copy(update=known)


class HostTimes(_Strict):
    """Host time of each action, ns; docs/contract.md says where each is spent."""

    step_ns: Ns
    segment_launch_ns: Ns
    experts_launch_ns: Ns
    """Of one expert."""
    launch_each_ns: Ns
    """More for each expert more in a launch."""
    readback_ns: Ns
    decision_ns: Ns
    """Of a gate event whose experts are all there."""
    awaited_ns: Ns
    """More for each expert that the event awaits."""
    copy_issue_ns: Ns
    landing_ns: Ns
    """From the end of an awaited copy until the host goes on."""
    next_wave_ns: Ns | None = None
    """Of a decision about an event's later waves; None: as about the first."""

    def slowed(self, factor: float) -> HostTimes:
        """On a host so many times as slow; reading results back is the GPU's and the link's."""
        return _times(self, factor, apart={"readback_ns"})


class ExpertsTime(_Strict):
    """GPU time of one launch over so many distinct experts.

    ``beside_ns``: how much longer it takes while copies run; None: not measured at this size.
    """

    experts: int = Field(ge=1)
    ns: Ns
    beside_ns: Ns | None = None


class Pass(_Strict):
    """A forward pass of ``tokens`` of ``requests``; a decode step has a token of each.

    ``kv_tokens``: capacity of the KV cache it was measured with. ``segment_ns``: by MoE layer, GPU
    time from the experts of the layer before to this layer's gate, as far as the host sees it.
    """

    tokens: int = Field(ge=1)
    requests: int = Field(default=1, ge=1)
    kv_tokens: int = Field(ge=1)
    host: HostTimes
    segment_ns: tuple[Ns, ...] = Field(strict=False, min_length=1)
    head_ns: Ns
    experts: tuple[ExpertsTime, ...] = Field(strict=False, min_length=1)
    """Of a decode step of several requests: by assignments of a token to an expert."""

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step."""
        return self.tokens == self.requests

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if self.tokens < self.requests:
            raise ValueError(f"{self.tokens} tokens cannot be of {self.requests} requests")
        counts = [entry.experts for entry in self.experts]
        if counts != sorted(set(counts)):
            raise ValueError(f"experts must go up from entry to entry, got {counts}")
        return self

    def experts_ns(self, experts: int) -> int:
        """GPU time of a launch over so many: interpolated, beyond the last in proportion."""
        known = self.experts
        for low, high in pairwise(known):
            if experts <= high.experts and experts >= low.experts:
                share = (experts - low.experts) / (high.experts - low.experts)
                return round(low.ns + share * (high.ns - low.ns))
        if experts < known[0].experts:
            return known[0].ns
        return round(known[-1].ns * experts / known[-1].experts)

    def beside_ns(self, experts: int) -> int | None:
        """How much longer a launch over so many takes beside copies; None: it was not measured.

        Interpolated; beyond what was measured as the nearest.
        """
        known = [(each.experts, each.beside_ns) for each in self.experts]
        measured = [(size, ns) for size, ns in known if ns is not None]
        if not measured:
            return None
        sizes, times = zip(*measured, strict=True)
        return round(float(np.interp(experts, sizes, times)))


class PolicyTimes(_Strict):
    """Host time in runs of one policy, in place of that of the pass.

    ``step_ns``, ``segment_launch_ns``, ``experts_launch_ns``: in decode steps only, since after
    long waits and much work in between the same call takes longer. ``next_wave_ns``: of a decode
    step's decision about an event's later waves, beside ``awaited_ns``. ``prediction_ns``: when a
    finished prediction takes effect within a wait. ``prefill_...``: in prefills of
    ``prefill_tokens`` tokens in the mean: of a first wave's decision with all that it awaits, of a
    later one's, of a prediction, a step, a segment's launch, a launch of one expert, and a copy's
    issue. None: it was not measured, or there was none.
    ``expert_share``: of all experts' bytes, what the slots of the measured run were allowed; None:
    it was not told.
    """

    expert_share: float | None = Field(default=None, gt=0, le=1)
    decision_ns: Ns
    awaited_ns: Ns
    copy_issue_ns: Ns
    step_ns: Ns | None = None
    segment_launch_ns: Ns | None = None
    experts_launch_ns: Ns | None = None
    next_wave_ns: Ns | None = None
    prediction_ns: Ns | None = None
    prefill_tokens: int | None = Field(default=None, ge=1)
    prefill_decision_ns: Ns | None = None
    prefill_next_wave_ns: Ns | None = None
    prefill_prediction_ns: Ns | None = None
    prefill_step_ns: Ns | None = None
    prefill_segment_launch_ns: Ns | None = None
    prefill_experts_launch_ns: Ns | None = None
    prefill_copy_issue_ns: Ns | None = None

    @model_validator(mode="after")
    def _check_prefill(self) -> Self:
        if (self.prefill_tokens is None) != (self.prefill_decision_ns is None):
            raise ValueError("prefill_tokens and prefill_decision_ns go together")
        return self

    def slowed(self, factor: float) -> PolicyTimes:
        """On a host so many times as slow."""
        return _times(self, factor, apart={"expert_share", "prefill_tokens"})


def _between(low: PolicyTimes, high: PolicyTimes, expert_share: float) -> PolicyTimes:
    """On a line through two; what one of them lacks is lacking."""
    assert low.expert_share is not None
    assert high.expert_share is not None
    part = (expert_share - low.expert_share) / (high.expert_share - low.expert_share)

    def mean(name: str) -> Any:
        one, other = getattr(low, name), getattr(high, name)
        return None if one is None or other is None else round(one + part * (other - one))

    names = PolicyTimes.model_fields.keys() - {"expert_share"}
    return PolicyTimes(expert_share=expert_share, **{name: mean(name) for name in names})


_RARE = (
    "next_wave_ns",
    "prediction_ns",
    "prefill_next_wave_ns",
    "prefill_prediction_ns",
    "prefill_experts_launch_ns",
    "prefill_copy_issue_ns",
)


def _filled(found: PolicyTimes, nearest: Sequence[PolicyTimes]) -> PolicyTimes:
    """What a run had none of, such as later waves where there is room, as nearest to it."""
    more = {
        name: next((ns for each in nearest if (ns := getattr(each, name)) is not None), None)
        for name in _RARE
        if getattr(found, name) is None
    }
    return found.model_copy(update=more) if more else found


def _apart(times: PolicyTimes, expert_share: float) -> float:
    return abs((times.expert_share or 0.0) - expert_share)


class LinkTimes(_Strict):
    """Of copies of this model's experts."""

    bytes_per_s: int = Field(ge=10**8, le=2 * 10**12)
    startup_ns: Ns
    gap_ns: Ns


class GroupTime(_Strict):
    """Time of the CPU lane for so many ``experts``, of so many assignments each."""

    experts: int = Field(ge=1)
    tokens: int = Field(ge=1)
    ns: Ns


class CpuTimes(_Strict):
    """The CPU lane: from a group's hand-over until the host knows that it is computed.

    ``threads``: of the process that computes. ``start_ns``: host time of a hand-over, activations
    brought to the host included. ``combine_ns``: GPU time to fetch and add the result. ``groups``:
    of one token by experts, and of one expert by tokens. ``slowdown``: by which it takes longer
    beside copies; ``link_slowdown``: by which copies take longer beside it.
    """

    threads: int = Field(ge=1)
    start_ns: Ns
    combine_ns: Ns
    groups: tuple[GroupTime, ...] = Field(strict=False, min_length=1)
    slowdown: Slowdown
    link_slowdown: Slowdown

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [(each.experts, each.tokens) for each in self.groups]
        if kinds != sorted(set(kinds)):
            raise ValueError("groups must go up by experts, then tokens, each once")
        if kinds[0] != (1, 1):
            raise ValueError("groups lack one expert of one token")
        if any(min(kind) > 1 for kind in kinds):
            raise ValueError("groups are of one token or of one expert")
        return self

    def ns(self, experts: int, assignments: int) -> int:
        """Of a group: what its experts take for a token each, and each for its further tokens.

        Interpolated; beyond what was measured as between the last two.
        """
        by_experts = [(each.experts, each.ns) for each in self.groups if each.tokens == 1]
        by_tokens = [(each.tokens, each.ns) for each in self.groups if each.experts == 1]
        more = _along(by_tokens, assignments / experts) - by_tokens[0][1]
        return max(round(_along(by_experts, experts) + experts * more), 1)


def _along(known: Sequence[tuple[int, int]], at: float) -> float:
    """A line through the nearest two points."""
    if len(known) == 1:
        return known[0][1] * at / known[0][0]
    index = min(bisect_left([size for size, _ in known], at, 1), len(known) - 1)
    (low, first), (high, last) = known[index - 1], known[index]
    return first + (at - low) * (last - first) / (high - low)


class ModelTimes(_Strict):
    """One model on one machine.

    ``machine``: GPU, driver, software; ``source``: the command. ``predictor_ns``: as the hardware
    profile has them, in place of those. ``policies``: by label (name and given parameters), of
    each at one share of the experts or more, going up; an older file has one without a share.
    ``cpu``: None: it was not measured, and the hardware profile's figures stand in.
    ``workspace_bytes``: most GPU memory of the engine beside non-expert weights, KV cache and
    expert slots, in prefills up to the largest of ``passes``; None: it was not measured.
    ``host_loop_ns``: what a fixed loop of Python (``replay.cores``) took in the median run of this
    calibration; host times are those of a host as fast. None: in an older file.
    """

    hardware: str = Field(min_length=1)
    geometry: str = Field(min_length=1)
    expert_dtype: str = Field(min_length=1)
    machine: str = Field(min_length=1)
    source: str = Field(min_length=1)
    passes: tuple[Pass, ...] = Field(strict=False, min_length=1)
    link: LinkTimes
    segment_slowdown: Slowdown
    experts_beside_ns: Ns
    """By which a launch of one expert takes longer while copies run, unless its pass says."""
    predictor_ns: dict[str, Ns] = Field(default_factory=dict)
    policies: dict[str, Annotated[tuple[PolicyTimes, ...], Field(strict=False, min_length=1)]] = (
        Field(default_factory=dict)
    )
    cpu: CpuTimes | None = None
    workspace_bytes: int | None = Field(default=None, ge=0)
    host_loop_ns: int | None = Field(default=None, gt=0)

    @field_validator("policies", mode="before")
    @classmethod
    def _at_one_share(cls, value: Any) -> Any:
        """Files of one share a policy have its times without a list."""
        if not isinstance(value, dict):
            return value
        single = (dict, PolicyTimes)
        return {
            label: (times,) if isinstance(times, single) else times
            for label, times in value.items()
        }

    @field_validator("policies")
    @classmethod
    def _by_share(cls, value: dict[str, tuple[PolicyTimes, ...]]) -> Any:
        for label, times in value.items():
            shares = [each.expert_share for each in times]
            known = [share for share in shares if share is not None]
            if times[1:] and (len(known) < len(shares) or known != sorted(set(known))):
                raise ValueError(
                    f"{label}: expert_share must go up from entry to entry, got {shares}"
                )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [(each.requests, each.tokens, each.kv_tokens) for each in self.passes]
        if kinds != sorted(set(kinds)):
            raise ValueError("passes must go up by requests, tokens, then kv_tokens, each once")
        if not self.batches:
            raise ValueError("passes lack a decode step (tokens: 1)")
        if len({len(each.segment_ns) for each in self.passes}) > 1:
            raise ValueError("passes differ in how many layers segment_ns has")
        return self

    @property
    def batches(self) -> tuple[int, ...]:
        """Requests at a time whose decode steps were measured, going up."""
        return tuple(sorted({each.requests for each in self.passes if each.decodes}))

    def policy_at(self, label: str, expert_share: float | None) -> PolicyTimes | None:
        """A policy's times where the slots hold that share of all experts' bytes.

        Interpolated between the measured shares; beyond them the nearest one's, and without a share
        the middle one's. None: the policy was not measured.
        """
        known = self.policies.get(label)
        if known is None:
            return None
        if expert_share is None:
            return _filled(known[len(known) // 2], known)
        shares = [each.expert_share or 0.0 for each in known]
        at = bisect_left(shares, expert_share)
        if at in (0, len(known)) or shares[at] == expert_share:
            found = known[min(at, len(known) - 1)]
        else:
            found = _between(known[at - 1], known[at], expert_share)
        return _filled(found, sorted(known, key=lambda each: _apart(each, expert_share)))

    def on_host(self, factor: float, host_loop_ns: int) -> ModelTimes:
        """The same times on a host so many times as slow, whose loop takes ``host_loop_ns``."""
        passes = tuple(
            each.model_copy(update={"host": each.host.slowed(factor)}) for each in self.passes
        )
        own = {
            label: tuple(each.slowed(factor) for each in known)
            for label, known in self.policies.items()
        }
        update = {"passes": passes, "policies": own, "host_loop_ns": host_loop_ns}
        return self.model_copy(update=update)

    def cover(self, batch: int) -> bool:
        """Whether times of so many requests at a time follow from the measured ones."""
        return self.batches[0] <= batch <= self.batches[-1]


def render(times: ModelTimes) -> str:
    """The file's text."""
    return yaml.safe_dump(
        times.model_dump(mode="json"), sort_keys=False, width=100, default_flow_style=None
    )


def find_timings(hardware: str, geometry: str) -> ModelTimes | None:
    """What is shipped for a machine and a model; None: nothing is."""
    file = resources.files("configs") / "timings" / hardware / f"{geometry}.yaml"
    return read_yaml(ModelTimes, file) if file.is_file() else None


def load_timings(path: str | os.PathLike[str]) -> ModelTimes:
    """A user's file. Raises UserError for one that is missing or wrong."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"timings file '{file}' is not there; `moesim calibrate --geometry` writes one"
        )
    return read_yaml(ModelTimes, file)
