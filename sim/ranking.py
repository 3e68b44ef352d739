"""From a sweep's points to words: ranking, Pareto front, recommendation.

Four kinds of points are kept apart. ``causal``: lossless policies that one may choose. ``lossy``:
they change what the model says, so time alone does not rank them. ``bound``: declared oracles, no
choices but the measure of them. ``what-if``: oracles of a given accuracy, which bound nothing.

Every function takes the frame of a sweep: one row a point, nested results flattened with dots,
``status`` and ``error``, and the registry's flags. All raise UserError where no point succeeded.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.errors import UserError

Row = Any  # of a frame, by column

TIE_MARGIN = 0.02
"""Relative difference in time under which two policies are called a tie."""

POLICY_LIMITED_FROM = 0.10
"""Share of the time that the best bound must save for a better policy to be worth looking for."""

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
}
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
_STALLS = ("breakdown_ms.stall_late", "breakdown_ms.stall_miss", "breakdown_ms.stall_cpu")
_GIB = 2**30
_WIDTH = 100
_MOST_ROWS = 16
_MOST_BUDGETS = 12
_MOST_NAMED = 6
_MOST_BOUNDS = 3
_TEXT_COLUMNS = ("policy", "fastest", "runner-up")
_LEAST_TEXT = 9
_RANK_COLUMNS = (
    "policy",
    "TPOT ms",
    "",
    "speed-up",
    "gap %",
    "hits %",
    "late %",
    "stall ms",
    "MB/token",
    "TTFT ms",
)
_FEW_COLUMNS = 7  # of them, where the terminal is narrow


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
    pairs = zip(given, share.clip(upper=1), strict=True)
    return [whole if isinstance(whole, str) else share_name(part) for whole, part in pairs]


def _system_names(points: pd.DataFrame) -> list[str]:
    named = [
        (column, form)
        for column, form in _SYSTEM.items()
        if column in points
        and (column in _ALWAYS_NAMED or points[column].nunique(dropna=False) > 1)
    ]
    names = []
    for values in points[[column for column, _ in named]].itertuples(index=False):
        parts = zip(named, values, strict=True)
        names.append(", ".join(_named(column, form, value) for (column, form), value in parts))
    return names


def _named(column: str, form: str, value: Any) -> str:
    if column == "link_bytes_per_s":
        return link_name(value)
    if pd.isna(value):
        return form.split("{")[0] + "default"
    return form.format(value)


def link_name(link_bytes_per_s: float) -> str:
    """A link's rate for people: ``24 GB/s``."""
    return f"{link_bytes_per_s / 1e9:.3g} GB/s"


def share_name(expert_share: float) -> str:
    """A budget's share of the experts for people: ``12.5 %``."""
    return f"{expert_share * 100:.3g} %"


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


def front(points: pd.DataFrame) -> pd.DataFrame:
    """Non-dominated :func:`choices` among prepared ``points``, by memory ascending.

    Of points equal in both memory and TPOT, that with the smaller budget (then first label) stays.
    """
    axes = ["memory.peak_bytes", "tpot_ms.mean"]
    ordered = choices(points).sort_values([*axes, "expert_budget_bytes", "label"], kind="stable")
    fastest_before = ordered["tpot_ms.mean"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["tpot_ms.mean"] < fastest_before]


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """The Pareto front of one system: least GPU memory (peak bytes) and least TPOT (mean).

    Causal, lossless policies whose memory fits the GPU: the others are no choices. By memory
    ascending, so by TPOT descending; equal points appear once. Raises ValueError for several
    systems.
    """
    points = prepare(frame)
    found = systems(points)
    if len(found) > 1:
        raise ValueError(f"a front belongs to one system, not to {len(found)}: {'; '.join(found)}")
    return front(points).reset_index(drop=True)


def without_slivers(line: pd.DataFrame) -> pd.DataFrame:
    """A front less its points that take under 5 % less memory than the next, which is faster.

    Policies round their slots differently at one budget, which puts a tooth beside each winner.
    """
    memory = line["memory.peak_bytes"].to_numpy(np.float64)
    keep: npt.NDArray[np.bool_] = np.append(memory[:-1] <= 0.95 * memory[1:], True)
    return line[keep[: len(line)]]


