"""How often each expert is chosen: over all tokens, and domain by domain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracer.columns import NULL_ID

TOP_SHARES = (10, 25, 50)
UNKNOWN_DOMAIN = "unknown"
_SHUFFLES = 20


def bincount(ids: NDArray, num_experts: int) -> NDArray:
    """Accesses of each expert, int64 [E]; nulls are left out."""
    return np.bincount(ids[ids != NULL_ID].astype(np.int64), minlength=num_experts)


def counts_by_layer(experts: NDArray, num_experts: int) -> NDArray:
    """Accesses of each expert, int64 [L, E], from ids [n, L, k]."""
    layers = range(experts.shape[1])
    return np.stack([bincount(experts[:, layer], num_experts) for layer in layers])


def popularity(experts: NDArray, num_experts: int) -> pd.DataFrame:
    """Layer, expert, accesses, share (of the layer's accesses)."""
    counts = counts_by_layer(experts, num_experts)
    layers = len(counts)
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), num_experts),
            "expert": np.tile(np.arange(num_experts), layers),
            "accesses": counts.reshape(-1),
            "share": _shares(counts).reshape(-1),
        }
    )


def _shares(counts: NDArray) -> NDArray:
    """Each row's shares of its sum; 0 where that is 0."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def skew(table: pd.DataFrame, num_experts: int) -> pd.DataFrame:
    """Layer, top_10_share ..., entropy; from :func:`popularity`."""
    shares = table["share"].to_numpy().reshape(-1, num_experts)
    cumulative = np.cumsum(np.sort(shares, axis=1)[:, ::-1], axis=1)
    columns: dict[str, NDArray] = {"layer": np.arange(len(shares))}
    for percent in TOP_SHARES:
        experts = -(-num_experts * percent // 100)
        columns[f"top_{percent}_share"] = cumulative[:, experts - 1]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    columns["entropy"] = -(shares * logs).sum(axis=1) / np.log(max(num_experts, 2))
    return pd.DataFrame(columns)


def domains(
    request: NDArray, experts: NDArray, requests: pd.DataFrame, num_experts: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the domains' tokens choose, and how far that is from what all tokens choose.

    Two tables: domain, requests, tokens, elsewhere, chance; and domain, layer, expert, share (of
    the domain's accesses in the layer). `elsewhere` is the share of a domain's accesses that would
    have to go to other experts to look like all tokens together, mean of layers; `chance` the same
    where the requests are dealt to the domains at random (mean of a fixed set of shuffles): tokens
    of one request resemble each other whatever their domain. Domains are in order of first request.
    """
    members, index = np.unique(request, return_inverse=True)
    names = requests.set_index("request")["domain"].reindex(members).fillna(UNKNOWN_DOMAIN)
    labels, order = pd.factorize(names)
    deals = list(_deals(labels, len(order)))
    shares, moved = [], []
    for layer in range(experts.shape[1]):
        counts = _counts_by_request(index, experts[:, layer], len(members), num_experts)
        whole = _shares(counts.sum(axis=0))
        dealt = [_shares(deal @ counts) for deal in deals]
        shares.append(dealt[0])
        moved.append([np.abs(share - whole).sum(axis=1) / 2 for share in dealt])
    mean = np.mean(moved, axis=0)  # [deals, domains]
    summary = pd.DataFrame(
        {
            "domain": list(order),
            "requests": np.bincount(labels),
            "tokens": np.bincount(labels[index]),
            "elsewhere": mean[0],
            "chance": mean[1:].mean(axis=0),
        }
    )
    return summary, _long(np.stack(shares, axis=1), list(order))


def _deals(labels: NDArray, domains_in_all: int) -> Iterator[NDArray]:
    """The domains' requests, one-hot [domains, requests]: as they are, then shuffled."""
    rng = np.random.default_rng(0)
    kinds = np.arange(domains_in_all)[:, None]
    yield (labels == kinds).astype(np.float64)
    for _ in range(_SHUFFLES):
        yield (rng.permutation(labels) == kinds).astype(np.float64)


def _counts_by_request(index: NDArray, ids: NDArray, members: int, num_experts: int) -> NDArray:
    """Accesses float64 [requests, E] of one layer, from ids [n, k] and the rows' requests."""
    ran = ids != NULL_ID
    key = (index[:, None] * num_experts + ids)[ran]
    counts = np.bincount(key, minlength=members * num_experts)
    return counts.reshape(members, num_experts).astype(np.float64)


def _long(shares: NDArray, names: list[str]) -> pd.DataFrame:
    """Shares [domains, L, E] as rows."""
    _, layers, experts = shares.shape
    return pd.DataFrame(
        {
            "domain": np.repeat(np.array(names, dtype=object), layers * experts),
            "layer": np.tile(np.repeat(np.arange(layers), experts), len(names)),
            "expert": np.tile(np.arange(experts), layers * len(names)),
            "share": shares.reshape(-1),
        }
    )
