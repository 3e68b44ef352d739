"""Which policy is fastest at which budget, and what holds the best one back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sim.front import front, knee, without_slivers
from sim.selection import BASELINE, RESIDENT, Row, choices, holds_all, prepare

TIE_MARGIN = 0.02
"""Relative difference in time under which two policies are called a tie."""


POLICY_LIMITED_FROM = 0.10
"""Share of the time that the best bound must save for a better policy to be worth looking for."""


_STALLS = ("breakdown_ms.stall_late", "breakdown_ms.stall_miss", "breakdown_ms.stall_cpu")


def rank(frame: pd.DataFrame) -> pd.DataFrame:
    """Policies by TPOT within each system, budget and kind; ``place`` counts from 1 in each.

    Columns beside those: ``policy`` (with parameters), ``tpot_ms``, ``ttft_ms`` (nan without
    prefill), ``hit_rate`` and ``late_share`` (of decode accesses; of a lossy policy's: of the
    experts that the gate asked for), ``changed_share`` (of those experts) and ``lost_share`` (of
    the gate weight; both nan for lossless ones), ``precision`` and ``recall`` of predictions (nan
    without any), ``mb_per_token`` over the link (10**6 bytes), ``stall_ms`` a decode step,
    ``times_faster`` than ``faster_than`` (on-demand at that budget, else the slowest causal policy,
    else the slowest), ``gap_to_bound`` (share of the time that ``bound``, the fastest bound at that
    budget, would save; nan without one), ``tie`` (within 2 % of the first of
    its kind), ``gpu_memory_bytes``, ``fits`` and ``saturated`` (see :func:`prepare`).
    """
    return rank_points(prepare(frame))


def rank_points(points: pd.DataFrame) -> pd.DataFrame:
    """As :func:`rank`, of prepared points."""
    groups = points.groupby(["system", "expert_budget_bytes"], sort=False)
    return pd.concat([_rank_group(group) for _, group in groups], ignore_index=True)


def _rank_group(group: pd.DataFrame) -> pd.DataFrame:
    tpot = group["tpot_ms.mean"]
    reference = _reference(group)
    bound = _fastest_bound(group)
    first = tpot.groupby(group["kind"]).transform("min")
    asked = group["decode.asked"].astype(float)
    ranked = pd.DataFrame(
        {
            "system": group["system"],
            "hardware": group["hardware"],
            "link_bytes_per_s": group["link_bytes_per_s"],
            "expert_budget_bytes": group["expert_budget_bytes"],
            "expert_share": group["expert_share"],
            "budget": group["budget"],
            "kind": group["kind"],
            "place": tpot.groupby(group["kind"]).rank(method="first").astype(int),
            "policy": group["label"],
            "tpot_ms": tpot,
            "ttft_ms": group["ttft_ms.mean"],
            "hit_rate": group["decode.hit_rate"].astype(float),
            "late_share": group["decode.late"].astype(float) / asked,
            "changed_share": _optional(group, "quality.decode.changed_share"),
            "lost_share": _optional(group, "quality.decode.lost_mass_share"),
            "precision": _optional(group, "prefetch.precision"),
            "recall": _optional(group, "prefetch.recall"),
            "mb_per_token": group["h2d_bytes_per_token"].astype(float) / 1e6,
            "stall_ms": sum(group[name].astype(float) for name in _STALLS),
            "times_faster": reference["tpot_ms.mean"] / tpot,
            "faster_than": reference["label"],
            "gap_to_bound": np.nan if bound is None else 1 - bound["tpot_ms.mean"] / tpot,
            "bound": None if bound is None else bound["label"],
            "tie": tpot <= first * (1 + TIE_MARGIN),
            "gpu_memory_bytes": group["memory.peak_bytes"],
            "fits": group["memory.fits"],
            "saturated": group["saturated"],
        }
    )
    by_kind = {"causal": 0, "lossy": 1, "what-if": 2, "bound": 3}
    order = ranked["kind"].map(by_kind)
    return ranked.assign(_order=order).sort_values(["_order", "place"]).drop(columns="_order")


def _optional(group: pd.DataFrame, column: str) -> Any:
    """A column that no policy need have filled."""
    return group[column].astype(float) if column in group else np.nan


def _reference(group: pd.DataFrame) -> Row:
    causal = group[group["kind"] == "causal"]
    baseline = causal[causal["label"] == BASELINE]
    candidates = next(rows for rows in (baseline, causal, group) if not rows.empty)
    return by_tpot(candidates).iloc[-1]


def _fastest_bound(group: pd.DataFrame) -> Row | None:
    bounds = group[group["kind"] == "bound"]
    return None if bounds.empty else by_tpot(bounds).iloc[0]


def by_tpot(points: pd.DataFrame) -> pd.DataFrame:
    """Fastest first."""
    return points.sort_values(["tpot_ms.mean", "label"], kind="stable")


def labels_by_speed(points: pd.DataFrame) -> list[str]:
    """Labels from fast to slow: mean logarithm of TPOT over the least at each budget and link."""
    tpot = points["tpot_ms.mean"]
    best = tpot.groupby([points["system"], points["expert_budget_bytes"]]).transform("min")
    distance = np.log(tpot / best)
    table = pd.DataFrame({"label": points["label"], "distance": distance}).groupby("label").mean()
    return [str(label) for label in table.sort_values("distance", kind="stable").index]


@dataclass(frozen=True)
class Winner:
    """``policy`` is the fastest, or within 2 % of it, from one budget to another.

    Budgets are named as in :func:`prepare` and given in bytes of expert slots. ``ties``: the other
    policies of which the same is true over the same budgets.
    """

    policy: str
    from_budget: str
    to_budget: str
    from_expert_bytes: int
    to_expert_bytes: int
    least_gpu_bytes: int
    most_gpu_bytes: int
    slowest_ms: float
    fastest_ms: float
    ties: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What holds the best choice at one budget back.

    ``limit``: ``policy`` (the fastest bound saves at least 10 % of the time), ``capacity`` (it
    saves less) or ``unknown`` (no bound was swept, or none as fast as the choice). ``saves``: that
    share, nan without a bound. ``caching_only``: no bound that prefetches was swept.
    """

    budget: str
    expert_budget_bytes: int
    limit: str
    bound: str | None
    saves: float
    caching_only: bool


