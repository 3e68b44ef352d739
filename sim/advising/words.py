"""Advice in words: short, each number a simulated point."""

from __future__ import annotations

from collections.abc import Iterator

from sim.advising.answers import Advice, Limit, WhatIf
from sim.advising.confidence import Confidence
from sim.advising.search import Found
from sim.selection import link_name
from sim.wording import as_gib, as_ms, listed

_MOST_POLICIES = 6


def as_text(advice: Advice) -> str:
    """All answers, a paragraph each."""
    parts = [
        [*_heading(advice)],
        [_smallest_words(advice)],
        [_fastest_words(advice)],
        [*_knee_words(advice)],
        [*_limit_words(advice)],
        [*_what_if_words(advice)],
        [*_confidence_words(advice)],
        [*_line_words(advice)],
        [*_left_out_words(advice)],
    ]
    return "\n".join(line for part in parts for line in part)


def _heading(advice: Advice) -> Iterator[str]:
    system, question = advice.system, advice.question
    yield (
        f"{system['geometry']}, experts in {system['expert_dtype']}, on {system['hardware']}, "
        f"link {link_name(system['link_bytes_per_s'])}"
    )
    targets = {"TPOT": question.tpot_ms, "TTFT": question.ttft_ms}
    wanted = " and ".join(f"{name} {ms:g} ms" for name, ms in targets.items() if ms is not None)
    yield (
        f"Target: {wanted} at most ({_of(question.percentile)}); {system['batch']} "
        f"{'request' if system['batch'] == 1 else 'requests'} at a time, "
        f"{system['context']} tokens of KV cache each"
    )
    yield (
        f"Memory: {as_gib(advice.system['fixed_bytes'])} without experts, "
        f"{as_gib(system['slot_a_layer_bytes'])} for each slot a layer "
        f"({system['experts_a_layer']} experts in each of {system['moe_layers']} layers); "
        f"{as_gib(system['limit_bytes'])} at most"
    )
    yield (
        f"Judged on {system['judged_tokens']} tokens of {system['judged_requests']} requests; "
        f"{len(advice.points)} points simulated"
    )


def _of(percentile: str) -> str:
    return "mean" if percentile == "mean" else f"{percentile} of the requests"


def _smallest_words(advice: Advice) -> str:
    found = advice.smallest
    if found is None:
        return f"Smallest memory: no policy can meet it. {_hopeless_words(advice)}"
    if not advice.met:
        return (
            f"Smallest memory: no policy can meet it in {as_gib(advice.system['limit_bytes'])}: "
            f"the capacity is short by {as_gib(advice.short_by_bytes or 0)}. It takes "
            f"{_place(found)}. {_oracle_words(advice)}"
        )
    return f"Smallest memory: {_place(found)}. {_below_words(advice)}{_oracle_words(advice)}"


def _hopeless_words(advice: Advice) -> str:
    everything = advice.everything
    return (
        f"With every expert on the GPU ({as_gib(everything.gpu_memory_bytes)}) it is "
        f"{_times(everything)}: compute and host are the limit, not the capacity, and no oracle "
        "could do better."
    )


def _below_words(advice: Advice) -> str:
    below = advice.below
    if below is None or below.slots is None:
        return ""
    return f"With {_slots(below.slots)} the best is {below.policy}: {_times(below)}. "


def _oracle_words(advice: Advice) -> str:
    oracle, found = advice.oracle, advice.smallest
    if oracle is None or found is None:
        return ""
    if oracle.gpu_memory_bytes >= found.gpu_memory_bytes:
        return "An oracle that knows the future would need as much."
    fits = oracle.gpu_memory_bytes <= advice.system["limit_bytes"]
    could = "" if advice.met else (", which is there" if fits else ", which is not there either")
    return (
        f"An oracle that knows the future could do with {as_gib(oracle.gpu_memory_bytes)} "
        f"({_slots(oracle.slots)}){could}."
    )


def _fastest_words(advice: Advice) -> str:
    limit = as_gib(advice.system["limit_bytes"])
    found = advice.fastest
    if found is None:
        return f"Fastest in {limit}: nothing can run in it."
    if found.holds_all:
        return (
            f"Fastest in {limit}: every expert fits ({as_gib(found.gpu_memory_bytes)}), no policy "
            f"is needed: {_times(found)}."
        )
    return f"Fastest in {limit}: {_place(found)}."


def _knee_words(advice: Advice) -> Iterator[str]:
    if advice.knee is not None:
        yield f"Best value for little memory (knee): {_place(advice.knee)}."


