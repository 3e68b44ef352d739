"""Where the MoE classes of transformers differ: which are covered, and how their routing reads.

Nearly all call `experts(hidden [T, H], ids [T, k], weights [T, k])`; `ADAPTERS` has those that do
not, and those that transformers does not dispatch although they do. Gates differ in how logits
become scores and scores a choice; `fit_gate` finds both from what a few tokens ran.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from configs.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]
_LAYER_ID = re.compile(r"(?:^|\.)(\d+)\.")
_PROBABILITY_ERROR = 1e-2
_LINEAR_ERROR = 2e-2
_SCORE_ERROR = 1e-2  # mean relative; weights in bf16 are off by 2^-9
_CHOICE_ERROR = 1e-6


@dataclass(frozen=True)
class Adapter:
    """How the routing of one class of experts is seen.

    `read(block, first, second)` turns what was noted into ids [T, k], -1 where no expert ran (those
    last), and weights [T, k]: the second and third argument of the experts, or the router's first
    two outputs where `from_router`, of which the second then is its logits. `amend` replaces the
    experts' arguments.
    """

    read: Callable[[MoeBlock, torch.Tensor, torch.Tensor], Pair] | None = None
    from_router: bool = False
    amend: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer's modules. `num_experts` counts experts with weights."""

    name: str
    layer_id: int
    block: nn.Module
    router: nn.Module
    experts: Any
    adapter: Adapter
    num_experts: int


def _read_llama4(block: MoeBlock, scores: torch.Tensor, _: torch.Tensor) -> Pair:
    # All experts run on inputs scaled by the scores, which are 0 but for the chosen.
    weights, ids = scores.topk(int(block.router.top_k), dim=-1)  # type: ignore[arg-type]
    return ids, weights


def _read_longcat(block: MoeBlock, ids: torch.Tensor, weights: torch.Tensor) -> Pair:
    # Ids from num_routed_experts on are identity experts: no weights, nothing to cache.
    order = (ids >= block.num_experts).long().argsort(dim=-1, stable=True)
    ids, weights = ids.gather(-1, order), weights.gather(-1, order)
    return ids.masked_fill(ids >= block.num_experts, -1), weights


def _read_one_hot(_: MoeBlock, chosen: torch.Tensor, weights: torch.Tensor) -> Pair:
    # [T, 1, E], all 0 where the expert's capacity was spent.
    ran = chosen.sum(-1) > 0
    return chosen.argmax(-1).masked_fill(~ran, -1), weights.reshape(ran.shape)