def pick_of(points: pd.DataFrame) -> Row | None:
    """The point that :func:`recommend` picks on one system, None where nothing can be."""
    options = choices(points)
    return None if options.empty else pick_among(options)


def pick_among(options: pd.DataFrame) -> Row:
    """The point to pick of several choices."""
    fastest = by_tpot(options).iloc[0]
    return _winning(options, int(fastest["expert_budget_bytes"]))


def winner_at_knee(points: pd.DataFrame) -> Row | None:
    """The best value for little memory on one system: who wins at the budget of the :func:`knee`.

    The front is that of policies which cache, without slivers: on-demand has no memory to spend.
    The winner over a run of budgets may tie with the knee's own policy; None without a knee.
    """
    options = choices(points)
    options = options[options["policy"] != BASELINE]
    bend = knee(without_slivers(front(options)))
    if bend is None:
        return None
    return _winning(options, int(bend["expert_budget_bytes"]))


def _winning(options: pd.DataFrame, budget: int) -> Row:
    """The point of the policy that wins the run of budgets which ``budget`` belongs to.

    Where everything is resident, that is the point without a policy, if none is faster.
    """
    group = options[options["expert_budget_bytes"] == budget]
    filled = group[holds_all(group)]
    if not filled.empty:
        plain = filled[(filled["policy"] == RESIDENT) & filled["label"].isin(tied_labels(filled))]
        return by_tpot(filled if plain.empty else plain).iloc[0]
    run = winner_at(find_winners(options[~holds_all(options)]), budget)
    return group[group["label"] == run.policy].iloc[0]


