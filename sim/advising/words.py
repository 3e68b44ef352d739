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
    """All answers: a line a fact, those that belong to an answer indented below it."""
    return "\n".join(line for lines in sections(advice).values() for line in lines)


def sections(advice: Advice) -> dict[str, list[str]]:
    """The lines of :func:`as_text` by what they are about."""
    answers = (*_smallest_words(advice), *_fastest_words(advice), *_knee_words(advice))
    return {
        "question": list(_heading(advice)),
        "answers": list(answers),
        "what-ifs": list(_what_if_words(advice)),
        "confidence": list(_confidence_words(advice)),
        "elsewhere": list(_line_words(advice)),
        "left out": list(_left_out_words(advice)),
    }


def _heading(advice: Advice) -> Iterator[str]:
    system, question = advice.system, advice.question
    requests = "1 request" if system["batch"] == 1 else f"{system['batch']} requests"
    targets = {"TPOT": question.tpot_ms, "TTFT": question.ttft_ms}
    wanted = [f"{name} {ms:g} ms" for name, ms in targets.items() if ms is not None]
    of = "mean" if question.percentile == "mean" else f"{question.percentile} of the requests"
    yield (
        f"{system['geometry']}, experts in {system['expert_dtype']}, on {system['hardware']}, "
        f"link {link_name(system['link_bytes_per_s'])}"
    )
    yield (
        f"Target: at most {' and '.join(wanted)} ({of}); {requests} at a time, "
        f"{system['context']} tokens of KV cache each"
    )
    yield (
        f"Memory: {as_gib(system['limit_bytes'])}; {as_gib(system['fixed_bytes'])} without "
        f"experts, {as_gib(system['slot_a_layer_bytes'])} more for each slot a layer "
        f"({system['moe_layers']} layers of {system['experts_a_layer']} experts)"
    )
    yield (
        f"Judged on {system['judged_tokens']} tokens of {system['judged_requests']} requests; "
        f"{len(advice.points)} points simulated"
    )
    if question.tpot_ms is None:
        yield "Who is fastest, the knee and what limits a policy are told by TPOT"


def _smallest_words(advice: Advice) -> Iterator[str]:
    found, everything = advice.smallest, advice.everything
    yield ""
    if found is None:
        yield "Smallest memory for the target: no policy can"
        yield (
            f"  all experts on the GPU, {as_gib(everything.gpu_memory_bytes)}: {_times(everything)}"
        )
        yield "  compute and host are the limit, not the capacity: no oracle could either"
        return
    if advice.met:
        yield f"Smallest memory for the target: {_place(found)}"
    else:
        limit = as_gib(advice.system["limit_bytes"])
        short = as_gib(advice.short_by_bytes or 0)
        yield f"Smallest memory for the target: no policy can in {limit}"
        yield f"  the capacity is short by {short}: it takes {_place(found)}"
    yield from (f"  {line}" for line in _beside(advice, found))


def _beside(advice: Advice, found: Found) -> Iterator[str]:
    below = advice.below
    if below is not None:
        yield f"with {_slots(below.slots)} the best is {below.policy}: {_times(below)}"
    yield from _limit_words(advice.limits.get("smallest"), found)
    oracle = advice.oracle
    if oracle is None:
        return
    if oracle.slots == found.slots:
        yield "an oracle that knows the future would need as many slots"
        return
    there = oracle.gpu_memory_bytes <= advice.system["limit_bytes"]
    could = "" if advice.met else (", which is there" if there else ", which is not there either")
    yield (
        f"an oracle that knows the future would meet it in {as_gib(oracle.gpu_memory_bytes)} "
        f"({_slots(oracle.slots)}){could}"
    )


def _fastest_words(advice: Advice) -> Iterator[str]:
    limit = as_gib(advice.system["limit_bytes"])
    found = advice.fastest
    yield ""
    if found is None:
        yield f"Fastest in {limit}: nothing can run in it"
        return
    yield f"Fastest in {limit}: {_place(found)}"
    yield from (f"  {line}" for line in _limit_words(advice.limits.get("fastest"), found))


def _knee_words(advice: Advice) -> Iterator[str]:
    if advice.knee is not None:
        yield f"Best value for little memory (knee): {_place(advice.knee)}"


def _place(found: Found) -> str:
    """Memory, slots, policy and time."""
    memory = as_gib(found.gpu_memory_bytes)
    if found.holds_all:
        return f"{memory}, all experts on the GPU: {_times(found)}"
    given = f", {found.expert_share * 100:.1f} % of the experts"
    slots = given if found.slots is None else f", {_slots(found.slots)}"
    ties = f" ({listed(found.ties)} as good)" if found.ties else ""
    lossy = "" if found.lossless else " (lossy: it changes what the model says)"
    return f"{memory}{slots}, {found.policy}{lossy}{ties}: {_times(found)}"


