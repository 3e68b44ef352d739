"""What the host, the GPU, the link and the CPU did when, and a Chrome trace of it.

A *mark* ends whatever began at the mark before: (end in ns, kind, layer, how many). Simulated and
measured runs tell their host's time in marks of the same kinds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sim.watched import LATE, WASTED

STEP, SEGMENT, GPU, DECIDE, ISSUE, EXPERTS, COPY, CPU = range(8)
APART = -1
"""Of what the host does for nobody's step; no component."""
NAMES = (
    "step",
    "segment launch",
    "wait for GPU",
    "decide",
    "issue copies",
    "experts launch",
    "wait for copy",
    "wait for CPU",
)
"""Of the kinds. STEP: everything between steps' layers; SEGMENT: a segment or the head is launched;
GPU: polled until the device has run everything; DECIDE: a gate event or its next wave; ISSUE: the
window is refilled; EXPERTS: a group, or what adds the CPU's, is launched; COPY: polled until there
is something; CPU: a group is handed to the CPU, or polled until it is computed."""

KERNELS = ("segment", "experts", "head")
"""Names of :mod:`sim.gpu`'s kinds."""

_TROUBLE = (LATE, WASTED)

Mark = tuple[int, int, int, int]
Event = dict[str, Any]

_HOST, _GPU, _LINK, _CPU = 1, 2, 3, 4
_TRACKS = {_HOST: "host", _GPU: "GPU", _LINK: "link", _CPU: "CPU"}


class Kernel(NamedTuple):
    """A kernel on the GPU: its kind, from when to when, ns, and what is known of its contents.

    ``layer``: -1 for the head and where it is not known. ``experts``: keys that it computes;
    ``adds_cpu``: it adds what the CPU has computed.
    """

    kind: int
    begin: int
    end: int
    layer: int = -1
    experts: Sequence[int] = ()
    adds_cpu: bool = False


class CpuSpan(NamedTuple):
    """A group of experts that the CPU computes, by their keys, and from when to when, ns."""

    layer: int
    experts: Sequence[int]
    begin: int
    end: int


@dataclass(frozen=True)
class ChunkSpan:
    """A chunk on the wire: of which expert, why it was copied, and from when to when, ns.

    ``nbytes``: its bytes; ``copy``: the copy's serial number; ``number``: which of the copy's
    ``chunks`` it is, from 1; ``outcome``: what became of the copy. 0 and empty where not known.
    """

    key: int
    source: str
    demand: bool
    begin: int
    end: int
    nbytes: int = 0
    copy: int = 0
    number: int = 0
    chunks: int = 0
    outcome: str = ""


@dataclass(frozen=True)
class Timeline:
    """One run, or a stretch of it. ``kernels``: none where nobody timed them.

    ``step_begins``, ``step_ends``: of the run's steps, ns. ``under_way``: the chunk that was on the
    wire as the run ended, to the end that it would have had. ``cpu``: the CPU lane's groups.
    """

    name: str
    marks: Sequence[Mark]
    chunks: Sequence[ChunkSpan]
    kernels: Sequence[Kernel]
    step_begins: Sequence[int]
    step_ends: Sequence[int]
    under_way: ChunkSpan | None = None
    cpu: Sequence[CpuSpan] = ()

    @property
    def on_wire(self) -> list[ChunkSpan]:
        """All chunks, the one under way as the run ended among them, by when they began."""
        return [*self.chunks, *([self.under_way] if self.under_way else [])]


class Span(NamedTuple):
    """Something on a track, from when to when, ns, with what is told of it."""

    track: int
    name: str
    begin: int
    end: int
    told: Event


@dataclass(frozen=True)
class Naming:
    """What a key stands for. ``experts``: a layer's; ``layers``: the model's MoE layers.

    Where ``layers`` is known, so are low-bit copies of experts, whose keys follow those of all
    others, and the head, which comes after the last layer.
    """

    experts: int
    layers: int | None = None

    def of_key(self, key: int) -> tuple[int, int, bool]:
        """Layer, expert, and whether it is the low-bit copy."""
        layer, expert = divmod(key, self.experts)
        low = self.layers is not None and layer >= self.layers
        return layer % self.layers if low and self.layers else layer, expert, low

    def place(self, layer: int) -> Event:
        """Of something that belongs to a layer, the head or the step as a whole."""
        if layer < 0:
            return {}
        return {"layer": "head" if layer == self.layers else layer}

    def numbers(self, keys: Iterable[int]) -> list[int | str]:
        """Experts of one layer."""
        named = [self.of_key(key) for key in keys]
        return [f"{expert} low-bit" if low else expert for _, expert, low in named]


