"""Train one MLP a layer, all layers as one batched model.

Loss: binary cross-entropy on the set of top-k experts (ProMoE, arXiv 2410.22134). The layers share
nothing but the minibatches: each keeps its weights of the epoch in which its own validation loss
was lowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from tracer.predictor.data import Rows, RowSource
from tracer.predictor.model import Weights

PARAMETERS_PER_LAYER = 2_000_000
TRAINING_BYTES = 5 * 4
"""Of a parameter: itself, the best so far, its gradient and AdamW's two means, in float32."""
_WIDEST = 4
_UNITS_STEP = 64
_SMALLEST_STD = 1e-4
_SMALLEST_SHARE = 0.01
_VALIDATION_ROWS = 4096


def default_hidden_units(hidden_size: int, num_experts: int) -> int:
    """ProMoE's 2 M parameters a layer, but at most 4 times the model's hidden size.

    >>> default_hidden_units(2048, 64), default_hidden_units(192, 64)
    (896, 768)
    """
    units = min(PARAMETERS_PER_LAYER // (hidden_size + num_experts), _WIDEST * hidden_size)
    return max(_UNITS_STEP, units // _UNITS_STEP * _UNITS_STEP)


@dataclass(frozen=True)
class Recipe:
    """How to train; `patience`: epochs without a better layer before it stops."""

    hidden_units: int
    epochs: int = 30
    seed: int = 0
    device: str = "cpu"
    batch_rows: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    patience: int = 3


@dataclass(frozen=True)
class Epoch:
    """Validation after an epoch: mean over layers; `better`: how many layers it is best for."""

    number: int
    loss: float
    accuracy: float
    better: int


def train(
    rows: RowSource,
    validation: RowSource,
    recipe: Recipe,
    told: Callable[[Epoch], None],
) -> tuple[Weights, int]:
    """Fit the weights on `rows`; return them and the number of epochs.

    `told` hears of each epoch. Equal inputs and seed give equal weights on one machine, device and
    number of threads.
    """
    return _Training(rows, validation, recipe).run(told)


class _Training:
    def __init__(self, rows: RowSource, validation: RowSource, recipe: Recipe) -> None:
        self.rows, self.validation = rows, validation
        self.recipe = recipe
        self.shard_order = np.random.default_rng(recipe.seed)
        self.random = torch.Generator(recipe.device).manual_seed(recipe.seed)
        self.mean, self.std, self.popularity = self._statistics()
        self.parameters = self._initial()
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.best_loss = torch.full((rows.layers,), math.inf, device=recipe.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def run(self, told: Callable[[Epoch], None]) -> tuple[Weights, int]:
        stale = 0
        for number in range(1, self.recipe.epochs + 1):
            self._train_epoch(number)
            epoch = self._validate(number)
            told(epoch)
            stale = 0 if epoch.better else stale + 1
            if stale == self.recipe.patience:
                break
        return self._weights(), number

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the inputs [P, 1, H], uses of the experts [P, E]."""
        layers, hidden = self.rows.layers, self.rows.hidden_size
        device = self.recipe.device
        total = torch.zeros(layers, hidden, dtype=torch.float64, device=device)
        squares = torch.zeros_like(total)
        ran = torch.zeros(layers, 1, dtype=torch.int64, device=device)
        uses = torch.zeros(layers, self.rows.num_experts, dtype=torch.int64, device=device)
        for window in self.rows.windows():
            for inputs, targets in self._in_order(window):
                exact = inputs.double()
                total += exact.sum(0)
                squares += exact.square().sum(0)
                ran += (inputs != 0).any(-1, keepdim=True).sum(0)
                uses += self._chosen(targets).sum(0)
        mean = total / ran.clamp(min=1)
        std = (squares / ran.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        # A feature that hardly varies in training must not be blown up when it does.
        std = std.clamp(min=_SMALLEST_STD).maximum(_SMALLEST_SHARE * std.mean(-1, keepdim=True))
        return mean.float()[:, None], std.float()[:, None], uses

    def _initial(self) -> list[torch.Tensor]:
        """Weights as torch's Linear draws them; the output starts at the experts' popularity."""
        layers, units = self.rows.layers, self.recipe.hidden_units
        inputs = self.rows.hidden_size
        share = self.popularity / self.popularity.sum(-1, keepdim=True).clamp(min=1)
        share = (share * self.rows.top_k).clamp(1e-4, 1 - 1e-4).float()
        parameters = [
            self._uniform((layers, inputs, units), inputs),
            self._uniform((layers, 1, units), inputs),
            self._uniform((layers, units, self.rows.num_experts), units),
            share.logit()[:, None],
        ]
        return [parameter.requires_grad_() for parameter in parameters]

    def _uniform(self, shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
        drawn = torch.rand(shape, generator=self.random, device=self.recipe.device)
        return (2 * drawn - 1) / math.sqrt(fan_in)

    def _train_epoch(self, number: int) -> None:
        seen = 0
        for window in self.rows.windows(self.shard_order):
            for inputs, targets in self._shuffled(window):
                progress = (number - 1 + seen / self.rows.rows) / self.recipe.epochs
                self._step(inputs, targets, progress)
                seen += len(inputs)

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor, progress: float) -> None:
        rate = self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self._losses(self._scores(inputs, self.recipe.dropout), targets).sum().backward()
        self.optimizer.step()

    def _scores(self, inputs: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Scores [P, n, E] of inputs [n, P, H]."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.parameters
        standard = (inputs.float().transpose(0, 1) - self.mean) / self.std
        hidden = torch.baddbmm(hidden_bias, standard, hidden_weight).relu()
        if dropout:
            drawn = torch.rand(hidden.shape, generator=self.random, device=hidden.device)
            hidden = hidden * (drawn >= dropout) / (1 - dropout)
        return torch.baddbmm(output_bias, hidden, output_weight)

    def _losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of each layer over the rows for which it ran: [P]."""
        chosen = self._chosen(targets).transpose(0, 1).float()
        losses = binary_cross_entropy_with_logits(scores, chosen, reduction="none").mean(-1)
        ran = (targets[:, :, 0] >= 0).T
        return (losses * ran).sum(-1) / ran.sum(-1).clamp(min=1)

    def _chosen(self, targets: torch.Tensor) -> torch.Tensor:
        """Bool [n, P, E]: the experts in targets [n, P, k]; none where they are -1."""
        # A column more takes the -1 and is cut off.
        columns = torch.zeros(
            (*targets.shape[:2], self.rows.num_experts + 1), dtype=torch.bool, device=targets.device
        )
        where = torch.where(targets < 0, self.rows.num_experts, targets.long())
        return columns.scatter_(-1, where, True)[..., :-1]

    @torch.no_grad()
    def _validate(self, number: int) -> Epoch:
        loss = torch.zeros_like(self.best_loss)
        found = torch.zeros_like(self.best_loss)
        ran = torch.zeros_like(self.best_loss)
        for window in self.validation.windows():
            for inputs, targets in self._in_order(window):
                scores = self._scores(inputs)
                rows = (targets[:, :, 0] >= 0).sum(0)
                loss += self._losses(scores, targets) * rows
                ran += rows
                best = scores.topk(targets.shape[-1], dim=-1).indices.transpose(0, 1)
                found += self._chosen(targets).gather(-1, best).float().mean(-1).sum(0)
        loss, found = loss / ran.clamp(min=1), found / ran.clamp(min=1)
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        for best, parameter in zip(self.best, self.parameters, strict=True):
            best[better] = parameter.detach()[better]
        return Epoch(number, float(loss.mean()), float(found.mean()), int(better.sum()))

    def _weights(self) -> Weights:
        """The best weights, in the layout of a linear layer, with the standardisation folded in."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.best
        folded = hidden_weight / self.std.mT
        bias = hidden_bias - torch.bmm(self.mean, folded)
        return Weights(
            hidden_weight=folded.mT.contiguous(),
            hidden_bias=bias[:, 0].contiguous(),
            output_weight=output_weight.mT.contiguous(),
            output_bias=output_bias[:, 0].contiguous(),
            popularity=self.popularity,
        )

    def _shuffled(self, window: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(window), generator=self.random, device=self.recipe.device)
        inputs, targets = self._on_device(window)
        for chosen in order.split(self.recipe.batch_rows):
            yield inputs[chosen], targets[chosen]

    def _in_order(self, window: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        inputs, targets = self._on_device(window)
        yield from zip(inputs.split(_VALIDATION_ROWS), targets.split(_VALIDATION_ROWS), strict=True)

    def _on_device(self, window: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.recipe.device
        return torch.from_numpy(window.inputs).to(device), torch.from_numpy(window.targets).to(
            device
        )
