"""Hardware profiles: what a GPU, its link and its host can do, each value with its source."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from configs.load import PROVENANCE, find, names_in, read_yaml, validated

_MAX_NS = 100_000_000
_MAX_COPY_NS = 100_000_000_000
_MAX_BYTES_PER_S = 2e12

MODEL_FIELDS = ("step_ns", "segment_floor_ns", "experts_floor_ns", "head_floor_ns")
"""Values that only the run of a model can give; `moesim calibrate` leaves them as they were."""

CopyKind = Literal[
    "pinned_h2d",
    "pinned_h2d_gpu_busy",
    "pinned_h2d_back_to_back",
    "pinned_d2h",
    "pageable_h2d",
    "pageable_d2h",
]
"""Host memory and direction; alone on an idle link unless it says otherwise."""

LatencyNs = Annotated[int, Field(ge=0, le=_MAX_NS)]
Slowdown = Annotated[float, Field(ge=0, le=10)]


class Provenance(BaseModel):
    """Where a value comes from, and how far it varies (in the value's own unit)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(min_length=1)
    spread: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class CurvePoint(BaseModel):
    """Time of one copy of a size.

    From the call to the host seeing it landed, issue included; `pinned_h2d_back_to_back`: a copy's
    share of a queue of them, so without issue and start-up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: CopyKind
    bytes: int = Field(ge=1, le=2**40)
    ns: int = Field(ge=1, le=_MAX_COPY_NS)
    spread_ns: int = Field(ge=0, le=_MAX_COPY_NS)

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if self.bytes_per_s > _MAX_BYTES_PER_S:
            raise ValueError(
                f"{self.bytes} bytes in {self.ns} ns is {self.bytes_per_s:.3g} bytes/s, above any "
                "link; is the time in ns?"
            )
        return self

    @property
    def bytes_per_s(self) -> float:
        return self.bytes * 1e9 / self.ns


class OtherValue(BaseModel):
    """A measured value that no model of the simulator reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    value: float
    unit: Literal["ns", "bytes/s", "fraction"]
    source: str = Field(min_length=1)
    spread: float | None = Field(default=None, ge=0)


class _Sourced(BaseModel):
    """Numbers that a file gives as `{value, source, spread}` and the code reads as numbers.

    `model_dump` gives the file's form back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    provenance: dict[str, Provenance] = Field(default_factory=dict)
    """Source and spread by field."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if PROVENANCE in data:
            raise ValueError("'provenance' is not a field; give each value its own source")
        sourced = [name for name in data if name in cls._sourced_fields()]
        for name in sourced:
            _check_entry(name, data[name])
        numbers = {name: data[name]["value"] for name in sourced}
        origin = {
            name: {key: entry for key, entry in data[name].items() if key != "value"}
            for name in sourced
        }
        return {**data, **numbers, PROVENANCE: origin}

    @model_serializer(mode="wrap")
    def _join(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        origin = data.pop(PROVENANCE)
        for name, entry in origin.items():
            data[name] = {"value": data[name], **entry}
        return data

    @classmethod
    def _sourced_fields(cls) -> list[str]:
        plain = {PROVENANCE, "name", "calibrated", "predictor_ns", "link_curve", "also_measured"}
        return [name for name in cls.model_fields if name not in plain]


class PredictorNs(_Sourced):
    """Nanoseconds from a predictor's start until its prediction is there."""

    next_gate: LatencyNs
    """The gate of a later layer on this layer's gate input."""
    learned: LatencyNs
    """A small trained network."""
    map_search: LatencyNs
    """A search over recorded expert maps."""


class Hardware(_Sourced):
    """One machine as the simulator sees it: GPU, host-to-device link, host thread, CPU workers.

    Rates are achievable, not nominal, in bytes or operations per second; `_ns` are nanoseconds;
    slowdowns are fractions (0.1 = 10 % longer). Values outside the bounds are refused, since they
    come from a slip in the unit.
    """

    name: str = Field(min_length=1)
    calibrated: bool
    """Whether all values but `MODEL_FIELDS` were measured on such a machine."""

    gpu_memory_bytes: int = Field(ge=2**30, le=2**40)
    gpu_bytes_per_s: float = Field(ge=1e10, le=3e13)
    gpu_flops_per_s: float = Field(ge=1e11, le=1e16)
    """Dense bf16 (fp16 where the GPU has no bf16)."""

    link_bytes_per_s: float = Field(ge=1e8, le=_MAX_BYTES_PER_S)
    """Host to device, from pinned memory."""
    link_startup_ns: LatencyNs
    """Before a copy on an idle link."""
    link_gap_ns: LatencyNs
    """Between copies back to back."""

    segment_launch_ns: LatencyNs
    """Host time to launch one layer's segment."""
    experts_launch_ns: LatencyNs
    """Host time to launch one group of experts."""
    readback_ns: LatencyNs
    """From expert ids being ready on the GPU to the host having them."""
    decision_ns: LatencyNs
    """Host time of one gate event."""
    copy_issue_ns: LatencyNs
    """Host time to hand one chunk over."""
    step_ns: LatencyNs
    """Host work a step: inputs, positions, sampling."""

    segment_floor_ns: LatencyNs
    """GPU time that one layer's segment takes however few its bytes."""
    experts_floor_ns: LatencyNs
    """The same for one launch of experts."""
    head_floor_ns: LatencyNs
    """The same for what follows the last layer."""
    segment_slowdown: Slowdown
    """While copies run."""
    experts_slowdown: Slowdown
    """While copies run."""

    cpu_bytes_per_s: float = Field(ge=1e8, le=5e12)
    """Rate at which the CPU workers stream the weights of one expert that they compute."""
    cpu_flops_per_s: float = Field(ge=1e9, le=1e15)
    """Of the CPU workers on one expert with many tokens, dense bf16."""
    cpu_transfer_ns: LatencyNs
    """One token's activations to the host and back."""
    cpu_slowdown: Slowdown
    """While copies run."""
    link_slowdown_cpu: Slowdown
    """While the CPU computes."""

    predictor_ns: PredictorNs

    link_curve: tuple[CurvePoint, ...] = Field(default=(), strict=False, max_length=1000)
    """What the link's values were fitted to; empty where nobody measured it."""
    also_measured: tuple[OtherValue, ...] = Field(default=(), strict=False, max_length=200)

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        points = [f"{point.kind} of {point.bytes} bytes" for point in self.link_curve]
        names = [other.name for other in self.also_measured]
        for what, entries in (("link_curve", points), ("also_measured", names)):
            twice = [entry for entry in entries if entries.count(entry) > 1]
            if twice:
                raise ValueError(f"field {what!r}: {twice[0]} is given twice")
        return self

    def with_link(self, bytes_per_s: float) -> Self:
        """The same machine with another link rate, in bytes per second; not calibrated any more.

        Raises UserError for a rate out of bounds.
        """
        data = self.model_dump()
        data["calibrated"] = False
        data["link_curve"] = ()
        data["link_bytes_per_s"] = {"value": bytes_per_s, "source": "set by the user"}
        return validated(type(self), data, f"hardware {self.name}")


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or "value" not in entry or not entry.get("source"):
        raise ValueError(f"field {name!r} must be {{value: NUMBER, source: TEXT}}, got {entry!r}")
    unknown = sorted(set(entry) - {"value", "source", "spread"})
    if unknown:
        raise ValueError(f"field {name!r}: {unknown[0]!r} is not known; give value, source, spread")


def list_hardware() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return names_in("hardware")


def load_hardware(name_or_path: str | os.PathLike[str]) -> Hardware:
    """A shipped profile by name, or a user's YAML file of the same form.

    Raises UserError for an unknown name and for a file that is missing or wrong.
    """
    return read_yaml(Hardware, find(name_or_path, "hardware", "hardware"))