def knee(line: pd.DataFrame) -> Row | None:
    """The point of a front farthest below the chord between its ends, both axes scaled to 0..1.

    None where the front has fewer than three points or none lies below its chord.
    """
    if len(line) < 3:
        return None
    x = _scaled(line["memory.peak_bytes"])
    y = _scaled(line["tpot_ms.mean"])
    below_chord = 1 - x - y
    best = int(below_chord.argmax())
    return line.iloc[best] if below_chord[best] > 1e-9 else None


def _scaled(values: pd.Series[Any]) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.to_numpy(np.float64)
    return np.asarray((array - array.min()) / np.ptp(array))


def rank(frame: pd.DataFrame) -> pd.DataFrame:
    """Policies by TPOT within each system, budget and kind; ``place`` counts from 1 in each.

    Columns beside those: ``policy`` (with parameters), ``tpot_ms``, ``ttft_ms`` (nan without
    prefill), ``hit_rate`` and ``late_share`` (of decode accesses), ``mb_per_token`` over the link
    (10**6 bytes), ``stall_ms`` a decode step, ``times_faster`` than ``faster_than`` (on-demand at
    that budget, else the slowest causal policy, else the slowest), ``gap_to_bound`` (share of the
    time that ``bound``, the fastest bound at that budget, would save; nan without one),
    ``tie`` (within 2 % of the first of its kind), ``gpu_memory_bytes``, ``fits`` and ``saturated``
    (see :func:`prepare`).
    """
    return _rank(prepare(frame))


def _rank(points: pd.DataFrame) -> pd.DataFrame:
    groups = points.groupby(["system", "expert_budget_bytes"], sort=False)
    return pd.concat([_rank_group(group) for _, group in groups], ignore_index=True)


def _rank_group(group: pd.DataFrame) -> pd.DataFrame:
    tpot = group["tpot_ms.mean"]
    reference = _reference(group)
    bound = _fastest_bound(group)
    first = tpot.groupby(group["kind"]).transform("min")
    accesses = group["decode.accesses"].astype(float)
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
            "late_share": group["decode.late"].astype(float) / accesses,
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


def _reference(group: pd.DataFrame) -> Row:
    causal = group[group["kind"] == "causal"]
    baseline = causal[causal["label"] == BASELINE]
    candidates = next(rows for rows in (baseline, causal, group) if not rows.empty)
    return _by_tpot(candidates).iloc[-1]


def _fastest_bound(group: pd.DataFrame) -> Row | None:
    bounds = group[group["kind"] == "bound"]
    return None if bounds.empty else _by_tpot(bounds).iloc[0]


def _by_tpot(points: pd.DataFrame) -> pd.DataFrame:
    return points.sort_values(["tpot_ms.mean", "label"], kind="stable")


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