def _place(found: Found) -> str:
    """Memory, slots, policy and time."""
    memory = as_gib(found.gpu_memory_bytes)
    if found.holds_all:
        return f"{memory}, all experts on the GPU, {_times(found)}"
    slots = "" if found.slots is None else f", {_slots(found.slots)}"
    ties = f" ({listed(found.ties)} as good)" if found.ties else ""
    lossy = "" if found.lossless else " (lossy: it changes what the model says)"
    return (
        f"{memory}{slots} ({found.expert_share:.1%} of the experts), {found.policy}{lossy}{ties}: "
        f"{_times(found)}"
    ).replace("%", " %")


def _slots(slots: int | None) -> str:
    return f"{slots} {'slot' if slots == 1 else 'slots'} a layer"


def _times(found: Found) -> str:
    if found.ttft_ms is None:
        return f"{as_ms(found.tpot_ms)} a token"
    return f"{as_ms(found.tpot_ms)} a token, first after {as_ms(found.ttft_ms)}"


_VERDICTS = {
    "policy-limited": "the policy limits: an oracle ({bound}) would take {saves} less time in the "
    "same memory; a better policy is worth coding",
    "capacity-limited": "the capacity limits: even an oracle ({bound}) would take only {saves} "
    "less time in the same memory; memory or link first",
    "beyond bound": "faster than any oracle that copies what it misses ({bound}, {ms}): the CPU "
    "does a part, and how much a better policy could gain is not known",
    "unknown": "no bound could be simulated",
}


def _limit_words(advice: Advice) -> Iterator[str]:
    for limit in advice.limits:
        yield f"Policy or capacity? {limit.policy}: {_verdict_words(limit)}."


def _verdict_words(limit: Limit) -> str:
    saves = f"{max(limit.saves, 0) * 100:.0f} %"
    return _VERDICTS[limit.verdict].format(bound=limit.bound, saves=saves, ms=as_ms(limit.bound_ms))


def _what_if_words(advice: Advice) -> Iterator[str]:
    if not advice.what_ifs:
        return
    simulated = next((each.policies for each in advice.what_ifs if each.policies), ())
    yield (
        "What would help (the whole search again"
        + (f", with {listed(simulated, most=_MOST_POLICIES)}" if simulated else "")
        + "):"
    )
    for each in advice.what_ifs:
        yield f"  {each.name}: {_one_what_if(advice, each)} [{each.leaves_out}]"


def _one_what_if(advice: Advice, each: WhatIf) -> str:
    if each.skipped is not None:
        return f"not simulated: {each.skipped}"
    smallest = (
        "not even all experts on the GPU meet the target"
        if each.smallest is None
        else f"{_place(each.smallest)} {_against(advice.smallest, each.smallest)}"
    )
    limit = as_gib(advice.system["limit_bytes"])
    if each.fastest is None:
        return f"{smallest}; nothing runs in {limit}"
    fastest = "all experts" if each.fastest.holds_all else each.fastest.policy
    return f"{smallest}; fastest in {limit}: {fastest}, {_times(each.fastest)}"


def _against(now: Found | None, then: Found) -> str:
    if now is None:
        return "would do"
    saved = now.gpu_memory_bytes - then.gpu_memory_bytes
    if saved == 0:
        return "would be needed all the same"
    return f"would do, {as_gib(abs(saved))} {'less' if saved > 0 else 'more'}"


def _confidence_words(advice: Advice) -> Iterator[str]:
    shown: dict[str, str] = {}
    for name, each in advice.confidence.items():
        shown.setdefault(_one_confidence(each), name)
    for words, name in shown.items():
        which = "" if len(shown) == 1 else f" ({name})"
        yield f"Confidence{which}: {words}."


def _one_confidence(each: Confidence) -> str:
    if each.level != "validated":
        return f"{each.level}: {each.why}"
    return (
        f"validated: off by {each.median_error:.1%} in the median, {each.worst_error:.1%} at worst, "
        f"so {each.low_ms:.1f} to {each.high_ms:.1f} ms; {each.why} ({each.source})"
    ).replace("%", " %")


def _line_words(advice: Advice) -> Iterator[str]:
    if not advice.lines:
        return
    chosen = "the smallest memory" if advice.met else "the fastest"
    yield f"For use elsewhere ({chosen}):"
    for line in advice.lines:
        yield f"  {line.tool}: {line.text}"
        yield f"      {line.assumes}"


def _left_out_words(advice: Advice) -> Iterator[str]:
    if advice.not_runnable:
        names = [each.policy for each in advice.not_runnable]
        yield f"Not runnable on this trace: {', '.join(names)} (--json says why)"
