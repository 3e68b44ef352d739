"""Sets of experts as bits, so that unions and intersections of many are cheap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WORD_BITS = 64


def expert_masks(experts: NDArray, num_experts: int) -> NDArray:
    """Sets of experts as bits: uint64 [n, L, words], from ids [n, L, k]; a null adds nothing."""
    words = -(-num_experts // _WORD_BITS)
    masks = np.zeros((*experts.shape[:2], words), np.uint64)
    for rank in range(experts.shape[2]):
        ids = experts[..., rank].astype(np.int64)
        bits = np.left_shift(np.uint64(1), (ids % _WORD_BITS).astype(np.uint64))
        for word in range(words):
            masks[..., word] |= np.where(ids // _WORD_BITS == word, bits, np.uint64(0))
    return masks


def set_sizes(masks: NDArray) -> NDArray:
    """Number of experts in each set of masks [..., words]."""
    return np.bitwise_count(masks).sum(axis=-1, dtype=np.int64)
