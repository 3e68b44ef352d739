"""From a sweep's rows to the points that can be compared.

Four kinds of points are kept apart. ``causal``: lossless policies that one may choose. ``lossy``:
they change what the model says, so time alone does not rank them. ``bound``: declared oracles, no
choices but the measure of them. ``what-if``: oracles of a given accuracy, which bound nothing.

Every function takes the frame of a sweep: one row a point, nested results flattened with dots,
``status`` and ``error``, and the registry's flags. All raise UserError where no point succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from configs.errors import UserError

Row = Any  # of a frame, by column

HYPOTHETICAL = frozenset({"accuracy-q"})
"""Oracles that stand for a predictor of given accuracy: slower than a bound by design."""


BASELINE = "on-demand"
RESIDENT = "resident"


#: What makes two points incomparable; each is part of a system's name only where it varies.
_SYSTEM = {
    "trace.digest": "trace {:.8}",
    "geometry": "{}",
    "expert_dtype": "{}",
    "hardware": "{}",
    "link_bytes_per_s": "{} GB/s",
    "point.window": "window {}",
    "point.touch_order": "touch order {}",
    "point.max_tokens": "max tokens {:.0f}",
    "point.fit_share": "fit share {:g}",
    "point.seed": "seed {}",
    "point.batch": "batch {:.0f}",
    "point.context": "context {:.0f}",
}
_SAME_SHARE = 7  # decimals of a share; what differs by less is rounding to whole bytes
_ALWAYS_NAMED = ("hardware", "link_bytes_per_s")
_NEEDED = (
    "policy",
    "label",
    "hardware",
    "geometry",
    "expert_dtype",
    "link_bytes_per_s",
    "expert_budget_bytes",
    "memory.peak_bytes",
    "memory.gpu_memory_bytes",
    "memory.expert_bytes_total",
    "memory.fits",
    "tpot_ms.mean",
    "ttft_ms.mean",
    "oracle",
    "lossless",
    "prefetches",
)
_FLAGS = ("memory.fits", "oracle", "lossless", "prefetches")
_NUMBERS = ("tpot_ms.mean", "ttft_ms.mean", "expert_share")


def prepare(frame: pd.DataFrame) -> pd.DataFrame:
    """The points that succeeded and decoded, with what ranking and plotting need beside.

    Adds ``system`` (a name; points of one system differ in policy and budget alone), ``kind``
    (``causal``, ``lossy``, ``bound``, ``what-if``), ``expert_share`` (slots' budget over the bytes
    of all experts, at most 1) and ``budget`` (as given for the whole model, ``8GiB``, else the
    share, ``25 %``), and ``saturated`` (the policy uses no more memory and is no faster than at a
    smaller budget). Sorted by system, then budget, then TPOT. Equal points are kept once.
    """
    points = _succeeded(frame)
    points = points[points["tpot_ms.mean"].notna()]
    if points.empty:
        raise UserError(
            "no point of this sweep decoded a token, so there is no TPOT: use a trace with decode "
            "rows or a larger --max-tokens"
        )
    share = points["expert_budget_bytes"] / points["memory.expert_bytes_total"]
    added = {
        "system": _system_names(points),
        "kind": [_kind(row) for row in points[["policy", "oracle", "lossless"]].itertuples()],
        "expert_share": share.clip(upper=1),
        "budget": _budget_names(points, share),
    }
    points = pd.concat([points, pd.DataFrame(added, index=points.index)], axis=1)
    points = points.astype(dict.fromkeys(_FLAGS, bool) | dict.fromkeys(_NUMBERS, float))
    points = points.drop_duplicates(["system", "expert_budget_bytes", "label"])
    order = [name for name in _SYSTEM if name in points]
    points = points.sort_values(
        [*order, "expert_budget_bytes", "tpot_ms.mean", "label"], kind="stable"
    ).reset_index(drop=True)
    used = ["system", "label", "memory.peak_bytes", "tpot_ms.mean"]
    return pd.concat([points, points.duplicated(used).rename("saturated")], axis=1)


def _succeeded(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        raise UserError("no point of this sweep succeeded: it has no points")
    if "status" not in frame:
        raise UserError("column status is missing: give the result of a sweep")
    points = frame[frame["status"] == "ok"].copy()
    if points.empty:
        first = frame["error"].dropna().astype(str)
        why = f", the first with: {first.iloc[0]}" if len(first) else ""
        raise UserError(f"no point of this sweep succeeded: {len(frame)} failed{why}")
    missing = [name for name in _NEEDED if name not in points]
    if missing:
        raise UserError(f"column {missing[0]} is missing: give the result of a sweep")
    return points


def _kind(row: Any) -> str:
    if row.oracle:
        return "what-if" if row.policy in HYPOTHETICAL else "bound"
    return "causal" if row.lossless else "lossy"


def _budget_names(points: pd.DataFrame, share: pd.Series[Any]) -> list[str]:
    given = points["point.budget"] if "point.budget" in points else [None] * len(points)
    shares = share.clip(upper=1).round(_SAME_SHARE)
    names = distinct(shares.unique().tolist(), share_name)
    pairs = zip(given, shares, strict=True)
    return [whole if isinstance(whole, str) else names[part] for whole, part in pairs]


def _system_names(points: pd.DataFrame) -> list[str]:
    named = [
        (column, form)
        for column, form in _SYSTEM.items()
        if column in points
        and (column in _ALWAYS_NAMED or points[column].nunique(dropna=False) > 1)
    ]
    links = distinct(points["link_bytes_per_s"].unique().tolist(), link_name)
    names = []
    for values in points[[column for column, _ in named]].itertuples(index=False):
        parts = zip(named, values, strict=True)
        names.append(
            ", ".join(
                links[value] if column == "link_bytes_per_s" else _named(form, value)
                for (column, form), value in parts
            )
        )
    return names


def distinct(values: Sequence[Any], name: Callable[[Any, int], str]) -> dict[Any, str]:
    """A name a value, with as many digits, 3 or more, as tell all of them apart."""
    tried = ({value: name(value, digits) for value in values} for digits in range(3, 18))
    return next(names for names in tried if len(set(names.values())) == len(values))


def _named(form: str, value: Any) -> str:
    if pd.isna(value):
        return form.split("{")[0] + "default"
    return form.format(value)


def link_name(link_bytes_per_s: float, digits: int = 3) -> str:
    """A link's rate for people: ``24 GB/s``."""
    return f"{link_bytes_per_s / 1e9:.{digits}g} GB/s"


