"""Which requests train, which steer early stopping, and which are held out.

Whole prompts go to one side: rows of one request are alike, and so are two answers to one prompt.
A prompt is known by the digest of its token ids, also in another trace of the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from tracer.columns import PREFILL
from tracer.manifest import TOKENS
from tracer.trace import Trace

VALIDATION_SHARE = 0.1
_DIGEST_DIGITS = 16


@dataclass(frozen=True)
class Split:
    """Request ids, ascending; the validation requests decide when to stop, so they trained too."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    heldout: tuple[int, ...]


def prompt_digests(trace: Trace) -> dict[int, str]:
    """Digest of each request's prompt: its prefill's token ids, or all of them without a prefill.

    Raises UserError where a token id is unknown.
    """
    prompts: dict[int, Any] = {}
    texts: dict[int, Any] = {}
    start = 0
    for rows in trace.manifest.shard_rows(TOKENS):
        shard = trace.load(["request", "phase", "token_id"], start, start + rows)
        _refuse_unknown_tokens(trace, shard, start)
        start += rows
        for request in np.unique(shard["request"]).tolist():
            mine = shard["request"] == request
            prefill = mine & (shard["phase"] == PREFILL)
            _update(texts, request, shard["token_id"][mine])
            if prefill.any():
                _update(prompts, request, shard["token_id"][prefill])
    return {
        request: (prompts.get(request) or text).hexdigest()[:_DIGEST_DIGITS]
        for request, text in sorted(texts.items())
    }


def _update(digests: dict[int, Any], request: int, token_ids: NDArray) -> None:
    digests.setdefault(request, hashlib.sha256()).update(token_ids.astype("<i4").tobytes())


def _refuse_unknown_tokens(trace: Trace, shard: Mapping[str, NDArray], start: int) -> None:
    unknown = np.flatnonzero(shard["token_id"] < 0)
    if unknown.size:
        raise UserError(
            f"{trace.path}: row {start + int(unknown[0])}: its token id is unknown, so prompts that"
            " trained cannot be told from others; record the trace with token ids"
        )


def split_requests(
    digests: Mapping[int, str],
    domains: Mapping[int, str | None],
    heldout_share: float,
    seed: int,
) -> Split:
    """Hold out a share of the prompts, evenly over domains, drawn by `seed`.

    Of the others VALIDATION_SHARE validates. Raises UserError for a share outside (0, 1) and for
    fewer prompts than three.
    """
    if not 0 < heldout_share < 1:
        raise UserError(f"test share {heldout_share}: give a share between 0 and 1, such as 0.3")
    members: dict[str, list[int]] = {}
    for request, digest in digests.items():
        members.setdefault(digest, []).append(request)
    if len(members) < 3:
        raise UserError(
            f"{len(members)} distinct prompt(s) cannot be split into a training, a validation and a"
            " held-out part: record at least 3, better hundreds"
        )
    prompts = _by_domain(members, domains, np.random.default_rng(seed))
    # Two prompts stay to train and to validate.
    heldout = _spread(prompts, min(round(heldout_share * len(prompts)), len(prompts) - 2))
    rest = [prompt for prompt in prompts if prompt not in set(heldout)]
    validation = _spread(rest, round(VALIDATION_SHARE * len(rest)))
    train = [prompt for prompt in rest if prompt not in set(validation)]

    def requests(chosen: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted(request for prompt in chosen for request in members[prompt]))

    return Split(requests(train), requests(validation), requests(heldout))


def _by_domain(
    members: Mapping[str, list[int]],
    domains: Mapping[int, str | None],
    rng: np.random.Generator,
) -> list[str]:
    """The prompts, those of a domain together, in an order drawn within each domain."""
    of_domain: dict[str, list[str]] = {}
    for prompt, requests in members.items():
        of_domain.setdefault(domains[requests[0]] or "", []).append(prompt)
    return [
        prompts[index]
        for _, prompts in sorted(of_domain.items())
        for index in rng.permutation(len(prompts))
    ]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Take `count` of the items, at least one, evenly spread."""
    count = max(1, count)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
