"""A model ready to be replayed: its experts on the host, everything else on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from replay.checkpoint import ExpertReader
from replay.layout import ExpertLayout, layout_of
from replay.skeleton import (
    experts_modules,
    load_skeleton,
    meta_model,
    random_skeleton,
    read_config,
)
from replay.store import ExpertStore


@dataclass
class ReplayModel:
    """``model``: the skeleton; ``modules``: its MoE layers' experts modules, in order.

    ``source``: "checkpoint", or "synthetic" where the weights are random: such a model tells time,
    not text.
    """

    model: Any
    modules: list[Any]
    store: ExpertStore
    layout: ExpertLayout
    num_experts: int
    top_k: int
    source: str

    def close(self) -> None:
        """Give the host's memory back."""
        self.store.close()


def from_checkpoint(
    path: str | Path, device: str, dtype: torch.dtype = torch.bfloat16
) -> ReplayModel:
    """A checkpoint: experts read one by one into host memory, never through the GPU.

    Raises UserError for a model without fused experts and for a damaged checkpoint.
    """
    config = read_config(path)
    meta = meta_model(config, dtype)
    blocks = _blocks(meta)
    layout = layout_of(next(iter(blocks.values())))
    names = list(blocks)
    store = ExpertStore(layout, len(blocks), _experts(blocks), register=device == "cuda")
    with _closed_on_failure(store):
        with ExpertReader(path, meta, blocks) as reader:
            store.fill(lambda layer, expert: reader.read(names[layer], expert))
        skeleton = load_skeleton(path, dtype, device)
        return _ready(skeleton, store, layout, config, "checkpoint")


def synthetic(config: Any, device: str, seed: int = 0) -> ReplayModel:
    """Random weights of a configuration's shapes."""
    dtype = torch.bfloat16
    blocks = _blocks(meta_model(config, dtype))
    layout = layout_of(next(iter(blocks.values())))
    store = ExpertStore(layout, len(blocks), _experts(blocks), register=False)
    with _closed_on_failure(store):
        # Filled before it is pinned: touched memory is pinned seven times as fast.
        store.fill_random(seed)
        if device == "cuda":
            store.register()
        skeleton = random_skeleton(config, dtype, device, seed)
        return _ready(skeleton, store, layout, config, "synthetic")


@contextmanager
def _closed_on_failure(store: ExpertStore) -> Iterator[None]:
    """Gives the host's memory back where a model cannot be made ready."""
    try:
        yield
    except BaseException:
        store.close()
        raise


def _blocks(meta: Any) -> dict[str, Any]:
    blocks = experts_modules(meta)
    if not blocks:
        raise UserError(f"{type(meta).__name__} has no fused experts: it cannot be replayed")
    layouts = {layout_of(block) for block in blocks.values()}
    if len(layouts) > 1:
        raise UserError(f"{type(meta).__name__}: experts differ in size by layer")
    return blocks


def _experts(blocks: dict[str, Any]) -> int:
    return int(next(iter(blocks.values())).num_experts)


def _ready(
    skeleton: Any, store: ExpertStore, layout: ExpertLayout, config: Any, source: str
) -> ReplayModel:
    modules = list(experts_modules(skeleton).values())
    text = config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None) or text.num_experts_per_token
    return ReplayModel(
        skeleton, modules, store, layout, int(modules[0].num_experts), int(top_k), source
    )