def share_name(expert_share: float, digits: int = 3) -> str:
    """A budget's share of the experts for people: ``12.5 %``."""
    return f"{expert_share * 100:.{digits}g} %"


def systems(points: pd.DataFrame) -> list[str]:
    """Names of the systems in prepared ``points``, in their order."""
    return list(dict.fromkeys(points["system"]))


def middle(values: Sequence[Any]) -> Any:
    """The middle of sorted ``values``; of an even number, the lower."""
    return values[(len(values) - 1) // 2]


def middle_budget(points: pd.DataFrame) -> int:
    """The middle budget (bytes of expert slots) of one system, where policies compete."""
    contested = points[points["policy"] != RESIDENT]
    budgets = (points if contested.empty else contested)["expert_budget_bytes"]
    return int(middle(sorted(budgets.unique())))


def choices(points: pd.DataFrame) -> pd.DataFrame:
    """Those of prepared ``points`` that one could run: causal, lossless, fitting the GPU.

    A policy that cannot use a larger budget (on-demand, say) counts at its smallest alone.
    """
    usable = (points["kind"] == "causal") & points["memory.fits"] & ~points["saturated"]
    return points[usable]


def holds_all(points: pd.DataFrame) -> pd.Series[bool]:
    """Which of prepared ``points`` keep every expert on the GPU, where no policy is needed."""
    filled = (points["expert_share"] >= 1) & (points["policy"] != BASELINE)
    return filled | (points["policy"] == RESIDENT)


def is_estimated(points: pd.DataFrame) -> bool:
    """Whether any point's time rests on an estimate rather than on a calibration."""
    return "timing" not in points or bool((points["timing"] == "estimated").any())