def chrome_trace(
    timelines: Sequence[Timeline], experts: int, first: int, last: int, layers: int | None = None
) -> Event:
    """Trace events of steps ``first`` to ``last``, each run a process.

    What straddles the stretch's ends is shown whole. All runs' first steps begin at one instant;
    times are us from there, or from where the earliest copy shown begins. ``experts``: a layer's,
    to name copies by layer and expert; ``layers``: the model's MoE layers, where low-bit copies are
    to be told from others.
    """
    naming = Naming(experts, layers)
    shown = [[*_shown(timeline, naming, first, last)] for timeline in timelines]
    # A copy may have begun before the first step did; no time may be negative.
    lead = 0
    for timeline, spans in zip(timelines, shown, strict=True):
        begin = timeline.step_begins[first]
        lead = max([lead, *(begin - span.begin for span in spans)])
    events: list[Event] = []
    for process, (timeline, spans) in enumerate(zip(timelines, shown, strict=True), start=1):
        origin = timeline.step_begins[first] - lead
        events += _names(process, timeline.name)
        events += [_event(process, span, origin) for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _shown(timeline: Timeline, naming: Naming, first: int, last: int) -> Iterator[Span]:
    """What happened, at least partly, in these steps."""
    begin, end = timeline.step_begins[first], timeline.step_ends[last]
    for span in (
        *_host(timeline, naming),
        *_gpu(timeline.kernels, naming),
        *_link(timeline.on_wire, naming),
        *_cpu(timeline.cpu, naming),
    ):
        if span.begin < end and span.end > begin:
            yield span


def _event(process: int, span: Span, origin: int) -> Event:
    return {
        "name": span.name,
        "cat": _TRACKS[span.track],
        "ph": "X",
        "pid": process,
        "tid": span.track,
        "ts": (span.begin - origin) / 1e3,
        "dur": (span.end - span.begin) / 1e3,
        "args": span.told,
    }


def _names(process: int, name: str) -> Iterator[Event]:
    yield {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}
    for track, title in _TRACKS.items():
        told = {"name": title}
        yield {"name": "thread_name", "ph": "M", "pid": process, "tid": track, "args": told}


def _host(timeline: Timeline, naming: Naming) -> Iterator[Span]:
    marks, begins = timeline.marks, timeline.step_begins
    begin = marks[0][0] if marks else 0
    for end, kind, layer, count in marks:
        if end > begin and kind != APART:
            told = {"step": bisect_right(begins, begin) - 1, **naming.place(layer), "count": count}
            yield Span(_HOST, NAMES[kind], begin, end, told)
        begin = end


def _gpu(kernels: Iterable[Kernel], naming: Naming) -> Iterator[Span]:
    for kernel in kernels:
        told = naming.place(kernel.layer)
        if kernel.experts:
            told["experts"] = naming.numbers(kernel.experts)
        if kernel.adds_cpu:
            told["adds"] = "what the CPU has computed"
        yield Span(_GPU, KERNELS[kernel.kind], kernel.begin, kernel.end, told)


def _link(chunks: Iterable[ChunkSpan], naming: Naming) -> Iterator[Span]:
    for chunk in chunks:
        layer, expert, low = naming.of_key(chunk.key)
        why = "demand" if chunk.demand else chunk.source
        told: Event = {"layer": layer, "expert": expert, "why": chunk.source}
        if low:
            told["precision"] = "low"
        if chunk.outcome:
            told["outcome"] = chunk.outcome
        if chunk.chunks:
            told |= {"bytes": chunk.nbytes, "copy": chunk.copy}
            told |= {"chunk": chunk.number, "chunks": chunk.chunks}
        name = f"{layer}/{expert}{' low-bit' if low else ''} {why}"
        if chunk.outcome in _TROUBLE:
            name += f", {chunk.outcome}"
        yield Span(_LINK, name, chunk.begin, chunk.end, told)


def _cpu(groups: Iterable[CpuSpan], naming: Naming) -> Iterator[Span]:
    for group in groups:
        experts = naming.numbers(group.experts)
        told = {**naming.place(group.layer), "experts": experts}
        name = f"{group.layer}/{','.join(map(str, experts))}"
        yield Span(_CPU, name, group.begin, group.end, told)