def _amend_nllb(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # Transformers 5 takes the mask [T, E] of the first choice for ids, so that experts 0 and 1 run
    # for every token; the combining weights tell the two that were meant.
    hidden, _, combine = arguments
    weights, ids = combine.topk(2, dim=-1)
    return hidden, ids, weights


def _read_nllb(_: MoeBlock, ids: torch.Tensor, weights: torch.Tensor) -> Pair:
    return ids.masked_fill(weights == 0, -1), weights


ADAPTERS: dict[str, Adapter] = {
    "Llama4TextExperts": Adapter(_read_llama4, from_router=True),
    "DbrxExperts": Adapter(),
    "LongcatFlashExperts": Adapter(_read_longcat),
    "Step3p7Experts": Adapter(),
    "SwitchTransformersExperts": Adapter(_read_one_hot),
    "NllbMoeExperts": Adapter(_read_nllb, amend=_amend_nllb),
}
_DISPATCHED = Adapter()
_REFUSED = {
    "jetmoe": "its experts lie inside attention and MLP layers without a router beside them",
}


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Find the MoE layers, in order of execution.

    Raises UserError for a model that has none, that is not covered, or that is an encoder and a
    decoder at once (tap one of the two).
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if kind in _REFUSED:
        raise UserError(f"{type(model).__name__} is not covered: {_REFUSED[kind]}")
    blocks = [
        block
        for name, module in model.named_modules()
        if (block := _moe_block(name, module)) is not None
    ]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no MoE layers: nothing to record")
    if len({block.num_experts for block in blocks}) > 1:
        raise UserError(f"{type(model).__name__}: its layers differ in number of experts")
    if len({re.split(r"\d+", block.name)[0] for block in blocks}) > 1:
        raise UserError(
            f"{type(model).__name__}: MoE layers in more than one stack; record a decoder-only"
            " model, or tap its encoder or decoder alone"
        )
    _refuse_top_k(config, blocks[0])
    return blocks


def _refuse_top_k(config: Any, block: MoeBlock) -> None:
    """A choice of none, or of more experts than there are, fails in the first forward pass."""
    owners = (block.router, block.block, *([config.get_text_config()] if config else []))
    names = ("top_k", "num_experts_per_tok")
    found = [getattr(owner, name, None) for owner in owners for name in names]
    top_k = next((value for value in found if isinstance(value, int)), None)
    if top_k is not None and not 1 <= top_k <= _logit_width(block):
        raise UserError(
            f"{block.name}: top-{top_k} of {_logit_width(block)} experts is no choice: mend "
            "config.json (num_experts_per_tok)"
        )


def _moe_block(name: str, module: nn.Module) -> MoeBlock | None:
    children = dict(module.named_children())
    router = children.get("gate", children.get("router"))
    if "experts" not in children or router is None:
        return None
    experts: Any = children["experts"]
    kind = type(experts)
    adapter = _DISPATCHED if is_dispatched(experts) else ADAPTERS.get(kind.__name__)
    match = _LAYER_ID.search(name)
    if adapter is None or match is None:
        raise UserError(
            f"{name}: {kind.__name__} of {type(module).__name__} is not covered: neither"
            " dispatched by transformers nor known here"
        )
    count = int(getattr(experts, "num_routed_experts", getattr(experts, "num_experts", 0)))
    return MoeBlock(name, int(match[1]), module, router, experts, adapter, count)


def is_dispatched(experts: nn.Module) -> bool:
    """Whether transformers looks up a kernel for these experts by the configured name."""
    return hasattr(type(experts).forward, "__wrapped__")


def shared_module(block: MoeBlock) -> nn.Module | None:
    """The experts of a layer that run for every token, if it has some."""
    for name, child in block.block.named_children():
        if name.startswith("shared_") and not name.endswith("gate"):
            return child
    return None


def router_logits(block: MoeBlock, gate_input: torch.Tensor, output: Any) -> torch.Tensor:
    """Logits [T, G] of a router; their place in `output` differs.

    G counts the experts that have weights, E, and behind them those that have none.
    Raises UserError for a router that neither gives logits nor has one linear layer to make them.
    """
    width = _logit_width(block)
    candidates = output if isinstance(output, tuple) else (output,)
    for tensor in candidates[1:] if block.adapter.from_router else candidates:
        if tensor.is_floating_point() and tensor.shape[-1] == width:
            return tensor.reshape(-1, width)
    linear = [m for m in block.router.modules() if getattr(m, "out_features", 0) == width]
    if len(linear) != 1:
        raise UserError(f"{block.name}: its router gives no logits; record without gate columns")
    hidden = gate_input.reshape(-1, gate_input.shape[-1])
    logits: torch.Tensor = linear[0](hidden.to(linear[0].weight.dtype))  # type: ignore[arg-type]
    return logits


def _logit_width(block: MoeBlock) -> int:
    return int(getattr(block.experts, "total_experts", block.num_experts))


@dataclass(frozen=True)
class Gate:
    """How a model's gates turn logits into scores, and scores into a choice.

    `score` is softmax, sigmoid or probability (the router gives probabilities); `rule` makes
    ranking scores of logits [T, L, G], None where no known one explains the choice. `weight`
    [L, H, G] and `bias` [L, 1, G] where the gates are linear, None where they must be called.
    """

    score: str
    rule: Callable[[torch.Tensor], torch.Tensor] | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    num_experts: int

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores [..., E] of logits [..., G], normalised to sum 1 over all G."""
        return _scores(logits.float(), self.score, normalised=True)[..., : self.num_experts]

    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        """What the experts [T, L, E] are chosen by, the greatest first, of logits [T, L, G]."""
        assert self.rule is not None
        return self.rule(logits.float())[..., : self.num_experts]


def _scores(logits: torch.Tensor, score: str, normalised: bool = False) -> torch.Tensor:
    if score == "probability":
        return logits
    if score == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True) if normalised else scores


def fit_gate(
    blocks: Sequence[MoeBlock],
    gate_inputs: Sequence[torch.Tensor],
    logits: Sequence[torch.Tensor],
    routes: Sequence[Pair],
) -> Gate:
    """Find the gates' score and choice from a probe: per layer [T, H], [T, G], and routes [T, k].

    The score is sigmoid where the executed weights are proportional to that, and softmax elsewhere;
    the choice is the first rule whose best k are the executed ids of every token, if any is.
    """
    stacked = torch.stack([each.float() for each in logits], dim=1)
    ids = torch.stack([route[0] for route in routes], dim=1)
    weights = torch.stack([route[1].float() for route in routes], dim=1)
    score = _fit_score(stacked, ids, weights)
    rules = _choice_rules(blocks, score)
    count = blocks[0].num_experts
    rule = next((rule for rule in rules if _explains(rule(stacked)[..., :count], ids)), None)
    return Gate(score, rule, *_linear(blocks, gate_inputs, logits), num_experts=count)


def _fit_score(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> str:
    sums = logits.sum(-1)
    if (logits >= 0).all() and ((sums - 1).abs() < _PROBABILITY_ERROR).all():
        return "probability"
    ran = ids >= 0

    def misfit(score: str) -> float:
        at_ids = _scores(logits, score).gather(-1, ids.clamp(min=0))
        log_ratio = (weights.clamp(min=1e-9) / at_ids.clamp(min=1e-9)).log()
        # One factor a token where the weights are normalised, one for all where top-1.
        if ids.shape[-1] == 1:
            return float((log_ratio - log_ratio[ran].mean())[ran].abs().mean())
        mean = (log_ratio * ran).sum(-1, keepdim=True) / ran.sum(-1, keepdim=True).clamp(min=1)
        return float((log_ratio - mean)[ran].abs().mean())

    sigmoid = misfit("sigmoid")
    return "sigmoid" if sigmoid < min(_SCORE_ERROR, misfit("softmax")) else "softmax"


def _choice_rules(
    blocks: Sequence[MoeBlock], score: str
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Rules from logits [T, L, G] to ranking scores, the most particular first."""
    found = [_correction(block) for block in blocks]
    bias: Any = 0.0
    if all(each is not None for each in found):
        bias = torch.stack([each.reshape(-1) for each in found])
    groups, kept = (
        _attribute(blocks[0], "num_group", "n_group"),
        _attribute(blocks[0], "topk_group"),
    )
    rules: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if groups > 1:
        for best in (2, 1):
            rules.append(partial(_grouped_choice, score, bias, groups, kept, best))
    if isinstance(bias, torch.Tensor):
        rules.append(lambda logits: _scores(logits, score) + bias)
    return [*rules, lambda logits: logits]


def _grouped_choice(
    score: str, bias: Any, groups: int, kept: int, best: int, logits: torch.Tensor
) -> torch.Tensor:
    return _in_groups(_scores(logits, score) + bias, groups, kept, best)


def _in_groups(scores: torch.Tensor, groups: int, kept: int, best: int) -> torch.Tensor:
    """Experts outside the `kept` groups with the greatest sum of `best` scores come last."""
    grouped = scores.unflatten(-1, (groups, -1))
    group_scores = grouped.topk(min(best, grouped.shape[-1]), dim=-1)[0].sum(-1)
    chosen = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(kept, dim=-1)[1], 1)
    return torch.where(chosen[..., None] > 0, grouped, grouped - 1e4).flatten(-2)


