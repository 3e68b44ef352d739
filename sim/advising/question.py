"""What is asked: a target, a machine and a workload; checked before anything is simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

import policies
from configs.errors import UserError
from configs.hardware import load_hardware
from configs.units import format_bytes, parse_bytes
from sim.compare import BOUND, NotRunnable, config_of, leave_out
from sim.inputs import Inputs, TraceSource
from sim.point import Point, Setting, resolve_point
from sim.selection import RESIDENT
from sim.sweeps import PolicyChoice, PolicyChoices, SweepConfig
from tracer.workload import DECODE, PREFILL

BOUNDS = (PolicyChoice(name="belady"), PolicyChoice(name="belady-bypass"), BOUND)
"""Simulated beside every answer: perfect caching, without and with staging slots (which may cost up
to a slot a layer in whole budgets), and perfect prefetching over a perfect cache."""

ALL = PolicyChoice(name=RESIDENT)

_ROUNDED = 1.005
"""A card of 24 GiB, as it is called, has 23.99."""

Percentile = Literal["mean", "p50", "p90", "p99"]


def _target(value: Any) -> Any:
    if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
        raise ValueError("a target is a number of milliseconds above zero")
    return value


TargetMs = Annotated[float, BeforeValidator(_target)]


class Question(BaseModel):
    """What :func:`sim.advising.advise` answers.

    ``tpot_ms``, ``ttft_ms``: targets, at least one; both hold for ``percentile`` of the requests'
    values. ``gpu_memory``: for the whole model, such as ``24GiB`` (None: the card's). ``policies``:
    to choose from; empty: all that are lossless and know no future. A lossy one counts where it is
    named. ``what_if``: simulate a faster link and experts of fewer bits, too. The other fields are
    those of :class:`sim.point.Point`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trace: str
    hardware: str
    tpot_ms: TargetMs | None = None
    ttft_ms: TargetMs | None = None
    percentile: Percentile = "mean"
    gpu_memory: str | None = None
    policies: PolicyChoices = ()
    geometry: str | None = None
    dtype: str | None = None
    link: str | None = None
    timings: str | None = None
    batch: int = Field(default=1, ge=1, le=2**16)
    context: int | None = Field(default=None, ge=1, le=2**30)
    max_tokens: int | None = Field(default=None, ge=1)
    fit_share: float | None = Field(default=None, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, le=2**62)
    what_if: bool = True


@dataclass(frozen=True)
class Asked:
    """A question made out.

    ``candidates``: policies to choose from, by label; ``template``: a point of no policy yet;
    ``setting``: of the point with all experts on the GPU; ``limit_bytes``: of GPU memory;
    ``left_out``: policies that would leave nobody to be judged on.
    """

    question: Question
    trace: TraceSource
    inputs: Inputs
    candidates: dict[str, PolicyChoice]
    template: dict[str, Any]
    setting: Setting
    limit_bytes: int
    left_out: tuple[NotRunnable, ...]

    @property
    def lossy(self) -> bool:
        """Whether a lossy policy was asked for."""
        return any(not policies.get(each.name).lossless for each in self.candidates.values())

    def point(self, choice: PolicyChoice, **changes: Any) -> Point:
        """A point of this question; ``resident`` takes no budget."""
        if policies.get(choice.name).needs_all:
            changes = {**changes, "expert_budget": None, "budget": None}
        fields = {**self.template, "policy": choice.name, "params": choice.set, **changes}
        return Point(**fields)


def ask(question: Question, trace: TraceSource) -> Asked:
    """Check a question against its trace, machine and model.

    Raises UserError or PolicyError for what a user can mend.
    """
    if question.tpot_ms is None and question.ttft_ms is None:
        raise UserError("no target: give --tpot-ms 30, --ttft-ms 500, or both")
    config, left_out = leave_out(_config(question), trace)
    config.check()
    inputs = Inputs(
        trace,
        max_tokens=question.max_tokens,
        fit_share=config.judged_fit_share,
        learned=config.learned,
        batch=question.batch,
        context=question.context,
    )
    template = {
        name: getattr(question, name)
        for name in ("hardware", "geometry", "dtype", "link", "timings", "batch", "context")
    } | {
        "max_tokens": question.max_tokens,
        "fit_share": config.judged_fit_share,
        "learned": config.learned,
        "seed": question.seed,
    }
    setting = resolve_point(inputs, Point(policy=RESIDENT, **template))
    _refuse_targets(question, setting)
    candidates = {
        label_of(choice): choice for choice in config.policies if choice not in (ALL, *BOUNDS)
    }
    return Asked(
        question=question,
        trace=trace,
        inputs=inputs,
        candidates=candidates,
        template=template,
        setting=setting,
        limit_bytes=_limit(question, setting),
        left_out=left_out,
    )


def _refuse_targets(question: Question, setting: Setting) -> None:
    """A trace without prefill has no TTFT, one without decoding no TPOT."""
    phases = setting.workload.phase_of_row
    if question.ttft_ms is not None and not (phases == PREFILL).any():
        raise UserError(
            "--ttft-ms: this trace has no prefill, so there is no TTFT: leave it out, or record a "
            "trace with prefill (moesim trace)"
        )
    if not (phases == DECODE).any():
        raise UserError(
            "the rows read decode nothing, so there is no TPOT: use a trace with decode rows or a "
            "larger --max-tokens"
        )


def label_of(choice: PolicyChoice) -> str:
    """The label of its points."""
    return Point(policy=choice.name, params=choice.set, hardware="").label


def _config(question: Question) -> SweepConfig:
    """The policies as a sweep, which knows what has to be set aside for them."""
    for choice in question.policies:
        if policies.get(choice.name).oracle and choice not in BOUNDS:
            raise UserError(
                f"--policies {choice.name}: it knows the future, so nobody can run it; bounds are "
                "simulated without being named: leave it out"
            )
    chosen = question.policies or tuple(PolicyChoice(name=name) for name in _usual())
    if not any(choice not in (ALL, *BOUNDS) for choice in chosen):
        names = ", ".join(label_of(choice) for choice in chosen)
        raise UserError(
            f"--policies {names}: simulated beside every answer anyway, and nothing to choose "
            "from: name others, or leave --policies out"
        )
    return config_of(
        question.trace,
        policies=(*(each for each in chosen if each not in (ALL, *BOUNDS)), ALL, *BOUNDS),
        hardware=(question.hardware,),
        geometry=question.geometry,
        dtype=question.dtype,
        links=() if question.link is None else (question.link,),
        batch=question.batch,
        context=question.context,
        max_tokens=question.max_tokens,
        fit_share=question.fit_share,
        seed=question.seed,
    )


def _usual() -> list[str]:
    """Names of the policies that are lossless and know no future."""
    infos = {name: policies.get(name) for name in policies.names()}
    return [name for name, info in infos.items() if info.lossless and not info.oracle]


def _limit(question: Question, setting: Setting) -> int:
    """Bytes that the whole model may take; UserError where they do not hold the fixed part."""
    card = load_hardware(question.hardware).gpu_memory_bytes
    fixed = setting.memory.fixed_bytes
    if question.gpu_memory is None:
        if card <= fixed:
            raise UserError(
                f"{question.hardware} has {format_bytes(card)}; without any expert "
                f"{setting.geometry.name} needs {format_bytes(fixed)} "
                f"({format_bytes(setting.memory.kv_bytes)} of it KV cache): lower --context or "
                "--batch, or name a hardware that has more"
            )
        return card
    try:
        given = parse_bytes(question.gpu_memory)
    except UserError as error:
        raise UserError(f"--gpu-memory: {error}") from None
    if card < given <= card * _ROUNDED:
        return card
    if given > card:
        raise UserError(
            f"--gpu-memory {question.gpu_memory}: {question.hardware} has {format_bytes(card)}: "
            "give at most that, or name a hardware that has more"
        )
    if given <= fixed:
        raise UserError(
            f"--gpu-memory {question.gpu_memory}: without any expert {setting.geometry.name} needs "
            f"{format_bytes(fixed)} ({format_bytes(setting.memory.kv_bytes)} of it KV cache): give "
            "more, or lower --context or --batch"
        )
    return given
