"""What a lossy policy does to a model's output: perplexity and next-token agreement.

The model reads held-out texts, teacher-forced, ``chunk`` tokens a forward pass with a KV cache,
once as it is and once for each budget; all passes see the same tokens. ``chunk`` 1 is decoding. A
larger one stands for as many decode steps, of which the policy sees the gates together: it goes by
one resident set, and by an expert's most important use, in all of them. Copies land at once.

Fitted policies learn from pieces set aside, which are not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import policies
from configs.budget import MemoryBudget, low_bytes, resolve_budget
from configs.errors import UserError
from configs.geometry import Geometry
from policies.core import DecisionCore
from policies.interface import MissRule, Options, Policy, PolicyData, Shape
from policies.registry import PolicyInfo
from policies.slots import plan_policy
from replay.lossy import COLUMNS, LiveSignals, LossyModel, LossyRun, covered_blocks
from replay.low_bits import low_bit_parameters
from tracer.load_model import Loaded
from tracer.modelinfo import expert_norms, model_geometry, refuse_not_finite
from tracer.prompts import Prompt
from tracer.tap import RoutingTap
from tracer.workload import DECODE, Ragged, distinct

FIT_SHARE = 0.3
_FEWEST_ASIDE = 12
_GATE_COLUMNS = ("weights", "gate_probs", "gate_norms")
_RATIO_ERROR = 0.05  # of weights in bf16 to probabilities
_TIE = 1e-3
_MOST_NATS = 700.0  # exp of more is beyond a double

Pieces = list[list[int]]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to measure: a policy with its parameters at several budgets, on how much text.

    ``budgets``: (--budget, --expert-budget) pairs, one of each None. ``context``: most tokens of a
    piece of text; ``max_tokens``: of all judged pieces; ``chunk``: tokens a step.
    """

    policy: str
    params: dict[str, Any]
    budgets: Sequence[tuple[str | None, str | None]]
    max_tokens: int = 4096
    context: int = 512
    chunk: int = 8
    seed: int = 0


