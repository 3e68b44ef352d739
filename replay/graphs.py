"""A decode step as CUDA graphs, cut at the experts: what hides behind kernel launches shows.

An unmodified transformers model decodes one token under stream capture with a static KV cache. Each
time it calls its experts the graph in the making ends - its last node copies the expert ids to the
host - and the next begins with the sum of the experts' outputs. A step then is: replay a segment,
wait for the ids, decide, launch the experts' kernels group by group, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from configs.errors import UserError
from replay.cuda_driver import SmallWrites
from replay.driver import Driver, Rows
from replay.kernels import GatedExperts, gated_experts
from replay.launches import GroupLaunches
from sim.spans import SEGMENT

IMPLEMENTATION = "moesim_capture"


@dataclass
class _Boundary:
    """What a layer's gate leaves behind, at fixed addresses: inputs and outputs of its experts."""

    hidden: torch.Tensor
    ids: torch.Tensor
    ids_on_host: np.ndarray
    out: torch.Tensor


class CapturedStep:
    """One decode step of ``rows`` tokens, cut into ``len(modules) + 1`` graphs; empties ``cache``.

    ``token``: int64 [rows, 1] on the device, the input. ``next_token``: int64 [rows], greedy.
    ``logits``: [rows, vocabulary]. The cache's own counters advance with every replay.
    ``mask``: bool [rows, capacity], read at every replay: padding of a batch. Positions are the
    step's own then, see :meth:`begin`; without a mask they are the cache's.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[Any],
        cache: StaticCache,
        rows: int,
        mask: torch.Tensor | None = None,
    ) -> None:
        self.token = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
        self._positions = torch.zeros_like(self.token)
        self._named: dict[str, torch.Tensor] = {}
        if mask is not None:
            self._named = {"attention_mask": mask, "position_ids": self._positions}
        self._tokens = np.zeros(rows, np.int64)
        self._writes = SmallWrites(rows)
        self.boundaries: list[_Boundary] = []
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._rows = rows
        self._outs = _warm_up(model, self.token, cache, self._named)
        layers = {id(module): layer for layer, module in enumerate(modules)}

        def cut(module: Any, hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            ids, weights = (*args, *named.values())[:2]
            return self.cut(layers[id(module)], hidden, ids, weights)

        with _as_experts(model, cut), _capturable_masks():
            self._capture(model, cache)
        with torch.inference_mode():
            cache.reset()

    def _capture(self, model: Any, cache: StaticCache) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            self._begin()
            output = model(self.token, past_key_values=cache, use_cache=True, **self._named)
            if self._named:
                self._positions.add_(1)
            self.logits = output.logits[:, -1]
            self.next_token = self.logits.argmax(-1)
            self.token.copy_(self.next_token[:, None])
            self.next_on_host = torch.empty(self._rows, dtype=torch.long, pin_memory=True)
            self.next_on_host.copy_(self.next_token, non_blocking=True)
            self.graphs[-1].capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def begin(self, positions: torch.Tensor) -> None:
        """Positions int64 [rows, 1] of the next step; every step goes on by one from there.

        A batch begins: a line that does not run gets zeros from its experts; one that runs no more
        goes on with what it got last.
        """
        self._positions.copy_(positions)
        self._outs.zero_()

    def feed(self, tokens: np.ndarray, seats: np.ndarray | None) -> None:
        """The next step's tokens, of the lines ``seats``; idle ones get 0. None: of the one line.

        They travel in the commands: a copy would wait behind those of experts.
        """
        if seats is None:
            self.token.fill_(int(tokens[0]))
            return
        self._tokens[:] = 0
        self._tokens[seats] = tokens
        stream = torch.cuda.current_stream().cuda_stream
        self._writes.write(stream, self.token.data_ptr(), self._tokens.tolist())

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self.graphs.append(graph)

    def cut(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The model calls its experts: end this graph, begin the next with their sum."""
        rows, top_k = ids.shape
        # Allocated while capturing, so the addresses are the graphs' own. Not so the outputs: idle
        # lines' are never written, and the graphs' memory holds what another of their kernels left.
        narrow = ids.to(torch.int32)
        host = torch.empty((rows, top_k), dtype=torch.int32, pin_memory=True)
        host.copy_(narrow, non_blocking=True)
        out = self._outs[layer]
        self.boundaries.append(_Boundary(hidden, narrow, host.numpy(), out))
        self.graphs[-1].capture_end()
        self._begin()
        weighted = out * weights.reshape(-1, 1)
        return weighted.view(rows, top_k, -1).sum(1).to(hidden.dtype)