def _slots(slots: int | None) -> str:
    return f"{slots} {'slot' if slots == 1 else 'slots'} a layer"


def _times(found: Found) -> str:
    ttft = "" if found.ttft_ms is None else f", TTFT {as_ms(found.ttft_ms)}"
    return f"TPOT {as_ms(found.tpot_ms)}{ttft}"


_VERDICTS = {
    "policy-limited": "the policy is the limit: an oracle ({bound}) would take {saves} less time "
    "in the same memory",
    "capacity-limited": "the capacity is the limit: even an oracle ({bound}) would take only "
    "{saves} less time in the same memory",
    "beyond bound": "faster than any oracle that copies what it misses ({bound}, {ms}): {why}; "
    "what a better policy could gain is not known",
}


def _limit_words(limit: Limit | None, found: Found) -> Iterator[str]:
    if limit is not None and limit.verdict in _VERDICTS:
        why = "the CPU computes a part" if found.lossless else "it computes other experts"
        saves = f"{max(limit.saves, 0) * 100:.0f} %"
        yield _VERDICTS[limit.verdict].format(
            bound=limit.bound, saves=saves, ms=as_ms(limit.bound_ms), why=why
        )


def _what_if_words(advice: Advice) -> Iterator[str]:
    if not advice.what_ifs:
        return
    tried = next((each.policies for each in advice.what_ifs if each.policies), ())
    names = f", with {listed(tried, most=_MOST_POLICIES)}" if tried else ""
    yield ""
    yield f"What would help (searched again{names})"
    for each in advice.what_ifs:
        yield f"  {each.name}: {_one_what_if(advice, each)}"
    for said in dict.fromkeys(each.leaves_out for each in advice.what_ifs if each.policies):
        yield f"  {said}"


def _one_what_if(advice: Advice, each: WhatIf) -> str:
    if each.skipped is not None:
        return f"not simulated: {each.skipped}"
    fastest = _fastest_then(advice, each.fastest)
    if each.smallest is None:
        return f"not even all experts on the GPU meet the target; {fastest}"
    return f"{_against(advice.smallest, each.smallest)} {_place(each.smallest)}; {fastest}"


def _fastest_then(advice: Advice, fastest: Found | None) -> str:
    limit = as_gib(advice.system["limit_bytes"])
    if fastest is None:
        return f"nothing runs in {limit}"
    what = "all experts" if fastest.holds_all else fastest.policy
    return f"fastest in {limit}: {what}, {_times(fastest)}"


def _against(now: Found | None, then: Found) -> str:
    if now is None:
        return "the target could be met with"
    saved = now.gpu_memory_bytes - then.gpu_memory_bytes
    if saved == 0:
        return "as much memory:"
    return f"{as_gib(abs(saved))} {'less' if saved > 0 else 'more'}:"


def _confidence_words(advice: Advice) -> Iterator[str]:
    target = advice.question.tpot_ms
    said = {name: _one_confidence(each, target) for name, each in advice.confidence.items()}
    yield ""
    if len(set(said.values())) == 1:
        yield f"Confidence: {next(iter(said.values()))}"
        return
    for name, words in said.items():
        yield f"Confidence, {name}: {words}"


def _one_confidence(each: Confidence, target_ms: float | None) -> str:
    if each.median_error is None or each.worst_error is None:
        return f"{each.level}: {each.why}"
    high = each.high_ms or 0.0
    missed = " (so it may miss the target)" if target_ms is not None and high > target_ms else ""
    return (
        f"validated: {each.low_ms:.1f} to {high:.1f} ms a token{missed}, as {each.points} measured "
        f"points were off by {each.median_error * 100:.1f} % in the median and "
        f"{each.worst_error * 100:.1f} % at worst: {each.why} ({each.source})"
    )


def _line_words(advice: Advice) -> Iterator[str]:
    if not advice.lines:
        return
    chosen = "the smallest memory that meets the target" if advice.met else "the fastest"
    yield ""
    yield f"For use elsewhere, with {chosen}"
    for line in advice.lines:
        yield f"  {line.text}"
        yield f"      {line.tool}: {line.assumes}"


def _left_out_words(advice: Advice) -> Iterator[str]:
    if advice.not_runnable:
        names = [each.policy for each in advice.not_runnable]
        yield ""
        yield f"Not runnable on this trace: {', '.join(names)} (--json says why)"
