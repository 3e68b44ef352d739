"""One question, all its answers: simulated points, none of them by a rule of thumb."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import write_atomically
from configs.geometry import EXPERT_DTYPE_BITS
from configs.timings import load_timings
from policies.errors import PolicyError
from sim.advising.confidence import Confidence, confidence_in, find_campaigns
from sim.advising.elsewhere import Line, Pins, lines_for, pins_of, slots_in
from sim.advising.points import Points
from sim.advising.question import BOUNDS, Asked, Question, ask, label_of
from sim.advising.search import VERIFIED_BELOW, Choices, Found, System
from sim.compare import NotRunnable, split_failures, verdict_of
from sim.inputs import TraceSource
from sim.point import produced_by
from sim.sweeps import PolicyChoice, Progress, contents
from tracer.trace import Trace

ANSWER_FILE, TEXT_FILE = "advice.json", "advice.txt"

_FASTER = 2
_LOWER = ("int8", "mxfp4")


@dataclass(frozen=True)
class Limit:
    """What holds the policy of an answer back: ``policy-limited``, ``capacity-limited``, ...

    ``saves``: share of its time that the fastest bound in the same memory would take less.
    """

    policy: str
    bound: str
    bound_ms: float
    saves: float
    verdict: str


@dataclass(frozen=True)
class WhatIf:
    """The same question to another machine or model: its own points, simulated.

    ``skipped``: why there is no answer; ``policies``: those that were simulated.
    """

    name: str
    leaves_out: str
    smallest: Found | None
    fastest: Found | None
    policies: tuple[str, ...]
    skipped: str | None = None


@dataclass(frozen=True)
class Advice:
    """Answers to one question; ``text`` (and ``str``) is for people, :meth:`to_dict` has it all.

    ``smallest``: least memory that meets the target, whatever there is (None: not even all experts
    on the GPU do); ``met``: whether that fits; ``below``: the best with a slot a layer less;
    ``oracle``: fewest slots a layer with which a bound meets it (None: it takes more than
    ``smallest`` has, whose CPU may do a part). ``fastest``: in the memory there is (None:
    nothing runs in it), ``bound``: the fastest bound in it; ``everything``: with all experts on the
    GPU. ``limits``: of ``smallest`` and ``fastest``, where they have a policy. ``lines`` are for
    :attr:`chosen`.
    """

    question: Question
    system: dict[str, Any]
    smallest: Found | None
    met: bool
    below: Found | None
    oracle: Found | None
    fastest: Found | None
    bound: Found | None
    everything: Found
    knee: Found | None
    limits: dict[str, Limit]
    what_ifs: tuple[WhatIf, ...]
    confidence: dict[str, Confidence]
    pins: Pins | None
    lines: tuple[Line, ...]
    not_runnable: tuple[NotRunnable, ...]
    failed: tuple[str, ...]
    searched: dict[str, Any]
    produced_by: dict[str, Any]
    points: tuple[dict[str, Any], ...]

    @property
    def chosen(self) -> Found | None:
        """The smallest that meets the target, else the fastest there is room for."""
        return self.smallest if self.met else self.fastest

    @property
    def short_by_bytes(self) -> int | None:
        """By how much memory the target is missed; None: it is met, or no memory would do."""
        if self.met or self.smallest is None:
            return None
        return self.smallest.gpu_memory_bytes - int(self.system["limit_bytes"])

    @property
    def text(self) -> str:
        """All answers in words."""
        from sim.advising.words import as_text

        return as_text(self)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: answers, what they rest on, and every simulated point."""
        fields = {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        fields["question"] = self.question.model_dump(mode="json")
        points = fields.pop("points")
        return {**fields, "short_by_bytes": self.short_by_bytes, "points": points}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def advise(
    trace: str | Path | Trace,
    *,
    jobs: int = 1,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **question: Any,
) -> Advice:
    """How much memory, which policy, and what it costs: answers from simulated points.

    ``trace``: a directory, ``"sample"``, or an opened trace; ``question``: the fields of
    :class:`sim.advising.Question` (``hardware``, ``tpot_ms``, ...). Otherwise as :func:`answer`.
    """
    opened = trace if isinstance(trace, Trace) else Trace.open(trace)
    name = str(opened.path) if isinstance(trace, Trace) else str(trace)
    asked = Question(trace=name, **question)
    return answer(asked, opened, jobs=jobs, out=out, progress=progress)


def answer(
    question: Question,
    trace: TraceSource,
    *,
    jobs: int = 1,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Answer a question on an opened trace.

    ``jobs``: processes; ``out``: a directory that keeps points and answers, and where the same
    question goes on; ``progress(done, asked)`` is called as points finish. Raises UserError or
    PolicyError for what a user can mend, most of it before anything is simulated.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    asked = ask(question, trace)
    kept = None if out is None else Path(out)
    points = Points(trace, jobs=jobs, out=kept, identity=_identity(asked), progress=progress)
    advice = _answer(asked, points)
    if kept is not None:
        points.write_tables()
        as_json = json.dumps(advice.to_dict(), indent=1, allow_nan=False)
        write_atomically(kept / ANSWER_FILE, f"{as_json}\n".encode())
        write_atomically(kept / TEXT_FILE, f"{advice.text}\n".encode())
    return advice


def _identity(asked: Asked) -> dict[str, Any]:
    question = asked.question
    return {
        "question": question.model_dump(mode="json"),
        **contents([question.hardware], question.geometry, question.dtype),
        "timings contents": None
        if question.timings is None
        else load_timings(question.timings).model_dump(mode="json"),
        "trace digest": asked.trace.digest,
    }


def _answer(asked: Asked, points: Points) -> Advice:
    system = System(asked, points)
    system.at_slots(asked.candidates.values(), *system.grid)
    missing, _ = split_failures(points.frame())
    names = {each.policy for each in missing}
    choices = {label: each for label, each in asked.candidates.items() if label not in names}
    if asked.candidates and not choices:
        raise UserError(f"none of these policies can run on this trace; the first: {missing[0]}")
    smallest = _smallest(system, choices)
    fastest = system.fastest_in(choices, asked.limit_bytes)
    met = smallest is not None and smallest.gpu_memory_bytes <= asked.limit_bytes
    if not met:  # whole slots a layer may be too coarse: what of the very last byte?
        last = system.meeting_in(choices, asked.limit_bytes)
        smallest, met = last or smallest, last is not None
    chosen = smallest if met else fastest
    slots = None if smallest is None else smallest.slots
    pins, lines = _elsewhere(asked, system, choices, chosen)
    return Advice(
        question=asked.question,
        system=_facts(asked),
        smallest=smallest,
        met=met,
        below=system.best_at(choices, slots - 1) if slots is not None and slots > 1 else None,
        oracle=_oracle(system, smallest),
        fastest=fastest,
        bound=_bound_in(system, fastest, asked.limit_bytes),
        everything=system.everything(),
        knee=system.knee(choices),
        limits=_limits(system, {"smallest": smallest, "fastest": fastest}, asked.limit_bytes),
        what_ifs=tuple(_what_ifs(asked, points, _contenders(system, choices, chosen))),
        confidence=_confidence(asked, {"smallest": smallest, "fastest": fastest}),
        pins=pins,
        lines=lines,
        not_runnable=(*asked.left_out, *missing),
        failed=tuple(_faults(points)),
        searched={"slots_a_layer": system.grid, "verified_below": VERIFIED_BELOW},
        produced_by=produced_by(),
        points=tuple(points.all()),
    )


_BOUNDS: Choices = {label_of(choice): choice for choice in BOUNDS}


def _bound_in(system: System, fastest: Found | None, nbytes: int) -> Found | None:
    """The fastest bound in the memory there is, if that does not hold everything."""
    if fastest is None or fastest.holds_all:
        return None
    return system.best_in(_BOUNDS, nbytes)


def _oracle(system: System, smallest: Found | None) -> Found | None:
    """The bound that meets the target with the fewest slots a layer, of no more than a policy."""
    if smallest is None:
        return None
    slots = system.smallest(_BOUNDS, smallest.slots)
    return None if slots is None else system.meeting_at(_BOUNDS, slots)


def _smallest(system: System, choices: Choices) -> Found | None:
    slots = system.smallest(choices)
    return None if slots is None else system.best_at(choices, slots)


def _contenders(system: System, choices: Choices, chosen: Found | None) -> Choices:
    """Who is simulated in a what-if: fastest or tied somewhere here."""
    named = set(system.contenders(choices))
    if chosen is not None:
        named |= {chosen.policy, *chosen.ties}
    return {label: choice for label, choice in choices.items() if label in named}


def _faults(points: Points) -> Iterator[str]:
    """Faults of ours, which must not pass unseen."""
    for row in points.all():
        if str(row["error"]).startswith("internal error"):
            where = row["point.expert_budget"] or row["point.budget"]
            yield f"{row['label']} at {where}: {row['error']}"


def _facts(asked: Asked) -> dict[str, Any]:
    """What the question came down to."""
    setting, inputs = asked.setting, asked.inputs
    memory = setting.memory
    return {
        "hardware": setting.hardware.name,
        "link_bytes_per_s": setting.timing.link.bytes_per_s,
        "geometry": setting.geometry.name,
        "expert_dtype": setting.geometry.expert_dtype,
        "experts_a_layer": setting.geometry.num_experts,
        "moe_layers": setting.geometry.num_moe_layers,
        "timing": setting.timing.provenance,
        "limit_bytes": asked.limit_bytes,
        "card_bytes": setting.hardware.gpu_memory_bytes,
        "fixed_bytes": memory.fixed_bytes,
        "kv_bytes": memory.kv_bytes,
        "slot_a_layer_bytes": sum(setting.geometry.expert_bytes_by_layer),
        "context": setting.workload.max_context,
        "batch": setting.workload.max_batch,
        "model": inputs.manifest.model_id,
        "trace_digest": asked.trace.digest,
        "judged_requests": len(inputs.judged),
        "judged_tokens": setting.workload.num_tokens,
        "fitted_requests": len(inputs.fitted_on),
        "notes": list(inputs.notes),
    }


def _limits(system: System, answers: dict[str, Found | None], limit_bytes: int) -> dict[str, Limit]:
    """Of each answer that has a policy."""
    limits = {}
    for name, found in answers.items():
        if found is None or found.holds_all:
            continue
        bound = (
            system.best_in(_BOUNDS, limit_bytes)
            if found.slots is None
            else system.fastest_at(_BOUNDS, found.slots)
        )
        if bound is not None:
            saves = 1 - bound.tpot_ms / found.tpot_ms
            verdict = verdict_of("causal", saves, True)
            limits[name] = Limit(found.policy, bound.policy, bound.tpot_ms, saves, verdict)
    return limits


def _what_ifs(asked: Asked, points: Points, choices: Choices) -> Iterator[WhatIf]:
    """A faster link, then experts of fewer bits."""
    if not asked.question.what_if:
        return
    rate = asked.setting.timing.link.bytes_per_s
    link = f"{_FASTER * rate}B/s"
    yield _what_if(
        f"link x{_FASTER} ({_FASTER * rate / 1e9:.3g} GB/s)",
        "a faster link: the host is taken to keep up",
        System(asked, points, link=link),
        choices,
    )
    geometry = asked.setting.geometry
    bits = max(geometry.expert_bytes_by_layer) * 8 / geometry.expert_params
    for dtype in _LOWER:
        if EXPERT_DTYPE_BITS[dtype] >= 0.75 * bits:
            continue
        name = f"experts in {dtype}"
        leaves_out = (
            "fewer bits: same routing, compute by bytes alone; what the model says is not judged"
        )
        if asked.question.timings is not None:
            why = "measured times are of other experts: leave --timings out to have it estimated"
            yield WhatIf(name, leaves_out, None, None, (), why)
            continue
        yield _what_if(name, leaves_out, System(asked, points, dtype=dtype), choices)


def _what_if(name: str, leaves_out: str, system: System, choices: Choices) -> WhatIf:
    try:
        smallest = _smallest(system, choices)
        fastest = system.fastest_in(choices, system.limit_bytes)
    except (UserError, PolicyError) as error:
        return WhatIf(name, leaves_out, None, None, (), str(error))
    return WhatIf(name, leaves_out, smallest, fastest, tuple(choices))


def _confidence(asked: Asked, answers: dict[str, Found | None]) -> dict[str, Confidence]:
    campaigns = find_campaigns(asked.setting.hardware.name)
    return {
        name: confidence_in(found, asked.setting, asked.question.percentile, campaigns)
        for name, found in answers.items()
        if found is not None
    }


def _elsewhere(
    asked: Asked, system: System, choices: Choices, chosen: Found | None
) -> tuple[Pins | None, tuple[Line, ...]]:
    """Lines for other engines, with as many bytes of experts as the answer has."""
    if chosen is None:
        return None, ()
    if chosen.holds_all:
        return None, (Line("any engine", "no flag", "all experts fit on the GPU"),)
    slots = chosen.slots or slots_in(asked.setting.geometry, chosen.expert_bytes)
    pins = pins_of(asked, slots)
    split = PolicyChoice(name="fiddler")
    known = {label: each for label, each in choices.items() if each == split}
    found = system.fastest_at(known, slots) if known else None
    nbytes = slots * sum(asked.setting.geometry.expert_bytes_by_layer)
    split_ms = None if found is None else found.tpot_ms
    return pins, tuple(lines_for(asked, nbytes, pins, chosen.policy, split_ms))