def winner_at(winners: Sequence[Winner], budget: int) -> Winner:
    """Who wins at a budget, in bytes of expert slots."""
    return next(w for w in winners if w.from_expert_bytes <= budget <= w.to_expert_bytes)


def by_budget(points: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Points of each budget (bytes of expert slots), budgets ascending."""
    budgets = points["expert_budget_bytes"]
    return {int(budget): points[budgets == budget] for budget in sorted(budgets.unique())}


def find_winners(options: pd.DataFrame) -> tuple[Winner, ...]:
    """Runs of budgets with one winner, as few as ties allow: each reaches as far as any can."""
    tied = [tied_labels(group) for group in by_budget(options).values()]
    groups = list(by_budget(options).values())
    winners = []
    start = 0
    while start < len(groups):
        reach = {label: reach_of_tie(tied, start, label) for label in tied[start]}
        stop = max(reach.values())
        lasting = sorted(label for label, end in reach.items() if end == stop)
        winners.append(_winner(groups[start:stop], lasting))
        start = stop
    return tuple(winners)


def tied_labels(group: pd.DataFrame) -> set[str]:
    """Labels within the margin of the fastest of one budget."""
    limit = group["tpot_ms.mean"].min() * (1 + TIE_MARGIN)
    return set(group.loc[group["tpot_ms.mean"] <= limit, "label"])


def reach_of_tie(tied: Sequence[set[str]], start: int, label: str) -> int:
    """The first budget after ``start`` at which ``label`` no longer wins or ties."""
    return next((i for i in range(start, len(tied)) if label not in tied[i]), len(tied))


def _winner(groups: Sequence[pd.DataFrame], labels: Sequence[str]) -> Winner:
    """That of ``labels`` with the least geometric mean of TPOT over a run of budgets."""
    run = pd.concat(groups)
    means = {
        label: np.log(run.loc[run["label"] == label, "tpot_ms.mean"]).sum() for label in labels
    }
    best = min(means, key=lambda label: (means[label], label))
    own = run[run["label"] == best]
    first, last = own.iloc[0], own.iloc[-1]
    return Winner(
        policy=best,
        from_budget=str(first["budget"]),
        to_budget=str(last["budget"]),
        from_expert_bytes=int(first["expert_budget_bytes"]),
        to_expert_bytes=int(last["expert_budget_bytes"]),
        least_gpu_bytes=int(own["memory.peak_bytes"].min()),
        most_gpu_bytes=int(own["memory.peak_bytes"].max()),
        slowest_ms=float(own["tpot_ms.mean"].max()),
        fastest_ms=float(own["tpot_ms.mean"].min()),
        ties=tuple(label for label in labels if label != best),
    )


def find_verdicts(points: pd.DataFrame, options: pd.DataFrame) -> tuple[Verdict, ...]:
    """One for each budget at which policies compete."""
    contested = options[~holds_all(options)]
    groups = by_budget(points)
    return tuple(
        _verdict(group.iloc[0], float(group["tpot_ms.mean"].min()), groups[budget])
        for budget, group in by_budget(contested).items()
    )


def _verdict(point: Row, best_ms: float, group: pd.DataFrame) -> Verdict:
    budget, nbytes = str(point["budget"]), int(point["expert_budget_bytes"])
    bound = _fastest_bound(group)
    if bound is None:
        return Verdict(budget, nbytes, "unknown", None, float("nan"), caching_only=False)
    saves = 1 - float(bound["tpot_ms.mean"]) / best_ms
    caching_only = not group.loc[group["kind"] == "bound", "prefetches"].any()
    limit = "policy" if saves >= POLICY_LIMITED_FROM else "capacity"
    if saves < -TIE_MARGIN:
        limit = "unknown"
    return Verdict(budget, nbytes, limit, str(bound["label"]), saves, caching_only)