@contextmanager
def _capturable_masks() -> Iterator[None]:
    """Inside, masks for eager attention are made without a copy from the host.

    Some releases of transformers copy a zero, which a stream under capture refuses.
    """
    kept = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **named: Any) -> Any:
        named["allow_is_causal_skip"] = False
        mask = sdpa_mask(*args, **named)
        if mask is None:
            return None
        return torch.where(mask, mask.new_zeros((), dtype=dtype), torch.finfo(dtype).min)

    ALL_MASK_ATTENTION_FUNCTIONS.register("eager", eager_mask)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("eager", kept)


@contextmanager
def _as_experts(model: Any, function: Any) -> Iterator[None]:
    """Inside, the model calls ``function`` for its experts."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, function)
    kept = model.config._experts_implementation
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(kept)


def _warm_up(
    model: Any, token: torch.Tensor, cache: StaticCache, named: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The cache's tensors and the libraries' workspaces must be there before the capture.

    Returns zeros for the outputs of every layer's experts, [layers, rows * k, H].
    """
    outs: list[torch.Tensor] = []

    def nothing(module: Any, hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        ids = (*args, *named.values())[0]
        outs.append(hidden.new_zeros((ids.numel(), hidden.shape[-1])))
        return torch.zeros_like(hidden)

    with _as_experts(model, nothing), torch.inference_mode():
        model(token, past_key_values=cache, use_cache=True, **named)
        zeros = torch.stack(outs)
    torch.cuda.synchronize()
    return zeros


class GraphEngine:
    """Decodes with captured segments, a batch of up to the captured step's rows.

    ``driver`` is that of the engine that prefills: the cache of experts is one.
    ``forced``: expert ids by layer to execute instead of the model's own, int [layers, n, k].
    ``seats`` int [n]: lines of the batch that run, in the order that the core sees; None: all. Of
    the others no expert is computed, what they give is nobody's.
    """

    def __init__(self, driver: Driver, step: CapturedStep, launches: GroupLaunches) -> None:
        self.driver = driver
        self.step = step
        self.forced: np.ndarray | None = None
        self.seats: np.ndarray | None = None
        self._launches = launches
        self._experts = driver.core.shape.experts

    def decode(self, step: int, begins: Sequence[int] = (), ends: Sequence[int] = ()) -> None:
        """One step: the token in ``step.token`` goes in, the next one is there when it returns."""
        driver, captured = self.driver, self.step
        driver.begin_step(step, "decode", begins)
        mark = driver.ledger.mark
        for layer, edge in enumerate(captured.boundaries):
            captured.graphs[layer].replay()
            mark(SEGMENT, layer)
            driver.wait(layer)
            self._event(layer, self._chosen(layer, edge))
        head = len(captured.boundaries)
        captured.graphs[-1].replay()
        mark(SEGMENT, head)
        driver.wait(head)
        driver.end_step(ends)

    def _chosen(self, layer: int, edge: _Boundary) -> np.ndarray:
        if self.forced is not None:
            return np.asarray(self.forced[layer])
        return edge.ids_on_host if self.seats is None else edge.ids_on_host[self.seats]

    def _placed(self, edge: _Boundary, ids: np.ndarray) -> np.ndarray:
        """Experts of all lines of the captured step, -1 in idle ones."""
        if self.seats is None:
            return ids
        placed = np.full(edge.ids_on_host.shape, -1, np.int64)
        placed[self.seats] = ids
        return placed

    def _event(self, layer: int, ids: np.ndarray) -> None:
        slot_of = self.driver.core.memory.slot_of
        base = layer * self._experts
        edge = self.step.boundaries[layer]
        placed = self._placed(edge, ids)
        flat = placed.reshape(-1).tolist()

        def launch(keys: Sequence[int]) -> None:
            chosen = {key - base: slot_of[key] for key in keys}
            slots = [chosen.get(expert, -1) for expert in flat]
            self._launches.launch(layer, slots)

        self.driver.event(layer, ids, launch, Rows(edge.hidden, edge.out, placed))


def require_kernels(modules: Sequence[Any], views: dict[str, torch.Tensor]) -> list[GatedExperts]:
    """Kernels for all layers; UserError names an experts class that they cannot run."""
    kernels = []
    for module in modules:
        kernel = gated_experts(module, views)
        if kernel is None:
            raise UserError(
                f"{type(module).__name__}: no kernel reads its experts from slots; run it eagerly"
            )
        kernels.append(kernel)
    return kernels
