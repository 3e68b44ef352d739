"""Distinct experts of a step: as recorded by its tokens, and if B requests decoded together."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracer.columns import DECODE, PREFILL
from tracer.inspect.overlap import token_shares
from tracer.inspect.sets import set_sizes

PHASES = {PREFILL: "prefill", DECODE: "decode"}


def distinct_by_step(
    arrays: dict[str, NDArray], top_k: int, masks: NDArray, num_experts: int
) -> pd.DataFrame:
    """Phase, tokens, steps, distinct, uniform: of the steps as they were recorded."""
    step, phase = arrays["step"], arrays["phase"]
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1))
    tokens = np.diff(np.append(starts, len(step)))
    sizes = set_sizes(np.bitwise_or.reduceat(masks, starts, axis=0))
    ran = np.maximum((sizes > 0).sum(axis=1), 1)
    frame = pd.DataFrame(
        {
            "phase": _step_phases(phase, starts),
            "tokens": tokens,
            "distinct": sizes.sum(axis=1) / ran,
        }
    )
    grouped = frame.groupby(["phase", "tokens"])["distinct"].agg(["size", "mean"]).reset_index()
    table = grouped.rename(columns={"size": "steps", "mean": "distinct"})
    table["uniform"] = uniform_union(table["tokens"].to_numpy(), num_experts, top_k)
    return table


def _step_phases(phase: NDArray, starts: NDArray) -> NDArray:
    low, high = np.minimum.reduceat(phase, starts), np.maximum.reduceat(phase, starts)
    names = np.where(low == PREFILL, PHASES[PREFILL], PHASES[DECODE])
    return np.where(low == high, names, "mixed")


def uniform_union(tokens: NDArray, num_experts: int, top_k: int) -> NDArray:
    """Expected distinct experts of so many tokens, each with k random ones."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def distinct_by_batch(
    arrays: dict[str, NDArray], experts: NDArray, masks: NDArray, num_experts: int
) -> pd.DataFrame:
    """Batch, groups, distinct, skewed, uniform: had B requests decoded in one step, [1, 2, 4 ...].

    At each decode index (a request's first decode token, its second ...) the requests that are so
    long are dealt into groups of B, request i of n // B groups to group i modulo their number;
    those left over are out. No request is cut or repeated, so a large batch has only the indices
    that B requests reach. `distinct`: mean experts a layer that a group needs; `skewed`: the
    expectation for independent tokens as skewed as each layer is; `uniform`: for random experts.
    """
    decode = np.flatnonzero(arrays["phase"] == DECODE)
    table = _unions(_rows_by_index(arrays["request"][decode], decode), masks)
    chosen = token_shares(experts[decode], num_experts)
    runs = chosen[chosen.any(axis=1)]
    batch = table["batch"].to_numpy()
    skewed = [float((1 - (1 - runs) ** size).sum(axis=1).mean()) for size in batch]
    table["skewed"] = skewed
    table["uniform"] = uniform_union(batch, num_experts, experts.shape[2])
    return table


def _rows_by_index(request: NDArray, rows: NDArray) -> list[NDArray]:
    """For each decode index the rows of the requests that are so long, in order of request."""
    order = np.argsort(request, kind="stable")
    sizes = np.unique(request, return_counts=True)[1]
    index = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    by_index = np.argsort(index, kind="stable")
    alive = np.bincount(index) if len(index) else np.zeros(0, np.int64)
    return np.split(rows[order[by_index]], np.cumsum(alive)[:-1])


def _unions(rows_by_index: list[NDArray], masks: NDArray) -> pd.DataFrame:
    most = max((len(rows) for rows in rows_by_index), default=0)
    batches = [2**power for power in range(most.bit_length())]
    totals = np.zeros((len(batches), 3), np.int64)  # groups, experts, layers that ran
    for rows in rows_by_index:
        for number, batch in enumerate(batches[: len(rows).bit_length()]):
            totals[number] += _union(masks[rows], batch)
    return pd.DataFrame(
        {
            "batch": batches,
            "groups": totals[:, 0],
            "distinct": totals[:, 1] / np.maximum(totals[:, 2], 1),
        }
    )


def _union(sets: NDArray, batch: int) -> tuple[int, int, int]:
    """Groups of `batch` among sets [n, L, words]; their experts and the layers all members ran."""
    groups = len(sets) // batch
    members = sets[: batch * groups].reshape(batch, groups, *sets.shape[1:])
    ran = members.any(axis=-1).all(axis=0)
    union = set_sizes(np.bitwise_or.reduce(members, axis=0))
    return groups, int(union[ran].sum()), int(ran.sum())