@dataclass
class Scores:
    """Sums over predicted tokens. ``kl``: of the model's distribution from the policy's, nats."""

    tokens: int = 0
    nll: float = 0.0
    own_nll: float = 0.0
    agreed: int = 0
    kl: float = 0.0

    def add(self, own: torch.Tensor, got: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [n, V] of the model and under the policy, and the tokens that came, [n]."""
        own, got = own.float().log_softmax(-1), got.float().log_softmax(-1)
        self.tokens += len(targets)
        self.own_nll -= float(own.gather(-1, targets[:, None]).double().sum())
        self.nll -= float(got.gather(-1, targets[:, None]).double().sum())
        self.agreed += int((own.argmax(-1) == got.argmax(-1)).sum())
        # Tokens that the model itself bars count for nothing.
        self.kl += float((own.exp() * (own - got)).masked_fill(own.isneginf(), 0).double().sum())

    def result(self) -> dict[str, float]:
        """Means."""
        return {
            "perplexity": perplexity(self.nll, self.tokens),
            "next_token_agreement": self.agreed / self.tokens,
            "kl_nats": self.kl / self.tokens,
        }


def perplexity(nll: float, tokens: int) -> float:
    """Of ``tokens`` that came with so much surprise in all, nats."""
    mean = nll / tokens
    if mean > _MOST_NATS:
        raise UserError(
            f"the tokens come with {mean:.0f} nats each, beyond any perplexity: the model's "
            "logits are out of all proportion; are its weights whole, and the --dtype its own?"
        )
    return math.exp(mean)


@dataclass
class Measured:
    """One budget: its memory, the run, and how the model did under it."""

    budget: str
    memory: MemoryBudget
    run: LossyRun
    scores: Scores = field(default_factory=Scores)
    cache: Any = None

    def result(self) -> dict[str, Any]:
        """Nested, JSON-ready."""
        plan = self.run.core.plan
        slots = list(plan.capacity) if not plan.by_bytes else None
        return {
            "budget": self.budget,
            "expert_budget_bytes": self.memory.expert_bytes,
            "peak_bytes": self.memory.fixed_bytes + plan.used_bytes,
            "slots_by_layer": slots,
            **self.scores.result(),
            **lossy_shares(self.run.core),
            "copies": self.run.core.tally.copies,
            "chosen": self.run.core.policy.cache.facts(),
        }


def measure(
    loaded: Loaded, texts: Sequence[Prompt], job: Job, tell: Tell, timed: Geometry | None = None
) -> dict[str, Any]:
    """Run the model on ``texts``; returns what was measured, JSON-ready.

    ``timed``: of the trace that the same policy is timed on. Raises UserError for a lossless
    policy, a model that is not covered or routes among other experts than ``timed``, logits that
    are not finite, too little text, and a budget that is too small.
    """
    info = policies.get(job.policy)
    params, options = info.parse(job.params)
    _check(info, job)
    pieces = [piece for piece in _pieces(loaded, texts, job.context) if len(piece) > 1]
    judged, fitted = _choose(pieces, job)
    model = loaded.weights()
    covered_blocks(model)
    geometry = model_geometry(model, loaded.name, loaded.revision)
    if timed is not None:
        _refuse_other_routing(geometry, timed)
    shape = Shape(
        geometry.num_moe_layers,
        geometry.num_experts,
        geometry.top_k,
        geometry.expert_bytes_by_layer,
        low_bytes(geometry, job.policy, info.low_dtype(params)),
    )
    # The tap is not entered before the pieces set aside are read.
    tap = RoutingTap(model, _GATE_COLUMNS)
    assert tap.gate is not None
    fit = None
    if info.learns(options):
        tell(f"reading {len(fitted)} pieces set aside")
        fit = _record(model, tap, fitted, shape)
    runs = [
        _prepare(job, info, params, options, shape, geometry, fit, model, b) for b in job.budgets
    ]
    if reroutes(runs[0].run.core.policy):
        check_gates(fit or _record(model, tap, fitted, shape), loaded.name)
    low = _low_parameters(model, info.low_dtype(params))
    with LossyModel(model, tap.gate, low) as lossy:
        for index, piece in enumerate(judged):
            tell(f"piece {index + 1} of {len(judged)}, {len(piece)} tokens")
            _judge(model, lossy, runs, piece, index, job.chunk)
    own = runs[0].scores
    return {
        "model": loaded.name,
        "policy": job.policy,
        "params": params,
        "tokens": own.tokens,
        "pieces": {"judged": len(judged), "set_aside": len(fitted)},
        "context": job.context,
        "chunk": job.chunk,
        "kernel": tap.kernel_name,
        "dtype": geometry.expert_dtype,
        "unmodified": {
            "perplexity": perplexity(own.own_nll, own.tokens),
            "peak_bytes": _memory(geometry, job, None, None).total_bytes,
            "expert_bytes": geometry.expert_bytes_total,
        },
        "budgets": [each.result() for each in runs],
        "notes": list(runs[0].run.core.policy.notes),
    }


def _refuse_other_routing(model: Geometry, trace: Geometry) -> None:
    ours, theirs = (
        f"{each.num_moe_layers} layers x {each.num_experts} experts, top-{each.top_k}"
        for each in (model, trace)
    )
    if ours != theirs:
        raise UserError(
            f"--trace: {trace.name} has {theirs}, the model {model.name} {ours}: time it on a "
            "trace of its own, or leave --trace out"
        )


def _check(info: PolicyInfo, job: Job) -> None:
    if info.lossless:
        known = ", ".join(name for name in policies.names() if not policies.get(name).lossless)
        raise UserError(
            f"{info.name} is lossless: the model's output stays as it is; choose one of {known}"
        )
    for name, value, least in (
        ("--max-tokens", job.max_tokens, 2),
        ("--context", job.context, 2),
        ("--chunk", job.chunk, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: give at least {least}")
    if not job.budgets:
        raise UserError("give --expert-budget (such as 50%) or --budget, several times for a front")


# ---------------------------------------------------------------------- the texts


def _pieces(loaded: Loaded, texts: Sequence[Prompt], context: int) -> Pieces:
    """The beginning of each text; where there is one text only, all of it in pieces."""
    if loaded.context is not None and context > loaded.context:
        raise UserError(f"--context {context}: {loaded.name} takes at most {loaded.context} tokens")
    tokens = [loaded.tokenize(text, index) for index, text in enumerate(texts)]
    if len(tokens) > 1:
        return [each[:context] for each in tokens]
    return [tokens[0][at : at + context] for at in range(0, len(tokens[0]), context)]


def _choose(pieces: Pieces, job: Job) -> tuple[Pieces, Pieces]:
    """Judged pieces and those set aside, both evenly spread over the file."""
    if len(pieces) < 2:
        raise UserError(
            "--text has one piece of text only, and policies learn from others than they are "
            "judged on: give more text, or a smaller --context"
        )
    count = max(1, math.ceil(job.max_tokens / max(map(len, pieces))))
    while True:
        aside = max(_FEWEST_ASIDE, int(count * FIT_SHARE / (1 - FIT_SHARE)))
        if count + aside >= len(pieces):
            return _split(pieces, max(1, int(len(pieces) * FIT_SHARE)), job.max_tokens)
        judged, fitted = _split(_spread(pieces, count + aside), aside, job.max_tokens)
        if sum(map(len, judged)) >= job.max_tokens:
            return judged, fitted
        count += 1


def _split(chosen: Pieces, aside: int, max_tokens: int) -> tuple[Pieces, Pieces]:
    """Judged pieces, cut to ``max_tokens`` in all, and as many as ``aside`` among them."""
    marks = {(2 * index + 1) * len(chosen) // (2 * aside) for index in range(aside)}
    fitted = [piece for index, piece in enumerate(chosen) if index in marks]
    judged: Pieces = []
    left = max_tokens
    for index, piece in enumerate(chosen):
        if index not in marks and left > 1:
            judged.append(piece[:left])
            left -= len(judged[-1])
    return judged, fitted


def _spread(pieces: Pieces, count: int) -> Pieces:
    return [pieces[(2 * index + 1) * len(pieces) // (2 * count)] for index in range(count)]


# ---------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Recording:
    """:class:`policies.interface.Recorded` of the pieces set aside."""

    events: Ragged
    columns: dict[str, npt.NDArray[Any]]
    step_of_row: npt.NDArray[Any]
    request_of_row: npt.NDArray[Any]
    phase_of_row: npt.NDArray[Any]

    def column(self, name: str) -> npt.NDArray[Any]:
        """Array [rows, ...]."""
        return self.columns[name]


def _record(model: Any, tap: RoutingTap, pieces: Pieces, shape: Shape) -> Recording:
    """What the unmodified model routes, a token a step as in decoding; pieces are read whole."""
    with tap.collect() as passes:
        for piece in pieces:
            _forward(model, piece, None)
    columns = {name: np.concatenate([rows[name] for rows in passes]) for name in sorted(COLUMNS)}
    steps = np.arange(len(columns["experts"]))
    request_of_row = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    events = distinct(columns["experts"], steps, len(steps), shape.experts, "last-use")
    return Recording(events, columns, steps, request_of_row, np.full(len(steps), DECODE, np.uint8))


def reroutes(policy: Policy) -> bool:
    """Whether the policy sends tokens to experts that the gate did not choose."""
    rule = policy.miss_rule
    return rule is not None and type(rule).routed_rows is not MissRule.routed_rows


def check_gates(fit: Recording, name: str) -> None:
    """Raise UserError where choice or weights do not follow from the gates' probabilities.

    Masking then would have to be done before a correction that is not seen here.
    """
    ids = fit.columns["experts"].astype(np.int64)
    probs = fit.columns["gate_probs"].astype(np.float64)
    there = np.take_along_axis(probs, ids, -1)
    others = probs.copy()
    np.put_along_axis(others, ids, -1.0, -1)
    if bool((others.max(-1) > there.min(-1) + _TIE).any()):
        raise UserError(
            f"{name}: its gates choose by corrected scores, not by their logits alone; policies "
            "that route anew are not measured on it"
        )
    tiny = np.finfo(float).tiny
    ratio = np.log(np.maximum(fit.columns["weights"], tiny) / np.maximum(there, tiny))
    off = np.abs(ratio - np.median(ratio, -1, keepdims=True))
    if float(np.quantile(off, 0.99)) > _RATIO_ERROR:
        raise UserError(
            f"{name}: its weights are not in proportion to its gates' probabilities; policies that "
            "route anew are not measured on it"
        )


# ---------------------------------------------------------------------- running


def _memory(
    geometry: Geometry, job: Job, budget: str | None, expert_budget: str | None
) -> MemoryBudget:
    """For decoding: one token a step."""
    return resolve_budget(
        geometry, budget, expert_budget, kv_tokens=job.context, step_tokens=1, requests=1
    )


def _prepare(
    job: Job,
    info: PolicyInfo,
    params: dict[str, Any],
    options: Options,
    shape: Shape,
    geometry: Geometry,
    fit: Recording | None,
    model: Any,
    budget: tuple[str | None, str | None],
) -> Measured:
    memory = _memory(geometry, job, *budget)
    signals = LiveSignals()
    data = PolicyData(
        shape,
        columns=COLUMNS,
        popularity=None if fit is None else _popularity(fit, shape),
        seed=job.seed,
        signals=signals,
        fit=fit,
        expert_norms=expert_norms(model),
    )
    policy = info.build(params, data)
    plan = plan_policy(shape, policy, options, memory.expert_bytes, fit)
    core = DecisionCore(shape, plan, policy, options, signals=signals)
    return Measured(str(budget[0] or budget[1]), memory, LossyRun(core, signals))


def _popularity(fit: Recording, shape: Shape) -> npt.NDArray[np.int64]:
    """Steps that needed each expert, [L, E]."""
    counted = np.bincount(np.asarray(fit.events.keys), minlength=shape.layers * shape.experts)
    return counted.reshape(shape.layers, shape.experts).astype(np.int64)


def _low_parameters(model: Any, dtype: str | None) -> list[dict[str, torch.Tensor]] | None:
    if dtype is None:
        return None
    return [low_bit_parameters(block.experts, dtype) for block in covered_blocks(model)]


def _passes(model: Any, piece: Sequence[int], chunk: int) -> Iterable[torch.Tensor]:
    """Logits [n, V] of every chunk, the model as it is."""
    cache = None
    for at in range(0, len(piece), chunk):
        logits, cache = _forward(model, piece[at : at + chunk], cache)
        yield logits


@torch.inference_mode()
def _forward(model: Any, tokens: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
    ids = torch.tensor([list(tokens)], device=model.device)
    output = model(ids, past_key_values=cache, use_cache=True)
    refuse_not_finite(output.logits)
    return output.logits[0], output.past_key_values


def _judge(
    model: Any,
    lossy: LossyModel,
    runs: Sequence[Measured],
    piece: Sequence[int],
    request: int,
    chunk: int,
) -> None:
    """One piece through the model and every run, chunk by chunk."""
    for each in runs:
        each.cache = None
    own_passes = iter(_passes(model, piece, chunk))
    for at in range(0, len(piece), chunk):
        tokens = piece[at : at + chunk]
        targets = torch.tensor(piece[at + 1 : at + chunk + 1], device=model.device)
        own = next(own_passes)
        last = at + chunk >= len(piece)
        for each in runs:
            each.run.begin_pass(len(tokens), (request,) if at == 0 else ())
            with lossy.listening_to(each.run):
                got, each.cache = _forward(model, tokens, each.cache)
            each.run.end_pass((request,) if last else ())
            if len(targets):
                each.scores.add(own[: len(targets)], got[: len(targets)], targets)
    for each in runs:
        each.cache = None


def lossy_shares(core: DecisionCore) -> dict[str, float | None]:
    """What the policy changed of the routing: shares of experts and of gate weight."""
    buckets = core.tally.buckets.values()
    asked = sum(bucket.asked for bucket in buckets)
    mass = sum(bucket.gate_mass for bucket in buckets)
    changed = sum(bucket.changed for bucket in buckets)
    low = sum(bucket.low_mass for bucket in buckets)
    lost = sum(bucket.lost_mass for bucket in buckets)
    return {
        "changed_share": changed / asked if asked else None,
        "low_mass_share": low / mass if mass else None,
        "retained_mass_share": 1 - lost / mass if mass else None,
    }
