"""Export how often each expert was used, for tools that place experts on GPUs by their load.

- EPLB (deepseek-ai/EPLB, eplb.py): `rebalance_experts(weight, ...)` takes the load statistics
  [layers, logical experts]; a row for each MoE layer.
- SGLang (sgl-project/sglang, python/sglang/srt/eplb/expert_location.py): `--init-expert-location
  FILE.json` takes an object with `logical_count` [layers, logical experts], from which SGLang
  computes the placement; a row for each decoder layer, as its recorder writes it: zeros in dense
  layers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import write_atomically
from tracer.columns import DECODE, PREFILL
from tracer.trace import Trace

_PHASES = {
    "prefill": (PREFILL,),
    "decode": (DECODE,),
    "both": (PREFILL, DECODE),
}
_BLOCK_ROWS = 65_536


def expert_counts(
    trace: Trace, phase: str = "both", domains: Sequence[str] | None = None
) -> NDArray:
    """Count the tokens that each expert computed, int64 [L, E] over the trace's MoE layers.

    `phase` and `domains` (None: all requests) choose the rows. Reads a block of rows at a time.
    Raises UserError for a domain that the trace lacks and where no row is chosen.
    """
    if phase not in _PHASES:
        raise UserError(f"--phase {phase!r} is none of {', '.join(_PHASES)}")
    geometry = trace.manifest.geometry
    requests = _requests_of(trace, domains)
    counts = np.zeros((geometry.num_moe_layers, geometry.num_experts), np.int64)
    for start in range(0, trace.rows, _BLOCK_ROWS):
        arrays = trace.load(["request", "phase", "experts"], start, start + _BLOCK_ROWS)
        chosen = np.isin(arrays["phase"], _PHASES[phase])
        if requests is not None:
            chosen &= np.isin(arrays["request"], requests)
        counts += _counts(arrays["experts"][chosen], geometry.num_experts)
    if not counts.any():
        within = "" if domains is None else f" of domain {', '.join(domains)}"
        what = "tokens" if phase == "both" else f"{phase} tokens"
        raise UserError(f"{trace.path}: no {what}{within}; choose another --phase or --domain")
    return counts


def export_eplb(
    trace: Trace, out: str | Path, phase: str = "both", domains: Sequence[str] | None = None
) -> NDArray:
    """Write EPLB's `weight` to `out`, which must not exist; return the counts [L, E].

    .json: nested lists; .npy: int64. `phase` and `domains` as for `expert_counts`.
    """
    out = _new_file(out, (".json", ".npy"))
    counts = expert_counts(trace, phase, domains)
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, counts)
        _write(out, buffer.getvalue())
    else:
        _write(out, _json(counts.tolist()))
    return counts


def export_sglang_location(
    trace: Trace, out: str | Path, phase: str = "both", domains: Sequence[str] | None = None
) -> NDArray:
    """Write SGLang's `--init-expert-location` to `out` (.json), which must not exist.

    Returns the counts of all decoder layers, [num_layers, E]. `phase` and `domains` as for
    `expert_counts`.
    """
    out = _new_file(out, (".json",))
    geometry = trace.manifest.geometry
    counts = np.zeros((geometry.num_layers, geometry.num_experts), np.int64)
    counts[list(geometry.model_layer_ids)] = expert_counts(trace, phase, domains)
    _write(out, _json({"logical_count": counts.tolist()}))
    return counts


def _requests_of(trace: Trace, domains: Sequence[str] | None) -> NDArray | None:
    if domains is None:
        return None
    requests = trace.requests()
    known = sorted(set(requests["domain"].dropna()))
    unknown = [domain for domain in domains if domain not in known]
    if unknown:
        have = ", ".join(known) if known else "none"
        raise UserError(f"{trace.path}: no domain {unknown[0]!r}; its domains: {have}")
    ids: NDArray = requests["request"][requests["domain"].isin(domains)].to_numpy()
    return ids


def _counts(experts: NDArray, num_experts: int) -> NDArray:
    """Count ids [n, L, k], -1 left out, as [L, E]."""
    layers = experts.shape[1]
    keys = experts.astype(np.int64) + num_experts * np.arange(layers)[:, None]
    flat = np.bincount(keys[experts >= 0], minlength=layers * num_experts)
    return flat.reshape(layers, num_experts)


def _new_file(out: str | Path, suffixes: tuple[str, ...]) -> Path:
    out = Path(out)
    if out.suffix not in suffixes:
        raise UserError(f"--out {out}: the name must end in {' or '.join(suffixes)}")
    if out.exists():
        raise UserError(f"--out {out} exists already: name another file")
    return out


def _json(content: Any) -> bytes:
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def _write(out: Path, data: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, data)