def _attribute(block: MoeBlock, *names: str) -> int:
    for owner in (block.router, block.block):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return 0


def _correction(block: MoeBlock) -> Any:
    for owner in (block.router, block.block):
        for name, tensor in (*owner.named_buffers(), *owner.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                return tensor.detach().float()
    return None


def _explains(ranking: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether no expert that did not run ranks above one that ran; ties are allowed."""
    ran = torch.zeros_like(ranking).scatter_add(-1, ids.clamp(min=0), (ids >= 0).float()) > 0
    worst_run = ranking.masked_fill(~ran, float("inf")).amin(-1)
    best_other = ranking.masked_fill(ran, float("-inf")).amax(-1)
    return bool((worst_run >= best_other - _CHOICE_ERROR).all())


def _linear(
    blocks: Sequence[MoeBlock], gate_inputs: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights [L, H, G] and biases [L, 1, G] of the gates, if the logits are theirs."""
    found = [_gate_parameters(block) for block in blocks]
    if any(each is None for each in found):
        return None, None
    pairs = [each for each in found if each is not None]
    for (weight, bias), inputs, expected in zip(pairs, gate_inputs, logits, strict=True):
        got = inputs.float() @ weight.float().T + (0 if bias is None else bias.float())
        scale = expected.float().abs().amax()
        if not bool(((got - expected.float()).abs() <= _LINEAR_ERROR * scale).all()):
            return None, None
    dtype = gate_inputs[0].dtype
    weights = torch.stack([weight.T.to(dtype) for weight, _ in pairs])
    biases = [bias for _, bias in pairs if bias is not None]
    if len(biases) not in (0, len(pairs)):
        return None, None
    return weights, torch.stack(biases).to(dtype)[:, None] if biases else None


def _gate_parameters(block: MoeBlock) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    width = _logit_width(block)
    parameters = dict(block.router.named_parameters())
    matrices = [p.detach() for p in parameters.values() if p.dim() == 2 and p.shape[0] == width]
    if len(matrices) != 1:
        return None
    biases = [p.detach() for n, p in parameters.items() if n.split(".")[-1] == "bias"]
    if len(biases) > 1:
        return None
    return matrices[0], biases[0] if biases else None
