"""Run an unmodified transformers model with its experts in slots, one kernel at a time.

The model is called as ever; where it would call its experts, the engine reads the ids back, lets
the core decide, copies, and computes each group from the slots with transformers' own kernel. This
is the path for prefill, for models that cannot be captured in CUDA graphs, and for plain CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from policies.core import DecisionCore
from replay.driver import Driver
from replay.slots import CopyEngine, SlotPool
from replay.store import ExpertStore

IMPLEMENTATION = "moesim_replay"
KERNEL = "grouped_mm"
"""Transformers' kernel that runs on the slots."""

_MOST_GROUPS = 512  # torch's grouped_mm takes no more than 1,024 matrices


class EagerEngine:
    """One model, its experts in ``store``, decided by ``core``.

    Use as a context manager around forward passes; :meth:`begin_step` and :meth:`end_step` go
    around each. ``forced``: expert ids by layer to execute instead of the model's own, [rows, k].
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[Any],
        store: ExpertStore,
        core: DecisionCore,
        *,
        window: int = 2,
        touch_order: str = "last-use",
    ) -> None:
        self._model = model
        self._modules = list(modules)
        self._core = core
        device = next(model.parameters()).device
        slots = sum(core.plan.capacity) + core.plan.staging_slots
        self.pool = SlotPool(store.layout, slots, device)
        self.copies = CopyEngine(core, store, self.pool, window)
        self.driver = Driver(core, self.copies, touch_order)
        self.forced: Sequence[np.ndarray] | None = None
        #: pass the hidden states through: no event, no experts (to warm up)
        self.idle = False
        self._warm(store)

    def __enter__(self) -> EagerEngine:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _replayed)
        self._kept = self._model.config._experts_implementation
        for layer, module in enumerate(self._modules):
            module._moesim_replay = (self, layer)
        self._model.set_experts_implementation(IMPLEMENTATION)
        return self

    def __exit__(self, *error: object) -> None:
        self._model.set_experts_implementation(self._kept)
        for module in self._modules:
            del module._moesim_replay

    def begin_step(self, step: int, phase: str, begins: Sequence[int] = ()) -> None:
        """Before a forward pass."""
        self.driver.begin_step(step, phase, begins)

    def end_step(self, ends: Sequence[int] = ()) -> None:
        """After a forward pass, once its result is on the host."""
        self.driver.wait()
        self.driver.end_step(ends)

    def experts(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts module returns, [rows, H], for ids and weights [rows, k]."""
        if self.idle:
            return torch.zeros_like(hidden)
        rows, top_k = ids.shape
        on_host = ids.cpu().numpy() if self.forced is None else self.forced[layer]
        out = torch.empty(
            (rows * top_k, hidden.shape[-1]), dtype=hidden.dtype, device=hidden.device
        )
        flat = np.ascontiguousarray(on_host).reshape(-1)
        base = layer * self._core.shape.experts
        slot_of = self._core.memory.slot_of

        def launch(keys: Sequence[int]) -> None:
            slots = np.full(self._core.shape.experts, -1, np.int64)
            for key in keys:
                slots[key - base] = slot_of[key]
            chosen = slots[flat]
            picked = np.flatnonzero(chosen >= 0)
            where = torch.from_numpy(picked).to(hidden.device)
            out[where] = self._compute(layer, hidden[where // top_k], chosen[picked])

        self.driver.event(layer, on_host, launch)
        weighted = out * weights.reshape(-1, 1)
        return weighted.view(rows, top_k, -1).sum(1).to(hidden.dtype)

    def _compute(self, layer: int, hidden: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """The experts in ``slots`` int [m] on ``hidden`` [m, H], unweighted."""
        result = torch.empty_like(hidden)
        for first in self._windows(slots):
            inside = np.flatnonzero((slots >= first) & (slots < first + _MOST_GROUPS))
            rows = torch.from_numpy(inside).to(hidden.device)
            local = torch.from_numpy(slots[inside] - first).to(hidden.device)
            views = {
                name: view[first : first + _MOST_GROUPS] for name, view in self.pool.views.items()
            }
            result[rows] = self._kernel(layer, hidden[rows], local, views)
        return result

    @staticmethod
    def _windows(slots: np.ndarray) -> list[int]:
        """First slots of the ranges that hold all of ``slots``."""
        firsts: list[int] = []
        for slot in np.unique(slots).tolist():
            if not firsts or slot >= firsts[-1] + _MOST_GROUPS:
                firsts.append(slot)
        return firsts

    def _kernel(
        self,
        layer: int,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        views: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        module = self._modules[layer]
        kept = {name: module._parameters[name] for name in views}
        experts = module.num_experts
        # The slots pose as the fused weights: the kernel needs no knowledge of the model.
        module._parameters.update(views)
        module.num_experts = len(next(iter(views.values())))
        try:
            ones = torch.ones((len(slots), 1), dtype=hidden.dtype, device=hidden.device)
            result: torch.Tensor = ALL_EXPERTS_FUNCTIONS[KERNEL](
                module, hidden, slots[:, None], ones
            )
        finally:
            module._parameters.update(kept)
            module.num_experts = experts
        return result

    def _warm(self, store: ExpertStore) -> None:
        """The policy's warm set is there before the clock starts."""
        experts = self._core.shape.experts
        for key, slot in self._core.memory.slot_of.items():
            self.pool.memory[slot].copy_(store.expert(*divmod(key, experts)))


def _replayed(
    module: Any, hidden: torch.Tensor, *args: torch.Tensor, **named: torch.Tensor
) -> torch.Tensor:
    """Stands in for the experts of a replayed model."""
    ids, weights = (*args, *named.values())[:2]
    engine, layer = module._moesim_replay
    result: torch.Tensor = engine.experts(layer, hidden, ids, weights)
    return result