@dataclass(frozen=True)
class Recommendation:
    """What to run on one system; ``text`` (and ``str``) says it in words, a line a fact.

    ``policy`` is None, and the numbers beside it with it, where nothing can be recommended.
    """

    system: str
    policy: str | None
    budget: str | None
    expert_budget_bytes: int | None
    gpu_memory_bytes: int | None
    tpot_ms: float | None
    winners: tuple[Winner, ...]
    verdicts: tuple[Verdict, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def recommend(frame: pd.DataFrame) -> list[Recommendation]:
    """For every system: which policy at which budget, who wins where, and what would help.

    The pick is the fastest point that fits the GPU; of policies that tie there, the one that wins
    or ties at the most neighbouring budgets. Points that do not fit are never recommended.
    """
    points = prepare(frame)
    return [_recommend(name, points[points["system"] == name]) for name in systems(points)]


def _recommend(name: str, points: pd.DataFrame) -> Recommendation:
    options = choices(points)
    heading = f"{name}{_estimate_note(points)}"
    if options.empty:
        text = f"{heading}\n  {_why_nothing(points)}"
        return Recommendation(name, None, None, None, None, None, (), (), text)
    winners = _winners(options[~holds_all(options)])
    verdicts = _verdicts(points, options)
    pick = _pick(options)
    lines = [
        _pick_words(options, pick),
        *_smaller_words(options, pick, winners),
        *_winner_words(winners, options),
        *_verdict_words(verdicts, every=_every_words(options)),
        *_memory_words(options, verdicts),
        *_misfit_words(points),
        *_value_words(points, pick),
    ]
    return Recommendation(
        system=name,
        policy=str(pick["label"]),
        budget=str(pick["budget"]),
        expert_budget_bytes=int(pick["expert_budget_bytes"]),
        gpu_memory_bytes=int(pick["memory.peak_bytes"]),
        tpot_ms=float(pick["tpot_ms.mean"]),
        winners=winners,
        verdicts=verdicts,
        text="\n  ".join([heading, *lines]),
    )


def pick_of(points: pd.DataFrame) -> Row | None:
    """The point that :func:`recommend` picks on one system, None where nothing can be."""
    options = choices(points)
    return None if options.empty else _pick(options)


def _pick(options: pd.DataFrame) -> Row:
    fastest = _by_tpot(options).iloc[0]
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
        plain = filled[(filled["policy"] == RESIDENT) & filled["label"].isin(_tied(filled))]
        return _by_tpot(filled if plain.empty else plain).iloc[0]
    run = _run_at(_winners(options[~holds_all(options)]), budget)
    return group[group["label"] == run.policy].iloc[0]


def _run_at(winners: Sequence[Winner], budget: int) -> Winner:
    return next(w for w in winners if w.from_expert_bytes <= budget <= w.to_expert_bytes)


def _by_budget(points: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Points of each budget (bytes of expert slots), budgets ascending."""
    budgets = points["expert_budget_bytes"]
    return {int(budget): points[budgets == budget] for budget in sorted(budgets.unique())}


def _winners(options: pd.DataFrame) -> tuple[Winner, ...]:
    """Runs of budgets with one winner, as few as ties allow: each reaches as far as any can."""
    tied = [_tied(group) for group in _by_budget(options).values()]
    groups = list(_by_budget(options).values())
    winners = []
    start = 0
    while start < len(groups):
        reach = {label: _reach(tied, start, label) for label in tied[start]}
        stop = max(reach.values())
        lasting = sorted(label for label, end in reach.items() if end == stop)
        winners.append(_winner(groups[start:stop], lasting))
        start = stop
    return tuple(winners)


def _tied(group: pd.DataFrame) -> set[str]:
    """Labels within the margin of the fastest of one budget."""
    limit = group["tpot_ms.mean"].min() * (1 + TIE_MARGIN)
    return set(group.loc[group["tpot_ms.mean"] <= limit, "label"])


def _reach(tied: Sequence[set[str]], start: int, label: str) -> int:
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


def _verdicts(points: pd.DataFrame, options: pd.DataFrame) -> tuple[Verdict, ...]:
    """One for each budget at which policies compete."""
    contested = options[~holds_all(options)]
    groups = _by_budget(points)
    return tuple(
        _verdict(group.iloc[0], float(group["tpot_ms.mean"].min()), groups[budget])
        for budget, group in _by_budget(contested).items()
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


def _estimate_note(points: pd.DataFrame) -> str:
    if not is_estimated(points):
        return ""
    return f" (estimated time: differences under {TIE_MARGIN:.0%} are not to be trusted)".replace(
        "%", " %"
    )


def is_estimated(points: pd.DataFrame) -> bool:
    """Whether any point's time rests on an estimate rather than on a calibration."""
    return "timing" not in points or bool((points["timing"] == "estimated").any())


def _why_nothing(points: pd.DataFrame) -> str:
    causal = points[points["kind"] == "causal"]
    if causal.empty:
        return "No causal, lossless policy was swept: nothing to recommend."
    least = causal.sort_values("memory.peak_bytes", kind="stable").iloc[0]
    return (
        f"Nothing fits the GPU's {_gib(least['memory.gpu_memory_bytes'])}: the smallest is "
        f"{least['label']} with {_gib(least['memory.peak_bytes'])}. Sweep smaller budgets."
    )


def _pick_words(options: pd.DataFrame, pick: Row) -> str:
    gpu = f"On this GPU of {_gib(pick['memory.gpu_memory_bytes'])}"
    cost = f"{_ms(pick['tpot_ms.mean'])} a token in {_gib(pick['memory.peak_bytes'])}"
    group = options[options["expert_budget_bytes"] == pick["expert_budget_bytes"]]
    if not holds_all(group).loc[pick.name]:
        ties = _ties_at(group, pick["label"])
        return f"{gpu}: {pick['label']}{_as_good(ties)} with {_amount(pick)}: {cost}."
    if group["tpot_ms.mean"].max() > pick["tpot_ms.mean"] * (1 + TIE_MARGIN):
        return f"{gpu}: everything fits: {pick['label']} with {_amount(pick)}: {cost}."
    return (
        f"{gpu}: {pick['budget']}: everything fits, the policy does not matter ({cost}; compute "
        "and host are the limit)."
    )


def _amount(point: Row) -> str:
    of = " of the experts" if point["budget"].endswith("%") else " in all"
    return f"{point['budget']}{of}"


def _ties_at(group: pd.DataFrame, policy: str) -> list[str]:
    """The others within the margin of the fastest of one budget, fastest first."""
    tied = _tied(group)
    return [label for label in _by_tpot(group)["label"] if label in tied and label != policy]


def _as_good(ties: Sequence[str]) -> str:
    return f" ({_good(ties)})" if ties else ""


def _good(names: Sequence[str]) -> str:
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'} as good"


def _smaller_words(options: pd.DataFrame, pick: Row, winners: Sequence[Winner]) -> list[str]:
    """What one gets for less memory than the pick's, from much to little."""
    smaller = options[options["expert_budget_bytes"] < pick["expert_budget_bytes"]]
    budgets = [*_by_budget(smaller[~holds_all(smaller)])][::-1]
    if not budgets:
        return []
    shown = [_one_budget(options, budget, winners) for budget in _spread(budgets, _MOST_NAMED)]
    return [f"With less memory: {'; '.join(shown)}."]


def _one_budget(options: pd.DataFrame, budget: int, winners: Sequence[Winner]) -> str:
    group = options[options["expert_budget_bytes"] == budget]
    policy = _run_at(winners, budget).policy
    own = group[group["label"] == policy].iloc[0]
    names = ", ".join([policy, *_ties_at(group, policy)][:3])
    memory = _gib(own["memory.peak_bytes"])
    return f"{own['budget']}, {memory}, {_ms(own['tpot_ms.mean'])} ({names})"


def _winner_words(winners: Sequence[Winner], options: pd.DataFrame) -> list[str]:
    """Runs of budgets by policy, where they say more than the headline."""
    if all(winner.from_expert_bytes == winner.to_expert_bytes for winner in winners):
        return []
    contested = _by_budget(options[~holds_all(options)])
    return [f"By budget: {'; '.join(_one_winner(winner, contested) for winner in winners)}."]


def _one_winner(winner: Winner, groups: dict[int, pd.DataFrame]) -> str:
    first, last = winner.from_expert_bytes, winner.to_expert_bytes
    if first == last:
        return f"{winner.policy} at {winner.from_budget}{_as_good(winner.ties)}"
    run = [group for budget, group in groups.items() if first <= budget <= last]
    ties = [_good(winner.ties)] if winner.ties else []
    ties += _partial_ties(winner, run)
    where = f"{winner.policy} from {winner.from_budget} up to {winner.to_budget}"
    return f"{where} ({'; '.join(ties)})" if ties else where


def _partial_ties(winner: Winner, run: Sequence[pd.DataFrame]) -> list[str]:
    """Who else is as good over the upper or the lower part of a run, the longest part alone."""
    tied = [_tied(group) for group in run]
    others = sorted(set().union(*tied) - {winner.policy, *winner.ties})
    upper = {label: _reach(tied[::-1], 0, label) for label in others}
    lower = {label: _reach(tied, 0, label) for label in others}
    longest = max([0, *upper.values(), *lower.values()])
    if not longest:
        return []
    best = [label for label in others if upper[label] == longest]
    if best:
        budget = run[-longest]["budget"].iloc[0]
        where = f"from {budget} up" if longest > 1 else f"at {budget}"
    else:
        best = [label for label in others if lower[label] == longest]
        budget = run[longest - 1]["budget"].iloc[0]
        where = f"up to {budget}" if longest > 1 else f"at {budget}"
    return [f"{_good(best)} {where}"]


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


_VERDICT_WORDS = {
    "policy": "Policy-limited {where}: an oracle that knows the future ({bound}) would take "
    "{saves} less time in the same memory: the most that a better policy could gain{caveat}.",
    "capacity": "Capacity-limited {where}: even an oracle that knows the future ({bound}) would "
    "take only {saves} less time in the same memory: more memory or a faster link would "
    "help{caveat}.",
    "unknown": "Unknown {where} whether a better policy would help: sweep the bounds beside it, "
    "belady and oracle-prefetch with cache=belady.",
}


def _every_words(options: pd.DataFrame) -> str:
    return "at every smaller budget" if holds_all(options).any() else "at every budget"


def _verdict_words(verdicts: Sequence[Verdict], every: str) -> list[str]:
    by_limit = {limit: [v for v in verdicts if v.limit == limit] for limit in _VERDICT_WORDS}
    return [
        _VERDICT_WORDS[limit].format(
            where=every if len(group) == len(verdicts) > 1 else _where(group),
            bound=" or ".join(sorted({verdict.bound for verdict in group if verdict.bound})),
            saves=_saved([verdict.saves for verdict in group]),
            caveat=_caveat(group),
        )
        for limit, group in by_limit.items()
        if group
    ]


def _where(group: Sequence[Verdict]) -> str:
    return f"at {_listed([verdict.budget for verdict in group], most=6)}"


def _caveat(group: Sequence[Verdict]) -> str:
    if any(verdict.caching_only for verdict in group):
        return " (by caching: no bound that prefetches was swept)"
    return ""


def _saved(values: Sequence[float]) -> str:
    low, high = (f"{max(value, 0) * 100:.0f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


_MEMORY_WORDS = {
    "memory": "saves more ({step}) than any better policy could ({policy}): memory first.",
    "policy": "saves less ({step}) than a better policy could ({policy}): policy first.",
    "even": "saves about as much ({step}) as the best policy could ({policy}).",
}


def _memory_words(options: pd.DataFrame, verdicts: Sequence[Verdict]) -> list[str]:
    """What twice the slots bring (else the first larger budget), beside a perfect policy."""
    groups = _by_budget(options)
    best = {budget: group["tpot_ms.mean"].min() for budget, group in groups.items()}
    judged = {v.expert_budget_bytes: v.saves for v in verdicts if v.limit != "unknown"}
    pairs = [(low, high) for low in judged for high in best if abs(high / low - 2) < 0.01]
    verb = "Doubling the memory for experts"
    if not pairs:
        larger = [(low, high) for low in judged for high in best if high > low]
        pairs, verb = larger[:1], "More memory for experts"
    steps: dict[str, list[tuple[int, int]]] = {outcome: [] for outcome in _MEMORY_WORDS}
    for low, high in pairs:
        steps[_first(1 - best[high] / best[low], judged[low])].append((low, high))
    return [
        f"{verb} ({', '.join(_step_name(groups, *pair) for pair in found)}) "
        + _MEMORY_WORDS[outcome].format(
            step=_saved([1 - best[high] / best[low] for low, high in found]),
            policy=_saved([judged[low] for low, _ in found]),
        )
        for outcome, found in steps.items()
        if found
    ]


def _first(by_memory: float, by_policy: float) -> str:
    if abs(by_memory - by_policy) <= TIE_MARGIN:
        return "even"
    return "memory" if by_memory > by_policy else "policy"


def _step_name(groups: dict[int, pd.DataFrame], low: int, high: int) -> str:
    first, last = (str(groups[budget]["budget"].iloc[0]) for budget in (low, high))
    return f"{first.removesuffix(' %') if last.endswith(' %') else first} to {last}"


def _value_words(points: pd.DataFrame, pick: Row) -> list[str]:
    """Where the front bends; silent where that is the pick."""
    best = winner_at_knee(points)
    if best is None or best["expert_budget_bytes"] == pick["expert_budget_bytes"]:
        return []
    return [
        f"Best value for little memory: {best['label']} with {_amount(best)}, "
        f"{_ms(best['tpot_ms.mean'])} a token in {_gib(best['memory.peak_bytes'])}."
    ]


def _misfit_words(points: pd.DataFrame) -> list[str]:
    """What was swept in vain."""
    causal = points[(points["kind"] == "causal") & ~points["saturated"]]
    vain = [group for group in _by_budget(causal).values() if not group["memory.fits"].any()]
    if not vain:
        return []
    needs = [
        f"{group['budget'].iloc[0]} needs {_gib(group['memory.peak_bytes'].min())}"
        for group in vain
    ]
    verb = "does" if len(vain) == 1 else "do"
    return [f"{_listed(needs, most=_MOST_NAMED)}: {verb} not fit."]


def three_figures(value: float) -> str:
    """Three significant figures, never an exponent: ``49.1``, ``7.59``, ``1234``."""
    if not np.isfinite(value):
        return "-"
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def _ms(value: float) -> str:
    return f"{three_figures(value)} ms"


def _gib_figure(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f}"


def _gib(nbytes: float) -> str:
    return f"{_gib_figure(nbytes)} GiB"


def _percent(share: float) -> str:
    return f"{share * 100:.1f}" if np.isfinite(share) else "-"


def render_ranking(console: Console, frame: pd.DataFrame) -> None:
    """Print who wins at which budget, a table a system, and one full ranking.

    The full ranking is that of the middle system at its middle budget. Tables are at most 100
    columns wide and 12 rows long; what is left out is counted below. Where the console is no
    terminal, there are no lines and no colours.
    """
    points = prepare(frame)
    ranked = _rank(points)
    for name in systems(points):
        own = ranked[ranked["system"] == name]
        if own["expert_budget_bytes"].nunique() > 1:
            runs = _runs(points[points["system"] == name])
            table = _winner_table(console, own, runs)
            _print(console, f"{name}: fastest policy by budget", table)
    chosen = middle(systems(points))
    own = ranked[ranked["system"] == chosen]
    budget = middle_budget(points[points["system"] == chosen])
    group = own[own["expert_budget_bytes"] == budget]
    _print(console, _full_title(group.iloc[0]), _full_table(console, group))
    for line in _legend(group):
        _say(console, line)
    if is_estimated(points):
        _say(console, "Time is estimated, not validated.")


def _runs(points: pd.DataFrame) -> tuple[Winner, ...]:
    options = choices(points)
    return _winners(options[~holds_all(options)])


def _legend(group: pd.DataFrame) -> list[str]:
    bound = group["bound"].iloc[0]
    limit = "the fastest bound" if bound is None else f"the fastest bound ({bound})"
    return [
        "fastest: of policies within 2 % of each other, the one that lasts over the most budgets",
        "bound ms: an oracle that knows the future, the fastest in the same memory; no choice",
        f"gap %: time that {limit} would save",
        "late %: accesses whose prefetch had not arrived; stall ms: wait for experts, a step",
        "=: a tie, within 2 % of the first",
    ]


def _table(console: Console, columns: Sequence[str], gap: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        collapse_padding=True,
        caption_justify="left",
    )
    for column in columns:
        if column in _TEXT_COLUMNS:
            table.add_column(column, min_width=_LEAST_TEXT, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _width(console: Console) -> int:
    """A pipe has no width of its own: there the tables get their full one."""
    return min(console.width, _WIDTH) if console.is_terminal else _WIDTH


def _print(console: Console, title: str, table: Table) -> None:
    _say(console, title, style="bold")
    if console.is_terminal:
        console.print(table, width=_width(console))
        return
    options = console.options.update(width=_WIDTH)
    lines = console.render_lines(table, options, pad=False)
    for line in lines:
        _say(console, "".join(segment.text for segment in line).rstrip())
    _say(console, "")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _winner_table(console: Console, ranked: pd.DataFrame, runs: Sequence[Winner]) -> Table:
    columns = ("budget", "GPU GiB", "fastest", "TPOT ms", "", "runner-up", "TPOT ms", "bound ms")
    table = _table(console, columns, gap=2)
    budgets = sorted(ranked["expert_budget_bytes"].unique())
    picked = _spread(budgets, _MOST_BUDGETS)
    for budget in picked:
        table.add_row(*_winner_row(ranked[ranked["expert_budget_bytes"] == budget], runs))
    if len(picked) < len(budgets):
        table.caption = f"{len(picked)} of {len(budgets)} budgets"
    return table


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of ``values``, evenly spread, with the first and last."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _winner_row(group: pd.DataFrame, runs: Sequence[Winner]) -> list[str]:
    causal = group[group["kind"] == "causal"]
    fitting = causal[causal["fits"] & ~causal["saturated"]]
    share = str(group["budget"].iloc[0])
    bound_ms = group.loc[group["kind"] == "bound", "tpot_ms"].min()
    if fitting.empty:
        memory = _gib_figure(group["gpu_memory_bytes"].max())
        why = "does not fit" if len(causal) else "none swept"
        return [share, memory, why, "-", "", "-", "-", "-"]
    fastest = fitting.iloc[0]
    budget = fastest["expert_budget_bytes"]
    run = [w for w in runs if w.from_expert_bytes <= budget <= w.to_expert_bytes]
    if not run:
        memory = _gib_figure(fastest["gpu_memory_bytes"])
        figure = three_figures(fastest["tpot_ms"])
        return [share, memory, "all resident", figure, "", "-", "-", three_figures(bound_ms)]
    first = fitting[fitting["policy"] == run[0].policy].iloc[0]
    memory = _gib_figure(first["gpu_memory_bytes"])
    row = [share, memory, first["policy"], three_figures(first["tpot_ms"])]
    rest = fitting[fitting["policy"] != first["policy"]]
    if rest.empty:
        return [*row, "", "-", "-", three_figures(bound_ms)]
    second = rest.iloc[0]
    sign = "=" if second["tpot_ms"] <= fastest["tpot_ms"] * (1 + TIE_MARGIN) else "<"
    return [*row, sign, second["policy"], three_figures(second["tpot_ms"]), three_figures(bound_ms)]


def _full_title(row: Row) -> str:
    return (
        f"{row['system']}, budget {row['budget']}: {_gib(row['expert_budget_bytes'])} of experts "
        f"(speed-up over {row['faster_than']})"
    )


def _full_table(console: Console, group: pd.DataFrame) -> Table:
    columns = _RANK_COLUMNS if _width(console) == _WIDTH else _RANK_COLUMNS[:_FEW_COLUMNS]
    table = _table(console, columns, gap=1)
    shown = _shown(group)
    for row in shown.to_dict("records"):
        cells = _full_row(row)[: len(columns)]
        table.add_row(*cells, style="dim" if row["kind"] != "causal" else None)
    left = [label for label in group["policy"] if label not in set(shown["policy"])]
    notes = [f"{len(shown)} of {len(group)} policies, without {_listed(left)}"] if left else []
    if not group["fits"].all():
        notes.append(f"{int((~group['fits']).sum())} do not fit the GPU")
    table.caption = "; ".join(notes) or None
    return table


def _shown(group: pd.DataFrame) -> pd.DataFrame:
    """The fastest of each kind; the slowest causal one, mostly the baseline, stays in sight."""
    if len(group) <= _MOST_ROWS:
        return group
    bounds = group[group["kind"] == "bound"].head(_MOST_BOUNDS)
    rest = group[group["kind"] != "bound"]
    room = _MOST_ROWS - len(bounds)
    if len(rest) <= room:
        return pd.concat([rest, bounds])
    last = rest[rest["kind"] == "causal"].tail(1)
    return pd.concat([rest.drop(last.index).head(room - len(last)), last, bounds])


def _full_row(row: dict[Hashable, Any]) -> list[str]:
    sign = "=" if row["tie"] and row["place"] > 1 else ""
    return [
        escape(row["policy"]),
        three_figures(row["tpot_ms"]),
        sign if row["kind"] == "causal" else row["kind"],
        f"{row['times_faster']:.2f}",
        "-" if row["kind"] == "bound" else _percent(row["gap_to_bound"]),
        _percent(row["hit_rate"]),
        _percent(row["late_share"]),
        three_figures(row["stall_ms"]),
        three_figures(row["mb_per_token"]),
        three_figures(row["ttft_ms"]),
    ]
