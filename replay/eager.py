"""Run an unmodified transformers model with its experts in slots, one kernel at a time.

The model is called as ever; where it would call its experts, the engine reads the ids back, lets
the core decide, copies, and computes each group from the slots with transformers' own kernel. This
is the path for prefill, for models that cannot be captured in CUDA graphs, and for plain CPUs.

On a GPU the groups of a gated experts module are computed by the kernels of :mod:`replay.tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from policies.core import DecisionCore
from replay.driver import Driver, Rows
from replay.slots import POISON, CopyEngine, SlotPool, SlotRaceError
from replay.store import ExpertStore
from sim.spans import SEGMENT

if TYPE_CHECKING:
    from replay.predictors import Predictors
    from replay.tiles import TileExperts

IMPLEMENTATION = "moesim_replay"
KERNEL = "grouped_mm"
"""Transformers' kernel that runs on the slots."""

_MOST_GROUPS = 512  # torch's grouped_mm takes no more than 1,024 matrices


class EagerEngine:
    """One model, its experts in ``store``, decided by ``core``.

    Use as a context manager around forward passes; :meth:`begin_step` and :meth:`end_step` go
    around each. ``most_tokens``: of a pass, for which memory is taken beforehand; more tokens
    may come. ``forced``: expert ids by layer to execute instead of the model's own, [rows, k].
    ``check``: slots hold NaNs until their expert is there, and computing from one too early raises
    SlotRaceError; for tests, it slows the copies down.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[Any],
        store: ExpertStore,
        core: DecisionCore,
        *,
        window: int = 2,
        link_scale: float = 1.0,
        touch_order: str = "last-use",
        most_tokens: int = 0,
        check: bool = False,
    ) -> None:
        self._model = model
        self._modules = list(modules)
        self._core = core
        device = next(model.parameters()).device
        slots = sum(core.plan.capacity) + core.plan.staging_slots
        self.pool = SlotPool(store.layout, slots, device)
        self._check = check
        if check:
            self.pool.memory.fill_(POISON)
        self.copies = CopyEngine(core, store, self.pool, window, link_scale, poison=check)
        self.driver = Driver(core, self.copies, touch_order)
        self.forced: Sequence[np.ndarray] | None = None
        self._kept: torch.Tensor | None = None
        #: told the gate inputs of the pass in progress
        self.predictors: Predictors | None = None
        on_gpu = self.pool.memory.is_cuda
        ids = (most_tokens, core.shape.top_k)
        self._ids = torch.empty(ids, dtype=torch.int32, pin_memory=on_gpu)
        self._tiles = self._tile_experts(most_tokens) if on_gpu else None
        self._warm(store)

    def __enter__(self) -> EagerEngine:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _replayed)
        self._implementation = self._model.config._experts_implementation
        for layer, module in enumerate(self._modules):
            module._moesim_replay = (self, layer)
        self._model.set_experts_implementation(IMPLEMENTATION)
        return self

    def __exit__(self, *error: object) -> None:
        self._model.set_experts_implementation(self._implementation)
        for module in self._modules:
            del module._moesim_replay
        if self.predictors is not None:
            self.predictors.hidden = None

    def _tile_experts(self, tokens: int) -> TileExperts | None:
        """None: no kernel of ours knows this kind of experts."""
        # Triton is there where CUDA is.
        from replay.kernels import gated_experts
        from replay.tiles import TileExperts, common_kernel

        views = self.pool.views
        kernel = common_kernel([gated_experts(module, views) for module in self._modules])
        if kernel is None:
            return None
        shape = self._core.shape
        return TileExperts(kernel, shape.experts, shape.top_k, tokens)

    def keep(self, places: npt.NDArray[np.int64] | None) -> None:
        """Of the next passes' tokens, run these alone through the experts; the others get zeros.

        ``places`` int64 [n], in the order that the core sees; None: all. Padding is left out so.
        """
        device = self.pool.memory.device
        self._kept = None if places is None else torch.from_numpy(places).to(device)

    def begin_step(self, step: int, phase: str, begins: Sequence[int] = ()) -> None:
        """Before a forward pass."""
        self.driver.begin_step(step, phase, begins)

    def end_step(self, ends: Sequence[int] = ()) -> None:
        """After a forward pass, once its result is on the host."""
        head = len(self._modules)
        self.driver.ledger.mark(SEGMENT, head)
        self.driver.wait(head)
        self.driver.end_step(ends)

    def experts(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts module returns, [rows, H], for ids and weights [rows, k]."""
        kept = self._kept
        if kept is None:
            return self._experts(layer, hidden, ids, weights)
        result = torch.zeros_like(hidden)
        result[kept] = self._experts(layer, hidden[kept], ids[kept], weights[kept])
        return result

    def _experts(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        rows, top_k = ids.shape
        narrow = ids.to(torch.int32)
        on_host = self._host_ids(narrow)
        out = torch.empty(
            (rows * top_k, hidden.shape[-1]), dtype=hidden.dtype, device=hidden.device
        )
        self.driver.ledger.mark(SEGMENT, layer)
        self.driver.wait(layer)
        chosen = on_host if self.forced is None else self.forced[layer]
        flat = np.ascontiguousarray(chosen, dtype=np.int64).reshape(-1)
        if self.predictors is not None:
            self.predictors.hidden = hidden
        launch = self._launcher(layer, hidden, flat, out, top_k)
        self.driver.event(layer, chosen, launch, Rows(hidden, out, chosen))
        if self._check:
            self.require_finite(out, f"layer {layer}")
        weighted = out * weights.reshape(-1, 1)
        return weighted.view(rows, top_k, -1).sum(1).to(hidden.dtype)

    @staticmethod
    def require_finite(values: torch.Tensor, where: str) -> None:
        """Raise SlotRaceError for numbers that only a slot in the making can give."""
        if not bool(torch.isfinite(values).all()):
            raise SlotRaceError(f"{where}: an expert was computed before its copy was there")

    def _host_ids(self, ids: torch.Tensor) -> npt.NDArray[Any]:
        """Where ``ids`` will be on the host, once the device has run everything."""
        if not ids.is_cuda:
            return ids.numpy()
        if len(self._ids) < len(ids):
            self._ids = torch.empty(ids.shape, dtype=torch.int32, pin_memory=True)
        host = self._ids[: len(ids)]
        host.copy_(ids, non_blocking=True)
        return host.numpy()

    def _launcher(
        self,
        layer: int,
        hidden: torch.Tensor,
        flat: npt.NDArray[np.int64],
        out: torch.Tensor,
        top_k: int,
    ) -> Callable[[Sequence[int]], None]:
        """What computes a group of the event: assignments ``flat``, results into ``out``."""
        base = layer * self._core.shape.experts
        slot_of = self._core.memory.slot_of
        if self._tiles is not None:
            event = self._tiles.event(hidden, flat, out)
            return lambda keys: event.launch({key - base: slot_of[key] for key in keys})

        def launch(keys: Sequence[int]) -> None:
            slots = np.full(self._core.shape.experts, -1, np.int64)
            for key in keys:
                slots[key - base] = slot_of[key]
            chosen = slots[flat]
            picked = np.flatnonzero(chosen >= 0)
            where = torch.from_numpy(picked).to(hidden.device)
            out[where] = self._compute(layer, hidden[where // top_k], chosen[picked])

        return launch

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
