"""The ranking in words: which policy to pick, where, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sim.ranking import (
    TIE_MARGIN,
    Verdict,
    Winner,
    by_budget,
    by_tpot,
    find_verdicts,
    find_winners,
    pick_among,
    reach_of_tie,
    tied_labels,
    winner_at,
    winner_at_knee,
)
from sim.selection import Row, choices, holds_all, is_estimated, prepare, systems
from sim.wording import as_gib, as_ms, listed, spread_over

_MOST_NAMED = 6


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
    winners = find_winners(options[~holds_all(options)])
    verdicts = find_verdicts(points, options)
    pick = pick_among(options)
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


def _estimate_note(points: pd.DataFrame) -> str:
    if not is_estimated(points):
        return ""
    return f" (estimated time: differences under {TIE_MARGIN:.0%} are not to be trusted)".replace(
        "%", " %"
    )


def _why_nothing(points: pd.DataFrame) -> str:
    causal = points[points["kind"] == "causal"]
    if causal.empty:
        return "No causal, lossless policy was swept: nothing to recommend."
    least = causal.sort_values("memory.peak_bytes", kind="stable").iloc[0]
    return (
        f"Nothing fits the GPU's {as_gib(least['memory.gpu_memory_bytes'])}: the smallest is "
        f"{least['label']} with {as_gib(least['memory.peak_bytes'])}. Sweep smaller budgets."
    )


def _pick_words(options: pd.DataFrame, pick: Row) -> str:
    gpu = f"On this GPU of {as_gib(pick['memory.gpu_memory_bytes'])}"
    cost = f"{as_ms(pick['tpot_ms.mean'])} a token in {as_gib(pick['memory.peak_bytes'])}"
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
    tied = tied_labels(group)
    return [label for label in by_tpot(group)["label"] if label in tied and label != policy]


def _as_good(ties: Sequence[str]) -> str:
    return f" ({_good(ties)})" if ties else ""


def _good(names: Sequence[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} as good"


def _smaller_words(options: pd.DataFrame, pick: Row, winners: Sequence[Winner]) -> list[str]:
    """What one gets for less memory than the pick's, from much to little."""
    smaller = options[options["expert_budget_bytes"] < pick["expert_budget_bytes"]]
    budgets = [*by_budget(smaller[~holds_all(smaller)])][::-1]
    if not budgets:
        return []
    shown = [_one_budget(options, budget, winners) for budget in spread_over(budgets, _MOST_NAMED)]
    return [f"With less memory: {'; '.join(shown)}."]


def _one_budget(options: pd.DataFrame, budget: int, winners: Sequence[Winner]) -> str:
    group = options[options["expert_budget_bytes"] == budget]
    policy = winner_at(winners, budget).policy
    own = group[group["label"] == policy].iloc[0]
    names = ", ".join([policy, *_ties_at(group, policy)][:3])
    memory = as_gib(own["memory.peak_bytes"])
    return f"{own['budget']}, {memory}, {as_ms(own['tpot_ms.mean'])} ({names})"


def _winner_words(winners: Sequence[Winner], options: pd.DataFrame) -> list[str]:
    """Runs of budgets by policy, where they say more than the headline."""
    if all(winner.from_expert_bytes == winner.to_expert_bytes for winner in winners):
        return []
    contested = by_budget(options[~holds_all(options)])
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
    tied = [tied_labels(group) for group in run]
    others = sorted(set().union(*tied) - {winner.policy, *winner.ties})
    upper = {label: reach_of_tie(tied[::-1], 0, label) for label in others}
    lower = {label: reach_of_tie(tied, 0, label) for label in others}
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
    return f"at {listed([verdict.budget for verdict in group], most=6)}"


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
    groups = by_budget(options)
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
        f"{as_ms(best['tpot_ms.mean'])} a token in {as_gib(best['memory.peak_bytes'])}."
    ]


def _misfit_words(points: pd.DataFrame) -> list[str]:
    """What was swept in vain."""
    causal = points[(points["kind"] == "causal") & ~points["saturated"]]
    vain = [group for group in by_budget(causal).values() if not group["memory.fits"].any()]
    if not vain:
        return []
    needs = [
        f"{group['budget'].iloc[0]} needs {as_gib(group['memory.peak_bytes'].min())}"
        for group in vain
    ]
    verb = "does" if len(vain) == 1 else "do"
    return [f"{listed(needs, most=_MOST_NAMED)}: {verb} not fit."]
